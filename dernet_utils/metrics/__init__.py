"""Classification and detection metrics, their intervals by study, and tests of significance.

Pure functions of labels, probabilities and boxes; nothing here knows of networks or files.
"""

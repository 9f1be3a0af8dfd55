"""Classification and detection metrics, their intervals by study, and tests of significance.

Pure functions of labels, probabilities and boxes; nothing here needs a network or a file.
"""

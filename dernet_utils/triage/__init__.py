"""Triage, normal or abnormal: three classifiers trained fold by fold, their vote, explanations.

Other wings use `crossvalidation` (probabilities of all images), `ensemble` (Eq. 2, and what is
chosen out of fold) and `explain`. `ensemble` needs no torch.
"""

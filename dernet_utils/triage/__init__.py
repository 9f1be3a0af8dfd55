"""Normal or abnormal: three classifiers, trained fold by fold, one weighted vote, explanations.

Others use `crossvalidation` (probabilities of all images), `ensemble` (Eq. 2 and what is chosen out
of fold) and `explain`. `ensemble` needs no torch.
"""

"""Triage: is a radiograph normal or abnormal? Three classifiers, their ensemble, explanations.

Other wings use `crossvalidation` (a run's images, out-of-fold probabilities and decision),
`training` and `networks` (checkpoints, a network's input and output), and `ensemble` (Eq. 2 and
calibration), which needs no torch. `explain` (heat maps, lesion masks) is used by chapters.
`augment` and `images` belong to `training`.
"""

"""A VinDr-SpineXR folder: its annotations, its problems, its typed tables, folds by study.

Others use `tables`, whose files a run's preparation writes once, `check` and `folds`.
"""

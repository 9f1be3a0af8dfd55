"""A VinDr-SpineXR folder: its annotations, its problems, its typed tables, folds by study.

Other wings use `check` (all problems of a folder), `tables` (a folder without any), `folds`, and
`prepared` (what a run's preparation wrote once). `annotations` and `problems` belong to these.
"""

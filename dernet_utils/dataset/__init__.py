"""A VinDr-SpineXR folder: its annotations, its problems, its typed tables, folds by study.

Other wings may use `check` (all problems of a folder), `summary` (prints them), `tables` (reads a
folder without problems), `folds`, `prepared` (the tables that a run's preparation wrote), and
`table_form` (a CSV file's rows). `annotations` and `problems` are internal.
"""

"""The virtual radiographs: one donor CT, many patients, lesions in three dimensions, X-rays.

Others use `cohort`, which writes a folder in the form of VinDr-SpineXR, and `counterfactual`, which
reads what each radiograph would show without a lesion. Chapter A1 explains the rest.
"""

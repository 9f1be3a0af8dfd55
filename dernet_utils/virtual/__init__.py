"""Virtual radiographs: many patients from one donor CT, with lesions modelled in three dimensions.

Other wings may use `cohort` (writes a folder in the form of VinDr-SpineXR), `counterfactual` (reads
each radiograph without one of its findings), `faint` (findings without a label), `donor` (fetches
and loads the CT) and, for figures, `render`. Chapter A1 explains how radiographs are made.
"""

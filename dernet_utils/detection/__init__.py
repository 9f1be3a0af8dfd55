"""Localisation of lesions: YOLO11-L with the paper's losses and mosaic, and the baselines.

Other wings use `images` (a run's split, the recipe, the files that ultralytics reads), `training`
(checkpoints) and `yolo` (the network and its trainer). `prediction`, `baselines` and `losses` are
used by chapters too. `augment` and `offline` belong to these.
"""

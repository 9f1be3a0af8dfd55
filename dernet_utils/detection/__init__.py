"""Localisation of lesions: YOLO11-L with the paper's losses and mosaic, and the baselines.

Other wings use `images` (a run's split, the recipe, the files that ultralytics reads), `training`
(checkpoints) and `yolo` (the network and its trainer). Chapters also use `prediction`, `baselines`,
`losses` and `augment`. `offline` keeps ultralytics off the network.
"""

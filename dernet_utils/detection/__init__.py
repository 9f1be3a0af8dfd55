"""Where the lesions are: YOLO11-L with the paper's losses and mosaic, and other detectors.

Others use `images` (what is trained on), `training`, `prediction` and `baselines`.
"""

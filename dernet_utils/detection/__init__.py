"""Localisation of lesions: YOLO11-L with the paper's losses and mosaic, and the baselines.

Other wings use `images` (training and evaluation images), `training`, `prediction` and `baselines`.
"""

"""The paper's Tables 2 and 3, and this run's results beside them, in separate columns."""

import pandas as pd

from dernet_utils.core.vocabulary import NETWORK_NAMES
from dernet_utils.core.workspace import Workspace
from dernet_utils.metrics.intervals import Interval

TRAIN_IMAGES = 8389  # VinDr-SpineXR's training split (Nguyen et al., MICCAI 2021)
# AUROC, F1, sensitivity, specificity in per cent, in the order of METRICS; None: not printed.
# By its own abstract, HealNNet's AUROC is of 468 images, not of 2,078.
TABLE_2 = {
    "VinDr Ensemble": (88.61, 81.06, 83.07, 79.32),
    "HealNNet": (88.84, 81.20, None, None),
    "densenet121": (86.93, 79.55, 80.39, 79.32),
    "tf_efficientnetv2_s": (89.44, 79.34, 70.80, 91.12),
    "resnet50": (88.88, 80.15, 82.72, 78.13),
    "DERNet": (91.03, 83.09, 84.91, 81.68),
}
# AP of the seven types, in the order of LESION_TYPES, then mAP; at IoU 0.5, in per cent.
# The VinDr-SpineXR row has a soft gate (Nguyen et al.): the detector's boxes below a confidence of
# 0.5 are dropped on images that the classifier calls normal.
TABLE_3 = {
    "DINO": (16.58, 22.87, 28.53, 32.71, 59.78, 41.28, 3.24, 29.28),
    "RetinaNet": (14.53, 25.35, 41.67, 32.14, 65.49, 51.85, 5.30, 28.09),
    "Faster R-CNN": (22.66, 35.99, 49.24, 31.68, 65.22, 51.68, 2.16, 31.83),
    "Sparse R-CNN": (20.09, 32.67, 48.16, 45.32, 72.20, 49.30, 5.41, 33.15),
    "VinDr-SpineXR": (21.43, 27.36, 34.78, 41.29, 62.53, 43.39, 4.16, 33.56),
    "EGCA-Net": (22.36, 29.75, 36.73, 44.69, 66.58, 50.41, 2.09, 36.09),
    "YOLO11-L": (26.70, 41.40, 40.60, 54.80, 74.10, 51.20, 2.99, 40.10),
}
# Boxes of the training split, in the order of LESION_TYPES (Nguyen et al., MICCAI 2021).
PUBLISHED_BOXES = (924, 387, 12_562, 280, 429, 268, 248)
PUBLISHED_ABNORMAL = 4129  # of the training images
METRICS = {"auroc": "AUROC", "f1": "F1", "sensitivity": "Sensitivity", "specificity": "Specificity"}


def compare_with_table_2(
    workspace: Workspace, found: dict[str, dict[str, pd.DataFrame]], methods: tuple[str, ...]
) -> pd.DataFrame:
    """Return rows of the paper's Table 2 with this run's results beside them.

    Args:
        workspace: The run, whose dataset the columns name.
        found: Per column of ours, such as ``out of fold``, and per method, a table as
            `metrics.classification.classification_table` returns it.
        methods: Keys of `TABLE_2`: the rows to return.

    Returns:
        One row per method and metric, as text in per cent, ours with 95 % intervals; a dash for a
        value that was not printed or not measured.
    """
    ours = "virtual cohort" if workspace.virtual else "VinDr-SpineXR"
    rows = {}
    for method in methods:
        for (metric, name), value in zip(METRICS.items(), TABLE_2[method], strict=True):
            row = {"paper: VinDr-SpineXR": "–" if value is None else f"{value:.2f}"}
            for column, tables in found.items():
                table = tables.get(method)
                row[f"this run: {ours}, {column}"] = (
                    "–" if table is None else _percent(table.loc[metric])
                )
            rows[NETWORK_NAMES.get(method, method), name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["method", "metric"])


def _percent(row: pd.Series) -> str:
    interval = Interval(**row)
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"

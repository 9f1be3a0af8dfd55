"""Findings of a virtual cohort that are on the image but too faint to be labelled."""

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from dernet_utils.core.vocabulary import CORNERS
from dernet_utils.virtual.counterfactual import read_counterfactuals
from dernet_utils.virtual.render import find_box


def faint_boxes(root: Path, manifest: dict | None, image_ids: Collection[str]) -> pd.DataFrame:
    """Return the boxes that findings without a label would have.

    A detection of such a finding is neither right nor wrong by the dataset's labels. Evaluations
    can ignore it: in the table of true boxes, these boxes get the mark ``outside`` that
    `metrics.matching.match_boxes` knows.

    Args:
        root: The cohort's folder.
        manifest: As `dataset.tables.read_manifest` returns it; None for real radiographs.
        image_ids: The images.

    Returns:
        `image_id`, `lesion_type` and corners, in stored pixels. A finding mostly outside an image's
        field has no box there. Empty where the findings are not known: without a manifest, or in a
        copy of a cohort without its counterfactuals.

    Raises:
        DernetError: As `read_counterfactuals` raises.
    """
    wanted, rows = set(image_ids), []
    known = manifest is not None and (root / "twins").is_dir()
    for study in manifest["studies"] if known else []:
        for view, image in zip(study["views"], study["films"], strict=True):
            faint = [seen["box"] is None for seen in image["findings"]]
            if image["image_id"] not in wanted or not any(faint):
                continue
            found = read_counterfactuals(root, image["image_id"])
            for finding, unlabelled, one in zip(study["findings"], faint, found, strict=True):
                if unlabelled and one is not None:
                    box = find_box(one.mask, view["spacing_mm"])
                    rows.append([image["image_id"], finding["type"], *box])
    return pd.DataFrame(rows, columns=["image_id", "lesion_type", *CORNERS])

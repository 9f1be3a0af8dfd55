"""Cross-validation folds by study: all images of a study are held out together."""

import warnings

import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from dernet_utils.core.errors import DernetError


def make_folds(images_train: pd.DataFrame, n_folds: int, seed: int) -> pd.DataFrame:
    """Split the training studies into folds.

    All images of a study are in one fold; within that limit, the folds' fractions of abnormal
    images are as equal as possible (scikit-learn's StratifiedGroupKFold). The order of the rows has
    no influence.

    Args:
        images_train: Rows of `Dataset.images` whose split is ``train``; at least the columns
            `image_id`, `study_id`, `split` and `abnormal`.
        n_folds: Number of folds (paper, section 4.1: 5).
        seed: Seed of the split.

    Returns:
        `image_id`, `study_id` and `fold` (0 to `n_folds` - 1), ordered by image.

    Raises:
        DernetError: An image is of the test split, there are fewer studies than folds,
            fewer images of each label than folds, or all images have one label.

    >>> studies = [number // 2 for number in range(12)]
    >>> images = pd.DataFrame({"image_id": range(12), "study_id": studies, "split": "train"})
    >>> folds = make_folds(images.assign(abnormal=images.study_id % 2 == 0), 3, seed=42)
    >>> folds["fold"].value_counts().tolist()
    [4, 4, 4]
    """
    images = images_train.sort_values("image_id").reset_index(drop=True)
    studies = images["study_id"].nunique()
    if (images["split"] != "train").any():
        raise DernetError(
            "Folds are made of training images only, but some are of the test split: pass "
            "images[images.split == 'train']."
        )
    labels = images["abnormal"].value_counts()
    if studies < n_folds or len(labels) < 2 or labels.max() < n_folds:
        raise DernetError(
            f"{n_folds} stratified folds need at least {n_folds} studies, with normal and abnormal "
            f"images and {n_folds} of the more frequent, but there are {studies} studies and "
            f"{images['abnormal'].sum()} of {len(images)} images are abnormal: take fewer folds or "
            "more data."
        )
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    folds = images[["image_id", "study_id"]].assign(fold=-1)
    with warnings.catch_warnings():
        # scikit-learn warns where a class has fewer images than there are folds. Only tests have so
        # small a cohort, and its folds are still disjoint by study.
        warnings.filterwarnings("ignore", message="The least populated class")
        splits = splitter.split(images, images["abnormal"], images["study_id"])
        for fold, (_, held_out) in enumerate(splits):
            folds.loc[held_out, "fold"] = fold
    return folds

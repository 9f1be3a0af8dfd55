"""Predicted boxes matched to true boxes, by COCO's rules as in pycocotools."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import CORNERS
from dernet_utils.imaging.boxes import box_iou

MOST_BOXES = 100  # of one lesion type on one image; COCO's limit
SMALL_SHARE = 0.01  # fraction of the field of view below which a lesion is small (section 3.3)


@dataclass(frozen=True)
class Matches:
    """Predictions by falling score, each matched to a true box or to none.

    Attributes:
        image: Position of each prediction's image in the list of images, shape (n,).
        score: Score of each prediction, shape (n,), falling.
        hit: Whether each is a true positive, shape (n,).
        truths: Number of true boxes per image, shape (images,).
    """

    image: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    truths: np.ndarray


def size_stratum(boxes: pd.DataFrame, images: pd.DataFrame, small: bool) -> pd.DataFrame:
    """Mark the boxes outside a size stratum, for an evaluation within it.

    A lesion is small if its box covers less than `SMALL_SHARE` of the field of view, which is the
    whole stored image.

    Args:
        boxes: True boxes or predictions: `image_id` and corners, in stored pixels.
        images: `image_id`, `height` and `width`, in pixels, of every image that has a box.
        small: Whether the stratum is that of the small boxes or that of all others.

    Returns:
        The boxes with a column `outside`, bool. `match_boxes`, and every metric that does not
        refuse a stratum, treats these boxes as COCO treats boxes outside an area range.

    Raises:
        DernetError: A column is missing, an image is listed twice or not at all, or an image has
            no area.

    >>> images = pd.DataFrame({"image_id": ["a"], "height": [100], "width": [100]})
    >>> box = pd.DataFrame({"image_id": ["a"], "xmin": [0], "ymin": [0], "xmax": [9], "ymax": [9]})
    >>> size_stratum(box, images, small=True)["outside"].tolist()
    [False]
    """
    need_columns(images, ["image_id", "height", "width"], "The table of images")
    need_columns(boxes, ["image_id", *CORNERS], "A table of boxes")
    if images["image_id"].duplicated().any():
        raise DernetError("Each image has one size, but one is listed twice: drop duplicates.")
    sizes = images.set_index("image_id")[["height", "width"]].astype(np.float64)
    fields_px = sizes.prod(axis=1).reindex(boxes["image_id"]).to_numpy()
    if not (fields_px > 0).all():
        raise DernetError(
            f"A fraction of the field of view needs each image's size: {(~(fields_px > 0)).sum()} "
            "boxes lie on images that are not listed or have no area. Pass all images that have "
            "boxes, with height and width in pixels."
        )
    corners = boxes[list(CORNERS)].to_numpy(np.float64)
    fractions = (corners[:, 2:] - corners[:, :2]).prod(1) / fields_px
    return boxes.assign(outside=(fractions < SMALL_SHARE) != small)


def match_boxes(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    lesion_type: str,
    image_ids: Sequence[str],
    iou: float = 0.5,
) -> Matches:
    """Match a lesion type's predictions to its true boxes, image by image.

    By falling score, each prediction takes the unmatched true box with the largest IoU, if that is
    at least `iou`.

    Within a size stratum, a prediction prefers true boxes of the stratum. A prediction that takes a
    true box outside the stratum, or takes none and is itself outside, is neither a true nor a false
    positive and is left out, as in COCO's area ranges.

    Args:
        truth: `image_id`, `lesion_type` and corners; with `outside` where `size_stratum` added it.
        predictions: The same, and `score`.
        lesion_type: The type to match.
        image_ids: Image ids, each once; boxes of other images are left out.
        iou: Least IoU of a match, in (0, 1].

    Raises:
        DernetError: A column is missing, an image is listed twice, a corner or a score is not a
            number, or only one of the tables is marked by `size_stratum`.
    """
    if len(set(image_ids)) != len(image_ids):
        raise DernetError("Each image is evaluated once, but one is listed twice: drop duplicates.")
    if ("outside" in truth) != ("outside" in predictions):
        raise DernetError(
            "A size stratum must be marked in both tables, but is in one: pass true boxes and "
            "predictions through size_stratum."
        )
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    true_of = _by_image(truth, lesion_type, [])
    found_of = _by_image(predictions, lesion_type, ["score"])
    parts = [
        _match_image(row_of[image_id], true_of.get(image_id), found, iou)
        for image_id, found in sorted(found_of.items())  # equal scores rank by image, as in COCO's
        if image_id in row_of
    ]
    truths = np.array(
        [
            (true_of[image_id][:, -1] == 0).sum() if image_id in true_of else 0
            for image_id in image_ids
        ]
    )
    return join_ranked(parts, truths)


def join_ranked(parts: list[tuple], truths: np.ndarray) -> Matches:
    """Join parts (image, score and hit of their predictions) by falling score; ties keep order."""
    none = np.empty(0, int), np.empty(0), np.empty(0, bool)
    image, score, hit = map(np.concatenate, zip(none, *parts, strict=True))
    order = np.argsort(-score, kind="stable")
    return Matches(image[order], score[order], hit[order], truths)


def _by_image(boxes: pd.DataFrame, lesion_type: str, more: list[str]) -> dict[str, np.ndarray]:
    """Return a lesion type's boxes by image; predictions by falling score.

    Args:
        boxes: `image_id`, `lesion_type`, corners, and `outside` where a stratum is marked.
        lesion_type: The type to select.
        more: ``["score"]`` for predictions, of which the best `MOST_BOXES` are kept; else empty.

    Returns:
        Per image an array of the corners, `more`, and whether outside.

    Raises:
        DernetError: A column is missing, or a number is nan.
    """
    need_columns(boxes, ["image_id", "lesion_type"], "A table of boxes")
    own = boxes[boxes["lesion_type"] == lesion_type]
    outside = own["outside"] if "outside" in own else np.zeros(len(own))
    values = np.column_stack([box_numbers(own, more), outside])
    rows_of = own.groupby("image_id", sort=False).indices
    by_id = {image_id: values[rows] for image_id, rows in rows_of.items()}
    if more:
        for image_id, found in by_id.items():
            by_id[image_id] = found[np.argsort(-found[:, 4], kind="stable")[:MOST_BOXES]]
    return by_id


def need_columns(table: pd.DataFrame, columns: list[str], name: str) -> None:
    """Raise a DernetError that calls the table `name` if a column is missing."""
    if missing := [column for column in columns if column not in table]:
        raise DernetError(f"{name} needs the columns {columns}, but {missing} are missing.")


def box_numbers(boxes: pd.DataFrame, more: list[str]) -> np.ndarray:
    """Return corners and the columns `more` as float64, shape (n, 4 + more).

    Raises:
        DernetError: A column is missing, or a number is nan.
    """
    need_columns(boxes, [*CORNERS, *more], "A table of boxes")
    values = boxes[[*CORNERS, *more]].to_numpy(np.float64)
    if np.isnan(values).any():
        raise DernetError("A box has four corners, a prediction also a score: one is not a number.")
    return values


def _match_image(row: int, true: np.ndarray | None, found: np.ndarray, iou: float) -> tuple:
    """Return image, score and hit, as in `Matches`, of an image's predictions that count.

    Args:
        row: The image's position in the list of images.
        true, found: Its boxes as `_by_image` returns them; `true` may be None.
        iou: Least IoU of a match, in (0, 1].
    """
    score, outside = found[:, 4], found[:, -1] > 0
    hit, counts = np.zeros(len(found), bool), ~outside
    if true is not None:
        overlaps = box_iou(found[:, :4], true[:, :4])
        inside = np.broadcast_to(true[:, -1] == 0, overlaps.shape)
        partner = _partners(overlaps, [overlaps, inside], iou)
        hit = (partner >= 0) & (true[partner, -1] == 0)
        counts = np.where(partner >= 0, hit, ~outside)
    return np.full(counts.sum(), row), score[counts], hit[counts]


def _partners(overlaps: np.ndarray, keys: list[np.ndarray], iou: float) -> np.ndarray:
    """Return the true box that each prediction takes, in the order of rows, or -1: (predictions,).

    Of the unmatched true boxes with enough overlap it takes the one with the largest last key; ties
    go to the largest of the key before it and then, as in pycocotools, to the last box. Overlaps
    (IoU) and keys have the shape (predictions, true boxes).
    """
    partner = np.full(len(overlaps), -1)
    free = overlaps >= min(iou, 1 - 1e-10)
    for row in np.flatnonzero(free.any(1)):
        choice = np.flatnonzero(free[row])
        if len(choice):
            partner[row] = choice[np.lexsort([key[row, choice] for key in keys])[-1]]
            free[:, partner[row]] = False
    return partner

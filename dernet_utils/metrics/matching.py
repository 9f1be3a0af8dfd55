"""What a detector's answers are worth: boxes against boxes, by COCO's rules as in pycocotools."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import CORNERS
from dernet_utils.imaging.boxes import box_iou

MOST_BOXES = 100  # of one lesion type on one film; COCO's limit
SMALL_SHARE = 0.01  # of the field of view; below it a lesion is small (paper, section 3.3)


@dataclass(frozen=True)
class Matches:
    """A lesion type's predictions, surest first, each matched to a true box or to none.

    Attributes:
        film: Row of each prediction's film in the list that was passed, shape (n,).
        score: Probability, shape (n,), falling.
        hit: Whether it is a true box's one match, shape (n,).
        truths: Number of true boxes of each film, shape (films,).
    """

    film: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    truths: np.ndarray


def size_stratum(boxes: pd.DataFrame, images: pd.DataFrame, small: bool) -> pd.DataFrame:
    """Mark the boxes outside a stratum of size, for an evaluation inside it.

    A lesion is small where its box covers less than `SMALL_SHARE` of the field of view, which is
    the whole stored image.

    Args:
        boxes: True boxes or predictions: `image_id` and corners, in stored pixels.
        images: `image_id`, `height` and `width`, in pixels, of every film that has a box.
        small: Whether the stratum is that of the small boxes, or that of all others.

    Returns:
        The boxes with a column `outside`, bool, which `match_boxes`, and with it every score of
        this module that says nothing else, takes as COCO takes boxes outside an area range.

    Raises:
        DernetError: A column is missing, a film is listed twice or not at all, or a film has no
            area.

    >>> films = pd.DataFrame({"image_id": ["a"], "height": [100], "width": [100]})
    >>> box = pd.DataFrame({"image_id": ["a"], "xmin": [0], "ymin": [0], "xmax": [9], "ymax": [9]})
    >>> size_stratum(box, films, small=True)["outside"].tolist()
    [False]
    """
    need_columns(images, ["image_id", "height", "width"], "The table of films")
    need_columns(boxes, ["image_id", *CORNERS], "A table of boxes")
    if images["image_id"].duplicated().any():
        raise DernetError("Each film has one size, and one is listed twice: drop duplicates.")
    sizes = images.set_index("image_id")[["height", "width"]].astype(np.float64)
    fields_px = sizes.prod(axis=1).reindex(boxes["image_id"]).to_numpy()
    if not (fields_px > 0).all():
        raise DernetError(
            f"A share of the field of view needs the size of each film: {(~(fields_px > 0)).sum()} "
            "boxes lie on films that are not listed or have no area. Pass all films that have "
            "boxes, with height and width in pixels."
        )
    corners = boxes[list(CORNERS)].to_numpy(np.float64)
    shares = (corners[:, 2:] - corners[:, :2]).prod(1) / fields_px
    return boxes.assign(outside=(shares < SMALL_SHARE) != small)


def match_boxes(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    lesion_type: str,
    films: Sequence[str],
    iou: float = 0.5,
) -> Matches:
    """Match a lesion type's predictions to its true boxes, film by film.

    The surest prediction chooses first, and takes the free true box that it overlaps most, where
    that overlap is at least `iou`; a true box is taken once.

    Inside a size stratum a prediction prefers true boxes of the stratum. One that takes a true
    box outside, or takes none and is itself outside, is neither hit nor false alarm and is left
    out, as COCO does for area ranges.

    Args:
        truth: `image_id`, `lesion_type` and corners; with `outside` where `size_stratum` added it.
        predictions: The same, and `score`.
        lesion_type: The type to match.
        films: Image ids, each once; boxes of other films are left out.
        iou: Least overlap of a match, in (0, 1].

    Raises:
        DernetError: A column is missing, a film is listed twice, a score is not a number, or only
            one of the tables is marked with a stratum.
    """
    if len(set(films)) != len(films):
        raise DernetError("Each film is evaluated once, and one is listed twice: drop duplicates.")
    if ("outside" in truth) != ("outside" in predictions):
        raise DernetError(
            "A stratum is marked in both tables, and here in one: pass true boxes and predictions "
            "through size_stratum."
        )
    row_of = {film: row for row, film in enumerate(films)}
    true_of = by_image(truth, lesion_type, [])
    found_of = by_image(predictions, lesion_type, ["score"])
    parts = [
        (row_of[film], *judge_predictions(true_of.get(film), found, iou))
        for film, found in sorted(found_of.items())  # equal scores rank by film, as in COCO's
        if film in row_of
    ]
    rows = np.concatenate([np.full(len(hit), row) for row, _, hit in parts] or [np.empty(0, int)])
    score = np.concatenate([score for _, score, _ in parts] or [np.empty(0)])
    hit = np.concatenate([hit for _, _, hit in parts] or [np.empty(0, bool)])
    order = np.argsort(-score, kind="stable")
    truths = np.array(
        [(true_of[film][:, -1] == 0).sum() if film in true_of else 0 for film in films]
    )
    return Matches(rows[order], score[order], hit[order], truths)


def by_image(boxes: pd.DataFrame, lesion_type: str, more: list[str]) -> dict[str, np.ndarray]:
    """Corners (and score) of one lesion type, and whether outside, by film, surest first."""
    need_columns(boxes, ["image_id", "lesion_type"], "A table of boxes")
    own = boxes[boxes["lesion_type"] == lesion_type]
    outside = own["outside"] if "outside" in own else np.zeros(len(own))
    values = np.column_stack([box_numbers(own, more), outside])
    rows_of = own.groupby("image_id", sort=False).indices
    by_film = {film: values[rows] for film, rows in rows_of.items()}
    if more:
        for film, found in by_film.items():
            by_film[film] = found[np.argsort(-found[:, 4], kind="stable")[:MOST_BOXES]]
    return by_film


def need_columns(table: pd.DataFrame, columns: list[str], name: str) -> None:
    if missing := [column for column in columns if column not in table]:
        raise DernetError(f"{name} has the columns {columns}, and {missing} are missing.")


def box_numbers(boxes: pd.DataFrame, more: list[str]) -> np.ndarray:
    """Corners and the columns `more`, shape (n, 4 + more)."""
    need_columns(boxes, [*CORNERS, *more], "A table of boxes")
    values = boxes[[*CORNERS, *more]].to_numpy(np.float64)
    if np.isnan(values).any():
        raise DernetError("A box has four corners, and a prediction a score: one is not a number.")
    return values


def judge_predictions(true: np.ndarray | None, found: np.ndarray, iou: float) -> tuple:
    """Scores of a film's predictions that count, and which of them are hits."""
    score, outside = found[:, 4], found[:, -1] > 0
    if true is None:
        return score[~outside], np.zeros((~outside).sum(), bool)
    overlaps = box_iou(found[:, :4], true[:, :4])
    inside = np.broadcast_to(true[:, -1] == 0, overlaps.shape)
    partner = _partners(overlaps, [overlaps, inside], iou)
    hit = (partner >= 0) & (true[partner, -1] == 0)
    counts = np.where(partner >= 0, hit, ~outside)
    return score[counts], hit[counts]


def _partners(overlaps: np.ndarray, keys: list[np.ndarray], iou: float) -> np.ndarray:
    """True box that each prediction takes, surest first, or -1, shape (predictions,).

    Of the free true boxes with enough overlap, (predictions, true boxes), it takes the one with
    the largest last key, of equal ones the largest key before, and at last, as pycocotools, the
    last.
    """
    partner = np.full(len(overlaps), -1)
    free = overlaps >= min(iou, 1 - 1e-10)
    for row in np.flatnonzero(free.any(1)):
        choice = np.flatnonzero(free[row])
        if len(choice):
            partner[row] = choice[np.lexsort([key[row, choice] for key in keys])[-1]]
            free[:, partner[row]] = False
    return partner

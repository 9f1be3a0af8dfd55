"""Average precision of a detector, its intervals and strata, by COCO's rules as in pycocotools."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from dernet_utils.core.errors import DernetError
from dernet_utils.metrics.intervals import Interval, draw_weights, interval_of
from dernet_utils.metrics.matching import (
    MOST_BOXES,
    Matches,
    box_numbers,
    match_boxes,
    need_columns,
    size_stratum,
)

RECALLS = np.linspace(0, 1, 101)  # COCO samples the precision-recall curve here
# The least number of true boxes of a lesion type for which an average precision is reported. In the
# simulation of chapter A2, the 95 % bootstrap interval by study contains the true value about as
# often with 30 boxes as with 100, but far too rarely with 4. With 10 boxes the estimate is biased
# and the interval still spans up to half of the scale. Below: `froc.found_table`.
LEAST_BOXES = 30
SIZES = {"below 1 %": True, "1 % and above": False}  # of the field of view; whether it is small


def precision_recall(matches: Matches) -> pd.DataFrame:
    """Return the precision-recall curve, the area under which is the average precision.

    Returns:
        101 rows: `recall` from 0 to 1, and the best `precision` at that recall or a higher one, 0
        beyond the highest recall.
    """
    curve = _curves(matches, np.ones((1, len(matches.truths))))[0]
    return pd.DataFrame({"recall": RECALLS, "precision": curve})


def _curves(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Return precision at RECALLS with image i counted weights[:, i] times, shape (draws, 101).

    The curve is computed at true positives only: recall changes only there, and only there can
    precision be the best at its recall or a higher one.
    """
    stops = np.flatnonzero(matches.hit)
    hits = weights[:, matches.image[stops]].cumsum(1)
    ranked = _running(matches.image, stops, weights)
    precision = np.divide(hits, ranked, out=np.zeros_like(hits), where=ranked > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.column_stack([best, np.zeros(len(best))])  # beyond the last true positive
    truths = weights @ matches.truths
    recall = np.divide(hits, truths[:, None], out=np.zeros_like(hits), where=truths[:, None] > 0)
    first = np.stack([row.searchsorted(RECALLS) for row in recall])
    return np.take_along_axis(best, first, axis=1)


def _running(image: np.ndarray, stops: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted number of predictions up to and including each stop.

    Predictions are counted once per image between one stop and the next, and weighted in one sparse
    product: far fewer steps than a cumulative sum over all predictions in every draw.

    Args:
        image: Row of each prediction's image, by falling score, shape (n,).
        stops: Ranks up to which predictions are counted, rising, shape (stops,).
        weights: How often each image counts, shape (draws, images).

    Returns:
        Shape (draws, stops).
    """
    image = image[: stops[-1] + 1 if len(stops) else 0]
    stretch = stops.searchsorted(np.arange(len(image)))  # the next stop of each prediction
    shape = (len(stops), weights.shape[1])
    between = csr_array((np.ones(len(image)), (stretch, image)), shape)
    return (between @ weights.T).cumsum(0).T


def weighted_areas(matches: Matches, weights: np.ndarray, chunk: int = 100) -> np.ndarray:
    """Return the average precision of matched boxes for each row of images' weights.

    Args:
        matches: A lesion type's, as `match_boxes` returns them.
        weights: How often each image counts, float64, shape (draws, images).
        chunk: Number of draws computed at once.

    Returns:
        Shape (draws,), in [0, 1]; nan where no true box has weight.
    """
    parts = [
        _curves(matches, weights[first : first + chunk]).mean(1)
        for first in range(0, len(weights), chunk)
    ]
    return np.where(weights @ matches.truths > 0, np.concatenate(parts), np.nan)


def average_precision(
    truth: pd.DataFrame, predictions: pd.DataFrame, lesion_type: str, iou: float = 0.5
) -> float:
    """Return a lesion type's average precision: COCO's mean precision over 101 recalls.

    Args:
        truth: `image_id`, `lesion_type`, `xmin`, `ymin`, `xmax`, `ymax`.
        predictions: The same, and `score`; on the same images, in the same pixels.
        lesion_type: The type to evaluate.
        iou: Least IoU of a true positive, in (0, 1].

    Returns:
        A number in [0, 1]; nan if there is no true box of the type.

    Raises:
        DernetError: As `match_boxes` raises.

    >>> box = {"image_id": "a", "lesion_type": "Osteophytes", "xmin": 0, "ymin": 0, "xmax": 9,
    ...        "ymax": 9}
    >>> average_precision(pd.DataFrame([box]), pd.DataFrame([box | {"score": 0.7}]), "Osteophytes")
    1.0
    """
    image_ids = _image_ids(truth, predictions)
    matches = match_boxes(truth, predictions, lesion_type, image_ids, iou)
    return float(weighted_areas(matches, np.ones((1, len(image_ids))))[0])


def weighted_average_precision(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    lesion_type: str,
    image_ids: Sequence[str],
    iou: float = 0.5,
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from weights of images, shape (draws, images), to average precisions.

    For `intervals.bootstrap`; boxes are matched once.

    Args, raises: As `match_boxes`.

    Returns:
        The function; it gives nan for a draw in which no true box has weight.
    """
    matches = match_boxes(truth, predictions, lesion_type, image_ids, iou)
    return lambda weights: weighted_areas(matches, np.asarray(weights, np.float64))


def _image_ids(truth: pd.DataFrame, predictions: pd.DataFrame) -> list[str]:
    return sorted({*truth["image_id"], *predictions["image_id"]})


def mean_average_precision(
    truth: pd.DataFrame, predictions: pd.DataFrame, iou: float = 0.5
) -> tuple[float, pd.Series]:
    """Return the mean average precision over the lesion types of the true boxes.

    Args:
        truth, predictions, iou: As `average_precision` takes them.

    Returns:
        The mean, in [0, 1], nan without true boxes; and each type's value, by name.

    Raises:
        DernetError: As `match_boxes` raises.
    """
    types = sorted(truth["lesion_type"].unique())
    each = pd.Series({name: average_precision(truth, predictions, name, iou) for name in types})
    return float(each.mean()) if types else float("nan"), each


def coco_average_precision(
    truth: pd.DataFrame, predictions: pd.DataFrame
) -> tuple[float, pd.DataFrame]:
    """Return COCO's AP@[0.5:0.95], the mean over ten IoU thresholds, by faster-coco-eval.

    Matching and averaging are that library's, so column 0.5 checks `average_precision`
    independently. The other nine measure how tightly boxes fit (Lin et al., ECCV 2014).

    Args:
        truth, predictions: As `average_precision` takes them.

    Returns:
        The mean over thresholds and over the lesion types of the true boxes, in [0, 1], nan without
        true boxes; and a table with one row per type and one column per threshold.

    Raises:
        DernetError: A column is missing, a corner or a score is not a number, or a table is
            marked by `size_stratum`; for a stratum, use `average_precision`.
    """
    # imported here: training a detector needs this module, but not the library
    from faster_coco_eval import COCO, COCOeval_faster

    _all_sizes(truth, predictions)
    types = sorted(truth["lesion_type"].unique())
    ious = pd.Index([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95], name="iou")
    number_of = {name: number for number, name in enumerate(types, start=1)}
    row_of = {image_id: row for row, image_id in enumerate(_image_ids(truth, predictions), start=1)}

    def annotations(boxes: pd.DataFrame, more: list[str]) -> list[dict]:
        own = boxes[boxes["lesion_type"].isin(types)]
        keys = zip(
            own["image_id"], own["lesion_type"], box_numbers(own, more).tolist(), strict=True
        )
        return [
            {
                "id": number,
                "image_id": row_of[image_id],
                "category_id": number_of[name],
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
                **dict(zip(more, score, strict=True)),
            }
            for number, (image_id, name, (left, top, right, bottom, *score)) in enumerate(keys, 1)
        ]

    frame = {
        "images": [{"id": row} for row in row_of.values()],
        "categories": [{"id": number, "name": name} for name, number in number_of.items()],
    }
    true = COCO(frame | {"annotations": annotations(truth, [])})
    found = COCO(frame | {"annotations": annotations(predictions, ["score"])})
    if not types:
        return float("nan"), pd.DataFrame(index=types, columns=ious, dtype=float)
    run = COCOeval_faster(true, found, "bbox")
    run.params.areaRng, run.params.areaRngLbl = [[0, np.inf]], ["all"]
    run.params.maxDets = [MOST_BOXES]
    run.evaluate()
    run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]  # IoU threshold, recall, type
    each = pd.DataFrame(precision.mean(1).T, types, ious)
    return float(each.to_numpy().mean()), each


def detection_table(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    images: pd.DataFrame,
    resamples: int = 1000,
    seed: int = 42,
    iou: float = 0.5,
) -> pd.DataFrame:
    """Return each lesion type's average precision, and their mean, with 95 % intervals by study.

    Predictions are matched once; a draw of studies changes only the images' weights.

    Args:
        truth, predictions, iou: As `average_precision` takes them.
        images: `image_id` and `study_id` of every image that was analysed. Images without true
            boxes are needed too, for their studies and their false positives.
        resamples: Number of bootstrap draws (paper, section 4.1: 1,000).
        seed: Seed of the draws, which all rows share.

    Returns:
        One row per lesion type of the true boxes and a last row ``mAP``, with `boxes` (number of
        true boxes) and the columns of `intervals.Interval`.

    Raises:
        DernetError: As `match_boxes` and `resample_by_study` raise, or a box's image is not listed.
    """
    image_ids, weights = _searched(images, truth, predictions), _weights(images, resamples, seed)
    types, boxes, areas = _all_areas(truth, predictions, image_ids, weights, iou)
    rows = [
        {"boxes": count, **vars(interval_of(values, images["study_id"].to_numpy()))}
        for count, values in zip([*boxes, sum(boxes)], areas, strict=True)
    ]
    return pd.DataFrame(rows, index=pd.Index([*types, "mAP"], name="lesion_type"))


def supported(scores: pd.DataFrame) -> pd.Series:
    """Return which average precisions have enough true boxes for a bootstrap interval.

    Args:
        scores: What `detection_table` returns.

    Returns:
        bool, by `scores`' index: whether a type has at least `LEAST_BOXES`; for ``mAP``, whether
        every type has that it is a mean of.
    """
    enough = scores["boxes"] >= LEAST_BOXES
    averaged = enough[(scores["boxes"] > 0) & (scores.index != "mAP")]
    enough["mAP"] = len(averaged) > 0 and bool(averaged.all())
    return enough


def _all_areas(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    image_ids: list[str],
    weights: np.ndarray,
    iou: float,
) -> tuple[list[str], list[int], np.ndarray]:
    """Return types, their numbers of true boxes, and each type's and the mean's APs by draw."""
    types = sorted(truth["lesion_type"].unique())
    matched = [match_boxes(truth, predictions, name, image_ids, iou) for name in types]
    areas = np.array([weighted_areas(matches, weights) for matches in matched])
    areas = areas.reshape(len(types), len(weights))  # without a true box too
    present = ~np.isnan(areas)
    mean = np.nansum(areas, axis=0) / np.where(present.any(0), present.sum(0), np.nan)
    boxes = [int(matches.truths.sum()) for matches in matched]
    return types, boxes, np.vstack([areas, mean])


def mean_difference(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    others: pd.DataFrame,
    images: pd.DataFrame,
    resamples: int = 1000,
    seed: int = 42,
    iou: float = 0.5,
    level: float = 0.95,
) -> Interval:
    """Return the difference of two detectors' mean average precisions, with its interval.

    Both use the same draws of studies, so what makes a study hard for both cancels.

    Args:
        truth, predictions, images, resamples, seed, iou: As `detection_table` takes them.
        others: The other detector's boxes.
        level: Coverage of the interval in (0, 1).

    Raises:
        DernetError: As `detection_table` raises.
    """
    image_ids = _searched(images, truth, predictions, others)
    weights = _weights(images, resamples, seed)
    first, second = (
        _all_areas(truth, found, image_ids, weights, iou)[2][-1] for found in (predictions, others)
    )
    return interval_of(first - second, images["study_id"].to_numpy(), level)


def _searched(images: pd.DataFrame, *tables: pd.DataFrame) -> list[str]:
    """Return the images' ids; raise DernetError where a box of the tables lies on no such image."""
    image_ids = list(images["image_id"])
    if strangers := set().union(*(boxes["image_id"] for boxes in tables)) - set(image_ids):
        raise DernetError(
            f"Every box must lie on an image of the list, but {len(strangers)} images with boxes "
            "are not in it: pass all images that were analysed."
        )
    return image_ids


def _weights(images: pd.DataFrame, resamples: int, seed: int) -> np.ndarray:
    """Return images' weights, first all 1, then as drawn by study: (1 + resamples, images)."""
    drawn = draw_weights(images["study_id"].to_numpy(), resamples, seed)
    return np.vstack([np.ones(len(images)), drawn])


def size_table(
    truth: pd.DataFrame, predictions: pd.DataFrame, images: pd.DataFrame, **options
) -> pd.DataFrame:
    """Return `detection_table` for lesions below 1 % of the field of view and for the others.

    Args:
        truth, predictions: As `detection_table` takes them.
        images: As `detection_table` takes it, and `height` and `width` in pixels.
        options: `resamples`, `seed` and `iou` of `detection_table`.

    Returns:
        Both tables in one, indexed by `size` (of `SIZES`) and `lesion_type`. A type without true
        boxes in a stratum has nan there and is left out of that stratum's mean.

    Raises:
        DernetError: As `size_stratum` and `detection_table` raise.
    """
    tables = {
        name: detection_table(
            size_stratum(truth, images, small),
            size_stratum(predictions, images, small),
            images,
            **options,
        )
        for name, small in SIZES.items()
    }
    return pd.concat(tables, names=["size"])


def _all_sizes(truth: pd.DataFrame, predictions: pd.DataFrame) -> None:
    """Raise DernetError where a size stratum is marked or a table lacks images or types."""
    if "outside" in truth or "outside" in predictions:
        raise DernetError(
            "Boxes of all sizes are evaluated here, but a size stratum is marked: pass the tables "
            "without the column outside."
        )
    for boxes in (truth, predictions):
        need_columns(boxes, ["image_id", "lesion_type"], "A table of boxes")

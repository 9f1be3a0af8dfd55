"""Detection at a score threshold: free-response curves and confusion of lesion types."""

from dataclasses import fields

import numpy as np
import pandas as pd

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.boxes import box_iou
from dernet_utils.metrics.detection import _all_sizes, _running, _searched, _weights
from dernet_utils.metrics.intervals import interval_of
from dernet_utils.metrics.matching import Matches, _partners, box_numbers, join_ranked, match_boxes
from dernet_utils.metrics.proportions import Proportion, exact_by_study

# Setio et al., Med Image Anal 42, 2017.
FALSE_POSITIVES_PER_IMAGE = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
NO_LESION, NOT_FOUND = "no lesion", "not found"  # margins of `type_confusion`


def froc_curve(
    truth: pd.DataFrame, predictions: pd.DataFrame, images: pd.DataFrame, iou: float = 0.5
) -> pd.DataFrame:
    """Return the free-response curve: sensitivity against false positives per image.

    All lesion types count together, but each is matched separately: a true positive is of the same
    type. For one type, pass only its boxes. Average precision summarises a ranking; this curve
    shows what a radiologist would see at a threshold (Bunch et al., J Appl Photogr Eng 4, 1978).

    Args:
        truth, predictions, iou: As `average_precision` takes them. Predictions of a type without
            true boxes are false positives.
        images: `image_id` of every image that was analysed, including those without boxes.

    Returns:
        A row for each distinct `score`, falling, as the threshold: all predictions with at least
        that score are accepted. `false_positives_per_image` is a mean; `sensitivity` is the
        fraction of true boxes found, nan without true boxes. The first row, with the score inf,
        accepts nothing.

    Raises:
        DernetError: As `match_boxes` raises, there is no image, or a box's image is not listed.
    """
    image_ids = _searched(images, truth, predictions)
    if not image_ids:
        raise DernetError("False positives are counted per image: pass at least one image.")
    matches = _all_types(truth, predictions, image_ids, iou)
    ends = _ends_of_scores(matches)
    hits = matches.hit.cumsum()[ends]
    accepted = {
        "score": matches.score[ends],
        "false_positives_per_image": (ends + 1 - hits) / len(image_ids),
        "sensitivity": hits / (matches.truths.sum() or np.nan),
    }
    none = {"score": np.inf, "false_positives_per_image": 0.0}
    none["sensitivity"] = 0.0 if matches.truths.any() else np.nan
    return pd.DataFrame({name: np.append(none[name], part) for name, part in accepted.items()})


def froc_table(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    images: pd.DataFrame,
    resamples: int = 1000,
    seed: int = 42,
    iou: float = 0.5,
) -> pd.DataFrame:
    """Return the sensitivity at given false positives per image, with 95 % intervals by study.

    Each is the highest sensitivity of `froc_curve` with at most that many false positives. Every
    draw of studies has its own curve and so its own thresholds.

    Args:
        truth, predictions, iou: As `froc_curve` takes them.
        images, resamples, seed: As `detection_table` takes them.

    Returns:
        One row for each of `FALSE_POSITIVES_PER_IMAGE`, with the columns of `intervals.Interval`.

    Raises:
        DernetError: As `match_boxes` and `resample_by_study` raise, or a box's image is not listed.
    """
    image_ids = _searched(images, truth, predictions)
    matches = _all_types(truth, predictions, image_ids, iou)
    found = _found_within(matches, _weights(images, resamples, seed))
    rows = [vars(interval_of(values, images["study_id"].to_numpy())) for values in found.T]
    return pd.DataFrame(
        rows, index=pd.Index(FALSE_POSITIVES_PER_IMAGE, name="false_positives_per_image")
    )


def found_table(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    images: pd.DataFrame,
    false_positives_per_image: float = 1.0,
    iou: float = 0.5,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return how many true boxes of each lesion type are found at a rate of false positives.

    It is for types with fewer than `detection.LEAST_BOXES` true boxes, from which no average
    precision is reported. The score threshold is the lowest at which the detector has at most that
    many false positives per image, over all types and images. The interval takes it as given.

    Args:
        truth, predictions, iou: As `froc_curve` takes them.
        images: `image_id` and `study_id` of every image that was analysed, including those without
            boxes.
        false_positives_per_image: Highest mean number of false positives of all types per image.
        level: Coverage of the intervals in (0, 1).

    Returns:
        One row per lesion type of the true boxes, with the columns of `proportions.Proportion`:
        `count` of `total` boxes are found; the ends are those of `proportions.exact_by_study`. The
        column `score` is the threshold, inf where even the most confident score has too many.

    Raises:
        DernetError: As `froc_curve` and `exact_by_study` raise, or a table is marked by
            `size_stratum`.
    """
    _all_sizes(truth, predictions)
    curve = froc_curve(truth, predictions, images, iou)
    within = curve["false_positives_per_image"] <= false_positives_per_image
    threshold = curve.loc[within, "score"].iloc[-1]
    image_ids, study = list(images["image_id"]), images["study_id"].to_numpy()
    rows = {}
    for name in sorted(truth["lesion_type"].unique()):
        matches = match_boxes(truth, predictions, name, image_ids, iou)
        hits = matches.image[matches.hit & (matches.score >= threshold)]
        hits = np.bincount(hits, minlength=len(study))
        studies = np.concatenate([study.repeat(hits), study.repeat(matches.truths - hits)])
        own = exact_by_study(np.arange(len(studies)) < hits.sum(), studies, level)
        rows[name] = vars(own) | {"score": threshold}
    columns = [*(field.name for field in fields(Proportion)), "score"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("lesion_type")


def _all_types(
    truth: pd.DataFrame, predictions: pd.DataFrame, image_ids: list[str], iou: float
) -> Matches:
    """Return the matches of all types in one list, by falling score."""
    types = sorted({*truth["lesion_type"], *predictions["lesion_type"]})
    parts = [match_boxes(truth, predictions, name, image_ids, iou) for name in types]
    ranked = [(part.image, part.score, part.hit) for part in parts]
    truths = sum((part.truths for part in parts), start=np.zeros(len(image_ids), int))
    return join_ranked(ranked, truths)


def _ends_of_scores(matches: Matches) -> np.ndarray:
    """Return the last rank of each distinct score: equal scores are accepted together."""
    return np.flatnonzero(np.diff(matches.score, append=np.nan))


def _found_within(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Return sensitivity at FALSE_POSITIVES_PER_IMAGE with image i counted weights[:, i] times.

    Shape (draws, 7). The curve is computed only at scores with a true positive, since sensitivity
    changes only there.
    """
    ends = _ends_of_scores(matches)
    stops = ends[np.unique(ends.searchsorted(np.flatnonzero(matches.hit)))]
    hits = weights[:, matches.image[matches.hit]].cumsum(1)[:, matches.hit.cumsum()[stops] - 1]
    false_positives = _running(matches.image, stops, weights) - hits
    allowed = weights.sum(1)[:, None] * FALSE_POSITIVES_PER_IMAGE
    accepted = np.stack(
        [
            row.searchsorted(most, "right")
            for row, most in zip(false_positives, allowed, strict=True)
        ]
    )
    hits = np.column_stack([np.zeros(len(hits)), hits])  # nothing accepted, nothing found
    truths = (weights @ matches.truths)[:, None]
    return np.take_along_axis(hits, accepted, axis=1) / np.where(truths > 0, truths, np.nan)


def type_confusion(
    truth: pd.DataFrame, predictions: pd.DataFrame, threshold: float, iou: float = 0.5
) -> pd.DataFrame:
    """Count true boxes by their true and their predicted type, at one score threshold.

    Matching ignores types. On each image, by falling score, a prediction takes the unmatched true
    box with the largest IoU, if that is at least `iou`; ties go to a box of its own type.

    Args:
        truth: `image_id`, `lesion_type` and corners.
        predictions: The same, and `score`.
        threshold: A prediction is accepted where its score is at least this.
        iou: Least IoU of a match, in (0, 1].

    Returns:
        Numbers of boxes. Rows are true types and a last row `NO_LESION`, the false positives;
        columns are predicted types and a last column `NOT_FOUND`, the false negatives. Types of
        both tables are in alphabetical order. A type's row adds up to its true boxes, its column to
        its accepted predictions.

    Raises:
        DernetError: A column is missing, a corner or a score is not a number, or a table is
            marked by `size_stratum`.

    >>> box = {"image_id": "a", "xmin": 0, "ymin": 0, "xmax": 9, "ymax": 9}
    >>> truth = pd.DataFrame([box | {"lesion_type": "Osteophytes"}])
    >>> found = pd.DataFrame([box | {"lesion_type": "Other lesions", "score": 0.7}])
    >>> int(type_confusion(truth, found, 0.5).loc["Osteophytes", "Other lesions"])
    1
    """
    _all_sizes(truth, predictions)
    true_boxes, found_boxes = box_numbers(truth, []), box_numbers(predictions, ["score"])
    true_types, found_types = truth["lesion_type"].to_numpy(), predictions["lesion_type"].to_numpy()
    true_of = truth.groupby("image_id").indices
    named = np.full(len(truth), NOT_FOUND, object)
    meant = np.full(len(predictions), NO_LESION, object)
    accepted = found_boxes[:, 4] >= threshold
    for image_id, rows in predictions.groupby("image_id").indices.items():
        rows = rows[accepted[rows]]
        rows = rows[np.argsort(-found_boxes[rows, 4], kind="stable")]
        own = true_of.get(image_id, np.empty(0, int))
        overlaps = box_iou(found_boxes[rows, :4], true_boxes[own])
        same = found_types[rows][:, None] == true_types[own]
        partner = _partners(overlaps, [same, overlaps], iou)
        rows, taken = rows[partner >= 0], own[partner[partner >= 0]]
        named[taken], meant[rows] = found_types[rows], true_types[taken]
    false = accepted & (meant == NO_LESION)
    rows = np.concatenate([true_types, meant[false]])
    columns = np.concatenate([named, found_types[false]])
    types = sorted({*true_types, *found_types})
    counts = pd.crosstab(rows, columns).reindex(
        index=[*types, NO_LESION], columns=[*types, NOT_FOUND], fill_value=0
    )
    return counts.rename_axis(index="true", columns="found")

"""What a detector's answers are worth: boxes against boxes, by COCO's rules as in pycocotools."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from dernet_utils.data import CORNERS
from dernet_utils.errors import DernetError
from dernet_utils.stats import Interval, draw_weights, interval_of

RECALLS = np.linspace(0, 1, 101)  # where COCO reads the precision-recall curve
MOST_BOXES = 100  # of one lesion type on one film; COCO's limit
SMALL_SHARE = 0.01  # of the field of view; below it a lesion is small (paper, section 3.3)
FALSE_ALARMS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # a film (Setio et al., Med Image Anal 42, 2017)
NO_LESION, NOT_FOUND = "no lesion", "not found"  # margins of `type_confusion`
SIZES = {"below 1 %": True, "1 % and above": False}  # of the field of view: whether small


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


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the intersection over union of every pair of boxes.

    Args:
        first: Corners xmin, ymin, xmax, ymax, shape (n, 4).
        second: The same, shape (m, 4).

    Returns:
        Shape (n, m), in [0, 1]; zero where neither box has an area.

    >>> box_iou(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2], [5, 5, 6, 6]])).round(3).tolist()
    [[0.333, 0.0]]
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


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
    _need(images, ["image_id", "height", "width"], "The table of films")
    _need(boxes, ["image_id", *CORNERS], "A table of boxes")
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
    true_of = _by_film(truth, lesion_type, [])
    found_of = _by_film(predictions, lesion_type, ["score"])
    parts = [
        (row_of[film], *_judged(true_of.get(film), found, iou))
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


def _by_film(boxes: pd.DataFrame, lesion_type: str, more: list[str]) -> dict[str, np.ndarray]:
    """Corners (and score) of one lesion type, and whether outside, by film, surest first."""
    _need(boxes, ["image_id", "lesion_type"], "A table of boxes")
    own = boxes[boxes["lesion_type"] == lesion_type]
    outside = own["outside"] if "outside" in own else np.zeros(len(own))
    values = np.column_stack([_numbers(own, more), outside])
    rows_of = own.groupby("image_id", sort=False).indices
    by_film = {film: values[rows] for film, rows in rows_of.items()}
    if more:
        for film, found in by_film.items():
            by_film[film] = found[np.argsort(-found[:, 4], kind="stable")[:MOST_BOXES]]
    return by_film


def _need(table: pd.DataFrame, columns: list[str], name: str) -> None:
    if missing := [column for column in columns if column not in table]:
        raise DernetError(f"{name} has the columns {columns}, and {missing} are missing.")


def _numbers(boxes: pd.DataFrame, more: list[str]) -> np.ndarray:
    """Corners and the columns `more`, shape (n, 4 + more)."""
    _need(boxes, [*CORNERS, *more], "A table of boxes")
    values = boxes[[*CORNERS, *more]].to_numpy(np.float64)
    if np.isnan(values).any():
        raise DernetError("A box has four corners, and a prediction a score: one is not a number.")
    return values


def _judged(true: np.ndarray | None, found: np.ndarray, iou: float) -> tuple:
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


def precision_recall(matches: Matches) -> pd.DataFrame:
    """Return the precision-recall curve that the average precision is the area under.

    Returns:
        101 rows, `recall` from 0 to 1, and the best `precision` at that recall or beyond; zero
        beyond the last true box found.
    """
    curve = _curves(matches, np.ones((1, len(matches.truths))))[0]
    return pd.DataFrame({"recall": RECALLS, "precision": curve})


def _curves(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Precision at RECALLS where film i counts weights[:, i] times, shape (draws, 101).

    Only hits move the recall, and only at a hit can the precision be the best at its recall or
    beyond, so the curve is read at the hits alone.
    """
    stops = np.flatnonzero(matches.hit)
    hits = weights[:, matches.film[stops]].cumsum(1)
    ranked = _running(matches.film, stops, weights)
    precision = np.divide(hits, ranked, out=np.zeros_like(hits), where=ranked > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.column_stack([best, np.zeros(len(best))])  # beyond the last hit
    truths = weights @ matches.truths
    recall = np.divide(hits, truths[:, None], out=np.zeros_like(hits), where=truths[:, None] > 0)
    first = np.stack([row.searchsorted(RECALLS) for row in recall])
    return np.take_along_axis(best, first, axis=1)


def _running(film: np.ndarray, stops: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Predictions up to and with each stop where films count `weights` times.

    They are counted by film between one stop and the next, once, and weighed in one sparse
    product: many times fewer steps than a cumulative sum over all predictions for every draw.

    Args:
        film: Row of each prediction's film, surest first, shape (n,).
        stops: Ranks to read at, rising, shape (stops,).
        weights: Shape (draws, films).

    Returns:
        Shape (draws, stops).
    """
    film = film[: stops[-1] + 1 if len(stops) else 0]
    stretch = stops.searchsorted(np.arange(len(film)))  # the stop that each one comes before
    shape = (len(stops), weights.shape[1])
    between = csr_array((np.ones(len(film)), (stretch, film)), shape)
    return (between @ weights.T).cumsum(0).T


def _areas(matches: Matches, weights: np.ndarray, chunk: int = 100) -> np.ndarray:
    """Average precision of each row of weights (draws, films); nan without a true box."""
    parts = [
        _curves(matches, weights[first : first + chunk]).mean(1)
        for first in range(0, len(weights), chunk)
    ]
    return np.where(weights @ matches.truths > 0, np.concatenate(parts), np.nan)


def average_precision(
    truth: pd.DataFrame, predictions: pd.DataFrame, lesion_type: str, iou: float = 0.5
) -> float:
    """Return a lesion type's average precision: COCO's mean over 101 recalls.

    Args:
        truth: `image_id`, `lesion_type`, `xmin`, `ymin`, `xmax`, `ymax`.
        predictions: The same, and `score`; on the same films, in the same pixels.
        lesion_type: The type to evaluate.
        iou: Least overlap that counts as found.

    Returns:
        A number in [0, 1]; nan where the truth holds no box of the type.

    Raises:
        DernetError: As `match_boxes` raises.

    >>> box = {"image_id": "a", "lesion_type": "Osteophytes", "xmin": 0, "ymin": 0, "xmax": 9,
    ...        "ymax": 9}
    >>> average_precision(pd.DataFrame([box]), pd.DataFrame([box | {"score": 0.7}]), "Osteophytes")
    1.0
    """
    films = _films(truth, predictions)
    matches = match_boxes(truth, predictions, lesion_type, films, iou)
    return float(_areas(matches, np.ones((1, len(films))))[0])


def weighted_average_precision(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    lesion_type: str,
    films: Sequence[str],
    iou: float = 0.5,
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from weights of films, shape (draws, films), to average precisions.

    For `dernet_utils.stats.bootstrap`; boxes are matched once.

    Args, raises: As `match_boxes`.

    Returns:
        The function; nan for a draw without weight on a true box.
    """
    matches = match_boxes(truth, predictions, lesion_type, films, iou)
    return lambda weights: _areas(matches, np.asarray(weights, np.float64))


def _films(truth: pd.DataFrame, predictions: pd.DataFrame) -> list[str]:
    return sorted({*truth["image_id"], *predictions["image_id"]})


def mean_average_precision(
    truth: pd.DataFrame, predictions: pd.DataFrame, iou: float = 0.5
) -> tuple[float, pd.Series]:
    """Return the mean of the average precisions of the lesion types that the truth holds.

    Args:
        truth, predictions, iou: As `average_precision` takes them.

    Returns:
        The mean, in [0, 1], nan where there is no true box; and each type's value, by name.

    Raises:
        DernetError: As `match_boxes` raises.
    """
    types = sorted(truth["lesion_type"].unique())
    each = pd.Series({name: average_precision(truth, predictions, name, iou) for name in types})
    return float(each.mean()) if types else float("nan"), each


def coco_average_precision(
    truth: pd.DataFrame, predictions: pd.DataFrame
) -> tuple[float, pd.DataFrame]:
    """Return COCO's AP@[0.5:0.95], the mean over ten overlaps, by the library faster-coco-eval.

    It shares no code with this module: its column 0.5 is a second computation of
    `average_precision`. The other nine ask how closely boxes are drawn (Lin et al., ECCV 2014).

    Args:
        truth, predictions: As `average_precision` takes them.

    Returns:
        The mean over overlaps and over the lesion types that the truth holds, in [0, 1], nan
        where there is no true box; and each type's value, one row a type by name, one column an
        overlap from 0.5 to 0.95.

    Raises:
        DernetError: A column is missing, a corner or a score is not a number, or a table is
            marked with a stratum, for which `size_stratum` is read by `average_precision`.
    """
    # Here and not above: training a detector needs this module, and not the library.
    from faster_coco_eval import COCO, COCOeval_faster

    _all_sizes(truth, predictions)
    for boxes in (truth, predictions):
        _need(boxes, ["image_id", "lesion_type"], "A table of boxes")
    types = sorted(truth["lesion_type"].unique())
    ious = pd.Index([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95], name="iou")
    number_of = {name: number for number, name in enumerate(types, start=1)}
    row_of = {film: row for row, film in enumerate(_films(truth, predictions), start=1)}

    def annotations(boxes: pd.DataFrame, more: list[str]) -> list[dict]:
        own = boxes[boxes["lesion_type"].isin(types)]
        keys = zip(own["image_id"], own["lesion_type"], _numbers(own, more).tolist(), strict=True)
        return [
            {
                "id": number,
                "image_id": row_of[film],
                "category_id": number_of[name],
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
                **dict(zip(more, score, strict=True)),
            }
            for number, (film, name, (left, top, right, bottom, *score)) in enumerate(keys, 1)
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
    precision = run.eval["precision"][:, :, :, 0, 0]  # overlap, recall, type
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

    Predictions are matched once; a draw of studies only weighs the films anew.

    Args:
        truth, predictions, iou: As `average_precision` takes them.
        images: `image_id` and `study_id` of every film that was searched, also those without a
            box: they count as studies, and their false alarms count.
        resamples: Number of bootstrap draws (paper, section 4.1: 1,000).
        seed: Seed of the draws; one seed pairs the rows draw by draw.

    Returns:
        One row a lesion type of the truth and a last row ``mAP``, with `boxes` (true boxes) and
        the columns of `dernet_utils.stats.Interval` as fractions of one.

    Raises:
        DernetError: As `match_boxes` and `resample_by_study` raise, or a box's film is not listed.
    """
    films = _searched(truth, predictions, images)
    weights = _weights(images, resamples, seed)
    types, boxes, areas = _all_areas(truth, predictions, films, weights, iou)
    rows = [
        {"boxes": count, **vars(interval_of(values, images["study_id"].to_numpy()))}
        for count, values in zip([*boxes, sum(boxes)], areas, strict=True)
    ]
    return pd.DataFrame(rows, index=pd.Index([*types, "mAP"], name="lesion_type"))


def _all_areas(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    films: list[str],
    weights: np.ndarray,
    iou: float,
) -> tuple[list[str], list[int], np.ndarray]:
    """The truth's types, their boxes, and of each type and their mean a row of areas by draw."""
    types = sorted(truth["lesion_type"].unique())
    matched = [match_boxes(truth, predictions, name, films, iou) for name in types]
    areas = np.stack([_areas(matches, weights) for matches in matched])
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
    """Return how far one detector's mean average precision lies above another's.

    Both are drawn with the same studies, so that what is hard for both cancels.

    Args:
        truth, predictions, images, resamples, seed, iou: As `detection_table` takes them.
        others: The other detector's boxes.
        level: Coverage of the interval in (0, 1).

    Raises:
        DernetError: As `detection_table` raises.
    """
    films, weights = _searched(truth, predictions, images), _weights(images, resamples, seed)
    _searched(truth, others, images)
    first, second = (
        _all_areas(truth, found, films, weights, iou)[2][-1] for found in (predictions, others)
    )
    return interval_of(first - second, images["study_id"].to_numpy(), level)


def _searched(truth: pd.DataFrame, predictions: pd.DataFrame, images: pd.DataFrame) -> list[str]:
    films = list(images["image_id"])
    if strangers := {*truth["image_id"], *predictions["image_id"]} - set(films):
        raise DernetError(
            f"Every box lies on a film of the list, and {len(strangers)} films are not in it: "
            "pass all films that were searched."
        )
    return films


def _weights(images: pd.DataFrame, resamples: int, seed: int) -> np.ndarray:
    """How often each film counts: once, then as drawn by study, shape (1 + resamples, films)."""
    drawn = draw_weights(images["study_id"].to_numpy(), resamples, seed)
    return np.vstack([np.ones(len(images)), drawn])


def size_table(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    images: pd.DataFrame,
    resamples: int = 1000,
    seed: int = 42,
    iou: float = 0.5,
) -> pd.DataFrame:
    """Return `detection_table` for lesions below 1 % of the field of view, and for the others.

    Args:
        truth, predictions, resamples, seed, iou: As `detection_table` takes them.
        images: Also `height` and `width`, in pixels.

    Returns:
        The two tables below each other, indexed by `size`, of `SIZES`, and `lesion_type`. A type
        without a true box in a stratum has nan there, and is left out of that stratum's mean.

    Raises:
        DernetError: As `size_stratum` and `detection_table` raise.
    """
    tables = {
        name: detection_table(
            size_stratum(truth, images, small),
            size_stratum(predictions, images, small),
            images,
            resamples,
            seed,
            iou,
        )
        for name, small in SIZES.items()
    }
    return pd.concat(tables, names=["size"])


# Detection as a reader meets it: false alarms on a film, and one type taken for another.


def froc_curve(
    truth: pd.DataFrame, predictions: pd.DataFrame, images: pd.DataFrame, iou: float = 0.5
) -> pd.DataFrame:
    """Return the free-response curve: sensitivity against false alarms per film.

    All lesion types count together, each matched for itself: a hit is of the same type. For one
    type, pass the boxes of that type. Average precision ranks; this says what a reader would see
    at a threshold (Bunch et al., J Appl Photogr Eng 4, 1978).

    Args:
        truth, predictions, iou: As `average_precision` takes them; types that the truth does not
            hold give false alarms.
        images: `image_id` of every film that was searched, also those without a box.

    Returns:
        A row for each distinct `score`, falling, where all predictions with at least that score
        are accepted: `false_alarms_per_film`, a mean over films, 0 or more, and `sensitivity`,
        the share of true boxes found, in [0, 1], nan where there is none. Before them a row that
        accepts nothing, at the score inf.

    Raises:
        DernetError: As `match_boxes` raises, there is no film, or a box's film is not listed.
    """
    films = _searched(truth, predictions, images)
    if not films:
        raise DernetError("False alarms are counted per film, and no film came: list the films.")
    matches = _all_types(truth, predictions, films, iou)
    ends = _ends_of_scores(matches)
    hits = matches.hit.cumsum()[ends]
    accepted = {
        "score": matches.score[ends],
        "false_alarms_per_film": (ends + 1 - hits) / len(films),
        "sensitivity": hits / (matches.truths.sum() or np.nan),
    }
    none = {"score": np.inf, "false_alarms_per_film": 0.0}
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
    """Return the sensitivity at given false alarms per film, with 95 % intervals by study.

    It is the highest of `froc_curve` with at most that many false alarms. Every draw of studies
    has its own threshold, as its own curve would.

    Args:
        truth, predictions, iou: As `froc_curve` takes them.
        images, resamples, seed: As `detection_table` takes them.

    Returns:
        One row for each of `FALSE_ALARMS`, with the columns of `dernet_utils.stats.Interval` as
        fractions of one.

    Raises:
        DernetError: As `match_boxes` and `resample_by_study` raise, or a box's film is not listed.
    """
    films = _searched(truth, predictions, images)
    matches = _all_types(truth, predictions, films, iou)
    found = _found_within(matches, _weights(images, resamples, seed))
    rows = [vars(interval_of(values, images["study_id"].to_numpy())) for values in found.T]
    return pd.DataFrame(rows, index=pd.Index(FALSE_ALARMS, name="false_alarms_per_film"))


def _all_types(
    truth: pd.DataFrame, predictions: pd.DataFrame, films: list[str], iou: float
) -> Matches:
    """The matches of every type in one list, surest first."""
    types = sorted({*truth["lesion_type"], *predictions["lesion_type"]})
    parts = [match_boxes(truth, predictions, name, films, iou) for name in types]
    score = np.concatenate([part.score for part in parts] or [np.empty(0)])
    order = np.argsort(-score, kind="stable")
    return Matches(
        np.concatenate([part.film for part in parts] or [np.empty(0, int)])[order],
        score[order],
        np.concatenate([part.hit for part in parts] or [np.empty(0, bool)])[order],
        sum((part.truths for part in parts), start=np.zeros(len(films), int)),
    )


def _ends_of_scores(matches: Matches) -> np.ndarray:
    """Rank of the last prediction of each distinct score: equal ones are accepted together."""
    return np.flatnonzero(np.diff(matches.score, append=np.nan))


def _found_within(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Sensitivity at FALSE_ALARMS where film i counts weights[:, i] times, shape (draws, 7).

    Only scores that hold a hit move the sensitivity, so the curve is read at those alone.
    """
    ends = _ends_of_scores(matches)
    stops = ends[np.unique(ends.searchsorted(np.flatnonzero(matches.hit)))]
    hits = weights[:, matches.film[matches.hit]].cumsum(1)[:, matches.hit.cumsum()[stops] - 1]
    false_alarms = _running(matches.film, stops, weights) - hits
    allowed = weights.sum(1)[:, None] * FALSE_ALARMS
    accepted = np.stack(
        [row.searchsorted(most, "right") for row, most in zip(false_alarms, allowed, strict=True)]
    )
    hits = np.column_stack([np.zeros(len(hits)), hits])  # nothing accepted, nothing found
    truths = (weights @ matches.truths)[:, None]
    return np.take_along_axis(hits, accepted, axis=1) / np.where(truths > 0, truths, np.nan)


def type_confusion(
    truth: pd.DataFrame, predictions: pd.DataFrame, threshold: float, iou: float = 0.5
) -> pd.DataFrame:
    """Count how true boxes are named: by type, at one threshold.

    Matching does not look at types: on each film the surest prediction takes the free true box
    that it overlaps most, at least `iou`, and of equally overlapped ones one of its own type.

    Args:
        truth: `image_id`, `lesion_type` and corners.
        predictions: The same, and `score`.
        threshold: A prediction is accepted where its score is at least this.
        iou: Least overlap of a match, in (0, 1].

    Returns:
        Counts of boxes. Rows are true types and a last row `NO_LESION`, the false alarms; columns
        are found types and a last column `NOT_FOUND`, the misses. Types are those of either
        table, in the order of the alphabet. A type's row adds up to its true boxes, its column to
        its accepted predictions.

    Raises:
        DernetError: A column is missing, a corner or a score is not a number, or a table is
            marked with a stratum, which a count of all boxes does not know.

    >>> box = {"image_id": "a", "xmin": 0, "ymin": 0, "xmax": 9, "ymax": 9}
    >>> truth = pd.DataFrame([box | {"lesion_type": "Osteophytes"}])
    >>> found = pd.DataFrame([box | {"lesion_type": "Other lesions", "score": 0.7}])
    >>> int(type_confusion(truth, found, 0.5).loc["Osteophytes", "Other lesions"])
    1
    """
    _all_sizes(truth, predictions)
    true_boxes, found_boxes = _numbers(truth, []), _numbers(predictions, ["score"])
    for boxes in (truth, predictions):
        _need(boxes, ["image_id", "lesion_type"], "A table of boxes")
    true_types, found_types = truth["lesion_type"].to_numpy(), predictions["lesion_type"].to_numpy()
    true_of = truth.groupby("image_id").indices
    named = np.full(len(truth), NOT_FOUND, object)
    meant = np.full(len(predictions), NO_LESION, object)
    accepted = found_boxes[:, 4] >= threshold
    for film, rows in predictions.groupby("image_id").indices.items():
        rows = rows[accepted[rows]]
        rows = rows[np.argsort(-found_boxes[rows, 4], kind="stable")]
        own = true_of.get(film, np.empty(0, int))
        overlaps = box_iou(found_boxes[rows, :4], true_boxes[own])
        same = found_types[rows][:, None] == true_types[own]
        partner = _partners(overlaps, [same, overlaps], iou)
        rows, taken = rows[partner >= 0], own[partner[partner >= 0]]
        named[taken], meant[rows] = found_types[rows], true_types[taken]
    alarms = accepted & (meant == NO_LESION)
    rows = np.concatenate([true_types, meant[alarms]])
    columns = np.concatenate([named, found_types[alarms]])
    types = sorted({*true_types, *found_types})
    counts = pd.crosstab(rows, columns).reindex(
        index=[*types, NO_LESION], columns=[*types, NOT_FOUND], fill_value=0
    )
    return counts.rename_axis(index="true", columns="found")


def _all_sizes(truth: pd.DataFrame, predictions: pd.DataFrame) -> None:
    if "outside" in truth or "outside" in predictions:
        raise DernetError(
            "All boxes are evaluated here, and a stratum is marked: pass the tables without the "
            "column outside."
        )

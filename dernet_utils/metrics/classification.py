"""Metrics of a classifier, normal (0) or abnormal (1): AUROC, operating points, thresholds."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import roc_curve

from dernet_utils.core.errors import DernetError
from dernet_utils.metrics.intervals import draw_weights, interval_of, resample_by_study


def auroc(y: np.ndarray, prob: np.ndarray) -> float:
    """Return the area under the receiver operating characteristic.

    The probability that an abnormal image scores above a normal one, ties counting half: the
    Mann-Whitney statistic divided by its maximum (Hanley & McNeil, Radiology 143, 1982).

    Args:
        y: Labels, shape (n,), 0 or 1.
        prob: Scores, shape (n,), on any monotone scale.

    Returns:
        A number in [0, 1]; nan if `y` holds only one class.

    Raises:
        DernetError: Shapes differ, labels are not 0 or 1, or a score is nan.

    >>> float(auroc([0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8]))
    0.875
    """
    y, prob = _checked(y, prob)
    n_abnormal = int(y.sum())
    n_normal = len(y) - n_abnormal
    if not n_abnormal or not n_normal:
        return float("nan")
    rank_sum = rankdata(prob)[y].sum()
    wins = rank_sum - n_abnormal * (n_abnormal + 1) / 2
    return float(wins / (n_abnormal * n_normal))


def operating_point(y: np.ndarray, prob: np.ndarray, threshold: float) -> dict[str, float]:
    """Return F1, sensitivity and specificity at a score threshold.

    Args:
        y: Labels, shape (n,), 0 or 1.
        prob: Probabilities of abnormal, shape (n,).
        threshold: An image is called abnormal if ``prob > threshold``, strictly, as in line 17 of
            the paper's Algorithm 1.

    Returns:
        ``f1``, ``sensitivity`` and ``specificity`` in [0, 1]; nan where a denominator is zero.

    Raises:
        DernetError: As `auroc` raises.

    >>> operating_point([0, 0, 1, 1], [0.2, 0.6, 0.7, 0.9], 0.65)
    {'f1': 1.0, 'sensitivity': 1.0, 'specificity': 1.0}
    """
    y, prob = _checked(y, prob)
    called = prob > threshold
    tp, fn = int((called & y).sum()), int((~called & y).sum())
    fp, tn = int((called & ~y).sum()), int((~called & ~y).sum())
    return {
        "f1": _ratio(2 * tp, 2 * tp + fn + fp),
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
    }


def youden_threshold(y: np.ndarray, prob: np.ndarray) -> float:
    """Return the threshold with the largest sensitivity + specificity - 1.

    Candidates lie halfway between neighbouring scores (Youden, Cancer 3, 1950). Ties go to the
    lowest, since in triage a false negative costs more than a false positive.

    Args:
        y: Labels, shape (n,), 0 or 1, of out-of-fold images: with a threshold chosen on the test
            split, the test would be optimistic.
        prob: Probabilities of abnormal, shape (n,).

    Returns:
        A threshold for `operating_point`; if all scores are equal, that score.

    Raises:
        DernetError: `y` holds only one class, or as `auroc` raises.

    >>> round(youden_threshold([0, 0, 1, 1], [0.1, 0.3, 0.5, 0.9]), 3)
    0.4
    """
    candidates, sensitivity, specificity = (part[1:] for part in _working_points(y, prob))
    # Rounded, so that equal sums of fractions tie and the lowest threshold wins.
    return float(candidates[np.argmax(np.round(sensitivity + specificity, 12))])


def f1_threshold(y: np.ndarray, prob: np.ndarray) -> float:
    """Return the threshold with the largest F1; ties go to the lowest.

    Args, returns, raises: As `youden_threshold`.

    >>> round(f1_threshold([0, 1, 0, 1], [0.1, 0.3, 0.5, 0.9]), 3)
    0.2
    """
    candidates, sensitivity, specificity = _working_points(y, prob)
    prevalence = np.mean(np.asarray(y, float))
    tp, fp = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    f1 = 2 * tp / (tp + fp + prevalence)
    return float(candidates[np.argmax(np.round(f1, 12))])


def sensitivity_threshold(y: np.ndarray, prob: np.ndarray, at_least: float = 0.9) -> float:
    """Return the highest threshold with at least a given sensitivity.

    Args:
        y, prob: As in `youden_threshold`.
        at_least: The sensitivity, in (0, 1].

    Returns:
        A threshold for `operating_point`.

    Raises:
        DernetError: As `youden_threshold` raises, or the sensitivity is outside (0, 1].

    >>> round(sensitivity_threshold([0, 1, 1, 0, 1], [0.1, 0.3, 0.5, 0.7, 0.9], 0.6), 3)
    0.4
    """
    if not 0 < at_least <= 1:
        raise DernetError(f"The least sensitivity must lie between 0 and 1, but is {at_least}.")
    candidates, sensitivity, _ = _working_points(y, prob)
    return float(candidates[sensitivity >= at_least - 1e-12].max())


def _working_points(y: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return candidate thresholds and the sensitivity and specificity at each.

    The first calls every image abnormal; the others lie halfway between neighbouring scores.
    """
    y, prob = _checked(y, prob)
    if y.all() or not y.any():
        raise DernetError(
            "A threshold needs normal and abnormal images, and all of these are "
            f"{'abnormal' if y.all() else 'normal'}: choose it on more images."
        )
    scores = np.unique(prob)
    lower, upper = scores[:-1], scores[1:]
    middle = lower + (upper - lower) / 2
    candidates = np.where(middle < upper, middle, lower)  # neighbouring floats have no middle
    if len(scores) == 1:
        candidates = scores
    candidates = np.concatenate([[np.nextafter(scores[0], -1.0)], candidates])
    abnormal, normal = np.sort(prob[y]), np.sort(prob[~y])
    sensitivity = 1 - np.searchsorted(abnormal, candidates, side="right") / len(abnormal)
    specificity = np.searchsorted(normal, candidates, side="right") / len(normal)
    return candidates, sensitivity, specificity


def scores_by_study(y: np.ndarray, prob: np.ndarray, studies: np.ndarray) -> pd.DataFrame:
    """Return each study's label and score from those of its images.

    A study is abnormal if any of its images is, and its score is the largest of theirs. So it is
    called normal at a threshold only if all of its images are (line 21 of the paper's Algorithm 1
    speaks of a normal study).

    Args:
        y: Labels of images, shape (n,), 0 or 1.
        prob: Scores of images, shape (n,).
        studies: Study of each image, shape (n,).

    Returns:
        One row per study, indexed by it in ascending order: ``label`` (bool), ``prob``, ``images``
        (their number), and ``mixed``, whether both normal and abnormal images belong to it.

    Raises:
        DernetError: As `auroc` raises, or the lengths differ.

    >>> scores_by_study([0, 1, 0], [0.2, 0.7, 0.4], ["a", "a", "b"])["prob"].to_dict()
    {'a': 0.7, 'b': 0.4}
    """
    y, prob = _checked(y, prob)
    table = pd.DataFrame({"label": y, "prob": prob, "study": _studies_of(y, studies)})
    of = table.groupby("study")
    labels, found = of["label"], of.agg(label=("label", "any"), prob=("prob", "max"))
    return found.assign(images=of.size(), mixed=labels.any() & ~labels.all())


def classification_table(
    y: np.ndarray,
    prob: np.ndarray,
    studies: np.ndarray,
    threshold: float,
    resamples: int = 1000,
    seed: int = 42,
) -> pd.DataFrame:
    """Return AUROC, F1, sensitivity and specificity with 95 % intervals by study.

    Args:
        y: Labels, shape (n,), 0 or 1.
        prob: Probabilities of abnormal, shape (n,).
        studies: Study of each image, shape (n,).
        threshold: As in `operating_point`; to be chosen on other images.
        resamples: Number of bootstrap draws (paper, section 4.1: 1,000).
        seed: Seed of the draws; one seed pairs the four metrics draw by draw.

    Returns:
        One row per metric, indexed ``auroc``, ``f1``, ``sensitivity``, ``specificity``, with
        the columns of `intervals.Interval` as fractions of one.

    Raises:
        DernetError: As `auroc` and `resample_by_study` raise, or the lengths differ.
    """
    y, prob = _checked(y, prob)
    studies = _studies_of(y, studies)

    weights = np.vstack([np.ones(len(y)), draw_weights(studies, resamples, seed)])
    values = {"auroc": weighted_auroc(y, prob)(weights)}
    values |= weighted_point(y, prob, threshold)(weights)
    rows = {name: vars(interval_of(own, studies)) for name, own in values.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")


def roc_band(
    y: np.ndarray,
    prob: np.ndarray,
    studies: np.ndarray,
    resamples: int = 1000,
    seed: int = 42,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return the receiver operating characteristic with a pointwise bootstrap band by study.

    Args:
        y: Labels, shape (n,), 0 or 1, of both classes.
        prob: Probabilities of abnormal, shape (n,).
        studies: Study of each image, shape (n,).
        resamples: Number of bootstrap draws; draws with only one class are left out.
        seed: Seed of the draws.
        level: Coverage of the band at each false-positive rate, in (0, 1).

    Returns:
        101 rows: ``false_positive_rate`` (1 - specificity) from 0 to 1, ``sensitivity``, ``low``
        and ``high``, all in [0, 1].

    Raises:
        DernetError: `y` holds only one class, or as `auroc` and `resample_by_study` raise.
    """
    y, prob = _checked(y, prob)
    studies = _studies_of(y, studies)
    if y.all() or not y.any():
        raise DernetError("A ROC curve needs normal and abnormal images: these are of one class.")
    grid = np.linspace(0, 1, 101)
    draws = [
        _sensitivity_at(grid, y[rows], prob[rows])
        for rows in resample_by_study(studies, resamples, seed)
        if 0 < y[rows].sum() < len(rows)
    ]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    curve = _sensitivity_at(grid, y, prob)
    return pd.DataFrame(
        {"false_positive_rate": grid, "sensitivity": curve, "low": low, "high": high}
    )


def _sensitivity_at(grid: np.ndarray, y: np.ndarray, prob: np.ndarray) -> np.ndarray:
    false_positive_rate, sensitivity, _ = roc_curve(y, prob)
    return np.interp(grid, false_positive_rate, sensitivity)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _checked(y: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return checked labels as bool and scores as float64, both of shape (n,)."""
    y, prob = np.asarray(y), np.asarray(prob, dtype=np.float64)
    if y.ndim != 1 or y.shape != prob.shape:
        raise DernetError(
            f"Labels and scores must be two lists of one length, but have shapes {y.shape} and "
            f"{prob.shape}: pass one score per label."
        )
    if not np.isin(y, (0, 1)).all():
        raise DernetError("Labels must be 0 (normal) or 1 (abnormal), but another value was found.")
    if np.isnan(prob).any():
        raise DernetError(f"{int(np.isnan(prob).sum())} of {len(prob)} scores are not a number.")
    return y.astype(bool), prob


def _studies_of(y: np.ndarray, studies: np.ndarray) -> np.ndarray:
    studies = np.asarray(studies)
    if studies.shape != y.shape:
        raise DernetError(
            f"Each label needs its study, but the {len(y)} labels have studies of shape "
            f"{studies.shape}."
        )
    return studies


# Statistics of weighted images, for `intervals.bootstrap`


def weighted_auroc(y: np.ndarray, prob: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from weights of images, shape (draws, n), to AUROCs, shape (draws,).

    Scores are sorted once, and running sums give each draw's area. For each pair of an abnormal and
    a normal image, take the product of their weights. The area is the sum over the pairs in which
    the abnormal image scores higher, plus half the sum over ties, divided by the sum over all.

    Args:
        y, prob: As in `auroc`.

    Returns:
        The function; it gives nan for a draw in which a class has no weight.

    Raises:
        DernetError: As `auroc` raises.

    >>> of = weighted_auroc([0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8])
    >>> of(np.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0]])).tolist()
    [0.875, 0.5, nan]
    """
    y, prob = _checked(y, prob)
    order = np.argsort(prob, kind="stable")
    first = np.flatnonzero(np.diff(prob[order], prepend=np.nan) != 0)  # of equal scores
    abnormal = y[order]

    def areas(weights: np.ndarray) -> np.ndarray:
        weights = np.asarray(weights, np.float64)[:, order]
        if not len(first):
            return np.full(len(weights), np.nan)
        above = np.add.reduceat(weights * abnormal, first, axis=1)
        tied = np.add.reduceat(weights * ~abnormal, first, axis=1)
        below = tied.cumsum(axis=1)
        pairs = above.sum(axis=1) * below[:, -1]
        wins = np.einsum("bn,bn->b", above, below - tied / 2)
        return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)

    return areas


def weighted_point(
    y: np.ndarray, prob: np.ndarray, threshold: float
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return a function from weights, shape (draws, n), to each draw's `operating_point`.

    Args, raises: As `operating_point`.
    """
    y, prob = _checked(y, prob)
    called = prob > threshold
    cells = np.stack([called & y, ~called & y, called & ~y, ~called & ~y], axis=1)

    def points(weights: np.ndarray) -> dict[str, np.ndarray]:
        tp, fn, fp, tn = (np.asarray(weights, np.float64) @ cells).T
        parts = {
            "f1": (2 * tp, 2 * tp + fn + fp),
            "sensitivity": (tp, tp + fn),
            "specificity": (tn, tn + fp),
        }
        return {
            name: np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
            for name, (part, whole) in parts.items()
        }

    return points

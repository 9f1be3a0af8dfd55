"""Tests of significance: DeLong by study, paired t, McNemar, Holm, and numbers of studies.

Images of one study resemble each other, so they are not independent observations: DeLong's variance
is computed from the sums over whole studies.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from dernet_utils.core.errors import DernetError
from dernet_utils.metrics.intervals import Interval, checked_groups

# DeLong


@dataclass(frozen=True)
class Areas:
    """AUROCs of several scores of the same images, with their covariance.

    Attributes:
        values: Shape (k,).
        covariance: Covariance of the values, shape (k, k).
        n_images: Number of images.
        n_studies: Number of independent groups.
    """

    values: np.ndarray
    covariance: np.ndarray
    n_images: int
    n_studies: int

    def interval(self, which: int = 0, level: float = 0.95) -> Interval:
        """Return one area with its normal interval, clipped to [0, 1].

        Args:
            which: Column of the scores.
            level: Coverage in (0, 1).
        """
        contrast = np.zeros(len(self.values))
        contrast[which] = 1
        found = self._normal(contrast, level)
        ends = {"low": max(found.low, 0.0), "high": min(found.high, 1.0)}
        return Interval(**(vars(found) | ends))

    def difference(self, first: int = 0, second: int = 1, level: float = 0.95) -> Interval:
        """Return the difference of two areas, first minus second, with its normal interval.

        Args:
            first, second: Columns of the scores.
            level: Coverage in (0, 1).
        """
        return self._normal(self._contrast(first, second), level)

    def p_value(self, first: int = 0, second: int = 1) -> float:
        """Return the two-sided p-value of the hypothesis that two areas are equal.

        If the variance is zero it is 1 for equal areas and 0 for others.

        Args:
            first, second: Columns of the scores.
        """
        contrast = self._contrast(first, second)
        apart, error = contrast @ self.values, _root(contrast @ self.covariance @ contrast)
        if not error:
            return float(apart == 0)
        return float(2 * distributions.norm.sf(abs(apart) / error))

    def _contrast(self, first: int, second: int) -> np.ndarray:
        contrast = np.zeros(len(self.values))
        contrast[first] += 1
        contrast[second] -= 1
        return contrast

    def _normal(self, contrast: np.ndarray, level: float) -> Interval:
        half = distributions.norm.ppf((1 + level) / 2)
        value, error = contrast @ self.values, _root(contrast @ self.covariance @ contrast)
        ends = float(value - half * error), float(value + half * error)
        return Interval(float(value), *ends, self.n_images, self.n_studies, resamples=0)


def delong(y: np.ndarray, prob: np.ndarray, groups: np.ndarray | None = None) -> Areas:
    """Return AUROCs with their covariance, from placement values.

    Without groups, by the estimator of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988),
    computed from midranks; with groups, by that of Obuchowski (Biometrics 53, 1997), which sums the
    placement values of each group before squaring.

    Args:
        y: Labels, shape (n,), 0 or 1.
        prob: Scores, shape (n,) or (n, k), on any monotone scale.
        groups: Independent unit of each image, such as its study, shape (n,); None if each image
            is one.

    Returns:
        The areas; the covariance is nan if fewer than two independent units have a class.

    Raises:
        DernetError: Shapes do not fit, labels are not 0 and 1 or only one of them, or a score is
            nan.
    """
    y, prob = np.asarray(y), np.asarray(prob, np.float64)
    prob = prob[:, None] if prob.ndim == 1 else prob
    if y.ndim != 1 or prob.ndim != 2 or len(prob) != len(y) or np.isnan(prob).any():
        raise DernetError(
            "DeLong's variance needs a label and a score for each image, none of them nan, but got "
            f"shapes {y.shape} and {prob.shape}, or a nan."
        )
    if not np.isin(y, (0, 1)).all() or len(np.unique(y)) < 2:
        raise DernetError("DeLong's variance needs labels 0 and 1, both of them and no others.")
    y = y.astype(bool)
    groups = np.arange(len(y)) if groups is None else checked_groups(groups)
    if len(groups) != len(y):
        raise DernetError(f"Each label needs its study: {len(y)} labels, {len(groups)} studies.")
    _, unit = np.unique(groups, return_inverse=True)
    above, below = prob[y], prob[~y]
    rank = distributions.rankdata(np.vstack([above, below]), axis=0)
    v10 = (rank[: len(above)] - distributions.rankdata(above, axis=0)) / len(below)
    v01 = 1 - (rank[len(above) :] - distributions.rankdata(below, axis=0)) / len(above)
    values, units = v10.mean(axis=0), unit.max() + 1
    a = _sums(v10 - values, unit[y], units) / len(above)
    b = _sums(v01 - values, unit[~y], units) / len(below)
    covariance = _freedom(unit[y]) * a.T @ a + _freedom(unit[~y]) * b.T @ b
    if np.isin(unit[y], unit[~y]).any():  # a unit with images of both classes
        covariance = covariance + _freedom(unit) * (a.T @ b + b.T @ a)
    return Areas(values, covariance, len(y), int(units))


def _sums(rows: np.ndarray, unit: np.ndarray, units: int) -> np.ndarray:
    """Return the sums of rows by unit, shape (units, k)."""
    sums = np.zeros((units, rows.shape[1]))
    np.add.at(sums, unit, rows)
    return sums


def _freedom(unit: np.ndarray) -> float:
    """Return n / (n - 1) for n units; nan for a single one."""
    number = len(np.unique(unit))
    return number / (number - 1) if number > 1 else float("nan")


def _root(variance: float) -> float:
    """Return a standard error; a variance below zero by rounding counts as zero."""
    return float(np.sqrt(variance if np.isnan(variance) else max(variance, 0.0)))


# Paired tests


@dataclass(frozen=True)
class PairedTest:
    """A two-sided test.

    Attributes:
        statistic: The test statistic.
        p: Probability of a statistic at least as far from zero under the null hypothesis.
        n: Number of pairs.
    """

    statistic: float
    p: float
    n: int


def paired_t(differences: np.ndarray, test_share: float = 0.0) -> PairedTest:
    """Return Student's paired test, plain or corrected for cross-validation.

    Differences across folds are not independent, since the folds' training sets overlap. Nadeau and
    Bengio (Machine Learning 52, 2003) replace the factor 1/k in the variance of the mean by 1/k +
    test images / training images.

    Args:
        differences: One per pair, such as a fold, shape (k,).
        test_share: Ratio of test to training images in each fold, such as 1/4 for five folds; 0
            for the plain test.

    Raises:
        DernetError: Fewer than two pairs, a difference is nan, or the ratio is below 0.

    >>> round(paired_t([1.0, 2.0, 3.0]).p, 3)
    0.074
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 1 or len(differences) < 2 or np.isnan(differences).any():
        raise DernetError(
            "A paired t-test needs at least two differences, none of them nan: "
            f"got {differences.tolist()}."
        )
    if test_share < 0:
        raise DernetError(f"The ratio of test to training images is at least 0, not {test_share}.")
    n, mean = len(differences), differences.mean()
    error = np.sqrt(differences.var(ddof=1) * (1 / n + test_share))
    if not error:
        return PairedTest(float(np.sign(mean) * np.inf) if mean else 0.0, float(mean == 0), n)
    return PairedTest(
        float(mean / error), float(2 * distributions.t.sf(abs(mean / error), n - 1)), n
    )


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> PairedTest:
    """Return McNemar's exact test that two classifiers are correct equally often.

    Only images on which exactly one classifier is correct count; under the null hypothesis either
    is equally likely to be that one (McNemar, Psychometrika 12, 1947). Computed by statsmodels.

    Args:
        first_right, second_right: Whether each is correct on each image, shape (n,).

    Returns:
        The statistic is the number of images on which only the first is correct minus the number
        on which only the second is; n is their sum. p is 1 where n is 0.

    Raises:
        DernetError: Shapes differ.

    >>> mcnemar([1, 1, 1, 0], [0, 0, 1, 1])
    PairedTest(statistic=1.0, p=1.0, n=3)
    """
    # imported here because loading it takes seconds
    from statsmodels.stats.contingency_tables import mcnemar as exact_mcnemar

    first, second = np.asarray(first_right, bool), np.asarray(second_right, bool)
    if first.ndim != 1 or first.shape != second.shape:
        raise DernetError(
            "McNemar's test compares two classifiers on the same images, but got shapes "
            f"{first.shape} and {second.shape}."
        )
    alone, other = int((first & ~second).sum()), int((second & ~first).sum())
    p = exact_mcnemar([[0, alone], [other, 0]], exact=True).pvalue
    return PairedTest(float(alone - other), float(p), alone + other)


def holm(p: np.ndarray) -> np.ndarray:
    """Return p-values adjusted for multiplicity (Holm, Scandinavian Journal of Statistics 6, 1979).

    Rejecting where the adjusted p is at most alpha keeps the probability of any false rejection at
    most alpha. Computed by statsmodels.

    Args:
        p: Shape (m,), in [0, 1].

    Returns:
        Adjusted p-values in the same order, in [0, 1], none below its own p.

    Raises:
        DernetError: A value is outside [0, 1] or nan.

    >>> holm([0.04, 0.01, 0.03]).round(2).tolist()
    [0.06, 0.03, 0.06]
    """
    from statsmodels.stats.multitest import multipletests  # slow to load, too

    p = np.asarray(p, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise DernetError(f"P-values must lie between 0 and 1, but are {p.tolist()}.")
    return multipletests(p, method="holm")[1] if len(p) else p


def studies_needed(
    difference: float, deviation: float, power: float = 0.8, level: float = 0.95
) -> int:
    """Return how many studies are needed to detect a difference.

    By the normal approximation: the standard error falls with the square root of the number of
    studies, and the two-sided test must reject with probability `power`.

    Args:
        difference: True difference, not 0.
        deviation: Standard error of the difference, times the square root of the number of studies
            from which it was estimated.
        power: In (0.5, 1).
        level: One minus the significance level, in (0, 1).

    Raises:
        DernetError: A number is outside its range.

    >>> studies_needed(difference=0.5, deviation=1.0)
    32
    """
    if not difference or not deviation > 0 or not 0.5 < power < 1 or not 0 < level < 1:
        raise DernetError(
            "The number of studies needs a difference that is not 0, a deviation above 0, a power "
            f"between 0.5 and 1 and a level between 0 and 1, but got {difference}, {deviation}, "
            f"{power} and {level}."
        )
    reach = distributions.norm.ppf((1 + level) / 2) + distributions.norm.ppf(power)
    return int(np.ceil((reach * deviation / difference) ** 2))

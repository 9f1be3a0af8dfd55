"""Exact interval of a proportion whose observations are clustered in studies."""

from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from dernet_utils.core.errors import DernetError
from dernet_utils.metrics.intervals import checked_groups


@dataclass(frozen=True)
class Proportion:
    """A proportion with its interval and the sample sizes behind it.

    Attributes:
        count: Number of observations that are true, k.
        total: Number of observations, n.
        n_studies: Number of studies that the observations belong to.
        effective: Number of independent observations with the same variance, in (0, n].
        low, high: Ends of the interval, in [0, 1].

    >>> f"{Proportion(3, 10, 4, 8.1, 0.067, 0.652):.2f}"
    '3 of 10 [0.07, 0.65]'
    """

    count: int
    total: int
    n_studies: int
    effective: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.count} of {self.total} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, "")


def exact_by_study(true: np.ndarray, studies: np.ndarray, level: float = 0.95) -> Proportion:
    """Return a proportion with the exact interval of Clopper and Pearson, adjusted to studies.

    The interval is that of Korn and Graubard (Survey Methodology 24, 1998): Clopper and Pearson's
    (Biometrika 26, 1934) for `effective_size` observations instead of n. If every observation has a
    study of its own, both are the same.

    Args:
        true: Whether each observation, such as a true box, is true, such as found; bool, shape
            (n,).
        studies: Study of each observation, shape (n,).
        level: Coverage in (0, 1), which the interval has at least where the effective size is
            known; it is estimated.

    Raises:
        DernetError: There is no observation, the shapes differ, or `level` is outside (0, 1).

    >>> f"{exact_by_study([True, False, False, False], ['a', 'b', 'c', 'd']):.3f}"
    '1 of 4 [0.006, 0.806]'
    """
    true, studies = np.asarray(true, bool), checked_groups(studies)
    if true.shape != studies.shape:
        raise DernetError(
            f"Each observation needs its study, but there are {true.shape} observations and "
            f"{studies.shape} studies: pass one of each per row."
        )
    if not 0 < level < 1:
        raise DernetError(f"The level of an interval must lie between 0 and 1, but is {level}.")
    count, total = int(true.sum()), len(true)
    effective = effective_size(true, studies, level)
    hits = effective * count / total
    misses, tail = effective - hits, (1 - level) / 2
    beta = distributions.beta
    return Proportion(
        count=count,
        total=total,
        n_studies=len(np.unique(studies)),
        effective=effective,
        low=float(beta.ppf(tail, hits, misses + 1)) if count else 0.0,
        high=float(beta.ppf(1 - tail, hits + 1, misses)) if count < total else 1.0,
    )


def effective_size(true: np.ndarray, studies: np.ndarray, level: float = 0.95) -> float:
    """Return the number of independent observations that tell as much as these clustered ones.

    It is n over the design effect: the variance of the proportion from the sums over whole studies
    (a ratio estimate), over that of n independent observations (Kish, Survey Sampling, 1965). Few
    studies estimate a variance badly; for that it is multiplied by the squared ratio of Student's
    quantiles with n - 1 and with K - 1 degrees of freedom, K being the number of studies. It is at
    most n.

    If all observations are equal, or all are of one study, there is no variance between studies to
    estimate. Then K is returned, as if a study counted once, which is conservative.

    Args, raises: As `exact_by_study`.

    >>> effective_size([True, True, True, True], ["a", "a", "b", "b"])
    2.0
    """
    true = np.asarray(true, bool)
    _, study_of_row = np.unique(checked_groups(studies), return_inverse=True)
    size = np.bincount(study_of_row)
    n, n_studies, rate = len(true), len(size), true.mean()
    if n_studies == 1 or rate in (0, 1):
        return float(n_studies)
    away = np.bincount(study_of_row, true) - rate * size
    variance = n_studies / (n_studies - 1) * (away**2).sum() / n**2
    independent = rate * (1 - rate) / (n - 1)
    few, many = distributions.t.ppf((1 + level) / 2, [n_studies - 1, n - 1])
    return float(n * min(1.0, independent / max(variance, 1e-300) * (many / few) ** 2))

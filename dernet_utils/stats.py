"""Intervals by resampling studies.

Images of one study resemble each other, so they are not independent observations. A bootstrap
that draws images pretends that they are and gives intervals that are, as a rule, too narrow; this
one draws whole studies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dernet_utils.errors import DernetError


@dataclass(frozen=True)
class Interval:
    """A value with its interval and what it rests on.

    Attributes:
        value: The statistic on all rows.
        low: Lower end of the interval; nan where no resample defined it.
        high: Upper end of the interval; nan where no resample defined it.
        n_images: Rows that the statistic saw.
        n_studies: Studies that the rows belong to.
        resamples: Resamples that the interval rests on.
        undefined: Resamples left out because the statistic was nan there, as an AUROC is where
            all rows drawn are of one class.

    >>> f"{Interval(0.841, 0.76, 0.913, 78, 40, 1000):.2f}"
    '0.84 [0.76, 0.91]'
    """

    value: float
    low: float
    high: float
    n_images: int
    n_studies: int
    resamples: int
    undefined: int = 0

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, "")


def resample_by_study(
    studies: np.ndarray, resamples: int = 1000, seed: int = 42
) -> Iterator[np.ndarray]:
    """Draw studies with replacement and yield the rows that belong to each draw.

    Args:
        studies: Study of each row, shape (n,).
        resamples: Number of draws; the paper's section 4.1 takes 1,000.
        seed: Seed of the draws; two calls with one seed yield the same rows, so that two
            statistics can be compared draw by draw.

    Yields:
        Row indices, shape (m,). A study drawn twice brings its rows twice; m varies from draw
        to draw where studies differ in size.

    Raises:
        DernetError: There are no rows or no resamples, or `studies` is not one-dimensional.

    >>> rows = next(resample_by_study(["a", "a", "b"], resamples=1, seed=0))
    >>> [int(row) for row in rows]
    [2, 2]
    """
    studies = np.asarray(studies)
    if studies.ndim != 1 or not len(studies):
        raise DernetError(
            f"A bootstrap needs one study for each of at least one row, not shape {studies.shape}: "
            "pass the column study_id of the rows that are scored."
        )
    if resamples < 1:
        raise DernetError(f"A bootstrap needs at least one resample, not {resamples}.")
    _, study_of_row = np.unique(studies, return_inverse=True)
    order = np.argsort(study_of_row, kind="stable")
    rows_of = np.split(order, np.cumsum(np.bincount(study_of_row))[:-1])
    return _draws(rows_of, resamples, np.random.default_rng(seed))


def _draws(
    rows_of: list[np.ndarray], resamples: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    for _ in range(resamples):
        drawn = rng.integers(len(rows_of), size=len(rows_of))
        yield np.concatenate([rows_of[study] for study in drawn])


def bootstrap_by_study(
    statistic: Callable[[np.ndarray], float],
    studies: np.ndarray,
    resamples: int = 1000,
    seed: int = 42,
    level: float = 0.95,
) -> Interval:
    """Return a statistic with its percentile interval over resampled studies.

    Args:
        statistic: Takes row indices, shape (m,), and returns a number; nan where those rows
            leave it undefined.
        studies: Study of each row, shape (n,).
        resamples: Number of draws.
        seed: Seed of the draws.
        level: Coverage in (0, 1).

    Returns:
        The statistic on all rows with the percentiles (1 - level) / 2 and (1 + level) / 2 of
        the draws where it is defined.

    Raises:
        DernetError: `level` is outside (0, 1), or as `resample_by_study` raises.

    >>> y = np.array([0, 0, 1, 1])
    >>> bootstrap_by_study(lambda rows: y[rows].mean(), ["a", "b", "c", "d"], 500).n_studies
    4
    """
    if not 0 < level < 1:
        raise DernetError(f"The level of an interval lies between 0 and 1, not at {level}.")
    studies = np.asarray(studies)
    draws = np.array([statistic(rows) for rows in resample_by_study(studies, resamples, seed)])
    defined = draws[~np.isnan(draws)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(defined, tails) if len(defined) else (np.nan, np.nan)
    return Interval(
        value=float(statistic(np.arange(len(studies)))),
        low=float(low),
        high=float(high),
        n_images=len(studies),
        n_studies=len(np.unique(studies)),
        resamples=len(defined),
        undefined=len(draws) - len(defined),
    )

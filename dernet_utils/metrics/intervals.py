"""Bootstrap intervals by study.

Images of one study resemble each other, so they are not independent observations. A bootstrap that
draws single images treats them as independent, and its intervals are usually too narrow; this one
draws whole studies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from dernet_utils.core.errors import DernetError


@dataclass(frozen=True)
class Interval:
    """A value with its interval and the sample sizes behind it.

    Attributes:
        value: The statistic on all rows.
        low: Lower end of the interval; nan if it is undefined.
        high: Upper end of the interval; nan if it is undefined.
        n_images: Number of rows that the statistic is computed on.
        n_studies: Number of studies that the rows belong to.
        resamples: Number of resamples that the interval is computed from.
        undefined: Number of resamples left out because the statistic was nan, as an AUROC is when
            all drawn rows are of one class.

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
        resamples: Number of draws (paper, section 4.1: 1,000).
        seed: Seed of the draws; equal seeds yield equal rows, so that two statistics can be
            compared draw by draw.

    Yields:
        Row indices, shape (m,). A study drawn twice gives its rows twice; m varies from draw to
        draw if studies differ in size.

    Raises:
        DernetError: There are no rows or no resamples, or `studies` is not one-dimensional.

    >>> rows = next(resample_by_study(["a", "a", "b"], resamples=1, seed=0))
    >>> [int(row) for row in rows]
    [2, 2]
    """
    studies = checked_groups(studies, resamples)
    _, study_of_row = np.unique(studies, return_inverse=True)
    order = np.argsort(study_of_row, kind="stable")
    rows_of = np.split(order, np.cumsum(np.bincount(study_of_row))[:-1])
    return _draws(rows_of, resamples, np.random.default_rng(seed))


def checked_groups(studies: np.ndarray, resamples: int = 1) -> np.ndarray:
    """Return groups as an array, shape (n,).

    Raises:
        DernetError: There are no rows or no resamples, or `studies` is not one-dimensional.
    """
    studies = np.asarray(studies)
    if studies.ndim != 1 or not len(studies):
        raise DernetError(
            "Studies must be a list with one entry per row, of at least one row, but have shape "
            f"{studies.shape}: pass the column study_id of the rows that are scored."
        )
    if resamples < 1:
        raise DernetError(f"A bootstrap needs at least one resample, not {resamples}.")
    return studies


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
        statistic: Takes row indices, shape (m,), and returns a number; nan if it is undefined on
            those rows.
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
    return bootstrap_each_by_study(
        lambda rows: np.array([statistic(rows)]), studies, resamples, seed, level
    )[0]


def bootstrap_each_by_study(
    statistics: Callable[[np.ndarray], np.ndarray],
    studies: np.ndarray,
    resamples: int = 1000,
    seed: int = 42,
    level: float = 0.95,
) -> list[Interval]:
    """Return several statistics of the same rows, such as fitted weights, with their intervals.

    Args:
        statistics: As `bootstrap_by_study` takes one, but returns k numbers, shape (k,).
        studies, resamples, seed, level: As in `bootstrap_by_study`.

    Returns:
        k intervals, each for one statistic by itself.

    Raises:
        DernetError: As `bootstrap_by_study` raises.

    >>> y = np.array([0, 0, 1, 1])
    >>> both = bootstrap_each_by_study(lambda rows: np.array([y[rows].mean(), 1.0]), list("abcd"))
    >>> [one.value for one in both]
    [0.5, 1.0]
    """
    studies = np.asarray(studies)
    draws = [statistics(rows) for rows in resample_by_study(studies, resamples, seed)]
    values = np.array([statistics(np.arange(len(studies))), *draws])
    return [interval_of(column, studies, level) for column in values.T]


# Statistics of weighted rows: all draws in one computation


def draw_weights(groups: np.ndarray, resamples: int = 1000, seed: int = 42) -> np.ndarray:
    """Return each row's weight in each draw of groups with replacement.

    The draws are those of `resample_by_study`, so a statistic of weighted rows equals one of drawn
    rows, draw by draw.

    Args:
        groups: Group of each row, such as its study, shape (n,); drawn whole. With all groups
            different, rows are drawn.
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        Whole numbers from 0, float64 (resamples, n).

    Raises:
        DernetError: As `resample_by_study` raises.

    >>> draw_weights(["a", "a", "b"], resamples=2, seed=0).tolist()
    [[0.0, 0.0, 2.0], [1.0, 1.0, 1.0]]
    """
    groups = checked_groups(groups, resamples)
    _, group_of_row = np.unique(groups, return_inverse=True)
    number = int(group_of_row.max()) + 1
    drawn = np.random.default_rng(seed).integers(number, size=(resamples, number))
    drawn += number * np.arange(resamples)[:, None]
    times = np.bincount(drawn.ravel(), minlength=resamples * number).reshape(resamples, number)
    return times.astype(np.float64)[:, group_of_row]


def leave_one_out(groups: np.ndarray) -> np.ndarray:
    """Return weights, 0 or 1, each row of which leaves out one group; shape (groups, n).

    Args:
        groups: As `draw_weights` takes them.

    >>> leave_one_out(["a", "a", "b"]).tolist()
    [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    _, group_of_row = np.unique(checked_groups(groups), return_inverse=True)
    return 1.0 - (np.arange(group_of_row.max() + 1)[:, None] == group_of_row)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    groups: np.ndarray,
    resamples: int = 1000,
    seed: int = 42,
    level: float = 0.95,
    method: str = "percentile",
) -> Interval:
    """Return a statistic of weighted rows with its bootstrap interval, all draws at once.

    Args:
        statistic: Takes weights of shape (draws, n) and returns a number for each draw, shape
            (draws,), nan where it is undefined; `classification.weighted_auroc` makes one.
        groups: As `draw_weights` takes them.
        resamples: Number of draws (paper, section 4.1: 1,000).
        seed: Seed of the draws.
        level: Coverage in (0, 1).
        method: ``percentile``, or ``bca``: bias-corrected and accelerated, with the acceleration
            from leaving out one group at a time (Efron, JASA 82, 1987, section 6).

    Returns:
        The statistic on all rows with its interval. The ends are nan if no draw is defined, and for
        ``bca`` also if all leave-one-out statistics are equal or all draws lie on one side of it.

    Raises:
        DernetError: `level` is outside (0, 1), `method` is another, or as `resample_by_study`
            raises.

    >>> y = np.array([0.0, 0.0, 1.0, 1.0])
    >>> bootstrap(lambda w: w @ y / w.sum(1), [1, 2, 3, 4], 500).n_studies
    4
    """
    if method not in ("percentile", "bca"):
        raise DernetError(f"An interval's method must be percentile or bca, not {method!r}.")
    groups = checked_groups(groups, resamples)
    values = statistic(np.vstack([np.ones(len(groups)), draw_weights(groups, resamples, seed)]))
    if method == "percentile":
        return interval_of(values, groups, level)
    return interval_of(values, groups, level, statistic(leave_one_out(groups)))


def interval_of(
    values: np.ndarray,
    groups: np.ndarray,
    level: float = 0.95,
    without: np.ndarray | None = None,
) -> Interval:
    """Return the interval of a value from its draws.

    Args:
        values: The statistic on all rows, then on each draw, shape (1 + draws,).
        groups: As `draw_weights` takes them, shape (n,).
        level: Coverage in (0, 1).
        without: The statistic with each group left out in turn, for a ``bca`` interval; None for
            a percentile interval.

    Raises:
        DernetError: `level` is outside (0, 1).
    """
    if not 0 < level < 1:
        raise DernetError(f"The level of an interval must lie between 0 and 1, but is {level}.")
    value, draws = float(values[0]), np.asarray(values[1:])
    defined = draws[~np.isnan(draws)]
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if without is not None:
        tails = _bca_tails(value, defined, np.asarray(without), tails)
    usable = len(defined) and not np.isnan(tails).any()
    low, high = np.quantile(defined, tails) if usable else (np.nan, np.nan)
    return Interval(
        value=value,
        low=float(low),
        high=float(high),
        n_images=len(groups),
        n_studies=len(np.unique(groups)),
        resamples=len(defined),
        undefined=len(draws) - len(defined),
    )


def _bca_tails(
    value: float, draws: np.ndarray, without: np.ndarray, tails: np.ndarray
) -> np.ndarray:
    """Return the quantiles at which a bca interval ends (Efron, 1987, Eqs. 2.3, 6.6)."""
    below = ((draws < value).sum() + (draws == value).sum() / 2) / max(len(draws), 1)
    without = without[~np.isnan(without)]
    if not 0 < below < 1 or not len(without) or not np.ptp(without) > 0:
        return np.full(2, np.nan)
    away = without.mean() - without
    spread = (away**2).sum() ** 1.5
    bias, acceleration = distributions.norm.ppf(below), (away**3).sum() / (6 * spread)
    shifted = bias + distributions.norm.ppf(tails)
    return distributions.norm.cdf(bias + shifted / (1 - acceleration * shifted))

"""Exact intervals of proportions by study: by hand, at the edges, and against statsmodels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, t
from statsmodels.stats.proportion import proportion_confint

from dernet_utils.core.errors import DernetError
from dernet_utils.metrics.proportions import effective_size, exact_by_study


@pytest.mark.parametrize("total", [1, 2, 4, 10, 29])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_one_observation_a_study_is_clopper_and_pearson(total, level):
    for count in range(total + 1):
        own = exact_by_study(np.arange(total) < count, np.arange(total), level)
        assert (own.count, own.total, own.n_studies) == (count, total, total)
        assert own.effective == pytest.approx(total, rel=1e-12)
        ends = proportion_confint(count, total, alpha=1 - level, method="beta")
        assert (own.low, own.high) == pytest.approx(np.nan_to_num(ends, nan=1.0), abs=1e-12)
        scipy = binomtest(count, total).proportion_ci(level, method="exact")
        assert (own.low, own.high) == pytest.approx((scipy.low, scipy.high), abs=1e-9)


def test_ends_by_hand():
    # None of four: the upper end is where four misses in a row have probability 2.5 %.
    none = exact_by_study([False] * 4, list("abcd"))
    assert none.low == 0 and (1 - none.high) ** 4 == pytest.approx(0.025)
    # Three of five: at either end the observed count or a more extreme one has 2.5 %.
    three = exact_by_study([True, True, True, False, False], list("abcde"))
    assert binom.sf(2, 5, three.low) == pytest.approx(0.025)
    assert binom.cdf(3, 5, three.high) == pytest.approx(0.025)


def test_effective_size_by_hand():
    # Studies of 3, 2 and 1 boxes, of which 3, 0 and 0 are found: p = 1/2, and the sums less their
    # expectation are 1.5, -1 and -0.5. Variance 3/2 (2.25 + 1 + 0.25) / 36 = 0.1458, that of six
    # independent boxes 0.25 / 5 = 0.05.
    true, studies = [True, True, True, False, False, False], list("aaabbc")
    quantiles = t.ppf(0.975, 5) / t.ppf(0.975, 2)
    expected = 6 * 0.05 / (1.5 * 3.5 / 36) * quantiles**2
    assert effective_size(true, studies) == pytest.approx(expected)
    own = exact_by_study(true, studies)
    assert own.effective == pytest.approx(expected)
    assert (own.low, own.high) == pytest.approx((1 - own.high, 1 - own.low))
    # The same interval as statsmodels' for that many independent observations.
    ends = proportion_confint(expected / 2, expected, method="beta")
    assert (own.low, own.high) == pytest.approx(ends)


def test_without_variance_a_study_counts_once():
    studies = list("aaabbc")
    for true in (np.zeros(6, bool), np.ones(6, bool)):
        own, alone = exact_by_study(true, studies), exact_by_study(true[:3], list("abc"))
        assert own.effective == 3 and (own.low, own.high) == (alone.low, alone.high)
    assert effective_size([True, False, False], ["a", "a", "a"]) == 1
    assert effective_size([True, False, True, False], list("aabb")) == 4  # studies agree: at most n


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30))
def test_properties(rows):
    true, studies = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    own = exact_by_study(true, studies)
    assert 0 < own.effective <= len(rows)
    assert 0 <= own.low <= own.count / own.total <= own.high <= 1
    independent = exact_by_study(true, np.arange(len(rows)))
    assert own.low <= independent.low + 1e-9 and own.high >= independent.high - 1e-9
    missed = exact_by_study(~true, studies)
    assert (missed.low, missed.high) == pytest.approx((1 - own.high, 1 - own.low), abs=1e-9)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = exact_by_study(true[order], studies[order])
    assert (shuffled.low, shuffled.high) == pytest.approx((own.low, own.high))
    narrower = exact_by_study(true, np.arange(len(rows)), 0.5)
    assert independent.low <= narrower.low and narrower.high <= independent.high


def test_covers_where_all_boxes_of_a_study_are_alike():
    """Exactly, over all numbers of studies found; boxes taken as independent cover too rarely."""
    studies = np.repeat(np.arange(8), 5)
    for truth in (0.1, 0.3, 0.5):
        covered = {"studies": 0.0, "boxes": 0.0}
        for k in range(9):
            true = studies < k
            for unit, groups in (("studies", studies), ("boxes", np.arange(40))):
                own = exact_by_study(true, groups)
                covered[unit] += binom.pmf(k, 8, truth) * (own.low <= truth <= own.high)
        assert covered["studies"] >= 0.95 > 0.85 > covered["boxes"]


def test_errors():
    for true, studies in (([], []), ([True], ["a", "b"]), ([[True]], [["a"]])):
        with pytest.raises(DernetError):
            exact_by_study(true, studies)
    with pytest.raises(DernetError, match="level"):
        exact_by_study([True], ["a"], level=1.0)

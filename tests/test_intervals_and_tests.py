"""Intervals by resampling studies, and tests."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, ttest_1samp
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from dernet_utils.core.errors import DernetError
from dernet_utils.metrics import intervals, significance
from dernet_utils.metrics.classification import operating_point, weighted_auroc, weighted_point
from dernet_utils.metrics.intervals import (
    Interval,
    bootstrap_by_study,
    bootstrap_each_by_study,
    resample_by_study,
)


def mean_of(values):
    return lambda rows: float(values[rows].mean())


def test_every_draw_brings_whole_studies():
    studies = np.array(["b", "a", "b", "c", "b", "a"])
    for rows in resample_by_study(studies, resamples=50, seed=1):
        counts = np.bincount(rows, minlength=len(studies))
        for study in "abc":
            assert len(set(counts[studies == study])) == 1
        drawn = sum(counts[np.flatnonzero(studies == study)[0]] for study in "abc")
        assert drawn == 3


def test_one_seed_gives_the_same_draws():
    studies = np.repeat(np.arange(10), 2)
    first, second, other = (list(resample_by_study(studies, 5, seed)) for seed in (7, 7, 8))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=True))


def test_one_study_gives_an_interval_of_no_width():
    values = np.array([0.0, 1.0, 1.0])
    interval = bootstrap_by_study(mean_of(values), np.zeros(3), resamples=100)
    assert interval.low == interval.high == interval.value == pytest.approx(2 / 3)
    assert (interval.n_images, interval.n_studies, interval.resamples) == (3, 1, 100)


def test_mean_of_independent_rows_agrees_with_the_normal_interval():
    values = np.random.default_rng(3).normal(5, 2, 400)
    interval = bootstrap_by_study(mean_of(values), np.arange(400), resamples=4000)
    half = norm.ppf(0.975) * values.std() / np.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_wider_than_by_image_where_images_of_a_study_agree():
    # Four equal images a study: by hand, the standard error is twice that of independent images.
    per_study = np.random.default_rng(0).normal(size=60)
    values, studies = np.repeat(per_study, 4), np.repeat(np.arange(60), 4)
    by_study = bootstrap_by_study(mean_of(values), studies, resamples=2000)
    by_image = bootstrap_by_study(mean_of(values), np.arange(240), resamples=2000)
    ratio = (by_study.high - by_study.low) / (by_image.high - by_image.low)
    assert ratio == pytest.approx(2, rel=0.1)


def test_undefined_resamples_are_dropped_and_counted():
    y = np.array([0, 1])

    def spread(rows):
        return float("nan") if y[rows].std() == 0 else 1.0

    interval = bootstrap_by_study(spread, np.array(["a", "b"]), resamples=400)
    assert interval.resamples + interval.undefined == 400
    assert interval.undefined / 400 == pytest.approx(0.5, abs=0.1)  # aa and bb of aa ab ba bb
    assert interval.low == interval.high == 1.0


def test_never_defined_gives_nan_ends():
    interval = bootstrap_by_study(lambda rows: float("nan"), np.arange(4), resamples=10)
    assert np.isnan([interval.value, interval.low, interval.high]).all()
    assert (interval.resamples, interval.undefined) == (0, 10)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.integers(0, 2**32 - 1),
    st.floats(0.5, 0.99),
)
def test_interval_of_a_mean_lies_within_the_values(studies, seed, level):
    values = np.random.default_rng(seed).random(len(studies))
    interval = bootstrap_by_study(mean_of(values), studies, 50, seed, level)
    assert values.min() - 1e-12 <= interval.low <= interval.high <= values.max() + 1e-12
    wider = bootstrap_by_study(mean_of(values), studies, 50, seed, 0.995)
    assert wider.low <= interval.low and interval.high <= wider.high


def test_several_statistics_together_are_each_alone():
    values, studies = np.random.default_rng(5).random(12), np.arange(12) // 2
    y = np.arange(12) % 12 < 2  # a single study is True

    def most(rows):
        return values[rows].max() if y[rows].any() else float("nan")

    alone = [bootstrap_by_study(one, studies, 60, seed=2) for one in (mean_of(values), most)]
    together = bootstrap_each_by_study(
        lambda rows: np.array([values[rows].mean(), most(rows)]), studies, 60, seed=2
    )
    assert together == alone
    assert together[0].undefined == 0 < together[1].undefined
    draws = [values[rows].mean() for rows in resample_by_study(studies, 60, 2)]
    assert [together[0].low, together[0].high] == pytest.approx(np.quantile(draws, [0.025, 0.975]))


def test_text():
    interval = Interval(0.8412, 0.76, 0.9149, 78, 40, 1000)
    assert str(interval) == f"{interval}" == "0.84 [0.76, 0.91]"
    assert f"{interval:.1%}" == "84.1% [76.0%, 91.5%]"


@pytest.mark.parametrize(
    ("studies", "options", "message"),
    [
        ([], {}, "at least one row"),
        (np.zeros((2, 2)), {}, "shape"),
        ([1, 2], {"resamples": 0}, "resample"),
        ([1, 2], {"level": 1.0}, "level"),
    ],
)
def test_errors_state_the_input(studies, options, message):
    with pytest.raises(DernetError, match=message):
        bootstrap_by_study(lambda rows: 0.0, studies, **options)


# Weighted statistics

clustered = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 8)), min_size=4, max_size=40
).filter(lambda rows: len({label for label, _, _ in rows}) == 2)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(clustered, st.integers(0, 999))
def test_bootstrap_of_auroc_equals_a_loop_over_sklearn(rows, seed):
    y, prob, studies = np.array(rows).T
    areas = weighted_auroc(y, prob)(intervals.draw_weights(studies, 20, seed))
    for area, drawn in zip(areas, resample_by_study(studies, 20, seed), strict=True):
        if len(set(y[drawn])) == 2:
            assert area == pytest.approx(roc_auc_score(y[drawn], prob[drawn]), abs=1e-9)
        else:
            assert np.isnan(area)


@settings(max_examples=40, deadline=None)
@given(clustered, st.integers(0, 999))
def test_bootstrap_of_points_equals_a_loop(rows, seed):
    y, prob, studies = np.array(rows).T
    points = weighted_point(y, prob, 3)(intervals.draw_weights(studies, 20, seed))
    for number, drawn in enumerate(resample_by_study(studies, 20, seed)):
        for name, value in operating_point(y[drawn], prob[drawn], 3).items():
            assert points[name][number] == pytest.approx(value, abs=1e-12, nan_ok=True)


def test_percentile_interval_is_that_of_the_loop():
    rng = np.random.default_rng(1)
    studies = rng.integers(0, 30, 90)
    values = rng.normal(size=90)
    loop = bootstrap_by_study(mean_of(values), studies, 300, seed=3)
    fast = intervals.bootstrap(lambda w: w @ values / w.sum(axis=1), studies, 300, seed=3)
    for name, value in vars(loop).items():
        assert getattr(fast, name) == pytest.approx(value, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["percentile", "bca", "delong"])
def test_intervals_by_study_cover_where_those_by_image_do_not(method):
    """200 studies of one to five images, which have half of their scores' variance in common."""
    rng, truth = np.random.default_rng(11), norm.cdf(1.5 / np.sqrt(2))
    held = {"study": [], "image": []}
    for seed in range(500):
        study = np.repeat(np.arange(200), rng.integers(1, 6, 200))
        y = (study % 2).astype(float)
        own, image = rng.normal(size=200)[study], rng.normal(size=len(study))
        score = 1.5 * y + np.sqrt(0.5) * (own + image)
        for unit, groups in {"study": study, "image": np.arange(len(study))}.items():
            if method == "delong":
                found = significance.delong(y, score, groups).interval()
            else:
                area = weighted_auroc(y, score)
                found = intervals.bootstrap(area, groups, 200, seed, method=method)
            held[unit].append(found.low <= truth <= found.high)
    assert 0.93 <= np.mean(held["study"]) <= 0.97
    assert np.mean(held["image"]) < 0.90


def test_bca_interval_is_scipys():
    values = np.random.default_rng(2).lognormal(size=60)
    ours = intervals.bootstrap(
        lambda w: w @ values / w.sum(axis=1), np.arange(60), 20_000, seed=1, method="bca"
    )
    theirs = scipy_bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(5)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, rel=0.02)
    assert ours.high == pytest.approx(theirs.high, rel=0.02)
    plain = intervals.bootstrap(lambda w: w @ values / w.sum(axis=1), np.arange(60), 20_000, seed=1)
    assert ours.low > plain.low and ours.high > plain.high  # a skewed mean: both ends move up


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_edges_of_the_bootstrap(method):
    y, prob = np.array([0, 1, 0, 1]), np.array([0.2, 0.2, 0.2, 0.2])
    constant = intervals.bootstrap(weighted_auroc(y, prob), np.arange(4), 200, method=method)
    assert constant.value == 0.5
    assert method == "bca" or constant.low == constant.high == 0.5
    assert method == "percentile" or np.isnan([constant.low, constant.high]).all()
    one_class = intervals.bootstrap(weighted_auroc([1, 1], [0.1, 0.2]), [0, 1], 50, method=method)
    assert np.isnan([one_class.value, one_class.low, one_class.high]).all()
    assert one_class.undefined == 50
    one_study = intervals.bootstrap(weighted_auroc(y, prob + y), np.zeros(4), 50, method=method)
    assert one_study.value == 1 and one_study.n_studies == 1
    with pytest.raises(DernetError, match="percentile or bca"):
        intervals.bootstrap(weighted_auroc(y, prob), np.arange(4), method="basic")


# DeLong


def delong_by_definition(y, prob):
    """DeLong's estimator from the kernel of every pair, in exact fractions."""
    above = [[Fraction(int(v)) for v in row] for row in prob[y == 1]]
    below = [[Fraction(int(v)) for v in row] for row in prob[y == 0]]
    m, n, k = len(above), len(below), prob.shape[1]

    def psi(r, i, j):
        high, low = above[i][r], below[j][r]
        return Fraction(int(high > low)) + Fraction(int(high == low), 2)

    v10 = [[sum(psi(r, i, j) for j in range(n)) / n for i in range(m)] for r in range(k)]
    v01 = [[sum(psi(r, i, j) for i in range(m)) / m for j in range(n)] for r in range(k)]
    area = [sum(v) / m for v in v10]

    def s(v, r, q, count):
        pairs = zip(v[r], v[q], strict=True)
        return sum((a - area[r]) * (b - area[q]) for a, b in pairs) / (count - 1)

    cov = [[s(v10, r, q, m) / m + s(v01, r, q, n) / n for q in range(k)] for r in range(k)]
    return np.array(area, float), np.array(cov, float)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 5)), min_size=5, max_size=25
    ).filter(lambda rows: 2 <= sum(row[0] for row in rows) <= len(rows) - 2)
)
def test_delong_equals_its_definition(rows):
    rows = np.array(rows)
    y, prob = rows[:, 0], rows[:, 1:]
    found = significance.delong(y, prob)
    area, covariance = delong_by_definition(y, prob)
    assert found.values == pytest.approx(area, abs=1e-12)
    assert found.covariance == pytest.approx(covariance, abs=1e-12)
    apart = area[0] - area[1]
    error = np.sqrt(max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0))
    if error > 1e-9:
        assert found.p_value() == pytest.approx(2 * norm.sf(abs(apart) / error), abs=1e-8)
        assert found.difference().high == pytest.approx(apart + norm.ppf(0.975) * error, abs=1e-8)


def test_images_that_are_doubled_change_nothing_in_delong_by_study():
    rng = np.random.default_rng(4)
    y = np.repeat([0, 1], 30)
    prob = np.column_stack([y + rng.normal(size=60), y + rng.normal(size=60)])
    once = significance.delong(y, prob)
    studies = np.repeat(np.arange(60), 2)
    doubled = significance.delong(np.repeat(y, 2), np.repeat(prob, 2, axis=0), studies)
    assert doubled.covariance == pytest.approx(once.covariance)
    assert doubled.p_value() == pytest.approx(once.p_value())
    blind = significance.delong(np.repeat(y, 2), np.repeat(prob, 2, axis=0))
    assert (np.diag(blind.covariance) < np.diag(once.covariance) * 0.55).all()


def test_delong_by_study_is_the_spread_of_areas_where_studies_have_both_classes():
    rng, areas, variances = np.random.default_rng(6), [], []
    studies = np.repeat(np.arange(60), 4)
    for _ in range(400):
        y = rng.integers(0, 2, 240)
        prob = 0.8 * y + np.repeat(rng.normal(size=60), 4) + 0.7 * rng.normal(size=240)
        found = significance.delong(y, prob, studies)
        areas.append(found.values[0])
        variances.append(found.covariance[0, 0])
    assert np.mean(variances) == pytest.approx(np.var(areas), rel=0.2)


def test_edges_of_delong():
    apart = significance.delong([0, 0, 1, 1], [[0.1, 0.5], [0.2, 0.5], [0.8, 0.5], [0.9, 0.5]])
    assert apart.values.tolist() == [1, 0.5] and apart.p_value() == 0
    assert apart.interval().low == apart.interval().high == 1
    same = significance.delong([0, 1, 0, 1], np.full((4, 2), 0.3))
    assert same.p_value() == 1 and same.difference().value == 0
    lonely = significance.delong([0, 0, 1], [0.1, 0.2, 0.3])  # one abnormal image has no spread
    assert lonely.values[0] == 1 and np.isnan(lonely.covariance).all()
    for y, prob, message in [
        ([1, 1], [0.1, 0.2], "both"),
        ([0, 1], [0.1, np.nan], "nan"),
        ([0, 1], [0.1], "score for each"),
        ([0, 2], [0.1, 0.2], "both"),
    ]:
        with pytest.raises(DernetError, match=message):
            significance.delong(y, prob)
    with pytest.raises(DernetError, match="its study"):
        significance.delong([0, 1], [0.1, 0.2], [1])


# Paired tests


@given(st.lists(st.floats(-5, 5).map(lambda v: round(v, 3)), min_size=2, max_size=9))
def test_paired_t_is_scipys_and_the_correction_makes_it_weaker(values):
    values = np.array(values)
    found = significance.paired_t(values)
    if values.std() > 1e-9:
        theirs = ttest_1samp(values, 0)
        assert found.statistic == pytest.approx(theirs.statistic)
        assert found.p == pytest.approx(theirs.pvalue)
        assert significance.paired_t(values, 0.25).p >= found.p - 1e-12


def test_corrected_t_by_hand():
    # Differences 1 to 5: mean 3, variance 2.5; with 1/5 + 1/4 the error is sqrt(1.125).
    found = significance.paired_t([1, 2, 3, 4, 5], test_share=0.25)
    assert found.statistic == pytest.approx(3 / np.sqrt(1.125))
    assert found.p == pytest.approx(2 * student.sf(3 / np.sqrt(1.125), 4))


def test_equal_differences_have_a_p_value_of_zero_or_one():
    assert significance.paired_t([0.0, 0.0]).p == 1
    assert (
        significance.paired_t([0.5, 0.5]).p == 0
        and significance.paired_t([-0.5, -0.5]).statistic == -np.inf
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_an_exact_binomial_test(rows):
    first, second = np.array(rows).T
    found = significance.mcnemar(first, second)
    only_first, only_second = (first & ~second).sum(), (~first & second).sum()
    if found.n:
        assert found.p == pytest.approx(binomtest(only_first, only_first + only_second).pvalue)
    else:
        assert found.p == 1
    assert found.statistic == only_first - only_second


def test_holm_by_hand():
    # By rising p: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not fall below the last.
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert significance.holm([0.2]) == pytest.approx([0.2])


def test_studies_needed_reach_their_power():
    n = significance.studies_needed(0.1, 0.6, power=0.8)
    means = np.random.default_rng(0).normal(0.1, 0.6, (4000, n)).mean(axis=1)
    assert (np.abs(means) > norm.ppf(0.975) * 0.6 / np.sqrt(n)).mean() == pytest.approx(
        0.8, abs=0.02
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: significance.paired_t([1.0]), "at least two"),
        (lambda: significance.paired_t([1.0, np.nan]), "at least two"),
        (lambda: significance.paired_t([1.0, 2.0], -1), "at least 0"),
        (lambda: significance.mcnemar([1, 0], [1]), "same images"),
        (lambda: significance.holm([0.5, 1.5]), "between 0 and 1"),
        (lambda: significance.holm([np.nan]), "between 0 and 1"),
        (lambda: significance.studies_needed(0, 1), "not 0"),
        (lambda: intervals.interval_of(np.ones(3), np.arange(2), level=1), "level"),
    ],
)
def test_errors_of_tests(call, message):
    with pytest.raises(DernetError, match=message):
        call()

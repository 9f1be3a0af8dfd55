"""Intervals by resampling studies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from dernet_utils.errors import DernetError
from dernet_utils.stats import Interval, bootstrap_by_study, resample_by_study


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
def test_errors_say_what_came(studies, options, message):
    with pytest.raises(DernetError, match=message):
        bootstrap_by_study(lambda rows: 0.0, studies, **options)

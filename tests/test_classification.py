"""Classification: AUROC, operating points, thresholds, tables, bands."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from dernet_utils.core.errors import DernetError
from dernet_utils.metrics.classification import (
    auroc,
    classification_table,
    f1_threshold,
    operating_point,
    roc_band,
    scores_by_study,
    sensitivity_threshold,
    youden_threshold,
)

# Labels and coarse scores, so that ties are common.
scored = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 6).map(lambda k: k / 6)), min_size=2, max_size=40
).filter(lambda rows: len({label for label, _ in rows}) == 2)


def test_auroc_by_hand():
    # Pairs (abnormal, normal): 0.4 > 0.1, 0.4 = 0.4, 0.8 > 0.1, 0.8 > 0.4 give 3.5 of 4.
    assert auroc([0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8]) == 0.875


def test_auroc_edges():
    assert auroc([0, 1, 1], [0.5, 0.5, 0.5]) == 0.5
    assert auroc([0, 1], [0.1, 0.2]) == 1
    assert auroc([1, 0], [0.1, 0.2]) == 0
    assert np.isnan(auroc([1, 1], [0.1, 0.2]))
    assert np.isnan(auroc([], []))


@given(scored)
def test_auroc_equals_sklearn(rows):
    y, prob = np.array(rows).T
    assert auroc(y, prob) == pytest.approx(roc_auc_score(y, prob))
    assert auroc(y, prob) == pytest.approx(1 - auroc(1 - y, prob))
    assert auroc(y, prob) == pytest.approx(auroc(y, np.exp(3 * prob)))


@given(scored, st.floats(0, 1))
def test_operating_point_equals_sklearn(rows, threshold):
    y, prob = np.array(rows).T
    point = operating_point(y, prob, threshold)
    called = prob > threshold
    assert point["sensitivity"] == pytest.approx(recall_score(y, called))
    assert point["specificity"] == pytest.approx(recall_score(y, called, pos_label=0))
    assert point["f1"] == pytest.approx(f1_score(y, called, zero_division=0))


def test_scores_by_study_by_hand():
    y, prob = [0, 1, 0, 0, 1, 1], [0.9, 0.3, 0.4, 0.6, 0.2, 0.1]
    table = scores_by_study(y, prob, ["b", "b", "a", "a", "c", "c"])
    assert table.index.tolist() == ["a", "b", "c"]
    assert table["label"].tolist() == [False, True, True]
    assert table["prob"].tolist() == [0.6, 0.9, 0.2]  # b's by its normal image
    assert table["images"].tolist() == [2, 2, 2]
    assert table["mixed"].tolist() == [False, True, False]
    assert auroc(table["label"], table["prob"]) == 0.5
    assert operating_point(table["label"], table["prob"], 0.5)["specificity"] == 0


@settings(max_examples=30, deadline=None)
@given(scored, st.integers(1, 8), st.floats(0, 1))
def test_a_study_is_normal_only_if_all_of_its_images_are(rows, number, threshold):
    y, prob = np.array(rows).T
    studies = np.arange(len(y)) % number
    table = scores_by_study(y, prob, studies)
    for study, row in table.iterrows():
        own = studies == study
        assert row["label"] == y[own].any() and row["images"] == own.sum()
        assert (row["prob"] > threshold) == (prob[own] > threshold).any()
        assert row["mixed"] == (len(set(y[own])) == 2)
    alone = scores_by_study(y, prob, np.arange(len(y)))  # a study of each image changes nothing
    assert operating_point(alone["label"], alone["prob"], threshold) == pytest.approx(
        operating_point(y, prob, threshold), nan_ok=True
    )


def test_each_image_needs_its_study():
    with pytest.raises(DernetError, match="study"):
        scores_by_study([0, 1], [0.1, 0.2], ["a"])


def test_a_score_at_the_threshold_is_normal():
    point = operating_point([1, 0], [0.5, 0.5], 0.5)
    assert point["sensitivity"] == 0 and point["specificity"] == 1


def test_undefined_metrics_are_nan():
    point = operating_point([0, 0], [0.1, 0.2], 0.5)
    assert np.isnan(point["sensitivity"]) and np.isnan(point["f1"]) and point["specificity"] == 1


def test_youden_by_hand():
    # 0.4 separates the classes except for one normal image; 0.75 misses one abnormal image. Both
    # have J = 2/3: the lower one is taken.
    y, prob = [0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.7, 0.6, 0.8, 0.9]
    assert youden_threshold(y, prob) == pytest.approx(0.4)
    assert youden_threshold([0, 1], [0.3, 0.3]) == 0.3


def test_youden_between_neighbouring_floats():
    low = 0.5
    high = np.nextafter(low, 1)
    threshold = youden_threshold([0, 1], [low, high])
    assert operating_point([0, 1], [low, high], threshold)["f1"] == 1


@given(scored)
def test_no_threshold_beats_youden(rows):
    y, prob = np.array(rows).T

    def youden(threshold):
        point = operating_point(y, prob, threshold)
        return point["sensitivity"] + point["specificity"] - 1

    inner = np.unique(prob)[:-1]  # above the lowest score, below the highest
    best = max((youden(threshold) for threshold in inner), default=youden(prob[0]))
    assert youden(youden_threshold(y, prob)) == pytest.approx(best)


@pytest.mark.slow
@given(scored)
def test_no_threshold_beats_the_f1_threshold(rows):
    y, prob = np.array(rows).T
    best = max(f1_score(y, prob > t) for t in [-1.0, *prob])
    assert operating_point(y, prob, f1_threshold(y, prob))["f1"] == pytest.approx(best)


@given(scored, st.sampled_from([0.5, 0.9, 1.0]))
def test_the_highest_threshold_that_keeps_a_sensitivity_is_found(rows, fraction):
    y, prob = np.array(rows).T
    threshold = sensitivity_threshold(y, prob, fraction)
    assert operating_point(y, prob, threshold)["sensitivity"] >= fraction - 1e-12
    higher = prob[prob > threshold]
    if len(higher):
        beyond = operating_point(y, prob, higher.min())
        assert beyond["sensitivity"] < fraction - 1e-12


def test_table_holds_the_four_metrics_with_their_intervals():
    rng = np.random.default_rng(5)
    studies = np.repeat(np.arange(40), 2)
    y = np.repeat(rng.integers(0, 2, 40), 2)
    prob = np.clip(0.5 + 0.3 * (y - 0.5) + rng.normal(0, 0.2, 80), 0, 1)
    table = classification_table(y, prob, studies, threshold=0.5, resamples=200)
    assert list(table.index) == ["auroc", "f1", "sensitivity", "specificity"]
    assert table.loc["auroc", "value"] == auroc(y, prob)
    assert table.loc["f1", "value"] == operating_point(y, prob, 0.5)["f1"]
    assert (table["low"] < table["high"]).all()
    assert (table["n_images"] == 80).all() and (table["n_studies"] == 40).all()
    same = classification_table(y, prob, studies, threshold=0.5, resamples=200)
    assert table.equals(same)


@settings(max_examples=20, deadline=None)
@given(scored)
def test_band_rises_and_holds_the_curve_at_its_ends(rows):
    y, prob = np.array(rows).T
    band = roc_band(y, prob, np.arange(len(y)), resamples=30)
    assert len(band) == 101 and (band["low"] <= band["high"] + 1e-12).all()
    for column in ("sensitivity", "low", "high"):
        assert (np.diff(band[column]) >= -1e-12).all()
        assert band[column].between(-1e-12, 1 + 1e-12).all()
    assert band["sensitivity"].iloc[-1] == 1


def test_area_under_the_band_is_the_auroc():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 2000)
    prob = rng.random(2000) / 2 + y * 0.2
    band = roc_band(y, prob, np.arange(2000), resamples=2)
    area = np.trapezoid(band["sensitivity"], band["false_positive_rate"])
    assert area == pytest.approx(auroc(y, prob), abs=0.005)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([0, 1], [0.1]), "one length"),
        (lambda: auroc([0, 2], [0.1, 0.2]), "0 .normal. or 1"),
        (lambda: auroc([0, 1], [0.1, np.nan]), "not a number"),
        (lambda: youden_threshold([1, 1], [0.1, 0.2]), "normal and abnormal"),
        (lambda: f1_threshold([0, 0], [0.1, 0.2]), "normal and abnormal"),
        (lambda: sensitivity_threshold([0, 1], [0.1, 0.2], 0.0), "between 0 and 1"),
        (lambda: roc_band([0, 0], [0.1, 0.2], [1, 2]), "one class"),
        (lambda: classification_table([0, 1], [0.1, 0.2], [1], 0.5), "its study"),
    ],
)
def test_errors_state_the_input(call, message):
    with pytest.raises(DernetError, match=message):
        call()

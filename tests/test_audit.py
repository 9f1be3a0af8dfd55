"""What printed numbers imply for one another, and the rows of Tables 2 and 3 that do not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from dernet_utils.book import audit
from dernet_utils.book.paper import TABLE_2, TABLE_3
from dernet_utils.core.errors import DernetError

fraction = st.floats(0.05, 0.95)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=50))
def test_f1_is_sklearns(rows):
    y, called = np.array(rows).T
    if y.all() or not y.any():
        return
    found = audit.f1_of(called[y].mean(), (~called[~y]).mean(), y.mean())
    assert found == pytest.approx(f1_score(y, called))


@given(fraction, fraction, fraction)
def test_prevalence_undoes_f1(sensitivity, specificity, prevalence):
    f1 = audit.f1_of(sensitivity, specificity, prevalence)
    assert audit.prevalence_of(f1, sensitivity, specificity) == pytest.approx(prevalence)


def test_no_prevalence_where_f1_does_not_depend_on_it():
    assert np.isnan(audit.prevalence_of(0.9, 0.8, 1.0))
    assert np.isnan(audit.prevalence_of(0.99, 0.5, 0.9))  # more than this sensitivity allows


@given(st.integers(1, 2077), st.integers(0, 2077), st.integers(0, 2077))
def test_a_row_from_real_counts_is_found_possible(abnormal, true_positives, true_negatives):
    true_positives %= abnormal + 1
    true_negatives %= 2078 - abnormal + 1
    false_positives = 2078 - abnormal - true_negatives
    f1 = round(100 * 2 * true_positives / (true_positives + false_positives + abnormal), 2)
    sensitivity = round(100 * true_positives / abnormal, 2)
    specificity = round(100 * true_negatives / (2078 - abnormal), 2)
    assert abnormal in audit.possible_counts(2078, f1, sensitivity, specificity)
    if 0.2 < true_positives / abnormal < 0.99 and 0.2 < true_negatives / (2078 - abnormal) < 0.99:
        allowed = audit.implied_prevalence(f1, sensitivity, specificity)
        assert allowed.low - 1e-9 <= 100 * abnormal / 2078 <= allowed.high + 1e-9


def test_inconsistent_rows_of_table_2_are_those_of_the_arithmetic():
    rows = {name: row[1:] for name, row in TABLE_2.items() if None not in row}
    assert len(rows) == 5
    ranges = {name: audit.implied_prevalence(*row) for name, row in rows.items()}
    # By hand from the printed decimals: no two rows can be of one test split.
    names, _ = audit.largest_agreement(ranges)
    assert len(names) == 1
    assert ranges["tf_efficientnetv2_s"].low > 53.5
    others = [own for name, own in ranges.items() if name != "tf_efficientnetv2_s"]
    assert all(own.low > 47.9 and own.high < 48.9 for own in others)


def test_inconsistent_rows_of_table_3_are_those_of_the_arithmetic():
    wrong = {n for n, row in TABLE_3.items() if not audit.implied_mean(row[:-1]).holds(row[-1])}
    assert wrong == {"RetinaNet", "Faster R-CNN", "Sparse R-CNN", "YOLO11-L"}
    by_hand = (26.70 + 41.40 + 40.60 + 54.80 + 74.10 + 51.20 + 2.99) / 7
    assert audit.implied_mean(TABLE_3["YOLO11-L"][:-1]).holds(by_hand)
    assert round(by_hand, 2) == 41.68


def test_the_largest_agreement_is_found():
    ranges = {"a": audit.Range(0, 3), "b": audit.Range(2, 5), "c": audit.Range(2.5, 6),
              "d": audit.Range(7, 8)}  # fmt: skip
    assert audit.largest_agreement(ranges) == (["a", "b", "c"], audit.Range(2.5, 3))
    with pytest.raises(DernetError, match="at least one"):
        audit.largest_agreement({})


def test_hanley_mcneil_is_the_spread_of_areas():
    rng = np.random.default_rng(0)
    n, mu = 60, 1.2
    areas = [
        (rng.exponential(1 + mu, n)[:, None] > rng.exponential(1, n)).mean() for _ in range(3000)
    ]
    found = audit.hanley_mcneil(np.mean(areas), n, n)
    assert found == pytest.approx(np.std(areas), rel=0.05)
    with pytest.raises(DernetError, match="between 0 and 1"):
        audit.hanley_mcneil(1.2, 5, 5)
    assert audit.difference_p(1.96, 0.0, 1.0) == pytest.approx(0.05, abs=1e-4)

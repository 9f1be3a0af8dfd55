"""Cells of tables of average precision."""

import pandas as pd
import pytest

from dernet_utils.book.score_cells import (
    NOT_REPORTED,
    found_cells,
    mean_sentence,
    precision_cells,
)
from dernet_utils.metrics.detection import LEAST_BOXES, detection_table
from dernet_utils.metrics.froc import found_table


def scores_of(*boxes: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables for a detector that finds one box in two, one per image and study."""
    rows = [(f"{i:03d}", name) for name, n in zip("abc", boxes, strict=False) for i in range(n)]
    truth = pd.DataFrame(rows, columns=["image_id", "lesion_type"])
    truth = truth.assign(xmin=0.0, ymin=0.0, xmax=9.0, ymax=9.0)
    ids = sorted(set(truth["image_id"])) or ["000"]
    images = pd.DataFrame({"image_id": ids, "study_id": ids})
    predictions = truth[truth["image_id"].astype(int) % 2 == 0].assign(score=0.5)
    table = detection_table(truth, predictions, images, resamples=50)
    return table, found_table(truth, predictions, images)


def test_a_rare_type_has_a_count_and_no_average_precision():
    scores, found = scores_of(LEAST_BOXES, 4)
    cells = precision_cells(scores, 100, ".1f")
    assert cells["b"] == NOT_REPORTED
    own = scores.loc["a"]
    assert cells["a"] == f"{100 * own.value:.1f} [{100 * own.low:.1f}, {100 * own.high:.1f}]"
    assert cells["mAP"].startswith(f"{100 * scores.loc['mAP', 'value']:.1f} [")
    assert cells["mAP"].endswith("not supported")
    assert list(cells.index) == ["a", "b", "mAP"]
    counts = found_cells(found)
    assert counts["b"] == "2 of 4 [0.07, 0.93]"  # Clopper and Pearson's, by any table
    assert counts["a"].startswith(f"{LEAST_BOXES // 2} of {LEAST_BOXES} [")


def test_a_mean_of_common_types_keeps_its_interval():
    scores, _ = scores_of(LEAST_BOXES, LEAST_BOXES + 1)
    assert not precision_cells(scores).str.contains("not supported").any()
    assert "2 lesion types" in mean_sentence(scores)


@pytest.mark.parametrize(("boxes", "rare"), [((4,), 1), ((30, 4, 5), 2)])
def test_the_sentence_says_how_many_types_are_rare(boxes, rare):
    scores, _ = scores_of(*boxes)
    sentence = mean_sentence(scores)
    assert f"{len(boxes)} lesion types" in sentence and f"which {rare} have" in sentence


def test_without_boxes_nothing_is_supported():
    scores, found = scores_of(0)
    assert list(precision_cells(scores).index) == ["mAP"]
    assert precision_cells(scores)["mAP"].endswith("not supported")
    assert len(found_cells(found)) == 0

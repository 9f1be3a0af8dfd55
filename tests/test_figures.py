"""Figures show the data that they are given."""

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from dernet_utils.book import figures_detection as draw
from dernet_utils.book.figures import use_style
from dernet_utils.book.figures_data import draw_difference, draw_label
from dernet_utils.book.figures_practice import draw_latency
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES, PAPER_CODES
from dernet_utils.virtual.cohort import LEAST_VISIBILITY
from dernet_utils.virtual.counterfactual import Counterfactual


@pytest.fixture(autouse=True)
def style_of_the_book():
    with plt.rc_context():
        use_style()
        yield
    plt.close("all")


def lines_of(ax):
    return [np.column_stack(line.get_data()).astype(float) for line in ax.lines]


def test_bars_of_a_latency_figure_are_stacked_stages_and_a_mark_at_the_limit():
    stages = ["decode", "triage", "detect"]
    medians = pd.DataFrame([[1.0, 2, 3], [4, 5, 6]], ["a", "b"], stages).assign(limit=[5.0, 9.0])
    (ax,) = draw_latency(medians, stages).axes
    bars = [(bar.get_x(), bar.get_width()) for group in ax.containers for bar in group]
    assert bars == [(0, 1), (0, 4), (1, 2), (4, 5), (3, 3), (9, 6)]
    assert lines_of(ax)[0].tolist() == [[5, 0], [9, 1]]
    assert ax.yaxis_inverted()  # the first engine is at the top


def test_intervals_are_drawn_from_the_top_and_one_row_has_a_diamond():
    scores = pd.DataFrame(
        {"value": [0.5, 0.7], "low": [0.4, 0.6], "high": [0.6, 0.9]}, ["first", "mAP"]
    )
    (ax,) = draw.draw_intervals(scores, "mAP", "AP", (0, 1)).axes
    shown = [tick.get_text() for tick in ax.get_yticklabels()]
    assert shown == ["mAP", "first"]  # from below
    assert [line.tolist() for line in lines_of(ax)] == [
        [[0.6, 0], [0.9, 0]], [[0.7, 0]], [[0.4, 1], [0.6, 1]], [[0.5, 1]]
    ]  # fmt: skip
    assert [line.get_marker() for line in ax.lines if len(line.get_xdata()) == 1] == ["D", "o"]


def test_rare_types_have_no_average_precision_but_a_fraction_found():
    scores = pd.DataFrame(
        {"boxes": [40, 5, 45], "value": [0.5, 0.9, 0.7], "low": 0.4, "high": 1.0},
        ["common", "rare", "mAP"],
    )
    found = pd.DataFrame(
        {"count": [10, 1], "total": [40, 5], "low": [0.1, 0.0], "high": [0.4, 0.7]},
        ["common", "rare"],
    )
    left, right = draw.draw_scores(scores, found, 0.5).axes
    points = [line for line in lines_of(left) if len(line) == 1 and np.isfinite(line).all()]
    assert [point.tolist() for point in points] == [[[0.7, 0]], [[0.5, 2]]]  # from below
    assert [(text.get_text(), text.get_position()[1]) for text in left.texts] == [
        ("too few boxes", 1)
    ]
    drawn = [line.tolist() for line in lines_of(right) if np.isfinite(line).all()]
    assert drawn == [[[0.0, 1], [0.7, 1]], [[0.2, 1]], [[0.1, 2], [0.4, 2]], [[0.25, 2]]]


def test_a_free_response_curve_has_its_points_and_intervals():
    points = pd.DataFrame(
        {"value": 0.5, "low": 0.3, "high": 0.6}, index=[0.125, 0.25, 0.5, 1, 2, 4, 8]
    )
    figure = draw.draw_froc(pd.Series([0.0, 1.0, 8.0]), pd.Series([0.0, 0.4, 0.8]), points)
    (ax,) = figure.axes
    assert lines_of(ax)[0].tolist() == [[0, 0], [1, 0.4], [8, 0.8]]
    bars = np.concatenate(ax.collections[0].get_segments())
    assert bars[:, 1].min() == pytest.approx(0.3) and bars[:, 1].max() == pytest.approx(0.6)


def test_a_precision_recall_curve_per_lesion_type():
    curves = {
        name: pd.DataFrame({"recall": [0.0, number / 7], "precision": [1.0, 0.5]})
        for number, name in enumerate(LESION_TYPES)
    }
    (ax,) = draw.draw_precision_recall(curves).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(LESION_TYPES)
    for (name, curve), line in zip(curves.items(), lines_of(ax), strict=True):
        assert line == pytest.approx(curve.to_numpy()), name


def test_learning_curves_leave_out_epochs_without_an_evaluation():
    history = pd.DataFrame({"epoch": [1, 2, 3], "box": 3.0, "cls": 2.0, "dfl": 1.0})
    history["map50"] = [np.nan, 0.1, 0.2]
    loss, precision = draw.draw_detector_learning(history, 3, 2).axes
    assert [line[:, 1].mean() for line in lines_of(loss)[:3]] == [3, 2, 1]
    assert lines_of(precision)[0].tolist() == [[2, 0.1], [3, 0.2]]
    for ax in (loss, precision):  # grey up to the last epoch with mosaic
        (grey,) = ax.patches
        assert (grey.get_x(), grey.get_x() + grey.get_width()) == (0.5, 2.5)


def test_scaling_divides_the_variance_by_the_length():
    lengths, variance = [4, 16], np.array([4.0, 16.0])
    largest = {"undivided": np.array([0.5, 0.9]), "divided": np.array([0.4, 0.4])}
    left, right = draw.draw_scaling(lengths, variance, largest, 32).axes
    assert [line[:, 1].tolist() for line in lines_of(left)[:2]] == [[4, 16], [1, 1]]
    assert [line[:, 1].tolist() for line in lines_of(right)[:2]] == [[0.5, 0.9], [0.4, 0.4]]
    assert all(lines_of(ax)[-1][:, 0].tolist() == [32, 32] for ax in (left, right))


def test_sides_of_boxes_are_sorted_by_their_median():
    lesions = pd.DataFrame({"type": ["a"] * 3 + ["b"] * 2, "now": [30.0, 31, 32, 9, 10]})
    lesions["paper"] = 3 * lesions["now"]
    (ax,) = draw.draw_box_sides(lesions, {"now": "this run", "paper": "the paper"}).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["b\nn = 2", "a\nn = 3"]
    low, high = ax.get_xlim()
    assert low < 8 and high > 96  # all strides and all boxes are visible


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.zeros((200, 150), np.uint8))
    row = {"image_id": "a", "cached_path": str(path), "scale": 0.5}
    return pd.DataFrame([row])


def box(name, *corners):
    return {"image_id": "a", "lesion_type": name} | dict(zip(CORNERS, corners, strict=True))


def test_true_and_predicted_boxes_are_drawn_in_cached_pixels(image):
    truth = pd.DataFrame([box("Osteophytes", 20, 40, 60, 80)])
    found = pd.DataFrame([box("Osteophytes", 30, 40, 60, 80), box("Other lesions", 0, 0, 10, 10)])
    above, below = draw.draw_found(image, truth, found).axes
    drawn = [[(*p.get_xy(), p.get_width(), p.get_height()) for p in ax.patches]
             for ax in (above, below)]  # fmt: skip
    assert drawn == [[(10, 20, 20, 20)], [(15, 20, 15, 20), (0, 0, 5, 5)]]


def test_examples_begin_with_one_of_each_type_and_name_an_empty_row(image):
    same = [box("Osteophytes", 20, 40, 60, 80) for _ in range(4)]
    rows = {
        "found": pd.DataFrame([*same, box("Other lesions", 0, 0, 40, 40)]),
        "missed": pd.DataFrame(same).head(1),
        "false": pd.DataFrame(same).head(0),
    }
    figure = draw.draw_examples(rows, image, pd.DataFrame(same), pd.DataFrame(same))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    spur, other = PAPER_CODES["Osteophytes"], PAPER_CODES["Other lesions"]
    assert titles[:4] == [f"found: {code}" for code in (spur, other, spur, spur)]
    assert titles[4:] == [f"missed: {spur}", "", "", "", "false: none", "", "", ""]


def test_attention_is_drawn_for_each_head_and_their_mean():
    weights = torch.stack([torch.full((3, 2), float(head)) for head in (1, 2, 3, 6)])
    lesion = pd.DataFrame([box("Osteophytes", 20, 40, 60, 80)])
    figure = draw.draw_attention(np.zeros((96, 64), np.uint8), lesion, np.array([40, 60]), weights)
    shown = [ax.images[1].get_array().mean() for ax in figure.axes[1:6]]
    assert shown == pytest.approx([1, 2, 3, 6, 3])


def test_a_virtual_finding_gets_a_box_only_if_it_is_visible():
    _, ax = plt.subplots()
    mask = np.zeros((40, 30), bool)
    mask[10:20, 5:15] = True
    part, change = np.s_[10:20, 5:15], np.zeros((10, 10))
    faint = Counterfactual(LEAST_VISIBILITY - 0.01, mask, part, change)
    for one in (None, faint):
        assert not draw_label(ax, "Osteophytes", one, 0.5)
    assert not ax.patches
    assert draw_label(ax, "Osteophytes", faint._replace(visibility=LEAST_VISIBILITY), 0.5)
    (drawn,) = ax.patches
    assert (*drawn.get_xy(), drawn.get_width()) == (2.0, 7.0, 16.0)  # 1.5 mm around the mask


def test_a_difference_has_a_fixed_scale():
    _, ax = plt.subplots()
    shown = draw_difference(ax, np.full((4, 4), 0.1), "difference")
    assert shown.get_clim() == (-0.6, 0.6) and ax.get_title() == "difference"

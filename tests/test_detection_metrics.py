"""Average precision: by hand, at the edges, and against pycocotools."""

import contextlib
import io
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.imaging.boxes import box_iou
from dernet_utils.metrics.detection import (
    LEAST_BOXES,
    RECALLS,
    SIZES,
    _curves,
    average_precision,
    coco_average_precision,
    detection_table,
    mean_average_precision,
    mean_difference,
    precision_recall,
    size_table,
    supported,
    weighted_areas,
    weighted_average_precision,
)
from dernet_utils.metrics.froc import (
    FALSE_POSITIVES_PER_IMAGE,
    _all_types,
    _found_within,
    found_table,
    froc_curve,
    froc_table,
    type_confusion,
)
from dernet_utils.metrics.intervals import bootstrap
from dernet_utils.metrics.matching import match_boxes, size_stratum
from dernet_utils.metrics.proportions import exact_by_study

TYPES = ("Osteophytes", "Surgical implant", "Vertebral collapse")


def table(rows, scored=False):
    columns = ["image_id", "lesion_type", *CORNERS, *(["score"] if scored else [])]
    return pd.DataFrame(rows, columns=columns)


def random_boxes(rng, ids, most, scored=False, levels=8):
    """Boxes on a coarse grid, so that overlaps and scores tie often."""
    rows = []
    for image_id in ids:
        for _ in range(rng.integers(0, most + 1)):
            x, y = rng.integers(0, 6, 2) * 10
            width, height = rng.integers(1, 4, 2) * 10
            row = [image_id, rng.choice(TYPES), x, y, x + width, y + height]
            rows.append([*row, rng.integers(1, levels + 1) / levels] if scored else row)
    return table(rows, scored)


def by_pycocotools(truth, predictions, lesion_type, ids, ious=(0.5,), areas=(0, 1e10), field_px=1):
    """AP as the reference implementation computes it; areas are fractions of `field_px`."""
    number = {image_id: row + 1 for row, image_id in enumerate(ids)}
    truth, predictions = (t[t["lesion_type"] == lesion_type] for t in (truth, predictions))

    def annotations(boxes):
        for i, box in enumerate(boxes.itertuples()):
            size = [float(box.xmax - box.xmin), float(box.ymax - box.ymin)]
            yield {
                "id": i + 1, "image_id": number[box.image_id], "category_id": 1, "iscrowd": 0,
                "bbox": [float(box.xmin), float(box.ymin), *size],
                "area": size[0] * size[1] / field_px,
                **({"score": box.score} if hasattr(box, "score") else {}),
            }  # fmt: skip

    coco = COCO()
    coco.dataset = {
        "images": [{"id": n} for n in number.values()],
        "categories": [{"id": 1, "name": lesion_type}],
        "annotations": list(annotations(truth)),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        found = COCO()
        found.dataset = coco.dataset | {"annotations": list(annotations(predictions))}
        found.createIndex()
        run = COCOeval(coco, found, "bbox")
        run.params.iouThrs = np.array(ious)
        run.params.areaRng, run.params.areaRngLbl = [list(areas)], ["all"]
        run.params.maxDets = [100]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, 0, 0, 0]
    return np.nan if (precision < 0).any() else precision.mean()


def test_average_precision_by_hand():
    truth = table([["a", TYPES[0], 0, 0, 10, 10], ["b", TYPES[0], 0, 0, 10, 10]])
    predictions = table(
        [
            ["a", TYPES[0], 0, 0, 10, 10, 0.9],  # a true positive: precision 1 up to recall 0.5
            ["a", TYPES[0], 0, 0, 10, 10, 0.8],  # the same box again: a false positive
            ["b", TYPES[0], 0, 0, 10, 8, 0.7],  # a true positive: precision 2/3 up to recall 1
        ],
        scored=True,
    )
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert average_precision(truth, predictions, TYPES[0]) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_pycocotools_with_ties(seed):
    rng = np.random.default_rng(seed)
    ids = [f"{i:02d}" for i in range(9)]
    truth = random_boxes(rng, ids, most=8)
    predictions = random_boxes(rng, ids, most=30, scored=True)
    seen = sorted({*truth["image_id"], *predictions["image_id"]})
    for lesion_type in TYPES:
        expected = by_pycocotools(truth, predictions, lesion_type, seen)
        got = average_precision(truth, predictions, lesion_type)
        assert got == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_equal_to_pycocotools_on_a_crowded_image():
    rng = np.random.default_rng(3)
    truth = random_boxes(rng, ["a"], most=60)
    truth["lesion_type"] = TYPES[0]
    predictions = pd.concat(
        [random_boxes(rng, ["a"], 400, scored=True, levels=1000) for _ in range(2)]
    )
    predictions["lesion_type"] = TYPES[0]
    assert len(predictions) > 100  # more than COCO's limit per image
    expected = by_pycocotools(truth, predictions, TYPES[0], ["a"])
    assert average_precision(truth, predictions, TYPES[0]) == pytest.approx(expected, abs=1e-12)


TEN = np.linspace(0.5, 0.95, 10)


def assert_as_coco(truth, predictions):
    """The library, pycocotools and, at each overlap, our own function agree."""
    mean, each = coco_average_precision(truth, predictions)
    seen = sorted({*truth["image_id"], *predictions["image_id"]})
    types = sorted(truth["lesion_type"].unique())
    assert each.index.tolist() == types and np.allclose(each.columns, TEN)
    for name in types:
        expected = by_pycocotools(truth, predictions, name, seen, TEN)
        assert each.loc[name].mean() == pytest.approx(expected, abs=1e-6)
        own = [average_precision(truth, predictions, name, iou) for iou in TEN]
        assert each.loc[name].tolist() == pytest.approx(own, abs=1e-6)
        expected = by_pycocotools(truth, predictions, name, seen)
        assert each.loc[name, 0.5] == pytest.approx(expected, abs=1e-6)
    assert mean == pytest.approx(each.mean().mean())
    assert each[0.5].mean() == pytest.approx(mean_average_precision(truth, predictions)[0])


@pytest.mark.parametrize("seed", range(12))
def test_ten_overlaps_equal_pycocotools_with_ties_and_empty_images(seed):
    rng = np.random.default_rng(seed)
    ids = [f"{i:02d}" for i in range(9)]
    truth = random_boxes(rng, ids[:6], most=8)
    near = truth.sample(frac=0.7, random_state=seed)
    near = near.assign(score=rng.integers(1, 9, len(near)) / 8)
    near[list(CORNERS)] += rng.integers(-3, 4, (len(near), 4))
    predictions = random_boxes(rng, ids[3:], most=20, scored=True)
    predictions = pd.concat([predictions, near], ignore_index=True)
    assert_as_coco(truth, predictions)
    # A type without a true box is no part of the mean.
    assert_as_coco(truth[truth["lesion_type"] != TYPES[1]], predictions)


def test_ten_overlaps_equal_pycocotools_on_a_crowded_image():
    rng = np.random.default_rng(3)
    truth = random_boxes(rng, ["a", "b"], most=60).assign(lesion_type=TYPES[0])
    predictions = pd.concat([random_boxes(rng, ["a", "b"], 300, scored=True) for _ in range(2)])
    predictions = predictions.assign(lesion_type=TYPES[0])
    assert predictions["image_id"].value_counts().max() > 100  # more than COCO's limit per image
    assert_as_coco(truth, predictions)


def test_ten_overlaps_by_hand():
    truth = table([["a", TYPES[0], 0, 0, 100, 100]])
    found = table([["a", TYPES[0], 0, 0, 100, 72, 0.5]], scored=True)
    mean, each = coco_average_precision(truth, found)
    assert each.loc[TYPES[0]].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]  # up to IoU 0.70
    assert mean == pytest.approx(0.5)
    none, none_found = table([]), table([], scored=True)
    assert coco_average_precision(truth, none_found)[0] == 0
    mean, each = coco_average_precision(none, found)
    assert np.isnan(mean) and each.shape == (0, 10)


# Fractions of an image of 200 × 200 px: random boxes have 0.25 % to 2.25 %, some exactly 1 %.
FILM_PX = 200
STRATA = {True: (0, np.nextafter(0.01, 0)), False: (0.01, 1e10)}  # COCO's ranges hold both ends


def images_of(names):
    return pd.DataFrame({"image_id": names, "height": FILM_PX, "width": FILM_PX})


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_strata_equal_area_ranges_of_pycocotools(seed, small):
    rng = np.random.default_rng(seed)
    ids = [f"{i:02d}" for i in range(9)]
    truth = random_boxes(rng, ids, most=10)
    predictions = random_boxes(rng, ids, most=40, scored=True)
    marked = [size_stratum(boxes, images_of(ids), small) for boxes in (truth, predictions)]
    assert marked[0]["outside"].any() and not marked[0]["outside"].all()
    field = {"areas": STRATA[small], "field_px": FILM_PX**2}
    seen = sorted({*truth["image_id"], *predictions["image_id"]})
    for lesion_type in TYPES:
        expected = by_pycocotools(truth, predictions, lesion_type, seen, **field)
        got = average_precision(*marked, lesion_type)
        assert got == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_stratum_by_hand():
    truth = table([["a", TYPES[0], 0, 0, 10, 10], ["a", TYPES[0], 100, 100, 160, 160]])
    predictions = table(
        [
            ["a", TYPES[0], 100, 100, 160, 160, 0.9],  # finds the large one: ignored among small
            ["a", TYPES[0], 100, 100, 160, 150, 0.8],  # again, itself large: ignored
            ["a", TYPES[0], 40, 40, 50, 50, 0.7],  # small, at no true box: a false positive
            ["a", TYPES[0], 0, 0, 10, 10, 0.6],  # finds the small one
        ],
        scored=True,
    )
    images = images_of(["a"])
    small = [size_stratum(boxes, images, True) for boxes in (truth, predictions)]
    matches = match_boxes(*small, TYPES[0], ["a"])
    assert matches.hit.tolist() == [False, True] and matches.truths.tolist() == [1]
    assert average_precision(*small, TYPES[0]) == pytest.approx(1 / 2)
    large = [size_stratum(boxes, images, False) for boxes in (truth, predictions)]
    matches = match_boxes(*large, TYPES[0], ["a"])
    assert matches.hit.tolist() == [True, False]  # the second is a double, the small ones ignored
    both = size_table(truth, predictions, images.assign(study_id="s"), resamples=10)
    assert both["value"].tolist() == pytest.approx([1 / 2, 1 / 2, 1, 1])
    assert both["boxes"].tolist() == [1, 1, 1, 1]
    assert both.index.get_level_values("size").unique().tolist() == [*SIZES]


def test_a_type_without_a_box_in_a_stratum_is_left_out_of_its_mean():
    truth = table([["a", TYPES[0], 0, 0, 10, 10], ["a", TYPES[1], 0, 0, 90, 90]])
    found = truth.assign(score=0.5)
    images = images_of(["a"]).assign(study_id="s")
    result = size_table(truth, found, images, resamples=5).loc["below 1 %"]
    assert result["boxes"].tolist() == [1, 0, 1]
    assert result["value"].isna().tolist() == [False, True, False]
    assert result.loc["mAP", "value"] == 1 and result.loc[TYPES[1], "undefined"] == 5


def test_one_percent_of_the_field_is_not_below_it():
    boxes = table([["a", TYPES[0], 0, 0, 20, 20], ["a", TYPES[0], 0, 0, 20, 19]])
    assert size_stratum(boxes, images_of(["a"]), small=True)["outside"].tolist() == [True, False]
    assert size_stratum(boxes, images_of(["a"]), small=False)["outside"].tolist() == [False, True]
    assert list(size_stratum(boxes.iloc[:0], images_of(["a"]), True)["outside"]) == []


def test_edges():
    box = [["a", TYPES[0], 0, 0, 10, 10]]
    found = table([["a", TYPES[0], 0, 0, 10, 10, 0.5]], scored=True)
    none, none_found = table([]), table([], scored=True)
    assert average_precision(table(box), none_found, TYPES[0]) == 0
    assert np.isnan(average_precision(none, found, TYPES[0]))
    assert np.isnan(mean_average_precision(none, found)[0])
    assert mean_average_precision(table(box), found)[0] == 1
    # Types with a true box only: a false positive of another type costs nothing in the mean.
    assert list(mean_average_precision(table(box), found)[1].index) == [TYPES[0]]


def test_iou_of_boxes_without_an_area_is_zero():
    assert box_iou([[1, 1, 1, 1]], [[1, 1, 1, 1], [0, 0, 2, 2]]).tolist() == [[0, 0]]


@pytest.mark.slow
@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_weights_equal_images_counted_again(seed):
    """An image drawn twice is two images: the shortcut of the bootstrap changes nothing.

    Scores differ here: the order of equal ones is arbitrary, and with it their precision.
    """
    rng = np.random.default_rng(seed)
    ids = [f"{i}" for i in range(5)]
    truth = random_boxes(rng, ids, most=4)
    predictions = random_boxes(rng, ids, most=6, scored=True)
    predictions["score"] = rng.permutation(len(predictions)) / max(len(predictions), 1)
    counts = rng.integers(0, 3, len(ids))
    repeated = [t.assign(copy=0) for t in (truth, predictions)]
    repeated = [
        pd.concat(
            [
                t[t["image_id"] == image_id].assign(image_id=f"{image_id}-{copy}")
                for image_id, count in zip(ids, counts, strict=True)
                for copy in range(count)
            ]
            or [t.iloc[:0]]
        )
        for t in repeated
    ]
    for name in TYPES:
        weighed = weighted_areas(match_boxes(truth, predictions, name, ids), counts[None] * 1.0)
        assert weighed[0] == pytest.approx(average_precision(*repeated, name), nan_ok=True)


def test_curve_is_what_the_average_is_taken_of():
    rng = np.random.default_rng(0)
    ids = list("abcd")
    truth, predictions = random_boxes(rng, ids, 6), random_boxes(rng, ids, 20, scored=True)
    curve = precision_recall(match_boxes(truth, predictions, TYPES[0], ids))
    assert (curve["precision"].diff().dropna() <= 1e-12).all()
    expected = average_precision(truth, predictions, TYPES[0])
    assert curve["precision"].mean() == pytest.approx(expected)


def test_table_of_intervals_holds_its_values():
    rng = np.random.default_rng(1)
    ids = [f"{i:03d}" for i in range(100)]
    images = pd.DataFrame({"image_id": ids, "study_id": [f"s{i // 2}" for i in range(100)]})
    truth = random_boxes(rng, ids, 5)
    predictions = random_boxes(rng, ids, 50, scored=True, levels=10_000)
    result = detection_table(truth, predictions, images, resamples=1000, seed=42)
    assert list(result.index) == [*TYPES, "mAP"]
    assert (result["low"] < result["high"]).all()
    mean, each = mean_average_precision(truth, predictions)
    assert result.loc["mAP", "value"] == pytest.approx(mean)
    assert result.loc[each.index, "value"].tolist() == pytest.approx(each.tolist())
    assert result["boxes"].tolist()[-1] == len(truth)
    assert (result["n_studies"] == 50).all()
    of_one = weighted_average_precision(truth, predictions, TYPES[0], ids)
    own = bootstrap(of_one, images["study_id"], resamples=1000, seed=42)
    assert vars(own) == pytest.approx(result.drop(columns="boxes").loc[TYPES[0]].to_dict())
    bca = bootstrap(of_one, images["study_id"], resamples=1000, seed=42, method="bca")
    assert bca.value == own.value and bca.low < bca.value < bca.high


def full_size(rng, found_per_image=60):
    """As many images, studies and boxes as VinDr-SpineXR's test split has, 7 types, one common."""
    ids = np.array([f"{i:04d}" for i in range(2078)])
    study = np.concatenate([np.arange(1100), rng.integers(0, 1100, 978)])
    images = pd.DataFrame({"image_id": ids, "study_id": study.astype(str)})

    def boxes(count, among):
        low = rng.uniform(0, (1000, 2300), (count, 2))
        corners = np.hstack([low, low + rng.uniform(40, 250, (count, 2))])
        kinds = rng.choice(LESION_TYPES, count, p=(0.7, 0.09, 0.08, 0.05, 0.04, 0.03, 0.01))
        rows = {"image_id": rng.choice(among, count), "lesion_type": kinds}
        return pd.DataFrame(rows).join(pd.DataFrame(corners, columns=CORNERS))

    truth = boxes(3500, ids[:1039])
    near = truth.sample(frac=0.75, random_state=1)
    near = near.assign(score=rng.beta(1, 2, len(near)))
    near[list(CORNERS)] += rng.normal(0, 12, (len(near), 4))
    astray = boxes(2078 * found_per_image - len(near), ids)
    astray = astray.assign(score=rng.beta(0.5, 6, len(astray)))
    return truth, pd.concat([near, astray]), images


def curves_by_cumulative_sums(matches, weights):
    """What `_curves` returns, by sums over all predictions for every draw: plain, and slow."""
    counts = weights[:, matches.image]
    ranked = counts.cumsum(1)[:, matches.hit]
    found = (counts * matches.hit).cumsum(1)[:, matches.hit]
    precision = np.divide(found, ranked, out=np.zeros_like(found), where=ranked > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.column_stack([best, np.zeros(len(best))])
    truths = (weights @ matches.truths)[:, None]
    recall = np.divide(found, truths, out=np.zeros_like(found), where=truths > 0)
    first = np.stack([row.searchsorted(RECALLS) for row in recall])
    return np.take_along_axis(best, first, axis=1)


@pytest.mark.slow
def test_table_of_the_full_size_is_fast_and_its_curves_are_those_of_plain_sums():
    truth, predictions, images = full_size(np.random.default_rng(0))
    assert len(predictions) == 2078 * 60
    begun = time.process_time()
    detection_table(truth, predictions, images, resamples=1000)
    assert time.process_time() - begun < 20  # 1.5 s where this was written
    ids = list(images["image_id"])
    weights = np.random.default_rng(1).integers(0, 4, (10, len(ids))).astype(float)
    for name in LESION_TYPES:
        matches = match_boxes(truth, predictions, name, ids)
        plain = curves_by_cumulative_sums(matches, weights)
        assert np.abs(_curves(matches, weights) - plain).max() < 1e-12


def test_froc_by_hand():
    images = pd.DataFrame({"image_id": list("abcd"), "study_id": list("stuu")})
    truth = table([["a", TYPES[0], 0, 0, 10, 10], ["b", TYPES[1], 0, 0, 10, 10]])
    predictions = table(
        [
            ["a", TYPES[0], 0, 0, 10, 10, 0.9],  # a true positive
            ["b", TYPES[0], 0, 0, 10, 10, 0.8],  # at the right position, of the wrong type
            ["b", TYPES[1], 0, 0, 10, 10, 0.5],  # a true positive, tied with
            ["c", TYPES[2], 0, 0, 10, 10, 0.5],  # a false positive of a type without a true box
            ["c", TYPES[0], 0, 0, 10, 10, 0.2],  # a false positive below the last true one
        ],
        scored=True,
    )
    curve = froc_curve(truth, predictions, images)
    assert curve["score"].tolist() == [np.inf, 0.9, 0.8, 0.5, 0.2]
    assert curve["false_positives_per_image"].tolist() == [0, 0, 1 / 4, 2 / 4, 3 / 4]
    assert curve["sensitivity"].tolist() == [0, 1 / 2, 1 / 2, 1, 1]
    at = froc_table(truth, predictions, images, resamples=20)
    assert at.index.tolist() == [*FALSE_POSITIVES_PER_IMAGE]
    assert at["value"].tolist() == [1 / 2, 1 / 2, 1, 1, 1, 1, 1]
    assert at["undefined"].nunique() == 1 and at["undefined"].iloc[0] > 0  # draws of study u only


def froc_by_loop(truth, predictions):
    """Every score as a threshold: false and true positives, counted box by box."""
    points = [(0, 0)]
    for threshold in predictions["score"].unique():
        true_positives = false_positives = 0
        accepted = predictions[predictions["score"] >= threshold]
        for (image_id, kind), found in accepted.groupby(["image_id", "lesion_type"]):
            same = (truth["image_id"] == image_id) & (truth["lesion_type"] == kind)
            free = truth.loc[same, [*CORNERS]].to_numpy().tolist()
            for row in found.sort_values("score", ascending=False, kind="stable").itertuples():
                box = [row.xmin, row.ymin, row.xmax, row.ymax]
                overlaps = box_iou([box], np.reshape(free, (-1, 4)))[0].tolist()
                if overlaps and max(overlaps) >= 0.5:
                    free.pop(max(i for i, o in enumerate(overlaps) if o == max(overlaps)))
                    true_positives += 1
                else:
                    false_positives += 1
        points.append((false_positives, true_positives))
    return points


@pytest.mark.parametrize("seed", range(6))
def test_froc_equals_a_loop_on_the_images_and_on_draws_of_them(seed):
    rng = np.random.default_rng(seed)
    ids = [f"{i}" for i in range(6)]
    images = pd.DataFrame({"image_id": ids, "study_id": list("ssttuv")})
    truth, predictions = random_boxes(rng, ids, 5), random_boxes(rng, ids, 12, scored=True)
    sure = truth.sample(frac=0.5, random_state=seed)
    sure = sure.assign(score=rng.integers(1, 9, len(sure)) / 8)
    predictions = pd.concat([predictions, sure], ignore_index=True)
    points = froc_by_loop(truth, predictions)
    at = froc_table(truth, predictions, images, resamples=200)
    curve = froc_curve(truth, predictions, images)
    for rate, row in at.iterrows():
        most = max(true for false, true in points if false <= rate * len(ids))
        assert row["value"] == most / len(truth)
        within = curve[curve["false_positives_per_image"] <= rate]
        assert row["value"] == within["sensitivity"].max()
        assert row["low"] <= row["high"] <= 1
    assert (curve[["false_positives_per_image", "sensitivity"]].diff().dropna() >= 0).all(axis=None)
    # An image that counts twice is two images.
    weights = np.array([0, 2, 1, 3, 1, 2])
    rows = np.repeat(np.arange(6), weights)
    copies = [f"{ids[row]}-{i}" for i, row in enumerate(rows)]
    repeated = [
        pd.concat([t[t["image_id"] == copy[0]].assign(image_id=copy) for copy in copies])
        for t in (truth, predictions)
    ]
    weighed = _found_within(_all_types(truth, predictions, ids, 0.5), weights[None] * 1.0)
    again = _found_within(_all_types(*repeated, copies, 0.5), np.ones((1, len(copies))))
    assert (weighed == again).all() and weighed.any()


def test_edges_of_froc():
    images = pd.DataFrame({"image_id": ["a"], "study_id": ["s"]})
    box, none = table([["a", TYPES[0], 0, 0, 10, 10]]), table([])
    found = table([["a", TYPES[0], 0, 0, 10, 10, 0.5]], scored=True)
    none_found = table([], scored=True)
    assert (froc_table(box, found, images, 5)["value"] == 1).all()
    assert (froc_table(box, none_found, images, 5)["value"] == 0).all()
    assert froc_curve(box, none_found, images)["sensitivity"].tolist() == [0]
    assert froc_table(none, found, images, 5)["value"].isna().all()
    assert froc_curve(none, found, images)["sensitivity"].isna().all()
    assert froc_curve(none, found, images)["false_positives_per_image"].tolist() == [0, 1]
    assert froc_table(none, none_found, images, 5)["value"].isna().all()


def test_confusion_by_hand():
    truth = table(
        [
            ["a", TYPES[0], 0, 0, 10, 10],
            ["a", TYPES[1], 20, 0, 30, 10],
            ["b", TYPES[1], 0, 0, 10, 10],
            ["b", TYPES[0], 0, 0, 10, 10],  # one position, two types
            ["c", TYPES[0], 0, 0, 10, 10],  # nothing is found on this image
        ]
    )
    predictions = table(
        [
            ["a", TYPES[1], 0, 0, 10, 10, 0.8],  # the first box, of the wrong type
            ["a", TYPES[0], 0, 0, 10, 10, 0.7],  # right type, less confident: a false positive
            ["a", TYPES[1], 20, 0, 30, 4, 0.9],  # overlaps too little: a false positive
            ["b", TYPES[1], 0, 0, 10, 10, 0.9],  # of equal overlaps its own type
            ["b", TYPES[0], 0, 0, 10, 10, 0.6],
            ["d", TYPES[2], 0, 0, 10, 10, 0.5],  # at the threshold: accepted
            ["c", TYPES[0], 0, 0, 10, 10, 0.4],  # below it
        ],
        scored=True,
    )
    counts = type_confusion(truth, predictions, threshold=0.5)
    assert counts.index.tolist() == [*TYPES, "no lesion"]
    assert counts.columns.tolist() == [*TYPES, "not found"]
    assert counts.to_numpy().tolist() == [
        [1, 1, 0, 1],
        [0, 1, 0, 1],
        [0, 0, 0, 0],
        [1, 1, 1, 0],
    ]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_confusion_counts_every_box_once(seed):
    rng = np.random.default_rng(seed)
    truth = random_boxes(rng, list("abc"), 5)
    predictions = random_boxes(rng, list("abc"), 12, scored=True)
    counts = type_confusion(truth, predictions, threshold=0.5)
    accepted = predictions[predictions["score"] >= 0.5]
    for name in counts.index[:-1]:
        assert counts.loc[name].sum() == (truth["lesion_type"] == name).sum()
        assert counts[name].sum() == (accepted["lesion_type"] == name).sum()
    # With one type for all, the diagonal counts the true positives of the matching by type.
    one = [t.assign(lesion_type=TYPES[0]) for t in (truth, accepted)]
    matches = match_boxes(*one, TYPES[0], list("abc"))
    alike = type_confusion(*one, threshold=0)
    assert alike.to_numpy().sum() == len(truth) + len(accepted) - matches.hit.sum()


def test_edges_of_confusion():
    box = table([["a", TYPES[0], 0, 0, 10, 10]])
    found = table([["a", TYPES[0], 0, 0, 10, 10, 0.5]], scored=True)
    none, none_found = table([]), table([], scored=True)
    assert type_confusion(box, none_found, 0.5).to_numpy().tolist() == [[0, 1], [0, 0]]
    assert type_confusion(none, found, 0.5).to_numpy().tolist() == [[0, 0], [1, 0]]
    assert type_confusion(box, found, 0.5).to_numpy().tolist() == [[1, 0], [0, 0]]
    assert type_confusion(box, found, 0.6).to_numpy().tolist() == [[0, 1], [0, 0]]
    assert type_confusion(none, none_found, 0.5).to_numpy().tolist() == [[0]]


def test_tables_without_a_true_box_have_no_precision():
    images = pd.DataFrame({"image_id": ["a", "b"], "study_id": ["1", "2"]})
    images = images.assign(height=100, width=100)
    corners = dict(zip(CORNERS, (0.0, 0.0, 1.0, 1.0), strict=True))
    predictions = pd.DataFrame([{"image_id": "a", "lesion_type": "x", **corners, "score": 0.5}])
    truth = predictions.drop(columns="score").head(0)
    table = detection_table(truth, predictions, images, 100)
    assert table.loc["mAP", "boxes"] == 0 and np.isnan(table.loc["mAP", "value"])
    by_size = size_table(truth, predictions, images, resamples=100)
    assert by_size["value"].isna().all() and (by_size["boxes"] == 0).all()
    assert np.isnan(mean_difference(truth, predictions, predictions, images, 100).value)


def test_errors_say_what_to_do():
    truth = table([["a", TYPES[0], 0, 0, 10, 10]])
    found = table([["a", TYPES[0], 0, 0, 10, 10, 0.5]], scored=True)
    with pytest.raises(DernetError, match="score"):
        average_precision(truth, truth, TYPES[0])
    with pytest.raises(DernetError, match="not a number"):
        average_precision(truth, found.assign(score=np.nan), TYPES[0])
    with pytest.raises(DernetError, match="twice"):
        match_boxes(truth, found, TYPES[0], ["a", "a"])
    other = pd.DataFrame({"image_id": ["b"], "study_id": ["s"]})
    with pytest.raises(DernetError, match="not in it"):
        detection_table(truth, found, other)
    with pytest.raises(DernetError, match="not in it"):
        froc_curve(truth, found, other)
    with pytest.raises(DernetError, match="at least one image"):
        froc_curve(truth[:0], found[:0], other[:0])
    with pytest.raises(DernetError, match="score"):
        type_confusion(truth, truth, 0.5)
    with pytest.raises(DernetError, match="score"):
        coco_average_precision(truth, truth)
    with pytest.raises(DernetError, match="not a number"):
        coco_average_precision(truth.assign(xmin=np.nan), found)
    with pytest.raises(DernetError, match="without the column"):
        type_confusion(size_stratum(truth, images_of(["a"]), True), found, 0.5)
    with pytest.raises(DernetError, match="height"):
        size_stratum(truth, other, small=True)
    with pytest.raises(DernetError, match="not listed or have no area"):
        size_stratum(truth, images_of(["b"]), small=True)
    with pytest.raises(DernetError, match="not listed or have no area"):
        size_stratum(truth, images_of(["a"]).assign(height=0), small=True)
    with pytest.raises(DernetError, match="listed twice"):
        size_stratum(truth, images_of(["a", "a"]), small=True)
    with pytest.raises(DernetError, match="both tables"):
        average_precision(size_stratum(truth, images_of(["a"]), True), found, TYPES[0])


def test_difference_of_two_detectors_is_paired():
    rng = np.random.default_rng(4)
    ids = [f"{i:02d}" for i in range(30)]
    images = pd.DataFrame({"image_id": ids, "study_id": [f"s{i // 2}" for i in range(30)]})
    truth = random_boxes(rng, ids, 5)
    first, second = (random_boxes(rng, ids, 20, scored=True) for _ in range(2))
    same = mean_difference(truth, first, first, images, resamples=100)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    there = mean_difference(truth, first, second, images, resamples=100)
    back = mean_difference(truth, second, first, images, resamples=100)
    expected = mean_average_precision(truth, first)[0] - mean_average_precision(truth, second)[0]
    assert there.value == pytest.approx(expected) == -back.value
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert there.n_studies == 15


def test_boxes_found_at_one_false_positive_per_image_by_hand():
    images = pd.DataFrame({"image_id": list("abcd"), "study_id": list("ssuv")})
    rows = [["a", 0], ["a", 20], ["b", 0], ["c", 0], ["d", 0]]
    truth = table([[i, TYPES[0], x, 0, x + 10, 10] for i, x in rows])
    truth = pd.concat([truth, table([["d", TYPES[1], 0, 0, 10, 10]])])
    hits = [["a", 0, 0.9], ["b", 0, 0.8], ["c", 0, 0.6], ["d", 0, 0.2]]
    found = [[i, TYPES[0], x, 0, x + 10, 10, s] for i, x, s in hits]
    # Four false positives, of two types, above 0.5; a fifth at 0.3, so that 0.2 is not reached.
    wrong = [
        ["a", TYPES[2], 0.95],
        ["b", TYPES[2], 0.7],
        ["c", TYPES[0], 0.65],
        ["d", TYPES[2], 0.5],
    ]
    wrong += [["d", TYPES[2], 0.3]]
    found += [[i, name, 50, 50, 60, 60, s] for i, name, s in wrong]
    result = found_table(truth, table(found, scored=True), images)
    assert list(result.index) == [TYPES[0], TYPES[1]]
    assert (result["score"] == 0.5).all()
    first = result.loc[TYPES[0]]
    assert (first["count"], first["total"], first["n_studies"]) == (3, 5, 3)
    own = exact_by_study([True, True, False, True, False], list("sssuv"))
    assert first.drop("score").to_dict() == pytest.approx(vars(own))
    second = result.loc[TYPES[1]]
    assert (second["count"], second["total"], second["low"]) == (0, 1, 0)
    # Twice as many allowed: everything is accepted.
    twice = found_table(truth, table(found, scored=True), images, 2.0)
    assert twice["count"].tolist() == [4, 0] and (twice["score"] == 0.2).all()
    # None allowed: only what lies above the first false positive, which is nothing.
    none = found_table(truth, table(found, scored=True), images, 0.0)
    assert none["count"].tolist() == [0, 0] and np.isinf(none["score"]).all()


@pytest.mark.parametrize("seed", range(5))
def test_boxes_found_of_all_types_are_the_sensitivity_of_the_curve(seed):
    rng = np.random.default_rng(seed)
    ids = [f"{i}" for i in range(12)]
    images = pd.DataFrame({"image_id": ids, "study_id": [f"s{i // 3}" for i in range(12)]})
    truth, predictions = random_boxes(rng, ids, 4), random_boxes(rng, ids, 6, scored=True)
    sure = truth.sample(frac=0.5, random_state=seed)
    predictions = pd.concat([predictions, sure.assign(score=rng.integers(1, 9, len(sure)) / 8)])
    for rate in FALSE_POSITIVES_PER_IMAGE:
        result = found_table(truth, predictions, images, rate)
        at = froc_table(truth, predictions, images, 5).loc[rate, "value"]
        assert result["count"].sum() / len(truth) == pytest.approx(at)
        assert (
            result["total"].tolist() == truth["lesion_type"].value_counts()[result.index].tolist()
        )


def test_edges_of_boxes_found():
    images = pd.DataFrame({"image_id": ["a"], "study_id": ["s"], "height": [99], "width": [99]})
    box, none_found = table([["a", TYPES[0], 0, 0, 10, 10]]), table([], scored=True)
    assert found_table(box, none_found, images)["count"].tolist() == [0]
    empty = found_table(box[:0], none_found, images)
    assert len(empty) == 0 and "low" in empty
    with pytest.raises(DernetError, match="outside"):
        found_table(size_stratum(box, images, True), none_found, images)


def test_average_precision_is_supported_from_the_least_number_of_boxes():
    scores = pd.DataFrame({"boxes": [LEAST_BOXES - 1, LEAST_BOXES, 99]}, ["a", "b", "mAP"])
    assert supported(scores).to_dict() == {"a": False, "b": True, "mAP": False}
    assert supported(scores.loc[["b", "mAP"]]).all()
    assert not supported(scores.loc[["mAP"]]).any()  # a mean of no type
    scores.loc["a", "boxes"] = 0  # as in a size stratum: the mean is over the other types
    assert supported(scores).to_dict() == {"a": False, "b": True, "mAP": True}

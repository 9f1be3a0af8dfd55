"""Phase III of Algorithm 1: score, decision, boxes; and the command `dernet predict`."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from smoke import run_dernet
from torchvision.ops import batched_nms, box_convert

from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES, NETWORKS
from dernet_utils.core.workspace import Workspace
from dernet_utils.dataset.tables import read_dataset
from dernet_utils.imaging import boxes as imaging_boxes
from dernet_utils.imaging.reader import decode_radiograph, read_radiograph
from dernet_utils.inference import pipeline, torch_backend
from dernet_utils.inference.pipeline import NetworkOutput
from dernet_utils.serving import report, service
from dernet_utils.triage.crossvalidation import cross_validate, read_decision
from dernet_utils.triage.ensemble import Decision

pytestmark = pytest.mark.slow

DECISION = Decision(("a", "b"), (0.75, 0.25), (1.0, 1.0), 1.0, {"youden": 0.5}, 10)


def raw_boxes(*boxes):
    """Return a detector's output; each box: centre x and y, width, height, class, probability."""
    raw = np.zeros((11, len(boxes)))
    for anchor, (*size, lesion_class, prob) in enumerate(boxes):
        raw[:4, anchor] = size
        raw[4 + lesion_class, anchor] = prob
    return raw


def toy(a=0.8, b=0.6, boxes=((50, 40, 20, 10, 2, 0.9),)):
    """Return a pipeline of constant functions, and the inputs that its detector gets."""
    inputs = []

    def detector(filled):
        inputs.append(filled)
        return raw_boxes(*boxes)

    made = pipeline.Pipeline(
        {"a": lambda square: NetworkOutput(a), "b": lambda square: NetworkOutput(b)},
        detector, DECISION, LESION_TYPES, 0.1, 32, (96, 64), 96, 2.0, 8,
    )  # fmt: skip
    return made, inputs


def noise(height=192, width=128):
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


def test_an_abnormal_image_gets_its_boxes_in_stored_pixels():
    made, inputs = toy()
    prediction = made.predict(noise())
    assert prediction.score == pytest.approx(0.75 * 0.8 + 0.25 * 0.6) and prediction.abnormal
    assert prediction.network_probs == {"a": 0.8, "b": 0.6}
    assert inputs[0].shape == (96, 64) and inputs[0].dtype == np.uint8
    (box,) = prediction.boxes.itertuples()
    assert box.lesion_type == "Osteophytes" and box.score == 0.9
    # The detector's input is the image at half its size, without a margin.
    assert [box.xmin, box.ymin, box.xmax, box.ymax] == [80, 70, 120, 90]


def test_a_normal_image_has_no_boxes_and_the_detector_is_not_run():
    made, inputs = toy(a=0.4, b=0.5)
    prediction = made.predict(noise())
    assert not prediction.abnormal and not inputs
    assert (
        list(prediction.boxes.columns) == ["lesion_type", *CORNERS, "score"]
        and prediction.boxes.empty
    )
    at_threshold = toy(a=0.5, b=0.5)[0].predict(noise())
    assert not at_threshold.abnormal  # line 17: exceeds


def test_a_detector_that_finds_nothing():
    for boxes in ((), ((50, 40, 20, 10, 2, 0.05),)):
        prediction = toy(boxes=boxes)[0].predict(noise())
        assert prediction.abnormal and prediction.boxes.empty
        record = report.as_record(prediction)
        assert record["decision"] == "abnormal" and record["boxes"] == []
        assert report.draw_prediction(noise(), prediction).shape[1] == 128


def test_the_score_is_the_vote_of_calibrated_networks():
    made, _ = toy(a=0.9, b=0.5)
    decision = replace(DECISION, network_temperatures=(2.0, 0.5), temperature=0.5)
    found = replace(made, decision=decision).predict(noise())
    vote = 0.75 * 0.75 + 0.25 * 0.5  # a's odds of 9 become 3, b's of 1 stay
    assert found.score == pytest.approx(vote**2 / (vote**2 + (1 - vote) ** 2))
    assert found.network_probs == {"a": 0.9, "b": 0.5}  # as the networks give them


def test_networks_and_threshold_are_those_of_the_decision():
    made, _ = toy()
    with pytest.raises(DernetError, match="a, b"):
        replace(made, triage={"b": made.triage["b"], "a": made.triage["a"]})
    with pytest.raises(DernetError, match="youden"):
        replace(made, threshold="f1")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 30), st.integers(1, 30),
                  st.integers(0, 2), st.integers(1, 10**6)),
        max_size=30, unique_by=lambda box: box[5],
    )
)  # fmt: skip
def test_suppression_agrees_with_torchvision(boxes):
    raw = raw_boxes(*[(*box[:5], box[5] / 10**6) for box in boxes])
    corners, classes, scores = imaging_boxes.non_maximum_suppression(raw, 0.3)
    theirs = box_convert(torch.from_numpy(raw[:4].T), "cxcywh", "xyxy")
    prob = torch.from_numpy(raw[4:].T)
    anchors, kinds = (prob >= 0.3).nonzero(as_tuple=True)
    kept = batched_nms(theirs[anchors], prob[anchors, kinds], kinds, imaging_boxes.NMS_IOU)
    assert corners == pytest.approx(theirs[anchors[kept]].numpy())
    assert classes.tolist() == kinds[kept].tolist()
    assert scores == pytest.approx(prob[anchors[kept], kinds[kept]].numpy())


def test_the_number_of_boxes_is_limited():
    many = [(10 * k, 5, 4, 4, 0, 0.9 - k / 1000) for k in range(400)]
    scores = imaging_boxes.non_maximum_suppression(raw_boxes(*many), 0.01)[2]
    assert len(scores) == imaging_boxes.MAX_BOXES


def test_the_pipeline_suppresses_with_the_numpy_function(monkeypatch):
    """The function that is compared with torchvision above; a server needs no torch."""
    assert pipeline.non_maximum_suppression is imaging_boxes.non_maximum_suppression
    thresholds = []

    def suppress(raw, score_threshold):
        thresholds.append(score_threshold)
        return imaging_boxes.non_maximum_suppression(raw, score_threshold)

    monkeypatch.setattr(pipeline, "non_maximum_suppression", suppress)
    near = ((50, 40, 20, 10, 2, 0.9), (51, 40, 20, 10, 2, 0.8), (51, 40, 20, 10, 3, 0.7))
    boxes = toy(boxes=near)[0].predict(noise()).boxes
    assert thresholds == [0.1] and boxes["score"].tolist() == [0.9, 0.7]


def test_an_overlay_shows_the_image_the_boxes_and_the_decision():
    grey = noise(2000, 1500)
    prediction = toy()[0].predict(grey)
    drawn = report.draw_prediction(grey, prediction)
    assert drawn.dtype == np.uint8 and drawn.shape[1] == 960 and drawn.shape[0] > 1280
    coloured = (drawn.max(axis=2).astype(int) - drawn.min(axis=2)) > 60
    assert coloured[:1280].any() and not coloured[1280:].any()
    assert drawn[1280:].max() > 200  # the line of text


@pytest.mark.parametrize("shape", [(300, 200), (600, 2000), (2000, 900)])
def test_an_overlay_states_an_override_in_full(shape):
    grey, reasons = noise(*shape), ["The header says that the modality is CT.", "It is in colour."]
    prediction = toy()[0].predict(grey)
    plain, overridden = (report.draw_prediction(grey, prediction, given) for given in ((), reasons))
    assert overridden.shape[1] == plain.shape[1] and overridden.shape[0] > plain.shape[0]
    below = round(shape[0] * min(1, report.OVERLAY_PX / max(shape)))  # the image's height
    written = (overridden[below:] > 100).any(axis=2)
    assert written.any() and not written[:, -2:].any()  # no line runs off the edge


# --- A run's own networks ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(smoke_book: Path) -> Workspace:
    return Workspace(get_profile("smoke"), smoke_book / "runs" / "smoke")


def test_the_pipeline_agrees_with_the_tables(workspace: Workspace):
    made, images = torch_backend.run_pipeline(workspace), read_dataset(workspace.data_root).images
    tables = {name: cross_validate(workspace, name).test.set_index("image_id") for name in NETWORKS}
    found = pd.read_parquet(workspace.tables / "yolo11l_test_boxes.parquet")
    decision = read_decision(workspace)
    some = images[images["split"] == "test"].head(4)
    made = replace(made, score_threshold=0.0011)
    for one in some.itertuples():
        grey = read_radiograph(one.dicom_path).pixels
        enhanced = made.enhance(grey)
        prediction = made.predict_enhanced(enhanced, grey.shape)
        for name in NETWORKS:
            assert prediction.network_probs[name] == pytest.approx(
                tables[name].loc[one.image_id, "prob"], abs=1e-5
            )
        prob = [[tables[name].loc[one.image_id, "prob"] for name in NETWORKS]]
        assert prediction.score == pytest.approx(decision.prob(np.array(prob))[0], abs=1e-5)
        own = found[(found["image_id"] == one.image_id) & (found["score"] > 0.0012)]
        ours = made.detect(enhanced, grey.shape)
        ours = ours[ours["score"] > 0.0012].head(len(own))
        assert ours["score"].to_numpy() == pytest.approx(own["score"].head(len(ours)), abs=1e-4)


def picture_at(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(cv2.imencode(".png", noise().clip(0, 200) + np.uint8(level))[1].tobytes())
    return path


def test_predictions_of_two_files_of_one_name_are_kept_apart(tmp_path, monkeypatch):
    """Also where both names are given relative to the folder in which one works."""
    pipeline, out = toy()[0], tmp_path / "out"
    first, other = picture_at(tmp_path / "a" / "x.png"), picture_at(tmp_path / "b" / "x.png", 50)
    monkeypatch.chdir(first.parent)
    record = service.predict_file(pipeline, decode_radiograph, Path("x.png"), out)
    for spelling in (Path("x.png"), Path("./x.png"), Path("../a/x.png"), first):
        again = service.predict_file(pipeline, decode_radiograph, spelling, out)
        assert again["sha256"] == record["sha256"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(before) == {"x.png.json", "x.png.overlay.png"}
    monkeypatch.chdir(other.parent)
    for spelling in (Path("x.png"), other):
        with pytest.raises(DernetError, match="another"):
            service.predict_file(pipeline, decode_radiograph, spelling, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff", b'{"file": "x.png"}'])
def test_a_record_that_is_none_is_not_replaced(tmp_path, content):
    path, out = picture_at(tmp_path / "x.png"), tmp_path / "out"
    out.mkdir()
    (out / "x.png.json").write_bytes(content)
    with pytest.raises(DernetError, match="choose another folder"):
        service.predict_file(toy()[0], decode_radiograph, path, out)
    assert [one.name for one in out.iterdir()] == ["x.png.json"]
    assert (out / "x.png.json").read_bytes() == content


@pytest.mark.parametrize("length", [244, 250, 255])
def test_a_name_too_long_for_the_endings_is_refused_and_nothing_is_left(tmp_path, length):
    path = picture_at(tmp_path / ("x" * (length - 4) + ".png"))
    with pytest.raises(DernetError, match="shorter name"):
        service.predict_file(toy()[0], decode_radiograph, path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_name_that_is_not_utf_8(tmp_path):
    path = picture_at(tmp_path / os.fsdecode(b"R\xfccken.png"))
    record = service.predict_file(toy()[0], decode_radiograph, path, tmp_path / "out")
    assert record["file"].endswith(r"R\xfccken.png")
    (saved,) = (tmp_path / "out").glob("*.json")
    assert json.loads(saved.read_text(encoding="utf-8")) == record


def predicted(smoke_book: Path, *arguments: str):
    return run_dernet(
        "predict", "--profile", "smoke", *arguments, DERNET_RUNS=str(smoke_book / "runs")
    )


def test_predict_reads_all_three_forms(smoke_book: Path, workspace: Workspace, tmp_path: Path):
    dicom = Path(read_dataset(workspace.data_root).images["dicom_path"].iloc[0])
    grey = read_radiograph(dicom).pixels
    for name in ("image.png", "image.jpg"):
        cv2.imwrite(str(tmp_path / name), grey)
    files = [str(dicom), str(tmp_path / "image.png"), str(tmp_path / "image.jpg")]
    done = predicted(smoke_book, *files, "--json", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["file"] for record in records] == files
    assert records[0]["score"] == pytest.approx(records[1]["score"], abs=1e-9)
    for path, record in zip(files, records, strict=True):
        name = Path(path).name
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text()) == record
        assert cv2.imread(str(tmp_path / "out" / f"{name}.overlay.png")) is not None
        assert (record["decision"] == "abnormal") == (record["score"] > record["threshold"])
        assert record["decision"] == "abnormal" or record["boxes"] == []


def test_predict_analyses_the_readable_files_and_names_the_others(
    smoke_book: Path, workspace: Workspace, tmp_path: Path
):
    good, second = map(Path, read_dataset(workspace.data_root).images["dicom_path"].head(2))
    bad, other = tmp_path / "notes.png", tmp_path / "b" / "image.dicom"
    bad.write_text("no image")
    other.parent.mkdir()
    shutil.copy(second, other)
    shutil.copy(good, tmp_path / "image.dicom")
    files = [str(bad), str(tmp_path / "image.dicom"), str(other)]
    done = predicted(smoke_book, *files, "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    *lines, last = done.stderr.splitlines()
    failed = [line for line in lines if line.startswith(str(tmp_path))]
    assert [line.partition(": ")[0] for line in failed] == [str(bad), str(other)]
    assert "2 of 3" in last and "Traceback" not in done.stderr
    (line,) = [one for one in done.stdout.splitlines() if not one.startswith(" ")]
    assert line.startswith(files[1])


def test_predict_without_a_run_names_the_remedy(tmp_path: Path):
    done = run_dernet("predict", "x.png", "--profile", "smoke", DERNET_RUNS=str(tmp_path))
    assert done.returncode == 1 and "dernet run --profile smoke" in done.stderr

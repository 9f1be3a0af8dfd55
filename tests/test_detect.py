"""YOLO11-L: the fast forward pass, mosaic decay, resuming, and boxes there and back."""

import json
import random
import socket
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dernet_utils import detect, machine, yolo
from dernet_utils.data import CORNERS, LESION_TYPES
from dernet_utils.detect import Recipe, export_yolo, letterbox, suppress, to_stored
from dernet_utils.errors import DernetError

RECIPE = Recipe(image_px=64, epochs=3, batch=4, lr=1e-3, mosaic_until=2)


@pytest.fixture
def films(tmp_path):
    """Six films of noise with a bright patch in each box; the last two for validation."""
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for number in range(6):
        height, width = 120, 80
        grey = rng.integers(40, 90, (height, width)).astype(np.uint8)
        for _ in range(2):
            x, y = rng.integers(0, 50), rng.integers(0, 90)
            grey[y : y + 20, x : x + 25] = 220
            box = [f"film{number}", LESION_TYPES[number % 7]]
            boxes.append([*box, *(2.0 * edge for edge in (x, y, x + 25, y + 20))])
        path = tmp_path / f"film{number}.png"
        cv2.imwrite(str(path), grey)
        images.append([f"film{number}", str(path), 2 * height, 2 * width])
    images = pd.DataFrame(images, columns=["image_id", "path", "height", "width"])
    return images, pd.DataFrame(boxes, columns=["image_id", "lesion_type", *CORNERS])


def trained(films, tmp_path, recipe=RECIPE, **more):
    images, boxes = films
    folder = tmp_path / "weights"
    return detect.train_detector(images[:4], images[4:], boxes, recipe, folder, **more)


def a_batch(px=64):
    torch.manual_seed(0)
    return {
        "img": torch.rand(4, 3, px, px),
        "batch_idx": torch.tensor([0.0, 1.0, 1.0, 3.0]),
        "cls": torch.tensor([[0.0], [2.0], [6.0], [4.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.4]] * 4),
    }


def a_network():
    network = yolo.build_detector(LESION_TYPES, seed=1).train()
    network.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    return network


def test_network_is_yolo11l():
    network = yolo.build_detector(LESION_TYPES, seed=1)
    assert network.yaml["scale"] == "l"
    assert 25.2e6 < sum(p.numel() for p in network.parameters()) < 25.4e6
    assert network.model[-1].nc == 7
    assert list(network.names.values()) == list(LESION_TYPES)


def test_seed_decides_the_weights_and_leaves_torch_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (
        yolo.build_detector(LESION_TYPES, seed).model[0].conv.weight for seed in (1, 1, 2)
    )
    assert torch.rand(1) == expected
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_bfloat16_forward_gives_the_loss_of_float32(monkeypatch):
    monkeypatch.setattr(machine, "bfloat16_helps", lambda device: True)
    network, batch = a_network(), a_batch()
    assert network.forward(batch["img"])["boxes"].dtype == torch.float32
    fast, terms = network.loss(batch)
    plain = network.loss(batch, network.forward(batch["img"]))[0]
    assert fast.dtype == torch.float32
    assert list(terms) == ["box_loss", "cls_loss", "dfl_loss"]
    assert not torch.equal(fast, plain)  # bfloat16 was at work
    torch.testing.assert_close(fast, plain, rtol=0.03, atol=0.01)


def test_loss_weights_are_those_of_equation_4():
    network, batch = a_network(), a_batch()
    preds = network.raw_predictions(batch["img"])
    ours = network.loss(batch, preds)[0]
    network.args, network.criterion = SimpleNamespace(box=1.0, cls=1.0, dfl=1.0), None
    plain = network.loss(batch, preds)[0]
    torch.testing.assert_close(ours / plain, torch.tensor([7.5, 0.5, 1.5]))


@given(st.integers(20, 400), st.integers(20, 400), st.sampled_from([32, 96, 320]))
def test_boxes_return_from_the_letterbox(height, width, px):
    square, (left, top, fitted_width, fitted_height) = letterbox(
        np.zeros((height, width), np.uint8), px
    )
    assert square.shape == (px, px)
    assert max(fitted_width, fitted_height) == px
    stored = np.array([[0.0, 0.0, 5 * width, 5 * height], [width, height, 2 * width, 3 * height]])
    gain = np.tile([fitted_width / (5 * width), fitted_height / (5 * height)], 2)
    in_square = stored * gain + [left, top, left, top]
    back = to_stored(in_square, (left, top, fitted_width, fitted_height), 5 * height, 5 * width)
    assert back == pytest.approx(stored, abs=1e-6)


def test_boxes_end_at_the_edge_of_the_film():
    outside = np.array([[-50.0, -50.0, 500.0, 500.0]])
    assert to_stored(outside, (10, 0, 44, 64), 640, 440).tolist() == [[0, 0, 440, 640]]


def test_export_is_what_ultralytics_reads(films, tmp_path):
    images, boxes = films
    boxes = boxes[boxes["image_id"] != "film1"]
    folder = export_yolo(images, boxes, 64, tmp_path / "yolo")
    data = {"names": dict(enumerate(LESION_TYPES)), "nc": 7, "channels": 3}
    dataset = yolo.SpineDataset(str(folder), imgsz=64, augment=False, data=data)
    assert len(dataset) == 6
    assert len(dataset.labels[1]["cls"]) == 0  # a film without lesions stays in
    label = dataset.labels[2]
    own = boxes[boxes["image_id"] == "film2"]
    assert [LESION_TYPES[int(c)] for c in label["cls"].ravel()] == own["lesion_type"].tolist()
    centre, size = label["bboxes"][:, :2], label["bboxes"][:, 2:]
    corners = np.hstack([centre - size / 2, centre + size / 2]) * [160, 240, 160, 240]
    assert corners == pytest.approx(own[list(CORNERS)].to_numpy(), abs=1e-3)
    assert dataset[2]["img"].shape == (3, 64, 64)


def test_mosaic_centre_is_that_of_algorithm_1(films, tmp_path):
    folder = export_yolo(*films, 100, tmp_path / "yolo")
    data = {"names": dict(enumerate(LESION_TYPES)), "nc": 7, "channels": 3}
    hyp = yolo.settings_of({"mosaic": 1.0, "copy_paste": 0.2})
    dataset = yolo.SpineDataset(str(folder), imgsz=100, augment=True, hyp=hyp, data=data)
    mosaic = yolo.mosaic_of(dataset.transforms)
    random.seed(0)
    centres = []
    for _ in range(400):
        labels = dataset.get_image_and_label(0)
        labels["mix_labels"] = [dataset.get_image_and_label(i) for i in mosaic.get_indexes()]
        first = mosaic.get_params(labels)["layout"][0]
        centres.append([first["x2a"] / 200, first["y2a"] / 200])  # the canvas is 200 px wide
    low, high = np.min(centres, axis=0), np.max(centres, axis=0)
    assert (low >= 0.3).all() and (low < 0.31).all()
    assert (high <= 0.7).all() and (high > 0.69).all()


def test_views_show_mosaic_until_tau_and_boxes_stay_on_their_patches(films, tmp_path):
    images, boxes = films
    with_mosaic, without = (
        list(detect.training_views(images, boxes, RECIPE, epoch, tmp_path / "yolo"))
        for epoch in (1, 2)
    )
    assert len(with_mosaic) == len(without) == 6
    assert sum(len(b) for _, b in with_mosaic) > sum(len(b) for _, b in without)
    again = list(detect.training_views(images, boxes, RECIPE, 1, tmp_path / "yolo"))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(with_mosaic, again, strict=True))
    for grey, shown in without:
        assert grey.shape == (64, 64)
        for box in shown.itertuples():
            inside = grey[int(box.ymin) : int(box.ymax) + 1, int(box.xmin) : int(box.xmax) + 1]
            assert inside.mean() > 100  # patches are bright, the noise around them is not


def test_suppression_keeps_the_surer_of_two_and_both_types():
    raw = torch.zeros(4 + 7, 4)
    raw[:4] = torch.tensor([[20, 20, 10, 10], [21, 20, 10, 10], [20, 20, 10, 10], [50, 50, 8, 8]]).T
    raw[4, 0], raw[4, 1], raw[5, 2] = 0.6, 0.9, 0.8
    corners, classes, scores = suppress(raw)
    assert classes.tolist() == [0, 1] and scores.tolist() == pytest.approx([0.9, 0.8])
    assert corners.tolist() == [[16, 15, 26, 25], [15, 15, 25, 25]]


def test_training_is_kept_reused_and_leaves_nothing_else(films, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was used"))
    before = {path for path in tmp_path.rglob("*")}
    rows = []
    run = trained(films, tmp_path, progress=rows.append)
    made = {path for path in tmp_path.rglob("*")} - before
    assert made == {tmp_path / "weights", run.checkpoint}
    assert run.history["mosaic"].tolist() == [True, False, False]
    assert run.history["map50"].notna().iloc[-1]
    assert np.isfinite(run.history[["box", "cls", "dfl"]].to_numpy()).all()
    assert json.loads(json.dumps(rows)) == rows and len(rows) == 3
    monkeypatch.setattr(detect, "_train", lambda *_: pytest.fail("trained again"))
    again = trained(films, tmp_path)
    assert again.checkpoint == run.checkpoint
    pd.testing.assert_frame_equal(again.history, run.history)
    images = films[0]
    found = detect.predict_boxes(run.network, images, 64)
    pd.testing.assert_frame_equal(found, detect.predict_boxes(again.network, images, 64))
    assert list(found) == detect.COLUMNS
    assert (found[["xmin", "ymin"]] >= 0).all(axis=None)
    assert (found["xmax"] <= 160).all() and (found["ymax"] <= 240).all()


def test_a_killed_run_goes_on_to_the_same_weights(films, tmp_path):
    whole = trained(films, tmp_path / "whole")

    def kill(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(films, tmp_path / "killed", progress=kill)
    rows = []
    resumed = trained(films, tmp_path / "killed", progress=rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    expected, got = whole.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_anything_that_matters_names_another_run(films, tmp_path):
    images, boxes = films
    key = detect._run_key(images[:4], images[4:], boxes, RECIPE, None)
    moved = boxes.assign(xmin=boxes["xmin"] - 1)
    assert detect._run_key(images[:4], images[4:], moved, RECIPE, None) != key
    other = Recipe(64, 3, 4, 1e-3, 3)
    assert detect._run_key(images[:4], images[4:], boxes, other, None) != key
    shuffled = images[:4].sample(frac=1, random_state=0)
    assert detect._run_key(shuffled, images[4:], boxes[::-1], RECIPE, None) == key


def test_starting_checkpoint_is_read_without_running_its_code(tmp_path):
    network = yolo.DetectionModel("yolo11l.yaml", nc=80, verbose=False)  # COCO's classes
    path = tmp_path / "yolo11l.pt"
    torch.save({"model": network, "ema": None}, path)
    start = yolo.build_detector(LESION_TYPES, seed=4, start=path)
    assert torch.equal(start.model[0].conv.weight, network.model[0].conv.weight)
    (tmp_path / "foreign.pt").write_bytes(b"no checkpoint")
    with pytest.raises(DernetError, match="could not be read"):
        yolo.read_start(tmp_path / "foreign.pt")


def test_a_checkpoint_that_carries_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "yolo11l.pt"
    torch.save({"model": Harm()}, path)
    with pytest.raises(DernetError, match="no layer"):
        yolo.read_start(path)


def test_films_without_boxes_are_refused(films, tmp_path):
    images, boxes = films
    with pytest.raises(DernetError, match="none of these 4"):
        detect.train_detector(images[:4], images[4:], boxes.iloc[:0], RECIPE, tmp_path)


def test_ultralytics_keeps_to_itself():
    from ultralytics.utils import ONLINE, SETTINGS, SETTINGS_FILE

    assert not ONLINE and not SETTINGS["sync"]
    assert SETTINGS_FILE.is_relative_to(yolo.RUNS)
    trainer_events = yolo.MosaicDecay.run_callbacks.__qualname__
    assert trainer_events.startswith("MosaicDecay")  # integrations are never called

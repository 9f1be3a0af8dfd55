"""YOLO11-L: the fast forward pass, mosaic decay, resuming, letterboxed boxes."""

import json
import pickle
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import runs_folder
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.detection import images as detection_images
from dernet_utils.detection import prediction, training, yolo
from dernet_utils.detection.augment import SpineDataset
from dernet_utils.detection.images import DetectorRecipe, export_yolo
from dernet_utils.detection.prediction import suppress_boxes
from dernet_utils.imaging.boxes import from_letterbox, letterbox, to_letterbox

# isort: split
from safetensors.torch import save_file
from scipy.stats import kstest, uniform
from ultralytics.data.augment import Mosaic
from ultralytics.nn.tasks import DetectionModel

pytestmark = pytest.mark.slow

RECIPE = DetectorRecipe(input_size=(64, 64), epochs=3, batch=4, lr=1e-3, mosaic_until=2)
NAMES = dict(enumerate(LESION_TYPES))


def trained(boxed_images, tmp_path, recipe=RECIPE, **more):
    images, boxes = boxed_images
    folder = tmp_path / "weights"
    return training.train_detector(images[:4], images[4:], boxes, recipe, folder, **more)


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


def test_bfloat16_changes_no_more_than_noise_in_the_image_does(monkeypatch):
    """An untrained network in training mode doubles any difference many times over.

    So bfloat16's error is compared with the effect of an equally large error in the image.
    """
    monkeypatch.setattr(machine, "bfloat16_helps", lambda device: True)
    network = a_network()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 96, 96, generator=generator)
    noise = torch.randn(images.shape, generator=generator) / 2**8
    with torch.no_grad():
        exact = network.forward(images)
        noisy = network.forward(images * (1 + noise))
        fast = network.raw_predictions(images)
    for name in ("boxes", "scores"):
        assert fast[name].dtype == torch.float32
        error = (fast[name] - exact[name]).abs().mean()
        assert 0 < error < 1.5 * (noisy[name] - exact[name]).abs().mean()


def test_in_float32_the_loss_is_ultralytics_except_for_the_class_term(monkeypatch):
    monkeypatch.setattr(machine, "bfloat16_helps", lambda device: False)
    network, batch = a_network(), a_batch()
    stock = DetectionModel("yolo11l.yaml", nc=7, verbose=False)
    stock.load_state_dict(network.state_dict())
    stock.args = network.args
    _, ours = network.loss(batch)
    _, theirs = stock.train().loss(batch)
    assert list(ours) == list(theirs) == ["box_loss", "cls_loss", "dfl_loss"]
    for name in ("box_loss", "dfl_loss"):
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=0.01)
    assert float(ours["cls_loss"]) < float(theirs["cls_loss"])
    network.focal, network.criterion = {"gamma": 0, "alpha": 0.5}, None  # half the cross-entropy
    half = network.loss(batch)[1]["cls_loss"]
    assert float(2 * half) == pytest.approx(float(theirs["cls_loss"]), rel=0.01)


def test_predictions_are_ultralytics_own_in_float32(monkeypatch):
    monkeypatch.setattr(machine, "bfloat16_helps", lambda device: True)
    network = a_network().eval()
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = network(images)[0]
        torch.testing.assert_close(network.answers(images), theirs, rtol=1e-4, atol=1e-4)


def test_untrained_boxes_are_small_and_lesions_rare():
    network = a_network()
    preds = network.raw_predictions(torch.rand(2, 3, 96, 96))
    reach = preds["boxes"].unflatten(1, (4, 16)).softmax(2).mul(torch.arange(16.0)[:, None]).sum(2)
    assert 0.5 < float(reach.detach().mean()) < 3
    assert 0.005 < float(preds["scores"].detach().sigmoid().mean()) < 0.05


def test_loss_weights_are_those_of_equation_4():
    network, batch = a_network(), a_batch()
    preds = network.raw_predictions(batch["img"])
    ours = network.loss(batch, preds)[0]
    network.args, network.criterion = SimpleNamespace(box=1.0, cls=1.0, dfl=1.0), None
    plain = network.loss(batch, preds)[0]
    torch.testing.assert_close(ours / plain, torch.tensor([7.5, 0.5, 1.5]))


def test_where_a_finding_is_faint_the_absence_of_its_type_is_not_learnt():
    """Its anchors get no gradient for its type; those outside, and other types, do."""
    network, batch = a_network(), a_batch()
    preds = network.raw_predictions(batch["img"])
    plain, wanted = (
        torch.autograd.grad(loss.sum(), preds["scores"], retain_graph=True)[0]
        for loss in (network.loss(some, preds)[0] for some in (batch, faint_beside(batch)))
    )
    assert plain.ne(0).all()
    types, centres = 7, preds_centres(network, preds)
    inside = ((centres - torch.tensor([0.25, 0.5])).abs() <= torch.tensor([0.2, 0.3])).all(1)
    ignored = torch.zeros(len(batch["img"]), types, len(centres), dtype=torch.bool)
    ignored[1, 3] = inside
    assigned = plain < 0  # pushed up: a lesion is assigned there
    assert (wanted[ignored & ~assigned] == 0).all() and ignored.sum() > 5
    torch.testing.assert_close(wanted[~ignored], plain[~ignored])


def faint_beside(batch: dict) -> dict:
    """Return a batch with a faint finding of type 3 in the second image."""
    more = {"batch_idx": torch.tensor([1.0]), "cls": torch.tensor([[10.0]]),
            "bboxes": torch.tensor([[0.25, 0.5, 0.4, 0.6]])}  # fmt: skip
    return batch | {name: torch.cat([batch[name], value]) for name, value in more.items()}


def preds_centres(network: yolo.Detector, preds: dict) -> torch.Tensor:
    """Return the anchors' positions as fractions of width and height."""
    centres = []
    for one in preds["feats"]:
        rows, columns = one.shape[2:]
        y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5)
                              / columns, indexing="ij")  # fmt: skip
        centres.append(torch.stack([x.flatten(), y.flatten()], 1))
    return torch.cat(centres)


@given(
    st.integers(20, 400), st.integers(20, 400), st.sampled_from([32, 96]), st.sampled_from([32, 64])
)
def test_boxes_return_from_the_letterbox(height, width, rows, columns):
    filled, place = letterbox(np.zeros((height, width), np.uint8), (rows, columns))
    fitted_width, fitted_height = place[2:]
    assert filled.shape == (rows, columns)
    assert fitted_width == columns or fitted_height == rows
    assert fitted_width <= columns and fitted_height <= rows
    stored = np.array([[0.0, 0.0, 5 * width, 5 * height], [width, height, 2 * width, 3 * height]])
    back = from_letterbox(
        to_letterbox(stored, place, 5 * height, 5 * width), place, 5 * height, 5 * width
    )
    assert back == pytest.approx(stored, abs=1e-6)


def test_boxes_end_at_the_edge_of_the_image():
    outside = np.array([[-50.0, -50.0, 500.0, 500.0]])
    assert from_letterbox(outside, (10, 0, 44, 64), 640, 440).tolist() == [[0, 0, 440, 640]]


def test_export_is_what_ultralytics_reads(boxed_images, tmp_path):
    images, boxes = boxed_images
    boxes = boxes[boxes["image_id"] != "image1"]
    folder = export_yolo(images, boxes, (96, 64), tmp_path / "yolo")
    data = {"names": NAMES, "nc": 7, "channels": 3}
    dataset = SpineDataset(str(folder), imgsz=96, augment=False, data=data)
    assert len(dataset) == 6
    assert len(dataset.labels[1]["cls"]) == 0  # an image without lesions stays in
    label = dataset.labels[2]
    own = boxes[boxes["image_id"] == "image2"]
    assert [LESION_TYPES[int(c)] for c in label["cls"].ravel()] == own["lesion_type"].tolist()
    centre, size = label["bboxes"][:, :2], label["bboxes"][:, 2:]
    corners = np.hstack([centre - size / 2, centre + size / 2]) * [64, 96, 64, 96]
    expected = to_letterbox(own[list(CORNERS)].to_numpy(), (0, 0, 64, 96), 240, 160)
    assert corners == pytest.approx(expected, abs=1e-3)


def a_trainer(boxed_images, tmp_path, view=(64, 64), epochs=3, **shown):
    """The trainer of a run, as `train_detector` makes it."""
    recipe = DetectorRecipe(view, epochs, batch=2, lr=1e-3, mosaic_until=2, **shown)
    kept = tmp_path / "run"
    kept.mkdir()
    trainer = yolo.MosaicDecay(detection_images.write_training_set(*boxed_images, recipe, kept))
    trainer.model = yolo.build_detector(LESION_TYPES, 0)
    return trainer


def test_weights_of_equation_4_are_those_that_are_used_and_written_down(boxed_images, tmp_path):
    trainer = a_trainer(boxed_images, tmp_path)
    trainer._setup_train()
    criterion = trainer.model.init_criterion()
    written = yaml.safe_load((tmp_path / "run" / "trainer" / "args.yaml").read_text())
    for name, weight in {"box": 7.5, "cls": 0.5, "dfl": 1.5}.items():
        assert getattr(trainer.model.args, name) == getattr(criterion.hyp, name) == weight
        assert written[name] == weight


@pytest.fixture
def centres(monkeypatch):
    """The centres of the mosaics that are made, as fractions of their canvas."""
    found, original = [], Mosaic.get_params

    def spy(self, labels):
        params = original(self, labels)
        first = params["layout"][0]
        found.append([first["x2a"] / (2 * self.imgsz), first["y2a"] / (2 * self.imgsz)])
        return params

    monkeypatch.setattr(Mosaic, "get_params", spy)
    return found


def test_mosaic_centre_is_that_of_algorithm_1(boxed_images, tmp_path, centres):
    trainer = a_trainer(boxed_images, tmp_path, view=(128, 96))
    trainer._setup_train()
    trainer.epoch = 0
    trainer.begin_epoch()
    for _ in range(120):
        for batch in trainer.train_loader:
            assert batch["img"].shape[1:] == (3, 128, 96)
    x, y = np.array(centres).T
    assert len(x) == 120 * 6
    for centre in (x, y):
        assert 0.3 <= centre.min() < 0.31 and 0.69 < centre.max() <= 0.7
        assert kstest(centre, uniform(0.3, 0.4).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.15


def test_mosaic_stops_at_tau_in_training(boxed_images, tmp_path, centres):
    trainer = a_trainer(boxed_images, tmp_path, epochs=3)
    made = []
    trainer._progress = lambda row: made.append(len(centres))
    trainer.train()
    # tau = 2: the first epoch, of six images, and no other; there is no accumulation of batches.
    assert made == [6, 6, 6]
    assert [row["mosaic"] for row in trainer.history] == [True, False, False]


def test_the_trainer_is_made_anew_in_another_process(boxed_images, tmp_path):
    """As ultralytics does where several GPUs train: from the class's name and its settings."""
    trainer = a_trainer(boxed_images, tmp_path, repeat=True)
    state = tmp_path / "state.pickle"
    state.write_bytes(pickle.dumps((type(trainer), vars(trainer.args))))
    code = (
        "import pickle, sys; kind, settings = pickle.load(open(sys.argv[1], 'rb'));"
        "made = kind(cfg=dict(settings), overrides=settings, _callbacks={});"
        "print(made.mosaic_until, made.data['names'][6], made.data['repeat'], made.args.imgsz)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(state)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[-2] == "2 Other lesions True 64"


def test_mosaic_is_shown_until_tau_and_boxes_stay_on_their_patches(boxed_images, tmp_path):
    images, boxes = boxed_images
    with_mosaic, without = (
        list(detection_images.augmented_images(images, boxes, RECIPE, epoch, tmp_path / "yolo"))
        for epoch in (1, 2)
    )
    assert len(with_mosaic) == len(without) == 6
    assert sum(len(b) for _, b in with_mosaic) > sum(len(b) for _, b in without)
    again = list(detection_images.augmented_images(images, boxes, RECIPE, 1, tmp_path / "yolo"))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(with_mosaic, again, strict=True))
    for grey, shown in without:
        assert grey.shape == (64, 64)
        for box in shown.itertuples():
            inside = grey[int(box.ymin) : int(box.ymax) + 1, int(box.xmin) : int(box.xmax) + 1]
            assert inside.mean() > 100  # patches are bright, the noise around them is not


def test_suppression_keeps_the_higher_score_of_two_and_both_types():
    raw = torch.zeros(4 + 7, 4)
    raw[:4] = torch.tensor([[20, 20, 10, 10], [21, 20, 10, 10], [20, 20, 10, 10], [50, 50, 8, 8]]).T
    raw[4, 0], raw[4, 1], raw[5, 2] = 0.6, 0.9, 0.8
    corners, classes, scores = suppress_boxes(raw)
    assert classes.tolist() == [0, 1] and scores.tolist() == pytest.approx([0.9, 0.8])
    assert corners.tolist() == [[16, 15, 26, 25], [15, 15, 25, 25]]


def test_training_is_kept_reused_and_leaves_nothing_else(boxed_images, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was used"))
    before = {path for path in tmp_path.rglob("*")}
    rows = []
    run = trained(boxed_images, tmp_path, progress=rows.append)
    made = {path for path in tmp_path.rglob("*")} - before
    assert made == {tmp_path / "weights", run.checkpoint, run.at_cut_off}
    assert yolo.build_detector(LESION_TYPES, 0, run.at_cut_off)
    assert run.history["mosaic"].tolist() == [True, False, False]
    assert run.history["map50"].notna().iloc[-1]
    assert np.isfinite(run.history[["box", "cls", "dfl"]].to_numpy()).all()
    assert json.loads(json.dumps(rows)) == rows and len(rows) == 3
    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("trained again"))
    again = trained(boxed_images, tmp_path)
    assert again.checkpoint == run.checkpoint
    pd.testing.assert_frame_equal(again.history, run.history)
    images = boxed_images[0]
    found = prediction.predict_boxes(run.network, images, (64, 64))
    pd.testing.assert_frame_equal(found, prediction.predict_boxes(again.network, images, (64, 64)))
    assert list(found) == prediction.PREDICTION_COLUMNS
    assert (found[["xmin", "ymin"]] >= 0).all(axis=None)
    assert (found["xmax"] <= 160).all() and (found["ymax"] <= 240).all()


def test_a_killed_run_ends_with_the_same_weights(boxed_images, tmp_path):
    whole = trained(boxed_images, tmp_path / "whole")

    def kill(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(boxed_images, tmp_path / "killed", progress=kill)
    rows = []
    resumed = trained(boxed_images, tmp_path / "killed", progress=rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    expected, got = whole.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_any_change_of_a_run_is_another_run(boxed_images, tmp_path):
    images, boxes = boxed_images
    key = training.detector_run_key(images[:4], images[4:], boxes, RECIPE, None)
    moved = boxes.assign(xmin=boxes["xmin"] - 1)
    assert training.detector_run_key(images[:4], images[4:], moved, RECIPE, None) != key
    other = DetectorRecipe((64, 64), 3, 4, 1e-3, 3)
    assert training.detector_run_key(images[:4], images[4:], boxes, other, None) != key
    shuffled = images[:4].sample(frac=1, random_state=0)
    assert training.detector_run_key(shuffled, images[4:], boxes[::-1], RECIPE, None) == key


def test_starting_checkpoint_is_read_without_running_its_code(tmp_path):
    network = yolo.DetectionModel("yolo11l.yaml", nc=80, verbose=False)  # COCO's classes
    path = tmp_path / "yolo11l.pt"
    torch.save({"model": network, "ema": None}, path)
    start = yolo.build_detector(LESION_TYPES, seed=4, start=path)
    assert torch.equal(start.model[0].conv.weight, network.model[0].conv.weight)
    other = yolo.DetectionModel("yolo11n.yaml", nc=80, verbose=False)
    torch.save({"model": other, "ema": None}, tmp_path / "nano.pt")
    with pytest.raises(DernetError, match="another network's"):
        yolo.build_detector(LESION_TYPES, seed=4, start=tmp_path / "nano.pt")
    (tmp_path / "foreign.pt").write_bytes(b"no checkpoint")
    with pytest.raises(DernetError, match="could not be read"):
        yolo.read_start(tmp_path / "foreign.pt")


def test_a_checkpoint_that_carries_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "yolo11l.pt"
    torch.save({"model": Harm()}, path)
    with pytest.raises(DernetError, match="not a layer"):
        yolo.read_start(path)


def test_a_checkpoint_of_other_classes_is_named(tmp_path):
    other = yolo.build_detector(LESION_TYPES[:3], seed=0)
    tensors = {name: value.contiguous() for name, value in other.state_dict().items()}
    save_file(tensors, tmp_path / "other.safetensors", {"history": "[]"})
    with pytest.raises(DernetError, match="3 classes instead of 7"):
        training.load_detector(tmp_path / "other.safetensors")


def test_a_type_without_a_training_box_is_reported(boxed_images, tmp_path):
    images, boxes = boxed_images
    assert detection_images.unseen_types(images[:4], boxes) == list(LESION_TYPES[4:])
    assert detection_images.unseen_types(images, boxes) == [LESION_TYPES[6]]


def test_images_without_boxes_are_refused(boxed_images, tmp_path):
    images, boxes = boxed_images
    with pytest.raises(DernetError, match="none of these 4"):
        training.train_detector(images[:4], images[4:], boxes.iloc[:0], RECIPE, tmp_path)


def test_ultralytics_is_offline_and_calls_no_integration():
    from ultralytics.utils import ONLINE, SETTINGS, SETTINGS_FILE

    assert not ONLINE and not SETTINGS["sync"]
    assert SETTINGS_FILE.is_relative_to(runs_folder())
    trainer_events = yolo.MosaicDecay.run_callbacks.__qualname__
    assert trainer_events.startswith("MosaicDecay")  # integrations are never called

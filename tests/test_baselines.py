"""The baselines: each trains on a batch, predicts in YOLO11's form, and is stored."""

import numpy as np
import pytest
import torch

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import LESION_TYPES
from dernet_utils.detection import baselines, prediction
from dernet_utils.detection import images as detection_images
from dernet_utils.detection.images import DetectorRecipe
from dernet_utils.imaging.boxes import MAX_BOXES

pytestmark = pytest.mark.slow

VIEW = (96, 64)
RECIPE = DetectorRecipe(input_size=VIEW, epochs=1, batch=2, lr=1e-3, mosaic_until=0)


def a_batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "img": torch.rand(2, 3, *VIEW, generator=generator),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "cls": torch.tensor([[0.0], [6.0], [4.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.4]] * 3),
    }


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_each_learns_from_a_batch_and_predicts(name):
    baseline = baselines.build_baseline(name, VIEW, seed=0)
    batch = a_batch()
    first = next(p for p in baseline.network.parameters() if p.requires_grad)
    loss = baseline.loss(batch)
    assert loss.ndim == 0 and torch.isfinite(loss)
    loss.backward()
    assert first.grad is not None and torch.isfinite(first.grad).all() and first.grad.any()
    baseline.network.eval()
    with torch.no_grad():
        outputs = list(baseline.raw(batch["img"]))
    assert len(outputs) == 2
    for output in outputs:
        assert output.shape[0] == 4 + len(LESION_TYPES) and output.dtype == torch.float32
        assert ((output[4:] >= 0) & (output[4:] <= 1)).all()
        corners, classes, scores = prediction.suppress_boxes(output)
        assert len(corners) == len(classes) == len(scores) <= MAX_BOXES
        assert corners.isfinite().all() and (scores.diff() <= 0).all()


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_predictions_do_not_depend_on_bfloat16(name, monkeypatch):
    """bfloat16 makes scores equal; average precision depends on their order."""
    baseline = baselines.build_baseline(name, VIEW, seed=0)
    baseline.network.eval()
    outputs = []
    for able in (True, False):
        monkeypatch.setattr(machine, "bfloat16_helps", lambda device, able=able: able)
        with torch.no_grad():
            outputs.append(list(baseline.raw(a_batch()["img"])))
    for fast, exact in zip(*outputs, strict=True):
        assert torch.equal(fast, exact)


def test_parameters_are_those_of_the_published_networks():
    names = ("YOLO11-n", "YOLO11-s", "YOLO11-L", "Faster R-CNN", "RetinaNet", "RT-DETR-L")
    millions = [
        baselines._millions(baselines.build_baseline(name, VIEW, 0).network) for name in names
    ]
    # With seven types instead of 80 or 91, the last layers are a little smaller.
    published = [2.6, 9.4, 25.3, 41.5, 33.8, 32.9]
    assert millions == pytest.approx(published, rel=0.06)


def test_a_run_is_kept_and_another_time_is_another_run(boxed_images, tmp_path):
    images, boxes = boxed_images
    kept_in = tmp_path / "kept"
    kept_in.mkdir()
    given = ("YOLO11-n", images[:4], boxes, images[4:], RECIPE)
    run = baselines.run_baseline(*given, 0.5, kept_in)
    assert run.parameters == pytest.approx(2.6, abs=0.1)
    assert list(run.found) == prediction.PREDICTION_COLUMNS
    assert set(run.found["image_id"]) <= set(images[4:]["image_id"])
    (kept,) = kept_in.iterdir()  # one table, and nothing else
    before = kept.stat().st_mtime_ns
    again = baselines.run_baseline(*given, 0.5, kept_in)
    assert again.steps == run.steps and again.found.equals(run.found)
    assert kept.stat().st_mtime_ns == before
    baselines.run_baseline(*given, 0.25, kept_in)
    assert len(list(kept_in.iterdir())) == 2


def test_training_ends_after_its_time_and_the_rate_falls(boxed_images, tmp_path, monkeypatch):
    images, boxes = boxed_images
    clock = iter(np.arange(0, 100, 0.5))
    monkeypatch.setattr(baselines.time, "monotonic", lambda: next(clock))
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *given, **named):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(baselines, "WARM_STEPS", 1)
    baseline = baselines.build_baseline("YOLO11-n", VIEW, 0)
    shown = detection_images.augmented_dataset(images, boxes, RECIPE, tmp_path / "shown")
    steps = baselines.train_baseline(baseline, shown, 2, 1e-3, 4.0, seed=0)
    assert steps == len(rates) == 7  # half a second per step, the first at half a second
    assert (np.diff(rates) < 0).all()
    spent = np.arange(1, 8) * 0.5 / 4
    assert rates == pytest.approx(1e-3 * (1 + np.cos(np.pi * spent)) / 2)


def test_an_unknown_name_is_refused():
    with pytest.raises(DernetError, match="YOLO11-n, YOLO11-s"):
        baselines.build_baseline("DINO", VIEW, 0)

"""YOLO11-L in ultralytics' own trainer, with what this book changes in it.

Four changes, each small enough to read: the forward pass (channels last, bfloat16 where that is
faster), the mosaic (its centre, and the epoch at which it stops), seeds that make an epoch depend
on nothing but the epochs before it, and checkpoints without pickled code. ultralytics' ways to
the network are closed before its import.
"""

import importlib
import os
import random
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from dernet_utils import machine
from dernet_utils.errors import DernetError
from dernet_utils.losses import Assigned
from dernet_utils.workspace import PROJECT

# Read by ultralytics while it is imported: no question to the network, settings among the runs,
# no chatter, and not its own default of one thread.
os.environ["YOLO_OFFLINE"] = "1"
RUNS = Path(os.environ.get("DERNET_RUNS") or PROJECT / "runs").resolve()
os.environ["YOLO_CONFIG_DIR"] = str(RUNS / ".ultralytics")
os.environ["YOLO_VERBOSE"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

from ultralytics.cfg import get_cfg  # noqa: E402
from ultralytics.data.augment import Mosaic  # noqa: E402
from ultralytics.data.dataset import YOLODataset  # noqa: E402
from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402
from ultralytics.nn.tasks import DetectionModel  # noqa: E402
from ultralytics.utils import SETTINGS  # noqa: E402
from ultralytics.utils.tal import make_anchors  # noqa: E402
from ultralytics.utils.torch_utils import intersect_dicts  # noqa: E402

if SETTINGS["sync"]:
    SETTINGS.update(sync=False)

CENTRE = (0.3, 0.7)  # paper, Algorithm 1, line 10: the mosaic's centre as a fraction of its width


class Detector(DetectionModel):
    """YOLO11-L whose forward pass may run in bfloat16 while its loss stays in float32."""

    def loss(self, batch: dict, preds: dict | None = None) -> tuple[torch.Tensor, dict]:
        """Return Eq. 4's three terms times the batch size, and the terms by name.

        Args:
            batch: ``img`` of shape (B, 3, H, W) in [0, 1], with ``batch_idx``, ``cls``, ``bboxes``.
            preds: Raw predictions where they are known already.
        """
        if getattr(self, "criterion", None) is None:
            self.criterion = self.init_criterion()
        if preds is None:
            preds = self.raw_predictions(batch["img"])
        return self.criterion(preds, batch)

    def raw_predictions(self, images: torch.Tensor) -> dict:
        """Return the heads' outputs in float32 for images (B, 3, H, W) in [0, 1]."""
        images = images.contiguous(memory_format=torch.channels_last)
        able = machine.bfloat16_helps(images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=able):
            preds = self.forward(images)
        return {name: _float32(value) for name, value in preds.items()}

    def assigned(self, batch: dict) -> Assigned:
        """Return what every anchor says of a batch, and what the assigner wants of it.

        Args:
            batch: As `loss` takes it.
        """
        preds, criterion = self.raw_predictions(batch["img"]), self.init_criterion()
        anchors, stride = make_anchors(preds["feats"], criterion.stride, 0.5)
        films, _, height, width = batch["img"].shape
        targets = torch.cat(
            [batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]], dim=1
        )
        sides = torch.tensor([width, height, width, height], device=targets.device)
        labels, boxes = criterion.preprocess(targets, films, sides).split((1, 4), dim=2)
        logits, edges = (preds[name].transpose(1, 2) for name in ("scores", "boxes"))
        _, box_target, class_target, lesion, _ = criterion.assigner(
            logits.detach().sigmoid(),
            criterion.bbox_decode(anchors, edges.detach().contiguous()) * stride,
            anchors * stride, labels, boxes, boxes.sum(2, keepdim=True) > 0,
        )  # fmt: skip
        return Assigned(
            logits.flatten(0, 1),
            edges.unflatten(2, (4, -1)).flatten(0, 1),
            anchors.repeat(films, 1),
            class_target.flatten(0, 1),
            (box_target / stride).flatten(0, 1),
            lesion.flatten().bool(),
        )


def _float32(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    return [v.float() for v in value] if isinstance(value, list) else value.float()


def build_detector(classes: tuple[str, ...], seed: int, start: Path | None = None) -> Detector:
    """Return YOLO11-L for these classes.

    Args:
        classes: Names in the order of the labels.
        seed: Seed of the random weights.
        start: A checkpoint whose fitting tensors replace random ones: ``.safetensors``, or
            ultralytics' ``.pt``; None for random weights throughout.

    Raises:
        DernetError: `start` cannot be read without running code that it carries.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Detector("yolo11l.yaml", nc=len(classes), verbose=False)
    model.names = dict(enumerate(classes))
    model.args = settings_of({"box": 7.5, "cls": 0.5, "dfl": 1.5})  # paper, Eq. 4
    if start is not None:
        model.load_state_dict(intersect_dicts(read_start(start), model.state_dict()), strict=False)
    return model.to(memory_format=torch.channels_last)


def read_start(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint without running code that it carries.

    Raises:
        DernetError: The file is missing, or needs more than ultralytics' and torch's layers.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([_layer(name) for name in needed]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = checkpoint.get("ema") or checkpoint["model"]
        return {name: value.float() for name, value in model.state_dict().items()}
    except Exception as error:  # every way in which a foreign file can be wrong
        raise DernetError(
            f"The checkpoint {path} should be YOLO11-L's tensors (.safetensors) or ultralytics' "
            f"own .pt, and could not be read ({error}): download it again or take it away."
        ) from error


def _layer(name: str) -> type:
    """The class of that name, where it is a network's layer or ultralytics' bag of settings."""
    module, _, attribute = name.rpartition(".")
    harmless = module.startswith(("ultralytics.nn.", "torch.nn.modules."))
    if harmless or name == "ultralytics.utils.IterableSimpleNamespace":
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, type):
            return found
    raise DernetError(f"it asks for {name}, which is no layer of a network")


class SpineDataset(YOLODataset):
    """ultralytics' dataset with the paper's mosaic."""

    def build_transforms(self, hyp: SimpleNamespace | None = None):
        """Return the augmentations, with the mosaic's centre and neighbours as the paper has them.

        ultralytics draws the centre from the middle half of the canvas, and the three other
        films from the last few it has read; here the centre is Algorithm 1's and any film serves.
        """
        transforms = super().build_transforms(hyp)
        if self.augment:
            mosaic = mosaic_of(transforms)
            margin = -round(2 * self.imgsz * CENTRE[0])  # the canvas is 2 x 2 images wide
            mosaic.border = (margin, margin)
            mosaic.buffer_enabled = False
        return transforms

    def set_mosaic(self, hyp: SimpleNamespace, on: bool) -> None:
        """Rebuild the augmentations with or without mosaic (Algorithm 1, lines 9 to 13)."""
        hyp = copy(hyp)
        hyp.mosaic = float(on)
        self.transforms = self.build_transforms(hyp)


def mosaic_of(transforms) -> Mosaic:
    """Return the mosaic among ultralytics' augmentations."""
    (mosaic,) = (t for t in transforms.transforms[0].transforms if isinstance(t, Mosaic))
    return mosaic


def seed_augmentations(seed: int) -> None:
    """Seed the two generators that ultralytics' augmentations draw from, which are global."""
    random.seed(seed)
    np.random.seed(seed)


def settings_of(overrides: dict) -> SimpleNamespace:
    """Return ultralytics' settings, its defaults filled in."""
    return get_cfg(overrides=overrides)


class MosaicDecay(DetectionTrainer):
    """ultralytics' trainer with Algorithm 1, lines 8 to 15, and safe, exact checkpoints.

    Args:
        model: The network with its starting weights.
        overrides: ultralytics' settings by name.
        mosaic_until: tau of Algorithm 1: epochs t < tau, counted from 1, are with mosaic.
        data: What ultralytics reads from a data file: ``train``, ``val``, ``names``, ``nc``.
        look: Called with (epoch from 1, smoothed network) after each epoch; returns numbers that
            join the epoch's losses in `history`.
        progress: Called with each epoch's row of `history`, those of a resumed run included.
    """

    def __init__(
        self,
        model: Detector,
        overrides: dict,
        mosaic_until: int,
        data: dict,
        look: Callable[[int, nn.Module], dict],
        progress: Callable[[dict], None],
    ):
        self._data, self._look, self._progress = data, look, progress
        self.mosaic_until = mosaic_until
        self.history: list[dict] = []
        threads = torch.get_num_threads()
        super().__init__(overrides=overrides)
        torch.set_num_threads(threads)  # ultralytics leaves one core idle, of two that is half
        self.model = model
        self.state_file = self.save_dir / "state.pt"

    # What ultralytics would look for elsewhere, or write, or send.

    def get_dataset(self) -> dict:
        """Return the data that was passed, in place of reading (or downloading) them."""
        return self._data

    def run_callbacks(self, event: str) -> None:
        """Run no integration; begin each epoch as Algorithm 1 says."""
        if event == "on_train_epoch_start":
            self.begin_epoch()

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None):
        """Return the films of a folder with the paper's augmentations."""
        return SpineDataset(
            img_path, imgsz=self.args.imgsz, batch_size=batch, augment=mode == "train",
            hyp=self.args, stride=32, data=self.data, task="detect", prefix="",
        )  # fmt: skip

    def validate(self) -> tuple[dict, float]:
        """Leave validation to `look`: ultralytics' metrics are not this book's."""
        return {}, 0.0

    def final_eval(self) -> None:
        """Leave the last evaluation to `dernet_utils.detection_metrics`."""

    def save_metrics(self, metrics: dict) -> None:
        """Add the epoch to the history: its losses, its seconds, and what `look` sees."""
        row = {"epoch": self.epoch + 1, "mosaic": self.with_mosaic}
        row |= {name.removesuffix("_loss"): float(value) for name, value in self.tloss.items()}
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": time.time() - self.begun}
        row |= self._look(self.epoch + 1, self.ema.ema)
        self.history.append(row)
        self._progress(row)

    # Algorithm 1.

    @property
    def with_mosaic(self) -> bool:
        """Whether the current epoch is one with mosaic (Algorithm 1, line 9)."""
        return self.epoch + 1 < self.mosaic_until

    def begin_epoch(self) -> None:
        """Set mosaic on or off, and seed: an epoch depends on the weights and its number only."""
        self.train_loader.dataset.set_mosaic(self.args, self.with_mosaic)
        self.begun = time.time()
        seed = self.args.seed * 1000 + self.epoch
        seed_augmentations(seed)
        torch.manual_seed(seed)
        self.train_loader.generator.manual_seed(seed)
        self.train_loader.reset()

    # Checkpoints: tensors and numbers only, complete or absent.

    def save_model(self) -> bool:
        """Write all that the next epoch needs."""
        state = {
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
        }
        half_written = self.state_file.with_suffix(".tmp")
        torch.save(state, half_written)
        half_written.replace(self.state_file)
        return True

    def resume_training(self, ckpt: dict | None) -> None:
        """Go on after the last finished epoch, where there is one."""
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.start_epoch = state["history"], state["epoch"] + 1
        for row in self.history:
            self._progress(row)

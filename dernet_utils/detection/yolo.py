"""YOLO11-L in ultralytics' own trainer, with this book's changes.

Five small changes: the forward pass (channels last, bfloat16 where that is faster); the class term
(Eq. 6); the initialisation of a network without weights; the epoch at which mosaic stops, with
seeds that make an epoch depend only on the epochs before it; and checkpoints without pickled code.
"""

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import write_whole
from dernet_utils.detection.augment import SpineDataset, seed_augmentations
from dernet_utils.detection.losses import ALPHA, GAMMA, Assigned, focal_loss

# isort: split
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import RANK
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.tal import make_anchors
from ultralytics.utils.torch_utils import intersect_dicts, unwrap_model

PRIOR = 0.01  # untrained probability of a lesion (Lin et al., 2017, section 4.1)
REACH = 1  # strides to an untrained box's edges; ours, of the order of a lesion's size
FALL = 0.7  # of a distance's logit per stride from there: each is half as probable
CLASS_BIAS = "model.23.cv3.0.2.bias"  # its length is the number of classes
LEAST_FIT = 0.9  # of a starting checkpoint's tensors; the class layers may have other classes


class Detector(DetectionModel):
    """YOLO11 whose forward pass may run in bfloat16 while its loss stays in float32.

    Attributes:
        focal: Eq. 6's exponent and class weight, ``gamma`` and ``alpha``; the paper's by default.
    """

    focal: Mapping[str, float] = MappingProxyType({"gamma": GAMMA, "alpha": ALPHA})

    def loss(self, batch: dict, preds: dict | None = None) -> tuple[torch.Tensor, dict]:
        """Return the three terms of Eq. 4 times the batch size, and the terms by name.

        Args:
            batch: ``img`` of shape (B, 3, H, W) in [0, 1], with ``batch_idx``, ``cls``, ``bboxes``.
                A class from the number of types on marks a box of the type that many below in
                which a prediction is ignored: no anchor inside learns that the type is absent.
            preds: Raw predictions, if they have been computed already.
        """
        if getattr(self, "criterion", None) is None:
            self.criterion = self.init_criterion()
        if preds is None:
            preds = self.raw_predictions(batch["img"])
        labelled, faint = self._split(batch)
        ignored = self._inside(faint, preds["feats"]) if len(faint["cls"]) else None
        self.criterion.bce = partial(self._class_term, ignored=ignored)
        return self.criterion(preds, labelled)

    def _split(self, batch: dict) -> tuple[dict, dict]:
        """Return a batch with its labelled boxes alone, and with those to ignore alone."""
        labelled = batch["cls"].view(-1) < self.model[-1].nc
        return tuple(
            batch | {name: batch[name][rows] for name in ("batch_idx", "cls", "bboxes")}
            for rows in (labelled, ~labelled)
        )

    def _inside(self, faint: dict, maps: list[torch.Tensor]) -> torch.Tensor:
        """Return which anchors lie in a faint finding, by its type: bool (B, anchors, types)."""
        anchors, stride = make_anchors(maps, self.stride, 0.5)
        images, _, height, width = faint["img"].shape
        types = self.model[-1].nc
        inside = torch.zeros(images, len(anchors), types, dtype=torch.bool, device=anchors.device)
        middle = (anchors * stride) / torch.tensor([width, height], device=anchors.device)
        for image, number, box in zip(
            faint["batch_idx"].long(), faint["cls"].view(-1).long(), faint["bboxes"], strict=True
        ):
            inside[image, :, number - types] |= ((middle - box[:2]).abs() <= box[2:] / 2).all(1)
        return inside

    def _class_term(
        self, logits: torch.Tensor, target: torch.Tensor, ignored: torch.Tensor | None
    ) -> torch.Tensor:
        """Return Eq. 6 for each anchor and type; 0 where absence is to be ignored."""
        loss = focal_loss(logits, target, **self.focal)
        return loss if ignored is None else loss.masked_fill(ignored & (target == 0), 0.0)

    def raw_predictions(self, images: torch.Tensor) -> dict:
        """Return the heads' outputs in float32 for images (B, 3, H, W) in [0, 1].

        In training mode they may be computed in bfloat16.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        if self.training:
            return machine.in_bfloat16(self.forward, images.device, images)
        return self.forward(images)[1]

    def answers(self, images: torch.Tensor) -> torch.Tensor:
        """Return each anchor's prediction: a box, and a probability per lesion type.

        Decoded as in ultralytics, with one tensor for all feature maps.

        Args:
            images: Shape (B, 3, H, W), in [0, 1].

        Returns:
            Shape (B, 4 + C, anchors): centre, width and height in pixels, then probabilities.
        """
        preds = self.raw_predictions(images)
        anchors, stride = (t.T for t in make_anchors(preds["feats"], self.stride, 0.5))
        prob = preds["boxes"].unflatten(1, (4, -1)).softmax(2)
        distance = torch.einsum("bedn,d->ben", prob, torch.arange(prob.shape[2]).to(prob))
        low, high = anchors - distance[:, :2], anchors + distance[:, 2:]
        boxes = torch.cat([(low + high) / 2, high - low], dim=1) * stride
        return torch.cat([boxes, preds["scores"].sigmoid()], dim=1)

    def init_criterion(self) -> v8DetectionLoss:
        """Return ultralytics' loss with Eq. 6 as its class term instead of binary cross-entropy."""
        criterion = v8DetectionLoss(self)
        criterion.bce = partial(self._class_term, ignored=None)
        return criterion

    def assigned(self, batch: dict) -> Assigned:
        """Return every anchor's output for a batch, and its targets from the assigner.

        Args:
            batch: As `loss` takes it.
        """
        batch, _ = self._split(batch)
        preds, criterion = self.raw_predictions(batch["img"]), self.init_criterion()
        anchors, stride = make_anchors(preds["feats"], criterion.stride, 0.5)
        images, _, height, width = batch["img"].shape
        targets = torch.cat(
            [batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]], dim=1
        )
        sides = torch.tensor([width, height, width, height], device=targets.device)
        labels, boxes = criterion.preprocess(targets, images, sides).split((1, 4), dim=2)
        logits, edges = (preds[name].transpose(1, 2) for name in ("scores", "boxes"))
        _, box_target, class_target, lesion, _ = criterion.assigner(
            logits.detach().sigmoid(),
            criterion.bbox_decode(anchors, edges.detach().contiguous()) * stride,
            anchors * stride, labels, boxes, boxes.sum(2, keepdim=True) > 0,
        )  # fmt: skip
        return Assigned(
            logits.flatten(0, 1),
            edges.unflatten(2, (4, -1)).flatten(0, 1),
            anchors.repeat(images, 1),
            class_target.flatten(0, 1),
            (box_target / stride).flatten(0, 1),
            lesion.flatten().bool(),
        )


def build_detector(
    classes: tuple[str, ...], seed: int, start: Path | None = None, scale: str = "l"
) -> Detector:
    """Return YOLO11 for these classes.

    Args:
        classes: Names in the order of their numbers.
        seed: Seed of the random weights.
        start: A checkpoint whose fitting tensors replace random ones: ``.safetensors`` or
            ultralytics' ``.pt``; None for random weights only.
        scale: ultralytics' letter for the network's size; l in the paper.

    Raises:
        DernetError: `start` is of another network, or cannot be read without running code in it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Detector(f"yolo11{scale}.yaml", nc=len(classes), verbose=False)
    model.names = dict(enumerate(classes))
    model.args = settings_of({"box": 7.5, "cls": 0.5, "dfl": 1.5})  # paper, Eq. 4
    begin_small(model)
    if start is not None:
        tensors = read_start(start)
        fitting = intersect_dicts(tensors, model.state_dict())
        if len(fitting) < LEAST_FIT * len(tensors):
            raise DernetError(
                f"The checkpoint {start} should be YOLO11-L's, but only {len(fitting)} of its "
                f"{len(tensors)} tensors fit: it is another network's."
            )
        model.load_state_dict(fitting, strict=False)
    return model.to(memory_format=torch.channels_last)


def begin_small(model: Detector) -> None:
    """Set the last biases so that untrained boxes are small and lesions rare.

    In ultralytics, untrained edges lie 7.5 strides away: such a box hardly overlaps a lesion, its
    soft target is nearly zero, and the box terms train slowly at first. The untrained probabilities
    there are chosen for images of 640 px.

    Args:
        model: Changed in place.
    """
    head = model.model[-1]
    distance = torch.arange(head.reg_max)
    with torch.no_grad():
        for edges, classes in zip(head.cv2, head.cv3, strict=True):
            edges[-1].bias.view(4, -1)[:] = -FALL * (distance - REACH).abs()
            classes[-1].bias.fill_(math.log(PRIOR / (1 - PRIOR)))


def read_start(path: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors, by name, without running code in it.

    Args:
        path: ``.safetensors``, or ultralytics' ``.pt``.

    Raises:
        DernetError: The file is missing or damaged, or needs more than ultralytics' and torch's
            layers.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([_layer(name) for name in needed]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = checkpoint.get("ema") or checkpoint["model"]
        return {name: value.float() for name, value in model.state_dict().items()}
    except Exception as error:  # a foreign file can be wrong in many ways
        raise DernetError(
            f"The checkpoint {path} should be YOLO11-L's tensors (.safetensors) or ultralytics' "
            f"own .pt, but could not be read ({error}): download it again or remove it."
        ) from error


def _layer(name: str) -> type:
    """Return the class of that name if it is a layer of a network or ultralytics' settings."""
    module, _, attribute = name.rpartition(".")
    harmless = module.startswith(("ultralytics.nn.", "torch.nn.modules."))
    if harmless or name == "ultralytics.utils.IterableSimpleNamespace":
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, type):
            return found
    raise DernetError(f"it needs {name}, which is not a layer of a network")


def settings_of(overrides: dict) -> SimpleNamespace:
    """Return ultralytics' settings: its defaults with these overrides."""
    return get_cfg(overrides=overrides)


def write_run(
    folder: Path,
    images: Path,
    classes: tuple[str, ...],
    mosaic_until: int,
    **shown: tuple[int, int] | bool,
) -> Path:
    """Write the file from which `MosaicDecay` reads a run's images and augmentations.

    Args:
        folder: Where the run stores its files.
        images: Folder of images, with labels beside it.
        classes: Names in the order of their numbers.
        mosaic_until: tau of Algorithm 1: epochs t < tau, counted from 1, use mosaic.
        shown: As `SpineDataset` takes it: ``view``, ``repeat``, ``paste``.

    Returns:
        The file.
    """
    path, where = folder / "run.json", str(images)
    run = {"train": where, "val": where, "names": classes, "nc": len(classes), "channels": 3}
    run |= {"mosaic_until": mosaic_until, **shown}
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


class MosaicDecay(DetectionTrainer):
    """ultralytics' trainer with Algorithm 1, lines 8 to 15, and safe, exact checkpoints.

    It is built from settings and files alone, because ultralytics builds one in each process when
    several GPUs train: the file of `write_run`, and a folder for checkpoints beside it.

    Args:
        overrides: ultralytics' settings by name; ``data`` is the file that `write_run` wrote.
        evaluate: Called with (epoch from 1, smoothed network) after each epoch; returns numbers to
            add to the epoch's losses in `history`.
        progress: Called with each epoch's row of `history`, those of a resumed run included.
        cfg, _callbacks: ultralytics' defaults, as it passes them; integrations are never called.
    """

    def __init__(
        self,
        overrides: dict,
        evaluate: Callable[[int, nn.Module], dict] = lambda epoch, network: {},
        progress: Callable[[dict], None] = lambda row: None,
        cfg: dict | None = None,
        _callbacks: dict | None = None,
    ):
        self._evaluate, self._progress = evaluate, progress
        self.history: list[dict] = []
        threads = torch.get_num_threads()
        super().__init__(**({"cfg": cfg} if cfg else {}), overrides=overrides)
        torch.set_num_threads(threads)  # ultralytics leaves one core idle, which may be half
        self.mosaic_until = self.data["mosaic_until"]
        self.state_file = Path(self.args.data).with_name("state.pt")

    # Replaced: what ultralytics would download, write or send.

    def get_dataset(self) -> dict:
        """Return what `write_run` wrote; ultralytics would search elsewhere, and download."""
        run = json.loads(Path(self.args.data).read_text(encoding="utf-8"))
        return run | {"names": dict(enumerate(run["names"]))}

    def run_callbacks(self, event: str) -> None:
        """Run no integrations; begin each epoch as in Algorithm 1."""
        if event == "on_train_epoch_start":
            self.begin_epoch()

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None):
        """Return the images of a folder with the paper's augmentations."""
        return SpineDataset(
            img_path, imgsz=self.args.imgsz, batch_size=batch, augment=mode == "train",
            hyp=self.args, stride=32, data=self.data, task="detect", prefix="",
        )  # fmt: skip

    def validate(self) -> tuple[dict, float]:
        """Skip ultralytics' validation: `evaluate` uses this book's metrics."""
        return {}, 0.0

    def final_eval(self) -> None:
        """Skip ultralytics' last evaluation; see `dernet_utils.metrics.detection`."""

    def save_metrics(self, metrics: dict) -> None:
        """Add the epoch to the history: its losses, its seconds, and what `evaluate` returns."""
        row = {"epoch": self.epoch + 1, "mosaic": self.with_mosaic}
        row |= {name.removesuffix("_loss"): float(value) for name, value in self.tloss.items()}
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": time.time() - self.begun}
        row |= self._evaluate(self.epoch + 1, self.ema.ema)
        self.history.append(row)
        self._progress(row)

    def build_optimizer(self, *given, **named) -> torch.optim.Optimizer:
        """Return ultralytics' optimizer, in its fused form."""
        optimizer = super().build_optimizer(*given, **named)
        for group in optimizer.param_groups:
            group |= {"fused": True, "foreach": False}
        return optimizer

    # Algorithm 1.

    @property
    def with_mosaic(self) -> bool:
        """Whether the current epoch uses mosaic (Algorithm 1, line 9)."""
        return self.epoch + 1 < self.mosaic_until

    def begin_epoch(self) -> None:
        """Set mosaic, and seed: an epoch depends only on its number and the weights before it."""
        self.train_loader.dataset.set_mosaic(self.args, self.with_mosaic)
        self.begun = time.time()
        seed = self.args.seed * 1000 + self.epoch
        self.train_loader.dataset.draw(np.random.default_rng(seed))
        seed_augmentations(seed + 1_000_003 * max(RANK, 0))  # each GPU augments differently
        torch.manual_seed(seed)
        self.train_loader.generator.manual_seed(seed)
        self.train_loader.reset()

    # Checkpoints: tensors and numbers only, written whole.

    def save_model(self) -> bool:
        """Write all that the next epoch depends on."""
        state = {
            "epoch": self.epoch,
            "history": self.history,
            "model": unwrap_model(self.model).state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
        }
        write_whole(self.state_file, lambda part: torch.save(state, part))
        return True

    def resume_training(self, ckpt: dict | None) -> None:
        """Continue after the last finished epoch, if there is one."""
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        unwrap_model(self.model).load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.start_epoch = state["history"], state["epoch"] + 1
        for row in self.history:
            self._progress(row)


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Return the smoothed network's tensors and the history that `MosaicDecay` wrote."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value.contiguous() for name, value in state["ema"].items()}, state["history"]

"""The baselines of the paper's Table 3, as far as maintained libraries have them.

All are trained by one loop, on the same augmented images, for the same wall-clock time, and their
boxes are filtered by the same non-maximum suppression. How many steps fit into that time depends on
the detector and the machine; the number is part of the result.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_convert

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import digest_of, modules_digest, write_whole
from dernet_utils.core.vocabulary import LESION_TYPES
from dernet_utils.detection import images as detection_images
from dernet_utils.detection import prediction, yolo
from dernet_utils.detection import training as detection_training
from dernet_utils.detection.augment import SpineDataset, seed_augmentations
from dernet_utils.imaging import boxes as imaging_boxes

# isort: split
from ultralytics.nn.tasks import RTDETRDetectionModel

ANCHORS_FOR_PX = 800  # torchvision's anchors are made for images of this side
PROPOSALS = 256  # of Faster R-CNN per image; torchvision's 2,000 and 1,000 are for larger images
QUERIES = 300  # boxes of RT-DETR per image; fewer where an image has fewer locations
FASTER_RCNN, RETINANET, RT_DETR = "Faster R-CNN", "RetinaNet", "RT-DETR-L"
BASELINES = (FASTER_RCNN, RETINANET, RT_DETR, "YOLO11-n", "YOLO11-s", "YOLO11-L")
WARM_STEPS = 20  # ours: AdamW's first steps from random weights are as large as its later ones
CLIP = 10.0  # ultralytics' limit of a gradient's norm
# Peak of AdamW's learning rate as a fraction of YOLO11's. Ours, not searched, whereas YOLO11-L's
# was; in the order of the authors' own: lower for the other detectors, lowest for the transformer.
LR_SHARE = {FASTER_RCNN: 0.25, RETINANET: 0.25, RT_DETR: 0.1}


@dataclass(frozen=True)
class Baseline:
    """A detector with random weights, ready for training.

    Attributes:
        network: The module to train.
        loss: Takes a batch as ultralytics collates it, images in [0, 1]; returns a scalar.
        raw: Takes images (B, 3, H, W) in [0, 1]; yields for each one what
            `prediction.suppress_boxes` takes.
    """

    network: nn.Module
    loss: Callable[[dict], Tensor]
    raw: Callable[[Tensor], Iterable[Tensor]]


def build_baseline(
    name: str, view: tuple[int, int], seed: int, focal: Mapping[str, float] = yolo.Detector.focal
) -> Baseline:
    """Return one of `BASELINES` with random weights.

    Args:
        name: As in `BASELINES`.
        view: Height and width of its input, px.
        seed: Seed of the weights.
        focal: YOLO11's exponent and class weight of Eq. 6; RetinaNet keeps its authors', which are
            the paper's.

    Raises:
        DernetError: The name is none of them.
    """
    if name not in BASELINES:
        raise DernetError(f"A detector is one of {', '.join(BASELINES)}, not {name!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("YOLO11"):
            network = yolo.build_detector(LESION_TYPES, seed, scale=name[-1].lower())
            network.focal = focal
            return _yolo(network)
        return _rt_detr(view) if name == RT_DETR else _two_or_one_stage(name, view)


def _yolo(network: yolo.Detector) -> Baseline:
    return Baseline(network, lambda batch: network.loss(batch)[0].sum(), network.answers)


def _rt_detr(view: tuple[int, int]) -> Baseline:
    network = RTDETRDetectionModel("rtdetr-l.yaml", nc=len(LESION_TYPES), verbose=False)
    network.nc = len(LESION_TYPES)  # its loss reads it
    locations = sum(view[0] // stride * (view[1] // stride) for stride in (8, 16, 32))
    network.model[-1].num_queries = min(QUERIES, locations)
    network.to(memory_format=torch.channels_last)
    network.predict = _fast_in_training(network, network.predict)
    sides = torch.tensor([view[1], view[0]] * 2)

    def raw(images: Tensor) -> Tensor:
        boxes, logits = (one.squeeze(0) for one in network(images)[1][:2])
        return torch.cat([boxes * sides.to(boxes), logits.sigmoid()], dim=2).transpose(1, 2)

    return Baseline(network, lambda batch: network.loss(batch)[0], raw)


def _fast_in_training(network: nn.Module, forward: Callable) -> Callable:
    """Return `forward` in bfloat16 while `network` is in training mode, as YOLO11-L's is."""

    def fast(*given, **named):
        if network.training:
            return machine.in_bfloat16(forward, machine.device(), *given, **named)
        return forward(*given, **named)

    return fast


def _two_or_one_stage(name: str, view: tuple[int, int]) -> Baseline:
    """Return torchvision's detectors: Faster R-CNN has proposals, RetinaNet has none."""
    scale = max(view) / ANCHORS_FOR_PX
    levels = [32 * 2**level * scale for level in range(5)]
    shapes = ((0.5, 1.0, 2.0),) * 5
    common = {
        "weights": None, "weights_backbone": None, "num_classes": len(LESION_TYPES) + 1,
        "min_size": min(view), "max_size": max(view),
    }  # fmt: skip
    limits = {"score_thresh": prediction.MIN_SCORE, "nms_thresh": imaging_boxes.NMS_IOU}
    if name == FASTER_RCNN:
        network = fasterrcnn_resnet50_fpn(
            rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in levels), shapes),
            box_detections_per_img=imaging_boxes.MAX_BOXES,
            rpn_post_nms_top_n_train=PROPOSALS,
            rpn_post_nms_top_n_test=PROPOSALS,
            box_batch_size_per_image=PROPOSALS // 4,
            **{f"box_{key}": value for key, value in limits.items()},
            **common,
        )
        slow = [network.backbone, network.roi_heads.box_head]
    else:
        thirds = tuple(tuple(side * 2 ** (k / 3) for k in range(3)) for side in levels)
        network = retinanet_resnet50_fpn(
            anchor_generator=AnchorGenerator(thirds, shapes),
            detections_per_img=imaging_boxes.MAX_BOXES,
            **limits,
            **common,
        )
        slow = [network.backbone, network.head.classification_head, network.head.regression_head]
    for part in slow:
        part.to(memory_format=torch.channels_last).forward = _fast_in_training(part, part.forward)
    sides = torch.tensor([view[1], view[0]] * 2)

    def loss(batch: dict) -> Tensor:
        corners = box_convert(batch["bboxes"], "cxcywh", "xyxy") * sides.to(batch["bboxes"])
        targets = [
            {"boxes": corners[own], "labels": batch["cls"][own].long().flatten() + 1}  # 0: none
            for own in (batch["batch_idx"] == row for row in range(len(batch["img"])))
        ]
        return sum(network(list(batch["img"]), targets).values())

    def raw(images: Tensor) -> Iterator[Tensor]:
        for found in network(list(images)):
            prob = torch.zeros(len(found["boxes"]), len(LESION_TYPES)).to(images)
            prob[torch.arange(len(prob)), found["labels"] - 1] = found["scores"]
            yield torch.cat([box_convert(found["boxes"], "xyxy", "cxcywh"), prob], dim=1).T

    return Baseline(network, loss, raw)


def train_baseline(
    baseline: Baseline, images: SpineDataset, batch: int, lr: float, seconds: float, seed: int
) -> int:
    """Train for a wall-clock time; the learning rate falls along a cosine of the time spent.

    Args:
        baseline: As `build_baseline` returns it; changed.
        images: The training images with their augmentations.
        batch: Images per step.
        lr: Peak of AdamW's learning rate.
        seconds: Training time; the step that exceeds it is finished.
        seed: Seed of the order of images and of their augmentation.

    Returns:
        The number of steps.
    """
    network, device = baseline.network.to(machine.device()).train(), machine.device()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=5e-4)
    seed_augmentations(seed)
    steps, begun = 0, time.monotonic()
    with machine.denormals_flushed():
        for rows in _rows(len(images), batch, seed):
            if (spent := (time.monotonic() - begun) / seconds) >= 1:
                return steps
            for group in optimizer.param_groups:
                warm = min(1.0, (steps + 1) / WARM_STEPS)
                group["lr"] = lr * warm * (1 + math.cos(math.pi * spent)) / 2
            shown = SpineDataset.collate_fn([images[int(row)] for row in rows])
            shown = {k: v.to(device) if torch.is_tensor(v) else v for k, v in shown.items()}
            shown["img"] = shown["img"].float() / 255
            optimizer.zero_grad()
            baseline.loss(shown).backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            steps += 1
    return steps


def _rows(images: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of image numbers; each pass is a new order of all images."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order[: images // batch * batch].split(batch)


@dataclass(frozen=True)
class BaselineRun:
    """A finished training run of a baseline.

    Attributes:
        found: Boxes on the evaluated images, as `prediction.predict_boxes` returns them.
        steps: Training steps, of `DetectorRecipe.batch` images each.
        parameters: Number of parameters, in millions.
    """

    found: pd.DataFrame
    steps: int
    parameters: float


def run_baseline(
    name: str,
    training: pd.DataFrame,
    boxes: pd.DataFrame,
    evaluated: pd.DataFrame,
    recipe: detection_images.DetectorRecipe,
    seconds: float,
    folder: Path,
) -> BaselineRun:
    """Train a baseline for a given time and predict boxes on other images, or load a finished run.

    Images are augmented as in epochs without mosaic. The run is stored under a digest of all that
    it depends on, except the machine's speed.

    Args:
        name: One of `BASELINES`.
        training: `image_id`, `cached_path`, stored `height` and `width`.
        boxes: Of the training images: `image_id`, `lesion_type`, corners in stored pixels.
        evaluated: Images of other studies to predict boxes on; columns as in `training`.
        recipe: YOLO11-L's; its epochs and its mosaic are not used.
        seconds: Training time.
        folder: Where runs are stored.

    Raises:
        DernetError: The name is none of `BASELINES`, or a box lies outside its training image.
    """
    key = _key(name, training, boxes, evaluated, recipe, seconds)
    kept = Path(folder) / f"{name.lower().replace(' ', '-')}-{key}.parquet"
    if not kept.is_file():
        baseline = build_baseline(name, recipe.input_size, recipe.seed, recipe.focal)
        images = detection_images.augmented_dataset(training, boxes, recipe, kept.with_suffix(""))
        lr = recipe.lr * LR_SHARE.get(name, 1.0)
        steps = train_baseline(baseline, images, recipe.batch, lr, seconds, recipe.seed)
        baseline.network.eval()
        found = prediction.collect_boxes(baseline.raw, evaluated, recipe.input_size)
        found.attrs = {"steps": steps, "parameters": _millions(baseline.network)}
        write_whole(kept, lambda part: found.to_parquet(part, index=False))
        shutil.rmtree(kept.with_suffix(""))
    found = pd.read_parquet(kept)
    return BaselineRun(found, found.attrs["steps"], found.attrs["parameters"])


def _millions(network: nn.Module) -> float:
    return sum(p.numel() for p in network.parameters()) / 1e6


def _key(name, training, boxes, evaluated, recipe, seconds) -> str:
    return digest_of(
        detection_training.detector_run_key(training, evaluated, boxes, recipe, None),
        modules_digest("detection/baselines", "detection/prediction"),
        f"{name} {seconds}",
    )[:16]

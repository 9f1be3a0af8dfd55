"""A detector's boxes for images, after non-maximum suppression."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch
from torchvision.ops import batched_nms, box_convert

from dernet_utils.core import machine
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.detection import yolo
from dernet_utils.imaging.boxes import MAX_BOXES, NMS_IOU, from_letterbox, letterbox
from dernet_utils.imaging.enhance import load_cached

PREDICTION_COLUMNS = ["image_id", "lesion_type", *CORNERS, "score"]
MIN_SCORE = 0.001  # ultralytics' threshold for evaluation: a curve needs boxes of low score too


def predict_boxes(
    network: yolo.Detector, images: pd.DataFrame, view: tuple[int, int], batch: int = 16
) -> pd.DataFrame:
    """Return the boxes that YOLO11 predicts, for each image by falling score.

    Overlapping boxes of one lesion type are removed by non-maximum suppression at IoU 0.5
    (Algorithm 1, line 18).

    Args:
        network: YOLO11; left in evaluation mode.
        images: `image_id`, `cached_path`, stored `height` and `width`.
        view: Height and width of the network's input, px.
        batch: Images per forward pass.

    Returns:
        `image_id`, `lesion_type`, `xmin` … `ymax` in stored pixels within the image, and `score`,
        the probability in [0.001, 1].
    """
    network.eval()
    return collect_boxes(network.answers, images, view, batch)


def collect_boxes(
    raw: Callable[[torch.Tensor], Iterable[torch.Tensor]],
    images: pd.DataFrame,
    view: tuple[int, int],
    batch: int = 16,
) -> pd.DataFrame:
    """Return the boxes of any detector, in the form of `predict_boxes`.

    Args:
        raw: Takes letterboxed images (B, 3, H, W) in [0, 1]; returns, for each of them, raw boxes
            as `suppress_boxes` takes them.
        images, view, batch: As `predict_boxes` takes them.
    """
    rows, found = list(images.itertuples()), []
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        filled, places = zip(
            *(letterbox(load_cached(image.cached_path), view) for image in some), strict=True
        )
        x = torch.from_numpy(np.stack(filled)).to(machine.device())
        x = (x[:, None].float() / 255).expand(-1, 3, -1, -1)
        with torch.no_grad():
            outputs = list(raw(x.contiguous(memory_format=torch.channels_last)))
        for image, place, output in zip(some, places, outputs, strict=True):
            corners, classes, scores = suppress_boxes(output.cpu())
            stored = from_letterbox(corners.numpy(), place, image.height, image.width)
            found.append(_table(image, stored, classes, scores))
    return (
        pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=PREDICTION_COLUMNS)
    )


def suppress_boxes(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Filter an image's raw boxes by non-maximum suppression (Algorithm 1, line 18).

    For evaluation, where the threshold `MIN_SCORE` keeps very many boxes. The same rule in NumPy,
    for inference without torch, is `imaging.boxes.non_maximum_suppression`; a test compares the
    two. They differ by rounding, in the order of equal scores, and at a score equal to the
    threshold, which is dropped here.

    Args:
        raw: Per anchor, centre, width and height in pixels, then one probability per lesion type,
            shape (4 + C, anchors).

    Returns:
        Corners (n, 4) in pixels, classes (n,) and scores (n,), by falling score.
    """
    corners, prob = box_convert(raw[:4].T, "cxcywh", "xyxy"), raw[4:].T
    anchors, classes = (prob > MIN_SCORE).nonzero(as_tuple=True)
    scores = prob[anchors, classes]
    kept = batched_nms(corners[anchors], scores, classes, NMS_IOU)[:MAX_BOXES]
    return corners[anchors[kept]], classes[kept], scores[kept]


def _table(image, xyxy, classes, scores) -> pd.DataFrame:
    table = pd.DataFrame(xyxy, columns=list(CORNERS))
    table.insert(0, "image_id", image.image_id)
    table.insert(1, "lesion_type", [LESION_TYPES[number] for number in classes])
    return table.assign(score=scores.numpy().astype(np.float64))

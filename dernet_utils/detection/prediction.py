"""Where the lesions are: YOLO11-L trained on boxes, and its boxes on new films."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch
from torchvision.ops import batched_nms, box_convert

from dernet_utils.core import machine
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.dataset.prepared import load_cached
from dernet_utils.detection import yolo
from dernet_utils.imaging.boxes import MAX_BOXES, NMS_IOU, from_letterbox, letterbox

PREDICTION_COLUMNS = ["image_id", "lesion_type", *CORNERS, "score"]
MIN_SCORE = 0.001  # ultralytics' floor for evaluation: a curve needs the weak boxes too

# Prediction


def predict_boxes(
    network: yolo.Detector, images: pd.DataFrame, view: tuple[int, int], batch: int = 16
) -> pd.DataFrame:
    """Return the boxes that a network finds, the surest of each film first.

    Overlapping boxes of one lesion type are thinned by non-maximum suppression at IoU 0.5
    (Algorithm 1, line 18).

    Args:
        network: YOLO11; it is left in evaluation mode.
        images: `image_id`, `cached_path`, stored `height` and `width`.
        view: Height and width of the network's input, px.
        batch: Films a forward pass.

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
    """Return the boxes of any detector, as `predict_boxes` does.

    Args:
        raw: Takes letterboxed films (B, 3, H, W) in [0, 1]; gives for each what `suppress` takes.
        images, view, batch: As `predict_boxes` takes them.
    """
    films, found = list(images.itertuples()), []
    for first in range(0, len(films), batch):
        some = films[first : first + batch]
        filled, places = zip(
            *(letterbox(load_cached(f.cached_path), view) for f in some), strict=True
        )
        shown = torch.from_numpy(np.stack(filled)).to(machine.device())
        shown = (shown[:, None].float() / 255).expand(-1, 3, -1, -1)
        with torch.no_grad():
            answers = list(raw(shown.contiguous(memory_format=torch.channels_last)))
        for film, place, answer in zip(some, places, answers, strict=True):
            corners, classes, scores = suppress_boxes(answer.cpu())
            stored = from_letterbox(corners.numpy(), place, film.height, film.width)
            found.append(_table(film, stored, classes, scores))
    return (
        pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=PREDICTION_COLUMNS)
    )


def suppress_boxes(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin a film's raw boxes by non-maximum suppression (Algorithm 1, line 18).

    Args:
        raw: Centre, width and height in pixels, then one probability a lesion type, of each
            anchor: shape (4 + C, anchors).

    Returns:
        Corners (n, 4) in pixels, classes (n,) and scores (n,), the surest first.
    """
    corners, prob = box_convert(raw[:4].T, "cxcywh", "xyxy"), raw[4:].T
    anchors, classes = (prob > MIN_SCORE).nonzero(as_tuple=True)
    scores = prob[anchors, classes]
    kept = batched_nms(corners[anchors], scores, classes, NMS_IOU)[:MAX_BOXES]
    return corners[anchors[kept]], classes[kept], scores[kept]


def _table(film, xyxy, classes, scores) -> pd.DataFrame:
    table = pd.DataFrame(xyxy, columns=list(CORNERS))
    table.insert(0, "image_id", film.image_id)
    table.insert(1, "lesion_type", [LESION_TYPES[number] for number in classes])
    return table.assign(score=scores.numpy().astype(np.float64))

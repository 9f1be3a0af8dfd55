"""Boxes and the detector's input: letterboxing and its inverse, IoU, non-maximum suppression."""

import cv2
import numpy as np

PADDING_GREY = 114  # ultralytics' padding; the same in training and inference
NMS_IOU = 0.5  # paper, Algorithm 1, line 18
MAX_BOXES = 300  # per image; ultralytics' default

# --- Letterboxing -----------------------------------------------------------------------------


def letterbox(
    grey: np.ndarray, view: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Fit an image into a grey rectangle without changing its proportions.

    Args:
        grey: Image, uint8 (H, W).
        view: Height and width of the rectangle, px.

    Returns:
        The rectangle, uint8 (height, width), and the image's position in it: left, top, width,
        height, px.

    >>> filled, place = letterbox(np.zeros((400, 200), np.uint8), (100, 64))
    >>> filled.shape, place
    ((100, 64), (7, 0, 50, 100))
    """
    height, width = grey.shape
    gain = min(view[0] / height, view[1] / width)
    size = max(1, round(width * gain)), max(1, round(height * gain))
    method = cv2.INTER_AREA if gain < 1 else cv2.INTER_LINEAR
    left, top = (view[1] - size[0]) // 2, (view[0] - size[1]) // 2
    filled = np.full(view, PADDING_GREY, np.uint8)
    fitted = cv2.resize(grey, size, interpolation=method)
    filled[top : top + size[1], left : left + size[0]] = fitted
    return filled, (left, top, *size)


def to_letterbox(
    xyxy: np.ndarray, place: tuple[int, int, int, int], height: int, width: int
) -> np.ndarray:
    """Map corners from the stored image to the letterboxed one; `from_letterbox` is the inverse.

    Args:
        xyxy: Corners xmin, ymin, xmax, ymax in stored pixels, shape (n, 4).
        place: Position of the image, as `letterbox` returns it.
        height: Height of the stored image, px.
        width: Width of the stored image, px.

    Returns:
        Corners in pixels of the rectangle, float64 (n, 4).

    >>> to_letterbox(np.array([[0, 200, 100, 400]]), (25, 0, 50, 100), 400, 200).tolist()
    [[25.0, 50.0, 50.0, 100.0]]
    """
    left, top, fitted_width, fitted_height = place
    gain = np.tile([fitted_width / width, fitted_height / height], 2)
    return np.asarray(xyxy, np.float64) * gain + [left, top, left, top]


def from_letterbox(
    xyxy: np.ndarray, place: tuple[int, int, int, int], height: int, width: int
) -> np.ndarray:
    """Map corners from a letterboxed image back to the stored one, clipped to its edges.

    Args:
        xyxy: Corners xmin, ymin, xmax, ymax in pixels of the rectangle, shape (n, 4).
        place: Position of the image, as `letterbox` returns it.
        height: Height of the stored image, px.
        width: Width of the stored image, px.

    Returns:
        Corners in stored pixels, float64 (n, 4).

    >>> from_letterbox(np.array([[25, 50, 50, 120]]), (25, 0, 50, 100), 400, 200).tolist()
    [[0.0, 200.0, 100.0, 400.0]]
    """
    left, top, fitted_width, fitted_height = place
    gain = np.tile([width / fitted_width, height / fitted_height], 2)
    stored = (np.asarray(xyxy, np.float64) - [left, top, left, top]) * gain
    return stored.clip(0, [width, height, width, height])


# --- Overlap ----------------------------------------------------------------------------------


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the intersection over union (IoU) of every pair of boxes.

    Args:
        first: Corners xmin, ymin, xmax, ymax, shape (n, 4).
        second: The same, shape (m, 4).

    Returns:
        float64 (n, m), in [0, 1]; 0 where neither box has an area.

    >>> box_iou(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2], [5, 5, 6, 6]])).round(3).tolist()
    [[0.333, 0.0]]
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def non_maximum_suppression(
    raw: np.ndarray, score_threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep the most confident of overlapping boxes of a class: Algorithm 1, line 18.

    A box is dropped where its IoU with a more confident one of the same class exceeds `NMS_IOU`;
    at most `MAX_BOXES` are kept. This form needs no torch; the same rule in torch, for the many
    boxes of an evaluation, is `detection.prediction.suppress_boxes`.

    Args:
        raw: A detector's output for one image: per anchor the centre, width and height, then a
            score per class; shape (4 + C, anchors).
        score_threshold: Boxes with a lower score are dropped.

    Returns:
        Corners, float64 (n, 4), in the units of `raw`; classes, int (n,); scores, float64 (n,);
        the most confident first.

    >>> raw = np.array([[5, 5.5, 20], [5, 5, 20], [4, 4, 4], [4, 4, 4], [0.9, 0.8, 0.7]])
    >>> non_maximum_suppression(raw, 0.1)[2].tolist()
    [0.9, 0.7]
    """
    raw = np.asarray(raw, np.float64)
    anchors, classes = np.nonzero(score_threshold <= raw[4:].T)
    scores = raw[4 + classes, anchors]
    order = np.argsort(-scores, kind="stable")
    anchors, classes, scores = anchors[order], classes[order], scores[order]
    centre, size = raw[:2, anchors].T, raw[2:4, anchors].T
    corners = np.hstack([centre - size / 2, centre + size / 2])
    areas, kept = size.prod(axis=1), []
    free = np.ones(len(scores), bool)
    for row in range(len(scores)):
        if not free[row] or len(kept) == MAX_BOXES:
            continue
        kept.append(row)
        low = np.maximum(corners[row, :2], corners[:, :2])
        high = np.minimum(corners[row, 2:], corners[:, 2:])
        both = (high - low).clip(0).prod(axis=1)
        free &= (classes != classes[row]) | (both <= NMS_IOU * (areas + areas[row] - both))
    return corners[kept], classes[kept], scores[kept]

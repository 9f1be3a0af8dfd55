"""Boxes and the rectangle that a detector sees: letterboxing and its inverse, IoU, suppression."""

import cv2
import numpy as np

PADDING_GREY = 114  # ultralytics' padding, so that the network meets the same margin as in training

# --- A detector's rectangle ------------------------------------------------------------------


def letterbox(
    grey: np.ndarray, view: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Fit an image into a grey rectangle without changing its proportions.

    Args:
        grey: 8-bit image, shape (H, W).
        view: Height and width of the rectangle, px.

    Returns:
        The rectangle, and where in it the image lies: left, top, width, height.

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
    """Take corners from the stored image into a letterboxed one; `to_stored` takes them back.

    Args:
        xyxy: Corners in stored pixels, shape (n, 4).
        place: As `letterbox` returns it.
        height, width: Of the stored image.

    >>> to_view(np.array([[0, 200, 100, 400]]), (25, 0, 50, 100), 400, 200).tolist()
    [[25.0, 50.0, 50.0, 100.0]]
    """
    left, top, fitted_width, fitted_height = place
    gain = np.tile([fitted_width / width, fitted_height / height], 2)
    return np.asarray(xyxy, np.float64) * gain + [left, top, left, top]


def from_letterbox(
    xyxy: np.ndarray, place: tuple[int, int, int, int], height: int, width: int
) -> np.ndarray:
    """Take corners from a letterboxed image back to the stored image, within its edges.

    Args:
        xyxy: Corners in its pixels, shape (n, 4).
        place: As `letterbox` returns it.
        height, width: Of the stored image.

    >>> to_stored(np.array([[25, 50, 50, 120]]), (25, 0, 50, 100), 400, 200).tolist()
    [[0.0, 200.0, 100.0, 400.0]]
    """
    left, top, fitted_width, fitted_height = place
    gain = np.tile([width / fitted_width, height / fitted_height], 2)
    stored = (np.asarray(xyxy, np.float64) - [left, top, left, top]) * gain
    return stored.clip(0, [width, height, width, height])


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the intersection over union of every pair of boxes.

    Args:
        first: Corners xmin, ymin, xmax, ymax, shape (n, 4).
        second: The same, shape (m, 4).

    Returns:
        Shape (n, m), in [0, 1]; zero where neither box has an area.

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


NMS_IOU = 0.5  # paper, Algorithm 1, line 18
MAX_BOXES = 300  # a film; ultralytics' default


def non_maximum_suppression(
    raw: np.ndarray, score_threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin a film's raw boxes by non-maximum suppression within each type (line 18).

    Args:
        raw: As `Pipeline.detector` returns it, shape (4 + C, anchors).
        score_threshold: Boxes below it are left out.

    Returns:
        Corners (n, 4), classes (n,) and scores (n,), the surest first.

    >>> raw = np.array([[5, 5.5, 20], [5, 5, 20], [4, 4, 4], [4, 4, 4], [0.9, 0.8, 0.7]])
    >>> suppress(raw, 0.1)[2].tolist()
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

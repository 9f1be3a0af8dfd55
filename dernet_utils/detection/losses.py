"""The detector's loss (Eq. 4) and its three terms, written out for reading.

Each function is differentiable and vectorised, and returns one number per box or anchor;
`total_loss` weights and sums them. Tests compare them with ultralytics' own forms, gradients
included.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GAMMA = 2.0  # paper, section 3.3
ALPHA = 0.25  # companion code
TINY = 1e-7  # keeps quotients of empty boxes finite, as in ultralytics


def complete_iou_loss(boxes: Tensor, truth: Tensor) -> Tensor:
    """Return Eq. 5, the complete-IoU loss of predicted boxes.

    One minus the overlap, plus the squared distance of the centres over the squared diagonal of
    the smallest box around both, plus alpha v for a different aspect ratio. The factor alpha
    weights the aspect ratio by the overlap and is constant in the gradient (Zheng et al., 2020).

    Args:
        boxes: Corners, shape (..., 4).
        truth: The same shape.

    Returns:
        Shape (...); 0 for equal boxes, at least 1 for boxes that do not overlap.

    >>> one = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    >>> [round(float(complete_iou_loss(one, one + shift)), 3) for shift in (0.0, 2.0)]
    [0.0, 1.25]
    """
    width, height = _size(boxes)
    true_width, true_height = _size(truth)
    low = torch.maximum(boxes[..., :2], truth[..., :2])
    high = torch.minimum(boxes[..., 2:], truth[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    overlap = shared / (width * height + true_width * true_height - shared + TINY)

    around = torch.maximum(boxes[..., 2:], truth[..., 2:])
    around = around - torch.minimum(boxes[..., :2], truth[..., :2])
    apart = (truth[..., :2] + truth[..., 2:] - boxes[..., :2] - boxes[..., 2:]) / 2
    distance = apart.square().sum(-1) / (around.square().sum(-1) + TINY)

    turned = torch.atan(true_width / true_height) - torch.atan(width / height)
    shape = 4 / math.pi**2 * turned.square()
    alpha = (shape / (1 - overlap + shape + TINY)).detach()
    return 1 - overlap + distance + alpha * shape


def _size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of corners (..., 4); the height is above 0, since it is divided by."""
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1] + TINY


def focal_loss(
    logits: Tensor, target: Tensor, gamma: float = GAMMA, alpha: float = ALPHA
) -> Tensor:
    """Return Eq. 6, the focal loss: binary cross-entropy with a low weight for easy examples.

    The paper's equation is for targets 0 and 1. YOLO11's targets are soft: they express how well
    an anchor's box and class fit the lesion that it is assigned to. With a target t, 1 - p_t
    becomes |t - p|, alpha_t the mean t alpha + (1 - t)(1 - alpha), and -log p_t the cross-entropy.
    For t of 0 and 1 this is Eq. 6, and its minimum, zero, is at p = t (without alpha it is the
    quality focal loss of Li et al., 2020, Eq. 2).

    Args:
        logits: Any shape.
        target: In [0, 1], the same shape.
        gamma: How quickly the weight falls with p_t; 0 gives alpha-weighted cross-entropy.
        alpha: Weight of target 1; target 0 has the weight 1 - alpha.

    Returns:
        The same shape.

    >>> float(focal_loss(torch.tensor(0.0), torch.tensor(1.0)))  # 0.25 * 0.5**2 * ln 2
    0.04332...
    """
    weight = target * alpha + (1 - target) * (1 - alpha)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return weight * (target - logits.sigmoid()).abs() ** gamma * entropy


def distribution_focal_loss(logits: Tensor, distance: Tensor) -> Tensor:
    """Return the loss of a distribution over whole distances that encodes an edge's position.

    An edge at 3.2 should have probability 0.8 at 3 and 0.2 at 4: the cross-entropy with those two
    (Li et al., 2020, Eq. 6).

    Args:
        logits: Shape (..., bins), of the distances 0, 1, ..., bins - 1.
        distance: Shape (...), clamped to [0, bins - 1.01], so that a bin lies above it.

    Returns:
        Shape (...).
    """
    bins = logits.shape[-1]
    distance = distance.clamp(0, bins - 1.01)
    below = distance.long()
    above = distance - below
    log_prob = F.log_softmax(logits, dim=-1)
    log_below = log_prob.gather(-1, below[..., None])[..., 0]
    log_above = log_prob.gather(-1, below[..., None] + 1)[..., 0]
    return -(1 - above) * log_below - above * log_above


class Assigned(NamedTuple):
    """The outputs and targets of a batch's anchors.

    Attributes:
        class_logits: Shape (anchors, classes).
        edge_logits: Of its box's left, top, right and lower edge, shape (anchors, 4, bins).
        anchors: Its position in units of its stride, shape (anchors, 2).
        class_target: In [0, 1], shape (anchors, classes); 0 where no lesion is assigned.
        box_target: Corners in units of the stride, shape (anchors, 4).
        lesion: Whether a lesion is assigned, bool, shape (anchors,).
    """

    class_logits: Tensor
    edge_logits: Tensor
    anchors: Tensor
    class_target: Tensor
    box_target: Tensor
    lesion: Tensor


def total_loss(
    given: Assigned,
    box: float = 7.5,
    classes: float = 0.5,
    dfl: float = 1.5,
    class_loss: Callable[[Tensor, Tensor], Tensor] = focal_loss,
) -> dict[str, Tensor]:
    """Return the weighted terms of Eq. 4 over a batch's anchors; their sum is the loss.

    The box and DFL terms sum over anchors with a lesion, weighted by their class target; the class
    term sums over all anchors. All are divided by the sum of the class targets, or by 1 if that is
    less.

    Args:
        given: All anchors of the batch.
        box, classes, dfl: The paper's weights.
        class_loss: Takes logits and targets; returns one number per logit.

    Returns:
        ``box``, ``cls`` and ``dfl``, scalars.
    """
    each = given.class_target.sum(-1)[given.lesion]
    whole = given.class_target.sum().clamp(min=1)
    edges, anchors = given.edge_logits[given.lesion], given.anchors[given.lesion]
    reach = edges.softmax(-1) @ torch.arange(edges.shape[-1]).to(edges)
    boxes = torch.cat([anchors - reach[:, :2], anchors + reach[:, 2:]], dim=-1)
    truth = given.box_target[given.lesion]
    distance = torch.cat([anchors - truth[:, :2], truth[:, 2:] - anchors], dim=-1)
    return {
        "box": box * (complete_iou_loss(boxes, truth) * each).sum() / whole,
        "cls": classes * class_loss(given.class_logits, given.class_target).sum() / whole,
        "dfl": dfl * (distribution_focal_loss(edges, distance).mean(-1) * each).sum() / whole,
    }

"""The detector's losses against ultralytics', torchvision's, and sums by hand."""

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from dernet_utils.core.vocabulary import LESION_TYPES
from dernet_utils.detection import yolo
from dernet_utils.detection.losses import (
    Assigned,
    complete_iou_loss,
    distribution_focal_loss,
    focal_loss,
    total_loss,
)

from ultralytics.utils.loss import DFLoss, FocalLoss  # isort: skip
from ultralytics.utils.metrics import bbox_iou  # isort: skip


def random_boxes(n: int, seed: int) -> torch.Tensor:
    corners = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed)) * 20
    return torch.cat([corners.amin(1), corners.amax(1) + 0.5], dim=1)


def with_gradient(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    value = function(x)
    value.sum().backward()
    return value.detach(), x.grad


def test_complete_iou_by_hand():
    # Two squares of side 2, one 1 to the right: their intersection is 2 of 6, their centres are 1
    # apart, and the box around both has the squared diagonal 9 + 4.
    one, other = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2])
    assert complete_iou_loss(one, other) == pytest.approx(1 - 1 / 3 + 1 / 13, abs=1e-6)
    # The same centre, 4 x 1 against 2 x 2: their intersection is 2 of 6, and
    # v = 4/pi^2 (atan 1 - atan 4)^2.
    flat, square = torch.tensor([-2.0, -0.5, 2, 0.5]), torch.tensor([-1.0, -1, 1, 1])
    v = 4 / math.pi**2 * (math.atan(1) - math.atan(4)) ** 2
    expected = 1 - 1 / 3 + v * v / (1 - 1 / 3 + v)
    assert complete_iou_loss(flat, square) == pytest.approx(expected, abs=1e-6)


def test_complete_iou_is_ultralytics_gradient_included():
    boxes, truth = random_boxes(500, 0), random_boxes(500, 1)
    boxes[:20] = truth[:20]
    ours = with_gradient(lambda b: complete_iou_loss(b, truth), boxes)
    theirs = with_gradient(lambda b: 1 - bbox_iou(b, truth, xywh=False, CIoU=True)[:, 0], boxes)
    assert torch.allclose(ours[0], theirs[0], atol=1e-6)
    assert torch.allclose(ours[1], theirs[1], atol=1e-5)


def test_focal_loss_is_torchvisions_for_hard_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 7, generator=generator) * 4
    target = (torch.rand(200, 7, generator=generator) < 0.1).float()
    ours = with_gradient(lambda z: focal_loss(z, target), logits)
    theirs = with_gradient(lambda z: sigmoid_focal_loss(z, target, 0.25, 2.0), logits)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_focal_loss_is_ultralytics_for_hard_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 7, generator=generator) * 4
    target = (torch.rand(200, 7, generator=generator) < 0.3).float()
    ours = with_gradient(lambda z: focal_loss(z, target, 1.5, 0.4).mean(1).sum(), logits)
    theirs = with_gradient(lambda z: FocalLoss(1.5, 0.4)(z, target), logits)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_focal_loss_of_a_soft_target_by_hand_and_least_at_the_target():
    # p = 1/2, t = 0.3: 0.2^2 ln 2, weighed by 0.3 * 0.25 + 0.7 * 0.75.
    loss = focal_loss(torch.tensor(0.0), torch.tensor(0.3))
    assert float(loss) == pytest.approx(0.6 * 0.04 * math.log(2))
    logits = torch.linspace(-6, 6, 4801)
    for t in (0.05, 0.3, 0.8):
        losses = focal_loss(logits, torch.full_like(logits, t))
        assert float(logits[losses.argmin()].sigmoid()) == pytest.approx(t, abs=1e-3)
        assert float(losses.min()) == pytest.approx(0, abs=1e-6)


def test_focal_loss_without_focus_is_half_the_cross_entropy():
    logits, target = torch.linspace(-5, 5, 11), torch.linspace(0, 1, 11)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    assert torch.allclose(focal_loss(logits, target, gamma=0, alpha=0.5), entropy / 2)


def test_distribution_focal_loss_by_hand_and_as_in_ultralytics():
    # An edge at 3.2: 0.8 of the cross-entropy with 3, 0.2 of that with 4.
    logits = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    log_prob = logits.log_softmax(-1)[0]
    expected = -(0.8 * log_prob[3] + 0.2 * log_prob[4])
    assert distribution_focal_loss(logits, torch.tensor([3.2])) == pytest.approx(float(expected))

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 4, 16, generator=generator)
    distance = torch.rand(300, 4, generator=generator) * 20 - 2  # some beyond the bins
    ours = with_gradient(lambda z: distribution_focal_loss(z, distance).mean(-1), logits)
    theirs = with_gradient(lambda z: DFLoss(16)(z.view(-1, 16), distance.clone())[:, 0], logits)
    assert torch.allclose(ours[0], theirs[0], atol=1e-6)
    assert torch.allclose(ours[1], theirs[1], atol=1e-6)


@pytest.fixture(scope="module")
def computed_and_assigned():
    """A batch's loss as ultralytics computes it, and the input from which we compute it."""
    network = yolo.build_detector(LESION_TYPES, seed=0).train()
    batch = {
        "img": torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0)),
        "batch_idx": torch.tensor([0.0, 0, 2]),  # the second image has no lesion
        "cls": torch.tensor([[2.0], [6.0], [2.0]]),
        "bboxes": torch.tensor([[0.3, 0.4, 0.2, 0.1], [0.7, 0.6, 0.3, 0.5], [0.5, 0.5, 0.1, 0.1]]),
    }
    with torch.no_grad():
        _, terms = network.loss(batch)
        return terms, network.assigned(batch)


def test_eq_4_is_what_is_trained(computed_and_assigned):
    terms, given = computed_and_assigned
    assert given.lesion.sum() > 10
    ours = total_loss(given)
    for name, value in ours.items():
        assert float(value) == pytest.approx(float(terms[f"{name}_loss"]), rel=1e-4)
    total = sum(float(value) for value in terms.values())
    assert float(sum(ours.values())) == pytest.approx(total, rel=1e-4)


def test_eq_4_without_a_lesion_is_the_class_term_alone():
    given = Assigned(
        torch.zeros(5, 7), torch.zeros(5, 4, 16), torch.zeros(5, 2), torch.zeros(5, 7),
        torch.zeros(5, 4), torch.zeros(5, dtype=torch.bool),
    )  # fmt: skip
    terms = total_loss(given)
    assert terms["box"] == 0 and terms["dfl"] == 0
    # By hand: 35 numbers at one half, 0.5 * 0.75 * 0.5**2 * ln 2 each.
    assert float(terms["cls"]) == pytest.approx(35 * 0.5 * 0.75 * 0.25 * math.log(2))

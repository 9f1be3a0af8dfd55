"""Heat maps, masks and their metrics."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import NETWORKS
from dernet_utils.triage import explain
from dernet_utils.triage.networks import as_input, build_network, predict_probabilities

PX = 64


def noise(n=2, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, 1, PX, PX), dtype=np.uint8))


class Corner(torch.nn.Module):
    """Returns the brightness of the upper left quarter."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (
            self.scale * x[:, :1, : PX // 2, : PX // 2].mean(dim=(1, 2, 3), keepdim=True)[..., 0, 0]
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_cam_is_the_heads_weights_times_the_last_maps(name):
    network = build_network(name).eval()
    head = network.get_classifier()
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
    pixels = noise()
    found = explain.grad_cam(name, network, pixels)
    with torch.no_grad():
        maps = network.forward_features(as_input(pixels))
    # After pooling the head is linear: the gradient of the logit is its weight over the positions.
    by_hand = torch.einsum("c,nchw->nhw", head.weight[0].detach(), maps).clamp(min=0)
    by_hand = by_hand / (maps.shape[2] * maps.shape[3])
    sized = torch.nn.functional.interpolate(by_hand[:, None], (PX, PX), mode="bilinear").squeeze(1)
    assert found.shape == (2, PX, PX) and (found >= 0).all() and found.max() > 0
    assert found == pytest.approx(sized.numpy(), abs=1e-5 * float(found.max()))


def test_grad_cam_leaves_the_network_as_it_was():
    network, pixels = build_network("densenet121").eval(), noise()
    before = predict_probabilities(network, pixels)
    explain.grad_cam("densenet121", network, pixels)
    assert (predict_probabilities(network, pixels) == before).all()
    assert all(parameter.grad is None for parameter in network.parameters())
    with pytest.raises(DernetError, match="knows the layers"):
        explain.grad_cam("vgg", network, pixels)


def test_superpixels_divide_the_image_along_its_edges():
    grey = np.full((PX, PX), 40, np.uint8)
    cv2.circle(grey, (30, 34), 14, 200, -1)
    segments = explain.superpixels(grey, 36)
    assert segments.shape == grey.shape and set(np.unique(segments)) == set(
        range(segments.max() + 1)
    )
    assert 18 <= segments.max() + 1 <= 36
    mixed = 0
    for number in range(segments.max() + 1):
        fraction = (grey[segments == number] > 100).mean()
        mixed += min(fraction, 1 - fraction) * (segments == number).sum()
    assert mixed / (grey > 100).sum() < 0.15  # pixels on the wrong side, per pixel of the disc
    assert (explain.superpixels(grey, 36) == segments).all()
    flat = explain.superpixels(np.zeros((32, 48), np.uint8), 16)
    assert flat.max() == 15 and np.bincount(flat.ravel()).min() > 40


def test_lime_finds_the_patches_that_matter():
    y, x = np.mgrid[:PX, :PX]
    segments = (y // 16) * 4 + x // 16
    grey = np.where((y // 8 + x // 8) % 2, 255, 0).astype(np.uint8)
    grey[:32, :32] = 255  # what is blurred away here makes the corner darker
    grey[32:, 32:] = 0
    pixels = torch.from_numpy(grey)[None, None]
    weights = explain.lime(Corner().eval(), pixels, segments, samples=150)
    corner = [0, 1, 4, 5]
    others = [k for k in range(16) if k not in corner]
    assert weights[corner].max() > 5 * np.abs(weights[others]).max()
    heat = explain.spread_over(weights, segments)
    mask = np.zeros((PX, PX), bool)
    mask[:32, :32] = True
    assert explain.pointing(heat, mask) == 1 and explain.energy(heat, mask) > 0.9
    again = explain.lime(Corner().eval(), pixels, segments, samples=150)
    other = explain.lime(Corner().eval(), pixels, segments, samples=150, seed=7)
    assert (again == weights).all() and not (other == weights).all()


def test_lime_leaves_torchs_generator_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    explain.lime(Corner().eval(), noise(1), np.arange(PX * PX).reshape(PX, PX) // 1024, samples=20)
    assert (torch.rand(2) == wanted).all()


def disc(centre=(60, 50), radius=12):
    grey = np.random.default_rng(0).normal(80, 8, (120, 110))
    truth = np.zeros(grey.shape, np.uint8)
    cv2.circle(truth, centre, radius, 1, -1)
    grey[truth > 0] += 90
    return grey.clip(0, 255).astype(np.uint8), truth.astype(bool)


def test_a_mask_is_the_lesion_and_not_its_box():
    grey, truth = disc()
    box = np.array([44.0, 34.0, 77.0, 67.0])
    found = explain.lesion_mask(grey, box)
    assert explain.overlap(found, truth)[0] > 0.9
    assert (explain.lesion_mask(grey, box, np.zeros(grey.shape)) == found).all()
    heat = cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 6)
    assert explain.overlap(explain.lesion_mask(grey, box, heat), truth)[0] > 0.9
    assert not explain.lesion_mask(grey, box)[:, :44].any()


def test_edges_of_a_mask():
    grey, _ = disc()
    flat = explain.lesion_mask(np.zeros((40, 40), np.uint8), np.array([5, 5, 15, 15]))
    assert (
        flat.any() and not (flat & ~explain.ellipse_in(np.array([5, 5, 15, 15]), (40, 40), 1)).any()
    )
    whole = explain.lesion_mask(grey, np.array([-5.0, -5, 500, 500]))  # cut off at the edges
    assert whole.any() and not whole[0, 0] and not whole[-1, -1]
    tiny = explain.lesion_mask(grey, np.array([3.2, 4.1, 3.9, 4.4]))
    assert tiny.sum() == 1 and tiny[4, 3]
    with pytest.raises(DernetError, match="no pixel"):
        explain.lesion_mask(grey, np.array([200, 10, 210, 20]))
    with pytest.raises(DernetError, match="pixels"):
        explain.lesion_mask(grey, np.array([1, 1, 9, 9]), np.zeros((3, 3)))


def test_ellipse_by_its_area():
    found = explain.ellipse_in(np.array([10.0, 20, 110, 80]), (100, 120), 1.0)
    assert found.sum() == pytest.approx(np.pi * 50 * 30, rel=0.01)
    rows, columns = np.nonzero(found)
    assert [columns.min(), rows.min(), columns.max(), rows.max()] == [10, 20, 109, 79]


def test_filled_box_is_cut_off_at_the_edges():
    held = explain.filled_box(np.array([-3.0, 1.6, 4.2, 50]), (8, 6))
    assert held.sum() == 4 * 6 and held[2:, :4].all()


def test_a_constant_map_scores_the_masks_fraction():
    mask = np.zeros((10, 10), bool)
    mask[:3] = True
    for heat in (np.zeros((10, 10)), np.full((10, 10), 2.0)):
        assert explain.pointing(heat, mask) == pytest.approx(0.3)
        assert explain.energy(heat, mask) == pytest.approx(0.3)


@given(arrays(float, (6, 5), elements=st.floats(0, 9)), arrays(bool, (6, 5)))
def test_metrics_inside_and_outside_a_mask_sum_to_one(heat, mask):
    for metric in (explain.pointing, explain.energy):
        assert metric(heat, mask) + metric(heat, ~mask) == pytest.approx(1)


@pytest.mark.parametrize("bad", [np.array([[np.nan, 1.0]]), np.array([[-1.0, 1.0]])])
def test_an_invalid_map_is_refused(bad):
    with pytest.raises(DernetError, match="finite"):
        explain.energy(bad, np.array([[True, False]]))
    with pytest.raises(DernetError, match="shape"):
        explain.pointing(np.ones((2, 2)), np.ones((3, 3), bool))


def test_overlap_of_empty_masks_is_undefined():
    empty = np.zeros((2, 2), bool)
    assert np.isnan(explain.overlap(empty, empty)).all()
    assert explain.overlap(empty, ~empty) == (0, 0)


def test_removal_begins_with_the_image_and_ends_blurred():
    grey = np.zeros((PX, PX), np.uint8)
    grey[:16, :16] = 255
    pixels = torch.from_numpy(grey)[None, None]

    def score(shown):
        return shown[:, 0, :16, :16].float().mean(dim=(1, 2)).numpy()

    hot = (grey > 0).astype(float)
    removed = explain.removal_curve(score, pixels, hot, steps=16)
    assert removed[0] == 255 and (np.diff(removed) <= 0).all()
    assert removed[1] == removed[-1]  # the square is a sixteenth of the image
    restored = explain.removal_curve(score, pixels, hot, steps=16, insert=True)
    assert restored[-1] == 255 and restored[1] == 255 and restored[0] == removed[-1]
    late = explain.removal_curve(score, pixels, 1 - hot, steps=16)
    assert late[:-1].min() > removed[1]
    centre = explain.centred_map((9, 9))
    assert centre.argmax() == 40 and centre[0, 0] == pytest.approx(np.exp(-4))

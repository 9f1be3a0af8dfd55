"""Rays through bodies of known thickness."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from dernet_utils.virtual.donor import Donor
from dernet_utils.virtual.lesions import Lesion
from dernet_utils.virtual.projection import Block, Scene, Shape, View
from dernet_utils.virtual.spine import Vertebra

CUBE_MM = 100.0


@pytest.fixture
def body() -> list[Vertebra]:
    up, front = np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0])
    return [
        Vertebra(name, np.array([75.0, 75.0, z]), up, front, 20.0, 25.0, 30.0)
        for name, z in (("L2", 50.0), ("L1", 100.0))
    ]


def scene_of(hu: float, body: list[Vertebra]) -> Scene:
    """Return a cube of 100 mm of one material in the middle of 150 mm of air."""
    density = np.zeros((76, 76, 76), np.float32)
    density[:, 13:63, 13:63] = hu + 1000.0
    labels = np.zeros(density.shape, np.uint8)
    z = np.linspace(-100.0, 300.0, 41)
    shape = Shape(z, z, 0 * z, 0 * z, 0 * z, girth=1.0, bone=1.0)
    return Scene(Donor(density, (2.0,) * 3, labels, (2.0,) * 3), body, shape)


def view_of(name: str = "AP", angle: float = 0.0) -> View:
    return View(name, angle, np.array([75.0, 75.0, 75.0]), 40.0, 40.0, 0.0, False)


@pytest.mark.parametrize("angle", [0.0, np.pi / 2])
def test_water_is_ten_grams_a_square_centimetre_thick(body, angle):
    paths = scene_of(0.0, body).paths(view_of(angle=angle), [])
    assert np.allclose(paths.soft, CUBE_MM / 10.0, rtol=0.03)
    assert not paths.bone.any() and not paths.metal.any()


def test_pure_bone_weighs_its_density(body):
    paths = scene_of(1600.0, body).paths(view_of(), [])
    assert np.allclose(paths.bone, 1.92 * CUBE_MM / 10.0, rtol=0.03)
    assert paths.soft.max() < 2 * 0.2 * 1.08  # at most in its two outermost voxels, 2 mm each


def test_a_block_is_a_part_of_the_whole(body):
    scene, view = scene_of(0.0, body), view_of()
    whole, steps = scene.paths(view, []), scene.whole(view).steps
    part = scene.paths(view, [], Block((3, 21), (5, 30), steps))
    assert np.allclose(part.soft, whole.soft[3:21, 5:30], atol=1e-4)


def ball(severity: float = 1.0, **how) -> Lesion:
    """A ball of 8 mm in the middle of the cube."""
    centre = np.array([75.0, 75.0, 75.0])

    def region(points):
        square = sum((p - float(c)) ** 2 for p, c in zip(points, centre, strict=True))
        return (0.5 - (square.sqrt() - 8.0)).clamp(0.0, 1.0)

    return Lesion("Other lesions", "ball", "L1", severity, centre, 10.0, 10.0, region, **how)


@pytest.mark.parametrize("how", [{"fill": 2000.0}, {"metal": 4.5}, {"move": lambda points: (
    points[0], points[1], points[2] + 30.0)}])  # fmt: skip
def test_a_finding_is_traced_as_the_rays_with_it_and_without_it(body, how):
    """Two overlapping lesions; one that moves tissue carries the other along."""
    finding, other = ball(0.2, **how), ball(0.7, fill=1400.0)
    scene, view = scene_of(0.0, body), view_of()
    traced = scene.trace(view, [[finding], [other]])
    with_it, without = scene.paths(view, [finding, other]), scene.paths(view, [other])
    for name, path in vars(traced.paths).items():
        assert np.array_equal(path, getattr(with_it, name))
        difference = getattr(without, name) - path
        assert np.allclose(getattr(traced.removed[0], name), difference, atol=2e-5)
    assert not np.array_equal(with_it.soft, without.soft)


def test_a_lesion_on_moved_tissue_is_whole(body):
    """A ball that lies on tissue moved by 12 mm is seen there, as thick as it was."""
    mover = ball(0.5, move=lambda points: (points[0] - 12.0, points[1], points[2]))
    mover = replace(mover, reach_mm=60.0)
    scene, view, other = scene_of(0.0, body), view_of(), ball(0.7, fill=1400.0)
    there = scene.trace(view, [[other]]).lengths_mm[0]
    moved = scene.trace(view, [[mover], [other]]).lengths_mm[1]
    assert there.max() == pytest.approx(16.0, abs=1.0)
    assert np.allclose(moved[:, 24:], there[:, :-24], atol=0.05)
    assert moved[:, :20].max() < 0.5 * there.max()


def test_metal_displaces_water(body):
    lesion = ball(metal=4.5)
    scene = scene_of(0.0, body)
    with_it, without = (scene.paths(view_of(), lesions) for lesions in ([lesion], []))
    middle = tuple(n // 2 for n in with_it.metal.shape)
    assert with_it.metal[middle] == pytest.approx(4.5 * 1.6, rel=0.15)
    assert (without.soft - with_it.soft)[middle] == pytest.approx(1.6, rel=0.15)
    assert with_it.metal[0, 0] == 0.0 and without.metal.max() == 0.0


@pytest.mark.parametrize("view", ["AP", "LATERAL"])
def test_a_lesion_of_severity_zero_changes_nothing(body, view):
    """Its counterfactual equals the radiograph to the last bit."""
    view_at = view_of(view, 0.0 if view == "AP" else np.pi / 2)
    for finding in (ball(0.0, move=lambda points: points), replace(ball(0.0, fill=2000.0),
                    region=lambda points: torch.zeros_like(points[0]))):  # fmt: skip
        traced = scene_of(0.0, body).trace(view_at, [[finding]])
        assert not any(path.any() for path in vars(traced.removed[0]).values())


def test_sampling_is_trilinear_and_ends_in_air(body):
    rng = np.random.default_rng(0)
    density = rng.uniform(0.0, 2000.0, (20, 24, 28)).astype(np.float32)
    density[:, [0, -1]] = 0.0
    scene = scene_of(0.0, body)
    scene.density, scene.spacing_mm = density, (1.25, 0.7, 0.8)
    x, y, z = (rng.uniform(-5.0, n, (6, 7, 50)).astype(np.float32) for n in (26.0, 20.0, 26.0))
    voxels = np.stack([z / 1.25, y / 0.7, x / 0.8])
    expected = ndimage.map_coordinates(density, voxels, order=1, mode="grid-constant")
    found = scene._sample(x, y, z)
    inside = (voxels[0] >= 0.0) & (voxels[0] <= 19.0)
    assert np.abs(found - expected)[inside].max() < 2000.0 * 3 / 32  # weights in 32nds of a voxel
    assert np.abs(found - expected)[inside].mean() < 8.0
    assert not found[~inside].any()


def test_projection_leaves_the_volume_as_it_was(body):
    scene = scene_of(0.0, body)
    before = scene.density.copy()
    scene.paths(view_of(), [ball(fill=2000.0)])
    assert np.array_equal(before, scene.density)

"""The donor's volume: contrast agent gone, and bone finer than the scan."""

import numpy as np
import pytest

from dernet_utils.virtual.bone import CORTEX, NORMAL, add_fine_bone, fine_grid, refine
from dernet_utils.virtual.tissue import body_mask, remove_contrast_agent

SIZES = (2.5, 1.0, 1.0)
MIDDLE = np.array([30.0, 40.0, 40.0])  # z, y, x in mm of the vertebra's centre


def grid(shape: tuple, sizes: tuple) -> list[np.ndarray]:
    return [axis * size for axis, size in zip(np.indices(shape), sizes, strict=True)]


@pytest.fixture(scope="module")
def vertebra() -> dict[str, np.ndarray]:
    """A scanned ball of 12 mm with a blurred cortex, in muscle, before and after."""
    shape = (25, 80, 80)
    coarse = np.sqrt(sum((p - m) ** 2 for p, m in zip(grid(shape, SIZES), MIDDLE, strict=True)))
    labels = np.where(coarse < 12.0, 33, 0).astype(np.uint8)
    scan = 1050.0 + 60.0 * (coarse < 12) + 400.0 * np.exp(-((coarse - 12.0) ** 2) / 4.0)
    counts, spacing_mm = fine_grid(shape, SIZES)
    at = [np.linspace(0.0, n - 1, count) for n, count in zip(shape, counts, strict=True)]
    before = refine(scan, at)
    after = before.copy()
    add_fine_bone(after, spacing_mm, labels, SIZES)
    radius = [(p - m) for p, m in zip(grid(counts, spacing_mm), MIDDLE, strict=True)]
    return {"before": before, "after": after, "from_centre": np.stack(radius)}


def test_a_cortex_closes_the_vertebra_on_all_sides(vertebra):
    radius = np.linalg.norm(vertebra["from_centre"], axis=0)
    near = np.abs(radius - 12.0) < 2.5
    directions = vertebra["from_centre"][:, near] / radius[near]
    dense = vertebra["after"][near] > 0.5 * (CORTEX + NORMAL)
    for axis in np.vstack([np.eye(3), -np.eye(3), [[0.6, 0.8, 0.0], [0.0, -0.6, 0.8]]]):
        cone = axis @ directions > 0.98
        thickness = dense[cone].mean() * 5.0
        assert 0.4 < thickness < 2.0


def test_the_interior_has_normal_bone_and_a_texture(vertebra):
    radius = np.linalg.norm(vertebra["from_centre"], axis=0)
    inside = vertebra["after"][radius < 9.0]
    assert inside.mean() == pytest.approx(NORMAL, abs=15.0)
    assert 0.15 < inside.std() / (NORMAL - 1000.0) < 0.35
    z = np.abs(np.diff(vertebra["after"], axis=0))[radius[1:] < 8.0].mean()
    x = np.abs(np.diff(vertebra["after"], axis=2))[radius[:, :, 1:] < 8.0].mean()
    assert z < 0.6 * x, "trabeculae run along the spine"


def test_what_the_scanner_smeared_around_is_gone(vertebra):
    radius = np.linalg.norm(vertebra["from_centre"], axis=0)
    around, far = (radius > 12.8) & (radius < 13.3), radius > 20.0
    assert vertebra["before"][around].mean() > 1250.0
    assert vertebra["after"][around].mean() < 1100.0
    assert np.array_equal(vertebra["after"][far], vertebra["before"][far])


def chest() -> tuple[np.ndarray, np.ndarray, dict]:
    """HU + 1000 and labels of a chest of 30 slices: lungs, aorta, rib, rib head and a vertebra."""
    shape, sizes = (30, 240, 320), (2.5, 1.0, 1.0)
    _, y, x = np.indices(shape)

    def disc(centre_y: float, centre_x: float, radius: float) -> np.ndarray:
        return (y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2

    density = np.zeros(shape)
    body = ((y - 120) / 105) ** 2 + ((x - 160) / 150) ** 2 < 1
    density[body] = 1040.0
    for centre in (90, 230):
        density[((y - 125) / 75) ** 2 + ((x - centre) / 55) ** 2 < 1] = 150.0
    parts = {
        "vertebra": disc(60, 160, 15), "aorta": disc(92, 150, 12),
        "rib": disc(120, 20, 4), "rib head": disc(48, 190, 5),
    }  # fmt: skip
    for name, level in (("vertebra", 1250.0), ("aorta", 1350.0), ("rib", 1600.0)):
        density[parts[name]] = level
    density[parts["rib head"]] = 1500.0
    labels = np.where(parts["vertebra"], 33, 0).astype(np.uint8)
    return density, labels, parts | {"sizes": sizes}


def test_an_enhanced_aorta_becomes_blood_and_bone_stays():
    density, labels, parts = chest()
    changed = remove_contrast_agent(density, labels, body_mask(density), parts["sizes"])
    for name in ("vertebra", "rib", "rib head"):
        assert np.array_equal(changed[parts[name]], density[parts[name]])
    assert np.median(changed[parts["aorta"]]) < 1080.0
    thin = density < 1045.0
    assert np.array_equal(changed[thin], density[thin])


def test_refining_keeps_voxels_and_straight_lines():
    z, y, x = np.indices((6, 7, 8)).astype(float)
    line = 100.0 + 30.0 * z - 12.0 * y + 5.0 * x
    at = [np.linspace(1.0, n - 2.0, 4 * (n - 3) + 1) for n in line.shape]
    found = refine(line, at)
    expected = 100.0 + 30.0 * at[0][:, None, None] - 12.0 * at[1][:, None] + 5.0 * at[2]
    assert np.allclose(found, expected, atol=1e-3)
    wild = np.random.default_rng(0).uniform(0.0, 3000.0, line.shape)
    assert np.allclose(refine(wild, at)[::4, ::4, ::4], wild[1:-1, 1:-1, 1:-1], atol=0.01)

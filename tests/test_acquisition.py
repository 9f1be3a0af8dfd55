"""Attenuation by hand, and the image that detector and processing make of it."""

import numpy as np
import pytest
import xraylib
from scipy import ndimage

from dernet_utils.virtual.acquisition import (
    CORTICAL_BONE,
    ENERGY_WEIGHTS,
    TITANIUM,
    WATER,
    DisplayProcessing,
    Paths,
    expose,
    transmission,
)

# Cortical bone of ICRU report 44: mass fraction of each element.
BONE_ICRU_44 = {
    "H": 0.034, "C": 0.155, "N": 0.042, "O": 0.435, "Na": 0.001,
    "Mg": 0.002, "P": 0.103, "S": 0.003, "Ca": 0.225,
}  # fmt: skip


def test_attenuation_is_that_of_an_independent_table():
    """xraylib has tables of its own; they agree with NIST's to a part in a thousand."""
    for at, kev in enumerate((40.0, 60.0, 80.0)):
        bone = sum(
            fraction * xraylib.CS_Total(xraylib.SymbolToAtomicNumber(symbol), kev)
            for symbol, fraction in BONE_ICRU_44.items()
        )
        assert CORTICAL_BONE[at] == pytest.approx(bone, rel=1e-3)
        assert WATER[at] == pytest.approx(xraylib.CS_Total_CP("H2O", kev), rel=1e-3)
        assert TITANIUM[at] == pytest.approx(xraylib.CS_Total(22, kev), rel=1e-3)


@pytest.mark.parametrize(("kvp", "end"), [(70.0, 0), (90.0, 1)])
def test_beer_and_lambert_by_hand(kvp, end):
    paths = Paths(np.array([[0.0, 10.0]]), np.array([[0.0, 2.0]]), np.array([[0.0, 0.5]]))
    weights = ENERGY_WEIGHTS[end]
    by_hand = sum(
        w * np.exp(-(10.0 * a + 2.0 * b + 0.5 * c))
        for w, a, b, c in zip(weights, WATER, CORTICAL_BONE, TITANIUM, strict=True)
    )
    assert transmission(paths, kvp)[0, 0] == pytest.approx(1.0)  # air stops nothing
    assert transmission(paths, kvp)[0, 1] == pytest.approx(by_hand)


def water(cm: float, kvp: float) -> float:
    paths = Paths(np.array([[cm]]), np.zeros((1, 1)), np.zeros((1, 1)))
    return float(-np.log(transmission(paths, kvp))[0, 0])


def test_thickness_and_voltage_harden_the_beam():
    """Twice the water has less than twice the attenuation; a higher voltage lowers it."""
    assert water(15.0, 80.0) < water(30.0, 80.0) < 2 * water(15.0, 80.0)
    assert water(15.0, 90.0) < water(15.0, 80.0) < water(15.0, 70.0)


def signal_of(arrived: np.ndarray, dose: float = 2.0, grid: float = 0.0) -> np.ndarray:
    return expose(arrived, 0.3, dose, 0.2, grid, np.random.default_rng(0))


def test_noise_falls_with_the_root_of_the_exposure():
    spread = [signal_of(np.full((200, 200), 0.01), dose).std() for dose in (0.25, 4.0)]
    assert spread[0] / spread[1] == pytest.approx(4.0, rel=0.1)


def test_a_stationary_grid_leaves_its_lines():
    signal = signal_of(np.full((120, 120), 0.01), 4000.0, grid=6.0)
    spectrum = np.abs(np.fft.rfft(signal.mean(axis=0) - 1.0))
    assert spectrum.argmax() == 120 / 6


@pytest.fixture
def developed() -> DisplayProcessing:
    arrived = np.full((240, 200), 0.02)
    arrived[80:160, 60:140] = 0.01
    return DisplayProcessing(signal_of(arrived), 0.5, contrast=1.0, detail=1.8)


def test_a_dense_part_is_white(developed):
    grey = developed.grey
    assert grey.min() >= 0.0 and grey.max() <= 1.0
    assert grey[120, 100] > grey[5, 5]


def test_a_change_is_the_other_image_less_this_one(developed):
    """Compared with processing the whole other image to the same tone."""
    extra = np.zeros(developed.grey.shape)
    extra[100:120, 90:115] = 0.15
    part, change = developed.change(extra)
    other = developed.dense + ndimage.gaussian_filter(extra, np.hypot(0.18, 0.12) / 0.5)
    whole = developed._curve(developed._enhance(other) - developed.slow) - developed.grey
    assert change.max() > 0.05
    assert np.abs(whole[part] - change).max() < 0.01
    outside = np.ones(whole.shape, bool)
    outside[part] = False
    assert np.abs(whole[outside]).max() < 0.01


def test_no_change_is_no_part(developed):
    part, change = developed.change(np.zeros(developed.grey.shape))
    assert change.size == 0 and developed.grey[part].size == 0

"""Acquisition: Beer–Lambert attenuation, scatter, the detector, and processing for display.

Turns the integrals along the rays (from `projection`) into a detector's signal, then grey values.
"""

from dataclasses import dataclass

import cv2
import numpy as np

SOURCE_MM = 950.0  # focal spot to spine
DETECTOR_MM = 1150.0  # focal spot to detector: the spine is 200 mm in front of it
# Mass attenuation in cm²/g at 40, 60 and 80 keV: NIST, X-ray mass attenuation coefficients
# (water, ICRU-44 cortical bone, titanium). The weights of the energies stand for filtered beams at
# two tube voltages; between these, they are interpolated.
KVP = (70.0, 90.0)
ENERGY_WEIGHTS = np.array([[0.40, 0.48, 0.12], [0.27, 0.50, 0.23]])
WATER = np.array([0.2683, 0.2059, 0.1837])
CORTICAL_BONE = np.array([0.6655, 0.3148, 0.2229])
TITANIUM = np.array([2.214, 0.7661, 0.4052])
FOCUS_MM = 0.18  # SD of the focal spot's blur at the spine; 0.6 mm alone cause less (about 0.03)
SCINTILLATOR_MM = 0.12  # SD of the detector's blur
QUANTA = 30_000.0  # per µGy and mm²: IEC 62220-1, RQA5
# Display processing: presets for the spine equalise the field less than the chest's, and enhance
# edges moderately; our choice, by eye.
SLOW_MM = 20.0  # SD of the Gaussian that shows the slow variation
SLOW = 0.6  # fraction of it that is taken away


@dataclass(frozen=True)
class Paths:
    """What each ray passed through, g/cm², arrays of shape (rows, columns)."""

    soft: np.ndarray
    bone: np.ndarray
    metal: np.ndarray


def transmission(paths: Paths, kvp: float) -> np.ndarray:
    """Return the transmitted fraction of photons, by the Beer–Lambert law.

    Each of three energies decays by exp(-sum of mass attenuation times path). The result is their
    weighted sum, so a thick part hardens the beam.

    Args:
        paths: What the rays pass through.
        kvp: Tube voltage, kV, within `KVP`.

    Returns:
        Shape (rows, columns), above 0 and at most 1.
    """
    weights = [np.interp(kvp, KVP, column) for column in ENERGY_WEIGHTS.T]
    arrived = np.zeros(paths.soft.shape)
    for weight, water, bone, metal in zip(weights, WATER, CORTICAL_BONE, TITANIUM, strict=True):
        arrived += weight * np.exp(-(water * paths.soft + bone * paths.bone + metal * paths.metal))
    return arrived


def scattered_radiation(arrived: np.ndarray, spacing_mm: float, scatter: float) -> np.ndarray:
    """Return the scattered radiation behind the grid, as a fraction of what left the tube, (H, W).

    Args:
        arrived: Transmitted fraction of photons, shape (H, W).
        spacing_mm: Pixel size in the plane of the spine.
        scatter: Ratio of scattered to primary radiation.
    """
    return scatter * _smooth(arrived, 25.0 / spacing_mm)


def expose(
    arrived: np.ndarray,
    spacing_mm: float,
    dose_ugy: float,
    scatter: float,
    grid_lines_px: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Turn transmission into a detector's signal: scatter, focal spot, grid, quanta, blur.

    Args:
        arrived: Transmitted fraction of photons, shape (H, W).
        spacing_mm: Pixel size in the plane of the spine.
        dose_ugy: Target of automatic exposure control: air kerma behind the patient, µGy.
        scatter: Ratio of scattered to primary radiation behind the grid.
        grid_lines_px: Period of a stationary grid's lines, px; 0 for a moving grid.
        rng: Source of the quantum noise.

    Returns:
        Signal relative to its mean, shape (H, W), above 0.
    """
    signal = arrived + scattered_radiation(arrived, spacing_mm, scatter)
    signal = cv2.GaussianBlur(signal, (0, 0), FOCUS_MM / spacing_mm)
    signal = signal / signal.mean()
    if grid_lines_px:
        signal *= 1.0 + 0.02 * np.sin(2 * np.pi * np.arange(signal.shape[1]) / grid_lines_px)
    photons = dose_ugy * QUANTA * (spacing_mm * DETECTOR_MM / SOURCE_MM) ** 2
    quanta = rng.poisson(signal * photons).astype(np.float64) / photons
    blurred = cv2.GaussianBlur(quanta, (0, 0), SCINTILLATOR_MM / spacing_mm)
    return np.maximum(blurred, 1e-4)


class DisplayProcessing:
    """Processing of a detector's signal into grey values for reading.

    As in radiography systems, a logarithm makes thicknesses add, slow variation is reduced so that
    the whole field is readable, detail is enhanced, and an S-shaped tone curve is applied. The
    parameters adapted to the image are kept, so that its counterfactuals are processed alike.

    Args:
        signal: As `expose` returns it, shape (H, W).
        spacing_mm: Pixel size in the plane of the spine.
        contrast: Steepness of the tone curve.
        detail: Gain of fine structures (band between Gaussians of 0.8 and 5 mm).

    Attributes:
        grey: The processed image, 0 black to 1 white, shape (H, W).
    """

    def __init__(self, signal: np.ndarray, spacing_mm: float, contrast: float, detail: float):
        self.spacing_mm, self.contrast, self.detail = spacing_mm, contrast, detail
        self.dense = -np.log(signal)
        # Metal does not count in the adaptation: it would darken everything else.
        self.ceiling = np.percentile(self.dense, 90.0) + 0.3
        slow = _smooth(np.minimum(self.dense, self.ceiling), SLOW_MM / spacing_mm)
        self.slow = SLOW * (slow - slow.mean())
        image = self._enhance(self.dense) - self.slow
        self.low, high = np.percentile(image, (2.0, 90.0))
        self.high = high + 0.25 * (high - self.low)
        self.grey = self._curve(image)

    def change(self, extra: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
        """Return how another density would change the processed image.

        Args:
            extra: The other density less this image's (natural logarithm), shape (H, W), zero
                outside some part.

        Returns:
            Rows and columns of the part, and the other image's grey less this one's there; both
            empty where `extra` is zero everywhere.
        """
        reach = int(np.ceil(15.0 / self.spacing_mm))  # three deviations of the widest filter
        spans = []
        for axis, size in ((1, extra.shape[0]), (0, extra.shape[1])):
            where = np.flatnonzero(extra.any(axis=axis))
            if not len(where):
                return np.s_[0:0, 0:0], np.zeros((0, 0))
            spans.append((where[0] - reach, where[-1] + 1 + reach, size))
        # The filters get a second margin of that width, so that the part's rim is exact too.
        wide = tuple(slice(max(a - reach, 0), min(b + reach, size)) for a, b, size in spans)
        part = tuple(slice(max(a, 0), min(b, size)) for a, b, size in spans)
        inner = tuple(
            slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, wide, strict=True)
        )
        blur = np.hypot(FOCUS_MM, SCINTILLATOR_MM) / self.spacing_mm
        here = self.dense[wide]
        there = here + cv2.GaussianBlur(extra[wide].astype(np.float64), (0, 0), blur)
        here, there = (self._curve(self._enhance(d) - self.slow[wide]) for d in (here, there))
        return part, (there - here)[inner]

    def _enhance(self, dense: np.ndarray) -> np.ndarray:
        middle = _smooth(np.minimum(dense, self.ceiling), 5.0 / self.spacing_mm)
        fine = np.minimum(_smooth(dense, 0.8 / self.spacing_mm), self.ceiling)
        return dense + self.detail * (fine - middle)

    def _curve(self, image: np.ndarray) -> np.ndarray:
        scaled = (image - self.low) / (self.high - self.low) * 2.0 - 1.0
        curve = 0.5 + 0.5 * np.tanh(self.contrast * scaled) / np.tanh(self.contrast)
        return np.clip(curve, 0.0, 1.0)


def _smooth(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Blur by a Gaussian; a wide one on a smaller copy, which is much faster."""
    shrink = max(1, int(sigma_px / 6.0))
    small = cv2.resize(image, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma_px / shrink, borderType=cv2.BORDER_REFLECT)
    return cv2.resize(small, image.shape[::-1], interpolation=cv2.INTER_CUBIC)

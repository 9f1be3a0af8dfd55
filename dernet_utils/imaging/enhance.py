"""Contrast-limited adaptive histogram equalisation (CLAHE, Eq. 1), then shrinking."""

from pathlib import Path

import cv2
import numpy as np

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.grey_levels import LEVELS


def clahe(grey: np.ndarray, clip_limit: float = 2.0, tiles: int = 8) -> np.ndarray:
    """Enhance local contrast by contrast-limited adaptive histogram equalisation (OpenCV).

    Args:
        grey: uint8 (H, W).
        clip_limit: Greatest count of a histogram bin, in multiples of the mean count; above 0.
        tiles: Number of contextual regions per side; at least 1.

    Returns:
        uint8 (H, W).

    Raises:
        DernetError: The image is not uint8 (H, W), or a number is out of its range.

    Source: the paper's Eq. 1 and section 3.1 (clip limit 2.0).

    >>> clahe(np.full((16, 16), 90, np.uint8)).shape
    (16, 16)
    """
    _check_clahe(grey, clip_limit, tiles)
    return cv2.createCLAHE(float(clip_limit), (tiles, tiles)).apply(np.ascontiguousarray(grey))


def clahe_by_hand(grey: np.ndarray, clip_limit: float = 2.0, tiles: int = 8) -> np.ndarray:
    """Compute `clahe` step by step with numpy; the two agree within one grey level.

    Arguments, result and errors are those of `clahe`. Chapter 02 explains each step.

    >>> ramp = np.arange(64 * 64).reshape(64, 64) // 16
    >>> grey = ramp.astype(np.uint8)
    >>> int(np.abs(clahe_by_hand(grey).astype(int) - clahe(grey)).max()) <= 1
    True
    """
    _check_clahe(grey, clip_limit, tiles)
    padded = _pad_to_tiles(grey, tiles)
    tile_h, tile_w = padded.shape[0] // tiles, padded.shape[1] // tiles
    histograms = _tile_histograms(padded, tiles)
    clipped = _clip_histograms(histograms, max(1, int(clip_limit * tile_h * tile_w / LEVELS)))
    cdf = np.cumsum(clipped, axis=-1) / (tile_h * tile_w)
    return _blend(grey, np.rint((LEVELS - 1) * cdf), tile_h, tile_w)


def preprocess(grey: np.ndarray, long_side_px: int, clip_limit: float, tiles: int) -> np.ndarray:
    """Enhance at full size, then shrink. Training and inference both call this function.

    Args:
        grey: `Radiograph.pixels`, uint8 (H, W).
        long_side_px: Largest long side of the result; a smaller image is not enlarged.
        clip_limit: As in `clahe`.
        tiles: As in `clahe`.

    Returns:
        uint8 (h, w) of the same proportions.

    Raises:
        DernetError: As in `clahe`.

    >>> preprocess(np.zeros((100, 50), np.uint8), 40, 2.0, 8).shape
    (40, 20)
    """
    enhanced = clahe(grey, clip_limit, tiles)
    scale = shrink_factor(grey.shape, long_side_px)
    if scale == 1:
        return enhanced
    height, width = (max(1, round(side * scale)) for side in grey.shape)
    return cv2.resize(enhanced, (width, height), interpolation=cv2.INTER_AREA)


def shrink_factor(shape: tuple[int, ...], long_side_px: int) -> float:
    """Return the scale, at most 1, that makes an image's long side `long_side_px` or less.

    >>> shrink_factor((100, 50), 40), shrink_factor((30, 20), 40)
    (0.4, 1.0)
    """
    return min(1.0, long_side_px / max(shape))


# --- The steps of Eq. 1 -----------------------------------------------------------------------


def _check_clahe(grey: np.ndarray, clip_limit: float, tiles: int) -> None:
    """Raise the DernetError of `clahe`."""
    if (
        not isinstance(grey, np.ndarray)
        or grey.dtype != np.uint8
        or grey.ndim != 2
        or not grey.size
    ):
        came = getattr(grey, "dtype", type(grey).__name__), getattr(grey, "shape", ())
        raise DernetError(
            f"CLAHE takes an 8-bit grey image, uint8 (H, W), not {came[0]} {came[1]}; decode it "
            "with read_radiograph first."
        )
    if not clip_limit > 0 or tiles < 1:
        raise DernetError(
            "CLAHE takes a clip limit above 0 and at least one tile per side, not "
            f"{clip_limit} and {tiles}."
        )


def _pad_to_tiles(grey: np.ndarray, tiles: int) -> np.ndarray:
    """Mirror the image at its lower and right borders, so that the tiles divide it evenly.

    As in OpenCV, both sides are padded where either needs it; a side that already fits gains one
    pixel per tile.
    """
    height, width = grey.shape
    if height % tiles == 0 and width % tiles == 0:
        return grey
    return np.pad(grey, ((0, tiles - height % tiles), (0, tiles - width % tiles)), mode="reflect")


def _tile_histograms(padded: np.ndarray, tiles: int) -> np.ndarray:
    """Return the count of each grey level in each tile, int (tiles, tiles, 256)."""
    height, width = padded.shape
    rows = np.arange(height) // (height // tiles)
    columns = np.arange(width) // (width // tiles)
    tile = rows[:, None] * tiles + columns
    counts = np.bincount((tile * LEVELS + padded).ravel(), minlength=tiles * tiles * LEVELS)
    return counts.reshape(tiles, tiles, LEVELS)


def _clip_histograms(histograms: np.ndarray, limit: int) -> np.ndarray:
    """Clip bins at the limit; spread the excess over all bins, its remainder at even steps."""
    excess = np.maximum(histograms - limit, 0).sum(axis=-1, keepdims=True)
    per_bin, remainder = np.divmod(excess, LEVELS)
    step = np.maximum(LEVELS // np.maximum(remainder, 1), 1)
    bins = np.arange(LEVELS)
    receives_one_more = (bins % step == 0) & (bins // step < remainder)
    return np.minimum(histograms, limit) + per_bin + receives_one_more


def _blend(grey: np.ndarray, tables: np.ndarray, tile_h: int, tile_w: int) -> np.ndarray:
    """Map each pixel through the tables of its four nearest tiles, interpolated bilinearly."""
    last = tables.shape[0] - 1
    y = np.arange(grey.shape[0])[:, None] / tile_h - 0.5
    x = np.arange(grey.shape[1])[None, :] / tile_w - 0.5
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = y - top, x - left
    y0, y1 = np.clip(top, 0, last), np.clip(top + 1, 0, last)
    x0, x1 = np.clip(left, 0, last), np.clip(left + 1, 0, last)
    upper = (1 - right) * tables[y0, x0, grey] + right * tables[y0, x1, grey]
    lower = (1 - right) * tables[y1, x0, grey] + right * tables[y1, x1, grey]
    return np.rint((1 - down) * upper + down * lower).astype(np.uint8)


def load_cached(path: Path | str) -> np.ndarray:
    """Read a cached image.

    Args:
        path: A PNG that `cache_images` wrote.

    Returns:
        uint8 (h, w).

    Raises:
        DernetError: The file is missing or not a PNG.
    """
    grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise DernetError(
            f"{path} cannot be read as a cached image; run cache_images (or `dernet prepare`) "
            "to make it again."
        )
    return grey

"""From a DICOM image's stored values to 8-bit grey: modality LUT, VOI LUT or window, inversion.

`pydicom.pixels` does not render every file that occurs: it refuses narrow windows and 8-bit LUTs
packed two entries to a word, and with a VOI LUT of 8-bit entries it wraps positions beyond 255.
"""

import math

import numpy as np
import pydicom

LEVELS = 256  # grey levels of an 8-bit image


def to_grey_levels(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Map stored values to 8-bit grey, as `decode_dicom` describes.

    Args:
        dataset: The image's header.
        stored: Its stored values, integers (H, W).

    Returns:
        uint8 (H, W), 0 black and 255 white.

    Raises:
        Exception: A LUT or window is malformed: ValueError, or whatever pydicom raises when it
            converts a header's value.
    """
    padding = _is_padding(dataset, stored)
    fraction = _apply_voi(dataset, _apply_modality(dataset, stored), ~padding)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        fraction = 1 - fraction
    return to_uint8(np.where(padding, 0.0, fraction))


def stretch(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Map values linearly to fractions: the least valid value to 0, the greatest to 1.

    Args:
        values: Numbers, any shape.
        valid: Which values set the range, bool of the same shape; None means all.

    Returns:
        Floats of the same shape, clipped to [0, 1]; all 0 where the valid values are equal.

    >>> stretch(np.array([1000, 1255, 1510])).tolist()
    [0.0, 0.5, 1.0]
    """
    chosen = values if valid is None else values[valid]
    low, high = (chosen.min(), chosen.max()) if chosen.size else (0.0, 0.0)
    if low == high:
        return np.zeros(values.shape)
    return np.clip((values - low) / (high - low), 0, 1)


def to_uint8(fraction: np.ndarray) -> np.ndarray:
    """Round fractions, 0 to 1, to the nearest grey level, uint8 of the same shape.

    >>> to_uint8(np.array([0.0, 0.5, 1.0])).tolist()
    [0, 128, 255]
    """
    return np.rint(fraction * (LEVELS - 1)).astype(np.uint8)


# --- The standard's steps ---------------------------------------------------------------------


def _is_padding(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Return which stored values are pixel padding (PS3.3 C.7.5.1.1.2)."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(stored.shape, bool)
    bits, signed = dataset.BitsAllocated, dataset.PixelRepresentation == 1
    ends = (_with_sign(end, bits, signed) for end in (value, value if limit is None else limit))
    low, high = sorted(ends)
    return (stored >= low) & (stored <= high)


def _apply_modality(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Map stored values to the modality's values, float (PS3.3 C.11.1)."""
    if dataset.get("ModalityLUTSequence"):
        item = dataset.ModalityLUTSequence[0]
        signed = dataset.PixelRepresentation == 1
        return _look_up(_lut_table(dataset, item), item, stored, signed)
    slope, intercept = _rescale(dataset)
    return stored * slope + intercept


def _apply_voi(dataset: pydicom.Dataset, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Map the modality's values to fractions of the display's range (PS3.3 C.11.2)."""
    if dataset.get("VOILUTSequence"):
        item = dataset.VOILUTSequence[0]
        table = _lut_table(dataset, item)
        return _look_up(table / _lut_top(item, table), item, values, _may_be_negative(dataset))
    center, width = _first(dataset, "WindowCenter"), _first(dataset, "WindowWidth")
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    narrowest = 1 if function == "LINEAR" else np.finfo(float).tiny
    if center is not None and width is not None and width >= narrowest:
        return _apply_window(values, center, width, function)
    return stretch(values, valid)


def _rescale(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Return slope and intercept; 1 and 0 where they are absent."""
    slope, intercept = _first(dataset, "RescaleSlope"), _first(dataset, "RescaleIntercept")
    return 1.0 if slope is None else slope, intercept or 0.0


def _may_be_negative(dataset: pydicom.Dataset) -> bool:
    """Return whether a value of the modality's may be negative, by the header alone."""
    if dataset.get("ModalityLUTSequence"):
        return False
    half = 2 ** (dataset.BitsStored - 1)
    low, high = (-half, half - 1) if dataset.PixelRepresentation == 1 else (0, 2 * half - 1)
    slope, intercept = _rescale(dataset)
    return min(slope * low, slope * high) + intercept < 0


def _apply_window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Map values to the window's fractions, 0 to 1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        # An exponent beyond 700 would overflow; the fraction is 0 or 1 long before.
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        # The standard's default function counts the steps between integers.
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise ValueError(f"unknown VOI LUT function {function}")
    if width == 0:
        return (values > center).astype(float)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _lut_table(dataset: pydicom.Dataset, item: pydicom.Dataset) -> np.ndarray:
    """Return the entries of a LUT, float (N,); they are unsigned (PS3.3 C.11.1.1.1, C.11.2.1.1).

    Entries of 8 bits may be packed two to a word. Their number tells, whatever the VR.
    """
    entries = _with_sign(item.LUTDescriptor[0], 16, signed=False) or 2**16
    data = item.LUTData
    if data is None:
        raise ValueError("a LUT without entries")
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        words = np.frombuffer(data, f"{order}u2")
    else:
        words = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
    if words.size < entries <= 2 * words.size:
        words = np.stack([words & 0xFF, words >> 8], axis=1).ravel()
    if words.size < entries:
        raise ValueError(f"a LUT with {words.size} entries of {entries}")
    return words[:entries].astype(float)


def _lut_top(item: pydicom.Dataset, table: np.ndarray) -> float:
    """Return the value that is shown as white, by the descriptor's bits (PS3.3 C.11.2.1.1).

    Where the entries do not fit these bits, it is that of the fewest bits that hold them.
    """
    bits, most = int(item.LUTDescriptor[2]), int(table.max())
    fits = 1 <= bits <= 16 and most < 2**bits
    return float(2 ** (bits if fits else max(most.bit_length(), 1)) - 1)


def _look_up(
    table: np.ndarray, item: pydicom.Dataset, values: np.ndarray, signed: bool
) -> np.ndarray:
    """Map values through a table; values beyond its ends take its first or last entry.

    Args:
        table: Shape (N,).
        item: Its header, with the value that the first entry is for.
        values: Any shape.
        signed: Whether that value is signed; files write its sixteen bits with either sign.
    """
    first = _with_sign(item.LUTDescriptor[1], 16, signed)
    position = np.rint(values).astype(np.int64) - first
    return table[np.clip(position, 0, table.size - 1)]


def _with_sign(value: int, bits: int, signed: bool) -> int:
    """Return a header's integer with the sign that it must have, whatever its VR says.

    >>> _with_sign(65526, 16, signed=True), _with_sign(-10, 16, signed=False)
    (-10, 65526)
    """
    unsigned = int(value) % 2**bits
    return unsigned - 2**bits if signed and unsigned >= 2 ** (bits - 1) else unsigned


def _first(dataset: pydicom.Dataset, keyword: str) -> float | None:
    """Return a number of the header, the first of several; None where it is absent or empty."""
    value = dataset.get(keyword)
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    if value is None or value == "":
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{keyword} is {number}")
    return number

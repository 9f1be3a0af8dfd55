"""From a file to what a network is shown: DICOM, PNG and JPEG to 8-bit grey; CLAHE; the cache.

Chapter 02 builds by hand what stands here, and asserts that the two agree.
"""

import errno
import hashlib
import json
import math
import struct
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd
import pydicom
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from pydicom import filereader

from dernet_utils.errors import DernetError
from dernet_utils.profiles import Profile

# Part of every cache key: raise it whenever `preprocess` or the decoding changes its pixels.
PREPROCESSING_VERSION = 1

MOST_PIXELS = 40_000_000  # of an image; a large radiograph has 20 million
LEVELS = 256  # grey levels of an 8-bit image
GREY = 114  # ultralytics' padding, so that the network meets the same margin as in training
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# pydicom's names of the decoders, best first.
DECODERS = ("pylibjpeg", "pyjpegls", "pydicom", "pillow", "gdcm")
DECOMPRESS = (
    "convert it to an uncompressed transfer syntax, for example with `dcmdjpeg` or `gdcmconv --raw`"
)
UNDECODABLE = "the picture cannot be decoded; copy or export the file again."
JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
JPEG_SIZES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers of a frame's header
JPEG_2000_START = b"\xff\x4f\xff\x51"


# --- Files ------------------------------------------------------------------------------------


def read_grey(path: Path | str) -> np.ndarray:
    """Read a DICOM, PNG or JPEG file as 8-bit grey; the content decides, not the name.

    Args:
        path: The file.

    Returns:
        uint8 (H, W), 0 black and 255 white, bone bright.

    Raises:
        DernetError: The file cannot be read or is not an image that we read; the message names
            the file, the reason and what would help.
    """
    with _naming(path):
        return decode_grey(_read_bytes(path))


def decode_grey(data: bytes) -> np.ndarray:
    """Decode the bytes of a DICOM, PNG or JPEG file to 8-bit grey, as `read_grey` does.

    >>> decode_grey(b"hello")
    Traceback (most recent call last):
        ...
    dernet_utils.errors.DernetError: not an image: expected a DICOM (with its "DICM" mark at \
byte 128), PNG or JPEG file; export the picture again in one of these forms.
    """
    if data[128:132] == b"DICM":
        return decode_dicom(data)
    if data.startswith((PNG_SIGNATURE, JPEG_START)):
        return _decode_picture(data)
    raise DernetError(
        'not an image: expected a DICOM (with its "DICM" mark at byte 128), PNG or JPEG file; '
        "export the picture again in one of these forms."
    )


@contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Put the file's name before the message of an error."""
    try:
        yield
    except DernetError as error:
        raise DernetError(f"{path}: {error}") from error


def _read_bytes(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DernetError(f"the file cannot be read ({reason}); check its name.") from error


def _decode_picture(data: bytes) -> np.ndarray:
    """Decode PNG or JPEG; colour becomes grey by OpenCV's weights (ITU-R BT.601).

    Eight bits are taken as they are, since such a picture was made for display; sixteen bits
    say nothing about how they want to be shown, so that their minimum to maximum is.
    """
    # Decoders fill what a cut-off file lacks with grey: look for the end mark ourselves. Within
    # the coded pixels of a JPEG both marks are impossible, so the last scan's end is the file's.
    if data.startswith(PNG_SIGNATURE):
        complete = b"IEND" in data[-64:]
    else:
        complete = data.find(JPEG_END, data.rfind(JPEG_SCAN)) > 0
    if not complete:
        raise DernetError("the picture is cut short; copy or download the file again.")
    # Pillow reads no more than the header here.
    reader = PngImageFile if data.startswith(PNG_SIGNATURE) else JpegImageFile
    try:
        width, height = reader(BytesIO(data)).size
    except (OSError, SyntaxError, ValueError) as error:
        raise DernetError(UNDECODABLE) from error
    if width * height > MOST_PIXELS:
        raise DernetError(
            "the picture's header promises more pixels than any radiograph has; export it again."
        )
    try:
        grey = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH
        )
    except cv2.error:  # for example more pixels than OpenCV's limit
        grey = None
    if grey is None:
        raise DernetError(UNDECODABLE)
    return grey if grey.dtype == np.uint8 else _to_grey(_stretch(grey.astype(float)))


# --- DICOM ------------------------------------------------------------------------------------


def decode_dicom(source: Path | str | bytes) -> np.ndarray:
    """Decode a grey-scale DICOM image with one frame to 8-bit grey, in the standard's order.

    Modality LUT or rescale; VOI LUT or, where there is none, window (the first of several);
    MONOCHROME1 inverted last. What the VOI puts out spans 0 to 255; where there is neither LUT
    nor window, the image's minimum to maximum does. Padding pixels count for nothing and
    become black. A window narrower than the standard permits is no window.

    Args:
        source: A file, or its bytes. Any transfer syntax that an installed decoder reads,
            8 to 16 bits, signed or unsigned.

    Returns:
        uint8 (H, W), 0 black and 255 white.

    Raises:
        DernetError: Colour, several frames, no pixels, cut short, compressed pixels of another
            size than the header's, bits elsewhere than at the low end, or a form that no decoder
            reads; the message names the reason and what would help.

    Source: DICOM PS3.3 C.7.5.1.1.2 (padding), C.7.6.3.1.2 (MONOCHROME1), C.11.1 (modality LUT),
    C.11.2 (VOI LUT).
    """
    if not isinstance(source, bytes):
        with _naming(source):
            return decode_dicom(_read_bytes(source))
    with warnings.catch_warnings():
        # pydicom warns of oddities in headers; those that matter are refused here.
        warnings.simplefilter("ignore")
        dataset, stored = _read_pixels(source)
        try:
            return _render(dataset, stored)
        except Exception as error:  # pydicom converts values when asked, and then may raise
            raise DernetError(
                f"the DICOM header's LUT or window is malformed ({_brief(error)}); export the "
                "image again."
            ) from error


def _read_pixels(data: bytes) -> tuple[pydicom.Dataset, np.ndarray]:
    """Return header and stored values, or refuse with the reason."""
    # The decoders are many and raise what they like (ValueError, RuntimeError, struct.error …):
    # whatever it is, a file from outside must end in a sentence.
    try:
        _refuse_bomb(data)
        dataset = pydicom.dcmread(BytesIO(data))
        reason = _refusal(dataset)
    except Exception as error:
        raise DernetError(
            f"the DICOM header cannot be read ({_brief(error)}); copy or export the file again."
        ) from error
    if reason:
        raise DernetError(reason)
    try:
        _refuse_other_size(dataset)
        plugin = _choose_decoder(dataset.file_meta.TransferSyntaxUID)
        return dataset, pydicom.pixels.pixel_array(dataset, decoding_plugin=plugin)
    except Exception as error:
        raise DernetError(
            f"the DICOM pixel data ({dataset.file_meta.TransferSyntaxUID.name}) cannot be "
            f"decoded ({_brief(error)}); copy the file again, and if it is neither damaged nor "
            f"cut short, {DECOMPRESS}."
        ) from error


def _refuse_bomb(data: bytes) -> None:
    """Refuse a deflated file that would fill the memory: pydicom inflates without a limit."""
    file = BytesIO(data)
    filereader.read_preamble(file, False)
    # Not public, but the one reading that ends where pydicom's own inflating begins.
    header = filereader._read_file_meta_info(file)
    if header.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
        return
    inflating, waiting, size = zlib.decompressobj(-zlib.MAX_WBITS), file.read(), 0
    while waiting and not inflating.eof:
        size += len(inflating.decompress(waiting, 2**20))
        waiting = inflating.unconsumed_tail
        if size > 3 * MOST_PIXELS:
            raise ValueError("it inflates to more than any radiograph holds")


def _refuse_other_size(dataset: pydicom.Dataset) -> None:
    """Refuse a compressed picture of another size than its header's: decoders make room for it."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    coded = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    said = int(dataset.Rows), int(dataset.Columns)
    if syntax == pydicom.uid.RLELossless:
        if len(coded) > 64 + 2 * math.prod(said) * dataset.BitsAllocated // 8:
            raise ValueError("it holds more than the header's rows and columns")
        return
    found = _coded_size(coded)
    if found and found != said:
        raise ValueError(f"it has {found[0]} rows and {found[1]} columns, its header {said}")


def _coded_size(coded: bytes) -> tuple[int, int] | None:
    """Return rows and columns that a compressed picture says it has; None where it says none.

    Source: ITU-T T.800 A.5.1 (JPEG 2000), T.81 B.2.2 (JPEG), T.87 C.2.2 (JPEG-LS).
    """
    start = coded.find(JPEG_2000_START, 0, 4096)  # it may lie in boxes
    if start >= 0 and len(coded) >= start + 24:
        right, bottom, left, top = struct.unpack_from(">4I", coded, start + 8)
        return bottom - top, right - left
    place = 2
    while coded.startswith(JPEG_START[:2]) and place + 9 <= len(coded) and coded[place] == 0xFF:
        if coded[place + 1] in JPEG_SIZES:
            return struct.unpack_from(">2H", coded, place + 5)
        place += 2 + int.from_bytes(coded[place + 2 : place + 4], "big")
    return None


def _refusal(dataset: pydicom.Dataset) -> str:
    """Return why an image is not a grey-scale radiograph that can be decoded; empty if it is."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    photometric = dataset.get("PhotometricInterpretation", "unknown")
    frames = int(dataset.get("NumberOfFrames") or 1)
    bits = dataset.get("BitsAllocated"), dataset.get("BitsStored")
    if syntax is None:
        return "the DICOM header names no transfer syntax; export the file again."
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        return (
            "the DICOM file holds floating-point pixels, where a radiograph holds integers of 8 "
            "to 16 bits; export it as a grey-scale image."
        )
    if not dataset.get("PixelData"):
        return (
            "the DICOM file holds no pixel data (a report, a plan or a directory, or it is cut "
            "short); choose an image, or copy the file again."
        )
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or dataset.get("SamplesPerPixel", 1) != 1:
        return (
            f"the DICOM image is in colour ({photometric}), where a radiograph is MONOCHROME1 or "
            "MONOCHROME2; export it in grey."
        )
    pixels = int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0)
    if pixels > MOST_PIXELS:
        return (
            f"the DICOM header promises {pixels / 1e6:,.0f} million pixels, where a radiograph "
            "has some tens; export the image again."
        )
    if frames > 1:
        return (
            f"the DICOM file holds {frames} frames, where a radiograph has one; save the frame "
            "that is meant as a file of its own."
        )
    if bits[0] not in (8, 16) or bits[1] not in range(8, 17):
        return (
            f"the DICOM image stores {bits[1]} bits in {bits[0]}, where a radiograph stores 8 to "
            "16 (dose grids and masks do otherwise); choose the image itself."
        )
    if dataset.get("HighBit", bits[1] - 1) != bits[1] - 1:
        return (
            f"the DICOM image's {bits[1]} bits end at bit {dataset.HighBit}, where they must at "
            f"{bits[1] - 1}; export the image again."
        )
    if _choose_decoder(syntax) is None:
        return f"no installed decoder reads the DICOM transfer syntax {syntax.name}; {DECOMPRESS}."
    return ""


def _choose_decoder(syntax: pydicom.uid.UID) -> str | None:
    """Return the plugin that decodes a transfer syntax ("" for pydicom alone), None if none does.

    GDCM comes last, and no second decoder is tried: on damaged JPEG 2000 it does not raise but
    ends the whole process.
    """
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError:
        return None
    if not decoder.is_encapsulated:
        return ""
    plugins = decoder.available_plugins
    return next((name for name in DECODERS if name in plugins), None)


def _brief(error: Exception) -> str:
    """Return an error's reason, short enough for one sentence."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    # pydicom puts a heading above what each of its decoders has to say.
    reason = "; ".join(lines[1:] or lines).rstrip(".:")
    return reason if len(reason) <= 200 else reason[:199] + "…"


def _render(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Take stored values to 8-bit grey."""
    padding = _is_padding(dataset, stored)
    fraction = _voi(dataset, _modality(dataset, stored), ~padding)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        fraction = 1 - fraction
    return _to_grey(np.where(padding, 0.0, fraction))


def _is_padding(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Return which stored values stand for "no image here" (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((value, value if limit is None else limit))
    return (stored >= low) & (stored <= high)


def _modality(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Take stored values to the modality's values, float (PS3.3 C.11.1)."""
    if dataset.get("ModalityLUTSequence"):
        item = dataset.ModalityLUTSequence[0]
        return _look_up(_lut_table(dataset, item), item, stored)
    slope, intercept = (_first(dataset, "RescaleSlope"), _first(dataset, "RescaleIntercept"))
    return stored.astype(float) * (1 if slope is None else slope) + (intercept or 0)


def _voi(dataset: pydicom.Dataset, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Take the modality's values to fractions of the display's range (PS3.3 C.11.2)."""
    if dataset.get("VOILUTSequence"):
        item = dataset.VOILUTSequence[0]
        table = _lut_table(dataset, item)
        span = max(table.max() - table.min(), 1)
        return _look_up((table - table.min()) / span, item, values)
    center, width = (_first(dataset, "WindowCenter"), _first(dataset, "WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    narrowest = 1 if function == "LINEAR" else np.finfo(float).tiny
    if center is not None and width is not None and width >= narrowest:
        return _window(values, center, width, function)
    return _stretch(values, valid)


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Return the window's fractions, 0 to 1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        # Beyond an exponent of 700 a float overflows, and the fraction has long been 0 or 1.
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        # The standard's default counts in steps between integers.
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise ValueError(f"unknown VOI LUT function {function}")
    if width == 0:
        return (values > center).astype(float)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _stretch(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Return fractions of the range from the least to the greatest valid value."""
    chosen = values if valid is None else values[valid]
    low, high = (chosen.min(), chosen.max()) if chosen.size else (0.0, 0.0)
    if low == high:
        return np.zeros(values.shape)
    return np.clip((values - low) / (high - low), 0, 1)


def _lut_table(dataset: pydicom.Dataset, item: pydicom.Dataset) -> np.ndarray:
    """Return the entries of a LUT as float (N,)."""
    data = item.LUTData
    if isinstance(data, bytes):
        entries = int(item.LUTDescriptor[0]) or 2**16
        order = "<" if dataset.original_encoding[1] else ">"
        # Entries of 8 bits may be packed two to a word.
        data = np.frombuffer(data, "u1" if len(data) < 2 * entries else f"{order}u2")[:entries]
    table = np.atleast_1d(np.asarray(data, float))
    if table.size == 0:
        raise ValueError("a LUT without entries")
    return table


def _look_up(table: np.ndarray, item: pydicom.Dataset, values: np.ndarray) -> np.ndarray:
    """Map values through a table; those below its first or past its last take these."""
    first = int(item.LUTDescriptor[1])
    position = np.rint(values).astype(np.int64) - first
    return table[np.clip(position, 0, table.size - 1)]


def _first(dataset: pydicom.Dataset, keyword: str) -> float | None:
    """Return an attribute's value, the first of several; None where absent or empty."""
    value = dataset.get(keyword)
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    return None if value is None or value == "" else float(value)


def _to_grey(fraction: np.ndarray) -> np.ndarray:
    return np.rint(fraction * (LEVELS - 1)).astype(np.uint8)


# --- Enhancement: Eq. 1 -----------------------------------------------------------------------


def clahe(grey: np.ndarray, clip_limit: float = 2.0, tiles: int = 8) -> np.ndarray:
    """Enhance local contrast by contrast-limited adaptive histogram equalisation (OpenCV).

    Args:
        grey: uint8 (H, W).
        clip_limit: Greatest count of a histogram bin, in multiples of the mean count; above 0.
        tiles: Contextual regions a side; at least 1.

    Returns:
        uint8 (H, W).

    Raises:
        DernetError: The image or a number is not of this kind.

    Source: the paper's Eq. 1 and section 3.1 (clip limit 2.0).

    >>> clahe(np.full((16, 16), 90, np.uint8)).shape
    (16, 16)
    """
    _check_clahe(grey, clip_limit, tiles)
    return cv2.createCLAHE(float(clip_limit), (tiles, tiles)).apply(np.ascontiguousarray(grey))


def clahe_by_hand(grey: np.ndarray, clip_limit: float = 2.0, tiles: int = 8) -> np.ndarray:
    """Do what `clahe` does, written out with numpy; equal to it within one grey level.

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


def _check_clahe(grey: np.ndarray, clip_limit: float, tiles: int) -> None:
    if (
        not isinstance(grey, np.ndarray)
        or grey.dtype != np.uint8
        or grey.ndim != 2
        or not grey.size
    ):
        came = getattr(grey, "dtype", type(grey).__name__), getattr(grey, "shape", ())
        raise DernetError(
            f"CLAHE takes an 8-bit grey image, uint8 (H, W), not {came[0]} {came[1]}; decode it "
            "with read_grey first."
        )
    if not clip_limit > 0 or tiles < 1:
        raise DernetError(
            "CLAHE takes a clip limit above 0 and at least one tile a side, not "
            f"{clip_limit} and {tiles}."
        )


def _pad_to_tiles(grey: np.ndarray, tiles: int) -> np.ndarray:
    """Mirror the image at its lower and right border until the tiles divide it.

    Where either side needs it both are padded, a side that already fits by one pixel a tile:
    so OpenCV does it.
    """
    height, width = grey.shape
    if height % tiles == 0 and width % tiles == 0:
        return grey
    return np.pad(grey, ((0, tiles - height % tiles), (0, tiles - width % tiles)), mode="reflect")


def _tile_histograms(padded: np.ndarray, tiles: int) -> np.ndarray:
    """Return int (tiles, tiles, 256): how often each grey level occurs in each tile."""
    height, width = padded.shape
    rows = np.arange(height) // (height // tiles)
    columns = np.arange(width) // (width // tiles)
    tile = rows[:, None] * tiles + columns
    counts = np.bincount((tile * LEVELS + padded).ravel(), minlength=tiles * tiles * LEVELS)
    return counts.reshape(tiles, tiles, LEVELS)


def _clip_histograms(histograms: np.ndarray, limit: int) -> np.ndarray:
    """Cut bins at the limit and hand out the excess evenly, the remainder at even steps."""
    excess = np.maximum(histograms - limit, 0).sum(axis=-1, keepdims=True)
    share, remainder = np.divmod(excess, LEVELS)
    step = np.maximum(LEVELS // np.maximum(remainder, 1), 1)
    bins = np.arange(LEVELS)
    receives_one_more = (bins % step == 0) & (bins // step < remainder)
    return np.minimum(histograms, limit) + share + receives_one_more


def _blend(grey: np.ndarray, tables: np.ndarray, tile_h: int, tile_w: int) -> np.ndarray:
    """Map each pixel through the tables of its four nearest tiles, blended bilinearly."""
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


def preprocess(grey: np.ndarray, long_side_px: int, clip_limit: float, tiles: int) -> np.ndarray:
    """Enhance at full size, then shrink; the one way from pixels to a network's image.

    Training, the ONNX models and the web page all call this.

    Args:
        grey: uint8 (H, W) as `read_grey` returns it.
        long_side_px: Long side of the result at most; a smaller image is not enlarged.
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
    scale = _scale(grey.shape, long_side_px)
    if scale == 1:
        return enhanced
    height, width = (max(1, round(side * scale)) for side in grey.shape)
    return cv2.resize(enhanced, (width, height), interpolation=cv2.INTER_AREA)


def _scale(shape: tuple[int, ...], long_side_px: int) -> float:
    return min(1.0, long_side_px / max(shape))


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
    filled = np.full(view, GREY, np.uint8)
    fitted = cv2.resize(grey, size, interpolation=method)
    filled[top : top + size[1], left : left + size[0]] = fitted
    return filled, (left, top, *size)


def to_view(
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


def to_stored(
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


# --- The cache --------------------------------------------------------------------------------


def cache_images(
    images: pd.DataFrame,
    cache: Path,
    profile: Profile,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Preprocess images once, keep them as PNG, and say where they are.

    A PNG is named by the SHA-256 of the file it comes from, the parameters and
    `PREPROCESSING_VERSION`, written under another name and then renamed: a killed run leaves
    nothing half-written, and the next goes on where it stopped. A PNG is reused if it is, byte
    for byte, what was written; a file whose size and time are unchanged is not read again.

    Args:
        images: At least the columns `image_id` and `path`.
        cache: Folder for the PNGs and their index; made where missing.
        profile: Its `cache_px`, `clip_limit` and `tiles` count.
        workers: Processes.
        progress: Called with (images done, images in all) after each image.

    Returns:
        A row for each image, in their order: image_id, path (of the PNG), height and width (of
        the stored image, px), scale (cached px / stored px).

    Raises:
        DernetError: A file cannot be decoded, or the cache cannot be written.
    """
    cache = Path(cache)
    numbers = (profile.cache_px, profile.clip_limit, profile.tiles)
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        known = _read_index(cache / "index.jsonl")
        records = {}
        with (cache / "index.jsonl").open("a", encoding="utf-8") as index:
            for record in _records(images["path"], cache, numbers, known, workers):
                if known.get(record["stamp"]) != record:
                    # Begins with a line break, should a killed run have left half a line.
                    index.write("\n" + json.dumps(record) + "\n")
                    index.flush()
                records[record["source"]] = record
                if progress:
                    progress(len(records), len(images))
    rows = [
        (image_id, str(cache / record["png"]), record["height"], record["width"], record["scale"])
        for image_id, path in zip(images["image_id"], images["path"], strict=True)
        for record in [records[str(path)]]
    ]
    return pd.DataFrame(rows, columns=["image_id", "path", "height", "width", "scale"])


def load_cached(path: Path | str) -> np.ndarray:
    """Read a cached image.

    Returns:
        uint8 (h, w).

    Raises:
        DernetError: The file is missing or not a PNG.
    """
    grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise DernetError(
            f"{path} is not a cached image that can be read; run cache_images (or `dernet "
            "prepare`) again, which makes it anew."
        )
    return grey


def _records(
    paths: pd.Series, cache: Path, numbers: tuple, known: dict[str, dict], workers: int
) -> Iterator[dict]:
    """Yield the index's record of each file, those that stand first, then those to be made."""
    missing = []
    for path in dict.fromkeys(map(str, paths)):
        record = known.get(_stamp(path, numbers))
        if record and _stands(cache, record):
            yield record
        else:
            missing.append(path)

    def jobs():
        for path in missing:
            # The same content under a new time or name is not decoded again.
            same = known.get(_key(path, numbers))
            reusable = same if same and _stands(cache, same) else None
            yield joblib.delayed(_make)(path, cache, numbers, reusable)

    yield from joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(jobs())


def _make(path: str, cache: Path, numbers: tuple, reusable: dict | None) -> dict:
    """Preprocess one file and return its record."""
    stamp, key = _stamp(path, numbers), _key(path, numbers)
    if reusable:
        return reusable | {"source": path, "stamp": stamp}
    grey = read_grey(path)
    with _naming(path):
        small = preprocess(grey, *numbers)
    png = cv2.imencode(".png", small)[1].tobytes()
    with _writing(cache):
        _write_and_rename(cache / f"{key}.png", png)
    return {
        "source": path,
        "stamp": stamp,
        "key": key,
        "png": f"{key}.png",
        "crc": zlib.crc32(png),
        "height": grey.shape[0],
        "width": grey.shape[1],
        "scale": _scale(grey.shape, numbers[0]),
    }


def _stamp(path: str, numbers: tuple) -> str:
    """Return what changes when a file is written again, without reading it."""
    try:
        state = Path(path).stat()
    except OSError as error:
        raise DernetError(f"{path}: the file cannot be read ({error.strerror}).") from error
    return f"{Path(path).absolute()} {state.st_size} {state.st_mtime_ns} {_version(numbers)}"


def _key(path: str, numbers: tuple) -> str:
    with _naming(path):
        return hashlib.sha256(_version(numbers).encode() + _read_bytes(path)).hexdigest()


def _version(numbers: tuple) -> str:
    return f"v{PREPROCESSING_VERSION} {numbers} "


def _stands(cache: Path, record: dict) -> bool:
    """Return whether the PNG is byte for byte what was written."""
    try:
        return zlib.crc32((cache / record["png"]).read_bytes()) == record["crc"]
    except OSError:
        return False


def _read_index(path: Path) -> dict[str, dict]:
    """Return the records by stamp and by key; lines that a killed run left half are skipped."""
    known = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            known[record["stamp"]] = known[record["key"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _write_and_rename(target: Path, data: bytes) -> None:
    temporary = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn what the file system has against writing into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DernetError(
                f"The disk that holds {cache} is full; free some space and run again: the images "
                "that are finished are kept."
            ) from error
        raise DernetError(f"{cache} cannot be written ({error.strerror or error}).") from error

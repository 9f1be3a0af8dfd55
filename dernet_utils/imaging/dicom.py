"""DICOM images: what is read, what is refused and why, and their pixels as 8-bit grey."""

import math
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom import filereader

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.grey_levels import to_grey_levels
from dernet_utils.imaging.radiograph import JPEG_START, MOST_PIXELS, brief_reason, naming, recognise

# pydicom's names of the decoders, best first.
DECODERS = ("pylibjpeg", "pyjpegls", "pydicom", "pillow", "gdcm")
DECOMPRESS = (
    "convert it to an uncompressed transfer syntax, for example with `dcmdjpeg` or `gdcmconv --raw`"
)
JPEG_SIZES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers of a frame's header
JPEG_2000_START = b"\xff\x4f\xff\x51"


def decode_dicom(data: bytes) -> tuple[np.ndarray, pydicom.Dataset]:
    """Decode a grey-scale DICOM image with one frame to 8-bit grey, in the standard's order.

    Modality LUT or rescale; VOI LUT or, where there is none, window (the first of several);
    MONOCHROME1 inverted last. What the VOI puts out spans 0 to 255; where there is neither LUT
    nor window, the image's minimum to maximum does. Padding pixels count for nothing and
    become black. A window narrower than the standard permits is no window.

    Args:
        data: The file's bytes. Any transfer syntax that an installed decoder reads, 8 to 16 bits,
            signed or unsigned.

    Returns:
        uint8 (H, W), 0 black and 255 white; and the header, without the pixel data.

    Raises:
        DernetError: Colour, several frames, no pixels, cut short, compressed pixels of another
            size than the header's, bits elsewhere than at the low end, or a form that no decoder
            reads; the message names the reason and what would help.

    Source: DICOM PS3.3 C.7.5.1.1.2 (padding), C.7.6.3.1.2 (MONOCHROME1), C.11.1 (modality LUT),
    C.11.2 (VOI LUT).
    """
    with warnings.catch_warnings():
        # pydicom warns of oddities in headers; those that matter are refused here.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="End of file reached")  # pixels cut short
        header = _read(BytesIO(data), whole=True)
        stored = _decode_pixels(header)
        del header.PixelData
        try:
            return to_grey_levels(header, stored), header
        except Exception as error:  # pydicom converts values when asked, and then may raise
            raise DernetError(
                f"the DICOM header's LUT or window is malformed ({brief_reason(error)}); export "
                "the image again."
            ) from error


def read_header(path: Path | str) -> pydicom.Dataset:
    """Return the header of a DICOM image that `decode_dicom` takes, as far as a header can tell.

    Args:
        path: The file; its pixel data are not read.

    Raises:
        DernetError: As `decode_dicom` raises.
    """
    with warnings.catch_warnings(), naming(path):
        warnings.simplefilter("ignore")
        try:
            with Path(path).open("rb") as file:
                if recognise(file.read(132)) != "DICOM":
                    raise DernetError("this is a picture, and a dataset holds DICOM images.")
                file.seek(0)
                return _read(file, whole=False)
        except OSError as error:
            reason = error.strerror or error
            raise DernetError(f"the file cannot be read ({reason}); check its name.") from error


def _read(file: BinaryIO, whole: bool) -> pydicom.Dataset:
    """Return the header, with the pixel data where the whole is asked for, or refuse it."""
    # pydicom raises what it likes (ValueError, RuntimeError, struct.error …): whatever it is, a
    # file from outside must end in a sentence.
    try:
        _refuse_bomb(file)
        file.seek(0)
        dataset = pydicom.dcmread(file, stop_before_pixels=not whole)
        reason = _refusal(dataset) or (_pixel_refusal(dataset) if whole else "")
    except Exception as error:
        raise DernetError(
            f"the DICOM header cannot be read ({brief_reason(error)}); copy or export the file "
            "again."
        ) from error
    if reason:
        raise DernetError(reason)
    return dataset


def _decode_pixels(dataset: pydicom.Dataset) -> np.ndarray:
    """Return the stored values, shape (H, W)."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        _refuse_other_size(dataset)
        return pydicom.pixels.pixel_array(dataset, decoding_plugin=_choose_decoder(syntax))
    except Exception as error:
        raise DernetError(
            f"the DICOM pixel data ({syntax.name}) cannot be decoded ({brief_reason(error)}); copy "
            f"the file again, and if it is neither damaged nor cut short, {DECOMPRESS}."
        ) from error


def _refuse_bomb(file: BinaryIO) -> None:
    """Refuse a deflated file that would fill the memory: pydicom inflates without a limit."""
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


def _pixel_refusal(dataset: pydicom.Dataset) -> str:
    """Return why there are no pixels to decode; empty if there are."""
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

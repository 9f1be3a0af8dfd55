"""DICOM images: which files are refused and why, and the others' pixels as 8-bit grey."""

import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom import filereader

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.grey_levels import to_grey_levels
from dernet_utils.imaging.jpeg import declared_size, decode_jpeg
from dernet_utils.imaging.radiograph import (
    MOST_PIXELS,
    RECOGNISED_BY,
    brief_reason,
    reading,
    recognise,
)

REQUIRED = ("Rows", "Columns", "PhotometricInterpretation", "BitsAllocated", "BitsStored")
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
# pydicom's names of the decoders, best first; `decode_jpeg` decodes JPEG in its four forms.
DECODERS = ("pylibjpeg", "pyjpegls", "pydicom")
JPEG = (
    pydicom.uid.JPEGBaseline8Bit,
    pydicom.uid.JPEGExtended12Bit,
    pydicom.uid.JPEGLossless,
    pydicom.uid.JPEGLosslessSV1,
)
DECOMPRESS = (
    "convert it to an uncompressed transfer syntax, for example with `dcmdjpeg` or `gdcmconv --raw`"
)
JPEG_2000_START = b"\xff\x4f\xff\x51"


def decode_dicom(data: bytes) -> tuple[np.ndarray, pydicom.Dataset]:
    """Decode a grey-scale DICOM image with one frame to 8-bit grey, in the standard's order.

    The modality LUT or rescale comes first, then the VOI LUT or, where there is none, the window
    (the first of several); MONOCHROME1 is inverted last. 0 to 255 is the range of the VOI LUT's
    bits or the window; without both, it is the range of the image's values. Padding pixels do not
    count and become black. A window narrower than the standard permits is ignored. The sign of a
    padding value and of a LUT's first value is that of the values it is for, whatever its VR.

    Args:
        data: The file's bytes, in any transfer syntax that an installed decoder reads; pixels of 8
            to 16 bits, signed or unsigned.

    Returns:
        uint8 (H, W), 0 black and 255 white; and the header, without the pixel data.

    Raises:
        DernetError: The file is not such an image: its header is unreadable; it has colour or
            several frames; its pixels are missing, too many, floating-point or not in the low bits;
            its pixel data are cut short, differ from the header in size or have no decoder; or a
            LUT or window is malformed. The message gives the reason and a remedy.

    Source: DICOM PS3.3 C.7.5.1.1.2 (padding), C.7.6.3.1.2 (MONOCHROME1), C.11.1 (modality LUT),
    C.11.2 (VOI LUT).
    """
    with _refusing_cut_files():
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
    """Read the header of a DICOM image; refuse each header that `decode_dicom` refuses.

    Args:
        path: The file; its pixel data are not read.

    Returns:
        The header, in which each attribute of `REQUIRED` has a value.

    Raises:
        DernetError: The file cannot be read, is not a DICOM file, or has a header that
            `decode_dicom` refuses. The message does not name the file.
    """
    with _refusing_cut_files(), reading(), Path(path).open("rb") as file:
        form = recognise(file.read(RECOGNISED_BY))
        if form != "DICOM":
            raise DernetError(
                f"the file is a {form} picture, where a dataset holds DICOM images; export it as "
                "DICOM."
            )
        return _read(file, whole=False)


@contextmanager
def _refusing_cut_files() -> Iterator[None]:
    """Ignore pydicom's warnings about odd headers, but raise the one about a cut file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="End of file reached")
        yield


# --- The header -------------------------------------------------------------------------------


def _read(file: BinaryIO, whole: bool) -> pydicom.Dataset:
    """Return the header of an image that can be decoded; with its pixel data if `whole`.

    Raises:
        DernetError: As `decode_dicom` raises, but of the pixel data only their absence or kind.
    """
    # pydicom raises many types (ValueError, RuntimeError, struct.error …); for each of them, the
    # user must get a sentence.
    try:
        _refuse_bomb(file)
        file.seek(0)
        header = pydicom.dcmread(file, stop_before_pixels=not whole, force=True)
        _complete(header)
        reason = _refusal(header, whole)
    except UserWarning as error:  # pydicom's "End of file reached"
        raise DernetError("the DICOM file is cut short; copy it again.") from error
    except Exception as error:
        raise DernetError(
            f"the DICOM header cannot be read ({brief_reason(error)}); copy or export the file "
            "again."
        ) from error
    if reason:
        raise DernetError(reason)
    return header


def _refuse_bomb(file: BinaryIO) -> None:
    """Refuse a deflated file that would fill the memory: pydicom inflates without a limit."""
    file.seek(0)
    filereader.read_preamble(file, force=True)
    # Not public, but the only function that stops where pydicom starts to inflate.
    header = filereader._read_file_meta_info(file)
    if header.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
        return
    inflating, waiting, size = zlib.decompressobj(-zlib.MAX_WBITS), file.read(), 0
    while waiting and not inflating.eof:
        size += len(inflating.decompress(waiting, 2**20))
        waiting = inflating.unconsumed_tail
        if size > 3 * MOST_PIXELS:
            raise ValueError("it inflates to more than any radiograph holds")


def _complete(header: pydicom.Dataset) -> None:
    """Set what a header leaves out, or writes otherwise, where it has one possible meaning.

    That is the transfer syntax of a file without meta information, which cannot be compressed
    (PS3.10, 7.1 and PS3.5, 10.1), the samples per pixel of a monochrome image, and capitals.
    """
    if not header.file_meta:
        implicit, little = header.original_encoding
        explicit = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
        header.file_meta.TransferSyntaxUID = syntax
    photometric = header.get("PhotometricInterpretation")
    if isinstance(photometric, str):
        header.PhotometricInterpretation = photometric.strip().upper()
        if photometric.strip().upper() in MONOCHROME and not header.get("SamplesPerPixel"):
            header.SamplesPerPixel = 1


def _refusal(header: pydicom.Dataset, whole: bool) -> str:
    """Return why an image cannot be decoded to a grey-scale radiograph; empty if it can.

    Missing pixel data count only where the `whole` file was read.
    """
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        return "the DICOM header names no transfer syntax; export the file again."
    if "FloatPixelData" in header or "DoubleFloatPixelData" in header:
        return (
            "the DICOM file holds floating-point pixels, where a radiograph holds integers of 8 "
            "to 16 bits; export it as a grey-scale image."
        )
    missing = [name for name in REQUIRED if header.get(name) in (None, "", 0)]
    if missing or (whole and not header.get("PixelData")):
        return (
            f"the DICOM file holds no {', '.join(missing) or 'pixel data'} (a report, a plan or a "
            "directory, or it is cut short); choose an image, or copy the file again."
        )
    photometric = header.PhotometricInterpretation
    if photometric not in MONOCHROME or header.SamplesPerPixel != 1:
        return (
            f"the DICOM image is in colour ({photometric}), where a radiograph is MONOCHROME1 or "
            "MONOCHROME2; export it in grey."
        )
    pixels = int(header.Rows) * int(header.Columns)
    if pixels > MOST_PIXELS:
        return (
            f"the DICOM header declares {pixels / 1e6:,.0f} million pixels, where a radiograph "
            "has some tens; export the image again."
        )
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        return (
            f"the DICOM file holds {frames} frames, where a radiograph has one; save the wanted "
            "frame as a separate file."
        )
    allocated, stored = header.BitsAllocated, header.BitsStored
    if allocated not in (8, 16) or stored not in range(8, allocated + 1):
        return (
            f"the DICOM image stores {stored} bits in {allocated}, where a radiograph stores 8 to "
            "16 (dose grids and masks differ); choose the image itself."
        )
    if header.get("HighBit", stored - 1) != stored - 1:
        return (
            f"the DICOM image's {stored} bits end at bit {header.HighBit}, but must end at bit "
            f"{stored - 1}; export the image again."
        )
    if syntax not in JPEG and _choose_decoder(syntax) is None:
        return f"no installed decoder reads the DICOM transfer syntax {syntax.name}; {DECOMPRESS}."
    return ""


def _choose_decoder(syntax: pydicom.uid.UID) -> str | None:
    """Return pydicom's plugin for a transfer syntax; "" for pydicom alone, None for no decoder."""
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError:
        return None
    if not decoder.is_encapsulated:
        return ""
    plugins = decoder.available_plugins
    return next((name for name in DECODERS if name in plugins), None)


# --- The pixel data ---------------------------------------------------------------------------


def _decode_pixels(dataset: pydicom.Dataset) -> np.ndarray:
    """Return the stored values, integers (H, W)."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        _refuse_other_size(dataset)
        if syntax in JPEG:
            return _stored_values(decode_jpeg(_frame(dataset)), dataset)
        return pydicom.pixels.pixel_array(dataset, decoding_plugin=_choose_decoder(syntax))
    except Exception as error:
        raise DernetError(
            f"the DICOM pixel data ({syntax.name}) cannot be decoded ({brief_reason(error)}); copy "
            f"the file again, and if it is neither damaged nor cut short, {DECOMPRESS}."
        ) from error


def _refuse_other_size(dataset: pydicom.Dataset) -> None:
    """Refuse pixels whose size is not the header's: decoders allocate memory for it, or cut it.

    Raises:
        ValueError: The sizes differ.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    declared = int(dataset.Rows), int(dataset.Columns)
    raw = math.prod(declared) * dataset.BitsAllocated // 8  # bytes of one frame
    if not syntax.is_encapsulated:
        more = dataset.PixelData[raw + raw % 2 :]
        if len(more) >= raw or more.strip(b"\0"):  # some writers append zeros
            raise ValueError("it holds more than the header's rows and columns")
        return
    coded = _frame(dataset)
    if syntax == pydicom.uid.RLELossless:
        if len(coded) > 64 + 2 * raw:
            raise ValueError("it holds more than the header's rows and columns")
        return
    found = _coded_size(coded)
    if found and found != declared:
        raise ValueError(f"it has {found[0]} rows and {found[1]} columns, its header {declared}")


def _frame(dataset: pydicom.Dataset) -> bytes:
    """Return the code stream of a compressed image."""
    return pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)


def _coded_size(coded: bytes) -> tuple[int, int] | None:
    """Return the rows and columns that a compressed image declares; None where it declares none.

    Source: ITU-T T.800 A.5.1 (JPEG 2000).
    """
    start = coded.find(JPEG_2000_START, 0, 4096)  # it may lie inside JP2 boxes
    if start >= 0 and len(coded) >= start + 24:
        right, bottom, left, top = struct.unpack_from(">4I", coded, start + 8)
        return bottom - top, right - left
    return declared_size(coded)


def _stored_values(decoded: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Return a JPEG's values with the header's bits and sign, integers (H, W).

    A JPEG's values are unsigned (PS3.5 8.2.1); negative ones come as their lowest bits, or with
    the sign in all bits.

    Raises:
        ValueError: It has colour, or a value that the header's bits do not hold.
    """
    if decoded.ndim != 2:
        raise ValueError("it is in colour, which its header does not say")
    bits, values = dataset.BitsStored, decoded.astype(np.int64)
    if dataset.PixelRepresentation == 1:
        lowest = values & (2**bits - 1)
        signed = np.where(lowest < 2 ** (bits - 1), lowest, lowest - 2**bits)
        if not ((values == lowest) | (values == signed & 0xFFFF)).all():
            raise ValueError(f"its values need more than the header's {bits} bits")
        return signed
    if values.max() >= 2**bits:
        raise ValueError(f"its values need more than the header's {bits} bits")
    return values

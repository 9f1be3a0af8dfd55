"""A decoded radiograph, the three file formats that are read, and errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.jpeg import JPEG_START

MOST_PIXELS = 40_000_000  # per image; a large radiograph has 20 million
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
DICOM_MARK = b"DICM"  # after a preamble of 128 bytes
RECOGNISED_BY = 132  # number of first bytes that show a file's format
# Without preamble a DICOM file begins with its first element: of the file meta information (group
# 0002) or of the data set (group 0008), its length or its VR after the tag.
FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")
FIRST_VRS = (b"UL", b"OB", b"UI", b"CS", b"SH", b"DA", b"TM", b"LO", b"SQ")


@dataclass(frozen=True)
class Radiograph:
    """A file's image and header.

    Attributes:
        pixels: uint8 (H, W), 0 black and 255 white, bone bright.
        form: ``DICOM``, ``PNG`` or ``JPEG``.
        header: Header of a DICOM file, without its pixel data; None for a PNG or JPEG.
        coloured: Fraction of the pixels that are in colour, 0 to 1; 0 for DICOM, where colour is
            refused.
    """

    pixels: np.ndarray
    form: str
    header: pydicom.Dataset | None = None
    coloured: float = 0.0


def recognise(data: bytes) -> str:
    """Return a file's format, ``DICOM``, ``PNG`` or ``JPEG``, by its content, not its name.

    Args:
        data: The file's first bytes, at least `RECOGNISED_BY` where it has them.

    Raises:
        DernetError: The file has none of these formats.

    >>> recognise(bytes(128) + b"DICM"), recognise(JPEG_START)
    ('DICOM', 'JPEG')
    """
    if data[128:RECOGNISED_BY] == DICOM_MARK or _begins_with_an_element(data):
        return "DICOM"
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    if data.startswith(JPEG_START):
        return "JPEG"
    raise DernetError(
        "not an image: expected a DICOM, PNG or JPEG file; export the picture again in one of "
        "these forms."
    )


def _begins_with_an_element(data: bytes) -> bool:
    """Return whether bytes begin as a DICOM data set in little endian without preamble."""
    if len(data) < RECOGNISED_BY or data[:2] not in FIRST_GROUPS or data[3] > 0:
        return False
    implicit = int.from_bytes(data[4:8], "little")
    return data[4:6] in FIRST_VRS or (implicit % 2 == 0 and implicit <= 64)  # a name or a code


def read_bytes(path: Path | str) -> bytes:
    """Return a file's bytes.

    Raises:
        DernetError: The file cannot be read. The message does not name it: see `naming`.
    """
    with reading():
        return Path(path).read_bytes()


@contextmanager
def reading() -> Iterator[None]:
    """Turn an error of the file system into a DernetError; the message does not name the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DernetError(f"the file cannot be read ({reason}); check its name.") from error


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put the file's name before the message of a DernetError."""
    try:
        yield
    except DernetError as error:
        raise DernetError(f"{path}: {error}") from error


def brief_reason(error: Exception) -> str:
    """Return an error's message, short enough for one sentence (200 characters).

    >>> brief_reason(ValueError("Unable to decode:\\n  pillow: cut short.\\n  jpeg: no image."))
    'pillow: cut short; jpeg: no image'
    """
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines()]
    lines = lines or [type(error).__name__]
    # pydicom puts a heading above the messages of its decoders.
    reason = "; ".join(lines[1:] or lines)
    return reason if len(reason) <= 200 else reason[:199] + "…"

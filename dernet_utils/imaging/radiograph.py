"""A radiograph as it was read, and the three forms in which it comes, told by their first bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from dernet_utils.core.errors import DernetError

MOST_PIXELS = 40_000_000  # of an image; a large radiograph has 20 million
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"


@dataclass(frozen=True)
class Radiograph:
    """A file's picture, and what the file says of it.

    Attributes:
        pixels: uint8 (H, W), 0 black and 255 white, bone bright.
        form: ``DICOM``, ``PNG`` or ``JPEG``.
        header: A DICOM file's, without its pixel data; None for a PNG or JPEG.
        coloured: Fraction of its pixels that are in colour; 0 for a DICOM image, since one in
            colour is refused.
    """

    pixels: np.ndarray
    form: str
    header: pydicom.Dataset | None = None
    coloured: float = 0.0


def recognise(data: bytes) -> str:
    """Return ``DICOM``, ``PNG`` or ``JPEG``; the content decides, not the name.

    Args:
        data: The file's first bytes; 132 are enough.

    Raises:
        DernetError: It is none of them.

    >>> recognise(bytes(128) + b"DICM"), recognise(JPEG_START)
    ('DICOM', 'JPEG')
    """
    if data[128:132] == b"DICM":
        return "DICOM"
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    if data.startswith(JPEG_START):
        return "JPEG"
    raise DernetError(
        'not an image: expected a DICOM (with its "DICM" mark at byte 128), PNG or JPEG file; '
        "export the picture again in one of these forms."
    )


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put the file's name before the message of an error."""
    try:
        yield
    except DernetError as error:
        raise DernetError(f"{path}: {error}") from error


def read_bytes(path: Path | str) -> bytes:
    """Return a file's bytes.

    Raises:
        DernetError: It cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DernetError(f"the file cannot be read ({reason}); check its name.") from error


def brief_reason(error: Exception) -> str:
    """Return an error's reason, short enough for one sentence."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    # pydicom puts a heading above what each of its decoders has to say.
    reason = "; ".join(lines[1:] or lines).rstrip(".:")
    return reason if len(reason) <= 200 else reason[:199] + "…"

"""A DICOM, PNG or JPEG file as a radiograph.

Chapter 02 rebuilds these steps by hand and asserts that the two agree.
"""

from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.dicom import decode_dicom
from dernet_utils.imaging.grey_levels import stretch, to_uint8
from dernet_utils.imaging.radiograph import (
    MOST_PIXELS,
    Radiograph,
    naming,
    read_bytes,
    recognise,
)

JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"
GREY_MODES = ("1", "L", "LA", "I", "I;16")  # Pillow's names
COLOUR = 24  # a pixel counts as coloured where its channels differ by more levels
UNDECODABLE = "the picture cannot be decoded; copy or export the file again."


def read_radiograph(path: Path | str) -> Radiograph:
    """Read a DICOM, PNG or JPEG file; its content decides the format, not its name.

    Args:
        path: The file.

    Returns:
        Its pixels as 8-bit grey, its format, its header and the fraction of coloured pixels.

    Raises:
        DernetError: The file cannot be read or is no image of these formats; the message gives the
            file, the reason and a remedy.
    """
    with naming(path):
        return decode_radiograph(read_bytes(path))


def decode_radiograph(data: bytes) -> Radiograph:
    """Decode a DICOM, PNG or JPEG file, as `read_radiograph` does.

    Args:
        data: The file's bytes.

    Returns:
        As `read_radiograph` returns it.

    Raises:
        DernetError: As `read_radiograph` raises; the message does not name the file.

    >>> decode_radiograph(b"hello")
    Traceback (most recent call last):
        ...
    dernet_utils.core.errors.DernetError: not an image: expected a DICOM (with its "DICM" mark at \
byte 128), PNG or JPEG file; export the picture again in one of these forms.
    """
    form = recognise(data)
    if form == "DICOM":
        pixels, header = decode_dicom(data)
        return Radiograph(pixels, form, header)
    return _decode_picture(data, form)


def _decode_picture(data: bytes, form: str) -> Radiograph:
    """Decode PNG or JPEG; colour becomes grey by OpenCV's weights (ITU-R BT.601).

    8-bit values are kept, since such a picture was made for display. 16-bit values do not define
    how they are displayed, so their range is stretched to 0 to 255.
    """
    _refuse_incomplete(data, form)
    try:  # Pillow reads only the header here
        header = (PngImageFile if form == "PNG" else JpegImageFile)(BytesIO(data))
    except (OSError, SyntaxError, ValueError) as error:
        raise DernetError(UNDECODABLE) from error
    if header.width * header.height > MOST_PIXELS:
        raise DernetError(
            "the picture's header declares more pixels than any radiograph has; export it again."
        )
    coded = np.frombuffer(data, np.uint8)
    try:
        grey = cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
        in_colour = None if header.mode in GREY_MODES else cv2.imdecode(coded, cv2.IMREAD_COLOR)
    except cv2.error:  # for example more pixels than OpenCV's limit
        grey = in_colour = None
    if grey is None:
        raise DernetError(UNDECODABLE)
    coloured = 0.0 if in_colour is None else float((np.ptp(in_colour, axis=2) > COLOUR).mean())
    pixels = grey if grey.dtype == np.uint8 else to_uint8(stretch(grey.astype(float)))
    return Radiograph(pixels, form, coloured=coloured)


def _refuse_incomplete(data: bytes, form: str) -> None:
    """Refuse a picture without its end mark: decoders would fill the missing part with grey."""
    if form == "PNG":
        complete = b"IEND" in data[-64:]
    else:
        # Neither mark occurs within coded pixels, so the end mark must follow the last scan mark.
        complete = data.find(JPEG_END, data.rfind(JPEG_SCAN)) > 0
    if not complete:
        raise DernetError("the picture is cut short; copy or download the file again.")

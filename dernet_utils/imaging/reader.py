"""A file as a radiograph: DICOM, PNG or JPEG, recognised and parsed once.

Chapter 02 builds by hand what stands here, and asserts that the two agree.
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
    JPEG_END,
    JPEG_SCAN,
    MOST_PIXELS,
    Radiograph,
    naming,
    read_bytes,
    recognise,
)

UNDECODABLE = "the picture cannot be decoded; copy or export the file again."
GREY_MODES = ("1", "L", "LA", "I", "I;16")  # Pillow's names
COLOUR = 24  # levels between the channels of a pixel that counts as coloured


def read_radiograph(path: Path | str) -> Radiograph:
    """Read a DICOM, PNG or JPEG file; the content decides, not the name.

    Args:
        path: The file.

    Raises:
        DernetError: The file cannot be read or is not an image that we read; the message names
            the file, the reason and what would help.
    """
    with naming(path):
        return decode_radiograph(read_bytes(path))


def decode_radiograph(data: bytes) -> Radiograph:
    """Decode the bytes of a DICOM, PNG or JPEG file, as `read_radiograph` does.

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

    Eight bits are taken as they are, since such a picture was made for display; sixteen bits
    say nothing about how they want to be shown, so that their minimum to maximum is.
    """
    # Decoders fill what a cut-off file lacks with grey: look for the end mark ourselves. Within
    # the coded pixels of a JPEG both marks are impossible, so the last scan's end is the file's.
    if form == "PNG":
        complete = b"IEND" in data[-64:]
    else:
        complete = data.find(JPEG_END, data.rfind(JPEG_SCAN)) > 0
    if not complete:
        raise DernetError("the picture is cut short; copy or download the file again.")
    try:  # Pillow reads no more than the header here
        header = (PngImageFile if form == "PNG" else JpegImageFile)(BytesIO(data))
    except (OSError, SyntaxError, ValueError) as error:
        raise DernetError(UNDECODABLE) from error
    if header.width * header.height > MOST_PIXELS:
        raise DernetError(
            "the picture's header promises more pixels than any radiograph has; export it again."
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

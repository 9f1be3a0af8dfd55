"""PNG and JPEG pictures as 8-bit grey.

Decoders fill missing rows with grey or black, take bytes after a picture for part of it, and some
die of an animation's frames. So a file is first reduced to its one still picture, and that is
checked to be whole.
"""

import struct
import zlib
from io import BytesIO

import cv2
import numpy as np
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.grey_levels import stretch, to_uint8
from dernet_utils.imaging.jpeg import first_picture, is_whole
from dernet_utils.imaging.radiograph import MOST_PIXELS, PNG_SIGNATURE

GREY_MODES = ("1", "L", "LA", "I", "I;16")  # Pillow's names
COLOUR = 24  # a pixel counts as coloured where its channels differ by more levels
UNDECODABLE = "the picture cannot be decoded; copy or export the file again."
CUT_SHORT = "the picture is cut short; copy or download the file again."
TOO_LARGE = "the picture's header declares more pixels than any radiograph has; export it again."
# PNG (W3C, third edition): the chunks that make the picture, and the one with its orientation.
CRITICAL = (b"IHDR", b"PLTE", b"IDAT")
ORIENTATION, MOST_EXIF = b"eXIf", 2**16  # bytes
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Adam7: first column and row of each pass, and its steps.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip


def decode_picture(data: bytes, form: str) -> tuple[np.ndarray, float]:
    """Decode PNG or JPEG; colour becomes grey by OpenCV's weights (ITU-R BT.601).

    8-bit values are kept, since such a picture was made for display. 16-bit values do not define
    how they are displayed, so their range is stretched to 0 to 255. An orientation in the EXIF
    data is applied. What follows the picture in the file is ignored, as are an animation's further
    frames and, in a PNG, all else that is not needed to show it.

    Args:
        data: The file's bytes.
        form: ``PNG`` or ``JPEG``.

    Returns:
        uint8 (H, W), and the fraction of pixels in colour.

    Raises:
        DernetError: The picture is cut short, damaged, or has too many pixels.
    """
    still = _still_png(data) if form == "PNG" else _still_jpeg(data)
    try:  # Pillow reads only the header here
        header = (PngImageFile if form == "PNG" else JpegImageFile)(BytesIO(still))
    except (OSError, SyntaxError, ValueError) as error:
        raise DernetError(UNDECODABLE) from error
    if header.width * header.height > MOST_PIXELS:
        raise DernetError(TOO_LARGE)
    if form == "JPEG":
        _refuse_missing_pixels(still)
    grey = _decode(still, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    coloured = 0.0
    if header.mode not in GREY_MODES:
        in_colour = _decode(still, cv2.IMREAD_COLOR)
        coloured = float((np.ptp(in_colour, axis=2) > COLOUR).mean())
    return grey if grey.dtype == np.uint8 else to_uint8(stretch(grey.astype(float))), coloured


def _decode(still: bytes, flags: int) -> np.ndarray:
    try:
        found = cv2.imdecode(np.frombuffer(still, np.uint8), flags)
    except cv2.error as error:  # for example more pixels than OpenCV's limit
        raise DernetError(UNDECODABLE) from error
    if found is None:
        raise DernetError(UNDECODABLE)
    return found


# PNG --------------------------------------------------------------------------------------------


def _still_png(data: bytes) -> bytes:
    """Return a PNG file that holds a PNG's still picture and nothing else.

    Raises:
        DernetError: The picture is cut short, damaged, or has too many pixels.
    """
    kept, coded, at = [PNG_SIGNATURE], [], len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        at += len(chunk)
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            coded.append(chunk[8 : 8 + length])
        if len(chunk) < 12 + length:  # the file ends here, perhaps after the last row
            if kind == b"IDAT":
                kept.append(_chunk(kind, coded[-1]))
            break
        if kind in CRITICAL or (kind == ORIENTATION and _is_intact(chunk)):
            kept.append(chunk)
    if len(kept) < 2 or kept[1][4:8] != b"IHDR" or len(kept[1]) != 25:
        raise DernetError(CUT_SHORT if len(data) < 33 else UNDECODABLE)
    _refuse_missing_rows(kept[1], coded)
    return b"".join([*kept, _chunk(b"IEND", b"")])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _is_intact(chunk: bytes) -> bool:
    return len(chunk) <= MOST_EXIF and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _refuse_missing_rows(header: bytes, coded: list[bytes]) -> None:
    """Refuse a PNG whose coded data hold fewer bytes than its rows need.

    Args:
        header: The chunk IHDR.
        coded: The contents of the chunks IDAT.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">2I5B", header, 8)
    if width * height > MOST_PIXELS:
        raise DernetError(TOO_LARGE)
    if colour not in CHANNELS:
        raise DernetError(UNDECODABLE)
    bits = depth * CHANNELS[colour]
    needed = 0
    for left, top, right, down in PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            needed += rows * (1 + -(-columns * bits // 8))
    inflating, found = zlib.decompressobj(), 0
    try:
        for part in coded:
            waiting = part
            while waiting and found < needed:
                found += len(inflating.decompress(waiting, 2**20))
                waiting = inflating.unconsumed_tail
    except zlib.error as error:
        raise DernetError(UNDECODABLE) from error
    if found < needed:
        raise DernetError(CUT_SHORT)


# JPEG -------------------------------------------------------------------------------------------


def _still_jpeg(data: bytes) -> bytes:
    try:
        return first_picture(data)
    except ValueError as error:
        raise DernetError(CUT_SHORT) from error


def _refuse_missing_pixels(still: bytes) -> None:
    """Refuse a JPEG that is cut short. Pillow decodes, since OpenCV prints warnings."""
    try:
        whole = is_whole(still, lambda code: np.asarray(JpegImageFile(BytesIO(code))))
    except (OSError, SyntaxError, ValueError) as error:
        raise DernetError(UNDECODABLE) from error
    if not whole:
        raise DernetError(CUT_SHORT)

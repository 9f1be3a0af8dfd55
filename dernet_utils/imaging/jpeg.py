"""JPEG code streams, of a picture or inside a DICOM file: where they end, and whether all is there.

Decoders fill missing rows with grey, and say nothing.
"""

import struct
from collections.abc import Callable

import imagecodecs
import numpy as np

JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
# ITU-T T.81, table B.1: markers without a segment, and those of a frame's header. JPEG-LS has its
# own frame's header (T.87 C.1.1).
STANDALONE = {0x00, 0x01, *range(0xD0, 0xD9)}
FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
FILL, RESTART, START_OF_SCAN = 0xFF, 0xD0, 0xDA


def decode_jpeg(code: bytes) -> np.ndarray:
    """Decode a JPEG of any process of DICOM: baseline, extended with 8 or 12 bits, lossless.

    Args:
        code: The code stream, from its start mark.

    Returns:
        uint8 or uint16, (H, W) or (H, W, channels).

    Raises:
        ValueError: It is damaged or cut short.
    """
    still = first_picture(code)
    try:
        pixels = imagecodecs.jpeg8_decode(still)
        whole = is_whole(still, imagecodecs.jpeg8_decode)
    except imagecodecs.Jpeg8Error as error:
        raise ValueError(str(error)) from error
    if not whole:
        raise ValueError("its code is cut short")
    return pixels


def first_picture(data: bytes) -> bytes:
    """Return a JPEG up to the end mark of its first picture, which is added where it is missing.

    Args:
        data: A file or code stream that starts with `JPEG_START`; anything may follow the picture.

    Raises:
        ValueError: It ends before its first scan.
    """
    at, scans = 2, 0
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        marker = data[at + 1]
        if marker == JPEG_END[1]:
            return data[: at + 2]
        if marker == FILL:
            at += 1
        elif marker in STANDALONE:
            at += 2
        else:
            scans += marker == START_OF_SCAN
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if not scans:
        raise ValueError("its code is cut short")
    return data + JPEG_END


def is_whole(still: bytes, decode: Callable[[bytes], np.ndarray]) -> bool:
    """Return whether a JPEG holds all its pixels.

    Further coded bytes before the end mark change nothing in a whole picture. Where rows are
    missing, decoders take them for these rows.

    Args:
        still: As `first_picture` returns it.
        decode: The decoder.
    """
    more = np.random.default_rng(0).integers(0, 255, 512, dtype=np.uint8).tobytes()
    restarts = (bytes((0xFF, RESTART + k % 8)) + more for k in range(16))  # whichever is expected
    longer = still.removesuffix(JPEG_END) + more + b"".join(restarts) + JPEG_END
    return np.array_equal(decode(still), decode(longer))


def declared_size(code: bytes) -> tuple[int, int] | None:
    """Return the rows and columns that a JPEG or JPEG-LS declares; None where it declares none.

    Source: ITU-T T.81 B.2.2 (JPEG), T.87 C.2.2 (JPEG-LS).
    """
    at = 2
    while code.startswith(JPEG_START[:2]) and at + 9 <= len(code) and code[at] == 0xFF:
        if code[at + 1] in FRAME_HEADERS:
            return struct.unpack_from(">2H", code, at + 5)
        at += 2 + int.from_bytes(code[at + 2 : at + 4], "big")
    return None

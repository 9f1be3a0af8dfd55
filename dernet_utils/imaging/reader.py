"""A DICOM, PNG or JPEG file as a radiograph.

Chapter 02 rebuilds these steps by hand and asserts that the two agree.
"""

from pathlib import Path

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.dicom import decode_dicom
from dernet_utils.imaging.picture import decode_picture
from dernet_utils.imaging.radiograph import Radiograph, naming, read_bytes, recognise


def read_radiograph(path: Path | str) -> Radiograph:
    """Read a DICOM, PNG or JPEG file; its content decides the format, not its name.

    Args:
        path: The file.

    Returns:
        Its pixels as 8-bit grey, its format, its header and the fraction of coloured pixels.

    Raises:
        DernetError: The file cannot be read, is no image of these formats, or all its pixels have
            one grey level; the message gives the file, the reason and a remedy.
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
    dernet_utils.core.errors.DernetError: not an image: expected a DICOM, PNG or JPEG file; export \
the picture again in one of these forms.
    """
    form = recognise(data)
    if form == "DICOM":
        pixels, header = decode_dicom(data)
        radiograph = Radiograph(pixels, form, header)
    else:
        pixels, coloured = decode_picture(data, form)
        radiograph = Radiograph(pixels, form, coloured=coloured)
    if pixels.min() == pixels.max():
        raise DernetError(
            f"the image is uniform, all of grey level {pixels.max()} of 255: its pixels are empty "
            "or its header displays them so; export it again."
        )
    return radiograph

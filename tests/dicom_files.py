"""The one builder of image files for tests: whole DICOM files, and one for each refusal."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import cv2
import imagecodecs
import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames

from dernet_utils.imaging.radiograph import MOST_PIXELS

# --- Whole files ------------------------------------------------------------------------------


def grey_picture(height: int = 300, width: int = 200, seed: int = 0) -> np.ndarray:
    """A picture as smooth as a radiograph, with as many grey levels: uint8 (H, W)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    shown = 200 * np.exp(-3 * x**2) + 30 * np.sin(9 * y) + rng.normal(0, 3, (height, width))
    return shown.clip(0, 255).astype(np.uint8)


def make_dataset(stored: np.ndarray, bits: int | None = None, **header) -> Dataset:
    """An uncompressed grey-scale radiograph.

    Args:
        stored: Stored values, integers (H, W).
        bits: Bits stored; as many as are allocated unless given.
        header: Attributes set last, by keyword.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.1"
    dataset.Modality, dataset.PatientName, dataset.PatientID = "DX", "", ""
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    for keyword, value in header.items():
        setattr(dataset, keyword, value)
    return dataset


def to_bytes(dataset: Dataset) -> bytes:
    """A dataset as the bytes of a file, in the transfer syntax that it names."""
    stream = BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def encode(dataset: Dataset, syntax: uid.UID) -> bytes:
    """An uncompressed dataset as the bytes of a file in a transfer syntax; `dataset` changes too.

    pydicom and OpenCV encode; lossy JPEG is of the best quality.
    """
    if syntax in (uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless):
        dataset.compress(syntax, generate_instance_uid=False)
    elif syntax == uid.JPEGBaseline8Bit:
        code = cv2.imencode(".jpg", dataset.pixel_array, [cv2.IMWRITE_JPEG_QUALITY, 100])[1]
        set_frame(dataset, code.tobytes())
    elif syntax == uid.ExplicitVRBigEndian:
        dataset.PixelData = dataset.pixel_array.astype(">u2").tobytes()
        dataset["PixelData"].VR = "OW"
    dataset.file_meta.TransferSyntaxUID = syntax
    return to_bytes(dataset)


def encode_jpeg(dataset: Dataset, syntax: uid.UID, **options) -> bytes:
    """As `encode`, in a JPEG syntax; `options` are those of `imagecodecs.jpeg8_encode`."""
    bits = dataset.BitsStored
    stored = dataset.pixel_array.astype(int) & (2**bits - 1)
    lossless = syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1)
    code = imagecodecs.jpeg8_encode(
        stored.astype(np.uint8 if bits == 8 else np.uint16),
        **{"lossless": lossless, "bitspersample": bits} | options,
    )
    dataset.file_meta.TransferSyntaxUID = syntax
    return to_bytes(set_frame(dataset, code))


def lut(entries: list[int], first: int, bits: int, vr: str = "US") -> Dataset:
    """A LUT's sequence item, its entries as numbers (``US``) or as words of bytes (``OW``)."""
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new("LUTData", vr, entries if vr == "US" else np.array(entries, "<u2").tobytes())
    return item


def replaced(item: Dataset, **elements) -> Dataset:
    """A dataset, some of its elements set otherwise."""
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item


def encode_picture(ending: str = ".png", picture: np.ndarray | None = None) -> bytes:
    """A PNG or JPEG file, of `grey_picture` unless another is given."""
    return cv2.imencode(ending, grey_picture() if picture is None else picture)[1].tobytes()


def patient_radiograph(seed: int = 0, **header) -> bytes:
    """A DICOM radiograph with a patient, as a client sends it."""
    patient = {
        "SOPInstanceUID": f"2.25.{1000 + seed}",
        "StudyInstanceUID": "2.25.1",
        "SeriesInstanceUID": "2.25.2",
        "PatientName": "Roe^Jane",
        "PatientID": "SECRET-7",
        "PatientBirthDate": "19500101",
        "PatientSex": "F",
        "StudyID": "1",
        "AccessionNumber": "",
        "StudyDate": "20260101",
        "StudyTime": "120000",
        "ReferringPhysicianName": "",
        "BodyPartExamined": "LSPINE",
    }
    return to_bytes(make_dataset(grey_picture(seed=seed), **patient | header))


# --- Changes ----------------------------------------------------------------------------------


def frame_of(dataset: Dataset) -> bytes:
    """The only frame of a compressed image, as encoded."""
    return next(generate_frames(dataset.PixelData, number_of_frames=1))


def set_frame(dataset: Dataset, coded: bytes) -> Dataset:
    """Replace the pixel data by an encoded frame."""
    dataset.PixelData = encapsulate([coded])
    dataset["PixelData"].VR = "OB"
    return dataset


def cut_frame(dataset: Dataset) -> Dataset:
    """Cut the code stream of a compressed image in half; the file around it stays whole."""
    coded = frame_of(dataset)
    return set_frame(dataset, coded[: len(coded) // 4 * 2])


def without(dataset: Dataset, *keywords: str) -> Dataset:
    """Delete attributes."""
    for keyword in keywords:
        del dataset[keyword]
    return dataset


def replace_once(data: bytes, old: bytes, new: bytes) -> bytes:
    """Replace bytes that occur once."""
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


# --- One file for each refusal ----------------------------------------------------------------


class Refused(NamedTuple):
    """A file that a dataset must not hold.

    Attributes:
        make: Returns its bytes.
        words: A regular expression that is found in the reason, and in no other case's.
        lone: Whether the file is refused on its own too, outside a dataset.
    """

    make: Callable[[], bytes]
    words: str
    lone: bool = True


def _stored() -> np.ndarray:
    """12 bits, 48 x 40."""
    return (grey_picture(48, 40).astype(np.uint16) << 4) + 5


def _image(**header) -> Dataset:
    return make_dataset(_stored(), 12, **header)


def _bytes(**header) -> bytes:
    return to_bytes(_image(**header))


def _compressed(syntax: uid.UID, **header) -> Dataset:
    """A compressed image whose header is changed afterwards."""
    dataset = make_dataset(grey_picture(48, 40)) if syntax == uid.JPEGBaseline8Bit else _image()
    encode(dataset, syntax)
    for keyword, value in header.items():
        setattr(dataset, keyword, value)
    return dataset


def _float_pixels() -> bytes:
    dataset = without(_image(), "PixelData")
    dataset.FloatPixelData = _stored().astype("<f4").tobytes()
    return to_bytes(dataset)


def _endless_runs() -> bytes:
    dataset = _compressed(uid.RLELossless)
    return to_bytes(set_frame(dataset, frame_of(dataset) + bytes(4 * 48 * 40)))


def _deflate_bomb() -> bytes:
    data = encode(_image(), uid.DeflatedExplicitVRLittleEndian)
    (meta,) = struct.unpack_from("<I", data, 140)  # its length
    zeros = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS).compress(
        bytes(3 * MOST_PIXELS + 2**22)
    )
    return data[: 144 + meta] + zeros


def _without_syntax() -> bytes:
    dataset = _image(preamble=bytes(128))
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    stream = BytesIO()
    pydicom.dcmwrite(stream, dataset, implicit_vr=False, little_endian=True)
    return stream.getvalue()


def _no_decoder() -> bytes:
    dataset = set_frame(_image(), bytes(10))
    dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    return to_bytes(dataset)


def _unknown_syntax() -> bytes:
    dataset = set_frame(_image(), bytes(10))
    return replace_once(
        encode(dataset, uid.JPEG2000), uid.JPEG2000.encode(), b"1.2.840.10008.1.2.4.01"
    )


NOT_AN_IMAGE = "not an image"
CUT = "cannot be decoded"
MALFORMED = "LUT or window is malformed"
UNREADABLE = "header cannot be read"
REFUSED = {
    # not DICOM
    "text": Refused(lambda: b"not an image", NOT_AN_IMAGE),
    "nothing": Refused(lambda: b"", NOT_AN_IMAGE),
    "zeros": Refused(lambda: bytes(400), NOT_AN_IMAGE),
    "a PNG named .dicom": Refused(encode_picture, "is a PNG picture", lone=False),
    "a JPEG named .dicom": Refused(lambda: encode_picture(".jpg"), "is a JPEG picture", lone=False),
    # the header
    "no transfer syntax": Refused(_without_syntax, "names no transfer syntax"),
    "unknown transfer syntax": Refused(_unknown_syntax, "no installed decoder .*4.01"),
    "no decoder": Refused(_no_decoder, "no installed decoder .*MPEG2"),
    "cut within the header": Refused(lambda: _bytes()[:300], "holds no .*cut short"),
    "cut within the file's own header": Refused(lambda: _bytes()[:140], "names no transfer syntax"),
    "rows that are no number": Refused(
        lambda: replace_once(_bytes(), b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00FD"), UNREADABLE
    ),
    "a deflate bomb": Refused(_deflate_bomb, f"{UNREADABLE} .*inflates to more"),
    "no rows": Refused(lambda: to_bytes(without(_image(), "Rows")), "holds no Rows"),
    "a report": Refused(
        lambda: to_bytes(
            without(_image(), "Rows", "Columns", "PhotometricInterpretation", "PixelData")
        ),
        "holds no Rows, Columns, PhotometricInterpretation .*a report",
    ),
    "colour": Refused(
        lambda: _bytes(PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0),
        r"in colour \(RGB\)",
    ),
    "a palette": Refused(
        lambda: _bytes(PhotometricInterpretation="PALETTE COLOR"), r"in colour \(PALETTE"
    ),
    "too many pixels": Refused(lambda: _bytes(Rows=65_535, Columns=65_535), "4,295 million"),
    "two frames": Refused(lambda: _bytes(NumberOfFrames=2), "holds 2 frames"),
    "32 bits": Refused(
        lambda: to_bytes(make_dataset(_stored().astype(np.uint32))), "32 bits in 32"
    ),
    "1 bit": Refused(lambda: _bytes(BitsStored=1, HighBit=0), "1 bits in 16"),
    "12 bits in 8": Refused(lambda: _bytes(BitsAllocated=8), "12 bits in 8"),
    "bits at the high end": Refused(lambda: _bytes(HighBit=15), "end at bit 15"),
    "a view that is no text": Refused(
        lambda: replace_once(
            _bytes(ViewPosition="LLO"), b"\x18\x00\x01\x51CS", b"\x18\x00\x01\x51FD"
        ),
        "view is malformed",
        lone=False,
    ),
    # the pixel data
    "float pixels": Refused(_float_pixels, "floating-point"),
    "no pixel data": Refused(lambda: to_bytes(without(_image(), "PixelData")), "no pixel data"),
    "empty pixel data": Refused(lambda: _bytes(PixelData=b""), "no pixel data"),
    "raw, cut short": Refused(lambda: _bytes()[:-500], CUT),
    "raw, other size": Refused(lambda: _bytes(Rows=60), CUT),
    "big endian, cut short": Refused(lambda: encode(_image(), uid.ExplicitVRBigEndian)[:-500], CUT),
    "deflated, cut short": Refused(
        lambda: encode(_image(), uid.DeflatedExplicitVRLittleEndian)[:-500], "cut short|cannot be"
    ),
    **{
        f"{syntax.keyword}, {name}": Refused(make, words)
        for syntax in (uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless)
        for name, make, words in (
            ("file cut short", lambda s=syntax: to_bytes(_compressed(s))[:-40], "cut short"),
            ("code cut short", lambda s=syntax: to_bytes(cut_frame(_compressed(s))), CUT),
            ("other rows", lambda s=syntax: to_bytes(_compressed(s, Rows=60)), CUT),
        )
    },
    "JPEG, other rows": Refused(
        lambda: to_bytes(_compressed(uid.JPEGBaseline8Bit, Rows=60)), "48 rows and 40 columns"
    ),
    "run lengths without end": Refused(_endless_runs, "holds more than the header's"),
    "more rows than the header's": Refused(lambda: _bytes(Rows=20), "holds more than the header's"),
    "one grey level": Refused(lambda: _bytes(WindowCenter=60000, WindowWidth=2), "is uniform"),
    # LUT and window
    "an empty LUT": Refused(lambda: _bytes(VOILUTSequence=[Dataset()]), MALFORMED),
    "a LUT without entries": Refused(
        lambda: _bytes(ModalityLUTSequence=[lut([], 0, 12, "OW")]), MALFORMED
    ),
    "a LUT with too few entries": Refused(
        lambda: _bytes(VOILUTSequence=[replaced(lut([1, 2, 3], 0, 8), LUTDescriptor=[9, 0, 8])]),
        f"{MALFORMED} .*entries of 9",
    ),
    "a slope that is not finite": Refused(
        lambda: replace_once(_bytes(RescaleSlope=1234), b"1234.0", b"nan   "),
        f"{MALFORMED} .*RescaleSlope",
    ),
    "an odd window function": Refused(
        lambda: _bytes(WindowCenter=1, WindowWidth=5, VOILUTFunction="ODD"), f"{MALFORMED} .*ODD"
    ),
    "a window that is no number": Refused(
        lambda: replace_once(_bytes(WindowCenter=1234, WindowWidth=5), b"1234", b"x234"), MALFORMED
    ),
}

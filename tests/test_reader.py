"""Files to 8-bit grey: DICOM's pixel pipeline, transfer syntaxes, PNG and JPEG."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from dicom_files import encode, encode_jpeg, lut, make_dataset, to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pydicom import uid
from pydicom.data import data_manager
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.dicom import decode_dicom
from dernet_utils.imaging.jpeg import JPEG_END
from dernet_utils.imaging.radiograph import PNG_SIGNATURE
from dernet_utils.imaging.reader import decode_radiograph, read_radiograph

# Only what is in the wheel: pydicom's own look-up functions would download more.
BUNDLED = Path(data_manager.DATA_ROOT) / "test_files"


def pixels_of(data: bytes) -> np.ndarray:
    """The pixels of a DICOM file, by the function that returns its header too."""
    pixels, header = decode_dicom(data)
    assert "PixelData" not in header and pixels.shape == (header.Rows, header.Columns)
    return pixels


def decode(stored: np.ndarray, bits: int | None = None, **header) -> np.ndarray:
    return pixels_of(to_bytes(make_dataset(stored, bits, **header)))


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth 12-bit picture with noise, uint16 (48, 40)."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:48, :40]
    smooth = 2000 + 1500 * np.sin(y / 9) * np.cos(x / 7)
    return np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 4095).astype(np.uint16)


# --- DICOM's pixel pipeline -------------------------------------------------------------------


def test_window_by_hand():
    stored = np.array([[0, 499, 500, 1000, 1499, 1500, 4095]], np.uint16)
    # PS3.3 C.11.2.1.2.1 with centre 1000 and width 1001: (x - 999.5) / 1000 + 0.5.
    expected = [0, 0, round(255 * 0.0005), round(255 * 0.5005), round(255 * 0.9995), 255, 255]
    assert decode(stored, 12, WindowCenter=1000, WindowWidth=1001).tolist() == [expected]


def test_rescale_comes_before_the_window():
    stored = np.array([[0, 50, 100]], np.uint16)
    window = {"WindowCenter": 100, "WindowWidth": 201}
    scaled = decode(stored, 12, RescaleSlope=2, RescaleIntercept=0, **window)
    assert scaled.tolist() == decode(2 * stored, 12, **window).tolist()
    assert scaled.tolist() == [[round(255 * 0.0025), 128, 255]]


def test_first_of_several_windows(picture):
    first = decode(picture, 12, WindowCenter=2000, WindowWidth=800)
    several = decode(picture, 12, WindowCenter=[2000, 500], WindowWidth=[800, 100])
    np.testing.assert_array_equal(several, first)
    assert (first != decode(picture, 12, WindowCenter=500, WindowWidth=100)).any()


def test_voi_lut_is_preferred_to_a_window():
    stored = np.array([[9, 10, 11, 12, 13]], np.uint16)
    table = lut([0, 1000, 4000], first=10, bits=12)
    grey = decode(stored, 12, VOILUTSequence=[table], WindowCenter=5, WindowWidth=2)
    # Below the first entry the first holds, past the last the last; 12 bits end at 4095.
    assert grey.tolist() == [[0, 0, round(255 * 1000 / 4095), 249, 249]]


def test_modality_lut_feeds_the_window():
    stored = np.array([[0, 1, 2]], np.uint16)
    table = lut([30, 20, 10], first=0, bits=16)
    table.ModalityLUTType = "US"
    grey = decode(stored, 12, ModalityLUTSequence=[table], WindowCenter=20.5, WindowWidth=21)
    assert grey.tolist() == [[255, 128, 0]]


@pytest.mark.parametrize("vr", ["US", "OW"])
def test_lut_of_either_form_and_signed_start(vr):
    stored = np.array([[-3, -2, -1, 0, 1]], np.int16)
    table = lut([0, 128, 255], first=-2, bits=8, vr=vr)
    assert decode(stored, VOILUTSequence=[table]).tolist() == [[0, 0, 128, 255, 255]]


SIGNS = [
    # stored values, header, the first value of the table as 16 bits
    (np.array([[-3, -2, -1, 0]], np.int16), {}, 0xFFFE),
    (np.array([[0xFFFD, 0xFFFE, 0xFFFF, 0xFFFF]], np.uint16), {}, 0xFFFE),
    (np.array([[0, 1, 2, 3]], np.uint16), {"RescaleSlope": 1, "RescaleIntercept": -3}, 0xFFFE),
    (np.array([[3, 2, 1, 0]], np.uint16), {"RescaleSlope": -1, "RescaleIntercept": 0}, 0xFFFE),
]


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize(("stored", "header", "first"), SIGNS)
def test_a_tables_first_value_has_the_sign_of_the_values_it_is_for(
    stored, header, first, vr, syntax
):
    """Whatever its VR says: PS3.3 C.11.2.1.1."""
    table = lut([0, 128, 255], first=0, bits=8)
    first = first - 2**16 if vr == "SS" else first
    table.add_new("LUTDescriptor", vr, [3, first, 8])
    dataset = make_dataset(stored, 16, VOILUTSequence=[table], **header)
    grey = pixels_of(encode(dataset, syntax))
    assert grey.tolist() == [[0, 0, 128, 128 if stored[0, 3] == 0xFFFF else 255]]


@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize(("dtype", "value"), [(np.int16, -7), (np.uint16, 0xFFF9)])
def test_padding_has_the_sign_of_the_pixels(dtype, value, vr):
    """Whatever its VR says: PS3.3 C.7.5.1.1.2."""
    stored = np.array([[value, value + 1, 100, 200, 300]], np.int64).astype(dtype)
    dataset = make_dataset(stored, 16, WindowCenter=200.5, WindowWidth=201)
    written = value % 2**16
    for keyword, more in (("PixelPaddingValue", 0), ("PixelPaddingRangeLimit", 1)):
        number = written + more
        dataset.add_new(keyword, vr, number - 2**16 if vr == "SS" else number)
    dataset.PhotometricInterpretation = "MONOCHROME1"  # inverted, padding would be white
    assert pixels_of(to_bytes(dataset)).tolist() == [[0, 0, 255, 128, 0]]


@pytest.mark.parametrize(
    ("entries", "bits", "white"),
    [
        ([0, 1000, 4095], 12, 4095),
        ([0, 1000, 4000], 12, 4095),  # the device's white is not used
        ([1000, 1000, 3000], 12, 4095),  # nor is its black
        ([0, 20000, 40000], 16, 65535),
        ([0, 1000, 4095], 0, 4095),  # no such depth: the fewest bits that hold the entries
        ([0, 1000, 4095], 8, 4095),
        ([0, 0, 0], 99, 1),
    ],
)
def test_the_output_of_a_table_spans_its_bits(entries, bits, white):
    stored = np.array([[0, 1, 2]], np.uint16)
    grey = decode(stored, 12, VOILUTSequence=[lut(entries, first=0, bits=bits)])
    assert grey.tolist() == [[round(255 * entry / white) for entry in entries]]


@pytest.mark.parametrize("data", [[0, 128], [], None, b"", b"\x00\x01\x02\x03"])
def test_a_table_with_too_few_entries_is_refused(data):
    table = lut([0] * 5, first=0, bits=8)
    table.add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    with pytest.raises(DernetError, match="LUT"):
        decode(np.array([[0, 1, 2]], np.uint16), 12, VOILUTSequence=[table])


def test_lut_of_eight_bits_packed_two_to_a_word():
    stored = np.array([[0, 1, 2, 300]], np.uint16)
    table = lut([0, 85, 170, 255], first=0, bits=8, vr="OW")
    table.LUTData = bytes([0, 85, 170, 255])
    assert decode(stored, 12, VOILUTSequence=[table]).tolist() == [[0, 85, 170, 255]]
    table.add_new("LUTData", "US", [0x5500, 0xFFAA])  # the same bytes, called words
    assert decode(stored, 12, VOILUTSequence=[table]).tolist() == [[0, 85, 170, 255]]


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"WindowCenter": None, "WindowWidth": None},
        {"WindowCenter": 100, "WindowWidth": 0},  # the standard forbids it
        {"WindowCenter": 100},
    ],
)
def test_without_voi_the_minimum_to_maximum_is_shown(attributes):
    stored = np.array([[1000, 1255, 1510]], np.uint16)
    assert decode(stored, 12, **attributes).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_functions_equal_pydicom(picture, function):
    header = {"WindowCenter": 1900, "WindowWidth": 1300, "VOILUTFunction": function}
    theirs = apply_windowing(picture, make_dataset(picture, 12, **header)) / 4095
    np.testing.assert_array_equal(decode(picture, 12, **header), np.rint(255 * theirs))


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm",
        "examples_overlay.dcm",
        "693_J2KI.dcm",
        "dicomdirtests/77654033/CR1/6154",  # MONOCHROME1 with a rescale
        "dicomdirtests/98892001/CT5N/2062",
    ],
)
def test_windowed_files_equal_pydicom(name):
    dataset = pydicom.dcmread(BUNDLED / name)
    lowest = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
    ends = np.array([lowest, lowest + 2**dataset.BitsStored - 1])
    low, high = apply_modality_lut(ends, dataset)
    shown = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    fraction = (shown - low) / (high - low)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        fraction = 1 - fraction
    # Different order of the same operations: halves may be rounded differently.
    assert np.abs(read_radiograph(BUNDLED / name).pixels - 255 * fraction).max() <= 0.5 + 1e-6


def test_monochrome1_is_inverted_last(picture):
    header = {"WindowCenter": 1500, "WindowWidth": 900}
    bright = decode(picture, 12, **header).astype(int)
    inverted = decode(picture, 12, PhotometricInterpretation="MONOCHROME1", **header)
    assert np.abs(inverted + bright - 255).max() == 0


def test_padding_counts_for_nothing_and_is_black(picture):
    padded = picture.copy()
    padded[:, :5] = 4095
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        header = {"PhotometricInterpretation": photometric}
        grey = decode(padded, 12, PixelPaddingValue=4095, **header)
        assert (grey[:, :5] == 0).all()
        np.testing.assert_array_equal(grey[:, 5:], decode(picture[:, 5:].copy(), 12, **header))


def test_padding_range():
    stored = np.array([[0, 10, 20, 30, 40]], np.uint16)
    grey = decode(stored, 12, PixelPaddingValue=40, PixelPaddingRangeLimit=30)
    assert grey.tolist() == [[0, 128, 255, 0, 0]]


def test_nothing_but_padding_and_constant_images_are_black():
    constant = np.full((3, 4), 7, np.uint16)
    assert (decode(constant, 12, PixelPaddingValue=7) == 0).all()
    assert (decode(constant, 12) == 0).all()


@given(
    st.sampled_from(["<u2", "<i2", "u1", "i1"]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6))
    )
)
@settings(max_examples=60, deadline=None)
def test_order_of_pixels_is_kept(stored):
    grey = decode(stored)
    assert grey.shape == stored.shape and grey.dtype == np.uint8
    order = np.argsort(stored, axis=None)
    assert (np.diff(grey.ravel()[order].astype(int)) >= 0).all()
    if stored.min() < stored.max():
        assert (grey.min(), grey.max()) == (0, 255)


# --- Transfer syntaxes ------------------------------------------------------------------------


def test_the_header_comes_with_the_pixels(picture):
    radiograph = decode_radiograph(to_bytes(make_dataset(picture, 12, BodyPartExamined="LSPINE")))
    assert (radiograph.form, radiograph.coloured) == ("DICOM", 0.0)
    assert radiograph.header.BodyPartExamined == "LSPINE"


LOSSLESS = [
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
]


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_lossless_syntaxes_give_the_same_picture(picture, syntax):
    plain = decode(picture, 12)
    np.testing.assert_array_equal(pixels_of(encode(make_dataset(picture, 12), syntax)), plain)


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("sign", ["u2", "i2"])
def test_lossless_jpeg_gives_the_same_picture(picture, predictor, sign):
    signed = (picture.astype(int) - (2048 if sign == "i2" else 0)).astype(sign)
    syntax = uid.JPEGLosslessSV1 if predictor == 1 else uid.JPEGLossless
    data = encode_jpeg(make_dataset(signed, 12), syntax, predictor=predictor)
    np.testing.assert_array_equal(pixels_of(data), decode(signed, 12))


def test_jpeg_baseline_is_near(picture):
    eight = (picture >> 4).astype(np.uint8)
    header = {"WindowCenter": 128, "WindowWidth": 256}
    data = encode(make_dataset(eight, **header), uid.JPEGBaseline8Bit)
    assert np.abs(pixels_of(data).astype(int) - eight).max() <= 4


def test_bits_above_those_stored_are_ignored(picture):
    header = {"WindowCenter": 2048, "WindowWidth": 4096}
    np.testing.assert_array_equal(
        decode(picture | 0xF000, 12, **header), decode(picture, 12, **header)
    )


def without_preamble(data: bytes) -> bytes:
    return data[132:]


def without_meta(data: bytes) -> bytes:
    return data[144 + int.from_bytes(data[140:144], "little") :]


@pytest.mark.parametrize("remove", [without_preamble, without_meta])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize("first", ["SpecificCharacterSet", "ImageType", "SOPClassUID"])
def test_a_file_without_preamble_or_meta_information_is_read(picture, syntax, remove, first):
    dataset = make_dataset(picture, 12, ImageType=["ORIGINAL", "PRIMARY"])
    dataset.SpecificCharacterSet = "ISO_IR 100"
    if first != "SpecificCharacterSet":
        del dataset.SpecificCharacterSet
    if first == "SOPClassUID":
        del dataset.ImageType
    data = remove(encode(dataset, syntax))
    assert decode_radiograph(data).form == "DICOM"
    np.testing.assert_array_equal(pixels_of(data), decode(picture, 12))


@pytest.mark.parametrize("start", [b"\x08\x00", b"\x02\x00\x00\x00", b"\x08\x00\x05\x00CS"])
def test_what_only_begins_like_dicom_is_refused_in_a_sentence(start):
    for rest in (bytes(400), b"\xff" * 400, b"text " * 80):
        with pytest.raises(DernetError, match="; "):
            decode_radiograph(start + rest)


@pytest.mark.parametrize("photometric", ["monochrome2", "Monochrome2 ", " MONOCHROME2"])
def test_capitals_and_spaces_of_the_photometric_interpretation(picture, photometric):
    grey = decode(picture, 12, PhotometricInterpretation=photometric)
    np.testing.assert_array_equal(grey, decode(picture, 12))


def test_a_monochrome_image_needs_no_samples_per_pixel(picture):
    dataset = make_dataset(picture, 12)
    for value in (None, ...):
        if value is ...:
            del dataset.SamplesPerPixel
        else:
            dataset.SamplesPerPixel = value
        np.testing.assert_array_equal(pixels_of(to_bytes(dataset)), decode(picture, 12))


# --- Refusals ---------------------------------------------------------------------------------


UNIFORM = {
    "empty DICOM": to_bytes(make_dataset(np.zeros((9, 7), np.uint16), 12)),
    "window beyond all values": to_bytes(
        make_dataset(np.arange(63, dtype=np.uint16).reshape(9, 7), 12, WindowCenter=4000,
                     WindowWidth=10)
    ),
    "nothing but padding": to_bytes(
        make_dataset(np.full((9, 7), 5, np.uint16), 12, PixelPaddingValue=5)
    ),
    "black PNG": cv2.imencode(".png", np.zeros((9, 7), np.uint8))[1].tobytes(),
    "white JPEG": cv2.imencode(".jpg", np.full((9, 7), 255, np.uint8))[1].tobytes(),
    "grey PNG": cv2.imencode(".png", np.full((9, 7), 999, np.uint16))[1].tobytes(),
}  # fmt: skip


@pytest.mark.parametrize("name", UNIFORM)
def test_an_image_of_one_grey_level_is_refused(name):
    with pytest.raises(DernetError, match="uniform"):
        decode_radiograph(UNIFORM[name])


@pytest.mark.parametrize("more", [b"\1\0", b"\0\0\0\7", bytes(48 * 40 * 2)])
def test_more_pixels_than_the_header_says_are_refused(picture, more):
    dataset = make_dataset(picture, 12)
    dataset.PixelData += more
    with pytest.raises(DernetError, match="more than the header"):
        decode_radiograph(to_bytes(dataset))


@pytest.mark.parametrize("zeros", [1, 3, 11])
def test_zeros_after_the_pixels_are_no_pixels(zeros):
    dataset = make_dataset(np.arange(15, dtype=np.uint8).reshape(3, 5))
    dataset.PixelData += bytes(zeros)
    assert pixels_of(to_bytes(dataset)).shape == (3, 5)


def test_bundled_files_are_read_or_refused_with_reason_and_help():
    read, refused = [], []
    for path in sorted(filter(Path.is_file, BUNDLED.rglob("*"))):
        try:
            grey = read_radiograph(path).pixels
            assert grey.dtype == np.uint8 and grey.ndim == 2, path
            read.append(path.name)
        except DernetError as error:
            reason, _, help_ = str(error).removeprefix(f"{path}: ").partition("; ")
            assert str(error).startswith(f"{path}: ") and reason and help_.endswith("."), error
            refused.append(path.name)
    assert len(read) >= 45, read
    # Grey-scale images that are whole, with 8 to 16 bits and one frame: none is refused but
    # those that no decoder reads and one with a damaged code stream.
    assert {"MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPEG2000.dcm"} <= set(read)
    assert {"6154", "JPGExtended.dcm"} <= set(read)
    assert {"MR_truncated.dcm", "rtdose.dcm", "badVR.dcm"} <= set(refused)


def test_twelve_bit_lossy_jpeg_is_near(picture):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    data = encode_jpeg(make_dataset(picture, 12, **window), uid.JPEGExtended12Bit, level=100)
    assert np.abs(pixels_of(data).astype(int) - decode(picture, 12, **window)).max() <= 1


@pytest.mark.parametrize(
    "syntax", [uid.ExplicitVRLittleEndian, *LOSSLESS], ids=lambda syntax: syntax.keyword
)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_files_cut_short_are_refused(picture, syntax, kept):
    data = encode(make_dataset(picture, 12), syntax)
    with pytest.raises(DernetError, match="copy"):
        decode_radiograph(data[: int(kept * len(data))])


def test_damaged_files_end_in_a_sentence():
    """A decoder that ends the process would end this test run (GDCM does, on JPEG 2000)."""
    rng = np.random.default_rng(5)
    for name in ("693_J2KI.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"):
        whole = np.frombuffer((BUNDLED / name).read_bytes(), np.uint8)
        for _ in range(25):
            damaged = whole.copy()
            damaged[rng.integers(132, whole.size, 12)] = rng.integers(0, 256, 12)
            try:
                assert decode_radiograph(damaged.tobytes()).pixels.dtype == np.uint8
            except DernetError as error:
                assert "; " in str(error)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path, tmp_path / "no.dicom"):
        with pytest.raises(DernetError, match=f"{path.name}: .*cannot be read"):
            read_radiograph(path)


# --- PNG and JPEG -----------------------------------------------------------------------------


def test_png_of_eight_bits_is_taken_as_it_is(tmp_path, picture):
    grey = (picture >> 5).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "picture.png"), grey)
    np.testing.assert_array_equal(read_radiograph(tmp_path / "picture.png").pixels, grey)


def test_png_of_sixteen_bits_spans_its_range():
    code = cv2.imencode(".png", np.array([[1000, 1255, 1510]], np.uint16))[1].tobytes()
    assert decode_radiograph(code).pixels.tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_colour_becomes_grey(suffix):
    flat = np.full((24, 24, 3), (40, 120, 200), np.uint8)  # blue, green, red
    flat[0, 0] = 0  # an image of one grey level would be refused
    grey = decode_radiograph(cv2.imencode(suffix, flat)[1].tobytes()).pixels
    assert grey.shape == (24, 24)
    assert np.abs(grey[16:, 16:] - (0.114 * 40 + 0.587 * 120 + 0.299 * 200)).max() <= 2


def test_jpeg_is_near(picture):
    grey = (picture >> 4).astype(np.uint8)
    code = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    assert np.abs(decode_radiograph(code).pixels.astype(int) - grey).max() <= 4


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("kept", [0.2, 0.7, 0.98])
def test_pictures_cut_short_are_refused(picture, suffix, kept):
    code = cv2.imencode(suffix, (picture >> 4).astype(np.uint8))[1].tobytes()
    with pytest.raises(DernetError, match="cut short; copy"):
        decode_radiograph(code[: int(kept * len(code))])


def png_chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", crc)


@pytest.fixture
def grey(picture) -> np.ndarray:
    return (picture >> 4).astype(np.uint8)


@pytest.fixture
def whole_png(grey) -> bytes:
    return cv2.imencode(".png", grey)[1].tobytes()


BESIDE = {
    "a damaged text": png_chunk(b"tEXt", b"Comment\0spine", crc=1),
    "a large text": png_chunk(b"zTXt", b"Raw\0\0" + bytes(9_000_000)),
    "a damaged profile": png_chunk(b"iCCP", b"\1" * 40),
    "a damaged gamma": png_chunk(b"gAMA", b"", crc=5),
    "an unknown chunk": png_chunk(b"abCd", b"\xff" * 100),
    "an animation": png_chunk(b"acTL", struct.pack(">2I", 2, 0))
    + png_chunk(b"fcTL", struct.pack(">5I2H2B", 0, 40, 48, 0, 0, 1, 10, 0, 0))
    + png_chunk(b"fdAT", struct.pack(">I", 1) + b"\x78\x9c\xff"),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_a_png_picture_does_not_matter(grey, whole_png, name):
    after_header = len(PNG_SIGNATURE) + 25
    data = whole_png[:after_header] + BESIDE[name] + whole_png[after_header:]
    np.testing.assert_array_equal(decode_radiograph(data).pixels, grey)


@pytest.mark.parametrize("more", [bytes(5000), b"\xff\xda" * 500, b"IEND", PNG_SIGNATURE])
def test_what_follows_a_picture_does_not_matter(grey, whole_png, more):
    np.testing.assert_array_equal(decode_radiograph(whole_png + more).pixels, grey)
    jpeg = cv2.imencode(".jpg", grey)[1].tobytes()
    alone = decode_radiograph(jpeg).pixels
    for data in (jpeg + more, jpeg[:-2] + bytes(2) + JPEG_END + more):
        np.testing.assert_array_equal(decode_radiograph(data).pixels, alone)


def test_pictures_without_an_end_mark_are_read_if_all_rows_are_there(grey, whole_png):
    np.testing.assert_array_equal(decode_radiograph(whole_png[:-12]).pixels, grey)
    jpeg = cv2.imencode(".jpg", grey)[1].tobytes()
    np.testing.assert_array_equal(
        decode_radiograph(jpeg.removesuffix(JPEG_END)).pixels, decode_radiograph(jpeg).pixels
    )


def test_a_png_cut_anywhere_near_its_end_is_whole_or_refused(grey, whole_png):
    read = 0
    for kept in range(len(whole_png) - 40, len(whole_png)):
        try:
            np.testing.assert_array_equal(decode_radiograph(whole_png[:kept]).pixels, grey)
            read += 1
        except DernetError:
            pass
    assert read >= 16  # the end mark and the checksum before it tell nothing about the pixels


def test_a_png_with_a_damaged_byte_is_unchanged_or_refused(grey, whole_png):
    rng, refused = np.random.default_rng(3), 0
    for at in rng.integers(len(PNG_SIGNATURE) + 25, len(whole_png), 150):
        damaged = bytearray(whole_png)
        damaged[at] ^= 1 << int(rng.integers(8))
        try:
            np.testing.assert_array_equal(decode_radiograph(bytes(damaged)).pixels, grey)
        except DernetError:
            refused += 1
    assert refused >= 100


@pytest.mark.parametrize("kept", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("form", [{}, {"progressive": True}, {"restart_marker_blocks": 4}])
def test_a_part_of_a_jpeg_with_an_end_mark_is_cut_short(grey, kept, form):
    stream = BytesIO()
    Image.fromarray(np.tile(grey, (6, 6))).save(stream, "JPEG", quality=95, **form)
    whole = stream.getvalue()
    assert decode_radiograph(whole).pixels.shape == (6 * 48, 6 * 40)
    with pytest.raises(DernetError, match="cut short"):
        decode_radiograph(whole[: int(kept * len(whole))] + JPEG_END)


@pytest.mark.parametrize("rows", [0, 1, 47])
def test_a_png_with_too_few_rows_is_cut_short(grey, rows):
    lines = b"".join(b"\0" + line.tobytes() for line in grey[:rows])
    header = png_chunk(b"IHDR", struct.pack(">2I5B", 40, 48, 8, 0, 0, 0, 0))
    data = PNG_SIGNATURE + header + png_chunk(b"IDAT", zlib.compress(lines))
    with pytest.raises(DernetError, match="cut short"):
        decode_radiograph(data + png_chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [1, 3, 5, 40])
@pytest.mark.parametrize("interlaced", [False, True])
def test_an_interlaced_png_is_whole_with_all_its_passes(side, interlaced):
    """The seven passes of Adam7 are written by hand; no common library writes them."""
    grey = np.arange(side * (side + 2), dtype=np.uint8).reshape(side, side + 2)
    starts = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2)] if interlaced else [(0, 0, 1, 1)]  # fmt: skip
    parts = [grey[y::down, x::right] for x, y, right, down in starts]
    lines = [b"\0" + line.tobytes() for part in parts if part.size for line in part]

    def png(lines):
        header = struct.pack(">2I5B", side + 2, side, 8, 0, 0, 0, interlaced)
        coded = png_chunk(b"IDAT", zlib.compress(b"".join(lines)))
        return PNG_SIGNATURE + png_chunk(b"IHDR", header) + coded + png_chunk(b"IEND", b"")

    np.testing.assert_array_equal(decode_radiograph(png(lines)).pixels, grey)
    with pytest.raises(DernetError, match="cut short"):
        decode_radiograph(png(lines[:-1]))


def test_the_orientation_in_exif_data_is_applied(grey):
    for form in ("PNG", "JPEG"):
        stream, exif = BytesIO(), Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees, clockwise
        Image.fromarray(grey).save(stream, form, quality=100, exif=exif)
        turned = decode_radiograph(stream.getvalue()).pixels.astype(int)
        assert np.abs(turned - np.rot90(grey, -1)).max() <= 4, form


def test_damaged_picture_is_refused():
    with pytest.raises(DernetError, match="cannot be decoded"):
        decode_radiograph(PNG_SIGNATURE + b"\1" * 50 + b"IEND")


def test_a_picture_has_a_form_and_no_header(picture):
    grey = (picture >> 4).astype(np.uint8)
    for suffix, form in ((".png", "PNG"), (".jpg", "JPEG")):
        radiograph = decode_radiograph(cv2.imencode(suffix, grey)[1].tobytes())
        assert (radiograph.form, radiograph.header, radiograph.coloured) == (form, None, 0.0)


def test_the_coloured_fraction_is_counted():
    half = np.full((16, 16, 3), 90, np.uint8)
    half[:4] = (40, 120, 200)
    assert decode_radiograph(cv2.imencode(".png", half)[1].tobytes()).coloured == 0.25

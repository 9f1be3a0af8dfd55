"""Files to 8-bit grey, CLAHE, the cache."""

import errno
import json
import os
from io import BytesIO
from pathlib import Path

import cv2
import gdcm
import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydicom import uid
from pydicom.data import data_manager
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import get_profile
from dernet_utils.dataset.prepared import load_cached
from dernet_utils.imaging import cache, enhance
from dernet_utils.imaging import reader as imaging_reader
from dernet_utils.imaging.cache import cache_images
from dernet_utils.imaging.dicom import decode_dicom
from dernet_utils.imaging.enhance import clahe, clahe_by_hand, preprocess
from dernet_utils.imaging.reader import decode_radiograph, read_radiograph

# Only what is in the wheel: pydicom's own look-up functions would download more.
BUNDLED = Path(data_manager.DATA_ROOT) / "test_files"
RADIOGRAPH = "1.2.840.10008.5.1.4.1.1.1.1"  # Digital X-Ray Image Storage, for presentation


def make_dataset(stored: np.ndarray, bits: int | None = None, **attributes) -> Dataset:
    """Return an uncompressed grey-scale image with the given header attributes."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = RADIOGRAPH, "1.2.826.0.1.3680043.8.498.1"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def to_bytes(dataset: Dataset) -> bytes:
    file = BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def decode(stored: np.ndarray, bits: int | None = None, **attributes) -> np.ndarray:
    return decode_dicom(to_bytes(make_dataset(stored, bits, **attributes)))


def lut(entries: list[int], first: int, bits: int, vr: str = "US") -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new("LUTData", vr, entries if vr == "US" else np.array(entries, "<u2").tobytes())
    return item


@pytest.fixture
def film() -> np.ndarray:
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


def test_first_of_several_windows(film):
    first = decode(film, 12, WindowCenter=2000, WindowWidth=800)
    several = decode(film, 12, WindowCenter=[2000, 500], WindowWidth=[800, 100])
    np.testing.assert_array_equal(several, first)
    assert (first != decode(film, 12, WindowCenter=500, WindowWidth=100)).any()


def test_voi_lut_is_preferred_to_a_window():
    stored = np.array([[9, 10, 11, 12, 13]], np.uint16)
    table = lut([0, 1000, 4000], first=10, bits=12)
    grey = decode(stored, 12, VOILUTSequence=[table], WindowCenter=5, WindowWidth=2)
    # Below the first entry the first holds, past the last the last.
    assert grey.tolist() == [[0, 0, round(255 * 1000 / 4000), 255, 255]]


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
def test_window_functions_equal_pydicom(film, function):
    header = {"WindowCenter": 1900, "WindowWidth": 1300, "VOILUTFunction": function}
    theirs = apply_windowing(film, make_dataset(film, 12, **header)) / 4095
    np.testing.assert_array_equal(decode(film, 12, **header), np.rint(255 * theirs))


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


def test_monochrome1_is_inverted_last(film):
    header = {"WindowCenter": 1500, "WindowWidth": 900}
    bright = decode(film, 12, **header).astype(int)
    inverted = decode(film, 12, PhotometricInterpretation="MONOCHROME1", **header)
    assert np.abs(inverted + bright - 255).max() == 0


def test_padding_counts_for_nothing_and_is_black(film):
    padded = film.copy()
    padded[:, :5] = 4095
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        header = {"PhotometricInterpretation": photometric}
        grey = decode(padded, 12, PixelPaddingValue=4095, **header)
        assert (grey[:, :5] == 0).all()
        np.testing.assert_array_equal(grey[:, 5:], decode(film[:, 5:].copy(), 12, **header))


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


def compressed(dataset: Dataset, syntax: uid.UID) -> bytes:
    """Return the file in a transfer syntax, encoded by pydicom, GDCM or OpenCV."""
    if syntax in (uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless):
        dataset.compress(syntax)
    elif syntax == uid.JPEGBaseline8Bit:
        code = cv2.imencode(".jpg", dataset.pixel_array, [cv2.IMWRITE_JPEG_QUALITY, 100])[1]
        dataset.PixelData = encapsulate([code.tobytes()])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax == uid.ExplicitVRBigEndian:
        dataset.PixelData = dataset.pixel_array.astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset["PixelData"].VR = "OW"
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
    return to_bytes(dataset)


def compressed_by_gdcm(dataset: Dataset, syntax: int, folder: Path) -> bytes:
    (folder / "raw.dcm").write_bytes(to_bytes(dataset))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(folder / "raw.dcm"))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(folder / "out.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (folder / "out.dcm").read_bytes()


LOSSLESS = [
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
]


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_lossless_syntaxes_give_the_same_picture(film, syntax):
    plain = decode(film, 12)
    np.testing.assert_array_equal(decode_dicom(compressed(make_dataset(film, 12), syntax)), plain)


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1"])
def test_lossless_jpeg_gives_the_same_picture(film, name, tmp_path):
    syntax = getattr(gdcm.TransferSyntax, name)
    data = compressed_by_gdcm(make_dataset(film, 12), syntax, tmp_path)
    np.testing.assert_array_equal(decode_dicom(data), decode(film, 12))


def test_jpeg_baseline_is_near(film):
    eight = (film >> 4).astype(np.uint8)
    header = {"WindowCenter": 128, "WindowWidth": 256}
    data = compressed(make_dataset(eight, **header), uid.JPEGBaseline8Bit)
    assert np.abs(decode_dicom(data).astype(int) - eight).max() <= 4


def test_bits_above_those_stored_are_ignored(film):
    header = {"WindowCenter": 2048, "WindowWidth": 4096}
    np.testing.assert_array_equal(decode(film | 0xF000, 12, **header), decode(film, 12, **header))


# --- Refusals ---------------------------------------------------------------------------------


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
    assert {"MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPEG2000.dcm", "6154"} <= set(read)
    assert {"JPGExtended.dcm", "MR_truncated.dcm", "rtdose.dcm", "badVR.dcm"} <= set(refused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NumberOfFrames": 3}, "3 frames.*save the frame"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour.*grey"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour.*grey"),
        ({"PixelData": None}, "no pixel data.*choose"),
        ({"BitsAllocated": 32, "BitsStored": 32}, "32 bits in 32.*choose"),
        ({"BitsStored": 1}, "1 bits in 16.*choose"),
        ({"Rows": 60}, "fewer|less than expected.*copy"),
        ({"FloatPixelData": b"\0" * 4}, "floating-point.*export"),
        ({"WindowCenter": 1, "WindowWidth": 5, "VOILUTFunction": "ODD"}, "ODD.*export"),
        ({"VOILUTSequence": [Dataset()]}, "malformed.*export"),
    ],
)
def test_refusals_name_reason_and_help(film, change, message):
    data = to_bytes(make_dataset(film, 12, **change))
    with pytest.raises(DernetError, match=message):
        decode_dicom(data)


def test_syntax_without_decoder(film):
    dataset = make_dataset(film, 12)
    dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    dataset.PixelData = encapsulate([b"\0" * 10])
    dataset["PixelData"].VR = "OB"
    with pytest.raises(DernetError, match=r"MPEG2.*gdcmconv --raw"):
        decode_dicom(to_bytes(dataset))


def test_twelve_bit_lossy_jpeg_names_a_converter():
    with pytest.raises(DernetError, match=r"12-bit.*dcmdjpeg"):
        read_radiograph(BUNDLED / "JPGExtended.dcm").pixels


@pytest.mark.parametrize(
    "syntax", [uid.ExplicitVRLittleEndian, *LOSSLESS], ids=lambda syntax: syntax.keyword
)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_files_cut_short_are_refused(film, syntax, kept):
    data = compressed(make_dataset(film, 12), syntax)
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


@pytest.mark.parametrize("content", [b"", b"hello", b"study_id,series_id\n", b"\0" * 400])
def test_other_content_is_not_an_image(tmp_path, content):
    path = tmp_path / "film.dicom"
    path.write_bytes(content)
    with pytest.raises(DernetError, match=r"film\.dicom: not an image.*PNG or JPEG"):
        read_radiograph(path).pixels


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path, tmp_path / "no.dicom"):
        with pytest.raises(DernetError, match="cannot be read"):
            read_radiograph(path).pixels
        with pytest.raises(DernetError, match="cannot be read"):
            decode_dicom(path)


# --- PNG and JPEG -----------------------------------------------------------------------------


def test_png_of_eight_bits_is_taken_as_it_is(tmp_path, film):
    grey = (film >> 5).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "film.png"), grey)
    np.testing.assert_array_equal(read_radiograph(tmp_path / "film.png").pixels, grey)


def test_png_of_sixteen_bits_spans_its_range():
    code = cv2.imencode(".png", np.array([[1000, 1255, 1510]], np.uint16))[1].tobytes()
    assert decode_radiograph(code).pixels.tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_colour_becomes_grey(suffix):
    flat = np.full((16, 16, 3), (40, 120, 200), np.uint8)  # blue, green, red
    grey = decode_radiograph(cv2.imencode(suffix, flat)[1].tobytes()).pixels
    assert grey.shape == (16, 16)
    assert np.abs(grey - (0.114 * 40 + 0.587 * 120 + 0.299 * 200)).max() <= 2


def test_jpeg_is_near(film):
    grey = (film >> 4).astype(np.uint8)
    code = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    assert np.abs(decode_radiograph(code).pixels.astype(int) - grey).max() <= 4


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("kept", [0.2, 0.7, 0.98])
def test_pictures_cut_short_are_refused(film, suffix, kept):
    code = cv2.imencode(suffix, (film >> 4).astype(np.uint8))[1].tobytes()
    with pytest.raises(DernetError, match="cut short; copy"):
        decode_radiograph(code[: int(kept * len(code))])


def test_damaged_picture_is_refused():
    with pytest.raises(DernetError, match="cannot be decoded"):
        decode_radiograph(imaging_reader.PNG_SIGNATURE + b"\1" * 50 + b"IEND").pixels


# --- CLAHE ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [clahe, clahe_by_hand])
def test_one_tile_with_every_level_once(function):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    # Each bin holds one pixel, nothing is clipped: the table is 255 (i + 1) / 256.
    expected = np.rint(255 * (np.arange(256) + 1) / 256).reshape(16, 16)
    np.testing.assert_array_equal(function(grey, 2.0, 1), expected)


def test_clipping_by_hand():
    histogram = np.zeros((1, 1, 256), int)
    histogram[0, 0, 7] = 700
    clipped = enhance._clip_histograms(histogram, 100)[0, 0]
    # 600 in excess: 2 for each bin and 88 left, one for every second bin from 0 on.
    expected = np.full(256, 2)
    expected[np.arange(88) * 2] += 1
    expected[7] += 100
    np.testing.assert_array_equal(clipped, expected)


@given(
    grey=hnp.arrays(
        np.uint8,
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        elements=st.integers(60, 120),
        fill=st.integers(0, 255),
    ),
    tiles=st.sampled_from([1, 2, 3, 4, 8, 11, 16]),
    clip_limit=st.sampled_from([0.01, 0.5, 1.0, 2.0, 3.7, 8.0, 40.0, 1000.0]),
)
@settings(max_examples=200, deadline=None)
def test_clahe_by_hand_equals_opencv(grey, tiles, clip_limit):
    ours = clahe_by_hand(grey, clip_limit, tiles).astype(int)
    assert np.abs(ours - clahe(grey, clip_limit, tiles)).max() <= 1


@pytest.mark.parametrize("shape", [(512, 512), (500, 333), (512, 333), (255, 257)])
@pytest.mark.parametrize("clip_limit", [1.0, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("tiles", [2, 8, 13])
def test_clahe_by_hand_equals_opencv_on_pictures(shape, clip_limit, tiles):
    rng = np.random.default_rng(1)
    y, x = np.mgrid[: shape[0], : shape[1]]
    picture = 90 + 60 * np.sin(y / 40) + 40 * np.cos(x / 55) + rng.normal(0, 3, shape)
    grey = np.clip(picture, 0, 255).astype(np.uint8)
    ours = clahe_by_hand(grey, clip_limit, tiles).astype(int)
    difference = np.abs(ours - clahe(grey, clip_limit, tiles))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("function", [clahe, clahe_by_hand])
@pytest.mark.parametrize(
    ("grey", "clip_limit", "tiles", "message"),
    [
        (np.zeros((4, 4)), 2.0, 8, "uint8"),
        (np.zeros((4, 4, 3), np.uint8), 2.0, 8, "uint8"),
        (np.zeros((0, 4), np.uint8), 2.0, 8, "uint8"),
        (None, 2.0, 8, "NoneType"),
        (np.zeros((4, 4), np.uint8), 0, 8, "above 0"),
        (np.zeros((4, 4), np.uint8), float("nan"), 8, "above 0"),
        (np.zeros((4, 4), np.uint8), 2.0, 0, "one tile"),
    ],
)
def test_clahe_refuses(function, grey, clip_limit, tiles, message):
    with pytest.raises(DernetError, match=message):
        function(grey, clip_limit, tiles)


def test_preprocess_enhances_first_then_shrinks(film):
    grey = (film >> 4).astype(np.uint8)
    expected = cv2.resize(clahe(grey, 2.0, 8), (20, 24), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(preprocess(grey, 24, 2.0, 8), expected)


@pytest.mark.parametrize(
    ("shape", "long_side_px", "expected"),
    [((48, 40), 100, (48, 40)), ((40, 48), 24, (20, 24)), ((1000, 1), 10, (10, 1))],
)
def test_preprocess_keeps_proportions(shape, long_side_px, expected):
    assert preprocess(np.zeros(shape, np.uint8), long_side_px, 2.0, 8).shape == expected


# --- The cache --------------------------------------------------------------------------------


@pytest.fixture
def profile():
    return get_profile("smoke").model_copy(update={"cache_px": 24})


@pytest.fixture
def images(tmp_path, film) -> pd.DataFrame:
    """Five DICOM files that differ."""
    paths = [tmp_path / f"image{i}.dicom" for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(to_bytes(make_dataset(np.roll(film, i, axis=0), 12)))
    return pd.DataFrame({"image_id": [path.stem for path in paths], "path": map(str, paths)})


@pytest.fixture
def forbid_decoding(monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} was decoded again")

    return lambda: monkeypatch.setattr(cache, "read_radiograph", refuse)


@pytest.mark.parametrize("workers", [1, 2])
def test_cache_holds_preprocessed_images_in_order(tmp_path, images, profile, workers):
    seen = []
    shuffled = images.iloc[[3, 0, 4, 1, 2]].reset_index(drop=True)
    cached = cache_images(
        shuffled, tmp_path / "cache", profile, workers, lambda *done: seen.append(done)
    )
    assert cached.image_id.tolist() == shuffled.image_id.tolist()
    assert set(zip(cached.height, cached.width, cached.scale, strict=True)) == {(48, 40, 0.5)}
    assert seen == [(i, 5) for i in range(1, 6)]
    for source, path in zip(shuffled.path, cached.path, strict=True):
        expected = preprocess(read_radiograph(source).pixels, 24, profile.clip_limit, profile.tiles)
        np.testing.assert_array_equal(load_cached(path), expected)


def test_cache_is_reused(tmp_path, images, profile, forbid_decoding):
    first = cache_images(images, tmp_path / "cache", profile)
    index = (tmp_path / "cache/index.jsonl").read_bytes()
    forbid_decoding()
    pd.testing.assert_frame_equal(cache_images(images, tmp_path / "cache", profile), first)
    assert (tmp_path / "cache/index.jsonl").read_bytes() == index


def test_unchanged_content_under_a_new_time_or_name_is_not_decoded_again(
    tmp_path, images, profile, forbid_decoding
):
    first = cache_images(images, tmp_path / "cache", profile)
    forbid_decoding()
    os.utime(images.path[0], ns=(1, 1))
    Path(images.path[1]).rename(tmp_path / "renamed.dicom")
    images.loc[1, "path"] = str(tmp_path / "renamed.dicom")
    pd.testing.assert_frame_equal(cache_images(images, tmp_path / "cache", profile), first)


@pytest.mark.parametrize("damage", [b"", b"\0" * 300, None])
def test_damaged_png_is_made_anew(tmp_path, images, profile, damage):
    first = cache_images(images, tmp_path / "cache", profile)
    path = Path(first.path[2])
    good = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage)
    cache_images(images, tmp_path / "cache", profile)
    assert path.read_bytes() == good


def test_one_flipped_bit_is_noticed(tmp_path, images, profile):
    path = Path(cache_images(images, tmp_path / "cache", profile).path[0])
    good = path.read_bytes()
    path.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    cache_images(images, tmp_path / "cache", profile)
    assert path.read_bytes() == good


def test_changed_parameters_content_or_version_make_other_files(
    tmp_path, images, profile, film, monkeypatch
):
    cache = tmp_path / "cache"
    first = cache_images(images, cache, profile).path
    other = cache_images(images, cache, profile.model_copy(update={"clip_limit": 8.0})).path
    assert not set(first) & set(other)
    Path(images.path[0]).write_bytes(to_bytes(make_dataset(film[::-1].copy(), 12)))
    third = cache_images(images, cache, profile).path
    assert (first != third).tolist() == [True, False, False, False, False]
    monkeypatch.setattr(cache, "PREPROCESSING_VERSION", -1)
    assert not set(third) & set(cache_images(images, cache, profile).path)


def test_killed_run_leaves_nothing_half_written(tmp_path, images, profile, monkeypatch):
    cache = tmp_path / "cache"
    calls = []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rename(source, target)

    rename = Path.replace
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_images(images, cache, profile)
    assert sorted(cache.glob("*.png")) == sorted(map(Path, calls[:2]))
    # Half a line in the index, as a kill in the middle of a write leaves it.
    with (cache / "index.jsonl").open("a") as index:
        index.write('{"source": "/so')
    cached = cache_images(images, cache, profile)
    assert len(calls) == 6, "what was finished must not be made again"
    assert all(load_cached(path).shape == (24, 20) for path in cached.path)
    lines = (cache / "index.jsonl").read_text().split("\n")
    assert sum(line.startswith("{") and line.endswith("}") for line in lines) == 5
    json.loads(next(line for line in reversed(lines) if line))


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "full; free some space"), (errno.EACCES, "written")]
)
def test_disk_that_refuses(tmp_path, images, profile, monkeypatch, number, message):
    def refuse(path, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(DernetError, match=message):
        cache_images(images, tmp_path / "cache", profile)
    assert not list((tmp_path / "cache").glob("*.png"))


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_image_is_named(tmp_path, images, profile, workers):
    Path(images.path[3]).write_bytes(b"not a film")
    with pytest.raises(DernetError, match=r"image3\.dicom: not an image"):
        cache_images(images, tmp_path / "cache", profile, workers)


def test_missing_image_is_named(tmp_path, images, profile):
    Path(images.path[3]).unlink()
    with pytest.raises(DernetError, match=r"image3\.dicom: the file cannot be read"):
        cache_images(images, tmp_path / "cache", profile)


def test_no_images(tmp_path, images, profile):
    assert cache_images(images[:0], tmp_path / "cache", profile).empty


def test_load_cached_refuses(tmp_path):
    (tmp_path / "zero.png").write_bytes(b"\0" * 50)
    for name in ("zero.png", "none.png"):
        with pytest.raises(DernetError, match="run cache_images"):
            load_cached(tmp_path / name)

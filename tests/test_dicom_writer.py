"""A virtual radiograph's DICOM file gives its picture back, and a validator finds it complete."""

import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.virtual.dicom_writer import SYNTAXES, write_dicom

GREY = np.linspace(0.0, 1.0, 64 * 48).reshape(64, 48)
ENCODINGS = list(
    product(["MONOCHROME1", "MONOCHROME2"], ["window", "none", "lut"], list(SYNTAXES), [10, 12, 14])
)
SOME_ENCODINGS = [
    ("MONOCHROME2", "window", "raw", 12),
    ("MONOCHROME1", "lut", "jpegls", 14),
    ("MONOCHROME1", "none", "jpeg2000", 10),
    ("MONOCHROME2", "none", "rle", 12),
]
# View and mirrored: orientation, view position, and the SNOMED CT code of CID 4010 with meaning.
VIEWS = {
    ("AP", False): ("L", "AP", "399348003", "antero-posterior"),
    ("LATERAL", False): ("A", "LL", "399173006", "left lateral"),
    ("LATERAL", True): ("P", "LL", "399173006", "left lateral"),
    ("LPO", False): ("LA", "LLO", "399006002", "left posterior oblique"),
    ("RPO", False): ("LP", "RLO", "399038007", "right posterior oblique"),
}
SHUTTER = [3, 4, 5, 6]  # dark rows and columns: top, bottom, left, right


def written(
    folder: Path, photometric="MONOCHROME2", voi="window", syntax="raw", bits=12, mas=20.0, **view
):
    """Write the grey ramp in an encoding and return its path."""
    drawn = {"photometric": photometric, "voi": voi, "syntax": syntax, "bits": bits}
    drawn |= {"name": "AP", "mirrored": False, "spacing_mm": 0.3, "kvp": 80.0, "shutter": None}
    drawn |= view
    ids = {"study_id": "a" * 32, "series_id": "b" * 32, "image_id": "c" * 32}
    path = folder / "image.dicom"
    write_dicom(path, GREY, {"age": 50, "sex": "F", "views": [drawn]}, 0, ids, mas)
    return path


def header_of(folder: Path, **options) -> pydicom.Dataset:
    """Write an image and return its header."""
    return pydicom.dcmread(written(folder, **options), stop_before_pixels=True)


def check_with_dciodvfy(path: Path) -> None:
    """Fail on what the validator calls an error."""
    found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    words = found.stdout + found.stderr
    assert "XImage" in words or "CRImage" in words, "the storage class was not recognised"
    assert "Error" not in words, words


@pytest.mark.parametrize(("photometric", "voi", "syntax", "bits"), ENCODINGS)
def test_a_dicom_file_gives_its_image_back(tmp_path, photometric, voi, syntax, bits):
    path = written(tmp_path, photometric, voi, syntax, bits)
    assert np.abs(read_radiograph(path).pixels.astype(float) - 255 * GREY).max() <= 1.5


@pytest.mark.parametrize(("photometric", "voi", "syntax", "bits"), ENCODINGS)
def test_dciodvfy_finds_no_error_in_any_encoding(tmp_path, photometric, voi, syntax, bits):
    check_with_dciodvfy(written(tmp_path, photometric, voi, syntax, bits, name="LPO"))


@pytest.mark.parametrize("shutter", [None, SHUTTER])
@pytest.mark.parametrize(("name", "mirrored"), list(VIEWS))
@pytest.mark.parametrize("encoding", SOME_ENCODINGS)
def test_dciodvfy_finds_no_error_in_any_view(tmp_path, encoding, name, mirrored, shutter):
    path = written(tmp_path, *encoding, name=name, mirrored=mirrored, shutter=shutter)
    check_with_dciodvfy(path)


@pytest.mark.parametrize(("name", "mirrored"), list(VIEWS))
def test_a_view_sets_the_orientation(tmp_path, name, mirrored):
    header = header_of(tmp_path, name=name, mirrored=mirrored)
    across, position, code, meaning = VIEWS[name, mirrored]
    assert list(header.PatientOrientation) == [across, "F"]
    assert header.ViewPosition == position
    (view,) = header.ViewCodeSequence
    assert (view.CodeValue, view.CodingSchemeDesignator) == (code, "SCT")
    assert view.CodeMeaning == meaning
    assert header.ImageLaterality == "U"


@pytest.mark.parametrize("voi", ["window", "none"])
@pytest.mark.parametrize("mas", [0.37, 3.7, 20.0, 123.456])
def test_current_and_time_make_the_exposure(tmp_path, mas, voi):
    header = header_of(tmp_path, mas=mas, kvp=81.37, voi=voi)
    assert float(header.KVP) == 81.4
    assert header.ExposureInuAs == pytest.approx(1000 * mas, abs=0.5)
    seconds = float(header.ExposureTimeInuS) / 1e6
    assert 1000 * header.XRayTubeCurrent * seconds == pytest.approx(header.ExposureInuAs)
    # The whole numbers are the same exposure, rounded.
    assert header.Exposure == pytest.approx(mas, abs=0.501)
    assert header.ExposureTime == pytest.approx(1000 * seconds, abs=0.501)
    assert header.FocalSpots == 0.6


@pytest.mark.parametrize("voi", ["window", "none"])
def test_the_collimator_bounds_the_lit_pixels(tmp_path, voi):
    header = header_of(tmp_path, shutter=SHUTTER, voi=voi)
    assert header.CollimatorShape == "RECTANGULAR"
    lit = np.ones((header.Rows, header.Columns), bool)
    lit[:3] = lit[-4:] = lit[:, :5] = lit[:, -6:] = False
    rows, columns = (np.flatnonzero(lit.any(axis)) + 1 for axis in (1, 0))
    upper, lower = header.CollimatorUpperHorizontalEdge, header.CollimatorLowerHorizontalEdge
    assert (upper, lower) == (rows[0], rows[-1])
    left, right = header.CollimatorLeftVerticalEdge, header.CollimatorRightVerticalEdge
    assert (left, right) == (columns[0], columns[-1])


def test_an_open_collimator_has_no_edges(tmp_path):
    header = header_of(tmp_path, shutter=None)
    assert not [element.keyword for element in header if element.keyword.startswith("Collimator")]


def test_only_a_fixed_grid_leaves_lines(tmp_path):
    assert list(header_of(tmp_path).Grid) == ["RECIPROCATING", "FOCUSED"]
    assert list(header_of(tmp_path, grid_lines_px=4.5).Grid) == ["FIXED", "FOCUSED"]


def test_pixels_are_measured_at_the_detector(tmp_path):
    header = header_of(tmp_path, spacing_mm=0.3)
    factor = header.EstimatedRadiographicMagnificationFactor
    assert header.ImagerPixelSpacing[0] == pytest.approx(0.3 * factor, abs=1e-4)
    ratio = header.DistanceSourceToDetector / header.DistanceSourceToPatient
    assert factor == pytest.approx(ratio, abs=1e-4)
    height, width = (0.3 * factor * side for side in GREY.shape)
    assert header.FieldOfViewShape == "RECTANGLE"
    assert header.FieldOfViewDimensions == pytest.approx([height, width], abs=0.501)


def test_no_patient_is_named(tmp_path):
    header = header_of(tmp_path)
    assert not header.PatientName and not header.PatientBirthDate and not header.StudyDate
    assert "Not a patient" in header.ImageComments

"""A virtual film's DICOM file: its picture comes back, and a validator finds it complete."""

import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dernet_utils.dicom import SYNTAXES, write_dicom
from dernet_utils.imaging import read_grey

GREY = np.linspace(0.0, 1.0, 64 * 48).reshape(64, 48)
ENCODINGS = list(
    product(["MONOCHROME1", "MONOCHROME2"], ["window", "none", "lut"], list(SYNTAXES), [10, 12, 14])
)


def written(folder: Path, photometric="MONOCHROME2", voi="window", syntax="raw", bits=12, **view):
    """Write the grey ramp in an encoding and return its path."""
    drawn = {"photometric": photometric, "voi": voi, "syntax": syntax, "bits": bits}
    drawn |= {"name": "AP", "mirrored": False, "spacing_mm": 0.3} | view
    ids = {"study_id": "a" * 32, "series_id": "b" * 32, "image_id": "c" * 32}
    path = folder / "film.dicom"
    write_dicom(path, GREY, {"age": 50, "sex": "F", "views": [drawn]}, 0, ids)
    return path


@pytest.mark.parametrize(("photometric", "voi", "syntax", "bits"), ENCODINGS)
def test_a_dicom_file_gives_its_film_back(tmp_path, photometric, voi, syntax, bits):
    path = written(tmp_path, photometric, voi, syntax, bits)
    assert np.abs(read_grey(path).astype(float) - 255 * GREY).max() <= 1.5


@pytest.mark.parametrize("view", [("AP", False), ("LATERAL", False), ("LATERAL", True)])
@pytest.mark.parametrize(("photometric", "voi", "syntax", "bits"), ENCODINGS)
def test_dciodvfy_finds_no_error(tmp_path, photometric, voi, syntax, bits, view):
    path = written(tmp_path, photometric, voi, syntax, bits, name=view[0], mirrored=view[1])
    found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    words = found.stdout + found.stderr
    assert "XImage" in words or "CRImage" in words, "the storage class was not recognised"
    assert "Error" not in words, words


def test_pixels_are_measured_at_the_detector(tmp_path):
    header = pydicom.dcmread(written(tmp_path, spacing_mm=0.3), stop_before_pixels=True)
    factor = header.EstimatedRadiographicMagnificationFactor
    assert header.ImagerPixelSpacing[0] == pytest.approx(0.3 * factor, abs=1e-4)
    ratio = header.DistanceSourceToDetector / header.DistanceSourceToPatient
    assert factor == pytest.approx(ratio, abs=1e-4)


def test_nobody_is_named(tmp_path):
    header = pydicom.dcmread(written(tmp_path), stop_before_pixels=True)
    assert not header.PatientName and not header.PatientBirthDate and not header.StudyDate
    assert "Not a patient" in header.ImageComments

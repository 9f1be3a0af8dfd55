"""Files as a client uploads them: a synthetic radiograph in each form, of an invented patient."""

from io import BytesIO

import cv2
import numpy as np
import pydicom


def grey(height=300, width=200, seed=0):
    """Return a picture as smooth, and with as many grey levels, as a radiograph; uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    levels = 200 * np.exp(-3 * x**2) + 30 * np.sin(9 * y) + rng.normal(0, 3, (height, width))
    return levels.clip(0, 255).astype(np.uint8)


def dicom(seed=0, **header) -> bytes:
    """Return a DICOM radiograph's bytes; keywords set or replace elements of its header."""
    pixels = grey(seed=seed)
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    made.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.SOPInstanceUID = f"2.25.{1000 + seed}"
    made.StudyInstanceUID, made.SeriesInstanceUID = "2.25.1", "2.25.2"
    made.PatientName, made.PatientID, made.PatientBirthDate = "Roe^Jane", "SECRET-7", "19500101"
    made.PatientSex, made.StudyID, made.AccessionNumber = "F", "1", ""
    made.StudyDate, made.StudyTime, made.ReferringPhysicianName = "20260101", "120000", ""
    made.Modality, made.BodyPartExamined = "DX", "LSPINE"
    made.Rows, made.Columns = pixels.shape
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 8
    made.HighBit, made.PixelRepresentation = 7, 0
    made.PixelData = pixels.tobytes()
    for name, value in header.items():
        setattr(made, name, value)
    return written(made)


def written(made: pydicom.Dataset) -> bytes:
    """Return a data set as the bytes of a file."""
    stream = BytesIO()
    pydicom.dcmwrite(stream, made, enforce_file_format=True)
    return stream.getvalue()


def encoded(ending=".png", picture=None) -> bytes:
    """Return a picture, by default `grey()`, as the bytes of a PNG or JPEG."""
    return cv2.imencode(ending, grey() if picture is None else picture)[1].tobytes()

"""A virtual radiograph as a DICOM file, complete enough for a viewer and a validator."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from dernet_utils.virtual.acquisition import DETECTOR_MM, SOURCE_MM

GAMMA = 1.6  # our choice: exponent of the VOI LUT
TUBE_MA = 250  # our choice: a fixed tube current; the mAs then give the exposure time
FOCAL_SPOT_MM = 0.6  # nominal; its blur is `acquisition.FOCUS_MM`
# View Position (0018,5101), PS3.3, C.8.1.1, and the code of CID 4010 "DX View", PS3.16. A lateral
# view is named after the side at the detector: in LL the beam goes from right to left. The defined
# terms lack posterior obliques, so an oblique view takes the lateral oblique of the side at the
# detector: in LPO the left side of the back, hence LLO; in RPO the right, hence RLO. The code names
# the posterior oblique itself.
VIEWS = {
    "AP": ("AP", codes.cid4010.AnteroPosterior),
    "LATERAL": ("LL", codes.cid4010.LeftLateral),
    "LPO": ("LLO", codes.cid4010.LeftPosteriorOblique),
    "RPO": ("RLO", codes.cid4010.RightPosteriorOblique),
}
# The patient's direction along a row of the image, PS3.3, C.7.6.1.1.1. In an oblique view both
# letters apply equally, and the side comes first.
ACROSS = {"AP": "L", "LATERAL": "A", "LPO": "LA", "RPO": "LP"}
MIRRORED = {"LATERAL": "P"}


def _explicit(data: Dataset) -> None:
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


SYNTAXES = {
    "raw": _explicit,
    "rle": lambda data: data.compress(RLELossless, generate_instance_uid=False),
    "jpeg2000": lambda data: data.compress(JPEG2000Lossless, generate_instance_uid=False),
    "jpegls": lambda data: data.compress(JPEGLSLossless, generate_instance_uid=False),
}


def write_dicom(
    path: Path, grey: np.ndarray, plan: dict, number: int, ids: dict, mas: float
) -> None:
    """Write a radiograph as Digital X-Ray Image Storage - For Presentation (DICOM PS3.3, A.26).

    That storage class requires a window or a VOI LUT; an image that has neither is written as
    Computed Radiography Image Storage (A.2), which does not.

    Args:
        path: The file; replaced where it exists.
        grey: 0 black to 1 white, shape (H, W).
        plan: The patient's plan, as `plan.plan_cohort` returns it.
        number: Index of the view in the plan, from 0.
        ids: ``study_id``, ``series_id`` and ``image_id``, from which the UIDs are made.
        mas: Tube current-time product of the exposure, mAs.
    """
    drawn = plan["views"][number]
    digital = drawn["voi"] != "none"
    data = Dataset()
    _put_identity(data, plan, number, ids)
    data.Modality = "DX" if digital else "CR"
    data.SOPClassUID = (
        DigitalXRayImageStorageForPresentation if digital else ComputedRadiographyImageStorage
    )
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    _put_geometry(data, drawn)
    _put_exposure(data, drawn, mas)
    if drawn.get("shutter"):
        _put_collimator(data, drawn["shutter"], grey.shape)
    if digital:
        _put_digital(data, drawn, grey.shape)
    _put_pixels(data, grey, drawn)
    SYNTAXES[drawn["syntax"]](data)
    data.save_as(path, enforce_file_format=True)


def _put_identity(data: Dataset, plan: dict, number: int, ids: dict) -> None:
    """Add the patient, study and series, none of which is a real person's."""
    data.SOPInstanceUID = generate_uid(entropy_srcs=[ids["image_id"]])
    data.StudyInstanceUID = generate_uid(entropy_srcs=[ids["study_id"]])
    data.SeriesInstanceUID = generate_uid(entropy_srcs=[ids["series_id"]])
    data.PatientName, data.PatientID = "", ids["study_id"][:16]
    data.PatientBirthDate = ""
    data.PatientAge, data.PatientSex = f"{plan['age']:03d}Y", plan["sex"]
    data.StudyDate = data.StudyTime = data.AccessionNumber = data.ReferringPhysicianName = ""
    data.StudyID = ""
    data.SeriesNumber, data.InstanceNumber = 1, number + 1
    data.Manufacturer = "virtual radiograph"
    data.ImageComments = "Virtual: computed from one donor CT. Not a patient."
    data.ImageType = ["DERIVED", "PRIMARY"]
    data.BurnedInAnnotation, data.LossyImageCompression = "NO", "00"


def _put_geometry(data: Dataset, drawn: dict) -> None:
    """Add the body part, the view, the image's orientation, and the distances."""
    data.BodyPartExamined = "SPINE"
    data.ViewPosition = VIEWS[drawn["name"]][0]
    across = MIRRORED if drawn["mirrored"] else ACROSS
    data.PatientOrientation = [across[drawn["name"]], "F"]
    # Pixels are measured at the detector; the plan's spacing is that of the spine's plane.
    enlarged = DETECTOR_MM / SOURCE_MM
    data.ImagerPixelSpacing = [f"{drawn['spacing_mm'] * enlarged:.4f}"] * 2
    data.DistanceSourceToDetector = f"{DETECTOR_MM:.0f}"
    data.DistanceSourceToPatient = f"{SOURCE_MM:.0f}"
    data.EstimatedRadiographicMagnificationFactor = f"{enlarged:.4f}"


def _put_exposure(data: Dataset, drawn: dict, mas: float) -> None:
    """Add the tube's settings (PS3.3, C.8.7.9, and C.8.1.2 for computed radiography).

    Exposure (0018,1152) and Exposure Time (0018,1150) are whole numbers of mAs and ms; the
    attributes in µAs and µs keep the finer values.
    """
    data.KVP = f"{drawn['kvp']:.1f}"
    data.ExposureInuAs = round(1000.0 * mas)
    data.Exposure = round(data.ExposureInuAs / 1000)
    data.XRayTubeCurrent = TUBE_MA
    time_us = 1000.0 * data.ExposureInuAs / TUBE_MA
    data.ExposureTimeInuS, data.ExposureTime = f"{time_us:.0f}", round(time_us / 1000)
    data.FocalSpots = FOCAL_SPOT_MM


def _put_collimator(data: Dataset, shutter: list[int], size: tuple[int, int]) -> None:
    """Add the collimator's edges: the X-Ray Collimator module, PS3.3, C.8.7.3.

    Rows and columns count from 1. An edge is the outermost row or column that the beam reaches.

    Args:
        data: The header.
        shutter: Dark rows or columns at the top, bottom, left and right.
        size: Rows and columns of the image.
    """
    top, bottom, left, right = shutter
    data.CollimatorShape = "RECTANGULAR"
    data.CollimatorUpperHorizontalEdge = top + 1
    data.CollimatorLowerHorizontalEdge = size[0] - bottom
    data.CollimatorLeftVerticalEdge = left + 1
    data.CollimatorRightVerticalEdge = size[1] - right


def _put_digital(data: Dataset, drawn: dict, size: tuple[int, int]) -> None:
    """Add what digital X-ray storage requires beyond computed radiography."""
    data.PresentationIntentType = "FOR PRESENTATION"
    data.ImageLaterality = "U"  # the spine is not paired
    data.PositionerType, data.DetectorType = "COLUMN", "SCINTILLATOR"
    data.AnatomicRegionSequence = _coded(codes.cid4009.ThoracoLumbarSpine)
    data.ViewCodeSequence = _coded(VIEWS[drawn["name"]][1])
    data.AcquisitionContextSequence = Sequence()
    # A moving grid leaves no lines: the terms of the X-Ray Grid module, PS3.3, C.8.7.11.
    data.Grid = ["FIXED" if drawn.get("grid_lines_px") else "RECIPROCATING", "FOCUSED"]
    # At the detector, and rows first: PS3.3, C.8.11.4.1.1.
    data.FieldOfViewShape = "RECTANGLE"
    data.FieldOfViewDimensions = [
        round(float(pixel) * n) for pixel, n in zip(data.ImagerPixelSpacing, size, strict=True)
    ]
    inverse = drawn["photometric"] == "MONOCHROME1"
    data.PixelIntensityRelationship = "LOG"
    data.PixelIntensityRelationshipSign = 1 if inverse else -1  # -1: larger value, fewer photons
    data.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"


def _coded(code) -> Sequence:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = code.value, code.scheme_designator
    item.CodeMeaning = code.meaning
    return Sequence([item])


def _put_pixels(data: Dataset, grey: np.ndarray, drawn: dict) -> None:
    """Store grey values (0 to 1) so that the header's VOI and photometric terms restore them."""
    bits = drawn["bits"]
    top = 2**bits - 1
    low, high = (0.05 * top, 0.80 * top) if drawn["voi"] == "window" else (0.0, top)
    shown = 1.0 - grey if drawn["photometric"] == "MONOCHROME1" else grey
    if drawn["voi"] == "lut":
        shown = shown ** (1.0 / GAMMA)
        curve = (np.linspace(0.0, 1.0, top + 1) ** GAMMA * top).round().astype("<u2")
        table = Dataset()
        table.add_new("LUTDescriptor", "US", [top + 1, 0, bits if bits > 8 else 16])
        table.add_new("LUTData", "OW", curve.tobytes())
        data.VOILUTSequence = Sequence([table])
    if drawn["voi"] == "window":
        data.WindowCenter, data.WindowWidth = f"{(low + high) / 2:.1f}", f"{high - low:.1f}"
    stored = (low + shown * (high - low)).round().clip(0, top).astype("<u2")
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, drawn["photometric"]
    data.Rows, data.Columns = stored.shape
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = 0
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = "1", "0", "US"
    data.PixelData = stored.tobytes()

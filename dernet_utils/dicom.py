"""A virtual film as a DICOM file, complete enough for a viewer and a validator."""

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

from dernet_utils.films import DETECTOR_MM, SOURCE_MM

GAMMA = 1.6  # ours: exponent of a VOI LUT


def _explicit(data: Dataset) -> None:
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


SYNTAXES = {
    "raw": _explicit,
    "rle": lambda data: data.compress(RLELossless, generate_instance_uid=False),
    "jpeg2000": lambda data: data.compress(JPEG2000Lossless, generate_instance_uid=False),
    "jpegls": lambda data: data.compress(JPEGLSLossless, generate_instance_uid=False),
}


def write_dicom(path: Path, grey: np.ndarray, plan: dict, number: int, ids: dict) -> None:
    """Write a film as Digital X-Ray Image Storage - For Presentation (DICOM PS3.3, A.26).

    That storage class asks for a window or a VOI LUT; a film that has neither is written as
    Computed Radiography Image Storage (A.2), which does not.

    Args:
        path: The file; replaced where it exists.
        grey: 0 black to 1 white, shape (H, W).
        plan: The patient's plan.
        number: Which of its views this is.
        ids: ``study_id``, ``series_id`` and ``image_id``, from which the UIDs are made.
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
    if digital:
        _put_digital(data, drawn)
    _put_pixels(data, grey, drawn)
    SYNTAXES[drawn["syntax"]](data)
    data.save_as(path, enforce_file_format=True)


def _put_identity(data: Dataset, plan: dict, number: int, ids: dict) -> None:
    """Say whose film it is: nobody's."""
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
    """Say what was in the beam, from where, and which way up the film hangs."""
    lateral = drawn["name"] == "LATERAL"
    data.BodyPartExamined = "SPINE"
    data.ViewPosition = "LL" if lateral else "AP"
    # Columns run to the patient's left on a frontal film, to the front or the back on a lateral.
    across = ("P" if drawn["mirrored"] else "A") if lateral else "L"
    data.PatientOrientation = [across, "F"]
    # Pixels are measured at the detector, the plan's spacing is that of the spine's plane.
    enlarged = DETECTOR_MM / SOURCE_MM
    data.ImagerPixelSpacing = [f"{drawn['spacing_mm'] * enlarged:.4f}"] * 2
    data.DistanceSourceToDetector = f"{DETECTOR_MM:.0f}"
    data.DistanceSourceToPatient = f"{SOURCE_MM:.0f}"
    data.EstimatedRadiographicMagnificationFactor = f"{enlarged:.4f}"


def _put_digital(data: Dataset, drawn: dict) -> None:
    """Add what digital X-ray storage asks for beyond computed radiography."""
    data.PresentationIntentType = "FOR PRESENTATION"
    data.ImageLaterality = "U"  # the spine is not paired
    data.PositionerType, data.DetectorType = "COLUMN", "SCINTILLATOR"
    data.AnatomicRegionSequence = _coded(codes.cid4009.ThoracoLumbarSpine)
    lateral = drawn["name"] == "LATERAL"
    view = codes.cid4010.LeftLateral if lateral else codes.cid4010.AnteroPosterior
    data.ViewCodeSequence = _coded(view)
    data.ViewCodeSequence[0].ViewModifierCodeSequence = Sequence()
    data.AcquisitionContextSequence = Sequence()
    inverse = drawn["photometric"] == "MONOCHROME1"
    data.PixelIntensityRelationship = "LOG"
    data.PixelIntensityRelationshipSign = 1 if inverse else -1  # -1: more value, fewer photons
    data.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"


def _coded(code) -> Sequence:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = code.value, code.scheme_designator
    item.CodeMeaning = code.meaning
    return Sequence([item])


def _put_pixels(data: Dataset, grey: np.ndarray, drawn: dict) -> None:
    """Store grey values (0 to 1) so that the file's own VOI and photometric give them back."""
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

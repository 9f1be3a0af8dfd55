"""DICOM reports of a prediction, which refer to the image: structured report, secondary capture.

Both belong to the image's patient and study, and state that an algorithm made them for research.
The structured report follows template TID 1500 (PS3.16): DERNet's probability, then a group for
each box. The private coding scheme 99DERNET names the lesion types, because no public scheme
defines them as the dataset does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from io import BytesIO

import cv2
import highdicom as hd
import numpy as np
import pydicom
from highdicom.sr import CodedConcept
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.valuerep import DA, TM

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import NOTICE
from dernet_utils.inference.pipeline import Prediction
from dernet_utils.serving.report import draw_prediction

MAKER, MODEL = "dernet-utils", "DERNet and YOLO11-L"
SCHEME = "99DERNET"
SCHEME_UID = "2.25.228134109838106742108331741283561123951"
REPORT_SERIES, CAPTURE_SERIES = 9001, 9002
REQUIRED = (  # elements on a report's patient and study, empty where unknown
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
    "StudyTime", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
PROBABILITY = CodedConcept("PROB", SCHEME, "Probability of an abnormal radiograph")
CONFIDENCE = CodedConcept("CONF", SCHEME, "Confidence of the detector")
REJECTED = CodedConcept("REJECTION", SCHEME, "Rejection overridden by a person")
RATIO = CodedConcept("1", "UCUM", "no units")


def lesion_concept(lesion_type: str) -> CodedConcept:
    """Return a lesion type as a code; its value is the name, cut to sixteen characters.

    >>> lesion_concept("Surgical implant").value
    'SURGICAL_IMPLANT'
    """
    return CodedConcept(lesion_type.upper().replace(" ", "_")[:16], SCHEME, lesion_type)


@contextmanager
def _header_errors() -> Iterator[None]:
    """Turn an unexpected error into one whose message quotes none of the header's values."""
    try:
        yield
    except DernetError:
        raise
    except Exception as error:  # highdicom and pydicom raise many types, and quote names
        raise DernetError(
            "The DICOM header cannot be copied into a report "
            f"({type(error).__name__}): export the image again, in standard-conformant DICOM."
        ) from None


@_header_errors()
def structured_report(
    header: pydicom.Dataset, prediction: Prediction, version: str, overridden: tuple[str, ...] = ()
) -> pydicom.Dataset:
    """Return a prediction as a Comprehensive SR, TID 1500.

    Args:
        header: Header of the analysed image, with or without its pixel data; it is not changed.
        prediction: The pipeline's prediction for this image.
        version: The algorithm's version, at most 64 characters.
        overridden: Reasons for a rejection that the user overrode.

    Raises:
        DernetError: The header lacks an element that a report must refer to, or a report cannot
            hold one of its values.
    """
    source = _source(header)
    algorithm = hd.sr.AlgorithmIdentification(
        MODEL, version, parameters=[f"threshold {prediction.threshold:.4f}"]
    )
    device = hd.sr.ObserverContext(
        codes.DCM.Device,
        hd.sr.DeviceObserverIdentifyingAttributes(
            uid=hd.UID(), name=MODEL, manufacturer_name=MAKER, model_name=MODEL
        ),
    )
    context = hd.sr.ObservationContext(observer_device_context=device)
    image = hd.sr.SourceImageForRegion(source.SOPClassUID, source.SOPInstanceUID)
    whole = hd.sr.MeasurementsAndQualitativeEvaluations(
        hd.sr.TrackingIdentifier(uid=hd.UID(), identifier="whole image"),
        algorithm_id=algorithm,
        finding_type=codes.SCT.Abnormal if prediction.abnormal else codes.DCM.NoAbnormality,
        source_images=[
            hd.sr.SourceImageForMeasurementGroup(source.SOPClassUID, source.SOPInstanceUID)
        ],
        measurements=[hd.sr.Measurement(PROBABILITY, prediction.score, RATIO)],
        qualitative_evaluations=[
            hd.sr.QualitativeEvaluation(REJECTED, CodedConcept(f"REASON{k + 1}", SCHEME, text[:64]))
            for k, text in enumerate(overridden)
        ]
        or None,
    )
    groups = [whole]
    for number, box in enumerate(prediction.boxes.itertuples(), start=1):
        corners = np.array([
            [box.xmin, box.ymin], [box.xmax, box.ymin], [box.xmax, box.ymax],
            [box.xmin, box.ymax], [box.xmin, box.ymin],
        ])  # fmt: skip
        region = hd.sr.ImageRegion(hd.sr.GraphicTypeValues.POLYLINE, corners, image)
        groups.append(
            hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
                hd.sr.TrackingIdentifier(uid=hd.UID(), identifier=f"lesion {number}"),
                referenced_region=region,
                algorithm_id=algorithm,
                finding_type=lesion_concept(box.lesion_type),
                measurements=[hd.sr.Measurement(CONFIDENCE, float(box.score), RATIO)],
            )
        )
    content = hd.sr.MeasurementReport(
        context,
        procedure_reported=codes.SCT.PlainRadiography,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    report = hd.sr.ComprehensiveSR(
        evidence=[source],
        content=content,
        series_number=REPORT_SERIES,
        series_instance_uid=hd.UID(),
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=MAKER,
        is_complete=True,
        series_description=NOTICE[:64],
    )
    _declare_scheme(report)
    return report


@_header_errors()
def secondary_capture(
    header: pydicom.Dataset,
    grey: np.ndarray,
    prediction: Prediction,
    overridden: tuple[str, ...] = (),
) -> pydicom.Dataset:
    """Return the radiograph with its boxes as a Secondary Capture in colour.

    Args:
        header, prediction, overridden: As `structured_report` takes them.
        grey: The image's `Radiograph.pixels`, uint8 (H, W).

    Raises:
        DernetError: As `structured_report` raises.
    """
    source = _source(header)
    drawn = draw_prediction(grey, prediction, overridden)
    capture = hd.sc.SCImage.from_ref_dataset(
        source,
        pixel_array=np.ascontiguousarray(cv2.cvtColor(drawn, cv2.COLOR_BGR2RGB)),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # required by highdicom; the image's own is set below
        series_instance_uid=hd.UID(),
        series_number=CAPTURE_SERIES,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=MAKER,
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
        series_description=NOTICE[:64],
    )
    capture.BurnedInAnnotation = "YES"
    capture.DerivationDescription = "Boxes and decision of an algorithm drawn on the radiograph"
    capture.PatientOrientation = source.get("PatientOrientation")
    capture.BodyPartExamined = source.get("BodyPartExamined") or "SPINE"
    if source.get("Laterality"):  # set for paired body parts only
        capture.Laterality = source.Laterality
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    capture.SourceImageSequence = [item]
    return capture


def read_report(report: pydicom.Dataset) -> dict:
    """Return the contents of a report that `structured_report` made.

    Args:
        report: The Comprehensive SR.

    Returns:
        ``score``, in [0, 1], and ``boxes``: for each a dict of ``lesion_type``, ``score`` and
        ``xmin`` … ``ymax`` in the image's pixels.
    """
    content = hd.sr.ComprehensiveSR.from_dataset(report).content
    (whole,) = content.get_image_measurement_groups()
    (score,) = whole.get_measurements(name=PROBABILITY)
    boxes = []
    for group in content.get_planar_roi_measurement_groups():
        corners = group.roi.value
        (confidence,) = group.get_measurements(name=CONFIDENCE)
        boxes.append({
            "lesion_type": group.finding_type.meaning, "score": float(confidence.value),
            "xmin": corners[:, 0].min(), "ymin": corners[:, 1].min(),
            "xmax": corners[:, 0].max(), "ymax": corners[:, 1].max(),
        })  # fmt: skip
    return {"score": float(score.value), "boxes": boxes}


def _source(header: pydicom.Dataset) -> pydicom.Dataset:
    """Return a copy of a header in UTF-8, with every element that a report requires."""
    needed = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    if missing := [name for name in needed if not header.get(name)]:
        raise DernetError(
            f"The DICOM header lacks {', '.join(missing)}, which a report must refer to: use the "
            "original image from the device."
        )
    source = pydicom.Dataset()
    # Copies, because decoding changes elements, and further reports use the same header.
    source.update({e.tag: deepcopy(e) for e in header if e.keyword != "PixelData"})
    source.file_meta = header.file_meta
    source.decode()
    source.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, which holds every other set's characters
    for name in REQUIRED:
        setattr(source, name, _standard_value(source, name))
    return source


def _standard_value(source: pydicom.Dataset, name: str) -> object:
    """Return an element's value; None if it is missing or does not conform to the standard."""
    value = source.get(name)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    try:
        if name.endswith("Date"):
            DA(value or "")
        elif name.endswith("Time"):
            TM(value or "")
    except ValueError:
        return None
    return value if name != "PatientSex" or value in ("M", "F", "O") else None


def encode(report: pydicom.Dataset) -> bytes:
    """Return a report as the bytes of a DICOM file.

    Raises:
        DernetError: A value cannot be written.
    """
    stream = BytesIO()
    with _header_errors():
        pydicom.dcmwrite(stream, report, enforce_file_format=True)
    return stream.getvalue()


def _declare_scheme(report: pydicom.Dataset) -> None:
    item = pydicom.Dataset()
    item.CodingSchemeDesignator = SCHEME
    item.CodingSchemeUID = SCHEME_UID
    item.CodingSchemeName = "Lesion types of VinDr-SpineXR, as DERNet reports them"
    item.CodingSchemeResponsibleOrganization = MAKER
    report.CodingSchemeIdentificationSequence = [item]

"""An answer as DICOM objects that refer to the film: a structured report, a secondary capture.

Both carry the film's patient and study, and say that an algorithm made them for research. The
report follows template TID 1500 (PS3.16): DERNet's probability, then a group for each box. The
private coding scheme 99DERNET names the lesion types, which no public scheme has as the dataset
means them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
MUST_SAY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
    "StudyTime", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
PROBABILITY = CodedConcept("PROB", SCHEME, "Probability of an abnormal film")
CONFIDENCE = CodedConcept("CONF", SCHEME, "Confidence of the detector")
REJECTED = CodedConcept("REJECTION", SCHEME, "Rejection overridden by a person")
RATIO = CodedConcept("1", "UCUM", "no units")


def lesion_concept(lesion_type: str) -> CodedConcept:
    """Return the code of a lesion type: its name, as far as sixteen characters reach.

    >>> lesion_concept("Surgical implant").value
    'SURGICAL_IMPLANT'
    """
    return CodedConcept(lesion_type.upper().replace(" ", "_")[:16], SCHEME, lesion_type)


@contextmanager
def _carrying() -> Iterator[None]:
    """Say in a sentence, without its values, that a header cannot be carried over."""
    try:
        yield
    except DernetError:
        raise
    except Exception as error:  # highdicom and pydicom raise what they like, and quote names
        raise DernetError(
            "The DICOM header cannot be carried into a report "
            f"({type(error).__name__}): export the image again, in the standard's form."
        ) from None


@_carrying()
def structured_report(
    header: pydicom.Dataset, prediction: Prediction, version: str, overridden: tuple[str, ...] = ()
) -> pydicom.Dataset:
    """Return a Comprehensive SR, TID 1500, of an answer.

    Args:
        header: Of the DICOM image that was analysed; without its pixel data, or with them.
        prediction: What the pipeline says of it; boxes in the image's pixels.
        version: Of the algorithm.
        overridden: Reasons against the image that a person set aside.

    Raises:
        DernetError: The image lacks what a report must refer to, or has it in a form that none
            can carry.
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
        hd.sr.TrackingIdentifier(uid=hd.UID(), identifier="whole film"),
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


@_carrying()
def secondary_capture(
    header: pydicom.Dataset,
    grey: np.ndarray,
    prediction: Prediction,
    overridden: tuple[str, ...] = (),
) -> pydicom.Dataset:
    """Return a colour Secondary Capture of the film with its boxes.

    Args:
        header, prediction, overridden: As `structured_report` takes them.
        grey: The film as `imaging.decode_radiograph` returns it, uint8 (H, W).

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
        patient_orientation=("L", "F"),  # highdicom asks for one; what is known comes below
        series_instance_uid=hd.UID(),
        series_number=CAPTURE_SERIES,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=MAKER,
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
        series_description=NOTICE[:64],
    )
    capture.BurnedInAnnotation = "YES"
    capture.DerivationDescription = "Boxes and decision of an algorithm drawn on the film"
    capture.PatientOrientation = source.get("PatientOrientation")
    capture.BodyPartExamined = source.get("BodyPartExamined") or "SPINE"
    if source.get("Laterality"):  # of a paired part, which a spine is not
        capture.Laterality = source.Laterality
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    capture.SourceImageSequence = [item]
    return capture


def read_report(report: pydicom.Dataset) -> dict:
    """Return what a structured report of ours says: ``score``, and ``boxes``, one dict each."""
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
    """The header, what a report must say of patient and study empty where it is silent."""
    needed = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    if missing := [name for name in needed if not header.get(name)]:
        raise DernetError(
            f"The DICOM header lacks {', '.join(missing)}, which a report must refer to: send the "
            "image as the device made it."
        )
    source = pydicom.Dataset()
    source.update({e.tag: e for e in header if e.keyword != "PixelData"})
    source.file_meta = header.file_meta
    source.decode()
    source.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, which carries what any other does
    for name in MUST_SAY:
        setattr(source, name, _carried(source, name))
    return source


def _carried(source: pydicom.Dataset, name: str) -> object:
    """A value that a report must have; None where there is none, or none in the standard's form."""
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
    """Return a report as a DICOM file's bytes.

    Raises:
        DernetError: It holds a value that cannot be written.
    """
    stream = BytesIO()
    with _carrying():
        pydicom.dcmwrite(stream, report, enforce_file_format=True)
    return stream.getvalue()


def _declare_scheme(report: pydicom.Dataset) -> None:
    item = pydicom.Dataset()
    item.CodingSchemeDesignator = SCHEME
    item.CodingSchemeUID = SCHEME_UID
    item.CodingSchemeName = "Lesion types of VinDr-SpineXR, as DERNet reports them"
    item.CodingSchemeResponsibleOrganization = MAKER
    report.CodingSchemeIdentificationSequence = [item]

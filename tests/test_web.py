"""The web application, as a client calls it."""

import asyncio
import base64
import json
import logging
import re
import struct
import subprocess
import threading
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pydicom
import pytest
from dicom_files import encode_picture, grey_picture, patient_radiograph, to_bytes
from fastapi.testclient import TestClient
from pydicom.data import get_testdata_files

from dernet_utils.core.vocabulary import CORNERS, NOTICE
from dernet_utils.imaging import dicom as imaging_dicom
from dernet_utils.imaging import reader
from dernet_utils.imaging.radiograph import MOST_PIXELS
from dernet_utils.inference import onnx_backend
from dernet_utils.serving import web
from dernet_utils.serving.dicom_report import (
    encode,
    read_report,
    secondary_capture,
    structured_report,
)
from dernet_utils.serving.report import html_page
from dernet_utils.serving.service import InferenceService

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(service, exported, tmp_path_factory):
    samples = tmp_path_factory.mktemp("samples")
    (samples / "virtual-1.dcm").write_bytes(patient_radiograph())
    about = onnx_backend.read_export(exported)
    application = web.make_app(service, about, samples=samples)
    return TestClient(application, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.mark.parametrize(
    "data",
    [patient_radiograph(), encode_picture(".png"), encode_picture(".jpg")],
    ids=["dcm", "png", "jpg"],
)
def test_each_form_is_analysed(client, service, data):
    response = client.post("/api/v1/analyse?picture=true&heat=true", content=data)
    assert response.status_code == 200
    result, expected = response.json(), service.analyse(data)
    prediction = expected.prediction
    assert result["score"] == prediction.score and result["decision"] == "abnormal"
    assert result["boxes"] == prediction.boxes.to_dict(orient="records")
    assert not result["rejected"] and result["form"] == expected.radiograph.form
    assert (result["width"], result["height"]) == (200, 300) and result["notice"] == NOTICE
    assert (_png(result["picture"]) == expected.radiograph.pixels).all()
    assert _png(result["heat"]).shape == (2, 2)


def _png(text):
    """Return the grey levels of a PNG in base64."""
    return cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_GRAYSCALE)


def test_a_rejection_has_reasons_and_may_be_overridden(client):
    data = patient_radiograph(Modality="CT", BodyPartExamined="CHEST")
    result = client.post("/api/v1/analyse", content=data).json()
    assert result["rejected"] and not result["overridden"] and "score" not in result
    assert [reason["layer"] for reason in result["reasons"]] == ["header", "header"]
    refused = client.post("/api/v1/report/html", content=data)
    assert refused.status_code == 409
    texts = [reason["text"] for reason in result["reasons"]]
    assert "CT" in texts[0] and "CHEST" in texts[1]
    assert all(text in refused.json()["error"] for text in texts)
    result = client.post("/api/v1/analyse?override=true", content=data).json()
    assert result["overridden"] and result["score"] and len(result["reasons"]) == 2
    page = client.post("/api/v1/report/html?override=true", content=data).text
    assert "class=warning" in page and all(text in page for text in texts)
    record = client.post("/api/v1/report/json?override=true", content=data).json()
    assert record["overridden"] == texts


def test_the_html_report(client, service):
    page = client.post("/api/v1/report/html", content=patient_radiograph()).text
    prediction = service.analyse(patient_radiograph()).prediction
    assert f"{prediction.score:.3f}" in page and NOTICE in page and "class=warning" not in page
    assert page.count("<tr><td>") == len(prediction.boxes) + 4
    assert "http" not in page  # nothing is loaded from elsewhere
    pixels = reader.decode_radiograph(encode_picture()).pixels
    found_none, not_run = (
        html_page(pixels, replace(prediction, threshold=limit, boxes=prediction.boxes.head(0)), {})
        for limit in (0.0, 1.0)
    )
    assert "None found" in found_none and "not run" in not_run
    record = client.post("/api/v1/report/json", content=patient_radiograph()).json()
    assert record["score"] == prediction.score and record["overridden"] == []


def test_dicom_reports_hold_the_prediction(client, service):
    data = patient_radiograph()
    prediction, source = service.analyse(data).prediction, pydicom.dcmread(BytesIO(data))
    response = client.post("/api/v1/report/sr", content=data)
    assert response.headers["content-type"] == "application/dicom"
    report = pydicom.dcmread(BytesIO(response.content))
    assert report.StudyInstanceUID == source.StudyInstanceUID
    assert report.PatientID == source.PatientID
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    (series,) = evidence.ReferencedSeriesSequence
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    contents, boxes = read_report(report), prediction.boxes
    assert contents["score"] == pytest.approx(prediction.score, abs=1e-6)
    assert [box["lesion_type"] for box in contents["boxes"]] == list(boxes["lesion_type"])
    for name in ("score", *CORNERS):
        values = [box[name] for box in contents["boxes"]]
        assert values == pytest.approx(boxes[name].tolist(), rel=1e-6, abs=1e-4)
    response = client.post("/api/v1/report/sc", content=data)
    capture = pydicom.dcmread(BytesIO(response.content))
    assert capture.pixel_array.shape[2] == 3
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID


@pytest.mark.parametrize("form", ["sr", "sc"])
def test_dicom_reports_have_no_errors(client, form, tmp_path):
    data = patient_radiograph(Modality="CT")
    response = client.post(f"/api/v1/report/{form}?override=true", content=data)
    (tmp_path / "made.dcm").write_bytes(response.content)
    checked = subprocess.run(["dciodvfy", tmp_path / "made.dcm"], capture_output=True, text=True)
    output = checked.stdout + checked.stderr
    assert output.startswith({"sr": "ComprehensiveSR", "sc": "SCImage"}[form])  # the IOD it checked
    errors = [line for line in output.splitlines() if "Error" in line]
    assert not errors, errors


def test_a_picture_has_no_dicom_report(client):
    for form in ("sr", "sc"):
        refused = client.post(f"/api/v1/report/{form}", content=encode_picture())
        assert refused.status_code == 422 and "DICOM image" in refused.json()["error"]


def test_a_batch_gets_one_line_per_file(client):
    files = [
        ("files", (f"../{n}", data))
        for n, data in enumerate([patient_radiograph(), b"junk", encode_picture()])
    ]
    response = client.post("/api/v1/analyse-batch", files=files)
    assert response.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2]
    assert ["score" in line for line in lines] == [True, False, True]
    assert ["error" in line for line in lines] == [False, True, False]


# --- Each file is parsed once -----------------------------------------------------------------


@pytest.fixture
def parses(monkeypatch):
    """Count how often a file is parsed as DICOM, and how often its form is recognised."""
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(pydicom, "dcmread", counted("dcmread", pydicom.dcmread))
    monkeypatch.setattr(cv2, "imdecode", counted("imdecode", cv2.imdecode))
    for module in (reader, imaging_dicom):
        monkeypatch.setattr(module, "recognise", counted("recognise", module.recognise))
    return counts


@pytest.fixture
def here(service):
    """The service, decoding in the tests' own process, where parses can be counted."""
    return replace(service, decode=reader.decode_radiograph)


def test_one_parse_serves_the_analysis_and_every_report(here, exported, parses):
    analysis, about = here.analyse(patient_radiograph()), onnx_backend.read_export(exported)
    radiograph, prediction = analysis.radiograph, analysis.prediction
    html_page(radiograph.pixels, prediction, about, analysis.overridden)
    encode(structured_report(radiograph.header, prediction, "test"))
    encode(secondary_capture(radiograph.header, radiograph.pixels, prediction))
    assert parses == {"dcmread": 1, "recognise": 1}


def test_a_picture_is_parsed_once(here, parses):
    analysis = here.analyse(encode_picture())
    html_page(analysis.radiograph.pixels, analysis.prediction, {}, analysis.overridden)
    assert parses == {"recognise": 1, "imdecode": 1}


@pytest.mark.parametrize(
    "path",
    ["analyse?picture=true&heat=true", "report/html", "report/json", "report/sr", "report/sc"],
)
def test_each_request_parses_its_file_once(here, exported, parses, path):
    application = web.make_app(here, onnx_backend.read_export(exported))
    client = TestClient(application, base_url="http://127.0.0.1")
    assert client.post(f"/api/v1/{path}", content=patient_radiograph()).status_code == 200
    assert parses == {"dcmread": 1, "recognise": 1}


@pytest.mark.parametrize("module", ["web", "service", "report", "dicom_node", "dicom_report"])
def test_serving_holds_no_parser_of_its_own(module):
    source = Path(web.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    assert not re.search(r"dcmread|imdecode|recognise\(|b\"DICM|x89PNG", source)


# --- What else the API offers -----------------------------------------------------------------


def test_health_model_samples_and_the_page(client):
    assert client.get("/api/v1/health").json() == {"status": "ok"}
    assert client.get("/api/v1/model").json()["decision"]["temperature"] == 1.3
    paths = client.get("/api/v1/openapi.json").json()["paths"]
    assert {"/api/v1/analyse", "/api/v1/analyse-batch", "/api/v1/report/{form}"} <= set(paths)
    assert client.get("/api/v1/samples").json() == ["virtual-1.dcm"]
    assert client.get("/api/v1/samples/virtual-1.dcm").content == patient_radiograph()
    for name in ("..%2Fmanifest.json", "none", "%2Fetc%2Fpasswd"):
        assert client.get(f"/api/v1/samples/{name}").status_code == 404
    page = client.get("/")
    assert page.status_code == 200 and "DERNet" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for part in ("app.js", "style.css"):
        assert f"/static/{part}" in page.text
        assert client.get(f"/static/{part}").status_code == 200


# --- Bad input --------------------------------------------------------------------------------


def bomb(side=40_000):
    """Return a PNG of a few hundred bytes whose header declares a huge image."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def without_pixels():
    made = pydicom.dcmread(BytesIO(patient_radiograph()))
    del made.PixelData
    return to_bytes(made)


def zipped():
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("image.dcm", patient_radiograph())
    return stream.getvalue()


TEXT, NUMBERS = (
    b"\x18\x00\x15\x00" + form for form in (b"CS", b"FD")
)  # a body part's element, by value representation
BAD = {
    "text": b"hello", "nothing": b"", "a renamed file": b"%PDF-1.7 " + bytes(500),
    "truncated DICOM": patient_radiograph()[:2000],
    "cut in the header": patient_radiograph()[:140], "huge": bomb(),
    "a zip": zipped(), "several frames": patient_radiograph(NumberOfFrames=2),
    "no pixels": without_pixels(), "invalid UTF-8": b"\xff\xfe\xfa" * 50,
    "hostile SVG": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "cut PNG": encode_picture()[:-40], "cut JPEG": encode_picture(".jpg")[:500],
    "rows without end": patient_radiograph(Rows=65_535, Columns=65_535),
    "three samples": patient_radiograph(
        SamplesPerPixel=3, PlanarConfiguration=0, PixelData=bytes(180_000)
    ),
    "colour DICOM": patient_radiograph(
        PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0
    ),
    "bits elsewhere": patient_radiograph(HighBit=6),
    "a body part of numbers":
        patient_radiograph(BodyPartExamined="Roe^Jane^2").replace(TEXT, NUMBERS),
}  # fmt: skip


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
@pytest.mark.parametrize("path", ["analyse", "report/sr"])
def test_an_unreadable_file_is_refused_with_a_sentence(client, data, path):
    refused = client.post(f"/api/v1/{path}", content=data)
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error.endswith(".") and "Traceback" not in error
    assert "/" not in error  # neither a path of the server nor a part of one


def test_a_file_that_inflates_without_end_is_refused(client):
    made = pydicom.dcmread(BytesIO(patient_radiograph()))
    made.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data = to_bytes(made)
    assert client.post("/api/v1/analyse?override=true", content=data).status_code == 200
    start = 144 + int.from_bytes(data[140:144], "little")
    zeros = bytes(3 * MOST_PIXELS + 2**22)
    endless = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS).compress(zeros)
    refused = client.post("/api/v1/analyse", content=data[:start] + endless)
    assert refused.status_code == 422 and "inflates to more" in refused.json()["error"]


def compressed(client, made, coded):
    """Return the response to a DICOM image with these bytes as its compressed pixels."""
    made.PixelData = pydicom.encaps.encapsulate([coded])
    return client.post("/api/v1/analyse?override=true", content=to_bytes(made))


@pytest.mark.parametrize(
    ("ending", "syntax"),
    [(".jpg", pydicom.uid.JPEGBaseline8Bit), (".jp2", pydicom.uid.JPEG2000)],
)
def test_a_compressed_picture_has_the_size_of_its_header(client, ending, syntax):
    made = pydicom.dcmread(BytesIO(patient_radiograph()))
    made.file_meta.TransferSyntaxUID = syntax
    for shape, status in (((300, 200), 200), ((310, 200), 422)):
        response = compressed(client, made, encode_picture(ending, grey_picture(*shape)))
        assert response.status_code == status
    assert "310" in response.json()["error"] and "200" in response.json()["error"]


def test_run_lengths_are_no_more_than_a_picture_needs(client):
    made = pydicom.dcmread(BytesIO(patient_radiograph()))
    made.compress(pydicom.uid.RLELossless)
    frame = pydicom.encaps.get_frame(made.PixelData, 0, number_of_frames=1)
    for coded, status in ((frame, 200), (frame + bytes(2 * 300 * 200), 422)):
        response = compressed(client, made, coded)
        assert response.status_code == status
    assert "header" in response.json()["error"]


ODD = {
    "sex": {"PatientSex": "U"}, "birth": {"PatientBirthDate": "1950"},
    "date": {"StudyDate": "2024-01-01"}, "time": {"StudyTime": "10:15:30"},
    "two names": {"PatientName": ["Roe^Jane", "Roe^J"]}, "short name": {"PatientName": "Roe"},
    "set of old": {"SpecificCharacterSet": "ISO_IR 6"}, "no set": {"SpecificCharacterSet": ""},
    "Japanese": {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Roe^Jane=山田^花"},
    "Korean": {"SpecificCharacterSet": ["", "ISO 2022 IR 149"], "PatientName": "Roe^Jane=洪^吉洞"},
}  # fmt: skip


@pytest.mark.parametrize("header", ODD.values(), ids=ODD)
@pytest.mark.parametrize("form", ["sr", "sc"])
def test_an_odd_header_still_gets_its_report(client, form, header):
    """Values that a report cannot hold are left empty; names are kept in any character set."""
    response = client.post(f"/api/v1/report/{form}", content=patient_radiograph(**header))
    assert response.status_code == 200, response.text
    report = pydicom.dcmread(BytesIO(response.content))
    name = header.get("PatientName", "Roe^Jane")
    assert report.PatientName == (name if isinstance(name, str) else name[0])
    assert report.PatientID == "SECRET-7"


@pytest.mark.parametrize("header", ODD.values(), ids=ODD)
def test_reports_leave_the_header_as_it_was(service, header):
    """So that the second report from one analysis has the same names as the first."""
    analysis = service.analyse(patient_radiograph(**header))
    radiograph, prediction = analysis.radiograph, analysis.prediction
    before = to_bytes(deepcopy(radiograph.header))
    report = structured_report(radiograph.header, prediction, "test")
    capture = secondary_capture(radiograph.header, radiograph.pixels, prediction)
    assert to_bytes(deepcopy(radiograph.header)) == before
    assert capture.PatientName == report.PatientName and str(report.PatientName).startswith("Roe")


def test_a_header_that_no_report_can_hold_is_refused(client):
    refused = client.post("/api/v1/report/sr", content=patient_radiograph(SOPClassUID="1.2.3.4.5"))
    assert refused.status_code == 422 and "header" in refused.json()["error"]


@pytest.mark.parametrize(("path", "status"), [("nothing", 404), ("analyse", 405)])
def test_an_unknown_address_or_method_is_refused(client, path, status):
    refused = client.get(f"/api/v1/{path}")
    assert refused.status_code == status and refused.json()["error"].endswith(".")


def test_an_upload_beyond_the_limit_is_refused(client, monkeypatch):
    monkeypatch.setattr(web, "MAX_BYTES", 1000)
    for path in ("analyse", "analyse-batch"):
        assert client.post(f"/api/v1/{path}", content=bytes(1001)).status_code == 413

    def parts():
        yield bytes(600)
        yield bytes(600)

    assert client.post("/api/v1/analyse", content=parts()).status_code == 413


def test_a_malformed_parameter_is_named(client):
    refused = client.post("/api/v1/report/pdf", content=patient_radiograph())
    assert refused.status_code == 422 and "form" in refused.json()["error"]
    refused = client.post("/api/v1/analyse?override=perhaps", content=patient_radiograph())
    assert refused.status_code == 422 and "override" in refused.json()["error"]


@pytest.mark.parametrize(
    "request_body",
    [
        {"content": b"no form"},
        {"files": []},
        {"data": {"files": "words"}},
        {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ],
)
def test_a_malformed_form_is_refused(client, request_body):
    refused = client.post("/api/v1/analyse-batch", **request_body)
    assert refused.status_code == 422 and refused.json()["error"].endswith(".")


def test_no_test_file_of_pydicom_breaks_the_server(client):
    """Each is analysed, rejected or refused with a sentence."""
    names = [name for name in get_testdata_files() if Path(name).is_file()]
    assert len(names) > 50
    for name in names:
        data = Path(name).read_bytes()
        response = client.post("/api/v1/analyse", content=data)
        assert response.status_code in (200, 422), (name, response.text)
        assert ("error" if response.status_code == 422 else "rejected") in response.json()
    assert client.get("/api/v1/health").status_code == 200


def test_the_api_needs_the_token(service, exported):
    guarded = TestClient(
        web.make_app(service, onnx_backend.read_export(exported), token="secret"),
        base_url="http://localhost",
    )
    assert guarded.get("/").status_code == 200  # the page has a field for it
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        refused = guarded.get("/api/v1/model", headers=header)
        assert refused.status_code == 401 and "token" in refused.json()["error"]
    right = {"Authorization": "Bearer secret"}
    assert guarded.get("/api/v1/model", headers=right).status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "", "[::1", "127.0.0.1.evil.example:8000"])
def test_another_host_name_is_refused(client, name):
    for path in ("/", "/api/v1/health"):
        refused = client.get(path, headers={"Host": name})
        assert refused.status_code == 400 and "name" in refused.json()["error"]
        assert refused.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("host", ["::1", "Spine.Example", "*"])
def test_an_allowed_host_name_is_accepted(service, exported, host):
    application = web.make_app(service, onnx_backend.read_export(exported), hosts=(host,))
    name = {"::1": "[::1]:8000", "*": "any.example"}.get(host, host)
    assert TestClient(application).get("/", headers={"Host": name}).status_code == 200


# --- Nothing is kept, and no request waits forever -------------------------------------------


def test_an_internal_error_is_reported_and_its_message_is_not_logged(client, caplog, monkeypatch):
    def fail(*_):
        raise ValueError("Roe^Jane")

    monkeypatch.setattr(InferenceService, "analyse", fail)
    strict = TestClient(
        client.app, base_url="http://127.0.0.1"
    )  # it raises what the application does not handle
    with caplog.at_level(logging.DEBUG):
        response = strict.post("/api/v1/analyse", content=patient_radiograph())
        files = [("files", ("a.dcm", patient_radiograph()))] * 2
        lines = strict.post("/api/v1/analyse-batch", files=files).text.splitlines()
    assert response.status_code == 500 and len(lines) == 2
    for body in (response.json(), *map(json.loads, lines)):
        assert "internal error" in body["error"] and "Roe" not in body["error"]
    assert "ValueError in test_web.py" in caplog.text and "Roe" not in caplog.text


def test_a_stalled_upload_ends_with_an_error(monkeypatch):
    class Stalled:
        headers: ClassVar = {}

        async def stream(self):
            yield b"half of"
            await asyncio.Event().wait()

    monkeypatch.setattr(web, "UPLOAD_TIMEOUT_S", 0.05)
    with pytest.raises(web.RequestRefused, match="stalled") as refused:
        asyncio.run(web._body(Stalled()))
    assert refused.value.status == 408


def test_nothing_is_kept_or_logged(client, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    odd = patient_radiograph(PatientSex="Roe, too long for a code", Modality="Roe-modality-Roe")
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        client.post("/api/v1/analyse", content=patient_radiograph())
        assert client.post("/api/v1/report/sr?override=true", content=odd).status_code == 200
        client.post(
            "/api/v1/analyse-batch", files=[("files", ("Roe^Jane.dcm", patient_radiograph() * 3))]
        )
    for secret in ("Roe", "SECRET-7", "19500101"):
        assert secret not in caplog.text
    assert list(tmp_path.iterdir()) == []


@contextmanager
def held_up(service, monkeypatch):
    """Let no analysis begin until the block ends."""
    free, analyse = threading.Event(), InferenceService.analyse

    def waits(self, data, override=False):
        free.wait(30)
        return analyse(self, data, override)

    monkeypatch.setattr(InferenceService, "analyse", waits)
    yield free
    free.set()


@pytest.mark.parametrize(
    "held, admitted",
    [(web.MAX_BYTES_HELD, web.MAX_WAITING + 1), (2 * len(patient_radiograph()), 2)],
    ids=["many", "much"],
)
def test_requests_beyond_the_queue_are_asked_to_retry(
    service, exported, monkeypatch, held, admitted
):
    monkeypatch.setattr(web, "MAX_BYTES_HELD", held)
    application = web.make_app(service, onnx_backend.read_export(exported))
    responses = []
    with (
        TestClient(application, base_url="http://localhost") as client,
        held_up(service, monkeypatch) as free,
    ):

        def send():
            responses.append(client.post("/api/v1/analyse", content=patient_radiograph()))

        clients = [threading.Thread(target=send) for _ in range(admitted + 3)]
        for one in clients:
            one.start()
        for _ in range(100):
            if len(responses) >= 3:
                break
            threading.Event().wait(0.1)
        free.set()
        for one in clients:
            one.join()
    late = [response for response in responses if response.status_code == 503]
    assert len(late) == 3 and all(int(response.headers["retry-after"]) > 0 for response in late)
    assert all(response.json()["error"].endswith(".") for response in late)
    assert sum(response.status_code == 200 for response in responses) == admitted

"""The web application, asked as a client would ask it."""

import asyncio
import base64
import json
import logging
import struct
import subprocess
import threading
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from pydicom.data import get_testdata_files
from sent import encoded, film, grey, written

from dernet_utils.imaging import reader
from dernet_utils.inference import onnx_backend
from dernet_utils.serving import web
from dernet_utils.serving import web as serving_web
from dernet_utils.serving.dicom_report import read_report
from dernet_utils.serving.report import html_page
from dernet_utils.serving.service import InferenceService


@pytest.fixture(scope="module")
def client(service, exported, tmp_path_factory):
    samples = tmp_path_factory.mktemp("samples")
    (samples / "virtual-1.dcm").write_bytes(film())
    about = onnx_backend.read_export(exported)
    application = serving_web.make_app(service, about, samples=samples)
    return TestClient(application, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.mark.parametrize(
    "data", [film(), encoded(".png"), encoded(".jpg")], ids=["dcm", "png", "jpg"]
)
def test_each_form_is_answered(client, service, data):
    said = client.post("/api/v1/analyse?picture=true&heat=true", content=data)
    assert said.status_code == 200
    said = said.json()
    wanted = service.analyse(data).answer
    assert said["score"] == wanted.score and said["decision"] == "abnormal"
    assert len(said["boxes"]) == len(wanted.boxes) and not said["rejected"]
    assert (said["width"], said["height"]) == (200, 300) and "not for diagnosis" in said["notice"]
    picture = cv2.imdecode(np.frombuffer(_decoded(said["picture"]), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert (picture == service.analyse(data).grey).all()
    heat = cv2.imdecode(np.frombuffer(_decoded(said["heat"]), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert heat.shape == (2, 2)


def _decoded(text):
    return base64.b64decode(text)


def test_a_rejection_has_reasons_and_may_be_overridden(client):
    data = film(Modality="CT", BodyPartExamined="CHEST")
    said = client.post("/api/v1/analyse", content=data).json()
    assert said["rejected"] and "score" not in said
    assert [reason["layer"] for reason in said["reasons"]] == ["header", "header"]
    refused = client.post("/api/v1/report/html", content=data)
    assert refused.status_code == 409 and "modality is CT" in refused.json()["error"]
    said = client.post("/api/v1/analyse?override=true", content=data).json()
    assert said["overridden"] and said["score"] and len(said["reasons"]) == 2
    page = client.post("/api/v1/report/html?override=true", content=data).text
    assert "A person overrode" in page and "modality is CT" in page


def test_the_page_of_a_report(client, service):
    page = client.post("/api/v1/report/html", content=film()).text
    answer = service.analyse(film()).answer
    assert f"{answer.score:.3f}" in page and "not for diagnosis" in page
    assert page.count("<tr><td>") >= len(answer.boxes) + 4
    assert "http" not in page.replace("http-equiv", "")  # nothing from elsewhere
    for threshold, words in ((0.0, "none found"), (1.0, "not looked for")):
        empty = replace(answer, threshold=threshold, boxes=answer.boxes.head(0))
        assert words in html_page(reader.decode_radiograph(encoded()).pixels, empty, {})
    told = client.post("/api/v1/report/json", content=film()).json()
    assert told["score"] == answer.score and told["overridden"] == []


def test_dicom_reports_say_what_was_answered(client, service, tmp_path):
    data = film()
    answer, source = service.analyse(data).answer, pydicom.dcmread(BytesIO(data))
    sent = client.post("/api/v1/report/sr", content=data)
    assert sent.headers["content-type"] == "application/dicom"
    report = pydicom.dcmread(BytesIO(sent.content))
    assert report.StudyInstanceUID == source.StudyInstanceUID
    assert report.PatientID == source.PatientID
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    (series,) = evidence.ReferencedSeriesSequence
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    told = read_report(report)
    assert told["score"] == pytest.approx(answer.score, abs=1e-6)
    assert [box["lesion_type"] for box in told["boxes"]] == list(answer.boxes["lesion_type"])
    for name in ("score", "xmin", "ymin", "xmax", "ymax"):
        read = [box[name] for box in told["boxes"]]
        assert read == pytest.approx(answer.boxes[name].tolist(), rel=1e-6, abs=1e-4)
    sent = client.post("/api/v1/report/sc", content=data)
    capture = pydicom.dcmread(BytesIO(sent.content))
    assert capture.pixel_array.shape[2] == 3
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID


@pytest.mark.parametrize("form", ["sr", "sc"])
def test_dicom_reports_have_no_errors(client, form, tmp_path):
    data = film(Modality="CT")
    sent = client.post(f"/api/v1/report/{form}?override=true", content=data)
    (tmp_path / "made.dcm").write_bytes(sent.content)
    told = subprocess.run(["dciodvfy", tmp_path / "made.dcm"], capture_output=True, text=True)
    errors = [line for line in (told.stdout + told.stderr).splitlines() if "Error" in line]
    assert not errors, errors


def test_a_picture_has_no_dicom_report(client):
    refused = client.post("/api/v1/report/sr", content=encoded())
    assert refused.status_code == 422 and "DICOM image" in refused.json()["error"]


def test_a_batch_is_answered_line_by_line(client):
    files = [("files", (f"../{n}", data)) for n, data in enumerate([film(), b"junk", encoded()])]
    sent = client.post("/api/v1/analyse-batch", files=files)
    assert sent.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in sent.text.splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2]
    assert "score" in lines[0] and "score" in lines[2] and "Not an image" in lines[1]["error"]


def test_what_else_there_is(client):
    assert client.get("/api/v1/health").json() == {"status": "ok"}
    assert client.get("/api/v1/model").json()["decision"]["temperature"] == 1.3
    paths = client.get("/api/v1/openapi.json").json()["paths"]
    assert {"/api/v1/analyse", "/api/v1/analyse-batch", "/api/v1/report/{form}"} <= set(paths)
    assert client.get("/api/v1/samples").json() == ["virtual-1.dcm"]
    assert client.get("/api/v1/samples/virtual-1.dcm").content == film()
    for name in ("..%2Fmanifest.json", "none", "%2Fetc%2Fpasswd"):
        assert client.get(f"/api/v1/samples/{name}").status_code == 404
    page = client.get("/")
    assert page.status_code == 200 and "DERNet" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for part in ("app.js", "style.css"):
        assert client.get(f"/web/{part}").status_code == 200


# Bad input


def bomb(side=40_000):
    """A PNG of a few kilobytes whose header says that it is huge."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def without_pixels():
    made = pydicom.dcmread(BytesIO(film()))
    del made.PixelData
    return written(made)


def zipped():
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("film.dcm", film())
    return stream.getvalue()


TEXT, NUMBERS = (b"\x18\x00\x15\x00" + form for form in (b"CS", b"FD"))  # a body part as one
BAD = {
    "text": b"hello", "nothing": b"", "a renamed file": b"%PDF-1.7 " + bytes(500),
    "truncated DICOM": film()[:2000], "cut in the header": film()[:140], "huge": bomb(),
    "a zip": zipped(), "several frames": film(NumberOfFrames=2),
    "no pixels": without_pixels(), "invalid UTF-8": b"\xff\xfe\xfa" * 50,
    "hostile SVG": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "cut PNG": encoded()[:-40], "cut JPEG": encoded(".jpg")[:500],
    "rows without end": film(Rows=65_535, Columns=65_535),
    "three samples": film(SamplesPerPixel=3, PlanarConfiguration=0, PixelData=bytes(180_000)),
    "colour DICOM": film(PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0),
    "bits elsewhere": film(HighBit=6),
    "a body part of numbers": film(BodyPartExamined="Roe^Jane^2").replace(TEXT, NUMBERS),
}  # fmt: skip


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
@pytest.mark.parametrize("path", ["analyse", "report/sr"])
def test_what_is_no_film_gets_a_sentence(client, data, path):
    refused = client.post(f"/api/v1/{path}", content=data)
    assert 400 <= refused.status_code < 500
    said = refused.json()["error"]
    assert said.endswith(".") and "Traceback" not in said and "/" not in said.replace("and/or", "")


def test_what_inflates_without_end_is_refused(client, monkeypatch):
    made = pydicom.dcmread(BytesIO(film()))
    made.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data = written(made)
    assert client.post("/api/v1/analyse?override=true", content=data).status_code == 200
    monkeypatch.setattr(reader, "MOST_PIXELS", 100_000)
    start = 144 + int.from_bytes(data[140:144], "little")
    endless = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS).compress(bytes(10**8))
    refused = client.post("/api/v1/analyse", content=data[:start] + endless)
    assert refused.status_code == 422 and "inflates to more" in refused.json()["error"]


def compressed(client, made, coded):
    """What is said of a film whose pixels are these bytes."""
    made.PixelData = pydicom.encaps.encapsulate([coded])
    return client.post("/api/v1/analyse?override=true", content=written(made))


@pytest.mark.parametrize(
    ("ending", "syntax"),
    [(".jpg", pydicom.uid.JPEGBaseline8Bit), (".jp2", pydicom.uid.JPEG2000)],
)
def test_a_compressed_picture_has_the_size_of_its_header(client, ending, syntax):
    made = pydicom.dcmread(BytesIO(film()))
    made.file_meta.TransferSyntaxUID = syntax
    for shape, status in (((300, 200), 200), ((310, 200), 422)):
        said = compressed(client, made, encoded(ending, grey(*shape)))
        assert said.status_code == status
    assert "310 rows and 200 columns" in said.json()["error"]


def test_run_lengths_are_no_more_than_a_picture_needs(client):
    made = pydicom.dcmread(BytesIO(film()))
    made.compress(pydicom.uid.RLELossless)
    frame = pydicom.encaps.get_frame(made.PixelData, 0, number_of_frames=1)
    for coded, status in ((frame, 200), (frame + bytes(2 * 300 * 200), 422)):
        said = compressed(client, made, coded)
        assert said.status_code == status
    assert "holds more than" in said.json()["error"]


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
    """What a report cannot carry is left empty in it; names come over in any character set."""
    data = film(**header)
    sent = client.post(f"/api/v1/report/{form}", content=data)
    assert sent.status_code == 200, sent.text
    report = pydicom.dcmread(BytesIO(sent.content))
    name = header.get("PatientName", "Roe^Jane")
    assert report.PatientName == (name if isinstance(name, str) else name[0])
    assert report.PatientID == "SECRET-7"


def test_a_header_that_no_report_can_carry_is_told(client):
    refused = client.post("/api/v1/report/sr", content=film(SOPClassUID="1.2.3.4.5"))
    assert refused.status_code == 422 and "cannot be carried" in refused.json()["error"]


def test_an_address_or_method_that_is_none(client):
    for refused in (client.get("/api/v1/nothing"), client.get("/api/v1/analyse")):
        assert 404 <= refused.status_code <= 405 and refused.json()["error"].endswith(".")


def test_too_much_is_refused(client, monkeypatch):
    monkeypatch.setattr(web, "MOST_BYTES", 1000)
    for path in ("analyse", "analyse-batch"):
        assert client.post(f"/api/v1/{path}", content=bytes(1001)).status_code == 413

    def parts():
        yield bytes(600)
        yield bytes(600)

    assert client.post("/api/v1/analyse", content=parts()).status_code == 413


def test_what_is_asked_wrongly_is_named(client):
    refused = client.post("/api/v1/report/pdf", content=film())
    assert refused.status_code == 422 and "form" in refused.json()["error"]
    refused = client.post("/api/v1/analyse?override=perhaps", content=film())
    assert refused.status_code == 422 and "override" in refused.json()["error"]


@pytest.mark.parametrize(
    "sent",
    [
        {"content": b"no form"},
        {"files": []},
        {"data": {"files": "words"}},
        {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ],
)
def test_a_form_that_is_none(client, sent):
    refused = client.post("/api/v1/analyse-batch", **sent)
    assert refused.status_code == 422 and refused.json()["error"].endswith(".")


def test_every_test_file_of_pydicom_is_answered(client):
    """None breaks the server; each is answered or refused in a sentence."""
    names = [name for name in get_testdata_files() if Path(name).is_file()]
    assert len(names) > 50
    for name in names:
        data = Path(name).read_bytes()
        said = client.post("/api/v1/analyse", content=data)
        assert said.status_code in (200, 422), (name, said.text)
        assert "error" in said.json() or "rejected" in said.json()
    assert client.get("/api/v1/health").status_code == 200


def test_the_token_is_asked_for(service, exported):
    guarded = TestClient(
        serving_web.make_app(service, onnx_backend.read_export(exported), token="secret"),
        base_url="http://localhost",
    )
    assert guarded.get("/").status_code == 200  # the page asks for it
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        refused = guarded.get("/api/v1/model", headers=header)
        assert refused.status_code == 401 and "token" in refused.json()["error"]
    right = {"Authorization": "Bearer secret"}
    assert guarded.get("/api/v1/model", headers=right).status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "", "[::1", "127.0.0.1.evil.example:8000"])
def test_another_name_is_refused(client, name):
    for path in ("/", "/api/v1/health"):
        refused = client.get(path, headers={"Host": name})
        assert refused.status_code == 400 and "another name" in refused.json()["error"]
        assert refused.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("host", ["::1", "Spine.Example", "*"])
def test_the_server_hears_its_own_name(service, exported, host):
    own = serving_web.make_app(service, onnx_backend.read_export(exported), hosts=(host,))
    called = {"::1": "[::1]:8000", "*": "any.example"}.get(host, host)
    assert TestClient(own).get("/", headers={"Host": called}).status_code == 200


# Nothing is kept, and nobody waits for ever


def test_a_fault_is_told_and_its_words_are_not_logged(client, caplog, monkeypatch):
    def fail(*_):
        raise ValueError("Roe^Jane")

    monkeypatch.setattr(InferenceService, "analyse", fail)
    strict = TestClient(client.app, base_url="http://127.0.0.1")  # it raises what gets through
    with caplog.at_level(logging.DEBUG):
        told = strict.post("/api/v1/analyse", content=film())
        files = [("files", ("a.dcm", film()))] * 2
        lines = strict.post("/api/v1/analyse-batch", files=files).text.splitlines()
    assert told.status_code == 500 and len(lines) == 2
    for said in (told.json(), *map(json.loads, lines)):
        assert "is its fault and not the file's" in said["error"]
    assert "ValueError in test_app.py" in caplog.text and "Roe" not in caplog.text


def test_a_file_that_stops_coming_is_given_up(monkeypatch):
    class Stalled:
        async def stream(self):
            yield b"half of"
            await asyncio.Event().wait()

    monkeypatch.setattr(web, "STALLED_S", 0.05)
    with pytest.raises(serving_web.RequestRefused, match="stopped coming") as refused:
        asyncio.run(serving_web._body(Stalled()))
    assert refused.value.status == 408


def test_nothing_is_kept_or_logged(client, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    odd = film(PatientSex="Roe, too long for a code", Modality="Roe-modality-Roe")
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        client.post("/api/v1/analyse", content=film())
        assert client.post("/api/v1/report/sr?override=true", content=odd).status_code == 200
        client.post("/api/v1/analyse-batch", files=[("files", ("Roe^Jane.dcm", film() * 3))])
    for secret in ("Roe", "SECRET-7", "19500101"):
        assert secret not in caplog.text
    assert list(tmp_path.iterdir()) == []


@contextmanager
def held_up(service, monkeypatch):
    """Let no film be answered until the block ends."""
    free, examine = threading.Event(), InferenceService.examine

    def waits(self, data, override=False):
        free.wait(30)
        return examine(self, data, override)

    monkeypatch.setattr(InferenceService, "analyse", waits)
    yield free
    free.set()


@pytest.mark.parametrize(
    "held, admitted",
    [(serving_web.MOST_BYTES_HELD, serving_web.WAITING + 1), (2 * len(film()), 2)],
    ids=["many", "much"],
)
def test_who_comes_too_late_is_told_to_come_back(service, exported, monkeypatch, held, admitted):
    monkeypatch.setattr(web, "MOST_BYTES_HELD", held)
    application = serving_web.make_app(service, onnx_backend.read_export(exported))
    said = []
    with (
        TestClient(application, base_url="http://localhost") as client,
        held_up(service, monkeypatch) as free,
    ):

        def ask():
            said.append(client.post("/api/v1/analyse", content=film()))

        clients = [threading.Thread(target=ask) for _ in range(admitted + 3)]
        for one in clients:
            one.start()
        for _ in range(100):
            if len(said) >= 3:
                break
            threading.Event().wait(0.1)
        free.set()
        for one in clients:
            one.join()
    late = [answer for answer in said if answer.status_code == 503]
    assert len(late) == 3 and all(int(answer.headers["retry-after"]) > 0 for answer in late)
    assert "Busy" in late[0].json()["error"]
    assert sum(answer.status_code == 200 for answer in said) == admitted

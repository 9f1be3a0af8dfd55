"""The node with a real archive: Orthanc, from Debian's packages, on loopback."""

import json
import socket
import subprocess
import time
import urllib.request
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from dicom_files import patient_radiograph

from dernet_utils.serving.dicom_node import Node, Peer
from dernet_utils.serving.dicom_report import read_report

pytestmark = pytest.mark.slow

SR, CAPTURE = "1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.7"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Orthanc:
    """An Orthanc of its own for one test, reached by its REST interface."""

    def __init__(self, folder: Path, node: Node, dicom_port: int):
        http_port = free_port()
        self._url = f"http://127.0.0.1:{http_port}/"
        settings = {
            "Name": "ARCHIVE", "StorageDirectory": str(folder), "IndexDirectory": str(folder),
            "HttpPort": http_port, "RemoteAccessAllowed": False, "AuthenticationEnabled": False,
            "DicomPort": dicom_port, "DicomAet": "ARCHIVE", "Plugins": [],
            "DicomModalities": {"dernet": ["DERNET", "127.0.0.1", node.port]},
        }  # fmt: skip
        path = folder / "orthanc.json"
        path.write_text(json.dumps(settings))
        self._log = (folder / "orthanc.log").open("w+")
        self._process = subprocess.Popen(
            ["/usr/sbin/Orthanc", path], stdout=self._log, stderr=subprocess.STDOUT
        )

    def __enter__(self) -> "Orthanc":
        for _ in range(300):
            try:
                self.request("system")
                return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise AssertionError(Path(self._log.name).read_text())

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def request(self, path: str, data: bytes | None = None) -> bytes:
        """Return the response's body; OSError if there is none, or its status is not 200."""
        with urllib.request.urlopen(self._url + path, data, timeout=60) as response:
            return response.read()

    def instances(self, sop_class: str) -> list[str]:
        """Return its identifiers of the instances of a SOP class."""
        return [
            name
            for name in json.loads(self.request("instances"))
            if self.request(f"instances/{name}/metadata/SopClassUid").decode() == sop_class
        ]


@pytest.fixture
def archive(service, tmp_path):
    port = free_port()
    with (
        Node(service, "test", Peer("ARCHIVE", "127.0.0.1", port), port=0) as node,
        Orthanc(tmp_path, node, port) as orthanc,
    ):
        yield orthanc


def test_an_archive_sends_an_image_and_gets_its_reports(archive, service, tmp_path):
    source = pydicom.dcmread(BytesIO(patient_radiograph()))
    stored = json.loads(archive.request("instances", patient_radiograph()))["ID"]
    archive.request("modalities/dernet/store", stored.encode())
    for _ in range(600):
        if len(json.loads(archive.request("instances"))) == 3:
            break
        time.sleep(0.1)

    (report,), (capture,) = archive.instances(SR), archive.instances(CAPTURE)
    study = json.loads(archive.request(f"instances/{stored}/study"))["ID"]
    inside = json.loads(archive.request(f"studies/{study}/instances"))
    assert {one["ID"] for one in inside} == {stored, report, capture}
    for name in (report, capture):
        path = tmp_path / f"{name}.dcm"
        path.write_bytes(archive.request(f"instances/{name}/file"))
        checked = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
        assert "Error" not in checked.stdout + checked.stderr

    stored_report = pydicom.dcmread(tmp_path / f"{report}.dcm")
    contents, prediction = (
        read_report(stored_report),
        service.analyse(patient_radiograph()).prediction,
    )
    assert contents["score"] == pytest.approx(prediction.score, abs=1e-6)
    assert len(contents["boxes"]) == len(prediction.boxes) > 0
    assert stored_report.PatientID == source.PatientID
    assert stored_report.StudyInstanceUID == source.StudyInstanceUID

    preview = np.frombuffer(archive.request(f"instances/{capture}/preview"), np.uint8)
    picture = cv2.imdecode(preview, cv2.IMREAD_COLOR)  # rendered by Orthanc
    assert picture.shape[0] >= source.Rows and np.ptp(picture) > 100

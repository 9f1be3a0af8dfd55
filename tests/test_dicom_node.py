"""The DICOM node: images in by C-STORE, reports out to a peer; here the peer is pynetdicom's."""

import logging
import threading
from io import BytesIO

import pydicom
import pytest
from dicom_files import patient_radiograph
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage, DigitalXRayImageStorageForPresentation

from dernet_utils.core.errors import DernetError
from dernet_utils.serving.dicom_node import REPORTS, Node, Peer
from dernet_utils.serving.dicom_report import read_report

pytestmark = pytest.mark.slow


@pytest.fixture
def archive():
    """A peer that accepts reports, the reports, and an event that is set when two have come."""
    reports, both = [], threading.Event()

    def take(event):
        reports.append(pydicom.dcmread(BytesIO(event.encoded_dataset())))
        if len(reports) == 2:
            both.set()
        return 0x0000

    entity = AE(ae_title="ARCHIVE")
    for sop_class in REPORTS:
        entity.add_supported_context(sop_class)
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, take)]
    )
    yield Peer("ARCHIVE", "127.0.0.1", server.server_address[1]), reports, both
    server.shutdown()


def send(node, data):
    """Send an image to a node, as a modality does; return the status."""
    entity = AE(ae_title="MODALITY")
    entity.add_requested_context(DigitalXRayImageStorageForPresentation)
    entity.add_requested_context(CTImageStorage)
    association = entity.associate("127.0.0.1", node.port, ae_title="DERNET")
    assert association.is_established
    status = association.send_c_store(pydicom.dcmread(BytesIO(data)))
    association.release()
    return status.Status


def logged(caplog):
    """Return the messages of the node itself, without those of pynetdicom."""
    name = "dernet_utils.serving.dicom_node"
    return [record.getMessage() for record in caplog.records if record.name == name]


def test_an_image_comes_in_and_two_reports_go_out(service, archive, caplog):
    peer, reports, both = archive
    with caplog.at_level(logging.INFO), Node(service, "test", peer, port=0) as node:
        assert send(node, patient_radiograph()) == 0x0000
        assert both.wait(60)
    report, capture = reports
    source = pydicom.dcmread(BytesIO(patient_radiograph()))
    prediction = service.analyse(patient_radiograph()).prediction
    assert read_report(report)["score"] == pytest.approx(prediction.score, abs=1e-6)
    assert report.StudyInstanceUID == capture.StudyInstanceUID == source.StudyInstanceUID
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert source.SOPInstanceUID in caplog.text
    for secret in ("Roe", "SECRET-7", "19500101"):
        assert secret not in caplog.text


def test_a_rejected_or_unreadable_image_gets_no_report(service, archive, caplog):
    peer, reports, both = archive
    with Node(service, "test", peer, port=0) as node:
        assert send(node, patient_radiograph(BodyPartExamined="CHEST")) == 0x0000
        assert send(node, patient_radiograph(PhotometricInterpretation="PALETTE COLOR")) == 0x0000
        assert send(node, patient_radiograph(seed=2)) == 0x0000  # and the node goes on
        assert both.wait(60)
    assert len(reports) == 2
    warnings = logged(caplog)
    assert len(warnings) == 2 and all(line.startswith("2.25.1000") for line in warnings)
    assert "header" in warnings[0] and "dicom.py" in warnings[1]  # which check, and where it failed
    assert "CHEST" not in caplog.text


@pytest.mark.parametrize("title", ["", "TOO-LONG-FOR-A-TITLE"])
def test_an_invalid_title_is_refused(service, title):
    with pytest.raises(DernetError, match="16 characters"):
        Node(service, "test", Peer("A", "127.0.0.1", 9), title)


def test_the_log_names_an_image_without_reports_and_the_unreachable_peer(service, caplog):
    with Node(service, "test", Peer("NOBODY", "127.0.0.1", 9), port=0) as node:
        assert send(node, patient_radiograph()) == 0x0000
    (line,) = logged(caplog)
    assert line.startswith("2.25.1000") and "NOBODY at 127.0.0.1:9" in line


def test_an_idle_sender_does_not_keep_the_node_running(service, archive):
    entity = AE(ae_title="MODALITY")
    entity.add_requested_context(DigitalXRayImageStorageForPresentation)
    with Node(service, "test", archive[0], port=0) as node:
        staying = entity.associate("127.0.0.1", node.port, ae_title="DERNET")
        assert staying.is_established
    staying.join(10)
    assert staying.is_aborted


def test_a_port_in_use_is_named(service, archive):
    peer = archive[0]
    with pytest.raises(DernetError, match=f"{peer.port}: Address already in use"):
        Node(service, "test", peer, port=peer.port).__enter__()


@pytest.mark.parametrize("text", ["", "ORTHANC", "A@b", "@h:1", "T@h:x", "T" * 17 + "@h:1"])
def test_a_peer_has_title_host_and_port(text):
    with pytest.raises(DernetError, match="TITLE@host:port"):
        Peer.parse(text)

"""Films in by C-STORE, reports out to a peer; the peer here is pynetdicom's own."""

import logging
import threading
from io import BytesIO

import pydicom
import pytest
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage, DigitalXRayImageStorageForPresentation
from sent import film

from dernet_utils.core.errors import DernetError
from dernet_utils.serving.dicom_node import REPORTS, Node, Peer
from dernet_utils.serving.dicom_report import read_report


@pytest.fixture
def archive():
    """A peer that takes reports, and what it took."""
    taken, came = [], threading.Event()

    def take(event):
        taken.append(pydicom.dcmread(BytesIO(event.encoded_dataset())))
        if len(taken) == 2:
            came.set()
        return 0x0000

    entity = AE(ae_title="ARCHIVE")
    for report in REPORTS:
        entity.add_supported_context(report)
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, take)]
    )
    yield Peer("ARCHIVE", "127.0.0.1", server.server_address[1]), taken, came
    server.shutdown()


def send(node, data):
    """Send a film to a node, as a modality would; return the status."""
    entity = AE(ae_title="MODALITY")
    entity.add_requested_context(DigitalXRayImageStorageForPresentation)
    entity.add_requested_context(CTImageStorage)
    association = entity.associate("127.0.0.1", node.port, ae_title="DERNET")
    assert association.is_established
    status = association.send_c_store(pydicom.dcmread(BytesIO(data)))
    association.release()
    return status.Status


def test_a_film_comes_in_and_two_reports_go_out(service, archive, caplog):
    peer, taken, came = archive
    with caplog.at_level(logging.INFO), Node(service, "test", peer, port=0) as node:
        assert send(node, film()) == 0x0000
        assert came.wait(60)
    report, capture = taken
    source = pydicom.dcmread(BytesIO(film()))
    answer = service.analyse(film()).answer
    assert read_report(report)["score"] == pytest.approx(answer.score, abs=1e-6)
    assert report.StudyInstanceUID == capture.StudyInstanceUID == source.StudyInstanceUID
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert source.SOPInstanceUID in caplog.text
    for secret in ("Roe", "SECRET-7", "19500101"):
        assert secret not in caplog.text


def test_a_film_that_is_none_gets_no_report(service, archive, caplog):
    peer, taken, came = archive
    with Node(service, "test", peer, port=0) as node:
        assert send(node, film(BodyPartExamined="CHEST")) == 0x0000
        assert send(node, film(PhotometricInterpretation="PALETTE COLOR")) == 0x0000
        assert send(node, film(seed=2)) == 0x0000  # and the node goes on
        assert came.wait(60)
    assert len(taken) == 2
    assert "was rejected by the header" in caplog.text and "cannot be read" in caplog.text
    assert "CHEST" not in caplog.text


@pytest.mark.parametrize("title", ["", "TOO-LONG-FOR-A-TITLE"])
def test_a_title_that_is_none_is_told(service, title):
    with pytest.raises(DernetError, match="1 to 16 characters"):
        Node(service, "test", Peer("A", "127.0.0.1", 9), title)


def test_a_peer_that_is_not_there_is_named(service, caplog):
    with Node(service, "test", Peer("NOBODY", "127.0.0.1", 9), port=0) as node:
        assert send(node, film()) == 0x0000
    told = "2.25.1000 got no report. NOBODY at 127.0.0.1:9 does not take reports."
    assert told in caplog.text


def test_a_sender_that_stays_does_not_hold_the_node(service, archive):
    entity = AE(ae_title="MODALITY")
    entity.add_requested_context(DigitalXRayImageStorageForPresentation)
    with Node(service, "test", archive[0], port=0) as node:
        staying = entity.associate("127.0.0.1", node.port, ae_title="DERNET")
        assert staying.is_established
    staying.join(10)
    assert staying.is_aborted


def test_a_port_in_use_is_named(service, archive):
    peer = archive[0]
    with pytest.raises(DernetError, match="cannot listen there: Address already in use"):
        Node(service, "test", peer, port=peer.port).__enter__()


@pytest.mark.parametrize("text", ["", "ORTHANC", "A@b", "@h:1", "T@h:x", "T" * 17 + "@h:1"])
def test_a_peer_has_title_host_and_port(text):
    with pytest.raises(DernetError, match="TITLE@host:port"):
        Peer.parse(text)

"""A DICOM node: it receives radiographs by C-STORE and sends the reports on them to a peer.

A received image is kept in memory until its reports have been sent or have failed. The log names
it by its SOP instance UID, and holds nothing from its header that identifies the patient.
"""

import logging
import queue
import threading
from types import TracebackType
from typing import NamedTuple

import pydicom
from pynetdicom import AE, evt
from pynetdicom.events import Event
from pynetdicom.sop_class import (
    ComprehensiveSRStorage,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
    Verification,
)

from dernet_utils.core.errors import DernetError, where_raised
from dernet_utils.serving.dicom_report import secondary_capture, structured_report
from dernet_utils.serving.service import InferenceService

RADIOGRAPHS = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
)
REPORTS = (ComprehensiveSRStorage, SecondaryCaptureImageStorage)
SYNTAXES = [
    pydicom.uid.ExplicitVRLittleEndian,
    pydicom.uid.ImplicitVRLittleEndian,
    pydicom.uid.JPEGLosslessSV1,
    pydicom.uid.JPEGLSLossless,
    pydicom.uid.JPEG2000Lossless,
    pydicom.uid.RLELossless,
]
MAX_WAITING = 32  # images that may wait for analysis
CONNECT_TIMEOUT_S = 30  # to a peer
SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000  # PS3.4 B.2.3
log = logging.getLogger(__name__)


class Peer(NamedTuple):
    """Where the reports are sent: application entity (AE) title, address, port."""

    title: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Peer":
        """Read ``TITLE@host:port``.

        Raises:
            DernetError: The text has another form.

        >>> Peer.parse("ORTHANC@127.0.0.1:4242").port
        4242
        """
        title, _, address = text.partition("@")
        host, _, port = address.rpartition(":")
        if not (title and len(title) <= 16 and host and port.isdigit() and 0 < int(port) < 2**16):
            raise DernetError(
                f"A peer is given as TITLE@host:port, such as ORTHANC@127.0.0.1:4242, not {text!r}."
            )
        return cls(title, host, int(port))


class Node:
    """A context manager that receives images, analyses them one by one, and sends the reports.

    Args:
        service: Analyses each image.
        version: The networks' version, for the reports.
        peer: Receives the reports.
        title: The node's application entity title, 1 to 16 ASCII characters.
        port: Where it listens on `host`; 0 for any free port.
        host: 127.0.0.1, unless other machines are to reach it.

    Raises:
        DernetError: The title is invalid; on entering the context, the node cannot listen there.
    """

    def __init__(
        self,
        service: InferenceService,
        version: str,
        peer: Peer,
        title: str = "DERNET",
        port: int = 11112,
        host: str = "127.0.0.1",
    ):
        self._service, self._version, self._peer = service, version, peer
        try:
            self._entity = AE(ae_title=title)
        except ValueError as error:
            raise DernetError(
                f"A node's title has 1 to 16 characters of ASCII; {title!r} is not allowed."
            ) from error
        self._entity.add_supported_context(Verification)
        for sop_class in RADIOGRAPHS:
            self._entity.add_supported_context(sop_class, SYNTAXES)
        for sop_class in REPORTS:
            self._entity.add_requested_context(sop_class)
        self._address = (host, port)
        self._entity.connection_timeout = CONNECT_TIMEOUT_S
        self._received: queue.Queue[tuple[str, bytes] | None] = queue.Queue(MAX_WAITING)
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="dernet-node")

    @property
    def port(self) -> int:
        """The port on which the node listens."""
        return self._server.server_address[1]

    def __enter__(self) -> "Node":
        handlers = [(evt.EVT_C_STORE, self._receive), (evt.EVT_C_ECHO, lambda event: SUCCESS)]
        try:
            self._server = self._entity.start_server(
                self._address, block=False, evt_handlers=handlers
            )
        except OSError as error:
            host, port = self._address
            raise DernetError(
                f"The node cannot listen on {host}:{port}: {error.strerror}. Try another --port."
            ) from error
        self._worker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True  # from here on no image is accepted
        self._server.shutdown()
        for association in self._server.active_associations:
            association.abort()  # an idle sender would keep the process alive
        self._received.put(None)  # ends the worker, after the waiting images
        self._worker.join()

    def _receive(self, event: Event) -> int:
        """Queue an image and return the DICOM status: success, or why it was refused."""
        if self._closing:
            return OUT_OF_RESOURCES
        uid = str(event.request.AffectedSOPInstanceUID)
        try:
            self._received.put_nowait((uid, event.encoded_dataset()))
        except queue.Full:
            return OUT_OF_RESOURCES
        except Exception as error:
            log.error("%s: could not be received (%s).", uid, where_raised(error))
            return CANNOT_UNDERSTAND
        return SUCCESS

    def _work(self) -> None:
        while (received := self._received.get()) is not None:
            uid, data = received
            try:
                self._process(uid, data)
            except DernetError as error:
                log.warning("%s: no report sent. %s", uid, error)
            except Exception as error:  # one image must not end the node
                log.error("%s: no report sent (%s).", uid, where_raised(error))

    def _process(self, uid: str, data: bytes) -> None:
        """Analyse an image and send its reports, or log why there are none."""
        try:
            analysis = self._service.analyse(data)
        except DernetError as error:  # its message may quote the header
            log.warning("%s: no report sent, image unreadable (%s).", uid, where_raised(error))
            return
        if analysis.rejected:  # the reasons may quote the header, too
            layers = " and ".join(dict.fromkeys(reason.layer for reason in analysis.reasons))
            log.warning("%s: no report sent, rejected by the %s check.", uid, layers)
            return
        radiograph, prediction = analysis.radiograph, analysis.prediction
        reports = [
            structured_report(radiograph.header, prediction, self._version[:64]),
            secondary_capture(radiograph.header, radiograph.pixels, prediction),
        ]
        self._send(reports)
        log.info("%s: reports sent to %s.", uid, self._peer.title)

    def _send(self, reports: list[pydicom.Dataset]) -> None:
        peer = self._peer
        association = self._entity.associate(peer.host, peer.port, ae_title=peer.title)
        if not association.is_established:
            raise DernetError(f"{peer.title} at {peer.host}:{peer.port} does not accept reports.")
        try:
            for report in reports:
                status = association.send_c_store(report)
                if not status or status.Status != SUCCESS:
                    reason = f"status {status.Status:04X}" if status else "no response"
                    raise DernetError(f"{peer.title} refused a report ({reason}).")
        finally:
            association.release()

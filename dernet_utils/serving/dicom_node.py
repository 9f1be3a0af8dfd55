"""A node on a hospital's network: films come in by C-STORE, reports go out to a peer.

A film that comes in is kept in memory until its reports are sent, or could not be: then it is named
in the log by its SOP instance UID, and by nothing that says whose it is.
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
WAITING = 32  # films that may wait to be answered
PATIENCE_S = 30  # with a peer that does not pick up
SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000  # PS3.4 B.2.3
log = logging.getLogger(__name__)


class Peer(NamedTuple):
    """Where reports go: application entity title, address, port."""

    title: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Peer":
        """Read ``TITLE@host:port``.

        Raises:
            DernetError: The text is another.

        >>> Peer.parse("ORTHANC@127.0.0.1:4242").port
        4242
        """
        title, _, place = text.partition("@")
        host, _, port = place.rpartition(":")
        if not (title and len(title) <= 16 and host and port.isdigit() and 0 < int(port) < 2**16):
            raise DernetError(
                f"A peer is TITLE@host:port, such as ORTHANC@127.0.0.1:4242, not {text}."
            )
        return cls(title, host, int(port))


class Node:
    """Receives films, answers them one by one, and sends the reports; a context manager.

    Args:
        service: Answers each film.
        version: Of the networks, for the reports.
        peer: Who gets the reports.
        title: The node's application entity title.
        port: Where it listens, on `host`; 0 for any free one.
        host: 127.0.0.1, unless others are to reach it.
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
                f"A node's title has 1 to 16 characters of ASCII, and {title!r} has not."
            ) from error
        self._entity.add_supported_context(Verification)
        for film in RADIOGRAPHS:
            self._entity.add_supported_context(film, SYNTAXES)
        for report in REPORTS:
            self._entity.add_requested_context(report)
        self._address = (host, port)
        self._entity.connection_timeout = PATIENCE_S
        self._films: queue.Queue[tuple[str, bytes] | None] = queue.Queue(WAITING)
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="dernet-node")

    @property
    def port(self) -> int:
        """Where the node listens."""
        return self._server.server_address[1]

    def __enter__(self) -> "Node":
        handlers = [(evt.EVT_C_STORE, self._take), (evt.EVT_C_ECHO, lambda event: SUCCESS)]
        try:
            self._server = self._entity.start_server(
                self._address, block=False, evt_handlers=handlers
            )
        except OSError as error:
            told = f"The node cannot listen there: {error.strerror}. Try another --port."
            raise DernetError(told) from error
        self._worker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True  # from here on no film is taken in
        self._server.shutdown()
        for association in self._server.active_associations:
            association.abort()  # a sender that stays would keep the process alive
        self._films.put(None)  # after the films that wait
        self._worker.join()

    def _take(self, event: Event) -> int:
        """Queue a film that was sent; say so, or that there is no room."""
        if self._closing:
            return OUT_OF_RESOURCES
        uid = str(event.request.AffectedSOPInstanceUID)
        try:
            self._films.put_nowait((uid, event.encoded_dataset()))
        except queue.Full:
            return OUT_OF_RESOURCES
        except Exception as error:
            log.error("%s could not be taken in (%s).", uid, where_raised(error))
            return CANNOT_UNDERSTAND
        return SUCCESS

    def _work(self) -> None:
        while (waiting := self._films.get()) is not None:
            uid, data = waiting
            try:
                self._answer(uid, data)
            except DernetError as error:
                log.warning("%s got no report. %s", uid, error)
            except Exception as error:  # one film must not end the node
                log.error("%s got no report (%s).", uid, where_raised(error))

    def _answer(self, uid: str, data: bytes) -> None:
        try:
            done = self._service.analyse(data)
        except DernetError as error:  # its words may quote the header
            log.warning("%s cannot be read, and no report was sent (%s).", uid, where_raised(error))
            return
        if done.rejected:  # the reasons may, too
            layers = " and the ".join(dict.fromkeys(reason.layer for reason in done.reasons))
            log.warning("%s was rejected by the %s, and no report was sent.", uid, layers)
            return
        header = done.radiograph.header
        reports = [
            structured_report(header, done.prediction, self._version[:64]),
            secondary_capture(header, done.radiograph.pixels, done.prediction),
        ]
        self._send(reports)
        log.info("%s was answered.", uid)

    def _send(self, reports: list[pydicom.Dataset]) -> None:
        peer = self._peer
        association = self._entity.associate(peer.host, peer.port, ae_title=peer.title)
        if not association.is_established:
            raise DernetError(f"{peer.title} at {peer.host}:{peer.port} does not take reports.")
        try:
            for report in reports:
                status = association.send_c_store(report)
                if not status or status.Status != SUCCESS:
                    told = f"status {status.Status:04X}" if status else "no answer"
                    raise DernetError(f"{peer.title} refused a report ({told}).")
        finally:
            association.release()

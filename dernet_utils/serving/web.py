"""The web interface: a page, and the same as an API under ``/api/v1``.

Nothing that is sent is kept, on disk or in a log: a file lives in memory until it is answered. One
film is answered at a time; a few may wait, and who comes after them is told to come back.
"""

import asyncio
import base64
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import cv2
import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from dernet_utils import __version__
from dernet_utils.core.errors import DernetError, where_raised
from dernet_utils.core.vocabulary import LESION_STYLE, NETWORK_NAMES, NOTICE
from dernet_utils.core.workspace import Workspace
from dernet_utils.inference.onnx_backend import SAMPLES, read_export
from dernet_utils.serving.report import as_record, html_page
from dernet_utils.serving.service import Analysis, InferenceService

WEB = Path(__file__).with_name("web")
MOST_BYTES = 100 * 2**20  # of a request; a large radiograph has 20
MOST_FILES = 64  # of a batch
WAITING = 8  # requests that may wait for the one that is answered
MOST_BYTES_HELD = 2 * MOST_BYTES  # of all requests that are inside
MOST_DROPPED = 10 * MOST_BYTES  # read of a request that is refused
RETRY_S = 2
STALLED_S = 30  # without a part of a file that is being sent
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
log = logging.getLogger(__name__)


class RequestRefused(Exception):
    """A request that cannot be answered, with the status and the sentence to say so."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.status, self.headers = status, headers


class RequestQueue:
    """Lets one film be answered at a time, and few requests, and few bytes, wait."""

    def __init__(self) -> None:
        self._inside, self._held, self._turn = 0, 0, asyncio.Lock()

    async def admit(self, request: Request) -> None:
        """Let a request in.

        Raises:
            Refused: It is too large, or too many are inside, or too much.
        """
        length = _length(request)
        room = self._inside <= WAITING and self._held + length <= MOST_BYTES_HELD
        if room and length <= MOST_BYTES:
            return
        async for _ in _parts(request):
            pass  # dropped
        raise RequestRefused(
            503, "Busy: too many films are waiting. Send yours again in a moment.",
            **{"Retry-After": str(RETRY_S)},
        )  # fmt: skip

    @asynccontextmanager
    async def place(self, request: Request) -> AsyncIterator[None]:
        """Count a request as inside."""
        length = _length(request)
        self._inside, self._held = self._inside + 1, self._held + length
        try:
            yield
        finally:
            self._inside, self._held = self._inside - 1, self._held - length

    async def run(self, work: Callable, *given: object) -> object:
        """Return what a function returns, run when its turn comes, beside the event loop."""
        async with self._turn:
            return await run_in_threadpool(work, *given)


def open_app(
    workspace: Workspace, engine: str, token: str = "", host: str = "127.0.0.1"
) -> FastAPI:
    """Return the application with the networks of a run.

    Args:
        workspace: The run; its networks are exported.
        engine: As `runtime.open_pipeline` takes it.
        token, host: As `make_app` takes token and hosts; an address for all stands for any name.

    Raises:
        DernetError: As `runtime.open_pipeline` raises.
    """
    folder = workspace.models
    service, samples = InferenceService.open(folder, engine), folder / SAMPLES
    hosts = ("*",) if host in ("0.0.0.0", "::") else ("127.0.0.1", "localhost", host)
    about = read_export(folder)
    return make_app(service, about, token, hosts, samples if samples.is_dir() else None)


def make_app(
    service: InferenceService,
    about: dict,
    token: str = "",
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost"),
    samples: Path | None = None,
) -> FastAPI:
    """Return the web application.

    Args:
        service: Answers each request.
        about: The manifest of its networks.
        token: Asked of every request to the API where it is not empty.
        hosts: Names under which the server may be called; among them an asterisk: any.
        samples: A folder of films to try.
    """
    app = FastAPI(
        title="DERNet", version=__version__, description=NOTICE, docs_url=None, redoc_url=None,
        openapi_url="/api/v1/openapi.json",
    )  # fmt: skip
    desk = RequestQueue()
    offered = {path.name: path for path in sorted(samples.iterdir())} if samples else {}

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable) -> Response:
        if not {"*", _called(request)} & {host.lower() for host in hosts}:
            # A page elsewhere whose name was made to point here must not reach the films.
            response = JSONResponse({"error": "This server has another name."}, 400)
        elif token and request.url.path.startswith("/api/") and not _has(token, request):
            refused = {"error": "The token is missing or wrong."}
            response = JSONResponse(refused, 401, {"WWW-Authenticate": "Bearer"})
        else:
            try:
                response = await call_next(request)
            except Exception as error:  # here, or the server would log it whole
                response = JSONResponse({"error": _fault(error)}, 500)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(RequestRefused)
    async def refuse(request: Request, error: RequestRefused) -> Response:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.exception_handler(DernetError)
    async def unreadable(request: Request, error: DernetError) -> Response:
        return JSONResponse({"error": _sentence(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        told = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
        return JSONResponse({"error": f"The request is malformed ({told})."}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody hears it

    @app.exception_handler(HTTPException)
    async def nothing_there(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": f"{error.detail}."}, error.status_code, error.headers)

    def answered(data: bytes, override: bool, picture: bool = False, heat: bool = False) -> dict:
        return _said(service.analyse(data, override), service, picture, heat)

    @app.post("/api/v1/analyse", openapi_extra=_BODY)
    async def analyse(
        request: Request,
        override: Override = False,
        picture: Annotated[bool, Query(description="Return the film as PNG, too.")] = False,
        heat: Annotated[bool, Query(description="Return DERNet's heat map, too.")] = False,
    ) -> JSONResponse:
        """Answer one file: DICOM, PNG or JPEG, as the request's body."""
        await desk.admit(request)
        async with desk.place(request):
            data = await _body(request)
            return JSONResponse(await desk.run(answered, data, override, picture, heat))

    @app.post("/api/v1/analyse-batch", openapi_extra=_FORM)
    async def analyse_batch(request: Request, override: Override = False) -> StreamingResponse:
        """Answer many files of a form, a line of JSON each, as soon as it is known."""
        await desk.admit(request)  # once: what has begun to be answered is answered whole
        async with desk.place(request):
            files = await _files(request)

        async def lines() -> AsyncIterator[str]:
            async with desk.place(request):
                for number, data in enumerate(files):
                    try:
                        said = await desk.run(answered, data, override)
                    except DernetError as error:
                        said = {"error": _sentence(error)}
                    except Exception as error:  # the files after it are answered
                        said = {"error": _fault(error)}
                    yield json.dumps({"number": number} | said) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @app.post("/api/v1/report/{form}", openapi_extra=_BODY)
    async def report(
        form: Literal["html", "json", "sr", "sc"], request: Request, override: Override = False
    ) -> Response:
        """Answer one file by a report: a page, JSON, or, of a DICOM image, SR or capture."""

        def reported(data: bytes) -> Response:
            done = service.analyse(data, override)
            if done.rejected:
                told = " ".join(reason.text for reason in done.reasons)
                sentence = f"The file was rejected, and there is nothing to report: {told}"
                raise RequestRefused(409, sentence)
            return _report(form, done, about)

        await desk.admit(request)
        async with desk.place(request):
            return await desk.run(reported, await _body(request))

    @app.get("/api/v1/health")
    async def health() -> dict:
        """Say that the server is there."""
        return {"status": "ok"}

    @app.get("/api/v1/model")
    async def model() -> dict:
        """Say which networks answer."""
        shown = ("notice", "made_by", "profile", "virtual", "decision", "score_threshold")
        styles = {name: {"colour": c, "dash": d} for name, (c, d) in LESION_STYLE.items()}
        said = {name: about.get(name) for name in shown}
        return said | {"lesion_types": styles, "networks": NETWORK_NAMES}

    @app.get("/api/v1/samples")
    async def list_samples() -> list[str]:
        """Name the films to try."""
        return list(offered)

    @app.get("/api/v1/samples/{name}")
    async def sample(name: str) -> FileResponse:
        """Send a film to try."""
        if name not in offered:
            raise RequestRefused(404, "There is no sample of that name.")
        return FileResponse(offered[name], media_type="application/octet-stream")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(WEB / "index.html")

    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


Override = Annotated[bool, Query(description="Answer although reasons speak against the file.")]
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": _BINARY}}}
_MANY = {
    "schema": {
        "type": "object",
        "properties": {"files": {"type": "array", "items": _BINARY["schema"]}},
    }
}
_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": _MANY}}}


def _called(request: Request) -> str:
    """Return the name by which a request calls the server, without its port."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _has(token: str, request: Request) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _sentence(error: DernetError) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


def _fault(error: Exception) -> str:
    """Log where an error was made, and return what its sender is told."""
    log.error("A request failed (%s).", where_raised(error))
    return "The server failed at this file, which is its fault and not the file's."


def _length(request: Request) -> int:
    """Bytes that a request says it has, or may have at most."""
    return int(request.headers.get("content-length", MOST_BYTES))


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """The body, unless there is too much of it.

    That is told when all has come: many clients hear no answer while they send.
    """
    size, stream = 0, aiter(request.stream())
    while True:
        try:
            part = await asyncio.wait_for(anext(stream), STALLED_S)
        except StopAsyncIteration:
            break
        except TimeoutError as error:  # its place is for others
            raise RequestRefused(408, "The file stopped coming; send it again.") from error
        size += len(part)
        if size <= MOST_BYTES:
            yield part
        elif size > MOST_DROPPED:
            break
    if size > MOST_BYTES:
        raise RequestRefused(413, _TOO_LARGE)


async def _body(request: Request) -> bytes:
    """The body, in memory."""
    body = b"".join([part async for part in _parts(request)])
    if not body:
        raise RequestRefused(422, "The file is empty; choose a DICOM, PNG or JPEG file.")
    return body


_TOO_LARGE = f"The file is larger than {MOST_BYTES // 2**20} MB, and no radiograph is."


async def _files(request: Request) -> list[bytes]:
    """The files of a form, in memory."""
    parser = MultiPartParser(request.headers, _parts(request), max_files=MOST_FILES)
    parser.spool_max_size = MOST_BYTES  # beyond it a file would go to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        raise RequestRefused(
            422, f"The form cannot be read; send up to {MOST_FILES} files as multipart/form-data."
        ) from error
    files = [await value.read() for _, value in form.multi_items() if not isinstance(value, str)]
    if not files:
        raise RequestRefused(422, "The form holds no file.")
    return files


def _said(
    done: Analysis, service: InferenceService, picture: bool = False, heat: bool = False
) -> dict:
    height, width = done.radiograph.pixels.shape
    said = {
        "notice": NOTICE,
        "width": width,
        "height": height,
        "rejected": done.rejected,
        "overridden": bool(done.overridden),
        "reasons": [reason._asdict() for reason in done.reasons],
    }
    if done.prediction is not None:
        said |= as_record(done.prediction)
        if heat:
            said["heat"] = _png(_levels(service.pipeline.heat(done.outputs)))
    if picture:
        said["picture"] = _png(done.radiograph.pixels)
    return said


def _levels(heat: np.ndarray) -> np.ndarray:
    """A heat map as 8-bit grey, its hottest place white."""
    return (255 * heat / max(heat.max(), 1e-12)).round().astype(np.uint8)


def _png(picture: np.ndarray) -> str:
    return base64.b64encode(cv2.imencode(".png", picture)[1].tobytes()).decode()


def _report(form: str, done: Analysis, about: dict) -> Response:
    if form == "json":
        record = as_record(done.prediction) | {
            "notice": NOTICE,
            "overridden": list(done.overridden),
        }
        return _attached(json.dumps(record, indent=1).encode(), "application/json", "report.json")
    if form == "html":
        page = html_page(done.radiograph.pixels, done.prediction, about, done.overridden)
        return _attached(page.encode(), "text/html; charset=utf-8", "report.html")
    header = done.radiograph.header
    if header is None:
        raise RequestRefused(
            422, "A DICOM report refers to a DICOM image; take the page or JSON for this file."
        )
    from dernet_utils.serving.dicom_report import encode, secondary_capture, structured_report

    if form == "sr":
        made = structured_report(header, done.prediction, about["made_by"][:64], done.overridden)
    else:
        made = secondary_capture(header, done.radiograph.pixels, done.prediction, done.overridden)
    return _attached(encode(made), "application/dicom", f"{form}.dcm")


def _attached(content: bytes, media_type: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="dernet-{name}"'}
    return Response(content, media_type=media_type, headers=headers)

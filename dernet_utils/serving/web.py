"""The web interface: a page, and an API under ``/api/v1`` with the same functions.

No uploaded file is written to disk or to a log: it stays in memory until its response is sent. One
file is analysed at a time; a few requests may wait, and further ones get status 503.
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

STATIC = Path(__file__).with_name("static")
MAX_BYTES = 100 * 2**20  # of a request; a large radiograph takes 20 MB
MAX_FILES = 64  # of a batch
MAX_WAITING = 8  # requests that may wait for the one being processed
MAX_BYTES_HELD = 2 * MAX_BYTES  # of all admitted requests together
MAX_BYTES_DRAINED = 10 * MAX_BYTES  # read from a refused request, whose client then reads why
RETRY_S = 2
UPLOAD_TIMEOUT_S = 30  # longest wait for the next part of an upload
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
    """A refused request: HTTP status, message for the client, response headers."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.status, self.headers = status, headers


class RequestQueue:
    """Analyses one file at a time, and limits the number and size of waiting requests."""

    def __init__(self) -> None:
        self._requests, self._held, self._turn = 0, 0, asyncio.Lock()

    async def admit(self, request: Request) -> None:
        """Return if there is room for a request.

        Raises:
            RequestRefused: It is too large, or too many requests or bytes are waiting.
        """
        length = _length(request)
        room = self._requests <= MAX_WAITING and self._held + length <= MAX_BYTES_HELD
        if room and length <= MAX_BYTES:
            return
        async for _ in _parts(request):
            pass  # dropped
        raise RequestRefused(
            503, "Busy: too many radiographs are waiting. Try again in a moment.",
            **{"Retry-After": str(RETRY_S)},
        )  # fmt: skip

    @asynccontextmanager
    async def place(self, request: Request) -> AsyncIterator[None]:
        """Count a request, and its bytes, as admitted while the context lasts."""
        length = _length(request)
        self._requests, self._held = self._requests + 1, self._held + length
        try:
            yield
        finally:
            self._requests, self._held = self._requests - 1, self._held - length

    async def run(self, work: Callable, *given: object) -> object:
        """Run a function in a thread when its turn comes, and return its result."""
        async with self._turn:
            return await run_in_threadpool(work, *given)


def open_app(
    workspace: Workspace, engine: str, token: str = "", host: str = "127.0.0.1"
) -> FastAPI:
    """Return the web application with a run's networks.

    Args:
        workspace: The run; its networks have been exported.
        engine: As `onnx_backend.open_pipeline` takes it.
        token: As `make_app` takes it.
        host: Address at which the server listens. It is added to the allowed host names; an
            address for all interfaces allows any name.

    Raises:
        DernetError: As `onnx_backend.open_pipeline` raises.
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
        service: Analyses the files.
        about: The manifest of its networks, as `onnx_backend.read_export` returns it.
        token: Required for every request to the API; if empty, no token is.
        hosts: Host names under which the server may be addressed; an asterisk allows any.
        samples: A folder of sample radiographs.
    """
    app = FastAPI(
        title="DERNet", version=__version__, description=NOTICE, docs_url=None, redoc_url=None,
        openapi_url="/api/v1/openapi.json",
    )  # fmt: skip
    waiting = RequestQueue()
    sample_paths = {path.name: path for path in sorted(samples.iterdir())} if samples else {}

    @app.middleware("http")
    async def check_host_and_token(request: Request, call_next: Callable) -> Response:
        if not {"*", _host_name(request)} & {host.lower() for host in hosts}:
            # Against DNS rebinding: a foreign page, whose name resolves to here, could read files.
            response = JSONResponse({"error": "This host name is not allowed."}, 400)
        elif token and request.url.path.startswith("/api/") and not _has_token(request, token):
            refusal = {"error": "The token is missing or wrong."}
            response = JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})
        else:
            try:
                response = await call_next(request)
            except Exception as error:  # caught here: the server would log its message
                response = JSONResponse({"error": _log_fault(error)}, 500)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(RequestRefused)
    async def refused(request: Request, error: RequestRefused) -> Response:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.exception_handler(DernetError)
    async def unreadable(request: Request, error: DernetError) -> Response:
        return JSONResponse({"error": _sentence(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        details = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
        return JSONResponse({"error": f"The request is malformed ({details})."}, 422)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # no client is left to read it

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": f"{error.detail}."}, error.status_code, error.headers)

    def analysed(data: bytes, override: bool, picture: bool = False, heat: bool = False) -> dict:
        return _as_json(service.analyse(data, override), service, picture, heat)

    @app.post("/api/v1/analyse", openapi_extra=_FILE_BODY)
    async def analyse(
        request: Request,
        override: Override = False,
        picture: Annotated[bool, Query(description="Also return the image as PNG.")] = False,
        heat: Annotated[bool, Query(description="Also return DERNet's heat map as PNG.")] = False,
    ) -> JSONResponse:
        """Run inference on one DICOM, PNG or JPEG file, sent as the body or as a form."""
        await waiting.admit(request)
        async with waiting.place(request):
            data = await _body(request)
            return JSONResponse(await waiting.run(analysed, data, override, picture, heat))

    @app.post("/api/v1/analyse-batch", openapi_extra=_FORM_BODY)
    async def analyse_batch(request: Request, override: Override = False) -> StreamingResponse:
        """Run inference on the files of a form; the response holds one line of JSON per file."""
        await waiting.admit(request)  # once: a batch that has begun is completed
        async with waiting.place(request):
            files = await _files(request)

        async def lines() -> AsyncIterator[str]:
            async with waiting.place(request):
                for number, data in enumerate(files):
                    try:
                        result = await waiting.run(analysed, data, override)
                    except DernetError as error:
                        result = {"error": _sentence(error)}
                    except Exception as error:  # the remaining files are still analysed
                        result = {"error": _log_fault(error)}
                    yield json.dumps({"number": number} | result) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @app.post("/api/v1/report/{form}", openapi_extra=_FILE_BODY)
    async def report(
        form: Literal["html", "json", "sr", "sc"], request: Request, override: Override = False
    ) -> Response:
        """Return a report on one file: HTML, JSON or, for a DICOM image, DICOM SR or SC."""

        def reported(data: bytes) -> Response:
            analysis = service.analyse(data, override)
            if analysis.rejected:
                reasons = " ".join(reason.text for reason in analysis.reasons)
                raise RequestRefused(409, f"The file was rejected, so it has no report: {reasons}")
            return _report(form, analysis, about)

        await waiting.admit(request)
        async with waiting.place(request):
            return await waiting.run(reported, await _body(request))

    @app.get("/api/v1/health")
    async def health() -> dict:
        """Report that the server runs."""
        return {"status": "ok"}

    @app.get("/api/v1/model")
    async def model() -> dict:
        """Describe the networks: origin, thresholds, lesion types with their colours."""
        shown = ("notice", "made_by", "profile", "virtual", "decision", "score_threshold")
        styles = {name: {"colour": c, "dash": d} for name, (c, d) in LESION_STYLE.items()}
        facts = {name: about.get(name) for name in shown}
        return facts | {"lesion_types": styles, "networks": NETWORK_NAMES}

    @app.get("/api/v1/samples")
    async def list_samples() -> list[str]:
        """List the sample radiographs."""
        return list(sample_paths)

    @app.get("/api/v1/samples/{name}")
    async def sample(name: str) -> FileResponse:
        """Download a sample radiograph."""
        if name not in sample_paths:
            raise RequestRefused(404, "There is no sample of that name.")
        return FileResponse(sample_paths[name], media_type="application/octet-stream")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


# --- The API's descriptions -------------------------------------------------------------------

Override = Annotated[bool, Query(description="Run inference even if the file is rejected.")]
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {"files": {"type": "array", "items": _BINARY["schema"]}},
    }
}
_FILE = {"application/octet-stream": _BINARY, "multipart/form-data": _FORM}
_FILE_BODY = {"requestBody": {"required": True, "content": _FILE}}
_FORM_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": _FORM}}}

# --- Requests ---------------------------------------------------------------------------------


def _host_name(request: Request) -> str:
    """Return the host name that a request addresses, without its port."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _has_token(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _length(request: Request) -> int:
    """Return the number of bytes a request announces, or the most it may have."""
    return int(request.headers.get("content-length", MAX_BYTES))


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """Yield the parts of a body; refuse a body that is too large.

    Most of such a body is read before it is refused: many clients read no response while they send.
    """
    size, stream = 0, aiter(request.stream())
    while True:
        try:
            part = await asyncio.wait_for(anext(stream), UPLOAD_TIMEOUT_S)
        except StopAsyncIteration:
            break
        except TimeoutError as error:  # other requests wait for its place
            raise RequestRefused(408, "The upload stalled; send the file again.") from error
        size += len(part)
        if size <= MAX_BYTES:
            yield part
        elif size > MAX_BYTES_DRAINED:
            break
    if size > MAX_BYTES:
        limit = MAX_BYTES // 2**20
        raise RequestRefused(413, f"The upload is larger than the limit of {limit} MB.")


async def _body(request: Request) -> bytes:
    """Return the body, or the file of a body that is a form of one file, read into memory."""
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        files = await _files(request)
        if len(files) > 1:
            raise RequestRefused(
                422, f"The form holds {len(files)} files; send one, or use analyse-batch."
            )
        body = files[0]
    else:
        body = b"".join([part async for part in _parts(request)])
    if not body:
        raise RequestRefused(422, "The file is empty; choose a DICOM, PNG or JPEG file.")
    return body


async def _files(request: Request) -> list[bytes]:
    """Return the files of a form, read into memory."""
    parser = MultiPartParser(request.headers, _parts(request), max_files=MAX_FILES)
    parser.spool_max_size = MAX_BYTES  # the parser writes larger files to disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        raise RequestRefused(
            422, f"The form cannot be read; send up to {MAX_FILES} files as multipart/form-data."
        ) from error
    files = [await value.read() for _, value in form.multi_items() if not isinstance(value, str)]
    if not files:
        raise RequestRefused(422, "The form holds no file.")
    return files


# --- Responses --------------------------------------------------------------------------------


def _sentence(error: DernetError) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


def _log_fault(error: Exception) -> str:
    """Log where an unexpected error was raised, and return the message for the client."""
    log.error("A request failed (%s).", where_raised(error))
    return "The server could not process this file because of an internal error."


def _as_json(
    analysis: Analysis, service: InferenceService, picture: bool = False, heat: bool = False
) -> dict:
    radiograph = analysis.radiograph
    height, width = radiograph.pixels.shape
    result = {
        "notice": NOTICE,
        "form": radiograph.form,
        "width": width,
        "height": height,
        "rejected": analysis.rejected,
        "overridden": bool(analysis.overridden),
        "reasons": [reason._asdict() for reason in analysis.reasons],
    }
    if analysis.prediction is not None:
        result |= as_record(analysis.prediction)
        if heat:
            result["heat"] = _png(_grey_levels(service.pipeline.heat(analysis.outputs)))
    if picture:
        result["picture"] = _png(radiograph.pixels)
    return result


def _grey_levels(heat: np.ndarray) -> np.ndarray:
    """Return a heat map as 8-bit grey levels, its maximum white."""
    return (255 * heat / max(heat.max(), 1e-12)).round().astype(np.uint8)


def _png(grey: np.ndarray) -> str:
    return base64.b64encode(cv2.imencode(".png", grey)[1].tobytes()).decode()


def _report(form: str, analysis: Analysis, about: dict) -> Response:
    radiograph, prediction = analysis.radiograph, analysis.prediction
    if form == "json":
        record = as_record(prediction) | {
            "notice": NOTICE,
            "overridden": list(analysis.overridden),
        }
        return _attachment(json.dumps(record, indent=1).encode(), "application/json", "report.json")
    if form == "html":
        page = html_page(radiograph.pixels, prediction, about, analysis.overridden)
        return _attachment(page.encode(), "text/html; charset=utf-8", "report.html")
    if radiograph.header is None:
        raise RequestRefused(
            422, "A DICOM report needs a DICOM image; choose HTML or JSON for this file."
        )
    # Here: highdicom takes a second to import, and many servers never write a DICOM report.
    from dernet_utils.serving.dicom_report import encode, secondary_capture, structured_report

    if form == "sr":
        made_by = about["made_by"][:64]
        dataset = structured_report(radiograph.header, prediction, made_by, analysis.overridden)
    else:
        dataset = secondary_capture(
            radiograph.header, radiograph.pixels, prediction, analysis.overridden
        )
    return _attachment(encode(dataset), "application/dicom", f"{form}.dcm")


def _attachment(content: bytes, media_type: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="dernet-{name}"'}
    return Response(content, media_type=media_type, headers=headers)

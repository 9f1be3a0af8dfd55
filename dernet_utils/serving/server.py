"""Runs the web application as a server, at an address of this machine."""

import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from dernet_utils.core.errors import DernetError


def run_server(app: FastAPI, host: str, port: int, report: Callable[[str], None]) -> None:
    """Serve an application until it is stopped with Ctrl-C.

    Args:
        app: As `web.open_app` returns it.
        host: The address at which the server listens, IPv4 or IPv6.
        port: The port; 0 for any free one.
        report: Called with one line, which holds the server's URL.

    Raises:
        DernetError: The server cannot listen there.
    """
    shown = f"[{host}]" if ":" in host else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise DernetError(
            f"The server cannot listen on {shown}:{port}: {error.strerror}. Try another --port."
        ) from error
    report(f"Serving on http://{shown}:{listening.getsockname()[1]}. Press Ctrl-C to stop.")
    settings = uvicorn.Config(app, access_log=False, log_level="warning", server_header=False)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run([listening])

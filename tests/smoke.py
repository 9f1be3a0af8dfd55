"""The book at profile `smoke`, executed and built once for all tests that look at it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dernet_utils.workspace import PROJECT

# Nothing answers there: whatever asks for the network fails, and with it the run.
NOWHERE = "http://127.0.0.1:9"


def run_dernet(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Call the command line as a user does, without a network."""
    offline = {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "PIP_NO_INDEX": "1"}
    return subprocess.run(
        [sys.executable, "-m", "dernet_utils.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=os.environ | offline | environment,
        timeout=1700,
    )


@pytest.fixture(scope="session")
def smoke_book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run: ``runs/smoke`` and ``html``."""
    folder = tmp_path_factory.mktemp("book")
    done = run_dernet(
        *("run", "--profile", "smoke", "--html", str(folder / "html")),
        DERNET_RUNS=str(folder / "runs"),
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return folder

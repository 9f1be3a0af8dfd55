"""The book at profile `smoke`, executed and built once for all tests of it."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dernet_utils.core.files import PROJECT

# No server listens there: any access to the network fails, and with it the run.
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
        timeout=3600,
    )


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of pytest's processes makes and all of them read."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, made = base / name, base / f"{name}.made"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def smoke_book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run: ``runs/smoke`` and ``html``."""

    def make(folder: Path) -> None:
        done = run_dernet(
            *("run", "--profile", "smoke", "--html", str(folder / "html")),
            DERNET_RUNS=str(folder / "runs"),
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    return shared(tmp_path_factory, "book", make)

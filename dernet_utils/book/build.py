"""The book's pages, staged, built and published; and whole runs, as Snakemake carries them out."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dernet_utils.book.graph import book_digest, chapter_names
from dernet_utils.book.prepare import is_prepared
from dernet_utils.book.progress import (
    Say,
    clock,
    cores,
    heartbeat,
    is_disk_full,
    shown_path,
    without_colours,
)
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.workspace import Workspace, commit

# Signals that end a process, in this order, and the time that each may take, s.
ENDINGS = ((signal.SIGINT, 15), (signal.SIGTERM, 5), (signal.SIGKILL, 5))

# Whole first runs on two cores of an Intel Xeon with AVX-512 BF16, minutes.
USUAL_MINUTES = {"laptop": 40, "night": 90}
LINES_SHOWN = 8  # at the end of a failed step's output
# Errors of file systems without locks, such as some network drives.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


# Pages ------------------------------------------------------------------------------------------


def stage_book(workspace: Workspace) -> Path:
    """Copy pages and executed chapters to ``runs/<profile>/book``, and return this folder.

    Raises:
        DernetError: A chapter has not been executed.
    """
    import yaml

    stage = workspace.folder / "book"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(PROJECT / "book", stage / "book")
    shutil.copy(PROJECT / "_toc.yml", stage)
    (stage / "notebooks").mkdir()
    for name in chapter_names():
        executed = workspace.chapters / f"{name}.ipynb"
        if not executed.is_file():
            raise DernetError(f"Chapter {name} has not been executed: run `dernet run` first.")
        shutil.copy(executed, stage / "notebooks")
    config = yaml.safe_load((PROJECT / "_config.yml").read_text(encoding="utf-8"))
    config["sphinx"]["config"]["myst_substitutions"] = {
        "profile": workspace.profile.name,
        "commit": commit(),
    }
    (stage / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return stage


def build_book(workspace: Workspace, report: Say) -> Path:
    """Stage and build the book; return the folder of its HTML pages.

    Raises:
        DernetError: Sphinx warned or failed; the message quotes its warnings and errors.
    """
    started = time.monotonic()
    report("book: started")
    stage = stage_book(workspace)
    program = str(Path(sys.executable).with_name("jupyter-book"))
    command = [program, "build", str(stage), "-n", "-W", "--keep-going"]
    environment = os.environ | {"NO_COLOR": "1", "PYTHONWARNINGS": "ignore"}
    with heartbeat("book", started, report):
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", env=environment
        )
    log = without_colours(done.stdout + done.stderr).replace(f"{stage}/", "")
    (workspace.folder / "book.log").write_text(log, encoding="utf-8")
    if done.returncode != 0:
        faults = [line for line in log.splitlines() if re.search(r"WARNING|ERROR|rror:", line)]
        raise DernetError(
            "The book was not built. Sphinx's messages are below, its whole log is "
            f"{shown_path(workspace.folder / 'book.log')}.\n\n" + "\n".join(faults[:20])
        )
    html = stage / "_build" / "html"
    (html / "digest.json").write_text(
        json.dumps({"profile": workspace.profile.name, "digest": book_digest(workspace)}),
        encoding="utf-8",
    )
    report(f"book: done in {clock(started)}")
    return html


def publish(workspace: Workspace, html: Path) -> None:
    """Copy the built pages to `html`, unless it holds them already.

    Raises:
        DernetError: The folder holds files that are not an earlier book.
    """
    built = workspace.folder / "book" / "_build" / "html"
    mark = html / "digest.json"
    if mark.is_file() and mark.read_bytes() == (built / "digest.json").read_bytes():
        return
    if html.exists() and not mark.is_file() and any(html.iterdir()):
        raise DernetError(
            f"{html} holds files that are not an earlier book; name another folder or empty it."
        )
    fresh = html.with_name(html.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(built, fresh)
    shutil.rmtree(html, ignore_errors=True)
    fresh.rename(html)


# Runs -------------------------------------------------------------------------------------------


def run(workspace: Workspace, html: Path, report: Say) -> None:
    """Bring data, chapters and pages up to date; what has not changed is left alone.

    Args:
        workspace: The run.
        html: Folder for the pages.
        report: Called with one line of progress at a time.

    Raises:
        DernetError: A step failed, or another run of this profile is in progress.
        KeyboardInterrupt: The run was interrupted; every process it started has ended.
    """
    started = time.monotonic()
    prepared = is_prepared(workspace)  # first: it reports a data folder that cannot be read
    with _only_run(workspace, report) as lock:
        if not prepared:
            if usual := USUAL_MINUTES.get(workspace.profile.name):
                from dernet_utils.book.duration import expected_duration  # here: it imports torch

                report(expected_duration(workspace.profile, usual))
            (workspace.folder / "prepared").unlink(missing_ok=True)  # tables may be missing
            _snakemake("prepare", workspace, lock)
        _snakemake("book", workspace, lock)
        publish(workspace, html)
    report(f"The book ({workspace.profile.name}) is {html / 'index.html'}, {clock(started)}.")


def train_all(workspace: Workspace, report: Say) -> None:
    """Prepare a run's data and train all its networks; what has been trained is left alone.

    A killed call continues, after the last finished epoch, when it is called again.

    Args:
        workspace: The run.
        report: Called with one line of progress at a time.

    Raises:
        DernetError, KeyboardInterrupt: As `run` raises.
    """
    started = time.monotonic()
    with _only_run(workspace, report) as lock:
        if not is_prepared(workspace):
            (workspace.folder / "prepared").unlink(missing_ok=True)
            _snakemake("prepare", workspace, lock)
        _snakemake("trainings", workspace, lock)
    report(f"All networks of {workspace.profile.name} are trained, {clock(started)}.")


def _snakemake(target: str, workspace: Workspace, lock: IO) -> None:
    log = workspace.folder / f"snakemake-{target}.log"
    command = [
        *(sys.executable, "-m", "snakemake", target, "--snakefile", str(PROJECT / "Snakefile")),
        *("--config", f"profile={workspace.profile.name}", "--cores", str(cores())),
        # Digests are parameters of the rules, so they alone decide what runs again.
        *("--rerun-triggers", "params", "--rerun-incomplete"),
        # We have a lock of our own, which a killed run cannot leave behind.
        *("--nolock", "--nocolor", "--quiet", "host", "progress", "reason", "rules"),
    ]
    environment = os.environ | {"DERNET_RUNS": str(workspace.folder.parent), "DERNET_STEP": "1"}
    # A step reports on standard output; Snakemake's own messages go to its log.
    with log.open("w", encoding="utf-8") as messages:
        process = subprocess.Popen(
            command,
            stderr=messages,
            env=environment,
            cwd=workspace.folder,
            start_new_session=True,
            pass_fds=[lock.fileno()],  # if this process is killed, Snakemake keeps the lock
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _end_group(process)
            raise
    if code != 0:
        if is_disk_full(None, workspace.folder):
            raise DernetError("The disk is full: make room and run again; the run will continue.")
        raise _stopped(workspace, log)


def _stopped(workspace: Workspace, log: Path) -> DernetError:
    """Return the error of a run that stopped: each failed step with the end of its output."""
    said = log.read_text(encoding="utf-8", errors="replace")
    # Snakemake quotes the failed job's command, which ends in the name of its log.
    failed = [workspace.folder / own for own in re.findall(r"\| tee -i (\S+?)'", said)]
    if not failed:
        return DernetError(f"Snakemake could not start the run:\n\n{_end_of(log)}")
    ends = []
    for output in dict.fromkeys(failed):
        end = _end_of(output) if output.is_file() else ""
        end = end or "It printed nothing; it may have been killed for lack of memory."
        ends.append(f"{output.stem} failed; its output is in {shown_path(output)} and ends:\n{end}")
    return DernetError("\n\n".join(["The run stopped.", *ends]))


def _end_of(log: Path) -> str:
    text = without_colours(log.read_text(encoding="utf-8", errors="replace"))
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-LINES_SHOWN:])


@contextmanager
def _only_run(workspace: Workspace, report: Say) -> Iterator[IO]:
    workspace.folder.mkdir(parents=True, exist_ok=True)
    with (workspace.folder / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DernetError(
                f"Another run of the profile {workspace.profile.name!r} is in progress in "
                f"{shown_path(workspace.folder)}; wait until it ends."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            report(
                f"{shown_path(workspace.folder)} is on a file system that cannot lock files: start "
                f"no second run of the profile {workspace.profile.name!r} before this one ends."
            )
        yield lock


def _end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started, at first by request, then by force."""
    for number, patience_s in ENDINGS:
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return

"""Chapters executed, the book staged and built.

The Snakefile is a thin list of rules; what the rules do is here. A rule runs again when the digest
of what it depends on differs from the one it ran with, so only contents count, never file times.
"""

import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from dernet_utils.errors import DernetError
from dernet_utils.profiles import NETWORKS
from dernet_utils.workspace import PROJECT, Workspace, commit

Report = Callable[[str], None]

HEARTBEAT_S = 30  # ours: often enough to see that a training lives
# What one chapter writes and another reads: who reads it, and who writes it.
HANDED_ON = {
    "read_decision": "write_decision",
    "open_test_labels": "write_decision",
    "run_pipeline": "write_models",
    "export_run": "write_models",
}
TRAINING = frozenset({"triage", "detect"})  # a chapter that imports one of these wants cores
# One that reads this number measures times: the machine is its own, libraries as they come.
TIMED = "timings"
MAX_THREADS = 8  # more help none of our networks
QUICKEST_FIRST = ("densenet121", "resnet50", "tf_efficientnetv2_s")  # by a training's time
# Read by glibc, torch and OpenMP when a process starts; numbers do not depend on them. A step of
# training asks for the same large blocks again and again: they are kept, in huge pages, and not
# fetched anew from the system each time. A thread that waits sleeps: where trainings run abreast,
# spinning ones stall one another.
COMPUTE = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "THP_MEM_ALLOC_ENABLE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


# What depends on what ---------------------------------------------------------------------------


def chapter_names(project: Path = PROJECT) -> list[str]:
    """Return the names of the chapters in reading order, such as ``02_imaging``."""
    return sorted(path.stem for path in (project / "notebooks").glob("[0-9A][0-9]_*.py"))


def modules_of(path: Path, package: Path = PROJECT / "dernet_utils") -> frozenset[str]:
    """Return the modules of `package` that a Python file imports, directly or through others.

    Args:
        path: A module or a chapter in py:percent form.
        package: The folder of the package.

    Raises:
        DernetError: A file is not valid Python.
    """
    found: set[str] = set()
    waiting = [path]
    while waiting:
        new = _imports_of(waiting.pop(), package) - found
        found |= new
        waiting += [package / f"{name}.py" for name in new]
    return frozenset(found)


def _imports_of(path: Path, package: Path) -> set[str]:
    try:
        names = _names_imported(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise DernetError(
            f"{path.name} is not valid Python: {error.msg} in line {error.lineno}; correct it."
        ) from error
    ours = {name.split(".")[1] for name in names if name.startswith(f"{package.name}.")}
    return {name for name in ours if (package / f"{name}.py").is_file()}


@cache
def _names_imported(source: str) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


@cache
def _nodes(source: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(source)))


def _nodes_of(name: str, project: Path) -> tuple[ast.AST, ...]:
    """All nodes of a chapter's syntax tree; a chapter is parsed once, whoever asks."""
    return _nodes((project / "notebooks" / f"{name}.py").read_text(encoding="utf-8"))


def cores_for(name: str, every: int, project: Path = PROJECT) -> int:
    """Return how many of all cores a chapter gets: half for a training, all for one that times."""
    path = project / "notebooks" / f"{name}.py"
    if times(name, project):
        return every
    return max(1, every // 2) if modules_of(path, project / "dernet_utils") & TRAINING else 1


def times(name: str, project: Path = PROJECT) -> bool:
    """Return whether a chapter measures times."""
    nodes = _nodes_of(name, project)
    return any(isinstance(node, ast.Attribute) and node.attr == TIMED for node in nodes)


def trains(name: str, project: Path = PROJECT) -> bool:
    """Return whether a chapter asks for a training that is no job of its own: it may take long."""
    calls = (node.func for node in _nodes_of(name, project) if isinstance(node, ast.Call))
    return any(
        getattr(call, "attr", getattr(call, "id", "")).startswith("train_") for call in calls
    )


def trainings_of(name: str, folds: int, project: Path = PROJECT) -> list[tuple[str, int]]:
    """Return the trainings that a chapter reads: a network and a fold each.

    They are those whose name stands as second argument of a call of `cross_validate`; a call with
    anything else there reads all networks.
    """
    named: set[str] = set()
    for call in _nodes_of(name, project):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "cross_validate":
            network = getattr(call.args[1], "value", None)
            named |= {network} if network in NETWORKS else set(NETWORKS)
    return [(network, fold) for network in sorted(named) for fold in range(folds)]


def chapters_before(name: str, project: Path = PROJECT) -> list[str]:
    """Return the chapters whose results a chapter reads, so that they are executed before it.

    A table is read by `read_parquet` and written by `to_parquet`, its name given in the call; what
    else is handed on has a function to read it and one to write it (`HANDED_ON`).
    """
    read = _results(name, {"read_parquet": ""} | HANDED_ON, project)
    written = {"to_parquet": ""} | {writer: writer for writer in HANDED_ON.values()}
    others = (other for other in chapter_names(project) if other != name)
    return [other for other in others if _results(other, written, project) & read]


def urgencies(project: Path = PROJECT) -> dict[str, int]:
    """Return each chapter's priority among all jobs; trainings' begin at the chapters' number.

    A chapter that waits for no job is above the trainings, any other one below them. Among them
    one goes first that many chapters wait for, or that trains, which takes long.
    """
    before = {name: chapters_before(name, project) for name in chapter_names(project)}
    urgent = {}
    for name, own in before.items():
        behind = sum(name in others for others in before.values())
        waits = own or trainings_of(name, 1, project)
        above = 0 if waits else len(before) + len(QUICKEST_FIRST)
        urgent[name] = above + behind + trains(name, project)
    return urgent


def _results(name: str, by: dict[str, str], project: Path) -> set[str]:
    """What a chapter calls these functions for: tables by name, other things by who writes them."""
    found: set[str] = set()
    for call in (node for node in _nodes_of(name, project) if isinstance(node, ast.Call)):
        called = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if by.get(called):
            found.add(by[called])
        elif called in by:
            values = (n.value for n in ast.walk(call) if isinstance(n, ast.Constant))
            found |= {value for value in values if str(value).endswith(".parquet")}
    return found


def data_digest(workspace: Workspace) -> str:
    """Return a digest of what the run's data are made from.

    For the virtual cohort these are its code, its numbers and the locked libraries; for a
    VinDr-SpineXR folder they are its two tables.

    Raises:
        DernetError: The folder that ``DERNET_DATA`` names has no tables.
    """
    profile = workspace.profile
    if profile.virtual:
        package = PROJECT / "dernet_utils"
        modules = modules_of(package / "cohort.py", package) | {"cohort"}
        return _digest(f"{profile.patients} {profile.seed}", *_sources(modules), _lock())
    tables = [workspace.data_root / "annotations" / f"{split}.csv" for split in ("train", "test")]
    for table in tables:
        if not table.is_file():
            raise DernetError(
                f"{workspace.data_root} is not a VinDr-SpineXR folder: {table.name} was expected "
                "in its folder annotations; correct DERNET_DATA."
            )
    return _digest(str(workspace.data_root), *(table.read_bytes() for table in tables))


def prepare_digest(workspace: Workspace) -> str:
    """Return a digest of all that `prepare` depends on."""
    package = PROJECT / "dernet_utils"
    modules = {"data", "imaging"}.union(
        modules_of(package / "data.py"), modules_of(package / "imaging.py")
    )
    return _digest(_numbers(workspace), *_sources(modules), data_digest(workspace))


def chapter_digest(name: str, workspace: Workspace) -> str:
    """Return a digest of all that a chapter's results depend on."""
    path = PROJECT / "notebooks" / f"{name}.py"
    return _digest(
        path.read_bytes(),
        *_sources(modules_of(path)),
        _numbers(workspace),
        data_digest(workspace),
        _lock(),
        *(chapter_digest(other, workspace) for other in chapters_before(name)),
    )


def train_digest(workspace: Workspace) -> str:
    """Return a digest of all that a training of triage depends on."""
    package = PROJECT / "dernet_utils"
    modules = modules_of(package / "crossvalidation.py", package) | {"crossvalidation"}
    return _digest(_numbers(workspace), *_sources(modules), data_digest(workspace), _lock())


def book_digest(workspace: Workspace) -> str:
    """Return a digest of all that the book's pages depend on."""
    pages = [PROJECT / "_config.yml", PROJECT / "_toc.yml"]
    pages += sorted(path for path in (PROJECT / "book").rglob("*") if path.is_file())
    parts: list[str | bytes] = []
    for path in pages:
        parts += [path.relative_to(PROJECT).as_posix(), path.read_bytes()]
    return _digest(*parts, *(chapter_digest(name, workspace) for name in chapter_names()))


def _digest(*parts: str | bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        whole.update(f"{len(content)}:".encode() + content)
    return whole.hexdigest()


def _sources(modules: set[str] | frozenset[str]) -> list[str | bytes]:
    # Of profiles.py only the run's numbers count, and they are in the digest already: another
    # profile's number is no reason to run a chapter again.
    parts: list[str | bytes] = []
    for name in sorted(modules - {"profiles"}):
        parts += [name, (PROJECT / "dernet_utils" / f"{name}.py").read_bytes()]
    return parts


def _numbers(workspace: Workspace) -> str:
    return workspace.profile.model_dump_json()


def _lock() -> bytes:
    return (PROJECT / "requirements.lock").read_bytes()


# Data, before any chapter -----------------------------------------------------------------------


def prepare(workspace: Workspace, workers: int, report: Report) -> None:
    """Make everything that chapters share: the virtual cohort, the folds, the cached images.

    Args:
        workspace: The run.
        workers: How many processes work at once.
        report: Is given a line of progress at a time.

    Raises:
        DernetError: The data are not what they should be.
    """
    from dernet_utils.cohort import ensure_cohort
    from dernet_utils.data import load_folds, read_dataset
    from dernet_utils.imaging import cache_images

    started = time.monotonic()
    _forget_other_data(workspace)
    with _heartbeat("virtual patients", started, report) as progress:
        ensure_cohort(workspace, progress)
    dataset = read_dataset(workspace.data_root)
    load_folds(workspace, dataset.images)
    with _heartbeat("cached images", started, report) as progress:
        cache_images(dataset.images, workspace.cache, workspace.profile, workers, progress)
    report(f"data: {len(dataset.images)} images ready after {_clock(started)}")


def _forget_other_data(workspace: Workspace) -> None:
    """Delete what was made from other data, within the run's own folder."""
    stamp, digest = workspace.folder / "data.digest", data_digest(workspace)
    if stamp.is_file() and stamp.read_text() == digest:
        return
    if workspace.profile.virtual:
        for name in ("cohort", "cohort.partial"):
            shutil.rmtree(workspace.folder / name, ignore_errors=True)
    shutil.rmtree(workspace.folder / "tables", ignore_errors=True)
    workspace.folder.mkdir(parents=True, exist_ok=True)
    # Written first: a killed run leaves a part of these data, and the next goes on with it.
    stamp.write_text(digest)


# One chapter ------------------------------------------------------------------------------------


def execute_chapter(
    name: str,
    workspace: Workspace,
    threads: int,
    report: Report,
    parameters: dict[str, object] | None = None,
    project: Path = PROJECT,
) -> Path:
    """Execute a chapter in a kernel of its own and return the executed notebook's path.

    The notebook appears under its name only when every cell has run; until then, and after a
    failure, it is ``NAME.partial.ipynb``. With `parameters` it is a trial, ``NAME.trial.ipynb``.

    Args:
        name: Chapter, such as ``02_imaging``.
        workspace: The run; its profile is passed as the parameter `profile`.
        threads: How many threads numerical libraries may use.
        report: Is given a line of progress at a time.
        parameters: Further values for the chapter's `parameters` cell.
        project: The folder that holds `notebooks`.

    Raises:
        DernetError: There is no such chapter, a parameter is unknown, or a cell failed.
    """
    source = project / "notebooks" / f"{name}.py"
    if not source.is_file():
        raise DernetError(
            f"There is no chapter {name!r}; there are {', '.join(chapter_names(project))}."
        )
    import jupytext

    notebook = jupytext.read(source)
    values = {"profile": workspace.profile.name} | (parameters or {})
    _check_parameters(name, notebook, values)
    # A trial with values of one's own does not replace the book's copy.
    executed = workspace.chapters / f"{name}{'.trial' if parameters else ''}.ipynb"
    partial = executed.with_suffix(".partial.ipynb")
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    report(f"{name}: started, {cells} code cells")
    started = time.monotonic()
    environment = _kernel_environment(workspace, threads)
    if not times(name, project):  # what is timed runs as it comes
        environment |= COMPUTE
    job = _ChapterJob(notebook, partial, values, environment, source)
    try:
        job.start()
        while not job.finished.wait(HEARTBEAT_S):
            report(f"{name}: cell {job.cell()} of {cells}, {_clock(started)}")
    finally:
        job.stop()
    if job.error is not None:
        raise _failure(name, job, partial, cells) from job.error
    _tidy(partial)
    partial.replace(executed)
    report(f"{name}: done in {_clock(started)}")
    return executed


def _check_parameters(name: str, notebook, values: dict[str, object]) -> None:
    from papermill.inspection import inspect_notebook

    known = inspect_notebook(notebook)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise DernetError(
            f"Chapter {name} has no parameter {', '.join(unknown)}; its cell tagged `parameters` "
            f"has {', '.join(known) or 'none'}."
        )


def _kernel_environment(workspace: Workspace, threads: int) -> dict[str, str]:
    return os.environ | {
        "DERNET_PROFILE": workspace.profile.name,
        "DERNET_RUNS": str(workspace.folder.parent),
        "OMP_NUM_THREADS": str(threads),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        # The run is offline: nothing looks for newer versions, weights or fonts.
        "YOLO_OFFLINE": "1",
        "YOLO_CONFIG_DIR": str(workspace.folder.parent / ".ultralytics"),
        "HF_HUB_OFFLINE": "1",
    }


class _ChapterJob(threading.Thread):
    """Papermill in a thread, so that the main thread can tell the time and hear Ctrl-C.

    nbclient takes over the signals when it runs in the main thread and reports an interrupt as
    a kernel that died.
    """

    def __init__(self, notebook, output: Path, values: dict, environment: dict, source: Path):
        super().__init__(daemon=True)
        self.notebook, self.output, self.values = notebook, output, values
        self.environment, self.source = environment, source
        self.client = None
        self.error: Exception | None = None
        # Not `join`: interrupted, Python 3.11's takes a living thread for a dead one.
        self.finished = threading.Event()

    def run(self) -> None:
        import papermill
        from papermill.engines import papermill_engines

        # Papermill takes an engine by name; ours shares the kernel's client with this thread.
        papermill_engines.register("dernet", _engine_of(self))
        try:
            papermill.execute_notebook(
                self.notebook,
                self.output,
                parameters=self.values,
                engine_name="dernet",
                kernel_name="python3",
                progress_bar=False,
                cwd=self.source.parent,
            )
        except Exception as error:
            self.error = error
        finally:
            self.finished.set()

    def cell(self) -> int:
        """Return the number of the code cell under way, counted from 1."""
        # One of those executed is papermill's own, with the values of the parameters.
        return max(self.client.code_cells_executed - 1, 1) if self.client is not None else 1

    def stop(self) -> None:
        """End the kernel and all that it started, where they still run."""
        if self.finished.is_set():
            return
        provisioner = getattr(getattr(self.client, "km", None), "provisioner", None)
        process = getattr(provisioner, "process", None)
        if process is not None:
            # The kernel leads a process group of its own, which its workers belong to.
            os.killpg(process.pid, signal.SIGKILL)
        self.finished.wait(10)


def _engine_of(job: _ChapterJob) -> type:
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine

    class DernetEngine(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **_):
            job.client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, timeout=None)
            job.client.startup_timeout = 300
            # What the kernel itself says, such as why it died.
            with job.output.with_suffix("").with_suffix(".log").open("w") as log:
                job.client.execute(env=job.environment, stderr=log)

    return DernetEngine


def _failure(name: str, job: _ChapterJob, partial: Path, cells: int) -> DernetError:
    from papermill.exceptions import PapermillExecutionError

    error = job.error
    kept = f"the notebook as far as it came is {_shown(partial)}"
    if _is_disk_full(error, partial.parent):
        return DernetError(f"Chapter {name} stopped because the disk is full; make room; {kept}.")
    if not isinstance(error, PapermillExecutionError):
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return DernetError(f"Chapter {name} stopped in code cell {job.cell()}: {reason}; {kept}.")
    trace = _plain("\n".join(error.traceback)).strip()
    return DernetError(
        f"Chapter {name} failed in code cell {job.cell()} of {cells}; {kept}.\n\n{trace}"
    )


def _is_disk_full(error: Exception | None, folder: Path) -> bool:
    return "No space left on device" in str(error) or shutil.disk_usage(folder).free < 2**20


def _tidy(path: Path) -> None:
    """Take papermill's notes out of a notebook: they hold times and this machine's paths."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = [*cell.metadata["tags"], "remove-cell"]
    nbformat.write(notebook, path)


# The book ---------------------------------------------------------------------------------------


def stage_book(workspace: Workspace) -> Path:
    """Lay out the pages and the executed chapters in ``runs/<profile>/book`` and return it.

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
            raise DernetError(f"Chapter {name} has not been executed; call `dernet run` first.")
        shutil.copy(executed, stage / "notebooks")
    config = yaml.safe_load((PROJECT / "_config.yml").read_text(encoding="utf-8"))
    config["sphinx"]["config"]["myst_substitutions"] = {
        "profile": workspace.profile.name,
        "commit": commit(),
    }
    (stage / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return stage


def build_book(workspace: Workspace, report: Report) -> Path:
    """Stage and build the book; return the folder of its HTML pages.

    Raises:
        DernetError: Sphinx warned or failed; the message has its lines.
    """
    started = time.monotonic()
    report("book: started")
    stage = stage_book(workspace)
    program = str(Path(sys.executable).with_name("jupyter-book"))
    command = [program, "build", str(stage), "-n", "-W", "--keep-going"]
    environment = os.environ | {"NO_COLOR": "1", "PYTHONWARNINGS": "ignore"}
    with _heartbeat("book", started, report):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    log = _plain(done.stdout + done.stderr).replace(f"{stage}/", "")
    (workspace.folder / "book.log").write_text(log, encoding="utf-8")
    if done.returncode != 0:
        faults = [line for line in log.splitlines() if re.search(r"WARNING|ERROR|rror:", line)]
        raise DernetError(
            f"The book was not built: its faults are below, all that Sphinx said is in "
            f"{_shown(workspace.folder / 'book.log')}.\n\n" + "\n".join(faults[:20])
        )
    html = stage / "_build" / "html"
    (html / "digest.json").write_text(
        json.dumps({"profile": workspace.profile.name, "digest": book_digest(workspace)})
    )
    report(f"book: done in {_clock(started)}")
    return html


def publish(workspace: Workspace, html: Path) -> None:
    """Copy the built pages to `html`, where they are not there already.

    Raises:
        DernetError: The folder holds something else than an earlier book.
    """
    built = workspace.folder / "book" / "_build" / "html"
    mark = html / "digest.json"
    if mark.is_file() and mark.read_bytes() == (built / "digest.json").read_bytes():
        return
    if html.exists() and not mark.is_file() and any(html.iterdir()):
        raise DernetError(
            f"{html} holds something else than an earlier book; name another folder or empty it."
        )
    fresh = html.with_name(html.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(built, fresh)
    shutil.rmtree(html, ignore_errors=True)
    fresh.rename(html)


# All of it --------------------------------------------------------------------------------------


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def run(workspace: Workspace, html: Path, report: Report) -> None:
    """Bring the book up to date: data, chapters, pages; what has not changed is left alone.

    Args:
        workspace: The run.
        html: Where the pages go.
        report: Is given a line of progress at a time.

    Raises:
        DernetError: A step failed, or another run of this profile is under way.
        KeyboardInterrupt: The run was interrupted; every process it started has ended.
    """
    data_digest(workspace)  # an unreadable data folder is told before anything starts
    started = time.monotonic()
    if not (workspace.data_root / "annotations" / "train.csv").is_file():
        (workspace.folder / "prepared").unlink(missing_ok=True)  # someone deleted the cohort
    with _only_run(workspace) as lock:
        for target in ("prepare", "book"):
            _snakemake(target, workspace, lock)
        publish(workspace, html)
    report(f"The book ({workspace.profile.name}) is {html / 'index.html'}, {_clock(started)}.")


def _snakemake(target: str, workspace: Workspace, lock: IO) -> None:
    log = workspace.folder / f"snakemake-{target}.log"
    command = [
        *(sys.executable, "-m", "snakemake", target, "--snakefile", str(PROJECT / "Snakefile")),
        *("--config", f"profile={workspace.profile.name}", "--cores", str(cores())),
        # Digests are parameters of the rules, so these alone decide what runs again.
        *("--rerun-triggers", "params", "--rerun-incomplete"),
        # Ours is the lock, which a killed run cannot leave behind.
        *("--nolock", "--nocolor", "--quiet", "host", "progress", "reason", "rules"),
    ]
    environment = os.environ | {"DERNET_RUNS": str(workspace.folder.parent), "DERNET_STEP": "1"}
    # What a step reports comes by standard output; Snakemake's own words go to its log.
    with log.open("w") as messages:
        process = subprocess.Popen(
            command,
            stderr=messages,
            env=environment,
            cwd=workspace.folder,
            start_new_session=True,
            pass_fds=[lock.fileno()],  # should this process be killed, Snakemake keeps the lock
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _end_group(process)
            raise
    if code != 0:
        if _is_disk_full(None, workspace.folder):
            raise DernetError("The disk is full; make room, and the next run continues.")
        raise DernetError(f"The run stopped at the step above (Snakemake's log is {_shown(log)}).")


@contextmanager
def _only_run(workspace: Workspace) -> Iterator[IO]:
    workspace.folder.mkdir(parents=True, exist_ok=True)
    with (workspace.folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DernetError(
                f"Another run of the profile {workspace.profile.name!r} is under way in "
                f"{_shown(workspace.folder)}; wait for its end."
            ) from error
        yield lock


def _end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started: asked first, then told."""
    for number, patience_s in ((signal.SIGINT, 15), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


@contextmanager
def _heartbeat(what: str, started: float, report: Report) -> Iterator[Callable[[int, int], None]]:
    """Report now and then, while a step lasts; yields what the step may tell its progress to."""
    over = threading.Event()
    count = ""

    def tell(done: int, of: int) -> None:
        nonlocal count
        count = f"{done} of {of}, "

    def beat() -> None:
        while not over.wait(HEARTBEAT_S):
            report(f"{what}: {count}{_clock(started)}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        over.set()
        thread.join()


def _clock(started: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f"{minutes}:{seconds:02d} min"


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def _shown(path: Path) -> str:
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)

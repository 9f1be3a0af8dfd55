"""Execution of one chapter, by papermill in a kernel of its own."""

import html
import os
import re
import signal
import threading
import time
from pathlib import Path

from dernet_utils.book.graph import TRAINING_ENVIRONMENT, chapter_names, chapter_needs
from dernet_utils.book.progress import (
    HEARTBEAT_S,
    Say,
    clock,
    is_disk_full,
    shown_path,
    without_colours,
)
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.workspace import Workspace

KERNEL_START_S = 300  # a busy machine takes long
KERNEL_STOP_S = 10


def execute_chapter(
    name: str,
    workspace: Workspace,
    threads: int,
    report: Say,
    parameters: dict[str, object] | None = None,
    project: Path = PROJECT,
) -> Path:
    """Execute a chapter in a kernel of its own and return the executed notebook's path.

    The notebook gets its name only when every cell has run; until then, and after a failure, it is
    ``NAME.partial.ipynb``. With `parameters` it is a trial, ``NAME.trial.ipynb``.

    Args:
        name: Chapter, such as ``02_imaging``.
        workspace: The run; the name of its profile becomes the parameter `profile`.
        threads: Number of threads that numerical libraries may use.
        report: Called with one line of progress at a time.
        parameters: Further values for the cell tagged `parameters`.
        project: The folder that holds `notebooks`.

    Raises:
        DernetError: There is no such chapter, a parameter is unknown, or a cell failed.
    """
    source = project / "notebooks" / f"{name}.py"
    if not source.is_file():
        raise DernetError(
            f"There is no chapter {name!r}; the chapters are {', '.join(chapter_names(project))}."
        )
    import jupytext

    notebook = jupytext.read(source)
    values = {"profile": workspace.profile.name} | (parameters or {})
    _check_parameters(name, notebook, values)
    # A trial with other parameters does not replace the book's copy.
    executed = workspace.chapters / f"{name}{'.trial' if parameters else ''}.ipynb"
    partial = executed.with_suffix(".partial.ipynb")
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    report(f"{name}: started, {cells} code cells")
    started = time.monotonic()
    environment = _kernel_environment(workspace, threads)
    if chapter_needs(name).cores != "all":  # where times are measured, libraries run untuned
        environment |= TRAINING_ENVIRONMENT
    job = _ChapterJob(notebook, partial, values, environment, source)
    try:
        job.start()
        while not job.finished.wait(HEARTBEAT_S):
            where, shown = f"cell {job.cell()} of {cells}, {clock(started)}", job.shown()
            report(f"{name}: {where}: {shown}" if shown else f"{name}: {where}")
    finally:
        job.stop()
    if job.error is not None:
        raise _failure(name, job, partial, cells) from job.error
    _tidy(partial)
    partial.replace(executed)
    report(f"{name}: done in {clock(started)}")
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
        # The run is offline: no library looks for newer versions, weights or fonts.
        "YOLO_OFFLINE": "1",
        "YOLO_CONFIG_DIR": str(workspace.folder.parent / ".ultralytics"),
        "HF_HUB_OFFLINE": "1",
    }


class _ChapterJob(threading.Thread):
    """Papermill in a thread, so that the main thread can report progress and receive Ctrl-C.

    In the main thread nbclient would handle the signals itself, and report an interrupt as the
    death of the kernel.
    """

    def __init__(self, notebook, output: Path, values: dict, environment: dict, source: Path):
        super().__init__(daemon=True)
        self.notebook, self.output, self.values = notebook, output, values
        self.environment, self.source = environment, source
        self.client = None
        self.error: Exception | None = None
        # Not `join`: if it is interrupted, Python 3.11 takes a running thread for a finished one.
        self.finished = threading.Event()

    def run(self) -> None:
        import papermill
        from papermill.engines import papermill_engines

        # Papermill finds an engine by its name; ours shares the kernel's client with this thread.
        papermill_engines.register("dernet", _engine_of(self))
        try:
            papermill.execute_notebook(
                self.notebook,
                # Papermill would fill in braces.
                str(self.output).replace("{", "{{").replace("}", "}}"),
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
        """Return the number of the code cell that is running, counted from 1."""
        # One of the executed cells is papermill's own, which sets the parameters.
        return max(self.client.code_cells_executed - 1, 1) if self.client is not None else 1

    def shown(self) -> str:
        """Return the running cell's last printed line or its bar's words; empty for neither."""
        if self.client is None or not self.client.code_cells_executed:
            return ""
        cells = [cell for cell in self.client.nb.cells if cell.cell_type == "code"]
        widgets = self.client.widget_state
        for output in reversed(cells[self.client.code_cells_executed - 1].outputs):
            if output.output_type == "stream":
                lines = re.split(r"[\r\n]+", without_colours(output.text).strip())
                return lines[-1].strip()
            view = output.get("data", {}).get("application/vnd.jupyter.widget-view+json")
            if view is not None:
                parts = widgets.get(view["model_id"], {}).get("children", [])
                states = [widgets.get(part.removeprefix("IPY_MODEL_"), {}) for part in parts]
                words = [state["value"] for state in states if isinstance(state.get("value"), str)]
                return " ".join(html.unescape(" ".join(words)).split())
        return ""

    def stop(self) -> None:
        """Kill the kernel and all processes that it started, if they are still running."""
        if self.finished.is_set():
            return
        provisioner = getattr(getattr(self.client, "km", None), "provisioner", None)
        process = getattr(provisioner, "process", None)
        if process is not None:
            # The kernel leads its own process group, to which its workers belong.
            os.killpg(process.pid, signal.SIGKILL)
        self.finished.wait(KERNEL_STOP_S)


def _engine_of(job: _ChapterJob) -> type:
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine

    class DernetEngine(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **_):
            job.client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, timeout=None)
            job.client.startup_timeout = KERNEL_START_S
            # The kernel's own messages, such as why it died.
            with job.output.with_suffix("").with_suffix(".log").open("w", encoding="utf-8") as log:
                job.client.execute(env=job.environment, stderr=log)

    return DernetEngine


def _failure(name: str, job: _ChapterJob, partial: Path, cells: int) -> DernetError:
    from papermill.exceptions import PapermillExecutionError

    error = job.error
    kept = f"the partly executed notebook is {shown_path(partial)}"
    if is_disk_full(error, partial.parent):
        return DernetError(f"Chapter {name} stopped because the disk is full; make room ({kept}).")
    if not isinstance(error, PapermillExecutionError):
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return DernetError(f"Chapter {name} stopped in code cell {job.cell()}: {reason}; {kept}.")
    trace = without_colours("\n".join(error.traceback)).strip()
    return DernetError(
        f"Chapter {name} failed in code cell {job.cell()} of {cells}; {kept}.\n\n{trace}"
    )


def _tidy(path: Path) -> None:
    """Remove papermill's metadata from a notebook: it holds times and this machine's paths."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = [*cell.metadata["tags"], "remove-cell"]
    nbformat.write(notebook, path)

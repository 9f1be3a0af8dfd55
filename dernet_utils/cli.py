"""The command ``dernet``: every step of the book, each ending in one clear sentence.

Heavy imports stand inside the commands, so that ``dernet --help`` answers at once.
"""

import errno
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from dernet_utils.book import build as book_build
from dernet_utils.book import execute, progress
from dernet_utils.book import prepare as book_prepare
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.workspace import Workspace, open_workspace

app = typer.Typer(
    help="DERNet as a research book: virtual radiographs, chapters, pages.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
LOOPBACK = "127.0.0.1"
ProfileName = Annotated[
    str, typer.Option("--profile", help="smoke, laptop, night, paper; else DERNET_PROFILE, laptop.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the libraries.")]
Detector = Annotated[bool, typer.Option("--detector", help="YOLO11-L, in place of triage.")]
Csv = Annotated[Path | None, typer.Option("--out", help="Also write the table, as CSV.")]
Root = Annotated[Path, typer.Argument(help="A folder in the form of VinDr-SpineXR.")]
# Errors that are about the machine, not about a fault of ours.
_MACHINE = {
    errno.ENOSPC: "the disk is full; make room and call again",
    errno.EDQUOT: "your disk quota is used up; make room and call again",
    errno.EROFS: "the disk is read-only; choose a folder that can be written",
    errno.EACCES: "access is denied; choose a folder that you may use",
    errno.EPERM: "access is denied; choose a folder that you may use",
}


def main() -> None:
    """Run the command line."""
    # A shell that starts a job in the background has it ignore Ctrl-C; a run must hear it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    app()


def _interrupt(*_) -> NoReturn:
    # Once is enough: a second signal must not cut the cleaning up short.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn what a user can act on into a sentence and an exit code, without a traceback."""
    try:
        yield
    except DernetError as error:
        _end(str(error), 1)
    except KeyboardInterrupt:
        if "DERNET_STEP" in os.environ:  # `dernet run` started this and says it for all its steps
            raise typer.Exit(130) from None
        _end("Interrupted; the next call continues where this one stopped.", 130)
    except OSError as error:
        # pydicom and worker processes raise anew, and only the text keeps the number.
        told = re.search(r"\[Errno (\d+)\]", str(error))
        number = error.errno or (int(told[1]) if told else None)
        if number not in _MACHINE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _end(f"It stopped because {_MACHINE[number]}{where}.", 1)


def _end(sentence: str, code: int) -> NoReturn:
    # Plain text: a traceback from a chapter may hold square brackets, which rich would read.
    Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)
    raise typer.Exit(code)


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()


@app.command()
def donor() -> None:
    """Fetch the built-in donor CT, from which virtual patients are made, and verify it."""
    with _one_sentence():
        from dernet_utils.virtual.donor import fetch_donor, load_donor

        folder = fetch_donor()
        load_donor()  # prepares the volume, so that no run has to
        _say(f"The donor CT is in {folder}.")


@app.command()
def cohort(
    out: Annotated[Path, typer.Argument(help="A folder that is new or empty.")],
    patients: Annotated[int, typer.Option(min=1, help="How many virtual patients.")],
    seed: Annotated[int, typer.Option(min=0, help="One seed gives the same bytes.")] = 42,
    ct: Annotated[
        Path | None,
        typer.Option("--donor", metavar="CT", help="Another donor: a CT (NIfTI), with --mask."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="MASK", help="Its vertebrae, as TotalSegmentator numbers them."),
    ] = None,
) -> None:
    """Write virtual radiographs as a VinDr-SpineXR folder with a manifest."""
    with _one_sentence():
        from tqdm import tqdm

        from dernet_utils.virtual.cohort import write_cohort

        with tqdm(total=patients, unit="patient", leave=False, disable=None) as bar:
            write_cohort(
                out,
                patients,
                seed,
                progress.cores(),
                lambda done, _: bar.update(done - bar.n),
                ct=ct,
                mask=mask,
            )
        _say(f"{patients} virtual patients are in {out}.")


@app.command()
def check(
    root: Root,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    repair: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT", help="Also write OUT, a copy without empty boxes, others clipped."
        ),
    ] = None,
) -> None:
    """Print a dataset's fingerprint and every problem, with file and row.

    Exit code 0: no problem; 1: problems, or no dataset.
    """
    with _one_sentence():
        from dataclasses import asdict

        from tqdm import tqdm

        from dernet_utils.dataset.check import check_dataset, repair_dataset

        report = check_dataset(
            root, lambda items: tqdm(items, "files", leave=False, disable=None), progress.cores()
        )
        done = [] if repair is None else repair_dataset(root, repair)
        if as_json:
            _say(json.dumps(asdict(report), indent=2))
        else:
            _print_report(report)
        if repair is not None:
            note = f"Repairs: {len(done)}; the cleaned copy is in {repair}."
            typer.echo("\n".join([*done, note]), err=as_json)
        if report.problems:
            raise typer.Exit(1)


def _print_report(report) -> None:
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table("", *report.fingerprint, title="Fingerprint", title_justify="left")
    rows: dict[str, dict[str, str]] = {}
    for split, facts in report.fingerprint.items():
        for name, value in _flat(facts):
            rows.setdefault(name, {})[split] = value
    for name, values in rows.items():
        table.add_row(name, *(values.get(split, "–") for split in report.fingerprint))
    console.print(table)
    for problem in report.problems:
        console.print(str(problem), markup=False, highlight=False)
    count = len(report.problems)
    console.print(
        "No problem." if not count else f"{count} problem{'s' * (count > 1)}.", highlight=False
    )


def _flat(facts: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        label = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _flat(value, f"{label}: ")
        elif isinstance(value, float):
            yield label, f"{value:,.1f}"
        else:
            yield label, f"{value:,}" if isinstance(value, int) else str(value)


@app.command()
def prepare(
    profile: ProfileName = "",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at once.")] = None,
) -> None:
    """Make what all chapters share: virtual cohort, folds, cached images."""
    with _one_sentence():
        book_prepare.prepare(open_workspace(profile), workers or progress.cores(), _say)


@app.command()
def chapter(
    name: Annotated[str, typer.Argument(help="Such as 02_imaging.")],
    profile: ProfileName = "",
    threads: Threads = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="NAME=VALUE", help="A value for the `parameters` cell."),
    ] = None,
) -> None:
    """Execute one chapter; with -p as a trial, which leaves the book's copy alone."""
    with _one_sentence():
        values = dict(_parameter(text) for text in parameter or [])
        executed = execute.execute_chapter(
            name, open_workspace(profile), threads or progress.cores(), _say, values
        )
        if values:
            _say(f"The executed notebook is {executed}.")


def _parameter(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise DernetError(f"A parameter is given as -p NAME=VALUE, not {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


@app.command()
def train(
    network: Annotated[
        str, typer.Argument(help="densenet121, tf_efficientnetv2_s or resnet50; else all three.")
    ] = "",
    fold: Annotated[int | None, typer.Option(min=0, help="The fold held out; else each.")] = None,
    profile: ProfileName = "",
    threads: Threads = None,
) -> None:
    """Train triage networks, each on all folds but one; finished and killed runs are taken up.

    Processes that `accelerate launch` starts share the trainings out, each on a GPU of its own.
    """
    with _one_sentence():
        import torch

        from dernet_utils.book.progress import epoch_bars
        from dernet_utils.core.machine import claim_jobs
        from dernet_utils.triage.crossvalidation import train_fold, triage_jobs
        from dernet_utils.triage.training import triage_epoch_line

        workspace = open_workspace(profile)
        wanted = triage_jobs(workspace.profile, network, fold)
        jobs = claim_jobs(wanted, triage_jobs(workspace.profile))
        torch.set_num_threads(threads or progress.cores())
        book_prepare.ensure_prepared(workspace, _say)
        for name, held_out in jobs:
            job = f"{name}, fold {held_out}"
            if sys.stderr.isatty():
                bars = epoch_bars(name, workspace.profile)
                after = partial(bars, held_out)
            else:
                after = lambda row, job=job: _say(f"{job}: {triage_epoch_line(row)}")  # noqa: E731
            table = train_fold(workspace, name, held_out, after)
            _say(f"{job}: {table.name}")


@app.command()
def estimate(
    profile: ProfileName = "paper",
    detector: Detector = False,
    threads: Threads = None,
    out: Csv = None,
) -> None:
    """Take a step of each triage network, or of the detector, at a profile's size: time, memory."""
    with _one_sentence():
        from dernet_utils.book.benchmark import estimate_detector, estimate_triage

        workspace = open_workspace(profile)
        book_prepare.prepare(workspace, progress.cores(), _say)
        measure = estimate_detector if detector else estimate_triage
        _write(measure(workspace, threads or progress.cores(), _say), out)


@app.command()
def speed(
    profile: ProfileName = "",
    px: Annotated[int | None, typer.Option(min=32, help="Side; else the profile's.")] = None,
    detector: Detector = False,
    threads: Threads = None,
    out: Csv = None,
) -> None:
    """Train each triage network by the book's loop and by a plain one, by turns, on the same films.

    Tells how many times faster the first is, and whether both learn as much. Of the detector it
    takes steps by turns, in this book's trainer and in ultralytics' own.
    """
    with _one_sentence():
        import torch

        from dernet_utils.book.benchmark import compare_loops, compare_steps

        torch.set_num_threads(threads or progress.cores())
        workspace = open_workspace(profile)
        book_prepare.prepare(workspace, progress.cores(), _say)
        if detector:
            view = (px, px) if px else workspace.profile.detect_size
            _write(compare_steps(workspace, view, _say), out)
        else:
            _write(compare_loops(workspace, px or workspace.profile.triage_px, _say), out)


def _write(table, out: Path | None) -> None:
    if out is not None:
        table.to_csv(out, index=False, lineterminator="\n")
        _say(f"The table is {out}.")


@app.command()
def record(profile: ProfileName = "night") -> None:
    """Keep a long run's results on detectors in the book's folder of results."""
    with _one_sentence():
        from dernet_utils.book.results import keep_record

        _say(f"The record is {keep_record(open_workspace(profile))}.")


@app.command()
def predict(
    files: Annotated[list[Path], typer.Argument(help="DICOM, PNG or JPEG files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line a file.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for answers and films with boxes drawn in.")
    ] = None,
    profile: ProfileName = "",
) -> None:
    """Ask the networks of the last run about radiographs. For research and teaching only."""
    with _one_sentence():
        from dernet_utils.inference.torch_backend import run_pipeline
        from dernet_utils.serving.service import predict_file

        pipeline, refused = run_pipeline(open_workspace(profile)), 0
        for path in files:
            try:
                record = predict_file(pipeline, path, out)
            except DernetError as error:
                refused += 1
                typer.echo(str(error), err=True)
                continue
            _say(json.dumps(record) if as_json else _in_words(record))
        if refused:
            _end(f"{refused} of {len(files)} files could not be answered.", 1)


def _in_words(record: dict) -> str:
    said = "{file}: {decision}, score {score:.3f}, threshold {threshold:.3f}"
    box = "  {lesion_type} {score:.2f} at {xmin:.0f}, {ymin:.0f} to {xmax:.0f}, {ymax:.0f}"
    return "\n".join([said.format(**record), *(box.format(**own) for own in record["boxes"])])


@app.command()
def export(
    out: Annotated[
        Path | None, typer.Option(help="A folder; else the run's folder models.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="In 8-bit integers, too.")] = False,
    profile: ProfileName = "",
) -> None:
    """Write the networks of the last run as ONNX files, with a manifest."""
    with _one_sentence():
        from dernet_utils.inference.export import export_run

        workspace = open_workspace(profile)
        path = export_run(workspace, out or workspace.models, int8)
        _say(f"The networks are beside {path}.")


def _with_networks(profile: str) -> Workspace:
    """The run of a profile, if its networks are exported."""
    from dernet_utils.inference.onnx_backend import MANIFEST

    workspace = open_workspace(profile)
    if not (workspace.models / MANIFEST).is_file():
        name = workspace.profile.name
        raise DernetError(
            f"The profile {name!r} has no exported networks yet: `make book PROFILE={name}` trains "
            "and exports them."
        )
    return workspace


@app.command()
def serve(
    profile: ProfileName = "",
    host: Annotated[str, typer.Option(help="Another address than this needs a token.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    engine: Annotated[str, typer.Option(help="onnxruntime, openvino …")] = "onnxruntime",
) -> None:
    """Serve the web page and the API, with the networks of the last run.

    The environment variable DERNET_TOKEN holds the token that every request then must carry.
    """
    with _one_sentence():
        import uvicorn

        from dernet_utils.serving.web import open_app

        token = os.environ.get("DERNET_TOKEN", "")
        if host != LOOPBACK and not token:
            _end(
                f"At {host} others can reach the server: set DERNET_TOKEN to a secret that they "
                "must know, or leave --host out.",
                2,
            )
        served = open_app(_with_networks(profile), engine, token, host)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, port), family=family)
        except OSError as error:
            _end(f"The server cannot listen there: {error.strerror}. Try another --port.", 1)
        shown = f"[{host}]" if ":" in host else host
        _say(f"Serving on http://{shown}:{listening.getsockname()[1]}. Ctrl-C ends it.")
        settings = uvicorn.Config(
            served, access_log=False, log_level="warning", server_header=False
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run([listening])


@app.command()
def node(
    peer: Annotated[str, typer.Option(help="Who gets the reports: TITLE@host:port.")],
    profile: ProfileName = "",
    title: Annotated[str, typer.Option(help="The node's own title.")] = "DERNET",
    host: Annotated[str, typer.Option(help="Where it listens.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 11112,
    engine: Annotated[str, typer.Option(help="onnxruntime, openvino …")] = "onnxruntime",
) -> None:
    """Receive films by DICOM C-STORE, answer them, and send the reports to a peer."""
    with _one_sentence():
        import logging

        from dernet_utils.inference.onnx_backend import read_export
        from dernet_utils.serving.dicom_node import Node, Peer
        from dernet_utils.serving.service import InferenceService

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        receiver, folder = Peer.parse(peer), _with_networks(profile).models
        version = read_export(folder)["made_by"]
        with Node(InferenceService.open(folder, engine), version, receiver, title, port, host):
            _say(f"{title} listens on {host}:{port} and reports to {receiver.title}.")
            signal.pause()  # until Ctrl-C


@app.command()
def build(profile: ProfileName = "") -> None:
    """Build the pages from the executed chapters."""
    with _one_sentence():
        book_build.build_book(open_workspace(profile), _say)


@app.command()
def run(
    profile: ProfileName = "",
    html: Annotated[Path, typer.Option(help="Where the pages go.")] = PROJECT / "_build" / "html",
) -> None:
    """Bring the book up to date: data, chapters, pages. What has not changed is left alone."""
    with _one_sentence():
        book_build.run(open_workspace(profile), html, _say)


if __name__ == "__main__":
    main()

"""The command ``dernet``, which runs every step of the book.

An error that the user can resolve ends in one sentence. Heavy imports stand inside the commands,
so that ``dernet --help`` responds at once.
"""

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from dernet_utils.book.build import build_book, train_all
from dernet_utils.book.build import run as run_book
from dernet_utils.book.execute import execute_chapter
from dernet_utils.book.prepare import ensure_prepared
from dernet_utils.book.prepare import prepare as prepare_data
from dernet_utils.book.progress import cores, epochs_left
from dernet_utils.core.environment import isolate, use_utf8
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.profiles import Profile
from dernet_utils.core.workspace import Workspace, open_workspace

app = typer.Typer(
    help="DERNet as a research book: virtual radiographs, training, chapters, web page.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
LOOPBACK = "127.0.0.1"
ProfileName = Annotated[
    str,
    typer.Option(
        "--profile", help="smoke, laptop, night or paper. Default: DERNET_PROFILE, else laptop."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of threads. Default: all cores.")]
Detector = Annotated[bool, typer.Option("--detector", help="YOLO11-L, not the triage networks.")]
Csv = Annotated[Path | None, typer.Option("--out", help="Also write the table to this CSV file.")]
Root = Annotated[Path, typer.Argument(help="A dataset folder in the form of VinDr-SpineXR.")]
Engine = Annotated[
    str,
    typer.Option(
        help="onnxruntime, openvino or openvino-bfloat16; for int8 networks onnxruntime-int8 or "
        "openvino-int8."
    ),
]
# Errors of the operating system that the user can resolve.
_MACHINE_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space and run the command again",
    errno.EDQUOT: "your disk quota is used up; free some space and run the command again",
    errno.EROFS: "the disk is read-only; choose a folder that can be written",
    errno.EACCES: "access is denied; choose a folder that you may use",
    errno.EPERM: "access is denied; choose a folder that you may use",
}

# --- How a command ends -----------------------------------------------------------------------


def main() -> None:
    """Run the command line."""
    # A shell makes a background job ignore Ctrl-C; a run must not ignore it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    use_utf8()
    try:
        isolate()
    except DernetError as error:
        sys.exit(str(error))
    app()


def _interrupt(*_) -> NoReturn:
    # Once is enough: a second signal must not cut the clean-up short.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn an error that the user can resolve into a sentence and an exit code."""
    try:
        yield
    except DernetError as error:
        _end(str(error), 1)
    except KeyboardInterrupt:
        if "DERNET_STEP" in os.environ:  # started by `dernet run`, which reports for all its steps
            raise typer.Exit(130) from None
        _end("Interrupted; the next call continues where this one stopped.", 130)
    except OSError as error:
        # pydicom and worker processes re-raise without the number; only the text then has it.
        found = re.search(r"\[Errno (\d+)\]", str(error))
        number = error.errno or (int(found[1]) if found else None)
        if number not in _MACHINE_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _end(f"Stopped: {_MACHINE_ERRORS[number]}{where}.", 1)


def _end(sentence: str, code: int) -> NoReturn:
    # Plain text: a traceback from a chapter may hold square brackets, which rich would read.
    Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)
    raise typer.Exit(code)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a function as a command; its docstring is the help."""
    return app.command()(_one_sentence()(function))


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()


# --- Data -------------------------------------------------------------------------------------


@_command
def donor() -> None:
    """Download and verify the built-in donor CT, from which virtual patients are made."""
    from dernet_utils.virtual.donor import fetch_donor, load_donor

    folder = fetch_donor()
    load_donor()  # prepares the volume, so that no run has to
    _say(f"The donor CT is in {folder}.")


@_command
def cohort(
    out: Annotated[Path, typer.Argument(help="A folder that is new or empty.")],
    patients: Annotated[int, typer.Option(min=1, help="Number of virtual patients.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 42,
    ct: Annotated[
        Path | None,
        typer.Option("--donor", metavar="CT", help="Another donor CT (NIfTI); needs --mask."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="MASK", help="The labels of its vertebrae, as TotalSegmentator numbers them."
        ),
    ] = None,
) -> None:
    """Write virtual radiographs as a VinDr-SpineXR folder with a manifest."""
    from tqdm import tqdm

    from dernet_utils.virtual.cohort import write_cohort

    with tqdm(total=patients, unit="patient", leave=False, disable=None) as bar:

        def advance(done: int, _: int) -> None:
            bar.update(done - bar.n)

        write_cohort(out, patients, seed, cores(), advance, ct=ct, mask=mask)
    _say(f"Virtual patients in {out}: {patients}.")


@_command
def check(
    root: Root,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    repair: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Also write a copy to OUT, without boxes of no area and with the others clipped.",
        ),
    ] = None,
) -> None:
    """Print a dataset's fingerprint and every problem, with file and row.

    Exit code 0: no problem; 1: problems, or no dataset.
    """
    from dataclasses import asdict

    from tqdm import tqdm

    from dernet_utils.dataset.check import check_dataset, repair_dataset
    from dernet_utils.dataset.summary import print_report

    bars = partial(tqdm, desc="files", leave=False, disable=None)
    report = check_dataset(root, bars, cores())
    repairs = [] if repair is None else repair_dataset(root, repair)
    if as_json:
        _say(json.dumps(asdict(report), indent=2))
    else:
        print_report(report)
    if repair is not None:
        note = f"Repairs: {len(repairs)}; the cleaned copy is in {repair}."
        typer.echo("\n".join([*repairs, note]), err=as_json)
    if report.problems:
        raise typer.Exit(1)


@_command
def prepare(
    profile: ProfileName = "",
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes.")] = None,
) -> None:
    """Prepare what all chapters use: the virtual cohort, folds and cached images."""
    prepare_data(open_workspace(profile), workers or cores(), _say)


# --- The book ---------------------------------------------------------------------------------


@_command
def chapter(
    name: Annotated[str, typer.Argument(help="The chapter's name, such as 02_imaging.")],
    profile: ProfileName = "",
    threads: Threads = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="NAME=VALUE", help="A value for the `parameters` cell."),
    ] = None,
) -> None:
    """Execute one chapter. With -p it is a trial, which leaves the book's copy unchanged."""
    values = dict(_parameter(text) for text in parameter or [])
    executed = execute_chapter(name, open_workspace(profile), threads or cores(), _say, values)
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


@_command
def build(profile: ProfileName = "") -> None:
    """Build the pages from the executed chapters."""
    build_book(open_workspace(profile), _say)


@_command
def run(
    profile: ProfileName = "",
    html: Annotated[Path, typer.Option(help="Folder for the pages.")] = PROJECT / "_build" / "html",
) -> None:
    """Bring the book up to date: data, chapters, pages. Only what has changed is run."""
    run_book(open_workspace(profile), html, _say)


# --- Training ---------------------------------------------------------------------------------


@_command
def train(
    network: Annotated[
        str,
        typer.Argument(
            help="densenet121, tf_efficientnetv2_s, resnet50, or the detector yolo11l. "
            "Default: the first three."
        ),
    ] = "",
    fold: Annotated[int | None, typer.Option(min=0, help="Held-out fold. Default: each.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of a triage training. Default: the profile's.")
    ] = None,
    profile: ProfileName = "",
    threads: Threads = None,
) -> None:
    """Train triage networks, each on all folds but one, or the detector; resume what was cut off.

    Finished trainings are kept. Processes started by `accelerate launch` divide the trainings
    among themselves, each on its own GPU.
    """
    import torch

    from dernet_utils.book.progress import epoch_bars
    from dernet_utils.core.machine import claim_jobs
    from dernet_utils.triage.crossvalidation import train_fold, triage_jobs

    workspace = open_workspace(profile)
    if network == "yolo11l":
        if (fold, seed) != (None, None):
            raise DernetError("The detector has one training: leave out --fold and --seed.")
        return _train_detector(workspace, threads or cores())
    wanted = triage_jobs(workspace.profile, network, fold)
    jobs = claim_jobs(wanted, triage_jobs(workspace.profile))
    torch.set_num_threads(threads or cores())
    ensure_prepared(workspace, _say)
    for name, held_out in jobs:
        job = f"{name}, fold {held_out}" + ("" if seed is None else f", seed {seed}")
        if sys.stderr.isatty():
            after_epoch = partial(epoch_bars(name, workspace.profile), held_out)
        else:
            after_epoch = partial(_say_epoch, job, workspace.profile)
        table = train_fold(workspace, name, held_out, after_epoch, seed)
        _say(f"{job}: {table.name}")


def _train_detector(workspace: Workspace, threads: int) -> None:
    import torch

    from dernet_utils.detection.training import detector_epoch_line, train_run_detector

    torch.set_num_threads(threads)
    ensure_prepared(workspace, _say)

    def after_epoch(row: dict) -> None:
        left = epochs_left(row, workspace.profile.detect_epochs)
        _say(f"{detector_epoch_line(row)}   {left}")

    trained = train_run_detector(workspace, after_epoch)
    _say(f"yolo11l: {trained.checkpoint.name}")


def _say_epoch(job: str, profile: Profile, row: dict) -> None:
    from dernet_utils.triage.training import triage_epoch_line

    left = epochs_left(row, profile.triage_crop_epochs + profile.triage_epochs)
    _say(f"{job}: {triage_epoch_line(row)}   {left}")


@_command
def edition() -> None:
    """Train the edition by its protocol, for many hours; continues where it was cut off."""
    from dernet_utils.book.edition import EDITION, write_edition
    from dernet_utils.book.protocol import frozen_protocol

    frozen_protocol()
    train_all(workspace := open_workspace("edition-training"), _say)
    write_edition(workspace, EDITION, _say)


@_command
def estimate(
    profile: ProfileName = "paper",
    detector: Detector = False,
    threads: Threads = None,
    out: Csv = None,
) -> None:
    """Measure time and memory of one training step at a profile's size, for each network."""
    from dernet_utils.book.benchmark import estimate_detector, estimate_triage

    workspace = open_workspace(profile)
    prepare_data(workspace, cores(), _say)
    measure = estimate_detector if detector else estimate_triage
    _write(measure(workspace, threads or cores(), _say), out)


@_command
def speed(
    profile: ProfileName = "",
    px: Annotated[int | None, typer.Option(min=32, help="In pixels; else the profile's.")] = None,
    detector: Detector = False,
    threads: Threads = None,
    out: Csv = None,
) -> None:
    """Compare the book's training loop with a plain one, alternately on the same images.

    Reports the speed-up and both AUROCs of each triage network. With --detector it compares
    training steps of the book's trainer with those of ultralytics' trainer.
    """
    import torch

    from dernet_utils.book.benchmark import compare_loops, compare_steps

    torch.set_num_threads(threads or cores())
    workspace = open_workspace(profile)
    prepare_data(workspace, cores(), _say)
    if detector:
        size = (px, px) if px else workspace.profile.detect_size
        _write(compare_steps(workspace, size, _say), out)
    else:
        _write(compare_loops(workspace, px or workspace.profile.triage_px, _say), out)


def _write(table, out: Path | None) -> None:
    if out is not None:
        table.to_csv(out, index=False, lineterminator="\n")
        _say(f"The table is {out}.")


@_command
def record(profile: ProfileName = "night") -> None:
    """Save a long run's detector results in the book's folder of results."""
    from dernet_utils.book.results import keep_record

    _say(f"The record is {keep_record(open_workspace(profile))}.")


# --- Inference --------------------------------------------------------------------------------


@_command
def predict(
    files: Annotated[list[Path], typer.Argument(help="DICOM, PNG or JPEG files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per file.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for predictions and images with boxes.")
    ] = None,
    profile: ProfileName = "",
) -> None:
    """Run the last run's networks on radiographs. For research and teaching, not for diagnosis."""
    from dernet_utils.imaging.decoder import Decoder
    from dernet_utils.inference.torch_backend import run_pipeline
    from dernet_utils.serving.report import as_text
    from dernet_utils.serving.service import predict_file

    decode = Decoder().decode
    pipeline, failed = run_pipeline(open_workspace(profile)), 0
    for path in files:
        try:
            prediction = predict_file(pipeline, decode, path, out)
        except DernetError as error:
            failed += 1
            typer.echo(str(error), err=True)
            continue
        _say(json.dumps(prediction) if as_json else as_text(prediction))
    if failed:
        _end(f"{failed} of {len(files)} files could not be analysed.", 1)


@_command
def export(
    out: Annotated[Path | None, typer.Option(help="Folder. Default: the run's `models`.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also 8-bit integer networks.")] = False,
    profile: ProfileName = "",
) -> None:
    """Export the last run's networks as ONNX files, with a manifest."""
    from dernet_utils.inference.export import export_run

    workspace = open_workspace(profile)
    path = export_run(workspace, out or workspace.models, int8)
    _say(f"The networks are in {path.parent}, their manifest is {path.name}.")


@_command
def serve(
    profile: ProfileName = "",
    host: Annotated[str, typer.Option(help="Any but the default needs a token.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    engine: Engine = "onnxruntime",
) -> None:
    """Run the web page and its API locally, with the networks of the last run.

    If the environment variable DERNET_TOKEN is set, every request to the API must carry its value.
    """
    from dernet_utils.inference.onnx_backend import require_export
    from dernet_utils.serving.server import run_server
    from dernet_utils.serving.web import open_app

    token = os.environ.get("DERNET_TOKEN", "")
    if host != LOOPBACK and not token:
        _end(
            f"At {host} other machines can reach the server: set DERNET_TOKEN to a secret token, "
            "or leave --host out.",
            2,
        )
    workspace = open_workspace(profile)
    require_export(workspace)
    run_server(open_app(workspace, engine, token, host), host, port, _say)


@_command
def node(
    peer: Annotated[str, typer.Option(help="Receiver of the reports: TITLE@host:port.")],
    profile: ProfileName = "",
    title: Annotated[str, typer.Option(help="The node's own title.")] = "DERNET",
    host: Annotated[str, typer.Option(help="Address at which it listens.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 11112,
    engine: Engine = "onnxruntime",
) -> None:
    """Receive radiographs by DICOM C-STORE and send the reports on them to a peer."""
    import logging

    from dernet_utils.inference.onnx_backend import read_export, require_export
    from dernet_utils.serving.dicom_node import Node, Peer
    from dernet_utils.serving.service import InferenceService

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    receiver, folder = Peer.parse(peer), require_export(open_workspace(profile))
    version = read_export(folder)["made_by"]
    with Node(InferenceService.open(folder, engine), version, receiver, title, port, host):
        _say(f"{title} listens on {host}:{port} and sends reports to {receiver.title}.")
        signal.pause()  # until Ctrl-C


if __name__ == "__main__":
    main()

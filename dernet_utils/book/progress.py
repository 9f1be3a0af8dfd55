"""How a long step reports its progress: heartbeats in a log, bars in a notebook."""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dernet_utils.core.files import PROJECT
from dernet_utils.core.profiles import Profile

Say = Callable[[str], None]  # prints, logs or collects one line
HEARTBEAT_S = 30  # ours: often enough to show that a training is alive


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def is_disk_full(error: Exception | None, folder: Path) -> bool:
    """Return whether an error reports a full disk, or a folder's disk has less than 1 MiB free."""
    return "No space left on device" in str(error) or shutil.disk_usage(folder).free < 2**20


@contextmanager
def heartbeat(what: str, started: float, report: Say) -> Iterator[Callable[[int, int], None]]:
    """Report every `HEARTBEAT_S` seconds that a step is still running, and for how long.

    Args:
        what: The step.
        started: When it started, by `time.monotonic`.
        report: Called with one line at a time.

    Yields:
        A function that the step may call with the number of finished parts and of all parts.
    """
    over = threading.Event()
    count = ""

    def progress(done: int, of: int) -> None:
        nonlocal count
        count = f"{done} of {of}, "

    def beat() -> None:
        while not over.wait(HEARTBEAT_S):
            report(f"{what}: {count}{clock(started)}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        over.set()
        thread.join()


def clock(started: float) -> str:
    """Return the time since `started` (by `time.monotonic`), such as ``1:05 min``."""
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f"{minutes}:{seconds:02d} min"


def epochs_left(row: dict, total: int) -> str:
    """Return how far a training is, for the end of an epoch's line.

    Args:
        row: An epoch's, with ``epoch`` from 1 and its ``seconds``.
        total: Number of epochs.

    >>> epochs_left({"epoch": 3, "seconds": 60.0}, 10)
    '3 of 10 epochs, about 7 min left'
    """
    left = (total - row["epoch"]) * row["seconds"] / 60
    return f"{row['epoch']} of {total} epochs, about {left:.0f} min left"


def without_colours(text: str) -> str:
    """Return a text without a terminal's escape sequences.

    >>> without_colours("\\x1b[31mred\\x1b[0m")
    'red'
    """
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def shown_path(path: Path) -> str:
    """Return a path as messages show it: relative to the project if it lies inside."""
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def epoch_bars(network: str, profile: Profile) -> Callable[[int, dict], None]:
    """Return a callback for `cross_validate` that shows one progress bar per fold.

    A notebook shows a widget, a terminal a line of text.

    Args:
        network: Its name, shown beside the bar.
        profile: The run's profile, which sets the numbers of folds and epochs.

    Returns:
        A function of a fold and an epoch's row of the training curve.
    """
    from tqdm.auto import tqdm  # here: it takes a moment to find out whether this is a notebook

    bars: dict[int, tqdm] = {}
    total = profile.triage_crop_epochs + profile.triage_epochs

    def show(fold: int, row: dict) -> None:
        if fold not in bars:
            title = f"{network}, fold {fold} of {profile.folds}"
            bars[fold] = tqdm(desc=title, total=total, initial=row["epoch"] - 1, unit="epoch")
        found = {"train loss": row["train_loss"], "held-out AUROC": row["validation_auroc"]}
        shown = {key: f"{value:.3f}" for key, value in found.items() if value is not None}
        bars[fold].set_postfix(shown)
        bars[fold].update()
        if row["epoch"] == total:
            bars[fold].close()

    return show

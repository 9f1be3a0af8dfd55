"""What a long step tells while it lasts: heartbeats in a log, bars in a notebook."""

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

Say = Callable[[str], None]
HEARTBEAT_S = 30  # ours: often enough to see that a training lives


def is_disk_full(error: Exception | None, folder: Path) -> bool:
    return "No space left on device" in str(error) or shutil.disk_usage(folder).free < 2**20


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def heartbeat(what: str, started: float, report: Say) -> Iterator[Callable[[int, int], None]]:
    """Report now and then, while a step lasts; yields what the step may tell its progress to."""
    over = threading.Event()
    count = ""

    def tell(done: int, of: int) -> None:
        nonlocal count
        count = f"{done} of {of}, "

    def beat() -> None:
        while not over.wait(HEARTBEAT_S):
            report(f"{what}: {count}{clock(started)}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        over.set()
        thread.join()


def clock(started: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f"{minutes}:{seconds:02d} min"


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def shown_path(path: Path) -> str:
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def epoch_bars(network: str, profile: Profile) -> Callable[[int, dict], None]:
    """Return what `cross_validate` may call after each epoch: a bar a fold, wherever one can be.

    A notebook shows a widget, a terminal a line of text.
    """
    from tqdm.auto import tqdm  # here: it asks whether this is a notebook, which takes a moment

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

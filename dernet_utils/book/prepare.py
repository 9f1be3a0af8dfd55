"""The data of a run, before any chapter: virtual cohort, folds, cached images, and their tables."""

import shutil
import time

from dernet_utils.book.graph import data_digest, prepare_digest
from dernet_utils.book.progress import Say, clock, cores, heartbeat
from dernet_utils.core.files import write_whole
from dernet_utils.core.workspace import Workspace


def prepare(workspace: Workspace, workers: int, report: Say) -> None:
    """Make everything that chapters and trainings share, and write the tables that they read.

    Args:
        workspace: The run.
        workers: How many processes work at once.
        report: Is given a line of progress at a time.

    Raises:
        DernetError: The data are not what they should be.
    """
    # here: whoever asks whether a run is prepared needs none of them
    from dernet_utils.dataset.folds import make_folds
    from dernet_utils.dataset.prepared import write_tables
    from dernet_utils.dataset.tables import read_dataset
    from dernet_utils.imaging.cache import cache_images
    from dernet_utils.virtual.cohort import ensure_cohort

    started, profile = time.monotonic(), workspace.profile
    _forget_other_data(workspace)
    with heartbeat("virtual patients", started, report) as progress:
        ensure_cohort(workspace, progress)
    dataset = read_dataset(workspace.data_root)
    train = dataset.images[dataset.images["split"] == "train"]
    folds = make_folds(train, profile.folds, profile.seed)
    with heartbeat("cached images", started, report) as progress:
        cached = cache_images(dataset.images, workspace.cache, profile, workers, progress)
    images = dataset.images.merge(folds[["image_id", "fold"]], how="left", on="image_id")
    images = images.merge(cached[["image_id", "cached_path", "scale"]], validate="one_to_one")
    write_tables(workspace, images.astype({"fold": "Int64"}), dataset.boxes)
    digest = prepare_digest(workspace)
    write_whole(workspace.tables / "prepared.txt", lambda part: part.write_text(digest))
    report(f"data: {len(dataset.images)} images ready after {clock(started)}")


def ensure_prepared(workspace: Workspace, report: Say = lambda line: None) -> None:
    """Prepare a run's data where that was not done yet, or was done from something else.

    Args:
        workspace: The run.
        report: As `prepare` takes it.

    Raises:
        DernetError: As `prepare` raises.
    """
    stamp = workspace.tables / "prepared.txt"
    if not stamp.is_file() or stamp.read_text() != prepare_digest(workspace):
        prepare(workspace, cores(), report)


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

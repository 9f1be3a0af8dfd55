"""Preparation of a run's data, before any chapter: virtual cohort, folds, cached images, tables."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from dernet_utils.book.graph import images_record, prepare_digest, tables_digest
from dernet_utils.book.progress import Say, clock, cores, heartbeat
from dernet_utils.book.protocol import frozen_protocol
from dernet_utils.core.files import digest_of, write_whole
from dernet_utils.core.profiles import EDITION_TEST_SEED
from dernet_utils.core.vocabulary import SPLITS
from dernet_utils.core.workspace import Workspace

STAMP = "prepared.txt"  # among the run's tables: the digest of what they were made from
TABLES = ("images.parquet", "boxes.parquet", "faint.parquet", STAMP)


def prepare(workspace: Workspace, workers: int, report: Say) -> None:
    """Make what chapters and trainings share: the images on disk and the tables.

    The tables are ``images``, ``boxes`` and ``faint`` in ``tables``, as `dataset.prepared` reads
    them; ``tables/dataset.json`` beside them says whether the radiographs are virtual.

    Args:
        workspace: The run.
        workers: Number of processes that work in parallel.
        report: Called with one line of progress at a time.

    Raises:
        DernetError: The dataset or the donor CT is missing, damaged or inconsistent; or the test
            patients are the edition's, whose protocol is not frozen.
    """
    # Imported here, because `is_prepared` needs none of them.
    from dernet_utils.dataset.folds import make_folds
    from dernet_utils.dataset.prepared import write_tables
    from dernet_utils.dataset.tables import read_dataset, read_manifest
    from dernet_utils.imaging.cache import cache_images
    from dernet_utils.imaging.decoder import Decoder
    from dernet_utils.virtual.cohort import ensure_cohort
    from dernet_utils.virtual.counterfactual import images_with_faint_findings
    from dernet_utils.virtual.faint import faint_boxes

    started, profile = time.monotonic(), workspace.profile
    if profile.test_seed == EDITION_TEST_SEED:
        frozen_protocol()  # before any test patient of the edition is rendered
    digest = prepare_digest(workspace)  # before the work, during which a file may be edited
    _forget_other_data(workspace)
    with heartbeat("virtual patients", started, report) as progress:
        ensure_cohort(workspace, progress)
    dataset = read_dataset(workspace.data_root)
    train = dataset.images[dataset.images["split"] == "train"]
    folds = make_folds(train, profile.folds, profile.seed)
    with heartbeat("cached images", started, report) as progress, Decoder(workers) as decoder:
        cached = cache_images(
            dataset.images, workspace.cache, profile, decoder.decode, workers, progress
        )
    _forget_other_images(workspace, cached["cached_path"])
    images = dataset.images.merge(folds[["image_id", "fold"]], how="left", on="image_id")
    images = images.merge(cached[["image_id", "cached_path", "scale"]], validate="one_to_one")
    images = images.astype({"fold": "Int64"})
    manifest = read_manifest(workspace.data_root) if dataset.virtual else None
    hidden = images_with_faint_findings(manifest) if manifest else frozenset()
    images["faint"] = images["image_id"].isin(hidden)
    faint = faint_boxes(workspace.data_root, manifest, images["image_id"])
    write_tables(workspace, images, dataset.boxes, faint, dataset.virtual)
    write_whole(workspace.tables / STAMP, lambda part: part.write_text(digest, encoding="utf-8"))
    report(f"data: {len(dataset.images)} images ready after {clock(started)}")


def is_prepared(workspace: Workspace) -> bool:
    """Return whether the dataset and the tables exist and were made from the present data and code.

    Raises:
        DernetError: As `graph.prepare_digest` raises.
    """
    digest = prepare_digest(workspace)
    needed = [workspace.data_root / "annotations" / f"{split}.csv" for split in SPLITS]
    needed += [workspace.tables / name for name in TABLES]
    needed.append(workspace.dataset_facts)
    made_from = workspace.tables / STAMP
    return all(map(Path.is_file, needed)) and made_from.read_text(encoding="utf-8") == digest


def ensure_prepared(workspace: Workspace, report: Say = lambda line: None) -> None:
    """Prepare a run's data, unless this has been done from the same data and code.

    Args:
        workspace: The run.
        report: As `prepare` takes it.

    Raises:
        DernetError: As `prepare` raises.
    """
    if not is_prepared(workspace):
        prepare(workspace, cores(), report)


def _forget_other_data(workspace: Workspace) -> None:
    """Delete from the run's own folder what was made from other data."""
    stamp, digest = workspace.folder / "data.digest", tables_digest(workspace)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return
    if workspace.profile.renders_cohort:
        for name in ("cohort", "cohort.partial"):
            shutil.rmtree(workspace.folder / name, ignore_errors=True)
    shutil.rmtree(workspace.folder / "tables", ignore_errors=True)
    workspace.folder.mkdir(parents=True, exist_ok=True)
    # Written first: what a killed run leaves belongs to these data, and the next run resumes it.
    stamp.write_text(digest, encoding="utf-8")


def _forget_other_images(workspace: Workspace, cached: Iterable[str]) -> None:
    """Note which images on disk a run uses; delete the tables that were made from others.

    A virtual cohort's images follow from what `graph.tables_digest` holds. A cached image is named
    by its source's contents.
    """
    if workspace.profile.renders_cohort:
        return
    record, digest = images_record(workspace), digest_of(*(Path(path).name for path in cached))
    if record.is_file() and record.read_text(encoding="utf-8") == digest:
        return
    shutil.rmtree(workspace.folder / "tables", ignore_errors=True)
    write_whole(record, lambda part: part.write_text(digest, encoding="utf-8"))

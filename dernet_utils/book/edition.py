"""The edition: what the long trainings leave for the repository, and the checks on it.

`book/edition` is a run's folder without images: ``weights`` in 8 bits, ``tables`` with records of
all held-out and test images, and ``manifest.json``.
"""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from dernet_utils.book.progress import Say
from dernet_utils.book.protocol import frozen_protocol
from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT, digest_of, file_digest
from dernet_utils.core.packed import read_weights, write_packed
from dernet_utils.core.vocabulary import NETWORKS
from dernet_utils.core.workspace import Workspace, commit
from dernet_utils.detection.images import DetectorRecipe, detection_images
from dernet_utils.detection.prediction import predict_boxes
from dernet_utils.detection.training import load_detector, train_run_detector
from dernet_utils.metrics.classification import auroc
from dernet_utils.metrics.detection import mean_average_precision
from dernet_utils.triage.crossvalidation import cross_validate, train_fold, triage_images
from dernet_utils.triage.images import load_pixels
from dernet_utils.triage.networks import predict_probabilities
from dernet_utils.triage.training import checkpoint_facts, load_network

EDITION = PROJECT / "book" / "edition"
AUROC_OFF, MAP_OFF = 0.002, 0.005  # largest difference between packed and trained weights
SCORE_FROM = 0.005  # of a recorded box


def write_edition(workspace: Workspace, folder: Path, report: Say) -> dict:
    """Pack a run's networks, record what the packed networks predict, and write the manifest.

    Args:
        workspace: The run, with all its trainings finished.
        folder: Replaced where it exists, at the end.
        report: Called with one line of progress at a time.

    Returns:
        The manifest.

    Raises:
        DernetError: The protocol is not frozen, or is younger than the test images; the code has
            uncommitted changes; or a packed network differs too much from the trained one.
    """
    protocol, made_by = frozen_protocol(), commit()
    if "local changes" in made_by or made_by == "unknown":
        raise DernetError(f"The code is {made_by!r}, which cannot be reproduced: commit first.")
    cohort = workspace.data_root / "manifest.json"
    rendered = datetime.fromtimestamp(cohort.stat().st_mtime, UTC)
    if rendered < protocol.date:
        raise DernetError(
            f"The protocol of {protocol.date:%Y-%m-%d %H:%M} is younger than the test images of "
            f"{rendered:%Y-%m-%d %H:%M}: they may not be scored by it."
        )
    draft = Workspace(workspace.profile, folder.with_name(folder.name + ".partial"))
    shutil.rmtree(draft.folder, ignore_errors=True)
    parity = {name: _pack_triage(workspace, draft, name) for name in NETWORKS}
    report("triage networks packed; difference of AUROC on held-out images: " + _shown(parity))
    parity["yolo11l"] = _pack_detector(workspace, draft)
    report(f"detector packed; difference of mAP@0.5: {_shown({'yolo11l': parity['yolo11l']})}")
    for name in ("images", "boxes", "faint"):
        shutil.copy(workspace.tables / f"{name}.parquet", draft.tables)
    shutil.copy(workspace.dataset_facts, draft.tables)
    training = triage_images(workspace)
    learnt = training[(training["split"] == "train") & (training["fold"] > 0)]
    studies = sorted(learnt["study_id"].unique())
    manifest = {
        "protocol": {"commit": protocol.commit, "date": protocol.date.isoformat()},
        "rendered": rendered.isoformat(timespec="seconds"),
        "commit": made_by,
        "lock": file_digest(PROJECT / "requirements.lock"),
        "machine": machine.processor_name(),
        "data": "virtual" if workspace.virtual else "VinDr-SpineXR",
        "cohort": file_digest(cohort),
        "profile": json.loads(workspace.profile.model_dump_json()),
        "learnt_from": {"studies": len(studies), "digest": digest_of(*studies)},
        "parity": parity,
        "hours": _hours(workspace),
        "weights": {path.name: file_digest(path) for path in sorted(draft.weights.iterdir())},
    }
    text = json.dumps(manifest, indent=1) + "\n"
    (draft.folder / "manifest.json").write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.folder.rename(folder)
    return manifest


def _pack_triage(workspace: Workspace, draft: Workspace, name: str) -> float:
    """Pack a network, write the tables of its trainings; return its difference of AUROC."""
    found = cross_validate(workspace, name)
    (checkpoint,) = found.checkpoints
    path = draft.weights / f"{name}.safetensors"
    write_packed(path, read_weights(checkpoint)[0], checkpoint_facts(checkpoint))
    images = triage_images(workspace)
    scored = images[(images["fold"] == 0) | (images["split"] == "test")]
    network, _ = load_network(name, path)
    pixels = load_pixels(scored["cached_path"], workspace.profile.triage_px)
    prob = pd.Series(predict_probabilities(network, pixels), scored["image_id"])
    held = found.out_of_fold
    y = held["label"].to_numpy()
    off = auroc(y, prob[held["image_id"]].to_numpy()) - auroc(y, held["prob"].to_numpy())
    _refuse(name, "AUROC", off, AUROC_OFF)
    folder = draft.tables / "triage"
    folder.mkdir(exist_ok=True)
    for seed in (None, *workspace.profile.more_seeds):
        made = train_fold(workspace, name, 0, seed=seed)
        table = pd.read_parquet(made)
        if seed is None:  # the records are those of the network that is shipped
            table["prob"] = prob[table["image_id"]].to_numpy()
            table.attrs["checkpoint"] = path.name
        table.to_parquet(folder / made.name, index=False)
    return off


def _pack_detector(workspace: Workspace, draft: Workspace) -> float:
    """Pack the detector and write its boxes; return its difference of mAP@0.5 on fold 0."""
    trained, sets = train_run_detector(workspace), detection_images(workspace)
    path = draft.weights / "yolo11l.safetensors"
    write_packed(path, *read_weights(trained.checkpoint))
    network, _ = load_detector(path)
    size = DetectorRecipe.of(workspace.profile).input_size
    for name, images in (("validation", sets.validation), ("test", sets.test)):
        found = predict_boxes(network, images, size)
        kept = found[found["score"] >= SCORE_FROM].astype(
            {"lesion_type": "category", **dict.fromkeys(found.columns[2:], "float32")}
        )
        file = f"yolo11l_{name}_boxes.parquet"
        kept.to_parquet(draft.tables / file, index=False, compression="zstd")
        if name == "validation":
            truth = sets.boxes[sets.boxes["image_id"].isin(images["image_id"])]
            before = pd.read_parquet(workspace.tables / file)
            packed, whole = (mean_average_precision(truth, some)[0] for some in (found, before))
    _refuse("yolo11l", "mAP@0.5", packed - whole, MAP_OFF)
    return packed - whole


def _refuse(name: str, score: str, off: float, most: float) -> None:
    if abs(off) > most:
        raise DernetError(
            f"Packed in 8 bits, {name} differs by {off:+.4f} in {score} on held-out images, and at "
            f"most {most} is accepted: ship it in another form."
        )


def _shown(parity: dict[str, float]) -> str:
    return ", ".join(f"{name} {off:+.4f}" for name, off in parity.items())


def _hours(workspace: Workspace) -> dict[str, float]:
    """Return each training's time, hours, as Snakemake measured it in the call that ended it."""
    files = sorted((workspace.folder / "benchmarks").glob("train_*.tsv"))
    return {
        path.stem.removeprefix("train_"): round(pd.read_csv(path, sep="\t")["s"].sum() / 3600, 3)
        for path in files
    }

"""Cross-validation: no training image is scored by a network that was trained on it.

Each network is trained once per fold. One network and one fold are one job. Jobs are independent
and may run in any order, on any machine. Each writes a table of probabilities, which chapters read
without loading a network or an image.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from scipy.special import expit

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import digest_of, file_digest, modules_digest, write_whole
from dernet_utils.core.profiles import Profile
from dernet_utils.core.vocabulary import LESION_TYPES, NETWORKS
from dernet_utils.core.weights import starting_weights
from dernet_utils.core.workspace import Workspace, commit
from dernet_utils.dataset.prepared import read_boxes, read_images
from dernet_utils.triage.ensemble import Decision
from dernet_utils.triage.networks import predict_probabilities
from dernet_utils.triage.training import (
    SHAPING,
    Sample,
    TriageRecipe,
    load_pixels,
    train_triage,
)

FoldProgress = Callable[[int, dict], None]  # called with the fold and the epoch's row


@dataclass(frozen=True)
class CrossValidated:
    """One network's probabilities, from its training runs for all folds.

    Attributes:
        network: Its name.
        out_of_fold: One row per image of the folds held out, in the order of `triage_images`:
            ``image_id``, ``study_id``, ``fold``, ``label`` (bool) and ``prob``, by the network that
            was not trained on that fold.
        test: One row per test image: ``image_id``, ``study_id``, and ``prob``, the mean over the
            folds' networks. It has no label.
        curves: Learning curves: the rows of `training.TrainedNetwork.history` with their ``fold``.
        epochs: One row per training image and epoch, starting with the last epoch on crops:
            ``image_id``, ``epoch`` and ``prob``, by the network that was not trained on that fold;
            here the mirrored image is not used.
        checkpoints: One per fold.
    """

    network: str
    out_of_fold: pd.DataFrame
    test: pd.DataFrame
    curves: pd.DataFrame
    epochs: pd.DataFrame
    checkpoints: tuple[Path, ...]


def triage_jobs(
    profile: Profile, network: str = "", fold: int | None = None
) -> list[tuple[str, int]]:
    """Return a run's training jobs, or only those of a network or a fold.

    Args:
        profile: The run's profile, which sets the number of folds.
        network: One of `NETWORKS`; empty for all.
        fold: The fold held out; None for all.

    Returns:
        A network and the fold held out, per job.

    Raises:
        DernetError: There is no such network or fold.

    >>> from dernet_utils.core.profiles import get_profile
    >>> triage_jobs(get_profile("paper"), "resnet50")[-1], len(triage_jobs(get_profile("paper")))
    (('resnet50', 4), 15)
    """
    if network and network not in NETWORKS:
        raise DernetError(f"The triage network is one of {', '.join(NETWORKS)}, not {network!r}.")
    if fold is not None and fold not in profile.held_out:
        raise DernetError(
            f"The folds that this run holds out are 0 to {profile.held_out[-1]}; fold {fold} is "
            "none of them."
        )
    folds = profile.held_out if fold is None else [fold]
    return [(name, held_out) for name in ([network] if network else NETWORKS) for held_out in folds]


def triage_images(workspace: Workspace) -> pd.DataFrame:
    """Return a run's images for triage; the test split's labels stay sealed.

    Returns:
        One row per image, training before test: ``image_id``, ``study_id``, ``split``, ``fold``
        (missing for a test image), ``cached_path`` of the enhanced image, ``label``, whether it is
        abnormal (missing for a test image, see `open_test_labels`), ``faint`` as in
        `dataset.prepared.read_images` (False for a test image), and ``lesions``, their positions,
        as `images.Sample.load` takes them (empty for a test image).

    Raises:
        DernetError: The run has not been prepared.
    """
    images, boxes = read_images(workspace), read_boxes(workspace)
    lesions = _lesion_centres(boxes[boxes["split"] == "train"], images)
    label = images.loc[images["split"] == "train", "abnormal"].astype("boolean")
    columns = ["image_id", "study_id", "split", "fold", "cached_path"]
    faint = images["faint"].where(images["split"] == "train", False).astype(bool)
    table = images[columns].assign(label=label, faint=faint)
    table["lesions"] = [lesions.get(image, np.empty((0, 3))) for image in table["image_id"]]
    return table.sort_values("split", ascending=False, kind="stable", ignore_index=True)


def _lesion_centres(boxes: pd.DataFrame, sizes: pd.DataFrame) -> dict[str, np.ndarray]:
    """Each image's lesions: centre as fractions of width and height, and number of the type."""
    boxes = boxes.merge(sizes[["image_id", "height", "width"]], validate="many_to_one")
    boxes["x"] = (boxes["xmin"] + boxes["xmax"]) / 2 / boxes["width"]
    boxes["y"] = (boxes["ymin"] + boxes["ymax"]) / 2 / boxes["height"]
    boxes["kind"] = boxes["lesion_type"].map(LESION_TYPES.index)
    return {
        image: rows[["x", "y", "kind"]].to_numpy(float)
        for image, rows in boxes.groupby("image_id", sort=False)
    }


def train_fold(
    workspace: Workspace,
    name: str,
    fold: int,
    progress: Callable[[dict], None] | None = None,
    seed: int | None = None,
) -> Path:
    """Train a network on all folds but one and write its probabilities, unless that has been done.

    Args:
        workspace: The run.
        name: One of `NETWORKS`.
        fold: The fold that is held out.
        progress: As in `training.train_triage`.
        seed: Another seed for the training than the profile's, which names the table too.

    Returns:
        The table ``tables/triage/<name>-<fold>.parquet``, or ``<name>-<fold>-<seed>.parquet``:
        ``image_id`` and ``prob`` of the images held out and of the test split; its attributes hold
        the checkpoint's name and the history.

    Raises:
        DernetError: There is no such fold or network, a fold lacks a class, or as
            `training.train_triage` raises.
    """
    triage_jobs(workspace.profile, name, fold)
    return _train_fold(workspace, triage_images(workspace), name, fold, progress, seed)


def _train_fold(
    workspace: Workspace,
    images: pd.DataFrame,
    name: str,
    fold: int,
    progress: Callable[[dict], None] | None,
    seed: int | None = None,
) -> Path:
    """Do the work of `train_fold` with images that have already been read."""
    other = "" if seed is None else f"-{seed}"
    path = workspace.tables / "triage" / f"{name}-{fold}{other}.parquet"
    recipe, folds = TriageRecipe.of(workspace.profile), workspace.profile.folds
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    key = _fold_key(images, name, f"{fold} of {folds}", recipe)
    if path.is_file():
        kept = pd.read_parquet(path).attrs
        if kept["key"] == key and (workspace.weights / kept["checkpoint"]).is_file():
            return path
    held = images[images["fold"] == fold]
    # An image whose findings are all too faint for a label is called normal, but does not look it.
    training = images[(images["fold"] != fold) & (images["split"] == "train") & ~images["faint"]]
    for rows, words in ((training, "the training images"), (held, "the images held out")):
        if rows["label"].nunique() < 2:
            raise DernetError(
                f"With fold {fold} held out, {words} are {len(rows)} of one class, and both "
                "classes are needed: take fewer folds or more data."
            )
    trained = train_triage(
        name,
        Sample.load(training, recipe.train_px),
        Sample.load(held, recipe.image_px),
        recipe,
        workspace.weights,
        starting_weights(name),
        progress,
        {
            "profile": workspace.profile.name,
            "fold": f"{fold} of {folds}",
            "held_out": digest_of(*held["image_id"]),
            "commit": commit(),
        },
    )
    scored = images[(images["fold"] == fold) | (images["split"] == "test")]
    pixels = load_pixels(scored["cached_path"], recipe.image_px)
    found = scored[["image_id"]].assign(prob=predict_probabilities(trained.network, pixels))
    found.attrs = {
        "key": key,
        "checkpoint": trained.checkpoint.name,
        "history": trained.history.to_json(orient="records", double_precision=15),
    }
    path.parent.mkdir(exist_ok=True)
    return write_whole(path, lambda part: found.to_parquet(part, index=False))


def _fold_key(images: pd.DataFrame, name: str, fold: str, recipe: TriageRecipe) -> str:
    """Digest of all inputs of a fold's table; no image is read.

    A cached image is named by a digest of its content, so its name stands for its pixels.
    """
    weights = starting_weights(name)
    columns = ["image_id", "study_id", "split", "fold", "label", "faint"]
    lesions = np.concatenate([*images["lesions"], np.empty((0, 3))])
    return digest_of(
        f"{name} {fold}, {recipe}",
        f"torch {torch.__version__}, timm {timm.__version__}",
        modules_digest("triage/crossvalidation", *SHAPING),
        images[columns].to_csv(index=False),
        " ".join(Path(path).name for path in images["cached_path"]),
        lesions.tobytes(),
        "random" if weights is None else file_digest(weights),
    )


def cross_validate(
    workspace: Workspace,
    name: str,
    progress: FoldProgress | None = None,
    seed: int | None = None,
) -> CrossValidated:
    """Return a network's probabilities for all images; any fold without a table is trained first.

    Args:
        workspace: The run.
        name: One of `NETWORKS`.
        progress: Called after each epoch that is trained now.
        seed: As in `train_fold`.

    Raises:
        DernetError: As `train_fold` raises.
    """
    images = triage_images(workspace)
    found, curves, epochs, checkpoints = [], [], [], []
    for fold in workspace.profile.held_out:
        after = None if progress is None else lambda row, fold=fold: progress(fold, row)
        table = pd.read_parquet(_train_fold(workspace, images, name, fold, after, seed))
        history = pd.DataFrame(json.loads(table.attrs["history"]))
        checkpoints.append(workspace.weights / table.attrs["checkpoint"])
        table.attrs = {}
        found.append(table)
        logits_of_epoch = history.pop("validation_logits")
        held = images.loc[images["fold"] == fold, "image_id"]
        for epoch, logits in zip(history["epoch"], logits_of_epoch, strict=True):
            if logits is not None:
                prob = expit(np.array(logits))
                epochs.append(pd.DataFrame({"image_id": held, "epoch": epoch, "prob": prob}))
        curves.append(history.assign(fold=fold))
    prob = pd.concat(found).groupby("image_id")["prob"].mean()
    train = images[images["fold"].isin(workspace.profile.held_out)].copy()
    test = images[images["split"] == "test"].copy()
    for rows in (train, test):
        rows["prob"] = prob[rows["image_id"]].to_numpy()
    train = train.astype({"label": bool, "fold": int})
    return CrossValidated(
        name,
        train[["image_id", "study_id", "fold", "label", "prob"]].reset_index(drop=True),
        test[["image_id", "study_id", "prob"]].reset_index(drop=True),
        pd.concat(curves, ignore_index=True),
        pd.concat(epochs, ignore_index=True),
        tuple(checkpoints),
    )


def write_decision(workspace: Workspace, decision: Decision) -> Path:
    """Write what was chosen out of fold to ``tables/decision.json``; this unseals the test labels.

    Args:
        workspace: The run.
        decision: Weights, temperatures and thresholds.

    Returns:
        The file.
    """
    text = json.dumps(asdict(decision), indent=1) + "\n"
    path = workspace.tables / "decision.json"
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_decision(workspace: Workspace) -> Decision:
    """Return what was chosen out of fold.

    Raises:
        DernetError: Nothing has been chosen yet, or the file is not what `write_decision` wrote.
    """
    path = workspace.tables / "decision.json"
    if not path.is_file():
        raise DernetError(
            f"There is no {path}, with the weights, thresholds and calibration chosen out of fold: "
            "run the chapter on the ensemble first."
        )
    try:
        return Decision(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise DernetError(
            f"{path} is damaged ({error}): delete it and run the chapter on the ensemble again."
        ) from error


def open_test_labels(workspace: Workspace) -> np.ndarray:
    """Return whether each test image is abnormal, in the order of `triage_images`, shape (n,).

    Raises:
        DernetError: They are still sealed: `read_decision` raises.
    """
    read_decision(workspace)
    images = read_images(workspace)
    return images.loc[images["split"] == "test", "abnormal"].to_numpy()

"""Each network trained once for each fold; each training image scored by one that never saw it.

A network and a fold are one job. Jobs know nothing of one another and may run in any order,
anywhere. What a finished job found lies beside its checkpoint, under the same digest, so that a
chapter reads what is there and trains what is missing.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit
from tqdm.auto import tqdm

from dernet_utils.data import LESION_TYPES, load_folds, read_dataset
from dernet_utils.ensemble import Decision
from dernet_utils.errors import DernetError
from dernet_utils.imaging import cache_images
from dernet_utils.profiles import NETWORKS, Profile
from dernet_utils.triage import (
    Recipe,
    Sample,
    load_pixels,
    load_trained,
    predict_triage,
    starting_weights,
    train_triage,
)
from dernet_utils.workspace import Workspace, commit

Progress = Callable[[int, dict], None]  # is given the fold and the epoch's row


@dataclass(frozen=True)
class CrossValidated:
    """What one network's trainings on all folds found.

    Attributes:
        network: Its name.
        out_of_fold: One row a training image, in the order of `run_images`: ``image_id``,
            ``study_id``, ``fold``, ``label`` (bool) and ``prob``, by the network that did not
            learn from that fold.
        test: One row a test image: ``image_id``, ``study_id``, and ``prob``, the mean over the
            folds' networks. It has no label.
        curves: Learning curves: the rows of `triage.Trained.history` with their ``fold``.
        epochs: One row a training image and epoch from the last on crops on: ``image_id``,
            ``epoch`` and ``prob``, by the network that did not learn from that fold, not mirrored.
        checkpoints: One a fold.
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
    """Return the trainings of a run, a network and a fold each; or those that are asked for.

    Args:
        profile: The run's; it has the number of folds.
        network: One of `NETWORKS`; empty for all.
        fold: The fold held out; None for each.

    Raises:
        DernetError: There is no such network or fold.

    >>> from dernet_utils.profiles import get_profile
    >>> triage_jobs(get_profile("paper"), "resnet50")[-1], len(triage_jobs(get_profile("paper")))
    (('resnet50', 4), 15)
    """
    if network and network not in NETWORKS:
        raise DernetError(f"The triage network is one of {', '.join(NETWORKS)}, not {network!r}.")
    if fold is not None and fold not in range(profile.folds):
        raise DernetError(
            f"The folds of this run are 0 to {profile.folds - 1}, and {fold} is none."
        )
    folds = range(profile.folds) if fold is None else [fold]
    return [(name, held_out) for name in ([network] if network else NETWORKS) for held_out in folds]


def epoch_bars(network: str, profile: Profile) -> Progress:
    """Return what `cross_validate` may call after each epoch: a bar a fold, wherever one can be.

    A notebook shows a widget, a terminal a line of text.
    """
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


def run_images(workspace: Workspace) -> pd.DataFrame:
    """Return a run's images for triage; the test split's labels stay sealed.

    Returns:
        One row an image, training before test: ``image_id``, ``study_id``, ``split``, ``fold``
        (missing for a test image), ``path`` of the enhanced image, ``label``, whether it is
        abnormal (missing for a test image; `open_test_labels` has those), and ``lesions``, where
        they lie, as `triage.Sample.load` reads them (empty for a test image).

    Raises:
        DernetError: The dataset is not clean, or its folds are another's.
    """
    dataset = read_dataset(workspace.data_root)
    images = dataset.images
    cached = cache_images(images, workspace.cache, workspace.profile)
    lesions = _places(dataset.boxes[dataset.boxes["split"] == "train"], cached)
    folds = load_folds(workspace, images)[["image_id", "fold"]].astype({"fold": "Int64"})
    label = images.loc[images["split"] == "train", "abnormal"].astype("boolean")
    table = images[["image_id", "study_id", "split"]].assign(label=label)
    table = table.merge(folds, how="left", validate="one_to_one")
    table = table.merge(cached[["image_id", "path"]], validate="one_to_one")
    table["lesions"] = [lesions.get(image, np.empty((0, 3))) for image in table["image_id"]]
    return table.sort_values("split", ascending=False, kind="stable", ignore_index=True)


def _places(boxes: pd.DataFrame, sizes: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return each film's lesions: centre as shares of width and height, number of the type."""
    boxes = boxes.merge(sizes[["image_id", "height", "width"]], validate="many_to_one")
    boxes["x"] = (boxes["xmin"] + boxes["xmax"]) / 2 / boxes["width"]
    boxes["y"] = (boxes["ymin"] + boxes["ymax"]) / 2 / boxes["height"]
    boxes["kind"] = boxes["lesion_type"].map(LESION_TYPES.index)
    return {
        image: rows[["x", "y", "kind"]].to_numpy(float)
        for image, rows in boxes.groupby("image_id", sort=False)
    }


def train_fold(
    workspace: Workspace, name: str, fold: int, progress: Callable[[dict], None] | None = None
) -> Path:
    """Train one network on all folds but one, and keep its probabilities; or find them kept.

    Args:
        workspace: The run.
        name: One of `NETWORKS`.
        fold: The fold that is held out.
        progress: As in `triage.train_triage`.

    Returns:
        The checkpoint. Beside it lies a table of the same name, with the suffix ``.parquet``:
        ``image_id`` and ``prob`` of the images held out and of the test split.

    Raises:
        DernetError: There is no such fold or network, a fold lacks a class, or as
            `triage.train_triage` raises.
    """
    triage_jobs(workspace.profile, name, fold)
    return _train_fold(workspace, run_images(workspace), name, fold, progress)


def _train_fold(
    workspace: Workspace,
    images: pd.DataFrame,
    name: str,
    fold: int,
    progress: Callable[[dict], None] | None,
) -> Path:
    """Do the work of `train_fold`, on images that have been read already."""
    recipe, folds = Recipe.of(workspace.profile), workspace.profile.folds
    held = images[images["fold"] == fold]
    learnt = images[(images["fold"] != fold) & (images["split"] == "train")]
    for rows, words in ((learnt, "the images to learn from"), (held, "the images held out")):
        if rows["label"].nunique() < 2:
            raise DernetError(
                f"With fold {fold} held out, {words} are {len(rows)} of one class; normal and "
                "abnormal ones are needed: take fewer folds or more data."
            )
    trained = train_triage(
        name,
        Sample.load(learnt, recipe.train_px),
        Sample.load(held, recipe.image_px),
        recipe,
        workspace.weights,
        starting_weights(name),
        progress,
        {
            "profile": workspace.profile.name,
            "fold": f"{fold} of {folds}",
            "held_out": hashlib.sha256("".join(held["image_id"]).encode()).hexdigest(),
            "commit": commit(),
        },
    )
    table = trained.checkpoint.with_suffix(".parquet")
    scored = images[(images["fold"] == fold) | (images["split"] == "test")]
    pixels = load_pixels(scored["path"], recipe.image_px)
    # The run's digest knows nothing of test images; the table tells which it holds.
    digest = hashlib.sha256("".join(scored["image_id"]).encode() + pixels.numpy().tobytes())
    if not table.is_file() or pd.read_parquet(table).attrs["scored"] != digest.hexdigest():
        found = scored[["image_id"]].assign(prob=predict_triage(trained.network, pixels))
        found.attrs["scored"] = digest.hexdigest()
        beside = table.with_suffix(".part")
        found.to_parquet(beside, index=False)
        beside.replace(table)
    return trained.checkpoint


def cross_validate(
    workspace: Workspace, name: str, progress: Progress | None = None
) -> CrossValidated:
    """Return a network's probabilities for all images; train what is missing.

    Args:
        workspace: The run.
        name: One of `NETWORKS`.
        progress: Called after each epoch that is trained now.

    Raises:
        DernetError: As `train_fold`.
    """
    images = run_images(workspace)
    found, curves, epochs, checkpoints = [], [], [], []
    for fold in range(workspace.profile.folds):
        after = None if progress is None else lambda row, fold=fold: progress(fold, row)
        checkpoint = _train_fold(workspace, images, name, fold, after)
        found.append(pd.read_parquet(checkpoint.with_suffix(".parquet")).assign(by=fold))
        history = load_trained(name, checkpoint)[1]
        said = history.pop("validation_logits")
        held = images.loc[images["fold"] == fold, "image_id"]
        for epoch, logits in zip(history["epoch"], said, strict=True):
            if logits is not None:
                prob = expit(np.array(logits))
                epochs.append(pd.DataFrame({"image_id": held, "epoch": epoch, "prob": prob}))
        curves.append(history.assign(fold=fold))
        checkpoints.append(checkpoint)
    prob = pd.concat(found).groupby("image_id")["prob"].agg(["mean", "size"])
    train, test = (images[images["split"] == split].copy() for split in ("train", "test"))
    for rows, times in ((train, 1), (test, len(found))):
        if (prob.loc[rows["image_id"], "size"] != times).any():
            raise DernetError(
                f"Each image of the {rows['split'].iloc[0]} split should be scored {times} times "
                f"by {name}: delete {workspace.weights} and train anew."
            )
        rows["prob"] = prob.loc[rows["image_id"], "mean"].to_numpy()
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
    """Write what was chosen out of fold to ``tables/decision.json``; this opens the test labels."""
    path = workspace.tables / "decision.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(asdict(decision), indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def read_decision(workspace: Workspace) -> Decision:
    """Return what was chosen out of fold.

    Raises:
        DernetError: Nothing has been chosen yet, or the file is not what `write_decision` wrote.
    """
    path = workspace.tables / "decision.json"
    if not path.is_file():
        raise DernetError(
            "Weights, thresholds and calibration were expected to be chosen out of fold and "
            f"written to {path}, which is not there: run the chapter on the ensemble first."
        )
    try:
        return Decision(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise DernetError(f"{path} is no decision ({error}): delete it and choose anew.") from error


def open_test_labels(workspace: Workspace) -> np.ndarray:
    """Return whether each test image is abnormal, in the order of `run_images`, shape (n,).

    Raises:
        DernetError: They are still sealed: as `read_decision` raises.
    """
    read_decision(workspace)
    images = read_dataset(workspace.data_root).images
    return images.loc[images["split"] == "test", "abnormal"].to_numpy()

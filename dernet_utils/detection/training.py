"""Training YOLO11-L on boxes, and the checkpoint of a training run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import digest_of, file_digest, modules_digest, write_whole
from dernet_utils.core.packed import read_weights
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.core.weights import starting_weights
from dernet_utils.core.workspace import Workspace
from dernet_utils.detection import yolo
from dernet_utils.detection.images import DetectorRecipe, detection_images, write_training_set
from dernet_utils.detection.prediction import predict_boxes
from dernet_utils.metrics.detection import mean_average_precision

EVALUATIONS = 3  # on the validation fold, spread evenly over a run; each takes a few steps' time
# Modules whose code shapes a training run's result, and with it the run's name.
SHAPING = (
    "detection/training", "detection/images", "detection/augment", "detection/yolo",
    "detection/losses", "imaging/boxes", "core/machine",
)  # fmt: skip


@dataclass(frozen=True)
class TrainedDetector:
    """A finished training run.

    Attributes:
        network: After the last epoch, smoothed (an exponential moving average of the weights), in
            evaluation mode.
        history: One row per epoch: `epoch` from 1, `mosaic`, `box`, `cls`, `dfl` (Eq. 4's terms
            with their weights, means over the epoch), `lr`, `seconds`, and `map50` (mAP@0.5 on
            the validation images; nan where it was not computed).
        checkpoint: The safetensors file with weights and history.
    """

    network: yolo.Detector
    history: pd.DataFrame
    checkpoint: Path

    @property
    def at_cut_off(self) -> Path:
        """File of the smoothed network after the last epoch with mosaic, if there was one."""
        return _at_cut_off(self.checkpoint)


# Training


def train_detector(
    training: pd.DataFrame,
    validation: pd.DataFrame,
    boxes: pd.DataFrame,
    recipe: DetectorRecipe,
    folder: Path,
    weights: Path | None = None,
    progress: Callable[[dict], None] = lambda row: None,
    faint: pd.DataFrame | None = None,
) -> TrainedDetector:
    """Train YOLO11-L, or load it if this run is finished already.

    A run is named by a digest of its settings, images, boxes, starting weights and the code of
    `SHAPING`. A killed run continues after its last finished epoch and ends with the weights of an
    uninterrupted run.

    Args:
        training: `image_id`, `cached_path`, stored `height` and `width`.
        validation: The same of other studies' images, for the learning curve; may be empty.
        boxes: Of both: `image_id`, `lesion_type`, corners in stored pixels.
        recipe: The run's recipe.
        folder: For checkpoints: ``yolo11l-<digest>.safetensors`` of a finished run, and the
            folder ``yolo11l-<digest>`` of one that is not.
        weights: Checkpoint to start from; None for random weights.
        progress: Called with the history's row after each epoch; a resumed run first repeats the
            earlier rows.
        faint: Boxes of findings on the training images that are too faint for a label: there,
            absence of their type is not learnt.

    Raises:
        DernetError: There is no box to train on, or `weights` cannot be read.
    """
    if not boxes["image_id"].isin(training["image_id"]).any():
        raise DernetError(
            "YOLO11-L is trained on boxes, but none of these "
            f"{len(training)} training images has one: pass abnormal images too."
        )
    key = detector_run_key(training, validation, boxes, recipe, weights, faint)
    checkpoint = Path(folder) / f"yolo11l-{key}.safetensors"
    if not checkpoint.is_file():
        _train(training, validation, boxes, recipe, checkpoint, weights, progress, faint)
    return TrainedDetector(*load_detector(checkpoint), checkpoint)


def train_run_detector(
    workspace: Workspace, progress: Callable[[dict], None] = lambda row: None
) -> TrainedDetector:
    """Train a run's detector and write its boxes, unless that has been done.

    The tables are ``tables/yolo11l_validation_boxes.parquet`` and ``…_test_boxes.parquet``, in the
    form of `predict_boxes`.

    Args:
        workspace: The run.
        progress: As `train_detector` takes it.

    Raises:
        DernetError: The run has not been prepared, or as `train_detector` raises.
    """
    sets, recipe = detection_images(workspace), DetectorRecipe.of(workspace.profile)
    trained = train_detector(
        sets.training, sets.validation, sets.boxes, recipe, workspace.weights,
        starting_weights("yolo11l"), progress, sets.faint,
    )  # fmt: skip
    for name, images in (("validation", sets.validation), ("test", sets.test)):
        found = predict_boxes(trained.network, images, recipe.input_size)
        path = workspace.tables / f"yolo11l_{name}_boxes.parquet"
        write_whole(path, lambda part, found=found: found.to_parquet(part, index=False))
    return trained


def load_detector(checkpoint: Path) -> tuple[yolo.Detector, pd.DataFrame]:
    """Return the network, ready for `predict_boxes`, and the learning curve of a finished run.

    Args:
        checkpoint: A file that `train_detector` wrote, packed (`core.packed`) or not.

    Raises:
        DernetError: The file is missing or damaged, or has another number of classes.
    """
    tensors, facts = read_weights(checkpoint)
    history = json.loads(facts["history"])
    network = yolo.build_detector(LESION_TYPES, seed=0)
    classes = len(tensors.get(yolo.CLASS_BIAS, ()))
    if classes != len(LESION_TYPES):
        raise DernetError(
            f"The checkpoint {checkpoint} has {classes} classes instead of {len(LESION_TYPES)}: "
            "train again, or pass it as starting weights."
        )
    network.load_state_dict(tensors)
    return network.to(machine.device()).eval(), pd.DataFrame(history)


def detector_epoch_line(row: dict) -> str:
    """Return one line of a training log.

    >>> detector_epoch_line({"epoch": 3, "mosaic": True, "box": 3.1, "cls": 0.2, "dfl": 2.9,
    ...                      "map50": float("nan"), "seconds": 52.3})
    'epoch  3  mosaic     box 3.10  class 0.200  DFL 2.90  52 s'
    """
    mosaic = "mosaic   " if row["mosaic"] else "no mosaic"
    evaluated = "" if np.isnan(row["map50"]) else f"  validation mAP@0.5 {row['map50']:.3f}"
    return (
        f"epoch {row['epoch']:2d}  {mosaic}  box {row['box']:.2f}  class {row['cls']:.3f}  "
        f"DFL {row['dfl']:.2f}  {row['seconds']:.0f} s{evaluated}"
    )


def detector_run_key(
    training: pd.DataFrame,
    validation: pd.DataFrame,
    boxes: pd.DataFrame,
    recipe: DetectorRecipe,
    weights: Path | None,
    faint: pd.DataFrame | None = None,
) -> str:
    """Return the digest that names a run, 16 hexadecimal digits.

    Args: As `train_detector` takes them; the order of rows does not matter.
    """
    parts = [json.dumps(asdict(recipe), sort_keys=True), modules_digest(*SHAPING)]
    for images in (training, validation):
        for image in images.sort_values("image_id").itertuples():
            parts.append(f"{image.image_id} {image.height} {image.width}")
            parts.append(file_digest(image.cached_path))
        columns = ["image_id", "lesion_type", *CORNERS]
        for some in (boxes, boxes.iloc[:0] if faint is None else faint):
            own = some[some["image_id"].isin(images["image_id"])]
            parts.append(own[columns].sort_values(columns).to_csv(index=False))
    return digest_of(*parts, file_digest(weights) if weights else "random")[:16]


def _train(training, validation, boxes, recipe, checkpoint, weights, progress, faint) -> None:
    """Train the remaining epochs and write the finished checkpoint."""
    kept = checkpoint.with_suffix("")
    settings = write_training_set(training, boxes, recipe, kept, faint)
    evaluate = _evaluator(validation, boxes, recipe, checkpoint)
    trainer = yolo.MosaicDecay(settings, evaluate, progress)
    trainer.model = yolo.build_detector(LESION_TYPES, recipe.seed, weights)
    trainer.model.focal = recipe.focal
    with machine.denormals_flushed():
        trainer.train()
    tensors, history = yolo.read_state(trainer.state_file)
    metadata = {"history": json.dumps(history)}
    write_whole(checkpoint, lambda part: save_file(tensors, part, metadata))
    shutil.rmtree(kept)


def _at_cut_off(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}-mosaic.safetensors")


def _evaluator(validation, boxes, recipe, checkpoint) -> Callable[[int, torch.nn.Module], dict]:
    """Return what to do after an epoch: store the network at the cut-off, or evaluate it."""
    numbers = range(1, EVALUATIONS + 1)
    evaluated = {round(recipe.epochs * number / EVALUATIONS) for number in numbers}
    truth = boxes[boxes["image_id"].isin(validation["image_id"])]

    def evaluate(epoch: int, network: torch.nn.Module) -> dict:
        if epoch == recipe.mosaic_until - 1:
            tensors = {k: v.contiguous().cpu() for k, v in network.state_dict().items()}
            write_whole(_at_cut_off(checkpoint), lambda part: save_file(tensors, part))
        if epoch not in evaluated or not len(truth):
            return {"map50": float("nan")}
        found = predict_boxes(network, validation, recipe.input_size)
        return {"map50": mean_average_precision(truth, found)[0]}

    return evaluate

"""Where the lesions are: YOLO11-L trained on boxes, and its boxes on new films."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import modules_digest
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.detection import yolo
from dernet_utils.detection.images import DetectorRecipe, write_training_set
from dernet_utils.detection.prediction import predict_boxes
from dernet_utils.metrics.detection import mean_average_precision

# Of the network on the validation fold, spread evenly over a run: each costs a few steps' time.
EVALUATIONS = 3
# Modules that decide what a training comes to.
SHAPING = (
    "detection/training", "detection/images", "detection/augment", "detection/yolo",
    "detection/losses", "imaging/boxes", "core/machine",
)  # fmt: skip


@dataclass(frozen=True)
class TrainedDetector:
    """What a training run leaves.

    Attributes:
        network: The smoothed network after the last epoch, in evaluation mode.
        history: One row an epoch: `epoch` from 1, `mosaic`, `box`, `cls`, `dfl` (Eq. 4's terms
            with their weights, means over the epoch), `lr`, `seconds`, and `map50` (mAP@0.5 of
            the validation films; nan where not looked at).
        checkpoint: The safetensors file with weights and history.
    """

    network: yolo.Detector
    history: pd.DataFrame
    checkpoint: Path

    @property
    def at_cut_off(self) -> Path:
        """The smoothed network's tensors after the last epoch with mosaic, where there was one."""
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
) -> TrainedDetector:
    """Train YOLO11-L, or load it where this very run is finished.

    A run is named by a digest of its numbers, films, boxes, starting weights and the code
    of `SHAPING`. One that was killed goes on after its last
    finished epoch, to the same weights as if it had not been.

    Args:
        training: `image_id`, `cached_path`, stored `height` and `width`.
        validation: The same of other studies' films, for the learning curve; may be empty.
        boxes: Of both: `image_id`, `lesion_type`, corners in stored pixels.
        recipe: The run's recipe.
        folder: Where checkpoints lie; one run is ``yolo11l-<digest>.safetensors``, and the folder
            ``yolo11l-<digest>`` while it is not finished.
        weights: Checkpoint to start from; None for random weights.
        progress: Called with the history's row after each epoch, those before a resumption
            included.

    Raises:
        DernetError: No box to learn from, or a checkpoint that cannot be read.
    """
    if not boxes["image_id"].isin(training["image_id"]).any():
        raise DernetError(
            "YOLO11-L learns from boxes, and none of these "
            f"{len(training)} training films has one: pass abnormal films too."
        )
    key = detector_run_key(training, validation, boxes, recipe, weights)
    checkpoint = Path(folder) / f"yolo11l-{key}.safetensors"
    if not checkpoint.is_file():
        _train(training, validation, boxes, recipe, checkpoint, weights, progress)
    return TrainedDetector(*load_detector(checkpoint), checkpoint)


def load_detector(checkpoint: Path) -> tuple[yolo.Detector, pd.DataFrame]:
    """Return the network, ready for `predict_boxes`, and the learning curve of a finished run.

    Args:
        checkpoint: A file that `train_detector` left.

    Raises:
        DernetError: It is of another number of classes.
    """
    with safe_open(checkpoint, framework="pt") as file:
        history = json.loads(file.metadata()["history"])
    network, tensors = yolo.build_detector(LESION_TYPES, seed=0), load_file(checkpoint)
    classes = len(tensors.get(yolo.CLASS_BIAS, ()))
    if classes != len(LESION_TYPES):
        raise DernetError(
            f"The checkpoint {checkpoint} is of {classes} classes, and {len(LESION_TYPES)} are "
            "asked for: train again, or pass it as starting weights."
        )
    network.load_state_dict(tensors)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device).eval(), pd.DataFrame(history)


def detector_epoch_line(row: dict) -> str:
    """Return one line of a training log.

    >>> detector_epoch_line({"epoch": 3, "mosaic": True, "box": 3.1, "cls": 0.2, "dfl": 2.9,
    ...                      "map50": float("nan"), "seconds": 52.3})
    'epoch  3  mosaic     box 3.10  class 0.200  DFL 2.90  52 s'
    """
    mosaic = "mosaic   " if row["mosaic"] else "no mosaic"
    looked = "" if np.isnan(row["map50"]) else f"  validation mAP@0.5 {row['map50']:.3f}"
    return (
        f"epoch {row['epoch']:2d}  {mosaic}  box {row['box']:.2f}  class {row['cls']:.3f}  "
        f"DFL {row['dfl']:.2f}  {row['seconds']:.0f} s{looked}"
    )


def detector_run_key(
    training: pd.DataFrame,
    validation: pd.DataFrame,
    boxes: pd.DataFrame,
    recipe: DetectorRecipe,
    weights: Path | None,
) -> str:
    """Return the name of a run: equal inputs, equal name. As `train_detector` takes them."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    digest.update(modules_digest(*SHAPING).encode())
    for images in (training, validation):
        for image in images.sort_values("image_id").itertuples():
            digest.update(f"{image.image_id} {image.height} {image.width}".encode())
            digest.update(Path(image.cached_path).read_bytes())
        own = boxes[boxes["image_id"].isin(images["image_id"])]
        columns = ["image_id", "lesion_type", *CORNERS]
        digest.update(own[columns].sort_values(columns).to_csv(index=False).encode())
    digest.update(weights.read_bytes() if weights else b"random")
    return digest.hexdigest()[:16]


def _train(training, validation, boxes, recipe, checkpoint, weights, progress) -> None:
    """Run the epochs that are still to be run and leave a finished checkpoint."""
    kept = checkpoint.with_suffix("")
    settings = write_training_set(training, boxes, recipe, kept)
    look = _evaluator(validation, boxes, recipe, checkpoint)
    trainer = yolo.MosaicDecay(settings, look, progress)
    trainer.model = yolo.build_detector(LESION_TYPES, recipe.seed, weights)
    trainer.model.focal = recipe.focal
    with machine.denormals_flushed():
        trainer.train()
    tensors, history = yolo.read_state(trainer.state_file)
    half_written = kept / "detector.safetensors"
    save_file(tensors, half_written, {"history": json.dumps(history)})
    half_written.replace(checkpoint)
    shutil.rmtree(kept)


def _at_cut_off(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}-mosaic.safetensors")


def _evaluator(validation, boxes, recipe, checkpoint) -> Callable[[int, torch.nn.Module], dict]:
    """What to do after an epoch: keep the network at the cut-off; the validation films' mAP@0.5.

    The latter a few times a run.
    """
    looks = {round(recipe.epochs * look / EVALUATIONS) for look in range(1, EVALUATIONS + 1)}
    truth = boxes[boxes["image_id"].isin(validation["image_id"])]

    def look(epoch: int, network: torch.nn.Module) -> dict:
        if epoch == recipe.mosaic_until - 1:
            tensors = {k: v.contiguous().cpu() for k, v in network.state_dict().items()}
            save_file(tensors, _at_cut_off(checkpoint))
        if epoch not in looks or not len(truth):
            return {"map50": float("nan")}
        found = predict_boxes(network, validation, recipe.input_size)
        return {"map50": mean_average_precision(truth, found)[0]}

    return look

"""A detector's images: the split, the files that ultralytics reads, augmented training images."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torchvision.ops import box_convert

from dernet_utils.core.profiles import Profile
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.core.workspace import Workspace
from dernet_utils.dataset.folds import make_folds
from dernet_utils.dataset.prepared import read_boxes, read_faint_boxes, read_images
from dernet_utils.detection import losses, yolo
from dernet_utils.detection.augment import SpineDataset, seed_augmentations
from dernet_utils.imaging.boxes import letterbox, to_letterbox
from dernet_utils.imaging.enhance import load_cached

FOLDS = 5  # paper, section 4.1; one is held out, at every profile


@dataclass(frozen=True)
class DetectorRecipe:
    """The settings of one training run.

    Attributes:
        input_size: Height and width of the network's input, px, multiples of 32.
        epochs: Passes over the training images; the network after the last one is kept.
        batch: Images per step.
        lr: Peak of AdamW's learning rate, which then falls to a hundredth along a cosine.
        mosaic_until: tau of Algorithm 1: epochs t < tau, counted from 1, use mosaic.
        gamma, alpha: Eq. 6's exponent, and its weight of a lesion; background weighs 1 - alpha.
        scale: The largest random change of size in augmentation, as a fraction.
        repeat: Whether images with rare lesion types are drawn more often.
        paste: Whether lesions of rare types are pasted into other images.
        seed: Seed of the weights, the order of images and the augmentations.
    """

    input_size: tuple[int, int]
    epochs: int
    batch: int
    lr: float
    mosaic_until: int
    gamma: float = losses.GAMMA
    alpha: float = losses.ALPHA
    scale: float = 0.5  # ultralytics' own
    repeat: bool = False
    paste: bool = False
    seed: int = 42

    @classmethod
    def of(cls, profile: Profile) -> "DetectorRecipe":
        """Return the recipe of a profile."""
        return cls(
            profile.detect_size,
            profile.detect_epochs,
            profile.detect_batch,
            profile.detect_lr,
            profile.mosaic_until,
            profile.focal_gamma,
            profile.focal_alpha,
            profile.detect_scale,
            profile.detect_repeat,
            profile.detect_paste,
            profile.seed,
        )

    @property
    def focal(self) -> dict[str, float]:
        """Arguments of `losses.focal_loss`."""
        return {"gamma": self.gamma, "alpha": self.alpha}

    @property
    def shown(self) -> dict:
        """Entries of `augment.SpineDataset`'s `data`."""
        return {"view": self.input_size, "repeat": self.repeat, "paste": self.paste}


# Images


@dataclass(frozen=True)
class DetectionImages:
    """The images that a run's detector is trained and evaluated on.

    Attributes:
        training: Images with a lesion, of the training studies except fold 0.
        validation: All images of fold 0.
        test: All images of the test split.
        boxes: Of all images: `image_id`, `lesion_type` and corners in stored pixels.
        faint: The same of findings too faint for a label; training ignores predictions there.
    """

    training: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    boxes: pd.DataFrame
    faint: pd.DataFrame


def detection_images(workspace: Workspace) -> DetectionImages:
    """Return a run's enhanced and cached images, split for the detector as in chapter 10.

    Raises:
        DernetError: The run has not been prepared.
    """
    images = read_images(workspace)
    train = images[images["split"] == "train"]
    folds = make_folds(train, FOLDS, workspace.profile.seed).set_index("image_id")["fold"]
    fold = images["image_id"].map(folds)
    return DetectionImages(
        images[(fold > 0) & images["abnormal"]],
        images[fold == 0],
        images[images["split"] == "test"].reset_index(drop=True),
        read_boxes(workspace),
        read_faint_boxes(workspace),
    )


def export_yolo(
    images: pd.DataFrame,
    boxes: pd.DataFrame,
    view: tuple[int, int],
    folder: Path,
    faint: pd.DataFrame | None = None,
) -> Path:
    """Write images and boxes in the form that YOLO is trained on.

    Args:
        images: `image_id`, `cached_path`, and the stored image's `height` and `width`.
        boxes: `image_id`, `lesion_type` and corners in stored pixels.
        view: Height and width of the written images, px; they are letterboxed.
        folder: Replaced where it exists.
        faint: Boxes, like `boxes`, in which a prediction of their type is to be ignored.

    Returns:
        The folder of images; ``labels`` beside it holds one text file per image, with a line
        ``class x y width height`` per box: class in the order of LESION_TYPES, of a faint finding
        in the same order after the last one; centre and size as fractions of the image. An image
        without lesions has an empty file.
    """
    boxes = boxes.assign(number=boxes["lesion_type"].map(LESION_TYPES.index))
    if faint is not None:
        number = faint["lesion_type"].map(LESION_TYPES.index) + len(LESION_TYPES)
        boxes = pd.concat([boxes, faint.assign(number=number)]).astype({"number": int})
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    of_image = dict(list(boxes.groupby("image_id")))
    for image in images.itertuples():
        filled, place = letterbox(load_cached(image.cached_path), view)
        cv2.imwrite(str(folder / "images" / f"{image.image_id}.png"), filled)
        own = of_image.get(image.image_id, boxes.iloc[:0])
        corners = to_letterbox(
            own[list(CORNERS)].to_numpy(np.float64), place, image.height, image.width
        )
        lines = _label_lines(own["number"], corners / np.tile(view[::-1], 2))
        labels = folder / "labels" / f"{image.image_id}.txt"
        labels.write_text("".join(lines), encoding="utf-8")
    return folder / "images"


def _label_lines(numbers: pd.Series, fractions: np.ndarray) -> list[str]:
    centres = box_convert(torch.from_numpy(fractions), "xyxy", "cxcywh")
    return [
        f"{number} " + " ".join(f"{value:.6f}" for value in row) + "\n"
        for number, row in zip(numbers, centres.tolist(), strict=True)
    ]


def write_training_set(
    images: pd.DataFrame,
    boxes: pd.DataFrame,
    recipe: DetectorRecipe,
    folder: Path,
    faint: pd.DataFrame | None = None,
) -> dict:
    """Write the files that a training run reads, and return ultralytics' settings for it.

    Args:
        images, boxes, faint: As `export_yolo` takes them.
        recipe: The run's recipe.
        folder: For the images, the run's description, and the trainer's own files.
    """
    exported = export_yolo(images, boxes, recipe.input_size, folder / "yolo", faint)
    run = yolo.write_run(folder, exported, LESION_TYPES, recipe.mosaic_until, **recipe.shown)
    return trainer_settings(recipe, run, folder / "trainer")


def augmented_dataset(
    images: pd.DataFrame,
    boxes: pd.DataFrame,
    recipe: DetectorRecipe,
    folder: Path,
    mosaic: bool = False,
) -> SpineDataset:
    """Return images augmented as in training, each once.

    Args:
        images, boxes, folder: As `export_yolo` takes them.
        recipe: Its input size and augmentations.
        mosaic: Whether to augment as in an epoch with mosaic.
    """
    exported = str(export_yolo(images, boxes, recipe.input_size, folder))
    hyp = yolo.settings_of(trainer_settings(recipe, folder, folder))
    data = {"names": dict(enumerate(LESION_TYPES)), "nc": len(LESION_TYPES), "channels": 3}
    dataset = SpineDataset(
        exported, imgsz=max(recipe.input_size), augment=True, hyp=hyp, data=data | recipe.shown
    )
    dataset.set_mosaic(hyp, mosaic)
    return dataset


def augmented_images(
    images: pd.DataFrame, boxes: pd.DataFrame, recipe: DetectorRecipe, epoch: int, folder: Path
) -> Iterator[tuple[np.ndarray, pd.DataFrame]]:
    """Yield each image once, augmented as in an epoch.

    Args:
        images, boxes: As `export_yolo` takes them.
        recipe: Its `mosaic_until` decides whether the epoch is one with mosaic.
        epoch: From 1.
        folder: For the exported images; replaced where it exists.

    Yields:
        The augmented image, 8-bit, of the input's size, and its boxes: `lesion_type` and corners
        in its pixels.
    """
    dataset = augmented_dataset(images, boxes, recipe, folder, mosaic=epoch < recipe.mosaic_until)
    seed_augmentations(recipe.seed)
    sides = recipe.input_size[::-1]
    for number in range(len(dataset)):
        augmented = dataset[number]
        corners = box_convert(augmented["bboxes"], "cxcywh", "xyxy").numpy() * np.tile(sides, 2)
        shown = pd.DataFrame(corners, columns=list(CORNERS))
        shown["lesion_type"] = [LESION_TYPES[int(c)] for c in augmented["cls"].ravel()]
        yield augmented["img"][0].numpy(), shown


def unseen_types(training: pd.DataFrame, boxes: pd.DataFrame) -> list[str]:
    """Return the lesion types without a box on the training images; a detector cannot learn them.

    Args:
        training: `image_id`.
        boxes: `image_id` and `lesion_type`.
    """
    own = boxes[boxes["image_id"].isin(training["image_id"])]
    return [name for name in LESION_TYPES if not (own["lesion_type"] == name).any()]


def trainer_settings(recipe: DetectorRecipe, run: Path, folder: Path) -> dict:
    """Return ultralytics' settings: the paper's, the companion code's, and those for a short run.

    Args:
        recipe: The run's recipe.
        run: The file of `yolo.write_run`.
        folder: For the trainer's own files.
    """
    return {
        "model": "yolo11l.yaml", "save_dir": str(folder), "data": str(run), "pretrained": False,
        "imgsz": max(recipe.input_size), "epochs": recipe.epochs, "batch": recipe.batch,
        "nbs": recipe.batch,  # one optimiser step per batch
        "optimizer": "AdamW", "lr0": recipe.lr, "lrf": 0.01, "cos_lr": True,
        "weight_decay": 5e-4,
        "warmup_epochs": recipe.epochs * 3 / 55,  # 3 of the paper's 55 epochs
        "warmup_bias_lr": 0.0,  # ultralytics' 0.1 is meant for SGD
        "box": 7.5, "cls": 0.5, "dfl": 1.5,  # paper, Eq. 4
        "mosaic": 1.0, "close_mosaic": 0,  # MosaicDecay closes it
        "degrees": 5.0, "translate": 0.1, "scale": recipe.scale,
        "fliplr": 0.5, "flipud": 0.0,  # no radiograph is upside down
        "copy_paste": 0.2,  # moves outlines; boxes have none, so it does nothing here
        "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.2,  # grey images; brightness as for triage
        "augmentations": [], "mixup": 0.0, "cutmix": 0.0,
        "seed": recipe.seed, "deterministic": True, "workers": 0, "cache": False,
        "amp": False,  # its check would download weights; the forward pass uses bfloat16 anyway
        "val": False, "plots": False, "patience": 0, "verbose": False, "exist_ok": True,
    }  # fmt: skip

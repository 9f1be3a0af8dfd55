"""Where the lesions are: YOLO11-L trained on boxes, and its boxes on new films."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.ops import batched_nms, box_convert

from dernet_utils import losses, machine, views, yolo
from dernet_utils.data import CORNERS, LESION_TYPES, make_folds, read_dataset
from dernet_utils.detection_metrics import mean_average_precision
from dernet_utils.errors import DernetError
from dernet_utils.imaging import cache_images, letterbox, load_cached, to_stored, to_view
from dernet_utils.pipeline import MAX_BOXES, NMS_IOU
from dernet_utils.profiles import Profile
from dernet_utils.views import SpineDataset, seed_augmentations
from dernet_utils.workspace import Workspace

COLUMNS = ["image_id", "lesion_type", *CORNERS, "score"]
MIN_SCORE = 0.001  # ultralytics' floor for evaluation: a curve needs the weak boxes too
FOLDS = 5  # paper, section 4.1; one is held out, at every profile
LOOKS = 3  # at the validation fold, spread evenly over a run: each costs as much as a few steps


@dataclass(frozen=True)
class Recipe:
    """The numbers of one training run.

    Attributes:
        view: Height and width of the network's input, px, multiples of 32.
        epochs: Passes over the training images; all are made, the last one counts.
        batch: Images a step.
        lr: Peak of AdamW's learning rate, which then falls to a hundredth along a cosine.
        mosaic_until: tau of Algorithm 1: epochs t < tau, counted from 1, are with mosaic.
        gamma, alpha: Eq. 6's exponent, and its weight of a lesion; 1 - alpha is that of none.
        scale: How much larger or smaller a training film may be shown, as a share.
        repeat: Whether films of rare lesion types are drawn more often.
        paste: Whether lesions of rare types are pasted into other films.
        seed: Seed of the weights, the order of images and the augmentations.
    """

    view: tuple[int, int]
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
    def of(cls, profile: Profile) -> "Recipe":
        """Return the recipe that a profile asks for."""
        return cls(
            profile.detect_view,
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
        """What `dernet_utils.losses.focal_loss` is told."""
        return {"gamma": self.gamma, "alpha": self.alpha}

    @property
    def shown(self) -> dict:
        """What `dernet_utils.views.SpineDataset` is told of the views."""
        return {"view": self.view, "repeat": self.repeat, "paste": self.paste}


@dataclass(frozen=True)
class Trained:
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


# Images


@dataclass(frozen=True)
class Films:
    """What a run's detector learns from and is judged on.

    Attributes:
        training: Films that show a lesion, of the training studies but fold 0.
        validation: All films of fold 0.
        test: All films of the test split.
        boxes: Of all films: `image_id`, `lesion_type` and corners in stored pixels.
    """

    training: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    boxes: pd.DataFrame


def run_films(workspace: Workspace) -> Films:
    """Return a run's films, enhanced and cached, as chapter 10 deals them.

    Raises:
        DernetError: The dataset is not clean.
    """
    dataset = read_dataset(workspace.data_root)
    cached = cache_images(dataset.images, workspace.cache, workspace.profile)
    images = dataset.images.drop(columns="path").merge(cached, on="image_id", validate="one_to_one")
    learnt = dataset.images[dataset.images["split"] == "train"]
    dealt = make_folds(learnt, FOLDS, workspace.profile.seed).set_index("image_id")["fold"]
    fold = images["image_id"].map(dealt)
    return Films(
        images[(fold > 0) & images["abnormal"]],
        images[fold == 0],
        images[images["split"] == "test"].reset_index(drop=True),
        dataset.boxes,
    )


def export_yolo(
    images: pd.DataFrame, boxes: pd.DataFrame, view: tuple[int, int], folder: Path
) -> Path:
    """Write films and boxes in the form that YOLO trains on.

    Args:
        images: `image_id`, cached `path`, and the stored image's `height` and `width`.
        boxes: `image_id`, `lesion_type` and corners in stored pixels.
        view: Height and width of the written images, px; films are letterboxed.
        folder: Replaced where it exists.

    Returns:
        The folder of images; ``labels`` beside it holds one text file an image, with a line
        ``class x y width height`` a box: class in the order of LESION_TYPES, centre and size as
        fractions of the image. A film without lesions has an empty file.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    of_image = dict(list(boxes.groupby("image_id")))
    for image in images.itertuples():
        filled, place = letterbox(load_cached(image.path), view)
        cv2.imwrite(str(folder / "images" / f"{image.image_id}.png"), filled)
        own = of_image.get(image.image_id, boxes.iloc[:0])
        corners = to_view(own[list(CORNERS)].to_numpy(np.float64), place, image.height, image.width)
        lines = _label_lines(own["lesion_type"], corners / np.tile(view[::-1], 2))
        (folder / "labels" / f"{image.image_id}.txt").write_text("".join(lines))
    return folder / "images"


def _label_lines(lesion_types: pd.Series, fractions: np.ndarray) -> list[str]:
    centres = box_convert(torch.from_numpy(fractions), "xyxy", "cxcywh")
    classes = [LESION_TYPES.index(name) for name in lesion_types]
    return [
        f"{number} " + " ".join(f"{value:.6f}" for value in row) + "\n"
        for number, row in zip(classes, centres.tolist(), strict=True)
    ]


def write_films(images: pd.DataFrame, boxes: pd.DataFrame, recipe: Recipe, folder: Path) -> dict:
    """Write what a training reads, and return ultralytics' settings for it.

    Args:
        images, boxes: As `export_yolo` takes them.
        recipe: The run's recipe.
        folder: For the films, the list of what is trained on, and what the trainer leaves.
    """
    films = export_yolo(images, boxes, recipe.view, folder / "yolo")
    run = yolo.write_run(folder, films, LESION_TYPES, recipe.mosaic_until, **recipe.shown)
    return _settings(recipe, run, folder / "trainer")


def films_shown(
    images: pd.DataFrame, boxes: pd.DataFrame, recipe: Recipe, folder: Path, mosaic: bool = False
) -> SpineDataset:
    """Return films as a training shows them, each once.

    Args:
        images, boxes, folder: As `export_yolo` takes them.
        recipe: Its view and augmentations.
        mosaic: Whether as in an epoch with mosaic.
    """
    films = str(export_yolo(images, boxes, recipe.view, folder))
    hyp = yolo.settings_of(_settings(recipe, folder, folder))
    data = {"names": dict(enumerate(LESION_TYPES)), "nc": len(LESION_TYPES), "channels": 3}
    dataset = SpineDataset(
        films, imgsz=max(recipe.view), augment=True, hyp=hyp, data=data | recipe.shown
    )
    dataset.set_mosaic(hyp, mosaic)
    return dataset


def training_views(
    images: pd.DataFrame, boxes: pd.DataFrame, recipe: Recipe, epoch: int, folder: Path
) -> Iterator[tuple[np.ndarray, pd.DataFrame]]:
    """Yield what the network may be shown of each film in an epoch.

    Args:
        images, boxes: As `export_yolo` takes them.
        recipe: Its `mosaic_until` decides whether the epoch is one with mosaic.
        epoch: From 1.
        folder: Where the films are exported to; replaced where it exists.

    Yields:
        The augmented film, 8-bit, of the view's shape, and its boxes, with `lesion_type`
        and corners in its pixels.
    """
    dataset = films_shown(images, boxes, recipe, folder, mosaic=epoch < recipe.mosaic_until)
    seed_augmentations(recipe.seed)
    sides = recipe.view[::-1]
    for number in range(len(dataset)):
        view = dataset[number]
        corners = box_convert(view["bboxes"], "cxcywh", "xyxy").numpy() * np.tile(sides, 2)
        shown = pd.DataFrame(corners, columns=list(CORNERS))
        shown["lesion_type"] = [LESION_TYPES[int(c)] for c in view["cls"].ravel()]
        yield view["img"][0].numpy(), shown


# Training


def train_detector(
    training: pd.DataFrame,
    validation: pd.DataFrame,
    boxes: pd.DataFrame,
    recipe: Recipe,
    folder: Path,
    weights: Path | None = None,
    progress: Callable[[dict], None] = lambda row: None,
) -> Trained:
    """Train YOLO11-L, or load it where this very run is finished.

    A run is named by a digest of its numbers, films, boxes, starting weights and the source text
    of this module, `views`, `yolo` and `losses`. One that was killed goes on after its last
    finished epoch, to the same weights as if it had not been.

    Args:
        training: `image_id`, cached `path`, stored `height` and `width`.
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
    key = run_key(training, validation, boxes, recipe, weights)
    checkpoint = Path(folder) / f"yolo11l-{key}.safetensors"
    if not checkpoint.is_file():
        _train(training, validation, boxes, recipe, checkpoint, weights, progress)
    return Trained(*load_detector(checkpoint), checkpoint)


def unseen_types(training: pd.DataFrame, boxes: pd.DataFrame) -> list[str]:
    """Return the lesion types without a box on the training films: none of them will be found."""
    own = boxes[boxes["image_id"].isin(training["image_id"])]
    return [name for name in LESION_TYPES if not (own["lesion_type"] == name).any()]


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


def epoch_line(row: dict) -> str:
    """Return one line of a training log.

    >>> epoch_line({"epoch": 3, "mosaic": True, "box": 3.1, "cls": 0.2, "dfl": 2.9,
    ...             "map50": float("nan"), "seconds": 52.3})
    'epoch  3  mosaic     box 3.10  class 0.200  DFL 2.90  52 s'
    """
    mosaic = "mosaic   " if row["mosaic"] else "no mosaic"
    looked = "" if np.isnan(row["map50"]) else f"  validation mAP@0.5 {row['map50']:.3f}"
    return (
        f"epoch {row['epoch']:2d}  {mosaic}  box {row['box']:.2f}  class {row['cls']:.3f}  "
        f"DFL {row['dfl']:.2f}  {row['seconds']:.0f} s{looked}"
    )


def run_key(
    training: pd.DataFrame,
    validation: pd.DataFrame,
    boxes: pd.DataFrame,
    recipe: Recipe,
    weights: Path | None,
) -> str:
    """Return the name of a run: equal inputs, equal name. As `train_detector` takes them."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for module in (Path(__file__), *(Path(m.__file__) for m in (losses, views, yolo))):
        digest.update(module.read_bytes())
    for images in (training, validation):
        for image in images.sort_values("image_id").itertuples():
            digest.update(f"{image.image_id} {image.height} {image.width}".encode())
            digest.update(Path(image.path).read_bytes())
        own = boxes[boxes["image_id"].isin(images["image_id"])]
        columns = ["image_id", "lesion_type", *CORNERS]
        digest.update(own[columns].sort_values(columns).to_csv(index=False).encode())
    digest.update(weights.read_bytes() if weights else b"random")
    return digest.hexdigest()[:16]


def _train(training, validation, boxes, recipe, checkpoint, weights, progress) -> None:
    """Run the epochs that are still to be run and leave a finished checkpoint."""
    kept = checkpoint.with_suffix("")
    settings = write_films(training, boxes, recipe, kept)
    look = _looker(validation, boxes, recipe, checkpoint)
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


def _looker(validation, boxes, recipe, checkpoint) -> Callable[[int, torch.nn.Module], dict]:
    """What to do after an epoch: keep the network at the cut-off; the validation films' mAP@0.5.

    The latter a few times a run.
    """
    looks = {round(recipe.epochs * look / LOOKS) for look in range(1, LOOKS + 1)}
    truth = boxes[boxes["image_id"].isin(validation["image_id"])]

    def look(epoch: int, network: torch.nn.Module) -> dict:
        if epoch == recipe.mosaic_until - 1:
            tensors = {k: v.contiguous().cpu() for k, v in network.state_dict().items()}
            save_file(tensors, _at_cut_off(checkpoint))
        if epoch not in looks or not len(truth):
            return {"map50": float("nan")}
        found = predict_boxes(network, validation, recipe.view)
        return {"map50": mean_average_precision(truth, found)[0]}

    return look


def _settings(recipe: Recipe, run: Path, folder: Path) -> dict:
    """ultralytics' settings: the paper's, its companion code's, and what a short run needs."""
    return {
        "model": "yolo11l.yaml", "save_dir": str(folder), "data": str(run), "pretrained": False,
        "imgsz": max(recipe.view), "epochs": recipe.epochs, "batch": recipe.batch,
        "nbs": recipe.batch,  # one optimiser step a batch
        "optimizer": "AdamW", "lr0": recipe.lr, "lrf": 0.01, "cos_lr": True,
        "weight_decay": 5e-4,
        "warmup_epochs": recipe.epochs * 3 / 55,  # 3 of the paper's 55 epochs
        "warmup_bias_lr": 0.0,  # ultralytics' 0.1 is meant for SGD
        "box": 7.5, "cls": 0.5, "dfl": 1.5,  # paper, Eq. 4
        "mosaic": 1.0, "close_mosaic": 0,  # MosaicDecay closes it
        "degrees": 5.0, "translate": 0.1, "scale": recipe.scale,
        "fliplr": 0.5, "flipud": 0.0,  # no film hangs upside down
        "copy_paste": 0.2,  # moves outlines; boxes have none, so it does nothing here
        "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.2,  # grey films; brightness as the classifiers'
        "augmentations": [], "mixup": 0.0, "cutmix": 0.0,
        "seed": recipe.seed, "deterministic": True, "workers": 0, "cache": False,
        "amp": False,  # its check would download weights; the forward pass is bfloat16 anyway
        "val": False, "plots": False, "patience": 0, "verbose": False, "exist_ok": True,
    }  # fmt: skip


# Prediction


def predict_boxes(
    network: yolo.Detector, images: pd.DataFrame, view: tuple[int, int], batch: int = 16
) -> pd.DataFrame:
    """Return the boxes that a network finds, the surest of each film first.

    Overlapping boxes of one lesion type are thinned by non-maximum suppression at IoU 0.5
    (Algorithm 1, line 18).

    Args:
        network: YOLO11; it is left in evaluation mode.
        images: `image_id`, cached `path`, stored `height` and `width`.
        view: Height and width of the network's input, px.
        batch: Films a forward pass.

    Returns:
        `image_id`, `lesion_type`, `xmin` … `ymax` in stored pixels within the image, and `score`,
        the probability in [0.001, 1].
    """
    network.eval()
    return collect_boxes(network.answers, images, view, batch)


def collect_boxes(
    raw: Callable[[torch.Tensor], Iterable[torch.Tensor]],
    images: pd.DataFrame,
    view: tuple[int, int],
    batch: int = 16,
) -> pd.DataFrame:
    """Return the boxes of any detector, as `predict_boxes` does.

    Args:
        raw: Takes letterboxed films (B, 3, H, W) in [0, 1]; gives for each what `suppress` takes.
        images, view, batch: As `predict_boxes` takes them.
    """
    films, found = list(images.itertuples()), []
    for first in range(0, len(films), batch):
        some = films[first : first + batch]
        filled, places = zip(*(letterbox(load_cached(f.path), view) for f in some), strict=True)
        shown = torch.from_numpy(np.stack(filled)).to(machine.device())
        shown = (shown[:, None].float() / 255).expand(-1, 3, -1, -1)
        with torch.no_grad():
            answers = list(raw(shown.contiguous(memory_format=torch.channels_last)))
        for film, place, answer in zip(some, places, answers, strict=True):
            corners, classes, scores = suppress(answer.cpu())
            stored = to_stored(corners.numpy(), place, film.height, film.width)
            found.append(_table(film, stored, classes, scores))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)


def suppress(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin a film's raw boxes by non-maximum suppression (Algorithm 1, line 18).

    Args:
        raw: Centre, width and height in pixels, then one probability a lesion type, of each
            anchor: shape (4 + C, anchors).

    Returns:
        Corners (n, 4) in pixels, classes (n,) and scores (n,), the surest first.
    """
    corners, prob = box_convert(raw[:4].T, "cxcywh", "xyxy"), raw[4:].T
    anchors, classes = (prob > MIN_SCORE).nonzero(as_tuple=True)
    scores = prob[anchors, classes]
    kept = batched_nms(corners[anchors], scores, classes, NMS_IOU)[:MAX_BOXES]
    return corners[anchors[kept]], classes[kept], scores[kept]


def _table(film, xyxy, classes, scores) -> pd.DataFrame:
    table = pd.DataFrame(xyxy, columns=list(CORNERS))
    table.insert(0, "image_id", film.image_id)
    table.insert(1, "lesion_type", [LESION_TYPES[number] for number in classes])
    return table.assign(score=scores.numpy().astype(np.float64))

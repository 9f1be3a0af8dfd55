"""A detector's training images and boxes, augmented as Algorithm 1 defines.

ultralytics reads the images and rotates, shifts, scales and mirrors them. This module adds the
paper's mosaic, upright inputs (a spine is longer than wide), two measures for rare lesion types,
and errors where ultralytics would skip an image.
"""

import random
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

from dernet_utils.core.errors import DernetError
from dernet_utils.detection import offline  # noqa: F401  closes the network before ultralytics is imported

# isort: split
from ultralytics.data.augment import BaseTransform, Compose, Mosaic, RandomPerspective
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils.instance import Instances

CENTRE = (0.3, 0.7)  # paper, Algorithm 1, line 10: the mosaic's centre as a fraction of its width
RARE_BELOW = 1.0  # fraction of images; a type on fewer is repeated. Ours, for a few hundred images
PASTE_FROM = 2.0  # repeat factor from which a type is pasted: one on a quarter of the images
PASTE = 0.3  # fraction of images into which a rare lesion is pasted, with `paste`
MARGIN = 0.25  # surroundings of a pasted lesion that are faded in, as a fraction of its box


def repeat_factors(classes: Sequence[np.ndarray], types: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the repeat factors of lesion types and of images.

    A type on a fraction f of the images gets max(1, sqrt(t / f)), where t is `RARE_BELOW`, and an
    image the largest factor of its types (Gupta et al., LVIS, 2019).

    Args:
        classes: Per image, the numbers of its boxes' types, in any shape.
        types: Number of types.

    Returns:
        Factors of the types, shape (types,), 1 for a type without a box; of the images, shape
        (images,).

    >>> images = [np.array([0])] * 99 + [np.array([0, 1])]
    >>> of_type, of_image = repeat_factors(images, 2)
    >>> of_type.round(2).tolist(), of_image[-2:].round(2).tolist()
    ([1.0, 10.0], [1.0, 10.0])
    """
    shows = np.zeros((len(classes), types), bool)
    for row, own in enumerate(classes):
        shows[row, np.ravel(own).astype(int)] = True
    fraction = shows.mean(axis=0)
    of_type = np.sqrt(RARE_BELOW / np.where(fraction > 0, fraction, RARE_BELOW)).clip(min=1)
    return of_type, np.where(shows, of_type, 1.0).max(axis=1, initial=1.0)


def check_labels(images: Sequence[str], types: int) -> None:
    """Refuse label files that ultralytics would skip, with their images, or treat as empty.

    Args:
        images: Image files, in a folder ``images``; their labels are in ``labels`` beside it.
        types: Number of types. A class from there to twice that number is a box in which a
            prediction of the type `types` below is ignored.

    Raises:
        DernetError: An image has no label file, or a line of it is not such a class and a box
            inside the image.
    """
    for image in map(Path, images):
        path = image.parent.parent / "labels" / f"{image.stem}.txt"
        if not path.is_file():
            raise DernetError(
                f"{image} has no label file {path}: an image without lesions has an empty one. "
                "Export the images again."
            )
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if fault := _fault(line, types):
                raise DernetError(f"{path}, line {number}: {fault}; got {line!r}.")


def _fault(line: str, types: int) -> str:
    """What is wrong with a line of a label file; empty for a correct line."""
    try:
        kind, x, y, width, height = (float(value) for value in line.split())
    except ValueError:
        return "A line is five numbers: class, centre x and y, width and height"
    if kind not in range(2 * types):
        return f"A class is a whole number from 0 to {2 * types - 1}"
    edges = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    tiny = 1e-5  # centre and size are written with six decimals
    if not (width > 0 and height > 0 and (edges >= -tiny).all() and (edges <= 1 + tiny).all()):
        return "A box lies inside the image, in fractions of its width and height"
    return ""


class SpineDataset(YOLODataset):
    """ultralytics' dataset with the paper's mosaic, upright inputs, and measures for rare types.

    Besides ultralytics' own keys, `data` may hold ``view``, height and width of an augmented image
    in place of a square of `imgsz`; ``repeat``, whether images with rare types are drawn more
    often; and ``paste``, whether rare lesions are pasted into other images.
    """

    def get_labels(self) -> list[dict]:
        """Return what ultralytics reads, after `check_labels`.

        Of several boxes with equal class and corners, one is kept.

        Raises:
            DernetError: As `check_labels` raises, or an image cannot be read.
        """
        images, data, types = list(self.im_files), self.data, self.data["nc"]
        check_labels(images, types)
        # ultralytics drops an image with a class that has no name.
        names = {number + types: f"faint {name}" for number, name in data["names"].items()}
        self.data = data | {"names": data["names"] | names}
        labels = super().get_labels()
        self.data = data
        if damaged := sorted(set(images) - {own["im_file"] for own in labels}):
            raise DernetError(f"{damaged[0]} cannot be read: export the images again.")
        self.of_type, self.of_image = repeat_factors(
            [own["cls"][own["cls"] < types] for own in labels], types
        )
        self.rows = np.arange(len(labels))
        return labels

    def __getitem__(self, index: int) -> dict:
        """Return an image, augmented; `index` is its position in the epoch's draw."""
        return super().__getitem__(int(self.rows[index]))

    def draw(self, rng: np.random.Generator) -> None:
        """Draw an epoch's images: each once or, with ``repeat``, in proportion to its factor."""
        if self.data.get("repeat"):
            steps = (np.arange(len(self.rows)) + rng.random()) / len(self.rows)
            self.rows = np.searchsorted(np.cumsum(self.of_image) / self.of_image.sum(), steps)

    def build_transforms(self, hyp: SimpleNamespace | None = None) -> Compose:
        """Return the augmentations, with the paper's mosaic.

        ultralytics draws the mosaic's centre from the middle half of the canvas, and the three
        other images from the last few that it has read; here the centre is Algorithm 1's, and the
        other images are drawn from all.
        """
        transforms = super().build_transforms(hyp)
        if self.augment:
            mosaic = mosaic_of(transforms)
            margin = -round(2 * self.imgsz * CENTRE[0])  # the canvas is 2 x 2 images wide
            mosaic.border = (margin, margin)
            mosaic.buffer_enabled = False
            before = transforms.transforms[0].transforms
            (affine,) = (t for t in before if isinstance(t, RandomPerspective))
            affine.size = tuple(self.data.get("view", [self.imgsz] * 2))[::-1]
            if self.data.get("paste"):
                before.insert(0, PasteRare(self))
        return transforms

    def set_mosaic(self, hyp: SimpleNamespace, on: bool) -> None:
        """Rebuild the augmentations with or without mosaic (Algorithm 1, lines 9 to 13)."""
        hyp = copy(hyp)
        hyp.mosaic = float(on)
        self.transforms = self.build_transforms(hyp)


def mosaic_of(transforms: Compose) -> Mosaic:
    """Return the mosaic among ultralytics' augmentations."""
    (mosaic,) = (t for t in transforms.transforms[0].transforms if isinstance(t, Mosaic))
    return mosaic


class PasteRare(BaseTransform):
    """Paste a lesion of a rare type, its surroundings faded in, where there is no lesion.

    A lesion keeps its relative position: a vertebra is pasted among vertebrae. Boxes give no
    outline, so a rectangle is pasted (Ghiasi et al., 2021, paste outlined objects).

    Args:
        dataset: The images to take lesions from.
    """

    def __init__(self, dataset: SpineDataset):
        self.dataset = dataset
        self.rare = [
            (number, row)
            for number, own in enumerate(dataset.labels)
            for row, kind in enumerate(own["cls"].ravel().astype(int))
            if kind < len(dataset.of_type) and dataset.of_type[kind] >= PASTE_FROM
        ]

    def __call__(self, labels: dict) -> dict:
        """Return the image; with probability `PASTE`, with one more lesion."""
        if not self.rare or random.random() >= PASTE:
            return labels
        number, row = random.choice(self.rare)
        donor = self.dataset.get_image_and_label(number)
        height, width = donor["img"].shape[:2]
        boxes = donor["instances"]
        boxes.convert_bbox("xyxy")
        boxes.denormalize(width, height)
        return self.paste(labels, donor["img"], boxes.bboxes[row], donor["cls"][row])

    @staticmethod
    def paste(labels: dict, donor: np.ndarray, box: np.ndarray, kind: np.ndarray) -> dict:
        """Return an image with another image's lesion pasted at the same relative position.

        Args:
            labels: ultralytics' image and boxes; unchanged where the lesion would overlap another
                or its patch would leave the image.
            donor: The other image, shape (H, W, channels).
            box: The lesion's corners in it, px, shape (4,).
            kind: Its type, shape (1,).
        """
        target, lesions = labels["img"], labels["instances"]
        height, width = target.shape[:2]
        lesions.convert_bbox("xyxy")
        lesions.denormalize(width, height)
        around = MARGIN * np.tile(box[2:] - box[:2], 2) * [-1, -1, 1, 1]
        left, top, right, bottom = np.round(box + around).astype(int)
        left, top = max(left, 0), max(top, 0)
        patch = donor[top:bottom, left:right]
        rows, columns = patch.shape[:2]
        middle = (box[:2] + box[2:]) / 2 / [donor.shape[1], donor.shape[0]]
        x, y = np.round(middle * [width, height] - [columns / 2, rows / 2]).astype(int)
        moved = box + [x - left, y - top] * 2
        free = (lesions.bboxes[:, 2:] <= moved[:2]) | (lesions.bboxes[:, :2] >= moved[2:])
        inside = x >= 0 and y >= 0 and x + columns <= width and y + rows <= height
        if not inside or not free.any(axis=1).all():
            return labels
        fade = np.zeros((rows, columns), np.float32)
        edge_y, edge_x = round(rows * MARGIN / 2), round(columns * MARGIN / 2)
        fade[edge_y : rows - edge_y, edge_x : columns - edge_x] = 1
        fade = cv2.blur(fade, (2 * edge_x + 1, 2 * edge_y + 1))[..., None]
        under = target[y : y + rows, x : x + columns]
        mixed = fade * patch + (1 - fade) * under
        labels["img"] = target.copy()
        labels["img"][y : y + rows, x : x + columns] = mixed.round().astype(target.dtype)
        boxes = np.vstack([lesions.bboxes, moved[None]]).astype(np.float32)
        labels["instances"] = Instances(
            boxes, lesions.segments, bbox_format="xyxy", normalized=False
        )
        labels["cls"] = np.concatenate([labels["cls"], np.reshape(kind, (1, 1))])
        return labels


def seed_augmentations(seed: int) -> None:
    """Seed Python's and NumPy's global generators, which ultralytics' augmentations draw from."""
    random.seed(seed)
    np.random.seed(seed)

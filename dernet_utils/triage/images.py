"""Cached images with their labels, as tensors that a triage network is trained on."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.enhance import load_cached


@dataclass(frozen=True)
class Sample:
    """Images with their labels.

    Attributes:
        pixels: uint8, shape (n, 1, px, px), 0 black to 255 white.
        y: float32, shape (n,), 1 abnormal, 0 normal.
        lesions: float32, shape (k, 4), one row per lesion: row of its image, centre x and y in px
            of the square, number of its type. Needed only for training on crops.
    """

    pixels: Tensor
    y: Tensor
    lesions: Tensor = field(default_factory=lambda: torch.empty(0, 4))

    @classmethod
    def load(cls, images: pd.DataFrame, image_px: int) -> "Sample":
        """Read cached images into memory, each resized to a square.

        Args:
            images: Rows with ``cached_path``, ``label`` (whether abnormal) and optionally
                ``lesions``: for each image an array of shape (k, 3), the centres x and y as
                fractions of width and height, and the number of the type.
            image_px: Side of the square; the aspect ratio is not kept, as in the companion code.

        Raises:
            DernetError: There is no image, or one cannot be read.
        """
        lesions = [
            (row, x * image_px, y * image_px, kind)
            for row, centres in enumerate(images.get("lesions", []))
            for x, y, kind in centres
        ]
        return cls(
            load_pixels(images["cached_path"], image_px),
            torch.tensor(images["label"].to_numpy(np.float32)),
            torch.tensor(lesions, dtype=torch.float32).reshape(-1, 4),
        )

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 1 or self.pixels.dtype != torch.uint8:
            raise DernetError(
                "Images for triage are 8-bit grey, of shape (n, 1, px, px), not "
                f"{self.pixels.dtype} of shape {tuple(self.pixels.shape)}."
            )
        if self.y.shape != self.pixels.shape[:1] or not len(self.y):
            raise DernetError(
                "Triage needs at least one image, and one label per image: got "
                f"{len(self.y)} labels and {len(self.pixels)} images."
            )

    def __len__(self) -> int:
        return len(self.y)


def load_pixels(paths: Iterable[str], image_px: int) -> Tensor:
    """Read cached images, each resized to a square.

    Args:
        paths: Of at least one cached image.
        image_px: Side of the square, px.

    Returns:
        uint8, shape (n, 1, image_px, image_px), 0 black to 255 white.

    Raises:
        DernetError: A file is missing or not an image.
    """
    squares = [
        cv2.resize(load_cached(path), (image_px, image_px), interpolation=cv2.INTER_AREA)
        for path in paths
    ]
    return torch.from_numpy(np.stack(squares)).unsqueeze(1)

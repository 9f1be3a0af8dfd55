"""The parts of a spine, each as a coordinate frame in the donor's millimetres."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Vertebra:
    """A vertebral body as a coordinate frame in the donor's millimetres, vectors as (x, y, z).

    Attributes:
        name: Level, such as ``L1``.
        centre_mm: Centre of the body, shape (3,).
        up: Unit vector from the lower towards the upper endplate, shape (3,).
        front: Unit vector to the anterior, at right angles to `up`, shape (3,).
        height_mm: Mean distance between the endplates.
        depth_mm: From the canal to the anterior wall.
        width_mm: From side to side.
    """

    name: str
    centre_mm: np.ndarray
    up: np.ndarray
    front: np.ndarray
    height_mm: float
    depth_mm: float
    width_mm: float

    @property
    def left(self) -> np.ndarray:
        """Unit vector to the patient's left, shape (3,)."""
        return np.cross(self.up, self.front) * -1.0

    def point(self, left: float = 0.0, front: float = 0.0, up: float = 0.0) -> np.ndarray:
        """Return a position on the body, given in half widths, half depths and half heights.

        ``point(front=1, up=1)`` is the upper front edge; shape (3,), donor millimetres.
        """
        return (
            self.centre_mm
            + self.left * (left * self.width_mm / 2)
            + self.front * (front * self.depth_mm / 2)
            + self.up * (up * self.height_mm / 2)
        )


@dataclass(frozen=True)
class Disc:
    """The disc between two vertebrae, as a coordinate frame in the donor's millimetres.

    Attributes:
        below, above: The vertebrae.
        centre_mm: Centre of the disc, shape (3,).
        up: Unit vector across the disc, shape (3,).
        front: Unit vector to the anterior, at right angles to `up`, shape (3,).
        height_mm: Distance between the two endplates.
    """

    below: Vertebra
    above: Vertebra
    centre_mm: np.ndarray
    up: np.ndarray
    front: np.ndarray
    height_mm: float

    @property
    def name(self) -> str:
        """Level, such as ``T12/L1``."""
        return f"{self.above.name}/{self.below.name}"

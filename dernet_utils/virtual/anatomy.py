"""Landmarks of the donor's spine: a coordinate frame for each vertebra and each disc."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dernet_utils.core.errors import DernetError
from dernet_utils.virtual.donor import LABELS, Donor, load_donor
from dernet_utils.virtual.spine import Disc, Vertebra

LEAST_BODIES = 6  # least number of whole vertebrae in a donor
MID_MM = 7.0  # half width of the midline slab in which the vertebral canal is searched
CUT_MM = 2.5  # one slice: a body that ends closer to the scan's end counts as cut through


class Anatomy(NamedTuple):
    """A donor with its landmarks; vertebrae and discs from the lowest to the highest."""

    donor: Donor
    bodies: list[Vertebra]
    discs: list[Disc]


def load_anatomy(ct: Path | None = None, mask: Path | None = None) -> Anatomy:
    """Load a donor and its landmarks, once per process.

    Args:
        ct, mask: As `load_donor` takes them; None for the built-in donor.

    Raises:
        DernetError: As `load_donor` raises; or fewer than six vertebrae are whole.
    """
    return _load_anatomy(ct, mask)


@cache
def _load_anatomy(ct: Path | None, mask: Path | None) -> Anatomy:
    donor = load_donor(ct, mask)
    bodies = find_vertebrae(donor)
    if len(bodies) < LEAST_BODIES:
        raise DernetError(
            f"The donor shows {len(bodies)} whole vertebrae ({', '.join(b.name for b in bodies)}), "
            f"and a spine radiograph needs {LEAST_BODIES}: take a scan of more of the spine."
        )
    return Anatomy(donor, bodies, find_discs(bodies))


def find_vertebrae(donor: Donor) -> list[Vertebra]:
    """Measure the donor's whole vertebral bodies, from the lowest to the highest.

    Vertebrae that an end of the scan cuts through are left out.
    """
    order = sorted(LABELS)  # TotalSegmentator numbers upwards from the lowest vertebra
    top_mm = (len(donor.labels) - 1) * donor.label_mm[0]
    found = []
    for label in order:
        where = np.argwhere(donor.labels == label)
        if len(where):
            points = where[:, ::-1] * np.array(donor.label_mm[::-1])
            vertebra = _measure(LABELS[label], points)
            ends = [vertebra.point(up=u, front=f)[2] for u in (-1, 1) for f in (-1, 1)]
            if min(ends) > CUT_MM and max(ends) < top_mm - CUT_MM:
                found.append(vertebra)
    return found


def find_discs(vertebrae: list[Vertebra]) -> list[Disc]:
    """Place a disc between each vertebra and the next above."""
    discs = []
    for below, above in pairwise(vertebrae):
        floor, ceiling = below.point(up=1.0), above.point(up=-1.0)
        up = _unit(below.up + above.up)
        front = _unit(_across(below.front + above.front, up))
        height = max(float((ceiling - floor) @ up), 2.0)
        discs.append(Disc(below, above, (floor + ceiling) / 2, up, front, height))
    return discs


def _measure(name: str, points: np.ndarray) -> Vertebra:
    """Separate the body from the arch at the canal, and fit its endplates."""
    middle = np.median(points[:, 0])
    midline = points[np.abs(points[:, 0] - middle) < MID_MM]
    body_back = _canal_front(midline[:, 1])
    body = points[points[:, 1] > body_back]
    body = body[np.abs(body[:, 0] - middle) < 24.0]
    centre = np.array([(np.percentile(b, 2) + np.percentile(b, 98)) / 2 for b in body.T])
    # Endplates: the highest and the lowest voxel of each column, fitted by planes.
    columns = np.round(body[:, :2] / 1.5).astype(int)
    _, column = np.unique(columns, axis=0, return_inverse=True)
    column = column.ravel()
    count = column.max() + 1
    top, base = np.full(count, -np.inf), np.full(count, np.inf)
    np.maximum.at(top, column, body[:, 2])
    np.minimum.at(base, column, body[:, 2])
    position = np.zeros((count, 2))
    np.add.at(position, column, body[:, :2])
    position = position / np.bincount(column)[:, None] - centre[:2]
    inner = (np.abs(position) < 11.0).all(axis=1) & (top - base > 8.0)
    design = np.column_stack([position[inner], np.ones(inner.sum())])
    upper, lower = (np.linalg.lstsq(design, edge[inner], rcond=None)[0] for edge in (top, base))
    centre[2] = (upper[2] + lower[2]) / 2
    slope = (upper[:2] + lower[:2]) / 2
    up = _unit(np.array([-slope[0], -slope[1], 1.0]))
    front = _unit(_across(np.array([0.0, 1.0, 0.0]), up))
    depth, width = (np.percentile(body[:, i], 98) - np.percentile(body[:, i], 2) for i in (1, 0))
    return Vertebra(name, centre, up, front, float(upper[2] - lower[2]), float(depth), float(width))


def _canal_front(y: np.ndarray) -> float:
    """Return the y at which the vertebral body begins, in front of the canal's gap in bone."""
    edges = np.arange(y.min(), y.max() + 1.0, 1.0)
    counts, _ = np.histogram(y, edges)
    smooth = np.convolve(counts, np.ones(5) / 5, "same")
    full = smooth > 0.5 * smooth.max()
    front_run = len(full) - 1 - np.argmax(full[::-1])  # anterior wall
    back = front_run
    while back > 0 and full[back]:
        back -= 1
    return float(edges[back + 1])


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _across(vector: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Return the part of a vector at right angles to a unit axis."""
    return vector - axis * (vector @ axis)

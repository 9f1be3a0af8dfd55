"""Is a file a radiograph of a spine at all? Three layers, each with a reason a person understands.

The header, where there is one; the picture, by a few numbers; and what a network makes of it: how
far its embedding lies from those of training films.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pydicom
from pydicom.multival import MultiValue

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.radiograph import Radiograph
from dernet_utils.inference.pipeline import NetworkOutput

MODALITIES = ("CR", "DX", "RG")  # PS3.3 C.7.3.1.1.1: those in which films of a spine come
WORK_PX = 512  # long side at which a picture is judged
DIMENSIONS = 64  # of the embedding, the training films' most telling ones; ours
RIDGE = 1e-3  # of the mean variance, added to each: a direction without any would count for all


class Reason(NamedTuple):
    """Why a file is no radiograph of a spine.

    Attributes:
        layer: ``header``, ``picture`` or ``network``.
        text: A sentence.
    """

    layer: str
    text: str


# Header


def header_reasons(radiograph: Radiograph) -> list[Reason]:
    """Return what a DICOM header says against its image; nothing of other files.

    A header without modality or body part says nothing.

    Args:
        radiograph: As `imaging.reader` reads it.

    Raises:
        DernetError: An element is malformed.
    """
    if radiograph.header is None:
        return []
    try:
        told, part = (
            _terms(radiograph.header, keyword) for keyword in ("Modality", "BodyPartExamined")
        )
    except Exception as error:  # pydicom converts values when asked, and raises what it likes
        raise DernetError(
            "the DICOM header's modality or body part is malformed; export the image again."
        ) from error
    reasons = []
    if told and not any(modality in MODALITIES for modality in told):
        known = ", ".join(MODALITIES)
        text = f"Its modality is {' and '.join(told)}; a radiograph's is one of {known}."
        reasons.append(Reason("header", text))
    if part and not any(map(_of_the_spine, part)):
        text = f"The body part examined is {' and '.join(part)}, not the spine."
        reasons.append(Reason("header", text))
    return reasons


def _terms(header: pydicom.Dataset, keyword: str) -> list[str]:
    """The values of an element, in capitals; none where it is empty."""
    value = header.get(keyword) or ""
    values = value if isinstance(value, MultiValue) else [value]
    return [term for term in (str(own).strip().upper() for own in values) if term]


def _of_the_spine(part: str) -> bool:
    """Whether a body part is of the spine: PS3.16 Annex L's terms, and what is made of them."""
    return "SPINE" in part or part in ("SACRUM", "COCCYX", "SPINAL", "LUMBAR", "THORACOLUMBAR")


# Picture


class Limit(NamedTuple):
    """Between which ends a number of a picture lies, if it is a radiograph."""

    low: float
    high: float
    text: str


# Wide of all that the training films of a virtual cohort show; chapter 17 has both in a table.
LIMITS = {
    "short_side": Limit(128, np.inf, "Its short side has {:.0f} px, and needs at least 128."),
    "elongation": Limit(1, 8, "It is {:.0f} times as long as wide."),
    "colour": Limit(0, 0.02, "{:.0%} of it is in colour."),
    "range": Limit(60, 255, "Nearly all of it lies within {:.0f} grey levels of 256."),
    "levels": Limit(64, 256, "It has {:.0f} grey levels; a radiograph has more than 64."),
    "paper": Limit(0, 0.35, "{:.0%} of it is one bright grey, as a page or a screen is."),
    "flat": Limit(0, 0.55, "{:.0%} of it is perfectly even, as only drawn pictures are."),
    "smoothness": Limit(0.8, 1, "Neighbouring pixels agree by {:.2f} only, as in noise."),
}


def picture_facts(radiograph: Radiograph) -> dict[str, float]:
    """Return numbers by which a radiograph can be told from other pictures.

    Args:
        radiograph: As `imaging.reader` reads it.

    Returns:
        ``short_side`` in px; ``elongation``, the long side over the short one; ``colour``, the
        share of coloured pixels; ``range`` from the 1st to the 99th percentile and ``levels``, of
        256; ``paper``, the share of the commonest grey above 127; ``flat``, the share of pixels
        between black and white that equal their left and upper neighbour; ``smoothness``, the
        correlation of neighbours, 1 where all are equal.
    """
    grey = radiograph.pixels
    sides = sorted(grey.shape)
    scale = min(1.0, WORK_PX / sides[1])
    size = tuple(max(2, round(side * scale)) for side in grey.shape[::-1])
    small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    counts = np.bincount(grey.ravel(), minlength=256)
    low, high = np.searchsorted(counts.cumsum(), np.array([0.01, 0.99]) * grey.size)
    nearest = cv2.resize(grey, size, interpolation=cv2.INTER_NEAREST)
    middle = nearest[1:, 1:]
    even = (middle == nearest[:-1, 1:]) & (middle == nearest[1:, :-1])
    even &= (nearest.min() < middle) & (middle < nearest.max())
    return {
        "short_side": float(sides[0]),
        "elongation": sides[1] / sides[0],
        "colour": radiograph.coloured,
        "range": float(high - low),
        "levels": float((counts > 0).sum()),
        "paper": float(counts[128:].max() / grey.size),
        "flat": float(even.mean()),
        "smoothness": _smoothness(small.astype(float)),
    }


def _smoothness(grey: np.ndarray) -> float:
    pairs = [(grey[:, 1:], grey[:, :-1]), (grey[1:], grey[:-1])]
    varied = [(a.ravel(), b.ravel()) for a, b in pairs if a.std() and b.std()]
    return float(min((np.corrcoef(a, b)[0, 1] for a, b in varied), default=1.0))


def picture_reasons(facts: dict[str, float]) -> list[Reason]:
    """Return which facts of a picture lie outside `LIMITS`.

    Args:
        facts: As `picture_facts` returns them.

    >>> facts = {name: limit.low for name, limit in LIMITS.items()}
    >>> picture_reasons(facts)
    []
    >>> picture_reasons(facts | {"colour": 0.7})[0].text
    '70% of it is in colour.'
    """
    return [
        Reason("picture", limit.text.format(facts[name]))
        for name, limit in LIMITS.items()
        if not limit.low <= facts[name] <= limit.high
    ]


# Network


@dataclass(frozen=True)
class EmbeddingGate:
    """Which embeddings are like those of training films (Lee et al., NeurIPS 2018).

    Attributes:
        centre: Mean of the training films' embeddings, shape (D,).
        scale: Standard deviation of each of their numbers, shape (D,).
        axes: First directions of what is centred and scaled, each divided by its spread, (D, d).
        rest: Spread of what lies outside these directions.
        limit: An embedding farther than this is of no radiograph of a spine.
    """

    centre: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    rest: float
    limit: float

    def distance(self, embeddings: np.ndarray) -> np.ndarray:
        """Return Mahalanobis distances, shape (n,), of embeddings, shape (n, D).

        Inside the training films' first directions each counts in its own spread; all that lies
        outside counts in one common spread.
        """
        away = (np.asarray(embeddings, float) - self.centre) / self.scale
        inside = away @ self.axes
        directions = self.axes / np.linalg.norm(self.axes, axis=0)
        outside = (away**2).sum(axis=1) - ((away @ directions) ** 2).sum(axis=1)
        return np.sqrt((inside**2).sum(axis=1) + outside.clip(0) / self.rest**2)

    def reasons(self, output: NetworkOutput) -> list[Reason]:
        """Return what a network's output says against a film."""
        (distance,) = self.distance(output.embedding[None])
        if distance <= self.limit:
            return []
        text = (
            f"To the network it looks like none of the radiographs that it learnt from: "
            f"{distance / self.limit:.1f} times as far from them as any may be."
        )
        return [Reason("network", text)]

    def save(self, path: Path) -> Path:
        """Write it as npz."""
        np.savez(path, **{name: np.asarray(value) for name, value in vars(self).items()})
        return path

    @classmethod
    def load(cls, path: Path) -> "EmbeddingGate":
        """Read what `save` wrote.

        Raises:
            DernetError: The file is missing or damaged.
        """
        try:
            with np.load(path) as arrays:
                parts = {name: arrays[name] for name in cls.__dataclass_fields__}
        except (OSError, ValueError, KeyError) as error:
            raise DernetError(
                f"{path} cannot be read ({error}): export the networks again."
            ) from error
        return cls(**parts | {name: float(parts[name]) for name in ("rest", "limit")})


def fit_embedding_gate(
    learnt: np.ndarray, held_out: np.ndarray, rejected: float = 0.025
) -> EmbeddingGate:
    """Return which embeddings are like those of training films.

    Args:
        learnt: Embeddings of films that the network learnt from, shape (n, D).
        held_out: Of training films that it did not learn from, shape (m, D).
        rejected: Share of the latter that may lie beyond the limit.

    Raises:
        DernetError: There are too few films.
    """
    learnt, held_out = np.asarray(learnt, float), np.asarray(held_out, float)
    if len(learnt) < 3 or not len(held_out):
        raise DernetError(
            f"Outliers are told from at least 3 films learnt from and 1 held out, not "
            f"{len(learnt)} and {len(held_out)}."
        )
    centre, scale = learnt.mean(axis=0), learnt.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    _, spread, directions = np.linalg.svd((learnt - centre) / scale, full_matrices=False)
    variance = spread**2 / (len(learnt) - 1)
    kept = min(DIMENSIONS, len(learnt) // 2)
    least = RIDGE * variance.mean() or 1.0  # where all films look the same
    axes = directions[:kept].T / np.sqrt(variance[:kept] + least)
    outside = max(learnt.shape[1] - kept, 1)
    rest = np.sqrt(variance[kept:].sum() / outside + least)
    found = EmbeddingGate(centre, scale, axes, float(rest), np.inf)
    limit = float(np.quantile(found.distance(held_out), 1 - rejected))
    return replace(found, limit=limit)

"""Out-of-distribution (OOD) checks: is a file a radiograph of a spine at all?

Three layers, each of which states its reasons: the DICOM header, if there is one; a few statistics
of the pixels; and the distance of the network's embedding from those of its training images.
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

MODALITIES = ("CR", "DX", "RG")  # of radiographs of a spine (PS3.3 C.7.3.1.1.1)
# Defined terms of Body Part Examined for parts outside the spine (PS3.16, Annex L). The list is
# open: other words and languages, UNKNOWN or OTHER say nothing against a spine.
OTHER_PARTS = frozenset((
    "ABDOMEN", "ABDOMENPELVIS", "ANKLE", "ARM", "AXILLA", "BLADDER", "BRAIN", "BREAST",
    "BRONCHUS", "CALCANEUS", "CALF", "CAROTID", "CHEST", "CLAVICLE", "COLON", "EAR", "ELBOW",
    "ESOPHAGUS", "EXTREMITY", "EYE", "FACE", "FEMUR", "FINGER", "FOOT", "FOREARM",
    "GALLBLADDER", "HAND", "HEAD", "HEADNECK", "HEART", "HIP", "HUMERUS", "ILIUM", "JAW",
    "KIDNEY", "KNEE", "LARYNX", "LEG", "LIVER", "LUNG", "MANDIBLE", "MAXILLA", "MEDIASTINUM",
    "MOUTH", "NECK", "NOSE", "ORBIT", "PANCREAS", "PATELLA", "PELVIS", "PHARYNX", "PROSTATE",
    "RADIUS", "RADIUSULNA", "RECTUM", "RIB", "SCAPULA", "SHOULDER", "SINUS", "SKULL", "SPLEEN",
    "STERNUM", "STOMACH", "THIGH", "THORAX", "THUMB", "THYROID", "TIBIA", "TIBIAFIBULA", "TMJ",
    "TOE", "TRACHEA", "ULNA", "UTERUS", "WRIST", "ZYGOMA",
))  # fmt: skip
SQUARE = 0.01  # pixels whose sides differ by a larger fraction are not square
WORK_PX = 512  # long side at which smoothness and flatness are measured
DIMENSIONS = 64  # principal directions kept of the embedding; ours
RIDGE = 1e-3  # of the mean variance, added to each: else a direction without variance dominates


class Reason(NamedTuple):
    """A reason why a file may not be a radiograph of a spine.

    Attributes:
        layer: ``header``, ``picture`` or ``network``.
        text: A sentence for the user.
    """

    layer: str
    text: str


# --- Header -----------------------------------------------------------------------------------


def header_reasons(radiograph: Radiograph) -> list[Reason]:
    """Return reasons why a DICOM header is not that of a spine radiograph.

    Args:
        radiograph: As `imaging.reader` reads it.

    Returns:
        Empty for a PNG or JPEG, or if the header gives no modality, body part or pixel size.

    Raises:
        DernetError: One of these elements is malformed.
    """
    if radiograph.header is None:
        return []
    try:
        modalities = _terms(radiograph.header, "Modality")
        parts = _terms(radiograph.header, "BodyPartExamined")
        ratio = _pixel_ratio(radiograph.header)
    except Exception as error:  # pydicom converts values on access, and raises many types
        raise DernetError(
            "the DICOM header's modality, body part or pixel size is malformed; export the image "
            "again."
        ) from error
    reasons = []
    if modalities and not any(modality in MODALITIES for modality in modalities):
        accepted = ", ".join(MODALITIES)
        text = f"The modality is {' and '.join(modalities)}, not one of {accepted}."
        reasons.append(Reason("header", text))
    if parts and all(part in OTHER_PARTS for part in parts):
        text = f"The body part examined is {' and '.join(parts)}, not the spine."
        reasons.append(Reason("header", text))
    if abs(ratio - 1) > SQUARE:
        text = f"A pixel is {ratio:.2f} times as high as wide; the networks expect square pixels."
        reasons.append(Reason("header", text))
    return reasons


def _pixel_ratio(header: pydicom.Dataset) -> float:
    """Return a pixel's height over its width (PS3.3 C.7.6.3.1.7, 10.7.1.3); 1 if not given."""
    for keyword in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing"):
        sides = header.get(keyword)
        if isinstance(sides, MultiValue) and len(sides) == 2 and min(map(float, sides)) > 0:
            return float(sides[0]) / float(sides[1])
    return 1.0


def _terms(header: pydicom.Dataset, keyword: str) -> list[str]:
    """Return an element's values in capitals; empty if there are none."""
    value = header.get(keyword) or ""
    values = value if isinstance(value, MultiValue) else [value]
    return [term for term in (str(one).strip().upper() for one in values) if term]


# --- Picture -----------------------------------------------------------------------------------


class Limit(NamedTuple):
    """A statistic's closed range for radiographs, and the reason given for a value outside."""

    low: float
    high: float
    text: str


# With a wide margin around the training images of a virtual cohort; chapter 17 tabulates both.
LIMITS = {
    "short_side": Limit(128, np.inf, "The short side is {:.0f} px; at least 128 px are needed."),
    "elongation": Limit(1, 8, "The long side is {:.0f} times the short side; at most 8 is normal."),
    "colour": Limit(0, 0.02, "{:.0%} of the pixels are in colour."),
    "range": Limit(60, 255, "98% of the pixels lie within {:.0f} of 256 grey levels."),
    "levels": Limit(64, 256, "It has {:.0f} grey levels; a radiograph has at least 64."),
    "paper": Limit(0, 0.35, "{:.0%} of the pixels have one bright grey level, as in a document."),
    "flat": Limit(0, 0.55, "{:.0%} of the pixels equal their neighbours, as in a drawing."),
    "smoothness": Limit(0.8, 1, "Neighbouring pixels correlate by only {:.2f}, as in noise."),
}


def picture_facts(radiograph: Radiograph) -> dict[str, float]:
    """Return statistics that separate radiographs from other pictures.

    Args:
        radiograph: As `imaging.reader` reads it.

    Returns:
        ``short_side`` in px; ``elongation``, the long side over the short one; ``colour``, the
        fraction of coloured pixels; ``range`` from the 1st to the 99th percentile and number of
        ``levels``, of 256; ``paper``, the fraction of pixels with the most frequent grey level
        above 127; ``flat``, the fraction of pixels that equal their left and upper neighbour and
        are neither the darkest nor the brightest; ``smoothness``, the correlation of neighbours in
        [-1, 1], 1 if all are equal.
    """
    grey = radiograph.pixels
    sides = sorted(grey.shape)
    scale = min(1.0, WORK_PX / sides[1])
    size = tuple(max(2, round(side * scale)) for side in grey.shape[::-1])
    small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    counts = np.bincount(grey.ravel(), minlength=256)
    low, high = np.searchsorted(counts.cumsum(), np.array([0.01, 0.99]) * grey.size)
    nearest = cv2.resize(grey, size, interpolation=cv2.INTER_NEAREST)
    inner = nearest[1:, 1:]
    flat = (inner == nearest[:-1, 1:]) & (inner == nearest[1:, :-1])
    flat &= (nearest.min() < inner) & (inner < nearest.max())
    return {
        "short_side": float(sides[0]),
        "elongation": sides[1] / sides[0],
        "colour": radiograph.coloured,
        "range": float(high - low),
        "levels": float((counts > 0).sum()),
        "paper": float(counts[128:].max() / grey.size),
        "flat": float(flat.mean()),
        "smoothness": _smoothness(small.astype(float)),
    }


def _smoothness(grey: np.ndarray) -> float:
    pairs = [(grey[:, 1:], grey[:, :-1]), (grey[1:], grey[:-1])]
    varied = [(a.ravel(), b.ravel()) for a, b in pairs if a.std() and b.std()]
    return float(min((np.corrcoef(a, b)[0, 1] for a, b in varied), default=1.0))


def picture_reasons(facts: dict[str, float]) -> list[Reason]:
    """Return a reason for each statistic outside `LIMITS`.

    Args:
        facts: As `picture_facts` returns them.

    >>> facts = {name: limit.low for name, limit in LIMITS.items()}
    >>> picture_reasons(facts)
    []
    >>> picture_reasons(facts | {"colour": 0.7})[0].text
    '70% of the pixels are in colour.'
    """
    return [
        Reason("picture", limit.text.format(facts[name]))
        for name, limit in LIMITS.items()
        if not limit.low <= facts[name] <= limit.high
    ]


# --- Network -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddingGate:
    """Accepts embeddings that lie near those of training images (Lee et al., NeurIPS 2018).

    Attributes:
        centre: Mean of the training embeddings, shape (D,).
        scale: Standard deviation of each component, shape (D,).
        axes: First principal directions of the centred and scaled embeddings, each divided by its
            standard deviation, shape (D, d).
        rest: Standard deviation outside these directions.
        limit: Largest distance of an embedding that is accepted.
    """

    centre: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    rest: float
    limit: float

    def distance(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the Mahalanobis distances, shape (n,), of embeddings, shape (n, D).

        Each principal direction is scaled by its own standard deviation, and the rest by one common
        standard deviation.
        """
        away = (np.asarray(embeddings, float) - self.centre) / self.scale
        inside = away @ self.axes
        directions = self.axes / np.linalg.norm(self.axes, axis=0)
        outside = (away**2).sum(axis=1) - ((away @ directions) ** 2).sum(axis=1)
        return np.sqrt((inside**2).sum(axis=1) + outside.clip(0) / self.rest**2)

    def reasons(self, output: NetworkOutput) -> list[Reason]:
        """Return the reason why an image is out of distribution; empty if it is not.

        Args:
            output: The network's output for the image, with its embedding.
        """
        (distance,) = self.distance(output.embedding[None])
        if distance <= self.limit:
            return []
        text = (
            "Unlike the training images: the distance of the network's embedding from theirs is "
            f"{distance / self.limit:.1f} times the limit."
        )
        return [Reason("network", text)]

    def save(self, path: Path) -> Path:
        """Write the gate as npz and return its path."""
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
    """Fit the gate to training images, and set its limit with held-out ones.

    Args:
        learnt: Embeddings of images that the network was trained on, shape (n, D).
        held_out: Embeddings of other images of the training split, shape (m, D).
        rejected: Fraction of the held-out images that lie beyond the limit, in [0, 1].

    Raises:
        DernetError: There are too few images.
    """
    learnt, held_out = np.asarray(learnt, float), np.asarray(held_out, float)
    if len(learnt) < 3 or not len(held_out):
        raise DernetError(
            f"The embedding gate needs at least 3 training images and 1 held-out image, not "
            f"{len(learnt)} and {len(held_out)}."
        )
    centre, scale = learnt.mean(axis=0), learnt.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    _, spread, directions = np.linalg.svd((learnt - centre) / scale, full_matrices=False)
    variance = spread**2 / (len(learnt) - 1)
    kept = min(DIMENSIONS, len(learnt) // 2)
    least = RIDGE * variance.mean() or 1.0  # if all embeddings are equal
    axes = directions[:kept].T / np.sqrt(variance[:kept] + least)
    outside = max(learnt.shape[1] - kept, 1)
    rest = np.sqrt(variance[kept:].sum() / outside + least)
    gate = EmbeddingGate(centre, scale, axes, float(rest), np.inf)
    limit = float(np.quantile(gate.distance(held_out), 1 - rejected))
    return replace(gate, limit=limit)

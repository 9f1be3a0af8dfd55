"""Algorithm 1, Phase III: a film's score, the gate, and boxes where it opens.

Networks come in as functions, so that whatever runs them, and what has no torch, can use this.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd

from dernet_utils.ensemble import Decision
from dernet_utils.errors import DernetError
from dernet_utils.imaging import letterbox, preprocess, to_stored

NMS_IOU = 0.5  # paper, Algorithm 1, line 18
MAX_BOXES = 300  # a film; ultralytics' default


class Look(NamedTuple):
    """What a network makes of a film.

    Attributes:
        prob: Probability of abnormal, in [0, 1].
        heat: Where it looks, float (h, w), at least 0, with a sum of 1 or 0 (Grad-CAM); None where
            nobody asked.
        embedding: Means of its early maps, float (D,); None likewise.
    """

    prob: float
    heat: np.ndarray | None = None
    embedding: np.ndarray | None = None


@dataclass(frozen=True)
class Answer:
    """What the pipeline says of a film.

    Attributes:
        score: DERNet's calibrated probability of abnormal, in [0, 1].
        shares: Of each network, its probability before the vote.
        threshold: A film is abnormal where its score exceeds it.
        boxes: `lesion_type`, `xmin` … `ymax` in stored pixels, `score`; the surest first. Empty for
            a film that is not abnormal, and where the detector found nothing.
    """

    score: float
    shares: dict[str, float]
    threshold: float
    boxes: pd.DataFrame

    @property
    def abnormal(self) -> bool:
        """Line 17: whether the score exceeds the threshold."""
        return self.score > self.threshold


@dataclass(frozen=True)
class Pipeline:
    """From a radiograph to an answer.

    Attributes:
        triage: Each network by name: takes the film, uint8 (triage_px, triage_px).
        detector: Takes the film, uint8 of the view's shape, and returns of each anchor centre,
            width and height in its pixels, then a probability a lesion type: (4 + C, anchors).
        decision: Weights, calibration and thresholds, chosen out of fold.
        lesion_types: Names in the detector's order.
        least_score: A box is reported from this probability on.
        triage_px: Side of the square that triage sees.
        view: Height and width of what the detector sees.
        cache_px, clip_limit, tiles: As `imaging.preprocess` takes them.
        threshold: Name of the decision's threshold.
    """

    triage: Mapping[str, Callable[[np.ndarray], Look]]
    detector: Callable[[np.ndarray], np.ndarray]
    decision: Decision
    lesion_types: tuple[str, ...]
    least_score: float
    triage_px: int
    view: tuple[int, int]
    cache_px: int
    clip_limit: float
    tiles: int
    threshold: str = "youden"

    def __post_init__(self) -> None:
        if tuple(self.triage) != self.decision.networks:
            raise DernetError(
                f"The vote was weighed for {', '.join(self.decision.networks)}, and the networks "
                f"are {', '.join(self.triage)}: choose weights for these."
            )
        if self.threshold not in self.decision.thresholds:
            raise DernetError(
                f"The threshold is one of {', '.join(self.decision.thresholds)}, not "
                f"{self.threshold!r}."
            )

    def answer(self, grey: np.ndarray) -> Answer:
        """Return the answer for a film as `imaging.read_grey` returns it, uint8 (H, W).

        The detector is asked only where the gate opens.
        """
        return self.answer_enhanced(self.enhance(grey), grey.shape)

    def enhance(self, grey: np.ndarray) -> np.ndarray:
        """Return the film as the cache of a run holds it: CLAHE, then smaller."""
        return preprocess(grey, self.cache_px, self.clip_limit, self.tiles)

    def answer_enhanced(self, enhanced: np.ndarray, stored: tuple[int, int]) -> Answer:
        """Return the answer for an enhanced film.

        Args:
            enhanced: As `enhance` returns it.
            stored: Height and width of the film as it is stored; boxes are in its pixels.
        """
        return self.decide(self.look(enhanced), enhanced, stored)

    def look(self, enhanced: np.ndarray) -> dict[str, Look]:
        """Return what each network makes of an enhanced film."""
        side = (self.triage_px, self.triage_px)
        square = cv2.resize(enhanced, side, interpolation=cv2.INTER_AREA)
        return {name: ask(square) for name, ask in self.triage.items()}

    def decide(
        self, looks: Mapping[str, Look], enhanced: np.ndarray, stored: tuple[int, int]
    ) -> Answer:
        """Return the answer for an enhanced film that the networks have looked at: lines 16 to 22.

        Args:
            looks: As `look` returns them.
            enhanced, stored: As `answer_enhanced` takes them.
        """
        shares = {name: float(look.prob) for name, look in looks.items()}
        score = float(self.decision.prob(np.array([list(shares.values())]))[0])
        threshold = self.decision.thresholds[self.threshold]
        found = self.find(enhanced, stored) if score > threshold else self._table([], [], [])
        return Answer(score, shares, threshold, found)

    def heat(self, looks: Mapping[str, Look]) -> np.ndarray:
        """Return DERNet's heat map: the networks' maps, weighed as the vote, float (h, w).

        Raises:
            DernetError: These networks give no maps.
        """
        maps = [look.heat for look in looks.values()]
        if any(one is None for one in maps):
            raise DernetError("These networks give no heat maps: export them with `dernet export`.")
        return np.tensordot(self.decision.weights, np.stack(maps), axes=1)

    def find(self, enhanced: np.ndarray, stored: tuple[int, int]) -> pd.DataFrame:
        """Return the boxes of an enhanced film, whatever triage says of it: line 18."""
        filled, place = letterbox(enhanced, self.view)
        corners, classes, scores = suppress(self.detector(filled), self.least_score)
        return self._table(to_stored(corners, place, *stored), classes, scores)

    def _table(self, corners, classes, scores) -> pd.DataFrame:
        table = pd.DataFrame({"lesion_type": [self.lesion_types[number] for number in classes]})
        table[["xmin", "ymin", "xmax", "ymax"]] = np.reshape(corners, (-1, 4))
        return table.assign(score=np.asarray(scores, np.float64))


def suppress(raw: np.ndarray, least_score: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin a film's raw boxes by non-maximum suppression within each type (line 18).

    Args:
        raw: As `Pipeline.detector` returns it, shape (4 + C, anchors).
        least_score: Boxes below it are left out.

    Returns:
        Corners (n, 4), classes (n,) and scores (n,), the surest first.

    >>> raw = np.array([[5, 5.5, 20], [5, 5, 20], [4, 4, 4], [4, 4, 4], [0.9, 0.8, 0.7]])
    >>> suppress(raw, 0.1)[2].tolist()
    [0.9, 0.7]
    """
    raw = np.asarray(raw, np.float64)
    anchors, classes = np.nonzero(least_score <= raw[4:].T)
    scores = raw[4 + classes, anchors]
    order = np.argsort(-scores, kind="stable")
    anchors, classes, scores = anchors[order], classes[order], scores[order]
    centre, size = raw[:2, anchors].T, raw[2:4, anchors].T
    corners = np.hstack([centre - size / 2, centre + size / 2])
    areas, kept = size.prod(axis=1), []
    free = np.ones(len(scores), bool)
    for row in range(len(scores)):
        if not free[row] or len(kept) == MAX_BOXES:
            continue
        kept.append(row)
        low = np.maximum(corners[row, :2], corners[:, :2])
        high = np.minimum(corners[row, 2:], corners[:, 2:])
        both = (high - low).clip(0).prod(axis=1)
        free &= (classes != classes[row]) | (both <= NMS_IOU * (areas + areas[row] - both))
    return corners[kept], classes[kept], scores[kept]

"""Algorithm 1, Phase III: a film's score, the gate, and boxes where it opens.

Networks come in as functions, so that whatever runs them, and what has no torch, can use this.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.boxes import from_letterbox, letterbox, non_maximum_suppression
from dernet_utils.imaging.enhance import preprocess
from dernet_utils.triage.ensemble import Decision


class NetworkOutput(NamedTuple):
    """What a network makes of a film.

    Attributes:
        prob: Probability of abnormal, in [0, 1].
        heat: Where it outputs, float (h, w), at least 0, with a sum of 1 or 0 (Grad-CAM); None where
            nobody asked.
        embedding: Means of its early maps, float (D,); None likewise.
    """

    prob: float
    heat: np.ndarray | None = None
    embedding: np.ndarray | None = None


@dataclass(frozen=True)
class Prediction:
    """What the pipeline says of a film.

    Attributes:
        score: DERNet's calibrated probability of abnormal, in [0, 1].
        network_probs: Of each network, its probability before the vote.
        threshold: A film is abnormal where its score exceeds it.
        boxes: `lesion_type`, `xmin` … `ymax` in stored pixels, `score`; the surest first. Empty for
            a film that is not abnormal, and where the detector found nothing.
    """

    score: float
    network_probs: dict[str, float]
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
        score_threshold: A box is reported from this probability on.
        triage_px: Side of the square that triage sees.
        detect_size: Height and width of what the detector sees.
        cache_px, clip_limit, tiles: As `imaging.preprocess` takes them.
        threshold: Name of the decision's threshold.
    """

    triage: Mapping[str, Callable[[np.ndarray], NetworkOutput]]
    detector: Callable[[np.ndarray], np.ndarray]
    decision: Decision
    lesion_types: tuple[str, ...]
    score_threshold: float
    triage_px: int
    detect_size: tuple[int, int]
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

    def predict(self, grey: np.ndarray) -> Prediction:
        """Return the answer for a film as `imaging.read_radiograph` returns it, uint8 (H, W).

        The detector is asked only where the gate opens.
        """
        return self.predict_enhanced(self.enhance(grey), grey.shape)

    def enhance(self, grey: np.ndarray) -> np.ndarray:
        """Return the film as the cache of a run holds it: CLAHE, then smaller."""
        return preprocess(grey, self.cache_px, self.clip_limit, self.tiles)

    def predict_enhanced(self, enhanced: np.ndarray, stored: tuple[int, int]) -> Prediction:
        """Return the answer for an enhanced film.

        Args:
            enhanced: As `enhance` returns it.
            stored: Height and width of the film as it is stored; boxes are in its pixels.
        """
        return self.decide(self.run_triage(enhanced), enhanced, stored)

    def run_triage(self, enhanced: np.ndarray) -> dict[str, NetworkOutput]:
        """Return what each network makes of an enhanced film."""
        side = (self.triage_px, self.triage_px)
        square = cv2.resize(enhanced, side, interpolation=cv2.INTER_AREA)
        return {name: ask(square) for name, ask in self.triage.items()}

    def decide(
        self, outputs: Mapping[str, NetworkOutput], enhanced: np.ndarray, stored: tuple[int, int]
    ) -> Prediction:
        """Return the answer for an enhanced film that the networks have looked at: lines 16 to 22.

        Args:
            outputs: As `run_triage` returns them.
            enhanced, stored: As `predict_enhanced` takes them.
        """
        network_probs = {name: float(output.prob) for name, output in outputs.items()}
        score = float(self.decision.prob(np.array([list(network_probs.values())]))[0])
        threshold = self.decision.thresholds[self.threshold]
        found = self.detect(enhanced, stored) if score > threshold else self._table([], [], [])
        return Prediction(score, network_probs, threshold, found)

    def heat(self, outputs: Mapping[str, NetworkOutput]) -> np.ndarray:
        """Return DERNet's heat map: the networks' maps, weighed as the vote, float (h, w).

        Raises:
            DernetError: These networks give no maps.
        """
        maps = [output.heat for output in outputs.values()]
        if any(one is None for one in maps):
            raise DernetError("These networks give no heat maps: export them with `dernet export`.")
        return np.tensordot(self.decision.weights, np.stack(maps), axes=1)

    def detect(self, enhanced: np.ndarray, stored: tuple[int, int]) -> pd.DataFrame:
        """Return the boxes of an enhanced film, whatever triage says of it: line 18."""
        filled, place = letterbox(enhanced, self.detect_size)
        corners, classes, scores = non_maximum_suppression(
            self.detector(filled), self.score_threshold
        )
        return self._table(from_letterbox(corners, place, *stored), classes, scores)

    def _table(self, corners, classes, scores) -> pd.DataFrame:
        table = pd.DataFrame({"lesion_type": [self.lesion_types[number] for number in classes]})
        table[["xmin", "ymin", "xmax", "ymax"]] = np.reshape(corners, (-1, 4))
        return table.assign(score=np.asarray(scores, np.float64))

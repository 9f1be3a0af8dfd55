"""Algorithm 1, Phase III: a radiograph's score, the decision, and boxes if it is abnormal.

The networks are passed as functions, so that the pipeline does not depend on what runs them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import CORNERS
from dernet_utils.imaging.boxes import from_letterbox, letterbox, non_maximum_suppression
from dernet_utils.imaging.enhance import preprocess
from dernet_utils.triage.ensemble import Decision


class NetworkOutput(NamedTuple):
    """A triage network's output for one image.

    Attributes:
        prob: Probability of abnormal, in [0, 1].
        heat: Grad-CAM, float (h, w), at least 0, with a sum of 1, or of 0 if no position raises the
            probability; None if the backend does not compute it.
        embedding: Means of its early feature maps, float (D,); None likewise.
    """

    prob: float
    heat: np.ndarray | None = None
    embedding: np.ndarray | None = None


@dataclass(frozen=True)
class Prediction:
    """The pipeline's output for one image.

    Attributes:
        score: DERNet's calibrated probability of abnormal, in [0, 1].
        network_probs: Each network's probability, before calibration and vote, in [0, 1].
        threshold: The image is abnormal if its score exceeds this.
        boxes: `lesion_type`, `xmin` … `ymax` in stored pixels, `score` in [0, 1]; the most
            confident first. Empty if the image is normal or the detector found nothing.
    """

    score: float
    network_probs: dict[str, float]
    threshold: float
    boxes: pd.DataFrame

    @property
    def abnormal(self) -> bool:
        """Whether the score exceeds the threshold (line 17)."""
        return self.score > self.threshold


@dataclass(frozen=True)
class Pipeline:
    """From a radiograph to a prediction.

    Attributes:
        triage: Each network by name: a function of the enhanced image, uint8 (triage_px,
            triage_px).
        detector: A function of the letterboxed image, uint8 of `detect_size`. It returns for each
            anchor the centre, width and height in px of that input, then one probability per
            lesion type: (4 + C, anchors).
        decision: Weights, calibration and thresholds, chosen out of fold.
        lesion_types: Names in the detector's order.
        score_threshold: Lowest score of a reported box, in [0, 1].
        triage_px: Side of the triage networks' square input, px.
        detect_size: Height and width of the detector's input, px.
        cache_px, clip_limit, tiles: As `imaging.enhance.preprocess` takes them.
        threshold: Name of the decision's threshold.

    Raises:
        DernetError: The networks are not the decision's, or the decision has no such threshold.
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
                f"The vote's weights are for {', '.join(self.decision.networks)}, but the networks "
                f"are {', '.join(self.triage)}: fit weights for these."
            )
        if self.threshold not in self.decision.thresholds:
            raise DernetError(
                f"The threshold is one of {', '.join(self.decision.thresholds)}, not "
                f"{self.threshold!r}."
            )

    def predict(self, grey: np.ndarray) -> Prediction:
        """Return the prediction for a radiograph.

        The detector is run only if triage calls the image abnormal.

        Args:
            grey: The image's `Radiograph.pixels`, uint8 (H, W).
        """
        return self.predict_enhanced(self.enhance(grey), grey.shape)

    def enhance(self, grey: np.ndarray) -> np.ndarray:
        """Return an image as in a run's cache: CLAHE, then scaled down; uint8 (h, w)."""
        return preprocess(grey, self.cache_px, self.clip_limit, self.tiles)

    def predict_enhanced(self, enhanced: np.ndarray, stored: tuple[int, int]) -> Prediction:
        """Return the prediction for an enhanced image.

        Args:
            enhanced: As `enhance` returns it.
            stored: Height and width of the stored image, px; boxes are in its pixels.
        """
        return self.decide(self.run_triage(enhanced), enhanced, stored)

    def run_triage(self, enhanced: np.ndarray) -> dict[str, NetworkOutput]:
        """Return each triage network's output for an enhanced image."""
        size = (self.triage_px, self.triage_px)
        square = cv2.resize(enhanced, size, interpolation=cv2.INTER_AREA)
        return {name: run(square) for name, run in self.triage.items()}

    def decide(
        self, outputs: Mapping[str, NetworkOutput], enhanced: np.ndarray, stored: tuple[int, int]
    ) -> Prediction:
        """Return the prediction from the triage networks' outputs (lines 16 to 22).

        Args:
            outputs: As `run_triage` returns them.
            enhanced, stored: As `predict_enhanced` takes them.
        """
        network_probs = {name: float(output.prob) for name, output in outputs.items()}
        score = float(self.decision.prob(np.array([list(network_probs.values())]))[0])
        threshold = self.decision.thresholds[self.threshold]
        boxes = self.detect(enhanced, stored) if score > threshold else self._table([], [], [])
        return Prediction(score, network_probs, threshold, boxes)

    def heat(self, outputs: Mapping[str, NetworkOutput]) -> np.ndarray:
        """Return DERNet's heat map, float (h, w): the networks' maps with the vote's weights.

        Args:
            outputs: As `run_triage` returns them.

        Raises:
            DernetError: The backend computes no heat maps.
        """
        maps = [output.heat for output in outputs.values()]
        if any(one is None for one in maps):
            raise DernetError("These networks give no heat maps: export them with `dernet export`.")
        return np.tensordot(self.decision.weights, np.stack(maps), axes=1)

    def detect(self, enhanced: np.ndarray, stored: tuple[int, int]) -> pd.DataFrame:
        """Return the boxes of an enhanced image, whatever triage predicts (line 18).

        Args:
            enhanced, stored: As `predict_enhanced` takes them.

        Returns:
            As `Prediction.boxes`.
        """
        filled, position = letterbox(enhanced, self.detect_size)
        raw = self.detector(filled)
        corners, classes, scores = non_maximum_suppression(raw, self.score_threshold)
        return self._table(from_letterbox(corners, position, *stored), classes, scores)

    def _table(self, corners: ArrayLike, classes: Iterable[int], scores: ArrayLike) -> pd.DataFrame:
        table = pd.DataFrame({"lesion_type": [self.lesion_types[number] for number in classes]})
        table[list(CORNERS)] = np.reshape(corners, (-1, 4))
        return table.assign(score=np.asarray(scores, np.float64))

"""A file from anywhere, examined: read, judged by the guard, and answered where it passes."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dernet_utils.imaging import decode_grey
from dernet_utils.outliers import Familiar, Reason, header_reasons, picture_facts, picture_reasons
from dernet_utils.pipeline import Answer, Look, Pipeline
from dernet_utils.runtime import open_familiar, open_pipeline

# These quote header values in what they warn of, names among them: none may reach a server's log.
for library in ("pydicom", "highdicom"):
    logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=library)


@dataclass(frozen=True)
class Examined:
    """What came of a file.

    Attributes:
        grey: The film as `imaging.decode_grey` returns it.
        reasons: What speaks against its being a radiograph of a spine.
        looks: What each network makes of it.
        answer: None for a file that was rejected.
    """

    grey: np.ndarray
    reasons: tuple[Reason, ...]
    looks: dict[str, Look]
    answer: Answer | None

    @property
    def rejected(self) -> bool:
        """Whether there is no answer."""
        return self.answer is None

    @property
    def overridden(self) -> tuple[str, ...]:
        """Reasons that a person set aside."""
        return tuple(reason.text for reason in self.reasons) if self.answer else ()


@dataclass(frozen=True)
class Examiner:
    """A pipeline with its guard before it.

    Attributes:
        pipeline: As `runtime.open_pipeline` returns it.
        guard: Name of the network whose embedding the guard reads.
        familiar: The guard's third layer.
    """

    pipeline: Pipeline
    guard: str
    familiar: Familiar

    @classmethod
    def open(cls, folder: Path, engine: str = "onnxruntime", threads: int | None = None):
        """Return the examiner of exported networks, as `runtime.open_pipeline` takes them."""
        return cls(open_pipeline(folder, engine, threads), *open_familiar(folder))

    def examine(self, data: bytes, override: bool = False) -> Examined:
        """Return what comes of a DICOM, PNG or JPEG file.

        Args:
            data: The file's bytes.
            override: Whether a person wants an answer whatever speaks against the file.

        Raises:
            DernetError: The file cannot be read as a grey picture.
        """
        grey = decode_grey(data)
        reasons = [*header_reasons(data), *picture_reasons(picture_facts(data, grey))]
        if reasons and not override:  # no network need look
            return Examined(grey, tuple(reasons), {}, None)
        enhanced = self.pipeline.enhance(grey)
        looks = self.pipeline.look(enhanced)
        reasons += self.familiar.reasons(looks[self.guard])
        if reasons and not override:
            return Examined(grey, tuple(reasons), looks, None)
        answer = self.pipeline.decide(looks, enhanced, grey.shape)
        return Examined(grey, tuple(reasons), looks, answer)

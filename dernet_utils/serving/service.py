"""A file from anywhere, examined: read, judged by the guard, and answered where it passes."""

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.radiograph import Radiograph
from dernet_utils.imaging.reader import decode_radiograph, read_radiograph
from dernet_utils.inference.onnx_backend import open_embedding_gate, open_pipeline
from dernet_utils.inference.ood import (
    EmbeddingGate,
    Reason,
    header_reasons,
    picture_facts,
    picture_reasons,
)
from dernet_utils.inference.pipeline import NetworkOutput, Pipeline, Prediction
from dernet_utils.serving.report import as_record, draw_prediction

# These quote header values in what they warn of, names among them: none may reach a server's log.
for library in ("pydicom", "highdicom"):
    logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=library)


@dataclass(frozen=True)
class Analysis:
    """What came of a file.

    Attributes:
        radiograph: The file, as `imaging.reader` reads it.
        reasons: What speaks against its being a radiograph of a spine.
        outputs: What each network makes of it.
        prediction: None for a file that was rejected.
    """

    radiograph: Radiograph
    reasons: tuple[Reason, ...]
    outputs: dict[str, NetworkOutput]
    prediction: Prediction | None

    @property
    def rejected(self) -> bool:
        """Whether there is no answer."""
        return self.prediction is None

    @property
    def overridden(self) -> tuple[str, ...]:
        """Reasons that a person set aside."""
        return tuple(reason.text for reason in self.reasons) if self.prediction else ()


@dataclass(frozen=True)
class InferenceService:
    """A pipeline with its guard before it.

    Attributes:
        pipeline: As `runtime.open_pipeline` returns it.
        gate_network: Name of the network whose embedding the gate reads.
        gate: Tells whether an image is like those that the networks were trained on.
    """

    pipeline: Pipeline
    gate_network: str
    gate: EmbeddingGate

    @classmethod
    def open(cls, folder: Path, engine: str = "onnxruntime", threads: int | None = None):
        """Return the service of exported networks, as `onnx_backend.open_pipeline` takes them."""
        return cls(open_pipeline(folder, engine, threads), *open_embedding_gate(folder))

    def analyse(self, data: bytes, override: bool = False) -> Analysis:
        """Return what comes of a DICOM, PNG or JPEG file.

        Args:
            data: The file's bytes.
            override: Whether a person wants an answer whatever speaks against the file.

        Raises:
            DernetError: The file cannot be read as a grey picture.
        """
        radiograph = decode_radiograph(data)
        reasons = [*header_reasons(radiograph), *picture_reasons(picture_facts(radiograph))]
        if reasons and not override:  # no network need look
            return Analysis(radiograph, tuple(reasons), {}, None)
        enhanced = self.pipeline.enhance(radiograph.pixels)
        outputs = self.pipeline.run_triage(enhanced)
        reasons += self.gate.reasons(outputs[self.gate_network])
        if reasons and not override:
            return Analysis(radiograph, tuple(reasons), outputs, None)
        prediction = self.pipeline.decide(outputs, enhanced, radiograph.pixels.shape)
        return Analysis(radiograph, tuple(reasons), outputs, prediction)


def predict_file(pipeline: Pipeline, path: Path, out: Path | None = None) -> dict:
    """Ask a pipeline about a file, and keep its answer.

    Args:
        pipeline: As `run_pipeline` returns it.
        path: A DICOM, PNG or JPEG file.
        out: Where ``<name of the file>.json`` and ``.overlay.png`` go; made where it is not there.

    Returns:
        ``file``, and what `as_record` returns.

    Raises:
        DernetError: The file cannot be read, or its answer would replace another one.
    """
    grey = read_radiograph(path).pixels
    prediction = pipeline.predict(grey)
    record = {"file": str(path), **as_record(prediction)}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        kept, drawn = out / f"{path.name}.json", out / f"{path.name}.overlay.png"
        if kept.exists() and json.loads(kept.read_text(encoding="utf-8"))["file"] != str(path):
            raise DernetError(
                f"{path}: {kept} holds the answer for another file of that name; choose another "
                "folder with --out."
            )
        kept.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        cv2.imwrite(str(drawn), draw_prediction(grey, prediction))
    return record

"""One file from its bytes to its prediction: read once, checked, and then analysed."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import write_whole
from dernet_utils.imaging.decoder import Decoder
from dernet_utils.imaging.radiograph import Radiograph, naming, read_bytes
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

# These libraries' warnings quote header values, patients' names among them; no log may hold them.
for library in ("pydicom", "highdicom"):
    logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=library)


@dataclass(frozen=True)
class Analysis:
    """The result for one file; every report can be made from it without the file.

    Attributes:
        radiograph: The file, as `imaging.reader` reads it.
        reasons: Why it may not be a radiograph of a spine; empty if it passed all checks.
        outputs: Each triage network's output; empty if the file was rejected before inference.
        prediction: None if the file was rejected.
    """

    radiograph: Radiograph
    reasons: tuple[Reason, ...]
    outputs: dict[str, NetworkOutput]
    prediction: Prediction | None

    @property
    def rejected(self) -> bool:
        """Whether there is no prediction."""
        return self.prediction is None

    @property
    def overridden(self) -> tuple[str, ...]:
        """Reasons for a rejection that the user overrode."""
        return tuple(reason.text for reason in self.reasons) if self.prediction else ()


@dataclass(frozen=True)
class InferenceService:
    """A pipeline with the out-of-distribution checks that precede it.

    Attributes:
        pipeline: As `onnx_backend.open_pipeline` returns it.
        gate_network: Name of the triage network whose embedding the gate checks.
        gate: Checks whether an image is like the training images.
        decode: Decodes a file's bytes, as `Decoder.decode` does.
    """

    pipeline: Pipeline
    gate_network: str
    gate: EmbeddingGate
    decode: Callable[[bytes], Radiograph]

    @classmethod
    def open(
        cls, folder: Path, engine: str = "onnxruntime", threads: int | None = None
    ) -> "InferenceService":
        """Return the service of exported networks.

        Args:
            folder, engine, threads: As `onnx_backend.open_pipeline` takes them.

        Raises:
            DernetError: As `onnx_backend.open_pipeline` and `open_embedding_gate` raise.
        """
        decode = Decoder().decode  # its process starts while the networks are read
        return cls(open_pipeline(folder, engine, threads), *open_embedding_gate(folder), decode)

    def analyse(self, data: bytes, override: bool = False) -> Analysis:
        """Run the checks and, if they pass, inference on a DICOM, PNG or JPEG file.

        Args:
            data: The file's bytes; they are parsed only here.
            override: Whether inference is run even if a check rejects the file.

        Raises:
            DernetError: The file cannot be read as a grey-scale image.
        """
        radiograph = self.decode(data)
        reasons = [*header_reasons(radiograph), *picture_reasons(picture_facts(radiograph))]
        if reasons and not override:  # without running a network
            return Analysis(radiograph, tuple(reasons), {}, None)
        enhanced = self.pipeline.enhance(radiograph.pixels)
        outputs = self.pipeline.run_triage(enhanced)
        reasons += self.gate.reasons(outputs[self.gate_network])
        if reasons and not override:
            return Analysis(radiograph, tuple(reasons), outputs, None)
        prediction = self.pipeline.decide(outputs, enhanced, radiograph.pixels.shape)
        return Analysis(radiograph, tuple(reasons), outputs, prediction)


def predict_file(
    pipeline: Pipeline, decode: Callable[[bytes], Radiograph], path: Path, out: Path | None = None
) -> dict:
    """Run a pipeline on a file and, if asked, save its prediction.

    Args:
        pipeline: As `torch_backend.run_pipeline` or `onnx_backend.open_pipeline` returns it.
        decode: As `Decoder.decode`.
        path: A DICOM, PNG or JPEG file.
        out: Folder for ``<file name>.json`` and ``<file name>.overlay.png``; created if missing.

    Returns:
        ``file``, ``sha256`` of its content, and the entries of `report.as_record`.

    Raises:
        DernetError: The file cannot be read, its prediction would replace that of a file with
            another content, or it cannot be saved.
    """
    with naming(path):
        data = read_bytes(path)
        grey = decode(data).pixels
    prediction = pipeline.predict(grey)
    name = os.fsencode(path).decode(errors="backslashreplace")  # a name need not be UTF-8
    record = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), **as_record(prediction)}
    if out is not None:
        overlay = cv2.imencode(".png", draw_prediction(grey, prediction))[1].tobytes()
        try:
            _save(out / path.name, record, overlay)
        except OSError as error:
            raise DernetError(
                f"{name}: the prediction cannot be saved in {out} ({error.strerror}); make room "
                "there, or give the file a shorter name."
            ) from error
    return record


def _save(beside: Path, record: dict, overlay: bytes) -> None:
    """Save a file's prediction; the record, written last, marks it as complete.

    Args:
        beside: The folder and the file's name, to which the endings are added.
        record: The prediction, with the file's ``sha256``.
        overlay: The radiograph with its boxes, as PNG.

    Raises:
        DernetError: There is a record, and it is not that of a file with this content.
        OSError: A file cannot be written.
    """
    saved = beside.with_name(f"{beside.name}.json")
    saved.parent.mkdir(parents=True, exist_ok=True)
    if saved.exists():
        try:
            earlier = json.loads(saved.read_bytes())
        except ValueError:  # not JSON, or not UTF-8
            earlier = None
        if not isinstance(earlier, dict) or earlier.get("sha256") != record["sha256"]:
            raise DernetError(
                f"{record['file']}: {saved} is not the prediction for this file but for another of "
                "the same name, or damaged; choose another folder with --out."
            )
    picture = beside.with_name(f"{beside.name}.overlay.png")
    write_whole(picture, lambda part: part.write_bytes(overlay))
    text = json.dumps(record, indent=1) + "\n"
    write_whole(saved, lambda part: part.write_text(text, encoding="utf-8"))

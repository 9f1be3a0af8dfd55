"""A run's trained networks as a pipeline, and what it says of files."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from dernet_utils.crossvalidation import read_decision
from dernet_utils.data import LESION_TYPES
from dernet_utils.detect import load_detector
from dernet_utils.errors import DernetError
from dernet_utils.imaging import read_grey
from dernet_utils.pipeline import Look, Pipeline
from dernet_utils.profiles import NETWORKS
from dernet_utils.report import as_record, draw_answer
from dernet_utils.triage import load_trained, predict_triage
from dernet_utils.workspace import Workspace


def write_models(
    workspace: Workspace, triage: dict[str, list[Path]], detector: Path, least_score: float
) -> Path:
    """Write down which checkpoints make up a run's pipeline, for `run_pipeline`.

    Args:
        workspace: The run.
        triage: Of each network, its checkpoints, one a fold.
        detector: The detector's checkpoint.
        least_score: From which a box is reported, chosen without the test split.
    """
    path = workspace.tables / "pipeline.json"
    record = {
        "triage": {name: [Path(one).name for one in own] for name, own in triage.items()},
        "detector": Path(detector).name,
        "least_score": least_score,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read_models(workspace: Workspace) -> dict:
    """Return what `write_models` wrote: ``triage``, ``detector`` and ``least_score``.

    Raises:
        DernetError: It was not written yet.
    """
    path = workspace.tables / "pipeline.json"
    if not path.is_file():
        raise DernetError(
            f"{path} is written by the chapter on the pipeline and is not there: run the book "
            f"first, with `dernet run --profile {workspace.profile.name}`."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def run_pipeline(workspace: Workspace, threshold: str = "youden") -> Pipeline:
    """Return the pipeline of a run's own networks.

    Args:
        workspace: The run.
        threshold: Name of the decision's threshold.

    Raises:
        DernetError: The run has no pipeline yet, or a checkpoint is missing.
    """
    record, profile = read_models(workspace), workspace.profile
    folder = workspace.weights
    networks = {
        name: [load_trained(name, folder / one)[0] for one in record["triage"][name]]
        for name in NETWORKS
    }
    detector = load_detector(folder / record["detector"])[0]
    device = next(detector.parameters()).device

    def asked(own: list) -> Callable[[np.ndarray], Look]:
        return lambda square: Look(
            np.mean([predict_triage(one, torch.from_numpy(square)[None, None])[0] for one in own])
        )

    @torch.no_grad()
    def answers(filled: np.ndarray) -> np.ndarray:
        shown = torch.from_numpy(filled).to(device)[None, None].float() / 255
        return detector.answers(shown.expand(-1, 3, -1, -1))[0].cpu().numpy()

    return Pipeline(
        {name: asked(own) for name, own in networks.items()},
        answers,
        read_decision(workspace),
        LESION_TYPES,
        record["least_score"],
        profile.triage_px,
        profile.detect_view,
        profile.cache_px,
        profile.clip_limit,
        profile.tiles,
        threshold,
    )


def answer_file(pipeline: Pipeline, path: Path, out: Path | None = None) -> dict:
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
    grey = read_grey(path)
    answer = pipeline.answer(grey)
    record = {"file": str(path), **as_record(answer)}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        kept, drawn = out / f"{path.name}.json", out / f"{path.name}.overlay.png"
        if kept.exists() and json.loads(kept.read_text(encoding="utf-8"))["file"] != str(path):
            raise DernetError(
                f"{path}: {kept} holds the answer for another file of that name; choose another "
                "folder with --out."
            )
        kept.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        cv2.imwrite(str(drawn), draw_answer(grey, answer))
    return record

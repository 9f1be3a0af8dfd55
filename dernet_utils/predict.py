"""A run's trained networks as a pipeline, and its answers as JSON and as a picture."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from dernet_utils.crossvalidation import read_decision
from dernet_utils.data import LESION_TYPES
from dernet_utils.detect import load_detector
from dernet_utils.errors import DernetError
from dernet_utils.figures import LESION_STYLE
from dernet_utils.imaging import read_grey
from dernet_utils.pipeline import Answer, Pipeline
from dernet_utils.profiles import NETWORKS
from dernet_utils.triage import load_trained, predict_triage
from dernet_utils.workspace import Workspace

OVERLAY_PX = 1280  # long side of an overlay at most
STROKE = 500  # pixels of its long side to one of a line's width


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


def run_pipeline(workspace: Workspace, threshold: str = "youden") -> Pipeline:
    """Return the pipeline of a run's own networks.

    Args:
        workspace: The run.
        threshold: Name of the decision's threshold.

    Raises:
        DernetError: The run has no pipeline yet, or a checkpoint is missing.
    """
    path = workspace.tables / "pipeline.json"
    if not path.is_file():
        raise DernetError(
            f"{path} is written by the chapter on the pipeline and is not there: run the book "
            f"first, with `dernet run --profile {workspace.profile.name}`."
        )
    record, profile = json.loads(path.read_text(encoding="utf-8")), workspace.profile
    folder = workspace.weights
    networks = {
        name: [load_trained(name, folder / one)[0] for one in record["triage"][name]]
        for name in NETWORKS
    }
    detector = load_detector(folder / record["detector"])[0]
    device = next(detector.parameters()).device

    def asked(own: list) -> float:
        return lambda square: np.mean(
            [predict_triage(one, torch.from_numpy(square)[None, None])[0] for one in own]
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


def as_record(answer: Answer) -> dict:
    """Return an answer as plain numbers, text and lists, fit for JSON."""
    return {
        "score": answer.score,
        "threshold": answer.threshold,
        "decision": "abnormal" if answer.abnormal else "normal",
        "networks": answer.shares,
        "boxes": answer.boxes.to_dict(orient="records"),
    }


def draw_answer(grey: np.ndarray, answer: Answer) -> np.ndarray:
    """Return the film with its boxes and decision drawn on it.

    Args:
        grey: The film as `imaging.read_grey` returns it, uint8 (H, W).
        answer: The pipeline's.

    Returns:
        Colours in OpenCV's order, uint8 (h, w, 3), at most 1,280 pixels long, with a line of
        text below the film.
    """
    scale = min(1.0, OVERLAY_PX / max(grey.shape))
    size = tuple(max(1, round(side * scale)) for side in grey.shape[::-1])
    picture = cv2.cvtColor(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2BGR)
    stroke = max(1, round(max(size) / STROKE))
    write = {"fontFace": cv2.FONT_HERSHEY_SIMPLEX, "lineType": cv2.LINE_AA, "thickness": stroke}
    small = 0.4 * stroke
    for box in answer.boxes[::-1].itertuples():
        hue = LESION_STYLE[box.lesion_type][0].lstrip("#")
        colour = tuple(int(hue[at : at + 2], 16) for at in (4, 2, 0))
        corners = np.array([box.xmin, box.ymin, box.xmax, box.ymax]) * scale
        left, top, right, bottom = corners.round().astype(int).tolist()
        cv2.rectangle(picture, (left, top), (right, bottom), colour, stroke)
        place = (left, max(top - 2 * stroke, 12 * stroke))
        text = f"{box.lesion_type} {box.score:.2f}"
        cv2.putText(
            picture,
            text,
            place,
            fontScale=small,
            color=(0, 0, 0),
            **write | {"thickness": 3 * stroke},
        )
        cv2.putText(picture, text, place, fontScale=small, color=colour, **write)
    word = "abnormal" if answer.abnormal else "normal"
    lines = [
        f"DERNet: {word}, score {answer.score:.2f}, threshold {answer.threshold:.2f}",
        "For research and teaching, not for diagnosis",
    ]
    below = np.zeros((16 * stroke * len(lines) + 8 * stroke, picture.shape[1], 3), np.uint8)
    for number, line in enumerate(lines):
        room = picture.shape[1] / cv2.getTextSize(line, write["fontFace"], 1.0, stroke)[0][0]
        at = (4 * stroke, 16 * stroke * (number + 1))
        cv2.putText(
            below, line, at, fontScale=min(small, 0.95 * room), color=(255, 255, 255), **write
        )
    return np.vstack([picture, below])

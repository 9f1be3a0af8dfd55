"""A run's trained networks as a pipeline, and what it says of files."""

import json
from pathlib import Path

from dernet_utils.core.errors import DernetError
from dernet_utils.core.workspace import Workspace


def write_models(
    workspace: Workspace, triage: dict[str, list[Path]], detector: Path, score_threshold: float
) -> Path:
    """Write down which checkpoints make up a run's pipeline, for `run_pipeline`.

    Args:
        workspace: The run.
        triage: Of each network, its checkpoints, one a fold.
        detector: The detector's checkpoint.
        score_threshold: From which a box is reported, chosen without the test split.
    """
    path = workspace.tables / "pipeline.json"
    record = {
        "triage": {name: [Path(one).name for one in own] for name, own in triage.items()},
        "detector": Path(detector).name,
        "score_threshold": score_threshold,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read_models(workspace: Workspace) -> dict:
    """Return what `write_models` wrote: ``triage``, ``detector`` and ``score_threshold``.

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

"""The record, written by chapter 14, of the checkpoints that make up a run's pipeline."""

import json
from pathlib import Path

from dernet_utils.core.errors import DernetError
from dernet_utils.core.workspace import Workspace


def write_models(
    workspace: Workspace, triage: dict[str, list[Path]], detector: Path, score_threshold: float
) -> Path:
    """Record which checkpoints make up a run's pipeline, for `run_pipeline` and `export_run`.

    Args:
        workspace: The run.
        triage: Each network's checkpoints, one per fold.
        detector: The detector's checkpoint.
        score_threshold: Lowest score of a reported box, chosen without the test split.

    Returns:
        The record's path, ``tables/pipeline.json`` in the run's folder.
    """
    path = workspace.tables / "pipeline.json"
    record = {
        "triage": {name: [Path(one).name for one in folds] for name, folds in triage.items()},
        "detector": Path(detector).name,
        "score_threshold": score_threshold,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read_models(workspace: Workspace) -> dict:
    """Return the record that `write_models` wrote.

    Returns:
        ``triage``: checkpoint names per network; ``detector``: a checkpoint name;
        ``score_threshold``.

    Raises:
        DernetError: The record does not exist yet.
    """
    path = workspace.tables / "pipeline.json"
    if not path.is_file():
        raise DernetError(
            f"There is no {path}, which chapter 14 writes: run the book first with "
            f"`dernet run --profile {workspace.profile.name}`."
        )
    return json.loads(path.read_text(encoding="utf-8"))

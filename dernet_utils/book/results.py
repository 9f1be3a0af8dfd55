"""Results of long runs, kept as small JSON files in ``book/results``."""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import pandas as pd

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT, write_whole
from dernet_utils.core.workspace import Workspace, commit

KEPT = PROJECT / "book" / "results"


def detector_record(
    workspace: Workspace,
    tables: Mapping[str, pd.DataFrame],
    terms: pd.DataFrame,
    films: int,
    seconds: float,
) -> dict:
    """Return a run's results for detectors, and how they were obtained, ready for JSON.

    Args:
        workspace: The run.
        tables: For each detector, what `metrics.detection.detection_table` returns.
        terms: Training conditions, such as the number of steps, with one row per detector; some
            detectors may have none.
        films: Number of training images.
        seconds: Total training time of all detectors.
    """
    given = json.loads(terms.to_json(orient="index"))
    return {
        "command": f"dernet run --profile {workspace.profile.name}",
        "commit": commit(),
        "date": date.today().isoformat(),
        "processor": machine.processor_name(),
        "seed": workspace.profile.seed,
        "data": "virtual" if workspace.virtual else "VinDr-SpineXR",
        "profile": json.loads(workspace.profile.model_dump_json()),
        "films": films,
        "seconds": seconds,
        "detectors": {
            name: {**given.get(name, {}), "scores": json.loads(table.to_json(orient="index"))}
            for name, table in tables.items()
        },
    }


def keep_record(workspace: Workspace) -> Path:
    """Copy a run's record of detectors to `KEPT`, under the profile's name.

    Returns:
        The copy.

    Raises:
        DernetError: The run has no record, or its files differed from its commit.
    """
    made = workspace.tables / "detectors.json"
    if not made.is_file():
        raise DernetError(
            f"There is no {made}, which chapter 11 writes: run the book with "
            f"--profile {workspace.profile.name} first."
        )
    record = json.loads(made.read_text(encoding="utf-8"))
    if "local changes" in record["commit"] or record["commit"] == "unknown":
        raise DernetError(
            f"The run was made from {record['commit']!r}, which cannot be reproduced: commit, and "
            "run again."
        )
    KEPT.mkdir(exist_ok=True)
    kept = KEPT / f"{workspace.profile.name}-detectors.json"
    text = json.dumps(record, indent=1) + "\n"
    return write_whole(kept, lambda part: part.write_text(text, encoding="utf-8"))


def kept_record(name: str) -> dict | None:
    """Return a kept record by name, such as ``night-detectors``; None if there is none."""
    path = KEPT / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

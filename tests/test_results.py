"""Records of long runs: complete, from a commit, and found again."""

import json

import pandas as pd
import pytest

from dernet_utils.book import results as book_results
from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.workspace import Workspace


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A workspace, and the record of a run in it."""
    monkeypatch.setattr(book_results, "KEPT", tmp_path / "kept")
    workspace = Workspace(get_profile("smoke"), tmp_path / "run")
    workspace.dataset_facts.write_text('{"virtual": true}')
    scores = pd.DataFrame({"value": [0.25, float("nan")]}, index=["mAP", "Osteophytes"])
    terms = pd.DataFrame({"steps": [12]}, index=["RetinaNet"])
    tables = {"RetinaNet": scores, "YOLO11-L, 2 epochs": scores}
    return workspace, book_results.detector_record(workspace, tables, terms, films=9, seconds=2.0)


def test_a_record_states_how_it_was_obtained(made):
    _, record = made
    assert record["command"] == "dernet run --profile smoke"
    assert {"commit", "date", "processor", "seed", "profile"} <= record.keys()
    assert (record["data"], record["films"], record["seconds"]) == ("virtual", 9, 2.0)
    assert record["detectors"]["RetinaNet"]["steps"] == 12
    assert "steps" not in record["detectors"]["YOLO11-L, 2 epochs"]
    # A score that is not defined is null: NaN is no JSON.
    assert record["detectors"]["RetinaNet"]["scores"]["Osteophytes"]["value"] is None
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_a_record_is_kept_and_found_again(made):
    workspace, record = made
    assert book_results.kept_record("smoke-detectors") is None
    with pytest.raises(DernetError, match="chapter 11"):
        book_results.keep_record(workspace)
    record["commit"] = "abc1234"
    (workspace.tables / "detectors.json").write_text(json.dumps(record))
    assert book_results.keep_record(workspace).name == "smoke-detectors.json"
    assert book_results.kept_record("smoke-detectors") == record


def test_a_run_that_cannot_be_reproduced_is_not_kept(made):
    workspace, record = made
    record["commit"] = "abc1234 with local changes"
    (workspace.tables / "detectors.json").write_text(json.dumps(record))
    with pytest.raises(DernetError, match="commit"):
        book_results.keep_record(workspace)

"""Whether data are called virtual depends on the dataset's manifest, not on the profile."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_dataset

from dernet_utils.book import classifier_chapter, figures
from dernet_utils.book.paper import compare_with_table_2
from dernet_utils.book.prepare import prepare
from dernet_utils.book.results import detector_record
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.workspace import Workspace
from dernet_utils.dataset.check import repair_dataset
from dernet_utils.dataset.tables import read_manifest
from dernet_utils.inference import export
from dernet_utils.inference.pipeline import Prediction
from dernet_utils.serving.report import html_page
from dernet_utils.triage.ensemble import Decision

PAPER = get_profile("paper").model_copy(update={"cache_px": 32, "folds": 2})
VIRTUAL = {"virtual": True, "studies": []}


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict | None], Workspace]:
    """Prepare a run of the profile `paper` from a small folder with this manifest, or with none."""

    data = write_dataset(tmp_path / "data", {"train": 5, "test": 1})
    monkeypatch.setenv("DERNET_DATA", str(data))

    def make(manifest: dict | None) -> Workspace:
        if manifest is not None:
            (data / "manifest.json").write_text(json.dumps(manifest))
        workspace = Workspace(PAPER, tmp_path / "runs" / "paper")
        prepare(workspace, 1, lambda line: None)
        return workspace

    return make


CASES = pytest.mark.parametrize(
    ("manifest", "virtual"), [(VIRTUAL, True), ({"virtual": False}, False), (None, False)]
)


@CASES
def test_captions_columns_and_records_follow_the_manifest(
    prepared, monkeypatch, manifest: dict | None, virtual: bool
):
    workspace, glued = prepared(manifest), {}
    assert workspace.virtual is virtual
    assert workspace.image_kind == ("virtual radiographs" if virtual else "radiographs")
    monkeypatch.setattr(figures, "glue", lambda name, value, display: glued.update({name: value}))
    train = pd.DataFrame({"study_id": ["a"]})
    classifier_chapter.glue_run_facts("c04", workspace, train)
    assert glued["c04-kind"] == workspace.image_kind
    column = compare_with_table_2(workspace, {"test": {}}, ("DERNet",)).columns[1]
    record = detector_record(workspace, {}, pd.DataFrame(), films=1, seconds=1.0)
    if virtual:
        assert column == "this run: virtual cohort, test" and record["data"] == "virtual"
    else:
        assert column == "this run: VinDr-SpineXR, test" and record["data"] == "VinDr-SpineXR"


@CASES
def test_an_export_and_its_report_follow_the_manifest_of_the_training_data(
    prepared, tmp_path, monkeypatch, manifest: dict | None, virtual: bool
):
    workspace = prepared(manifest)
    # The networks are not at issue here.
    models = {"triage": {}, "detector": "none", "score_threshold": 0.1}
    spread = np.random.default_rng(0).normal(size=(12, 3))
    decision = Decision((), (), (), 1.0, {"youden": 0.5}, 1)
    monkeypatch.setattr(export, "read_models", lambda _: models)
    monkeypatch.setattr(export, "load_detector", lambda _: (None, None))
    monkeypatch.setattr(export, "DetectorModule", lambda network: network)
    monkeypatch.setattr(export, "write_each", lambda jobs: [{} for _ in jobs])
    monkeypatch.setattr(export, "training_embeddings", lambda *_: (spread, spread))
    monkeypatch.setattr(export, "read_decision", lambda _: decision)
    about = json.loads(export.export_run(workspace, tmp_path / "models").read_text())
    assert about["virtual"] is virtual
    assert (tmp_path / "models" / "samples").is_dir() == virtual
    boxes = pd.DataFrame(columns=["lesion_type", "score", "xmin", "ymin", "xmax", "ymax"])
    page = html_page(np.zeros((40, 30), np.uint8), Prediction(0.1, {}, 0.5, boxes), about)
    assert ("virtual" in page) == virtual


def test_a_repaired_copy_of_a_virtual_cohort_is_virtual(prepared, tmp_path, monkeypatch):
    original = prepared(VIRTUAL)
    repair_dataset(original.data_root, tmp_path / "copy")
    monkeypatch.setenv("DERNET_DATA", str(tmp_path / "copy"))
    prepare(original, 1, lambda line: None)
    assert original.data_root == tmp_path / "copy" and original.virtual


def test_another_folder_named_later_does_not_change_what_a_run_was_made_from(
    prepared, tmp_path, monkeypatch
):
    workspace = prepared(VIRTUAL)
    monkeypatch.setenv("DERNET_DATA", str(tmp_path / "elsewhere"))
    assert read_manifest(workspace.data_root) is None and workspace.virtual


def test_a_manifest_added_later_makes_the_run_stale(prepared):
    assert not prepared(None).virtual
    assert prepared(VIRTUAL).virtual


def test_a_malformed_manifest_ends_the_preparation(prepared):
    with pytest.raises(DernetError, match="virtual"):
        prepared({"studies": []})


def test_a_run_that_is_not_prepared_names_the_command(tmp_path):
    with pytest.raises(DernetError, match="dernet prepare --profile paper"):
        Workspace(PAPER, tmp_path).virtual  # noqa: B018


def test_nothing_asks_the_profile_whether_data_are_virtual():
    """Only where data are made or located does the profile decide."""
    assert not hasattr(PAPER, "virtual")
    files = [*(PROJECT / "dernet_utils").rglob("*.py"), *(PROJECT / "notebooks").glob("*.py")]
    asking = {
        path.relative_to(PROJECT).as_posix()
        for path in files
        if re.search(r"(?:renders_cohort|\.patients\b)", path.read_text(encoding="utf-8"))
    }
    assert asking == {
        "dernet_utils/book/graph.py",
        "dernet_utils/book/prepare.py",
        "dernet_utils/core/profiles.py",
        "dernet_utils/core/workspace.py",
        "dernet_utils/virtual/cohort.py",
    }

"""The edition's protocol and packing: nothing is rendered, packed or recorded out of order."""

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from dernet_utils import cli
from dernet_utils.book import edition, prepare
from dernet_utils.book.protocol import DRAFT, frozen_protocol
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import file_digest
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import NETWORKS
from dernet_utils.core.workspace import Workspace
from dernet_utils.detection.training import load_detector
from dernet_utils.triage.training import load_network


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    """A frozen protocol in a repository of its own."""
    path = tmp_path / "repository" / "edition_protocol.md"
    path.parent.mkdir()
    path.write_text("# Protocol\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "frozen"]):
        git(path.parent, *words)
    return path


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_a_frozen_protocol_has_its_last_commit(protocol):
    frozen = frozen_protocol(protocol)
    assert len(frozen.commit) == 40
    assert abs((datetime.now(UTC) - frozen.date).total_seconds()) < 120


@pytest.mark.parametrize(
    ("text", "committed", "said"),
    [
        (f"{DRAFT}\n", True, "is a draft"),
        ("# Protocol, changed\n", False, "not committed"),
    ],
)
def test_nothing_begins_under_a_draft_or_a_changed_protocol(
    protocol, tmp_path, monkeypatch, text, committed, said
):
    protocol.write_text(text)
    if committed:
        git(protocol.parent, "commit", "-q", "-am", "draft")
    with pytest.raises(DernetError, match=said):
        frozen_protocol(protocol)
    monkeypatch.setattr(frozen_protocol, "__defaults__", (protocol,))
    monkeypatch.setattr(cli, "train_all", lambda *_: pytest.fail("a test patient was rendered"))
    done = CliRunner().invoke(cli.app, ["edition"])
    assert done.exit_code == 1 and said in " ".join(done.output.split())
    with pytest.raises(DernetError, match=said):  # by any other command
        prepare.prepare(Workspace(get_profile("edition-training"), tmp_path / "run"), 1, print)
    assert not (tmp_path / "run").exists()


def test_a_protocol_outside_git_is_refused(tmp_path):
    path = tmp_path / "edition_protocol.md"
    path.write_text("# Protocol\n")
    with pytest.raises(DernetError, match="no git repository"):
        frozen_protocol(path)


@pytest.mark.slow
def test_an_edition_is_packed_from_a_run(smoke_book, protocol, tmp_path, monkeypatch):
    """The smoke run's networks, one fold of each; their packed form predicts what is recorded."""
    profile = get_profile("smoke").model_copy(update={"trained_folds": 1})
    workspace = Workspace(profile, tmp_path / "smoke")
    for name in ("cohort", "cache", "tables", "weights"):
        copy = os.link if name == "weights" else shutil.copy2
        original = smoke_book / "runs" / "smoke" / name
        shutil.copytree(original, workspace.folder / name, copy_function=copy)
    monkeypatch.setattr(frozen_protocol, "__defaults__", (protocol,))
    monkeypatch.setattr(edition, "commit", lambda: "0123abc")
    out = tmp_path / "edition"
    manifest = workspace.data_root / "manifest.json"
    later = datetime.now(UTC).timestamp() + 60
    os.utime(manifest, (later - 86_400, later - 86_400))
    with pytest.raises(DernetError, match="younger than the test images"):
        edition.write_edition(workspace, out, print)
    os.utime(manifest, (later, later))
    # Untrained networks rank images at random, so rounding may change any rank.
    monkeypatch.setattr(edition, "AUROC_OFF", 1.0)
    monkeypatch.setattr(edition, "MAP_OFF", 1.0)
    written = edition.write_edition(workspace, out, print)
    assert written == json.loads((out / "manifest.json").read_text())
    assert {path.name: file_digest(path) for path in (out / "weights").iterdir()} == (
        written["weights"]
    )
    assert sum(path.stat().st_size for path in (out / "weights").iterdir()) < 90e6
    assert written["learnt_from"]["studies"] > 0
    for name in NETWORKS:
        load_network(name, out / "weights" / f"{name}.safetensors")
        table = pd.read_parquet(out / "tables" / "triage" / f"{name}-0.parquet")
        assert table["prob"].between(0, 1).all()
        assert table.attrs["checkpoint"] == f"{name}.safetensors"
    load_detector(out / "weights" / "yolo11l.safetensors")
    monkeypatch.setattr(edition, "AUROC_OFF", -1.0)
    with pytest.raises(DernetError, match="ship it in another form"):
        edition.write_edition(workspace, out, print)
    assert json.loads((out / "manifest.json").read_text()) == written, "the last one stays"

"""One chapter's execution: parameters, environment, failures."""

from pathlib import Path

import nbformat
import pytest
from chapters import write_chapter

from dernet_utils.book import execute as book_execute
from dernet_utils.book import graph
from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.workspace import Workspace

pytestmark = pytest.mark.slow  # each test starts a kernel


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(get_profile("smoke"), tmp_path / "runs" / "smoke")


def execute(project: Path, workspace: Workspace, **more) -> tuple[Path, list[str]]:
    lines: list[str] = []
    path = book_execute.execute_chapter("01_x", workspace, 1, lines.append, project=project, **more)
    return path, lines


def test_chapter_is_executed_with_its_profile_and_offline(tmp_path: Path, workspace: Workspace):
    write_chapter(
        tmp_path,
        "01_x",
        "import os\nprint(profile, factor, os.environ['OMP_NUM_THREADS'])",
        "print(os.environ['YOLO_OFFLINE'], os.environ['HF_HUB_OFFLINE'])",
        "print(os.path.dirname(os.environ['YOLO_CONFIG_DIR']) == os.environ['DERNET_RUNS'])",
    )
    path, lines = execute(tmp_path, workspace)
    cells = nbformat.read(path, as_version=4).cells
    printed = [o.text for c in cells if c.cell_type == "code" for o in c.outputs]
    assert printed == ["smoke 2 1\n", "1 1\n", "True\n"]
    assert path.name == "01_x.ipynb" and not list(path.parent.glob("*.partial.ipynb"))
    assert len(lines) >= 2 and all(line.startswith("01_x: ") for line in lines)
    # Papermill's cell is not shown, and its notes, which hold paths, are gone.
    (injected,) = [c for c in cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "remove-cell" in injected.metadata.tags
    assert "papermill" not in path.read_text().replace("# Parameters", "")


def test_libraries_keep_their_settings_where_times_are_measured(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    for name in graph.TRAINING_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    printed = f"import os\nprint(sorted(set(os.environ) & {set(graph.TRAINING_ENVIRONMENT)}))"
    write_chapter(tmp_path, "01_x", printed)
    for cores, wanted in (("half", sorted(graph.TRAINING_ENVIRONMENT)), ("all", [])):
        monkeypatch.setitem(graph.CHAPTERS, "01_x", graph.Chapter(cores=cores))
        path, _ = execute(tmp_path, workspace)
        outputs = [cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells]
        assert [own[0].text for own in outputs if own] == [f"{wanted}\n"]


def test_trial_leaves_the_books_copy_alone(tmp_path: Path, workspace: Workspace):
    write_chapter(tmp_path, "01_x", "print(factor)")
    book, _ = execute(tmp_path, workspace)
    before = book.read_bytes()
    trial, _ = execute(tmp_path, workspace, parameters={"factor": 7})
    assert trial.name == "01_x.trial.ipynb" and book.read_bytes() == before
    assert nbformat.read(trial, as_version=4).cells[-1].outputs[0].text == "7\n"


def test_progress_shows_what_the_running_cell_printed_last(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(book_execute, "HEARTBEAT_S", 0.3)
    bars = (
        "import time\nfrom dernet_utils.book.progress import epoch_bars\n"
        "from dernet_utils.core.profiles import get_profile\n"
        "bars = epoch_bars('resnet50', get_profile('night'))\n"
        "for epoch in (1, 2):\n"
        "    bars(0, {'epoch': epoch, 'train_loss': 0.25, 'validation_auroc': None})\n"
        "    time.sleep(1)"
    )
    printed = "print('epoch 1', flush=True)\nprint('epoch 2', flush=True)\ntime.sleep(1)"
    write_chapter(tmp_path, "01_x", bars, printed, "time.sleep(1)")
    _, lines = execute(tmp_path, workspace)
    assert any("cell 2 of 4" in line and "train loss=0.250" in line for line in lines)
    assert any("cell 3 of 4" in line and line.endswith(": epoch 2") for line in lines)
    assert any("cell 4 of 4" in line and "epoch" not in line for line in lines)


def test_unknown_parameter_is_refused_before_anything_runs(tmp_path: Path, workspace: Workspace):
    write_chapter(tmp_path, "01_x", "print(factor)")
    with pytest.raises(DernetError, match=r"factr.*profile, factor"):
        execute(tmp_path, workspace, parameters={"factr": 7})
    assert not workspace.folder.exists()


def test_failure_names_chapter_cell_and_traceback(tmp_path: Path, workspace: Workspace):
    write_chapter(tmp_path, "01_x", "a = 1", "def f():\n    return {}['gone']\n\nf()", "b = 2")
    with pytest.raises(DernetError) as caught:
        execute(tmp_path, workspace)
    message = str(caught.value)
    assert "01_x" in message and "code cell 3 of 4" in message
    assert "KeyError: 'gone'" in message and "return {}['gone']" in message
    assert "\x1b" not in message
    partial = workspace.chapters / "01_x.partial.ipynb"
    assert "01_x.partial.ipynb" in message and "gone" in partial.read_text()
    assert not (workspace.chapters / "01_x.ipynb").exists()


def test_a_full_disk_is_reported_in_one_sentence(tmp_path: Path, workspace: Workspace):
    write_chapter(tmp_path, "01_x", "with open('/dev/full', 'w') as f:\n    f.write('x' * 100000)")
    with pytest.raises(DernetError, match="disk is full") as caught:
        execute(tmp_path, workspace)
    assert len(str(caught.value).splitlines()) == 1


def test_a_dead_kernel_is_reported(tmp_path: Path, workspace: Workspace):
    write_chapter(tmp_path, "01_x", "import os, signal", "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(DernetError, match=r"01_x.*code cell 3.*died"):
        execute(tmp_path, workspace)

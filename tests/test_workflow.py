"""The workflow: what depends on what, one chapter's execution, and whole runs of a small book."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from dernet_utils.book import build, graph
from dernet_utils.book import execute as book_execute
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import NETWORKS
from dernet_utils.core.workspace import Workspace

HEAD = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# (chap:{label})=
# # A chapter

# %% tags=["parameters"]
profile = ""
factor = 2

"""


def write_chapter(project: Path, name: str, *cells: str) -> Path:
    path = project / "notebooks" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    head = HEAD.replace("{label}", name.partition("_")[2])
    path.write_text(head + "\n\n".join(f"# %%\n{cell}" for cell in cells) + "\n")
    return path


# What depends on what ---------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    package = tmp_path / "dernet_utils"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("import math\n")
    (package / "middle.py").write_text("from dernet_utils.low import thing\n")
    (package / "high.py").write_text("def f():\n    from dernet_utils import middle as m\n")
    (package / "ring.py").write_text("import dernet_utils.ring\n")
    return package


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("import numpy", set()),
        ("from dernet_utils.low import *", {"low"}),
        ("import dernet_utils.middle as m", {"middle", "low"}),
        ("from dernet_utils import high", {"high", "middle", "low"}),
        ("from dernet_utils import __version__", set()),
        ("from dernet_utils.ring import x", {"ring"}),
        ("def f():\n    import dernet_utils.low", {"low"}),
    ],
)
def test_modules_of(package: Path, tmp_path: Path, text: str, modules: set[str]):
    path = tmp_path / "chapter.py"
    path.write_text(text)
    assert graph.modules_of(path, package) == modules


def test_modules_of_broken_python(package: Path, tmp_path: Path):
    path = tmp_path / "chapter.py"
    path.write_text("x = 1\ny = (")
    with pytest.raises(DernetError, match=r"chapter.py is not valid Python.*line 2"):
        graph.modules_of(path, package)


def test_chapters_are_in_reading_order():
    names = graph.chapter_names()
    assert names == sorted(names) and "01_data" in names
    cores = {name: graph.cores_for(name, 8) for name in names}
    triage = ["04_densenet121", "05_efficientnetv2_s", "06_resnet50", "07_ensemble"]
    detection = ["08_yolo11", "09_losses", "10_yolo11_training", "11_other_detectors"]
    evidence = ["12_statistics", "13_explainability", "14_pipeline", "15_audit", "17_outliers"]
    halves = [*triage, *detection, *evidence]
    assert [name for name in names if cores[name] == 4] == halves
    assert [name for name in names if cores[name] == 8] == ["16_onnx"]


def test_the_chapters_that_train_are_known():
    own = [name for name in graph.chapter_names() if graph.trains(name)]
    assert own == ["10_yolo11_training", "13_explainability", "14_pipeline"]


def test_what_others_wait_for_goes_first():
    urgent = graph.urgencies()
    trainings = range(len(urgent), len(urgent) + len(graph.QUICKEST_FIRST))
    soon = [name for name, own in urgent.items() if own > max(trainings)]
    free = ["01_data", "02_imaging", "03_protocol", "08_yolo11", "09_losses"]
    assert soon == [*free, "10_yolo11_training", "A1_virtual_radiographs"]
    late = {name: own for name, own in urgent.items() if name not in soon}
    assert all(own < min(trainings) for own in late.values())
    assert max(soon, key=urgent.get) == "10_yolo11_training"
    assert max(late, key=late.get) == "07_ensemble"
    assert urgent["13_explainability"] > urgent["12_statistics"]


def test_a_chapter_waits_for_the_trainings_that_it_reads():
    assert graph.trainings_of("06_resnet50", 2) == [("resnet50", 0), ("resnet50", 1)]
    every = {(network, fold) for network in NETWORKS for fold in range(3)}
    jobs = graph.trainings_of("07_ensemble", 3)
    assert set(jobs) == every and len(jobs) == 9
    assert graph.trainings_of("02_imaging", 2) == graph.trainings_of("10_yolo11_training", 2) == []


def test_a_chapter_comes_after_those_whose_results_it_reads(tmp_path: Path):
    assert graph.chapters_before("11_other_detectors") == ["10_yolo11_training"]
    assert graph.chapters_before("10_yolo11_training") == []
    assert graph.chapters_before("07_ensemble") == []  # it reads the decision that it has written
    before = ["07_ensemble", "10_yolo11_training", "11_other_detectors"]
    assert graph.chapters_before("12_statistics") == before
    for name in ("13_explainability", "14_pipeline"):
        assert graph.chapters_before(name) == ["07_ensemble", "10_yolo11_training"]
    assert graph.chapters_before("15_audit") == []
    before = ["07_ensemble", "10_yolo11_training", "14_pipeline"]
    assert graph.chapters_before("16_onnx") == before
    assert graph.chapters_before("17_outliers") == []
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    (notebooks / "01_a.py").write_text('table.to_parquet(folder / "a.parquet", index=False)\n')
    (notebooks / "02_b.py").write_text('table.to_parquet(folder / "b.parquet")\n')
    (notebooks / "03_c.py").write_text('pd.read_parquet(folder / "a.parquet")\n')
    assert graph.chapters_before("03_c", tmp_path) == ["01_a"]
    (notebooks / "04_d.py").write_text("predict.write_models(workspace)\n")
    (notebooks / "05_e.py").write_text("pipeline = run_pipeline(workspace)\n")
    assert graph.chapters_before("05_e", tmp_path) == ["04_d"]


def test_a_digest_knows_where_its_parts_end():
    assert graph._digest("ab", "c") != graph._digest("a", "bc")
    assert graph._digest("ab") == graph._digest(b"ab")


def test_data_digest_follows_the_cohorts_numbers_only(tmp_path: Path):
    smoke = get_profile("smoke")

    def digest(**numbers) -> str:
        return graph.data_digest(Workspace(smoke.model_copy(update=numbers), tmp_path))

    assert digest(detect_epochs=9) == digest()
    assert digest(seed=1) != digest()
    assert digest(patients=25) != digest()


def test_data_digest_of_a_real_folder(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DERNET_DATA", str(tiny_dataset))
    workspace = Workspace(get_profile("paper"), tiny_dataset.parent / "run")
    before = graph.data_digest(workspace)
    table = tiny_dataset / "annotations" / "test.csv"
    table.touch()
    assert graph.data_digest(workspace) == before
    table.write_text(table.read_text() + "\n")
    assert graph.data_digest(workspace) != before


# One chapter ------------------------------------------------------------------------------------


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
    said = [o.text for c in cells if c.cell_type == "code" for o in c.outputs]
    assert said == ["smoke 2 1\n", "1 1\n", "True\n"]
    assert path.name == "01_x.ipynb" and not list(path.parent.glob("*.partial.ipynb"))
    assert lines[0] == "01_x: started, 4 code cells" and lines[-1].startswith("01_x: done in 0:0")
    # Papermill's cell is not shown, and its notes, which hold paths, are gone.
    (injected,) = [c for c in cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "remove-cell" in injected.metadata.tags
    assert "papermill" not in path.read_text().replace("# Parameters", "")


def test_what_measures_times_runs_as_it_comes(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    for name in graph.TRAINING_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    told = f"import os\nprint(sorted(set(os.environ) & {set(graph.TRAINING_ENVIRONMENT)}))"
    for cells, wanted in (
        ([told], sorted(graph.TRAINING_ENVIRONMENT)),
        ([told, "if factor > 9:\n    numbers.timings"], []),
    ):
        write_chapter(tmp_path, "01_x", *cells)
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


def test_unknown_parameter_is_refused_before_anything_runs(tmp_path: Path, workspace: Workspace):
    write_chapter(tmp_path, "01_x", "print(factor)")
    with pytest.raises(DernetError, match=r"no parameter factr; .* has profile, factor"):
        execute(tmp_path, workspace, parameters={"factr": 7})
    assert not workspace.folder.exists()


def test_failure_names_chapter_cell_and_traceback(tmp_path: Path, workspace: Workspace):
    write_chapter(tmp_path, "01_x", "a = 1", "def f():\n    return {}['gone']\n\nf()", "b = 2")
    with pytest.raises(DernetError) as caught:
        execute(tmp_path, workspace)
    message = str(caught.value)
    assert "Chapter 01_x failed in code cell 3 of 4" in message
    assert "KeyError: 'gone'" in message and "return {}['gone']" in message
    assert "\x1b" not in message
    partial = workspace.chapters / "01_x.partial.ipynb"
    assert "01_x.partial.ipynb" in message and "gone" in partial.read_text()
    assert not (workspace.chapters / "01_x.ipynb").exists()


def test_full_disk_is_told_in_one_sentence(tmp_path: Path, workspace: Workspace):
    write_chapter(tmp_path, "01_x", "with open('/dev/full', 'w') as f:\n    f.write('x' * 100000)")
    with pytest.raises(DernetError, match="because the disk is full") as caught:
        execute(tmp_path, workspace)
    assert len(str(caught.value).splitlines()) == 1


def test_dead_kernel_is_told(tmp_path: Path, workspace: Workspace):
    write_chapter(tmp_path, "01_x", "import os, signal", "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(DernetError, match=r"01_x stopped in code cell 3: .*died"):
        execute(tmp_path, workspace)


def test_publish_replaces_a_book_and_nothing_else(tmp_path: Path, workspace: Workspace):
    built = workspace.folder / "book" / "_build" / "html"
    built.mkdir(parents=True)
    (built / "index.html").write_text("new")
    (built / "digest.json").write_text("2")
    html = tmp_path / "html"
    html.mkdir()
    (html / "thesis.txt").write_text("mine")
    with pytest.raises(DernetError, match="something else than an earlier book"):
        build.publish(workspace, html)
    assert (html / "thesis.txt").read_text() == "mine"
    (html / "digest.json").write_text("1")
    build.publish(workspace, html)
    assert sorted(path.name for path in html.iterdir()) == ["digest.json", "index.html"]


# A small book, run as a user runs the large one -------------------------------------------------


class SmallBook:
    """A project with the real workflow, three chapters of a few cells, and no radiographs."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("Snakefile", "_config.yml", "requirements.lock"):
            shutil.copy(PROJECT / name, root / name)
        package = root / "dernet_utils"
        package.mkdir()
        for name in ("__init__", "errors", "profiles", "workspace", "workflow", "cli"):
            shutil.copy(PROJECT / "dernet_utils" / f"{name}.py", package)
        (package / "used.py").write_text("VALUE = 1\n")
        (package / "data.py").write_text(
            "from types import SimpleNamespace\n"
            "def read_dataset(root): return SimpleNamespace(images=[1, 2])\n"
            "def load_folds(workspace, images): pass\n"
        )
        (package / "imaging.py").write_text("def cache_images(*a): pass\n")
        (package / "cohort.py").write_text(
            "def ensure_cohort(workspace, progress=None):\n"
            "    table = workspace.data_root / 'annotations' / 'train.csv'\n"
            "    table.parent.mkdir(parents=True, exist_ok=True)\n"
            "    table.touch()\n"
        )
        write_chapter(root, "01_a", "from dernet_utils.used import VALUE", "print(VALUE)")
        write_chapter(root, "02_b", "print(factor)")
        pages = root / "book"
        shutil.copytree(PROJECT / "book" / "_root", pages / "_root")
        (pages / "_static").mkdir()
        for name in ("logo.svg", "style.css"):
            shutil.copy(PROJECT / "book" / "_static" / name, pages / "_static")
        (pages / "references.bib").write_text("")
        (pages / "index.md").write_text("# A book\n\nProfile {{ profile }}, {{ commit }}.\n")
        (root / "_toc.yml").write_text(
            "format: jb-book\nroot: book/index\nchapters:\n"
            "  - file: notebooks/01_a\n  - file: notebooks/02_b\n"
        )

    def start(self) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DERNET")}
        paths = [str(self.root), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [sys.executable, "-m", "dernet_utils.cli", "run", "--profile", "smoke"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    def run(self) -> tuple[int, set[str], str]:
        """Return the exit code, the steps that were done, and all that was said."""
        process = self.start()
        out, err = process.communicate(timeout=200)
        steps = set(re.findall(r"^(\w+): (?:done in|\d+ images ready)", out, re.MULTILINE))
        return process.returncode, steps, out + err


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> SmallBook:
    return SmallBook(tmp_path_factory.mktemp("small"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_only_what_changed_runs_again(book: SmallBook):
    code, steps, said = book.run()
    assert (code, steps) == (0, {"data", "01_a", "02_b", "book"}), said
    html = book.root / "_build" / "html"
    assert "Profile smoke" in (html / "book" / "index.html").read_text()

    for path in book.root.rglob("*"):
        path.touch()
    started = time.monotonic()
    assert book.run()[:2] == (0, set())
    assert time.monotonic() - started < 20

    edit(book.root / "notebooks" / "02_b.py", "# # A chapter", "# # Another chapter")
    assert book.run()[:2] == (0, {"02_b", "book"})
    assert "Another chapter" in (html / "notebooks" / "02_b.html").read_text()

    edit(book.root / "dernet_utils" / "used.py", "1", "2")
    assert book.run()[:2] == (0, {"01_a", "book"})

    edit(book.root / "dernet_utils" / "imaging.py", "pass", "return")
    assert book.run()[:2] == (0, {"data"})

    edit(book.root / "book" / "index.md", "A book", "The book")
    assert book.run()[:2] == (0, {"book"})

    edit(book.root / "dernet_utils" / "cohort.py", "touch()", "write_text('new')")
    assert book.run()[:2] == (0, {"data", "01_a", "02_b", "book"})


def test_failing_chapter_stops_the_run_and_the_next_goes_on(book: SmallBook):
    chapter = book.root / "notebooks" / "02_b.py"
    edit(chapter, "print(factor)", "print(factor + nothing)")
    code, steps, said = book.run()
    assert code == 1 and steps <= {"data", "01_a"}
    assert "Chapter 02_b failed in code cell 2 of 2" in said
    assert "NameError: name 'nothing' is not defined" in said
    assert "dernet_utils/cli.py" not in said  # no traceback of ours
    assert (book.root / "runs" / "smoke" / "chapters" / "02_b.partial.ipynb").is_file()
    edit(chapter, "factor + nothing", "factor")
    code, steps, said = book.run()
    assert code == 0 and {"02_b", "book"} <= steps, said


def test_a_fault_in_the_pages_stops_the_book(book: SmallBook):
    index = book.root / "book" / "index.md"
    edit(index, "{{ commit }}", "{{ commit }} {ref}`no-such-label`")
    code, steps, said = book.run()
    assert code == 1 and "book" not in steps
    assert "index.md" in said and "no-such-label" in said and "Traceback" not in said
    edit(index, " {ref}`no-such-label`", "")


def test_interrupted_run_leaves_no_process_and_continues(book: SmallBook):
    chapter = book.root / "notebooks" / "02_b.py"
    mark = book.root / "started"
    waiting = f"open({str(mark)!r}, 'w').write(str(__import__('os').getpid()))"
    edit(chapter, "print(factor)", f"{waiting}\nimport time; time.sleep(600)")
    process = book.start()
    for _ in range(600):
        if mark.is_file() and mark.read_text():
            break
        time.sleep(0.1)
    kernel = int(mark.read_text())
    second = book.run()
    assert second[0] == 1 and "Another run of the profile 'smoke' is under way" in second[2]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "Interrupted; the next call continues where this one stopped.\n"
    for _ in range(50):
        if not Path(f"/proc/{kernel}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{kernel}").exists()
    edit(chapter, "time.sleep(600)", "print(factor)")
    code, steps, said = book.run()
    assert code == 0 and {"02_b", "book"} <= steps, said

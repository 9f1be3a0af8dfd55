"""Pages published, and whole runs of a small book."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chapters import write_chapter

from dernet_utils.book import build
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.workspace import Workspace

# Publishing -------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(get_profile("smoke"), tmp_path / "runs" / "smoke")


def test_publish_replaces_a_book_and_nothing_else(tmp_path: Path, workspace: Workspace):
    built = workspace.folder / "book" / "_build" / "html"
    built.mkdir(parents=True)
    (built / "index.html").write_text("new")
    (built / "digest.json").write_text("2")
    html = tmp_path / "html"
    html.mkdir()
    (html / "thesis.txt").write_text("mine")
    with pytest.raises(DernetError, match="not an earlier book"):
        build.publish(workspace, html)
    assert (html / "thesis.txt").read_text() == "mine"
    (html / "digest.json").write_text("1")
    build.publish(workspace, html)
    assert sorted(path.name for path in html.iterdir()) == ["digest.json", "index.html"]


# A small book, run as a user runs the large one -------------------------------------------------


# Times are limited as if the machine were idle; tests share it with others.
PATIENCE = 2.5
# What of the package runs as it is, by wing, and what stands for the rest.
REAL = {
    "core": (
        *("environment", "errors", "files", "profiles", "vocabulary", "weights", "workspace"),
    ),
    "book": ("graph", "prepare", "execute", "build", "progress", "protocol"),
}
STUBS = {
    "core/used.py": "VALUE = 1\n",
    "dataset/__init__.py": "",
    "dataset/tables.py": """from types import SimpleNamespace
import pandas as pd

def read_dataset(root):
    images = pd.DataFrame({"image_id": ["a", "b"], "split": ["train", "test"]})
    return SimpleNamespace(images=images, boxes=images, virtual=True)

def read_manifest(root):
    return None
""",
    "dataset/folds.py": "def make_folds(images, folds, seed):\n    return images.assign(fold=0)\n",
    "dataset/prepared.py": """def write_tables(workspace, images, boxes, faint, virtual):
    for name in ("images", "boxes", "faint"):
        (workspace.tables / f"{name}.parquet").touch()
    workspace.dataset_facts.touch()
""",
    "imaging/__init__.py": "",
    "imaging/cache.py": """def cache_images(images, *more):
    return images[["image_id"]].assign(cached_path="x.png", scale=1.0)
""",
    "imaging/decoder.py": """from contextlib import nullcontext
from types import SimpleNamespace

def Decoder(processes):
    return nullcontext(SimpleNamespace(decode=None))
""",
    "virtual/__init__.py": "",
    "virtual/counterfactual.py": "images_with_faint_findings = None\n",
    "virtual/faint.py": "def faint_boxes(*given):\n    return None\n",
    "virtual/cohort.py": """def ensure_cohort(workspace, progress=None):
    for split in ("train", "test"):
        table = workspace.data_root / "annotations" / f"{split}.csv"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.touch()
""",
}


class SmallBook:
    """A project with the real book wing, two chapters of a few cells, and no radiographs.

    The table of chapters does not name these two, so they depend on no other job.
    """

    def __init__(self, root: Path, python: str = sys.executable):
        self.root, self.python = root, python
        for name in ("Snakefile", "_config.yml", "requirements.lock"):
            shutil.copy(PROJECT / name, root / name)
        package = root / "dernet_utils"
        for wing, names in REAL.items():
            (package / wing).mkdir(parents=True)
            for name in ("__init__", *names):
                shutil.copy(PROJECT / "dernet_utils" / wing / f"{name}.py", package / wing)
        for name in ("__init__", "cli"):
            shutil.copy(PROJECT / "dernet_utils" / f"{name}.py", package)
        for name, source in STUBS.items():
            path = package / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        write_chapter(root, "01_a", "from dernet_utils.core.used import VALUE", "print(VALUE)")
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

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start the command line, by default with a whole run."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("DERNET")}
        paths = [str(self.root), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [self.python, "-m", "dernet_utils.cli", *(arguments or ("run",)), "--profile", "smoke"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env=inherited | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, set[str], str]:
        """Return the exit code, the steps that were done, and both outputs."""
        process = self.start(*arguments, **environment)
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


@pytest.mark.slow
def test_only_what_changed_runs_again(book: SmallBook):
    code, steps, output = book.run()
    assert (code, steps) == (0, {"data", "01_a", "02_b", "book"}), output
    html = book.root / "_build" / "html"
    assert "Profile smoke" in (html / "book" / "index.html").read_text()

    for path in book.root.rglob("*"):
        path.touch()
    started = time.monotonic()
    assert book.run()[:2] == (0, set())
    print(f"an untouched book took {time.monotonic() - started:.1f} s")
    assert time.monotonic() - started < 8 * PATIENCE

    edit(book.root / "notebooks" / "02_b.py", "# # A chapter", "# # Another chapter")
    assert book.run()[:2] == (0, {"02_b", "book"})
    assert "Another chapter" in (html / "notebooks" / "02_b.html").read_text()

    edit(book.root / "dernet_utils" / "core" / "used.py", "1", "2")
    assert book.run()[:2] == (0, {"01_a", "book"})

    edit(book.root / "dernet_utils" / "core" / "used.py", "VALUE", "# Explained.\nVALUE")
    edit(book.root / "dernet_utils" / "book" / "prepare.py", '"""Preparation', '"""The preparation')
    assert book.run()[:2] == (0, set())

    edit(book.root / "dernet_utils" / "imaging" / "cache.py", "1.0", "0.5")
    assert book.run()[:2] == (0, {"data"})

    (book.root / "runs" / "smoke" / "tables" / "images.parquet").unlink()
    assert book.run()[:2] == (0, {"data"})

    edit(book.root / "book" / "index.md", "A book", "The book")
    assert book.run()[:2] == (0, {"book"})

    edit(book.root / "dernet_utils" / "virtual" / "cohort.py", "touch()", "write_text('new')")
    assert book.run()[:2] == (0, {"data", "01_a", "02_b", "book"})


@pytest.mark.slow
def test_failing_chapter_stops_the_run_and_the_next_goes_on(book: SmallBook):
    chapter = book.root / "notebooks" / "02_b.py"
    edit(chapter, "print(factor)", "print(factor + nothing)")
    code, steps, output = book.run()
    assert code == 1 and steps <= {"data", "01_a"}
    assert "02_b" in output and "code cell 2 of 2" in output
    assert "NameError: name 'nothing' is not defined" in output
    assert "dernet_utils/cli.py" not in output  # no traceback from this package
    # The end repeats it, since another step may have reported after it.
    end = output[output.index("The run stopped.") :]
    assert "02_b" in end and "NameError: name 'nothing' is not defined" in end
    assert (book.root / "runs" / "smoke" / "chapters" / "02_b.partial.ipynb").is_file()
    edit(chapter, "factor + nothing", "factor")
    code, steps, output = book.run()
    assert code == 0 and {"02_b", "book"} <= steps, output


@pytest.mark.slow
def test_a_step_that_is_killed_is_named(book: SmallBook):
    table = book.root / "dernet_utils" / "imaging" / "cache.py"
    edit(table, "    return", "    import os; os.kill(os.getpid(), 9)\n    return")
    code, _, output = book.run()
    assert code == 1 and "prepare failed" in output and "lack of memory" in output
    edit(table, "    import os; os.kill(os.getpid(), 9)\n", "")
    snakefile = book.root / "Snakefile"
    edit(snakefile, "rule book:", "nonsense()\n\n\nrule book:")
    code, _, output = book.run()
    assert code == 1 and "could not start" in output and "'nonsense' is not defined" in output
    edit(snakefile, "nonsense()\n\n\n", "")


@pytest.mark.slow
def test_a_fault_in_the_pages_stops_the_book(book: SmallBook):
    index = book.root / "book" / "index.md"
    edit(index, "{{ commit }}", "{{ commit }} {ref}`no-such-label`")
    code, steps, output = book.run()
    assert code == 1 and "book" not in steps
    assert "index.md" in output and "no-such-label" in output and "Traceback" not in output
    edit(index, " {ref}`no-such-label`", "")


@pytest.mark.slow
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
    assert second[0] == 1 and "Another run of the profile 'smoke'" in second[2]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in err and len(err.splitlines()) == 1
    for _ in range(50):
        if not Path(f"/proc/{kernel}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{kernel}").exists()
    edit(chapter, "time.sleep(600)", "print(factor)")
    code, steps, output = book.run()
    assert code == 0 and {"02_b", "book"} <= steps, output


@pytest.mark.slow
def test_a_book_in_a_folder_with_an_unusual_name(tmp_path: Path):
    root = tmp_path / "Jürgen's {old} books, 100 % #1"
    root.mkdir()
    (root / ".venv").symlink_to(sys.prefix)
    small = SmallBook(root, str(root / ".venv" / "bin" / Path(sys.executable).name))
    code, steps, output = small.run()
    assert (code, steps) == (0, {"data", "01_a", "02_b", "book"}), output

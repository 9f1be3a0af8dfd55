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

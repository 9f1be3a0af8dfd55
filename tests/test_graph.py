"""What depends on what: the table of chapters, imports, and digests."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from dernet_utils.book import graph, prepare
from dernet_utils.book.graph import CHAPTERS
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import NETWORKS
from dernet_utils.core.workspace import Workspace

# The calls with which a chapter reads another's result, and with which that one wrote it.
HANDED_OVER = {
    "read_decision": "write_decision",
    "open_test_labels": "write_decision",
    "run_pipeline": "write_models",
    "export_run": "write_models",
}


# Imports ----------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of two wings and a module beside them."""
    package = tmp_path / "dernet_utils"
    files = {
        "__init__.py": "",
        "core/__init__.py": "",
        "core/low.py": "import math\n",
        "core/ring.py": "import dernet_utils.core.ring\n",
        "wing/__init__.py": "",
        "wing/middle.py": "from dernet_utils.core.low import thing\n",
        "wing/high.py": "def f():\n    from dernet_utils.wing import middle as m\n",
        "top.py": "from dernet_utils.wing.high import f\n",
    }
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


@pytest.mark.parametrize(
    ("text", "direct", "every"),
    [
        ("import numpy", set(), set()),
        ("from dernet_utils.core.low import *", {"core.low"}, {"core.low"}),
        ("import dernet_utils.wing.middle as m", {"wing.middle"}, {"wing.middle", "core.low"}),
        ("from dernet_utils.wing import middle", {"wing.middle"}, {"wing.middle", "core.low"}),
        ("from dernet_utils.wing import high, nothing", {"wing.high"},
         {"wing.high", "wing.middle", "core.low"}),
        ("from dernet_utils import top", {"top"},
         {"top", "wing.high", "wing.middle", "core.low"}),
        ("from dernet_utils import __version__", set(), set()),
        ("from dernet_utils.core.ring import x", {"core.ring"}, {"core.ring"}),
        ("def f():\n    import dernet_utils.core.low", {"core.low"}, {"core.low"}),
        ("try:\n    pass\nexcept E:\n    import dernet_utils.core.low", {"core.low"}, {"core.low"}),
        ("match x:\n    case 1:\n        import dernet_utils.core.low", {"core.low"}, {"core.low"}),
    ],
)  # fmt: skip
def test_imported_modules(package: Path, tmp_path: Path, text: str, direct: set, every: set):
    path = tmp_path / "chapter.py"
    path.write_text(text)
    assert graph.direct_imports(path, package) == direct
    assert graph.modules_of(path, package) == every


def test_broken_python_names_file_and_line(package: Path, tmp_path: Path):
    path = tmp_path / "chapter.py"
    path.write_text("x = 1\ny = (")
    with pytest.raises(DernetError, match=r"chapter.py.*line 2"):
        graph.modules_of(path, package)


# The table of chapters --------------------------------------------------------------------------


@cache
def code_of(name: str) -> str:
    """A chapter's code, without Markdown and comments."""
    return ast.unparse(ast.parse((PROJECT / "notebooks" / f"{name}.py").read_text()))


def all_before(name: str) -> set[str]:
    """The chapters that are executed before a chapter, directly or through others."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        new = set(graph.chapter_needs(waiting.pop()).after) - found
        found |= new
        waiting += new
    return found


def test_the_table_the_folder_and_the_contents_name_the_same_chapters():
    names = graph.chapter_names()
    toc = yaml.safe_load((PROJECT / "_toc.yml").read_text())
    pages = [page["file"] for part in toc["parts"] for page in part["chapters"]]
    assert names and set(CHAPTERS) == set(names)
    assert [page for page in pages if page.startswith("notebooks/")] == [
        f"notebooks/{name}" for name in names
    ]


def test_no_chapter_waits_for_itself():
    for name, needs in CHAPTERS.items():
        assert set(needs.after) <= set(CHAPTERS)
        assert name not in all_before(name)


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_names_the_networks_whose_trainings_it_reads(name: str):
    code, networks = code_of(name), set(CHAPTERS[name].networks)
    calls = re.findall(r"\b(?:cross_validate\(|show_training\('\w+', )\w+, (\w+|'\w+')", code)
    assert bool(networks) == bool(calls)
    assert networks <= set(NETWORKS)
    literal = {call.strip("'") for call in calls if call.startswith("'")}
    assert literal <= networks
    if literal != {call.strip("'") for call in calls}:  # a loop over all of them
        assert networks == set(NETWORKS)


def test_a_chapter_comes_after_those_whose_results_it_reads():
    written = {}
    for name in CHAPTERS:
        code = code_of(name)
        for result in re.findall(r"to_parquet\(.*?'(\w+\.parquet)'", code):
            written[result] = name
        for function in set(HANDED_OVER.values()):
            if f"{function}(" in code:
                written[function] = name
    assert set(HANDED_OVER.values()) <= set(written)
    for name in CHAPTERS:
        code = code_of(name)
        read = set(re.findall(r"read_parquet\(.*?'(\w+\.parquet)'", code)) & set(written)
        read |= {way for call, way in HANDED_OVER.items() if f"{call}(" in code}
        assert {written[result] for result in read} - {name} <= all_before(name), name


@pytest.mark.parametrize("name", CHAPTERS)
def test_only_a_chapter_that_measures_times_gets_all_cores(name: str):
    assert (CHAPTERS[name].cores == "all") == (".timings" in code_of(name))
    cores = {available: graph.cores_for(name, available) for available in (1, 2, 8)}
    assert all(1 <= own <= available for available, own in cores.items())


def test_a_chapters_trainings_are_a_job_for_each_network_and_fold():
    for name, needs in CHAPTERS.items():
        jobs = graph.trainings_of(name, range(3))
        assert sorted(jobs) == sorted((own, fold) for own in needs.networks for fold in range(3))


def test_the_edition_trains_each_network_with_three_seeds_and_the_detector_once(tmp_path):
    names = graph.trainings(Workspace(get_profile("edition-training"), tmp_path))
    assert len(names) == len(set(names)) == 3 * 3 + 1
    assert "yolo11l" in names and {"resnet50-0", "resnet50-0-43", "resnet50-0-44"} <= set(names)
    assert len(graph.trainings(Workspace(get_profile("paper"), tmp_path))) == 3 * 5 + 1


def test_chapters_that_wait_come_after_the_trainings_and_others_before_them():
    found = graph.priorities(list(CHAPTERS))
    trainings = range(len(CHAPTERS), len(CHAPTERS) + len(graph.QUICKEST_FIRST))
    assert set(graph.QUICKEST_FIRST) == set(NETWORKS)
    for name, needs in CHAPTERS.items():
        waits = bool(needs.networks or needs.after)
        assert found[name] < min(trainings) if waits else found[name] > max(trainings)


def test_among_equals_the_chapter_that_others_wait_for_goes_first(monkeypatch):
    table = {"01_a": graph.Chapter(), "02_b": graph.Chapter(), "03_c": graph.Chapter((), ("02_b",))}
    monkeypatch.setattr(graph, "CHAPTERS", table)
    found = graph.priorities(list(table))
    assert found["02_b"] > found["01_a"] > found["03_c"]


# Digests ----------------------------------------------------------------------------------------


def test_data_digest_follows_the_cohorts_numbers_only(tmp_path: Path):
    smoke = get_profile("smoke")

    def digest(**numbers) -> str:
        return graph.data_digest(Workspace(smoke.model_copy(update=numbers), tmp_path))

    assert digest(detect_epochs=9) == digest()
    assert digest(seed=1) != digest()
    assert digest(patients=25) != digest()
    assert digest(test_seed=1) != digest()


def test_data_digest_of_a_real_folder(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DERNET_DATA", str(tiny_dataset))
    workspace = Workspace(get_profile("paper"), tiny_dataset.parent / "run")
    before = graph.data_digest(workspace)
    table = tiny_dataset / "annotations" / "test.csv"
    table.touch()
    assert graph.data_digest(workspace) == before
    table.write_text(table.read_text() + "\n")
    assert graph.data_digest(workspace) != before
    before, manifest = graph.data_digest(workspace), tiny_dataset / "manifest.json"
    manifest.write_text('{"virtual": true}')
    assert graph.data_digest(workspace) != before
    table.unlink()
    with pytest.raises(DernetError, match=r"test\.csv"):
        graph.data_digest(workspace)


def test_images_on_disk_are_read_again_only_when_they_change(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DERNET_DATA", str(tiny_dataset))
    numbers = {"folds": 2, "cache_px": 64}
    workspace = Workspace(
        get_profile("paper").model_copy(update=numbers), tiny_dataset.parent / "run"
    )
    prepare.prepare(workspace, 1, lambda line: None)
    before = graph.data_digest(workspace)
    other = workspace.tables / "other.parquet"
    other.touch()
    images = sorted((tiny_dataset / "train_images").iterdir())
    images[0].touch()
    assert not prepare.is_prepared(workspace)
    prepare.prepare(workspace, 1, lambda line: None)
    assert prepare.is_prepared(workspace) and other.is_file()
    assert graph.data_digest(workspace) == before  # a file's time is no content
    images[0].write_bytes(images[1].read_bytes())
    assert not prepare.is_prepared(workspace)
    prepare.prepare(workspace, 1, lambda line: None)
    assert graph.data_digest(workspace) != before and not other.exists()


def test_starting_weights_are_part_of_what_starts_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workspace = Workspace(get_profile("smoke"), tmp_path / "run")
    names = ("04_densenet121", "06_resnet50", "10_yolo11_training", "12_statistics")

    def digests() -> dict[str, str]:
        found = {name: graph.chapter_digest(name, workspace) for name in names}
        return found | {name: graph.train_digest(name, workspace) for name in NETWORKS}

    def changed() -> set[str]:
        return {name for name, digest in digests().items() if digest != first[name]}

    monkeypatch.setenv("DERNET_WEIGHTS", str(tmp_path))
    first = digests()
    (tmp_path / "resnet50.pth").write_bytes(b"weights")
    assert changed() == {"resnet50", "06_resnet50", "12_statistics"}
    first = digests()
    (tmp_path / "resnet50.pth").touch()
    assert changed() == set()
    (tmp_path / "resnet50.pth").write_bytes(b"WEIGHTS")
    assert changed() == {"resnet50", "06_resnet50", "12_statistics"}
    first = digests()
    (tmp_path / "yolo11l.pt").write_bytes(b"weights")
    assert changed() == {"10_yolo11_training", "12_statistics"}


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_names_the_networks_that_it_starts(name: str):
    started = re.findall(r"starting_weights\('(\w+)'\)", code_of(name))
    assert set(started) == set(CHAPTERS[name].starts)


DIGESTS = """
import json
from dernet_utils.book import graph
from dernet_utils.core.workspace import open_workspace
workspace = open_workspace("smoke")
print(json.dumps({
    "prepare": graph.prepare_digest(workspace),
    "train": graph.train_digest("densenet121", workspace),
    "chapter": graph.chapter_digest("04_densenet121", workspace),
    "book": graph.book_digest(workspace),
}))
"""


class Copy:
    """A copy of the project's code, whose digests are computed by a fresh process."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("dernet_utils", "notebooks", "book"):
            kept = shutil.ignore_patterns("__pycache__", "*.ipynb")
            shutil.copytree(PROJECT / folder, root / folder, ignore=kept)
        for name in ("requirements.lock", "_config.yml", "_toc.yml"):
            shutil.copy(PROJECT / name, root)

    def digests(self) -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS], cwd=self.root, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(self.root)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def document(self, module: str) -> None:
        """Change every docstring of a module, and add comments."""
        path = self.root / "dernet_utils" / f"{module}.py"
        text = path.read_text()
        changed = re.sub(r'^(\s*""")(?=\w)', r"\1Said otherwise: ", text, flags=re.MULTILINE)
        assert changed.count("Said otherwise") > 3
        path.write_text("# A comment.\n" + changed + "\n# Another one.\n")

    def change(self, module: str) -> None:
        """Add a line of code to a module."""
        path = self.root / "dernet_utils" / f"{module}.py"
        path.write_text(path.read_text() + "\nEXTRA = 1\n")


@pytest.mark.slow
def test_code_counts_and_its_documentation_does_not(tmp_path: Path):
    copy = Copy(tmp_path)
    first = copy.digests()

    def changed() -> set[str]:
        return {name for name, digest in copy.digests().items() if digest != first[name]}

    for module in ("imaging/cache", "triage/crossvalidation", "virtual/cohort", "core/files"):
        copy.document(module)
    assert changed() == set()
    copy.change("triage/crossvalidation")
    assert changed() == {"train", "chapter", "book"}
    copy.change("imaging/cache")
    assert changed() == {"prepare", "train", "chapter", "book"}


@pytest.mark.slow
def test_data_are_part_of_every_digest(tmp_path: Path):
    copy = Copy(tmp_path)
    first = copy.digests()
    copy.change("virtual/cohort")
    assert all(digest != first[name] for name, digest in copy.digests().items())


@pytest.mark.slow
def test_the_table_itself_is_part_of_no_digest(tmp_path: Path):
    copy = Copy(tmp_path)
    first = copy.digests()
    for module in ("book/graph", "book/progress"):
        copy.change(module)
    assert copy.digests() == first

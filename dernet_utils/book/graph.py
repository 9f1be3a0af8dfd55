"""What depends on what: the table of chapters, and digests of all that a step's results come from.

A rule of the Snakefile runs again when the digest of what it depends on differs from the one it ran
with. Only contents count, never file times; of code neither comments nor docstrings.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT, code_digest, digest_of
from dernet_utils.core.vocabulary import NETWORKS
from dernet_utils.core.workspace import Workspace

PACKAGE = PROJECT / "dernet_utils"


@dataclass(frozen=True)
class Chapter:
    """What a chapter needs before it is executed, and what it takes.

    Attributes:
        networks: Triage networks whose trainings, a job for each fold, it reads.
        after: Chapters whose results it reads.
        cores: ``one``; ``half`` of them, where it trains or runs networks; ``all``, where it
            measures times: then the machine is its own, and libraries run as they come.
        trains: Whether it trains a network that is no job of its own, which may take long.
    """

    networks: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    cores: str = "one"
    trains: bool = False


# In reading order. A new chapter is a line here and one in `_toc.yml`.
CHAPTERS = {
    "01_data": Chapter(),
    "02_imaging": Chapter(),
    "03_protocol": Chapter(cores="half"),
    "04_densenet121": Chapter(("densenet121",), cores="half"),
    "05_efficientnetv2_s": Chapter(("tf_efficientnetv2_s",), cores="half"),
    "06_resnet50": Chapter(("resnet50",), cores="half"),
    "07_ensemble": Chapter(NETWORKS),
    "08_yolo11": Chapter(cores="half"),
    "09_losses": Chapter(cores="half"),
    "10_yolo11_training": Chapter(cores="half", trains=True),
    "11_other_detectors": Chapter((), ("10_yolo11_training",), "half"),
    "12_statistics": Chapter(NETWORKS, ("07_ensemble", "10_yolo11_training", "11_other_detectors")),
    "13_explainability": Chapter(
        NETWORKS, ("07_ensemble", "10_yolo11_training"), "half", trains=True
    ),
    "14_pipeline": Chapter(NETWORKS, ("07_ensemble", "10_yolo11_training"), "half", trains=True),
    "15_audit": Chapter(NETWORKS),
    "16_onnx": Chapter(NETWORKS, ("07_ensemble", "10_yolo11_training", "14_pipeline"), "all"),
    "17_outliers": Chapter(("resnet50",), cores="half"),
    "A1_virtual_radiographs": Chapter(),
}
MAX_THREADS = 8  # more help none of our networks
QUICKEST_FIRST = ("densenet121", "resnet50", "tf_efficientnetv2_s")  # by a training's time
# Read by glibc, torch and OpenMP when a process starts; numbers do not depend on them. A step of
# training asks for the same large blocks again and again: they are kept, in huge pages, and not
# fetched anew from the system each time. A thread that waits sleeps: where trainings run side by
# side, spinning ones stall one another.
TRAINING_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "THP_MEM_ALLOC_ENABLE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


# Jobs -------------------------------------------------------------------------------------------


def chapter_names(project: Path = PROJECT) -> list[str]:
    """Return the names of the chapters in reading order, such as ``02_imaging``.

    Those that are in the folder; a chapter that `CHAPTERS` does not know depends on no job.
    """
    return sorted(path.stem for path in (project / "notebooks").glob("[0-9A][0-9]_*.py"))


def chapter_needs(name: str) -> Chapter:
    """Return what a chapter needs; one that `CHAPTERS` does not know needs nothing."""
    return CHAPTERS.get(name, Chapter())


def cores_for(name: str, available: int) -> int:
    """Return how many of the available cores a chapter gets."""
    shares = {"one": 1, "half": max(1, available // 2), "all": available}
    return shares[chapter_needs(name).cores]


def trainings_of(name: str, folds: int) -> list[tuple[str, int]]:
    """Return the trainings that a chapter reads: a network and a fold each."""
    return [(network, fold) for network in chapter_needs(name).networks for fold in range(folds)]


def priorities(names: list[str]) -> dict[str, int]:
    """Return each chapter's priority among all jobs; trainings' begin at the chapters' number.

    A chapter that waits for no job is above the trainings, any other one below them. Among them
    one goes first that many chapters wait for, or that trains, which takes long.
    """
    found = {}
    for name in names:
        needs = chapter_needs(name)
        behind = sum(name in chapter_needs(other).after for other in names)
        above = 0 if needs.networks or needs.after else len(names) + len(QUICKEST_FIRST)
        found[name] = above + behind + needs.trains
    return found


# Code -------------------------------------------------------------------------------------------


def modules_of(path: Path, package: Path = PACKAGE) -> frozenset[str]:
    """Return the modules of `package` that a Python file imports, directly or through others.

    Args:
        path: A module or a chapter in py:percent form.
        package: The folder of the package.

    Returns:
        Names below the package, such as ``imaging.reader``.

    Raises:
        DernetError: A file is not valid Python.
    """
    found: set[str] = set()
    waiting = [path]
    while waiting:
        new = direct_imports(waiting.pop(), package) - found
        found |= new
        waiting += [package / f"{name.replace('.', '/')}.py" for name in new]
    return frozenset(found)


def direct_imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Return the modules of `package` that a Python file itself imports, inside functions too.

    Raises:
        DernetError: The file is not valid Python.
    """
    try:
        names = _names_imported(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise DernetError(
            f"{path.name} is not valid Python: {error.msg} in line {error.lineno}; correct it."
        ) from error
    ours = {name.partition(".")[2] for name in names if name.startswith(f"{package.name}.")}
    # A name may be that of something in a module: as many of its parts as are one count.
    ends = {tuple(name.split(".")[:n]) for name in ours for n in (1, 2)}
    return {".".join(end) for end in ends if package.joinpath(*end).with_suffix(".py").is_file()}


@cache
def _names_imported(source: str) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def _code(*modules: str) -> str:
    """A digest of some modules of the package and of all that they import."""
    every = set(modules)
    for name in modules:
        every |= modules_of(PACKAGE / f"{name.replace('.', '/')}.py")
    return _code_of(frozenset(every))


@cache
def _code_of(modules: frozenset[str]) -> str:
    # Of the profiles only the run's numbers count, and they are in each digest already: another
    # profile's number is no reason to run a step again.
    names = sorted(modules - {"core.profiles"})
    return digest_of(*names, *(code_digest(PACKAGE / f"{n.replace('.', '/')}.py") for n in names))


# Digests ----------------------------------------------------------------------------------------


def data_digest(workspace: Workspace) -> str:
    """Return a digest of what the run's data are made from.

    For the virtual cohort these are its code, its numbers and the locked libraries; for a
    VinDr-SpineXR folder they are its two tables.

    Raises:
        DernetError: The folder that ``DERNET_DATA`` names has no tables.
    """
    profile = workspace.profile
    if profile.virtual:
        return digest_of(f"{profile.patients} {profile.seed}", _code("virtual.cohort"), _lock())
    tables = [workspace.data_root / "annotations" / f"{split}.csv" for split in ("train", "test")]
    for table in tables:
        if not table.is_file():
            raise DernetError(
                f"{workspace.data_root} is not a VinDr-SpineXR folder: {table.name} was expected "
                "in its folder annotations; correct DERNET_DATA."
            )
    return digest_of(str(workspace.data_root), *(table.read_bytes() for table in tables))


def prepare_digest(workspace: Workspace) -> str:
    """Return a digest of all that `prepare` depends on."""
    code = _code("dataset.tables", "dataset.folds", "imaging.cache")
    return digest_of(_numbers(workspace), code, data_digest(workspace))


def train_digest(workspace: Workspace) -> str:
    """Return a digest of all that a training of triage depends on."""
    code = _code("triage.crossvalidation")
    return digest_of(_numbers(workspace), code, data_digest(workspace), _lock())


def chapter_digest(name: str, workspace: Workspace) -> str:
    """Return a digest of all that a chapter's results depend on."""
    path = PROJECT / "notebooks" / f"{name}.py"
    return digest_of(
        path.read_bytes(),
        _code_of(modules_of(path)),
        _numbers(workspace),
        data_digest(workspace),
        _lock(),
        *(chapter_digest(other, workspace) for other in chapter_needs(name).after),
    )


def book_digest(workspace: Workspace) -> str:
    """Return a digest of all that the book's pages depend on."""
    pages = [PROJECT / "_config.yml", PROJECT / "_toc.yml"]
    pages += sorted(path for path in (PROJECT / "book").rglob("*") if path.is_file())
    parts: list[str | bytes] = []
    for path in pages:
        parts += [path.relative_to(PROJECT).as_posix(), path.read_bytes()]
    return digest_of(*parts, *(chapter_digest(name, workspace) for name in chapter_names()))


def _numbers(workspace: Workspace) -> str:
    return workspace.profile.model_dump_json()


def _lock() -> bytes:
    return (PROJECT / "requirements.lock").read_bytes()

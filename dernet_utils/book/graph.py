"""What depends on what: the table of chapters, and digests of everything that shapes a result.

A rule of the Snakefile runs again when the digest of what it depends on has changed since it last
ran. Only contents count, not file times; in the package's code, comments and docstrings do not.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT, code_digest, digest_of
from dernet_utils.core.vocabulary import NETWORKS, SPLITS
from dernet_utils.core.weights import weights_digest
from dernet_utils.core.workspace import Workspace

PACKAGE = PROJECT / "dernet_utils"
# Modules on whose code no result depends. Of the profiles only the run's own numbers matter, which
# are part of each digest; the other two modules order the jobs and report progress.
NOT_COUNTED = frozenset({"core.profiles", "book.graph", "book.progress"})
MAX_THREADS = 8  # none of our networks gains from more
QUICKEST_FIRST = ("densenet121", "resnet50", "tf_efficientnetv2_s")  # by training time
# Environment variables that glibc, torch and OpenMP read when a process starts; results do not
# depend on them. Each training step allocates the same large blocks: they are kept, in huge pages,
# instead of being returned to the system and requested again. Waiting threads sleep: where
# trainings run in parallel, spinning threads would slow each other down.
TRAINING_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "THP_MEM_ALLOC_ENABLE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


# Chapters ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chapter:
    """What a chapter needs before it is executed, and the cores it gets.

    Attributes:
        networks: Triage networks whose trainings, one job per fold, it reads.
        after: Chapters whose results it reads.
        cores: ``one``; ``half`` of the cores, if it trains or runs networks; ``all``, if it
            measures times: then no other job runs, and libraries keep their own settings.
        trains: Whether it trains a network itself, which may take a long time.
        starts: Networks that it builds itself from the checkpoints in ``DERNET_WEIGHTS``.
    """

    networks: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    cores: str = "one"
    trains: bool = False
    starts: tuple[str, ...] = ()


# In reading order. A new chapter is a line here and one in `_toc.yml`.
CHAPTERS = {
    "01_data": Chapter(),
    "02_imaging": Chapter(),
    "03_protocol": Chapter(cores="half"),
    "04_densenet121": Chapter(("densenet121",), cores="half"),
    "05_efficientnetv2_s": Chapter(("tf_efficientnetv2_s",), cores="half"),
    "06_resnet50": Chapter(("resnet50",), cores="half"),
    "07_ensemble": Chapter(NETWORKS),
    "08_yolo11": Chapter(cores="half", starts=("yolo11l",)),
    "09_losses": Chapter(cores="half"),
    "10_yolo11_training": Chapter(cores="half", trains=True, starts=("yolo11l",)),
    "11_other_detectors": Chapter((), ("10_yolo11_training",), "half"),
    "12_statistics": Chapter(NETWORKS, ("07_ensemble", "10_yolo11_training", "11_other_detectors")),
    "13_explainability": Chapter(
        NETWORKS, ("07_ensemble", "10_yolo11_training"), "half", trains=True
    ),
    "14_pipeline": Chapter(
        NETWORKS, ("07_ensemble", "10_yolo11_training"), "half", trains=True, starts=("yolo11l",)
    ),
    "15_audit": Chapter(NETWORKS),
    "16_onnx": Chapter(NETWORKS, ("07_ensemble", "10_yolo11_training", "14_pipeline"), "all"),
    "17_outliers": Chapter(("resnet50",), cores="half"),
    "A1_virtual_radiographs": Chapter(),
    "A2_interval_coverage": Chapter(),
}


def chapter_names(project: Path = PROJECT) -> list[str]:
    """Return the names of the chapters in the folder, in reading order, such as ``02_imaging``."""
    return sorted(path.stem for path in (project / "notebooks").glob("[0-9A][0-9]_*.py"))


def chapter_needs(name: str) -> Chapter:
    """Return what a chapter needs: nothing if it is not in `CHAPTERS`."""
    return CHAPTERS.get(name, Chapter())


def cores_for(name: str, available: int) -> int:
    """Return how many of the available cores a chapter gets."""
    return {"one": 1, "half": max(1, available // 2), "all": available}[chapter_needs(name).cores]


def trainings_of(name: str, held_out: range) -> list[tuple[str, int]]:
    """Return the trainings that a chapter reads, as pairs of a network and a fold held out."""
    return [(network, fold) for network in chapter_needs(name).networks for fold in held_out]


def priorities(names: list[str]) -> dict[str, int]:
    """Return the chapters' priorities; those of the trainings start at the number of chapters.

    A chapter that waits for no job comes before the trainings, any other after them. In both groups
    a chapter for which many others wait, or which trains a network, comes early.
    """
    found = {}
    for name in names:
        needs = chapter_needs(name)
        waiting = sum(name in chapter_needs(other).after for other in names)
        above = 0 if needs.networks or needs.after else len(names) + len(QUICKEST_FIRST)
        found[name] = above + waiting + needs.trains
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
        waiting += [_module_file(name, package) for name in new]
    return frozenset(found)


def direct_imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Return the modules of `package` that a Python file itself imports, inside functions too.

    Raises:
        DernetError: The file is not valid Python.
    """
    try:
        names = _imported_names(path.read_text(encoding="utf-8"), package.name)
    except SyntaxError as error:
        raise DernetError(
            f"{path.name} is not valid Python: {error.msg} in line {error.lineno}; correct it."
        ) from error
    return {name for name in names if _module_file(name, package).is_file()}


@cache
def _imported_names(source: str, package: str) -> frozenset[str]:
    """Return what a source imports from a package: names of modules, or of objects in them."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        waiting += (own for own in ast.iter_child_nodes(node) if not isinstance(own, ast.expr))
    ours = (name.split(".")[1:] for name in names if name.startswith(f"{package}."))
    # `imaging.reader.read_radiograph` is a function of the module `imaging.reader`.
    return frozenset(".".join(parts[:n]) for parts in ours for n in (1, 2) if n <= len(parts))


def _module_file(name: str, package: Path = PACKAGE) -> Path:
    return package / f"{name.replace('.', '/')}.py"


def _code_with_imports(module: str) -> str:
    """Return a digest of a module of the package and of all its imports from the package."""
    return _code_of(modules_of(_module_file(module)) | {module})


def _code_of(modules: frozenset[str]) -> str:
    names = sorted(modules - NOT_COUNTED)
    return digest_of(*names, *(code_digest(_module_file(name)) for name in names))


# Digests ----------------------------------------------------------------------------------------


def tables_digest(workspace: Workspace) -> str:
    """Return a digest of everything from which the run's dataset is made, but images on disk.

    For a cohort that the run renders: its code, its numbers and the locked libraries. For a
    VinDr-SpineXR folder: its two tables and its manifest, if it has one.

    Raises:
        DernetError: The folder that ``DERNET_DATA`` names has no tables.
    """
    profile = workspace.profile
    if profile.renders_cohort:
        code = _code_with_imports("virtual.cohort")
        numbers = profile.patients, profile.seed, profile.test_seed, profile.rendered
        return digest_of(str(numbers), code, _lock())
    tables = [workspace.data_root / "annotations" / f"{split}.csv" for split in SPLITS]
    for table in tables:
        if not table.is_file():
            raise DernetError(
                f"{workspace.data_root} is not a VinDr-SpineXR folder: it has no annotations/"
                f"{table.name}. Correct DERNET_DATA."
            )
    manifest = workspace.data_root / "manifest.json"
    files = [*tables, manifest] if manifest.is_file() else tables
    return digest_of(str(workspace.data_root), *(file.read_bytes() for file in files))


def data_digest(workspace: Workspace) -> str:
    """Return a digest of a run's dataset: `tables_digest`, and the contents of images on disk.

    Their contents are known when they have been prepared: `prepare.prepare` reads them.

    Raises:
        DernetError: As `tables_digest` raises.
    """
    path, tables = images_record(workspace), tables_digest(workspace)
    return digest_of(tables, path.read_bytes()) if path.is_file() else tables


def images_record(workspace: Workspace) -> Path:
    """Return the file with the digest of the contents of a VinDr-SpineXR folder's images."""
    return workspace.folder / "images.digest"


def prepare_digest(workspace: Workspace) -> str:
    """Return a digest of everything that `prepare.prepare` depends on.

    Of images on disk it holds names, sizes and times: if one changes, the preparation reads that
    image again. The chapters run again only if its contents have changed (see `data_digest`).

    Raises:
        DernetError: As `tables_digest` raises.
    """
    code, tables = _code_with_imports("book.prepare"), tables_digest(workspace)
    return digest_of(_numbers(workspace), code, tables, *_image_states(workspace))


def _image_states(workspace: Workspace) -> list[str]:
    if workspace.profile.renders_cohort:
        return []
    folders = [workspace.data_root / f"{split}_images" for split in SPLITS]
    paths = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    states = ((path, path.stat()) for path in paths if path.is_file())
    return [f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states]


def train_digest(network: str, workspace: Workspace) -> str:
    """Return a digest of everything that the training of a triage network depends on."""
    code = _code_with_imports("triage.crossvalidation")
    start = weights_digest([network])
    return digest_of(_numbers(workspace), code, data_digest(workspace), _lock(), start)


def detector_digest(workspace: Workspace) -> str:
    """Return a digest of everything that the training of the detector depends on."""
    code = _code_with_imports("detection.training")
    start = weights_digest(["yolo11l"])
    return digest_of(_numbers(workspace), code, data_digest(workspace), _lock(), start)


def trainings(workspace: Workspace) -> list[str]:
    """Return the names of all trainings of a run: ``<network>-<fold>[-<seed>]`` and ``yolo11l``."""
    jobs = [f"{network}-{fold}" for network in NETWORKS for fold in workspace.profile.held_out]
    seeds = [f"{job}-{seed}" for seed in workspace.profile.more_seeds for job in jobs]
    return [*jobs, "yolo11l", *seeds]


def chapter_digest(name: str, workspace: Workspace) -> str:
    """Return a digest of everything that a chapter's results depend on.

    Raises:
        DernetError: As `data_digest` and `modules_of` raise.
    """
    path, needs = PROJECT / "notebooks" / f"{name}.py", chapter_needs(name)
    return digest_of(
        path.read_bytes(),
        _code_of(modules_of(path)),
        _numbers(workspace),
        data_digest(workspace),
        _lock(),
        weights_digest(needs.networks + needs.starts),
        *(chapter_digest(other, workspace) for other in needs.after),
    )


def book_digest(workspace: Workspace) -> str:
    """Return a digest of everything that the book's pages depend on."""
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

"""The package's layout: imports in one direction, small modules, servers without torch."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dernet_utils
from dernet_utils.book.graph import PACKAGE, direct_imports

# As the package's docstring lists them, each line `name  what it holds`.
WINGS = [
    line.split()[0]
    for line in dernet_utils.__doc__.splitlines()
    if line.startswith("    ") and not line.startswith("     ")
]
MOST_LEVELS, MOST_LINES = 8, 500
FILES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


@cache
def imports(module: str) -> frozenset[str]:
    return frozenset(direct_imports(FILES[module]))


def level(module: str, above: tuple[str, ...] = ()) -> int:
    """Return 1 for a module that imports none of ours, else one more than its highest import."""
    assert module not in above, " -> ".join((*above, module))
    return 1 + max((level(other, (*above, module)) for other in imports(module)), default=0)


def wing(module: str) -> str:
    return module.partition(".")[0]


def test_the_docstring_names_every_wing():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(WINGS) == folders | {"cli"}
    assert {wing(module) for module in FILES} == set(WINGS)


def test_wings_import_in_one_direction():
    upward = [
        (module, other)
        for module in FILES
        for other in imports(module)
        if WINGS.index(wing(other)) > WINGS.index(wing(module))
    ]
    assert upward == []


def test_there_is_no_circle_and_few_levels():
    assert max(level(module) for module in FILES) <= MOST_LEVELS


@pytest.mark.parametrize("module", FILES)
def test_a_module_is_small_and_says_what_it_is_for(module: str):
    text = FILES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("name", [name for name in WINGS if name != "cli"])
def test_a_wing_is_described_and_imports_nothing(name: str):
    tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and len(tree.body) == 1


def imported_by(statement: str, *names: str) -> list[str]:
    """Return which of some packages a statement loads in a fresh process."""
    code = f"import sys\n{statement}\nprint(*(n for n in {names} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["serving.web", "inference.onnx_backend", "inference.ood"])
def test_a_server_needs_no_torch(module: str):
    assert imported_by(f"import dernet_utils.{module}", "torch", "torchvision") == []


@pytest.mark.parametrize("module", ["cli", "book.build", "book.graph"])
def test_a_run_starts_lean(module: str):
    heavy = ("torch", "pandas", "numpy", "tqdm", "cv2", "papermill")
    assert imported_by(f"import dernet_utils.{module}", *heavy) == []


def test_a_heavy_import_would_be_seen():
    assert imported_by("import numpy", "torch", "numpy") == ["numpy"]


def test_a_circle_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "dernet_utils" / "core"
    package.mkdir(parents=True)
    for one, other in (("a", "b"), ("b", "a")):
        (package / f"{one}.py").write_text(f"def f():\n    import dernet_utils.core.{other}\n")
    found = {
        f"core.{name}": frozenset(direct_imports(package / f"{name}.py", package.parent))
        for name in "ab"
    }
    monkeypatch.setitem(globals(), "imports", found.get)
    with pytest.raises(AssertionError, match=r"core\.a -> core\.b -> core\.a"):
        level("core.a")

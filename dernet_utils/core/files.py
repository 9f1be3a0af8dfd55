"""The project's folder and those that a user names, atomic writes, digests of files and code."""

import ast
import hashlib
import os
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent  # holds the package and the chapters


def named_folder(variable: str) -> Path | None:
    """Return the folder that an environment variable names; None if it is not set.

    A leading ``~`` is the home folder. A relative path starts where the command was typed:
    `environment.isolate` and the Snakefile make it absolute for all that the command starts.

    Args:
        variable: Such as ``DERNET_DATA``.
    """
    named = os.path.expanduser(os.environ.get(variable, ""))  # noqa: PTH111  without an error
    return Path(named).resolve() if named else None


def runs_folder() -> Path:
    """Return the folder of all runs: ``DERNET_RUNS``, or ``runs`` in the project."""
    return named_folder("DERNET_RUNS") or PROJECT / "runs"


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file under another name, then rename it: a killed run never leaves half a file.

    Args:
        path: The file; replaced where it exists.
        write: Called with the other name, in the same folder and with the same suffix.

    Returns:
        `path`.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_whole(folder / "a.txt", lambda part: part.write_text("whole")).read_text()
    'whole'
    >>> [path.name for path in folder.iterdir()]
    ['a.txt']
    """
    path = Path(path)
    part = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def digest_of(*parts: str | bytes) -> str:
    """Return the SHA-256 of some parts, hexadecimal; it depends on where one part ends.

    >>> digest_of("ab", "c") == digest_of("a", "bc")
    False
    """
    whole = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        whole.update(f"{len(content)}:".encode() + content)
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal, without reading it into memory at once."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(path: Path) -> str:
    """Return a digest of a Python file's code; comments and docstrings do not count.

    Raises:
        SyntaxError: The file is not valid Python.

    >>> import tempfile
    >>> first, other = (Path(tempfile.mkdtemp()) / "a.py" for _ in range(2))
    >>> _ = first.write_text("def f(x):\\n    'Double.'\\n    return 2 * x  # twice")
    >>> _ = other.write_text("def f(x):\\n    'Twice as much.'\\n    return 2 * x")
    >>> code_digest(first) == code_digest(other)
    True
    """
    return _source_digest(Path(path).read_text(encoding="utf-8"))


@cache
def _source_digest(source: str) -> str:
    tree = ast.parse(source)
    waiting: list[ast.AST] = [tree]
    while waiting:  # definitions are statements: no need to look into expressions
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
        waiting += (own for own in ast.iter_child_nodes(node) if not isinstance(own, ast.expr))
    return digest_of(ast.dump(tree))


def modules_digest(*modules: str) -> str:
    """Return a digest of the code of some modules of the package, such as ``triage/training``."""
    folder = PROJECT / "dernet_utils"
    return digest_of(*(code_digest(folder / f"{module}.py") for module in modules))

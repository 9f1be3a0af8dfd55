"""Checkpoints of a user's own, from which trainings start instead of random weights."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import digest_of, file_digest, named_folder

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def starting_weights(name: str) -> Path | None:
    """Return the local checkpoint that training starts from, or None for random weights.

    The environment variable ``DERNET_WEIGHTS`` names a folder with ``<name>.safetensors``,
    ``.pth``, ``.pt`` or ``.bin``.

    Args:
        name: One of `NETWORKS`, or ``yolo11l``.

    Raises:
        DernetError: The variable is set and the folder holds no such file.
    """
    folder = named_folder("DERNET_WEIGHTS")
    if folder is None:
        return None
    found = _checkpoint(folder, name)
    if found is None:
        raise DernetError(
            f"DERNET_WEIGHTS names {folder}, which holds no {name}.safetensors (or .pth, .pt, "
            ".bin): put the checkpoint there, or unset the variable to start from random weights."
        )
    return found


def weights_digest(names: Iterable[str]) -> str:
    """Return a digest of the contents of the checkpoints that some networks start from.

    Args:
        names: As `starting_weights` takes them; a missing checkpoint counts as none.
    """
    folder = named_folder("DERNET_WEIGHTS")
    if folder is None:
        return "random"
    found = {name: _checkpoint(folder, name) for name in names}
    return digest_of(
        *(f"{name} {_content(path) if path else 'none'}" for name, path in found.items())
    )


def _checkpoint(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _content(path: Path) -> str:
    state = path.stat()
    return _content_of(path, state.st_size, state.st_mtime_ns)


@cache
def _content_of(path: Path, size: int, time_ns: int) -> str:
    """Return a file's digest; a file of unchanged size and time is read once per process."""
    return path.suffix + file_digest(path)

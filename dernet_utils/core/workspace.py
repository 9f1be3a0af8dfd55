"""Where a run keeps its files: the folder ``runs/<profile>``."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.profiles import Profile, get_profile


@dataclass(frozen=True)
class Workspace:
    """The folders of one run.

    Attributes:
        profile: The run's numbers.
        folder: ``runs/<profile>``; its subfolders are created when first used.
    """

    profile: Profile
    folder: Path

    @property
    def data_root(self) -> Path:
        """The dataset: the virtual cohort, or the folder that ``DERNET_DATA`` names.

        Raises:
            DernetError: The dataset is not virtual, and ``DERNET_DATA`` is not set.
        """
        if self.profile.virtual:
            return self.folder / "cohort"
        named = os.environ.get("DERNET_DATA", "")
        if not named:
            raise DernetError(
                f"The profile {self.profile.name!r} reads VinDr-SpineXR from disk: set the "
                "environment variable DERNET_DATA to its folder."
            )
        return Path(named).expanduser()

    @property
    def cache(self) -> Path:
        """Preprocessed images."""
        return self._made("cache")

    @property
    def weights(self) -> Path:
        """Checkpoints and training curves."""
        return self._made("weights")

    @property
    def models(self) -> Path:
        """Networks as ONNX files, with their manifest."""
        return self._made("models")

    @property
    def tables(self) -> Path:
        """Folds, probabilities, boxes and scores, as Parquet and JSON."""
        return self._made("tables")

    @property
    def chapters(self) -> Path:
        """Executed notebooks."""
        return self._made("chapters")

    def _made(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def open_workspace(profile: str = "") -> Workspace:
    """Return the workspace of a profile.

    Runs are kept in the project's folder ``runs``, or in the folder that ``DERNET_RUNS`` names.

    Args:
        profile: A name as `get_profile` takes it.

    Raises:
        DernetError: The profile is unknown.
    """
    chosen = get_profile(profile)
    runs = Path(os.environ.get("DERNET_RUNS", "") or PROJECT / "runs")
    return Workspace(chosen, runs.resolve() / chosen.name)


def commit() -> str:
    """Return the project's short commit, with a note of local changes; ``unknown`` without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(PROJECT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        found, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found} with local changes" if changed else found

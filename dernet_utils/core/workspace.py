"""Where a run keeps its files: the folder ``runs/<profile>``."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT, named_folder, runs_folder
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
        """The dataset: the run's own virtual cohort, or the folder that ``DERNET_DATA`` names.

        Raises:
            DernetError: The profile renders no cohort, and ``DERNET_DATA`` is not set.
        """
        if self.profile.renders_cohort:
            return self.folder / "cohort"
        named = named_folder("DERNET_DATA")
        if named is None:
            raise DernetError(
                f"The profile {self.profile.name!r} reads VinDr-SpineXR from disk: set the "
                "environment variable DERNET_DATA to its folder."
            )
        return named

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

    @property
    def dataset_facts(self) -> Path:
        """What the preparation found out about the dataset as a whole, as JSON."""
        return self.tables / "dataset.json"

    @property
    def virtual(self) -> bool:
        """Whether the run's radiographs are virtual, as the dataset's manifest stated.

        The preparation stores this beside the tables that it makes from the dataset, so it always
        describes the data on which the run's networks are trained.

        Raises:
            DernetError: The run has not been prepared.
        """
        if not self.dataset_facts.is_file():
            raise self.unprepared(self.dataset_facts)
        return json.loads(self.dataset_facts.read_text(encoding="utf-8"))["virtual"]

    @property
    def image_kind(self) -> str:
        """What captions call the run's images: ``virtual radiographs`` or ``radiographs``.

        Raises:
            DernetError: As `virtual` raises.
        """
        return "virtual radiographs" if self.virtual else "radiographs"

    def unprepared(self, path: Path) -> DernetError:
        """Return the error about a file that the run's preparation writes and that is missing."""
        return DernetError(
            f"The run's preparation writes {path}, which is missing: call `dernet prepare "
            f"--profile {self.profile.name}` first."
        )

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
    return Workspace(chosen, runs_folder() / chosen.name)


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

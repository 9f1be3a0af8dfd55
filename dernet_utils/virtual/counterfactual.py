"""What only a virtual film has: each finding's exact mask, and the film as it were without it.

Stored beside the films as ``twins/<image_id>.npz``, one entry a finding of the manifest and in its
order: a mask as bits inside its rectangle, and the change of grey from the film to its twin, in
steps of 1/1023 inside the rectangle where there is any. A finding that is off the film has none.
"""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dernet_utils.core.errors import DernetError

STEPS = 1023  # of grey from black to white: as fine as a film of 10 bits


class Counterfactual(NamedTuple):
    """How a film differs from the same film without one finding.

    Attributes:
        visibility: Contrast to noise inside the mask.
        mask: Where the finding's shadow is, bool (H, W).
        part: Rows and columns outside which the two films are the same.
        change: The film without the finding less the film, there; from -1 to 1.
    """

    visibility: float
    mask: np.ndarray
    part: tuple[slice, slice]
    change: np.ndarray

    def without(self, grey: np.ndarray) -> np.ndarray:
        """Return the film without the finding.

        Args:
            grey: The film as `imaging.read_radiograph` decodes it, uint8 (H, W).

        Returns:
            uint8 (H, W).

        Raises:
            ValueError: The film has another shape than the mask.
        """
        if grey.shape != self.mask.shape:
            raise ValueError(f"The film is {grey.shape}, its twin {self.mask.shape} pixels.")
        twin = grey.astype(np.float64)
        twin[self.part] += 255.0 * self.change
        return twin.round().clip(0, 255).astype(np.uint8)


def write_counterfactuals(path: Path, twins: list[Counterfactual | None]) -> None:
    """Write a film's twins, one entry a finding; the same twins give the same bytes."""
    arrays = {}
    for number, twin in enumerate(twins):
        if twin is None:
            continue
        steps = np.zeros(twin.mask.shape, np.int16)
        steps[twin.part] = np.round(twin.change * STEPS)
        spans = np.array([*_spans(twin.mask), *_spans(steps != 0)], np.int32)
        (a, b), (c, d), (e, f), (g, h) = spans
        arrays |= {
            f"about_{number}": np.array([*twin.mask.shape, *spans.ravel()], np.int32),
            f"visibility_{number}": np.float64(twin.visibility),
            f"mask_{number}": np.packbits(twin.mask[a:b, c:d]),
            f"change_{number}": steps[e:f, g:h],
        }
    np.savez_compressed(path, findings=np.int32(len(twins)), **arrays)


def read_counterfactuals(root: Path, image_id: str) -> list[Counterfactual | None]:
    """Read a virtual film's twins.

    Args:
        root: The cohort's folder.
        image_id: The film.

    Returns:
        One entry a finding of the study, in the manifest's order; None where a finding is off
        the film.

    Raises:
        DernetError: There are none, as in a dataset of real films, or the file is damaged.
    """
    path = Path(root) / "twins" / f"{image_id}.npz"
    if not path.is_file():
        raise DernetError(f"There is no {path}: only films of a virtual cohort have twins.")
    try:
        with np.load(path) as arrays:
            return [_counterfactual(arrays, number) for number in range(int(arrays["findings"]))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DernetError(f"{path} is damaged ({error}): make the cohort again.") from error


def _counterfactual(arrays: dict, number: int) -> Counterfactual | None:
    if f"about_{number}" not in arrays:
        return None
    height, width, a, b, c, d, e, f, g, h = map(int, arrays[f"about_{number}"])
    mask = np.zeros((height, width), bool)
    bits = np.unpackbits(arrays[f"mask_{number}"], count=(b - a) * (d - c))
    mask[a:b, c:d] = bits.reshape(b - a, d - c)
    change = arrays[f"change_{number}"] / STEPS
    return Counterfactual(float(arrays[f"visibility_{number}"]), mask, np.s_[e:f, g:h], change)


def _spans(where: np.ndarray) -> list[tuple[int, int]]:
    """Return the first and one past the last row and column that hold anything."""
    indices = [np.flatnonzero(where.any(axis=axis)) for axis in (1, 0)]
    return [(int(i[0]), int(i[-1]) + 1) if len(i) else (0, 0) for i in indices]


def labelled_findings(manifest: dict | None) -> pd.DataFrame:
    """Return the findings of a virtual cohort that its tables have a box for.

    Args:
        manifest: As `read_manifest` returns it.

    Returns:
        One row a box: ``image_id``, ``number`` (the finding's place among those that `read_twins`
        returns for the film), ``lesion_type`` and ``visibility``.

    Raises:
        DernetError: There is no manifest.
    """
    if manifest is None:
        raise DernetError(
            "Exact masks are known of virtual films only, and this dataset has no manifest: take a "
            "profile with a virtual cohort."
        )
    rows = [
        (film["image_id"], number, finding["type"], seen["visibility"])
        for study in manifest["studies"]
        for film in study["films"]
        for number, (finding, seen) in enumerate(
            zip(study["findings"], film["findings"], strict=True)
        )
        if seen["box"] is not None
    ]
    return pd.DataFrame(rows, columns=["image_id", "number", "lesion_type", "visibility"])

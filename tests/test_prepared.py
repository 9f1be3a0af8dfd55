"""A run's preparation writes its tables and images once, and every reader gets the same."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import write_dataset

from dernet_utils.book import prepare as book_prepare
from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.workspace import Workspace
from dernet_utils.dataset.folds import make_folds
from dernet_utils.dataset.prepared import read_boxes, read_faint_boxes, read_images
from dernet_utils.dataset.tables import BOXES, read_dataset
from dernet_utils.imaging.enhance import load_cached

PROFILE = get_profile("paper").model_copy(update={"cache_px": 64, "folds": 3})
COLUMNS = ["image_id", "study_id", "series_id", "split", "abnormal", "boxes", "view"]
COLUMNS += ["height", "width", "dicom_path", "fold", "cached_path", "scale", "faint"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run prepared from a small folder; with the lines of progress that it reported."""
    folder = tmp_path_factory.mktemp("prepared")
    write_dataset(folder / "data", {"train": 9, "test": 2})
    workspace, reported = Workspace(PROFILE, folder / "runs/paper"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DERNET_DATA", str(folder / "data"))
        book_prepare.prepare(workspace, 1, reported.append)
        yield workspace, reported


def test_tables_hold_the_dataset_and_its_folds_by_study(prepared):
    workspace, reported = prepared
    dataset, images = read_dataset(workspace.data_root), read_images(workspace)
    assert list(images.columns) == COLUMNS
    same = list(dataset.images.columns)
    pd.testing.assert_frame_equal(images[same], dataset.images, check_dtype=False)
    pd.testing.assert_frame_equal(read_boxes(workspace), dataset.boxes)
    assert list(read_boxes(workspace).columns) == list(BOXES.columns)
    train = images["split"] == "train"
    folds = make_folds(dataset.images[dataset.images["split"] == "train"], 3, PROFILE.seed)
    written = images.loc[train, ["image_id", "study_id", "fold"]].sort_values("image_id")
    pd.testing.assert_frame_equal(written.reset_index(drop=True), folds, check_dtype=False)
    assert (images[train].groupby("study_id")["fold"].nunique() == 1).all()
    assert str(images["fold"].dtype) == "Int64" and images.loc[~train, "fold"].isna().all()
    assert reported[-1].startswith(f"data: {len(images)} images ready")


def test_cached_images_are_those_of_the_table(prepared):
    for image in read_images(prepared[0]).itertuples():
        height, width = load_cached(image.cached_path).shape
        assert max(height, width) == 64
        assert (height, width) == pytest.approx(
            (image.height * image.scale, image.width * image.scale), abs=0.51
        )


def test_paths_are_relative_on_disk_and_a_moved_run_still_reads(prepared, tmp_path, monkeypatch):
    workspace, _ = prepared
    stored = pd.read_parquet(workspace.tables / "images.parquet")
    paths = pd.concat([stored["dicom_path"], stored["cached_path"]])
    assert not any(Path(path).is_absolute() for path in paths)
    before = read_images(workspace)
    moved = Workspace(PROFILE, tmp_path / "elsewhere")
    for old, new in ((workspace.folder, moved.folder), (workspace.data_root, tmp_path / "data")):
        shutil.copytree(old, new)
    monkeypatch.setenv("DERNET_DATA", str(tmp_path / "data"))
    images = read_images(moved)
    for column, folder in (("dicom_path", tmp_path / "data"), ("cached_path", moved.folder)):
        assert all(Path(path).is_relative_to(folder) for path in images[column])
        assert all(Path(path).is_file() for path in images[column])
    kept = [name for name in COLUMNS if not name.endswith("_path")]
    pd.testing.assert_frame_equal(images[kept], before[kept])
    assert read_boxes(moved).equals(read_boxes(workspace))


def test_a_prepared_run_is_not_prepared_again(prepared, monkeypatch):
    workspace, _ = prepared
    calls = []
    monkeypatch.setattr(book_prepare, "prepare", lambda *given: calls.append(given))
    book_prepare.ensure_prepared(workspace)
    assert calls == []
    stamp = workspace.tables / "prepared.txt"
    whole = stamp.read_text()
    for other in ("of something else", None):  # made from other data, or not finished
        stamp.write_text(other) if other else stamp.unlink()
        book_prepare.ensure_prepared(workspace)
    stamp.write_text(whole)
    assert [given[0] for given in calls] == [workspace, workspace]


@pytest.mark.parametrize("read", [read_images, read_boxes, read_faint_boxes])
def test_a_run_that_is_not_prepared_names_the_command(tmp_path, read):
    with pytest.raises(DernetError, match="dernet prepare --profile paper"):
        read(Workspace(PROFILE, tmp_path))

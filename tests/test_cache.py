"""The cache: made once, reused, made again where anything changed, never half written."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dicom_files import grey_picture, make_dataset, to_bytes

from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import get_profile
from dernet_utils.imaging import cache as imaging_cache
from dernet_utils.imaging.cache import cache_images
from dernet_utils.imaging.enhance import load_cached, preprocess
from dernet_utils.imaging.radiograph import Radiograph
from dernet_utils.imaging.reader import decode_radiograph as decode
from dernet_utils.imaging.reader import read_radiograph


@pytest.fixture
def profile():
    return get_profile("smoke").model_copy(update={"cache_px": 24})


@pytest.fixture
def images(tmp_path) -> pd.DataFrame:
    """Five DICOM files that differ."""
    paths = [tmp_path / f"image{i}.dicom" for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(to_bytes(make_dataset(np.roll(grey_picture(48, 40), i, axis=0))))
    return pd.DataFrame({"image_id": [path.stem for path in paths], "dicom_path": map(str, paths)})


def refuse(data: bytes) -> Radiograph:
    raise AssertionError("a file was decoded again")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_cache_holds_preprocessed_images_in_order(tmp_path, images, profile, workers):
    seen = []
    shuffled = images.iloc[[3, 0, 4, 1, 2]].reset_index(drop=True)
    cached = cache_images(
        shuffled, tmp_path / "cache", profile, decode, workers, lambda *done: seen.append(done)
    )
    assert cached.image_id.tolist() == shuffled.image_id.tolist()
    assert set(zip(cached.height, cached.width, cached.scale, strict=True)) == {(48, 40, 0.5)}
    assert seen == [(i, 5) for i in range(1, 6)]
    for source, path in zip(shuffled.dicom_path, cached.cached_path, strict=True):
        expected = preprocess(read_radiograph(source).pixels, 24, profile.clip_limit, profile.tiles)
        np.testing.assert_array_equal(load_cached(path), expected)


def test_cache_is_reused(tmp_path, images, profile):
    first = cache_images(images, tmp_path / "cache", profile, decode)
    index = (tmp_path / "cache/index.jsonl").read_bytes()
    pd.testing.assert_frame_equal(cache_images(images, tmp_path / "cache", profile, refuse), first)
    assert (tmp_path / "cache/index.jsonl").read_bytes() == index


def test_unchanged_content_under_a_new_time_or_name_is_not_decoded_again(tmp_path, images, profile):
    first = cache_images(images, tmp_path / "cache", profile, decode)
    os.utime(images.dicom_path[0], ns=(1, 1))
    Path(images.dicom_path[1]).rename(tmp_path / "renamed.dicom")
    images.loc[1, "dicom_path"] = str(tmp_path / "renamed.dicom")
    pd.testing.assert_frame_equal(cache_images(images, tmp_path / "cache", profile, refuse), first)


@pytest.mark.parametrize("damage", [b"", b"\0" * 300, None])
def test_damaged_png_is_made_anew(tmp_path, images, profile, damage):
    first = cache_images(images, tmp_path / "cache", profile, decode)
    path = Path(first.cached_path[2])
    good = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage)
    cache_images(images, tmp_path / "cache", profile, decode)
    assert path.read_bytes() == good


def test_one_flipped_bit_is_noticed(tmp_path, images, profile):
    path = Path(cache_images(images, tmp_path / "cache", profile, decode).cached_path[0])
    good = path.read_bytes()
    path.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    cache_images(images, tmp_path / "cache", profile, decode)
    assert path.read_bytes() == good


def test_changed_parameters_content_or_version_make_other_files(
    tmp_path, images, profile, monkeypatch
):
    cache = tmp_path / "cache"
    harsher = profile.model_copy(update={"clip_limit": 8.0})
    first = cache_images(images, cache, profile, decode).cached_path
    other = cache_images(images, cache, harsher, decode).cached_path
    assert not set(first) & set(other)
    Path(images.dicom_path[0]).write_bytes(
        to_bytes(make_dataset(grey_picture(48, 40)[::-1].copy()))
    )
    third = cache_images(images, cache, profile, decode).cached_path
    assert (first != third).tolist() == [True, False, False, False, False]
    monkeypatch.setattr(imaging_cache, "PREPROCESSING_VERSION", -1)
    assert not set(third) & set(cache_images(images, cache, profile, decode).cached_path)


def test_killed_run_leaves_nothing_half_written(tmp_path, images, profile, monkeypatch):
    cache = tmp_path / "cache"
    calls = []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_images(images, cache, profile, decode)
    assert sorted(cache.glob("*.png")) == sorted(map(Path, calls[:2]))
    # Half a line in the index, as a kill in the middle of a write leaves it.
    with (cache / "index.jsonl").open("a") as index:
        index.write('{"source": "/so')
    cached = cache_images(images, cache, profile, decode)
    assert len(calls) == 6, "what was finished must not be made again"
    assert all(load_cached(path).shape == (24, 20) for path in cached.cached_path)
    lines = (cache / "index.jsonl").read_text().split("\n")
    assert sum(line.startswith("{") and line.endswith("}") for line in lines) == 5
    json.loads(next(line for line in reversed(lines) if line))


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "full; free some space"), (errno.EACCES, "written")]
)
def test_a_disk_that_refuses_a_write(tmp_path, images, profile, monkeypatch, number, message):
    def refuse(path, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(DernetError, match=message):
        cache_images(images, tmp_path / "cache", profile, decode)
    assert not list((tmp_path / "cache").glob("*.png"))


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_image_is_named(tmp_path, images, profile, workers):
    Path(images.dicom_path[3]).write_bytes(b"not an image")
    with pytest.raises(DernetError, match=r"image3\.dicom: not an image"):
        cache_images(images, tmp_path / "cache", profile, decode, workers)


def test_missing_image_is_named(tmp_path, images, profile):
    Path(images.dicom_path[3]).unlink()
    with pytest.raises(DernetError, match=r"image3\.dicom: the file cannot be read"):
        cache_images(images, tmp_path / "cache", profile, decode)


def test_another_spelling_of_the_same_path_is_the_same_file(tmp_path, images, profile, monkeypatch):
    first = cache_images(images, tmp_path / "cache", profile, decode)
    monkeypatch.chdir(tmp_path)
    relative = images.assign(dicom_path=[Path(path).name for path in images.dicom_path])
    again = cache_images(relative, tmp_path / "cache", profile, refuse)
    pd.testing.assert_frame_equal(again, first)


def test_no_images(tmp_path, images, profile):
    assert cache_images(images[:0], tmp_path / "cache", profile, decode).empty


def test_load_cached_refuses(tmp_path):
    (tmp_path / "zero.png").write_bytes(b"\0" * 50)
    for name in ("zero.png", "none.png"):
        with pytest.raises(DernetError, match="dernet prepare"):
            load_cached(tmp_path / name)

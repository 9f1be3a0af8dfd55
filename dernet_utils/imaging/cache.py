"""Enhanced images, made once and kept as PNG."""

import errno
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import joblib
import pandas as pd

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import write_whole
from dernet_utils.core.profiles import Profile
from dernet_utils.imaging.enhance import preprocess, shrink_factor
from dernet_utils.imaging.reader import naming, read_bytes, read_radiograph

# Part of every cache key: raise it whenever `preprocess` or the decoding changes its pixels.
PREPROCESSING_VERSION = 1

# --- The cache --------------------------------------------------------------------------------


def cache_images(
    images: pd.DataFrame,
    cache: Path,
    profile: Profile,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Preprocess images once, keep them as PNG, and say where they are.

    A PNG is named by the SHA-256 of the file it comes from, the parameters and
    `PREPROCESSING_VERSION`, written under another name and then renamed: a killed run leaves
    nothing half-written, and the next goes on where it stopped. A PNG is reused if it is, byte
    for byte, what was written; a file whose size and time are unchanged is not read again.

    Args:
        images: At least the columns `image_id` and `dicom_path`.
        cache: Folder for the PNGs and their index; made where missing.
        profile: Its `cache_px`, `clip_limit` and `tiles` count.
        workers: Processes.
        progress: Called with (images done, images in all) after each image.

    Returns:
        A row for each image, in their order: image_id, cached_path (the PNG), height and width (of
        the stored image, px), scale (cached px / stored px).

    Raises:
        DernetError: A file cannot be decoded, or the cache cannot be written.
    """
    cache = Path(cache)
    numbers = (profile.cache_px, profile.clip_limit, profile.tiles)
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        known = _read_index(cache / "index.jsonl")
        records = {}
        with (cache / "index.jsonl").open("a", encoding="utf-8") as index:
            for record in _records(images["dicom_path"], cache, numbers, known, workers):
                if known.get(record["stamp"]) != record:
                    # Begins with a line break, should a killed run have left half a line.
                    index.write("\n" + json.dumps(record) + "\n")
                    index.flush()
                records[record["source"]] = record
                if progress:
                    progress(len(records), len(images))
    rows = [
        (image_id, str(cache / record["png"]), record["height"], record["width"], record["scale"])
        for image_id, path in zip(images["image_id"], images["dicom_path"], strict=True)
        for record in [records[str(path)]]
    ]
    return pd.DataFrame(rows, columns=["image_id", "cached_path", "height", "width", "scale"])


def _records(
    paths: pd.Series, cache: Path, numbers: tuple, known: dict[str, dict], workers: int
) -> Iterator[dict]:
    """Yield the index's record of each file, those that stand first, then those to be made."""
    missing = []
    for path in dict.fromkeys(map(str, paths)):
        record = known.get(_stamp(path, numbers))
        if record and _stands(cache, record):
            yield record
        else:
            missing.append(path)

    def jobs():
        for path in missing:
            # The same content under a new time or name is not decoded again.
            same = known.get(_key(path, numbers))
            reusable = same if same and _stands(cache, same) else None
            yield joblib.delayed(_make)(path, cache, numbers, reusable)

    yield from joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(jobs())


def _make(path: str, cache: Path, numbers: tuple, reusable: dict | None) -> dict:
    """Preprocess one file and return its record."""
    stamp, key = _stamp(path, numbers), _key(path, numbers)
    if reusable:
        return reusable | {"source": path, "stamp": stamp}
    grey = read_radiograph(path).pixels
    with naming(path):
        small = preprocess(grey, *numbers)
    png = cv2.imencode(".png", small)[1].tobytes()
    with _writing(cache):
        write_whole(cache / f"{key}.png", lambda part: part.write_bytes(png))
    return {
        "source": path,
        "stamp": stamp,
        "key": key,
        "png": f"{key}.png",
        "crc": zlib.crc32(png),
        "height": grey.shape[0],
        "width": grey.shape[1],
        "scale": shrink_factor(grey.shape, numbers[0]),
    }


def _stamp(path: str, numbers: tuple) -> str:
    """Return what changes when a file is written again, without reading it."""
    try:
        state = Path(path).stat()
    except OSError as error:
        raise DernetError(f"{path}: the file cannot be read ({error.strerror}).") from error
    return f"{Path(path).absolute()} {state.st_size} {state.st_mtime_ns} {_version(numbers)}"


def _key(path: str, numbers: tuple) -> str:
    with naming(path):
        return hashlib.sha256(_version(numbers).encode() + read_bytes(path)).hexdigest()


def _version(numbers: tuple) -> str:
    return f"v{PREPROCESSING_VERSION} {numbers} "


def _stands(cache: Path, record: dict) -> bool:
    """Return whether the PNG is byte for byte what was written."""
    try:
        return zlib.crc32((cache / record["png"]).read_bytes()) == record["crc"]
    except OSError:
        return False


def _read_index(path: Path) -> dict[str, dict]:
    """Return the records by stamp and by key; lines that a killed run left half are skipped."""
    known = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            known[record["stamp"]] = known[record["key"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    return known


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn what the file system has against writing into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DernetError(
                f"The disk that holds {cache} is full; free some space and run again: the images "
                "that are finished are kept."
            ) from error
        raise DernetError(f"{cache} cannot be written ({error.strerror or error}).") from error

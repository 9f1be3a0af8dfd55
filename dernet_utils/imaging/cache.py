"""The cache: each image is enhanced once and kept as PNG."""

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
from dernet_utils.imaging.radiograph import Radiograph, naming, read_bytes, reading

# Part of every cache key: raise it whenever a change to `preprocess` or the decoding alters pixels.
PREPROCESSING_VERSION = 2


def cache_images(
    images: pd.DataFrame,
    cache: Path,
    profile: Profile,
    decode: Callable[[bytes], Radiograph],
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Preprocess images once and keep them as PNG.

    A PNG is named after the SHA-256 of its source file, the parameters and
    `PREPROCESSING_VERSION`. It is written under another name and then renamed: a killed run leaves
    no half-written file, and the next run continues where it stopped. A PNG is reused if its bytes
    are those that were written; a source file of unchanged size and time is not read again.

    Args:
        images: At least the columns `image_id` and `dicom_path`.
        cache: Folder for the PNGs and their index; made where missing.
        profile: Its `cache_px`, `clip_limit` and `tiles` are the parameters.
        decode: Decodes a file's bytes, as `decoder.Decoder.decode` does.
        workers: Number of images at a time, each in a thread that calls `decode`.
        progress: Called with (images done, images in all) after each image.

    Returns:
        One row per image, in their order: image_id, cached_path (of the PNG), height and width (of
        the stored image, px), scale (cached px / stored px).

    Raises:
        DernetError: A file cannot be read as a radiograph, or the cache cannot be written.
    """
    cache = Path(cache)
    numbers = (profile.cache_px, profile.clip_limit, profile.tiles)
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        known = _read_index(cache / "index.jsonl")
        records = {}
        with (cache / "index.jsonl").open("a", encoding="utf-8") as index:
            made = _records(images["dicom_path"], cache, numbers, known, decode, workers)
            for path, record in made:
                if known.get(record["stamp"]) != record:
                    # The line break closes a line that a killed run left unfinished.
                    index.write("\n" + json.dumps(record) + "\n")
                    index.flush()
                records[path] = record
                if progress:
                    progress(len(records), len(images))
    rows = [
        (image_id, str(cache / record["png"]), record["height"], record["width"], record["scale"])
        for image_id, path in zip(images["image_id"], images["dicom_path"], strict=True)
        for record in [records[str(path)]]
    ]
    return pd.DataFrame(rows, columns=["image_id", "cached_path", "height", "width", "scale"])


# --- Records: one per source file -------------------------------------------------------------


def _records(
    paths: pd.Series,
    cache: Path,
    numbers: tuple,
    known: dict[str, dict],
    decode: Callable[[bytes], Radiograph],
    workers: int,
) -> Iterator[tuple[str, dict]]:
    """Yield each file and its record: first those whose PNG exists, then those to be made."""
    missing = []
    for path in dict.fromkeys(map(str, paths)):
        record = known.get(_stamp(path, numbers))
        if record and _is_intact(cache, record):
            yield path, record
        else:
            missing.append(path)

    def jobs():
        for path in missing:
            # The same content under a new time or name is not decoded again.
            same = known.get(_key(_read(path), numbers)) if known else None
            yield joblib.delayed(_make)(decode, path, cache, numbers, same)

    yield from joblib.Parallel(
        n_jobs=workers, backend="threading", return_as="generator_unordered"
    )(jobs())


def _make(
    decode: Callable[[bytes], Radiograph],
    path: str,
    cache: Path,
    numbers: tuple,
    same: dict | None,
) -> tuple[str, dict]:
    """Preprocess a file; return it and its record. `same` is a record of equal content."""
    stamp = _stamp(path, numbers)
    if same and _is_intact(cache, same):
        return path, same | {"stamp": stamp}
    data = _read(path)
    with naming(path):
        grey = decode(data).pixels
        small = preprocess(grey, *numbers)
    key, png = _key(data, numbers), cv2.imencode(".png", small)[1].tobytes()
    with _writing(cache):
        write_whole(cache / f"{key}.png", lambda part: part.write_bytes(png))
    return path, {
        "stamp": stamp,
        "key": key,
        "png": f"{key}.png",
        "crc": zlib.crc32(png),
        "height": grey.shape[0],
        "width": grey.shape[1],
        "scale": shrink_factor(grey.shape, numbers[0]),
    }


def _read(path: str) -> bytes:
    with naming(path):
        return read_bytes(path)


def _stamp(path: str, numbers: tuple) -> str:
    """Return a text that changes when the file is rewritten; the file is not read."""
    with naming(path), reading():
        state = Path(path).stat()
    return f"{Path(path).absolute()} {state.st_size} {state.st_mtime_ns} {_version(numbers)}"


def _key(data: bytes, numbers: tuple) -> str:
    """Return a digest of a file's content and of all else that the PNG depends on."""
    return hashlib.sha256(_version(numbers).encode() + data).hexdigest()


def _version(numbers: tuple) -> str:
    return f"v{PREPROCESSING_VERSION} {numbers} "


def _is_intact(cache: Path, record: dict) -> bool:
    """Return whether the PNG is byte for byte what was written."""
    try:
        return zlib.crc32((cache / record["png"]).read_bytes()) == record["crc"]
    except OSError:
        return False


def _read_index(path: Path) -> dict[str, dict]:
    """Return the records by stamp and by key; unfinished lines of a killed run are skipped."""
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
    """Turn an error of the file system while writing into a DernetError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DernetError(
                f"The disk that holds {cache} is full; free some space and run again: the images "
                "that are finished are kept."
            ) from error
        raise DernetError(f"{cache} cannot be written ({error.strerror or error}).") from error

"""Reads a VinDr-SpineXR folder in any state, and collects its problems.

The folder holds ``train_images/<image_id>.dicom``, ``test_images/<image_id>.dicom`` and
``annotations/train.csv``, ``annotations/test.csv`` with one row per box. An image without lesions
has exactly one row, of type "No finding", with empty corners. Reading does not stop at the first
problem: `check` lists all problems, and `tables` accepts only a folder without any.

Tables and names of images that are written otherwise are read where only one meaning is possible.
A file beside the images that no row names is no problem, unless it is an image: its labels are
missing.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import ANNOTATION_COLUMNS, CORNERS, SPLITS
from dernet_utils.dataset.problems import (
    HEX_ID,
    Note,
    Problem,
    parse_number,
    sort_key,
    table_problems,
)
from dernet_utils.dataset.table_form import read_table
from dernet_utils.imaging.dicom import read_header
from dernet_utils.imaging.radiograph import brief_reason, read_bytes

EDGES = ("left", "top", "right", "bottom")
_ORIGIN = ("split", "file", "row")
# An image's name: its id and one of the endings of DICOM files, or none.
_IMAGE_NAME = re.compile(rf"{HEX_ID}(\.dicom|\.dcm)*", re.IGNORECASE)
_DICOM_NAME = re.compile(r"[^.]+|.*\.(dicom|dcm)", re.IGNORECASE)


@dataclass(frozen=True)
class Contents:
    """A folder as found.

    Attributes:
        rows: CSV rows as text, in the dataset's own spelling, with `split`, `file`, `row`, the
            corners as numbers in `left`, `top`, `right`, `bottom`, and the image's file as a path
            below the folder in `image`, `height` and `width` (px); nan where unknown.
        headers: One row per DICOM file whose header can be used: `image_id`,
            `split`, `height`, `width` (px), `view`, `transfer_syntax`,
            `photometric_interpretation`, `bits_stored`.
        problems: All problems of the tables and headers, in order.
        broken: Those of them that prevent a faithful copy of a table.
        notes: What is unusual, but no problem.
    """

    rows: pd.DataFrame
    headers: pd.DataFrame
    problems: list[Problem]
    broken: list[Problem]
    notes: list[Note]


def table_path(split: str) -> str:
    """Return a split's table, as a path below the folder."""
    return f"annotations/{split}.csv"


def image_path(split: str, image_id: str) -> str:
    """Return an image's file, as a path below the folder."""
    return f"{split}_images/{image_id}.dicom"


def first_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the first row of each image that has a valid id."""
    valid = rows["image_id"].str.fullmatch(HEX_ID).fillna(False).astype(bool)
    return rows[valid].drop_duplicates(["split", "image_id"])


def read_contents(root: Path) -> Contents:
    """Read both tables and every header, and collect the problems of the folder.

    Args:
        root: The folder.

    Raises:
        DernetError: The folder has neither table, so it is not a dataset.
    """
    if not any((root / table_path(split)).is_file() for split in SPLITS):
        found = " and ".join(f"{table_path(s)} {_absence(root / table_path(s))}" for s in SPLITS)
        raise DernetError(
            f"A VinDr-SpineXR folder with annotations/train.csv and annotations/test.csv was "
            f"expected at {root}, but {found}: name the folder that holds annotations/."
        )
    records, broken, notes = [], [], []
    for split in SPLITS:
        table, problems, unusual = _read_rows(root, split)
        records += table
        broken += problems
        notes += unusual
    columns = [*ANNOTATION_COLUMNS, *_ORIGIN]
    rows = pd.DataFrame(records, columns=columns).astype(dict.fromkeys(columns[:-1], "str"))
    found, headers, paths = [], [], {}
    for split, firsts in first_rows(rows).groupby("split", sort=False):
        images = _read_images(root, split, firsts)
        headers += images.headers
        found += images.problems
        notes += images.notes
        paths |= images.paths
    headers = pd.DataFrame(headers, columns=["image_id", "split", *_FACTS])
    rows[list(EDGES)] = rows[list(CORNERS)].map(parse_number, na_action="ignore").astype(float)
    sizes = headers[["image_id", "split", "height", "width"]]
    rows = rows.merge(sizes, how="left", on=["image_id", "split"])
    rows = rows.astype({"height": float, "width": float})
    keys = zip(rows["split"], rows["image_id"], strict=True)
    rows["image"] = pd.Series([paths.get(key) for key in keys], rows.index, "str")
    problems = sorted([*broken, *found, *table_problems(rows)], key=sort_key)
    return Contents(rows, headers, problems, broken, notes)


def _absence(path: Path) -> str:
    """Return in what way a file or folder that should be there is not."""
    if path.exists():
        return "is a folder, not a file" if path.is_dir() else "is a file, not a folder"
    if path.is_symlink():
        return f"is a link to {path.readlink()}, which is missing"
    stem = path.name.partition(".")[0].casefold()
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    return _missing(name for name in names if stem in name.casefold())


def _missing(similar: Iterable[str]) -> str:
    """Return that a file is missing, and which ones may be it under another name."""
    names = ", ".join(sorted(name for name in similar if not name.startswith(".")))
    return f"is missing (found: {names}; rename, unpack or copy again)" if names else "is missing"


# --- Tables -----------------------------------------------------------------------------------


def _read_rows(root: Path, split: str) -> tuple[list[dict], list[Problem], list[Note]]:
    """Return the rows of a CSV file, the problems of its form and what is unusual in it."""
    file = table_path(split)
    if not (root / file).is_file():
        return [], [Problem(file, None, f"the table {_absence(root / file)}")], []
    try:
        table = read_table(read_bytes(root / file))
    except DernetError as error:
        return [], [Problem(file, None, str(error))], []
    rows = [
        cells | dict(zip(_ORIGIN, (split, file, row), strict=True)) for row, cells in table.rows
    ]
    problems = [Problem(file, row, message) for row, message in table.problems]
    notes = [Note(file, f"read, though {', '.join(table.notes)}")] if table.notes else []
    return rows, problems, notes


# --- Images -----------------------------------------------------------------------------------

# Facts from a header; `read_header` has made sure that all but the view have a value.
_FACTS = {
    "height": lambda header: int(header.Rows),
    "width": lambda header: int(header.Columns),
    "view": lambda header: str(header.get("ViewPosition") or ""),
    "transfer_syntax": lambda header: header.file_meta.TransferSyntaxUID.name,
    "photometric_interpretation": lambda header: str(header.PhotometricInterpretation),
    "bits_stored": lambda header: int(header.BitsStored),
}


@dataclass(frozen=True)
class _Images:
    """What was found of a split's images.

    `headers`: facts of each header; `paths`: each image's file, by split and id.
    """

    headers: list[dict]
    paths: dict[tuple[str, str], str]
    problems: list[Problem]
    notes: list[Note]


def _read_images(root: Path, split: str, firsts: pd.DataFrame) -> _Images:
    """Find the images of a split, whose first rows are given, and read their headers."""
    paths = {(split, image_id): image_path(split, image_id) for image_id in firsts["image_id"]}
    found, folder = _Images([], paths, [], []), root / f"{split}_images"
    if not folder.is_dir():
        found.problems.append(Problem(folder.name, None, f"the folder {_absence(folder)}"))
        return found
    names = sorted(path.name for path in folder.iterdir())
    similar: dict[str, list[str]] = {}  # by image: the names that contain its id
    for name in names:
        for image_id in _ids_in(name):
            similar.setdefault(image_id, []).append(name)
    claimed = set()
    for first in firsts.itertuples():
        key, file, reason = (split, first.image_id), image_path(split, first.image_id), ""
        images = _images_among(folder, similar.get(first.image_id, []))
        claimed.update(images)
        if not images:
            reason = f"{file} {_missing(similar.get(first.image_id, []))}"
        elif len(images) > 1:
            reason = f"{file} may be any of {', '.join(images)}: keep one"
        else:
            paths[key] = f"{folder.name}/{images[0]}"
            if paths[key] != file:
                found.notes.append(Note(paths[key], f"read as {Path(file).name}"))
            try:
                facts = _header_facts(root / paths[key])
                found.headers.append({"image_id": first.image_id, "split": split, **facts})
            except DernetError as error:
                reason = f"{paths[key]} cannot be used: {error}"
        if reason:
            found.problems.append(Problem(first.file, first.row, reason))
    listed = set(firsts["image_id"])
    for name in names:
        if name not in claimed:
            _report_other(root, split, name, listed, found)
    return found


def _report_other(root: Path, split: str, name: str, listed: set[str], found: _Images) -> None:
    """Add a file that no row names: a problem if it is an image without labels, else a note."""
    file, unlisted = f"{split}_images/{name}", f"in no row of {table_path(split)}"
    if not _ids_in(name) & listed and _is_image(root / file):
        found.problems.append(
            Problem(file, None, f"the image is {unlisted}: its labels are missing")
        )
    else:
        found.notes.append(Note(file, f"{unlisted}; not used"))


def _ids_in(name: str) -> set[str]:
    """Return the ids that a file's name contains, in small letters."""
    return {image_id.lower() for image_id in re.findall(HEX_ID, name)}


def _images_among(folder: Path, names: list[str]) -> list[str]:
    """Return which files that have an image's id in their names may be the image."""
    named = [name for name in names if _IMAGE_NAME.fullmatch(name)]
    if len(named) < 2:
        return named
    return [name for name in named if _is_image(folder / name)] or named


def _is_image(path: Path) -> bool:
    """Return whether a file has a DICOM image's name and a header that can be used."""
    try:
        return bool(_DICOM_NAME.fullmatch(path.name) and read_header(path))
    except DernetError:
        return False


def _header_facts(path: Path) -> dict:
    """Return size, view and encoding of a DICOM image, without reading its pixel data.

    Raises:
        DernetError: As `read_header` raises, or the view is malformed, or the file is a link to
            nothing.
    """
    if path.is_symlink() and not path.exists():
        raise DernetError(f"it {_absence(path)}; copy the image there.")
    header = read_header(path)
    try:
        return {name: fact(header) for name, fact in _FACTS.items()}
    except Exception as error:  # pydicom converts values when asked, and then may raise
        raise DernetError(
            f"the DICOM header's view is malformed ({brief_reason(error)}); export the image again."
        ) from error

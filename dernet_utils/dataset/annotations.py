"""Reads a VinDr-SpineXR folder in any state, and collects its problems.

The folder holds ``train_images/<image_id>.dicom``, ``test_images/<image_id>.dicom`` and
``annotations/train.csv``, ``annotations/test.csv`` with one row per box. An image without lesions
has exactly one row, of type "No finding", with empty corners. Reading does not stop at the first
problem: `check` lists all problems, and `tables` accepts only a folder without any.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import ANNOTATION_COLUMNS, CORNERS, SPLITS
from dernet_utils.dataset.problems import HEX_ID, Problem, parse_number, sort_key, table_problems
from dernet_utils.imaging.dicom import read_header
from dernet_utils.imaging.radiograph import brief_reason

EDGES = ("left", "top", "right", "bottom")
_ORIGIN = ("split", "file", "row")


@dataclass(frozen=True)
class Contents:
    """A folder as found.

    Attributes:
        rows: CSV rows as text, with `split`, `file`, `row`, the corners as numbers in `left`,
            `top`, `right`, `bottom`, and the image's `height` and `width` (px); nan where unknown.
        headers: One row per DICOM file whose header can be used: `image_id`,
            `split`, `height`, `width` (px), `view`, `transfer_syntax`,
            `photometric_interpretation`, `bits_stored`.
        problems: All problems of the tables and headers, in order.
        broken: Those of them that prevent a faithful copy of a table.
    """

    rows: pd.DataFrame
    headers: pd.DataFrame
    problems: list[Problem]
    broken: list[Problem]


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
        raise DernetError(
            f"A VinDr-SpineXR folder with annotations/train.csv and annotations/test.csv was "
            f"expected at {root}, which has neither: name the folder that holds annotations/."
        )
    records, broken = [], []
    for split in SPLITS:
        table, problems = _read_table(root, split)
        records += table
        broken += problems
    columns = [*ANNOTATION_COLUMNS, *_ORIGIN]
    rows = pd.DataFrame(records, columns=columns).astype(dict.fromkeys(columns[:-1], "str"))
    found, headers = [], []
    for split, firsts in first_rows(rows).groupby("split", sort=False):
        facts, problems = _read_headers(root, split, firsts)
        headers += facts
        found += problems
    headers = pd.DataFrame(headers, columns=["image_id", "split", *_FACTS])
    rows[list(EDGES)] = rows[list(CORNERS)].map(parse_number, na_action="ignore").astype(float)
    sizes = headers[["image_id", "split", "height", "width"]]
    rows = rows.merge(sizes, how="left", on=["image_id", "split"])
    rows = rows.astype({"height": float, "width": float})
    problems = sorted([*broken, *found, *table_problems(rows)], key=sort_key)
    return Contents(rows, headers, problems, broken)


# --- Tables -----------------------------------------------------------------------------------


def _read_table(root: Path, split: str) -> tuple[list[dict], list[Problem]]:
    """Return the rows of a CSV file and the problems of its form."""
    file = table_path(split)
    if not (root / file).is_file():
        return [], [Problem(file, None, "the table is missing")]
    with (root / file).open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.reader(lines)
        try:
            header = [name.strip() for name in next(reader, [])]
            records = [(reader.line_num, cells) for cells in reader if cells]
        except csv.Error as error:
            return [], [Problem(file, reader.line_num, f"this is no CSV file: {error}")]
    problems = [
        Problem(file, 1, f"the column {name} is missing; expected {', '.join(ANNOTATION_COLUMNS)}")
        for name in ANNOTATION_COLUMNS
        if name not in header
    ]
    rows = []
    for line, cells in records:
        if len(cells) != len(header):
            message = f"{len(cells)} cells where the header has {len(header)}"
            problems.append(Problem(file, line, message))
            continue
        named = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        row = {name: named[name] for name in ANNOTATION_COLUMNS if name in named}
        rows.append(row | dict(zip(_ORIGIN, (split, file, line), strict=True)))
    if not records:
        problems.append(Problem(file, None, "the table has no rows"))
    return rows, problems


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


def _read_headers(root: Path, split: str, firsts: pd.DataFrame) -> tuple[list[dict], list[Problem]]:
    """Return the headers of a split's images, and the files that are missing or cannot be used."""
    folder = root / f"{split}_images"
    if not folder.is_dir():
        return [], [Problem(folder.name, None, "the folder is missing")]
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    headers, problems = [], []
    for first in firsts.itertuples():
        file = image_path(split, first.image_id)
        if Path(file).name not in present:
            problems.append(Problem(first.file, first.row, f"{file} is missing"))
            continue
        try:
            facts = _header_facts(root / file)
        except DernetError as error:
            problems.append(Problem(first.file, first.row, f"{file} cannot be used: {error}"))
            continue
        headers.append({"image_id": first.image_id, "split": split, **facts})
    listed = {f"{image_id}.dicom" for image_id in firsts["image_id"]}
    problems += [
        Problem(f"{folder.name}/{name}", None, f"the file is in no row of {table_path(split)}")
        for name in sorted(present - listed)
    ]
    return headers, problems


def _header_facts(path: Path) -> dict:
    """Return size, view and encoding of a DICOM image, without reading its pixel data.

    Raises:
        DernetError: As `read_header` raises, or the view is malformed.
    """
    header = read_header(path)
    try:
        return {name: fact(header) for name, fact in _FACTS.items()}
    except Exception as error:  # pydicom converts values when asked, and then may raise
        raise DernetError(
            f"the DICOM header's view is malformed ({brief_reason(error)}); export the image again."
        ) from error

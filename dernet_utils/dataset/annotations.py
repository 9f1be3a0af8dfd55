"""What a VinDr-SpineXR folder holds, in whatever state it is, and the problems that shows.

The folder holds ``train_images/<image_id>.dicom``, ``test_images/<image_id>.dicom`` and
``annotations/train.csv``, ``annotations/test.csv`` with one row a box. An image without lesions
has exactly one row, of type "No finding", with empty corners. Nothing here stops at the first
problem; `dernet_utils.data` decides what to do with them.
"""

import csv
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pandera.pandas as pa

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import (
    ANNOTATION_COLUMNS,
    CORNERS,
    LESION_TYPES,
    NO_FINDING,
    RARER_TYPES,
    SPLITS,
)
from dernet_utils.imaging.dicom import read_header

HEX_ID = r"[0-9a-fA-F]{32}"


@dataclass(frozen=True)
class Problem:
    """Something that keeps a folder from being a clean dataset.

    Attributes:
        file: Path below the dataset's folder.
        row: Line of the CSV file, its header being line 1; None where the file as a whole is
            concerned.
        message: What is wrong.
    """

    file: str
    row: int | None
    message: str

    def __str__(self) -> str:
        where = self.file if self.row is None else f"{self.file}, row {self.row}"
        return f"{where}: {self.message}"


def _number(text: str) -> float:
    """Return a finite number, nan where the text is none.

    >>> _number("12.5"), _number("left")
    (12.5, nan)
    """
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _cell(rule: Callable[[pd.Series], pd.Series], expected: str) -> pa.Column:
    # Nullable: a column that the file does not have is one problem, not one a row.
    return pa.Column(None, pa.Check(rule, error=expected), nullable=True)


# The cells of the CSV files as they come: text. A check's error says what was expected.
_CELLS = pa.DataFrameSchema(
    {
        **{
            name: _cell(
                lambda cells: cells.str.fullmatch(HEX_ID), f"{name} must be 32 hexadecimal digits"
            )
            for name in ("study_id", "series_id", "image_id")
        },
        "rad_id": _cell(
            lambda cells: cells.str.fullmatch(r"rad\d+"), "rad_id must be rad1, rad2, …"
        ),
        "lesion_type": _cell(
            lambda cells: cells.isin([*LESION_TYPES, *RARER_TYPES, NO_FINDING]),
            f"lesion_type must be one of {', '.join([*LESION_TYPES, *RARER_TYPES, NO_FINDING])}",
        ),
        **{
            corner: _cell(
                lambda cells: (cells == "") | cells.map(_number).notna(),
                f"{corner} must be a number of pixels",
            )
            for corner in CORNERS
        },
    }
)

# ── Reading what is there, whatever its state ────────────────────────────────────────────


@dataclass(frozen=True)
class Contents:
    """A folder as found.

    Attributes:
        rows: CSV rows as text, with `split`, `file`, `row`, the corners as numbers in `left`,
            `top`, `right`, `bottom`, and the image's `height` and `width` (px); nan where unknown.
        headers: One row for each readable DICOM file, with size and encoding.
        problems: All that tables and headers show, in order.
        broken: Those of them that keep a table from being copied faithfully.
    """

    rows: pd.DataFrame
    headers: pd.DataFrame
    problems: list[Problem]
    broken: list[Problem]


EDGES = ("left", "top", "right", "bottom")
_HEADER = (
    "height",
    "width",
    "view",
    "transfer_syntax",
    "photometric_interpretation",
    "bits_stored",
)


def table_path(split: str) -> str:
    """Return where a split's table lies below the folder."""
    return f"annotations/{split}.csv"


def image_path(split: str, image_id: str) -> str:
    """Return where an image lies below the folder."""
    return f"{split}_images/{image_id}.dicom"


def _read_table(root: Path, split: str) -> tuple[list[dict], list[Problem]]:
    """Return the rows of a CSV file and what keeps it from being a table."""
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
        rows.append(row | {"split": split, "file": file, "row": line})
    if not records:
        problems.append(Problem(file, None, "the table has no rows"))
    return rows, problems


def _header_facts(path: Path) -> dict:
    """Return size and encoding of a DICOM image, without touching its pixels.

    Raises:
        DernetError: As `imaging.dicom.read_header` raises.
    """
    header = read_header(path)
    return {
        "height": int(header.Rows),
        "width": int(header.Columns),
        "view": str(header.get("ViewPosition") or ""),
        "transfer_syntax": header.file_meta.TransferSyntaxUID.name,
        "photometric_interpretation": str(header.PhotometricInterpretation),
        "bits_stored": int(header.BitsStored),
    }


def first_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the first row of each image that has a valid id."""
    valid = rows["image_id"].str.fullmatch(HEX_ID).fillna(False).astype(bool)
    return rows[valid].drop_duplicates(["split", "image_id"])


def _read_images(root: Path, split: str, firsts: pd.DataFrame) -> tuple[list[dict], list[Problem]]:
    """Return the headers of a split's images, and the files that are missing or unreadable."""
    folder = root / f"{split}_images"
    if not folder.is_dir():
        return [], [Problem(folder.name, None, "the folder is missing")]
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    headers, problems = [], []
    for first in firsts.itertuples():
        path = root / image_path(split, first.image_id)
        if path.name not in present:
            problems.append(Problem(first.file, first.row, f"{folder.name}/{path.name} is missing"))
            continue
        try:
            header = _header_facts(path)
        except DernetError as error:
            message = f"{folder.name}/{path.name} cannot be used: {_below(root, error)}"
            problems.append(Problem(first.file, first.row, message))
            continue
        headers.append({"image_id": first.image_id, "split": split, **header})
    listed = {f"{image_id}.dicom" for image_id in firsts["image_id"]}
    problems += [
        Problem(f"{folder.name}/{name}", None, f"the file is in no row of {table_path(split)}")
        for name in sorted(present - listed)
    ]
    return headers, problems


def _below(root: Path, error: DernetError) -> str:
    """Return an error's message without the path that it begins with."""
    return re.sub(rf"^{re.escape(str(root))}\S*: ", "", str(error))


def read_contents(root: Path) -> Contents:
    """Read both tables and every header, and collect the problems of the folder.

    Raises:
        DernetError: The folder has neither table, so it is no dataset at all.
    """
    if not any((root / table_path(split)).is_file() for split in SPLITS):
        raise DernetError(
            f"A VinDr-SpineXR folder with annotations/train.csv and annotations/test.csv was "
            f"expected at {root}, which has neither: name the folder that holds annotations/."
        )
    rows, broken, headers, found = [], [], [], []
    for split in SPLITS:
        table, problems = _read_table(root, split)
        rows += table
        broken += problems
    columns = [*ANNOTATION_COLUMNS, "split", "file", "row"]
    rows = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[:-1], "str"))
    for split, firsts in first_rows(rows).groupby("split", sort=False):
        its_headers, problems = _read_images(root, split, firsts)
        headers += its_headers
        found += problems
    headers = pd.DataFrame(headers, columns=["image_id", "split", *_HEADER])
    rows[list(EDGES)] = rows[list(CORNERS)].map(_number, na_action="ignore").astype(float)
    sizes = headers[["image_id", "split", "height", "width"]]
    rows = rows.merge(sizes, how="left", on=["image_id", "split"])
    rows = rows.astype({"height": float, "width": float})
    found += [*_cell_problems(rows), *_row_problems(rows), *_group_problems(rows)]
    return Contents(rows, headers, sorted(broken + found, key=sort_key), broken)


def sort_key(problem: Problem) -> tuple:
    """Return the key that sorts problems: train before test, then by file and row."""
    return SPLITS[0] not in problem.file, problem.file, problem.row or 0


# ── Problems of the tables ───────────────────────────────────────────────────────────────


def _cell_problems(rows: pd.DataFrame) -> Iterator[Problem]:
    """Yield cells that are not what their column holds."""
    try:
        _CELLS.validate(rows, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases[["index", "check", "failure_case"]]
        for index, expected, came in cases.itertuples(index=False):
            row = rows.loc[index]
            yield Problem(row["file"], int(row["row"]), f"{expected}, not {came!r}")


def is_lesion(rows: pd.DataFrame) -> pd.Series:
    """Return which rows carry one of the thirteen lesion types."""
    return rows["lesion_type"].isin([*LESION_TYPES, *RARER_TYPES])


def has_no_area(rows: pd.DataFrame) -> pd.Series:
    """Return which lesions' boxes have no width or no height."""
    flat = (rows["right"] <= rows["left"]) | (rows["bottom"] <= rows["top"])
    return is_lesion(rows) & flat


def is_outside(rows: pd.DataFrame) -> pd.Series:
    """Return which lesions' boxes reach outside their image, where its size is known."""
    low = (rows["left"] < 0) | (rows["top"] < 0)
    high = (rows["right"] > rows["width"]) | (rows["bottom"] > rows["height"])
    return is_lesion(rows) & (low | high)


def box_text(row: pd.Series) -> str:
    """Return a box for a person to read."""
    return f"({row.left:g}, {row.top:g}) to ({row.right:g}, {row.bottom:g})"


def _row_problems(rows: pd.DataFrame) -> Iterator[Problem]:
    """Yield rows whose corners do not fit their lesion type or their image."""
    empty = (rows[list(CORNERS)] == "").any(axis=1)
    filled = (rows[list(CORNERS)].fillna("") != "").any(axis=1)
    for row in rows[is_lesion(rows) & empty].itertuples():
        yield Problem(row.file, row.row, f"{row.lesion_type!r} needs four corners")
    for row in rows[(rows["lesion_type"] == NO_FINDING) & filled].itertuples():
        yield Problem(row.file, row.row, f"{NO_FINDING!r} has no corners, but here are some")
    for row in rows[has_no_area(rows)].itertuples():
        yield Problem(row.file, row.row, f"the box {box_text(row)} has no area")
    for row in rows[is_outside(rows)].itertuples():
        yield Problem(
            row.file,
            row.row,
            f"the box {box_text(row)} reaches outside its image, "
            f"which is {row.width:.0f} pixels wide and {row.height:.0f} high",
        )


def _group_problems(rows: pd.DataFrame) -> Iterator[Problem]:
    """Yield rows that contradict another row."""
    same = ["file", *ANNOTATION_COLUMNS]
    repeats = rows.duplicated(same)
    for row in rows[repeats].merge(rows[~repeats], on=same, suffixes=("", "_first")).itertuples():
        yield Problem(row.file, row.row, f"the row repeats row {row.row_first}")
    yield from _finding_problems(rows[~repeats])
    yield from _moved(rows, "image_id", "study_id", "the image {} is in the study {} here and {}")
    yield from _moved(rows, "study_id", "split", "the study {} is in the {} split here and {}")


def _finding_problems(rows: pd.DataFrame) -> Iterator[Problem]:
    """Yield rows that say "No finding" beside other rows of the same image."""
    image = ["file", "image_id"]
    none = rows[rows["lesion_type"] == NO_FINDING]
    lesions = rows[is_lesion(rows)].drop_duplicates(image)
    for row in none.merge(lesions, on=image, suffixes=("", "_lesion")).itertuples():
        message = f"{NO_FINDING!r} beside a lesion of the same image in row {row.row_lesion}"
        yield Problem(row.file, row.row, message)
    first, further = none.drop_duplicates(image), none[none.duplicated(image)]
    for row in further.merge(first, on=image, suffixes=("", "_first")).itertuples():
        message = f"a second {NO_FINDING!r} of the image of row {row.row_first}"
        yield Problem(row.file, row.row, message)


def _moved(rows: pd.DataFrame, key: str, home: str, words: str) -> Iterator[Problem]:
    """Yield the first row where a `key` appears in another `home` than before."""
    known = rows.dropna(subset=[key, home]).drop_duplicates([key, home])
    firsts = known.drop_duplicates(key).set_index(key)
    for row in known[known.duplicated(key)].to_dict("records"):
        first = firsts.loc[row[key]]
        before = f"{first[home]} in {first['file']}, row {first['row']}"
        yield Problem(row["file"], row["row"], words.format(row[key], row[home], before))

"""Problems of a folder's tables: invalid cells, and rows that contradict each other."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
import pandera.pandas as pa

from dernet_utils.core.vocabulary import (
    ANNOTATION_COLUMNS,
    CORNERS,
    LESION_TYPES,
    NO_FINDING,
    RARER_TYPES,
    SPLITS,
)

HEX_ID = r"[0-9a-fA-F]{32}"
MARKED_TYPES = (*LESION_TYPES, *RARER_TYPES)  # the thirteen that the radiologists marked


@dataclass(frozen=True)
class Problem:
    """A reason why a folder is not a clean dataset.

    Attributes:
        file: Path below the dataset's folder.
        row: Line of the CSV file, whose header is line 1; None for a problem of the whole file.
        message: What is wrong.
    """

    file: str
    row: int | None
    message: str

    def __str__(self) -> str:
        where = self.file if self.row is None else f"{self.file}, row {self.row}"
        return f"{where}: {self.message}"


@dataclass(frozen=True)
class Note:
    """Something unusual in a folder that is no problem: the dataset is used all the same.

    Attributes:
        file: Path below the dataset's folder.
        message: What is unusual.
    """

    file: str
    message: str


def sort_key(problem: Problem) -> tuple:
    """Return the key that sorts problems: train before test, then by file and row."""
    return SPLITS[0] not in problem.file, problem.file, problem.row or 0


def table_problems(rows: pd.DataFrame) -> list[Problem]:
    """Return the problems of all tables' rows.

    Args:
        rows: As `annotations.Contents.rows` describes them.
    """
    return [
        *_cell_problems(rows),
        *_corner_problems(rows),
        *_repeated_rows(rows),
        *_finding_problems(rows[~_repeats(rows)]),
        *_moved(rows, "image_id", "study_id", "the image {} is in the study {} here and {}"),
        *_moved(rows, "study_id", "split", "the study {} is in the {} split here and {}"),
    ]


def parse_number(text: str) -> float:
    """Return a finite number; nan where the text is not one.

    >>> parse_number("12.5"), parse_number("left")
    (12.5, nan)
    """
    try:
        number = float(text)
    except ValueError:
        return math.nan
    if "_" in text:  # Python's own separator of thousands
        return math.nan
    return number if math.isfinite(number) else math.nan


# --- Boxes ------------------------------------------------------------------------------------


def is_lesion(rows: pd.DataFrame) -> pd.Series:
    """Return which rows carry one of the thirteen lesion types."""
    return rows["lesion_type"].isin(MARKED_TYPES)


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
    """Return a row's box in words, such as ``(3, 4) to (10, 20)``."""
    return f"({row.left:g}, {row.top:g}) to ({row.right:g}, {row.bottom:g})"


# --- Cells ------------------------------------------------------------------------------------


def _cell(rule: Callable[[pd.Series], pd.Series], expected: str) -> pa.Column:
    # Nullable: a missing column is one problem, not one per row.
    return pa.Column(None, pa.Check(rule, error=expected), nullable=True)


def _matches(pattern: str) -> Callable[[pd.Series], pd.Series]:
    return lambda cells: cells.str.fullmatch(pattern)


# The cells of the CSV files, as text. A check's error says what was expected.
_CELLS = pa.DataFrameSchema(
    {
        **{
            name: _cell(_matches(HEX_ID), f"{name} must be 32 hexadecimal digits")
            for name in ("study_id", "series_id", "image_id")
        },
        "rad_id": _cell(_matches(r"rad\d+"), "rad_id must be rad1, rad2, …"),
        "lesion_type": _cell(
            lambda cells: cells.isin([*MARKED_TYPES, NO_FINDING]),
            f"lesion_type must be one of {', '.join([*MARKED_TYPES, NO_FINDING])}",
        ),
        **{
            corner: _cell(
                lambda cells: (cells == "") | cells.map(parse_number).notna(),
                f"{corner} must be a number of pixels, with a decimal point",
            )
            for corner in CORNERS
        },
    }
)


def _cell_problems(rows: pd.DataFrame) -> Iterator[Problem]:
    """Yield cells that do not fit their column."""
    try:
        _CELLS.validate(rows, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases[["index", "check", "failure_case"]]
        for index, expected, came in cases.itertuples(index=False):
            row = rows.loc[index]
            yield Problem(row["file"], int(row["row"]), f"{expected}, not {came!r}")


# --- Rows and groups of rows ------------------------------------------------------------------


def _corner_problems(rows: pd.DataFrame) -> Iterator[Problem]:
    """Yield rows whose corners do not fit their lesion type or their image."""
    empty = (rows[list(CORNERS)] == "").any(axis=1)
    filled = (rows[list(CORNERS)].fillna("") != "").any(axis=1)
    for row in rows[is_lesion(rows) & empty].itertuples():
        yield Problem(row.file, row.row, f"{row.lesion_type!r} needs four corners")
    for row in rows[(rows["lesion_type"] == NO_FINDING) & filled].itertuples():
        yield Problem(row.file, row.row, f"{NO_FINDING!r} has no corners, but some are given")
    for row in rows[has_no_area(rows)].itertuples():
        yield Problem(row.file, row.row, f"the box {box_text(row)} has no area")
    for row in rows[is_outside(rows)].itertuples():
        size = f"{row.width:.0f} pixels wide and {row.height:.0f} high"
        message = f"the box {box_text(row)} reaches outside its image, which is {size}"
        yield Problem(row.file, row.row, message)


_SAME = ["file", *ANNOTATION_COLUMNS]


def _repeats(rows: pd.DataFrame) -> pd.Series:
    """Return which rows repeat an earlier one of their table."""
    return rows.duplicated(_SAME)


def _repeated_rows(rows: pd.DataFrame) -> Iterator[Problem]:
    repeats, firsts = rows[_repeats(rows)], rows[~_repeats(rows)]
    for row in repeats.merge(firsts, on=_SAME, suffixes=("", "_first")).itertuples():
        yield Problem(row.file, row.row, f"the row repeats row {row.row_first}")


def _finding_problems(rows: pd.DataFrame) -> Iterator[Problem]:
    """Yield rows of "No finding" beside other rows of the same image."""
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

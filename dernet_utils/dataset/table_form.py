"""The rows of an annotation table, read from a CSV file as spreadsheets and pandas write it.

A file that differs from the dataset's form only in how it is written is read: its encoding, its
separator, the capitals and spaces of its names, further columns, empty rows, decimal commas. Where
two readings are possible, none is chosen, and a problem says why.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import ANNOTATION_COLUMNS, CORNERS, NO_FINDING
from dernet_utils.dataset.problems import HEX_ID, MARKED_TYPES

IDS = ("study_id", "series_id", "image_id")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# How programs write an empty cell: pandas, R, SQL, spreadsheets, people.
EMPTY_WORDS = {"nan", "null", "none", "na", "n/a", "#n/a", "<na>", "-", "–", "—"}
UTF_8 = "UTF-8"
# UTF-32 first: in little endian its mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32-LE",
    codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF8: UTF_8,
    codecs.BOM_UTF16_LE: "UTF-16-LE",
    codecs.BOM_UTF16_BE: "UTF-16-BE",
}
OTHER_FORMATS = {
    b"PK\x03\x04": "an Excel workbook or a ZIP archive: save it as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save it as CSV",
    b"\x1f\x8b": "compressed with gzip: unpack it, for example with `gunzip`",
    b"PAR1": "a Parquet file: save it as CSV",
    b"%PDF": "a PDF document: download the table again",
}
AGAIN = "download the table again"


def spelling(text: str) -> str:
    """Return a name without capitals, spaces, hyphens and underscores.

    >>> spelling(" Image-ID"), spelling("image_id")
    ('imageid', 'imageid')
    """
    return re.sub(r"[\s_-]+", "", text.casefold())


_COLUMNS = {spelling(name): name for name in ANNOTATION_COLUMNS}
_TYPES = {spelling(name): name for name in (*MARKED_TYPES, NO_FINDING)}
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


@dataclass(frozen=True)
class Table:
    """A table in the dataset's own form.

    Attributes:
        rows: Line of the file (the first is 1) and cells, by those of `ANNOTATION_COLUMNS` that the
            file has. Ids are in small letters, lesion types in the dataset's spelling, numbers with
            a decimal point; what has no certain meaning is as it was found.
        problems: Line, or None for the whole file, and what is wrong.
        notes: In which ways the file is written otherwise than the dataset's own.
    """

    rows: list[tuple[int, dict[str, str]]]
    problems: list[tuple[int | None, str]]
    notes: list[str]


def read_table(data: bytes) -> Table:
    """Return the rows of an annotation table.

    Args:
        data: The file's bytes.

    Raises:
        DernetError: They are no table of annotations; the message says what they are instead, and
            what to do. It does not name the file.

    >>> table = read_table(b"Image ID;xmin\\nA;10,5\\n")
    >>> table.rows, table.notes
    ([(2, {'image_id': 'A', 'xmin': '10.5'})], ['separated by semicolons', 'with decimal commas'])
    """
    text, encoding = _decode(data)
    lines, separator = _split(text)
    if not lines:
        raise DernetError(f"the table is empty: {AGAIN}.")
    (first, header), *lines = lines
    columns = _columns(header)
    if not any(columns):
        raise DernetError(
            f"the first row should name the columns {', '.join(ANNOTATION_COLUMNS)}, but begins "
            f"{separator.join(header)[:60]!r}: {AGAIN}."
        )
    problems = _column_problems(first, columns, header)
    if _leaves_out_an_index(columns, lines):
        header, columns = ["", *header], [None, *columns]
    rows = []
    for line, cells in lines:
        cells = _fitted(cells, header)
        if len(cells) == len(header):
            named = zip(columns, cells, strict=True)
            rows.append((line, {name: cell for name, cell in named if name}))
            continue
        message = f"{len(cells)} cells where the header has {len(header)}"
        if separator == "," and len(cells) > len(header):
            message += "; a text with a comma needs quotation marks, a number a decimal point"
        problems.append((line, message))
    if not lines:
        problems.append((None, "the table has no rows"))
    decimal_commas = separator != "," and _has_decimal_commas(rows)
    notes = [
        *([f"encoded in {encoding}"] if encoding != UTF_8 else []),
        *([f"separated by {SEPARATORS[separator]}"] if separator != "," else []),
        *(["with decimal commas"] if decimal_commas else []),
    ]
    rows = [(line, _standard(row, decimal_commas)) for line, row in rows]
    return Table(rows, problems, notes)


# --- Bytes to lines ---------------------------------------------------------------------------


def _decode(data: bytes) -> tuple[str, str]:
    """Return a file's text, without byte-order mark, and its encoding.

    Raises:
        DernetError: The file is no text, is damaged, or is a page of a website.
    """
    for start, format_ in OTHER_FORMATS.items():
        if data.startswith(start):
            raise DernetError(f"the file is not a CSV table but {format_}.")
    encoding = _encoding(data)
    try:
        text = data.decode(encoding).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise DernetError(
            f"the file begins as {encoding} text, but is damaged at byte {error.start + 1}: "
            f"{AGAIN}."
        ) from error
    if not text.strip("\0 \t\r\n"):
        raise DernetError(f"the file is empty ({len(data)} bytes): {AGAIN}.")
    if "\0" in text:
        count, line = text.count("\0"), 1 + len(re.findall(r"\r\n|\r|\n", text.partition("\0")[0]))
        raise DernetError(
            f"the file is damaged: it holds {count} NUL bytes, the first in row {line}; {AGAIN}."
        )
    if text.lstrip().startswith("<"):
        raise DernetError(f"the file is a web page, not a table: log in to PhysioNet and {AGAIN}.")
    if text.count('"') % 2:
        raise DernetError(
            "the file holds an odd number of quotation marks, so a cell has no end: it is cut "
            f"short or was edited; correct it, or {AGAIN}."
        )
    return text, encoding


def _encoding(data: bytes) -> str:
    """Return the encoding that a byte-order mark or the content proves; otherwise Latin-1.

    Latin-1 reads any bytes. The dataset's own columns are ASCII, so that others than UTF-8 stand in
    a further column, or in a cell that is found to be wrong.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return encoding
    if b"\0" in data:
        for encoding in ("UTF-16-LE", "UTF-16-BE"):
            if "image" in data[:1000].decode(encoding, "ignore").casefold():
                return encoding
    try:
        data.decode(UTF_8)
    except UnicodeDecodeError:
        return "Latin-1"
    return UTF_8


def _split(text: str) -> tuple[list[tuple[int, list[str]]], str]:
    """Return the lines that hold anything, as cells, with their numbers; and the separator."""
    start = text.lstrip()
    named = re.match(r'"?sep=([,;\t|])"?\s*[\r\n]', start)  # Excel's own first line
    try:
        separator = named[1] if named else _separator(re.split(r"[\r\n]", start, maxsplit=1)[0])
        reader = _csv_reader(io.StringIO(text, newline=""), separator)
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise DernetError(f"the file is no CSV table ({error}): {AGAIN}.") from error
    lines = [(line, cells) for line, cells in lines if any(cells)]
    return lines[1:] if named else lines, separator


def _csv_reader(lines: Iterable[str], separator: str):
    return csv.reader(lines, delimiter=separator, skipinitialspace=True)


def _separator(line: str) -> str:
    """Return the separator with which a line names most columns."""

    def named(separator: str) -> int:
        cells = next(_csv_reader([line], separator), [])
        return sum(name is not None for name in _columns(cells))

    return max(SEPARATORS, key=named)


# --- Lines to rows ----------------------------------------------------------------------------


def _columns(header: list[str]) -> list[str | None]:
    """Return the dataset's name of each column; None for a further column."""
    return [_COLUMNS.get(spelling(name)) for name in header]


def _column_problems(
    line: int, columns: list[str | None], header: list[str]
) -> list[tuple[int | None, str]]:
    """Return the columns that are missing and those that are there twice."""
    problems = []
    for name in ANNOTATION_COLUMNS:
        if name not in columns:
            expected = ", ".join(ANNOTATION_COLUMNS)
            problems.append((line, f"the column {name} is missing; expected {expected}"))
        elif columns.count(name) > 1:
            same = [found for found, column in zip(header, columns, strict=True) if column == name]
            problems.append((line, f"several columns may be {name}: {', '.join(same)}; keep one"))
    return problems


def _leaves_out_an_index(columns: list[str | None], lines: list[tuple[int, list[str]]]) -> bool:
    """Return whether each row begins with its number, which R leaves out of the header."""
    firsts = [cells[0] for _, cells in lines if len(cells) == len(columns) + 1]
    counted = [str(number) for number in range(1, len(lines) + 1)]
    return columns[0] is not None and len(lines) > 0 and firsts == counted


def _fitted(cells: list[str], header: list[str]) -> list[str]:
    """Return a row's cells without the surplus separators at its end or at the header's."""
    most = len(header)
    while len(cells) > most and not cells[-1]:
        cells = cells[:-1]
    least = max(number for number, name in enumerate(header, start=1) if name)
    return cells + [""] * (most - len(cells)) if least <= len(cells) < most else cells


def _has_decimal_commas(rows: list[tuple[int, dict[str, str]]]) -> bool:
    """Return whether the corners' commas must be decimal commas.

    A comma that separates thousands has three digits after it, so a single other one decides. A
    table that also has decimal points decides nothing.
    """
    corners = [row[name] for _, row in rows for name in CORNERS if name in row]
    return not any("." in cell for cell in corners) and any(
        _DECIMAL_COMMA.fullmatch(cell) and not _THOUSANDS.fullmatch(cell) for cell in corners
    )


def _standard(row: dict[str, str], decimal_commas: bool) -> dict[str, str]:
    """Return a row in the dataset's own spelling; cells without a certain meaning stay."""
    row = dict(row)
    for name in IDS:
        if re.fullmatch(HEX_ID, row.get(name, "")):
            row[name] = row[name].lower()
    if re.fullmatch(r"rad\d+", spelling(row.get("rad_id", ""))):
        row["rad_id"] = spelling(row["rad_id"])
    if "lesion_type" in row:
        row["lesion_type"] = _TYPES.get(spelling(row["lesion_type"]), row["lesion_type"])
    for name in CORNERS:
        if name not in row:
            continue
        if row.get("lesion_type") == NO_FINDING and row[name].casefold() in EMPTY_WORDS:
            row[name] = ""
        if decimal_commas and _DECIMAL_COMMA.fullmatch(row[name]):
            row[name] = row[name].replace(",", ".")
    return row

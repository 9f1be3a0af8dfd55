"""The one builder of annotation tables in other forms, for tests: those read, those refused."""

import csv
import gzip
import io
from collections.abc import Callable

from dernet_utils.core.vocabulary import ANNOTATION_COLUMNS, CORNERS, NO_FINDING

Rows = list[list[str]]  # a table's cells, the first row with the names
XMIN, TYPE = ANNOTATION_COLUMNS.index("xmin"), ANNOTATION_COLUMNS.index("lesion_type")


def as_csv(rows: Rows, sep: str = ",", end: str = "\n", **options) -> str:
    """Rows as text."""
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=sep, lineterminator=end, **options).writerows(rows)
    return stream.getvalue()


def names(rows: Rows, change: Callable[[str], str]) -> Rows:
    """Rows with other names of columns."""
    return [[change(name) for name in rows[0]], *rows[1:]]


def cells(rows: Rows, column: str, change: Callable[[str], str]) -> Rows:
    """Rows with other cells in a column."""
    at = ANNOTATION_COLUMNS.index(column)
    return [rows[0], *([*row[:at], change(row[at]), *row[at + 1 :]] for row in rows[1:])]


def corners(rows: Rows, change: Callable[[str], str]) -> Rows:
    """Rows with other corners, those of "No finding" as well."""
    for name in CORNERS:
        rows = cells(rows, name, change)
    return rows


def commas(rows: Rows) -> Rows:
    """Rows with decimal commas."""
    return corners(rows, lambda text: text.replace(".", ","))


def one_corner(rows: Rows, text: str) -> Rows:
    """Rows whose first lesion has another `xmin`."""
    at = first_lesion(rows) - 1
    return [*rows[:at], [*rows[at][:XMIN], text, *rows[at][XMIN + 1 :]], *rows[at + 1 :]]


def first_lesion(rows: Rows) -> int:
    """Line of the first lesion; the header is line 1."""
    return next(at for at, row in enumerate(rows[1:], start=2) if row[TYPE] != NO_FINDING)


def with_column(rows: Rows, name: str, text: str) -> Rows:
    """Rows with a further column at the end."""
    return [[*rows[0], name], *([*row, text] for row in rows[1:])]


def with_index(rows: Rows, name: str = "", start: int = 0) -> Rows:
    """Rows with their numbers before them, as pandas writes an index."""
    numbers = (str(number) for number in range(start, len(rows)))
    return [[name, *rows[0]], *([next(numbers), *row] for row in rows[1:])]


def empty_as(word: str) -> Callable[[Rows], bytes]:
    """A builder of tables whose empty corners are a word."""
    return lambda rows: as_csv(corners(rows, lambda text: text or word)).encode()


# Forms that are read to the same rows.
READ: dict[str, Callable[[Rows], bytes]] = {
    # encoding
    "UTF-8 with mark": lambda rows: as_csv(rows).encode("utf-8-sig"),
    "UTF-8 with two marks": lambda rows: b"\xef\xbb\xbf" + as_csv(rows).encode("utf-8-sig"),
    "UTF-16, little endian": lambda rows: b"\xff\xfe" + as_csv(rows).encode("utf-16-le"),
    "UTF-16, big endian": lambda rows: b"\xfe\xff" + as_csv(rows).encode("utf-16-be"),
    "UTF-16-LE without mark": lambda rows: as_csv(rows).encode("utf-16-le"),
    "UTF-16-BE without mark": lambda rows: as_csv(rows).encode("utf-16-be"),
    "UTF-32 with mark": lambda rows: as_csv(rows).encode("utf-32"),
    "Excel's Unicode text": lambda rows: as_csv(rows, "\t", "\r\n").encode("utf-16"),
    "Latin-1 in a further column": lambda rows: as_csv(
        with_column(rows, "note", "Wirbelkörper")
    ).encode("latin-1"),
    # separator
    "semicolons": lambda rows: as_csv(rows, ";").encode(),
    "tabs": lambda rows: as_csv(rows, "\t").encode(),
    "bars": lambda rows: as_csv(rows, "|").encode(),
    "Excel's line sep=;": lambda rows: ("sep=;\r\n" + as_csv(rows, ";", "\r\n")).encode(),
    "a comma and a space": lambda rows: as_csv(rows).replace(",", ", ").encode(),
    "semicolons between spaces": lambda rows: as_csv(rows, ";").replace(";", " ; ").encode(),
    "commas in a note between semicolons": lambda rows: as_csv(
        with_column(rows, "note", "a, b, c"), ";"
    ).encode(),
    # line ends
    "Windows": lambda rows: as_csv(rows, end="\r\n").encode(),
    "old Mac": lambda rows: as_csv(rows, end="\r").encode(),
    "doubled carriage return": lambda rows: as_csv(rows, end="\r\r\n").encode(),
    "mixed": lambda rows: (as_csv(rows[:4], end="\r\n") + as_csv(rows[4:])).encode(),
    "no last line end": lambda rows: as_csv(rows).rstrip("\n").encode(),
    "empty lines first": lambda rows: b"\n\n" + as_csv(rows).encode(),
    # index
    "index of pandas": lambda rows: as_csv(with_index(rows)).encode(),
    "index of pandas, read and written again": lambda rows: as_csv(
        with_index(with_index(rows, "Unnamed: 0"))
    ).encode(),
    "index of pandas and tabs": lambda rows: as_csv(with_index(rows), "\t").encode(),
    "index of R": lambda rows: as_csv([rows[0], *with_index(rows, start=1)[1:]]).encode(),
    "index of R and semicolons": lambda rows: as_csv(
        commas([rows[0], *rows[1:]])[:1] + with_index(commas(rows), start=1)[1:], ";"
    ).encode(),
    "named index": lambda rows: as_csv(with_index(rows, "number")).encode(),
    # names of columns
    "Title_Case": lambda rows: as_csv(names(rows, str.title)).encode(),
    "UPPER CASE": lambda rows: as_csv(names(rows, str.upper)).encode(),
    "spaces in names": lambda rows: as_csv(names(rows, lambda x: x.replace("_", " "))).encode(),
    "hyphens in names": lambda rows: as_csv(names(rows, lambda x: x.replace("_", "-"))).encode(),
    "camelCase": lambda rows: as_csv(
        names(
            rows, lambda x: x.title().replace("_", "")[0].lower() + x.title().replace("_", "")[1:]
        )
    ).encode(),
    "spaces around names": lambda rows: as_csv(names(rows, lambda x: f" {x} ")).encode(),
    # cells
    "small letters": lambda rows: as_csv(cells(rows, "lesion_type", str.lower)).encode(),
    "capitals": lambda rows: as_csv(cells(rows, "lesion_type", str.upper)).encode(),
    "No Finding": lambda rows: as_csv(cells(rows, "lesion_type", str.title)).encode(),
    "underscores in types": lambda rows: as_csv(
        cells(rows, "lesion_type", lambda x: x.replace(" ", "_"))
    ).encode(),
    "wide spaces in types": lambda rows: as_csv(
        cells(rows, "lesion_type", lambda x: f"\xa0{x.replace(' ', '  ')}\xa0")
    ).encode(),
    "ids in capitals": lambda rows: as_csv(
        cells(cells(rows, "image_id", str.upper), "study_id", str.upper)
    ).encode(),
    "Rad 1": lambda rows: as_csv(
        cells(rows, "rad_id", lambda x: x.replace("rad", "Rad "))
    ).encode(),
    # decimal commas
    "decimal commas and semicolons": lambda rows: as_csv(commas(rows), ";").encode(),
    "decimal commas and tabs": lambda rows: as_csv(commas(rows), "\t").encode(),
    "decimal commas, all quoted": lambda rows: as_csv(
        commas(rows), ";", quoting=csv.QUOTE_ALL
    ).encode(),
    "decimal commas, index and Windows": lambda rows: as_csv(
        with_index(commas(rows)), ";", "\r\n"
    ).encode("utf-8-sig"),
    "decimal commas and NaN": lambda rows: as_csv(
        corners(commas(rows), lambda x: x or "NaN"), ";"
    ).encode(),
    # quotation marks
    "all quoted": lambda rows: as_csv(rows, quoting=csv.QUOTE_ALL).encode(),
    "texts quoted": lambda rows: as_csv(rows, quoting=csv.QUOTE_NONNUMERIC).encode(),
    "a space before quotation marks": lambda rows: (
        as_csv(rows, quoting=csv.QUOTE_ALL).replace('","', '", "').encode()
    ),
    "a space after quotation marks": lambda rows: (
        as_csv(rows, quoting=csv.QUOTE_ALL).replace('","', '" ,"').encode()
    ),
    "a note with quotation marks": lambda rows: as_csv(with_column(rows, "note", 'a "b"')).encode(),
    "a note of two lines": lambda rows: as_csv(with_column(rows, "note", "a\nb")).encode(),
    # nothing at the end
    "empty rows at the end": lambda rows: as_csv(rows).encode() + b",,,,,,,,\n" * 5,
    "empty lines at the end": lambda rows: as_csv(rows).encode() + b"\n \n\r\n",
    "separators at the end of all rows": lambda rows: as_csv(rows, end=",,\n").encode(),
    "separators at the end of rows": lambda rows: (
        as_csv(rows[:1]) + as_csv(rows[1:], end=",\n")
    ).encode(),
    "a separator at the end of the header": lambda rows: (
        as_csv(rows[:1], end=",\n") + as_csv(rows[1:])
    ).encode(),
    "an empty row in the middle": lambda rows: (
        as_csv(rows[:3]) + ";;;\n".replace(";", ",") + as_csv(rows[3:])
    ).encode(),
    # words for nothing
    **{
        f"{word} for empty": empty_as(word)
        for word in ("nan", "NaN", "NULL", "None", "-", "N/A", "<NA>", "–")
    },
}

PAGE = "<!DOCTYPE html>\n<html><head><title>Login</title></head><body>Log in</body></html>\n"
# Files of which nothing can be read, and words of the reason.
REFUSED_FILES: dict[str, tuple[Callable[[Rows], bytes], str]] = {
    "nothing": (lambda rows: b"", "empty"),
    "blank lines": (lambda rows: b" \r\n\r\n", "empty"),
    "a byte-order mark alone": (lambda rows: b"\xff\xfe", "empty"),
    "separators alone": (lambda rows: b",,,,\n,,,,\n", "empty"),
    "NUL bytes alone": (lambda rows: bytes(5000), "empty"),
    "NUL bytes at the end": (
        lambda rows: as_csv(rows).encode() + bytes(4096),
        "damaged.* 4096 NUL",
    ),
    "NUL bytes within": (
        lambda rows: as_csv(rows[:3]).encode() + bytes(10) + as_csv(rows[3:]).encode(),
        "10 NUL bytes, the first in row 4",
    ),
    "NUL bytes first": (lambda rows: bytes(512) + as_csv(rows).encode(), "damaged.* row 1"),
    "NUL bytes in UTF-16": (
        lambda rows: (as_csv(rows) + "\0" * 8).encode("utf-16"),
        "damaged.* 8 NUL",
    ),
    "UTF-16 cut within a character": (
        lambda rows: as_csv(rows).encode("utf-16")[:-1],
        "damaged at byte",
    ),
    "UTF-8 mark, other bytes": (
        lambda rows: (
            as_csv(with_column(rows, "note", "ä")).encode("latin-1").join([b"\xef\xbb\xbf", b""])
        ),
        "damaged at byte",
    ),
    "a login page": (lambda rows: PAGE.encode(), "web page.* PhysioNet"),
    "a login page with a mark": (lambda rows: PAGE.encode("utf-8-sig"), "web page"),
    "a page after empty lines": (lambda rows: b"\r\n\r\n" + PAGE.encode(), "web page"),
    "a page in UTF-16": (lambda rows: PAGE.encode("utf-16"), "web page"),
    "an XML error": (lambda rows: b'<?xml version="1.0"?><Error>AccessDenied</Error>', "web page"),
    "a page without heading": (lambda rows: b"<h1>403 Forbidden</h1>", "web page"),
    "an Excel workbook": (lambda rows: b"PK\x03\x04\x14\x00\x06\x00" + bytes(99), "Excel"),
    "an old Excel workbook": (lambda rows: b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(99), "Excel"),
    "gzip": (lambda rows: gzip.compress(as_csv(rows).encode()), "gzip"),
    "Parquet": (lambda rows: b"PAR1\x15\x04" + bytes(99), "Parquet"),
    "a PDF": (lambda rows: b"%PDF-1.7\n" + bytes(99), "PDF"),
    "JSON": (lambda rows: b'{"detail": "not authorised"}', "should name the columns"),
    "a Git LFS pointer": (
        lambda rows: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "git-lfs",
    ),
    "no header": (lambda rows: as_csv(rows[1:]).encode(), "should name the columns"),
    "spaces as separators": (lambda rows: as_csv(rows, " ").encode(), "should name the columns"),
    "each row one quoted cell": (
        lambda rows: as_csv([[as_csv([row]).strip()] for row in rows]).encode(),
        "should name the columns",
    ),
    "a cell without end": (
        lambda rows: as_csv(rows).replace(f",{rows[3][TYPE]},", f',"{rows[3][TYPE]},', 1).encode(),
        "odd number of quotation marks",
    ),
    "a cell that is too long": (lambda rows: b"x" * 200_000, "no CSV table"),
}
# Tables with a row that may mean two things or nothing: that row is named. Where two columns may be
# one, it is the header's.
REFUSED_ROWS: dict[str, tuple[Callable[[Rows], bytes], str]] = {
    "a decimal comma between commas": (
        lambda rows: as_csv(one_corner(rows, "10?5")).replace("?", ",").encode(),
        "10 cells .* decimal point",
    ),
    "a quoted decimal comma between commas": (
        lambda rows: as_csv(one_corner(rows, "10,5")).encode(),
        "decimal point.* '10,5'",
    ),
    "a decimal comma beside decimal points": (
        lambda rows: as_csv(one_corner(rows, "10,5"), ";").encode(),
        "decimal point.* '10,5'",
    ),
    "thousands or decimals": (
        lambda rows: as_csv(
            one_corner(corners(rows, lambda x: x.split(".")[0]), "1,234"), ";"
        ).encode(),
        "decimal point.* '1,234'",
    ),
    "thousands and decimals": (
        lambda rows: as_csv(one_corner(commas(rows), "1.234,5"), ";").encode(),
        "'1.234,5'",
    ),
    "digits with underscores": (lambda rows: as_csv(one_corner(rows, "1_0")).encode(), "'1_0'"),
    "nan in a lesion's row": (lambda rows: as_csv(one_corner(rows, "nan")).encode(), "'nan'"),
    "a hyphen in a lesion's row": (lambda rows: as_csv(one_corner(rows, "-")).encode(), "'-'"),
    "a doubtful type": (
        lambda rows: as_csv(
            [
                [*row[:TYPE], row[TYPE] + "?" * (at == first_lesion(rows)), *row[TYPE + 1 :]]
                for at, row in enumerate(rows, start=1)
            ]
        ).encode(),
        "lesion_type must be one of",
    ),
    "a row that lacks a cell": (
        lambda rows: as_csv(
            [row[: -1 if at == first_lesion(rows) else None] for at, row in enumerate(rows, 1)]
        ).encode(),
        "8 cells where the header has 9",
    ),
}
REFUSED_HEADERS: dict[str, tuple[Callable[[Rows], bytes], str]] = {
    "a column twice": (
        lambda rows: as_csv(with_column(rows, "image_id", "0" * 32)).encode(),
        "several columns may be image_id",
    ),
    "a column in two spellings": (
        lambda rows: as_csv(with_column(rows, "Image ID", "0" * 32)).encode(),
        "several columns may be image_id: image_id, Image ID",
    ),
    "a corner in two spellings": (
        lambda rows: as_csv(with_column(rows, "x_min", "5")).encode(),
        "several columns may be xmin",
    ),
    "another name": (
        lambda rows: as_csv(names(rows, lambda x: x.replace("image_id", "picture"))).encode(),
        "image_id is missing",
    ),
    "a name with its unit": (
        lambda rows: as_csv(names(rows, lambda x: x.replace("xmin", "xmin (px)"))).encode(),
        "xmin is missing",
    ),
}

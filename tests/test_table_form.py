"""Annotation tables in other forms are read to the same rows, or refused with the cause."""

import csv
import re
from pathlib import Path

import pandas as pd
import pytest
from table_files import (
    READ,
    REFUSED_FILES,
    REFUSED_HEADERS,
    REFUSED_ROWS,
    Rows,
    as_csv,
    commas,
    first_lesion,
)

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import ANNOTATION_COLUMNS
from dernet_utils.dataset.check import check_dataset, repair_dataset
from dernet_utils.dataset.table_form import read_table
from dernet_utils.dataset.tables import read_dataset

TRAIN = "annotations/train.csv"


def rows_of(root: Path) -> Rows:
    with (root / TRAIN).open(newline="") as lines:
        return list(csv.reader(lines))


@pytest.mark.parametrize("form", READ)
def test_a_table_in_another_form_is_the_same_dataset_at_both_gates(root, form):
    before, rows = read_dataset(root), rows_of(root)
    data = READ[form](rows)
    (root / TRAIN).write_bytes(data)
    table = read_table(data)
    assert [[row[name] for name in ANNOTATION_COLUMNS] for _, row in table.rows] == rows[1:]
    assert table.problems == []
    assert check_dataset(root).problems == []
    after = read_dataset(root)
    pd.testing.assert_frame_equal(after.boxes, before.boxes)
    pd.testing.assert_frame_equal(after.images, before.images)


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_file_that_is_no_table_is_one_problem_at_both_gates(root, case):
    make, words = REFUSED_FILES[case]
    (root / TRAIN).write_bytes(make(rows_of(root)))
    (problem,) = check_dataset(root).problems
    assert (problem.file, problem.row) == (TRAIN, None)
    assert re.search(words, problem.message)
    for gate in (read_dataset, lambda folder: repair_dataset(folder, root.parent / "out")):
        with pytest.raises(DernetError, match=words) as refused:
            gate(root)
        assert TRAIN in str(refused.value)


@pytest.mark.parametrize("case", [*REFUSED_ROWS, *REFUSED_HEADERS])
def test_a_row_without_a_certain_meaning_is_named_at_both_gates(root, case):
    make, words = (REFUSED_ROWS | REFUSED_HEADERS)[case]
    rows = rows_of(root)
    (root / TRAIN).write_bytes(make(rows))
    problems = check_dataset(root).problems
    row = 1 if case in REFUSED_HEADERS else first_lesion(rows)
    assert any(
        (problem.file, problem.row) == (TRAIN, row) and re.search(words, problem.message)
        for problem in problems
    )
    with pytest.raises(DernetError, match=TRAIN):
        read_dataset(root)


@pytest.mark.parametrize(
    ("cell", "number"),
    [("10,5", 10.5), ("0,125", 0.125), ("12", 12.0), ("7,0", 7.0), ("3,1234", 3.1234)],
)
def test_decimal_commas_are_the_numbers_that_they_look_like(cell, number):
    text = f"image_id;lesion_type;xmin;xmax\na;Osteophytes;{cell};20,5\n"
    ((line, row),) = read_table(text.encode()).rows
    assert (line, float(row["xmin"]), float(row["xmax"])) == (2, number, 20.5)


@pytest.mark.parametrize("cells", ["1,234;2,345", "10,5;20.5", "1,234;2.5"])
def test_commas_that_may_separate_thousands_stay(cells):
    ((_, row),) = read_table(f"image_id;xmin;xmax\na;{cells}\n".encode()).rows
    assert [row["xmin"], row["xmax"]] == cells.split(";")


def test_rows_are_counted_as_an_editor_counts_them(root):
    rows = rows_of(root)
    rows[-1][3] = "?"
    (root / TRAIN).write_bytes(("\r\n" + as_csv(commas(rows), ";", "\r\n")).encode("utf-8-sig"))
    (problem,) = check_dataset(root).problems
    assert problem.row == len(rows) + 1


def test_the_forms_are_noted(root):
    (root / TRAIN).write_bytes(as_csv(commas(rows_of(root)), ";").encode("utf-16"))
    (note,) = check_dataset(root).notes
    assert note.file == TRAIN
    assert all(word in note.message for word in ("UTF-16", "semicolons", "decimal commas"))


@pytest.mark.parametrize(
    "form",
    ["decimal commas, index and Windows", "UTF-16, big endian", "NaN for empty", "capitals",
     "ids in capitals", "index of R"],
)  # fmt: skip
def test_the_repaired_copy_has_the_standard_form(root, form):
    rows = rows_of(root)
    (root / TRAIN).write_bytes(READ[form](rows))
    assert repair_dataset(root, root.parent / "out") == []
    assert (root.parent / "out" / TRAIN).read_text() == as_csv(rows)
    report = check_dataset(root.parent / "out")
    assert (report.problems, report.notes) == ([], [])

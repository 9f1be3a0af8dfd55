"""A folder's problems are found where they are, and a clean folder is read as it is."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_files import cut_frame, make_dataset, to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import ANNOTATION_COLUMNS, LESION_TYPES, PAPER_CODES, RARER_TYPES
from dernet_utils.dataset.check import check_dataset, repair_dataset
from dernet_utils.dataset.folds import make_folds
from dernet_utils.dataset.tables import BOXES, IMAGES, read_dataset, read_manifest

TRAIN, TEST = "annotations/train.csv", "annotations/test.csv"


def table(root: Path, file: str = TRAIN) -> list[list[str]]:
    with (root / file).open(newline="") as lines:
        return list(csv.reader(lines))


def write(root: Path, rows: list[list[str]], file: str = TRAIN) -> None:
    with (root / file).open("w", newline="") as lines:
        csv.writer(lines).writerows(rows)


def edit(root: Path, row: int, file: str = TRAIN, **cells: str) -> None:
    """Change cells of a CSV line; `row` counts as the reports do, the header being 1."""
    rows = table(root, file)
    for column, text in cells.items():
        rows[row - 1][ANNOTATION_COLUMNS.index(column)] = str(text)
    write(root, rows, file)


def row_of(root: Path, lesion: bool, file: str = TRAIN, nth: int = 0) -> int:
    """Line of the nth row with a lesion, or of the nth without."""
    lines = [
        number
        for number, cells in enumerate(table(root, file)[1:], start=2)
        if (cells[4] != "No finding") == lesion
    ]
    return lines[nth]


def cell(root: Path, row: int, column: str, file: str = TRAIN) -> str:
    return table(root, file)[row - 1][ANNOTATION_COLUMNS.index(column)]


def file_of(root: Path, row: int, split: str = "train") -> Path:
    return root / f"{split}_images/{cell(root, row, 'image_id', f'annotations/{split}.csv')}.dicom"


def found(root: Path) -> list[tuple]:
    return [(problem.file, problem.row) for problem in check_dataset(root).problems]


def messages(root: Path) -> str:
    return "\n".join(str(problem) for problem in check_dataset(root).problems)


# --- A clean folder ---------------------------------------------------------------------------


def test_a_clean_folder_has_no_problem_and_a_fingerprint_that_counts_what_is_there(tiny_dataset):
    report = check_dataset(tiny_dataset)
    assert report.problems == []
    for split, studies in (("train", 14), ("test", 4)):
        prints = report.fingerprint[split]
        files = list((tiny_dataset / f"{split}_images").iterdir())
        headers = [pydicom.dcmread(file) for file in files]
        rows = pd.read_csv(tiny_dataset / f"annotations/{split}.csv")
        lesions = rows[rows["lesion_type"] != "No finding"]
        assert (prints["images"], prints["studies"]) == (len(files), studies)
        assert prints["abnormal_images"] == lesions["image_id"].nunique()
        assert prints["abnormal_images"] + prints["normal_images"] == prints["images"]
        assert sum(prints["boxes"].values()) == len(lesions)
        counts = prints["boxes"].values()
        assert prints["imbalance_ratio"] == round(max(counts) / min(counts), 1)
        assert prints["height_px"]["max"] == max(header.Rows for header in headers)
        assert prints["width_px"]["min"] == min(header.Columns for header in headers)
        assert sum(prints["transfer_syntaxes"].values()) == len(files)
        assert len(prints["transfer_syntaxes"]) == 4
        assert set(prints["photometric_interpretations"]) == {"MONOCHROME1", "MONOCHROME2"}
        bits = {str(header.BitsStored) for header in headers}
        assert set(prints["bits_stored"]) == bits
    assert report.fingerprint["train"]["folded_into_other_lesions"] == {"Enthesophytes": 1}
    assert json.loads(json.dumps(report.fingerprint)) == report.fingerprint


def test_reading_gives_typed_tables_that_equal_the_files(tiny_dataset):
    dataset = read_dataset(tiny_dataset)
    rows = pd.concat(
        pd.read_csv(tiny_dataset / f"annotations/{split}.csv").assign(split=split)
        for split in ("train", "test")
    )
    lesions = rows[rows["lesion_type"] != "No finding"].reset_index(drop=True)
    lesions["lesion_type"] = lesions["lesion_type"].replace("Enthesophytes", "Other lesions")
    pd.testing.assert_frame_equal(dataset.boxes, lesions[list(BOXES.columns)], check_dtype=False)
    assert set(dataset.boxes["lesion_type"]) == set(LESION_TYPES)
    assert list(dataset.images["image_id"]) == list(dict.fromkeys(rows["image_id"]))
    assert dataset.images["boxes"].sum() == len(lesions)
    assert list(dataset.images.columns) == list(IMAGES.columns)
    for image in dataset.images.itertuples():
        header = pydicom.dcmread(image.dicom_path, stop_before_pixels=True)
        assert header.SOPInstanceUID == f"2.25.{int(image.image_id, 16)}"
        assert (image.height, image.width, image.view) == (header.Rows, header.Columns, "")
        assert image.abnormal == (image.image_id in set(lesions["image_id"]))


def test_the_view_is_that_of_the_header(tiny_dataset):
    row = row_of(tiny_dataset, lesion=False)
    stored = np.arange(12, dtype=np.uint16).reshape(3, 4)
    file_of(tiny_dataset, row).write_bytes(to_bytes(make_dataset(stored, 12, ViewPosition="LL")))
    images = read_dataset(tiny_dataset).images.set_index("image_id")
    image = images.loc[cell(tiny_dataset, row, "image_id")]
    assert (image.view, image.height, image.width) == ("LL", 3, 4)


def test_the_columns_may_stand_in_any_order_and_with_a_byte_order_mark(tiny_dataset):
    before = read_dataset(tiny_dataset)
    frame = pd.read_csv(tiny_dataset / TRAIN, dtype=str)
    frame[list(reversed(ANNOTATION_COLUMNS))].assign(note="x").to_csv(
        tiny_dataset / TRAIN, index=False, encoding="utf-8-sig", lineterminator="\r\n"
    )
    assert check_dataset(tiny_dataset).problems == []
    pd.testing.assert_frame_equal(read_dataset(tiny_dataset).boxes, before.boxes)


def test_the_thirteen_types_carry_the_papers_numbers():
    assert len(LESION_TYPES) + len(RARER_TYPES) == 13
    assert not set(LESION_TYPES) & set(RARER_TYPES)
    assert list(PAPER_CODES.values()) == ["LT2", "LT4", "LT6", "LT8", "LT10", "LT11", "LT13"]


@pytest.mark.parametrize("name", RARER_TYPES)
def test_each_rarer_type_is_folded(tiny_dataset, name):
    row = row_of(tiny_dataset, lesion=True)
    edit(tiny_dataset, row, lesion_type=name)
    assert read_dataset(tiny_dataset).boxes["lesion_type"].iloc[0] == "Other lesions"


# --- Dirt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ANNOTATION_COLUMNS)
def test_a_missing_column_is_one_problem(tiny_dataset, column):
    frame = pd.read_csv(tiny_dataset / TRAIN, dtype=str)
    frame.drop(columns=column).to_csv(tiny_dataset / TRAIN, index=False)
    problems = check_dataset(tiny_dataset).problems
    assert [p.row for p in problems if f"the column {column} is missing" in p.message] == [1]
    if column != "image_id":  # without it no file belongs to a row
        assert len(problems) == 1


@pytest.mark.parametrize(
    ("lesion", "cells", "words"),
    [
        (True, {"lesion_type": "osteophyt"}, "lesion_type must be one of"),
        (True, {"lesion_type": ""}, "lesion_type must be one of"),
        (True, {"xmin": "left"}, "xmin must be a number"),
        (True, {"ymax": "inf"}, "ymax must be a number"),
        (True, {"ymax": "nan"}, "ymax must be a number"),
        (True, {"xmin": "9.0", "xmax": "9.0"}, "has no area"),
        (True, {"ymin": "20", "ymax": "10"}, "has no area"),
        (True, {"xmin": "-0.5", "xmax": "5"}, "reaches outside"),
        (True, {"ymax": "5000"}, "reaches outside"),
        (True, {"xmin": "5000", "xmax": "5010"}, "reaches outside"),
        (True, {"xmin": ""}, "needs four corners"),
        (False, {"xmin": "1", "ymin": "1", "xmax": "2", "ymax": "2"}, "has no corners"),
        (False, {"ymin": "1"}, "has no corners"),
        (False, {"rad_id": "1"}, "rad_id must be"),
        (False, {"series_id": "12"}, "series_id must be 32"),
        (False, {"study_id": "z" * 32}, "study_id must be 32"),
    ],
)
def test_a_bad_cell_is_named_with_file_and_row(tiny_dataset, lesion, cells, words):
    row = row_of(tiny_dataset, lesion, nth=1)
    edit(tiny_dataset, row, **cells)
    problems = check_dataset(tiny_dataset).problems
    assert (TRAIN, row) in [(problem.file, problem.row) for problem in problems]
    assert any(words in problem.message for problem in problems if problem.row == row)
    with pytest.raises(DernetError, match="dernet check"):
        read_dataset(tiny_dataset)


def test_a_bad_image_id_is_named_and_never_followed_as_a_path(tiny_dataset):
    row = row_of(tiny_dataset, lesion=False)
    edit(tiny_dataset, row, image_id="../../etc/passwd")
    assert "image_id must be 32 hexadecimal digits, not '../../etc/passwd'" in messages(
        tiny_dataset
    )


def test_corners_on_the_images_edge_are_inside(tiny_dataset):
    row = row_of(tiny_dataset, lesion=True)
    header = pydicom.dcmread(file_of(tiny_dataset, row))
    edit(tiny_dataset, row, xmin="0", ymin="0", xmax=header.Columns, ymax=float(header.Rows))
    assert check_dataset(tiny_dataset).problems == []


def test_a_row_twice(tiny_dataset):
    rows = table(tiny_dataset)
    write(tiny_dataset, [*rows, rows[4]])
    assert found(tiny_dataset) == [(TRAIN, len(rows) + 1)]
    assert "repeats row 5" in messages(tiny_dataset)


def test_a_row_of_the_wrong_length_and_blank_lines(tiny_dataset):
    rows = table(tiny_dataset)
    write(tiny_dataset, [*rows[:3], [], rows[3] + ["more"], *rows[3:], []])
    assert found(tiny_dataset) == [(TRAIN, 5)]
    with pytest.raises(DernetError, match="row 5: 10 cells where the header has 9"):
        repair_dataset(tiny_dataset, tiny_dataset.parent / "out")


def test_no_finding_beside_a_lesion_of_the_image(tiny_dataset):
    rows = table(tiny_dataset)
    lesion = rows[row_of(tiny_dataset, lesion=True) - 1]
    write(tiny_dataset, [*rows, [*lesion[:4], "No finding", "", "", "", ""]])
    assert found(tiny_dataset) == [(TRAIN, len(rows) + 1)]
    assert "beside a lesion" in messages(tiny_dataset)


def test_no_finding_by_two_readers(tiny_dataset):
    rows = table(tiny_dataset)
    normal = rows[row_of(tiny_dataset, lesion=False) - 1]
    write(tiny_dataset, [*rows, [*normal[:3], "rad77", *normal[4:]]])
    assert found(tiny_dataset) == [(TRAIN, len(rows) + 1)]


def test_a_study_in_both_splits(tiny_dataset):
    row = row_of(tiny_dataset, lesion=False, file=TEST)
    edit(tiny_dataset, row, file=TEST, study_id=cell(tiny_dataset, 2, "study_id"))
    assert found(tiny_dataset) == [(TEST, row)]
    assert f"train in {TRAIN}, row 2" in messages(tiny_dataset)


def test_an_image_in_two_studies(tiny_dataset):
    rows = table(tiny_dataset)
    first = row_of(tiny_dataset, lesion=True)
    other = next(cells[0] for cells in rows[1:] if cells[0] != rows[first - 1][0])
    edit(tiny_dataset, first + 1, study_id=other)
    assert found(tiny_dataset) == [(TRAIN, first + 1)]
    assert "is in the study" in messages(tiny_dataset)


def test_a_missing_file_and_an_image_without_labels(tiny_dataset):
    row = row_of(tiny_dataset, lesion=False)
    unlisted = f"test_images/{'0' * 32}.dicom"
    file_of(tiny_dataset, row).rename(tiny_dataset / unlisted)
    assert found(tiny_dataset) == [(TRAIN, row), (unlisted, None)]


def test_a_file_that_is_no_dicom(tiny_dataset):
    row = row_of(tiny_dataset, lesion=False)
    file_of(tiny_dataset, row).write_bytes(b"not an image")
    assert found(tiny_dataset) == [(TRAIN, row)]
    file_of(tiny_dataset, row).write_bytes(b"")
    assert found(tiny_dataset) == [(TRAIN, row)]


@pytest.mark.slow
def test_each_file_cut_anywhere_is_found(tiny_dataset):
    """Whatever the transfer syntax: in the header, in the pixels, and by the last six bytes."""
    firsts = pd.read_csv(tiny_dataset / TEST).drop_duplicates("image_id")
    syntaxes = set()
    for index, image_id in firsts["image_id"].items():
        path = tiny_dataset / f"test_images/{image_id}.dicom"
        whole = path.read_bytes()
        syntaxes.add(pydicom.dcmread(path).file_meta.TransferSyntaxUID)
        for kept in (200, len(whole) // 2, len(whole) - 6):
            path.write_bytes(whole[:kept])
            assert found(tiny_dataset) == [(TEST, index + 2)], (path, kept)
        path.write_bytes(whole)
    assert len(syntaxes) == 4


def test_a_cut_codestream_in_a_whole_file_is_found(tiny_dataset):
    for path in (tiny_dataset / "train_images").iterdir():
        header = pydicom.dcmread(path)
        if header.file_meta.TransferSyntaxUID.is_compressed:
            cut_frame(header).save_as(path)
            assert f"{path.name} cannot be used" in messages(tiny_dataset)
            return
    pytest.fail("no compressed image in the fixture")


def test_all_problems_are_listed_not_only_the_first(tiny_dataset):
    lesion, normal = row_of(tiny_dataset, True), row_of(tiny_dataset, False)
    edit(tiny_dataset, lesion, xmax=cell(tiny_dataset, lesion, "xmin"))
    edit(tiny_dataset, lesion + 1, ymax="9999")
    edit(tiny_dataset, normal, lesion_type="Gout", rad_id="?")
    file_of(tiny_dataset, 2, "test").unlink()
    places = [(TRAIN, lesion), (TRAIN, lesion + 1), (TRAIN, normal), (TRAIN, normal), (TEST, 2)]
    assert found(tiny_dataset) == sorted(places, key=lambda where: (where[0] == TEST, where))
    assert all(type(problem.row) is int for problem in check_dataset(tiny_dataset).problems)
    with pytest.raises(DernetError, match="the first of 5 problems"):
        read_dataset(tiny_dataset)


def test_a_missing_table_or_image_folder_is_one_problem(tiny_dataset):
    shutil.rmtree(tiny_dataset / "test_images")
    assert found(tiny_dataset) == [("test_images", None)]
    (tiny_dataset / TEST).unlink()
    assert found(tiny_dataset) == [(TEST, None)]
    (tiny_dataset / TRAIN).write_text("")
    assert found(tiny_dataset) == [(TRAIN, None), (TEST, None)]
    (tiny_dataset / TRAIN).write_text("x" * 200_000)
    assert "no CSV table" in messages(tiny_dataset)


@pytest.mark.parametrize("function", [read_dataset, check_dataset])
def test_a_folder_that_is_no_dataset(tmp_path, function):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DernetError, match=r"annotations/train\.csv"):
            function(folder)


# --- Repair -----------------------------------------------------------------------------------


def test_repair_drops_and_clips_and_says_so(tiny_dataset, tmp_path):
    before = table(tiny_dataset)
    first = row_of(tiny_dataset, lesion=True)
    header = pydicom.dcmread(file_of(tiny_dataset, first))
    edit(tiny_dataset, first, xmin="5", xmax="5")
    edit(tiny_dataset, first + 1, xmin="3.25", ymin="-4", xmax="5000", ymax="20")
    edit(tiny_dataset, first + 2, xmin="5000", xmax="5100")
    done = repair_dataset(tiny_dataset, tmp_path / "out")
    assert [line.split(":")[0] for line in done] == [
        f"{TRAIN}, row {row}" for row in (first, first + 1, first + 2)
    ]
    assert "no area: dropped" in done[0] and "clipped" in done[1] and "outside" in done[2]
    assert (tmp_path / "out/repairs.txt").read_text().splitlines() == done
    after = table(tmp_path / "out")
    clipped = [*before[first][:5], "3.25", "0.0", f"{float(header.Columns)}", "20"]
    assert after == [*before[: first - 1], clipped, *before[first + 2 :]]
    assert table(tmp_path / "out", TEST) == table(tiny_dataset, TEST)


def test_the_repaired_copy_is_a_dataset_and_the_original_is_untouched(tiny_dataset, tmp_path):
    edit(tiny_dataset, row_of(tiny_dataset, lesion=True), ymax="5000")
    (tiny_dataset / "manifest.json").write_text('{"virtual": true}')
    bytes_before = {path: path.read_bytes() for path in tiny_dataset.rglob("*") if path.is_file()}
    repair_dataset(tiny_dataset, tmp_path / "deep/out")
    assert check_dataset(tmp_path / "deep/out").problems == []
    assert len(read_dataset(tmp_path / "deep/out").images) == 45
    assert read_manifest(tmp_path / "deep/out") == {"virtual": True}
    assert {p: p.read_bytes() for p in tiny_dataset.rglob("*") if p.is_file()} == bytes_before
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_image_whose_boxes_all_go_is_left_out_not_called_normal(tiny_dataset, tmp_path):
    rows = table(tiny_dataset)
    image_id = cell(tiny_dataset, row_of(tiny_dataset, lesion=True), "image_id")
    for row, cells in enumerate(rows[1:], start=2):
        if cells[2] == image_id:
            edit(tiny_dataset, row, xmax="-9", xmin="-10")
    done = repair_dataset(tiny_dataset, tmp_path / "out")
    assert f"train_images/{image_id}.dicom left out" in done[-1]
    assert image_id not in set(read_dataset(tmp_path / "out").images["image_id"])
    assert check_dataset(tmp_path / "out").problems == []


def test_repair_overwrites_nothing_and_leaves_other_problems(tiny_dataset, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DernetError, match="exists"):
        repair_dataset(tiny_dataset, tmp_path / "out")
    row = row_of(tiny_dataset, lesion=False)
    edit(tiny_dataset, row, rad_id="?")
    assert repair_dataset(tiny_dataset, tmp_path / "other") == []
    assert found(tmp_path / "other") == [(TRAIN, row)]


# --- Folds ------------------------------------------------------------------------------------


def images_of(sizes: list[int], labels: list[bool]) -> pd.DataFrame:
    studies = np.repeat(np.arange(len(sizes)), sizes)
    ids = [f"{number:032x}" for number in range(len(studies))]
    label = np.asarray(labels)[studies]
    return pd.DataFrame(
        {"image_id": ids, "study_id": studies.astype(str), "split": "train", "abnormal": label}
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=5, max_size=40),
    st.integers(2, 5),
    st.integers(0, 99),
)
def test_no_study_is_ever_in_two_folds_and_no_image_is_lost(studies, n_folds, seed):
    images = images_of([size for size, _ in studies], [label for _, label in studies])
    if images["abnormal"].nunique() < 2 or images["abnormal"].value_counts().max() < n_folds:
        return
    folds = make_folds(images, n_folds, seed)
    assert sorted(folds["image_id"]) == sorted(images["image_id"])
    assert folds["fold"].between(0, n_folds - 1).all()
    assert (folds.groupby("study_id")["fold"].nunique() == 1).all()
    shuffled = make_folds(images.sample(frac=1, random_state=seed), n_folds, seed)
    pd.testing.assert_frame_equal(folds, shuffled)


def test_folds_are_stratified():
    images = images_of([2] * 40, [True, False] * 20)
    folds = make_folds(images, 5, seed=42).merge(images)
    assert (
        folds.groupby("fold")["abnormal"].agg(["size", "mean"]).to_numpy().tolist()
        == [[16, 0.5]] * 5
    )


def test_folds_refuse_the_test_split_too_few_studies_and_one_label():
    images = images_of([2] * 6, [True, False] * 3)
    with pytest.raises(DernetError, match="training images only"):
        make_folds(images.assign(split="test"), 3, 42)
    with pytest.raises(DernetError, match="at least 7 studies"):
        make_folds(images, 7, 42)
    with pytest.raises(DernetError, match="normal and abnormal"):
        make_folds(images.assign(abnormal=True), 3, 42)
    with pytest.raises(DernetError, match="5 of the more frequent"):
        make_folds(images_of([1] * 6, [True, False] * 3), 5, 42)


def test_manifest(tmp_path):
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DernetError, match="should be JSON"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"virtual": "yes"}', '{"virtual": 1}'])
def test_a_manifest_says_whether_the_radiographs_are_virtual(tiny_dataset, text):
    (tiny_dataset / "manifest.json").write_text(text)
    for read in (read_manifest, read_dataset):
        with pytest.raises(DernetError, match="virtual"):
            read(tiny_dataset)

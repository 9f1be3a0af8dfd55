"""A VinDr-SpineXR folder as checked tables; folds by study.

`check_dataset` lists every problem of a folder, `repair_dataset` writes a copy without the two
known ones that have a safe answer, and `read_dataset` accepts a folder without problems only.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pandera.pandas as pa
import pydicom
from pydicom.pixels import pixel_array
from pydicom.pixels.utils import get_expected_length
from sklearn.model_selection import StratifiedGroupKFold

from dernet_utils.errors import DernetError
from dernet_utils.folder import (
    COLUMNS,
    CORNERS,
    EDGES,
    HEX_ID,
    LESION_TYPES,
    NO_FINDING,
    PAPER_CODES,
    RARER_TYPES,
    SPLITS,
    Contents,
    Problem,
    box_text,
    first_rows,
    has_no_area,
    image_path,
    is_lesion,
    is_outside,
    place,
    read_contents,
    reason,
    table_path,
)
from dernet_utils.truth import read_twins
from dernet_utils.workspace import Workspace

__all__ = [
    "BOXES",
    "COLUMNS",
    "CORNERS",
    "IMAGES",
    "LESION_TYPES",
    "NO_FINDING",
    "PAPER_CODES",
    "RARER_TYPES",
    "SPLITS",
    "Dataset",
    "Problem",
    "Report",
    "check_dataset",
    "labelled_findings",
    "load_folds",
    "make_folds",
    "read_dataset",
    "read_manifest",
    "read_twins",
    "repair_dataset",
]


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found: counts that identify the dataset, and every problem."""

    fingerprint: dict
    problems: list[Problem]


@dataclass(frozen=True)
class Dataset:
    """A clean dataset.

    Attributes:
        root: Its folder.
        images: One row an image, as `IMAGES` says; `boxes` counts those of the image.
        boxes: One row a box, as `BOXES` says; corners in stored pixels, origin top left.
    """

    root: Path
    images: pd.DataFrame
    boxes: pd.DataFrame


def _ids(*names: str) -> dict[str, pa.Column]:
    return {name: pa.Column(str, pa.Check.str_matches(f"^{HEX_ID}$")) for name in names}


IMAGES = pa.DataFrameSchema(
    {
        **_ids("image_id", "study_id", "series_id"),
        "split": pa.Column(str, pa.Check.isin(SPLITS)),
        "abnormal": pa.Column(bool),
        "boxes": pa.Column(int, pa.Check.ge(0)),
        "path": pa.Column(str),
    },
    checks=pa.Check(lambda images: images["abnormal"] == (images["boxes"] > 0)),
    unique=["image_id"],
    strict=True,
    coerce=True,
)
BOXES = pa.DataFrameSchema(
    {
        **_ids("image_id", "study_id", "series_id"),
        "split": pa.Column(str, pa.Check.isin(SPLITS)),
        "rad_id": pa.Column(str),
        "lesion_type": pa.Column(str, pa.Check.isin(LESION_TYPES)),
        **{corner: pa.Column(float, pa.Check.ge(0)) for corner in CORNERS},
    },
    checks=[
        pa.Check(lambda boxes: boxes["xmin"] < boxes["xmax"]),
        pa.Check(lambda boxes: boxes["ymin"] < boxes["ymax"]),
    ],
    strict=True,
    coerce=True,
)


def read_dataset(root: Path) -> Dataset:
    """Read a dataset that has no problem.

    Args:
        root: A folder in the form of VinDr-SpineXR, or a copy that `repair_dataset` wrote.

    Returns:
        Images and boxes as typed tables, in the order of the CSV files, train before test.
        Rarer lesion types are folded into "Other lesions".

    Raises:
        DernetError: The folder is no dataset, or it has a problem that its tables or headers
            show. Pixel data are not looked at here; `check_dataset` does.
    """
    root = Path(root)
    contents = read_contents(root)
    if contents.problems:
        count = len(contents.problems)
        raise DernetError(
            f"A clean dataset was expected at {root}, but {contents.problems[0]}"
            f"{'' if count == 1 else f' (the first of {count} problems)'}: `dernet check {root}` "
            "lists all, and with `--repair OUT` writes OUT, a dataset without boxes that have no "
            "area or reach outside, to be used in its place."
        )
    rows = contents.rows
    boxes = rows[is_lesion(rows)].reset_index(drop=True)
    boxes["lesion_type"] = boxes["lesion_type"].replace(dict.fromkeys(RARER_TYPES, "Other lesions"))
    boxes[list(CORNERS)] = boxes[list(EDGES)]
    images = first_rows(rows).reset_index(drop=True)
    images["boxes"] = images["image_id"].map(boxes["image_id"].value_counts()).fillna(0)
    images["abnormal"] = images["boxes"] > 0
    images["path"] = [
        str(root / image_path(split, image_id))
        for split, image_id in zip(images["split"], images["image_id"], strict=True)
    ]
    images = IMAGES.validate(images[list(IMAGES.columns)])
    return Dataset(root, images, BOXES.validate(boxes[list(BOXES.columns)]))


def check_dataset(root: Path, progress: Callable[[Iterable], Iterable] = iter) -> Report:
    """Describe a dataset and list all its problems, those of the pixel data included.

    Args:
        root: A folder in the form of VinDr-SpineXR.
        progress: Wraps the loop over images, as ``tqdm`` does; compressed frames are decoded,
            which takes a second or so for a large film.

    Returns:
        The fingerprint (JSON-ready, per split) and the problems, ordered by file and row.

    Raises:
        DernetError: The folder has neither table, so it is no dataset at all.
    """
    root = Path(root)
    contents = read_contents(root)
    problems = list(contents.problems)
    readable = first_rows(contents.rows).merge(contents.headers[["image_id", "split"]])
    for first in progress(list(readable.itertuples())):
        file = image_path(first.split, first.image_id)
        message = _pixel_problem(root / file)
        if message:
            problems.append(Problem(first.file, first.row, f"{file} {message}"))
    fingerprint = {split: _fingerprint(contents, split) for split in SPLITS}
    return Report(fingerprint, sorted(problems, key=place))


def _pixel_problem(path: Path) -> str:
    """Return what is wrong with a file's pixel data, or an empty string.

    Raw pixel data are measured, not read; compressed ones are decoded, since only then a cut
    codestream shows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="End of file reached")
        try:
            header = pydicom.dcmread(path, defer_size=1024)
            pixels = header.get_item("PixelData", keep_deferred=True)
            if pixels is None:
                return "is truncated: its pixel data are missing or have no end"
            syntax = header.file_meta.TransferSyntaxUID
            if syntax.is_encapsulated or syntax.is_deflated:
                pixel_array(path, index=0)
                return ""
            promised = get_expected_length(header)
        except Exception as error:  # decoders raise many types on broken data
            return f"is truncated or damaged: its pixel data cannot be decoded ({reason(error)})"
        there = min(pixels.length, path.stat().st_size - pixels.value_tell)
        if there < promised:
            return f"is truncated: {there:,} of {promised:,} bytes of pixel data are there"
        return ""


def _fingerprint(contents: Contents, split: str) -> dict:
    rows = contents.rows[contents.rows["split"] == split]
    headers = contents.headers[contents.headers["split"] == split]
    lesions = rows.loc[is_lesion(rows), "lesion_type"]
    boxes = lesions.replace(dict.fromkeys(RARER_TYPES, "Other lesions")).value_counts()
    abnormal = rows.loc[is_lesion(rows), "image_id"].nunique()
    return {
        "images": rows["image_id"].nunique(),
        "studies": rows["study_id"].nunique(),
        "abnormal_images": abnormal,
        "normal_images": rows["image_id"].nunique() - abnormal,
        "boxes": {name: int(boxes.get(name, 0)) for name in LESION_TYPES},
        "folded_into_other_lesions": _counts(lesions[lesions.isin(RARER_TYPES)]),
        # The most frequent class against the rarest one present; the paper's is 46.9.
        "imbalance_ratio": round(float(boxes.max() / boxes.min()), 1) if len(boxes) else None,
        "height_px": _range(headers["height"]),
        "width_px": _range(headers["width"]),
        "transfer_syntaxes": _counts(headers["transfer_syntax"]),
        "photometric_interpretations": _counts(headers["photometric_interpretation"]),
        "bits_stored": _counts(headers["bits_stored"]),
    }


def _counts(values: pd.Series) -> dict[str, int]:
    return {str(name): int(count) for name, count in values.value_counts().sort_index().items()}


def _range(values: pd.Series) -> dict[str, float] | None:
    if values.empty:
        return None
    return {"min": int(values.min()), "median": float(values.median()), "max": int(values.max())}


def repair_dataset(root: Path, out: Path) -> list[str]:
    """Write a copy of a dataset without the boxes that have no area or reach outside.

    A box without area is dropped. A box that reaches outside its image is clipped to it, and
    dropped where nothing remains. An image that had lesions and keeps none is left out of the
    copy: a radiologist called it abnormal, so "No finding" would be a false label, and without
    a box it says nothing about where. Every other problem stays as it is, for a person to solve.

    Args:
        root: The dataset; nothing in it is changed.
        out: A folder that does not exist yet. It becomes a dataset of its own: cleaned tables,
            links to the images of `root`, and ``repairs.txt`` with what is returned. Use it in
            the place of `root`, for example as ``DERNET_DATA``.

    Returns:
        What was done, one sentence a row, with file and row of the original.

    Raises:
        DernetError: `out` exists, `root` is no dataset, or its tables lack a column or have
            rows of the wrong length, so that a faithful copy cannot be written.
    """
    root, out = Path(root), Path(out)
    if out.exists() or out.is_symlink():
        raise DernetError(f"The repaired copy needs a new folder, but {out} exists: name another.")
    contents = read_contents(root)
    if contents.broken:
        raise DernetError(
            f"A repaired copy needs tables that can be read whole, but {contents.broken[0]}: "
            "correct this by hand first."
        )
    rows, done = _repaired(contents.rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_copy(root, rows, done, partial)
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return done


def _repaired(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return cleaned rows and what was done to them."""
    clipped = rows.copy()
    for edge, corner, side in zip(EDGES, CORNERS, ("width", "height") * 2, strict=True):
        clipped[edge] = rows[edge].clip(lower=0, upper=rows[side])
        moved = is_outside(rows) & (clipped[edge] != rows[edge])
        clipped.loc[moved, corner] = clipped.loc[moved, edge].map(repr)
    flat, outside = has_no_area(rows), is_outside(rows)
    gone = flat | (outside & has_no_area(clipped))
    kept = rows.loc[is_lesion(rows) & ~gone, "image_id"]
    emptied = rows["image_id"].isin(rows.loc[gone, "image_id"]) & ~rows["image_id"].isin(kept)
    done = []
    for row in rows[flat | outside].itertuples():
        if flat[row.Index]:
            repair = "has no area: dropped"
        elif gone[row.Index]:
            repair = "lies outside its image: dropped"
        else:
            repair = f"reaches outside its image: clipped to {box_text(clipped.loc[row.Index])}"
        done.append(f"{row.file}, row {row.row}: the box {box_text(row)} {repair}")
    for row in first_rows(rows[emptied]).itertuples():
        image = image_path(row.split, row.image_id)
        done.append(f"{row.file}, row {row.row}: {image} left out, as none of its boxes remains")
    return clipped[~gone & ~emptied], done


def _write_copy(root: Path, rows: pd.DataFrame, done: list[str], out: Path) -> None:
    (out / "annotations").mkdir()
    for split in SPLITS:
        of_split = rows[rows["split"] == split]
        of_split[list(COLUMNS)].to_csv(out / table_path(split), index=False, lineterminator="\n")
        (out / f"{split}_images").mkdir()
        for image_id in first_rows(of_split)["image_id"]:
            image = image_path(split, image_id)
            (out / image).symlink_to((root / image).resolve())
    if (root / "manifest.json").is_file():
        shutil.copyfile(root / "manifest.json", out / "manifest.json")
    if (root / "twins").is_dir():
        (out / "twins").symlink_to((root / "twins").resolve())
    (out / "repairs.txt").write_text("".join(f"{line}\n" for line in done), encoding="utf-8")


def read_manifest(root: Path) -> dict | None:
    """Return what the virtual cohort says of itself, None for a dataset without manifest.

    Args:
        root: The dataset's folder.

    Raises:
        DernetError: ``manifest.json`` is there but is not JSON.
    """
    path = Path(root) / "manifest.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DernetError(f"{path} should be JSON, but {error}: make the cohort again.") from error


def labelled_findings(manifest: dict | None) -> pd.DataFrame:
    """Return the findings of a virtual cohort that its tables have a box for.

    Args:
        manifest: As `read_manifest` returns it.

    Returns:
        One row a box: ``image_id``, ``number`` (the finding's place among those that `read_twins`
        returns for the film), ``lesion_type`` and ``visibility``.

    Raises:
        DernetError: There is no manifest.
    """
    if manifest is None:
        raise DernetError(
            "Exact masks are known of virtual films only, and this dataset has no manifest: take a "
            "profile with a virtual cohort."
        )
    rows = [
        (film["image_id"], number, finding["type"], seen["visibility"])
        for study in manifest["studies"]
        for film in study["films"]
        for number, (finding, seen) in enumerate(
            zip(study["findings"], film["findings"], strict=True)
        )
        if seen["box"] is not None
    ]
    return pd.DataFrame(rows, columns=["image_id", "number", "lesion_type", "visibility"])


def make_folds(images_train: pd.DataFrame, n_folds: int, seed: int) -> pd.DataFrame:
    """Deal the training studies into folds.

    All images of a study share a fold, and the folds' shares of abnormal images are as equal as
    that allows (scikit-learn's StratifiedGroupKFold). The order of the rows has no influence.

    Args:
        images_train: Rows of `Dataset.images` whose split is ``train``.
        n_folds: Number of folds; the paper's section 4.1 has 5.
        seed: Seed of the deal.

    Returns:
        `image_id`, `study_id` and `fold` (0 to `n_folds` - 1), ordered by image.

    Raises:
        DernetError: An image is of the test split, there are fewer studies than folds, or all
            images have one label.

    >>> studies = [number // 2 for number in range(12)]
    >>> images = pd.DataFrame({"image_id": range(12), "study_id": studies, "split": "train"})
    >>> folds = make_folds(images.assign(abnormal=images.study_id % 2 == 0), 3, seed=42)
    >>> folds["fold"].value_counts().tolist()
    [4, 4, 4]
    """
    images = images_train.sort_values("image_id").reset_index(drop=True)
    studies = images["study_id"].nunique()
    if (images["split"] != "train").any():
        raise DernetError(
            "Folds are made of training images only, but some are of the test split: pass "
            "images[images.split == 'train']."
        )
    if studies < n_folds or images["abnormal"].nunique() < 2:
        raise DernetError(
            f"{n_folds} stratified folds need at least {n_folds} studies, with normal and abnormal "
            f"images, but there are {studies} studies and {images['abnormal'].sum()} of "
            f"{len(images)} images are abnormal: take fewer folds or more data."
        )
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    folds = images[["image_id", "study_id"]].assign(fold=-1)
    with warnings.catch_warnings():
        # scikit-learn warns where a class has fewer images than there are folds; such a small
        # cohort is a test's, and its folds are still disjoint by study.
        warnings.filterwarnings("ignore", message="The least populated class")
        deal = splitter.split(images, images["abnormal"], images["study_id"])
        for fold, (_, held_out) in enumerate(deal):
            folds.loc[held_out, "fold"] = fold
    return folds


def load_folds(workspace: Workspace, images: pd.DataFrame) -> pd.DataFrame:
    """Return the run's folds, as `make_folds`; made and written on the first call only.

    Every chapter that trains reads this one file, so none can deal differently.

    Args:
        workspace: The run; the folds are kept in ``tables/folds.parquet``.
        images: Those of its `Dataset`.

    Raises:
        DernetError: The file is not about the training images.
    """
    train, profile = images[images["split"] == "train"], workspace.profile
    path = workspace.tables / "folds.parquet"
    if not path.exists():
        folds = make_folds(train, profile.folds, profile.seed)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        folds.to_parquet(partial, index=False)
        partial.replace(path)
    return _fitting_folds(path, train, profile.folds)


def _fitting_folds(path: Path, train: pd.DataFrame, n_folds: int) -> pd.DataFrame:
    try:
        folds = pd.read_parquet(path, columns=["image_id", "study_id", "fold"])
    except (OSError, ValueError) as error:
        raise DernetError(f"{path} is no table of folds ({error}): delete it.") from error
    pairs = train[["image_id", "study_id"]].sort_values("image_id").to_numpy().tolist()
    fits = folds[["image_id", "study_id"]].to_numpy().tolist() == pairs
    fits = fits and set(folds["fold"]) == set(range(n_folds))
    if not fits or (folds.groupby("study_id")["fold"].nunique() > 1).any():
        raise DernetError(
            f"{path} should deal the {len(train)} training images of this dataset by study into "
            f"{n_folds} folds, but it was written for other data or another number of folds: "
            "delete it, and what was trained with it, to start anew."
        )
    return folds

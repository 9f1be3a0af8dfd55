"""A dataset's fingerprint and problems; a copy without the two kinds that can be repaired."""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import joblib
import pandas as pd

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import (
    ANNOTATION_COLUMNS,
    CORNERS,
    LESION_TYPES,
    RARER_TYPES,
    SPLITS,
)
from dernet_utils.dataset.annotations import (
    EDGES,
    Contents,
    first_rows,
    image_path,
    read_contents,
    table_path,
)
from dernet_utils.dataset.problems import (
    Note,
    Problem,
    box_text,
    has_no_area,
    is_lesion,
    is_outside,
    sort_key,
)
from dernet_utils.imaging.decoder import Decoder
from dernet_utils.imaging.radiograph import read_bytes

# --- Check ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetReport:
    """What `check_dataset` found.

    Attributes:
        fingerprint: Per split, the counts and ranges that identify the dataset; JSON-ready.
        problems: Every problem, ordered by file and row.
        notes: What is unusual in the folder, such as files that are not used, but no problem.
    """

    fingerprint: dict
    problems: list[Problem]
    notes: list[Note]


def check_dataset(
    root: Path, progress: Callable[[Iterable], Iterable] = iter, workers: int = 1
) -> DatasetReport:
    """Describe a dataset and list all its problems, including those of the pixel data.

    A run's preparation accepts every dataset that passes here: both read headers by `read_contents`
    and decode images by `Decoder`.

    Args:
        root: A folder in the form of VinDr-SpineXR.
        progress: Wraps the loop over images, as ``tqdm`` does; decoding a large image takes up to
            a second.
        workers: Number of processes.

    Returns:
        The fingerprint, the problems and the notes.

    Raises:
        DernetError: The folder has neither table, so it is not a dataset.
    """
    root = Path(root)
    contents = read_contents(root)
    problems = list(contents.problems)
    readable = first_rows(contents.rows).merge(contents.headers[["image_id", "split"]])
    rows = list(readable.itertuples())
    files = [row.image for row in rows]
    with Decoder(workers) as decoder:
        refused = joblib.Parallel(n_jobs=workers, backend="threading", return_as="generator")(
            joblib.delayed(_refusal)(decoder, root / file) for file in files
        )
        for row, file, reason in zip(progress(rows), files, refused, strict=True):
            if reason:
                problems.append(Problem(row.file, row.row, f"{file} cannot be used: {reason}"))
    fingerprint = {split: _fingerprint(contents, split) for split in SPLITS}
    return DatasetReport(fingerprint, sorted(problems, key=sort_key), contents.notes)


def _refusal(decoder: Decoder, path: Path) -> str:
    """Return why an image cannot be read, or an empty string."""
    try:
        decoder.decode(read_bytes(path))
    except DernetError as error:
        return str(error)
    return ""


def _fingerprint(contents: Contents, split: str) -> dict:
    """Return a split's entry of `DatasetReport.fingerprint`."""
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
        # The most frequent class over the rarest one present; 46.9 in the paper.
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


# --- Repair -----------------------------------------------------------------------------------


def repair_dataset(root: Path, out: Path) -> list[str]:
    """Write a copy of a dataset in its standard form, without boxes of no area or outside.

    A box without area is dropped. A box that reaches outside its image is clipped to it, and
    dropped where no area remains. An image that loses all its boxes is left out of the copy: a
    radiologist marked it as abnormal, so "No finding" would be a false label, and without a box a
    detector cannot learn from it. You must solve every other problem by hand.

    Args:
        root: The dataset; nothing in it is changed.
        out: A folder that does not exist yet. It becomes a dataset of its own: cleaned tables,
            links to the images of `root`, and ``repairs.txt`` with the returned sentences. Use it
            instead of `root`, for example as ``DERNET_DATA``.

    Returns:
        One sentence per changed row, with file and row of the original.

    Raises:
        DernetError: `out` exists, `root` is not a dataset, or its tables lack a column or have
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
    """Write cleaned rows and what was done to them to the folder `out`, with links to images."""
    (out / "annotations").mkdir()
    for split in SPLITS:
        of_split = rows[rows["split"] == split]
        of_split[list(ANNOTATION_COLUMNS)].to_csv(
            out / table_path(split), index=False, lineterminator="\n"
        )
        (out / f"{split}_images").mkdir()
        for row in first_rows(of_split).itertuples():
            (out / image_path(split, row.image_id)).symlink_to((root / row.image).resolve())
    if (root / "manifest.json").is_file():
        shutil.copyfile(root / "manifest.json", out / "manifest.json")
    if (root / "twins").is_dir():
        (out / "twins").symlink_to((root / "twins").resolve())
    (out / "repairs.txt").write_text("".join(f"{line}\n" for line in done), encoding="utf-8")

"""A VinDr-SpineXR folder without problems as typed tables, and its manifest."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pandera.pandas as pa

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES, RARER_TYPES, SPLITS
from dernet_utils.dataset.annotations import EDGES, first_rows, read_contents
from dernet_utils.dataset.problems import HEX_ID, is_lesion


def _ids(*names: str) -> dict[str, pa.Column]:
    return {name: pa.Column(str, pa.Check.str_matches(f"^{HEX_ID}$")) for name in names}


IMAGES = pa.DataFrameSchema(
    {
        **_ids("image_id", "study_id", "series_id"),
        "split": pa.Column(str, pa.Check.isin(SPLITS)),
        "abnormal": pa.Column(bool),
        "boxes": pa.Column(int, pa.Check.ge(0)),
        "view": pa.Column(str),
        "height": pa.Column(int, pa.Check.gt(0)),
        "width": pa.Column(int, pa.Check.gt(0)),
        "dicom_path": pa.Column(str),
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


@dataclass(frozen=True)
class Dataset:
    """A clean dataset.

    Attributes:
        root: Its folder.
        images: One row per image, with the columns of `IMAGES`: `boxes` counts those of the image,
            `view` is the header's View Position (empty where it has none), `height` and `width`
            are those of the stored image (px), `dicom_path` is its file.
        boxes: One row per box, with the columns of `BOXES`; corners in stored pixels, origin top
            left.
        virtual: Whether the radiographs are virtual: its manifest says so. A dataset without a
            manifest is real.
    """

    root: Path
    images: pd.DataFrame
    boxes: pd.DataFrame
    virtual: bool


def read_dataset(root: Path) -> Dataset:
    """Read a dataset that has no problems.

    Args:
        root: A folder in the form of VinDr-SpineXR, or a copy that `repair_dataset` wrote.

    Returns:
        Images and boxes as typed tables, in the order of the CSV files, train before test.
        Rarer lesion types become "Other lesions".

    Raises:
        DernetError: The folder is not a dataset, or its tables or headers have a problem. Pixel
            data are not read here; `check_dataset` reads them. Or as `read_manifest` raises.
    """
    root = Path(root)
    manifest = read_manifest(root)
    contents = read_contents(root)
    if contents.problems:
        count = len(contents.problems)
        raise DernetError(
            f"A clean dataset was expected at {root}, but {contents.problems[0]}"
            f"{'' if count == 1 else f' (the first of {count} problems)'}: `dernet check {root}` "
            "lists all, and with `--repair OUT` writes OUT, a dataset without boxes that have no "
            "area or reach outside, to be used instead."
        )
    rows = contents.rows
    boxes = rows[is_lesion(rows)].reset_index(drop=True)
    boxes["lesion_type"] = boxes["lesion_type"].replace(dict.fromkeys(RARER_TYPES, "Other lesions"))
    boxes[list(CORNERS)] = boxes[list(EDGES)]
    images = first_rows(rows).reset_index(drop=True)
    images["boxes"] = images["image_id"].map(boxes["image_id"].value_counts()).fillna(0)
    images["abnormal"] = images["boxes"] > 0
    views = contents.headers[["image_id", "split", "view"]]
    images = images.merge(views, on=["image_id", "split"], validate="one_to_one")
    images["dicom_path"] = [str(root / image) for image in images["image"]]
    images = IMAGES.validate(images[list(IMAGES.columns)])
    boxes = BOXES.validate(boxes[list(BOXES.columns)])
    return Dataset(root, images, boxes, virtual=manifest is not None and manifest["virtual"])


def read_manifest(root: Path) -> dict | None:
    """Return a dataset's manifest, which a virtual cohort has and VinDr-SpineXR has not.

    Args:
        root: The dataset's folder.

    Returns:
        ``manifest.json``, in which ``virtual`` is true or false; None for a dataset without one.

    Raises:
        DernetError: ``manifest.json`` is there but is not JSON, or does not say whether the
            radiographs are virtual.
    """
    path = Path(root) / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DernetError(f"{path} should be JSON, but {error}: make the cohort again.") from error
    if not (isinstance(manifest, dict) and isinstance(manifest.get("virtual"), bool)):
        raise DernetError(
            f'{path} should be a JSON object with "virtual": true or false, but it is not: make '
            "the cohort again, or correct the file."
        )
    return manifest

"""The tables of images and boxes that a run's preparation writes once, with facts on the data.

Chapters and training read these, so that no DICOM file is read or checked twice.
"""

import json
from pathlib import Path

import pandas as pd

from dernet_utils.core.files import write_whole
from dernet_utils.core.workspace import Workspace


def write_tables(
    workspace: Workspace,
    images: pd.DataFrame,
    boxes: pd.DataFrame,
    faint: pd.DataFrame,
    virtual: bool,
) -> None:
    """Write a run's tables of images, boxes and faint findings, and ``dataset.json``.

    Paths are written relative to the dataset and the cache, so that a run's folder can be moved.

    Args:
        workspace: The run.
        images: As `read_images` returns it; `dicom_path` lies in the dataset, `cached_path` in the
            run's cache.
        boxes: As `read_boxes` returns it.
        faint: As `read_faint_boxes` returns it.
        virtual: Whether the radiographs are virtual; `Workspace.virtual` reads this.
    """
    root, cache = workspace.data_root, workspace.cache
    images = images.assign(
        dicom_path=[str(Path(path).relative_to(root)) for path in images["dicom_path"]],
        cached_path=[str(Path(path).relative_to(cache)) for path in images["cached_path"]],
    )
    for name, table in (("boxes", boxes), ("faint", faint), ("images", images)):
        path = workspace.tables / f"{name}.parquet"
        write_whole(path, lambda part, table=table: table.to_parquet(part, index=False))
    facts = json.dumps({"virtual": virtual})
    write_whole(workspace.dataset_facts, lambda part: part.write_text(facts, encoding="utf-8"))


def read_images(workspace: Workspace) -> pd.DataFrame:
    """Return a run's images as its preparation wrote them.

    Args:
        workspace: The run.

    Returns:
        One row per image, in the order of the CSV files, train before test: ``image_id``,
        ``study_id``, ``series_id``, ``split``, ``abnormal``, ``boxes`` (their number), ``view``
        (View Position of the header, empty where it has none), ``height`` and ``width`` of the
        stored image in pixels, ``dicom_path``, ``fold`` (Int64, missing for a test image),
        ``cached_path`` of the enhanced image, ``scale``, cached over stored pixels, and ``faint``,
        whether it is called normal because all its findings are too faint for a label, which only
        virtual radiographs tell.

    Raises:
        DernetError: The run has not been prepared.
    """
    images = _read_table(workspace, "images")
    root, cache = workspace.data_root, workspace.cache
    return images.assign(
        dicom_path=[str(root / path) for path in images["dicom_path"]],
        cached_path=[str(cache / path) for path in images["cached_path"]],
    )


def read_boxes(workspace: Workspace) -> pd.DataFrame:
    """Return a run's boxes as its preparation wrote them.

    Args:
        workspace: The run.

    Returns:
        One row per box, with the columns of `tables.BOXES`: ``image_id``, ``study_id``,
        ``series_id``, ``split``, ``rad_id``, ``lesion_type`` and the corners ``xmin``, ``ymin``,
        ``xmax``, ``ymax`` in stored pixels, origin top left.

    Raises:
        DernetError: The run has not been prepared.
    """
    return _read_table(workspace, "boxes")


def read_faint_boxes(workspace: Workspace) -> pd.DataFrame:
    """Return the boxes that a run's findings would have if they were not too faint for a label.

    Args:
        workspace: The run.

    Returns:
        `image_id`, `lesion_type` and corners in stored pixels; empty for real radiographs.

    Raises:
        DernetError: The run has not been prepared.
    """
    return _read_table(workspace, "faint")


def _read_table(workspace: Workspace, name: str) -> pd.DataFrame:
    path = workspace.tables / f"{name}.parquet"
    if not path.is_file():
        raise workspace.unprepared(path)
    return pd.read_parquet(path)

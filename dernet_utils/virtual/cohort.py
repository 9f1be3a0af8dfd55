"""The virtual cohort: many patients from one donor, written as a VinDr-SpineXR folder.

Two steps. A *plan* draws every patient's body, lesions and films from one seed, as plain
values. *Rendering* turns a patient's plan into DICOM files and rows of the tables; it depends
on that plan alone, so patients can be rendered in any order, by any number of workers, and a
run that was interrupted goes on where it stopped.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial as partial_of
from pathlib import Path

import cv2
import pandas as pd
import torch

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import ANNOTATION_COLUMNS, NO_FINDING, SPLITS
from dernet_utils.core.workspace import Workspace
from dernet_utils.virtual.anatomy import load_anatomy
from dernet_utils.virtual.counterfactual import write_counterfactuals
from dernet_utils.virtual.dicom_writer import write_dicom
from dernet_utils.virtual.plan import VERSION, plan_cohort
from dernet_utils.virtual.render import BOX_MARGIN_MM, find_box, render_radiograph

LEAST_VISIBILITY = (
    0.7  # least visibility of a labelled lesion, in standard deviations of its surroundings
)


def identify(*parts: object) -> str:
    """Return 32 hexadecimal digits that depend on the parts alone."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def write_cohort(
    out: Path,
    patients: int,
    seed: int = 42,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    ct: Path | None = None,
    mask: Path | None = None,
) -> dict:
    """Make a virtual cohort on disk, in the form of VinDr-SpineXR.

    Args:
        out: A folder that does not exist yet, or is empty. An interrupted call leaves
            ``<out>.partial``, and the next call with the same arguments goes on from there.
        patients: Number of virtual patients (studies), at least 20.
        seed: One seed gives the same bytes, whatever the number of workers.
        workers: Processes.
        progress: Called with the patients done and their number.
        ct, mask: Another donor and its TotalSegmentator labels, as `load_donor` takes them.

    Returns:
        The manifest, as ``manifest.json`` holds it.

    Raises:
        DernetError: The folder holds something, the donor is none or has fewer than
            `LEAST_BODIES` whole vertebrae, or too little room is left on the disk.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DernetError(f"{out} is not empty: name a new folder, or delete it first.")
    anatomy = load_anatomy(ct, mask)
    plans = plan_cohort(patients, seed, anatomy.bodies)
    partial = out.with_name(out.name + ".partial")
    _claim(partial, plans, anatomy.donor.digest)
    _check_room(partial, plans)
    todo = [plan for plan in plans if not _record(partial, plan).is_file()]
    done = patients - len(todo)
    with ProcessPoolExecutor(workers, initializer=_one_thread) as pool:
        try:
            render = partial_of(_render_patient, partial, ct=ct, mask=mask)
            for _ in pool.map(render, todo):
                done += 1
                if progress:
                    progress(done, patients)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for the rest
            raise
    manifest = _assemble(partial, plans, patients, seed, anatomy.donor.digest)
    if out.is_dir():
        out.rmdir()
    os.replace(partial, out)
    return manifest


def ensure_cohort(workspace: Workspace, progress: Callable[[int, int], None] | None = None) -> Path:
    """Return a run's dataset; make the virtual cohort where it is missing.

    For real data nothing is made. Raises DernetError as `write_cohort`.
    """
    root, profile = workspace.data_root, workspace.profile
    if profile.virtual and not (root / "manifest.json").is_file():
        root.parent.mkdir(parents=True, exist_ok=True)
        write_cohort(root, profile.patients, profile.seed, os.cpu_count() or 1, progress)
    return root


def _one_thread() -> None:
    """Keep a worker to one thread: the patients are what runs in parallel."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _check_room(partial: Path, plans: list[dict]) -> None:
    """Refuse to start what the disk cannot hold: two bytes a pixel, all told."""
    views = [view for plan in plans for view in plan["views"]]
    needed = sum(2 * v["height_mm"] * v["width_mm"] / v["spacing_mm"] ** 2 for v in views)
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise DernetError(
            f"The cohort needs about {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free on "
            f"the disk of {partial.parent}: make room, or take fewer patients."
        )


def _claim(partial: Path, plans: list[dict], donor: str) -> None:
    """Make the working folder, or check that it belongs to the same plan."""
    digest = hashlib.sha256(json.dumps([VERSION, donor, plans]).encode()).hexdigest()
    stamp = partial / "plan.sha256"
    if stamp.is_file() and stamp.read_text() != digest:
        shutil.rmtree(partial)
    for name in ("train_images", "test_images", "annotations", "twins", "records"):
        (partial / name).mkdir(parents=True, exist_ok=True)
    stamp.write_text(digest)


def _record(partial: Path, plan: dict) -> Path:
    return partial / "records" / f"{plan['patient']:05d}.json"


def _render_patient(
    partial: Path, plan: dict, ct: Path | None = None, mask: Path | None = None
) -> None:
    """Render a patient's films and write them; the record comes last and says it is done."""
    anatomy = load_anatomy(ct, mask)
    study = identify("dernet", VERSION, plan["seed"], plan["patient"])
    rows, films = [], []
    for number, drawn in enumerate(plan["views"]):
        film = render_radiograph(plan, number, anatomy)
        ids = {
            "study_id": study,
            "series_id": identify(study, "series", number),
            "image_id": identify(study, "image", number),
        }
        path = partial / f"{plan['split']}_images" / f"{ids['image_id']}.dicom"
        write_dicom(path, film.grey, plan, number, ids, film.mas)
        write_counterfactuals(partial / "twins" / f"{ids['image_id']}.npz", film.twins)
        seen = []
        for finding, twin in zip(plan["findings"], film.twins, strict=True):
            labelled = twin is not None and twin.visibility >= LEAST_VISIBILITY
            box = find_box(twin.mask, drawn["spacing_mm"]) if labelled else None
            visibility = None if twin is None else round(twin.visibility, 3)
            seen.append({"visibility": visibility, "box": box})
            if box:
                rows.append([*ids.values(), "rad1", finding["type"], *box])
        if not any(entry["box"] for entry in seen):
            rows.append([*ids.values(), "rad1", NO_FINDING, None, None, None, None])
        films.append(ids | {"view": drawn["name"], "findings": seen})
    record = _record(partial, plan)
    part = record.with_suffix(".part")
    part.write_text(json.dumps({"rows": rows, "films": films}))
    os.replace(part, record)


def _assemble(partial: Path, plans: list[dict], patients: int, seed: int, donor: str) -> dict:
    """Write the two tables and the manifest from the patients' records."""
    records = [json.loads(_record(partial, plan).read_text()) for plan in plans]
    for split in SPLITS:
        rows = [
            row
            for plan, record in zip(plans, records, strict=True)
            if plan["split"] == split
            for row in record["rows"]
        ]
        table = pd.DataFrame(rows, columns=list(ANNOTATION_COLUMNS))
        table.to_csv(partial / "annotations" / f"{split}.csv", index=False)
    manifest = {
        "virtual": True,
        "about": "Virtual radiographs computed from one donor CT; not patients.",
        "version": VERSION,
        "patients": patients,
        "seed": seed,
        "donor_sha256": donor,
        "box_margin_mm": BOX_MARGIN_MM,
        "least_visibility": LEAST_VISIBILITY,
        "studies": [
            plan | {"films": record["films"]} for plan, record in zip(plans, records, strict=True)
        ],
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(partial / "records")
    (partial / "plan.sha256").unlink()
    return manifest

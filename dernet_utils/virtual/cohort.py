"""The virtual cohort: many patients from one donor, written as a VinDr-SpineXR folder.

There are two steps. A *plan* draws every patient's body, lesions and views from a seed, as plain
values. *Rendering* turns a patient's plan into DICOM files and table rows. It depends on the donor
and that plan alone, so patients can be rendered in any order and by any number of workers, and an
interrupted run resumes where it stopped.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import cv2
import pandas as pd
import torch

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import write_whole
from dernet_utils.core.vocabulary import ANNOTATION_COLUMNS, NO_FINDING, SPLITS
from dernet_utils.core.workspace import Workspace
from dernet_utils.virtual.anatomy import load_anatomy
from dernet_utils.virtual.counterfactual import write_counterfactuals
from dernet_utils.virtual.dicom_writer import write_dicom
from dernet_utils.virtual.plan import VERSION, plan_cohort
from dernet_utils.virtual.render import BOX_MARGIN_MM, find_box, render_radiograph

LEAST_VISIBILITY = 0.7  # of a labelled lesion: contrast-to-noise ratio


def identify(*parts: object) -> str:
    """Return an identifier of 32 hexadecimal digits that depends only on the parts."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def write_cohort(
    out: Path,
    patients: int,
    seed: int = 42,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    ct: Path | None = None,
    mask: Path | None = None,
    test_seed: int | None = None,
    rendered: tuple[int, int] | None = None,
) -> dict:
    """Make a virtual cohort on disk, in the form of VinDr-SpineXR.

    Args:
        out: A folder that does not exist yet, or is empty. An interrupted call leaves
            ``<out>.partial``, from which the next call with the same arguments continues.
        patients: Number of virtual patients (studies); few of them may lack a split.
        seed: The same seed gives the same bytes, whatever the number of workers.
        workers: Number of processes.
        progress: Called with (finished patients, all patients) after each patient.
        ct, mask: Another donor and its TotalSegmentator labels, as `load_donor` takes them.
        test_seed: Another seed for the test patients, as `plan_cohort` takes it.
        rendered: How many training and test patients of the plan are made, the first ones of each
            split; None for all. A patient is the same however many others are made.

    Returns:
        The manifest, as ``manifest.json`` holds it.

    Raises:
        DernetError: The folder is not empty, the donor cannot be used (see `load_anatomy`), there
            is no patient, or the disk has too little space.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DernetError(f"{out} is not empty: name a new folder, or delete it first.")
    anatomy = load_anatomy(ct, mask)
    plans = plan_cohort(patients, seed, anatomy.bodies, test_seed)
    if rendered:
        of_split = [[plan for plan in plans if plan["split"] == split] for split in SPLITS]
        chosen = [own[:most] for own, most in zip(of_split, rendered, strict=True)]
        plans = sorted(chain(*chosen), key=lambda plan: plan["patient"])
    working = out.with_name(out.name + ".partial")
    _claim(working, plans, anatomy.donor.digest)
    _check_room(working, plans)
    todo = [plan for plan in plans if not _record(working, plan).is_file()]
    done = len(plans) - len(todo)
    with ProcessPoolExecutor(workers, initializer=_one_thread) as pool:
        try:
            render = partial(_render_patient, working, ct=ct, mask=mask)
            for _ in pool.map(render, todo):
                done += 1
                if progress:
                    progress(done, len(plans))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # on an error or Ctrl-C, do not wait for the rest
            raise
    seeds = {"seed": seed} | ({} if test_seed is None else {"test_seed": test_seed})
    manifest = _assemble(working, plans, patients, seeds, anatomy.donor.digest)
    if out.is_dir():
        out.rmdir()
    os.replace(working, out)
    return manifest


def ensure_cohort(workspace: Workspace, progress: Callable[[int, int], None] | None = None) -> Path:
    """Return the folder of a run's dataset; a virtual cohort is made where it is missing.

    Args:
        workspace: The run.
        progress: As `write_cohort` takes it.

    Raises:
        DernetError: As `write_cohort` raises.
    """
    root, profile = workspace.data_root, workspace.profile
    if profile.renders_cohort and not (root / "manifest.json").is_file():
        root.parent.mkdir(parents=True, exist_ok=True)
        workers = os.cpu_count() or 1
        write_cohort(
            root, profile.patients, profile.seed, workers, progress,
            test_seed=profile.test_seed, rendered=profile.rendered,
        )  # fmt: skip
    return root


def _one_thread() -> None:
    """Limit a worker to one thread: patients are rendered in parallel."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _check_room(working: Path, plans: list[dict]) -> None:
    """Raise DernetError if the disk cannot hold the cohort, at about two bytes per pixel."""
    views = [view for plan in plans for view in plan["views"]]
    needed = sum(2 * v["height_mm"] * v["width_mm"] / v["spacing_mm"] ** 2 for v in views)
    free = shutil.disk_usage(working).free
    if free < needed:
        raise DernetError(
            f"The cohort needs about {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free on "
            f"the disk of {working.parent}: make room, or take fewer patients."
        )


def _claim(working: Path, plans: list[dict], donor: str) -> None:
    """Make the working folder; empty it first if it belongs to another plan."""
    digest = hashlib.sha256(json.dumps([VERSION, donor, plans]).encode()).hexdigest()
    stamp = working / "plan.sha256"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") != digest:
        shutil.rmtree(working)
    for name in ("train_images", "test_images", "annotations", "twins", "records"):
        (working / name).mkdir(parents=True, exist_ok=True)
    stamp.write_text(digest, encoding="utf-8")


def _record(working: Path, plan: dict) -> Path:
    return working / "records" / f"{plan['patient']:05d}.json"


def _render_patient(
    working: Path, plan: dict, ct: Path | None = None, mask: Path | None = None
) -> None:
    """Render and write a patient's radiographs; the record, written last, marks them as done."""
    anatomy = load_anatomy(ct, mask)
    study = identify("dernet", VERSION, plan["seed"], plan["patient"])
    rows, images = [], []
    for number, drawn in enumerate(plan["views"]):
        rendered = render_radiograph(plan, number, anatomy)
        ids = {
            "study_id": study,
            "series_id": identify(study, "series", number),
            "image_id": identify(study, "image", number),
        }
        path = working / f"{plan['split']}_images" / f"{ids['image_id']}.dicom"
        write_dicom(path, rendered.grey, plan, number, ids, rendered.mas)
        write_counterfactuals(
            working / "twins" / f"{ids['image_id']}.npz", rendered.counterfactuals
        )
        seen = []
        for finding, other in zip(plan["findings"], rendered.counterfactuals, strict=True):
            labelled = other is not None and other.visibility >= LEAST_VISIBILITY
            box = find_box(other.mask, drawn["spacing_mm"]) if labelled else None
            visibility = None if other is None else round(other.visibility, 3)
            seen.append({"visibility": visibility, "box": box})
            if box:
                rows.append([*ids.values(), "rad1", finding["type"], *box])
        if not any(entry["box"] for entry in seen):
            rows.append([*ids.values(), "rad1", NO_FINDING, None, None, None, None])
        images.append(ids | {"view": drawn["name"], "findings": seen})
    record = json.dumps({"rows": rows, "films": images})
    write_whole(_record(working, plan), lambda part: part.write_text(record, encoding="utf-8"))


def _assemble(
    working: Path, plans: list[dict], patients: int, seeds: dict[str, int], donor: str
) -> dict:
    """Write the two tables and the manifest from the patients' records; return the manifest."""
    records = [json.loads(_record(working, plan).read_text(encoding="utf-8")) for plan in plans]
    for split in SPLITS:
        rows = [
            row
            for plan, record in zip(plans, records, strict=True)
            if plan["split"] == split
            for row in record["rows"]
        ]
        table = pd.DataFrame(rows, columns=list(ANNOTATION_COLUMNS))
        table.to_csv(working / "annotations" / f"{split}.csv", index=False)
    manifest = {
        "virtual": True,
        "about": "Virtual radiographs computed from one donor CT; not patients.",
        "version": VERSION,
        "patients": patients,
        **seeds,
        "donor_sha256": donor,
        "box_margin_mm": BOX_MARGIN_MM,
        "least_visibility": LEAST_VISIBILITY,
        "studies": [
            plan | {"films": record["films"]} for plan, record in zip(plans, records, strict=True)
        ],
    }
    (working / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shutil.rmtree(working / "records")
    (working / "plan.sha256").unlink()
    return manifest

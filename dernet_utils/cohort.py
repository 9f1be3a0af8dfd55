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
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch

from dernet_utils import lesions as make
from dernet_utils.anatomy import Disc, Vertebra, find_discs, find_vertebrae
from dernet_utils.dicom import SYNTAXES, write_dicom
from dernet_utils.donor import Donor, load_donor
from dernet_utils.errors import DernetError
from dernet_utils.films import (
    GRID_MM,
    Block,
    Paths,
    Scene,
    Shape,
    View,
    develop,
    expose,
    transmission,
)
from dernet_utils.folder import COLUMNS, NO_FINDING, SPLITS
from dernet_utils.lesions import Lesion
from dernet_utils.workspace import Workspace

VERSION = 1  # of the cohort's recipe; a change makes old cohorts stale

ABNORMAL = 0.54  # of patients; about half of the images then show a finding, as in the dataset
TEST = 0.20  # of patients: 1,000 of the dataset's 5,000 studies
# Share of patients who carry a type, chosen so that boxes a class follow the dataset's training
# split (book/data_card.md); osteophytes are in nine of ten abnormal patients.
CARRIERS = {
    "Vertebral collapse": 0.100,
    "Other lesions": 0.045,
    "Spondylolysthesis": 0.070,
    "Surgical implant": 0.055,
    "Foraminal stenosis": 0.100,
    "Disc space narrowing": 0.110,
}
SPURS = 0.90  # of abnormal patients
FIELD_MARGIN_MM = 12.0  # rendered beyond the collimated field, for the film's rotation
BOX_MARGIN_MM = 1.5  # annotators draw a little outside the lesion's edge
SEEN = 0.5  # least contrast of a labelled lesion, in standard deviations of its surroundings
PART_ON_FILM = 0.5  # least share of a lesion's shadow inside the collimated field


class Anatomy(NamedTuple):
    """The donor with its landmarks, vertebrae and discs from below."""

    donor: Donor
    bodies: list[Vertebra]
    discs: list[Disc]


class Film(NamedTuple):
    """A rendered film.

    Attributes:
        grey: 0 black to 1 white, shape (H, W).
        twins: For each finding of the plan, the contrast in its shadow and the shadow itself,
            bool (H, W); None where it is off the film.
    """

    grey: np.ndarray
    twins: list[tuple[float, np.ndarray] | None]


# ---------------------------------------------------------------- the plan


def plan_cohort(patients: int, seed: int, bodies: list[Vertebra]) -> list[dict]:
    """Draw a cohort's patients: plain values, one dictionary each.

    Args:
        patients: How many, at least 20, so that each lesion type is in both splits.
        seed: One seed, one cohort.
        bodies: The donor's vertebrae, from the lowest up.

    Raises:
        DernetError: Fewer than 20 patients.
    """
    if patients < 20:
        raise DernetError(f"A virtual cohort has at least 20 patients, not {patients}.")
    rng = np.random.default_rng([seed, VERSION])
    abnormal = rng.permutation(patients)[: round(ABNORMAL * patients)]
    carried: dict[int, list[str]] = {int(p): [] for p in abnormal}
    test: set[int] = set()
    train: set[int] = set()
    # The rarest first: at least one carrier of each type in either split.
    for lesion_type, share in CARRIERS.items():
        carriers = rng.choice(abnormal, max(2, round(share * patients)), replace=False)
        wanted = max(1, round(TEST * len(carriers)))
        for patient in map(int, carriers):
            carried[patient].append(lesion_type)
            here = sum(int(p) in test for p in carriers)
            if patient not in train and patient not in test:
                (test if here < wanted else train).add(patient)
    rest = [int(p) for p in rng.permutation(patients) if int(p) not in test | train]
    for group in (set(carried), set(range(patients)) - set(carried)):
        missing = round(TEST * len(group)) - len(test & group)
        test.update([p for p in rest if p in group][: max(0, missing)])
    plans = []
    for patient in range(patients):
        own = np.random.default_rng([seed, VERSION, patient])
        split = "test" if patient in test else "train"
        types = carried.get(patient)
        plans.append(_plan_patient(patient, seed, split, types, bodies, own))
    return plans


def _plan_patient(
    patient: int,
    seed: int,
    split: str,
    types: list[str] | None,
    bodies: list[Vertebra],
    rng: np.random.Generator,
) -> dict:
    """Draw one patient; `types` is None for a healthy one."""
    age = int(
        rng.integers(22, 50) if types is None and rng.random() < 0.5 else rng.integers(35, 89)
    )
    height_mm = float(rng.uniform(140.0, 195.0))
    lowest = 5.0 + 0.61 * (height_mm + FIELD_MARGIN_MM)
    aim_z = float(rng.uniform(lowest, max(lowest + 8.0, 185.0)))
    shape = {
        "stature": _normal(rng, 1.0, 0.04, 0.9, 1.1),
        "scoliosis_mm": float(
            rng.normal(0.0, 3.0) if rng.random() < 0.8 else rng.normal(0.0, 10.0)
        ),
        "scoliosis_phase": float(rng.uniform(0.0, 6.28)),
        "kyphosis_mm": float(rng.normal(0.0, 5.0)),
        "girth": _normal(rng, 1.0, 0.10, 0.8, 1.25),
        "bone": _normal(rng, 1.9 - 0.014 * (age - 22), 0.15, 0.7, 2.2),
        "proportions": [float(v) for v in rng.normal(1.0, 0.04, 2 * len(bodies))],
    }
    views = [_plan_view(name, height_mm, aim_z, rng) for name in ("LATERAL", "AP")]
    if rng.random() < 0.1:
        views.pop(int(rng.integers(2)))
    findings = [] if types is None else _plan_findings(types, height_mm, aim_z, bodies, rng)
    return {
        "patient": patient,
        "seed": seed,
        "split": split,
        "age": age,
        "sex": str(rng.choice(["F", "M"])),
        "shape": shape,
        "views": views,
        "findings": findings,
    }


def _normal(rng: np.random.Generator, mean: float, sd: float, low: float, high: float) -> float:
    """Draw from a normal distribution, limited to a range."""
    return float(np.clip(rng.normal(mean, sd), low, high))


def _plan_view(name: str, height_mm: float, aim_z: float, rng: np.random.Generator) -> dict:
    """Draw how one film is taken, processed and stored."""
    return {
        "name": name,
        "turn_deg": float(rng.normal(0.0, 3.0)),
        "tilt_deg": _normal(rng, 0.0, 1.2, -3.0, 3.0),
        "height_mm": height_mm,
        "width_mm": float(rng.uniform(0.58, 0.80) * height_mm),
        "aim_z_mm": aim_z + _normal(rng, 0.0, 3.0, -5.0, 5.0),
        "aside_mm": float(rng.normal(8.0 if name == "LATERAL" else 0.0, 4.0)),
        "mirrored": bool(name == "LATERAL" and rng.random() < 0.3),
        "spacing_mm": float(rng.uniform(0.24, 0.36)),
        "photons": float(np.exp(rng.uniform(np.log(2000.0), np.log(12000.0)))),
        "scatter": float(rng.uniform(0.10, 0.30)),
        "contrast": float(rng.uniform(0.7, 1.1)),
        "detail": float(rng.uniform(1.4, 2.4)),
        "marker": bool(rng.random() < 0.6),
        "photometric": str(rng.choice(["MONOCHROME2", "MONOCHROME1"], p=[0.75, 0.25])),
        "bits": int(rng.choice([10, 12, 14])),
        "syntax": str(rng.choice(list(SYNTAXES))),
        "voi": str(rng.choice(["window", "none", "lut"], p=[0.55, 0.25, 0.20])),
    }


def _plan_findings(
    types: list[str],
    height_mm: float,
    aim_z: float,
    bodies: list[Vertebra],
    rng: np.random.Generator,
) -> list[dict]:
    """Draw an abnormal patient's findings, at levels inside the field."""
    half = height_mm / 2 - 12.0
    inside = [i for i, body in enumerate(bodies) if abs(body.centre_mm[2] - aim_z) < half]
    discs = inside[:-1]  # disc i lies above body i
    findings: list[dict] = []

    def add(lesion_type: str, form: str, level: int, **more) -> None:
        severity = float(rng.beta(2.0, 2.2))
        findings.append(
            {"type": lesion_type, "form": form, "level": level, "severity": severity} | more
        )

    if "Surgical implant" in types:
        form = str(rng.choice(["screws", "plate", "cement"], p=[0.7, 0.15, 0.15]))
        count = 1 if form == "cement" else int(rng.integers(2, min(4, len(inside)) + 1))
        start = int(rng.integers(0, len(inside) - count + 1))
        add("Surgical implant", form, inside[start], count=count)
    if "Vertebral collapse" in types:
        form = str(rng.choice(["wedge", "biconcave", "crush"], p=[0.5, 0.3, 0.2]))
        add("Vertebral collapse", form, int(rng.choice(inside)))
    if "Spondylolysthesis" in types:
        add("Spondylolysthesis", "slip", int(rng.choice(discs)))
    narrowed = []
    if "Disc space narrowing" in types:
        narrowed = sorted(map(int, rng.choice(discs, int(rng.integers(1, 3)), replace=False)))
        for level in narrowed:
            add("Disc space narrowing", "narrowed", level)
    if "Foraminal stenosis" in types:
        add("Foraminal stenosis", "bony", int(rng.choice(narrowed or discs)))
    if "Other lesions" in types:
        form = str(rng.choice(["sclerotic", "lytic", "mixed"]))
        place = [float(v) for v in rng.uniform(-0.8, 0.8, 3)]
        add("Other lesions", form, int(rng.choice(inside)), place=place)
    if rng.random() < SPURS or not findings:
        # Spurs flank narrowed discs first, then their neighbours.
        count = min(len(discs), int(rng.integers(2, 5)))
        others = [int(d) for d in rng.permutation(discs) if int(d) not in narrowed]
        for level in (narrowed + others)[:count]:
            for upper in (False, True):
                for angle in (0.0, 1.45, -1.45):
                    if rng.random() < 0.30:
                        form = str(
                            rng.choice(["claw", "traction", "bridging"], p=[0.6, 0.32, 0.08])
                        )
                        turned = angle + float(rng.normal(0.0, 0.25))
                        add("Osteophytes", form, level, upper=upper, angle=turned)
        if not findings:
            add("Osteophytes", "claw", int(rng.choice(discs)), upper=True, angle=0.0)
    return findings


# ---------------------------------------------------------------- rendering


def build_shape(plan: dict, bodies: list[Vertebra]) -> Shape:
    """Turn a patient's drawn numbers into the tables that `films` reads."""
    drawn = plan["shape"]
    edges = [(b.point(up=-1.0)[2], b.point(up=1.0)[2]) for b in bodies]
    knots = np.maximum.accumulate(np.array(edges).ravel())
    knots = np.concatenate([[-120.0], knots, [knots[-1] + 60.0, 520.0]])
    factors = np.concatenate([[1.0], np.repeat(1.0, len(knots) - 2)])
    factors[1 : len(knots) - 2] = drawn["proportions"][: len(knots) - 3]
    z = np.linspace(knots[0], knots[-1], 321)
    stretch = (
        drawn["stature"] * factors[np.clip(np.searchsorted(knots, z) - 1, 0, len(factors) - 1)]
    )
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
    stretch = np.convolve(np.pad(stretch, 6, "edge"), kernel / kernel.sum(), "valid")
    # Integrated from the scan's lower end, which stays in place.
    patient = np.concatenate([[0.0], np.cumsum((stretch[1:] + stretch[:-1]) / 2 * np.diff(z))])
    patient -= np.interp(0.0, z, patient)
    wave = np.sin(2 * np.pi * z / 300.0 + drawn["scoliosis_phase"])
    bow = np.sin(np.pi * z / 330.0)
    return Shape(
        z_patient_mm=patient,
        z_donor_mm=z,
        shift_x_mm=drawn["scoliosis_mm"] * wave,
        shift_y_mm=-drawn["kyphosis_mm"] * bow,
        turn_rad=np.deg2rad(0.6 * drawn["scoliosis_mm"] * wave),
        girth=drawn["girth"],
        bone=drawn["bone"],
    )


def build_finding(finding: dict, bodies: list[Vertebra], discs: list[Disc]) -> list[Lesion]:
    """Turn a planned finding into the lesions that make it up."""
    level, severity, form = finding["level"], finding["severity"], finding["form"]
    match finding["type"]:
        case "Disc space narrowing":
            return make.disc_space_narrowing(discs[level], severity)
        case "Vertebral collapse":
            return make.vertebral_collapse(bodies[level], severity, form)
        case "Spondylolysthesis":
            return make.spondylolisthesis(discs[level], severity)
        case "Foraminal stenosis":
            return make.foraminal_stenosis(discs[level], severity)
        case "Other lesions":
            return make.other_lesion(bodies[level], severity, form, np.array(finding["place"]))
        case "Surgical implant":
            return make.implant(bodies[level : level + finding["count"]], form)
        case _:
            return make.osteophyte(discs[level], severity, form, finding["upper"], finding["angle"])


def render_film(plan: dict, number: int, anatomy: Anatomy) -> Film:
    """Render one film of a patient, and each finding's twin without it.

    Args:
        plan: The patient's plan.
        number: Which of its views.
        anatomy: The donor.
    """
    drawn = plan["views"][number]
    rng = np.random.default_rng([plan["seed"], VERSION, plan["patient"], 1 + number])
    shape = build_shape(plan, anatomy.bodies)
    groups = [build_finding(f, anatomy.bodies, anatomy.discs) for f in plan["findings"]]
    everything = [lesion for group in groups for lesion in group]
    scene = Scene(anatomy.donor, anatomy.bodies, shape, everything)
    view = _view(drawn, anatomy.bodies)
    paths = scene.paths(view, everything)
    size = [drawn[side] / drawn["spacing_mm"] for side in ("height_mm", "width_mm")]
    frame = _Frame(drawn, (round(size[0]), round(size[1])))
    arrived = transmission(Paths(*(np.maximum(frame.place(p), 0.0) for p in vars(paths).values())))
    signal = expose(arrived, drawn["spacing_mm"], drawn["photons"], drawn["scatter"], rng)
    grey = develop(signal, drawn["spacing_mm"], drawn["contrast"], drawn["detail"])
    if drawn["marker"]:
        _put_marker(grey, "L" if drawn["name"] == "LATERAL" or not drawn["mirrored"] else "R", rng)
    twins = []
    dense = -np.log(transmission(paths))
    for group, block in zip(groups, scene.blocks(view, [g[0] for g in groups]), strict=True):
        twins.append(_twin(scene, view, group, everything, block, paths, dense, frame))
    return Film(grey, twins)


class _Frame:
    """From the grid of rays to the film's pixels: enlarge, rotate, mirror, collimate."""

    def __init__(self, drawn: dict, size: tuple[int, int]):
        self.drawn, self.size = drawn, size

    def place(self, rays: np.ndarray) -> np.ndarray:
        """Return what a film's pixels see of a picture on the grid of rays."""
        scale = self.drawn["spacing_mm"] / GRID_MM
        tilt = np.deg2rad(self.drawn["tilt_deg"])
        turn = scale * np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        if self.drawn["mirrored"]:
            turn[:, 0] *= -1.0
        middle = (np.array(rays.shape[::-1]) - 1) / 2
        offset = middle - turn @ ((np.array(self.size[::-1]) - 1) / 2)
        matrix = np.column_stack([turn, offset])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(
            rays.astype(np.float32), matrix, self.size[::-1], flags=flags,
            borderMode=cv2.BORDER_REPLICATE,
        )  # fmt: skip


def _view(drawn: dict, bodies: list[Vertebra]) -> View:
    """Return the geometry of a planned view."""
    axis = np.array([body.centre_mm for body in bodies])
    x, y = (np.interp(drawn["aim_z_mm"], axis[:, 2], axis[:, i]) for i in (0, 1))
    lateral = drawn["name"] == "LATERAL"
    aim = np.array([x, y, drawn["aim_z_mm"]])
    aim[1 if lateral else 0] += drawn["aside_mm"]
    angle = np.deg2rad((90.0 if lateral else 0.0) + drawn["turn_deg"])
    sides = (drawn[side] + FIELD_MARGIN_MM for side in ("height_mm", "width_mm"))
    return View(drawn["name"], angle, aim, *sides, drawn["tilt_deg"], drawn["mirrored"])


def _twin(
    scene: Scene,
    view: View,
    group: list[Lesion],
    everything: list[Lesion],
    block: Block | None,
    paths: Paths,
    dense: np.ndarray,
    frame: _Frame,
) -> tuple[float, np.ndarray] | None:
    """Compare a film with its twin without one finding.

    Returns:
        The contrast: the difference in the shadow (95th percentile) over the standard deviation of
        what surrounds it, both of the logarithm of the signal; and the shadow on the film.
    """
    if block is None:
        return None
    region = scene.occupancy(view, group[0], everything, block)
    where = np.s_[block.rows[0] : block.rows[1], block.columns[0] : block.columns[1]]
    shadow = np.zeros_like(dense)
    shadow[where] = region
    solid = shadow > max(0.8, 0.15 * shadow.max())
    if not solid.any():
        return None
    if group[0].metal:
        contrast = np.inf
    else:
        twins = scene.twins(view, everything, group, block)
        before, here, there = (vars(p) for p in (paths, *twins))
        changed = Paths(*(np.maximum(before[k][where] - here[k] + there[k], 0.0) for k in before))
        twin = -np.log(transmission(changed))
        difference = np.percentile(np.abs(dense[where] - twin)[solid[where]], 95)
        around = cv2.dilate(solid.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
        ring = around[where] & ~solid[where]
        contrast = float(difference / max(twin[ring].std() if ring.any() else 1.0, 0.02))
    on_film = frame.place(np.where(solid, np.float32(1.0), np.float32(0.0))) > 0.5
    share = on_film.sum() * (frame.drawn["spacing_mm"] / GRID_MM) ** 2 / solid.sum()
    return (contrast, on_film) if share >= PART_ON_FILM else None


def find_box(shadow: np.ndarray, spacing_mm: float) -> tuple[float, float, float, float]:
    """Return the box that an annotator would draw round a shadow, (xmin, ymin, xmax, ymax) px."""
    rows, columns = (np.flatnonzero(shadow.any(axis=a)) for a in (1, 0))
    margin = BOX_MARGIN_MM / spacing_mm
    height, width = shadow.shape
    xmin, ymin = max(columns[0] - margin, 0.0), max(rows[0] - margin, 0.0)
    xmax, ymax = min(columns[-1] + 1 + margin, width), min(rows[-1] + 1 + margin, height)
    return tuple(round(float(v), 2) for v in (xmin, ymin, xmax, ymax))


def _put_marker(grey: np.ndarray, letter: str, rng: np.random.Generator) -> None:
    """Lay a lead letter on the film, in a lower or upper corner."""
    size = grey.shape[0] / 420.0
    row = int(grey.shape[0] * (0.08 if rng.random() < 0.5 else 0.96))
    column = int(grey.shape[1] * (0.05 if rng.random() < 0.5 else 0.88))
    lead = np.zeros(grey.shape, np.float32)
    cv2.putText(lead, letter, (column, row), cv2.FONT_HERSHEY_SIMPLEX, size, 1.0, 2, cv2.LINE_AA)
    grey += (0.97 - grey) * cv2.GaussianBlur(lead, (0, 0), 0.8)


# ---------------------------------------------------------------- the folder


def identify(*parts: object) -> str:
    """Return 32 hexadecimal digits that depend on the parts alone."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def write_cohort(
    out: Path,
    patients: int,
    seed: int = 42,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Make a virtual cohort on disk, in the form of VinDr-SpineXR.

    Args:
        out: A folder that does not exist yet, or is empty. An interrupted call leaves
            ``<out>.partial``, and the next call with the same arguments goes on from there.
        patients: Number of virtual patients (studies), at least 20.
        seed: One seed gives the same bytes, whatever the number of workers.
        workers: Processes.
        progress: Called with the patients done and their number.

    Returns:
        The manifest, as ``manifest.json`` holds it.

    Raises:
        DernetError: The folder holds something, or there is no donor.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DernetError(f"{out} is not empty: name a new folder, or delete it first.")
    anatomy = _anatomy()
    plans = plan_cohort(patients, seed, anatomy.bodies)
    partial = out.with_name(out.name + ".partial")
    _claim(partial, plans)
    todo = [plan for plan in plans if not _record(partial, plan).is_file()]
    done = patients - len(todo)
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for _ in pool.map(_render_patient, [partial] * len(todo), todo):
                done += 1
                if progress:
                    progress(done, patients)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for the rest
            raise
    manifest = _assemble(partial, plans, patients, seed)
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


@cache
def _anatomy() -> Anatomy:
    """Load the donor and its landmarks, once a process."""
    donor = load_donor()
    bodies = find_vertebrae(donor)
    return Anatomy(donor, bodies, find_discs(bodies))


def _claim(partial: Path, plans: list[dict]) -> None:
    """Make the working folder, or check that it belongs to the same plan."""
    digest = hashlib.sha256(json.dumps([VERSION, plans]).encode()).hexdigest()
    stamp = partial / "plan.sha256"
    if stamp.is_file() and stamp.read_text() != digest:
        shutil.rmtree(partial)
    for name in ("train_images", "test_images", "annotations", "records"):
        (partial / name).mkdir(parents=True, exist_ok=True)
    stamp.write_text(digest)


def _record(partial: Path, plan: dict) -> Path:
    return partial / "records" / f"{plan['patient']:05d}.json"


def _render_patient(partial: Path, plan: dict) -> None:
    """Render a patient's films and write them; the record comes last and says it is done."""
    anatomy = _anatomy()
    study = identify("dernet", VERSION, plan["seed"], plan["patient"])
    rows, films = [], []
    for number, drawn in enumerate(plan["views"]):
        film = render_film(plan, number, anatomy)
        ids = {
            "study_id": study,
            "series_id": identify(study, "series", number),
            "image_id": identify(study, "image", number),
        }
        path = partial / f"{plan['split']}_images" / f"{ids['image_id']}.dicom"
        write_dicom(path, film.grey, plan, number, ids)
        seen = []
        for finding, twin in zip(plan["findings"], film.twins, strict=True):
            labelled = twin is not None and twin[0] >= SEEN
            box = find_box(twin[1], drawn["spacing_mm"]) if labelled else None
            contrast = None if twin is None else round(min(twin[0], 999.0), 3)
            seen.append({"contrast": contrast, "box": box})
            if box:
                rows.append([*ids.values(), "rad1", finding["type"], *box])
        if not any(entry["box"] for entry in seen):
            rows.append([*ids.values(), "rad1", NO_FINDING, None, None, None, None])
        films.append(ids | {"view": drawn["name"], "findings": seen})
    record = _record(partial, plan)
    part = record.with_suffix(".part")
    part.write_text(json.dumps({"rows": rows, "films": films}))
    os.replace(part, record)


def _assemble(partial: Path, plans: list[dict], patients: int, seed: int) -> dict:
    """Write the two tables and the manifest from the patients' records."""
    records = [json.loads(_record(partial, plan).read_text()) for plan in plans]
    for split in SPLITS:
        rows = [
            row
            for plan, record in zip(plans, records, strict=True)
            if plan["split"] == split
            for row in record["rows"]
        ]
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        table.to_csv(partial / "annotations" / f"{split}.csv", index=False)
    manifest = {
        "virtual": True,
        "about": "Virtual radiographs computed from one donor CT; not patients.",
        "version": VERSION,
        "patients": patients,
        "seed": seed,
        "box_margin_mm": BOX_MARGIN_MM,
        "least_contrast": SEEN,
        "studies": [
            plan | {"films": record["films"]} for plan, record in zip(plans, records, strict=True)
        ],
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(partial / "records")
    (partial / "plan.sha256").unlink()
    return manifest

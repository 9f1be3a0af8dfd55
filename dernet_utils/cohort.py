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
from functools import partial as partial_of
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
    Development,
    Paths,
    Scene,
    Shape,
    View,
    expose,
    scattered,
    transmission,
)
from dernet_utils.folder import COLUMNS, NO_FINDING, SPLITS
from dernet_utils.lesions import Lesion
from dernet_utils.truth import Twin, write_twins
from dernet_utils.workspace import Workspace

VERSION = 2  # of the cohort's recipe; a change makes old cohorts stale

ABNORMAL = 0.52  # of patients; about half of the images then show a finding, as in the dataset
TEST = 0.20  # of patients: 1,000 of the dataset's 5,000 studies
# Share of patients who carry a type, chosen so that labelled boxes a class follow the dataset's
# training split (book/data_card.md); osteophytes are in nine of ten abnormal patients.
CARRIERS = {
    "Vertebral collapse": 0.046,
    "Other lesions": 0.056,
    "Spondylolysthesis": 0.055,
    "Surgical implant": 0.053,
    "Foraminal stenosis": 0.120,
    "Disc space narrowing": 0.155,
}
SPURS = 0.90  # of abnormal patients
# Severity runs from the least that a reader would report to the worst. The least: a fifth of the
# height for a collapse (Genant), a tenth of the depth for a slip, and what can be seen for others.
LEAST = {
    "Vertebral collapse": 0.42,
    "Other lesions": 0.35,
    "Spondylolysthesis": 0.20,
    "Foraminal stenosis": 0.40,
    "Disc space narrowing": 0.35,
    "Osteophytes": 0.12,
}
# How many images a study has, as in the dataset 2.1 in the mean, and from which sides.
STUDIES = {
    ("LATERAL",): 0.09,
    ("AP",): 0.09,
    ("LATERAL", "AP"): 0.64,
    ("LATERAL", "AP", "LPO"): 0.05,
    ("LATERAL", "AP", "RPO"): 0.05,
    ("LATERAL", "AP", "LPO", "RPO"): 0.08,
}
ANGLES = {"AP": 0.0, "LATERAL": 90.0, "LPO": 45.0, "RPO": -45.0}
FIELD_MARGIN_MM = 12.0  # rendered beyond the collimated field, for the film's rotation
BOX_MARGIN_MM = 1.5  # annotators draw a little outside the lesion's edge
SEEN = 1.1  # least visibility of a labelled lesion, in standard deviations of its surroundings
PART_ON_FILM = 0.5  # least share of a lesion's shadow inside the collimated field
LUMBAR_MM = 150.0  # from L1 to L5, over which a lordosis is spread
TURN = 0.35  # axial rotation to lateral curvature in a scoliosis: ours, after Nash and Moe's grades
SHOULDERS_MM = 100.0  # a field's middle lies as far below the highest vertebra but one, or more
LEAST_BODIES = 6  # of a donor
AIR_UGY = 30.0  # behind the table and grid, for 1 mAs at 80 kVp and nobody in the beam


class Anatomy(NamedTuple):
    """The donor with its landmarks, vertebrae and discs from below."""

    donor: Donor
    bodies: list[Vertebra]
    discs: list[Disc]


class Film(NamedTuple):
    """A rendered film.

    Attributes:
        grey: 0 black to 1 white, shape (H, W).
        mas: Tube current times exposure time that automatic exposure control took, mAs.
        twins: For each finding of the plan, its twin; None where it is off the film.
    """

    grey: np.ndarray
    mas: float
    twins: list[Twin | None]


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
    age, sex = int(rng.integers(25, 86)), str(rng.choice(["F", "M"]))
    height_mm = float(rng.uniform(160.0, 225.0))
    # The cone's lower edge stays in the scan, the shoulders stay out of the field.
    lowest = 5.0 + 0.61 * (height_mm + FIELD_MARGIN_MM)
    highest = bodies[-2].centre_mm[2] - SHOULDERS_MM
    aim_z = float(rng.uniform(lowest, max(lowest + 8.0, highest)))
    shape = _plan_shape(age, sex, len(bodies), rng)
    names = list(STUDIES)[int(rng.choice(len(STUDIES), p=list(STUDIES.values())))]
    views = [_plan_view(name, height_mm, aim_z, rng) for name in names]
    findings = [] if types is None else _plan_findings(types, height_mm, aim_z, bodies, rng)
    return {
        "patient": patient,
        "seed": seed,
        "split": split,
        "age": age,
        "sex": sex,
        "shape": shape,
        "views": views,
        "findings": findings,
    }


def _plan_shape(age: int, sex: str, bodies: int, rng: np.random.Generator) -> dict:
    """Draw a body; whether it has a lesion plays no part (sources: book/data_card.md)."""
    # Adults differ by 4 % in stature, women and men by 7 (NCD-RisC, eLife 2016).
    stature = _normal(rng, 1.035 if sex == "M" else 0.965, 0.04, 0.87, 1.13)
    # Curves beyond 10 degrees: 8.85 % of adults (Kebaish, Spine 2011); most of them are mild.
    curved = rng.random() < 0.0885
    cobb = 10.0 + rng.exponential(7.0) if curved else abs(rng.normal(0.0, 4.0))
    return {
        "stature": stature,
        "cobb_deg": float(min(cobb, 35.0) * rng.choice([-1.0, 1.0])),
        "curve_phase": float(rng.uniform(0.0, 2 * np.pi)),
        "curve_mm": float(rng.uniform(240.0, 340.0)),
        # Of the thorax, 27 degrees at 25 years, 41 at 75 (Fon, Am J Roentgenol 1980).
        "kyphosis_deg": _normal(rng, 27.0 + 0.28 * (age - 25), 8.0, 12.0, 58.0),
        # Beside the donor's own; between L1 and L5 it varies by 11 degrees (Vialle, JBJS 2005).
        "lordosis_deg": _normal(rng, 0.0, 11.0, -22.0, 22.0),
        "girth": _normal(rng, 1.0, 0.12, 0.78, 1.28),
        # Spongy bone loses 1.4 % of its value at 50 a year (Jang, Radiology 2019); half of a
        # vertebra's mineral is in its cortex, which keeps more.
        "bone": _normal(rng, 1.55 * (1.0 - 0.007 * (age - 50)), 0.16, 0.8, 2.1),
        "proportions": [float(v) for v in rng.normal(1.0, 0.04, 2 * bodies)],
    }


def _normal(rng: np.random.Generator, mean: float, sd: float, low: float, high: float) -> float:
    """Draw from a normal distribution, limited to a range."""
    return float(np.clip(rng.normal(mean, sd), low, high))


def _plan_view(name: str, height_mm: float, aim_z: float, rng: np.random.Generator) -> dict:
    """Draw how one film is taken, processed and stored."""
    lateral, spacing_mm = name == "LATERAL", float(np.exp(rng.uniform(np.log(0.2), np.log(0.5))))
    height_mm = height_mm * float(rng.uniform(0.94, 1.0))
    width_mm = float(rng.uniform(0.54, 0.76) * height_mm)
    shutter = None
    if rng.random() < 0.2:
        shutter = [int(s * rng.uniform(0.0, 0.05) / spacing_mm)
                   for s in (height_mm, height_mm, width_mm, width_mm)]  # fmt: skip
    return {
        "name": name,
        "turn_deg": float(rng.normal(0.0, 3.0)),
        "tilt_deg": _normal(rng, 0.0, 1.2, -3.0, 3.0),
        "height_mm": height_mm,
        "width_mm": width_mm,
        "aim_z_mm": aim_z + _normal(rng, 0.0, 3.0, -5.0, 5.0),
        "aside_mm": float(rng.normal(8.0 if lateral else 0.0, 4.0)),
        "mirrored": bool(lateral and rng.random() < 0.3),
        "spacing_mm": spacing_mm,
        "shutter": shutter,
        "kvp": float(round(rng.uniform(78.0, 90.0) if lateral else rng.uniform(70.0, 82.0))),
        "dose_ugy": float(np.exp(rng.uniform(np.log(0.8), np.log(4.0)))),
        "scatter": float(rng.uniform(0.10, 0.30)),
        "grid_lines_px": float(rng.uniform(2.5, 6.0)) if rng.random() < 0.03 else 0.0,
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
        drawn = rng.beta(1.6, 1.6)  # of all sizes, down to the hardly visible
        least = LEAST.get(lesion_type, 1.0)
        severity = float(least + (1.0 - least) * drawn)
        findings.append(
            {"type": lesion_type, "form": form, "level": level, "severity": severity} | more
        )

    if "Surgical implant" in types:
        form = str(rng.choice(["screws", "cages", "plate", "cement"], p=[0.5, 0.2, 0.15, 0.15]))
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
                    if rng.random() < 0.31:
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
    knots = np.concatenate([[-120.0], knots, [knots[-1] + 60.0, knots[-1] + 220.0]])
    factors = np.ones(len(knots))
    factors[1 : len(knots) - 2] = drawn["proportions"][: len(knots) - 3]
    z = np.linspace(knots[0], knots[-1], 321)
    step = z[1] - z[0]
    stretch = drawn["stature"] * factors[np.clip(np.searchsorted(knots, z) - 1, 0, len(knots) - 1)]
    # Integrated from the scan's lower end, which stays in place.
    patient = _sum(_soften(stretch, 4.0 / step), step)
    patient -= np.interp(0.0, z, patient)
    wave = np.sin(2 * np.pi * z / drawn["curve_mm"] + drawn["curve_phase"])
    cobb = np.deg2rad(drawn["cobb_deg"])
    # Curvature of the sagittal profile beside the donor's, in radians a mm.
    low, high = (body.centre_mm[2] for body in _thorax(bodies))
    more = np.deg2rad(drawn["kyphosis_deg"]) - _kyphosis(bodies)
    bend = np.where((z > low) & (z < high), more / (high - low), 0.0)
    bend -= np.where(z <= low, np.deg2rad(drawn["lordosis_deg"]) / LUMBAR_MM, 0.0)
    slope = _sum(_soften(bend, 15.0 / step), step)
    slope -= np.interp((low + high) / 2, z, slope)
    sagittal = _sum(np.tan(np.clip(slope, -0.35, 0.35)), step)
    return Shape(
        z_patient_mm=patient,
        z_donor_mm=z,
        # A sine of this height has the drawn angle between its steepest places.
        shift_x_mm=drawn["curve_mm"] / (2 * np.pi) * np.tan(cobb / 2) * wave,
        shift_y_mm=sagittal - np.interp((low + high) / 2, z, sagittal),
        turn_rad=TURN * cobb * wave,
        girth=drawn["girth"],
        bone=drawn["bone"],
    )


def _thorax(bodies: list[Vertebra]) -> tuple[Vertebra, Vertebra]:
    """Return T12 and T5 or, where a donor lacks them, its lowest and its highest vertebra."""
    named = {body.name: body for body in bodies}
    return named.get("T12", bodies[0]), named.get("T5", bodies[-1])


def _kyphosis(bodies: list[Vertebra]) -> float:
    """Return the donor's angle between T5 and T12, radians."""
    lower, upper = (np.arctan2(body.up[1], body.up[2]) for body in _thorax(bodies))
    return float(upper - lower)


def _soften(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur a table by a Gaussian of `sigma` entries; its ends go on as they are."""
    reach = int(3 * sigma) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, reach, "edge"), kernel / kernel.sum(), "valid")


def _sum(values: np.ndarray, step: float) -> np.ndarray:
    """Integrate a table by trapezia, from 0."""
    return np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) / 2 * step)])


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
            top = level + finding["count"]
            return make.implant(bodies[level:top], discs[level : top - 1], form)
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
    view = plan_to_view(drawn, anatomy.bodies)
    paths = scene.paths(view, everything)
    frame = _Frame(drawn)
    arrived = transmission(
        Paths(*(np.maximum(frame.place(p), 0.0) for p in vars(paths).values())), drawn["kvp"]
    )
    spacing_mm = drawn["spacing_mm"]
    signal = expose(
        arrived, spacing_mm, drawn["dose_ugy"], drawn["scatter"], drawn["grid_lines_px"], rng
    )
    developed = Development(signal, spacing_mm, drawn["contrast"], drawn["detail"])
    haze = scattered(arrived, spacing_mm, drawn["scatter"])
    mas = drawn["dose_ugy"] / (AIR_UGY * (drawn["kvp"] / 80.0) ** 2 * float(arrived.mean()))
    twins = [
        _twin(scene, view, group, everything, block, paths, haze / arrived, developed, frame)
        for group, block in zip(groups, scene.blocks(view, groups), strict=True)
    ]
    grey = developed.grey
    if drawn["marker"]:
        _put_marker(grey, drawn["name"] == "LATERAL", frame, rng)
    grey[~frame.open] = 0.0
    # A viewer without a window stretches a film to its range, so that range is the whole.
    low, high = grey.min(), grey.max()
    twins = [t and t._replace(change=t.change / (high - low)) for t in twins]
    return Film((grey - low) / (high - low), mas, twins)


class _Frame:
    """From the grid of rays to the film's pixels: enlarge, rotate, mirror, collimate."""

    def __init__(self, drawn: dict):
        self.drawn = drawn
        size = (round(drawn[side] / drawn["spacing_mm"]) for side in ("height_mm", "width_mm"))
        self.size = tuple(size)
        self.open = np.ones(self.size, bool)  # what the collimator leaves open
        if drawn["shutter"]:
            top, bottom, left, right = drawn["shutter"]
            self.open[:top] = self.open[self.size[0] - bottom :] = False
            self.open[:, :left] = self.open[:, self.size[1] - right :] = False

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


def plan_to_view(drawn: dict, bodies: list[Vertebra]) -> View:
    """Return the geometry of a planned view."""
    axis = np.array([body.centre_mm for body in bodies])
    x, y = (np.interp(drawn["aim_z_mm"], axis[:, 2], axis[:, i]) for i in (0, 1))
    across = np.deg2rad(ANGLES[drawn["name"]])
    aim = np.array([x, y, drawn["aim_z_mm"]])
    aim[:2] += drawn["aside_mm"] * np.array([np.cos(across), np.sin(across)])
    angle = across + np.deg2rad(drawn["turn_deg"])
    sides = (drawn[side] + FIELD_MARGIN_MM for side in ("height_mm", "width_mm"))
    return View(drawn["name"], angle, aim, *sides, drawn["tilt_deg"], drawn["mirrored"])


def _twin(
    scene: Scene,
    view: View,
    group: list[Lesion],
    everything: list[Lesion],
    block: Block | None,
    paths: Paths,
    haze: np.ndarray,
    developed: Development,
    frame: _Frame,
) -> Twin | None:
    """Compare a film with its twin without one finding; None where most of it is off the film.

    The mask is where rays pass through 0.8 mm or more of the finding, and at least 15 % of its
    thickest part. The visibility is contrast to noise inside it: the root mean square of the change
    in that quarter of the mask that changes most, for an eye is drawn by edges, over the standard
    deviation of the twin film in the mask and 3 mm around it.

    Args:
        haze: Scattered over primary radiation at each pixel, shape (H, W).
    """
    if block is None:
        return None
    where = np.s_[block.rows[0] : block.rows[1], block.columns[0] : block.columns[1]]
    shadow = np.zeros_like(paths.soft)
    shadow[where] = scene.shadow(view, group, everything, block)
    solid = shadow > max(0.8, 0.15 * shadow.max())
    if not solid.any():
        return None
    mask = (frame.place(solid.astype(np.float32)) > 0.5) & frame.open
    if mask.sum() * (frame.drawn["spacing_mm"] / GRID_MM) ** 2 < PART_ON_FILM * solid.sum():
        return None
    with_it, without = map(vars, scene.twins(view, everything, group, block))
    more = np.zeros_like(paths.soft)  # of what passes without the finding, natural logarithm
    before = {k: v[where] for k, v in vars(paths).items()}
    after = {k: np.maximum(before[k] + (without[k] - with_it[k]), 0.0) for k in before}
    before = {k: np.maximum(v, 0.0) for k, v in before.items()}
    arrive = (np.log(transmission(Paths(**p), frame.drawn["kvp"])) for p in (after, before))
    more[where] = np.subtract(*arrive)
    # Scatter comes from all around and stays as it is, so that it veils what lies behind metal.
    part, change = developed.change(-np.log1p(np.expm1(frame.place(more)) / (1.0 + haze)))
    change = change * frame.open[part]
    here, film = mask[part], developed.grey[part]
    if not here.any():
        return None
    px = 2 * round(3.0 / frame.drawn["spacing_mm"]) + 1
    around = cv2.dilate(here.astype(np.uint8), np.ones((px, px), np.uint8)).astype(bool)
    noise = max(float((film + change)[around].std()), 0.02)
    most = np.sort(np.abs(change[here]))[-max(1, here.sum() // 4) :]
    return Twin(float(np.sqrt((most**2).mean())) / noise, mask, part, change)


def find_box(shadow: np.ndarray, spacing_mm: float) -> tuple[float, float, float, float]:
    """Return the box that an annotator would draw round a shadow, (xmin, ymin, xmax, ymax) px."""
    rows, columns = (np.flatnonzero(shadow.any(axis=a)) for a in (1, 0))
    margin = BOX_MARGIN_MM / spacing_mm
    height, width = shadow.shape
    xmin, ymin = max(columns[0] - margin, 0.0), max(rows[0] - margin, 0.0)
    xmax, ymax = min(columns[-1] + 1 + margin, width), min(rows[-1] + 1 + margin, height)
    return tuple(round(float(v), 2) for v in (xmin, ymin, xmax, ymax))


def _put_marker(grey: np.ndarray, lateral: bool, frame: _Frame, rng: np.random.Generator) -> None:
    """Lay a lead letter on the film, in a corner of the open field.

    The patient's right is on a frontal or oblique film's left; a lateral one has the side that is
    next to the detector, in any corner.
    """
    rows, columns = (np.flatnonzero(frame.open.any(axis=a)) for a in (1, 0))
    size = len(rows) / 420.0
    row = rows[0] + int(len(rows) * (0.08 if rng.random() < 0.5 else 0.96))
    right = rng.random() < 0.5
    column = columns[0] + int(len(columns) * (0.05 if right else 0.88))
    letter = "R" if right and not lateral else "L"
    lead = np.zeros(grey.shape, np.float32)
    place, thick = (int(column), int(row)), max(1, round(2 * size))
    cv2.putText(lead, letter, place, cv2.FONT_HERSHEY_SIMPLEX, size, 1.0, thick, cv2.LINE_AA)
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
    anatomy = _anatomy(ct, mask)
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


@cache
def _anatomy(ct: Path | None = None, mask: Path | None = None) -> Anatomy:
    """Load a donor and its landmarks, once a process."""
    donor = load_donor(ct, mask)
    bodies = find_vertebrae(donor)
    if len(bodies) < LEAST_BODIES:
        raise DernetError(
            f"The donor shows {len(bodies)} whole vertebrae ({', '.join(b.name for b in bodies)}), "
            f"where a spine film needs {LEAST_BODIES}: take a scan that shows more of the spine."
        )
    return Anatomy(donor, bodies, find_discs(bodies))


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
    anatomy = _anatomy(ct, mask)
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
        write_dicom(path, film.grey, plan, number, ids, film.mas)
        write_twins(partial / "twins" / f"{ids['image_id']}.npz", film.twins)
        seen = []
        for finding, twin in zip(plan["findings"], film.twins, strict=True):
            labelled = twin is not None and twin.visibility >= SEEN
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


def _assemble(
    partial: Path, plans: list[dict], patients: int, seed: int, donor: str
) -> dict:
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
        "donor_sha256": donor,
        "box_margin_mm": BOX_MARGIN_MM,
        "least_visibility": SEEN,
        "studies": [
            plan | {"films": record["films"]} for plan, record in zip(plans, records, strict=True)
        ],
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(partial / "records")
    (partial / "plan.sha256").unlink()
    return manifest

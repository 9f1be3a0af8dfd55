"""The plan of a virtual cohort: bodies, lesions and radiographs as plain values from a seed."""

import numpy as np

from dernet_utils.core.errors import DernetError
from dernet_utils.virtual.dicom_writer import SYNTAXES
from dernet_utils.virtual.spine import Vertebra

VERSION = 3  # of the cohort's recipe and part of every seed; a new one makes old cohorts stale
# Fractions of the patients.
ABNORMAL = 0.52  # about half of the images then show a finding, as in the dataset
COMPLETE = 20  # patients, from which each split can have each lesion type
TEST = 0.20  # 1,000 of the dataset's 5,000 studies
# Fractions with a lesion of a type, chosen so that the labelled boxes per type follow the dataset's
# training split (book/data_card.md).
CARRIERS = {
    "Vertebral collapse": 0.047,
    "Other lesions": 0.050,
    "Spondylolysthesis": 0.060,
    "Surgical implant": 0.054,
    "Foraminal stenosis": 0.105,
    "Disc space narrowing": 0.165,
}
SPURS = 0.90  # of the patients with such a lesion, who also have osteophytes
# Severity is drawn between the least that a radiologist would report and 1. The least loses a fifth
# of the height in a collapse (Genant) and a tenth of the depth in a slip; else it is just visible.
LEAST = {
    "Vertebral collapse": 0.42,
    "Other lesions": 0.35,
    "Spondylolysthesis": 0.20,
    "Foraminal stenosis": 0.50,
    "Disc space narrowing": 0.45,
    "Osteophytes": 0.12,
}
# The views of a study and their probabilities; 2.1 images per study on average, as in the dataset.
STUDIES = {
    ("LATERAL",): 0.09,
    ("AP",): 0.09,
    ("LATERAL", "AP"): 0.64,
    ("LATERAL", "AP", "LPO"): 0.05,
    ("LATERAL", "AP", "RPO"): 0.05,
    ("LATERAL", "AP", "LPO", "RPO"): 0.08,
}
FIELD_MARGIN_MM = 12.0  # rendered around the collimated field, since the detector may be rotated
SHOULDERS_MM = 100.0  # least distance from the second highest vertebra down to the field's centre


def plan_cohort(
    patients: int, seed: int, bodies: list[Vertebra], test_seed: int | None = None
) -> list[dict]:
    """Draw a cohort's patients.

    `seed` alone decides how many patients there are in each split and which types of lesion each
    has, so the training patients are the same with every `test_seed`.

    Args:
        patients: Their number. In a small cohort a split may lack a lesion type; with fewer than
            `COMPLETE` patients the cohort may lack some, and with fewer than 4 there is no test
            split.
        seed: The same seed gives the same cohort.
        bodies: The donor's vertebrae, from the lowest up.
        test_seed: Seed of everything else about a test patient: body, views, levels and forms of
            the lesions, noise. None for `seed`.

    Returns:
        One dictionary of plain values per patient, as in the manifest: ``patient`` (number),
        ``seed`` (from which it was drawn), ``split``, ``age`` (years), ``sex``, ``shape``,
        ``views`` and ``findings``.

    Raises:
        DernetError: There is no patient.
    """
    if patients < 1:
        raise DernetError(f"A virtual cohort has at least one patient, not {patients}.")
    rng = np.random.default_rng([seed, VERSION])
    abnormal = rng.permutation(patients)[: round(ABNORMAL * patients)]
    carried: dict[int, list[str]] = {int(p): [] for p in abnormal}
    test: set[int] = set()
    train: set[int] = set()
    least = 2 if patients >= COMPLETE else 0  # one for each split
    # Each type in turn asks for at least one carrier in each split.
    for lesion_type, fraction in CARRIERS.items():
        carriers = rng.choice(abnormal, max(least, round(fraction * patients)), replace=False)
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
        split = "test" if patient in test else "train"
        drawn_from = test_seed if split == "test" and test_seed is not None else seed
        own = np.random.default_rng([drawn_from, VERSION, patient])
        types = carried.get(patient)
        plans.append(_plan_patient(patient, drawn_from, split, types, bodies, own))
    return plans


def _plan_patient(
    patient: int,
    seed: int,
    split: str,
    types: list[str] | None,
    bodies: list[Vertebra],
    rng: np.random.Generator,
) -> dict:
    """Draw one patient; `types` is None for one without findings."""
    age, sex = int(rng.integers(25, 86)), str(rng.choice(["F", "M"]))
    height_mm = float(rng.uniform(160.0, 225.0))
    # The cone's lower edge stays inside the scan, and the shoulders outside the field.
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
    """Draw a body's shape, independently of its lesions (sources: book/data_card.md)."""
    # Stature has an SD of 4 %; men are 7 % taller than women (NCD-RisC, eLife 2016).
    stature = _normal(rng, 1.035 if sex == "M" else 0.965, 0.04, 0.87, 1.13)
    # 8.85 % of adults have a curve beyond 10 degrees (Kebaish, Spine 2011); most are mild.
    curved = rng.random() < 0.0885
    cobb = 10.0 + rng.exponential(7.0) if curved else abs(rng.normal(0.0, 4.0))
    return {
        "stature": stature,
        "cobb_deg": float(min(cobb, 35.0) * rng.choice([-1.0, 1.0])),
        "curve_phase": float(rng.uniform(0.0, 2 * np.pi)),
        "curve_mm": float(rng.uniform(240.0, 340.0)),
        # Thoracic kyphosis: 27 degrees at 25 years, 41 at 75 (Fon, Am J Roentgenol 1980).
        "kyphosis_deg": _normal(rng, 27.0 + 0.28 * (age - 25), 8.0, 12.0, 58.0),
        # Added to the donor's lordosis; SD from L1 to L5: 11 degrees (Vialle, JBJS 2005).
        "lordosis_deg": _normal(rng, 0.0, 11.0, -22.0, 22.0),
        "girth": _normal(rng, 1.0, 0.12, 0.78, 1.28),
        # Trabecular bone loses 1.4 % per year of its value at 50 (Jang, Radiology 2019).
        "bone": _normal(rng, 1.0 - 0.014 * (age - 50), 0.2, 0.4, 1.8),
        "proportions": [float(v) for v in rng.normal(1.0, 0.04, 2 * bodies)],
    }


def _normal(rng: np.random.Generator, mean: float, sd: float, low: float, high: float) -> float:
    """Draw from a normal distribution, clipped to a range."""
    return float(np.clip(rng.normal(mean, sd), low, high))


def _plan_view(name: str, height_mm: float, aim_z: float, rng: np.random.Generator) -> dict:
    """Draw how one radiograph is acquired, processed and stored."""
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
        "detail": float(rng.uniform(1.2, 2.1)),
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
        severity = float(rng.uniform(LEAST.get(lesion_type, 1.0), 1.0))
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

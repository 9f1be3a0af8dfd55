"""Rendering of a planned patient's radiographs and of each finding's counterfactual."""

from typing import NamedTuple

import cv2
import numpy as np

from dernet_utils.virtual import lesions
from dernet_utils.virtual.acquisition import (
    DisplayProcessing,
    Paths,
    expose,
    scattered_radiation,
    transmission,
)
from dernet_utils.virtual.anatomy import Anatomy
from dernet_utils.virtual.counterfactual import Counterfactual
from dernet_utils.virtual.lesions import Lesion
from dernet_utils.virtual.plan import FIELD_MARGIN_MM, VERSION
from dernet_utils.virtual.projection import GRID_MM, Scene, Shape, Trace, View
from dernet_utils.virtual.spine import Disc, Vertebra

# Bodies.
LUMBAR_MM = 150.0  # length from L1 to L5, over which a lordosis is spread
TURN = 0.35  # axial rotation over lateral curvature: our choice, after Nash and Moe's grades
# Views.
ANGLES = {"AP": 0.0, "LATERAL": 90.0, "LPO": 45.0, "RPO": -45.0}  # of the beam, degrees
AIR_UGY = 30.0  # air kerma behind table and grid for 1 mAs at 80 kVp, without a patient
# Labels.
PART_IN_FIELD = 0.5  # least fraction of a lesion's shadow inside the collimated field
BOX_MARGIN_MM = 1.5  # annotators draw boxes a little outside the lesion's edge


class RenderedRadiograph(NamedTuple):
    """A rendered radiograph.

    Attributes:
        grey: 0 black to 1 white, shape (H, W).
        mas: Tube current-time product that automatic exposure control chose, mAs.
        counterfactuals: One for each finding of the plan; None for a finding outside the field.
    """

    grey: np.ndarray
    mas: float
    counterfactuals: list[Counterfactual | None]


def build_shape(plan: dict, bodies: list[Vertebra]) -> Shape:
    """Turn a patient's planned numbers into the tables that `projection.Scene` reads.

    Args:
        plan: The patient's plan, as `plan_cohort` returns it.
        bodies: The donor's vertebrae, from the lowest up.
    """
    drawn = plan["shape"]
    edges = [(b.point(up=-1.0)[2], b.point(up=1.0)[2]) for b in bodies]
    knots = np.maximum.accumulate(np.array(edges).ravel())
    knots = np.concatenate([[-120.0], knots, [knots[-1] + 60.0, knots[-1] + 220.0]])
    factors = np.ones(len(knots))
    factors[1 : len(knots) - 2] = drawn["proportions"][: len(knots) - 3]
    z = np.linspace(knots[0], knots[-1], 321)
    step = z[1] - z[0]
    stretch = drawn["stature"] * factors[np.clip(np.searchsorted(knots, z) - 1, 0, len(knots) - 1)]
    # Integrated, with the scan's lower end kept in place.
    patient = _sum(_soften(stretch, 4.0 / step), step)
    patient -= np.interp(0.0, z, patient)
    wave = np.sin(2 * np.pi * z / drawn["curve_mm"] + drawn["curve_phase"])
    cobb = np.deg2rad(drawn["cobb_deg"])
    # Sagittal curvature added to the donor's, radians per mm.
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
        # A sine of this amplitude has the planned angle between its steepest points.
        shift_x_mm=drawn["curve_mm"] / (2 * np.pi) * np.tan(cobb / 2) * wave,
        shift_y_mm=sagittal - np.interp((low + high) / 2, z, sagittal),
        turn_rad=TURN * cobb * wave,
        girth=drawn["girth"],
        bone=drawn["bone"],
    )


def _thorax(bodies: list[Vertebra]) -> tuple[Vertebra, Vertebra]:
    """Return T12 and T5; where a donor lacks one, its lowest or its highest vertebra."""
    named = {body.name: body for body in bodies}
    return named.get("T12", bodies[0]), named.get("T5", bodies[-1])


def _kyphosis(bodies: list[Vertebra]) -> float:
    """Return the donor's angle between T5 and T12, radians."""
    lower, upper = (np.arctan2(body.up[1], body.up[2]) for body in _thorax(bodies))
    return float(upper - lower)


def _soften(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur a table by a Gaussian of `sigma` entries; its end values are repeated."""
    reach = int(3 * sigma) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, reach, "edge"), kernel / kernel.sum(), "valid")


def _sum(values: np.ndarray, step: float) -> np.ndarray:
    """Integrate a table by the trapezoidal rule, from 0."""
    return np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) / 2 * step)])


def build_finding(finding: dict, bodies: list[Vertebra], discs: list[Disc]) -> list[Lesion]:
    """Turn a planned finding into its lesions.

    Args:
        finding: An entry of a plan's ``findings``.
        bodies, discs: The donor's, from the lowest up.
    """
    level, severity, form = finding["level"], finding["severity"], finding["form"]
    match finding["type"]:
        case "Disc space narrowing":
            return lesions.disc_space_narrowing(discs[level], severity)
        case "Vertebral collapse":
            return lesions.vertebral_collapse(bodies[level], severity, form)
        case "Spondylolysthesis":
            return lesions.spondylolisthesis(discs[level], severity)
        case "Foraminal stenosis":
            return lesions.foraminal_stenosis(discs[level], severity)
        case "Other lesions":
            return lesions.other_lesion(bodies[level], severity, form, np.array(finding["place"]))
        case "Surgical implant":
            top = level + finding["count"]
            return lesions.implant(bodies[level:top], discs[level : top - 1], form)
        case _:
            return lesions.osteophyte(
                discs[level], severity, form, finding["upper"], finding["angle"]
            )


def render_radiograph(plan: dict, number: int, anatomy: Anatomy) -> RenderedRadiograph:
    """Render one radiograph of a patient, and the counterfactual of each finding.

    Args:
        plan: The patient's plan, as `plan_cohort` returns it.
        number: Index of the view in the plan, from 0.
        anatomy: The donor.
    """
    drawn = plan["views"][number]
    rng = np.random.default_rng([plan["seed"], VERSION, plan["patient"], 1 + number])
    shape = build_shape(plan, anatomy.bodies)
    groups = [build_finding(f, anatomy.bodies, anatomy.discs) for f in plan["findings"]]
    view = plan_to_view(drawn, anatomy.bodies)
    traced = Scene(anatomy.donor, anatomy.bodies, shape).trace(view, groups)
    frame = _Frame(drawn)
    arrived = transmission(
        Paths(*(np.maximum(frame.resample(p), 0.0) for p in vars(traced.paths).values())),
        drawn["kvp"],
    )
    spacing_mm = drawn["spacing_mm"]
    signal = expose(
        arrived, spacing_mm, drawn["dose_ugy"], drawn["scatter"], drawn["grid_lines_px"], rng
    )
    developed = DisplayProcessing(signal, spacing_mm, drawn["contrast"], drawn["detail"])
    haze = scattered_radiation(arrived, spacing_mm, drawn["scatter"])
    mas = drawn["dose_ugy"] / (AIR_UGY * (drawn["kvp"] / 80.0) ** 2 * float(arrived.mean()))
    counterfactuals = [
        _counterfactual(traced, number, haze / arrived, developed, frame)
        for number in range(len(groups))
    ]
    grey = developed.grey
    if drawn["marker"]:
        _put_marker(grey, drawn["name"] == "LATERAL", frame, rng)
    grey[~frame.open] = 0.0
    # Without a window, a viewer shows an image's full range, so the range is made 0 to 1.
    low, high = grey.min(), grey.max()
    counterfactuals = [t and t._replace(change=t.change / (high - low)) for t in counterfactuals]
    return RenderedRadiograph((grey - low) / (high - low), mas, counterfactuals)


class _Frame:
    """The map from the grid of rays to the image's pixels: scale, rotate, mirror, collimate.

    Args:
        drawn: The view's plan.

    Attributes:
        size: Rows and columns of the image.
        open: Whether the collimator leaves a pixel open, bool (H, W).
    """

    def __init__(self, drawn: dict):
        self.drawn = drawn
        size = (round(drawn[side] / drawn["spacing_mm"]) for side in ("height_mm", "width_mm"))
        self.size = tuple(size)
        self.open = np.ones(self.size, bool)
        if drawn["shutter"]:
            top, bottom, left, right = drawn["shutter"]
            self.open[:top] = self.open[self.size[0] - bottom :] = False
            self.open[:, :left] = self.open[:, self.size[1] - right :] = False

    def resample(self, rays: np.ndarray) -> np.ndarray:
        """Interpolate an array on the grid of rays at the image's pixels, float32 (H, W)."""
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
    """Return the geometry of a planned view.

    Args:
        drawn: An entry of a plan's ``views``.
        bodies: The donor's vertebrae, from the lowest up.
    """
    axis = np.array([body.centre_mm for body in bodies])
    x, y = (np.interp(drawn["aim_z_mm"], axis[:, 2], axis[:, i]) for i in (0, 1))
    across = np.deg2rad(ANGLES[drawn["name"]])
    aim = np.array([x, y, drawn["aim_z_mm"]])
    aim[:2] += drawn["aside_mm"] * np.array([np.cos(across), np.sin(across)])
    angle = across + np.deg2rad(drawn["turn_deg"])
    sides = (drawn[side] + FIELD_MARGIN_MM for side in ("height_mm", "width_mm"))
    return View(drawn["name"], angle, aim, *sides, drawn["tilt_deg"], drawn["mirrored"])


def _counterfactual(
    traced: Trace, number: int, haze: np.ndarray, developed: DisplayProcessing, frame: _Frame
) -> Counterfactual | None:
    """Compare an image with its counterfactual; None if most of the finding is outside the field.

    The mask is where rays cross more than 0.8 mm of the finding and more than 15 % of its thickest
    part. The visibility is a contrast-to-noise ratio: the root mean square of the change in the
    quarter of the mask that changes most, since edges draw the eye, over the standard deviation (at
    least 0.02) of the counterfactual image in the mask and 3 mm around it.

    Args:
        traced: The rays of the view.
        number: Index of the finding.
        haze: Scattered over primary radiation at each pixel, shape (H, W).
        developed: The processed image.
        frame: The map from rays to pixels.
    """
    length_mm = traced.lengths_mm[number]
    solid = length_mm > max(0.8, 0.15 * length_mm.max())
    if not solid.any():
        return None
    mask = (frame.resample(solid.astype(np.float32)) > 0.5) & frame.open
    if mask.sum() * (frame.drawn["spacing_mm"] / GRID_MM) ** 2 < PART_IN_FIELD * solid.sum():
        return None
    removed = np.stack(list(vars(traced.removed[number]).values()))
    more = np.zeros_like(length_mm)  # log of transmission without over with the finding
    rows, columns = (np.flatnonzero(removed.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    if len(rows):
        where = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        before = np.stack([path[where] for path in vars(traced.paths).values()])
        both = (np.maximum(p, 0.0) for p in (before + removed[:, *where], before))
        arrive = (np.log(transmission(Paths(*p), frame.drawn["kvp"])) for p in both)
        more[where] = np.subtract(*arrive)
    # Scatter comes from all around and stays the same, so it veils what lies behind metal.
    part, change = developed.change(-np.log1p(np.expm1(frame.resample(more)) / (1.0 + haze)))
    change = change * frame.open[part]
    here, grey = mask[part], developed.grey[part]
    if not here.any():
        return None
    px = 2 * round(3.0 / frame.drawn["spacing_mm"]) + 1
    around = cv2.dilate(here.astype(np.uint8), np.ones((px, px), np.uint8)).astype(bool)
    noise = max(float((grey + change)[around].std()), 0.02)
    most = np.sort(np.abs(change[here]))[-max(1, here.sum() // 4) :]
    return Counterfactual(float(np.sqrt((most**2).mean())) / noise, mask, part, change)


def find_box(shadow: np.ndarray, spacing_mm: float) -> tuple[float, float, float, float]:
    """Return the box that an annotator would draw around a shadow.

    Args:
        shadow: The finding's mask, bool (H, W), not empty.
        spacing_mm: Pixel size in the plane of the spine.

    Returns:
        (xmin, ymin, xmax, ymax) in pixels, within the image.
    """
    rows, columns = (np.flatnonzero(shadow.any(axis=a)) for a in (1, 0))
    margin = BOX_MARGIN_MM / spacing_mm
    height, width = shadow.shape
    xmin, ymin = max(columns[0] - margin, 0.0), max(rows[0] - margin, 0.0)
    xmax, ymax = min(columns[-1] + 1 + margin, width), min(rows[-1] + 1 + margin, height)
    return tuple(round(float(v), 2) for v in (xmin, ymin, xmax, ymax))


def _put_marker(grey: np.ndarray, lateral: bool, frame: _Frame, rng: np.random.Generator) -> None:
    """Draw a lead letter into a corner of the open field, in place.

    On frontal and oblique radiographs the patient's right is on the image's left; a lateral one has
    the letter of the side next to the detector, in any corner.
    """
    rows, columns = (np.flatnonzero(frame.open.any(axis=a)) for a in (1, 0))
    size = len(rows) / 420.0
    row = rows[0] + int(len(rows) * (0.08 if rng.random() < 0.5 else 0.96))
    right = rng.random() < 0.5
    column = columns[0] + int(len(columns) * (0.05 if right else 0.88))
    letter = "R" if right and not lateral else "L"
    lead = np.zeros(grey.shape, np.float32)
    corner, thick = (int(column), int(row)), max(1, round(2 * size))
    cv2.putText(lead, letter, corner, cv2.FONT_HERSHEY_SIMPLEX, size, 1.0, thick, cv2.LINE_AA)
    grey += (0.97 - grey) * cv2.GaussianBlur(lead, (0, 0), 0.8)

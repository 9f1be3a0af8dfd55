"""From a volume to a film: the patient's shape, the rays, Beer and Lambert, the detector."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dernet_utils.anatomy import Vertebra
from dernet_utils.donor import Donor
from dernet_utils.lesions import Lesion

GRID_MM = 0.7  # rays are this far apart in the plane of the spine
STEP_MM = 2.0  # and are sampled this often along their way
SOURCE_MM = 950.0  # focal spot to spine
DETECTOR_MM = 1150.0  # focal spot to detector: the spine is 200 mm before it
MARGIN_MM = 14.0  # how far a lesion that moves tissue may carry another, or itself
SAMPLES = 700_000  # in one go: bounds the memory, and fits the processor's cache

# Mass attenuation in cm²/g at 40, 60 and 80 keV: NIST, X-ray mass attenuation coefficients
# (water, ICRU-44 cortical bone, titanium); the weights stand for a filtered 80-90 kVp beam.
ENERGY_WEIGHTS = np.array([0.30, 0.50, 0.20])
WATER = np.array([0.2683, 0.2059, 0.1837])
CORTICAL_BONE = np.array([0.6655, 0.3148, 0.2229])
TITANIUM = np.array([2.214, 0.7661, 0.4052])
BONE_FROM = 1080.0  # HU + 1000 from which tissue counts as part bone
BONE_SPAN = 1520.0  # to pure cortical bone, 1.92 g/cm³


@dataclass(frozen=True)
class Shape:
    """How a patient's body differs from the donor's: functions of height, as tables.

    Attributes:
        z_patient_mm, z_donor_mm: Heights that correspond, increasing, shape (n,).
        shift_x_mm, shift_y_mm: Offset of the spine at those heights (scoliosis, kyphosis).
        turn_rad: Axial rotation at those heights.
        girth: Width of soft tissue beside the spine, relative to the donor's.
        bone: Mineral relative to the donor's; 0.7 is osteoporotic.
    """

    z_patient_mm: np.ndarray
    z_donor_mm: np.ndarray
    shift_x_mm: np.ndarray
    shift_y_mm: np.ndarray
    turn_rad: np.ndarray
    girth: float
    bone: float


@dataclass(frozen=True)
class View:
    """How a film was taken.

    Attributes:
        name: ``LATERAL`` or ``AP``.
        angle_rad: Direction of the beam: 0 from front to back, pi/2 from right to left.
        aim_mm: Donor place (x, y, z) in the middle of the film.
        height_mm, width_mm: Collimated field in the plane of the spine.
        tilt_deg: Rotation of the film.
        mirrored: Whether the film is shown from its other side.
    """

    name: str
    angle_rad: float
    aim_mm: np.ndarray
    height_mm: float
    width_mm: float
    tilt_deg: float
    mirrored: bool


@dataclass(frozen=True)
class Paths:
    """What the rays went through, g/cm², each of shape (rows, columns)."""

    soft: np.ndarray
    bone: np.ndarray
    metal: np.ndarray


@dataclass(frozen=True)
class Block:
    """A part of a view: rows, columns and depth steps, as half-open index ranges."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    steps: tuple[int, int]


class Scene:
    """One patient before the X-ray tube: the donor, a shape, and the lesions in it."""

    def __init__(self, donor: Donor, spine: list[Vertebra], shape: Shape, lesions: list[Lesion]):
        self.volume = torch.from_numpy(donor.density)[None, None]
        z, y, x = donor.density.shape
        self.extent_mm = [
            (n - 1) * s for n, s in zip((x, y, z), donor.spacing_mm[::-1], strict=True)
        ]
        self.axis = np.array([body.centre_mm for body in spine])
        self.shape = shape
        self.lesions = lesions

    def whole(self, view: View) -> Block:
        """Return the block of a whole view."""
        near, far = self._depths(view)
        return Block((0, _count(view.height_mm)), (0, _count(view.width_mm)), (0, near + far))

    def _depths(self, view: View) -> tuple[int, int]:
        """Return how many steps the body reaches before and behind the spine."""
        sides = [(-a * self.shape.girth, (e - a) * self.shape.girth)
                 for a, e in zip(view.aim_mm, self.extent_mm[:2], strict=False)]  # fmt: skip
        along = [x * np.sin(view.angle_rad) - y * np.cos(view.angle_rad)
                 for x in sides[0] for y in sides[1]]  # fmt: skip
        # A turned box is deeper at its corners than the body, which is round.
        near, far = 0.97 * -min(along), 0.97 * max(along)
        return int(near / STEP_MM), int(far / STEP_MM)

    def donor_places(
        self, view: View, block: Block, every: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Follow the rays of a block and return where in the donor each sample lies.

        Args:
            view: The film.
            block: The part of it.
            every: Take every n-th row, step and column.

        Returns:
            x, y, z in donor millimetres, each of shape (rows, steps, columns).
        """
        whole, shape = self.whole(view), self.shape
        row = (np.arange(*block.rows, every) - (whole.rows[1] - 1) / 2) * -GRID_MM
        column = (np.arange(*block.columns, every) - (whole.columns[1] - 1) / 2) * GRID_MM
        depth = (np.arange(*block.steps, every) - self._depths(view)[0]) * STEP_MM
        wider = (SOURCE_MM + depth) / SOURCE_MM  # the beam is a cone
        aim_z = np.interp(view.aim_mm[2], shape.z_donor_mm, shape.z_patient_mm)
        height = aim_z + row[:, None] * wider  # (rows, steps)
        z = np.interp(height, shape.z_patient_mm, shape.z_donor_mm)
        turn = np.interp(z, shape.z_donor_mm, shape.turn_rad) + view.angle_rad
        middle = [np.interp(z, self.axis[:, 2], self.axis[:, i]) for i in (0, 1)]
        moved = [
            np.interp(z, shape.z_donor_mm, table)
            for table in (shape.shift_x_mm, shape.shift_y_mm)
        ]  # fmt: skip
        aim = [np.interp(view.aim_mm[2], self.axis[:, 2], self.axis[:, i]) for i in (0, 1)]
        # Seen from the spine: how far the film's middle line passes, then turned with the body.
        offset = [
            np.interp(view.aim_mm[2], shape.z_donor_mm, table) + centre + target - centre
            for table, centre, target in zip(
                (shape.shift_x_mm, shape.shift_y_mm), aim, view.aim_mm[:2], strict=True
            )
        ]
        across = torch.from_numpy((column[None, :] * wider[:, None]).astype(np.float32))
        cos, sin = (
            torch.from_numpy(f(turn).astype(np.float32))[..., None] for f in (np.cos, np.sin)
        )
        fixed = np.cos(view.angle_rad), np.sin(view.angle_rad)
        # The beam runs to the back (-y) at angle 0 and to the left (+x) at a right angle.
        away = [offset[i] - moved[i] - middle[i] for i in (0, 1)]
        ahead = away[0] * fixed[1] - away[1] * fixed[0]
        aside = away[0] * fixed[0] + away[1] * fixed[1]
        ahead = torch.from_numpy((ahead + depth).astype(np.float32))[..., None]
        aside = torch.from_numpy(aside.astype(np.float32))[..., None] + across
        x, y = aside * cos + ahead * sin, aside * sin - ahead * cos
        x, y = (_slimmer(p, self.shape.girth) for p in (x, y))
        middle = [torch.from_numpy(m.astype(np.float32))[..., None] for m in middle]
        z = torch.from_numpy(z.astype(np.float32))[..., None].expand_as(x)
        return x + middle[0], y + middle[1], z

    def paths(self, view: View, lesions: list[Lesion], block: Block | None = None) -> Paths:
        """Integrate soft tissue, bone and metal along every ray of a block (default: the view)."""
        block = block or self.whole(view)
        return _join(self._integrate(*self._tissue(view, lesions, s)) for s in _strips(block))

    def twins(
        self, view: View, lesions: list[Lesion], finding: list[Lesion], block: Block
    ) -> tuple[Paths, Paths]:
        """Integrate a block twice: with all lesions, and with all but those of one finding."""
        others = [lesion for lesion in lesions if lesion not in finding]
        if any(lesion.move for lesion in finding):
            return self.paths(view, lesions, block), self.paths(view, others, block)
        # Nothing moves: the rays, and the tissue before any lesion is put in, are the same.
        pairs = []
        for strip in _strips(block):
            density, points, near = self._tissue(view, lesions, strip)
            rest = [(lesion, place) for lesion, place in near if lesion not in finding]
            both = (near, density.clone()), (rest, density)
            pairs.append([self._integrate(tissue, points, some) for some, tissue in both])
        with_it, without = map(_join, zip(*pairs, strict=True))
        return with_it, without

    def occupancy(
        self, view: View, lesion: Lesion, lesions: list[Lesion], block: Block
    ) -> np.ndarray:
        """Return the millimetres of a lesion's region on each ray, shape (rows, columns)."""
        points = self.donor_places(view, block)
        for other in lesions:
            if other.move:
                points = other.move(points)
        return lesion.region(points).sum(dim=1).numpy() * STEP_MM

    def blocks(self, view: View, lesions: list[Lesion]) -> list[Block | None]:
        """Return the part of a view that each lesion's region covers; None where off the film."""
        whole, every = self.whole(view), 4
        points = self.donor_places(view, whole, every)
        found = []
        for lesion in lesions:
            offset = zip(points, lesion.centre_mm, strict=True)
            square = sum((p - float(c)) ** 2 for p, c in offset)
            near = (square < (lesion.size_mm + MARGIN_MM) ** 2).numpy()
            spans = []
            for axis, count in ((0, whole.rows[1]), (2, whole.columns[1]), (1, whole.steps[1])):
                others = tuple(i for i in range(3) if i != axis)
                where = np.flatnonzero(near.any(axis=others)) * every
                if len(where):
                    spans.append(
                        (max(int(where[0]) - every, 0), min(int(where[-1]) + every, count))
                    )
            found.append(Block(*spans) if spans else None)
        return found

    def _tissue(self, view: View, lesions: list[Lesion], strip: Block) -> tuple:
        """Sample the moved tissue on a few rows of rays.

        Returns:
            Density (rows, steps, columns), the donor's places, and the lesions near with where.
        """
        points = self.donor_places(view, strip)
        near = [(lesion, self._near(points, lesion)) for lesion in lesions]
        near = [(lesion, place) for lesion, place in near if place]
        for lesion, place in near:
            if lesion.move:
                points = tuple(p.contiguous() for p in points)
                moved = lesion.move(tuple(p[place] for p in points))
                for p, q in zip(points, moved, strict=True):
                    p[place] = q
        grid = [2.0 * p / size - 1.0 for p, size in zip(points, self.extent_mm, strict=True)]
        grid = torch.stack(grid, dim=-1)[None]
        return F.grid_sample(self.volume, grid, align_corners=True)[0, 0], points, near

    def _integrate(self, density: Tensor, points: tuple, near: list) -> tuple:
        """Put lesions into the tissue, which is changed, and sum along the rays."""
        metal = torch.zeros(density.shape[0], density.shape[2])
        for lesion, place in near:
            if lesion.fill is None and not lesion.metal:
                continue
            share = lesion.region(tuple(p[place] for p in points))
            if lesion.fill is not None:
                density[place] += share * (lesion.fill - density[place])
            if lesion.metal:
                metal[place[0], place[2]] += share.sum(dim=1) * lesion.metal  # g/cm³ times steps
                density[place] *= 1.0 - share
        bone = ((density - BONE_FROM) / BONE_SPAN).clamp(min=0.0)
        soft = density.clamp(max=BONE_FROM) * (1.0 - bone).clamp(min=0.0)
        cm = STEP_MM / 10.0
        bone_path = bone.sum(dim=1) * (1.92 * cm * self.shape.bone)
        return (soft.sum(dim=1) * (cm / 1000.0)).numpy(), bone_path.numpy(), (metal * cm).numpy()

    @staticmethod
    def _near(points: tuple[Tensor, Tensor, Tensor], lesion: Lesion) -> tuple | None:
        """Return the slices of a strip that hold a lesion's sphere, or None."""
        every = 3
        coarse = (p[::every, ::every, ::every] for p in points)
        square = sum((p - float(c)) ** 2 for p, c in zip(coarse, lesion.centre_mm, strict=True))
        near = (square < (lesion.reach_mm + every * STEP_MM) ** 2).numpy()
        slices = []
        for axis, size in enumerate(points[0].shape):
            where = np.flatnonzero(near.any(axis=tuple({0, 1, 2} - {axis}))) * every
            if not len(where):
                return None
            slices.append(
                slice(max(int(where[0]) - every, 0), min(int(where[-1]) + 2 * every, size))
            )
        return tuple(slices)


def _strips(block: Block) -> Iterator[Block]:
    """Cut a block into strips of a few rows, each small enough to be sampled in one go."""
    columns, steps = (high - low for low, high in (block.columns, block.steps))
    at_once = max(1, SAMPLES // (columns * steps))
    for start in range(block.rows[0], block.rows[1], at_once):
        rows = (start, min(start + at_once, block.rows[1]))
        yield Block(rows, block.columns, block.steps)


def _join(strips: Iterable[tuple]) -> Paths:
    """Put strips together again."""
    return Paths(*(np.concatenate(part) for part in zip(*strips, strict=True)))


def _count(size_mm: float) -> int:
    return round(size_mm / GRID_MM)


def _slimmer(offset: Tensor, girth: float) -> Tensor:
    """Map a patient's distance from the spine to the donor's: beyond 45 mm it is scaled."""
    beyond = (offset.abs() - 45.0).clamp(min=0.0)
    return offset - offset.sign() * beyond * (1.0 - 1.0 / girth)


def transmission(paths: Paths) -> np.ndarray:
    """Return the share of photons that passes, by the Beer–Lambert law.

    Each energy of a small spectrum decays by exp(-sum of mass attenuation times path); what
    arrives is their weighted sum, so a thick part hardens the beam.

    Returns:
        Shape (rows, columns), above 0 and at most 1.
    """
    arrived = np.zeros(paths.soft.shape)
    for weight, water, bone, metal in zip(
        ENERGY_WEIGHTS, WATER, CORTICAL_BONE, TITANIUM, strict=True
    ):
        arrived += weight * np.exp(-(water * paths.soft + bone * paths.bone + metal * paths.metal))
    return arrived


def expose(
    arrived: np.ndarray, spacing_mm: float, photons: float, scatter: float, rng: np.random.Generator
) -> np.ndarray:
    """Turn transmission into a detector's signal: scatter, focal spot, quanta, blur.

    Args:
        arrived: Share of photons that passes, shape (H, W).
        spacing_mm: Pixel size in the plane of the spine.
        photons: Quanta that reach a pixel of mean transmission: the exposure.
        scatter: Scattered over primary radiation behind the grid.
        rng: Source of the quanta.

    Returns:
        Signal relative to its mean, shape (H, W), above 0.
    """
    haze = _smooth(arrived, 25.0 / spacing_mm)
    signal = (arrived + scatter * haze) / (1.0 + scatter)
    signal = cv2.GaussianBlur(signal, (0, 0), 0.18 / spacing_mm)  # focal spot, 0.6 mm
    signal = signal / signal.mean()
    quanta = rng.poisson(signal * photons).astype(np.float64) / photons
    blurred = cv2.GaussianBlur(quanta, (0, 0), 0.12 / spacing_mm)  # scintillator
    return np.maximum(blurred, 1e-4)


def develop(signal: np.ndarray, spacing_mm: float, contrast: float, detail: float) -> np.ndarray:
    """Turn a detector's signal into the grey values of a film for reading.

    A logarithm (so that thickness adds), less of the slow variation (so that the whole field is
    readable), enhancement of detail, and an S-shaped tone curve, as radiography systems do.

    Args:
        signal: As `expose` returns it, shape (H, W).
        spacing_mm: Pixel size in the plane of the spine.
        contrast: Steepness of the tone curve.
        detail: Gain of structures between 1 and 8 mm.

    Returns:
        Shape (H, W), 0 black (air) to 1 white (metal).
    """
    dense = -np.log(signal)
    # Metal is left out of what the film is adapted to: it would darken all the rest.
    ceiling = np.percentile(dense, 90.0) + 0.3
    tissue = np.minimum(dense, ceiling)
    slow = _smooth(tissue, 18.0 / spacing_mm)
    middle, fine = _smooth(tissue, 5.0 / spacing_mm), _smooth(dense, 0.8 / spacing_mm)
    image = dense - 0.65 * (slow - slow.mean()) + detail * (np.minimum(fine, ceiling) - middle)
    low, high = np.percentile(image, (2.0, 90.0))
    high += 0.25 * (high - low)
    scaled = (image - low) / (high - low) * 2.0 - 1.0
    curve = 0.5 + 0.5 * np.tanh(contrast * scaled) / np.tanh(contrast)
    return np.clip(curve, 0.0, 1.0)


def _smooth(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Blur by a Gaussian; wide ones on a smaller copy, which is as good and much faster."""
    shrink = max(1, int(sigma_px / 6.0))
    small = cv2.resize(image, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma_px / shrink, borderType=cv2.BORDER_REFLECT)
    return cv2.resize(small, image.shape[::-1], interpolation=cv2.INTER_CUBIC)

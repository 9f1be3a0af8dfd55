"""Projection: a patient's shape, the rays of a view, and what each ray passes through.

Each sample of a ray through the patient is mapped to a position in the donor's volume, where
lesions move tissue, change its density or replace it by metal. `acquisition` turns the integrals
into a radiograph.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from dernet_utils.virtual.acquisition import SOURCE_MM, Paths
from dernet_utils.virtual.donor import Donor
from dernet_utils.virtual.lesions import Lesion
from dernet_utils.virtual.spine import Vertebra

# Rays and their samples.
GRID_MM = 0.5  # distance of the rays in the plane of the spine
STEP_MM = 0.75  # distance of the samples along a ray near the spine
FAR_STEP_MM = 4.0  # distance elsewhere; halves the computing time without visible change
NEAR_MM = 56.0  # depth before and behind the spine in which the finer steps are used
MARGIN_MM = 14.0  # allowance for the displacement of a lesion by itself or by another
# Materials.
BONE_FROM = 1080.0  # HU + 1000 above which tissue counts partly as bone
BONE_SPAN = 1520.0  # from there up to pure cortical bone
CORTICAL_G_CM3 = 1.92  # density of cortical bone
COMPACT = (1500.0, 2000.0)  # HU + 1000: trabecular bone below, compact bone above
COMPACT_LOSS = 0.35  # compact bone keeps more: its mineral is the trabecular's to this power; ours
BEYOND_MM = 45.0  # distance from the spine beyond which girth scales the donor's body
# Size of one computation.
SAMPLES = 700_000  # limits memory, and fits the processor's cache
MOST_ROWS = 24  # of rays and
MOST_STEPS = 40  # of their samples: OpenCV limits the stack of slices in between to 32,767 rows


@dataclass(frozen=True)
class Shape:
    """How a patient's body differs from the donor's; functions of height are tables.

    Attributes:
        z_patient_mm, z_donor_mm: Corresponding heights, both increasing; shape (n,).
        shift_x_mm, shift_y_mm: Offset of the spine at those heights (scoliosis, kyphosis).
        turn_rad: Axial rotation at those heights.
        girth: Width of the soft tissue beside the spine, relative to the donor's.
        bone: Mineral of trabecular bone, 1 at about 50 years; compact bone differs less.
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
    """The geometry of a radiograph.

    Attributes:
        name: ``AP``, ``LATERAL``, ``LPO`` or ``RPO``.
        angle_rad: Direction of the beam: 0 from front to back, pi/2 from right to left.
        aim_mm: Donor position (x, y, z) at the centre of the image.
        height_mm, width_mm: Rendered field in the plane of the spine.
        tilt_deg: Rotation of the detector in its plane.
        mirrored: Whether the image is shown mirrored.
    """

    name: str
    angle_rad: float
    aim_mm: np.ndarray
    height_mm: float
    width_mm: float
    tilt_deg: float
    mirrored: bool


@dataclass(frozen=True)
class Block:
    """A part of a view: rows, columns and depth steps, as half-open index ranges."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    steps: tuple[int, int]


class Scene:
    """One patient in front of the X-ray tube.

    Args:
        donor: The volume.
        spine: The donor's vertebrae, from the lowest up; the beam's aim follows their axis.
        shape: How the patient's body differs from the donor's.
        lesions: All lesions of the patient.
    """

    def __init__(self, donor: Donor, spine: list[Vertebra], shape: Shape, lesions: list[Lesion]):
        self.density, self.spacing_mm = donor.density, donor.spacing_mm
        z, y, x = donor.density.shape
        self.extent_mm = [
            (n - 1) * s for n, s in zip((x, y, z), donor.spacing_mm[::-1], strict=True)
        ]
        self.axis = np.array([body.centre_mm for body in spine])
        self.shape = shape
        self.lesions = lesions

    def whole(self, view: View) -> Block:
        """Return the block of a whole view."""
        steps = len(self._depths(view)[0])
        return Block((0, _count(view.height_mm)), (0, _count(view.width_mm)), (0, steps))

    def _depths(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Return the depths of a ray's samples behind the spine's plane and their spacings, mm."""
        sides = [(-a * self.shape.girth, (e - a) * self.shape.girth)
                 for a, e in zip(view.aim_mm, self.extent_mm[:2], strict=False)]  # fmt: skip
        along = [x * np.sin(view.angle_rad) - y * np.cos(view.angle_rad)
                 for x in sides[0] for y in sides[1]]  # fmt: skip
        # A turned box is deeper at its corners than the round body.
        before, behind = (max(0.97 * a, NEAR_MM) for a in (-min(along), max(along)))
        middle = np.arange(-NEAR_MM, NEAR_MM, STEP_MM) + STEP_MM / 2
        front = -NEAR_MM - np.arange(0.0, before - NEAR_MM, FAR_STEP_MM)[::-1] - FAR_STEP_MM / 2
        back = NEAR_MM + np.arange(0.0, behind - NEAR_MM, FAR_STEP_MM) + FAR_STEP_MM / 2
        far = [np.full(len(part), FAR_STEP_MM) for part in (front, back)]
        apart = [far[0], np.full(len(middle), STEP_MM), far[1]]
        return np.concatenate([front, middle, back]), np.concatenate(apart)

    def donor_positions(
        self, view: View, block: Block, every: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the donor position of each sample along the rays of a block.

        Args:
            view: The geometry.
            block: The part of the view.
            every: Take every n-th row, step and column.

        Returns:
            x, y, z in donor millimetres, each of shape (rows, steps, columns).
        """
        whole, shape = self.whole(view), self.shape
        row = (np.arange(*block.rows, every) - (whole.rows[1] - 1) / 2) * -GRID_MM
        column = (np.arange(*block.columns, every) - (whole.columns[1] - 1) / 2) * GRID_MM
        depth = self._depths(view)[0][slice(*block.steps, every)]
        wider = (SOURCE_MM + depth) / SOURCE_MM  # the beam diverges
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
        # Offset of the image's middle line from the spine, before the body's rotation.
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
        """Integrate soft tissue, bone and metal along every ray.

        Args:
            view: The geometry.
            lesions: The lesions that are present.
            block: The part of the view; None for all of it.
        """
        block = block or self.whole(view)
        return _join(
            _add(
                self._integrate(*self._tissue(view, lesions, part), self._apart(view, part))
                for part in strip
            )
            for strip in _strips(block)
        )

    def _apart(self, view: View, block: Block) -> Tensor:
        """Return the distances of a block's samples, cm, shape (steps,)."""
        return torch.from_numpy(self._depths(view)[1][slice(*block.steps)] / 10.0).float()

    def counterfactuals(
        self, view: View, lesions: list[Lesion], finding: list[Lesion], block: Block
    ) -> tuple[Paths, Paths]:
        """Integrate a block twice: with all lesions, and without those of one finding.

        Args:
            view: The geometry.
            lesions: All lesions of the patient.
            finding: Those of the finding.
            block: The part of the view that the finding covers.
        """
        others = [lesion for lesion in lesions if lesion not in finding]
        if any(lesion.move for lesion in finding):
            return self.paths(view, lesions, block), self.paths(view, others, block)
        # Nothing moves: rays and tissue are the same in both before lesions are inserted.
        pairs = []
        for strip in _strips(block):
            parts = []
            for part in strip:
                density, near = self._tissue(view, lesions, part)
                rest = [some for some in near if some[0] not in finding]
                both, apart = ((near, density.clone()), (rest, density)), self._apart(view, part)
                parts.append([self._integrate(tissue, some, apart) for some, tissue in both])
            pairs.append([_add(own) for own in zip(*parts, strict=True)])
        with_it, without = map(_join, zip(*pairs, strict=True))
        return with_it, without

    def shadow(
        self, view: View, finding: list[Lesion], lesions: list[Lesion], block: Block
    ) -> np.ndarray:
        """Return the length of each ray inside a finding's regions, mm, (rows, columns)."""
        points = tuple(p.contiguous() for p in self.donor_positions(view, block))
        self._move(points, [(other, self._near(points, other)) for other in lesions if other.move])
        solid = torch.zeros(points[0].shape)
        for lesion in finding:
            where = self._near(points, lesion)
            if where:
                occupancy = lesion.region(tuple(p[where] for p in points))
                solid[where] = torch.maximum(solid[where], occupancy)
        return _along(solid, self._apart(view, block)).numpy() * 10.0

    def blocks(self, view: View, findings: list[list[Lesion]]) -> list[Block | None]:
        """Return the part of a view that each finding covers; None outside the field."""
        whole, every = self.whole(view), 4
        points = self.donor_positions(view, whole, every)
        found = []
        for finding in findings:
            near = np.zeros(points[0].shape, bool)
            for lesion in finding:
                offset = zip(points, lesion.centre_mm, strict=True)
                square = sum((p - float(c)) ** 2 for p, c in offset)
                near |= (square < (lesion.size_mm + MARGIN_MM) ** 2).numpy()
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
        """Sample the tissue, as lesions move it, on a few rows of rays.

        Returns:
            Density, shape (rows, steps, columns), and the nearby lesions that change tissue: each
            with the slices around it and its occupancy there.
        """
        points = tuple(p.contiguous() for p in self.donor_positions(view, strip))
        near = [(lesion, self._near(points, lesion)) for lesion in lesions]
        near = [(lesion, where) for lesion, where in near if where]
        self._move(points, near)
        changing = [
            (lesion, where, lesion.region(tuple(p[where] for p in points)))
            for lesion, where in near
            if lesion.fill is not None or lesion.metal
        ]
        return torch.from_numpy(self._sample(*(p.numpy() for p in points))), changing

    def _sample(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Interpolate the donor's density at positions in mm; 0 outside the scan.

        The two neighbouring slices are sampled as images and blended: OpenCV does this several
        times faster than a general sampler of volumes. The slices are stacked in one tall image;
        the first and last rows of each slice are air.
        """
        slice_mm, row_mm, column_mm = self.spacing_mm
        count, rows = self.density.shape[:2]
        z = z / slice_mm
        inside = (z >= 0.0) & (z <= count - 1)
        lower = np.clip(np.floor(z), 0, count - 2)
        fraction = (z - lower) * inside
        first, last = int(lower.min()), int(lower.max()) + 2
        tall = self.density[first:last].reshape(-1, self.density.shape[2])
        across = x * np.float32(1.0 / column_mm)
        down = np.clip(y * np.float32(1.0 / row_mm), 0.0, rows - 1.0)
        down += (lower - first) * np.float32(rows)
        flat = (-1, x.shape[-1])
        below, above = (
            cv2.remap(tall, across.reshape(flat), (down + shift).reshape(flat), cv2.INTER_LINEAR,
                      borderMode=cv2.BORDER_CONSTANT).reshape(x.shape).astype(np.float32)
            for shift in (np.float32(0.0), np.float32(rows))
        )  # fmt: skip
        below *= inside - fraction
        above *= fraction
        below += above
        return below

    @staticmethod
    def _move(points: tuple, near: list) -> None:
        """Replace each position that lesions move by the position of its tissue in the donor."""
        for lesion, where in near:
            if lesion.move and where:
                moved = lesion.move(tuple(p[where] for p in points))
                for p, q in zip(points, moved, strict=True):
                    p[where] = q

    def _integrate(self, density: Tensor, near: list, apart: Tensor) -> tuple:
        """Insert lesions into the density, in place, and integrate along the rays: g/cm²."""
        metal = torch.zeros(density.shape) if any(some.metal for some, *_ in near) else None
        for lesion, where, occupancy in near:
            if lesion.fill is not None:
                density[where] += occupancy * (lesion.fill - density[where])
            if lesion.metal:
                metal[where] = torch.maximum(metal[where], occupancy * lesion.metal)  # g/cm³
                density[where] *= 1.0 - occupancy
        low, high = COMPACT
        compact = ((density - low) / (high - low)).clamp(0.0, 1.0)
        bone = ((density - BONE_FROM) / BONE_SPAN).clamp(min=0.0)
        soft = density.clamp(max=BONE_FROM) * (1.0 - bone).clamp(min=0.0)
        metal = torch.zeros(bone[:, 0].shape) if metal is None else _along(metal, apart)
        soft = _along(soft, apart) / 1000.0
        mineral = self.shape.bone + compact * (self.shape.bone**COMPACT_LOSS - self.shape.bone)
        bone = _along(bone * mineral, apart) * CORTICAL_G_CM3
        return soft.numpy(), bone.numpy(), metal.numpy()

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


def _along(values: Tensor, apart: Tensor) -> Tensor:
    """Integrate along the rays: (rows, steps, columns) and (steps,) give (rows, columns)."""
    return torch.einsum("rsc,s->rc", values, apart)


def _strips(block: Block) -> Iterator[list[Block]]:
    """Cut a block into strips of a few rows, and each of these into parts along the rays."""
    columns = block.columns[1] - block.columns[0]
    at_once = min(max(1, SAMPLES // (columns * MOST_STEPS)), MOST_ROWS)
    for rows in _cut(block.rows, at_once):
        yield [Block(rows, block.columns, steps) for steps in _cut(block.steps, MOST_STEPS)]


def _cut(span: tuple[int, int], most: int) -> list[tuple[int, int]]:
    """Cut a half-open range of indices into ranges of at most `most`."""
    return [(start, min(start + most, span[1])) for start in range(*span, most)]


def _add(parts: Iterable[tuple]) -> tuple:
    """Add the integrals over the parts of the same rays."""
    return tuple(sum(own) for own in zip(*parts, strict=True))


def _join(strips: Iterable[tuple]) -> Paths:
    """Join the strips of a block."""
    return Paths(*(np.concatenate(part) for part in zip(*strips, strict=True)))


def _count(size_mm: float) -> int:
    return round(size_mm / GRID_MM)


def _slimmer(offset: Tensor, girth: float) -> Tensor:
    """Map a patient's offset from the spine to the donor's: scaled beyond `BEYOND_MM`."""
    return torch.lerp(offset.clamp(-BEYOND_MM, BEYOND_MM), offset, 1.0 / girth)

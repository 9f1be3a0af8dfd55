"""Projection: a patient's shape, the rays of a view, and what each ray passes through.

Each sample of a ray through the patient is mapped to a position in the donor's volume, where
lesions move tissue, change its density or replace it by metal. `acquisition` turns the integrals
into a radiograph.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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
FAR_STEP_MM = 4.0  # distance elsewhere, where tissue is only
FAR_RAYS = 2  # sampled along every other ray: without visible change, a fifth of the samples
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


@dataclass(frozen=True)
class Trace:
    """What the rays of a view pass through, and each finding's part in it.

    Attributes:
        paths: With all findings.
        lengths_mm: For each finding, the length of each ray inside its regions, (rows, columns).
        removed: For each finding, the paths without it less those with it.
    """

    paths: Paths
    lengths_mm: list[np.ndarray]
    removed: list[Paths]


class Scene:
    """One patient in front of the X-ray tube.

    Args:
        donor: The volume.
        spine: The donor's vertebrae, from the lowest up; the beam's aim follows their axis.
        shape: How the patient's body differs from the donor's.
    """

    def __init__(self, donor: Donor, spine: list[Vertebra], shape: Shape):
        self.density, self.spacing_mm = donor.density, donor.spacing_mm
        z, y, x = donor.density.shape
        self.extent_mm = [
            (n - 1) * s for n, s in zip((x, y, z), donor.spacing_mm[::-1], strict=True)
        ]
        self.axis = np.array([body.centre_mm for body in spine])
        self.shape = shape

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

    def _segments(self, view: View, block: Block) -> Iterator[tuple[Block, int]]:
        """Cut a block where the samples' spacing changes; with each part comes the rays' spacing.

        Far from the spine, where only every `FAR_RAYS`-th ray is sampled, a part begins and ends
        with a ray that is.
        """
        fine = self._depths(view)[1] == STEP_MM
        edges = [0, int(np.argmax(fine)), len(fine) - int(np.argmax(fine[::-1])), len(fine)]
        for start, end in pairwise(edges):
            steps = max(start, block.steps[0]), min(end, block.steps[1])
            if steps[0] < steps[1]:
                yield Block(block.rows, block.columns, steps), 1 if fine[start] else FAR_RAYS

    def donor_positions(
        self, view: View, block: Block, rays: int = 1, steps: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the donor position of each sample along the rays of a block.

        Args:
            view: The geometry.
            block: The part of the view.
            rays: Take every n-th row and column.
            steps: Take every n-th step.

        Returns:
            x, y, z in donor millimetres, each of shape (rows, steps, columns).
        """
        whole, shape = self.whole(view), self.shape
        row = (np.arange(*block.rows, rays) - (whole.rows[1] - 1) / 2) * -GRID_MM
        column = (np.arange(*block.columns, rays) - (whole.columns[1] - 1) / 2) * GRID_MM
        depth = self._depths(view)[0][slice(*block.steps, steps)]
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
        return Paths(*self._march(view, lesions, [], block or self.whole(view)))

    def trace(self, view: View, findings: list[list[Lesion]]) -> Trace:
        """Integrate along every ray, with all findings and without each of them.

        Args:
            view: The geometry.
            findings: The lesions of each finding of the patient.
        """
        whole = self.whole(view)
        lesions = [lesion for finding in findings for lesion in finding]
        planes = self._march(view, lesions, findings, whole)
        traced = Trace(Paths(*planes[:3]), list(planes[3::4]), [])
        for number, finding in enumerate(findings):
            removed = planes[4 + 4 * number : 7 + 4 * number]
            block = self._block(view, finding) if _moves(finding) else None
            if block:  # its rays pass through other tissue without it
                where = slice(*block.rows), slice(*block.columns)
                others = [lesion for lesion in lesions if lesion not in finding]
                with_it = self._march(view, lesions, [], block)
                removed[:, *where] = self._march(view, others, [], block) - with_it
            traced.removed.append(Paths(*removed))
        return traced

    def _march(
        self, view: View, lesions: list[Lesion], findings: list[list[Lesion]], block: Block
    ) -> np.ndarray:
        """Integrate along the rays of a block.

        Returns:
            Float32 of shape (3 + 4 n, rows, columns) for n findings: soft tissue, bone and metal;
            then for each finding the length inside it, mm, and the three without it less the three
            with it (zero for a finding that moves tissue).
        """
        (top, bottom), (left, right) = block.rows, block.columns
        total = np.zeros((3 + 4 * len(findings), bottom - top, right - left), np.float32)
        for part, rays in self._segments(view, block):
            start = top - top % rays, left - left % rays
            sparse = Block((start[0], bottom + rays - 1), (start[1], right + rays - 1), part.steps)
            planes = np.concatenate(
                [sum(self._chunk(view, lesions, findings, chunk, rays) for chunk in strip)
                 for strip in _strips(sparse, rays)], axis=1,
            )  # fmt: skip
            total += _between(planes, rays, (top - start[0], left - start[1]), total.shape[1:])
        return total

    def _chunk(
        self,
        view: View,
        lesions: list[Lesion],
        findings: list[list[Lesion]],
        chunk: Block,
        rays: int,
    ) -> np.ndarray:
        """Return what `_march` returns, for a few rows of rays and a few of their samples."""
        points = tuple(p.contiguous() for p in self.donor_positions(view, chunk, rays))
        steps_mm = self._depths(view)[1][slice(*chunk.steps)]
        apart_cm = torch.from_numpy(steps_mm / 10.0).float()
        spacing_mm = max(GRID_MM * rays, float(steps_mm.max()))
        for lesion in lesions:
            if lesion.move and (where := _near(points, lesion, lesion.reach_mm, spacing_mm)):
                # Each position becomes that of its tissue in the donor.
                for p, q in zip(points, lesion.move(tuple(p[where] for p in points)), strict=True):
                    p[where] = q
        density = torch.from_numpy(self._sample(*(p.numpy() for p in points)))
        shown = {lesion for finding in findings for lesion in finding}
        inside = []
        for lesion in lesions:
            if not (lesion in shown or _replaces(lesion)):
                continue
            if where := _near(points, lesion, lesion.size_mm, spacing_mm):
                occupancy = lesion.region(tuple(p[where] for p in points))
                inside.append(_Inside(lesion, where, occupancy))
        planes = np.zeros((3 + 4 * len(findings), len(points[0]), points[0].shape[2]), np.float32)
        for number, finding in enumerate(findings):
            own = [part for part in inside if part.lesion in finding]
            if own:
                box = _around([part.where for part in own])
                here = np.s_[3 + 4 * number : 7 + 4 * number, box[0], box[2]]
                planes[here] += self._without(density[box], inside, finding, box, apart_cm[box[1]])
        planes[:3] = self._integrate(density, inside, apart_cm)
        return planes

    def _without(
        self,
        density: Tensor,
        inside: list["_Inside"],
        finding: list[Lesion],
        box: tuple[slice, ...],
        apart_cm: Tensor,
    ) -> np.ndarray:
        """Return a finding's four planes of `_march` in the box around it."""
        inside = [part for part in (one.within(box) for one in inside) if part]
        solid = torch.zeros(density.shape)
        for part in inside:
            if part.lesion in finding:
                solid[part.where] = torch.maximum(solid[part.where], part.occupancy)
        planes = np.zeros((4, len(density), density.shape[2]), np.float32)
        planes[0] = _along(solid, apart_cm).numpy() * 10.0
        if not _moves(finding):
            others = [part for part in inside if part.lesion not in finding]
            with_it, without = (
                self._integrate(density.clone(), some, apart_cm) for some in (inside, others)
            )
            planes[1:] = without - with_it
        return planes

    def _block(self, view: View, finding: list[Lesion]) -> Block | None:
        """Return the part of a view that a finding covers; None outside the field."""
        whole, every = self.whole(view), 4
        points = self.donor_positions(view, whole, every, every)
        near = np.zeros(points[0].shape, bool)
        for lesion in finding:
            offset = zip(points, lesion.centre_mm, strict=True)
            square = sum((p - float(c)) ** 2 for p, c in offset)
            near |= (square < (lesion.size_mm + MARGIN_MM) ** 2).numpy()
        spans = []
        for axis, count in ((0, whole.rows[1]), (2, whole.columns[1]), (1, whole.steps[1])):
            where = np.flatnonzero(near.any(axis=tuple({0, 1, 2} - {axis}))) * every
            if not len(where):
                return None
            spans.append((max(int(where[0]) - every, 0), min(int(where[-1]) + every, count)))
        return Block(*spans)

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

    def _integrate(self, density: Tensor, inside: list["_Inside"], apart_cm: Tensor) -> np.ndarray:
        """Insert lesions into the density, in place, and integrate along the rays: g/cm²."""
        inside = [part for part in inside if _replaces(part.lesion)]
        metal = torch.zeros(density.shape) if any(part.lesion.metal for part in inside) else None
        filled = []  # where a lesion's own bone stands, whose mineral does not depend on age
        for lesion, where, occupancy in inside:
            if lesion.fill is not None:
                more = lesion.fill - density[where]
                weight = occupancy if lesion.lytic else occupancy * (more > 0.0)
                density[where] += weight * more
                filled.append((where, weight))
            if lesion.metal:
                metal[where] = torch.maximum(metal[where], occupancy * lesion.metal)  # g/cm³
                density[where] *= 1.0 - occupancy
        low, high = COMPACT
        mineral = ((density - low) / (high - low)).clamp_(0.0, 1.0)  # fraction of compact bone
        mineral.mul_(self.shape.bone**COMPACT_LOSS - self.shape.bone).add_(self.shape.bone)
        for where, weight in filled:
            mineral[where] += weight * (1.0 - mineral[where])
        bone = ((density - BONE_FROM) / BONE_SPAN).clamp_(min=0.0)
        soft = density.clamp_(max=BONE_FROM).mul_((1.0 - bone).clamp_(min=0.0))
        planes = np.zeros((3, len(density), density.shape[2]), np.float32)
        planes[0] = _along(soft, apart_cm / 1000.0)
        planes[1] = _along(bone.mul_(mineral), apart_cm * CORTICAL_G_CM3)
        if metal is not None:
            planes[2] = _along(metal, apart_cm)
        return planes


class _Inside(NamedTuple):
    """A lesion's occupancy in a part of an array of samples."""

    lesion: Lesion
    where: tuple[slice, ...]
    occupancy: Tensor

    def within(self, box: tuple[slice, ...]) -> "_Inside | None":
        """Return what lies in a box, in the box's own indices; None where nothing does."""
        common = [(max(a.start, b.start), min(a.stop, b.stop))
                  for a, b in zip(self.where, box, strict=True)]  # fmt: skip
        if any(start >= stop for start, stop in common):
            return None
        own, there = (
            tuple(slice(start - a.start, stop - a.start)
                  for (start, stop), a in zip(common, frame, strict=True))
            for frame in (self.where, box)
        )  # fmt: skip
        return _Inside(self.lesion, there, self.occupancy[own])


def _moves(finding: list[Lesion]) -> bool:
    return any(lesion.move for lesion in finding)


def _replaces(lesion: Lesion) -> bool:
    return lesion.fill is not None or lesion.metal > 0.0


def _near(points: tuple, lesion: Lesion, reach_mm: float, spacing_mm: float) -> tuple | None:
    """Return the slices of a chunk that hold a sphere about a lesion's centre, or None."""
    every = 3
    within = reach_mm + every * spacing_mm
    offset = [p[::every, ::every, ::every] - float(c)
              for p, c in zip(points, lesion.centre_mm, strict=True)]  # fmt: skip
    # Heights change least within a chunk, so they decide first.
    if float(offset[2].min()) > within or float(offset[2].max()) < -within:
        return None
    near = (sum(o * o for o in offset) < within**2).numpy()
    slices = []
    for axis, size in enumerate(points[0].shape):
        where = np.flatnonzero(near.any(axis=tuple({0, 1, 2} - {axis}))) * every
        if not len(where):
            return None
        slices.append(slice(max(int(where[0]) - every, 0), min(int(where[-1]) + 2 * every, size)))
    return tuple(slices)


def _around(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...]:
    """Return the smallest box that holds all boxes."""
    return tuple(
        slice(min(s.start for s in own), max(s.stop for s in own))
        for own in zip(*boxes, strict=True)
    )


def _between(
    planes: np.ndarray, rays: int, start: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Interpolate planes between every n-th ray, from an offset in rays."""
    if rays == 1:
        return planes
    matrix = np.array([[1.0, 0.0, start[1]], [0.0, 1.0, start[0]]]) / rays
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.stack([
        cv2.warpAffine(plane, matrix, size[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
        for plane in planes
    ])  # fmt: skip


def _along(values: Tensor, apart: Tensor) -> Tensor:
    """Integrate along the rays: (rows, steps, columns) and (steps,) give (rows, columns)."""
    return torch.einsum("rsc,s->rc", values, apart)


def _strips(block: Block, rays: int) -> Iterator[list[Block]]:
    """Cut a block into strips of a few rows, and each of these into parts along the rays."""
    columns = -(-(block.columns[1] - block.columns[0]) // rays)
    at_once = min(max(1, SAMPLES // (columns * MOST_STEPS)), MOST_ROWS // rays) * rays
    for rows in _cut(block.rows, at_once):
        yield [Block(rows, block.columns, steps) for steps in _cut(block.steps, MOST_STEPS)]


def _cut(span: tuple[int, int], most: int) -> list[tuple[int, int]]:
    """Cut a half-open range of indices into ranges of at most `most`."""
    return [(start, min(start + most, span[1])) for start in range(*span, most)]


def _count(size_mm: float) -> int:
    return round(size_mm / GRID_MM)


def _slimmer(offset: Tensor, girth: float) -> Tensor:
    """Map a patient's offset from the spine to the donor's: scaled beyond `BEYOND_MM`."""
    return torch.lerp(offset.clamp(-BEYOND_MM, BEYOND_MM), offset, 1.0 / girth)

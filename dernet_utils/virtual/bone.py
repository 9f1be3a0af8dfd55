"""Bone finer than the scanner resolves: cortex, endplates and trabeculae of the vertebrae.

A CT with slices of 2.5 mm blurs a cortex of less than a millimetre over its voxels, and shows no
trabeculae. A radiograph shows both. So inside each labelled vertebra the scan's density is replaced
by a model: a continuous shell along the label's smoothed surface, around a trabecular interior
whose mean is the scan's own.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.interpolate import make_interp_spline

SLICE_MM, PIXEL_MM = 0.6, 0.5  # of the fine grid; detail of a millimetre survives on it
CORTEX = 2350.0  # HU + 1000: cortical bone at the resolution of the grid
# The shell of a lumbar body is about 0.4 mm thick (Silva, Bone 1994; 15: 409). On this grid it
# needs 0.75 mm, and so has about one and a half times the mineral. An arch's is thicker; ours.
BODY_CORTEX_MM, ARCH_CORTEX_MM = 0.75, 1.35
ARCH_MM = (4.0, 7.0)  # depth of a part's middle under its surface: an arch below, a body above
EDGE_MM = 0.5  # over which density rises at a surface
SCANNER_MM = 3.0  # reach of the scanner's blur around a vertebra
MARROW_MM = 2.0  # depth from which the scan's density is free of the blurred cortex
# Trabecular bone of a vertebral body at about 50 years (Jang, Radiology 2019). The built-in donor's
# has lost half of it; a patient's own share is `projection.Shape.bone`.
NORMAL = 1180.0  # HU + 1000
TRABECULAR = (1090.0, 1500.0)  # range of its local mean
# Trabeculae: vertical plates and rods about a millimetre apart, held by thinner horizontal ones.
TEXTURE = 0.25  # SD of their density relative to the mean above water
ALONG_MM, ACROSS_MM = 2.2, 0.45


def fine_grid(shape: tuple[int, ...], sizes: tuple) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the shape and the voxel sizes of a fine volume from a scan's first to last voxel."""
    counts, steps = [], []
    for count, size, wanted in zip(shape, sizes, (SLICE_MM, PIXEL_MM, PIXEL_MM), strict=True):
        extent = (count - 1) * size
        counts.append(max(2, round(extent / wanted) + 1))
        steps.append(extent / (counts[-1] - 1))
    return tuple(counts), tuple(steps)


def refine(volume: np.ndarray, at: Sequence[np.ndarray]) -> np.ndarray:
    """Interpolate a volume on a finer grid by cubic splines.

    A spline's values are linear in the data, so each axis is one product with a matrix.

    Args:
        volume: Shape (Z, Y, X), at least four voxels along each axis.
        at: Positions along z, y and x in voxels of `volume`, within it.

    Returns:
        Float32, shape (len(z), len(y), len(x)).
    """
    z, y, x = (
        make_interp_spline(np.arange(count), np.eye(count), k=3)(positions).astype(np.float32)
        for count, positions in zip(volume.shape, at, strict=True)
    )
    return np.tensordot(z, y @ (volume.astype(np.float32) @ x.T), axes=1)


def add_fine_bone(
    density: np.ndarray,
    spacing_mm: tuple[float, float, float],
    labels: np.ndarray,
    sizes: tuple[float, float, float],
) -> None:
    """Replace the vertebrae of a fine volume, in place, by the model.

    Args:
        density: HU + 1000, float32, shape (Z, Y, X).
        spacing_mm: Its voxel size (z, y, x), mm.
        labels: The scan's vertebra numbers, 0 elsewhere; its first and last voxels lie where those
            of `density` lie.
        sizes: Voxel size of the labels (z, y, x), mm.
    """
    rng = np.random.default_rng(0)  # the trabeculae belong to the donor
    for label, where in enumerate(ndimage.find_objects(labels), 1):
        if where is None:
            continue
        margin = [int(np.ceil(2 * SCANNER_MM / size)) for size in sizes]
        coarse = tuple(
            slice(max(a.start - m, 0), min(a.stop + m, n))
            for a, m, n in zip(where, margin, labels.shape, strict=True)
        )
        fine = tuple(
            slice(int(np.ceil(a.start * size / step)), int((a.stop - 1) * size / step + 1e-6) + 1)
            for a, size, step in zip(coarse, sizes, spacing_mm, strict=True)
        )
        at = tuple(
            np.arange(f.start, f.stop) * step / size - a.start
            for f, a, size, step in zip(fine, coarse, sizes, spacing_mm, strict=True)
        )
        surface = refine(_signed_distance(labels[coarse] == label, sizes), at)
        density[fine] = _with_bone(density[fine], surface, spacing_mm, rng)


def _signed_distance(bone: np.ndarray, sizes: tuple[float, float, float]) -> np.ndarray:
    """Return the distance to a label's surface, mm, negative inside; smoothed over its voxels."""
    outside, inside = (ndimage.distance_transform_edt(m, sampling=sizes) for m in (~bone, bone))
    half = min(sizes) / 2  # a surface lies between the centres of two voxels
    distance = np.where(bone, half - inside, outside - half)
    return ndimage.gaussian_filter(
        distance, [min(0.45, 1.1 / sizes[0]), *(0.7 / s for s in sizes[1:])]
    )


def _with_bone(
    scan: np.ndarray, surface: np.ndarray, spacing_mm: tuple, rng: np.random.Generator
) -> np.ndarray:
    """Return the density around one vertebra, from the scan's and the distance to its surface."""
    interior = _interior(scan, surface, spacing_mm)
    grain = 1.0 + TEXTURE * _trabeculae(scan.shape, spacing_mm, rng)
    marrow = 1000.0 + (interior - 1000.0) * grain
    shell = np.clip((surface + _cortex_mm(surface, spacing_mm)) / EDGE_MM + 0.5, 0.0, 1.0)
    bone = marrow + shell * (CORTEX - marrow)
    # Around it, what the scanner smeared out of the cortex is taken away.
    near = np.clip(2.0 - 2.0 * surface / SCANNER_MM, 0.0, 1.0)  # all of it in the nearer half
    around = scan - near * np.maximum(scan - TRABECULAR[0], 0.0)
    return around + np.clip(0.5 - surface / EDGE_MM, 0.0, 1.0) * (bone - around)


def _interior(scan: np.ndarray, surface: np.ndarray, spacing_mm: tuple) -> np.ndarray:
    """Return the mean density of the trabecular bone at each position."""
    core = (surface < -MARROW_MM).astype(np.float32)
    wide = [2.5 / step for step in spacing_mm]
    weight = ndimage.gaussian_filter(core, wide)
    mean = ndimage.gaussian_filter(scan * core, wide) / np.maximum(weight, 1e-3)
    deep = weight > 0.02
    if not deep.any():
        return np.full(scan.shape, NORMAL, np.float32)
    rich = (NORMAL - 1000.0) / max(float(mean[core > 0].mean()) - 1000.0, 20.0)
    mean = np.where(deep, 1000.0 + rich * (mean - 1000.0), sum(TRABECULAR) / 2)
    return np.clip(mean, *TRABECULAR)


def _cortex_mm(surface: np.ndarray, spacing_mm: tuple) -> np.ndarray:
    """Return the cortex's thickness at each position: thin around a body, thick around an arch."""
    every = 2
    depth = np.maximum(-surface[::every, ::every, ::every], 0.0)
    reach = [2 * round(ARCH_MM[1] / (every * step)) + 1 for step in spacing_mm]
    deepest = ndimage.maximum_filter(depth, size=reach)
    for axis, size in enumerate(surface.shape):
        deepest = np.repeat(deepest, every, axis=axis).take(range(size), axis=axis)
    arch = np.clip((ARCH_MM[1] - deepest) / (ARCH_MM[1] - ARCH_MM[0]), 0.0, 1.0)
    return BODY_CORTEX_MM + (ARCH_CORTEX_MM - BODY_CORTEX_MM) * arch


def _trabeculae(shape: tuple, spacing_mm: tuple, rng: np.random.Generator) -> np.ndarray:
    """Return a texture of vertical structures with mean 0 and SD 1, clipped at 2.5."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    fine = ndimage.gaussian_filter(
        noise, [s / p for s, p in zip((ALONG_MM, ACROSS_MM, ACROSS_MM), spacing_mm, strict=True)]
    )
    slow = ndimage.gaussian_filter(fine, [3 * ACROSS_MM / step for step in spacing_mm])
    texture = fine - slow
    return np.clip(texture / texture.std(), -2.5, 2.5)

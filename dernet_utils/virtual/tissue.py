"""The donor's soft tissue: the couch and the contrast agent are removed."""

import cv2
import numpy as np
from scipy import ndimage

# Contrast agent. Blood has 40 to 50 HU; without the agent, no soft tissue has much more.
BLOOD_HU = 50.0
ABOVE_BLOOD_HU = 25.0  # most that remains above it
PLEURA_MM = 3.0  # ribs lie farther from the inside of the lungs' hull than this
DEEP_MM = 32.0  # below the lungs, ribs lie less deep than this under the skin
BODY_DEPTH_MM = 18.0  # behind this depth of a vertebral body, ribs and processes begin
RIB_HEADS_MM = 60.0  # to either side of the spine
AROUND_BONE_MM = 2.0  # around vertebrae nothing is changed


def body_mask(density: np.ndarray) -> np.ndarray:
    """Return the body: each slice's largest piece above -400 HU, with its holes filled.

    Args:
        density: HU + 1000, shape (Z, Y, X).

    Returns:
        Whether a voxel belongs to the body, bool, the same shape; the couch does not.
    """
    body = np.zeros(density.shape, bool)
    for z, axial in enumerate(density):
        solid = ndimage.binary_opening(axial > 600.0, iterations=3)
        pieces, count = ndimage.label(solid)
        if count:
            largest = np.argmax(np.bincount(pieces.ravel())[1:]) + 1
            filled = ndimage.binary_fill_holes(pieces == largest)
            body[z] = ndimage.binary_dilation(filled, iterations=3)
    return body


def remove_contrast_agent(
    density: np.ndarray, labels: np.ndarray, body: np.ndarray, sizes: tuple[float, float, float]
) -> np.ndarray:
    """Bring enhanced heart, vessels and organs down to the density of blood.

    An enhanced aorta is as dense as bone, and a radiograph would show it so. Whatever lies inside
    the chest or the abdomen, apart from the spine, is soft tissue: there the density above that of
    blood is compressed. Ribs, sternum and scapulae lie outside, vertebrae and rib heads are left
    out.

    Args:
        density: HU + 1000, shape (Z, Y, X) with Y from back to front.
        labels: Vertebra numbers, 0 elsewhere, the same shape.
        body: Whether a voxel belongs to the body, the same shape.
        sizes: Voxel size (z, y, x), mm.

    Returns:
        The density without the agent, the same shape.
    """
    padded = np.pad(body, ((0, 0), (1, 1), (1, 1))).astype(np.uint8)
    depth_px = np.stack([cv2.distanceTransform(axial, cv2.DIST_L2, 5) for axial in padded])
    depth_mm = depth_px[:, 1:-1, 1:-1] * sizes[1]
    chest = _lung_hull((density < 600.0) & (depth_mm > 8.0), round(PLEURA_MM / sizes[1]))
    area = chest.sum(axis=(1, 2))
    deep = depth_mm > DEEP_MM
    if area.any():
        deep[np.argmax(area) :] = False  # above, scapulae and arms lie deep too
    bone = labels > 0
    inside = (chest | deep) & body & ~_behind_the_bodies(bone, sizes)
    inside &= ndimage.distance_transform_edt(~bone, sampling=sizes) > AROUND_BONE_MM
    weight = ndimage.gaussian_filter(inside.astype(np.float32), [0.5, 1.2, 1.2]) * inside
    above = np.maximum(density - 1000.0 - BLOOD_HU, 0.0)
    return density - weight * (above - ABOVE_BLOOD_HU * np.tanh(above / (5.0 * ABOVE_BLOOD_HU)))


def _lung_hull(air: np.ndarray, shrink: int) -> np.ndarray:
    """Return the convex hull of each slice's air, `shrink` pixels smaller; empty without lungs."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * shrink + 1,) * 2)
    hull = np.zeros(air.shape, np.uint8)
    for axial, out in zip(air, hull, strict=True):
        points = cv2.findNonZero(axial.astype(np.uint8))
        if points is not None and len(points) > 0.01 * axial.size:
            cv2.fillConvexPoly(out, cv2.convexHull(points), 1)
            out[:] = cv2.erode(out, kernel)
    return hull.astype(bool)


def _behind_the_bodies(bone: np.ndarray, sizes: tuple[float, float, float]) -> np.ndarray:
    """Return where arches, processes and rib heads lie: behind most of each vertebral body."""
    slices = [np.argwhere(axial) for axial in bone]
    found = [z for z, points in enumerate(slices) if len(points)]
    front = np.interp(range(len(bone)), found, [slices[z][:, 0].max() for z in found])
    middle = np.interp(range(len(bone)), found, [np.median(slices[z][:, 1]) for z in found])
    # A slice through a disc or an arch has no front edge of a body: its neighbours have.
    across = round(11.0 / sizes[0])
    front = ndimage.gaussian_filter1d(ndimage.maximum_filter1d(front, 2 * across + 1), across)
    _, y, x = np.ogrid[tuple(map(slice, bone.shape))]
    behind = y < (front - BODY_DEPTH_MM / sizes[1])[:, None, None]
    return behind & (np.abs(x - middle[:, None, None]) < RIB_HEADS_MM / sizes[2])

"""Pictures other than upright spine radiographs, to evaluate an out-of-distribution check.

All are made here or come with installed packages: photographs, slices of the donor's CT, simulated
ultrasound, other body parts, noise, screens, and altered radiographs. The same generator state
gives the same pictures: uint8, shape (H, W) in grey, (H, W, 3) in colour, in OpenCV's BGR order.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import sklearn.datasets
import ultralytics
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dernet_utils.virtual.donor import load_donor

PHOTO_PX = 900  # long side of a photograph before it is cropped
# Approximate MR signal per density (HU + 1000): fat is bright, air and cortical bone are dark.
DENSITIES = [0, 200, 850, 940, 1000, 1060, 1150, 1300, 1800, 3500]
MR_SIGNAL = [0, 0.05, 0.5, 1, 0.3, 0.45, 0.75, 0.6, 0.1, 0]
PHALANGES = np.array([150.0, 95, 60, 45])  # px: a metacarpal and the three bones of a finger
PHOTONS = 3000  # per pixel without an object, in an exposure of another body part
WORDS = ["the", "film", "shows", "a", "spine", "of", "five", "bodies", "with", "narrow", "space"]
WORDS += ["below"]  # on a page of text


def unlike_images(
    radiographs: Sequence[np.ndarray], count: int, rng: np.random.Generator
) -> dict[str, list[np.ndarray]]:
    """Return pictures that are clearly not spine radiographs, by family.

    Args:
        radiographs: uint8 (H, W), at least one; shown on every other screen.
        count: Pictures per family.
        rng: Its state determines all pictures.
    """
    photos = photographs(count, rng)
    density = load_donor().density[::-1, ::-1].astype(np.float32)
    found = {
        "photographs": photos,
        "photographs, grey": [cv2.cvtColor(photo, cv2.COLOR_BGR2GRAY) for photo in photos],
        "CT": slices(density, count, rng),
        "MR (virtual)": slices(np.interp(density, DENSITIES, MR_SIGNAL), count, rng),
        "ultrasound (virtual)": [ultrasound(rng) for _ in range(count)],
        "other body parts (virtual)": [
            expose(hand(rng) if k % 2 else skull(rng), rng) for k in range(count)
        ],
        "noise": [noise(0.3 + 1.5 ** (k % 8), rng) for k in range(count)],
    }
    screens = [
        text_page(rng) if k % 2 else viewer(radiographs[k % len(radiographs)]) for k in range(count)
    ]
    greys = [cv2.cvtColor(screen, cv2.COLOR_BGR2GRAY) for screen in screens]
    return found | {"screens": screens, "screens, grey": greys}


def altered_radiographs(
    radiographs: Sequence[np.ndarray], count: int, rng: np.random.Generator
) -> dict[str, list[np.ndarray]]:
    """Return radiographs that are rotated, inverted or cropped, by family.

    Args:
        radiographs: uint8 (H, W).
        count: Pictures per family, at most one per radiograph.
        rng: Chooses the radiographs and the crops.
    """
    some = [radiographs[k] for k in rng.permutation(len(radiographs))[:count]]
    return {
        "rotated by 90°": [np.rot90(image) for image in some],
        "rotated by 180°": [np.rot90(image, 2) for image in some],
        "inverted": [255 - image for image in some],
        "cropped to a half": [random_crop(image, 0.5, rng) for image in some],
        "cropped to a quarter": [random_crop(image, 0.25, rng) for image in some],
    }


# Photographs and other modalities ---------------------------------------------------------------


def photographs(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return random crops of the sample photographs of scikit-learn and ultralytics, in colour."""
    samples = sklearn.datasets.load_sample_images().images
    photos = [cv2.cvtColor(sample, cv2.COLOR_RGB2BGR) for sample in samples]
    assets = Path(ultralytics.__file__).parent / "assets"
    photos += [cv2.imread(str(path)) for path in sorted(assets.glob("*.jpg"))]
    scales = [PHOTO_PX / max(photo.shape) for photo in photos]
    photos = [cv2.resize(p, None, fx=s, fy=s) for p, s in zip(photos, scales, strict=True)]
    return [random_crop(photos[k % len(photos)], rng.uniform(0.5, 1), rng) for k in range(count)]


def random_crop(picture: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Return a random part whose sides are this fraction, in (0, 1], of the picture's."""
    height, width = (int(side * fraction) for side in picture.shape[:2])
    y, x = (
        int(rng.integers(0, whole - part + 1))
        for whole, part in zip(picture.shape[:2], (height, width), strict=True)
    )
    return picture[y : y + height, x : x + width]


def slices(volume: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return slices of a volume, along its three axes in turn, enlarged twofold.

    Args:
        volume: Shape (z, y, x).
        count: Number of slices.
        rng: Draws the positions, between 20% and 80% of an axis.
    """
    found = []
    for k in range(count):
        axis = k % 3
        position = int(volume.shape[axis] * rng.uniform(0.2, 0.8))
        grey = to_grey_levels(np.take(volume, position, axis=axis))
        found.append(cv2.resize(grey, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC))
    return found


def ultrasound(rng: np.random.Generator) -> np.ndarray:
    """Return speckle in a fan that darkens with depth, shape (500, 640)."""
    y, x = np.mgrid[0:1:500j, -0.8:0.8:640j]
    depth, angle = np.hypot(y + 0.2, x), np.arctan2(x, y + 0.2)
    tissue = cv2.GaussianBlur(rng.normal(size=y.shape), (0, 0), rng.uniform(8, 30))
    speckle = cv2.GaussianBlur(rng.rayleigh(size=y.shape), (0, 0), 1.5)
    image = speckle * np.exp(2 * tissue / tissue.std() * 0.3) * np.exp(-1.2 * depth)
    fan = (np.abs(angle) < 0.6) & (depth < 1.1) & (depth > 0.25)
    return to_grey_levels(image * fan)


def noise(sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Return Gaussian noise, blurred with a standard deviation of `sigma` px, shape (600, 400)."""
    return to_grey_levels(cv2.GaussianBlur(rng.normal(size=(600, 400)), (0, 0), sigma))


# Other body parts -------------------------------------------------------------------------------


def hand(rng: np.random.Generator) -> np.ndarray:
    """Return the attenuation of a hand: five fingers of four rods each, float (700, 520)."""
    bone = np.zeros((700, 520))
    for finger in range(5):
        angle = np.deg2rad(-30 + 15 * finger + rng.normal(0, 3))
        x, y = 260 + 150 * np.sin(angle), 560 - 60 * np.cos(angle)
        for length in PHALANGES * rng.uniform(0.85, 1.1):
            end = x + length * np.sin(angle), y - length * np.cos(angle)
            rod = np.zeros(bone.shape, np.uint8)
            cv2.line(rod, (int(x), int(y)), (int(end[0]), int(end[1])), 1, int(rng.uniform(14, 24)))
            bone += np.sqrt(cv2.distanceTransform(rod, cv2.DIST_L2, 3))
            x, y = end[0] + 8 * np.sin(angle), end[1] - 8 * np.cos(angle)
    wide = cv2.dilate((bone > 0).astype(np.float64), np.ones((45, 45)))
    return 0.5 * cv2.GaussianBlur(wide, (0, 0), 9) + 0.25 * bone


def skull(rng: np.random.Generator) -> np.ndarray:
    """Return the attenuation of a skull: an ellipsoidal shell with two orbits, float (640, 520)."""
    y, x = np.mgrid[-1.2:1.2:640j, -1.0:1.0:520j]
    x, y = x + rng.normal(0, 0.05), y + rng.normal(0, 0.05)
    outer, inner = (
        np.sqrt((1 - (x / a) ** 2 - (y / b) ** 2).clip(0)) for a, b in ((0.75, 0.95), (0.69, 0.89))
    )
    orbits = sum(np.exp(-((x - s) ** 2 + (y - 0.25) ** 2) / 0.02) for s in (-0.28, 0.28))
    return 2.2 * (outer - inner) + 0.7 * inner - 0.35 * orbits


def expose(attenuation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a radiograph of line integrals of attenuation: uint8, blurred, noisy, bone bright."""
    signal = cv2.GaussianBlur(np.exp(-attenuation), (0, 0), 1.2) * PHOTONS
    return to_grey_levels(-np.log(rng.poisson(signal + 20) / PHOTONS))


def to_grey_levels(values: np.ndarray) -> np.ndarray:
    """Return uint8 values: 0 at or below the 1st percentile, 255 at or above the 99.5th."""
    low, high = np.quantile(values, [0.01, 0.995])
    return (255 * ((values - low) / max(high - low, 1e-9)).clip(0, 1)).astype(np.uint8)


# Screens ----------------------------------------------------------------------------------------


def text_page(rng: np.random.Generator) -> np.ndarray:
    """Return a white page with 24 lines of random words, in colour."""
    fig = _screen("white")
    lines = [" ".join(rng.choice(WORDS, 11)) for _ in range(24)]
    fig.text(0.08, 0.95, "\n".join(lines), va="top", fontsize=9)
    return _pixels(fig)


def viewer(radiograph: np.ndarray) -> np.ndarray:
    """Return the window of an image viewer with a radiograph, uint8 (H, W), in colour."""
    fig = _screen("#2b2b2b")
    scale = 460 / radiograph.shape[0]
    fig.figimage(cv2.resize(radiograph, None, fx=scale, fy=scale), 250, 30, cmap="gray")
    fig.text(0.02, 0.95, "File  Edit  View  Tools", color="white", fontsize=10)
    for row in range(6):
        text = f"Series {row + 1}"
        fig.text(0.03, 0.82 - 0.1 * row, text, color="w", backgroundcolor="#31659c")
    return _pixels(fig)


def _screen(colour: str) -> Figure:
    fig = Figure((6, 5), dpi=110, layout="none")
    fig.set_facecolor(colour)
    return fig


def _pixels(fig: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., 2::-1])

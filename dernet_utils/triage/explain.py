"""Which parts of an image a prediction depends on: Grad-CAM, LIME, lesion masks, and metrics.

A heat map is a float array of the image's shape, at least 0; the larger a value, the more the
prediction depends on that position. A constant map, such as one of zeros, localises nothing.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import LayerAttribution, LayerGradCam, Lime
from sklearn.cluster import KMeans
from torch import Tensor, nn

from dernet_utils.core.errors import DernetError
from dernet_utils.triage.networks import as_input

# The last feature maps before pooling: after it, all positions have the same weight in the logit.
LAYERS = {"densenet121": "features.norm5", "tf_efficientnetv2_s": "bn2", "resnet50": "layer4"}
SEGMENTS = 64  # superpixels of an image; ours
CLOSENESS = 0.5  # weight of grey against position in a superpixel's distance; ours
PATCH = 8  # the image's side over the standard deviation of the blur that removes all detail
CUTS = 3  # iterations of GrabCut; ours
INNER = 0.8  # fraction of a box's sides where a lesion is likely; ours, chosen on training images

# Heat maps


def grad_cam(name: str, network: nn.Module, pixels: Tensor, batch: int = 16) -> np.ndarray:
    """Return Grad-CAM maps of the logit for abnormal (Selvaraju et al., ICCV 2017).

    Args:
        name: One of `dernet_utils.core.vocabulary.NETWORKS`; it determines the layer.
        network: As `training.load_network` returns it; left in evaluation mode.
        pixels: uint8, shape (n, 1, px, px).
        batch: Images per pass.

    Returns:
        float32, shape (n, px, px), at least 0.

    Raises:
        DernetError: The network is none of the three.
    """
    if name not in LAYERS:
        raise DernetError(f"Grad-CAM knows the layers of {', '.join(LAYERS)}, not of {name!r}.")
    network.eval()
    cam, device = LayerGradCam(network, network.get_submodule(LAYERS[name])), _device(network)
    maps = []
    for part in pixels.split(batch):
        found = cam.attribute(as_input(part.to(device)), target=0, relu_attributions=True)
        sized = LayerAttribution.interpolate(found, tuple(part.shape[2:]), "bilinear")
        maps.append(sized.detach().clamp(min=0).squeeze(1).cpu().numpy())
    return np.concatenate(maps)


def superpixels(grey: np.ndarray, segments: int = SEGMENTS) -> np.ndarray:
    """Return a partition of an image into patches of similar grey.

    k-means on position and grey, started from a regular grid of centres: the idea of SLIC (Achanta
    et al., TPAMI 34, 2012), over the whole image.

    Args:
        grey: 8-bit image, shape (H, W).
        segments: Approximate number; the nearest square number of centres is used.

    Returns:
        The number of each pixel's patch, from 0, shape (H, W).
    """
    height, width = grey.shape
    side = max(1, round(segments**0.5))
    y, x = np.mgrid[:height, :width]
    step = max(height, width) / side
    smooth = cv2.GaussianBlur(grey, (0, 0), max(height, width) / 100).astype(float)
    spread = max(smooth.std(), 1.0)
    points = np.stack([y / step, x / step, CLOSENESS * smooth / spread], axis=-1)
    at = [((np.arange(side) + 0.5) * extent / side).astype(int) for extent in (height, width)]
    centres = points[np.ix_(*at)].reshape(-1, 3)
    found = KMeans(len(centres), init=centres, n_init=1, max_iter=20).fit(points.reshape(-1, 3))
    return np.unique(found.labels_, return_inverse=True)[1].reshape(height, width)


def lime(
    network: nn.Module, pixels: Tensor, segments: np.ndarray, samples: int = 200, seed: int = 42
) -> np.ndarray:
    """Return each superpixel's weight for abnormal (Ribeiro et al., KDD 2016).

    Inference is run on images in which random patches are blurred. Ridge regression then fits the
    logit as a linear function of which patches are left as they are.

    Args:
        network: Left in evaluation mode and channels-last memory, which is faster.
        pixels: One image, uint8, shape (1, 1, px, px).
        segments: As `superpixels` returns them, shape (px, px).
        samples: Number of images to run inference on.
        seed: Seed of the patches; torch's global generator is left as it was.

    Returns:
        A weight per superpixel, of either sign, shape (segments,).
    """
    network.eval().to(memory_format=torch.channels_last)
    device = _device(network)
    image, blurred = (as_input(shown.to(device)) for shown in (pixels, without_detail(pixels)))
    patches = torch.from_numpy(segments).to(device)[None, None].expand(-1, 3, -1, -1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        found = Lime(lambda x: network(x).squeeze(1), SkLearnRidge(alpha=1.0)).attribute(
            image, baselines=blurred, feature_mask=patches, n_samples=samples,
            perturbations_per_eval=16, return_input_shape=False,
        )  # fmt: skip
    return found.cpu().numpy().ravel()


def spread_over(weights: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Return the superpixels' weights as a heat map; negative weights become 0.

    Args:
        weights: As `lime` returns them, shape (segments,).
        segments: As `superpixels` returns them, shape (H, W).

    Returns:
        Shape (H, W), at least 0.
    """
    return np.maximum(weights, 0)[segments]


def without_detail(pixels: Tensor) -> Tensor:
    """Return images blurred until no detail remains.

    Args:
        pixels: uint8, shape (n, 1, px, px).

    Returns:
        uint8, the same shape.
    """
    side = pixels.shape[-1]
    blurred = [cv2.GaussianBlur(image.squeeze(0).numpy(), (0, 0), side / PATCH) for image in pixels]
    return torch.from_numpy(np.stack(blurred)).unsqueeze(1)


def centred_map(shape: tuple[int, int]) -> np.ndarray:
    """Return a Gaussian heat map at the image's centre; its deviation is a quarter of a side.

    Args:
        shape: Height and width.

    Returns:
        float, of that shape, in (0, 1].
    """
    y, x = (np.linspace(-1, 1, extent) for extent in shape)
    return np.exp(-((y[:, None] ** 2 + x[None] ** 2) / (2 * 0.5**2)))


# Masks


def filled_box(box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a box as a mask.

    Args:
        box: Corners xmin, ymin, xmax, ymax, px, rounded; parts outside the image are cut off.
        shape: Height and width of the image.

    Returns:
        bool, of that shape.
    """
    left, top, right, bottom = np.round(box).astype(int).clip(0)
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def ellipse_in(box: np.ndarray, shape: tuple[int, int], fraction: float = INNER) -> np.ndarray:
    """Return the ellipse at the centre of a box, its axes a fraction of the box's sides.

    Args:
        box: Corners xmin, ymin, xmax, ymax, px; parts outside the image are cut off.
        shape: Height and width of the image.
        fraction: In (0, 1]; with 1 the ellipse touches the box.

    Returns:
        bool, of that shape.

    Raises:
        DernetError: The box has no pixel in the image.
    """
    left, top = np.floor(np.maximum(box[:2], 0))
    right, bottom = np.ceil(np.minimum(box[2:], shape[::-1]))
    if right <= left or bottom <= top:
        raise DernetError(f"The box {np.round(box, 1).tolist()} has no pixel in the image.")
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    across = (2 * x - left - right) / (right - left)
    down = (2 * y - top - bottom) / (bottom - top)
    return across**2 + down**2 < fraction**2


def lesion_mask(grey: np.ndarray, box: np.ndarray, heat: np.ndarray | None = None) -> np.ndarray:
    """Return a mask of the lesion in a box, without training on masks.

    GrabCut (Rother et al., SIGGRAPH 2004) separates the box and its surroundings into two mixtures
    of grey levels. It starts with no lesion outside the box's largest ellipse, and with a probable
    lesion in the inner ellipse, except in the quarter of it where a heat map is lowest.

    Args:
        grey: 8-bit image, shape (H, W).
        box: As `ellipse_in` takes it.
        heat: Heat map of the same shape, or None.

    Returns:
        bool, shape (H, W); the inner ellipse if GrabCut finds no lesion.

    Raises:
        DernetError: As `ellipse_in` raises, or the map is of another shape.
    """
    if heat is not None and heat.shape != grey.shape:
        raise DernetError(f"The map has {heat.shape} pixels and the image {grey.shape}.")
    largest, inner = (ellipse_in(box, grey.shape, fraction) for fraction in (1.0, INNER))
    likely = inner.copy()
    if heat is not None:
        likely &= heat >= np.quantile(heat[inner], 0.25)
    labels = np.where(largest, cv2.GC_PR_BGD, cv2.GC_BGD).astype(np.uint8)
    labels[likely] = cv2.GC_PR_FGD
    rows, columns = np.nonzero(largest)
    around = max(np.ptp(rows), np.ptp(columns)) // 2 + 1
    window = tuple(
        slice(max(0, at.min() - around), at.max() + around + 1) for at in (rows, columns)
    )
    colour, known = np.repeat(grey[window][..., None], 3, axis=2), labels[window].copy()
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(colour, known, None, *models, CUTS, cv2.GC_INIT_WITH_MASK)
    found = np.zeros(grey.shape, bool)
    found[window] = known == cv2.GC_PR_FGD
    return found if found.any() else inner


# Metrics of heat maps and masks


def pointing(heat: np.ndarray, mask: np.ndarray) -> float:
    """Return whether the map's maximum lies in the mask; of several maxima, the fraction inside.

    The pointing game (Zhang et al., ECCV 2016). For a constant map, the mask's fraction of the
    image.

    Args:
        heat: Heat map, shape (H, W).
        mask: bool, the same shape.

    Returns:
        In [0, 1].

    Raises:
        DernetError: Shapes differ, or a value of the map is negative or not finite.

    >>> pointing(np.array([[0, 2], [1, 2]]), np.array([[False, True], [True, False]]))
    0.5
    """
    heat, mask = _checked(heat, mask)
    return float(mask[heat == heat.max()].mean())


def energy(heat: np.ndarray, mask: np.ndarray) -> float:
    """Return the fraction of the heat inside the mask; for zeros, the mask's fraction of the image.

    Args, returns, raises: As `pointing`.

    >>> energy(np.array([[1.0, 3.0]]), np.array([[False, True]]))
    0.75
    """
    heat, mask = _checked(heat, mask)
    return float(heat[mask].sum() / heat.sum()) if heat.sum() else float(mask.mean())


def overlap(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return intersection over union and Dice coefficient of two masks; nan if both are empty.

    Args:
        found, truth: bool, of one shape.

    >>> overlap(np.array([True, True, False]), np.array([False, True, True]))
    (0.3333333333333333, 0.5)
    """
    both, either = (found & truth).sum(), (found | truth).sum()
    if not either:
        return float("nan"), float("nan")
    return float(both / either), float(2 * both / (found.sum() + truth.sum()))


def removal_curve(
    score: Callable[[Tensor], np.ndarray],
    pixels: Tensor,
    heat: np.ndarray,
    steps: int = 16,
    insert: bool = False,
) -> np.ndarray:
    """Return a network's scores while pixels are blurred or restored, hottest first.

    Deletion and insertion (Petsiuk et al., BMVC 2018). With a good map the score falls early in
    deletion and rises early in insertion.

    Args:
        score: Takes images, uint8 (n, 1, px, px); returns (n,).
        pixels: One image, uint8, shape (1, 1, px, px).
        heat: Its map, shape (px, px); equal values are taken row by row.
        steps: Number of steps, with equal numbers of pixels.
        insert: Whether to restore pixels (insertion) rather than to blur them (deletion).

    Returns:
        Shape (steps + 1,), from no pixel to all.
    """
    order = np.argsort(-heat.ravel(), kind="stable")
    start, end = pixels, without_detail(pixels)
    if insert:
        start, end = end, start
    shown = start.repeat(steps + 1, 1, 1, 1).flatten(1)
    target = end.flatten()
    for step, stop in enumerate(np.linspace(0, len(order), steps + 1).round().astype(int)):
        shown[step, order[:stop]] = target[order[:stop]]
    return score(shown.view(steps + 1, *pixels.shape[1:]))


def _checked(heat: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    heat, mask = np.asarray(heat, np.float64), np.asarray(mask, bool)
    if heat.shape != mask.shape or not heat.size:
        raise DernetError(
            f"A map needs a mask of the same shape: got {heat.shape} and {mask.shape}."
        )
    if not np.isfinite(heat).all() or (heat < 0).any():
        raise DernetError("A heat map has finite values of at least 0; this one has others.")
    return heat, mask


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device

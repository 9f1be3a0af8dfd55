"""Where a network looked, and how good such a picture is: Grad-CAM, LIME, lesion masks, and judges.

A heat map is a float array of the image's shape, at least 0; the larger, the more an answer rests
on the place. A map that says nothing is the same everywhere; a map of zeros is one of these.
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

# The last maps before pooling: after them every place has one weight for the logit.
LAYERS = {"densenet121": "features.norm5", "tf_efficientnetv2_s": "bn2", "resnet50": "layer4"}
SEGMENTS = 64  # superpixels of an image; ours
CLOSENESS = 0.5  # of places to greys, in a superpixel's measure of distance; ours
PATCH = 8  # times the image's side: the blur that stands for "nothing here"
CUTS = 3  # rounds of GrabCut; ours
INNER = 0.8  # of a box's sides: where a lesion is likely; ours, chosen on training films

# Heat maps


def grad_cam(name: str, network: nn.Module, pixels: Tensor, batch: int = 16) -> np.ndarray:
    """Return Grad-CAM maps of the logit for abnormal (Selvaraju et al., ICCV 2017).

    Args:
        name: One of `dernet_utils.profiles.NETWORKS`; it decides the layer.
        network: As `triage.load_trained` returns it; put in evaluation mode.
        pixels: uint8, shape (n, 1, px, px).
        batch: Images at a time.

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
    """Return a partition of an image into patches of like grey, numbers from 0.

    k-means on place and grey from a regular grid of centres: the idea of SLIC (Achanta et al.,
    TPAMI 34, 2012), over the whole image.

    Args:
        grey: 8-bit image, shape (H, W).
        segments: About how many; a square number of centres is taken.
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
    """Return how much each superpixel speaks for abnormal (Ribeiro et al., KDD 2016).

    Patches are blurred away at random, the network is asked again, and a linear model of its logit
    is fitted, by ridge regression, to which patches were there.

    Args:
        network: In evaluation mode afterwards, its memory laid out channels last, which is quicker.
        pixels: One image, uint8, shape (1, 1, px, px).
        segments: As `superpixels` returns them, shape (px, px).
        samples: Images asked about.
        seed: Seed of the patches drawn; torch's global generator is left as it was.

    Returns:
        A weight for each superpixel, of either sign.
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
    """Return the heat map of superpixels' weights; those that speak against count nothing."""
    return np.maximum(weights, 0)[segments]


def without_detail(pixels: Tensor) -> Tensor:
    """Return images blurred so far that only light and dark remain, uint8, the same shape."""
    side = pixels.shape[-1]
    blurred = [cv2.GaussianBlur(image.squeeze(0).numpy(), (0, 0), side / PATCH) for image in pixels]
    return torch.from_numpy(np.stack(blurred)).unsqueeze(1)


def centred_map(shape: tuple[int, int]) -> np.ndarray:
    """Return a map that looks at the middle of any image: a Gaussian, a quarter of a side wide."""
    y, x = (np.linspace(-1, 1, extent) for extent in shape)
    return np.exp(-((y[:, None] ** 2 + x[None] ** 2) / (2 * 0.5**2)))


# Masks


def filled_box(box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return which pixels of an image a box holds: bool, of `shape`, (height, width)."""
    left, top, right, bottom = np.round(box).astype(int).clip(0)
    held = np.zeros(shape, bool)
    held[top:bottom, left:right] = True
    return held


def ellipse_in(box: np.ndarray, shape: tuple[int, int], share: float = INNER) -> np.ndarray:
    """Return the ellipse in the middle of a box, whose axes are this share of its sides.

    Args:
        box: Corners xmin, ymin, xmax, ymax, px; what lies outside the image is cut off.
        shape: Height and width of the image.
        share: In (0, 1]; 1 touches the box.

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
    return across**2 + down**2 < share**2


def lesion_mask(grey: np.ndarray, box: np.ndarray, heat: np.ndarray | None = None) -> np.ndarray:
    """Return which pixels of a box are the lesion's, without ever having learnt from a mask.

    GrabCut (Rother et al., SIGGRAPH 2004) parts the box's surroundings into two mixtures of greys.
    It is told that there is no lesion outside the box's largest ellipse, and that the lesion is
    likely in the inner one, but for that quarter of it where the heat map is lowest.

    Args:
        grey: 8-bit image, shape (H, W).
        box: As `ellipse_in` takes it.
        heat: Heat map of the same shape, or None.

    Returns:
        bool, shape (H, W); the inner ellipse where GrabCut finds no lesion.

    Raises:
        DernetError: As `ellipse_in` raises, or the map is of another shape.
    """
    if heat is not None and heat.shape != grey.shape:
        raise DernetError(f"The map is of {heat.shape} and the image of {grey.shape} pixels.")
    largest, inner = (ellipse_in(box, grey.shape, share) for share in (1.0, INNER))
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
    view, known = np.repeat(grey[window][..., None], 3, axis=2), labels[window].copy()
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(view, known, None, *models, CUTS, cv2.GC_INIT_WITH_MASK)
    found = np.zeros(grey.shape, bool)
    found[window] = known == cv2.GC_PR_FGD
    return found if found.any() else inner


# Judges


def pointing(heat: np.ndarray, mask: np.ndarray) -> float:
    """Return whether the hottest place lies in the mask; of several equally hot, the share that do.

    The pointing game (Zhang et al., ECCV 2016). A map that says nothing scores the mask's share of
    the image.

    >>> pointing(np.array([[0, 2], [1, 2]]), np.array([[False, True], [True, False]]))
    0.5
    """
    heat, mask = _judged(heat, mask)
    return float(mask[heat == heat.max()].mean())


def energy(heat: np.ndarray, mask: np.ndarray) -> float:
    """Return the share of the heat that lies in the mask; of a map of zeros, the mask's share.

    >>> energy(np.array([[1.0, 3.0]]), np.array([[False, True]]))
    0.75
    """
    heat, mask = _judged(heat, mask)
    return float(heat[mask].sum() / heat.sum()) if heat.sum() else float(mask.mean())


def overlap(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return intersection over union and Dice of two masks; nan for two empty ones.

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
    """Return a network's score while the hottest places are blurred away, or come into a blur.

    Deletion and insertion (Petsiuk et al., BMVC 2018). A good map makes the first fall early and
    the second rise early.

    Args:
        score: Takes images, uint8 (n, 1, px, px); returns (n,).
        pixels: One image, shape (1, 1, px, px).
        heat: Its map, shape (px, px); equal places go in the order of rows.
        steps: Equal shares of the pixels.
        insert: Whether they come instead of going.

    Returns:
        Shape (steps + 1,), from none to all.
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


def _judged(heat: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    heat, mask = np.asarray(heat, np.float64), np.asarray(mask, bool)
    if heat.shape != mask.shape or not heat.size:
        raise DernetError(
            f"A map is judged by a mask of its shape: {heat.shape} and {mask.shape} came."
        )
    if not np.isfinite(heat).all() or (heat < 0).any():
        raise DernetError("A heat map has finite values of at least 0, and this one has others.")
    return heat, mask


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device

"""Drawing for the chapters on data: virtual lesions, their labels and their counterfactuals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from dernet_utils.book.figures import show_boxes, show_radiograph
from dernet_utils.core.vocabulary import CORNERS, LESION_STYLE
from dernet_utils.virtual.cohort import LEAST_VISIBILITY
from dernet_utils.virtual.counterfactual import Counterfactual
from dernet_utils.virtual.render import RenderedRadiograph, find_box


def draw_label(
    ax: Axes, lesion_type: str, counterfactual: Counterfactual | None, spacing_mm: float
) -> bool:
    """Draw the box of a virtual finding where its visibility is enough for a label.

    Args:
        ax: Axes that show the radiograph.
        lesion_type: Name of the dataset's class.
        counterfactual: The finding's; None where it is not in the image.
        spacing_mm: Pixel size.

    Returns:
        Whether the finding is labelled.
    """
    if counterfactual is None or counterfactual.visibility < LEAST_VISIBILITY:
        return False
    corners = dict(zip(CORNERS, find_box(counterfactual.mask, spacing_mm), strict=True))
    show_boxes(ax, pd.DataFrame([{"lesion_type": lesion_type} | corners]), names=False)
    return True


def draw_difference(ax: Axes, change: np.ndarray, title: str) -> AxesImage:
    """Show grey with a finding minus grey without it, in the same colours for all findings.

    Args:
        ax: Where to draw.
        change: Shape (H, W), from -1 to 1.
        title: Text above the image.

    Returns:
        The image, for a colour bar.
    """
    image = ax.imshow(change, vmin=-0.6, vmax=0.6, cmap="PuOr_r")
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)
    return image


def draw_lesion(
    axes: Sequence[Axes],
    lesion_type: str,
    tissue: tuple[np.ndarray, np.ndarray],
    healthy: np.ndarray,
    radiograph: RenderedRadiograph,
    offset_px: tuple[float, float],
    side_mm: float,
    spacing_mm: float,
) -> AxesImage:
    """Draw a virtual lesion: its tissue, the radiograph without and with it, the difference.

    Args:
        axes: Four.
        lesion_type: Name of the dataset's class.
        tissue: Density (HU + 1000) and occupancy (0 to 1) on a square slice, both (n, n).
        healthy: The radiograph without the lesion, 0 to 1, (H, W).
        radiograph: The radiograph with the lesion as its only finding, (H, W).
        offset_px: Lesion's centre from the image's centre, to the right and up.
        side_mm: Side of the slice, and of the crops.
        spacing_mm: Pixel size of the radiographs.

    Returns:
        The difference, for a colour bar.
    """
    density, occupancy = tissue
    half, reach = side_mm / 2, side_mm / 2 / spacing_mm
    axes[0].imshow(density, cmap="gray", vmin=700, vmax=2000, extent=(-half, half, -half, half))
    at = np.linspace(-half, half, len(density), endpoint=False)
    colour = LESION_STYLE[lesion_type][0]
    axes[0].contour(at, -at, occupancy, [0.5], colors=[colour], linewidths=1.3)
    axes[0].set_axis_off()
    (counterfactual,) = radiograph.counterfactuals
    change, visible = np.zeros(healthy.shape), "no difference"
    if counterfactual is not None:
        change[counterfactual.part] = -counterfactual.change
        visible = f"visibility {counterfactual.visibility:.2f}"
    show_radiograph(axes[1], 255 * healthy, "healthy")
    labelled = draw_label(axes[2], lesion_type, counterfactual, spacing_mm)
    title = "with lesion" if labelled else "with lesion: no label"
    show_radiograph(axes[2], 255 * radiograph.grey, title)
    image = draw_difference(axes[3], change, visible)
    height, width = healthy.shape
    x = np.clip(width / 2 + offset_px[0], reach, width - reach)
    y = np.clip(height / 2 - offset_px[1], reach, height - reach)
    for ax in axes[1:]:
        ax.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))
    return image

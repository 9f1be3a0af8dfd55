"""Figures of virtual lesions, their labels and their effect on a radiograph."""

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
    """Draw the box of a virtual finding if it is visible enough to be labelled.

    Args:
        ax: Axes that show the radiograph.
        lesion_type: One of `LESION_TYPES`.
        counterfactual: The finding's counterfactual; None if the finding is out of the field.
        spacing_mm: Pixel size, mm.

    Returns:
        Whether the finding is labelled.
    """
    if counterfactual is None or counterfactual.visibility < LEAST_VISIBILITY:
        return False
    corners = dict(zip(CORNERS, find_box(counterfactual.mask, spacing_mm), strict=True))
    show_boxes(ax, pd.DataFrame([{"lesion_type": lesion_type} | corners]), names=False)
    return True


def draw_difference(ax: Axes, change: np.ndarray, title: str) -> AxesImage:
    """Show the radiograph with a finding minus the one without, on a fixed colour scale.

    Args:
        ax: Axes to draw in.
        change: Difference, shape (H, W), in [-1, 1]; colours saturate at -0.6 and 0.6.
        title: Title of the axes.

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
        axes: Four axes.
        lesion_type: One of `LESION_TYPES`.
        tissue: Density (HU + 1000) and occupancy (0 to 1) in a square slice, both of shape (n, n).
        healthy: The radiograph without the lesion, shape (H, W), in [0, 1].
        radiograph: The radiograph with the lesion as its only finding, shape (H, W).
        offset_px: Position of the lesion's centre relative to the image's, right and up.
        side_mm: Side of the slice and of the crops.
        spacing_mm: Pixel size of the radiographs, mm.

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

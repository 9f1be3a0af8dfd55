"""The drawing that chapters share: one style, one way to show a film and its boxes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from myst_nb import glue

# One colour a lesion type, the same in every chapter: Okabe and Ito's palette, distinguishable
# with any colour vision; each also has its own dash, so that a grey print is legible.
LESION_STYLE = {
    "Disc space narrowing": ("#56B4E9", "-"),
    "Foraminal stenosis": ("#CC79A7", "--"),
    "Osteophytes": ("#E69F00", "-"),
    "Spondylolysthesis": ("#009E73", "--"),
    "Surgical implant": ("#F0E442", "-"),
    "Vertebral collapse": ("#D55E00", "-."),
    "Other lesions": ("#FFFFFF", ":"),
}


def use_style() -> None:
    """Set seaborn's and Matplotlib's style for every figure of a chapter."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 150,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "image.cmap": "gray",
        }
    )


def show_figure(key: str, fig: Figure) -> None:
    """Show a figure in the notebook, and hand it to the book under a key.

    Args:
        key: Name for MyST's ``glue:figure``, such as ``c01-fig-sizes``.
        fig: The figure; it is closed.
    """
    glue(key, fig)
    plt.close(fig)


def show_film(ax: Axes, grey: np.ndarray, title: str = "") -> None:
    """Show a radiograph as a reading room does: grey, square pixels, no axes.

    Args:
        ax: Where to draw.
        grey: 8-bit image, shape (H, W), 0 black to 255 white.
        title: Text above the film.
    """
    ax.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
    ax.set_title(title)
    ax.set_axis_off()


def show_boxes(ax: Axes, boxes: pd.DataFrame, scale: float = 1.0, names: bool = True) -> None:
    """Draw lesion boxes on a film.

    Args:
        ax: Axes that show the film.
        boxes: Rows with `lesion_type`, `xmin`, `ymin`, `xmax`, `ymax` in stored pixels, and
            perhaps `score` (probability), which is then written beside the name.
        scale: Shown pixels per stored pixel.
        names: Whether to write the lesion type beside the box.
    """
    for box in boxes.itertuples():
        colour, dash = LESION_STYLE[box.lesion_type]
        x, y = box.xmin * scale, box.ymin * scale
        width, height = (box.xmax - box.xmin) * scale, (box.ymax - box.ymin) * scale
        ax.add_patch(
            Rectangle((x, y), width, height, fill=False, edgecolor=colour, linestyle=dash, lw=1.4)
        )
        if names:
            score = f" {box.score:.2f}" if hasattr(box, "score") else ""
            ax.text(
                x, y - 2, box.lesion_type + score, color=colour, fontsize=7, va="bottom",
                bbox={"facecolor": "black", "alpha": 0.55, "pad": 0.8, "edgecolor": "none"},
            )  # fmt: skip

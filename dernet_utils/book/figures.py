"""Figures that several chapters share, in one style, and the values that sentences quote."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from myst_nb import glue

from dernet_utils.core.vocabulary import LESION_STYLE, LESION_TYPES
from dernet_utils.imaging.enhance import load_cached


def use_style() -> None:
    """Set the style of every figure of a chapter, whatever the reader's ``matplotlibrc`` says."""
    plt.rcdefaults()
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
    """Show a figure in the notebook, and store it for the book under a key.

    Args:
        key: Name for MyST's ``glue:figure``, such as ``c01-fig-sizes``.
        fig: The figure; it is closed.
    """
    glue(key, fig)
    plt.close(fig)


def glue_values(prefix: str, values: Mapping[str, object]) -> None:
    """Store values for a chapter's sentences, which quote them as ``{glue:text}`prefix-name```.

    Args:
        prefix: The chapter's prefix, such as ``c03``.
        values: Numbers and words by name.
    """
    for name, value in values.items():
        glue(f"{prefix}-{name}", value, display=False)


def show_radiograph(ax: Axes, grey: np.ndarray, title: str = "") -> None:
    """Show a radiograph as a reading room does: grey, square pixels, no axes.

    Args:
        ax: Where to draw.
        grey: 8-bit image, shape (H, W), 0 black to 255 white.
        title: Text above the image.
    """
    ax.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
    ax.set_title(title)
    ax.set_axis_off()


def show_boxes(ax: Axes, boxes: pd.DataFrame, scale: float = 1.0, names: bool = True) -> None:
    """Draw lesion boxes on a radiograph.

    Args:
        ax: Axes that show the radiograph.
        boxes: Rows with `lesion_type`, `xmin`, `ymin`, `xmax`, `ymax` in stored pixels, and
            optionally `score` (0 to 1), which is then written beside the name.
        scale: Displayed pixels per stored pixel.
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


def draw_stage(
    ax: Axes, x: float, y: float, text: str, width: float, colour: str = "#dbe9f6"
) -> None:
    """Draw a stage of a schematic: a rounded box, 0.9 high, with centred text.

    Args:
        ax: Where to draw; positions and sizes are in its data units.
        x, y: Lower left corner.
        text: One line or two.
        width: Width of the box.
        colour: Background of the box.
    """
    shape = FancyBboxPatch((x, y), width, 0.9, "round,pad=0.06", fc=colour, ec="0.3", lw=0.8)
    ax.add_patch(shape)
    ax.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=9)


def draw_arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str = ""
) -> None:
    """Draw an arrow between two stages of a schematic, with text above its middle.

    Args:
        ax: Where to draw.
        start, end: (x, y) in its data units.
        text: One line.
    """
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.3"})
    ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, text, fontsize=8, ha="center")


def draw_learning_curves(curves: pd.DataFrame) -> Figure:
    """Draw loss and held-out AUROC over epochs, per fold; epochs on crops are shaded grey.

    Args:
        curves: `triage.crossvalidation.CrossValidated.curves`.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.1))
    for fold, rows in curves.groupby("fold"):
        colour = f"C{fold % 10}"
        left.plot(rows["epoch"], rows["train_loss"], "o-", ms=3, color=colour)
        left.plot(rows["epoch"], rows["validation_loss"], "s--", ms=3, color=colour)
        right.plot(
            rows["epoch"], rows["validation_auroc"], "s--", ms=3, color=colour, label=f"fold {fold}"
        )
    left.plot([], [], "o-", ms=3, color="0.3", label="training")
    left.plot([], [], "s--", ms=3, color="0.3", label="held out")
    left.axhline(np.log(2), color="0.4", lw=0.8, ls=":", label="constant ½")
    left.set(xlabel="epoch", ylabel="binary cross-entropy", ylim=(0, 1.5))
    right.axhline(0.5, color="0.4", lw=0.8, ls=":")
    right.set(xlabel="epoch", ylabel="AUROC, held out", ylim=(0, 1.04))
    crops = curves.loc[curves["trained_on"] == "crops", "epoch"]
    for ax in (left, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
        if len(crops):
            ax.axvspan(0.5, crops.max() + 0.5, color="0.9", zorder=0)
        ax.legend(fontsize=8, loc="lower left")
    fig.get_layout_engine().set(wspace=0.08)
    return fig


def draw_roc(bands: dict[str, pd.DataFrame], stars: dict[str, tuple[float, float]]) -> Figure:
    """Draw receiver operating characteristic (ROC) curves, the first with its band.

    Args:
        bands: Per label, the table that `metrics.classification.roc_band` returns.
        stars: Operating points: per label, sensitivity and specificity.
    """
    fig, ax = plt.subplots(figsize=(4.8, 4.6))
    for number, (label, band) in enumerate(bands.items()):
        rate, dash = band["false_positive_rate"], ("-", "--", "-.", ":")[number % 4]
        if not number:
            ax.fill_between(
                rate, band["low"], band["high"], alpha=0.25, lw=0, label="95 % of resamples"
            )
        ax.plot(rate, band["sensitivity"], color=f"C{number}", ls=dash, label=label)
    ax.plot([0, 1], [0, 1], color="0.4", lw=0.8, ls=":", label="chance")
    for (label, (sensitivity, specificity)), marker in zip(stars.items(), "*^ov", strict=False):
        ax.plot(1 - specificity, sensitivity, marker, color="black", ms=10, ls="", label=label)
    ax.set(
        xlabel="1 − specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01), aspect="equal"
    )
    ax.legend(fontsize=8, loc="lower right")
    return fig


def draw_most_confident(images: pd.DataFrame, threshold: float) -> Figure:
    """Show the most confident true positive, true negative, false negative and false positive.

    Args:
        images: Rows of `triage.crossvalidation.triage_images` with ``prob``; the centres in
            ``lesions`` are marked.
        threshold: Images with a probability above it are called abnormal.
    """
    called, margin = images["prob"] > threshold, (images["prob"] - threshold).abs()
    kinds = {
        "true positive": (True, True),
        "true negative": (False, False),
        "false negative": (True, False),
        "false positive": (False, True),
    }
    fig, axes = plt.subplots(2, 2, figsize=(6.4, 7.4))
    for ax, (name, (abnormal, positive)) in zip(axes.flat, kinds.items(), strict=True):
        rows = margin[(images["label"] == abnormal) & (called == positive)]
        ax.set_axis_off()
        ax.set_title(f"{name}: none")
        if len(rows):
            image = images.loc[rows.idxmax()]
            title = f"{name} (1 of {len(rows)})\nprobability {image['prob']:.2f}"
            grey = load_cached(image["cached_path"])
            show_radiograph(ax, grey, title)
            _mark_lesions(ax, image["lesions"], *grey.shape)
    return fig


def _mark_lesions(ax: Axes, lesions: np.ndarray, height: int, width: int) -> None:
    """Draw a ring around each lesion's centre, with a legend of the types."""
    named = set()
    for x, y, kind in lesions:
        name = LESION_TYPES[int(kind)]
        colour, dash = LESION_STYLE[name]
        centre = (x * width, y * height)
        ax.add_patch(Circle(centre, 0.05 * width, fc="none", ec=colour, ls=dash, lw=1.3))
        if name not in named:
            named.add(name)
            ax.plot([], [], color=colour, ls=dash, label=name)
    if named:
        dark = {"facecolor": "black", "edgecolor": "none", "labelcolor": "white"}
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, **dark)

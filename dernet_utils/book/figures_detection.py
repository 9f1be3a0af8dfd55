"""Figures of the detection chapters."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from dernet_utils.book.figures import show_boxes, show_radiograph
from dernet_utils.core.vocabulary import CORNERS, LESION_STYLE, PAPER_CODES
from dernet_utils.imaging.enhance import load_cached
from dernet_utils.metrics.detection import supported

# Column and row of each of YOLO11's layers: down the backbone, up the neck, and down again.
_POSITIONS = {i: (0, i) for i in range(11)} | {i: (1, 19 - i) for i in range(11, 17)}
_POSITIONS |= {i: (2, i - 12) for i in range(17, 23)}
_LAYER_COLOURS = {"Conv": "#CFE3F2", "C3k2": "#F6DDB0", "SPPF": "#E3E3E3", "C2PSA": "#F2C6DC"}
# On a white background, two lesion types need darker colours than on radiographs.
_ON_WHITE = {"Other lesions": "0.35", "Surgical implant": "#A89C00"}

# The network ------------------------------------------------------------------------------------


def draw_layers(network: nn.Module, maps: Sequence[Tensor], size: tuple[int, int]) -> Figure:
    """Draw YOLO11 as a diagram: backbone, neck up, neck down, and heads.

    Args:
        network: ultralytics' YOLO11.
        maps: Output of each layer but the last, shape (1, C, H, W).
        size: Height and width of the input, px.
    """
    fig, ax = plt.subplots(figsize=(6.2, 7.4))
    fig.get_layout_engine().set(w_pad=0.01, h_pad=0.01)
    heads = network.model[-1]
    for layer in network.model[:-1]:
        at, name = _POSITIONS[layer.i], type(layer).__name__
        for i in layer.f if isinstance(layer.f, list) else [layer.f]:
            if layer.i:
                source = _POSITIONS[layer.i - 1 if i == -1 else i]
                _connect(ax, source, at, "-" if i == -1 else "--")
        shape = " × ".join(map(str, maps[layer.i].shape[1:]))
        colour = _LAYER_COLOURS.get(name, "white")
        _draw_layer(ax, at, f"{layer.i} {name}\n{shape}", colour, layer.i in heads.f)
    for number, i in enumerate(heads.f):
        rows, columns = maps[i].shape[-2:]
        at, cells = (3, _POSITIONS[i][1]), f"{rows} × {columns}"
        _connect(ax, _POSITIONS[i], at)
        text = f"box {4 * heads.reg_max} × {cells}\nclass {heads.nc} × {cells}"
        _draw_layer(ax, at, text, "#CDE8DC")
        ax.text(3, at[1] - 0.56, f"stride {8 * 2**number}", ha="center", fontsize=8.3)
    _draw_layer(ax, (0, -1), f"image\n3 × {size[0]} × {size[1]}", "white")
    _connect(ax, (0, -1), (0, 0))
    titles = (("backbone", -1.6), ("neck,\nup", 2.4), ("neck,\ndown", 4.4), ("heads", 2.05))
    for column, (title, y) in enumerate(titles):
        ax.text(column, y, title, ha="center", va="bottom", fontsize=9.5, weight="bold")
    legend = "number and name of the layer\nchannels × height × width of its output"
    ax.text(1, -1.2, legend, fontsize=8.3, va="top")
    ax.plot([0.72, 0.95], [0.1, 0.1], "--", color="0.35", lw=1)
    ax.text(1, 0.1, "skip connection", fontsize=8.3, va="center")
    ax.set(xlim=(-0.5, 3.5), ylim=(10.5, -2.1))
    ax.set_axis_off()
    return fig


def _draw_layer(ax: Axes, at: tuple, text: str, colour: str, bold: bool = False) -> None:
    face = {"boxstyle": "round,pad=0.28", "fc": colour, "ec": "0.25", "lw": 1.8 if bold else 0.7}
    ax.text(*at, text, ha="center", va="center", fontsize=8.3, bbox=face, linespacing=1.15)


def _connect(ax: Axes, start: tuple, end: tuple, dash: str = "-") -> None:
    across = start[0] != end[0] and abs(start[1] - end[1]) < 1.5
    tail, head = (8, 14 if start[0] == end[0] else 22)
    if across:
        tail, head = 28, 46 if end[0] == 3 else 41
    arrow = {"arrowstyle": "-|>", "color": "0.35", "ls": dash, "shrinkA": tail, "shrinkB": head}
    ax.annotate("", end, start, arrowprops=arrow, zorder=0)


def draw_scaling(
    lengths: Sequence[int], variance: np.ndarray, largest: Mapping[str, np.ndarray], marked: int
) -> Figure:
    """Draw the variance of products and the largest weight, with and without division by √d_k.

    Args:
        lengths: Lengths d_k of the random queries.
        variance: Of the products of queries and keys, shape (lengths,).
        largest: Mean largest weight, ``undivided`` and ``divided``, each of shape (lengths,).
        marked: The network's d_k, a dotted line.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
    left.loglog(lengths, variance, "o-", base=2, label="undivided")
    left.loglog(lengths, variance / lengths, "s--", base=2, label="divided by √$d_k$")
    left.set(xlabel="length of a query, $d_k$", ylabel="variance of the products")
    right.semilogx(lengths, largest["undivided"], "o-", base=2)
    right.semilogx(lengths, largest["divided"], "s--", base=2)
    right.set(xlabel="length of a query, $d_k$", ylabel="mean largest weight", ylim=(0, 1))
    for ax in (left, right):
        ax.set_xticks(lengths, lengths)
        ax.axvline(marked, color="0.4", lw=0.8, ls=":")
    left.legend(fontsize=8)
    fig.get_layout_engine().set(wspace=0.08)
    return fig


def draw_attention(
    filled: np.ndarray, lesion: pd.DataFrame, centre: np.ndarray, weights: Tensor
) -> Figure:
    """Draw a radiograph with a lesion's box, and over it each head's weights and their mean.

    Args:
        filled: Letterboxed image, 8-bit, shape (H, W).
        lesion: One row: `lesion_type` and corners, px of `filled`.
        centre: x and y of the lesion's centre, px of `filled`.
        weights: Of each head, in units of 1/n, shape (heads, rows, columns).
    """
    fig, axes = plt.subplots(2, 3, figsize=(7.2, 5.4))
    show_radiograph(axes[0, 0], filled, lesion["lesion_type"].item())
    show_boxes(axes[0, 0], lesion, names=False)
    titles = [*(f"head {number}" for number in range(1, len(weights) + 1)), "mean of the heads"]
    extent = (0, filled.shape[1], filled.shape[0], 0)
    drawn = zip(axes.flat[1:], [*weights, weights.mean(0)], titles, strict=True)
    for ax, one, title in drawn:
        show_radiograph(ax, filled, f"{title}: {float(one.min()):.1f} to {float(one.max()):.1f}")
        seen = ax.imshow(one, cmap="viridis", norm=LogNorm(0.1, 10), alpha=0.6, extent=extent)
        ax.plot(*centre, "+", color="white", ms=11, mew=2.6)
        ax.plot(*centre, "+", color="black", ms=10, mew=1.0)
    for ax in axes.flat:
        ax.title.set_fontsize(9)
    bar = fig.colorbar(seen, ax=axes, shrink=0.6, location="bottom")
    bar.ax.set_xticks([0.1, 0.3, 1, 3, 10], ["≤ 0.1", "0.3", "1", "3", "≥ 10"])
    bar.ax.minorticks_off()
    bar.set_label("weight, in units of 1/n", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return fig


def draw_attention_cost(
    px: np.ndarray, convolutions: np.ndarray, products: np.ndarray, marks: Mapping[str, float]
) -> Figure:
    """Draw multiply-adds of convolutions and of attention against the side of a square input.

    Args:
        px: Sides, px, shape (n,).
        convolutions, products: Multiply-adds, shape (n,).
        marks: Sides to mark with a dotted line, px, by label.
    """
    fig, ax = plt.subplots(figsize=(5.2, 3.2))
    ax.loglog(px, convolutions / 1e9, "o-", label=r"convolutions, $\propto n$")
    ax.loglog(px, products / 1e9, "s--", label=r"products of Eq. 3, $\propto n^2$")
    foot = {"transform": ax.get_xaxis_transform(), "va": "top", "rotation": 90, "fontsize": 8}
    for word, at in marks.items():
        ax.axvline(at, color="0.4", lw=0.8, ls=":")
        ax.text(at * 1.03, 0.97, word, **foot)
    ax.set(xlabel="side of a square input, px", ylabel="multiply-adds, billions")
    ax.set_xticks(px, [f"{p}" for p in px])
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="lower right")
    return fig


def draw_fields(gradients: Iterable[tuple[str, int, Tensor, float]]) -> Figure:
    """Draw six effective receptive fields, each with the square that holds 90 % of it.

    Args:
        gradients: Name and stride of a map, absolute gradient by pixel, shape (S, S), and side of
            the square, px.
    """
    fig, axes = plt.subplots(2, 3, figsize=(7.2, 5.3))
    for ax, (name, stride, gradient, wide) in zip(axes.flat, gradients, strict=True):
        side = len(gradient)
        scaled = (gradient / gradient.max()).clamp(min=1e-4).log10()
        seen = ax.imshow(scaled, cmap="viridis", vmin=-4, vmax=0)
        middle = (side // stride // 2 + 0.5) * stride
        corner = (middle - wide / 2, middle - wide / 2)
        ax.add_patch(plt.Rectangle(corner, wide, wide, fill=False, ec="white", lw=1.4, ls="--"))
        ax.set_title(f"{name}, stride {stride}: {wide:.0f} px", fontsize=9)
        ax.set(xticks=[0, side], yticks=[0, side], xlim=(0, side), ylim=(side, 0))
        ax.grid(False)
        ax.tick_params(labelsize=8)
    bar = fig.colorbar(seen, ax=axes, location="bottom", shrink=0.6, ticks=[-4, -3, -2, -1, 0])
    bar.ax.set_xticklabels(["≤ 10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"], fontsize=8)
    bar.set_label("absolute gradient, fraction of its maximum; axes in px", fontsize=9)
    return fig


def draw_box_sides(lesions: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Draw the sides of boxes by lesion type, at two input sizes, and lines at the three strides.

    Args:
        lesions: `type`, and each column of `labels`: sides, px of the network's input.
        labels: Legend of each of the two columns; the first's medians sort the types.
    """
    (first, second), faces = labels, ("#56B4E9", "white")
    present = lesions.groupby("type")[first].median().sort_values().index
    fig, ax = plt.subplots(figsize=(6.0, 5.2))
    flier = {"marker": ".", "ms": 3, "mec": "0.4"}
    for number, name in enumerate(present):
        for shift, column, face in zip((-0.17, 0.17), labels, faces, strict=True):
            ax.boxplot(
                lesions.loc[lesions["type"] == name, column], orientation="horizontal",
                positions=[number + shift], widths=0.3, patch_artist=True, boxprops={"fc": face},
                medianprops={"color": "black", "lw": 1.8}, flierprops=flier,
            )  # fmt: skip
    counts = lesions["type"].value_counts()
    ax.set_yticks(range(len(present)), [f"{t}\nn = {counts[t]:,}" for t in present], fontsize=8.5)
    for stride, dash in ((8, "-"), (16, "--"), (32, ":")):
        ax.axvline(stride, color="#B23B00", lw=1.7, ls=dash, label=f"stride {stride}", zorder=1)
    for label, face in zip(labels.values(), faces, strict=True):
        ax.bar(0, 0, fc=face, ec="black", label=label)
    low = min(6.5, lesions[first].min() / 1.2)  # so that all three strides are visible
    ticks = [t for t in (2, 4, 8, 16, 32, 64, 128, 256, 512) if t > low]
    ax.set(xscale="log", xlabel="side of a square of the box's area, px of the input")
    ax.set_xlim(low, lesions[second].max() * 1.2)
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.13), frameon=False)
    return fig


# Training and predictions -----------------------------------------------------------------------


def draw_augmented(shown: Mapping[str, Sequence[tuple[np.ndarray, pd.DataFrame]]]) -> Figure:
    """Draw augmented images with their boxes, one row of four per title.

    Args:
        shown: By title, images and boxes as `detection.images.augmented_images` yields them.
    """
    fig, axes = plt.subplots(len(shown), 4, figsize=(8, 2.9 * len(shown)), squeeze=False)
    for row, (title, images) in zip(axes, shown.items(), strict=True):
        for ax, (grey, boxes) in zip(row, images, strict=False):
            show_radiograph(ax, grey)
            show_boxes(ax, boxes, names=False)
        row[0].set_title(title, loc="left")
        for ax in row:
            ax.set_axis_off()
    return fig


def draw_detector_learning(history: pd.DataFrame, epochs: int, with_mosaic: int) -> Figure:
    """Draw loss terms and validation mAP by epoch; epochs with mosaic have a grey background.

    Args:
        history: That of `detection.training.TrainedDetector`, or its first rows.
        epochs: Number of epochs of the whole run.
        with_mosaic: Number of epochs with mosaic.
    """
    fig, (ax_loss, ax_map) = plt.subplots(1, 2, figsize=(8, 3.1))
    for name, label, dash in (("box", "CIoU", "-"), ("cls", "class", "--"), ("dfl", "DFL", ":")):
        ax_loss.plot(history["epoch"], history[name], dash, marker="o", ms=3, label=label)
    evaluated = history.dropna(subset="map50")
    ax_map.plot(evaluated["epoch"], evaluated["map50"], marker="o", color="k")
    for ax, label in ((ax_loss, "training loss, weighted"), (ax_map, "validation mAP@0.5")):
        ax.set(xlabel="epoch", ylabel=label, ylim=(0, None), xlim=(0.5, epochs + 0.5))
        ax.axvspan(0.5, with_mosaic + 0.5, color="0.9", zorder=0, label="with mosaic")
    ax_loss.legend(fontsize=8)
    return fig


def draw_found(images: pd.DataFrame, truth: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Draw images, one per column, with true boxes above and predicted boxes below.

    Args:
        images: `image_id`, `cached_path`, and `scale`, cached over stored pixels.
        truth, found: `image_id`, `lesion_type` and corners in stored pixels.
    """
    width = 2.3 * len(images)
    fig, axes = plt.subplots(2, len(images), figsize=(width, 6.4), squeeze=False)
    for column, image in zip(axes.T, images.itertuples(), strict=True):
        for ax, boxes in zip(column, (truth, found), strict=True):
            show_radiograph(ax, load_cached(image.cached_path))
            show_boxes(ax, boxes[boxes["image_id"] == image.image_id], image.scale, names=False)
    axes[0, 0].set_title("true", loc="left")
    axes[1, 0].set_title("predicted", loc="left")
    lines = [plt.Line2D([], [], color=c, ls=d) for c, d in LESION_STYLE.values()]
    below = {"loc": "outside lower center", "ncols": 4, "fontsize": 8}
    fig.legend(lines, LESION_STYLE, facecolor="0.35", labelcolor="w", **below)
    return fig


def draw_precision_recall(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw precision-recall curves.

    Args:
        curves: By lesion type, as `metrics.detection.precision_recall` returns them.
    """
    fig, ax = plt.subplots(figsize=(6.2, 4))
    for number, (name, curve) in enumerate(curves.items()):
        colour, dash = LESION_STYLE[name]
        ax.plot(
            curve["recall"], curve["precision"], dash, color=_ON_WHITE.get(name, colour),
            label=name, marker="osD^vPX"[number], markevery=(number * 2, 15), ms=5,
        )  # fmt: skip
    ax.set(xlabel="recall", ylabel="best precision at this recall or beyond")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.legend(fontsize=8)
    return fig


def draw_intervals(
    scores: pd.DataFrame, diamond: str, xlabel: str, xlim: tuple[float, float | None]
) -> Figure:
    """Draw a value with its interval for each row, the first at the top.

    Args:
        scores: `value`, `low` and `high`; the index labels the vertical axis.
        diamond: Row to mark with a diamond, not a dot.
        xlabel, xlim: Of the horizontal axis.
    """
    fig, ax = plt.subplots(figsize=(6.3, 3.4))
    _draw_rows(ax, scores, diamond)
    ax.set(xlabel=xlabel, xlim=xlim)
    return fig


def _draw_rows(ax: Axes, scores: pd.DataFrame, diamond: str) -> None:
    for row, (name, score) in enumerate(scores[::-1].iterrows()):
        ax.plot([score["low"], score["high"]], [row, row], color="0.3", lw=2)
        ax.plot(score["value"], row, "D" if name == diamond else "o", color="k")
    ax.set_yticks(range(len(scores)), scores.index[::-1])


def draw_scores(scores: pd.DataFrame, found: pd.DataFrame, iou: float) -> Figure:
    """Draw average precision and fraction of boxes found, side by side, a row for each type.

    Types with too few true boxes have no average precision.

    Args:
        scores: What `metrics.detection.detection_table` returns.
        found: What `metrics.froc.found_table` returns, of the same types.
        iou: Least IoU of a match.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    shown = scores[["value", "low", "high"]].astype(float)
    shown.loc[~supported(scores) & (scores.index != "mAP")] = np.nan
    fraction = found.assign(value=found["count"] / found["total"]).reindex(scores.index)
    labels = [f"{name}  (n = {int(boxes)})" for name, boxes in scores["boxes"].items()]
    _draw_rows(left, shown.set_axis(labels), labels[-1])
    _draw_rows(right, fraction.set_axis(labels), labels[-1])
    blank = {"ha": "center", "va": "center", "fontsize": 8, "backgroundcolor": "white"}
    for row in np.flatnonzero(shown["value"].isna()):
        left.text(0.5, len(shown) - 1 - row, "too few boxes", **blank)
    left.set(xlabel=f"average precision at IoU {iou}", xlim=(-0.02, 1.02))
    right.set(xlabel="fraction of true boxes found", xlim=(-0.02, 1.02))
    return fig


def draw_froc(false_positives: pd.Series, sensitivity: pd.Series, points: pd.DataFrame) -> Figure:
    """Draw a free-response curve with intervals at seven operating points.

    Args:
        false_positives: False positives per image along the curve.
        sensitivity: Along the curve, in [0, 1].
        points: As `metrics.froc.froc_table` returns them.
    """
    fig, ax = plt.subplots(figsize=(6.2, 3.6))
    ax.step(false_positives, sensitivity, where="post", color="k")
    error = np.abs(points[["low", "high"]].to_numpy().T - points["value"].to_numpy())
    ax.errorbar(points.index, points["value"], yerr=error, fmt="o", color="k", ms=4, capsize=3)
    ax.set_xscale("log", base=2)
    ax.set_xticks(points.index, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    ax.set(xlim=(0.1, 9), ylim=(0, 1), xlabel="false positives per image", ylabel="sensitivity")
    return fig


def draw_examples(
    rows: Mapping[str, pd.DataFrame], images: pd.DataFrame, truth: pd.DataFrame, found: pd.DataFrame
) -> Figure:
    """Draw three rows of up to four patches around boxes, one of each lesion type first.

    Args:
        rows: By title, boxes in stored pixels in order of preference; may be empty.
        images: `image_id`, `cached_path`, and `scale`, cached over stored pixels.
        truth: True boxes in stored pixels; solid lines.
        found: Predicted boxes in stored pixels; dashed lines.
    """
    by_id = images.set_index("image_id")
    fig, axes = plt.subplots(3, 4, figsize=(8, 6.6))
    for row, (name, table) in zip(axes, rows.items(), strict=True):
        one_each = table.drop_duplicates("lesion_type")
        some = pd.concat([one_each, table.drop(one_each.index)]).head(4)
        row[0].set_title(f"{name}: none", loc="left")
        for ax, box in zip(row, some.itertuples(), strict=False):
            _draw_patch(ax, box, by_id.loc[box.image_id], {"-": truth, "--": found})
            ax.set_title(f"{name}: {PAPER_CODES[box.lesion_type]}", loc="left")
        for ax in row:
            ax.set_axis_off()
    return fig


def _draw_patch(ax: Axes, box: tuple, image: pd.Series, tables: dict[str, pd.DataFrame]) -> None:
    """Draw the surroundings of a box, with the boxes of each table in its line style."""
    scale = image["scale"]
    show_radiograph(ax, load_cached(image["cached_path"]))
    for dash, table in tables.items():
        for own in table[table["image_id"] == box.image_id].itertuples():
            x, y, right, bottom = np.array([getattr(own, corner) for corner in CORNERS]) * scale
            edge = {"fill": False, "ec": LESION_STYLE[own.lesion_type][0], "ls": dash, "lw": 1.6}
            ax.add_patch(plt.Rectangle((x, y), right - x, bottom - y, **edge))
    x, y = np.array([box.xmin + box.xmax, box.ymin + box.ymax]) / 2 * scale
    reach = max(box.xmax - box.xmin, box.ymax - box.ymin, 240 / scale / 2) * scale
    ax.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))

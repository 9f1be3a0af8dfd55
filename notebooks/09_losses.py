# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# (chap:losses)=
# # 09 · Three losses
#
# :::{admonition} In this chapter
# **You will be able to** write down what YOLO11-L minimises, term by term, explain why overlap alone cannot train a
# box that misses its lesion, what the focal loss does to the many anchors without a lesion, and why an edge
# may be predicted as a distribution.
#
# **You need** {ref}`chap:data` for boxes and lesion types, {ref}`chap:yolo11` for the cells that predict,
# and derivatives of functions of one variable.
#
# **It takes** twenty-five minutes of reading; the code runs in about a minute on two cores.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
images_at_once = 6  # of the batch on which losses are evaluated

# %% tags=["hide-input"]
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

from dernet_utils.book.figures import show_figure
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.dataset.prepared import read_boxes, read_images
from dernet_utils.detection import losses, yolo
from dernet_utils.detection.images import DetectorRecipe, augmented_images

workspace = open_chapter(profile)
images, all_boxes = read_images(workspace), read_boxes(workspace)
training = images[(images["split"] == "train") & images["abnormal"]]
recipe = DetectorRecipe.of(workspace.profile)
H, W = recipe.input_size
glue_values("c09", {
    "profile": workspace.profile.name, "px": f"{H} × {W}", "images": images_at_once,
    "kind": workspace.image_kind,
})  # fmt: skip

# %% [markdown]
# {ref}`chap:yolo11-training` trains the detector on a sum of three terms, {eq}`eq:total-loss`: one for the position
# of a box, one for its class, and one for its edges. This chapter explains all three. We write each in a few lines,
# check it against a case that can be computed by hand, and plot it.
#
# ## A box that misses
#
# How good is a box? The usual measure is the *intersection over union* with the true box,
#
# $$
# \mathrm{IoU} = \frac{|\mathbf{b} \cap \mathbf{b}^{gt}|}{|\mathbf{b} \cup \mathbf{b}^{gt}|} .
# $$ (eq:iou)
#
# It is 1 for equal boxes and does not depend on the unit of length. As a training signal it has a flaw: for boxes
# that do not overlap it is 0, however far apart they are, so its gradient is zero and does not show in which
# direction the predicted box should move. *Complete IoU* {cite}`zheng2020` adds two terms, the paper's Eq. 5:
#
# ```{math}
# :label: eq:ciou
# \begin{aligned}
# \mathcal{L}_{CIoU} &= 1 - \mathrm{IoU} + \frac{\rho^2(\mathbf{b}, \mathbf{b}^{gt})}{c^2} + \alpha v, \\
# v &= \frac{4}{\pi^2} \Big( \arctan \frac{w^{gt}}{h^{gt}} - \arctan \frac{w}{h} \Big)^2, \\
# \alpha &= \frac{v}{1 - \mathrm{IoU} + v} .
# \end{aligned}
# ```
#
# $\rho$ is the distance between the two centres and $c$ the diagonal of the smallest box around both, so the middle
# term lies between 0 and 1 and falls as the centres approach. $v$ compares the aspect ratios of the boxes; its weight
# $\alpha$ is small as long as they hardly overlap, because position then matters more than shape. We compute two
# cases by hand:


# %%
def iou(b, g):
    """Overlap of two boxes (xmin, ymin, xmax, ymax)."""
    shared = np.prod(np.clip(np.minimum(b[2:], g[2:]) - np.maximum(b[:2], g[:2]), 0, None))
    return shared / (np.prod(b[2:] - b[:2]) + np.prod(g[2:] - g[:2]) - shared)


def ciou_loss(b, g):
    """Eq. 5, one term after the other."""
    rho_2 = np.sum((b[:2] + b[2:] - g[:2] - g[2:]) ** 2) / 4
    c_2 = np.sum((np.maximum(b[2:], g[2:]) - np.minimum(b[:2], g[:2])) ** 2)
    (w, h), (w_gt, h_gt) = b[2:] - b[:2], g[2:] - g[:2]
    v = 4 / np.pi**2 * (np.arctan(w_gt / h_gt) - np.arctan(w / h)) ** 2
    alpha = v / (1 - iou(b, g) + v) if v else 0.0
    return 1 - iou(b, g) + rho_2 / c_2 + alpha * v


true = np.array([0.0, 0.0, 2.0, 2.0])
# Intersection 2, union 6; the centres are 1 apart, and the box around both is 3 x 2.
beside = true + np.array([1, 0, 1, 0])
assert np.isclose(ciou_loss(beside, true), 1 - 2 / 6 + 1 / (3**2 + 2**2))
flat = np.array([-1.0, 0.5, 3.0, 1.5])  # the same centre, 4 x 1: again 2 of 6
v = 4 / np.pi**2 * (np.arctan(1) - np.arctan(4)) ** 2
assert np.isclose(ciou_loss(flat, true), 1 - 2 / 6 + v**2 / (1 - 2 / 6 + v))

# %% [markdown]
# `losses.complete_iou_loss` computes the same for many boxes at once, and is differentiable. When gradients are
# taken, the factor $\alpha$ is treated as a constant: it sets how much the shape should count, and is not itself
# to be minimised.

# %%
generator = torch.Generator().manual_seed(workspace.profile.seed)
corners = torch.rand(2, 200, 2, 2, generator=generator) * 60
b, g = torch.cat([corners.amin(2), corners.amax(2) + 1], dim=-1)
at_once = losses.complete_iou_loss(b, g).numpy()
one_by_one = [ciou_loss(*pair) for pair in zip(b.double().numpy(), g.double().numpy(), strict=True)]
assert np.allclose(at_once, one_by_one, atol=1e-4)

# %% [markdown]
# We shift a box of 20 × 20 pixels away from its true position, and then vary its sides at the true position:

# %%
side = 20.0
g = torch.tensor([0.0, 0.0, side, side])
shift = torch.linspace(0.25, 60, 240, requires_grad=True)
moved = g + torch.stack([shift, 0 * shift, shift, 0 * shift], dim=1)
shared = (side - shift).clamp(min=0) * side
by_overlap, by_ciou = 1 - shared / (2 * side**2 - shared), losses.complete_iou_loss(moved, g)
slope_overlap, slope_ciou = (
    torch.autograd.grad(loss.sum(), shift, retain_graph=True)[0] for loss in (by_overlap, by_ciou)
)
apart = shift.detach() > side + 0.1
assert (slope_overlap[apart] == 0).all() and (slope_ciou[apart] > 0).all()

sides = torch.linspace(4, 60, 113)
width, height = torch.meshgrid(sides, sides, indexing="xy")
centred = torch.stack([-width, -height, width, height], dim=-1) / 2
surface = losses.complete_iou_loss(centred, torch.tensor([-10.0, -10.0, 10.0, 10.0]))
best = np.unravel_index(int(surface.argmin()), surface.shape)
assert width[best] == height[best] == side and surface.min() < 1e-5

# %% tags=["hide-input", "remove-output"]
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(8.2, 2.9), width_ratios=[1, 1, 1.15])
x = shift.detach()
for name, loss, slope, dash in (
    ("1 − IoU", by_overlap, slope_overlap, "--"),
    ("complete IoU", by_ciou, slope_ciou, "-"),
):
    left.plot(x, loss.detach(), dash, label=name)
    middle.plot(x, slope, dash, label=name)
left.set(xlabel="shift, px", ylabel="loss", ylim=(0, 1.7))
middle.set(xlabel="shift, px", ylabel="slope of the loss, 1/px", ylim=(-0.005, 0.12))
left.legend(fontsize=8, loc="lower right")
levels = np.linspace(0, 1.2, 13)
drawn = right.contourf(sides, sides, surface, levels, cmap="viridis_r", extend="max")
right.plot(side, side, "+", color="white", ms=10)
right.set(xlabel="width, px", ylabel="height, px", aspect="equal")
fig.colorbar(drawn, ax=right, label="loss", shrink=0.8)
show_figure("c09-fig-ciou", fig)

# %% [markdown]
# ```{glue:figure} c09-fig-ciou
# ---
# name: fig:ciou
# alt: >-
#   Three panels. Left, loss against shift: one minus the overlap is flat beyond 20 pixels, complete IoU goes on
#   rising. Middle, the slopes: the first is zero beyond 20 pixels. Right, a surface over width and height with its
#   lowest point at 20 by 20.
# ---
# Complete-IoU loss of a box of 20 × 20 px. Left and middle: the loss and its slope as the box is shifted sideways.
# Right: the loss at the true position with other sides; the cross marks the true size. The figure does not depend on
# data or profile.
# ```
#
# In {numref}`fig:ciou` the overlap has no slope beyond 20 pixels, where the boxes no longer meet. Complete IoU still
# has a slope there, small but of the right sign. In the right panel the loss falls from all sides towards the true
# size, more gently along the two lines where one side is already right.
#
# ### What one pixel costs
#
# IoU is a ratio of areas, so an error of one pixel matters more for a small box than for a large one. Shift a square
# of side $s$ by one pixel: the intersection is $s(s-1)$, the union $s(s+1)$, and $\mathrm{IoU} = (s-1)/(s+1)$. For a
# small lesion, an error of one pixel is costly.

# %%
boxes = all_boxes[all_boxes["image_id"].isin(training["image_id"])]
image_of = images.set_index("image_id").loc[boxes["image_id"]]
gain = np.minimum(H / image_of["height"], W / image_of["width"]).to_numpy()  # of the letterbox
area = (boxes["xmax"] - boxes["xmin"]) * (boxes["ymax"] - boxes["ymin"])
side_px = np.sqrt(area) * gain  # of a square of the same area, in the network's pixels
by_type = side_px.groupby(boxes["lesion_type"]).median().reindex(LESION_TYPES)
s = side_px.median()
one_px = (s - 1) / (s + 1)
square = torch.tensor([0.0, 0.0, 8.0, 8.0])
assert np.isclose(iou((square + torch.tensor([1.0, 0, 1, 0])).numpy(), square.numpy()), 7 / 9)
glue_values("c09", {"side": f"{s:.1f}", "one-px": f"{one_px:.2f}", "boxes": f"{len(boxes):,}"})
by_type.round(1).rename("median side, px")

# %% [markdown]
# At {glue:text}`c09-px` px the median of this run's {glue:text}`c09-boxes` training boxes has the area of a square of
# side {glue:text}`c09-side` px, and an error of one pixel leaves it an IoU of {glue:text}`c09-one-px`. A box needs at
# least 0.5 to count as found. So the resolution of the input limits how small a lesion this detector can localise.
#
# ## Many anchors, few lesions
#
# YOLO11 predicts one box per cell of its maps; the cell's centre is called an *anchor*. Each anchor also predicts a
# probability for each of the seven types, and nearly always there is no lesion. With binary cross-entropy, $-\log
# p_t$, where $p_t$ is the predicted probability of the true class, thousands of small losses add up and may outweigh
# the few large ones. The *focal loss* {cite}`lin2017`, the paper's Eq. 6, reduces them:
#
# $$
# \mathcal{L}_{Focal} = -\alpha_t (1 - p_t)^\gamma \log p_t .
# $$ (eq:focal)
#
# At the paper's $\gamma = 2$, a prediction that is already right with $p_t = 0.9$ keeps one hundredth of its loss; a
# wrong one keeps nearly all of it. $\alpha_t$ is 0.25 for a lesion and 0.75 for no lesion: the exponent reduces the
# negatives so far that, without $\alpha_t$, lesions would dominate.

# %%
assert np.isclose((1 - 0.9) ** 2, 0.01)
z = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64, requires_grad=True)
p, gamma, alpha = z.sigmoid(), losses.GAMMA, losses.ALPHA
for_lesion = -alpha * (1 - p) ** gamma * p.log()
for_none = -(1 - alpha) * p**gamma * (1 - p).log()
one, zero = torch.ones_like(z), torch.zeros_like(z)
assert torch.allclose(losses.focal_loss(z, one), for_lesion)
assert torch.allclose(losses.focal_loss(z, zero), for_none)

# %% [markdown]
# Training follows the gradient, not the value of the loss. With respect to the logit $z$ of a lesion, with $p_t = p =
# \sigma(z)$ and $p' = p(1 - p)$, the product rule gives
#
# $$
# \frac{\partial \mathcal{L}_{Focal}}{\partial z}
# = \alpha_t (1 - p)^\gamma \big( \gamma\, p \log p + p - 1 \big),
# $$ (eq:focal-gradient)
#
# where cross-entropy has $p - 1$ alone.

# %%
(by_torch,) = torch.autograd.grad(for_lesion.sum(), z)
by_hand = alpha * (1 - p) ** gamma * (gamma * p * p.log() + p - 1)
assert torch.allclose(by_torch, by_hand)

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
p = np.linspace(0.005, 0.995, 200)
for gamma, dash in ((0, ":"), (1, "--"), (2, "-"), (5, "-.")):
    left.plot(p, -((1 - p) ** gamma) * np.log(p), dash, label=f"γ = {gamma}")
    right.plot(p, (1 - p) ** gamma * (1 - p - gamma * p * np.log(p)), dash)
left.set(xlabel="probability of the true class", ylabel="loss", ylim=(0, 4))
right.set(xlabel="probability of the true class", ylabel="size of the gradient", ylim=(0, 1.5))
left.legend(fontsize=8)
show_figure("c09-fig-focal", fig)

# %% [markdown]
# ```{glue:figure} c09-fig-focal
# ---
# name: fig:focal
# alt: >-
#   Two panels against the probability of the true class. Left, four losses that fall to zero, the larger gamma the
#   sooner. Right, the size of their gradients, likewise.
# ---
# Focal loss and the size of its gradient with respect to the logit, without $\alpha_t$, for four exponents; $\gamma =
# 0$ is cross-entropy, the paper uses 2. The figure does not depend on data or profile.
# ```
#
# Another difficulty is specific to YOLO11. Its targets are not 0 and 1 but *soft*: the target of an anchor that is
# assigned to a lesion measures how well its current box fits, for example 0.3 or 0.8. {eq}`eq:focal` does not define
# $p_t$ for such a target. With a target $t$ we use $|t - p|$ for $1 - p_t$, cross-entropy with $t$ for $-\log p_t$,
# and for $\alpha_t$ the mean of both values, weighted by $t$ and $1 - t$. For $t$ of 0 and 1 this is {eq}`eq:focal`,
# and for any other $t$ the smallest loss is zero, at $p = t$. Without $\alpha_t$ it is the *quality focal loss* of
# the authors who proposed the third term {cite}`li2020`. Another generalisation, which uses such a weighted mean for
# $p_t$ too, has its minimum elsewhere:

# %%
t = torch.tensor(0.3, dtype=torch.float64)
logits = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
entropy = F.binary_cross_entropy_with_logits(logits, t.expand_as(logits), reduction="none")
prob = logits.sigmoid()
by_mean = (1 - t * prob - (1 - t) * (1 - prob)) ** losses.GAMMA * entropy
at_least, at_least_by_mean = (
    prob[loss.argmin()] for loss in (losses.focal_loss(logits, t.expand_as(logits)), by_mean)
)
assert abs(at_least - t) < 1e-3 < abs(at_least_by_mean - t)
glue_values("c09", {"soft": f"{float(at_least_by_mean):.2f}"})

# %% [markdown]
# For a target of 0.3, that form would train the network to predict {glue:text}`c09-soft`.
#
# ### Counted on images
#
# How many anchors are there, and how few lesions? We pass {glue:text}`c09-images` training images, augmented as in an
# epoch without mosaic, through the untrained network and run the assigner, which decides which anchors are
# responsible for a lesion.

# %%
network = yolo.build_detector(LESION_TYPES, recipe.seed).train()
folder = workspace.cache / "yolo-losses"
some = training.head(images_at_once)
augmented = list(augmented_images(some, all_boxes, recipe, recipe.epochs + 1, folder))
truth = pd.concat([own.assign(row=row) for row, (_, own) in enumerate(augmented)])
pixels = torch.stack([torch.tensor(grey) for grey, _ in augmented])
corners = torch.tensor(truth[list(CORNERS)].to_numpy(np.float32)) / torch.tensor([W, H] * 2)
batch = {
    "img": pixels[:, None].repeat(1, 3, 1, 1) / 255,
    "batch_idx": torch.tensor(truth["row"].to_numpy(np.float32)),
    "cls": torch.tensor([[float(LESION_TYPES.index(name))] for name in truth["lesion_type"]]),
    "bboxes": box_convert(corners, "xyxy", "cxcywh"),
}

# %%
with torch.no_grad():
    given = network.assigned(batch)
anchors, taken = len(given.lesion), int(given.lesion.sum())
assert anchors == len(some) * sum((H // stride) * (W // stride) for stride in (8, 16, 32))
assert (given.class_target[~given.lesion] == 0).all() and taken >= 1
kinds = truth["lesion_type"].value_counts().reindex(LESION_TYPES, fill_value=0)
targets = given.box_target[given.lesion]
assert (targets[:, 2:] > targets[:, :2]).all()
glue_values("c09", {
    "anchors": f"{anchors:,}", "taken": f"{taken:,}", "batch-boxes": len(truth),
    "odds": f"{(anchors - taken) / taken:.0f}",
})  # fmt: skip
pd.Series({"anchors": anchors, "with a lesion": taken, "boxes": len(truth), **kinds})

# %% [markdown]
# Of {glue:text}`c09-anchors` anchors, {glue:text}`c09-taken` are assigned to one of {glue:text}`c09-batch-boxes`
# boxes, one for every {glue:text}`c09-odds` others. This is the imbalance for which the focal loss was designed.
# The paper's 46.9 : 1 is a different one, between the commonest lesion type and the rarest. Each type is
# a binary decision of its own, and reducing all negatives alike hardly helps the few anchors of a rare type.
#
# Soft targets matter at the start of training. A network as ultralytics initialises it is undecided about each edge:
# its distribution over 16 distances, the subject of the last section, is flat, with a mean of 7.5 strides. Boxes 15
# strides wide hardly fit any lesion, so hardly any target is far from zero. Our network starts with edges about one
# stride away and, as the authors of the focal loss advise, with a probability of 0.01 for each type. It therefore
# receives larger targets from the first step on:


# %%
def mean_distance(given):
    return float((given.edge_logits.softmax(-1) @ torch.arange(16.0)).mean())


as_in_library = yolo.build_detector(LESION_TYPES, recipe.seed).train()
as_in_library.model[-1].bias_init()  # ultralytics' own
with torch.no_grad():
    flat = as_in_library.assigned(batch)
assert abs(mean_distance(flat) - 7.5) < 0.5 and 0.5 < mean_distance(given) < 3
starts = {"ultralytics": flat, "here": given}
pd.DataFrame(
    {
        "mean distance, strides": {name: mean_distance(one) for name, one in starts.items()},
        "sum of the targets": {n: float(one.class_target.sum()) for n, one in starts.items()},
    }
).round(3)

# %% [markdown]
# Which outputs drive the training? We add up the absolute gradients at the class logits and compute the fraction that
# comes from negatives, that is, from outputs whose target is zero.


# %%
def cross_entropy(logits, target):
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def from_negatives(given, loss):
    """Fraction of the absolute gradient at the class logits that comes from negatives."""
    logits = given.class_logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, given.class_target).sum(), logits)
    return float(gradient.abs()[given.class_target == 0].sum() / gradient.abs().sum())


fractions = {loss.__name__: from_negatives(given, loss) for loss in (cross_entropy, losses.focal_loss)}
assert all(0 <= fraction <= 1 for fraction in fractions.values())
pd.Series(fractions, name="fraction of the gradient from negatives").to_frame()

# %% [markdown]
# How this changes during training must be measured.
#
# ### An experiment: with and without the focal loss
#
# Two networks start from the same weights and train on the same {glue:text}`c09-images` images for a few steps, one
# with the focal loss and one with cross-entropy as its class term; the rest of {eq}`eq:total-loss` is the same. Both
# minimise this chapter's `losses.total_loss`. We record two numbers: the probability that anchors with a lesion
# predict for its type, and the fraction of the gradient that comes from negatives. The experiment shows the mechanism
# on training images; it does not show which loss finds more lesions on other images.


# %%
def short_training(class_loss, steps=16):
    """Probability at lesions and fraction from negatives, before each step and after the last."""
    network = yolo.build_detector(LESION_TYPES, recipe.seed).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    rows = []
    for _ in range(steps + 1):
        given = network.assigned(batch)
        own = given.class_target > 0
        prob = given.class_logits.detach().sigmoid()[own].mean()
        rows.append({"prob": float(prob), "negatives": from_negatives(given, class_loss)})
        terms = losses.total_loss(given, class_loss=class_loss)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return pd.DataFrame(rows)


# %%
torch.manual_seed(workspace.profile.seed)
trials = {"focal loss": losses.focal_loss, "cross-entropy": cross_entropy}
runs = {name: short_training(class_loss) for name, class_loss in trials.items()}
start = [run["prob"].iloc[0] for run in runs.values()]
assert np.isclose(*start)  # they start from the same weights
assert all(run.notna().all(axis=None) for run in runs.values())

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
for (name, run), dash in zip(runs.items(), ("-", "--"), strict=True):
    left.semilogy(run["prob"], dash, label=name)
    right.plot(run["negatives"], dash)
left.set(xlabel="training steps", ylabel="probability at lesions")
right.set(xlabel="training steps", ylabel="fraction of the gradient\nfrom negatives", ylim=(0, 1.02))
left.legend(fontsize=8)
show_figure("c09-fig-experiment", fig)
last = {name: run.iloc[-1] for name, run in runs.items()}
glue_values("c09", {
    "prob-focal": f"{last['focal loss']['prob']:.3f}",
    "prob-entropy": f"{last['cross-entropy']['prob']:.3f}",
    "none-focal": f"{last['focal loss']['negatives']:.0%}",
    "none-entropy": f"{last['cross-entropy']['negatives']:.0%}",
})

# %% [markdown]
# ```{glue:figure} c09-fig-experiment
# ---
# name: fig:focal-experiment
# alt: >-
#   Two panels over training steps, a line each for the focal loss and cross-entropy. Left, the probability that
#   anchors with a lesion predict for its type, on a logarithmic scale. Right, the fraction of the gradient that
#   comes from negatives.
# ---
# The first steps of YOLO11-L from random weights, with the focal loss and with cross-entropy as its class term. n =
# {glue:text}`c09-images` {glue:text}`c09-kind` of the training split, the same at each step; one seed; profile
# {glue:text}`c09-profile`.
# ```
#
# After the last step in {numref}`fig:focal-experiment`, anchors with a lesion predict its type with a probability of
# {glue:text}`c09-prob-focal` with the focal loss and {glue:text}`c09-prob-entropy` with cross-entropy;
# {glue:text}`c09-none-focal` and {glue:text}`c09-none-entropy` of the gradient come from negatives. The focal loss is
# also small: with $\alpha_t = 0.25$ and the paper's $\lambda_{cls} = 0.5$ the class term may become much smaller than
# the other two. Its effect on the lesions found after a short run is not established. The profile `laptop` uses
# cross-entropy instead; that choice rests on unrecorded pilot runs alone, one seed each ({ref}`sec:chosen`).
#
# ## An edge as a distribution
#
# The third term concerns the box again. Instead of one number, YOLO11 predicts for each edge a distribution over the
# distances 0, 1, …, 15, in units of the anchor's stride, and takes its mean. The *distribution focal loss*
# {cite}`li2020` rewards probability at the two whole numbers around the true distance $y$, in proportion to their
# closeness:
#
# $$
# \mathcal{L}_{DFL} = -(y_{i+1} - y) \log S_i - (y - y_i) \log S_{i+1},
# \qquad y_i \le y < y_{i+1} .
# $$ (eq:dfl)
#
# $S_i$ is the probability of distance $y_i$. The paper uses this loss for blurred edges, such as an osteophyte's. An
# edge at 3.2 should have probability 0.8 at 3 and 0.2 at 4; their mean is 3.2.

# %%
exact = torch.full((16,), 1e-9, dtype=torch.float64)
exact[3], exact[4] = 0.8, 0.2
edge = torch.tensor(3.2, dtype=torch.float64)
assert torch.isclose((exact * torch.arange(16)).sum(), edge, atol=1e-6)
least = losses.distribution_focal_loss(exact.log(), edge)
entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))
assert np.isclose(float(least), entropy, atol=1e-6)  # between two bins it is never zero
spread, wide = (
    torch.exp(-0.5 * ((torch.arange(16) - 3.2) / by).double() ** 2) for by in (1.5, 2.5)
)
assert losses.distribution_focal_loss(spread.log(), edge) > least

distance = torch.linspace(0, 12, 241, dtype=torch.float64)
curves = {
    name: losses.distribution_focal_loss(dist.log().expand(len(distance), 16), distance)
    for name, dist in {"0.8 and 0.2": exact, "spread by 1.5": spread, "spread by 2.5": wide}.items()
}
far, near = (np.abs(distance.numpy() - at).argmin() for at in (9.0, 3.2))
assert curves["0.8 and 0.2"][near] < curves["spread by 1.5"][near] < curves["spread by 2.5"][near]
assert curves["0.8 and 0.2"][far] > curves["spread by 1.5"][far] > curves["spread by 2.5"][far]

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
for number, (dist, dash) in enumerate(((exact, "-"), (spread, "--"), (wide, ":"))):
    left.plot(dist / dist.sum(), dash, marker="os^"[number], ms=4)
for (name, curve), dash in zip(curves.items(), ("-", "--", ":"), strict=True):
    right.plot(distance, curve, dash, label=name)
for ax in (left, right):
    ax.axvline(3.2, color="0.5", lw=0.8)
left.set(xlabel="distance, strides", ylabel="probability")
right.set(xlabel="true distance, strides", ylabel="distribution focal loss", ylim=(0, 12))
right.legend(fontsize=8)
show_figure("c09-fig-dfl", fig)

# %% [markdown]
# ```{glue:figure} c09-fig-dfl
# ---
# name: fig:dfl
# alt: >-
#   Left, three distributions over distances around 3.2, the first on two whole numbers only. Right, their losses
#   against the true distance: the sharper the distribution, the lower the loss at 3.2 and the steeper it rises away
#   from it.
# ---
# Three predictions of an edge at 3.2 strides, and the loss of each against the true distance; the
# vertical line is at 3.2. The figure does not depend on data or profile.
# ```
#
# A sharp distribution has the lowest loss where it is right and the highest where it is wrong ({numref}`fig:dfl`).
# For an edge on which readers would disagree, a broad distribution is better. Its width measures that uncertainty,
# which a single number cannot express.
#
# ## The sum
#
# The trainer's loss must equal {eq}`eq:total-loss`. On the batch above, with the same assignments, we compare our
# three terms with the trainer's, both with the exponent and the class weight of this run ({glue:text}`c09-gamma` and
# {glue:text}`c09-alpha`). The last two columns use the paper's focal loss and cross-entropy, respectively, as the
# class term.

# %%
assert (network.args.box, network.args.cls, network.args.dfl) == (7.5, 0.5, 1.5)
network.focal = recipe.focal  # this run's gamma and alpha
this_runs = partial(losses.focal_loss, **recipe.focal)
with torch.no_grad():
    _, trained = network.loss(batch)
    ours = losses.total_loss(network.assigned(batch), class_loss=this_runs)
    focal = losses.total_loss(network.assigned(batch))
    entropy = losses.total_loss(network.assigned(batch), class_loss=cross_entropy)
trained = {name.removesuffix("_loss"): float(value) for name, value in trained.items()}
for name, value in trained.items():
    assert np.isclose(float(ours[name]), value, rtol=1e-4)
terms = {"trainer": trained, "by hand": ours}
terms |= {"with the paper's focal loss": focal, "with cross-entropy": entropy}
terms = pd.DataFrame(terms).astype(float)
parts = terms["with the paper's focal loss"] / terms["with the paper's focal loss"].sum()
glue_values("c09", {
    "gamma": f"{recipe.gamma:g}", "alpha": f"{recipe.alpha:g}",
    "box-share": f"{parts['box']:.0%}", "class-share": f"{parts['cls']:.0%}",
})  # fmt: skip
terms.round(3)

# %% [markdown]
# With the paper's focal loss, {glue:text}`c09-box-share` of this untrained network's sum comes from the
# positions of boxes and {glue:text}`c09-class-share` from their classes.
#
# ## Paper beside ours
#
# The table lists settings of the losses. Neither column is a result.

# %% tags=["hide-input"]
class_term = "focal loss" if recipe.gamma else "cross-entropy, weighted by class"
pd.DataFrame(
    {
        "paper": ["7.5, 0.5, 1.5", "2.0", "0.25 (companion code)", "focal loss"],
        "this edition": ["7.5, 0.5, 1.5", f"{recipe.gamma}", f"{recipe.alpha}", class_term],
    },
    index=["weights of box, class, DFL", "focusing exponent", "class weight", "class term"],
)

# %% [markdown]
# ## Exercises
#
# Change the chapter first: set `images_at_once = 2` in the parameters and run all cells. Which of the counts
# change, and which fractions hardly change?
#
# ```{exercise}
# :label: ex:losses-touch
#
# By hand: two squares of side 1 touch along an edge. What is their complete IoU loss, and what does it
# approach when one is moved away to infinity?
# ```

# %% [markdown]
# ````{solution-start} ex:losses-touch
# :class: dropdown
# ````
# They do not overlap, their centres are 1 apart, and the box around both has the squared diagonal $1 + 4$: the loss
# is $1 + 1/5$. Far away, the distances between centres and between corners are nearly the same, and the loss
# approaches 2.

# %%
unit = np.array([0.0, 0.0, 1.0, 1.0])
assert np.isclose(ciou_loss(unit + np.array([1, 0, 1, 0]), unit), 1.2)
assert np.isclose(ciou_loss(unit + np.array([1e6, 0, 1e6, 0]), unit), 2, atol=1e-5)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:losses-even
#
# In code: all anchors without a lesion predict $p = 0.01$, all with one predict $0.3$, and the former are 200 times
# as many. Above which $\gamma$ is the total gradient of the lesions larger than that of the negatives, without
# $\alpha_t$?
# ```

# %% [markdown]
# ````{solution-start} ex:losses-even
# :class: dropdown
# ````
# The gradient of one output with probability $p_t$ of its true class has the size $(1 - p_t)^\gamma (1 - p_t -
# \gamma p_t \log p_t)$, by {eq}`eq:focal-gradient`.


# %%
def gradient_size(p_t, gamma):
    return (1 - p_t) ** gamma * (1 - p_t - gamma * p_t * np.log(p_t))


gammas = np.arange(0, 3, 0.01)
lesions, negatives = gradient_size(0.3, gammas), 200 * gradient_size(0.99, gammas)
from_gamma = gammas[np.argmax(lesions > negatives)]
assert lesions[0] < negatives[0] and 0 < from_gamma < 1
print(f"from gamma = {from_gamma:.2f}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:losses-precision
#
# A question to the paper: it sets the weights "to prioritize geometric precision". Do they, measured by
# the contribution of each term to the sum? Use the table above, with cross-entropy and with the focal loss.
# ```

# %% [markdown]
# ````{solution-start} ex:losses-precision
# :class: dropdown
# ````
# A weight alone does not answer this, because the terms differ in size. What counts is weight times term, and it
# changes during training. Fractions of the sum for an untrained network:

# %%
of_sum = terms / terms.sum()
assert np.allclose(of_sum.sum(), 1)
of_sum.round(2)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - Overlap gives no signal for boxes that do not meet; the distance of their centres does.
# - At {glue:text}`c09-px` px an error of a single pixel lowers a small lesion's IoU considerably.
# - The focal loss reduces the weight of easy predictions: here there are {glue:text}`c09-anchors` anchors for
#   {glue:text}`c09-batch-boxes` boxes. It does not balance rare against common types.
# - An edge may be predicted as a distribution; a sharp one has the higher loss where it is wrong.
# - Training minimises the weighted sum of the three, and a cell of this page checks it.

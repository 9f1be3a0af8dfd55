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
# **You will be able to** write down what YOLO11-L minimises, term by term, say why overlap alone
# cannot teach a box that misses, what the focal loss does to the many places where nothing is, and
# why an edge may be a distribution.
#
# **You need** {ref}`chap:data` for boxes and lesion types, {ref}`chap:yolo11` for the places that answer,
# and derivatives of one variable.
#
# **It takes** twenty-five minutes of reading; the code runs in about a minute on two cores.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop or paper; empty: DERNET_PROFILE, else laptop
films_at_once = 6  # of the batch that losses are counted on

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
from dernet_utils.detection import images as detection_images
from dernet_utils.detection import losses, yolo

# %%
workspace = open_chapter(profile)
images, all_boxes = read_images(workspace), read_boxes(workspace)
learnt = images[(images["split"] == "train") & images["abnormal"]]
recipe = detection_images.DetectorRecipe.of(workspace.profile)
H, W = recipe.input_size

# %% tags=["remove-cell"]
glue_values("c09", {
    "profile": workspace.profile.name,
    "px": f"{H} × {W}",
})
kind = "virtual radiographs" if workspace.profile.virtual else "radiographs"
glue_values("c09", {
    "kind": kind,
    "films": films_at_once,
})

# %% [markdown]
# {ref}`chap:yolo11-training` trains the detector on a sum of three terms, {eq}`eq:total-loss`: where a
# box lies, what it holds, and how sharp its edges are. This chapter takes the three apart. Each is
# written in a few lines, checked against a case that can be computed by hand, and drawn.
#
# ## A box that misses
#
# How good is a box? The usual answer is the *intersection over union* with the true one,
#
# $$
# \mathrm{IoU} = \frac{|\mathbf{b} \cap \mathbf{b}^{gt}|}{|\mathbf{b} \cup \mathbf{b}^{gt}|} .
# $$ (eq:iou)
#
# It is 1 for equal boxes and does not care for their size in millimetres. As a teacher it has a flaw:
# as soon as two boxes do not meet it is 0, however far apart they are, and a network that is told 0
# everywhere does not know which way to go. *Complete IoU* {cite}`zheng2020` adds two terms, the
# paper's Eq. 5:
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
# $\rho$ is the distance between the two centres and $c$ the diagonal of the smallest box around both, so
# the middle term lies between 0 and 1 and falls as the centres approach. $v$ compares the proportions
# of the boxes; its weight $\alpha$ is small as long as they hardly overlap, for then place matters more
# than shape. By hand, for two squares:


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


# %%
true = np.array([0.0, 0.0, 2.0, 2.0])
# They share 2 of 6, their centres are 1 apart, and the box round both is 3 x 2.
beside = true + np.array([1, 0, 1, 0])
assert np.isclose(ciou_loss(beside, true), 1 - 2 / 6 + 1 / (3**2 + 2**2))
flat = np.array([-1.0, 0.5, 3.0, 1.5])  # the same centre, 4 x 1: they share 2 of 6
v = 4 / np.pi**2 * (np.arctan(1) - np.arctan(4)) ** 2
assert np.isclose(ciou_loss(flat, true), 1 - 2 / 6 + v**2 / (1 - 2 / 6 + v))

# %% [markdown]
# `losses.complete_iou_loss` is the same for many boxes at once, and can be differentiated. The factor
# $\alpha$ is taken for a constant when it is: it says how much the shape should count, and is not itself
# to be learnt away.

# %%
generator = torch.Generator().manual_seed(workspace.profile.seed)
corners = torch.rand(2, 200, 2, 2, generator=generator) * 60
b, g = torch.cat([corners.amin(2), corners.amax(2) + 1], dim=-1)
at_once = losses.complete_iou_loss(b, g).numpy()
one_by_one = [ciou_loss(*pair) for pair in zip(b.double().numpy(), g.double().numpy(), strict=True)]
assert np.allclose(at_once, one_by_one, atol=1e-4)

# %% [markdown]
# Slide a box of 20 × 20 pixels away from its true place, and change its sides at the right place:

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

# %%
sides = torch.linspace(4, 60, 113)
width, height = torch.meshgrid(sides, sides, indexing="xy")
centred = torch.stack([-width, -height, width, height], dim=-1) / 2
surface = losses.complete_iou_loss(centred, torch.tensor([-10.0, -10.0, 10.0, 10.0]))
best = np.unravel_index(surface.argmin(), surface.shape)
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
# :name: fig:ciou
# :alt: Three panels. Left, loss against shift: one less overlap is flat beyond 20 pixels, complete IoU goes on rising. Middle, the slopes: the first is zero beyond 20 pixels. Right, a surface over width and height with its lowest point at 20 by 20.
# Complete IoU of a box of 20 × 20 px. Left and middle: moved sideways, loss and slope. Right: at the
# right place with other sides; the cross is the true size. The figure does not depend on data or
# profile.
# ```
#
# In {numref}`fig:ciou` the overlap falls silent at 20 pixels, where the boxes part. Complete IoU still
# has a slope there, gentle but of the right sign. On the right the loss falls from all sides to the true
# size, more gently along the two lines where one side is right already.
#
# ### What one pixel costs
#
# IoU has no unit, and that cuts both ways. Move a square of side $s$ by one pixel: it keeps $s(s-1)$ of
# $s(s+1)$, and $\mathrm{IoU} = (s-1)/(s+1)$. A small lesion forgives nothing.

# %%
boxes = all_boxes[all_boxes["image_id"].isin(learnt["image_id"])]
films = images.set_index("image_id").loc[boxes["image_id"]]
gain = np.minimum(H / films["height"], W / films["width"]).to_numpy()  # of the letterbox
area = (boxes["xmax"] - boxes["xmin"]) * (boxes["ymax"] - boxes["ymin"])
side_px = np.sqrt(area) * gain  # of a square of the same area, in the network's pixels
per_type = side_px.groupby(boxes["lesion_type"]).median().reindex(LESION_TYPES)
s = side_px.median()
one_px = (s - 1) / (s + 1)
square = torch.tensor([0.0, 0.0, 8.0, 8.0])
assert np.isclose(iou((square + torch.tensor([1.0, 0, 1, 0])).numpy(), square.numpy()), 7 / 9)
per_type.round(1)

# %% tags=["remove-cell"]
glue_values("c09", {
    "side": f"{s:.1f}",
    "one-px": f"{one_px:.2f}",
    "boxes": f"{len(boxes):,}",
})

# %% [markdown]
# At {glue:text}`c09-px` px the median of this run's {glue:text}`c09-boxes` training boxes has the area
# of a square of side {glue:text}`c09-side` px, and one pixel beside it leaves an IoU of
# {glue:text}`c09-one-px`. Half is needed to count as found. That is why the resolution of the input
# matters more to this detector than most of its other numbers.

# %% [markdown]
# ## Many places, few lesions
#
# Each anchor also says how probable each of the seven types is. Nearly always the answer is "none". With
# binary cross-entropy, $-\log p_t$, where $p_t$ is the probability that was given to what is true,
# thousands of small losses add up and may drown the few large ones. The *focal loss* {cite}`lin2017`,
# the paper's Eq. 6, turns them down:
#
# $$
# \mathcal{L}_{Focal} = -\alpha_t (1 - p_t)^\gamma \log p_t .
# $$ (eq:focal)
#
# What is already right with $p_t = 0.9$ counts a hundredth of what it did, at the paper's
# $\gamma = 2$; what is wrong keeps nearly all of its weight. $\alpha_t$ is 0.25 for a lesion and 0.75 for
# none: the exponent has turned "none" down so far that lesions would now be too loud.

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
# Learning follows the gradient rather than the loss. With respect to the logit $z$ of a lesion
# ($p_t = p = \sigma(z)$) it is, by the product rule and $p' = p(1 - p)$,
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
left.set(xlabel="probability of the truth", ylabel="loss", ylim=(0, 4))
right.set(xlabel="probability of the truth", ylabel="size of the gradient", ylim=(0, 1.5))
left.legend(fontsize=8)
show_figure("c09-fig-focal", fig)

# %% [markdown]
# ```{glue:figure} c09-fig-focal
# :name: fig:focal
# :alt: Two panels against the probability of the truth. Left, four losses that fall to zero, the larger gamma the sooner. Right, the size of their gradients, likewise.
# Focal loss and the size of its gradient with respect to the logit, without $\alpha_t$, for four
# exponents; $\gamma = 0$ is cross-entropy, the paper has 2. The figure does not depend on data or
# profile.
# ```
#
# A second difficulty is of YOLO11's making. Its targets are not 0 and 1 but *soft*: an anchor that is
# assigned to a lesion shall say how well its present box fits, 0.3 or 0.8. {eq}`eq:focal` does not tell
# what $p_t$ is then. With a target $t$ we take $|t - p|$ for $1 - p_t$, cross-entropy with $t$ for
# $-\log p_t$, and the mean over both answers for $\alpha_t$. For $t$ of 0 and 1 this is the equation, and
# for any other the least loss is nothing, at $p = t$. Without $\alpha_t$ it is the *quality focal loss* of
# the authors who proposed the third term {cite}`li2020`. Another way to generalise, to take the mean
# over both answers for $p_t$ too, has its least loss elsewhere:

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
glue_values("c09", {
    "soft": f"{float(at_least_by_mean):.2f}",
})

# %% [markdown]
# For a target of 0.3 that one would teach the network to say {glue:text}`c09-soft`.

# %% [markdown]
# ### Counted on films
#
# How many places, how few lesions? We show the untrained network {glue:text}`c09-films` training films
# as the last epoch does, without mosaic, and ask the assigner which anchors shall answer.

# %%
network = yolo.build_detector(LESION_TYPES, recipe.seed).train()
folder = workspace.cache / "yolo-losses"
shown = learnt.head(films_at_once)
views = list(detection_images.augmented_images(shown, all_boxes, recipe, recipe.epochs + 1, folder))
truth = pd.concat([found.assign(film=row) for row, (_, found) in enumerate(views)])
corners = torch.tensor(truth[list(CORNERS)].to_numpy(np.float32)) / torch.tensor([W, H] * 2)
batch = {
    "img": torch.stack([torch.tensor(grey) for grey, _ in views])[:, None].repeat(1, 3, 1, 1) / 255,
    "batch_idx": torch.tensor(truth["film"].to_numpy(np.float32)),
    "cls": torch.tensor([[float(LESION_TYPES.index(name))] for name in truth["lesion_type"]]),
    "bboxes": box_convert(corners, "xyxy", "cxcywh"),
}

# %%
with torch.no_grad():
    given = network.assigned(batch)
anchors, taken = len(given.lesion), int(given.lesion.sum())
assert anchors == len(views) * sum((H // stride) * (W // stride) for stride in (8, 16, 32))
assert (given.class_target[~given.lesion] == 0).all() and taken >= 1
kinds = truth["lesion_type"].value_counts().reindex(LESION_TYPES, fill_value=0)
places = given.box_target[given.lesion]
assert (places[:, 2:] > places[:, :2]).all()
pd.Series({"anchors": anchors, "with a lesion": taken, "boxes": len(truth), **kinds})

# %% tags=["remove-cell"]
glue_values("c09", {
    "anchors": f"{anchors:,}",
    "taken": f"{taken:,}",
    "odds": f"{(anchors - taken) / taken:.0f}",
    "batch-boxes": len(truth),
})

# %% [markdown]
# Of {glue:text}`c09-anchors` anchors {glue:text}`c09-taken` have one of {glue:text}`c09-batch-boxes` boxes
# to answer for, one to {glue:text}`c09-odds` others. This is the imbalance that the focal loss is made
# for. The paper's 46.9 : 1 is another one, between the commonest lesion type and the rarest; each type is
# a yes or no of its own, and a rare type's few anchors are hardly helped when all of the "none" is
# turned down alike.
#
# The targets are soft, and that has a consequence at the start. As ultralytics begins, a network is
# undecided about each edge: its distribution over 16 distances, the last section's matter, is flat, with
# a mean of 7.5 strides. Boxes 15 strides wide hardly fit any lesion, so hardly any answer should be
# yes. Ours begins with edges about one stride away and, as the focal loss's authors advise, with
# a probability of 0.01 for each type. There is more to learn from the first step on:


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
# What pulls at the network? We add up the sizes of the gradients at the class logits, and ask how much of
# the sum comes from answers that should be "none".


# %%
def cross_entropy(logits, target):
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def share_of_none(given, loss):
    """How much of the pull at the class logits comes from answers that should be none."""
    logits = given.class_logits.detach().requires_grad_()
    (pull,) = torch.autograd.grad(loss(logits, given.class_target).sum(), logits)
    return float(pull.abs()[given.class_target == 0].sum() / pull.abs().sum())


shares = {loss.__name__: share_of_none(given, loss) for loss in (cross_entropy, losses.focal_loss)}
assert all(0 <= share <= 1 for share in shares.values())
shares

# %% [markdown]
# How it goes on is for an experiment.
#
# ### An experiment: with and without
#
# Two networks start from the same weights and look at the same {glue:text}`c09-films` films for a few
# steps, one with the focal loss, one with cross-entropy as its class term; the rest of
# {eq}`eq:total-loss` is the same. The loss is the one of this chapter, `losses.total_loss`. We follow two numbers: the
# probability that anchors with a lesion give to its type, and the share of the pull that comes from
# none. It is a look at the mechanism on films that are learnt from; it does not tell which loss finds
# more lesions on others.


# %%
def short_training(class_loss, steps=16):
    """Probability at lesions and share of none, before each step and after the last."""
    network = yolo.build_detector(LESION_TYPES, recipe.seed).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    rows = []
    for _ in range(steps + 1):
        given = network.assigned(batch)
        own = given.class_target > 0
        prob = given.class_logits.detach().sigmoid()[own].mean()
        rows.append({"prob": float(prob), "none": share_of_none(given, class_loss)})
        terms = losses.total_loss(given, class_loss=class_loss)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return pd.DataFrame(rows)


# %%
torch.manual_seed(workspace.profile.seed)
runs = {
    "focal loss": short_training(losses.focal_loss),
    "cross-entropy": short_training(cross_entropy),
}
start = [run["prob"].iloc[0] for run in runs.values()]
assert np.isclose(*start)  # they start from the same weights
assert all(run.notna().all(axis=None) for run in runs.values())

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
for (name, run), dash in zip(runs.items(), ("-", "--"), strict=True):
    left.semilogy(run["prob"], dash, label=name)
    right.plot(run["none"], dash)
left.set(xlabel="steps taken", ylabel="probability at lesions")
right.set(xlabel="steps taken", ylabel="share of the pull from none", ylim=(0, 1.02))
left.legend(fontsize=8)
show_figure("c09-fig-experiment", fig)
last = {name: run.iloc[-1] for name, run in runs.items()}
glue_values("c09", {
    "prob-focal": f"{last['focal loss']['prob']:.3f}",
    "prob-entropy": f"{last['cross-entropy']['prob']:.3f}",
    "none-focal": f"{last['focal loss']['none']:.0%}",
    "none-entropy": f"{last['cross-entropy']['none']:.0%}",
})

# %% [markdown]
# ```{glue:figure} c09-fig-experiment
# :name: fig:focal-experiment
# :alt: Two panels over steps, a line each for the focal loss and cross-entropy. Left, the probability that anchors with a lesion give to its type, on a logarithmic scale. Right, the share of the gradient that comes from answers that should be none.
# The first steps of YOLO11-L from random weights, with the focal loss and with cross-entropy as its class
# term. n = {glue:text}`c09-films` {glue:text}`c09-kind` of the training split, the same at each step;
# one seed; profile {glue:text}`c09-profile`.
# ```
#
# After the last step in {numref}`fig:focal-experiment` anchors with a lesion give its type
# {glue:text}`c09-prob-focal` with the focal loss and {glue:text}`c09-prob-entropy` with cross-entropy;
# {glue:text}`c09-none-focal` and {glue:text}`c09-none-entropy` of the pull come from none. A focal loss is
# also a small one: with $\alpha_t = 0.25$ and the paper's $\lambda_{cls} = 0.5$ the class term may fall far
# behind the other two. What it does to what is found after a short run from random weights was measured
# when the profile `laptop` was set: {ref}`sec:chosen`.

# %% [markdown]
# ## An edge that is not one line
#
# The third term is about the box again. Instead of one number, YOLO11 predicts for each edge a
# distribution over the distances 0, 1, …, 15, in units of the anchor's stride, and takes its mean.
# The *distribution focal loss* {cite}`li2020` wants the two whole numbers around the true
# distance $y$, in proportion:
#
# $$
# \mathcal{L}_{DFL} = -(y_{i+1} - y) \log S_i - (y - y_i) \log S_{i+1},
# \qquad y_i \le y < y_{i+1} .
# $$ (eq:dfl)
#
# $S_i$ is the probability of distance $y_i$. The paper wants it for edges that are blurred, as an
# osteophyte's are. An edge at 3.2 should get 0.8 at 3 and 0.2 at 4, whose mean is 3.2.

# %%
said = torch.full((16,), 1e-9, dtype=torch.float64)
said[3], said[4] = 0.8, 0.2
edge = torch.tensor(3.2, dtype=torch.float64)
assert torch.isclose((said * torch.arange(16)).sum(), edge, atol=1e-6)
least = losses.distribution_focal_loss(said.log(), edge)
entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))
assert np.isclose(float(least), entropy, atol=1e-6)  # between two bins it is never nothing
spread = torch.exp(-0.5 * ((torch.arange(16) - 3.2) / 1.5).double() ** 2)
assert losses.distribution_focal_loss(spread.log(), edge) > least

# %%
distance = torch.linspace(0, 12, 241, dtype=torch.float64)
wide = torch.exp(-0.5 * ((torch.arange(16) - 3.2) / 2.5).double() ** 2)
curves = {
    name: losses.distribution_focal_loss(dist.log().expand(len(distance), 16), distance)
    for name, dist in {"0.8 and 0.2": said, "spread by 1.5": spread, "spread by 2.5": wide}.items()
}
far, near = (np.abs(distance.numpy() - place).argmin() for place in (9.0, 3.2))
assert curves["0.8 and 0.2"][near] < curves["spread by 1.5"][near] < curves["spread by 2.5"][near]
assert curves["0.8 and 0.2"][far] > curves["spread by 1.5"][far] > curves["spread by 2.5"][far]

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
for number, (dist, dash) in enumerate(((said, "-"), (spread, "--"), (wide, ":"))):
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
# :name: fig:dfl
# :alt: Left, three distributions over distances around 3.2, the first on two whole numbers only. Right, their losses against the true distance: the sharper the distribution, the lower the loss at 3.2 and the steeper it rises away from it.
# Three ways to say that an edge lies 3.2 strides away, and what each costs by where it truly lies; the
# upright line is at 3.2. The figure does not depend on data or profile.
# ```
#
# To be sharp is cheapest where one is right and dearest where one is wrong ({numref}`fig:dfl`). An edge on
# which readers would disagree is better said broadly, and the width of the distribution is a
# measure of that doubt which a single number could not give.

# %% [markdown]
# ## The sum
#
# What is trained must be {eq}`eq:total-loss`. On the batch above, from the same assignments, our three
# terms against the trainer's, both with the exponent and the class weight of this run
# ({glue:text}`c09-gamma` and {glue:text}`c09-alpha`). The paper's focal loss in the middle term, and
# cross-entropy, stand beside.

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
terms.round(3)

# %% tags=["remove-cell"]
parts = terms["with the paper's focal loss"] / terms["with the paper's focal loss"].sum()
glue_values("c09", {
    "gamma": f"{recipe.gamma:g}",
    "alpha": f"{recipe.alpha:g}",
    "box-share": f"{parts['box']:.0%}",
    "class-share": f"{parts['cls']:.0%}",
})

# %% [markdown]
# With the paper's focal loss, {glue:text}`c09-box-share` of this untrained network's sum is about the
# place of boxes and {glue:text}`c09-class-share` about what they hold.

# %% [markdown]
# ## Paper beside ours
#
# Numbers of the losses. Neither column is a result.

# %% tags=["hide-input"]
pd.DataFrame(
    {
        "paper": ["7.5, 0.5, 1.5", "2.0", "0.25 (companion code)", "focal loss"],
        "this edition": [
            "7.5, 0.5, 1.5",
            f"{recipe.gamma}",
            f"{recipe.alpha}",
            "focal loss" if recipe.gamma else "cross-entropy, weighed by class",
        ],
    },
    index=["weights of box, class, DFL", "focusing exponent", "class weight", "class term"],
)

# %% [markdown]
# ## Exercises
#
# Change the chapter first: set `films_at_once = 2` in the parameters and run all. Which of the counts
# change, and which shares hardly?
#
# ```{exercise}
# :label: ex:losses-touch
#
# By hand: two squares of side 1 touch along an edge. What is their complete IoU loss, and what does it
# become when one is moved away to infinity?
# ```

# %% [markdown]
# ````{solution-start} ex:losses-touch
# :class: dropdown
# ````
# They share nothing, their centres are 1 apart, and the box round both has the squared diagonal
# $1 + 4$: $1 + 1/5$. Far away centres and corners are the same distance apart, and the loss nears 2.

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
# In code: all anchors without a lesion say $p = 0.01$, all with one say $0.3$, and there are 200 times
# as many of the first. From which $\gamma$ on do lesions pull harder than none, without $\alpha_t$?
# ```

# %% [markdown]
# ````{solution-start} ex:losses-even
# :class: dropdown
# ````
# The pull of one answer with probability $p_t$ of the truth is $(1 - p_t)^\gamma (1 - p_t - \gamma p_t \log
# p_t)$, by {eq}`eq:focal-gradient`.


# %%
def pull(p_t, gamma):
    return (1 - p_t) ** gamma * (1 - p_t - gamma * p_t * np.log(p_t))


gammas = np.arange(0, 3, 0.01)
from_gamma = gammas[np.argmax(pull(0.3, gammas) > 200 * pull(0.99, gammas))]
assert pull(0.3, 0) < 200 * pull(0.99, 0) and 0 < from_gamma < 1
print(f"from gamma = {from_gamma:.2f}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:losses-precision
#
# A question to the paper: it sets the weights "to prioritize geometric precision". Do they, measured by
# what each term contributes to the sum? Use the table above, with cross-entropy and with the focal loss.
# ```

# %% [markdown]
# ````{solution-start} ex:losses-precision
# :class: dropdown
# ````
# A weight alone says nothing: terms have sizes of their own. What counts is weight times term, and it
# changes as training goes on. The columns' shares for an untrained network:

# %%
shares_of_sum = terms / terms.sum()
assert np.allclose(shares_of_sum.sum(), 1)
shares_of_sum.round(2)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - Overlap says nothing about boxes that do not meet; the distance of the centres does.
# - At {glue:text}`c09-px` px one pixel decides much of the overlap of a small lesion.
# - The focal loss turns down what is easy: here {glue:text}`c09-anchors` anchors for
#   {glue:text}`c09-batch-boxes` boxes. It does not balance rare against common types.
# - An edge may be a distribution; where it is sharp it must be right.
# - The sum of the three, weighted, is what is trained, and a cell of this page checks it.

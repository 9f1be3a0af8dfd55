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
# (chap:yolo11)=
# # 08 · YOLO11-L
#
# :::{admonition} In this chapter
# **You will be able to** follow a film through YOLO11-L from pixels to boxes, rebuild its stages and its
# attention from their parts, say how much of a film an answer can see and how much it does see, and judge
# from that whether small lesions are within reach.
#
# **You need** {ref}`chap:data` for boxes and lesion types, and {ref}`chap:densenet121` for convolutions,
# batch normalisation and the reach of a network.
#
# **It takes** half an hour of reading; the code runs in about a minute on two cores. Nothing is trained.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop or paper; empty: DERNET_PROFILE, else laptop
films_at_once = 4  # films for batch normalisation and for the fields
field_px = 320  # side of the square in which the effective field is measured

# %% tags=["hide-input"]
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from myst_nb import glue
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_convert

from dernet_utils.book.figures import show_boxes, show_figure, show_radiograph
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.dataset.prepared import load_cached, read_boxes, read_images
from dernet_utils.detection import images as detection_images
from dernet_utils.detection import yolo
from dernet_utils.imaging import boxes as imaging_boxes
from dernet_utils.metrics.matching import SMALL_SHARE, size_stratum
from dernet_utils.triage import networks

# %%
workspace = open_chapter(profile)
images, all_boxes = read_images(workspace), read_boxes(workspace)
learnt = images[(images["split"] == "train") & images["abnormal"]]
recipe = detection_images.DetectorRecipe.of(workspace.profile)
H, W = recipe.input_size
paper_view = get_profile("paper").detect_size

# %% [markdown]
# {ref}`chap:yolo11-training` trains the paper's detector, YOLO11-L {cite}`jocher2024`. Before that we
# take it apart, with one question in mind: how does it turn one film into boxes, and can it see small
# lesions? The paper says {cite}`dernet` that it has a cross-stage partial Darknet backbone, blocks of partial
# self-attention and a path aggregation network, and is made for lesions that cover less than a hundredth of the
# field of view. What the library builds under that name is here.
#
# ## A network drawn from its code
#
# The weights on this page are {glue:text}`c08-weights`. What is seen below is how the network is made, not what
# it knows. It receives a film fitted into a rectangle of $H \times W$ px, in this run {glue:text}`c08-px`, in the
# paper {glue:text}`c08-paper-px`; what the film leaves free is grey. Through random weights signals fade or swell
# on the way down; so at each size at which the network is used here, a few films pass first for batch
# normalisation to take their means and variances. No weight changes.


# %%
def as_input(films, view):
    """Films (B, 3, H, W) in [0, 1], each in a grey rectangle, as the detector receives them."""
    filled = [imaging_boxes.letterbox(load_cached(path), view)[0] for path in films["cached_path"]]
    return torch.from_numpy(np.stack(filled))[:, None].expand(-1, 3, -1, -1).float() / 255


def settle(layers, films):
    """Let batch normalisation take the films' means and variances."""
    for norm in (one for one in layers.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all that pass
    layers.train()(films)
    layers.eval()


# %%
start = networks.starting_weights("yolo11l")
network = yolo.build_detector(LESION_TYPES, recipe.seed, start).requires_grad_(False)
before = [weight.clone() for weight in network.parameters()]
some = learnt.head(films_at_once)
settle(network, as_input(some, (H, W)))
assert all(map(torch.equal, before, network.parameters()))

# %% [markdown]
# The network is a list of layers. Each knows in `f` whose output it takes: −1 is the layer before, a
# list of two is a meeting of two ways. That is enough to walk a film through it.


# %%
def walk(network, x):
    """The output of each layer but the last, which holds the heads."""
    outputs = []
    for layer in network.model[:-1]:
        whose = layer.f if isinstance(layer.f, list) else [layer.f]
        given = [outputs[i] if outputs else x for i in whose]
        outputs.append(layer(given if len(given) > 1 else given[0]))
    return outputs


# %%
film = some.iloc[0]
x = as_input(some.head(1), (H, W))
maps, (answers, raw) = walk(network, x), network(x)
heads = network.model[-1]
for ours, theirs, stride in zip((maps[i] for i in heads.f), raw["feats"], (8, 16, 32), strict=True):
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert ours.shape[-2:] == (H // stride, W // stride)

# %% tags=["hide-input"]
PARTS = {"backbone": range(11), "neck": range(11, 23), "heads": range(23, 24)}
part_of = {i: part for part, numbers in PARTS.items() for i in numbers}
names = {layer.i: type(layer).__name__ for layer in network.model}
assert names[10] == "C2PSA" and names[11] == "Upsample" and names[23] == "Detect"
layers = pd.DataFrame(
    {
        "part": part_of,
        "layer": names,
        "takes": {layer.i: str(layer.f) for layer in network.model},
        "C × H × W": {i: " × ".join(map(str, y.shape[1:])) for i, y in enumerate(maps)},
        "weights": {layer.i: sum(p.numel() for p in layer.parameters()) for layer in network.model},
    }
).fillna("below")
kind = "virtual radiographs" if workspace.profile.virtual else "radiographs"
weights = "random" if start is None else f"those of the local checkpoint {start.name}"
glue_values("c08", {
    "profile": workspace.profile.name, "kind": kind, "px": f"{H} × {W}",
    "paper-px": " × ".join(map(str, paper_view)),
    "films": films_at_once, "field-px": field_px, "weights": weights,
    "one-kind": kind.removesuffix("s"),
})  # fmt: skip
layers.style.format({"weights": "{:,}"})

# %% tags=["hide-input", "remove-output"]
# Column and height of each layer: down the backbone, up, down again, and out.
place = {i: (0, i) for i in range(11)} | {i: (1, 19 - i) for i in range(11, 17)}
place |= {i: (2, i - 12) for i in range(17, 23)}
LOOK = {"Conv": "#CFE3F2", "C3k2": "#F6DDB0", "SPPF": "#E3E3E3", "C2PSA": "#F2C6DC"}
fig, ax = plt.subplots(figsize=(6.2, 7.4))
fig.get_layout_engine().set(w_pad=0.01, h_pad=0.01)


def draw(x, y, text, colour, bold=False):
    face = {"boxstyle": "round,pad=0.28", "fc": colour, "ec": "0.25", "lw": 1.8 if bold else 0.7}
    ax.text(x, y, text, ha="center", va="center", fontsize=8.3, bbox=face, linespacing=1.15)


def connect(start, end, dash="-"):
    across = start[0] != end[0] and abs(start[1] - end[1]) < 1.5
    tail, head = (
        (28, 46 if end[0] == 3 else 41) if across else (8, 14 if start[0] == end[0] else 22)
    )
    arrow = {"arrowstyle": "-|>", "color": "0.35", "ls": dash, "shrinkA": tail, "shrinkB": head}
    ax.annotate("", end, start, arrowprops=arrow, zorder=0)


for layer in network.model[:-1]:
    for i in layer.f if isinstance(layer.f, list) else [layer.f]:
        if layer.i:
            source = place[layer.i - 1 if i == -1 else i]
            connect(source, place[layer.i], "-" if i == -1 else "--")
    text = f"{layer.i} {names[layer.i]}\n{layers['C × H × W'][layer.i]}"
    draw(*place[layer.i], text, LOOK.get(names[layer.i], "white"), layer.i in heads.f)
for number, i in enumerate(heads.f):
    rows, columns = maps[i].shape[-2:]
    at, places = (3, place[i][1]), f"{rows} × {columns}"
    connect(place[i], at)
    draw(*at, f"box {4 * heads.reg_max} × {places}\nclass {heads.nc} × {places}", "#CDE8DC")
    ax.text(3, at[1] - 0.56, f"stride {8 * 2**number}", ha="center", fontsize=8.3)
draw(0, -1, f"film\n3 × {H} × {W}", "white")
connect((0, -1), (0, 0))
for column, (title, y) in enumerate(
    (("backbone", -1.6), ("neck,\nup", 2.4), ("neck,\ndown", 4.4), ("heads", 2.05))
):
    ax.text(column, y, title, ha="center", va="bottom", fontsize=9.5, weight="bold")
ax.text(
    1,
    -1.2,
    "number, name of the layer\nchannels × height × width of its output",
    fontsize=8.3,
    va="top",
)
ax.plot([0.72, 0.95], [0.1, 0.1], "--", color="0.35", lw=1)
ax.text(1, 0.1, "a way that skips layers", fontsize=8.3, va="center")
ax.set(xlim=(-0.5, 3.5), ylim=(10.5, -2.1))
ax.set_axis_off()
show_figure("c08-fig-layers", fig)

# %% [markdown]
# ```{glue:figure} c08-fig-layers
# :name: fig:yolo11-layers
# :alt: Diagram of four columns. Eleven backbone layers lead down from the film, the map halving five times; six neck layers lead up again and meet backbone layers 6 and 4; six lead down and meet layers 13 and 10; from layers 16, 19 and 22 a box and a class head each lead out at strides 8, 16 and 32.
# YOLO11-L, drawn from its list of layers. Thick frames are the three maps that are answered from. n = 1 of the
# run's {glue:text}`c08-kind`, at {glue:text}`c08-px` px; profile {glue:text}`c08-profile`.
# ```
#
# The *backbone* ({numref}`fig:yolo11-layers`, left) halves the map five times, by convolutions of stride 2, and
# refines it after each but the first in a *cross-stage partial* stage (C3k2). It ends in a spatial pyramid
# pooling (SPPF) and the attention (C2PSA). What it knows at the bottom is rich in meaning and poor in place. The
# *neck* carries that back up to finer maps, as a feature pyramid does {cite}`lin2017a`, and down once
# more, the second way being path aggregation {cite}`liu2018`: the fine map's sense of place gets to the coarse
# ones by a short way. Where ways meet, maps are laid on top of one another. Three maps are answered from, each by two
# *heads* that share nothing: one for the box, one for the class.
#
# What does each part hold, and what does it cost? A convolution multiplies and adds each weight
# once at each place of its output; the attention multiplies matrices besides.


# %%
def multiply_adds(network, x):
    """Multiply-adds of all convolutions, by the number of the layer they belong to."""
    found, hooks = dict.fromkeys(range(len(network.model)), 0), []
    for layer in network.model:
        for conv in (one for one in layer.modules() if isinstance(one, nn.Conv2d)):

            def count(conv, _, y, i=layer.i):
                found[i] += y.numel() * conv.weight[0].numel()

            hooks.append(conv.register_forward_hook(count))
    network(x)
    [hook.remove() for hook in hooks]
    return pd.Series(found)


# %%
by_conv = multiply_adds(network, x)
psa, n = network.model[10], (H // 32) * (W // 32)
block = psa.m[0].attn
heads_of, d_k, d_v = block.num_heads, block.key_dim, block.head_dim
by_products = len(psa.m) * heads_of * n**2 * (d_k + d_v)
with FlopCounterMode(display=False) as counted:
    network(x)
assert 2 * (by_conv.sum() + by_products) == counted.get_total_flops()

# %%
by_conv[10] += by_products
costs = pd.DataFrame({"weights": layers["weights"], "multiply-adds": by_conv})
costs = costs.groupby(layers["part"]).sum().loc[list(PARTS)]
assert costs["weights"].sum() == sum(p.numel() for p in network.parameters())
(costs / 1e6).round(1).add_suffix(", millions")

# %% [markdown]
# {glue:text}`c08-parameters` million parameters: {glue:text}`c08-backbone-weights` in the backbone,
# {glue:text}`c08-neck-weights` in the neck, {glue:text}`c08-heads-weights` in the heads. A film of
# {glue:text}`c08-px` px costs {glue:text}`c08-madds` billion multiply-adds, one of the paper's
# {glue:text}`c08-paper-px` px {glue:text}`c08-madds-paper` billion.
#
# ### From three maps to boxes
#
# Each place of each map gives 64 numbers for a box, 16 for each of four edges, and one for each
# lesion type. The softmax of 16 numbers is a distribution over distances 0 to 15; its mean is how far the edge
# lies from the middle of the cell, in strides ({ref}`chap:losses` says why).

# %%
distance = raw["boxes"].view(4, 16, -1).softmax(1).mul(torch.arange(16.0)[:, None]).sum(1)
sizes = {s: (H // s, W // s) for s in (8, 16, 32)}
stride = torch.cat([torch.full((h * w,), s) for s, (h, w) in sizes.items()])
column = torch.cat([torch.arange(w).repeat(h) for h, w in sizes.values()])
row = torch.cat([torch.arange(h).repeat_interleave(w) for h, w in sizes.values()])
middle = torch.stack([column, row]) + 0.5
corners = torch.cat([middle - distance[:2], middle + distance[2:]]) * stride
assert torch.allclose(box_convert(corners.T, "xyxy", "cxcywh").T, answers[0, :4], atol=1e-2)
assert torch.allclose(raw["scores"][0].sigmoid(), answers[0, 4:])

# %% [markdown]
# That is all: a film in, and out as many boxes as {eq}`eq:anchors` counts, to be thinned by their scores. Nothing
# searches, and no place is looked at twice.
#
# Where does it begin? The last bias of each head is set by hand: where nothing has been learnt, an edge lies
# about a stride from the middle, and each type has a probability near {glue:text}`c08-prior`
# ({ref}`chap:losses`).

# %%
if start is None:
    for edges, types in zip(heads.cv2, heads.cv3, strict=True):
        begun = edges[-1].bias.view(4, 16).softmax(1) @ torch.arange(16.0)
        assert ((begun > 0.5) & (begun < 2)).all()
        assert torch.allclose(types[-1].bias.sigmoid(), torch.tensor(yolo.PRIOR))
glue_values("c08", {
    "prior": yolo.PRIOR,
})

# %% [markdown]
# ## A stage by hand
#
# More than half of the weights lie in C3k2 stages. Their idea is *cross-stage partial* {cite}`wang2020`: let only a part
# of the channels go through the expensive convolutions, and carry the rest past them. A 1 × 1 convolution
# mixes the channels and halves them; one half is kept, the other goes through blocks one after another; all
# that came up on the way is laid together and mixed again. The blocks of scale *l* are such splits
# themselves, around pairs of 3 × 3 convolutions with a residual sum.


# %%
def inner_block(x, block):
    """C3k: half through residual pairs of 3 x 3 convolutions, half past them."""
    worked = block.cv1(x)
    for pair in block.m:
        worked = worked + pair.cv2(pair.cv1(worked))
    return block.cv3(torch.cat([worked, block.cv2(x)], dim=1))


def csp_stage(x, stage):
    """C3k2: split, work on one half, lay all together, mix."""
    parts = list(stage.cv1(x).chunk(2, dim=1))
    for block in stage.m:
        parts.append(inner_block(parts[-1], block))
    return stage.cv2(torch.cat(parts, dim=1))


# %%
stage = network.model[6]
assert torch.allclose(csp_stage(maps[5], stage), maps[6], atol=1e-4)
window = stage.m[0].m[0].cv1.conv  # one of its 3 x 3 convolutions
assert 16 * window.in_channels**2 == maps[6].shape[1] ** 2
assert layers["weights"][layers["layer"] == "C3k2"].sum() > layers["weights"].sum() / 2

# %% [markdown]
# Equal to the library's. A 3 × 3 convolution inside this stage works on a quarter of its channels and has a
# sixteenth of the weights that all channels would need.
#
# *Spatial pyramid pooling* {cite}`he2015` takes, at each place, the largest value in windows of several
# sizes, so that a place knows its wider surroundings. SPPF does it three times in a row with 5 × 5: two in a row
# see 9 × 9, three 13 × 13.

# %%
pyramid = network.model[9]
once = pyramid.cv1(maps[8])
twice = pyramid.m(pyramid.m(once))
thrice = pyramid.m(twice)
windows = [F.max_pool2d(once, k, stride=1, padding=k // 2) for k in (5, 9, 13)]
for one, other in zip((pyramid.m(once), twice, thrice), windows, strict=True):
    assert torch.equal(one, other)
assert torch.allclose(pyramid.cv2(torch.cat([once, *windows], dim=1)), maps[9], atol=1e-4)

# %% [markdown]
# ## Attention
#
# A convolution mixes neighbours with weights that are learnt once and then fixed. *Attention*
# {cite}`vaswani2017` mixes all places, with weights that depend on what is there. Each of $n$ places asks with
# a query, a row of $Q$ ($n \times d_k$); each offers a key, a row of $K$, and a value, a row of $V$
# ($n \times d_v$). The paper's Eq. 3:
#
# $$
# \mathrm{Attention}(Q, K, V) = \mathrm{softmax}\Big( \frac{Q K^T}{\sqrt{d_k}} \Big) V .
# $$ (eq:attention)
#
# Row $i$ of $QK^T$ says how well the query of place $i$ fits each key. Softmax makes weights of it that sum to
# 1, and the place receives the weighted mean of all values. One place after the other:


# %%
def attention_by_loops(Q, K, V):
    """Eq. 3 for lists of rows."""
    received = []
    for q in Q:
        fits = [math.exp(sum(a * b for a, b in zip(q, k, strict=True)) / len(q) ** 0.5) for k in K]
        weight = [fit / sum(fits) for fit in fits]
        received.append(
            [sum(w * v[c] for w, v in zip(weight, V, strict=True)) for c in range(len(V[0]))]
        )
    return received


# %% [markdown]
# Two places with $d_k = 4$, so that the root is 2. The first query meets the first key with $2 \log 3$, halved
# $\log 3$, and the second with 0: the fits are 3 and 1, the weights ¾ and ¼, and values 4 and 8 mix to 5. The
# second query fits both alike: 6.

# %%
Q = [[2 * math.log(3), 0, 0, 0], [0, 0, 0, 0]]
K, V = [[1, 0, 0, 0], [0, 1, 0, 0]], [[4], [8]]
assert np.allclose(attention_by_loops(Q, K, V), [[5], [6]])


def weights_of(Q, K):
    return (Q @ K.mT / math.sqrt(Q.shape[-1])).softmax(dim=-1)


def attention(Q, K, V):
    """Eq. 3 for matrices, or stacks of them."""
    return weights_of(Q, K) @ V


# %%
generator = torch.Generator().manual_seed(workspace.profile.seed)
q, k, v = (torch.randn(5, width, generator=generator) for width in (3, 3, 2))
looped = torch.tensor(attention_by_loops(q.tolist(), k.tolist(), v.tolist()))
assert torch.allclose(attention(q, k, v), looped, atol=1e-6)
assert torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6)

# %% [markdown]
# ### Why the root
#
# The paper calls $d_k$ the scaling factor; it is the length of queries and keys, and what is divided by is its
# root. A sum of $d_k$ products of independent numbers with variance 1 has the variance $d_k$. Undivided,
# long queries would give large fits, softmax would put nearly all weight on one place, and nothing would be
# learnt from the others. Divided by $\sqrt{d_k}$, the variance is 1 at any length:

# %%
lengths = [2, 4, 8, 16, 32, 64, 128, 256]
rows = []
for length in lengths:
    q, k = torch.randn(2, 400, length, generator=generator)
    fits = q @ k.mT
    largest = [(fits / scale).softmax(-1).amax(-1).mean() for scale in (1, length**0.5)]
    rows.append([float(fits.var()), *map(float, largest)])
variance, undivided, divided = np.array(rows).T
assert np.allclose(variance / lengths, 1, atol=0.25)
assert undivided[-1] > 0.5 > 0.1 > divided[-1]

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
left.loglog(lengths, variance, "o-", base=2, label="undivided")
left.loglog(lengths, variance / lengths, "s--", base=2, label="divided by √$d_k$")
left.set(xlabel="length of a query, $d_k$", ylabel="variance of the fits")
right.semilogx(lengths, undivided, "o-", base=2)
right.semilogx(lengths, divided, "s--", base=2)
right.set(xlabel="length of a query, $d_k$", ylabel="largest weight, mean", ylim=(0, 1))
for ax in (left, right):
    ax.set_xticks(lengths, lengths)
    ax.axvline(d_k, color="0.4", lw=0.8, ls=":")
left.legend(fontsize=8)
fig.get_layout_engine().set(wspace=0.08)
show_figure("c08-fig-root", fig)
glue_values("c08", {
    "dk": d_k,
    "dv": d_v,
    "heads": heads_of,
    "fine-channels": maps[16].shape[1],
})

# %% [markdown]
# ```{glue:figure} c08-fig-root
# :name: fig:attention-root
# :alt: Left, the variance of the products grows with the length of queries, and stays at one when divided by the root. Right, the largest of 400 weights grows towards one if undivided and stays near zero if divided.
# Random queries and keys, n = 400 each, by their length; dotted is YOLO11-L's. Left: variance of the
# products. Right: the largest of a place's 400 weights. The figure does not depend on data or profile.
# ```
#
# Undivided, one of 400 places takes most of the weight ({numref}`fig:attention-root`).
#
# ### In C2PSA
#
# In the network Q, K and V are made from one map by a 1 × 1 convolution, `qkv`, and cut into
# {glue:text}`c08-heads` heads that attend on their own with $d_k$ = {glue:text}`c08-dk` and $d_v$ =
# {glue:text}`c08-dv`. {eq}`eq:attention` does not know where a place lies. So a 3 × 3 convolution on each channel
# of V is added, `pe`, and the sum is mixed by `proj`.


# %%
def queries_keys_values(x, block):
    """Q, K, V of a map: films x heads x places x length."""
    qkv = block.qkv(x).view(len(x), block.num_heads, -1, x.shape[-2] * x.shape[-1])
    return [part.mT for part in qkv.split([block.key_dim, block.key_dim, block.head_dim], dim=2)]


def attention_block(x, block, with_eq_3=True):
    """Eq. 3 in each head, what says where a place is, and a mixture of both."""
    Q, K, V = queries_keys_values(x, block)
    attended = attention(Q, K, V).mT.reshape(x.shape) if with_eq_3 else 0
    return block.proj(attended + block.pe(V.mT.reshape(x.shape)))


# %% [markdown]
# C2PSA is a cross-stage partial stage again, hence *partial*: one half of the channels attends, in two blocks,
# the other goes past. A block adds to its input what attention gives, then what two 1 × 1
# convolutions (`ffn`) make of it. All of this against the library, on the film's own map:

# %%
kept, attending = psa.cv1(maps[9]).chunk(2, dim=1)
assert torch.allclose(attention_block(attending, block), block(attending), atol=1e-4)
for one in psa.m:
    attending = attending + attention_block(attending, one.attn)
    attending = attending + one.ffn(attending)
by_hand = psa.cv2(torch.cat([kept, attending], dim=1))
assert torch.allclose(by_hand, maps[10], atol=1e-4)
assert kept.shape == attending.shape == (1, maps[9].shape[1] // 2, *maps[9].shape[2:])

# %% [markdown]
# Of all this only the weighted mean is Eq. 3. `qkv`, `pe`, `proj`, `ffn`, the two residual sums, the split and
# the mixtures at both ends are convolutions and additions like others.
#
# ## Attention on a radiograph
#
# Where does the place of a lesion look? We give the film at the paper's {glue:text}`c08-paper-px` px, where the
# map of stride 32 has {glue:text}`c08-map-paper` places (at this run's {glue:text}`c08-px` px it has
# {glue:text}`c08-map`), and take the row of the weights for the cell that holds the centre of the film's largest
# box. Weights are in units of $1/n$: 1 is what every place would get if all were alike.

# %%
own = all_boxes[all_boxes["image_id"] == film["image_id"]]
areas = (own["xmax"] - own["xmin"]) * (own["ymax"] - own["ymin"])
lesion = own.loc[[areas.idxmax()]]
filled, place_px = imaging_boxes.letterbox(load_cached(film["cached_path"]), paper_view)
at_paper_px = imaging_boxes.to_letterbox(lesion[list(CORNERS)], place_px, film["height"], film["width"])
centre_px = at_paper_px.reshape(2, 2).mean(axis=0)
cell_x, cell_y = (centre_px // 32).astype(int)

# %%
backbone, two = network.model[:11], as_input(some.head(2), paper_view)  # a plain chain
settle(backbone, two)
Q, K, _ = queries_keys_values(psa.cv1(backbone[:10](two[:1])).chunk(2, dim=1)[1], block)
rows, columns = (side // 32 for side in paper_view)
n_paper = rows * columns
weight = weights_of(Q, K)[0]
assert weight.shape == (heads_of, n_paper, n_paper)
assert torch.allclose(weight.sum(-1), torch.ones(heads_of, n_paper), atol=1e-5)
looks = n_paper * weight[:, cell_y * columns + cell_x].view(heads_of, rows, columns)
assert torch.allclose(looks.mean((1, 2)), torch.ones(heads_of), atol=1e-4)

# %%
most_at = np.array([divmod(int(one.argmax()), columns) for one in looks])
far_px = 32 * np.hypot(*(most_at - [cell_y, cell_x]).T)  # middle of a cell to that of another
for key, value in {
    "places": len(np.unique(most_at, axis=0)), "nearest": f"{far_px.min():.0f}",
    "farthest": f"{far_px.max():.0f}", "most": f"{looks.max():.1f}",
}.items():  # fmt: skip
    glue(f"c08-look-{key}", value, display=False)

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(2, 3, figsize=(7.2, 5.4))
show_radiograph(axes[0, 0], filled, lesion["lesion_type"].item())
inset = lesion.assign(**dict(zip(CORNERS, at_paper_px[0], strict=True)))
show_boxes(axes[0, 0], inset, names=False)
drawn = [*looks, looks.mean(0)]
titles = [*(f"head {number}" for number in range(1, heads_of + 1)), "mean of the heads"]
for ax, one, title in zip(axes.flat[1:], drawn, titles, strict=True):
    show_radiograph(ax, filled, f"{title}: {float(one.min()):.1f} to {float(one.max()):.1f}")
    area = (0, paper_view[1], paper_view[0], 0)
    seen = ax.imshow(one, cmap="viridis", norm=LogNorm(0.1, 10), alpha=0.6, extent=area)
for ax in axes.flat[1:]:
    ax.plot(*centre_px, "+", color="white", ms=11, mew=2.6)
    ax.plot(*centre_px, "+", color="black", ms=10, mew=1.0)
for ax in axes.flat:
    ax.title.set_fontsize(9)
bar = fig.colorbar(seen, ax=axes, shrink=0.6, location="bottom")
bar.ax.set_xticks([0.1, 0.3, 1, 3, 10], ["≤ 0.1", "0.3", "1", "3", "≥ 10"])
bar.ax.minorticks_off()
bar.set_label("weight, in units of 1/n", fontsize=9)
bar.ax.tick_params(labelsize=8)
show_figure("c08-fig-attention", fig)
glue_values("c08", {
    "places": f"{n:,}",
    "places-paper": n_paper,
    "map": f"{H // 32} × {W // 32}",
    "map-paper": f"{rows} × {columns}",
})

# %% [markdown]
# ```{glue:figure} c08-fig-attention
# :name: fig:attention-maps
# :alt: A spine radiograph with a box, and five times the same film under a coarse map of weights, one for each of four attention heads and one for their mean; a cross marks the place that looks.
# One film with its largest box, and where the cell at its centre (cross) looks in the first attention block: each head,
# and their mean. Titles have the least and the largest weight; 1 is the weight of a place if all were alike. n = 1
# {glue:text}`c08-one-kind` of the training split; weights of the network: {glue:text}`c08-weights`; profile
# {glue:text}`c08-profile`.
# ```
#
# In {numref}`fig:attention-maps` the {glue:text}`c08-heads` heads have their largest weights at
# {glue:text}`c08-look-places` places, {glue:text}`c08-look-nearest` to {glue:text}`c08-look-farthest` px from the
# cell that asks, and the largest of all is {glue:text}`c08-look-most` times an even share. A head whose weights
# are random likes what its random numbers happen to like: then this is the mechanism and not knowledge. A trained
# head may have learnt to compare a vertebra with its neighbours, as a radiologist does; that would have to be
# shown, and a map of weights alone does not show that the answer rests on it.
#
# ### What it costs
#
# Every place looks at every place, so the products grow with $n^2$. At {glue:text}`c08-paper-px` px there are
# {glue:text}`c08-map-paper` = {glue:text}`c08-places-paper` places at stride 32, at this run's
# {glue:text}`c08-px` px {glue:text}`c08-map` = {glue:text}`c08-places`. Convolutions grow with $n$, so neither
# depends on the input's shape but through its area.

# %% tags=["hide-input", "remove-output"]
by_all_conv = by_conv.sum() - by_products
px = np.array([96, 160, 320, 640, 1280, 2560])
run_side, paper_side = math.sqrt(H * W), math.sqrt(math.prod(paper_view))


def cost_of(side):
    """Multiply-adds of convolutions, and of Eq. 3, for a square input, or one of its area."""
    growth = (side / run_side) ** 2
    return by_all_conv * growth, by_products * growth**2


convolutions, products = cost_of(px)
conv_paper, products_paper = cost_of(paper_side)
at_paper = products_paper / (products_paper + conv_paper)
equal_px = run_side * math.sqrt(by_all_conv / by_products)
assert n_paper == 400 and n == maps[10].shape[-2] * maps[10].shape[-1]
assert at_paper < 0.01 and equal_px > 10 * paper_side
fig, ax = plt.subplots(figsize=(5.2, 3.2))
ax.loglog(px, convolutions / 1e9, "o-", label="convolutions, as $n$")
ax.loglog(px, products / 1e9, "s--", label="products of Eq. 3, as $n^2$")
foot = {"transform": ax.get_xaxis_transform(), "va": "top", "rotation": 90, "fontsize": 8}
for at, word in {run_side: "this run", paper_side: "paper"}.items():
    ax.axvline(at, color="0.4", lw=0.8, ls=":")
    ax.text(at * 1.03, 0.97, word, **foot)
ax.set(xlabel="side of a square input, px", ylabel="billion multiply-adds")
ax.set_xticks(px, [f"{p}" for p in px])
ax.minorticks_off()
ax.legend(fontsize=8, loc="lower right")
show_figure("c08-fig-cost", fig)
shares = costs / costs.sum()
glue_values("c08", {
    "parameters": f"{costs['weights'].sum() / 1e6:.1f}",
    "backbone-weights": f"{shares.loc['backbone', 'weights']:.0%}",
    "neck-weights": f"{shares.loc['neck', 'weights']:.0%}",
    "heads-weights": f"{shares.loc['heads', 'weights']:.0%}",
    "madds": f"{costs['multiply-adds'].sum() / 1e9:.2f}",
    "madds-paper": f"{(conv_paper + products_paper) / 1e9:.1f}",
    "products-share": f"{at_paper:.2%}",
    "equal-px": f"{equal_px:,.0f}",
})

# %% [markdown]
# ```{glue:figure} c08-fig-cost
# :name: fig:attention-cost
# :alt: Two rising lines over the side of a square input on logarithmic axes, convolutions above and the products of attention far below but twice as steep.
# Multiply-adds for one film. The architecture does not depend on data or profile; dotted are the
# sides of squares of the area of this run's input and of the paper's.
# ```
#
# At the paper's size the products are {glue:text}`c08-products-share` of all multiply-adds
# ({numref}`fig:attention-cost`) and would catch up with the convolutions at a side of {glue:text}`c08-equal-px`
# px only. That is because attention stands at the coarsest map, where places are few, and it is the price of that
# economy that a place there is 32 px wide.
#
# ## How far an answer sees
#
# An output depends on a square of the input, its *receptive field*. Its side $r$ grows with each window of side
# $k$ by $k - 1$ steps of the map it reads, a step being $j$ pixels. Layer $\ell$, of stride $s_\ell$, has from its inputs
#
# $$
# r_\ell = \max_{i \to \ell} r_i + (k_\ell - 1)\, j, \qquad j_\ell = s_\ell\, j ,
# $$ (eq:field)
#
# where up-sampling halves the step and the longest way within a stage counts. Through Eq. 3 the field is
# everything, so we leave it out and keep its convolutions.


# %%
def windows_of(layer):
    """Steps that the longest way through a layer adds: all its windows lie on it."""
    if hasattr(layer, "m") and isinstance(layer.m, nn.MaxPool2d):
        return 3 * (layer.m.kernel_size - 1)
    return sum(one.kernel_size[0] - 1 for one in layer.modules() if isinstance(one, nn.Conv2d))


# %%
r, j = [], []
for layer in network.model[:-1]:
    whose = layer.f if isinstance(layer.f, list) else [layer.f]
    widest, step = max([r[i] for i in whose if r] or [1]), j[whose[0]] if j else 1
    r.append(widest + windows_of(layer) * step)
    j.append(H // maps[layer.i].shape[-2])
assert [j[i] for i in heads.f] == [8, 16, 32]

# %% [markdown]
# What an output depends on shows in its gradient with respect to the input. Where the field is smaller than a picture,
# the recursion must agree, to the pixel. And the first place of the attention block must depend on every place
# of its input with Eq. 3, and without it only on the four that `pe` sees from a corner.


# %%
def touched(y, x):
    """Which pixels or places of the input an output depends on."""
    return torch.autograd.grad(y.sum(), x)[0].abs().sum((0, 1)) > 0


# %%
noise = torch.rand(1, 3, 128, 128, generator=generator).requires_grad_()
rows_and_columns = touched(network.model[:3](noise)[..., 16, 16], noise).nonzero()
assert (rows_and_columns.amax(0) - rows_and_columns.amin(0) + 1).tolist() == [r[2], r[2]]
asks = torch.randn(1, psa.c, 6, 6, generator=generator).requires_grad_()
assert touched(attention_block(asks, block)[..., 0, 0], asks).all()
assert touched(attention_block(asks, block, with_eq_3=False)[..., 0, 0], asks).sum() == 4
fields = pd.DataFrame({"stride": [j[i] for i in heads.f], "field, px": [r[i] for i in heads.f]})
assert (fields["field, px"] > max(paper_view)).all()
fields.set_index("stride").T

# %% [markdown]
# All three answers could see more than the paper's whole film without Eq. 3. With it they see all of it at any size: for
# whatever comes after layer 10, "receptive field" means everything.
#
# A field of {glue:text}`c08-field-fine` px for the finest map, Eq. 3 left out, says little about where an answer
# looks, since most of it is reached by few ways. The *effective* field {cite}`luo2016` asks how strongly. We take
# the gradient of a map's middle place, its channels added with random signs, and sum its size over
# {glue:text}`c08-films` films, each in a square of {glue:text}`c08-field-px` px. Eq. 3 stays left out. Beside the
# three answers we look at the maps of the same strides in the backbone.


# %%
def effective_field(outputs, films, i):
    """Size of the gradient of the middle of map i, by pixel, summed over films."""
    half = outputs[i].shape[-1] // 2
    sign = torch.randint(2, outputs[i].shape[:2], generator=generator) * 2 - 1
    aim = (outputs[i][:, :, half, half] * sign).sum()
    return torch.autograd.grad(aim, films, retain_graph=True)[0].abs().sum((0, 1))


def side_that_holds(pull, stride, share=0.9):
    """Side of the square round the middle place that holds a share of the gradient."""
    away = (torch.arange(len(pull)) + 0.5 - (len(pull) // stride // 2 + 0.5) * stride).abs()
    rings, order = torch.maximum(away[:, None], away).flatten().sort()
    held = pull.flatten()[order].cumsum(0) / pull.sum()
    return 2 * float(rings[(held < share).sum()])


# %%
films = as_input(some, (field_px, field_px))
settle(network, films)
films.requires_grad_()
for one in psa.m:
    one.attn.forward = lambda x, block=one.attn: attention_block(x, block, with_eq_3=False)
outputs = walk(network, films)
for one in psa.m:
    del one.attn.forward  # Eq. 3 is back

# %%
watched = {"backbone": (4, 6, 8), "answer": tuple(heads.f)}
pulls = {i: effective_field(outputs, films, i) for i in sum(watched.values(), ())}
held = {i: side_that_holds(pull, j[i]) for i, pull in pulls.items()}
assert all(0 < side <= min(r[i], 2 * field_px) for i, side in held.items())
assert held[watched["backbone"][0]] < held[watched["answer"][0]]

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(2, 3, figsize=(7.2, 5.3))
for ax, (i, pull) in zip(axes.flat, pulls.items(), strict=True):
    scaled = (pull / pull.max()).clamp(min=1e-4).log10()
    seen = ax.imshow(scaled, cmap="viridis", vmin=-4, vmax=0)
    middle, wide = (field_px // j[i] // 2 + 0.5) * j[i], held[i]
    corner = (middle - wide / 2, middle - wide / 2)
    ax.add_patch(plt.Rectangle(corner, wide, wide, fill=False, ec="white", lw=1.4, ls="--"))
    part = "backbone" if i in watched["backbone"] else "answer"
    ax.set_title(f"{part}, stride {j[i]}: {wide:.0f} px", fontsize=9)
    ax.set(xticks=[0, field_px], yticks=[0, field_px], xlim=(0, field_px), ylim=(field_px, 0))
    ax.grid(False)
    ax.tick_params(labelsize=8)
bar = fig.colorbar(seen, ax=axes, location="bottom", shrink=0.6, ticks=[-4, -3, -2, -1, 0])
bar.ax.set_xticklabels(["≤ 10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"], fontsize=8)
bar.set_label("size of the gradient, largest is 1; axes in px", fontsize=9)
show_figure("c08-fig-fields", fig)
for key, i in {"early": 4, "fine": 16, "middle": 19, "coarse": 22}.items():
    glue(f"c08-field-{key}", f"{r[i]:,}", display=False)
    glue(f"c08-eff-{key}", f"{held[i]:.0f}", display=False)

# %% [markdown]
# ```{glue:figure} c08-fig-fields
# :name: fig:fields
# :alt: Six square maps of gradient size. Above, three backbone maps with bright patches in the middle that grow with the stride; below, three answering maps, bright over most of the film. Dashed squares hold nine tenths.
# Effective fields of the middle place, Eq. 3 left out: maps of the backbone (above) and the three that are answered
# from (below). The dashed square holds 90 % of the gradient, its side is in the title; it may
# reach beyond the input, where there is nothing to count. Sum over n = {glue:text}`c08-films`
# {glue:text}`c08-kind` of the training split; weights of the network: {glue:text}`c08-weights`; profile {glue:text}`c08-profile`.
# ```
#
# In the backbone, at stride 8, nine tenths of the gradient lie in a square of {glue:text}`c08-eff-early` px,
# where {eq}`eq:field` allows {glue:text}`c08-field-early`. The answer of the same stride has
# {glue:text}`c08-eff-fine` px, those of strides 16 and 32 {glue:text}`c08-eff-middle` and
# {glue:text}`c08-eff-coarse`, in inputs of {glue:text}`c08-field-px` px ({numref}`fig:fields`). That is the neck
# at work: it brings to the fine map what the coarse one saw. Training changes these fields.
#
# ## Are lesions small for it?
#
# A lesion is small, says the paper, if it covers less than a hundredth of the field of view. We take a box's area
# over the stored film's. And we take the side of a square of the same area in the network's pixels, as in
# {ref}`chap:losses`: the film is scaled to fit into the input's height and width, and its boxes with it. A box of
# side $a$ covers $(a/8)^2$ cells of the finest map, which is how many places look at it from within. The table has
# medians.

# %%
boxes = all_boxes[all_boxes["image_id"].isin(learnt["image_id"])]
film_of = images.set_index("image_id").loc[boxes["image_id"]]
height, width = film_of["height"].to_numpy(), film_of["width"].to_numpy()
area = ((boxes["xmax"] - boxes["xmin"]) * (boxes["ymax"] - boxes["ymin"])).to_numpy()
lesions = pd.DataFrame({"type": boxes["lesion_type"].to_numpy()})
lesions["small"] = area / (height * width) < SMALL_SHARE
for where, view in {"this run": (H, W), "paper": paper_view}.items():
    gain = np.minimum(view[0] / height, view[1] / width)  # of the letterbox
    lesions[f"side, {where}"] = np.sqrt(area) * gain
    lesions[f"cells, {where}"] = area * gain**2 / 8**2

# %%
of_type = lesions.groupby("type")
medians = of_type[[c for c in lesions if "," in c]].median().round(1)
table = pd.concat([of_type.size().rename("n"), of_type["small"].mean(), medians], axis=1)
table = table.loc[of_type["side, this run"].median().sort_values().index]
table["small"] = table["small"].map("{:.0%}".format)
as_scored = ~size_stratum(boxes, learnt, small=True)["outside"]
assert (lesions["small"].to_numpy() == as_scored.to_numpy()).all()
assert table["n"].sum() == len(lesions) == len(boxes)
table

# %% tags=["hide-input", "remove-output"]
side_px = {where: lesions[f"side, {where}"] for where in ("this run", "paper")}
present, shown_px = table.index, {"this run": f"{H} × {W}", "paper": "{} × {}".format(*paper_view)}
fig, ax = plt.subplots(figsize=(6.0, 5.2))
flier = {"marker": ".", "ms": 3, "mec": "0.4"}
for number, name in enumerate(present):
    for shift, where, face in ((-0.17, "this run", "#56B4E9"), (0.17, "paper", "white")):
        ax.boxplot(
            side_px[where][lesions["type"] == name], orientation="horizontal", positions=[number + shift], widths=0.3, patch_artist=True,
            boxprops={"fc": face}, medianprops={"color": "black", "lw": 1.8}, flierprops=flier,
        )  # fmt: skip
ax.set_yticks(range(len(present)), [f"{t}\nn = {table['n'][t]:,}" for t in present], fontsize=8.5)
for stride, dash in ((8, "-"), (16, "--"), (32, ":")):
    ax.axvline(stride, color="#B23B00", lw=1.7, ls=dash, label=f"stride {stride}", zorder=1)
ax.bar(0, 0, fc="#56B4E9", ec="black", label=f"{shown_px['this run']} px, this run")
ax.bar(0, 0, fc="white", ec="black", label=f"{shown_px['paper']} px, paper")
low = min(6.5, side_px["this run"].min() / 1.2)  # so that all three strides are in sight
ticks = [t for t in (2, 4, 8, 16, 32, 64, 128, 256, 512) if t > low]
ax.set(xscale="log", xlabel="side of a square of the box's area, network's px")
ax.set_xlim(low, side_px["paper"].max() * 1.2)
ax.set_xticks(ticks, ticks)
ax.minorticks_off()
ax.invert_yaxis()
ax.grid(False, axis="y")
ax.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.13), frameon=False)
show_figure("c08-fig-sides", fig)
for key, value in {
    "boxes": f"{len(lesions):,}",
    "small": f"{lesions['small'].mean():.0%}",
    "smallest": present[0],
    "smallest-n": int(table["n"].iloc[0]),
    "smallest-small": table["small"].iloc[0],
    "smallest-cells": f"{table['cells, this run'].iloc[0]:.1f}",
    "smallest-cells-paper": f"{table['cells, paper'].iloc[0]:.1f}",
    "median": f"{side_px['this run'].median():.1f}",
    "median-paper": f"{side_px['paper'].median():.1f}",
    "below": f"{(side_px['this run'] < 8).mean():.0%}",
    "below-paper": f"{(side_px['paper'] < 8).mean():.0%}",
    "below-32": f"{(side_px['paper'] < 32).mean():.0%}",
    "larger": f"{r[16] / side_px['paper'].median():.0f}",
}.items():
    glue(f"c08-{key}", value, display=False)

# %% [markdown]
# ```{glue:figure} c08-fig-sides
# :name: fig:box-sides
# :alt: Box plots of lesion sides by lesion type on a logarithmic axis, filled for this run's size and hollow for the paper's, against vertical lines at 8, 16 and 32 pixels.
# Sides of training boxes by lesion type, smallest median first, in this run's network (filled) and at the paper's
# size (hollow), against the strides of the three maps. n = {glue:text}`c08-boxes` boxes on
# {glue:text}`c08-kind`; profile {glue:text}`c08-profile`.
# ```
#
# Of {glue:text}`c08-boxes` boxes {glue:text}`c08-small` are small. Smallest by its median is
# {glue:text}`c08-smallest` (n = {glue:text}`c08-smallest-n`, {glue:text}`c08-smallest-small` small), with
# {glue:text}`c08-smallest-cells` cells of the finest map at {glue:text}`c08-px` px and
# {glue:text}`c08-smallest-cells-paper` at {glue:text}`c08-paper-px` px. Less wide than one cell are
# {glue:text}`c08-below` of all boxes here and {glue:text}`c08-below-paper` at the paper's size
# ({numref}`fig:box-sides`).
#
# So the second half of the question has two answers. *Seeing enough* is no difficulty: at
# {glue:text}`c08-paper-px` px the finest answer's field is {glue:text}`c08-larger` times as wide as the median box. *Seeing
# finely enough* is decided by stride against side. A lesion within one cell is not lost, for the cell's
# {glue:text}`c08-fine-channels` channels can say what is inside; but two lesions in one cell share its answer, and after three
# convolutions of stride 2 a detail of a few pixels has become channels or is gone. What helps is more pixels per
# millimetre, and they cost by the square.

# %% [markdown]
# ## Paper beside ours
#
# What the paper says of the network, and what is counted on this page. Neither column is a result.

# %% tags=["hide-input"]
rows = {
    "backbone": ("CSP Darknet, C2PSA", "C3k2, SPPF, C2PSA"),
    "attention": ("Eq. 3", f"{len(psa.m)} blocks of {heads_of} heads"),
    "d_k": ("“scaling factor”", f"{d_k}, by its root"),
    "neck": ("“optimized” PANet", "YOLO11's own"),
    "answering maps": ("not given", "strides 8, 16, 32"),
    "small lesions": ("< 1 % of FOV", f"{lesions['small'].mean():.0%} of boxes"),
    "parameters": ("not given", f"{costs['weights'].sum() / 1e6:.1f} million"),
    f"multiply-adds, {shown_px['paper']} px": (
        "not given",
        f"{(conv_paper + products_paper) / 1e9:.1f} billion",
    ),
}
pd.DataFrame(rows, index=["paper", "this edition"]).T

# %% [markdown]
# The paper calls its network customised and its neck optimised, and does not say what was changed. We train
# the library's YOLO11-L as it is.
#
# ## Exercises
#
# Change the chapter first: set `field_px = 160` in the parameters and run all. Which of the fields
# are now cut off by the edge of the input?
#
# ```{exercise}
# :label: ex:yolo11-same-keys
#
# By hand: all places have the same key. What does each receive? And what if one key is the query times a very
# large number, and the others are zero?
# ```

# %% [markdown]
# ````{solution-start} ex:yolo11-same-keys
# :class: dropdown
# ````
# All fits of a query are equal, so all weights are $1/n$, and each place receives the mean of the values,
# whatever it asks. With one key that fits far better, softmax gives it all the weight, and the place receives
# that value alone.

# %%
q, v = torch.randn(1, 4, generator=generator), torch.randn(6, 3, generator=generator)
assert torch.allclose(attention(q, torch.ones(6, 4), v), v.mean(0), atol=1e-6)
one_key = torch.zeros(6, 4)
one_key[2] = 1e4 * q
assert torch.allclose(attention(q, one_key, v), v[2], atol=1e-6)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:yolo11-shuffled
#
# In code: shuffle the places of the map that C2PSA attends to. Show that Eq. 3 gives the same values in the
# new order, that the whole block does not, and name the part that makes the difference.
# ```

# %% [markdown]
# ````{solution-start} ex:yolo11-shuffled
# :class: dropdown
# ````
# Each place compares itself with all others, and nothing in {eq}`eq:attention` knows the order. `pe` looks at
# neighbours, and these have changed.

# %%
given = psa.cv1(maps[9]).chunk(2, dim=1)[1]
order = torch.randperm(n, generator=generator)


def shuffle(x):
    return x.flatten(2)[..., order].view_as(x)


# %%
Q, K, V = (rows[..., order, :] for rows in queries_keys_values(given, block))
in_order = attention(*queries_keys_values(given, block))
assert torch.allclose(attention(Q, K, V), in_order[..., order, :], atol=1e-4)
assert not torch.allclose(block(shuffle(given)), shuffle(block(given)), atol=1e-2)
window = block.pe.conv.weight
window *= F.pad(torch.ones(1, 1), (1, 1, 1, 1))  # its middle only: no neighbours
assert torch.allclose(block(shuffle(given)), shuffle(block(given)), atol=1e-4)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:yolo11-finer
#
# A question to the paper: if the network is made for small lesions, should it not answer from a map of
# stride 4 as well? Say what that would bring and cost in places, for this run's boxes, and what you would
# measure before you believe in it.
# ```

# %% [markdown]
# ````{solution-start} ex:yolo11-finer
# :class: dropdown
# ````
# Boxes of 4 to 8 px, as far as there are any, would cover a whole cell again, and there would be four times as
# many places as have the finest answer now. Whether more lesions are found is another matter: nearly all of the
# new places must say "none", and the map of stride 4 lies early in the network, where little is known yet. One
# would train both, on the same folds and seeds and with the same time, and compare the average precision of small
# boxes, with intervals over studies.

# %%
now, more = (sum(math.prod(paper_view) // s**2 for s in steps) for steps in ((8, 16, 32), (4,)))
assert np.isclose(more / now, 16 / (4 + 1 + 1 / 4))
gained = {where: float(((a >= 4) & (a < 8)).mean()) for where, a in side_px.items()}
print(f"{now:,} places and {more:,} new ones at {shown_px['paper']} px")
print({f"boxes from 4 to 8 px, {where}": f"{share:.1%}" for where, share in gained.items()})

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - A film goes down a backbone, up and down a neck, and out by three pairs of heads. Each place answers at
#   once; nothing is searched.
# - A cross-stage partial stage works on a part of the channels. Ours equals the library's, and so does C2PSA.
# - Eq. 3 is one line of C2PSA: a mean of values, weighted by how queries fit keys, at the coarsest map only.
# - Every answer could see the whole film. Before training, nine tenths of what moves the backbone's map of
#   stride 8 lie within {glue:text}`c08-eff-early` px; for the answer of that stride it is {glue:text}`c08-eff-fine` px.
# - {glue:text}`c08-small` of this run's boxes are small in the paper's sense, and {glue:text}`c08-below` are less wide
#   than one cell at {glue:text}`c08-px` px. No lesion is short of context; what a small one can lack is pixels.

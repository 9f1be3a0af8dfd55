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
# **You will be able to** follow a radiograph through YOLO11-L from pixels to boxes, rebuild its stages and its
# attention from their parts, state how much of an image a prediction can depend on and how much it does, and decide
# from that whether the network can detect small lesions.
#
# **You need** {ref}`chap:data` for boxes and lesion types, and {ref}`chap:densenet121` for convolutions, batch
# normalisation and receptive fields.
#
# **It takes** half an hour of reading; the code runs in about a minute on two cores. Nothing is trained.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
images_at_once = 4  # images for batch normalisation and for the effective fields
field_px = 320  # side of the square in which the effective field is measured

# %% tags=["hide-input"]
import math

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_convert

from dernet_utils.book import figures_detection as draw
from dernet_utils.book.figures import show_figure
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.core.weights import starting_weights
from dernet_utils.dataset.prepared import read_boxes, read_images
from dernet_utils.detection import yolo
from dernet_utils.detection.images import DetectorRecipe
from dernet_utils.imaging.boxes import letterbox, to_letterbox
from dernet_utils.imaging.enhance import load_cached
from dernet_utils.metrics.matching import SMALL_SHARE, size_stratum

workspace = open_chapter(profile)
images, all_boxes = read_images(workspace), read_boxes(workspace)
training = images[(images["split"] == "train") & images["abnormal"]]
recipe = DetectorRecipe.of(workspace.profile)
H, W = recipe.input_size
paper_size = get_profile("paper").detect_size

# %% [markdown]
# {ref}`chap:yolo11-training` trains the paper's detector, YOLO11-L {cite}`jocher2024`. Before that we take it apart,
# with two questions in mind: how does it turn a radiograph into boxes, and can it detect small lesions? The paper
# {cite}`dernet` states that it has a cross-stage partial Darknet backbone, blocks of partial self-attention and a
# path aggregation network, and that it is designed for lesions that cover less than one per cent of the field of
# view. Here we look at what the ultralytics library builds under the name YOLO11-L.
#
# ## A network drawn from its code
#
# The network's weights on this page are {glue:text}`c08-weights`; the chapter shows how it is built, not what it has
# learnt. Its input is a radiograph fitted into a rectangle of $H \times W$ px: {glue:text}`c08-px` in this run,
# {glue:text}`c08-paper-px` in the paper. The rest of the rectangle is grey. With random weights, signals fade or grow
# from layer to layer. So at each input size used here, we first pass a few images through the network so that batch
# normalisation can estimate its means and variances. The weights do not change.


# %%
def as_input(rows, size):
    """Images (B, 3, H, W) in [0, 1], each in a grey rectangle, as the detector receives them."""
    filled = [letterbox(load_cached(path), size)[0] for path in rows["cached_path"]]
    return torch.from_numpy(np.stack(filled))[:, None].expand(-1, 3, -1, -1).float() / 255


def settle(layers, batch):
    """Let batch normalisation take its means and variances from these images."""
    for norm in (one for one in layers.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    layers.train()(batch)
    layers.eval()


start = starting_weights("yolo11l")
network = yolo.build_detector(LESION_TYPES, recipe.seed, start).requires_grad_(False)
before = [weight.clone() for weight in network.parameters()]
some = training.head(images_at_once)
settle(network, as_input(some, (H, W)))
assert all(map(torch.equal, before, network.parameters()))

# %% [markdown]
# The network is a list of layers. Each layer records in `f` whose outputs it takes: −1 stands for the layer before
# it, and a list of two means that two paths meet. That is enough to pass an image through the network, layer by
# layer.


# %%
def walk(network, x):
    """The output of each layer but the last, which holds the heads."""
    outputs = []
    for layer in network.model[:-1]:
        whose = layer.f if isinstance(layer.f, list) else [layer.f]
        given = [outputs[i] if outputs else x for i in whose]
        outputs.append(layer(given if len(given) > 1 else given[0]))
    return outputs


radiograph = some.iloc[0]
x = as_input(some.head(1), (H, W))
maps, (decoded, raw) = walk(network, x), network(x)
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
        "input from": {layer.i: str(layer.f) for layer in network.model},
        "C × H × W": {i: " × ".join(map(str, y.shape[1:])) for i, y in enumerate(maps)},
        "weights": {layer.i: sum(p.numel() for p in layer.parameters()) for layer in network.model},
    }
).fillna("below")
kind = workspace.image_kind
weights = "random" if start is None else f"those of the local checkpoint {start.name}"
glue_values("c08", {
    "profile": workspace.profile.name, "kind": kind, "one-kind": kind.removesuffix("s"),
    "px": f"{H} × {W}", "paper-px": " × ".join(map(str, paper_size)),
    "images": images_at_once, "field-px": field_px, "weights": weights,
})  # fmt: skip
layers.style.format({"weights": "{:,}"})

# %% tags=["hide-input", "remove-output"]
show_figure("c08-fig-layers", draw.draw_layers(network, maps, (H, W)))

# %% [markdown]
# ```{glue:figure} c08-fig-layers
# ---
# name: fig:yolo11-layers
# alt: >-
#   Diagram of four columns. Eleven backbone layers lead down from the image, the map halving five times; six neck
#   layers lead up again and join backbone layers 6 and 4; six lead down and join layers 13 and 10; from layers 16,
#   19 and 22 a box and a class head each lead out at strides 8, 16 and 32.
# ---
# YOLO11-L, drawn from its list of layers. Thick frames mark the three maps from which predictions are made. n = 1 of
# the run's {glue:text}`c08-kind`, at {glue:text}`c08-px` px; profile {glue:text}`c08-profile`.
# ```
#
# The *backbone* ({numref}`fig:yolo11-layers`, left) halves the map's height and width five times, by convolutions of
# stride 2. After each but the first, a *cross-stage partial* stage (C3k2) refines the map. The backbone ends in
# spatial pyramid pooling (SPPF) and attention (C2PSA). Its last map encodes well what is present, but poorly where.
# The *neck* carries that information back up to finer maps, as a feature pyramid does {cite}`lin2017a`, and then down
# once more. The second pass is path aggregation {cite}`liu2018`: it gives the coarse maps a short path to the precise
# positions in the fine map. Where paths meet, maps are concatenated along their channels. Predictions are made from
# three feature maps. Each map has two *heads*, which share no weights: one predicts boxes, the other classes.
#
# What does each part contain, and what does it cost? A convolution uses each of its weights in one multiply-add per
# position of its output; attention adds matrix products.


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
by_conv[10] += by_products
costs = pd.DataFrame({"weights": layers["weights"], "multiply-adds": by_conv})
costs = costs.groupby(layers["part"]).sum().loc[list(PARTS)]
assert costs["weights"].sum() == sum(p.numel() for p in network.parameters())
(costs / 1e6).round(1).add_suffix(", millions")

# %% [markdown]
# The network has {glue:text}`c08-parameters` million parameters: {glue:text}`c08-backbone-weights` in the backbone,
# {glue:text}`c08-neck-weights` in the neck, {glue:text}`c08-heads-weights` in the heads. An image of
# {glue:text}`c08-px` px costs {glue:text}`c08-madds` billion multiply-adds, and one of the paper's
# {glue:text}`c08-paper-px` px {glue:text}`c08-madds-paper` billion.
#
# ### From three maps to boxes
#
# For each cell of each map, the heads give 64 numbers for a box (16 per edge) and one number per lesion type. The
# softmax of an edge's 16 numbers is a distribution over the distances 0 to 15. Its mean is the predicted distance
# from the cell's centre to that edge, in strides ({ref}`chap:losses` explains why).

# %%
distance = raw["boxes"].view(4, 16, -1).softmax(1).mul(torch.arange(16.0)[:, None]).sum(1)
sizes = {s: (H // s, W // s) for s in (8, 16, 32)}
stride = torch.cat([torch.full((h * w,), s) for s, (h, w) in sizes.items()])
column = torch.cat([torch.arange(w).repeat(h) for h, w in sizes.values()])
row = torch.cat([torch.arange(h).repeat_interleave(w) for h, w in sizes.values()])
middle = torch.stack([column, row]) + 0.5
corners = torch.cat([middle - distance[:2], middle + distance[2:]]) * stride
assert torch.allclose(box_convert(corners.T, "xyxy", "cxcywh").T, decoded[0, :4], atol=1e-2)
assert torch.allclose(raw["scores"][0].sigmoid(), decoded[0, 4:])

# %% [markdown]
# That is the whole detector: it turns an image into as many boxes as {eq}`eq:anchors` counts, from which non-maximum
# suppression then removes duplicates. There is no search, and no region is processed twice.
#
# What does the network predict before training? We set the last biases of each head by hand: from random weights, an
# edge lies about one stride from the cell's centre, and each lesion type has a probability near
# {glue:text}`c08-prior` ({ref}`chap:losses`).

# %%
if start is None:
    for edges, types in zip(heads.cv2, heads.cv3, strict=True):
        begun = edges[-1].bias.view(4, 16).softmax(1) @ torch.arange(16.0)
        assert ((begun > 0.5) & (begun < 2)).all()
        assert torch.allclose(types[-1].bias.sigmoid(), torch.tensor(yolo.PRIOR))
glue_values("c08", {"prior": yolo.PRIOR})

# %% [markdown]
# ## A stage by hand
#
# More than half of the weights are in C3k2 stages. These are *cross-stage partial* {cite}`wang2020`: only some of the
# channels go through the expensive convolutions, and the rest bypass them. A 1 × 1 convolution mixes the channels,
# and its output is split into halves. One half is kept; the other goes through a sequence of blocks. All intermediate
# results are concatenated and mixed again. At scale *l* each block is itself such a split, around pairs of 3 × 3
# convolutions with a residual sum.


# %%
def inner_block(x, block):
    """C3k: half through residual pairs of 3 x 3 convolutions, half past them."""
    worked = block.cv1(x)
    for pair in block.m:
        worked = worked + pair.cv2(pair.cv1(worked))
    return block.cv3(torch.cat([worked, block.cv2(x)], dim=1))


def csp_stage(x, stage):
    """C3k2: split, work on one half, concatenate everything, mix."""
    parts = list(stage.cv1(x).chunk(2, dim=1))
    for block in stage.m:
        parts.append(inner_block(parts[-1], block))
    return stage.cv2(torch.cat(parts, dim=1))


stage = network.model[6]
assert torch.allclose(csp_stage(maps[5], stage), maps[6], atol=1e-4)
window = stage.m[0].m[0].cv1.conv  # one of its 3 x 3 convolutions
assert 16 * window.in_channels**2 == maps[6].shape[1] ** 2
assert layers["weights"][layers["layer"] == "C3k2"].sum() > layers["weights"].sum() / 2

# %% [markdown]
# Our stage gives the library's output. A 3 × 3 convolution inside it works on a quarter of the stage's channels, so
# it has one sixteenth of the weights that a convolution on all channels would need.
#
# *Spatial pyramid pooling* {cite}`he2015` takes, at each position, the largest value in windows of several sizes, so
# that each position also represents its wider surroundings. SPPF obtains these windows from three successive 5 × 5
# poolings: two of them cover 9 × 9, three 13 × 13.

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
# A convolution mixes neighbours with weights that are fixed after training. *Attention* {cite}`vaswani2017` mixes all
# positions, with weights that depend on the input. Each of $n$ positions has a query (a row of $Q$, $n \times d_k$),
# a key (a row of $K$, $n \times d_k$) and a value (a row of $V$, $n \times d_v$). The paper's Eq. 3:
#
# $$
# \mathrm{Attention}(Q, K, V) = \mathrm{softmax}\Big( \frac{Q K^T}{\sqrt{d_k}} \Big) V .
# $$ (eq:attention)
#
# Row $i$ of $QK^T$ measures how well the query of position $i$ matches each key. Softmax turns these products into
# weights that sum to 1, and the position receives the weighted mean of all values. The loop below computes it for one
# position at a time:


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
# We check it on two positions with $d_k = 4$, so that the root is 2. The first query's product with the first key is
# $2 \log 3$, which the division makes $\log 3$; with the second key it is 0. The exponentials are 3 and 1, the
# weights ¾ and ¼, and the weighted mean of the values 4 and 8 is 5. The second query matches both keys equally and
# receives 6.

# %%
Q = [[2 * math.log(3), 0, 0, 0], [0, 0, 0, 0]]
K, V = [[1, 0, 0, 0], [0, 1, 0, 0]], [[4], [8]]
assert np.allclose(attention_by_loops(Q, K, V), [[5], [6]])


def weights_of(Q, K):
    return (Q @ K.mT / math.sqrt(Q.shape[-1])).softmax(dim=-1)


def attention(Q, K, V):
    """Eq. 3 for matrices, or stacks of them."""
    return weights_of(Q, K) @ V


generator = torch.Generator().manual_seed(workspace.profile.seed)
q, k, v = (torch.randn(5, width, generator=generator) for width in (3, 3, 2))
looped = torch.tensor(attention_by_loops(q.tolist(), k.tolist(), v.tolist()))
assert torch.allclose(attention(q, k, v), looped, atol=1e-6)
assert torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6)

# %% [markdown]
# ### Why the root
#
# The paper calls $d_k$ the scaling factor; it is the length of queries and keys, and the products are divided by its
# root. A sum of $d_k$ products of independent numbers with mean 0 and variance 1 has variance $d_k$. Without the
# division, long queries would give large products, softmax would put nearly all weight on one position, and almost no
# gradient would reach the others. After division by $\sqrt{d_k}$, the variance is 1 at any length:

# %% tags=["remove-output"]
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
largest = {"undivided": undivided, "divided": divided}
show_figure("c08-fig-root", draw.draw_scaling(lengths, variance, largest, marked=d_k))
glue_values("c08", {"dk": d_k, "dv": d_v, "heads": heads_of, "fine-channels": maps[16].shape[1]})

# %% [markdown]
# ```{glue:figure} c08-fig-root
# ---
# name: fig:attention-root
# alt: >-
#   Left, the variance of the products grows with the length of queries, and stays at one when divided by the root.
#   Right, the largest of 400 weights grows towards one if undivided and stays near zero if divided.
# ---
# Random queries and keys, n = 400 each, by their length; the dotted line marks YOLO11-L's. Left: variance of the
# products. Right: the largest of a position's 400 weights, mean over positions. The figure does not depend on data or
# profile.
# ```
#
# Without the division, one of 400 positions takes most of the weight if queries are long
# ({numref}`fig:attention-root`).
#
# ### In C2PSA
#
# In the network, Q, K and V are computed from one map by a 1 × 1 convolution, `qkv`, and split into
# {glue:text}`c08-heads` heads that attend independently, with $d_k$ = {glue:text}`c08-dk` and $d_v$ =
# {glue:text}`c08-dv`. {eq}`eq:attention` has no information about where a position lies. So the output of `pe`, a 3 ×
# 3 convolution on each channel of V, is added, and `proj` mixes the channels of the sum.


# %%
def queries_keys_values(x, block):
    """Q, K, V of a map: images x heads x positions x length."""
    qkv = block.qkv(x).view(len(x), block.num_heads, -1, x.shape[-2] * x.shape[-1])
    return [part.mT for part in qkv.split([block.key_dim, block.key_dim, block.head_dim], dim=2)]


def attention_block(x, block, with_eq_3=True):
    """Eq. 3 in each head, plus the positional convolution, mixed."""
    Q, K, V = queries_keys_values(x, block)
    attended = attention(Q, K, V).mT.reshape(x.shape) if with_eq_3 else 0
    return block.proj(attended + block.pe(V.mT.reshape(x.shape)))


# %% [markdown]
# C2PSA is a cross-stage partial stage again, hence *partial*: one half of the channels goes through two attention
# blocks, the other bypasses them. A block adds to its input the output of attention, then the output of two 1 × 1
# convolutions (`ffn`). We compare all of this with the library, on the radiograph's own map:

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
# Only the weighted mean in all this is Eq. 3. `qkv`, `pe`, `proj`, `ffn`, the two residual sums, the split and the
# mixing at both ends are ordinary convolutions and additions.
#
# ## Attention on a radiograph
#
# To which positions does the cell of a lesion give weight? We use the paper's input size of {glue:text}`c08-paper-px`
# px, where the map of stride 32 has {glue:text}`c08-map-paper` positions (at this run's {glue:text}`c08-px` px it has
# {glue:text}`c08-map`). From the weight matrix we take the row of the cell that holds the centre of the image's
# largest box. Weights are in units of $1/n$: 1 is the weight that every position would have if all were equal.

# %%
own = all_boxes[all_boxes["image_id"] == radiograph["image_id"]]
areas = (own["xmax"] - own["xmin"]) * (own["ymax"] - own["ymin"])
lesion = own.loc[[areas.idxmax()]]
filled, fitted = letterbox(load_cached(radiograph["cached_path"]), paper_size)
size_px = radiograph["height"], radiograph["width"]
at_paper_px = to_letterbox(lesion[list(CORNERS)], fitted, *size_px)
centre_px = at_paper_px.reshape(2, 2).mean(axis=0)
cell_x, cell_y = (centre_px // 32).astype(int)

backbone, two = network.model[:11], as_input(some.head(2), paper_size)  # a plain chain
settle(backbone, two)
Q, K, _ = queries_keys_values(psa.cv1(backbone[:10](two[:1])).chunk(2, dim=1)[1], block)
rows, columns = (side // 32 for side in paper_size)
n_paper = rows * columns
weight = weights_of(Q, K)[0]
assert weight.shape == (heads_of, n_paper, n_paper)
assert torch.allclose(weight.sum(-1), torch.ones(heads_of, n_paper), atol=1e-5)
of_lesion = n_paper * weight[:, cell_y * columns + cell_x].view(heads_of, rows, columns)
assert torch.allclose(of_lesion.mean((1, 2)), torch.ones(heads_of), atol=1e-4)

# %% tags=["hide-input", "remove-output"]
most_at = np.array([divmod(int(one.argmax()), columns) for one in of_lesion])
far_px = 32 * np.hypot(*(most_at - [cell_y, cell_x]).T)  # from cell centre to cell centre
inset = lesion.assign(**dict(zip(CORNERS, at_paper_px[0], strict=True)))
show_figure("c08-fig-attention", draw.draw_attention(filled, inset, centre_px, of_lesion))
glue_values("c08", {
    "look-places": len(np.unique(most_at, axis=0)), "look-nearest": f"{far_px.min():.0f}",
    "look-farthest": f"{far_px.max():.0f}", "look-most": f"{of_lesion.max():.1f}",
    "places": f"{n:,}", "places-paper": n_paper,
    "map": f"{H // 32} × {W // 32}", "map-paper": f"{rows} × {columns}",
})  # fmt: skip

# %% [markdown]
# ```{glue:figure} c08-fig-attention
# ---
# name: fig:attention-maps
# alt: >-
#   A spine radiograph with a box, and five times the same radiograph under a coarse map of weights, one for each of
#   four attention heads and one for their mean; a cross marks the querying position.
# ---
# One radiograph with its largest box, and the attention weights of the cell at its centre (cross) in the first
# attention block: each head, and their mean. Titles give the smallest and the largest weight; 1 is the weight that
# every position would have if all were equal. n = 1 {glue:text}`c08-one-kind` of the training split; weights of the
# network: {glue:text}`c08-weights`; profile {glue:text}`c08-profile`.
# ```
#
# In {numref}`fig:attention-maps` the {glue:text}`c08-heads` heads have their largest weights at
# {glue:text}`c08-look-places` positions, {glue:text}`c08-look-nearest` to {glue:text}`c08-look-farthest` px from the
# querying cell, and the largest weight of all is {glue:text}`c08-look-most` times the uniform one. If the network's
# weights are random, so is the preference of a head: the figure then shows the mechanism, not anything learnt. A
# trained head may have learnt to compare a vertebra with its neighbours, as a radiologist does. That would have to be
# shown, and a map of attention weights alone does not show that the prediction depends on them.
#
# ### What it costs
#
# Every position attends to every position, so the cost of the products grows with $n^2$. At {glue:text}`c08-paper-px`
# px there are {glue:text}`c08-map-paper` = {glue:text}`c08-places-paper` positions at stride 32; at this run's
# {glue:text}`c08-px` px there are {glue:text}`c08-map` = {glue:text}`c08-places`. The cost of convolutions grows with
# $n$. Both depend on the input's area alone, not on its shape.

# %% tags=["hide-input", "remove-output"]
by_all_conv = by_conv.sum() - by_products
px = np.array([96, 160, 320, 640, 1280, 2560])
run_side, paper_side = math.sqrt(H * W), math.sqrt(math.prod(paper_size))


def cost_of(side):
    """Multiply-adds of convolutions, and of Eq. 3, for a square input, or one of its area."""
    growth = (side / run_side) ** 2
    return by_all_conv * growth, by_products * growth**2


conv_paper, products_paper = cost_of(paper_side)
at_paper = products_paper / (products_paper + conv_paper)
equal_px = run_side * math.sqrt(by_all_conv / by_products)
assert n_paper == 400 and n == maps[10].shape[-2] * maps[10].shape[-1]
assert at_paper < 0.01 and equal_px > 10 * paper_side
marks = {"this run": run_side, "paper": paper_side}
show_figure("c08-fig-cost", draw.draw_attention_cost(px, *cost_of(px), marks))
million, billion = costs["weights"].sum() / 1e6, costs["multiply-adds"].sum() / 1e9
fractions = costs["weights"] / costs["weights"].sum()
glue_values("c08", {
    "parameters": f"{million:.1f}", "madds": f"{billion:.2f}",
    "madds-paper": f"{(conv_paper + products_paper) / 1e9:.1f}",
    "products-share": f"{at_paper:.2%}", "equal-px": f"{equal_px:,.0f}",
    **{f"{part}-weights": f"{fraction:.0%}" for part, fraction in fractions.items()},
})  # fmt: skip

# %% [markdown]
# ```{glue:figure} c08-fig-cost
# ---
# name: fig:attention-cost
# alt: >-
#   Two rising lines over the side of a square input on logarithmic axes, convolutions above and the products of
#   attention far below but twice as steep.
# ---
# Multiply-adds per image. The architecture does not depend on data or profile; dotted lines mark squares with the
# area of this run's input and of the paper's.
# ```
#
# At the paper's size the products are {glue:text}`c08-products-share` of all multiply-adds
# ({numref}`fig:attention-cost`); they would cost as much as the convolutions only at a side of
# {glue:text}`c08-equal-px` px. Attention is this cheap because it works on the coarsest map, which has few positions.
# The price is that each of these positions is 32 px wide.
#
# ## Receptive fields
#
# An output depends on a square of the input, its *receptive field*. Each window of side $k$ increases its side $r$ by
# $k - 1$ steps of the map that it reads, where a step is $j$ pixels. For layer $\ell$, of stride $s_\ell$,
#
# $$
# r_\ell = \max_{i \to \ell} r_i + (k_\ell - 1)\, j, \qquad j_\ell = s_\ell\, j ,
# $$ (eq:field)
#
# where $i$ runs over its inputs, up-sampling halves the step, and the longest path within a stage counts. Eq. 3 makes
# the field the whole image, so we leave it out and count only the convolutions around it.


# %%
def windows_of(layer):
    """Steps that the longest path through a layer adds: all its windows lie on it."""
    if hasattr(layer, "m") and isinstance(layer.m, nn.MaxPool2d):
        return 3 * (layer.m.kernel_size - 1)
    return sum(one.kernel_size[0] - 1 for one in layer.modules() if isinstance(one, nn.Conv2d))


r, j = [], []
for layer in network.model[:-1]:
    whose = layer.f if isinstance(layer.f, list) else [layer.f]
    widest, step = max([r[i] for i in whose if r] or [1]), j[whose[0]] if j else 1
    r.append(widest + windows_of(layer) * step)
    j.append(H // maps[layer.i].shape[-2])
assert [j[i] for i in heads.f] == [8, 16, 32]

# %% [markdown]
# The gradient of an output with respect to the input shows which pixels the output depends on. Where the field is
# smaller than the image, the recursion must agree with the gradient to the pixel. With Eq. 3, the first position of
# the attention block must depend on every position of its input; without it, only on the four that `pe` covers at a
# corner.


# %%
def touched(y, x):
    """Which pixels or positions of the input an output depends on."""
    return torch.autograd.grad(y.sum(), x)[0].abs().sum((0, 1)) > 0


noise = torch.rand(1, 3, 128, 128, generator=generator).requires_grad_()
rows_and_columns = touched(network.model[:3](noise)[..., 16, 16], noise).nonzero()
assert (rows_and_columns.amax(0) - rows_and_columns.amin(0) + 1).tolist() == [r[2], r[2]]
queried = torch.randn(1, psa.c, 6, 6, generator=generator).requires_grad_()
assert touched(attention_block(queried, block)[..., 0, 0], queried).all()
assert touched(attention_block(queried, block, with_eq_3=False)[..., 0, 0], queried).sum() == 4
fields = pd.DataFrame({"stride": [j[i] for i in heads.f], "field, px": [r[i] for i in heads.f]})
assert (fields["field, px"] > max(paper_size)).all()
fields.set_index("stride").T

# %% [markdown]
# Even without Eq. 3, the field of all three prediction maps is larger than the paper's whole input. With Eq. 3 it is
# the whole image at any size, for layer 10 and every layer after it.
#
# The finest map's field of {glue:text}`c08-field-fine` px, Eq. 3 left out, says little about which pixels matter,
# because few paths reach most of it. The *effective* field {cite}`luo2016` measures how strongly each pixel counts.
# We take the gradient of a map's central position, its channels added with random signs, and sum its absolute values
# over {glue:text}`c08-images` images, each in a square of {glue:text}`c08-field-px` px. Eq. 3 is still left out. For
# comparison we show the backbone maps of the same strides.


# %%
def effective_field(outputs, inputs, i):
    """Size of the gradient of the middle of map i, by pixel, summed over images."""
    half = outputs[i].shape[-1] // 2
    sign = torch.randint(2, outputs[i].shape[:2], generator=generator) * 2 - 1
    aim = (outputs[i][:, :, half, half] * sign).sum()
    return torch.autograd.grad(aim, inputs, retain_graph=True)[0].abs().sum((0, 1))


def side_that_holds(gradient, stride, fraction=0.9):
    """Side of the square round the middle position that holds a fraction of the gradient."""
    away = torch.arange(len(gradient)) + 0.5 - (len(gradient) // stride // 2 + 0.5) * stride
    rings, order = torch.maximum(away.abs()[:, None], away.abs()).flatten().sort()
    held = gradient.flatten()[order].cumsum(0) / gradient.sum()
    return 2 * float(rings[(held < fraction).sum()])


# %%
inputs = as_input(some, (field_px, field_px))
settle(network, inputs)
inputs.requires_grad_()
for one in psa.m:
    one.attn.forward = lambda x, block=one.attn: attention_block(x, block, with_eq_3=False)
outputs = walk(network, inputs)
for one in psa.m:
    del one.attn.forward  # Eq. 3 again

watched = dict.fromkeys((4, 6, 8), "backbone") | dict.fromkeys(heads.f, "prediction")
gradients = {i: effective_field(outputs, inputs, i) for i in watched}
held = {i: side_that_holds(gradient, j[i]) for i, gradient in gradients.items()}
assert all(0 < side <= min(r[i], 2 * field_px) for i, side in held.items())
assert held[4] < held[heads.f[0]]

# %% tags=["hide-input", "remove-output"]
shown = [(watched[i], j[i], gradient, held[i]) for i, gradient in gradients.items()]
show_figure("c08-fig-fields", draw.draw_fields(shown))
for key, i in {"early": 4, "fine": 16, "middle": 19, "coarse": 22}.items():
    glue_values("c08", {f"field-{key}": f"{r[i]:,}", f"eff-{key}": f"{held[i]:.0f}"})

# %% [markdown]
# ```{glue:figure} c08-fig-fields
# ---
# name: fig:fields
# alt: >-
#   Six square maps of gradient size. Above, three backbone maps with bright patches in the middle that grow with
#   the stride; below, three prediction maps, bright over most of the image. Dashed squares hold nine tenths.
# ---
# Effective fields of the central position, Eq. 3 left out: backbone maps (above) and the three prediction maps
# (below). The dashed square holds 90 % of the gradient, and the title gives its side; it may extend beyond the input,
# where there is no gradient. Sum over n = {glue:text}`c08-images` {glue:text}`c08-kind` of the training split;
# weights of the network: {glue:text}`c08-weights`; profile {glue:text}`c08-profile`.
# ```
#
# For the backbone map of stride 8, 90 % of the gradient lies in a square of {glue:text}`c08-eff-early` px, where
# {eq}`eq:field` allows {glue:text}`c08-field-early`. For the prediction map of the same stride the square measures
# {glue:text}`c08-eff-fine` px, and for those of strides 16 and 32 {glue:text}`c08-eff-middle` and
# {glue:text}`c08-eff-coarse`, in inputs of {glue:text}`c08-field-px` px ({numref}`fig:fields`). The neck has this
# effect: it brings the context of the coarse maps to the fine one. Training changes these fields.
#
# ## Are the lesions small for this network?
#
# According to the paper, a lesion is small if it covers less than one per cent of the field of view. We divide a
# box's area by the stored image's. We also compute the side of a square of the same area in the network's pixels, as
# in {ref}`chap:losses`: the image is scaled to fit into the input's height and width, and its boxes with it. A box of
# side $a$ covers $(a/8)^2$ cells of the finest map. The table gives the fraction of small boxes and the medians.

# %%
boxes = all_boxes[all_boxes["image_id"].isin(training["image_id"])]
image_of = images.set_index("image_id").loc[boxes["image_id"]]
height, width = image_of["height"].to_numpy(), image_of["width"].to_numpy()
area = ((boxes["xmax"] - boxes["xmin"]) * (boxes["ymax"] - boxes["ymin"])).to_numpy()
lesions = pd.DataFrame({"type": boxes["lesion_type"].to_numpy()})
lesions["small"] = area / (height * width) < SMALL_SHARE
for where, size in {"this run": (H, W), "paper": paper_size}.items():
    gain = np.minimum(size[0] / height, size[1] / width)  # of the letterbox
    lesions[f"side, {where}"] = np.sqrt(area) * gain
    lesions[f"cells, {where}"] = area * gain**2 / 8**2

by_type = lesions.groupby("type")
medians = by_type[[c for c in lesions if "," in c]].median().round(1)
table = pd.concat([by_type.size().rename("n"), by_type["small"].mean(), medians], axis=1)
table = table.loc[by_type["side, this run"].median().sort_values().index]
table["small"] = table["small"].map("{:.0%}".format)
as_scored = ~size_stratum(boxes, training, small=True)["outside"]
assert (lesions["small"].to_numpy() == as_scored.to_numpy()).all()
assert table["n"].sum() == len(lesions) == len(boxes)
table

# %% tags=["hide-input", "remove-output"]
run_px, paper_px = (f"{height} × {width}" for height, width in ((H, W), paper_size))
labels = {"side, this run": f"{run_px} px, this run", "side, paper": f"{paper_px} px, paper"}
show_figure("c08-fig-sides", draw.draw_box_sides(lesions, labels))
here, there, smallest = lesions["side, this run"], lesions["side, paper"], table.iloc[0]
glue_values("c08", {
    "boxes": f"{len(lesions):,}",
    "small": f"{lesions['small'].mean():.0%}",
    "smallest": smallest.name,
    "smallest-n": int(smallest["n"]),
    "smallest-small": smallest["small"],
    "smallest-cells": f"{smallest['cells, this run']:.1f}",
    "smallest-cells-paper": f"{smallest['cells, paper']:.1f}",
    "below": f"{(here < 8).mean():.0%}",
    "below-paper": f"{(there < 8).mean():.0%}",
    "larger": f"{r[16] / there.median():.0f}",
})

# %% [markdown]
# ```{glue:figure} c08-fig-sides
# ---
# name: fig:box-sides
# alt: >-
#   Box plots of lesion sides by lesion type on a logarithmic axis, filled for this run's size and hollow for the
#   paper's, against vertical lines at 8, 16 and 32 pixels.
# ---
# Sides of training boxes by lesion type, smallest median first, in this run's network (filled) and at the paper's
# size (hollow), against the strides of the three maps. n = {glue:text}`c08-boxes` boxes on {glue:text}`c08-kind`;
# profile {glue:text}`c08-profile`.
# ```
#
# Of {glue:text}`c08-boxes` boxes {glue:text}`c08-small` are small. The type with the smallest median is
# {glue:text}`c08-smallest` (n = {glue:text}`c08-smallest-n`, {glue:text}`c08-smallest-small` small): a box covers
# {glue:text}`c08-smallest-cells` cells of the finest map at {glue:text}`c08-px` px and
# {glue:text}`c08-smallest-cells-paper` at {glue:text}`c08-paper-px` px. {glue:text}`c08-below` of all boxes are
# smaller than one cell here, and {glue:text}`c08-below-paper` at the paper's size ({numref}`fig:box-sides`).
#
# So the second question has two answers. *Context* is no difficulty: at {glue:text}`c08-paper-px` px the field of the
# finest prediction map is {glue:text}`c08-larger` times as wide as the median box. *Resolution* may be one: it
# depends on the lesion's side compared with the stride. A lesion within one cell is not lost, because the cell's
# {glue:text}`c08-fine-channels` channels can encode what is inside. But two lesions in one cell compete for its one
# box, and after three convolutions of stride 2 a detail of a few pixels has either been encoded in channels or is
# gone. More pixels per millimetre can help, but the cost grows with their square.

# %% [markdown]
# ## Paper beside ours
#
# The table compares what the paper reports about the network with what is counted on this page. Neither column is a
# result.

# %% tags=["hide-input"]
rows = {
    "backbone": ("CSP Darknet, C2PSA", "C3k2, SPPF, C2PSA"),
    "attention": ("Eq. 3", f"{len(psa.m)} blocks of {heads_of} heads"),
    "d_k": ("“scaling factor”", f"{d_k}; divided by its root"),
    "neck": ("“optimized” PANet", "YOLO11's own"),
    "prediction maps": ("not given", "strides 8, 16, 32"),
    "small lesions": ("< 1 % of FOV", f"{lesions['small'].mean():.0%} of boxes"),
    "parameters": ("not given", f"{million:.1f} million"),
    f"multiply-adds, {paper_px} px": (
        "not given",
        f"{(conv_paper + products_paper) / 1e9:.1f} billion",
    ),
}
pd.DataFrame(rows, index=["paper", "this edition"]).T

# %% [markdown]
# The paper calls its network customised and its neck optimised, and does not say what was changed. We train the
# library's YOLO11-L as it is.
#
# ## Exercises
#
# Change the chapter first: set `field_px = 160` in the parameters and run all cells. Which of the dashed squares now
# extend beyond the input?
#
# ```{exercise}
# :label: ex:yolo11-same-keys
#
# By hand: all positions have the same key. What does each receive? And what if one key is the query times a very
# large number, and the others are zero?
# ```

# %% [markdown]
# ````{solution-start} ex:yolo11-same-keys
# :class: dropdown
# ````
# All products of a query are equal, so all weights are $1/n$, and each position receives the mean of the values,
# whatever its query. If one key matches far better, softmax gives it practically all the weight, and the position
# receives its value alone.

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
# In code: shuffle the positions of the map that C2PSA attends to. Show that Eq. 3 gives the same values in the new
# order, that the whole block does not, and name the part that makes the difference.
# ```

# %% [markdown]
# ````{solution-start} ex:yolo11-shuffled
# :class: dropdown
# ````
# Each position is compared with all others, and nothing in {eq}`eq:attention` depends on their order. `pe` combines
# neighbours, and these have changed.

# %%
given = psa.cv1(maps[9]).chunk(2, dim=1)[1]
order = torch.randperm(n, generator=generator)


def shuffle(x):
    return x.flatten(2)[..., order].view_as(x)


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
# A question to the paper: if the network is designed for small lesions, should it not also predict from a map of
# stride 4? State what that would bring and cost in cells, for this run's boxes, and what you would measure before
# adopting it.
# ```

# %% [markdown]
# ````{solution-start} ex:yolo11-finer
# :class: dropdown
# ````
# Boxes of 4 to 8 px, if there are any, would cover a whole cell again, and the new map would have four times as many
# cells as the finest one now. Whether more lesions are found is another matter: nearly all of the new cells must
# predict "none", and the map of stride 4 lies early in the backbone, where features are still simple. Train both, on
# the same folds and seeds and for the same time, and compare the average precision of small boxes, with intervals
# over studies.

# %%
now, more = (sum(math.prod(paper_size) // s**2 for s in steps) for steps in ((8, 16, 32), (4,)))
assert np.isclose(more / now, 16 / (4 + 1 + 1 / 4))
print(f"{now:,} cells and {more:,} new ones at {paper_px} px")
for where, a in {"this run": here, "paper": there}.items():
    print(f"boxes from 4 to 8 px, {where}: {((a >= 4) & (a < 8)).mean():.1%}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - An image goes down a backbone, up and down a neck, and out through three pairs of heads. All cells predict at
#   once; there is no search.
# - A cross-stage partial stage works on some of the channels. Our versions of the stage and of C2PSA give the
#   library's outputs.
# - Eq. 3 is one line of C2PSA: a mean of values, weighted by how well queries match keys, at the coarsest map only.
# - Every prediction can depend on the whole image. With this page's weights, and Eq. 3 left out, 90 % of the gradient
#   of the backbone's map of stride 8 lies within {glue:text}`c08-eff-early` px; for the prediction map of that stride
#   within {glue:text}`c08-eff-fine` px.
# - {glue:text}`c08-small` of this run's boxes are small in the paper's sense, and {glue:text}`c08-below` are smaller
#   than one cell at {glue:text}`c08-px` px. No lesion lacks context; a small one may lack pixels.

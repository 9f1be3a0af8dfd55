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
# (chap:explainability)=
# # 13 · Where the networks look
#
# :::{admonition} In this chapter
# **You will be able to** compute a Grad-CAM map by hand, explain a single prediction with LIME, outline a lesion
# inside a box, and evaluate the results against computed masks, maps that ignore the image, networks that have not
# learnt the task, and the same radiograph without its lesion.
#
# **You need** {ref}`chap:densenet121` for the network and {ref}`chap:statistics` for intervals.
#
# **It takes** half an hour of reading, and some minutes to run on two cores.
# :::
#
# The paper shows three kinds of pictures (its Fig. 4) and says that LIME "confirms the model's focus on meaningful
# structures", that Grad-CAM aligns "precisely to pathological lesions" and that masks show "high overlap with ground
# truth" {cite}`dernet`. A picture convinces by looking right. This chapter measures how often it *is* right. A virtual
# radiograph has what no real one has: the computed shadow of each lesion, and a *counterfactual*, the same radiograph
# without that lesion ({ref}`chap:virtual-radiographs`).

# %% tags=["parameters"]
profile = ""  # smoke, laptop or night; empty: DERNET_PROFILE, else laptop
films_judged = 48  # at most so many abnormal test images are used to evaluate the maps
lime_samples = 150  # altered images on which LIME runs the network, per explanation
lime_seeds = 4  # random seeds of LIME, compared on a quarter of the images

# %%
from dataclasses import replace

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from dernet_utils.book.figures import show_boxes, show_figure, show_radiograph
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES, NETWORK_NAMES, NETWORKS
from dernet_utils.dataset.tables import read_manifest
from dernet_utils.detection.images import detection_images
from dernet_utils.imaging.boxes import box_iou
from dernet_utils.imaging.enhance import load_cached, preprocess
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.metrics.intervals import bootstrap
from dernet_utils.triage import crossvalidation, explain, training
from dernet_utils.triage.networks import as_input, build_network, predict_probabilities
from dernet_utils.virtual.counterfactual import labelled_findings, read_counterfactuals

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
images = detection_images(workspace)
# Shadows and counterfactuals are known for virtual radiographs only, and stored in the cohort's folder `twins`.
exact = workspace.virtual and (workspace.data_root / "twins").is_dir()
found = {name: crossvalidation.cross_validate(workspace, name) for name in NETWORKS}
decision = crossvalidation.read_decision(workspace)
crossvalidation.open_test_labels(workspace)  # the decision is written: the test images may be used
truth = images.boxes[images.boxes["image_id"].isin(images.test["image_id"])]
abnormal = images.test[images.test["image_id"].isin(truth["image_id"])]
rng = np.random.default_rng(numbers.seed)
some = np.sort(rng.permutation(len(abnormal))[:films_judged])
chosen = abnormal.iloc[some].reset_index(drop=True)
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}
study, px = chosen["study_id"].to_numpy(), numbers.triage_px

# %% tags=["remove-cell"]
glue_values("c13", {
    "profile": numbers.name, "n": len(chosen), "n-studies": len(set(study)), "px": px,
    "samples": lime_samples, "seeds": lime_seeds, "segments": explain.SEGMENTS,
    "kind": workspace.image_kind,
    "masks": "the computed shadow" if exact else "the boxes",
})  # fmt: skip

# %% [markdown]
# From the test split we draw at random {glue:text}`c13-n` {glue:text}`c13-kind`, of {glue:text}`c13-n-studies`
# studies, each with at least one labelled lesion. The mask of a virtual radiograph is the union of the shadows of its
# labelled lesions. Real radiographs come with boxes only, so their mask is the union of the filled boxes.
#
# How exact is a shadow? Its edge is known only to the spacing of the rays, 0.5 mm in the plane of the spine, or one to
# two and a half pixels of a stored image. The shadow ends where a ray crosses less than 0.8 mm of
# the lesion, or less than 15 % of its thickest part; both limits are our choice. Where a lesion *moves* tissue (disc
# space narrowing, vertebral collapse, spondylolisthesis), the moved tissue casts no shadow of its own. The mask is
# then, by convention, the projection of the disc, of the vertebral body, or of the disc with the adjoining parts of
# both bodies ({ref}`chap:virtual-radiographs`).


# %%
def shrink(mask, size):
    """A mask at the size, (width, height), of the enhanced image."""
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5


def exact_masks(image, size):
    """For a virtual radiograph: type and mask of each labelled lesion."""
    counterfactuals = read_counterfactuals(workspace.data_root, image.image_id)
    own = findings[findings["image_id"] == image.image_id]
    return [(row.lesion_type, shrink(counterfactuals[row.number].mask, size)) for row in own.itertuples()]


def filled_boxes(image, size):
    """Type and filled box of each labelled lesion."""
    own = truth[truth["image_id"] == image.image_id]
    corners = own[list(CORNERS)].to_numpy() * image.scale
    filled = (explain.filled_box(box, size[::-1]) for box in corners)
    return list(zip(own["lesion_type"], filled, strict=True))


# %%
masks_of = exact_masks if exact else filled_boxes
findings = labelled_findings(read_manifest(workspace.data_root)) if exact else None
enhanced = [load_cached(path) for path in chosen["cached_path"]]
lesions = [masks_of(*pair) for pair in zip(chosen.itertuples(), (g.shape[::-1] for g in enhanced), strict=True)]
masks = [np.any([mask for _, mask in own], axis=0) for own in lesions]
fraction = np.array([mask.mean() for mask in masks])
assert all(mask.shape == grey.shape for mask, grey in zip(masks, enhanced, strict=True))
pd.Series(fraction).describe()[["min", "50%", "max"]].round(4).to_frame("fraction of the image that is lesion")

# %% [markdown]
# ## Grad-CAM, by hand
#
# The last feature maps $A_k$ of each network are a few cells wide. Each is averaged over all positions, and the logit
# is a weighted sum of these averages plus a bias. *Grad-CAM* {cite}`selvaraju2017` uses the mean gradient of the
# logit as the weight of map $k$, adds up the weighted maps and keeps the positive part:
#
# $$
# \alpha_k = \frac{1}{h w} \sum_{i, j} \frac{\partial z}{\partial A_k^{ij}}, \qquad
# L = \operatorname{ReLU}\Bigl( \sum_k \alpha_k A_k \Bigr) .
# $$ (eq:grad-cam)
#
# In our networks these maps are followed only by an average and one linear layer. The gradient in every cell is
# therefore that layer's weight over $h w$, and no differentiation is needed. We compute the maps this way for all
# three networks and compare them with captum's:

# %%
pixels = training.load_pixels(chosen["cached_path"], px)
networks = {name: [training.load_network(name, one)[0] for one in found[name].checkpoints] for name in NETWORKS}
for name, (network, *_) in networks.items():
    with torch.no_grad():
        A = network.forward_features(as_input(pixels[:2]))
        alpha = network.get_classifier().weight[0] / (A.shape[2] * A.shape[3])
        total = torch.einsum("k,nkij->nij", alpha, A)
    L = torch.nn.functional.interpolate(total.clamp(min=0)[:, None], (px, px), mode="bilinear")[:, 0]
    by_library = explain.grad_cam(name, network, pixels[:2])
    assert np.allclose(by_library, L.numpy(), atol=1e-5 * max(float(total.abs().max()), 1e-6))
glue_values("c13", {"cells": f"{A.shape[2]} × {A.shape[3]}"})

# %% [markdown]
# For an input of {glue:text}`c13-px` × {glue:text}`c13-px` pixels the maps have {glue:text}`c13-cells` cells.
# Enlarged to the size of the radiograph they look smooth, but only because they are interpolated; they cannot
# localise anything more precisely than to one cell.
#
# Each network was trained once per fold, and DERNet is a vote of the three. We scale each map to a sum of one,
# average over the folds, and add up the three networks' maps with the weights of the vote:


# %%
def scaled(heat):
    """Maps with a sum of one; a map of zeros stays zero."""
    total = heat.sum(axis=(1, 2), keepdims=True)
    return np.divide(heat, total, out=np.zeros_like(heat), where=total > 0)


def cams(inputs):
    """Grad-CAM of each network, the mean over its folds; and DERNet's."""
    own = {
        name: np.mean([scaled(explain.grad_cam(name, one, inputs)) for one in networks[name]], axis=0)
        for name in NETWORKS
    }
    return own | {"DERNet": sum(w * own[name] for w, name in zip(decision.weights, NETWORKS, strict=True))}


maps = cams(pixels)

# %% [markdown]
# ## LIME, by hand
#
# LIME {cite}`ribeiro2016` treats the network as a black box. It divides the image into patches (superpixels) and
# blurs about half of them, chosen at random. It runs inference on many such altered images and fits a linear model
# that predicts the logit from $z'$, which is 1 for each patch that was kept and 0 for each that was blurred:
#
# $$
# \hat w = \arg\min_w \sum_s \pi_s \bigl( f(x_s) - w_0 - w^\top z'_s \bigr)^2 + \lambda \lVert w \rVert^2 ,
# $$ (eq:lime)
#
# where $\pi_s$ measures how similar the altered image is to the original, and $\lambda$ penalises large weights.
# Patches with large positive weights count as evidence for *abnormal*. We explain the DenseNet121 of fold 0.

# %%
network = networks["densenet121"][0]
squares = [grey.squeeze().numpy() for grey in pixels]
patches = [explain.superpixels(square) for square in squares]
weights = [
    explain.lime(network, pixels[[row]], patches[row], lime_samples, numbers.seed)
    for row in range(len(chosen))
]
maps["LIME"] = np.stack([explain.spread_over(w, p) for w, p in zip(weights, patches, strict=True)])
assert all(len(w) == p.max() + 1 for w, p in zip(weights, patches, strict=True))

# %% [markdown]
# By hand, for the first image: choose patches at random, run inference, and solve the least-squares problem without
# similarity weights and without the penalty. The result should rank the patches much as captum does.

# %%
rng = np.random.default_rng(0)
z = rng.integers(0, 2, (400, patches[0].max() + 1))
kept = torch.from_numpy(z[:, patches[0]].astype(bool))[:, None]
altered = torch.where(kept, pixels[:1], explain.without_detail(pixels[:1]))
with torch.no_grad():
    f = torch.cat([network(as_input(part)) for part in altered.split(16)]).squeeze(1).numpy()
design = np.column_stack([np.ones(len(z)), z])
w_hat = np.linalg.lstsq(design, f, rcond=None)[0][1:]
glue_values("c13", {"lime-agreement": f"{spearmanr(w_hat, weights[0]).statistic:.2f}"})

# %% [markdown]
# The rank correlation of the two is {glue:text}`c13-lime-agreement`. It falls short of one because the two chose
# different random patches, and because only captum uses similarity weights and a penalty.
#
# ## Masks without labels
#
# The paper's Fig. 4c shows masks, but the dataset has boxes only. Our masks come from a method that was not trained
# on any mask: within a box, *GrabCut* {cite}`rother2004` separates two mixtures of grey levels. It starts from two
# assumptions: no lesion lies outside the largest ellipse in the box, and the lesion probably fills a smaller ellipse
# inside it, except for the quarter of that ellipse where the heat map is lowest (`explain.lesion_mask`).
#
# The next figure shows all three on radiographs of this run:

# %%
boxes = pd.read_parquet(workspace.tables / "yolo11l_test_boxes.parquet")
boxes = boxes[boxes["image_id"].isin(chosen["image_id"])]
busiest = np.argsort([-len(own) for own in lesions], kind="stable")[: min(3, len(chosen))]


def enlarged(row, heat):
    """A square map at the size of the enhanced image."""
    return cv2.resize(heat.astype(np.float32), enhanced[row].shape[::-1], interpolation=cv2.INTER_LINEAR)


def scaled_boxes(row, table):
    """An image's boxes at the size of the enhanced image."""
    own = table[table["image_id"] == chosen["image_id"].iloc[row]]
    return own.assign(**{c: own[c] * chosen["scale"].iloc[row] for c in CORNERS})


# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(len(busiest), 4, figsize=(8, 3.3 * len(busiest)), squeeze=False)
titles = ("true boxes", "LIME", "Grad-CAM, DERNet", "masks in true boxes")
for line, row in zip(axes, busiest, strict=True):
    for ax, title in zip(line, titles, strict=True):
        show_radiograph(ax, enhanced[row], title if row == busiest[0] else "")
    show_boxes(line[0], scaled_boxes(row, truth), names=False)
    for ax, name in ((line[1], "LIME"), (line[2], "DERNet")):
        heat = enlarged(row, maps[name][row])
        ax.imshow(heat / max(heat.max(), 1e-12), cmap="inferno", alpha=0.5, vmin=0, vmax=1)
    for box in scaled_boxes(row, truth)[list(CORNERS)].to_numpy():
        drawn = explain.lesion_mask(enhanced[row], box, enlarged(row, maps["DERNet"][row]))
        line[3].contour(drawn, levels=[0.5], colors="#E69F00", linewidths=1)
    for ax in line[1:]:
        ax.contour(masks[row], levels=[0.5], colors="#56B4E9", linewidths=0.8, linestyles="--")
show_figure("c13-fig-explained", fig)

# %% [markdown]
# ```{glue:figure} c13-fig-explained
# :name: fig:explained
# :alt: Three radiographs in rows; in columns the true boxes, a LIME map, a Grad-CAM map and drawn masks, with the
# :  outline of the lesions' shadows dashed.
# LIME (DenseNet121), Grad-CAM (DERNet) and masks, the counterpart of the paper's Fig. 4: the evaluated test images
# with the most lesions. Dashed blue: {glue:text}`c13-masks` of the lesions. Orange: masks drawn inside the true
# boxes. {glue:text}`c13-kind`, profile {glue:text}`c13-profile`.
# ```
#
# Before reading on, decide from {numref}`fig:explained` alone whether these maps are good. Then look at the numbers.
#
# ## Test 1: against the lesion
#
# We use two measures. The *pointing game* checks whether the maximum of the map lies in a lesion; *energy* is the
# fraction of the total heat inside lesions. Both are easy to misread: if one fifth of an image is lesion, a map of
# pure noise scores one fifth on average. So we compare each map with two baselines that ignore the image: a uniform
# map, and a map that is hottest at the centre.

# %%
maps["centre"] = np.repeat(explain.centred_map((px, px))[None], len(chosen), axis=0)
maps["uniform"] = np.ones((len(chosen), px, px))


def measure_all(measure):
    """A measure of every map on every image."""
    return pd.DataFrame({
        name: [measure(enlarged(row, own[row]), masks[row]) for row in range(len(chosen))]
        for name, own in maps.items()
    })  # fmt: skip


def mean_of(values, groups=study):
    """Mean over images with its interval by study."""
    values = np.asarray(values, float)
    return bootstrap(lambda w: w @ values / w.sum(axis=1), groups, **draws)


points, energies = measure_all(explain.pointing), measure_all(explain.energy)
assert np.allclose(energies["uniform"], fraction, atol=1e-6)
title = {name: NETWORK_NAMES.get(name, name) for name in maps}
levels = {title[name]: [f"{mean_of(points[name]):.2f}", f"{mean_of(energies[name]):.3f}"] for name in maps}
pd.DataFrame(levels, ["pointing", "energy"]).T

# %% [markdown]
# The mean lead of each map over the two baselines, paired by image:

# %%
names = (*NETWORKS, "DERNet", "LIME")
leads = {
    title[name]: {
        "pointing minus centre": f"{mean_of(points[name] - points['centre']):+.2f}",
        "energy minus centre": f"{mean_of(energies[name] - energies['centre']):+.3f}",
        "energy minus uniform": f"{mean_of(energies[name] - energies['uniform']):+.3f}",
    }
    for name in names
}
pd.DataFrame(leads).T


# %% tags=["remove-cell"]
def beats(measure, other):
    """Maps whose lead over another one has an interval above zero, in words."""
    won = [title[n] for n in names if mean_of(measure[n] - measure[other]).low > 0]
    return ", ".join(won) if won else "none"


glue_values("c13", {
    "points-centre": beats(points, "centre"), "energy-centre": beats(energies, "centre"),
    "points-same": beats(points, "uniform"), "energy-same": beats(energies, "uniform"),
})  # fmt: skip

# %% [markdown]
# | measure | maps clearly above uniform | maps clearly above centre |
# |---|---|---|
# | pointing | {glue:text}`c13-points-same` | {glue:text}`c13-points-centre` |
# | energy | {glue:text}`c13-energy-same` | {glue:text}`c13-energy-centre` |
#
# "Clearly above" means only that, on {glue:text}`c13-n` images, the interval of the difference lies above zero. The
# centre is a strong baseline here, as it is in a clinic, since radiographs are centred on what is to be examined.
#
# Lesion types differ in size and in how they appear. The next table gives the energy in the lesions of one type, on
# the images that contain it:

# %%
rows, ahead = [], {"DERNet": [], "LIME": []}
for name in LESION_TYPES:
    has = [row for row, own in enumerate(lesions) if any(kind == name for kind, _ in own)]
    if not has:
        continue
    own = [np.any([m for kind, m in lesions[row] if kind == name], axis=0) for row in has]
    heat = {
        key: np.array([explain.energy(enlarged(r, maps[key][r]), m) for r, m in zip(has, own, strict=True)])
        for key in ("DERNet", "LIME", "centre")
    }
    row = {"images": len(has), "studies": len(set(study[has])), "fraction of image": np.mean([m.mean() for m in own])}
    for key in ahead:
        lead = mean_of(heat[key] - heat["centre"], study[has])
        row[f"{key} minus centre"] = f"{lead:+.3f}"
        if lead.low > 0 and row["studies"] >= 5:  # with fewer studies an interval is unreliable
            ahead[key].append(name.lower())
    rows.append({"lesion type": name} | row)
glue_values("c13", {f"ahead-{key}": ", ".join(won) if won else "no type" for key, won in ahead.items()})
pd.DataFrame(rows).set_index("lesion type").round(3)

# %% [markdown]
# Among the types that occur in at least five studies, DERNet's Grad-CAM is ahead of the centre map on
# {glue:text}`c13-ahead-DERNet`, and LIME on {glue:text}`c13-ahead-LIME`. For the other types, this run does not show
# that these maps are better than a map of the centre.
#
# ## Test 2: removing the hottest regions
#
# *Deletion* blurs the hottest sixteenth of the image away, then the next, and so on. If the map describes the network
# correctly, the probability falls early. *Insertion* does the reverse: it starts from a blurred image and restores the
# hottest regions first. Neither needs a lesion mask. They test whether the map matches the network, not whether the
# network is right.

# %%
noise = np.random.default_rng(numbers.seed).random((len(chosen), 8, 8))
maps["random"] = np.stack([cv2.resize(one, (px, px), interpolation=cv2.INTER_CUBIC) for one in noise]).clip(0)
few = range(0, len(chosen), 2)
compared = ("densenet121", "LIME", "centre", "random")
curves = {
    (name, insert): np.array([
        explain.removal_curve(
            lambda altered: predict_probabilities(network, altered), pixels[[row]], maps[name][row], insert=insert
        ) for row in few
    ])
    for name in compared for insert in (False, True)
}  # fmt: skip

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for ax, insert in zip(axes, (False, True), strict=True):
    for name, dash in zip(compared, ("-", "--", "-.", ":"), strict=True):
        mean = curves[name, insert].mean(axis=0)
        label = f"{title.get(name, name)}, area {mean.mean():.2f}"
        ax.plot(np.linspace(0, 100, len(mean)), mean, dash, label=label)
    ax.set(xlabel=f"per cent of the image {'restored' if insert else 'blurred away'}, hottest first")
    ax.legend(fontsize=8)
axes[0].set(ylabel="mean probability of abnormal", ylim=(0, 1))
show_figure("c13-fig-removal", fig)

# %%
areas = {key: own.mean(axis=1) for key, own in curves.items()}
columns = {"deletion, area minus random's": False, "insertion, area minus random's": True}
removal = {
    title[name]: {
        column: f"{mean_of(areas[name, insert] - areas['random', insert], study[list(few)]):+.3f}"
        for column, insert in columns.items()
    }
    for name in compared[:-1]
}
glue_values("c13", {"few": len(few)})
pd.DataFrame(removal).T

# %% [markdown]
# ```{glue:figure} c13-fig-removal
# :name: fig:removal
# :alt: Left, mean probability while hot regions are blurred away; right, while they are restored; four curves for
# :  Grad-CAM, LIME, the centre map and a random map.
# Deletion (left; low is good) and insertion (right; high is good) for DenseNet121, means over {glue:text}`c13-few`
# {glue:text}`c13-kind` from the test split, profile {glue:text}`c13-profile`.
# ```
#
# In {numref}`fig:removal` a deletion area below that of the random map, and an insertion area above it, are evidence
# for a map. The network was not trained on partly blurred images, so the curves also show its reaction to unfamiliar
# input.
#
# ## Test 3: networks that have not learnt the task
#
# If a map looks much the same for a network that has not learnt the task, it describes the image and not the network
# {cite}`adebayo2018`. We compute the rank correlation of DenseNet121's maps with those of three other networks: the
# DenseNet121 of another fold, which should agree; one with random weights; and one trained on shuffled labels, from
# which nothing about lesions can be learnt.

# %%
table = crossvalidation.triage_images(workspace)
train = table[table["split"] == "train"]
recipe = replace(training.TriageRecipe.of(numbers), epochs=1, crop_epochs=0)
shuffled = train["label"].sample(frac=1, random_state=numbers.seed).to_numpy()
train = train.assign(label=shuffled).drop(columns="lesions")
misled = training.train_triage(
    "densenet121", training.Sample.load(train[train["fold"] == 0], recipe.train_px),
    training.Sample.load(train[train["fold"] == 1], recipe.image_px), recipe, workspace.weights / "shuffled",
).network  # fmt: skip
untrained = build_network("densenet121", seed=numbers.seed)
with torch.no_grad():
    untrained.get_classifier().weight.normal_(generator=torch.Generator().manual_seed(1))
others = {
    "that of another fold's network": networks["densenet121"][1],
    "that of random weights": untrained,
    "that of training on shuffled labels": misled,
}


# %%
def similarity(first, second):
    """Rank correlation per pair of maps, or of LIME's weights; zero where one is constant."""
    return np.array([
        spearmanr(a.ravel(), b.ravel()).statistic if np.ptp(a) and np.ptp(b) else 0.0
        for a, b in zip(first, second, strict=True)
    ])  # fmt: skip


own_maps = explain.grad_cam("densenet121", network, pixels)
alike = {name: similarity(own_maps, explain.grad_cam("densenet121", one, pixels)) for name, one in others.items()}
alike["the centre map"] = similarity(own_maps, maps["centre"])
repeated = [(row, numbers.seed + k) for row in range(0, len(chosen), 4) for k in range(1, lime_seeds)]
again = [explain.lime(network, pixels[[row]], patches[row], lime_samples, seed) for row, seed in repeated]
stable = similarity([weights[row] for row, _ in repeated], again)
sanity = {f"Grad-CAM and {name}": f"{mean_of(value):.2f}" for name, value in alike.items()}
sanity["LIME and LIME with another seed"] = f"{stable.mean():.2f}, from {stable.min():.2f} to {stable.max():.2f}"
pd.Series(sanity, name="rank correlation").to_frame()

# %% tags=["remove-cell"]
keys = ("folds-alike", "random-alike", "misled-alike")
glue_values("c13", {
    "stable": f"{stable.mean():.2f}",
    **{key: f"{mean_of(alike[name]):.2f}" for key, name in zip(keys, others, strict=True)},
})  # fmt: skip

# %% [markdown]
# The maps of two networks that were trained on the same task, with different folds held out, have a mean rank
# correlation of {glue:text}`c13-folds-alike`; with random weights it is {glue:text}`c13-random-alike`, with shuffled
# labels {glue:text}`c13-misled-alike`. The first should be clearly above the other two; otherwise the map reveals
# little of what was learnt. The control with shuffled labels is not trained as long as the network that it controls:
# one epoch, from random weights and without crops, on the images of one fold, where the network had all of the
# profile's epochs on all folds but one. Its maps may differ for that reason as well as for its labels. LIME's weights
# from two random seeds have a mean rank correlation of {glue:text}`c13-stable` ({glue:text}`c13-seeds` seeds). Anyone
# who shows a LIME picture from a single seed should say so.
#
# ## Test 4: the same radiograph without the lesion
#
# The hardest test: *does the map change at the lesion when only the lesion is removed?* For each radiograph we take
# the counterfactual without its most visible labelled lesion and enhance it in the same way. No patient has such a
# second radiograph, so on real data this test cannot be run.


# %%
def without_lesion(image):
    """The enhanced image without its most visible labelled lesion, and that lesion's mask."""
    own = findings[findings["image_id"] == image.image_id].sort_values("visibility").iloc[-1]
    counterfactual = read_counterfactuals(workspace.data_root, image.image_id)[own["number"]]
    grey = counterfactual.without(read_radiograph(image.dicom_path).pixels)
    grey = preprocess(grey, numbers.cache_px, numbers.clip_limit, numbers.tiles)
    return grey, shrink(counterfactual.mask, grey.shape[::-1])


def dernet(inputs):
    """DERNet's probability of abnormal."""
    columns = [np.mean([predict_probabilities(one, inputs) for one in networks[name]], axis=0) for name in NETWORKS]
    return decision.prob(np.column_stack(columns))


# %%
def remove_lesions():
    """Per image: fall of the probability, fraction of the map's change at the lesion, and its area."""
    removed, removed_masks = zip(*(without_lesion(image) for image in chosen.itertuples()), strict=True)
    assert all(grey.shape == own.shape for grey, own in zip(removed, enhanced, strict=True))
    small = [cv2.resize(grey, (px, px), interpolation=cv2.INTER_AREA) for grey in removed]
    inputs = torch.from_numpy(np.stack(small))[:, None]
    moved, area = [], []
    for row, (mask, after) in enumerate(zip(removed_masks, cams(inputs)["DERNet"], strict=True)):
        change = np.abs(enlarged(row, maps["DERNet"][row]) - enlarged(row, after))
        around = cv2.dilate(mask.astype(np.uint8), np.ones((15, 15))).astype(bool)
        moved.append(explain.energy(change, around))
        area.append(around.mean())
    return dernet(pixels) - dernet(inputs), np.array(moved), np.array(area)


fall, moved, area = remove_lesions() if exact else np.empty((3, 0))

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3))
left.hist(100 * fall, bins=20, color="0.6")
left.axvline(0, color="#B5442E", ls="--", label="no change")
if exact:
    left.axvline(100 * fall.mean(), color="k", label=f"mean {100 * fall.mean():+.1f}")
left.set(xlabel="fall of the probability, percentage points", ylabel="images")
left.legend(fontsize=8)
right.plot(100 * area, 100 * moved, "o", ms=4, alpha=0.7)
limit = 105 * max([*area, *moved], default=1)
right.plot([0, limit], [0, limit], "--", color="#B5442E", label="change spread evenly")
right.set(xlabel="lesion and surroundings, % of the image", ylabel="the map's change there, %")
right.legend(fontsize=8)
show_figure("c13-fig-twins", fig)

# %% tags=["remove-cell"]
by_fall = moves = moved_verdict = fall_verdict = "(no counterfactuals here)"
if exact:
    falls, lead = mean_of(100 * fall), mean_of(moved - area)
    by_fall, moves = f"{falls:+.1f}", f"{lead:+.3f}"
    moved_verdict = "On these images the map does not demonstrably change more at the lesion than elsewhere."
    if lead.low > 0:
        moved_verdict = "The map changes more at the lesion than elsewhere, though most of its change is elsewhere."
    if lead.low > 0 and moved.mean() > 0.5:
        moved_verdict = "Most of the map's change is at the lesion."
    fall_verdict = "the change cannot be distinguished from zero"
    if falls.low > 0:
        fall_verdict = "with one lesion fewer the network is more confident that the image is normal"
glue_values("c13", {
    "fall": by_fall, "moved": moves, "moved-verdict": moved_verdict, "fall-verdict": fall_verdict,
})  # fmt: skip

# %% [markdown]
# ```{glue:figure} c13-fig-twins
# :name: fig:twins-explained
# :alt: Left, a histogram of how far the probability falls when one lesion is removed. Right, the fraction of the
# :  map's change that lies at the lesion against the lesion's fraction of the image.
# What changes when only the most visible lesion is removed. Left: DERNet's probability. Right: where its map changes.
# {glue:text}`c13-n` {glue:text}`c13-kind` from the test split and their counterfactuals, profile
# {glue:text}`c13-profile`.
# ```
#
# The probability falls by {glue:text}`c13-fall` percentage points (mean, 95 % interval by study):
# {glue:text}`c13-fall-verdict`. The fraction of the map's change that lies at the lesion, with a margin of 7 pixels,
# exceeds that region's fraction of the image by {glue:text}`c13-moved`. {glue:text}`c13-moved-verdict` Points of
# {numref}`fig:twins-explained` near the dashed line are images on which the change is spread evenly: the two maps
# together do not show where the radiographs differ.
#
# ## Are the masks right?
#
# Each labelled lesion of a virtual radiograph has its mask, so the overlap can be measured. We do so for the filled
# box and for the ellipse in its centre, both of which ignore the image, for GrabCut, and for GrabCut with the heat
# map; first inside true boxes, then inside the boxes that the detector found.


# %%
def overlaps(row, box, shadow):
    """IoU and Dice of four masks in a box with a lesion's mask."""
    heat = enlarged(row, maps["DERNet"][row])
    drawn = {
        "filled box": explain.filled_box(box, shadow.shape),
        "ellipse": explain.ellipse_in(box, shadow.shape),
        "GrabCut": explain.lesion_mask(enhanced[row], box),
        "GrabCut and heat map": explain.lesion_mask(enhanced[row], box, heat),
    }
    return {name: explain.overlap(mask, shadow) for name, mask in drawn.items()}


# %%
in_true, in_found = [], []
for row, own in enumerate(lesions if exact else []):
    offered, true_boxes = scaled_boxes(row, boxes), scaled_boxes(row, truth)
    for kind, shadow in own:
        if not shadow.any():
            continue
        y, x = np.nonzero(shadow)
        tight = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], float)
        real = true_boxes.loc[true_boxes["lesion_type"] == kind, list(CORNERS)].to_numpy()
        best = real[np.argmax(box_iou(tight[None], real)[0])]
        record = {"study": study[row], "lesion_type": kind}
        in_true.append(record | overlaps(row, best, shadow))
        same = offered.loc[offered["lesion_type"] == kind, list(CORNERS)].to_numpy()
        near = box_iou(best[None], same)[0]
        if len(same) and near.max() >= 0.5:
            in_found.append(record | overlaps(row, same[np.argmax(near)], shadow))
ways = ("filled box", "ellipse", "GrabCut", "GrabCut and heat map")


# %%
def summary(records, which):
    """Mean IoU (0) or Dice (1) of each way over lesions, with intervals by study."""
    groups = np.array([own["study"] for own in records])
    return {way: f"{mean_of([own[way][which] for own in records], groups):.2f}" if records else "–" for way in ways}


columns = {
    f"{name} ({len(own)}), {measure}": summary(own, which)
    for name, own in {"true boxes": in_true, "found boxes": in_found}.items()
    for which, measure in enumerate(("IoU", "Dice"))
}
pd.DataFrame(columns)

# %% tags=["remove-cell"]
gains = {"mask": ("GrabCut", "ellipse"), "heat": ("GrabCut and heat map", "GrabCut")}
groups = np.array([record["study"] for record in in_true])
for key, (one, other) in gains.items():
    gain = [record[one][0] - record[other][0] for record in in_true]
    glue_values("c13", {f"{key}-gain": f"{mean_of(gain, groups):+.3f}" if in_true else "(no masks here)"})

# %% [markdown]
# In true boxes, the IoU of GrabCut minus that of the ellipse is {glue:text}`c13-mask-gain`; the heat map adds
# {glue:text}`c13-heat-gain`. If the first is not above zero, the outline in a figure adds nothing to the box. By
# lesion type, mean IoU in true boxes:

# %%
kinds = pd.Series([record["lesion_type"] for record in in_true], dtype=object)
per_type = pd.DataFrame({way: [record[way][0] for record in in_true] for way in ways})
per_type.groupby(kinds).mean().assign(n=kinds.value_counts()).rename_axis("lesion type").round(2)

# %% [markdown]
# For the types that move tissue, the mask is a convention, a whole anatomical region, and the overlap measures
# agreement with that convention. Those of narrowed discs and slipped vertebrae have no density of their own, so no
# contrast marks their edges. The smaller the lesion, the more its uncertain edge counts.
#
# ## Where explanations mislead
#
# - A smooth map over a radiograph looks precise. Here it has only {glue:text}`c13-cells` cells and cannot outline a
#   lesion smaller than one of them.
# - A map always has a maximum, even on a normal radiograph and when the network is wrong.
# - A map that highlights the spine does not necessarily highlight the lesion: spine radiographs are centred on the
#   spine.
# - LIME's picture depends on its seed, and on how a patch is removed (here, by blurring).
# - Test 4 is the only one in which it is known what *should* change, and it needs image pairs that do not exist for
#   patients.
#
# ## Paper beside ours
#
# | claim of the paper | here |
# |---|---|
# | LIME confirms the focus on meaningful structures | pointing and energy against centre and uniform maps, above |
# | Grad-CAM aligns precisely with lesions | the same, and the effect of removing one, {numref}`fig:twins-explained` |
# | masks show high overlap with ground truth | IoU and Dice beside a filled box's, above; the paper gives neither |
#
# ## Exercises
#
# Change the chapter first: set `lime_samples = 30`. What happens to LIME's agreement with itself?
#
# ```{exercise}
# :label: ex:explain-hand
# By hand: two maps of 2 × 2 cells, $A_1 = \begin{pmatrix} 1 & 0 \\ 0 & 0 \end{pmatrix}$,
# $A_2 = \begin{pmatrix} 0 & 2 \\ 0 & 1 \end{pmatrix}$, and a linear layer with weights 4 and −2. What is Grad-CAM?
# ```

# %% [markdown]
# ````{solution-start} ex:explain-hand
# :class: dropdown
# ````
# By {eq}`eq:grad-cam` $\alpha = (1, -1/2)$. The sum is $\begin{pmatrix} 1 & -1 \\ 0 & -1/2 \end{pmatrix}$, and after
# the ReLU only the upper left cell remains. Evidence against *abnormal* is not shown.

# %%
A_1, A_2 = np.array([[1, 0], [0, 0]]), np.array([[0, 2], [0, 1]])
assert (np.maximum(4 / 4 * A_1 - 2 / 4 * A_2, 0) == [[1, 0], [0, 0]]).all()

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:explain-energy
# In code: a lesion covers a disc of radius 0.2 (sides run from −1 to 1) about the centre of the image. What is the
# energy of the centre map, and what fraction of the image is lesion?
# ```

# %% [markdown]
# ````{solution-start} ex:explain-energy
# :class: dropdown
# ````

# %%
y, x = np.mgrid[-1:1:201j, -1:1:201j]
disc = x**2 + y**2 <= 0.2**2
got, has = explain.energy(explain.centred_map((201, 201)), disc), disc.mean()
assert got > 2 * has
print(f"energy {got:.3f}, fraction {has:.3f}")

# %% [markdown]
# A map that ignores the image scores more than twice the lesion's fraction of it, because this lesion lies at the
# centre. Any claim for a map has to start from there.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:explain-question
# Question the method: a paper prints six Grad-CAM pictures, all on lesions. What would you have to know to believe
# that the network looks at lesions?
# ```
#
# ```{solution} ex:explain-question
# :class: dropdown
# How the six were chosen, and from how many. The rate over all images of a test split, with its interval. The rate of
# a map that ignores the image and points to the centre. What the maps look like on normal images and on images that
# the network got wrong. Whether a network trained on shuffled labels gives different maps. Each of these takes one
# sentence in a methods section; six pictures show none of them.
# ```
#
# ## Takeaways
#
# - Grad-CAM is the classifier layer applied to the last maps. Count its cells before trusting its edges.
# - A fraction of heat means nothing without the lesion's fraction of the image, and without the centre as a baseline.
# - Compare with networks that have not learnt the task, and with the same radiograph without the lesion.
# - Evaluate a mask drawn in a box by what it adds to the box.

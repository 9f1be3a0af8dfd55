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
# **You will be able to** compute a Grad-CAM by hand, explain a single answer by LIME, draw the outline of a lesion from a box, and judge
# all three: against exact masks, against maps that know nothing, against a network that learnt nothing, and
# against the very same film without its lesion.
#
# **You need** {ref}`chap:densenet121` for the network and {ref}`chap:statistics` for intervals.
#
# **It takes** half an hour of reading, and some minutes to run on two cores.
# :::
#
# The paper shows three kinds of pictures (its Fig. 4) and says that LIME "confirms the model's focus on meaningful structures", that Grad-CAM aligns
# "precisely to pathological lesions" and that masks show "high overlap with ground truth" {cite}`dernet`. A picture convinces by looking right. This chapter asks how often it *is* right. A virtual film has
# what no real one has: the exact shadow of each lesion, and a twin, the same film without it ({ref}`chap:virtual-radiographs`).

# %% tags=["parameters"]
profile = ""  # smoke, laptop or night; empty: DERNET_PROFILE, else laptop
films_judged = 48  # abnormal test films on which maps are judged, at most
lime_samples = 150  # altered films that LIME asks about, each
lime_seeds = 4  # repetitions of LIME, on a quarter of the films

# %%
from dataclasses import replace
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from myst_nb import glue
from scipy.stats import spearmanr

from dernet_utils.book.figures import show_boxes, show_figure, show_radiograph
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES, NETWORK_NAMES, NETWORKS
from dernet_utils.dataset.prepared import load_cached
from dernet_utils.dataset.tables import read_manifest
from dernet_utils.detection import images as detection_images
from dernet_utils.imaging import boxes as imaging_boxes
from dernet_utils.imaging.enhance import preprocess
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.metrics import intervals
from dernet_utils.triage import explain, training
from dernet_utils.triage import networks as triage_networks
from dernet_utils.triage.crossvalidation import (
    cross_validate,
    open_test_labels,
    read_decision,
    triage_images,
)
from dernet_utils.virtual.counterfactual import labelled_findings, read_counterfactuals

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
films = detection_images.detection_images(workspace)
exact = numbers.virtual  # of a real film neither a lesion's shadow nor a twin is known
found = {name: cross_validate(workspace, name) for name in NETWORKS}
decision = read_decision(workspace)
open_test_labels(workspace)  # the decision is written: test films may be looked at
truth = films.boxes[films.boxes["image_id"].isin(films.test["image_id"])]
abnormal = films.test[films.test["image_id"].isin(truth["image_id"])]
rng = np.random.default_rng(numbers.seed)
some = np.sort(rng.permutation(len(abnormal))[:films_judged])
judged = abnormal.iloc[some].reset_index(drop=True)
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}
study, px = judged["study_id"].to_numpy(), numbers.triage_px

# %% tags=["remove-cell"]
glue_values("c13", {
    "profile": numbers.name, "n": len(judged), "n-studies": len(set(study)), "px": px,
    "samples": lime_samples, "seeds": lime_seeds, "segments": explain.SEGMENTS,
    "kind": "virtual radiographs" if exact else "radiographs",
    "masks": "the exact shadow" if exact else "the boxes",
})  # fmt: skip

# %% [markdown]
# We take {glue:text}`c13-n` {glue:text}`c13-kind` of the test split with at least one labelled lesion, of {glue:text}`c13-n-studies` studies, drawn at
# random. The mask of a virtual film is the shadow of all its labelled lesions, exact to the pixel; of a real film, whose
# shadows nobody has drawn, it is its boxes, filled.


# %%
def smaller(mask, size):
    """A mask at the size, (width, height), of the enhanced film."""
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5


def exact_masks(film, size):
    """Of a virtual film's labelled lesions: type and exact mask."""
    twins = read_counterfactuals(workspace.data_root, film.image_id)
    own = findings[findings["image_id"] == film.image_id]
    return [(row.lesion_type, smaller(twins[row.number].mask, size)) for row in own.itertuples()]


def filled_boxes(film, size):
    """Of a film's labelled lesions: type and filled box."""
    own = truth[truth["image_id"] == film.image_id]
    corners = own[list(CORNERS)].to_numpy() * film.scale
    return [
        (kind, explain.filled_box(box, size[::-1]))
        for kind, box in zip(own["lesion_type"], corners, strict=True)
    ]


masks_of = exact_masks if exact else filled_boxes
findings = labelled_findings(read_manifest(workspace.data_root)) if exact else None
shown = [load_cached(path) for path in judged["cached_path"]]
lesions = [
    masks_of(film, grey.shape[::-1]) for film, grey in zip(judged.itertuples(), shown, strict=True)
]
masks = [np.any([mask for _, mask in own], axis=0) for own in lesions]
share = np.array([mask.mean() for mask in masks])
assert all(mask.shape == grey.shape for mask, grey in zip(masks, shown, strict=True))
pd.Series(share).describe()[["min", "50%", "max"]].round(4).to_frame(
    "share of the film that is lesion"
)

# %% [markdown]
# ## Grad-CAM, by hand
#
# The last convolution of each network leaves maps $A_k$, a few cells wide. They are averaged over places and weighed, and the
# sum is the logit. *Grad-CAM* {cite}`selvaraju2017` takes the weight of map $k$ to be the logit's mean gradient and lays the maps over one another:
#
# $$
# \alpha_k = \frac{1}{h w} \sum_{i, j} \frac{\partial z}{\partial A_k^{ij}}, \qquad
# L = \operatorname{ReLU}\Bigl( \sum_k \alpha_k A_k \Bigr) .
# $$ (eq:grad-cam)
#
# In our networks nothing but an average and one linear layer follows these maps, so the gradient is that layer's weight over $h w$ in every cell, and no
# differentiation is needed. We compute it so, for all three networks, and compare with captum's:

# %%
pixels = training.load_pixels(judged["cached_path"], px)
networks = {name: training.load_network(name, found[name].checkpoints[0])[0] for name in NETWORKS}
for name, network in networks.items():
    with torch.no_grad():
        A = network.forward_features(triage_networks.as_input(pixels[:2]))
        alpha = network.get_classifier().weight[0] / (A.shape[2] * A.shape[3])
    L = torch.einsum("k,nkij->nij", alpha, A).clamp(min=0)
    sized = torch.nn.functional.interpolate(L[:, None].detach(), (px, px), mode="bilinear")[:, 0]
    by_library = explain.grad_cam(name, network, pixels[:2])
    assert np.allclose(by_library, sized.numpy(), atol=1e-5 * max(by_library.max(), 1e-6))
cells = {NETWORK_NAMES[name]: f"{A.shape[2]} × {A.shape[3]}" for name in NETWORKS}
glue_values("c13", {
    "cells": f"{A.shape[2]} × {A.shape[3]}",
})

# %% [markdown]
# For a film of {glue:text}`c13-px` pixels the maps have {glue:text}`c13-cells` cells. Enlarged to the film they look smooth, which is interpolation; they
# cannot point more precisely than a cell.
#
# Each network has one trained form for each fold, and DERNet is a vote. Its map is the sum of all maps, each scaled to a sum of one, weighed as the vote:


# %%
def scaled(heat):
    """Maps with a sum of one; a map of zeros stays so."""
    total = heat.sum(axis=(1, 2), keepdims=True)
    return np.divide(heat, total, out=np.zeros_like(heat), where=total > 0)


def cams(shown_pixels):
    """Grad-CAM of each network, the mean over its folds."""
    return {
        name: np.mean([
            scaled(explain.grad_cam(name, training.load_network(name, one)[0], shown_pixels))
            for one in found[name].checkpoints
        ], axis=0)
        for name in NETWORKS
    }  # fmt: skip


maps = cams(pixels)
maps["DERNet"] = sum(w * maps[name] for w, name in zip(decision.weights, NETWORKS, strict=True))

# %% [markdown]
# ## LIME, by hand
#
# LIME {cite}`ribeiro2016` knows nothing of the network's inside. It divides the film into superpixels, blurs a random half of them away, asks
# the network again, and fits a linear model from which patches $z'$ were there to the logit:
#
# $$
# \hat w = \arg\min_w \sum_s \pi_s \bigl( f(x_s) - w_0 - w^\top z'_s \bigr)^2 + \lambda \lVert w \rVert^2 ,
# $$ (eq:lime)
#
# where $\pi_s$ says how near the altered film is to the true one. Patches with large positive weights speak for *abnormal*. We explain DenseNet121.

# %%
network = networks["densenet121"]
squares = [grey.squeeze().numpy() for grey in pixels]
patches = [explain.superpixels(square) for square in squares]
weights = [
    explain.lime(network, pixels[[row]], patches[row], lime_samples, numbers.seed)
    for row in range(len(judged))
]
maps["LIME"] = np.stack([explain.spread_over(w, p) for w, p in zip(weights, patches, strict=True)])
assert all(len(w) == p.max() + 1 for w, p in zip(weights, patches, strict=True))

# %% [markdown]
# By hand, for the first film: draw patches, ask, and solve the least squares without the penalty. It should rank the patches much as captum does.

# %%
rng = np.random.default_rng(0)
z = rng.integers(0, 2, (400, patches[0].max() + 1))
kept = torch.from_numpy(z[:, patches[0]].astype(bool))[:, None]
altered = torch.where(kept, pixels[:1], explain.without_detail(pixels[:1]))
with torch.no_grad():
    f = torch.cat([network(triage_networks.as_input(part)) for part in altered.split(16)]).squeeze(1).numpy()
design = np.column_stack([np.ones(len(z)), z])
w_hat = np.linalg.lstsq(design, f, rcond=None)[0][1:]
agreement = spearmanr(w_hat, weights[0]).statistic
glue_values("c13", {
    "lime-agreement": f"{agreement:.2f}",
})

# %% [markdown]
# Rank correlation of the two: {glue:text}`c13-lime-agreement`. What is missing to one is chance, since both asked about other patches, and the penalty.
#
# ## Masks without labels
#
# The paper's Fig. 4c shows masks, and the dataset has boxes only. Ours are drawn without having learnt from any mask: within a box, *GrabCut* {cite}`rother2004`
# parts two mixtures of greys, told that there is no lesion outside the box's largest ellipse, and that it is likely in an inner one, but for
# the quarter of it where the heat map is lowest (`explain.lesion_mask`).
#
# All three on films of this run, the counterpart of the paper's Fig. 4:

# %%
boxes = pd.read_parquet(workspace.tables / "yolo11l_test_boxes.parquet")
boxes = boxes[boxes["image_id"].isin(judged["image_id"])]
busiest = np.argsort([-len(own) for own in lesions], kind="stable")[: min(3, len(judged))]


def on_film(row, heat):
    """A square map at the size of the enhanced film."""
    return cv2.resize(
        heat.astype(np.float32), shown[row].shape[::-1], interpolation=cv2.INTER_LINEAR
    )


def corners_shown(row, table):
    """A film's boxes at the size of the enhanced film."""
    own = table[table["image_id"] == judged["image_id"].iloc[row]]
    return own.assign(**{c: own[c] * judged["scale"].iloc[row] for c in CORNERS})


# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(len(busiest), 4, figsize=(8, 3.3 * len(busiest)), squeeze=False)
titles = ("true boxes", "LIME", "Grad-CAM, DERNet", "masks in true boxes")
for line, row in zip(axes, busiest, strict=True):
    for ax, title in zip(line, titles, strict=True):
        show_radiograph(ax, shown[row], title if row == busiest[0] else "")
    show_boxes(line[0], corners_shown(row, truth), names=False)
    for ax, name in ((line[1], "LIME"), (line[2], "DERNet")):
        heat = on_film(row, maps[name][row])
        ax.imshow(heat / max(heat.max(), 1e-12), cmap="inferno", alpha=0.5, vmin=0, vmax=1)
    for box in corners_shown(row, truth)[list(CORNERS)].to_numpy():
        drawn = explain.lesion_mask(shown[row], box, on_film(row, maps["DERNet"][row]))
        line[3].contour(drawn, levels=[0.5], colors="#E69F00", linewidths=1)
    for ax in line[1:]:
        ax.contour(masks[row], levels=[0.5], colors="#56B4E9", linewidths=0.8, linestyles="--")
show_figure("c13-fig-explained", fig)

# %% [markdown]
# ```{glue:figure} c13-fig-explained
# :name: fig:explained
# :alt: Three films in rows; in columns the true boxes, a LIME map, a Grad-CAM map and drawn masks, with the exact outline of the lesions dashed.
# LIME (DenseNet121), Grad-CAM (DERNet) and masks, the counterpart of the paper's Fig. 4: the judged test films with the most lesions.
# Dashed blue: {glue:text}`c13-masks` of the lesions. Orange: masks drawn inside the true boxes. {glue:text}`c13-kind`, profile {glue:text}`c13-profile`.
# ```
#
# Before reading on, decide from {numref}`fig:explained` alone whether these maps are good. Then look at the numbers.
#
# ## Judge 1: against the lesion
#
# Two measures. The *pointing game* asks whether the hottest place lies in a lesion, and *energy* which share of all heat does. Both are easy to misread: on a film that is
# one fifth lesion, a map of noise gets one fifth. So each map stands beside two that have never seen a film: one that is the same everywhere, and one that looks at the middle.

# %%
flat, centre = np.ones((px, px)), explain.centred_map((px, px))
maps["centre"] = np.repeat(centre[None], len(judged), axis=0)
maps["everywhere the same"] = np.repeat(flat[None], len(judged), axis=0)


def judge_all(measure):
    """A measure of every map on every film."""
    return pd.DataFrame({
        name: [measure(on_film(row, own[row]), masks[row]) for row in range(len(judged))]
        for name, own in maps.items()
    })  # fmt: skip


points, energies = judge_all(explain.pointing), judge_all(explain.energy)
assert np.allclose(energies["everywhere the same"], share, atol=1e-6)


# %%
def mean_of(values):
    """Mean over films with its interval by study."""
    values = np.asarray(values, float)
    return intervals.bootstrap(lambda w: w @ values / w.sum(axis=1), study, **draws)


spoken = {name: NETWORK_NAMES.get(name, name) for name in maps}
levels = {
    spoken[name]: [f"{mean_of(points[name]):.2f}", f"{mean_of(energies[name]):.3f}"]
    for name in maps
}
pd.DataFrame(levels, ["pointing", "energy"]).T

# %% [markdown]
# And what each map is ahead of the two that know nothing, film by film:

# %%
leads = {
    spoken[name]: {
        "pointing, less centre": f"{mean_of(points[name] - points['centre']):+.2f}",
        "energy, less centre": f"{mean_of(energies[name] - energies['centre']):+.3f}",
        "energy, less same": f"{mean_of(energies[name] - energies['everywhere the same']):+.3f}",
    }
    for name in (*NETWORKS, "DERNet", "LIME")
}
pd.DataFrame(leads).T

# %% tags=["remove-cell"]
names = [*NETWORKS, "DERNet", "LIME"]


def beats(measure, other):
    """Maps whose lead over another one has an interval above zero, in words."""
    won = [spoken[n] for n in names if mean_of(measure[n] - measure[other]).low > 0]
    return ", ".join(won) if won else "none of the maps"


glue_values("c13", {
    "points-centre": beats(points, "centre"),
    "energy-centre": beats(energies, "centre"),
    "energy-same": beats(energies, "everywhere the same"),
    "points-same": beats(points, "everywhere the same"),
})

# %% [markdown]
# By pointing, {glue:text}`c13-points-same` lies above a map that is the same everywhere, and {glue:text}`c13-points-centre` above one that looks at the middle; by energy, above the
# first {glue:text}`c13-energy-same`, above the second {glue:text}`c13-energy-centre`. That is what "the interval of the difference lies above zero" says on {glue:text}`c13-n` films, nothing more.
# The middle is a strong opponent here as in a clinic, since films are aimed at what is to be seen.
#
# Lesion types differ in size and in how they show. Energy in the lesions of one type, on the films that have it:

# %%
rows, ahead = [], {"DERNet": [], "LIME": []}
for name in LESION_TYPES:
    has = [row for row, own in enumerate(lesions) if any(kind == name for kind, _ in own)]
    if not has:
        continue
    own = [np.any([m for kind, m in lesions[row] if kind == name], axis=0) for row in has]
    heat = {
        key: [explain.energy(on_film(r, maps[key][r]), m) for r, m in zip(has, own, strict=True)]
        for key in ("DERNet", "LIME", "centre")
    }
    row = {
        "films": len(has),
        "studies": len(set(study[has])),
        "share": np.mean([m.mean() for m in own]),
    }
    for key in ahead:
        gap = np.array(heat[key]) - np.array(heat["centre"])
        lead = intervals.bootstrap(lambda w, gap=gap: w @ gap / w.sum(axis=1), study[has], **draws)
        row[f"{key} less centre"] = f"{lead:+.3f}"
        if lead.low > 0 and row["studies"] >= 5:  # of fewer studies an interval knows too little
            ahead[key].append(name.lower())
    rows.append({"lesion type": name} | row)
by_type = pd.DataFrame(rows).set_index("lesion type")
by_type.round(3)

# %% tags=["remove-cell"]
for key, names in ahead.items():
    glue(f"c13-ahead-{key}", ", ".join(names) if names else "no type", display=False)

# %% [markdown]
# On types of at least five studies, Grad-CAM of DERNet is ahead of the middle of the film on {glue:text}`c13-ahead-DERNet`, and LIME on
# {glue:text}`c13-ahead-LIME`. On every other type these maps tell no more than that lesions lie in the middle.
#
# ## Judge 2: what happens when the hot places go
#
# *Deletion* blurs the hottest sixteenth of the film away, then the next, and so on; if the map is right about the network, the
# probability falls early. *Insertion* lets them come into a blurred film. No lesion is needed for this: it asks whether the map fits the network, not whether
# the network is right.


# %%
def score(altered):
    """DenseNet121's probability of abnormal."""
    return triage_networks.predict_probabilities(network, altered)


noise = np.random.default_rng(numbers.seed).random((len(judged), 8, 8))
maps["random"] = np.stack(
    [cv2.resize(one, (px, px), interpolation=cv2.INTER_CUBIC) for one in noise]
).clip(0)
few = range(0, len(judged), 2)
asked = ("densenet121", "LIME", "centre", "random")
curves = {
    (name, insert): np.array([
        explain.removal_curve(score, pixels[[row]], maps[name][row], insert=insert) for row in few
    ])
    for name in asked for insert in (False, True)
}  # fmt: skip

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for ax, insert in zip(axes, (False, True), strict=True):
    for name, dash in zip(asked, ("-", "--", "-.", ":"), strict=True):
        mean = curves[name, insert].mean(axis=0)
        label = f"{spoken.get(name, name)}, area {mean.mean():.2f}"
        ax.plot(np.linspace(0, 100, len(mean)), mean, dash, label=label)
    ax.set(xlabel=f"per cent of the film {'put in' if insert else 'blurred away'}, hottest first")
    ax.legend(fontsize=8)
axes[0].set(ylabel="mean probability of abnormal", ylim=(0, 1))
show_figure("c13-fig-removal", fig)

# %%
areas = {key: own.mean(axis=1) for key, own in curves.items()}
few_study = study[list(few)]


def gap_to_random(name, insert):
    """Area under a map's curve less that under a random map's."""
    gap = areas[name, insert] - areas["random", insert]
    return intervals.bootstrap(lambda w: w @ gap / w.sum(axis=1), few_study, **draws)


columns = {"deletion, area less random's": False, "insertion, area less random's": True}
removal = {
    spoken.get(name, name): {c: f"{gap_to_random(name, i):+.3f}" for c, i in columns.items()}
    for name in asked[:-1]
}
glue_values("c13", {
    "few": len(few_study),
})
pd.DataFrame(removal).T

# %% [markdown]
# ```{glue:figure} c13-fig-removal
# :name: fig:removal
# :alt: Left, mean probability while hot places are blurred away; right, while they are put in; four curves for Grad-CAM, LIME, the centre and a random map.
# Deletion (left; low is good) and insertion (right; high is good) for DenseNet121, means over {glue:text}`c13-few` {glue:text}`c13-kind` of the
# test split, profile {glue:text}`c13-profile`.
# ```
#
# In {numref}`fig:removal` a deletion area below random's and an insertion area above it speak for a map. A blurred film is none that the network has met, so part of what the
# curves show is its surprise.
#
# ## Judge 3: a network that knows nothing
#
# If a map looks much the same for a network that has learnt nothing, it shows the film and not the network {cite}`adebayo2018`. Three comparisons by rank
# correlation of maps: with the same network trained on the other folds, which should agree; with random weights; and with a
# network trained on shuffled labels, on which only the films are left to learn from.

# %%
images = triage_images(workspace)
train = images[images["split"] == "train"]
recipe = replace(training.TriageRecipe.of(numbers), epochs=1, crop_epochs=0)
shuffled = train["label"].sample(frac=1, random_state=numbers.seed).to_numpy()
lesson = train.assign(label=shuffled).drop(columns="lesions")
learn, hold = (lesson[lesson["fold"] == 0], lesson[lesson["fold"] == 1])
misled = training.train_triage(
    "densenet121", training.Sample.load(learn, recipe.train_px),
    training.Sample.load(hold, recipe.image_px), recipe, workspace.weights / "shuffled",
).network  # fmt: skip
untrained = triage_networks.build_network("densenet121", seed=numbers.seed)
with torch.no_grad():
    untrained.get_classifier().weight.normal_(generator=torch.Generator().manual_seed(1))
others = {
    "trained on the other folds": training.load_network("densenet121", found["densenet121"].checkpoints[1])[0],
    "random weights": untrained,
    "trained on shuffled labels": misled,
}  # fmt: skip

# %%
own_maps = explain.grad_cam("densenet121", network, pixels)


def likeness(other):
    """Rank correlation of each film's two maps; zero where one is the same everywhere."""
    pairs = zip(own_maps, other, strict=True)
    flat = [
        0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else spearmanr(a.ravel(), b.ravel()).statistic
        for a, b in pairs
    ]
    return np.array(flat)


alike = {
    name: likeness(explain.grad_cam("densenet121", one, pixels)) for name, one in others.items()
}
alike["the centre map"] = likeness(maps["centre"])
again = [
    explain.lime(network, pixels[[row]], patches[row], lime_samples, numbers.seed + k)
    for row in range(0, len(judged), 4) for k in range(1, lime_seeds)
]  # fmt: skip
first = [weights[row] for row in range(0, len(judged), 4) for _ in range(1, lime_seeds)]
stable = [
    spearmanr(a, b).statistic if np.ptp(a) and np.ptp(b) else 0.0
    for a, b in zip(first, again, strict=True)
]
sanity = {f"Grad-CAM and that of: {name}": f"{mean_of(value):.2f}" for name, value in alike.items()}
sanity["LIME and LIME with another seed"] = (
    f"{np.mean(stable):.2f}, from {min(stable):.2f} to {max(stable):.2f}"
)
pd.Series(sanity, name="rank correlation").to_frame()

# %% tags=["remove-cell"]
glue_values("c13", {
    "stable": f"{np.mean(stable):.2f}",
    "folds-alike": f"{mean_of(alike['trained on the other folds']):.2f}",
    "random-alike": f"{mean_of(alike['random weights']):.2f}",
    "misled-alike": f"{mean_of(alike['trained on shuffled labels']):.2f}",
})

# %% [markdown]
# Two networks that learnt the same task on other films agree by {glue:text}`c13-folds-alike`; with random weights the map agrees by {glue:text}`c13-random-alike`, with shuffled labels by
# {glue:text}`c13-misled-alike`. The first should be clearly above the other two, or the map says little of what was learnt. LIME agrees with itself, under another seed of its patches, by
# {glue:text}`c13-stable` on average ({glue:text}`c13-seeds` seeds): a LIME picture should never be shown from one seed without saying so.
#
# ## Judge 4: the same film without the lesion
#
# The hardest question: *does the map move when only the lesion is removed?* Of each film we take the most visible lesion and its twin, the same film
# without it, through the same enhancement. Of a patient there is no such film, so on real films this judge is silent.


# %%
def twin_of(film):
    """A film's most visible labelled lesion: the enhanced film without it, and its exact mask."""
    own = findings[findings["image_id"] == film.image_id].sort_values("visibility").iloc[-1]
    twin = read_counterfactuals(workspace.data_root, film.image_id)[own["number"]]
    grey = read_radiograph(Path(workspace.data_root) / "test_images" / f"{film.image_id}.dicom").pixels
    without = preprocess(twin.without(grey), numbers.cache_px, numbers.clip_limit, numbers.tiles)
    return without, smaller(twin.mask, without.shape[::-1])


def dernet(shown_pixels):
    """DERNet's probability of abnormal."""
    columns = [
        np.mean([triage_networks.predict_probabilities(training.load_network(name, one)[0], shown_pixels)
                 for one in found[name].checkpoints], axis=0)
        for name in NETWORKS
    ]  # fmt: skip
    return decision.prob(np.column_stack(columns))


# %%
def ask_twins():
    """Of each film: the probability's fall, the share of the map's change at the lesion, its area."""
    twins, twin_masks = zip(*(twin_of(film) for film in judged.itertuples()), strict=True)
    assert all(twin.shape == grey.shape for twin, grey in zip(twins, shown, strict=True))
    small = [cv2.resize(twin, (px, px), interpolation=cv2.INTER_AREA) for twin in twins]
    twin_pixels = torch.from_numpy(np.stack(small))[:, None]
    twin_maps = cams(twin_pixels)
    twin_map = sum(w * twin_maps[name] for w, name in zip(decision.weights, NETWORKS, strict=True))
    moved, area = [], []
    for row, mask in enumerate(twin_masks):
        change = np.abs(on_film(row, maps["DERNet"][row]) - on_film(row, twin_map[row]))
        around = cv2.dilate(mask.astype(np.uint8), np.ones((15, 15))).astype(bool)
        moved.append(explain.energy(change, around))
        area.append(around.mean())
    return dernet(pixels) - dernet(twin_pixels), np.array(moved), np.array(area)


fall, moved, area = ask_twins() if exact else np.empty((3, 0))

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3))
left.hist(100 * fall, bins=20, color="0.6")
left.axvline(0, color="#B5442E", ls="--", label="no change")
if exact:
    left.axvline(100 * fall.mean(), color="k", label=f"mean {100 * fall.mean():+.1f}")
left.set(xlabel="fall of the probability, points", ylabel="films")
left.legend(fontsize=8)
right.plot(100 * area, 100 * moved, "o", ms=4, alpha=0.7)
limit = 105 * max([*area, *moved], default=1)
right.plot([0, limit], [0, limit], "--", color="#B5442E", label="as everywhere else")
right.set(
    xlabel="lesion and surroundings, per cent of the film",
    ylabel="per cent of the map's change there",
)
right.legend(fontsize=8)
show_figure("c13-fig-twins", fig)

# %% tags=["remove-cell"]
by_fall = moves = moved_verdict = fall_verdict = "(no film has a twin here)"
if exact:
    falls, lead = mean_of(100 * fall), mean_of(moved - area)
    by_fall, moves = f"{falls:+.1f}", f"{lead:+.3f}"
    moved_verdict = (
        "The map changes no more at the lesion than elsewhere, as far as these films tell."
    )
    if lead.low > 0:
        moved_verdict = "The map changes more at the lesion than elsewhere, though most of its change is elsewhere."
    if lead.low > 0 and moved.mean() > 0.5:
        moved_verdict = "Most of the map's change is at the lesion."
    fall_verdict = "no fall can be told from zero"
    if falls.low > 0:
        fall_verdict = "one lesion less makes the network surer of normal"
glue_values("c13", {
    "fall": by_fall,
    "moved": moves,
    "moved-verdict": moved_verdict,
    "fall-verdict": fall_verdict,
})

# %% [markdown]
# ```{glue:figure} c13-fig-twins
# :name: fig:twins-explained
# :alt: Left, a histogram of how far the probability falls when one lesion is removed. Right, the share of the map's change that lies at the lesion against the lesion's share of the film.
# What changes when the most visible lesion alone is removed. Left: DERNet's probability. Right: where its map changes. {glue:text}`c13-n` {glue:text}`c13-kind` of the test
# split and their twins, profile {glue:text}`c13-profile`.
# ```
#
# The probability falls by {glue:text}`c13-fall` points (mean, 95 % by study): {glue:text}`c13-fall-verdict`. Of the map's change, the share at the lesion exceeds
# the lesion's share of the film by {glue:text}`c13-moved`. {glue:text}`c13-moved-verdict` Points of {numref}`fig:twins-explained` near the dashed line are films on which a reader, looking at the map, would be told about
# a place that has nothing to do with the difference.
#
# ## Are the masks right?
#
# Each labelled lesion of a virtual film has its exact mask, so overlap can be measured there: for the filled box and the ellipse in its middle, which do not look at the film, for
# GrabCut, and for GrabCut told by the heat map; inside true boxes first, and then inside the boxes that the detector found.


# %%
def overlaps(row, boxes_shown, shadow):
    """IoU and Dice of four masks in a box with a lesion's exact mask."""
    heat, out = on_film(row, maps["DERNet"][row]), {}
    for name, told in {"GrabCut": None, "GrabCut and heat map": heat}.items():
        out[name] = explain.overlap(explain.lesion_mask(shown[row], boxes_shown, told), shadow)
    blind = {"filled box": explain.filled_box, "ellipse": explain.ellipse_in}
    out |= {n: explain.overlap(of(boxes_shown, shadow.shape), shadow) for n, of in blind.items()}
    return out


# %%
in_true, in_found = [], []
for row, own in enumerate(lesions if exact else []):
    offered = corners_shown(row, boxes)
    for kind, shadow in own:
        if not shadow.any():
            continue
        y, x = np.nonzero(shadow)
        tight = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], float)
        real = corners_shown(row, truth)
        real = real[real["lesion_type"] == kind][list(CORNERS)].to_numpy()
        best = real[np.argmax(imaging_boxes.box_iou(tight[None], real)[0])]
        record = {"study": study[row], "lesion_type": kind}
        in_true.append(record | overlaps(row, best, shadow))
        same = offered[offered["lesion_type"] == kind][list(CORNERS)].to_numpy()
        if len(same) and imaging_boxes.box_iou(best[None], same).max() >= 0.5:
            near = same[np.argmax(imaging_boxes.box_iou(best[None], same)[0])]
            in_found.append(record | overlaps(row, near, shadow))
ways = ("filled box", "ellipse", "GrabCut", "GrabCut and heat map")


# %%
def summary(records, which):
    """Mean IoU or Dice over lesions of each way, with intervals by study."""
    if not records:
        return {way: "–" for way in ways}
    groups, out = np.array([own["study"] for own in records]), {}
    for way in ways:
        values = np.array([own[way][which] for own in records])
        out[way] = (
            f"{intervals.bootstrap(lambda w, v=values: w @ v / w.sum(axis=1), groups, **draws):.2f}"
        )
    return out


columns = {
    f"{name} ({len(own)}), {measure}": summary(own, which)
    for name, own in {"true boxes": in_true, "found boxes": in_found}.items()
    for which, measure in enumerate(("IoU", "Dice"))
}
mask_table = pd.DataFrame(columns)
mask_table

# %% tags=["remove-cell"]
gains = {"mask": ("GrabCut", "ellipse"), "heat": ("GrabCut and heat map", "GrabCut")}
groups = np.array([record["study"] for record in in_true])
for key, (one, other) in gains.items():
    gain = np.array([record[one][0] - record[other][0] for record in in_true])
    said = "(no exact masks here)"
    if in_true:
        said = f"{intervals.bootstrap(lambda w, g=gain: w @ g / w.sum(axis=1), groups, **draws):+.3f}"
    glue(f"c13-{key}-gain", said, display=False)

# %% [markdown]
# GrabCut less the ellipse: IoU {glue:text}`c13-mask-gain`. The heat map adds {glue:text}`c13-heat-gain` to that. Where the first is not above zero, the outline in a figure is
# decoration: the box said as much. By lesion type, mean IoU in true boxes:

# %%
kinds = pd.Series([record["lesion_type"] for record in in_true], dtype=object)
per_type = pd.DataFrame({way: [record[way][0] for record in in_true] for way in ways})
per_type.groupby(kinds).mean().assign(n=kinds.value_counts()).rename_axis("lesion type").round(2)

# %% [markdown]
# Masks of narrowed discs and slipped vertebrae are regions, not densities, and no contrast marks their edge.
#
# ## Where explanations mislead
#
# - A smooth map over a film looks precise. Its cells are a quarter of the film's width here, and larger than most lesions.
# - It always points somewhere, also on a normal film, and when the network is wrong.
# - A map that looks at the spine is not yet one that looks at the lesion: the spine is in the middle of every film.
# - LIME's picture depends on its seed, and on what *absent* means.
# - The last judge is the only one that knows what *should* change, and it needs films that nobody has of patients.
#
# ## Paper beside ours
#
# | claim of the paper | here |
# |---|---|
# | LIME confirms the focus on meaningful structures | pointing and energy against the middle and against nothing, with intervals, above |
# | Grad-CAM aligns precisely with lesions | the same; and what moves when the lesion goes, {numref}`fig:twins-explained` |
# | masks show high overlap with ground truth | IoU and Dice beside those of a filled box, above; the paper gives neither |
#
# ## Exercises
#
# Change the chapter first: set `lime_samples = 30`. What happens to LIME's agreement with itself?
#
# ```{exercise}
# :label: ex:explain-hand
# By hand: two maps of 2 × 2 cells, $A_1 = \begin{pmatrix} 1 & 0 \\ 0 & 0 \end{pmatrix}$, $A_2 = \begin{pmatrix} 0 & 2 \\ 0 & 1 \end{pmatrix}$, and a head with weights
# 4 and −2. What is Grad-CAM?
# ```

# %% [markdown]
# ````{solution-start} ex:explain-hand
# :class: dropdown
# ````
# By {eq}`eq:grad-cam` $\alpha = (1, -1/2)$. The sum is $\begin{pmatrix} 1 & -1 \\ 0 & -1/2 \end{pmatrix}$, and after the ReLU only the upper left
# cell is left. What speaks against *abnormal* is not shown.

# %%
A_1, A_2 = np.array([[1, 0], [0, 0]]), np.array([[0, 2], [0, 1]])
assert (np.maximum(4 / 4 * A_1 - 2 / 4 * A_2, 0) == [[1, 0], [0, 0]]).all()

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:explain-energy
# In code: a lesion covers a disc of radius 0.2 (sides run from −1 to 1) about the middle of the film. What energy has the centre map, and what is its share of the film?
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
print(f"energy {got:.3f}, share {has:.3f}")

# %% [markdown]
# A map that has seen no film scores twice the share, because lesions like the middle. Any claim for a map has to begin from there.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:explain-question
# Question the method: a paper prints six Grad-CAM pictures, all on lesions. What would you have to know to believe that the network looks at lesions?
# ```
#
# ```{solution} ex:explain-question
# :class: dropdown
# How the six were chosen, and from how many. The rate over all films of a test split, with its interval. The rate of a map that looks at the middle. What the maps look like on normal
# films and on films that the network got wrong. Whether a network with shuffled labels gives other maps. One of these is a
# sentence in a methods section, and none is six pictures.
# ```
#
# ## What to take along
#
# - Grad-CAM is the head laid over the last maps. Count its cells before trusting its edges.
# - A share of heat means nothing without the share of the film, and without the middle as opponent.
# - Ask a network that learnt nothing, and the same film without the lesion.
# - A mask from a box is worth what it adds to the box.

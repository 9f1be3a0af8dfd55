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
# (chap:outliers)=
# # 17 · Is it a radiograph at all?
#
# :::{admonition} In this chapter
# **You will be able to** build an input check from three layers, each of which gives a reason that a user
# understands, choose its limit without any unsuitable picture, and measure what it lets through.
#
# **You need** {ref}`chap:onnx` for the exported files, {ref}`chap:statistics` for intervals.
#
# **It takes** twenty minutes of reading, and about a minute to run: nothing is trained.
# :::
#
# A network gives an output for any input: even for a holiday photograph the ensemble returns a probability between 0
# and 1. The paper's interface has an "automated outlier rejection" {cite}`dernet` and does not say how it works. Ours
# checks three things, the cheapest first: the DICOM header, a few statistics of the pixels, and how far a network's
# embedding of the image lies from those of its training images. A picture that is no spine radiograph is called
# *out-of-distribution* (OOD): it does not come from the distribution of images on which the networks were trained and
# evaluated, so none of this book's results apply to its score.

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
rejected = 0.025  # fraction of held-out training radiographs allowed beyond the embedding's limit
each = 24  # pictures per family

# %%
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from pydicom.data import get_testdata_file
from scipy.stats import binomtest

from dernet_utils.book.figures import show_figure, show_radiograph
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.book.unlike_images import altered_radiographs, unlike_images
from dernet_utils.dataset.prepared import read_images
from dernet_utils.imaging.enhance import preprocess
from dernet_utils.imaging.reader import decode_radiograph
from dernet_utils.inference import export, ood
from dernet_utils.metrics import classification, intervals
from dernet_utils.triage import networks, training
from dernet_utils.triage.crossvalidation import cross_validate, triage_images

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
images = triage_images(workspace)
train, test = (images[images["split"] == split].reset_index(drop=True) for split in ("train", "test"))
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}
rng = np.random.default_rng(numbers.seed)
paths = read_images(workspace).set_index("image_id")["dicom_path"]


def read_bytes(image):
    """The bytes of a row's DICOM file."""
    return Path(paths[image.image_id]).read_bytes()


# %% tags=["remove-cell"]
glue_values("c17", {
    "profile": numbers.name, "kind": workspace.image_kind,
    "train": len(train), "test": len(test), "each": each, "test-studies": test["study_id"].nunique(),
    "rejected": f"{rejected:.1%}", "network": "ResNet50",
})

# %% [markdown]
# ## Layer 1: the header
#
# A DICOM file states what it is. Spine radiographs have the modality CR, DX or RG; any other modality is a reason to
# refuse the file, and so is the standard's term for another body part, such as `CHEST`. Its list of terms is open,
# so an unknown word is no reason; nor is an empty element: anonymisation empties many headers. PNG and JPEG files
# have no such header. The library that reads DICOM comes with small files for its own tests; this is what the check
# finds in three of them, and in a radiograph of the test split:

# %%
files = {
    name: Path(get_testdata_file(name, download=False)).read_bytes()
    for name in ("CT_small.dcm", "MR_small.dcm", "J2K_pixelrep_mismatch.dcm")
}
files["a radiograph of the test split"] = read_bytes(next(test.itertuples()))
reasons = {name: ood.header_reasons(decode_radiograph(data)) for name, data in files.items()}
assert not reasons["a radiograph of the test split"]
texts = {name: " ".join(reason.text for reason in own) or "none" for name, own in reasons.items()}
pd.Series(texts, name="reasons to refuse, from the header").to_frame()

# %% [markdown]
# ## Layer 2: the pixels
#
# The second layer computes eight statistics that separate radiographs from other pictures. Each has a limit, set with
# a wide margin around all training images of the virtual cohort; a file beyond a limit is refused, and that statistic
# is the reason. Most catch one kind of picture: *colour* a photograph, *paper* (one bright grey that covers much of
# the image) a document, *flat* (pixels equal to their neighbours) a drawing or a screenshot, and a low *smoothness*
# (the correlation of neighbouring pixels) noise. Of this run's {glue:text}`c17-train` training images
# {glue:text}`c17-beyond` lie beyond a limit.

# %%
facts = pd.DataFrame([ood.picture_facts(decode_radiograph(read_bytes(image))) for image in train.itertuples()])
limits = pd.DataFrame(ood.LIMITS, index=["low", "high", "text"]).T
table = facts.agg(["min", "median", "max"]).T.join(limits[["low", "high"]])
beyond = ((facts < table["low"]) | (facts > table["high"])).any(axis=1).sum()
assert beyond == 0 or not workspace.virtual
glue_values("c17", {"beyond": int(beyond)})
table.astype(float).round(3)

# %% [markdown]
# ## Layer 3: the network's embedding
#
# A grey photograph may pass both layers. But it contains patterns that no radiograph has, and a network trained on
# radiographs responds to them. Take the spatial means of its early feature maps, an embedding $e$; scale each
# component by its standard deviation over the training images; and compute how far it lies from their mean, *in units
# of their standard deviation in that direction* {cite}`lee2018`:
#
# $$
# d(e)^2 = \sum_{k=1}^{m} \frac{(v_k^\top \tilde e)^2}{\lambda_k}
# + \frac{\lVert \tilde e \rVert^2 - \sum_k (v_k^\top \tilde e)^2}{\bar\lambda} ,
# $$ (eq:mahalanobis)
#
# with $\tilde e$ centred and scaled, $v_k$ and $\lambda_k$ the first {glue:text}`c17-dimensions` principal directions
# of the training embeddings and their variances, and $\bar\lambda$ the mean of all remaining variances. This is the
# Mahalanobis distance, with one common variance for all remaining directions, since there are too few images to
# estimate one for each.
#
# Why not the plain distance to the mean? Components of an embedding vary together: a brighter image, for example, may
# raise many of them at once. Training images then spread widely along that direction and little across it, so that
# the same distance is ordinary along the one and exceptional along the other. Dividing each direction by its own
# spread makes the two comparable. The embeddings come from ResNet50 of fold 0:

# %%
checkpoint = cross_validate(workspace, "resnet50").checkpoints[0]
net = training.load_network("resnet50", checkpoint)[0].eval()


def embeddings_by_stage(pixels):
    """Spatial means of the feature maps of each of ResNet50's stages, for images (n, 1, px, px)."""
    parts = []
    with torch.no_grad():
        for part in pixels.split(16):
            maps = net.forward_intermediates(networks.as_input(part), intermediates_only=True)
            parts.append([own.mean(dim=(2, 3)).numpy() for own in maps])
    return [np.concatenate(own) for own in zip(*parts, strict=True)]


parts = {"trained on": train[train["fold"] != 0], "held out": train[train["fold"] == 0], "test": test}
embedded = {
    name: embeddings_by_stage(training.load_pixels(own["cached_path"], numbers.triage_px))
    for name, own in parts.items()
}
known = embedded["trained on"][export.EARLY]
gate = ood.fit_embedding_gate(known, embedded["held out"][export.EARLY], rejected)

# %% [markdown]
# By hand, with the eigenvectors of the covariance matrix. A small constant is added to each variance: otherwise a
# direction in which the training images hardly vary would dominate the sum.

# %%
spread = known.std(axis=0)
e = (known - known.mean(axis=0)) / np.where(spread > 0, spread, 1)
variance, v = np.linalg.eigh(e.T @ e / (len(e) - 1))
variance, v = np.maximum(variance[::-1], 0), v[:, ::-1]
m = min(ood.DIMENSIONS, len(e) // 2, v.shape[1])
ridge = ood.RIDGE * variance[: min(e.shape)].mean()
inside = (e @ v[:, :m]) ** 2
rest = (e**2).sum(axis=1) - inside.sum(axis=1)
mean_rest = variance[m:].sum() / max(v.shape[1] - m, 1) + ridge
glue_values("c17", {"dimensions": m})
d = np.sqrt((inside / (variance[:m] + ridge)).sum(axis=1) + rest / mean_rest)
assert np.allclose(d, gate.distance(known), rtol=1e-2)

# %% [markdown]
# Images on which the network was trained lie nearer to the mean than others. So the limit comes from fold 0, which
# was used neither for this network nor for the directions: {glue:text}`c17-rejected` of its images may lie beyond. No
# OOD image was needed.
#
# ## Out-of-distribution images
#
# No list of what users may upload is complete. We use the following families, with {glue:text}`c17-each` pictures of
# each:
#
# - *Photographs* in colour and in grey: crops of scikit-learn's and ultralytics' own samples.
# - *Other modalities.* Slices through the donor's CT, in three directions, are the pictures nearest to a radiograph
#   that we could think of: they show the body that the virtual radiographs show. Further slices have the grey levels
#   of a magnetic resonance image, where fat is bright and cortical bone is dark. The third modality is speckle in a
#   fan, as in ultrasound.
# - *Other body parts*, a hand and a skull, built of rods and shells and exposed like a radiograph.
# - *Noise*, from fine to coarse.
# - *Screens*: a page of text, and an image viewer that shows a radiograph; in colour and in grey.
#
# Last, *altered radiographs of the test split*: rotated by 90° and by 180°, inverted to a negative, or cropped to
# half and a quarter of their sides. Opinions may differ on whether these should be refused; we measure whether they
# are. The module `dernet_utils.book.unlike_images` makes all of them from one seed.

# %%
radiographs = [decode_radiograph(read_bytes(image)).pixels for image in test.itertuples()]
unlike = unlike_images(radiographs, each, rng)
pictures = unlike | altered_radiographs(radiographs, each, rng)


def as_png(picture):
    """A picture as the bytes of a PNG file."""
    return cv2.imencode(".png", np.ascontiguousarray(picture))[1].tobytes()


def network_input(picture):
    """A picture as the network receives it: decoded, enhanced, square."""
    grey = decode_radiograph(as_png(picture)).pixels
    enhanced = preprocess(grey, numbers.cache_px, numbers.clip_limit, numbers.tiles)
    return cv2.resize(enhanced, (numbers.triage_px,) * 2, interpolation=cv2.INTER_AREA)


def first_layers(data):
    """Whether the header and the pixels of a file are reasons to refuse it."""
    radiograph = decode_radiograph(data)
    facts = ood.picture_facts(radiograph)
    return bool(ood.header_reasons(radiograph)), bool(ood.picture_reasons(facts))


# %%
ood_embedded = {
    family: embeddings_by_stage(torch.from_numpy(np.stack([network_input(own) for own in made]))[:, None])
    for family, made in pictures.items()
}
tested = pd.DataFrame([first_layers(read_bytes(image)) for image in test.itertuples()], columns=["header", "pixels"])
tested["distance"] = gate.distance(embedded["test"][export.EARLY]) / gate.limit
others = pd.concat([
    pd.DataFrame({
        "family": family, "number": range(len(made)),
        "pixels": [first_layers(as_png(own))[1] for own in made],
        "distance": gate.distance(ood_embedded[family][export.EARLY]) / gate.limit,
    })
    for family, made in pictures.items()
], ignore_index=True)

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(3, 5, figsize=(8, 6))
for ax, (family, made) in zip(axes.flat, pictures.items(), strict=False):
    ax.imshow(made[0][..., ::-1] if made[0].ndim == 3 else made[0], cmap="gray")
    ax.set_title(family, fontsize=7)
for ax in axes.flat:
    ax.set_axis_off()
show_figure("c17-fig-families", fig)

# %% [markdown]
# ```{glue:figure} c17-fig-families
# :name: fig:families
# :alt: One picture of each family of OOD images, from photographs to a quarter of a radiograph.
# One picture of each family. Photographs: scikit-learn's and ultralytics' own samples. Radiographs in the lower rows:
# {glue:text}`c17-kind`.
# ```
#
# ## What is refused

# %%
def fraction_of(refused):
    """A fraction with its exact binomial interval."""
    ends = binomtest(int(refused.sum()), len(refused)).proportion_ci()
    return f"{refused.mean():.2f} [{ends.low:.2f}, {ends.high:.2f}]"


by_first = tested["header"] | tested["pixels"]  # refused whatever the network's embedding
test_distance = tested["distance"].where(~by_first, np.inf)
at_95 = np.quantile(test_distance, 0.95, method="lower")  # where 95 % of the radiographs pass
rows = {}
for family, own in others.groupby("family", sort=False):
    far, distance = own["distance"] > 1, own["distance"].where(~own["pixels"], np.inf)
    label = np.repeat([0, 1], [len(tested), len(own)])
    area = classification.auroc(label, np.minimum(np.r_[test_distance, distance], 1e6))
    rows[family] = {
        "refused by pixels": own["pixels"].mean(), "refused by embedding": far.mean(),
        "refused by either": fraction_of(far | own["pixels"]),
        "AUROC": area, "passes at 95 %": (distance <= at_95).mean(),
    }
refusals = pd.DataFrame(rows).T
refusals.astype(dict.fromkeys(refusals.columns.drop("refused by either"), float)).round(2)

# %% tags=["remove-cell"]
must = [family for family in unlike if "body" not in family]
most = max(rows[family]["passes at 95 %"] for family in must)
worst = " and ".join(family for family in must if rows[family]["passes at 95 %"] == most)
refused = (by_first | (tested["distance"] > 1)).to_numpy(float)
by_study = intervals.bootstrap(lambda w: w @ refused / w.sum(axis=1), test["study_id"].to_numpy(), **draws)
glue_values("c17", {
    "refused-test": f"{by_study:.3f}",
    "worst": f"{most:.1%} of {worst} would pass, the most" if most else "none would pass",
})

# %% [markdown]
# Each row describes up to {glue:text}`c17-each` pictures. *Refused by either* comes with its exact binomial 95 %
# interval. The interval treats pictures as independent and does not extend to other pictures: the photographs are
# crops of only four, and the slices come from one body. *AUROC* is the probability that a picture of the family lies
# farther from the training images than a radiograph of the test split does, whatever the limit; a file that the
# header or the pixels refuse counts as farthest. *Passes at 95 %* is the fraction that would pass all layers if the
# limit let 95 % of the test split's radiographs pass. Among the families that are clearly not radiographs,
# {glue:text}`c17-worst`.
#
# A check that refused everything would refuse every picture in this table, so the fraction of radiographs that it
# refuses has to be reported with it. Of the {glue:text}`c17-test` {glue:text}`c17-kind` of the test split
# ({glue:text}`c17-test-studies` studies) {glue:text}`c17-refused-test` are refused (95 % interval by study).

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(8, 4))
groups = ["test split", *pictures]
for row, name in enumerate(groups):
    values = tested["distance"] if row == 0 else others.loc[others["family"] == name, "distance"]
    jitter = np.random.default_rng(row).uniform(-0.25, 0.25, len(values))
    ax.plot(values, row + jitter, ".", ms=4, alpha=0.5, color="#1F5FA8" if row == 0 else "0.35")
ax.axvline(1, color="#B5442E", ls="--", label="limit, set on fold 0")
ax.set(xscale="log", yticks=range(len(groups)), yticklabels=groups, xlabel="distance / limit")
ax.invert_yaxis()
ax.legend(fontsize=8)
show_figure("c17-fig-distances", fig)

# %% [markdown]
# ```{glue:figure} c17-fig-distances
# :name: fig:distances
# :alt: Distances from the training images in rows, for the test split and each OOD family, with a dashed limit.
# Mahalanobis distance of each picture from the images on which {glue:text}`c17-network` was trained, divided by the
# limit. Blue: {glue:text}`c17-test` {glue:text}`c17-kind` of the test split; profile {glue:text}`c17-profile`.
# ```
#
# ## Which stage of the network separates best
#
# The embedding comes from an *early* stage. Our first idea was the last feature maps, which hold what the network has
# learnt and which most methods use. The table compares all stages of ResNet50 on the same pictures, by the AUROC of
# test radiographs against each family:

# %%
by_stage = {}
for stage in range(len(embedded["test"])):
    own_gate = ood.fit_embedding_gate(embedded["trained on"][stage], embedded["held out"][stage], rejected)
    inner = own_gate.distance(embedded["test"][stage])
    by_stage[f"stage {stage}"] = {
        family: classification.auroc(
            np.repeat([0, 1], [len(inner), len(own[stage])]), np.r_[inner, own_gate.distance(own[stage])]
        )
        for family, own in ood_embedded.items()
    }
pd.DataFrame(by_stage).round(3)

# %% [markdown]
# One possible explanation for differences between stages is that a late stage keeps what triage needs, lesion or
# none, and discards the grain, the edges and the depth of a radiograph; this table does not test it. We chose the
# stage while looking at such pictures, so this table and the one above prove nothing about pictures of another kind,
# and a check in use will meet families that we did not think of.
#
# One more caveat. In a virtual cohort all training images come from one renderer and one donor, so they share a
# grain, which probably makes the separation easy. The check may well refuse most radiographs of real patients (we had
# none to try), and it should, as long as the networks behind it were trained on virtual radiographs alone. Fitted on
# radiographs from many devices, its limit would be wider and let more through.
#
# ## What the check lets through

# %% tags=["hide-input", "remove-output"]
passed = others[~others["pixels"] & (others["distance"] <= 1)]
nearest = passed.sort_values("distance").groupby("family", sort=False).head(2).head(10)
fig, axes = plt.subplots(2, 5, figsize=(8, 4.6))
for ax, own in zip(axes.flat, nearest.itertuples(), strict=False):
    picture = pictures[own.family][own.number]
    show_radiograph(ax, picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY))
    ax.set_title(f"{own.family}\n{own.distance:.2f} of the limit", fontsize=7)
for ax in axes.flat:
    ax.set_axis_off()
show_figure("c17-fig-passed", fig)
glue_values("c17", {"passed": len(passed), "unlike": len(others)})

# %% [markdown]
# ```{glue:figure} c17-fig-passed
# :name: fig:passed
# :alt: Pictures that no layer refused, at most two per family, with their distance.
# Pictures that no layer refused, at most two per family, the nearest first ({glue:text}`c17-passed` of all
# {glue:text}`c17-unlike` pictures passed).
# ```
#
# A check errs in both directions: {numref}`fig:passed` shows pictures that it wrongly accepts, and the fraction of
# refused radiographs above counts those that it wrongly refuses. So a user may override a refusal, and the report
# then states that this was done. Whoever reads a score must also look at the picture beside it, since an unsuitable
# picture that passes gets a score like any other.
#
# ## Paper beside ours
#
# | | paper | this run |
# |---|---|---|
# | rejection of outliers | "automated", no method given | three layers, each with its reason |
# | how many outliers are refused | not stated | by family, in the table above |
# | how many radiographs are refused | not stated | {glue:text}`c17-refused-test` |
#
# ## Exercises
#
# Change the chapter first: set `rejected = 0.1`. Which family is refused more often, and at what cost?
#
# ```{exercise}
# :label: ex:outliers-hand
# By hand: training embeddings have a standard deviation of 2 along the first axis and 0.5 along the second, about the
# origin. Which lies farther, $(3, 0)$ or $(0, 1)$?
# ```

# %% [markdown]
# ````{solution-start} ex:outliers-hand
# :class: dropdown
# ````
# $d = 3/2$ and $d = 1/0.5 = 2$: the second, although its plain distance is smaller.

# %%
points = np.random.default_rng(0).normal(size=(20_000, 2)) * [2, 0.5]
own = ood.fit_embedding_gate(points, points)
assert np.allclose(own.distance(np.array([[3.0, 0], [0, 1]])), [1.5, 2.0], rtol=0.03)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:outliers-probability
# In code: would the probability itself have been enough? Take ResNet50's probabilities for the pictures that its
# embedding refuses, and for the radiographs of the test split. How well does closeness to ½ separate the two?
# ```

# %% [markdown]
# ````{solution-start} ex:outliers-probability
# :class: dropdown
# ````

# %%
far = others[others["distance"] > 1]
squares = np.stack([network_input(pictures[own.family][own.number]) for own in far.itertuples()])
prob = networks.predict_probabilities(net, torch.from_numpy(squares)[:, None])
usual = networks.predict_probabilities(net, training.load_pixels(test["cached_path"], numbers.triage_px))
doubt = 0.5 - np.abs(np.r_[usual, prob] - 0.5)
area = classification.auroc(np.repeat([0, 1], [len(usual), len(prob)]), doubt)
print(f"AUROC of closeness to ½, {len(prob)} refused pictures against {len(usual)} radiographs: {area:.2f}")

# %% [markdown]
# At 1 the probability would separate the two perfectly, at ½ not at all, and below ½ OOD images get the more
# confident probabilities. The network was not trained for this question: its probability is divided between *normal*
# and *abnormal* and leaves no room for *neither*.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:outliers-question
# Question the method: a paper reports that its check refuses 99 % of outliers. What do you ask?
# ```
#
# ```{solution} ex:outliers-question
# :class: dropdown
# Which outliers, and whether those used to choose the method were among those used to evaluate it. How many true
# radiographs are refused at the same limit. Whether near misses were included, other body parts above all, or only
# photographs. And what the system shows to its users for the pictures that pass.
# ```
#
# ## Takeaways
#
# - Run the cheap checks first, and give the reason with the refusal.
# - A limit can be chosen from radiographs alone; only its evaluation needs OOD images.
# - Compare all stages of a network: the last one need not separate best.
# - A check reduces the number of meaningless scores. It does not make the others right.

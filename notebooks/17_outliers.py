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
# **You will be able to** build a guard before a network from three layers, each with a reason that a person understands, choose its limit
# without having seen a single wrong picture, and measure what it lets through.
#
# **You need** {ref}`chap:onnx` for the files, {ref}`chap:statistics` for intervals.
#
# **It takes** twenty minutes of reading, and about a minute to run: nothing is trained.
# :::
#
# A network answers whatever it is shown: for a holiday photograph, too, the vote comes out between 0 and 1. The paper's interface has an "automated outlier rejection" {cite}`dernet`
# and does not say how it works. Ours asks three questions, the cheap ones first.

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
rejected = 0.025  # share of training radiographs that may lie beyond the network's limit
each = 24  # pictures of each family

# %%
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import sklearn.datasets
import torch
import ultralytics
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydicom.data import get_testdata_file
from scipy.stats import binomtest

from dernet_utils.book.figures import show_figure, show_radiograph
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.imaging.enhance import preprocess
from dernet_utils.imaging.reader import decode_radiograph
from dernet_utils.inference import export, ood
from dernet_utils.metrics import classification, intervals
from dernet_utils.triage import networks, training
from dernet_utils.triage.crossvalidation import cross_validate, triage_images
from dernet_utils.virtual.donor import load_donor

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
images = triage_images(workspace)
train, test = (
    images[images["split"] == split].reset_index(drop=True) for split in ("train", "test")
)
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}
rng = np.random.default_rng(numbers.seed)


def file_of(film):
    """The bytes of a film's DICOM file."""
    return (
        Path(workspace.data_root) / f"{film.split}_images" / f"{film.image_id}.dicom"
    ).read_bytes()


# %% tags=["remove-cell"]
kind = "virtual radiographs" if numbers.virtual else "radiographs"
glue_values("c17", {
    "profile": numbers.name, "kind": kind, "train": len(train), "test": len(test), "each": each,
    "test-studies": test["study_id"].nunique(), "rejected": f"{rejected:.1%}",
    "network": "ResNet50",
})  # fmt: skip

# %% [markdown]
# ## Layer 1: the header
#
# A DICOM file says what it is. A modality that is not CR, DX or RG is none in which films of a spine come, and a body part that is named and is not of the spine is another one. A header that says nothing is not held
# against the picture: many are emptied when data are made anonymous. PNG and JPEG have none. The library that reads DICOM brings small files to test itself:

# %%
rows = {}
for name in ("CT_small.dcm", "MR_small.dcm", "J2K_pixelrep_mismatch.dcm"):
    data = Path(get_testdata_file(name, download=False)).read_bytes()
    radiograph = decode_radiograph(data)
    rows[name] = " ".join(reason.text for reason in ood.header_reasons(radiograph)) or "nothing"
sample = next(test.itertuples())
rows["a film of the test split"] = (
    " ".join(reason.text for reason in ood.header_reasons(decode_radiograph(file_of(sample)))) or "nothing"
)
assert rows["a film of the test split"] == "nothing"
pd.Series(rows, name="what the header says against it").to_frame()

# %% [markdown]
# ## Layer 2: the picture
#
# Eight numbers that a radiograph cannot have otherwise. For each a limit, set wide of all training films of the virtual cohort; a file beyond one is refused with that number as the reason. Of this run's {glue:text}`c17-train` training films
# {glue:text}`c17-beyond` lie beyond one.

# %%
facts = pd.DataFrame(
    [ood.picture_facts(decode_radiograph(data)) for data in map(file_of, train.itertuples())]
)
limits = pd.DataFrame(ood.LIMITS, index=["low", "high", "text"]).T
table = facts.agg(["min", "median", "max"]).T.join(limits[["low", "high"]])
beyond = ((facts < table["low"]) | (facts > table["high"])).any(axis=1).sum()
assert beyond == 0 or not numbers.virtual
glue_values("c17", {
    "beyond": int(beyond),
})
table.astype(float).round(3)

# %% [markdown]
# ## Layer 3: what the network sees
#
# A grey photograph passes both layers. But a network that has learnt from radiographs sees in it what it never saw in one. Take the means of its early maps, an embedding $e$, scale each number by its spread over the training films,
# and ask how far it lies from their middle, *in the spread that they have in that direction* {cite}`lee2018`:
#
# $$
# d(e)^2 = \sum_{k=1}^{m} \frac{(v_k^\top \tilde e)^2}{\lambda_k} + \frac{\lVert \tilde e \rVert^2 - \sum_k (v_k^\top \tilde e)^2}{\bar\lambda} ,
# $$ (eq:mahalanobis)
#
# with $\tilde e$ centred and scaled, $v_k$ and $\lambda_k$ the first {glue:text}`c17-dimensions` directions of the training films and their variances, and $\bar\lambda$ the mean variance of all that is left: Mahalanobis' distance, with
# one common variance where there are too few films to know each. By hand:

# %%
checkpoint = cross_validate(workspace, "resnet50").checkpoints[0]
net = training.load_network("resnet50", checkpoint)[0].eval()


def stages(pixels):
    """Means of the maps of each of ResNet50's stages, for films of shape (n, 1, px, px)."""
    parts = []
    with torch.no_grad():
        for part in pixels.split(16):
            maps = net.forward_intermediates(networks.as_input(part), intermediates_only=True)
            parts.append([own.mean(dim=(2, 3)).numpy() for own in maps])
    return [np.concatenate(own) for own in zip(*parts, strict=True)]


parts = {"learnt": train[train["fold"] != 0], "held": train[train["fold"] == 0], "test": test}
seen = {n: stages(training.load_pixels(own["cached_path"], numbers.triage_px)) for n, own in parts.items()}
learnt, held = seen["learnt"][export.EARLY], seen["held"][export.EARLY]
familiar = ood.fit_embedding_gate(learnt, held, rejected)

# %%
spread = learnt.std(axis=0)
e = (learnt - learnt.mean(axis=0)) / np.where(spread > 0, spread, 1)
variance, v = np.linalg.eigh(e.T @ e / (len(e) - 1))
variance, v = np.maximum(variance[::-1], 0), v[:, ::-1]
m = min(ood.DIMENSIONS, len(e) // 2, v.shape[1])
ridge = ood.RIDGE * variance[: min(e.shape)].mean()  # or a direction without spread rules
inside = (e @ v[:, :m]) ** 2
rest = (e**2).sum(axis=1) - inside.sum(axis=1)
mean_rest = variance[m:].sum() / max(v.shape[1] - m, 1) + ridge
glue_values("c17", {
    "dimensions": m,
})
d = np.sqrt((inside / (variance[:m] + ridge)).sum(axis=1) + rest / mean_rest)
assert np.allclose(d, familiar.distance(learnt), rtol=1e-2)

# %% [markdown]
# Films that the network learnt from lie nearer than others do, so the limit comes from fold 0, which neither this network nor the directions have seen: {glue:text}`c17-rejected` of its films may lie beyond. No outlier was needed.
#
# ## Outliers
#
# Nobody can list what will be uploaded. We take families, {glue:text}`c17-each` pictures each:


# %%
def as_png(picture):
    return cv2.imencode(".png", np.ascontiguousarray(picture))[1].tobytes()


def cut(picture, share):
    """A random part of a picture, with this share of its sides."""
    height, width = (int(side * share) for side in picture.shape[:2])
    y, x = (
        int(rng.integers(0, whole - part + 1))
        for whole, part in zip(picture.shape[:2], (height, width), strict=True)
    )
    return picture[y : y + height, x : x + width]


def stretched(values):
    """8-bit grey from the 1st to the 99.5th percentile."""
    low, high = np.quantile(values, [0.01, 0.995])
    return (255 * ((values - low) / max(high - low, 1e-9)).clip(0, 1)).astype(np.uint8)


assets = Path(ultralytics.__file__).parent / "assets"
photos = [
    cv2.cvtColor(own, cv2.COLOR_RGB2BGR) for own in sklearn.datasets.load_sample_images().images
]
photos += [cv2.imread(str(path)) for path in sorted(assets.glob("*.jpg"))]
photos = [cv2.resize(own, None, fx=900 / max(own.shape), fy=900 / max(own.shape)) for own in photos]
made = {
    "photographs": [cut(photos[k % len(photos)], rng.uniform(0.5, 1)) for k in range(each)],
}
made["photographs, grey"] = [cv2.cvtColor(own, cv2.COLOR_BGR2GRAY) for own in made["photographs"]]

# %% [markdown]
# *Other modalities.* Slices through the donor's CT, in three directions, the nearest that we could think of: it is the very body that the virtual radiographs show. The same slices with the greys of a magnetic resonance image, where fat is
# bright and hard bone is dark; and speckle in a fan, as ultrasound has it.


# %%
def slices(volume):
    """Slices through a volume, in turn across, from the front, and from the side, enlarged."""
    made_slices = []
    for k in range(each):
        axis = k % 3
        place = int(volume.shape[axis] * rng.uniform(0.2, 0.8))
        one = stretched(np.take(volume, place, axis=axis))
        made_slices.append(cv2.resize(one, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC))
    return made_slices


donor = load_donor()
density = donor.density[::-1, ::-1].astype(np.float32)
made["CT"] = slices(density)
known = np.array([0, 200, 850, 940, 1000, 1060, 1150, 1300, 1800, 3500])
glow = np.array([0.0, 0.05, 0.5, 1.0, 0.3, 0.45, 0.75, 0.6, 0.1, 0.0])
made["MR (virtual)"] = slices(np.interp(density, known, glow))


def ultrasound():
    """Speckle in a fan, darker with depth."""
    y, x = np.mgrid[0:1:500j, -0.8:0.8:640j]
    depth, angle = np.hypot(y + 0.2, x), np.arctan2(x, y + 0.2)
    tissue = cv2.GaussianBlur(rng.normal(size=y.shape), (0, 0), rng.uniform(8, 30))
    speckle = cv2.GaussianBlur(rng.rayleigh(size=y.shape), (0, 0), 1.5)
    image = speckle * np.exp(2 * tissue / tissue.std() * 0.3) * np.exp(-1.2 * depth)
    return stretched(image * ((np.abs(angle) < 0.6) & (depth < 1.1) & (depth > 0.25)))


made["ultrasound (virtual)"] = [ultrasound() for _ in range(each)]

# %% [markdown]
# *Other body parts*, drawn as rods and shells and exposed like a film. *Noise*, from fine to coarse. *Screens*: a page of text, and a viewer with a radiograph in it.


# %%
def hand():
    """Four rows of bones for each of five fingers, as rods of random lengths."""
    thick = np.zeros((700, 520))
    for finger in range(5):
        angle = np.deg2rad(-30 + 15 * finger + rng.normal(0, 3))
        x, y = 260 + 150 * np.sin(angle), 560 - 60 * np.cos(angle)
        for length in np.array([150, 95, 60, 45]) * rng.uniform(0.85, 1.1):
            end = x + length * np.sin(angle), y - length * np.cos(angle)
            rod = np.zeros(thick.shape, np.uint8)
            cv2.line(rod, (int(x), int(y)), (int(end[0]), int(end[1])), 1, int(rng.uniform(14, 24)))
            thick += np.sqrt(cv2.distanceTransform(rod, cv2.DIST_L2, 3))
            x, y = end[0] + 8 * np.sin(angle), end[1] - 8 * np.cos(angle)
    flesh = cv2.GaussianBlur(
        cv2.dilate((thick > 0).astype(np.float64), np.ones((45, 45))), (0, 0), 9
    )
    return 0.5 * flesh + 0.25 * thick


def shell():
    """A skull: what two ellipsoids leave between them, and two holes."""
    y, x = np.mgrid[-1.2:1.2:640j, -1.0:1.0:520j]
    x, y = x + rng.normal(0, 0.05), y + rng.normal(0, 0.05)
    outer, inner = (
        np.sqrt((1 - (x / a) ** 2 - (y / b) ** 2).clip(0)) for a, b in ((0.75, 0.95), (0.69, 0.89))
    )
    holes = sum(np.exp(-((x - s) ** 2 + (y - 0.25) ** 2) / 0.02) for s in (-0.28, 0.28))
    return 2.2 * (outer - inner) + 0.7 * inner - 0.35 * holes


def exposed(thick):
    """A film of what is thick: blurred, noisy, bone bright."""
    signal = cv2.GaussianBlur(np.exp(-thick), (0, 0), 1.2) * 3000
    return stretched(-np.log(rng.poisson(signal + 20) / 3000))


made["other body parts (virtual)"] = [exposed(hand() if k % 2 else shell()) for k in range(each)]
made["noise"] = [
    stretched(cv2.GaussianBlur(rng.normal(size=(600, 400)), (0, 0), 0.3 + 1.5 ** (k % 8)))
    for k in range(each)
]


# %%
def screen(film):
    """A viewer's window with a film in it, or a page of text."""
    fig = Figure((6, 5), dpi=110, layout="none")
    fig.set_facecolor("white" if film is None else "#2b2b2b")
    if film is None:
        fig.text(
            0.08,
            0.95,
            "\n".join(" ".join(rng.choice(WORDS, 11)) for _ in range(24)),
            va="top",
            fontsize=9,
        )
    else:
        long = 460 / film.shape[0]
        fig.figimage(cv2.resize(film, None, fx=long, fy=long), 250, 30, cmap="gray")
        fig.text(0.02, 0.95, "File  Edit  View  Tools", color="white", fontsize=10)
        for row in range(6):
            fig.text(
                0.03, 0.82 - 0.1 * row, f"Series {row + 1}", color="w", backgroundcolor="#31659c"
            )
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 2::-1]


WORDS = [
    "the", "film", "shows", "a", "spine", "of", "five", "bodies", "with", "narrow", "space", "below",
]  # fmt: skip
films = [decode_radiograph(file_of(film)).pixels for film in test.itertuples()]
made["screens"] = [screen(None if k % 2 else films[k % len(films)]) for k in range(each)]
made["screens, grey"] = [
    cv2.cvtColor(np.ascontiguousarray(own), cv2.COLOR_BGR2GRAY) for own in made["screens"]
]

# %% [markdown]
# Last, *radiographs of the test split, mistreated*: turned by 90° and by 180°, shown as a negative, or cropped to half and a quarter of their sides. Whether these should be refused is a
# question of taste; what happens to them is not.

# %%
some = [films[k] for k in rng.permutation(len(films))[:each]]
made |= {
    "turned by 90°": [np.rot90(own) for own in some], "turned by 180°": [np.rot90(own, 2) for own in some],
    "negative": [255 - own for own in some], "half of it": [cut(own, 0.5) for own in some],
    "a quarter of it": [cut(own, 0.25) for own in some],
}  # fmt: skip


def small(picture):
    """A picture as the network takes it: decoded, enhanced, squared."""
    grey = decode_radiograph(as_png(picture)).pixels
    enhanced = preprocess(grey, numbers.cache_px, numbers.clip_limit, numbers.tiles)
    return cv2.resize(enhanced, (numbers.triage_px,) * 2, interpolation=cv2.INTER_AREA)


def against(data):
    """Whether header or picture speaks against a file."""
    radiograph = decode_radiograph(data)
    facts = ood.picture_facts(radiograph)
    return bool(ood.header_reasons(radiograph)), bool(ood.picture_reasons(facts))


# %%
shown = {
    family: stages(torch.from_numpy(np.stack([small(own) for own in pictures]))[:, None])
    for family, pictures in made.items()
}
judged = pd.DataFrame(map(against, map(file_of, test.itertuples())), columns=["header", "picture"])
judged["distance"] = familiar.distance(seen["test"][export.EARLY]) / familiar.limit
wrong = pd.concat([
    pd.DataFrame({
        "family": family, "number": range(len(pictures)),
        "picture": [against(as_png(own))[1] for own in pictures],
        "distance": familiar.distance(shown[family][export.EARLY]) / familiar.limit,
    })
    for family, pictures in made.items()
], ignore_index=True)  # fmt: skip

# %% tags=["hide-input", "remove-output"]
families = list(made)
fig, axes = plt.subplots(3, 5, figsize=(8, 6))
for ax, family in zip(axes.flat, families, strict=False):
    picture = made[family][0]
    ax.imshow(picture[..., ::-1] if picture.ndim == 3 else picture, cmap="gray")
    ax.set_title(family, fontsize=7)
for ax in axes.flat:
    ax.set_axis_off()
show_figure("c17-fig-families", fig)

# %% [markdown]
# ```{glue:figure} c17-fig-families
# :name: fig:families
# :alt: One picture of each family of outliers, from photographs to a quarter of a radiograph.
# One of each family. Photographs: scikit-learn's and ultralytics' own samples. Radiographs in the lower rows: {glue:text}`c17-kind`.
# ```
#
# ## What is refused

# %%
study = test["study_id"].to_numpy()


def share_of(refused):
    """A share with its exact binomial interval."""
    ends = binomtest(int(refused.sum()), len(refused)).proportion_ci()
    return f"{refused.mean():.2f} [{ends.low:.2f}, {ends.high:.2f}]"


refused_test = judged["header"] | judged["picture"] | (judged["distance"] > 1)
beyond_all = judged["header"] | judged["picture"]  # whatever the network sees
test_distance = judged["distance"].where(~beyond_all, np.inf)
at_95 = np.quantile(test_distance, 0.95, method="lower")  # where 95 % of the radiographs pass
rows = {}
for family, own in wrong.groupby("family", sort=False):
    far, picture = own["distance"] > 1, own["picture"]
    distance = own["distance"].where(~picture, np.inf)
    label = np.r_[np.zeros(len(judged)), np.ones(len(own))]
    both = np.r_[test_distance, distance]
    rows[family] = {
        "by the picture": picture.mean(), "by the network": far.mean(),
        "by either": share_of(far | picture),
        "AUROC": classification.auroc(label, np.minimum(both, 1e6)), "passes at 95 %": (distance <= at_95).mean(),
    }  # fmt: skip
refusals = pd.DataFrame(rows).T
refusals.astype(dict.fromkeys(refusals.columns.drop("by either"), float)).round(2)

# %% tags=["remove-cell"]
must = [f for f in families[:9] if "body" not in f]
most = max(rows[family]["passes at 95 %"] for family in must)
worst = " and ".join(family for family in must if rows[family]["passes at 95 %"] == most)
gone = refused_test.to_numpy(float)
by_study = intervals.bootstrap(lambda w: w @ gone / w.sum(axis=1), study, **draws)
glue_values("c17", {
    "refused-test": f"{by_study:.3f}",
})
told = f"{most:.1%} of {worst} would pass, the most" if most else "none would pass"
glue_values("c17", {
    "worst": told,
})

# %% [markdown]
# Each row is of up to {glue:text}`c17-each` pictures; the interval is the binomial one, and knows nothing of pictures that are not here: the photographs are crops of four, the slices of one body. *Passes at 95 %* is the share that would pass if
# the limit let 95 % of the test split's radiographs pass, all layers together. Of the families that no one would call a radiograph {glue:text}`c17-worst`.
# Of the {glue:text}`c17-test` {glue:text}`c17-kind` of the test split ({glue:text}`c17-test-studies` studies) {glue:text}`c17-refused-test` are refused (95 % by study).

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(8, 4))
places = ["test split", *families]
for row, name in enumerate(places):
    values = (
        judged["distance"]
        if name == "test split"
        else wrong.loc[wrong["family"] == name, "distance"]
    )
    jitter = np.random.default_rng(row).uniform(-0.25, 0.25, len(values))
    ax.plot(values, row + jitter, ".", ms=4, alpha=0.5, color="#1F5FA8" if row == 0 else "0.35")
ax.axvline(1, color="#B5442E", ls="--", label="limit, from fold 0")
ax.set(xscale="log", yticks=range(len(places)), yticklabels=places, xlabel="distance over limit")
ax.invert_yaxis()
ax.legend(fontsize=8)
show_figure("c17-fig-distances", fig)

# %% [markdown]
# ```{glue:figure} c17-fig-distances
# :name: fig:distances
# :alt: Distances from the training films in rows, for the test split and each family of outliers, with the limit as a dashed line.
# How far each picture lies from what {glue:text}`c17-network` learnt from, over the limit. Blue: {glue:text}`c17-test` {glue:text}`c17-kind` of the test split; profile {glue:text}`c17-profile`.
# ```
#
# ## Which layer of a network knows
#
# The embedding is of an *early* stage. That was not our first idea: the last maps carry what the network has learnt, and most methods take them. Here is every stage of ResNet50 on the same pictures, AUROC of test radiographs against
# each family:

# %%
by_stage = {}
for stage in range(len(seen["test"])):
    one = ood.fit_embedding_gate(seen["learnt"][stage], seen["held"][stage], rejected)
    inner = one.distance(seen["test"][stage])
    by_stage[f"stage {stage}"] = {
        family: classification.auroc(
            np.repeat([0, 1], [len(inner), len(own[stage])]),
            np.r_[inner, one.distance(own[stage])],
        )
        for family, own in shown.items()
    }
pd.DataFrame(by_stage).round(3)

# %% [markdown]
# A late stage has kept less of what a film is like. That it keeps what triage needs, lesion or none, and lets go the grain, the edges and the depth of a radiograph, is one explanation, which this table does not test. The stage was chosen while such pictures were looked at, so this table
# and the one above are no proof for pictures of another kind; a family that nobody thought of is the one that will come.
#
# One thing more. In a virtual cohort the guard separates so well because all training films come from one renderer and one donor: they share a grain. It may well refuse most radiographs of any patient (none was here to try), and it
# should, as long as the networks behind it have learnt from virtual films alone. Fitted on radiographs of many devices it would be wider, and let more through.
#
# ## What slips through

# %% tags=["hide-input", "remove-output"]
passed = wrong[~wrong["picture"] & (wrong["distance"] <= 1)]
nearest = passed.sort_values("distance").groupby("family", sort=False).head(2).head(10)
fig, axes = plt.subplots(2, 5, figsize=(8, 4.6))
for ax, own in zip(axes.flat, nearest.itertuples(), strict=False):
    picture = made[own.family][own.number]
    show_radiograph(ax, picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY))
    ax.set_title(f"{own.family}\n{own.distance:.2f} of the limit", fontsize=7)
for ax in axes.flat:
    ax.set_axis_off()
show_figure("c17-fig-passed", fig)

# %% tags=["remove-cell"]
glue_values("c17", {
    "passed": len(passed),
    "wrong": len(wrong),
})

# %% [markdown]
# ```{glue:figure} c17-fig-passed
# :name: fig:passed
# :alt: Pictures that no layer refused, at most two of a family, with their distance.
# What no layer refused, the nearest of each family first ({glue:text}`c17-passed` of all {glue:text}`c17-wrong` pictures).
# ```
#
# A guard errs in both directions: {numref}`fig:passed` shows what it lets through, the share of radiographs above what it refuses. So a person who knows better may override a refusal, and then the report says that this was done. Whoever is
# shown a score has to look at the picture beside it, since what slips through gets a score like any other.
#
# ## Paper beside ours
#
# | | paper | this run |
# |---|---|---|
# | rejection of outliers | "automated", no method given | three layers, each with its reason |
# | how many outliers are refused | not said | by family, in the table above |
# | how many radiographs are refused | not said | {glue:text}`c17-refused-test` |
#
# ## Exercises
#
# Change the chapter first: set `rejected = 0.1`. Which family gains, and what does it cost?
#
# ```{exercise}
# :label: ex:outliers-hand
# By hand: training embeddings have a spread of 2 along the first axis and 0.5 along the second, about the origin. Which lies farther, $(3, 0)$ or $(0, 1)$?
# ```

# %% [markdown]
# ````{solution-start} ex:outliers-hand
# :class: dropdown
# ````
# $d = 3/2$ and $d = 1/0.5 = 2$: the second, though it is nearer to the eye.

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
# In code: would the probability itself have told? Take ResNet50's answers for the outliers that the network refuses, and for the radiographs of the test split. How well does it tell one from the other that an answer lies far from ½?
# ```

# %% [markdown]
# ````{solution-start} ex:outliers-probability
# :class: dropdown
# ````

# %%
refused = wrong[wrong["distance"] > 1]
squares = np.stack([small(made[own.family][own.number]) for own in refused.itertuples()])
prob = networks.predict_probabilities(net, torch.from_numpy(squares)[:, None])
usual = networks.predict_probabilities(net, training.load_pixels(test["cached_path"], numbers.triage_px))
doubt = 0.5 - np.abs(np.r_[usual, prob] - 0.5)
area = classification.auroc(np.repeat([0, 1], [len(usual), len(prob)]), doubt)
print(f"AUROC of doubt, {len(prob)} refused pictures against {len(usual)} radiographs: {area:.2f}")

# %% [markdown]
# At 1 the doubt would have told as well as the distance does, at ½ it tells nothing, and below that outliers get the surer answers. It was not made for this question: a probability is a share among two answers, *normal* and
# *abnormal*, and has no place for *neither*.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:outliers-question
# Question the method: a paper reports that its guard refuses 99 % of outliers. What do you ask?
# ```
#
# ```{solution} ex:outliers-question
# :class: dropdown
# Which outliers, and whether those that chose the method were among those that judged it. How many true radiographs are refused at the same limit. Whether near misses were in it, other
# body parts above all, or only photographs. And what the system shows for the rest, to whom.
# ```
#
# ## What to take along
#
# - Ask the cheap questions first, and give the reason with the refusal.
# - A limit can be chosen from radiographs alone; only its worth needs outliers.
# - Ask every stage of a network: here the early maps knew best what a film is like.
# - A guard lowers the number of nonsense answers. It does not make the rest right.

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
# (chap:data)=
# # 01 · The data: radiographs of the spine
#
# Before a network is trained, somebody should look at the films. This chapter opens a dataset in
# the form of VinDr-SpineXR {cite}`nguyen2021,pham2021`, reads its tables, checks them, and shows
# one example of each of the seven lesion types. Three numbers found here return in every later
# chapter: how rare the rare lesions are, how small the small ones are, and how many films
# belong to one person.
#
# ```{admonition} In this chapter
# :class: tip
# **You will be able to** read a VinDr-SpineXR folder into checked tables; say what a study, a
# series and an image are and why it matters; measure class imbalance and lesion size, with an
# interval that respects studies.
#
# **You need** Python with `pandas`. No network is trained here.
#
# **It takes** half an hour to read, and less than a minute to run on a laptop.
# ```

# %% tags=["parameters"]
profile = ""  # smoke, laptop or paper; empty: DERNET_PROFILE, else laptop
small_share = 0.01  # a small lesion covers less than this share of the film; paper, section 3.3

# %% [markdown]
# The set-up opens the run's workspace. At the profiles `smoke` and `laptop` the dataset is the
# virtual cohort, which is made here if it is missing; at `paper` it is the folder that the
# environment variable `DERNET_DATA` names. Nothing below knows the difference.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from dernet_utils.book.figures import show_boxes, show_figure, show_radiograph
from dernet_utils.book.paper import PUBLISHED_BOXES
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.vocabulary import LESION_TYPES, PAPER_CODES
from dernet_utils.dataset.check import check_dataset
from dernet_utils.dataset.tables import read_dataset
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.metrics.intervals import bootstrap_by_study

# %%
workspace = open_chapter(profile)
root = workspace.data_root
kind = "virtual radiographs" if workspace.profile.virtual else "radiographs"

# %% tags=["remove-cell"]
glue_values("c01", {
    "kind": kind,
    "profile": workspace.profile.name,
})

# %% [markdown]
# ## What lies on disk
#
# VinDr-SpineXR is two folders of DICOM files and two tables. A file is named by its image's
# identifier, 32 hexadecimal digits, and nothing about a person can be read from it. We count what
# is there.

# %%
for folder in ("train_images", "test_images", "annotations"):
    files = sorted((root / folder).iterdir())
    print(f"{folder:13} {len(files):5} files, such as {files[0].name}")

# %% [markdown]
# The tables have nine columns. One row is one box that a radiologist drew; an image without a
# finding has one row that says so and leaves the corners empty.

# %%
raw = pd.read_csv(root / "annotations" / "train.csv")
assert raw.columns.size == 9
raw[["image_id", "rad_id", "lesion_type", "xmin", "ymin", "xmax", "ymax"]].head(6)

# %% [markdown]
# The corners are pixels of the *stored* image with the origin at its top left: $x$ runs to the
# right, $y$ runs down. `Spondylolysthesis` is the dataset's own spelling, and we keep it, for it
# is a key into the files and not a word of ours.
#
# ## Trust, but check
#
# Tables written by people have errors: a box of no width, a box that leaves its image, a file that
# was cut off in a transfer. `check_dataset` reads everything once and lists each problem with
# its file and row. On the command line it is `dernet check`.

# %%
report = check_dataset(root)
print(f"{len(report.problems)} problems")
for problem in report.problems[:5]:
    print(problem.file, problem.row, problem.message)

# %% [markdown]
# `read_dataset` is strict: it gives tables only if they are sound, and otherwise says what is wrong
# and how to repair a copy. It returns one table of images and one of boxes.

# %%
dataset = read_dataset(root)
images, boxes = dataset.images, dataset.boxes
assert images.image_id.is_unique
assert set(boxes.image_id) == set(images.image_id[images.abnormal])

# %% [markdown]
# ## People, studies, images
#
# A *study* is one visit of one person to the X-ray room. It holds one or more *series*, and these
# hold the images: the spine from the side (lateral), from the front (anteroposterior, AP), and in
# some studies from between the two (oblique). All show the same bones on the same day. To a
# statistician they are one observation.

# %%
per_split = images.groupby("split", sort=False)
summary = pd.DataFrame(
    {
        "studies": per_split.study_id.nunique(),
        "images": per_split.size(),
        "with a finding": per_split.abnormal.sum(),
        "without": per_split.size() - per_split.abnormal.sum(),
    }
)
summary

# %% [markdown]
# The two splits must not share a study: a network could otherwise meet the same person in
# training and in the test. This is the first thing to assert about any medical dataset, and
# {ref}`chap:protocol` measures what goes wrong without it.

# %%
studies = {split: set(group.study_id) for split, group in per_split}
assert not studies["train"] & studies["test"]
per_study = images.groupby("study_id").size()
print(per_study.value_counts().rename_axis("images a study").to_frame("studies"))

# %% tags=["remove-cell"]
glue_values("c01", {
    "n-images": len(images),
    "n-studies": images.study_id.nunique(),
    "n-boxes": len(boxes),
    "abnormal": f"{100 * images.abnormal.mean():.0f} %",
})

# %% [markdown]
# This run has {glue:text}`c01-n-images` {glue:text}`c01-kind` of {glue:text}`c01-n-studies`
# studies; {glue:text}`c01-abnormal` of the images show a finding, and {glue:text}`c01-n-boxes`
# boxes say where.
#
# ## Seven types of lesion
#
# The paper's Fig. 1 shows an example of each type and one normal film. Its counterpart here takes,
# of each type, the training box whose area is the median of its type: neither the largest that
# could be found nor the smallest. The test split is not looked at.

# %%
train = boxes[boxes.split == "train"].copy()
train["area_px"] = (train.xmax - train.xmin) * (train.ymax - train.ymin)
ranked = train.sort_values("area_px")
typical = {name: rows.iloc[len(rows) // 2] for name, rows in ranked.groupby("lesion_type")}
assert set(typical) <= set(LESION_TYPES)

# %% tags=["hide-input", "remove-output"]
ORDER = [  # the paper's Fig. 1, (a) to (g)
    "Vertebral collapse", "Osteophytes", "Spondylolysthesis", "Surgical implant",
    "Disc space narrowing", "Foraminal stenosis", "Other lesions",
]  # fmt: skip
path_of = images.set_index("image_id")["dicom_path"]


def draw_crop(ax: plt.Axes, box: pd.Series, title: str) -> None:
    """Draw the surroundings of a box: a square three times its longer side, at least."""
    grey = read_radiograph(path_of[box.image_id]).pixels
    side = max(3.0 * max(box.xmax - box.xmin, box.ymax - box.ymin), 0.3 * grey.shape[0])
    side = min(side, *grey.shape)
    x, y = (
        np.clip((low + high) / 2 - side / 2, 0, limit - side)
        for low, high, limit in (
            (box.xmin, box.xmax, grey.shape[1]),
            (box.ymin, box.ymax, grey.shape[0]),
        )
    )
    show_radiograph(ax, grey, title)
    show_boxes(ax, box.to_frame().T, names=False)
    ax.set(xlim=(x, x + side), ylim=(y + side, y))


fig, axes = plt.subplots(2, 4, figsize=(10, 5.6))
for ax, name, letter in zip(axes.flat, ORDER, "abcdefg", strict=False):
    if name in typical:
        draw_crop(ax, typical[name], f"({letter}) {name}")
    else:
        ax.set_title(f"({letter}) {name}: none here")
        ax.set_axis_off()
normal = images[(images.split == "train") & ~images.abnormal].iloc[0]
grey = read_radiograph(normal.dicom_path).pixels
side = min(grey.shape)
show_radiograph(axes.flat[-1], grey, "(h) Normal")
axes.flat[-1].set(xlim=(0, side), ylim=(grey.shape[0] / 2 + side / 2, grey.shape[0] / 2 - side / 2))
show_figure("c01-fig-examples", fig)

# %% [markdown]
# ```{glue:figure} c01-fig-examples
# :name: fig:examples
# :alt: Eight square crops of spine films, seven with a box round a lesion and one normal.
#
# One example of each lesion type, the counterpart of the paper's Fig. 1. Each panel is the box of
# median area among the training boxes of its type, on a crop of its film as decoded, before any
# enhancement. {glue:text}`c01-kind`, profile {glue:text}`c01-profile`.
# ```
#
# Some of {numref}`fig:examples` is plain to see: metal is white and has straight edges. Some is
# not: a narrowed disc is a distance that is too short, a slipped vertebra is a line that does not
# go on. A radiologist sees these by comparing with the neighbours, and this is what a network has
# to learn too.
#
# Whole films show how the findings of one person go together.

# %% tags=["hide-input", "remove-output"]
burden = images[images.split == "train"].sort_values(["boxes", "image_id"], ascending=[False, True])
few = pd.concat([burden[burden.boxes > 0].iloc[:: max(1, int((burden.boxes > 0).sum()) // 4)]])[:4]
fig, axes = plt.subplots(1, 4, figsize=(11, 4.6))
for ax, row in zip(axes, few.itertuples(), strict=False):
    show_radiograph(ax, read_radiograph(row.dicom_path).pixels, f"{row.boxes} boxes")
    show_boxes(ax, boxes[boxes.image_id == row.image_id])
show_figure("c01-fig-films", fig)

# %% [markdown]
# ```{glue:figure} c01-fig-films
# :name: fig:films
# :alt: Four whole spine films with coloured boxes round their lesions.
#
# Four training films, from the one with most boxes to one with few, as decoded.
# {glue:text}`c01-kind`, profile {glue:text}`c01-profile`.
# ```
#
# ## How uneven the types are
#
# Let $n_c$ be the number of boxes of class $c$ in the training split. The paper reports the ratio
# of the most to the least frequent class,
#
# $$
# r = \frac{\max_c n_c}{\min_c n_c},
# $$ (eq:imbalance)
#
# and finds 46.9 : 1. Its two ends are osteophytes and vertebral collapse. Among the published
# counts there is a still smaller one, of other lesions; the training file folds rarer types into
# it, so that its final number is larger. We compute {eq}`eq:imbalance` for this run.

# %%
n_c = train.lesion_type.value_counts().reindex(list(LESION_TYPES), fill_value=0)
r = n_c.max() / n_c[n_c > 0].min()  # of the types that occur
assert r >= 1 and n_c.sum() == len(train)
glue_values("c01", {
    "ratio": f"{r:.1f}",
})
rarest = n_c[n_c > 0].idxmin()
glue_values("c01", {
    "rarest": rarest,
})
print(f"r = {r:.1f} : 1, from {n_c.idxmax()} ({n_c.max()}) to {rarest} ({n_c[rarest]})")

# %% [markdown]
# The published numbers of the real training split stand beside ours, each under the name of its
# dataset. Numbers of two datasets are compared, never added.

# %%
PUBLISHED = dict(zip(LESION_TYPES, PUBLISHED_BOXES, strict=True))
published = pd.Series(PUBLISHED)
table = pd.DataFrame(
    {
        "paper's code": pd.Series(PAPER_CODES),
        "VinDr-SpineXR, boxes": published,
        "VinDr-SpineXR, share": (100 * published / published.sum()).map("{:.1f} %".format),
        "this run, boxes": n_c,
        "this run, share": (100 * n_c / n_c.sum()).map("{:.1f} %".format),
    }
)
table

# %% tags=["hide-input", "remove-output"]
shares = pd.DataFrame({"VinDr-SpineXR": published / published.sum(), "this run": n_c / n_c.sum()})
shares = shares.loc[published.sort_values().index] * 100
fig, ax = plt.subplots(figsize=(7.5, 3.8))
shares.plot.barh(ax=ax, color=["#999999", "#0072B2"], hatch="", width=0.75)
for bars, hatch in zip(ax.containers, ("//", ""), strict=True):
    for bar in bars:
        bar.set_hatch(hatch)
ax.set(xscale="log", xlabel="share of training boxes, % (logarithmic)", ylabel="")
ax.legend(loc="lower right")
show_figure("c01-fig-imbalance", fig)

# %% [markdown]
# ```{glue:figure} c01-fig-imbalance
# :name: fig:imbalance
# :alt: Bars of the share of each lesion type in the real training split and in this run, on a logarithmic axis.
#
# Share of each lesion type among the training boxes, as published for VinDr-SpineXR and in this
# run's {glue:text}`c01-kind`, profile {glue:text}`c01-profile`.
# ```
#
# In this run the ratio is {glue:text}`c01-ratio` : 1, and the rarest type is
# {glue:text}`c01-rarest`. A ratio of two counts, one of them small, is a shaky number: how shaky,
# is an exercise below. What it does to training is plain without an interval. A detector that
# never names a rare type loses little on average. Later chapters therefore report every class by
# itself, and their mean gives each class the same weight.
#
# ## How small the lesions are
#
# The paper calls a lesion small when it covers less than 1 % of the field of view. The relative
# area of a box is $a = (x_{max} - x_{min})(y_{max} - y_{min}) / (W H)$, with $W$ and $H$ the width
# and height of its film in pixels.

# %%
size_of = {row.image_id: read_radiograph(row.dicom_path).pixels.shape for row in images.itertuples()}
film_px = train.image_id.map({key: height * width for key, (height, width) in size_of.items()})
train["a"] = train.area_px / film_px
assert train.a.between(0, 1, inclusive="neither").all()
print(f"median relative area {100 * train.a.median():.2f} %")

# %% [markdown]
# The share of small lesions is a number about a sample, so it comes with a 95 % interval. Boxes of
# one study are alike, and so whole studies are resampled, with everything in them
# {cite}`efron1993`.

# %%
is_small = (train.a < small_share).to_numpy()
share = bootstrap_by_study(
    lambda rows: is_small[rows].mean(), train.study_id.to_numpy(), workspace.profile.bootstrap
)
glue_values("c01", {
    "small": f"{share:.2f}",
    "median-area": f"{100 * train.a.median():.2f} %",
})
print(f"share of small boxes: {share:.2f}")

# %% tags=["hide-input", "remove-output"]
order = train.groupby("lesion_type").a.median().sort_values().index
fig, ax = plt.subplots(figsize=(7.5, 4))
sns.stripplot(
    data=train.assign(a=100 * train.a), x="a", y="lesion_type", order=order, ax=ax, color="#0072B2",
    size=3, alpha=0.5, jitter=0.25, log_scale=True,
)  # fmt: skip
ax.axvline(100 * small_share, color="black", ls="--", lw=1.2)
ax.annotate(
    "small", (100 * small_share, -0.42), ha="right", xytext=(-5, 0), textcoords="offset points"
)
ax.set(xlabel="box area, % of the film (logarithmic)", ylabel="")
show_figure("c01-fig-sizes", fig)

# %% [markdown]
# ```{glue:figure} c01-fig-sizes
# :name: fig:sizes
# :alt: A dot for each training box, by lesion type, along a logarithmic axis of relative area; a dashed line marks one per cent.
#
# Relative area of every training box. Left of the dashed line is the paper's small-object regime.
# {glue:text}`c01-n-boxes` boxes in both splits, of which the training boxes are drawn;
# {glue:text}`c01-kind`, profile {glue:text}`c01-profile`.
# ```
#
# The median box covers {glue:text}`c01-median-area` of its film, and the share of small boxes is
# {glue:text}`c01-small` (95 % interval, resampled by study). Resized to the 640 pixels of the paper's
# detector, a box of 1 % is about 64 pixels wide; shrunk to the few hundred pixels of a laptop run,
# the smallest osteophytes have a handful of pixels left. Remember this when {ref}`chap:yolo11-training`
# reports what was missed.
#
# ## What goes with what
#
# Degeneration is one process with several faces: a disc that loses height, spurs at its margins,
# a foramen that closes behind it. We count in how many training images two types occur together.

# %%
present = pd.crosstab(train.image_id, train.lesion_type).reindex(columns=list(LESION_TYPES)) > 0
together = present.astype(int).T @ present.astype(int)
assert (np.diag(together) == present.sum()).all()
together.index.name = together.columns.name = None

# %% tags=["hide-input", "remove-output"]
given = together.div(np.diag(together).clip(min=1), axis=0)
fig, ax = plt.subplots(figsize=(7, 5))
sns.heatmap(given, annot=together, fmt="d", cmap="Blues", vmin=0, vmax=1, ax=ax,
            cbar_kws={"label": "share of the row's images"})  # fmt: skip
ax.tick_params(axis="x", rotation=40)
plt.setp(ax.get_xticklabels(), ha="right")
show_figure("c01-fig-together", fig)

# %% [markdown]
# ```{glue:figure} c01-fig-together
# :name: fig:together
# :alt: A seven by seven table of lesion types; darker cells are types that often occur in the same image.
#
# Images in which two types occur together. The number is the count; the shade is the share among the
# images that have the type of the row. Training split, {glue:text}`c01-kind`, profile
# {glue:text}`c01-profile`.
# ```
#
# The column of osteophytes is dark: whatever else a film shows, it mostly shows spurs as well. A
# triage network may therefore do well on rare lesions without ever having learnt them, by finding
# their common companion.
#
# ## How the files differ
#
# Files from several machines differ in ways that no eye sees once they are displayed: how many
# bits, which compression, whether white is the largest number or the smallest. The check of the
# dataset has counted them already.

# %%
facts = report.fingerprint["train"]
technical = {key: value for key, value in facts.items() if isinstance(value, dict)}
for key in ("transfer_syntaxes", "photometric_interpretations", "bits_stored"):
    print(f"{key}: {technical[key]}")

# %% [markdown]
# Each of these must end in the same picture. That is the business of {ref}`chap:imaging`.
#
# ## Paper beside ours

# %%
first = images[images.split == "train"]
ours = {
    "studies": f"{images.study_id.nunique():,}",
    "images": f"{len(images):,}",
    "images with a finding, training": f"{first.abnormal.sum():,} ({first.abnormal.mean():.1%})",
    "images a study, training": f"{len(first) / first.study_id.nunique():.2f}",
    "boxes an image with a finding, training": f"{len(train) / first.abnormal.sum():.2f}",
    "imbalance": f"{r:.1f} : 1",
}
n_published = published.sum()
theirs = ["5,000", "10,467", f"4,129 ({4129 / 8389:.1%})", f"{8389 / 4000:.2f}",
          f"{n_published / 4129:.2f}", "46.9 : 1"]  # fmt: skip
pd.DataFrame(
    {"paper and dataset (VinDr-SpineXR)": theirs, f"this run ({kind})": ours.values()}, index=ours
)

# %% [markdown]
# The paper writes of $N = 8{,}389$ radiographs where it describes the data, and of $N = 2{,}078$
# where it describes the evaluation: the first is the training split, the second the test split.
#
# ```{admonition} What virtual means here
# :class: warning
# At the profiles `smoke` and `laptop` every film of this book is computed from one donor's CT scan,
# deformed into many bodies, with lesions put into its spine. The films are not evidence about
# people. They let every line of the method be run and judged. {ref}`chap:virtual-radiographs` shows
# how they are made, the {doc}`../book/data_card` what they cannot stand for.
# ```
#
# ## Exercises
#
# ```{exercise} The ratio's two ends
# :label: ex-data-ratio
#
# Compute $r$ of {eq}`eq:imbalance` by hand from the published counts, first with vertebral collapse
# as the smallest class, then with the smallest published count. Which one does the paper report?
# ```
#
# ```{solution} ex-data-ratio
# :class: dropdown
#
# $12{,}562 / 268 = 46.87$ with vertebral collapse, which is the paper's 46.9. With the published 248
# of the other lesions it would be $12{,}562 / 248 = 50.65$. The paper's number is right once rarer types
# are folded into the other lesions and this class is no longer the smallest.
# ```
#
# ```{exercise} How sure is the ratio?
# :label: ex-data-interval
#
# Give $r$ a 95 % interval by resampling studies. Why is it so wide, and why does it not help to
# count more osteophytes?
# ```
#
# ```{solution-start} ex-data-interval
# :class: dropdown
# ```

# %%
codes = pd.Categorical(train.lesion_type, categories=list(LESION_TYPES)).codes


def ratio(rows: np.ndarray) -> float:
    """Return r of Eq. (eq:imbalance); not a number where a type was not drawn at all."""
    counts = np.bincount(codes[rows], minlength=len(LESION_TYPES))
    return counts.max() / counts.min() if counts.min() else float("nan")


bootstrap_by_study(ratio, train.study_id.to_numpy(), workspace.profile.bootstrap)

# %% [markdown]
# The denominator is a handful of boxes from a handful of studies. Its relative error is roughly
# $1/\sqrt{n_c}$ or more, since boxes of one study come together, and no number of osteophytes in the
# numerator makes it smaller.
#
# ```{solution-end}
# ```
#
# ```{exercise} Another border of small
# :label: ex-data-small
#
# Set the parameter `small_share` to 0.005 and run the chapter again. Which types are still mostly
# small? Is 1 % of the film the same size in millimetres on every film?
# ```
#
# ```{solution} ex-data-small
# :class: dropdown
#
# Only part of the osteophytes stays small; most other types leave the regime. And no: 1 % of a
# tightly collimated film is a smaller lesion than 1 % of a film of the whole spine. A border in
# square millimetres would need the pixel spacing, which real files do not always carry.
# ```
#
# ```{exercise} One reader
# :label: ex-data-readers
#
# The tables name a reader in `rad_id`. What would you do with two readers who disagree about an
# osteophyte: keep both boxes, the mean, only what both saw? What would each choice do to the
# detector's average precision?
# ```
#
# ```{solution} ex-data-readers
# :class: dropdown
#
# Keeping both punishes a detector that finds the spur once. A mean box hides the disagreement and is
# a box nobody drew. Keeping only what both saw makes the truth cleaner and the task easier, and
# turns a correct find of a subtle spur into a false alarm. Whatever is chosen belongs in the data card,
# and the disagreement of readers is the natural yardstick for a detector: it need not agree with
# one reader better than readers agree among themselves.
# ```
#
# ## Takeaways
#
# - A dataset is read through checks, and its problems are listed with file and row.
# - Splits, folds and intervals go by study. An image is not an observation of its own.
# - The types are uneven by more than an order of magnitude, and a typical box covers about a
#   hundredth of the film. Averages over boxes hide the rare types.
# - Lesions come together. What a network has used to call a film abnormal is a question of its
#   own.

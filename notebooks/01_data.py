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
# Look at the images before you train a network on them. This chapter opens a dataset in the format of VinDr-SpineXR
# {cite}`nguyen2021,pham2021`, reads its tables, checks them, and shows one example of each of the seven lesion types.
# Three quantities measured here matter in all later chapters: how rare the rarest lesion types are, how small lesions
# are, and how many images a study has.
#
# ```{admonition} In this chapter
# :class: tip
# **You will be able to** read a VinDr-SpineXR folder into checked tables; explain what a study, a series and an image
# are and why the difference matters; measure class imbalance and lesion size, with a confidence interval that
# resamples whole studies.
#
# **You need** Python with `pandas`. No network is trained here.
#
# **It takes** half an hour to read. At the profile `smoke` it runs in less than a minute on two cores.
# ```

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
small_share = 0.01  # a small lesion covers less than this fraction of the image; paper, section 3.3

# %% [markdown]
# The set-up opens the run's workspace. In the profiles `smoke`, `laptop` and `night` the dataset is a virtual cohort,
# which is generated if it does not exist yet; in `paper` it is the folder named by the environment variable
# `DERNET_DATA`. The code below is the same for all profiles.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from dernet_utils.book.figures import show_boxes, show_figure, show_radiograph
from dernet_utils.book.paper import PUBLISHED_ABNORMAL, PUBLISHED_BOXES, TRAIN_IMAGES
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.vocabulary import LESION_TYPES, PAPER_CODES
from dernet_utils.dataset.check import check_dataset
from dernet_utils.dataset.prepared import read_boxes, read_images
from dernet_utils.dataset.table_form import read_table
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.metrics.intervals import bootstrap_by_study

# %%
workspace = open_chapter(profile)
root = workspace.data_root
kind = workspace.image_kind

# %% [markdown]
# ## Files on disk
#
# VinDr-SpineXR consists of two folders of DICOM files and two tables. Each file is named after its image's
# identifier, 32 hexadecimal digits, which reveals nothing about the person. We count the files.

# %%
for folder in ("train_images", "test_images", "annotations"):
    files = sorted((root / folder).iterdir())
    print(f"{folder:13} {len(files):5} files, such as {files[0].name}")

# %% [markdown]
# The tables have nine columns. Each row is one box, in VinDr-SpineXR drawn by a radiologist; an image without a
# finding has a single row that says so, with empty corners.

# %%
table = read_table((root / "annotations" / "train.csv").read_bytes())
raw = pd.DataFrame([cells for line, cells in table.rows])
assert raw.columns.size == 9
raw[["image_id", "rad_id", "lesion_type", "xmin", "ymin", "xmax", "ymax"]].head(6)

# %% [markdown]
# The corners are in pixels of the *stored* image with the origin at its top left: $x$ runs to the right, $y$ runs
# down. `Spondylolysthesis` is the dataset's own spelling. We keep it, because it is a key in the files.
#
# ## Trust, but check
#
# Datasets contain errors: a box of zero width, a box that extends beyond its image, a file truncated during transfer.
# `check_dataset` reads every file once and lists each problem with its file and row. On the command line it is
# `dernet check`.

# %%
report = check_dataset(root)
print(f"{len(report.problems)} problems")
for problem in report.problems[:5]:
    print(problem.file, problem.row, problem.message)

# %% [markdown]
# `read_dataset(root)` is strict: it returns tables only if they have no problem, and otherwise reports what is wrong
# and how to repair a copy. A run's preparation calls it once and saves one table of images and one of boxes. The
# later chapters read these two tables instead of parsing the dataset again.

# %%
images, boxes = read_images(workspace), read_boxes(workspace)
assert images.image_id.is_unique
assert set(boxes.image_id) == set(images.image_id[images.abnormal])

# %% [markdown]
# ## People, studies, images
#
# A *study* is one visit of one person to the X-ray room. It contains one or more *series* of images: the spine from
# the side (lateral), from the front (anteroposterior, AP), and in some studies at an angle between the two (oblique).
# All of them show the same bones on the same day, so they are not independent observations.

# %%
per_split = images.groupby("split", sort=False)
pd.DataFrame(
    {
        "studies": per_split.study_id.nunique(),
        "images": per_split.size(),
        "with a finding": per_split.abnormal.sum(),
        "without": per_split.size() - per_split.abnormal.sum(),
    }
)

# %% [markdown]
# The two splits must not share a study; otherwise the network would be tested on people it was trained on. Assert
# this first for any medical dataset. {ref}`chap:protocol` measures what goes wrong without it.

# %%
studies = {split: set(group.study_id) for split, group in per_split}
assert not studies["train"] & studies["test"]
per_study = images.groupby("study_id").size()
print(per_study.value_counts().rename_axis("images per study").to_frame("studies"))

# %% [markdown]
# This run has {glue:text}`c01-n-images` {glue:text}`c01-kind` from {glue:text}`c01-n-studies` studies;
# {glue:text}`c01-abnormal` of the images show a finding, located by {glue:text}`c01-n-boxes` boxes.
#
# ## Seven types of lesion
#
# The paper's Fig. 1 shows an example of each type and one normal radiograph. For each type we show the training box
# of median area, neither the largest nor the smallest. The test split is not used.

# %%
train = boxes[boxes.split == "train"].copy()
train["area_px"] = (train.xmax - train.xmin) * (train.ymax - train.ymin)
ranked = train.sort_values("area_px")
typical = {name: rows.iloc[len(rows) // 2] for name, rows in ranked.groupby("lesion_type")}
assert set(typical) <= set(LESION_TYPES)

# %% tags=["hide-input"]
path_of = images.set_index("image_id")["dicom_path"]


def draw_crop(ax: plt.Axes, box: pd.Series, title: str) -> None:
    """Draw a square around a box, at least three times its longer side."""
    grey = read_radiograph(path_of[box.image_id]).pixels
    side = max(3.0 * max(box.xmax - box.xmin, box.ymax - box.ymin), 0.3 * grey.shape[0])
    side = min(side, *grey.shape)
    ends = (box.xmin, box.xmax, grey.shape[1]), (box.ymin, box.ymax, grey.shape[0])
    x, y = (np.clip((low + high) / 2 - side / 2, 0, limit - side) for low, high, limit in ends)
    show_radiograph(ax, grey, title)
    show_boxes(ax, box.to_frame().T, names=False)
    ax.set(xlim=(x, x + side), ylim=(y + side, y))


# %% tags=["hide-input", "remove-output"]
ORDER = [  # the paper's Fig. 1, (a) to (g)
    "Vertebral collapse", "Osteophytes", "Spondylolysthesis", "Surgical implant",
    "Disc space narrowing", "Foraminal stenosis", "Other lesions",
]  # fmt: skip
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
# :alt: Eight square crops of spine radiographs, seven with a box around a lesion and one normal.
#
# One example of each lesion type, the counterpart of the paper's Fig. 1. Each panel shows the training box of median
# area for its type, on a crop of the decoded radiograph before any enhancement. {glue:text}`c01-kind`, profile
# {glue:text}`c01-profile`.
# ```
#
# Some lesions in {numref}`fig:examples` are easy to see: metal is white and has straight edges. Others are not: a
# narrowed disc is a distance that is too short, and a slipped vertebra interrupts a line that should continue. A
# radiologist recognises these by comparing with the neighbouring levels. A network has to learn the same comparison.
#
# Whole radiographs show which findings occur together in one person.

# %% tags=["hide-input", "remove-output"]
burden = images[images.split == "train"].sort_values(["boxes", "image_id"], ascending=[False, True])
burden = burden[burden.boxes > 0]
few = burden.iloc[:: max(1, len(burden) // 4)][:4]
fig, axes = plt.subplots(1, 4, figsize=(11, 4.6))
for ax, row in zip(axes, few.itertuples(), strict=False):
    show_radiograph(ax, read_radiograph(row.dicom_path).pixels, f"{row.boxes} boxes")
    show_boxes(ax, boxes[boxes.image_id == row.image_id])
show_figure("c01-fig-films", fig)

# %% [markdown]
# ```{glue:figure} c01-fig-films
# :name: fig:films
# :alt: Four whole spine radiographs with coloured boxes around their lesions.
#
# Four training radiographs, from the one with the most boxes to one with few, as decoded. {glue:text}`c01-kind`,
# profile {glue:text}`c01-profile`.
# ```
#
# ## Class imbalance
#
# Let $n_c$ be the number of boxes of class $c$ in the training split. The paper reports the ratio of the most to the
# least frequent class,
#
# $$
# r = \frac{\max_c n_c}{\min_c n_c},
# $$ (eq:imbalance)
#
# and finds 46.9 : 1, with osteophytes as the most and vertebral collapse as the least frequent class. The published
# counts contain an even smaller class, other lesions. But rarer types in the training file are merged into this
# class, so its final count is larger. Now we compute {eq}`eq:imbalance` for this run.

# %%
n_c = train.lesion_type.value_counts().reindex(list(LESION_TYPES), fill_value=0)
r = n_c.max() / n_c[n_c > 0].min()  # over the types that occur
rarest = n_c[n_c > 0].idxmin()
assert r >= 1 and n_c.sum() == len(train)
print(f"r = {r:.1f} : 1, from {n_c.idxmax()} ({n_c.max()}) to {rarest} ({n_c[rarest]})")

# %% [markdown]
# The next table shows the published counts of the real training split beside ours. We compare the two datasets and
# never pool them.

# %%
published = pd.Series(PUBLISHED_BOXES, index=list(LESION_TYPES))
fractions = 100 * pd.DataFrame({"VinDr-SpineXR": published / published.sum(), "this run": n_c / n_c.sum()})
pd.DataFrame(
    {
        "paper's code": pd.Series(PAPER_CODES),
        "VinDr-SpineXR, boxes": published,
        "VinDr-SpineXR, fraction": fractions["VinDr-SpineXR"].map("{:.1f} %".format),
        "this run, boxes": n_c,
        "this run, fraction": fractions["this run"].map("{:.1f} %".format),
    }
)

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(7.5, 3.8))
fractions.loc[published.sort_values().index].plot.barh(ax=ax, color=["#999999", "#0072B2"], width=0.75)
for bar in ax.containers[0]:
    bar.set_hatch("//")
ax.set(xscale="log", xlabel="fraction of training boxes, % (log scale)", ylabel="")
ax.legend(loc="lower right")
show_figure("c01-fig-imbalance", fig)

# %% [markdown]
# ```{glue:figure} c01-fig-imbalance
# :name: fig:imbalance
# :alt: Bars of the fraction of each lesion type in the real training split and in this run, on a logarithmic axis.
#
# Fraction of each lesion type among the training boxes, as published for VinDr-SpineXR and in this run's
# {glue:text}`c01-kind`, profile {glue:text}`c01-profile`.
# ```
#
# In this run the ratio is {glue:text}`c01-ratio` : 1, and the rarest type is {glue:text}`c01-rarest`. A ratio of two
# counts, one of them small, is uncertain; an exercise below measures how uncertain. The effect of imbalance on
# training is clear without an interval: on average over all boxes, a detector loses little by never predicting a rare
# type. Later chapters therefore report every class separately, and give each class the same weight in the mean.
#
# ## Lesion size
#
# The paper calls a lesion small when it covers less than 1 % of the field of view. The relative area of a box is
# $a = (x_{max} - x_{min})(y_{max} - y_{min}) / (W H)$, with $W$ and $H$ the width and height of its image in pixels.

# %%
image_px = images.set_index("image_id").eval("height * width")
train["a"] = train.area_px / train.image_id.map(image_px)
assert train.a.between(0, 1, inclusive="neither").all()
print(f"median relative area {100 * train.a.median():.2f} %")

# %% [markdown]
# The fraction of small lesions is estimated from a sample, so it comes with a 95 % confidence interval. Boxes of one
# study resemble each other, so we resample whole studies with all their boxes {cite}`efron1993`.

# %%
is_small = (train.a < small_share).to_numpy()
small = bootstrap_by_study(
    lambda rows: is_small[rows].mean(), train.study_id.to_numpy(), workspace.profile.bootstrap
)
print(f"fraction of small boxes: {small:.2f}")

# %% tags=["remove-cell"]
glue_values("c01", {
    "kind": kind,
    "profile": workspace.profile.name,
    "n-images": len(images),
    "n-studies": images.study_id.nunique(),
    "n-boxes": len(boxes),
    "abnormal": f"{100 * images.abnormal.mean():.0f} %",
    "ratio": f"{r:.1f}",
    "rarest": rarest,
    "small": f"{small:.2f}",
    "median-area": f"{100 * train.a.median():.2f} %",
})  # fmt: skip

# %% tags=["hide-input", "remove-output"]
order = train.groupby("lesion_type").a.median().sort_values().index
fig, ax = plt.subplots(figsize=(7.5, 4))
sns.stripplot(
    data=train.assign(a=100 * train.a), x="a", y="lesion_type", order=order, ax=ax, color="#0072B2",
    size=3, alpha=0.5, jitter=0.25, log_scale=True,
)  # fmt: skip
ax.axvline(100 * small_share, color="black", ls="--", lw=1.2)
ax.annotate("small", (100 * small_share, -0.42), ha="right", xytext=(-5, 0), textcoords="offset points")
ax.set(xlabel="box area, % of the image (log scale)", ylabel="")
show_figure("c01-fig-sizes", fig)

# %% [markdown]
# ```{glue:figure} c01-fig-sizes
# :name: fig:sizes
# :alt: One dot per training box, by lesion type, along a logarithmic axis of relative area; a dashed line marks 1 %.
#
# Relative area of every training box. Boxes to the left of the dashed line are small by the paper's definition. Of
# the {glue:text}`c01-n-boxes` boxes in both splits, only the training boxes are shown; {glue:text}`c01-kind`, profile
# {glue:text}`c01-profile`.
# ```
#
# The median box covers {glue:text}`c01-median-area` of its image, and the fraction of small boxes is
# {glue:text}`c01-small` (95 % interval, resampled by study). At the paper's detector input of 640 × 640 pixels, a
# square box of 1 % has a side of 64 pixels. At the profile `laptop`, whose input has 192 × 128 pixels, the smallest
# osteophytes are only about ten pixels wide. Keep this in mind when {ref}`chap:yolo11-training` reports which lesions
# were missed.
#
# ## Which lesions occur together
#
# Degeneration is one process with several signs: a disc that loses height, spurs at its margins, a foramen that
# narrows behind it. We count in how many training images two types occur together.

# %%
present = pd.crosstab(train.image_id, train.lesion_type).reindex(columns=list(LESION_TYPES)) > 0
together = present.astype(int).T @ present.astype(int)
assert (np.diag(together) == present.sum()).all()
together.index.name = together.columns.name = None

# %% tags=["hide-input", "remove-output"]
given = together.div(np.diag(together).clip(min=1), axis=0)
fig, ax = plt.subplots(figsize=(7, 5))
sns.heatmap(given, annot=together, fmt="d", cmap="Blues", vmin=0, vmax=1, ax=ax,
            cbar_kws={"label": "fraction of the row's images"})  # fmt: skip
ax.tick_params(axis="x", rotation=40)
plt.setp(ax.get_xticklabels(), ha="right")
show_figure("c01-fig-together", fig)

# %% [markdown]
# ```{glue:figure} c01-fig-together
# :name: fig:together
# :alt: A seven by seven table of lesion types; darker cells are types that often occur in the same image.
#
# Images in which two types occur together. The number is the count; the shade is the fraction of the images with the
# row's type that also have the column's. Training split, {glue:text}`c01-kind`, profile {glue:text}`c01-profile`.
# ```
#
# Where the osteophyte column is dark, images with another type of lesion usually show osteophytes too. A triage
# network may then do well on images with rare lesions without having learnt these, because it detects the osteophytes
# beside them.
#
# ## How the files differ
#
# Files from different machines differ in ways that a correct display hides: the number of bits, the compression, and
# whether white is the largest value or the smallest. `check_dataset` has already counted them.

# %%
for key in ("transfer_syntaxes", "photometric_interpretations", "bits_stored"):
    print(f"{key}: {report.fingerprint['train'][key]}")

# %% [markdown]
# Whatever the form, the decoded picture must be the same. {ref}`chap:imaging` shows how.
#
# ## Paper beside ours

# %%
first = images[images.split == "train"]
ours = {
    "studies": f"{images.study_id.nunique():,}",
    "images": f"{len(images):,}",
    "images with a finding, training": f"{first.abnormal.sum():,} ({first.abnormal.mean():.1%})",
    "images per study, training": f"{len(first) / first.study_id.nunique():.2f}",
    "boxes per image with a finding, training": f"{len(train) / first.abnormal.sum():.2f}",
    "imbalance": f"{r:.1f} : 1",
}
theirs = ["5,000", "10,467", f"{PUBLISHED_ABNORMAL:,} ({PUBLISHED_ABNORMAL / TRAIN_IMAGES:.1%})",
          f"{TRAIN_IMAGES / 4000:.2f}", f"{published.sum() / PUBLISHED_ABNORMAL:.2f}", "46.9 : 1"]  # fmt: skip
pd.DataFrame({"paper and dataset (VinDr-SpineXR)": theirs, f"this run ({kind})": ours.values()}, index=ours)

# %% [markdown]
# The paper gives $N = 8{,}389$ radiographs where it describes the data, and $N = 2{,}078$ where it describes the
# evaluation: the first is the training split, the second the test split.
#
# ```{admonition} What virtual means here
# :class: warning
# In all profiles except `paper`, every radiograph is computed from one donor's CT scan, which is deformed into many
# bodies and given lesions of the spine. These radiographs are no evidence about people. Their purpose is to let every
# step of the method be run and evaluated. They show neither the neck nor the levels from L3 to S1, where, in people,
# spondylolisthesis, stenosis and implants are commonest. Findings too faint to see are on the image but have no box.
# {ref}`chap:virtual-radiographs` shows how they are made, and the {doc}`../book/data_card` states their limits.
# ```
#
# ## Exercises
#
# ```{exercise} The two ends of the ratio
# :label: ex-data-ratio
#
# Compute $r$ of {eq}`eq:imbalance` by hand from the published counts, first with vertebral collapse as the smallest
# class, then with the smallest published count. Which one does the paper report?
# ```
#
# ```{solution} ex-data-ratio
# :class: dropdown
#
# $12{,}562 / 268 = 46.87$ with vertebral collapse, which is the paper's 46.9. With the published 248 of the other
# lesions it would be $12{,}562 / 248 = 50.65$. The paper's number is right once rarer types are merged into the other
# lesions, so that this class is no longer the smallest.
# ```
#
# ```{exercise} How uncertain is the ratio?
# :label: ex-data-interval
#
# Compute a 95 % interval of $r$ by resampling studies. Why is it so wide, and why would more osteophytes not make it
# narrower?
# ```
#
# ```{solution-start} ex-data-interval
# :class: dropdown
# ```

# %%
codes = pd.Categorical(train.lesion_type, categories=list(LESION_TYPES)).codes


def ratio(rows: np.ndarray) -> float:
    """Return r of Eq. (eq:imbalance); NaN if a type is missing from the sample."""
    counts = np.bincount(codes[rows], minlength=len(LESION_TYPES))
    return counts.max() / counts.min() if counts.min() else float("nan")


bootstrap_by_study(ratio, train.study_id.to_numpy(), workspace.profile.bootstrap)

# %% [markdown]
# The denominator is a handful of boxes from a handful of studies. Its relative error is roughly $1/\sqrt{n_c}$ or
# more, since boxes of one study occur together, and no number of osteophytes in the numerator makes it smaller.
#
# ```{solution-end}
# ```
#
# ```{exercise} Another threshold for small
# :label: ex-data-small
#
# Set the parameter `small_share` to 0.005 and run the chapter again. Which types are still mostly small? Is 1 % of
# the image the same size in millimetres on every radiograph?
# ```
#
# ```{solution} ex-data-small
# :class: dropdown
#
# In the virtual cohort only some of the osteophytes remain small; nearly all other lesions are above the threshold.
# And no: 1 % of a tightly collimated radiograph is a smaller area of the body than 1 % of a radiograph of the whole
# spine. A threshold in square millimetres would need the pixel spacing, which real files do not always carry.
# ```
#
# ```{exercise} One reader
# :label: ex-data-readers
#
# The tables name a reader in `rad_id`. Suppose that two readers disagree about an osteophyte. Would you keep both
# boxes, keep their mean, or keep only what both saw? How would each choice affect the detector's average precision?
# ```
#
# ```{solution} ex-data-readers
# :class: dropdown
#
# Keeping both penalises a detector that predicts the osteophyte once. A mean box hides the disagreement, and neither
# reader drew it. Keeping only what both saw makes the ground truth cleaner and the task easier, and counts the
# correct detection of a subtle osteophyte as a false positive. Document the choice in the data card. The agreement
# between readers is also the natural reference for a detector: it need not agree with one reader better than the
# readers agree with each other.
# ```
#
# ## Takeaways
#
# - Check a dataset when you read it, and list each problem with its file and row.
# - Splits, folds and intervals are by study, because the images of a study are not independent observations.
# - Class frequencies differ by more than an order of magnitude, so averages over boxes hide the rare types. A typical
#   box covers about a hundredth of the image.
# - Lesions occur together. Which of them led a network to call an image abnormal is a separate question.

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
# (chap:imaging)=
# # 02 · Imaging: from DICOM to an enhanced image
#
# An X-ray detector records a signal; a network reads grey levels. The steps in between decide what is visible. This
# chapter takes one radiograph through them by hand: first DICOM's three steps from stored numbers to a picture, then
# the paper's only preprocessing, contrast-limited adaptive histogram equalisation (CLAHE, its Eq. 1). At the end we
# measure what the clip limit does to edges and to noise.
#
# ```{admonition} In this chapter
# :class: tip
# **You will be able to** turn the stored values of a DICOM radiograph into grey levels in the right order; write
# CLAHE in a few lines and explain each symbol of Eq. 1; choose a clip limit with its benefit and its cost in mind.
#
# **You need** Python with `numpy`, and the idea of a histogram. No network is trained here.
#
# **It takes** half an hour to read. At the profile `smoke` it runs in less than a minute on two cores.
# ```

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
clip_limit = 2.0  # the paper's τ, its section 3.1; try 8
tiles = 8  # regions per side; OpenCV's default, since the paper gives none
n_images = 40  # radiographs in the measurement at the end

# %% [markdown]
# The set-up opens the run's workspace and reads the image table of {ref}`chap:data`.

# %% tags=["hide-input"]
from itertools import product

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pydicom
from IPython.display import Markdown, display

from dernet_utils.book.figures import show_figure, show_radiograph
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.dataset.prepared import read_images
from dernet_utils.imaging.enhance import clahe, clahe_by_hand, load_cached, preprocess
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.metrics.intervals import bootstrap_by_study

workspace = open_chapter(profile)
images = read_images(workspace)
train = images[images["split"] == "train"].reset_index(drop=True)
kind = workspace.image_kind

# %% [markdown]
# This chapter opens training images only: choices made on test images, even by eye, would bias the test result
# ({ref}`chap:protocol`).
#
# ## What a DICOM file holds
#
# A DICOM file is a header of named attributes followed by the pixels. The same anatomy can be stored in many forms,
# and software that supports only one of them shows a negative, a white rectangle or nothing at all. Which forms occur
# here? We read headers only, which is quick.


# %%
def describe(path: str) -> dict:
    """Return how a DICOM file stores its picture."""
    header = pydicom.dcmread(path, stop_before_pixels=True)
    return {
        "photometric": header.PhotometricInterpretation,
        "LUT": "yes" if "VOILUTSequence" in header else "no",
        "window": "yes" if "WindowWidth" in header else "no",
        "bits": header.BitsStored,
        "transfer syntax": header.file_meta.TransferSyntaxUID.name,
    }


forms = pd.DataFrame([describe(path) for path in train.dicom_path[:400]])
counted = forms.astype(str).melt(var_name="attribute").value_counts()
counted.sort_index().rename("images").to_frame()

# %% [markdown]
# The {glue:text}`c02-n-headers` {glue:text}`c02-kind` combine these into {glue:text}`c02-n-forms` forms.
# *Photometric* states whether the lowest value is displayed as black (MONOCHROME2) or white (MONOCHROME1). A *LUT* or
# a *window* is the manufacturer's recommendation of the range to display. *Transfer syntax* is how the pixels are
# encoded, plain or compressed.
#
# We take an image that has a window and, if possible, is MONOCHROME1, because it needs every step.

# %%
needs = 2 * ((forms.window == "yes") & (forms.LUT == "no"))
needs += forms.photometric == "MONOCHROME1"
path = train.dicom_path[needs.idxmax()]
dicom = pydicom.dcmread(path)
negative = dicom.PhotometricInterpretation == "MONOCHROME1"
s = dicom.pixel_array
assert s.ndim == 2 and s.max() < 2**dicom.BitsStored
print(f"{dicom.PhotometricInterpretation}, {s.shape[0]} × {s.shape[1]} px,")
print(f"{dicom.BitsStored} bits, values from {s.min()} to {s.max()}")

# %% [markdown]
# The values are integers from the detector's electronics; a screen shows 256 grey levels. DICOM prescribes three
# steps between them, in this order {cite}`dicom`.
#
# ## Three steps to grey
#
# **Step 1, modality.** A linear function or a look-up table (LUT) converts stored values $s$ into values $m$ with a
# meaning:
#
# $$ m = \text{slope} \cdot s + \text{intercept} . $$
#
# In CT these are Hounsfield units. In radiography they are often identical to the stored values, with slope 1 and
# intercept 0.

# %%
slope = float(dicom.get("RescaleSlope", 1))
intercept = float(dicom.get("RescaleIntercept", 0))
m = slope * s + intercept
assert m.shape == s.shape

# %% [markdown]
# **Step 2, values of interest.** A window of centre $w_c$ and width $w_w$ maps part of the range to the whole display
# range, $u$ from 0 to 1, and clips the rest to black or white:
#
# $$ u = \min\Bigl(1,\ \max\Bigl(0,\ \frac{m - (w_c - 0.5)}{w_w - 1} + 0.5\Bigr)\Bigr) . $$
#
# The halves are no misprint: the standard counts the steps *between* integers, so that a window of width 256 has 255
# of them. If a header lists several windows, we use the first; if it contains a LUT, we use that instead of a window.
# With neither, we display the range from the minimum to the maximum value.


# %%
def window(m: np.ndarray, w_c: float, w_w: float) -> np.ndarray:
    """Map values to fractions of the display's range."""
    return np.clip((m - (w_c - 0.5)) / (w_w - 1) + 0.5, 0, 1)


w_c, w_w = (m.max() + m.min() + 1) / 2, m.max() - m.min() + 1
if "WindowWidth" in dicom:
    w_c = float(np.atleast_1d(dicom.WindowCenter)[0])
    w_w = float(np.atleast_1d(dicom.WindowWidth)[0])
u = window(m, w_c, w_w)

# %% [markdown]
# **Step 3, photometric interpretation.** MONOCHROME1 is a negative: invert it, as the last step. Then round to grey
# levels. Our few lines must agree with `read_radiograph` of the book's package, which also handles LUTs, padding and
# compressed files.

# %%
grey = np.rint(255 * (1 - u if negative else u)).astype(np.uint8)
assert np.array_equal(grey, read_radiograph(path).pixels)

# %% [markdown]
# What would another window have shown? For comparison we take one of half the width, centred on the median.

# %% tags=["hide-input", "remove-output"]
narrow = float(np.median(m)), w_w / 2  # centre, width
other_window = window(m, *narrow)
fig, axes = plt.subplots(1, 5, figsize=(12, 3.4), width_ratios=[1.9, 1, 1, 1, 1])
step = max(1, round((m.max() - m.min()) / 80))
axes[0].hist(m.ravel(), np.arange(m.min(), m.max() + step, step), color="0.72", linewidth=0)
axes[0].set(xlabel="value after step 1", ylabel="pixels")
curve = axes[0].twinx()
line = np.linspace(m.min(), m.max(), 400)
curve.plot(line, 255 * window(line, w_c, w_w), "C0", lw=2, label="window")
curve.plot(line, 255 * window(line, *narrow), color="0.2", ls=":", lw=2, label="narrower")
if negative:
    curve.plot(line, 255 - 255 * window(line, w_c, w_w), "C1--", lw=2, label="window, inverted")
curve.set(ylabel="grey level", ylim=(-5, 330), yticks=[0, 64, 128, 192, 255])
curve.grid(False)
curve.legend(loc="upper right", fontsize=8)
show_radiograph(axes[1], 255.0 * (s - s.min()) / np.ptp(s), "as stored")
show_radiograph(axes[2], 255 * window(m, w_c, w_w), "windowed")
show_radiograph(axes[3], grey, "decoded")
show_radiograph(axes[4], 255 * (1 - other_window if negative else other_window), "narrower window")
show_figure("c02-fig-pipeline", fig)

# %% [markdown]
# ```{glue:figure} c02-fig-pipeline
# :name: fig:pipeline
# :alt: Histogram with the window's ramp; one radiograph as stored, windowed, decoded, and with a narrower window.
# One radiograph on its way to grey levels: histogram of its values with the window's ramp; the image as stored, after
# windowing, decoded (a negative is inverted), and as a window of half the width would have shown it. n = 1 of the
# {glue:text}`c02-kind`, profile {glue:text}`c02-profile`.
# ```
#
# The window determines what can be seen. Where its ramp in {numref}`fig:pipeline` is steep, tissues can be told
# apart; where it is flat, they get the same grey level, and no later step can separate them again. The last image has
# more contrast in the middle of the range and has lost both ends for good.
#
# Inversion must come last because a window is defined on the values of step 1. If the stored values are inverted
# first, the window is applied to the wrong values.

# %%
inverted_first = 2**dicom.BitsStored - 1 - s.astype(float)
wrong = window(slope * inverted_first + intercept, *narrow)
right = 1 - window(m, *narrow)
fraction_wrong = (np.abs(wrong - right) > 10 / 255).mean()

# %% [markdown]
# With the two steps exchanged, {glue:text}`c02-fraction-wrong` of this image's pixels, shown with the narrower
# window, are wrong by more than ten grey levels. The error is easily overlooked, since the result still looks like a
# radiograph.
#
# Now we select the images for the measurements below: one per study, and more if there are too few studies. All are
# 8-bit grey with bone bright.

# %%
sample = train.sample(frac=1, random_state=workspace.profile.seed)
first_of_study = ~sample.study_id.duplicated()
sample = pd.concat([sample[first_of_study], sample[~first_of_study]])
sample = sample.head(n_images).reset_index(drop=True)
greys = [read_radiograph(path).pixels for path in sample.dicom_path]
assert all(g.dtype == np.uint8 and g.ndim == 2 for g in greys)

# %% [markdown]
# ## Histogram equalisation of the whole image
#
# The brightness of a radiograph depends on the patient's size and on the exposure. Equalisation ignores how bright a
# pixel is and uses only how many pixels are darker. The paper's Eq. 1 reads
#
# ```{math}
# :label: eq:clahe
# I'(i, j) = \beta \left(
#   \frac{CDF_{\Omega_k}\bigl(I(i, j)\bigr) - CDF_{min}}{M \cdot N - CDF_{min}} \right) ,
# ```
#
# | symbol | meaning | shape, range |
# | --- | --- | --- |
# | $I(i, j)$ | grey level of the pixel in row $i$, column $j$ | integer, 0–255 |
# | $\Omega_k$ | contextual region $k$: the whole image at first, then a tile | $M \times N$ pixels |
# | $CDF_{\Omega_k}(g)$ | pixels of $\Omega_k$ with level $g$ or darker | 0 to $M \cdot N$ |
# | $CDF_{min}$ | its value at the darkest level that occurs | above 0 |
# | $M \cdot N$ | number of pixels in $\Omega_k$ | |
# | $\beta$ | dynamic range of the result, here 255 | |
# | $I'(i, j)$ | enhanced grey level | 0–255 |
#
# and in words: *rank the pixel within its region, and spread the ranks over the range*. We start with eight pixels,
# which can be checked on paper.

# %%
eight = np.array([[10, 10, 10, 12], [12, 13, 13, 200]])
counts = np.bincount(eight.ravel(), minlength=256)
cdf = np.cumsum(counts)
cdf_min = cdf[eight.min()]
equalised = np.rint(255 * (cdf[eight] - cdf_min) / (8 - cdf_min))
assert equalised.tolist() == [[0, 0, 0, 102], [102, 204, 204, 255]]

# %% [markdown]
# The three darkest pixels become 0; of the remaining five, two have rank 2/5, two have 4/5 and one has 5/5. That 13
# and 200 were far apart is lost: only order and frequency count. For a whole image the function takes four lines, and
# it agrees with OpenCV's `equalizeHist` to within one grey level.


# %%
def equalise(grey: np.ndarray) -> np.ndarray:
    """Apply Eq. 1 with the whole image as its one region."""
    cdf = np.cumsum(np.bincount(grey.ravel(), minlength=256))
    cdf_min = cdf[grey.min()]
    table = np.rint(255 * (cdf - cdf_min) / max(grey.size - cdf_min, 1))
    return np.clip(table, 0, 255).astype(np.uint8)[grey]


flat = equalise(grey)
assert cv2.absdiff(flat, cv2.equalizeHist(grey)).max() <= 1

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(1, 4, figsize=(11, 3.6), width_ratios=[1, 1.4, 1, 1.4])
for (left, right), picture, title in zip(axes.reshape(2, 2), (grey, flat), ("decoded", "equalised"), strict=True):
    show_radiograph(left, picture, title)
    right.hist(picture.ravel(), np.arange(0, 260, 4), color="0.65")
    right.set(xlabel="grey level", yticks=[], xlim=(0, 255))
    steps = right.twinx()
    steps.plot(np.cumsum(np.bincount(picture.ravel(), minlength=256)) / picture.size, "C0", lw=2)
    steps.set(ylabel="CDF / (M·N)", ylim=(0, 1.02))
    steps.grid(False)
show_figure("c02-fig-global", fig)

# %% [markdown]
# ```{glue:figure} c02-fig-global
# :name: fig:global
# :alt: Radiograph, histogram and cumulative curve, bent before equalisation and straight after it.
# Equalisation of the whole image, {eq}`eq:clahe` with one region. Grey: histogram; line: its cumulative sum. n = 1 of
# the {glue:text}`c02-kind`, profile {glue:text}`c02-profile`.
# ```
#
# The cumulative curve of the equalised image in {numref}`fig:global` is close to a straight line: that is all that
# equalisation does. It gives most contrast to the most frequent grey levels. In a spine radiograph most pixels are
# not spine, so little contrast remains for the vertebrae.
#
# ## A table for each region
#
# The remedy is to rank each pixel among its neighbours only {cite}`pizer1987`. Divide the image into tiles and give
# each its own look-up table. The image is first padded by reflection at its lower and right edges until the tiles
# divide it.


# %%
def histograms(grey: np.ndarray, tiles: int) -> tuple[np.ndarray, int, int]:
    """Return counts (tiles, tiles, 256) and a tile's M and N, px."""
    extra = [(0, -side % tiles) for side in grey.shape]
    padded = np.pad(grey, extra, mode="reflect")
    M, N = (side // tiles for side in padded.shape)
    rows = padded.reshape(tiles, M, tiles, N).swapaxes(1, 2)
    regions = rows.reshape(tiles * tiles, M * N)
    counts = [np.bincount(region, minlength=256) for region in regions]
    return np.reshape(counts, (tiles, tiles, 256)), M, N


counts, M, N = histograms(grey, tiles)
assert (counts.sum(axis=-1) == M * N).all()

# %% [markdown]
# Each tile's table is $\beta$ times its cumulative histogram divided by $M \cdot N$. To see the effect of tiles
# alone, look up every pixel in the table of its own tile.


# %%
def tables_of(counts: np.ndarray) -> np.ndarray:
    """Return each tile's table, (tiles, tiles, 256), in grey levels."""
    cdf = np.cumsum(counts, axis=-1)
    return 255 * cdf / cdf[..., -1:]


i, j = np.indices(grey.shape)
blocky = tables_of(counts)[i // M, j // N, grey]
assert blocky.min() >= 0 and blocky.max() <= 255

# %% [markdown]
# {numref}`fig:steps`, further down, shows the result (second panel), which has two faults. The tile borders are
# visible, and in regions of nearly one grey level the noise is amplified to the full range, because there is nothing
# else to rank. *Interpolation* solves the first problem and the *clip limit* the second. Eq. 1 as printed has
# neither; the words "clip limit" beneath it imply clipping, and CLAHE as published has both {cite}`zuiderveld1994`.
#
# ## The clip limit
#
# A table separates two neighbouring grey levels in proportion to the height $h(g)$ of the histogram bin, by
# $255\,h(g) / (M \cdot N)$. So we clip the bins. No bin may hold more than
#
# ```{math}
# :label: eq:clip
# \ell = \max\left(1, \left\lfloor \tau \, \frac{M \cdot N}{256} \right\rfloor\right)
# ```
#
# pixels: $\tau$ times the count that every bin would have if all levels were equally frequent. The excess is
# redistributed equally to all bins, so that the tile keeps its number of pixels; the remainder of that division goes
# to evenly spaced bins. This raises the full bins slightly above the limit again, which OpenCV accepts.


# %%
def clip(counts: np.ndarray, limit: int) -> np.ndarray:
    """Clip one histogram (256,) at the limit and redistribute the excess."""
    excess = np.maximum(counts - limit, 0).sum()
    clipped = np.minimum(counts, limit) + excess // 256
    rest = excess % 256
    step = max(256 // rest, 1) if rest else 1
    clipped[np.arange(0, 256, step)[:rest]] += 1
    return clipped


def clip_level(tau: float, M: int, N: int) -> int:
    """Return the largest allowed count of a bin."""
    return max(1, int(tau * M * N / 256))


# %% [markdown]
# Clipping must not lose a pixel. It also bounds the slope of every table: at most $\tau$ from the bin itself, plus at
# most 1 from the redistribution, give or take one pixel. That bound is the meaning of a clip limit: **no table
# stretches the step between two neighbouring grey levels to more than about $\tau + 1$ levels.**

# %%
limit = clip_level(clip_limit, M, N)
clipped = np.array([[clip(h, limit) for h in row] for row in counts])
assert (clipped.sum(axis=-1) == M * N).all()
slopes = np.diff(tables_of(clipped), axis=-1)
assert slopes.max() <= clip_limit + 1 + 255 / (M * N)
steepest = np.diff(tables_of(counts), axis=-1).max()

# %% tags=["hide-input", "remove-output"]
peaks = np.where(counts[..., 5:250].sum(-1) > 0.9 * M * N, counts[..., 5:250].max(-1), 0)
r, k = np.unravel_index(peaks.argmax(), peaks.shape)
fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), width_ratios=[1, 1.4, 1.4])
show_radiograph(axes[0], grey, "the tile")
axes[0].add_patch(plt.Rectangle((k * N, r * M), N, M, fill=False, ec="#E69F00", lw=2))
axes[1].fill_between(range(256), counts[r, k], step="mid", color="0.75", label="original")
axes[1].step(range(256), clipped[r, k], "C0", where="mid", label="clipped, redistributed")
axes[1].axhline(limit, color="C1", ls="--", label=f"limit, τ = {clip_limit:g}")
axes[1].set(xlabel="grey level", ylabel="pixels", xlim=(0, 255))
axes[1].set_ylim(0, min(counts[r, k].max(), 6 * limit) * 1.05)
axes[2].plot(tables_of(counts)[r, k], color="0.5", lw=2, label="without limit")
axes[2].plot(tables_of(clipped)[r, k], "C0--", lw=2, label="with limit")
axes[2].set(xlabel="grey level", ylabel="grey level, enhanced", xlim=(0, 255), ylim=(0, 260))
for ax in axes[1:]:
    ax.legend(fontsize=8)
show_figure("c02-fig-clip", fig)

# %% [markdown]
# ```{glue:figure} c02-fig-clip
# :name: fig:clip
# :alt: A tile's narrow histogram clipped at the limit; its table, a step before, a gentle slope after.
# The tile with the most uniform grey: its histogram before and after clipping, and the two tables. The count axis
# ends at six times the limit. n = 1 of the {glue:text}`c02-kind`, profile {glue:text}`c02-profile`.
# ```
#
# Without a limit the steepest table of this image stretches one grey level to {glue:text}`c02-steepest`; with
# $\tau$ = {glue:text}`c02-tau` none stretches it to more than {glue:text}`c02-steepest-clipped`. {numref}`fig:clip`
# also shows the cost: a tile that uses few levels no longer fills the range.
#
# ## Interpolation between regions
#
# A table belongs to the centre of its tile. A pixel elsewhere lies between four centres and takes the weighted mean
# of four table values, with larger weights for nearer centres. Let $d_y$ and $d_x$ be the fractions of the distance
# between centres, down and to the right, and $T$ the tables of the four nearest tiles:
#
# ```{math}
# :label: eq:blend
# I' = (1-d_y)\bigl[(1-d_x)\,T_{00}(I) + d_x\,T_{01}(I)\bigr]
#    + d_y\,\bigl[(1-d_x)\,T_{10}(I) + d_x\,T_{11}(I)\bigr] .
# ```


# %%
def neighbours(n: int, size: int, tiles: int) -> tuple[np.ndarray, ...]:
    """For n rows (or columns): tile before, tile after, fraction."""
    position = np.arange(n) / size - 0.5
    before = np.floor(position).astype(int)
    last = tiles - 1
    return before.clip(0, last), (before + 1).clip(0, last), position - before


# %% [markdown]
# Beyond the outermost centres there is no second tile, so the nearest one is used twice.


# %%
def blend(grey: np.ndarray, T: np.ndarray, M: int, N: int) -> np.ndarray:
    """Look each pixel up in the tables of its four nearest tiles."""
    H, W = grey.shape
    y0, y1, d_y = (x[:, None] for x in neighbours(H, M, len(T)))
    x0, x1, d_x = (x[None, :] for x in neighbours(W, N, len(T)))
    upper = (1 - d_x) * T[y0, x0, grey] + d_x * T[y0, x1, grey]
    lower = (1 - d_x) * T[y1, x0, grey] + d_x * T[y1, x1, grey]
    return np.rint((1 - d_y) * upper + d_y * lower).astype(np.uint8)


# %% [markdown]
# Does this equal OpenCV's CLAHE? OpenCV has one peculiarity: if either side of the image needs padding, it pads both,
# adding one whole pixel per tile to a side that already fits. The book's `clahe_by_hand` does the same. We assert
# here that it stays within one grey level of OpenCV's; one of the book's tests asserts it for hundreds of small
# images.

# %%
T = tables_of(clipped).round()
enhanced = blend(grey, T, M, N)
worst = max(
    cv2.absdiff(clahe(grey, tau, n), clahe_by_hand(grey, tau, n)).max()
    for n, tau in product((2, 5, tiles), (1.0, clip_limit, 8.0, 40.0))
)
assert worst <= 1
if len({side % tiles == 0 for side in grey.shape}) == 1:  # the peculiarity does not apply
    assert np.array_equal(enhanced, clahe_by_hand(grey, clip_limit, tiles))

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(1, 4, figsize=(11, 4))
unblended = T[i // M, j // N, grey]
titles = ("decoded", "tiles alone", "tiles, clipped", "tiles, clipped, interpolated")
for ax, picture, title in zip(axes, (grey, blocky, unblended, enhanced), titles, strict=True):
    show_radiograph(ax, picture, title)
show_figure("c02-fig-steps", fig)

# %% [markdown]
# ```{glue:figure} c02-fig-steps
# :name: fig:steps
# :alt: One radiograph decoded, in noisy hard-edged tiles, in quiet hard-edged tiles, and smooth.
# CLAHE step by step: each tile equalised alone, its histogram clipped at $\tau$ = {glue:text}`c02-tau`, the tables
# interpolated. Tiles {glue:text}`c02-tiles`; n = 1 of the {glue:text}`c02-kind`, profile {glue:text}`c02-profile`.
# ```
#
# The largest difference from OpenCV over all grids and limits tried is {glue:text}`c02-worst` grey level. In
# {numref}`fig:steps` the clip limit has reduced the noise, and interpolation has removed the borders.
#
# ## Where CDF-min went
#
# You may have noticed that $CDF_{min}$ of {eq}`eq:clahe` is missing from `tables_of`. OpenCV's `equalizeHist`
# subtracts it; OpenCV's CLAHE does not, nor does scikit-image's. The paper prints the formula of `equalizeHist` and
# presumably uses OpenCV's CLAHE. Does it matter? Clipping bounds the effect: the darkest bin holds at most $\tau + 1$
# times the mean count, so a table moves by at most about $\tau + 1$ grey levels. We test this.

# %%
lowest = (clipped > 0).argmax(axis=-1)[..., None]
cdf = np.cumsum(clipped, axis=-1)
cdf_min = np.take_along_axis(cdf, lowest, axis=-1)
printed = 255 * (cdf - cdf_min).clip(0) / (M * N - cdf_min)
moved = cv2.absdiff(blend(grey, printed, M, N), enhanced)
assert moved.max() <= np.ceil(clip_limit + 1 + 255 / (M * N)) + 1

# %% [markdown]
# Subtracting $CDF_{min}$ as printed changes this image's pixels by {glue:text}`c02-moved-mean` grey levels on average
# and by {glue:text}`c02-moved-max` at most, which is too little to see. We follow OpenCV and document the deviation.
#
# ## What the clip limit does to bone
#
# The paper sets $\tau = 2.0$ "to prevent noise amplification in homogeneous bone structures". What would other values
# do? We first look at the part of the image with the most edges.

# %% tags=["hide-input", "remove-output"]
half = max(grey.shape) // 6
steepness = np.hypot(*np.gradient(cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 2)))
density = cv2.boxFilter(steepness, -1, (2 * half, 2 * half))
inside = density[half:-half, half:-half]
top, left = np.unravel_index(inside.argmax(), inside.shape)
crop = np.s_[top : top + 2 * half, left : left + 2 * half]
fig, axes = plt.subplots(2, 3, figsize=(10.5, 7.4))
for ax, tau in zip(axes.flat, (None, 1.0, 2.0, 4.0, 8.0, 40.0), strict=True):
    picture = grey if tau is None else clahe_by_hand(grey, tau, tiles)
    show_radiograph(ax, picture[crop], "decoded" if tau is None else f"τ = {tau:g}")
show_figure("c02-fig-limits", fig)

# %% [markdown]
# ```{glue:figure} c02-fig-limits
# :name: fig:limits
# :alt: One spine crop six times, from flat and soft as decoded to harsh and grainy at clip limit 40.
# One crop as decoded and enhanced with five clip limits, tiles {glue:text}`c02-tiles`. n = 1 of the
# {glue:text}`c02-kind`, profile {glue:text}`c02-profile`.
# ```
#
# In {numref}`fig:limits` a higher limit strengthens the contours, and the noise as well. A clip limit of 1 does have
# an effect: its tables still have slopes up to 2. At 40 a bin is clipped only if it holds more than about a sixth of
# its tile's pixels. Few bins do, and most tiles then fill the range, whatever their content.
#
# Visual impressions are unreliable, so we measure. In the *decoded* image we mark two kinds of pixels, and use the
# same pixels for all limits. Both lie in the brighter half, which is mostly bone and the soft tissue superimposed on
# it: **edges** are the fifth of its pixels with the largest gradient, **flat** pixels the fifth with the smallest.


# %%
def edge_strength(picture: np.ndarray) -> np.ndarray:
    """Return the smoothed image's gradient, grey levels per px."""
    smooth = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 2)
    return np.hypot(*np.gradient(smooth))


def regions_to_measure(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two masks (H, W): edges and flat regions of the bright half."""
    smooth = cv2.GaussianBlur(grey, (0, 0), 4)
    usable = (smooth > 5) & (smooth < 245)  # neither air nor metal
    bright = usable & (smooth > np.median(smooth[usable]))
    steep = edge_strength(grey)
    low, high = np.quantile(steep[bright], [0.2, 0.8])
    return bright & (steep > high), bright & (steep < low)


# %% [markdown]
# *Contrast* is the mean edge strength on the edges; *noise* is the standard deviation, in the flat regions, of the
# component that smoothing removes. Both are divided by their value in the decoded image, so that 1 means "unchanged".


# %%
def contrast_and_noise(picture, edges, flat) -> np.ndarray:
    """Return edge contrast, grey levels per px, and noise, grey levels."""
    grain = picture - cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 2)
    return np.array([edge_strength(picture)[edges].mean(), grain[flat].std()])


# %%
limits = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 40.0]
gains = np.empty((len(greys), len(limits), 2))
for n, g in enumerate(greys):
    masks = regions_to_measure(g)
    before = contrast_and_noise(g, *masks)
    for t, tau in enumerate(limits):
        after = contrast_and_noise(clahe(g, tau, tiles), *masks)
        gains[n, t] = after / before
assert np.isfinite(gains).all() and (gains > 0).all()

# %% [markdown]
# The intervals resample whole studies, as everywhere in this book. The third measure is the ratio of the two; above
# 1, contrast has increased more than noise.

# %%
names = ["contrast", "noise", "contrast / noise"]
measures = np.dstack([gains, gains[..., 0] / gains[..., 1]])
table = pd.DataFrame(index=pd.Index(limits, name="τ"), columns=names)
for (t, tau), (k, name) in product(enumerate(limits), enumerate(names)):
    values = measures[:, t, k]
    table.loc[tau, name] = bootstrap_by_study(
        lambda rows, v=values: v[rows].mean(),
        sample.study_id, workspace.profile.bootstrap)  # fmt: skip
table.map("{:.2f}".format)

# %% tags=["hide-input", "remove-output"]
fig, (ax0, ax1, ax2) = plt.subplots(1, 3, figsize=(11, 3.9), width_ratios=[0.9, 1.5, 1.5])
show_radiograph(ax0, grey, "measured regions")
for mask, colour in zip(regions_to_measure(grey), ((0.90, 0.62, 0, 1), (0.34, 0.71, 0.91, 0.75)), strict=True):
    ax0.imshow(mask[..., None] * np.array(colour), interpolation="nearest")
ax1.plot(limits, np.array(limits) + 1, "--", color="0.5", lw=1, label="τ + 1")
for ax, shown in ((ax1, names[:2]), (ax2, names[2:])):
    for name, marker, colour in zip(shown, "os", ("#B87700", "#0072B2"), strict=False):
        rows = [table.loc[tau, name] for tau in limits]
        low, high = [x.low for x in rows], [x.high for x in rows]
        ax.fill_between(limits, low, high, color=colour, alpha=0.2)
        ax.plot(limits, [x.value for x in rows], f"{marker}-", color=colour, label=name)
    ax.axvline(2.0, color="0.3", ls=":", label="the paper's τ")
    ax.axhline(1, color="0.3", lw=0.8)
    ax.set(xscale="log", xticks=limits, xlabel="clip limit τ")
    ax.set_xticks(limits, [f"{tau:g}" for tau in limits])
    ax.minorticks_off()
    ax.legend(fontsize=8)
ax1.set(ylabel="relative to the decoded image", yscale="log")
ax1.set_ylim(0.8, 1.3 * max(x.high for x in table["noise"]))
ax1.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
ax1.minorticks_off()
ax2.set(ylabel="gain of contrast / gain of noise")
show_figure("c02-fig-measured", fig)

# %% [markdown]
# ```{glue:figure} c02-fig-measured
# :name: fig:measured
# :alt: Edge contrast, noise and their ratio plotted against the clip limit, the paper's 2.0 marked.
# Left: edges (orange) and flat regions (blue) in the bright half of one image. Middle and right: gain of edge
# contrast and of noise against the clip limit, means with 95 % intervals over resampled studies. n =
# {glue:text}`c02-n` {glue:text}`c02-kind`, profile {glue:text}`c02-profile`.
# ```

# %% tags=["hide-input"]
contrast, noise, ratio = table.loc[2.0, names]
glue_values("c02", {
    "kind": kind,
    "profile": workspace.profile.name,
    "tau": f"{clip_limit:g}",
    "tiles": f"{tiles} × {tiles}",
    "n-headers": f"{len(forms):,}",
    "n-forms": str(len(forms.drop_duplicates())),
    "fraction-wrong": f"{100 * fraction_wrong:.0f} %",
    "n": f"{len(greys)}",
    "steepest": f"{steepest:.0f}",
    "steepest-clipped": f"{slopes.max():.1f}",
    "worst": str(int(worst)),
    "moved-max": str(int(moved.max())),
    "moved-mean": f"{moved.mean():.1f}",
    "cache-px": str(workspace.profile.cache_px),
    "noise": f"{noise:.2f}",
    "contrast": f"{contrast:.2f}",
})  # fmt: skip

# %% tags=["hide-input"]
verdict = "Contrast and noise increase alike, within the uncertainty of this sample"
if ratio.low > 1 or ratio.high < 1:
    verdict = "Contrast increases more than noise" if ratio.low > 1 else "Noise increases more than contrast"
display(Markdown(
    f"At the paper's τ = 2, edge contrast is {contrast:.2f} times that of the decoded image and noise {noise:.2f} "
    f"times (ratio {ratio:.2f}, n = {ratio.n_images} {kind} from {ratio.n_studies} studies). {verdict}. At τ = 8 noise "
    f"is {table.loc[8.0, 'noise']:.2f} times as strong, at τ = 40 {table.loc[40.0, 'noise']:.2f} times."
))  # fmt: skip

# %% [markdown]
# The shape of {numref}`fig:measured` follows from {eq}`eq:clahe`. A table is steep at a grey level that many pixels
# have, and a homogeneous region has many such pixels: equalisation adds most contrast where there is nothing to show.
# Only the clip limit restrains it; the dashed line is the bound $\tau + 1$ found above. Where a tile contains edges,
# its pixels spread over many levels, its bins are already below the limit, and raising $\tau$ changes little.
#
# So the paper's statement needs a qualification. A clip limit of 2 does not prevent noise amplification in
# homogeneous bone; it bounds it, at a factor of about three, where plain equalisation of tiles has no such bound. In
# return, CLAHE brings faint contours anywhere in the image into the range that eight bits, the eye, or a network's
# first layer can resolve. Whether a network benefits can only be tested with a network; {ref}`ex-imaging-help`
# designs the test.
#
# ## One path from file to network
#
# From here on, every image goes through one function: `preprocess` enhances at full size, where tiles have enough
# pixels to rank, and then shrinks the image until its long side fits. The run's preparation has done this once for
# every image and cached the results. Their names are derived from the file's content and the parameters, so a changed
# file or parameter never yields an outdated image. The image table lists the cached files; `preprocess` and the cache
# must agree.

# %%
p = workspace.profile
for g, row in zip(greys, sample.itertuples(), strict=True):
    small = preprocess(g, p.cache_px, p.clip_limit, p.tiles)
    assert np.array_equal(load_cached(row.cached_path), small)
    assert (row.height, row.width) == g.shape

# %% [markdown]
# The long side of a cached image is at most {glue:text}`c02-cache-px` pixels in this profile. Lesion boxes are scaled
# with the images, by the factor in the table's column `scale`.
#
# ## Paper beside ours
#
# ```{list-table}
# :header-rows: 1
# :widths: 22 32 46
#
# * -
#   - paper, VinDr-SpineXR
#   - this run, {glue:text}`c02-kind`, profile {glue:text}`c02-profile`
# * - images
#   - 8,389
#   - {glue:text}`c02-n` in this chapter's measurement
# * - equation
#   - {eq}`eq:clahe`; neither clipping nor interpolation is printed
#   - with both, {eq}`eq:clip` and {eq}`eq:blend`
# * - $CDF_{min}$
#   - subtracted
#   - not subtracted, as in OpenCV; it would move one image by {glue:text}`c02-moved-mean` grey
#     levels on average
# * - clip limit $\tau$
#   - 2.0
#   - {glue:text}`c02-tau`
# * - regions $\Omega_k$
#   - not given
#   - {glue:text}`c02-tiles`
# * - range $\beta$
#   - not given
#   - 255
# * - noise in homogeneous bone
#   - "to prevent noise amplification"; not measured
#   - at $\tau$ = 2 noise × {glue:text}`c02-noise`, edge contrast × {glue:text}`c02-contrast`
# ```
#
# Brackets are 95 % intervals over resampled studies. The columns come from different data and are not comparable; the
# paper did not measure the last row.
#
# ## Exercises
#
# ```{exercise} Equalise on paper
# :label: ex-imaging-paper
#
# A region has the eight pixels 5, 5, 7, 7, 7, 7, 9, 20. Compute the enhanced levels by {eq}`eq:clahe` with $\beta =
# 255$. Which two neighbouring levels does it separate most, and why?
# ```
#
# ```{solution-start} ex-imaging-paper
# :class: dropdown
# ```
#
# $CDF$ is 2, 6, 7, 8 at the levels 5, 7, 9, 20, and $CDF_{min} = 2$. So $I' = 255\,(CDF - 2)/6$, which is 0, 170,
# 212.5 and 255. The widest step is from 5 to 7, because half of the pixels are 7: a frequent level gets a wide range,
# whether it is bone or noise.

# %%
region = np.array([[5, 5, 7, 7, 7, 7, 9, 20]], np.uint8)
assert np.unique(equalise(region)).tolist() == [0, 170, 212, 255]

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Try clip limit 8
# :label: ex-imaging-eight
#
# Set `clip_limit = 8.0` in the parameters cell and run the chapter again. What happens to the bound on the slopes,
# and to the fraction of tiles in which any bin is clipped? Then find this fraction for other limits without running
# the whole chapter.
# ```
#
# ```{solution-start} ex-imaging-eight
# :class: dropdown
# ```
#
# The bound $\tau + 1$ rises from 3 to 9. The fraction of tiles in which some bin is clipped needs the histograms
# only:

# %%
fullest = counts.max(axis=-1)
fractions = [(fullest > clip_level(t, M, N)).mean() for t in (1, 2, 8, 40)]
print("tiles clipped at τ = 1, 2, 8, 40:", [f"{x:.0%}" for x in fractions])
assert sorted(fractions, reverse=True) == fractions

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} The other order
# :label: ex-imaging-order
#
# `preprocess` enhances first and shrinks afterwards. Shrinking first would be faster. How much do the two results
# differ, and is one of them noisier?
# ```
#
# ```{solution-start} ex-imaging-order
# :class: dropdown
# ```
#
# Two effects oppose each other. Shrinking averages noise away *before* the tables are made; but this makes the
# histograms narrower and the slopes steeper, so that the remaining noise is amplified more. Which effect dominates
# depends on the images, so we print it. In a small image, moreover, part of what we measure as noise is fine anatomy.
# Enhancing first has the advantage that the enhancement does not depend on a network's input size. In any case, a
# network trained on one kind of image should not be given the other.

# %%
small = preprocess(grey, p.cache_px, clip_limit, tiles)
size = small.shape[::-1]
shrunk = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
other = clahe(shrunk, clip_limit, tiles)
noise_of = [contrast_and_noise(x, *regions_to_measure(shrunk))[1] for x in (small, other)]
print(f"mean difference {cv2.absdiff(small, other).mean():.1f}")
print("noise, enhanced first {:.1f}, shrunk first {:.1f}".format(*noise_of))
assert other.shape == small.shape

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Does CLAHE help?
# :label: ex-imaging-help
#
# The paper uses CLAHE and reports no run without it. Design the experiment that would show whether it helps DERNet.
# What do you compare, on which images, how many times, and what could bias the result?
# ```
#
# ```{solution} ex-imaging-help
# :class: dropdown
#
# Train each network with and without CLAHE, everything else equal, on the same folds and with several seeds; compare
# out-of-fold AUROC, paired by study, with an interval of the *difference* over resampled studies. Choose nothing on
# the test split. Pitfalls: choosing $\tau$ on the images used for scoring; a single seed, whose random effect may
# exceed that of CLAHE; augmentation of brightness and contrast, which may already have CLAHE's effect; and images
# from a single X-ray detector, which differ little in exposure.
# ```
#
# ## Takeaways
#
# - DICOM's order is modality, values of interest, then inversion. In any other order, the result is wrong but still
#   looks like a radiograph.
# - Equalisation replaces a grey level by its rank. CLAHE ranks within tiles, limits the slope to about $\tau + 1$,
#   and interpolates between the tables.
# - Eq. 1 as printed is plain equalisation; clip limit and interpolation make it CLAHE.
# - A higher clip limit increases contrast and noise. The paper's 2.0 is a cautious choice that bounds noise rather
#   than preventing it.
# - One function, `preprocess`, prepares the images for every network of this book. {ref}`chap:data` describes where
#   the images come from; {ref}`chap:protocol` describes how they are split.

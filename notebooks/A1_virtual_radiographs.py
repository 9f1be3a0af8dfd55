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
# (chap:virtual-radiographs)=
# # A1 · How the virtual radiographs are made
#
# VinDr-SpineXR may not be redistributed, so this book brings its own radiographs. They are digitally reconstructed:
# one real CT is deformed into many bodies, lesions are added to its spine, rays are traced through it, the photons
# that arrive are counted, and the image is processed for display. This chapter takes the simulator apart. Each stage
# is done once by hand and compared with the package, so that you see what physics a virtual radiograph contains and
# what it leaves out.
#
# ```{admonition} In this chapter
# :class: tip
# **You will be able to** compute a radiograph from a CT by the Beer–Lambert law; change one number of a virtual body,
# lesion or exposure and predict its effect on the image; read the computed ground truth of every virtual radiograph:
# mask, counterfactual, visibility and box.
#
# **You need** Python with `numpy`, and the exponential function. No network is trained here, and no image of the
# run's dataset is used: the chapter gives the same results in every profile.
#
# **It takes** half an hour to read, and less than a minute to run on a laptop.
# ```

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
seed = 42  # of the virtual patients
severity = 0.7  # of the lesions shown one by one, above 0 and at most 1; try 0.3
spacing_mm = 0.4  # pixel size of most images here

# %% [markdown]
# The set-up loads the donor: a chest CT with a label for every voxel of a vertebra
# {cite}`gopalakrishnan2022,wasserthal2023`. It is downloaded once, and its checksum is verified. Two things are then
# changed, once. The patient was given contrast agent, and an aorta as dense as bone would cast the shadow of bone: all
# that is denser than blood inside chest and abdomen, spine apart, is brought down to blood. And voxels of 0.7 × 0.7 ×
# 2.5 mm blur a cortex of less than a millimetre and show no trabeculae, while a radiograph shows both. So each labelled
# vertebra is replaced by a model on a grid of about half a millimetre: a thin shell of compact bone along the label's
# surface, around trabecular bone with a random texture of mostly vertical structures. Their form is the donor's; their
# detail is made, not measured.

# %% tags=["hide-input"]
import tempfile
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from dernet_utils.book.figures import show_figure, show_radiograph
from dernet_utils.book.figures_data import draw_difference, draw_label, draw_lesion
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.virtual import acquisition, projection
from dernet_utils.virtual.acquisition import DisplayProcessing, Paths, expose, transmission
from dernet_utils.virtual.anatomy import Anatomy, find_discs, find_vertebrae
from dernet_utils.virtual.cohort import LEAST_VISIBILITY
from dernet_utils.virtual.counterfactual import read_counterfactuals, write_counterfactuals
from dernet_utils.virtual.dicom_writer import write_dicom
from dernet_utils.virtual.donor import fetch_donor, load_donor
from dernet_utils.virtual.plan import plan_cohort
from dernet_utils.virtual.projection import BONE_FROM, BONE_SPAN, Scene, View
from dernet_utils.virtual.render import build_finding, build_shape, render_radiograph

# %%
workspace = open_chapter(profile)
fetch_donor()
donor = load_donor()
bodies = find_vertebrae(donor)  # from the lowest up
anatomy = Anatomy(donor, bodies, find_discs(bodies))

# %% [markdown]
# ## One ray
#
# A tube sends $\Phi_0$ photons along a ray; a fraction $w_E$ of them has the energy $E$. Each material $m$ on the ray
# removes the same *fraction* of them in every further gram per square centimetre. This is the Beer–Lambert law,
# summed over energies:
#
# $$
# \Phi = \Phi_0 \sum_E w_E \exp\Bigl(-\sum_m (\mu/\rho)_m(E)\,(\rho\ell)_m\Bigr) .
# $$ (eq:beer-lambert)
#
# Here $(\mu/\rho)_m$ is the mass attenuation coefficient, tabulated by NIST {cite}`hubbell1995`, in cm²/g, and
# $(\rho\ell)_m$ is the amount of the material on the ray: density times length, g/cm². The book computes with three
# energies, 40, 60 and 80 keV, and three materials. Twenty centimetres of water, by hand:

# %%
kvp = 80.0  # tube voltage
w = np.array([np.interp(kvp, acquisition.KVP, column) for column in acquisition.ENERGY_WEIGHTS.T])
assert np.isclose(w.sum(), 1.0)
WATER = acquisition.WATER  # mass attenuation at the three energies, cm²/g
water = 20.0  # g/cm²: 20 cm of 1 g/cm³
fraction = sum(w[E] * np.exp(-WATER[E] * water) for E in range(3))
print(f"Φ / Φ0 = {fraction:.4f}: one photon in {1 / fraction:.0f} arrives")

# %% [markdown]
# Now replace two of the centimetres with cortical bone (1.92 g/cm³), or add half a millimetre of titanium (4.5 g/cm³)
# to the water. The package's `transmission` must give the same.

# %%
ways = {"20 cm water": (20.0, 0.0, 0.0), "18 cm water, 2 cm bone": (18.0, 2 * 1.92, 0.0),
        "20 cm water, 0.5 mm titanium": (20.0, 0.0, 0.05 * 4.5)}  # fmt: skip
passed = {}
for name, (soft, bone, metal) in ways.items():
    exponent = WATER * soft + acquisition.CORTICAL_BONE * bone + acquisition.TITANIUM * metal
    passed[name] = float(w @ np.exp(-exponent))
    paths = Paths(*(np.full((1, 1), g) for g in (soft, bone, metal)))
    assert np.isclose(transmission(paths, kvp), passed[name])
pd.Series(passed).map("{:.2%}".format).to_frame("Φ / Φ0")

# %% [markdown]
# A trabecular vertebra holds far less mineral than two centimetres of cortical bone, so it stands out far less than a
# screw.
#
# The sum over energies does what a single exponential cannot. Low-energy photons are removed first, so the beam
# *hardens*: the first centimetre stops a larger fraction than the twentieth.

# %%
cm = np.arange(0.0, 31.0)
left = w[:, None] * np.exp(-WATER[:, None] * cm)  # (energies, thicknesses)
per_cm = -np.diff(np.log(left.sum(axis=0)))
mean_keV = np.array([40.0, 60.0, 80.0]) @ left / left.sum(axis=0)
assert (np.diff(per_cm) < 0).all() and (np.diff(mean_keV) > 0).all()

# %% tags=["hide-input", "remove-output"]
fig, (ax1, ax2) = plt.subplots(1, 2, figsize=(9.5, 3.4))
ax1.semilogy(cm, left.sum(axis=0), "o-", ms=3, color="#0072B2", label="three energies")
ax1.semilogy(cm, np.exp(-per_cm[0] * cm), "--", color="0.25", label="if every centimetre were like the first")
ax1.set(xlabel="water, cm", ylabel="fraction that arrives, Φ / Φ₀")
ax1.legend()
at = np.arange(3)
for shift, thick, colour, hatch in ((-0.2, 0, "#E69F00", ""), (0.2, 20, "#0072B2", "//")):
    ax2.bar(at + shift, left[:, thick] / left[:, thick].sum(), 0.38, color=colour, hatch=hatch,
            label=f"after {thick} cm: mean {mean_keV[thick]:.0f} keV")  # fmt: skip
ax2.set_xticks(at, ["40 keV", "60 keV", "80 keV"])
ax2.set(ylabel="fraction of the remaining photons", ylim=(0, 0.75))
ax2.legend(loc="upper left")
show_figure("ca1-fig-hardening", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-hardening
# :name: fig:virtual-hardening
# :alt: Transmission through water falls less steeply than a line; bars show the mean energy rising after 20 cm.
#
# Beam hardening in the virtual beam at 80 kVp. Left: transmission of {eq}`eq:beer-lambert` on a logarithmic axis, and
# what it would be if every centimetre stopped as much as the first. Right: the three energies before and after 20 cm
# of water.
# ```
#
# ## The donor and its landmarks
#
# The donor is a grid of densities (Hounsfield units + 1000, so that air is 0 and water 1000). From the labels,
# `find_vertebrae` measures a coordinate frame for each vertebral body: its centre, the direction from its lower to
# its upper endplate, and the direction to its front. All lesions are defined in such frames, so they follow their
# vertebra however the patient bends.

# %%
print(f"{donor.density.shape} voxels (z, y, x) of {donor.spacing_mm} mm")
print("whole vertebrae:", ", ".join(body.name for body in reversed(bodies)))
for body in bodies:
    assert np.isclose(np.linalg.norm(body.up), 1) and np.isclose(body.up @ body.front, 0)
middle = bodies[len(bodies) // 4]  # in the middle of the fields below
table = {"height": middle.height_mm, "depth": middle.depth_mm, "width": middle.width_mm}
print(middle.name, {name: f"{size:.0f} mm" for name, size in table.items()})

# %% [markdown]
# To look inside, and to follow a ray, we need the density at any position in millimetres: trilinear interpolation, in
# four lines.


# %%
def density_at(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the donor's density, HU + 1000, at positions in mm."""
    voxels = [np.asarray(p) / s for p, s in zip((z, y, x), donor.spacing_mm, strict=True)]
    return ndimage.map_coordinates(donor.density, voxels, np.float32, order=1)


assert density_at(*(np.zeros(1) for _ in range(3))) == 0.0  # a corner of the scan is air

# %% tags=["hide-input", "remove-output"]
top_mm, deep_mm, wide_mm = ((n - 1) * s for n, s in zip(donor.density.shape, donor.spacing_mm, strict=True))
axis = np.array([body.centre_mm for body in bodies])
dark = {"facecolor": "black", "alpha": 0.6, "pad": 1, "lw": 0}
fig, axes = plt.subplots(1, 2, figsize=(9.5, 6.2), width_ratios=[deep_mm, wide_mm])
# Each slice follows the spine: at each height it passes through the vertebrae's centres.
for ax, i, size, across in ((axes[0], 1, deep_mm, "front"), (axes[1], 0, wide_mm, "left")):
    u, z = np.meshgrid(np.arange(0.0, size, 0.8), np.arange(0.0, top_mm, 0.8))
    other = np.interp(z, axis[:, 2], axis[:, 1 - i])
    slice_ = density_at(*((other, u) if i == 1 else (u, other)), z)
    ax.imshow(slice_, cmap="gray", vmin=700, vmax=1700, origin="lower", extent=(0, size, 0, top_mm))
    for number, body in enumerate(bodies):
        x, y = start = body.centre_mm[[i, 2]]
        for vector, colour, mm in ((body.up, "#E69F00", 14), (getattr(body, across), "#56B4E9", 22)):
            arrow = {"color": colour, "arrowstyle": "-|>", "lw": 1.5}
            ax.annotate("", start + mm * vector[[i, 2]], start, arrowprops=arrow)
        if number % 2 == 0:
            ax.annotate(body.name, (x - 34, y), color="white", fontsize=8, va="center", ha="right", bbox=dark)
    ax.grid(False)
axes[0].set(xlabel="back to front, mm", ylabel="height, mm", title="sagittal")
axes[1].set(xlabel="right to left, mm", title="coronal, along the spine")
show_figure("ca1-fig-donor", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-donor
# :name: fig:virtual-donor
# :alt: A sagittal and a coronal slice of a chest CT; arrows point up and to the front or left from each vertebra.
#
# The donor CT behind every virtual radiograph, n = 1, in two slices that follow the spine; the vertebrae's cortex and
# trabeculae are modelled. Orange arrows: up; blue arrows: to the front (left panel) and the patient's left (right).
# ```
#
# A kyphosis is the angle between two bodies, here T5 and T12. A body with this angle, the donor's stature and girth,
# and neither curve nor unusual proportions *is* the donor, so a ray through it can be checked against the scan itself.

# %%
named = {body.name: body for body in bodies}
lean = {name: np.rad2deg(np.arctan2(b.up[1], b.up[2])) for name, b in named.items()}
kyphosis_deg = float(lean["T5"] - lean["T12"])
plain = {"stature": 1.0, "cobb_deg": 0.0, "curve_phase": 0.0, "curve_mm": 280.0, "lordosis_deg": 0.0,
         "kyphosis_deg": kyphosis_deg, "girth": 1.0, "bone": 1.0, "proportions": [1.0] * 2 * len(bodies)}  # fmt: skip
donor_shape = build_shape({"shape": plain}, bodies)
inside = (donor_shape.z_donor_mm > 20) & (donor_shape.z_donor_mm < 300)
assert np.allclose(donor_shape.z_patient_mm[inside], donor_shape.z_donor_mm[inside], atol=0.1)
print(f"the donor's kyphosis is {kyphosis_deg:.0f}°")

# %% [markdown]
# ## A ray through the donor
#
# The focal spot is {glue:text}`ca1-source` in front of the spine. A ray is the straight line from there through one
# point of the spine's plane. We sum along it by hand, with a sample every half millimetre. A voxel denser than water
# is partly bone: its bone fraction rises linearly with density up to cortical bone.

# %%
aim, SOURCE_MM = middle.centre_mm, acquisition.SOURCE_MM
focus = aim + np.array([0.0, SOURCE_MM, 0.0])  # y runs to the front
depth = np.arange(-200.0, 100.0, 0.5)  # mm from the spine's plane, negative in front of it


def along(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return soft tissue and bone, g/cm³, along the ray through a point of the spine's plane."""
    ray = focus[:, None] + (SOURCE_MM + depth) / SOURCE_MM * (point - focus)[:, None]
    density = density_at(*ray)
    bone = np.maximum(density - BONE_FROM, 0.0) / BONE_SPAN
    soft = np.minimum(density, BONE_FROM) * np.maximum(1.0 - bone, 0.0)
    return soft / 1000.0, 1.92 * bone


# %% [markdown]
# `Scene.paths` does this for all rays of an image, with a sample every {glue:text}`ca1-step` near the spine and every
# {glue:text}`ca1-far-step` elsewhere, on every other ray. Soft tissue is smooth: a tolerance of 2 % is enough. The
# cortex is thinner than a step, so a ray may count it twice or miss it; hence a tolerance of 0.2 g/cm². Over many rays
# such errors must cancel.

# %%
scene = Scene(donor, bodies, donor_shape)
view = View("AP", 0.0, aim, 101 * projection.GRID_MM, 101 * projection.GRID_MM, 0.0, False)  # 101 × 101 rays
paths = scene.paths(view, [])
differences = []
for row, column in [(r, 50) for r in range(0, 101, 10)] + [(50, c) for c in range(0, 101, 10)]:
    point = aim + projection.GRID_MM * np.array([column - 50, 0.0, 50 - row])
    soft, bone = (part.sum() * 0.05 for part in along(point))  # steps of 0.05 cm
    differences.append((paths.soft[row, column] / soft - 1, paths.bone[row, column] - bone))
worst_soft, worst_bone = np.abs(differences).max(axis=0)
assert worst_soft < 0.02 and worst_bone < 0.2
assert abs(np.mean([bone for _, bone in differences])) < 0.04

# %% tags=["hide-input", "remove-output"]
soft, bone = along(aim)
glue_values("ca1", {
    "worst-soft": f"{100 * worst_soft:.1f} %",
    "worst-bone": f"{worst_bone:.2f} g/cm²",
    "rays": len(differences),
    "source": f"{SOURCE_MM:.0f} mm",
    "grid": f"{projection.GRID_MM:g} mm",
    "step": f"{projection.STEP_MM:g} mm",
    "far-step": f"{projection.FAR_STEP_MM:g} mm",
    "ray-soft": f"{soft.sum() * 0.05:.1f} g/cm²",
    "ray-bone": f"{bone.sum() * 0.05:.1f} g/cm²",
})  # fmt: skip
fig, (ax1, ax2) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=[2.1, 1])
ax1.fill_between(depth, soft, color="#56B4E9", alpha=0.45, lw=0, label="soft tissue")
ax1.fill_between(depth, bone, color="#D55E00", lw=0, label="bone")
ax1.axvline(0, color="0.2", ls=":")
ax1.set(xlabel="along the ray from front to back, mm (0: the body's centre)", xlim=(-190, 90))
ax1.set(ylabel="density, g/cm³", ylim=(0, 1.9))
ax1.legend(loc="upper left")
half = 101 * projection.GRID_MM / 2
image = ax2.imshow(paths.bone, cmap="gray", extent=(-half, half, -half, half))
ax2.plot(0, 0, "o", ms=9, mfc="none", mec="#E69F00", mew=2)
ax2.set(xlabel="mm", title="bone on 101 × 101 rays")
ax2.grid(False)
fig.colorbar(image, ax=ax2, label="g/cm²")
show_figure("ca1-fig-ray", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-ray
# :name: fig:virtual-ray
# :alt: Density along one ray through chest and vertebra; beside it the bone on each ray of a small field.
#
# Left: density along one ray through the virtual patient, from the skin in front (left) to the skin behind. Right:
# $(\rho\ell)_{bone}$ of every ray of a small field; the ring marks the ray on the left.
# ```
#
# This ray passes through {glue:text}`ca1-ray-soft` of soft tissue and {glue:text}`ca1-ray-bone` of bone. Over
# {glue:text}`ca1-rays` rays, sums by hand and by the package differ by at most {glue:text}`ca1-worst-soft` for soft
# tissue and {glue:text}`ca1-worst-bone` for bone.
#
# ## A body from the donor
#
# A cohort starts as a *plan*: plain numbers for every patient, drawn from one seed. Nothing is rendered yet.

# %%
plans = plan_cohort(300, seed, bodies)
patient = plans[0]
print({k: v for k, v in patient.items() if k in ("age", "sex", "split")})
print({k: round(v, 2) for k, v in patient["shape"].items() if k != "proportions"})

# %% [markdown]
# Planning and rendering are separate, so we can take one plan and replace one number. Our standard patient has a
# plain body and is imaged without rotation or tilt. The patient's number seeds the random quanta, so images of the
# same patient have the *same* noise and differ only in what we change.

# %%
straight = patient["views"][0] | {
    "turn_deg": 0.0, "tilt_deg": 0.0, "aside_mm": 4.0, "height_mm": 160.0, "width_mm": 120.0,
    "aim_z_mm": float(aim[2]), "mirrored": False, "spacing_mm": spacing_mm, "shutter": None,
    "kvp": 80.0, "name": "LATERAL", "dose_ugy": 2.5, "scatter": 0.2, "grid_lines_px": 0.0,
    "contrast": 0.9, "detail": 1.9, "marker": False,
}  # fmt: skip


def render(name: str = "LATERAL", findings: list = (), body: dict | None = None, **exposure):
    """Render one radiograph of the standard patient with a few numbers changed."""
    shape = plain | (body or {})
    views = [straight | {"name": name} | exposure]
    return render_radiograph(patient | {"shape": shape, "views": views, "findings": list(findings)}, 0, anatomy)


# %% [markdown]
# Five numbers of a body, each at two values, with everything else equal:

# %%
CHANGES = [  # view, number, two values, title
    ("LATERAL", "stature", (0.90, 1.10), "stature × {:.2f}"),
    ("LATERAL", "kyphosis_deg", (15.0, 50.0), "kyphosis {:.0f}°"),
    ("AP", "cobb_deg", (0.0, 25.0), "Cobb angle {:.0f}°"),
    ("LATERAL", "bone", (0.5, 1.6), "bone × {:.1f}"),
    ("AP", "girth", (0.80, 1.25), "girth × {:.2f}"),
]
tall = {"height_mm": 215.0, "width_mm": 150.0, "aim_z_mm": 146.0, "spacing_mm": 0.5}
apex = {"curve_phase": -np.pi / 2 - 2 * np.pi * 146.0 / plain["curve_mm"]}  # in the field's middle
pairs = [[render(name, body=apex | {key: value}, **tall) for value in values]
         for name, key, values, _ in CHANGES]  # fmt: skip
exposures = [radiograph.mas for radiograph in pairs[-1]]
assert exposures[1] > 1.5 * exposures[0]  # more tissue, more exposure

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(2, 5, figsize=(11, 6.6))
for pair, (name, key, values, title), column in zip(pairs, CHANGES, axes.T, strict=True):
    for radiograph, value, ax in zip(pair, values, column, strict=True):
        show_radiograph(ax, 255 * radiograph.grey, f"{name}\n{title.format(value)}")
        changed_body = build_shape({"shape": plain | apex | {key: value}}, bodies)
        donor_z = [tall["aim_z_mm"], *(body.centre_mm[2] for body in bodies)]
        z = np.interp(donor_z, changed_body.z_donor_mm, changed_body.z_patient_mm)
        rows = radiograph.grey.shape[0] / 2 - (z[1:] - z[0]) / 0.5
        for body, row in zip(bodies, rows, strict=True):
            if body.name in ("T8", "T10", "T12"):
                ax.text(0, row, f"{body.name} –", ha="right", va="center", fontsize=8)
show_figure("ca1-fig-bodies", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-bodies
# :name: fig:virtual-bodies
# :alt: Five pairs; below, vertebrae are taller, the spine more bent, curved sideways, whiter, or the chest wider.
#
# Ten virtual radiographs of one patient, in five pairs that differ by one number of the body. Left of each: the heights
# of three vertebrae.
# ```
#
# In {numref}`fig:virtual-bodies`, twice the mineral does not give an image twice as white: each is scaled to its own
# range, and what changes is how well the vertebrae stand out. Nor is the wider patient's image brighter; automatic
# exposure control used {glue:text}`ca1-mas` times the milliampere-seconds.
#
# The numbers of a cohort come from measurements, where they exist: stature of women and men
# {cite}`ncdrisc2016`, the proportion of adults with a scoliosis {cite}`kebaish2011`, kyphosis, which grows with age
# {cite}`fon1980`, the spread of lordosis {cite}`vialle2005`, and spongy bone, which is lost with age
# {cite}`jang2019`. Girth, proportions and the rotation in a scoliosis are our choice.

# %% tags=["hide-input", "remove-output"]
drawn = pd.DataFrame([plan["shape"] | {"age": plan["age"], "sex": plan["sex"]} for plan in plans])
fig, axes = plt.subplots(2, 3, figsize=(10.5, 5.6))
for sex, name, colour, marker, hatch in (("F", "women", "#D55E00", "o", "//"), ("M", "men", "#0072B2", "^", "")):
    rows = drawn[drawn.sex == sex]
    bins = np.arange(0.86, 1.15, 0.02)
    axes[0, 0].hist(rows.stature, bins, color=colour, alpha=0.55, hatch=hatch, label=name)
    for ax, key in ((axes[0, 1], "kyphosis_deg"), (axes[0, 2], "bone")):
        ax.plot(rows.age, rows[key], marker, ms=3.5, color=colour, alpha=0.6, label=name)
axes[0, 0].set(xlabel="stature, donor = 1", ylabel="virtual patients")
axes[0, 1].set(xlabel="age, years", ylabel="kyphosis T5–T12, °")
axes[0, 2].set(xlabel="age, years", ylabel="trabecular bone, normal at 50 = 1")
axes[0, 0].legend(fontsize=9)
for ax, values, label, bins in (
    (axes[1, 0], drawn.cobb_deg.abs(), "Cobb angle, °", np.arange(0, 36, 1)),
    (axes[1, 1], drawn.lordosis_deg, "lordosis relative to the donor, °", 20),
    (axes[1, 2], drawn.girth, "girth, donor = 1", 20),
):
    ax.hist(values, bins, color="0.55")
    ax.set(xlabel=label, ylabel="virtual patients")
axes[1, 0].axvline(10, color="black", ls="--")
axes[1, 0].annotate("scoliosis", (10.5, axes[1, 0].get_ylim()[1] * 0.85))
show_figure("ca1-fig-plans", fig)
curved = f"{100 * (drawn.cobb_deg.abs() >= 10).mean():.0f} %"
glue_values("ca1", {"mas": f"{exposures[1] / exposures[0]:.1f}", "scoliosis": curved})

# %% [markdown]
# ```{glue:figure} ca1-fig-plans
# :name: fig:virtual-plans
# :alt: Histograms of stature, Cobb angle, lordosis and girth; kyphosis rising and bone falling with age.
#
# Bodies of n = 300 planned virtual patients. Nothing was rendered for this figure. {glue:text}`ca1-scoliosis` have a
# curve of 10° or more (dashed).
# ```
#
# Age shapes kyphosis and bone. If the patients with findings were also older, a network could infer the label from
# the bone and ignore the lesions. So age and body must be drawn independently of the findings. There is a stricter
# test than comparing two means: in a cohort of another size, different patients get lesions. They must keep their
# age, sex and body to the last digit.

# %%
others = plan_cohort(240, seed, bodies)
changed = 0
for one, other in zip(plans, others, strict=False):
    assert all(one[key] == other[key] for key in ("age", "sex", "shape"))
    changed += bool(one["findings"]) != bool(other["findings"])
assert changed > 50
print(f"{changed} of {len(others)} patients have findings in only one cohort, and the same age and body in both")

# %% [markdown]
# In people, age and degeneration are correlated. Leaving this out makes the cohort less like a clinic, but a network
# can then learn the labels from the lesions only.
#
# ## Seven lesions in three dimensions
#
# A lesion consists of a few functions of position. Three types *move* tissue: for each position in the patient they
# give the position in the donor where its tissue is found. A narrowed disc brings the endplates nearer; a collapsed
# body lowers its upper wall; a slip moves a body forward. Four types *fill* a region with another density: the bone
# of a spur or of a facet, a sclerotic or lytic focus, titanium. Each grows from nothing with its severity, by
# clinical grades where they exist: up to nearly half of a body's height in a collapse {cite}`genant1993`, up to half
# of the depth in a slip, which are Meyerding's grades I and II {cite}`meyerding1932`.

# %%
FINDINGS = {  # type: form, severity, further numbers
    "Disc space narrowing": ("narrowed", severity, {}),
    "Vertebral collapse": ("wedge", severity, {}),
    "Spondylolysthesis": ("slip", severity, {}),
    "Osteophytes": ("claw", severity, {"upper": True, "angle": 0.0}),
    "Foraminal stenosis": ("bony", severity, {}),
    "Surgical implant": ("screws", 1.0, {"count": 2}),
    "Other lesions": ("sclerotic", severity, {"place": [0.0, 0.2, 0.0]}),
}


def finding(lesion_type: str, **other) -> dict:
    """Return one planned finding at the middle level."""
    form, how_severe, more = FINDINGS[lesion_type]
    planned = {"type": lesion_type, "form": form, "level": bodies.index(middle), "severity": how_severe}
    return planned | more | other


# %% [markdown]
# From nothing: at severity 0 the image must equal the healthy patient's in every bit, and there must be no
# counterfactual (the same image without the lesion). A shape that left a rim or a smoothed edge behind would reveal a
# label's position. And growing: the visibility, defined in a later section, must rise with the severity. A rendered
# radiograph holds its counterfactuals, one per finding, in the attribute `counterfactuals`.

# %%
healthy = render()
for name in FINDINGS:
    if name != "Surgical implant":  # metal has no severity
        radiograph = render(findings=[finding(name, severity=0.0)])
        assert radiograph.counterfactuals == [None] and np.array_equal(radiograph.grey, healthy.grey)
rising = {}
for name in ("Disc space narrowing", "Vertebral collapse", "Osteophytes"):
    series = [render(findings=[finding(name, severity=s)]) for s in (0.4, 0.7, 1.0)]
    rising[name] = [radiograph.counterfactuals[0].visibility for radiograph in series]
    assert rising[name] == sorted(rising[name])
pd.DataFrame(rising, index=["severity 0.4", "0.7", "1.0"]).T.round(2)

# %% [markdown]
# All seven follow: the changed tissue in a slice, the healthy patient's radiograph, the one with the lesion and its
# computed box, and the difference that is stored with the image.


# %%
def tissue(group: list, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple:
    """Return density and occupancy of a finding at positions of the patient in donor mm."""
    points = tuple(torch.from_numpy(p) for p in (x, y, z))
    for lesion in group:
        points = lesion.move(points) if lesion.move else points
    density, occupancy = density_at(*(p.numpy() for p in points)), [np.zeros(x.shape)]
    for lesion in group:
        occupancy.append(lesion.region(points).numpy())
        filled = 4500.0 if lesion.metal else lesion.fill
        density += 0.0 if filled is None else occupancy[-1] * (filled - density)
    return density, np.max(occupancy, axis=0)


# %% tags=["hide-input", "remove-output"]
ASIDE_MM = {"Foraminal stenosis": 0.36 * middle.width_mm, "Surgical implant": 0.3 * middle.width_mm}
SIDE_MM = 84.0  # of a panel


def draw_lesions(key: str, names: list) -> None:
    """Draw a row of four panels per lesion type."""
    fig, axes = plt.subplots(len(names), 4, figsize=(9.6, 2.55 * len(names)))
    u, v = np.meshgrid(np.arange(-SIDE_MM / 2, SIDE_MM / 2, 0.5), np.arange(SIDE_MM / 2, -SIDE_MM / 2, -0.5))
    for row, name in zip(axes, names, strict=True):
        group = build_finding(finding(name), bodies, anatomy.discs)
        x, y, z = np.mean([lesion.centre_mm for lesion in group], axis=0)
        slice_ = tissue(group, np.full(u.shape, x + ASIDE_MM.get(name, 0.0)), y + u, z + v)
        row[0].set_title(f"{name}\n{group[0].form}, {group[0].level}: tissue", fontsize=9)
        offset = np.array([y - aim[1] - straight["aside_mm"], z - straight["aim_z_mm"]]) / spacing_mm
        radiograph = render(findings=[finding(name)])
        image = draw_lesion(row, name, slice_, healthy.grey, radiograph, offset, SIDE_MM, spacing_mm)
    bar = fig.colorbar(image, ax=axes[:, 3], shrink=0.6)
    bar.set_label("grey with lesion minus grey without; grey runs from 0 to 1")
    show_figure(key, fig)


draw_lesions("ca1-fig-moving", list(FINDINGS)[:3])
draw_lesions("ca1-fig-filling", list(FINDINGS)[3:])
glue_values("ca1", {"severity": f"{severity:g}"})

# %% [markdown]
# ```{glue:figure} ca1-fig-moving
# :name: fig:virtual-moving
# :alt: A narrowed disc, a wedge and a slip: tissue, radiograph without and with the lesion, and difference.
#
# The three lesions that move tissue, at severity {glue:text}`ca1-severity`, in lateral virtual radiographs (front on
# the right). Outlined in the slice: the region that a reader would call the lesion. Last column: orange is brighter
# with the lesion, purple is darker.
# ```
#
# ```{glue:figure} ca1-fig-filling
# :name: fig:virtual-filling
# :alt: The same for a spur, a foraminal stenosis, screws and a sclerotic focus; differences are of one colour.
#
# The four lesions that fill a region, as in {numref}`fig:virtual-moving`; the screws have no severity. The slices of
# the stenosis and of the screws lie to the side of the midline. Virtual radiographs.
# ```
#
# The first three change the image along *edges*: what has moved has left one position and arrived at another, and the
# slip also carries the tissue above it. The other four change only the region they fill. How visible a lesion is
# depends on its severity, but also on the view and on the anatomy in front of and behind it. So we show the same spur
# at four severities, from three sides:

# %% tags=["hide-input", "remove-output"]
SEVERITIES = (0.12, 0.35, 0.65, 1.0)
fig, axes = plt.subplots(3, 4, figsize=(9.6, 7.4))
labelled, visibility = {}, {}
for row, name in zip(axes, ("LATERAL", "AP", "LPO"), strict=True):
    for ax, how_severe in zip(row, SEVERITIES, strict=True):
        radiograph = render(name, [finding("Osteophytes", severity=how_severe)])
        key, counterfactual = (name, how_severe), radiograph.counterfactuals[0]
        visibility[key] = counterfactual.visibility if counterfactual else 0.0
        labelled[key] = draw_label(ax, "Osteophytes", counterfactual, spacing_mm)
        ends = f"visibility {visibility[key]:.2f}" + ("" if labelled[key] else ": no label")
        show_radiograph(ax, 255 * radiograph.grey, f"{name}, severity {how_severe:g}\n{ends}")
        ax.title.set_fontsize(9)
        height, width = radiograph.grey.shape
        ax.set(xlim=(width / 2 - 110, width / 2 + 110), ylim=(height / 2 + 90, height / 2 - 110))
show_figure("ca1-fig-sheet", fig)
for name in ("LATERAL", "AP", "LPO"):
    assert visibility[name, SEVERITIES[0]] < visibility[name, SEVERITIES[-1]]
assert visibility["AP", SEVERITIES[0]] < visibility["LATERAL", SEVERITIES[0]]
glue_values("ca1", {"labelled": sum(labelled.values())})

# %% [markdown]
# ```{glue:figure} ca1-fig-sheet
# :name: fig:virtual-sheet
# :alt: Twelve radiographs of one front spur, three views by four severities; some have a box, others no label.
#
# One claw osteophyte at the front of a body, at four severities (columns) in three views (rows). A box is drawn where
# the finding would be labelled. n = 12 virtual radiographs, of which {glue:text}`ca1-labelled` have a label.
# ```
#
# The smallest spur is less visible from the front, where its own vertebra lies behind it, than from the side. This is
# one reason why a study has more than one view. And the cohort labels only what can be seen: its threshold is a
# visibility, not a severity.
#
# ## From photons to the displayed image
#
# The radiation behind the patient is not yet an image. Scatter from all sides adds a haze, the focal spot is not a
# point, and the grid in front of the detector may leave lines. Finally, quanta are counted. We take the steps by hand
# and compare with `expose`, at a dose so high that counting noise vanishes.

# %%
FOCUS_MM, SCINTILLATOR_MM = acquisition.FOCUS_MM, acquisition.SCINTILLATOR_MM  # blurs
shape = build_shape({"shape": plain}, bodies)
view = View("LATERAL", np.pi / 2, aim + np.array([0.0, 4.0, 0.0]), 160.0, 120.0, 0.0, False)
rays = Scene(donor, bodies, shape).paths(view, [])
rays = Paths(*(cv2.resize(p, (300, 400), interpolation=cv2.INTER_LINEAR) for p in vars(rays).values()))
arrived, px_mm, scatter = transmission(rays, kvp), 0.4, 0.2
haze = cv2.GaussianBlur(arrived, (0, 0), 25.0 / px_mm, borderType=cv2.BORDER_REFLECT)
hazy = (arrived + scatter * haze) / (1 + scatter)
sharp = cv2.GaussianBlur(hazy, (0, 0), FOCUS_MM / px_mm)
by_hand = cv2.GaussianBlur(sharp / sharp.mean(), (0, 0), SCINTILLATOR_MM / px_mm)
quiet = expose(arrived, px_mm, 1e6, scatter, 0.0, np.random.default_rng(seed))
assert np.abs(quiet / by_hand - 1).max() < 0.02

# %% [markdown]
# Quanta arrive one by one and follow a Poisson distribution: where $n$ are expected, their standard deviation is
# $\sqrt{n}$, so the *relative* noise falls as $1/\sqrt{n}$. We expose a uniform field at four doses. The number of
# quanta per pixel follows from the dose and from the pixel's area *at the detector*, which the cone of the beam has
# enlarged; the scintillator's blur then averages over neighbours.

# %%
doses = np.array([0.5, 1.0, 2.0, 4.0])  # µGy; the cohort's images have 0.8 to 4
quanta = doses * acquisition.QUANTA * (px_mm * acquisition.DETECTOR_MM / SOURCE_MM) ** 2  # per pixel, expected
rng = np.random.default_rng(seed)
even = np.full((400, 400), 0.02)
noise = np.array([expose(even, px_mm, dose, scatter, 0.0, rng).std() for dose in doses])
point = np.zeros((21, 21))
point[10, 10] = 1.0
averaged = np.sqrt((cv2.GaussianBlur(point, (0, 0), SCINTILLATOR_MM / px_mm) ** 2).sum())
assert np.allclose(noise, averaged / np.sqrt(quanta), rtol=0.02)
print(pd.DataFrame({"dose, µGy": doses, "quanta per pixel": quanta.round(), "noise": noise.round(4)}))

# %% [markdown]
# Four times the dose halves the noise, within 2 %. Display processing comes last: the negative logarithm, so that
# thickness adds; less of the slow variation, so that bright and dark parts are visible together; more of the detail
# between 1 and 8 mm; and an S-shaped tone curve. By hand, without the special treatment of metal in
# `DisplayProcessing`, since there is none here:

# %%
signal = expose(arrived, px_mm, 2.5, scatter, 0.0, np.random.default_rng(seed))
processed = DisplayProcessing(signal, px_mm, contrast=0.9, detail=1.9)


def smooth(image: np.ndarray, mm: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), mm / px_mm, borderType=cv2.BORDER_REFLECT)


dense = -np.log(signal)
slow = smooth(dense, acquisition.SLOW_MM)
less = dense - acquisition.SLOW * (slow - slow.mean())
detailed = less + 1.9 * (smooth(dense, 0.8) - smooth(dense, 5.0))
low, high = np.percentile(detailed, (2, 90))
high += 0.25 * (high - low)
scaled = 2 * (detailed - low) / (high - low) - 1
toned = np.clip(0.5 + 0.5 * np.tanh(0.9 * scaled) / np.tanh(0.9), 0, 1)
assert np.abs(toned - processed.grey).mean() < 0.01

# %% tags=["hide-input", "remove-output"]
few = expose(arrived, px_mm, 0.05, scatter, 0.0, np.random.default_rng(seed))
lined = expose(arrived, px_mm, 2.5, scatter, 4.3, np.random.default_rng(seed))
whole, close = np.s_[:, :], np.s_[130:230, 70:145]
steps = [
    (arrived, "1 what arrives", whole), (sharp, "2 with scatter and blur", whole),
    (signal, "3 counted, 2.5 µGy", close), (few, "counted, 0.05 µGy", close),
    (lined, "with grid lines", close), (dense, "4 logarithm", whole),
    (less, "5 slow variation reduced", whole), (detailed, "6 detail enhanced", whole),
    (toned, "7 tone curve", whole),
]  # fmt: skip
fig, axes = plt.subplots(2, 5, figsize=(11.4, 6.4))
for ax, (image, title, part) in zip(axes.flat, steps, strict=False):
    low_high = np.percentile(image[part], (1, 97)) if image is not toned else (0, 1)
    ax.imshow(image[part], cmap="gray", vmin=low_high[0], vmax=low_high[1])
    ax.set_title(title, fontsize=10)
    ax.set_axis_off()
ax = axes.flat[-1]
ax.loglog(quanta, noise, "o", color="#0072B2", label="measured")
ax.loglog(quanta, averaged / np.sqrt(quanta), "-", color="0.25", label="square-root law")
ax.set_xticks(quanta, [f"{dose:g}" for dose in doses])
ax.set_yticks(noise, [f"{100 * n:.2f}" for n in noise])
ax.minorticks_off()
ax.set(xlabel="dose, µGy", title="noise, %")
ax.title.set_fontsize(10)
ax.legend(fontsize=8)
show_figure("ca1-fig-steps", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-steps
# :name: fig:virtual-steps
# :alt: Nine stages of one lateral image from transmitted photons to final tones; noise falling with dose.
#
# The stages of one lateral virtual radiograph, panels 1 to 7. Panel 3 and the two next to it are close-ups; these two
# show a dose that is far too low, and a stationary grid. Each panel has its own grey range. Last: relative noise of a
# uniform field at four doses, and the square-root law.
# ```
#
# ## The ground truth of an image
#
# In a real radiograph, a radiologist draws a box. Here the ground truth is computed, in four parts. The *mask* is the
# lesion's shadow, to the {glue:text}`ca1-grid` between rays; for moved tissue it is, by convention, the region
# concerned. The *counterfactual* is the same image, with the same quanta, without this one finding. The *visibility*
# measures how strongly the two differ, as the contrast-to-noise ratio that has described the eye's detection
# threshold since Rose {cite}`rose1948`:
#
# $$
# \mathrm{CNR} = \frac{\sqrt{\frac{1}{|\mathcal{Q}|} \sum_{p \in \mathcal{Q}} \Delta(p)^2}}
#                     {\operatorname{sd}_{p \in \mathcal{R}}\, G(p)} ,
# $$ (eq:visibility)
#
# where $\Delta$ is the image minus its counterfactual, $G$ the counterfactual, $\mathcal{Q}$ the quarter of the mask
# that changes most (edges attract the eye), and $\mathcal{R}$ the mask with a margin of 3 mm. All of it can be
# computed from the image, its counterfactual and the mask:

# %%
radiograph = render(findings=[finding("Vertebral collapse", severity=0.8)])
counterfactual = radiograph.counterfactuals[0]
mask = counterfactual.mask
Delta = np.zeros(radiograph.grey.shape)
Delta[counterfactual.part] = -counterfactual.change
G = radiograph.grey - Delta
Q = np.sort(np.abs(Delta[mask]))[-(mask.sum() // 4) :]
px = 2 * round(3.0 / spacing_mm) + 1
R = cv2.dilate(mask.astype(np.uint8), np.ones((px, px), np.uint8)) > 0
cnr = np.sqrt((Q**2).mean()) / G[R].std()
assert np.isclose(cnr, counterfactual.visibility, rtol=1e-3)

# %% tags=["hide-input", "remove-output"]
glue_values("ca1", {"cnr": f"{cnr:.2f}", "seen": f"{LEAST_VISIBILITY:g}"})
fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.9))
show_radiograph(axes[0], 255 * radiograph.grey, "image, mask and box")
axes[0].contour(mask, [0.5], colors=["#56B4E9"], linewidths=1.5)
draw_label(axes[0], "Vertebral collapse", counterfactual, spacing_mm)
show_radiograph(axes[1], 255 * G, "counterfactual G, region R")
axes[1].contour(R, [0.5], colors=["#E69F00"], linestyles="--", linewidths=1.5)
image = draw_difference(axes[2], Delta, "difference Δ, quarter Q")
axes[2].contour(mask & (np.abs(Delta) >= Q[0]), [0.5], colors=["black"], linewidths=0.8)
fig.colorbar(image, ax=axes[2], label="grey, from 0 to 1", shrink=0.8)
rows, columns = (np.flatnonzero(R.any(axis=i)) for i in (1, 0))
for ax in axes:
    ax.set(xlim=(columns[0] - 40, columns[-1] + 40), ylim=(rows[-1] + 50, rows[0] - 50))
show_figure("ca1-fig-truth", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-truth
# :name: fig:virtual-truth
# :alt: A wedged vertebra with mask and box, its counterfactual, and their difference with one quarter outlined.
#
# The ground truth of one finding in a lateral virtual radiograph, severity 0.8. Blue: mask; red, dash-dotted: box;
# orange, dashed: $\mathcal{R}$; black, at the right: $\mathcal{Q}$.
# ```
#
# Here {eq}`eq:visibility` gives {glue:text}`ca1-cnr`. A finding is labelled in a view if its visibility is at least
# {glue:text}`ca1-seen` and at least half of its shadow is inside the image. Otherwise it has no box, and a detector
# that finds it is charged with a false positive. The fourth part is the box: the mask's bounding box with a margin,
# because annotators draw slightly outside the lesion. Now we write all of it as a cohort does, and read it back.

# %%
planned = patient | {"views": [straight]}
ids = {key: f"{number:032x}" for number, key in enumerate(("study_id", "series_id", "image_id"))}
with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    (root / "twins").mkdir()  # a cohort's folder of counterfactuals
    write_dicom(root / "image.dicom", radiograph.grey, planned, 0, ids, radiograph.mas)
    write_counterfactuals(root / "twins" / f"{ids['image_id']}.npz", radiograph.counterfactuals)
    grey = read_radiograph(root / "image.dicom").pixels
    (read,) = read_counterfactuals(root, ids["image_id"])  # one entry per finding
assert np.array_equal(read.mask, mask) and read.visibility == counterfactual.visibility
assert np.abs(read.without(grey) / 255.0 - np.clip(G, 0, 1)).max() < 0.008  # two greys of 255

# %% [markdown]
# So for any image of a virtual cohort, `read_counterfactuals(workspace.data_root, image_id)` returns one
# counterfactual per finding of its study, in the manifest's order, and `Counterfactual.without(grey)` the image
# without that finding. It allows a test that no reader study can offer: *what would the network have predicted for
# exactly this image without this lesion?*
#
# ## What these images can and cannot stand for
#
# The {doc}`data card <../book/data_card>` lists it in full. In short: these images can test every step from file to
# score, and answer questions of physics (superposition, noise, magnification). They cannot show how a network
# performs on patients. A radiologist who reads them would object to several things:
#
# - There is one donor, perhaps with lesions. All patients share the ribs, heart and vessels, though
#   deformed. The neck and L3 to S1 are missing.
# - The lesions are clean. A real spur is accompanied by sclerosis, gas in a disc and a dozen neighbours; a real
#   collapse breaks the cortex. Slips, stenosis and implants are commonest at the missing levels.
# - The CT was taken of a person lying down, with voxels larger than a trabecula: the texture of bone is invented.
# - Scatter is a blur, the beam has three energies, and the display processing is one recipe out of many.
# - Radiologists disagree with one another; a computed box has no second reader.
#
# ## Exercises
#
# ```{exercise} Half-value layer, by hand
# :label: ex-virtual-half
#
# Photons of 60 keV pass through water ($\mu/\rho$ = 0.2059 cm²/g). Which thickness stops half of them? How many such
# layers are 20 cm, and what fraction is left? Why is the fraction for the beam of this chapter not the same?
# ```
#
# ```{solution-start} ex-virtual-half
# :class: dropdown
# ```
#
# $\ell = \ln 2 / 0.2059 = 3.37$ cm; 20 cm are 5.94 layers, and $2^{-5.94} = 1.6$ % is left. The beam also has photons
# of 40 keV, of which hardly any pass, and of 80 keV, of which more do. The sum of exponentials in
# {eq}`eq:beer-lambert` is not the exponential of the mean energy.

# %%
layer = np.log(2) / WATER[1]
assert np.isclose(0.5 ** (20 / layer), np.exp(-WATER[1] * 20))
print(f"{layer:.2f} cm, {20 / layer:.2f} layers, {0.5 ** (20 / layer):.3f}; the beam: {fraction:.3f}")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A focus in young and in old bone
# :label: ex-virtual-bone
#
# Render a sclerotic focus of severity 0.6 in bodies with a bone mineral of 0.5, 1 and 1.6. Does its visibility grow or
# fall with the mineral around it? Predict the result before you run it.
# ```
#
# ```{solution-start} ex-virtual-bone
# :class: dropdown
# ```
#
# New bone has a density of its own. The more mineral there is around it, the less it adds, and denser structures
# around it count as noise besides. Both make it fainter in dense bone:

# %%
focus_only = [finding("Other lesions", severity=0.6)]
minerals = (0.5, 1.0, 1.6)
seen = [render(findings=focus_only, body={"bone": b}).counterfactuals[0].visibility for b in minerals]
assert seen[0] > seen[-1]
print(*(f"bone × {b}: visibility {v:.2f}" for b, v in zip(minerals, seen, strict=True)), sep="\n")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Dose and the small spur
# :label: ex-virtual-dose
#
# Set `severity = 0.3` in the parameters cell and run the chapter again. Which lesions of {numref}`fig:virtual-moving`
# and {numref}`fig:virtual-filling` fall below the visibility threshold of a label? Would a higher dose bring them
# back? Try 0.2, 2 and 20 µGy with a small spur.
# ```
#
# ```{solution-start} ex-virtual-dose
# :class: dropdown
# ```

# %%
small = [finding("Osteophytes", severity=0.3)]
at_dose = [render(findings=small, dose_ugy=dose).counterfactuals[0].visibility for dose in (0.2, 2.0, 20.0)]
print([f"{v:.2f}" for v in at_dose])
assert abs(at_dose[2] / at_dose[0] - 1) < 0.15

# %% [markdown]
# A hundred times the dose hardly changes the visibility. In a chest radiograph the "noise" that hides a spur is
# anatomy: ribs, vessels, the edge of its own vertebra. It does not decrease with dose.
#
# ```{solution-end}
# ```
#
# ```{exercise} Who decides what can be seen?
# :label: ex-virtual-seen
#
# The visibility threshold of a label was chosen by the makers of the cohort. What happens to a detector's average
# precision on this cohort if it is lowered by a third, and what if it is raised? Which experiment with radiologists
# would give the number a firmer basis?
# ```
#
# ```{solution} ex-virtual-seen
# :class: dropdown
#
# A lower threshold adds boxes that neither a reader nor a detector can find: recall falls, and so does average
# precision, while the detector is the same. A higher one removes the labels of visible lesions, and detections of
# them count as false positives. Either way a score on this cohort partly reflects the threshold. An observer study
# would show images and counterfactuals in random order to several readers, ask at each position "lesion or not", and
# take the visibility at which they are right in, say, three of four cases. Since the counterfactual is otherwise the
# same image, nothing else differs, which real radiographs never allow.
# ```
#
# ## Takeaways
#
# - A radiograph is a sum along rays and an exponential. Both can be done by hand, and agree with the package to a few
#   per cent of one ray.
# - Bodies, lesions and exposures are plain numbers in a plan. Age and body are drawn independently of the findings,
#   so the label cannot be inferred from them.
# - Lesions move tissue or fill it, and grow from nothing; at severity 0 not one bit of the image changes.
# - Each finding comes with mask, counterfactual, visibility and box, and what is not visible in a view is not
#   labelled there.
# - None of this makes the images evidence about patients. They show whether a method runs, learns, and is right about
#   the lesions that were simulated.

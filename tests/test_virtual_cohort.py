"""A whole virtual cohort: its frequencies, its files, and no shortcut to its labels.

The cohort is made once for this file, large enough for its frequencies; that takes some minutes.
"""

import os
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from scipy import stats as scipy_stats
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedGroupKFold
from smoke import shared
from torch import nn

from dernet_utils.core.vocabulary import LESION_TYPES
from dernet_utils.dataset.check import check_dataset
from dernet_utils.dataset.tables import Dataset, read_dataset, read_manifest
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.metrics.classification import auroc
from dernet_utils.metrics.intervals import bootstrap_by_study
from dernet_utils.virtual import cohort
from dernet_utils.virtual.counterfactual import images_with_faint_findings
from dernet_utils.virtual.faint import faint_boxes
from dernet_utils.virtual.render import ANGLES

pytestmark = pytest.mark.slow
PATIENTS, SEED = 365, 2027  # not the seed of any profile
# Boxes per class in VinDr-SpineXR's training split (Nguyen et al., MICCAI 2021).
PUBLISHED = pd.Series(dict(zip(LESION_TYPES, (924, 387, 12_562, 280, 429, 268, 248), strict=True)))
AGE = 16 + 3 + 16 + 7  # column of the features
SIZE = (96, 64)  # of a masked image for the small network, px


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        cohort.write_cohort(folder / "cohort", PATIENTS, SEED, os.cpu_count() or 1)

    return shared(tmp_path_factory, "many", make) / "cohort"


@pytest.fixture(scope="module")
def dataset(root: Path) -> Dataset:
    return read_dataset(root)


@pytest.fixture(scope="module")
def radiographs(root: Path, dataset: Dataset) -> pd.DataFrame:
    """One row per image: the dataset's columns, and the manifest's facts."""
    rows = [
        {"image_id": image["image_id"], "age": study["age"], "sex": study["sex"],
         "metal": any(f["type"] == "Surgical implant" for f in study["findings"]),
         "bone": study["shape"]["bone"], "views": len(study["views"]), **view}
        for study in read_manifest(root)["studies"]
        for view, image in zip(study["views"], study["films"], strict=True)
    ]  # fmt: skip
    return dataset.images.merge(pd.DataFrame(rows), on="image_id", validate="one_to_one")


# Frequencies ------------------------------------------------------------------------------------


def test_about_half_of_the_images_show_a_finding(dataset):
    assert 0.45 <= dataset.images.abnormal.mean() <= 0.53


def test_images_whose_findings_are_all_faint_have_no_box(root, dataset):
    faint = dataset.images.image_id.isin(images_with_faint_findings(read_manifest(root)))
    assert 0 < faint.sum() < (~dataset.images.abnormal).sum()
    assert not dataset.images.abnormal[faint].any()


def test_each_unlabelled_finding_within_the_field_has_an_ignored_box(root, dataset):
    manifest, ids = read_manifest(root), dataset.images.image_id
    ignored = faint_boxes(root, manifest, ids)
    unlabelled = sum(
        seen["visibility"] is not None and seen["box"] is None
        for study in manifest["studies"]
        for image in study["films"]
        for seen in image["findings"]
    )
    assert len(ignored) == unlabelled > 0
    sizes = dataset.images.set_index("image_id").loc[ignored.image_id]
    assert (ignored[["xmin", "ymin"]].to_numpy() >= 0).all()
    assert (ignored.xmax.to_numpy() <= sizes.width).all()
    assert (ignored.ymax.to_numpy() <= sizes.height).all()
    assert (ignored.xmin < ignored.xmax).all() and (ignored.ymin < ignored.ymax).all()
    few = ids[:9]
    pd.testing.assert_frame_equal(
        faint_boxes(root, manifest, few), ignored[ignored.image_id.isin(few)].reset_index(drop=True)
    )
    assert faint_boxes(root, None, ids).empty


def test_each_type_is_as_frequent_as_in_the_published_training_split(dataset):
    """Each published fraction lies in our fraction's 99 % interval, whole studies resampled."""
    published = PUBLISHED / PUBLISHED.sum()
    types, studies = dataset.boxes.lesion_type.to_numpy(), dataset.boxes.study_id.to_numpy()
    for name in LESION_TYPES:
        ours = bootstrap_by_study(
            lambda rows, of=(types == name): of[rows].mean(), studies, 1000, level=0.99
        )
        assert ours.low <= published[name] <= ours.high, f"{name}: {ours}, {published[name]}"


def test_the_imbalance_is_the_papers(dataset):
    """46.9 : 1 from osteophytes to collapses lies in our ratio's 95 % interval."""
    types = dataset.boxes.lesion_type.to_numpy()

    def ratio(rows: np.ndarray) -> float:
        drawn = types[rows]
        return (drawn == "Osteophytes").sum() / max((drawn == "Vertebral collapse").sum(), 1)

    found = bootstrap_by_study(ratio, dataset.boxes.study_id.to_numpy(), 1000)
    assert found.low <= 46.9 <= found.high, str(found)


def test_lesions_are_small(dataset):
    boxes = dataset.boxes.merge(dataset.images[["image_id", "dicom_path"]], on="image_id")
    paths = boxes.dicom_path.unique()
    headers = {path: pydicom.dcmread(path, stop_before_pixels=True) for path in paths}
    pixels = boxes.dicom_path.map({path: h.Rows * h.Columns for path, h in headers.items()})
    area = (boxes.xmax - boxes.xmin) * (boxes.ymax - boxes.ymin) / pixels
    assert area.median() < 0.01
    spurs = area[boxes.lesion_type == "Osteophytes"]
    assert spurs.quantile(0.05) < 0.004 and spurs.quantile(0.95) > 0.015, "of many sizes"


def test_studies_and_images_vary_as_the_dataset_does(radiographs):
    per_study = radiographs.groupby("study_id").size()
    assert per_study.min() == 1 and per_study.max() == 4
    assert per_study.mean() == pytest.approx(8389 / 4000, abs=0.15)
    assert set(radiographs.name) == set(ANGLES)
    assert radiographs.spacing_mm.min() < 0.22 and radiographs.spacing_mm.max() > 0.45
    assert 0 < (radiographs.grid_lines_px > 0).mean() < 0.08


def test_the_body_does_not_depend_on_the_lesions(radiographs):
    people = radiographs.drop_duplicates("study_id")
    ill = people.study_id.isin(radiographs.study_id[radiographs.abnormal])
    for column in ("age", "bone"):
        one, other = people[column][ill], people[column][~ill]
        assert scipy_stats.mannwhitneyu(one, other).pvalue > 0.01, column


# Files ------------------------------------------------------------------------------------------


def test_the_check_finds_no_problem(root):
    assert check_dataset(root).problems == []


def test_dciodvfy_finds_no_error_in_an_image_of_each_encoding(radiographs):
    sample = radiographs.groupby(["photometric", "bits", "syntax", "voi", "name"]).head(1)
    errors = {}
    for path in sample.dicom_path:
        found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
        words = found.stdout + found.stderr
        assert "XImage" in words or "CRImage" in words, words
        if "Error" in words:
            errors[path] = words
    assert not errors, errors


# No shortcut ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(radiographs: pd.DataFrame, dataset: Dataset) -> pd.DataFrame:
    """Abnormal images without metal, and as many normal ones that get the same boxes.

    Each abnormal image is paired with a normal one that was taken alike: view, mirroring, and the
    nearest height of the beam.
    """
    radiographs = radiographs[~radiographs.metal].reset_index(drop=True)
    boxes = dict(iter(dataset.boxes.groupby("image_id")))
    rows, rng = [], np.random.default_rng(1)
    for _, alike in radiographs.groupby(["name", "mirrored"]):
        normal = alike[~alike.abnormal]
        abnormal = alike[alike.abnormal]
        for index in rng.permutation(len(abnormal))[: len(normal)]:
            image = abnormal.iloc[index]
            nearest = (normal.aim_z_mm - image.aim_z_mm).abs().idxmin()
            shared = {"places": _places(boxes[image.image_id], image), "pair": len(rows)}
            rows += [one.to_dict() | shared for one in (image, normal.loc[nearest])]
            normal = normal.drop(nearest)
    return pd.DataFrame(rows)


def _places(boxes: pd.DataFrame, image: pd.Series) -> np.ndarray:
    """Return boxes as fractions of their image, (n, 4)."""
    width, height = (image[side] / image.spacing_mm for side in ("width_mm", "height_mm"))
    return boxes[["xmin", "ymin", "xmax", "ymax"]] / [width, height, width, height]


def _masked(image: pd.Series) -> np.ma.MaskedArray:
    """Read an image and cover the boxes."""
    grey = read_radiograph(image.dicom_path).pixels
    cover = np.zeros(grey.shape, bool)
    for x0, y0, x1, y1 in image.places.to_numpy() * [*grey.shape[::-1], *grey.shape[::-1]]:
        cover[max(int(y0), 0) : int(np.ceil(y1)), max(int(x0), 0) : int(np.ceil(x1))] = True
    return np.ma.MaskedArray(grey, cover)


def _features(image: pd.Series, seen: np.ma.MaskedArray) -> list[float]:
    """Describe an image by everything but what lies in its boxes."""
    header = pydicom.dcmread(image.dicom_path, stop_before_pixels=True)
    outside = seen.compressed().astype(float)
    histogram = np.histogram(outside, 16, (0, 256))[0] / outside.size
    rough = np.ma.MaskedArray(cv2.Laplacian(seen.data.astype(float), cv2.CV_64F), seen.mask)
    strip, corner = (max(2, s // 20) for s in (min(seen.shape), min(seen.shape)))
    strips = [seen[:strip], seen[-strip:], seen[:, :strip], seen[:, -strip:]]
    corners = [seen[a, b] for a in (slice(corner), slice(-corner, None))
               for b in (slice(corner), slice(-corner, None))]  # fmt: skip
    places = [float(np.ma.filled(f(part), 0.0)) for part in [*strips, *corners]
              for f in (np.ma.mean, np.ma.std)]  # fmt: skip
    codes = [header.file_meta.TransferSyntaxUID, header.PhotometricInterpretation, header.Modality,
             header.ViewPosition, header.PatientSex, str(header.get("WindowCenter", "")) == "",
             header.get("Grid", ""), "VOILUTSequence" in header]  # fmt: skip
    numbers = [header.Rows, header.Columns, header.Rows / header.Columns, header.BitsStored,
               float(header.ImagerPixelSpacing[0]), float(header.KVP),
               float(header.ExposureInuAs), int(header.PatientAge[:3]),
               Path(image.dicom_path).stat().st_size, header.InstanceNumber]  # fmt: skip
    noise = [float(np.ma.median(np.abs(rough))), outside.mean(), outside.std()]
    hashed = [hash_of(code) for code in codes]
    return [*histogram, *noise, *places, *numbers, *hashed]


def hash_of(code: object) -> float:
    return float(sum(str(code).encode()))


@pytest.fixture(scope="module")
def covered(pairs: pd.DataFrame) -> list[np.ma.MaskedArray]:
    return [_masked(image) for _, image in pairs.iterrows()]


@pytest.fixture(scope="module")
def features(pairs, covered) -> np.ndarray:
    return np.array([_features(f, c) for (_, f), c in zip(pairs.iterrows(), covered, strict=True)])


def _folds(pairs: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split by study, and train on no image whose partner is held out.

    The two look alike, their boxes included, and have opposite labels: whoever remembers the one
    is wrong about the other.
    """
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    pair = pairs.pair.to_numpy()
    return [
        (train[~np.isin(pair[train], pair[held])], held)
        for train, held in splitter.split(pairs, pairs.abnormal, pairs.study_id)
    ]


def _forest_auroc(pairs: pd.DataFrame, features: np.ndarray):
    """Classify normal and abnormal, out of fold; return the AUROC with its interval by study."""
    y, scores = pairs.abnormal.to_numpy(int), np.zeros(len(pairs))
    for train, held in _folds(pairs):
        forest = RandomForestClassifier(500, min_samples_leaf=3, random_state=0, n_jobs=-1)
        forest.fit(features[train], y[train])
        scores[held] = forest.predict_proba(features[held])[:, 1]
    return bootstrap_by_study(
        lambda rows: auroc(y[rows], scores[rows]), pairs.study_id.to_numpy(), 1000
    )


def test_what_lies_outside_the_boxes_is_uninformative(pairs, features):
    assert len(pairs) >= 600 and pairs.abnormal.mean() == 0.5
    found = _forest_auroc(pairs, features)
    assert found.low <= 0.5 <= found.high, str(found)


def test_a_shortcut_would_be_found(pairs, features):
    """The same test on the same images, as if people with a finding were fifteen years older."""
    spoilt = features.copy()
    assert (spoilt[:, AGE] == pairs.age).all()
    spoilt[:, AGE] += np.where(pairs.abnormal, 15.0, 0.0)
    assert _forest_auroc(pairs, spoilt).low > 0.55


def _network_auroc(pairs: pd.DataFrame, images: np.ndarray) -> float:
    """Train a small network on masked images, five times; return the out-of-fold AUROC."""
    torch.manual_seed(0)
    y, x = torch.tensor(pairs.abnormal.to_numpy(np.float32)), torch.from_numpy(images)
    scores = np.zeros(len(y))
    for train, held in _folds(pairs):
        layers, channels = [], 1
        for wider in (12, 24, 48):
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU(),
                       nn.MaxPool2d(2)]  # fmt: skip
            channels = wider
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                nn.Dropout(0.3), nn.Linear(4 * channels, 1))  # fmt: skip
        optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
        for _ in range(8):
            for batch in torch.randperm(len(train)).split(32):
                rows = torch.from_numpy(train)[batch]
                loss = nn.functional.binary_cross_entropy_with_logits(
                    network(x[rows])[:, 0], y[rows]
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        network.eval()
        with torch.no_grad():
            scores[held] = network(x[torch.from_numpy(held)])[:, 0].numpy()
    return auroc(y.numpy(), scores)


def _small(seen: np.ma.MaskedArray) -> np.ndarray:
    """Shrink a masked image, its covered parts grey, to zero mean and unit deviation."""
    filled = cv2.resize(seen.filled(seen.mean()), SIZE[::-1], interpolation=cv2.INTER_AREA)
    filled = filled.astype(np.float32)
    return ((filled - filled.mean()) / (filled.std() + 1e-6))[None]


def test_a_small_network_learns_nothing_from_masked_images(pairs, covered):
    images = np.stack([_small(seen) for seen in covered])
    assert _network_auroc(pairs, images) < 0.60


def test_the_small_network_can_learn(pairs, covered):
    """It finds lesions that leave a faint bright spot beside their boxes."""
    images = np.stack([_small(seen) for seen in covered])
    for image, abnormal in zip(images, pairs.abnormal, strict=True):
        if abnormal:
            image[0, 42:52, 27:37] += 1.0
    assert _network_auroc(pairs, images) > 0.75

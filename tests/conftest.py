"""Small folders in the form of VinDr-SpineXR, for every test that reads one."""

import csv
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from dicom_files import encode, make_dataset
from exported import detector, exported, networks, service  # noqa: F401  (fixtures)
from hypothesis import settings
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from smoke import smoke_book  # noqa: F401  (a fixture of test_notebooks and test_book)

from dernet_utils.core.vocabulary import ANNOTATION_COLUMNS, CORNERS, LESION_TYPES, NO_FINDING
from dernet_utils.dataset import check
from dernet_utils.imaging.decoder import Decoder

collect_ignore = ["fatal"]  # it is for decoding processes, and changes what it is imported into

# Machines differ in speed, so examples have no limit; pytest's own limit ends a test that hangs.
settings.register_profile("any machine", deadline=None, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=10_000, database=None)
settings.load_profile("any machine")

SYNTAXES = (ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, ImplicitVRLittleEndian)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the whole book last: its run keeps all cores busy."""
    items.sort(key=lambda item: "smoke_book" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def _one_decoder() -> Iterator[None]:
    """Let all checks of datasets in this process share one decoding process."""
    with Decoder() as decoder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "Decoder", lambda processes: nullcontext(decoder))
        yield


@pytest.fixture
def tiny_dataset(tmp_path: Path, _tiny_original: Path) -> Path:
    """A dataset for one test alone: 14 train and 4 test studies of two or three images.

    Radiographs are noise over a gradient, 64 to 112 px, in four transfer syntaxes, both photometric
    interpretations, and with 10 to 14 bits. Of three studies one is normal, one has one abnormal
    image and one has two, with a bright patch in each of four boxes; all seven lesion types occur
    in both splits, once by a rarer name.
    """
    return Path(shutil.copytree(_tiny_original, tmp_path / "tiny"))


@pytest.fixture
def root(tmp_path: Path, _smallest_original: Path) -> Path:
    """A clean folder for one test alone, of five training images and two test images."""
    return Path(shutil.copytree(_smallest_original, tmp_path / "data"))


@pytest.fixture(scope="session")
def _smallest_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original") / "smallest"
    return write_dataset(root, {"train": 2, "test": 1})


@pytest.fixture(scope="session")
def _tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original") / "tiny"
    return write_dataset(root, {"train": 14, "test": 4})


def write_dataset(root: Path, studies: dict[str, int]) -> Path:
    """Write a dataset with this many studies per split, always with the same content."""
    rng = np.random.default_rng(42)
    (root / "annotations").mkdir(parents=True)
    for split, count in studies.items():
        (root / f"{split}_images").mkdir()
        rows = [row for study in range(count) for row in _study(root, split, study, rng)]
        with (root / f"annotations/{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([ANNOTATION_COLUMNS, *rows])
    return root


def _study(root: Path, split: str, study: int, rng: np.random.Generator) -> list[tuple]:
    """Write a study's radiographs and return its CSV rows."""
    study_id, series_id = rng.bytes(16).hex(), rng.bytes(16).hex()
    rows = []
    for number in range(2 + study % 2):
        image_id = rng.bytes(16).hex()
        ids = (study_id, series_id, image_id, f"rad{1 + study % 3}")
        height, width = (int(side) for side in rng.integers(64, 113, 2))
        abnormal = number < 2 - study % 3
        boxes = _boxes(study + 2 * number, height, width, rng) if abnormal else []
        rows += [(*ids, name, *corners) for name, *corners in boxes]
        rows += [] if boxes else [(*ids, NO_FINDING, "", "", "", "")]
        path = root / f"{split}_images" / f"{image_id}.dicom"
        grey = np.linspace(0.2, 0.6, width) + rng.normal(0, 0.03, (height, width))
        for _, xmin, ymin, xmax, ymax in boxes:
            grey[int(ymin) : int(ymax), int(xmin) : int(xmax)] += 0.3
        path.write_bytes(_dicom_file(grey, image_id, study + number))
    return rows


def _boxes(kind: int, height: int, width: int, rng: np.random.Generator) -> list[tuple]:
    boxes = []
    for number in range(4):
        name = LESION_TYPES[(kind * 2 + number) % len(LESION_TYPES)]
        if kind == 6 and name == "Other lesions":
            name = "Enthesophytes"
        x, y = rng.uniform(0, width - 24), rng.uniform(0, height - 24)
        boxes.append((name, x, y, x + rng.uniform(8, 24), y + rng.uniform(8, 24)))
    return boxes


def _dicom_file(grey: np.ndarray, image_id: str, kind: int) -> bytes:
    """A DICOM file of a picture, 0 to 1, in an encoding that depends on `kind`."""
    bits, inverted = 10 + kind % 5, kind % 3 == 0
    stored = np.clip(1 - grey if inverted else grey, 0, 1) * (2**bits - 1)
    header = {"SOPInstanceUID": f"2.25.{int(image_id, 16)}"}
    if inverted:
        header["PhotometricInterpretation"] = "MONOCHROME1"
    if kind % 2:
        header |= {"WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits}
    dataset = make_dataset(stored.round().astype("<u2"), bits, **header)
    return encode(dataset, SYNTAXES[kind % 4])


@pytest.fixture
def boxed_images(tmp_path):
    """Six images of noise with a bright patch in each box; the last two for validation."""
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for number in range(6):
        height, width = 120, 80
        grey = rng.integers(40, 90, (height, width)).astype(np.uint8)
        for _ in range(2):
            x, y = rng.integers(0, 50), rng.integers(0, 90)
            grey[y : y + 20, x : x + 25] = 220
            box = [f"image{number}", LESION_TYPES[number % 7]]
            boxes.append([*box, *(2.0 * edge for edge in (x, y, x + 25, y + 20))])
        path = tmp_path / f"image{number}.png"
        cv2.imwrite(str(path), grey)
        images.append([f"image{number}", str(path), 2 * height, 2 * width])
    images = pd.DataFrame(images, columns=["image_id", "cached_path", "height", "width"])
    return images, pd.DataFrame(boxes, columns=["image_id", "lesion_type", *CORNERS])

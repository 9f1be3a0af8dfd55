"""Augmented images: Algorithm 1's mosaic, rare types, and labels that are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import LESION_TYPES
from dernet_utils.detection import augment, yolo
from dernet_utils.detection.augment import (
    RARE_BELOW,
    PasteRare,
    SpineDataset,
    check_labels,
    repeat_factors,
)
from dernet_utils.detection.images import export_yolo

NAMES = dict(enumerate(LESION_TYPES))


def dataset_of(boxed_images, folder, view=(96, 64), **data):
    exported = export_yolo(*boxed_images, view, folder)
    hyp = yolo.settings_of({"mosaic": 1.0, "translate": 0.0, "scale": 0.0, "hsv_v": 0.0})
    data = {"names": NAMES, "nc": 7, "channels": 3, "view": view} | data
    return SpineDataset(str(exported), imgsz=max(view), augment=True, hyp=hyp, data=data), hyp


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=30))
def test_repeat_factors_are_of_images_with_a_type(kinds):
    of_type, of_image = repeat_factors([np.array(own) for own in kinds], 5)
    for kind in range(5):
        fraction = np.mean([kind in own for own in kinds])
        expected = max(1, np.sqrt(RARE_BELOW / fraction)) if fraction else 1
        assert of_type[kind] == pytest.approx(expected)
    for own, factor in zip(kinds, of_image, strict=True):
        assert factor == max((of_type[kind] for kind in own), default=1)


def test_a_faint_finding_is_a_box_to_ignore_and_makes_no_image_rare(boxed_images, tmp_path):
    images, boxes = boxed_images
    faint = boxes.iloc[[0]].assign(lesion_type=LESION_TYPES[6], image_id="image3")
    exported = export_yolo(images, boxes, (96, 64), tmp_path / "yolo", faint)
    data = {"names": NAMES, "nc": 7, "channels": 3, "view": (96, 64), "paste": True}
    hyp = yolo.settings_of({"mosaic": 1.0})
    dataset = SpineDataset(str(exported), imgsz=96, augment=True, hyp=hyp, data=data)
    plain, _ = dataset_of(boxed_images, tmp_path / "plain")
    kinds = [sorted(own["cls"].ravel()) for own in dataset.labels]
    assert kinds[3] == [*sorted(plain.labels[3]["cls"].ravel()), 13.0]
    assert (dataset.of_type == plain.of_type).all() and (dataset.of_image == plain.of_image).all()
    assert dataset.data["names"] == NAMES
    for number in range(6):
        assert dataset[number]["cls"].max() < 14


def test_rare_images_are_drawn_in_proportion_and_the_others_remain(boxed_images, tmp_path):
    dataset, _ = dataset_of(boxed_images, tmp_path / "yolo", repeat=True)
    assert (dataset.rows == np.arange(6)).all()
    dataset.of_image = np.array([1.0, 1.0, 4.0, 1.0, 1.0, 4.0])
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        dataset.draw(rng)
        assert len(dataset.rows) == 6
        drawn.append(np.bincount(dataset.rows, minlength=6))
    assert np.mean(drawn, axis=0) == pytest.approx(dataset.of_image / 2, abs=0.05)
    assert np.max(drawn, axis=0).tolist() == [1, 1, 2, 1, 1, 2]


def test_without_repeat_each_image_is_drawn_once(boxed_images, tmp_path):
    dataset, _ = dataset_of(boxed_images, tmp_path / "yolo")
    dataset.of_image = np.array([1.0, 1.0, 4.0, 1.0, 1.0, 4.0])
    dataset.draw(np.random.default_rng(0))
    assert (dataset.rows == np.arange(6)).all()


def test_an_input_is_upright_and_boxes_lie_on_their_patches(boxed_images, tmp_path):
    dataset, hyp = dataset_of(boxed_images, tmp_path / "yolo")
    dataset.set_mosaic(hyp, False)
    for number in range(len(dataset)):
        view = dataset[number]
        assert view["img"].shape == (3, 96, 64)
        for x, y, width, height in view["bboxes"].numpy() * [64, 96, 64, 96]:
            left, top = round(x - width / 2), round(y - height / 2)
            inside = view["img"][0][top : round(y + height / 2), left : round(x + width / 2)]
            assert inside.float().mean() > 150


def test_a_rare_lesion_is_pasted_where_none_lies():
    image = np.full((100, 60, 3), 10, np.uint8)
    donor = np.full((200, 120, 3), 10, np.uint8)
    donor[100:120, 40:70] = 200
    box, kind = np.array([40.0, 100, 70, 120]), np.array([5.0])

    def boxes(*corners):
        at = np.array(corners, np.float32).reshape(-1, 4)
        return augment.Instances(at, np.zeros((0, 1000, 2)), bbox_format="xyxy", normalized=False)

    labels = {"img": image, "instances": boxes([0, 0, 9, 9]), "cls": np.array([[2.0]])}
    pasted = PasteRare.paste(dict(labels), donor, box, kind)
    assert pasted["cls"].ravel().tolist() == [2, 5]
    x0, y0, x1, y1 = pasted["instances"].bboxes[1]
    assert (x1 - x0, y1 - y0) == (30, 20)
    # The same relative position: 55 of 120 and 110 of 200.
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == (pytest.approx(27.5, abs=1), pytest.approx(55, abs=1))
    inner = pasted["img"][int(y0) + 4 : int(y1) - 4, int(x0) + 4 : int(x1) - 4]
    assert (inner == 200).all() and (pasted["img"][:, :5] == 10).all()
    assert (image == 10).all()  # the original image is unchanged

    taken = {"img": image, "instances": boxes([20, 50, 40, 60]), "cls": np.array([[2.0]])}
    assert len(PasteRare.paste(taken, donor, box, kind)["cls"]) == 1


def test_pasting_is_optional_and_takes_rare_types_only(boxed_images, tmp_path, monkeypatch):
    off, _ = dataset_of(boxed_images, tmp_path / "off")
    assert not any(isinstance(t, PasteRare) for t in off.transforms.transforms[0].transforms)
    on, hyp = dataset_of(boxed_images, tmp_path / "on", paste=True)
    (paste,) = (t for t in on.transforms.transforms[0].transforms if isinstance(t, PasteRare))
    assert len(paste.rare) == sum(len(own["cls"]) for own in on.labels)  # one image each: all rare
    monkeypatch.setattr(augment, "PASTE", 1.0)
    on.set_mosaic(hyp, False)
    augment.seed_augmentations(0)
    more = sum(len(on[i]["cls"]) - len(on.labels[i]["cls"]) for i in range(6) for _ in range(5))
    assert more > 0


GOOD = "3 0.5 0.5 0.2 0.1\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("14 0.5 0.5 0.2 0.1\n", "from 0 to 13"),
        ("1.5 0.5 0.5 0.2 0.1\n", "from 0 to 13"),
        (GOOD + "2 0.95 0.5 0.2 0.1\n", "2: .*inside the image"),
        ("2 -0.1 0.5 0.2 0.1\n", "inside the image"),
        ("2 0.5 0.5 0 0.1\n", "inside the image"),
        ("2 nan 0.5 0.2 0.1\n", "inside the image"),
        ("2 0.5 0.5 0.2\n", "five numbers"),
        ("two 0.5 0.5 0.2 0.1\n", "five numbers"),
    ],
)
def test_a_wrong_label_is_named_with_its_file_and_line(boxed_images, tmp_path, text, fault):
    folder = export_yolo(*boxed_images, (96, 64), tmp_path / "yolo")
    (folder.parent / "labels" / "image3.txt").write_text(text)
    data = {"names": NAMES, "nc": 7, "channels": 3}
    with pytest.raises(DernetError, match=rf"image3\.txt, line .*{fault}"):
        SpineDataset(str(folder), imgsz=96, data=data)
    (folder.parent / "labels" / "image3.txt").write_text(GOOD)
    check_labels(sorted(map(str, folder.iterdir())), 7)


def test_an_image_without_a_label_file_is_named(boxed_images, tmp_path):
    folder = export_yolo(*boxed_images, (96, 64), tmp_path / "yolo")
    (folder.parent / "labels" / "image4.txt").unlink()
    with pytest.raises(DernetError, match=r"image4\.png has no label file"):
        SpineDataset(str(folder), imgsz=96, data={"names": NAMES, "nc": 7, "channels": 3})


def test_a_damaged_image_is_not_left_out(boxed_images, tmp_path):
    folder = export_yolo(*boxed_images, (96, 64), tmp_path / "yolo")
    (folder / "image2.png").write_bytes(b"no picture")
    with pytest.raises(DernetError, match=r"image2\.png cannot be read"):
        SpineDataset(str(folder), imgsz=96, data={"names": NAMES, "nc": 7, "channels": 3})

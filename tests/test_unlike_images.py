"""Pictures for the evaluation of out-of-distribution checks."""

import numpy as np
import pytest

from dernet_utils.book import unlike_images

COUNT = 3


@pytest.fixture(scope="module")
def radiographs():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (80 + 10 * k, 60), dtype=np.uint8) for k in range(4)]


def made(function, radiographs, seed=0):
    return function(radiographs, COUNT, np.random.default_rng(seed))


@pytest.mark.slow
def test_each_family_has_as_many_pictures_as_asked_for_and_each_is_one(radiographs):
    found = made(unlike_images.unlike_images, radiographs)
    assert len(found) == 9
    for name, pictures in found.items():
        assert len(pictures) == COUNT, name
        for picture in pictures:
            assert picture.dtype == np.uint8 and picture.shape[2:] in ((), (3,)), name
            assert min(picture.shape[:2]) > 64 and np.ptp(picture) > 100, name
    again = made(unlike_images.unlike_images, radiographs)
    other = made(unlike_images.unlike_images, radiographs, seed=1)
    for name, pictures in found.items():
        assert all(map(np.array_equal, pictures, again[name])), name
        if name not in ("screens", "screens, grey"):  # every other one shows a radiograph
            assert not any(map(np.array_equal, pictures, other[name])), name


def test_altered_radiographs_are_what_their_names_say(radiographs):
    found = made(unlike_images.altered_radiographs, radiographs)
    assert all(len(pictures) == COUNT for pictures in found.values())
    upright = [255 - image for image in found["inverted"]]
    assert len({image.shape for image in upright}) == COUNT  # different radiographs
    for k, image in enumerate(upright):
        assert any(np.array_equal(image, one) for one in radiographs)
        assert np.array_equal(np.rot90(found["rotated by 90°"][k], -1), image)
        assert np.array_equal(found["rotated by 180°"][k][::-1, ::-1], image)
        for name, part in (("cropped to a half", 2), ("cropped to a quarter", 4)):
            assert found[name][k].shape == tuple(side // part for side in image.shape)


def test_a_crop_is_a_part_of_the_picture(radiographs):
    picture, rng = radiographs[0], np.random.default_rng(3)
    assert np.array_equal(unlike_images.random_crop(picture, 1.0, rng), picture)
    crop = unlike_images.random_crop(picture, 0.5, rng)
    windows = np.lib.stride_tricks.sliding_window_view(picture, crop.shape)
    assert (windows == crop).all(axis=(2, 3)).sum() == 1


def test_grey_levels_span_the_given_percentiles_and_a_constant_stays_finite():
    values = np.arange(1000.0)
    grey = unlike_images.to_grey_levels(values)
    assert grey[:10].max() == 0 and grey[-5:].min() == 255
    assert (np.diff(grey.astype(int)) >= 0).all()
    assert (unlike_images.to_grey_levels(np.ones((3, 3))) == 0).all()


def test_the_end_of_a_finger_is_brighter_than_air():
    rng = np.random.default_rng(0)
    hand = unlike_images.hand(rng)
    shown = unlike_images.expose(hand, rng)
    assert shown.shape == hand.shape == (700, 520)
    assert shown[hand > np.quantile(hand, 0.99)].mean() > shown[hand == 0].mean() + 100

"""CLAHE against OpenCV and by hand; enhancement before scaling down."""

import cv2
import numpy as np
import pytest
from dicom_files import grey_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging import enhance
from dernet_utils.imaging.enhance import clahe, clahe_by_hand, preprocess


@pytest.mark.parametrize("function", [clahe, clahe_by_hand])
def test_one_tile_with_every_level_once(function):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    # Each bin holds one pixel, nothing is clipped: the table is 255 (i + 1) / 256.
    expected = np.rint(255 * (np.arange(256) + 1) / 256).reshape(16, 16)
    np.testing.assert_array_equal(function(grey, 2.0, 1), expected)


def test_clipping_by_hand():
    histogram = np.zeros((1, 1, 256), int)
    histogram[0, 0, 7] = 700
    clipped = enhance._clip_histograms(histogram, 100)[0, 0]
    # 600 in excess: 2 for each bin and 88 left, one for every second bin from 0 on.
    expected = np.full(256, 2)
    expected[np.arange(88) * 2] += 1
    expected[7] += 100
    np.testing.assert_array_equal(clipped, expected)


@given(
    grey=hnp.arrays(
        np.uint8,
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        elements=st.integers(60, 120),
        fill=st.integers(0, 255),
    ),
    tiles=st.sampled_from([1, 2, 3, 4, 8, 11, 16]),
    clip_limit=st.sampled_from([0.01, 0.5, 1.0, 2.0, 3.7, 8.0, 40.0, 1000.0]),
)
@settings(max_examples=200, deadline=None)
def test_clahe_by_hand_equals_opencv(grey, tiles, clip_limit):
    ours = clahe_by_hand(grey, clip_limit, tiles).astype(int)
    assert np.abs(ours - clahe(grey, clip_limit, tiles)).max() <= 1


@pytest.mark.parametrize("shape", [(512, 512), (500, 333), (512, 333), (255, 257)])
@pytest.mark.parametrize("clip_limit", [1.0, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("tiles", [2, 8, 13])
def test_clahe_by_hand_equals_opencv_on_pictures(shape, clip_limit, tiles):
    rng = np.random.default_rng(1)
    y, x = np.mgrid[: shape[0], : shape[1]]
    picture = 90 + 60 * np.sin(y / 40) + 40 * np.cos(x / 55) + rng.normal(0, 3, shape)
    grey = np.clip(picture, 0, 255).astype(np.uint8)
    ours = clahe_by_hand(grey, clip_limit, tiles).astype(int)
    difference = np.abs(ours - clahe(grey, clip_limit, tiles))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("function", [clahe, clahe_by_hand])
@pytest.mark.parametrize(
    ("grey", "clip_limit", "tiles", "message"),
    [
        (np.zeros((4, 4)), 2.0, 8, "uint8"),
        (np.zeros((4, 4, 3), np.uint8), 2.0, 8, "uint8"),
        (np.zeros((0, 4), np.uint8), 2.0, 8, "uint8"),
        (None, 2.0, 8, "NoneType"),
        (np.zeros((4, 4), np.uint8), 0, 8, "above 0"),
        (np.zeros((4, 4), np.uint8), float("nan"), 8, "above 0"),
        (np.zeros((4, 4), np.uint8), 2.0, 0, "one tile"),
    ],
)
def test_clahe_refuses(function, grey, clip_limit, tiles, message):
    with pytest.raises(DernetError, match=message):
        function(grey, clip_limit, tiles)


def test_preprocess_enhances_first_then_shrinks():
    grey = grey_picture(48, 40)
    expected = cv2.resize(clahe(grey, 2.0, 8), (20, 24), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(preprocess(grey, 24, 2.0, 8), expected)


@pytest.mark.parametrize(
    ("shape", "long_side_px", "expected"),
    [((48, 40), 100, (48, 40)), ((40, 48), 24, (20, 24)), ((1000, 1), 10, (10, 1))],
)
def test_preprocess_keeps_proportions(shape, long_side_px, expected):
    assert preprocess(np.zeros(shape, np.uint8), long_side_px, 2.0, 8).shape == expected

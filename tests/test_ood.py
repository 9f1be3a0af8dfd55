"""Which files are rejected as no radiograph of a spine, and with which reasons."""

import cv2
import numpy as np
import pydicom
import pytest
from dicom_files import grey_picture, to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.radiograph import Radiograph
from dernet_utils.imaging.reader import decode_radiograph
from dernet_utils.inference import ood
from dernet_utils.inference.pipeline import NetworkOutput


def png(picture):
    return cv2.imencode(".png", picture)[1].tobytes()


def read(picture):
    """Return a picture as the reader returns it from a PNG."""
    return decode_radiograph(png(picture))


def facts_outside(picture):
    """Return the statistics of a picture for which it is rejected; check its reasons."""
    facts = ood.picture_facts(read(picture))
    limits = ood.LIMITS.items()
    outside = {name for name, limit in limits if not limit.low <= facts[name] <= limit.high}
    reasons = ood.picture_reasons(facts)
    assert len(reasons) == len(outside) and {reason.layer for reason in reasons} <= {"picture"}
    return outside


# --- Header ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ({"Modality": "CT"}, [["CT"]]),
        ({"Modality": "DX", "BodyPartExamined": "CHEST"}, [["CHEST"]]),
        ({"Modality": "MR", "BodyPartExamined": "KNEE"}, [["MR"], ["KNEE"]]),
        ({"Modality": "DX", "BodyPartExamined": "LSPINE"}, []),
        ({"Modality": "cr", "BodyPartExamined": "T-SPINE"}, []),
        ({"Modality": "CR"}, []),
        ({"Modality": ["DX", "CR"], "BodyPartExamined": ["PELVIS", "LUMBAR"]}, []),
        ({"BodyPartExamined": ["HEAD", "NECK"]}, [["HEAD", "NECK"]]),
        ({"Modality": "", "BodyPartExamined": ""}, []),
        *(
            ({"Modality": "DX", "BodyPartExamined": word}, [])
            for word in ("UNKNOWN", "OTHER", "LWS", "COLUMNA LUMBAR", "RACHIS", "WHOLEBODY", "Dos")
        ),
        ({"Modality": "DX", "BodyPartExamined": ["SKULL", "CSPINE"]}, []),
        ({"PixelAspectRatio": [2, 1]}, [["2.00 times as high"]]),
        ({"PixelSpacing": [0.1, 0.4]}, [["0.25 times as high"]]),
        ({"ImagerPixelSpacing": [0.15, 0.1]}, [["1.50 times as high"]]),
        ({"PixelAspectRatio": [1, 1], "PixelSpacing": [0.1, 0.4]}, []),
        ({"PixelSpacing": [0.14, 0.1401]}, []),
        ({"PixelSpacing": [0, 0]}, []),
        ({"PixelSpacing": None}, []),
    ],
)
def test_each_header_reason_names_the_values(tiny_dataset, header, values):
    dataset = pydicom.dcmread(next((tiny_dataset / "test_images").glob("*.dicom")))
    for name, value in header.items():
        setattr(dataset, name, value)
    reasons = ood.header_reasons(decode_radiograph(to_bytes(dataset)))
    assert [reason.layer for reason in reasons] == ["header"] * len(values)
    for reason, expected in zip(reasons, values, strict=True):
        assert all(value in reason.text for value in expected)


def test_a_malformed_element_is_an_error(monkeypatch):
    def fail(*_):
        raise ValueError("Roe^Jane")

    monkeypatch.setattr(pydicom.Dataset, "get", fail)
    with pytest.raises(DernetError, match="malformed") as refused:
        ood.header_reasons(Radiograph(grey_picture(), "DICOM", pydicom.Dataset()))
    assert "Roe" not in str(refused.value)


def test_a_picture_has_no_header():
    assert ood.header_reasons(read(grey_picture())) == []


# --- Picture -----------------------------------------------------------------------------------


def test_a_radiograph_is_not_rejected():
    for seed in range(5):
        assert facts_outside(grey_picture(seed=seed)) == set()
    jpeg = cv2.imencode(".jpg", grey_picture())[1].tobytes()
    assert ood.picture_reasons(ood.picture_facts(decode_radiograph(jpeg))) == []


def page():
    made = np.full((500, 400), 255, np.uint8)
    for y in range(30, 480, 20):
        cv2.putText(made, "radiograph of the spine", (20, y), 0, 0.7, 0, 1, cv2.LINE_AA)
    return made


@pytest.mark.parametrize(
    ("picture", "fact"),
    [
        (np.dstack([grey_picture(), grey_picture(seed=1) // 2, grey_picture()]), "colour"),
        (grey_picture(100, 60), "short_side"),
        (grey_picture(2000, 200), "elongation"),
        (100 + grey_picture() // 20, "range"),
        (grey_picture() // 16 * 16, "levels"),
        (page(), "paper"),
        (np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8), "smoothness"),
    ],
)
def test_other_pictures_are_rejected(picture, fact):
    assert fact in facts_outside(picture)


@pytest.mark.parametrize("name", ood.LIMITS)
def test_a_reason_states_the_value(name):
    """Each statistic in turn lies far outside, the others at the lower end of their range."""
    facts = {other: limit.low for other, limit in ood.LIMITS.items()}
    value = 0.41 if name == "smoothness" else ood.LIMITS[name].low - 7
    (reason,) = ood.picture_reasons(facts | {name: value})
    percent = name in ("colour", "paper", "flat")
    shown = f"{value:.0%}" if percent else f"{value:.2f}" if value == 0.41 else f"{value:.0f}"
    assert shown in reason.text and reason.layer == "picture"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 255))
def test_facts_are_finite_for_any_picture(height, width, grey):
    facts = ood.picture_facts(Radiograph(np.full((height, width), grey, np.uint8), "PNG"))
    assert set(facts) == set(ood.LIMITS) and np.isfinite(list(facts.values())).all()
    assert ood.picture_reasons(facts)


def test_facts_are_finite_for_a_picture_that_varies_only_at_its_edge():
    picture = np.zeros((40, 40), np.uint8)
    picture[:, -1] = 200
    assert np.isfinite(list(ood.picture_facts(read(picture)).values())).all()


def test_a_drawing_is_flat():
    drawn = np.repeat(np.arange(0, 250, 3, dtype=np.uint8), 6)[None].repeat(300, 0).copy()
    for k in range(40):
        drawn[4 * k : 4 * k + 8, 10 * k : 10 * k + 40] = 5 * k + 7
    assert "flat" in facts_outside(drawn)


# --- Network -----------------------------------------------------------------------------------


def embeddings(n, seed, shift=0.0):
    """Return points near a five-dimensional subspace of 40 dimensions."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(7).normal(size=(5, 40))
    return rng.normal(size=(n, 5)) @ plane + 0.05 * rng.normal(size=(n, 40)) + shift


def test_the_gate_rejects_the_requested_fraction():
    gate = ood.fit_embedding_gate(embeddings(300, 0), embeddings(2000, 1), rejected=0.05)
    far = gate.distance(embeddings(4000, 2)) > gate.limit
    assert far.mean() == pytest.approx(0.05, abs=0.02)
    assert (gate.distance(embeddings(50, 3, shift=1.0)) > gate.limit).all()


def test_distance_is_that_of_mahalanobis_where_all_directions_are_kept():
    rng = np.random.default_rng(0)
    training = rng.normal(size=(500, 6)) * [1, 2, 3, 1, 2, 3]
    gate = ood.fit_embedding_gate(training, training[:50])
    inverse = np.linalg.inv(np.cov(training.T))
    away = training[:20] - training.mean(axis=0)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", away, inverse, away))
    assert gate.distance(training[:20]) == pytest.approx(expected, rel=0.02)


def test_a_distant_embedding_has_a_reason(tmp_path):
    gate = ood.fit_embedding_gate(embeddings(300, 0), embeddings(200, 1))
    near, far = embeddings(300, 0).mean(axis=0), np.full(40, 9.0)
    assert gate.reasons(NetworkOutput(0.5, None, near)) == []
    (reason,) = gate.reasons(NetworkOutput(0.5, None, far))
    ratio = gate.distance(far[None])[0] / gate.limit
    assert reason.layer == "network" and f"{ratio:.1f}" in reason.text
    again = ood.EmbeddingGate.load(gate.save(tmp_path / "gate.npz"))
    assert again.distance(far[None]) == gate.distance(far[None])
    assert again.limit == gate.limit


def test_errors(tmp_path):
    with pytest.raises(DernetError, match="at least 3"):
        ood.fit_embedding_gate(np.zeros((2, 4)), np.zeros((1, 4)))
    with pytest.raises(DernetError, match="export"):
        ood.EmbeddingGate.load(tmp_path / "none.npz")
    same = ood.fit_embedding_gate(np.zeros((5, 4)), np.zeros((3, 4)))
    assert np.isfinite(same.distance(np.ones((1, 4)))).all()

"""What is rejected as no radiograph of a spine, and why."""

import cv2
import numpy as np
import pytest
from dicom_files import encode_picture, patient_film
from dicom_files import picture as grey
from hypothesis import given, settings
from hypothesis import strategies as st

from dernet_utils.core.errors import DernetError
from dernet_utils.imaging.reader import decode_radiograph
from dernet_utils.inference import ood
from dernet_utils.inference.pipeline import NetworkOutput


def facts_of(picture, ending=".png"):
    return ood.picture_facts(decode_radiograph(encode_picture(ending, picture)))


def reasons_of(picture, ending=".png"):
    return ood.picture_reasons(facts_of(picture, ending))


def words(reasons):
    return " ".join(reason.text for reason in reasons)


# Header


@pytest.mark.parametrize(
    ("header", "words_wanted"),
    [
        ({"Modality": "CT"}, "modality is CT"),
        ({"Modality": "DX", "BodyPartExamined": "CHEST"}, "CHEST, not the spine"),
        ({"Modality": "MR", "BodyPartExamined": "KNEE"}, "modality is MR"),
        ({"Modality": "DX", "BodyPartExamined": "LSPINE"}, ""),
        ({"Modality": "cr", "BodyPartExamined": "T-SPINE"}, ""),
        ({"Modality": "CR"}, ""),
        ({"Modality": ["DX", "CR"], "BodyPartExamined": ["PELVIS", "LUMBAR"]}, ""),
        ({"BodyPartExamined": ["HEAD", "NECK"]}, "HEAD and NECK, not the spine"),
        ({"Modality": "", "BodyPartExamined": ""}, ""),
    ],
)
def test_header(header, words_wanted):
    data = patient_film(**{"BodyPartExamined": ""} | header)
    found = ood.header_reasons(decode_radiograph(data))
    assert words_wanted in words(found) and bool(found) == bool(words_wanted)
    assert all(reason.layer == "header" for reason in found)


def test_a_picture_has_no_header():
    assert ood.header_reasons(decode_radiograph(encode_picture())) == []


# Picture


def test_a_radiograph_has_nothing_against_it():
    for seed in range(5):
        assert reasons_of(grey(seed=seed)) == []
    assert reasons_of(grey(), ".jpg") == []


def page():
    made = np.full((500, 400), 255, np.uint8)
    for y in range(30, 480, 20):
        cv2.putText(made, "radiograph of the spine", (20, y), 0, 0.7, 0, 1, cv2.LINE_AA)
    return made


@pytest.mark.parametrize(
    ("picture", "words_wanted"),
    [
        (np.dstack([grey(), grey(seed=1) // 2, grey()]), "in colour"),
        (grey(100, 60), "short side has 60 px"),
        (grey(2000, 200), "times as long as wide"),
        (100 + grey() // 20, "within"),
        (grey() // 16 * 16, "grey levels"),
        (page(), "one bright grey"),
        (np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8), "noise"),
        (np.zeros((300, 300), np.uint8), "grey levels"),
        (np.full((300, 300), 255, np.uint8), "one bright grey"),
    ],
)
def test_pictures_that_are_none(picture, words_wanted):
    assert words_wanted in words(reasons_of(picture))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 255))
def test_facts_are_numbers_whatever_the_picture(height, width, grey):
    facts = facts_of(np.full((height, width), grey, np.uint8))
    assert set(facts) == set(ood.LIMITS) and np.isfinite(list(facts.values())).all()
    assert ood.picture_reasons(facts)


def test_a_picture_that_varies_at_its_edge_only_has_facts():
    picture = np.zeros((40, 40), np.uint8)
    picture[:, -1] = 200
    assert np.isfinite(list(facts_of(picture).values())).all()


def test_a_drawn_picture_is_flat():
    drawn = np.repeat(np.arange(0, 250, 3, dtype=np.uint8), 6)[None].repeat(300, 0).copy()
    for k in range(40):
        drawn[4 * k : 4 * k + 8, 10 * k : 10 * k + 40] = 5 * k + 7
    assert "perfectly even" in words(reasons_of(drawn))


# Network


def embeddings(n, seed, shift=0.0):
    """Points near a plane in 40 dimensions."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(7).normal(size=(5, 40))
    return rng.normal(size=(n, 5)) @ plane + 0.05 * rng.normal(size=(n, 40)) + shift


def test_as_many_are_rejected_as_was_asked():
    familiar = ood.fit_embedding_gate(embeddings(300, 0), embeddings(2000, 1), rejected=0.05)
    far = familiar.distance(embeddings(4000, 2)) > familiar.limit
    assert far.mean() == pytest.approx(0.05, abs=0.02)
    assert (familiar.distance(embeddings(50, 3, shift=1.0)) > familiar.limit).all()


def test_distance_is_that_of_mahalanobis_where_all_directions_are_kept():
    rng = np.random.default_rng(0)
    learnt = rng.normal(size=(500, 6)) * [1, 2, 3, 1, 2, 3]
    familiar = ood.fit_embedding_gate(learnt, learnt[:50])
    inverse = np.linalg.inv(np.cov(learnt.T))
    away = learnt[:20] - learnt.mean(axis=0)
    wanted = np.sqrt(np.einsum("ij,jk,ik->i", away, inverse, away))
    assert familiar.distance(learnt[:20]) == pytest.approx(wanted, rel=0.02)


def test_a_look_from_afar_has_a_reason(tmp_path):
    familiar = ood.fit_embedding_gate(embeddings(300, 0), embeddings(200, 1))
    near, far = embeddings(300, 0).mean(axis=0), np.full(40, 9.0)
    assert familiar.reasons(NetworkOutput(0.5, None, near)) == []
    (reason,) = familiar.reasons(NetworkOutput(0.5, None, far))
    assert reason.layer == "network" and "times as far" in reason.text
    again = ood.EmbeddingGate.load(familiar.save(tmp_path / "familiar.npz"))
    assert again.distance(far[None]) == familiar.distance(far[None])
    assert again.limit == familiar.limit


def test_errors(tmp_path):
    with pytest.raises(DernetError, match="at least 3 films"):
        ood.fit_embedding_gate(np.zeros((2, 4)), np.zeros((1, 4)))
    with pytest.raises(DernetError, match="export"):
        ood.EmbeddingGate.load(tmp_path / "none.npz")
    same = ood.fit_embedding_gate(np.zeros((5, 4)), np.zeros((3, 4)))
    assert np.isfinite(same.distance(np.ones((1, 4)))).all()

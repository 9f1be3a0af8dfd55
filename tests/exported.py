"""Untrained networks, exported once for every test that runs them."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from smoke import shared

from dernet_utils import export, runtime
from dernet_utils.data import LESION_TYPES
from dernet_utils.examine import Examiner
from dernet_utils.outliers import fit_familiar
from dernet_utils.profiles import NETWORKS
from dernet_utils.triage import build_network
from dernet_utils.yolo import build_detector

PX = 64
VIEW = (96, 64)


def squares(n, shape):
    return np.random.default_rng(n).integers(0, 256, (n, 1, *shape), dtype=np.uint8)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def network_that_looks(name, seed=1):
    """An untrained network whose head is not zero."""
    network = build_network(name, seed=seed)
    with torch.no_grad():
        network.get_classifier().weight.normal_(generator=torch.Generator().manual_seed(seed))
    return network.eval()


@pytest.fixture(scope="session")
def networks():
    seeds = {name: (1,) for name in NETWORKS} | {"resnet50": (1, 2)}
    return {name: [network_that_looks(name, one) for one in own] for name, own in seeds.items()}


@pytest.fixture(scope="session")
def detector():
    made = build_detector(LESION_TYPES, 3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # boxes of every kind and place
        for branch in (*made.model[-1].cv2, *made.model[-1].cv3):
            branch[-1].weight.normal_(std=0.5, generator=generator)
    return made.eval()


@pytest.fixture(scope="session")
def exported(networks, detector, tmp_path_factory) -> Path:
    """A folder as `export_run` leaves it, of untrained networks."""

    def make(folder: Path) -> None:
        shown = {"resnet50": list(squares(8, (PX, PX))[:, 0])}  # the one that is quantised
        jobs = [
            (export.Triage(own), (PX, PX), folder / f"{name}.onnx", shown.get(name, []))
            for name, own in networks.items()
        ]
        *written, found = export.write_each(
            [*jobs, (export.Boxes(detector), VIEW, folder / "yolo11l.onnx", [])]
        )
        triage = dict(zip(networks, written, strict=True))
        decision = {
            "networks": NETWORKS, "weights": (0.5, 0.3, 0.2), "temperature": 1.3,
            "thresholds": {"youden": 0.0, "shut": 1.0}, "fitted_on": 10,
        }  # fmt: skip
        embeddings = runtime.open_network(folder / "resnet50.onnx")(squares(8, (PX, PX)))[2]
        seen = fit_familiar(embeddings, embeddings).save(folder / "familiar.npz")
        familiar = {"network": "resnet50", "file": seen.name, "sha256": digest(seen)}
        manifest = {
            "made_by": "dernet-utils test", "profile": "test", "virtual": True,
            "triage": triage, "detector": found, "familiar": familiar, "decision": decision,
            "lesion_types": LESION_TYPES,
            "least_score": 0.001, "triage_px": PX, "view": VIEW, "cache_px": 128,
            "clip_limit": 2.0, "tiles": 8,
        }  # fmt: skip
        (folder / runtime.MANIFEST).write_text(json.dumps(manifest))

    return shared(tmp_path_factory, "models", make)


@pytest.fixture(scope="session")
def examiner(exported) -> Examiner:
    """The untrained networks behind a guard whose last layer lets all through."""
    made = Examiner.open(exported, threads=1)
    return replace(made, familiar=replace(made.familiar, limit=np.inf))

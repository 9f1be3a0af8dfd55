"""Untrained networks, exported once for every test that runs them."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from smoke import shared
from torch import nn

from dernet_utils.core.vocabulary import LESION_TYPES, NETWORKS
from dernet_utils.detection.yolo import build_detector
from dernet_utils.inference import export, onnx_backend
from dernet_utils.inference.ood import fit_embedding_gate
from dernet_utils.serving.service import InferenceService
from dernet_utils.triage.networks import build_network

PX = 64
SIZE = (96, 64)


def squares(n, shape):
    return np.random.default_rng(n).integers(0, 256, (n, 1, *shape), dtype=np.uint8)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def untrained_network(name, seed=1):
    """Return an untrained network whose head is not zero, so that images differ in probability."""
    network = build_network(name, seed=seed)
    with torch.no_grad():
        network.get_classifier().weight.normal_(generator=torch.Generator().manual_seed(seed))
    return network.eval()


@pytest.fixture(scope="session")
def networks():
    seeds = {name: (1,) for name in NETWORKS} | {"resnet50": (1, 2)}
    return {name: [untrained_network(name, one) for one in folds] for name, folds in seeds.items()}


@pytest.fixture(scope="session")
def detector():
    """An untrained detector whose features vary, and with them its boxes of every class."""
    made = build_detector(LESION_TYPES, 3)
    normalisations = [part for part in made.modules() if isinstance(part, nn.BatchNorm2d)]
    usual = normalisations[0].momentum
    for part in normalisations:
        part.momentum = 1.0  # the statistics of the next batch: without them features are near zero
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        made.train()(torch.from_numpy(squares(16, SIZE)).float().expand(-1, 3, -1, -1) / 255)
        for branch in (*made.model[-1].cv2, *made.model[-1].cv3):
            branch[-1].weight.normal_(std=0.01, generator=generator)
    for part in normalisations:
        part.momentum = usual
    return made.eval()


@pytest.fixture(scope="session")
def exported(networks, detector, tmp_path_factory) -> Path:
    """A folder as `export_run` leaves it, of untrained networks."""

    def make(folder: Path) -> None:
        calibration = {"resnet50": list(squares(8, (PX, PX))[:, 0])}  # only this one is quantised
        jobs = [
            (
                export.TriageModule(folds),
                (PX, PX),
                folder / f"{name}.onnx",
                calibration.get(name, []),
            )
            for name, folds in networks.items()
        ]
        before = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # as many networks in parallel: others wait
        *written, detector_files = export.write_each(
            [*jobs, (export.DetectorModule(detector), SIZE, folder / "yolo11l.onnx", [])]
        )
        torch.set_num_threads(before)
        triage = dict(zip(networks, written, strict=True))
        decision = {
            "networks": NETWORKS, "weights": (0.5, 0.3, 0.2),
            "network_temperatures": (0.8, 1.0, 1.2), "temperature": 1.3,
            "thresholds": {"youden": 0.0, "shut": 1.0}, "fitted_on": 10,
        }  # fmt: skip
        embeddings = onnx_backend.open_network(folder / "resnet50.onnx")(squares(8, (PX, PX)))[2]
        path = fit_embedding_gate(embeddings, embeddings).save(folder / "gate.npz")
        gate = {"network": "resnet50", "file": path.name, "sha256": digest(path)}
        manifest = {
            "made_by": "dernet-utils test", "profile": "test", "virtual": True,
            "triage": triage, "detector": detector_files, "gate": gate, "decision": decision,
            "lesion_types": LESION_TYPES,
            "score_threshold": 0.001, "triage_px": PX, "detect_size": SIZE, "cache_px": 128,
            "clip_limit": 2.0, "tiles": 8,
        }  # fmt: skip
        (folder / onnx_backend.MANIFEST).write_text(json.dumps(manifest))

    return shared(tmp_path_factory, "models", make)


@pytest.fixture(scope="session")
def service(exported) -> InferenceService:
    """The untrained networks, a few boxes per image, and a gate that accepts every image."""
    made = InferenceService.open(exported, threads=1)
    every = made.pipeline.detector

    def at_two_anchors(image: np.ndarray) -> np.ndarray:
        raw = every(image)
        return raw[:, raw[4:].max(axis=0).argsort()[20:22]]  # neither certain nor hopeless

    pipeline = replace(made.pipeline, detector=at_two_anchors)
    return replace(made, pipeline=pipeline, gate=replace(made.gate, limit=np.inf))

"""The pipeline from a run's own checkpoints, run by torch."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from dernet_utils.core.vocabulary import LESION_TYPES, NETWORKS
from dernet_utils.core.workspace import Workspace
from dernet_utils.detection.training import load_detector
from dernet_utils.detection.yolo import Detector
from dernet_utils.inference.models import read_models
from dernet_utils.inference.pipeline import NetworkOutput, Pipeline
from dernet_utils.triage.crossvalidation import read_decision
from dernet_utils.triage.networks import predict_probabilities
from dernet_utils.triage.training import load_network


def run_pipeline(workspace: Workspace, threshold: str = "youden") -> Pipeline:
    """Return the pipeline of a run's own networks.

    Args:
        workspace: The run.
        threshold: Name of the decision's threshold.

    Returns:
        A pipeline whose triage networks average the probabilities of their folds, without heat
        maps and embeddings.

    Raises:
        DernetError: The run has no pipeline yet, or a checkpoint is missing.
    """
    record, profile = read_models(workspace), workspace.profile
    folder = workspace.weights
    networks = {
        name: [load_network(name, folder / one)[0] for one in record["triage"][name]]
        for name in NETWORKS
    }
    detector = load_detector(folder / record["detector"])[0]
    return Pipeline(
        {name: _triage_function(folds) for name, folds in networks.items()},
        _detector_function(detector),
        read_decision(workspace),
        LESION_TYPES,
        record["score_threshold"],
        profile.triage_px,
        profile.detect_size,
        profile.cache_px,
        profile.clip_limit,
        profile.tiles,
        threshold,
    )


def _triage_function(folds: list[nn.Module]) -> Callable[[np.ndarray], NetworkOutput]:
    def run(square: np.ndarray) -> NetworkOutput:
        pixels = torch.from_numpy(square)[None, None]
        return NetworkOutput(np.mean([predict_probabilities(one, pixels)[0] for one in folds]))

    return run


def _detector_function(detector: Detector) -> Callable[[np.ndarray], np.ndarray]:
    device = next(detector.parameters()).device

    @torch.no_grad()
    def run(filled: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(filled).to(device)[None, None].float() / 255
        return detector.answers(image.expand(-1, 3, -1, -1))[0].cpu().numpy()

    return run

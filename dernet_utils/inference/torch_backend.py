"""A run's trained networks as a pipeline, and what it says of files."""

from collections.abc import Callable

import numpy as np
import torch

from dernet_utils.core.vocabulary import LESION_TYPES, NETWORKS
from dernet_utils.core.workspace import Workspace
from dernet_utils.detection.training import load_detector
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
    device = next(detector.parameters()).device

    def asked(own: list) -> Callable[[np.ndarray], NetworkOutput]:
        return lambda square: NetworkOutput(
            np.mean(
                [predict_probabilities(one, torch.from_numpy(square)[None, None])[0] for one in own]
            )
        )

    @torch.no_grad()
    def answers(filled: np.ndarray) -> np.ndarray:
        shown = torch.from_numpy(filled).to(device)[None, None].float() / 255
        return detector.answers(shown.expand(-1, 3, -1, -1))[0].cpu().numpy()

    return Pipeline(
        {name: asked(own) for name, own in networks.items()},
        answers,
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

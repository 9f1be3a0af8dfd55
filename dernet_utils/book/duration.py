"""How long a run will take here, told from a training step that is measured first."""

import time
from dataclasses import replace

import torch

from dernet_utils.core.profiles import Profile
from dernet_utils.core.weights import starting_weights
from dernet_utils.triage.training import (
    Sample,
    TriageRecipe,
    fast_and_deterministic,
    start_training,
    train_epoch,
)

STEP_SECONDS = 0.75  # `blank_step` of `laptop` on an Intel Xeon with AVX-512 BF16 and AMX


def expected_duration(profile: Profile, usual_minutes: float) -> str:
    """Return a sentence on how long a first run takes here.

    All of a run is taken to be slower by as much as a training step; what is not training may be
    slower by less.

    Args:
        profile: The run's profile.
        usual_minutes: How long it took there.
    """
    seconds = blank_step(profile)
    minutes = float(f"{usual_minutes * max(seconds / STEP_SECONDS, 1.0):.2g}")
    return (
        f"A first run of the profile {profile.name} took {usual_minutes:g} minutes on two cores "
        f"with AVX-512 BF16, where a training step of ResNet50 took {STEP_SECONDS:.2g} s. Here it "
        f"takes {seconds:.2g} s, so expect up to {minutes:,.0f} minutes."
    )


def blank_step(profile: Profile) -> float:
    """Return what a training step of ResNet50 takes here, s, on a profile's image and batch size.

    Its images are blank, so that it can be measured before a run has any data. It has one thread,
    as a training has on two cores; on a busy machine, several would wait for each other.
    """
    recipe = replace(TriageRecipe.of(profile), crop_epochs=0)
    y = torch.arange(recipe.batch) % 2
    pixels = torch.zeros(recipe.batch, 1, recipe.train_px, recipe.train_px, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds_per_step("resnet50", Sample(pixels, y.float()), recipe)
    finally:
        torch.set_num_threads(threads)


def seconds_per_step(name: str, sample: Sample, recipe: TriageRecipe) -> float:
    """Return what a training step on whole images takes here, s: the shortest of three.

    Args:
        name: One of `NETWORKS`.
        sample: Images for one step, `recipe.batch` of them.
        recipe: Without epochs on crops.
    """
    with fast_and_deterministic():
        network, optimizer = start_training(name, starting_weights(name), recipe)
        train_epoch(network, optimizer, sample, recipe, 0)  # the first step is slower
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            train_epoch(network, optimizer, sample, recipe, 1)  # waits for the loss
            seconds.append(time.perf_counter() - started)
    return min(seconds)

"""What a whole training of triage would take on this machine, from one step of each network."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pandas as pd

from dernet_utils.paper import SPOKEN, TRAIN_IMAGES
from dernet_utils.profiles import NETWORKS, Profile
from dernet_utils.triage import Recipe, measure_step
from dernet_utils.workflow import ALLOCATOR


def estimate_triage(
    profile: Profile, threads: int, report: Callable[[str], None], images: int = TRAIN_IMAGES
) -> pd.DataFrame:
    """Take one measured step of each network at a profile's image size and batch.

    Args:
        profile: Its triage recipe and folds count; epochs on crops are left out.
        threads: Threads of the libraries.
        report: Is given a line a network.
        images: Training images of all folds together; else VinDr-SpineXR's.

    Returns:
        One row a network, as text for a page: name, image side, batch, seconds a step, memory,
        hours for all epochs of all folds one after the other.
    """
    recipe = Recipe.of(profile)
    steps = profile.folds * recipe.epochs * (images * (profile.folds - 1) // profile.folds)
    steps //= recipe.batch
    os.environ.update(ALLOCATOR | {"OMP_NUM_THREADS": str(threads)})  # for the processes below
    rows = []
    for name in NETWORKS:
        fresh = multiprocessing.get_context("spawn")  # its memory is the step's own
        with ProcessPoolExecutor(1, mp_context=fresh) as pool:
            found = pool.submit(measure_step, name, recipe).result()
        row = {
            "network": SPOKEN[name],
            "image, px": recipe.image_px,
            "batch": recipe.batch,
            "seconds a step": f"{found['seconds']:.1f}",
            "memory, GB": f"{found['memory_gb']:.1f}",
            "hours for all folds": f"{found['seconds'] * steps / 3600:,.0f}",
        }
        report(", ".join(f"{key} {value}" for key, value in row.items()))
        rows.append(row)
    return pd.DataFrame(rows)

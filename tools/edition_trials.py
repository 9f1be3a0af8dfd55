"""Trials for the edition's recipe, on held-out training patients.

The record is book/results/edition_trials.json.

Each arm changes one number of a small base recipe and trains DenseNet121 with three seeds. All
networks are evaluated on fold 0 of the same virtual training patients. No test patient is scored.

    python tools/edition_trials.py WORKSPACE [--patients 750]
"""

import argparse
import json
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import pandas as pd

from dernet_utils.book.prepare import ensure_prepared
from dernet_utils.core import machine
from dernet_utils.core.files import PROJECT, write_whole
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.workspace import Workspace, commit
from dernet_utils.metrics.classification import auroc
from dernet_utils.metrics.intervals import bootstrap_by_study
from dernet_utils.triage.crossvalidation import triage_images
from dernet_utils.triage.images import Sample, load_pixels
from dernet_utils.triage.networks import predict_probabilities
from dernet_utils.triage.training import TriageRecipe, train_triage

SEEDS = (1, 2, 3)
TEST_SEED = 7  # of the one test patient that a cohort must have; never scored
BASE = {"patients": 300, "px": 160, "epochs": 8, "lr": 5e-4, "crop_epochs": 0}
ARMS = {
    "base": {},
    "150 patients": {"patients": 150},
    "600 patients": {"patients": 600},
    "96 px": {"px": 96},
    "224 px": {"px": 224},
    "4 epochs": {"epochs": 4},
    "16 epochs": {"epochs": 16},
    "rate 0.0002": {"lr": 2e-4},
    "rate 0.001": {"lr": 1e-3},
    "2 epochs on crops first": {"crop_epochs": 2},
}


def train_arm(images: pd.DataFrame, arm: dict, seed: int, folder: Path) -> dict:
    """Train DenseNet121 once; return its AUROC on fold 0 with its interval, and its minutes."""
    recipe = TriageRecipe(
        arm["px"], arm["epochs"], 16, arm["lr"], seed, 32 * round(0.4 * arm["px"] / 32),
        arm["crop_epochs"],
    )  # fmt: skip
    held = images[images["fold"] == 0]
    rest = images[(images["fold"] > 0) & ~images["faint"]]
    some = rest["study_id"].drop_duplicates().head(round(0.8 * arm["patients"]))
    training = rest[rest["study_id"].isin(some)]
    started = time.monotonic()
    trained = train_triage(
        "densenet121", Sample.load(training, recipe.train_px), Sample.load(held, recipe.image_px),
        recipe, folder,
    )  # fmt: skip
    prob = predict_probabilities(trained.network, load_pixels(held["cached_path"], arm["px"]))
    y, studies = held["label"].to_numpy(bool), held["study_id"].to_numpy()
    interval = bootstrap_by_study(lambda rows: auroc(y[rows], prob[rows]), studies, 1000)
    return {
        "seed": seed, "auroc": interval.value, "low": interval.low, "high": interval.high,
        "images": len(training), "minutes": (time.monotonic() - started) / 60,
        "recipe": asdict(recipe),
    }  # fmt: skip


def main() -> None:
    """Run every arm that the record lacks, seed by seed, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=750)
    given = parser.parse_args()
    numbers = {"rendered": (given.patients, 1), "test_seed": TEST_SEED}
    profile = get_profile("edition-training").model_copy(update=numbers)
    workspace = Workspace(profile, given.folder)
    ensure_prepared(workspace, print)
    images = triage_images(workspace)
    record = PROJECT / "book" / "results" / "edition_trials.json"
    found = {"arms": {}}
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
    for seed in SEEDS:
        for name, change in ARMS.items():
            runs = found["arms"].setdefault(name, [])
            if any(run["seed"] == seed for run in runs):
                continue
            runs.append(train_arm(images, BASE | change, seed, workspace.weights))
            print(f"{name}, seed {seed}: {runs[-1]['auroc']:.3f}", flush=True)
            held = images[images["fold"] == 0]
            found |= {
                "command": f"python tools/edition_trials.py FOLDER --patients {given.patients}",
                "commit": commit(), "date": date.today().isoformat(), "data": "virtual",
                "processor": machine.processor_name(), "base": BASE, "network": "densenet121",
                "held_out": {"images": len(held), "studies": held["study_id"].nunique()},
            }  # fmt: skip
            text = json.dumps(found, indent=1) + "\n"
            write_whole(record, lambda part, text=text: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()

"""Time and memory of training on this machine, and comparisons with plain training loops.

Each table names the processor and the commit of its measurement.
"""

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from dernet_utils.book.duration import seconds_per_step
from dernet_utils.book.graph import TRAINING_ENVIRONMENT
from dernet_utils.book.paper import TRAIN_IMAGES
from dernet_utils.book.progress import Say
from dernet_utils.core import machine
from dernet_utils.core.vocabulary import LESION_TYPES, NETWORK_NAMES, NETWORKS
from dernet_utils.core.workspace import Workspace, commit
from dernet_utils.detection import yolo
from dernet_utils.detection.images import DetectorRecipe, detection_images, write_training_set
from dernet_utils.metrics.classification import auroc
from dernet_utils.metrics.intervals import bootstrap_by_study
from dernet_utils.triage.crossvalidation import triage_images
from dernet_utils.triage.networks import (
    as_input,
    build_network,
    predict_probabilities,
)
from dernet_utils.triage.training import (
    Sample,
    TriageRecipe,
    fast_and_deterministic,
    start_training,
    train_epoch,
    training_batches,
)

# isort: split
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import NUM_THREADS

# Triage -----------------------------------------------------------------------------------------


def estimate_triage(
    workspace: Workspace, threads: int, report: Say, images: int = TRAIN_IMAGES
) -> pd.DataFrame:
    """Measure one training step of each triage network at a profile's image size and batch size.

    The step uses images of the run's training split, loaded as for any training. Each network gets
    a process of its own, so that the memory is that of its step.

    Args:
        workspace: The run; its epochs on crops are left out.
        threads: Number of threads of the libraries.
        report: Called with one line per network.
        images: Number of training images, all folds together, for which hours are estimated; by
            default that of VinDr-SpineXR.

    Returns:
        One row per network, as text for a page: name, image side, batch size, seconds per step,
        memory, hours for all epochs of all folds one after another, processor, commit.
    """
    recipe = replace(TriageRecipe.of(workspace.profile), crop_epochs=0)
    folds = workspace.profile.folds
    steps = folds * recipe.epochs * (images * (folds - 1) // folds // recipe.batch)
    # For the processes below: torch and glibc read these when they start.
    os.environ.update(TRAINING_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)})
    rows = []
    for name in NETWORKS:
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=fresh) as pool:
            seconds, memory_gb = pool.submit(measure_step, workspace, name, recipe).result()
        row = {
            "network": NETWORK_NAMES[name],
            "image, px": recipe.image_px,
            "batch": recipe.batch,
            "seconds per step": f"{seconds:.1f}",
            "memory, GB": f"{memory_gb:.1f}",
            "hours for all folds": f"{seconds * steps / 3600:,.0f}",
            **_measured_on(),
        }
        report(", ".join(f"{key} {value}" for key, value in row.items()))
        rows.append(row)
    return pd.DataFrame(rows)


def measure_step(workspace: Workspace, name: str, recipe: TriageRecipe) -> tuple[float, float]:
    """Take four optimisation steps on a run's first images and measure all but the first.

    Returns:
        Seconds of the shortest step, and the peak memory in GB: of this process, or on a GPU of
        torch.
    """
    images = triage_images(workspace)
    train = images[images["split"] == "train"]
    both = pd.concat([rows.head(recipe.batch // 2) for _, rows in train.groupby("label")])
    return seconds_per_step(name, Sample.load(both, recipe.train_px), recipe), _peak_gb()


def compare_loops(workspace: Workspace, image_px: int, report: Say) -> pd.DataFrame:
    """Train each network twice on the same images, by the book's loop and by `plain_epoch`.

    Training is one epoch on crops, if the profile has any, and one on whole images. The loops
    alternate by epoch, on the same batches of all folds but fold 0, on which they are evaluated.

    Args:
        workspace: The run.
        image_px: Side of the images; crops keep their fraction of it.
        report: Called with one line per network.

    Returns:
        One row per network, as text for a page: name, image side, seconds by each loop, their
        ratio, the held-out AUROC by each with its 95 % interval by study, the number of held-out
        images, processor, commit.
    """
    recipe = TriageRecipe.of(workspace.profile)
    crop_px = 16 * round(recipe.crop_px * image_px / recipe.image_px / 16)
    crop_epochs = min(recipe.crop_epochs, 1)
    recipe = replace(recipe, image_px=image_px, crop_px=crop_px, crop_epochs=crop_epochs, epochs=1)
    images = triage_images(workspace)
    train, held = images[images["fold"] > 0], images[images["fold"] == 0]
    sample, held_out = Sample.load(train, recipe.train_px), Sample.load(held, image_px)
    rows = []
    for name in NETWORKS:
        plain, fast, seconds = _race(name, sample, recipe)
        scores = {
            loop: _held_out_auroc(network, held_out, held["study_id"], workspace)
            for loop, network in (("plain", plain), ("ours", fast))
        }
        row = {
            "network": NETWORK_NAMES[name],
            "image, px": image_px,
            "plain, s": f"{seconds['plain']:.0f}",
            "ours, s": f"{seconds['ours']:.0f}",
            "plain / ours": f"{seconds['plain'] / seconds['ours']:.2f}",
            "AUROC, plain": scores["plain"],
            "AUROC, ours": scores["ours"],
            "held-out images": len(held),
            **_measured_on(),
        }
        report(", ".join(f"{key} {value}" for key, value in row.items()))
        rows.append(row)
    return pd.DataFrame(rows)


def _race(
    name: str, sample: Sample, recipe: TriageRecipe
) -> tuple[nn.Module, nn.Module, dict[str, float]]:
    """Return the network of the plain loop, that of the book's, and the seconds of each loop."""
    fast, optimizer = start_training(name, None, recipe)
    plain = build_network(name, None, recipe.seed).to(machine.device())
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=recipe.lr)
    seconds = {"plain": 0.0, "ours": 0.0}
    for epoch in range(recipe.crop_epochs + recipe.epochs):
        started = time.perf_counter()
        plain_epoch(plain, plain_optimizer, sample, recipe, epoch)
        between = time.perf_counter()
        with fast_and_deterministic():
            train_epoch(fast, optimizer, sample, recipe, epoch)
        seconds["plain"] += between - started
        seconds["ours"] += time.perf_counter() - between
    return plain, fast, seconds


def plain_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Sample,
    recipe: TriageRecipe,
    epoch: int,
) -> None:
    """Train for one epoch in float32 and torch's default memory layout, without refinements.

    Args:
        network, optimizer: Changed in place.
        train, recipe, epoch: As `triage.training.train_epoch` takes them.
    """
    network.train()
    for grey, y, lr in training_batches(train, recipe, epoch, next(network.parameters()).device):
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = network(as_input(grey).contiguous()).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _held_out_auroc(
    network: nn.Module, held_out: Sample, studies: pd.Series, workspace: Workspace
) -> str:
    y, prob = held_out.y.numpy(), predict_probabilities(network, held_out.pixels)
    profile = workspace.profile
    interval = bootstrap_by_study(
        lambda rows: auroc(y[rows], prob[rows]), studies, profile.bootstrap, profile.seed
    )
    return format(interval, ".2f")


# Detector ---------------------------------------------------------------------------------------


class StockTrainer(yolo.MosaicDecay):
    """ultralytics' own training step: its network, loss, memory layout and optimizer."""

    def build_optimizer(self, *given, **named) -> torch.optim.Optimizer:
        """Return the optimizer as ultralytics builds it."""
        return super(yolo.MosaicDecay, self).build_optimizer(*given, **named)


def estimate_detector(workspace: Workspace, threads: int, report: Say) -> pd.DataFrame:
    """Measure one training step of YOLO11-L at a profile's image size and batch size.

    Args:
        workspace: The run.
        threads: Number of threads of the libraries.
        report: Called with one line.

    Returns:
        One row, as text for a page: image size, batch size, seconds per step, memory, number of
        the detector's training images, hours for all epochs on them, processor, commit.
    """
    os.environ.update(TRAINING_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)})
    recipe = DetectorRecipe.of(workspace.profile)
    images = len(detection_images(workspace).training)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        seconds, memory_gb = pool.submit(measure_detector_step, workspace, recipe).result()
    steps = recipe.epochs * -(-images // recipe.batch)
    row = {
        "network": "YOLO11-L",
        "image, px": "{} × {}".format(*recipe.input_size),
        "batch": recipe.batch,
        "seconds per step": f"{seconds:.1f}",
        "memory, GB": f"{memory_gb:.1f}",
        "images": images,
        "hours": f"{seconds * steps / 3600:,.1f}",
        **_measured_on(),
    }
    report(", ".join(f"{key} {value}" for key, value in row.items()))
    return pd.DataFrame([row])


def measure_detector_step(workspace: Workspace, recipe: DetectorRecipe) -> tuple[float, float]:
    """Take two steps; return the seconds of the second and the process's peak memory in GB."""
    with (
        _trainer(yolo.MosaicDecay, workspace, recipe) as trainer,
        machine.denormals_flushed(),
    ):
        seconds = [_step(trainer, batch) for batch in _batches(trainer, 2)][-1]
    return seconds, _peak_gb()


def compare_steps(
    workspace: Workspace, view: tuple[int, int], report: Say, rounds: int = 5
) -> pd.DataFrame:
    """Time steps of YOLO11-L alternately: stock ultralytics, the same with all threads, and ours.

    By default, ultralytics leaves one core of the processor idle.

    Args:
        workspace: The run; the batches are its first images with lesions.
        view: Height and width of the input, px.
        report: Called with one line.
        rounds: Steps of each, after one that is not counted.

    Returns:
        One row, as text for a page: image size, batch size, the median seconds per step of each,
        how many times faster ours is, processor, commit.
    """
    recipe = replace(DetectorRecipe.of(workspace.profile), input_size=view)
    every = torch.get_num_threads()
    ways = {"stock": (StockTrainer, NUM_THREADS), "stock, all threads": (StockTrainer, every)}
    ways["ours"] = (yolo.MosaicDecay, every)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with ExitStack() as opened:
        trainers = {
            way: opened.enter_context(_trainer(kind, workspace, recipe))
            for way, (kind, _) in ways.items()
        }
        batches = {way: _batches(trainer, rounds + 1) for way, trainer in trainers.items()}
        for _ in range(rounds + 1):
            for way, (_, threads) in ways.items():
                torch.set_num_threads(threads)
                flushed = machine.denormals_flushed() if way == "ours" else nullcontext()
                with flushed:
                    seconds[way].append(_step(trainers[way], next(batches[way])))
    torch.set_num_threads(every)
    median = {way: statistics.median(taken[1:]) for way, taken in seconds.items()}
    row = {
        "network": "YOLO11-L",
        "image, px": "{} × {}".format(*view),
        "batch": recipe.batch,
        **{f"{way}, s": f"{value:.2f}" for way, value in median.items()},
        "stock / ours": f"{median['stock'] / median['ours']:.2f}",
        "all threads / ours": f"{median['stock, all threads'] / median['ours']:.2f}",
        **_measured_on(),
    }
    report(", ".join(f"{key} {value}" for key, value in row.items()))
    return pd.DataFrame([row])


@contextmanager
def _trainer(
    kind: type[yolo.MosaicDecay],
    workspace: Workspace,
    recipe: DetectorRecipe,
) -> Iterator[yolo.MosaicDecay]:
    """Yield a trainer before its first step on a few images; its files are deleted afterwards."""
    images = detection_images(workspace)
    some = images.training.head(2 * recipe.batch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(write_training_set(some, images.boxes, recipe, Path(folder)))
        network = yolo.build_detector(LESION_TYPES, recipe.seed)
        if kind is StockTrainer:
            stock = DetectionModel("yolo11l.yaml", nc=len(LESION_TYPES), verbose=False)
            stock.load_state_dict(network.state_dict())
            network = stock
        trainer.model = network
        trainer._setup_train()
        trainer.epoch = 0
        trainer.begin_epoch()
        trainer.model.train()
        yield trainer


def _batches(trainer: yolo.MosaicDecay, steps: int) -> Iterator[dict]:
    """Yield preprocessed batches, one per step, going through the images as often as needed."""
    while steps:
        for batch in trainer.train_loader:
            if steps and len(batch["img"]) == trainer.batch_size:
                steps -= 1
                yield trainer.preprocess_batch(batch)


def _step(trainer: yolo.MosaicDecay, batch: dict) -> float:
    """Take one optimisation step as ultralytics' loop does; return its seconds."""
    started = time.perf_counter()
    loss, _ = trainer.model(batch)
    loss.sum().backward()
    trainer.optimizer_step()
    return time.perf_counter() - started


# Machine ----------------------------------------------------------------------------------------


def _measured_on() -> dict[str, str]:
    return {"processor": machine.processor_name(), "commit": commit()}


def _peak_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

"""Training a triage network, and the checkpoint of a training run.

A run is named by a digest of everything that shapes it. A finished run is loaded; a killed one
continues after its last finished epoch and ends with the weights of an uninterrupted run.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import digest_of, file_digest, modules_digest, write_whole
from dernet_utils.core.packed import read_weights
from dernet_utils.core.profiles import Profile
from dernet_utils.metrics.classification import auroc
from dernet_utils.triage.augment import augment, draw_crops
from dernet_utils.triage.images import Sample, load_pixels  # noqa: F401  as training.load_pixels
from dernet_utils.triage.networks import as_input, autocast, build_network, predict_logits

WEIGHT_DECAY = 0.01  # torch's default for AdamW; the paper does not give one
CROPS_PER_IMAGE = 9  # per training image and epoch on crops, half of them with a lesion; ours
CROP_BATCH = 32  # ours
# Modules whose code shapes a training run's result, and with it the run's name.
SHAPING = (
    "triage/training", "triage/augment", "triage/images", "triage/networks", "core/machine"
)  # fmt: skip


@dataclass(frozen=True)
class TriageRecipe:
    """The settings of one training run.

    Attributes:
        image_px: Side of the square input.
        epochs: Passes over the training images; the network after the last one is kept.
        batch: Images per step.
        lr: Learning rate of the first step; it falls to zero along a cosine over all epochs, those
            on crops included.
        seed: Seed of initial weights, order, augmentation, crops and dropout.
        crop_px: Side of the crops that `draw_crops` draws.
        crop_epochs: Epochs on crops, before those on whole images.
        detail: Side of a training image while it is augmented, as a multiple of `image_px`. With 1,
            rotation blurs training images, while the images that are scored stay sharp.
    """

    image_px: int
    epochs: int
    batch: int
    lr: float
    seed: int = 42
    crop_px: int = 48
    crop_epochs: int = 0
    detail: int = 1

    @classmethod
    def of(cls, profile: Profile) -> "TriageRecipe":
        """Return the recipe of a profile."""
        return cls(
            profile.triage_px,
            profile.triage_epochs,
            profile.triage_batch,
            profile.triage_lr,
            profile.seed,
            profile.triage_crop_px,
            profile.triage_crop_epochs,
            profile.triage_detail,
        )

    @property
    def train_px(self) -> int:
        """Side of a training image before it is augmented."""
        return self.image_px * self.detail


@dataclass(frozen=True)
class TrainedNetwork:
    """A finished training run.

    Attributes:
        network: The network after the last epoch, in evaluation mode.
        history: One row per epoch: ``epoch`` from 1, ``trained_on`` (``crops``, or ``images`` for
            whole images), ``lr`` of its last step, ``train_loss`` (with augmentation),
            ``validation_loss``, ``validation_auroc`` (both of whole images; missing before the
            last epoch on crops), ``validation_logits`` (a list, to four decimals, in the order of
            the images; missing likewise), ``seconds``.
        checkpoint: The safetensors file with weights and history.
    """

    network: nn.Module
    history: pd.DataFrame
    checkpoint: Path


# A run: loaded, continued or begun


def train_triage(
    name: str,
    train: Sample,
    validation: Sample,
    recipe: TriageRecipe,
    folder: Path,
    weights: Path | None = None,
    progress: Callable[[dict], None] | None = None,
    about: dict[str, str] | None = None,
) -> TrainedNetwork:
    """Train a triage network, or load it if this run is finished already.

    AdamW on binary cross-entropy, lines 3 to 6 of the paper's Algorithm 1; the learning rate falls
    along a cosine from `recipe.lr` to zero. The first `recipe.crop_epochs` epochs are on crops.
    From the last of these on, the validation images are scored after each epoch; they do not
    influence the training.

    Args:
        name: One of `NETWORKS`.
        train: Training images of both classes, `recipe.train_px` wide.
        validation: Images of other studies, for the learning curve, `recipe.image_px` wide.
        recipe: The run's settings.
        folder: For checkpoints: ``<name>-<digest>.safetensors`` of a finished run,
            ``<name>-<digest>.resume`` of one that is not.
        weights: As in `build_network`.
        progress: Called with the history's row after each epoch that is trained now.
        about: More entries for the checkpoint's metadata, such as the profile.

    Returns:
        The trained network, its learning curve and its checkpoint.

    Raises:
        DernetError: The network is unknown; the training images are of one class or not of the
            recipe's size; or the recipe has epochs on crops, but no lesion is given or the crops
            are larger than the images.
    """
    _check_training(train, recipe)
    key = _run_key(name, train, validation, recipe, weights)
    checkpoint = Path(folder) / f"{name}-{key}.safetensors"
    if not checkpoint.is_file():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with fast_and_deterministic():
            _train(name, train, validation, recipe, checkpoint, weights, progress, about or {})
    network, history = load_network(name, checkpoint, recipe)
    return TrainedNetwork(network, history, checkpoint)


def _check_training(train: Sample, recipe: TriageRecipe) -> None:
    """Refuse images that cannot be trained on, before anything is computed."""
    if train.pixels.shape[2:] != (recipe.train_px, recipe.train_px):
        raise DernetError(
            f"The recipe trains on squares of {recipe.train_px} px, and the images are "
            f"{train.pixels.shape[-1]} x {train.pixels.shape[-2]} px: load them at that size."
        )
    if len(train.y.unique()) < 2:
        raise DernetError("Training needs normal and abnormal images, but all are of one class.")
    if recipe.crop_epochs and not len(train.lesions):
        raise DernetError(
            "The recipe trains on crops of lesions, but no lesion's position is given."
        )
    if recipe.crop_epochs and recipe.crop_px > recipe.image_px:
        raise DernetError(
            f"Crops of {recipe.crop_px} px do not fit into images of {recipe.image_px} px: "
            "make them smaller."
        )


def _run_key(
    name: str, train: Sample, validation: Sample, recipe: TriageRecipe, weights: Path | None
) -> str:
    """Digest of all that shapes a run: images, labels, settings, start, code, libraries."""
    tensors = [x for part in (train, validation) for x in (part.pixels, part.y, part.lesions)]
    return digest_of(
        name,
        json.dumps(asdict(recipe), sort_keys=True),
        f"torch {torch.__version__}, timm {timm.__version__}",
        modules_digest(*SHAPING),
        *(
            f"{tuple(x.shape)} {hashlib.sha256(x.contiguous().numpy()).hexdigest()}"
            for x in tensors
        ),
        "random" if weights is None else file_digest(weights),
    )[:16]


def _train(
    name: str,
    train: Sample,
    validation: Sample,
    recipe: TriageRecipe,
    checkpoint: Path,
    weights: Path | None,
    progress: Callable[[dict], None] | None,
    about: dict[str, str],
) -> None:
    """Train the remaining epochs and write the finished checkpoint."""
    device = machine.device()
    network, optimizer = start_training(name, weights, recipe)
    resume = checkpoint.with_suffix(".resume")
    history: list[dict] = []
    if resume.is_file():
        saved = torch.load(resume, map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
    for epoch in range(len(history), recipe.crop_epochs + recipe.epochs):
        started = time.perf_counter()
        train_loss = train_epoch(network, optimizer, train, recipe, epoch)
        loss = area = logits_kept = None
        if epoch + 1 >= recipe.crop_epochs:
            logits = torch.cat(list(predict_logits(network, validation.pixels, recipe.batch)))
            loss = float(F.binary_cross_entropy_with_logits(logits, validation.y))
            area = auroc(validation.y.numpy(), logits.numpy())
            logits_kept = [round(value, 4) for value in logits.tolist()]
        row = {
            "epoch": epoch + 1,
            "trained_on": "crops" if epoch < recipe.crop_epochs else "images",
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "validation_loss": loss,
            "validation_auroc": area,
            "validation_logits": logits_kept,
            "seconds": time.perf_counter() - started,
        }
        history.append(row)
        saved = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
        }
        write_whole(resume, lambda part, saved=saved: torch.save(saved, part))
        if progress is not None:
            progress(row)
    state = {key: value.contiguous().cpu() for key, value in network.state_dict().items()}
    metadata = about | {"network": name, "recipe": json.dumps(asdict(recipe))}
    metadata["history"] = json.dumps(history)
    write_whole(checkpoint, lambda part: save_file(state, part, metadata))
    resume.unlink(missing_ok=True)


# Parts of a training run


def start_training(
    name: str, weights: Path | None, recipe: TriageRecipe
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network before its first step, on the device to train on, and its optimiser.

    Args:
        name, weights: As in `build_network`.
        recipe: The run's settings.

    Raises:
        DernetError: As `build_network` raises.
    """
    network = build_network(name, weights, recipe.seed)
    network.to(machine.device(), memory_format=torch.channels_last)
    if machine.device().type == "cpu":
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                _in_float32(module)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.lr, weight_decay=WEIGHT_DECAY, fused=True
    )
    return network, optimizer


def _in_float32(module: nn.Module) -> None:
    """Make a layer compute in float32 while the layers around it compute in bfloat16.

    A depthwise convolution does little arithmetic, and on small maps its gradient is slow in
    bfloat16: a step of EfficientNetV2-S on crops of 48 px took 0.62 s, and takes 0.43 s this way.
    """
    forward = module.forward

    def in_float32(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float()).to(x.dtype)

    module.forward = in_float32


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Sample,
    recipe: TriageRecipe,
    epoch: int,
) -> float:
    """Train one epoch, on the training images or on crops of them; return the mean loss.

    Args:
        network, optimizer: As `start_training` returns them; changed.
        train, recipe, epoch: As in `training_batches`.
    """
    device = next(network.parameters()).device
    network.train()
    losses = []
    for grey, y, lr in training_batches(train, recipe, epoch, device):
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(device):
            logits = network(as_input(grey))
        loss = F.binary_cross_entropy_with_logits(logits.float().squeeze(1), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def training_batches(
    train: Sample, recipe: TriageRecipe, epoch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield an epoch's training batches; equal arguments yield equal batches.

    Args:
        train: Training images.
        recipe: The run's settings.
        epoch: From 0; epochs on crops come first.
        device: Where the images are augmented.

    Yields:
        Augmented images, float32 in [0, 1], shape (b, 1, side, side); their labels, shape (b,); and
        the step's learning rate.
    """
    # Each epoch has its own seed, so that a resumed run draws what an uninterrupted one draws.
    seed = recipe.seed * 100_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for dropout
    pixels, y, batch = train.pixels, train.y, recipe.batch
    if epoch < recipe.crop_epochs:
        side = recipe.crop_px * recipe.detail
        pixels, y = draw_crops(train, CROPS_PER_IMAGE * len(train), side, generator)
        batch = CROP_BATCH
    batches = _batches(len(y), batch, generator)
    for step, rows in enumerate(batches):
        done = (epoch + step / len(batches)) / (recipe.crop_epochs + recipe.epochs)
        lr = recipe.lr * (1 + math.cos(math.pi * done)) / 2
        grey = F.avg_pool2d(augment(pixels[rows].to(device), generator), recipe.detail)
        yield grey, y[rows].to(device), lr


def _batches(n: int, batch: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Shuffled rows in batches; an incomplete last batch is left out, unless it is the only one."""
    batches = torch.randperm(n, generator=generator).split(batch)
    return batches if len(batches) == 1 or len(batches[-1]) == batch else batches[:-1]


@contextmanager
def fast_and_deterministic() -> Iterator[None]:
    """Use deterministic algorithms and flush denormals; afterwards torch is as it was before."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it
    with torch.random.fork_rng(), machine.denormals_flushed():
        torch.use_deterministic_algorithms(True, warn_only=True)  # CUDA lacks some
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


# Checkpoints


def load_network(
    name: str, checkpoint: Path, recipe: TriageRecipe | None = None
) -> tuple[nn.Module, pd.DataFrame]:
    """Return the network and the learning curve of a finished run.

    Args:
        name: One of `NETWORKS`.
        checkpoint: A file that `train_triage` wrote, packed (`core.packed`) or not.
        recipe: The settings that it must have been trained with; None accepts any.

    Returns:
        The network in evaluation mode, and the history as `TrainedNetwork` has it.

    Raises:
        DernetError: The file is missing or damaged, or is of another network or recipe.
    """
    found = checkpoint_facts(checkpoint)
    expected = {"network": name}
    if recipe is not None:
        expected["recipe"] = json.dumps(asdict(recipe))
    for fact, value in expected.items():
        if found[fact] != value:
            raise DernetError(
                f"{checkpoint} was expected to hold {fact} {value}, but holds {found[fact]}: "
                "name the right file, or delete it and train again."
            )
    history = json.loads(found["history"])
    network = build_network(name)
    network.load_state_dict(read_weights(checkpoint)[0])
    network.to(machine.device(), memory_format=torch.channels_last).eval()
    return network, pd.DataFrame(history)


def checkpoint_facts(checkpoint: Path) -> dict[str, str]:
    """Return a checkpoint's metadata: ``network``, ``recipe``, ``history`` and what was added.

    Args:
        checkpoint: A file that `train_triage` wrote.

    Raises:
        DernetError: The file is missing or damaged, or `train_triage` did not write it.
    """
    try:
        with safe_open(checkpoint, framework="pt") as file:
            facts = file.metadata() or {}
    except (FileNotFoundError, SafetensorError) as error:
        raise DernetError(
            f"{checkpoint} cannot be read as a checkpoint ({error}): delete it and train again."
        ) from error
    if missing := {"network", "recipe", "history"} - set(facts):
        raise DernetError(
            f"{checkpoint} does not describe the run that wrote it (it lacks "
            f"{', '.join(sorted(missing))}): pass weights from elsewhere by DERNET_WEIGHTS."
        )
    return facts


def triage_epoch_line(row: dict) -> str:
    """Return one line of a training log.

    Args:
        row: Of `TrainedNetwork.history`.

    >>> triage_epoch_line({"epoch": 3, "train_loss": 0.61, "validation_loss": 0.58,
    ...             "validation_auroc": 0.74, "seconds": 12.3})
    'epoch  3   train loss 0.610   validation loss 0.580   validation AUROC 0.740   12 s'
    """
    parts = [f"epoch {row['epoch']:2d}", f"train loss {row['train_loss']:.3f}"]
    if row["validation_auroc"] is not None:
        parts.append(f"validation loss {row['validation_loss']:.3f}")
        parts.append(f"validation AUROC {row['validation_auroc']:.3f}")
    return "   ".join([*parts, f"{row['seconds']:.0f} s"])

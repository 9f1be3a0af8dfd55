"""Normal or abnormal: the three networks, their training, their probabilities.

One contract for `densenet121`, `tf_efficientnetv2_s` and `resnet50`: a square grey image goes in
as three equal channels with ImageNet's mean and deviation, one logit comes out. A training run
is named by a digest of everything that shapes it, so that a finished run is loaded and a killed
one goes on at its last finished epoch.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import modules_digest
from dernet_utils.core.profiles import Profile
from dernet_utils.dataset.prepared import load_cached
from dernet_utils.metrics.classification import auroc
from dernet_utils.triage.networks import as_input, autocast, build_network, predict_logits

ROTATION_DEG = 15.0  # companion code: up to 10-15 degrees
BRIGHTNESS = CONTRAST = 0.2  # companion code: up to 20 %
WEIGHT_DECAY = 0.01  # torch's default for AdamW; the paper is silent
CROPS_PER_IMAGE = 9  # crops an epoch for each training film, half of them with a lesion; ours
CROP_BATCH = 32  # ours
# Modules that decide what a training comes to.
SHAPING = ("triage/training", "triage/networks", "core/machine")


@dataclass(frozen=True)
class TriageRecipe:
    """The numbers of one training run.

    Attributes:
        image_px: Side of the square input.
        epochs: Passes over the training images; all are made, the last one counts.
        batch: Images a step.
        lr: Learning rate of the first step; a cosine takes it to zero over all epochs, those on
            crops among them.
        seed: Seed of initial weights, order, augmentation, crops and dropout.
        crop_px: Side of the crops that `draw_crops` draws.
        crop_epochs: Epochs on crops, before those on whole images.
        detail: Side of a training image while it is turned and mirrored, over `image_px`. At 1 a
            turned image is blurred, and one that is scored is not.
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
        """Return the recipe that a profile asks for."""
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
        """Side of a training image before it is turned."""
        return self.image_px * self.detail


@dataclass(frozen=True)
class Sample:
    """Images with their labels.

    Attributes:
        pixels: uint8, shape (n, 1, px, px), 0 black to 255 white.
        y: float32, shape (n,), 1 abnormal, 0 normal.
        lesions: float32, shape (k, 4), one row a lesion: row of its image, centre x and y in
            pixels of the square, number of its type. Empty where nobody learns from crops.
    """

    pixels: Tensor
    y: Tensor
    lesions: Tensor = field(default_factory=lambda: torch.empty(0, 4))

    @classmethod
    def load(cls, images: pd.DataFrame, image_px: int) -> "Sample":
        """Read cached images into memory, each resized to a square.

        Args:
            images: Rows with ``cached_path`` (as `cache.cache_images` returns it), ``label`` (whether
                abnormal) and perhaps ``lesions``: for each image an array of shape (k, 3), the
                centres x and y as shares of width and height, and the number of the type.
            image_px: Side of the square; the aspect ratio is not kept, as in the companion code.
        """
        found = enumerate(images.get("lesions", []))
        lesions = [
            (row, x * image_px, y * image_px, kind) for row, of in found for x, y, kind in of
        ]
        return cls(
            load_pixels(images["cached_path"], image_px),
            torch.tensor(images["label"].to_numpy(np.float32)),
            torch.tensor(lesions, dtype=torch.float32).reshape(-1, 4),
        )

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 1 or self.pixels.dtype != torch.uint8:
            raise DernetError(
                "Images for triage are 8-bit grey of shape (n, 1, px, px), not "
                f"{self.pixels.dtype} of shape {tuple(self.pixels.shape)}."
            )
        if self.y.shape != self.pixels.shape[:1] or not len(self.y):
            raise DernetError(
                f"Triage needs one label for each of at least one image: {len(self.y)} labels "
                f"and {len(self.pixels)} images came."
            )

    def __len__(self) -> int:
        return len(self.y)


def load_pixels(paths: Iterable[str], image_px: int) -> Tensor:
    """Read cached images, each resized to a square: uint8, shape (n, 1, px, px)."""
    squares = [
        cv2.resize(load_cached(path), (image_px, image_px), interpolation=cv2.INTER_AREA)
        for path in paths
    ]
    return torch.from_numpy(np.stack(squares)).unsqueeze(1)


@dataclass(frozen=True)
class TrainedNetwork:
    """What a training run leaves.

    Attributes:
        network: After the last epoch, in evaluation mode.
        history: One row an epoch: ``epoch`` from 1, ``learnt_from`` (crops or films), ``lr`` at
            its end, ``train_loss`` (with augmentation), ``validation_loss``,
            ``validation_auroc`` (both of whole images; missing before the last epoch on crops),
            ``validation_logits`` (a list, to four decimals, in the order of the images; missing
            likewise), ``seconds``.
        checkpoint: The safetensors file with weights and history.
    """

    network: nn.Module
    history: pd.DataFrame
    checkpoint: Path


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, rotate, brighten and stretch each image of a batch by a draw of its own.

    Horizontal flip with probability 0.5, rotation within +-15 degrees, contrast about the
    image's mean and brightness within +-20 % (companion code of the paper).

    Args:
        pixels: uint8, shape (b, 1, px, px).
        generator: Seeded; on the CPU.

    Returns:
        float32 in [0, 1], same shape; corners that rotation uncovers are black.
    """
    grey = pixels.float() / 255
    n = len(grey)

    def between(low: float, high: float) -> Tensor:
        draw = torch.rand(n, generator=generator) * (high - low) + low
        return draw.to(grey.device)

    flip = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
    angle = torch.deg2rad(between(-ROTATION_DEG, ROTATION_DEG))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    affine = torch.stack([flip * cos, -sin, zero, flip * sin, cos, zero], dim=1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(grey.shape), align_corners=False)
    grey = F.grid_sample(grey, grid, mode="bilinear", align_corners=False)

    contrast = between(1 - CONTRAST, 1 + CONTRAST).view(n, 1, 1, 1)
    brightness = between(1 - BRIGHTNESS, 1 + BRIGHTNESS).view(n, 1, 1, 1)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    return (((grey - mean) * contrast + mean) * brightness).clamp(0, 1)


def draw_crops(
    sample: Sample, n: int, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw square crops, half of them with a lesion and half from normal images.

    A lesion is drawn with a probability that falls with the square root of its type's number, so
    that rare types are seen more often than they occur. A crop from a normal image lies where
    some lesion lies in another image: its place alone tells nothing.

    Args:
        sample: With lesions, and with normal images.
        n: How many.
        side: Side of a crop in pixels of the square, at most that of the images.
        generator: Seeded; on the CPU.

    Returns:
        Crops, uint8, shape (n, 1, side, side), and their labels, float32, shape (n,): n // 2 ones,
        then zeros. A lesion's centre lies within a quarter of the side of the crop's, but where
        the image ends.
    """
    kind = sample.lesions[:, 3].long()
    chance = torch.bincount(kind)[kind].float().rsqrt()
    drawn = torch.multinomial(chance, n, replacement=True, generator=generator)
    normal = torch.nonzero(sample.y == 0)[:, 0]
    film = sample.lesions[drawn, 0].long()
    others = torch.randint(len(normal), (n - n // 2,), generator=generator)
    film[n // 2 :] = normal[others]
    shift = (torch.rand(n, 2, generator=generator) - 0.5) * side / 2
    corner = (sample.lesions[drawn, 1:3] + shift - side / 2).round().long()
    corner = corner.clamp(0, sample.pixels.shape[-1] - side).tolist()
    crops = [
        sample.pixels[row, :, y : y + side, x : x + side]
        for row, (x, y) in zip(film.tolist(), corner, strict=True)
    ]
    return torch.stack(crops), (torch.arange(n) < n // 2).float()


# Training


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
    """Train a triage network, or load it where this very run is finished.

    AdamW on binary cross-entropy, lines 3 to 6 of the paper's Algorithm 1, with a cosine from
    `recipe.lr` to zero; where the recipe says so, its first epochs are on crops. From the last
    of these on the validation images are scored after each epoch; they change nothing.

    Args:
        name: One of `NETWORKS`.
        train: Images to learn from, of both classes, `recipe.train_px` wide.
        validation: Images of other studies, for the learning curve, `recipe.image_px` wide.
        recipe: The run's numbers.
        folder: Where checkpoints lie; one run is ``<name>-<digest>.safetensors``, and
            ``<name>-<digest>.resume`` while it is not finished.
        weights: As in `build_network`.
        progress: Called with the history's row after each epoch that is trained now.
        about: What else the checkpoint's metadata shall say, such as the profile.

    Returns:
        The trained network, its learning curve and its checkpoint.

    Raises:
        DernetError: The network is unknown, the training images are of one class or of another
            size than the recipe's, or crops are wanted and no lesion is marked.
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


def load_network(
    name: str, checkpoint: Path, recipe: TriageRecipe | None = None
) -> tuple[nn.Module, pd.DataFrame]:
    """Return the network and the learning curve of a finished run.

    Args:
        name: One of `NETWORKS`.
        checkpoint: A file that `train_triage` left.
        recipe: Where given, the numbers that it must have been trained with.

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
                f"{checkpoint} was expected to hold {fact} {value}, and holds {found[fact]}: "
                "name the right file, or delete it and train anew."
            )
    history = json.loads(found["history"])
    network = build_network(name)
    network.load_state_dict(load_file(checkpoint))
    network.to(machine.device(), memory_format=torch.channels_last).eval()
    return network, pd.DataFrame(history)


def triage_epoch_line(row: dict) -> str:
    """Return one line of a training log.

    >>> triage_epoch_line({"epoch": 3, "train_loss": 0.61, "validation_loss": 0.58,
    ...             "validation_auroc": 0.74, "seconds": 12.3})
    'epoch  3   train loss 0.610   validation loss 0.580   validation AUROC 0.740   12 s'
    """
    parts = [f"epoch {row['epoch']:2d}", f"train loss {row['train_loss']:.3f}"]
    if row["validation_auroc"] is not None:
        parts.append(f"validation loss {row['validation_loss']:.3f}")
        parts.append(f"validation AUROC {row['validation_auroc']:.3f}")
    return "   ".join([*parts, f"{row['seconds']:.0f} s"])


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
    """Run the epochs that are still to be run and leave a finished checkpoint."""
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
        loss = area = said = None
        if epoch + 1 >= recipe.crop_epochs:
            logits = torch.cat(list(predict_logits(network, validation.pixels, recipe.batch)))
            loss = float(F.binary_cross_entropy_with_logits(logits, validation.y))
            area = auroc(validation.y.numpy(), logits.numpy())
            said = [round(value, 4) for value in logits.tolist()]
        row = {
            "epoch": epoch + 1,
            "learnt_from": "crops" if epoch < recipe.crop_epochs else "films",
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "validation_loss": loss,
            "validation_auroc": area,
            "validation_logits": said,
            "seconds": time.perf_counter() - started,
        }
        history.append(row)
        saved = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
        }
        _replace(resume, lambda path, saved=saved: torch.save(saved, path))
        if progress is not None:
            progress(row)
    state = {key: value.contiguous().cpu() for key, value in network.state_dict().items()}
    metadata = about | {"network": name, "recipe": json.dumps(asdict(recipe))}
    metadata["history"] = json.dumps(history)
    _replace(checkpoint, lambda path: save_file(state, path, metadata))
    resume.unlink(missing_ok=True)


def start_training(
    name: str, weights: Path | None, recipe: TriageRecipe
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network before its first step, where it is to be trained, and its optimiser.

    Args:
        name, weights: As in `build_network`.
        recipe: The run's numbers.
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


def checkpoint_facts(checkpoint: Path) -> dict[str, str]:
    """Return what a checkpoint says of itself: ``network``, ``recipe``, ``history`` and more.

    Raises:
        DernetError: The file is missing or damaged, or no run of ours left it.
    """
    try:
        with safe_open(checkpoint, framework="pt") as file:
            facts = file.metadata() or {}
    except (FileNotFoundError, SafetensorError) as error:
        raise DernetError(
            f"{checkpoint} was expected to be a whole checkpoint, and cannot be read ({error}): "
            "delete it and train anew."
        ) from error
    if missing := {"network", "recipe", "history"} - set(facts):
        raise DernetError(
            f"{checkpoint} was expected to say which run left it, and lacks "
            f"{', '.join(sorted(missing))}: give foreign weights by DERNET_WEIGHTS."
        )
    return facts


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Sample,
    recipe: TriageRecipe,
    epoch: int,
) -> float:
    """Pass once over the training images, or over crops of them; return the mean loss.

    Args:
        network, optimizer: As `start_training` returns them; changed.
        train, recipe, epoch: As in `lessons`.
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
    """Yield what an epoch shows, a step at a time; the same whoever asks, and whenever.

    Args:
        train: Images to learn from.
        recipe: The run's numbers.
        epoch: From 0; those on crops come first.
        device: Where the images are augmented.

    Yields:
        Augmented images, float32 in [0, 1], shape (b, 1, side, side); their labels, shape (b,); and
        the step's learning rate.
    """
    # Every epoch has a seed of its own, so that a resumed run draws what an unbroken one draws.
    seed = recipe.seed * 100_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # should a network draw, as dropout does
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
    """Shuffled rows in batches; a last one that is not full is left out of this epoch."""
    batches = torch.randperm(n, generator=generator).split(batch)
    return batches if len(batches) == 1 or len(batches[-1]) == batch else batches[:-1]


def _in_float32(module: nn.Module) -> None:
    """Keep a layer out of bfloat16, between layers that are in it.

    A depthwise convolution has next to nothing to multiply, and on small maps its gradient is slow
    in bfloat16: a step of EfficientNetV2-S on crops of 48 px took 0.62 s, and so takes 0.43 s.
    """
    forward = module.forward

    def in_float32(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float()).to(x.dtype)

    module.forward = in_float32


@contextmanager
def fast_and_deterministic() -> Iterator[None]:
    """Deterministic algorithms, denormals flushed; undone at the end."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    with torch.random.fork_rng(), machine.denormals_flushed():
        torch.use_deterministic_algorithms(True, warn_only=True)  # CUDA lacks one or two
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


# Checkpoints


def _check_training(train: Sample, recipe: TriageRecipe) -> None:
    if train.pixels.shape[2:] != (recipe.train_px, recipe.train_px):
        raise DernetError(
            f"The recipe trains on squares of {recipe.train_px} px, and the images are "
            f"{train.pixels.shape[-1]} x {train.pixels.shape[-2]} px: load them at that size."
        )
    if len(train.y.unique()) < 2:
        raise DernetError("Training needs normal and abnormal images, and all are of one class.")
    if recipe.crop_epochs and not len(train.lesions):
        raise DernetError(
            "The recipe learns from crops of lesions, and no lesion's place is given."
        )
    if recipe.crop_epochs and recipe.crop_px > recipe.image_px:
        raise DernetError(
            f"Crops of {recipe.crop_px} px do not fit into images of {recipe.image_px} px: "
            "make them smaller."
        )


def _run_key(
    name: str, train: Sample, validation: Sample, recipe: TriageRecipe, weights: Path | None
) -> str:
    """Digest of all that shapes a run: images, labels, numbers, start, code, libraries."""
    digest = hashlib.sha256()
    facts = [name, json.dumps(asdict(recipe), sort_keys=True), torch.__version__, timm.__version__]
    for fact in facts:
        digest.update(fact.encode() + b"\0")
    digest.update(modules_digest(*SHAPING).encode())
    for sample in (train, validation):
        digest.update(str(tuple(sample.pixels.shape)).encode())
        digest.update(sample.pixels.contiguous().numpy())
        digest.update(sample.y.contiguous().numpy())
        digest.update(sample.lesions.contiguous().numpy())
    if weights is not None:
        digest.update(Path(weights).read_bytes())
    return digest.hexdigest()[:16]


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path` and rename, so that a killed run never leaves half a file."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

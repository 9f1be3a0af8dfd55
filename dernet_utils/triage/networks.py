"""The three triage networks: how they are built, their input, and the probabilities they predict.

`densenet121`, `tf_efficientnetv2_s` and `resnet50` are used alike: the input is a square grey image
in three equal channels, normalised with ImageNet's mean and standard deviation; the output is one
logit.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import NETWORK_NAMES, NETWORKS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BLOCK_SCALE = 0.5  # initial scale of a residual block's branch; ours

# Networks


def build_network(name: str, weights: Path | None = None, seed: int = 42) -> nn.Module:
    """Return one of the three networks with a single logit.

    Args:
        name: One of `NETWORKS`.
        weights: A local checkpoint in timm's naming (``.safetensors``, or ``.pth`` / ``.pt`` /
            ``.bin`` with tensors only); its classification head is left out. None: random.
        seed: Seed of the random weights; torch's global generator is left as it was.

    Returns:
        A network that maps images as `as_input` returns them, (b, 3, px, px), to logits, (b, 1).

    Raises:
        DernetError: The name is unknown, or the checkpoint is of another network.
    """
    if name not in NETWORKS:
        raise DernetError(f"The triage network is one of {', '.join(NETWORKS)}, not {name!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(name, pretrained=False, num_classes=1)
    # With zeros, an untrained network predicts one half for every image. timm scales this layer's
    # initial weights by the number of outputs; for a single output they would be far too large.
    for parameter in network.get_classifier().parameters():
        nn.init.zeros_(parameter)
    # timm initialises the residual branch's scale with 0 (ResNet; Goyal et al., 2017) or 1
    # (EfficientNetV2-S). We take a value in between. It did better than 0 in a few unrecorded pilot
    # runs, one seed each, which do not show that it is better.
    for block in network.modules():
        if isinstance(block, Bottleneck):
            nn.init.constant_(block.bn3.weight, BLOCK_SCALE)
        elif isinstance(block, EdgeResidual) and block.has_skip:
            nn.init.constant_(block.bn2.weight, BLOCK_SCALE)
        elif isinstance(block, InvertedResidual) and block.has_skip:
            nn.init.constant_(block.bn3.weight, BLOCK_SCALE)
    if weights is not None:
        _load_body(network, Path(weights))
    return network


def _load_body(network: nn.Module, path: Path) -> None:
    """Load all but the classification head."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise DernetError(
            f"{path} cannot be read as a checkpoint with tensors only ({type(error).__name__}): "
            "copy it again."
        ) from error
    head = network.default_cfg["classifier"] + "."
    body = {key: value for key, value in state.items() if not key.startswith(head)}
    wanted = {key for key in network.state_dict() if not key.startswith(head)}
    try:
        network.load_state_dict(body, strict=False)
    except RuntimeError as error:
        raise DernetError(
            f"{path} does not fit this network: a tensor in it has another shape."
        ) from error
    if set(body) != wanted:
        raise DernetError(
            f"{path} does not fit this network: {len(wanted - set(body))} of {len(wanted)} tensors "
            "are missing; save a timm checkpoint of the network with that name."
        )


def starting_sentence(name: str, weights: Path | None) -> str:
    """Return a sentence on the weights that training starts from.

    Args:
        name: One of `NETWORKS`.
        weights: As `core.weights.starting_weights` returns it.

    >>> starting_sentence("resnet50", None)
    'ResNet50 starts from random weights; in the paper it starts from ImageNet weights.'
    """
    start = f"{NETWORK_NAMES[name]} starts from"
    if weights is None:
        return f"{start} random weights; in the paper it starts from ImageNet weights."
    return f"{start} the local checkpoint {weights.name}."


# Parts and sizes of a network


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Return x after batch normalisation by running mean and variance, without activation.

    Args:
        x: Shape (b, channels, h, w).
        norm: The layer; its four vectors of shape (channels,) and its epsilon are used.

    Returns:
        The shape of `x`.
    """
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def receptive_field(layers: Iterable[tuple[int, int]]) -> int:
    """Return the receptive field: the side, px, of the input square that one output depends on.

    Args:
        layers: Kernel and stride of each convolution or pooling on the longest path, first to last.

    >>> receptive_field([(3, 1), (3, 1)]), receptive_field([(7, 2), (3, 2), (3, 1)])
    (5, 19)
    """
    field_px, pixels_per_step = 1, 1
    for kernel, stride in layers:
        field_px += (kernel - 1) * pixels_per_step
        pixels_per_step *= stride
    return field_px


def count_operations(network: nn.Module, image_px: int) -> int:
    """Return the floating-point operations of a forward pass for one square image.

    Multiplications and additions count one each. Only convolutions and matrix products are
    counted, as torch does; the rest is small.

    Args:
        network: As `build_network` returns it; left in evaluation mode.
        image_px: Side of the image, px.
    """
    network.eval()
    x = torch.zeros(1, 3, image_px, image_px, device=next(network.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops()


# Input and output


def as_input(pixels: Tensor) -> Tensor:
    """Return images as the networks take them.

    Args:
        pixels: Shape (b, 1, px, px): uint8, or float in [0, 1].

    Returns:
        float32, shape (b, 3, px, px), in channels-last memory: three equal channels minus
        ImageNet's mean, divided by its standard deviation.
    """
    grey = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    mean = torch.tensor(IMAGENET_MEAN, device=grey.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=grey.device).view(1, 3, 1, 1)
    return ((grey - mean) / std).contiguous(memory_format=torch.channels_last)


def predict_probabilities(network: nn.Module, pixels: Tensor, batch: int = 16) -> np.ndarray:
    """Return the probability that each image is abnormal.

    The mean over the image and its horizontal flip (companion code), computed in float32.

    Args:
        network: As `build_network` or `train_triage` returns it; left in evaluation mode.
        pixels: uint8, shape (n, 1, px, px).
        batch: Images per forward pass; it changes the result by rounding only.

    Returns:
        float64 in [0, 1], shape (n,).
    """
    both = [
        torch.cat(list(predict_logits(network, one, batch, fast=False))).double().sigmoid()
        for one in (pixels, pixels.flip(-1))
    ]
    return ((both[0] + both[1]) / 2).numpy()


@torch.no_grad()
def predict_logits(
    network: nn.Module, pixels: Tensor, batch: int, fast: bool = True
) -> Iterator[Tensor]:
    """Yield logits of images, batch by batch.

    Args:
        network, pixels, batch: As `predict_probabilities` takes them.
        fast: Whether to compute in bfloat16 where that is faster.

    Yields:
        float32 on the CPU, shape (b,).
    """
    device = next(network.parameters()).device
    network.eval()
    for part in pixels.split(batch):
        with autocast(device, fast):
            logits = network(as_input(part.to(device)))
        yield logits.float().squeeze(1).cpu()


# Precision


def autocast(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 if it is wanted and helps, else float32."""
    able = wanted and machine.bfloat16_helps(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=able)

"""Weights of a network in 8 bits, as the repository ships them.

A large weight keeps one scale per output channel and 8 bits per number; everything else stays as
it is. Networks are trained, and run, in float32: packing only makes files small.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import write_whole

LEAST = 4096  # numbers in a weight that is packed
STEPS = 127  # from 0 to the largest magnitude of a channel
SCALE = ".scale"  # follows the name of a packed weight


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round each large weight to 8 bits.

    Args:
        tensors: A network's state; weights have the output channel first.

    Returns:
        The same names; a packed weight is int8 and has its scales, float32 of shape (channels,),
        under its name and `SCALE`.

    >>> packed = pack({"w": torch.linspace(-1, 1, 8192).reshape(2, 4096), "b": torch.ones(2)})
    >>> {name: str(tensor.dtype) for name, tensor in packed.items()}
    {'w': 'torch.int8', 'w.scale': 'torch.float32', 'b': 'torch.float32'}
    >>> float((unpack(packed)["w"] - torch.linspace(-1, 1, 8192).reshape(2, 4096)).abs().max())
    ... # doctest: +ELLIPSIS
    0.0039...
    """
    packed = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.numel() < LEAST or not tensor.is_floating_point():
            packed[name] = tensor.contiguous()
            continue
        rows = tensor.reshape(len(tensor), -1).float()
        scale = rows.abs().amax(dim=1) / STEPS
        steps = rows / torch.where(scale > 0.0, scale, 1.0)[:, None]
        packed[name] = steps.round().to(torch.int8).reshape(tensor.shape).contiguous()
        packed[name + SCALE] = scale
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's state in float32, from what `pack` returns or from any other state."""
    whole = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            scale = tensors[name + SCALE]
            whole[name] = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
        elif not (name.endswith(SCALE) and name.removesuffix(SCALE) in tensors):
            whole[name] = tensor
    return whole


def write_packed(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a network's state in 8 bits to a safetensors file.

    Args:
        path: The file; replaced where it exists.
        tensors: A network's state.
        metadata: Entries of the file's header.
    """
    return write_whole(path, lambda part: save_file(pack(tensors), part, metadata))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a checkpoint's tensors in float32 and its metadata; nothing in a file is executed.

    Args:
        path: A safetensors file, packed or not.

    Raises:
        DernetError: The file is missing, cut short, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return unpack(tensors), file.metadata() or {}
    except FileNotFoundError:
        raise DernetError(f"There is no {path}: restore it, or train the networks again.") from None
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DernetError(
            f"{path} is damaged ({type(error).__name__}): restore it, or train the networks again."
        ) from error

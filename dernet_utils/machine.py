"""What the machine at hand can do, and how a training makes use of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def device() -> torch.device:
    """Return where networks run: on a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bfloat16_helps(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16: a GPU, or a CPU with AMX or AVX-512.

    Measured on a CPU with AVX-512's: a step of our networks takes about half as long as in float32.
    On CPUs without either bfloat16 is emulated, and a step takes longer.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16", False) or able.get("avx512_bf16", False))


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Take numbers below 1e-38 for zero: as operands they slow a CPU tenfold. Undone at the end."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)

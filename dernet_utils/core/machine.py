"""What the machine at hand can do, and how a training makes use of it."""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState

Job = TypeVar("Job")


def device() -> torch.device:
    """Return where networks run: on a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor_name() -> str:
    """Return the processor's name and the threads in use."""
    if torch.cuda.is_available():
        model = torch.cuda.get_device_name()
    else:
        model = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    return f"{model}, {torch.get_num_threads()} threads"


def claim_jobs(wanted: Sequence[Job], run: Sequence[Job]) -> Sequence[Job]:
    """Return the jobs that this process is to do, and choose its GPU.

    Processes that `accelerate launch` has started share the jobs out, each on a GPU of its own.
    Whole jobs are shared, and no batch is: a network's batch normalisation then sees what it sees
    on one GPU, and its numbers are the same. A process by itself does all that is wanted of it;
    where there are several GPUs, processes that each do one job of a run go round them.

    Args:
        wanted: Jobs, at least one.
        run: All jobs of the run, the wanted ones among them.
    """
    processes = PartialState()
    try:
        if processes.num_processes == 1 and (gpus := torch.cuda.device_count()) > 1:
            torch.cuda.set_device(run.index(wanted[0]) % gpus)
        return wanted[processes.process_index :: processes.num_processes]
    finally:
        processes.destroy_process_group()  # nothing is exchanged


def bfloat16_helps(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16: a GPU, or a CPU with AMX or AVX-512.

    Measured on a CPU with AVX-512's: a step of our networks takes about half as long as in float32.
    On CPUs without either bfloat16 is emulated, and a step takes longer.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16", False) or able.get("avx512_bf16", False))


def in_bfloat16(forward: Callable, device: torch.device, *given, **named):
    """Call a network, or a part of one, in bfloat16 where that helps; what it says is in float32.

    For training only: scores in bfloat16 tie, and their order is lost.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_helps(device)):
        said = forward(*given, **named)
    return _float32(said)


def _float32(said):
    if isinstance(said, dict):
        return {name: _float32(one) for name, one in said.items()}
    if isinstance(said, tuple | list):
        return type(said)(map(_float32, said))
    return said.float() if torch.is_tensor(said) and said.is_floating_point() else said


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Take numbers below 1e-38 for zero: as operands they slow a CPU tenfold. Undone at the end."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)

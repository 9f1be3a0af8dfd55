"""What this machine can do, and how training uses it: devices, threads, bfloat16, denormals."""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState

Job = TypeVar("Job")


def device() -> torch.device:
    """Return the device that networks run on: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor_name() -> str:
    """Return the processor's name and the threads in use."""
    if torch.cuda.is_available():
        model = torch.cuda.get_device_name()
    else:
        model = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    return f"{model}, {torch.get_num_threads()} threads"


def claim_jobs(wanted: Sequence[Job], run: Sequence[Job]) -> Sequence[Job]:
    """Return the jobs of this process, and choose its GPU.

    Processes that `accelerate launch` has started divide the jobs among them, each on its own GPU.
    Jobs are divided and batches are not: batch normalisation sees what it sees on one GPU, and the
    results are the same. A single process does all wanted jobs; where there are several GPUs,
    single processes with one job each use them in turn.

    Args:
        wanted: Jobs to do, at least one.
        run: All jobs of the run, the wanted ones among them.

    Returns:
        Those of the wanted jobs that are this process's.
    """
    processes = PartialState()
    try:
        if processes.num_processes == 1 and (gpus := torch.cuda.device_count()) > 1:
            torch.cuda.set_device(run.index(wanted[0]) % gpus)
        return wanted[processes.process_index :: processes.num_processes]
    finally:
        processes.destroy_process_group()  # nothing is exchanged


def bfloat16_helps(device: torch.device) -> bool:
    """Return whether a device computes bfloat16 natively: a GPU, or a CPU with AMX or AVX-512.

    Measured on a CPU with AVX-512's instructions: a step of our networks takes about half as long
    as in float32. Other CPUs emulate bfloat16, and a step takes longer.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16", False) or able.get("avx512_bf16", False))


def in_bfloat16(forward: Callable, device: torch.device, *given, **named):
    """Run a network, or a part of one, in bfloat16 where that helps; its output is float32.

    For training only: scores in bfloat16 tie, and their order is lost.

    Args:
        forward: The network's forward pass.
        device: The device that it runs on.
        given, named: Its arguments.

    Returns:
        Its output, with all floating-point tensors in float32.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_helps(device)):
        output = forward(*given, **named)
    return _float32(output)


def _float32(output):
    if isinstance(output, dict):
        return {name: _float32(one) for name, one in output.items()}
    if isinstance(output, tuple | list):
        return type(output)(map(_float32, output))
    return output.float() if torch.is_tensor(output) and output.is_floating_point() else output


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Flush numbers below 1e-38 to zero, as they slow a CPU tenfold; undone at the end."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)

"""What this machine offers to training: devices, threads, bfloat16, flushed denormals."""

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

    Processes started by `accelerate launch` divide the jobs among themselves, each on its own GPU.
    Whole jobs are divided, never batches, so batch normalisation sees the same batches as on one
    GPU. A single process does all wanted jobs. It takes the GPU that its first job's position in
    the run gives, in rotation, so that separate processes with one job each spread over the GPUs.

    Args:
        wanted: Jobs to do, at least one.
        run: All jobs of the run, including the wanted ones.

    Returns:
        This process's part of the wanted jobs.
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

    On a CPU with AVX-512's bfloat16 instructions, a training step of our networks was measured to
    take about half as long as in float32. Other CPUs emulate bfloat16, which is slower, and so does
    oneDNN where its own switch, ``ONEDNN_MAX_CPU_ISA``, hides the instructions from it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    native = able.get("amx_bf16", False) or able.get("avx512_bf16", False)
    return bool(native and _onednn_has_bfloat16())


def _onednn_has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_bfloat16(forward: Callable, device: torch.device, *given, **named):
    """Run a network, or a part of one, in bfloat16 where that helps; its output is float32.

    For training only: scores rounded to bfloat16 tie, so their order is lost.

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
    """Flush denormal numbers (below 1e-38) to zero, since they slow a CPU; ends with the block."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)

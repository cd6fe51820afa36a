"""Devices, threads and precision, and how they differ from what a launcher set."""

import ctypes
import os
import sys

import torch
from accelerate import Accelerator

from ..options import ConfigError


def use_hardware(accelerator: Accelerator) -> None:
    """Share the cores among this machine's processes, where the launcher set one thread for each; on a GPU, let
    float32 products use its tensor cores (TF32), as its convolutions do anyway.

    `accelerate launch` and torchrun set OMP_NUM_THREADS=1 unless told otherwise, which halves the speed of two cores
    and wastes seven of eight. To use fewer cores than there are, give the run fewer (taskset, a container's cpuset).
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the kernel: a training step frees and asks for the same hundreds of
    megabytes, and to get them page by page again costs a CPU 7% of its time. Other systems are left as they are."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def one_process_only() -> str | None:
    """A warning where `accelerate launch --cpu --num_processes N` was typed, which starts one process, silently."""
    meant_more = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if meant_more and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return (
            "!!! accelerate launch starts ONE process on a CPU, whatever --num_processes says (without MPI). For N: "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N train_ddpm_mnist.py ...\n"
        )
    return None


def resolve_mixed_precision(value: str) -> str:
    """ "no", "fp16" or "bf16" for Accelerator, out of `--mixed_precision`.

    "auto" is what `accelerate launch` was told, else bf16 where the hardware computes in it, else no.

    Raises:
        ConfigError: the hardware cannot do what was asked.
    """
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    if value == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched in ("fp16", "bf16"):
            value = launched
        elif cuda:
            value = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        else:
            supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # there is no public question; older: no
            value = "bf16" if supported() else "no"
    if value == "fp16" and not cuda and not torch.backends.mps.is_available():
        raise ConfigError("--mixed_precision fp16: needs a GPU; use bf16 or no")
    return value

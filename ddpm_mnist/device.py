"""The device to compute on."""

import os

import torch


def use_cpu_is_set() -> bool:
    """Whether ACCELERATE_USE_CPU says to stay on the CPU, in any of the words that Accelerate takes for yes."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "t", "yes", "y", "on")


def default_device() -> torch.device:
    """The accelerator of this machine (CUDA, MPS ...), as in training; the CPU without one or by ACCELERATE_USE_CPU."""
    if use_cpu_is_set() or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()

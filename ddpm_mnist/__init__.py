"""The parts of a DDPM (Ho et al. 2020): the U-Net, the noise schedule, the images, and what a training run needs."""

import importlib
import os

# OpenMP threads at a barrier sleep after a short spin: longer spins are many times slower beside other work.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # both are read when torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # no spin at all would cost an idle machine 15%

__all__ = ["DDPMScheduler", "UNet2DModel"]  # noqa: F822


def __getattr__(name: str):
    """Import the two classes at their first use: `--help` need not wait for torch."""
    modules = {"DDPMScheduler": ".scheduler", "UNet2DModel": ".unet"}
    if name in modules:
        return getattr(importlib.import_module(modules[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

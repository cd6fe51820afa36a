"""The parts of a DDPM (Ho et al. 2020): the U-Net, the noise schedule, the data, and what surrounds the loop."""

import importlib

__all__ = ["DDPMScheduler", "UNet2DModel"]  # noqa: F822
_HOMES = {"DDPMScheduler": ".scheduler", "UNet2DModel": ".unet"}


def __getattr__(name: str):
    """Import the two classes when they are asked for: --help, a bad option or a push need not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

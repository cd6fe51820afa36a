"""The parts of a DDPM (Ho et al. 2020): the U-Net, the noise schedule, the data, and what a run needs besides."""

import importlib
import sys

__all__ = ["DDPMScheduler", "UNet2DModel"]  # noqa: F822
_HOMES = {"DDPMScheduler": ".scheduler", "UNet2DModel": ".unet"}
_COMMANDS = ("train_ddpm_mnist.py", "generate.py", "evaluate.py", "push_to_hub.py")


def __getattr__(name: str):
    """Import the two classes when they are asked for: a push need not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _without_a_traceback(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# A command imports for seconds before `run_script` can catch a Ctrl-C.
if (getattr(sys.modules["__main__"], "__file__", None) or "").endswith(_COMMANDS):
    sys.excepthook = _without_a_traceback

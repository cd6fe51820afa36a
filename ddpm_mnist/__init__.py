"""The parts of a DDPM (Ho et al. 2020): the U-Net, the noise schedule, the data, and what surrounds the loop."""

from .scheduler import DDPMScheduler
from .unet import UNet2DModel

__all__ = ["DDPMScheduler", "UNet2DModel"]

"""A trained model: reading it from a folder or the Hub, and drawing from it."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .errors import ConfigError, check_lfs, first_line
from .offline import model_folder
from .options import SampleOptions
from .pipeline import Step, count_classes, denoise, guided
from .record import is_checkpoint
from .sampling import DEFAULT_STEPS, initial_noise, labels_for, make_sampler
from .scheduler import DDPMScheduler
from .unet import UNet2DModel


@dataclass
class Model:
    """A trained model: `unet` in eval mode, its noise schedule, and the label for "no class", if any."""

    unet: UNet2DModel
    scheduler: DDPMScheduler
    null_class_label: int | None

    @property
    def num_classes(self) -> int | None:
        """How many classes can be asked for; None for an unconditional model."""
        return count_classes(self.unet.config.num_class_embeds, self.null_class_label)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    def num_steps(self, options: SampleOptions) -> int:
        """The number of sampling steps. ConfigError: too many, or guidance for a model trained without it."""
        name, steps, T = options.scheduler, options.num_inference_steps, len(self.scheduler)
        for guidance in ("guidance_scale", "guidance_min_log_snr") if self.null_class_label is None else ():
            value = getattr(options, guidance)
            if value not in (1, getattr(SampleOptions, guidance)):
                raise ConfigError(f"--{guidance} {value}: this model was trained without dropped labels; omit it")
        most = T - 1 if name == "dpmsolver" else T
        if (steps or 1) > most:
            raise ConfigError(f"--num_inference_steps {steps or 1}: {name} takes at most {most} of the {T} timesteps")
        return steps or min(DEFAULT_STEPS[name], most)

    def key(self, options: SampleOptions, class_label: int | None = None) -> str:
        """A short hash of what decides the images of a seed: the weights, the noise schedule and the options."""
        names = ("scheduler", "guidance_scale", "guidance_min_log_snr", "mixed_precision", "seed")
        settings = {name: getattr(options, name) for name in names}
        settings |= {"steps": self.num_steps(options), "class": class_label}
        settings |= {name: v for name, v in self.scheduler.config.items() if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode())
        for name, tensor in self.unet.state_dict().items():
            digest.update(name.encode() + tensor.cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def draw(
        self, numbers: range | list[int], options: SampleOptions, class_label: int | None = None
    ) -> Iterator[tuple[list[int], Step]]:
        """Draw the images with these numbers, batch by batch; yields (numbers of the batch, step) for each step.

        `numbers`: which images of `options.seed`; `class_label`: see `labels_for`. ConfigError: see `num_steps`; or the
        images are not finite.
        """
        unet, device, steps = self.unet, self.unet.device, self.num_steps(options)
        sampler = make_sampler(options.scheduler, self.scheduler.config, steps)
        if options.mixed_precision == "bf16":
            unet = torch.autocast(device.type, torch.bfloat16)(unet.forward)
        for first in range(0, len(numbers), options.batch_size):
            batch = list(numbers[first : first + options.batch_size])
            labels = labels_for(batch, self.num_classes, class_label)
            labels = labels if labels is None else labels.to(device)
            guidance = options.guidance_scale, self.null_class_label, options.guidance_min_log_snr
            noise, generators = initial_noise(options.seed, batch, self.shape, device)
            predict = guided(unet, sampler, labels, *guidance)
            for step in denoise(predict, sampler, noise, steps, generators):
                if step.last and not step.prev_sample.isfinite().all():
                    raise ConfigError("the model's samples are not finite numbers; train it again, or name another")
                yield batch, step

    def draw_images(self, numbers: range | list[int], options: SampleOptions) -> Tensor:
        """The images that `draw` ends at: `[len(numbers), C, H, W]`, float32, about [-1, 1]."""
        return torch.cat([step.prev_sample for _, step in self.draw(numbers, options) if step.last])


@contextmanager
def loading(what: str, folder: Path) -> Iterator[None]:
    """Turn any error while loading from `folder` into a ConfigError about `what`, an option and its value."""
    try:
        yield
    except Exception as error:  # of diffusers, safetensors, torch and the disk
        check_lfs(what, folder)
        raise ConfigError(f"{what}: cannot be loaded ({first_line(error)})") from error


def default_device() -> torch.device:
    """This machine's accelerator (CUDA, MPS ...); the CPU if it has none or ACCELERATE_USE_CPU is set."""
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "t", "yes", "y", "on")  # as Accelerate
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


def load_model(name: str) -> Model:
    """Load a pipeline (folder or Hub id) or a checkpoint folder, onto this machine's accelerator if any.

    A checkpoint's averaged weights are used if saved. ConfigError: there is no model, or it cannot be read.
    """
    what, folder = f"--model {name}", model_folder(name)
    checkpoint = is_checkpoint(folder)
    if not checkpoint and not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"{what}: holds no model_index.json; name the output_dir of a finished training run, or a "
            "checkpoint folder in it"
        )
    subfolder = "unet_ema" if checkpoint and (folder / "unet_ema").is_dir() else "unet"
    with loading(what, folder):
        config = UNet2DModel.load_config(folder, subfolder=subfolder)
        name_of_class, size = config.get("_class_name"), config.get("sample_size")
        sizes = size if isinstance(size, (list, tuple)) else [size]
        if name_of_class != "UNet2DModel" or not all(isinstance(s, int) and 1 <= s <= 4096 for s in sizes):
            raise ValueError(f"its U-Net is a {name_of_class} of sample_size {size}")
        unet = UNet2DModel.from_pretrained(folder, subfolder=subfolder, use_safetensors=True)
        unet = unet.to(default_device()).eval()
        if checkpoint:
            run = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)["run"]
            scheduler = DDPMScheduler(**run["scheduler"])
            null = run["unet"]["num_class_embeds"] - 1 if run["class_dropout_prob"] else None
        else:
            scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
            null = DiffusionPipeline.load_config(folder).get("null_class_label")
        if null is not None and null != (unet.config.num_class_embeds or 0) - 1:
            raise ValueError(f"null_class_label {null!r} is not the last of {unet.config.num_class_embeds} classes")
        model = Model(unet, scheduler, null)
        model.draw_images([0], SampleOptions(num_inference_steps=min(2, len(scheduler))))  # what cannot draw fails now
        return model

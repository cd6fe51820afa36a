"""A diffusers pipeline that draws the class that it is asked for, by classifier-free guidance.

This one file travels with a class-conditional model and needs nothing but diffusers:

    pipe = DiffusionPipeline.from_pretrained(MODEL, trust_remote_code=True)
    pipe(class_labels=[7] * 16, guidance_scale=1.5).images

Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598): a U-Net that was trained with some labels dropped predicts the
noise with and without a label, and the difference of the two, taken larger, leads further towards the class.
"""

import inspect
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

GUIDANCE_SCALE, MIN_LOG_SNR = 1.5, -2.0  # for linear betas t < 456; docs/results.md has the trials


class Step(NamedTuple):
    """One step of Algorithm 2, from x_t to x_{t-1}; images are `[B, C, H, W]`, about [-1, 1]."""

    timestep: int  # t
    sample: torch.Tensor  # x_t
    pred_original_sample: torch.Tensor  # the x_0 that the U-Net predicts from x_t
    prev_sample: torch.Tensor  # x_{t-1}
    last: bool  # x_{t-1} is x_0


@torch.no_grad()
def denoise(
    predict: Callable, sampler, sample: torch.Tensor, num_inference_steps: int, generator=None, start: int | None = None
) -> Iterator[Step]:
    """Algorithm 2 of Ho et al. 2020, with any diffusers scheduler; yields each step.

    Args:
        predict: maps x_t, which the sampler may have scaled, and t to the prediction of the U-Net; see `guided`.
        sample: pure noise, `[B, C, H, W]`, of variance 1.
        generator: one for the batch, or a list of one for each image.
        start: begin at the first timestep that is at most this; `sample` is then the x_t of that timestep.
    """
    sampler = with_timesteps(sampler, num_inference_steps, sample.device)
    timesteps = sampler.timesteps
    if start is None:
        sample = sample * sampler.init_noise_sigma  # x_T, line 1
    else:
        timesteps = timesteps[timesteps <= start]
    arguments = step_arguments(sampler, generator)
    for i, t in enumerate(timesteps):  # line 2
        last = i == len(timesteps) - 1
        if isinstance(sampler, DDIMScheduler):  # its step would go to t - T // num_inference_steps; go to the next t
            gap = int(t) - (-1 if last else int(timesteps[i + 1]))
            sampler.num_inference_steps = Fraction(sampler.config.num_train_timesteps, gap)
        model_output = predict(sampler.scale_model_input(sample, t), t)
        step = sampler.step(model_output.to(sample.dtype), t, sample, **arguments)  # lines 3 and 4
        kept = getattr(sampler, "model_outputs", None) or [step.prev_sample]  # where DPM-Solver++ keeps its x_0
        yield Step(int(t), sample, step.get("pred_original_sample", kept[-1]), step.prev_sample, last)
        sample = step.prev_sample


def guided(
    unet,
    scheduler,
    class_labels: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    null_class_label: int | None = None,
    min_log_snr: float = -math.inf,
) -> Callable:
    """The U-Net as a function of x_t and t, with classifier-free guidance where log SNR is at least `min_log_snr`:

        epsilon(x_t, t, no class) + guidance_scale * (epsilon(x_t, t, class) - epsilon(x_t, t, no class))

    The same holds for v, which is a linear function of epsilon for a given x_t. log SNR = log(alpha-bar_t / (1 -
    alpha-bar_t)). Where x_t is mostly noise, guidance leads all images of a class to the same few shapes (Kynkäänniemi
    et al. 2024, https://arxiv.org/abs/2404.07724). A scale below 1 acts at all timesteps.

    Args:
        class_labels: `[B]` int64; None for a U-Net without classes.
        guidance_scale: 1 is the conditional prediction itself, and costs half.
        null_class_label: the label for "no class"; None for a U-Net that was trained without one.
    """
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)  # EDM's schedulers have none

    def predict(sample: torch.Tensor, timestep) -> torch.Tensor:
        scale = guidance_scale
        if scale > 1 and alphas_cumprod is not None:
            log_snr = torch.logit(alphas_cumprod[int(timestep)].cpu().double()).item()
            scale = scale if log_snr >= min_log_snr else 1.0
        if class_labels is None or null_class_label is None or scale == 1:
            return unet(sample, timestep, class_labels=class_labels).sample
        labels = torch.cat([class_labels, torch.full_like(class_labels, null_class_label)])
        with_class, without = unet(torch.cat([sample, sample]), timestep, class_labels=labels).sample.chunk(2)
        return without + scale * (with_class - without)

    return predict


def step_arguments(sampler, generator) -> dict:
    """The arguments of `sampler.step` beyond prediction, timestep and sample, as far as it takes them.

    By default DDIM clips the predicted x_0 but keeps the predicted noise, which then no longer matches it. The error
    accumulates over the steps, and guidance amplifies it: digits turn into blobs.
    """
    parameters = inspect.signature(sampler.step).parameters
    arguments = {"generator": generator, "use_clipped_model_output": bool(sampler.config.get("clip_sample"))}
    return {name: value for name, value in arguments.items() if name in parameters}


def count_classes(num_class_embeds: int | None, null_class_label: int | None) -> int | None:
    """How many classes can be asked for: all embeddings but the one of `null_class_label`. None: no classes."""
    return num_class_embeds if null_class_label is None else num_class_embeds - 1


def with_timesteps(scheduler, num_inference_steps: int, device):
    """The scheduler with its timesteps set; a copy with other spacing if "leading" does not fit.

    "leading" takes every (T // steps)-th timestep from 0 on (DPM-Solver: every (T // (steps + 1))-th): 501 steps of
    1,000 are t = 500 ... 0, where x_500 still holds 28% of x_0, but sampling starts from pure noise. It is kept if the
    steps divide T and the first is near it.
    """
    T, spacing = scheduler.config.num_train_timesteps, scheduler.config.get("timestep_spacing")
    plain = not hasattr(scheduler, "sigmas") and not hasattr(scheduler, "prk_timesteps")  # DDPM, DDIM: no more entries
    scheduler.set_timesteps(num_inference_steps, device=device)
    early = scheduler.timesteps[0] < T - T / max(num_inference_steps, 4) - T / 20
    if spacing == "leading" and (T % num_inference_steps or early):
        spacing = "trailing" if plain else "linspace"
        scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing=spacing)
        scheduler.set_timesteps(num_inference_steps, device=device)
    if plain:  # "trailing": rounding may add a timestep, -1
        scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
    return scheduler


def apply_umask(folder: str | Path) -> None:
    """Give weights the permissions of other new files: safetensors writes files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).rglob("*.safetensors"):
        with suppress(OSError):  # a network disk may refuse
            path.chmod(0o666 & ~umask)


class ClassConditionalDDPMPipeline(DiffusionPipeline):
    """Draws images of given classes. `null_class_label`: see `guided`; saved in model_index.json."""

    model_cpu_offload_seq = "unet"
    _source = Path(__file__).read_bytes()  # read now: diffusers may replace the file by another version

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, null_class_label: int | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_class_label=null_class_label)

    def save_config(self, save_directory, **kwargs) -> None:
        """The last part of `save_pretrained`: also this file, which `model_index.json` names, so that both load."""
        super().save_config(save_directory, **kwargs)
        apply_umask(save_directory)
        (Path(save_directory) / "pipeline.py").write_bytes(self._source)
        index = Path(save_directory) / "model_index.json"
        settings = json.loads(index.read_text(encoding="utf-8")) | {"_class_name": ["pipeline", type(self).__name__]}
        index.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_min_log_snr: float = MIN_LOG_SNR,
    ) -> ImagePipelineOutput | tuple:
        """One image for each label.

        Args:
            class_labels: which classes; a whole number, or a list, array or tensor of them.
            guidance_scale: 1 for none; higher is clearer but less varied. Default: 1.5, or 1 for a model
                that was trained without label dropout.
            generator, num_inference_steps, output_type, return_dict: as in `diffusers.DDPMPipeline`.
            guidance_min_log_snr: see `guided`; -math.inf guides at all timesteps.

        Raises:
            ValueError: a label is no class of the model, or guidance is asked of a model that was not trained for it;
                or the images are not finite.
        """
        null = self.config.null_class_label
        classes = count_classes(self.unet.config.num_class_embeds, null)
        try:
            labels = torch.as_tensor(class_labels).reshape(-1)
            known = not labels.is_floating_point() and 0 <= labels.min() <= labels.max() < classes
        except (TypeError, ValueError, RuntimeError):  # no numbers, or none at all
            known = False
        if not known:
            raise ValueError(f"class_labels: {class_labels!r:.80}; the model has the classes 0 to {classes - 1}")
        if guidance_scale is None:
            guidance_scale = 1.0 if null is None else GUIDANCE_SCALE
        if null is None and guidance_scale != 1:
            raise ValueError("guidance_scale: the model was trained without label dropout; only 1 is possible")

        size = self.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        device = self._execution_device
        shape = (len(labels), self.unet.config.in_channels, *size)
        image = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        labels = labels.to(device, torch.int64)
        predict = guided(self.unet, self.scheduler, labels, guidance_scale, null, guidance_min_log_snr)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step in denoise(predict, self.scheduler, image, num_inference_steps, generator):  # noqa: B007
                progress.update()

        self.maybe_free_model_hooks()
        if not step.prev_sample.isfinite().all():  # DPM-Solver and UniPC, by all T timesteps
            raise ValueError("no finite numbers: too many num_inference_steps for this scheduler, or broken weights")
        image = (step.prev_sample / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).float().numpy()
            image = self.numpy_to_pil(image) if output_type == "pil" else image
        return ImagePipelineOutput(images=image) if return_dict else (image,)

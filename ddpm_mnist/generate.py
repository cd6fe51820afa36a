"""Draw images from a trained model: a grid, the single images, and how they came out of the noise.

python -m ddpm_mnist.generate --model ddpm-mnist --num_images 64 --scheduler ddim --save_trajectory
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .config import ConfigError, opt, read_options, run_script

STEPS = {"ddpm": 1000, "ddim": 50, "dpmsolver": 20}


@dataclass
class GenerateConfig:
    """The options of `python -m ddpm_mnist.generate`."""

    model: str = opt("ddpm-mnist", "Folder of a pipeline, or its Hub id.")
    num_images: int = opt(16, "How many.")
    batch_size: int = opt(64, "How many at a time; it does not change them.")
    scheduler: Literal["ddpm", "ddim", "dpmsolver"] = opt(
        "ddpm", "Sampler: ddpm is Algorithm 2 of the paper; ddim and dpmsolver need fewer steps."
    )
    num_inference_steps: int | None = opt(None, "Steps. Default: all 1000 for ddpm, 50 for ddim, 20 for dpmsolver.")
    seed: int = opt(0, "Image i of a seed is always the same image.")
    class_label: int | None = opt(None, "The class to draw, for a conditional model. Default: counts through them.")
    guidance_scale: float = opt(2.0, "How far towards the class, for a conditional model; 1 is no guidance.")
    mixed_precision: Literal["no", "bf16"] = opt(
        "no", "bf16: over twice as fast where the hardware computes in it, for changes that no eye sees."
    )
    output: str = opt("grid.png", "The grid; single images go into a folder of that name without the suffix.")
    save_trajectory: bool = opt(False, "Also a picture of x_t and of the x_0 predicted from it, along the way.")
    overwrite: bool = opt(False, "Replace the output of an earlier run.")


def load_model(config: GenerateConfig):
    """U-Net, scheduler and label for none (or None) of a pipeline folder or Hub id. ConfigError: it cannot be read."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

    from . import DDPMScheduler, UNet2DModel
    from .hub import go_offline, hub_status

    option, local = f"--model {config.model}", Path(config.model)
    if local.exists() and not (local / "model_index.json").is_file():
        raise ConfigError(f"{option}: holds no model_index.json; name the output_dir of a finished training run")
    if not local.exists():
        status = hub_status(config.model, "model")
        if status == "missing":
            raise ConfigError(f"{option}: neither a folder nor on the Hub; check the name, or `hf auth login`")
        if status == "unreachable":
            go_offline()
    schedulers = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmsolver": DPMSolverMultistepScheduler}
    try:
        unet = UNet2DModel.from_pretrained(config.model, subfolder="unet", use_safetensors=True)
        scheduler = schedulers[config.scheduler].from_pretrained(config.model, subfolder="scheduler")
        null_class_label = DiffusionPipeline.load_config(config.model).get("null_class_label")
    except (OSError, ValueError, RuntimeError) as e:
        raise ConfigError(f"{option}: cannot be loaded ({' '.join(str(e).split())[:200]})") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return unet.to(device).eval(), scheduler, null_class_label


def generate(config: GenerateConfig) -> list[Path]:
    """Draw and save; returns the files written.

    Raises:
        ConfigError: an option cannot be right, the model cannot be loaded, or a file is there already.
    """
    for name in ("num_images", "batch_size", "num_inference_steps"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ConfigError(f"--{name} {getattr(config, name)}: must be at least 1")
    output = Path(config.output)
    singles, trajectory_path = output.with_suffix(""), output.with_name(f"{output.stem}_trajectory.png")
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output {output}: must end in .png")
    if not config.overwrite and (output.exists() or singles.exists()):
        raise ConfigError(f"--output {output}: it, or the folder {singles}, is there already; give --overwrite")

    import torch
    from tqdm.auto import tqdm

    from .sampling import grid, sample_images, to_pil

    unet, scheduler, null_class_label = load_model(config)
    steps = config.num_inference_steps or min(STEPS[config.scheduler], scheduler.config.num_train_timesteps)
    if steps > scheduler.config.num_train_timesteps:
        raise ConfigError(
            f"--num_inference_steps {steps}: the model has {scheduler.config.num_train_timesteps} timesteps"
        )
    classes = unet.config.num_class_embeds
    classes = classes if null_class_label is None else classes - 1
    if config.class_label is not None and (classes is None or not 0 <= config.class_label < classes):
        raise ConfigError(f"--class_label {config.class_label}: the model has {classes or 'no'} classes")

    kept_steps = {round((i + 1) * steps / 10) - 1 for i in range(10)}
    trajectory = []  # of the first batch's first images
    images = []
    numbers = torch.arange(config.num_images)
    batches = numbers.split(config.batch_size)
    with tqdm(total=len(batches) * steps, desc=f"{config.scheduler}, {steps} steps") as progress:
        for batch in batches:
            labels = None
            if classes is not None:
                labels = batch % classes if config.class_label is None else torch.full_like(batch, config.class_label)
                labels = labels.to(unet.device)

            def on_step(i, sample, pred_original_sample):
                progress.update()
                if i in kept_steps and not images:
                    trajectory.append((to_pil(sample[:4]), to_pil(pred_original_sample[:4])))

            guidance = (config.guidance_scale, null_class_label)
            with torch.autocast(unet.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                samples = sample_images(unet, scheduler, config.seed, batch.tolist(), steps, labels, *guidance, on_step)
            images.extend(to_pil(samples))

    singles.mkdir(parents=True, exist_ok=True)
    written = [output, *(singles / f"{number:05d}.png" for number in range(len(images)))]
    grid(images, zoom=2).save(output)
    for image, path in zip(images, written[1:]):
        image.save(path)
    if config.save_trajectory:
        # each image in two rows, x_t above the x_0 predicted from it; time runs to the right
        rows = [[moment[kind][i] for moment in trajectory] for i in range(len(trajectory[0][0])) for kind in (0, 1)]
        grid([image for row in rows for image in row], columns=len(trajectory), zoom=2).save(trajectory_path)
        written.append(trajectory_path)
    return written


def main() -> int:
    config = read_options(GenerateConfig, __doc__.splitlines()[0])
    written = generate(config)
    print(f"Wrote {written[0]} and {len(written) - 1} more files.")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))

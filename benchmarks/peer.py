"""The peer: a short version of diffusers' examples/unconditional_image_generation/train_unconditional.py.

    python -m benchmarks.peer --dataset_name ylecun/mnist --max_train_steps 500 --output_dir /tmp/peer

It keeps that script's data path (a DataLoader decodes and transforms the images one by one), classes, `.item()` at
every step, and defaults for optimizer, learning rate, batch and precision, with `--use_ema`. Only the U-Net is smaller,
(32, 64, 64) with stock's default heads, because that script's own default (114 M parameters at 64x64) is too large for
MNIST on a CPU. Exports a DDPMPipeline.
"""

import argparse
import json
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import load_dataset
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from .common import STOCK, build


def transform(examples: dict) -> dict:
    """Images as float32 `[1, 28, 28]` in [-1, 1], transformed one at a time, as in diffusers' script."""
    images = [torch.from_numpy(np.array(image, dtype=np.float32) / 255)[None] for image in examples["image"]]
    return {"input": [(image - 0.5) / 0.5 for image in images]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, required=True)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lr_warmup_steps", type=int, default=500)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    model = build(STOCK, (32, 64, 64), 8)
    ema_model = EMAModel(
        model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4, model_cls=STOCK
    )
    noise_scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    dataset = load_dataset(args.dataset_name, split="train").with_transform(transform)
    dataloader = torch.utils.data.DataLoader(
        dataset, batch_size=args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers
    )
    lr_scheduler = get_scheduler(
        "cosine",
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer, dataloader, lr_scheduler = accelerator.prepare(model, optimizer, dataloader, lr_scheduler)

    progress, losses, global_step, started = tqdm(total=args.max_train_steps), [], 0, time.perf_counter()
    while global_step < args.max_train_steps:
        for batch in dataloader:
            clean_images = batch["input"]
            noise = torch.randn(clean_images.shape, device=clean_images.device)
            timesteps = torch.randint(0, 1000, (len(clean_images),), device=clean_images.device).long()
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(noisy_images, timesteps).sample.float(), noise.float())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            ema_model.step(model.parameters())
            losses.append(loss.detach().item())
            progress.update()
            progress.set_postfix(loss=losses[-1])
            global_step += 1
            if global_step == args.max_train_steps:
                break
    rate = len(losses) * args.train_batch_size / (time.perf_counter() - started)

    model = accelerator.unwrap_model(model)
    ema_model.copy_to(model.parameters())
    diffusers.DDPMPipeline(unet=model, scheduler=noise_scheduler).save_pretrained(args.output_dir)
    results = {"images_per_second": rate, "loss": float(np.mean(losses[-100:]))}
    Path(args.output_dir, "peer.json").write_text(json.dumps(results), encoding="utf-8")
    print(results)


if __name__ == "__main__":
    main()

"""Train a denoising diffusion probabilistic model (DDPM, Ho et al. 2020) on MNIST, or on any set of small images.

    accelerate launch train_ddpm_mnist.py                          # ylecun/mnist from the Hub, configs/mnist.yaml
    accelerate launch train_ddpm_mnist.py --config configs/smoke.yaml --output_dir /tmp/smoke

`train` is Algorithm 1 of the paper (https://arxiv.org/abs/2006.11239), with what a run needs around it. Equation
numbers are the paper's. The parts are in `ddpm_mnist/`.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ddpm_mnist import DDPMScheduler, UNet2DModel
from ddpm_mnist.checkpoint import load_state, load_weights, save_checkpoint
from ddpm_mnist.config import ConfigError, TrainConfig, parse_args, resolve_mixed_precision, run_script
from ddpm_mnist.data import index_batches, load_data
from ddpm_mnist.draws import draw_noise_and_timesteps, drop_labels, seed_dropout
from ddpm_mnist.export import export_pipeline
from ddpm_mnist.optimizer import build_optimizer
from ddpm_mnist.push import check_repo_id, push_model, read_token
from ddpm_mnist.run import (
    MAX_SKIPPED_IN_A_ROW,
    MetricsLog,
    StopSignal,
    begin_output_dir,
    check_output_dir,
    count_update,
    not_finite,
    one_process_only,
    tracker_names,
    use_hardware,
    write_results,
)
from ddpm_mnist.sampling import grid, to_pil
from ddpm_mnist.validation import evaluating, held_out_loss, loss_weights, prediction_target, sample_grid_images


def train(config: TrainConfig) -> int:
    """Train, save and export; returns the exit code: 0, or 130 / 143 when stopped by Ctrl-C / SIGTERM.

    Raises:
        ConfigError: the data, the output folder or a checkpoint are not what the config says.
    """
    # ---- prepare ---------------------------------------------------------------------------------------------------
    output_dir = Path(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=resolve_mixed_precision(config.mixed_precision),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=tracker_names(config.report_to),
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    use_hardware(accelerator)
    accelerator.print(one_process_only() or "", end="")
    checkpoint = check_output_dir(config) if accelerator.is_main_process else None
    checkpoint = gather_object([checkpoint])[0]

    if config.push_to_hub:
        check_repo_id(config.hub_model_id)  # said now, and not after the training
        read_token(config.token_file)

    with accelerator.main_process_first():  # the first decodes the images, the others find them in the cache
        data = load_data(config, accelerator.print)
    if len(set(gather_object([data.fingerprint]))) > 1:
        raise ConfigError("--dataset_name: the processes read different data; give each the same files or network")
    train_images = data.train.to(accelerator.device)

    torch.manual_seed(config.seed)  # for the initial weights; all later randomness: ddpm_mnist/draws.py
    unet = UNet2DModel(**config.unet)
    scheduler = DDPMScheduler(**config.scheduler)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = build_optimizer(unet, config)

    batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    global_batch = config.global_batch(accelerator.num_processes)  # images per update
    max_train_steps = config.num_steps(len(train_images), accelerator.num_processes)
    # The learning rate counts updates. It is not given to `prepare`, which would step it once per process.
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    bare_unet = accelerator.unwrap_model(unet, keep_torch_compile=False)  # the module itself: plain parameter names
    # EMAModel's decay grows as (1 + n) / (10 + n), so that the average spans about a tenth of the run, however long.
    ema = EMAModel(bare_unet.parameters(), decay=config.ema_max_decay, foreach=True) if config.use_ema else None

    # ---- resume, or begin ------------------------------------------------------------------------------------------
    step = 0  # global batches, each an update of the weights unless its gradient is not finite
    counts = torch.zeros(4, device=accelerator.device)  # of losses and left-out updates, see count_update
    run = {  # what must not change in the middle of a run
        **config.identity(),
        "dataset": data.fingerprint,
        "global batch": global_batch,
        "mixed precision": accelerator.mixed_precision,
    }
    if checkpoint is not None:
        state = load_state(checkpoint, run)
        load_weights(checkpoint, bare_unet, ema)
        optimizer.load_state_dict(state["optimizer"])
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        if ema is not None:
            ema.optimization_step = state["step"]
        step, counts = state["step"], state["counts"].to(accelerator.device)
        accelerator.print(f"Resumed from {checkpoint} at step {step}.")

    def averaged_weights() -> dict[str, torch.Tensor]:
        return dict(zip((name for name, _ in bare_unet.named_parameters()), ema.shadow_params))

    def save() -> None:
        nonlocal counts
        counts = accelerator.reduce(counts, "mean")  # what each process may go on from
        if not all(bool(p.isfinite().all()) for p in bare_unet.parameters()):
            raise ConfigError(not_finite(config, output_dir, step))
        if accelerator.is_main_process:
            weights = {"unet": bare_unet.state_dict()}
            if ema is not None:
                weights["unet_ema"] = averaged_weights()
            state = {
                "run": run,
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "step": step,
                "counts": counts,
            }
            save_checkpoint(output_dir, step, bare_unet, weights, state, config.checkpoints_total_limit)
        accelerator.wait_for_everyone()

    def validate() -> None:
        """Log the held-out loss of raw and averaged weights, and a grid of samples; every process does its share."""
        metrics = {}
        for name, weights in (("raw", None), ("ema", ema)) if ema is not None else (("raw", None),):
            with evaluating(bare_unet, weights):
                losses = held_out_loss(bare_unet, scheduler, data.test, accelerator, config.eval_batch_size)
                metrics |= {f"held_out_{name}/{key}": value for key, value in losses.items()}
                if weights is ema:  # the averaged weights where there are any
                    samples = sample_grid_images(
                        bare_unet,
                        scheduler,
                        accelerator,
                        config.num_validation_images,
                        config.eval_batch_size,
                        config.ddpm_num_inference_steps,
                        config.seed,
                        config.null_class_label,
                    )
        if accelerator.is_main_process:
            log.write(step, metrics)
            log.write_picture(step, grid(to_pil(samples), zoom=2))

    if accelerator.is_main_process:
        begin_output_dir(config)
    accelerator.wait_for_everyone()

    # ---- Algorithm 1 -----------------------------------------------------------------------------------------------
    log = MetricsLog(accelerator, config, output_dir, step)
    stop = StopSignal(accelerator)
    parameters = sum(p.numel() for p in bare_unet.parameters())
    accelerator.print(
        f"Training {parameters:,} parameters on {len(train_images):,} images of {data.name} for {max_train_steps:,}"
        f" steps of {global_batch} ({accelerator.num_processes} process(es) x {batch_size} x {accumulation}) on"
        f" {accelerator.device}, mixed precision {accelerator.mixed_precision}."
    )
    progress = tqdm(total=max_train_steps, initial=step, disable=not accelerator.is_local_main_process, desc="train")
    batches = train_images.batches(
        index_batches(
            len(train_images),
            config.seed,
            step,
            batch_size,
            accumulation,
            accelerator.process_index,
            accelerator.num_processes,
        )
    )
    shape = (global_batch, config.unet["in_channels"], config.unet["sample_size"], config.unet["sample_size"])
    started, first_step = time.perf_counter(), step
    unet.train()
    while step < max_train_steps and not stop.requested():  # 1: repeat ... 6: until converged
        update_loss = torch.zeros((), device=accelerator.device)
        all_noise, all_timesteps = draw_noise_and_timesteps(
            config.seed, step, shape, len(scheduler), accelerator.device, config.timestep_sampling
        )
        for micro_step in range(accumulation):
            share = accelerator.num_processes * micro_step + accelerator.process_index
            rows = slice(share * batch_size, (share + 1) * batch_size)  # this process's part of the global batch
            seed_dropout(config.seed, step, share)

            images, labels = next(batches)  # 2: x_0 ~ q(x_0)
            labels = drop_labels(labels, config, step, global_batch, rows)
            timesteps = all_timesteps[rows]  # 3: t ~ Uniform
            noise = all_noise[rows]  # 4: epsilon ~ N(0, I)
            with accelerator.accumulate(unet):
                # Always in float32: in half precision 1 - beta rounds to 1 at the first timesteps, and adds no noise.
                noisy_images = scheduler.add_noise(images, noise, timesteps)  # x_t ~ q(x_t | x_0), eq. 4
                model_output = unet(noisy_images, timesteps, class_labels=labels).sample  # epsilon_theta(x_t, t)
                target = prediction_target(scheduler, images, noise, timesteps)
                error = F.mse_loss(model_output.float(), target, reduction="none")
                weights = loss_weights(scheduler, timesteps, config.snr_gamma)  # all 1, unless asked for
                loss = (weights * error).mean()  # L_simple, eq. 14
                accelerator.backward(loss)  # 5: take a gradient descent step
                if accelerator.sync_gradients:
                    finite = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm).isfinite()
                    if accelerator.scaler is None:  # fp16's scaler sets it itself; where it is 1, nothing is changed
                        optimizer.optimizer.found_inf = (~finite).float()
                optimizer.step()
                optimizer.zero_grad()
            update_loss += loss.detach() / accumulation

        counts = count_update(counts, update_loss, finite)
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        if ema is not None:
            ema.step(bare_unet.parameters())
        step += 1

        progress.update()
        if step % config.logging_steps == 0 or step == max_train_steps:
            loss_sum, losses, skipped, in_a_row = accelerator.reduce(counts, "mean").tolist()
            if in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise ConfigError(not_finite(config, output_dir, step))
            rate = log.images_per_second(step, global_batch)
            mean_loss = {"loss": loss_sum / losses} if losses else {}
            log.write(step, {**mean_loss, "lr": learning_rate, "images_per_second": rate, "skipped": int(skipped)})
            progress.set_postfix(**mean_loss, lr=f"{learning_rate:.1e}", images_s=f"{rate:.0f}")
            counts[:2] = 0
        if config.validation_steps and (step % config.validation_steps == 0 or step == max_train_steps):
            validate()
        if step % config.checkpointing_steps == 0 or step == max_train_steps:
            save()
    progress.close()

    # ---- finish ----------------------------------------------------------------------------------------------------
    if step < max_train_steps:
        if step % config.checkpointing_steps:
            save()
        accelerator.print(f"Stopped at step {step}; go on with --resume_from_checkpoint latest.")
    elif accelerator.is_main_process:
        averaged = averaged_weights() if ema is not None else None
        export_pipeline(bare_unet, scheduler, output_dir, averaged, config.null_class_label)
        seconds = time.perf_counter() - started
        if step > first_step:
            write_results(output_dir, accelerator, data.name, parameters, log.last, step - first_step, seconds)
        accelerator.print(f"Saved to {output_dir}: {parameters:,} parameters, {seconds / 60:.1f} minutes.")
        if config.push_to_hub:
            private, token_file = config.hub_private_repo, config.token_file
            push_model(output_dir, config.hub_model_id, private=private, token_file=token_file)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return stop.exit_code if step < max_train_steps else 0


def main() -> int:
    """Read the options; train, or with `--check` report and do not train."""
    config = parse_args()
    if "--check" in sys.argv:
        from ddpm_mnist.doctor import check

        return check(config)
    return train(config)


if __name__ == "__main__":
    sys.exit(run_script(main))

"""Train a denoising diffusion probabilistic model (DDPM, Ho et al. 2020) on MNIST, or on any set of small images.

    accelerate launch train_ddpm_mnist.py                # ylecun/mnist from the Hub, 15 to 30 minutes on two cores
    accelerate launch train_ddpm_mnist.py --config configs/smoke.yaml --output_dir /tmp/smoke

`train` is Algorithm 1 of the paper (https://arxiv.org/abs/2006.11239); its line numbers stand in the comments,
and equation numbers are the paper's. What the default does otherwise: configs/mnist.yaml. The model is in
`ddpm_mnist/`, what else a run needs in `ddpm_mnist/training/`.
"""

import sys

from ddpm_mnist.loss import loss_weights, squared_error
from ddpm_mnist.options import run_script
from ddpm_mnist.training.check import check
from ddpm_mnist.training.config import TrainConfig, parse_args
from ddpm_mnist.training.export import export
from ddpm_mnist.training.optimizer import clip_gradients
from ddpm_mnist.training.setup import prepare
from ddpm_mnist.training.validation import validate


def train(config: TrainConfig) -> int:
    """Train, save and export.

    Returns:
        The exit code: 0, or 130 / 143 when stopped by Ctrl-C / SIGTERM.

    Raises:
        ConfigError: the data, the output folder or a checkpoint are not what the config says.
    """
    with prepare(config) as run:  # devices, data, models, checkpoint; refuses what cannot work, and writes nothing
        run.begin()  # from here on there are files
        accelerator, unet, scheduler, optimizer = run.accelerator, run.unet, run.scheduler, run.optimizer

        while run.step < run.num_steps and not run.stop.requested():  # 1: repeat
            for images, labels, timesteps, noise in run.batches():  # 2, 3, 4: draw x_0, t and epsilon ~ N(0, I)
                with accelerator.accumulate(unet):
                    images, noise = run.means(images, noise, timesteps, labels)  # x_t as before; not in the paper
                    error = squared_error(unet, scheduler, images, noise, timesteps, labels)
                    weights = loss_weights(scheduler, timesteps, config.loss_weighting, config.snr_gamma)
                    loss = (weights * error).mean()  # L_simple, eq. 14; for v, reweighted
                    accelerator.backward(loss)  # 5: take a gradient descent step
                    if accelerator.sync_gradients:  # after the last micro-batch
                        finite = clip_gradients(accelerator, unet, optimizer, config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                run.add_loss(loss)
            run.end_update(finite)  # learning rate, averaged weights, step + 1

            if run.due(config.logging_steps):
                run.write_log()
            if run.due(config.validation_steps):
                validate(run)
            if run.due(config.checkpointing_steps):
                run.save()

        if run.step == run.num_steps:  # 6: until converged
            export(run)
        return run.finish()


def main(arguments: list[str]) -> int:
    """Read the options; train, or with `--check` report and do not train."""
    config = parse_args(arguments)
    return check(config) if config.check else train(config)


if __name__ == "__main__":
    sys.exit(run_script(main))

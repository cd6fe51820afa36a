"""Train a denoising diffusion probabilistic model (DDPM, Ho et al. 2020) on MNIST, or on any set of small images.

    accelerate launch train_ddpm_mnist.py                       # ten minutes on two cores
    accelerate launch train_ddpm_mnist.py --max_train_steps 200 --output_dir first-look

`train` is Algorithm 1 of the paper (https://arxiv.org/abs/2006.11239). The comments name its lines and equations.
`RECOMMENDED` in ddpm_mnist/training/config.py lists how the default recipe departs from it. The model is in
`ddpm_mnist/`; checkpoints, logs and the like are in `ddpm_mnist/training/`.
"""

import sys

from ddpm_mnist.options import run_script
from ddpm_mnist.training.config import TrainConfig, parse_args


def train(config: TrainConfig) -> int:
    """Train, save and export. Returns the exit code: 0, or 130 / 143 when stopped by Ctrl-C / SIGTERM.

    ConfigError: the data, the output folder or a checkpoint do not fit the config.
    """
    import torch.nn.functional as F  # here and not above, so that --help need not wait for torch

    from ddpm_mnist.training.export import export
    from ddpm_mnist.training.run import prepare
    from ddpm_mnist.training.validation import validate

    with prepare(config) as run:  # devices, data, models, checkpoint
        run.begin()  # from here on files are written
        accelerator, unet, scheduler, optimizer = run.accelerator, run.unet, run.scheduler, run.optimizer

        while run.step < config.max_train_steps and not run.stop.requested():  # 1: repeat
            for images, labels, timesteps, noise in run.batches():  # 2, 3, 4: draw x_0, t and epsilon ~ N(0, I)
                with accelerator.accumulate(unet):
                    noisy_images = scheduler.add_noise(images, noise, timesteps)  # x_t ~ q(x_t | x_0), eq. 4
                    model_output = unet(noisy_images, timesteps, class_labels=labels).sample  # paper: epsilon_theta
                    target = run.target(noisy_images, images, noise, timesteps, labels)  # paper: the noise
                    loss = F.mse_loss(model_output, target)  # paper: L_simple, eq. 14
                    accelerator.backward(loss)  # 5: take a gradient descent step
                    run.clip_gradients()
                    optimizer.step()
                    optimizer.zero_grad()
                run.add_loss(loss)
            run.end_update()  # learning rate, averaged weights, step + 1

            if run.due(config.logging_steps):
                run.write_log()
            if run.due(config.validation_steps, first=100):
                validate(run)
            if run.due(config.checkpointing_steps):
                run.save()

        if run.step == config.max_train_steps:  # 6: until converged
            export(run)
        return run.finish()


def main(arguments: list[str]) -> int:
    return train(parse_args(arguments))


if __name__ == "__main__":
    sys.exit(run_script(main))

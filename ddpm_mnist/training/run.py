"""A training run: its parts, and its state from one update to the next."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..hub.repo import check_repo_id, make_repo, read_token
from ..images.dataset import Data, load_data
from ..loading import Model
from ..options import options_of
from ..pipeline import count_classes
from .batches import micro_batches
from .build import build, check_models
from .checkpoint import load_checkpoint, remove, save_checkpoint
from .config import RecipeOptions, TrainConfig
from .hardware import start_accelerator
from .log import MetricsLog, Stderr
from .optimizer import build_optimizer
from .output_dir import TRACKER_FOLDERS, begin_output_dir, check_output_dir, lock_output_dir
from .stop import StopSignal
from .target import Target

HELD_OUT_IMAGES = 1024  # for the held-out loss
MAX_SKIPPED_IN_A_ROW = 25  # more than the halvings that fp16's first loss scale, 2**16, may need


class Run:
    """The parts and the state of a run, with short methods for what surrounds the algorithm in train_ddpm_mnist.py.

    Attributes:
        unet: as Accelerate prepared it, in mixed precision and with synchronised gradients; `bare_unet`: the module
            inside, with plain parameter names.
        ema: the averaged weights, or None; `target`: what the network should output.
        step: global batches so far, each an update of the weights unless its gradient was not finite.
        counts: `[4]`, on the device: since the last log, the sum and the number of losses; then the skipped updates,
            in total and in a row.
        identity: what must not change when the run resumes: all that shapes its numbers. Its length, logging,
            validation and saving may change; so may the number of processes, if the global batch does not.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, data: Data, checkpoint: Path | None = None):
        self.config, self.accelerator, self.data, self.checkpoint = config, accelerator, data, checkpoint
        self.output_dir = Path(config.output_dir)
        self.global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes

        torch.manual_seed(config.seed)  # for the initial weights; all later randomness: ddpm_mnist/randomness.py
        bare_unet, self.scheduler = build(config, "unet", data.train.images.shape[1]), build(config, "scheduler")
        optimizer = build_optimizer(bare_unet, config)
        # The learning rate counts updates. It is not given to `prepare`, which would step it once per process.
        updates = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": config.max_train_steps}
        self.lr_scheduler = get_scheduler(config.lr_scheduler, optimizer, **updates)
        self.unet, self.optimizer = accelerator.prepare(bare_unet, optimizer)
        self.bare_unet = accelerator.unwrap_model(self.unet, keep_torch_compile=False)
        self.parameters = sum(p.numel() for p in self.bare_unet.parameters())
        # EMAModel's decay grows as (1 + n) / (10 + n), so that the average spans about the last tenth of any run.
        parameters = self.bare_unet.parameters()
        self.ema = EMAModel(parameters, decay=config.ema_max_decay, foreach=True) if config.use_ema else None
        self.target = Target(config, data.train, self.scheduler, self.bare_unet)

        channels = ("in_channels", "out_channels")
        self.identity = {  # a difference is named in this order: options first, then what follows from the data
            **{option.name: getattr(config, option.name) for option in options_of(RecipeOptions)},
            "unet": {key: value for key, value in config.unet.items() if key not in channels},
            "scheduler": config.scheduler,
            "global batch": self.global_batch,
            "mixed precision": accelerator.mixed_precision,
            "dataset": data.fingerprint,
            **{f"unet.{key}": self.bare_unet.config[key] for key in channels},
        }
        self.step, self.counts = 0, torch.zeros(4, device=accelerator.device)
        self.stop = StopSignal(accelerator)
        self.lock = self.log = None  # from `begin` on
        self.progress = tqdm(disable=True)

    @property
    def state(self) -> dict:
        """The parts that a checkpoint keeps beside the weights, by name; each has `state_dict` and its inverse."""
        parts = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler, "scaler": self.accelerator.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def model(self) -> Model:
        """The U-Net and its noise schedule, to draw samples from."""
        return Model(self.bare_unet, self.scheduler, self.config.null_class_label)

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The averaged weights by name; None without `use_ema`."""
        names = [name for name, _ in self.bare_unet.named_parameters()]
        return None if self.ema is None else dict(zip(names, self.ema.shadow_params))

    @property
    def weights(self) -> dict[str, dict[str, Tensor]]:
        """All weights that a checkpoint keeps, by the name of their folder."""
        networks = {"unet": self.bare_unet.state_dict(), "unet_ema": self.averaged_weights()}
        networks["unet_weak"] = self.target.guide.weak.state_dict() if self.target.guide is not None else None
        return {name: tensors for name, tensors in networks.items() if tensors is not None}

    def begin(self) -> None:
        """Make the output folder and start its log; print what is trained."""
        accelerator, config = self.accelerator, self.config
        if accelerator.is_main_process:
            self.lock = lock_output_dir(self.output_dir)
            for name in TRACKER_FOLDERS if config.overwrite_output_dir else ():
                remove(self.output_dir / name)
        accelerator.wait_for_everyone()
        self.log = MetricsLog(accelerator, config, self.step)  # before more is deleted: a tracker may fail to start
        if accelerator.is_main_process:
            begin_output_dir(config, more_to_train=self.step < config.max_train_steps)
            if self.step < config.max_train_steps:
                self.log.forget_after(self.step)
        self.micro_batches = micro_batches(config, self.data.train, self.scheduler, accelerator, self.step)
        self.stop.listen()
        accelerator.print(
            f"Training {self.parameters:,} parameters on {len(self.data.train):,} images of {self.data.name} for"
            f" {config.max_train_steps:,} steps of {self.global_batch} ({accelerator.num_processes} process(es) x"
            f" {config.train_batch_size} x {config.gradient_accumulation_steps}) on {accelerator.device}, mixed"
            f" precision {accelerator.mixed_precision}."
        )
        signal = float(self.scheduler.alphas_cumprod[-1]) ** 0.5
        if signal > 0.1:
            accelerator.print(
                f"Warning: x_T still holds {signal:.0%} of x_0, but sampling starts from pure noise; raise"
                " scheduler.beta_end or scheduler.num_train_timesteps."
            )
        shown = {"disable": not accelerator.is_local_main_process, "file": Stderr(), "dynamic_ncols": True}
        self.progress = tqdm(total=config.max_train_steps, initial=self.step, desc="train", **shown)
        self.started, self.first_step = time.perf_counter(), self.step
        self.logged = self.started, self.step
        self.unet.train()

    # ---- one update ------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
        """The micro-batches of this update: images, labels, timesteps and noise; see `micro_batches`."""
        self.update_loss = torch.zeros((), device=self.accelerator.device)
        self.target.begin_update(self.step, self.averaged_weights() or self.bare_unet.state_dict())
        return islice(self.micro_batches, self.config.gradient_accumulation_steps)

    def clip_gradients(self) -> None:
        """Clip the gradients after the last micro-batch. If they are not finite, the optimizer skips its update.

        The decision stays on the device: reading it would make a GPU wait for the host.
        """
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), self.config.max_grad_norm)
            self.finite = norm.isfinite()
            if self.accelerator.scaler is None:  # fp16's scaler sets it itself
                self.optimizer.optimizer.found_inf = (~self.finite).float()
            if self.accelerator.device.type == "mps" and not self.finite:  # its fused AdamW does not look at found_inf
                self.optimizer.optimizer.zero_grad()

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch to that of the update."""
        self.update_loss += loss.detach() / self.config.gradient_accumulation_steps

    def end_update(self) -> None:
        """After the optimizer's step: counts, learning rate, averaged weights, step + 1."""
        loss_sum, num_losses, skipped, in_a_row = self.counts
        loss_sum = loss_sum + torch.where(self.finite, self.update_loss, 0)
        in_a_row = torch.where(self.finite, 0, in_a_row + 1)
        self.counts = torch.stack([loss_sum, num_losses + self.finite, skipped + ~self.finite, in_a_row])
        self.learning_rate = self.lr_scheduler.get_last_lr()[0]  # of this update
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.bare_unet.parameters())
        self.step += 1
        self.progress.update()

    def due(self, every: int, first: int | None = None) -> bool:
        """Whether something that happens every N steps, at step `first` and at the last is due now; 0: never."""
        return every > 0 and (self.step % every == 0 or self.step in (first, self.config.max_train_steps))

    def write_log(self) -> None:
        """Log the mean loss since the last log. ConfigError: too many updates in a row were skipped."""
        loss_sum, num_losses, skipped, in_a_row = self.accelerator.reduce(self.counts, "mean").tolist()
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise ConfigError(self.not_finite())
        (then, step), now = self.logged, time.perf_counter()
        self.logged = now, self.step
        rate = (self.step - step) * self.global_batch / (now - then)  # with validation and checkpoints
        mean_loss = {"loss": loss_sum / num_losses} if num_losses else {}
        self.log.write(
            self.step, mean_loss | {"lr": self.learning_rate, "images_per_second": rate, "skipped": int(skipped)}
        )
        self.progress.set_postfix(**mean_loss, lr=f"{self.learning_rate:.1e}", images_s=f"{rate:.0f}")
        self.counts[:2] = 0

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint. ConfigError: the weights are not finite, or it cannot be written."""
        accelerator = self.accelerator
        self.counts = accelerator.reduce(self.counts, "mean")  # every process can resume from the mean
        if not all(bool(p.isfinite().all()) for p in self.bare_unet.parameters()):
            raise ConfigError(self.not_finite())
        if accelerator.is_main_process:
            state = {name: part.state_dict() for name, part in self.state.items()}
            state |= {"run": self.identity, "step": self.step, "counts": self.counts}
            limit = self.config.checkpoints_total_limit
            save_checkpoint(self.output_dir, self.step, self.bare_unet, self.weights, state, limit)
        accelerator.wait_for_everyone()

    def load(self) -> None:
        """Resume from `checkpoint`. ConfigError: it is of another run."""
        state = load_checkpoint(self.checkpoint, self.identity, self.weights)
        for name, part in self.state.items():
            part.load_state_dict(state[name])
        if self.ema is not None:
            self.ema.optimization_step = state["step"]
        self.step, self.counts = state["step"], state["counts"].to(self.accelerator.device)
        self.accelerator.print(f"Resumed from {self.checkpoint} at step {self.step}.")

    def not_finite(self) -> str:
        """The error message of a run whose loss or weights are not finite."""
        return (
            f"--learning_rate {self.config.learning_rate}: loss or weights are no longer finite at step {self.step};"
            " lower it, or set --mixed_precision no; --resume_from_checkpoint latest goes on from the last checkpoint"
        )

    # ---- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> int:
        """Save a run that was stopped early, and end the log. Returns the exit code."""
        self.progress.close()
        stopped = self.step < self.config.max_train_steps
        if stopped:
            if self.step % self.config.checkpointing_steps:
                self.save()
            self.accelerator.print(f"Stopped at step {self.step}; resume with --resume_from_checkpoint latest.")
        self.accelerator.wait_for_everyone()
        self.log.close()
        self.accelerator.end_training()
        return 128 + self.stop.signum if stopped else 0

    def close(self) -> None:
        """Release signals and the output folder."""
        self.stop.restore()
        self.progress.close()  # an error is then printed on a line of its own
        if self.lock is not None:
            self.lock.release()


@contextmanager
def prepare(config: TrainConfig) -> Iterator[Run]:
    """The parts of a run, while the context lasts. Checks that it can work; makes the repo to push to, if any.

    Afterwards signal handlers, the lock of the output folder, Accelerate's state and the settings of CUDA are as
    before, so that a process can train more than once. ConfigError: the model, the data, the output folder or a
    checkpoint do not fit the config.
    """
    with ExitStack() as at_the_end:
        if not AcceleratorState._shared_state:  # else the caller has an Accelerator in this process
            at_the_end.callback(GradientState._reset_state)
            at_the_end.callback(AcceleratorState._reset_state, reset_partial_state=True)
        for backend, setting in ((torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "deterministic")):
            at_the_end.callback(setattr, backend, setting, getattr(backend, setting))
        check_models(config)
        accelerator = start_accelerator(config)
        checkpoint = check_output_dir(config) if accelerator.is_main_process else None
        checkpoint = gather_object([checkpoint])[0]
        if config.push_to_hub:
            check_repo_id(config.hub_model_id)
        classes = count_classes(config.unet.get("num_class_embeds"), config.null_class_label)
        channels, size = config.unet["in_channels"], config.unet["sample_size"]
        with accelerator.main_process_first():  # the first decodes the images, the others read them from the cache
            data = load_data(config, channels, size, classes, HELD_OUT_IMAGES, accelerator.print)
        if len(set(gather_object([data.fingerprint]))) > 1:
            raise ConfigError("--dataset_name: the processes read different data; give each the same files or network")
        data.train = data.train.to(accelerator.device)
        run = Run(config, accelerator, data, checkpoint)
        if checkpoint is not None:
            run.load()
        if run.step > config.max_train_steps:
            advice = f"{checkpoint} is past it; give more, or an earlier one"
            raise ConfigError(f"--max_train_steps {config.max_train_steps}: {advice}")
        if config.push_to_hub and accelerator.is_main_process:  # now, and not after the training
            make_repo(HfApi(token=read_token()), config.hub_model_id, config.hub_private_repo)
        at_the_end.callback(run.close)
        yield run

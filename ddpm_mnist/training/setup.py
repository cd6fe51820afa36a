"""A run before its first step, and its state from one step to the next."""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError, first_line, shorten
from ..hub.checkpoints import CheckpointPusher
from ..hub.push import check_repo_id, read_token
from ..images.batches import Images, index_batches
from ..images.dataset import Data, load_data
from ..loss import posterior_means, timestep_density
from ..randomness import draw_noise_and_timesteps, drop_labels, flip_images, seed_dropout, seeded_generator
from ..scheduler import DDPMScheduler
from ..unet import UNet2DModel
from .checkpoint import list_checkpoints, load_state, load_weights, save_checkpoint
from .config import BEFORE, TrainConfig
from .hardware import settings_kept, start_accelerator
from .log import MetricsLog, count_update
from .models import build, check_models, start_from
from .optimizer import build_optimizer
from .output_dir import begin_output_dir, check_output_dir, lock_output_dir
from .stop import StopSignal

REFERENCES_LAST = 10  # updates: drawing them takes longer than using them once
MAX_REFERENCE_PIXELS = 2**24  # 64 MB
MAX_SKIPPED_IN_A_ROW = 25  # more than the halvings that fp16's first loss scale, 2**16, may need
ONE_AT_A_TIME = threading.Lock()  # Accelerate's state is the process's, and two runs would share it
LOST_PEER = re.compile("timed? ?out|connection (closed|reset|refused)|peer|gloo|nccl", re.IGNORECASE)


@dataclass
class Run:
    """The state of a training run, with short methods that keep it. The algorithm is `train` in train_ddpm_mnist.py."""

    config: TrainConfig
    accelerator: Accelerator
    data: Data
    unet: torch.nn.Module  # as Accelerate prepared it: in mixed precision, its gradients synchronised
    bare_unet: UNet2DModel  # the module inside, with plain parameter names
    scheduler: DDPMScheduler
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None  # the averaged weights
    identity: dict  # what must not change when the run resumes
    num_steps: int
    stop: StopSignal
    checkpoint: Path | None  # to resume from
    step: int = 0  # global batches, each an update of the weights unless its gradient was not finite
    counts: Tensor = field(default_factory=lambda: torch.zeros(4))  # see `count_update`
    update_loss: Tensor | float = 0.0  # of the micro-batches so far

    def __post_init__(self):
        self.output_dir = Path(self.config.output_dir)
        self.global_batch = self.config.global_batch(self.accelerator.num_processes)
        self.parameters = sum(p.numel() for p in self.bare_unet.parameters())
        self.counts = self.counts.to(self.accelerator.device)
        normal = self.config.log_snr_mean, self.config.log_snr_std
        self.timestep_density = timestep_density(self.scheduler, *normal, self.config.uniform_timesteps)
        self.references = None  # images and labels, see `draw_references`
        self.lock = None  # of the output folder, in the main process
        self.pusher = None  # of checkpoints, in the main process, where the config asks for it

    def begin(self) -> None:
        """Make the output folder and start its log; say what is trained."""
        accelerator, config = self.accelerator, self.config
        if accelerator.is_main_process:
            self.lock = lock_output_dir(self.output_dir, accelerator.print)
            begin_output_dir(config, more_to_train=self.step < self.num_steps)
            if config.push_checkpoints:
                private, token_file = config.hub_private_repo, config.token_file
                self.pusher = CheckpointPusher(config.hub_model_id, token_file, private, accelerator.print)
        accelerator.wait_for_everyone()
        self.log = MetricsLog(accelerator, config, self.step)
        self.stop.listen()
        accelerator.print(
            f"Training {self.parameters:,} parameters on {len(self.data.train):,} images of {self.data.name} for"
            f" {self.num_steps:,} steps of {self.global_batch} ({accelerator.num_processes} process(es) x"
            f" {config.train_batch_size} x {config.gradient_accumulation_steps}) on {accelerator.device}, mixed"
            f" precision {accelerator.mixed_precision}."
        )
        self.progress = tqdm(
            total=self.num_steps, initial=self.step, disable=not accelerator.is_local_main_process, desc="train"
        )
        self.images = self.data.train.batches(
            index_batches(
                len(self.data.train),
                config.seed,
                self.step,
                config.train_batch_size,
                config.gradient_accumulation_steps,
                accelerator.process_index,
                accelerator.num_processes,
            )
        )
        self.started, self.first_step = time.perf_counter(), self.step
        self.unet.train()

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
        """The micro-batches of the present update, this process's share of the global batch.

        Yields:
            images `[B, C, H, W]` in [-1, 1], labels `[B]` (None for an unconditional U-Net), timesteps `[B]`, and noise
            `[B, C, H, W]`.
        """
        config, device = self.config, self.accelerator.device
        size, batch_size = config.unet["sample_size"], config.train_batch_size
        shape = (self.global_batch, config.unet["in_channels"], size, size)
        all_noise, all_timesteps = draw_noise_and_timesteps(
            config.seed,
            self.step,
            shape,
            len(self.scheduler),
            device,
            config.timestep_sampling,
            self.timestep_density,
        )
        self.update_loss = torch.zeros((), device=device)
        self.draw_references()
        for micro_step in range(config.gradient_accumulation_steps):
            share = self.accelerator.num_processes * micro_step + self.accelerator.process_index
            rows = slice(share * batch_size, (share + 1) * batch_size)
            seed_dropout(config.seed, self.step, share)
            images, labels = next(self.images)
            if self.bare_unet.config.num_class_embeds is None:
                labels = None
            elif config.null_class_label is not None:
                null, probability = config.null_class_label, config.class_dropout_prob
                labels = drop_labels(labels, config.seed, self.step, self.global_batch, rows, probability, null)
            if config.random_flip:
                images = flip_images(images, config.seed, self.step, self.global_batch, rows)
            yield images, labels, all_timesteps[rows], all_noise[rows]

    def draw_references(self) -> None:
        """Draw the images for `means`, anew every few updates; a function of the seed and the step."""
        count = self.config.reference_images
        if count == 0:
            return
        number, first = divmod(self.step, REFERENCES_LAST)
        if self.references is None or first == 0:
            generator = seeded_generator(self.config.seed, "references", number)
            indices = torch.randint(len(self.data.train), (count,), generator=generator)
            images, labels = next(self.data.train.batches(iter([indices])))
            if self.config.random_flip:
                flipped = (torch.rand(count, generator=generator) < 0.5).to(images.device)
                images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
            self.references = images, labels

    def means(self, images: Tensor, noise: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_0 and epsilon; with `reference_images`, their means given x_t (and the label): see `posterior_means`."""
        if self.references is None:
            return images, noise
        references, reference_labels = self.references
        same_class = None
        if labels is not None:
            same_class = labels[:, None] == reference_labels
            if self.config.null_class_label is not None:
                same_class |= (labels == self.config.null_class_label)[:, None]
        return posterior_means(self.scheduler, images, noise, timesteps, references, same_class)

    def add_loss(self, loss: Tensor) -> None:
        """Count the loss of a micro-batch towards that of the update."""
        self.update_loss += loss.detach() / self.config.gradient_accumulation_steps

    def end_update(self, finite: Tensor) -> None:
        """After the optimizer's step, which was skipped unless `finite`: learning rate, averaged weights, counts."""
        self.counts = count_update(self.counts, self.update_loss, finite)
        self.learning_rate = self.lr_scheduler.get_last_lr()[0]  # of this update
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.bare_unet.parameters())
        self.step += 1
        self.progress.update()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the last, is due now; 0: never."""
        return every > 0 and (self.step % every == 0 or self.step == self.num_steps)

    def write_log(self) -> None:
        """Log the mean loss since the last log. ConfigError: too many updates in a row were skipped."""
        loss_sum, losses, skipped, in_a_row = self.accelerator.reduce(self.counts, "mean").tolist()
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise ConfigError(self.not_finite())
        rate = self.log.images_per_second(self.step, self.global_batch)
        mean_loss = {"loss": loss_sum / losses} if losses else {}
        rates = {"lr": self.learning_rate, "images_per_second": rate, "skipped": int(skipped)}
        self.log.write(self.step, {**mean_loss, **rates})
        self.progress.set_postfix(**mean_loss, lr=f"{self.learning_rate:.1e}", images_s=f"{rate:.0f}")
        self.counts[:2] = 0

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The averaged weights by name; None without `use_ema`."""
        if self.ema is None:
            return None
        return dict(zip((name for name, _ in self.bare_unet.named_parameters()), self.ema.shadow_params))

    def save(self) -> None:
        """Write a checkpoint. ConfigError: the weights are not finite, or it cannot be written."""
        accelerator = self.accelerator
        self.counts = accelerator.reduce(self.counts, "mean")  # every process can resume from the mean
        self.check_weights_agree()
        if not all(bool(p.isfinite().all()) for p in self.bare_unet.parameters()):
            raise ConfigError(self.not_finite())
        if accelerator.is_main_process:
            weights = {"unet": self.bare_unet.state_dict()}
            if self.ema is not None:
                weights["unet_ema"] = self.averaged_weights()
            state = {
                "run": self.identity,
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "step": self.step,
                "counts": self.counts,
            }
            limit = self.config.checkpoints_total_limit
            checkpoint = save_checkpoint(self.output_dir, self.step, self.bare_unet, weights, state, limit)
            if self.pusher is not None:
                self.pusher.push(checkpoint)
        accelerator.wait_for_everyone()

    def load(self) -> None:
        """Resume from `checkpoint`. ConfigError: it is of another run."""
        older = TrainConfig().identity() | BEFORE
        state = load_state(self.checkpoint, self.identity, older)
        load_weights(self.checkpoint, self.bare_unet, self.ema)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.optimization_step = state["step"]
        self.step, self.counts = state["step"], state["counts"].to(self.accelerator.device)
        self.accelerator.print(f"Resumed from {self.checkpoint} at step {self.step}.")

    def not_finite(self) -> str:
        """The error message of a run whose loss or weights are not finite."""
        return (
            f"--learning_rate {self.config.learning_rate}: loss or weights are no longer finite at step {self.step};"
            f" lower it, or set --mixed_precision no; {self.last_good()}"
        )

    def last_good(self) -> str:
        """Where an error leaves the user: the end of its message."""
        checkpoints = list_checkpoints(self.output_dir)
        return f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"

    def check_weights_agree(self) -> None:
        """Compare the weights of all processes, by hash. ConfigError: they differ."""
        digest = hashlib.sha256()
        for parameter in self.bare_unet.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        found = gather_object([digest.hexdigest()[:8]])
        if len(set(found)) > 1:
            raise ConfigError(
                f"the processes hold different weights at step {self.step} ({', '.join(found)}): a fault of the"
                f" hardware or of the libraries; {self.last_good()}"
            )

    def close(self) -> None:
        """Give back what the run took from the process; what is being pushed is pushed, even after an error."""
        try:
            if self.pusher is not None:
                self.pusher.wait()
        finally:
            self.stop.give_back()
            if self.lock is not None:
                self.lock.release()

    def finish(self) -> int:
        """Save where the run was stopped early, and end the log. Returns the exit code."""
        self.progress.close()
        if self.step < self.num_steps:
            if self.step % self.config.checkpointing_steps:
                self.save()
            self.accelerator.print(f"Stopped at step {self.step}; resume with --resume_from_checkpoint latest.")
        self.accelerator.wait_for_everyone()
        if self.pusher is not None:
            self.pusher.wait()
            self.pusher = None
        self.log.close()
        self.accelerator.end_training()
        return self.stop.exit_code if self.step < self.num_steps else 0


@contextmanager
def prepare(config: TrainConfig) -> Iterator[Run]:
    """Everything that a run needs, for the time of the run. Refuses what cannot work, and writes nothing.

    Afterwards signal handlers, the lock of the output folder, Accelerate's state and the settings of CUDA are as
    before, so that a process can train more than once.

    Raises:
        ConfigError: the model, the data, the output folder or a checkpoint are not what the config says.
    """
    if not ONE_AT_A_TIME.acquire(blocking=False):
        raise ConfigError(
            f"--output_dir {config.output_dir}: another run is going on in this process; start this one after it, or in"
            " a process of its own"
        )
    first = not AcceleratorState._shared_state  # else somebody's Accelerator lives in this process
    run = None
    try:
        with settings_kept():
            run = build_run(config)
            yield run
    except RuntimeError as error:
        if run is None or run.accelerator.num_processes == 1 or not LOST_PEER.search(str(error)):
            raise
        gone = f"another process of the run is gone or stuck ({first_line(error)})"
        raise ConfigError(f"{gone}; {run.last_good()}; resume with --resume_from_checkpoint latest") from error
    finally:
        try:
            if run is not None:
                run.close()
        finally:
            if first:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
            ONE_AT_A_TIME.release()


def build_run(config: TrainConfig) -> Run:
    """A run as it begins, or as its checkpoint left it. ConfigError: see `prepare`."""
    check_models(config)
    accelerator = start_accelerator(config)
    checkpoint = check_output_dir(config, accelerator.print) if accelerator.is_main_process else None
    checkpoint = gather_object([checkpoint])[0]
    seen = gather_object([checkpoint is None or checkpoint.is_dir()])
    if not all(seen):
        blind = shorten(i for i, sees in enumerate(seen) if not sees)
        raise ConfigError(
            f"--resume_from_checkpoint {checkpoint}: processes {blind} do not see it; put --output_dir on a disk that"
            " all hosts share, or copy the checkpoint to each"
        )
    if config.push_to_hub or config.push_checkpoints:
        check_repo_id(config.hub_model_id)  # now, and not after the training
        read_token(config.token_file)

    with accelerator.main_process_first():  # the first decodes the images, the others find them in the cache
        data = load_data(config, config.image_shape, config.num_validation_samples, accelerator.print)
    if len(set(gather_object([data.fingerprint]))) > 1:
        raise ConfigError("--dataset_name: the processes read different data; give each the same files or network")
    data.train = data.train.to(accelerator.device)
    most = min(len(data.train), MAX_REFERENCE_PIXELS // data.pixels) if isinstance(data.train, Images) else 0
    config.reference_images = min(config.reference_images, most)
    config.set_channels(data.channels)

    torch.manual_seed(config.seed)  # for the initial weights; all later randomness: ddpm_mnist/randomness.py
    bare_unet, scheduler = build(config, "unet"), build(config, "scheduler")
    if config.init_from is not None and checkpoint is None:
        start_from(bare_unet, config.init_from, accelerator.print)
    if config.gradient_checkpointing:
        bare_unet.enable_gradient_checkpointing()
    optimizer = build_optimizer(bare_unet, config)
    num_steps = config.num_steps(len(data.train), accelerator.num_processes)
    # The learning rate counts updates. It is not given to `prepare`, which would step it once per process.
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=num_steps
    )
    unet, optimizer = accelerator.prepare(bare_unet, optimizer)
    bare_unet = accelerator.unwrap_model(unet, keep_torch_compile=False)
    # EMAModel's decay grows as (1 + n) / (10 + n), so that the average spans about a tenth of the run, however long.
    ema = EMAModel(bare_unet.parameters(), decay=config.ema_max_decay, foreach=True) if config.use_ema else None
    identity = {
        **config.identity(),
        "dataset": data.fingerprint,
        "global batch": config.global_batch(accelerator.num_processes),
        "mixed precision": accelerator.mixed_precision,
    }
    run = Run(
        config=config,
        accelerator=accelerator,
        data=data,
        unet=unet,
        bare_unet=bare_unet,
        scheduler=scheduler,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        ema=ema,
        identity=identity,
        num_steps=num_steps,
        stop=StopSignal(accelerator),
        checkpoint=checkpoint,
    )
    if checkpoint is not None:
        run.load()
    return run

"""Every option of a training run. The defaults are the recommended run's; `configs/mnist.yaml` states the same.

A YAML file (`--config`) replaces defaults, and the command line wins over both. The U-Net and the noise schedule are
sections of the file, by their diffusers config keys; the command line reaches them with a dot:
`--unet.layers_per_block 2`.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from ..data import DataOptions, ImageShape
from ..options import ConfigError, no_such_option, opt, peek, read_options, read_yaml
from ..pipeline import count_classes

DESCRIPTION = "Train a denoising diffusion model (DDPM, Ho et al. 2020) on MNIST, or on any set of small images."
# 28x28 takes most of the time, so it gets few channels. Attention is at 7x7, where it has 49 tokens, with one head of
# the full width (None), which on a CPU is several times faster than heads of width 8.
UNET = {
    "sample_size": 28,
    "in_channels": None,  # 1 or 3, as the images have
    "out_channels": None,
    "block_out_channels": [16, 48, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "norm_num_groups": 8,
}
# T and the linear betas: Ho et al. 2020, section 4. Why v, this variance and clipping: configs/mnist.yaml.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": True,
}
SECTIONS = ("unet", "scheduler")
BEFORE = {"uniform_timesteps": 1.0, "reference_images": 0, "momentum_warmup_steps": 0}  # what runs did without them


@dataclass
class OutputOptions:
    """Output"""

    output_dir: str = opt("ddpm-mnist", "Gets the pipeline, checkpoints, sample grids and logs.", path=True)
    overwrite_output_dir: bool = opt(False, "Start anew in an output_dir that is not empty.", saved=False)
    resume_from_checkpoint: str | None = opt(
        None, "A checkpoint folder, or 'latest' for the newest in output_dir.", path=True, saved=False
    )
    checkpointing_steps: int = opt(800, "Save a checkpoint every so many updates, and one at the end.", at_least=1)
    checkpoints_total_limit: int | None = opt(2, "Keep so many of the newest checkpoints; null keeps all.", at_least=1)
    report_to: Literal["tensorboard", "wandb", "trackio", "all", "none"] = opt("tensorboard", "Experiment tracker.")
    trackio_space_id: str | None = opt(None, "Space for trackio's dashboard: USER/NAME. Default: on this machine.")
    logging_steps: int = opt(10, "Log the mean loss of all updates since the last log.", at_least=1)
    check: bool = opt(False, "Report on the run to be, its cost and its problems, and do not train.", saved=False)


@dataclass
class OptimizationOptions:
    """Optimization"""

    train_batch_size: int = opt(64, "Images per process and micro-batch.", at_least=1)
    gradient_accumulation_steps: int = opt(1, "Micro-batches per update.", at_least=1)
    max_train_steps: int | None = opt(3200, "Length of the run in optimizer updates.", at_least=1)
    num_train_epochs: int | None = opt(
        None, "Length of the run in passes over the images, instead of max_train_steps.", at_least=1
    )
    resolution: int | None = opt(
        None, "Height and width of the images. Default: unet.sample_size, which it sets.", at_least=1
    )
    random_flip: bool = opt(False, "Mirror half of the images, anew in each epoch.", fixed_on_resume=True)
    optimizer: Literal["adamw", "muon"] = opt(
        "muon", "muon: Muon for hidden weights, AdamW for the rest.", fixed_on_resume=True
    )
    learning_rate: float = opt(4e-3, "Peak learning rate.", positive=True, fixed_on_resume=True)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = opt("cosine", "Shape of the learning rate after the warm-up.", fixed_on_resume=True)
    lr_warmup_steps: int = opt(100, "Warm-up, in optimizer updates.", at_least=0, fixed_on_resume=True)
    momentum_warmup_steps: int = opt(
        150, "Updates over which Muon's momentum rises from 0.85 to 0.95.", at_least=0, fixed_on_resume=True
    )
    adam_beta1: float = opt(0.9, "AdamW's beta1.", fraction=True, fixed_on_resume=True)
    adam_beta2: float = opt(0.99, "AdamW's beta2.", fraction=True, fixed_on_resume=True)
    adam_weight_decay: float = opt(0.01, "AdamW's weight decay.", at_least=0, fixed_on_resume=True)
    adam_epsilon: float = opt(1e-8, "AdamW's epsilon.", positive=True, fixed_on_resume=True)
    max_grad_norm: float = opt(1.0, "Clip the gradient to this norm.", positive=True, fixed_on_resume=True)
    use_ema: bool = opt(
        True, "Average the weights; samples, and the exported pipeline, use the average.", fixed_on_resume=True
    )
    ema_max_decay: float = opt(
        0.9999,
        "Upper limit of the decay, which is (1 + n) / (10 + n) after n updates: about a run's last tenth.",
        fraction=True,
        fixed_on_resume=True,
    )
    class_dropout_prob: float = opt(
        0.0,
        "Share of labels dropped, for classifier-free guidance; the last of unet.num_class_embeds then means none.",
        fraction=True,
        fixed_on_resume=True,
    )
    timestep_sampling: Literal["uniform", "stratified"] = opt(
        "stratified",
        "Draw the timesteps of a batch one by one, or spread evenly, which lowers the noise of the gradient.",
        fixed_on_resume=True,
    )
    uniform_timesteps: float = opt(
        0.25,
        "Share of the timesteps drawn uniformly; the others so that log SNR ~ N(log_snr_mean, log_snr_std^2).",
        at_least=0,
        at_most=1,
        fixed_on_resume=True,
    )
    log_snr_mean: float = opt(-1.75, "See uniform_timesteps.", at_least=-20, at_most=20, fixed_on_resume=True)
    log_snr_std: float = opt(1.9, "See uniform_timesteps.", positive=True, fixed_on_resume=True)
    loss_weighting: Literal["noise", "output"] = opt(
        "output",
        "The loss is the squared error of the noise (L_simple), or of what the network outputs: for v, that of the "
        "noise over alpha-bar_t.",
        fixed_on_resume=True,
    )
    reference_images: int = opt(
        16384,
        "Where x_t is mostly noise, the target is a mean over so many training images, weighted by how probable each "
        "is. At most 64 MB of them, and none of a set that stays on the disk. 0: what was drawn.",
        at_least=0,
        fixed_on_resume=True,
    )
    snr_gamma: float | None = opt(
        None, "Min-SNR weighting of the loss with this gamma (5.0 is usual). Default: none.",
        positive=True, fixed_on_resume=True,
    )  # fmt: skip
    gradient_checkpointing: bool = opt(False, "Recompute residual blocks in the backward pass to save memory.")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = opt(
        "auto", "auto: what `accelerate launch` was told, else bf16 where the hardware computes in it, else no."
    )
    process_timeout_minutes: float = opt(
        5.0,
        "How long a process waits for the others (also for the first, which decodes a new dataset) before it ends.",
        positive=True,
        at_most=1e6,
    )
    init_from: str | None = opt(
        None, "Start from the weights of this pipeline (folder or Hub id) or checkpoint folder.", path=True
    )
    seed: int = opt(
        0,
        "Fixes initial weights, data order, timesteps and noise.",
        at_least=0,
        at_most=2**63 - 1,
        fixed_on_resume=True,
    )


@dataclass
class ValidationOptions:
    """Validation"""

    validation_steps: int = opt(800, "Held-out loss and a grid of samples every so many updates; 0: never.", at_least=0)
    num_validation_samples: int = opt(1024, "Held-out images for the loss.", at_least=1)
    num_validation_images: int = opt(36, "Images in the grid.", at_least=1)
    ddpm_num_inference_steps: int = opt(50, "Steps of the sampler for each grid.", at_least=1)
    eval_batch_size: int = opt(128, "Images per process in a batch of validation.", at_least=1)


@dataclass
class HubOptions:
    """Hub"""

    push_to_hub: bool = opt(False, "Push the finished model, as push_to_hub.py does.")
    push_checkpoints: bool = opt(
        False, "Push each checkpoint as the run goes, for machines whose disk is lost at the end."
    )
    hub_model_id: str | None = opt(None, "The repo to push to: USER/NAME.")
    hub_private_repo: bool = opt(False, "Make a new repo private; refuse to push to one that is public.")
    token_file: str | None = opt(
        None, "File that holds the Hub's token. Default: `hf auth login`, or HF_TOKEN.", path=True, saved=False
    )


@dataclass
class TrainConfig(HubOptions, ValidationOptions, OptimizationOptions, OutputOptions, DataOptions):
    """The options of `train_ddpm_mnist.py`; names as in diffusers' training examples.

    A dataclass lists the fields of its bases from right to left.
    """

    unet: dict = field(default_factory=lambda: dict(UNET), init=False)
    scheduler: dict = field(default_factory=lambda: dict(SCHEDULER), init=False)

    @property
    def null_class_label(self) -> int | None:
        """The label that stands for a dropped one; None where none are dropped."""
        return self.unet["num_class_embeds"] - 1 if self.class_dropout_prob else None

    @property
    def image_shape(self) -> ImageShape:
        """What the U-Net takes."""
        classes = count_classes(self.unet.get("num_class_embeds"), self.null_class_label)
        return ImageShape(self.unet["in_channels"], self.unet["sample_size"], classes)

    def set_channels(self, channels: int) -> None:
        """Give the U-Net the channels of the images that were read, where the config does not say how many."""
        if self.unet["in_channels"] is None:
            self.unet["in_channels"] = self.unet["out_channels"] = channels

    def global_batch(self, num_processes: int) -> int:
        """Images per update of the weights, over all processes and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes

    def num_steps(self, num_images: int, num_processes: int) -> int:
        """Updates in the run: `max_train_steps`, or as many as `num_train_epochs` passes over the images take."""
        return self.max_train_steps or math.ceil(self.num_train_epochs * num_images / self.global_batch(num_processes))

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a run resumes from a checkpoint: all that shapes its numbers.

        The length of the run, logging, validation and saving may change; so may the number of processes, as long as the
        global batch does not.
        """
        fixed = {option.name for option in fields(self) if option.metadata.get("fixed_on_resume")}
        if self.scheduler["prediction_type"] == "epsilon":
            fixed.remove("loss_weighting")  # the network outputs the noise: it is all one
        if self.optimizer != "muon":
            fixed.remove("momentum_warmup_steps")
        return {name: value for name, value in vars(self).items() if name in fixed or name in SECTIONS}

    def saved(self) -> dict[str, Any]:
        """The settings of the run, without those of one launch only, and with absolute paths of what it reads."""
        saved = {option.name for option in fields(self) if option.metadata.get("saved", True)}
        settings = {k: v for k, v in asdict(self).items() if k in saved}
        for name in ("dataset_name", "init_from"):  # a path, or the Hub's name for something
            if settings[name] is not None and Path(settings[name]).exists():
                settings[name] = str(Path(settings[name]).absolute())
        return settings

    def to_yaml(self) -> str:
        """The same as a file that `--config` reads."""
        return yaml.safe_dump(self.saved(), sort_keys=False)


def parse_args(arguments: list[str]) -> TrainConfig:
    """Read the command line, over the file that `--config` names, over the defaults.

    Raises:
        ConfigError: an unknown key or option, a value of the wrong type or out of range.
    """
    given = peek(arguments, "config", "max_train_steps", "num_train_epochs")
    file = Path(given.config).expanduser() if given.config else None
    values = read_yaml("--config", file) if file else {}
    if "adam_epsilon" in values:  # the train_config.yaml of a run, perhaps from before there were these options
        values = BEFORE | values
    sections = {name: values.pop(name, None) or {} for name in SECTIONS}
    config, rest = read_options(
        TrainConfig,
        arguments,
        DESCRIPTION,
        file,
        values,
        extra={"config": "YAML file of options, such as those in configs/; the command line wins over it."},
        epilog="--unet.KEY VALUE and --scheduler.KEY VALUE set any config key of diffusers' UNet2DModel and "
        f"DDPMScheduler. Defaults: {sections_as_text()}.",
    )

    # Updates or passes over the images: the command line decides before the file, and updates before passes.
    for layer in (vars(given), values):
        if layer.get("max_train_steps") is not None:
            config.num_train_epochs = None
            break
        if layer.get("num_train_epochs") is not None:
            config.max_train_steps = None
            break
    if config.max_train_steps is None and config.num_train_epochs is None:
        raise ConfigError("--max_train_steps: missing; give it or --num_train_epochs")

    for name, value in section_options(rest).items():
        section, key = name.split(".")
        if not isinstance(sections[section], dict):
            break
        sections[section][key] = value
    for section, given_keys in sections.items():
        if not isinstance(given_keys, dict):
            raise ConfigError(f"--config {file}: {section} must hold `key: value` lines")
        defaults = getattr(config, section)
        given_keys = {k: v for k, v in given_keys.items() if v is not None or defaults.get(k) is None}  # null: default
        defaults.update({key: number_if_number(value) for key, value in given_keys.items()})
    for key, other in (("in_channels", "out_channels"), ("out_channels", "in_channels")):
        if config.unet[key] is None:
            config.unet[key] = config.unet[other]
    if config.resolution is not None:
        if config.unet["sample_size"] != config.resolution and "sample_size" in sections["unet"]:
            raise ConfigError(
                f"--resolution {config.resolution}: unet.sample_size is {config.unet['sample_size']}; give one of them"
            )
        config.unet["sample_size"] = config.resolution
    check_class_dropout(config)
    if config.trackio_space_id and config.report_to not in ("trackio", "all"):
        raise ConfigError(f"--trackio_space_id {config.trackio_space_id}: needs --report_to trackio")
    return config


def section_options(rest: list[str]) -> dict[str, Any]:
    """`--unet.KEY VALUE` and `--unet.KEY=VALUE` -> {"unet.KEY": value}. ConfigError: anything else."""
    found, rest = {}, list(rest)
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.removeprefix("--").partition("=")
        section, _, key = name.partition(".")
        if not argument.startswith("--") or section not in SECTIONS or not key or "." in key:
            raise no_such_option(TrainConfig, argument)
        if not has_value and not rest:
            raise ConfigError(f"--{name}: needs a value")
        try:
            found[name] = yaml.safe_load(value if has_value else rest.pop(0))
        except Exception:  # the parser raises more than YAMLError
            raise ConfigError(f"--{name} {value}: cannot be read as a YAML value") from None
    return found


def sections_as_text() -> str:
    """The default sections in the form of the command line."""
    pairs = {f"unet.{k}": v for k, v in UNET.items()} | {f"scheduler.{k}": v for k, v in SCHEDULER.items()}
    return ", ".join(f"{name} {'null' if value is None else value}" for name, value in pairs.items())


def number_if_number(value: Any) -> Any:
    """YAML reads 1e-4 as a string (it wants 1.0e-4); a user means the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_class_dropout(config: TrainConfig) -> None:
    """Raise a ConfigError where labels are to be dropped, but the U-Net has no embedding for a dropped one."""
    classes = config.unet.get("num_class_embeds")
    if config.class_dropout_prob and (not isinstance(classes, int) or classes < 2):
        raise ConfigError(
            f"--class_dropout_prob {config.class_dropout_prob}: needs unet.num_class_embeds, the number of classes and "
            "one more for the dropped label"
        )

"""Every option of a training run. The defaults are the recommended recipe; `configs/mnist.yaml` states the same, with
reasons, and `configs/paper.yaml` turns off what departs from the paper.

A YAML file (`--config`) replaces defaults, and the command line wins over both. The U-Net and the noise schedule are
sections of the file, by their diffusers config keys; the command line reaches them with a dot:
`--unet.layers_per_block 2`.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import ConfigError
from ..options import DataOptions, opt, peek, read_options, read_yaml
from ..record import flat

# The paper's objective (Algorithm 1), with AdamW; the learning rate is ours. configs/paper.yaml states the same.
PAPER = {
    "optimizer": "adamw",
    "learning_rate": 2e-3,
    "prediction_type": "epsilon",
    "uniform_timesteps": 1.0,
    "reference_images": 0,
    "guide_scale": 1.0,
}
# The default: PAPER with these changes. Each can be turned off on its own; what was measured: docs/results.md.
RECOMMENDED = PAPER | {
    "optimizer": "muon",  # orthogonal updates of the weight matrices,
    "learning_rate": 4e-3,  # at its own learning rate
    "prediction_type": "v_prediction",  # the network outputs v: errors of x_0 are not magnified where x_t is noise
    "uniform_timesteps": 0.25,  # three quarters of the timesteps lie at the noise levels where the digit forms
    "reference_images": 16384,  # the target is a mean over images that may have led to x_t: less noise
    "guide_scale": 1.6,  # at the end of the run the target moves away from the output of an earlier copy
}
UNET = {
    "sample_size": 28,
    "in_channels": None,  # 1 or 3, as the images have
    "out_channels": None,
    "block_out_channels": [16, 48, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,  # one head as wide as the level
    "norm_num_groups": 8,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": RECOMMENDED["prediction_type"],
    "variance_type": "fixed_small",
    "clip_sample": True,
}
SECTIONS = {"unet": UNET, "scheduler": SCHEDULER}


@dataclass(frozen=True)
class OutputOptions:
    """Output"""

    output_dir: str = opt("ddpm-mnist", "Folder for pipeline, checkpoints, samples and logs.", path=True)
    overwrite_output_dir: bool = opt(
        False, "Start anew: delete checkpoints, samples and logs of an earlier run.", saved=False
    )
    resume_from_checkpoint: str | None = opt(
        None, "A checkpoint folder, or 'latest' for the newest in output_dir.", path=True, saved=False
    )
    checkpointing_steps: int = opt(400, "Save a checkpoint every N updates, and at the end.", at_least=1)
    checkpoints_total_limit: int | None = opt(2, "Keep the N newest checkpoints; null in a file: all.", at_least=1)
    report_to: Literal["tensorboard", "wandb", "trackio", "all", "none"] = opt("tensorboard", "Experiment tracker.")
    logging_steps: int = opt(10, "Log every N updates: the mean loss since the last log.", at_least=1)


@dataclass(frozen=True)
class RunOptions:
    """Length, batches and hardware"""

    train_batch_size: int = opt(64, "Images per process and micro-batch.", at_least=1, at_most=1_000_000)
    gradient_accumulation_steps: int = opt(1, "Micro-batches per update.", at_least=1)
    max_train_steps: int = opt(840, "Length of the run in optimizer updates.", at_least=1)
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = opt(
        "auto", "auto: as set for `accelerate launch`, else bf16 if the hardware supports it, else no."
    )


@dataclass(frozen=True)
class RecipeOptions:
    """Recipe: a checkpoint can only be resumed with the same values"""

    optimizer: Literal["adamw", "muon"] = opt(
        RECOMMENDED["optimizer"], "muon: Muon for hidden weights, AdamW for the rest."
    )
    learning_rate: float = opt(RECOMMENDED["learning_rate"], "Peak learning rate; for adamw, 2e-3.", positive=True)
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = opt(
        "cosine", "Learning rate schedule after the warm-up; constant: no warm-up."
    )
    lr_warmup_steps: int = opt(100, "Warm-up, in optimizer updates.", at_least=0)
    adam_beta1: float = opt(0.9, "AdamW's beta1.", fraction=True)
    adam_beta2: float = opt(0.99, "AdamW's beta2.", fraction=True)
    adam_weight_decay: float = opt(0.01, "Weight decay, of Muon too.", at_least=0)
    adam_epsilon: float = opt(1e-8, "AdamW's epsilon.", positive=True)
    max_grad_norm: float = opt(1.0, "Clip the gradient to this norm.", positive=True)
    use_ema: bool = opt(True, "Average the weights; samples, and the exported pipeline, use the average.")
    ema_max_decay: float = opt(0.9999, "Upper limit of the decay, (1 + n) / (10 + n) after n updates.", fraction=True)
    class_dropout_prob: float = opt(
        0.0, "Share of labels dropped, for guidance; the last of unet.num_class_embeds then means none.", fraction=True
    )
    random_flip: bool = opt(False, "Mirror half of the images, anew in each epoch.")
    uniform_timesteps: float = opt(
        RECOMMENDED["uniform_timesteps"],
        "Share of uniform timesteps; the log SNR of the others ~ N(-1.75, 1.9^2).",
        at_least=0,
        at_most=1,
    )
    reference_images: int = opt(
        RECOMMENDED["reference_images"],
        "Where x_t is mostly noise, the target is a mean over N training images, weighted by how probable each is; at "
        "most 64 MB of them. 0: the noise that was drawn.",
        at_least=0,
    )
    guide_scale: float = opt(
        RECOMMENDED["guide_scale"],
        "In the last part of the run, move the target away from the output of an earlier copy of the network, "
        "for clearer images (autoguidance); 1: off.",
        at_least=1,
        at_most=1.9,
    )
    guide_start: float = opt(0.67, "Share of the run after which the target moves.", fraction=True)
    guide_weak: float = opt(0.3, "Share of the run after which the earlier copy is taken.", fraction=True)
    seed: int = opt(0, "Fixes initial weights, data order, timesteps and noise.", at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True)
class ValidationOptions:
    """Validation: the held-out loss and a grid of samples"""

    validation_steps: int = opt(400, "Loss and samples at update 100, every N, and at the end; 0: never.", at_least=0)
    num_validation_images: int = opt(36, "Images in the grid.", at_least=1, at_most=10_000)
    ddpm_num_inference_steps: int = opt(50, "Steps of the sampler for each grid.", at_least=1)


@dataclass(frozen=True)
class HubOptions:
    """Hub"""

    push_to_hub: bool = opt(False, "Push the finished model, as push_to_hub.py does.", saved=False)
    hub_model_id: str | None = opt(None, "The repo to push to: USER/NAME.", saved=False)
    hub_private_repo: bool = opt(False, "Make a new repo private; refuse to push to one that is public.")


@dataclass(frozen=True)
class TrainConfig(HubOptions, ValidationOptions, RecipeOptions, RunOptions, OutputOptions, DataOptions):
    """The options of `train_ddpm_mnist.py`; names as in diffusers' training examples.

    A dataclass lists the fields of its bases from right to left.
    """

    unet: dict = field(default_factory=lambda: dict(UNET))
    scheduler: dict = field(default_factory=lambda: dict(SCHEDULER))

    @property
    def null_class_label(self) -> int | None:
        """The label that stands for a dropped one; None if none are dropped."""
        return self.unet["num_class_embeds"] - 1 if self.class_dropout_prob else None

    def saved(self) -> dict[str, Any]:
        """The settings of the run, without those of one launch only, and with the absolute path of a local dataset."""
        saved = {option.name for option in fields(self) if option.metadata.get("saved", True)}
        settings = {k: v for k, v in asdict(self).items() if k in saved}
        if Path(self.dataset_name).exists():  # else it is the Hub's name
            settings["dataset_name"] = str(Path(self.dataset_name).absolute())
        return settings


def parse_args(arguments: list[str]) -> TrainConfig:
    """Read the command line, over the file that `--config` names, over the defaults.

    ConfigError: an unknown key or option, a value of the wrong type or out of range.
    """
    given, arguments = section_options(arguments)
    path = peek(arguments, "config")
    if path == "":
        raise ConfigError("--config: is empty (a variable that is not set?)")
    file = Path(path).expanduser() if path else None
    values = read_yaml("--config", file) if file else {}
    sections = {name: values.pop(name, None) or {} for name in SECTIONS}
    for name, keys in sections.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"--config {file}: {name} must hold `key: value` lines")
    for name, value in given.items():
        section, _, key = name.partition(".")
        sections[section][key] = value
    sections = {name: with_keys(defaults, sections[name]) for name, defaults in SECTIONS.items()}
    config = read_options(
        TrainConfig,
        arguments,
        "Train a denoising diffusion model (DDPM, Ho et al. 2020) on MNIST, or on any set of small images.",
        file,
        values,
        extra={"config": "YAML file of options, such as those in configs/; the command line wins over it."},
        epilog="--unet.KEY VALUE and --scheduler.KEY VALUE set any config key of diffusers' UNet2DModel and "
        "DDPMScheduler. Defaults: "
        + ", ".join(f"{name} {'null' if value is None else value}" for name, value in flat(sections).items())
        + ".",
    )
    return check_unet(replace(config, **sections))


def section_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`--unet.KEY VALUE` and `--unet.KEY=VALUE` as {"unet.KEY": value}, and the other arguments.

    ConfigError: there is no value, or it is not YAML.
    """
    values, others, rest = {}, [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(tuple(f"--{section}." for section in SECTIONS)):
            others.append(argument)
            continue
        name, has_value, value = argument.removeprefix("--").partition("=")
        if not has_value and (not rest or rest[0].startswith("--")):
            raise ConfigError(f"--{name}: needs a value")
        value = value if has_value else rest.pop(0)
        if not value:
            raise ConfigError(f"--{name}: is empty (a variable that is not set?); null is the default")
        try:
            values[name] = yaml.safe_load(value)
        except Exception:  # the parser raises more than YAMLError
            raise ConfigError(f"--{name} {value}: cannot be read as a YAML value") from None
    return values, others


def with_keys(section: dict, keys: dict) -> dict:
    """The default section of a config with these keys replaced. A key that is null keeps its default."""
    return section | {k: number_if_number(v) for k, v in keys.items() if v is not None or section.get(k) is None}


def check_unet(config: TrainConfig) -> TrainConfig:
    """The config with both numbers of channels in its section `unet`. ConfigError: no class for a dropped label."""
    unet = dict(config.unet)
    for key, other in (("in_channels", "out_channels"), ("out_channels", "in_channels")):
        unet[key] = unet[other] if unet[key] is None else unet[key]
    classes = unet.get("num_class_embeds")
    if config.class_dropout_prob and (not isinstance(classes, int) or classes < 2):
        raise ConfigError(
            f"--class_dropout_prob {config.class_dropout_prob}: needs unet.num_class_embeds, the number of classes and "
            "one more for the dropped label"
        )
    return replace(config, unet=unet)


def number_if_number(value: Any) -> Any:
    """YAML reads 1e-4 and 1e3 as strings (it wants 1.0e-4); a user means the number, also in a list."""
    if isinstance(value, str) and "," in value:  # a list without brackets, which some shells read themselves
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list):
        return [number_if_number(v) for v in value]
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(value, str) and number.is_integer() else number

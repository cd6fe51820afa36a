"""Every option of a training run: one dataclass, filled from a YAML file and then from the command line.

`parse_args` is the only reader. A YAML file holds the options by name, and the U-Net and the noise schedule under
`unet:` and `scheduler:` by their diffusers config keys. The command line wins over the file, and reaches into the two
sections with a dot: `--unet.layers_per_block 2`. Whatever cannot be right ends in a `ConfigError` of one line.
"""

import difflib
import inspect
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "mnist.yaml"
SECTIONS = ("unet", "scheduler")
SECTION_DEFAULTS = {"unet": {"sample_size": 28, "in_channels": 1, "out_channels": 1}, "scheduler": {}}


class ConfigError(ValueError):
    """A wrong input, in one line for the user: which option, which value, what to do. Scripts exit with 2 on it."""


def opt(default: Any, help: str) -> Any:
    """A dataclass field that HfArgumentParser shows with a help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """The options of `train_ddpm_mnist.py`; names as in diffusers' training examples."""

    # data
    dataset_name: str | None = opt(
        None, "Hub id or local folder. Default: ylecun/mnist, or scikit-learn's digits where the Hub is out of reach."
    )
    dataset_config_name: str | None = opt(None, "The dataset's configuration, where it has several.")
    image_column: str | None = opt(None, "Column of images. Default: the only one there is.")
    label_column: str | None = opt(None, "Column of class labels. Default: the only ClassLabel column, if any.")
    max_resident_gb: float = opt(2.0, "A larger training set is streamed by workers instead of held as one tensor.")
    dataloader_num_workers: int = opt(2, "Workers for a streamed set.")
    cache_dir: str | None = opt(None, "Where `datasets` keeps its cache.")

    # output
    output_dir: str = opt("ddpm-mnist", "Gets the pipeline, checkpoints, sample grids and logs.")
    overwrite_output_dir: bool = opt(False, "Start anew in an output_dir that is not empty.")
    resume_from_checkpoint: str | None = opt(None, "A checkpoint folder, or 'latest' for the newest in output_dir.")
    checkpointing_steps: int = opt(500, "Save a checkpoint every so many updates, and one at the end.")
    checkpoints_total_limit: int | None = opt(2, "Keep so many of the newest checkpoints; null keeps all.")
    report_to: Literal["tensorboard", "wandb", "trackio", "all", "none"] = opt("tensorboard", "Experiment tracker.")
    logging_steps: int = opt(10, "Log the loss, averaged over all processes and all updates since the last log.")

    # optimisation
    train_batch_size: int = opt(64, "Images per process and micro-batch.")
    gradient_accumulation_steps: int = opt(1, "Micro-batches per update.")
    num_train_epochs: int = opt(10, "Length of the run, unless max_train_steps says it.")
    max_train_steps: int | None = opt(None, "Length of the run in optimizer updates.")
    optimizer: Literal["adamw", "muon"] = opt("adamw", "muon: Muon for hidden weights, AdamW for the rest.")
    learning_rate: float = opt(1e-3, "Peak learning rate.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = opt("cosine", "Shape of the learning rate after the warm-up, over optimizer updates.")
    lr_warmup_steps: int = opt(100, "Warm-up, in optimizer updates.")
    adam_beta1: float = opt(0.9, "AdamW's beta1.")
    adam_beta2: float = opt(0.99, "AdamW's beta2.")
    adam_weight_decay: float = opt(0.01, "AdamW's weight decay.")
    adam_epsilon: float = opt(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = opt(1.0, "Clip the gradient to this norm.")
    use_ema: bool = opt(True, "Average the weights; samples, and the exported pipeline, use the average.")
    ema_max_decay: float = opt(
        0.9999,
        "Upper limit of the decay, which is (1 + n) / (10 + n) after n updates: about a run's last tenth.",
    )
    class_dropout_prob: float = opt(
        0.0, "Share of labels dropped, for classifier-free guidance; the last of unet.num_class_embeds then means none."
    )
    timestep_sampling: Literal["uniform", "stratified"] = opt(
        "uniform", "Draw the timesteps of a batch one by one, or spread evenly, which lowers the noise of the gradient."
    )
    snr_gamma: float | None = opt(None, "Min-SNR weighting of the loss with this gamma (5.0 is usual). Default: none.")
    gradient_checkpointing: bool = opt(False, "Recompute residual blocks in the backward pass to save memory.")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = opt(
        "auto", "auto: what `accelerate launch` was told, else bf16 where the hardware computes in it, else no."
    )
    seed: int = opt(0, "Fixes initial weights, data order, timesteps and noise.")

    # validation
    validation_steps: int = opt(500, "Held-out loss and a grid of samples every so many updates; 0: never.")
    num_validation_samples: int = opt(1024, "Held-out images for the loss.")
    num_validation_images: int = opt(36, "Images in the grid.")
    ddpm_num_inference_steps: int = opt(50, "DDIM steps for each grid.")
    eval_batch_size: int = opt(128, "Images per process in a batch of validation.")

    # hub
    push_to_hub: bool = opt(False, "Push the finished model, as push_to_hub.py does.")
    hub_model_id: str | None = opt(None, "The repo to push to: USER/NAME.")
    hub_private_repo: bool = opt(False, "Make a new repo private; refuse to push to one that is public.")
    token_file: str | None = opt(None, "File that holds the Hub's token. Default: `hf auth login`, or HF_TOKEN.")

    # model: sections of the YAML file, not single options
    unet: dict = field(default_factory=dict, init=False)
    scheduler: dict = field(default_factory=dict, init=False)

    @property
    def null_class_label(self) -> int | None:
        """The label that stands for a dropped one; None where none are dropped."""
        return self.unet["num_class_embeds"] - 1 if self.class_dropout_prob else None

    @property
    def num_classes(self) -> int | None:
        """How many labels there are to ask for; None for an unconditional U-Net."""
        classes = self.unet.get("num_class_embeds")
        return classes if classes is None else classes - (self.class_dropout_prob > 0)

    def global_batch(self, num_processes: int) -> int:
        """Images per update of the weights, over all processes and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes

    def num_steps(self, num_images: int, num_processes: int) -> int:
        """Updates in the run: `max_train_steps`, or as many as `num_train_epochs` passes over the images take."""
        return self.max_train_steps or math.ceil(self.num_train_epochs * num_images / self.global_batch(num_processes))

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a run goes on from a checkpoint: all that shapes its numbers.

        The length of the run, logging, validation and saving may change; so may the number of processes, as long as the
        global batch does not.
        """
        names = "unet scheduler seed use_ema ema_max_decay learning_rate lr_scheduler lr_warmup_steps max_grad_norm"
        names += " class_dropout_prob timestep_sampling snr_gamma optimizer"
        names += " adam_beta1 adam_beta2 adam_weight_decay adam_epsilon"
        return {name: getattr(self, name) for name in names.split()}

    def to_yaml(self) -> str:
        """All settings as a file that `--config` reads."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


class Parser(HfArgumentParser):
    """HfArgumentParser whose errors are ConfigErrors."""

    def parse_args_into_dataclasses(self, *args, **kwargs):
        try:
            return super().parse_args_into_dataclasses(*args, **kwargs)
        except ValueError as e:
            if isinstance(e, ConfigError):
                raise
            raise ConfigError(f"{e}; see --help") from None

    def error(self, message: str) -> None:
        option, _, problem = message.removeprefix("argument ").partition(": ")
        raise ConfigError(f"{option.split('/')[0]}: {problem}; see --help" if problem else f"{message}; see --help")


def read_options(cls: type, description: str) -> Any:
    """The options on the command line as an instance of the dataclass `cls`; `--debug` is `run_script`'s."""
    parser = Parser(cls, description=description, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser.parse_args_into_dataclasses(look_for_args_file=False)[0]


def run_script(main: Callable[[], int]) -> int:
    """The exit code of `main`; a ConfigError is one line on stderr and 2, or a traceback under `--debug`."""
    try:
        return main()
    except ConfigError as error:
        if "--debug" in sys.argv:
            raise
        if os.environ.get("RANK", "0") == "0":  # all processes of a run hit the same error; one says it
            print(f"error: {error}", file=sys.stderr)
        return 2


def nearest(key: str, known: list[str]) -> str:
    """A hint at the known key that `key` may have meant."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def section_keys(section: str) -> list[str]:
    """The config keys of `unet` or `scheduler`: the arguments of its class."""
    from . import scheduler, unet  # late: --help and most errors do not need torch

    owner = {"unet": unet.UNet2DModel, "scheduler": scheduler.DDPMScheduler}[section]
    return [name for name in inspect.signature(owner.__init__).parameters if name != "self"]


def number_if_number(value: Any) -> Any:
    """YAML reads 1e-4 as a string (it wants 1.0e-4); a user means the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file, or a ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file; configs/ has some to start from") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"--config {path}: cannot be read as YAML ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: must hold `option: value` lines")
    return values


def parse_args(args: list[str] | None = None) -> TrainConfig:
    """Read `--config FILE` (default configs/mnist.yaml), then the other arguments over it.

    Raises:
        ConfigError: an unknown key or option, a value of the wrong type or out of range.
    """
    args = sys.argv[1:] if args is None else list(args)
    parser = Parser(TrainConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML file of options.")
    parser.add_argument("--check", action="store_true", help="Report on the run to be, and do not train.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    known, _ = parser.parse_known_args(args)

    values = read_yaml(known.config)
    sections = {name: values.pop(name, None) or {} for name in SECTIONS}
    options = [f.name for f in fields(TrainConfig) if f.init]
    for key in values:
        if key not in options:
            raise ConfigError(f"--config {known.config}: unknown key {key}; {nearest(key, options + list(SECTIONS))}")

    def on_command_line(option: str) -> bool:
        return any(arg.partition("=")[0].replace("-", "_") == f"__{option}" for arg in args)

    if on_command_line("num_train_epochs") and not on_command_line("max_train_steps"):
        values.pop("max_train_steps", None)  # else the file's number of steps would silently win over it

    # The file becomes arguments before the given ones: one reader, one set of type checks, and the last one wins.
    # null stands for "as if not given".
    from_file = [f"--{key}={value}" for key, value in values.items() if value is not None]
    parser.set_defaults(**{key: None for key, value in values.items() if value is None})
    config, namespace, unread = parser.parse_args_into_dataclasses(
        from_file + args, look_for_args_file=False, return_remaining_strings=True
    )

    while unread:  # --unet.KEY VALUE, --scheduler.KEY VALUE
        name, has_value, value = unread.pop(0).partition("=")
        section, _, key = name.removeprefix("--").partition(".")
        if section not in SECTIONS or not key:
            raise ConfigError(f"{name}: no such option; {nearest(name, ['--' + o for o in options])}")
        if not has_value and not unread:
            raise ConfigError(f"{name}: needs a value")
        sections[section][key] = yaml.safe_load(value if has_value else unread.pop(0))

    for section, given in sections.items():
        if not isinstance(given, dict):
            raise ConfigError(f"--config {known.config}: {section} must hold `key: value` lines")
        for key in given:
            if key not in section_keys(section):
                raise ConfigError(f"{section}.{key}: unknown key; {nearest(key, section_keys(section))}")
        given = {key: number_if_number(value) for key, value in given.items()}
        setattr(config, section, {**SECTION_DEFAULTS[section], **given})
    check(config)
    return config


def check(config: TrainConfig) -> None:
    """Raise a ConfigError that names the first option that cannot be right."""
    at_least = {
        1: "train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps checkpointing_steps "
        "checkpoints_total_limit logging_steps num_validation_samples num_validation_images "
        "ddpm_num_inference_steps eval_batch_size",
        0: "validation_steps lr_warmup_steps adam_weight_decay seed dataloader_num_workers max_resident_gb",
    }
    for minimum, names in at_least.items():
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not value >= minimum:
                raise ConfigError(f"--{name} {value}: must be at least {minimum}")
    for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ConfigError(f"--{name} {getattr(config, name)}: must be a positive number")
    for name in ("adam_beta1", "adam_beta2", "ema_max_decay", "class_dropout_prob"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"--{name} {getattr(config, name)}: must lie in [0, 1)")
    if config.snr_gamma is not None and not 0 < config.snr_gamma < float("inf"):
        raise ConfigError(f"--snr_gamma {config.snr_gamma}: must be a positive number, or null for no weighting")
    check_model(config)


def check_model(config: TrainConfig) -> None:
    """Build both parts once, on no memory at all, to hear what they say of their options."""
    import torch

    from . import DDPMScheduler, UNet2DModel

    try:
        with torch.device("meta"):
            unet = UNet2DModel(**config.unet)
    except (ValueError, TypeError, RuntimeError) as e:
        raise ConfigError(f"unet.{e}") from None
    try:
        scheduler = DDPMScheduler(**config.scheduler)
    except (ValueError, TypeError, RuntimeError) as e:
        raise ConfigError(f"scheduler.{e}") from None

    T = scheduler.config.num_train_timesteps
    if len(scheduler.betas) != T:
        raise ConfigError(f"scheduler.trained_betas: has {len(scheduler.betas)} values for num_train_timesteps={T}")
    if not ((scheduler.betas > 0) & (scheduler.betas <= 1)).all():
        raise ConfigError("scheduler.beta_start, beta_end: every beta must lie in (0, 1]; Ho et al. use 1e-4 and 0.02")
    if scheduler.config.variance_type.startswith("learned"):
        raise ConfigError(
            "scheduler.variance_type: a learned variance has no loss here; use fixed_small or fixed_large"
        )
    if config.ddpm_num_inference_steps > T:
        raise ConfigError(f"--ddpm_num_inference_steps {config.ddpm_num_inference_steps}: there are only {T} timesteps")

    if config.class_dropout_prob and (config.unet.get("num_class_embeds") or 0) < 2:
        raise ConfigError(
            f"--class_dropout_prob {config.class_dropout_prob}: needs unet.num_class_embeds, the number of classes and "
            "one more for the dropped label"
        )
    if config.unet["in_channels"] not in (1, 3) or config.unet["out_channels"] != config.unet["in_channels"]:
        raise ConfigError(
            f"unet.in_channels {config.unet['in_channels']}, unet.out_channels {config.unet['out_channels']}: "
            "both 1 (grayscale) or both 3 (RGB)"
        )
    size, halvings = config.unet["sample_size"], len(unet.config.block_out_channels) - 1
    if not isinstance(size, int) or size < 1 or size % 2**halvings:
        raise ConfigError(
            f"unet.sample_size {size}: stock diffusers, which the pipeline is for, cannot halve it {halvings} times; "
            f"use a multiple of {2**halvings} (images are resized to it) or fewer levels"
        )


def resolve_mixed_precision(value: str) -> str:
    """ "no", "fp16" or "bf16" for Accelerator, out of `--mixed_precision`.

    "auto" is what `accelerate launch` was told, else bf16 where the hardware computes in it, else no.

    Raises:
        ConfigError: the hardware cannot do what was asked.
    """
    import torch

    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    if value == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched in ("fp16", "bf16"):
            value = launched
        elif cuda:
            value = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        else:
            supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # there is no public question; older: no
            value = "bf16" if supported() else "no"
    if value == "fp16" and not cuda and not torch.backends.mps.is_available():
        raise ConfigError("--mixed_precision fp16: needs a GPU; use bf16 or no")
    return value

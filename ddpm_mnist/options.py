"""How options are declared, checked and read; and the options that several commands share.

Each command has a dataclass of options, whose fields are made by `opt`: default, help and rules stand together. A YAML
file may change the defaults, and the command line wins over both. An invalid value is a `ConfigError`.
Nothing here imports torch, so that `--help` and a wrong option are answered at once.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .errors import ConfigError, cause_of, suggestion

Options = TypeVar("Options")


# ---- declaring -----------------------------------------------------------------------------------------------------


def opt(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    positive: bool = False,
    fraction: bool = False,
    path: bool = False,
    saved: bool = True,
) -> Any:
    """A field of an options dataclass.

    Args:
        default, help: what `--help` shows and a bare run uses.
        at_least, at_most: the smallest and largest value allowed.
        positive: finite and above 0; `fraction`: in [0, 1).
        path: a leading `~` is expanded.
        saved: False for options of one launch only, which `train_config.yaml` does not keep.
    """
    rules = {"at_least": at_least, "at_most": at_most, "positive": positive, "fraction": fraction, "path": path}
    return field(default=default, metadata={"help": help, "saved": saved, **rules})


def check_rules(options: Any) -> None:
    """Raise a ConfigError that names the first option whose value breaks the rules of its field."""
    types = get_type_hints(type(options))
    for option in options_of(type(options)):
        rules, value = option.metadata, getattr(options, option.name)
        choices = get_args(types[option.name]) if get_origin(types[option.name]) is Literal else (value,)
        if value == "" != option.default:
            raise ConfigError(f"--{option.name}: is empty (a variable that is not set?); give a value, or omit it")
        if value is None:
            continue
        for broken, problem in (
            (value not in choices, f"choose from {', '.join(map(str, choices))}"),
            (rules["at_least"] is not None and not value >= rules["at_least"], f"must be at least {rules['at_least']}"),
            (rules["at_most"] is not None and not value <= rules["at_most"], f"must be at most {rules['at_most']}"),
            (rules["positive"] and not 0 < value < float("inf"), "must be a positive number"),
            (rules["fraction"] and not 0 <= value < 1, "must lie in [0, 1)"),
        ):
            if broken:
                raise ConfigError(f"--{option.name} {value}: {problem}")


def options_of(cls: type) -> list[Field]:
    """The fields of an options dataclass that the command line can set."""
    return [option for option in fields(cls) if "help" in option.metadata]


def group_of(cls: type, option: Field) -> str:
    """The heading of an option in `--help`: the first line of the docstring of the class that declares it."""
    owners = (c for c in reversed(cls.__mro__) if is_dataclass(c) and option.name in {f.name for f in fields(c)})
    return next(owners).__doc__.splitlines()[0].rstrip(".")


# ---- reading -------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option once, by its name with underscores, and defaults except None, which the help text explains."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[-1 if action.dest == "help" else 0] + (
            f" {{{','.join(action.choices)}}}" if action.choices else ""
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.const is False:  # --no_NAME
            return "The opposite."
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """HfArgumentParser with a group for each dataclass that declares options, and with ConfigErrors."""

    def __init__(self, cls: type | None = None, **kwargs):
        self.options_class, self.groups = cls, {}
        kwargs |= {"usage": "%(prog)s [--option value ...]", "formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__([cls] if cls else [], **kwargs)

    def _parse_dataclass_field(self, parser, field: Field) -> None:
        if "help" not in field.metadata:
            return  # a section of the file
        title = group_of(self.options_class, field)
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        plain = copy(field)
        plain.metadata = {"help": field.metadata["help"].replace("%", "%%")}  # the rules are no argparse arguments
        super()._parse_dataclass_field(self.groups[title], plain)

    def error(self, message: str) -> None:
        option, _, problem = message.removeprefix("argument ").partition(": ")
        raise ConfigError(f"{option.split('/')[0]}: {problem}; see --help" if problem else f"{message}; see --help")


def peek(arguments: list[str], name: str) -> str | None:
    """The value of an option, or None, ahead of the rest: a file that it names sets the defaults of others."""
    parser = Parser(add_help=False)
    parser.add_argument(f"--{name}")
    return getattr(parser.parse_known_args(arguments)[0], name)


def read_options(
    cls: type[Options],
    arguments: list[str],
    description: str,
    file: Path | None = None,
    values: dict[str, Any] | None = None,
    extra: dict[str, str] | None = None,
    epilog: str | None = None,
) -> Options:
    """The command line as an instance of the dataclass `cls`.

    `values` replace the defaults; they were read from the YAML `file`. `extra` options (name -> help) are listed by
    `--help` and read by others. ConfigError: an unknown option or key of the file, a value of the wrong type, or one
    that breaks its rules.
    """
    parser = Parser(cls, description=description, epilog=epilog)
    for name, help in (extra or {}).items():
        parser.add_argument(f"--{name}", help=help)
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    sections_of_file = {f.name: f.default_factory() for f in fields(cls) if "help" not in f.metadata}
    parser.set_defaults(**sections_of_file, **defaults_from_file(cls, file, values or {}))
    options, _, rest = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise no_such_option(cls, rest[0])
    paths = {o.name: getattr(options, o.name) for o in options_of(cls) if o.metadata["path"]}
    options = replace(options, **{name: os.path.expanduser(path) for name, path in paths.items() if path is not None})
    check_rules(options)
    return options


ELSEWHERE = {  # names in other training scripts, such as diffusers' train_unconditional.py, and what they are here
    "--ddpm_beta_schedule": "--scheduler.beta_schedule",
    "--ddpm_num_steps": "--scheduler.num_train_timesteps",
    "--train_data_dir": "--dataset_name, which takes a folder too",
    "--logger": "--report_to",
    "--batch_size": "--train_batch_size",
    "--resume": "--resume_from_checkpoint latest",
    "--lr": "--learning_rate",
    "--bf16": "--mixed_precision bf16",
    "--fp16": "--mixed_precision fp16",
    "--save_images_epochs": "--validation_steps, in updates",
    "--save_model_epochs": "--checkpointing_steps, in updates",
    "--num_epochs": "--max_train_steps, in updates",
    "--num_train_epochs": "--max_train_steps, in updates",
    "--resolution": "--unet.sample_size",
    "--hub_token": "HF_TOKEN, or `hf auth login`",
    "--eval_batch_size": "--num_validation_images",
    "--epochs": "--max_train_steps, in updates",
    "--image_size": "--unet.sample_size",
    "--device": "ACCELERATE_USE_CPU=true for the CPU",
}


def no_such_option(cls: type, argument: str) -> ConfigError:
    """The error for an argument that no option takes."""
    name, known = argument.partition("=")[0], [f"--{o.name}" for o in options_of(cls)]
    sections = [f"--{s.name}.{key}" for s in fields(cls) if "help" not in s.metadata for key in s.default_factory()]
    use = ELSEWHERE.get(name) or next((key for key in sections if key.endswith(f".{name.removeprefix('--')}")), "")
    option = use.partition(" ")[0].rstrip(",")
    if option in known + sections or (option and not option.startswith("--")):
        return ConfigError(f"{name}: no such option; use {use}")
    return ConfigError(f"{name}: no such option; {suggestion(name, known)}")


def defaults_from_file(cls: type, file: Path | None, values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a YAML file as defaults for the parser, as text, which it reads like the command line's.

    `null` means the default, unless the type allows None.
    """
    types, known = get_type_hints(cls), {option.name for option in options_of(cls)}
    defaults = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"--config {file}: {no_such_option(cls, f'--{key}'[:40])}")
        if isinstance(value, (list, dict)):
            raise ConfigError(f"--config {file}: --{key} {value}: must be one value")
        if isinstance(value, bool) and get_origin(types[key]) is Literal:
            value = "yes" if value else "no"  # YAML reads an unquoted no as False
        if isinstance(value, (bool, float)) and str in (types[key], *get_args(types[key])):  # 1.10 would be 1.1
            raise ConfigError(f"--config {file}: --{key} {value}: must be text; put it in quotes")
        if value is not None:
            defaults[key] = str(value)
        elif NoneType in get_args(types[key]):
            defaults[key] = None
    return defaults


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep)


def read_yaml(option: str, path: Path) -> dict:
    """The mapping in a YAML file. ConfigError, which names `option`: it cannot be read, or holds something else."""
    try:
        values = yaml.load(path.read_bytes(), UniqueKeys)  # YAML knows byte order marks
    except FileNotFoundError:
        raise ConfigError(f"{option} {path}: no such file; configs/ has some to start from") from None
    except Exception as e:  # of the disk, the encoding and the parser, which raises more than YAMLError
        raise ConfigError(f"{option} {path}: cannot be read as YAML ({' '.join(str(e).split())[:200]})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{option} {path}: must hold `option: value` lines")
    return values


NO_MEMORY = "out of memory|can't allocate memory|not enough memory"  # in PyTorch's RuntimeErrors
BATCH_OPTIONS = "--train_batch_size (and raise --gradient_accumulation_steps), --batch_size or --num_images"


def run_script(main: Callable[[list[str]], int]) -> int:
    """The exit code of `main`, which gets the command line; the only reader of `sys.argv`.

    A ConfigError is one line on stderr and 2, or a traceback under `--debug`.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale that lacks a character must not end a run
    try:
        return main(arguments)
    except (ConfigError, OSError, MemoryError, RuntimeError) as error:
        no_memory = isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error))
        if "--debug" in sys.argv or not (isinstance(error, (ConfigError, OSError)) or no_memory):
            raise
        text = str(error) if isinstance(error, ConfigError) else f"{cause_of(error)}; --debug shows where"
        if no_memory:
            text = f"not enough memory ({cause_of(error)}); lower {BATCH_OPTIONS}"
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if first or not isinstance(error, ConfigError):  # the processes of a machine hit the same ConfigError
            print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


# ---- shared by several commands --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    dataset_name: str = opt(
        "ylecun/mnist", "USER/NAME or USER/NAME@REVISION on the Hub, or a local folder or file.", path=True
    )
    dataset_config_name: str | None = opt(None, "The dataset's configuration, if it has several.")
    image_column: str | None = opt(None, "Column of images. Default: the only Image column.")
    label_column: str | None = opt(None, "Column of class labels. Default: the only ClassLabel column, if any.")
    center_crop: bool = opt(False, "Crop images to the central square; needed unless all are square and of one size.")
    dataloader_num_workers: int = opt(0, "Worker processes for decoding images; 0: none.", at_least=0, at_most=256)
    cache_dir: str | None = opt(None, "Where `datasets` keeps its cache.", path=True)


@dataclass(frozen=True)
class SampleOptions:
    """Samples"""

    model: str = opt(
        "ddpm-mnist", "Folder of a pipeline or checkpoint; or USER/NAME or USER/NAME@REVISION on the Hub.", path=True
    )
    num_images: int = opt(16, "How many.", at_least=1, at_most=1_000_000)
    batch_size: int = opt(64, "Images at a time; it does not change them.", at_least=1, at_most=1_000_000)
    scheduler: Literal["ddpm", "ddim", "dpmsolver"] = opt(
        "ddpm", "ddpm: Algorithm 2; ddim: without noise; dpmsolver: SDE-DPM-Solver++, the fastest."
    )
    num_inference_steps: int | None = opt(None, "Steps. Default: 50; dpmsolver: 20. The paper: all 1000.", at_least=1)
    guidance_scale: float = opt(
        1.5, "For a conditional model: higher is clearer but less varied; 1: no guidance.", at_least=-1000, at_most=1000
    )
    guidance_min_log_snr: float = opt(
        -2.0, "Guide where log SNR(t) is at least this, for variety; -1000: everywhere.", at_least=-1000, at_most=1000
    )
    mixed_precision: Literal["no", "bf16"] = opt(
        "no", "bf16: over twice as fast where the hardware computes in it; the changes are imperceptible."
    )
    seed: int = opt(0, "Image i of a seed is always the same image.", at_least=0, at_most=2**63 - 1)

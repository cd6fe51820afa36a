"""Write docs/options.md, the options of every command, from their dataclasses: `python -m docs.write_options`"""

import json
from dataclasses import Field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import evaluate
import generate
import push_to_hub
from ddpm_mnist.options import default_of, group_of, options_of
from ddpm_mnist.training import config

PATH = Path(__file__).with_name("options.md")
INTRODUCTION = """\
# Options

*Written by `python -m docs.write_options` from the dataclasses that declare the options.*

The defaults are those of a bare run. Every command also takes `--help`, which prints this list, and `--debug`, which
shows the traceback of an error. An empty default means that the option is not set. A switch whose default is `false`
is turned on by its name (`--check`); one whose default is `true` is turned off with `no_` (`--no_use_ema`).
"""
SECTIONS = """\
### Sections

The U-Net and the noise schedule are sections of a configuration file. On the command line, put the section before the
key: `--unet.layers_per_block 2`, `--scheduler.beta_schedule squaredcos_cap_v2`. Any config key of diffusers'
`UNet2DModel` and `DDPMScheduler` can be set. A key that is not listed has diffusers' default.
"""


class Command(NamedTuple):
    """A script, its dataclass of options, and one or two sentences."""

    script: str
    options: type
    description: str


COMMANDS = (
    Command(
        "train_ddpm_mnist.py",
        config.TrainConfig,
        f"{config.DESCRIPTION}\n`--config FILE.yaml` replaces defaults, and the command line wins over both.",
    ),
    Command("generate.py", generate.GenerateConfig, generate.__doc__.splitlines()[0]),
    Command(
        "evaluate.py",
        evaluate.EvaluateConfig,
        f"{evaluate.__doc__.splitlines()[0]}\nThe data options default to those in the model's `train_config.yaml`.",
    ),
    Command("push_to_hub.py", push_to_hub.PushConfig, push_to_hub.__doc__.splitlines()[0]),
)


def cell(value: Any) -> str:
    """A value as code in a Markdown cell: text as it is, anything else as JSON, which YAML reads too."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`" if text else ""


def choices_of(cls: type, option: Field) -> tuple[str, ...]:
    """The values that a `Literal` option can take; empty for any other."""
    kind = get_type_hints(cls)[option.name]
    return get_args(kind) if get_origin(kind) is Literal else ()


def option_row(cls: type, option: Field) -> str:
    """`| option | default | what |`"""
    default, choices = default_of(option), choices_of(cls, option)
    what = option.metadata["help"].replace("|", "\\|")
    if choices:
        what += f" One of {', '.join(map(cell, choices))}."
    return f"| `--{option.name}` | {'' if default is None else cell(default)} | {what} |"


def command_markdown(command: Command) -> str:
    """The heading of a command, its description, and a table for each group of options."""
    groups: dict[str, list[str]] = {}
    for option in options_of(command.options):
        groups.setdefault(group_of(command.options, option), []).append(option_row(command.options, option))
    header = "| option | default | what |\n| --- | --- | --- |"
    tables = ["\n".join([f"### {title}\n\n{header}", *rows]) + "\n" for title, rows in groups.items()]
    return "\n".join([f"## {command.script}\n\n{command.description}\n", *tables])


def sections_markdown() -> str:
    """The default keys of the sections `unet` and `scheduler`."""
    rows = [
        f"| `--{name}.{key}` | {cell(value)} |"
        for name, section in (("unet", config.UNET), ("scheduler", config.SCHEDULER))
        for key, value in section.items()
    ]
    return "\n".join([SECTIONS, "| key | default |\n| --- | --- |", *rows]) + "\n"


def options_markdown() -> str:
    """The whole text of docs/options.md."""
    train, *others = map(command_markdown, COMMANDS)
    return "\n".join([INTRODUCTION, train, sections_markdown(), *others])


if __name__ == "__main__":
    PATH.write_text(options_markdown(), encoding="utf-8", newline="\n")
    print(f"Wrote {PATH}.")

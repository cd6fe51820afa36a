"""How options are declared, checked and read.

Each command has a dataclass of options, whose fields are made by `opt`: default, help and rules stand together. A YAML
file may change the defaults, and the command line wins over both. Whatever cannot be right ends in a `ConfigError`.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

Options = TypeVar("Options")
PERMISSIONS = "name another, or change its permissions"


class ConfigError(ValueError):
    """A wrong input, in one line for the user: which option, which value, what to do. Scripts exit with 2 on it."""


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
    fixed_on_resume: bool = False,
    saved: bool = True,
) -> Any:
    """A field of an options dataclass.

    Args:
        default, help: what `--help` shows and a bare run uses.
        at_least, at_most: the smallest and largest value allowed.
        positive: finite and above 0; `fraction`: in [0, 1).
        path: a leading `~` is expanded.
        fixed_on_resume: a checkpoint can only be resumed with the same value.
        saved: False for options of one launch only, which `train_config.yaml` leaves out.
    """
    rules = {"at_least": at_least, "at_most": at_most, "positive": positive, "fraction": fraction, "path": path}
    return field(default=default, metadata={"help": help, "fixed_on_resume": fixed_on_resume, "saved": saved, **rules})


def check_rules(options: Any) -> None:
    """Raise a ConfigError that names the first option whose value breaks the rules of its field."""
    for option in fields(options):
        rules, value = option.metadata, getattr(options, option.name)
        if value == "" != option.default:
            raise ConfigError(f"--{option.name}: is empty (a variable that is not set?); give a value, or leave it out")
        if value is None or not rules:
            continue
        problem = None
        if rules["at_least"] is not None and not value >= rules["at_least"]:
            problem = f"must be at least {rules['at_least']}"
        if rules["at_most"] is not None and not value <= rules["at_most"]:
            problem = f"must be at most {rules['at_most']}"
        if rules["positive"] and not 0 < value < float("inf"):
            problem = "must be a positive number"
        if rules["fraction"] and not 0 <= value < 1:
            problem = "must lie in [0, 1)"
        if problem:
            raise ConfigError(f"--{option.name} {value}: {problem}")


def options_of(cls: type) -> list[Field]:
    """The fields of an options dataclass that the command line can set."""
    return [option for option in fields(cls) if option.init]


def group_of(cls: type, option: Field) -> str:
    """The heading of an option in `--help`: the first line of the docstring of the class that declares it."""
    owners = (c for c in reversed(cls.__mro__) if is_dataclass(c) and option.name in {f.name for f in fields(c)})
    return next(owners).__doc__.splitlines()[0].rstrip(".")


# ---- reading -------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None, whose meaning the help text gives, and those of `--no_...` switches."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None or action.const is False else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """HfArgumentParser with a group for each dataclass that declares options, and with ConfigErrors."""

    def __init__(self, cls: type | None = None, **kwargs):
        self.options_class, self.groups = cls, {}
        kwargs |= {"usage": "%(prog)s [--option value ...]", "formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__([cls] if cls else [], **kwargs)

    def _parse_dataclass_field(self, parser, field: Field) -> None:
        title = group_of(self.options_class, field)
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        plain = copy(field)
        plain.metadata = {"help": field.metadata["help"].replace("%", "%%")}  # the rules are no argparse arguments
        super()._parse_dataclass_field(self.groups[title], plain)

    def parse_args_into_dataclasses(self, *args, **kwargs):
        try:
            return super().parse_args_into_dataclasses(*args, look_for_args_file=False, **kwargs)
        except ConfigError:
            raise
        except ValueError as e:
            raise ConfigError(f"{e}; see --help") from None

    def error(self, message: str) -> None:
        option, _, problem = message.removeprefix("argument ").partition(": ")
        raise ConfigError(f"{option.split('/')[0]}: {problem}; see --help" if problem else f"{message}; see --help")


def peek(arguments: list[str], *names: str) -> argparse.Namespace:
    """The values of a few options, or None, ahead of the rest: a file that one names sets the defaults of others."""
    parser = Parser(add_help=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return parser.parse_known_args(arguments)[0]


def read_options(
    cls: type[Options],
    arguments: list[str],
    description: str,
    file: Path | None = None,
    values: dict[str, Any] | None = None,
    extra: dict[str, str] | None = None,
    epilog: str | None = None,
) -> tuple[Options, list[str]]:
    """The command line as an instance of the dataclass `cls`, and what is left of it.

    Args:
        arguments: without the program's name.
        description: opens `--help`.
        file, values: options that replace the defaults, and the YAML file that they were read from.
        extra: options (name -> help) that `--help` lists and others read.
        epilog: closes `--help`.

    Raises:
        ConfigError: an unknown key of the file, a value of the wrong type, or one that breaks its rules.
    """
    parser = Parser(cls, description=description, epilog=epilog)
    for name, help in (extra or {}).items():
        parser.add_argument(f"--{name}", help=help)
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    parser.set_defaults(**defaults_from_file(cls, file, values or {}))
    options, _, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    for option in options_of(cls):
        if option.metadata["path"] and getattr(options, option.name) is not None:
            setattr(options, option.name, os.path.expanduser(getattr(options, option.name)))
    check_rules(options)
    return options, rest


def no_such_option(cls: type, argument: str) -> ConfigError:
    """The error for an argument that no option takes."""
    name = argument.partition("=")[0]
    return ConfigError(f"{name}: no such option; {nearest(name, [f'--{o.name}' for o in options_of(cls)])}")


def defaults_from_file(cls: type, file: Path | None, values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a YAML file as defaults for the parser. `null` means the default, unless the type allows None."""
    kinds, known = get_type_hints(cls), {option.name: option for option in options_of(cls)}
    defaults = {}
    for key, value in values.items():
        if key not in known:
            names = [option.name for option in fields(cls)]  # its sections too
            raise ConfigError(f"--config {file}: unknown key {str(key)[:40]!r}; {nearest(str(key), names)}")
        if value is None and NoneType not in get_args(kinds[key]):
            continue
        defaults[key] = typed(f"--config {file}: --{key}", value, kinds[key])
    return defaults


def typed(what: str, value: Any, kind: Any) -> Any:
    """A value from YAML in the type of its option. Strings are left to the parser, which reads "1e-4" as a number."""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if choices and isinstance(value, bool):
        value = "yes" if value else "no"  # YAML reads an unquoted no as False
    if choices and value not in choices:
        raise ConfigError(f"{what} {value!r}: choose from {', '.join(choices)}")
    if value is None or isinstance(value, str):
        return value
    accepted = get_args(kind) or (kind,)
    if bool in accepted and isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        if float in accepted:
            return float(value)
        if int in accepted and float(value).is_integer():
            return int(value)
        if str in accepted:
            return str(value)
    names = " or ".join("nothing" if k is NoneType else k.__name__ for k in accepted)
    raise ConfigError(f"{what} {value!r}: must be {names}")


def read_yaml(option: str, path: Path) -> dict:
    """The mapping in a YAML file. ConfigError, which names `option`: it cannot be read, or holds something else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{option} {path}: no such file; configs/ has some to start from") from None
    except Exception as e:  # of the disk, the encoding and the parser, which raises more than YAMLError
        raise ConfigError(f"{option} {path}: cannot be read as YAML ({' '.join(str(e).split())[:200]})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{option} {path}: must hold `option: value` lines")
    return values


def nearest(key: str, known: list[str]) -> str:
    """A hint at the known key that `key` may have meant."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {shorten(sorted(known))}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def cause_of(error: BaseException) -> str:
    """The text of the innermost error that says something: libraries wrap the cause in errors that hide it."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    return first_line(next((e for e in reversed(chain) if str(e).strip()), error))


def writable_problem(folder: Path) -> str | None:
    """Why files cannot be written into a folder, which may be yet to be made; None where they can."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
    if not existing.exists():
        return f"{existing} is a link to nothing; remove it, or name another"
    if not existing.is_dir():
        return f"{existing} is a file; name a folder"
    return None if may_write(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written; {PERMISSIONS}"


def file_problem(path: Path) -> str | None:
    """Why a file cannot be written, or replaced where there is one; None where it can."""
    if path.is_dir():
        return f"{path} is a folder, and a file goes there; name another, or move it"
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to nothing; remove it, or name another"
    if path.exists() and not may_write(path, os.W_OK):
        return f"{path} cannot be written; {PERMISSIONS}"
    return writable_problem(path.parent)


def may_write(path: Path, mode: int) -> bool:
    """Whether the system says so, to the user as whom the process runs."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def shorten(names: Iterable, limit: int = 8) -> str:
    """The first few of `names`, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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
    except (ConfigError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        text = str(error) if isinstance(error, ConfigError) else f"{cause_of(error)}; --debug shows where"
        rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
        if rank == "0":  # all processes of a machine hit the same error; one says it
            print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def default_of(option: Field) -> Any:
    """The default of a dataclass field."""
    return option.default if option.default is not MISSING else option.default_factory()

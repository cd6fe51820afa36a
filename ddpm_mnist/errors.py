"""Errors in one line for the user, and the checks whether a file may be written."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"  # what a clone without git-lfs has in place of a file
LFS_ADVICE = "is a git-lfs pointer and not the file; `git lfs pull`, or `hf download`"
PERMISSIONS = "name another, or change its permissions"


class ConfigError(ValueError):
    """A wrong input, in one line for the user: which option, which value, what to do. Scripts exit with 2 on it."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def cause_of(error: BaseException) -> str:
    """The text of the innermost error that says something: libraries wrap the cause in errors that hide it."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    return first_line(next((e for e in reversed(chain) if str(e).strip()), error))


def check_lfs(option: str, path: Path) -> None:
    """ConfigError: a file, or one in a folder, is only a pointer of git-lfs."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.stat().st_size < 1000 and file.read_bytes().startswith(LFS_POINTER):
            raise ConfigError(f"{option}: {file} {LFS_ADVICE}")


def shorten(names: Iterable, limit: int = 8) -> str:
    """The first few of `names`, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def suggestion(key: str, known: list[str]) -> str:
    """A hint at the known key that `key` may have meant."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else f"known: {shorten(sorted(known))}"


def writable_problem(folder: Path) -> str | None:
    """Why files cannot be written into a folder, which may not exist yet; None if they can."""
    existing = next((p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink()), None)
    if existing is None:  # on Windows
        return f"there is no drive {folder.anchor}; name another"
    if not existing.exists():
        return f"{existing} is a broken link; remove it, or name another"
    if not existing.is_dir():
        return f"{existing} is a file; name a folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written; {PERMISSIONS}"


def file_problem(path: Path) -> str | None:
    """Why a file cannot be written, or replaced if it exists; None if it can."""
    if path.is_dir():
        return f"{path} is a folder, but must be a file; name another, or move it"
    if path.is_symlink() and not path.exists():
        return f"{path} is a broken link; remove it, or name another"
    if path.exists() and not os.access(path, os.W_OK):
        return f"{path} cannot be written; {PERMISSIONS}"
    return writable_problem(path.parent)

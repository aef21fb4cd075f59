"""Files that are found whole or not at all, whenever their writing is interrupted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from mctd_diffusers.errors import ConfigError


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write to {folder}")
    except OSError as error:
        raise ConfigError(
            f"output folder {folder} cannot be used: {error}; name another"
        ) from error


def write_text(path: Path, text: str, *, has_rivals: bool = False) -> None:
    """Write a text in one go; a reader finds the old one or the new one, and never a part."""
    write_atomically(path, lambda file: file.write(text.encode()), has_rivals=has_rivals)


def write_atomically(
    path: Path, write: Callable[[BinaryIO], Any], *, has_rivals: bool = False
) -> None:
    """Write a file under a hidden name, and put it in its place when it is on the disk.

    Args:
        path: in a folder that exists.
        write: is given the open file.
        has_rivals: whether other processes may write the same file at the same time. If not, what
            a killed process left under the hidden name is replaced by the next.
    """
    draft = path.with_name(f".{path.name}" + (f".{os.getpid()}" if has_rivals else ""))
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise

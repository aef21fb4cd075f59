"""Objects of a user's own, by ``module:name``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from mctd_diffusers.errors import ConfigError


def imported(text: str, form: str) -> Any:
    """The object that ``module:name`` names, of a module that Python finds, here or elsewhere.

    Args:
        text: such as ``"my_rewards:symmetry"``.
        form: what it should be, for the error: ``"module:function"`` or ``"module:Class"``.

    Raises:
        ConfigError: there is no such module, or it does not hold the name.
    """
    module, _, name = text.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # as `python -m` has it
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{text!r} cannot be had ({error}): write {form} of a module that Python finds from "
            "this folder"
        ) from error
    finally:
        sys.path.remove(here)

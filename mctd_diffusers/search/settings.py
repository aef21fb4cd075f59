"""Checks of the numbers that a user sets: budgets, and the settings of strategies."""

from __future__ import annotations

import math
import numbers
from typing import Any

from mctd_diffusers.errors import ConfigError


def check_setting(
    name: str, given: Any, low: float, high: float = math.inf, *, whole: bool = False
) -> None:
    """Refuse what is no number from ``low`` to ``high``.

    Args:
        name: of the setting.
        given: what the user set.
        low: least that works.
        high: most that works; infinity for no bound, which may be given where ``whole`` is not set.
        whole: whether it must be an integer.

    Raises:
        ConfigError: names the setting, what was given and what works.
    """
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(given, bool) and isinstance(given, kind) and low <= float(given) <= high:
        return
    form = "a whole number" if whole else "a number"
    bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    raise ConfigError(f"{name} is {given!r}; give {form} {bounds}.")

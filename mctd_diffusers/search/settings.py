"""Checks of the numbers that a user sets: budgets, and the settings of strategies."""

from __future__ import annotations

import math
import numbers
from typing import Any

from mctd_diffusers.errors import ConfigError


def is_number(
    given: Any, low: float = -math.inf, high: float = math.inf, *, whole: bool = False
) -> bool:
    """Whether what a user gave is a number from ``low`` to ``high`` (``whole``: an integer).

    No bool is one, and NaN lies nowhere; numpy's numbers are as good as Python's.
    """
    kind: Any = numbers.Integral if whole else numbers.Real  # whose order has no types
    return not isinstance(given, bool) and isinstance(given, kind) and bool(low <= given <= high)


def check_setting(
    name: str, given: Any, low: float, high: float = math.inf, *, whole: bool = False
) -> None:
    """Refuse what is no number from ``low`` to ``high``.

    Args:
        name: of the setting.
        given: what the user set.
        low: least that works.
        high: most that works; infinity for no bound, which may then be given itself.
        whole: whether it must be an integer.

    Raises:
        ConfigError: names the setting, what was given and what works.
    """
    if is_number(given, low, high, whole=whole):
        return
    form = "a whole number" if whole else "a number"
    bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    raise ConfigError(f"{name} is {given!r}; give {form} {bounds}.")

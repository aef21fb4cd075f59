"""Shapes and types are checked where code runs: what the tests decorate every function with."""

from __future__ import annotations

from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

# An int will do for a float, as type checkers have it (PEP 484).
_CHECKED = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_types(decorated: Any) -> Any:
    """Let beartype check calls, except of methods whose `Self` it cannot read outside a class."""
    try:
        return _CHECKED(decorated)
    except BeartypeDecorHintPep673Exception:
        return decorated

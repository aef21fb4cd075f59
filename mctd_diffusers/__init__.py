"""Search over the denoising process of diffusers pipelines, guided by any reward.

The public names are loaded when they are first used, so that importing the package costs next to
nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mctd_diffusers.errors import (
        BudgetError,
        CapacityError,
        ConfigError,
        MCTDError,
        NonFiniteRewardError,
        RewardError,
        ScheduleError,
        SearchError,
        UnsupportedSchedulerError,
    )

__version__ = "0.1.0"

EMBEDDED_MODEL = str(Path(__file__).parent / "embedded")
"""Folder of the model that ships in the box, for ``MCTDPipeline.from_pretrained``."""

_MODULES = {
    "BudgetError": "errors",
    "CapacityError": "errors",
    "ConfigError": "errors",
    "MCTDError": "errors",
    "NonFiniteRewardError": "errors",
    "RewardError": "errors",
    "ScheduleError": "errors",
    "SearchError": "errors",
    "UnsupportedSchedulerError": "errors",
}
"""Public name -> the module that defines it."""

__all__ = [
    "EMBEDDED_MODEL",
    "BudgetError",
    "CapacityError",
    "ConfigError",
    "MCTDError",
    "NonFiniteRewardError",
    "RewardError",
    "ScheduleError",
    "SearchError",
    "UnsupportedSchedulerError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

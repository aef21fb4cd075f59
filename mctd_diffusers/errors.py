"""The errors that mctd_diffusers raises, as one tree.

::

    MCTDError(Exception)
      ConfigError(MCTDError, ValueError)           found before the first network call
        ScheduleError                              strides or timesteps that do not fit
        UnsupportedSchedulerError                  a scheduler with hidden state we cannot restore
        BudgetError                                a budget too small to finish one sample
      SearchError(MCTDError)                       found during a search; carries handles
        RewardError(SearchError)                   a reward that raised, or answered wrongly
          NonFiniteRewardError(ValueError)         a reward that is NaN or infinite
        CapacityError(SearchError, IndexError)     a handle or a row that does not exist

A message says what was wrong with both values, where (handles, step index, argument), and the cure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class MCTDError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(MCTDError, ValueError):
    """An argument cannot work; raised before the first network call."""


class ScheduleError(ConfigError):
    """A stride or a timestep does not fit the schedule."""


class UnsupportedSchedulerError(ConfigError):
    """A scheduler keeps hidden state that a branching search cannot restore."""


class BudgetError(ConfigError):
    """A budget is too small to finish a single sample."""


class SearchError(MCTDError):
    """Something failed while a search was running.

    Attributes:
        handles: the environment's ids of the samples concerned; empty where none is to blame.
        partial: what the search had found and spent when it failed (a pipeline output), or
            ``None`` where the failure came before there was any.
    """

    def __init__(self, message: str, *, handles: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.handles: tuple[int, ...] = tuple(int(handle) for handle in handles)
        self.partial: Any = None


class RewardError(SearchError):
    """A reward raised, or answered with the wrong length or type."""


class NonFiniteRewardError(RewardError, ValueError):
    """A reward is NaN or infinite; ``handles`` names the samples."""


class CapacityError(SearchError, IndexError):
    """A handle or a row of the tree does not exist (any more)."""

"""What a solver remembers of a sample, as a value that travels with it.

A scheduler keeps what it remembers in attributes of its own: lists of earlier outputs, counters, a
sample halfway. Here that is taken out after each step and put back before the next, so that one
clone can step many samples, each with its own past.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from mctd_diffusers.denoising.scheduler_traits import SchedulerTraits
from mctd_diffusers.search.environment import Action


@dataclass(frozen=True, eq=False)
class SolverState:
    """What the next step of one sample needs beside its latents.

    Attributes:
        step_index: position in the schedule, 0 is noisiest; ``num_steps`` is finished. A sample
            midway still stands where its edge began.
        visited: grid key: the earlier points of the schedule that the solver still looks at, oldest
            first, as indices into the schedule.
        history: the tensors that the solver remembers, each shaped like the sample; empty for
            solvers without memory and after a restart.
        memory: all else that it remembers, with the places of those tensors, in plain types.
        midway: the edge that the sample is on, where the network must be called a second time
            before it is crossed; ``None`` at the points of the schedule.
    """

    step_index: int
    visited: tuple[int, ...]
    history: tuple[Shaped[Tensor, "*sample"], ...]
    memory: Hashable = ()
    midway: Action | None = None


class SolverMemory:
    """Takes what a scheduler remembers out of it, and puts it back.

    Args:
        scheduler: the prepared scheduler.
        traits: of its class.

    Attributes:
        blank: what it remembers before the first step, see `SolverState.memory`.
    """

    def __init__(self, scheduler: Any, traits: SchedulerTraits) -> None:
        self._traits = traits
        self._reads = traits.reads(scheduler)
        blank = traits.blank(scheduler)
        self.blank: Hashable = _pack(blank, []) if blank else ()

    def points(self, visited: Iterable[int]) -> tuple[int, ...]:
        """Those of the visited points that the next step looks at."""
        points = tuple(visited)
        return points if self._reads is None else points[max(len(points) - self._reads, 0) :]

    def put(self, scheduler: Any, memory: Hashable, history: Sequence[Sequence[Tensor]]) -> None:
        """Let a clone remember what was taken out.

        Args:
            scheduler: the clone.
            memory: of all samples.
            history: of each sample, its tensors.
        """
        if not memory:
            return
        rows = [torch.stack(tensors) for tensors in zip(*history, strict=True)]
        for name, value in _unpack(memory, rows).items():
            setattr(scheduler, name, value)

    def take(self, scheduler: Any) -> tuple[Hashable, list[Tensor]]:
        """What a clone remembers of the samples that it stepped, which it then forgets."""
        tensors: list[Tensor] = []
        remembered = {name: getattr(scheduler, name) for name in self._traits.blank(scheduler)}
        if self._traits.drops_oldest:
            remembered["model_outputs"] = [None, *remembered["model_outputs"][1:]]
        memory = _pack(remembered, tensors) if remembered else ()
        self.clear(scheduler)
        return memory, tensors

    def clear(self, scheduler: Any) -> None:
        """Let a clone remember nothing."""
        for name, value in self._traits.blank(scheduler).items():
            setattr(scheduler, name, value)


def _pack(value: Any, tensors: list[Tensor]) -> Hashable:
    """What a solver remembers, hashable: tensors of samples go to ``tensors``."""
    match value:
        case dict():
            return ("dict", *((name, _pack(each, tensors)) for name, each in value.items()))
        case list():
            return ("list", *(_pack(each, tensors) for each in value))
        case Tensor() if value.ndim > 0:
            tensors.append(value)
            return ("row", len(tensors) - 1)
        case Tensor():
            return ("number", value.item(), str(value.dtype).removeprefix("torch."))
    return value


def _unpack(packed: Any, rows: Sequence[Tensor]) -> Any:
    """The inverse of :func:`_pack`, of a batch."""
    match packed:
        case ("dict", *items):
            return {name: _unpack(each, rows) for name, each in items}
        case ("list", *items):
            return [_unpack(each, rows) for each in items]
        case ("row", number):
            return rows[number]
        case ("number", number, dtype):
            return torch.tensor(number, dtype=getattr(torch, dtype))
    return packed

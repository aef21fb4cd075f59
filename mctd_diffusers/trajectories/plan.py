"""What a log is to hold: its settings, its shards, and what they take.

A *shard*, the unit of work, is a file of trajectories of one grid and scheduler, which run side by
side. What it holds follows from the settings and its number alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from mctd_diffusers.denoising.scheduler_names import SchedulerName, read_scheduler
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import Counts
from mctd_diffusers.search.settings import check_setting

DEFAULT_STRIDES: Final = (1, 2, 4, 8)
DEFAULT_GRIDS: Final = (8, 10, 12, 16, 20, 25, 32, 40, 50)
DEFAULT_SCHEDULERS: Final = ("DDIM", "DDIM:eta=1", "DDPM", "Euler")
FINE_STEPS: Final = 64
"""Least steps of the whole schedule in fine steps, against which jumps are measured."""


@dataclass(frozen=True)
class LogSettings:
    """What one split of a log holds.

    Attributes:
        prompts: the texts that trajectories are drawn for.
        num_trajectories: rows of the split.
        schedulers: names of schedulers, with settings, such as ``"DDIM:eta=0.5"``. The shards take
            turns among them, by chance.
        grids: numbers of steps; likewise.
        strides: of the jumps that are made, in steps of the grid.
        probes: states of a trajectory at which siblings are drawn (and, of a stochastic one, jumps
            made; a deterministic one is itself the fine path, and jumps are made at all states).
        siblings: draws of each stochastic edge, at least 2.
        guidance_scale: of the trajectories.
        seed: of the choices and of all noise.
        shard_size: trajectories in a file, which run side by side.
        rows_per_call: latents in every call; ``None`` for what fits the device.

    Raises:
        ConfigError: a setting cannot work; names it, what was given and what works.
    """

    prompts: tuple[str, ...]
    num_trajectories: int
    schedulers: tuple[str, ...] = DEFAULT_SCHEDULERS
    grids: tuple[int, ...] = DEFAULT_GRIDS
    strides: tuple[int, ...] = DEFAULT_STRIDES
    probes: int = 3
    siblings: int = 4
    guidance_scale: float = 4.0
    seed: int = 0
    shard_size: int = 16
    rows_per_call: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("there are no prompts to log trajectories of: give at least one")
        for name, least in (
            ("num_trajectories", 1),
            ("probes", 0),
            ("siblings", 2),
            ("seed", 0),
            ("shard_size", 1),
        ):
            check_setting(name, getattr(self, name), least, whole=True)
        if self.rows_per_call is not None:
            check_setting("rows_per_call", self.rows_per_call, 1, whole=True)
        check_setting("guidance_scale", self.guidance_scale, 0)
        self._check_choices()

    def _check_choices(self) -> None:
        choices = {
            "schedulers": tuple(read_scheduler(text).name for text in self.schedulers),
            "grids": self.grids,
            "strides": self.strides,
        }
        for name, given in choices.items():
            if not given:
                raise ConfigError(f"{name} are empty: give at least one")
            twice = [choice for choice in given if given.count(choice) > 1]
            if twice:
                raise ConfigError(f"{name} {given} name {twice[0]!r} twice: name it once")
        for grid in self.grids:
            check_setting("a grid", grid, 2, whole=True)
        for stride in self.strides:
            check_setting("a stride", stride, 1, whole=True)
        if max(self.strides) > max(self.grids):
            raise ConfigError(
                f"stride {max(self.strides)} is longer than every grid, of which the longest has "
                f"{max(self.grids)} steps: no jump of it fits; leave it out, or add a longer grid"
            )

    @property
    def num_shards(self) -> int:
        """Files that the split is written in."""
        return -(-self.num_trajectories // self.shard_size)


def class_and_settings(said: SchedulerName) -> str:
    """What rows say of their scheduler: its class, and what it is set to."""
    return ":".join([said.kind.__name__, *(f"{key}={said.settings[key]}" for key in said.settings)])


def refinement_of(num_steps: int) -> int:
    """Fine steps in one of a grid's, so that the whole schedule has :data:`FINE_STEPS` or more."""
    return -(-FINE_STEPS // num_steps)


@dataclass(frozen=True)
class Shard:
    """One file of a split: trajectories of one scheduler and grid.

    Attributes:
        number: of the file.
        rows: indices of its trajectories.
        scheduler: of all of them.
        num_steps: of their grid.
        refinement: fine steps in one of the grid.
        probes: step indices of the grid at which siblings are drawn.
        prompts: number of each trajectory's prompt.
        seeds: of each trajectory's first noise.
    """

    number: int
    rows: range
    scheduler: SchedulerName
    num_steps: int
    refinement: int
    probes: tuple[int, ...]
    prompts: tuple[int, ...]
    seeds: tuple[int, ...]


def shard_of(settings: LogSettings, number: int) -> Shard:
    """What shard ``number`` holds: a function of the settings alone."""
    chance = _chance(settings, "shard", number)
    scheduler = settings.schedulers[chance.integers(len(settings.schedulers))]
    num_steps = int(settings.grids[chance.integers(len(settings.grids))])
    last = num_steps - 1  # whose edge finishes, and has no siblings
    count = min(settings.probes, last)
    probes = sorted(chance.choice(last, size=count, replace=False).tolist())
    first = number * settings.shard_size
    rows = range(first, min(first + settings.shard_size, settings.num_trajectories))
    each = [_chance(settings, "trajectory", row) for row in rows]
    return Shard(
        number=number,
        rows=rows,
        scheduler=read_scheduler(scheduler),
        num_steps=num_steps,
        refinement=refinement_of(num_steps),
        probes=tuple(probes),
        prompts=tuple(int(rng.integers(len(settings.prompts))) for rng in each),
        seeds=tuple(int(rng.integers(2**31)) for rng in each),
    )


def _chance(settings: LogSettings, purpose: str, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(number_of(settings.seed, purpose, number)))


def number_of(*parts: Any) -> int:
    """A whole number below 2**64 that hangs on all of ``parts``."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


class Edges(NamedTuple):
    """What one trajectory is probed by.

    Attributes:
        jumps: step index and stride of each deterministic jump.
        siblings: step index and stride of each group of siblings.
    """

    jumps: list[tuple[int, int]]
    siblings: list[tuple[int, int]]


def edges_of(settings: LogSettings, shard: Shard, *, deterministic: bool) -> Edges:
    """The jumps that are made and the siblings that are drawn along each trajectory of a shard.

    A deterministic trajectory is jumped from at every state, a stochastic one at its probes. The
    last edge of the schedule has no noise, and so no siblings.
    """
    steps = shard.num_steps
    starts = range(steps) if deterministic else shard.probes
    return Edges(
        jumps=[(i, k) for i in starts for k in settings.strides if i + k <= steps],
        siblings=[(i, k) for i in shard.probes for k in settings.strides if i + k < steps],
    )


def work_of(settings: LogSettings, shard: Shard, *, deterministic: bool) -> Counts:
    """What a shard takes, rows and calls of the network left aside: a closed formula.

    A deterministic trajectory takes ``num_steps * refinement`` evaluations, and one for each jump
    that ends before the schedule does. A stochastic one takes ``num_steps``, one for each such
    jump, and at each probe the fine path of its longest jump. Siblings take one each. Every
    estimate that is logged is previewed, and whatever is finished is decoded in full.
    """
    steps, fine = shard.num_steps, shard.refinement
    jumps, groups = edges_of(settings, shard, deterministic=deterministic)
    unfinished = sum(i + k < steps for i, k in jumps)
    siblings = settings.siblings * len(groups)
    path = steps * fine if deterministic else steps
    if not deterministic:
        longest = {i: i + k for i, k in sorted(jumps)}
        path += sum((end - start) * fine - (end == steps) for start, end in longest.items())
    previews = steps + unfinished + siblings
    decodes = 1 + len(jumps) - unfinished
    each = Counts(
        nfe=path + unfinished + siblings,
        previews=previews,
        decodes=decodes,
        reward_calls=previews + decodes,
    )
    return each * len(shard.rows)


def nfe_of(settings: LogSettings, shard: Shard, *, deterministic: bool) -> int:
    """Evaluations that a shard takes, see :func:`work_of`."""
    return work_of(settings, shard, deterministic=deterministic).nfe

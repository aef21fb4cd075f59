"""How far siblings come apart at each step, and how early their value tells what becomes of them.

A measurement beside the search, scheduler by scheduler: a few plain samples of each prompt are
valued at every step and finished, and at every step of the first of them siblings are drawn, one
edge on, with the share of fresh noise that searches branch by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from mctd_diffusers.calls import World
from mctd_diffusers.denoising.scheduler_names import NamedScheduler
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.pipeline_suite import check_reward, image_seed
from mctd_diffusers.evaluation.benchmark.plan import folder_name
from mctd_diffusers.evaluation.metrics import Interval, bootstrap_mean, correlation
from mctd_diffusers.evaluation.scheduler_effects.comparison import BRANCH_ETA, stepper_of
from mctd_diffusers.evaluation.scheduler_effects.suite import hash_of, open_world
from mctd_diffusers.files import write_text
from mctd_diffusers.models.weights import weights_hash
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.environment import FIRST_DRAW, Action, Handles, Seeds, Values
from mctd_diffusers.search.seeding import root_seed_of

ROWS_AT_ONCE: Final = 128
"""Siblings that are evaluated side by side, all prompts together."""


@dataclass(frozen=True)
class BranchingPlan:
    """What is measured of each scheduler.

    Attributes:
        prompts: at least one; the units of every interval.
        samples: plain samples of each prompt, at least 3, of seeds 0, 1, ...
        siblings: of each state, at least 2.
        num_steps: of the schedule, at least 2.
        guidance_scale: of classifier-free guidance.
        rows_per_call: latents in every call; ``None`` for what fits the device.
        searched: name of the reward.

    Raises:
        ConfigError: too little of something.
    """

    prompts: tuple[str, ...]
    samples: int = 8
    siblings: int = 8
    num_steps: int = 16
    guidance_scale: float = 4.0
    rows_per_call: int | None = None
    searched: str = ""

    def __post_init__(self) -> None:
        for name, least in (("samples", 3), ("siblings", 2), ("num_steps", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least {least}")
        if not self.prompts:
            raise ConfigError("there are no prompts to draw siblings of: give at least one")

    def nfe(self, calls_per_step: int) -> int:
        """Evaluations of a scheduler, at most."""
        each = self.samples * self.num_steps + self.siblings * (self.num_steps - 1)
        return len(self.prompts) * each * calls_per_step


class Branching(NamedTuple):
    """What was measured of one scheduler on one prompt.

    Attributes:
        scheduler: name.
        prompt: text.
        value_spread: ``[num_steps - 1]`` standard deviation over siblings of their values, reward
            units, by the step index of their parent.
        estimate_spread: ``[num_steps - 1]`` root mean square distance of the siblings' denoised
            estimates from their mean, latent units.
        values: ``[samples][num_steps]`` values of plain samples, reward units, by step index.
        rewards: ``[samples]`` rewards of the same samples, finished.
        nfe: evaluations that it took.
    """

    scheduler: str
    prompt: str
    value_spread: list[float]
    estimate_spread: list[float]
    values: list[list[float]]
    rewards: list[float]
    nfe: float


def measure_branching(
    pipe: MCTDPipeline,
    schedulers: Sequence[NamedScheduler],
    plan: BranchingPlan,
    folder: Path,
    on_nfe: Callable[[int], None] = lambda nfe: None,
) -> list[Branching]:
    """Measure every scheduler; what ``folder`` holds is read, if it is of this plan and model.

    Args:
        pipe: has a reward.
        schedulers: each of another name.
        plan: what is measured.
        folder: for a file of every scheduler; made if it does not exist.
        on_nfe: told the NFE of each scheduler, also of those that are read.
    """
    check_reward(pipe)
    folder.mkdir(parents=True, exist_ok=True)
    unet: Any = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    weights = weights_hash(unet)
    found: list[Branching] = []
    for named in schedulers:
        path, asked = branching_path(folder, named), _asked(plan, named)
        read = _read(path)
        if read.get("asked") == asked and read.get("weights") == weights:
            rows = [Branching(*row) for row in read["rows"]]
        else:
            rows = list(_measured(pipe, named, plan))
            entries = {"asked": asked, "weights": weights, "rows": rows}
            write_text(path, json.dumps(entries))
        on_nfe(plan.nfe(stepper_of(named, plan.num_steps).calls_per_step))
        found += rows
    return found


def read_branching(
    schedulers: Sequence[NamedScheduler], plan: BranchingPlan, folder: Path
) -> list[Branching]:
    """Read what is there of a plan, whatever weights made it."""
    read = [(named, _read(branching_path(folder, named))) for named in schedulers]
    return [
        Branching(*row)
        for named, entries in read
        if entries.get("asked") == _asked(plan, named)
        for row in entries["rows"]
    ]


def _asked(plan: BranchingPlan, named: NamedScheduler) -> Any:
    """What a file must be of."""
    return json.loads(json.dumps([asdict(plan), named.name, hash_of(named)]))


def _read(path: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return entries


def branching_path(folder: Path, named: NamedScheduler) -> Path:
    """Where what was measured of a scheduler lies."""
    return folder / f"{folder_name(named.name)}.json"


@torch.no_grad()
def _measured(
    pipe: MCTDPipeline, named: NamedScheduler, plan: BranchingPlan
) -> Iterator[Branching]:
    """Measure one scheduler, a few prompts at once."""
    at_once = max(1, ROWS_AT_ONCE // max(plan.samples, plan.siblings))
    for start in range(0, len(plan.prompts), at_once):
        prompts = plan.prompts[start : start + at_once]
        world = open_world(
            pipe,
            named,
            [prompt for prompt in prompts for _ in range(plan.samples)],
            [image_seed(prompt, seed) for prompt in prompts for seed in range(plan.samples)],
            num_steps=plan.num_steps,
            guidance_scale=plan.guidance_scale,
            rows_per_call=plan.rows_per_call,
            reward=pipe.reward_model,
        )
        yield from _measured_in(world, named.name, prompts, plan)
    pipe.maybe_free_model_hooks()


def _measured_in(
    world: World, name: str, prompts: Sequence[str], plan: BranchingPlan
) -> Iterator[Branching]:
    """Measure the prompts of one world, whose images are ``samples`` of each prompt in turn."""
    environment, count = world.environment, len(prompts)
    images = np.arange(count * plan.samples)
    states = environment.reset(images, np.full(len(images), FIRST_DRAW))
    values, value_spreads, estimate_spreads = [], [], []
    for step_index in range(plan.num_steps):
        environment.denoise(states)
        values.append(environment.value(states).reshape(count, plan.samples))
        if step_index < plan.num_steps - 1:
            parents = states[:: plan.samples]
            action = Action(1, BRANCH_ETA)
            seeds = _seeds("sibling", prompts, step_index, plan.siblings)
            spread, apart = _siblings(world, parents, action, seeds)
            value_spreads.append(spread)
            estimate_spreads.append(apart)
        seeds = _seeds("plain", prompts, step_index, plan.samples)
        states = environment.step(states, [Action(1)] * len(states), seeds)
    rewards = environment.reward(states).reshape(count, plan.samples)
    for i, prompt in enumerate(prompts):
        yield Branching(
            name,
            prompt,
            [float(spread[i]) for spread in value_spreads],
            [float(apart[i]) for apart in estimate_spreads],
            np.stack(values)[:, i].T.tolist(),
            rewards[i].tolist(),
            environment.ledger.total.nfe / count,
        )


def _siblings(
    world: World, parents: Handles, action: Action, seeds: Seeds
) -> tuple[Values, Values]:
    """Spread of the values and of the estimates of siblings, one for each parent."""
    environment, number = world.environment, len(seeds) // len(parents)
    drawn = environment.step(np.repeat(parents, number), [action] * len(seeds), seeds)
    environment.denoise(drawn)
    values = environment.value(drawn).reshape(-1, number)
    estimates = environment.denoised(drawn).double().reshape(len(parents), number, -1)
    apart = estimates.var(dim=1, correction=1).mean(dim=1).sqrt().cpu().numpy()
    environment.release(drawn)
    return values.std(axis=1, ddof=1), apart


def _seeds(purpose: str, prompts: Sequence[str], step_index: int, number: int) -> Seeds:
    """Seeds of edges, ``number`` for each prompt, which know no scheduler."""
    return np.array(
        [
            root_seed_of(f"branching|{purpose}|{prompt}|{step_index}|{i}".encode())
            for prompt in prompts
            for i in range(number)
        ],
        dtype=np.int64,
    )


# What it says


class Telling(NamedTuple):
    """What siblings and values of one scheduler say, by step index.

    Attributes:
        value_spread: ``[num_steps - 1]`` mean over prompts.
        estimate_spread: ``[num_steps - 1]`` mean over prompts.
        correlation: ``[num_steps]`` of the value with the final reward, over the samples of a
            prompt, mean over prompts; ``None`` where no prompt has one.
    """

    value_spread: list[Interval]
    estimate_spread: list[Interval]
    correlation: list[Interval | None]


def telling_of(found: Sequence[Branching], scheduler: str) -> Telling:
    """Means over prompts with their bootstrap intervals."""
    rows = [row for row in found if row.scheduler == scheduler]
    values = np.array([row.value_spread for row in rows])
    estimates = np.array([row.estimate_spread for row in rows])
    return Telling(
        [bootstrap_mean(column) for column in values.T],
        [bootstrap_mean(column) for column in estimates.T],
        [_correlation_at(rows, step_index) for step_index in range(len(rows[0].values[0]))],
    )


def _correlation_at(rows: Sequence[Branching], step_index: int) -> Interval | None:
    """Mean over prompts of the correlation over samples; prompts without one are left out."""
    each = [
        correlation(
            np.array(row.values, dtype=np.float64)[:, step_index],
            np.array(row.rewards, dtype=np.float64),
        )
        for row in rows
    ]
    known: Float[np.ndarray, " prompts"] = np.array([one for one in each if one is not None])
    return bootstrap_mean(known) if len(known) else None

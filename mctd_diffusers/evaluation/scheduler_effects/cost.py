"""What a comparison of schedulers is going to take, before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from mctd_diffusers.evaluation.benchmark.cells import cell_path
from mctd_diffusers.evaluation.benchmark.pipeline_suite import check_reward, image_seed
from mctd_diffusers.evaluation.benchmark.plan import Task
from mctd_diffusers.evaluation.scheduler_effects.branching import BranchingPlan, read_branching
from mctd_diffusers.evaluation.scheduler_effects.comparison import (
    Comparison,
    cells_folder,
    stepper_of,
)
from mctd_diffusers.evaluation.scheduler_effects.suite import open_world
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.strategies import BestOfN


class Work(NamedTuple):
    """Something to be made.

    Attributes:
        nfe: evaluations, at most.
        seconds: about.
    """

    nfe: int
    seconds: float


class Estimate(NamedTuple):
    """What is still to be made.

    Attributes:
        schedulers: of each scheduler, by name: plain samples and searches.
        branching: of what is measured aside, all schedulers together.
        cells: how many are to be made.
        found: how many are there.
    """

    schedulers: Mapping[str, Work]
    branching: Work
    cells: int
    found: int

    @property
    def total(self) -> Work:
        """All of it."""
        works = [*self.schedulers.values(), self.branching]
        return Work(sum(work.nfe for work in works), sum(work.seconds for work in works))


@torch.no_grad()
def estimate(
    pipe: MCTDPipeline, comparison: Comparison, branching: BranchingPlan | None, output: Path
) -> Estimate:
    """Say what is to be made, from a few measured calls.

    Cells that are there count as made, whatever weights and code made them.

    Args:
        pipe: has a reward.
        comparison: what is compared.
        branching: what is measured aside; ``None`` for nothing.
        output: folder of the comparison.
    """
    check_reward(pipe)
    bench = comparison.bench
    prompt = bench.prompts[0]
    world = open_world(
        pipe,
        comparison.named(comparison.reference),
        [prompt],
        [image_seed(prompt, bench.seeds[0])],
        num_steps=bench.num_steps,
        guidance_scale=bench.guidance_scale,
        rows_per_call=bench.rows_per_call,
        reward=pipe.reward_model,
    )
    row, prices = world.seconds_per_row(), world.measure_prices()
    rows = world.prepared.network.rows_per_latent
    finish, value = prices.decode + prices.reward_call, prices.preview + prices.reward_call

    def seconds(nfe: int, num_steps: int, is_valued: bool) -> float:
        return nfe * row * (rows + finish / num_steps + value * is_valued)

    works, to_make, there = {}, 0, 0
    for named in comparison.schedulers:
        tasks = comparison.plan_of(named).tasks()
        folder = cells_folder(output, named.name)
        missing = [task for task in tasks if not cell_path(folder, task).exists()]
        to_make, there = to_make + len(missing), there + len(tasks) - len(missing)
        works[named.name] = Work(
            sum(map(_nfe_of, missing)),
            sum(
                seconds(_nfe_of(t), t.num_steps, not isinstance(t.method.strategy, BestOfN))
                for t in missing
            ),
        )
    aside = 0
    if branching is not None:
        for named in comparison.schedulers:
            if not read_branching([named], branching, output / "branching"):
                aside += branching.nfe(stepper_of(named, branching.num_steps).calls_per_step)
    return Estimate(works, Work(aside, seconds(aside, bench.num_steps, True)), to_make, there)


def _nfe_of(task: Task) -> int:
    assert task.nfe is not None  # a comparison has no budgets of seconds
    return task.nfe * len(task.prompts)

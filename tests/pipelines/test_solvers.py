"""Searches on solvers of two network calls a step, and on those that step by one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler, SASolverScheduler

from mctd_diffusers.errors import BudgetError, UnsupportedSchedulerError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.environment import Prices
from mctd_diffusers.search.runner import Strategy
from mctd_diffusers.search.strategies import (
    MCTD,
    STRATEGIES,
    Beam,
    BestOfN,
    Evolution,
    NoiseSearch,
)
from tests.pipelines import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

STEPS = 6
PROMPTS = ["a red cat", "two dogs"]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def searching(scheduler: str) -> MCTDPipeline:
    return MCTDPipeline.from_pipe(tiny.make_stock(scheduler), reward_model=tiny.redness)


@contextmanager
def counted_rows(pipe: MCTDPipeline) -> Iterator[Callable[[], int]]:
    """Counts the rows that the network sees."""
    sizes: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, inputs: sizes.append(len(inputs[0])))
    try:
        yield lambda: sum(sizes)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["heun", "kdpm2"])
def test_best_of_one_is_the_stock_picture_of_a_solver_of_two_calls(name: str) -> None:
    stock = tiny.make_stock(name)
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    call = {"num_inference_steps": STEPS, "output_type": "pt", "guidance_scale": 5.0}
    theirs = stock(PROMPTS, generator=seeded(0, 1), **call)
    plain = pipe(PROMPTS, generator=seeded(0, 1), search=None, **call)
    with counted_rows(pipe) as rows:
        ours = pipe(PROMPTS, generator=seeded(0, 1), search=BestOfN(n=1), rows_per_call=2, **call)
        assert ours.ledger.total.rows == rows() == 2 * sum(ours.nfe)
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(plain.images, theirs.images)
    assert ours.nfe == plain.nfe == [2 * STEPS - 1] * 2


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        *(("heun", name) for name in sorted(STRATEGIES)),
        *(
            pytest.param(
                "kdpm2_ancestral",
                name,
                # A draw, a tree, and noise that is perturbed: the others step as those do.
                marks=[] if name in {"best_of_n", "mctd", "evolution"} else pytest.mark.slow,
            )
            for name in sorted(STRATEGIES)
        ),
    ],
)
def test_no_search_exceeds_its_budget_by_second_calls(name: str, solver: str) -> None:
    pipe = searching(solver)
    with counted_rows(pipe) as rows:
        out = pipe(
            PROMPTS,
            num_inference_steps=STEPS,
            generator=seeded(0, 1),
            search=name,
            compute=3,
            rows_per_call=4,
        )
        total = out.ledger.total
        assert total.rows + total.padded_rows == rows()
    assert total.nfe == sum(out.nfe)
    for spent, found in zip(out.nfe, out.search, strict=True):
        assert 2 * STEPS < spent <= 3 * 2 * STEPS
        num_evaluated = found.tree.evaluated.sum()
        assert num_evaluated <= spent <= 2 * num_evaluated


def test_compute_is_reckoned_in_plain_samples_of_two_calls_a_step() -> None:
    pipe = searching("heun")
    call: dict[str, Any] = {"num_inference_steps": STEPS, "generator": seeded(0)[0]}
    estimate = pipe.estimate("a cat", search="beam", compute=3, **call)
    assert estimate.nfe == 3 * 2 * STEPS
    assert pipe.estimate("a cat", search="beam", time_budget_s=1e-9, **call).nfe == 2 * STEPS
    one = pipe("a cat", search="best_of_n", compute=1, **call)
    assert len(one.search[0].finished) == 1
    with pytest.raises(BudgetError, match=r"of 11 NFE .* needs at least 12 NFE"):
        pipe("a cat", search="best_of_n", nfe_budget=11, **call)
    with pytest.raises(BudgetError, match=r"which need 12 \+ 12 NFE"):
        pipe("a cat", search="beam", compute=1.5, include_plain=True, **call)
    out = pipe("a cat", search="beam", compute=3, include_plain=True, **call)
    assert out.plain.rewards[0] is not None
    assert out.nfe[0] <= 3 * 2 * STEPS


def test_a_budget_by_cost_pays_for_second_calls() -> None:
    pipe = searching("heun")
    out = pipe(
        "a cat",
        num_inference_steps=STEPS,
        generator=seeded(0)[0],
        search="beam",
        cost_budget=80.0,
    )
    assert out.ledger.prices != Prices()
    assert out.ledger.prices.cost(out.search[0].spent) <= 80.0 + 1e-9


# Strides of one alone


@pytest.mark.parametrize(
    ("search", "longest"), [("mctd", 2), ("evolution", 2), (Beam(stride=3), 3)]
)
def test_a_search_that_strides_farther_than_its_solver_is_refused_before_any_call(
    search: str | Strategy, longest: int
) -> None:
    pipe = searching("ddim")
    solver = DPMSolverSinglestepScheduler.from_config(pipe.scheduler.config, solver_order=3)
    with (
        counted_rows(pipe) as rows,
        pytest.raises(
            UnsupportedSchedulerError,
            match=rf"DPMSolverSinglestepScheduler, .* of 1 at most, .* up to {longest}: pass "
            r"strides=\(1,\), or a strategy with stride=1, or search with another",
        ),
    ):
        pipe("a cat", num_inference_steps=8, search=search, search_scheduler=solver)
    assert rows() == 0


@pytest.mark.parametrize("search", [Evolution(), NoiseSearch()], ids=lambda s: s.name)
def test_a_search_that_perturbs_noise_which_is_not_simply_added_is_refused_before_any_call(
    search: Strategy,
) -> None:
    pipe = searching("ddim")
    call: dict[str, Any] = {"num_inference_steps": 8, "compute": 4}
    call["search_scheduler"] = SASolverScheduler.from_config(pipe.scheduler.config)
    complaint = rf"{search.name}.*SASolverScheduler .* a share of 1: .* below 1"
    with counted_rows(pipe) as rows, pytest.raises(UnsupportedSchedulerError, match=complaint):
        pipe("a cat", search=search, **call)
    assert rows() == 0
    half: Any = search  # a dataclass
    assert pipe("a cat", search=replace(half, branch_eta=0.5), **call).search[0].finished
    start_alone = (
        Evolution(schedule=(0.0,), populations=(4, 2))
        if search.name == "evolution"
        else NoiseSearch("zero_order")
    )
    assert pipe("a cat", search=start_alone, **call).search[0].finished


@pytest.mark.parametrize("search", [MCTD(strides=(1,)), Beam(), BestOfN()])
def test_searches_of_single_steps_run_on_it(search: Strategy) -> None:
    pipe = searching("ddim")
    solver = DPMSolverSinglestepScheduler.from_config(pipe.scheduler.config, solver_order=3)
    out = pipe("a cat", num_inference_steps=8, search=search, search_scheduler=solver, compute=3)
    assert out.search[0].tree.stride.max() == 1
    assert out.search[0].finished

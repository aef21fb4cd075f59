"""Every search on solvers of two network calls a step, and saved samples of every solver."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import BudgetError
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import FIRST_DRAW, Action, Handles
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import Strategy, run_search
from tests.schedulers import SCHEDULERS, make_scheduler, network, noise
from tests.strategies import searches
from tests.toys import stride_costs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


class Pixelwise:
    """A guided network whose bits know nothing of the batch; counts what it is asked."""

    rows_per_latent = 2
    guidance_scale = 2.0

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, latents: Tensor, timesteps: Tensor, problems: Sequence[int]) -> Outputs:
        self.rows += problems
        without = network(latents, timesteps)
        return Outputs(without + 0.1, without)

    def combine(self, outputs: Outputs, guidance: float | None = None) -> Tensor:
        assert outputs.unconditional is not None
        scale = self.guidance_scale if guidance is None else guidance
        return outputs.unconditional + scale * (outputs.conditional - outputs.unconditional)


def brightness(
    images: Tensor, prompts: Sequence[str], handles: Sequence[int]
) -> npt.NDArray[np.float64]:
    return images.double().mean((1, 2, 3)).numpy()


def world(name: str, num_steps: int, denoiser: Pixelwise) -> LatentEnvironment:
    """Two images, in calls of one row."""
    stepper = Stepper(make_scheduler(name, num_steps))
    return LatentEnvironment(
        network=denoiser,
        stepper=stepper,
        decoder=lambda latents: latents[:, :3].sigmoid(),
        reward=brightness,
        prompts=["a", "b"],
        first_latents=noise(2, 4, 4, 4) * stepper.init_noise_sigma,
        rows_per_call=1,
    )


@pytest.mark.slow
@settings(max_examples=60)
@given(
    searches,
    st.sampled_from(("heun", "kdpm2", "kdpm2-a", "flow-heun")),
    st.integers(1, 6),
    st.integers(1, 100),
)
def test_no_search_exceeds_its_budget_on_a_solver_of_two_calls(
    strategy: Strategy, name: str, num_steps: int, nfe: int
) -> None:
    denoiser = Pixelwise()
    environment = world(name, num_steps, denoiser)
    stepper = environment.stepper
    problems = [
        Problem(
            index=index,
            num_steps=num_steps,
            root_seed=index,
            budget=Budget(nfe=nfe),
            rows_per_nfe=2,
            calls_per_step=stepper.calls_per_step,
            guidance_scale=environment.guidance_scale,
            stride_costs=stride_costs_of(strategy, num_steps),
        )
        for index in range(2)
    ]
    if nfe < 2 * strategy.least_evaluations(num_steps):
        with pytest.raises(BudgetError, match=f"a budget of {nfe} NFE"):
            run_search(strategy, environment, problems)
        assert denoiser.rows == []
        return
    for problem, result in zip(problems, run_search(strategy, environment, problems), strict=True):
        assert denoiser.rows.count(problem.index) == result.spent.nfe <= nfe
        assert result.spent.rows == 2 * result.spent.nfe
        assert result.best is not None


def array(*numbers: int) -> Handles:
    return np.array(numbers, dtype=np.int64)


def saved_and_restored(
    environment: LatentEnvironment, name: str, handles: Handles
) -> LatentEnvironment:
    """A new world with the samples under the same handles, through a file."""
    file = io.BytesIO()
    torch.save(environment.export(handles), file)
    file.seek(0)
    other = world(name, 8, Pixelwise())
    restored = other.restore(torch.load(file, weights_only=True), handles)
    assert np.array_equal(restored, handles)
    return other


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_a_solver_remembers_survives_saving(name: str) -> None:
    ends = []
    for saves in (False, True):
        environment = world(name, 8, Pixelwise())
        handles = environment.reset(array(0, 1), array(FIRST_DRAW, FIRST_DRAW))
        # Lengths change, so that what is remembered of unlike jumps is saved too.
        for edge, stride in enumerate((1, 1, 2, 1, 1, 2)):
            environment.denoise(handles)
            seeds = array(edge, edge + 50)
            handles = environment.step(handles, [Action(stride)] * 2, seeds)
            if saves:
                environment = saved_and_restored(environment, name, handles)
        ends.append(environment.denoised(handles))
    assert torch.isfinite(ends[0]).all()
    assert torch.equal(*ends)

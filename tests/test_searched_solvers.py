"""Every search on solvers of two network calls a step, over a network that costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import BudgetError
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import Strategy, run_search
from tests.schedulers import make_scheduler, network, noise
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
    stepper = Stepper(make_scheduler(name, num_steps))
    denoiser = Pixelwise()
    environment = LatentEnvironment(
        network=denoiser,
        stepper=stepper,
        decoder=lambda latents: latents[:, :3].sigmoid(),
        reward=brightness,
        prompts=["a", "b"],
        first_latents=noise(2, 4, 4, 4) * stepper.init_noise_sigma,
        rows_per_call=1,
    )
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

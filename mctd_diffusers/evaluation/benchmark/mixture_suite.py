"""Problems on Gaussian mixtures as a suite: exact denoisers, and the reward itself as gold."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch

from mctd_diffusers.evaluation.benchmark.cells import Drawn, Run, run_of
from mctd_diffusers.evaluation.benchmark.identity import code_hash
from mctd_diffusers.evaluation.benchmark.metering import machine, peak_memory
from mctd_diffusers.evaluation.benchmark.plan import Method, Task
from mctd_diffusers.evaluation.benchmark.pricing import PRICES, ROWS_OF_NFE
from mctd_diffusers.evaluation.ground_truth import standardised_log_likelihood
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.evaluation.mixture_worlds import MakeWorld, mixture_suite
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Counts, Prices
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import run_search
from mctd_diffusers.search.seeding import root_seed_of

WORLDS: Final[dict[str, MakeWorld]] = mixture_suite()
"""Kind of a problem -> what makes the first so many problems of that kind."""
_WORLD_SEED: Final = 1  # of the mixtures; the seed of a task draws the noise
_PRICES: Final = Prices(  # in rows, of which an NFE takes one here
    decode=PRICES.decode / ROWS_OF_NFE,
    preview=PRICES.preview / ROWS_OF_NFE,
    reward_call=PRICES.reward_call / ROWS_OF_NFE,
)


def mixture_prompts(problems: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and kinds of so many problems on mixtures; the kinds take turns."""
    kinds = [list(WORLDS)[i % len(WORLDS)] for i in range(problems)]
    return tuple(f"{kind} {i // len(WORLDS)}" for i, kind in enumerate(kinds)), tuple(kinds)


class MixtureSuite:
    """Problems on Gaussian mixtures, whose reward is exact: gold is the reward itself.

    A row is an NFE here, there being no guidance; searches are told the prices of Stable Diffusion
    1.5 by the NFE. The worlds are the same for every seed of a task; the seed draws the noise.
    """

    def identity(self, method: Method) -> Mapping[str, str]:
        """Hash of the code of the method, the runner and the worlds."""
        shared = ("mctd_diffusers.search.runner", "mctd_diffusers.evaluation.mixture_worlds")
        return {"code": code_hash([type(method.strategy).__module__, *shared])}

    def draw(self, task: Task) -> Drawn:
        """Search the problems of ``task``, those of one world in one call."""
        runs: dict[str, Run] = {}
        shared = Counts()
        device = torch.device("cpu")
        seconds, cpu = time.perf_counter(), time.process_time()
        for kind in dict.fromkeys(task.kinds):
            names = [name for name, k in zip(task.prompts, task.kinds, strict=True) if k == kind]
            made, counts = _searched_world(task, kind, [int(name.split()[-1]) for name in names])
            runs |= made
            shared = shared + counts
        return Drawn(
            runs=[runs[prompt] for prompt in task.prompts],
            calls=shared.calls,
            padded_rows=shared.padded_rows,
            seconds={"call": time.perf_counter() - seconds},
            cpu={"total": time.process_time() - cpu},
            peak_memory=peak_memory(device),
            prices={},
            machine=machine(device),
        )


def _searched_world(task: Task, kind: str, numbers: Sequence[int]) -> tuple[dict[str, Run], Counts]:
    """The runs of problems of one world by name, and what their call shared."""
    world = WORLDS[kind](max(numbers) + 1, num_steps=task.num_steps, first_seed=_WORLD_SEED)
    environment = MixtureEnvironment(
        world.mixtures,
        world.rewards,
        num_steps=task.num_steps,
        first_seed=task.seed,
        prices=_PRICES,
    )
    problems = [
        Problem(
            index=number,
            num_steps=task.num_steps,
            root_seed=root_seed_of(environment.first_noise(number).tobytes()),
            budget=Budget(nfe=task.nfe),
            prices=_PRICES,
            rows_per_nfe=environment.rows_per_nfe,
            guidance_scale=environment.guidance_scale,
        )
        for number in numbers
    ]
    results = run_search(task.method.strategy, environment, problems, seconds=task.seconds)
    if any(result.stop_reason == "interrupted" for result in results):
        raise KeyboardInterrupt
    runs = {}
    for number, result in zip(numbers, results, strict=True):
        name = f"{kind} {number}"
        assert result.best is not None
        winner = environment.latents(np.array([result.best.handle]))
        finished = np.array([sample.handle for sample in result.finished])
        runs[name] = run_of(
            task,
            task.prompts.index(name),
            result,
            environment.latents(finished),
            gold=result.best.reward,
            log_likelihood_z=float(
                standardised_log_likelihood(environment.mixtures[number], winner)[0]
            ),
        )
    return runs, environment.ledger.total

"""One scheduler as a suite of a benchmark: the same initial noise and edge seeds for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mctd_diffusers.calls import World, stride_parts_of
from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.denoising.scheduler_names import NamedScheduler
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.cells import Drawn
from mctd_diffusers.evaluation.benchmark.pipeline_suite import (
    Gold,
    Searched,
    check_reward,
    code_of,
    draw_metered,
    image_seed,
    scheduler_hash,
    weights_of,
)
from mctd_diffusers.evaluation.benchmark.plan import BenchPlan, Method, Task
from mctd_diffusers.evaluation.scheduler_effects.comparison import Arm, arm_of
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import bytes_of
from mctd_diffusers.rewards.calls import to_pil
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Prices
from mctd_diffusers.search.runner import run_search
from mctd_diffusers.search.seeding import root_seed_of
from mctd_diffusers.search.stride_policies import HasStridePolicy

PICTURES: Final = 6
"""Prompts of which pictures are kept."""


class SchedulerSuite:
    """Prompts drawn with one scheduler, and judged by a gold.

    Root seeds are those of the noise in units of its deviation, so that schedulers which scale
    their samples otherwise still search with the same seeds.

    Args:
        pipe: with the reward to search for.
        gold: judges the winners.
        plan: benchmark of the scheduler.
        named: the scheduler.
        pictures: folder for pictures of the first prompts; ``None`` keeps none.

    Raises:
        ConfigError: the pipeline has no reward, or no head for a policy that asks one.
    """

    def __init__(
        self,
        pipe: MCTDPipeline,
        gold: Gold,
        plan: BenchPlan,
        named: NamedScheduler,
        pictures: Path | None = None,
    ) -> None:
        check_reward(pipe)
        check_head(pipe, plan.methods)
        self._pipe = pipe
        self._gold = gold
        self._plan = plan
        self._named = named
        self._pictures = pictures
        self._prices: Prices | None = None
        self._weights = weights_of(pipe, gold) | {"scheduler": hash_of(named)}

    def identity(self, method: Method) -> dict[str, str]:
        """Hashes of weights and scheduler, and of the code of the method and what it shares."""
        return {**self._weights, "code": code_of(self._pipe, self._gold, method.strategy)}

    def draw(self, task: Task) -> Drawn:
        """Search every prompt of ``task`` in one call, and keep some pictures."""
        if self._prices is None:  # measuring also loads what is loaded once, nobody's overhead
            self._prices = self._open(task, self._pipe.reward_model).measure_prices()
        images: list[Tensor] = []

        def search(reward: RewardFn) -> Searched:
            found = self.search(task, reward)
            images.append(found.images)
            return found

        drawn = draw_metered(self._pipe, self._gold, task, search, self._prices)
        if self._pictures is not None:
            for path, picture in zip(
                picture_paths(self._pictures, task, self._plan), to_pil(images[0]), strict=False
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
        return drawn

    def _open(self, task: Task, reward: Any) -> World:
        seeds = [image_seed(prompt, task.seed) for prompt in task.prompts]
        return open_world(
            self._pipe,
            self._named,
            task.prompts,
            seeds,
            num_steps=task.num_steps,
            guidance_scale=self._plan.guidance_scale,
            rows_per_call=self._plan.rows_per_call,
            reward=reward,
        )

    @torch.no_grad()
    def search(self, task: Task, reward: RewardFn) -> Searched:
        """Search as a call of the pipeline does, from root seeds that know no scheduler."""
        world, strategy = self._open(task, reward), task.method.strategy
        strides = stride_parts_of(strategy, world.stepper, self._pipe.ige, world.rows_per_call)
        world = replace(world, strides=strides)
        roots = [
            root_seed_of(bytes_of(noise)) for noise in unit_noise(world, task.prompts, task.seed)
        ]
        problems = [
            replace(problem, root_seed=root)
            for problem, root in zip(world.problems(Budget(task.nfe)), roots, strict=True)
        ]
        results = run_search(strategy, world.environment, problems)
        environment = world.environment
        winners = [result.best.handle for result in results if result.best is not None]
        latents = [
            environment.denoised(np.array([sample.handle for sample in result.finished])).cpu()
            for result in results
        ]
        images = environment.images(np.array(winners))
        self._pipe.maybe_free_model_hooks()
        return Searched(results, latents, images, world.settled_ledger())


def open_world(
    pipe: MCTDPipeline,
    named: NamedScheduler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    rows_per_call: int | None,
    reward: Any,
) -> World:
    """The world of a call with one scheduler.

    Args:
        pipe: whose model denoises.
        named: the scheduler.
        prompts: one an image.
        seeds: of each image's initial noise.
        num_steps: of the schedule.
        guidance_scale: of classifier-free guidance.
        rows_per_call: latents in every call; ``None`` for what fits the device.
        reward: to search for.
    """
    eta: dict[str, Any] = {"eta": named.eta} if named.eta else {}  # not all pipelines take one
    return pipe.open_world(
        prompt=list(prompts),
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        **eta,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        search_scheduler=named.scheduler,
        rows_per_call=rows_per_call,
        reward_model=reward,
    )


def unit_noise(world: World, prompts: Sequence[str], seed: int) -> list[Tensor]:
    """Each image's initial noise, of deviation 1: the same for every scheduler."""
    first = world.prepared.first_latents
    return [
        randn_tensor(
            first[:1].shape,
            torch.Generator().manual_seed(image_seed(prompt, seed)),
            device=first.device,
            dtype=first.dtype,
        )[0]
        for prompt in prompts
    ]


def picture_paths(folder: Path, task: Task, plan: BenchPlan) -> list[Path]:
    """Where pictures of a task lie: of the first prompts and the first seed, else none."""
    if task.seed != plan.seeds[0] or task.prompts[0] != plan.prompts[0]:
        return []
    number = min(PICTURES, len(task.prompts))
    return [folder / f"{task.name}-{i}.png" for i in range(number)]


def pictures_of(folder: Path, plan: BenchPlan, arm: Arm, budget: str) -> dict[str, Path]:
    """Where the pictures of an arm at a budget lie, by prompt; not all need to be there."""
    return {
        prompt: path
        for task in plan.tasks()
        if arm_of(task.method) == arm and task.budget.label == budget
        for prompt, path in zip(task.prompts, picture_paths(folder, task, plan), strict=False)
    }


def check_head(pipe: MCTDPipeline, methods: Sequence[Method]) -> None:
    """Refuse policies that ask a head where there is none.

    Raises:
        ConfigError: there is none.
    """
    for method in methods:
        strategy = method.strategy
        if pipe.ige is None and isinstance(strategy, HasStridePolicy) and strategy.policy.asks_head:
            raise ConfigError(
                f"stride policy {strategy.stride_policy!r} asks an information gain evaluator, and "
                "the pipeline has none: name one with --ige, or leave the policy out"
            )


def hash_of(named: NamedScheduler) -> str:
    """Hash of a scheduler's class, settings and share of noise."""
    return f"{scheduler_hash(named.scheduler)} {named.eta or 0.0:g}"

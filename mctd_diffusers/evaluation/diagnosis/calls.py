"""Diagnosing the calls of a pipeline: just made, or saved in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.calls import World
from mctd_diffusers.denoising.protocols import CheckedReward, RewardFn
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.diagnosis.looking import (
    Scene,
    diagnose_search,
    num_scored,
    plain_rows,
    planned_nfe,
    winner_of,
)
from mctd_diffusers.evaluation.diagnosis.terms import Diagnosis, Effort
from mctd_diffusers.evaluation.judge import SceneJudge
from mctd_diffusers.evaluation.making_again import OnNfe
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import MCTDPipelineOutput
from mctd_diffusers.rewards.calls import call_reward
from mctd_diffusers.search.environment import Handles, Prices, Values
from mctd_diffusers.search.runner import SearchResult, Strategy


class Cost(NamedTuple):
    """What a diagnosis is going to cost, all images together.

    Attributes:
        images: how many are diagnosed.
        nfe: evaluations, to the last one; at most so many where the scheduler takes two network
            calls a step.
        seconds: about.
    """

    images: int
    nfe: int
    seconds: float


def diagnose(
    pipe: MCTDPipeline,
    output: MCTDPipelineOutput,
    *,
    gold: RewardFn | SceneJudge,
    effort: Effort | None = None,
    top_gold: float | None = None,
    reward_model: Any = None,
    latents: Tensor | None = None,
    on_cost: Callable[[Cost], object] | None = None,
    **arguments: Any,
) -> list[Diagnosis]:
    """Say where the searches of a call fall short, image by image.

    Ctrl-C ends it with the images that are done, if there are any. The output stays as it is, its
    ledger too.

    Args:
        pipe: that was called.
        output: of the call.
        gold: scores pictures in [0, 1] with their prompts; it should not be the searched reward.
        effort: what may be spent on each image.
        top_gold: the greatest possible gold, if it is known; by default 1 for the judge.
        reward_model: that was searched, by default the pipeline's own.
        latents: the first noise of all images, where the call was given it.
        on_cost: is told what it is going to cost, before it is spent.
        arguments: what the call was given that no recipe can hold.

    Returns:
        One diagnosis an image, of those whose search finished a sample.

    Raises:
        ConfigError: no search finished a sample, or the pipeline is not the one of the call.
        SearchError: what gold or reward raise.
    """
    searches = [search for search in output.search or [] if search.result.best is not None]

    def case_of(i: int) -> _Case:
        search = searches[i]
        image = search.result.problem
        recipe = search.recipe_of(winner_of(search.result).node)
        own = None if latents is None else latents[image : image + 1]
        world = pipe.world_of(recipe, own, reward_model=reward_model, **arguments)
        return _Case(search.result, world, 0, search.latents)

    results = [search.result for search in searches]
    return _diagnosed(pipe, results, case_of, gold, effort or Effort(), top_gold, on_cost)


def diagnose_saved(
    pipe: MCTDPipeline,
    folder: str | os.PathLike[str],
    *,
    gold: RewardFn | SceneJudge,
    effort: Effort | None = None,
    top_gold: float | None = None,
    reward_model: Any = None,
    search: Strategy | None = None,
    limit: int | None = None,
    on_cost: Callable[[Cost], object] | None = None,
    **arguments: Any,
) -> list[Diagnosis]:
    """Say where the searches that a call saved fall short, as far as they have come.

    Nothing is searched, and the folder stays as it is. Arguments, returns and errors otherwise as
    for :func:`diagnose`.

    Args:
        pipe: as the one that was called.
        folder: that the call saved to.
        gold: scores pictures.
        effort: what may be spent on each image.
        top_gold: the greatest possible gold.
        reward_model: that was searched.
        search: needed where it was a strategy of your own: the same, with its settings.
        limit: diagnose the first so many images.
        on_cost: is told what it is going to cost.
        arguments: what the call was given that no folder can hold.
    """
    opened = pipe.open_search(folder, search=search, reward_model=reward_model, **arguments)
    world = opened.call.world
    searched = opened.saved.results()[: len(world.prompts)]  # without the plain samples
    results = [result for result in searched if result.best is not None][:limit]

    def case_of(i: int) -> _Case:
        handles = [sample.handle for sample in results[i].finished]
        latents = world.environment.denoised(np.array(handles, dtype=np.int64)).cpu()
        again = replace(world, prices=Prices(), with_plain=False)
        return _Case(results[i], again, results[i].problem, latents)

    return _diagnosed(pipe, results, case_of, gold, effort or Effort(), top_gold, on_cost)


@dataclass(frozen=True)
class _Case:
    """One image to be diagnosed.

    Attributes:
        result: of its search.
        world: of the call, with nothing made in it yet.
        problem: number of the image there.
        latents: ``[finished, *sample]`` of ``result.finished``.
    """

    result: SearchResult
    world: World
    problem: int
    latents: Float[Tensor, "finished *sample"]


def _diagnosed(
    pipe: MCTDPipeline,
    results: Sequence[SearchResult],
    case_of: Callable[[int], _Case],
    gold: RewardFn | SceneJudge,
    effort: Effort,
    top_gold: float | None,
    on_cost: Callable[[Cost], object] | None,
) -> list[Diagnosis]:
    """Diagnose image after image, as long as nobody presses Ctrl-C."""
    if not results:
        raise ConfigError(
            "there is no search that finished a sample: diagnose a call with search=..., and a "
            "budget that pays for one"
        )
    if isinstance(gold, SceneJudge):
        gold, top_gold = _gold_of(gold), 1.0 if top_gold is None else top_gold
    cost = _cost_of(results, case_of(0).world, gold, effort)
    if on_cost is not None:
        on_cost(cost)
    diagnoses: list[Diagnosis] = []
    try:
        with pipe.progress_bar(total=cost.nfe) as bar:
            for i in range(len(results)):
                diagnoses.append(_diagnosis_of(case_of(i), gold, effort, top_gold, bar.update))
    except KeyboardInterrupt:
        if not diagnoses:
            raise
    finally:
        pipe.maybe_free_model_hooks()
    return diagnoses


def _diagnosis_of(
    case: _Case, gold: RewardFn, effort: Effort, top_gold: float | None, on_nfe: OnNfe
) -> Diagnosis:
    """Diagnose one image."""
    judged = _JudgedReward(case.world.reward, gold)
    world = replace(case.world, reward=judged)
    stepper = world.stepper
    scene = Scene(
        environment=world.environment,
        problem=case.problem,
        gold=judged.gold_of,
        noise_levels=[*map(stepper.renoise_std, range(stepper.num_steps)), 0.0],
        plain=world.environment.adopt(case.latents[plain_rows(case.result)], case.problem),
    )
    prompt = world.prompts[case.problem]
    return diagnose_search(
        scene, case.result, effort, prompt=prompt, top_gold=top_gold, on_nfe=on_nfe
    )


def _cost_of(results: Sequence[SearchResult], world: World, gold: RewardFn, effort: Effort) -> Cost:
    """What it is going to cost, by a few measured calls."""
    num_steps = world.stepper.num_steps
    nfe = scored = 0
    for result in results:
        reused = len(plain_rows(result))
        evaluations = planned_nfe(result, num_steps, effort, reused=reused)
        nfe += evaluations * world.stepper.calls_per_step
        scored += num_scored(result, num_steps, effort, reused=reused)
    prices = replace(world, reward=_JudgedReward(world.reward, gold)).measure_prices()
    rows = nfe * world.prepared.network.rows_per_latent
    seconds = world.seconds_per_row() * (rows + scored * (prices.decode + prices.reward_call))
    return Cost(len(results), nfe, seconds)


class _JudgedReward:
    """A reward that lets gold judge the same pictures, so that each is decoded once."""

    def __init__(self, reward: CheckedReward, gold: RewardFn) -> None:
        self._reward = reward
        self._judge = gold
        self._gold: dict[int, float] = {}

    def __call__(self, images: Tensor, prompts: Sequence[str], handles: Sequence[int]) -> Values:
        """Score as the reward does, and note the gold of each handle."""
        gold = call_reward(self._judge, images, prompts, handles)
        self._gold |= zip(handles, gold.tolist(), strict=True)
        return self._reward(images, prompts, handles)

    def gold_of(self, handles: Handles) -> Values:
        """Gold of samples that were scored."""
        return np.array([self._gold[handle] for handle in handles.tolist()])


def _gold_of(judge: SceneJudge) -> RewardFn:
    """The judge in the form of a reward."""

    def gold(images: Tensor, prompts: Sequence[str]) -> Values:
        return judge.score(images.to(judge.device), prompts).gold

    return gold

"""A pipeline as a suite: prompts that it draws, and a gold that judges the winners."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mctd_diffusers.denoising.denoiser import chunks
from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.cells import Drawn, run_of
from mctd_diffusers.evaluation.benchmark.identity import code_hash
from mctd_diffusers.evaluation.benchmark.metering import (
    TimedReward,
    cpu_by_phase,
    machine,
    peak_memory,
)
from mctd_diffusers.evaluation.benchmark.plan import BenchPlan, Method, Task
from mctd_diffusers.evaluation.judge import SceneJudge
from mctd_diffusers.models.weights import weights_hash
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.calls import call_reward, reward_name
from mctd_diffusers.search.environment import Ledger, Prices
from mctd_diffusers.search.runner import SearchResult, Strategy

_GOLD_CALL: Final = 8  # pictures


class GoldScores(NamedTuple):
    """What a gold says of pictures.

    Attributes:
        gold: higher is better.
        all_right: whether every fact of the prompt is right; ``None`` where it is not asked.
    """

    gold: Float[np.ndarray, " batch"]
    all_right: Sequence[bool] | None


@runtime_checkable
class Gold(Protocol):
    """Judges finished pictures; no search sees it."""

    @property
    def parts(self) -> Sequence[Any]:
        """Networks and functions that the scores depend on."""
        ...

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> GoldScores:
        """Judge pictures in [0, 1]."""
        ...


class JudgeGold:
    """The judge in the box: mean probability of the prompt's facts."""

    def __init__(self, judge: SceneJudge) -> None:
        self.parts = (judge,)

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> GoldScores:
        """Judge pictures in [0, 1] whose prompts follow the judge's grammar."""
        (judge,) = self.parts
        report = judge.score(images.to(judge.device), prompts)
        return GoldScores(report.gold, [bool(right) for right in report.all_right])


class RewardGold:
    """A reward in the place of a judge; it must not be the one that is searched."""

    def __init__(self, reward: RewardFn) -> None:
        self.parts = (reward,)

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> GoldScores:
        """Score pictures in [0, 1]."""
        return GoldScores(
            call_reward(self.parts[0], images, prompts, list(range(len(prompts)))), None
        )


def image_seed(prompt: str, seed: int) -> int:
    """Gives the seed of an image's noise: by its prompt, so that a list can grow or be cut."""
    digest = hashlib.sha256(f"{seed}|{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def check_reward(pipe: MCTDPipeline) -> None:
    """Refuse a pipeline without a reward.

    Raises:
        ConfigError: it has none.
    """
    if pipe.reward_model is None:
        raise ConfigError(
            "the pipeline has no reward to search for: load it with "
            'MCTDPipeline.from_pretrained(..., reward_model="clip") or another'
        )


class PipelineSuite:
    """Prompts drawn by a pipeline, and judged by a gold.

    Args:
        pipe: with the reward to search for.
        gold: judges the winners.
        plan: what is compared.
        eta: share of fresh noise of the pipeline's own scheduler.

    Raises:
        ConfigError: the pipeline has no reward.
    """

    def __init__(
        self, pipe: MCTDPipeline, gold: Gold, plan: BenchPlan, *, eta: float = 0.0
    ) -> None:
        check_reward(pipe)
        self._pipe = pipe
        self._gold = gold
        self._plan = plan
        self._eta = eta
        self._prices: Prices | None = None
        self._weights = weights_of(pipe, gold)

    def identity(self, method: Method) -> dict[str, str]:
        """Hashes of weights and scheduler, and of the code of the method and what it shares."""
        return {**self._weights, "code": code_of(self._pipe, self._gold, method.strategy)}

    def draw(self, task: Task) -> Drawn:
        """Search every prompt of ``task`` in one call of the pipeline."""
        arguments = self._arguments(task)
        if self._prices is None:  # measuring also loads what is loaded once, nobody's overhead
            one = {"prompt": list(task.prompts[:1]), "generator": None}
            self._prices = self._pipe.estimate(**{**arguments, **one}).prices

        def search(reward: RewardFn) -> Searched:
            output = self._pipe(**arguments, reward_model=reward)
            results = [search.result for search in output.search]
            latents = [search.latents for search in output.search]
            return Searched(results, latents, output.images, output.ledger)

        return draw_metered(self._pipe, self._gold, task, search, self._prices)

    def _arguments(self, task: Task) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        generators = [
            torch.Generator().manual_seed(image_seed(prompt, task.seed)) for prompt in task.prompts
        ]
        return {
            "prompt": list(task.prompts),
            "num_inference_steps": task.num_steps,
            "guidance_scale": self._plan.guidance_scale,
            **({"eta": self._eta} if self._eta else {}),  # not all pipelines take one
            "generator": generators,
            "output_type": "pt",
            "search": task.method.strategy,
            "rows_per_call": self._plan.rows_per_call,
            "nfe_budget": task.nfe,
            "time_budget_s": task.seconds,
        }


class Searched(NamedTuple):
    """What one call made.

    Attributes:
        results: of each prompt.
        latents: of the finished samples of each.
        images: pictures of the winners, in [0, 1].
        ledger: what the call spent.
    """

    results: Sequence[SearchResult]
    latents: Sequence[Tensor]
    images: Float[Tensor, "prompts 3 height width"]
    ledger: Ledger


def draw_metered(
    pipe: MCTDPipeline,
    gold: Gold,
    task: Task,
    search: Callable[[RewardFn], Searched],
    prices: Prices,
) -> Drawn:
    """Search every prompt of a task in one call, meter what it takes, and judge the winners.

    Args:
        pipe: whose modules work, and whose reward is searched.
        gold: judges the pictures when the search is over.
        task: what is searched.
        search: makes the call, by the reward that it is handed.
        prices: of a decode, a preview and a reward call, as measured.

    Raises:
        KeyboardInterrupt: Ctrl-C, also where there is a part of a result.
    """
    device = torch.device(pipe.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with cpu_by_phase(pipe) as cpu:
        found = search(TimedReward(pipe.reward_model, cpu))
    seconds = time.perf_counter() - start
    if any(result.stop_reason == "interrupted" for result in found.results):
        raise KeyboardInterrupt
    memory = peak_memory(device)
    scores = judged(gold, found.images, task.prompts)
    runs = [
        run_of(
            task,
            i,
            result,
            latents.flatten(1).double().numpy(),
            gold=float(scores.gold[i]),
            all_right=None if scores.all_right is None else scores.all_right[i],
        )
        for i, (result, latents) in enumerate(zip(found.results, found.latents, strict=True))
    ]
    total = found.ledger.total
    return Drawn(
        runs=runs,
        calls=total.calls,
        padded_rows=total.padded_rows,
        seconds={**found.ledger.seconds, "call": seconds},
        cpu=dict(cpu),
        peak_memory=memory,
        prices=asdict(prices),
        machine=machine(device),
    )


def judged(gold: Gold, images: Tensor, prompts: Sequence[str]) -> GoldScores:
    """Scores in calls of one size, filled by repetition, so that a score knows no batch."""
    scores: list[float] = []
    right: list[bool] = []
    for chunk in chunks(len(prompts), _GOLD_CALL):
        pictures = images[chunk.rows][chunk.filled]
        said = gold(pictures, [prompts[chunk.rows][i] for i in chunk.filled])
        scores += said.gold[: chunk.useful].tolist()
        right += [] if said.all_right is None else said.all_right[: chunk.useful]
    return GoldScores(np.array(scores), right or None)


def code_of(pipe: MCTDPipeline, gold: Gold, strategy: Strategy) -> str:
    """Hash of the code that a search of a pipeline runs through, its reward and its gold."""
    parts = (type(strategy), type(pipe), pipe.reward_model, *gold.parts, MCTDPipeline)
    return code_hash({getattr(part, "__module__", None) or type(part).__module__ for part in parts})


def weights_of(pipe: MCTDPipeline, gold: Gold) -> dict[str, str]:
    """Hashes of all weights, of the scheduler, and names of rewards that have none."""
    parts: dict[str, Any] = {
        name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)
    }
    parts["reward"] = pipe.reward_model
    parts |= {f"gold {i}": part for i, part in enumerate(gold.parts)}
    found = {}
    for name, part in parts.items():
        inner = getattr(part, "model", part)
        is_module = isinstance(inner, nn.Module)
        found[name] = weights_hash(inner) if is_module else reward_name(part)
    return found | {"scheduler": scheduler_hash(pipe.scheduler)}


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Settings of a scheduler, without notes of where they are from, which have no fixed order."""
    return {name: given for name, given in scheduler.config.items() if not name.startswith("_")}


def scheduler_hash(scheduler: Any) -> str:
    """Hash of a scheduler's class and settings."""
    text = f"{type(scheduler).__name__} {sorted(settings_of(scheduler).items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""What a benchmark searches: a pipeline with a gold, or mixtures with exact answers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mctd_diffusers.denoising.denoiser import chunks
from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.cells import Drawn, Run
from mctd_diffusers.evaluation.benchmark.identity import code_hash, weights_hash
from mctd_diffusers.evaluation.benchmark.plan import BenchPlan, Method, Task
from mctd_diffusers.evaluation.benchmark.pricing import PRICES, ROWS_OF_NFE
from mctd_diffusers.evaluation.ground_truth import standardised_log_likelihood
from mctd_diffusers.evaluation.judge import SceneJudge
from mctd_diffusers.evaluation.metrics import vendi_score
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.evaluation.mixture_worlds import MakeWorld, mixture_suite
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.calls import call_reward, reward_name
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Counts, Prices
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import Finished, SearchResult, run_search
from mctd_diffusers.search.seeding import root_seed_of

_TOP: Final = 8  # best finished samples whose diversity is measured
_GOLD_CALL: Final = 8  # pictures in every call of the gold, so that a score knows no batch


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


class PipelineSuite:
    """Prompts drawn by a pipeline, and judged by a gold.

    Args:
        pipe: with the reward to search for.
        gold: judges the winners.
        plan: what is compared.

    Raises:
        ConfigError: the pipeline has no reward.
    """

    def __init__(self, pipe: MCTDPipeline, gold: Gold, plan: BenchPlan) -> None:
        if pipe.reward_model is None:
            raise ConfigError(
                "the pipeline has no reward to search for: load it with "
                'MCTDPipeline.from_pretrained(..., reward_model="clip") or another'
            )
        self._pipe = pipe
        self._gold = gold
        self._plan = plan
        self._reward = pipe.reward_model
        self._prices: Prices | None = None
        self._weights = _weights_of(pipe, gold)

    def identity(self, method: Method) -> dict[str, str]:
        """Hashes of weights and scheduler, and of the code of the method and what it shares."""
        modules = [type(method.strategy), type(self._pipe), self._reward, *self._gold.parts]
        names = {
            getattr(part, "__module__", None) or type(part).__module__
            for part in (*modules, MCTDPipeline)
        }
        return {**self._weights, "code": code_hash(names)}

    def draw(self, task: Task) -> Drawn:
        """Search every prompt of ``task`` in one call of the pipeline."""
        arguments = self._arguments(task)
        if self._prices is None:  # measuring also loads what is loaded once, nobody's overhead
            one = {"prompt": list(task.prompts[:1]), "generator": None}
            self._prices = self._pipe.estimate(**{**arguments, **one}).prices
        device = torch.device(self._pipe.device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        with cpu_by_phase(self._pipe) as cpu:
            timed = TimedReward(self._reward, cpu)
            output = self._pipe(**arguments, reward_model=timed)
        seconds = time.perf_counter() - start
        searches = output.search
        if any(search.stop_reason == "interrupted" for search in searches):
            raise KeyboardInterrupt
        memory = (
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_memory()
        )
        scores = self._judged(output.images, task.prompts)
        runs = [
            _run(
                task,
                i,
                search.result,
                search.latents.flatten(1).double().numpy(),
                gold=float(scores.gold[i]),
                all_right=None if scores.all_right is None else scores.all_right[i],
            )
            for i, search in enumerate(searches)
        ]
        total = output.ledger.total
        return Drawn(
            runs=runs,
            calls=total.calls,
            padded_rows=total.padded_rows,
            seconds={**output.ledger.seconds, "call": seconds},
            cpu=dict(cpu),
            peak_memory=memory,
            prices={
                "decode": self._prices.decode,
                "preview": self._prices.preview,
                "reward_call": self._prices.reward_call,
            },
            machine=machine(device),
        )

    def _arguments(self, task: Task) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        generators = [
            torch.Generator().manual_seed(image_seed(prompt, task.seed)) for prompt in task.prompts
        ]
        return {
            "prompt": list(task.prompts),
            "num_inference_steps": task.num_steps,
            "guidance_scale": self._plan.guidance_scale,
            "generator": generators,
            "output_type": "pt",
            "search": task.method.strategy,
            "rows_per_call": self._plan.rows_per_call,
            "nfe_budget": task.nfe,
            "time_budget_s": task.seconds,
        }

    def _judged(self, images: Tensor, prompts: Sequence[str]) -> GoldScores:
        """Scores in calls of one size, filled by repetition."""
        gold: list[float] = []
        right: list[bool] = []
        for chunk in chunks(len(prompts), _GOLD_CALL):
            pictures = images[chunk.rows][chunk.filled]
            scores = self._gold(pictures, [prompts[chunk.rows][i] for i in chunk.filled])
            gold += scores.gold[: chunk.useful].tolist()
            right += [] if scores.all_right is None else scores.all_right[: chunk.useful]
        return GoldScores(np.array(gold), right or None)


def _weights_of(pipe: MCTDPipeline, gold: Gold) -> dict[str, str]:
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
    config = f"{type(pipe.scheduler).__name__} {sorted(pipe.scheduler.config.items())}"
    found["scheduler"] = hashlib.sha256(config.encode()).hexdigest()[:16]
    return found


def _run(
    task: Task,
    i: int,
    result: SearchResult,
    latents: Float[np.ndarray, "finished values"],
    *,
    gold: float,
    all_right: bool | None = None,
    log_likelihood_z: float | None = None,
) -> Run:
    """The run of one prompt, from what the search of it found."""
    best: Finished | None = result.best
    assert best is not None  # a budget pays for one sample at least
    spent = result.spent
    order = sorted(range(len(result.finished)), key=lambda row: -result.finished[row].reward)
    return Run(
        prompt=task.prompts[i],
        kind=task.kinds[i],
        proxy=best.reward,
        gold=gold,
        all_right=all_right,
        log_likelihood_z=log_likelihood_z,
        diversity=vendi_score(latents[order[:_TOP]]),
        finished=len(result.finished),
        nfe=spent.nfe,
        rows=spent.rows,
        decodes=spent.decodes,
        previews=spent.previews,
        reward_calls=spent.reward_calls,
        stop_reason=result.stop_reason,
        history=[[nfe, reward] for nfe, reward in result.history],
    )


def machine(device: torch.device) -> dict[str, str]:
    """What ran: the device, and the versions that its speed depends on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _peak_memory() -> int:
    """Bytes that the process has held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- where the CPU's time goes ------------------------------------------------------------------


class TimedReward:
    """A reward whose CPU seconds are added to ``cpu["reward"]``; else the same."""

    def __init__(self, reward: Any, cpu: dict[str, float]) -> None:
        self.reward = reward
        self.cpu = cpu
        self.wants_pil = bool(getattr(reward, "wants_pil", False))
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)

    def __call__(self, images: Any, prompts: Sequence[str]) -> Any:
        """Score as the reward does."""
        start = time.process_time()
        try:
            return self.reward(images, prompts)
        finally:
            self.cpu["reward"] += time.process_time() - start


@contextlib.contextmanager
def cpu_by_phase(pipe: Any) -> Iterator[dict[str, float]]:
    """Meters the CPU seconds of a pipeline's modules, and of all that happens inside the block.

    The seconds are those of the process, all threads together. On an accelerator they say what the
    host was busy with, not the device.

    Yields:
        Seconds by phase, complete when the block is left; "reward" is left to `TimedReward`.
    """
    cpu = dict.fromkeys(("network", "decode", "preview", "reward", "encode"), 0.0)
    previewer = getattr(pipe, "preview_vae", None)
    metered: dict[str, Any] = {
        "network": getattr(pipe, "unet", None) or getattr(pipe, "transformer", None),
        "decode": getattr(getattr(pipe, "vae", None), "decoder", None),
        "preview": getattr(previewer, "decoder", None),
        "encode": getattr(pipe, "text_encoder", None),
    }
    with contextlib.ExitStack() as hooks:
        for phase, module in metered.items():
            if isinstance(module, nn.Module):
                _meter(module, phase, cpu, hooks)
        start = time.process_time()
        try:
            yield cpu
        finally:
            cpu["total"] = time.process_time() - start


def _meter(
    module: nn.Module, phase: str, cpu: dict[str, float], hooks: contextlib.ExitStack
) -> None:
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(time.process_time())

    def after(*_: Any) -> None:
        cpu[phase] += time.process_time() - started.pop()

    hooks.callback(module.register_forward_pre_hook(before).remove)
    hooks.callback(module.register_forward_hook(after).remove)


# --- mixtures -----------------------------------------------------------------------------------

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
            peak_memory=_peak_memory(),
            prices={},
            machine=machine(torch.device("cpu")),
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
        runs[name] = _run(
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

"""Stride policies in plain sampling: how near few evaluations come to the sample of all steps.

No tree and no selection: every policy denoises the same initial noise, deterministically, over the
same schedule with the same number of evaluations. What counts is the distance of the finished
latents from those of single steps all the way, and what the gold says of the picture.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.pipeline_suite import (
    Gold,
    code_of,
    image_seed,
    judged,
    weights_of,
)
from mctd_diffusers.evaluation.benchmark.report import aligned
from mctd_diffusers.evaluation.metrics import Interval, bootstrap_mean
from mctd_diffusers.files import write_text
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.strategies import BestOfN
from mctd_diffusers.search.tree import path_to_root

STOCK: Final = "stock"
"""Label of the stock pipeline with so many steps as evaluations, on its own grid."""
ALL_STEPS: Final = "all_steps"
"""Label of the sample that the others are measured by."""
RIVALS: Final[tuple[str, ...]] = ("uniform", "ays")
"""Policies that every other is compared with, where the plan has them."""


@dataclass(frozen=True)
class PlainPlan:
    """What is compared.

    Attributes:
        prompts: texts; the units of every interval.
        policies: names of stride policies.
        evaluations: of each sample.
        num_steps: of the schedule.
        guidance_scale: of all samples.
        seeds: means are taken over them.
        prompts_per_call: sampled at once.
        rows_per_call: latents in every call; ``None`` for what fits the device.
    """

    prompts: tuple[str, ...]
    policies: tuple[str, ...]
    evaluations: tuple[int, ...]
    num_steps: int = 50
    guidance_scale: float = 4.0
    seeds: tuple[int, ...] = (0,)
    prompts_per_call: int = 24
    rows_per_call: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("there are no prompts to compare stride policies on")
        too_many = [count for count in self.evaluations if not 1 <= count < self.num_steps]
        if too_many or not self.evaluations:
            raise ConfigError(
                f"evaluations are {self.evaluations}: give numbers from 1 to {self.num_steps - 1}, "
                "fewer than the schedule has steps"
            )

    def samplers(self) -> list[tuple[str, int]]:
        """Label and evaluations of everything that is drawn."""
        labels = (STOCK, *self.policies)
        few = [(label, count) for count in self.evaluations for label in labels]
        return [(ALL_STEPS, self.num_steps), *few]


class PlainSample(NamedTuple):
    """One sample of one policy.

    Attributes:
        policy: label.
        evaluations: it took.
        prompt: of the image.
        seed: of its noise.
        rmse: of its latents from those of all steps.
        gold: of its picture.
        strides: it took.
    """

    policy: str
    evaluations: int
    prompt: str
    seed: int
    rmse: float
    gold: float
    strides: tuple[int, ...]


def sample_plainly(
    pipe: MCTDPipeline,
    gold: Gold,
    plan: PlainPlan,
    folder: Path,
    on_call: Callable[[int], None] = lambda nfe: None,
) -> list[PlainSample]:
    """Draw all samples of a plan; what ``folder`` holds is read, if it is of this plan and model.

    Args:
        pipe: has a reward (which scores every sample and decides nothing).
        gold: judges the pictures.
        plan: what is compared.
        folder: for a file of every few prompts; made if it does not exist.
        on_call: told the NFE of each call, also of those that are read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_by = {**weights_of(pipe, gold), "code": code_of(pipe, gold, BestOfN())}
    samples: list[PlainSample] = []
    for seed in plan.seeds:
        for start in range(0, len(plan.prompts), plan.prompts_per_call):
            prompts = plan.prompts[start : start + plan.prompts_per_call]
            path = folder / f"samples-{seed}-{start:05d}.json"
            asked = json.loads(json.dumps([asdict(replace(plan, prompts=prompts)), made_by]))
            read = json.loads(path.read_text("utf-8")) if path.exists() else {}
            if read.get("asked") != asked:
                rows: list[PlainSample] = []
                for drawn in _draw_each(pipe, gold, plan, prompts, seed):
                    rows += drawn
                    on_call(sum(sample.evaluations for sample in drawn))
                write_text(path, json.dumps({"asked": asked, "samples": rows}))
            else:
                rows = [_sample_of(row) for row in read["samples"]]
                on_call(sum(sample.evaluations for sample in rows))
            samples += rows
    return samples


def _sample_of(row: Sequence[Any]) -> PlainSample:
    """A sample from its entries in a file."""
    policy, evaluations, prompt, seed, rmse, gold, strides = row
    return PlainSample(policy, evaluations, prompt, seed, rmse, gold, tuple(strides))


def _draw_each(
    pipe: MCTDPipeline, gold: Gold, plan: PlainPlan, prompts: Sequence[str], seed: int
) -> Iterator[list[PlainSample]]:
    """Samples of a few prompts, by every sampler in turn; all steps come first."""
    reference: Tensor | None = None
    for label, evaluations in plan.samplers():
        is_own = label in (STOCK, ALL_STEPS)
        strategy = (
            BestOfN(n=1) if is_own else BestOfN(n=1, evaluations=evaluations, stride_policy=label)
        )
        output = pipe(
            prompt=list(prompts),
            num_inference_steps=evaluations if is_own else plan.num_steps,
            guidance_scale=plan.guidance_scale,
            generator=[torch.Generator().manual_seed(image_seed(p, seed)) for p in prompts],
            output_type="pt",
            search=strategy,
            nfe_budget=evaluations,
            rows_per_call=plan.rows_per_call,
        )
        latents = torch.cat([search.latents for search in output.search])
        reference = latents if reference is None else reference
        errors = (latents - reference).flatten(1).float().square().mean(1).sqrt().tolist()
        scores = judged(gold, output.images, prompts).gold.tolist()
        yield [
            PlainSample(
                label, search.spent.nfe, prompt, seed, error, score, _strides_of(search.result)
            )
            for search, prompt, error, score in zip(
                output.search, prompts, errors, scores, strict=True
            )
        ]


def _strides_of(result: SearchResult) -> tuple[int, ...]:
    """Strides of the one sample that was drawn."""
    assert result.best is not None
    path = path_to_root(result.tree, result.best.node)[-3::-1]  # without the root and the draw
    return tuple(int(result.tree.stride[node]) for node in path)


class PlainRow(NamedTuple):
    """One policy at one number of evaluations.

    Attributes:
        policy: label.
        evaluations: of each sample.
        rmse: mean over prompts.
        less_rmse: of each rival, how much lower the mean is than its (paired).
        gold: mean over prompts.
        more_gold: of each rival, how much higher the mean is than its (paired).
    """

    policy: str
    evaluations: int
    rmse: Interval
    less_rmse: dict[str, Interval]
    gold: Interval
    more_gold: dict[str, Interval]


def compare_plainly(samples: Sequence[PlainSample], plan: PlainPlan) -> list[PlainRow]:
    """Means and paired differences, with bootstrap intervals over prompts; seeds are averaged."""
    rows = []
    for policy, evaluations in plan.samplers():
        rmse, gold = _by_prompt(samples, plan, policy, evaluations)
        less: dict[str, Interval] = {}
        more: dict[str, Interval] = {}
        for rival in RIVALS:
            if rival != policy and rival in plan.policies and policy != ALL_STEPS:
                other_rmse, other_gold = _by_prompt(samples, plan, rival, evaluations)
                less[rival] = bootstrap_mean(other_rmse - rmse)
                more[rival] = bootstrap_mean(gold - other_gold)
        rows.append(
            PlainRow(policy, evaluations, bootstrap_mean(rmse), less, bootstrap_mean(gold), more)
        )
    return rows


def _by_prompt(
    samples: Sequence[PlainSample], plan: PlainPlan, policy: str, evaluations: int
) -> tuple[Float[np.ndarray, " prompts"], Float[np.ndarray, " prompts"]]:
    """RMSE and gold of every prompt, means over seeds."""
    found: dict[str, list[tuple[float, float]]] = {prompt: [] for prompt in plan.prompts}
    for sample in samples:
        if sample.policy == policy and sample.evaluations == evaluations:
            found[sample.prompt].append((sample.rmse, sample.gold))
    means = np.array([np.mean(found[prompt], axis=0) for prompt in plan.prompts])
    return means[:, 0], means[:, 1]


def write_plain_report(
    plan: PlainPlan, samples: Sequence[PlainSample], folder: Path
) -> tuple[Path, Path]:
    """Write ``plain_strides.csv``, every sample, and ``plain_strides.md``, the table."""
    table, report = folder / "plain_strides.csv", folder / "plain_strides.md"
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(PlainSample._fields)
    for sample in samples:
        writer.writerow([*sample[:-1], " ".join(map(str, sample.strides))])
    write_text(table, lines.getvalue())
    write_text(report, plain_table(plan, compare_plainly(samples, plan)) + "\n")
    return table, report


def plain_table(plan: PlainPlan, rows: Sequence[PlainRow]) -> str:
    """The comparison as a table in Markdown."""
    rivals = [rival for rival in RIVALS if rival in plan.policies]
    head = ["evaluations", "policy", "RMSE"]
    head += [f"lower than {rival}" for rival in rivals] + ["gold"]
    head += [f"higher than {rival}" for rival in rivals]
    rows_of_text = [
        [
            str(row.evaluations),
            row.policy.replace("_", " "),
            f"{row.rmse.mean:.4f}",
            *(_in_words(row.less_rmse.get(rival)) for rival in rivals),
            f"{row.gold.mean:.3f}",
            *(_in_words(row.more_gold.get(rival)) for rival in rivals),
        ]
        for row in rows
    ]
    about = (
        f"Plain samples over {plan.num_steps} steps at guidance {plan.guidance_scale:g}: "
        f"{len(plan.prompts)} prompts, seeds {', '.join(map(str, plan.seeds))}. RMSE is that of "
        f"the finished latents from the sample of all {plan.num_steps} steps from the same noise; "
        "differences are paired by prompt, with 95 % bootstrap intervals."
    )
    return "\n".join([about, "", *aligned(head, rows_of_text)])


def _in_words(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.mean:+.4f} ({interval.low:+.4f}, {interval.high:+.4f})"

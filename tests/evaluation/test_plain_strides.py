"""Stride policies in plain sampling: what is drawn, and what the table says of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.pipeline_suite import RewardGold, image_seed
from mctd_diffusers.evaluation.plain_strides import (
    ALL_STEPS,
    STOCK,
    PlainPlan,
    PlainSample,
    compare_plainly,
    plain_table,
    sample_plainly,
    write_plain_report,
)
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.brightness import brightness
from mctd_diffusers.search.strategies import BestOfN
from tests.pipelines import tiny

PLAN = PlainPlan(
    prompts=("a cup", "a car", "a cat"),
    policies=("uniform", "ays", "ige"),
    evaluations=(3, 5),
    num_steps=10,
    prompts_per_call=2,
    rows_per_call=2,
)


def whiteness(images: Float[Tensor, "batch 3 height width"], prompts: Any) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def pipe() -> Any:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(), reward_model=brightness, ige=tiny.make_ige())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_policy_takes_so_many_evaluations_from_the_same_noise(
    pipe: Any, tmp_path: Path
) -> None:
    told: list[int] = []
    samples = sample_plainly(pipe, RewardGold(whiteness), PLAN, tmp_path, told.append)
    assert [(s.policy, s.evaluations) for s in samples if s.prompt == "a cat"] == PLAN.samplers()
    for sample in samples:
        assert len(sample.strides) == sample.evaluations
        assert sum(sample.strides) == (sample.evaluations if sample.policy == STOCK else 10)
        assert (sample.rmse == 0) == (sample.policy == ALL_STEPS)
    assert sum(told) == 3 * sum(count for _, count in PLAN.samplers())


def test_the_distance_is_that_of_the_finished_latents(pipe: Any, tmp_path: Path) -> None:
    plan = replace(PLAN, prompts=("a cup",), policies=("uniform",), evaluations=(5,))
    *_, sample = sample_plainly(pipe, RewardGold(whiteness), plan, tmp_path)

    def latents(steps: int, **search: Any) -> Tensor:
        generator = torch.Generator().manual_seed(image_seed("a cup", 0))
        output: Tensor = pipe(
            "a cup", num_inference_steps=steps, guidance_scale=4.0, generator=generator,
            output_type="latent", rows_per_call=2, **search,
        ).images  # fmt: skip
        return output

    plain = latents(10, search=BestOfN(n=1), nfe_budget=10)
    every_other = latents(10, search=BestOfN(n=1, stride=2), nfe_budget=5)
    assert sample.strides == (2,) * 5
    assert sample.rmse == pytest.approx(float((every_other - plain).square().mean().sqrt()))


def test_what_was_drawn_is_not_drawn_again(pipe: Any, tmp_path: Path) -> None:
    gold = RewardGold(whiteness)
    plan = replace(PLAN, policies=PLAN.policies[-2:])
    before = sample_plainly(pipe, gold, plan, tmp_path)
    changed = (tmp_path / "samples-0-00002.json").stat().st_mtime_ns
    (tmp_path / "samples-0-00000.json").unlink()
    assert sample_plainly(pipe, gold, plan, tmp_path) == before
    assert (tmp_path / "samples-0-00002.json").stat().st_mtime_ns == changed
    other = sample_plainly(pipe, gold, replace(plan, evaluations=(4,)), tmp_path)
    assert {sample.evaluations for sample in other} == {4, 10}


def test_samples_of_another_head_are_drawn_anew(pipe: Any, tmp_path: Path) -> None:
    gold = RewardGold(whiteness)
    plan = replace(PLAN, prompts=("a cup",), policies=("ige",), evaluations=(5,))
    sample_plainly(pipe, gold, plan, tmp_path)
    path = tmp_path / "samples-0-00000.json"
    drawn = path.stat().st_mtime_ns
    other = MCTDPipeline.from_pipe(pipe, ige=tiny.make_ige(seed=4))
    other.set_progress_bar_config(disable=True)
    sample_plainly(other, gold, plan, tmp_path)
    assert path.stat().st_mtime_ns != drawn


def samples_of(numbers: dict[str, tuple[list[float], list[float]]]) -> list[PlainSample]:
    return [
        PlainSample(policy, 3, prompt, 0, rmse[i], gold[i], (4, 3, 3))
        for policy, (rmse, gold) in numbers.items()
        for i, prompt in enumerate(PLAN.prompts)
    ]


def test_differences_are_paired_by_prompt(tmp_path: Path) -> None:
    plan = replace(PLAN, evaluations=(3,), policies=("uniform", "ige"))
    samples = samples_of(
        {
            STOCK: ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]),
            "uniform": ([1.0, 2.0, 3.0], [0.5, 0.7, 0.9]),
            "ige": ([0.9, 1.9, 2.9], [0.4, 0.6, 0.8]),
        }
    )
    samples += [PlainSample(ALL_STEPS, 10, prompt, 0, 0.0, 1.0, ()) for prompt in plan.prompts]
    rows = {row.policy: row for row in compare_plainly(samples, plan)}
    less = rows["ige"].less_rmse["uniform"]
    assert less == pytest.approx((0.1, 0.1, 0.1))  # the same for every prompt, so no spread
    assert rows["ige"].more_gold["uniform"] == pytest.approx((-0.1, -0.1, -0.1))
    assert rows["uniform"].less_rmse == {}
    assert rows["uniform"].rmse.mean == pytest.approx(2.0)
    assert rows["uniform"].rmse.high > 2.0
    table = plain_table(plan, list(rows.values()))
    assert "| 3 | ige | 1.9000 | +0.1000 (+0.1000, +0.1000) | 0.600 |" in re.sub(" +", " ", table)
    written, report = write_plain_report(plan, samples, tmp_path)
    assert len(written.read_text().splitlines()) == 1 + len(samples)
    assert report.read_text() == table + "\n"


def test_seeds_are_averaged_before_prompts() -> None:
    plan = replace(PLAN, evaluations=(3,), policies=("uniform",), seeds=(0, 1))
    samples = []
    for policy, count in plan.samplers():
        for i, prompt in enumerate(plan.prompts):
            for seed in plan.seeds:
                samples.append(PlainSample(policy, count, prompt, seed, i + seed, 0.0, ()))
    row = compare_plainly(samples, plan)[-1]
    assert row.rmse.mean == pytest.approx(np.mean([0.5, 1.5, 2.5]))


@pytest.mark.parametrize("evaluations", [(), (0,), (10,)])
def test_evaluations_are_fewer_than_steps(evaluations: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="from 1 to 9"):
        replace(PLAN, evaluations=evaluations)

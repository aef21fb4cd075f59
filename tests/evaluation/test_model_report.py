"""The report on a model by itself, on a tiny model and a few prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from mctd_diffusers import MCTDPipeline
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.judge import SceneJudge
from mctd_diffusers.evaluation.model_report import (
    by_turns,
    draw_plain,
    evaluate_model,
    format_report,
)
from mctd_diffusers.evaluation.real_scenes import (
    SHEET,
    RealScenes,
    error_correlation,
    judge_figures,
    reward_figures,
)
from mctd_diffusers.evaluation.scenes import KINDS, load_prompts, parse_prompt
from mctd_diffusers.rewards.brightness import brightness
from tests.pipelines.tiny import make_stock

SETTINGS: dict[str, Any] = {
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "seed": 3,
    "progress": False,
}


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    return make_stock()


@pytest.fixture(scope="module")
def judge() -> SceneJudge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SceneJudge(channels=(8, 8, 8), sample_size=16).eval()


@pytest.fixture(scope="module")
def real() -> RealScenes:
    whole = RealScenes.load()
    return RealScenes(whole.pixels[:12], whole.captions[:12])


def test_the_sheet_that_ships_is_small_balanced_and_says_what_it_shows() -> None:
    scenes = RealScenes.load()
    assert len(scenes) == 240
    assert scenes.pixels.shape == (240, 64, 64, 3)
    assert {scenes.kinds.count(kind) for kind in KINDS} == {40}
    assert SHEET.stat().st_size + SHEET.with_suffix(".json").stat().st_size <= 1_000_000


def test_a_sheet_survives_saving(real: RealScenes, tmp_path: Path) -> None:
    real.save(tmp_path / "sheet.png")
    loaded = RealScenes.load(tmp_path / "sheet.png")
    np.testing.assert_array_equal(loaded.pixels, real.pixels)
    assert loaded.captions == real.captions
    with pytest.raises(ConfigError, match="make_real_scenes"):
        RealScenes.load(tmp_path / "nothing.png")


def test_kinds_take_turns() -> None:
    kinds = [prompt.kind for prompt in by_turns(load_prompts("report"))]
    assert kinds[:7] == [*KINDS, KINDS[0]]
    assert len(kinds) == 120


def test_plain_pictures_are_the_stock_ones_whatever_the_batch(
    stock: StableDiffusionPipeline,
) -> None:
    scheduler, prompts = stock.scheduler, ["a cat", "a dog", "a key"]
    together = draw_plain(stock, prompts, batch_size=3, **SETTINGS)
    apart = draw_plain(stock, prompts, batch_size=2, **SETTINGS)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)
    assert stock.scheduler is scheduler
    theirs = stock(
        prompts,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(3 + i) for i in range(3)],
        output_type="pt",
    ).images
    torch.testing.assert_close(together, theirs, atol=0, rtol=0)
    ours = draw_plain(MCTDPipeline.from_pipe(stock), prompts, batch_size=3, **SETTINGS)
    torch.testing.assert_close(together, ours, atol=0, rtol=0)


def test_the_report_has_every_figure_and_leaves_its_files(
    stock: StableDiffusionPipeline, judge: SceneJudge, real: RealScenes, tmp_path: Path
) -> None:
    prompts = by_turns(load_prompts("report"))[:12]
    report = evaluate_model(
        stock, tmp_path, judge=judge, reward=brightness, real=real, prompts=prompts, **SETTINGS
    )
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report
    assert set(report["plain"]["by_kind"]) == {*KINDS, "all"}
    assert {"kernel_distance", "diversity", "reward"} <= set(report["plain"])
    assert {"judge", "reward", "diversity"} <= set(report["real"])
    assert set(report["errors"]) == {"judge_errors", "reward_errors", "errors", "gaps"}
    text = (tmp_path / "report.txt").read_text("utf-8")
    assert text.strip() == format_report(report)
    assert all(kind in text for kind in KINDS)
    assert "correlation of errors" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height > 0


def test_the_report_does_without_a_reward(
    stock: StableDiffusionPipeline, judge: SceneJudge, real: RealScenes, tmp_path: Path
) -> None:
    prompts = [parse_prompt("a cat"), parse_prompt("two red keys")]
    report = evaluate_model(stock, tmp_path, judge=judge, real=real, prompts=prompts, **SETTINGS)
    assert "errors" not in report
    assert "reward of plain" not in format_report(report)


def test_a_reward_that_reads_captions_is_told_from_one_that_does_not(real: RealScenes) -> None:
    true = set(real.captions)

    def knowing(images: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        return [float(prompt in true) for prompt in prompts]

    assert reward_figures(knowing, real)["accuracy"] == 1
    blind = reward_figures(brightness, real)
    assert blind["accuracy"] == 0
    assert blind["gap"] == 0
    assert set(blind["by_kind"]) == set(KINDS)


def test_errors_that_never_happen_have_no_correlation(judge: SceneJudge, real: RealScenes) -> None:
    figures = error_correlation(judge, brightness, real)
    assert figures["reward_errors"] == 1
    assert figures["errors"] is None
    assert judge_figures(judge, real)["refused"] == 1, "an untrained judge finds nothing"

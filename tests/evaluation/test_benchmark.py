from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark import (
    Drawn,
    TimedReward,
    cpu_by_phase,
    image_seed,
    run_benchmark,
)
from mctd_diffusers.evaluation.benchmark_report import (
    BenchSettings,
    Cell,
    SearchSpec,
    judge_method,
)
from mctd_diffusers.evaluation.metrics import Interval
from mctd_diffusers.evaluation.scenes import load_prompts
from mctd_diffusers.search.environment import Counts, Prices

PROMPTS = tuple(prompt.caption() for prompt in load_prompts("tune")[::10])
SETTINGS = BenchSettings(
    prompts=PROMPTS,
    searches=(SearchSpec("best_of_n", "best_of_n"), SearchSpec("mctd", "mctd")),
    seeds=(0, 1),
)
CPU = {"network": 8.0, "decode": 0.5, "preview": 1.0, "reward": 0.5, "encode": 3.0, "total": 13.5}


class Sampler:
    """Images whose grey says how good they are: better with compute, and for mctd by ``gain``."""

    def __init__(self, gain: float = 0.0) -> None:
        self.gain = gain
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, search: Any, compute: int, seed: int) -> Drawn:
        self.calls.append((search, compute, seed))
        rng = np.random.default_rng(seed)
        grey = 0.3 + 0.02 * compute + 0.05 * rng.standard_normal(len(PROMPTS))
        grey += self.gain * (search == "mctd")
        images = torch.tensor(grey.clip(0, 1))[:, None, None, None].expand(-1, 3, 2, 2)
        nfe = 16 * compute
        return Drawn(
            images=images,
            rewards=[10 * float(level) for level in grey],
            nfe=[nfe] * len(PROMPTS),
            cost=[2.5 * nfe] * len(PROMPTS),
            counts=Counts(nfe=nfe * len(PROMPTS), rows=1920 * compute, padded_rows=80 * compute),
            prices=Prices(decode=3.0, preview=0.3, reward_call=0.1),
            seconds={"network": 1.0},
            cpu=CPU,
            stop_reasons={"budget": len(PROMPTS)},
        )


def grey_judge(images: torch.Tensor, prompts: Any) -> Any:
    gold = images.mean(dim=(1, 2, 3)).numpy()
    return SimpleNamespace(gold=gold, all_right=gold > 0.4)


def bench(sampler: Sampler, output: Path, **kwargs: Any) -> Any:
    settings = kwargs.pop("settings", SETTINGS)
    identity = kwargs.pop("identity", {"unet": "1"})
    return run_benchmark(sampler, grey_judge, settings, output, identity=identity, **kwargs)


def test_a_better_method_passes_and_an_equal_one_does_not(tmp_path: Path) -> None:
    better = bench(Sampler(gain=0.1), tmp_path / "better").verdicts[0]
    assert better.passes
    assert better.above_at == (4, 8)
    equal = bench(Sampler(), tmp_path / "equal").verdicts[0]
    assert (equal.passes, equal.above_at, equal.below_at) == (False, (), ())
    assert equal.surely_not_below_at == (4, 8)
    assert equal.tolerance == pytest.approx(0.03)


def test_rows_hold_what_was_measured(tmp_path: Path) -> None:
    report = bench(Sampler(gain=0.1), tmp_path)
    assert [(row.method, row.compute) for row in report.rows] == [
        ("plain", 1),
        ("best_of_n", 4),
        ("mctd", 4),
        ("best_of_n", 8),
        ("mctd", 8),
        ("best_of_n", 16),
    ]
    row = report.rows[2]
    assert row.nfe == 64
    assert row.cost == 160
    assert row.gains["gold"].mean == pytest.approx(0.1)
    assert row.gains["reward"].mean == pytest.approx(1.0)
    assert row.padded_share == pytest.approx(0.04)
    # 13.5 s in all, 13 s of it in the metered phases; the network's 4 % of padding do not count.
    assert row.overhead_share == pytest.approx(0.5 / (0.5 + 8 * 0.96 + 2.0))
    assert len(row.by_kind) == 6
    assert report.rows[0].gains == {}


def test_files_say_the_same_as_the_report(tmp_path: Path) -> None:
    report = bench(Sampler(gain=0.1), tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["verdicts"][0]["sentence"] == report.verdicts[0].sentence
    text = (tmp_path / "results.md").read_text()
    assert report.verdicts[0].sentence in text
    assert report.rule in text
    assert len({len(line) for line in text.splitlines() if line.startswith("| mctd")}) <= 4
    assert not list(tmp_path.rglob("*.part"))


def test_a_stopped_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    class Stopped(Sampler):
        def __call__(self, search: Any, compute: int, seed: int) -> Drawn:
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(search, compute, seed)

    with pytest.raises(KeyboardInterrupt):
        bench(Stopped(), tmp_path)
    sampler = Sampler()
    seen: list[tuple[int, int, bool]] = []
    resumed = bench(
        sampler, tmp_path, on_cell=lambda _, i, n, seconds: seen.append((i, n, seconds is None))
    )
    assert len(sampler.calls) == 9
    assert [skipped for _, _, skipped in seen] == [True] * 3 + [False] * 9
    assert seen[-1][:2] == (12, 12)
    assert resumed.rows == bench(Sampler(), tmp_path).rows
    whole = bench(Sampler(), tmp_path / "whole")
    assert [row.gold for row in whole.rows] == [row.gold for row in resumed.rows]


@pytest.mark.parametrize("change", ["weights", "steps", "strategy"])
def test_cells_of_something_else_are_made_again(tmp_path: Path, change: str) -> None:
    bench(Sampler(), tmp_path)
    sampler, settings, identity = Sampler(), SETTINGS, {"unet": "1"}
    if change == "weights":
        identity = {"unet": "2"}
    elif change == "steps":
        settings = replace(SETTINGS, num_steps=8)
    else:
        searches = (SETTINGS.searches[0], SearchSpec("mctd", "mctd "))
        settings = replace(SETTINGS, searches=searches)
    bench(sampler, tmp_path, settings=settings, identity=identity)
    assert len(sampler.calls) == (4 if change == "strategy" else 12)


def test_a_new_method_costs_only_its_own_cells(tmp_path: Path) -> None:
    bench(Sampler(), tmp_path)
    sampler = Sampler()
    searches = (*SETTINGS.searches, SearchSpec("mctd(c=2)", "tuned"))
    bench(sampler, tmp_path, settings=replace(SETTINGS, searches=searches))
    assert {search for search, _, _ in sampler.calls} == {"tuned"}


def test_a_damaged_cell_is_made_again(tmp_path: Path) -> None:
    bench(Sampler(), tmp_path)
    (tmp_path / "cells" / "mctd-c4-s0.json").write_text("{")
    (tmp_path / "cells" / "mctd-c4-s1.json").write_text("{}")
    sampler = Sampler()
    bench(sampler, tmp_path)
    assert sampler.calls == [("mctd", 4, 0), ("mctd", 4, 1)]


def test_an_unusable_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output folder .*file.* cannot be used"):
        bench(Sampler(), tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "prompts is empty"),
        ({"computes": (0, 4)}, "at least the cost of one sample"),
        ({"prompts": ("a castle at night",)}, "castle"),
        ({"searches": (SearchSpec("beam", "beam"),) * 2}, "'beam' are ambiguous"),
        ({"searches": (SearchSpec("plain", "beam"),)}, "'plain' are ambiguous"),
    ],
)
def test_settings_that_compare_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SETTINGS, **changes)


def test_the_reference_is_added_where_it_is_missing() -> None:
    settings = replace(SETTINGS, searches=(SearchSpec("mctd", "mctd"),))
    assert [spec.label for spec in settings.searches] == ["best_of_n", "mctd"]


def test_the_largest_budget_is_not_drawn_twice() -> None:
    names = [
        (spec.label, compute) for spec, compute, _ in replace(SETTINGS, computes=(16,)).cells()
    ]
    assert names.count(("best_of_n", 16)) == 2  # one for each seed


def test_a_method_that_is_below_somewhere_does_not_pass() -> None:
    gains = {4: Interval(0.1, 0.05, 0.15), 8: Interval(-0.02, -0.05, 0.01)}
    verdict = judge_method("mctd", gains, tolerance=0.01)
    assert (verdict.passes, verdict.above_at, verdict.below_at) == (False, (4,), (8,))
    verdict = judge_method("mctd", gains, tolerance=0.03)
    assert verdict.passes
    assert verdict.surely_not_below_at == (4,)
    assert "passes" in verdict.sentence


def test_the_noise_of_an_image_is_decided_by_its_prompt_and_the_seed() -> None:
    assert image_seed("a cup", 0) == image_seed("a cup", 0)
    assert len({image_seed(prompt, seed) for prompt in ("a cup", "a car") for seed in (0, 1)}) == 4


def test_cpu_seconds_are_metered_by_phase() -> None:
    def spin(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spin(0.05)
            return x

    pipe = SimpleNamespace(
        unet=Slow(), vae=SimpleNamespace(decoder=Slow()), preview_vae=None, text_encoder=None
    )

    def score(images: Any, prompts: Any) -> list[float]:
        spin(0.02)
        return [1.0]

    with cpu_by_phase(pipe) as cpu:
        reward = TimedReward(score, cpu)
        pipe.unet(torch.zeros(1))
        pipe.unet(torch.zeros(1))
        pipe.vae.decoder(torch.zeros(1))
        assert reward(None, ["a cup"]) == [1.0]
        spin(0.03)
    assert reward.__name__ == "score"
    assert not reward.wants_pil
    assert cpu["network"] == pytest.approx(0.1, abs=0.02)
    assert cpu["decode"] == pytest.approx(0.05, abs=0.02)
    assert cpu["reward"] == pytest.approx(0.02, abs=0.02)
    assert cpu["total"] == pytest.approx(0.2, abs=0.04)
    pipe.unet(torch.zeros(1))
    assert cpu["network"] == pytest.approx(0.1, abs=0.02)


def test_overhead_counts_useful_rows_only() -> None:
    cell = Cell(
        "mctd", 4, 0, {}, [], [], [], [], [],
        counts={"rows": 50, "padded_rows": 50}, prices={}, seconds={}, cpu={**CPU}, stop_reasons={},
    )  # fmt: skip
    assert cell.overhead_share == pytest.approx(0.5 / (0.5 + 4.0 + 2.0))

"""Diagnoses of a pipeline's calls: from memory and from a folder, what they cost, and reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.errors import ConfigError, RewardError
from mctd_diffusers.evaluation.diagnosis import Diagnosis, Effort, diagnose, diagnose_saved
from mctd_diffusers.evaluation.diagnosis.calls import Cost
from mctd_diffusers.evaluation.diagnosis.report import (
    report_data,
    report_text,
    summarise,
    write_report,
)
from mctd_diffusers.evaluation.diagnosis.terms import Level, Regret, Scores
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import MCTDPipelineOutput
from mctd_diffusers.search.environment import Counts
from mctd_diffusers.search.runner import Strategy
from mctd_diffusers.search.strategies import BestOfN
from tests.pipelines import tiny

PROMPTS = ["two cats", "a red car"]
EFFORT = Effort(pool=3, siblings=2, continuations=2, stride=2)


def blueness(images: torch.Tensor, prompts: list[str]) -> list[float]:
    return (images[:, 2].mean(dim=(1, 2)) + images.std(dim=(1, 2, 3))).tolist()


@pytest.fixture(scope="module")
def pipe() -> MCTDPipeline:
    return MCTDPipeline.from_pipe(tiny.make_stock(), reward_model=tiny.redness)


def call(
    pipe: MCTDPipeline, search: str | Strategy = "mctd", **arguments: Any
) -> MCTDPipelineOutput:
    settings: dict[str, Any] = {
        "num_inference_steps": 4,
        "compute": 4,
        "rows_per_call": 2,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "pt",
    }
    output: MCTDPipelineOutput = pipe(PROMPTS, search=search, **settings | arguments)
    return output


def assert_same(one: Diagnosis, other: Diagnosis) -> None:
    """Equal but for their seconds and the last bits of a network's answers."""
    left, right = (report_data([replace(part, seconds=0.0)]) for part in (one, other))
    assert names_of(left) == names_of(right)
    np.testing.assert_allclose(numbers_of(left), numbers_of(right), rtol=1e-3, atol=1e-6)


def numbers_of(data: Any) -> list[float]:
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list | tuple):
        return [number for part in data for number in numbers_of(part)]
    return [data] if isinstance(data, int | float) else []


def names_of(data: Any) -> list[str]:
    if isinstance(data, dict):
        return [*data, *names_of(list(data.values()))]
    if isinstance(data, list | tuple):
        return [name for part in data for name in names_of(part)]
    return [data] if isinstance(data, str) else []


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_diagnosis_on_a_solver_of_two_calls_costs_no_more_than_it_says() -> None:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock("heun"), reward_model=tiny.redness)
    told: list[Cost] = []
    output = call(pipe, "beam")
    found = diagnose(pipe, output, gold=blueness, effort=EFFORT, on_cost=told.append)
    spent = sum(one.spent.nfe for one in found)
    assert told[0].nfe / 2 < spent <= told[0].nfe


@pytest.fixture(scope="module")
def saved(pipe: MCTDPipeline, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A call with a plain sample beside it, and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp("saved") / "search"
    return call(pipe, save_to=folder, include_plain=True), folder


@pytest.mark.parametrize("search", ["mctd", "best_of_n", "beam", "evosearch"])
def test_a_call_is_diagnosed_and_left_as_it_was(pipe: MCTDPipeline, search: str) -> None:
    output = call(pipe, search)
    before = (output.ledger.total, [image.spent for image in output.search])
    told: list[Cost] = []
    found = diagnose(pipe, output, gold=blueness, effort=EFFORT, on_cost=told.append)
    assert (output.ledger.total, [image.spent for image in output.search]) == before
    assert [one.prompt for one in found] == PROMPTS
    for one, image, reward in zip(found, output.images, output.rewards, strict=True):
        # A difference of means: its last bits are those of the means.
        assert one.winner.proxy == pytest.approx(reward, rel=1e-5, abs=1e-7)
        assert one.winner.gold == pytest.approx(blueness(image[None], [""])[0], rel=1e-4)
        assert one.ceiling + one.reward_error + one.regret == pytest.approx(one.shortfall)
        # The schedule of this model, from the noisiest end to none.
        noise = [level.noise_level for level in one.levels]
        assert noise == sorted(noise, reverse=True)
        assert one.reused == {"best_of_n": 4, "beam": 0}.get(search, one.reused)
    assert told[0].images == 2
    assert told[0].nfe == sum(one.spent.nfe for one in found)
    assert told[0].seconds > 0


def test_a_saved_call_is_diagnosed_as_one_in_memory(pipe: MCTDPipeline, saved: Any) -> None:
    output, folder = saved
    files = {path: path.read_bytes() for path in folder.iterdir()}
    from_folder = diagnose_saved(pipe, folder, gold=blueness, effort=EFFORT, top_gold=2.0)
    in_memory = diagnose(pipe, output, gold=blueness, effort=EFFORT, top_gold=2.0)
    assert len(from_folder) == 2
    for one, other in zip(from_folder, in_memory, strict=True):
        assert_same(one, other)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    (first,) = diagnose_saved(pipe, folder, gold=blueness, effort=EFFORT, top_gold=2.0, limit=1)
    assert_same(first, from_folder[0])


def test_a_search_that_is_under_way_is_diagnosed_as_far_as_it_has_come(
    pipe: MCTDPipeline, tmp_path: Path
) -> None:
    asked: list[str] = []

    def impatient(images: torch.Tensor, prompts: list[str]) -> list[float]:
        asked.extend(prompts)
        if len(asked) > 8:
            raise KeyboardInterrupt
        return tiny.redness(images, prompts)

    output = call(
        pipe, BestOfN(wave_size=1), compute=8, reward_model=impatient, save_to=tmp_path / "search"
    )
    assert output.search[0].stop_reason == "interrupted"
    found = diagnose_saved(pipe, tmp_path / "search", gold=blueness, effort=EFFORT)
    assert [one.winner.proxy for one in found] == pytest.approx(output.rewards, rel=1e-5)


def test_an_interrupted_diagnosis_returns_what_is_done(pipe: MCTDPipeline, saved: Any) -> None:
    output, _ = saved
    asked: list[str] = []

    def impatient(images: torch.Tensor, prompts: list[str]) -> list[float]:
        asked.extend(prompts)
        if asked.count(PROMPTS[1]):
            raise KeyboardInterrupt
        return blueness(images, prompts)

    (one,) = diagnose(pipe, output, gold=impatient, effort=EFFORT)
    assert one.prompt == PROMPTS[0]
    with pytest.raises(KeyboardInterrupt):
        diagnose(pipe, output, gold=impatient, effort=EFFORT)


def test_what_cannot_be_diagnosed_is_refused(pipe: MCTDPipeline, saved: Any) -> None:
    output, folder = saved
    plain = pipe(PROMPTS[0], num_inference_steps=2, search=None)
    with pytest.raises(ConfigError, match="no search that finished a sample"):
        diagnose(pipe, plain, gold=blueness)
    with pytest.raises(ConfigError, match=r"made again, has reward .*the reward"):
        diagnose(pipe, output, gold=blueness, effort=EFFORT, reward_model=blueness)
    with pytest.raises(RewardError, match="'<lambda>' answered with"):
        diagnose(pipe, output, gold=lambda images, prompts: "much", effort=EFFORT)
    with pytest.raises(ConfigError, match="no saved search"):
        diagnose_saved(pipe, folder / "elsewhere", gold=blueness)


def test_the_first_noise_is_asked_for_where_no_recipe_holds_it(pipe: MCTDPipeline) -> None:
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    output = call(pipe, latents=latents, generator=None)
    with pytest.raises(ConfigError, match="pass it as latents"):
        diagnose(pipe, output, gold=blueness, effort=EFFORT)
    found = diagnose(pipe, output, gold=blueness, effort=EFFORT, latents=latents)
    assert len(found) == 2


# ---- reports


def level(step_index: int, gold: float, error: float = 0.01, proxy: float = 0.0) -> Level:
    return Level(
        node=step_index + 1,
        move="step" if step_index else "draw",
        step_index=step_index,
        noise_level=1 - step_index / 16,
        rejected=3,
        looked_at=3,
        proxy=Regret(proxy, error, 20, 0.5, 0.5 + proxy),
        gold=Regret(gold, error, 20, 0.5, 0.5 + gold),
    )


def diagnosis(i: int = 0, *, gold: float = 0.7, pick: Scores | None = None) -> Diagnosis:
    """Of a prompt whose search went wrong at step 6, a bit more for each ``i``."""
    return Diagnosis(
        prompt=f"prompt {i}",
        strategy="mctd",
        num_steps=16,
        top_gold=1.0,
        winner=Scores(30.0, gold),
        pick=pick or Scores(31.0, 0.75),
        best=Scores(29.0, 0.9),
        mean=Scores(28.0, 0.6),
        pool=64,
        reused=0,
        levels=(level(0, 0.01), level(6, 0.1 + 0.01 * i), level(7, 0.08), level(12, -0.05)),
        spent=Counts(nfe=100),
        seconds=2.0,
    )


def test_a_report_adds_up_and_names_the_level() -> None:
    diagnoses = [diagnosis(i) for i in range(6)]
    summary = summarise(diagnoses)
    total = summary.ceiling.mean + summary.reward_error.mean + summary.regret.mean
    assert total == pytest.approx(summary.shortfall.mean) == pytest.approx(0.3)
    parts = summary.regret_missed.mean + summary.regret_reached.mean
    assert parts == pytest.approx(summary.regret.mean)
    assert summary.missed == 1
    assert [stage.label for stage in summary.stages] == ["initial noise", "steps 5-8", "steps 9-12"]
    assert [stage.choices for stage in summary.stages] == [6, 12, 6]
    assert summary.went_wrong is not None
    assert summary.went_wrong.label == "steps 5-8"
    text = report_text(diagnoses)
    assert "| = shortfall" in text
    assert "The largest term is the reward's error" in text
    assert "Paths go wrong most at steps 5-8 (noise level 0.62 to 0.56)" in text
    assert "which the reward of their continuations does not tell" in text
    assert "step 6 (+0.150, noise 0.62)" in text
    assert "600 NFE and 12 s" in text


def test_a_report_says_where_nothing_stands_out() -> None:
    quiet = [replace(diagnosis(i), levels=(level(4, 0.1 * (-1) ** i, 0.2),)) for i in range(6)]
    assert summarise(quiet).went_wrong is None
    assert all(one.went_wrong is None for one in quiet)
    assert "No level stands out" in report_text(quiet)
    alone = [replace(diagnosis(), levels=())]
    assert "no choices among siblings" in report_text(alone)


def test_a_small_regret_is_not_worth_a_name_however_sure_it_is() -> None:
    one = replace(diagnosis(), levels=(level(4, 0.02, 0.0), level(8, 0.9, 0.8)))
    assert one.least_regret == pytest.approx(0.1 * 0.3)
    assert one.went_wrong is None
    sure = replace(one, levels=(level(4, 0.04, 0.0), level(8, 0.9, 0.8)))
    assert sure.went_wrong is sure.levels[0]
    # Where the winner lacks next to nothing, what selection can give at most is the measure.
    good = replace(sure, winner=Scores(30.0, 0.999), best=Scores(29.0, 1.0), mean=Scores(28.0, 0.5))
    assert good.least_regret == pytest.approx(0.05)
    assert good.went_wrong is None


def test_regret_is_told_apart_by_whether_the_reward_was_reached() -> None:
    missed = diagnosis(pick=Scores(31.0, 0.8))
    reached = diagnosis(pick=Scores(29.5, 0.9))
    summary = summarise([missed, reached])
    assert summary.regret_missed.mean == pytest.approx(0.1 / 2)
    assert summary.regret_reached.mean == pytest.approx(0.2 / 2)
    assert summary.missed == 0.5


def test_a_report_is_written_as_text_and_as_data(tmp_path: Path) -> None:
    diagnoses = [diagnosis(i) for i in range(3)]
    files = write_report(tmp_path / "new", diagnoses, ["About this."])
    assert [path.name for path in files] == ["report.md", "diagnosis.json"]
    assert files[0].read_text() == report_text(diagnoses, ["About this."])
    data = json.loads(files[1].read_text())
    assert data == json.loads(json.dumps(report_data(diagnoses)))
    assert data["summary"]["shortfall"]["mean"] == pytest.approx(0.3)
    assert data["summary"]["went_wrong"] == "steps 5-8"
    first = data["prompts"][0]
    assert first["ceiling"] + first["reward_error"] + first["regret"] == pytest.approx(0.3)
    assert first["levels"][1]["gold"]["mean"] == pytest.approx(0.1)
    assert first["spent"]["nfe"] == 100
    with pytest.raises(ConfigError, match="no diagnoses"):
        summarise([])


def test_without_a_greatest_gold_the_best_of_the_pool_stands_for_it() -> None:
    one = replace(diagnosis(), top_gold=None)
    assert one.ceiling == 0
    assert one.shortfall == pytest.approx(0.9 - 0.7)
    assert np.isclose(one.reward_error + one.regret, one.shortfall)
    assert "shortfall from the pool's best" in report_text([one])

"""How siblings come apart under each scheduler: the measurement, and what it says."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.denoising.scheduler_names import NamedScheduler, parse_schedulers
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.pipeline_suite import image_seed
from mctd_diffusers.evaluation.scheduler_effects.branching import (
    Branching,
    BranchingPlan,
    measure_branching,
    read_branching,
    telling_of,
)
from mctd_diffusers.evaluation.scheduler_effects.figures import branching_figure
from mctd_diffusers.evaluation.scheduler_effects.report import branching_csv
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.brightness import brightness
from mctd_diffusers.search.environment import Action
from mctd_diffusers.search.strategies import BestOfN
from tests.pipelines import tiny

# Of schedulers of diffusers under this numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

PLAN = BranchingPlan(("a cup", "two cats"), samples=3, siblings=4, num_steps=5, rows_per_call=4)


def parsed(text: str) -> list[NamedScheduler]:
    return parse_schedulers(text, tiny.make_scheduler().config)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(), reward_model=brightness)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_scheduler(found: list[Branching]) -> dict[str, list[Branching]]:
    names = dict.fromkeys(row.scheduler for row in found)
    return {name: [row for row in found if row.scheduler == name] for name in names}


def test_plain_samples_are_those_of_the_pipeline(pipe: Any, tmp_path: Path) -> None:
    for row in measure_branching(pipe, parsed("DDIM"), PLAN, tmp_path):
        generators = [
            torch.Generator().manual_seed(image_seed(row.prompt, seed)) for seed in range(3)
        ]
        drawn = pipe(
            [row.prompt] * 3, num_inference_steps=5, guidance_scale=4.0, generator=generators,
            search=BestOfN(n=1), nfe_budget=5, rows_per_call=4,
        )  # fmt: skip
        assert row.rewards == pytest.approx(drawn.rewards, abs=1e-6)
        assert np.shape(row.values) == (3, 5)
        # Nothing is left to do at the last step: its estimate is the sample.
        assert np.array(row.values)[:, -1] == pytest.approx(row.rewards, abs=0.02)


def test_spreads_are_those_of_siblings_drawn_by_hand(pipe: Any, tmp_path: Path) -> None:
    named = parsed("EulerAncestral")
    (row, _) = measure_branching(pipe, named, PLAN, tmp_path)
    world = pipe.open_world(
        "a cup", num_inference_steps=5, guidance_scale=4.0, rows_per_call=4,
        generator=torch.Generator().manual_seed(image_seed("a cup", 0)),
        search_scheduler=named[0].scheduler,
    )  # fmt: skip
    environment = world.environment
    root = environment.reset(np.zeros(1, np.int64), np.array([-1]))
    environment.denoise(root)
    many = 400
    children = environment.step(np.repeat(root, many), [Action(1)] * many, np.arange(many))
    environment.denoise(children)
    values = environment.value(children)
    # Four siblings against four hundred: a deviation of four draws is right to a factor of 3.
    assert 1 / 3 < row.value_spread[0] / values.std() < 3
    estimates = environment.denoised(children).double().flatten(1)
    apart = float(estimates.var(dim=0).mean().sqrt())
    assert row.estimate_spread[0] == pytest.approx(apart, rel=0.15)  # of 256 numbers at once


def test_schedulers_share_noise_parents_and_edges(pipe: Any, tmp_path: Path) -> None:
    found = by_scheduler(
        measure_branching(pipe, parsed("DDIM,DDIM:eta=1,Euler,EulerAncestral"), PLAN, tmp_path)
    )
    for with_noise, without in (("DDIM:eta=1", "DDIM"), ("EulerAncestral", "Euler")):
        for one, other in zip(found[with_noise], found[without], strict=True):
            # At the first step the parents are the same, and so are the edges.
            assert one.value_spread[0] == pytest.approx(other.value_spread[0], rel=1e-4)
            assert one.estimate_spread[0] == pytest.approx(other.estimate_spread[0], rel=1e-4)
            assert np.array(one.values)[:, 0] == pytest.approx(np.array(other.values)[:, 0])
            assert one.estimate_spread[2] != other.estimate_spread[2]
            assert one.rewards != other.rewards


def test_what_was_measured_is_not_measured_again(pipe: Any, tmp_path: Path) -> None:
    told: list[int] = []
    named = parsed("DDIM,Heun")
    found = measure_branching(pipe, named, PLAN, tmp_path, told.append)
    each = PLAN.samples * 5 + PLAN.siblings * 4
    assert told == [2 * each, 4 * each]
    nfe = {name: rows[0].nfe for name, rows in by_scheduler(found).items()}
    assert nfe["DDIM"] == each
    assert each < nfe["Heun"] <= 2 * each
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == 2
    assert measure_branching(pipe, named, PLAN, tmp_path) == found
    assert read_branching(named, PLAN, tmp_path) == found
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    other = replace(PLAN, siblings=2)
    assert read_branching(named, other, tmp_path) == []
    assert measure_branching(pipe, named[:1], other, tmp_path) != found[:2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 2}, "samples is 2: give at least 3"),
        ({"siblings": 1}, "siblings is 1: give at least 2"),
        ({"num_steps": 1}, "num_steps is 1: give at least 2"),
        ({"prompts": ()}, "no prompts to draw siblings of"),
    ],
)
def test_too_little_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PLAN, **changes)


def known(prompt: str, values: list[list[float]], rewards: list[float]) -> Branching:
    """Siblings of known spreads, and samples of known values."""
    return Branching("DDIM", prompt, [0.4, 0.2], [2.0, 1.0], values, rewards, 9)


def test_values_tell_by_their_correlation_within_a_prompt() -> None:
    told = known("a", [[0, 3, 1], [0, 1, 2], [0, 2, 3]], [1.0, 2.0, 3.0])
    # Of another level: across prompts these would correlate, within they do not.
    other = known("b", [[0, 10, 11], [0, 10, 12], [0, 10, 13]], [11.0, 12.0, 13.0])
    telling = telling_of([told, other], "DDIM")
    first, second, third = telling.correlation
    assert first is None  # all values are the same
    assert second is not None
    assert second.mean == pytest.approx(-0.5)  # of the first prompt alone
    assert third is not None
    assert third == pytest.approx((1.0, 1.0, 1.0))
    assert [each.mean for each in telling.value_spread] == pytest.approx([0.4, 0.2])
    assert [each.mean for each in telling.estimate_spread] == pytest.approx([2.0, 1.0])


def test_the_measurement_is_written_and_drawn() -> None:
    rows = [known("a", [[0, 3, 1], [0, 1, 2], [0, 2, 3]], [1.0, 2.0, 3.0])]
    table = list(csv.DictReader(io.StringIO(branching_csv(rows))))
    assert [row["step_index"] for row in table] == ["0", "1", "2", "3"]
    assert [row["value_spread"] for row in table] == ["0.4", "0.2", "", ""]
    assert table[1]["values"] == "3 1 2"
    assert table[3]["values"] == "1 2 3"  # finished: the rewards
    figure = branching_figure(rows, "DDIM")
    assert [len(ax.lines) for ax in figure.axes] == [1, 1, 1]
    assert np.array(figure.axes[2].lines[0].get_ydata()) == pytest.approx([-0.5, 1.0])

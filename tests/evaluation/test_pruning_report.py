"""The regret of pruning: pruned samples made again and finished, in words and by the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mctd_diffusers import cli
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.making_again import Maker
from mctd_diffusers.evaluation.pruning_report import (
    PrunedEnd,
    PruningRegret,
    finish_pruned,
    merged,
    pruning_regret,
    pruning_text,
    rate,
)
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.pruning import pruned_ends
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.strategies import MCTD
from tests.pipelines import tiny
from tests.toys import guided_environment, search


@pytest.fixture(scope="module")
def result() -> SearchResult:
    """A search that pruned."""
    (found,) = search(MCTD(pruning="all"), guided_environment(1, 8), nfe=120)
    return found


def test_pruned_samples_are_made_again_by_their_moves(result: SearchResult) -> None:
    tree = result.tree
    ends = pruned_ends(tree).tolist()
    valued = [node for node in ends if np.isfinite(tree.value[node])]
    assert valued
    world = guided_environment(1, 8)
    made = Maker(world, 0, tree).make_again(ends)
    handles = np.array([made[node] for node in valued])
    world.denoise(handles)
    scale = world.guidance_scale
    assert scale is not None
    # Candidates are valued by half the guidance, coarse rollouts by three quarters.
    again = [world.value(handles, [share * scale] * len(handles)) for share in (0.5, 0.75)]
    assert np.isclose(again, tree.value[valued]).any(axis=0).all()


def test_a_share_of_what_was_pruned_is_finished(result: SearchResult) -> None:
    spent: list[int] = []
    some = finish_pruned(guided_environment(1, 8), 0, result, share=0.3, on_nfe=spent.append)
    pruned = pruned_ends(result.tree)
    assert len(some) == int(np.ceil(0.3 * len(pruned)))
    assert {end.node for end in some} <= set(pruned.tolist())
    assert sum(spent) > 0
    assert result.best is not None
    for end in some:
        assert end.rule == result.tree.pruned_by(end.node)
        assert end.gain == end.reward - result.best.reward
    assert some == finish_pruned(guided_environment(1, 8), 0, result, share=0.3)
    with pytest.raises(ConfigError, match="share is 0"):
        finish_pruned(guided_environment(1, 8), 0, result, share=0)


def test_nothing_pruned_is_nothing_to_finish() -> None:
    (whole,) = search(MCTD(), guided_environment(1, 4), nfe=20)
    assert finish_pruned(guided_environment(1, 4), 0, whole) == []


def test_the_interval_is_that_of_wilson() -> None:
    assert rate(3, 10) == pytest.approx((0.3, 0.1078, 0.6032), abs=1e-4)
    assert np.isnan(rate(0, 0).share)


def test_what_was_finished_is_told_by_rule() -> None:
    ends = (PrunedEnd(4, "bounds", 1.0, -1.0), PrunedEnd(7, "siblings", 3.0, 1.0))
    regret = merged([PruningRegret(30, ends[:1], 8), PruningRegret(12, ends[1:], 4)])
    assert regret.won("siblings").share == 1
    text = pruning_text(regret)
    assert text.startswith("2 of 42 pruned samples were finished, by 12 NFE.")
    assert "| any rule | 2 | 50.0 % |" in text
    assert "| bounds | 1 | 0.0 % |" in text


def test_a_call_and_its_folder_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(), reward_model=tiny.make_clip_reward())
    pipe.save_pretrained(tmp_path)
    output = pipe(
        "two blue cars", search=MCTD(pruning="siblings+memory", least_gain=1.0, seed_share=0.0),
        num_inference_steps=4, nfe_budget=30, generator=torch.Generator().manual_seed(0),
        save_to=tmp_path / "search",
    )  # fmt: skip
    regret = pruning_regret(pipe, output, share=0.5)
    assert regret.ends
    status = cli.main(
        ["prune-report", str(tmp_path / "search"), "--model", str(tmp_path), "--share", "0.5",
         "--output", str(tmp_path / "report")]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert pruning_text(regret) in captured.out
    data = json.loads((tmp_path / "report" / "pruning.json").read_text())
    assert data["pruned"] == regret.pruned
    assert len(data["ends"]) == len(regret.ends)

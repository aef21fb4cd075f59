"""Full calls, linear memory, released latents, and time that holds: searches of any size."""

from __future__ import annotations

import runpy
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Asks, Release
from mctd_diffusers.search.moves import denoise, draw, step
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import Strategy, run_search
from mctd_diffusers.search.strategies import MCTD
from mctd_diffusers.search.tree import ROOT, STEP, Tree, add_child, prune, subtree
from tests.pipelines import tiny
from tests.strategies import searches, trees
from tests.test_environment import NUM_STEPS, World
from tests.test_runner import Clock, Custom
from tests.toys import problems_of, small_environment

SCRIPT = Path(__file__).parents[1] / "scripts" / "measure_overhead.py"


# ---- full calls


@pytest.fixture(scope="module")
def pipe() -> MCTDPipeline:
    stock, preview = tiny.make_stock(), tiny.make_preview_vae()
    return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness, preview_vae=preview)


@pytest.mark.parametrize("compute", [2, 4])
@pytest.mark.parametrize("name", ["best_of_n", "beam", "mctd"])
def test_calls_with_eight_prompts_are_nine_tenths_useful(
    pipe: MCTDPipeline, name: str, compute: int
) -> None:
    out = pipe(
        [f"{count} cats" for count in range(8)],
        generator=[torch.Generator().manual_seed(seed) for seed in range(8)],
        num_inference_steps=8,
        search=name,
        compute=compute,
        rows_per_call=8,
        output_type="latent",
    )
    total = out.ledger.total
    assert total.rows == 2 * total.nfe
    assert total.rows + total.padded_rows == 16 * total.calls
    assert total.rows >= 0.9 * (total.rows + total.padded_rows)


def test_the_script_measures_every_search(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--nodes", "48", "--computes", "2", "--search", "best_of_n,beam,mctd"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    *_, best_of_n, beam, mctd = capsys.readouterr().out.splitlines()
    for line, name in ((best_of_n, "best_of_n"), (beam, "beam"), (mctd, "mctd")):
        assert line.startswith(name)
        assert float(line.split()[-1]) >= 90


@pytest.mark.parametrize("wave_size", [1, 8, 16, 64])
def test_waves_of_any_size_find_a_sample_within_the_budget(wave_size: int) -> None:
    environment = small_environment(1, 8)
    problems = problems_of(environment, Budget(nfe=8 * 8))
    (result,) = run_search(MCTD(wave_size=wave_size), environment, problems)
    assert result.best is not None
    assert result.spent.nfe >= 0.9 * 8 * 8  # a wide wave leaves no budget


# ---- memory


@given(trees(), st.data())
def test_a_subtree_is_a_node_and_all_its_descendants(tree: Tree, data: st.DataObject) -> None:
    node = data.draw(st.integers(0, tree.num_nodes - 1))
    inside = {node}
    for row in range(node + 1, tree.num_nodes):
        if int(tree.parent[row]) in inside:
            inside.add(row)
    assert subtree(tree, node).tolist() == sorted(inside)


def test_the_memory_of_a_tree_is_linear_in_its_nodes() -> None:
    def bytes_of(num_nodes: int) -> int:
        tracemalloc.start()
        tree = Tree(0)
        for handle in range(num_nodes):
            add_child(
                tree, handle // 3, handle=handle, step_index=0, move=STEP, stride=1, eta=None,
                seed=handle,
            )  # fmt: skip
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    # Columns double, so that a size is known up to a factor of two.
    assert bytes_of(4_000) < 2 * 4 * bytes_of(1_000)
    assert bytes_of(4_000) < 4_000 * 1_000


@settings(max_examples=10)
@given(st.lists(st.integers(0, 99), min_size=2, max_size=8))
def test_latents_of_pruned_nodes_are_released(unet: Any, vae: Any, choices: list[int]) -> None:
    world = World(unet, vae)
    environment = world.environment
    gone: list[weakref.ref[Any]] = []

    def pruning(problem: Problem) -> Asks:
        tree = problem.tree
        yield from denoise(problem, (yield from draw(problem, 2)))
        for choice in choices:
            able = np.flatnonzero(tree.live & tree.evaluated & (tree.step_index < NUM_STEPS - 1))
            parent = int(able[choice % len(able)])
            made = yield from step(problem, [parent] * 2, stride=1, eta=1.0)
            yield from denoise(problem, made)
            victims = [row for row in able.tolist() if row != parent] or made[:1]
            handles = prune(tree, victims[choice % len(victims)])
            for sample in environment._samples[np.array(handles, dtype=np.int64)]:
                gone.extend(map(weakref.ref, (sample.latents, sample.outputs.conditional)))  # type: ignore[union-attr]  # evaluated
            del sample
            yield Release(np.array(handles, dtype=np.int64))
            if not (tree.live & tree.evaluated).sum() > 1:  # the root is always live
                break
        return "exhausted"

    problem = Problem(index=0, num_steps=NUM_STEPS, root_seed=1, budget=Budget(nfe=100))
    (result,) = run_search(Custom(pruning), environment, [problem])
    assert gone
    assert all(reference() is None for reference in gone)
    live = result.tree.live.copy()
    live[ROOT] = False
    assert len(environment._samples) == live.sum()


# ---- time


@settings(max_examples=25)
@given(searches, st.integers(1, 25))
def test_time_that_is_up_is_kept_within_one_wave(strategy: Strategy, seconds: int) -> None:
    environment = small_environment(2, 6)
    budget = Budget(nfe=max(40, strategy.least_evaluations(6)))
    waves: list[int] = []
    results = run_search(
        strategy,
        environment,
        problems_of(environment, budget, strategy=strategy),
        seconds=seconds,
        clock=Clock(),  # a second passes with each wave
        on_wave=lambda wave: waves.append(sum(wave.nfe)),
    )
    for result in results:
        assert result.best is not None
        assert result.stop_reason in {"time", "budget", "exhausted"}
    if any(result.stop_reason == "time" for result in results):
        # After that only first samples are completed: an image had none, and takes at most the
        # steps of a sample, each a wave, and its reward.
        assert len(waves) <= seconds + 6 + 1
    else:
        assert len(waves) <= seconds

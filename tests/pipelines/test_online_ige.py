"""Calls that let the pipeline's head learn from what they observe."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.models.refining import RefinementSettings, Refiner, is_validated_on
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.processes import search_in_processes
from mctd_diffusers.saved_calls import CallSaver
from mctd_diffusers.search.strategies import MCTD, BestOfN
from mctd_diffusers.search.tree import STEP, to_json
from tests.pipelines import tiny

PROMPTS = ["a red cat", "two dogs", "a bird"]
SEARCH = MCTD(stride_policy="ige", edge_gain=0.5, seed_share=0, candidates=3)
CALL: dict[str, Any] = {
    "num_inference_steps": 6,
    "guidance_scale": 4.0,
    "output_type": "pt",
    "rows_per_call": 4,
    "search": SEARCH,
    "compute": 3,
}
SETTINGS = RefinementSettings(least=1, validation_share=0.5, steps=10, learning_rate=3e-3)


def make_pipe(**settings: Any) -> MCTDPipeline:
    parts = {"reward_model": tiny.redness, "ige": tiny.make_ige()}
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(), **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.ige_refiner = Refiner(pipe.ige, RefinementSettings(**{**vars(SETTINGS), **settings}))
    return pipe


def search(
    pipe: MCTDPipeline, first_seed: int = 0, prompts: list[str] = PROMPTS, **call: Any
) -> Any:
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))]
    return pipe(prompts, generator=generators, **{**CALL, **call})


def weights_of(head: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in head.state_dict().items()}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=0, equal_nan=True)


def assert_same_trees(one: Any, other: Any) -> None:
    assert torch.equal(one.images, other.images)
    for found, same in zip(one.search, other.search, strict=True):
        assert to_json(found.tree) == to_json(same.tree)


@pytest.fixture(scope="module")
def refined() -> tuple[MCTDPipeline, list[Any]]:
    """A pipeline that learned from two calls, and what they gave."""
    pipe = make_pipe()
    return pipe, [search(pipe, first_seed, online_ige=True) for first_seed in (0, 10)]


def test_the_search_it_follows_is_as_without_and_the_head_is_another(refined: Any) -> None:
    pipe, (first, _) = refined
    assert_same_trees(first, search(make_pipe()))
    before = weights_of(tiny.make_ige())
    assert not torch.equal(weights_of(pipe.ige)["head.weight"], before["head.weight"])
    update = first.ige_update
    assert update.is_kept
    assert update.loss_after < update.loss_before
    assert update.observed == update.training + update.validation > 10
    assert search(make_pipe()).ige_update is None


def test_groups_are_those_in_the_trees(refined: Any) -> None:
    pipe, outputs = refined
    tree = outputs[0].search[0].tree
    steps = np.flatnonzero((tree.move == STEP) & (tree.step_index < 6))
    refiner = pipe.ige_refiner
    part = refiner.validation
    if not is_validated_on(tree.root_seed, 0.5):
        part = refiner.training
    seen = part.take(part.image == tree.root_seed)
    edges, counts = np.unique(tree.parent[steps], return_counts=True)
    assert len(seen) == (counts > 1).sum()
    np.testing.assert_array_equal(seen.value, tree.value[edges[counts > 1]])
    assert sum(map(len, seen.values)) == counts[counts > 1].sum()
    assert set(seen.prompt.tolist()) == {PROMPTS[0]}
    # Features are those of the environment, in half precision.
    world = pipe.open_world(
        PROMPTS[0], generator=torch.Generator().manual_seed(0), reads_features=True, **CALL
    )
    handle = world.environment.reset(np.zeros(1, np.int64), tree.seed[edges[:1]])
    world.environment.denoise(handle)
    assert tree.step_index[edges[0]] == 0
    for name, rows in world.features_of(handle).items():
        np.testing.assert_allclose(seen.features[name][:1], rows, rtol=2e-3, atol=2e-3)


def test_calls_decide_what_is_learned(refined: Any) -> None:
    pipe, outputs = refined
    again = make_pipe()
    for first_seed, output in zip((0, 10), outputs, strict=True):
        torch.manual_seed(first_seed)  # of no account
        assert search(again, first_seed, online_ige=True).ige_update == output.ige_update
    assert_same_weights(weights_of(pipe.ige), weights_of(again.ige))


def test_later_searches_ask_the_refined_head(refined: Any, tmp_path: Path) -> None:
    pipe, _ = refined
    pipe.save_pretrained(tmp_path)
    saved = InformationGainEvaluator.from_pretrained(tmp_path / "ige")
    assert_same_weights(weights_of(saved), weights_of(pipe.ige))
    strategy = BestOfN(n=1, evaluations=4, stride_policy="ige:resolved_variance")
    call = {"search": strategy, "compute": None, "nfe_budget": 4}
    by_it, by_the_old = (
        search(MCTDPipeline.from_pipe(pipe, ige=ige), **call) for ige in (saved, tiny.make_ige())
    )
    assert_same_trees(search(pipe, **call), by_it)
    gains = [out.search[0].tree.predicted_gain for out in (by_it, by_the_old)]
    assert not np.array_equal(*gains, equal_nan=True)


def test_images_that_are_validated_on_are_not_learned_from(refined: Any) -> None:
    pipe, _ = refined
    learned, kept = (
        set(part.image.tolist())
        for part in (pipe.ige_refiner.training, pipe.ige_refiner.validation)
    )
    assert learned
    assert kept
    assert not learned & kept


def test_what_is_worse_is_undone() -> None:
    pipe = make_pipe(learning_rate=1.0)  # steps far beyond anything
    before = weights_of(pipe.ige)
    update = search(pipe, online_ige=True).ige_update
    assert not update.is_kept
    assert not update.loss_after <= update.loss_before
    assert_same_weights(weights_of(pipe.ige), before)


def test_the_same_call_again_teaches_nothing() -> None:
    pipe = make_pipe(learning_rate=0.0)
    first = search(pipe, online_ige=True).ige_update
    again = search(pipe, online_ige=True).ige_update
    assert again == (0, first.training, first.validation, None, None, False)


def test_a_search_without_siblings_teaches_nothing() -> None:
    pipe = make_pipe()
    out = search(pipe, online_ige=True, search=BestOfN(n=2), compute=2)
    assert out.ige_update.observed == 0
    assert not out.ige_update.is_kept


def test_any_policy_will_do_and_the_plain_samples_are_left_out() -> None:
    pipe = make_pipe()
    strategy = replace(SEARCH, stride_policy="budget")
    call = {"search": strategy, "compute": 4, "include_plain": True, "return_dict": False}
    call["prompts"] = PROMPTS[:1]
    *_, plain, update = search(pipe, online_ige=True, **call)
    assert plain.rewards
    assert update.observed > 0
    assert len(search(pipe, **call)) == 7


@pytest.mark.parametrize("policy", ["ige", pytest.param("budget", marks=pytest.mark.slow)])
def test_a_saved_call_goes_on_and_then_teaches_as_if_never_stopped(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"search": replace(SEARCH, stride_policy=policy), "online_ige": True}
    whole = make_pipe()
    expected = search(whole, **call)
    assert expected.ige_update.is_kept
    save, saves = CallSaver.save, 0

    def stopping(saver: CallSaver, *arguments: Any) -> None:
        nonlocal saves
        save(saver, *arguments)
        saves += 1
        if saves == 4:
            monkeypatch.setattr(CallSaver, "save", save)
            raise RuntimeError("the process is gone")

    monkeypatch.setattr(CallSaver, "save", stopping)
    stopped = make_pipe()
    with pytest.raises(RuntimeError, match="gone"):
        search(stopped, save_to=tmp_path / "search", save_every_s=0, **call)
    assert_same_weights(weights_of(stopped.ige), weights_of(tiny.make_ige()))
    pipe = make_pipe()
    resumed = pipe.resume(tmp_path / "search")
    assert_same_trees(resumed, expected)
    assert resumed.ige_update == expected.ige_update
    assert_same_weights(weights_of(pipe.ige), weights_of(whole.ige))
    # One that is over comes back without teaching again.
    assert make_pipe().resume(tmp_path / "search").ige_update is None


def test_a_search_by_another_head_is_gone_on_with_under_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make_pipe()
    search(pipe, save_to=tmp_path / "search", prompts=PROMPTS[:1])
    pipe.open_search(tmp_path / "search")
    assert not caplog.records
    with torch.no_grad():
        pipe.ige.head.bias += 1
    pipe.open_search(tmp_path / "search")
    assert "not the one that the search began with" in caplog.text
    caplog.clear()
    search(pipe, save_to=tmp_path / "other", search=MCTD(seed_share=0), prompts=PROMPTS[:1])
    with torch.no_grad():
        pipe.ige.head.bias += 1
    pipe.open_search(tmp_path / "other")  # which asked no head
    assert not caplog.records


# What is refused


def test_without_a_head_there_is_nothing_to_refine(tmp_path: Path) -> None:
    pipe = MCTDPipeline.from_pipe(make_pipe(), ige=None)
    for ask in (lambda: search(pipe, online_ige=True, search=MCTD()), lambda: pipe.ige_refiner):
        with pytest.raises(ConfigError, match="load it with ige="):
            ask()
    with pytest.raises(ConfigError, match="knows no online_ige"):
        search(pipe, search=None, compute=None, rows_per_call=None, online_ige=True)
    call = {"online_ige": True, "search": MCTD(), "prompts": PROMPTS[:1]}
    search(make_pipe(), save_to=tmp_path, **call)
    with pytest.raises(ConfigError, match="load it with ige="):
        pipe.resume(tmp_path)


def test_a_head_for_other_features_is_refused_before_the_search() -> None:
    pipe = make_pipe()
    pipe.ige = InformationGainEvaluator("StableDiffusionPipeline", {"down.7": 3})
    with pytest.raises(ConfigError, match=r"reads features {'down.7': 3}"):
        search(pipe, online_ige=True, search=MCTD())


def test_a_refiner_belongs_to_one_head() -> None:
    pipe = make_pipe()
    with pytest.raises(ConfigError, match="of another head"):
        pipe.ige_refiner = Refiner(tiny.make_ige())
    old = pipe.ige_refiner
    assert pipe.ige_refiner is old
    pipe.ige = copy.deepcopy(pipe.ige)
    assert pipe.ige_refiner is not old
    assert pipe.ige_refiner.settings == RefinementSettings()


def test_processes_do_not_refine_each_its_own() -> None:
    with pytest.raises(ConfigError, match="--from-searches"):
        search_in_processes(make_pipe(), PROMPTS, online_ige=True)

"""Stride policies of a pipeline's call: from its head to the edges of its trees."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.saved_calls import CallSaver
from mctd_diffusers.search.strategies import MCTD, BestOfN
from mctd_diffusers.search.tree import STEP, STRIDE_REASONS, path_to_root, to_json
from tests.pipelines import tiny

PROMPTS = ["a red cat", "two dogs"]
CALL: dict[str, Any] = {
    "num_inference_steps": 8,
    "guidance_scale": 4.0,
    "output_type": "pt",
    "rows_per_call": 2,
}
REASONS = {
    "uniform": {"uniform", "only"},
    "fixed:2": {"fixed", "only"},
    "random": {"random", "only"},
    "ays": {"ays", "only"},
    "gits": {"gits", "only"},
    "x0hat": {"gain", "fallback", "only"},
    "oracle": {"gain", "only"},
    "ige": {"gain", "only"},
    "ige:reward_rate": {"gain", "only"},
    "ige:final_similarity": {"gain", "only"},
    "ige:resolved_variance": {"gain", "only"},
}


@pytest.fixture(scope="module")
def pipe() -> MCTDPipeline:
    parts = {"reward_model": tiny.redness, "ige": tiny.make_ige()}
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def search(pipe: MCTDPipeline, prompts: list[str] = PROMPTS, **call: Any) -> Any:
    generators = seeded(*(3 + PROMPTS.index(prompt) for prompt in prompts))
    return pipe(prompts, generator=generators, **{**CALL, **call})


def reasons_of(tree: Any) -> set[str]:
    steps = np.flatnonzero(tree.move == STEP)
    return {STRIDE_REASONS[reason] for reason in tree.stride_reason[steps]}


@pytest.mark.parametrize("policy", REASONS)
def test_a_plain_sample_takes_its_evaluations_by_the_policy(pipe: Any, policy: str) -> None:
    strategy = BestOfN(n=1, evaluations=4, stride_policy=policy)
    out = search(pipe, search=strategy, nfe_budget=4)
    assert out.nfe == [4, 4]
    for found in out.search:
        assert found.tree.stride.sum() == 8
        assert reasons_of(found.tree) <= REASONS[policy]
    if policy == "oracle":
        assert out.ledger.total.nfe > 8  # its peeks are the call's, and no image's
    else:
        assert out.ledger.total.nfe == 8


@pytest.mark.parametrize(
    "policy",
    [
        "budget",
        *(
            # By which of its predictions a head decides, plain samples tell as well.
            pytest.param(policy, marks=pytest.mark.slow) if policy.startswith("ige:") else policy
            for policy in REASONS
        ),
    ],
)
def test_a_tree_search_keeps_its_budget_by_any_policy(pipe: Any, policy: str) -> None:
    strategy = MCTD(stride_policy=policy, edge_gain=0.5, seed_share=0)  # many edges
    out = search(pipe, PROMPTS[:1], search=strategy, compute=3, num_inference_steps=16)
    assert out.nfe[0] <= 48
    reasons = reasons_of(out.search[0].tree)
    allowed = REASONS.get(policy, {"budget"})
    assert reasons <= allowed
    assert reasons - {"only"}


def test_an_image_does_not_depend_on_the_others(pipe: Any) -> None:
    call = {"search": MCTD(stride_policy="ige"), "compute": 2}
    together = search(pipe, **call)
    for place, prompt in enumerate(PROMPTS):
        alone = search(pipe, [prompt], **call)
        torch.testing.assert_close(alone.images[0], together.images[place], rtol=0, atol=1e-5)
        one, other = alone.search[0].tree, together.search[place].tree
        for name in ("parent", "stride", "stride_reason"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_sample_does_not_depend_on_those_beside_it(pipe: Any) -> None:
    def strides_of(wave_size: int) -> list[list[int]]:
        strategy = BestOfN(n=6, evaluations=5, stride_policy="ige", wave_size=wave_size)
        (found,) = search(pipe, PROMPTS[:1], search=strategy, nfe_budget=30).search
        tree = found.tree
        paths = [path_to_root(tree, sample.node)[-3::-1] for sample in found.finished]
        predicted = [tree.predicted_error[path].round(5).tolist() for path in paths]
        assert len({*map(str, predicted)}) == 6
        return [tree.stride[path].tolist() + of for path, of in zip(paths, predicted, strict=True)]

    np.testing.assert_array_equal(strides_of(1), strides_of(6))


@pytest.mark.parametrize("policy", ["ige", "x0hat", "gits"])
def test_a_search_by_predictions_goes_on_where_it_was_stopped(
    pipe: Any, policy: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"search": MCTD(stride_policy=policy), "compute": 2}
    whole = search(pipe, **call)
    save, saves = CallSaver.save, 0

    def stopping(saver: CallSaver, *arguments: Any) -> None:
        nonlocal saves
        save(saver, *arguments)
        saves += 1
        if saves == 6:
            monkeypatch.setattr(CallSaver, "save", save)
            raise RuntimeError("the process is gone")

    monkeypatch.setattr(CallSaver, "save", stopping)
    with pytest.raises(RuntimeError, match="gone"):
        search(pipe, save_to=tmp_path / "search", save_every_s=0, **call)
    resumed = pipe.resume(tmp_path / "search")
    assert torch.equal(resumed.images, whole.images)
    for found, same in zip(resumed.search, whole.search, strict=True):
        assert to_json(found.tree) == to_json(same.tree)


def test_a_winner_by_predictions_is_made_again_without_them(pipe: Any) -> None:
    out = search(pipe, search=BestOfN(n=2, evaluations=5, stride_policy="ige"), nfe_budget=10)
    without = MCTDPipeline.from_pipe(pipe, ige=None)
    again = without.replay(out.search[0].recipe)
    assert again.nfe == 5
    assert torch.equal(again.latents, out.search[0].latents[_winner(out.search[0])])


def _winner(found: Any) -> int:
    rewards = [sample.reward for sample in found.finished]
    return rewards.index(max(rewards))


# Without a head, and outside what a head knows


def test_without_a_head_the_rule_is_used_and_said(pipe: Any) -> None:
    without = MCTDPipeline.from_pipe(pipe, ige=None)
    with pytest.warns(UserWarning, match="by 'budget': load one with ige="):
        out = search(without, search=MCTD(stride_policy="ige"), compute=2)
    plain = search(without, search=MCTD(), compute=2)
    assert torch.equal(out.images, plain.images)
    with pytest.warns(UserWarning, match="by 'uniform'"):
        search(without, search=BestOfN(evaluations=4, stride_policy="ige"), nfe_budget=4)
    for policy in ("gits", "oracle"):
        with pytest.raises(ConfigError, match=f"{policy!r} plans by what a head learned"):
            search(without, search=MCTD(stride_policy=policy), compute=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in ("ays", "x0hat", "random"):
            search(without, search=MCTD(stride_policy=policy), compute=2)


def test_a_head_falls_back_outside_the_noise_levels_that_it_knows(pipe: Any) -> None:
    head = tiny.make_ige()
    head.register_to_config(log_snr_range=(-2.0, 2.0))
    other = MCTDPipeline.from_pipe(pipe, ige=head)
    strategy = BestOfN(n=1, evaluations=6, stride_policy="ige:final_similarity")
    with pytest.warns(UserWarning, match=r"trained from -2.00 to 2.00"):
        out = search(other, search=strategy, nfe_budget=6)
    assert out.nfe == [6, 6]
    assert "fallback" in reasons_of(out.search[0].tree)


def test_options_of_the_call_set_the_policy(pipe: Any) -> None:
    strategy = MCTD(edge_gain=0.5, seed_share=0)
    out = search(pipe, search=strategy, stride_policy="random", compute=3)
    assert "random" in reasons_of(out.search[0].tree)
    with pytest.raises(ConfigError, match="did you mean 'gits'"):
        search(pipe, search="mctd", stride_policy="git", compute=2)
    with pytest.raises(ConfigError, match="no setting of search 'beam'"):
        search(pipe, search="beam", stride_policy="ige", compute=2)

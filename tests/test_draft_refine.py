"""Draft and refine: how it splits its budget, and what it resumes."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.strategies import BestOfN, DraftRefine, resolve_strategy
from mctd_diffusers.search.strides import constant_strides
from mctd_diffusers.search.tree import DRAW, ROOT, STEP, path_to_root
from tests.toys import PRICES, CountingEnvironment, search, small_environment


def drafts_and_refined(result: SearchResult, num_drafts: int) -> tuple[list[int], list[int]]:
    """Finished nodes in the order of scoring: drafts come first."""
    nodes = [sample.node for sample in result.finished]
    return nodes[:num_drafts], nodes[num_drafts:]


def deterministic(num_steps: int) -> MixtureEnvironment:
    environment = small_environment(1, num_steps)
    environment.eta = 0.0
    return environment


@settings(max_examples=60)
@given(
    draft_stride=st.none() | st.integers(1, 6),
    refine=st.integers(0, 5),
    refine_share=st.sampled_from((0.0, 0.25, 0.5, 1.0)),
    refine_stride=st.integers(1, 3),
    resume_at=st.sampled_from((0.0, 0.3, 0.5, 0.8, 1.0)),
    num_steps=st.integers(1, 18),
    extra=st.integers(0, 60),
)
def test_it_spends_whole_drafts_and_as_many_refined_samples_as_their_share_pays(
    draft_stride: int | None,
    refine: int,
    refine_share: float,
    refine_stride: int,
    resume_at: float,
    num_steps: int,
    extra: int,
) -> None:
    strategy = DraftRefine(
        draft_stride=draft_stride,
        refine=refine,
        refine_share=refine_share,
        refine_stride=refine_stride,
        resume_at=resume_at,
    )
    stride = draft_stride or max(num_steps // 4, 1)
    edges = -(-num_steps // stride)
    assert strategy.least_evaluations(num_steps) == edges
    nfe = edges + extra

    kept = min(math.floor(resume_at * num_steps) // stride, edges - 1)
    refined_edges = -(-(num_steps - kept * stride) // refine_stride)
    num_refined = 0
    if refined_edges > edges - kept:  # else nothing is finer
        each = refined_edges - 1
        by_share = math.floor(refine_share * nfe / each)
        num_refined = min(refine, by_share, nfe // (each + edges))
    num_drafts = (nfe - num_refined * (refined_edges - 1)) // edges

    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    tree = result.tree
    assert (tree.move == DRAW).sum() == num_drafts
    assert len(result.finished) == num_drafts + num_refined
    assert result.spent.nfe == num_drafts * edges + num_refined * (refined_edges - 1)
    assert nfe - result.spent.nfe < edges  # what is left pays for no draft
    assert result.spent.decodes == result.spent.reward_calls == num_drafts + num_refined
    assert result.spent.previews == 0
    assert tree.visit_count[ROOT] == num_drafts + num_refined
    assert tree.max_value[ROOT] == np.nanmax(tree.reward)


@settings(max_examples=30)
@given(
    num_drafts=st.integers(2, 6),
    refine=st.integers(1, 2),
    resume_at=st.sampled_from((0.0, 0.25, 0.6, 0.9)),
)
def test_it_resumes_the_best_drafts_from_their_stored_states(
    num_drafts: int, refine: int, resume_at: float
) -> None:
    kept = int(4 * resume_at)
    each = 16 - 4 * kept - 1
    strategy = DraftRefine(refine=refine, refine_share=1.0, resume_at=resume_at)
    nfe = 4 * num_drafts + refine * each
    (result,) = search(strategy, small_environment(1, 16), nfe=nfe)
    tree = result.tree
    drafts, refined = drafts_and_refined(result, num_drafts)
    assert len(refined) == refine
    best = sorted(drafts, key=lambda leaf: -tree.reward[leaf])[:refine]
    for draft, leaf in zip(best, refined, strict=True):
        path = path_to_root(tree, leaf)
        (resumed,) = set(path) & {
            node for node in path_to_root(tree, draft) if tree.step_index[node] == 4 * kept
        }
        below = path[: path.index(resumed)]
        assert tree.stride[below].tolist() == [1] * (16 - 4 * kept)
        assert len(tree.children(resumed)) == 2


def test_a_refined_sample_of_a_deterministic_sampler_is_the_plain_sample_of_its_noise() -> None:
    environment = deterministic(8)
    strategy = DraftRefine(refine=3, refine_share=1.0, resume_at=0.0)
    (result,) = search(strategy, environment, nfe=3 * 4 + 3 * 7)
    (plain,) = search(BestOfN(), deterministic(8), nfe=3 * 8)
    _, refined = drafts_and_refined(result, 3)
    np.testing.assert_allclose(
        sorted(result.tree.reward[refined]), sorted(sample.reward for sample in plain.finished)
    )


def test_drafts_are_the_best_of_n_of_few_steps() -> None:
    (drafted,) = search(DraftRefine(refine=0), small_environment(1, 16), nfe=33)
    (plain,) = search(BestOfN(stride=4), small_environment(1, 16), nfe=33)
    np.testing.assert_allclose(
        [sample.reward for sample in drafted.finished],
        [sample.reward for sample in plain.finished],
        rtol=1e-12,
    )


def test_more_drafts_leave_the_first_ones_as_they_were() -> None:
    few, many = (
        search(DraftRefine(wave_size=wave), small_environment(1, 16), nfe=nfe)[0]
        for wave, nfe in ((3, 40), (8, 120))
    )
    first, _ = drafts_and_refined(few, 4)
    same, _ = drafts_and_refined(many, 4)
    np.testing.assert_allclose(few.tree.reward[first], many.tree.reward[same], rtol=1e-12)


def test_refined_samples_are_denoised_in_one_batch() -> None:
    environment = small_environment(1, 16, make=CountingEnvironment)
    assert isinstance(environment, CountingEnvironment)
    search(DraftRefine(refine=3, wave_size=8), environment, nfe=128)
    sizes = [size for kind, size in environment.sizes if kind == "denoise"]
    assert sizes[-11:] == [3] * 11  # twelve edges from a quarter down, the first state evaluated


def test_a_budget_in_cost_is_shared_out_with_decodes_and_rewards() -> None:
    environment = small_environment(1, 16, prices=PRICES)
    each_draft = 4 + PRICES.decode + PRICES.reward_call
    each_refined = 11 + PRICES.decode + PRICES.reward_call
    (result,) = search(DraftRefine(refine=9), environment, nfe=None, cost=100.0)
    num_drafts = int((result.tree.move == DRAW).sum())
    num_refined = len(result.finished) - num_drafts
    assert num_refined == math.floor(0.5 * 100 / each_refined)
    assert num_drafts == math.floor((100 - num_refined * each_refined) / each_draft)
    assert environment.ledger.cost <= 100


def test_states_that_no_finer_steps_leave_are_not_resumed() -> None:
    for num_steps in (1, 2, 3, 7):  # a draft of stride 1 is a plain sample
        (result,) = search(DraftRefine(), small_environment(1, num_steps), nfe=60)
        assert len(result.tree.children(ROOT)) == len(result.finished)
    assert constant_strides(7, 1) == tuple(
        result.tree.stride[result.tree.move == STEP][:: len(result.finished)]
    )


def test_the_published_name_is_its_own_settings() -> None:
    assert resolve_strategy("flash-bon") == DraftRefine()

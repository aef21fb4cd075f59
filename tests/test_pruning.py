"""Pruning: what cannot win is given up, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Gains, Handles, Release, Request
from mctd_diffusers.search.log import SearchLog
from mctd_diffusers.search.pruning import (
    UNUSED,
    Savings,
    beaten_particles,
    calibration_at,
    can_tell_apart,
    expected_improvement,
    incumbent,
    is_hopeless,
    lacks_more,
    least_valuable,
    pair_accuracy,
    parse_pruning,
    pays_another,
    pruned_ends,
    still_resolved,
)
from mctd_diffusers.search.runner import SearchResult, Wave, rebuild, replay, run_search
from mctd_diffusers.search.strategies import MCTD
from mctd_diffusers.search.tree import (
    DRAW,
    ROOT,
    STEP,
    Fusion,
    Tree,
    add_child,
    add_fused,
    backup,
    from_json,
    prune_alone,
    record_evaluated,
    record_rewards,
    record_values,
    reroot,
    to_json,
)
from tests.by_hand import step_by_hand
from tests.strategies import pruning_mctds
from tests.toys import guided_environment, problems_of, search, two_levels


def grown(values: list[float], rewards: list[float], *, step_index: int = 2) -> Tree:
    """A tree of valued nodes below the root, below the first of which a sample is finished."""
    tree = Tree(1)
    for value, _ in zip(values, range(len(values)), strict=True):
        handle = tree.num_nodes
        add_child(
            tree, ROOT, handle=handle, step_index=step_index, move=DRAW, stride=0, eta=None, seed=0
        )
        record_evaluated(tree, np.array([handle]))
        record_values(tree, np.array([handle]), np.array([value]))
    for parent, reward in enumerate(rewards, 1):
        handle = tree.num_nodes
        leaf = add_child(
            tree, parent, handle=handle, step_index=4, move=STEP, stride=2, eta=None, seed=0
        )
        record_rewards(tree, np.array([handle]), np.array([reward]))
        backup(tree, leaf, reward)
    return tree


def pruned_search(num_steps: int = 8, nfe: int = 100, **changes: object) -> SearchResult:
    """A search that prunes, with guidance to choose."""
    strategy = MCTD(**{"pruning": "all", **changes})  # type: ignore[arg-type]  # of any type, or wrong
    (result,) = search(strategy, guided_environment(1, num_steps), nfe=nfe)
    return result


# ---- rules


def test_rules_are_named() -> None:
    assert parse_pruning("none") == ()
    assert parse_pruning("all") == ("bounds", "siblings", "memory", "particles")
    for wrong in ("", "bound", "bounds+bounds", "bounds,memory"):
        with pytest.raises(ConfigError, match="joined by"):
            MCTD(pruning=wrong)


def test_values_are_calibrated_by_what_came_of_them() -> None:
    tree = grown([0.0, 1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0, 4.2])
    found = calibration_at(tree, 2)
    assert found is not None
    residuals = np.array([1.0, 1.0, 1.0, 1.2])
    assert found.shift == pytest.approx(residuals.mean())
    variance = (np.var([1.0, 2.0, 3.0, 4.2]) + ((residuals - 1.05) ** 2).sum()) / 4
    assert found.deviation == pytest.approx(math.sqrt(variance * 1.25))
    assert found.accuracy == 1
    assert calibration_at(tree, 1) is None  # noisier than what is known
    assert calibration_at(tree, 3) == found  # less noisy, so it errs on the safe side
    assert calibration_at(grown([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), 2) is None


def test_what_lies_under_the_incumbent_by_its_upper_bound_is_hopeless() -> None:
    tree = grown([0.0, 1.0, 2.0, 3.0, 4.0, -9.0, 3.5], [0.0, 1.0, 2.0, 3.0, 4.0])
    assert incumbent(tree) == 4
    assert is_hopeless(tree, 6, num_steps=4, confidence=2)
    assert not is_hopeless(tree, 7, num_steps=4, confidence=2)
    assert not is_hopeless(tree, 6, num_steps=4, confidence=50)


def test_no_bound_prunes_where_values_put_samples_in_the_wrong_order() -> None:
    tree = grown([0.0, 1.0, 2.0, 3.0, -9.0], [3.0, 2.0, 1.0, 0.0])
    assert pair_accuracy(np.arange(4.0), np.arange(4.0)[::-1]) == 0
    assert math.isnan(pair_accuracy(np.arange(2.0), np.zeros(2)))
    assert not is_hopeless(tree, 5, num_steps=4, confidence=0)


def test_samples_are_told_apart_by_the_threshold_of_lpo() -> None:
    values = np.array([-1.0, 1.0])  # standard deviation 2 ** 0.5
    for step_index, threshold in ((0, 0.5), (4, 0.35)):
        edge = 2.059 * math.sqrt(2) / (2 * math.atanh(threshold))
        for deviation, told in ((0.99 * edge, True), (1.01 * edge, False)):
            found = can_tell_apart(values, deviation, step_index=step_index, num_steps=4)
            assert found == told
    assert not can_tell_apart(values[:1], 1.0, step_index=4, num_steps=4)


def test_expected_improvement_is_that_of_normal_draws() -> None:
    values = np.array([0.2, -0.4, 0.9, 0.1])
    draws = np.random.default_rng(0).normal(values.mean(), values.std(ddof=1), 400_000)
    measured = np.maximum(draws - values.max(), 0).mean()
    assert expected_improvement(values) == pytest.approx(measured, abs=2e-3)
    assert expected_improvement(np.ones(3)) == 0


def test_siblings_are_tried_as_long_as_one_more_may_gain() -> None:
    tree = grown([0.0, 1.0, 2.0, 3.0], [])
    assert pays_another(tree, [1, 2, 3, 4], least_gain=0.02)
    assert not pays_another(tree, [1, 2, 3, 4], least_gain=0.5)
    wide = grown([0.0, 0.1, 0.2, 0.3], [0.0, 10.0, 20.0, 30.0])  # the siblings are all alike
    assert not pays_another(wide, [1, 2, 3, 4], least_gain=0.02)


def test_what_is_still_resolved_goes_on_from_the_longest_known_jump() -> None:
    log_variance = np.log([1.0, 4.0, math.nan])
    assert still_resolved(log_variance, [1, 2, 4], 8) == pytest.approx(math.sqrt(4 * 8 / 2))
    assert still_resolved(log_variance[2:], [4], 8) == math.inf
    tree = grown([0.0, 1.0, 2.0, 3.0, -1.0], [0.0, 1.0, 2.0, 3.0])
    assert lacks_more(tree, 5, 1.0, confidence=3.9)
    assert not lacks_more(tree, 5, 1.0, confidence=4.1)
    assert not lacks_more(grown([0.0], []), 1, 0.0, confidence=1)


def test_the_least_valuable_samples_go_first() -> None:
    tree = grown([5.0, 1.0, 3.0, 2.0], [0.5])
    savings = Savings()
    savings.hold([2])
    assert least_valuable(tree, savings, num_steps=4, most=4) == []
    assert least_valuable(tree, savings, num_steps=4, most=2) == [4, 3]
    # The best finished sample's path and what is under way stay, however little may.
    assert least_valuable(tree, savings, num_steps=4, most=1) == [4, 3]
    savings.let_go([2])
    assert least_valuable(tree, savings, num_steps=4, most=2) == [2, 4]


def test_particles_go_when_what_they_fused_into_is_better() -> None:
    tree, nodes = two_levels()
    first, second, *leaves = nodes
    fused = add_fused(tree, Fusion((first, second), (0.5, 0.5), "x0"), handle=9, seed=0)
    backup(tree, leaves[0], 1.0)
    assert beaten_particles(tree) == []
    backup(tree, fused, 2.0)
    assert beaten_particles(tree) == [second]  # a sample is finished below the first


# ---- trees


def test_pruned_rows_are_kept_with_the_rule() -> None:
    tree, nodes = two_levels()
    assert prune_alone(tree, [nodes[0]], rule="memory") == [0]
    assert prune_alone(tree, [nodes[0], nodes[1]], rule="bounds") == [1]
    assert [tree.pruned_by(node) for node in nodes[:3]] == ["memory", "bounds", None]
    again = from_json(to_json(tree))
    assert to_json(again) == to_json(tree)
    assert again.pruned_by(nodes[1]) == "bounds"
    assert reroot(tree, nodes[0]).pruned_by(ROOT) == "memory"
    assert pruned_ends(tree).tolist() == []  # something was made from both


# ---- searches


def statistics(tree: Tree) -> dict[str, np.ndarray]:
    """What the finished samples of a tree make of its nodes."""
    again = from_json(to_json(tree))
    visits = np.zeros(tree.num_nodes, dtype=np.int64)
    total, most = np.zeros(tree.num_nodes), np.full(tree.num_nodes, -np.inf)
    for leaf in np.flatnonzero(np.isfinite(again.reward)).tolist():
        node, reward = leaf, float(again.reward[leaf])
        while node >= 0:
            visits[node] += 1
            total[node] += reward
            most[node] = max(most[node], reward)
            node = int(again.parent[node])
    return {"visit_count": visits, "total_value": total, "max_value": most}


@settings(max_examples=15)
@given(pruning_mctds, st.integers(4, 8), st.integers(8, 80))
def test_pruning_changes_no_statistics_of_what_remains(
    strategy: MCTD, num_steps: int, nfe: int
) -> None:
    environment = guided_environment(1, num_steps)
    (result,) = search(strategy, environment, nfe=max(nfe, num_steps))
    tree = result.tree
    for name, column in statistics(tree).items():
        np.testing.assert_allclose(getattr(tree, name), column, rtol=1e-9, atol=1e-9)
    assert not tree.in_flight.any()
    assert result.best is not None
    assert tree.live[[sample.node for sample in result.finished]].all()
    assert result.spent.nfe <= max(nfe, num_steps)
    for node in range(1, tree.num_nodes):
        assert (tree.pruned_by(node) is None) == bool(tree.live[node])
        if tree.live[node]:
            environment.latents(tree.handle[[node]])
    np.testing.assert_array_equal(from_json(to_json(tree)).live, tree.live)


@settings(max_examples=5)
@given(pruning_mctds, st.integers(20, 60))
def test_a_search_that_prunes_is_rebuilt_from_its_replies(strategy: MCTD, nfe: int) -> None:
    environment = guided_environment(1, 6)
    problems, log = problems_of(environment, Budget(nfe=nfe), strategy=strategy), SearchLog()
    (result,) = run_search(strategy, environment, problems, log=log)
    (fresh,) = problems_of(environment, Budget(nfe=nfe), strategy=strategy)
    assert replay(strategy, fresh, result.replies) is None
    assert to_json(fresh.tree) == to_json(result.tree)
    (again,) = rebuild(strategy, problems_of(environment, Budget(nfe=nfe), strategy=strategy), log)
    assert to_json(again.tree) == to_json(result.tree)
    released = {answer_handle for answer_handle in result.tree.handle[~result.tree.live].tolist()}
    assert not released & set(log.live_handles().tolist())


def requests_of(strategy: MCTD, environment: MixtureEnvironment, nfe: int) -> Iterator[Request]:
    """All requests of a search."""
    (problem,) = problems_of(environment, Budget(nfe=nfe), strategy=strategy)
    for request, _ in step_by_hand(strategy, problem, environment):
        yield request


def test_a_search_without_rules_releases_nothing() -> None:
    requests = requests_of(MCTD(), guided_environment(1, 8), 100)
    assert not any(isinstance(request, Release) for request in requests)


def test_what_is_saved_is_not_spent() -> None:
    (whole,) = search(MCTD(), guided_environment(1, 16), nfe=256)
    pruned = pruned_search(16, 256)
    assert whole.stop_reason == "budget"
    assert pruned.stop_reason == "exhausted"
    assert pruned.spent.nfe < whole.spent.nfe
    assert pruned.spent.decodes < 0.7 * whole.spent.decodes
    assert {pruned.tree.pruned_by(node) for node in pruned_ends(pruned.tree).tolist()} >= {
        "bounds",
        "siblings",
    }
    assert UNUSED in {pruned.tree.pruned_by(node) for node in range(pruned.tree.num_nodes)}


def test_live_samples_are_at_most_half_as_many() -> None:
    def peak(strategy: MCTD) -> int:
        environment = guided_environment(1, 16)
        problems = problems_of(environment, Budget(nfe=256), strategy=strategy)
        live: list[int] = []

        def on_wave(wave: Wave) -> None:
            del wave
            tree = problems[0].tree
            live.append(int((tree.live & tree.evaluated).sum()))

        run_search(strategy, environment, problems, on_wave=on_wave)
        return max(live)

    assert peak(MCTD(pruning="all")) <= peak(MCTD()) / 2


class KnowingEnvironment(MixtureEnvironment):
    """Foresees that nothing is resolved any more."""

    def predict_gain(self, handles: Handles, strides: object) -> Gains:
        """Next to no variance for any jump."""
        assert isinstance(strides, tuple)
        nothing = np.full((len(handles), len(strides)), -40.0)
        return Gains(nothing, nothing, nothing, nothing)


def test_a_gain_model_prunes_what_it_expects_nothing_of() -> None:
    environment = guided_environment(1, 16)
    environment.__class__ = KnowingEnvironment
    (result,) = search(MCTD(pruning="gain"), environment, nfe=256)
    rules = [result.tree.pruned_by(node) for node in pruned_ends(result.tree).tolist()]
    assert set(rules) == {"gain"}


class StoppedError(Exception):
    """Ends a search as a killed process does."""


@pytest.mark.parametrize("waves", [6, 14, 24])
def test_a_search_that_prunes_goes_on_as_if_it_had_not_stopped(waves: int) -> None:
    strategy = MCTD(pruning="all", max_live=8)
    (whole,) = search(strategy, guided_environment(1, 8), nfe=100)
    world = guided_environment(1, 8)
    log, seen = SearchLog(), []

    def on_wave(wave: Wave) -> None:
        seen.append(wave)
        if len(seen) == waves:
            raise StoppedError

    problems = problems_of(world, Budget(nfe=100), strategy=strategy)
    with pytest.raises(StoppedError):
        run_search(strategy, world, problems, log=log, on_wave=on_wave)
    handles = log.live_handles()
    assert len(handles) < log.num_handles
    again = guided_environment(1, 8)
    again.restore(world.export(handles), handles, num_handles=log.num_handles)
    problems = problems_of(again, Budget(nfe=100), strategy=strategy)
    (result,) = run_search(strategy, again, problems, log=log)
    assert to_json(result.tree) == to_json(whole.tree)
    assert result.spent == whole.spent


def test_a_search_out_of_time_completes_a_sample_of_what_is_live() -> None:
    environment = guided_environment(1, 8)
    strategy = MCTD(pruning="memory", max_live=1, seed_share=0.6)
    times = iter(range(1000))
    (result,) = run_search(
        strategy,
        environment,
        problems_of(environment, Budget(nfe=100), strategy=strategy),
        seconds=3,
        clock=lambda: float(next(times)),
    )
    assert result.stop_reason == "time"
    assert len(result.finished) == 1
    assert not result.tree.live.all()

"""Stride policies: names, what crosses a schedule, dynamic programming, and choices of searches."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError, ScheduleError
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Gains, Handles
from mctd_diffusers.search.log import SearchLog
from mctd_diffusers.search.runner import SearchResult, run_search
from mctd_diffusers.search.saving import load_search
from mctd_diffusers.search.strategies import MCTD, BestOfN
from mctd_diffusers.search.stride_policies import (
    TARGETS,
    StrideChoice,
    StridePolicy,
    Target,
    admissible_strides,
    check_edges,
    choose_by_gains,
    choose_stride,
    cost_to_go,
    gain_costs,
    nearest_stride,
    parse_stride_policy,
    without_last_edge,
)
from mctd_diffusers.search.strides import plan_rollout
from mctd_diffusers.search.tree import STEP, STRIDE_REASONS, path_to_root
from tests.strategies import CHOOSING_POLICIES, best_of_n_by_policy
from tests.test_saving import save
from tests.toys import guided_environment, problems_of, search, small_environment, stride_costs_of

stride_sets = st.sampled_from(((1,), (1, 2), (1, 2, 4, 8), (1, 3), (2, 3), (4, 1, 2)))


def cuts_of(strides: Sequence[int], num_steps: int, edges: int) -> list[tuple[int, ...]]:
    """Every way to cross, tried one by one."""
    tried = itertools.product(sorted(strides), repeat=edges)
    return [cut for cut in tried if sum(cut) == num_steps]


# ---- names


def test_policies_are_found_by_their_names() -> None:
    for name in CHOOSING_POLICIES:
        policy = parse_stride_policy(name, target="resolved_variance", plans=False)
        assert not policy.is_planned
        assert policy.needs_costs == (policy.kind in ("ays", "gits", "x0hat", "oracle", "ige"))
    for target in TARGETS:
        assert parse_stride_policy(f"ige:{target}", target="reward_rate", plans=True) == (
            StridePolicy("ige", target=target)
        )
        assert parse_stride_policy("oracle", target=target, plans=True).target == target
    assert parse_stride_policy("x0hat", target="reward_rate", plans=True).target == (
        "truncation_error"
    )
    assert parse_stride_policy("budget", target="reward_rate", plans=True).is_planned


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("igee", "did you mean 'ige'"),
        ("IGE", "did you mean 'ige'"),
        ("ige:truncation", "did you mean 'ige:truncation_error'"),
        ("unifrom", "did you mean 'uniform'"),
        ("fixed", "did you mean 'fixed:k'"),
        ("fixed:0", "did you mean 'fixed:k'"),
        ("fixed:-2", "did you mean 'fixed:k'"),
        ("fixed:k", "fixed:k"),
        ("coarse_to_fine", "give one of budget, fine_to_coarse"),
        ("zzz", "give one of budget, fine_to_coarse, constant, uniform"),
    ],
)
def test_a_wrong_policy_is_answered_with_the_nearest(wrong: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"stride_policy is {wrong!r}; .*{hint}"):
        MCTD(stride_policy=wrong)


def test_only_searches_that_plan_know_the_shapes_of_plans() -> None:
    with pytest.raises(ConfigError, match=r"stride_policy is 'budget'; give one of uniform"):
        BestOfN(evaluations=4, stride_policy="budget")


# ---- what crosses a schedule


@given(stride_sets, st.integers(1, 9), st.integers(1, 6))
def test_admissible_strides_are_the_first_of_all_ways_to_cross(
    strides: tuple[int, ...], left: int, edges: int
) -> None:
    cuts = cuts_of(strides, left, edges)
    assert admissible_strides(strides, left, edges) == tuple(sorted({cut[0] for cut in cuts}))
    if not cuts:
        with pytest.raises(ScheduleError, match=rf"^{edges} edges .* cross exactly {left} steps"):
            check_edges(strides, left, edges)


@given(st.integers(1, 60), st.data())
def test_even_cuts_have_two_lengths_at_most(num_steps: int, data: st.DataObject) -> None:
    edges = data.draw(st.integers(1, num_steps))
    left, cut = num_steps, []
    for rest in range(edges, 0, -1):
        options = admissible_strides(tuple(range(1, num_steps + 1)), left, rest)
        cut.append(nearest_stride(options, left / rest))
        left -= cut[-1]
    assert left == 0
    assert set(cut) <= {num_steps // edges, -(-num_steps // edges)}


# ---- dynamic programming


@settings(max_examples=60)
@given(stride_sets, st.integers(1, 7), st.data())
def test_dynamic_programming_is_brute_force(
    strides: tuple[int, ...], num_steps: int, data: st.DataObject
) -> None:
    cost = st.floats(-5, 5) | st.just(math.inf)
    row = st.tuples(*[cost] * len(strides))
    costs = data.draw(st.tuples(*[row] * num_steps))
    to_go = cost_to_go(costs, strides, num_steps)

    def cost_of(start: int, cut: Sequence[int]) -> float:
        total = 0.0
        for stride in cut:
            total += costs[start][strides.index(stride)]
            start += stride
        return total

    for start in range(num_steps):
        for edges in range(1, num_steps + 1):
            cuts = cuts_of(strides, num_steps - start, edges)
            best = min((cost_of(start, cut) for cut in cuts), default=math.inf)
            assert to_go[start, edges] == pytest.approx(best)
            if cuts:
                chosen = choose_stride(
                    costs[start],
                    to_go,
                    strides=strides,
                    admissible=admissible_strides(strides, num_steps - start, edges),
                    step_index=start,
                    edges=edges,
                )
                assert (chosen is None) == (best == math.inf)
                after = [cost_of(start, cut) for cut in cuts if cut[0] == chosen]
                assert chosen is None or min(after) == pytest.approx(best)
    assert to_go[num_steps, 0] == 0


def test_predictions_are_costs_in_the_units_of_their_target() -> None:
    gains = Gains(*(np.array([[part]]) for part in (0.5, math.log(4), 0.9, math.log(0.1))))
    found = {target: gain_costs(gains, target)[0, 0] for target in TARGETS}
    assert found == pytest.approx(
        {
            "reward_rate": -0.5,
            "resolved_variance": -2.0,
            "final_similarity": -0.9,
            "truncation_error": 0.1,
        }
    )


def gains_of(errors: Sequence[float], gain: float = 0.0) -> Gains:
    """Predictions for one sample that differ in their errors."""
    with np.errstate(divide="ignore"):
        return Gains(*np.full((3, len(errors)), gain), np.log(errors))


def chosen_by(gains: Gains, *, target: Target, tolerance: float) -> StrideChoice | None:
    """The first of three edges over eight steps, where the rest costs its square."""
    strides = (1, 2, 4)
    costs = tuple(
        tuple(float(k**2) if start + k <= 8 else math.inf for k in strides) for start in range(8)
    )
    fit = admissible_strides(strides, 8, 3)
    return choose_by_gains(
        Gains(*(row[[strides.index(stride) for stride in fit]] for row in gains)),
        cost_to_go(costs, strides, 8),
        target=target,
        strides=fit,
        step_index=0,
        edges=3,
        error_tolerance=tolerance,
    )


def test_the_lowest_sum_of_the_jump_and_the_rest_wins_unless_it_errs_too_much() -> None:
    assert admissible_strides((1, 2, 4), 8, 3) == (2, 4)
    # After 2 the rest is 2 + 4 or 4 + 2, 20 in all; after 4 it is 2 + 2, 8.
    free = chosen_by(gains_of([0, 1, 5]), target="truncation_error", tolerance=math.inf)
    assert free == StrideChoice(4, "gain", pytest.approx(-5), pytest.approx(5))
    dear = chosen_by(gains_of([0, 1, 15]), target="truncation_error", tolerance=math.inf)
    assert dear == StrideChoice(2, "gain", pytest.approx(-1), pytest.approx(1))
    tight = chosen_by(gains_of([0, 1, 5]), target="truncation_error", tolerance=4)
    assert tight == StrideChoice(2, "tolerance", pytest.approx(-1), pytest.approx(1))
    # The shortest that fits is taken whatever its error.
    tighter = chosen_by(gains_of([0, 1, 5]), target="truncation_error", tolerance=0)
    assert tighter == tight
    other = chosen_by(gains_of([0, 1, 5], gain=3.0), target="reward_rate", tolerance=math.inf)
    assert other == StrideChoice(4, "gain", 3.0, pytest.approx(5))


def test_what_is_not_predicted_is_not_chosen_by() -> None:
    unknown = gains_of([0, 1, math.nan])
    assert chosen_by(unknown, target="truncation_error", tolerance=math.inf) is None
    # An unknown error beside a known gain is not above any tolerance.
    known = chosen_by(unknown, target="final_similarity", tolerance=4)
    assert known is not None
    assert known.stride == 4


# ---- best of n


def steps_of(result: SearchResult, node: int) -> list[int]:
    """Strides on the way to a finished sample."""
    return result.tree.stride[path_to_root(result.tree, node)[-3::-1]].tolist()


def reasons_of(result: SearchResult) -> set[str]:
    """Why the edges of a tree have their strides."""
    steps = result.tree.move == STEP
    return {STRIDE_REASONS[reason] for reason in result.tree.stride_reason[steps]}


@settings(max_examples=40)
@given(best_of_n_by_policy, st.integers(1, 12), st.integers(1, 30))
def test_every_sample_takes_exactly_its_evaluations(
    strategy: BestOfN, num_steps: int, nfe: int
) -> None:
    edges = strategy.least_evaluations(num_steps)
    assert edges == min(strategy.evaluations or 0, num_steps)
    (result,) = search(strategy, small_environment(1, num_steps), nfe=max(nfe, edges))
    for sample in result.finished:
        cut = steps_of(result, sample.node)
        assert len(cut) == edges
        assert sum(cut) == num_steps
    assert result.spent.nfe == edges * len(result.finished)
    assert np.isnan(result.tree.eta).all()


@pytest.mark.parametrize("policy", CHOOSING_POLICIES)
def test_the_tree_records_why(policy: str) -> None:
    strategy = BestOfN(n=4, evaluations=4, stride_policy=policy)
    (result,) = search(strategy, small_environment(1, 12), nfe=16)
    parsed = strategy.policy
    reason = "gain" if parsed.target else parsed.kind
    assert reason in reasons_of(result) <= {reason, "only"}
    tree = result.tree
    predicted = tree.stride_reason == STRIDE_REASONS.index("gain")
    assert np.isfinite(tree.predicted_gain).tolist() == predicted.tolist()
    assert np.isfinite(tree.predicted_error).tolist() == predicted.tolist()
    if parsed.target == "truncation_error":
        np.testing.assert_array_equal(tree.predicted_gain, -tree.predicted_error)


def test_strides_of_the_samples_of_a_wave_are_their_own() -> None:
    strategy = BestOfN(n=8, evaluations=4, stride_policy="random")
    (result,) = search(strategy, small_environment(1, 12), nfe=32)
    cuts = [tuple(steps_of(result, sample.node)) for sample in result.finished]
    assert len(set(cuts)) > 4
    (narrow,) = search(dataclasses.replace(strategy, wave_size=1), small_environment(1, 12), nfe=32)
    assert [tuple(steps_of(narrow, sample.node)) for sample in narrow.finished] == cuts


def test_random_strides_are_even_among_those_that_fit() -> None:
    strategy = BestOfN(n=300, evaluations=2, stride_policy="random", wave_size=300)
    (result,) = search(strategy, small_environment(1, 7), nfe=600)
    firsts = np.bincount([steps_of(result, s.node)[0] for s in result.finished], minlength=7)
    assert firsts[0] == 0
    # Six classes of 50 expected: chi-squared of five degrees is below 20.5 in 999 cases of 1000.
    assert ((firsts[1:] - 50) ** 2 / 50).sum() < 20.5


def test_strides_can_be_bounded() -> None:
    strategy = BestOfN(n=2, evaluations=5, stride_policy="fixed:4", strides=(1, 2, 4))
    (result,) = search(strategy, small_environment(1, 12), nfe=10)
    assert steps_of(result, result.finished[0].node) == [4, 4, 2, 1, 1]
    with pytest.raises(ScheduleError, match=r"2 edges .* cannot cross exactly 12 steps; take 3, 4"):
        BestOfN(evaluations=2, strides=(1, 2, 4)).least_evaluations(12)
    with pytest.raises(ScheduleError, match=r"strides are \(2, 0\)"):
        BestOfN(evaluations=2, strides=(2, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride_policy": "ige"}, "evaluations is None; give the evaluations"),
        ({"strides": (1, 2)}, "evaluations is None; give the evaluations"),
        ({"evaluations": 4, "stride": 2}, "evaluations is 4 and stride 2; give one"),
        ({"evaluations": 0}, "evaluations is 0; "),
        ({"evaluations": 4, "error_tolerance": -1.0}, "error_tolerance is -1.0; "),
        ({"evaluations": 4, "stride_policy": "beam"}, "stride_policy is 'beam'; "),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        BestOfN(**options)


# ---- costs of the typical sample


class SilentEnvironment(MixtureEnvironment):
    """Predicts nothing for initial noise, like a rule that compares with the parent."""

    def predict_gain(self, handles: Handles, strides: Sequence[int]) -> Gains:
        gains = super().predict_gain(handles, strides)
        is_new = self._step_index[handles] == 0
        return Gains(*(np.where(is_new[:, None], np.nan, part) for part in gains))


@pytest.mark.parametrize("strategy", [BestOfN(evaluations=4, stride_policy="ige"), MCTD(
    stride_policy="ige")])  # fmt: skip
def test_without_a_prediction_the_typical_costs_decide(strategy: BestOfN | MCTD) -> None:
    (result,) = search(strategy, small_environment(1, 12, make=SilentEnvironment), nfe=48)
    tree = result.tree
    reasons = np.array(STRIDE_REASONS)[tree.stride_reason]
    first = (tree.move == STEP) & (tree.step_index[tree.parent] == 0)
    assert set(reasons[first]) == {"fallback"}
    assert "gain" in reasons
    assert np.isnan(tree.predicted_gain[first]).all()


def test_costs_that_forbid_all_leave_an_even_cut() -> None:
    strategy = BestOfN(n=1, evaluations=3, stride_policy="ays")
    environment = small_environment(1, 6)
    (problem,) = problems_of(environment, Budget(nfe=3))
    problem = dataclasses.replace(problem, stride_costs=((math.inf,) * 6,) * 6)
    (result,) = run_search(strategy, environment, [problem])
    assert steps_of(result, result.finished[0].node) == [2, 2, 2]
    assert reasons_of(result) == {"fallback", "only"}


@pytest.mark.parametrize("policy", ["ays", "gits", "x0hat", "oracle", "ige"])
@pytest.mark.parametrize("kind", [MCTD, BestOfN])
def test_a_policy_without_its_costs_is_refused_with_the_cure(kind: Any, policy: str) -> None:
    options = {"evaluations": 4} if kind is BestOfN else {}
    environment = small_environment(1, 8)
    problems = problems_of(environment, Budget(nfe=40))
    with pytest.raises(ConfigError, match=rf"{policy!r} needs .* pass ige=\.\.\."):
        run_search(kind(stride_policy=policy, **options), environment, problems)
    assert environment.ledger.total.nfe == 0


def test_costs_that_do_not_fit_are_refused() -> None:
    environment = small_environment(1, 8)
    (problem,) = problems_of(environment, Budget(nfe=40))
    with pytest.raises(ConfigError, match=r"7 rows of \[2\] strides, .* 8 steps"):
        dataclasses.replace(problem, stride_costs=((1.0, 2.0),) * 7)
    with pytest.raises(ConfigError, match="NaN or minus infinity"):
        dataclasses.replace(problem, stride_costs=((math.nan,),) * 8)
    problem = dataclasses.replace(problem, stride_costs=((1.0, 2.0, 3.0),) * 8)
    with pytest.raises(ConfigError, match=r"of 3 strides, and the search takes 2 \(1, 2\)"):
        run_search(MCTD(stride_policy="gits"), environment, [problem])


def test_costs_are_saved_with_the_search(tmp_path: Any) -> None:
    strategy = BestOfN(n=2, evaluations=3, stride_policy="ige", error_tolerance=0.5)
    environment = small_environment(1, 6)
    problems = problems_of(environment, Budget(nfe=6), strategy=strategy)
    assert math.inf in itertools.chain(*(problems[0].stride_costs or ()))
    log = SearchLog()
    (result,) = run_search(strategy, environment, problems, log=log)
    save(tmp_path, strategy, environment, problems, log)
    saved = load_search(tmp_path)
    assert saved.problems == tuple(problems)
    assert saved.strategy == strategy
    (again,) = saved.results()
    np.testing.assert_array_equal(again.tree.predicted_error, result.tree.predicted_error)
    np.testing.assert_array_equal(again.tree.stride_reason, result.tree.stride_reason)


# ---- mctd


@pytest.mark.parametrize("policy", ["budget", "fine_to_coarse", "constant", *CHOOSING_POLICIES])
def test_mctd_goes_by_every_policy_and_spends_what_it_is_given(policy: str) -> None:
    strategy = MCTD(stride_policy=policy)
    (result,) = search(strategy, guided_environment(1, 32), nfe=100)
    assert 90 <= result.spent.nfe <= 100
    parsed = strategy.policy
    reason = "gain" if parsed.target else parsed.kind
    assert reason in reasons_of(result) <= {"", reason, "only"}  # seeds have their own strides


def test_rollouts_of_a_fixed_stride_take_it() -> None:
    strategy = MCTD(stride_policy="fixed:2", seed_share=0.0)
    (result,) = search(strategy, small_environment(1, 16), nfe=80)
    tree = result.tree
    assert set(tree.stride[tree.move == STEP].tolist()) == {2}
    with pytest.raises(ConfigError, match=r"'fixed:3' and strides are \(1, 2, 4, 8\)"):
        MCTD(stride_policy="fixed:3")


def test_edges_are_planned_by_what_they_resolve() -> None:
    strides = (1, 2, 4)

    def plan(deviation_of: Any, evaluations: int = 40) -> int:
        costs = tuple(
            tuple(-deviation_of(start, k) if start + k <= 16 else math.inf for k in strides)
            for start in range(16)
        )
        to_go = cost_to_go(without_last_edge(costs, strides), strides, 16)[0]
        planned = plan_rollout(
            16,
            evaluations,
            allowed=strides,
            shape="budget",
            brake_nats=100.0,
            edge_gain=0.4,
            resolved=tuple((-to_go).tolist()),
        )
        assert planned is not None
        assert planned.evaluations <= evaluations
        return len(planned.strides)

    # Steps that resolve alike are worth many edges; if all is resolved at first, one selects.
    many = plan(lambda start, k: math.sqrt(k))
    few = plan(lambda start, k: float(start == 0))
    assert few < many
    # The sum over edges is what counts: S ** 0.5 for equal parts.
    assert many == len(
        plan_rollout(
            16, 40, allowed=strides, shape="budget", brake_nats=100.0, edge_gain=0.5
        ).strides  # type: ignore[union-attr]  # the account pays for it
    )


def test_the_last_edge_resolves_nothing_to_choose_by() -> None:
    costs = ((-1.0, -2.0), (-3.0, math.inf))
    assert without_last_edge(costs, (1, 2)) == ((-1.0, 0.0), (0.0, math.inf))


def test_plausible_costs_are_of_the_strides_of_the_search() -> None:
    for strategy in (MCTD(stride_policy="ige"), BestOfN(evaluations=3, stride_policy="gits")):
        costs = stride_costs_of(strategy, 12)
        assert costs is not None
        assert len(costs) == 12
        assert {len(row) for row in costs} == {len(strategy.stride_set(12))}

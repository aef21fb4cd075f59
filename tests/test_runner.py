"""The runner: waves across images, budgets, clocks, Ctrl-C, errors and replay."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import (
    BudgetError,
    ConfigError,
    NonFiniteRewardError,
    RewardError,
    SearchError,
)
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Asks, Release, Reply
from mctd_diffusers.search.moves import complete, denoise, draw, finish_plainly, value
from mctd_diffusers.search.runner import (
    Problem,
    Strategy,
    Wave,
    gather,
    replay,
    run_search,
)
from mctd_diffusers.search.strategies import (
    DTS,
    MCTD,
    SMC,
    Beam,
    BestOfN,
    DraftRefine,
    Evolution,
    NoiseSearch,
    Rollover,
    TextbookMCTD,
)
from mctd_diffusers.search.tree import DRAW, ROOT, STEP, Tree, prune, to_json
from tests.strategies import searches
from tests.toys import (
    PRICES,
    CountingEnvironment,
    FailingEnvironment,
    TwoCallEnvironment,
    problems_of,
    search,
    small_environment,
)


@dataclass(frozen=True)
class Custom:
    """A strategy from a coroutine, as somebody would write one."""

    steps: Callable[[Problem], Asks]
    name: str = "custom"

    def least_evaluations(self, num_steps: int) -> int:
        return num_steps

    def search(self, problem: Problem) -> Asks:
        return (yield from self.steps(problem))


def edges(tree: Tree, latents: np.ndarray) -> dict[tuple[Any, ...], bytes]:
    """Latents of a tree by the path of their seeds and strides."""
    paths: dict[int, tuple[Any, ...]] = {ROOT: ()}
    named = {}
    for node in range(1, tree.num_nodes):
        edge = int(tree.seed[node]), int(tree.stride[node])
        paths[node] = (*paths[int(tree.parent[node])], edge)
        named[paths[node]] = latents[int(tree.handle[node])].tobytes()
    return named


# ---- budgets


@settings(max_examples=40)
@given(searches, st.integers(1, 6), st.integers(1, 60), st.integers(1, 3))
def test_no_budget_is_ever_exceeded_and_the_ledger_is_the_truth(
    strategy: Strategy, num_steps: int, nfe: int, num_problems: int
) -> None:
    environment = small_environment(num_problems, num_steps, make=CountingEnvironment)
    assert isinstance(environment, CountingEnvironment)
    if nfe < strategy.least_evaluations(num_steps):
        with pytest.raises(BudgetError, match=f"a budget of {nfe} NFE"):
            search(strategy, environment, nfe=nfe)
        assert environment.sizes == []
        return
    results = search(strategy, environment, nfe=nfe)
    for result in results:
        assert 1 <= result.spent.nfe <= nfe
        assert result.best is not None
        assert result.tree.evaluated.sum() == result.spent.nfe
        assert (~np.isnan(result.tree.reward)).sum() == result.spent.decodes
        assert not result.tree.in_flight.any()
    assert environment.total("denoise") == sum(result.spent.nfe for result in results)
    assert environment.total("reward") == sum(result.spent.decodes for result in results)


@settings(max_examples=40)
@given(searches, st.integers(1, 6), st.integers(1, 100))
def test_a_budget_pays_for_second_calls_too(strategy: Strategy, num_steps: int, nfe: int) -> None:
    environment = small_environment(2, num_steps, make=TwoCallEnvironment)
    least = 2 * strategy.least_evaluations(num_steps)
    if nfe < least:
        with pytest.raises(BudgetError, match=f"a budget of {nfe} NFE .* at least {least} NFE"):
            search(strategy, environment, nfe=nfe)
        assert environment.ledger.total.nfe == 0
        return
    results = search(strategy, environment, nfe=nfe)
    for result in results:
        tree = result.tree
        edges = tree.evaluated & (tree.step_index > 0)
        assert result.spent.nfe == tree.evaluated.sum() + edges.sum() <= nfe
        assert result.best is not None


@settings(max_examples=40)
@given(searches, st.integers(1, 6), st.floats(1, 90), st.booleans())
def test_no_cost_budget_is_ever_exceeded(
    strategy: Strategy, num_steps: int, cost: float, takes_two_calls: bool
) -> None:
    make = TwoCallEnvironment if takes_two_calls else MixtureEnvironment
    environment = small_environment(1, num_steps, make=make, prices=PRICES)
    try:
        (result,) = search(strategy, environment, nfe=None, cost=cost)
    except BudgetError:
        assert environment.ledger.cost == 0
        return
    assert PRICES.cost(result.spent) <= cost + 1e-6
    assert result.finished


def test_a_budget_too_small_names_the_least_that_works() -> None:
    environment = small_environment(1, 8)
    with pytest.raises(BudgetError, match=r"a budget of 7 NFE cannot .* needs at least 8 NFE"):
        search(BestOfN(), environment, nfe=7)
    costly = small_environment(1, 8, prices=PRICES)
    with pytest.raises(BudgetError, match=r"cost budget of 9 row-equivalents .* at least 9\.625"):
        search(BestOfN(), costly, nfe=None, cost=9)
    with pytest.raises(BudgetError, match="cannot pay for one pass of the beam"):
        search(Beam(candidates=4), costly, nfe=None, cost=32)


def test_a_strategy_that_asks_for_too_much_is_stopped_before_it_spends() -> None:
    def greedy(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 9)
        yield from denoise(problem, nodes)

    environment = small_environment(1, 4)
    with pytest.raises(SearchError, match="'custom' asks for 9 NFE") as caught:
        search(Custom(greedy), environment, nfe=8)
    assert environment.ledger.total.nfe == 0
    assert caught.value.partial[0].stop_reason == "error"


def test_problems_need_their_own_index_and_a_schedule() -> None:
    environment = small_environment(1, 4)
    with pytest.raises(ConfigError, match="each image needs its own"):
        run_search(BestOfN(), environment, problems_of(environment, Budget(nfe=4), [0, 0]))
    with pytest.raises(ConfigError, match="num_steps is 0"):
        Problem(index=0, num_steps=0, root_seed=1, budget=Budget(nfe=4))
    with pytest.raises(ConfigError, match="time budget is 0 seconds"):
        run_search(BestOfN(), environment, problems_of(environment, Budget(nfe=4)), seconds=0)


# ---- waves


@settings(max_examples=15)
@given(searches, st.sampled_from((8, 20)))
def test_a_search_is_the_same_alone_or_among_others(strategy: Strategy, nfe: int) -> None:
    together = search(
        strategy, small_environment(3, 3), nfe=max(nfe, strategy.least_evaluations(3))
    )
    environment = small_environment(3, 3)
    budget = Budget(nfe=max(nfe, strategy.least_evaluations(3)))
    (alone,) = run_search(
        strategy, environment, problems_of(environment, budget, [1], strategy=strategy)
    )
    same, mine = together[1].tree, alone.tree
    for column in ("parent", "step_index", "stride", "seed", "visit_count"):
        np.testing.assert_array_equal(getattr(same, column), getattr(mine, column))
    np.testing.assert_allclose(same.value, mine.value, rtol=1e-12)
    np.testing.assert_allclose(same.reward, mine.reward, rtol=1e-12)


def test_waves_of_one_or_eight_give_the_same_latents_for_the_same_edges() -> None:
    found = []
    for wave_size in (1, 8):
        environment = small_environment(1, 4)
        (result,) = search(BestOfN(wave_size=wave_size), environment, nfe=32)
        latents = environment.latents(np.arange(result.tree.num_nodes - 1))
        found.append(edges(result.tree, latents))
    assert found[0].keys() == found[1].keys()
    one, eight = found
    for path, latent in one.items():
        np.testing.assert_allclose(
            np.frombuffer(latent), np.frombuffer(eight[path]), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("strategy", [BestOfN(), Beam(), MCTD()], ids=lambda s: s.name)
def test_calls_are_full_with_many_images(strategy: Strategy) -> None:
    environment = small_environment(24, 4, make=CountingEnvironment)
    assert isinstance(environment, CountingEnvironment)
    search(strategy, environment, nfe=32)
    for kind, rows_per_call in (("denoise", 8), ("value", 8), ("reward", 8)):
        sizes = [size for name, size in environment.sizes if name == kind]
        padded = sum(-size % rows_per_call for size in sizes)
        assert padded <= 0.1 * (padded + sum(sizes)) or not sizes


def test_waves_are_reported_with_spending_and_the_best_so_far() -> None:
    environment = small_environment(2, 3)
    waves: list[Wave] = []
    results = run_search(
        BestOfN(),
        environment,
        problems_of(environment, Budget(nfe=6)),
        on_wave=waves.append,
    )
    assert [wave.kind for wave in waves] == ["denoise"] * 3 + ["reward"]
    assert [wave.size for wave in waves] == [4, 4, 4, 4]
    assert waves[0].nfe == [2, 2]
    assert waves[0].best == [None, None]
    assert waves[-1].best == [result.best.reward for result in results if result.best]


def test_gather_runs_coroutines_of_different_lengths_and_depths() -> None:
    def chain(name: str, length: int) -> Generator[Any, Any, Any]:
        got = []
        for turn in range(length):
            got.append((yield (name, turn)))
        return got

    both: Generator[Any, Any, Any] = gather(
        chain("a", 1), gather(chain("b", 3), chain("c", 0)), chain("d", 2)
    )
    asked = next(both)
    log = [asked]
    results = None
    while results is None:
        try:
            asked = both.send(asked)  # every request is its own reply
            log.append(asked)
        except StopIteration as stop:
            results = stop.value
    assert log == [
        (("a", 0), (("b", 0),), ("d", 0)),
        ((("b", 1),), ("d", 1)),
        ((("b", 2),),),
    ]
    assert results == [
        [("a", 0)],
        [[("b", 0), ("b", 1), ("b", 2)], []],
        [("d", 0), ("d", 1)],
    ]


def test_released_samples_are_gone() -> None:
    def forgetful(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 2)
        yield from finish_plainly(problem, nodes[:1])
        yield Release(np.array(prune(problem.tree, nodes[1])))
        yield from denoise(problem, nodes[1:])

    with pytest.raises(SearchError, match="do not exist"):
        search(Custom(forgetful), small_environment(1, 2), nfe=9)


# ---- results


def test_results_keep_every_finished_sample_and_their_history() -> None:
    environment = small_environment(1, 3)
    (result,) = search(BestOfN(wave_size=1), environment, nfe=30)
    assert len(result.finished) == 10
    assert [sample.nfe_when_found for sample in result.finished] == list(range(3, 31, 3))
    rewards = [sample.reward for sample in result.finished]
    assert result.best is not None
    assert result.best.reward == max(rewards)
    assert result.history[-1][1] == max(rewards)
    assert [best for _, best in result.history] == sorted(best for _, best in result.history)
    assert result.tree.reward[result.best.node] == result.best.reward
    assert environment.latents(np.array([result.best.handle])).shape == (1, 3)
    assert result.stop_reason == "budget"


def test_a_ledger_that_was_used_before_is_not_charged_again() -> None:
    environment = small_environment(1, 3)
    search(BestOfN(), environment, nfe=6)
    (second,) = search(BestOfN(), environment, nfe=6)
    assert second.spent.nfe == 6
    assert environment.ledger.total.nfe == 12


@settings(max_examples=10)
@given(searches)
def test_a_search_is_rebuilt_from_its_log(strategy: Strategy) -> None:
    environment = small_environment(1, 3)
    nfe = max(14, strategy.least_evaluations(3))
    (result,) = search(strategy, environment, nfe=nfe)
    (problem,) = problems_of(environment, Budget(nfe=nfe), strategy=strategy)
    assert replay(strategy, problem, result.replies) is None
    assert to_json(problem.tree) == to_json(result.tree)
    (half,) = problems_of(environment, Budget(nfe=nfe), strategy=strategy)
    assert replay(strategy, half, result.replies[: len(result.replies) // 2]) is not None
    assert half.tree.num_nodes <= result.tree.num_nodes


# ---- time, Ctrl-C and errors


class Clock:
    """Seconds that pass by the call."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(
    "strategy", [BestOfN(wave_size=2), Beam(candidates=2), MCTD()], ids=lambda s: s.name
)
@pytest.mark.parametrize("seconds", [1, 4, 12])
def test_when_time_is_up_every_image_completes_its_first_sample(
    strategy: Strategy, seconds: int
) -> None:
    environment = small_environment(3, 6)
    budget = Budget(nfe=60)
    results = run_search(
        strategy,
        environment,
        problems_of(environment, budget, strategy=strategy),
        seconds=seconds,
        clock=Clock(),
    )
    for result in results:
        assert result.stop_reason == "time"
        assert result.best is not None
        assert result.spent.nfe < 60


def test_a_search_that_is_over_as_its_time_is_up_names_its_budget() -> None:
    environment = small_environment(1, 6)
    problems = problems_of(environment, Budget(nfe=60))
    waves: list[Wave] = []
    run_search(Beam(), environment, problems, on_wave=waves.append)
    again = problems_of(environment, Budget(nfe=60))
    (result,) = run_search(Beam(), environment, again, seconds=len(waves), clock=Clock())
    assert result.stop_reason == "budget"


def test_completing_goes_on_from_the_sample_nearest_the_end() -> None:
    def stop_halfway(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 2)
        yield from denoise(problem, nodes)
        values = yield from value(problem, nodes)
        yield from complete(problem)
        path = problem.tree.parent[problem.tree.num_nodes - 1]
        for _ in range(3):
            path = problem.tree.parent[path]
        assert problem.tree.value[path] == max(values)

    (result,) = search(Custom(stop_halfway), small_environment(1, 4), nfe=8)
    assert result.spent.nfe == 5


def test_a_short_account_completes_in_longer_strides() -> None:
    def short(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 4)
        yield from denoise(problem, nodes)
        yield from complete(problem)

    (result,) = search(Custom(short), small_environment(1, 7), nfe=7)
    assert result.spent.nfe <= 7
    strides = result.tree.stride[result.tree.move == STEP]
    assert strides.sum() == 7
    assert (result.tree.move == DRAW).sum() == 4


def test_a_solver_of_single_steps_completes_only_what_the_account_pays_for() -> None:
    def short(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 4)
        yield from denoise(problem, nodes)
        yield from complete(problem)

    environment = small_environment(2, 7)
    few, many = (
        replace(problem, longest_stride=1, budget=Budget(nfe=nfe))
        for problem, nfe in zip(problems_of(environment, Budget()), (9, 10), strict=True)
    )
    none, one = run_search(Custom(short), environment, [few, many])
    assert none.finished == []
    assert none.spent.nfe == 4
    assert one.best is not None
    assert one.spent.nfe == 10


@pytest.mark.parametrize("seconds", [1, 3, 7])
@pytest.mark.parametrize(
    "strategy",
    [
        BestOfN(wave_size=2),
        Beam(candidates=2),
        DraftRefine(draft_stride=1),
        DTS(),
        Evolution(stride=1),
        MCTD(strides=(1,)),
        NoiseSearch(stride=1),
        Rollover(),
        SMC(),
        TextbookMCTD(simulation_stride=1),
    ],
    ids=lambda s: s.name,
)
def test_searches_of_single_steps_always_leave_enough_to_complete(
    strategy: Strategy, seconds: int
) -> None:
    environment = small_environment(1, 6, make=TwoCallEnvironment)
    problems = [
        replace(problem, longest_stride=1)
        for problem in problems_of(environment, Budget(nfe=2 * strategy.least_evaluations(6)))
    ]
    (result,) = run_search(strategy, environment, problems, seconds=seconds, clock=Clock())
    assert result.best is not None
    assert result.tree.stride.max() == 1


def test_ctrl_c_returns_the_best_finished_sample() -> None:
    environment = small_environment(2, 3, make=FailingEnvironment)
    assert isinstance(environment, FailingEnvironment)
    environment.after = 6  # three denoise calls and a reward a wave
    results = search(BestOfN(wave_size=2), environment, nfe=30)
    for result in results:
        assert result.stop_reason == "interrupted"
        assert len(result.finished) == 2
        assert result.spent.nfe == 6 + 2 * 2


def test_ctrl_c_with_nothing_finished_is_ctrl_c() -> None:
    environment = small_environment(2, 3, make=FailingEnvironment)
    assert isinstance(environment, FailingEnvironment)
    environment.after = 2
    with pytest.raises(KeyboardInterrupt):
        search(BestOfN(), environment, nfe=30)


@pytest.mark.parametrize(
    "strategy", [BestOfN(wave_size=2), Beam(candidates=2), MCTD()], ids=lambda s: s.name
)
@pytest.mark.parametrize("waves", [1, 4, 12])
def test_when_it_is_interrupted_every_image_completes_its_first_sample(
    strategy: Strategy, waves: int
) -> None:
    environment = small_environment(3, 6)
    seen: list[Wave] = []
    results = run_search(
        strategy,
        environment,
        problems_of(environment, Budget(nfe=60), strategy=strategy),
        on_wave=seen.append,
        is_interrupted=lambda: len(seen) >= waves,
    )
    before = seen[waves - 1]
    for result in results:
        assert result.stop_reason == "interrupted"
        assert result.best is not None
        more = 0 if before.best[result.problem] is not None else 6
        assert result.spent.nfe <= before.nfe[result.problem] + more


def test_a_wave_names_the_samples_that_it_answered() -> None:
    environment = small_environment(2, 3)
    seen: list[Wave] = []
    (one, other) = run_search(
        Beam(), environment, problems_of(environment, Budget(nfe=24)), on_wave=seen.append
    )
    evaluated = [wave for wave in seen if wave.kind == "denoise"]
    for image, result in enumerate((one, other)):
        handles = [
            handle
            for wave in evaluated
            for handle, problem in zip(wave.handles.tolist(), wave.problems, strict=True)
            if problem == image
        ]
        tree = result.tree
        assert sorted(handles) == sorted(tree.handle[tree.evaluated].tolist())
    assert all(wave.size == len(wave.handles) == len(wave.problems) for wave in seen)


def test_an_error_carries_what_was_found_before_it() -> None:
    environment = small_environment(2, 3, make=FailingEnvironment)
    assert isinstance(environment, FailingEnvironment)
    environment.failure = lambda: RewardError("the reward broke", handles=[3])
    environment.after = 5
    with pytest.raises(RewardError, match="the reward broke") as caught:
        search(BestOfN(wave_size=1), environment, nfe=30)
    for result in caught.value.partial:
        assert result.stop_reason == "error"
        assert len(result.finished) == 1
        assert result.best is not None


def test_a_reward_that_is_not_finite_is_named() -> None:
    environment = small_environment(1, 3)
    environment.rewards = (lambda x: np.full(len(x), np.nan),)
    with pytest.raises(NonFiniteRewardError) as caught:
        search(BestOfN(n=2), environment, nfe=6)
    assert len(caught.value.handles) == 2


def test_replies_carry_what_was_spent() -> None:
    (result,) = search(BestOfN(n=1), small_environment(1, 2), nfe=2)
    assert all(isinstance(reply, Reply) for reply in result.replies)
    assert [reply.spent.nfe for reply in result.replies] == [0, 1, 1, 2, 2, 2]
    assert result.stop_reason == "exhausted"

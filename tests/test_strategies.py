"""What every search promises, whatever its algorithm; and how they compare at equal NFE."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError, ScheduleError
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.evaluation.mixture_worlds import rugged_environment, subspace_environment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Action, Denoise, Perturb, Renoise, Reset, Step
from mctd_diffusers.search.runner import Strategy, run_search
from mctd_diffusers.search.strategies import (
    DTS,
    MCTD,
    SMC,
    STRATEGIES,
    Beam,
    BestOfN,
    DraftRefine,
    Evolution,
    NoiseSearch,
    Rollover,
    TextbookMCTD,
    resolve_strategy,
)
from mctd_diffusers.search.strides import HasLongestStride
from mctd_diffusers.search.tree import (
    ROOT,
    STEP,
    issue_seeds,
    prune,
    reroot,
    subtree,
)
from tests.by_hand import assert_same_columns, columns_of, step_by_hand
from tests.strategies import searches
from tests.toys import FailingEnvironment, problems_of, search, small_environment

DEFAULTS: dict[str, Strategy] = {
    "best_of_n": BestOfN(),
    "beam": Beam(),
    "draft_refine": DraftRefine(),
    "dts": DTS(),
    "evolution": Evolution(),
    "mctd": MCTD(),
    "noise_search": NoiseSearch(),
    "rollover": Rollover(),
    "smc": SMC(),
    "textbook_mctd": TextbookMCTD(),
}
WORLDS: dict[str, Callable[..., MixtureEnvironment]] = {
    "rugged": rugged_environment,
    "subspace": subspace_environment,
}
each_strategy = pytest.mark.parametrize("name", DEFAULTS)
each_world = pytest.mark.parametrize("world", WORLDS)


# ---- what they find at equal NFE


@lru_cache
def best_rewards(name: str, world: str, compute: int) -> np.ndarray:
    """Best reward of 16 problems of a world, for ``compute`` plain samples of 16 steps each."""
    environment = WORLDS[world](16, num_steps=16, first_seed=1)
    results = search(DEFAULTS[name], environment, nfe=16 * compute)
    return np.array([result.best.reward for result in results if result.best])


def mean_and_error(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences, and its standard error."""
    return float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)


@each_world
@pytest.mark.parametrize(("name", "compute"), [("beam", 4), ("mctd", 2), ("mctd", 4)])
def test_searching_beats_plain_sampling_at_equal_nfe(name: str, world: str, compute: int) -> None:
    gain, error = mean_and_error(
        best_rewards(name, world, compute) - best_rewards("best_of_n", world, compute)
    )
    # Measured: five to eight standard errors. Equals would be three apart in one case of 700.
    assert gain > 3 * error


@each_world
@pytest.mark.parametrize("compute", [1, 2, 4])
def test_the_default_search_does_not_lose_to_any_other(world: str, compute: int) -> None:
    for other in ("best_of_n", "beam"):
        gain, error = mean_and_error(
            best_rewards("mctd", world, compute) - best_rewards(other, world, compute)
        )
        # Equals would be found two standard errors below in one case of forty.
        assert gain > -2 * error, f"mctd against {other}: {gain:.2f} +- {error:.2f}"


@each_world
@each_strategy
def test_more_budget_finds_no_less_on_average(name: str, world: str) -> None:
    for less, more in pairwise((1, 2, 4)):
        gain, error = mean_and_error(
            best_rewards(name, world, more) - best_rewards(name, world, less)
        )
        assert gain >= -2 * error  # a search that found the same has lost nothing


# ---- what holds for each single search


@settings(max_examples=15)
@given(searches, st.integers(1, 6), st.integers(1, 40))
def test_the_best_finished_sample_ever_seen_is_what_returns(
    strategy: Strategy, num_steps: int, nfe: int
) -> None:
    nfe = max(nfe, strategy.least_evaluations(num_steps))
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    tree = result.tree
    assert result.best is not None
    assert result.best.reward == np.nanmax(tree.reward)
    assert result.history[-1] == (result.best.nfe_when_found, result.best.reward)
    assert tree.handle[result.best.node] == result.best.handle
    finished = [sample.node for sample in result.finished]
    assert sorted(finished) == np.flatnonzero(~np.isnan(tree.reward)).tolist()


@settings(max_examples=15)
@given(searches, st.integers(1, 6), st.integers(1, 40))
def test_last_edges_are_plain_and_never_widened(
    strategy: Strategy, num_steps: int, nfe: int
) -> None:
    nfe = max(nfe, strategy.least_evaluations(num_steps))
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    tree = result.tree
    leaves = np.flatnonzero((tree.move == STEP) & (tree.step_index == num_steps))
    assert np.isnan(tree.eta[leaves]).all()  # as the user's own scheduler says
    parents = tree.parent[leaves]
    assert len(set(parents.tolist())) == len(parents)  # a second child would be the same picture
    assert not np.isnan(tree.reward[leaves]).any()


@settings(max_examples=15)
@given(searches, st.integers(2, 4), st.integers(2, 20))
def test_stepping_by_hand_is_the_same_search(strategy: Strategy, num_steps: int, nfe: int) -> None:
    nfe = max(nfe, strategy.least_evaluations(num_steps))
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    environment = small_environment(1, num_steps)
    (problem,) = problems_of(environment, Budget(nfe=nfe), strategy=strategy)
    replies = [reply for _, reply in step_by_hand(strategy, problem, environment)]
    # Requests side by side may get their handles in another order.
    assert_same_columns(columns_of(problem.tree), columns_of(result.tree), but=("handle",))
    assert problem.account.spent == result.spent
    assert [reply.spent for reply in replies[-1:]] == [result.spent]


@each_strategy
@pytest.mark.parametrize("after", [1, 3, 7, 12, 20])
def test_ctrl_c_keeps_what_was_finished_until_then(name: str, after: int) -> None:
    strategy = MCTD(first_share=0.3) if name == "mctd" else DEFAULTS[name]
    if name == "best_of_n":
        strategy = BestOfN(wave_size=2)
    (whole,) = search(strategy, small_environment(1, 4), nfe=48)
    environment = small_environment(1, 4, make=FailingEnvironment)
    assert isinstance(environment, FailingEnvironment)
    environment.after = after
    try:
        (result,) = search(strategy, environment, nfe=48)
    except KeyboardInterrupt:  # nothing to return
        assert whole.finished[0].nfe_when_found >= environment.ledger.total.nfe
        return
    assert result.finished == whole.finished[: len(result.finished)]
    assert result.best == max(result.finished, key=lambda sample: sample.reward)
    assert not result.tree.in_flight.any()
    if result.stop_reason == "interrupted":
        assert result.spent.nfe < whole.spent.nfe or len(result.finished) < len(whole.finished)
    else:
        assert columns_of(result.tree) == columns_of(whole.tree)


@each_strategy
def test_time_that_is_up_keeps_what_was_finished_until_then(name: str) -> None:
    # Left alone, noise search makes a single pass of this budget, in more calls than there are.
    strategy = NoiseSearch(rounds=2) if name == "noise_search" else DEFAULTS[name]
    (whole,) = search(strategy, small_environment(1, 4), nfe=400)
    num_calls = 0

    def clock() -> float:  # a second for each call that costs something
        nonlocal num_calls
        num_calls += 1
        return float(num_calls)

    environment = small_environment(1, 4)
    problems = problems_of(environment, Budget(nfe=400), strategy=strategy)
    (result,) = run_search(strategy, environment, problems, seconds=40, clock=clock)
    if result.stop_reason == "time":
        assert len(result.finished) >= 1
        assert result.finished == whole.finished[: len(result.finished)]
        assert num_calls == 41
        assert not result.tree.in_flight.any()
    else:  # over before its time
        assert result.finished == whole.finished


# ---- cutting, saving and going on


@settings(max_examples=10)
@given(searches, st.integers(2, 4), st.integers(2, 20), st.floats(0, 1))
def test_a_search_goes_on_from_its_log_and_its_saved_samples(
    strategy: Strategy, num_steps: int, nfe: int, share: float
) -> None:
    nfe = max(nfe, strategy.least_evaluations(num_steps))
    environment = small_environment(1, num_steps)
    (whole,) = problems_of(environment, Budget(nfe=nfe), strategy=strategy)
    length = sum(1 for _ in step_by_hand(strategy, whole, environment))

    environment = small_environment(1, num_steps)
    (cut,) = problems_of(environment, Budget(nfe=nfe), strategy=strategy)
    done = list(islice(step_by_hand(strategy, cut, environment), int(share * length)))
    log = [reply for _, reply in done]
    lazy = Reset | Step | Renoise | Perturb
    new = [reply.result for request, reply in done if isinstance(request, lazy)]
    handles = np.concatenate([np.empty(0, dtype=np.int64), *new])
    saved = environment.export(handles)

    other = small_environment(1, num_steps)
    np.testing.assert_array_equal(other.restore(saved), handles)  # both count from 0
    for request, _ in done:
        if isinstance(request, Denoise):
            other.denoise(request.handles)
    (rest,) = problems_of(other, Budget(nfe=nfe), strategy=strategy)
    assert sum(1 for _ in step_by_hand(strategy, rest, other, log)) == length
    assert_same_columns(columns_of(rest.tree), columns_of(whole.tree))
    assert rest.account.spent == whole.account.spent


@settings(max_examples=10)
@given(searches, st.data())
def test_a_rerooted_tree_keeps_statistics_and_gives_out_the_same_seeds(
    strategy: Strategy, data: st.DataObject
) -> None:
    (result,) = search(
        strategy, small_environment(1, 3), nfe=max(20, strategy.least_evaluations(3))
    )
    tree = result.tree
    node = data.draw(st.integers(0, tree.num_nodes - 1))
    rows = subtree(tree, node)
    new = reroot(tree, node)
    for name in ("visit_count", "total_value", "max_value", "value", "reward", "evaluated", "live"):
        np.testing.assert_array_equal(getattr(new, name), getattr(tree, name)[rows], err_msg=name)
    for row, old in list(enumerate(rows.tolist()))[:8]:
        for stride in (1, 2):
            edge = {"move": STEP, "stride": stride, "count": 2}
            assert issue_seeds(new, row, **edge) == issue_seeds(tree, old, **edge)


@settings(max_examples=10)
@given(searches, st.data())
def test_what_is_pruned_is_released_and_the_rest_goes_on_as_before(
    strategy: Strategy, data: st.DataObject
) -> None:
    worlds = [small_environment(1, 4) for _ in range(2)]
    results = [
        search(strategy, world, nfe=max(16, strategy.least_evaluations(4)))[0] for world in worlds
    ]
    tree = results[0].tree
    children = [node for node in tree.children(ROOT) if len(tree.children(ROOT)) > 1]
    if not children:
        return
    handles = prune(tree, data.draw(st.sampled_from(children)))
    worlds[0].release(np.array(handles))
    rest = np.flatnonzero(tree.live & tree.evaluated)
    assert not set(handles) & set(tree.handle[rest].tolist())
    left = 4 - tree.step_index[rest]
    ends = []
    for world in worlds:
        actions = [Action(stride) for stride in left.tolist()]
        leaves = world.step(tree.handle[rest], actions, np.zeros(len(rest), dtype=np.int64))
        ends.append(world.reward(leaves))
    np.testing.assert_array_equal(*ends)


# ---- names and settings


def test_every_search_has_the_name_it_is_found_by() -> None:
    for name, kind in STRATEGIES.items():
        strategy = resolve_strategy(name)
        assert isinstance(strategy, kind)
        assert isinstance(strategy, Strategy)
        assert strategy.name == name
        assert strategy == kind()
        assert resolve_strategy(strategy) is strategy
    assert STRATEGIES.keys() == DEFAULTS.keys()


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("best-of-n", "best_of_n"),
        ("bestofn", "best_of_n"),
        ("Beam", "beam"),
        ("beams", "beam"),
        ("MCTD", "mctd"),
        ("mcts", "mctd"),
    ],
)
def test_a_wrong_name_suggests_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"named '{wrong}'; did you mean '{nearest}'\?"):
        resolve_strategy(wrong)


def test_a_name_like_no_other_is_answered_with_all_of_them() -> None:
    with pytest.raises(ConfigError, match=r"named 'xyz'; the names are beam, best_of_n,.*mctd"):
        resolve_strategy("xyz")


@pytest.mark.parametrize("wrong", [MCTD, BestOfN])
def test_a_class_is_no_strategy_yet(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"give a name .* or a strategy object such as"):
        resolve_strategy(wrong)


@pytest.mark.parametrize(
    ("kind", "setting", "wrong"),
    [
        (BestOfN, "n", 0),
        (BestOfN, "n", -3),
        (BestOfN, "wave_size", 0),
        (BestOfN, "stride", 0),
        (DraftRefine, "draft_stride", 0),
        (DraftRefine, "refine", -1),
        (DraftRefine, "refine_share", 1.1),
        (DraftRefine, "refine_stride", 0),
        (DraftRefine, "resume_at", -0.1),
        (DraftRefine, "wave_size", 0),
        (DTS, "temperature", 0.0),
        (DTS, "temperature", -1.0),
        (DTS, "temperature_share", 0.0),
        (DTS, "selection_temperature", 0.0),
        (DTS, "exploration", -0.1),
        (DTS, "widening_constant", -1.0),
        (DTS, "widening_exponent", 1.5),
        (DTS, "branch_eta", 1.5),
        (DTS, "stride", 0),
        (DTS, "wave_size", 0),
        (Beam, "candidates", 0),
        (Beam, "width", 0),
        (Beam, "stride", 0),
        (Beam, "block", 0),
        (Beam, "temperature", -0.1),
        (Beam, "branch_eta", -0.1),
        (Beam, "branch_eta", 1.5),
        (Beam, "branch_eta", float("nan")),
        (Beam, "brake_nats", -1.0),
        (Beam, "brake_nats", float("nan")),
        (NoiseSearch, "candidates", 0),
        (NoiseSearch, "rounds", 0),
        (NoiseSearch, "strength", 1.1),
        (NoiseSearch, "epsilon", -0.1),
        (NoiseSearch, "stride", 0),
        (NoiseSearch, "branch_eta", 0.0),
        (NoiseSearch, "branch_eta", 1.5),
        (NoiseSearch, "brake_nats", -1.0),
        (Evolution, "elites", -1),
        (Evolution, "tournament", 0.0),
        (Evolution, "tournament", 1.1),
        (Evolution, "strength", -0.1),
        (Evolution, "state_strength", float("nan")),
        (Evolution, "stride", 0),
        (Evolution, "branch_eta", 0.0),
        (Rollover, "initial_share", 1.1),
        (Rollover, "threshold", float("nan")),
        (Rollover, "stride", 0),
        (Rollover, "wave_size", 0),
        (Rollover, "branch_eta", -0.1),
        (SMC, "particles", 0),
        (SMC, "temperature", 0.0),
        (SMC, "temperature_share", 0.0),
        (SMC, "stride", 0),
        (SMC, "interval", 0),
        (SMC, "window_start", -0.1),
        (SMC, "window_end", 1.1),
        (SMC, "ess_threshold", 1.1),
        (SMC, "branch_eta", 1.5),
        (TextbookMCTD, "noises", 0),
        (TextbookMCTD, "depth", 0),
        (TextbookMCTD, "expansion_stride", 0),
        (TextbookMCTD, "simulation_stride", 0),
        (TextbookMCTD, "exploration", -0.1),
        (TextbookMCTD, "redundancy_weight", -1.0),
        (TextbookMCTD, "wave_size", 0),
        (TextbookMCTD, "branch_eta", 1.5),
        (MCTD, "candidates", 0),
        (MCTD, "wave_size", 0),
        (MCTD, "finish", 0),
        (MCTD, "first_share", 0),
        (MCTD, "first_share", 1.1),
        (MCTD, "seed_share", -0.1),
        (MCTD, "seed_share", float("nan")),
        (MCTD, "branch_eta", 1.5),
        (MCTD, "exploration", -0.1),
        (MCTD, "widening_constant", -1.0),
        (MCTD, "widening_exponent", 1.5),
        (MCTD, "brake_nats", -1.0),
        (MCTD, "temperature", 0.0),
        (MCTD, "temperature", float("nan")),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name_and_value(
    kind: Any, setting: str, wrong: Any
) -> None:
    with pytest.raises(ConfigError, match=f"^{setting} is {wrong}; "):
        kind(**{setting: wrong})


@settings(max_examples=60)
@given(searches, st.integers(1, 9), st.integers(1, 40))
def test_no_edge_is_longer_than_a_strategy_says_beforehand(
    strategy: Strategy, num_steps: int, nfe: int
) -> None:
    assert isinstance(strategy, HasLongestStride)
    longest = strategy.longest_stride(num_steps)
    environment = small_environment(1, num_steps)
    (result,) = search(strategy, environment, nfe=max(nfe, strategy.least_evaluations(num_steps)))
    taken = result.tree.stride.max()
    assert taken <= longest <= num_steps
    if not isinstance(strategy, MCTD):  # whose plan depends on the budget
        assert taken == longest or isinstance(strategy, (BestOfN, DraftRefine, TextbookMCTD))


@pytest.mark.parametrize("strides", [(), (2, 4), (0, 1), (1, -1)])
def test_strides_must_hold_one(strides: tuple[int, ...]) -> None:
    with pytest.raises(ScheduleError, match="must be at least 1 and hold 1"):
        MCTD(strides=strides)


@each_strategy
def test_strategies_are_values(name: str) -> None:
    one, other = resolve_strategy(name), resolve_strategy(name)
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(AttributeError, match="cannot assign"):
        one.anything = 1  # type: ignore[attr-defined]  # that is what is refused

"""Saved searches: stopped anywhere and resumed elsewhere, they go on as if never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError, RewardError, SearchError
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.budget import Budget, StopReason
from mctd_diffusers.search.environment import Asks, Gains, Handles, Release
from mctd_diffusers.search.log import SearchLog
from mctd_diffusers.search.moves import denoise, draw, finish_plainly, predict_gain
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import SearchResult, Strategy, Wave, rebuild, run_search
from mctd_diffusers.search.saving import has_saved_search, load_search, save_search
from mctd_diffusers.search.strategies import (
    MCTD,
    PRESETS,
    STRATEGIES,
    Beam,
    BestOfN,
    resolve_strategy,
)
from mctd_diffusers.search.tree import prune, to_json
from tests.strategies import searches
from tests.test_runner import Clock, Custom
from tests.toys import FailingEnvironment, problems_of, small_environment

STEPS = 4
DEFAULT = MCTD()


class StoppedError(Exception):
    """The process is gone."""


def save(
    folder: Path,
    strategy: Strategy,
    environment: MixtureEnvironment,
    problems: Sequence[Problem],
    log: SearchLog,
    stop_reasons: Sequence[StopReason | None] | None = None,
) -> None:
    """Save a search over mixtures."""

    def write_samples(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **environment.export(log.live_handles()))

    save_search(
        folder,
        strategy=strategy,
        problems=problems,
        log=log,
        stop_reasons=stop_reasons or [None] * len(problems),
        call={"kind": "mixture"},
        write_samples=write_samples,
    )


def resume(
    folder: Path, environment: MixtureEnvironment, strategy: Strategy | None = None, **run: Any
) -> list[SearchResult]:
    """Go on with a search over mixtures in a new environment."""
    saved = load_search(folder, strategy=strategy)
    with np.load(saved.samples) as samples:
        environment.restore(
            dict(samples), saved.log.live_handles(), num_handles=saved.log.num_handles
        )
    return run_search(saved.strategy, environment, saved.problems, log=saved.log, **run)


def stopping_after(waves: int) -> Callable[[Wave], None]:
    """Stops the process after so many waves."""
    left = waves

    def on_wave(wave: Wave) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise StoppedError

    return on_wave


def assert_same_search(ones: Sequence[SearchResult], others: Sequence[SearchResult]) -> None:
    """Equal to the last bit: trees with handles, what was found and spent, and the replies."""
    for one, other in zip(ones, others, strict=True):
        assert to_json(one.tree) == to_json(other.tree)
        assert one.finished == other.finished
        assert one.spent == other.spent
        assert one.history == other.history
        assert one.stop_reason == other.stop_reason
        assert [reply.spent for reply in one.replies] == [reply.spent for reply in other.replies]
        for reply, same in zip(one.replies, other.replies, strict=True):
            np.testing.assert_array_equal(reply.result, same.result)


# ---- predictions


def test_predictions_come_back_from_a_log_bit_for_bit(tmp_path: Path) -> None:
    odd = np.array([[0.1, np.nan], [-np.inf, -0.0]])

    class Odd(MixtureEnvironment):
        def predict_gain(self, handles: Handles, strides: Sequence[int]) -> Gains:
            assert strides == ((1, 2) if len(handles) == 2 else (3,))
            return Gains(*(odd[: len(handles), : len(strides)] * (1 + i) for i in range(4)))

    found: list[Gains] = []

    def asking(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 2 - problem.index)
        yield from denoise(problem, nodes)
        found.append((yield from predict_gain(problem, nodes, (3,) if problem.index else (1, 2))))
        yield from finish_plainly(problem, nodes)

    strategy = Custom(asking)
    world = small_environment(2, STEPS, make=Odd)
    problems, log = problems_of(world, Budget(nfe=8), strategy=strategy), SearchLog()
    results = run_search(strategy, world, problems, log=log)
    save(tmp_path, strategy, world, problems, log)
    saved = load_search(tmp_path, strategy=strategy)
    assert_same_search(results, saved.results())
    assert len(found) == 4
    for asked, read in zip(found[:2], found[2:], strict=True):
        assert [part.shape for part in read] == [part.shape for part in asked]
        assert [part.tobytes() for part in read] == [part.tobytes() for part in asked]


# ---- stopped and resumed


@settings(max_examples=30)
@given(searches, st.integers(4, 30), st.integers(1, 12), st.integers(1, 6))
def test_a_search_stopped_at_any_wave_goes_on_as_if_never_stopped(
    tmp_path_factory: pytest.TempPathFactory,
    strategy: Strategy,
    nfe: int,
    first_stop: int,
    every: int,
) -> None:
    budget = Budget(nfe=max(nfe, strategy.least_evaluations(STEPS)))
    whole_world = small_environment(2, STEPS)
    whole = run_search(strategy, whole_world, problems_of(whole_world, budget, strategy=strategy))
    folder = tmp_path_factory.mktemp("saved")

    world = small_environment(2, STEPS)
    problems, log = problems_of(world, budget, strategy=strategy), SearchLog()
    stop, results = first_stop, None
    try:
        results = run_search(strategy, world, problems, log=log, on_wave=stopping_after(stop))
    except StoppedError:
        save(folder, strategy, world, problems, log)
    while results is None:  # stopped again and again, each time in another world
        world, saved = small_environment(2, STEPS), load_search(folder)
        with np.load(saved.samples) as samples:
            handles = saved.log.live_handles()
            world.restore(dict(samples), handles, num_handles=saved.log.num_handles)
        try:
            results = run_search(
                saved.strategy,
                world,
                saved.problems,
                log=saved.log,
                on_wave=stopping_after(every),
            )
        except StoppedError:
            save(folder, saved.strategy, world, saved.problems, saved.log)
    assert_same_search(results, whole)
    assert world.ledger.total == whole_world.ledger.total
    assert world.ledger.by_problem == whole_world.ledger.by_problem


@pytest.mark.parametrize("after", [1, 2, 5, 9, 14])
@pytest.mark.parametrize("strategy", [BestOfN(wave_size=2), Beam(candidates=2), MCTD()])
def test_a_call_that_ctrl_c_broke_off_is_made_again(
    tmp_path: Path, strategy: Strategy, after: int
) -> None:
    budget = Budget(nfe=24)
    whole_world = small_environment(2, STEPS)
    whole = run_search(strategy, whole_world, problems_of(whole_world, budget, strategy=strategy))
    world = small_environment(2, STEPS, make=FailingEnvironment)
    assert isinstance(world, FailingEnvironment)
    world.after = after
    problems, log = problems_of(world, budget, strategy=strategy), SearchLog()
    try:
        run_search(strategy, world, problems, log=log)
    except KeyboardInterrupt:
        pass
    save(tmp_path, strategy, world, problems, log)
    again = small_environment(2, STEPS)
    assert_same_search(resume(tmp_path, again), whole)
    assert again.ledger.total == whole_world.ledger.total


@pytest.mark.parametrize("waves", [1, 5, 9])
@pytest.mark.parametrize("strategy", [BestOfN(wave_size=2), Beam(candidates=2), MCTD()])
def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been(
    tmp_path: Path, strategy: Strategy, waves: int
) -> None:
    budget = Budget(nfe=24)
    whole_world = small_environment(2, STEPS)
    whole = run_search(strategy, whole_world, problems_of(whole_world, budget, strategy=strategy))
    world, seen = small_environment(2, STEPS), list[Wave]()
    problems, log = problems_of(world, budget, strategy=strategy), SearchLog()
    interrupted = run_search(
        strategy,
        world,
        problems,
        log=log,
        on_wave=seen.append,
        is_interrupted=lambda: len(seen) >= waves,
    )
    assert all(result.best is not None for result in interrupted)
    save(tmp_path, strategy, world, problems, log)
    again = small_environment(2, STEPS)
    assert_same_search(resume(tmp_path, again), whole)
    assert again.ledger.total == whole_world.ledger.total


@pytest.mark.parametrize("waves", [2, 6, 8, 10])
def test_the_seconds_of_a_search_go_on_where_they_stopped(tmp_path: Path, waves: int) -> None:
    budget, strategy = Budget(nfe=60), Beam(candidates=2)
    whole_world = small_environment(2, 6)
    whole = run_search(
        strategy,
        whole_world,
        problems_of(whole_world, budget, strategy=strategy),
        seconds=7,
        clock=Clock(),
    )
    assert [result.stop_reason for result in whole] == ["time"] * 2
    world = small_environment(2, 6)
    problems, log = problems_of(world, budget, strategy=strategy), SearchLog()
    with pytest.raises(StoppedError):
        run_search(
            strategy,
            world,
            problems,
            log=log,
            seconds=7,
            clock=Clock(),
            on_wave=stopping_after(waves),
        )
    save(tmp_path, strategy, world, problems, log)
    again = small_environment(2, 6)
    assert_same_search(resume(tmp_path, again, seconds=7, clock=Clock()), whole)


def test_pruned_samples_are_not_saved(tmp_path: Path) -> None:
    def forgetful(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 3)
        yield Release(np.array(prune(problem.tree, nodes[2])))
        yield from finish_plainly(problem, nodes[:1])
        nodes = yield from draw(problem, 1)  # its handle comes after the released one
        yield from finish_plainly(problem, nodes)

    strategy, budget = Custom(forgetful), Budget(nfe=8)
    whole_world = small_environment(1, STEPS)
    whole = run_search(strategy, whole_world, problems_of(whole_world, budget))
    world = small_environment(1, STEPS)
    problems, log = problems_of(world, budget), SearchLog()
    with pytest.raises(StoppedError):
        run_search(strategy, world, problems, log=log, on_wave=stopping_after(1))
    assert log.live_handles().tolist() == [0, 1]
    assert log.num_handles == 3
    save(tmp_path, strategy, world, problems, log)
    assert_same_search(resume(tmp_path, small_environment(1, STEPS), strategy), whole)


def test_a_finished_search_is_rebuilt_without_a_world(tmp_path: Path) -> None:
    strategy = MCTD()
    world = small_environment(2, STEPS)
    problems, log = problems_of(world, Budget(nfe=20), strategy=strategy), SearchLog()
    whole = run_search(strategy, world, problems, log=log)
    save(tmp_path, strategy, world, problems, log, [result.stop_reason for result in whole])
    saved = load_search(tmp_path)
    assert saved.is_over
    assert saved.call == {"kind": "mixture"}
    assert_same_search(saved.results(), whole)
    assert_same_search(saved.results(), whole)  # asked again as well


# ---- one image fails


class PoisonedEnvironment(MixtureEnvironment):
    """Its reward fails for one image, as long as it is poisoned."""

    poisoned: int | None = None

    def reward(self, handles: Any) -> Any:
        rows = self._problem[handles]
        if self.poisoned is not None and (rows == self.poisoned).any():
            raise RewardError(f"no reward for image {self.poisoned}", handles=handles.tolist())
        return super().reward(handles)


@pytest.mark.parametrize("strategy", [BestOfN(wave_size=2), Beam(candidates=2), MCTD()])
def test_one_image_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, strategy: Strategy
) -> None:
    budget = Budget(nfe=24)
    whole_world = small_environment(3, STEPS)
    whole = run_search(strategy, whole_world, problems_of(whole_world, budget, strategy=strategy))
    world = small_environment(3, STEPS, make=PoisonedEnvironment)
    assert isinstance(world, PoisonedEnvironment)
    world.poisoned = 1
    problems, log = problems_of(world, budget, strategy=strategy), SearchLog()
    with pytest.raises(RewardError, match="no reward for image 1") as caught:
        run_search(strategy, world, problems, log=log)
    results = caught.value.partial
    assert [result.stop_reason for result in results] == ["budget", "error", "budget"]
    assert [result.error for result in results] == [None, caught.value, None]
    for position in (0, 2):  # as if it had not been there, but for the order of handles
        for column in ("parent", "seed", "stride", "visit_count"):
            np.testing.assert_array_equal(
                getattr(results[position].tree, column), getattr(whole[position].tree, column)
            )
        np.testing.assert_allclose(
            results[position].tree.reward, whole[position].tree.reward, rtol=1e-12
        )
        assert results[position].spent == whole[position].spent
    spent = [world.ledger.spent(position).nfe for position in range(3)]
    assert spent == [result.spent.nfe for result in results]

    # With a reward that works again the search of that image goes on.
    save(tmp_path, strategy, world, problems, log)
    again = small_environment(3, STEPS)
    healed = resume(tmp_path, again)
    assert [result.stop_reason for result in healed] == ["budget"] * 3
    assert [result.spent for result in healed] == [result.spent for result in whole]
    np.testing.assert_allclose(healed[1].tree.reward, whole[1].tree.reward, rtol=1e-12)


def test_an_error_of_every_image_ends_the_search() -> None:
    world = small_environment(2, STEPS)
    world.rewards = (lambda x: np.full(len(x), np.nan),) * 2
    with pytest.raises(SearchError) as caught:
        run_search(BestOfN(), world, problems_of(world, Budget(nfe=8)))
    assert [result.stop_reason for result in caught.value.partial] == ["error"] * 2


# ---- the folder


def searched(
    strategy: Strategy = DEFAULT, nfe: int = 12
) -> tuple[MixtureEnvironment, list[Problem], SearchLog]:
    world = small_environment(1, STEPS)
    problems, log = problems_of(world, Budget(nfe=nfe), strategy=strategy), SearchLog()
    run_search(strategy, world, problems, log=log)
    return world, problems, log


def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path: Path) -> None:
    world, problems, log = searched()
    save(tmp_path, MCTD(), world, problems, log)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert before == ["log-0.npz", "samples-0", "search.json"]

    def break_off(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_search(
            tmp_path,
            strategy=MCTD(),
            problems=problems,
            log=log,
            stop_reasons=[None],
            call={},
            write_samples=break_off,
        )
    assert len(load_search(tmp_path).log.answers) == len(log.answers)
    save(tmp_path, MCTD(), world, problems, log, ["budget"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log-1.npz",
        "samples-1",
        "search.json",
    ]
    assert load_search(tmp_path).is_over


def test_a_folder_without_a_search_says_so(tmp_path: Path) -> None:
    assert not has_saved_search(tmp_path)
    with pytest.raises(ConfigError, match=r"no saved search is in .*search\.json is missing"):
        load_search(tmp_path)
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_search(tmp_path)


def test_a_search_of_another_format_or_strategy_is_refused(tmp_path: Path) -> None:
    world, problems, log = searched()
    save(tmp_path, MCTD(), world, problems, log)
    with pytest.raises(ConfigError, match=r"the saved search is MCTD\(.* is another"):
        load_search(tmp_path, strategy=Beam())
    index = json.loads((tmp_path / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps({**index, "format": 99}))
    with pytest.raises(ConfigError, match="format 99, this package reads format 3"):
        load_search(tmp_path)


def test_a_strategy_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    def plain(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 1)
        yield from finish_plainly(problem, nodes)

    strategy = Custom(plain)
    save(tmp_path, strategy, *searched(strategy))
    with pytest.raises(ConfigError, match="'custom' is a strategy of your own"):
        load_search(tmp_path)
    assert load_search(tmp_path, strategy=strategy).results()[0].best is not None


@pytest.mark.parametrize("name", [*STRATEGIES, *PRESETS])
def test_every_search_of_the_box_comes_back_with_its_settings(tmp_path: Path, name: str) -> None:
    strategy = resolve_strategy(name)
    save(tmp_path, strategy, small_environment(1, STEPS), [], SearchLog())
    assert load_search(tmp_path).strategy == strategy


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    def save_call(call: dict[str, Any]) -> None:
        save_search(
            tmp_path,
            strategy=MCTD(),
            problems=[],
            log=SearchLog(),
            stop_reasons=[],
            call=call,
            write_samples=lambda path: path.write_bytes(b""),
        )

    save_call({"width": np.int64(16), "scale": np.float32(0.5)})
    assert load_search(tmp_path).call == {"width": 16, "scale": 0.5}
    with pytest.raises(TypeError, match="is no plain data"):
        save_call({"width": object()})
    assert load_search(tmp_path).call == {"width": 16, "scale": 0.5}


@pytest.mark.parametrize("other", [Beam(), MCTD(exploration=2.0, wave_size=1), BestOfN()])
def test_a_log_of_another_search_is_refused(other: Strategy) -> None:
    world, _, log = searched(MCTD(seed_share=0.3), nfe=40)
    with pytest.raises(ConfigError, match="the log does not fit the search"):
        rebuild(other, problems_of(world, Budget(nfe=40)), log)


def test_samples_are_restored_under_their_handles_into_a_new_world_only() -> None:
    world, _, log = searched()
    handles = log.live_handles()
    saved = world.export(handles)
    with pytest.raises(ConfigError, match="restore each once, into a new environment"):
        world.restore(saved, handles)
    new = small_environment(1, STEPS)
    np.testing.assert_array_equal(new.restore(saved, handles, num_handles=99), handles)
    np.testing.assert_array_equal(new.latents(handles), world.latents(handles))
    assert new.reset(np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)).tolist() == [99]

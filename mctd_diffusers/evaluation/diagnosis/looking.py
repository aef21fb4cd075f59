"""Looking into one search: its samples made again, continued, and compared with a pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.diagnosis.terms import (
    Diagnosis,
    Effort,
    Level,
    Scores,
    sibling_regret,
)
from mctd_diffusers.evaluation.making_again import Maker, OnNfe, evaluated_for
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.results import MOVE_NAMES
from mctd_diffusers.search.environment import (
    FIRST_DRAW,
    Environment,
    Handles,
    Values,
)
from mctd_diffusers.search.runner import Finished, SearchResult
from mctd_diffusers.search.seeding import child_seed, root_seed_of
from mctd_diffusers.search.strides import constant_strides
from mctd_diffusers.search.tree import (
    DRAW,
    ROOT,
    STEP,
    Tree,
    path_to_root,
)

GoldOfSamples: TypeAlias = Callable[[Handles], Values]
"""Gold of finished samples of an environment."""
ExactValue: TypeAlias = Callable[[Handles, Sequence[int]], Values]
"""Exact value of unfinished samples at these step indices, where there is a closed form."""

_REPEATED_REWARD: Final = 1e-3  # by so much, relatively, a reward may differ when it is asked again


class Choice(NamedTuple):
    """One choice among siblings, before it is looked into.

    Attributes:
        chosen: row of the winner's ancestor.
        rejected: rows of those siblings that are looked at.
        num_rejected: how many there are.
    """

    chosen: int
    rejected: tuple[int, ...]
    num_rejected: int


def choices_on_path(tree: Tree, node: int, siblings: int) -> list[Choice]:
    """Choices on the way from the root to ``node``, noisiest first.

    Args:
        tree: of the search.
        node: the winner.
        siblings: rejected siblings to look at, those of the highest estimate: the best reward found
            below them, or else their own value; those without any come last.
    """
    estimate = _estimates(tree)
    path = path_to_root(tree, node)[::-1]
    choices = []
    for parent, chosen in pairwise(path):
        others = [child for child in tree.children(parent) if child != chosen]
        if others:
            others.sort(key=lambda child: -estimate[child])  # stable: among equals the earlier
            choices.append(Choice(chosen, tuple(others[:siblings]), len(others)))
    return choices


def _estimates(tree: Tree) -> Values:
    """``[num_nodes]`` best reward below each node, else its own value; ``-inf`` without any."""
    best = tree.reward.copy()
    for node in range(tree.num_nodes - 1, ROOT, -1):  # a parent comes before its children
        best[tree.parent[node]] = np.fmax(best[tree.parent[node]], best[node])
    best = np.where(np.isnan(best), tree.value, best)
    return np.where(np.isnan(best), -np.inf, best)


def planned_nfe(
    result: SearchResult,
    num_steps: int,
    effort: Effort,
    *,
    reused: int = 0,
    exact: bool = False,
) -> int:
    """Evaluations that the diagnosis of one image makes, to the last one.

    Args:
        result: of the search; one that has finished a sample.
        num_steps: of the schedule.
        effort: what is spent.
        reused: plain samples at hand, see :func:`plain_rows`.
        exact: whether values are exact, so that nothing is continued.
    """
    tree, winner = result.tree, winner_of(result).node
    nodes = _looked_at(choices_on_path(tree, winner, effort.siblings))
    evaluated = evaluated_for(tree, [winner, *nodes], num_steps)
    nfe = max(effort.pool - reused, 0) * num_steps
    for node in [] if exact else nodes:
        left = num_steps - int(tree.step_index[node])
        if left:
            evaluated.add(node)
            later_edges = len(constant_strides(left, effort.stride)) - 1
            nfe += _num_continuations(left, effort) * later_edges
    return nfe + len(evaluated)


def num_scored(result: SearchResult, num_steps: int, effort: Effort, *, reused: int = 0) -> int:
    """Samples that the diagnosis of one image decodes and scores, without exact values."""
    tree, winner = result.tree, winner_of(result).node
    nodes = _looked_at(choices_on_path(tree, winner, effort.siblings))
    lefts = [num_steps - int(tree.step_index[node]) for node in nodes]
    continued = sum(_num_continuations(left, effort) for left in lefts)
    return 1 + continued + max(effort.pool, reused)


def winner_of(result: SearchResult) -> Finished:
    """The search's own best sample.

    Raises:
        ConfigError: the search has finished no sample.
    """
    if result.best is None:
        raise ConfigError(
            f"the search of image {result.problem} stopped ({result.stop_reason}) before a sample "
            "was finished, so there is nothing to diagnose: give it a larger budget"
        )
    return result.best


def plain_rows(result: SearchResult) -> list[int]:
    """Which of ``result.finished`` can stand in a pool: of every draw one, plainly stepped.

    Where a search went on from some of its draws only, those are selected, and none can.
    """
    tree = result.tree
    found: dict[int, int] = {}
    for row, sample in enumerate(result.finished):
        *steps, draw, _ = path_to_root(tree, sample.node)
        is_plain = (
            (tree.move[steps] == STEP)
            & (tree.stride[steps] == 1)
            & np.isnan(tree.eta[steps])
            & np.isnan(tree.guidance[steps])
        )
        if is_plain.all():
            found.setdefault(draw, row)
    return list(found.values()) if set(found) == set(tree.children(ROOT)) else []


def _looked_at(choices: Sequence[Choice]) -> list[int]:
    """Rows that are to be continued."""
    return [node for choice in choices for node in (choice.chosen, *choice.rejected)]


def _num_continuations(left: int, effort: Effort) -> int:
    """How many to make from ``left`` steps before the end.

    The last edge draws no noise, so over that alone all would be one.
    """
    return effort.continuations if left > effort.stride else 1


@dataclass(frozen=True)
class Scene:
    """What a search is diagnosed in: its own world over again, with another ledger.

    Attributes:
        environment: of the same model, schedule and reward; not the search's own.
        problem: its number of the image.
        gold: of finished samples of ``environment``.
        noise_levels: ``[num_steps + 1]`` standard deviation of the noise at each step index.
        plain: the search's own plain samples (:func:`plain_rows`), in ``environment``.
        exact: exact values by proxy and by gold; ``None`` to estimate them by continuations.
    """

    environment: Environment
    problem: int
    gold: GoldOfSamples
    noise_levels: Sequence[float]
    plain: Handles | None = None
    exact: tuple[ExactValue, ExactValue] | None = None


def diagnose_search(
    scene: Scene,
    result: SearchResult,
    effort: Effort | None = None,
    *,
    prompt: str = "",
    top_gold: float | None = None,
    on_nfe: OnNfe | None = None,
) -> Diagnosis:
    """Say where the search of one image falls short.

    Args:
        scene: what it is diagnosed in.
        result: of the search.
        effort: what may be spent.
        prompt: what was drawn.
        top_gold: the greatest possible gold, if it is known.
        on_nfe: is told of evaluations as they are made.

    Raises:
        ConfigError: the search has finished nothing; or the winner, made again, scores otherwise:
            the environment is another.
        SearchError: what gold or reward raise.
    """
    winner = winner_of(result)
    effort = effort or Effort()
    environment, tree = scene.environment, result.tree
    started, before = time.monotonic(), environment.ledger.spent(scene.problem)
    choices = choices_on_path(tree, winner.node, effort.siblings)
    nodes = _looked_at(choices)
    look = _Look(scene, tree, effort, on_nfe)
    made = look.make_again([winner.node, *nodes])
    won = look.scores(np.array([made[winner.node]])).of(0)
    _check_repeated(winner.reward, won.proxy)
    looks = look.into({node: made[node] for node in nodes})
    plain = np.empty(0, dtype=np.int64) if scene.plain is None else scene.plain
    pool = look.pool(plain)
    return Diagnosis(
        prompt=prompt,
        strategy=result.strategy,
        num_steps=environment.num_steps,
        top_gold=top_gold,
        winner=won,
        pick=pool.of(int(pool.proxy.argmax())),
        best=pool.of(int(pool.gold.argmax())),
        mean=pool.mean(),
        pool=len(pool.gold),
        reused=len(plain),
        levels=tuple(_level(scene, tree, choice, looks) for choice in choices),
        spent=environment.ledger.spent(scene.problem) - before,
        seconds=time.monotonic() - started,
    )


class _Scored(NamedTuple):
    """Scores of several samples: ``[samples]`` each."""

    proxy: Values
    gold: Values

    def of(self, row: int) -> Scores:
        return Scores(float(self.proxy[row]), float(self.gold[row]))

    def mean(self) -> Scores:
        return Scores(float(self.proxy.mean()), float(self.gold.mean()))


class _Look:
    """The requests of a diagnosis to its environment."""

    def __init__(self, scene: Scene, tree: Tree, effort: Effort, on_nfe: OnNfe | None) -> None:
        self._scene = scene
        self._environment = scene.environment
        self._num_steps = scene.environment.num_steps
        self._tree = tree
        self._effort = effort
        self._maker = Maker(scene.environment, scene.problem, tree, on_nfe)
        self.make_again = self._maker.make_again

    def into(self, samples: dict[int, int]) -> dict[int, _Scored]:
        """Scores of continuations of samples (row to handle), by row; exact ones are single."""
        if self._scene.exact is not None:
            return self._exact(samples, *self._scene.exact)
        counts = [
            _num_continuations(self._num_steps - int(self._tree.step_index[node]), self._effort)
            for node in samples
        ]
        owners = np.repeat(np.array(list(samples), dtype=np.int64), counts)
        seeds = [
            _fresh_seed(self._tree, node, ordinal)
            for node, count in zip(samples, counts, strict=True)
            for ordinal in range(count)
        ]
        finished = self._maker.finish(
            np.array([samples[node] for node in owners.tolist()], dtype=np.int64),
            self._tree.step_index[owners],
            np.array(seeds, dtype=np.int64),
            stride=self._effort.stride,
            eta=self._effort.eta,
        )
        scored = self.scores(finished)
        return {
            node: _Scored(scored.proxy[owners == node], scored.gold[owners == node])
            for node in samples
        }

    def pool(self, reused: Handles) -> _Scored:
        """Scores of plain samples, those at hand first."""
        count = max(self._effort.pool - len(reused), 0)
        seeds = [
            root_seed_of(b"diagnosis|pool|%d|%d" % (self._tree.root_seed, ordinal))
            for ordinal in range(count)
        ]
        if not count:
            return self.scores(reused)
        drawn = self._environment.reset(
            np.full(count, self._scene.problem), np.array(seeds, dtype=np.int64)
        )
        start = np.zeros(count, dtype=np.int64)
        finished = self._maker.finish(drawn, start, np.array(seeds), stride=1, eta=None)
        return self.scores(np.concatenate([reused, finished]))

    def scores(self, handles: Handles) -> _Scored:
        """Scores of finished samples."""
        return _Scored(self._environment.reward(handles), self._scene.gold(handles))

    def _exact(
        self, samples: dict[int, int], proxy: ExactValue, gold: ExactValue
    ) -> dict[int, _Scored]:
        """Exact values of unfinished samples, and the scores of finished ones."""
        found = {}
        for node, handle in samples.items():
            handles, step_index = np.array([handle]), int(self._tree.step_index[node])
            found[node] = (
                self.scores(handles)
                if step_index == self._num_steps
                else _Scored(proxy(handles, [step_index]), gold(handles, [step_index]))
            )
        return found


def _fresh_seed(tree: Tree, node: int, ordinal: int) -> int:
    """Seed of a continuation: of the node's own edge, but none that a search ever gives out."""
    seed = int(tree.seed[node])
    if seed == FIRST_DRAW:
        seed = child_seed(tree.root_seed, DRAW, 0, 0)
    return root_seed_of(b"diagnosis|continuation|%d|%d" % (seed, ordinal))


def _level(scene: Scene, tree: Tree, choice: Choice, looks: dict[int, _Scored]) -> Level:
    """A choice and what came of looking into it."""
    chosen = looks[choice.chosen]
    rejected = [looks[node] for node in choice.rejected]
    step_index = int(tree.step_index[choice.chosen])
    return Level(
        node=choice.chosen,
        move=MOVE_NAMES[int(tree.move[choice.chosen])],
        step_index=step_index,
        noise_level=float(scene.noise_levels[step_index]),
        rejected=choice.num_rejected,
        looked_at=len(choice.rejected),
        proxy=sibling_regret(chosen.proxy, [look.proxy for look in rejected]),
        gold=sibling_regret(chosen.gold, [look.gold for look in rejected]),
    )


def _check_repeated(recorded: float, again: float) -> None:
    """Refuse a world in which the winner is another.

    Raises:
        ConfigError: its reward differs.
    """
    if abs(again - recorded) > _REPEATED_REWARD * max(abs(recorded), abs(again)):
        raise ConfigError(
            f"the winner, made again, has reward {again:.6g} where the search saw {recorded:.6g}: "
            "diagnose with the model, the reward and the arguments of the search"
        )


def exact_value_of(environment: MixtureEnvironment, problem: int, reward: Any) -> ExactValue:
    """Expected reward of the clean sample behind unfinished ones, in closed form.

    It is what continuations tend to as steps become small, or at once where they are drawn by the
    exact transition.

    Args:
        environment: of mixtures.
        problem: its number of the image.
        reward: one with a ``hard_value``.

    Raises:
        ConfigError: the reward has none.
    """
    if not hasattr(reward, "hard_value"):
        raise ConfigError(
            f"{type(reward).__name__} has no hard_value in closed form: leave exact out, so that "
            "values are estimated"
        )
    mixture = environment.mixtures[problem]

    def value(handles: Handles, step_indices: Sequence[int]) -> Values:
        values = [
            reward.hard_value(
                mixture.posterior(x[None], environment.alpha[at], environment.sigma[at])
            )[0]
            for x, at in zip(environment.latents(handles), step_indices, strict=True)
        ]
        return np.array(values)

    return value

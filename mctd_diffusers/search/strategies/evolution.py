"""Evolution: populations of samples whose noise is mutated, early in the schedule and late.

After EvoSearch (2025, arXiv 2505.17618):

1. start: finish a population of new initial noises;
2. at each step index of the *evolution schedule*, in turn: choose parents among the samples
   finished so far by tournament, go back to the state that each had there, mutate it, and finish
   the offspring from there. Fitness is always the reward of a finished sample.

At step index 0 the state is an initial noise, and a mutation is ``sqrt(1 - b^2) x + b fresh``, as
in the paper. Later the paper adds fresh noise of the deviation that the sampler's step has there;
here it is mixed into the noise that the step injected (``moves.perturb``), so that offspring keep
the sampler's law. The paper's addition, scaled back to that law, is a strength of ``sqrt(1/2)``.
The paper denoises its elites again; here states are stored, so elites cost nothing: they are the
samples of earlier generations that stay among the parents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.budget import UNLIMITED
from mctd_diffusers.search.environment import Asks, Values
from mctd_diffusers.search.moves import back_up, draw, finish, generator_for, perturb
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.selection import best_first
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strides import constant_strides
from mctd_diffusers.search.tree import ancestor_at


@dataclass(frozen=True)
class Evolution:
    """Evolutionary search over initial noises and intermediate states.

    Attributes:
        schedule: where states are mutated, as ascending shares of the schedule, 0 to below 1; each
            means the nearest state of a rollout, and those that mean the same state are one.
        populations: relative sizes of the first population and of the one at each entry of
            ``schedule``, above 0: a budget is split in proportion to their evaluations. Without a
            bound on the budget these are the sizes.
        elites: best samples of earlier generations that stay among the parents.
        tournament: share of the parents that meet in a tournament, above 0 to 1; the best of them
            is the parent of one mutant.
        strength: share of fresh noise in a mutation of an initial noise, 0 to 1.
        state_strength: share of fresh noise in a mutation of a later state, 0 to 1.
        stride: schedule steps that an edge of a rollout crosses; ``None``: the longest up to a
            quarter of the schedule.
        branch_eta: share of fresh noise on the edges that lead to states to be mutated, above 0 to
            1; all other edges are as the user's scheduler says.
    """

    schedule: tuple[float, ...] = (0.0, 0.4, 0.6, 0.8)
    populations: tuple[float, ...] = (42, 26, 26, 26, 30)
    elites: int = 5
    tournament: float = 0.9
    strength: float = 0.2
    state_strength: float = 0.7
    stride: int | None = None
    branch_eta: float = 1.0

    def __post_init__(self) -> None:
        for name in ("schedule", "populations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for share in self.schedule:
            check_setting("schedule", share, 0, 1)
        if list(self.schedule) != sorted(set(self.schedule)) or 1 in self.schedule:
            raise ConfigError(
                f"schedule is {self.schedule}; give ascending shares from 0 to below 1."
            )
        for size in self.populations:
            check_setting("populations", size, 0)
        if len(self.populations) != len(self.schedule) + 1 or not all(self.populations):
            raise ConfigError(
                f"populations are {self.populations} and schedule is {self.schedule}; give a size "
                "above 0 for the first population and one for each entry of the schedule."
            )
        check_setting("elites", self.elites, 0, whole=True)
        if self.stride is not None:
            check_setting("stride", self.stride, 1, whole=True)
        for name in ("strength", "state_strength", "tournament", "branch_eta"):
            check_setting(name, getattr(self, name), 0, 1)
        for name in ("tournament", "branch_eta"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a share above 0 to 1.")

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "evolution"

    def least_evaluations(self, num_steps: int) -> int:
        """One sample."""
        return len(self._strides(num_steps))

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges."""
        return max(self._strides(num_steps))

    def _strides(self, num_steps: int) -> tuple[int, ...]:
        """The edges of a rollout."""
        return constant_strides(num_steps, self.stride or max(num_steps // 4, 1))

    def search(self, problem: Problem) -> Asks:
        """A start and its generations, again only where the budget pays for another start."""
        chance = generator_for(problem, self.name)
        start, *generations = self._generations(problem.num_steps)
        while count := self._size(problem, [start, *generations]) or self._can_start(problem):
            noises = yield from draw(problem, count)
            parents = yield from self._finish(problem, noises, start)
            for place, generation in enumerate(generations):
                count = self._size(problem, generations[place:])
                if not count:
                    continue
                states = self._select(problem, parents, count, generation, chance)
                strength = self.state_strength if generation.step_index else self.strength
                mutants = yield from perturb(problem, states, strength=strength)
                offspring = yield from self._finish(problem, mutants, generation)
                parents = [*self._best(problem, parents), *offspring]
        return "budget"

    def perturbed_share(self, num_steps: int) -> float | None:
        """Share of fresh noise on the edges whose noise it perturbs; ``None`` if it is of none."""
        mutates_states = any(each.step_index for each in self._generations(num_steps))
        return self.branch_eta if mutates_states else None

    # ---- the plan

    def _generations(self, num_steps: int) -> list[_Generation]:
        """The start, then a generation for each state of a rollout that the schedule means."""
        strides = self._strides(num_steps)
        stands = np.cumsum([0, *strides[:-1]])  # step indices of the states of a rollout
        sizes: dict[int, float] = {}
        for share, size in zip(self.schedule, self.populations[1:], strict=True):
            place = int(np.argmin(np.abs(stands - share * num_steps)))
            sizes[place] = sizes.get(place, 0.0) + size
        mutated = [int(stands[place]) for place in sizes if place]
        etas = [self.branch_eta if end in mutated else None for end in np.cumsum(strides).tolist()]
        return [
            _Generation(int(stands[place]), size, strides[place:], tuple(etas[place:]))
            for place, size in ((0, self.populations[0]), *sizes.items())
        ]

    def _size(self, problem: Problem, rest: list[_Generation]) -> int:
        """Samples of the first of ``rest``: its share, by evaluations, of what is left."""
        first = rest[0]
        price = problem.account.price(evaluations=first.evaluations, rewards=1)
        most = problem.account.affordable(price, UNLIMITED)
        if most == UNLIMITED:
            return math.ceil(first.size)
        share = first.size * first.evaluations / sum(each.size * each.evaluations for each in rest)
        return min(round(share * most), most)

    def _can_start(self, problem: Problem) -> int:
        """1 where the budget pays for one sample, else 0."""
        evaluations = self.least_evaluations(problem.num_steps)
        sample = problem.account.price(evaluations=evaluations, rewards=1)
        return problem.account.affordable(sample, 1)

    # ---- the operators

    def _select(
        self,
        problem: Problem,
        parents: list[int],
        count: int,
        generation: _Generation,
        chance: np.random.Generator,
    ) -> list[int]:
        """States to mutate: for each mutant that of the winner of a tournament."""
        tree = problem.tree
        winners = tournaments(tree.reward[parents], count, share=self.tournament, generator=chance)
        return [ancestor_at(tree, parents[winner], generation.step_index) for winner in winners]

    def _finish(self, problem: Problem, nodes: list[int], generation: _Generation) -> Asks:
        """Finish states of one generation and back them up; returns the finished nodes."""
        leaves = yield from finish(problem, nodes, strides=generation.strides, etas=generation.etas)
        back_up(problem, leaves)
        return leaves

    def _best(self, problem: Problem, leaves: list[int]) -> list[int]:
        """The elites among finished nodes."""
        order = best_first(problem.tree.reward[leaves])
        return [leaves[i] for i in order[: self.elites]]


class _Generation(NamedTuple):
    """One population.

    Attributes:
        step_index: where its samples begin.
        size: relative to the other populations.
        strides: schedule steps of each edge from there to the end.
        etas: share of fresh noise of each; ``None`` as the user's scheduler says.
    """

    step_index: int
    size: float
    strides: tuple[int, ...]
    etas: tuple[float | None, ...]

    @property
    def evaluations(self) -> int:
        """Evaluations of one sample."""
        return len(self.strides)


def tournaments(
    fitness: Values, count: int, *, share: float, generator: np.random.Generator
) -> list[int]:
    """Winners of independent tournaments (Goldberg and Deb, 1991), without replacement in each.

    Args:
        fitness: ``[K]`` of those who compete, higher is better, at least one.
        count: tournaments.
        share: of all who meet in one, above 0 to 1; at least one does.
        generator: draws who meets.

    Returns:
        Position of each winner, the first of equals.
    """
    size = max(1, math.floor(share * len(fitness)))
    winners = []
    for _ in range(count):
        meeting = np.sort(generator.permutation(len(fitness))[:size])
        winners.append(int(meeting[np.argmax(fitness[meeting])]))
    return winners

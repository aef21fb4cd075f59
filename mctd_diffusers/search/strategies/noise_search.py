"""Noise search: change the noise that a sample is made of, and keep what is better.

Three ways, all without gradients:

- random search: new initial noises, of which the best is the answer;
- zero-order search over the initial noise (Ma et al., 2025, arXiv 2501.09732): a *pivot*, its
  neighbours by a small perturbation, a rollout of each; the pivot moves only to what is better;
- epsilon-greedy search over the noise of every step (noise trajectory search, 2025, arXiv
  2506.03164): on each edge, rounds of candidates, each by the value of its denoised estimate; a
  candidate is a fresh draw with probability epsilon, else a perturbation of the best so far.

A perturbation of strength ``b`` is ``sqrt(1 - b^2) * noise + b * fresh``, so that noise keeps its
law. In the parametrisation of zero-order search, ``|x| unit(lambda u + sqrt(1 - lambda^2) w)`` with
unit vectors ``u`` and ``w``, that is ``b = sqrt(1 - lambda^2)``, as norms of noise differ little in
high dimensions: its lambda of .95 is a strength of .31. The epsilon-greedy search adds ``lambda``
times fresh noise without taking from the old, ``b = lambda / sqrt(1 + lambda^2)``: its lambda of
.15 is a strength of .15. At the few rounds that a small budget pays for, longer moves do better:
the default of .5 was chosen on mixtures with exact answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from mctd_diffusers.errors import BudgetError, ConfigError
from mctd_diffusers.search.budget import UNLIMITED
from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.moves import (
    back_up,
    denoise,
    draw,
    finish,
    generator_for,
    perturb,
    reward,
    step,
    value,
)
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.selection import best_first
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strides import constant_strides

Method: TypeAlias = Literal["random", "zero_order", "eps_greedy"]

_CANDIDATES: Final = 4  # of a round, in both papers


@dataclass(frozen=True)
class NoiseSearch:
    """Search over noise: of the start, or of every step.

    Attributes:
        method: ``"random"`` or ``"zero_order"`` search over the initial noise by the rewards of
            finished samples, or ``"eps_greedy"`` search over the noise of each edge by values.
        candidates: noises tried in a round; ``None``: 4, or in ``"eps_greedy"`` as many up to 4 as
            one pass can pay for.
        rounds: of candidates on each edge in ``"eps_greedy"``; ``None``: as many as one pass can
            pay for (with the brake: as few passes as it allows).
        strength: share of fresh noise in a perturbation, 0 to 1.
        epsilon: probability of a fresh draw in ``"eps_greedy"``, 0 to 1; the first round on an edge
            has nothing to perturb, and draws.
        stride: schedule steps that an edge of any rollout crosses; ``None``: the longest up to a
            quarter of the schedule, in ``"eps_greedy"``, which values states, up to an eighth.
        branch_eta: share of fresh noise on the edges that ``"eps_greedy"`` searches, above 0 to 1.
        brake_nats: bound on the summed log of candidates along a path, which keeps selection on the
            data manifold; it applies where ``"eps_greedy"`` chooses its rounds.
    """

    method: Method = "eps_greedy"
    candidates: int | None = None
    rounds: int | None = None
    strength: float = 0.5
    epsilon: float = 0.4
    stride: int | None = None
    branch_eta: float = 1.0
    brake_nats: float = 30.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(
                f"method is {self.method!r}; give one of {', '.join(get_args(Method))}."
            )
        for name in ("candidates", "rounds", "stride"):
            if getattr(self, name) is not None:
                check_setting(name, getattr(self, name), 1, whole=True)
        for name in ("strength", "epsilon", "branch_eta"):
            check_setting(name, getattr(self, name), 0, 1)
        check_setting("brake_nats", self.brake_nats, 0)
        if not self.branch_eta:
            raise ConfigError(
                f"branch_eta is {self.branch_eta!r}; without noise on its edges there is nothing "
                "to search: give a share above 0."
            )

    def perturbed_share(self, num_steps: int) -> float | None:
        """Share of fresh noise on the edges whose noise it perturbs; ``None`` if it is of none."""
        del num_steps
        return self.branch_eta if self.method == "eps_greedy" else None

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "noise_search"

    def least_evaluations(self, num_steps: int) -> int:
        """One rollout; in ``"eps_greedy"`` one pass with the candidates and rounds asked for."""
        if self.method != "eps_greedy":
            return len(self._strides(num_steps))
        return self._pass_evaluations(num_steps, _Plan(self.rounds or 1, self.candidates or 1))

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges."""
        return max(self._strides(num_steps))

    def _strides(self, num_steps: int) -> tuple[int, ...]:
        """The edges of a rollout."""
        fewest = 8 if self.method == "eps_greedy" else 4
        return constant_strides(num_steps, self.stride or max(num_steps // fewest, 1))

    def search(self, problem: Problem) -> Asks:
        """Search by the method until the budget pays for nothing more."""
        if self.method == "random":
            yield from self._random(problem)
        elif self.method == "zero_order":
            yield from self._zero_order(problem)
        else:
            yield from self._eps_greedy(problem)
        return "budget"

    # ---- over the initial noise, by rewards

    def _random(self, problem: Problem) -> Asks:
        """Rounds of new initial noises."""
        while count := self._num_rollouts(problem):
            nodes = yield from draw(problem, count)
            yield from self._roll_out(problem, nodes)

    def _zero_order(self, problem: Problem) -> Asks:
        """Rounds of neighbours of a pivot, which moves to the best of them if that is better."""
        (pivot,) = yield from draw(problem, 1)
        (best,) = yield from self._roll_out(problem, [pivot])
        while count := self._num_rollouts(problem):
            nodes = yield from perturb(problem, [pivot] * count, strength=self.strength)
            rewards = yield from self._roll_out(problem, nodes)
            top = best_first(rewards)[0]
            if rewards[top] > best:
                pivot, best = nodes[top], rewards[top]

    def _num_rollouts(self, problem: Problem) -> int:
        """Rollouts of the next round: as many as asked for, or as the account still pays."""
        edges = len(self._strides(problem.num_steps))
        each = problem.account.price(evaluations=edges, rewards=1)
        return problem.account.affordable(each, self.candidates or _CANDIDATES)

    def _roll_out(self, problem: Problem, nodes: list[int]) -> Asks:
        """Finish initial noises as the user's scheduler says; returns their rewards."""
        strides = self._strides(problem.num_steps)
        leaves = yield from finish(problem, nodes, strides=strides)
        back_up(problem, leaves)
        return problem.tree.reward[leaves]

    # ---- over the noise of every edge, by values

    def _eps_greedy(self, problem: Problem) -> Asks:
        """Passes, each from a new initial noise, as long as one is paid for."""
        plan = self._plan(problem)
        if plan is None:
            least = self.least_evaluations(problem.num_steps)
            raise BudgetError(
                f"{problem.budget} cannot pay for one pass of noise search with its {least} valued "
                f"evaluations over {problem.num_steps} steps; raise the budget, or use fewer "
                "candidates, rounds, steps or a longer stride."
            )
        chance = generator_for(problem, self.name)
        strides = self._strides(problem.num_steps)
        while plan is not None:
            (node,) = yield from draw(problem, 1)
            yield from denoise(problem, [node])
            for stride in strides[:-1]:
                node = yield from self._best_edge(problem, node, stride, plan, chance)
            leaves = yield from step(problem, [node], stride=strides[-1], eta=None)
            yield from reward(problem, leaves)
            back_up(problem, leaves)
            plan = self._plan(problem)

    def _best_edge(
        self, problem: Problem, parent: int, stride: int, plan: _Plan, chance: np.random.Generator
    ) -> Asks:
        """Search the noise of one edge; returns the best evaluated child."""
        pivot, best = -1, -math.inf
        for turn in range(plan.rounds):
            draws = chance.random(plan.candidates) < self.epsilon
            num_fresh = int(draws.sum()) if turn else plan.candidates
            nodes: list[int] = []
            if num_fresh:
                parents = [parent] * num_fresh
                nodes += yield from step(problem, parents, stride=stride, eta=self.branch_eta)
            if num_fresh < plan.candidates:
                pivots = [pivot] * (plan.candidates - num_fresh)
                nodes += yield from perturb(problem, pivots, strength=self.strength)
            yield from denoise(problem, nodes)
            if plan.per_edge == 1:  # nothing to choose from
                return nodes[0]
            values = yield from value(problem, nodes)
            top = best_first(values)[0]
            if values[top] > best:
                pivot, best = nodes[top], float(values[top])
        return pivot

    def _pass_evaluations(self, num_steps: int, plan: _Plan) -> int:
        """Evaluations of one pass: the draw, and all candidates of each edge but the last."""
        return 1 + (len(self._strides(num_steps)) - 1) * plan.per_edge

    def _plan(self, problem: Problem) -> _Plan | None:
        """Rounds and candidates of the next pass, as paid for and braked; ``None``: no pass is."""
        account = problem.account
        num_searched = len(self._strides(problem.num_steps)) - 1

        def affords(plan: _Plan) -> bool:
            values = num_searched * plan.per_edge if plan.per_edge > 1 else 0
            evaluations = self._pass_evaluations(problem.num_steps, plan)
            return account.affords(account.price(evaluations=evaluations, values=values, rewards=1))

        most = math.exp(min(self.brake_nats / max(num_searched, 1), 20.0))
        per_edge = most
        if account.evaluations_left != UNLIMITED:
            paid = (account.evaluations_left - 1) / max(num_searched, 1)
            per_edge = paid / max(math.ceil(paid / most), 1)
        while per_edge >= 1 and not affords(self._split(int(per_edge))):
            per_edge -= 1
        plan = self._split(max(int(per_edge), 1))
        return plan if affords(plan) else None

    def _split(self, per_edge: int) -> _Plan:
        """About ``per_edge`` candidates in rounds; what is set stays as it is."""
        candidates = self.candidates or max(min(_CANDIDATES, per_edge // (self.rounds or 1)), 1)
        return _Plan(self.rounds or max(per_edge // candidates, 1), candidates)


class _Plan(NamedTuple):
    """How an edge is searched.

    Attributes:
        rounds: on each edge.
        candidates: of each round.
    """

    rounds: int
    candidates: int

    @property
    def per_edge(self) -> int:
        """Candidates on one edge, in all."""
        return self.rounds * self.candidates

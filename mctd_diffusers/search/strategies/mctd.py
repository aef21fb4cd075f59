"""MCTD: Monte Carlo tree search over stored states of greedy rollouts, in waves.

After Yoon et al. (2025, MCTD, arXiv 2502.07202) and its parallel and sparse forms (arXiv
2506.09498), with what was measured on exact-score mixtures: the simulation is a *greedy rollout*
(on each edge the best of several children by the value of their denoised estimate), every evaluated
state of it stays in the tree to be resumed, long strides are used where little budget is left, and
the summed log of candidates along a path is bounded.

Until the budget is spent:

1. select: descend from the root by UCT among the stored children of each node (those without a
   finished sample below count with their calibrated estimate), until a node may be widened by the
   law of progressive widening, or was not visited before; count the visit as under way;
   ``wave_size`` times on one snapshot of the tree;
2. simulate: greedy rollouts from the selected nodes, side by side; from the root they begin by
drawing
   new initial noise;
3. evaluate: finished samples are decoded in full and scored;
4. back up: every reward is added along its path. The visits of a node are the backups through it,
   whatever the wave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, get_args

import numpy as np

from mctd_diffusers.errors import ConfigError, ScheduleError
from mctd_diffusers.search.backups import BackupFn, max_backup, mean_backup, soft_backup
from mctd_diffusers.search.environment import Asks, Values
from mctd_diffusers.search.moves import (
    denoise,
    draw,
    finish_plainly,
    gather,
    reward,
    step,
    value,
)
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.selection import (
    best_first,
    calibrated,
    halving_rounds,
    min_max,
    uct_scores,
)
from mctd_diffusers.search.strides import Plan, StridePolicy, plan_rollout
from mctd_diffusers.search.tree import (
    ROOT,
    Tree,
    add_virtual_visit,
    backup,
    path_to_root,
    settle,
)
from mctd_diffusers.search.widening import may_widen_progressively

_BACKUPS: Final = ("max", "mean", "soft")


@dataclass(frozen=True)
class MCTD:
    """Tree search over stored states of greedy rollouts.

    Attributes:
        candidates: children tried on each edge of a rollout; ``None`` to choose them (and the
            strides) for the most selection per NFE, see ``strides.plan_rollout``.
        strides: schedule steps that an edge may cross; must hold 1.
        stride_policy: where long strides stand: ``"coarse_to_fine"``, ``"fine_to_coarse"``,
            ``"constant"``.
        edge_gain: how the gain of a rollout grows with its number of selections (exponent, 0 to
            0.5): lower takes fewer edges with more candidates.
        first_share: share of the budget that the first rollout may spend; the waves after it spend
            the same share of what is left, in rollouts from stored states.
        wave_size: rollouts that run side by side on one snapshot of the tree.
        seed_share: share of the budget for drawing initial noises, halved by value as they are
            denoised; 0 leaves the choice among draws to the first edge of a rollout.
        exploration: weight of the UCT bonus on values that are min-max normalised among siblings.
        widening_constant: a node may have ``widening_constant * visits ** widening_exponent``
            children.
        widening_exponent: see there.
        finish: candidates of the last level of a rollout that are finished and scored in full.
        branch_eta: share of fresh noise on the edges that branch, 0 to 1.
        brake_nats: bound on the summed log of candidates along a path, which keeps selection on the
            data manifold.
        backup: what a node is worth: the ``"max"``, ``"mean"`` or ``"soft"`` of rewards below it.
        temperature: of the soft backup, in reward units.
    """

    candidates: int | None = None
    strides: tuple[int, ...] = (1, 2, 4, 8)
    stride_policy: StridePolicy = "coarse_to_fine"
    edge_gain: float = 0.4
    first_share: float = 0.5
    wave_size: int = 2
    seed_share: float = 0.0
    exploration: float = 0.2
    widening_constant: float = 2.0
    widening_exponent: float = 0.5
    finish: int = 2
    branch_eta: float = 1.0
    brake_nats: float = 30.0
    backup: Literal["max", "mean", "soft"] = "max"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("candidates", "wave_size", "finish"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number!r}; give at least 1.")
        for name, low, high in (
            ("edge_gain", 0, 1),
            ("first_share", 0, 1),
            ("seed_share", 0, 1),
            ("branch_eta", 0, 1),
            ("exploration", 0, math.inf),
            ("widening_constant", 0, math.inf),
            ("widening_exponent", 0, 1),
            ("brake_nats", 0, math.inf),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give {low} to {high}.")
        if not self.first_share:
            raise ConfigError("first_share is 0; a rollout needs a share above 0.")
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature!r}; give reward units above 0.")
        if self.backup not in _BACKUPS:
            raise ConfigError(f"backup is {self.backup!r}; give one of {', '.join(_BACKUPS)}.")
        if self.stride_policy not in get_args(StridePolicy):
            raise ConfigError(
                f"stride_policy is {self.stride_policy!r}; give one of "
                f"{', '.join(get_args(StridePolicy))}."
            )
        object.__setattr__(self, "strides", tuple(self.strides))
        if 1 not in self.strides or min(self.strides) < 1:
            raise ScheduleError(f"strides are {self.strides}; they must be at least 1 and hold 1.")

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "mctd"

    def least_nfe(self, num_steps: int) -> int:
        """One plain sample, though coarse strides could do with less."""
        return num_steps

    def search(self, problem: Problem) -> Asks:
        """Waves of simulations, then what is left of the budget."""
        if self.seed_share:
            yield from self._seeds(problem)
        first: Plan | None = None
        while wave := self._select_wave(problem, first):
            first = first or wave[0][1]
            finished = yield from gather(*(self._simulate(problem, *start) for start in wave))
            for (start, _), leaves in zip(wave, finished, strict=True):
                settle(problem.tree, start)
                for leaf in leaves:
                    backup(problem.tree, leaf, float(problem.tree.reward[leaf]))
        if not np.isfinite(problem.tree.reward).any():
            # the account pays for a sample, but not for valuing what would choose it
            nodes = yield from draw(problem, 1)
            for leaf in (yield from finish_plainly(problem, nodes)):
                backup(problem.tree, leaf, float(problem.tree.reward[leaf]))
        return "budget"

    # ---- 0. seeds

    def _seeds(self, problem: Problem) -> Asks:
        """Draw initial noises and halve them by value over the first third of the schedule."""
        share = int(self.seed_share * problem.account.nfe_left)
        rounds = max(1, min(4, problem.num_steps // 3))
        sizes = halving_rounds(share, 1, rounds)
        if sizes[0] < 2:
            return
        nodes = yield from draw(problem, sizes[0])
        yield from denoise(problem, nodes)
        for size in sizes[1:]:
            values = yield from value(problem, nodes)
            nodes = [nodes[i] for i in best_first(values)[:size]]
            nodes = yield from step(problem, nodes, stride=1, eta=self.branch_eta)
            yield from denoise(problem, nodes)
        yield from value(problem, nodes)

    # ---- 1. select

    def _select_wave(self, problem: Problem, first: Plan | None) -> list[tuple[int, Plan]]:
        """Nodes to simulate from, with the plan of each; their visits are counted as under way."""
        left = problem.account.nfe_left
        share = math.ceil(self.first_share * left)
        if first is None:
            plan = self._plan(problem, ROOT, share) or self._plan(problem, ROOT, left)
            if plan is None:
                return []
            add_virtual_visit(problem.tree, ROOT)
            return [(ROOT, plan)]
        for least, nfe in ((first.candidates[0], share), (first.candidates[0], left), (2, left)):
            wave: list[tuple[int, Plan]] = []
            rest = nfe
            for slot in range(self.wave_size, 0, -1):
                chosen = self._select(problem, first, least, rest // slot)
                if chosen is not None:
                    rest -= self._cost(chosen[1], chosen[0])
                    add_virtual_visit(problem.tree, chosen[0])
                    wave.append(chosen)
            if wave:
                return wave
        return []

    def _select(
        self, problem: Problem, first: Plan, least: int, nfe: int
    ) -> tuple[int, Plan] | None:
        """Descend by UCT to a node to simulate from with ``nfe``; ``None`` if there is none.

        A rollout is worth its cost only with about the strides and candidates of the first one, so
        the descent passes nodes from which ``nfe`` pays for less.
        """
        tree = problem.tree
        node = ROOT
        deepest = None
        while True:
            plan = self._repeat(problem, node, first, least, nfe)
            if plan is not None:
                deepest = (node, plan)
            children = [
                child
                for child in tree.children(node)
                if tree.evaluated[child]
                and tree.live[child]
                and tree.step_index[child] < problem.num_steps - 1
                and (
                    tree.visit_count[child] + tree.in_flight[child]
                    or self._repeat(problem, child, first, least, nfe) is not None
                )
            ]
            looks = int(tree.visit_count[node] + tree.in_flight[node])
            if plan is not None and deepest is not None:
                if looks == 0 or may_widen_progressively(
                    len(tree.children(node)),
                    looks,
                    constant=self.widening_constant,
                    exponent=self.widening_exponent,
                ):
                    return deepest
            if not children:
                return deepest
            node = children[int(np.argmax(self._scores(tree, children)))]

    def _repeat(
        self, problem: Problem, node: int, first: Plan, least: int, nfe: int
    ) -> Plan | None:
        """Plan from ``node`` with the edges of the first rollout and ``least`` candidates."""
        done = max(int(problem.tree.step_index[node]), 0)
        edges = sum(end > done for end in np.cumsum(first.strides).tolist())
        plan = self._plan(problem, node, nfe, least_edges=edges)
        if plan is None or plan.nfe == 0 or plan.candidates[0] < least:
            return None
        return plan

    def _scores(self, tree: Tree, siblings: list[int]) -> Values:
        """UCT of stored siblings; their evaluation counts as a first look."""
        worth = calibrated(tree.value[siblings], self._backup_fn(tree, siblings))
        worth = np.where(np.isnan(worth), np.nanmin(worth, initial=np.inf), worth)
        worth = np.where(np.isfinite(worth), worth, 0.0)
        return uct_scores(
            min_max(worth),
            tree.visit_count[siblings] + 1,
            tree.in_flight[siblings],
            exploration=self.exploration,
        )

    @property
    def _backup_fn(self) -> BackupFn:
        if self.backup == "soft":
            return partial(soft_backup, temperature=self.temperature)
        return max_backup if self.backup == "max" else mean_backup

    def _plan(self, problem: Problem, start: int, nfe: int, least_edges: int = 1) -> Plan | None:
        """Plan of a rollout from ``start`` that spends at most ``nfe`` evaluations."""
        tree = problem.tree
        done = max(int(tree.step_index[start]), 0)
        nfe = min(nfe, problem.account.nfe_left)
        budget = nfe
        plan = None
        for _ in range(2):
            plan = plan_rollout(
                problem.num_steps - done,
                budget,
                allowed=self.strides,
                policy=self.stride_policy,
                brake_nats=max(self.brake_nats - _nats(tree, start), 0.0),
                edge_gain=self.edge_gain,
                candidates=self.candidates,
                least_edges=least_edges,
            )
            if plan is None or self._cost(plan, start) <= nfe:
                return plan
            budget = nfe - plan.candidates[0]  # the draws come on top
        return plan

    def _cost(self, plan: Plan, start: int) -> int:
        """Evaluations of a simulation; from the root, the draws come on top of the plan."""
        return plan.nfe + (plan.candidates[0] if start == ROOT else 0)

    # ---- 2. and 3. simulate and evaluate

    def _simulate(self, problem: Problem, start: int, plan: Plan) -> Asks:
        """Greedy rollout: on each edge go on from the best candidate; returns finished nodes."""
        nodes = [start]
        if start == ROOT:
            nodes = yield from self._tried(problem, (yield from draw(problem, plan.candidates[0])))
        for stride, count in zip(plan.strides[:-1], plan.candidates[:-1], strict=True):
            parents = [nodes[0]] * count
            made = yield from step(problem, parents, stride=stride, eta=self.branch_eta)
            nodes = yield from self._tried(problem, made)
        chosen = nodes[: self.finish]
        leaves = yield from step(problem, chosen, stride=plan.strides[-1], eta=None)
        yield from reward(problem, leaves)
        return leaves

    def _tried(self, problem: Problem, nodes: list[int]) -> Asks:
        """Evaluate and value candidates; returns them best first."""
        yield from denoise(problem, nodes)
        values = yield from value(problem, nodes)
        return [nodes[i] for i in best_first(values)]


def _nats(tree: Tree, node: int) -> float:
    """Summed log of candidates along the path to ``node``, without the draws of the noise."""
    parents = path_to_root(tree, node)[1:-1]
    return sum(math.log(len(tree.children(parent))) for parent in parents)

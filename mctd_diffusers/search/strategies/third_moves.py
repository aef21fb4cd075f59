"""Third moves of a tree search, beside widening and deepening: where else a rollout may begin.

- ``"fuse"``: at one sample of several particles (fuse-and-deepen). They are the children of a node
  that was widened often, or nodes across the tree at one step index, of each family of siblings the
  best alone. The fused node hangs below their lowest common ancestor. It is evaluated (1 NFE) and
  stays if the denoiser moves its estimate no more than it moved the particles'; else it is pruned.
- ``"go_back"``: at the best finished sample, noised to a step index that the tree stores (SDEdit,
  Meng et al., 2022; ABCD, 2025, arXiv 2505.14036).
- ``"resample"``: at a particle that is drawn by weight.

None of them uses particles up: these stay in the tree, for selection and for other fusions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.backups import BackupFn
from mctd_diffusers.search.bandit import INCONSISTENT, ORDINARY, MoveMade, choose_move
from mctd_diffusers.search.environment import Asks, Counts
from mctd_diffusers.search.moves import (
    denoise,
    denoise_missing,
    forget,
    fuse,
    gather,
    generator_for,
    relative_change,
    renoise,
)
from mctd_diffusers.search.particles import (
    ParticleSet,
    children_particles,
    one_of_each_family,
    particle_set,
    particles_at,
    scores_of,
)
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.tree import Fusion, Tree

THIRD_MOVES: Final = ("fuse", "go_back", "resample")
UNCHECKED_FUSIONS: Final = ("mean", "resample")
"""References, which nothing is asked of, so that comparisons show what they do."""
_DRAWS: Final = 8  # of a group of particles that was not fused before
_POOL: Final = 2  # times as many particles are drawn from


@runtime_checkable
class MayFuse(Protocol):
    """A strategy that says beforehand whether it fuses samples, and how."""

    @property
    def fusion_method(self) -> str | None:
        """Name of the method; ``None`` where it fuses none."""
        ...


class Proposal(NamedTuple):
    """What a third move would begin with; nothing was spent on it yet.

    Attributes:
        move: its name.
        groups: to be fused, one a rollout.
        targets: rows to go on from, or with ``levels`` to go back from.
        levels: step indices to go back to.
    """

    move: str
    groups: tuple[ParticleSet, ...] = ()
    targets: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()


@dataclass(frozen=True)
class ThirdMoves:
    """Which third moves there are, and how they are made.

    Attributes:
        moves: names in :data:`THIRD_MOVES`.
        fusion: name of the method, as the environment knows it.
        fuse_after: children of a node that make a fusion of them due, and then again as many.
        num_particles: most that are fused.
        temperature: of the particles' weights, in standard deviations of their scores.
        levels: shares of the schedule between which rollouts may begin.
        max_inconsistency: most that the denoiser may move a fused estimate by, in units of what it
            moved the typical particle's.
        prior: what a fused node is worth before its first visit: the ``"plain"`` or the
            ``"weighted"`` mean of its particles.
        exploration: weight of the bonus by which moves are chosen.
    """

    moves: tuple[str, ...]
    fusion: str
    fuse_after: int
    num_particles: int
    temperature: float
    levels: tuple[float, float]
    max_inconsistency: float
    prior: Literal["plain", "weighted"]
    exploration: float

    def check(self) -> None:
        """Refuse settings outside their ranges.

        Raises:
            ConfigError: one is, or a third move is not known.
        """
        unknown = [move for move in self.moves if move not in THIRD_MOVES]
        if unknown or len(set(self.moves)) != len(self.moves):
            raise ConfigError(
                f"third_moves are {self.moves}; give some of {', '.join(THIRD_MOVES)}, each once."
            )
        check_setting("fuse_after", self.fuse_after, 2, whole=True)
        check_setting("num_particles", self.num_particles, 2, whole=True)
        check_setting("particle_temperature", self.temperature, np.nextafter(0, 1))
        check_setting("max_inconsistency", self.max_inconsistency, 0)
        check_setting("third_exploration", self.exploration, 0)
        for share in self.levels:
            check_setting("third_levels", share, 0, 1)
        if len(self.levels) != 2 or self.levels[0] > self.levels[1]:
            raise ConfigError(
                f"third_levels are {self.levels}; give the lowest share of the schedule and the "
                "highest."
            )
        if self.prior not in ("plain", "weighted"):
            raise ConfigError(f"fused_prior is {self.prior!r}; give plain or weighted.")

    # ---- choosing

    def propose(self, problem: Problem, count: int, backup_fn: BackupFn) -> list[Proposal]:
        """What each third move would begin ``count`` rollouts with, of those that can."""
        makers = {
            "fuse": self._propose_fusions,
            "go_back": self._propose_going_back,
            "resample": self._propose_resampling,
        }
        found = [makers[move](problem, count, backup_fn) for move in self.moves]
        return [proposal for proposal in found if proposal is not None]

    def choose(self, problem: Problem, proposals: Sequence[Proposal]) -> Proposal | None:
        """The proposal to follow by the bandit; ``None`` for an ordinary rollout."""
        by_move = {proposal.move: proposal for proposal in proposals}
        chosen = choose_move((*by_move, ORDINARY), problem.moves_made, exploration=self.exploration)
        return by_move.get(chosen)

    def due(self, problem: Problem, nodes: Sequence[int], backup_fn: BackupFn) -> Proposal | None:
        """A fusion of the children of those ``nodes`` that were widened so often that it is due."""
        if "fuse" not in self.moves:
            return None
        tree = problem.tree
        tried = _tried_groups(problem)
        groups = []
        for node in dict.fromkeys(nodes):
            children = tree.children(node)
            fused = sum(tree.fusion_of(child) is not None for child in children)
            if len(children) - fused < self.fuse_after * (1 + fused):
                continue
            rows, scores = children_particles(tree, node, backup_fn)
            group = self._group(rows[: self.num_particles], scores[: self.num_particles])
            if (
                group is not None
                and self._is_allowed(problem, rows[0])
                and _key(group) not in tried
            ):
                groups.append(group)
        return Proposal("fuse", groups=tuple(groups)) if groups else None

    def _propose_fusions(
        self, problem: Problem, count: int, backup_fn: BackupFn
    ) -> Proposal | None:
        for rows, scores in self._particles(problem, backup_fn):
            groups = self._fresh_groups(problem, rows, scores, count)
            if groups:
                return Proposal("fuse", groups=tuple(groups))
        return None

    def _propose_going_back(
        self, problem: Problem, count: int, backup_fn: BackupFn
    ) -> Proposal | None:
        """From the best finished sample, to the stored levels by turns, the cleanest first."""
        del backup_fn
        tree = problem.tree
        finished = np.flatnonzero(~np.isnan(tree.reward) & tree.live)
        levels = [level for level in self._stored_levels(problem) if level > 0][::-1]
        if not finished.size or not levels:
            return None
        best = int(finished[np.argmax(tree.reward[finished])])
        made = sum(len(one.nodes) for one in problem.moves_made if one.move == "go_back")
        turns = tuple(levels[(made + i) % len(levels)] for i in range(count))
        return Proposal("go_back", targets=(best,) * count, levels=turns)

    def _propose_resampling(
        self, problem: Problem, count: int, backup_fn: BackupFn
    ) -> Proposal | None:
        for rows, scores in self._particles(problem, backup_fn):
            group = self._group(rows, scores)
            if group is not None:
                chance = generator_for(problem, f"resample|{len(problem.moves_made)}")
                return Proposal("resample", targets=_drawn(group, count, chance))
        return None

    def _particles(
        self, problem: Problem, backup_fn: BackupFn
    ) -> list[tuple[list[int], np.ndarray]]:
        """Independent particles at each stored level; those with the most of them first.

        Levels at which the last fusion was refused come last: they are too clean, or the particles
        there too much alike.
        """
        tree = problem.tree
        refused = {one.step_index: _is_refused(one) for one in problem.moves_made if one.verdicts}
        found = []
        for level in self._stored_levels(problem):
            rows, scores = particles_at(tree, level, backup_fn)
            kept = one_of_each_family(tree, rows)
            scores = scores[np.isin(rows, kept)]  # both are in one order
            if len(kept) > 1:
                found.append((refused.get(level, False), -len(kept), kept, scores))
        found.sort(key=lambda one: one[:2])
        return [(kept, scores) for _, _, kept, scores in found]

    def _fresh_groups(
        self, problem: Problem, rows: list[int], scores: np.ndarray, count: int
    ) -> list[ParticleSet]:
        """Groups that were not fused before: the best particles, then some drawn by weight."""
        tried = _tried_groups(problem)
        size = min(self.num_particles, len(rows))
        pool = self._group(rows[: _POOL * size], scores[: _POOL * size])
        assert pool is not None
        chance = generator_for(problem, f"fuse|{len(problem.moves_made)}")
        groups: list[ParticleSet] = []
        for attempt in range(_DRAWS):
            order = np.arange(size)
            if attempt:
                with np.errstate(divide="ignore"):  # one without weight comes last
                    keys = np.log(pool.weights) + chance.gumbel(size=len(pool.nodes))
                order = np.sort(np.argsort(-keys, kind="stable")[:size])
            group = self._group([pool.nodes[i] for i in order], pool.scores[order])
            assert group is not None
            if _key(group) not in tried:
                tried.add(_key(group))
                groups.append(group)
            if len(groups) == count:
                break
        return groups

    def _group(self, rows: list[int], scores: np.ndarray) -> ParticleSet | None:
        """Weighted particles; ``None`` of fewer than two."""
        return particle_set(rows, scores, self.temperature) if len(rows) > 1 else None

    def _stored_levels(self, problem: Problem) -> list[int]:
        """Step indices of evaluated nodes at which rollouts may begin, the noisiest first."""
        tree = problem.tree
        levels = np.unique(tree.step_index[tree.evaluated & tree.live])
        low, high = (share * problem.num_steps for share in self.levels)
        return [int(level) for level in levels if low <= level <= high]

    def _is_allowed(self, problem: Problem, node: int) -> bool:
        return int(problem.tree.step_index[node]) in self._stored_levels(problem)

    # ---- making

    def affords(self, problem: Problem, proposal: Proposal, rollout: Counts) -> bool:
        """Whether the account pays for a proposal, and such a rollout from each of its rows."""
        account = problem.account
        each = account.price(evaluations=1) + rollout
        price = each * max(len(proposal.groups), len(proposal.targets))
        for group in proposal.groups:
            price += problem.fusion_spends * len(group.nodes)
        return account.affords(price)

    def make(self, problem: Problem, proposal: Proposal, guidance: float | None) -> Asks:
        """Make the rows to go on from, evaluated; returns the move, with what became of it."""
        tree = problem.tree
        if proposal.groups:
            made: MoveMade = yield from self._fuse(problem, proposal.groups, guidance)
            return made
        nodes = list(proposal.targets)
        if proposal.levels:
            rows = yield from gather(
                *(
                    renoise(problem, [target], step_index=level)
                    for target, level in zip(nodes, proposal.levels, strict=True)
                )
            )
            nodes = [row for some in rows for row in some]
        yield from denoise_missing(problem, nodes)
        return MoveMade(proposal.move, tuple(nodes), int(tree.step_index[nodes[0]]))

    def _fuse(
        self, problem: Problem, groups: Sequence[ParticleSet], guidance: float | None
    ) -> Asks:
        tree = problem.tree
        fusions = [
            Fusion(group.nodes, tuple(group.weights.tolist()), self.fusion) for group in groups
        ]
        found = yield from fuse(problem, fusions, guidance=guidance)
        verdicts = [one.verdict for one in found]
        nodes = [one.node for one in found if one.node is not None]
        if nodes:
            yield from denoise(problem, nodes)
            rejected = yield from self._inconsistent(problem, nodes)
            for place, one in enumerate(found):
                if one.node in rejected:
                    yield from forget(problem, [one.node], rule="inconsistent")
                    verdicts[place] = INCONSISTENT
            nodes = [node for node in nodes if node not in rejected]
        return MoveMade(
            "fuse",
            nodes=tuple(nodes),
            step_index=int(tree.step_index[groups[0].nodes[0]]),
            particles=tuple(group.nodes for group in groups),
            verdicts=tuple(verdicts),
            correlations=tuple(one.correlation for one in found),
            ess=tuple(group.ess for group in groups),
        )

    def _inconsistent(self, problem: Problem, nodes: list[int]) -> Asks:
        """Those fused nodes that the denoiser makes something else of."""
        if self.fusion in UNCHECKED_FUSIONS or self.max_inconsistency == np.inf:
            return []
        groups = [particles_of(problem.tree, node) for node in nodes]
        flat = [particle for group in groups for particle in group]
        changes = yield from relative_change(problem, [*nodes, *flat])
        rejected, start = [], len(nodes)
        for node, change, group in zip(nodes, changes, groups, strict=False):
            usual = changes[start : start + len(group)]
            start += len(group)
            if not np.isnan(usual).all():
                usual = usual[~np.isnan(usual)]
                if change > self.max_inconsistency * np.median(usual):
                    rejected.append(node)
        return rejected

    # ---- in a search

    def finish_coarsely(
        self,
        problem: Problem,
        nodes: Sequence[int],
        *,
        evaluations: int,
        longest: Counts,
        count: int,
        finish: Callable[..., Asks],
        side_by_side: bool,
        backup_fn: BackupFn,
        guidance: float | None,
    ) -> Asks:
        """Coarse rollouts, ``count`` at a time, begun where the bandit says.

        Args:
            problem: the image.
            nodes: where ordinary ones begin, in this order.
            evaluations: that may be spent, about; what pruning saves of them is not spent.
            longest: what the longest coarse rollout spends.
            count: rollouts at a time.
            finish: ``finish(nodes, redraws=...)`` finishes nodes of one step index, scores them and
                backs them up; with noise on the first edge where it redraws.
            side_by_side: whether rollouts of several levels may run at once, which none may that
                prunes what others stand at.
            backup_fn: what nodes are worth.
            guidance: of the estimates that are fused.

        Returns:
            Rows that third moves went on from.
        """
        account, tree, savings = problem.account, problem.tree, problem.savings
        rest, others = list(nodes), list[int]()
        end = account.spent.nfe + (evaluations + savings.evaluations) * account.calls_per_step
        while account.spent.nfe + savings.evaluations * account.calls_per_step < end:
            move = OpenMove(problem)
            proposals = self.propose(problem, count, backup_fn)
            paid = [one for one in proposals if self.affords(problem, one, longest)]
            proposal = self.choose(problem, paid)
            if proposal is not None:
                move.made = yield from self.make(problem, proposal, guidance)
                begun = list(move.made.nodes)
                others += begun
            else:
                rest = [node for node in rest if tree.live[node]]
                begun, rest = rest[:count], rest[count:]
                if not begun or not account.affords(longest * len(begun)):
                    break
            rollouts = [
                finish(
                    [node for node in begun if tree.step_index[node] == level],
                    redraws=move.made.move == "resample",
                )
                for level in dict.fromkeys(tree.step_index[begun].tolist())
            ]
            savings.hold(begun)
            if side_by_side:
                yield from gather(*rollouts)
            else:
                for rollout in rollouts:
                    yield from rollout
            savings.let_go(begun)
            move.close()
        return others

    def choose_wave(
        self,
        problem: Problem,
        *,
        select: Callable[[], list[tuple[int, Any]]],
        plan: Callable[[Sequence[int]], list[tuple[int, Any]]],
        evaluations_left: int,
        count: int,
        backup_fn: BackupFn,
        guidance: float | None,
    ) -> Asks:
        """A wave from where third moves lead, if the bandit says so; else an ordinary one.

        Args:
            problem: the image.
            select: gives an ordinary wave: rows with plans.
            plan: gives a wave from rows, of those for which the budget pays.
            evaluations_left: that the budget pays.
            count: rollouts of a wave.
            backup_fn: what nodes are worth.
            guidance: of the estimates that are fused.

        Returns:
            The wave, empty where the budget pays for none, and the :class:`OpenMove` that it is.
        """
        least = problem.account.price(evaluations=1, rewards=1)

        def is_paid(proposal: Proposal) -> bool:
            stand_in = _stand_in(problem.tree, proposal)
            pays = evaluations_left >= 2 * count and self.affords(problem, proposal, least)
            return pays and bool(plan([stand_in]))

        move = OpenMove(problem)
        proposals = self.propose(problem, count, backup_fn)
        proposal = self.choose(problem, [one for one in proposals if is_paid(one)])
        if proposal is None:
            wave = select()
            proposal = self.due(problem, [node for node, _ in wave], backup_fn)
            if proposal is None or not is_paid(proposal):
                return wave, move
        move.made = yield from self.make(problem, proposal, guidance)
        wave = plan(move.made.nodes)
        if not wave:
            move.close()
            wave, move = select(), OpenMove(problem)
        return wave, move

    # ---- worth

    def prior_of(self, tree: Tree, node: int, backup_fn: BackupFn) -> float:
        """What a fused node that was not visited yet is worth, by its particles."""
        fusion = tree.fusion_of(node)
        assert fusion is not None
        scores = scores_of(tree, fusion.particles, backup_fn)
        known = np.isfinite(scores)
        if not known.any():
            return np.nan
        weights = np.array(fusion.weights) if self.prior == "weighted" else np.ones(len(scores))
        return float(np.average(scores[known], weights=np.maximum(weights[known], 1e-12)))


class OpenMove:
    """A move under way: what it will have gained and cost when it is closed.

    Args:
        problem: the image.

    Attributes:
        made: what is known of it so far; an ordinary rollout unless it is said.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._cost, self._best = self._standing()
        self.made = MoveMade(ORDINARY)

    def close(self) -> None:
        """Note it; nothing where no sample was finished before, to which to compare."""
        cost, best = self._standing()
        if np.isnan(self._best):
            return
        self._problem.moves_made.append(
            self.made._replace(cost=cost - self._cost, gain=max(best - self._best, 0.0))
        )

    def _standing(self) -> tuple[float, float]:
        """Cost so far, and the best reward."""
        tree, account = self._problem.tree, self._problem.account
        rewards = tree.reward[~np.isnan(tree.reward)]
        best = float(rewards.max()) if rewards.size else np.nan
        return account.prices.cost(account.spent), best


def particles_of(tree: Tree, node: int) -> tuple[int, ...]:
    """Particles of a fused node."""
    fusion = tree.fusion_of(node)
    return () if fusion is None else fusion.particles


def _key(group: ParticleSet) -> frozenset[int]:
    return frozenset(group.nodes)


def _stand_in(tree: Tree, proposal: Proposal) -> int:
    """A row that stands where the first rollout of a proposal would begin."""
    if proposal.groups:
        return proposal.groups[0].nodes[0]
    if proposal.levels:
        return int(np.flatnonzero(tree.live & (tree.step_index == proposal.levels[0]))[0])
    return proposal.targets[0]


def _tried_groups(problem: Problem) -> set[frozenset[int]]:
    """Groups that were to be fused already."""
    return {frozenset(group) for one in problem.moves_made for group in one.particles}


def _is_refused(made: MoveMade) -> bool:
    """Whether none of the groups of a fusion may be fused at all, whatever the denoiser says."""
    return all(verdict not in (0, INCONSISTENT) for verdict in made.verdicts)


def _drawn(group: ParticleSet, count: int, chance: np.random.Generator) -> tuple[int, ...]:
    """So many particles by weight, each by itself."""
    places = chance.choice(len(group.nodes), size=count, p=group.weights)
    return tuple(group.nodes[place] for place in places)

"""MCTD: Monte Carlo tree search over stored states of coarse and greedy rollouts, in waves.

After Yoon et al. (2025, MCTD, arXiv 2502.07202) and its parallel and sparse forms (arXiv
2506.09498), with what was measured on exact-score mixtures and on the model in the box.

Where guidance can be chosen, it begins with coarse looks at many samples (S-MCTD); every state is
stored:

- *seeds*: a share of the budget goes into new initial noises, each stepped a third down the
  schedule and valued there by its denoised estimate, under half of the call's guidance. Strong
  guidance is for short steps: under it, the estimate of a noisy sample tells little of what will
  become of it, and seeds do not pay;
- *coarse rollouts*: the best seeds are finished in few plain strides, scored and backed up.

Then, until the budget is spent:

1. select: descend from the root by UCT among the stored children of each node (those without a
   finished sample below count with their calibrated estimate), until a node may be widened by the
   law of progressive widening, or was not visited before; count the visit as under way;
   ``wave_size`` times on one snapshot of the tree. The first wave is one rollout, from the best
   seed;
2. simulate: *greedy rollouts* from the selected nodes, side by side: on each edge the best of
   several children by the value of their denoised estimate, with long strides where little budget
   is left, and a bound on the summed log of candidates; from the root they begin by drawing new
   initial noise;
3. evaluate: finished samples are decoded in full and scored;
4. back up: every reward is added along its path. The visits of a node are the backups through it,
   whatever the wave.

With ``third_moves`` a share of the coarse rollouts, and any wave but the first, may begin
elsewhere: at what several samples fuse into, at the best sample noised again, or at one drawn by
weight, see ``third_moves.py``. A bandit chooses by what each kind of move gained for its cost.

With ``pruning``, what cannot win is given up midway: coarse rollouts and greedy ones, candidates of
an edge that are not worth trying any more, and stored samples that nothing would go on from, see
``pruning.py``. What that saves is not spent: the search ends earlier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from mctd_diffusers.errors import ConfigError, ScheduleError
from mctd_diffusers.search.backups import BackupFn, max_backup, mean_backup, soft_backup
from mctd_diffusers.search.budget import UNLIMITED
from mctd_diffusers.search.environment import Asks, Values
from mctd_diffusers.search.moves import (
    back_up,
    choose_strides,
    denoise,
    denoise_missing,
    draw,
    finish,
    finish_plainly,
    forget,
    gather,
    predict_gain,
    reward,
    step,
    step_by,
    value,
)
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.pruning import (
    UNUSED,
    beaten_particles,
    is_hopeless,
    lacks_more,
    least_valuable,
    parse_pruning,
    pays_another,
    still_resolved,
)
from mctd_diffusers.search.selection import (
    best_first,
    calibrated,
    min_max,
    uct_scores,
)
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strategies.third_moves import OpenMove, ThirdMoves
from mctd_diffusers.search.stride_policies import (
    Costs,
    StrideChoice,
    StridePolicy,
    check_costs,
    cost_to_go,
    parse_stride_policy,
    without_last_edge,
)
from mctd_diffusers.search.strides import (
    PLAN_SHAPES,
    Plan,
    PlanShape,
    coarsest_strides,
    expected_maximum,
    plan_rollout,
)
from mctd_diffusers.search.tree import (
    ROOT,
    Tree,
    add_virtual_visit,
    path_to_root,
    settle,
)
from mctd_diffusers.search.widening import may_widen_progressively

_BACKUPS: Final = ("max", "mean", "soft")
_SEEDS_AT_ONCE: Final = 16  # in one call of each kind, and where no budget bounds their number
_COARSE_AT_ONCE: Final = 8  # of coarse rollouts, where the first ones may prune the others
_SIBLINGS_AT_ONCE: Final = 2  # of an edge, where the first ones may prune the others


@dataclass(frozen=True)
class MCTD:
    """Tree search over stored states of greedy rollouts.

    Attributes:
        candidates: children tried on each edge of a rollout; ``None`` to choose them (and the
            number of edges) for the most selection per NFE, see ``strides.plan_rollout``.
        strides: schedule steps that an edge may cross; must hold 1. Those longer than a quarter of
            the schedule are not used: such jumps leave the data.
        stride_policy: chooses the strides of greedy rollouts. By their plan: ``"budget"`` (long
            ones first), ``"fine_to_coarse"``, ``"constant"``, ``"fixed:k"``. On the way, for the
            number of edges that the budget rule plans: ``"uniform"``, ``"random"``, ``"ays"``,
            ``"gits"``, and by what is predicted of each sample ``"x0hat"``, ``"oracle"``,
            ``"ige"`` (by resolved variance) or ``"ige:<target>"``. Where they go by resolved
            variance, so does the number of edges.
        error_tolerance: bound on the predicted truncation error of a stride, in latent units, where
            the policy predicts it; the shortest that fits may exceed it.
        edge_gain: how the gain of a rollout grows with its number of selections (exponent, 0 to
            0.5): lower takes fewer edges with more candidates.
        seed_share: share of the budget for seeds, where guidance can be chosen; 0 leaves the choice
            among initial noises to the first edge of a greedy rollout.
        coarse_share: share of the budget for coarse rollouts of the best seeds.
        value_guidance: guidance of seeds and of all estimates that are valued, as a share of the
            call's, which 1 is; of no effect where guidance cannot be chosen.
        rollout_guidance: the same for the edges of rollouts.
        first_share: share of what is left then that the first greedy rollout may spend; the
            waves after it spend the same share of what is left, in rollouts from stored states.
        wave_size: greedy rollouts that run side by side on one snapshot of the tree.
        exploration: weight of the UCT bonus on values that are min-max normalised among siblings.
        widening_constant: a node may have ``widening_constant * visits ** widening_exponent``
            children.
        widening_exponent: see there.
        finish: candidates of the last level of a rollout that are finished and scored in full.
        branch_eta: share of fresh noise on the edges that branch, 0 to 1.
        brake_nats: bound on the summed log of candidates along the path of a rollout, when it is
            made (widening a node later adds to it), which keeps selection on the data manifold.
        backup: what a node is worth: the ``"max"``, ``"mean"`` or ``"soft"`` of rewards below it.
        temperature: of the soft backup, in reward units.
        third_moves: where rollouts may begin but where selection says: ``"fuse"``, ``"go_back"``,
            ``"resample"``.
        fusion: method of ``"fuse"``, a name in ``denoising.fusion.FUSIONS``.
        fuse_after: children of a node that make a fusion of them due. Fusions of samples across the
            tree wait for none; in small budgets there are no others.
        num_particles: most that are fused into one sample.
        particle_temperature: of the particles' weights, in standard deviations of their scores.
        third_levels: shares of the schedule between which rollouts of third moves may begin.
        third_share: share of the coarse rollouts for which a bandit chooses where they begin.
        third_exploration: weight of the UCB bonus of that bandit, and of the one of the waves.
        max_inconsistency: most that the denoiser may move a fused estimate by, in units of what it
            moved the typical particle's by; infinity asks nothing.
        fused_prior: what a fused node is worth before its first visit, the ``"weighted"`` or the
            ``"plain"`` mean of its particles.
        pruning: rules joined by ``+``, of ``"bounds"``, ``"siblings"``, ``"gain"``, ``"memory"``
            and ``"particles"``; ``"all"`` but the one that needs a gain model, or ``"none"``.
        pruning_confidence: standard deviations between a value and its upper bound.
        least_gain: of one more sibling, in units of what rewards differ by, 0 to 1.
        max_live: evaluated samples that stay live under the rule ``"memory"``.
    """

    candidates: int | None = None
    strides: tuple[int, ...] = (1, 2, 4, 8)
    stride_policy: str = "budget"
    error_tolerance: float = math.inf
    edge_gain: float = 0.4
    seed_share: float = 0.5
    coarse_share: float = 0.25
    value_guidance: float = 0.5
    rollout_guidance: float = 0.75
    first_share: float = 0.9
    wave_size: int = 2
    exploration: float = 0.2
    widening_constant: float = 2.0
    widening_exponent: float = 0.5
    finish: int = 2
    branch_eta: float = 1.0
    brake_nats: float = 30.0
    backup: Literal["max", "mean", "soft"] = "max"
    temperature: float = 1.0
    third_moves: tuple[str, ...] = ()
    fusion: str = "x0"
    fuse_after: int = 10
    num_particles: int = 8
    particle_temperature: float = 1.0
    third_levels: tuple[float, float] = (0.0, 0.75)
    third_share: float = 0.5
    third_exploration: float = 0.5
    max_inconsistency: float = 1.5
    fused_prior: Literal["weighted", "plain"] = "weighted"
    pruning: str = "none"
    pruning_confidence: float = 2.0
    least_gain: float = 0.01
    max_live: int = 48

    def __post_init__(self) -> None:
        if self.candidates is not None:
            check_setting("candidates", self.candidates, 1, whole=True)
        for name in ("wave_size", "finish", "max_live"):
            check_setting(name, getattr(self, name), 1, whole=True)
        for name in (
            "edge_gain",
            "seed_share",
            "coarse_share",
            "first_share",
            "branch_eta",
            "widening_exponent",
            "third_share",
            "least_gain",
        ):
            check_setting(name, getattr(self, name), 0, 1)
        for name in (
            "value_guidance",
            "rollout_guidance",
            "exploration",
            "widening_constant",
            "brake_nats",
            "temperature",
            "error_tolerance",
            "pruning_confidence",
        ):
            check_setting(name, getattr(self, name), 0)
        if not self.first_share:
            raise ConfigError("first_share is 0; a rollout needs a share above 0.")
        if not self.temperature:
            raise ConfigError(
                f"temperature is {self.temperature!r}; give reward units above 0, or backup='max'."
            )
        if self.backup not in _BACKUPS:
            raise ConfigError(f"backup is {self.backup!r}; give one of {', '.join(_BACKUPS)}.")
        parse_pruning(self.pruning)
        object.__setattr__(self, "strides", tuple(self.strides))
        if 1 not in self.strides or min(self.strides) < 1:
            raise ScheduleError(f"strides are {self.strides}; they must be at least 1 and hold 1.")
        if self.policy.kind == "fixed" and self.policy.stride not in self.strides:
            raise ConfigError(
                f"stride_policy is {self.stride_policy!r} and strides are {self.strides}; give "
                "strides that hold it."
            )
        for name in ("third_moves", "third_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._third.check()

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "mctd"

    def least_evaluations(self, num_steps: int) -> int:
        """One plain sample, though coarse strides could do with less."""
        return num_steps

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride that its edges may cross."""
        return max((*self.stride_set(num_steps), *self._seed_strides(num_steps)))

    @property
    def policy(self) -> StridePolicy:
        """What chooses the strides of greedy rollouts."""
        return parse_stride_policy(self.stride_policy, target="resolved_variance", plans=True)

    @property
    def fusion_method(self) -> str | None:
        """Method of its fusions; ``None`` where it fuses no samples."""
        return self.fusion if "fuse" in self.third_moves else None

    @cached_property
    def _third(self) -> ThirdMoves:
        return ThirdMoves(
            moves=self.third_moves,
            fusion=self.fusion,
            fuse_after=self.fuse_after,
            num_particles=self.num_particles,
            temperature=self.particle_temperature,
            levels=self.third_levels,
            max_inconsistency=self.max_inconsistency,
            prior=self.fused_prior,
            exploration=self.third_exploration,
        )

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of its rules of pruning."""
        return parse_pruning(self.pruning)

    def stride_set(self, num_steps: int) -> tuple[int, ...]:
        """The strides without those that leave the data; `Problem.stride_costs` must be of them."""
        return tuple(k for k in self.strides if k == 1 or 4 * k <= num_steps)

    def search(self, problem: Problem) -> Asks:
        """Waves of simulations until the budget pays for none."""
        check_costs(problem.stride_costs, self.policy, self.stride_set(problem.num_steps))
        seeds = yield from self._seed(problem)
        others = yield from self._finish_coarsely(problem, seeds)
        seeds = [seed for seed in (*others, *seeds) if problem.tree.live[seed]]
        start = _most_promising(problem.tree, seeds) if seeds else ROOT
        wave = self._first_wave(problem, start) or self._first_wave(problem, ROOT)
        if not wave:
            if not seeds:  # the account pays for a sample, not for valuing to choose it by
                nodes = yield from draw(problem, 1)
                back_up(problem, (yield from finish_plainly(problem, nodes)))
            return "budget"
        standard: _Standard | None = None
        move: OpenMove | None = None
        while wave:
            for node, _ in wave:
                add_virtual_visit(problem.tree, node)
            try:
                finished = yield from gather(*(self._simulate(problem, *start) for start in wave))
            finally:  # also when the search is stopped in the middle of a wave
                for node, _ in wave:
                    settle(problem.tree, node)
            for leaves in finished:
                back_up(problem, leaves)
            standard = standard or _standard(problem.tree, *wave[0], leaves=finished[0])
            yield from self._prune_stored(problem)
            if move is not None:
                move.close()
            if not self.third_moves:
                wave = self._select_wave(problem, standard)
            else:
                wave, move = yield from self._third.choose_wave(
                    problem,
                    select=partial(self._select_wave, problem, standard),
                    plan=partial(self._plan_wave, problem, standard),
                    evaluations_left=self._evaluations_left(problem, self.wave_size),
                    **self._of_thirds(problem),
                )
        return "exhausted" if problem.savings.evaluations else "budget"

    # ---- 0. seeds and coarse rollouts

    def _seed(self, problem: Problem) -> Asks:
        """Draw initial noises, step them down a third of the schedule, and value them there.

        Returns:
            The valued nodes; none where their share of the budget does not pay for two.
        """
        edges = self._seed_strides(problem.num_steps)
        guidance = self._guidance(problem, self.value_guidance)
        count = self._num_seeds(problem, 1 + len(edges))
        left = problem.account.evaluations_left - count * (1 + len(edges))
        seeds: list[int] = []
        while len(seeds) < count:
            nodes = yield from draw(problem, min(_SEEDS_AT_ONCE, count - len(seeds)))
            for stride in edges:
                yield from denoise(problem, nodes)
                nodes = yield from step(problem, nodes, stride=stride, eta=None, guidance=guidance)
            yield from denoise(problem, nodes)
            yield from value(problem, nodes, guidance=guidance)
            seeds += nodes
            if self.rules:
                yield from self._release_seeds(problem, seeds, left)
        return seeds

    def _num_seeds(self, problem: Problem, evaluations: int) -> int:
        """Seeds that their share of the budget pays for, with one rollout left to pay."""
        account = problem.account
        if problem.guidance_scale is None or not self.seed_share:
            return 0
        if account.evaluations_left == UNLIMITED:
            return _SEEDS_AT_ONCE
        most = int(self.seed_share * account.evaluations_left) // evaluations
        rollout = account.price(evaluations=len(self._coarse_strides(problem)), rewards=1)
        count = account.affordable(
            account.price(evaluations=evaluations, values=1), most, besides=rollout
        )
        return count if count > 1 else 0

    def _finish_coarsely(self, problem: Problem, seeds: list[int]) -> Asks:
        """Finish the best seeds in few plain strides, and back them up.

        Returns:
            What third moves went on from in the place of seeds.
        """
        if not seeds:
            return []
        account = problem.account
        strides = self._coarse_strides(problem)
        most = self._most_coarse(problem, len(seeds), account.evaluations_left)
        values = len(strides) - 1 if self.rules else 0
        price = account.price(evaluations=len(strides) - 1, values=values, rewards=1)
        count = account.affordable(price, max(most, 1))
        seeds = [seed for seed in seeds if problem.tree.live[seed]]
        best = [seeds[i] for i in best_first(problem.tree.value[seeds])[:count]]
        if not best:
            return []
        chosen = len(best)
        if self.third_moves:
            chosen = max(1, chosen - int(self.third_share * chosen))
        yield from self._finish_alike(problem, best[:chosen])
        if chosen == len(best):
            return []
        longest = len(coarsest_strides(problem.num_steps, self.stride_set(problem.num_steps)))
        others: list[int] = yield from self._third.finish_coarsely(
            problem,
            best[chosen:],
            evaluations=(len(best) - chosen) * max(len(strides) - 1, 1),
            longest=account.price(
                evaluations=longest, values=longest if self.rules else 0, rewards=1
            ),
            finish=partial(self._finish_alike, problem),
            side_by_side=not self.rules,
            **self._of_thirds(problem),
        )
        return others

    def _finish_alike(self, problem: Problem, nodes: list[int], *, redraws: bool = False) -> Asks:
        """Finish nodes of one step index in few strides, of which the first may draw noise."""
        left = problem.num_steps - int(problem.tree.step_index[nodes[0]])
        strides = coarsest_strides(left, self.stride_set(problem.num_steps))
        etas = [self.branch_eta if redraws else None, *[None] * (len(strides) - 1)]
        guidance = self._guidance(problem, self.rollout_guidance)
        if self.rules:
            yield from self._finish_warily(problem, nodes, strides, etas, guidance)
            return
        leaves = yield from finish(problem, nodes, strides=strides, etas=etas, guidance=guidance)
        back_up(problem, leaves)

    def _of_thirds(self, problem: Problem) -> dict[str, Any]:
        """What third moves must know: estimates are fused as they are valued."""
        return {
            "count": self.wave_size,
            "backup_fn": self._backup_fn,
            "guidance": self._guidance(problem, self.value_guidance),
        }

    def _most_coarse(self, problem: Problem, seeds: int, evaluations_left: int) -> int:
        """Coarse rollouts of so many seeds that their share of what is left pays for."""
        evaluations = len(self._coarse_strides(problem)) - 1
        share = self.coarse_share / (1 - self.seed_share) if self.seed_share < 1 else 1.0
        if problem.account.evaluations_left == UNLIMITED or not evaluations:
            return seeds
        return min(seeds, int(min(share, 1.0) * evaluations_left) // evaluations)

    def _coarse_strides(self, problem: Problem) -> tuple[int, ...]:
        """The strides of a coarse rollout from a seed."""
        left = problem.num_steps - sum(self._seed_strides(problem.num_steps))
        return coarsest_strides(left, self.stride_set(problem.num_steps))

    def _seed_strides(self, num_steps: int) -> tuple[int, ...]:
        """The strides to a seed: as many of the longest as fit in a third of the schedule."""
        depth = num_steps // 3
        longest = max((k for k in self.strides if k <= depth), default=1)
        return (longest,) * (depth // longest)

    def _guidance(self, problem: Problem, share: float) -> float | None:
        """A share of the call's guidance, where it can be chosen."""
        if share == 1 or problem.guidance_scale is None:
            return None
        return share * problem.guidance_scale

    # ---- pruning

    def _release_seeds(self, problem: Problem, seeds: list[int], evaluations: int) -> Asks:
        """Forget what leads to seeds, and seeds that enough better ones are known of.

        ``evaluations`` will be left when all seeds are valued.
        """
        tree = problem.tree
        most = self._most_coarse(problem, len(seeds), evaluations)
        beaten = [seeds[i] for i in best_first(tree.value[seeds])[max(most, 1) :]]
        above = [row for seed in seeds for row in path_to_root(tree, seed)[1:-1]]
        yield from forget(problem, beaten + above, rule=UNUSED)

    def _finish_warily(
        self,
        problem: Problem,
        seeds: list[int],
        strides: tuple[int, ...],
        etas: list[float | None],
        guidance: float | None,
    ) -> Asks:
        """Finish seeds some at a time, and give up on the way what those before have beaten."""
        savings = problem.savings
        savings.hold(seeds)
        for first in range(0, len(seeds), _COARSE_AT_ONCE):
            nodes = seeds[first : first + _COARSE_AT_ONCE]
            for edge, (stride, eta) in enumerate(zip(strides, etas, strict=True)):
                yield from denoise_missing(problem, nodes)
                if edge:
                    yield from value(problem, nodes, guidance=guidance)
                    nodes = yield from self._hopeful(problem, nodes, len(strides) - 1 - edge)
                if not nodes:
                    break
                nodes = yield from step(problem, nodes, stride=stride, eta=eta, guidance=guidance)
            if nodes:
                yield from reward(problem, nodes)
                back_up(problem, nodes)
            savings.let_go(seeds[first : first + _COARSE_AT_ONCE])
            yield from self._prune_stored(problem)

    def _hopeful(self, problem: Problem, nodes: list[int], evaluations: int) -> Asks:
        """Those of valued nodes that may still win; the others save ``evaluations`` and a score."""
        hopeful = []
        for node in nodes:
            rule = yield from self._beaten_by(problem, node, self.pruning_confidence)
            if rule is None:
                hopeful.append(node)
                continue
            problem.savings.evaluations += evaluations
            problem.savings.rewards += 1
            yield from forget(problem, [node], rule=rule)
        return hopeful

    def _beaten_by(self, problem: Problem, node: int, confidence: float) -> Asks:
        """The rule by which a valued node cannot win any more; ``None`` if it can."""
        tree, num_steps = problem.tree, problem.num_steps
        if "bounds" in self.rules and is_hopeless(
            tree, node, num_steps=num_steps, confidence=confidence
        ):
            return "bounds"
        if "gain" in self.rules:
            left = num_steps - int(tree.step_index[node])
            strides = [stride for stride in self.stride_set(num_steps) if stride <= left]
            gains = yield from predict_gain(problem, [node], strides)
            resolved = still_resolved(gains.log_variance[0], strides, left)
            if lacks_more(tree, node, resolved, confidence=confidence):
                return "gain"
        return None

    def _gives_up(self, problem: Problem, nodes: list[int], plan: Plan, edge: int) -> Asks:
        """Whether a rollout that came to ``nodes`` (best first) is given up before ``edge``."""
        rest = plan.candidates[edge:-1]
        # Each edge that is left selects, which raises the outcome above what values promise.
        selection = len(rest) ** self.edge_gain * expected_maximum(max(rest, default=1))
        rule = yield from self._beaten_by(problem, nodes[0], self.pruning_confidence + selection)
        if rule is None:
            return False
        problem.savings.evaluations += sum(rest)
        problem.savings.rewards += self.finish
        yield from forget(problem, nodes, rule=rule)
        return True

    def _may_gain(self, tree: Tree, node: int) -> bool:
        """Whether another child of a stored sample may be worth it, by those that it has."""
        valued = [child for child in tree.children(node) if not np.isnan(tree.value[child])]
        if "siblings" not in self.rules or len(valued) < 2 * _SIBLINGS_AT_ONCE:
            return True
        return pays_another(tree, valued, least_gain=self.least_gain)

    def _prune_stored(self, problem: Problem) -> Asks:
        """Release stored samples by the rules for them."""
        tree = problem.tree
        if "particles" in self.rules:
            beaten = [
                node
                for node in beaten_particles(tree)
                if not tree.in_flight[node] and not problem.savings.is_held(node)
            ]
            yield from forget(problem, beaten, rule="particles")
        if "memory" in self.rules:
            excess = least_valuable(
                tree, problem.savings, num_steps=problem.num_steps, most=self.max_live
            )
            yield from forget(problem, excess, rule="memory")

    # ---- 1. select

    def _first_wave(self, problem: Problem, start: int) -> list[tuple[int, Plan]]:
        """The first rollout alone, with its share of the budget; empty if nothing is paid for."""
        left = self._evaluations_left(problem, 1)
        share = math.ceil(self.first_share * left)
        plan = self._plan(problem, start, share) or self._plan(problem, start, left)
        # Without evaluations it would finish the same sample as the draft.
        return [] if plan is None or not _evaluations(start, plan) else [(start, plan)]

    def _select_wave(self, problem: Problem, standard: _Standard) -> list[tuple[int, Plan]]:
        """Nodes to simulate from on this snapshot of the tree, with the plan of each.

        Rollouts are to be no coarser than the first one; where the share pays for none such, all
        that is left may be spent, and in the end on fewer candidates.
        """
        tree = problem.tree
        left = self._evaluations_left(problem, self.wave_size)
        share = math.ceil(self.first_share * left)
        for least, evaluations in (
            (standard.candidates, share),
            (standard.candidates, left),
            (2, left),
        ):
            wave: list[tuple[int, Plan]] = []
            rest = evaluations
            for slot in range(self.wave_size, 0, -1):
                chosen = self._select(problem, standard._replace(candidates=least), rest // slot)
                if chosen is not None:
                    wave.append(chosen)
                    rest -= _evaluations(*chosen)
                    add_virtual_visit(tree, chosen[0])
            for node, _ in wave:
                settle(tree, node)
            if wave:
                return wave
        return []

    def _plan_wave(
        self, problem: Problem, standard: _Standard, nodes: Sequence[int]
    ) -> list[tuple[int, Plan]]:
        """Rollouts from given nodes, or from the first of them, by the share of a wave.

        Never by all that is left: a third move would gain by the size of its rollout alone.
        """
        share = math.ceil(self.first_share * self._evaluations_left(problem, self.wave_size))
        for count in range(len(nodes), 0, -1):
            for least in (standard.candidates, 2):
                goal = standard._replace(candidates=least)
                wave = [
                    (node, plan)
                    for node in nodes[:count]
                    if (plan := self._standard_plan(problem, node, goal, share // count))
                ]
                if wave:
                    return wave
        return []

    def _select(
        self, problem: Problem, standard: _Standard, evaluations: int
    ) -> tuple[int, Plan] | None:
        """Descend by UCT to a node to simulate from; ``None`` if there is none.

        The descent passes nodes from which ``evaluations`` pay for less than the standard.
        """
        tree = problem.tree
        looks = tree.visit_count + tree.in_flight
        node = ROOT
        deepest = None
        while True:
            children = [
                child
                for child in tree.children(node)
                if tree.step_index[child] < problem.num_steps - 1
                and tree.evaluated[child]
                and _is_open(tree, child, problem.num_steps)
                and (looks[child] or self._standard_plan(problem, child, standard, evaluations))
            ]
            plan = self._standard_plan(problem, node, standard, evaluations)
            if plan is not None:
                deepest = (node, plan)
                if (looks[node] == 0 and not children) or may_widen_progressively(
                    len(tree.children(node)),
                    int(looks[node]),
                    constant=self.widening_constant,
                    exponent=self.widening_exponent,
                ):
                    return deepest
            if not children:
                return deepest
            node = children[int(np.argmax(self._scores(tree, children)))]

    def _standard_plan(
        self, problem: Problem, node: int, standard: _Standard, evaluations: int
    ) -> Plan | None:
        """Plan from ``node`` with no fewer edges and candidates than the standard."""
        if not problem.tree.live[node] or not self._may_gain(problem.tree, node):
            return None
        done = int(problem.tree.step_index[node])
        edges = sum(step_index > done for step_index in standard.step_indices)
        plan = self._plan(problem, node, evaluations, least_edges=edges)
        if plan is None or plan.candidates[0] < standard.candidates or not _evaluations(node, plan):
            return None
        return plan

    def _scores(self, tree: Tree, siblings: list[int]) -> Values:
        """UCT of stored siblings; their evaluation counts as a first look."""
        worth = calibrated(tree.value[siblings], self._backup_fn(tree, siblings))
        for place, node in enumerate(siblings):
            if tree.visit_count[node] == 0 and tree.fusion_of(node) is not None:
                worth[place] = self._third.prior_of(tree, node, self._backup_fn)
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

    def _plan(
        self, problem: Problem, start: int, evaluations: int, least_edges: int = 1
    ) -> Plan | None:
        """Plan of a rollout from ``start`` by at most so many evaluations."""
        tree = problem.tree
        done = max(int(tree.step_index[start]), 0)
        shape, allowed = self._shape(problem, done)
        budget = evaluations
        while budget >= 0:
            plan = plan_rollout(
                problem.num_steps - done,
                budget,
                allowed=allowed,
                shape=shape,
                brake_nats=max(self.brake_nats - _nats(tree, start), 0.0),
                edge_gain=self.edge_gain,
                candidates=self.candidates,
                least_edges=least_edges,
                resolved=self._resolved(problem, done),
            )
            if plan is None or _evaluations(start, plan) <= evaluations:
                return plan
            budget -= -(-(_evaluations(start, plan) - evaluations) // 2)  # the draws come on top
        return None

    def _shape(self, problem: Problem, done: int) -> tuple[PlanShape, tuple[int, ...]]:
        """Where the long strides of a plan stand, and what they are chosen from."""
        policy = self.policy
        usable = self.stride_set(problem.num_steps)
        if policy.kind == "fixed":
            longest = max(k for k in usable if k <= policy.stride)
            return "constant", (min(longest, problem.num_steps - done),)
        return (policy.kind if policy.kind in PLAN_SHAPES else "budget"), usable

    def _costs(self, problem: Problem) -> Costs | None:
        """What jumps cost the typical sample, where the policy needs it."""
        costs, policy = problem.stride_costs, self.policy
        if costs is None or not policy.needs_costs:
            return None
        if policy.target == "resolved_variance":  # by which the last edge chooses nothing
            return without_last_edge(costs, self.stride_set(problem.num_steps))
        return costs

    def _resolved(self, problem: Problem, done: int) -> tuple[float, ...] | None:
        """Deviations that so many edges of the typical sample resolve, where the policy asks."""
        costs = self._costs(problem)
        if costs is None or self.policy.target != "resolved_variance":
            return None
        to_go = cost_to_go(costs, self.stride_set(problem.num_steps), problem.num_steps)[done]
        return tuple((-to_go).tolist()) if np.isfinite(to_go).any() else None

    def _evaluations_left(self, problem: Problem, simulations: int) -> int:
        """Evaluations left, each valued, when so many simulations must still be scored."""
        savings = problem.savings
        left = problem.account.evaluations_left_for(
            rewards=self.finish * simulations + savings.rewards
        )
        return max(left - savings.evaluations, 0)

    # ---- 2. and 3. simulate and evaluate

    def _simulate(self, problem: Problem, start: int, plan: Plan) -> Asks:
        """Greedy rollout: on each edge go on from the best candidate.

        Returns:
            Finished nodes; none where it was given up.
        """
        guidance = self._guidance(problem, self.rollout_guidance)
        nodes = [start]
        savings = problem.savings
        try:
            if start == ROOT:
                nodes = yield from draw(problem, plan.candidates[0])
                savings.hold(nodes)
                nodes = yield from self._tried(problem, nodes)
            else:
                savings.hold(nodes)
            for edge, count in enumerate(plan.candidates[:-1]):
                choice = yield from self._choose(problem, nodes[0], plan.strides[edge:])
                made = yield from step_by(
                    problem,
                    [nodes[0]] * count,
                    [choice] * count,
                    eta=self.branch_eta,
                    guidance=guidance,
                )
                savings.let_go(nodes)
                nodes = made
                savings.hold(nodes)
                nodes = yield from self._tried(problem, nodes)
                if self.rules and (yield from self._gives_up(problem, nodes, plan, edge + 1)):
                    return []
            chosen = nodes[: self.finish]
            choice = yield from self._choose(problem, chosen[0], plan.strides[-1:])
            leaves = yield from step_by(
                problem, chosen, [choice] * len(chosen), eta=None, guidance=guidance
            )
            yield from reward(problem, leaves)
            return leaves
        finally:
            savings.let_go(nodes)

    def _choose(self, problem: Problem, node: int, planned: tuple[int, ...]) -> Asks:
        """The next stride from a node: as planned, or by a policy for as many edges as planned."""
        policy = self.policy
        if policy.is_planned or policy.kind == "fixed":
            return StrideChoice(planned[0], policy.kind)
        (choice,) = yield from choose_strides(
            problem,
            [node],
            policy=policy,
            strides=self.stride_set(problem.num_steps),
            edges=len(planned),
            costs=self._costs(problem),
            error_tolerance=self.error_tolerance,
        )
        return choice

    def _tried(self, problem: Problem, nodes: list[int]) -> Asks:
        """Evaluate and value candidates; returns them best first.

        Where pruning says so, not all of them.
        """
        guidance = self._guidance(problem, self.value_guidance)
        tried, rest = nodes, []
        if "siblings" in self.rules:
            tried, rest = nodes[: 2 * _SIBLINGS_AT_ONCE], nodes[2 * _SIBLINGS_AT_ONCE :]
        yield from denoise(problem, tried)
        yield from value(problem, tried, guidance=guidance)
        while rest and pays_another(problem.tree, tried, least_gain=self.least_gain):
            some, rest = rest[:_SIBLINGS_AT_ONCE], rest[_SIBLINGS_AT_ONCE:]
            yield from denoise(problem, some)
            yield from value(problem, some, guidance=guidance)
            tried = tried + some
        problem.savings.evaluations += len(rest)
        problem.savings.let_go(rest)
        yield from forget(problem, rest, rule="siblings")
        yield from self._prune_stored(problem)
        return [tried[i] for i in best_first(problem.tree.value[tried])]


class _Standard(NamedTuple):
    """What later rollouts must not fall short of.

    Attributes:
        step_indices: where the edges of the first rollout ended.
        candidates: how many were tried on each of its edges.
    """

    step_indices: tuple[int, ...]
    candidates: int


def _standard(tree: Tree, start: int, plan: Plan, *, leaves: list[int]) -> _Standard:
    """The first rollout, which ended in ``leaves`` or was given up, as a standard."""
    done = max(int(tree.step_index[start]), 0)
    if leaves:
        ends = sorted(tree.step_index[path_to_root(tree, leaves[0])].tolist())
    else:
        ends = (done + np.cumsum(plan.strides)).tolist()
    return _Standard(tuple(end for end in ends if end > done), plan.candidates[0])


def _most_promising(tree: Tree, seeds: list[int]) -> int:
    """The node with the best reward below it, or if there is none, with the best value."""
    return max(seeds, key=lambda node: (tree.max_value[node], tree.value[node]))


def _is_open(tree: Tree, node: int, num_steps: int) -> bool:
    """Whether a rollout can go on from an unfinished node, or from one below it."""
    if tree.live[node]:
        return True
    return any(
        tree.step_index[child] < num_steps and _is_open(tree, child, num_steps)
        for child in tree.children(node)
    )


def _evaluations(start: int, plan: Plan) -> int:
    """Evaluations of a simulation; from the root, the draws come on top of the plan."""
    return plan.evaluations + (plan.candidates[0] if start == ROOT else 0)


def _nats(tree: Tree, node: int) -> float:
    """Summed log of candidates along the path to ``node``, without the draws of the noise."""
    parents = path_to_root(tree, node)[1:-1]
    return sum(math.log(len(tree.children(parent))) for parent in parents)

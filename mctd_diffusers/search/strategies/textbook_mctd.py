"""MCTD as published, on images: Monte Carlo tree diffusion (Yoon et al., 2025, arXiv 2502.07202).

A node is a partially denoised sample, an edge of the search crosses ``1 / depth`` of the schedule,
and an action is a scale of guidance (free here, since both outputs of the network are kept apart),
or a draw of noise where there is no guidance. Until the budget is spent:

1. select: descend from the root by UCT (c = sqrt 2) to a node with an action that is not tried;
2. expand: try one at random: denoise over one edge, single steps;
3. simulate: jump on from there to a finished sample, by the user's own scheduler in coarse strides,
   and score it;
4. back up: the value of a node is the greatest reward below it (Algorithm 2).

With ``wave_size`` above 1 this is P-MCTD (Fast-MCTD, 2025, arXiv 2506.09498): so many selections on
one snapshot of the tree, each action taken once, visits under way counted with
``redundancy_weight``; one batch of expansions and simulations; then the tree is updated. With
``expansion_stride`` above 1 it is S-MCTD's sparseness, in the only sense that images have: coarse
steps. (There, plans in time are made coarser.)

Departures: rewards have no scale, so values are min-max normalised over the tree; the root's
children are initial noises; a subtree in which all is tried is passed over, and when the whole tree
is tried, another initial noise joins it. Every simulation is a visit of all nodes on its path, at
any wave size, and a new child has the visit of its own simulation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.backups import max_backup
from mctd_diffusers.search.environment import Asks, Values
from mctd_diffusers.search.moves import denoise, draw, finish, gather, generator_for, reward, step
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.selection import uct_scores
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strides import constant_strides
from mctd_diffusers.search.tree import (
    NO_STEP,
    ROOT,
    add_virtual_visit,
    backup,
    path_to_root,
    settle,
)


@dataclass(frozen=True)
class TextbookMCTD:
    """MCTD, P-MCTD, S-MCTD and Fast-MCTD by their papers; ``mctd`` is this project's own.

    Attributes:
        guidances: the actions: classifier-free guidance as shares of the call's, ``None`` for its
            own; where guidance cannot be chosen, as many draws of noise.
        noises: initial noises, the children of the root; 1 in the paper.
        depth: edges of the search from an initial noise to the end.
        expansion_stride: schedule steps that a step of an expansion crosses (S switch).
        simulation_stride: schedule steps that a jump of a simulation crosses; ``None`` for a fifth
            of the schedule, as in the paper.
        exploration: weight of ``sqrt(2 ln N / n)``: 1 is the paper's c = sqrt 2.
        redundancy_weight: visits that one under way counts for (``w``).
        wave_size: simulations on one snapshot of the tree (P switch); 1 is serial.
        branch_eta: share of fresh noise in expansions, 0 to 1; 0 in the papers, where guidance
            alone tells children apart.
    """

    guidances: tuple[float | None, ...] = (0.5, 1.0, 2.0)
    noises: int = 3
    depth: int = 5
    expansion_stride: int = 1
    simulation_stride: int | None = None
    exploration: float = 1.0
    redundancy_weight: float = 1.0
    wave_size: int = 1
    branch_eta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidances", tuple(self.guidances))
        if not self.guidances:
            raise ConfigError("guidances is (); give at least one scale, such as (0.5, 1.0, 2.0).")
        for scale in self.guidances:
            if scale is not None:
                check_setting("guidances", scale, 0)
        for name in ("noises", "depth", "expansion_stride", "wave_size"):
            check_setting(name, getattr(self, name), 1, whole=True)
        if self.simulation_stride is not None:
            check_setting("simulation_stride", self.simulation_stride, 1, whole=True)
        for name in ("exploration", "redundancy_weight"):
            check_setting(name, getattr(self, name), 0)
        check_setting("branch_eta", self.branch_eta, 0, 1)

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "textbook_mctd"

    def least_evaluations(self, num_steps: int) -> int:
        """One simulation from initial noise."""
        return self._course(num_steps).price(NO_STEP)

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges."""
        course = self._course(num_steps)
        return max((*course.expansion(0), *course.simulation(num_steps)))

    def search(self, problem: Problem) -> Asks:
        """Waves of simulations until the budget pays for none."""
        tree = problem.tree
        growth = _Growth(
            problem,
            self._course(problem.num_steps),
            generator_for(problem, "actions"),
        )
        growth.add(ROOT, [None] * self.noises)
        while wave := self._select_wave(growth):
            try:
                found = yield from gather(*(self._simulate(growth, *start) for start in wave))
            finally:  # also when the search is stopped in the middle of a wave
                for node, _ in wave:
                    settle(tree, node)
            for (parent, _), (child, leaf) in zip(wave, found, strict=True):
                backup(tree, leaf, float(tree.reward[leaf]))
                growth.lowest = min(growth.lowest, float(tree.reward[leaf]))
                growth.children[parent].append(child)
                growth.add(child, self._actions(growth, child))
        return "budget"

    # ---- 1. select

    def _select_wave(self, growth: _Growth) -> list[tuple[int, float | None]]:
        """Nodes of this snapshot, with an action each; their visits under way are to be settled."""
        tree, account = growth.problem.tree, growth.problem.account
        wave: list[tuple[int, float | None]] = []
        evaluations = 0
        while len(wave) < self.wave_size:
            if not growth.num_untried[ROOT]:
                if wave:  # what is under way may bring new actions
                    break
                growth.add(ROOT, [None])
            node = self._select(growth)
            price = growth.course.price(int(tree.step_index[node]))
            evaluations += price
            rewards = len(wave) + 1
            if evaluations > account.evaluations_left_for(values_per_evaluation=0, rewards=rewards):
                break
            wave.append((node, growth.take(node)))
            add_virtual_visit(tree, node)
        return wave

    def _select(self, growth: _Growth) -> int:
        """Descend by UCT to a node with an action that is not tried."""
        tree, node = growth.problem.tree, ROOT
        while not growth.untried[node]:
            siblings = growth.children[node]
            scores = uct_scores(
                growth.normalised(max_backup(tree, siblings)),
                tree.visit_count[siblings],
                tree.in_flight[siblings],
                exploration=self.exploration,
                redundancy_weight=self.redundancy_weight,
            )
            is_open = np.array([growth.num_untried[child] > 0 for child in siblings])
            node = siblings[int(np.argmax(np.where(is_open, scores, -np.inf)))]
        return node

    # ---- 2. expand and 3. simulate

    def _simulate(self, growth: _Growth, node: int, guidance: float | None) -> Asks:
        """A new child of ``node``, and a finished sample below it; returns both."""
        problem, course = growth.problem, growth.course
        if node == ROOT:
            (child,) = yield from draw(problem, 1)
        else:
            child = node
            for stride in course.expansion(int(problem.tree.step_index[node])):
                if child != node:
                    yield from denoise(problem, [child])
                is_last = problem.tree.step_index[child] + stride == problem.num_steps
                (child,) = yield from step(
                    problem,
                    [child],
                    stride=stride,
                    eta=None if is_last else self.branch_eta,
                    guidance=guidance,
                )
        left = problem.num_steps - int(problem.tree.step_index[child])
        if not left:
            yield from reward(problem, [child])
            return child, child
        (leaf,) = yield from finish(problem, [child], strides=course.simulation(left))
        return child, leaf

    def _actions(self, growth: _Growth, node: int) -> list[float | None]:
        """What can be tried at a new node: nothing where a single step would finish it."""
        problem = growth.problem
        step_index = int(problem.tree.step_index[node])
        expansion = growth.course.expansion(step_index)
        if step_index + sum(expansion) == problem.num_steps and len(expansion) <= 1:
            return []
        scale = problem.guidance_scale
        return [
            None if share is None or scale is None else share * scale for share in self.guidances
        ]

    def _course(self, num_steps: int) -> _Course:
        return _Course(
            num_steps,
            edge=-(-num_steps // self.depth),
            expansion_stride=self.expansion_stride,
            simulation_stride=self.simulation_stride or max(1, round(num_steps / 5)),
        )


class _Course(NamedTuple):
    """How the schedule is crossed.

    Attributes:
        num_steps: steps of the schedule.
        edge: steps that an edge of the search crosses.
        expansion_stride: steps that a step of an expansion crosses.
        simulation_stride: steps that a jump of a simulation crosses.
    """

    num_steps: int
    edge: int
    expansion_stride: int
    simulation_stride: int

    def expansion(self, step_index: int) -> tuple[int, ...]:
        """Strides of the edge of the search that leaves ``step_index``; empty at the end."""
        length = min(self.edge, self.num_steps - step_index)
        return constant_strides(length, self.expansion_stride) if length else ()

    def simulation(self, left: int) -> tuple[int, ...]:
        """Strides to the end, ``left`` steps away."""
        return constant_strides(left, self.simulation_stride)

    def price(self, step_index: int) -> int:
        """Evaluations of an expansion of an evaluated node and of the simulation below it."""
        if step_index == NO_STEP:
            return len(self.simulation(self.num_steps))
        expansion = self.expansion(step_index)
        left = self.num_steps - step_index - sum(expansion)
        # The node is evaluated already, and a finished sample never is.
        return len(expansion) - 1 + (len(self.simulation(left)) if left else 0)


@dataclass
class _Growth:
    """The search tree within the tree of samples, which holds simulations too.

    Attributes:
        problem: the image.
        course: how the schedule is crossed.
        generator: draws the actions.
        children: node -> its children by expansion.
        untried: node -> actions that are not taken.
        num_untried: node -> actions that are not taken at it and below it.
        lowest: reward so far.
    """

    problem: Problem
    course: _Course
    generator: np.random.Generator
    children: dict[int, list[int]] = field(default_factory=dict)
    untried: dict[int, list[float | None]] = field(default_factory=dict)
    num_untried: dict[int, int] = field(default_factory=dict)
    lowest: float = np.inf

    def add(self, node: int, actions: list[float | None]) -> None:
        """Note actions of a node, which may be new."""
        self.children.setdefault(node, [])
        self.untried.setdefault(node, []).extend(actions)
        self._count(node, len(actions))

    def take(self, node: int) -> float | None:
        """Take one of the actions of a node, at random."""
        action = self.untried[node].pop(int(self.generator.integers(len(self.untried[node]))))
        self._count(node, -1)
        return action

    def normalised(self, values: Values) -> Values:
        """Values on the scale of all rewards in the tree, 0 to 1; all 0 where they are equal."""
        spread = float(self.problem.tree.max_value[ROOT]) - self.lowest
        return np.asarray((values - self.lowest) / spread) if spread else np.zeros_like(values)

    def _count(self, node: int, change: int) -> None:
        for row in path_to_root(self.problem.tree, node):
            if row in self.children:  # not a state within an edge
                self.num_untried[row] = self.num_untried.get(row, 0) + change

"""DTS: diffusion tree sampling (Jain et al., 2025, arXiv 2506.20701, Algorithm 1), in waves.

Until the budget is spent, ``wave_size`` times on one snapshot of the tree:

1. select: descend from the root, at each branch level by the Boltzmann law of the children's soft
   values (DTS) or by upper confidence bounds on them (DTS*), until a node may be widened by the law
   of progressive widening, or a finished sample is met; count the visit as under way;
2. expand and roll out: one new child of that node by fresh noise, and on to the end by the plain
   stochastic sampler. All states join the tree. The visit of a finished sample costs nothing;
3. evaluate: the finished sample is decoded in full and scored; nothing unfinished is ever valued;
4. back up: along the path, the soft value of a node is ``lambda log mean exp(V / lambda)`` of its
   children, each counting once.

With the exact reward of unbiased rollouts, soft values tend to those of ``p(x) exp(r(x) / lambda)``
as the tree grows, so DTS is also a sampler: ``sampling.sample_from_tree`` draws from the finished
tree at no further evaluation. ``lambda`` is a temperature here; the paper writes its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.backups import SoftValues
from mctd_diffusers.search.environment import Asks, Values
from mctd_diffusers.search.moves import denoise, draw, gather, generator_for, reward, step
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.selection import boltzmann, min_max, uct_scores
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strides import constant_strides
from mctd_diffusers.search.tree import ROOT, Tree, add_virtual_visit, backup, settle
from mctd_diffusers.search.widening import may_widen_progressively

Selection = Literal["boltzmann", "uct"]

_MOST_REVISITS: Final = 1000
"""Visits of finished samples in a row after which the law of widening is taken to let nothing new
in; with an exponent of 0 it never does."""


@dataclass(frozen=True)
class DTS:
    """Tree search with soft values, full stochastic rollouts and few branch levels.

    Attributes:
        select: which child to go on from: ``"boltzmann"`` draws by soft values, so that the tree
            can be sampled from; ``"uct"`` (DTS*) looks for the best sample.
        temperature: ``lambda`` in reward units, above 0; ``None``: ``temperature_share`` times the
            spread of rewards at the root, see :meth:`temperature_of`, taken anew whenever the
            number of finished samples has doubled.
        temperature_share: see there; above 0.
        selection_temperature: of the Boltzmann law of selection, in reward units, above 0; ``None``
            for ``lambda``, as in the paper. Infinity looks at children evenly: the tree then grows
            without a look at values, and soft values are unbiased (in ``exp(V / lambda)``) at any
            size. Else they are so in the limit: what looks good is looked at again, what looks bad
            by chance is not, and finite trees underrate.
        exploration: weight of the UCT bonus on soft values that are min-max normalised among
            siblings (the paper's is in units of its reward).
        widening_constant: a node may have ``widening_constant * visits ** widening_exponent``
            children; the paper's is 2.
        widening_exponent: see there; 0.8 for images in the paper.
        branch_levels: where nodes may have several children, as shares of the schedule that are
            left, 0 (exclusive) to 1: 1 is at the initial noises. The problem itself, whose children
            are the initial noises, branches always; a node whose next edge is the last one never.
        stride: schedule steps that an edge crosses between branch levels.
        wave_size: simulations that run side by side on one snapshot of the tree.
        branch_eta: share of fresh noise on all edges but the last, 0 to 1; 1 in the paper.
    """

    select: Selection = "boltzmann"
    temperature: float | None = None
    temperature_share: float = 0.1
    selection_temperature: float | None = None
    exploration: float = 0.5
    widening_constant: float = 2.0
    widening_exponent: float = 0.8
    branch_levels: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2)
    stride: int = 1
    wave_size: int = 8
    branch_eta: float = 1.0

    def __post_init__(self) -> None:
        if self.select not in get_args(Selection):
            raise ConfigError(
                f"select is {self.select!r}; give one of {', '.join(get_args(Selection))}."
            )
        for name in ("temperature", "temperature_share", "selection_temperature"):
            given = getattr(self, name)
            if given is not None:
                check_setting(name, given, 0)
                if not given:
                    raise ConfigError(f"{name} is {given!r}; give a number above 0.")
        for name in ("exploration", "widening_constant"):
            check_setting(name, getattr(self, name), 0)
        for name in ("widening_exponent", "branch_eta"):
            check_setting(name, getattr(self, name), 0, 1)
        for name in ("stride", "wave_size"):
            check_setting(name, getattr(self, name), 1, whole=True)
        object.__setattr__(self, "branch_levels", tuple(self.branch_levels))
        for level in self.branch_levels:
            check_setting("branch_levels", level, 0, 1)

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "dts"

    def least_evaluations(self, num_steps: int) -> int:
        """One rollout."""
        return self._course(num_steps).num_edges

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges."""
        return max(self._course(num_steps).strides.values())

    def search(self, problem: Problem) -> Asks:
        """Waves of simulations until the budget pays for none."""
        tree = problem.tree
        values = SoftValues(tree, self.temperature_of(tree))
        growth = _Growth(
            problem,
            self._course(problem.num_steps),
            values,
            generator_for(problem, "boltzmann"),
        )
        num_finished = revisits = 0
        while wave := self._select_wave(growth):
            try:
                leaves = yield from gather(*(self._simulate(growth, start) for start in wave))
            finally:  # also when the search is stopped in the middle of a wave
                for start in wave:
                    settle(tree, start)
            for leaf in leaves:
                backup(tree, leaf, float(tree.reward[leaf]))
                values.update(leaf)
            new = len(set(leaves) - set(wave))
            revisits = 0 if new else revisits + len(wave)
            if revisits > _MOST_REVISITS:
                return "exhausted"
            if (num_finished + new).bit_length() > num_finished.bit_length():
                values.renew(self.temperature_of(tree))
            num_finished += new
        return "budget"

    def temperature_of(self, tree: Tree) -> float:
        """``lambda`` for a tree: as it is set, else by the spread of rewards at the root.

        That is the standard deviation of the first reward below each initial noise, which no
        selection has touched; of all rewards where there is but one noise. Where all are equal any
        temperature will do, and it is 1.
        """
        if self.temperature is not None:
            return self.temperature
        rewards = _first_rewards(tree)
        if len(rewards) < 2:
            rewards = tree.reward[~np.isnan(tree.reward)]
        spread = float(rewards.std()) if len(rewards) else 0.0
        return self.temperature_share * spread or 1.0

    # ---- 1. select

    def _select_wave(self, growth: _Growth) -> list[int]:
        """Nodes to simulate from on this snapshot; their virtual visits are to be settled."""
        tree = growth.problem.tree
        wave: list[int] = []
        evaluations = 0
        for _ in range(self.wave_size):
            node = self._select(growth, wave, evaluations)
            if node is None:
                break
            add_virtual_visit(tree, node)
            wave.append(node)
            evaluations += growth.course.price(tree, node)
        return wave

    def _select(self, growth: _Growth, wave: list[int], evaluations: int) -> int | None:
        """Descend to a node to widen or to a finished sample; ``None`` if nothing is paid for.

        ``wave`` holds the nodes chosen before, which will take ``evaluations``.
        """
        problem, course = growth.problem, growth.course
        tree = problem.tree
        rewards = len(wave) + 1
        left = problem.account.evaluations_left_for(values_per_evaluation=0, rewards=rewards)
        paid = left - evaluations
        if course.least_price > paid:
            return None
        node = ROOT
        while (step_index := int(tree.step_index[node])) < problem.num_steps:
            children = tree.children(node)
            if (
                (node == ROOT or step_index in course.branches)
                and course.price(tree, node) <= paid
                and self._may_widen(growth, node, len(children) + wave.count(node))
            ):
                return node
            if not children:  # all that is below is under way
                return None
            node = children[0] if len(children) == 1 else self._pick(growth, children)
        return node

    def _may_widen(self, growth: _Growth, node: int, num_children: int) -> bool:
        """Whether the law lets another child in; where nothing else branches, the root has none."""
        tree = growth.problem.tree
        if num_children == 0 or not growth.course.branches:
            return True
        return may_widen_progressively(
            num_children,
            int(tree.visit_count[node] + tree.in_flight[node]),
            constant=self.widening_constant,
            exponent=self.widening_exponent,
        )

    def _pick(self, growth: _Growth, siblings: tuple[int, ...]) -> int:
        """The sibling to go on from."""
        tree, rows = growth.problem.tree, list(siblings)
        worth = growth.values.of(rows)
        if self.select == "boltzmann":
            temperature = self.selection_temperature or growth.values.temperature
            return rows[boltzmann(worth, temperature, growth.generator)]
        scores = uct_scores(
            min_max(worth),
            tree.visit_count[rows],
            tree.in_flight[rows],
            exploration=self.exploration,
        )
        return rows[int(np.argmax(scores))]

    # ---- 2. expand, roll out, evaluate

    def _simulate(self, growth: _Growth, node: int) -> Asks:
        """A new child of ``node``, and on to the end; returns the finished node."""
        problem, course = growth.problem, growth.course
        if node == ROOT:
            (node,) = yield from draw(problem, 1)
            yield from denoise(problem, [node])
        while edges_left := course.edges_left[int(problem.tree.step_index[node])]:
            is_last = edges_left == 1
            stride = course.strides[int(problem.tree.step_index[node])]
            eta = None if is_last else self.branch_eta
            (node,) = yield from step(problem, [node], stride=stride, eta=eta)
            yield from (reward if is_last else denoise)(problem, [node])
        return node

    def _course(self, num_steps: int) -> _Course:
        """The edges of a rollout, and where nodes may have several children."""
        shares = {round(num_steps * (1 - share)) for share in self.branch_levels}
        levels = sorted({0, *shares} - {num_steps})
        strides: dict[int, int] = {}
        for level, following in zip(levels, [*levels[1:], num_steps], strict=True):
            position = level
            for stride in constant_strides(following - level, self.stride):
                strides[position] = stride
                position += stride
        points = [*strides, num_steps]
        edges_left = {point: len(points) - 1 - i for i, point in enumerate(points)}
        branches = frozenset(level for level in shares if edges_left[level] > 1)
        return _Course(strides, edges_left, branches)


class _Course(NamedTuple):
    """The edges of a rollout.

    Attributes:
        strides: step index -> stride of the edge that leaves it.
        edges_left: step index -> edges to the end.
        branches: step indices at which nodes may have several children.
    """

    strides: dict[int, int]
    edges_left: dict[int, int]
    branches: frozenset[int]

    @property
    def num_edges(self) -> int:
        """Edges from initial noise to the end."""
        return self.edges_left[0]

    @property
    def least_price(self) -> int:
        """Evaluations of the cheapest simulation that finishes something new."""
        return min([self.num_edges, *(self.edges_left[level] - 1 for level in self.branches)])

    def price(self, tree: Tree, start: int) -> int:
        """Evaluations of a simulation; ``start`` is evaluated, a new initial noise is not."""
        if start == ROOT:
            return self.num_edges
        return max(self.edges_left[int(tree.step_index[start])] - 1, 0)


class _Growth(NamedTuple):
    """What a search works with.

    Attributes:
        problem: the image.
        course: the edges of a rollout.
        values: soft values of the tree.
        generator: draws the children of the Boltzmann law.
    """

    problem: Problem
    course: _Course
    values: SoftValues
    generator: np.random.Generator


def _first_rewards(tree: Tree) -> Values:
    """The first reward below each initial noise that has one."""
    leaves = []
    for node in tree.children(ROOT):
        leaf = node
        while children := tree.children(leaf):
            leaf = children[0]
        leaves.append(leaf)
    rewards = tree.reward[leaves]
    return np.asarray(rewards[~np.isnan(rewards)])

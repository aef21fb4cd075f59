"""Rollover: at each step try children until one is good enough, and keep what is left for later.

Rollover budget forcing (RBF; Kim et al., 2025, arXiv 2503.19385). In passes, until the budget is
spent:

1. draw: a share of the budget goes into initial noises, of which the best by value is kept;
2. the rest is shared out evenly over the edges as their quotas of children;
3. on each edge: try children of the kept state, a wave at a time. As soon as one has a higher value
   than the kept state, keep it and advance at once; what is unused of the quota is rolled forward
   to the next edge. If none has, keep the best of them when the quota is used up;
4. the last edge finishes one sample.

Verifier-Threshold (Sundaresha et al., 2025, arXiv 2512.08985) advances only when the value of a
child is above a threshold that is the same at all edges. The paper's is a score of its verifier;
rewards here have no common scale, so ``threshold`` is told in standard deviations of the values of
the initial noises, above their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from mctd_diffusers.search.budget import UNLIMITED
from mctd_diffusers.search.environment import Asks, Values
from mctd_diffusers.search.moves import (
    back_up,
    denoise,
    draw,
    finish,
    reward,
    step,
    value,
)
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strides import constant_strides

_SAMPLES_OF_A_PASS: Final = 4  # whose evaluations a pass takes where there is no bound on NFE
_OUT_OF_REACH: Final = 1e9  # standard deviations: no child is good enough


@dataclass(frozen=True)
class Rollover:
    """One path, on which every edge takes as many children as it needs.

    Attributes:
        initial_share: share of a pass's budget for initial noises, 0 to 1; one is always drawn, and
            two for a threshold.
        threshold: what the value of a child must exceed to advance at once, in standard deviations
            above the mean of the initial values of the pass, -1e9 to 1e9; ``None``: the value of
            its parent.
        stride: schedule steps that an edge crosses; a longer one leaves more children to each.
        wave_size: children that are tried side by side. With 1 no child is tried in vain; a wave is
            charged as a whole, and its best is what may advance.
        branch_eta: share of fresh noise on all edges but the last, 0 to 1.
    """

    initial_share: float = 0.1
    threshold: float | None = None
    stride: int = 1
    wave_size: int = 2
    branch_eta: float = 1.0

    def __post_init__(self) -> None:
        for name in ("initial_share", "branch_eta"):
            check_setting(name, getattr(self, name), 0, 1)
        if self.threshold is not None:
            check_setting("threshold", self.threshold, -_OUT_OF_REACH, _OUT_OF_REACH)
        for name in ("stride", "wave_size"):
            check_setting(name, getattr(self, name), 1, whole=True)

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "rollover"

    def least_evaluations(self, num_steps: int) -> int:
        """One path of single children."""
        return len(constant_strides(num_steps, self.stride))

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges."""
        return min(self.stride, num_steps)

    def search(self, problem: Problem) -> Asks:
        """Passes until the budget pays for none."""
        strides = constant_strides(problem.num_steps, self.stride)
        left = self._evaluations_left(problem, len(strides))
        if left < len(strides):  # the account pays for a sample, not for the values of its path
            nodes = yield from draw(problem, 1)
            leaves = yield from finish(problem, nodes, strides=strides)
            back_up(problem, leaves)
        while left >= len(strides):
            yield from self._one_pass(problem, strides, left)
            left = self._evaluations_left(problem, len(strides))
        return "budget"

    def _one_pass(self, problem: Problem, strides: tuple[int, ...], evaluations: int) -> Asks:
        """One path to a finished sample, by at most so many evaluations."""
        num_quotas = len(strides) - 1
        least = 1 if self.threshold is None else 2
        num_noises = min(
            max(least, int(self.initial_share * evaluations)), evaluations - num_quotas
        )
        noises = yield from draw(problem, num_noises)
        values = yield from self._tried(problem, noises)
        node, bar = noises[int(np.argmax(values))], values.max()
        if self.threshold is not None:
            bar = values.mean() + self.threshold * values.std()
        used = 0
        for edge, stride in enumerate(strides[:-1], start=1):
            children: list[int] = []
            values = np.empty(0)
            # All quotas up to this edge, less what was used before it.
            quota = (evaluations - num_noises) * edge // num_quotas - used
            while len(children) < quota and not (values > bar).any():
                count = min(self.wave_size, quota - len(children))
                wave = yield from step(problem, [node] * count, stride=stride, eta=self.branch_eta)
                children += wave
                values = np.append(values, (yield from self._tried(problem, wave)))
            used += len(children)
            node = children[int(np.argmax(values))]
            if self.threshold is None:
                bar = values.max()
        leaves = yield from step(problem, [node], stride=strides[-1], eta=None)
        yield from reward(problem, leaves)
        back_up(problem, leaves)

    def _tried(self, problem: Problem, nodes: list[int]) -> Asks:
        """Evaluate nodes; returns their values."""
        yield from denoise(problem, nodes)
        values: Values = yield from value(problem, nodes)
        return values

    def _evaluations_left(self, problem: Problem, num_edges: int) -> int:
        """Evaluations left, each valued, for a pass."""
        left = problem.account.evaluations_left
        return _SAMPLES_OF_A_PASS * num_edges if left == UNLIMITED else left

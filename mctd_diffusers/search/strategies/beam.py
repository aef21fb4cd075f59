"""Beam: at every step keep the best of several children by the value of their denoised estimate.

Three published methods are settings of it:

- SVDD (Li et al., 2024, arXiv 2408.08252): one kept state, one edge a block. Its law for the state
  to go on from is ``softmax(value / temperature)``; its code takes the limit at 0, the best.
- CoDe (Singh et al., 2025, arXiv 2502.00968): one kept state, longer blocks.
- TreeG-SC (Guo et al., 2025, arXiv 2502.11420): the best ``A = width`` of ``A x K`` children.

A pass takes ``A + (n - 1) A K`` evaluations for n edges. That is less than their own code spends,
since the evaluation by which a child was valued also steps it: SVDD counts ``n + (n - 1) K``, and
CoDe, whose copies of one state are evaluated apart, ``K n + K (n / block - 1)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mctd_diffusers.errors import BudgetError
from mctd_diffusers.search.budget import UNLIMITED
from mctd_diffusers.search.environment import Asks, Values
from mctd_diffusers.search.moves import denoise, draw, generator_for, reward, step, value
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.selection import best_first
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strides import constant_strides

_DEFAULT_CANDIDATES = 4  # without a bound on NFE: 2 to 4 stay on the data manifold


@dataclass(frozen=True)
class Beam:
    """Greedy selection among children, in passes from a new initial noise each.

    Attributes:
        candidates: children of each kept state in a block; ``None``: as many as one pass can pay
            for (with the brake: as few passes as it allows).
        width: states kept at each level.
        stride: schedule steps that an edge crosses.
        block: edges between two selections.
        temperature: in reward units, at least 0. At 0 the best are kept; above it they are drawn
            without replacement, by ``softmax(value / temperature)``.
        branch_eta: share of fresh noise on the edges that branch, 0 to 1.
        brake_nats: bound on the summed log of candidates along a path, which keeps selection on the
            data manifold; it applies where ``candidates`` is ``None``.
    """

    candidates: int | None = None
    width: int = 1
    stride: int = 1
    block: int = 1
    temperature: float = 0.0
    branch_eta: float = 1.0
    brake_nats: float = 30.0

    def __post_init__(self) -> None:
        if self.candidates is not None:
            check_setting("candidates", self.candidates, 1, whole=True)
        for name in ("width", "stride", "block"):
            check_setting(name, getattr(self, name), 1, whole=True)
        check_setting("branch_eta", self.branch_eta, 0, 1)
        for name in ("temperature", "brake_nats"):
            check_setting(name, getattr(self, name), 0)

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "beam"

    def least_evaluations(self, num_steps: int) -> int:
        """One pass with the candidates asked for, or with one."""
        return self._pass_evaluations(num_steps, self.candidates or 1)

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges."""
        return min(self.stride, num_steps)

    def search(self, problem: Problem) -> Asks:
        """Passes until the budget pays for none."""
        generator = generator_for(problem, "beam")
        candidates = self._pass_candidates(problem)
        if candidates is None:
            least = self._pass_evaluations(problem.num_steps, self.candidates or 1)
            raise BudgetError(
                f"{problem.budget} cannot pay for one pass of the beam with its {least} valued "
                f"evaluations over {problem.num_steps} steps; raise the budget, or use fewer "
                "candidates, steps or a longer stride."
            )
        while candidates is not None:
            yield from self._one_pass(problem, candidates, generator)
            candidates = self._pass_candidates(problem)
        return "budget"

    def _one_pass(self, problem: Problem, candidates: int, generator: np.random.Generator) -> Asks:
        """From initial noise to finished samples, keeping the best ``width`` after each block."""
        strides = constant_strides(problem.num_steps, self.stride)
        kept = yield from draw(problem, self.width)
        yield from denoise(problem, kept)
        for first in range(0, len(strides), self.block):
            block = strides[first : first + self.block]
            is_last_edge = first == len(strides) - 1
            nodes = kept if is_last_edge else [node for node in kept for _ in range(candidates)]
            for offset, stride in enumerate(block):
                eta = None if first + offset == len(strides) - 1 else self.branch_eta
                nodes = yield from step(problem, nodes, stride=stride, eta=eta)
                if first + offset < len(strides) - 1:
                    yield from denoise(problem, nodes)
            if first + self.block >= len(strides):
                yield from reward(problem, nodes)
            else:
                values = yield from value(problem, nodes)
                kept = [nodes[i] for i in self._order(values, generator)[: self.width]]

    def _order(self, values: Values, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Positions in the order of keeping: by value, or as a softmax draws them one by one.

        Values with Gumbel noise of the scale of the temperature have the order of draws without
        replacement (Kool et al., 2019, arXiv 1903.06059).
        """
        if self.temperature:
            values = values + self.temperature * generator.gumbel(size=len(values))
        return best_first(values)

    def _pass_evaluations(self, num_steps: int, candidates: int) -> int:
        """Evaluations of one pass: the draws, and all candidates at each level but the finished."""
        num_edges = len(constant_strides(num_steps, self.stride))
        return self.width + (num_edges - 1) * self.width * candidates

    def _pass_candidates(self, problem: Problem) -> int | None:
        """Candidates of the next pass, as paid for and braked; ``None`` if no pass is."""
        num_edges = len(constant_strides(problem.num_steps, self.stride))
        num_selections = math.ceil(num_edges / self.block) - 1
        account = problem.account

        def affords(candidates: int) -> bool:
            evaluations = self._pass_evaluations(problem.num_steps, candidates)
            last_block = num_edges - num_selections * self.block
            finished = self.width * (candidates if last_block > 1 else 1)
            values = self.width * candidates * num_selections
            price = account.price(evaluations=evaluations, values=values, rewards=finished)
            return account.affords(price)

        if self.candidates is not None:
            return self.candidates if affords(self.candidates) else None
        if num_edges == 1:
            return 1 if affords(1) else None
        most = math.exp(min(self.brake_nats / max(num_selections, 1), 20.0))
        if account.evaluations_left == UNLIMITED:
            return max(1, min(int(most), _DEFAULT_CANDIDATES))
        paid = (account.evaluations_left / self.width - 1) / (num_edges - 1)
        passes = math.ceil(paid / most) if paid > most else 1
        candidates = max(1, min(int(paid / passes), int(most)))
        while candidates and not affords(candidates):
            candidates -= 1
        return candidates or None

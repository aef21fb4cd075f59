"""A search with the plain sample of every image beside it, which the answer must not be below."""

from __future__ import annotations

from dataclasses import dataclass

from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import Strategy
from mctd_diffusers.search.strategies import BestOfN


@dataclass(frozen=True)
class WithPlain:
    """A strategy, and in the same waves the plain sample of every image.

    Attributes:
        strategy: searches the problems below ``images``.
        images: problems from here on make the plain sample of the image ``images`` before.
    """

    strategy: Strategy
    images: int

    @property
    def name(self) -> str:
        """Name of the strategy."""
        return self.strategy.name

    def least_evaluations(self, num_steps: int) -> int:
        """Fewest evaluations of either."""
        return min(num_steps, self.strategy.least_evaluations(num_steps))

    def search(self, problem: Problem) -> Asks:
        """Coroutine of the one or the other."""
        is_plain = problem.index >= self.images
        return (BestOfN(n=1) if is_plain else self.strategy).search(problem)

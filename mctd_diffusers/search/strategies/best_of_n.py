"""Best of n: plain samples, as many as the budget pays for, and the best of them."""

from __future__ import annotations

from dataclasses import dataclass

from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.moves import draw, finish_plainly
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.settings import check_setting


@dataclass(frozen=True)
class BestOfN:
    """Plain samples exactly as the stock pipeline steps them; the first is the stock picture.

    Attributes:
        n: samples to draw; ``None`` for as many as the budget pays.
        wave_size: samples that are denoised side by side.
    """

    n: int | None = None
    wave_size: int = 16

    def __post_init__(self) -> None:
        if self.n is not None:
            check_setting("n", self.n, 1, whole=True)
        check_setting("wave_size", self.wave_size, 1, whole=True)

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "best_of_n"

    def least_nfe(self, num_steps: int) -> int:
        """One plain sample."""
        return num_steps

    def search(self, problem: Problem) -> Asks:
        """Draw, finish, score; waves of samples until ``n`` or the budget is reached."""
        drawn = 0
        while self.n is None or drawn < self.n:
            wanted = self.wave_size if self.n is None else min(self.wave_size, self.n - drawn)
            count = _affordable(problem, wanted)
            if count == 0:
                return "budget"
            nodes = yield from draw(problem, count)
            yield from finish_plainly(problem, nodes)
            drawn += count
        return "exhausted"


def _affordable(problem: Problem, wanted: int) -> int:
    """Plain samples, at most ``wanted``, that the account still pays for."""
    account = problem.account
    count = wanted
    while count and not account.affords(
        account.price(nfe=count * problem.num_steps, rewards=count)
    ):
        count -= 1
    return count

"""Best of n: plain samples, as many as the budget pays for, and the best of them."""

from __future__ import annotations

from dataclasses import dataclass

from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.moves import draw, finish
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strides import constant_strides


@dataclass(frozen=True)
class BestOfN:
    """Plain samples exactly as the stock pipeline steps them; the first is the stock picture.

    With a longer stride it draws more samples of fewer steps each, at equal NFE.

    Attributes:
        n: samples to draw; ``None`` for as many as the budget pays.
        stride: schedule steps that an edge crosses; above 1 no sample is the stock picture.
        wave_size: samples that are denoised side by side.
    """

    n: int | None = None
    stride: int = 1
    wave_size: int = 16

    def __post_init__(self) -> None:
        if self.n is not None:
            check_setting("n", self.n, 1, whole=True)
        for name in ("stride", "wave_size"):
            check_setting(name, getattr(self, name), 1, whole=True)

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "best_of_n"

    def least_nfe(self, num_steps: int) -> int:
        """One plain sample."""
        return len(constant_strides(num_steps, self.stride))

    def search(self, problem: Problem) -> Asks:
        """Draw, finish, score; waves of samples until ``n`` or the budget is reached."""
        strides = constant_strides(problem.num_steps, self.stride)
        account = problem.account
        sample = account.price(nfe=len(strides), rewards=1)
        drawn = 0
        while self.n is None or drawn < self.n:
            wanted = self.wave_size if self.n is None else min(self.wave_size, self.n - drawn)
            count = account.affordable(sample, wanted)
            if count == 0:
                return "budget"
            nodes = yield from draw(problem, count)
            yield from finish(problem, nodes, strides=strides)
            drawn += count
        return "exhausted"

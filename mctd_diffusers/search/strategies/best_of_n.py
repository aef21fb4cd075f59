"""Best of n: plain samples, as many as the budget pays for, and the best of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.moves import draw, finish, finish_by_policy
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.stride_policies import (
    StridePolicy,
    admissible_strides,
    check_costs,
    check_edges,
    parse_stride_policy,
)
from mctd_diffusers.search.strides import check_stride_set, constant_strides


@dataclass(frozen=True)
class BestOfN:
    """Plain samples exactly as the stock pipeline steps them; the first is the stock picture.

    With a longer stride it draws more samples of fewer steps each, at equal NFE. With
    ``evaluations`` every sample takes exactly so many of them over the whole schedule, and a policy
    chooses the strides.

    Attributes:
        n: samples to draw; ``None`` for as many as the budget pays.
        stride: schedule steps that an edge crosses; above 1 no sample is the stock picture.
        wave_size: samples that are denoised side by side.
        evaluations: denoiser evaluations of each sample (one a step, where there are fewer steps);
            ``None``: as many as ``stride`` takes.
        stride_policy: chooses the strides of so many evaluations: ``"uniform"``, ``"fixed:k"``,
            ``"random"``, ``"ays"``, ``"gits"``, ``"x0hat"``, ``"oracle"``, ``"ige"`` (by truncation
            error) or ``"ige:<target>"``.
        strides: schedule steps that an edge may cross then; ``None`` for any.
        error_tolerance: bound on the predicted truncation error of a stride, in latent units, where
            the policy predicts it; the shortest that fits may exceed it.
    """

    n: int | None = None
    stride: int = 1
    wave_size: int = 16
    evaluations: int | None = None
    stride_policy: str = "uniform"
    strides: tuple[int, ...] | None = None
    error_tolerance: float = math.inf

    def __post_init__(self) -> None:
        if self.n is not None:
            check_setting("n", self.n, 1, whole=True)
        for name in ("stride", "wave_size"):
            check_setting(name, getattr(self, name), 1, whole=True)
        check_setting("error_tolerance", self.error_tolerance, 0)
        if self.strides is not None:
            object.__setattr__(self, "strides", check_stride_set(self.strides))
        policy = self.policy
        if self.evaluations is not None:
            check_setting("evaluations", self.evaluations, 1, whole=True)
            if self.stride != 1:
                raise ConfigError(
                    f"evaluations is {self.evaluations} and stride {self.stride}; give one of them."
                )
        elif policy.kind != "uniform" or self.strides is not None:
            raise ConfigError(
                f"stride_policy is {self.stride_policy!r} and strides are {self.strides}, and "
                "evaluations is None; give the evaluations of each sample, whose strides they "
                "choose."
            )

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "best_of_n"

    def least_evaluations(self, num_steps: int) -> int:
        """One plain sample."""
        if self.evaluations is None:
            return len(constant_strides(num_steps, self.stride))
        edges = min(self.evaluations, num_steps)
        check_edges(self.stride_set(num_steps), num_steps, edges)
        return edges

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges."""
        if self.evaluations is None:
            return min(self.stride, num_steps)
        edges = self.least_evaluations(num_steps)
        return admissible_strides(self.stride_set(num_steps), num_steps, edges)[-1]

    @property
    def policy(self) -> StridePolicy:
        """What chooses the strides."""
        return parse_stride_policy(self.stride_policy, target="truncation_error", plans=False)

    def stride_set(self, num_steps: int) -> tuple[int, ...]:
        """Strides to choose from, which `Problem.stride_costs` must be of."""
        return tuple(range(1, num_steps + 1)) if self.strides is None else self.strides

    def search(self, problem: Problem) -> Asks:
        """Draw, finish, score; waves of samples until ``n`` or the budget is reached."""
        edges = self.least_evaluations(problem.num_steps)
        strides = self.stride_set(problem.num_steps)
        check_costs(problem.stride_costs, self.policy, strides)
        account = problem.account
        sample = account.price(evaluations=edges, rewards=1)
        drawn = 0
        while self.n is None or drawn < self.n:
            wanted = self.wave_size if self.n is None else min(self.wave_size, self.n - drawn)
            count = account.affordable(sample, wanted)
            if count == 0:
                return "budget"
            nodes = yield from draw(problem, count)
            if self.evaluations is None:
                cut = constant_strides(problem.num_steps, self.stride)
                yield from finish(problem, nodes, strides=cut)
            else:
                yield from finish_by_policy(
                    problem,
                    nodes,
                    policy=self.policy,
                    strides=strides,
                    edges=edges,
                    costs=problem.stride_costs if self.policy.needs_costs else None,
                    error_tolerance=self.error_tolerance,
                )
            drawn += count
        return "exhausted"

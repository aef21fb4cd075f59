"""What is compared: schedulers, each by a benchmark of its own, at the same budgets of NFE."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from mctd_diffusers.denoising.scheduler_names import NamedScheduler
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.pipeline_suite import settings_of
from mctd_diffusers.evaluation.benchmark.plan import (
    MORE_STEPS,
    PLAIN,
    BenchBudget,
    BenchPlan,
    Method,
    folder_name,
)
from mctd_diffusers.search.environment import Action
from mctd_diffusers.search.strategies import BestOfN
from mctd_diffusers.search.stride_policies import HasStridePolicy
from mctd_diffusers.search.strides import HasLongestStride

BRANCH_ETA: Final = 1.0
"""Share of fresh noise on the edges on which searches branch, as all of them have it."""


class Arm(NamedTuple):
    """A way to spend a budget, whatever the scheduler.

    Attributes:
        strategy: label of the search, without its stride policy; ``"plain"`` for one sample of as
            many steps as the budget has NFE.
        policy: stride policy; empty where strides are no choice.
    """

    strategy: str
    policy: str

    @property
    def label(self) -> str:
        """As tables name it."""
        return f"{self.strategy}, {self.policy}" if self.policy else self.strategy


class Condition(NamedTuple):
    """One cell of the design.

    Attributes:
        scheduler: name.
        arm: how the budget is spent.
        budget: label of the budget.
    """

    scheduler: str
    arm: Arm
    budget: str


class Noise(NamedTuple):
    """Where the noise of edges comes from: ``"none"``, ``"own"`` or ``"injected"``.

    Attributes:
        plain: on the edges of a plain sample, and wherever a search steps as the user would.
        branching: on the edges on which a search branches.
    """

    plain: str
    branching: str


def arm_of(method: Method) -> Arm:
    """The arm of a method of a benchmark."""
    if method.label in (PLAIN, MORE_STEPS):
        return Arm(PLAIN, "")
    strategy: Any = method.strategy
    if not isinstance(strategy, HasStridePolicy) or isinstance(strategy, BestOfN):
        return Arm(method.label, "")
    policy = strategy.stride_policy
    return Arm(method.label.removesuffix(f":stride_policy={policy}"), policy)


def stepper_of(named: NamedScheduler, num_steps: int) -> Stepper:
    """A stepper over a schedule of so many steps."""
    scheduler = copy.deepcopy(named.scheduler)
    scheduler.set_timesteps(num_steps)
    return Stepper(scheduler, eta=named.eta or 0.0)


@dataclass(frozen=True)
class Comparison:
    """Schedulers, and what each of them is tried at.

    Attributes:
        schedulers: at least one, each of another name.
        bench: prompts, budgets, seeds and methods; the benchmark of a scheduler of one call a step.
        reference: name of the scheduler that the others are compared with.

    Raises:
        ConfigError: nothing to compare, something named twice, a budget of seconds, or too few
            steps for a solver.
    """

    schedulers: tuple[NamedScheduler, ...]
    bench: BenchPlan
    reference: str

    def __post_init__(self) -> None:
        names = [named.name for named in self.schedulers]
        if not names:
            raise ConfigError("there is no scheduler to compare: name at least one, such as DDIM")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"scheduler {name!r} is named twice, name it once")
        if self.reference not in names:
            raise ConfigError(
                f"the reference {self.reference!r} is not compared; the schedulers are "
                f"{', '.join(names)}"
            )
        check_budgets(self.bench.budgets)

    def named(self, name: str) -> NamedScheduler:
        """The scheduler of a name."""
        return next(each for each in self.schedulers if each.name == name)

    def plan_of(self, named: NamedScheduler) -> BenchPlan:
        """The benchmark of one scheduler.

        Raises:
            ConfigError: the schedule has fewer steps than the solver takes calls a step, or no
                method can be run.
        """
        num_steps = self.bench.num_steps
        stepper = stepper_of(named, num_steps)
        if num_steps < stepper.calls_per_step:
            raise ConfigError(
                f"{named.name} takes {stepper.calls_per_step} network calls a step, and there are "
                f"{num_steps} steps: give at least {stepper.calls_per_step}"
            )
        methods = [m for m in self.bench.methods if self._too_long(m, stepper) is None]
        return replace(
            self.bench,
            methods=tuple(methods),
            searched=f"{self.bench.searched}, scheduler {named.name}",
            calls_per_step=stepper.calls_per_step,
        )

    def _too_long(self, method: Method, stepper: Stepper) -> str | None:
        """Why a scheduler cannot take the strides of a method; ``None`` if it can."""
        longest, strategy = stepper.longest_stride, method.strategy
        if longest is None or not isinstance(strategy, HasLongestStride):
            return None
        stride = strategy.longest_stride(self.bench.num_steps)
        if stride <= longest:
            return None
        return f"it takes strides of up to {stride}, and the longest here is {longest}"

    def left_out(self) -> list[str]:
        """Sentences on what is not run, scheduler by scheduler."""
        sentences = []
        for named in self.schedulers:
            stepper = stepper_of(named, self.bench.num_steps)
            why = [(m.label, self._too_long(m, stepper)) for m in self.bench.methods]
            sentences += [f"{named.name}, {label}: {text}" for label, text in why if text]
            sentences += [f"{named.name}, {text}" for text in self.plan_of(named).left_out()]
        return sentences

    def conditions(self) -> list[Condition]:
        """All cells of the design, in order."""
        found = [
            Condition(named.name, arm_of(method), budget.label)
            for named in self.schedulers
            for budget, method in self.plan_of(named).runs()
        ]
        return list(dict.fromkeys(found))

    def noise_of(self, named: NamedScheduler) -> Noise:
        """Where the noise of a scheduler's edges comes from."""
        stepper = stepper_of(named, self.bench.num_steps)
        return Noise(stepper.randomness(Action(1)), stepper.randomness(Action(1, BRANCH_ETA)))


def cells_folder(output: Path, scheduler: str) -> Path:
    """Where the cells of a scheduler lie in the folder of a comparison."""
    return output / "cells" / folder_name(scheduler)


def pictures_folder(output: Path, scheduler: str) -> Path:
    """Where pictures by a scheduler lie in the folder of a comparison."""
    return output / "pictures" / folder_name(scheduler)


def check_budgets(budgets: Sequence[BenchBudget]) -> None:
    """Refuse budgets of seconds, at which no two schedulers are equal.

    Raises:
        ConfigError: there is one.
    """
    for budget in budgets:
        if budget.unit == "s":
            raise ConfigError(
                f"budget {budget.label}: schedulers are compared at equal NFE; give 4x or 200"
            )


def reference_among(schedulers: Sequence[NamedScheduler], own: Any) -> str:
    """Name of the scheduler that is the model's own; of the first where none is.

    Args:
        schedulers: at least one.
        own: scheduler of the model.
    """
    for named in schedulers:
        is_same = type(named.scheduler) is type(own)
        if is_same and settings_of(named.scheduler) == settings_of(own) and not named.eta:
            return named.name
    return schedulers[0].name

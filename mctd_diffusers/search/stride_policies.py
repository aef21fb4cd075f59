"""Which stride an edge takes: policies by name, and dynamic programming on what jumps cost.

A path of a given number of edges crosses exactly what is left of the schedule, so a long stride
here is a short one elsewhere. Policies that know what jumps cost take the stride with the lowest
sum of its own cost and the lowest cost of the rest (Watson et al., 2021, arXiv 2106.03802; Chen et
al., 2024, arXiv 2405.11326). Costs of the rest are those of the *typical* sample; the jump itself
may be judged by what is predicted of the very sample.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import (
    Final,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    get_args,
    runtime_checkable,
)

import numpy as np
import numpy.typing as npt

from mctd_diffusers.errors import ConfigError, ScheduleError
from mctd_diffusers.search.environment import Gains
from mctd_diffusers.search.strides import PLAN_SHAPES

Target: TypeAlias = Literal[
    "reward_rate", "final_similarity", "resolved_variance", "truncation_error"
]
"""What a jump is judged by; fields of :class:`Gains`."""
Costs: TypeAlias = tuple[tuple[float, ...], ...]
"""``[num_steps][strides]`` additive costs of jumps from each step index, lower is better; infinite
where a jump may not be taken."""
Floats: TypeAlias = npt.NDArray[np.float64]

TARGETS: Final[tuple[Target, ...]] = get_args(Target)
PURE_NOISE: Final = -20.0
"""Log-SNR that predictions know noise without any signal by, with which schedules of flows begin.

Below that of all others: the noisiest of an Euler with zero terminal SNR is at -16.6.
"""
_BLIND: Final = ("uniform", "random", "fixed:k")
_TABLES: Final = ("ays", "gits")
_PREDICTING: Final = ("x0hat", "oracle", "ige")


class StridePolicy(NamedTuple):
    """A policy by its parts.

    Attributes:
        kind: its name without what follows a colon.
        stride: of ``fixed:k``; else 0.
        target: what a predicted jump is judged by; ``None`` where none is predicted.
    """

    kind: str
    stride: int = 0
    target: Target | None = None

    @property
    def is_planned(self) -> bool:
        """Whether strides come with the plan of a rollout."""
        return self.kind in PLAN_SHAPES

    @property
    def needs_costs(self) -> bool:
        """Whether it needs `Problem.stride_costs`."""
        return self.kind in (*_TABLES, *_PREDICTING)

    @property
    def asks_head(self) -> bool:
        """Whether it plans by what a trained head learned of the model."""
        return self.kind in ("gits", "oracle", "ige")


@runtime_checkable
class HasStridePolicy(Protocol):
    """A strategy whose strides are chosen by a policy.

    Attributes:
        stride_policy: setting that names it.
    """

    stride_policy: str

    @property
    def policy(self) -> StridePolicy:
        """What chooses the strides."""
        ...

    def stride_set(self, num_steps: int) -> tuple[int, ...]:
        """Strides to choose from, which `Problem.stride_costs` must be of."""
        ...


class StrideChoice(NamedTuple):
    """A stride, and why it was taken; the columns of a tree of those names.

    Attributes:
        stride: schedule steps to cross.
        reason: a name of ``tree.STRIDE_REASONS``.
        predicted_gain: what the target says of this jump, higher is better; NaN if not predicted.
        predicted_error: predicted truncation error in latent units; NaN if not predicted.
    """

    stride: int
    reason: str
    predicted_gain: float = math.nan
    predicted_error: float = math.nan


@lru_cache(maxsize=64)
def parse_stride_policy(given: str, *, target: Target, plans: bool) -> StridePolicy:
    """The policy of a name.

    >>> parse_stride_policy("fixed:4", target="truncation_error", plans=False)
    StridePolicy(kind='fixed', stride=4, target=None)
    >>> parse_stride_policy("ige", target="resolved_variance", plans=True).target
    'resolved_variance'

    Args:
        given: as a user names it.
        target: of ``"ige"`` and ``"oracle"`` alone.
        plans: whether the search plans rollouts, and so knows the policies that shape a plan.

    Raises:
        ConfigError: no policy has that name; the nearest one is suggested.
    """
    kind, _, detail = given.partition(":")
    if kind == "fixed" and detail.isdecimal() and int(detail):
        return StridePolicy(kind, stride=int(detail))
    if kind == "ige" and detail in TARGETS:
        return StridePolicy(kind, target=detail)
    if given in ("ige", "oracle"):
        return StridePolicy(given, target=target)
    if given == "x0hat":
        return StridePolicy(given, target="truncation_error")
    names = (*(PLAN_SHAPES if plans else ()), *_BLIND, *_TABLES, *_PREDICTING)
    if given in names and given != "fixed:k":
        return StridePolicy(given)
    near = difflib.get_close_matches(
        given.lower(), (*names, *(f"ige:{target}" for target in TARGETS)), 1, 0.5
    )
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"stride_policy is {given!r}; {hint}give one of {', '.join(names)} (k of at least 1), or "
        f"ige:<target> with a target of {', '.join(TARGETS)}."
    )


def check_costs(costs: Costs | None, policy: StridePolicy, strides: Sequence[int]) -> None:
    """Refuse a policy whose costs are not there, or are of other strides.

    Raises:
        ConfigError: names the policy and the cure.
    """
    if not policy.needs_costs:
        return
    if costs is None:
        raise ConfigError(
            f"stride_policy {policy.kind!r} needs what jumps cost the typical sample, and the "
            "problem has no stride_costs; a call makes them from the pipeline's ige: pass ige=..., "
            "or use stride_policy='budget' in mctd and 'uniform' elsewhere."
        )
    if len(costs[0]) != len(strides):
        raise ConfigError(
            f"the problem has stride_costs of {len(costs[0])} strides, and the search takes "
            f"{len(strides)} ({', '.join(map(str, strides))}); give costs of those."
        )


# What crosses a schedule


@lru_cache(maxsize=4096)
def admissible_strides(strides: tuple[int, ...], left: int, edges: int) -> tuple[int, ...]:
    """Strides after which the rest can be crossed by the edges that are left then, ascending.

    >>> admissible_strides((1, 2, 4, 8), 7, 3)
    (1, 2, 4)
    >>> admissible_strides((1, 2, 4, 8), 7, 2)
    ()

    Args:
        strides: to choose from.
        left: schedule steps left.
        edges: that shall cross them, no fewer and no more.

    Returns:
        None where so many edges cannot cross what is left.
    """
    crossable = _crossable(strides, left)
    return tuple(
        stride for stride in sorted(set(strides)) if stride <= left and edges <= left
        and crossable[left - stride, edges - 1]
    )  # fmt: skip


@lru_cache(maxsize=256)
def _crossable(strides: tuple[int, ...], num_steps: int) -> npt.NDArray[np.bool_]:
    """Whether so many steps (rows) can be crossed by so many edges (columns), both from 0."""
    crossable = np.zeros((num_steps + 1, num_steps + 1), dtype=np.bool_)
    crossable[0, 0] = True
    for left in range(1, num_steps + 1):
        for stride in strides:
            if stride <= left:
                crossable[left, 1:] |= crossable[left - stride, :-1]
    return crossable


def check_edges(strides: tuple[int, ...], num_steps: int, edges: int) -> None:
    """Refuse a number of edges that cannot cross a schedule.

    Raises:
        ScheduleError: names the edges, the steps and what works.
    """
    if admissible_strides(strides, num_steps, edges):
        return
    works = [str(n) for n in range(1, num_steps + 1) if _crossable(strides, num_steps)[-1, n]]
    cure = f"take {', '.join(works)} edges, or other strides" if works else "give other strides"
    raise ScheduleError(
        f"{edges} edges of strides {', '.join(map(str, strides))} cannot cross exactly "
        f"{num_steps} steps; {cure}."
    )


# What jumps cost


def gain_costs(gains: Gains, target: Target) -> Floats:
    """Predictions as additive costs, ``[batch, strides]``: lower is better.

    A resolved variance counts by its root, in reward units: choosing the best of several children
    gains in proportion to the deviation of their values.
    """
    if target == "truncation_error":
        return np.exp(gains.log_truncation_error)
    if target == "resolved_variance":
        return -np.exp(gains.log_variance / 2)
    return -(gains.mean_gain if target == "reward_rate" else gains.final_similarity)


def without_last_edge(costs: Costs, strides: Sequence[int]) -> Costs:
    """Costs where the jump that finishes costs nothing, since it selects nothing."""
    num_steps = len(costs)
    return tuple(
        tuple(
            0.0 if step_index + stride == num_steps and cost < math.inf else cost
            for stride, cost in zip(strides, row, strict=True)
        )
        for step_index, row in enumerate(costs)
    )


@lru_cache(maxsize=256)
def cost_to_go(costs: Costs, strides: tuple[int, ...], num_steps: int) -> Floats:
    """Lowest cost of crossing the rest of a schedule, by dynamic programming.

    Args:
        costs: of jumps from each step index, ``[num_steps][strides]``.
        strides: of the columns.
        num_steps: steps of the schedule.

    Returns:
        ``[num_steps + 1, num_steps + 1]``: from each step index with exactly so many edges;
        infinite where they cannot cross it. Read-only.
    """
    to_go = np.full((num_steps + 1, num_steps + 1), np.inf)
    to_go[num_steps, 0] = 0.0
    for step_index in range(num_steps - 1, -1, -1):
        for stride, cost in zip(strides, costs[step_index], strict=True):
            if step_index + stride <= num_steps:
                rest = cost + to_go[step_index + stride, :-1]
                to_go[step_index, 1:] = np.minimum(to_go[step_index, 1:], rest)
    to_go.flags.writeable = False
    return to_go


def choose_stride(
    jump_costs: Sequence[float] | Floats,
    to_go: Floats,
    *,
    strides: Sequence[int],
    admissible: Sequence[int],
    step_index: int,
    edges: int,
) -> int | None:
    """The admissible stride with the lowest cost of the jump and of the rest; the first of equals.

    Args:
        jump_costs: ``[strides]`` of jumps from here.
        to_go: of :func:`cost_to_go`.
        strides: of ``jump_costs``.
        admissible: of :func:`admissible_strides`, or fewer.
        step_index: of the sample.
        edges: left, this one included.

    Returns:
        ``None`` where no admissible stride has a finite cost.
    """
    costs = dict(zip(strides, jump_costs, strict=True))
    totals = [float(costs[k] + to_go[step_index + k, edges - 1]) for k in admissible]
    best = min(range(len(totals)), key=lambda place: totals[place])
    return admissible[best] if totals[best] < math.inf else None


def nearest_stride(admissible: Sequence[int], wanted: float) -> int:
    """The admissible stride nearest a wanted one; the shorter of two.

    With ``wanted = left / edges`` on every edge, a cut is as even as whole strides can be.
    """
    return min(admissible, key=lambda stride: (abs(stride - wanted), stride))


def choose_by_gains(
    gains: Gains,
    to_go: Floats,
    *,
    target: Target,
    strides: Sequence[int],
    step_index: int,
    edges: int,
    error_tolerance: float,
) -> StrideChoice | None:
    """The stride for one sample by what is predicted of it.

    Strides whose predicted truncation error is above ``error_tolerance`` are not taken, but for the
    shortest one.

    Args:
        gains: of the sample, ``[strides]`` each.
        to_go: costs of the rest, in the units of :func:`gain_costs`.
        target: what jumps are judged by.
        strides: of ``gains``; those of :func:`admissible_strides`.
        step_index: of the sample.
        edges: left, this one included.
        error_tolerance: in latent units.

    Returns:
        ``None`` where a jump is not predicted, or none has a finite cost.
    """
    costs = gain_costs(gains, target)
    if np.isnan(costs).any():
        return None
    errors = dict(zip(strides, np.exp(gains.log_truncation_error).tolist(), strict=True))
    best_of = partial(
        choose_stride, costs, to_go, strides=strides, step_index=step_index, edges=edges
    )
    tolerated = [k for k in strides if k == strides[0] or not errors[k] > error_tolerance]
    stride = best_of(admissible=tolerated)
    if stride is None:
        return None
    reason = "gain" if stride == best_of(admissible=strides) else "tolerance"
    return StrideChoice(stride, reason, -float(costs[strides.index(stride)]), errors[stride])

"""The schedule cut into strides, and how many candidates each edge gets for a given budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

from mctd_diffusers.errors import ScheduleError

PlanShape: TypeAlias = Literal["budget", "fine_to_coarse", "constant"]
"""Where the long strides of a planned rollout stand: early, late, or everywhere alike."""
PLAN_SHAPES: Final[tuple[PlanShape, ...]] = get_args(PlanShape)


@runtime_checkable
class HasLongestStride(Protocol):
    """A strategy that says beforehand how far it steps, for solvers that cannot step far."""

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges, in schedule steps."""
        ...


@runtime_checkable
class PerturbsNoise(Protocol):
    """A strategy that says beforehand whose noise it perturbs, for solvers that cannot tell it."""

    def perturbed_share(self, num_steps: int) -> float | None:
        """Share of fresh noise on the edges whose noise it perturbs; ``None`` if it is of none."""
        ...


class Plan(NamedTuple):
    """A rollout to the end of the schedule.

    Attributes:
        strides: schedule steps that each edge crosses.
        candidates: children tried on each edge; the last edge, which finishes, has 1.
    """

    strides: tuple[int, ...]
    candidates: tuple[int, ...]

    @property
    def evaluations(self) -> int:
        """Evaluations: all candidates but the finished."""
        return sum(self.candidates[:-1])


def constant_strides(num_steps: int, stride: int) -> tuple[int, ...]:
    """Strides of equal length, the last one shorter where they do not fit.

    >>> constant_strides(10, 4)
    (4, 4, 2)

    Raises:
        ScheduleError: ``stride`` is below 1, or there is no step left to cross.
    """
    if stride < 1:
        raise ScheduleError(f"stride is {stride!r}; an edge crosses at least 1 step.")
    if num_steps < 1:
        raise ScheduleError(f"{num_steps} steps are left; strides need at least 1.")
    whole, rest = divmod(num_steps, stride)
    return (stride,) * whole + ((rest,) if rest else ())


def coarsest_strides(num_steps: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """Few allowed strides, the long ones last: while there is room for the longest, it is taken.

    >>> coarsest_strides(11, (1, 2, 4))
    (1, 2, 4, 4)

    Raises:
        ScheduleError: there is no step left, or ``allowed`` lacks 1, without which not every
            schedule can be crossed.
    """
    return shrinking_strides(num_steps, allowed, 1.0)[::-1]


def shrinking_strides(num_steps: int, allowed: Sequence[int], share: float) -> tuple[int, ...]:
    """Long strides first: each the longest allowed that crosses at most ``share`` of what is left.

    >>> shrinking_strides(16, (1, 2, 4, 8), 1 / 3)
    (4, 4, 2, 2, 1, 1, 1, 1)

    Raises:
        ScheduleError: there is no step left, or ``allowed`` lacks 1, without which not every
            schedule can be crossed.
    """
    if num_steps < 1:
        raise ScheduleError(f"{num_steps} steps are left; strides need at least 1.")
    if 1 not in allowed or min(allowed) < 1:
        raise ScheduleError(f"strides are {tuple(allowed)}; they must be at least 1 and hold 1.")
    strides = []
    left = num_steps
    while left:
        stride = max((k for k in allowed if k <= share * left), default=1)
        strides.append(stride)
        left -= stride
    return tuple(strides)


@lru_cache(maxsize=1024)
def stride_choices(
    num_steps: int, allowed: tuple[int, ...], shape: PlanShape
) -> tuple[tuple[int, ...], ...]:
    """Ways to cut ``num_steps`` in a shape, from the finest to the coarsest."""
    if shape == "constant":
        cuts = {constant_strides(num_steps, stride) for stride in allowed if stride <= num_steps}
    else:
        shares = {stride / left for stride in allowed for left in range(1, num_steps + 1)}
        cuts = {shrinking_strides(num_steps, allowed, share) for share in shares if share <= 1}
        if shape == "fine_to_coarse":
            cuts = {cut[::-1] for cut in cuts}
    return tuple(sorted(cuts, key=lambda cut: (-len(cut), cut)))


@lru_cache(maxsize=4096)
def expected_maximum(candidates: float) -> float:
    """Mean of the best of so many standard normal draws (Blom, 1958); 0 for one.

    >>> round(expected_maximum(16), 2)
    1.77
    """
    if candidates <= 1:
        return 0.0
    return NormalDist().inv_cdf((candidates - 0.375) / (candidates + 0.25))


@lru_cache(maxsize=16384)
def plan_rollout(
    num_steps: int,
    evaluations: int,
    *,
    allowed: tuple[int, ...],
    shape: PlanShape,
    brake_nats: float,
    edge_gain: float,
    candidates: int | None = None,
    least_edges: int = 1,
    resolved: tuple[float, ...] | None = None,
) -> Plan | None:
    """Cut what is left of the schedule and share out candidates, for the most selection.

    Choosing the best of ``M`` on each of ``S`` edges gains about ``S ** edge_gain *
    expected_maximum(M)``: a half if all edges resolved equally much of the reward, less since early
    ones resolve little. Where it is known what edges resolve, that power gives way to a sum: the
    best of ``M`` children of a sample gains ``expected_maximum(M)`` times the deviation of their
    values, ``sqrt(Var(V_child | x))``, so a rollout gains ``expected_maximum(M)`` times the sum of
    these deviations over the edges that select. Among the cuts of a shape, the one with the highest
    gain is taken; evaluations that do not divide go to the late edges.

    Args:
        num_steps: schedule steps left, at least 1; the node they leave is evaluated already.
        evaluations: that may be spent.
        allowed: strides to choose from.
        shape: where long strides stand.
        brake_nats: bound on the sum of the log of candidates.
        edge_gain: exponent of the number of selections, 0 to 0.5.
        candidates: candidates of each edge where they are given; ``None`` to choose them.
        least_edges: fewest edges of the whole rollout (or all that fit, if there are fewer).
        resolved: deviations that so many edges (from 0 on) resolve in sum, in reward units; minus
            infinity where so many cannot be taken. ``None`` for the power.

    Returns:
        The plan, of at most so many evaluations; ``None`` if not even single candidates are paid
            for.
    """
    best: tuple[float, Plan] | None = None
    for strides in stride_choices(num_steps, allowed, shape):
        selections = len(strides) - 1
        if resolved is not None and resolved[len(strides)] == -math.inf:
            continue
        if selections + 1 < min(least_edges, num_steps) or selections > evaluations:
            continue
        if selections == 0:
            plan, mean = Plan(strides, (1,)), 1.0
        else:
            mean = min(evaluations / selections, math.exp(min(brake_nats / selections, 20.0)))
            if candidates is not None:
                if candidates > mean:
                    continue
                mean = candidates
            extra = int(mean * selections) - int(mean) * selections
            if int(mean) * selections + extra > evaluations:
                extra = 0
            counts = [int(mean)] * (selections - extra) + [int(mean) + 1] * extra
            while sum(math.log(count) for count in counts) > brake_nats and extra:
                extra -= 1
                counts = [int(mean)] * (selections - extra) + [int(mean) + 1] * extra
            plan = Plan(strides, (*counts, 1))
        deviations = selections**edge_gain if resolved is None else resolved[len(strides)]
        gain = deviations * expected_maximum(mean)
        if best is None or gain > best[0]:
            best = (gain, plan)
    return None if best is None else best[1]


def check_stride_set(strides: Sequence[int]) -> tuple[int, ...]:
    """The strides that an edge may cross, as a tuple.

    Raises:
        ScheduleError: there are none, one stands there twice, or one is below 1.
    """
    if not strides or min(strides) < 1 or len(set(strides)) < len(strides):
        raise ScheduleError(
            f"strides are {tuple(strides)}; give at least one, each at least 1 and once."
        )
    return tuple(strides)


def check_strides(strides: Sequence[int], num_steps: int) -> None:
    """Check that strides cross exactly ``num_steps`` steps.

    Raises:
        ScheduleError: one is below 1, or they cross more or fewer steps.
    """
    if any(stride < 1 for stride in strides) or sum(strides) != num_steps:
        raise ScheduleError(
            f"strides {tuple(strides)} cross {sum(strides)} of {num_steps} steps; they must be at "
            f"least 1 each and cross {num_steps} in all."
        )

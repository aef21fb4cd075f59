"""The schedule cut into strides: lists of schedule steps crossed, edge by edge."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mctd_diffusers.errors import ScheduleError


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


def fine_to_coarse(num_steps: int, num_edges: int) -> tuple[int, ...]:
    """``num_edges`` strides over ``num_steps`` steps: single steps first, coarse ones last.

    The strides grow about geometrically: early single steps keep the choice of the mode fine, and
    late coarse ones are cheap where the denoised estimate is nearly exact.

    >>> fine_to_coarse(32, 10)
    (1, 1, 2, 2, 2, 3, 4, 4, 6, 7)
    >>> fine_to_coarse(5, 5)
    (1, 1, 1, 1, 1)

    Raises:
        ScheduleError: there are fewer steps than edges, or no edge.
    """
    if not 1 <= num_edges <= num_steps:
        raise ScheduleError(
            f"{num_edges} edges do not fit {num_steps} steps; give 1 to {num_steps} edges."
        )
    # Real strides growing geometrically from 1: their growth is found by bisection, then rounded so
    # that every edge crosses a step.
    low, high = 1.0, float(num_steps)
    for _ in range(60):
        growth = (low + high) / 2
        total = sum(growth**edge for edge in range(num_edges))
        low, high = (growth, high) if total < num_steps else (low, growth)
    positions = [0]
    for edge in range(1, num_edges):
        ideal = round(sum(low**i for i in range(edge)))
        positions.append(min(max(ideal, positions[-1] + 1), num_steps - (num_edges - edge)))
    positions.append(num_steps)
    return tuple(sorted(after - before for before, after in pairwise(positions)))


def check_strides(strides: Sequence[int], num_steps: int) -> None:
    """Assert that strides cross exactly ``num_steps`` steps.

    Raises:
        ScheduleError: one is below 1, or they cross more or fewer steps.
    """
    if any(stride < 1 for stride in strides) or sum(strides) != num_steps:
        raise ScheduleError(
            f"strides {tuple(strides)} cross {sum(strides)} of {num_steps} steps; they must be at "
            f"least 1 each and cross {num_steps} in all."
        )

"""How many children a node may have: fixed, or growing with its visits."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class WidenFn(Protocol):
    """Whether a node may get another child."""

    def __call__(self, num_children: int, visit_count: int) -> bool:
        """``num_children`` it has; ``visit_count`` backups through it, and those under way."""
        ...


def may_widen_fixed(num_children: int, visit_count: int, *, most: int) -> bool:
    """Up to ``most`` children, whatever the visits."""
    del visit_count
    return num_children < most


def may_widen_progressively(
    num_children: int, visit_count: int, *, constant: float, exponent: float
) -> bool:
    """Progressive widening (Couetoux et al., 2011): below ``constant * visits ** exponent``.

    >>> may_widen_progressively(2, 1, constant=2, exponent=0.5)
    False
    >>> may_widen_progressively(2, 2, constant=2, exponent=0.5)
    True
    """
    return num_children < constant * visit_count**exponent

"""Widening: how many children a node may have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.search.widening import may_widen_fixed, may_widen_progressively


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0.1, 5), st.floats(0, 1))
def test_more_visits_never_forbid_a_child(
    children: int, visits: int, constant: float, exponent: float
) -> None:
    law = {"constant": constant, "exponent": exponent}
    if may_widen_progressively(children, visits, **law):
        assert may_widen_progressively(children, visits + 1, **law)
        assert children == 0 or may_widen_progressively(children - 1, visits, **law)


def test_children_grow_with_the_root_of_the_visits() -> None:
    most = [
        next(k for k in range(100) if not may_widen_progressively(k, n, constant=2, exponent=0.5))
        for n in (1, 4, 9, 16)
    ]
    assert most == [2, 4, 6, 8]


def test_fixed_widening_ignores_visits() -> None:
    assert may_widen_fixed(3, 0, most=4)
    assert not may_widen_fixed(4, 1000, most=4)

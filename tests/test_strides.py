"""The schedule cut into strides, and rollouts planned for a budget."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.errors import ScheduleError
from mctd_diffusers.search.strides import (
    PlanShape,
    check_strides,
    constant_strides,
    expected_maximum,
    plan_rollout,
    shrinking_strides,
    stride_choices,
)

shapes = st.sampled_from(("budget", "fine_to_coarse", "constant"))
stride_sets = st.sampled_from(((1,), (1, 2), (1, 2, 4, 8), (1, 3)))


@given(st.integers(1, 40), stride_sets, shapes)
def test_every_cut_crosses_the_schedule(
    num_steps: int, allowed: tuple[int, ...], shape: PlanShape
) -> None:
    cuts = stride_choices(num_steps, allowed, shape)
    assert (1,) * num_steps in cuts
    assert [len(cut) for cut in cuts] == sorted((len(cut) for cut in cuts), reverse=True)
    for cut in cuts:
        check_strides(cut, num_steps)
        if shape == "budget":
            assert list(cut) == sorted(cut, reverse=True)
        if shape == "fine_to_coarse":
            assert list(cut) == sorted(cut)


@given(
    st.integers(1, 32),
    st.integers(0, 200),
    stride_sets,
    shapes,
    st.floats(0, 40),
    st.none() | st.integers(1, 6),
    st.integers(1, 12),
)
def test_a_plan_keeps_its_budget_and_its_brake(
    num_steps: int,
    evaluations: int,
    allowed: tuple[int, ...],
    shape: PlanShape,
    brake: float,
    candidates: int | None,
    edges: int,
) -> None:
    plan = plan_rollout(
        num_steps,
        evaluations,
        allowed=allowed,
        shape=shape,
        brake_nats=brake,
        edge_gain=0.4,
        candidates=candidates,
        least_edges=edges,
    )
    if plan is None:
        return
    check_strides(plan.strides, num_steps)
    assert len(plan.strides) == len(plan.candidates) >= min(edges, num_steps)
    assert plan.evaluations <= evaluations
    assert plan.candidates[-1] == 1
    assert min(plan.candidates) >= 1
    assert sum(math.log(count) for count in plan.candidates) <= brake + 1e-9
    if candidates is not None:
        assert set(plan.candidates[:-1]) <= {candidates}


def test_more_budget_buys_finer_strides_and_more_candidates() -> None:
    plans = [
        plan_rollout(
            16,
            evaluations,
            allowed=(1, 2, 4),
            shape="budget",
            brake_nats=30,
            edge_gain=0.4,
        )
        for evaluations in (16, 32, 64, 128)
    ]
    edges = [len(plan.strides) for plan in plans if plan]
    counts = [plan.candidates[0] for plan in plans if plan]
    assert edges == sorted(edges)
    assert edges[0] < edges[-1]
    assert counts[0] < counts[-1]


def test_strides_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ScheduleError, match="stride is 0"):
        constant_strides(4, 0)
    with pytest.raises(ScheduleError, match="0 steps are left"):
        constant_strides(0, 1)
    with pytest.raises(ScheduleError, match="0 steps are left"):
        shrinking_strides(0, (1,), 0.5)
    with pytest.raises(ScheduleError, match=r"strides are \(2, 4\)"):
        shrinking_strides(4, (2, 4), 0.5)
    with pytest.raises(ScheduleError, match=r"\(1, 2\) cross 3 of 4 steps"):
        check_strides((1, 2), 4)


def test_expected_maximum_matches_known_order_statistics() -> None:
    known = {1: 0.0, 2: 0.5642, 4: 1.0294, 16: 1.766, 64: 2.3437}
    for count, mean in known.items():
        assert expected_maximum(count) == pytest.approx(mean, abs=0.03)

"""Budgets: validated, and never exceeded."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.budget import UNLIMITED, Account, Budget
from mctd_diffusers.search.environment import Counts, Prices
from tests.toys import PRICES


@pytest.mark.parametrize("nfe", [0, -1, True])
def test_an_nfe_budget_is_a_whole_number_above_zero(nfe: Any) -> None:
    with pytest.raises(ConfigError, match="nfe budget is"):
        Budget(nfe=nfe)


@pytest.mark.parametrize("cost", [0, -1.0, math.inf, math.nan, True])
def test_a_cost_budget_is_finite_and_above_zero(cost: Any) -> None:
    with pytest.raises(ConfigError, match="cost budget is"):
        Budget(cost=cost)


def test_without_a_bound_everything_is_affordable() -> None:
    account = Account(Budget(), PRICES)
    assert account.evaluations_left == UNLIMITED
    assert account.affords(account.price(evaluations=10**9, values=10**9, rewards=10**9))


@given(
    st.none() | st.integers(1, 200),
    st.none() | st.floats(0.5, 500),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 50),
    st.floats(0, 2),
    st.integers(0, 3),
)
def test_what_is_left_is_affordable_and_one_more_is_not(
    nfe: int | None,
    cost: float | None,
    rows: int,
    calls: int,
    spent: int,
    values: float,
    rewards: int,
) -> None:
    account = Account(Budget(nfe, cost), PRICES, rows, calls)
    account.update(account.price(evaluations=spent, values=spent))
    left = account.evaluations_left_for(values_per_evaluation=1, rewards=rewards)
    if left == UNLIMITED:
        return
    if left:
        assert account.affords(account.price(evaluations=left, values=left, rewards=rewards))
    more = account.price(evaluations=left + 1, values=left + 1, rewards=rewards)
    assert not account.affords(more)
    assert account.evaluations_left == account.evaluations_left_for(
        values_per_evaluation=1, rewards=1
    )
    assert account.evaluations_left_for(values_per_evaluation=values) >= 0


@given(
    st.none() | st.integers(1, 200),
    st.none() | st.floats(0.5, 500),
    st.integers(0, 50),
    st.integers(0, 5),
    st.integers(0, 2),
    st.integers(0, 40),
    st.sampled_from((0, 3, 1000, UNLIMITED)),
)
def test_it_counts_what_is_affordable_besides_something_else(
    nfe: int | None, cost: float | None, spent: int, each: int, rewards: int, kept: int, most: int
) -> None:
    account = Account(Budget(nfe, cost), PRICES)
    account.update(account.price(evaluations=spent, values=spent))
    one, besides = (
        account.price(evaluations=each, rewards=rewards),
        account.price(evaluations=kept, rewards=1),
    )
    count = account.affordable(one, most, besides=besides)
    assert 0 <= count <= most
    if count:
        assert account.affords(one * count + besides)
    if count < most:
        assert not account.affords(one * (count + 1) + besides)


def test_cost_counts_rows_decodes_and_reward_calls() -> None:
    account = Account(Budget(cost=20), Prices(decode=3, preview=0.5, reward_call=0.25), 2)
    price = account.price(evaluations=4, values=3, rewards=1)
    assert price == Counts(nfe=4, rows=8, previews=3, decodes=1, reward_calls=4)
    assert account.prices.cost(price) == pytest.approx(8 + 1.5 + 3 + 1)
    assert account.affords(price)
    account.update(price)
    assert not account.affords(price)
    assert account.evaluations_left == 1  # 6.5 left, less 3.25 for the last reward, at 2.75 each


def test_an_evaluation_is_paid_for_with_the_second_call_of_its_edge() -> None:
    account = Account(Budget(nfe=11), PRICES, rows_per_nfe=2, calls_per_step=2)
    price = account.price(evaluations=4, values=1)
    assert price == Counts(nfe=8, rows=16, previews=1, reward_calls=1)
    assert account.evaluations_left == 5
    account.update(Counts(nfe=7, rows=14))  # the first sample came by no edge
    assert account.evaluations_left == 2
    assert account.affordable(account.price(evaluations=1), 9) == 2
    assert not account.affords(price)

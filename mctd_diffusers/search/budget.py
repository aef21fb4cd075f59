"""What a search may spend, and the account that keeps it from spending more."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import Counts, Prices
from mctd_diffusers.search.settings import check_setting

StopReason: TypeAlias = Literal["budget", "exhausted", "time", "interrupted", "error"]
"""Why a search ended: what is left of the budget pays for nothing more; the strategy had nothing
more to try; the seconds were up; Ctrl-C; an error."""

VALUE_SPENDS: Final = Counts(previews=1, reward_calls=1)
"""What valuing one unfinished sample spends where a preview decoder is at hand."""
REWARD_SPENDS: Final = Counts(decodes=1, reward_calls=1)
"""What scoring one finished sample spends."""

UNLIMITED: Final = sys.maxsize
NOTHING: Final = Counts()
_ROUNDING = 1e-9  # row-equivalents are sums of measured floats


@dataclass(frozen=True)
class Budget:
    """What may be spent on one image.

    Attributes:
        nfe: denoiser evaluations, at least 1; ``None`` for no bound.
        cost: row-equivalents by the price list, above 0; ``None`` for no bound.

    Raises:
        ConfigError: a bound is not a positive, finite number.
    """

    nfe: int | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        if self.nfe is not None:
            check_setting("nfe budget", self.nfe, 1, whole=True)
        if self.cost is not None:
            check_setting("cost budget", self.cost, 0)
            if self.cost in (0, math.inf):
                raise ConfigError(f"cost budget is {self.cost!r}; give row-equivalents above 0.")

    def __str__(self) -> str:
        bounds = [] if self.nfe is None else [f"{self.nfe} NFE"]
        bounds += [] if self.cost is None else [f"{self.cost:g} row-equivalents"]
        return f"a budget of {' and '.join(bounds)}" if bounds else "no budget"


class Account:
    """How much of a budget is spent, and what the rest can pay.

    Strategies count *evaluations* of samples, each of which is paid for in NFE: one, or two where
    the solver takes a second call on the edge that leads to the sample. Only here is one told from
    the other. What is spent is what was metered, which is less where an edge does with one call.

    Args:
        budget: what may be spent.
        prices: the price list by which cost is counted.
        rows_per_nfe: rows of one NFE: 2 with guidance, else 1.
        calls_per_step: NFE of an evaluation, with the edge before it: 1, or 2.
        value_spends: what valuing one unfinished sample spends.
        reward_spends: what scoring one finished sample spends.
    """

    def __init__(
        self,
        budget: Budget,
        prices: Prices,
        rows_per_nfe: int = 1,
        calls_per_step: int = 1,
        value_spends: Counts = VALUE_SPENDS,
        reward_spends: Counts = REWARD_SPENDS,
    ) -> None:
        self.budget = budget
        self.prices = prices
        self.rows_per_nfe = rows_per_nfe
        self.calls_per_step = calls_per_step
        self.value_spends = value_spends
        self.reward_spends = reward_spends
        self.spent = Counts()
        self._value_cost = prices.cost(value_spends)
        self._reward_cost = prices.cost(reward_spends)

    def update(self, spent: Counts) -> None:
        """Set what has been spent so far, as the latest reply says."""
        self.spent = spent

    def price(self, *, evaluations: int = 0, values: int = 0, rewards: int = 0) -> Counts:
        """What so many evaluations, valued unfinished samples and scored finished ones spend."""
        nfe = evaluations * self.calls_per_step
        price = Counts(nfe=nfe, rows=nfe * self.rows_per_nfe)
        if values:
            price += self.value_spends * values
        if rewards:
            price += self.reward_spends * rewards
        return price

    def affords(self, counts: Counts) -> bool:
        """Whether ``counts`` can be spent on top of what is spent."""
        if self.budget.nfe is not None and self.spent.nfe + counts.nfe > self.budget.nfe:
            return False
        if self.budget.cost is None:
            return True
        cost = self.prices.cost(self.spent) + self.prices.cost(counts)
        return cost <= self.budget.cost + _ROUNDING

    def affordable(self, each: Counts, most: int, *, besides: Counts = NOTHING) -> int:
        """How many times ``each``, at most ``most``, can be spent on top of what is spent.

        Args:
            each: what one of them spends.
            most: bound on the answer, where the budget has none.
            besides: what must be left for something else.
        """
        if not self.affords(besides):
            return 0
        count = most
        if self.budget.nfe is not None and each.nfe:
            nfe = self.budget.nfe - self.spent.nfe - besides.nfe
            count = min(count, nfe // each.nfe)
        if self.budget.cost is not None and (price := self.prices.cost(each)):
            cost = self.budget.cost - self.prices.cost(self.spent) - self.prices.cost(besides)
            count = min(count, math.floor(cost / price) + 1)  # rounding may favour one more
        while count > 0 and not self.affords(each * count + besides):
            count -= 1
        return max(count, 0)

    def evaluations_left_for(self, *, values_per_evaluation: float = 1.0, rewards: int = 1) -> int:
        """Evaluations that the tighter bound still pays, together with what comes with them.

        Args:
            values_per_evaluation: valued samples for each, 0 for a strategy that values none.
            rewards: finished samples that must still be scored.

        Returns:
            A whole number, at least 0; ``UNLIMITED`` without any bound.
        """
        left = UNLIMITED
        if self.budget.nfe is not None:
            left = (self.budget.nfe - self.spent.nfe) // self.calls_per_step
        if self.budget.cost is not None:
            cost = self.budget.cost - self.prices.cost(self.spent) - rewards * self._reward_cost
            rows = self.rows_per_nfe * self.calls_per_step
            each = rows + values_per_evaluation * self._value_cost
            left = min(left, math.floor((cost + _ROUNDING) / each))
        return max(left, 0)

    @property
    def evaluations_left(self) -> int:
        """Evaluations left when each is valued and one finished sample is scored."""
        return self.evaluations_left_for()

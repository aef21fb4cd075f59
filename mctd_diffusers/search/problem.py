"""One image to search: all that a strategy knows besides its replies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.bandit import MoveMade
from mctd_diffusers.search.budget import NOTHING, REWARD_SPENDS, VALUE_SPENDS, Account, Budget
from mctd_diffusers.search.environment import Counts, Prices
from mctd_diffusers.search.pruning import Savings
from mctd_diffusers.search.tree import Tree


@dataclass(frozen=True)
class Problem:
    """One image to search: all that a strategy knows besides its replies.

    Attributes:
        index: the environment's number of the image.
        num_steps: steps of the schedule.
        root_seed: seed of the whole search of this image (``seeding.root_seed_of`` its noise).
        budget: what may be spent on it.
        prices: the price list by which cost is counted.
        rows_per_nfe: 2 where guidance doubles the rows, else 1.
        calls_per_step: NFE of an evaluation with the edge before it: 2 where the solver takes two
            network calls a step, else 1.
        longest_stride: the longest that the solver can step; ``None`` for any.
        guidance_scale: the call's scale of guidance, where moves may name another; else ``None``.
        value_spends: what valuing one unfinished sample spends.
        reward_spends: what scoring one finished sample spends.
        fusion_spends: what fusing particles spends for each of them.
        stride_costs: ``[num_steps][strides]`` additive costs of jumps of the typical sample, by the
            strides of the strategy; lower is better, infinite where a jump may not be taken.
            ``None`` where no policy needs them.
        tree: the search tree, empty but for its root.
        account: what is spent and what is left; the runner keeps it up to date.
        moves_made: what a search that chooses among kinds of moves made, in order.
        savings: what pruning has saved.
    """

    index: int
    num_steps: int
    root_seed: int
    budget: Budget
    prices: Prices = field(default_factory=Prices)
    rows_per_nfe: int = 1
    calls_per_step: int = 1
    longest_stride: int | None = None
    guidance_scale: float | None = None
    value_spends: Counts = VALUE_SPENDS
    reward_spends: Counts = REWARD_SPENDS
    fusion_spends: Counts = NOTHING
    stride_costs: tuple[tuple[float, ...], ...] | None = None
    tree: Tree = field(init=False, compare=False, repr=False)
    account: Account = field(init=False, compare=False, repr=False)
    moves_made: list[MoveMade] = field(init=False, compare=False, repr=False)
    savings: Savings = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"num_steps is {self.num_steps}; a schedule has at least 1 step.")
        if self.stride_costs is not None:
            _check_stride_costs(self.stride_costs, self.num_steps)
        account = Account(
            self.budget,
            self.prices,
            self.rows_per_nfe,
            self.calls_per_step,
            self.value_spends,
            self.reward_spends,
        )
        object.__setattr__(self, "tree", Tree(self.root_seed))
        object.__setattr__(self, "account", account)
        object.__setattr__(self, "moves_made", [])
        object.__setattr__(self, "savings", Savings())


def _check_stride_costs(costs: tuple[tuple[float, ...], ...], num_steps: int) -> None:
    """Refuse costs that are not of this schedule, or no numbers to add up."""
    widths = sorted({len(row) for row in costs})
    if len(costs) != num_steps or len(widths) != 1:
        raise ConfigError(
            f"stride_costs have {len(costs)} rows of {widths} strides, and the schedule has "
            f"{num_steps} steps; give a row of all strides for each step."
        )
    if any(math.isnan(cost) or cost == -math.inf for row in costs for cost in row):
        raise ConfigError(
            "stride_costs hold NaN or minus infinity; give numbers, and infinity for jumps that "
            "may not be taken."
        )

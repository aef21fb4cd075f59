"""One image to search: all that a strategy knows besides its replies."""

from __future__ import annotations

from dataclasses import dataclass, field

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.budget import REWARD_SPENDS, VALUE_SPENDS, Account, Budget
from mctd_diffusers.search.environment import Counts, Prices
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
        guidance_scale: the call's scale of guidance, where moves may name another; else ``None``.
        value_spends: what valuing one unfinished sample spends.
        reward_spends: what scoring one finished sample spends.
        tree: the search tree, empty but for its root.
        account: what is spent and what is left; the runner keeps it up to date.
    """

    index: int
    num_steps: int
    root_seed: int
    budget: Budget
    prices: Prices = field(default_factory=Prices)
    rows_per_nfe: int = 1
    guidance_scale: float | None = None
    value_spends: Counts = VALUE_SPENDS
    reward_spends: Counts = REWARD_SPENDS
    tree: Tree = field(init=False, compare=False, repr=False)
    account: Account = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"num_steps is {self.num_steps}; a schedule has at least 1 step.")
        account = Account(
            self.budget, self.prices, self.rows_per_nfe, self.value_spends, self.reward_spends
        )
        object.__setattr__(self, "tree", Tree(self.root_seed))
        object.__setattr__(self, "account", account)

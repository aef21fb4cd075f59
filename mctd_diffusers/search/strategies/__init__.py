"""The search algorithms, one file each, and the table of their names."""

from __future__ import annotations

import difflib
from typing import Final

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.runner import Strategy
from mctd_diffusers.search.strategies.beam import Beam
from mctd_diffusers.search.strategies.best_of_n import BestOfN
from mctd_diffusers.search.strategies.mctd import MCTD

__all__ = ["MCTD", "STRATEGIES", "Beam", "BestOfN", "resolve_strategy"]

STRATEGIES: Final[dict[str, type[Strategy]]] = {
    "best_of_n": BestOfN,
    "beam": Beam,
    "mctd": MCTD,
}
"""Name of a search -> its class, whose defaults are the search of that name."""


def resolve_strategy(search: str | Strategy) -> Strategy:
    """The strategy of a name, or the strategy itself.

    Raises:
        ConfigError: no search has that name, or the object is no strategy.
    """
    if isinstance(search, str):
        if search in STRATEGIES:
            return STRATEGIES[search]()
        near = difflib.get_close_matches(search.lower().replace("-", "_"), STRATEGIES, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"no search is named {search!r}; {hint}the names are {', '.join(sorted(STRATEGIES))}."
        )
    if isinstance(search, type) or not all(
        hasattr(search, part) for part in ("name", "least_nfe", "search")
    ):
        raise ConfigError(
            f"search is {search!r}; give a name ({', '.join(sorted(STRATEGIES))}) or a strategy "
            "object such as BestOfN(n=4)."
        )
    return search

"""The search algorithms, one file each, and the tables of their names and published settings."""

from __future__ import annotations

import difflib
from typing import Final

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.runner import Strategy
from mctd_diffusers.search.strategies.beam import Beam
from mctd_diffusers.search.strategies.best_of_n import BestOfN
from mctd_diffusers.search.strategies.draft_refine import DraftRefine
from mctd_diffusers.search.strategies.dts import DTS
from mctd_diffusers.search.strategies.evolution import Evolution
from mctd_diffusers.search.strategies.mctd import MCTD
from mctd_diffusers.search.strategies.noise_search import NoiseSearch
from mctd_diffusers.search.strategies.rollover import Rollover
from mctd_diffusers.search.strategies.smc import SMC
from mctd_diffusers.search.strategies.textbook_mctd import TextbookMCTD

__all__ = [
    "DTS",
    "MCTD",
    "PRESETS",
    "SMC",
    "STRATEGIES",
    "Beam",
    "BestOfN",
    "DraftRefine",
    "Evolution",
    "NoiseSearch",
    "Rollover",
    "TextbookMCTD",
    "resolve_strategy",
]

STRATEGIES: Final[dict[str, type[Strategy]]] = {
    "best_of_n": BestOfN,
    "beam": Beam,
    "draft_refine": DraftRefine,
    "dts": DTS,
    "evolution": Evolution,
    "mctd": MCTD,
    "textbook_mctd": TextbookMCTD,
    "noise_search": NoiseSearch,
    "rollover": Rollover,
    "smc": SMC,
}
"""Name of a search -> its class, whose defaults are the search of that name."""

PRESETS: Final[dict[str, Strategy]] = {
    "svdd": Beam(),
    "code": Beam(block=5),
    "treeg": Beam(width=2),
    "rbf": Rollover(),
    "verifier-threshold": Rollover(threshold=2.0),
    "dts*": DTS(select="uct"),
    "dts-star": DTS(select="uct"),
    "fk": SMC(),
    "flash-bon": DraftRefine(),
    "mctd-paper": TextbookMCTD(),
    "fast-mctd": TextbookMCTD(wave_size=16, expansion_stride=4),
    "zero-order": NoiseSearch(method="zero_order", strength=0.31, stride=1),
    "eps-greedy": NoiseSearch(method="eps_greedy", strength=0.15, stride=1),
    "evosearch": Evolution(stride=1),
}
"""Published name -> the search with the settings that are that method."""


def resolve_strategy(search: str | Strategy) -> Strategy:
    """The strategy of a name, or the strategy itself.

    Raises:
        ConfigError: no search has that name, or the object is no strategy.
    """
    names = sorted((*STRATEGIES, *PRESETS))
    if isinstance(search, str):
        if search in STRATEGIES:
            return STRATEGIES[search]()
        if search in PRESETS:
            return PRESETS[search]
        near = difflib.get_close_matches(_plain(search), {_plain(name) for name in names}, 1, 0.4)
        hint = "".join(f"did you mean {name!r}? " for name in names if _plain(name) in near)
        raise ConfigError(f"no search is named {search!r}; {hint}the names are {', '.join(names)}.")
    if isinstance(search, type) or not all(
        hasattr(search, part) for part in ("name", "least_evaluations", "search")
    ):
        raise ConfigError(
            f"search is {search!r}; give a name ({', '.join(names)}) or a strategy object such as "
            "BestOfN(n=4)."
        )
    return search


def _plain(name: str) -> str:
    """A name as people misspell it."""
    return name.lower().replace("-", "_").replace(" ", "_")

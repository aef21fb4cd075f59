"""Golden trees: small searches whose whole trees are kept, and how they are grown again.

``scripts/regold`` writes ``tests/golden/*.json`` from here, and nothing else does. A change of
these files is a change of what searches do: look at it as a diff.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from mctd_diffusers.search.runner import Strategy
from mctd_diffusers.search.strategies import (
    DTS,
    MCTD,
    SMC,
    Beam,
    BestOfN,
    DraftRefine,
    Evolution,
    NoiseSearch,
    Rollover,
    TextbookMCTD,
)
from tests.by_hand import columns_of
from tests.toys import guided_environment, search, small_environment

FOLDER: Final = Path(__file__).parent / "golden"
SEARCHES: Final[dict[str, Strategy]] = {
    "best_of_n": BestOfN(wave_size=2),
    "beam": Beam(),
    "draft_refine": DraftRefine(draft_stride=2),
    "dts": DTS(temperature=0.5, widening_constant=1.0, widening_exponent=0.5, wave_size=2),
    "evolution": Evolution(elites=2),
    "mctd": MCTD(),
    "mctd_third_moves": MCTD(
        third_moves=("fuse", "go_back", "resample"), num_particles=3, max_inconsistency=math.inf
    ),
    "textbook_mctd": TextbookMCTD(guidances=(None, None), depth=2, wave_size=2),
    "noise_search": NoiseSearch(candidates=2),
    "rollover": Rollover(),
    "smc": SMC(),
}
"""Name of a golden tree -> its search, with the settings that a user gets by that name."""
GUIDED: Final = {"mctd", "mctd_third_moves"}
"""Searches that do more where guidance can be chosen."""
NUM_STEPS: Final = 4
NFE: Final = {
    "best_of_n": 12,
    "beam": 22,
    "draft_refine": 22,
    "dts": 30,
    "evolution": 24,
    "mctd": 22,
    "mctd_third_moves": 80,
    "textbook_mctd": 24,
    "noise_search": 16,
    "rollover": 22,
    "smc": 22,
}


def path_of(name: str) -> Path:
    """File of a golden tree."""
    return FOLDER / f"{name}.json"


def grow(name: str) -> dict[str, list[Any]]:
    """Columns of the tree of a search, run now."""
    make = guided_environment if name in GUIDED else small_environment
    (result,) = search(SEARCHES[name], make(1, NUM_STEPS), nfe=NFE[name])
    return columns_of(result.tree)


def as_text(columns: dict[str, list[Any]]) -> str:
    """JSON with a line for each column, measured numbers to twelve digits."""
    lines = []
    for name, column in columns.items():
        plain = [float(f"{x:.12g}") if isinstance(x, float) else x for x in column]
        lines.append(f'  "{name}": {json.dumps(plain)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Write all golden trees."""
    for name in SEARCHES:
        path_of(name).write_text(as_text(grow(name)), "utf-8")


if __name__ == "__main__":
    main()

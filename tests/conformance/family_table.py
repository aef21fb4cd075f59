"""The table of `docs/families.md`, written from the checks and from what does not apply.

    python -m tests.conformance.family_table

writes it anew; `scripts/regold` does it too. The text above it is written by hand.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from tests.conformance.checks import ConformanceChecks
from tests.conformance.not_applicable import NOT_APPLICABLE

DOCUMENT = Path(__file__).parents[2] / "docs/families.md"
MARK = "<!-- From here on written by scripts/regold: python -m tests.conformance.family_table -->\n"
SHORT = {
    "StableDiffusionPipeline": "SD",
    "StableDiffusionXLPipeline": "XL",
    "StableDiffusion3Pipeline": "SD 3",
    "FluxPipeline": "Flux",
    "Flux2Pipeline": "Flux 2",
    "Flux2KleinPipeline": "Klein",
    "QwenImagePipeline": "Qwen-Image",
    "ZImagePipeline": "Z-Image",
}
"""Name of the stock class -> head of its column."""


def checks() -> dict[str, bool]:
    """Every check in order, and whether it is made under a search as well."""
    return {
        name: "search" in inspect.signature(check).parameters
        for name, check in vars(ConformanceChecks).items()
        if name.startswith("test_")
    }


def rendered(document: str) -> str:
    """The document with the table that the checks give, and the reasons below it."""
    reasons: list[str] = []
    lines = [row(["check", "calls", *SHORT.values()]), row(["---"] * (2 + len(SHORT)))]
    for name, is_searched_too in checks().items():
        cells = [name.removeprefix("test_").replace("_", " ")]
        cells.append("both" if is_searched_too else "one")
        for family in SHORT:
            reason = NOT_APPLICABLE.get(name, {}).get(family)
            if reason is None:
                cells.append("passed")
                continue
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"n/a ({reasons.index(reason) + 1})")
        lines.append(row(cells))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    text, _ = document.split(MARK)
    return text + MARK + "\n" + "\n".join([*lines, "", "Not applicable:", "", *notes]) + "\n"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text("utf-8")), "utf-8")

"""The tables of `docs/schedulers.md`, written from those of `denoising/schedulers.py`.

    python -m tests.scheduler_table

writes them anew; `scripts/regold` does it too. The text above them is written by hand.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers.schedulers

from mctd_diffusers.denoising.scheduler_traits import SchedulerTraits
from mctd_diffusers.denoising.schedulers import REFUSED, TRAITS
from tests.schedulers import SCHEDULERS, make_of_class

DOCUMENT = Path(__file__).parents[1] / "docs/schedulers.md"
MARK = "<!-- From here on written by scripts/regold: python -m tests.scheduler_table -->\n"
COLUMNS = (
    "class", "calls", "strides", "noise of its own", "a share of noise", "remembers", "predictions",
    "only with", "note",
)  # fmt: skip
PREDICTS = {
    "CMStochasticIterativeScheduler": "consistency",
    "IPNDMScheduler": "`v_prediction`",
    "MiniMaxH3Scheduler": "flow, towards the data",
}


def scheduler_classes() -> dict[str, type]:
    """Every scheduler class of the installed diffusers, by its name."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and value.__module__ == module.name:
                if name.endswith("Scheduler"):
                    found[name] = value
    return found


def rendered(document: str) -> str:
    """A document whose tables are as the code says, and whose text above them is left alone."""
    return document.partition(MARK)[0] + MARK + "\n" + "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield f"## {len(TRAITS)} classes that can be stepped"
    yield ""
    yield from _table(COLUMNS, (_row(name, traits) for name, traits in sorted(TRAITS.items())))
    yield ""
    yield f"## {len(REFUSED)} classes that are refused"
    yield ""
    yield from _table(("class", "why"), ((_short(name), REFUSED[name]) for name in sorted(REFUSED)))


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _row(name: str, traits: SchedulerTraits) -> Sequence[str]:
    scheduler = make_of_class(_short(name))
    remembered = ", ".join(f"`{attribute}`" for attribute in traits.blank(scheduler))
    settings = {key: value for key, value in traits.settings.items() if key != "prediction_type"}
    return (
        _short(name),
        "2" if traits.grid == "two calls" else "1",
        _strides(name, traits),
        _own_noise(name, traits),
        _share(name, traits),
        remembered or "nothing",
        _predictions(name, traits),
        "; ".join(f"`{key}`: {_values(values)}" for key, values in settings.items()),
        traits.note,
    )


def _short(name: str) -> str:
    return name.removesuffix("Scheduler")


def _values(values: Sequence[Any]) -> str:
    return ", ".join(f"`{value!r}`".replace("'", "") for value in values)


def _strides(name: str, traits: SchedulerTraits) -> str:
    scheduler = make_of_class(_short(name))
    if "solver_order" not in scheduler.config:
        return _longest(traits, scheduler)
    by_order = {
        order: _longest(traits, make_of_class(_short(name), solver_order=order))
        for order in traits.settings.get("solver_order", (1, 2, 3))
    }
    if len(set(by_order.values())) == 1:
        return by_order[1]
    return ", ".join(f"{longest} at order {order}" for order, longest in by_order.items())


def _longest(traits: SchedulerTraits, scheduler: Any) -> str:
    longest = traits.longest_stride(scheduler)
    return "any" if longest is None else str(longest)


def _own_noise(name: str, traits: SchedulerTraits) -> str:
    if traits.takes_eta:
        return "with `eta` above 0"
    if traits.draws(make_of_class(_short(name))):
        return "always"
    for kind, settings in SCHEDULERS.values():
        if kind == _short(name) and traits.draws(make_of_class(kind, **settings)):
            return "with " + ", ".join(f"`{key}={value}`" for key, value in settings.items())
    return "never"


def _share(name: str, traits: SchedulerTraits) -> str:
    if traits.takes_eta:
        return "its own `eta`"
    return "split" if traits.split else "as DDIM"


def _predictions(name: str, traits: SchedulerTraits) -> str:
    if "prediction_type" in traits.settings:
        return ", ".join(f"`{value}`" for value in traits.settings["prediction_type"])
    return PREDICTS.get(name, "flow")


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text("utf-8")), "utf-8")

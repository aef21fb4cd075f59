"""``curves.png``: gold against what it cost, by several price lists, and by kind of prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from mctd_diffusers.evaluation.benchmark.cells import Run
from mctd_diffusers.evaluation.benchmark.comparison import (
    CANDIDATE,
    Group,
    Results,
    head,
    over_seeds,
)
from mctd_diffusers.evaluation.benchmark.plan import REFERENCE
from mctd_diffusers.evaluation.benchmark.pricing import cost_at, cost_of
from mctd_diffusers.evaluation.metrics import bootstrap_mean

# Wong's palette for colour-blind readers (Nature Methods 8, 2011), without its black and yellow,
# and a brown: grey is the reference's.
COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A4A1E")
MARKERS: Final = "ovsDP^X<>"
_INK, _QUIET = "#111111", "#8A8A8A"
_REWARD_PRICES: Final = (0.1, 1.0, 10.0)
_BANDS_AT_MOST: Final = 6  # methods of which each has a band; of more, the three that matter


class _Look(NamedTuple):
    colour: str
    marker: str
    line: str
    width: float
    order: int


def curves_figure(results: Results) -> Figure:
    """Draw every method's curve from the plain sample upwards.

    Bands are 95 % intervals over prompts, each prompt's own level (its mean over all methods and
    budgets) taken off, since methods are compared on the same prompts (Cousineau, 2005).
    """
    kinds = list(dict.fromkeys(run.kind for run in results.plain.runs.values()))
    kinds = kinds if len(kinds) > 1 else []
    rows = 2 + -(-len(kinds) // 3)
    figure = Figure(figsize=(15, 4.4 * rows), layout="constrained", dpi=110)
    axes: list[Axes] = list(figure.subplots(rows, 3, squeeze=False).flat)
    for ax in axes:
        ax.set_visible(False)
    levels = _levels(results)
    panels: list[tuple[str, str, Callable[[Run], float], str | None]] = [
        ("at equal NFE", "NFE an image", _nfe, None),
        ("at equal cost, priced as at SD 1.5", "cost an image, rows", cost_of, None),
        *(
            (f"where a score costs {price:g} NFE", "cost an image, NFE", cost_at(price), None)
            for price in _REWARD_PRICES
        ),
        *((f"of {kind.replace('_', ' ')}", "NFE an image", _nfe, kind) for kind in kinds),
    ]
    # The first row keeps its third place for the legend.
    places = [axes[0], axes[1], *axes[3:]]
    for ax, (title, label, price, kind) in zip(places, panels, strict=False):
        ax.set_visible(True)
        _draw(ax, results, price, levels, kind)
        ax.set_title(f"Gold {title}", loc="left", fontsize=11)
        ax.set_xlabel(label)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 1 if len(labels) <= 14 else 2
    axes[2].set_visible(True)
    axes[2].axis("off")
    axes[2].legend(handles, labels, loc="center left", frameon=False, ncols=columns, fontsize=9)
    return figure


def _nfe(run: Run) -> float:
    return run.nfe


def _levels(results: Results) -> dict[str, float]:
    """Each prompt's mean gold over all groups that have it."""
    found: dict[str, list[float]] = {}
    for group in results.groups.values():
        for (prompt, _), run in group.runs.items():
            found.setdefault(prompt, []).append(run.gold)
    return {prompt: float(np.mean(gold)) for prompt, gold in found.items()}


def _draw(
    ax: Axes,
    results: Results,
    price: Callable[[Run], float],
    levels: dict[str, float],
    kind: str | None,
) -> None:
    """One panel: gold of every method against a price."""
    banded = _banded(results)
    for number, method in enumerate(results.methods):
        curve = [group for group in results.curve(method) if _gold(group, kind)]
        if len(curve) < 2:
            continue
        look = _look(method, number)
        sizes = [_mean_price(group, price, kind) for group in curve]
        means = [float(over_seeds(_gold(group, kind)).mean()) for group in curve]
        ax.plot(
            sizes,
            means,
            look.line,
            color=look.colour,
            marker=look.marker,
            linewidth=look.width,
            markersize=4,
            label=results.name(method),
            zorder=look.order,
        )
        if method in banded:
            halves = np.array([_band(group, levels, kind) for group in curve])
            low, high = np.array(means)[:, None].T + halves.T
            ax.fill_between(sizes, low, high, color=look.colour, alpha=0.13, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _banded(results: Results) -> Sequence[str]:
    """Methods that are drawn with bands."""
    if len(results.methods) <= _BANDS_AT_MOST:
        return results.methods
    best = results.best_rival(results.budgets[-1])
    return [CANDIDATE, REFERENCE, *([] if best is None else [best.method])]


def _gold(group: Group, kind: str | None) -> dict[tuple[str, int], float]:
    """Gold of the runs of a kind, or of all."""
    return group.values(lambda run: run.gold if kind in (None, run.kind) else None)


def _mean_price(group: Group, price: Callable[[Run], float], kind: str | None) -> float:
    prices = group.values(lambda run: price(run) if kind in (None, run.kind) else None)
    return float(np.mean(list(prices.values())))


def _band(group: Group, levels: dict[str, float], kind: str | None) -> Float[np.ndarray, " two"]:
    """Ends of the interval below and above the mean."""
    gold = {key: value - levels[key[0]] for key, value in _gold(group, kind).items()}
    found = bootstrap_mean(over_seeds(gold))
    return np.array([found.low - found.mean, found.high - found.mean])


def _look(method: str, number: int) -> _Look:
    """Colour, marker and line of a method; the candidate and the reference stand out."""
    if method == CANDIDATE:
        return _Look(_INK, "o", "-", 2.4, 10)
    if method == REFERENCE:
        return _Look(_QUIET, "s", "--", 1.8, 9)
    line = ":" if head(method) == CANDIDATE else "-"
    colour = COLOURS[number % len(COLOURS)]
    return _Look(colour, MARKERS[number // len(COLOURS) % len(MARKERS)], line, 1.2, 5)

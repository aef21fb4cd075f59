"""``gold.png``: what schedulers do to gold; ``branching.png``: how siblings come apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from mctd_diffusers.evaluation.benchmark.comparison import over_seeds
from mctd_diffusers.evaluation.benchmark.curves import COLOURS, MARKERS
from mctd_diffusers.evaluation.metrics import Interval
from mctd_diffusers.evaluation.scheduler_effects.branching import Branching, telling_of
from mctd_diffusers.evaluation.scheduler_effects.comparison import Arm, Condition
from mctd_diffusers.evaluation.scheduler_effects.effects import SchedulerResults

_INK: Final = "#111111"
_WIDTH: Final = 4.6  # inches of a panel


def gold_figure(results: SchedulerResults) -> Figure:
    """Draw gold against measured NFE for each arm, and below it the differences with intervals."""
    arms = results.arms
    rows = 0.34 * len(results.schedulers) * max(len(results.budgets(arm)) for arm in arms)
    figure = Figure(
        figsize=(_WIDTH * len(arms) + 1.5, 4.2 + max(2.0, rows)), layout="constrained", dpi=110
    )
    panels = figure.subplots(2, len(arms), squeeze=False, height_ratios=[4.2, max(2.0, rows)])
    for panel in panels[0, 1:]:
        panel.sharey(panels[0, 0])
    for column, arm in enumerate(arms):
        _draw_curves(panels[0, column], results, arm)
        _draw_differences(panels[1, column], results, arm)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=7, frameon=False, fontsize=9)
    panels[0, 0].set_ylabel("gold")
    return figure


def _look(results: SchedulerResults, scheduler: str) -> dict[str, Any]:
    """Colour and marker of a scheduler; the reference stands out."""
    return _look_of(results.schedulers.index(scheduler), scheduler == results.reference)


def _look_of(number: int, is_reference: bool = False) -> dict[str, Any]:
    if is_reference:
        return {"color": _INK, "marker": "o", "linewidth": 2.2}
    colour = COLOURS[number % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "linewidth": 1.3}


def _draw_curves(ax: Axes, results: SchedulerResults, arm: Arm) -> None:
    """Gold of every scheduler against what it really spent."""
    for scheduler in results.schedulers:
        found = [results.at(scheduler, arm, budget) for budget in results.budgets(arm)]
        groups = [group for group in found if group is not None]
        ax.plot(
            [group.nfe for group in groups],
            [float(over_seeds(group.gold).mean()) for group in groups],
            label=scheduler,
            markersize=4,
            **_look(results, scheduler),
        )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_title(arm.label, loc="left", fontsize=11)
    ax.set_xlabel("NFE an image, measured")
    _tidy(ax)


def _draw_differences(ax: Axes, results: SchedulerResults, arm: Arm) -> None:
    """Gold above the reference, budget by budget, with intervals."""
    labels: list[str] = []
    for budget in results.budgets(arm):
        for scheduler in results.schedulers:
            condition = Condition(scheduler, arm, budget)
            if condition not in results.groups or scheduler == results.reference:
                continue
            found = results.above_reference(condition)
            if found is not None:
                _draw_bar(ax, len(labels), found, _look(results, scheduler))
            labels.append(f"{budget} {scheduler}")
    ax.axvline(0, color=_INK, linewidth=0.8)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    ax.set_xlabel(f"gold above {results.reference}, paired")
    _tidy(ax)


def _draw_bar(ax: Axes, place: int, found: Interval, look: dict[str, Any]) -> None:
    halves = [[found.mean - found.low], [found.high - found.mean]]
    ax.errorbar(
        [found.mean], [place], xerr=halves, fmt=look["marker"], color=look["color"], markersize=4
    )


def branching_figure(branching: Sequence[Branching], reference: str) -> Figure:
    """Draw spreads of siblings and the correlation of values with rewards over the schedule."""
    figure = Figure(figsize=(3 * _WIDTH, 4.4), layout="constrained", dpi=110)
    panels = list(figure.subplots(1, 3))
    schedulers = list(dict.fromkeys(row.scheduler for row in branching))
    for number, scheduler in enumerate(schedulers):
        telling = telling_of(branching, scheduler)
        steps = len(telling.correlation)
        columns: Sequence[Sequence[Interval | None]] = tuple(telling)
        for ax, column in zip(panels, columns, strict=True):
            known = [(place, each) for place, each in enumerate(column) if each is not None]
            shares = np.array([place for place, _ in known]) / steps
            look = _look_of(number, scheduler == reference)
            ax.plot(shares, [each.mean for _, each in known], label=scheduler, markersize=3, **look)
            low, high = ([each[end] for _, each in known] for end in (1, 2))
            ax.fill_between(shares, low, high, color=look["color"], alpha=0.1, linewidth=0)
    titles = (
        "siblings: spread of values, reward units",
        "siblings: spread of estimates, latent units",
        "correlation of the value with the final reward",
    )
    for ax, title in zip(panels, titles, strict=True):
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel("share of the schedule that is behind")
        _tidy(ax)
    panels[1].set_yscale("log")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _tidy(ax: Axes) -> None:
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)

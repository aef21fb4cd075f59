"""What the search should show, and whether the cells show it: one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from mctd_diffusers.evaluation.benchmark.comparison import (
    CANDIDATE,
    CONFIDENCE,
    Contest,
    Results,
    against,
    against_best_rival,
    against_best_rival_at_cost,
    cost_to_match,
    gold_per_proxy,
    head,
    nfe_to_match,
)
from mctd_diffusers.evaluation.benchmark.plan import PLAIN, REFERENCE

MUST_BEAT: Final = (REFERENCE, "smc", "fk", "dts*", "dts-star")
"""Rivals that the candidate claims to be above at three budgets, whatever their settings."""
BUDGETS_ABOVE: Final = 3
NFE_SHARE: Final = 1 / 8
NFE_AIM: Final = 1 / 16
COST_AIM: Final = 0.7
GOLD_PER_PROXY: Final = 0.8
CPU_RATIO: Final = 1.05
WALL_RATIO: Final = 1.1
LEAST_Z: Final = -3.0


class Claim(NamedTuple):
    """Something that the search should show.

    Attributes:
        holds: ``None`` where the cells do not say.
        sentence: what was found, in one sentence.
    """

    holds: bool | None
    sentence: str


def claims(results: Results) -> list[Claim]:
    """What the candidate should show, each with what was found."""
    made = [
        _not_beaten(results, against_best_rival(results), "equal NFE"),
        _not_beaten(results, against_best_rival_at_cost(results), "equal cost"),
        *(_above(results, rival) for rival in results.rivals if head(rival) in MUST_BEAT),
        _matches(results),
        _cheaper(results),
        _transfers(results),
        _typical(results),
        _thrifty(results, "CPU time without decodes and rewards", CPU_RATIO, "cpu_per_nfe"),
        _thrifty(results, "wall-clock time", WALL_RATIO, "wall_per_nfe"),
    ]
    return [claim for claim in made if claim is not None]


def _not_beaten(results: Results, found: Sequence[Contest], where: str) -> Claim | None:
    """Not inferior to the best rival at every budget, and above it at one at least."""
    if CANDIDATE not in results.methods or not results.rivals:
        return None
    budgets = [budget for budget in results.budgets if results.at(CANDIDATE, budget)]
    missing = [budget for budget in budgets if budget not in {contest.budget for contest in found}]
    left = f"; {', '.join(missing)} cannot be compared, no rival being there" if missing else ""
    if not found:
        return Claim(None, f"At {where}, {CANDIDATE} meets no rival at any budget.")
    below = [c for c in found if c.p_margin > 1 - CONFIDENCE]
    above = [c for c in found if c.p_above <= (1 - CONFIDENCE) / 2]
    within = "every budget" + " that can be compared" * bool(missing)
    if below:
        within = ", ".join(c.budget for c in found if c not in below) or "no budget"
        within += f" (not at {_named(results, below, 'p_margin')})"
    return Claim(
        bool(above) and not below,
        f"At {where}, with a margin of {results.margin:.4f} ({_scale(results)}), {CANDIDATE} is "
        f"shown to be non-inferior to the best rival at {within}, and significantly above it at "
        f"{_named(results, above, 'p_above') or 'no budget'}{left}.",
    )


def _named(results: Results, found: Sequence[Contest], p_value: str) -> str:
    return ", ".join(
        f"{c.budget} ({results.name(c.rival)}, p = {getattr(c, p_value):.2g})" for c in found
    )


def _scale(results: Results) -> str:
    """What the margin is a tenth of."""
    largest = results.largest_reference
    if largest is None:
        return f"there is no {REFERENCE} to take a tenth of the gain of"
    return f"a tenth of what {REFERENCE} at {largest.budget} gains over {PLAIN}"


def _above(results: Results, rival: str) -> Claim | None:
    """Significantly above a rival at three budgets."""
    found, name = against(results, rival), results.name(rival)
    if not found:
        return None
    above = [c.budget for c in found if c.p_above <= (1 - CONFIDENCE) / 2]
    holds = len(above) >= BUDGETS_ABOVE
    if not holds and len(found) < BUDGETS_ABOVE:
        return Claim(
            None,
            f"{CANDIDATE} is significantly above {name} at {_listed(above)}; {len(found)} budgets "
            f"are measured where {BUDGETS_ABOVE} are asked for.",
        )
    return Claim(
        holds,
        f"{CANDIDATE} is significantly above {name} at {_listed(above)} of {len(found)} budgets "
        f"({BUDGETS_ABOVE} are asked for).",
    )


def _listed(budgets: Sequence[str]) -> str:
    return ", ".join(budgets) if budgets else "none"


def _matches(results: Results) -> Claim | None:
    """NFE to match the largest reference."""
    found, largest = nfe_to_match(results), results.largest_reference
    if found is None or largest is None:
        return None
    name = f"{REFERENCE} at {largest.budget}"
    asked = f"(at most 1/{1 / NFE_SHARE:.0f} is asked for, 1/{1 / NFE_AIM:.0f} aimed at)"
    if found.nfe is None:
        return Claim(False, f"{CANDIDATE} reaches the gold of {name} at no budget {asked}.")
    low, high = ("never" if end is None else f"{end:.0f}" for end in (found.low, found.high))
    return Claim(
        found.nfe <= NFE_SHARE * found.reference,
        f"{CANDIDATE} reaches the gold of {name} with {found.nfe:.0f} [{low}, {high}] NFE, "
        f"1/{found.reference / found.nfe:.1f} of its {found.reference:.0f} {asked}.",
    )


def _cheaper(results: Results) -> Claim | None:
    """Cost to match the best rival."""
    found = cost_to_match(results)
    if not found:
        return None
    named = ", ".join(
        f"{budget} ({results.name(rival)}) {'never' if share is None else f'{share:.2f}'}"
        for budget, (rival, share) in found.items()
    )
    shares = [share for _, share in found.values()]
    holds = all(share is not None and share <= COST_AIM for share in shares)
    return Claim(
        holds,
        f"{CANDIDATE} reaches the gold of the best rival at this share of its cost: {named} "
        f"({COST_AIM:g} is aimed at).",
    )


def _transfers(results: Results) -> Claim | None:
    """Gold gained per proxy gained, against the reference's; where the two are one, nothing."""
    if results.plain.proxy == results.plain.gold:
        return None
    ratios = {
        budget: ratio
        for budget in results.budgets
        if (ratio := gold_per_proxy(results, CANDIDATE, budget)) is not None
    }
    if not ratios:
        return None
    named = ", ".join(f"{budget} {ratio:.2f}" for budget, ratio in ratios.items())
    return Claim(
        min(ratios.values()) >= GOLD_PER_PROXY,
        f"Gold gained for each unit of proxy gained, as a share of {REFERENCE}'s: {named} (at "
        f"least {GOLD_PER_PROXY:g} is asked for).",
    )


def _typical(results: Results) -> Claim | None:
    """Winners stay among the data."""
    z = {
        budget: float(np.mean(list(values.values())))
        for budget in results.budgets
        if (group := results.at(CANDIDATE, budget)) is not None
        and (values := group.values(lambda run: run.log_likelihood_z))
    }
    if not z:
        return None
    named = ", ".join(f"{budget} {mean:.2f}" for budget, mean in z.items())
    return Claim(
        min(z.values()) > LEAST_Z,
        f"Mean log-likelihood z of {CANDIDATE}'s winners: {named} (above {LEAST_Z:g} is asked "
        "for).",
    )


def _thrifty(results: Results, what: str, bound: float, name: str) -> Claim | None:
    """Time for each NFE against the reference's; mixtures, which have no network, say nothing."""
    if "network" not in results.plain.cells[0].drawn.cpu:
        return None
    ratios = {}
    for budget in results.budgets:
        ours, theirs = results.at(CANDIDATE, budget), results.at(REFERENCE, budget)
        if ours is not None and theirs is not None:
            ratios[budget] = getattr(ours, name) / getattr(theirs, name)
    if not ratios:
        return None
    named = ", ".join(f"{budget} {ratio:.2f}" for budget, ratio in ratios.items())
    return Claim(
        max(ratios.values()) <= bound,
        f"{what[0].upper()}{what[1:]} for each NFE of {CANDIDATE}, as a share of {REFERENCE}'s: "
        f"{named} (at most {bound:g} is asked for).",
    )

"""What pruning has missed: a random share of what it gave up, finished after the fact.

Pruned samples are made again from the moves of the tree, so a search that is over, or saved, can be
asked. Each is finished by single steps, under the guidance of its own edge; it *would have won* if
its reward is above the best of its search. Siblings that were never tried, rollouts that were given
up and samples that memory had no room for all count; what is only ``unused`` does not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final, NamedTuple

import numpy as np
from torch import Tensor

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.making_again import Maker, OnNfe, entry_of
from mctd_diffusers.files import make_folder, write_text
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import MCTDPipelineOutput
from mctd_diffusers.search.environment import Environment
from mctd_diffusers.search.pruning import pruned_ends
from mctd_diffusers.search.runner import SearchResult, Strategy
from mctd_diffusers.search.seeding import root_seed_of

SHARE: Final = 0.05
"""Of what was pruned that is finished."""
CONFIDENCE: Final = 0.95


class PrunedEnd(NamedTuple):
    """A pruned sample that was finished after the fact.

    Attributes:
        node: its row in the tree.
        rule: that pruned it.
        reward: of what became of it.
        gain: its reward above the best of the search; it would have won where that is above 0.
    """

    node: int
    rule: str
    reward: float
    gain: float


class Rate(NamedTuple):
    """A share of trials, with the 95 % score interval of Wilson (1927).

    Attributes:
        share: 0 to 1; NaN without trials.
        low: lower end.
        high: upper end.
    """

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class PruningRegret:
    """What a share of all that was pruned would have come to.

    Attributes:
        pruned: samples that rules gave up, in all searches.
        ends: those that were finished.
        nfe: evaluations that this took.
    """

    pruned: int
    ends: tuple[PrunedEnd, ...]
    nfe: int

    @property
    def rules(self) -> list[str]:
        """Rules that pruned any of them."""
        return sorted({end.rule for end in self.ends})

    def won(self, rule: str | None = None) -> Rate:
        """How often what was pruned (by one rule) would have won its search."""
        gains = [end.gain for end in self.ends if rule in (None, end.rule)]
        return rate(sum(gain > 0 for gain in gains), len(gains))


def rate(hits: int, trials: int) -> Rate:
    """The share of hits, with its score interval.

    >>> [round(end, 3) for end in rate(0, 20)]
    [0.0, 0.0, 0.161]
    """
    if not trials:
        return Rate(math.nan, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = hits / trials
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    half /= 1 + z**2 / trials
    return Rate(share, max(middle - half, 0.0), min(middle + half, 1.0))


def finish_pruned(
    environment: Environment,
    problem: int,
    result: SearchResult,
    *,
    share: float = SHARE,
    on_nfe: OnNfe | None = None,
) -> list[PrunedEnd]:
    """Finish a random share of what the search of one image pruned; at least one, if there is any.

    Args:
        environment: of the same model, schedule and reward as the search's; not its own.
        problem: its number of the image.
        result: of the search, with a finished sample.
        share: of the pruned samples, above 0 to 1.
        on_nfe: is told of evaluations.

    Raises:
        ConfigError: ``share`` is out of its range, or the search finished no sample.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share is {share!r}: give a number above 0, at most 1")
    if result.best is None:
        raise ConfigError(
            f"the search of image {result.problem} finished no sample to compare with"
        )
    tree = result.tree
    ends = pruned_ends(tree)
    if not len(ends):
        return []
    seed = root_seed_of(b"pruning report|%d" % tree.root_seed)
    generator = np.random.Generator(np.random.Philox(seed))
    chosen = np.sort(generator.choice(ends, math.ceil(share * len(ends)), replace=False))
    maker = Maker(environment, problem, tree, on_nfe)
    made = maker.make_again(chosen.tolist())
    finished = maker.finish(
        np.array([made[node] for node in chosen.tolist()], dtype=np.int64),
        tree.step_index[chosen],
        tree.seed[chosen],
        stride=1,
        eta=None,
        guidances=[entry_of(guidance) for guidance in tree.guidance[chosen]],
    )
    return [
        PrunedEnd(node, tree.pruned_by(node) or "", reward, reward - result.best.reward)
        for node, reward in zip(chosen.tolist(), environment.reward(finished).tolist(), strict=True)
    ]


def pruning_regret(
    pipe: MCTDPipeline,
    output: MCTDPipelineOutput,
    *,
    share: float = SHARE,
    reward_model: Any = None,
    latents: Tensor | None = None,
    **arguments: Any,
) -> PruningRegret:
    """Say how often what the searches of a call pruned would have won.

    Args:
        pipe: that was called.
        output: of the call; it stays as it is, its ledger too.
        share: of the pruned samples that are finished, above 0 to 1.
        reward_model: that was searched, by default the pipeline's own.
        latents: the first noise of all images, where the call was given it.
        arguments: what the call was given that no recipe can hold.

    Raises:
        ConfigError: no search finished a sample, or the pipeline is not the one of the call.
    """
    found: list[tuple[SearchResult, list[PrunedEnd]]] = []
    spent: list[int] = []
    for search in output.search or []:
        result = search.result
        if result.best is None:
            continue
        image = result.problem
        own = None if latents is None else latents[image : image + 1]
        recipe = search.recipe_of(result.best.node)
        world = pipe.world_of(recipe, own, reward_model=reward_model, **arguments)
        ends = finish_pruned(world.environment, 0, result, share=share, on_nfe=spent.append)
        found.append((result, ends))
    pipe.maybe_free_model_hooks()
    return _regret_of(found, sum(spent))


def pruning_regret_saved(
    pipe: MCTDPipeline,
    folder: str | os.PathLike[str],
    *,
    share: float = SHARE,
    reward_model: Any = None,
    search: Strategy | None = None,
    limit: int | None = None,
    **arguments: Any,
) -> PruningRegret:
    """Say the same of the searches that a call saved, as far as they have come.

    Args:
        pipe: as the one that was called.
        folder: that the call saved to; it stays as it is.
        share: of the pruned samples that are finished, above 0 to 1.
        reward_model: that was searched.
        search: needed where it was a strategy of your own: the same, with its settings.
        limit: look at the first so many images.
        arguments: what the call was given that no folder can hold.

    Raises:
        ConfigError: as :func:`pruning_regret`.
    """
    opened = pipe.open_search(folder, search=search, reward_model=reward_model, **arguments)
    world = opened.call.world
    results = [result for result in opened.saved.results()[: len(world.prompts)] if result.best]
    spent: list[int] = []
    found = [
        (
            result,
            finish_pruned(
                world.environment, result.problem, result, share=share, on_nfe=spent.append
            ),
        )
        for result in results[:limit]
    ]
    pipe.maybe_free_model_hooks()
    return _regret_of(found, sum(spent))


def _regret_of(found: Sequence[tuple[SearchResult, list[PrunedEnd]]], nfe: int) -> PruningRegret:
    if not found:
        raise ConfigError(
            "there is no search that finished a sample: ask of a call with search=..., and a "
            "budget that pays for one"
        )
    return PruningRegret(
        sum(len(pruned_ends(result.tree)) for result, _ in found),
        tuple(end for _, ends in found for end in ends),
        nfe,
    )


def merged(regrets: Sequence[PruningRegret]) -> PruningRegret:
    """Several reports as one."""
    return PruningRegret(
        sum(regret.pruned for regret in regrets),
        tuple(end for regret in regrets for end in regret.ends),
        sum(regret.nfe for regret in regrets),
    )


def pruning_text(regret: PruningRegret) -> str:
    """The report as a table in words."""
    lines = [
        f"{len(regret.ends)} of {regret.pruned} pruned samples were finished, by {regret.nfe} NFE.",
        "",
        "| pruned by | finished | would have won | 95 % interval | mean reward above the winner |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for rule in (None, *regret.rules):
        gains = [end.gain for end in regret.ends if rule in (None, end.rule)]
        if gains:
            share, low, high = regret.won(rule)
            lines.append(
                f"| {rule or 'any rule'} | {len(gains)} | {100 * share:.1f} % | "
                f"{100 * low:.1f} to {100 * high:.1f} % | {np.mean(gains):+.3f} |"
            )
    return "\n".join(lines)


def write_pruning_report(folder: Path, regret: PruningRegret) -> list[Path]:
    """Write ``pruning.md`` and ``pruning.json``; returns the files."""
    make_folder(folder)
    text, data = folder / "pruning.md", folder / "pruning.json"
    write_text(text, pruning_text(regret) + "\n")
    ends = [end._asdict() for end in regret.ends]
    write_text(
        data, json.dumps({"pruned": regret.pruned, "nfe": regret.nfe, "ends": ends}, indent=1)
    )
    return [text, data]

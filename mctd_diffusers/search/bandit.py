"""Which kind of move to make next, by what each kind has gained so far for what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from mctd_diffusers.search.selection import min_max, uct_scores

ORDINARY: Final = "simulate"
"""Name of the move that is no third one: a rollout from where selection says."""
INCONSISTENT: Final = -1
"""Verdict on a fused sample whose estimate is not what it was fused to: the list's last."""


class MoveMade(NamedTuple):
    """One move, made as a whole: what it was, what came of it, and what it cost.

    Attributes:
        move: a third move by its name, or :data:`ORDINARY`.
        nodes: rows of the tree that it went on from.
        step_index: where these stand; of several the first; -1 where there are none.
        particles: rows of each group that was to be fused.
        verdicts: of each group: its place in the environment's list of verdicts.
        correlations: mean cosine of two noises in each group, NaN where that is not known.
        ess: effective number of particles in each group.
        cost: row-equivalents that it took, the rollouts after it included.
        gain: by how much the best reward grew, at least 0, in reward units.
    """

    move: str
    nodes: tuple[int, ...] = ()
    step_index: int = -1
    particles: tuple[tuple[int, ...], ...] = ()
    verdicts: tuple[int, ...] = ()
    correlations: tuple[float, ...] = ()
    ess: tuple[float, ...] = ()
    cost: float = 0.0
    gain: float = 0.0


def choose_move(moves: Sequence[str], made: Sequence[MoveMade], *, exploration: float) -> str:
    """The move of the highest upper confidence bound on its gain for its cost (UCB1).

    The gain for the cost of a kind of move is all that it gained over all that it cost, min-max
    normalised among the kinds. Kinds that were never made come first, in their order.

    Args:
        moves: to choose from, each once.
        made: so far.
        exploration: weight of the bonus.
    """
    mine = [[one for one in made if one.move == move] for move in moves]
    counts = np.array([len(some) for some in mine], dtype=np.int64)
    gains = np.array([sum(one.gain for one in some) for some in mine], dtype=np.float64)
    costs = np.array([sum(one.cost for one in some) for some in mine], dtype=np.float64)
    rates = np.divide(gains, costs, out=np.zeros_like(gains), where=costs > 0)
    scores = uct_scores(min_max(rates), counts, np.zeros_like(counts), exploration=exploration)
    return moves[int(np.argmax(scores))]

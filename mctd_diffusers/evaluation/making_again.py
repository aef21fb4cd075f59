"""Samples of a search made again by their moves and seeds, and finished, in another world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mctd_diffusers.search.environment import Action, Environment, Handles
from mctd_diffusers.search.seeding import child_seed
from mctd_diffusers.search.tree import (
    DRAW,
    FUSE,
    PERTURB,
    RENOISE,
    ROOT,
    STEP,
    Tree,
    ancestry,
    makers,
)

OnNfe: TypeAlias = Callable[[int], object]
"""Is told how many evaluations have been made since it was told last."""


class Maker:
    """Makes samples of one tree again.

    Args:
        environment: of the same model, schedule and reward as the search's; not its own.
        problem: its number of the image.
        tree: of the search.
        on_nfe: is told of evaluations.
    """

    def __init__(
        self, environment: Environment, problem: int, tree: Tree, on_nfe: OnNfe | None = None
    ) -> None:
        self._environment = environment
        self._problem = problem
        self._tree = tree
        self._on_nfe = on_nfe
        self._num_steps = environment.num_steps

    def make_again(self, nodes: Sequence[int]) -> dict[int, int]:
        """Samples of rows of the search's tree, made by their moves and seeds; row to handle."""
        tree = self._tree
        needed = evaluated_for(tree, nodes, self._num_steps)
        made: dict[int, int] = {}
        for generation in _generations(tree, ancestry(tree, nodes)):
            for move in (DRAW, STEP, RENOISE, PERTURB, FUSE):
                some = [row for row in generation if tree.move[row] == move]
                if some:
                    made |= zip(some, self._move(move, some, made).tolist(), strict=True)
            if needed & set(generation):
                self._denoise([made[row] for row in generation if row in needed])
        return made

    def _move(self, move: int, rows: list[int], made: dict[int, int]) -> Handles:
        """Make one move to each of ``rows``, whose parents or particles are made."""
        tree, environment = self._tree, self._environment
        seeds = tree.seed[rows]
        if move == DRAW:
            return environment.reset(np.full(len(rows), self._problem), seeds)
        if move == FUSE:
            return self._fuse(rows, made)
        parents = np.array([made[int(tree.parent[row])] for row in rows], dtype=np.int64)
        if move == STEP:
            actions = [
                Action(int(tree.stride[row]), entry_of(tree.eta[row]), entry_of(tree.guidance[row]))
                for row in rows
            ]
            return environment.step(parents, actions, seeds)
        if move == PERTURB:
            return environment.perturb(parents, tree.eta[rows], seeds)
        stands = tree.step_index[rows]
        handles = np.empty(len(rows), dtype=np.int64)
        for step_index in np.unique(stands).tolist():
            here = stands == step_index
            handles[here] = environment.renoise(parents[here], step_index, seeds[here])
        return handles

    def _fuse(self, rows: list[int], made: dict[int, int]) -> Handles:
        """Fuse the particles of each of ``rows`` again."""
        tree = self._tree
        groups = [fusion for row in rows if (fusion := tree.fusion_of(row)) is not None]
        return self._environment.fuse(
            [
                np.array([made[node] for node in group.particles], dtype=np.int64)
                for group in groups
            ],
            [np.array(group.weights) for group in groups],
            [group.method for group in groups],
            tree.seed[rows],
            [entry_of(tree.guidance[row]) for row in rows],
        ).handles

    def finish(
        self,
        handles: Handles,
        step_indices: npt.NDArray[np.int64],
        seeds: npt.NDArray[np.int64],
        *,
        stride: int,
        eta: float | None,
        guidances: Sequence[float | None] | None = None,
    ) -> Handles:
        """Step samples to the end, each with noise of its own; one may stand there often.

        Args:
            handles: ``[batch]`` of unfinished and finished samples.
            step_indices: ``[batch]`` where they stand.
            seeds: ``[batch]`` of what follows.
            stride: schedule steps that an edge crosses; the last edges cross what is left.
            eta: share of fresh noise; the last edges step as the user's scheduler says.
            guidances: ``[batch]`` scales of guidance; ``None`` is the call's own.

        Returns:
            Handles of the finished samples; those that were finished stay.
        """
        given = handles
        handles, stands, seeds = handles.copy(), step_indices.copy(), seeds.copy()
        while (going := np.flatnonzero(stands < self._num_steps)).size:
            parents = handles[going]
            self._denoise(np.unique(parents).tolist())
            strides = np.minimum(stride, self._num_steps - stands[going]).tolist()
            stands[going] += strides
            seeds[going] = [
                child_seed(seed, STEP, crossed, 0)
                for seed, crossed in zip(seeds[going].tolist(), strides, strict=True)
            ]
            is_last = (stands[going] == self._num_steps).tolist()
            actions = [
                Action(crossed, None if last else eta, guidances[i] if guidances else None)
                for i, crossed, last in zip(going.tolist(), strides, is_last, strict=True)
            ]
            handles[going] = self._environment.step(parents, actions, seeds[going])
            self._environment.release(np.setdiff1d(parents, given))
        return handles

    def _denoise(self, handles: Sequence[int]) -> None:
        """Evaluate samples, and tell of it."""
        before = self._environment.ledger.total.nfe
        self._environment.denoise(np.array(handles, dtype=np.int64))
        if self._on_nfe is not None:
            self._on_nfe(self._environment.ledger.total.nfe - before)


def evaluated_for(tree: Tree, nodes: Sequence[int], num_steps: int) -> set[int]:
    """Rows that must be evaluated to make ``nodes`` again by their moves."""
    rows = ancestry(tree, nodes)
    sources = {
        source
        for row in rows
        if tree.move[row] in (STEP, RENOISE, FUSE)
        for source in makers(tree, row)
    }
    return {row for row in sources if tree.step_index[row] < num_steps}


def _generations(tree: Tree, rows: Sequence[int]) -> list[list[int]]:
    """Rows of an :func:`ancestry`, those of each generation made from earlier ones alone."""
    generation_of = {ROOT: -1}
    generations: list[list[int]] = []
    for row in rows:
        generation = 1 + max(generation_of[source] for source in makers(tree, row))
        generation_of[row] = generation
        if generation == len(generations):
            generations.append([])
        generations[generation].append(row)
    return generations


def entry_of(entry: np.float64) -> float | None:
    """What an entry of a column says, where NaN says nothing."""
    return None if np.isnan(entry) else float(entry)

"""What a node is worth, from the rewards backed up through it: mean, max or soft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from mctd_diffusers.search.environment import Values
from mctd_diffusers.search.tree import Tree


@runtime_checkable
class BackupFn(Protocol):
    """Worth of nodes by what was backed up through them."""

    def __call__(self, tree: Tree, nodes: Sequence[int]) -> Values:
        """``[nodes]`` in reward units; NaN where nothing was backed up."""
        ...


def mean_backup(tree: Tree, nodes: Sequence[int]) -> Values:
    """Mean of the rewards backed up through each node."""
    visits = tree.visit_count[nodes]
    return np.where(visits > 0, tree.total_value[nodes] / np.maximum(visits, 1), np.nan)


def max_backup(tree: Tree, nodes: Sequence[int]) -> Values:
    """Best reward backed up through each node (MCTD, Yoon et al., 2025, Algorithm 2)."""
    return np.where(tree.visit_count[nodes] > 0, tree.max_value[nodes], np.nan)


def soft_backup(tree: Tree, nodes: Sequence[int], *, temperature: float) -> Values:
    """Soft value of each node (DTS, Jain et al., 2025, Algorithm 1).

    ``V = lambda log mean_children exp(V_child / lambda)``, every visited child counting once:
    weights by visits would be biased, since selection is adaptive.

    Args:
        tree: the search tree.
        nodes: rows.
        temperature: ``lambda`` in reward units, above 0; towards 0 it is the max, at infinity the
            mean.
    """
    return np.array([_soft_value(tree, node, temperature) for node in nodes])


def _soft_value(tree: Tree, node: int, temperature: float) -> float:
    if tree.visit_count[node] == 0:
        return np.nan
    below = np.array([_soft_value(tree, child, temperature) for child in tree.children(node)])
    below = below[~np.isnan(below)]
    if below.size == 0:  # the reward was backed up from this node itself
        return float(tree.total_value[node] / tree.visit_count[node])
    return float(temperature * (np.logaddexp.reduce(below / temperature) - np.log(below.size)))

"""What a node is worth, from the rewards backed up through it: mean, max or soft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from mctd_diffusers.search.environment import Values
from mctd_diffusers.search.tree import FUSE, NO_PARENT, Tree, path_to_root


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
    """Soft value of each node, see :func:`soft_values`.

    Args:
        tree: the search tree.
        nodes: rows.
        temperature: ``lambda`` in reward units, above 0.
    """
    return soft_values(tree, temperature)[nodes]


def soft_values(tree: Tree, temperature: float) -> Values:
    """Soft values of all nodes (DTS, Jain et al., 2025, Algorithm 1).

    ``V = lambda log mean_children exp(V_child / lambda)``, every visited child counting once:
    weights by visits would be biased, since selection is adaptive. A node with no visited child is
    worth the mean of what was backed up from itself. Fused children are none of the sampler's, so
    they do not count; where there are no others, the mean stands too.

    Args:
        tree: the search tree.
        temperature: ``lambda`` in reward units, above 0; towards 0 it is the max, at infinity the
            mean.

    Returns:
        ``[num_nodes]`` in reward units; NaN where nothing was backed up.
    """
    values = mean_backup(tree, range(tree.num_nodes))
    rows = np.flatnonzero(tree.visit_count > 0)
    order = rows[np.lexsort((tree.parent[rows], tree.depth[rows]))]
    levels = np.split(order, np.flatnonzero(np.diff(tree.depth[order])) + 1)
    for rows in reversed(levels):
        level = rows[tree.move[rows] != FUSE]
        parents = tree.parent[level]
        if not level.size or parents[0] == NO_PARENT:
            continue
        first = np.flatnonzero(np.diff(parents, prepend=NO_PARENT))  # of each group of siblings
        count = np.diff(first, append=len(level))
        top = np.maximum.reduceat(values[level], first)
        with np.errstate(over="ignore"):  # a temperature near 0 leaves the greatest alone
            weights = np.exp((values[level] - np.repeat(top, count)) / temperature)
        mean = np.add.reduceat(weights, first) / count
        values[parents[first]] = top + temperature * np.log(mean)
    return values


class SoftValues:
    """The soft values of a growing tree, kept up to date along the paths of its backups.

    They are those of :func:`soft_values`, at the cost of a path instead of the whole tree.

    Args:
        tree: the search tree.
        temperature: ``lambda`` in reward units, above 0.
    """

    def __init__(self, tree: Tree, temperature: float) -> None:
        self._tree = tree
        self.renew(temperature)

    def renew(self, temperature: float) -> None:
        """Compute all values anew by another temperature; nothing if it is the same."""
        if temperature != getattr(self, "temperature", None):
            self.temperature = temperature
            self._values = soft_values(self._tree, temperature)

    def update(self, leaf: int) -> None:
        """Take in what was backed up from ``leaf``, which has no children."""
        tree = self._tree
        if tree.num_nodes > len(self._values):
            grown = np.full(2 * tree.num_nodes, np.nan)
            grown[: len(self._values)] = self._values
            self._values = grown
        values = self._values
        path = path_to_root(tree, leaf)
        values[leaf] = tree.total_value[leaf] / tree.visit_count[leaf]
        for node in path[1:]:
            children = np.array(tree.children(node))
            children = children[tree.move[children] != FUSE]
            if np.isnan(values[children]).all():
                values[node] = tree.total_value[node] / tree.visit_count[node]
            elif len(children) == 1:
                values[node] = values[children[0]]
            else:
                values[node] = _soft_mean(values[children], self.temperature)

    def of(self, nodes: Sequence[int]) -> Values:
        """``[nodes]`` in reward units; NaN where nothing was backed up."""
        return self._values[list(nodes)]


def _soft_mean(values: Values, temperature: float) -> float:
    """``temperature log mean exp(values / temperature)`` of those that are not NaN."""
    known = values[~np.isnan(values)]
    top = known.max()
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the greatest alone
        mean = np.exp((known - top) / temperature).mean()
    return float(top + temperature * np.log(mean))

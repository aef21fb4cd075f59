"""Samples from a finished tree, at no further evaluation."""

from __future__ import annotations

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.backups import soft_values
from mctd_diffusers.search.selection import boltzmann
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.tree import ROOT, Nodes, Tree


def sample_from_tree(tree: Tree, *, temperature: float, seed: int, count: int = 1) -> Nodes:
    """Draw finished samples from a tree that ``DTS`` has grown (Jain et al., 2025, section 4).

    A draw walks from the root to a finished sample and takes a child with a probability
    proportional to ``exp(soft value / temperature)``. Over the search's own chance, its law tends
    to ``p(x) exp(reward(x) / temperature) / Z`` as the tree grows, ``p`` being the law of the plain
    samples of the same strides. It needs a tree whose siblings are independent draws from the
    sampler, so that of a search that keeps the best of several candidates (``beam``, ``mctd``)
    gives another law.

    Args:
        tree: of a search that has finished a sample.
        temperature: in reward units, above 0: towards 0 a walk ends at the best sample; a soft
            value that is not that of the search is computed anew.
        seed: decides the draws, 0 or more.
        count: draws from this one tree; they share its errors, so draw from many trees where
            independence matters.

    Returns:
        ``[count]`` rows of finished samples.

    Raises:
        ConfigError: an argument outside its range, or a tree in which nothing is finished.
    """
    check_setting("temperature", temperature, np.nextafter(0, 1))
    check_setting("seed", seed, 0, whole=True)
    check_setting("count", count, 1, whole=True)
    if not tree.visit_count[ROOT]:
        raise ConfigError(
            f"no reward was backed up in this tree of {tree.num_nodes} nodes; sample from the tree "
            "of a search that has finished a sample."
        )
    values = soft_values(tree, temperature)
    generator = np.random.Generator(np.random.Philox(seed))
    leaves = np.empty(count, dtype=np.int64)
    for draw in range(count):
        node = ROOT
        while visited := [child for child in tree.children(node) if tree.visit_count[child]]:
            node = visited[boltzmann(values[visited], temperature, generator)]
        leaves[draw] = node
    return leaves

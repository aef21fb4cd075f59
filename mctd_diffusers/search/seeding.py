"""Seeds that belong to edges: a root seed and a path decide an edge's noise, whatever its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

_MASK = (1 << 63) - 1


def root_seed_of(noise: bytes) -> int:
    """Seed of a search, from the bytes of the initial noise that its problem came with.

    >>> root_seed_of(b"noise") == root_seed_of(b"noise") != root_seed_of(b"other noise")
    True
    """
    return int.from_bytes(hashlib.sha256(noise).digest()[:8], "little") & _MASK


def child_seed(parent_seed: int, move: int, stride: int, ordinal: int) -> int:
    """Seed of an edge below a node whose own edge has ``parent_seed``.

    Args:
        parent_seed: 0 to 2**63 - 1; the root seed for an edge that leaves the root.
        move: which kind of edge (``tree.DRAW``, ``STEP``, ``RENOISE``, ``PERTURB``).
        stride: schedule steps crossed; 0 where it crosses none.
        ordinal: how many edges of this move and stride left the parent before.

    Returns:
        The seed, 0 to 2**63 - 1, by SHA-256 of the four numbers.
    """
    text = b"%d|%d|%d|%d" % (parent_seed, move, stride, ordinal)
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") & _MASK


def edge_seed(root_seed: int, path: Iterable[tuple[int, int, int]]) -> int:
    """Seed of the last edge of a path from the root.

    Args:
        root_seed: seed of the search.
        path: ``(move, stride, ordinal)`` of each edge, first the draw of the initial noise.

    Returns:
        The seed, folded by :func:`child_seed`; the root seed itself for an empty path.
    """
    seed = root_seed
    for move, stride, ordinal in path:
        seed = child_seed(seed, move, stride, ordinal)
    return seed

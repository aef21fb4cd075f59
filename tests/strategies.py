"""Vocabulary for hypothesis: trees, siblings, budgets, and strategies with their settings."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mctd_diffusers.search.runner import Strategy
from mctd_diffusers.search.strategies import (
    DTS,
    MCTD,
    SMC,
    Beam,
    BestOfN,
    DraftRefine,
    Evolution,
    NoiseSearch,
    Rollover,
    TextbookMCTD,
)
from mctd_diffusers.search.tree import DRAW, ROOT, STEP, Tree, add_child

root_seeds = st.integers(0, 2**63 - 1)
CHOOSING_POLICIES = (
    "fixed:1",
    "uniform",
    "random",
    "ays",
    "gits",
    "x0hat",
    "oracle",
    "ige",
    "ige:reward_rate",
    "ige:final_similarity",
    "ige:resolved_variance",
    "ige:truncation_error",
)
rewards = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 25) -> Tree:
    """Trees of any shape; handles are 100, 101, ..."""
    tree = Tree(draw(root_seeds))
    for handle in range(100, 100 + draw(st.integers(0, max_nodes))):
        parent = draw(st.integers(0, tree.num_nodes - 1))
        is_draw = parent == ROOT
        add_child(
            tree,
            parent,
            handle=handle,
            step_index=0 if is_draw else int(tree.step_index[parent]) + 1,
            move=DRAW if is_draw else STEP,
            stride=0 if is_draw else 1,
            eta=None if is_draw else 1.0,
            seed=handle,
        )
    return tree


@st.composite
def siblings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, visit counts and visits under way of 1 to 8 siblings."""
    size = draw(st.integers(1, 8))
    values = draw(st.lists(rewards, min_size=size, max_size=size))
    visits = draw(st.lists(st.integers(0, 50), min_size=size, max_size=size))
    under_way = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    return np.array(values), np.array(visits), np.array(under_way)


def built(kind: type[Strategy], **settings: Any) -> Strategy:
    """A strategy, with the state of `random` given back.

    beartype checks one item of a container, which it draws from the `random` that hypothesis
    watches over.
    """
    state = random.getstate()
    try:
        return kind(**settings)
    finally:
        random.setstate(state)


best_of_n = st.builds(
    partial(built, BestOfN),
    n=st.none() | st.integers(1, 5),
    stride=st.integers(1, 4),
    wave_size=st.integers(1, 5),
)
best_of_n_by_policy = st.builds(
    partial(built, BestOfN),
    n=st.none() | st.integers(1, 5),
    wave_size=st.integers(1, 5),
    evaluations=st.integers(1, 5),
    stride_policy=st.sampled_from(CHOOSING_POLICIES),
    error_tolerance=st.sampled_from((0.0, 0.02, float("inf"))),
)
draft_refines = st.builds(
    partial(built, DraftRefine),
    draft_stride=st.none() | st.integers(1, 5),
    refine=st.integers(0, 4),
    refine_share=st.sampled_from((0.0, 0.3, 0.7, 1.0)),
    refine_stride=st.integers(1, 3),
    resume_at=st.sampled_from((0.0, 0.4, 0.8, 1.0)),
    wave_size=st.integers(1, 4),
)
dtss = st.builds(
    partial(built, DTS),
    select=st.sampled_from(("boltzmann", "uct")),
    temperature=st.none() | st.sampled_from((0.01, 1.0)),
    selection_temperature=st.none() | st.sampled_from((0.5, float("inf"))),
    exploration=st.sampled_from((0.0, 0.5, 2.0)),
    widening_constant=st.sampled_from((1.0, 2.0)),
    widening_exponent=st.sampled_from((0.5, 0.8, 1.0)),
    branch_levels=st.sampled_from(((), (1.0, 0.8, 0.6, 0.4, 0.2), (0.5,), (0.1, 0.0))),
    stride=st.integers(1, 4),
    wave_size=st.integers(1, 6),
    branch_eta=st.sampled_from((0.0, 0.5, 1.0)),
)
beams = st.builds(
    partial(built, Beam),
    candidates=st.none() | st.integers(1, 4),
    width=st.integers(1, 3),
    stride=st.integers(1, 4),
    block=st.integers(1, 4),
    temperature=st.sampled_from((0.0, 0.5)),
    branch_eta=st.sampled_from((0.0, 0.5, 1.0)),
)
mctds = st.builds(
    partial(built, MCTD),
    candidates=st.none() | st.integers(1, 4),
    strides=st.sampled_from(((1,), (1, 2), (1, 2, 4, 8), (1, 3))),
    stride_policy=st.sampled_from(("budget", "fine_to_coarse", "constant", *CHOOSING_POLICIES)),
    error_tolerance=st.sampled_from((0.02, float("inf"))),
    first_share=st.sampled_from((0.2, 0.5, 1.0)),
    wave_size=st.integers(1, 4),
    seed_share=st.sampled_from((0.0, 0.3, 0.6)),
    exploration=st.sampled_from((0.0, 0.2, 2.0)),
    widening_constant=st.sampled_from((0.5, 2.0)),
    finish=st.integers(1, 3),
    backup=st.sampled_from(("max", "mean", "soft")),
)
pruning_mctds = st.builds(
    partial(built, MCTD),
    candidates=st.none() | st.integers(2, 6),
    strides=st.sampled_from(((1,), (1, 2, 4))),
    first_share=st.sampled_from((0.2, 0.5, 0.9)),
    wave_size=st.integers(1, 3),
    seed_share=st.sampled_from((0.0, 0.5)),
    pruning=st.sampled_from(("bounds", "siblings", "memory", "all", "siblings+bounds")),
    pruning_confidence=st.sampled_from((0.0, 1.0, 2.0)),
    least_gain=st.sampled_from((0.02, 0.1, 1.0)),
    max_live=st.sampled_from((1, 8, 24)),
    third_moves=st.sampled_from(((), ("fuse", "go_back", "resample"))),
)
mctds_with_third_moves = st.builds(
    partial(built, MCTD),
    strides=st.sampled_from(((1,), (1, 2, 4))),
    first_share=st.sampled_from((0.2, 0.5)),
    wave_size=st.integers(1, 3),
    backup=st.sampled_from(("max", "soft")),
    third_moves=st.sampled_from((("fuse",), ("go_back",), ("resample", "go_back", "fuse"))),
    fusion=st.sampled_from(("x0", "noise", "mean", "resample")),
    fuse_after=st.integers(2, 4),
    num_particles=st.integers(2, 4),
    third_share=st.sampled_from((0.5, 1.0)),
    max_inconsistency=st.sampled_from((1.5, float("inf"))),
)
noise_searches = st.builds(
    partial(built, NoiseSearch),
    method=st.sampled_from(("random", "zero_order", "eps_greedy")),
    candidates=st.none() | st.integers(1, 4),
    rounds=st.none() | st.integers(1, 3),
    strength=st.sampled_from((0.0, 0.5, 1.0)),
    epsilon=st.sampled_from((0.0, 0.4, 1.0)),
    stride=st.none() | st.integers(1, 4),
    branch_eta=st.sampled_from((0.5, 1.0)),
)
evolutions = st.builds(
    partial(built, Evolution),
    schedule=st.sampled_from(((0.0, 0.4, 0.6), (0.0, 0.3, 0.7), (0.5, 0.6, 0.9))),
    populations=st.sampled_from(((4, 2, 2, 2), (1, 9, 2, 0.5))),
    elites=st.integers(0, 3),
    tournament=st.sampled_from((0.1, 0.5, 1.0)),
    strength=st.sampled_from((0.0, 0.5, 1.0)),
    stride=st.none() | st.integers(1, 4),
    branch_eta=st.sampled_from((0.5, 1.0)),
)
textbook_mctds = st.builds(
    partial(built, TextbookMCTD),
    guidances=st.sampled_from(((1.0,), (0.5, None, 2.0), (None, None))),
    noises=st.integers(1, 3),
    depth=st.integers(1, 5),
    expansion_stride=st.integers(1, 3),
    simulation_stride=st.none() | st.integers(1, 5),
    exploration=st.sampled_from((0.0, 0.5, 1.0)),
    redundancy_weight=st.sampled_from((0.0, 1.0, 5.0)),
    wave_size=st.integers(1, 6),
    branch_eta=st.sampled_from((0.5, 1.0)),
)
rollovers = st.builds(
    partial(built, Rollover),
    initial_share=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    threshold=st.sampled_from((None, -1.0, 0.0, 2.0)),
    stride=st.integers(1, 4),
    wave_size=st.integers(1, 4),
    branch_eta=st.sampled_from((0.0, 0.5, 1.0)),
)
smcs = st.builds(
    partial(built, SMC),
    particles=st.none() | st.integers(1, 4),
    temperature=st.sampled_from((None, 0.3, 5.0)),
    potential=st.sampled_from(("diff", "max", "add")),
    stride=st.integers(1, 3),
    interval=st.integers(1, 3),
    window_start=st.sampled_from((0.0, 0.4)),
    window_end=st.sampled_from((0.6, 1.0)),
    ess_threshold=st.sampled_from((0.0, 0.5, 1.0)),
    branch_eta=st.sampled_from((0.0, 0.5, 1.0)),
)
searches = (
    best_of_n
    | best_of_n_by_policy
    | beams
    | draft_refines
    | dtss
    | evolutions
    | mctds
    | mctds_with_third_moves
    | pruning_mctds
    | noise_searches
    | rollovers
    | smcs
    | textbook_mctds
)

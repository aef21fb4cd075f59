"""What searches observe, on worlds whose answers are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mctd_diffusers.models.calibration import Calibration
from mctd_diffusers.models.observations import (
    Observations,
    joined,
    no_observations,
    observe,
    sibling_groups,
    walk_probabilities,
)
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Asks, Handles
from mctd_diffusers.search.moves import denoise, draw, reward, step, value
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import run_search
from mctd_diffusers.search.tree import (
    DRAW,
    RENOISE,
    ROOT,
    STEP,
    Tree,
    add_child,
    prune,
    record_evaluated,
    record_rewards,
    record_values,
)
from tests.toys import linear_gaussian, problems_of

STEPS = 4


def numbered(handles: Handles) -> dict[str, Any]:
    """Features that say which sample they are of."""
    return {"mid": handles[:, None].astype(np.float32)}


def has_noise(step_index: int, stride: int, eta: float | None) -> bool:
    return eta is not None and eta > 0 and step_index + stride < STEPS


def observed(tree: Tree, num_steps: int = STEPS) -> Observations:
    return observe(
        tree,
        log_snr=np.linspace(-4, 4, num_steps + 1),
        features=numbered,
        is_stochastic=has_noise,
        prompt="a cat",
        scheduler="DDIMScheduler",
    )


def grow(tree: Tree, parent: int, values: Sequence[float], **edge: Any) -> list[int]:
    """Valued children of a node."""
    entries = {"move": STEP, "stride": 1, "eta": 1.0, "guidance": None, **edge}
    here = -1 if parent == ROOT else int(tree.step_index[parent])
    ahead = max(entries["stride"], 1)
    nodes = []
    for worth in values:
        node = add_child(
            tree,
            parent,
            handle=tree.num_nodes,
            step_index=here + ahead,
            seed=tree.num_nodes,
            **entries,
        )
        handle = np.array([node])
        if here + ahead == STEPS:
            record_rewards(tree, handle, np.array([worth]))
        else:
            record_evaluated(tree, handle)
            record_values(tree, handle, np.array([worth]))
        nodes.append(node)
    return nodes


def lopsided_tree() -> tuple[Tree, list[int]]:
    """Two noises; the first has three children, the second one of one stride and two of another."""
    tree = Tree(7)
    first, second = grow(tree, ROOT, [0.5, -0.5], move=DRAW, stride=0, eta=None)
    nodes = [*grow(tree, first, [1.0, 2.0, 3.0]), *grow(tree, second, [4.0])]
    nodes += grow(tree, second, [5.0, 7.0], stride=2)
    return tree, [first, second, *nodes]


def test_a_walk_goes_evenly_by_kind_and_then_by_child() -> None:
    tree, nodes = lopsided_tree()
    sixth, quarter, eighth = 1 / 6, 1 / 4, 1 / 8
    expected = [0.5, 0.5, sixth, sixth, sixth, quarter, eighth, eighth]
    np.testing.assert_allclose(walk_probabilities(tree)[nodes], expected)
    # Nothing is lost on the way: what a node has, its children have together.
    for node in (ROOT, nodes[0], nodes[1]):
        children = list(tree.children(node))
        assert walk_probabilities(tree)[children].sum() == pytest.approx(
            walk_probabilities(tree)[node]
        )


def test_siblings_are_valued_children_by_one_kind_of_edge_with_noise() -> None:
    tree, (first, second, *_) = lopsided_tree()
    grow(tree, second, [8.0, 9.0], eta=0.0)  # no noise
    grow(tree, second, [8.0, 9.0], move=RENOISE, stride=0)  # no step
    grow(tree, second, [8.0, math.nan])  # with the first one of this kind, two are valued
    grow(tree, second, [8.0, 9.0], guidance=2.0)  # another kind
    groups = sibling_groups(tree, has_noise)
    assert [(group.parent, group.stride, group.guidance) for group in groups] == [
        (first, 1, None),
        (second, 1, None),
        (second, 2, None),
        (second, 1, 2.0),
    ]
    np.testing.assert_array_equal(tree.value[list(groups[1].children)], [4.0, 8.0])


def test_what_is_observed_of_a_tree() -> None:
    tree, (first, second, child, *_) = lopsided_tree()
    grow(tree, child, [0.25, 0.75], stride=2)
    grow(tree, tree.num_nodes - 1, [6.0], eta=None)
    seen = observed(tree)
    np.testing.assert_array_equal(seen.step_index, [0, 0, 1])
    np.testing.assert_array_equal(seen.stride, [1, 2, 2])
    np.testing.assert_array_equal(seen.source_log_snr, [-4, -4, -2])
    np.testing.assert_array_equal(seen.target_log_snr, [-2, 0, 2])
    np.testing.assert_array_equal(seen.value, [0.5, -0.5, 1.0])
    np.testing.assert_array_equal(seen.reward, [6.0, math.nan, 6.0])
    np.testing.assert_array_equal(seen.features["mid"][:, 0], tree.handle[[first, second, child]])
    np.testing.assert_array_equal(seen.weight, [1, 1, 1])  # one group of each kind and level
    np.testing.assert_allclose(seen.variances(None), [1.0, 2.0, 0.125])
    np.testing.assert_allclose(seen.gains(None), [1.5, 6.5, -0.5])
    assert set(seen.image.tolist()) == {7}
    assert set(seen.prompt.tolist()) == {"a cat"}


def test_values_are_calibrated_and_rewards_are_not() -> None:
    tree = Tree(3)
    (noise,) = grow(tree, ROOT, [1.0], move=DRAW, stride=0, eta=None)
    grow(tree, noise, [2.0, 4.0])
    grow(tree, noise, [2.0, 4.0], stride=STEPS)
    seen = observe(
        tree,
        log_snr=np.linspace(-4, 4, STEPS + 1),
        features=numbered,
        is_stochastic=lambda *_: True,
        prompt="",
        scheduler="",
    )
    calibration = Calibration((-4.0, 4.0), (1.0, 3.0), (0.0, 4.0), (1.0, 1.0))
    np.testing.assert_array_equal(seen.is_finished, [False, True])
    # At log-SNR -2 the slope is 1.5 and the offset 1; the finished ones are worth their rewards.
    np.testing.assert_allclose(seen.variances(calibration), [1.5**2 * 2, 2])
    np.testing.assert_allclose(seen.gains(calibration), [1.5 * 3 + 1 - 1, 3 - 1])


def test_pruned_parents_are_left_out_and_pruned_children_are_not() -> None:
    tree, (first, second, child, *_) = lopsided_tree()
    prune(tree, child)
    np.testing.assert_array_equal(observed(tree).values[0], [1.0, 2.0, 3.0])
    prune(tree, first)
    np.testing.assert_array_equal(observed(tree).features["mid"][:, 0], tree.handle[[second]])


def test_observations_are_cut_and_joined() -> None:
    tree, _ = lopsided_tree()
    seen = observed(tree)
    again = joined([no_observations(), seen.take(slice(1)), seen.take([1]), no_observations()])
    for name in ("step_index", "weight", "value"):
        np.testing.assert_array_equal(getattr(again, name), getattr(seen, name))
    np.testing.assert_array_equal(again.features["mid"], seen.features["mid"])
    assert len(joined([])) == len(observed(Tree(1))) == len(no_observations(["mid"])) == 0


# Searches of a Gaussian whose reward is the sample: values have mean 0 at every level


class Lopsided:
    """Goes on from the best of its noises many times, and twice from each of the others."""

    name = "lopsided"

    def least_evaluations(self, num_steps: int) -> int:
        return num_steps

    def search(self, problem: Problem) -> Asks:
        noises = yield from draw(problem, 60)
        yield from denoise(problem, noises)
        values = yield from value(problem, noises)
        best = [noises[i] for i in np.argsort(values)[-15:]]
        made = yield from step(problem, noises * 2 + best * 30, stride=1, eta=1.0)
        yield from denoise(problem, made)
        yield from value(problem, made)
        drawn = yield from step(problem, made * 2, stride=2, eta=1.0)
        yield from denoise(problem, drawn)
        yield from value(problem, drawn)
        last = yield from step(problem, drawn[:1], stride=1, eta=None)
        yield from reward(problem, last)
        return "budget"


@pytest.fixture(scope="module")
def searches() -> tuple[Any, list[Observations]]:
    environment = linear_gaussian(12, STEPS)
    results = run_search(Lopsided(), environment, problems_of(environment, Budget(nfe=10_000)))
    return environment, [observed(result.tree) for result in results]


def test_biased_visiting_is_corrected(searches: tuple[Any, list[Observations]]) -> None:
    means = []
    for seen in searches[1]:
        rows = seen.take(seen.step_index == 1)
        means.append((rows.value.mean(), np.average(rows.value, weights=rows.weight)))
        assert rows.weight.mean() == pytest.approx(1)
    biased, corrected = np.array(means).T
    error = corrected.std(ddof=1) / math.sqrt(len(corrected))
    assert biased.mean() > 5 * error  # it is led to what is good
    assert abs(corrected.mean()) < 3 * error


def test_variances_of_siblings_are_those_of_the_edge(
    searches: tuple[Any, list[Observations]],
) -> None:
    environment, found = searches
    seen = joined(found)
    for step_index, stride in ((0, 1), (1, 2)):
        (alpha, after), (sigma, sigma_after) = (
            (levels[step_index], levels[step_index + stride])
            for levels in (environment.alpha, environment.sigma)
        )
        # The estimate is alpha x, and x gets this much fresh noise.
        fresh = (sigma_after / sigma) ** 2 * (1 - (alpha / after) ** 2)
        rows = seen.take((seen.step_index == step_index) & (seen.stride == stride))
        variances = rows.variances(None)
        # Of states that search liked, and of the others, alike.
        for some in (variances, variances[rows.value > 0], variances[rows.value < 0]):
            error = some.std(ddof=1) / math.sqrt(len(some))
            assert some.mean() == pytest.approx(after**2 * fresh, abs=4 * error)
            assert error < 0.2 * after**2 * fresh

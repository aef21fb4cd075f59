"""What a search observes of jumps: states that it went on from, and the values of their children.

Children of one state by one stochastic edge are independent draws of where the edge leads, whoever
chose the state: so their sample variance is that of the edge given the state, without bias. Which
states are gone on from is the search's choice, and biased; :func:`walk_probabilities` corrects it.

Nearly independent, to be exact: where a search gives a state more children because of what the
first were worth, the mean of all of them is a little off (Nie et al., 2018, "Why adaptively
collected data have negative bias and how to correct for it"). numpy only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from mctd_diffusers.models.calibration import Calibration
from mctd_diffusers.search.environment import Handles
from mctd_diffusers.search.stride_policies import PURE_NOISE
from mctd_diffusers.search.tree import NO_PARENT, STEP, Tree

Floats: TypeAlias = npt.NDArray[np.float64]
FeaturesFn: TypeAlias = Callable[[Handles], Mapping[str, npt.NDArray[Any]]]
"""Features of samples, ``{name: [samples, channels]}``."""
IsStochasticFn: TypeAlias = Callable[[int, int, float | None], bool]
"""Whether edges of ``(step_index, stride, eta)`` differ by their seeds."""

_STATES_AT_ONCE: Final = 64


class SiblingGroup(NamedTuple):
    """Children of one node by edges that differ in their seeds alone, all of them valued.

    Attributes:
        parent: row of the node.
        children: their rows, two at the least.
        stride: schedule steps crossed.
        eta: share of fresh noise; ``None`` as the user's own scheduler.
        guidance: scale of guidance on the edges; ``None`` is the call's own.
    """

    parent: int
    children: tuple[int, ...]
    stride: int
    eta: float | None
    guidance: float | None


@dataclass(frozen=True)
class Observations:
    """Groups of siblings that searches observed, one row each.

    Attributes:
        image: root seed of the search.
        prompt: that the reward read.
        scheduler: class name.
        num_steps: of the schedule.
        step_index: of the parent.
        stride: of the edges.
        eta: share of fresh noise; NaN as the user's own scheduler.
        guidance: scale on the edges; NaN is the call's own.
        source_log_snr: noise level of the parent.
        target_log_snr: of the children.
        is_finished: whether the children are finished, so that their values are rewards.
        value: of the parent, as it is; NaN where it was not valued.
        values: of the children, as they are: ``[groups]`` arrays, two numbers each at the least.
        weight: corrects for biased visiting, see :func:`observe`.
        visits: backups through the parent.
        reward: best finished sample below the parent; NaN where there is none.
        features: of the parents, ``{name: [groups, channels]}``, half precision.
    """

    image: Int[np.ndarray, " groups"]
    prompt: npt.NDArray[Any]
    scheduler: npt.NDArray[Any]
    num_steps: Int[np.ndarray, " groups"]
    step_index: Int[np.ndarray, " groups"]
    stride: Int[np.ndarray, " groups"]
    eta: Float[np.ndarray, " groups"]
    guidance: Float[np.ndarray, " groups"]
    source_log_snr: Float[np.ndarray, " groups"]
    target_log_snr: Float[np.ndarray, " groups"]
    is_finished: npt.NDArray[np.bool_]
    value: Float[np.ndarray, " groups"]
    values: npt.NDArray[Any]
    weight: Float[np.ndarray, " groups"]
    visits: Int[np.ndarray, " groups"]
    reward: Float[np.ndarray, " groups"]
    features: dict[str, Float[np.ndarray, "groups _"]]

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: Any) -> Observations:
        """Some of the groups: by rows, a mask or a slice."""
        return _map(lambda column: column[rows], self)

    def gains(self, calibration: Calibration | None) -> Floats:
        """Mean change of the calibrated value over each edge, ``[groups]``; NaN if not known."""
        if calibration is None:
            before = self.value
        else:
            before = calibration(self.value, self.source_log_snr)
        return np.array([after.mean() for after in self._after(calibration)]) - before

    def variances(self, calibration: Calibration | None) -> Floats:
        """Variance of the calibrated values of siblings, estimated without bias, ``[groups]``."""
        return np.array([after.var(ddof=1) for after in self._after(calibration)], np.float64)

    def _after(self, calibration: Calibration | None) -> list[Floats]:
        """Calibrated values of the siblings; rewards stay as they are."""
        if calibration is None:
            return list(self.values)
        return [
            values if ends else calibration(values, np.full(len(values), level))
            for values, level, ends in zip(
                self.values, self.target_log_snr, self.is_finished, strict=True
            )
        ]


def no_observations(names: Iterable[str] = ()) -> Observations:
    """None at all, with features of these names."""
    whole, real = np.empty(0, np.int64), np.empty(0)
    text, objects = np.empty(0, np.str_), np.empty(0, object)
    columns: dict[str, Any] = {
        **dict.fromkeys(("image", "num_steps", "step_index", "stride", "visits"), whole),
        **dict.fromkeys(("eta", "guidance", "source_log_snr", "target_log_snr"), real),
        **dict.fromkeys(("value", "weight", "reward"), real),
        **dict.fromkeys(("prompt", "scheduler"), text),
        "is_finished": np.empty(0, np.bool_),
        "values": objects,
    }
    return Observations(**columns, features={name: np.empty((0, 0), np.float16) for name in names})


def joined(parts: Sequence[Observations]) -> Observations:
    """Observations of several searches of one model, one after the other."""
    filled = [part for part in parts if len(part)]
    if not filled:
        return parts[0] if parts else no_observations()
    return _map(lambda *columns: np.concatenate(columns), *filled)


def walk_probabilities(tree: Tree) -> Float[np.ndarray, " nodes"]:
    """Probability that a walk down the tree that goes by no value passes through each node.

    The walk begins at the root. At a node it picks evenly among the kinds of its edges (move,
    stride, share of noise, guidance), then evenly among the children of that kind. With ``m``
    children of one kind, each a draw ``x_j`` of the edge's law given the parent, ``1/m sum f(x_j)``
    has the mean of ``f`` under that law, whatever ``m`` is, if ``m`` was not chosen by the draws
    themselves. Along a path means multiply: so over the nodes of one step index

        sum of probability(node) f(x_node)

    estimates the mean of ``f`` under the sampler without a search, be a parent gone on from once or
    a hundred times (Knuth, "Estimating the efficiency of backtrack programs", 1975; particle
    splitting in rare event simulation is the same). Below nodes that a search never went on from
    there is nothing to weight: that much of the bias stays, and sums are to be normalised.

    Returns:
        ``[nodes]``, above 0; 1 for the root.
    """
    probability = np.ones(tree.num_nodes)
    for node in range(tree.num_nodes):  # parents come before their children
        kinds = _children_by_kind(tree, node)
        for children in kinds.values():
            probability[children] = probability[node] / (len(kinds) * len(children))
    return probability


def sibling_groups(tree: Tree, is_stochastic: IsStochasticFn) -> list[SiblingGroup]:
    """All groups of siblings in a tree of which something was observed.

    Args:
        tree: of a search, finished or not.
        is_stochastic: tells edges with noise from those that would give one child again and again.
    """
    worth = np.where(np.isnan(tree.reward), tree.value, tree.reward)
    groups = []
    for parent in range(1, tree.num_nodes):
        for (move, stride, eta, guidance), children in _children_by_kind(tree, parent).items():
            valued = tuple(child for child in children if not np.isnan(worth[child]))
            if move != STEP or len(valued) < 2:
                continue
            if is_stochastic(int(tree.step_index[parent]), stride, eta):
                groups.append(SiblingGroup(parent, valued, stride, eta, guidance))
    return groups


def observe(
    tree: Tree,
    *,
    log_snr: Float[np.ndarray, " points"],
    features: FeaturesFn,
    is_stochastic: IsStochasticFn,
    prompt: str,
    scheduler: str,
) -> Observations:
    """What a search observed of one image.

    Groups weigh by the probability of their parent (:func:`walk_probabilities`), normalised to a
    mean of one over the groups of the same step index and stride: how many states there are at a
    level stays as it is (predictions are made level by level), but among them those that the
    search was led to often count no more than those that it was led to once.

    Args:
        tree: of the image; nodes that are not live have no features, and are left out.
        log_snr: noise levels of the schedule, the finished sample's last.
        features: of evaluated, unfinished samples.
        is_stochastic: see :func:`sibling_groups`.
        prompt: that the reward read.
        scheduler: class name.
    """
    groups = [
        group
        for group in sibling_groups(tree, is_stochastic)
        if tree.live[group.parent] and tree.evaluated[group.parent]
    ]
    if not groups:
        return no_observations()
    parent = np.array([group.parent for group in groups])
    stride = np.array([group.stride for group in groups])
    here = tree.step_index[parent]
    last = len(log_snr) - 1
    worth = np.where(np.isnan(tree.reward), tree.value, tree.reward)
    values = np.empty(len(groups), object)
    for row, group in enumerate(groups):
        values[row] = worth[list(group.children)]
    levels = np.maximum(np.asarray(log_snr, np.float64), PURE_NOISE)
    return Observations(
        image=np.full(len(groups), tree.root_seed, np.int64),
        prompt=np.full(len(groups), prompt),
        scheduler=np.full(len(groups), scheduler),
        num_steps=np.full(len(groups), last, np.int64),
        step_index=here,
        stride=stride,
        eta=np.array([_or_nan(group.eta) for group in groups]),
        guidance=np.array([_or_nan(group.guidance) for group in groups]),
        source_log_snr=levels[here],
        target_log_snr=levels[here + stride],
        is_finished=here + stride == last,
        value=tree.value[parent],
        values=values,
        weight=_normalised(walk_probabilities(tree)[parent], here * (last + 1) + stride),
        visits=tree.visit_count[parent],
        reward=_best_below(tree)[parent],
        features=_features_of(tree.handle[parent], features),
    )


def digest_of(observations: Observations) -> bytes:
    """What tells observations of one search from those of another."""
    found = hashlib.sha256()
    for column in (observations.image, observations.step_index, *observations.values):
        found.update(np.ascontiguousarray(column).tobytes())
    return found.digest()


def _children_by_kind(
    tree: Tree, node: int
) -> dict[tuple[int, int, float | None, float | None], list[int]]:
    """Children of a node by move, stride, share of noise and guidance of their edges."""
    kinds: dict[tuple[int, int, float | None, float | None], list[int]] = {}
    for child in tree.children(node):
        eta, guidance = float(tree.eta[child]), float(tree.guidance[child])
        kind = (
            int(tree.move[child]),
            int(tree.stride[child]),
            None if math.isnan(eta) else eta,
            None if math.isnan(guidance) else guidance,
        )
        kinds.setdefault(kind, []).append(child)
    return kinds


def _best_below(tree: Tree) -> Floats:
    """Best reward of each node and those below it, ``[nodes]``; NaN where there is none."""
    best = tree.reward.copy()
    for node in range(tree.num_nodes - 1, 0, -1):
        parent = int(tree.parent[node])
        if parent != NO_PARENT:
            best[parent] = np.fmax(best[parent], best[node])
    return best


def _normalised(weights: Floats, cells: npt.NDArray[np.int64]) -> Floats:
    """Weights brought to a mean of one in each cell."""
    _, cell = np.unique(cells, return_inverse=True)
    means = np.bincount(cell, weights) / np.bincount(cell)
    return np.asarray(weights / means[cell])


def _features_of(handles: Handles, features: FeaturesFn) -> dict[str, npt.NDArray[np.float16]]:
    """Features of samples, of which some are named several times, in half precision."""
    states, rows = np.unique(handles, return_inverse=True)
    parts = [
        features(states[start : start + _STATES_AT_ONCE])
        for start in range(0, len(states), _STATES_AT_ONCE)
    ]
    largest = np.finfo(np.float16).max
    return {
        name: np.concatenate([part[name] for part in parts])[rows]
        .clip(-largest, largest)
        .astype(np.float16)
        for name in parts[0]
    }


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number


def _map(function: Callable[..., Any], *parts: Observations) -> Observations:
    """Observations whose columns are made of those of others."""
    names = [column.name for column in fields(Observations) if column.name != "features"]
    columns = {name: function(*(getattr(part, name) for part in parts)) for name in names}
    features = {
        name: function(*(part.features[name] for part in parts)) for name in parts[0].features
    }
    return replace(parts[0], **columns, features=features)

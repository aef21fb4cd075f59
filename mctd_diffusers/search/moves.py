"""What strategies are made of: small coroutines that ask the world and write the tree.

Each takes a problem first, yields requests, and returns rows of the tree. ``gather`` runs
coroutines side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import (
    REJECTED,
    Action,
    Asks,
    Denoise,
    Fuse,
    Fusions,
    Gains,
    Perturb,
    PredictGain,
    RelativeChange,
    Release,
    Renoise,
    Reply,
    Reset,
    Reward,
    Step,
    Value,
    Values,
)
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.seeding import root_seed_of
from mctd_diffusers.search.stride_policies import (
    Costs,
    StrideChoice,
    StridePolicy,
    admissible_strides,
    choose_by_gains,
    choose_stride,
    cost_to_go,
    nearest_stride,
)
from mctd_diffusers.search.tree import (
    DRAW,
    FUSE,
    PERTURB,
    RENOISE,
    ROOT,
    STEP,
    Fusion,
    Tree,
    add_child,
    add_fused,
    backup,
    common_ancestor,
    issue_seeds,
    prune_alone,
    record_stride_choice,
)


def generator_for(problem: Problem, purpose: str) -> np.random.Generator:
    """Chance for the choices of a strategy: the same in every run of the same problem.

    Args:
        problem: the image; its root seed is where all chance comes from.
        purpose: tells the generators of one search from each other.
    """
    seed = root_seed_of(b"%d|%s" % (problem.root_seed, purpose.encode()))
    return np.random.Generator(np.random.Philox(seed))


def draw(problem: Problem, count: int) -> Asks:
    """Draw ``count`` initial noises; returns their nodes. A search's first is the problem's own."""
    seeds = issue_seeds(problem.tree, ROOT, move=DRAW, stride=0, count=count)
    reply: Reply = yield Reset(np.array(seeds, dtype=np.int64))
    return _add_children(
        problem.tree, [ROOT] * count, reply, seeds, step_indices=[0] * count, move=DRAW
    )


def step(
    problem: Problem,
    parents: Sequence[int],
    *,
    stride: int,
    eta: float | None,
    guidance: float | None = None,
) -> Asks:
    """Expand each entry of ``parents`` (evaluated; a row may stand there often) by one lazy child.

    Args:
        problem: the image.
        parents: rows, all at one distance of at least ``stride`` from the end.
        stride: schedule steps that each edge crosses.
        eta: share of fresh noise; ``None`` steps as the user's own scheduler says.
        guidance: scale of guidance on these edges; ``None`` is the call's own.

    Returns:
        The rows of the children, in order.

    Raises:
        ConfigError: a guidance where there is none to scale, see :func:`check_guidance`.
    """
    check_guidance(problem, guidance)
    tree = problem.tree
    seeds = [issue_seeds(tree, parent, move=STEP, stride=stride, count=1)[0] for parent in parents]
    reply: Reply = yield Step(
        tree.handle[parents],
        (Action(stride, eta, guidance),) * len(parents),
        np.array(seeds, dtype=np.int64),
    )
    return _add_children(
        tree,
        parents,
        reply,
        seeds,
        step_indices=(tree.step_index[parents] + stride).tolist(),
        move=STEP,
        stride=stride,
        eta=eta,
        guidance=guidance,
    )


def step_by(
    problem: Problem,
    parents: Sequence[int],
    choices: Sequence[StrideChoice],
    *,
    eta: float | None,
    guidance: float | None = None,
) -> Asks:
    """Like :func:`step`, each over the stride that was chosen for it, which the tree records.

    Returns:
        The rows of the children, in order.
    """
    strides = sorted({choice.stride for choice in choices})
    places = [[i for i, choice in enumerate(choices) if choice.stride == k] for k in strides]
    made = yield from gather(
        *(
            step(problem, [parents[i] for i in some], stride=stride, eta=eta, guidance=guidance)
            for stride, some in zip(strides, places, strict=True)
        )
    )
    child_at = {
        place: node
        for some, nodes in zip(places, made, strict=True)
        for place, node in zip(some, nodes, strict=True)
    }
    children = [child_at[place] for place in range(len(choices))]
    for node, choice in zip(children, choices, strict=True):
        record_stride_choice(
            problem.tree,
            node,
            reason=choice.reason,
            predicted_gain=choice.predicted_gain,
            predicted_error=choice.predicted_error,
        )
    return children


def check_guidance(problem: Problem, guidance: float | None) -> None:
    """Refuse a guidance of an edge or a value where there is none to scale.

    Raises:
        ConfigError: the call's guidance is off, or an input of the network.
    """
    if guidance is not None and problem.guidance_scale is None:
        raise ConfigError(
            f"guidance {guidance!r} of one move needs the network's output with and without the "
            f"prompt, and image {problem.index} has only one: its guidance is off, or an input of "
            "the network; call with guidance_scale above 1, or leave guidance None."
        )


def perturb(problem: Problem, nodes: Sequence[int], *, strength: float) -> Asks:
    """Make a variant of each node with other noise on its last edge; see ``Environment.perturb``.

    The move of zero-order search (its neighbours) and of evolution (its mutations). Lazy and free:
    a variant stands at the step index of its node and is not evaluated.

    Args:
        problem: the image.
        nodes: unfinished rows, evaluated or not, whose last edges are not deterministic; a row may
            stand there often.
        strength: share ``b`` of fresh noise, 0 to 1: the noise becomes
            ``sqrt(1 - b^2) * noise + b * fresh``.

    Returns:
        The rows of the variants, in order: children of ``nodes`` by a move ``PERTURB`` whose column
        ``eta`` holds the strength.
    """
    tree = problem.tree
    seeds = [issue_seeds(tree, node, move=PERTURB, stride=0, count=1)[0] for node in nodes]
    reply: Reply = yield Perturb(tree.handle[nodes], strength, np.array(seeds, dtype=np.int64))
    return _add_children(
        tree,
        nodes,
        reply,
        seeds,
        step_indices=tree.step_index[nodes].tolist(),
        move=PERTURB,
        eta=strength,
    )


def renoise(problem: Problem, nodes: Sequence[int], *, step_index: int) -> Asks:
    """Go back up the schedule from the denoised estimates of evaluated, or from finished, nodes.

    Args:
        problem: the image.
        nodes: rows; one may stand there often.
        step_index: where to, 0 is noisiest.

    Returns:
        The rows of the noised samples, in order, lazy: children of ``nodes``.
    """
    tree = problem.tree
    seeds = [issue_seeds(tree, node, move=RENOISE, stride=0, count=1)[0] for node in nodes]
    reply: Reply = yield Renoise(tree.handle[nodes], step_index, np.array(seeds, dtype=np.int64))
    return _add_children(
        tree, nodes, reply, seeds, step_indices=[step_index] * len(nodes), move=RENOISE
    )


class Fused(NamedTuple):
    """What became of one group of particles.

    Attributes:
        node: row of the fused node; ``None`` where it was rejected.
        verdict: place in the environment's list of verdicts; 0 where it was accepted.
        correlation: mean cosine of two particles' noises; NaN where there is only one.
    """

    node: int | None
    verdict: int
    correlation: float


def fuse(problem: Problem, groups: Sequence[Fusion], *, guidance: float | None = None) -> Asks:
    """Fuse groups of particles: each into one lazy node below its lowest common ancestor.

    Args:
        problem: the image.
        groups: evaluated, unfinished rows, of one step index in each group, all by one method.
        guidance: scale of guidance of the particles' estimates; ``None`` is the call's own.

    Returns:
        A :class:`Fused` for each group, in order.

    Raises:
        ConfigError: a guidance where there is none to scale, see :func:`check_guidance`.
    """
    check_guidance(problem, guidance)
    tree = problem.tree
    seeds = [
        issue_seeds(tree, common_ancestor(tree, group.particles), move=FUSE, stride=0, count=1)[0]
        for group in groups
    ]
    reply: Reply = yield Fuse(
        tuple(tree.handle[list(group.particles)] for group in groups),
        tuple(np.array(group.weights, dtype=np.float64) for group in groups),
        groups[0].method,
        np.array(seeds, dtype=np.int64),
        guidance,
    )
    fusions: Fusions = reply.result
    return [
        Fused(
            None
            if handle == REJECTED
            else add_fused(tree, group, handle=handle, seed=seed, guidance=guidance),
            verdict,
            correlation,
        )
        for group, seed, handle, verdict, correlation in zip(
            groups, seeds, *(column.tolist() for column in fusions), strict=True
        )
    ]


def relative_change(problem: Problem, nodes: Sequence[int]) -> Asks:
    """How far the estimates of evaluated nodes moved since their parents'; returns the values.

    Of a fused node since the estimate that it was fused to; see `Environment.relative_change`.
    """
    reply: Reply = yield RelativeChange(problem.tree.handle[list(nodes)])
    changes: Values = reply.result
    return changes


def _add_children(
    tree: Tree,
    parents: Sequence[int],
    reply: Reply,
    seeds: Sequence[int],
    *,
    step_indices: Sequence[int],
    move: int,
    stride: int = 0,
    eta: float | None = None,
    guidance: float | None = None,
) -> list[int]:
    """Note the samples that a reply names, one below each of ``parents``; returns their rows."""
    return [
        add_child(
            tree,
            parent,
            handle=handle,
            step_index=step_index,
            move=move,
            stride=stride,
            eta=eta,
            guidance=guidance,
            seed=seed,
        )
        for parent, handle, step_index, seed in zip(
            parents, reply.result.tolist(), step_indices, seeds, strict=True
        )
    ]


def denoise(problem: Problem, nodes: Sequence[int]) -> Asks:
    """Evaluate unfinished nodes: 1 NFE each."""
    yield Denoise(problem.tree.handle[nodes])


def denoise_missing(problem: Problem, nodes: Sequence[int]) -> Asks:
    """Evaluate those of ``nodes`` that are not evaluated yet; asks nothing if all are."""
    missing = [node for node in nodes if not problem.tree.evaluated[node]]
    if missing:
        yield from denoise(problem, missing)


def value(problem: Problem, nodes: Sequence[int], *, guidance: float | None = None) -> Asks:
    """Value evaluated nodes by their denoised estimates; returns the values.

    Args:
        problem: the image.
        nodes: rows, evaluated and not finished.
        guidance: scale of guidance of the estimates; ``None`` is the call's own.

    Raises:
        ConfigError: a guidance where there is none to scale, see :func:`check_guidance`.
    """
    check_guidance(problem, guidance)
    reply: Reply = yield Value(problem.tree.handle[nodes], guidance)
    values: Values = reply.result
    return values


def predict_gain(problem: Problem, nodes: Sequence[int], strides: Sequence[int]) -> Asks:
    """Predict what jumps from evaluated, unfinished nodes would tell, at no evaluation.

    Returns:
        :class:`Gains`, each ``[nodes, strides]``; NaN where a stride is longer than what is left.
    """
    reply: Reply = yield PredictGain(problem.tree.handle[nodes], tuple(strides))
    gains: Gains = reply.result
    return gains


def reward(problem: Problem, nodes: Sequence[int]) -> Asks:
    """Score finished nodes; returns the rewards."""
    reply: Reply = yield Reward(problem.tree.handle[nodes])
    rewards: Values = reply.result
    return rewards


def finish_plainly(problem: Problem, nodes: Sequence[int]) -> Asks:
    """Step ``nodes``, all at one step index, plainly to the end, and score them.

    Nodes that are not evaluated are evaluated first. Where the account cannot pay for single steps,
    the longest strides that it pays for are used, coarsest last.

    Returns:
        The rows of the finished nodes, in order; none where the solver cannot step as far as the
        account asks.
    """
    tree = problem.tree
    nodes = list(nodes)
    left = problem.num_steps - int(tree.step_index[nodes[0]])
    while True:
        yield from denoise_missing(problem, nodes)
        stride = 1
        if not problem.account.affords(
            problem.account.price(evaluations=(left - 1) * len(nodes), rewards=len(nodes))
        ):
            paid = problem.account.evaluations_left_for(values_per_evaluation=0, rewards=len(nodes))
            stride = -(-left // (paid // len(nodes) + 1))
            if problem.longest_stride is not None and stride > problem.longest_stride:
                return []
        nodes = yield from step(problem, nodes, stride=stride, eta=None)
        left -= stride
        if left == 0:
            break
    yield from reward(problem, nodes)
    return nodes


def finish(
    problem: Problem,
    nodes: Sequence[int],
    *,
    strides: Sequence[int],
    etas: Sequence[float | None] | None = None,
    guidance: float | None = None,
) -> Asks:
    """Step ``nodes`` over ``strides`` to the end, and score them.

    Args:
        problem: the image, whose account pays for it all.
        nodes: rows, all at one step index; evaluated first where they are not.
        strides: schedule steps of each edge, exactly those left.
        etas: share of fresh noise of each edge; ``None`` for all, or for one, is as the user's
            scheduler says.
        guidance: scale of guidance of all edges; ``None`` is the call's own.

    Returns:
        The rows of the finished nodes, in order.
    """
    nodes = list(nodes)
    for stride, eta in zip(strides, etas or [None] * len(strides), strict=True):
        yield from denoise_missing(problem, nodes)
        nodes = yield from step(problem, nodes, stride=stride, eta=eta, guidance=guidance)
    yield from reward(problem, nodes)
    return nodes


def finish_by_policy(
    problem: Problem,
    nodes: Sequence[int],
    *,
    policy: StridePolicy,
    strides: tuple[int, ...],
    edges: int,
    costs: Costs | None,
    error_tolerance: float = math.inf,
) -> Asks:
    """Step ``nodes`` to the end by exactly so many edges each, and score them.

    The strides are chosen for each node by itself, see :func:`choose_strides`, the steps are as the
    user's scheduler says.

    Returns:
        The rows of the finished nodes, in order.
    """
    nodes = list(nodes)
    for left in range(edges, 0, -1):
        yield from denoise_missing(problem, nodes)
        choices = yield from choose_strides(
            problem,
            nodes,
            policy=policy,
            strides=strides,
            edges=left,
            costs=costs,
            error_tolerance=error_tolerance,
        )
        nodes = yield from step_by(problem, nodes, choices, eta=None)
    yield from reward(problem, nodes)
    return nodes


def choose_strides(
    problem: Problem,
    nodes: Sequence[int],
    *,
    policy: StridePolicy,
    strides: tuple[int, ...],
    edges: int,
    costs: Costs | None,
    error_tolerance: float = math.inf,
) -> Asks:
    """Choose the next stride of each node, so that ``edges`` edges cross what is left.

    Asks for predictions where the policy judges samples one by one and there is a choice. What is
    not predicted falls back to typical costs, and these, where they forbid all, to an even cut.

    Args:
        problem: the image.
        nodes: evaluated rows, at any step indices.
        policy: chooses; not one that is planned.
        strides: to choose from; that ``edges`` of them cross what is left is the caller's to check.
        edges: left to take from each node, the next one included.
        costs: of jumps of the typical sample, by ``strides``; where the policy needs them.
        error_tolerance: a stride of a greater predicted truncation error (latent units) is not
            taken, unless it is the shortest that fits.

    Returns:
        A :class:`StrideChoice` for each node, in order.
    """
    stands = [int(step_index) for step_index in problem.tree.step_index[nodes]]
    fits = [admissible_strides(strides, problem.num_steps - stand, edges) for stand in stands]
    choices = {
        place: StrideChoice(options[0], "only")
        for place, options in enumerate(fits)
        if len(options) == 1
    }
    to_go = None if costs is None else cost_to_go(costs, strides, problem.num_steps)
    if policy.target is not None and to_go is not None:
        # Only what fits a node is asked of it, so that no other decides what is predicted of it.
        judged: dict[tuple[int, ...], list[int]] = {}
        for place, fit in enumerate(fits):
            if place not in choices:
                judged.setdefault(fit, []).append(place)
        predictions = yield from gather(
            *(predict_gain(problem, [nodes[i] for i in judged[fit]], fit) for fit in judged)
        )
        for (fit, places), gains in zip(judged.items(), predictions, strict=True):
            for place, *rows in zip(places, *gains, strict=True):
                choice = choose_by_gains(
                    Gains(*rows),
                    to_go,
                    target=policy.target,
                    strides=fit,
                    step_index=stands[place],
                    edges=edges,
                    error_tolerance=error_tolerance,
                )
                if choice is not None:
                    choices[place] = choice
    for place, node in enumerate(nodes):
        if place not in choices:
            choices[place] = _choose_alike(
                problem, node, fits[place], policy=policy, strides=strides, edges=edges, costs=costs
            )
    return [choices[place] for place in range(len(nodes))]


def _choose_alike(
    problem: Problem,
    node: int,
    admissible: Sequence[int],
    *,
    policy: StridePolicy,
    strides: tuple[int, ...],
    edges: int,
    costs: Costs | None,
) -> StrideChoice:
    """The stride of a node by nothing that tells it from the typical sample, but by chance."""
    tree = problem.tree
    step_index = int(tree.step_index[node])
    even = nearest_stride(admissible, (problem.num_steps - step_index) / edges)
    if policy.kind == "uniform":
        return StrideChoice(even, "uniform")
    if policy.kind == "fixed":
        return StrideChoice(nearest_stride(admissible, policy.stride), "fixed")
    if policy.kind == "random":
        # By the path to the node, so that no other sample decides it.
        path = f"stride|{tree.seed[node]}|{step_index}|{edges}|{len(tree.children(node))}"
        return StrideChoice(int(generator_for(problem, path).choice(admissible)), "random")
    if costs is not None:
        stride = choose_stride(
            costs[step_index],
            cost_to_go(costs, strides, problem.num_steps),
            strides=strides,
            admissible=admissible,
            step_index=step_index,
            edges=edges,
        )
        if stride is not None:
            return StrideChoice(stride, "fallback" if policy.target else policy.kind)
    return StrideChoice(even, "fallback")


def forget(problem: Problem, nodes: Sequence[int], *, rule: str) -> Asks:
    """Prune nodes, each alone, and release their samples; asks nothing if none is live.

    Args:
        problem: the image.
        nodes: rows; lazy children that were made from them stay good.
        rule: name of what prunes them.
    """
    handles = prune_alone(problem.tree, nodes, rule=rule)
    if handles:
        yield Release(np.array(handles, dtype=np.int64))


def back_up(problem: Problem, leaves: Sequence[int]) -> None:
    """Add the rewards of finished nodes along their paths to the root."""
    for leaf in leaves:
        backup(problem.tree, leaf, float(problem.tree.reward[leaf]))


def complete(problem: Problem) -> Asks:
    """Finish one sample as cheaply as the tree allows: plain steps, no search.

    It goes on from the evaluated sample nearest the end (the best valued of those), or from a draw
    where there is none.
    """
    tree = problem.tree
    resumable = np.flatnonzero(tree.evaluated & tree.live)
    if resumable.size:
        values = tree.value[resumable]
        values = np.where(np.isnan(values), -np.inf, values)
        node = int(resumable[np.lexsort((values, tree.step_index[resumable]))[-1]])
    else:
        (node,) = yield from draw(problem, 1)
    yield from finish_plainly(problem, [node])


def gather(*coroutines: Asks) -> Asks:
    """Run coroutines of one image side by side: their requests ride in the same wave.

    Yields tuples of the pending requests (one for each coroutine that is not done; they may nest
    and be of different length) and takes tuples of replies.

    Returns:
        Their return values, in order.
    """
    results: list[Any] = [None] * len(coroutines)
    pending: dict[int, Any] = {}

    def advance(position: int, reply: Any) -> None:
        try:
            pending[position] = coroutines[position].send(reply)
        except StopIteration as stop:
            pending.pop(position, None)
            results[position] = stop.value

    try:
        for position in range(len(coroutines)):
            advance(position, None)
        while pending:
            waiting = list(pending)
            replies = yield tuple(pending[position] for position in waiting)
            for position, reply in zip(waiting, replies, strict=True):
                advance(position, reply)
    finally:
        for coroutine in coroutines:
            coroutine.close()
    return results

"""A search stepped by hand: the simplest runner there is, to compare with and to look inside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.environment import (
    Denoise,
    Perturb,
    PredictGain,
    Release,
    Renoise,
    Reply,
    Request,
    Reset,
    Reward,
    Step,
    Value,
)
from mctd_diffusers.search.runner import Problem, Strategy
from mctd_diffusers.search.tree import (
    Tree,
    record_evaluated,
    record_rewards,
    record_values,
    to_json,
)

_MEASURED = {
    "eta",
    "guidance",
    "total_value",
    "max_value",
    "value",
    "reward",
    "predicted_gain",
    "predicted_error",
}


def step_by_hand(
    strategy: Strategy,
    problem: Problem,
    environment: MixtureEnvironment,
    log: Iterable[Reply] = (),
) -> Iterator[tuple[Request, Reply]]:
    """Run one search, request by request, each answered alone; the first ones from ``log``."""
    before = environment.ledger.spent(problem.index)
    for reply in log:
        before = environment.ledger.spent(problem.index) - reply.spent
    replies = iter(log)
    coroutine = strategy.search(problem)
    asked: Any = next(coroutine)
    while True:
        answers = []
        for request in leaves(asked):
            reply = next(replies, None)
            if reply is None:
                result = answer(request, environment, problem.index)
                reply = Reply(result, environment.ledger.spent(problem.index) - before)
            record(problem, request, reply)
            yield request, reply
            answers.append(reply)
        try:
            asked = coroutine.send(nested(asked, iter(answers)))
        except StopIteration:
            return


def leaves(asked: Any) -> list[Request]:
    """Requests of a nested tuple, left to right."""
    return (
        [leaf for part in asked for leaf in leaves(part)] if isinstance(asked, tuple) else [asked]
    )


def nested(asked: Any, answers: Iterator[Reply]) -> Any:
    """Replies as the requests were nested."""
    if isinstance(asked, tuple):
        return tuple(nested(part, answers) for part in asked)
    return next(answers)


def answer(request: Request, environment: MixtureEnvironment, problem: int) -> Any:
    """What the environment says to one request."""
    match request:
        case Reset(seeds):
            return environment.reset(np.full(len(seeds), problem, dtype=np.int64), seeds)
        case Denoise(handles):
            return environment.denoise(handles)
        case Step(parents, actions, seeds):
            return environment.step(parents, actions, seeds)
        case Value(handles):
            return environment.value(handles)
        case Reward(handles):
            return environment.reward(handles)
        case Renoise(handles, step_index, seeds):
            return environment.renoise(handles, step_index, seeds)
        case Perturb(handles, strength, seeds):
            return environment.perturb(handles, np.full(len(handles), strength), seeds)
        case PredictGain(handles, strides):
            return environment.predict_gain(handles, strides)
        case Release(handles):
            return environment.release(handles)


def record(problem: Problem, request: Request, reply: Reply) -> None:
    """Note a reply in the account and in the tree."""
    problem.account.update(reply.spent)
    match request:
        case Denoise(handles):
            record_evaluated(problem.tree, handles)
        case Value(handles):
            record_values(problem.tree, handles, reply.result)
        case Reward(handles):
            record_rewards(problem.tree, handles, reply.result)


def columns_of(tree: Tree) -> dict[str, list[Any]]:
    """The columns of a tree as they are saved: NaN is ``None``, infinities are text."""
    columns: dict[str, list[Any]] = json.loads(to_json(tree))["columns"]
    return columns


def assert_same_columns(
    one: dict[str, list[Any]], other: dict[str, list[Any]], *, but: tuple[str, ...] = ()
) -> None:
    """Whole numbers and truths must be equal, measured ones agree to nine digits."""
    assert one.keys() == other.keys()
    for name in one.keys() - set(but):
        if name in _MEASURED:
            left, right = (np.array(column[name], dtype=np.float64) for column in (one, other))
            np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9, err_msg=name)
        else:
            assert one[name] == other[name], name

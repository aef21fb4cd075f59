"""Runs one strategy on many images: merges their requests into waves, keeps what is found.

The loop, in one paragraph. Every image has a coroutine (``strategy.search(problem)``) that waits
for replies. Cheap requests (release, reset, step, renoise, perturb, fuse, ...) are answered at
once; when all coroutines wait for something expensive, the kind with the most samples pending
(denoise, value or reward) is answered in one call across all images, so that calls are as full as
they can be. The runner writes what the world answered into each image's tree, keeps every finished
sample, and stops for budget, time or Ctrl-C with the best of them. An image whose own call fails is
put aside, and the others go on.

Nothing but the answers of the environment decides what happens, so a :class:`SearchLog` of them is
a saved search: the same loop reads the log first, and asks the environment when the log is read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from mctd_diffusers.errors import BudgetError, ConfigError, SearchError
from mctd_diffusers.search.bandit import MoveMade
from mctd_diffusers.search.budget import StopReason
from mctd_diffusers.search.environment import (
    Action,
    Asks,
    Counts,
    Denoise,
    Environment,
    Fuse,
    Fusions,
    Gains,
    Handles,
    Ledger,
    Perturb,
    PredictGain,
    RelativeChange,
    Release,
    Renoise,
    Reply,
    Request,
    Reset,
    Reward,
    Step,
    Value,
    Values,
)
from mctd_diffusers.search.log import (
    Answer,
    SearchLog,
    checksum,
    counts_of,
    flat_fusions,
    read_fusions,
    row_of,
)
from mctd_diffusers.search.moves import complete, gather
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.tree import (
    Tree,
    record_evaluated,
    record_rewards,
    record_values,
)

__all__ = [
    "Finished",
    "Problem",
    "SearchResult",
    "Strategy",
    "Wave",
    "check_budget",
    "gather",
    "rebuild",
    "replay",
    "run_search",
]

logger = logging.getLogger(__name__)


@runtime_checkable
class Strategy(Protocol):
    """A search algorithm with its settings: a frozen dataclass that validates itself.

    Attributes:
        name: its name in the table of strategies.
    """

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        ...

    def least_evaluations(self, num_steps: int) -> int:
        """Fewest evaluations of samples with which it can finish one.

        The account knows how many NFE one is, see :class:`~mctd_diffusers.search.budget.Account`.
        """
        ...

    def search(self, problem: Problem) -> Asks:
        """Coroutine that searches one image.

        It yields requests (or tuples of them, see :func:`gather`), is sent a reply for each, adds
        the samples it makes to ``problem.tree``, and returns when it has nothing more to do or its
        account pays for nothing more. Its return value is a :data:`StopReason`, or ``None`` for
        ``"budget"``.

        Raises:
            BudgetError: before the first request, where the budget cannot pay for one sample.
        """
        ...


class Finished(NamedTuple):
    """One finished sample.

    Attributes:
        node: its row in the tree.
        handle: the environment's id; the runner does not release it.
        reward: its score.
        nfe_when_found: evaluations spent on the image when it was scored.
    """

    node: int
    handle: int
    reward: float
    nfe_when_found: int


@dataclass
class SearchResult:
    """What the search of one image found and spent.

    Attributes:
        strategy: name of the strategy.
        problem: index of the image.
        tree: the search tree.
        finished: every finished sample, in the order of scoring.
        spent: useful work.
        stop_reason: why it ended.
        history: ``(nfe, best reward so far)`` at every sample that was better than those before.
        replies: the log of replies; :func:`replay` rebuilds the search from it.
        error: what ended it, where ``stop_reason`` is ``"error"`` and it was this image's own.
        moves_made: kinds of moves that the strategy chose, in order, where it chooses among them.
    """

    strategy: str
    problem: int
    tree: Tree
    finished: list[Finished]
    spent: Counts
    stop_reason: StopReason
    history: list[tuple[int, float]]
    replies: list[Reply]
    error: SearchError | None = None
    moves_made: Sequence[MoveMade] = ()

    @property
    def best(self) -> Finished | None:
        """The finished sample of the highest reward, the first of equals; ``None`` if none is."""
        return max(self.finished, key=lambda sample: sample.reward, default=None)


class Wave(NamedTuple):
    """What ``on_wave`` is told after each call of the environment that costs something.

    Attributes:
        kind: ``"denoise"``, ``"value"`` or ``"reward"``.
        size: samples in the call.
        handles: of those that were answered; still live.
        problems: the image of each.
        nfe: ``[problems]`` evaluations spent on each image so far.
        best: ``[problems]`` best reward of each image so far; ``None`` where none is finished.
    """

    kind: str
    size: int
    handles: Handles
    problems: list[int]
    nfe: list[int]
    best: list[float | None]


def run_search(
    strategy: Strategy,
    environment: Environment,
    problems: Sequence[Problem],
    *,
    seconds: float | None = None,
    on_wave: Callable[[Wave], None] | None = None,
    is_interrupted: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
    log: SearchLog | None = None,
) -> list[SearchResult]:
    """Search all ``problems`` with one strategy, in shared waves.

    Args:
        strategy: the algorithm and its settings.
        environment: the world; its ledger meters what each image spends.
        problems: the images; each with its own budget, of different ``index``.
        seconds: wall-clock bound for the call. When it is over, every image still completes its
            first finished sample, without further search; then the search stops.
        on_wave: called after each denoise, value or reward call; the log is whole then.
        is_interrupted: asked after ``on_wave``. Once it says so the search stops, when every image
            has completed its first finished sample, as for ``seconds``; ``stop_reason`` is
            ``"interrupted"``. The log ends there, so from it the search goes on.
        clock: seconds; a parameter for tests.
        log: is written. One that holds answers is read first, and the search goes on from there as
            if it had never stopped, bit for bit; ``environment`` must hold the samples that are
            live after the last answer, under their handles (``Environment.restore``).

    Returns:
        One result for each problem, in order.

    Raises:
        BudgetError: a budget cannot pay for one sample; before the first call of the environment.
        SearchError: an error inside the environment, when all images that it does not concern are
            searched to their ends; ``partial`` holds all results. Also a strategy that asks for
            more than its budget pays.
        ConfigError: the log does not fit: it is of another search.
        KeyboardInterrupt: Ctrl-C while no image had a finished sample; otherwise Ctrl-C ends the
            search with what is found, and ``stop_reason`` says so.
    """
    _check_indices(problems)
    if seconds is not None and seconds <= 0:
        raise ConfigError(f"time budget is {seconds!r} seconds; give a number above 0.")
    for problem in problems:
        check_budget(strategy, problem)
    images = [_Image(strategy, environment.ledger, problem) for problem in problems]
    queue = _Queue(images, environment.ledger, log, environment)
    log = queue.log
    started = 0.0 if seconds is None else clock() - log.seconds
    try:
        queue.start()
        while (kind := queue.next_kind()) is not None:
            leaves, is_new = queue.answer(kind)
            if kind in _CHEAP:
                continue
            is_timed = is_new and log.time_up_after is None and queue.stopped is None
            if seconds is not None and is_timed:
                log.seconds = clock() - started
                if log.seconds >= seconds:
                    log.time_up_after = queue.num_answers
            if log.time_up_after == queue.num_answers:
                queue.stop_early("time")
            if is_new and on_wave is not None:
                on_wave(_wave(kind, leaves, images))
            if is_new and is_interrupted is not None and is_interrupted():
                queue.stop_early("interrupted")
    except KeyboardInterrupt:
        if not any(image.finished for image in images):
            raise
        for image in images:
            image.stop("interrupted")
    except SearchError as error:
        for image in images:
            image.stop("error")
        error.partial = [image.result() for image in images]
        raise
    failed = [image.error for image in images if image.error is not None]
    if failed:
        failed[0].partial = [image.result() for image in images]
        raise failed[0]
    return [image.result() for image in images]


def rebuild(strategy: Strategy, problems: Sequence[Problem], log: SearchLog) -> list[SearchResult]:
    """Rebuild the search of all ``problems`` from its log, without an environment.

    Returns:
        One result for each problem, in order; ``stop_reason`` is ``"interrupted"`` where the log
        ends before the search.

    Raises:
        ConfigError: the log is of another search.
    """
    _check_indices(problems)
    ledger = Ledger()
    images = [_Image(strategy, ledger, problem) for problem in problems]
    queue = _Queue(images, ledger, log, None)
    queue.start()
    while queue.num_answers < len(log.answers) and (kind := queue.next_kind()) is not None:
        queue.answer(kind)
        if kind in _EXPENSIVE and log.time_up_after == queue.num_answers:
            queue.stop_early("time")
    for image in images:
        image.stop("interrupted")
    return [image.result() for image in images]


def _wave(kind: type[Request], leaves: Sequence[_Leaf], images: Sequence[_Image]) -> Wave:
    """What there is to say of a call that answered ``leaves``."""
    answered = [leaf for leaf in leaves if leaf.reply is not None]
    return Wave(
        kind=kind.__name__.lower(),
        size=sum(leaf.size for leaf in leaves),
        handles=_handles_of(answered) if answered else np.empty(0, dtype=np.int64),
        problems=[leaf.image.problem.index for leaf in answered for _ in range(leaf.size)],
        nfe=[image.problem.account.spent.nfe for image in images],
        best=[image.best_reward for image in images],
    )


def _check_indices(problems: Sequence[Problem]) -> None:
    indices = [problem.index for problem in problems]
    if len(set(indices)) != len(indices):
        raise ConfigError(f"problems have indices {indices}; each image needs its own.")


def check_budget(strategy: Strategy, problem: Problem) -> None:
    """Refuse a budget that cannot pay for one finished sample.

    Raises:
        BudgetError: names the budget, the least that works and the cure.
    """
    least = strategy.least_evaluations(problem.num_steps)
    price = problem.account.price(evaluations=least, rewards=1)
    if problem.account.affords(price):
        return
    budget = problem.budget
    if budget.nfe is not None and budget.nfe < price.nfe:
        raise BudgetError(
            f"a budget of {budget.nfe} NFE cannot finish one sample: {strategy.name!r} over "
            f"{problem.num_steps} steps needs at least {price.nfe} NFE; raise the budget, or use "
            "fewer steps."
        )
    raise BudgetError(
        f"a cost budget of {budget.cost:g} row-equivalents cannot finish one sample: "
        f"{strategy.name!r} over {problem.num_steps} steps needs at least "
        f"{problem.prices.cost(price):g} (decode and reward included); raise the budget, or use "
        "fewer steps."
    )


def replay(strategy: Strategy, problem: Problem, replies: Iterable[Reply]) -> Request | None:
    """Rebuild a search in ``problem`` from the log of its replies, without an environment.

    Args:
        strategy: the same settings as in the search that wrote the log.
        problem: as in that search, its tree untouched.
        replies: the log, ``SearchResult.replies``.

    Returns:
        The first request that the log does not answer; ``None`` if the search is over.
    """
    coroutine = strategy.search(problem)
    log = iter(replies)
    try:
        asked = next(coroutine)
        while True:
            answers = []
            for request in _leaves(asked):
                reply = next(log, None)
                if reply is None:
                    return request
                _record(problem, request, reply)
                answers.append(reply)
            asked = coroutine.send(_fold(asked, iter(answers)))
    except StopIteration:
        return None


_Asked: TypeAlias = Any
"""A request, or a tuple of what is asked (recursively)."""

_CHEAP: Final[tuple[type[Request], ...]] = (
    Release,
    Reset,
    Step,
    Renoise,
    Perturb,
    Fuse,
    RelativeChange,
    PredictGain,
)
_EXPENSIVE: Final[tuple[type[Request], ...]] = (Denoise, Value, Reward)


def _leaves(asked: _Asked) -> Iterator[Request]:
    """Requests of a nested tuple, left to right."""
    if isinstance(asked, tuple):
        for part in asked:
            yield from _leaves(part)
    else:
        yield asked


def _fold(asked: _Asked, replies: Iterator[Reply]) -> Any:
    """Replies in the nesting of what was asked."""
    if isinstance(asked, tuple):
        return tuple(_fold(part, replies) for part in asked)
    return next(replies)


def _record(problem: Problem, request: Request, reply: Reply) -> None:
    """Write what the world answered into the account and the tree."""
    problem.account.update(reply.spent)
    if isinstance(request, Denoise):
        record_evaluated(problem.tree, request.handles)
    elif isinstance(request, Value):
        record_values(problem.tree, request.handles, reply.result)
    elif isinstance(request, Reward):
        record_rewards(problem.tree, request.handles, reply.result)


def _size(request: Request) -> int:
    """Samples that a request names."""
    if isinstance(request, Reset):
        return len(request.seeds)
    if isinstance(request, Step):
        return len(request.parents)
    if isinstance(request, Fuse):
        return len(request.groups)
    return len(request.handles)


class _Leaf:
    """A pending request of one image, and in the end its reply."""

    __slots__ = ("image", "kind", "reply", "request", "size")

    def __init__(self, image: _Image, request: Request) -> None:
        self.image = image
        self.request: Any = request
        self.kind = type(request)
        self.size = _size(request)
        self.reply: Reply | None = None


class _Image:
    """One image under search: its coroutine, what it waits for, and what it has found."""

    def __init__(self, strategy: Strategy, ledger: Ledger, problem: Problem) -> None:
        self.problem = problem
        self.finished: list[Finished] = []
        self.history: list[tuple[int, float]] = []
        self.best_reward: float | None = None
        self.replies: list[Reply] = []
        self.error: SearchError | None = None
        self.before = ledger.spent(problem.index)
        self._name = strategy.name
        self._coroutine = strategy.search(problem)
        self._asked: _Asked = None
        self._open: list[_Leaf] = []
        self._num_open = 0
        self._stop_reason: StopReason | None = None

    def spent(self, ledger: Ledger) -> Counts:
        """Useful work since the search began."""
        spent = ledger.spent(self.problem.index)
        return spent - self.before if self.before.rows else spent

    def start(self) -> list[_Leaf]:
        """Run up to the first requests."""
        return self._advance(None)

    def take(self, leaf: _Leaf, reply: Reply) -> list[_Leaf]:
        """Record the answer to one leaf; returns the next requests if it was the last one open."""
        leaf.reply = reply
        _record(self.problem, leaf.request, reply)
        if isinstance(leaf.request, Reward):
            self._keep(leaf.request.handles, reply.result, reply.spent.nfe)
        self._num_open -= 1
        if self._num_open:
            return []
        replies = [leaf.reply for leaf in self._open if leaf.reply is not None]
        self.replies.extend(replies)
        return self._advance(_fold(self._asked, iter(replies)))

    def stop(self, reason: StopReason) -> None:
        """End the search where it stands; nothing if it is over."""
        if self._stop_reason is None:
            self._stop_reason = reason
            self._coroutine.close()

    def fail(self, error: SearchError) -> None:
        """End the search for what went wrong with this image alone."""
        self.error = error
        self.stop("error")

    def stop_early(self, reason: StopReason) -> list[_Leaf]:
        """End the search, or let it complete its first sample; returns the requests for that."""
        if self._stop_reason is not None:
            return []
        if self.finished:
            self.stop(reason)
            return []
        self._coroutine.close()
        self._coroutine = self._complete_first(reason)
        return self._advance(None)

    def result(self) -> SearchResult:
        """What was found and spent."""
        return SearchResult(
            strategy=self._name,
            problem=self.problem.index,
            tree=self.problem.tree,
            finished=self.finished,
            spent=self.problem.account.spent,
            stop_reason=self._stop_reason or "budget",
            history=self.history,
            replies=self.replies,
            error=self.error,
            moves_made=self.problem.moves_made,
        )

    def _complete_first(self, reason: StopReason) -> Asks:
        yield from complete(self.problem)
        return reason

    def _advance(self, replies: Any) -> list[_Leaf]:
        """Send the replies; returns the next requests, checked against the budget."""
        try:
            self._asked = self._coroutine.send(replies)
        except StopIteration as stop:
            self._stop_reason = stop.value or "budget"
            return []
        self._open = [_Leaf(self, request) for request in _leaves(self._asked)]
        self._num_open = len(self._open)
        self._check_affordable()
        if not self._open:  # an empty gather: nothing to wait for
            return self._advance(_fold(self._asked, iter(())))
        return self._open

    def _check_affordable(self) -> None:
        evaluations = values = rewards = particles = 0
        for leaf in self._open:
            if leaf.kind is Denoise:
                evaluations += leaf.size
            elif leaf.kind is Value:
                values += leaf.size
            elif leaf.kind is Reward:
                rewards += leaf.size
            elif leaf.kind is Fuse:
                particles += sum(map(len, leaf.request.groups))
        account = self.problem.account
        price = account.price(evaluations=evaluations, values=values, rewards=rewards)
        if particles:
            price += self.problem.fusion_spends * particles
        if (evaluations or values or rewards or particles) and not account.affords(price):
            raise SearchError(
                f"strategy {self._name!r} asks for {price.nfe} NFE, {values} values, {rewards} "
                f"rewards and to fuse {particles} particles on image {self.problem.index}, with "
                f"{account.spent.nfe} NFE spent of {account.budget}; ask account.affords() first.",
            )

    def _keep(self, handles: Handles, rewards: Values, nfe: int) -> None:
        for handle, reward in zip(handles.tolist(), rewards.tolist(), strict=True):
            sample = Finished(self.problem.tree.node_of(handle), handle, reward, nfe)
            self.finished.append(sample)
            if self.best_reward is None or sample.reward > self.best_reward:
                self.best_reward = sample.reward
                self.history.append((nfe, sample.reward))


class _Queue:
    """Pending requests of all images, by kind, and the log by which they are answered first."""

    def __init__(
        self,
        images: Sequence[_Image],
        ledger: Ledger,
        log: SearchLog | None,
        environment: Environment | None,
    ) -> None:
        self.log = SearchLog() if log is None else log
        self.num_answers = 0
        self._images = images
        self._is_logged = log is not None
        self._ledger = ledger
        self._before = ledger.total
        self._environment = environment
        self._leaves: dict[type[Request], list[_Leaf]] = {
            kind: [] for kind in (*_CHEAP, *_EXPENSIVE)
        }
        self._num_samples = dict.fromkeys(_EXPENSIVE, 0)
        self._aside: dict[_Image, list[_Leaf]] = {}
        self.stopped: StopReason | None = None

    def start(self) -> None:
        """Let every image ask for the first time."""
        for image in self._images:
            self._add(image.start())

    def stop_early(self, reason: StopReason) -> None:
        """Forget what is pending, and let every image complete its first sample; once.

        What is interrupted goes on from its log, which an interruption therefore ends.
        """
        if self.stopped is not None:
            return
        self.stopped = reason
        self._is_logged = self._is_logged and reason != "interrupted"
        self._replace_leaves([])
        for image in self._images:
            if image not in self._aside:
                self._add(image.stop_early(reason))

    def next_kind(self) -> type[Request] | None:
        """Kind to answer now: any cheap one, else the expensive one with the most samples."""
        if self._aside and self._log_is_read:
            self._take_up_again()
        for kind in _CHEAP:
            if self._leaves[kind]:
                return kind
        kind = max(_EXPENSIVE, key=lambda kind: self._num_samples[kind])
        if self._leaves[kind]:
            return kind
        return next((kind for kind in _EXPENSIVE if self._leaves[kind]), None)

    def answer(self, kind: type[Request]) -> tuple[list[_Leaf], bool]:
        """Answer all pending requests of a kind in one call.

        Returns:
            The requests, and whether the environment was asked, not the log.
        """
        leaves = self._leaves[kind]
        self._leaves[kind] = []
        if kind in self._num_samples:
            self._num_samples[kind] = 0
        is_new = self._log_is_read
        replies = self._ask(kind, leaves) if is_new else self._read(kind, leaves)
        for leaf, reply in zip(leaves, replies, strict=True):
            if reply is not None:
                self._add(leaf.image.take(leaf, reply))
            else:
                self._aside.setdefault(leaf.image, []).append(leaf)
        if None in replies:
            self._put_aside()
        return leaves, is_new

    @property
    def _log_is_read(self) -> bool:
        return self.num_answers == len(self.log.answers)

    def _add(self, leaves: Iterable[_Leaf]) -> None:
        """Append pending requests."""
        for leaf in leaves:
            self._leaves[leaf.kind].append(leaf)
            if leaf.kind in self._num_samples:
                self._num_samples[leaf.kind] += leaf.size

    def _replace_leaves(self, leaves: Iterable[_Leaf]) -> None:
        """Let other requests be pending than before."""
        for kind in self._leaves:
            self._leaves[kind] = []
        self._num_samples = dict.fromkeys(_EXPENSIVE, 0)
        self._add(leaves)

    def _put_aside(self) -> None:
        """Take what images that failed have still pending out of the waves."""
        pending = [leaf for leaves in self._leaves.values() for leaf in leaves]
        for leaf in pending:
            if leaf.image in self._aside:
                self._aside[leaf.image].append(leaf)
        self._replace_leaves(leaf for leaf in pending if leaf.image not in self._aside)

    def _take_up_again(self) -> None:
        """Ask again what failed when the log was written; what failed now is over."""
        aside, self._aside = self._aside, {}
        for image, leaves in aside.items():
            if image.error is None:
                self._add(leaves if self.stopped is None else image.stop_early(self.stopped))

    def _ask(self, kind: type[Request], leaves: list[_Leaf]) -> list[Reply | None]:
        """Replies of the environment, and the log's next entry; ``None`` where an image failed."""
        results = self._results(kind, leaves)
        spent = {leaf.image: leaf.image.spent(self._ledger) for leaf in leaves}
        if self._is_logged and any(result is not _FAILED for result in results):
            self.log.answers.append(
                Answer(
                    kind.__name__.lower(),
                    _checksum_of(leaves),
                    _joined(kind, leaves, results),
                    np.array([result is not _FAILED for result in results]),
                    np.stack([row_of(spent[leaf.image]) for leaf in leaves]),
                    row_of(self._ledger.total - self._before),
                )
            )
            self.num_answers += 1
        return [
            None if result is _FAILED else Reply(result, spent[leaf.image])
            for leaf, result in zip(leaves, results, strict=True)
        ]

    def _results(self, kind: type[Request], leaves: list[_Leaf]) -> list[Any]:
        """What the environment says to each request; ``_FAILED`` where it fails for that image."""
        assert self._environment is not None
        before = dict(self._ledger.by_problem)
        try:
            return _call(self._environment, kind, leaves)
        except SearchError as error:
            # What the failed call did is spent in all, but by no image.
            self._ledger.by_problem = before
            images = list(dict.fromkeys(leaf.image for leaf in leaves))
            if len(images) == 1:
                if len(self._images) > 1:
                    logger.warning("image %d is left out: %s", images[0].problem.index, error)
                images[0].fail(error)
                return [_FAILED] * len(leaves)
        # One image's trouble is not another's: each is asked for by itself.
        found: dict[_Leaf, Any] = {}
        for image in images:
            mine = [leaf for leaf in leaves if leaf.image is image]
            found |= zip(mine, self._results(kind, mine), strict=True)
        return [found[leaf] for leaf in leaves]

    def _read(self, kind: type[Request], leaves: list[_Leaf]) -> list[Reply | None]:
        """Replies of the log's next entry, which brings the ledger to where it stood."""
        entry = self.log.answers[self.num_answers]
        self.num_answers += 1
        asked = kind.__name__.lower()
        if (entry.kind, entry.checksum) != (asked, _checksum_of(leaves)):
            raise ConfigError(
                f"the log does not fit the search: its answer {self.num_answers} is to another "
                f"request ({entry.kind}) than this search asks ({asked}); resume it with the "
                "strategy, the budget and the version that it was saved with."
            )
        replies: list[Reply | None] = []
        offset = 0
        for leaf, is_answered, row in zip(leaves, entry.answered, entry.spent, strict=True):
            if not is_answered:
                replies.append(None)
                continue
            end = offset + _num_logged(leaf)
            result = _read_result(leaf, entry.result[offset:end])
            offset = end
            spent = counts_of(row)
            self._ledger.by_problem[leaf.image.problem.index] = leaf.image.before + spent
            replies.append(Reply(result, spent))
        self._ledger.total = self._before + counts_of(entry.total)
        return replies


_FAILED: Final = object()
"""In the place of a result: the call failed for this image."""

_WITHOUT_RESULT: Final = (Denoise, Release)


def _call(environment: Environment, kind: type[Request], leaves: Sequence[_Leaf]) -> list[Any]:
    """One call for requests of a kind; returns the part of each."""
    sizes = [leaf.size for leaf in leaves]
    result = _CALLS[kind](environment, leaves, sizes)
    if result is None:
        return [None] * len(leaves)
    if isinstance(result, list):
        return result
    parts, start = [], 0
    for size in sizes:
        parts.append(result[start : start + size])
        start += size
    return parts


def _joined(
    kind: type[Request], leaves: Sequence[_Leaf], results: Sequence[Any]
) -> npt.NDArray[Any]:
    """What an entry of the log keeps, flat: results, or the handles that were released."""
    empty = np.empty(0, dtype=np.int64)
    if kind is Denoise:
        return empty
    if kind is Release:
        return _handles_of(leaves)
    flat: Callable[[Any], npt.NDArray[Any]] = np.asarray
    if kind is PredictGain:
        flat = np.ravel
    elif kind is Fuse:
        flat = flat_fusions
    parts = [flat(result) for result in results if result is not _FAILED]
    return np.concatenate(parts) if parts else empty


def _num_logged(leaf: _Leaf) -> int:
    """Numbers by which an entry of the log answers a request."""
    if leaf.kind is PredictGain:
        return len(Gains._fields) * leaf.size * len(leaf.request.strides)
    if leaf.kind is Fuse:
        return len(Fusions._fields) * leaf.size
    return leaf.size


def _read_result(leaf: _Leaf, logged: npt.NDArray[Any]) -> Any:
    """The result of a request from its numbers in an entry of the log."""
    if leaf.kind in _WITHOUT_RESULT:
        return None
    if leaf.kind is PredictGain:
        return Gains(*logged.reshape(len(Gains._fields), leaf.size, len(leaf.request.strides)))
    if leaf.kind is Fuse:
        return read_fusions(logged)
    return logged


def _checksum_of(leaves: Sequence[_Leaf]) -> int:
    """Checksum of requests and of the images that ask them."""
    return checksum(
        part for leaf in leaves for part in (leaf.image.problem.index, *vars(leaf.request).values())
    )


def _handles_of(leaves: Sequence[_Leaf]) -> npt.NDArray[np.int64]:
    """Handles that requests of one kind name, in one array."""
    return np.concatenate([np.asarray(leaf.request.handles, dtype=np.int64) for leaf in leaves])


def _call_reset(
    environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]
) -> npt.NDArray[np.int64]:
    indices = [leaf.image.problem.index for leaf in leaves]
    seeds = np.concatenate([leaf.request.seeds for leaf in leaves])
    return environment.reset(np.repeat(np.array(indices, dtype=np.int64), sizes), seeds)


def _call_step(
    environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]
) -> npt.NDArray[np.int64]:
    del sizes
    requests: list[Step] = [leaf.request for leaf in leaves]
    actions: list[Action] = [action for request in requests for action in request.actions]
    return environment.step(
        np.concatenate([request.parents for request in requests]),
        actions,
        np.concatenate([request.seeds for request in requests]),
    )


def _call_renoise(
    environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]
) -> npt.NDArray[np.int64]:
    requests: list[Renoise] = [leaf.request for leaf in leaves]
    starts = np.cumsum([0, *sizes])
    handles = np.empty(starts[-1], dtype=np.int64)
    for step_index in sorted({request.step_index for request in requests}):
        chosen = [i for i, request in enumerate(requests) if request.step_index == step_index]
        made = environment.renoise(
            np.concatenate([requests[i].handles for i in chosen]),
            step_index,
            np.concatenate([requests[i].seeds for i in chosen]),
        )
        where = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
        handles[where] = made
    return handles


def _call_perturb(
    environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]
) -> npt.NDArray[np.int64]:
    strengths = np.array([leaf.request.strength for leaf in leaves], dtype=np.float64)
    seeds = np.concatenate([leaf.request.seeds for leaf in leaves])
    return environment.perturb(_handles_of(leaves), np.repeat(strengths, sizes), seeds)


def _call_fuse(
    environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]
) -> list[Fusions]:
    requests: list[Fuse] = [leaf.request for leaf in leaves]
    fusions = environment.fuse(
        [group for request in requests for group in request.groups],
        [weights for request in requests for weights in request.weights],
        [request.method for request in requests for _ in request.groups],
        np.concatenate([request.seeds for request in requests]),
        [request.guidance for request in requests for _ in request.groups],
    )
    ends = np.cumsum(sizes)[:-1]
    return [
        Fusions(*part) for part in zip(*(np.split(part, ends) for part in fusions), strict=True)
    ]


def _call_relative_change(
    environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]
) -> npt.NDArray[np.float64]:
    del sizes
    return environment.relative_change(_handles_of(leaves))


def _call_predict_gain(
    environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]
) -> list[Gains]:
    """One call for the requests of equal strides."""
    del sizes
    found: dict[_Leaf, Gains] = {}
    for strides in dict.fromkeys(leaf.request.strides for leaf in leaves):
        mine = [leaf for leaf in leaves if leaf.request.strides == strides]
        gains = np.array(environment.predict_gain(_handles_of(mine), strides), dtype=np.float64)
        ends = np.cumsum([leaf.size for leaf in mine])[:-1]
        parts = np.split(gains, ends, axis=1)
        found |= {leaf: Gains(*part) for leaf, part in zip(mine, parts, strict=True)}
    return [found[leaf] for leaf in leaves]


def _call_denoise(environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]) -> None:
    del sizes
    environment.denoise(_handles_of(leaves))


def _call_value(
    environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]
) -> npt.NDArray[np.float64]:
    guidances = [
        leaf.request.guidance for leaf, size in zip(leaves, sizes, strict=True) for _ in range(size)
    ]
    return environment.value(_handles_of(leaves), guidances)


def _call_reward(
    environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]
) -> npt.NDArray[np.float64]:
    del sizes
    return environment.reward(_handles_of(leaves))


def _call_release(environment: Environment, leaves: Sequence[_Leaf], sizes: Sequence[int]) -> None:
    del sizes
    environment.release(_handles_of(leaves))


_CALLS: Final[dict[type[Request], Callable[[Environment, Sequence[_Leaf], Sequence[int]], Any]]] = {
    Release: _call_release,
    Reset: _call_reset,
    Step: _call_step,
    Renoise: _call_renoise,
    Perturb: _call_perturb,
    Fuse: _call_fuse,
    RelativeChange: _call_relative_change,
    PredictGain: _call_predict_gain,
    Denoise: _call_denoise,
    Value: _call_value,
    Reward: _call_reward,
}

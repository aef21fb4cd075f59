"""The log of a search: every answer of the environment, from which the search can be run again.

A strategy has no other source of chance, time or cost than its problem and its replies. So with
its settings, its seeds and this log a search can be run again without an environment: it asks the
same requests in the same order, is answered from the log, and stands where it stood, with the same
tree, account and ledger. ``run_search(log=...)`` reads a log to its end, and writes on from there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, fields
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import REJECTED, Counts, Fusions, Handles

COUNTS: Final = tuple(part.name for part in fields(Counts))
"""Columns of ``spent`` and ``total`` of an :class:`Answer`."""

_NEW_HANDLES: Final = frozenset({"reset", "step", "renoise", "perturb"})


class Answer(NamedTuple):
    """One call of the environment, for requests of one kind that were merged.

    Attributes:
        kind: ``"denoise"``, ``"step"``, ...: the request's name.
        checksum: of what was asked, see :func:`checksum`.
        result: ``[samples]`` new handles or values; of a release the handles released; ``[0]`` of
            a denoise; of predicted gains each request's ``[fields * samples * strides]``, and of
            fusions ``[groups * fields]``, flat. Only of the requests that were answered.
        answered: ``[requests]`` False where the call failed for the image that asked.
        spent: ``[requests, counts]`` useful work for the image of each request since its search
            began, this call included; columns are :data:`COUNTS`.
        total: ``[counts]`` the same for all images together, padding and calls included.
    """

    kind: str
    checksum: int
    result: npt.NDArray[Any]
    answered: npt.NDArray[np.bool_]
    spent: npt.NDArray[np.int64]
    total: npt.NDArray[np.int64]


@dataclass
class SearchLog:
    """Every answer that the images of a search were given, in order.

    Attributes:
        answers: one for each call of the environment, cheap ones too.
        seconds: wall-clock seconds of search up to the last answer.
        time_up_after: answers that were given when the search's seconds were up; ``None`` if they
            are not.
    """

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    time_up_after: int | None = None

    def live_handles(self) -> Handles:
        """Handles that were given and are not released, in ascending order."""
        gone = [answer.result for answer in self.answers if answer.kind == "release"]
        return np.setdiff1d(self._given_handles(), _joined(gone))

    @property
    def num_handles(self) -> int:
        """How many handles the environment has given, released ones included."""
        return int(self._given_handles().max(initial=-1)) + 1

    def _given_handles(self) -> Handles:
        """Handles that were given, in the order of time."""
        given = [answer.result for answer in self.answers if answer.kind in _NEW_HANDLES]
        fused = [
            read_fusions(answer.result).handles for answer in self.answers if answer.kind == "fuse"
        ]
        handles = _joined([*given, *fused])
        return handles[handles != REJECTED]


def checksum(asked: Iterable[Any]) -> int:
    """CRC-32 of what requests ask: arrays of handles and seeds, and plain values.

    >>> checksum([np.array([1, 2]), 0.5]) == checksum([np.array([1, 2]), 0.5])
    True
    >>> checksum([np.array([1, 2]), 0.5]) == checksum([np.array([2, 1]), 0.5])
    False
    """
    found = 0
    for part in asked:
        for each in part if _are_arrays(part) else (part,):
            is_array = isinstance(each, np.ndarray)
            found = zlib.crc32(each.tobytes() if is_array else repr(each).encode(), found)
    return found


def _are_arrays(part: Any) -> bool:
    """Whether this is a tuple of arrays, whose every bit counts."""
    return isinstance(part, tuple) and any(isinstance(each, np.ndarray) for each in part)


def flat_fusions(fusions: Fusions) -> npt.NDArray[np.float64]:
    """Fusions as an :class:`Answer` keeps them, ``[groups * fields]``; doubles hold handles."""
    return np.stack(fusions, axis=1).astype(np.float64).ravel()


def read_fusions(logged: npt.NDArray[Any]) -> Fusions:
    """Reverse of :func:`flat_fusions`."""
    handles, verdicts, correlations = logged.reshape(-1, len(Fusions._fields)).T
    return Fusions(handles.astype(np.int64), verdicts.astype(np.int64), correlations.copy())


def row_of(counts: Counts) -> npt.NDArray[np.int64]:
    """Counts as a row of an :class:`Answer`."""
    return np.array(astuple(counts), dtype=np.int64)


def counts_of(row: npt.NDArray[np.int64]) -> Counts:
    """Reverse of :func:`row_of`."""
    return Counts(*row.tolist())


def to_arrays(log: SearchLog) -> dict[str, npt.NDArray[Any]]:
    """The answers as a few long arrays, for `numpy.savez`; floats keep every bit."""
    answers = log.answers
    results = [answer.result for answer in answers]
    is_value = [result.dtype == np.float64 for result in results]
    spent = [answer.spent for answer in answers]
    return {
        "counts": np.array(COUNTS),
        "kind": np.array([answer.kind for answer in answers], dtype="U16"),
        "checksum": np.array([answer.checksum for answer in answers], dtype=np.uint32),
        "is_value": np.array(is_value, dtype=np.bool_),
        "num_samples": np.array([len(result) for result in results], dtype=np.int64),
        "num_requests": np.array([len(rows) for rows in spent], dtype=np.int64),
        "answered": np.concatenate(
            [np.empty(0, dtype=np.bool_), *(answer.answered for answer in answers)]
        ),
        "handles": _joined([r for r, value in zip(results, is_value, strict=True) if not value]),
        "values": np.concatenate(
            [np.empty(0), *(r for r, value in zip(results, is_value, strict=True) if value)]
        ),
        "spent": np.concatenate([np.empty((0, len(COUNTS)), dtype=np.int64), *spent]),
        "total": np.array([answer.total for answer in answers], dtype=np.int64),
    }


def from_arrays(arrays: Any) -> list[Answer]:
    """The answers that :func:`to_arrays` wrote, from any mapping of arrays.

    Raises:
        ConfigError: they were written with other counts.
    """
    if tuple(arrays["counts"].tolist()) != COUNTS:
        raise ConfigError(
            f"the log counts {', '.join(arrays['counts'].tolist())}, this package counts "
            f"{', '.join(COUNTS)}: resume it with the version that wrote it"
        )
    flat = {False: arrays["handles"], True: arrays["values"]}
    read = {False: 0, True: 0}
    answered, spent, total = arrays["answered"], arrays["spent"], arrays["total"]
    answers = []
    row = 0
    for i, (kind, checked, is_value, num_samples, num_requests) in enumerate(
        zip(
            arrays["kind"].tolist(),
            arrays["checksum"].tolist(),
            arrays["is_value"].tolist(),
            arrays["num_samples"].tolist(),
            arrays["num_requests"].tolist(),
            strict=True,
        )
    ):
        result = flat[is_value][read[is_value] : read[is_value] + num_samples]
        read[is_value] += num_samples
        rows = slice(row, row + num_requests)
        answers.append(Answer(kind, checked, result, answered[rows], spent[rows], total[i]))
        row += num_requests
    return answers


def _joined(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])

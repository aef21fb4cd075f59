"""The folder of a saved search: its settings, its seeds, the log, and the live samples beside it.

::

    search.json     what was called; names the two files that belong to it
    log-N.npz       every answer of the environment until then (`search/log.py`)
    samples-N       the samples that are live after them, written by whoever knows the environment

A folder is written again and again while a search runs, and is whole at any time: new files come
first, then ``search.json`` is replaced in one go, then the files before it are taken away. Floats
keep every bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.budget import Budget, StopReason
from mctd_diffusers.search.environment import Counts, Prices
from mctd_diffusers.search.log import SearchLog, from_arrays, to_arrays
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import SearchResult, Strategy, rebuild
from mctd_diffusers.search.strategies import STRATEGIES
from mctd_diffusers.search.with_plain import WithPlain

FORMAT: Final = 3
INDEX: Final = "search.json"


@dataclass(frozen=True)
class SavedSearch:
    """A search as it was saved, finished or not.

    Attributes:
        folder: where it lies.
        strategy: the search with its settings.
        problems: one an image, their trees untouched.
        log: every answer until then.
        stop_reasons: why each image's search ended; ``None`` where it has not.
        call: what the one who saved it needs to set up its world again; plain data. Where its
            ``"with_plain"`` is true, the second half of the problems made the plain samples.
        samples: file of the samples that are live after the last answer.
    """

    folder: Path
    strategy: Strategy
    problems: tuple[Problem, ...]
    log: SearchLog
    stop_reasons: tuple[StopReason | None, ...]
    call: dict[str, Any]
    samples: Path

    @property
    def is_over(self) -> bool:
        """Whether every image's search has ended."""
        return None not in self.stop_reasons

    def results(self) -> list[SearchResult]:
        """What was found until then: trees, finished samples and spending, rebuilt from the log.

        One a problem, so with the plain samples, where they were made too, after the images.

        No model is needed and none is called. ``stop_reason`` is ``"interrupted"`` where the search
        was under way.

        Raises:
            ConfigError: the log does not fit the strategy: another version wrote it.
        """
        strategy = self.strategy
        if self.call.get("with_plain"):
            strategy = WithPlain(strategy, len(self.problems) // 2)
        return rebuild(strategy, [_untouched(problem) for problem in self.problems], self.log)


def save_search(
    folder: str | os.PathLike[str],
    *,
    strategy: Strategy,
    problems: Sequence[Problem],
    log: SearchLog,
    stop_reasons: Sequence[StopReason | None],
    call: dict[str, Any],
    write_samples: Callable[[Path], None],
) -> None:
    """Write a search into a folder, in the place of what was saved there before.

    Args:
        folder: made if it does not exist.
        strategy: the search with its settings.
        problems: one an image.
        log: every answer so far.
        stop_reasons: why each image's search ended; ``None`` where it has not.
        call: plain data (JSON) by which the world can be set up again.
        write_samples: writes a file with the samples of ``log.live_handles()``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = _index_of(folder)
    number = before.get("number", -1) + 1
    files = {"log": f"log-{number}.npz", "samples": f"samples-{number}"}
    with (folder / files["log"]).open("wb") as file:
        np.savez(file, allow_pickle=False, **to_arrays(log))
        _flush(file)
    write_samples(folder / files["samples"])
    index = {
        "format": FORMAT,
        "number": number,
        "strategy": {"name": strategy.name, "settings": settings_of(strategy)},
        "problems": [_problem_as_data(problem) for problem in problems],
        "seconds": log.seconds,
        "time_up_after": log.time_up_after,
        "stop_reasons": list(stop_reasons),
        "files": files,
        "call": call,
    }
    new = folder / f"{INDEX}.new"
    with new.open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1, default=_as_python)
        _flush(file)
    new.replace(folder / INDEX)
    for name in before.get("files", {}).values():
        (folder / name).unlink(missing_ok=True)


def load_search(folder: str | os.PathLike[str], *, strategy: Strategy | None = None) -> SavedSearch:
    """Read a saved search.

    Args:
        folder: that ``save_to=...`` of a pipeline's call, or :func:`save_search`, wrote.
        strategy: needed where the search is a strategy of your own; must have its settings.

    Raises:
        ConfigError: there is no saved search, it is of another version, or ``strategy`` is another.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        if index["format"] != FORMAT:
            raise ConfigError(
                f"the search in {str(folder)!r} is saved in format {index['format']}, this package "
                f"reads format {FORMAT}: resume it with the version that wrote it"
            )
        with np.load(folder / index["files"]["log"], allow_pickle=False) as arrays:
            answers = from_arrays(arrays)
        return SavedSearch(
            folder=folder,
            strategy=_strategy_of(index["strategy"], strategy),
            problems=tuple(_problem_of(entry) for entry in index["problems"]),
            log=SearchLog(answers, index["seconds"], index["time_up_after"]),
            stop_reasons=tuple(index["stop_reasons"]),
            call=index["call"],
            samples=folder / index["files"]["samples"],
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"no saved search is in {str(folder)!r} ({Path(error.filename).name} is missing): name "
            "the folder that save_to=... wrote"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"the saved search in {str(folder)!r} cannot be read ({error!r}): take the folder as "
            "it was written"
        ) from error


def has_saved_search(folder: str | os.PathLike[str]) -> bool:
    """Whether a search was saved into ``folder``."""
    return (Path(folder) / INDEX).is_file()


def settings_of(strategy: Strategy) -> dict[str, Any] | None:
    """Settings of a strategy as plain data; ``None`` where it is none of the box."""
    if type(strategy) is not STRATEGIES.get(strategy.name):
        return None
    settings: Any = strategy  # all in the table are dataclasses
    return {part.name: getattr(strategy, part.name) for part in fields(settings) if part.init}


def _strategy_of(saved: dict[str, Any], given: Strategy | None) -> Strategy:
    """The strategy that was saved, which one given must be equal to."""
    name, settings = saved["name"], saved["settings"]
    if settings is None:
        if given is None or given.name != name:
            raise ConfigError(
                f"the search {name!r} is a strategy of your own, which no folder can hold: pass it "
                "as search=..., with the settings that it had"
            )
        return given
    kept = {key: tuple(of) if isinstance(of, list) else of for key, of in settings.items()}
    strategy = STRATEGIES[name](**kept)
    if given is not None and given != strategy:
        raise ConfigError(
            f"the saved search is {strategy!r}, and {given!r} is another: leave it out, a search "
            "goes on as it began"
        )
    return strategy


def _problem_as_data(problem: Problem) -> dict[str, Any]:
    entries = {part.name: getattr(problem, part.name) for part in fields(problem) if part.init}
    return {name: asdict(of) if is_dataclass(of) else of for name, of in entries.items()}  # type: ignore[arg-type]  # no class is an entry


def _problem_of(saved: dict[str, Any]) -> Problem:
    kinds = {
        "budget": Budget,
        "prices": Prices,
        "value_spends": Counts,
        "reward_spends": Counts,
        "fusion_spends": Counts,
    }
    read = {name: kinds[name](**of) if name in kinds else of for name, of in saved.items()}
    if read.get("stride_costs") is not None:
        read["stride_costs"] = tuple(map(tuple, read["stride_costs"]))
    return Problem(**read)


def _untouched(problem: Problem) -> Problem:
    return _problem_of(_problem_as_data(problem))


def _index_of(folder: Path) -> dict[str, Any]:
    """What ``search.json`` in ``folder`` says; empty if there is none."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return index


def _as_python(number: Any) -> Any:
    """The Python number of one of numpy's, which JSON does not know."""
    if isinstance(number, np.generic):
        return number.item()
    raise TypeError(f"{number!r} is no plain data")


def _flush(file: Any) -> None:
    """Have the disk hold it before anything refers to it."""
    file.flush()
    os.fsync(file.fileno())

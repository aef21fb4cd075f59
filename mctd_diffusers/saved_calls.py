"""Saved calls of a pipeline: what sets up the world of a saved search again, and writes it.

Beside the search itself (`search/saving.py`) a folder holds the arguments of the call, the first
noises, and the live samples with what the network said of them. Models and rewards are not in it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mctd_diffusers.calls import SearchCall, SearchOptions, World
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.results import CALLBACK_ARGUMENTS, TEXT_ARGUMENTS, unheld_arguments
from mctd_diffusers.search.budget import StopReason
from mctd_diffusers.search.environment import Handles, Prices
from mctd_diffusers.search.log import SearchLog
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.saving import SavedSearch, has_saved_search, save_search

logger = logging.getLogger(__name__)

_STOCK: Final = (*TEXT_ARGUMENTS, "num_images_per_prompt", "output_type", "return_dict")
_OPTIONS: Final = (
    *("compute", "nfe_budget", "cost_budget", "time_budget_s", "include_plain"),
    *("online_ige", "offload_latents", "half_latents"),
)
_SHARE: Final = 0.1  # of the time may go into saving
_SAME: Final = 0.02  # relative difference up to which two answers may be of one model


@dataclass(frozen=True)
class OpenSearch:
    """A saved call whose world is set up again, its live samples under their handles.

    Attributes:
        saved: the search itself.
        call: set up as it was; ``call.world.environment`` goes on from the last answer.
    """

    saved: SavedSearch
    call: SearchCall


class CallSaver:
    """Writes one search into a folder while it runs.

    Args:
        folder: where to.
        every_s: seconds between two saves, at least; longer where saving takes more than a tenth of
            the time. 0 saves after every wave.
        call: that is searched.
        log: that the search writes.
    """

    def __init__(
        self, folder: str | os.PathLike[str], every_s: float, call: SearchCall, log: SearchLog
    ) -> None:
        self.log = log
        self._folder = folder
        self._every_s = every_s
        self._call = call
        world = call.world
        self._settings = {
            "pipeline": world.settings[0]["pipeline"],
            "stock": {name: call.stock[name] for name in _STOCK if name in call.stock},
            "options": {name: getattr(call.options, name) for name in _OPTIONS},
            "reward_prompts": world.prompts,
            "seconds": call.seconds,
            "prices": asdict(world.prices),
            "with_plain": world.with_plain,
            "settings": world.settings,
            "log_snr": world.stepper.log_snr.tolist(),
            "head": world.head,
        }
        self._next = time.monotonic() + every_s

    def save_if_due(self) -> None:
        """Save if the last time is long enough ago."""
        if time.monotonic() >= self._next:
            self.save()

    def save(self, stop_reasons: Sequence[StopReason | None] | None = None) -> None:
        """Save now, with why each search ended; ``None`` where it can go on."""
        started = time.monotonic()
        world = self._call.world
        counted = {
            "decode": world.decoder,
            "preview": world.preview,
            "reward": world.counted_reward,
        }
        measured = {
            "seconds_by_phase": world.environment.ledger.seconds,
            "rows_by_phase": world.environment.ledger.rows_by_phase,
            "counted_rows": {name: part.rows for name, part in counted.items() if part is not None},
        }
        save_search(
            self._folder,
            strategy=self._call.strategy,
            problems=self._call.problems,
            log=self.log,
            stop_reasons=stop_reasons or [None] * len(self._call.problems),
            call=self._settings | measured,
            write_samples=self._write_samples,
        )
        taken = time.monotonic() - started
        pause = 0.0 if not self._every_s else max(self._every_s, taken * (1 / _SHARE - 1))
        self._next = time.monotonic() + pause

    def save_results(self, results: Sequence[SearchResult]) -> None:
        """Save what a search came to; where it was stopped, or failed, it can go on."""
        self.save(
            [
                None if result.stop_reason in ("interrupted", "error") else result.stop_reason
                for result in results
            ]
        )

    def _write_samples(self, path: Path) -> None:
        world, handles = self._call.world, self.log.live_handles()
        samples = world.environment.export(handles)
        kept = {"first_latents": world.prepared.first_latents.cpu(), "samples": samples}
        if world.keeps_features:
            kept["features"] = _features_of(world, handles, samples)
        torch.save(kept, path)


def _features_of(
    world: World, handles: Handles, samples: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Features of those that are evaluated, and their handles."""
    seen = handles[[sample["conditional"] is not None for sample in samples]]
    features = world.features_of(seen) if len(seen) else {}
    rows = {name: torch.from_numpy(rows) for name, rows in features.items()}
    return {"handles": seen.tolist(), "rows": rows}


def check_unsaved(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds a saved search.

    Raises:
        ConfigError: it does.
    """
    if has_saved_search(folder):
        raise ConfigError(
            f"save_to={os.fspath(folder)!r} holds a saved search: go on with it by "
            "pipe.resume(...), or name another folder"
        )


def saved_arguments(
    saved: SavedSearch, pipeline: str, defaults: Mapping[str, Any], arguments: dict[str, Any]
) -> tuple[dict[str, Any], SearchOptions]:
    """The arguments of a saved call, stock ones (without those that draw noise) and ours.

    Args:
        saved: the search.
        pipeline: name of the stock class at hand.
        defaults: of all its arguments.
        arguments: those that a folder cannot hold.

    Raises:
        ConfigError: the search is of another pipeline, an argument is missing, or is none that is
            asked for.
    """
    call = saved.call
    if call.get("pipeline") != pipeline:
        raise ConfigError(
            f"the saved search is of pipeline {call.get('pipeline')}, this one is a {pipeline}: "
            "load its model"
        )
    held, not_held = call["settings"][0]["call"], call["settings"][0]["not_held"]
    unknown = sorted(set(arguments) - {*not_held, *CALLBACK_ARGUMENTS})
    if unknown:
        raise ConfigError(
            f"resume takes no {', '.join(unknown)}: the saved search says it, go on as it began"
        )
    missing = [name for name in not_held if name not in arguments]
    if missing:
        raise ConfigError(
            f"the folder cannot hold {', '.join(missing)}: pass what the call was given"
        )
    stock = unheld_arguments(defaults) | held | call["stock"] | arguments
    options = SearchOptions(search=saved.strategy, **call["options"])
    return stock | {"latents": None, "generator": torch.Generator()}, options


def restored_world(saved: SavedSearch, world: World) -> World:
    """The world of a saved call, its samples restored, on a model that answers as it did.

    Args:
        saved: the search.
        world: set up from its arguments, but for what only the folder holds.

    Raises:
        ConfigError: the model or the reward is another.
    """
    call = saved.call
    kept = torch.load(saved.samples, weights_only=True)
    drawn = world.prepared.first_latents
    first: Tensor = kept["first_latents"]
    if (first.dtype, first.shape) != (drawn.dtype, drawn.shape):
        raise ConfigError(
            f"the saved search has latents {tuple(first.shape)} of {first.dtype}, the model here "
            f"makes {tuple(drawn.shape)} of {drawn.dtype}: load the model as it was loaded then"
        )
    world = replace(
        world,
        prepared=replace(world.prepared, first_latents=first.to(drawn.device)),
        prices=Prices(**call["prices"]),
        settings=call["settings"],
        rows_by_phase=call.get("rows_by_phase", {}),
    )
    _check_answers(world, kept["samples"])
    if call.get("head", world.head) != world.head:
        logger.warning(
            "the information gain evaluator is not the one that the search began with, so it will "
            "not go on as if it had never stopped: load that one"
        )
    log = saved.log
    world.environment.restore(kept["samples"], log.live_handles(), num_handles=log.num_handles)
    world.environment.ledger.seconds.update(call["seconds_by_phase"])
    rows = call["counted_rows"]
    world.decoder.rows, world.counted_reward.rows = rows["decode"], rows["reward"]
    if world.preview is not None:
        world.preview.rows = rows.get("preview", 0)
    return world


def _check_answers(world: World, samples: Sequence[dict[str, Any]]) -> None:
    """Ask the network and the reward again for one sample each, and compare."""
    evaluated = [sample for sample in samples if sample["conditional"] is not None][-1:]
    finished = [sample for sample in samples if sample["reward"] is not None][-1:]
    unknown = dict.fromkeys(("conditional", "unconditional", "value", "reward"))
    environment = replace(world).environment  # with a ledger of its own
    handles = environment.restore([sample | unknown for sample in evaluated + finished])
    if evaluated:
        environment.denoise(handles[:1])
    if finished:
        environment.reward(handles[len(evaluated) :])
    again = environment.export(handles)
    differences = {}
    if evaluated:
        differences["network"] = _difference(_outputs(again[0]), _outputs(evaluated[0]))
    if finished:
        rewards = (
            torch.tensor(sample["reward"], dtype=torch.float64)
            for sample in (again[-1], finished[0])
        )
        differences["reward"] = _difference(*rewards)
    threads = world.settings[0]["threads"]
    for part, difference in differences.items():
        if difference > _SAME:
            raise ConfigError(
                f"the {part} answers otherwise than when the search was saved (relative difference "
                f"{difference:.2g}): load the model and the reward that it was saved with"
            )
        if difference:
            logger.warning(
                "the %s answers otherwise in the last bits than when the search was saved "
                "(relative difference %.2g; %d threads then, %d here), so it will not go on bit "
                "for bit",
                part,
                difference,
                threads,
                torch.get_num_threads(),
            )


def _outputs(sample: dict[str, Any]) -> Tensor:
    """What the network said of an exported sample."""
    both = (sample["conditional"], sample["unconditional"])
    return torch.cat([output for output in both if output is not None])


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative difference of two answers; 0 if they are equal to the last bit."""
    if torch.equal(one, other):
        return 0.0
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm().clamp(min=torch.finfo(other.dtype).tiny))

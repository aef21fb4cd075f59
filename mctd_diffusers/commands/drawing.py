"""What the commands share that draw: a search as a column, and what ``result.json`` says of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mctd_diffusers import EMBEDDED_MODEL
from mctd_diffusers.errors import SearchError

if TYPE_CHECKING:
    from mctd_diffusers.denoising.scheduler_names import SchedulerName
    from mctd_diffusers.pipeline import MCTDPipeline
    from mctd_diffusers.viewing.comparison import Column, GoldFn


def draw(
    pipe: MCTDPipeline,
    prompts: Sequence[str],
    label: str,
    search: Any,
    *,
    seed: int,
    call: dict[str, Any],
    judge: GoldFn | None = None,
) -> tuple[Column | None, SearchError | None]:
    """Search by one method; where that fails, what was finished before and the error."""
    from mctd_diffusers.viewing.comparison import make_column

    started = time.monotonic()
    try:
        column = make_column(pipe, prompts, label, search, seed=seed, call=call, judge=judge)
    except SearchError as error:
        return finished_before(error, prompts, label, started, judge=judge), error
    return column, None


def finished_before(
    error: SearchError,
    prompts: Sequence[str],
    label: str,
    started: float,
    *,
    judge: GoldFn | None = None,
) -> Column | None:
    """What a search that failed had finished; ``None`` where that is nothing.

    Args:
        error: of a pipeline's call with images of type ``"pt"``.
        prompts: one for each image.
        label: name of the search.
        started: when the call began, by ``time.monotonic()``.
        judge: scores the samples; no search sees it.
    """
    from mctd_diffusers.viewing.comparison import column_of

    if error.partial is None or all(image is None for image in error.partial.images):
        return None
    seconds = time.monotonic() - started
    return column_of(error.partial, prompts, label, seconds=seconds, judge=judge)


def prices_of(pipe: MCTDPipeline, column: Column, call: dict[str, Any]) -> Any:
    """The price list of a search: as it was measured for it, else measured now."""
    from mctd_diffusers.search.environment import Prices

    if column.ledger is None or column.ledger.prices != Prices():
        return Prices() if column.ledger is None else column.ledger.prices
    kept = ("num_inference_steps", "guidance_scale", "rows_per_call", "search_scheduler")
    arguments = {name: call[name] for name in kept}
    return pipe.estimate(prompt="a picture", search="best_of_n", compute=1.0, **arguments).prices


def about(
    command: str,
    model: str,
    call: dict[str, Any],
    seed: int,
    scheduler: SchedulerName | None = None,
) -> dict[str, Any]:
    """Say in ``result.json`` what was run; no path of this machine but the one that was typed."""
    import diffusers
    import torch

    import mctd_diffusers

    kept = {name: given for name, given in call.items() if name != "search_scheduler"}
    return {
        "command": command,
        "model": "embedded" if model == EMBEDDED_MODEL else model,
        "seed": seed,
        "budget": budget_in_words(call),
        **{name: given for name, given in kept.items() if given is not None},
        **({} if scheduler is None else {"scheduler": scheduler.name}),
        "versions": {
            "mctd_diffusers": mctd_diffusers.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
    }


def budget_in_words(call: dict[str, Any]) -> str:
    """Say the budget of a call."""
    named = {
        "compute": "compute {:g}",
        "nfe_budget": "{} NFE an image",
        "cost_budget": "{:g} row-equivalents an image",
        "time_budget_s": "{:g} s",
    }
    given = {name: call[name] for name in named if call.get(name) is not None}
    words = [named[name].format(bound) for name, bound in given.items()]
    return ", ".join(words) or "compute 8"

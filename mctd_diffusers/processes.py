"""Prompts over processes: what ``accelerate launch`` starts, each process searching its share.

Images do not depend on each other, so nothing is exchanged while they are searched. Seeds are given
to the prompts before they are split: a picture is the same, bit for bit, in however many processes
(at equal numbers of threads).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import (
    MCTDPipelineOutput,
    Recipe,
    joined_ledger,
    save_image_with_recipe,
)
from mctd_diffusers.search.environment import Counts, Ledger


@dataclass(frozen=True)
class FoundImage:
    """What the search of one prompt found, wherever it ran.

    Attributes:
        prompt: of the image.
        seed: of its first noise.
        image: the best finished sample; ``None`` if there is none.
        reward: its score.
        recipe: how to make it again, see `MCTDPipeline.replay`; ``None`` without a search.
        spent: useful work for this image; empty without a search.
        nfe: denoiser evaluations spent on it.
        stop_reason: why its search ended; ``None`` without a search.
        error: what went wrong with this image; ``None`` where nothing did.
        process: that searched it.
    """

    prompt: str
    seed: int
    image: Image.Image | None
    reward: float | None
    recipe: Recipe | None
    spent: Counts
    nfe: int
    stop_reason: str | None
    error: str | None
    process: int

    def save(self, path: str | Path) -> None:
        """Write the picture as a PNG file, with its recipe.

        Raises:
            ConfigError: there is no picture, or ``path`` does not end in ``.png``.
        """
        if self.image is None:
            raise ConfigError(f"there is no picture of {self.prompt!r} to save: {self.error}")
        if self.recipe is None:
            self.image.save(path)
        else:
            save_image_with_recipe(self.image, self.recipe, path)


@dataclass(frozen=True)
class ProcessesOutput:
    """What all processes found together; the same in every process.

    Attributes:
        found: one entry a prompt, in the order of the prompts.
        ledger: what all of them spent; ``by_problem`` is by position of the prompt, and seconds of
            processes add up. ``None`` without a search.
    """

    found: list[FoundImage]
    ledger: Ledger | None

    @property
    def images(self) -> list[Image.Image | None]:
        """The pictures, in the order of the prompts; ``None`` where there is none."""
        return [one.image for one in self.found]

    @property
    def errors(self) -> dict[str, str]:
        """What went wrong, by prompt."""
        return {one.prompt: one.error for one in self.found if one.error is not None}


def search_in_processes(
    pipe: MCTDPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    together: int = 8,
    **call: Any,
) -> ProcessesOutput:
    r"""Search prompts, split over the processes of ``accelerate launch``; in one process as well.

    A prompt that fails (its reward raises, say) is reported in its place, and the rest is searched
    to the end. Budgets of NFE and cost are for each image, ``time_budget_s`` for each call. With
    ``cost_budget`` every process goes by prices that it measured itself, so that its pictures
    depend on the machine.

    Args:
        pipe (`MCTDPipeline`):
            On the device of this process: `pipe.to(process_state().device)`.
        prompts (`Sequence[str]`):
            All of them, in every process.
        seed (`int`, *optional*, defaults to 0):
            Image `i` starts from the noise of seed `seed + i`.
        together (`int`, *optional*, defaults to 8):
            Prompts in a call of the pipeline, which share their waves.
        call (remaining keyword arguments, *optional*):
            What the pipeline's call takes, but for prompts and generators.

    Returns:
        [`ProcessesOutput`], in every process: pictures, rewards, recipes and errors in order.

    Raises:
        ConfigError: an argument cannot work.
    """
    taken = sorted({"prompt", "generator", "output_type", "return_dict"} & set(call))
    if taken:
        raise ConfigError(f"{', '.join(taken)} are set by search_in_processes: leave them out")
    if call.get("online_ige"):
        raise ConfigError(
            "online_ige refines the head of one process, and there may be several here, whose "
            "heads would part: call the pipeline, or save searches and refine by `mctd train-ige "
            "--from-searches`"
        )
    if call.get("save_to") is not None:
        raise ConfigError(
            "save_to saves the search of one call, and there are several here: use `mctd generate "
            "--save-to`, or call the pipeline for what `my_share` gives this process"
        )
    if together < 1:
        raise ConfigError(f"together={together}: give a whole number of at least 1")
    state = process_state()
    mine: list[FoundImage] = []
    ledgers: list[tuple[int, Ledger]] = []
    with my_share(len(prompts)) as share:
        for first in range(share.start, share.stop, together):
            seeds = [seed + i for i in range(first, min(first + together, share.stop))]
            some = list(prompts[first : first + len(seeds)])
            generators = [torch.Generator().manual_seed(each) for each in seeds]
            try:
                output = pipe(prompt=some, generator=generators, **call)
            except SearchError as error:
                if error.partial is None:
                    raise
                output = error.partial
            mine += _found_in(output, some, seeds, state.process_index)
            if output.ledger is not None:
                ledgers.append((first, output.ledger))
    everyone = gather([(mine, ledgers)])
    parts = [part for _, several in everyone for part in several]
    return ProcessesOutput(
        found=[one for found, _ in everyone for one in found],
        ledger=joined_ledger(parts) if parts else None,
    )


def process_state() -> PartialState:
    """What accelerate knows of the processes; over gloo where there is no accelerator.

    Raises:
        ConfigError: several processes were launched, and accelerate was told of one.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched and accelerate's state has "
            f"{state.num_processes}: on a CPU make it by PartialState(cpu=True), before anything "
            "else does"
        )
    return state


@contextmanager
def my_share(count: int) -> Iterator[range]:
    """Positions of ``count`` things that are this process's to do; all of them in one process."""
    with process_state().split_between_processes(list(range(count))) as share:
        yield range(share[0], share[-1] + 1) if share else range(0)


def my_device() -> str | None:
    """Device of this process among several; ``None`` in one process, which may choose."""
    state = process_state()
    return str(state.device) if state.num_processes > 1 else None


def is_first_process() -> bool:
    """Whether this process speaks for all."""
    return bool(process_state().is_main_process)


def gather(entries: list[Any]) -> list[Any]:
    """The entries of all processes, in the order of the processes; in every process."""
    state = process_state()
    return list(gather_object(entries)) if state.num_processes > 1 else entries


def _found_in(
    output: MCTDPipelineOutput, prompts: Sequence[str], seeds: Sequence[int], process: int
) -> list[FoundImage]:
    """What one call of the pipeline found."""
    found = []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        search = None if output.search is None else output.search[i]
        has_winner = search is not None and search.winner is not None
        found.append(
            FoundImage(
                prompt=prompt,
                seed=seed,
                image=output.images[i],
                reward=None if output.rewards is None else output.rewards[i],
                recipe=search.recipe if search is not None and has_winner else None,
                spent=Counts() if search is None else search.spent,
                nfe=0 if output.nfe is None else output.nfe[i],
                stop_reason=None if search is None else search.stop_reason,
                error=None if search is None or search.error is None else str(search.error),
                process=process,
            )
        )
    return found

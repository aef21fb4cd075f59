"""Logs of denoising trajectories: what the information gain evaluator learns from.

Trajectories of many prompts, grids and schedulers are run, and at their states *jumps* are really
made: the deterministic step of every stride from the same state, compared with fine steps over the
same stretch; and *siblings*, several draws of one stochastic edge. One row of the dataset is one
trajectory. What a shard holds follows from the settings and its number alone, so a log that was
interrupted is completed by writing the shards that are missing, in any number of processes, and
comes out equal row for row.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from mctd_diffusers.calls import World
from mctd_diffusers.denoising.scheduler_names import (
    SchedulerName,
    named_scheduler,
    read_scheduler,
)
from mctd_diffusers.denoising.schedulers import check_scheduler
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.weights import weights_hash
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.calls import reward_name
from mctd_diffusers.search.environment import FIRST_DRAW, Action
from mctd_diffusers.trajectories.files import (
    check_begun,
    check_split,
    features_of,
    read_begun,
    settings_path,
    shard_path,
    write_begun,
    write_shard,
)
from mctd_diffusers.trajectories.plan import (
    LogSettings,
    Shard,
    edges_of,
    nfe_of,
    refinement_of,
    shard_of,
    work_of,
)
from mctd_diffusers.trajectories.shards import run_shard


def log_trajectories(
    pipe: MCTDPipeline,
    settings: LogSettings,
    folder: str | os.PathLike[str],
    *,
    split: str = "train",
    process_index: int = 0,
    num_processes: int = 1,
    command: str | None = None,
) -> Iterator[int]:
    """Write the shards of a split that are not there yet; yields the number of each written.

    Shard ``i`` is of process ``i % num_processes``. A shard is in its place only when it is whole,
    so the log can be interrupted at any moment and gone on with.

    Args:
        pipe: has a reward, and the model whose trajectories are logged.
        settings: of the split; those of an interrupted one must be the same.
        folder: of the log; may hold other splits.
        split: name of the split, letters, digits and underscores.
        process_index: of this process.
        num_processes: that write the split together; the first of them begins (:func:`begin_log`)
            before the others do.
        command: that logs the split, for the card.

    Raises:
        ConfigError: the folder holds the split by other settings, or what the settings name does
            not exist.
        SearchError: what was computed is not finite.
    """
    settings = begin_log(pipe, settings, folder, split=split, command=command)
    for number in range(process_index, settings.num_shards, num_processes):
        path = shard_path(Path(folder), split, number, settings.num_shards)
        if path.exists():
            continue
        shard = shard_of(settings, number)
        environment = open_shard(pipe, settings, shard).environment
        columns = run_shard(environment, settings, shard, family=pipe.stock_class.__name__)
        features = features_of(columns["features"][0])
        write_shard(Dataset.from_dict(columns, features=features), path)
        yield number


def begin_log(
    pipe: MCTDPipeline,
    settings: LogSettings,
    folder: str | os.PathLike[str],
    *,
    split: str = "train",
    command: str | None = None,
) -> LogSettings:
    """Check the settings and, where the split is not begun, write them; returns them settled.

    ``rows_per_call``, of which bits depend, is settled by the split where it is begun, else by the
    device.

    Args:
        pipe: as for :func:`log_trajectories`.
        settings: likewise.
        folder: likewise.
        split: likewise.
        command: likewise.

    Raises:
        ConfigError: as for :func:`log_trajectories`.
    """
    folder = Path(folder)
    check_split(split)
    check_log(pipe, settings)
    if settings.rows_per_call is None:
        is_begun = settings_path(folder, split).exists()
        rows = (read_begun(folder, split) if is_begun else {}).get("rows_per_call")
        settings = dataclasses.replace(
            settings, rows_per_call=rows or _rows_per_call(pipe, settings)
        )
    entries = dataclasses.asdict(settings) | {
        "model": identity_of(pipe),
        "reward": reward_identity(pipe.reward_model),
    }
    check_begun(folder, split, entries)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    nfe = nfe_of_log(pipe, settings)
    write_begun(folder, split, entries | {"nfe": nfe, "command": command})
    return settings


def check_log(pipe: MCTDPipeline, settings: LogSettings) -> None:
    """Refuse what the pipeline cannot log, before its first call.

    Raises:
        ConfigError: it has no reward; or its config does not make a scheduler, or it was trained
            at fewer timesteps than a grid has fine steps.
        UnsupportedSchedulerError: a scheduler cannot be branched and strided.
    """
    if pipe.reward_model is None:
        raise ConfigError(
            "the value of a state is a reward, and this pipeline has none: name one, as by "
            "--reward clip or pipe.reward_model = ..."
        )
    for name in settings.schedulers:
        scheduler = named_scheduler(name, pipe.scheduler.config).scheduler
        check_scheduler(scheduler)
        trained = scheduler.config.num_train_timesteps
        for grid in settings.grids:
            fine = grid * refinement_of(grid)
            if fine > trained:
                raise ConfigError(
                    f"grid {grid} is run on {fine} fine steps, and {name} knows "
                    f"{trained} timesteps only: leave this grid out, or name a shorter one"
                )


def open_shard(pipe: MCTDPipeline, settings: LogSettings, shard: Shard) -> World:
    """The world of a shard's trajectories, over the fine schedule."""
    named = named_scheduler(shard.scheduler, pipe.scheduler.config)
    eta: dict[str, Any] = {"eta": named.eta} if named.eta else {}  # not all pipelines take one
    return pipe.open_world(
        prompt=[settings.prompts[prompt] for prompt in shard.prompts],
        num_inference_steps=shard.num_steps * shard.refinement,
        guidance_scale=settings.guidance_scale,
        **eta,
        generator=[torch.Generator().manual_seed(seed) for seed in shard.seeds],
        search_scheduler=named.scheduler,
        rows_per_call=settings.rows_per_call,
        reads_features=True,
    )


def is_deterministic(pipe: MCTDPipeline, scheduler: SchedulerName) -> bool:
    """Whether all trajectories of a scheduler from the same noise are the same."""
    named = named_scheduler(scheduler, pipe.scheduler.config)
    named.scheduler.set_timesteps(2)
    return not Stepper(named.scheduler, eta=named.eta or 0.0).is_stochastic(0, Action(1))


def _rows_per_call(pipe: MCTDPipeline, settings: LogSettings) -> int:
    """What fits the device."""
    return open_shard(pipe, settings, shard_of(settings, 0)).rows_per_call


# Whose trajectories they are


def identity_of(pipe: MCTDPipeline) -> dict[str, str]:
    """By what a model is told from others: its class, and a few numbers of every part, hashed."""
    parts = {
        name: weights_hash(part)
        for name, part in sorted(pipe.components.items())
        if isinstance(part, nn.Module) and name != "ige"
    }
    return {"class": pipe.stock_class.__name__, **parts}


def reward_identity(reward: Any) -> str:
    """The same for a reward: its name and, where it has a model, a few numbers of that, hashed."""
    models = [
        part for part in getattr(reward, "__dict__", {}).values() if isinstance(part, nn.Module)
    ]
    return " ".join([reward_name(reward), *map(weights_hash, models)])


# What a log will take


@dataclass(frozen=True)
class LogEstimate:
    """What writing a split takes.

    Attributes:
        trajectories: rows of the split.
        shards: files that it is written in.
        nfe: evaluations, exactly.
        bytes: of its numbers, uncompressed; files are a little smaller.
        seconds: from a few measured rows, decodes and rewards included, in one process.
        seconds_per_row: of the network, measured.
    """

    trajectories: int
    shards: int
    nfe: int
    bytes: int
    seconds: float
    seconds_per_row: float


def estimate_log(pipe: MCTDPipeline, settings: LogSettings) -> LogEstimate:
    """Say what a split will take, from its closed formulas and a few measured rows.

    Raises:
        ConfigError: as for :func:`log_trajectories`.
    """
    check_log(pipe, settings)
    shards = [shard_of(settings, number) for number in range(settings.num_shards)]
    first = dataclasses.replace(
        shards[0], prompts=shards[0].prompts[:1], seeds=shards[0].seeds[:1], rows=range(1)
    )
    world = open_shard(pipe, settings, first)
    prices = world.measure_prices()
    per_row = world.seconds_per_row()
    channels, size = _num_features(world), int(np.prod(world.environment.sample_shape))
    each_is = _determinism(pipe, settings)
    nfe, num_bytes, cost = 0, 0, 0.0
    for shard in shards:
        deterministic, count = each_is[shard.scheduler.name], len(shard.rows)
        work = work_of(settings, shard, deterministic=deterministic)
        work = dataclasses.replace(work, rows=work.nfe * world.prepared.network.rows_per_latent)
        padding = -(-count // world.rows_per_call) * world.rows_per_call / count
        nfe += work.nfe
        cost += padding * prices.cost(work)
        num_bytes += _bytes_of(settings, shard, size, channels, deterministic=deterministic)
    return LogEstimate(
        trajectories=settings.num_trajectories,
        shards=settings.num_shards,
        nfe=nfe,
        bytes=num_bytes,
        seconds=cost * per_row,
        seconds_per_row=per_row,
    )


def nfe_of_log(pipe: MCTDPipeline, settings: LogSettings) -> int:
    """Evaluations that a split takes."""
    each_is = _determinism(pipe, settings)
    shards = (shard_of(settings, number) for number in range(settings.num_shards))
    return sum(
        nfe_of(settings, shard, deterministic=each_is[shard.scheduler.name]) for shard in shards
    )


def _determinism(pipe: MCTDPipeline, settings: LogSettings) -> dict[str, bool]:
    """Whether each scheduler is, by name."""
    return {
        said.name: is_deterministic(pipe, said) for said in map(read_scheduler, settings.schedulers)
    }


def _num_features(world: World) -> int:
    """Numbers that are read of one state beside its latents."""
    environment = world.environment
    state = environment.reset(np.array([0]), np.array([FIRST_DRAW]))
    environment.denoise(state)
    return sum(rows.shape[1] for rows in environment.features(state).values())


def _bytes_of(
    settings: LogSettings, shard: Shard, size: int, channels: int, *, deterministic: bool
) -> int:
    """Bytes of a shard's numbers, of samples with ``size`` numbers and ``channels`` features."""
    steps = shard.num_steps
    jumps, groups = map(len, edges_of(settings, shard, deterministic=deterministic))
    halves = size * (2 * steps + 1 + 2 * jumps + settings.siblings * groups) + channels * steps
    singles = 3 * steps + 2 + 3 * jumps + settings.siblings * groups
    doubles = 2 * (jumps + groups) + 10  # step indices, strides, and the columns of one number
    return len(shard.rows) * (2 * halves + 4 * singles + 8 * doubles)

"""Logs of the tiny pipeline: a few trajectories on short grids, within a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.trajectories.plan import LogSettings
from tests.pipelines import tiny

PROMPTS = ("a red cat", "two dogs", "a cup on a car")


def make_pipe(reward: Any = tiny.redness, scheduler: str = "ddim") -> MCTDPipeline:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(scheduler), reward_model=reward)
    pipe.register_modules(preview_vae=tiny.make_preview_vae())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_settings(**changes: Any) -> LogSettings:
    settings: dict[str, Any] = {
        "prompts": PROMPTS,
        "num_trajectories": 5,
        "grids": (4, 6),
        "strides": (1, 2, 4),
        "probes": 2,
        "siblings": 3,
        "shard_size": 2,
        "rows_per_call": 2,
        "seed": 1,
    }
    return LogSettings(**(settings | changes))


def read_rows(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    paths = sorted((folder / "data").glob(f"{split}-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones included."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def without(table: pa.Table, column: str, *fields: str) -> dict[str, pa.Array]:
    """Fields of a struct column but for some."""
    struct = table[column].combine_chunks()
    return {
        field.name: struct.field(i)
        for i, field in enumerate(struct.type)
        if field.name not in fields
    }

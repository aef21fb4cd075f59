"""The card of a log: what is in it, what made it, and how it is loaded."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from mctd_diffusers.files import write_text
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.trajectories.files import (
    read_begun,
    settings_in,
    shard_paths,
    splits_of,
)
from mctd_diffusers.trajectories.logging import nfe_of_log
from mctd_diffusers.trajectories.plan import FINE_STEPS

TAGS: Final = ("diffusers", "diffusion", "denoising-trajectories", "mctd-diffusers")

_COLUMNS: Final = (
    ("index", "", "number of the trajectory in its split"),
    ("prompt, prompt_index", "", "its text, and the number of that among the split's prompts"),
    ("seed", "", "of the first noise, drawn on the CPU as the stock pipeline draws it"),
    ("family", "", "class of the stock pipeline"),
    ("scheduler, eta", "", "class that stepped, with its settings; share of fresh noise"),
    ("num_steps", "", "T, steps of the grid"),
    ("guidance_scale", "", "of classifier-free guidance"),
    ("latent_shape", "[3]", "channels, height, width; n is their product"),
    ("timestep", "[T]", "that the network was given"),
    ("log_snr", "[T + 1]", "2 log(alpha / sigma), natural; the last is the finished sample's"),
    ("latents", "[T][n]", "states, in latent units as the stock loop has them"),
    ("denoised", "[T][n]", "the guided estimate of the clean latents at each"),
    ("value", "[T]", "reward of that estimate, decoded by preview; reward units"),
    ("features", "{name: [T][channels]}", "of the network's blocks, and of the estimate"),
    ("final_latents", "[n]", "the finished sample"),
    ("reward", "", "of the finished picture, decoded in full; reward units"),
    ("jumps.step_index, jumps.stride", "[J]", "from which state, over how many steps"),
    ("jumps.latents, jumps.denoised", "[J][n]", "where it arrived, and the estimate there"),
    (
        "jumps.truncation_error",
        "[J]",
        "rms difference of latents from fine steps; alpha^2 + sigma^2 = 1",
    ),
    ("jumps.estimate_error", "[J]", "rms difference of the denoised estimates; latent units"),
    ("jumps.value", "[J]", "value there, or reward where it finished; reward units"),
    ("siblings.step_index, siblings.stride", "[S]", "from which state, over how many steps"),
    ("siblings.denoised", "[S][M][n]", "estimates of M draws of one stochastic edge, eta 1"),
    ("siblings.values", "[S][M]", "their values; reward units"),
)


def write_card(pipe: MCTDPipeline, folder: str | os.PathLike[str]) -> Path:
    """Write the card of all splits in a folder; returns its path.

    Args:
        pipe: that logged them.
        folder: of the log.

    Raises:
        ConfigError: the settings of a split cannot be read.
    """
    folder = Path(folder)
    splits = {split: read_begun(folder, split) for split in splits_of(folder)}
    begun = list(splits.values())
    parts = [
        _head(folder, list(splits)),
        "# Denoising trajectories",
        _about(pipe, folder, begun),
        _split_table(pipe, folder, splits),
        "## Load it",
        _loading(list(splits)),
        "## Columns",
        _column_table(folder),
        "## How it was made",
        *(_making(split, entries) for split, entries in splits.items()),
    ]
    path = folder / "README.md"
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _head(folder: Path, splits: list[str]) -> str:
    """The metadata that the Hub and `datasets` read."""
    files = [
        line
        for split in splits
        for line in (f"      - split: {split}", f"        path: data/{split}-*.parquet")
    ]
    lines = [
        "---",
        "# license: say here under which licence you share what your model made of your prompts",
        "pretty_name: Denoising trajectories",
        "task_categories:",
        "  - text-to-image",
        "tags:",
        *(f"  - {tag}" for tag in TAGS),
        "size_categories:",
        f"  - {_size_category(folder)}",
        "configs:",
        "  - config_name: default",
        "    data_files:",
        *files,
        "---",
    ]
    return "\n".join(lines)


def _size_category(folder: Path) -> str:
    """The Hub's name for a number of rows."""
    rows = sum(pq.read_metadata(path).num_rows for path in (folder / "data").glob("*.parquet"))
    bounds = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]
    return next((name for bound, name in zip(bounds, names, strict=True) if rows < bound), "n>10M")


def _about(pipe: MCTDPipeline, folder: Path, begun: list[dict[str, Any]]) -> str:
    rewards = dict.fromkeys(entries.get("reward", "") for entries in begun)
    relabelled = any("relabelled_from" in entries for entries in begun)
    told = ", ".join(f"`{reward}`" for reward in rewards if reward) or "the pipeline's own"
    return (
        f"Each row is one trajectory of a `{pipe.stock_class.__name__}`: the latents at every step "
        "of its grid, with the network's features and the value of the denoised estimate; *jumps*, "
        "the deterministic step of each stride really made and compared with at least "
        f"{FINE_STEPS} fine steps to the whole schedule; and *siblings*, several draws of one "
        "stochastic edge. Deterministic trajectories run on the fine schedule and are jumped from "
        "at every state, stochastic ones at their probes.\n\n"
        f"Reward: {told}"
        + (", by which the log was relabelled from the stored latents." if relabelled else ".")
    )


def _split_table(pipe: MCTDPipeline, folder: Path, splits: dict[str, dict[str, Any]]) -> str:
    lines = ["| split | trajectories | prompts | files | NFE | MB |", "|---|---|---|---|---|---|"]
    for split, entries in splits.items():
        settings = settings_in(entries)
        paths = [p for p in shard_paths(folder, split, settings.num_shards) if p.exists()]
        rows = sum(pq.read_metadata(path).num_rows for path in paths)
        megabytes = math.ceil(sum(path.stat().st_size for path in paths) / 1e6)
        files = f"{len(paths)}"
        if len(paths) < settings.num_shards:
            files += f" of {settings.num_shards} (unfinished)"
        lines.append(
            f"| `{split}` | {rows} | {len(settings.prompts)} | {files} "
            f"| {nfe_of_log(pipe, settings):,} | {megabytes} |"
        )
    return (
        "\n".join(lines) + "\n\nNFE: evaluations of one latent by the denoiser, of a whole split."
    )


def _loading(splits: list[str]) -> str:
    return (
        "```python\n"
        "import numpy as np\n"
        "from datasets import load_dataset\n\n"
        'log = load_dataset("path/to/this/folder or user/name")\n'
        f'row = log["{splits[0]}"].with_format("numpy")[0]\n'
        'latents = np.stack(row["latents"]).reshape(-1, *row["latent_shape"])\n'
        "```"
    )


def _column_table(folder: Path) -> str:
    lines = ["| column | shape | meaning |", "|---|---|---|"]
    for names, shape, meaning in _COLUMNS:
        columns = ", ".join(f"`{name}`" for name in names.split(", "))
        lines.append(f"| {columns} | {f'`{shape}`' if shape else ''} | {meaning} |")
    lines += ["", "Latents, estimates and features are in half precision."]
    features = _features(folder)
    if features:
        channels = ", ".join(f"`{name}` {number}" for name, number in features.items())
        lines += [
            f"Channels of `features`: {channels}. Those of a block are the mean of each of its "
            "channels over space, then the standard deviation of each; those of `estimate` the "
            "same of the denoised estimate, then the deviation of what guidance scales."
        ]
    return "\n".join(lines)


def _features(folder: Path) -> dict[str, int]:
    """Channels of each feature, from any shard."""
    path = next(iter(sorted((folder / "data").glob("*.parquet"))), None)
    if path is None:
        return {}
    with pq.ParquetFile(path) as file:
        rows = next(file.iter_batches(batch_size=1, columns=["features"]))
    first: dict[str, Any] = rows.column(0)[0].as_py()
    return {name: len(states[0]) for name, states in first.items()}


def _making(split: str, entries: dict[str, Any]) -> str:
    settings = settings_in(entries)
    commands = [entries[name] for name in ("command", "relabelled_by") if entries.get(name)]
    shell = "\n".join(["```bash", *commands, "```"]) if commands else ""
    lines = [
        f"- schedulers: {', '.join(settings.schedulers)}",
        f"- grids: {', '.join(map(str, settings.grids))} steps, strides "
        f"{', '.join(map(str, settings.strides))}",
        f"- {settings.probes} probes a trajectory, {settings.siblings} siblings for each stride",
        f"- guidance {settings.guidance_scale:g}, seed {settings.seed}, shards of "
        f"{settings.shard_size}, {settings.rows_per_call} rows a call",
    ]
    if "relabelled_from" in entries:
        lines.append(f"- logged with reward {entries['relabelled_from']}, then relabelled")
    settings_file = f"Its prompts and settings are in `settings-{split}.json`."
    return "\n\n".join(filter(None, [f"### `{split}`", shell, "\n".join(lines), settings_file]))

"""The folder of a log: its columns, its shards, and the settings of its splits.

::

    README.md                               the card, see `trajectories.card`
    settings-<split>.json                   what a split holds, see `LogSettings`, and of what
    data/<split>-00012-of-00064.parquet     one shard

A shard is in its place only when it is whole: it is written under a hidden name, which
``load_dataset`` passes over, and renamed. A hidden file that a killed process left is replaced when
its shard is written again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from datasets import Dataset, Features, List, Value

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.files import write_atomically, write_text
from mctd_diffusers.trajectories.plan import LogSettings

_RESERVED: Final = ("all",)
"""Names that `datasets` gives a meaning of its own to."""


def features_of(names: Mapping[str, Any]) -> Features:
    """Columns of a log, for features of these names."""
    half, halves = List(Value("float16")), List(List(Value("float16")))
    whole, real = List(Value("int64")), List(Value("float32"))
    return Features(
        {
            "index": Value("int64"),
            "prompt": Value("string"),
            "prompt_index": Value("int64"),
            "seed": Value("int64"),
            "family": Value("string"),
            "scheduler": Value("string"),
            "eta": Value("float64"),
            "num_steps": Value("int64"),
            "guidance_scale": Value("float64"),
            "latent_shape": whole,
            "timestep": real,
            "log_snr": real,
            "latents": halves,
            "denoised": halves,
            "value": real,
            "features": {name: halves for name in names},
            "final_latents": half,
            "reward": Value("float32"),
            "jumps": {
                "step_index": whole,
                "stride": whole,
                "latents": halves,
                "denoised": halves,
                "truncation_error": real,
                "estimate_error": real,
                "value": real,
            },
            "siblings": {
                "step_index": whole,
                "stride": whole,
                "denoised": List(halves),
                "values": List(real),
            },
        }
    )


# Shards


def shard_path(folder: Path, split: str, number: int, num_shards: int) -> Path:
    """Where a shard is written; the name is one that `datasets` knows for a part of a split."""
    return folder / "data" / f"{split}-{number:05d}-of-{num_shards:05d}.parquet"


def shard_paths(folder: Path, split: str, num_shards: int) -> list[Path]:
    """Where all shards of a split are written, or will be."""
    return [shard_path(folder, split, number, num_shards) for number in range(num_shards)]


def write_shard(dataset: Dataset, path: Path) -> None:
    """Write a shard so that it is found whole, or not at all, whenever this is interrupted."""
    write_atomically(path, dataset.to_parquet)


# Settings


def check_split(split: str) -> None:
    """Refuse names of splits that `datasets` cannot open.

    Raises:
        ConfigError: names the split, and what works.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", split) or split in _RESERVED:
        raise ConfigError(
            f"split is named {split!r}: use letters, digits and underscores alone, and not "
            f"{', '.join(map(repr, _RESERVED))}"
        )


def settings_path(folder: Path, split: str) -> Path:
    """Where the settings of a split are kept."""
    return folder / f"settings-{split}.json"


def splits_of(folder: Path) -> list[str]:
    """Names of the splits that were begun: first ``train``, then the others by name."""
    names = [path.stem.removeprefix("settings-") for path in folder.glob("settings-*.json")]
    return sorted(names, key=lambda name: (name != "train", name))


def read_begun(folder: Path, split: str) -> dict[str, Any]:
    """What a split was begun with: the entries of `LogSettings`, and what stands beside them.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = settings_path(folder, split)
    try:
        begun = json.loads(path.read_text("utf-8"))
        if not isinstance(begun, dict):
            raise ValueError(f"it holds {begun!r:.40}")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"settings of split {split!r} cannot be read from {os.fspath(path)!r} ({error}): name "
            "the folder of a log, or take the split's files away and log it again"
        ) from error
    return begun


def settings_in(begun: Mapping[str, Any]) -> LogSettings:
    """The `LogSettings` among what a split was begun with.

    Raises:
        ConfigError: an entry is missing, or cannot work.
    """
    names = [field.name for field in dataclasses.fields(LogSettings)]
    lacking = [name for name in names if name not in begun]
    if lacking:
        raise ConfigError(
            f"settings of a log lack {', '.join(lacking)}: the log is of another version; log it "
            "again"
        )
    entries = {name: begun[name] for name in names}
    tuples = {name: tuple(entry) for name, entry in entries.items() if isinstance(entry, list)}
    return LogSettings(**(entries | tuples))


def check_begun(folder: Path, split: str, entries: Mapping[str, Any]) -> None:
    """Refuse to go on with a split that was begun with other entries.

    Args:
        folder: of the log.
        split: name of the split.
        entries: those that have to be as they were; those that the file lacks are not compared.

    Raises:
        ConfigError: names every entry that differs, with both values.
    """
    if not settings_path(folder, split).exists():
        return
    begun = read_begun(folder, split)
    ours = json.loads(json.dumps(entries))
    other = [name for name in ours if name in begun and begun[name] != ours[name]]
    if other:
        differences = "; ".join(_difference(name, begun[name], ours[name]) for name in other)
        raise ConfigError(
            f"split {split!r} in {os.fspath(folder)!r} was begun with other settings ({differences}"
            "): go on with the same, or name another folder or split"
        )


def _difference(name: str, begun: Any, ours: Any) -> str:
    """Both values of an entry, or of the first place where two lists or tables differ."""
    if isinstance(begun, dict) and isinstance(ours, dict):
        key = next(key for key in (*begun, *ours) if begun.get(key) != ours.get(key))
        return _difference(f"{key} of {name}", begun.get(key), ours.get(key))
    if isinstance(begun, list) and isinstance(ours, list):
        if len(begun) != len(ours):
            return f"{len(begun)} {name}, now {len(ours)}"
        place = next(i for i, both in enumerate(zip(begun, ours, strict=True)) if len({*both}) > 1)
        return _difference(f"{name}[{place}]", begun[place], ours[place])
    return f"{name} {begun!r}, now {ours!r}"


def write_begun(folder: Path, split: str, entries: Mapping[str, Any]) -> None:
    """Write what a split is begun with, where that is not written yet."""
    path = settings_path(folder, split)
    if not path.exists():
        write_text(path, json.dumps(entries, indent=1) + "\n")


def whole_splits(folder: Path) -> Iterator[str]:
    """Splits of which every shard is there."""
    for split in splits_of(folder):
        settings = settings_in(read_begun(folder, split))
        if all(path.exists() for path in shard_paths(folder, split, settings.num_shards)):
            yield split

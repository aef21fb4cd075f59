"""Saved searches as data to learn from: what they observed of jumps, read and written.

A folder of saved searches is read without a model: their trees follow from their logs, and the
features of their states lie beside the samples, where they were kept. As a dataset a row is a state
that a search went on from, with the values of its children; `load_dataset` opens it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.files import write_text
from mctd_diffusers.models.observations import (
    IsStochasticFn,
    Observations,
    joined,
    no_observations,
    observe,
)
from mctd_diffusers.search.environment import Handles
from mctd_diffusers.search.saving import INDEX, load_search
from mctd_diffusers.search.tree import STEP, Tree
from mctd_diffusers.trajectories.files import shard_path, write_shard

SPLIT: Final = "searches"
ROWS_PER_SHARD: Final = 8192
_KEEP: Final = "search with online_ige=True, or by stride_policy='ige', and save again"

_MEANINGS: Final = {
    "image": "root seed of the search; equal where rows are of one image",
    "prompt": "that the reward read",
    "family": "class of the stock pipeline",
    "scheduler": "class that stepped",
    "num_steps": "steps of the schedule",
    "step_index": "of the state, 0 is noisiest",
    "stride": "schedule steps to its children",
    "eta": "share of fresh noise on the edges; NaN: as the user's own scheduler",
    "guidance": "guidance scale on the edges; NaN: the call's own",
    "source_log_snr": "2 log(alpha / sigma) of the state, natural",
    "target_log_snr": "the same of its children",
    "is_finished": "whether the children are finished, so that their values are rewards",
    "value": "of the state, as the search valued it; reward units, NaN where it did not",
    "values": "of its children, at least two, drawn independently; reward units",
    "weight": "corrects for how often the search was led there: mean 1 in each image, step index "
    "and stride",
    "visits": "backups through the state",
    "reward": "of the best finished sample below the state; reward units, NaN where there is none",
    "features": "of the network's blocks and its estimate at the state, half precision",
}


class SearchData(NamedTuple):
    """What searches over one model observed.

    Attributes:
        family: class name of the stock pipeline.
        observations: of all images.
    """

    family: str
    observations: Observations


def saved_searches(folder: str | os.PathLike[str]) -> list[Path]:
    """Folders of saved searches: ``folder`` itself, and all below it, in the order of their names.

    Raises:
        ConfigError: there is none.
    """
    found = sorted(path.parent for path in Path(folder).rglob(INDEX))
    if not found:
        raise ConfigError(
            f"no saved search is in {os.fspath(folder)!r} or below it: name a folder that "
            "save_to=... wrote, or one that holds such folders"
        )
    return found


def read_searches(folder: str | os.PathLike[str]) -> SearchData:
    """Read what searches observed: from folders of saved ones, or from a dataset made of them.

    Args:
        folder: see :func:`saved_searches`; or one that :func:`write_searches` wrote.

    Raises:
        ConfigError: there is neither, a search was saved without features, searches are of several
            models, or nothing was observed.
    """
    shards = _shards_of(Path(folder))
    if shards:
        parts = [_read_shard(path) for path in shards]
    else:
        parts = [read_search(path) for path in saved_searches(folder)]
    kinds = dict.fromkeys(_kind(part) for part in parts if len(part.observations))
    if len(kinds) > 1:
        models = " and ".join(f"a {family} with features {dict(sizes)}" for family, sizes in kinds)
        raise ConfigError(
            f"{os.fspath(folder)!r} holds searches over {models}: keep a folder to one model"
        )
    if not kinds:
        raise ConfigError(
            f"in {os.fspath(folder)!r} no search tried two draws of one edge from one state, so "
            "nothing can be learned of jumps: save searches that branch, such as mctd or beam"
        )
    return SearchData(parts[0].family, joined([part.observations for part in parts]))


def read_search(folder: str | os.PathLike[str]) -> SearchData:
    """Read what one saved search observed, over or not; no model is needed and none is called.

    Raises:
        ConfigError: there is none, or it was saved without features.
    """
    saved = load_search(folder)
    settings = saved.call["settings"]
    kept = torch.load(saved.samples, weights_only=True)
    if "features" not in kept:
        raise ConfigError(
            f"the search in {os.fspath(folder)!r} was saved without features of its states, from "
            f"which alone jumps can be told: {_KEEP}"
        )
    noise_of = {
        handle: sample["noise"]
        for handle, sample in zip(saved.log.live_handles().tolist(), kept["samples"], strict=True)
    }
    features = _Features(**kept["features"])
    images = len(saved.call["reward_prompts"])  # plain samples come after them, and branch nowhere
    parts = [
        observe(
            result.tree,
            log_snr=np.array(saved.call["log_snr"]),
            features=features,
            is_stochastic=_noise_in(result.tree, noise_of),
            prompt=prompt,
            scheduler=settings[0]["scheduler"]["class"],
        )
        for result, prompt in zip(
            saved.results()[:images], saved.call["reward_prompts"], strict=True
        )
    ]
    return SearchData(str(saved.call["pipeline"]), joined(parts))


class _Features:
    """Saved features, by handle.

    Args:
        handles: of the samples.
        rows: ``{name: [samples, channels]}``.
    """

    def __init__(self, handles: list[int], rows: Mapping[str, torch.Tensor]) -> None:
        self._row_of = {handle: row for row, handle in enumerate(handles)}
        self._rows = rows

    def __call__(self, handles: Handles) -> dict[str, npt.NDArray[Any]]:
        rows = [self._row_of[handle] for handle in handles.tolist()]
        return {name: features[rows].numpy() for name, features in self._rows.items()}


def _noise_in(tree: Tree, noise_of: Mapping[int, dict[str, Any] | None]) -> IsStochasticFn:
    """Which edges have noise, by the samples that they led to."""
    noisy = set()
    for node in np.flatnonzero(tree.move == STEP).tolist():
        noise = noise_of.get(int(tree.handle[node]))
        if noise is not None and noise["std"] != 0:  # NaN: it is, but cannot be told apart
            eta, stride = float(tree.eta[node]), int(tree.stride[node])
            known = None if np.isnan(eta) else eta
            noisy.add((int(tree.step_index[node]) - stride, stride, known))
    return lambda *edge: edge in noisy


def _kind(data: SearchData) -> tuple[str, tuple[tuple[str, int], ...]]:
    """A model: its family and the sizes of its features."""
    features = sorted(data.observations.features.items())
    return data.family, tuple((name, rows.shape[1]) for name, rows in features)


# As a dataset


def write_searches(
    data: SearchData, folder: str | os.PathLike[str], *, command: str = ""
) -> list[Path]:
    """Write what searches observed as a dataset with a card; returns its shards.

    Args:
        data: of :func:`read_searches`.
        folder: made if it does not exist.
        command: that made it, for the card.

    Raises:
        ConfigError: there is such a dataset in it already.
    """
    folder = Path(folder)
    if _shards_of(folder):
        raise ConfigError(
            f"{str(folder)!r} holds a dataset of searches already: name another folder, or take "
            "its files away"
        )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    seen, count = data.observations, -(-len(data.observations) // ROWS_PER_SHARD)
    paths = []
    for number in range(count):
        rows = seen.take(slice(number * ROWS_PER_SHARD, (number + 1) * ROWS_PER_SHARD))
        path = shard_path(folder, SPLIT, number, count)
        write_shard(_as_dataset(data.family, rows), path)
        paths.append(path)
    write_text(folder / "README.md", _card(data, command))
    return paths


def _as_dataset(family: str, seen: Observations) -> Dataset:
    columns = {name: list(column) for name, column in _columns(seen)}
    columns["family"] = [family] * len(seen)
    columns["features"] = [
        {name: rows[row] for name, rows in seen.features.items()} for row in range(len(seen))
    ]
    whole, text, real = Value("int64"), Value("string"), Value("float64")
    kinds = {
        **dict.fromkeys(("image", "num_steps", "step_index", "stride", "visits"), whole),
        **dict.fromkeys(("prompt", "family", "scheduler"), text),
        "is_finished": Value("bool"),
        "values": List(real),
        "features": {name: List(Value("float16")) for name in seen.features},
    }
    features = Features({name: kinds.get(name, real) for name in _MEANINGS})
    return Dataset.from_dict({name: columns[name] for name in _MEANINGS}, features=features)


def _columns(seen: Observations) -> Iterator[tuple[str, Any]]:
    """Columns but for the features, by name."""
    for column in dataclasses.fields(seen):
        if column.name != "features":
            yield column.name, getattr(seen, column.name)


def _shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "data").glob(f"{SPLIT}-*.parquet"))


def _read_shard(path: Path) -> SearchData:
    """Rows of one shard.

    Raises:
        ConfigError: the file cannot be read, or lacks a column.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"{str(path)!r} is no parquet file ({error}): copy or write the dataset again"
        ) from error
    lacking = [name for name in _MEANINGS if name not in table.column_names]
    if lacking:
        raise ConfigError(
            f"{str(path)!r} has no column {', '.join(lacking)}: name a folder that `mctd "
            "log-searches` wrote"
        )
    nothing = no_observations()
    columns: dict[str, Any] = {}
    for name, empty in _columns(nothing):
        entries = table[name].to_pylist()
        if name == "values":
            columns[name] = np.empty(len(entries), object)
            columns[name][:] = [np.array(values, np.float64) for values in entries]
        else:
            columns[name] = np.array(entries, np.str_ if empty.dtype.kind == "U" else empty.dtype)
    states = table["features"].combine_chunks()
    features = {
        field.name: np.array(states.field(field.name).to_pylist(), np.float16)
        for field in states.type
    }
    return SearchData(
        str(table["family"][0]) if len(table) else "", Observations(**columns, features=features)
    )


def _card(data: SearchData, command: str) -> str:
    seen = data.observations
    rows = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in _MEANINGS.items())
    features = ", ".join(f"`{name}` {part.shape[1]}" for name, part in seen.features.items())
    schedulers = ", ".join(f"`{name}`" for name in np.unique(seen.scheduler).tolist())
    made = f"\n## How it was made\n\n```bash\n{command}\n```\n" if command else ""
    return f"""---
# license: say here under which licence you share what your model made of your prompts
pretty_name: Searches over denoising
task_categories:
  - text-to-image
tags:
  - diffusers
  - diffusion
  - tree-search
  - mctd-diffusers
configs:
  - config_name: default
    data_files:
      - split: {SPLIT}
        path: data/{SPLIT}-*.parquet
---

# Searches over denoising

What searches over a `{data.family}` observed: {len(seen):,} rows of
{len(np.unique(seen.image)):,} images by {len(np.unique(seen.prompt)):,} prompts, stepped by
{schedulers}. Each row is a state that a search went on from, with the values of children that it
drew by one kind of edge: independent draws, whose sample variance is without bias that of the edge
given the state.

Searches go where values are good, so states are not drawn as a sampler draws them. `weight`
corrects for it: over the rows of one image, step index and stride, means weighted by it are those
of a walk down the tree that goes by no value. Below states that a search never went on from there
is nothing to weight, and that much of the bias stays.

```python
from datasets import load_dataset

searches = load_dataset("path/to/this/folder or user/name", split="{SPLIT}")
```

An information gain evaluator is refined on it by

```bash
mctd train-ige --from-searches path/to/this/folder --init-from path/to/head
```

## Columns

| column | meaning |
| --- | --- |
{rows}

Channels of `features`: {features}.
{made}"""

"""A log under another reward: what was denoised once is decoded and scored again.

No call of the denoiser is made. Estimates of unfinished states are decoded by preview, finished
samples in full, as they were when the log was written; so the same reward gives the same values, up
to the half precision that latents are stored in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from datasets.table import InMemoryTable

from mctd_diffusers.denoising.denoiser import chunks
from mctd_diffusers.denoising.scheduler_names import named_scheduler
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.trajectories.files import (
    check_begun,
    read_begun,
    settings_in,
    shard_paths,
    splits_of,
    write_begun,
    write_shard,
)
from mctd_diffusers.trajectories.logging import identity_of, reward_identity
from mctd_diffusers.trajectories.plan import LogSettings


def relabel_log(
    pipe: MCTDPipeline,
    log: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    rows_per_call: int | None = None,
    command: str | None = None,
) -> Iterator[Path]:
    """Write a log again with the values of the pipeline's reward; yields the path of each shard.

    The columns ``value``, ``reward``, ``jumps.value`` and ``siblings.values`` are computed again,
    all others stay bit for bit. Shards that are there already are passed over, and so are those
    that the log itself lacks yet.

    Args:
        pipe: has the reward, and the decoders of the model whose trajectories were logged.
        log: folder of the log, which is left as it is.
        folder: of the new one.
        rows_per_call: latents decoded at once; ``None`` for as many as in the log.
        command: that relabels, for the card.

    Raises:
        ConfigError: there is no log, or it is of another model; or ``folder`` holds another log, or
            this one under another reward.
        SearchError: what the reward raises.
    """
    log, folder = Path(log), Path(folder)
    splits = begin_relabelling(pipe, log, folder, command=command)
    for split, settings in splits.items():
        scorer = Scorer(pipe, rows_per_call or settings.rows_per_call)
        old_paths = shard_paths(log, split, settings.num_shards)
        new_paths = shard_paths(folder, split, settings.num_shards)
        for old, new in zip(old_paths, new_paths, strict=True):
            if old.exists() and not new.exists():
                table = relabelled(pq.read_table(old), scorer)
                write_shard(Dataset(InMemoryTable(table)), new)
                yield new


def begin_relabelling(
    pipe: MCTDPipeline, log: Path, folder: Path, *, command: str | None = None
) -> dict[str, LogSettings]:
    """Check what can be checked, and write the settings; returns those of each split.

    Raises:
        ConfigError: as for :func:`relabel_log`.
    """
    if pipe.reward_model is None:
        raise ConfigError("there is no reward to relabel by: name one, as by --reward clip")
    if log.resolve() == folder.resolve():
        raise ConfigError(
            f"folder {os.fspath(folder)!r} holds the log itself, which stays as it is: name another"
        )
    splits = splits_of(log)
    if not splits:
        raise ConfigError(
            f"there is no log in {os.fspath(log)!r}: name a folder that log-trajectories wrote"
        )
    begun = {split: read_begun(log, split) for split in splits}
    new = {split: _under(pipe, entries) for split, entries in begun.items()}
    for split in begun:
        check_begun(log, split, {"model": identity_of(pipe)})
        check_begun(folder, split, new[split])
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, entries in new.items():
        write_begun(folder, split, entries | {"relabelled_by": command})
    return {split: settings_in(entries) for split, entries in begun.items()}


def _under(pipe: MCTDPipeline, entries: dict[str, Any]) -> dict[str, Any]:
    """The settings of a split under the pipeline's reward."""
    reward = {"reward": reward_identity(pipe.reward_model)}
    return entries | reward | {"relabelled_from": entries.get("reward", "its own reward")}


class Scorer:
    """Decodes stored latents and scores them, in calls of one size.

    Args:
        pipe: has the reward and the decoders.
        rows_per_call: latents decoded at once; ``None`` for what fits the device.
    """

    def __init__(self, pipe: MCTDPipeline, rows_per_call: int | None = None) -> None:
        world = pipe.open_world(
            prompt=[""],
            num_inference_steps=2,
            rows_per_call=rows_per_call,
            search_scheduler=named_scheduler("DDIM", pipe.scheduler.config).scheduler,
        )
        self._decoder = world.prepared.decoder
        self._preview = world.prepared.preview or self._decoder
        self._reward = world.reward
        self._rows_per_call = world.rows_per_call
        self._like = world.prepared.first_latents

    @torch.no_grad()
    def score(
        self,
        latents: npt.NDArray[np.float16],
        prompts: Sequence[str],
        finished: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.float64]:
        """Rewards of clean latents.

        Args:
            latents: ``[count, channels, height, width]``.
            prompts: of each.
            finished: ``[count]`` whether it is decoded in full, else by preview.

        Raises:
            SearchError: what the reward raises.
        """
        rewards = np.empty(len(latents))
        for decoder, wanted in ((self._decoder, finished), (self._preview, ~finished)):
            places = np.flatnonzero(wanted)
            for chunk in chunks(len(places), self._rows_per_call):
                filled = places[chunk.rows][chunk.filled]
                images = decoder(torch.from_numpy(latents[filled]).to(self._like))
                scores = self._reward(images, [prompts[i] for i in filled], filled.tolist())
                rewards[places[chunk.rows]] = scores[: chunk.useful]
        return rewards


def relabelled(table: pa.Table, scorer: Scorer) -> pa.Table:
    """The rows of a shard with new values; other columns as they are.

    Args:
        table: as a shard holds it, with its metadata.
        scorer: of the new reward.

    Raises:
        SearchError: what the reward raises.
    """
    table = table.combine_chunks()
    shape = table["latent_shape"][0].as_py()
    prompts = table["prompt"].to_pylist()

    def scored(
        nested: pa.ListArray, rows: npt.NDArray[Any], finished: bool | npt.NDArray[np.bool_]
    ) -> pa.Array:
        """Scores in the place of the latents, which are the innermost lists of the rows."""
        if pa.types.is_list(nested.type.value_type):
            lengths = pc.list_value_length(nested).to_numpy()
            inner = scored(nested.flatten(), np.repeat(rows, lengths), finished)
            ends = np.cumsum(lengths, dtype=np.int32)
            return pa.ListArray.from_arrays(np.append(np.int32(0), ends), inner)
        latents = nested.flatten().to_numpy(zero_copy_only=False).reshape(len(nested), *shape)
        is_finished = np.broadcast_to(finished, len(nested))
        return pa.array(scorer.score(latents, [prompts[row] for row in rows], is_finished))

    rows = np.arange(len(table))
    jumps, siblings = _fields(table["jumps"]), _fields(table["siblings"])
    ends = _flat(jumps["step_index"]) + _flat(jumps["stride"])
    num_steps = np.repeat(table["num_steps"].to_numpy(), pc.list_value_length(jumps["stride"]))
    jumps["value"] = scored(jumps["denoised"], rows, ends == num_steps)
    siblings["values"] = scored(siblings["denoised"], rows, finished=False)
    new = {
        "value": scored(table["denoised"].chunk(0), rows, finished=False),
        "reward": scored(table["final_latents"].chunk(0), rows, finished=True),
        "jumps": pa.StructArray.from_arrays(list(jumps.values()), names=list(jumps)),
        "siblings": pa.StructArray.from_arrays(list(siblings.values()), names=list(siblings)),
    }
    for name, column in new.items():
        field = table.schema.field(name)
        place = table.schema.get_field_index(name)
        table = table.set_column(place, field, column.cast(field.type))
    return table


def _fields(column: pa.ChunkedArray) -> dict[str, pa.Array]:
    """The fields of a struct column of one chunk, by name."""
    struct = column.chunk(0)
    return dict(zip([field.name for field in struct.type], struct.flatten(), strict=True))


def _flat(lists: pa.ListArray) -> npt.NDArray[np.int64]:
    numbers: npt.NDArray[np.int64] = lists.flatten().to_numpy()
    return numbers

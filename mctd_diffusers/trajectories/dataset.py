"""Reading a log of trajectories: everything but the latents, as arrays in memory, and checked.

The latents are most of a log. They are read once, a few trajectories at a time, for what is made of
them here: similarities, and the costs of jumps. Who learns from them reads them by themselves.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int

from mctd_diffusers.denoising.scheduler_names import named_scheduler
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.trajectories.targets import final_similarity, jump_costs

_COLUMNS: Final = (
    *("index", "prompt", "seed", "family", "scheduler", "eta", "num_steps", "guidance_scale"),
    *("latent_shape", "timestep", "log_snr", "latents", "denoised", "value", "features"),
    *("final_latents", "reward"),
)
_OF_LATENTS: Final = (
    *("index", "prompt", "scheduler", "num_steps", "guidance_scale", "latent_shape", "timestep"),
    *("log_snr", "latents", "denoised"),
)
_NESTED: Final = {
    "jumps": ("step_index", "stride", "denoised", "truncation_error", "value"),
    "siblings": ("step_index", "stride", "values"),
}
_IN_MEMORY: Final = (
    *(name for name in _COLUMNS if name != "latents"),
    *(f"{outer}.{name}" for outer, names in _NESTED.items() for name in names),
)
_SHARD: Final = re.compile(r"(?P<split>.+?)-(?P<number>\d+)(?:-of-(?P<count>\d+))?\.parquet")
_READ_AT_ONCE: Final = 16
_TRAJECTORIES_FOR_COSTS: Final = 256


class Trajectories(NamedTuple):
    """What is known of each trajectory, ``[trajectories]``.

    Attributes:
        number: its index in the log.
        prompt: what was asked for.
        scheduler: class name.
        eta: share of fresh noise.
        num_steps: of the schedule.
        guidance_scale: of classifier-free guidance.
        reward: of the finished sample.
    """

    number: Int[np.ndarray, " trajectories"]
    prompt: npt.NDArray[Any]
    scheduler: npt.NDArray[Any]
    eta: Float[np.ndarray, " trajectories"]
    num_steps: Int[np.ndarray, " trajectories"]
    guidance_scale: Float[np.ndarray, " trajectories"]
    reward: Float[np.ndarray, " trajectories"]


class States(NamedTuple):
    """Evaluated states, ``[states]``; those of a trajectory follow each other.

    Attributes:
        trajectory: row of its trajectory.
        step_index: steps done before it.
        log_snr: its noise level.
        final_log_snr: that of the finished sample.
        value: reward of the denoised estimate, as it is.
        similarity: of the denoised estimate with the finished latents, from -1 to 1.
    """

    trajectory: Int[np.ndarray, " states"]
    step_index: Int[np.ndarray, " states"]
    log_snr: Float[np.ndarray, " states"]
    final_log_snr: Float[np.ndarray, " states"]
    value: Float[np.ndarray, " states"]
    similarity: Float[np.ndarray, " states"]


class Jumps(NamedTuple):
    """Deterministic jumps that were made, ``[jumps]``.

    Attributes:
        state: row of the state that it left.
        stride: steps that it crossed.
        truncation_error: rms difference of the latents from those of fine steps.
        value: reward of the denoised estimate where it arrived, as it is.
        similarity: of that estimate with the finished latents of the trajectory.
    """

    state: Int[np.ndarray, " jumps"]
    stride: Int[np.ndarray, " jumps"]
    truncation_error: Float[np.ndarray, " jumps"]
    value: Float[np.ndarray, " jumps"]
    similarity: Float[np.ndarray, " jumps"]


class Siblings(NamedTuple):
    """Groups of stochastic draws from one state, ``[groups]``.

    Attributes:
        state: row of their parent.
        stride: steps that they crossed.
        values: ``[groups, siblings]`` rewards of their denoised estimates, as they are.
    """

    state: Int[np.ndarray, " groups"]
    stride: Int[np.ndarray, " groups"]
    values: Float[np.ndarray, "groups siblings"]


class LatentStates(NamedTuple):
    """Evaluated states of a split with their latents, ``[states]``, trajectory by trajectory.

    Attributes:
        prompt: what was asked for.
        latents: ``[states, *sample]``, float16, in variance-preserving units.
        denoised: ``[states, *sample]`` guided denoised estimates, float16.
        timestep: what the network was told.
        log_snr: noise level.
        guidance_scale: that the estimates were made under.
    """

    prompt: npt.NDArray[Any]
    latents: npt.NDArray[np.float16]
    denoised: npt.NDArray[np.float16]
    timestep: Float[np.ndarray, " states"]
    log_snr: Float[np.ndarray, " states"]
    guidance_scale: Float[np.ndarray, " states"]

    def take(self, kept: npt.NDArray[Any]) -> LatentStates:
        """Some of the states, by a mask or by their rows."""
        return LatentStates(*(column[kept] for column in self))


@dataclass(frozen=True)
class LogSplit:
    """One split of a log, in memory.

    Attributes:
        name: of the split.
        trajectories: one row each.
        states: one row each.
        features: ``{name: [states, channels]}``, float16.
        jumps: one row each.
        siblings: one row a group.
    """

    name: str
    trajectories: Trajectories
    states: States
    features: dict[str, Float[np.ndarray, "states _"]]
    jumps: Jumps
    siblings: Siblings

    def target_log_snr(
        self, state: Int[np.ndarray, "*batch"], stride: Int[np.ndarray, "*batch"]
    ) -> Float[np.ndarray, "*batch"]:
        """Noise level that strides from states lead to, at most to the end of the schedule."""
        levels = np.append(self.states.log_snr, np.nan)
        return np.asarray(
            np.where(
                self.finishes(state, stride),
                self.states.final_log_snr[state],
                levels[np.minimum(state + stride, len(levels) - 1)],
            )
        )

    def finishes(
        self, state: Int[np.ndarray, "*batch"], stride: Int[np.ndarray, "*batch"]
    ) -> npt.NDArray[np.bool_]:
        """Whether strides from states lead to the finished sample."""
        num_steps = self.trajectories.num_steps[self.states.trajectory[state]]
        return np.asarray(self.states.step_index[state] + stride == num_steps)

    def take(self, kept: npt.NDArray[np.bool_], name: str) -> LogSplit:
        """The trajectories that are marked, as a split of another name."""
        trajectory = np.cumsum(kept) - 1
        of_states = kept[self.states.trajectory]
        state = np.cumsum(of_states) - 1
        jumps, groups = of_states[self.jumps.state], of_states[self.siblings.state]
        states = States(*(column[of_states] for column in self.states))
        made = Jumps(*(column[jumps] for column in self.jumps))
        drawn = Siblings(*(column[groups] for column in self.siblings))
        return LogSplit(
            name,
            Trajectories(*(column[kept] for column in self.trajectories)),
            states._replace(trajectory=trajectory[states.trajectory]),
            {block: rows[of_states] for block, rows in self.features.items()},
            made._replace(state=state[made.state]),
            drawn._replace(state=state[drawn.state]),
        )


class JumpTable(NamedTuple):
    """What a jump between two levels costs in the mean, see `targets.jump_costs`.

    Attributes:
        log_snr: ``[levels]``.
        cost: ``[levels, levels]`` in latent units.
    """

    log_snr: Float[np.ndarray, " levels"]
    cost: Float[np.ndarray, "levels levels"]


@dataclass(frozen=True)
class Log:
    """A log of trajectories of one model.

    Attributes:
        family: class name of the stock pipeline.
        feature_channels: ``{name: channels}`` of the features.
        splits: by name.
    """

    family: str
    feature_channels: dict[str, int]
    splits: dict[str, LogSplit]


def read_log(folder: str | Path, splits: Iterable[str] | None = None) -> Log:
    """Read a log, without its latents.

    Args:
        folder: as `mctd log-trajectories` writes it.
        splits: names of those to read; ``None`` for all there are.

    Raises:
        ConfigError: it is not the folder of a log; or a split or a column is missing, a split is
            empty, a number is not finite, or rows come from several models.
    """
    shards = _shards_of(Path(folder))
    wanted = list(shards if splits is None else splits)
    for name in wanted:
        if name not in shards:
            raise ConfigError(f"no split {name!r} in {str(folder)!r}, only {sorted(shards)}")
    read = {name: _read_split(name, shards[name]) for name in wanted}
    kinds = {name: (family, channels) for name, (family, channels, _) in read.items()}
    first = wanted[0]
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise ConfigError(
                f"split {name!r} is of {_model(*kind)}, split {first!r} of {_model(*kinds[first])}:"
                " log the splits of one model in one folder"
            )
    return Log(*kinds[first], {name: split for name, (_, _, split) in read.items()})


def read_jump_table(folder: str | Path, split: str = "train") -> JumpTable:
    """What jumps cost along the deterministic DDIM trajectories of the finest grid of a split.

    Args:
        folder: of the log.
        split: whose trajectories; the first 256 of the finest grid count.

    Raises:
        ConfigError: the split is not there, or has no deterministic DDIM trajectory.
    """
    shards = _shards_of(Path(folder))
    if split not in shards:
        raise ConfigError(f"no split {split!r} in {str(folder)!r}, only {sorted(shards)}")
    finest = 0
    latents: list[Any] = []
    denoised: list[Any] = []
    levels: Any = None
    for path in shards[split]:
        for table in _tables(path, ("scheduler", "eta", "num_steps")):
            steps = np.asarray(table["num_steps"])[_is_deterministic(table)]
            finest = max(finest, int(steps.max(initial=0)))
    if not finest:
        raise ConfigError(
            f"split {split!r} has no trajectory of a DDIMScheduler with eta 0, along which the "
            "costs of jumps are computed: log some"
        )
    names = (
        "index",
        "scheduler",
        "eta",
        "num_steps",
        "log_snr",
        "latents",
        "denoised",
        "final_latents",
    )
    for path in shards[split]:
        few = pq.read_table(path, columns=list(names[1:4]))
        if not (_is_deterministic(few) & (np.asarray(few["num_steps"]) == finest)).any():
            continue
        for table in _tables(path, names):
            rows = _is_deterministic(table) & (np.asarray(table["num_steps"]) == finest)
            if not rows.any() or len(latents) >= _TRAJECTORIES_FOR_COSTS:
                continue
            read, count = _Reader(split, table.filter(pa.array(rows))), int(rows.sum())
            states = read.rows("latents", count * finest).reshape(count, finest, -1)
            final = read.rows("final_latents", count)[:, None]
            levels = read.rows("log_snr", count)[0].astype(np.float64)
            latents += list(np.concatenate([states, final], axis=1))
            denoised += list(read.rows("denoised", count * finest).reshape(count, finest, -1))
    cost = jump_costs(
        np.stack(latents[:_TRAJECTORIES_FOR_COSTS]).astype(np.float32),
        np.stack(denoised[:_TRAJECTORIES_FOR_COSTS]).astype(np.float32),
        levels,
    )
    return JumpTable(levels, cost)


def read_latent_states(folder: str | Path, config: Mapping[str, Any]) -> dict[str, LatentStates]:
    """Read the latents of a log's states and their denoised estimates, by split.

    Latents are half of a log, so this takes four bytes for each of their numbers.

    Args:
        folder: of the log.
        config: of the model's scheduler, of which those of the log were made.

    Raises:
        ConfigError: it is not the folder of a log; or a column is missing, a number is not finite,
            samples differ in shape, or are of a scheduler that matches flows.
    """
    states: dict[str, LatentStates] = {}
    for split, paths in _shards_of(Path(folder)).items():
        for path in paths:
            _check_columns(split, path)
        parts = [
            _latent_states(_Reader(split, table), config)
            for path in paths
            for table in _tables(path, _OF_LATENTS)
        ]
        shapes = {part.latents.shape[1:] for part in parts}
        if len(shapes) != 1:
            raise ConfigError(
                f"split {split!r} holds samples of shapes {sorted(shapes)}: keep a log to one "
                "size, and log at least one trajectory"
            )
        states[split] = LatentStates(*_columns(parts))
    return states


def _latent_states(read: _Reader, config: Mapping[str, Any]) -> LatentStates:
    """States of a few trajectories."""
    steps = read.flat("num_steps")
    total, trajectory = int(steps.sum()), np.repeat(np.arange(len(steps)), steps)
    row = np.arange(total)
    shape = read.rows("latent_shape", len(steps))[0]
    latents = read.rows("latents", total).astype(np.float32)
    log_snr = read.flat("log_snr")[row + trajectory]
    schedulers = read.texts("scheduler")
    for name in np.unique(schedulers).tolist():
        if not _preserves_variance(name, config):
            same = (schedulers == name)[trajectory]
            latents[same] *= np.exp(-np.logaddexp(0, -log_snr[same]) / 2)[:, None]
    return LatentStates(
        prompt=read.texts("prompt")[trajectory],
        latents=latents.astype(np.float16).reshape(-1, *shape),
        denoised=read.rows("denoised", total).reshape(-1, *shape),
        timestep=read.flat("timestep"),
        log_snr=log_snr,
        guidance_scale=read.flat("guidance_scale")[trajectory],
    )


def _preserves_variance(name: str, config: Mapping[str, Any]) -> bool:
    """Whether samples of a scheduler do, or else hold clean latents by a factor of 1.

    Raises:
        ConfigError: they do neither, as those that match flows.
    """
    scheduler = named_scheduler(name, config).scheduler
    scheduler.set_timesteps(2)
    stepper = Stepper(scheduler)
    scale = stepper.variance_preserving(torch.ones(1, 1), 0).squeeze()
    explodes = torch.isclose(scale, stepper.log_snr[0].sigmoid().sqrt())
    if scale != 1 and not explodes:
        raise ConfigError(
            f"samples of {name} neither preserve variance nor hold clean latents by a factor of 1: "
            "log trajectories of another scheduler, such as DDIM or Euler"
        )
    return bool(scale == 1)


# --- shards


def _shards_of(folder: Path) -> dict[str, list[Path]]:
    """The shards of every split, in order.

    Raises:
        ConfigError: there is no such folder, or no shard in it.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{str(folder)!r} is no folder: name one that `mctd log-trajectories` wrote"
        )
    found: dict[str, list[Path]] = {}
    counts: dict[str, int] = {}
    for path in sorted((folder / "data").glob("[!.]*.parquet")):
        match = _SHARD.fullmatch(path.name)
        if match is not None:
            found.setdefault(match["split"], []).append(path)
            counts[match["split"]] = int(match["count"] or 0)
    if not found:
        raise ConfigError(
            f"{str(folder)!r} has no files data/<split>-00000-of-00001.parquet: name a folder that "
            "`mctd log-trajectories` wrote"
        )
    for name, paths in found.items():
        if len(paths) < counts[name]:
            warnings.warn(
                f"split {name!r} has {len(paths)} of {counts[name]} shards: it is read as it is; "
                "log the rest by the command that began it",
                stacklevel=3,
            )
    return found


def _tables(path: Path, columns: Iterable[str]) -> Iterator[pa.Table]:
    """Columns of a shard, a few rows at a time."""
    file = pq.ParquetFile(path)
    for batch in file.iter_batches(_READ_AT_ONCE, columns=list(columns)):
        yield pa.Table.from_batches([batch])


def _read_split(name: str, shards: list[Path]) -> tuple[str, dict[str, int], LogSplit]:
    parts: list[LogSplit] = []
    first: tuple[str, dict[str, int]] | None = None
    for path in shards:
        _check_columns(name, path)
        for table in _tables(path, _IN_MEMORY):
            family, part = _read_part(name, table)
            kind = family, {block: rows.shape[1] for block, rows in part.features.items()}
            first = first or kind
            if kind != first:
                raise ConfigError(
                    f"split {name!r} holds {_model(*first)} and, in {path.name}, {_model(*kind)}: "
                    "keep a log to one model"
                )
            parts.append(part)
    if first is None:
        raise ConfigError(f"split {name!r} is empty: log at least one trajectory")
    return *first, _joined(name, parts)


def _check_columns(split: str, path: Path) -> None:
    """Refuse a shard that lacks a column.

    Raises:
        ConfigError: names what is missing, and what is there; or the file is no parquet file.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{str(path)!r} is no parquet file ({error}): log it again") from error
    missing = [name for name in (*_COLUMNS, *_NESTED) if name not in schema.names]
    for outer in set(_NESTED) - set(missing):
        kind = schema.field(outer).type
        inner = [field.name for field in kind] if pa.types.is_struct(kind) else []
        missing += [f"{outer}.{column}" for column in _NESTED[outer] if column not in inner]
    if missing:
        raise ConfigError(
            f"split {split!r} has no column {', '.join(missing)} in {path.name}, only "
            f"{', '.join(schema.names)}: name a folder that `mctd log-trajectories` wrote"
        )


class _Reader:
    """Columns of some rows as flat arrays, checked.

    Args:
        split: name, for messages.
        table: rows of a shard.
    """

    def __init__(self, split: str, table: pa.Table) -> None:
        self.split = split
        self.table = table
        self.index = self.flat("index")

    def column(self, name: str) -> Any:
        """An arrow array; ``"jumps.value"`` is a field of a column of structs."""
        outer, _, inner = name.partition(".")
        array = self.table[outer].combine_chunks()
        # `flatten` of a struct minds where its rows begin, which `field` does not.
        return array.flatten()[array.type.get_field_index(inner)] if inner else array

    def flat(self, name: str) -> npt.NDArray[Any]:
        """All numbers of a column in one row after the other.

        Raises:
            ConfigError: one is missing or not finite; names the trajectory.
        """
        array, rows = self.column(name), None
        while _is_list(array.type):
            parents = np.asarray(pc.list_parent_indices(array))
            rows = parents if rows is None else rows[parents]
            array = array.flatten()
        numbers = array.to_numpy(zero_copy_only=False)
        if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            first = int(np.flatnonzero(~np.isfinite(numbers))[0])
            row = first if rows is None else int(rows[first])
            raise ConfigError(
                f"column {name!r} of split {self.split!r} holds {numbers[first]} in trajectory "
                f"{self.index[row]}: log it again, or take its shard away"
            )
        return numbers

    @property
    def feature_names(self) -> list[str]:
        """Columns of features."""
        return [f"features.{field.name}" for field in self.column("features").type]

    def texts(self, name: str) -> npt.NDArray[Any]:
        """A column of texts."""
        return np.array(self.column(name).to_pylist(), dtype=np.str_)

    def lengths(self, name: str) -> npt.NDArray[np.int64]:
        """Entries of each row's list."""
        return np.asarray(pc.list_value_length(self.column(name))).astype(np.int64)

    def check_lengths(self, name: str, expected: Int[np.ndarray, " rows"]) -> None:
        """Refuse rows whose lists are not as long as they should be.

        Raises:
            ConfigError: names the first of them.
        """
        found = self.lengths(name)
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            row = int(wrong[0])
            raise ConfigError(
                f"column {name!r} of split {self.split!r} has {found[row]} entries in trajectory "
                f"{self.index[row]}, which needs {expected[row]} for its steps: log it again"
            )

    def edges(
        self, name: str, first: Int[np.ndarray, " rows"], num_steps: Int[np.ndarray, " rows"]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Trajectory, state and stride of each jump or group of siblings.

        Args:
            name: of the column of structs.
            first: row of each trajectory's first state.
            num_steps: of each trajectory.

        Raises:
            ConfigError: fields of a row differ in length, or an edge leads past the end.
        """
        for field in _NESTED[name]:
            self.check_lengths(f"{name}.{field}", self.lengths(f"{name}.step_index"))
        owner = np.repeat(np.arange(len(self.table)), self.lengths(f"{name}.step_index"))
        step_index, stride = self.flat(f"{name}.step_index"), self.flat(f"{name}.stride")
        wrong = (step_index < 0) | (stride < 1) | (step_index + stride > num_steps[owner])
        if wrong.any():
            one = int(np.flatnonzero(wrong)[0])
            raise ConfigError(
                f"{name} of split {self.split!r} cross {stride[one]} steps from step "
                f"{step_index[one]} in trajectory {self.index[owner[one]]}, which has "
                f"{num_steps[owner[one]]}: log it again"
            )
        return owner, first[owner] + step_index, stride

    def rows(self, name: str, count: int) -> npt.NDArray[Any]:
        """A column whose innermost lists are equally long, ``[count, length]``.

        Raises:
            ConfigError: they are not, or not so many.
        """
        numbers, array = self.flat(name), self.column(name)
        while _is_list(array.type.value_type):
            array = array.flatten()
        lengths = np.unique(np.asarray(pc.list_value_length(array)))
        if len(lengths) > 1 or len(array) != count:
            raise ConfigError(
                f"column {name!r} of split {self.split!r} has {len(array)} rows of lengths "
                f"{lengths.tolist()}, and needs {count} of one length: keep a log to one model, or "
                "log it again"
            )
        return numbers.reshape(count, lengths[0] if count else 0)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind))


def _read_part(split: str, table: pa.Table) -> tuple[str, LogSplit]:
    """A few trajectories of one model.

    Raises:
        ConfigError: they are of several, or lists do not fit each other.
    """
    read = _Reader(split, table)
    count = len(table)
    families = sorted(set(read.texts("family")))
    if len(families) > 1:
        raise ConfigError(
            f"split {split!r} holds trajectories of {' and '.join(families)}: keep a log to one "
            "model"
        )
    trajectories = Trajectories(
        number=read.index,
        prompt=read.texts("prompt"),
        scheduler=read.texts("scheduler"),
        eta=read.flat("eta"),
        num_steps=read.flat("num_steps"),
        guidance_scale=read.flat("guidance_scale"),
        reward=read.flat("reward"),
    )
    steps = trajectories.num_steps
    read.check_lengths("log_snr", steps + 1)
    for name in ("denoised", "value", *read.feature_names):
        read.check_lengths(name, steps)
    total = int(steps.sum())
    trajectory = np.repeat(np.arange(count), steps)
    first = np.cumsum(steps) - steps
    step_index = np.arange(total) - first[trajectory]
    levels = read.flat("log_snr")
    final = read.rows("final_latents", count)
    states = States(
        trajectory=trajectory,
        step_index=step_index,
        log_snr=levels[np.arange(total) + trajectory],
        final_log_snr=levels[np.cumsum(steps + 1) - 1][trajectory],
        value=read.flat("value"),
        similarity=final_similarity(read.rows("denoised", total), final[trajectory]),
    )
    features = {
        name.removeprefix("features."): read.rows(name, total) for name in read.feature_names
    }
    owner, state, stride = read.edges("jumps", first, steps)
    arrived = read.rows("jumps.denoised", len(state)) if len(state) else final[:0]
    jumps = Jumps(
        state=state,
        stride=stride,
        truncation_error=read.flat("jumps.truncation_error"),
        value=read.flat("jumps.value"),
        similarity=final_similarity(arrived, final[owner]),
    )
    _, state, stride = read.edges("siblings", first, steps)
    siblings = Siblings(state, stride, read.rows("siblings.values", len(state)))
    return families[0], LogSplit(split, trajectories, states, features, jumps, siblings)


def _joined(name: str, parts: list[LogSplit]) -> LogSplit:
    """Parts of a split one after the other.

    Raises:
        ConfigError: groups of siblings differ in size.
    """
    sizes = {part.siblings.values.shape[1] for part in parts if len(part.siblings.state)}
    if len(sizes) > 1:
        raise ConfigError(
            f"groups of siblings in split {name!r} are of sizes {sorted(sizes)}: log a split with "
            "one number of siblings"
        )
    trajectory = np.cumsum([0] + [len(part.trajectories.number) for part in parts])
    state = np.cumsum([0] + [len(part.states.trajectory) for part in parts])
    filled = [part for part in parts if len(part.siblings.state)] or parts[:1]
    moved = [
        (
            part.states._replace(trajectory=part.states.trajectory + trajectory[i]),
            part.jumps._replace(state=part.jumps.state + state[i]),
        )
        for i, part in enumerate(parts)
    ]
    drawn = [
        part.siblings._replace(state=part.siblings.state + state[i])
        for i, part in enumerate(parts)
        if any(part is one for one in filled)
    ]
    return LogSplit(
        name,
        Trajectories(*_columns([part.trajectories for part in parts])),
        States(*_columns([states for states, _ in moved])),
        {
            block: np.concatenate([part.features[block] for part in parts])
            for block in parts[0].features
        },
        Jumps(*_columns([jumps for _, jumps in moved])),
        Siblings(*_columns(drawn)),
    )


def _columns(parts: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Columns of several tables, each in one."""
    return (np.concatenate(columns) for columns in zip(*parts, strict=True))


def _is_deterministic(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows are of DDIM without fresh noise."""
    is_ddim = np.asarray(table["scheduler"]) == "DDIMScheduler"
    return np.asarray(is_ddim & (np.asarray(table["eta"]) == 0))


def _model(family: str, channels: Mapping[str, int]) -> str:
    """A model in words."""
    return f"a {family} with features {dict(channels)}"

"""Rows to learn from: states of a log, and what is known of the jumps that leave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from mctd_diffusers.models.calibration import Calibration
from mctd_diffusers.trajectories.dataset import LogSplit
from mctd_diffusers.trajectories.targets import resolved_variance

Floats = npt.NDArray[np.float64]


class JumpRows(NamedTuple):
    """Jumps of every stride from states; NaN where nothing is known of one.

    Attributes:
        target_log_snr: where the jump leads; the state's own level where it was not made.
        mean_gain: change of the calibrated value; the mean over siblings, where there are any.
        sibling_variance: of calibrated values, see `targets.resolved_variance`.
        final_similarity: of the estimate after the deterministic jump.
        log_truncation_error: natural log; NaN as well of a jump that *is* the fine path.
    """

    target_log_snr: Float[np.ndarray, "states jumps"]
    mean_gain: Float[np.ndarray, "states jumps"]
    sibling_variance: Float[np.ndarray, "states jumps"]
    final_similarity: Float[np.ndarray, "states jumps"]
    log_truncation_error: Float[np.ndarray, "states jumps"]


def strides_of(split: LogSplit) -> tuple[int, ...]:
    """Strides of the jumps and siblings of a split, rising."""
    found = np.union1d(split.jumps.stride, split.siblings.stride)
    return tuple(found.tolist())


def state_values(split: LogSplit, calibration: Calibration) -> Float[np.ndarray, " states"]:
    """Calibrated values of all states of a split, in reward units."""
    return calibration(split.states.value, split.states.log_snr)


def jump_rows(split: LogSplit, calibration: Calibration, strides: tuple[int, ...]) -> JumpRows:
    """Collect what a log knows of the jumps of some strides from each of its states.

    Args:
        split: of a log.
        calibration: of its values; a finished sample's value is its reward, as it is.
        strides: of the columns.
    """
    before = state_values(split, calibration)
    nothing = np.full((len(before), len(strides)), np.nan)
    rows = JumpRows(
        np.repeat(split.states.log_snr[:, None].astype(np.float64), len(strides), axis=1),
        *(nothing.copy() for _ in range(4)),
    )
    for column, stride in enumerate(strides):
        jumps, drawn = split.jumps, split.siblings
        made = jumps.stride == stride
        state = jumps.state[made]
        with np.errstate(divide="ignore"):
            error = np.log(jumps.truncation_error[made].astype(np.float64))
        rows.log_truncation_error[state, column] = np.where(np.isfinite(error), error, np.nan)
        rows.final_similarity[state, column] = jumps.similarity[made]
        after = _arrived(split, calibration, state, stride, jumps.value[made])
        rows.mean_gain[state, column] = after - before[state]
        rows.target_log_snr[state, column] = _level(split, state, stride)

        made = drawn.stride == stride
        state = drawn.state[made]
        siblings = _arrived(split, calibration, state[:, None], stride, drawn.values[made])
        if len(state):
            rows.sibling_variance[state, column] = resolved_variance(siblings)
            rows.mean_gain[state, column] = siblings.mean(axis=1) - before[state]
            rows.target_log_snr[state, column] = _level(split, state, stride)
    return rows


def free_jumps(
    split: LogSplit,
    calibration: Calibration,
    states: Int[np.ndarray, " rows"],
    count: int,
    rng: np.random.Generator,
) -> JumpRows:
    """Draw jumps along the trajectories of states: every pair of states of a trajectory is one.

    Only their gains and similarities are known. A trajectory's own steps, not one jump, made them.

    Args:
        split: of a log.
        calibration: of its values.
        states: rows of the states that they leave.
        count: of jumps for each.
        rng: draws where they lead, evenly over what is left of the trajectory.
    """
    trajectory = split.states.trajectory[states]
    left = split.trajectories.num_steps[trajectory] - split.states.step_index[states]
    stride = rng.integers(1, left[:, None] + 1, size=(len(states), count))
    ends = stride == left[:, None]
    here = np.repeat(states[:, None], count, axis=1)
    there = np.where(ends, here, here + stride)  # the finished sample is no state
    values = state_values(split, calibration)
    reward = split.trajectories.reward[trajectory][:, None]
    nothing = np.full(stride.shape, np.nan)
    return JumpRows(
        target_log_snr=split.target_log_snr(here, stride).astype(np.float64),
        mean_gain=np.where(ends, reward, values[there]) - values[here],
        sibling_variance=nothing,
        final_similarity=np.where(ends, 1.0, split.states.similarity[there]),
        log_truncation_error=nothing,
    )


def cells_of(splits: Sequence[LogSplit]) -> list[Int[np.ndarray, " states"]]:
    """Number the sets of states that are at the same step of the same schedule, over all splits.

    The same scheduler, share of fresh noise, number of steps and step index. With the stride, a
    cell is what a table of means could know, without a look at the state.
    """
    numbers: dict[tuple[str, float, int, int], int] = {}
    cells = []
    for split in splits:
        trajectory, table = split.states.trajectory, split.trajectories
        keys = zip(
            table.scheduler[trajectory].tolist(),
            table.eta[trajectory].tolist(),
            table.num_steps[trajectory].tolist(),
            split.states.step_index.tolist(),
            strict=True,
        )
        cells.append(np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64))
    return cells


def groups_of(cells: Int[np.ndarray, " states"], size: int) -> list[npt.NDArray[np.int64]]:
    """Split states into groups of one cell each, of ``size`` at the most, for a batch to rank."""
    order = np.argsort(cells, kind="stable")
    bounds = np.flatnonzero(np.diff(cells[order])) + 1
    return [
        part[start : start + size]
        for part in np.split(order, bounds)
        for start in range(0, len(part), size)
    ]


def _arrived(
    split: LogSplit,
    calibration: Calibration,
    state: npt.NDArray[np.int64],
    stride: int,
    value: npt.NDArray[np.floating],
) -> Floats:
    """Calibrated values after jumps; of a finished sample its reward."""
    state = np.broadcast_to(state, value.shape)
    finished = split.finishes(state, np.full_like(state, stride))
    return np.where(finished, value, calibration(value, _level(split, state, stride)))


def _level(split: LogSplit, state: npt.NDArray[np.int64], stride: int) -> npt.NDArray[np.floating]:
    return split.target_log_snr(state, np.full_like(state, stride))

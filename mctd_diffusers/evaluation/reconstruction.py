"""How well a feature decoder makes denoised estimates again, beside what takes no features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

EDGES: Final = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of signal, ``alpha^2`` of ``alpha^2 + sigma^2 = 1``, between which errors are told."""


class LevelErrors(NamedTuple):
    """Errors at noise levels between two shares of signal, root mean square over all numbers.

    Attributes:
        low: share of signal, at least.
        high: less than that.
        states: that were decoded.
        decoder: error of the decoder.
        mean: of the mean estimate of the training split between these shares.
        other: of the estimate of another state of another prompt.
    """

    low: float
    high: float
    states: int
    decoder: float
    mean: float
    other: float

    @property
    def explained(self) -> float:
        """Share of the variance around the mean estimate that the decoder explains."""
        return 1 - (self.decoder / self.mean) ** 2


def level_of(log_snr: Float[np.ndarray, " states"]) -> npt.NDArray[np.int64]:
    """Number of the interval of `EDGES` that each state lies in."""
    signal = 1 / (1 + np.exp(-log_snr.astype(np.float64)))
    return np.clip(np.searchsorted(EDGES, signal, side="right") - 1, 0, len(EDGES) - 2)


def mean_estimates(
    denoised: Float[np.ndarray, "states *sample"], log_snr: Float[np.ndarray, " states"]
) -> Float[np.ndarray, "levels *sample"]:
    """Mean estimate between each two shares of signal; NaN where there is none."""
    level = level_of(log_snr)
    means = np.full((len(EDGES) - 1, *denoised.shape[1:]), np.nan)
    for number in np.unique(level):
        means[number] = denoised[level == number].mean(axis=0, dtype=np.float64)
    return means


def reconstruction_errors(
    decoded: Float[np.ndarray, "states *sample"],
    denoised: Float[np.ndarray, "states *sample"],
    log_snr: Float[np.ndarray, " states"],
    prompts: Sequence[str],
    means: Float[np.ndarray, "levels *sample"],
) -> list[LevelErrors]:
    """Errors at every noise level that there are states of two prompts and a mean of.

    Args:
        decoded: what the decoder made of the features of held-out states.
        denoised: their denoised estimates.
        log_snr: their noise levels.
        prompts: of each.
        means: of the training split, see `mean_estimates`.
    """
    level, found = level_of(log_snr), []
    for number, (low, high) in enumerate(pairwise(EDGES)):
        rows = np.flatnonzero(level == number)
        texts = np.array(list(prompts), dtype=np.str_)[rows]
        if len(np.unique(texts)) < 2 or np.isnan(means[number]).any():
            continue
        actual = denoised[rows].astype(np.float64)
        other = actual[_of_another_prompt(texts)]
        found.append(
            LevelErrors(
                low=low,
                high=high,
                states=len(rows),
                decoder=_rms(decoded[rows] - actual),
                mean=_rms(means[number] - actual),
                other=_rms(other - actual),
            )
        )
    return found


def errors_table(errors: Sequence[LevelErrors]) -> str:
    """The errors in markdown."""
    rows = "\n".join(
        f"| {one.low:g} to {one.high:g} | {one.states} | {one.decoder:.3f} | {one.mean:.3f} "
        f"| {one.other:.3f} | {one.explained:.3f} |"
        for one in errors
    )
    return f"""| share of signal | states | decoder | mean estimate | other sample | explained |
| --- | --- | --- | --- | --- | --- |
{rows}"""


def _of_another_prompt(prompts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """For each state the next one, round the end, of another prompt."""
    count = len(prompts)
    return np.array(
        [
            next(
                other % count for other in range(row, row + count) if prompts[other % count] != one
            )
            for row, one in enumerate(prompts)
        ]
    )


def _rms(difference: Any) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))

"""Where latents live: samples by handle, what each holds, and on which device.

A sample is *lazy* until somebody needs its latents: it holds where it comes from (a seed, or a
parent with an action and a seed) and no tensor. Once made it forgets its origin, so a released
parent lives exactly as long as its lazy children; of its last edge it remembers the noise by seed,
which is all that a perturbation needs. A lazy sample whose edge takes two network calls may stand
midway: that far it comes without a call.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.errors import CapacityError
from mctd_diffusers.search.environment import Action, Handles, check_unused

_TRIM_AFTER = 64 * 2**20  # bytes: seldom enough to take no time, often enough to hold little


@dataclass(frozen=True)
class Drawn:
    """Initial noise of a seed, or of :data:`~mctd_diffusers.search.environment.FIRST_DRAW`."""

    seed: int


@dataclass(frozen=True)
class EdgeNoise:
    """The noise that the last edge of a sample injected: ``std`` times standard normal noise.

    Attributes:
        std: its standard deviation in the sample; 0 where the edge is deterministic.
        dtype: that it is drawn in.
        seed: of the noise first drawn.
        perturbations: strength and seed of the fresh noise mixed in since, oldest first.
    """

    std: float
    dtype: torch.dtype
    seed: int
    perturbations: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Stepped:
    """The far end of an edge."""

    parent: Sample
    action: Action
    seed: int


@dataclass(frozen=True, eq=False)
class Midway:
    """The far end of an edge that takes a second network call, to which it has come half way.

    Attributes:
        latents: the midpoint, at which the network must be called.
        state: what the solver remembers there, with the action of the edge.
        seed: of the edge.
    """

    latents: Tensor
    state: SolverState
    seed: int


@dataclass(frozen=True, eq=False)
class Renoised:
    """The denoised estimate of another sample, noised again."""

    source: Sample
    seed: int


@dataclass(frozen=True, eq=False)
class Perturbed:
    """Another sample, with fresh noise mixed into what its last edge injected."""

    source: Sample
    strength: float
    seed: int


Origin: TypeAlias = Drawn | Stepped | Midway | Renoised | Perturbed


class Before(NamedTuple):
    """The estimate that a sample came from: its parent's, or what a fusion aimed at.

    Attributes:
        estimate: denoised estimate, one row.
        step_index: where it was made.
        guidance: scale that it was made under; ``None`` is the call's own.
    """

    estimate: Tensor
    step_index: int
    guidance: float | None = None


@dataclass(eq=False)
class Sample:
    """One partially or fully denoised sample.

    Attributes:
        problem: the image it is a sample of.
        step_index: position in the schedule; at its end the sample is finished.
        origin: how to make it; ``None`` once made.
        noise: what its last edge injected; ``None`` for an initial noise, which is all noise.
        latents: one row of the pipeline's latents, unscaled; ``None`` while lazy.
        state: what the solver remembers; ``None`` while lazy, and of no use once finished.
        outputs: the network's answers, one row each; ``None`` until evaluated.
        features: of the network's blocks, one row each, where they are read.
        map: of one block of the network, one row, where maps are kept.
        before: the estimate that it came from, where changes of it are read.
        values: reward of the denoised estimate, once asked, by the guidance of the estimate.
        reward: reward of the finished picture, once asked.
    """

    problem: int
    step_index: int
    origin: Origin | None = None
    noise: EdgeNoise | None = None
    latents: Tensor | None = None
    state: SolverState | None = None
    outputs: Outputs | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    map: Tensor | None = None
    before: Before | None = None
    values: dict[float | None, float] = field(default_factory=dict)
    reward: float | None = None


def made_latents(sample: Sample) -> Float[Tensor, "*sample"]:
    """Latents of a sample that is made."""
    assert sample.latents is not None
    return sample.latents


def made_state(sample: Sample) -> SolverState:
    """What the solver remembers of a sample that is made."""
    assert sample.state is not None
    return sample.state


def network_outputs(sample: Sample) -> Outputs:
    """The network's answers for a sample that is evaluated."""
    assert sample.outputs is not None
    return sample.outputs


class Latents:
    """The samples of a search, by handle; handles count up and are never used again.

    Args:
        device: where samples are computed.
        storage: where their tensors wait meanwhile: the device itself, or ``"cpu"`` to keep a large
            search off the accelerator.
        half: whether what is of single precision waits in half; of a sample that is rounded once,
            when it is made, so all that follows from it follows from the rounded one.
    """

    def __init__(
        self,
        device: torch.device,
        storage: torch.device | str | None = None,
        *,
        half: bool = False,
    ) -> None:
        self.device = device
        self.storage = device if storage is None else torch.device(storage)
        self.half = half
        self._samples: dict[int, Sample] = {}
        self._next = 0
        self._kept = 0  # bytes on the host since the heap was trimmed

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def map_bytes(self) -> int:
        """Bytes of the maps of features that samples hold."""
        return sum(s.map.nbytes for s in self._samples.values() if s.map is not None)

    def add(self, samples: Iterable[Sample]) -> Handles:
        """Take in samples and name them."""
        first = self._next
        for sample in samples:
            self._samples[self._next] = sample
            self._next += 1
        return np.arange(first, self._next, dtype=np.int64)

    def put_back(self, samples: Iterable[Sample], handles: Handles, num_handles: int) -> Handles:
        """Take in samples under the names that they had; new ones count on from ``num_handles``.

        Raises:
            ConfigError: there are samples already.
        """
        check_unused(handles, self._next)
        self._samples.update(zip(handles.tolist(), samples, strict=True))
        self._next = max(num_handles, int(handles.max(initial=-1)) + 1)
        return handles

    def __getitem__(self, handles: Handles) -> list[Sample]:
        """The samples of ``handles``, in order; an entry may be named twice.

        Raises:
            CapacityError: a handle was never given, or is released.
        """
        self._check(handles)
        return [self._samples[int(handle)] for handle in handles]

    def release(self, handles: Handles) -> None:
        """Forget samples; what only they hold is freed.

        Raises:
            CapacityError: a handle was never given, or is released already.
        """
        self._check(handles)
        for handle in set(handles.tolist()):
            del self._samples[handle]

    def keep(self, batch: Float[Tensor, "batch *sample"]) -> list[Tensor]:
        """The rows of a batch, each on its own, where tensors wait."""
        # Cloned, or one surviving row would keep the memory of its whole batch.
        rows = [row.clone() for row in self._put_away(batch).unbind()]
        self._kept += sum(row.nbytes for row in rows if row.device.type == "cpu")
        if self._kept > _TRIM_AFTER:
            self._kept = 0
            trim_heap()
        return rows

    def gather(self, rows: Sequence[Tensor]) -> Float[Tensor, "batch *sample"]:
        """Rows together in a batch, where and in the precision that samples are computed."""
        return self._fetch(torch.stack(list(rows)))

    def keep_state(self, state: SolverState) -> SolverState:
        """What a solver remembers of a sample, where tensors wait."""
        return _of_history(state, self._put_away)

    def fetch_state(self, state: SolverState) -> SolverState:
        """The same, where samples are computed."""
        return _of_history(state, self._fetch)

    def _put_away(self, tensor: Tensor) -> Tensor:
        dtype = torch.float16 if self.half and tensor.dtype == torch.float32 else tensor.dtype
        return tensor.to(dtype).to(self.storage)

    def _fetch(self, tensor: Tensor) -> Tensor:
        dtype = torch.float32 if self.half and tensor.dtype == torch.float16 else tensor.dtype
        return tensor.to(self.device).to(dtype)

    def _check(self, handles: Handles) -> None:
        missing = [handle for handle in handles.tolist() if handle not in self._samples]
        if missing:
            raise CapacityError(
                f"no sample has handle {', '.join(map(str, missing))}: handles 0 to "
                f"{self._next - 1} were given, {self._next - len(self._samples)} of them are "
                "released; ask only for what you have not released.",
                handles=missing,
            )


def trim_heap() -> None:
    """Hand back the pages of the heap that nothing uses, where the C library must be told to.

    What is kept lies between what is freed after every call, and aligned memory of one size does
    not fit where memory of the same size was: untrimmed, GNU's heap grows by two fifths more than
    is kept.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of GNU's library alone
        if trim is not None:
            trim(0)


def _of_history(state: SolverState, move: Callable[[Tensor], Tensor]) -> SolverState:
    if not state.history:
        return state
    return replace(state, history=tuple(move(tensor) for tensor in state.history))

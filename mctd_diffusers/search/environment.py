"""What a search asks of the world: the requests, their replies, and the ledger of what they cost.

A strategy (one file each in ``search/strategies``) is a generator for *one* image. It yields
requests and is sent a :class:`Reply` for each, so that it reads like its paper's algorithm box and
has no other source of chance, time or cost. ``search/runner.py`` merges the requests of many images
into waves and answers them by an :class:`Environment`: a Gaussian mixture with exact values, the
embedded model, or SDXL.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from mctd_diffusers.errors import ConfigError, SearchError

Handles: TypeAlias = npt.NDArray[np.int64]
"""``[batch]`` ids of samples in an environment; never reused, so an id is also a date."""
Values: TypeAlias = npt.NDArray[np.float64]
"""``[batch]`` in reward units, higher is better."""
Seeds: TypeAlias = npt.NDArray[np.int64]
"""``[batch]`` seeds, 0 to 2**63 - 1, or :data:`FIRST_DRAW` in a :class:`Reset`."""

Gain: TypeAlias = npt.NDArray[np.float64]
"""``[batch, strides]``; NaN where a stride is longer than what is left of the schedule."""

FIRST_DRAW = -1
"""Seed that stands for the initial noise that came with the problem (the stock pipeline's draw)."""


class Action(NamedTuple):
    """What an edge does; its noise is the seed's, kept apart.

    Attributes:
        stride: schedule steps crossed, at least 1 and at most the steps left.
        eta: share of fresh noise, 0 (deterministic) to 1; ``None`` steps as the user's own
            scheduler and ``eta`` say, exactly like the stock pipeline.
        guidance: scale of classifier-free guidance on this edge, in units of the call's
            ``guidance_scale``: 0 is unconditional, 1 conditional; ``None`` is the call's own. It is
            free, since both outputs are kept apart, and moves this edge alone.
    """

    stride: int
    eta: float | None = None
    guidance: float | None = None


class Gains(NamedTuple):
    """What jumps of several strides from samples would tell, before they are made.

    Of the jumps along the deterministic path; values are calibrated, so that those of different
    noise levels compare. NaN also where a prediction is outside what its maker knows.

    Attributes:
        mean_gain: change of the value over the jump, in reward units; about 0 where values are
            right.
        log_variance: natural log of the variance of the value after a stochastic jump, given the
            sample, in squared reward units: what the jump *resolves*.
        final_similarity: cosine of the denoised estimate after the jump with the finished latents,
            -1 to 1.
        log_truncation_error: natural log of the root mean square difference between the latents
            after the jump and after fine steps, in variance-preserving units; ``-inf`` where they
            are the same.
    """

    mean_gain: Gain
    log_variance: Gain
    final_similarity: Gain
    log_truncation_error: Gain


class Fusions(NamedTuple):
    """What became of groups of particles that were to be fused.

    Attributes:
        handles: ``[groups]`` the fused samples; :data:`REJECTED` where one may not enter the tree.
        verdicts: ``[groups]`` why: places in the environment's list of verdicts, of which the
            first, 0, is that it may.
        correlations: ``[groups]`` mean cosine of the noises of two particles, -1 to 1; NaN where
            there is only one.
    """

    handles: Handles
    verdicts: npt.NDArray[np.int64]
    correlations: Values


REJECTED = -1
"""Stands for the handle of a fused sample that was rejected."""


@dataclass(frozen=True)
class Counts:
    """What was spent, in useful work (padding is in ``padded_rows`` alone).

    Attributes:
        nfe: denoiser evaluations of one latent, the second calls of two-call solvers included; with
            guidance one NFE is two rows.
        rows: useful rows through the network.
        padded_rows: rows added to fill a chunk.
        calls: calls of the network.
        decodes: latents decoded in full.
        previews: latents decoded by the preview decoder.
        reward_calls: images scored by the reward.
    """

    nfe: int = 0
    rows: int = 0
    padded_rows: int = 0
    calls: int = 0
    decodes: int = 0
    previews: int = 0
    reward_calls: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(operator.add, _all_of(self), _all_of(other)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*map(operator.sub, _all_of(self), _all_of(other)))

    def __mul__(self, times: int) -> Counts:
        return self if times == 1 else Counts(*(count * times for count in _all_of(self)))


_all_of = operator.attrgetter(*(part.name for part in fields(Counts)))


@dataclass(frozen=True)
class Prices:
    """The price list: what one unit costs in row-equivalents (a row through the network is 1)."""

    decode: float = 0.0
    preview: float = 0.0
    reward_call: float = 0.0

    def cost(self, counts: Counts) -> float:
        """Cost of ``counts`` in row-equivalents; padded rows are the batch's, not the search's."""
        return (
            counts.rows
            + counts.decodes * self.decode
            + counts.previews * self.preview
            + counts.reward_calls * self.reward_call
        )


@dataclass
class Ledger:
    """What a call has spent so far, in all and by problem (image).

    Attributes:
        prices: the measured price list by which ``cost`` is computed.
        total: everything, padding and calls included.
        by_problem: useful work of each image; padding and calls are shared, so 0 there.
        seconds: wall-clock seconds by phase (``"network"``, ``"decode"``, ``"reward"``, ...).
        rows_by_phase: latents in a call of each phase that has had one, where calls are of one
            size; where memory ran out midway all sizes, in the order of time.
    """

    prices: Prices = field(default_factory=Prices)
    total: Counts = field(default_factory=Counts)
    by_problem: dict[int, Counts] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rows_by_phase: dict[str, list[int]] = field(default_factory=dict)

    def charge(self, problems: Sequence[int] | Handles, each: Counts) -> None:
        """Add ``each`` once for every entry of ``problems``, to that image and to the total."""
        for problem, times in Counter(map(int, problems)).items():
            self.by_problem[problem] = self.spent(problem) + each * times
        self.total = self.total + each * len(problems)

    def charge_shared(self, counts: Counts) -> None:
        """Add what belongs to no single image: calls and padded rows."""
        self.total = self.total + counts

    def charge_seconds(self, phase: str, seconds: float) -> None:
        """Add wall-clock ``seconds`` to ``phase``."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def spent(self, problem: int) -> Counts:
        """Useful work done for one image so far."""
        return self.by_problem.get(problem, Counts())

    @property
    def cost(self) -> float:
        """Total cost in row-equivalents, by the price list."""
        return self.prices.cost(self.total)


def check_unused(handles: Handles, num_given: int) -> None:
    """Refuse to restore samples under handles of their own where others were given before.

    Raises:
        ConfigError: there are samples already, or a handle stands there twice.
    """
    if num_given or len(np.unique(handles)) != len(handles):
        raise ConfigError(
            f"samples cannot be restored under {len(handles)} handles of their own where "
            f"{num_given} were given already: restore each once, into a new environment."
        )


def check_one_level(step_indices: Sequence[int], problems: Sequence[int], handles: Handles) -> None:
    """Refuse to fuse particles of several step indices or images.

    Raises:
        SearchError: they are.
    """
    levels, images = sorted(set(map(int, step_indices))), sorted(set(map(int, problems)))
    if len(levels) != 1 or len(images) != 1:
        raise SearchError(
            f"particles {handles.tolist()} stand at step indices {levels} of images {images}; "
            "fuse samples of one step index and one image.",
            handles=handles.tolist(),
        )


# The requests: what a strategy yields. ``problem`` is not named in them: the runner knows whose
# generator it is asking.


@dataclass(frozen=True)
class Reset:
    """Draw initial noise, one per seed (:data:`FIRST_DRAW`: the one that came). Reply: handles."""

    seeds: Seeds


@dataclass(frozen=True)
class Denoise:
    """Evaluate unfinished samples that are not evaluated yet. Reply: ``None``.

    1 NFE each, and what the edges that led to them cost (`Environment.step_price`).
    """

    handles: Handles


@dataclass(frozen=True)
class Step:
    """Make lazy children of evaluated samples, one per (parent, action, seed). Reply: handles."""

    parents: Handles
    actions: tuple[Action, ...]
    seeds: Seeds


@dataclass(frozen=True)
class Value:
    """Value unfinished, evaluated samples by their denoised estimate. Reply: values.

    ``guidance`` is that of the estimate, as in :class:`Action`.
    """

    handles: Handles
    guidance: float | None = None


@dataclass(frozen=True)
class Reward:
    """Decode finished samples in full and score them (cached). Reply: rewards."""

    handles: Handles


@dataclass(frozen=True)
class Renoise:
    """Go back up the schedule to ``step_index`` from the denoised estimate. Reply: handles."""

    handles: Handles
    step_index: int
    seeds: Seeds


@dataclass(frozen=True)
class Perturb:
    """Mix fresh noise into what the last edges injected, see `Environment.perturb`. Reply: handles.

    Attributes:
        handles: unfinished samples.
        strength: share of fresh noise, 0 (the same sample again) to 1 (the edge drawn anew).
        seeds: of the fresh noise.
    """

    handles: Handles
    strength: float
    seeds: Seeds


@dataclass(frozen=True)
class Fuse:
    """Fuse groups of particles, see `Environment.fuse`. Reply: :class:`Fusions`.

    Attributes:
        groups: evaluated, unfinished samples, all of one step index in each group.
        weights: of each group's particles, not negative; they sum to 1.
        method: a name that the environment knows.
        seeds: one a group, for methods that draw.
        guidance: of the particles' estimates, as in :class:`Action`.
    """

    groups: tuple[Handles, ...]
    weights: tuple[Values, ...]
    method: str
    seeds: Seeds
    guidance: float | None = None


@dataclass(frozen=True)
class RelativeChange:
    """How far estimates moved, see `Environment.relative_change`. Reply: values."""

    handles: Handles


@dataclass(frozen=True)
class PredictGain:
    """Predict what jumps from unfinished, evaluated samples would tell. Reply: :class:`Gains`.

    Every stride is asked of every sample; those beyond the end are answered with NaN.
    """

    handles: Handles
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Release:
    """Forget samples that the search will not touch again. Reply: ``None``."""

    handles: Handles


Request: TypeAlias = (
    Reset
    | Denoise
    | Step
    | Value
    | Reward
    | Renoise
    | Perturb
    | Fuse
    | RelativeChange
    | PredictGain
    | Release
)


class Reply(NamedTuple):
    """The answer to one request.

    Attributes:
        result: handles, values, gains, fusions or ``None``, as the request says.
        spent: useful work done for this image since its search began, this request included.
    """

    result: Any
    spent: Counts


Asks: TypeAlias = Generator[Request | tuple[Request, ...], Any, Any]
"""A coroutine of a search: yields a request (or, from ``gather``, a tuple of them, answered by a
tuple of replies)."""


@runtime_checkable
class Environment(Protocol):
    """The world of a search: many images (problems), each with samples named by handles.

    Every method takes and returns batches across all images. A method that raises leaves the
    samples as they were (the ledger keeps what was spent). Attributes:
        num_steps: steps of the schedule; a sample at ``step_index == num_steps`` is finished.
        ledger: what was spent.
        guidance_scale: the call's scale of classifier-free guidance, where actions may name
            another: it is arithmetic on two outputs that are kept apart. ``None`` where it is an
            input of the network (Flux, LCM), and where a call uses none.
    """

    num_steps: int
    ledger: Ledger
    guidance_scale: float | None

    def reset(self, problems: Handles, seeds: Seeds) -> Handles:
        """Draw initial noise for each problem; 0 NFE."""
        ...

    def denoise(self, handles: Handles) -> None:
        """Evaluate samples that are not yet evaluated; 1 NFE each, and what their edges cost."""
        ...

    def step(self, parents: Handles, actions: Sequence[Action], seeds: Seeds) -> Handles:
        """Make one lazy child for each (evaluated parent, action, seed)."""
        ...

    def step_price(self, parents: Handles, actions: Sequence[Action]) -> Counts:
        """What edges cost beyond their parents' evaluation, all in all.

        Nothing, or 1 NFE each where the solver takes a second call in the middle. It is spent once
        the child is needed, by whatever evaluates or scores it first.
        """
        ...

    def value(self, handles: Handles, guidances: Sequence[float | None] | None = None) -> Values:
        """Reward of the denoised estimates of unfinished, evaluated samples (by preview).

        ``guidances`` are those of the estimates, as in :class:`Action`; ``None``: the call's own.
        """
        ...

    def reward(self, handles: Handles) -> Values:
        """Reward of finished samples, decoded in full; asked again it costs nothing."""
        ...

    def renoise(self, handles: Handles, step_index: int, seeds: Seeds) -> Handles:
        """Noise the denoised estimates (of evaluated or finished samples) to ``step_index``."""
        ...

    def perturb(self, handles: Handles, strengths: Values, seeds: Seeds) -> Handles:
        """Lazy variants of unfinished samples, at the same step index; 0 NFE.

        The noise that the last edge injected (for an initial noise: the sample itself) becomes
        ``sqrt(1 - strength^2) * noise + strength * fresh``, which keeps its law; everything else of
        the edge stays as it was.
        """
        ...

    def fuse(
        self,
        groups: Sequence[Handles],
        weights: Sequence[Values],
        methods: Sequence[str],
        seeds: Seeds,
        guidances: Sequence[float | None] | None = None,
    ) -> Fusions:
        """Fuse each group of particles into one new sample at their step index; 0 NFE.

        The sample is not evaluated, and its solver starts anew. One that would not be on the
        manifold of samples of that level is rejected.

        Raises:
            ConfigError: a method is not known, or not for samples of this kind.
            SearchError: particles are finished, not evaluated, or of several step indices.
        """
        ...

    def relative_change(self, handles: Handles) -> Values:
        """How far the denoised estimates of evaluated samples moved, relative to their size.

        Root mean square of the change since the parent's estimate, of a fused sample since the
        estimate that it was fused to, over that of the estimate before. NaN where that is not
        known; 0 NFE.
        """
        ...

    def predict_gain(self, handles: Handles, strides: Sequence[int]) -> Gains:
        """What jumps of each stride from unfinished, evaluated samples would tell; 0 NFE.

        Raises:
            ConfigError: there is nothing to predict it by.
        """
        ...

    def export(self, handles: Handles) -> Any:
        """Copy of the samples, in a form that ``restore`` takes."""
        ...

    def restore(
        self, saved: Any, handles: Handles | None = None, *, num_handles: int = 0
    ) -> Handles:
        """Samples back from ``export``, with what was known of them.

        Args:
            saved: what ``export`` gave.
            handles: names to restore them under, of which no sample has been given any yet; new
                ones by default.
            num_handles: so many handles were given where ``handles`` come from; new ones count on
                from there.
        """
        ...

    def release(self, handles: Handles) -> None:
        """Forget samples; their handles are never used again."""
        ...

"""Gain models: what jumps from a sample would tell, from a head, a rule of thumb, or by trying.

And what jumps cost the *typical* sample, from which a search plans the rest of a schedule by
dynamic programming (``search/strides.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import chunks
from mctd_diffusers.denoising.protocols import GainModel
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import Action, Gains, Handles
from mctd_diffusers.search.seeding import child_seed
from mctd_diffusers.search.stride_policies import PURE_NOISE, Costs, StridePolicy, gain_costs
from mctd_diffusers.search.tree import STEP

if TYPE_CHECKING:
    from mctd_diffusers.denoising.environment import LatentEnvironment

Floats = npt.NDArray[np.float64]
AYS_TIMESTEPS: Final[tuple[int, ...]] = tuple(AysSchedules["StableDiffusionTimesteps"])
"""Ten steps of Stable Diffusion 1.5 by Align Your Steps (Sabour et al., 2024, arXiv 2404.14507)."""

TRUST: Final = 0.25
"""Share that is believed of how a head tells one sample's jumps apart, on the scale of logs.

Chosen on `tune` prompts: with all of it, plans of six evaluations end farther from the fine path
than by the table alone (0.143 against 0.135); with this, as near.
"""
ORACLE_SIBLINGS: Final = 8
"""Draws by which an oracle estimates what a jump resolves."""


@runtime_checkable
class GainHead(Protocol):
    """A trained head, see `models.ige.InformationGainEvaluator`."""

    jump_log_snr: Tensor
    jump_cost: Tensor

    def predict(
        self,
        features: Mapping[str, Float[Tensor, "batch _"]] | None,
        source_log_snr: Float[Tensor, " batch"],
        target_log_snr: Float[Tensor, "batch jumps"],
    ) -> Gains:
        """Predict jumps of every state, of the typical one where ``features`` are ``None``."""
        ...


class HeadGains:
    """Predictions of a trained head from the features of a sample.

    It is called for a fixed number of samples at once, so that a prediction does not depend, in its
    last bits, on how many others there are.

    Truncation errors are *anchored*: the mean error of a jump is known from the head's own table,
    and the head says how this sample's differ from those of the typical sample. Of the difference
    the part that all jumps share is left out: a sample that is hard here is hard later too, which
    is no reason to step shorter now than then.

    Args:
        head: the information gain evaluator.
        rows_per_call: samples in each call.
    """

    reads_change = False

    def __init__(self, head: GainHead, rows_per_call: int) -> None:
        self._head = head
        self._rows_per_call = rows_per_call
        self._anchors: dict[tuple[int, ...], tuple[Floats, Floats]] = {}

    def __call__(
        self, environment: LatentEnvironment, handles: Handles, strides: Sequence[int]
    ) -> Gains:
        """From features and noise levels; NaN past the end, and where the head knows nothing."""
        features = environment.features(handles)
        source, target = _log_snr_of(
            environment.stepper, environment.step_indices(handles), strides
        )
        parts = []
        for chunk in chunks(len(handles), self._rows_per_call):
            filled = {name: chunk.fill(rows[chunk.rows]) for name, rows in features.items()}
            predicted = self._head.predict(
                filled, chunk.fill(source[chunk.rows]), chunk.fill(target[chunk.rows])
            )
            parts.append([part[: chunk.useful] for part in predicted])
        gains = Gains(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))
        table, typical = self._anchor(environment.stepper, tuple(strides))
        here = environment.step_indices(handles)
        own = gains.log_truncation_error - typical[here]
        known = ~np.isnan(own)
        shared = np.nansum(own, axis=1) / np.maximum(known.sum(axis=1), 1)
        believed = TRUST * (own - shared[:, None])
        return gains._replace(log_truncation_error=table[here] + believed)

    def _anchor(self, stepper: Stepper, strides: tuple[int, ...]) -> tuple[Floats, Floats]:
        """Log errors by the table and of the typical sample, ``[num_steps, strides]``."""
        if strides not in self._anchors:
            typical = typical_gains(stepper, strides, self._head).log_truncation_error
            table = typical
            if has_table(self._head):
                with np.errstate(divide="ignore"):
                    table = np.log(gits_costs(stepper, strides, self._head))
            self._anchors[strides] = table, typical
        return self._anchors[strides]


class EstimateChange:
    """The rule of thumb of adaptive solvers: the denoised estimate goes on as fast as it went.

    ``r`` is the rms change of the estimate since the parent, for each unit of half the log-SNR. A
    jump over ``h`` of these holds the estimate still and arrives off by
    ``alpha r (h - 1 + exp(-h))``, the local error of an exponential integrator of first order (Lu
    et al., 2022, arXiv 2206.00927, equation 3.4). Not known of an initial noise, which has no
    parent.
    """

    reads_change = True

    def __call__(
        self, environment: LatentEnvironment, handles: Handles, strides: Sequence[int]
    ) -> Gains:
        """From the change since the parent."""
        source, target = _log_snr_of(
            environment.stepper, environment.step_indices(handles), strides
        )
        rate = environment.estimate_change(handles)
        held = _held_still(source[:, None].double().numpy(), target.double().numpy())
        with np.errstate(divide="ignore"):
            error = np.log(rate[:, None] * held)
        nothing = np.full_like(error, np.nan)
        return Gains(nothing, nothing, nothing, error)


class MeasuredGains:
    """The truth, by trying: jumps, fine steps and siblings are really made, beside the search.

    An upper bound of predictions, not a method: what it spends is charged to the call as a whole
    and to no image.

    Args:
        siblings: stochastic draws of each jump, by which the resolved variance is estimated; below
            2 it is not.
    """

    reads_change = False

    def __init__(self, siblings: int = 0) -> None:
        self._siblings = siblings

    def __call__(
        self, environment: LatentEnvironment, handles: Handles, strides: Sequence[int]
    ) -> Gains:
        """By trying; NaN of what is not tried."""
        aside = environment.aside()
        gains = [
            self._measure(aside, environment.export(handles[i : i + 1]), strides)
            for i in range(len(handles))
        ]
        environment.ledger.charge_shared(aside.ledger.total)
        return Gains(*(np.stack(rows) for rows in zip(*gains, strict=True)))

    def _measure(
        self, world: LatentEnvironment, exported: Any, strides: Sequence[int]
    ) -> tuple[Floats, Floats, Floats, Floats]:
        """Gains of one sample, ``[strides]`` each."""
        handle = world.restore(exported)
        left = world.num_steps - world.step_indices(handle)[0]
        mean, variance, error = (np.full(len(strides), np.nan) for _ in range(3))
        jumps = {
            stride: world.step(handle, [Action(stride, 0.0)], np.zeros(1, dtype=np.int64))
            for stride in strides
            if stride <= left
        }
        path = handle
        for fine in range(1, max(jumps, default=0) + 1):
            world.denoise(path)
            path = world.step(path, [Action(1, 0.0)], np.zeros(1, dtype=np.int64))
            if fine in jumps:
                off = world.latents(jumps[fine]) - world.latents(path)
                here = world.stepper.variance_preserving(off.float(), world.step_indices(path)[0])
                with np.errstate(divide="ignore"):
                    error[strides.index(fine)] = np.log(here.square().mean().sqrt().item())
        for column, stride in enumerate(strides):
            if self._siblings > 1 and stride <= left:
                values = self._sibling_values(world, handle, stride)
                mean[column] = values.mean() - world.value(handle)[0]
                with np.errstate(divide="ignore"):
                    variance[column] = np.log(values.var(ddof=1))
        return mean, variance, np.full(len(strides), np.nan), error

    def _sibling_values(self, world: LatentEnvironment, handle: Handles, stride: int) -> Floats:
        seeds = [child_seed(0, STEP, stride, draw) for draw in range(self._siblings)]
        parents = np.repeat(handle, self._siblings)
        drawn = world.step(parents, [Action(stride, 1.0)] * self._siblings, np.array(seeds))
        if world.step_indices(drawn[:1])[0] == world.num_steps:
            return world.reward(drawn)
        world.denoise(drawn)
        return world.value(drawn)


def _log_snr_of(
    stepper: Stepper, step_indices: Sequence[int], strides: Sequence[int]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch strides"]]:
    """Log-SNR of samples, and of where strides lead; NaN where they lead past the end."""
    levels = torch.cat([stepper.log_snr.clamp(min=PURE_NOISE), torch.tensor([torch.nan])])
    here = torch.tensor(list(step_indices))
    there = here[:, None] + torch.tensor(list(strides))
    return levels[here], levels[there.clamp(max=stepper.num_steps + 1)]


# What a stride policy needs of the world


class StrideParts(NamedTuple):
    """What a search by some stride policy asks of its world.

    Attributes:
        gain_model: predicts what jumps of single samples tell; ``None`` where none are asked for.
        reads_features: whether it reads features of the network's blocks.
        costs: of jumps of the typical sample, see `Problem`; ``None`` where they are not needed.
    """

    gain_model: GainModel | None = None
    reads_features: bool = False
    costs: Costs | None = None


NO_STRIDE_PARTS: Final = StrideParts()


def stride_parts(
    policy: StridePolicy,
    strides: Sequence[int],
    stepper: Stepper,
    head: GainHead | None,
    rows_per_call: int,
) -> StrideParts:
    """What the world of a search must have for its stride policy.

    Args:
        policy: of the search.
        strides: it chooses from.
        stepper: over the schedule.
        head: of the pipeline; must be there for policies that plan by it.
        rows_per_call: samples in each call of the head.

    Raises:
        ConfigError: the policy plans by a head, and there is none.
    """
    if not policy.needs_costs:
        return NO_STRIDE_PARTS
    if policy.kind == "ays":
        return StrideParts(costs=_as_costs(ays_costs(stepper, strides)))
    if policy.kind == "x0hat":
        return StrideParts(EstimateChange(), costs=_as_costs(change_costs(stepper, strides)))
    if head is None:  # all others ask it
        raise ConfigError(
            f"stride_policy {policy.kind!r} plans by what a head learned of the model, and this "
            "pipeline has none: load it with ige=..., or use 'ays' or 'uniform'"
        )
    if policy.kind == "gits":
        if not has_table(head):
            raise ConfigError(
                "stride_policy 'gits' needs the table of a head's jump costs, and this one has "
                "none: train one on a log with deterministic trajectories (DDIMScheduler:0)"
            )
        return StrideParts(costs=_as_costs(gits_costs(stepper, strides, head)))
    assert policy.target is not None
    if policy.target == "truncation_error" and has_table(head):
        costs = _as_costs(gits_costs(stepper, strides, head))
    else:
        costs = _as_costs(gain_costs(typical_gains(stepper, strides, head), policy.target))
    if policy.kind == "ige":
        return StrideParts(HeadGains(head, rows_per_call), True, costs)
    siblings = ORACLE_SIBLINGS if policy.target == "resolved_variance" else 0
    return StrideParts(MeasuredGains(siblings), costs=costs)


def _as_costs(costs: Floats) -> Costs:
    """Costs as a problem holds them; infinite where a head knows nothing."""
    finite = np.where(np.isnan(costs), np.inf, costs)
    return tuple(tuple(row) for row in finite.tolist())


# What jumps cost the typical sample


def ays_costs(stepper: Stepper, strides: Sequence[int]) -> Floats:
    """Align Your Steps for any number of steps: equal parts of the way that its ten steps divide.

    The published steps are knots of a monotone curve over log-SNR, linear between them. The sum of
    the squares of its increments is least where they are equal.
    """
    alphas = stepper.alphas_cumprod[list(AYS_TIMESTEPS)].double()
    levels = stepper.log_snr.double().numpy()
    knots = np.append((alphas / (1 - alphas)).log().numpy(), levels[-1])
    way = np.interp(levels, knots, np.linspace(0, 1, len(knots)))
    return _between(way, strides, lambda here, there: (there - here) ** 2)


def change_costs(stepper: Stepper, strides: Sequence[int]) -> Floats:
    """Those of :class:`EstimateChange`, for an estimate that moves by 1 at a constant rate.

    Infinite from noise alone (a schedule that begins without signal), from where all is far.
    """
    levels = stepper.log_snr.double().numpy()
    rate = 2 / (levels[-1] - levels[np.isfinite(levels)][0])
    return _between(levels, strides, lambda here, there: rate * _held_still(here, there))


def _held_still(source_log_snr: Floats, target_log_snr: Floats) -> Floats:
    """Error of holding an estimate still that moves by 1 for each unit of half the log-SNR."""
    half = (target_log_snr - source_log_snr) / 2
    alpha = np.exp(-np.logaddexp(0, -target_log_snr) / 2)
    return np.asarray(alpha * (half - 1 + np.exp(-half)))


def gits_costs(stepper: Stepper, strides: Sequence[int], head: GainHead) -> Floats:
    """Mean latent error of one jump against the fine path (Chen et al., 2024, arXiv 2405.11326).

    From the table that came with a head, which was computed on the trajectories it learned from.
    """
    known, table = head.jump_log_snr.double().numpy(), head.jump_cost.double().numpy()
    table = np.nan_to_num(table, nan=0.0, posinf=0.0)  # of no jump at all, which costs nothing
    levels = stepper.log_snr.double().numpy()
    by_target = np.stack([np.interp(levels, known, row) for row in table])
    every = np.stack([np.interp(levels, known, column) for column in by_target.T], axis=1)
    points = np.arange(len(levels))
    return _between(points, strides, lambda here, there: every[here, there])


def has_table(head: GainHead) -> bool:
    """Whether a head came with a table of what jumps cost."""
    return len(head.jump_log_snr) > 1


def typical_gains(stepper: Stepper, strides: Sequence[int], head: GainHead) -> Gains:
    """What a head says of the typical sample at every step index, ``[num_steps, strides]``."""
    return head.predict(None, *_log_snr_of(stepper, range(stepper.num_steps), strides))


def _between(
    along: npt.NDArray[Any],
    strides: Sequence[int],
    cost: Callable[[npt.NDArray[Any], npt.NDArray[Any]], Floats],
) -> Floats:
    """``[num_steps, strides]`` costs of jumps; infinite past the end."""
    num_steps = len(along) - 1
    costs = np.full((num_steps, len(strides)), np.inf)
    for column, stride in enumerate(strides):
        if stride <= num_steps:
            costs[: num_steps + 1 - stride, column] = cost(along[:-stride], along[stride:])
    return costs

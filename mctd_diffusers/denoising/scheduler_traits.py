"""What stepping a scheduler in a tree must know of its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

Levels: TypeAlias = Literal["alphas", "solver", "exploding", "flow", "sine", "trigonometric"]
"""How a scheduler scales signal and noise, ``x = alpha x0 + sigma noise``:

- ``alphas``: by ``alphas_cumprod`` at its timesteps (variance preserving);
- ``solver``: by its sigmas, as its own ``_sigma_to_alpha_sigma_t`` says (preserving, or flow);
- ``exploding``: ``alpha`` is 1 and ``sigma`` its sigmas;
- ``flow``: ``sigma`` its sigmas and ``alpha`` one less them;
- ``sine``: by its ``alphas`` and ``betas`` (IPNDM);
- ``trigonometric``: cosine and sine of its timesteps (TrigFlow).
"""

Estimate: TypeAlias = Literal["step", "convert", "formula"]
"""Where the denoised estimate comes from: what the step says, the converted output of a multistep
solver, or the formula of the prediction type."""

Blank: TypeAlias = Callable[[Any], dict[str, Any]]

LEARNED: Final = ("learned", "learned_range")
"""Values of ``variance_type`` with which a scheduler reads a variance that the network predicts."""


def forgets(scheduler: Any) -> dict[str, Any]:
    """What a scheduler without memory remembers."""
    return {}


def never(scheduler: Any) -> bool:
    """For what schedulers of a class never do."""
    return False


def always(scheduler: Any) -> bool:
    """For what schedulers of a class always do."""
    return True


def reads_nothing(scheduler: Any) -> int:
    """How many earlier points a solver of one step looks at."""
    return 0


def any_stride(scheduler: Any) -> None:
    """The bound on strides where there is none."""
    return None


@dataclass(frozen=True)
class SchedulerTraits:
    """What stepping a scheduler in a tree must know of its class.

    Attributes:
        levels: how it scales signal and noise.
        grid: how a step finds its points: ``"points"`` at its place in the schedule, ``"constant"``
            a constant number of timesteps on, ``"target"`` where its argument ``prev_timestep``
            says, ``"two calls"`` by a midpoint at which the network is called again.
        schedule: attributes that hold the schedule, one entry a step, or one more.
        blank: what it remembers from one step to the next, as it is before the first: attributes
            by name.
        reads: how many earlier points of the schedule the next step looks at; ``None`` is all.
        draws: whether its own step draws noise.
        takes_eta: whether the share of noise is an argument of its step.
        adds_noise: whether the noise it draws is simply added to the sample.
        noise_in_single: whether noise is drawn in single precision whatever the network's.
        estimate: where the denoised estimate comes from.
        split: whether noise may be added by stepping to a lower level and noising up again.
        drops_oldest: whether the oldest output that it remembers is not looked at again.
        restarts_empty: whether, restarted, it must not see the points before.
        equal_spacing: whether what it remembers is of use at the spacing before alone.
        longest_stride: the longest stride that is proven; ``None`` is any.
        settings: settings that are proven for some values only: name and values.
        note: for the table of the documentation.
    """

    levels: Levels
    grid: Literal["points", "constant", "target", "two calls"] = "points"
    schedule: tuple[str, ...] = ("timesteps", "sigmas")
    blank: Blank = forgets
    reads: Callable[[Any], int | None] = reads_nothing
    draws: Callable[[Any], bool] = never
    takes_eta: bool = False
    adds_noise: bool = True
    noise_in_single: bool = False
    estimate: Estimate = "step"
    split: bool = False
    drops_oldest: bool = False
    restarts_empty: bool = False
    equal_spacing: bool = False
    longest_stride: Callable[[Any], int | None] = any_stride
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    note: str = ""

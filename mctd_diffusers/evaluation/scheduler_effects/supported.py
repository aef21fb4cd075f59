"""What can be stepped in a tree: every scheduler by its name, and of the others why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mctd_diffusers.denoising.scheduler_names import SCHEDULERS, named_scheduler
from mctd_diffusers.denoising.schedulers import TRAITS, traits_of
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.scheduler_effects.comparison import BRANCH_ETA, stepper_of
from mctd_diffusers.search.environment import Action

_STEPS = 10


class Supported(NamedTuple):
    """A scheduler as it is made without a model's config, over ten steps.

    Attributes:
        name: short name, or that of the class without its ending.
        kind: name of its class.
        note: what else there is to know.
        calls_per_step: network calls of an edge, 1 or 2; ``None`` where it has no plain schedule of
            ten steps.
        longest_stride: ``"any"``, or a number.
        plain_noise: of plain edges: ``"none"``, ``"own"`` or ``"injected"``.
        branching_noise: of edges on which a search branches.
    """

    name: str
    kind: str
    note: str
    calls_per_step: int | None = None
    longest_stride: str = ""
    plain_noise: str = ""
    branching_noise: str = ""


def supported() -> Iterator[Supported]:
    """Every short name, and every class without one; those that cannot be had say why."""
    with_name = {kind for kind, _ in SCHEDULERS.values()}
    for name, (kind, _) in SCHEDULERS.items():
        if kind in TRAITS:
            yield looked_at(name)
    for kind in TRAITS:
        if kind not in with_name:
            yield looked_at(kind)


def looked_at(text: str) -> Supported:
    """What a scheduler that can be stepped in a tree says of itself.

    Args:
        text: its name and settings.
    """
    kind = SCHEDULERS[text][0] if text in SCHEDULERS else text
    try:
        named = named_scheduler(text, {})
    except ConfigError as error:  # it needs a package that is not there
        return Supported(text, kind, str(error))
    kind, note = type(named.scheduler).__name__, traits_of(named.scheduler).note
    try:
        stepper = stepper_of(named, _STEPS)
    except ValueError:  # its class sets other schedules only
        return Supported(named.name, kind, note)
    longest = stepper.longest_stride
    return Supported(
        named.name,
        kind,
        note,
        stepper.calls_per_step,
        "any" if longest is None else str(longest),
        stepper.randomness(Action(1)),
        stepper.randomness(Action(1, BRANCH_ETA)),
    )

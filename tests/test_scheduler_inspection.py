"""Schedulers of a user's own: what is found out about them, and that it is true."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from mctd_diffusers.denoising.scheduler_inspection import inspect_scheduler
from mctd_diffusers.denoising.schedulers import TRAITS, check_scheduler
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import UnsupportedSchedulerError
from mctd_diffusers.search.environment import Action
from tests.schedulers import COMMON, noise, stock_loop, walk

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


class PlainDDIM(diffusers.DDIMScheduler):  # type: ignore[misc]  # untyped base
    """A subclass that changes nothing."""


class MomentumEuler(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]  # untyped base
    """A subclass that remembers more than its parent: half of the last direction."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.direction: Tensor | None = None

    def set_timesteps(self, *args: Any, **settings: Any) -> None:
        super().set_timesteps(*args, **settings)
        self.direction = None

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Any:
        mixed = model_output
        if self.direction is not None:
            mixed = 0.75 * model_output + 0.25 * self.direction
        self.direction = model_output
        return super().step(mixed, timestep, sample, return_dict=return_dict)


class OwnFlow(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # untyped base
    """Flow matching by Euler steps, from nothing but the common protocol."""

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]  # of diffusers
    def __init__(self, num_train_timesteps: Any = 1000, overshoot: float = 0.0) -> None:
        self.num_inference_steps: int | None = None
        self.timesteps = torch.zeros(0)
        self.sigmas = torch.zeros(1)
        self._step_index = 0

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.linspace(1, 0, num_inference_steps + 1)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._step_index = 0

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Any:
        now, then = self.sigmas[self._step_index : self._step_index + 2]
        self._step_index += 1
        length = (then - now) * (1 + self.config.overshoot)
        return (sample + length * model_output,)


_HIDDEN: list[Tensor] = []


class Secretive(OwnFlow):
    """Remembers outside of itself."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Any:
        if self._step_index == 0:
            _HIDDEN.clear()
        _HIDDEN.append(model_output)
        mean = torch.stack(_HIDDEN).mean(0)
        return super().step(mean, timestep, sample, return_dict)


class Levelless(OwnFlow):
    """Does not say its noise levels by a common name."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps)
        self.hidden = self.sigmas
        self.sigmas = torch.zeros(1)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Any:
        return (sample - model_output / (self.num_inference_steps or 1),)


class Counting(diffusers.DDIMScheduler):  # type: ignore[misc]  # untyped base
    """Counts in an attribute that nothing sets before its first step."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Any:
        self.count = getattr(self, "count", 0) + 1
        return super().step(model_output, timestep, sample, return_dict=return_dict)


class StepMissing(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # untyped base
    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.arange(num_inference_steps)


class OtherArguments(OwnFlow):
    def step(self, sample: Tensor, model_output: Tensor, timestep: Any) -> Any:  # type: ignore[override]  # on purpose
        return (sample,)


OWN = {
    "subclass": lambda: PlainDDIM(**COMMON, clip_sample=False),
    "momentum": lambda: MomentumEuler(**COMMON),
    "flow": OwnFlow,
}


@pytest.mark.parametrize("name", OWN)
def test_a_scheduler_that_keeps_the_protocol_can_be_stepped(name: str) -> None:
    make = OWN[name]
    check_scheduler(make())
    full, stock = make(), make()
    full.set_timesteps(8)
    stock.set_timesteps(8)
    stepper = Stepper(full)
    first = noise(1, 4, 5, 3) * stepper.init_noise_sigma
    assert torch.equal(walk(stepper, first, [1] * 8, range(8)), stock_loop(stock, first, range(8)))
    stock.set_timesteps(4)
    if torch.equal(stock.timesteps, full.timesteps[::2]):
        ours = walk(stepper, first, [2] * 4, range(4))
        assert torch.equal(ours, stock_loop(stock, first, range(4)))
    # Two branches that take turns, one of them after noise was added.
    states = [stepper.initial_state()] * 2
    latents = first.repeat(2, 1, 1, 1)
    for action in (Action(2), Action(1, 0.5), Action(1)):
        outputs = 0.3 * latents
        together, after = stepper.step(latents, outputs, states, [action] * 2, [5, 6])
        for row in (0, 1):
            alone, _ = stepper.step(
                latents[[row]], outputs[[row]], [states[row]], [action], [5 + row]
            )
            assert torch.equal(together[[row]], alone)
        latents, states = together, after


def test_what_a_subclass_adds_to_memory_is_found() -> None:
    traits = inspect_scheduler(MomentumEuler(**COMMON), TRAITS["EulerDiscreteScheduler"]).traits
    assert traits is not None
    assert traits.blank(None) == {"direction": None}
    same = inspect_scheduler(PlainDDIM(clip_sample=False), TRAITS["DDIMScheduler"]).traits
    assert same is not None
    assert same.blank(None) == {}


@pytest.mark.parametrize(
    ("make", "lacks"),
    [
        (object, "has no set_timesteps, step, config"),
        (StepMissing, "has no step"),
        (OtherArguments, "takes sample, model_output, timestep"),
        (Levelless, "neither `sigmas`"),
        (lambda: Counting(**COMMON), "past that is put back: it fails: TypeError"),
        (Secretive, "stride 1: differs from its own loop"),
        (lambda: OwnFlow(num_train_timesteps="many"), "its own loop fails"),
    ],
)
def test_what_a_scheduler_lacks_is_named(make: Any, lacks: str) -> None:
    with pytest.raises(UnsupportedSchedulerError, match=lacks) as error:
        check_scheduler(make())
    assert "DDIMScheduler.from_config" in str(error.value)
    assert not inspect_scheduler(make()).findings[-1].holds


def test_a_scheduler_whose_steps_land_elsewhere_has_stride_1_alone() -> None:
    overshooting = OwnFlow(overshoot=0.1)
    inspection = inspect_scheduler(overshooting)
    assert [finding.name for finding in inspection.findings if not finding.holds] == [
        "longer strides"
    ]
    overshooting.set_timesteps(4)
    assert Stepper(overshooting).longest_stride == 1


@pytest.mark.parametrize(
    "name",
    ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DDPM", "DEISMultistep", "SASolver"],
)
def test_inspection_finds_of_stock_classes_what_the_table_says(name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**COMMON)
    found = inspect_scheduler(scheduler).traits
    known = TRAITS[f"{name}Scheduler"]
    assert found is not None
    assert found.levels == known.levels
    assert set(found.schedule) == set(known.schedule)
    assert set(found.blank(scheduler)) == set(known.blank(scheduler))
    assert found.draws(scheduler) == known.draws(scheduler)
    assert found.longest_stride(scheduler) is None


@pytest.mark.parametrize("name", ["DDIM", "Heun"])
def test_what_is_known_of_diffusers_own_classes_alone_is_not_guessed(name: str) -> None:
    kind = "HeunDiscrete" if name == "Heun" else name
    inspection = inspect_scheduler(getattr(diffusers, f"{kind}Scheduler")(**COMMON))
    assert inspection.traits is None
    assert inspection.lacks

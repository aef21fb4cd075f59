"""What can be found out about a scheduler class that is in no table: a user's own.

The common protocol of diffusers' schedulers leaves open what a tree must know. So the scheduler is
tried out on small samples: what its steps remember, whether they draw noise, at which level they
land. A property counts only if it was seen to hold.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.levels import NoiseLevels
from mctd_diffusers.denoising.scheduler_traits import Levels, SchedulerTraits, always, never
from mctd_diffusers.denoising.solver_memory import SolverMemory
from mctd_diffusers.denoising.views import Schedule, land_at

_SHAPE = (2, 4, 8, 8)
_STEPS = 8  # divides the usual 1,000 timesteps, as does half of it
_PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class Finding:
    """One property that a tree needs of a scheduler.

    Attributes:
        name: the property.
        holds: whether it was seen to hold.
        detail: what was seen.
    """

    name: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Inspection:
    """What was found out about a scheduler.

    Attributes:
        name: of its class.
        traits: what stepping it in a tree must know; ``None`` where it cannot be.
        findings: all that was tried, in order.
    """

    name: str
    traits: SchedulerTraits | None
    findings: tuple[Finding, ...]

    @property
    def lacks(self) -> str:
        """What it lacks to be stepped in a tree, in words."""
        return "; ".join(f"{each.name}: {each.detail}" for each in self.findings if not each.holds)


class _LacksError(Exception):
    """The trial that all later ones need has failed."""


def inspect_scheduler(scheduler: Any, parent: SchedulerTraits | None = None) -> Inspection:
    """Try a scheduler out.

    Args:
        scheduler: an instance, with a schedule or without; left alone.
        parent: traits of a class that it descends from, to be tried in place of guesses.
    """
    trial = _Trial(scheduler, parent)
    traits = None
    with contextlib.suppress(_LacksError):
        traits = trial.run()
    return Inspection(type(scheduler).__name__, traits, tuple(trial.findings))


class _Trial:
    """One run through all properties."""

    def __init__(self, scheduler: Any, parent: SchedulerTraits | None) -> None:
        self._given = scheduler
        self._parent = parent
        self.findings: list[Finding] = []

    def run(self) -> SchedulerTraits:
        """What stepping it must know.

        Raises:
            _LacksError: it lacks something; the last finding says what.
        """
        self._keeps_the_protocol()
        traits = self._parent or self._guess()
        self._predicts_what_is_known(traits)
        try:
            traits = self._remembers(traits)
            self._equals_its_own_loop(traits)
            self._branches(traits)
            longest = None if self._strides(traits) else 1
        except _LacksError:
            raise
        except Exception as error:  # of a step that was shown another past than its own
            self._fail("steps from a past that is put back", f"it fails: {error!r}")
        return replace(
            traits,
            longest_stride=lambda scheduler: longest,
            note="" if longest is None else "longer ones were tried, and land elsewhere",
        )

    # What is needed

    def _keeps_the_protocol(self) -> None:
        missing = [
            name for name in ("set_timesteps", "step", "config") if not hasattr(self._given, name)
        ]
        self._note("keeps the protocol", not missing, f"it has no {', '.join(missing)}", "it does")
        parameters = list(inspect.signature(self._given.step).parameters)
        names = ["model_output", "timestep", "sample"]
        given = f"`step` takes {', '.join(parameters[:3])}, not {', '.join(names)}"
        self._note("takes the common arguments", parameters[:3] == names, given, "it does")
        try:
            self._set(_STEPS)
            self._loop(self._set(_STEPS), _noise(0))
        except Exception as error:  # whatever a stranger's code raises is the finding
            self._fail("runs", f"its own loop fails: {error}")
        calls = len(self._set(_STEPS).timesteps)
        self._note(
            "takes one call a step",
            calls == _STEPS,
            f"{_STEPS} steps have {calls} timesteps: solvers of several calls are known only of "
            "diffusers' own classes",
            f"{_STEPS} steps, {calls} timesteps",
        )

    def _guess(self) -> SchedulerTraits:
        one, other = self._set(_STEPS), self._set(_STEPS - 1)
        schedule = tuple(
            name
            for name, value in vars(one).items()
            if isinstance(value, Tensor)
            and value.ndim == 1
            and len(value) - len(getattr(other, name)) == 1
            and len(value) in (_STEPS, _STEPS + 1)
        )
        known = inspect.signature(one.step).parameters
        draws = self._draws()
        takes_eta = "eta" in known and not draws and self._draws(eta=1.0)
        output = one.step(torch.zeros(_SHAPE), one.timesteps[0], _noise(0))
        says = getattr(output, "pred_original_sample", None) is not None
        return SchedulerTraits(
            self._guess_levels(one, schedule),
            schedule=schedule,
            reads=lambda scheduler: None,
            draws=always if draws else never,
            takes_eta=takes_eta,
            adds_noise=not draws,  # that it is simply added was not tried
            estimate="step" if says else "formula",
            restarts_empty=True,
        )

    def _guess_levels(self, scheduler: Any, schedule: Sequence[str]) -> Levels:
        if "sigmas" in schedule:
            if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
                return "solver"
            if hasattr(scheduler, "scale_model_input"):
                sample = _noise(0)
                scaled = self._set(_STEPS).scale_model_input(sample, scheduler.timesteps[0])
                if not torch.equal(scaled, sample):
                    return "exploding"
            if float(scheduler.sigmas.max()) <= 1 and not hasattr(scheduler, "alphas_cumprod"):
                return "flow"
        elif hasattr(scheduler, "alphas_cumprod"):
            return "alphas"
        self._fail(
            "says its noise levels",
            "it has neither `sigmas` of a known kind (those of Euler, of flow matching, or with "
            "`_sigma_to_alpha_sigma_t`) nor `alphas_cumprod` alone",
        )

    def _draws(self, **arguments: Any) -> bool:
        """Whether a loop differs by its generators."""
        if "generator" not in inspect.signature(self._given.step).parameters:
            return False
        ends = [
            self._loop(self._set(_STEPS), _noise(0), first_seed=seed, **arguments)
            for seed in (0, _STEPS)
        ]
        return not torch.equal(*ends)

    def _predicts_what_is_known(self, traits: SchedulerTraits) -> None:
        prediction = self._given.config.get("prediction_type", "flow_prediction")
        is_flow = traits.levels == "flow"
        self._note(
            "has a known prediction type",
            is_flow or prediction in _PREDICTIONS,
            f"prediction_type is {prediction!r}, not one of {', '.join(_PREDICTIONS)}",
            "flow" if is_flow else str(prediction),
        )

    def _remembers(self, traits: SchedulerTraits) -> SchedulerTraits:
        """Find the attributes that change from step to step."""
        scheduler = self._set(_STEPS)
        apart = (*traits.schedule, "_step_index")
        fresh = {
            name: copy.deepcopy(value)
            for name, value in vars(scheduler).items()
            if name not in apart
        }
        self._loop(scheduler, _noise(0))
        changed = {
            name: fresh.get(name)  # what its steps make is nothing before the first
            for name, value in vars(scheduler).items()
            if name not in apart and not (name in fresh and _same(fresh[name], value))
        }
        self.findings.append(
            Finding("remembers", True, ", ".join(changed) or "nothing from step to step")
        )
        if traits is self._parent and set(changed) == set(traits.blank(scheduler)):
            return traits
        blank = dict(changed)
        return replace(
            traits,
            blank=lambda scheduler: copy.deepcopy(blank),
            reads=lambda scheduler: None if blank else 0,
            drops_oldest=False,
            split=False,
            restarts_empty=bool(blank),
        )

    def _equals_its_own_loop(self, traits: SchedulerTraits) -> None:
        ours = self._walk(traits, _noise(0), [1] * _STEPS, 0)
        stock = self._loop(self._set(_STEPS), _noise(0))
        self._note(
            "stride 1",
            torch.equal(ours, stock),
            f"differs from its own loop by up to {_gap(ours, stock)}",
            "equals its own loop bit for bit",
        )

    def _branches(self, traits: SchedulerTraits) -> None:
        """Whether two samples that take turns on one scheduler equal each alone."""
        alone = [self._walk(traits, _noise(seed), [1] * _STEPS, seed) for seed in (0, 1)]
        walkers = [self._walker(traits, _noise(seed), [1] * _STEPS, seed) for seed in (0, 1)]
        ends = [_noise(seed) for seed in (0, 1)]
        for _ in range(_STEPS):
            for place, walker in enumerate(walkers):
                ends[place] = next(walker)
        same = all(torch.equal(*pair) for pair in zip(alone, ends, strict=True))
        self._note(
            "branches",
            same,
            "samples that take turns disturb each other: it remembers more than its attributes",
            "samples that take turns equal each alone",
        )

    def _strides(self, traits: SchedulerTraits) -> bool:
        """Whether a stride of 2 is the scheduler of half as many steps, or lands as it should."""
        half = _STEPS // 2
        ours = self._walk(traits, _noise(0), [2] * half, 0)
        full, stock = self._set(_STEPS), self._set(half)
        how = f"equal it set to {half} steps"
        if not torch.equal(stock.timesteps.double(), full.timesteps[::2].double()):
            how = "equal it with its schedule cut to the same points"
            for name in traits.schedule:
                values = getattr(full, name)
                points = [*range(0, _STEPS, 2), *([_STEPS] if len(values) > _STEPS else [])]
                setattr(stock, name, values[points])
        expected = self._loop(stock, _noise(0))
        holds = torch.equal(ours, expected) and self._lands(traits)
        detail = f"strides of 2 do not {how}, or land at another level: only stride 1 is proven"
        self.findings.append(Finding("longer strides", holds, how if holds else detail))
        return holds

    def _lands(self, traits: SchedulerTraits) -> bool:
        """Whether, given perfect outputs, a stride of 2 keeps as much signal as its target holds.

        Two samples with equal noise and different clean samples must differ after the step by the
        target's factor of signal times their difference.
        """
        scheduler = self._set(_STEPS)
        schedule = Schedule(scheduler, traits)
        levels = NoiseLevels(scheduler, traits, schedule)
        alpha, sigma = levels.factors(1)
        target, _ = levels.factors(3)
        ends = []
        for clean in (0.0, 1.0):
            eps = _noise(3)
            x0 = torch.full(_SHAPE, clean)
            sample = alpha * x0 + sigma * eps
            output = _perfect_output(self._given, traits, x0, eps, alpha, sigma)
            memory = SolverMemory(scheduler, traits)
            view = schedule.view(copy.copy(scheduler), (), 1, 2)
            memory.clear(view.scheduler)
            ends.append(self._step(view, traits, sample, output, 1, 2, 0, schedule))
        kept = float((ends[1] - ends[0]).mean())
        return abs(kept - float(target)) < 1e-2 * max(abs(float(target)), 1e-3)

    # Loops

    def _set(self, num_steps: int) -> Any:
        scheduler = copy.deepcopy(self._given)
        scheduler.set_timesteps(num_steps)
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True  # it warns of what a trial need not do
        return scheduler

    def _loop(
        self, scheduler: Any, sample: Tensor, *, first_seed: int = 0, **arguments: Any
    ) -> Tensor:
        """The scheduler's own loop; step ``i`` draws from generators of seed ``first_seed + i``."""
        takes = "generator" in inspect.signature(scheduler.step).parameters
        for i, timestep in enumerate(scheduler.timesteps):
            inputs = sample
            if hasattr(scheduler, "scale_model_input"):
                inputs = scheduler.scale_model_input(sample, timestep)
            extra = {"generator": _generators(first_seed + i)} if takes else {}
            sample = scheduler.step(
                _network(inputs), timestep, sample, return_dict=False, **extra, **arguments
            )[0]
        return sample

    def _walk(
        self, traits: SchedulerTraits, sample: Tensor, strides: Sequence[int], seed: int
    ) -> Tensor:
        *_, end = self._walker(traits, sample, strides, seed)
        return end

    def _walker(
        self, traits: SchedulerTraits, sample: Tensor, strides: Sequence[int], seed: int
    ) -> Iterator[Tensor]:
        """The same by views, one step at a time; generators are those of the loop."""
        scheduler = self._set(_STEPS)
        schedule, memory = Schedule(scheduler, traits), SolverMemory(scheduler, traits)
        state: tuple[Any, list[Tensor]] = (memory.blank, [])
        index = 0
        visited: tuple[int, ...] = ()
        for i, stride in enumerate(strides):
            scaled = sample
            if hasattr(scheduler, "scale_model_input"):
                scheduler._step_index = index
                scaled = scheduler.scale_model_input(sample, schedule.timesteps[index])
            view = schedule.view(scheduler, memory.points(visited), index, stride)
            history = [list(rows) for rows in zip(*state[1], strict=True)] or [[]] * len(sample)
            memory.put(view.scheduler, state[0], history)
            sample = self._step(view, traits, sample, _network(scaled), index, stride, i, schedule)
            state = memory.take(view.scheduler)
            visited = (*visited, index)
            index += stride
            yield sample

    def _step(
        self,
        view: Any,
        traits: SchedulerTraits,
        sample: Tensor,
        output: Tensor,
        index: int,
        stride: int,
        seed: int,
        schedule: Schedule,
    ) -> Tensor:
        view.enter()
        if traits.grid == "constant":
            constant = self._given.config.num_train_timesteps // _STEPS
            landing = int(schedule.timesteps[index + stride - 1]) - constant
            land_at(view.scheduler, int(view.timestep), landing)
        takes = "generator" in inspect.signature(view.scheduler.step).parameters
        extra = {"generator": _generators(seed)} if takes else {}
        stepped: Tensor = view.scheduler.step(
            output, view.timestep, sample, return_dict=False, **extra, **view.arguments
        )[0]
        return stepped

    def _note(self, name: str, holds: bool, otherwise: str, detail: str) -> None:
        if not holds:
            self._fail(name, otherwise)
        self.findings.append(Finding(name, True, detail))

    def _fail(self, name: str, detail: str) -> NoReturn:
        self.findings.append(Finding(name, False, detail))
        raise _LacksError


def _network(inputs: Tensor) -> Tensor:
    """Not linear, and blind to the batch and to time."""
    return 0.6 * inputs - 0.4 * inputs / (1 + inputs * inputs)


def _perfect_output(
    scheduler: Any,
    traits: SchedulerTraits,
    x0: Tensor,
    eps: Tensor,
    alpha: Any,
    sigma: Any,
) -> Tensor:
    scale = (torch.as_tensor(alpha) ** 2 + sigma**2) ** 0.5
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    match "flow_prediction" if traits.levels == "flow" else prediction:
        case "epsilon":
            return eps
        case "v_prediction":
            return (alpha * eps - sigma * x0) / scale
        case "sample":
            return x0
    return eps - x0


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(other, list | tuple | Tensor):
        return False
    return bool(one is other or one == other)


def _noise(seed: int) -> Float[Tensor, "batch channels height width"]:
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(seed))


def _generators(seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + 100 * row) for row in range(_SHAPE[0])]


def _gap(one: Tensor, other: Tensor) -> str:
    return f"{float((one - other).abs().max()):.2g}"

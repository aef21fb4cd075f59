"""The table of schedulers: every class of diffusers is in it, and what it says is so."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from mctd_diffusers.denoising.schedulers import REFUSED, TRAITS, check_scheduler, traits_of
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import UnsupportedSchedulerError
from tests.scheduler_table import DOCUMENT, rendered, scheduler_classes
from tests.schedulers import (
    ETAS,
    SCHEDULERS,
    first_noise,
    make_of_class,
    make_scheduler,
    noise,
    scheduler_class,
    set_points,
    set_steps,
    stock_loop,
    true_output,
    walk,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have tb<=t1:UserWarning"),  # of torchsde
]

SHAPE = (4, 5, 3)
STEPS = 8
KINDS = [name.removesuffix("Scheduler") for name in TRAITS]


# Every class


def test_every_scheduler_class_of_diffusers_is_placed() -> None:
    classes, placed = set(scheduler_classes()), {*TRAITS, *REFUSED}
    new = ", ".join(sorted(classes - placed))
    assert not new, (
        f"diffusers {diffusers.__version__} has {new}, of which the table knows nothing. Place "
        "each in denoising/schedulers.py: in TRAITS, with an entry in SCHEDULERS of "
        "tests/schedulers.py, or in REFUSED with the reason; then run scripts/regold."
    )
    assert not placed - classes, "the table has classes that diffusers has not"
    assert not set(TRAITS) & set(REFUSED)


def test_a_class_of_a_new_release_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("diffusers.schedulers.scheduling_ddim")
    new = type("NewScheduler", (diffusers.DDIMScheduler,), {"__module__": module.__name__})
    monkeypatch.setattr(module, "NewScheduler", new, raising=False)
    with pytest.raises(AssertionError, match=r"has NewScheduler.*Place each in denoising"):
        test_every_scheduler_class_of_diffusers_is_placed()


def test_every_class_that_can_be_stepped_is_under_the_tests_of_the_stepper() -> None:
    assert {f"{kind}Scheduler" for kind, _ in SCHEDULERS.values()} == set(TRAITS)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_classes_say_why_and_what_to_do(name: str) -> None:
    scheduler: Any = object.__new__(scheduler_classes()[name])
    with pytest.raises(UnsupportedSchedulerError) as error:
        check_scheduler(scheduler)
    assert str(error.value).startswith(f"{name} cannot be branched: {REFUSED[name]}")
    assert "DDIMScheduler.from_config" in str(error.value)


def test_the_document_is_what_the_table_says() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert text == rendered(text), "the table has changed; run scripts/regold"


# Every setting


def variants(kind: str) -> Iterator[dict[str, Any]]:
    """Settings of a class that are claimed to work."""
    traits = TRAITS[f"{kind}Scheduler"]
    has = set(inspect.signature(scheduler_class(kind)).parameters)
    for setting, values in traits.settings.items():
        for value in values:
            flow = {"use_flow_sigmas": True} if value == "flow_prediction" else {}
            yield {setting: value, **flow}
    predictions = traits.settings.get("prediction_type", ())
    sigmas = sorted(has & {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"})
    for spacing in ("trailing", "leading", "linspace") if "timestep_spacing" in has else ():
        yield {"timestep_spacing": spacing}
        for setting in sigmas[spacing != "trailing" :][:2]:
            yield {"timestep_spacing": spacing, setting: True}
        if "rescale_betas_zero_snr" in has:
            yield {
                "timestep_spacing": spacing,
                "rescale_betas_zero_snr": True,
                "prediction_type": "v_prediction",
            }
    for setting in sigmas:
        by_v: dict[str, Any] = (
            {"prediction_type": "v_prediction"} if "v_prediction" in predictions else {}
        )
        yield {setting: True, **by_v}
    for setting, value in (
        ("use_lu_lambdas", True),
        ("solver_type", "heun"),
        ("euler_at_final", True),
        ("thresholding", True),
        ("clip_sample", True),
        ("predictor_order", 3),
        ("corrector_order", 3),
        ("sigma_schedule", "exponential"),
        ("use_dynamic_shifting", True),
        ("shift_terminal", 0.1),
        ("timestep_type", "continuous"),
    ):
        only = traits.settings.get(setting, (value,))
        if setting in has and value in only and (setting, kind) not in NOT_STOCK:
            needs_flow = kind == "UniPCMultistep" and "shift" in setting
            yield {setting: value, **(BY_FLOW if needs_flow else {})}


BY_FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
NOT_STOCK = {("solver_type", "DEISMultistep"), ("solver_type", "UniPCMultistep")}
"""Of these, the stock class takes the value for another."""

SETTINGS = [
    pytest.param(kind, settings, id=f"{kind}-{','.join(f'{k}={v}' for k, v in settings.items())}")
    for kind in KINDS
    for settings in {repr(each): each for each in variants(kind)}.values()
]


def make(kind: str, num_steps: int = 0, **settings: Any) -> Any:
    """A scheduler with some settings, as `make_of_class` makes it."""
    if kind.startswith("KDPM2"):  # lays out all of its timesteps when it is made
        settings = {"num_train_timesteps": 200, **settings}
    scheduler = make_of_class(kind, **settings)
    if num_steps:
        if settings.get("use_dynamic_shifting"):
            scheduler.set_timesteps(num_steps, mu=0.7)
        else:
            set_steps(scheduler, num_steps)
    return scheduler


@pytest.mark.parametrize("strides", [(1, 4), pytest.param((2, 8), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_every_setting_steps_like_the_stock_scheduler(
    kind: str, settings: dict[str, Any], strides: tuple[int, ...]
) -> None:
    full = make(kind, STEPS, **settings)
    stepper = Stepper(full)
    assert stepper.num_steps == STEPS
    first, seeds = first_noise(full, 1, *SHAPE), list(range(100, 100 + STEPS))
    for stride in strides:
        points = list(range(0, STEPS, stride))
        stock = copy.deepcopy(full)
        if stride > 1:
            if len(points) == 1 and (kind == "UnCLIP" or "shift_terminal" in settings):
                continue  # the stock scheduler cannot be set to one step
            if is_off_its_points(kind, settings):
                continue
            fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in settings else {}
            stock = make(kind, **{**settings, **fixed})
            set_points(stock, full, points)
        expected = stock_loop(stock, first, seeds[: len(points)])
        ours = walk(stepper, first, [stride] * len(points), seeds[: len(points)])
        assert expected.isfinite().all()
        if kind.startswith("KDPM2") and stride > 1:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(ours, expected), f"stride {stride}"


def is_off_its_points(kind: str, settings: dict[str, Any]) -> bool:
    """Whether the stock scheduler steps by a constant, and its timesteps do not."""
    return TRAITS[f"{kind}Scheduler"].grid == "constant" and (
        settings.get("timestep_spacing") == "linspace"
    )


PREDICTIONS = [
    (kind, prediction)
    for kind in KINDS
    for prediction in TRAITS[f"{kind}Scheduler"].settings.get("prediction_type", ())
]


@pytest.mark.parametrize(("kind", "prediction"), PREDICTIONS)
def test_every_prediction_gives_the_clean_sample(kind: str, prediction: str) -> None:
    settings: dict[str, Any] = {"prediction_type": prediction}
    if "clip_sample" in inspect.signature(scheduler_class(kind)).parameters:
        settings["clip_sample"] = False
    if prediction == "flow_prediction":
        settings["use_flow_sigmas"] = True
    scheduler = make(kind, STEPS, **settings)
    stepper = Stepper(scheduler)
    x0, eps, one, zero = noise(1, *SHAPE), noise(1, *SHAPE, seed=1), torch.ones(1), torch.zeros(1)
    for index in (1, 4, 7):
        x, _ = stepper.renoise(x0, index, eps)
        alpha, sigma = (
            stepper.renoise(*pair)[0] for pair in ((one, index, zero), (zero, index, one))
        )
        match prediction:
            case _ if kind.startswith(("EDM", "Cosine", "SCM")):
                output = true_output(scheduler, x, x0, eps, sigma)
            case "epsilon":
                output = eps
            case "v_prediction":  # of preserved variance: alpha eps - sigma x0
                output = (alpha * eps - sigma * x0) / (alpha**2 + sigma**2).sqrt()
            case "flow_prediction":
                output = eps - x0
            case _:
                output = x0
        estimate = stepper.denoised(x, output, [index])
        torch.testing.assert_close(estimate, x0, rtol=2e-3, atol=2e-3)


PROVEN_ONLY = [(kind, setting) for kind in KINDS for setting in TRAITS[f"{kind}Scheduler"].settings]


@pytest.mark.parametrize(("kind", "setting"), PROVEN_ONLY)
def test_other_values_are_refused_with_the_value_and_the_cure(kind: str, setting: str) -> None:
    scheduler = make(kind)
    check_scheduler(scheduler)
    allowed = TRAITS[f"{kind}Scheduler"].settings[setting]
    scheduler.register_to_config(**{setting: "another"})
    with pytest.raises(UnsupportedSchedulerError, match=re.escape(f"{setting}='another'")) as error:
        check_scheduler(scheduler)
    for value in allowed:
        assert repr(value) in str(error.value)
    scheduler.register_to_config(**{setting: allowed[0]})  # as the message says
    check_scheduler(scheduler)


# Schedules of a user's own

TIMESTEPS = [900, 700, 640, 400, 310, 100, 50, 10]
SHARES = [1.0, 0.8, 0.6, 0.55, 0.3, 0.2, 0.1, 0.05]
SCM = {"timesteps": torch.tensor([1.5, 1.2, 1.0, 0.6, 0.3, 0.1, 0.0]), "max_timesteps": None}
CUSTOM: dict[str, tuple[str, dict[str, Any]]] = {
    "cm": ("cm", {"timesteps": [300, 250, 200, 150, 90, 50, 20, 0]}),
    "ddpm": ("ddpm", {"timesteps": TIMESTEPS}),
    "ddpm-parallel": ("ddpm-parallel", {"timesteps": TIMESTEPS}),
    "dpm++": ("dpm++", {"timesteps": TIMESTEPS}),
    "sde-dpm++": ("sde-dpm++", {"timesteps": TIMESTEPS}),
    "dpm-single": ("dpm-single", {"timesteps": TIMESTEPS}),
    "edm-euler": (
        "edm-euler",
        {"num_inference_steps": 4, "sigmas": torch.tensor([0.0, 0.2, 0.7, 1.0])},
    ),
    "euler": ("euler", {"timesteps": TIMESTEPS}),
    "euler-sigmas": ("euler", {"sigmas": [14.0, 8.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.1, 0.0]}),
    "flow-euler": ("flow-euler", {"timesteps": TIMESTEPS, "sigmas": SHARES}),
    "flow-euler-sigmas": ("flow-euler-shifted", {"sigmas": SHARES}),
    "flow-lcm-sigmas": ("flow-lcm", {"sigmas": SHARES}),
    "heun": ("heun", {"timesteps": TIMESTEPS}),
    "lcm": ("lcm", {"timesteps": [999, *TIMESTEPS]}),
    "ltx-sigmas": ("ltx", {"sigmas": [*SHARES, 0.0]}),
    "minimax-sigmas": ("minimax", {"sigmas": [*SHARES, 0.0]}),
    "scm": ("scm", {"num_inference_steps": 6, "intermediate_timesteps": None, **SCM}),
    "tcd": ("tcd-eta", {"timesteps": [999, *TIMESTEPS]}),
    "unipc-sigmas": ("unipc-flow", {"sigmas": np.array(SHARES)}),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_schedules_step_like_the_stock_scheduler(name: str) -> None:
    kind, given = CUSTOM[name]
    stock = make_scheduler(kind)
    stock.set_timesteps(**given)
    stepper = Stepper(stock, eta=ETAS.get(kind, 0.0))
    seeds, first = list(range(stepper.num_steps)), first_noise(stock, 1, *SHAPE)
    ours = walk(stepper, first, [1] * stepper.num_steps, seeds)
    if kind == "ltx":  # lists the finished point too, where its step does nothing
        stock.timesteps = stock.timesteps[:-1]
    assert torch.equal(ours, stock_loop(stock, first, seeds, ETAS.get(kind, 0.0)))


def test_every_class_that_takes_a_custom_schedule_is_tested_with_one() -> None:
    takes = {
        (kind, argument)
        for kind in KINDS
        for argument in ("timesteps", "sigmas")
        if argument in inspect.signature(scheduler_class(kind).set_timesteps).parameters
    }
    tested = {
        (SCHEDULERS[name][0], argument) for name, given in CUSTOM.values() for argument in given
    }
    alias = {("LTXEulerAncestralRF", "timesteps"), ("FlowMatchLCM", "timesteps")}
    assert takes - tested <= alias, "`timesteps` of these are another name of their `sigmas`"


# What is remembered

WRITTEN: dict[str, dict[str, str]] = {
    "FlowMatchLCM": {"_init_size": "read where `scale_factors` are set, which is refused"},
    "KDPM2AncestralDiscrete": {"dt": "written, and read by nobody"},
    "LCM": {"sigma_data": "written at each step, always the same"},
}
"""What else steps write, and why it need not be remembered."""


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are deeply equal, NaN to NaN too."""
    if type(one) is not type(other):
        return False
    match one:
        case Tensor():
            return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        case np.ndarray():
            return np.array_equal(one, other)
        case list() | tuple():
            return len(one) == len(other) and all(map(is_same, one, other))
        case dict():
            return one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
    return one is other or bool(one == other)


def recorded(scheduler: Any, changed: set[str]) -> Callable[..., Any]:
    """The scheduler's step, which adds the names of the attributes that it changes to `changed`."""
    step = scheduler.step
    missing = object()

    @functools.wraps(step)
    def record(*args: Any, **kwargs: Any) -> Any:
        before = {name: kept(value) for name, value in vars(scheduler).items()}
        answer = step(*args, **kwargs)
        changed.update(
            name
            for name, value in vars(scheduler).items()
            if not is_same(before.get(name, missing), value)
        )
        return answer

    return record


def kept(value: Any) -> Any:
    """A copy that later changes in place do not reach."""
    return copy.deepcopy(value) if isinstance(value, Tensor | np.ndarray | list | dict) else value


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_is_remembered_is_all_that_steps_change(name: str) -> None:
    kind = SCHEDULERS[name][0]
    scheduler = make_scheduler(name, STEPS)
    before = {attribute: kept(value) for attribute, value in vars(scheduler).items()}
    blank = traits_of(scheduler).blank(scheduler)
    changed: set[str] = set()
    scheduler.step = recorded(scheduler, changed)
    stock_loop(scheduler, first_noise(scheduler, 1, *SHAPE), range(STEPS), ETAS.get(name, 0.0))
    also = WRITTEN.get(kind, {})
    assert changed - {"_step_index", "step"} == {*blank, *also}
    for attribute, value in blank.items():
        assert is_same(before.get(attribute, value), value), attribute

"""The noise of edges: how much it is, where it comes from, and what solvers forget by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from torch import Tensor

from mctd_diffusers.denoising.scheduler_traits import forgets
from mctd_diffusers.denoising.schedulers import TRAITS
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.denoising.views import BrownianEdge
from mctd_diffusers.search.environment import Action
from tests.schedulers import (
    ETAS,
    FIRST_OF_CLASS,
    SCHEDULERS,
    TWO_CALLS,
    cross,
    evaluate,
    first_noise,
    make_scheduler,
    noise,
    set_points,
    stock_loop,
    true_output,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have tb<=t1:UserWarning"),  # of torchsde
]

SHAPE = (4, 5, 3)
STEPS = 8
PATH = [1, 2, 1, 1, 2, 1]
ONE, ZERO = torch.ones(1, 1), torch.zeros(1, 1)


def levels(stepper: Stepper, index: int) -> tuple[float, float]:
    """Factors of signal and noise at a point."""
    return (
        stepper.renoise(ONE, index, ZERO)[0].item(),
        stepper.renoise(ZERO, index, ONE)[0].item(),
    )


# How much noise


def preserved(scheduler: Any, index: int) -> float:
    """The share of the signal, `alpha^2`, at a point."""
    return float(scheduler.alphas_cumprod[scheduler.timesteps[index]])


def posterior(scheduler: Any, index: int, target: int) -> float:
    """Ho et al., 2020, equation 7."""
    a, b = preserved(scheduler, index), preserved(scheduler, target)
    return math.sqrt((1 - b) / (1 - a) * (1 - a / b))


def ancestral(scheduler: Any, index: int, target: int) -> float:
    """Karras et al., 2022, with the ancestral split at a full share."""
    calls = 2 if type(scheduler).__name__.removesuffix("Scheduler") in TWO_CALLS else 1
    sigma, below = (float(scheduler.sigmas[calls * i]) for i in (index, target))
    return below * math.sqrt(1 - (below / sigma) ** 2)


def ancestral_preserving(scheduler: Any, index: int, target: int) -> float:
    """The same where samples are scaled to preserve variance."""
    return ancestral(scheduler, index, target) / math.sqrt(1 + float(scheduler.sigmas[target]) ** 2)


def flow_ancestral(scheduler: Any, index: int, target: int) -> float:
    """The split where data and noise are mixed linearly: down to the square of the next level."""
    sigma, below = (float(scheduler.sigmas[i]) for i in (index, target))
    down = below * below / sigma
    return math.sqrt(below**2 - (down * (1 - below) / (1 - down)) ** 2)


def strategic(scheduler: Any, index: int, target: int) -> float:
    """Zheng et al., 2024: down to a share of the next timestep, and noise up from there."""
    middle = int((1 - ETAS["tcd-eta"]) * int(scheduler.timesteps[target]))
    return math.sqrt(1 - preserved(scheduler, target) / float(scheduler.alphas_cumprod[middle]))


CLOSED_FORMS: dict[str, Callable[[Any, int, int], float]] = {
    "ddim-eta": lambda s, i, j: ETAS["ddim-eta"] * posterior(s, i, j),
    "ddpm": posterior,
    "ddpm-parallel": posterior,
    "ddpm-large": lambda s, i, j: math.sqrt(1 - preserved(s, i) / preserved(s, j)),
    "unclip": posterior,
    "euler-a": ancestral,
    "kdpm2-a": ancestral,
    "sde-dpm++": ancestral_preserving,
    "edm-sde-dpm++": ancestral,
    "cosine-dpm++": ancestral,
    "ltx": flow_ancestral,
    "lcm": lambda s, i, j: math.sqrt(1 - preserved(s, j)),
    "tcd-eta": strategic,
    "cm": lambda s, i, j: math.sqrt(float(s.sigmas[j]) ** 2 - s.config.sigma_min**2),
    "flow-euler-sde": lambda s, i, j: float(s.sigmas[j]),
    "flow-lcm": lambda s, i, j: float(s.sigmas[j]),
    "scm": lambda s, i, j: math.sin(s.timesteps[j]) * s.config.sigma_data,
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_schedulers_own_noise_has_its_closed_form(name: str) -> None:
    scheduler = make_scheduler(name, STEPS)
    stepper = Stepper(scheduler, eta=ETAS.get(name, 0.0))
    for index in (0, 1, 4, 6):
        state = stepper.initial_state(index)
        for stride in (1, 2, 3):
            if index + stride < STEPS:
                expected = CLOSED_FORMS[name](scheduler, index, index + stride)
                std = stepper.noise_std(state, Action(stride))
                assert std == pytest.approx(expected, rel=1e-3, abs=1e-6)
                assert stepper.randomness(Action(stride)) == "own"
    if name != "ddpm-large":  # which adds noise to the finished sample too
        assert stepper.noise_std(stepper.initial_state(6), Action(2)) == 0


def test_every_class_that_draws_noise_has_a_closed_form_or_a_reason() -> None:
    no_form = {
        "DPMSolverSDE": "its noise moves the midpoint",
        "SASolver": "its noise is used again by the next step",
        "DPMSolverSinglestep": "how much it adds depends on the place of a step in its pair",
    }
    drawing = {
        kind
        for name, (kind, _) in SCHEDULERS.items()
        if TRAITS[f"{kind}Scheduler"].draws(make_scheduler(name))
    }
    assert drawing - {SCHEDULERS[name][0] for name in CLOSED_FORMS} == set(no_form)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("tcd")])
def test_an_injected_share_is_that_of_ddim_at_any_levels(name: str) -> None:
    stepper = Stepper(make_scheduler(name, STEPS))
    for index in (0, 3, 5):
        alpha, sigma = levels(stepper, index)
        for stride in (1, 2):
            alpha_next, sigma_next = levels(stepper, index + stride)
            ratio = sigma_next * alpha / (alpha_next * sigma)
            action = Action(stride, 0.5)
            std = stepper.noise_std(stepper.initial_state(index), action)
            expected = 0.5 * sigma_next * math.sqrt(1 - ratio**2)
            assert std == pytest.approx(expected, rel=2e-3, abs=1e-6)
            assert stepper.randomness(action) == (
                "own" if "ddim" in name and name != "cogvideox-ddim" else "injected"
            )


@pytest.mark.parametrize("eta", [None, 0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_siblings_differ_by_their_noise_exactly_where_an_edge_is_stochastic(
    name: str, eta: float | None
) -> None:
    scheduler = make_scheduler(name, STEPS)
    stepper = Stepper(scheduler, eta=ETAS.get(name, 0.0))
    latents, states = first_noise(scheduler, 1, *SHAPE), [stepper.initial_state()]
    draws = (noise(1, *SHAPE, seed=5) - noise(1, *SHAPE, seed=6))[0]
    for seed, stride in enumerate(PATH):
        action = Action(stride, eta)
        siblings, _ = cross(stepper, latents.repeat(2, 1, 1, 1), states * 2, [action] * 2, [5, 6])
        apart, std = siblings[0] - siblings[1], stepper.noise_std(states[0], action)
        rounding = 2e-5 * max(1.0, float(latents.abs().max()))
        is_stochastic = stepper.is_stochastic(states[0].step_index, action)
        assert (apart.abs().max() > rounding) == is_stochastic
        if not math.isnan(std):
            torch.testing.assert_close(apart, std * draws, rtol=1e-4, atol=rounding)
        latents, states = cross(stepper, latents, states, [action], [10 + seed])


@pytest.mark.parametrize("name", ["edm-dpm++", "cosine-dpm++"])
def test_no_noise_is_injected_between_equal_levels(name: str) -> None:
    # Ending at the cleanest level, the schedule names it twice.
    stepper = Stepper(make_scheduler(name, STEPS, final_sigmas_type="sigma_min"))
    state = stepper.initial_state(STEPS - 1)
    assert stepper.noise_std(state, Action(1, 0.5)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("num_steps", "stride"), [(10, 1), (20, 2)])
def test_a_full_share_from_a_signal_of_zero_is_finite(num_steps: int, stride: int) -> None:
    scheduler = make_scheduler("ddim-zero-snr", num_steps)
    stepper = Stepper(scheduler)
    latents, states = noise(1, *SHAPE), [stepper.initial_state()]
    latents, _ = cross(stepper, latents, states, [Action(stride, 1.0)], [1])
    assert latents.isfinite().all()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_noise_is_drawn_in_the_precision_that_is_claimed(name: str) -> None:
    stepper = Stepper(make_scheduler(name, STEPS), eta=ETAS.get(name, 0.0))
    latents, states = noise(2, *SHAPE).bfloat16()[[0, 0]], [stepper.initial_state()] * 2
    action = Action(3)
    dtype = stepper.noise_dtype(action, torch.bfloat16)
    siblings, _ = cross(stepper, latents, states, [action] * 2, [5, 6])
    draws = [
        torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype).double()
        for seed in (5, 6)
    ]
    apart = siblings[0].double() - siblings[1].double()
    # Latents of half precision round away what their noise has more; those of SCM do not.
    rounding = 0.1 if siblings.dtype == torch.bfloat16 else 1e-5
    expected = stepper.noise_std(states[0], action) * (draws[0] - draws[1])[0]
    torch.testing.assert_close(apart, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("midpoint", [5.0, 3.2])
def test_brownian_edges_vary_together_as_those_of_torchsde(midpoint: float) -> None:
    # Noise to the midpoint, and over the whole edge. 40,000 numbers: an error of 0.005.
    sigma, target = torch.tensor(7.0), torch.tensor(2.0)
    middle, like = torch.tensor(midpoint), torch.zeros(1, 40_000)
    tree = BrownianTreeNoiseSampler(like, 0.03, 14.0, seed=3)
    generators = [torch.Generator().manual_seed(4)]
    ours = [BrownianEdge(generators, like, None)(sigma, middle)]
    generators = [torch.Generator().manual_seed(4)]  # each half of an edge is given the same seed
    ours.append(BrownianEdge(generators, like, middle)(sigma, target))
    theirs = [tree(sigma, middle), tree(sigma, target)]
    expected = math.sqrt((7.0 - midpoint) / (7.0 - 2.0))
    for halves in (ours, theirs):
        covariance = torch.cov(torch.cat(halves))
        assert covariance.diag().tolist() == pytest.approx([1, 1], abs=0.03)
        assert covariance[0, 1].item() == pytest.approx(expected, abs=0.02)


# Samples of Gaussian data

NOT_SAMPLERS = {
    "lcm": "noises the estimate again, which is right for a consistency model alone",
    "tcd-eta": "noises above the level it stepped to, likewise",
    "cm": "as LCM",
    "scm": "as LCM",
    "flow-lcm": "as LCM",
    "flow-euler-sde": "as LCM",
}
CLIPPED = {"cm", "ddim-clip", "ddpm-large", "unclip"}
"""Their estimates are clipped to 1, so the data are narrow."""
COARSE = {
    "cm", "cosine-dpm++", "ddim-clip", "ddpm-large", "dpm++-flow", "dpm-single-sde", "edm-dpm++",
    "edm-euler", "edm-sde-dpm++", "euler-beta", "flow-euler-shifted", "flow-heun", "ipndm",
    "minimax", "scm", "unclip", "unipc-flow",
}  # fmt: skip
"""Of wide gaps between levels, or narrow data: edges of first order need more steps."""


def gaussian_output(
    stepper: Stepper, scheduler: Any, x: Tensor, states: Sequence[SolverState], deviation: float
) -> Tensor:
    """What the network of Gaussian data answers: by the best guess, which is linear."""
    alpha, sigma = torch.tensor(1.0), torch.tensor(0.0)
    state = states[0]
    if state.midway is None:
        alpha, sigma = map(torch.tensor, levels(stepper, state.step_index))
    else:
        inputs, timesteps = stepper.network_input(torch.ones_like(x), states)
        if stepper.init_noise_sigma == 1:  # flow matching: its timesteps are its levels
            sigma = timesteps[0] / 1000
            alpha = 1 - sigma
        else:  # it divides by the deviation of data of deviation 1
            sigma = (inputs.flatten()[0] ** -2 - 1).sqrt()
    variance = deviation**2
    denoised = alpha * variance * x / (alpha**2 * variance + sigma**2)
    return true_output(scheduler, x, denoised, (x - alpha * denoised) / sigma, sigma)


SAMPLED = [
    pytest.param(
        name,
        eta,
        marks=()
        if (name in FIRST_OF_CLASS and eta != 1) or name in ("ddim", "euler", "dpm++")
        else pytest.mark.slow,
    )
    for name in SCHEDULERS
    for eta in (None, 0.5, 1.0)
    if not (eta != 0.5 and name in NOT_SAMPLERS)
    and not (eta is not None and name.startswith("tcd"))  # whose gamma is no share of fresh noise
]


@pytest.mark.parametrize(("name", "eta"), SAMPLED)
def test_gaussian_data_keep_their_deviation_under_every_scheduler(
    name: str, eta: float | None
) -> None:
    # 12,000 numbers: an error of 0.7 %. The rest is the solvers' own, of first order in the step.
    deviation = 0.25 if name in CLIPPED else 2.0
    num_steps = 107 if name == "cm" else 200 if name in COARSE else 50  # 107 divides its 321
    scheduler = make_scheduler(name, num_steps)
    stepper = Stepper(scheduler, eta=ETAS.get(name, 0.0))
    clean = noise(1, 12_000, seed=11) * deviation
    x, states = stepper.renoise(clean, 0, noise(1, 12_000, seed=12))
    for step in range(num_steps):
        output = gaussian_output(stepper, scheduler, x, states, deviation)
        x, states = stepper.step(x, output, states, [Action(1, eta)], [1000 + step])
        if states[0].midway is not None:
            output = gaussian_output(stepper, scheduler, x, states, deviation)
            x, states = stepper.complete(x, output, states, [1000 + step])
    assert x.std().item() == pytest.approx(deviation, rel=0.07 if name in CLIPPED else 0.05)
    assert x.mean().item() == pytest.approx(0, abs=0.04 * deviation)


# What solvers forget

REMEMBERING = [
    name
    for name, (kind, _) in SCHEDULERS.items()
    if TRAITS[f"{kind}Scheduler"].blank is not forgets
]


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_renoised_sample_steps_like_the_stock_scheduler_begun_there(name: str) -> None:
    full = make_scheduler(name, STEPS)
    stepper = Stepper(full)
    latents, states = first_noise(full, 1, *SHAPE), [stepper.initial_state()]
    for seed in range(5):
        latents, states = cross(stepper, latents, states, [Action(1)], [seed])
    x, states = stepper.renoise(latents, 3, noise(1, *SHAPE, seed=1))
    ours, seeds = x, range(20, 25)
    for seed in seeds:
        ours, states = cross(stepper, ours, states, [Action(1)], [seed])

    begin = 3
    stock = make_scheduler(name, STEPS)
    if TRAITS[type(full).__name__].restarts_empty:  # begun in the middle it reads what it has not
        begin = 0
        set_points(stock, full, range(3, STEPS))
    else:
        stock.set_begin_index(begin * stepper.calls_per_step)
    assert torch.equal(ours, stock_loop(stock, x, seeds, begin=begin))


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_solver_starts_anew_after_noise_that_it_does_not_know_of(name: str) -> None:
    stepper = Stepper(make_scheduler(name, STEPS))
    latents, states = first_noise(make_scheduler(name), 1, *SHAPE), [stepper.initial_state()]
    for seed, action in enumerate([Action(1), Action(1), Action(2, 0.5)]):
        latents, states = cross(stepper, latents, states, [action], [seed])
    _, fresh = stepper.renoise(latents, 4, torch.zeros_like(latents))
    ends = [cross(stepper, latents, each, [Action(2)], [7])[0] for each in (states, fresh)]
    keeps_it = name in SPLIT
    assert torch.equal(*ends) != keeps_it


SPLIT = {
    "dpm++", "dpm++-karras", "dpm++-min", "sde-dpm++",
}  # fmt: skip
"""Multistep solvers whose noise is added by a split, which they allow for: see `_Split`."""


@pytest.mark.parametrize("name", REMEMBERING)
def test_states_survive_being_saved_as_plain_types(name: str, tmp_path: Path) -> None:
    stepper = Stepper(make_scheduler(name, STEPS))
    latents, states = first_noise(make_scheduler(name), 1, *SHAPE), [stepper.initial_state()]
    for seed, stride in enumerate([1, 2]):
        latents, states = cross(stepper, latents, states, [Action(stride)], [seed])
    outputs = evaluate(stepper, latents, states)
    latents, states = stepper.step(latents, outputs, states, [Action(2)], [9])
    assert (states[0].midway is not None) == (stepper.calls_per_step == 2)
    restored = through_a_file(states[0], tmp_path / "state.pt")
    ends = []
    for each in (states[0], restored):
        x, now = latents, [each]
        if each.midway is not None:
            x, now = stepper.complete(x, evaluate(stepper, x, now), now, [9])
        ends.append(cross(stepper, x, now, [Action(3)], [10])[0])
    assert torch.equal(*ends)


def through_a_file(state: SolverState, path: Path) -> SolverState:
    """The state, saved and loaded by what `torch.load` reads of strangers."""
    fields = {**vars(state), "midway": state.midway and tuple(state.midway)}
    torch.save(fields, path)
    loaded = torch.load(path, weights_only=True)
    return SolverState(**{**loaded, "midway": loaded["midway"] and Action(*loaded["midway"])})

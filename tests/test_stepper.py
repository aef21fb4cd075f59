"""Variable strides against the stock schedulers, closed forms and each other."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from mctd_diffusers.denoising.schedulers import TRAITS, check_scheduler
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError, ScheduleError, UnsupportedSchedulerError
from mctd_diffusers.search.environment import Action
from tests.schedulers import (
    ETAS,
    FIRST_OF_CLASS,
    SCHEDULERS,
    cross,
    evaluate,
    first_noise,
    make_scheduler,
    network,
    noise,
    set_points,
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
FAMILIES = ["ddim", "ddpm", "euler", "euler-karras", "euler-a", "dpm++", "sde-dpm++"]
DRAWING = {"ddpm", "euler-a", "sde-dpm++"}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


# Against the stock schedulers


@pytest.mark.parametrize("num_steps", [8, 16])  # below 15 steps, and from there on, solvers differ
@pytest.mark.parametrize("name", SCHEDULERS)
def test_stride_one_is_the_stock_loop_bit_for_bit(name: str, num_steps: int) -> None:
    eta = ETAS.get(name, 0.0)
    stepper = Stepper(make_scheduler(name, num_steps), eta=eta)
    assert stepper.num_steps == num_steps
    stock = make_scheduler(name, num_steps)
    first = first_noise(stock, 1, *SHAPE)
    seeds = list(range(100, 100 + num_steps))
    ours = walk(stepper, first, [1] * num_steps, seeds)
    assert torch.equal(ours, stock_loop(stock, first, seeds, eta))


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stride_one_is_the_stock_loop_in_other_spacings(name: str, spacing: str) -> None:
    scheduler = make_scheduler(name, 12, timestep_spacing=spacing)
    first = noise(1, *SHAPE) * scheduler.init_noise_sigma
    seeds = list(range(12))
    ours = walk(Stepper(scheduler), first, [1] * 12, seeds)
    assert torch.equal(ours, stock_loop(scheduler, first, seeds))


@pytest.mark.parametrize("name", FIRST_OF_CLASS)
def test_stride_one_is_the_stock_loop_in_half_precision(name: str) -> None:
    scheduler = make_scheduler(name, 8)
    first = first_noise(scheduler, 1, *SHAPE).bfloat16()
    seeds = list(range(8))
    ours = walk(Stepper(scheduler), first, [1] * 8, seeds)
    theirs = stock_loop(scheduler, first, seeds)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_may_begin_in_the_middle(name: str) -> None:
    scheduler = make_scheduler(name, 10)
    stepper = Stepper(scheduler, begin_index=4, eta=ETAS.get(name, 0.0))
    assert stepper.num_steps == 6
    seeds = list(range(6))
    first = noise(1, *SHAPE)
    ours = walk(stepper, first, [1] * 6, seeds)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(4 * stepper.calls_per_step)
    stock = stock_loop(scheduler, first, seeds, ETAS.get(name, 0.0), begin=4)
    assert torch.equal(ours, stock)


NESTED = [
    name for name in SCHEDULERS
    if not any(part in name for part in ("karras", "exponential", "beta", "edm", "flow-", "cosine"))
    and name not in ("unclip", "ltx", "ipndm")
]  # fmt: skip


CUTS = [
    (8, 2),
    (8, 4),
    (8, 8),
    (40, 2),  # 20 steps: below 15, solvers lower their order at the end
    pytest.param(40, 4, marks=pytest.mark.slow),
    pytest.param(40, 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num_steps", "stride"), CUTS)
@pytest.mark.parametrize("name", NESTED)
def test_strides_equal_the_stock_scheduler_of_fewer_steps(
    name: str, num_steps: int, stride: int
) -> None:
    eta = ETAS.get(name, 0.0)
    fewer = num_steps // stride
    stock = make_scheduler(name, fewer)
    first = first_noise(stock, 1, *SHAPE)
    seeds = list(range(fewer))
    stepper = Stepper(make_scheduler(name, num_steps), eta=eta)
    points = stock.timesteps[:: stepper.calls_per_step]
    if name.startswith("cm"):
        torch.testing.assert_close(points, stepper.timesteps[::stride])
    else:
        assert points[:fewer].tolist() == stepper.timesteps[::stride].tolist()
    ours = walk(stepper, first, [stride] * fewer, seeds)
    check_equal(name, ours, stock_loop(stock, first, seeds, eta))


SETTABLE = [name for name in SCHEDULERS if not name.startswith(("ddim", "cogvideox"))]


@pytest.mark.parametrize(("num_steps", "stride"), CUTS)
@pytest.mark.parametrize("name", [name for name in SETTABLE if name not in NESTED])
def test_strides_equal_the_stock_scheduler_set_to_the_same_points(
    name: str, num_steps: int, stride: int
) -> None:
    if name == "unclip" and num_steps == stride:
        pytest.skip("the stock scheduler cannot be set to one step")
    full = make_scheduler(name, num_steps)
    points = list(range(0, num_steps, stride))
    stock = make_scheduler(name)
    set_points(stock, full, points)
    first, seeds = first_noise(full, 1, *SHAPE), list(range(len(points)))
    ours = walk(Stepper(full), first, [stride] * len(points), seeds)
    check_equal(name, ours, stock_loop(stock, first, seeds))


def check_equal(name: str, ours: Tensor, stock: Tensor) -> None:
    if name.startswith("kdpm2"):  # logarithms of one number and of many differ in their last bits
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ours, stock)


MIXED = (3, 1, 4, 1, 2, 1)


@pytest.mark.parametrize("name", ["ddpm", "ddpm-large", "euler", "dpm++", "dpm++-min", "sde-dpm++"])
def test_mixed_strides_equal_the_stock_scheduler_given_those_timesteps(name: str) -> None:
    stepper = Stepper(make_scheduler(name, 12))
    points = [sum(MIXED[:i]) for i in range(len(MIXED))]
    stock = make_scheduler(name)
    stock.set_timesteps(timesteps=stepper.timesteps[points].tolist())
    first = noise(1, *SHAPE) * stepper.init_noise_sigma
    seeds = list(range(len(MIXED)))
    assert torch.equal(walk(stepper, first, MIXED, seeds), stock_loop(stock, first, seeds))


UNEVEN = {
    "ipndm": "its coefficients hold at equal spacing, so ours starts anew where the stride changes",
    "dpm++-3": "whether a step is the last but one depends on the strides to come",
    "deis-3": "whether a step is the last but one depends on the strides to come",
    "unipc-3": "whether a step is the last but one depends on the strides to come",
}


@pytest.mark.parametrize("name", [name for name in SETTABLE if name not in UNEVEN])
def test_mixed_strides_equal_the_stock_scheduler_set_to_those_points(name: str) -> None:
    full = make_scheduler(name, 12)
    points = [sum(MIXED[:i]) for i in range(len(MIXED))]
    stock = make_scheduler(name)
    set_points(stock, full, points)
    first, seeds = first_noise(full, 1, *SHAPE), list(range(len(MIXED)))
    ours = walk(Stepper(full, eta=ETAS.get(name, 0.0)), first, MIXED, seeds)
    check_equal(name, ours, stock_loop(stock, first, seeds, ETAS.get(name, 0.0)))


def test_mixed_strides_on_karras_sigmas_equal_the_stock_scheduler_given_those_sigmas() -> None:
    stepper = Stepper(make_scheduler("euler-karras", 12))
    points = [sum(MIXED[:i]) for i in range(len(MIXED) + 1)]
    stock = make_scheduler("euler")
    stock.set_timesteps(sigmas=make_scheduler("euler-karras", 12).sigmas[points].tolist())
    first = noise(1, *SHAPE) * stepper.init_noise_sigma
    seeds = list(range(len(MIXED)))
    ours = walk(stepper, first, MIXED, seeds)
    torch.testing.assert_close(ours, stock_loop(stock, first, seeds), rtol=1e-5, atol=1e-5)


# Against kernels of our own, for points and shares of noise that no stock scheduler can be set to


def ddim_step(x: Tensor, eps: Tensor, a: Tensor, a_next: Tensor, eta: float, z: Tensor) -> Tensor:
    """Song et al., 2021, equation 12, on cumulative alphas."""
    std = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    return a_next.sqrt() * x0 + (1 - a_next - std**2).sqrt() * eps + std * z


def ancestral_step(
    x: Tensor, eps: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, z: Tensor
) -> Tensor:
    """Karras et al., 2022, with the ancestral split."""
    up = eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).sqrt()
    down = (sigma_next**2 - up**2).sqrt()
    return x + eps * (down - sigma) + up * z


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_mixed_strides_equal_the_ddim_kernel(name: str, eta: float) -> None:
    scheduler = make_scheduler(name, 10)
    alphas = torch.cat([scheduler.alphas_cumprod.double()[scheduler.timesteps], torch.ones(1)])
    stepper = Stepper(scheduler)
    first = noise(1, *SHAPE)
    ours = walk(stepper, first, [4, 1, 3, 2], [5, 6, 7, 8], eta)
    x, at = first.double(), 0
    for stride, seed in zip([4, 1, 3, 2], [5, 6, 7, 8], strict=True):
        eps = network(x.float(), stepper.timesteps[[at]]).double()
        z = noise(1, *SHAPE, seed=seed).double()
        x, at = ddim_step(x, eps, alphas[at], alphas[at + stride], eta, z), at + stride
    torch.testing.assert_close(ours, x.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["euler", "euler-karras", "euler-a", "dpm++-1"])
def test_mixed_strides_equal_the_ancestral_kernel(name: str, eta: float) -> None:
    scheduler = make_scheduler(name, 10)
    sigmas = scheduler.sigmas.double()
    stepper = Stepper(scheduler)
    first = noise(1, *SHAPE) * stepper.init_noise_sigma
    ours = walk(stepper, first, [4, 1, 3, 2], [5, 6, 7, 8], eta)
    # The kernel works on exploding variance: x0 + sigma eps. DPM-Solver's samples are scaled.
    scale = (1 + sigmas**2).sqrt()
    x, at = first.double() * (scale[0] if name == "dpm++-1" else 1), 0
    for stride, seed in zip([4, 1, 3, 2], [5, 6, 7, 8], strict=True):
        eps = network((x / scale[at]).float(), stepper.timesteps[[at]]).double()
        z = noise(1, *SHAPE, seed=seed).double()
        x, at = ancestral_step(x, eps, sigmas[at], sigmas[at + stride], eta, z), at + stride
    torch.testing.assert_close(ours, x.float(), rtol=1e-4, atol=1e-4)


# The share of noise


def test_the_ancestral_split_of_euler_is_euler_ancestral_bit_for_bit() -> None:
    euler, ancestral = (Stepper(make_scheduler(name, 12)) for name in ("euler", "euler-a"))
    first = noise(1, *SHAPE) * euler.init_noise_sigma
    seeds = list(range(len(MIXED)))
    expected = walk(ancestral, first, MIXED, seeds)
    assert torch.equal(walk(euler, first, MIXED, seeds, eta=1.0), expected)
    assert torch.equal(walk(ancestral, first, MIXED, seeds, eta=1.0), expected)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_ancestral_split_of_dpm_solver_is_its_sde_solver(order: int, solver_type: str) -> None:
    ode, sde = (
        Stepper(make_scheduler(name, 12, solver_order=order, solver_type=solver_type))
        for name in ("dpm++", "sde-dpm++")
    )
    first, seeds = noise(1, *SHAPE), list(range(len(MIXED)))
    ours = walk(ode, first, MIXED, seeds, eta=1.0)
    torch.testing.assert_close(ours, walk(sde, first, MIXED, seeds), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("drawing", "plain"), [("euler-a", "euler"), ("sde-dpm++", "dpm++"), ("ddpm", "ddim")]
)
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_below_a_full_share_a_drawing_scheduler_is_its_companion(
    drawing: str, plain: str, eta: float
) -> None:
    steppers = [Stepper(make_scheduler(name, 10)) for name in (drawing, plain)]
    first = noise(1, *SHAPE) * steppers[0].init_noise_sigma
    ours, expected = (walk(s, first, [2, 4, 1, 3], [1, 2, 3, 4], eta=eta) for s in steppers)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++"])
def test_no_share_of_noise_is_the_stock_step_of_a_deterministic_scheduler(name: str) -> None:
    stepper = Stepper(make_scheduler(name, 12))
    first = noise(1, *SHAPE) * stepper.init_noise_sigma
    seeds = list(range(len(MIXED)))
    assert torch.equal(walk(stepper, first, MIXED, seeds, 0.0), walk(stepper, first, MIXED, seeds))


@pytest.mark.parametrize("eta", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_siblings_differ_exactly_where_an_edge_is_stochastic(name: str, eta: float | None) -> None:
    stepper = Stepper(make_scheduler(name, 4))
    latents = noise(1, *SHAPE).repeat(2, 1, 1, 1)
    for step_index in range(4):
        states = [stepper.initial_state(step_index)] * 2
        for stride in range(1, 4 - step_index + 1):
            action = Action(stride, eta)
            outputs = evaluate(stepper, latents, states)
            (one, other), _ = stepper.step(latents, outputs, states, [action] * 2, [1, 2])
            assert torch.equal(one, other) != stepper.is_stochastic(step_index, action)
            expected = (name in DRAWING if eta is None else eta > 0) and step_index + stride < 4
            assert stepper.is_stochastic(step_index, action) == expected


# Batches


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SCHEDULERS),
        *(
            pytest.param(
                name, torch.bfloat16, marks=() if name in FIRST_OF_CLASS else pytest.mark.slow
            )
            for name in SCHEDULERS
            if name != "scm"  # draws in single precision and hands that back
        ),
    ],
)
def test_branches_stepped_in_any_order_and_company_equal_each_alone(
    name: str, dtype: torch.dtype
) -> None:
    stepper = Stepper(make_scheduler(name, 8), eta=ETAS.get(name, 0.0))
    dice = random.Random(name)
    paths = [[1] * 8, [2, 1, 4, 1], [4, 4], [1, 2, 1, 4], [2, 2, 2, 2], [8], [1, 1, 2, 4]]
    etas = [None, 1.0, None, 0.5, 1.0, None, 0.0]
    first = first_noise(make_scheduler(name, 8), len(paths), *SHAPE).to(dtype)
    alone = [
        walk(stepper, first[[i]], path, range(100 * i, 100 * i + len(path)), etas[i])
        for i, path in enumerate(paths)
    ]

    latents = list(first)
    states = [stepper.initial_state()] * len(paths)
    taken = [0] * len(paths)
    while unfinished := [i for i, path in enumerate(paths) if taken[i] < len(path)]:
        company = dice.sample(unfinished, dice.randint(1, len(unfinished)))
        batch = torch.stack([latents[i] for i in company])
        before = [states[i] for i in company]
        stepped, after = cross(
            stepper,
            batch,
            before,
            [Action(paths[i][taken[i]], etas[i]) for i in company],
            [100 * i + taken[i] for i in company],
        )
        for row, i in enumerate(company):
            latents[i], states[i] = stepped[row], after[row]
            taken[i] += 1
    for i, expected in enumerate(alone):
        assert torch.equal(latents[i], expected[0]), f"path {i}"


@pytest.mark.parametrize("name", FAMILIES)
def test_siblings_in_one_group_equal_each_alone(name: str) -> None:
    stepper = Stepper(make_scheduler(name, 8))
    parent = noise(1, *SHAPE) * stepper.init_noise_sigma
    state = [stepper.initial_state()]
    outputs = evaluate(stepper, parent, state)
    together, _ = stepper.step(
        parent.repeat(5, 1, 1, 1),
        outputs.repeat(5, 1, 1, 1),
        state * 5,
        [Action(2, 1.0)] * 5,
        range(5),
    )
    for seed in range(5):
        alone, _ = stepper.step(parent, outputs, state, [Action(2, 1.0)], [seed])
        assert torch.equal(together[seed], alone[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_stepping_leaves_the_scheduler_the_state_and_the_global_dice_alone(name: str) -> None:
    scheduler = make_scheduler(name, 8)
    before = {key: repr(value) for key, value in vars(scheduler).items()}
    dice = torch.get_rng_state()
    stepper = Stepper(scheduler)
    first = noise(1, *SHAPE) * stepper.init_noise_sigma
    kept = first.clone()
    walk(stepper, first, [1, 2, 4, 1], [1, 2, 3, 4])
    stepper.denoised(first, first, [3])
    scheduler.set_timesteps(3)
    scheduler.set_timesteps(8)
    walk(stepper, first, [1, 2, 4, 1], [1, 2, 3, 4], eta=1.0)
    assert torch.equal(first, kept)
    assert torch.equal(torch.get_rng_state(), dice)
    assert {key: repr(value) for key, value in vars(scheduler).items()} == before


# Scaling, denoised estimates, renoising


@pytest.mark.parametrize("name", SCHEDULERS)
def test_inputs_are_scaled_as_the_scheduler_scales_them(name: str) -> None:
    scheduler = make_scheduler(name, 6)
    stepper = Stepper(scheduler)
    latents, indices = noise(4, *SHAPE), [5, 0, 3, 0]
    scaled, timesteps = stepper.network_input(latents, [stepper.initial_state(i) for i in indices])
    for row, index in enumerate(indices):
        stock = make_scheduler(name, 6)
        timestep = stock.timesteps[index * stepper.calls_per_step]
        expected = latents[row]
        if hasattr(stock, "scale_model_input"):
            expected = stock.scale_model_input(latents[row], timestep)
        assert torch.equal(scaled[row], expected)
        assert timesteps[row] == timestep


def stock_estimate(scheduler: Any, output: Tensor, index: int, latents: Tensor) -> Tensor:
    """What the scheduler itself takes for the clean sample."""
    timestep = scheduler.timesteps[index]
    scheduler.scale_model_input(latents, timestep)
    if hasattr(scheduler, "convert_model_output"):
        scheduler._init_step_index(timestep)
        estimate: Tensor = scheduler.convert_model_output(output, sample=latents)
        return estimate
    generator = torch.Generator().manual_seed(0)
    known = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in known else {}
    estimate = scheduler.step(output, timestep, latents, **extra).pred_original_sample
    return estimate


SAYS_ITS_ESTIMATE = [
    name for name, (kind, settings) in SCHEDULERS.items()
    if TRAITS[f"{kind}Scheduler"].estimate in ("step", "convert")
    and not {"flow_prediction", "v_prediction"} & {settings.get("prediction_type")}
    and kind not in ("LCM", "SCM")
]  # fmt: skip


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAYS_ITS_ESTIMATE)
def test_denoised_estimates_are_the_schedulers_own(name: str, prediction: str) -> None:
    if prediction not in TRAITS[f"{SCHEDULERS[name][0]}Scheduler"].settings["prediction_type"]:
        pytest.skip("the stock step refuses it, and so do we")
    stepper = Stepper(make_scheduler(name, 6, prediction_type=prediction))
    latents, outputs, indices = noise(4, *SHAPE) * 3, noise(4, *SHAPE, seed=1), [5, 0, 3, 0]
    ours = stepper.denoised(latents, outputs, indices)
    for row, index in enumerate(indices):
        stock = make_scheduler(name, 6, prediction_type=prediction)
        place = stepper.calls_per_step * index
        expected = stock_estimate(stock, outputs[[row]], place, latents[[row]])
        assert torch.equal(ours[[row]], expected)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if "clip" not in name])
def test_the_estimate_of_a_noised_sample_is_the_clean_one(name: str) -> None:
    scheduler = make_scheduler(name, 6)
    stepper = Stepper(scheduler)
    x0, eps = noise(1, *SHAPE).clamp(-1, 1), noise(1, *SHAPE, seed=1)
    for step_index in (1, 4):
        x, _ = stepper.renoise(x0, step_index, eps)
        sigma = stepper.renoise(torch.zeros(1, 1), step_index, torch.ones(1, 1))[0]
        assert sigma.item() == pytest.approx(stepper.renoise_std(step_index))
        output = true_output(scheduler, x, x0, eps, sigma)
        estimate = stepper.denoised(x, output, [step_index])
        torch.testing.assert_close(estimate, x0, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++", "sde-dpm++"])
def test_denoised_estimates_are_thresholded_where_the_scheduler_does(name: str) -> None:
    settings = {"thresholding": True, "sample_max_value": 2.0}
    stepper = Stepper(make_scheduler(name, 6, **settings))
    latents, outputs = noise(2, *SHAPE) * 3, noise(2, *SHAPE, seed=1)
    stock = make_scheduler(name, 6, **settings)
    expected = stock_estimate(stock, outputs, 2, latents)
    assert torch.equal(stepper.denoised(latents, outputs, [2, 2]), expected)
    assert expected.abs().max() <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_three_predictions_say_the_same(name: str) -> None:
    x0, eps = noise(1, *SHAPE), noise(1, *SHAPE, seed=1)
    for step_index in (0, 3):
        plain = Stepper(make_scheduler(name, 6))
        x, _ = plain.renoise(x0, step_index, eps)
        torch.testing.assert_close(plain.denoised(x, eps, [step_index]), x0, rtol=1e-3, atol=2e-4)
        # v = alpha eps - sigma x0, with alpha and sigma of preserved variance.
        alpha = plain.renoise(torch.ones(1, 1), step_index, torch.zeros(1, 1))[0]
        sigma = plain.renoise(torch.zeros(1, 1), step_index, torch.ones(1, 1))[0]
        scale = (alpha**2 + sigma**2).sqrt()
        v = (alpha * eps - sigma * x0) / scale
        by_v = Stepper(make_scheduler(name, 6, prediction_type="v_prediction"))
        torch.testing.assert_close(by_v.denoised(x, v, [step_index]), x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_renoised_samples_have_the_deviation_of_their_level(name: str) -> None:
    scheduler = make_scheduler(name, 10)
    stepper = Stepper(scheduler)
    clean = torch.full((50_000, 1), 0.7)
    for step_index in (0, 4, 9):
        samples, states = stepper.renoise(clean, step_index, noise(50_000, 1, seed=step_index))
        if name.startswith("euler"):
            mean, deviation = 0.7, float(scheduler.sigmas[step_index])
        else:
            alpha_squared = float(scheduler.alphas_cumprod[scheduler.timesteps[step_index].long()])
            mean, deviation = 0.7 * alpha_squared**0.5, (1 - alpha_squared) ** 0.5
        # Five standard errors of 50,000 draws; Karras' timesteps are rounded, its sigmas are not.
        assert samples.std().item() == pytest.approx(deviation, rel=0.02)
        assert samples.mean().item() == pytest.approx(mean, abs=0.025 * deviation)
        assert states[0].step_index == step_index
        assert states[0].history == ()


def test_a_renoised_sample_forgets_what_the_solver_remembered() -> None:
    stepper = Stepper(make_scheduler("dpm++", 8))
    x0 = noise(1, *SHAPE)
    x, states = stepper.renoise(x0, 4, noise(1, *SHAPE, seed=1))
    ours, _ = stepper.step(x, evaluate(stepper, x, states), states, [Action(2)], [0])
    fresh = [stepper.initial_state(4)]
    expected, _ = stepper.step(x, evaluate(stepper, x, fresh), fresh, [Action(2)], [0])
    first_order = Stepper(make_scheduler("dpm++-1", 8))
    plain, _ = first_order.step(x, evaluate(stepper, x, fresh), fresh, [Action(2)], [0])
    assert torch.equal(ours, expected)
    assert torch.equal(ours, plain)


# Refusals


@pytest.mark.parametrize(
    "make",
    [
        diffusers.PNDMScheduler,
        diffusers.DDIMInverseScheduler,
        diffusers.DDPMWuerstchenScheduler,
    ],
)
def test_other_classes_are_refused_by_name(make: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedSchedulerError, match=r"DDIMScheduler.from_config") as error:
        check_scheduler(make())
    assert type(make()).__name__ in str(error.value)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("dpm++", "variance_type", "learned_range"),
        ("unipc", "thresholding", True),
        ("ddpm", "variance_type", "fixed_large_log"),
        ("euler-a", "prediction_type", "sample"),
    ],
)
def test_settings_that_are_not_proven_are_refused(name: str, setting: str, value: Any) -> None:
    with pytest.raises(UnsupportedSchedulerError, match=f"{setting}={value!r}"):
        check_scheduler(make_scheduler(name, **{setting: value}))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_supported_pass_before_and_after_their_schedule_is_set(name: str) -> None:
    check_scheduler(make_scheduler(name))
    check_scheduler(make_scheduler(name, 5))


def test_a_scheduler_without_a_schedule_is_refused() -> None:
    for name in FAMILIES:
        with pytest.raises(ScheduleError, match="set_timesteps"):
            Stepper(make_scheduler(name))


@pytest.mark.parametrize(("step_index", "stride"), [(0, 0), (0, 9), (6, 3), (8, 1), (-1, 1)])
def test_strides_beyond_the_schedule_are_refused(step_index: int, stride: int) -> None:
    stepper = Stepper(make_scheduler("ddim", 8))
    with pytest.raises(ScheduleError):
        stepper.check_action(step_index, Action(stride))
    state = SolverState(step_index, (), ())
    with pytest.raises(ScheduleError):
        stepper.step(noise(1, *SHAPE), noise(1, *SHAPE), [state], [Action(stride)], [0])


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_a_share_of_noise_outside_0_to_1_is_refused(eta: float) -> None:
    with pytest.raises(ConfigError, match="eta is"):
        Stepper(make_scheduler("ddim", 8), eta=eta)
    with pytest.raises(ConfigError, match="eta is"):
        Stepper(make_scheduler("ddim", 8)).check_action(0, Action(1, eta))


@pytest.mark.parametrize("begin_index", [-1, 8])
def test_a_beginning_outside_the_schedule_is_refused(begin_index: int) -> None:
    with pytest.raises(ScheduleError, match="begin_index"):
        Stepper(make_scheduler("ddim", 8), begin_index=begin_index)


@pytest.mark.parametrize("name", ["dpm++", "unipc", "euler"])
def test_of_a_finished_sample_a_solver_remembers_nothing(name: str) -> None:
    stepper = Stepper(make_scheduler(name, 4))
    latents, state = first_noise(make_scheduler(name, 4), 1, *SHAPE), stepper.initial_state()
    for index in range(4):
        assert len(state.history) >= (name != "euler" and index > 0)
        latents, (state,) = stepper.step(latents, latents / 2, [state], [Action(1)], [index])
    assert (state.step_index, state.visited, state.history) == (4, (), ())

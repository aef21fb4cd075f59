"""What a world says of samples before they jump: features, noise levels, and gain models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from torch import Tensor

from mctd_diffusers.denoising.denoiser import FeatureTap
from mctd_diffusers.denoising.gains import (
    TRUST,
    EstimateChange,
    HeadGains,
    MeasuredGains,
    ays_costs,
    change_costs,
    gits_costs,
    stride_parts,
    typical_gains,
)
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.search.environment import FIRST_DRAW, Action, Counts, Gains, Handles
from mctd_diffusers.search.stride_policies import parse_stride_policy
from tests.test_environment import SCALE, World, array

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STRIDES = (1, 2, 4, 8)


def evaluated(environment: Any, problems: Handles) -> Handles:
    handles = environment.reset(problems, np.full(len(problems), FIRST_DRAW, dtype=np.int64))
    environment.denoise(handles)
    return handles  # type: ignore[no-any-return]  # of a world that is typed loosely


def rms(one: Tensor, other: Tensor) -> float:
    return float((one - other).float().square().mean().sqrt())


# Noise levels


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_log_snr_is_that_of_the_models_training_levels(kind: Any) -> None:
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod.double()
    timesteps = scheduler.timesteps.double().numpy()
    expected = np.interp(timesteps, np.arange(1000), (alphas / (1 - alphas)).log().numpy())
    levels = Stepper(scheduler).log_snr
    assert levels.shape == (11,)
    np.testing.assert_allclose(levels[:-1], expected, rtol=1e-3)
    assert (levels.diff() > -1e-5).all()  # a schedule may end at the cleanest timestep itself
    assert levels[-1] == pytest.approx(float((alphas[0] / (1 - alphas[0])).log()))


def test_log_snr_of_levels_that_are_configured_is_read_without_a_warning() -> None:
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(10)
    levels = Stepper(scheduler).log_snr
    cleanest = 1 / scheduler.config.sigma_min**2
    assert levels[-1] == pytest.approx(np.log(cleanest))


# Features


def test_features_are_kept_with_the_samples_and_saved_with_them(unet: Any, vae: Any) -> None:
    world = World(unet, vae, features=FeatureTap(unet, rows_per_latent=2))
    environment = world.environment
    handles = evaluated(environment, array(0, 1, 2))
    features = environment.features(handles)
    shapes = {name: tuple(rows.shape) for name, rows in features.items()}
    assert shapes == {"down.0": (3, 64), "down.1": (3, 128), "mid": (3, 128), "estimate": (3, 12)}
    again = World(unet, vae).environment
    restored = again.restore(environment.export(handles[1:]))
    for name, rows in again.features(restored).items():
        assert torch.equal(rows, features[name][1:])


def test_the_estimate_is_told_of_by_its_channels_and_by_guidance(unet: Any, vae: Any) -> None:
    environment = World(unet, vae).environment
    handles = evaluated(environment, array(0))
    features = environment.features(handles)
    assert list(features) == ["estimate"]
    estimate = environment.denoised(handles)[0].flatten(1)
    (exported,) = environment.export(handles)
    scaled = (exported["conditional"] - exported["unconditional"]).flatten(1)
    expected = [estimate.mean(1), estimate.std(1, correction=0), scaled.std(1, correction=0)]
    torch.testing.assert_close(features["estimate"][0], torch.cat(expected))
    plain = World(unet, vae, scale=1.0).environment
    assert SCALE != 1.0
    assert plain.features(evaluated(plain, array(0)))["estimate"].shape == (1, 12)


def test_features_of_a_sample_that_is_not_evaluated_are_refused(unet: Any, vae: Any) -> None:
    environment = World(unet, vae).environment
    with pytest.raises(SearchError, match="not evaluated"):
        environment.features(environment.reset(array(0), array(FIRST_DRAW)))


# Gain models


def test_without_a_gain_model_predictions_are_refused(unet: Any, vae: Any) -> None:
    environment = World(unet, vae).environment
    with pytest.raises(ConfigError, match="ige="):
        environment.predict_gain(evaluated(environment, array(0)), STRIDES)


class Head:
    """Answers with what it was asked, so that the asking can be checked."""

    jump_log_snr = torch.tensor([-6.0, 0.0, 6.0])
    jump_cost = torch.tensor([[torch.nan, 1.0, 3.0], [torch.inf, torch.nan, 2.0], [0.0, 0.0, 0.0]])

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def predict(self, features: Any, source: Tensor, target: Tensor) -> Gains:
        self.sizes.append(len(source))
        seen = 0 if features is None else features["estimate"][:, :1]
        jump = (target - source[:, None]).double().numpy()
        return Gains(jump, jump, jump, jump * (1 + np.asarray(seen)))


def test_a_head_is_asked_by_noise_levels_in_calls_of_one_size(unet: Any, vae: Any) -> None:
    head = Head()
    world = World(unet, vae, gain_model=HeadGains(head, 4))
    environment = world.environment
    handles = evaluated(environment, array(0, 1, 2, 0, 1))
    late = environment.step(handles[:1], [Action(6)], array(1))
    environment.denoise(late)
    before = environment.ledger.total
    gains = environment.predict_gain(np.append(handles, late), STRIDES)
    assert environment.ledger.total == before
    assert head.sizes == [4, 4, 8]  # the last is the typical sample's, at every step
    levels = world.stepper.log_snr
    expected = [float(levels[k] - levels[0]) for k in STRIDES]
    np.testing.assert_allclose(gains.mean_gain[0], expected, rtol=1e-6)
    assert np.isnan(gains.mean_gain[5]).tolist() == [False, False, True, True]
    alone = environment.predict_gain(handles[2:3], STRIDES)
    assert np.array_equal(alone.log_truncation_error[0], gains.log_truncation_error[2])


def test_errors_of_a_head_are_anchored_at_its_table(unet: Any, vae: Any) -> None:
    """The table's error, times how the sample's differs beyond what all its jumps share."""
    world = World(unet, vae, gain_model=HeadGains(Head(), 4))
    environment = world.environment
    handles = evaluated(environment, array(0, 1))
    errors = environment.predict_gain(handles, STRIDES).log_truncation_error
    levels = world.stepper.log_snr.double().numpy()
    jumps = np.array([levels[k] - levels[0] for k in STRIDES])
    seen = environment.features(handles)["estimate"][:, :1].double().numpy()
    own = jumps * seen
    table = np.log(gits_costs(world.stepper, STRIDES, Head())[0])
    expected = table + TRUST * (own - own.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(errors, expected, rtol=1e-5)


def test_a_head_without_a_table_speaks_for_itself(unet: Any, vae: Any) -> None:
    head: Any = Head()
    head.jump_log_snr, head.jump_cost = torch.zeros(0), torch.zeros(0, 0)
    world = World(unet, vae, gain_model=HeadGains(head, 4))
    policy = parse_stride_policy("gits", target="truncation_error", plans=False)
    with pytest.raises(ConfigError, match="DDIMScheduler:0"):
        stride_parts(policy, STRIDES, world.stepper, head, 4)
    ige = parse_stride_policy("ige", target="truncation_error", plans=False)
    costs = stride_parts(ige, STRIDES, world.stepper, head, 4).costs
    levels = world.stepper.log_snr.double().numpy()
    assert costs is not None
    assert costs[0][:2] == pytest.approx(np.exp([levels[1] - levels[0], levels[2] - levels[0]]))
    assert costs[7][1:] == (np.inf,) * 3


def test_measured_errors_are_those_of_jumps_really_made(unet: Any, vae: Any) -> None:
    world = World(unet, vae, gain_model=MeasuredGains(siblings=3))
    environment = world.environment
    handles = evaluated(environment, array(0, 1))
    before = environment.ledger.spent(0)
    gains = environment.predict_gain(handles, STRIDES)
    assert environment.ledger.spent(0) == before  # no image pays for it
    assert environment.ledger.total.nfe > 2
    assert np.isneginf(gains.log_truncation_error[:, 0]).all()  # one fine step is itself
    jumped = environment.step(handles, [Action(4, 0.0)] * 2, array(0, 0))
    fine = handles
    for _ in range(4):
        environment.denoise(fine)
        fine = environment.step(fine, [Action(1, 0.0)] * 2, array(0, 0))
    for row in range(2):
        error = rms(environment.latents(jumped)[row], environment.latents(fine)[row])
        assert gains.log_truncation_error[row, 2] == pytest.approx(np.log(error), abs=1e-3)
    assert np.isfinite(gains.log_variance[:, :3]).all()
    assert environment.predict_gain(handles, STRIDES).mean_gain == pytest.approx(
        gains.mean_gain, rel=1e-4, abs=1e-6
    )


def test_measuring_charges_the_call_with_what_it_spends(unet: Any, vae: Any) -> None:
    environment = World(unet, vae, gain_model=MeasuredGains()).environment
    handles = evaluated(environment, array(0))
    before = environment.ledger.total
    environment.predict_gain(handles, (2, 8))
    spent = environment.ledger.total - before
    # Of 8 fine steps the first leaves the sample itself, which is evaluated; jumps are arithmetic.
    assert spent == Counts(nfe=7, rows=14, padded_rows=42, calls=7)


def test_measuring_on_a_solver_of_two_calls_makes_both(unet: Any, vae: Any) -> None:
    environment = World(unet, vae, "heun", gain_model=MeasuredGains()).environment
    handles = evaluated(environment, array(0))
    before = environment.ledger.total
    gains = environment.predict_gain(handles, (2, 8))
    spent = environment.ledger.total - before
    assert spent.nfe == 7 + 7 + 1  # of fine steps all but the last, and of the jump by two
    assert environment.ledger.spent(0).nfe == 1
    jumped = environment.step(handles, [Action(2, 0.0)], array(0))
    middle = environment.step(handles, [Action(1, 0.0)], array(0))
    environment.denoise(middle)
    fine = environment.step(middle, [Action(1, 0.0)], array(0))
    preserving = environment.stepper.variance_preserving(
        environment.latents(jumped) - environment.latents(fine), 2
    )
    error = rms(preserving, torch.zeros_like(preserving))
    assert gains.log_truncation_error[0, 0] == pytest.approx(np.log(error), abs=1e-3)


def test_the_rule_of_thumb_knows_nothing_of_jumps_from_noise_alone(unet: Any, vae: Any) -> None:
    world = World(unet, vae, "ddim-zero-snr", gain_model=EstimateChange())
    environment = world.environment
    assert world.stepper.log_snr[0] == -torch.inf
    costs = change_costs(world.stepper, STRIDES)
    assert np.isinf(costs[0]).all()
    assert (costs[1][:3] > 0).all()
    assert np.isfinite(costs[1][:3]).all()
    second = environment.step(evaluated(environment, array(0)), [Action(1)], array(0))
    environment.denoise(second)
    assert np.isnan(environment.predict_gain(second, (1, 4)).log_truncation_error).all()
    third = environment.step(second, [Action(1)], array(0))
    environment.denoise(third)
    assert np.isfinite(environment.predict_gain(third, (1, 4)).log_truncation_error).all()


def test_the_rule_of_thumb_follows_the_change_of_the_estimate(unet: Any, vae: Any) -> None:
    world = World(unet, vae, gain_model=EstimateChange())
    environment = world.environment
    first = evaluated(environment, array(0))
    assert np.isnan(environment.predict_gain(first, STRIDES).log_truncation_error).all()
    second = environment.step(first, [Action(2)], array(0))
    environment.denoise(second)
    levels = world.stepper.log_snr.double().numpy()
    moved = rms(environment.denoised(second), environment.denoised(first))
    rate = moved / (levels[2] - levels[0]) * 2
    errors = environment.predict_gain(second, (1, 4)).log_truncation_error[0]
    for stride, error in zip((1, 4), errors, strict=True):
        assert np.exp(error) == pytest.approx(
            held_still(rate, levels[2], levels[2 + stride]), rel=1e-3
        )
    again = World(unet, vae, gain_model=EstimateChange()).environment
    restored = again.restore(environment.export(second))
    assert again.estimate_change(restored) == environment.estimate_change(second)


def held_still(rate: float, source: float, target: float) -> float:
    """Latents after an exact ODE whose estimate moves at ``rate``, less those of one DDIM step.

    Integrated by many small DDIM steps, each with the estimate of its middle.
    """
    grid = np.linspace(source, target, 4001)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-grid))), np.sqrt(1 / (1 + np.exp(grid)))
    x = 0.0
    for i in range(4000):
        estimate = rate * ((grid[i] + grid[i + 1]) / 2 - source) / 2
        x = alpha[i + 1] * estimate + sigma[i + 1] * (x - alpha[i] * estimate) / sigma[i]
    return float(abs(x))  # a DDIM step from 0 with an estimate of 0 stays at 0


# Costs of the typical sample


def sd_stepper(num_steps: int) -> Stepper:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(num_steps)
    return Stepper(scheduler)


def test_costs_end_where_the_schedule_does() -> None:
    stepper = sd_stepper(8)
    for costs in (
        ays_costs(stepper, STRIDES),
        change_costs(stepper, STRIDES),
        gits_costs(stepper, STRIDES, Head()),
    ):
        assert costs.shape == (8, 4)
        fits = np.add.outer(np.arange(8), STRIDES) <= 8
        assert np.array_equal(np.isfinite(costs), fits)
        assert (costs[fits] >= 0).all()


def test_ten_steps_by_ays_are_about_the_published_ones() -> None:
    stepper = sd_stepper(100)
    costs = ays_costs(stepper, range(1, 101))
    way = np.sqrt(costs[0])  # from the first point to each other
    timesteps = stepper.timesteps.numpy()
    reached = [timesteps[1 + np.argmin(abs(way[:-1] - way[-1] * i / 10))] for i in range(1, 10)]
    assert reached == pytest.approx([850, 736, 645, 545, 455, 343, 233, 124, 24], abs=25)


def test_gits_costs_are_interpolated_in_the_heads_table() -> None:
    stepper = sd_stepper(8)
    levels = stepper.log_snr.double().numpy()
    costs = gits_costs(stepper, (1, 8), Head())
    # Between -6, 0 and 6 the table is linear in both levels.
    here = np.interp(levels[0], [-6, 0], [0, 1])
    there = min(levels[8], 6) / 6
    expected = (1 - here) * (1 + there * 2) + here * there * 2
    assert costs[0, 1] == pytest.approx(expected)


def test_the_typical_sample_is_asked_of_at_every_step() -> None:
    stepper = sd_stepper(8)
    gains = typical_gains(stepper, STRIDES, Head())
    assert gains.mean_gain.shape == (8, 4)
    assert np.isnan(gains.mean_gain[7]).tolist() == [False, True, True, True]

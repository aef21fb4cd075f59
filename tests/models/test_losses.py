"""The losses of the autoencoder and of the diffusion model, against hand-worked values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.models.losses import (
    AutoencoderWeights,
    add_noise,
    autoencoder_loss,
    diffusion_loss,
    drop_captions,
    gradient_error,
    kl_to_standard_normal,
    log_error,
    low_pass_error,
    min_snr_weights,
    psnr,
    squared_error,
    velocity,
)


def pictures(seed: int, batch: int = 3, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, side, side, generator=generator) * 2 - 1


# --- autoencoder ----------------------------------------------------------------------------------


def test_psnr_of_a_constant_offset_is_its_closed_form() -> None:
    images = torch.zeros(2, 3, 8, 8)
    offsets = torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)
    # Peak 2 over offset 0.2 is 20 dB.
    torch.testing.assert_close(psnr(images + offsets, images), torch.tensor([20.0, 40.0]))


def test_psnr_looks_at_the_clamped_picture_and_is_infinite_for_equals() -> None:
    images = torch.ones(1, 3, 8, 8)
    assert psnr(images * 3, images).item() == math.inf


def test_log_error_is_minus_the_psnr_up_to_scale_and_offset() -> None:
    images = pictures(0) * 0.5
    worse = images + 0.2 * torch.rand(3, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    expected = -psnr(worse, images).mean() * math.log(10) / 10 + math.log(4)
    torch.testing.assert_close(log_error(worse, images), expected, atol=1e-2, rtol=0)


def test_log_error_of_equals_is_that_of_rounding_to_bytes() -> None:
    images = pictures(0)
    assert log_error(images, images).item() == pytest.approx(math.log((1 / 255) ** 2 / 3))


def test_gradient_error_ignores_a_constant_and_low_pass_error_ignores_a_checkerboard() -> None:
    images = pictures(0)
    assert gradient_error(images + 0.3, images).item() == pytest.approx(0, abs=1e-6)
    assert low_pass_error(images + 0.3, images).item() == pytest.approx(0.3, abs=1e-6)
    board = (-1.0) ** (torch.arange(16).reshape(-1, 1) + torch.arange(16))
    assert low_pass_error(images + board, images).item() == pytest.approx(0, abs=1e-6)
    assert gradient_error(images + board, images).item() == pytest.approx(2, abs=1e-6)


def test_kl_is_that_of_the_normal_distributions() -> None:
    mean, logvar = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()),
        torch.distributions.Normal(0.0, 1.0),
    ).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar), expected)


def test_autoencoder_loss_is_the_weighted_sum_of_its_terms() -> None:
    made, images = pictures(0), pictures(1)
    mean, logvar = pictures(2, side=4), pictures(3, side=4)
    weights = AutoencoderWeights(gradient=2.0, low_pass=3.0, log_error=5.0, kl=7.0)
    loss, terms = autoencoder_loss(made, images, mean, logvar, weights)
    expected = (
        terms["l1"]
        + 2 * terms["gradient"]
        + 3 * terms["low_pass"]
        + 5 * terms["log_error"]
        + 7 * terms["kl"]
    )
    torch.testing.assert_close(loss, expected)


def test_a_frozen_encoder_has_no_kl_term() -> None:
    assert "kl" not in autoencoder_loss(pictures(0), pictures(1))[1]


# --- diffusion ------------------------------------------------------------------------------------


def test_noisy_latents_and_velocity_determine_latents_and_noise() -> None:
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    alphas = torch.tensor([0.999, 0.7, 0.2, 0.005])
    noisy, target = add_noise(latents, noise, alphas), velocity(latents, noise, alphas)
    column = alphas.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(column.sqrt() * noisy - (1 - column).sqrt() * target, latents)
    torch.testing.assert_close((1 - column).sqrt() * noisy + column.sqrt() * target, noise)


def test_targets_equal_those_of_the_scheduler() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([3, 500, 999])
    alphas = scheduler.alphas_cumprod[timesteps]
    torch.testing.assert_close(
        add_noise(latents, noise, alphas), scheduler.add_noise(latents, noise, timesteps)
    )
    torch.testing.assert_close(
        velocity(latents, noise, alphas), scheduler.get_velocity(latents, noise, timesteps)
    )


@given(st.floats(0.001, 0.999), st.floats(0.5, 20))
def test_min_snr_weight_turns_the_v_error_into_a_bounded_error_of_the_latents(
    alpha: float, gamma: float
) -> None:
    # With the noisy latents given, error of latents = (1 - alpha) x error of v.
    weight = min_snr_weights(torch.tensor([alpha]), gamma).item()
    snr = alpha / (1 - alpha)
    assert weight == pytest.approx(min(snr, gamma) * (1 - alpha), rel=1e-4)


def test_weights_of_the_diffusion_loss_matter_by_proportion_only() -> None:
    prediction, target = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss = diffusion_loss(prediction, target, weights)
    torch.testing.assert_close(loss, diffusion_loss(prediction, target, weights * 9))
    errors = squared_error(prediction, target)
    torch.testing.assert_close(loss, (errors * weights).sum() / weights.sum())
    torch.testing.assert_close(diffusion_loss(prediction, target), errors.mean())


def test_dropped_captions_become_the_empty_one() -> None:
    ids = torch.arange(6).reshape(3, 2)
    empty = torch.tensor([8, 9])
    dropped = drop_captions(ids, empty, torch.tensor([False, True, False]))
    assert dropped.tolist() == [[0, 1], [8, 9], [4, 5]]

"""Brightness, colourfulness, JPEG size and their weighted sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError, NonFiniteRewardError, RewardError
from mctd_diffusers.rewards.brightness import brightness
from mctd_diffusers.rewards.calls import call_reward
from mctd_diffusers.rewards.colourfulness import colourfulness
from mctd_diffusers.rewards.jpeg import JpegCompressibility
from mctd_diffusers.rewards.weighted_sum import WeightedPart, WeightedSum

SUM = WeightedSum(
    (
        WeightedPart(brightness, 1.0, 0.5, 0.2),
        WeightedPart(JpegCompressibility(), 0.5, -1.0, 0.3),
        WeightedPart(colourfulness, -0.25, 30.0, 20.0),
    )
)
REWARDS = [brightness, colourfulness, JpegCompressibility(), SUM]


def noise(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def scored(reward: Callable[..., Any], images: torch.Tensor) -> np.ndarray:
    return call_reward(reward, images, ["a cat"] * len(images), range(len(images)))


@pytest.mark.parametrize("reward", REWARDS)
@settings(max_examples=15)  # each draws a dozen JPEG files
@given(order=st.permutations(range(5)), number=st.integers(1, 5))
def test_a_reward_depends_on_its_own_picture_alone(
    reward: Callable[..., Any], order: list[int], number: int
) -> None:
    rows = order[:number]
    np.testing.assert_allclose(
        scored(reward, noise(5)[rows]), scored(reward, noise(5))[rows], rtol=1e-12
    )


def test_brightness_runs_from_black_to_white() -> None:
    levels = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    np.testing.assert_allclose(scored(brightness, levels), [0, 0.25, 1])


def test_colourfulness_is_zero_for_grey_and_known_for_two_colours() -> None:
    picture = torch.zeros(1, 3, 1, 2)
    picture[0, 0, 0, 0] = 1  # a red pixel beside a black one
    # Spreads are 127.5 and 63.75, means the same: sqrt(127.5^2 + 63.75^2) (1 + 0.3).
    np.testing.assert_allclose(scored(colourfulness, picture), [1.3 * np.hypot(127.5, 63.75)])
    np.testing.assert_allclose(scored(colourfulness, torch.full((1, 3, 4, 4), 0.3)), [0], atol=1e-9)


def test_a_blank_picture_compresses_best() -> None:
    blank, busy = scored(JpegCompressibility(), torch.cat([torch.ones(1, 3, 16, 16), noise(1)]))
    assert 0 > blank > busy


def test_a_jpeg_quality_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="quality=0"):
        JpegCompressibility(quality=0)


def test_a_fitted_sum_is_standard_on_its_examples() -> None:
    images = noise(20)
    fitted = WeightedSum.fit(
        [brightness, JpegCompressibility()], [1.0, 2.0], images=images, prompts=["a"] * 20
    )
    for part in fitted.parts:
        alone = WeightedSum((WeightedPart(part.reward, 1.0, part.mean, part.std),))
        values = scored(alone, images)
        np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=1e-9)


def test_the_scale_of_a_sum_stays_where_it_was_fitted() -> None:
    fitted = WeightedSum.fit([brightness], [1.0], images=noise(20), prompts=["a"] * 20)
    white = torch.ones(1, 3, 16, 16)
    alone = scored(fitted, white)
    np.testing.assert_allclose(scored(fitted, torch.cat([white, noise(3)]))[:1], alone)


def test_a_constant_part_cannot_be_fitted() -> None:
    with pytest.raises(ConfigError, match=r"std=0.0 of reward 'brightness' must be above 0"):
        WeightedSum.fit([brightness], [1.0], images=torch.ones(3, 3, 4, 4), prompts=["a"] * 3)


def test_wrong_sums_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        WeightedSum(())
    with pytest.raises(ConfigError, match="2 rewards and 1 weights"):
        WeightedSum.fit([brightness, brightness], [1.0], images=noise(2), prompts=["a"] * 2)
    with pytest.raises(ConfigError, match="weight=inf"):
        WeightedPart(brightness, float("inf"), 0.0, 1.0)


def test_errors_of_a_part_come_through() -> None:
    def sick(images: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        return [float("nan"), *[0.0] * (len(images) - 1)]

    def short(images: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        return []

    with pytest.raises(NonFiniteRewardError) as caught:
        call_reward(WeightedSum((WeightedPart(sick, 1.0, 0.0, 1.0),)), noise(2), ["a"] * 2, [7, 8])
    assert caught.value.handles == (7,)
    with pytest.raises(RewardError, match=r"WeightedSum.*'short' answered"):
        call_reward(WeightedSum((WeightedPart(short, 1.0, 0.0, 1.0),)), noise(2), ["a"] * 2, [7, 8])

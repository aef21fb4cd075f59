"""One place calls a stranger's reward; every wrong answer is an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mctd_diffusers.errors import NonFiniteRewardError, RewardError
from mctd_diffusers.rewards.brightness import brightness
from mctd_diffusers.rewards.calls import call_reward, raw_rewards, reward_name, to_pil

IMAGES = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 3, 4, 4)
PROMPTS = ["a", "b", "c"]
HANDLES = [10, 20, 30]


def answering(answer: Any) -> Callable[..., Any]:
    """A reward that always gives this answer."""

    def fixed(images: Any, prompts: Sequence[str]) -> Any:
        return answer

    return fixed


RIGHT_FORMS = [
    torch.tensor([0.0, 1.0, 2.0]),
    torch.tensor([0.0, 1.0, 2.0], dtype=torch.bfloat16),
    torch.tensor([0, 1, 2]),
    np.array([0, 1, 2], dtype=np.float16),
    [0, 1.0, np.float32(2)],
    (0.0, torch.tensor(1.0), np.array(2.0)),
]


@pytest.mark.parametrize("answer", RIGHT_FORMS)
def test_every_usual_form_of_three_numbers_is_taken(answer: Any) -> None:
    rewards = call_reward(answering(answer), IMAGES, PROMPTS, HANDLES)
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [0, 1, 2]


WRONG_FORMS = [
    (torch.zeros(2), r"shape \(2,\) for 3 images.*one score for each"),
    (torch.zeros(3, 1), r"shape \(3, 1\).*squeeze"),
    (torch.tensor(1.0), r"shape \(\)"),
    ([1.0, 2.0], r"shape \(2,\)"),
    (None, "a NoneType"),
    (1.0, "a float"),
    ("good", "a str"),
    (["good", 1.0, 2.0], "holding a str"),
    ([torch.zeros(2)] * 3, "holding a Tensor"),
    (torch.zeros(3, dtype=torch.complex64), "complex64"),
    (np.array(["a", "b", "c"]), "real numbers"),
    (torch.zeros(3, requires_grad=True), r"carries gradients.*detach\(\)"),
    ([torch.zeros((), requires_grad=True)] * 3, "carries gradients"),
]


@pytest.mark.parametrize(("answer", "message"), WRONG_FORMS)
def test_a_wrong_form_is_named_with_its_cure(answer: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        call_reward(answering(answer), IMAGES, PROMPTS, HANDLES)
    assert caught.value.handles == (10, 20, 30)
    assert "expected 3 numbers" in str(caught.value)


def test_a_reward_that_raises_is_chained() -> None:
    def broken(images: Any, prompts: Sequence[str]) -> list[float]:
        raise KeyError("no such prompt")

    with pytest.raises(RewardError, match=r"'broken' raised KeyError") as caught:
        call_reward(broken, IMAGES, PROMPTS, HANDLES)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_that_raises_at_length_is_quoted_by_its_first_line() -> None:
    def verbose(images: Any, prompts: Sequence[str]) -> list[float]:
        raise RuntimeError("\nshapes differ\n  here: 3\n  there: 4")

    with pytest.raises(RewardError, match=r"raised RuntimeError: shapes differ \(on 3") as caught:
        call_reward(verbose, IMAGES, PROMPTS, HANDLES)
    assert "\n" not in str(caught.value)

    def silent(images: Any, prompts: Sequence[str]) -> list[float]:
        raise RuntimeError

    with pytest.raises(RewardError, match=r"raised RuntimeError \(on 3"):
        call_reward(silent, IMAGES, PROMPTS, HANDLES)


def test_an_interrupt_inside_a_reward_is_not_swallowed() -> None:
    def interrupted(images: Any, prompts: Sequence[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_reward(interrupted, IMAGES, PROMPTS, HANDLES)


@given(bad=st.sets(st.integers(0, 2), min_size=1), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_non_finite_rewards_name_exactly_their_handles(bad: set[int], value: float) -> None:
    answer = [value if row in bad else 1.0 for row in range(3)]
    with pytest.raises(NonFiniteRewardError) as caught:
        call_reward(answering(answer), IMAGES, PROMPTS, HANDLES)
    assert caught.value.handles == tuple(HANDLES[row] for row in sorted(bad))
    assert "never" not in str(caught.value)
    assert "finite number" in str(caught.value)


def test_raw_rewards_let_non_finite_numbers_through() -> None:
    rewards = raw_rewards(answering([np.nan, 1.0, 2.0]), IMAGES, PROMPTS)
    assert np.isnan(rewards[0])


def test_each_image_needs_a_prompt() -> None:
    with pytest.raises(RewardError, match="3 images and 2 prompts"):
        call_reward(brightness, IMAGES, PROMPTS[:2], HANDLES)


def test_a_reward_that_wants_pil_gets_pil() -> None:
    class SeesPil:
        wants_pil = True

        def __call__(self, images: Any, prompts: Sequence[str]) -> list[float]:
            assert all(isinstance(image, Image.Image) for image in images)
            return [image.getpixel((0, 0))[0] for image in images]

    assert call_reward(SeesPil(), IMAGES, PROMPTS, HANDLES).tolist() == [0, 128, 255]
    assert reward_name(SeesPil()) == "SeesPil"


def test_pil_pictures_round_and_clip() -> None:
    pixels = torch.tensor([-0.1, 0.5 / 255, 0.51 / 255, 1.2]).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    assert [picture.getpixel((0, 0))[0] for picture in to_pil(pixels)] == [0, 0, 1, 255]

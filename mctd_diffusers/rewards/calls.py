"""Calling a reward that somebody else wrote, and checking what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.errors import NonFiniteRewardError, RewardError


def reward_name(reward: object) -> str:
    """Return what errors and logs call a reward: its ``__name__``, else the name of its class."""
    name = getattr(reward, "__name__", None)
    return name if isinstance(name, str) else type(reward).__name__


def to_pil(images: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Convert pictures in [0, 1] to PIL, rounding to 8 bits; values outside are clipped."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def call_reward(
    reward: RewardFn,
    images: Float[Tensor, "batch 3 height width"],
    prompts: Sequence[str],
    handles: Sequence[int],
) -> Float[np.ndarray, " batch"]:
    """Call ``reward`` once on the whole batch and check every number of its answer.

    Args:
        reward: gets ``images`` as they are, or as PIL pictures where its ``wants_pil`` is true.
        images: finished samples in [0, 1].
        prompts: one for each picture.
        handles: the environment's ids of the samples, for the errors; one for each picture.

    Returns:
        The rewards in float64, finite.

    Raises:
        RewardError: the reward raised (chained), or answered with the wrong length, shape or type,
            or with a tensor that carries gradients.
        NonFiniteRewardError: a reward is NaN or infinite; carries the handles of those samples.
    """
    handles = [int(handle) for handle in handles]
    rewards = raw_rewards(reward, images, prompts, handles)
    wrong = np.flatnonzero(~np.isfinite(rewards))
    if wrong.size:
        blamed = [handles[row] for row in wrong]
        raise NonFiniteRewardError(
            f"reward '{reward_name(reward)}' gave {rewards[wrong[0]]} for handle {blamed[0]} "
            f"(prompt {prompts[wrong[0]]!r}); {wrong.size} of {rewards.size} rewards are not "
            f"finite, handles {blamed}: return a finite number for every picture, a low one for a "
            "bad picture",
            handles=blamed,
        )
    return rewards


def raw_rewards(
    reward: RewardFn,
    images: Float[Tensor, "batch 3 height width"],
    prompts: Sequence[str],
    handles: Sequence[int] = (),
) -> Float[np.ndarray, " batch"]:
    """Call ``reward`` and check the form of its answer, but not whether its numbers are finite.

    For rewards made of rewards: a NaN of a part travels through the sum to `call_reward`, which
    knows the handles. Arguments, returns and errors otherwise as there.
    """
    name = reward_name(reward)
    if len(prompts) != len(images):
        raise RewardError(
            f"reward '{name}' was to be called with {len(images)} images and {len(prompts)} "
            "prompts: pass one prompt for each image",
            handles=handles,
        )
    argument: Any = to_pil(images) if getattr(reward, "wants_pil", False) else images
    try:
        answer = reward(argument, list(prompts))
    except (
        Exception
    ) as error:  # whatever a stranger's code raises becomes one error that we document
        raise RewardError(
            f"reward '{name}' raised {_in_one_line(error)} (on {len(images)} images of shape "
            f"{tuple(images.shape[1:])}): call it by itself on such a batch to see the cause",
            handles=handles,
        ) from error
    try:
        return _to_array(answer, len(images))
    except _WrongFormError as error:
        raise RewardError(
            f"reward '{name}' answered with {error} for {len(images)} images, expected "
            f"{len(images)} numbers: {error.cure}",
            handles=handles,
        ) from None


def _in_one_line(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


class _WrongFormError(Exception):
    """What an answer is, and the cure; `raw_rewards` adds who answered and to what."""

    def __init__(self, found: str, cure: str) -> None:
        super().__init__(found)
        self.cure = cure


def _to_array(answer: Any, batch: int) -> Float[np.ndarray, " batch"]:
    """Return the answer of a reward as float64 ``[batch]``.

    Raises:
        _WrongFormError: it is not that many real numbers.
    """
    parts = [answer] if isinstance(answer, Tensor) else answer
    if isinstance(parts, list | tuple) and any(
        isinstance(part, Tensor) and part.requires_grad for part in parts
    ):
        raise _WrongFormError(
            "a tensor that carries gradients",
            "return `rewards.detach()`, or decorate the reward with `@torch.no_grad()`",
        )
    if isinstance(answer, Tensor):
        values = (answer if answer.is_complex() else answer.double()).cpu().numpy()
    elif isinstance(answer, np.ndarray):
        values = answer
    elif isinstance(answer, list | tuple):
        if not all(_is_number(part) for part in answer):
            strange = next(type(part).__name__ for part in answer if not _is_number(part))
            raise _WrongFormError(
                f"a {type(answer).__name__} holding a {strange}", "return plain floats"
            )
        values = np.array([float(part) for part in answer], dtype=np.float64)
    else:
        raise _WrongFormError(
            f"a {type(answer).__name__}", "return a tensor, an array or a list of floats"
        )
    if values.dtype.kind not in "fiub":
        raise _WrongFormError(f"an array of {values.dtype}", "return real numbers")
    if values.shape != (batch,):
        is_column = values.shape == (batch, 1)
        cure = "squeeze the last axis" if is_column else "return one score for each, in their order"
        raise _WrongFormError(f"shape {tuple(values.shape)}", cure)
    return values.astype(np.float64)


def _is_number(part: Any) -> bool:
    """Say whether one element of a list counts as one number: a real, or a 0-d tensor or array."""
    if isinstance(part, Tensor):
        return part.ndim == 0 and not part.is_complex()
    if isinstance(part, np.ndarray):
        return part.ndim == 0 and part.dtype.kind in "fiub"
    return isinstance(part, Real)

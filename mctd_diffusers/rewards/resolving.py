"""From what a user writes for a reward to a reward."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.rewards.brightness import brightness
from mctd_diffusers.rewards.clip import ClipReward
from mctd_diffusers.rewards.colourfulness import colourfulness
from mctd_diffusers.rewards.jpeg import JpegCompressibility

EMBEDDED_REWARD = Path(__file__).parent.parent / "embedded" / "reward_model"
"""Folder of the reward that ships in the box."""

_NAMED_REWARDS: dict[str, Callable[[], RewardFn]] = {
    "brightness": lambda: brightness,
    "clip": lambda: ClipReward.from_pretrained("openai/clip-vit-large-patch14"),
    "colourfulness": lambda: colourfulness,
    "embedded": lambda: ClipReward.from_pretrained(EMBEDDED_REWARD),
    "jpeg": JpegCompressibility,
    "pickscore": lambda: ClipReward.from_pretrained(
        "yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    ),
}
REWARD_NAMES: tuple[str, ...] = tuple(sorted(_NAMED_REWARDS))
"""The short names: "embedded" is the reward in the box, "clip" OpenAI's CLIP-L, "pickscore"
PickScore."""


def resolve_reward(spec: object) -> RewardFn:
    """Turn what a user wrote into a reward.

    Args:
        spec: a callable ``(images, prompts) -> floats``, taken as it is; one of `REWARD_NAMES`; or
            the folder or repository (``owner/name``) of a `CLIPModel`.

    Returns:
        The reward.

    Raises:
        ConfigError: an unknown name (the nearest one is suggested), a folder or repository that
            holds no `CLIPModel`, a class in place of an instance, a bare model, or something that
            cannot be called.
    """
    if isinstance(spec, str | Path):
        return _resolve_text(spec)
    if isinstance(spec, type):
        raise ConfigError(
            f"reward_model={spec.__name__} is a class: pass an instance, {spec.__name__}(...)"
        )
    if hasattr(spec, "get_image_features"):
        raise ConfigError(
            f"reward_model is a bare {type(spec).__name__}, which takes no prompts: wrap it with "
            "its tokenizer, ClipReward(model, tokenizer, preprocessing), or pass the folder it "
            "came from"
        )
    if not callable(spec):
        raise ConfigError(
            f"reward_model={spec!r} is a {type(spec).__name__}: pass a callable (images, prompts) "
            f"-> floats, a CLIPModel folder or repository, or one of {', '.join(REWARD_NAMES)}"
        )
    return cast("RewardFn", spec)


def _resolve_text(spec: str | Path) -> RewardFn:
    """Resolve a short name, a folder or a repository."""
    if isinstance(spec, str) and spec in _NAMED_REWARDS:
        return _NAMED_REWARDS[spec]()
    if (str(spec) and Path(spec).is_dir()) or (isinstance(spec, str) and spec.count("/") == 1):
        return ClipReward.from_pretrained(spec)
    nearest = difflib.get_close_matches(str(spec).lower(), REWARD_NAMES, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'? " if nearest else ""
    raise ConfigError(
        f"unknown reward '{spec}': {hint}names are {', '.join(REWARD_NAMES)}; otherwise pass an "
        "existing folder or a repository (owner/name) of a CLIPModel, or a callable (images, "
        "prompts) -> floats"
    )

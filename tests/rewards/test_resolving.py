"""From what a user writes to a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.rewards.brightness import brightness
from mctd_diffusers.rewards.clip import ClipReward
from mctd_diffusers.rewards.colourfulness import colourfulness
from mctd_diffusers.rewards.jpeg import JpegCompressibility
from mctd_diffusers.rewards.resolving import EMBEDDED_REWARD, REWARD_NAMES, resolve_reward


def test_a_callable_is_taken_as_it_is() -> None:
    assert resolve_reward(brightness) is brightness
    jpeg = JpegCompressibility(quality=50)
    assert resolve_reward(jpeg) is jpeg


def test_short_names_of_arithmetic_rewards() -> None:
    assert resolve_reward("brightness") is brightness
    assert resolve_reward("colourfulness") is colourfulness
    assert resolve_reward("jpeg") == JpegCompressibility()
    assert {"clip", "pickscore", "embedded"} < set(REWARD_NAMES)


def test_a_folder_of_a_clip_model_is_loaded(tiny_clip_reward: ClipReward, tmp_path: Path) -> None:
    tiny_clip_reward.save_pretrained(tmp_path)
    for spec in (tmp_path, str(tmp_path)):
        assert isinstance(resolve_reward(spec), ClipReward)


@pytest.mark.skipif(not EMBEDDED_REWARD.is_dir(), reason="no reward is in the box yet")
def test_the_reward_in_the_box_loads() -> None:
    assert isinstance(resolve_reward("embedded"), ClipReward)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pikscore", "did you mean 'pickscore'"),
        ("colorfulness", "did you mean 'colourfulness'"),
        ("CLIP", "did you mean 'clip'"),
        ("", "unknown reward ''"),
        ("xyzzy", "unknown reward 'xyzzy': names are brightness, clip"),
        ("/no/such/folder", "existing folder"),
        (Path("nowhere"), "existing folder"),
        (JpegCompressibility, r"is a class: pass an instance, JpegCompressibility\(...\)"),
        (3, "is a int"),
    ],
)
def test_anything_else_is_refused_with_a_cure(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_reward(spec)


def test_a_bare_model_is_refused(tiny_clip_reward: ClipReward) -> None:
    with pytest.raises(ConfigError, match=r"bare CLIPModel.*ClipReward\("):
        resolve_reward(tiny_clip_reward.model)


def test_a_repository_out_of_reach_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="nobody/no-such-model"):
        resolve_reward("nobody/no-such-model")

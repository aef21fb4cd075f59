"""Pushing to a repository and loading from it, by the ordinary client against a Hub on loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.clip import ClipReward
from tests.pipelines import tiny
from tests.pipelines.hub import HubServer

REPO = "somebody/tiny"
TOKEN = "write-token"

# The client uploads LFS objects by an argument that its own HTTP library calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_what_is_pushed_opens_in_ours_and_in_the_stock_class(
    hub: HubServer, tmp_path: Path
) -> None:
    pipe = MCTDPipeline.from_pipe(
        tiny.make_stock(), reward_model=tiny.make_clip_reward(), preview_vae=tiny.make_preview_vae()
    )
    pipe.push_to_hub(REPO, token=TOKEN)
    files = hub.repositories[REPO].files
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert "reward_model/model.safetensors" in files
    assert "preview_vae/config.json" in files
    assert not any(b"/tmp" in body for path, body in files.items() if path.endswith(".json"))

    ours = MCTDPipeline.from_pretrained(REPO, cache_dir=tmp_path / "ours", token=TOKEN)
    assert isinstance(ours.reward_model, ClipReward)
    assert ours.preview_vae is not None
    again = MCTDPipeline.from_pretrained(
        REPO, cache_dir=tmp_path / "ours", local_files_only=True, reward_model=None
    )
    assert again.reward_model is None

    hub.downloads.clear()
    stock = DiffusionPipeline.from_pretrained(REPO, cache_dir=tmp_path / "stock")
    assert type(stock) is StableDiffusionPipeline
    assert not any(path.startswith(("reward_model", "preview_vae")) for path in hub.downloads)


def test_a_repository_that_does_not_exist_is_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nobody/nothing"):
        MCTDPipeline.from_pretrained("nobody/nothing", cache_dir=tmp_path)

"""Pushing to a repository and loading from it, by the ordinary client against a Hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import constants, hf_api

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.clip import ClipReward
from tests.pipelines import tiny
from tests.pipelines.hub import HubServer, serving

REPO = "somebody/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        yield server


def test_what_is_pushed_opens_in_ours_and_in_the_stock_class(
    hub: HubServer, tmp_path: Path
) -> None:
    pipe = MCTDPipeline.from_pipe(
        tiny.make_stock(), reward_model=tiny.make_clip_reward(), preview_vae=tiny.make_preview_vae()
    )
    pipe.push_to_hub(REPO, token="no-token")
    files = hub.repositories[REPO]
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert "reward_model/model.safetensors" in files
    assert "preview_vae/config.json" in files
    assert not any(b"/tmp" in body for path, body in files.items() if path.endswith(".json"))

    ours = MCTDPipeline.from_pretrained(REPO, cache_dir=tmp_path / "ours", token="no-token")
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

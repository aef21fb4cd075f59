"""Pipelines and heads on the Hub, by the ordinary client against a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.clip import ClipReward
from tests.pipelines import tiny
from tests.pipelines.hub import HubServer

REPO = "somebody/tiny"
HEAD = "somebody/head"
TOKEN = "write-token"
OURS = ("ige", "preview_vae", "reward_model")

pytestmark = [
    # The client uploads LFS objects by an argument that its own HTTP library calls outdated,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # and diffusers reads configs by an argument that the client calls outdated.
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning"),
]


@pytest.fixture(scope="module")
def whole() -> MCTDPipeline:
    """A pipeline with all our parts."""
    return MCTDPipeline.from_pipe(
        tiny.make_stock(),
        reward_model=tiny.make_clip_reward(),
        preview_vae=tiny.make_preview_vae(),
        ige=tiny.make_ige(),
    )


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    weights = other.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


# Heads


def test_a_head_is_loaded_at_the_revision_that_is_asked_for(hub: HubServer) -> None:
    old, new = tiny.make_ige(seed=3), tiny.make_ige(seed=4)
    first = old.push_to_hub(HEAD, token=TOKEN)
    second = new.push_to_hub(HEAD, token=TOKEN, commit_message="Trained for longer")
    assert hub.repositories[HEAD].references["main"] == second.oid
    load = InformationGainEvaluator.from_pretrained
    assert same_weights(load(HEAD), new)
    assert same_weights(load(HEAD, revision=first.oid), old)
    assert same_weights(load(HEAD, revision="main", dtype=torch.float32), new)
    with pytest.raises(ConfigError, match=r"'somebody/head'.*no revision 'v3'"):
        load(HEAD, revision="v3")


def test_the_card_of_a_head_says_what_it_was_trained_on(hub: HubServer) -> None:
    tiny.make_ige().push_to_hub(HEAD, token=TOKEN)
    card = ModelCard.load(HEAD)
    assert card.data.library_name == "mctd-diffusers"
    for text in ("StableDiffusionPipeline", "DDIMScheduler", "8, 50", f'ige="{HEAD}"'):
        assert text in card.text
    assert not any(b"/tmp" in body for body in hub.repositories[HEAD].files.values())


def test_the_card_beside_a_trained_head_goes_along(hub: HubServer, tmp_path: Path) -> None:
    tiny.make_ige().push_to_hub(HEAD, token=TOKEN)
    tiny.make_ige().save_pretrained(tmp_path / "trained")
    text = (
        "---\nbase_model: somebody/tiny\nlibrary_name: mctd-diffusers\n---\n\n# Correlation 0.6\n"
    )
    (tmp_path / "trained" / "README.md").write_text(text)
    (tmp_path / "trained" / "calibration.png").write_bytes(b"a picture")
    head = InformationGainEvaluator.from_pretrained(tmp_path / "trained")
    head.push_to_hub(HEAD, token=TOKEN)
    card = ModelCard.load(HEAD)
    assert card.data.base_model == "somebody/tiny"
    assert "Correlation 0.6" in card.text
    assert hub.repositories[HEAD].files["calibration.png"] == b"a picture"


def test_a_pipeline_takes_a_head_from_its_repository(hub: HubServer, tmp_path: Path) -> None:
    head = tiny.make_ige()
    head.push_to_hub(HEAD, token=TOKEN, private=True)
    tiny.make_stock().save_pretrained(tmp_path)
    pipe = MCTDPipeline.from_pretrained(tmp_path, ige=HEAD, token="read-token", revision="v1")
    assert same_weights(pipe.ige, head)
    with pytest.raises(ConfigError, match=r"'somebody/head'.*private.*token=.*hf auth login"):
        MCTDPipeline.from_pretrained(tmp_path, ige=HEAD, cache_dir=tmp_path / "other")


def test_what_is_no_head_is_refused_before_a_pipeline_is_loaded(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make_stock().save_pretrained(tmp_path / "stock")
    tiny.make_preview_vae().push_to_hub("somebody/vae", token=TOKEN)
    tiny.make_ige(family="FluxPipeline").push_to_hub("somebody/flux", token=TOKEN)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the stock loader ran")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    for ige, message in {
        "somebody/none": r"'somebody/none'.*no such repository",
        "somebody/vae": r"'somebody/vae'.*holds a AutoencoderTiny",
        "somebody/flux": r"FluxPipeline.*StableDiffusionPipeline",
        str(tmp_path / "none"): r"none'.*no such folder",
        str(tmp_path / "stock"): r"stock'.*holds no config\.json",
        "a name": r"'a name'.*owner/name",
    }.items():
        with pytest.raises(ConfigError, match=message):
            MCTDPipeline.from_pretrained(tmp_path / "stock", ige=ige)
    with pytest.raises(ConfigError, match=r"ige=3 is a int"):
        MCTDPipeline.from_pretrained(tmp_path / "stock", ige=3)


def test_a_head_with_broken_weights_is_refused(hub: HubServer, tmp_path: Path) -> None:
    tiny.make_ige().save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"load the InformationGainEvaluator.*again"):
        InformationGainEvaluator.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"load the InformationGainEvaluator.*again"):
        InformationGainEvaluator.from_pretrained(tmp_path)


# Pipelines


def test_what_is_pushed_opens_in_ours_and_in_the_stock_class(
    hub: HubServer, whole: MCTDPipeline, tmp_path: Path
) -> None:
    commit = whole.push_to_hub(REPO, token=TOKEN)
    assert hub.repositories[REPO].references["main"] == commit.oid
    files = hub.repositories[REPO].files
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert "reward_model/model.safetensors" in files
    assert {f"{name}/config.json" for name in OURS} <= set(files)
    assert not any(b"/tmp" in body for path, body in files.items() if path.endswith(".json"))

    ours = MCTDPipeline.from_pretrained(REPO, cache_dir=tmp_path / "ours")
    assert isinstance(ours.reward_model, ClipReward)
    assert same_weights(ours.preview_vae, whole.preview_vae)
    assert same_weights(ours.ige, whole.ige)
    head = InformationGainEvaluator.from_pretrained(REPO, subfolder="ige")
    assert same_weights(head, whole.ige)

    hub.downloads.clear()
    stock = DiffusionPipeline.from_pretrained(REPO, cache_dir=tmp_path / "stock")
    assert type(stock) is StableDiffusionPipeline
    assert not any(path.startswith(OURS) for path in hub.downloads)


def test_a_second_load_needs_no_hub(
    hub: HubServer, whole: MCTDPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    whole.push_to_hub(REPO, token=TOKEN)
    tiny.make_ige(seed=4).push_to_hub(HEAD, token=TOKEN)
    MCTDPipeline.from_pretrained(REPO)
    MCTDPipeline.from_pretrained(REPO, ige=HEAD)
    hub.stop()
    for arguments in ({}, {"local_files_only": True}):
        pipe = MCTDPipeline.from_pretrained(REPO, **arguments)
        assert same_weights(pipe.ige, whole.ige)
        assert pipe.reward_model is not None
        pipe = MCTDPipeline.from_pretrained(REPO, ige=HEAD, reward_model=None, **arguments)
        assert same_weights(pipe.ige, tiny.make_ige(seed=4))
        assert pipe.reward_model is None


@pytest.mark.slow
def test_a_second_load_in_a_process_that_is_offline(hub: HubServer, tmp_path: Path) -> None:
    tiny.make_stock().push_to_hub(REPO, token=TOKEN)
    tiny.make_ige().push_to_hub(HEAD, token=TOKEN)
    code = (
        "from mctd_diffusers import MCTDPipeline\n"
        f"pipe = MCTDPipeline.from_pretrained({REPO!r}, ige={HEAD!r})\n"
        "print(type(pipe.ige).__name__)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    for offline in ("0", "1"):
        environment["HF_HUB_OFFLINE"] = offline
        loaded = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert loaded.stdout.strip() == "InformationGainEvaluator"
        requests = list(hub.requests)
    assert hub.requests == requests


def test_a_private_pipeline_needs_a_token(
    hub: HubServer, whole: MCTDPipeline, tmp_path: Path
) -> None:
    whole.push_to_hub(REPO, token=TOKEN, private=True)
    for token in (None, "other-token", "misspelt-token"):
        with pytest.raises(ConfigError, match=r"'somebody/tiny'.*token=.*hf auth login"):
            MCTDPipeline.from_pretrained(REPO, token=token)
    pipe = MCTDPipeline.from_pretrained(REPO, token="read-token")
    assert same_weights(pipe.ige, whole.ige)


def test_an_interrupted_push_leaves_the_old_pipeline_and_is_taken_up(
    hub: HubServer, whole: MCTDPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    first = whole.push_to_hub(REPO, token=TOKEN)
    other = MCTDPipeline.from_pipe(tiny.make_stock(seed=5), ige=tiny.make_ige(seed=6))
    uploads = 0

    def cut(number: int) -> str | None:
        nonlocal uploads
        uploads += hub.requests[number].startswith("PUT")
        return "during" if uploads >= 2 else None

    hub.cut = cut
    with pytest.raises(ConfigError, match=r"push to 'somebody/tiny'.*try again"):
        other.push_to_hub(REPO, token=TOKEN)
    assert hub.repositories[REPO].references["main"] == first.oid
    hub.cut = lambda number: None
    other.push_to_hub(REPO, token=TOKEN)
    assert same_weights(MCTDPipeline.from_pretrained(REPO).ige, other.ige)


def test_the_card_of_a_pipeline_names_its_parts_and_what_it_was_made_from(
    hub: HubServer, whole: MCTDPipeline
) -> None:
    tiny.make_stock().push_to_hub("somebody/base", token=TOKEN)
    pipe = MCTDPipeline.from_pretrained("somebody/base", ige=tiny.make_ige())
    pipe.push_to_hub("tiny", token=TOKEN)
    card = ModelCard.load(REPO)
    assert card.data.library_name == "diffusers"
    assert card.data.base_model == "somebody/base"
    assert "| `ige` | `InformationGainEvaluator` |" in card.text
    assert f'MCTDPipeline.from_pretrained("{REPO}")' in card.text
    assert "reward_model" not in card.text


def test_the_texts_beside_a_pipeline_go_along(
    hub: HubServer, whole: MCTDPipeline, tmp_path: Path
) -> None:
    whole.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n\n# Its own card\n")
    (tmp_path / "ATTRIBUTION.md").write_text("# Whose pictures these are\n")
    pipe = MCTDPipeline.from_pretrained(tmp_path)
    pipe.push_to_hub(REPO, token=TOKEN)
    files = hub.repositories[REPO].files
    assert b"Its own card" in files["README.md"]
    assert b"Whose pictures" in files["ATTRIBUTION.md"]


def test_saving_pushes_where_it_is_asked_to(
    hub: HubServer, whole: MCTDPipeline, tmp_path: Path
) -> None:
    whole.save_pretrained(tmp_path / "tiny", push_to_hub=True, token=TOKEN, private=True)
    assert hub.repositories[REPO].private
    assert "ige/config.json" in hub.repositories[REPO].files
    assert MCTDPipeline.from_pretrained(tmp_path / "tiny").ige is not None


def test_a_repository_without_a_pipeline_is_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nobody/nothing"):
        MCTDPipeline.from_pretrained("nobody/nothing", cache_dir=tmp_path)
    tiny.make_preview_vae().push_to_hub("somebody/vae", token=TOKEN)
    with pytest.raises(ConfigError, match=r"'somebody/vae'.*model_index\.json"):
        MCTDPipeline.from_pretrained("somebody/vae", cache_dir=tmp_path)
    tiny.make_stock().push_to_hub(REPO, token=TOKEN)
    with pytest.raises(ConfigError, match=r"'somebody/tiny'.*no revision 'v2'"):
        MCTDPipeline.from_pretrained(REPO, revision="v2")

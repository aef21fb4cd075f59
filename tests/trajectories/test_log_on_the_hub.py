"""Logs on the Hub: pushed by the ordinary client over HTTP, and opened by `datasets` from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from mctd_diffusers.hub import push_folder
from mctd_diffusers.trajectories import plan
from mctd_diffusers.trajectories.card import write_card
from mctd_diffusers.trajectories.logging import log_trajectories
from tests.pipelines.hub import HubServer
from tests.trajectories.tiny_logs import files_of, make_pipe, make_settings

REPO = "somebody/log"

pytestmark = [
    # The client uploads LFS objects by an argument that its own HTTP library calls outdated,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # and schedulers of diffusers read tensors in a way that numpy calls outdated.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

LOADER = """
import datasets, json
data = datasets.load_dataset("somebody/log")
print(json.dumps({split: rows[:] for split, rows in data.items()}))
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two splits, one of them in two shards, and their card."""
    monkeypatch.setattr(plan, "FINE_STEPS", 12)
    folder, pipe = tmp_path / "log", make_pipe()
    for split, number in (("train", 3), ("held_out", 1)):
        settings = make_settings(num_trajectories=number)
        list(log_trajectories(pipe, settings, folder, split=split))
    write_card(pipe, folder)
    return folder


def loaded_elsewhere(
    hub: HubServer, home: Path, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Load the log in a process that knows the Hub by its address alone."""
    environment = {
        **os.environ,
        "HF_DATASETS_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        **settings,
    }
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADER],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_pushed_log_opens_from_the_hub_row_for_row(
    hub: HubServer, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "write-token")  # as `hf auth login` saves it
    push_folder(log, REPO, repo_type="dataset", private=True)
    assert hub.repositories[f"datasets/{REPO}"].files == files_of(log)
    assert "mctd-diffusers" in DatasetCard.load(REPO).data.tags
    loaded = loaded_elsewhere(hub, tmp_path / "home", HF_TOKEN="read-token")
    assert loaded.returncode == 0, loaded.stderr
    here = load_dataset(str(log), cache_dir=str(tmp_path / "here"))
    expected = {split: rows[:] for split, rows in here.items()}
    assert json.loads(loaded.stdout) == json.loads(json.dumps(expected))


def test_a_log_that_grows_is_pushed_again_in_what_is_new(
    hub: HubServer, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "write-token")
    push_folder(log, REPO, repo_type="dataset")
    list(
        log_trajectories(make_pipe(), make_settings(num_trajectories=1, seed=7), log, split="more")
    )
    hub.requests.clear()
    push_folder(log, REPO, repo_type="dataset")
    assert hub.repositories[f"datasets/{REPO}"].files == files_of(log)
    assert sum(request.startswith("PUT") for request in hub.requests) == 1

"""What every test stands on: one thread, no network, the same examples each time."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports torch or huggingface_hub, and for the processes that tests start. One
# thread: tests run side by side, and pictures are bit-equal only at equal numbers of threads.
os.environ.update(
    CUBLAS_WORKSPACE_CONFIG=":4096:8",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
from hypothesis import HealthCheck, settings

from tests.typechecking import check_package

if TYPE_CHECKING:
    from tests.pipelines.hub import HubServer

# Every call of the package is checked against its signature, shapes included.
check_package("mctd_diffusers")

# `make test` draws the same examples everywhere; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile(
    "dev",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "ci", parent=settings.get_profile("dev"), max_examples=100, print_blob=True
)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def pytest_collection_finish() -> None:
    """Take what imports made for permanent: to pass over it again took a twelfth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses connections to anywhere but this machine, except in tests marked `hub`."""
    if request.node.get_closest_marker("hub"):
        return
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and str(address[0]) not in {
            "127.0.0.1",
            "::1",
            "localhost",
        }:
            raise RuntimeError(f"a test reached for the network: {address}; mark it `hub`.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(scope="session")
def unet() -> Any:
    """A tiny UNet with random weights, which no test changes."""
    from tests.tiny_models import tiny_unet

    return tiny_unet()


@pytest.fixture(scope="session")
def vae() -> Any:
    """A tiny autoencoder with random weights, which no test changes."""
    from tests.tiny_models import tiny_vae

    return tiny_vae()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on this machine, which the client takes for the real one; with an empty cache."""
    from huggingface_hub import constants, hf_api

    from tests.pipelines.hub import serving

    with serving() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        yield server

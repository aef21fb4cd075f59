"""Models that wait elsewhere until they are called, and other ways to save memory.

There is no accelerator here, so the hooks of accelerate run with the CPU as the execution device,
and what waits is made unusable: sequential offload leaves no weights in place by itself, and for
offload by the model `away_is_broken` does the like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, UserCpuOffloadHook
from diffusers.hooks import apply_group_offloading
from torch import nn

from mctd_diffusers.pipeline import MCTDPipeline
from tests.pipelines import tiny, tiny_flux, tiny_xl
from tests.pipelines.family_tests import seeded

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CALL: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt", "height": 16, "width": 16}

each_stock = pytest.mark.parametrize(
    "make_stock",
    [
        tiny.make_stock,
        pytest.param(tiny_xl.make_stock, marks=pytest.mark.slow),
        pytest.param(tiny_flux.make_stock, marks=pytest.mark.slow),
    ],
    ids=["1.5", "XL", "Flux"],
)


def make_pipe(make_stock: Callable[[], Any]) -> Any:
    return MCTDPipeline.from_pipe(
        make_stock(), reward_model=tiny.redness, preview_vae=tiny.make_preview_vae()
    )


def searched(pipe: Any, **call: Any) -> Any:
    settings = {"search": "mctd", "compute": 3, "rows_per_call": 2, **CALL, **call}
    return pipe("a red cat", generator=seeded(0)[0], **settings)


def best_of_one(pipe: Any, **call: Any) -> torch.Tensor:
    one = {"search": "best_of_n", "compute": 1, "rows_per_call": 1}
    images: torch.Tensor = searched(pipe, **one, **call).images
    return images


def wait_by_the_layer(pipe: Any) -> None:
    """`enable_sequential_cpu_offload`, which itself names a device `cpu:0` that no tensor is on."""
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module) and name not in pipe._exclude_from_cpu_offload:
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


@pytest.fixture
def away_is_broken(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Weights are NaN while their model waits; answers which models were fetched, in order."""
    fetched: list[nn.Module] = []
    kept: dict[nn.Module, list[torch.Tensor]] = {}

    def put_away(self: CpuOffload, module: nn.Module) -> nn.Module:
        if module not in kept:
            kept[module] = [parameter.data for parameter in module.parameters()]
            for parameter in module.parameters():
                parameter.data = torch.full_like(parameter, torch.nan)
        return module

    def fetch(self: CpuOffload, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.prev_module_hook, UserCpuOffloadHook):
            self.prev_module_hook.offload()
        if module in kept:
            fetched.append(module)
            for parameter, data in zip(module.parameters(), kept.pop(module), strict=True):
                parameter.data = data
        return args, kwargs

    monkeypatch.setattr(CpuOffload, "init_hook", put_away)
    monkeypatch.setattr(CpuOffload, "pre_forward", fetch)
    return fetched


@each_stock
def test_models_that_wait_until_they_are_called_change_no_bit(
    make_stock: Callable[[], Any], away_is_broken: list[nn.Module]
) -> None:
    stock, pipe = make_stock(), make_pipe(make_stock)
    picture, found = stock("a red cat", generator=seeded(0)[0], **CALL).images, searched(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert not away_is_broken
    offloaded = searched(pipe)
    assert torch.equal(offloaded.images, found.images)
    assert offloaded.search[0].recipe == found.search[0].recipe
    assert pipe.replay(found.search[0].recipe).reward == found.rewards[0]
    assert torch.equal(best_of_one(pipe), picture)
    models = {part for part in pipe.components.values() if isinstance(part, nn.Module)}
    assert set(away_is_broken) == models
    waiting = [next(model.parameters()).isnan().all() for model in models]
    assert all(waiting), "a call leaves models where it found them"


@each_stock
def test_weights_that_wait_until_their_layer_is_called_change_no_bit(
    make_stock: Callable[[], Any],
) -> None:
    stock, pipe = make_stock(), make_pipe(make_stock)
    picture, found = stock("a red cat", generator=seeded(0)[0], **CALL).images, searched(pipe)
    wait_by_the_layer(pipe)
    assert pipe.vae.decoder.conv_in.weight.device.type == "meta"
    offloaded = searched(pipe)
    assert torch.equal(offloaded.images, found.images)
    assert offloaded.search[0].recipe == found.search[0].recipe
    assert torch.equal(best_of_one(pipe), picture)


def by_group(pipe: Any) -> None:
    """Layers wait in groups, and what is not grouped waits too."""
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            apply_group_offloading(
                model,
                onload_device=torch.device("cpu"),
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
            )


def in_channels_last(pipe: Any) -> None:
    """Another order of the channels in memory."""
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "is_exact"),
    [
        (lambda pipe: pipe.vae.enable_tiling(), False),
        (in_channels_last, True),
        pytest.param(lambda pipe: pipe.vae.enable_slicing(), True, marks=pytest.mark.slow),
        pytest.param(lambda pipe: pipe.enable_attention_slicing(1), True, marks=pytest.mark.slow),
        pytest.param(by_group, True, marks=pytest.mark.slow),
    ],
    ids=["vae_tiling", "channels_last", "vae_slicing", "attention_slicing", "group_offload"],
)
def test_what_saves_memory_or_time_does_it_as_in_the_stock_pipeline(
    change: Callable[[Any], Any], is_exact: bool
) -> None:
    stock, pipe = tiny.make_stock(), make_pipe(tiny.make_stock)
    size = {"height": 32, "width": 32}
    plain = searched(pipe, **size)
    change(stock), change(pipe)
    picture = stock("a red cat", generator=seeded(0)[0], **{**CALL, **size}).images
    assert torch.equal(best_of_one(pipe, **size), picture)
    changed = searched(pipe, **size)
    assert torch.allclose(changed.images, plain.images, atol=1e-3) is is_exact

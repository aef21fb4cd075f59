"""Denoisers that are compiled: a whole search runs in one graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mctd_diffusers.denoising import denoiser
from mctd_diffusers.pipeline import MCTDPipeline
from tests.pipelines import tiny, tiny_flux, tiny_sd3, tiny_xl
from tests.pipelines.family_tests import seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

CALL: dict[str, Any] = {
    "num_inference_steps": 6,
    "height": 16,
    "width": 16,
    "compute": 3,
    "rows_per_call": 2,
    "output_type": "pt",
}


def searched(pipe: Any, **call: Any) -> Any:
    return pipe("a red cat", generator=seeded(0)[0], **CALL, **call)


@pytest.mark.parametrize(
    ("scheduler", "search"), [("ddim", "mctd"), ("ddim", "textbook_mctd"), ("heun", "evolution")]
)
def test_all_calls_of_a_search_look_alike_to_the_network(scheduler: str, search: str) -> None:
    stock = tiny.make_stock(scheduler)
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    seen = set()

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = (*given, *named.values())
        seen.add(
            tuple((x.shape, x.dtype, x.stride()) for x in tensors if isinstance(x, torch.Tensor))
        )

    stock.unet.register_forward_pre_hook(look, with_kwargs=True)
    searched(pipe, search=search)
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_stock", "parts", "call"),
    [
        (tiny.make_stock, {}, {"search": "mctd"}),
        (tiny.make_stock, {"ige": tiny.make_ige}, {"stride_policy": "ige", "strides": (1, 2)}),
        (lambda: tiny.make_stock("heun"), {}, {"search": "evolution"}),
        (tiny_xl.make_stock, {}, {"search": "mctd"}),
        (tiny_sd3.make_stock, {}, {"search": "mctd"}),
        (tiny_flux.make_stock, {}, {"search": "mctd"}),
    ],
    ids=["unet", "unet_with_features", "two_calls", "xl", "sd3", "flux"],
)
def test_a_compiled_denoiser_is_one_graph_over_a_whole_search(
    make_stock: Callable[[], Any],
    parts: dict[str, Callable[[], Any]],
    call: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What runs within the graph is traced, and the checks of types that tests add cannot be.
    monkeypatch.setattr(denoiser, "pooled", inspect.unwrap(denoiser.pooled))
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def eager(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    made = {name: make() for name, make in parts.items()}
    pipe: Any = MCTDPipeline.from_pipe(make_stock(), reward_model=tiny.redness, **made)
    found = searched(pipe, **call)
    network = getattr(pipe, "unet", None) or pipe.transformer
    network.compile(backend=eager, fullgraph=True)
    compiled = searched(pipe, **call)
    assert len(graphs) == 1
    assert torch.equal(compiled.images, found.images)
    assert compiled.search[0].recipe == found.search[0].recipe
    pipe(["a blue dog", "a cat"], generator=seeded(1, 2), **CALL, **call)
    assert len(graphs) == 1

"""Searches that run out of memory, and those that keep their samples elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import read_recipe
from tests.pipelines import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def search(pipe: MCTDPipeline, **call: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    defaults = {"num_inference_steps": 6, "search": "mctd", "compute": 3, "rows_per_call": 4}
    return pipe("a red cat", generator=generator, **{**defaults, **call})


@contextmanager
def room_for(pipe: MCTDPipeline, latents: int, after: int = 0) -> Iterator[None]:
    """A device too small for more latents in a call of any model, after some calls of each."""
    parts = pipe.components
    rows = {parts["unet"]: 2 * latents, parts["vae"].decoder: latents}
    calls = dict.fromkeys(rows, 0)

    def check(module: Any, args: Any, kwargs: Any) -> None:
        batch = args[0] if args else kwargs["sample"]
        calls[module] += 1
        if calls[module] > after and len(batch) > rows[module]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hooks = [m.register_forward_pre_hook(check, with_kwargs=True) for m in rows]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def narrow_redness(images: torch.Tensor, prompts: list[str]) -> list[float]:
    """A reward model with room for one picture."""
    if len(images) > 1:
        raise RuntimeError("CUDA error: out of memory")
    return tiny.redness(images, prompts)


def test_a_search_out_of_memory_goes_on_in_smaller_calls_and_says_so(
    pipe: MCTDPipeline, tmp_path: Path
) -> None:
    small = search(pipe, rows_per_call=2)
    with room_for(pipe, 2):
        out = search(pipe, reward_model=narrow_redness)
        (path,) = out.save(tmp_path / "picture.png")
        replayed: Any = pipe.replay(read_recipe(path))
    sizes = {"network": [2], "decode": [2], "reward": [1]}
    assert out.ledger.rows_by_phase == sizes
    assert out.search[0].recipe["rows_by_phase"] == sizes
    assert np.array_equal(np.array(out.images[0]), np.array(small.images[0]))
    assert out.search[0].history == small.search[0].history
    assert out.ledger.total == small.ledger.total
    assert torch.equal(replayed.latents, out.search[0].top(1)[0].latents)
    assert np.array_equal(np.array(replayed.images[0]), np.array(out.images[0]))


def test_a_replay_says_where_memory_ran_out_midway(
    pipe: MCTDPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with room_for(pipe, 2, after=3):
        out = search(pipe)
    assert out.ledger.rows_by_phase["network"] == [4, 2]
    replayed: Any = pipe.replay(out.search[0].recipe)
    assert "its calls of network held 4 and then 2 latents" in caplog.text
    latents = out.search[0].top(1)[0].latents
    assert torch.allclose(replayed.latents, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", ["top", "draw"])
def test_what_was_found_is_decoded_in_smaller_calls_where_memory_runs_out_then(
    pipe: MCTDPipeline, caplog: pytest.LogCaptureFixture, asked: str
) -> None:
    found = search(pipe, search="dts", compute=6).search[0]

    def samples() -> Any:
        return found.top(4) if asked == "top" else found.draw(4, temperature=1.0)

    whole = samples()
    with room_for(pipe, 1):
        again = samples()
    assert "decode ran out of memory in calls of 4 latents" in caplog.text
    for sample, other in zip(again, whole, strict=True):
        assert sample.node == other.node
        pixels = [np.asarray(each.image, dtype=np.int16) for each in (sample, other)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_a_search_with_room_enough_says_what_was_asked_for(pipe: MCTDPipeline) -> None:
    out = search(pipe)
    assert out.ledger.rows_by_phase == {"network": [4], "decode": [4], "reward": [4]}
    assert "rows_by_phase" not in out.search[0].recipe


def test_a_saved_search_goes_on_in_the_calls_that_it_had(
    pipe: MCTDPipeline, tmp_path: Path
) -> None:
    with room_for(pipe, 2):
        out = search(pipe, save_to=tmp_path)
    resumed = pipe.resume(tmp_path)
    assert resumed.ledger.rows_by_phase == out.ledger.rows_by_phase
    assert np.array_equal(np.array(resumed.images[0]), np.array(out.images[0]))
    assert resumed.search[0].recipe == out.search[0].recipe


def test_prices_are_measured_in_calls_that_fit(pipe: MCTDPipeline) -> None:
    with room_for(pipe, 1):
        out = search(pipe, compute=None, cost_budget=60.0)
        estimate = pipe.estimate("a red cat", num_inference_steps=6, rows_per_call=4)
    assert out.ledger.prices.decode > 0
    assert estimate.seconds > 0


@pytest.mark.parametrize("name", ["mctd", "evolution", "beam"])
def test_offloaded_latents_change_no_bit(pipe: MCTDPipeline, name: str) -> None:
    here, offloaded = (
        search(pipe, search=name, offload_latents=away, output_type="latent")
        for away in (False, True)
    )
    assert torch.equal(offloaded.images, here.images)
    assert offloaded.search[0].recipe == here.search[0].recipe
    assert offloaded.ledger.total == here.ledger.total


def test_offloaded_latents_wait_on_the_host(pipe: MCTDPipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 6, "rows_per_call": 4}
    world = pipe.open_world("a red cat", offload_latents=True, half_latents=True, **arguments)
    samples = world.environment._samples
    assert (samples.storage, samples.half) == (torch.device("cpu"), True)
    beside = world.environment.aside()._samples
    assert (beside.storage, beside.half) == (torch.device("cpu"), True)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("mctd", "ddim"),
        ("mctd", "dpm_multistep"),
        ("mctd", "euler_ancestral"),
        ("evolution", "dpm_multistep"),
        pytest.param("evolution", "ddim", marks=pytest.mark.slow),
        pytest.param("evolution", "euler_ancestral", marks=pytest.mark.slow),
    ],
)
def test_latents_in_half_are_searched_again_and_replayed_bit_for_bit(
    name: str, scheduler: str, tmp_path: Path
) -> None:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(scheduler), reward_model=tiny.redness)
    call = {"search": name, "half_latents": True, "output_type": "latent"}
    out, again = search(pipe, save_to=tmp_path, **call), search(pipe, **call)
    found = out.search[0]
    assert torch.equal(out.images, again.images)
    assert found.recipe == again.search[0].recipe
    assert not torch.equal(out.images, search(pipe, **call | {"half_latents": False}).images)
    for sample, latents in zip(found.finished, found.latents, strict=True):
        replayed: Any = pipe.replay(found.recipe_of(sample.node))
        assert torch.equal(replayed.latents, latents)
        assert replayed.reward == sample.reward
    assert torch.equal(pipe.resume(tmp_path).images, out.images)
    assert pipe.open_search(tmp_path).call.world.half_latents


def test_a_search_in_half_stopped_midway_goes_on_as_if_never_stopped(
    pipe: MCTDPipeline, tmp_path: Path
) -> None:
    class Stopping:
        calls = 0

        def __call__(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return tiny.redness(images, prompts)

    call = {"half_latents": True, "offload_latents": True, "output_type": "latent"}
    whole = search(pipe, **call)
    search(pipe, **call, reward_model=Stopping(), save_to=tmp_path, save_every_s=0)
    resumed = pipe.resume(tmp_path)
    assert resumed.search[0].stop_reason == whole.search[0].stop_reason
    assert torch.equal(resumed.images, whole.images)
    assert resumed.search[0].recipe == whole.search[0].recipe

"""Callbacks and interrupts of a search; `tests/conformance` asks the same of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.strategies import BestOfN
from tests.pipelines import tiny
from tests.pipelines.family_tests import counted_rows, seeded

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 4
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt", "rows_per_call": 2}
SEARCH: dict[str, Any] = {**CALL, "search": "mctd", "compute": 3}


class Notes:
    """A callback that keeps what it sees, and interrupts after some waves."""

    def __init__(self, interrupts_after: int | None = None) -> None:
        self.seen: list[tuple[int, torch.Tensor, dict[str, torch.Tensor]]] = []
        self.interrupts_after = interrupts_after

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        self.seen.append((step, timestep, {name: each.clone() for name, each in tensors.items()}))
        if len(self.seen) == self.interrupts_after:
            pipe._interrupt = True
        return tensors


def interrupting(pipe: Any) -> Any:
    """A reward that interrupts, as another thread would, when it is first asked."""

    def reward(images: torch.Tensor, prompts: list[str]) -> list[float]:
        pipe._interrupt = True
        return tiny.redness(images, prompts)

    return reward


def test_the_waves_of_one_sample_are_the_steps_of_the_stock_pipeline(
    stock: StableDiffusionPipeline, pipe: Any
) -> None:
    theirs, ours = Notes(), Notes()
    call = {"num_inference_steps": STEPS, "output_type": "latent"}
    tensors = ["latents", "prompt_embeds"]
    asked = {"callback_on_step_end_tensor_inputs": tensors}
    final = stock(
        "a red cat", **call, **asked, callback_on_step_end=theirs, generator=seeded(0)[0]
    ).images
    found = pipe(
        "a red cat",
        **call,
        **asked,
        callback_on_step_end=ours,
        generator=seeded(0)[0],
        search=BestOfN(n=1),
        rows_per_call=1,
    ).images
    assert torch.equal(found, final)
    # The stock callback sees what a step made, ours what a wave evaluated.
    for (step, timestep, before), (same, timesteps, evaluated) in zip(
        theirs.seen, ours.seen, strict=True
    ):
        assert same == step
        assert timesteps.tolist() == [timestep]
        assert torch.equal(evaluated["prompt_embeds"], before["prompt_embeds"][1:])
    for (_, _, before), (_, _, evaluated) in zip(theirs.seen, ours.seen[1:], strict=False):
        assert torch.equal(evaluated["latents"], before["latents"])


def test_each_sample_of_a_wave_has_the_embeddings_of_its_prompt(pipe: Any) -> None:
    prompts, notes = ["a red cat", "two dogs"], Notes()
    pipe(
        prompts,
        **CALL,
        search="best_of_n",
        compute=2,
        include_plain=True,
        generator=seeded(0, 1),
        callback_on_step_end=notes,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    world = pipe.open_world(prompts, num_inference_steps=STEPS, rows_per_call=2)
    texts = world.prepared.prompt_embeds
    counts = torch.zeros(2, dtype=torch.long)
    for _, _, tensors in notes.seen:
        for row in tensors["prompt_embeds"]:
            counts += torch.tensor([torch.equal(row, text) for text in texts])
    assert counts.tolist() == [2 * STEPS, 2 * STEPS]


def test_a_callback_of_the_old_style_is_called_every_few_waves(pipe: Any) -> None:
    waves: list[tuple[int, tuple[int, ...]]] = []
    notes = Notes()
    pipe(
        "a red cat",
        **SEARCH,
        callback=lambda step, timestep, latents: waves.append((step, tuple(latents.shape))),
        callback_steps=2,
        callback_on_step_end=notes,
    )
    shapes = [(step, tuple(tensors["latents"].shape)) for step, _, tensors in notes.seen]
    assert waves == shapes[::2]


def test_a_tensor_changed_in_place_is_refused_with_what_was_found(pipe: Any) -> None:
    def zero(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == STEPS:
            tensors["latents"].zero_()
        return {}

    call = {**SEARCH, "search": BestOfN(wave_size=1), "callback_on_step_end": zero}
    with pytest.raises(SearchError, match=r"changed 'latents'.*looks on.*search=None") as caught:
        pipe("a red cat", **call)
    (found,) = caught.value.partial.search
    assert (len(found.finished), found.stop_reason) == (1, "error")
    call["callback"] = lambda step, timestep, latents: latents.zero_()
    del call["callback_on_step_end"]
    with pytest.raises(SearchError, match="changed 'latents'"):
        pipe("a red cat", **call)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (
            {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)},
            r"SDCFGCutoffCallback\(...\) cuts something off at a step",
        ),
        (
            {"callback_on_step_end": MultiPipelineCallbacks([SDCFGCutoffCallback()])},
            r"MultiPipelineCallbacks\(...\) cuts something off at a step",
        ),
        (
            {
                "callback_on_step_end": print,
                "callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"],
            },
            r"\['negative_prompt_embeds'\]: a search shows .*\['latents', 'prompt_embeds'\]",
        ),
        ({"callback": 3}, "callback=3 is a int: give a function"),
    ],
    ids=["cutoff", "several", "tensor", "old"],
)
def test_what_a_search_cannot_call_is_refused_before_the_first_call(
    pipe: Any, call: dict[str, Any], complaint: str
) -> None:
    with counted_rows(pipe.unet) as rows, pytest.raises(ConfigError, match=complaint):
        pipe("a red cat", **SEARCH, **call)
    assert not rows()


# Interrupts


def test_an_interrupt_hands_back_the_best_and_completes_what_has_none(pipe: Any) -> None:
    out = pipe(
        ["a red cat", "two dogs"],
        **SEARCH,
        include_plain=True,
        generator=seeded(0, 1),
        callback_on_step_end=Notes(interrupts_after=2),
    )
    assert out.images.shape[0] == out.plain.images.shape[0] == 2
    assert None not in (*out.rewards, *out.plain.rewards)
    for found in out.search:
        assert found.stop_reason == "interrupted"
        assert len(found.finished) == 1


def test_an_interrupt_that_no_callback_makes_is_seen_after_any_wave(stock: Any) -> None:
    pipe: Any = MCTDPipeline.from_pipe(stock)
    with counted_rows(pipe.unet) as rows:
        call = {**SEARCH, "search": BestOfN(wave_size=1), "reward_model": interrupting(pipe)}
        (found,) = pipe("a red cat", **call).search
        assert len(rows()) == STEPS
    assert (len(found.finished), found.stop_reason) == (1, "interrupted")


@pytest.mark.parametrize("name", ["mctd", "best_of_n"])
@pytest.mark.parametrize("waves", [1, 3])
def test_a_saved_search_that_was_interrupted_goes_on(
    pipe: Any, tmp_path: Path, name: str, waves: int
) -> None:
    call = {**SEARCH, "search": name}
    whole = pipe("a red cat", **call, generator=seeded(0)[0])
    callback = Notes(interrupts_after=waves)
    pipe(
        "a red cat",
        **call,
        generator=seeded(0)[0],
        callback_on_step_end=callback,
        save_to=tmp_path,
    )
    assert len(callback.seen) == waves
    with pytest.raises(ConfigError, match="callback_on_step_end=3 is a int"):
        pipe.resume(tmp_path, callback_on_step_end=3)
    rest = Notes()
    resumed = pipe.resume(tmp_path, callback_on_step_end=rest)
    assert torch.equal(resumed.images, whole.images)
    assert resumed.ledger.total == whole.ledger.total
    seen = [tensors["latents"] for _, _, tensors in (*callback.seen, *rest.seen)]
    assert sum(map(len, seen)) == whole.nfe[0]

"""Where the search promises the stock picture, it is the stock picture, bit for bit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from mctd_diffusers.families.stable_diffusion import MCTDStableDiffusionPipeline
from mctd_diffusers.pipeline import MCTDPipeline
from tests.pipelines import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

FIVE = ["ddim", "ddpm", "euler", "euler_ancestral", "dpm_multistep"]
DETERMINISTIC = ["ddim", "euler", "dpm_multistep"]
OTHERS = ["dpm_singlestep", "deis", "unipc", "lms", "tcd"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def max_difference(first: Any, second: Any) -> float:
    return float((first.images - second.images).abs().max())


def test_stock_arguments_keep_their_order_and_defaults() -> None:
    ours = list(inspect.signature(MCTDStableDiffusionPipeline.__call__).parameters.values())
    stock = list(inspect.signature(StableDiffusionPipeline.__call__).parameters.values())[:-1]
    assert [(p.name, p.default, p.kind) for p in ours[: len(stock)]] == [
        (p.name, p.default, p.kind) for p in stock
    ]
    assert {p.kind for p in ours[len(stock) : -1]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("steps", [8, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FIVE)
def test_no_search_is_the_stock_pipeline(name: str, steps: int) -> None:
    stock = tiny.make_stock(name)
    pipe = MCTDPipeline.from_pipe(stock)
    call = {"num_inference_steps": steps, "output_type": "pt", "num_images_per_prompt": 2}
    theirs = stock("a red cat", generator=seeded(), **call)
    ours = pipe("a red cat", generator=seeded(), search=None, **call)
    assert max_difference(ours, theirs) == 0.0
    assert ours.nfe == [steps, steps]
    assert pipe.scheduler is stock.scheduler


@pytest.mark.parametrize("steps", [8, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*DETERMINISTIC, *OTHERS])
def test_best_of_one_is_the_stock_picture(name: str, steps: int) -> None:
    stock = tiny.make_stock(name)
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    call = {"num_inference_steps": steps, "output_type": "pt", "guidance_scale": 5.0}
    theirs = stock("a red cat", generator=seeded(), **call)
    ours = pipe(
        "a red cat", generator=seeded(), search="best_of_n", compute=1, rows_per_call=1, **call
    )
    assert max_difference(ours, theirs) == 0.0
    assert ours.nfe == [steps]


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"negative_prompt": "a blue dog"},
        {"height": 24, "width": 8},
    ],
    ids=lambda call: next(iter(call)),
)
def test_stock_arguments_keep_their_meaning_in_a_search(
    stock: StableDiffusionPipeline, pipe: MCTDPipeline, call: dict[str, Any]
) -> None:
    call = {"num_inference_steps": 4, "output_type": "pt", **call}
    theirs = stock("a red cat", generator=seeded(), **call)
    ours = pipe(
        "a red cat", generator=seeded(), search="best_of_n", compute=1, rows_per_call=1, **call
    )
    assert max_difference(ours, theirs) == 0.0


def test_a_batch_at_its_own_rows_per_call_is_the_stock_batch(
    stock: StableDiffusionPipeline, pipe: MCTDPipeline
) -> None:
    prompts, negatives = ["a red cat", "two dogs"], ["blue", "green"]
    call = {"num_inference_steps": 4, "output_type": "pt", "num_images_per_prompt": 2}
    theirs = stock(prompts, negative_prompt=negatives, generator=seeded(), **call)
    ours = pipe(
        prompts,
        negative_prompt=negatives,
        generator=seeded(),
        search="best_of_n",
        compute=1,
        rows_per_call=4,
        **call,
    )
    assert max_difference(ours, theirs) == 0.0


def test_latents_and_embeddings_of_the_user_are_taken_as_the_stock_takes_them(
    stock: StableDiffusionPipeline, pipe: MCTDPipeline
) -> None:
    embeds, negative = stock.encode_prompt("a red cat", "cpu", 1, True)
    call = {
        "num_inference_steps": 4,
        "output_type": "latent",
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "latents": torch.randn((1, 4, 8, 8), generator=seeded(5)),
    }
    theirs = stock(**call)
    ours = pipe(**call, search="best_of_n", compute=1, rows_per_call=1, reward_prompt="a cat")
    assert max_difference(ours, theirs) == 0.0


def test_ddim_eta_keeps_its_meaning_in_best_of_n(
    stock: StableDiffusionPipeline, pipe: MCTDPipeline
) -> None:
    call = {"num_inference_steps": 4, "output_type": "pt", "search": "best_of_n", "compute": 1}
    plain = pipe("a cat", generator=seeded(), **call)
    noisy = pipe("a cat", generator=seeded(), eta=1.0, **call)
    assert max_difference(plain, noisy) > 0.0


def test_no_search_returns_the_stock_tuple(
    stock: StableDiffusionPipeline, pipe: MCTDPipeline
) -> None:
    call = {"num_inference_steps": 2, "output_type": "pt", "return_dict": False}
    theirs = stock("a cat", generator=seeded(), **call)
    ours = pipe("a cat", generator=seeded(), search=None, **call)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    searched = pipe("a cat", generator=seeded(), search="best_of_n", compute=1, **call)
    assert searched[0].shape == theirs[0].shape
    assert len(searched) == 7


def test_no_search_calls_back_at_every_step(pipe: MCTDPipeline) -> None:
    seen = []

    def note(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    pipe("a cat", num_inference_steps=3, search=None, callback_on_step_end=note)
    assert seen == [0, 1, 2]

"""Flux 2, Klein or not, under search: tokens in units of the autoencoder's statistics."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from PIL import Image

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.processes import search_in_processes
from mctd_diffusers.viewing.comparison import make_column
from tests.pipelines import tiny, tiny_flux2
from tests.pipelines.family_tests import FamilyTests, counted_rows

CALL: dict[str, Any] = {
    "height": 16,
    "width": 16,
    "max_sequence_length": 20,
    "text_encoder_out_layers": tiny_flux2.LAYERS,
    "guidance_scale": 3.0,
}


class Flux2Tests(FamilyTests):
    call: ClassVar[dict[str, Any]] = CALL

    def test_latents_of_the_user_are_taken_as_the_stock_takes_them(
        self, stock: Any, pipe: Any
    ) -> None:
        latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
        theirs = self.run(stock, latents=latents)
        call = {"search": "best_of_n", "compute": 1, "rows_per_call": 1}
        assert torch.equal(self.run(pipe, latents=latents, **call).images, theirs.images)


class TestFlux2Klein(Flux2Tests):
    rows_per_latent = 2
    calls_per_chunk = 2

    @classmethod
    def make_stock(cls) -> Flux2KleinPipeline:
        return tiny_flux2.make_stock()


class TestDistilledFlux2Klein(Flux2Tests):
    steps = 4

    @classmethod
    def make_stock(cls) -> Flux2KleinPipeline:
        return tiny_flux2.make_stock(is_distilled=True)


class TestFlux2(Flux2Tests):
    @classmethod
    def make_stock(cls) -> Flux2Pipeline:
        return tiny_flux2.make_guided_stock()

    def test_commands_draw_its_prompts_though_pictures_come_first(self, pipe: Any) -> None:
        call = {**CALL, "num_inference_steps": 2, "compute": 1}
        column = make_column(pipe, ["a cup"], "best", "best_of_n", seed=0, call=call)
        assert column.nfe == [2]
        (found,) = search_in_processes(pipe, ["a cup"], seed=0, search="best_of_n", **call).found
        assert found.reward == column.rewards[0]


@pytest.fixture(scope="module")
def stock() -> Flux2KleinPipeline:
    return tiny_flux2.make_stock()


@pytest.fixture(scope="module")
def pipe(stock: Flux2KleinPipeline) -> MCTDPipeline:
    return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 30, 90))


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"height": 24, "width": 8},
        {"image": picture(68, 64)},
        {"image": [picture(64, 64), picture(72, 68)], "height": None, "width": None},
    ],
    ids="-".join,
)
def test_stock_arguments_keep_their_meaning_in_a_search(
    stock: Any, pipe: Any, call: dict[str, Any]
) -> None:
    theirs = Flux2Tests.run(stock, **call)
    ours = Flux2Tests.run(pipe, search="best_of_n", compute=1, rows_per_call=1, **call)
    assert torch.equal(ours.images, theirs.images)
    pictures = {"image": call["image"]} if "image" in call else {}
    replayed = pipe.replay(ours.search[0].recipe, **pictures)
    assert torch.equal(replayed.latents, ours.search[0].latents[0])


def test_embeddings_of_the_user_are_taken_as_the_stock_takes_them(stock: Any, pipe: Any) -> None:
    embeds, negative = (
        stock.encode_prompt(
            text, max_sequence_length=20, text_encoder_out_layers=tiny_flux2.LAYERS
        )[0]
        for text in (["a red cat", "two dogs"], ["grey", "black"])
    )
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    theirs = Flux2Tests.run(stock, None, 0, 1, **given)
    call = {"search": "best_of_n", "compute": 1, "rows_per_call": 2, "reward_prompt": ""}
    ours = Flux2Tests.run(pipe, None, 0, 1, **given, **call)
    assert torch.equal(ours.images, theirs.images)


def test_a_picture_that_is_none_is_refused_before_the_first_call(pipe: Any) -> None:
    with counted_rows(pipe.transformer) as rows, pytest.raises(ConfigError, match="Image"):
        Flux2Tests.run(pipe, image=torch.zeros(3, 8, 8))
    assert not rows()


def test_prompts_that_the_text_encoder_would_write_are_refused() -> None:
    pipe = MCTDPipeline.from_pipe(tiny_flux2.make_guided_stock(), reward_model=tiny.redness)
    with (
        counted_rows(pipe.transformer) as rows,
        pytest.raises(ConfigError, match="upsample_prompt"),
    ):
        Flux2Tests.run(pipe, caption_upsample_temperature=0.15)
    assert not rows()


def test_embeddings_are_enough_without_a_text_encoder(stock: Any) -> None:
    embeds, _ = stock.encode_prompt(
        ["a red cat", ""], max_sequence_length=20, text_encoder_out_layers=tiny_flux2.LAYERS
    )
    pipe = MCTDPipeline.from_pipe(
        stock, reward_model=tiny.redness, text_encoder=None, tokenizer=None
    )
    call = {"search": "best_of_n", "compute": 1, "rows_per_call": 1, "reward_prompt": ""}
    given = {"prompt_embeds": embeds[:1]}
    with (
        counted_rows(pipe.transformer) as rows,
        pytest.raises(ConfigError, match="guidance needs an empty prompt"),
    ):
        Flux2Tests.run(pipe, None, **given, **call)
    assert not rows()
    ours = Flux2Tests.run(pipe, None, **given, negative_prompt_embeds=embeds[1:], **call)
    assert ours.images.shape == (1, 3, 16, 16)

"""Every family, as a pipeline of diffusers."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from tests.conformance.checks import SIDE, ConformanceChecks
from tests.pipelines import (
    tiny,
    tiny_flux,
    tiny_flux2,
    tiny_qwen_image,
    tiny_sd3,
    tiny_xl,
    tiny_z_image,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SIZE: dict[str, Any] = {"height": SIDE, "width": SIDE}


class TestStableDiffusion(ConformanceChecks):
    name = "StableDiffusionPipeline"

    @classmethod
    def make_stock(cls) -> Any:
        return tiny.make_stock()


class TestStableDiffusionXL(ConformanceChecks):
    name = "StableDiffusionXLPipeline"
    readers = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    encoded = (
        *("prompt_embeds", "negative_prompt_embeds"),
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    )

    @classmethod
    def make_stock(cls) -> Any:
        return tiny_xl.make_stock()


class TestStableDiffusion3(ConformanceChecks):
    name = "StableDiffusion3Pipeline"
    call: ClassVar[dict[str, Any]] = {**SIZE, "max_sequence_length": 24}
    readers = (
        *("text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3"),
    )
    encoded = TestStableDiffusionXL.encoded

    @classmethod
    def make_stock(cls) -> Any:
        return tiny_sd3.make_stock()


class TestFlux(ConformanceChecks):
    name = "FluxPipeline"
    call: ClassVar[dict[str, Any]] = {**SIZE, "max_sequence_length": 24}
    readers = TestStableDiffusionXL.readers
    encoded = ("prompt_embeds", "pooled_prompt_embeds", "")

    @classmethod
    def make_stock(cls) -> Any:
        return tiny_flux.make_stock()


class TestFlux2(ConformanceChecks):
    name = "Flux2Pipeline"
    call: ClassVar[dict[str, Any]] = {
        **SIZE,
        "max_sequence_length": 20,
        "text_encoder_out_layers": tiny_flux2.LAYERS,
    }
    encoded = ("prompt_embeds", "")

    @classmethod
    def make_stock(cls) -> Any:
        return tiny_flux2.make_guided_stock()


class TestFlux2Klein(ConformanceChecks):
    name = "Flux2KleinPipeline"
    call = TestFlux2.call
    encoded = TestFlux2.encoded

    @classmethod
    def make_stock(cls) -> Any:
        return tiny_flux2.make_stock()

    @classmethod
    def embeddings(cls, encoder: Any, prompt: str) -> dict[str, Any]:
        nothing = super().embeddings(encoder, "")
        negative = {f"negative_{name}": part for name, part in nothing.items()}
        return super().embeddings(encoder, prompt) | negative


class TestQwenImage(ConformanceChecks):
    name = "QwenImagePipeline"
    call: ClassVar[dict[str, Any]] = {**SIZE, "negative_prompt": "grey", "true_cfg_scale": 3.0}
    unguided: ClassVar[dict[str, Any]] = {"true_cfg_scale": 1.0}
    encoded = ("prompt_embeds", "prompt_embeds_mask")

    @classmethod
    def make_stock(cls) -> Any:
        return tiny_qwen_image.make_stock()

    @classmethod
    def embeddings(cls, encoder: Any, prompt: str) -> dict[str, Any]:
        grey = super().embeddings(encoder, cls.call["negative_prompt"])
        negative = {f"negative_{name}": part for name, part in grey.items()}
        return super().embeddings(encoder, prompt) | negative


class TestZImage(ConformanceChecks):
    name = "ZImagePipeline"
    call: ClassVar[dict[str, Any]] = {**SIZE, "max_sequence_length": 96}
    unguided: ClassVar[dict[str, Any]] = {"guidance_scale": 0.0}

    @classmethod
    def make_stock(cls) -> Any:
        return tiny_z_image.make_stock()

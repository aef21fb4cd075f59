"""Flux 2 Klein: the stock pipeline, searched."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import Flux2KleinPipeline
from torch import Tensor

from mctd_diffusers.calls import num_prompts
from mctd_diffusers.denoising.protocols import Decoder
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.flux2 import Flux2Family
from mctd_diffusers.families.parts import VaeDecoder
from mctd_diffusers.families.searching import searches


@searches(Flux2KleinPipeline)
class MCTDFlux2KleinPipeline(Flux2Family, Flux2KleinPipeline):
    """Text-to-image generation with Flux 2 Klein, searched for the best reward.

    Its first argument is `image`: give the prompt by name.
    """

    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "preview_vae", "ige"]

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        super()._check_inputs(stock)
        if not self.do_classifier_free_guidance or stock["negative_prompt_embeds"] is not None:
            return
        if self.text_encoder is None or self.tokenizer is None:
            raise ConfigError(
                "guidance needs an empty prompt, and the pipeline has nothing to read it with: "
                "load it with text_encoder=... and tokenizer=..., or pass negative_prompt_embeds"
            )

    def _negative(self, stock: dict[str, Any], prompts_per_call: int) -> dict[str, Any] | None:
        if not self.do_classifier_free_guidance:
            return None
        nothing = [""] * num_prompts(stock)
        negative = stock | {"prompt": nothing, "prompt_embeds": stock["negative_prompt_embeds"]}
        return self._conditioning(negative, prompts_per_call)

    def _as_latents(self, latents: Tensor, decoder: Decoder) -> Tensor:
        assert isinstance(decoder, VaeDecoder)
        return decoder.unscaled(latents)

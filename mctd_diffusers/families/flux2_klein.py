"""Flux 2 Klein: the stock pipeline, searched."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import Flux2KleinPipeline
from torch import Tensor

from mctd_diffusers.calls import num_prompts
from mctd_diffusers.denoising.protocols import Decoder
from mctd_diffusers.families.flux2 import Flux2Family
from mctd_diffusers.families.parts import VaeDecoder
from mctd_diffusers.families.searching import searches
from mctd_diffusers.families.transformers import READERS


@searches(Flux2KleinPipeline)
class MCTDFlux2KleinPipeline(Flux2Family, Flux2KleinPipeline):
    """Text-to-image generation with Flux 2 Klein, searched for the best reward.

    Its first argument is `image`: give the prompt by name.
    """

    _optional_components: ClassVar[list[str]] = [*READERS, "preview_vae", "ige"]

    def _negative(self, stock: dict[str, Any], prompts_per_call: int) -> dict[str, Any] | None:
        if not self.do_classifier_free_guidance:
            return None
        nothing = [""] * num_prompts(stock)
        negative = stock | {"prompt": nothing, "prompt_embeds": stock["negative_prompt_embeds"]}
        return self._conditioning(negative, prompts_per_call)

    def _as_latents(self, latents: Tensor, decoder: Decoder) -> Tensor:
        assert isinstance(decoder, VaeDecoder)
        return decoder.unscaled(latents)

"""Stable Diffusion 3 and 3.5: the stock pipeline, searched."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from mctd_diffusers.calls import Prepared
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.parts import GuidedNetwork, call_by_names, encoded_in_calls
from mctd_diffusers.families.searching import searches
from mctd_diffusers.families.transformers import READERS, TransformerFamily


@searches(StableDiffusion3Pipeline)
class MCTDStableDiffusion3Pipeline(TransformerFamily, StableDiffusion3Pipeline):
    """Text-to-image generation with Stable Diffusion 3 and 3.5, searched for the best reward."""

    _optional_components: ClassVar[list[str]] = [
        *StableDiffusion3Pipeline._optional_components,
        *(*READERS, "text_encoder_3", "tokenizer_3"),
        *("preview_vae", "ige"),
    ]

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        if stock["skip_guidance_layers"] is not None:
            raise ConfigError(
                f"skip_guidance_layers={stock['skip_guidance_layers']} calls the transformer a "
                "third time at some of the steps, which a search does not: leave it out, or call "
                "with search=None"
            )
        super()._check_inputs(stock)

    def _set_timesteps(self, stock: dict[str, Any]) -> None:
        patch = self.transformer.config.patch_size
        shift = {} if stock["mu"] is None else {"mu": stock["mu"]}
        if self.scheduler.config.get("use_dynamic_shifting") and not shift:
            rows, columns = self._latent_shape(stock)[-2:]
            shift["mu"] = self._shift((rows // patch) * (columns // patch), max_shift=1.16)
        self._set_sigmas(stock, stock["sigmas"], **shift)

    def _prepare(
        self, stock: dict[str, Any], prompts_per_call: int, draws: int | None = None
    ) -> Prepared:
        guides, kwargs = self.do_classifier_free_guidance, self.joint_attention_kwargs
        device, (images, *_) = self._execution_device, self._latent_shape(stock)

        def encode(some: dict[str, Any]) -> Any:
            scale = kwargs and kwargs.get("scale")
            others = {"device": device, "do_classifier_free_guidance": guides, "lora_scale": scale}
            return call_by_names(self.encode_prompt, some, **others)

        embeds, negative, pooled, pooled_negative = encoded_in_calls(
            stock, prompts_per_call, encode
        )
        conditional = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        unconditional = {"encoder_hidden_states": negative, "pooled_projections": pooled_negative}
        if (stock["ip_adapter_image"] is not None and self.is_ip_adapter_active) or (
            stock["ip_adapter_image_embeds"] is not None
        ):
            pictures = self.prepare_ip_adapter_image_embeds(
                stock["ip_adapter_image"], stock["ip_adapter_image_embeds"], device, images, guides
            )
            unconditional["image_embeds"] = pictures[:images]
            conditional["image_embeds"] = pictures[-images:]

        def denoise(
            latents: Tensor, timesteps: Tensor, image_embeds: Any = None, **conditioning: Any
        ) -> Tensor:
            given = kwargs
            if image_embeds is not None:
                given = {**(kwargs or {}), "ip_adapter_image_embeds": image_embeds}
            output: Tensor = self.transformer(
                hidden_states=latents,
                timestep=timesteps,
                joint_attention_kwargs=given,
                return_dict=False,
                **conditioning,
            )[0]
            return output

        network = GuidedNetwork(
            denoise, conditional, unconditional if guides else None, self.guidance_scale
        )
        return self._prepared(stock, network, self._first_latents(stock, draws, embeds.dtype))

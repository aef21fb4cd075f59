"""Flux: the stock pipeline, searched."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor

from mctd_diffusers.calls import Prepared
from mctd_diffusers.families.parts import call_by_names, encoded_in_calls
from mctd_diffusers.families.searching import searches
from mctd_diffusers.families.transformers import (
    READERS,
    PackedFamily,
    TwoCallNetwork,
    negative_of,
)


@searches(FluxPipeline)
class MCTDFluxPipeline(PackedFamily, FluxPipeline):
    r"""Text-to-image generation with Flux, searched for the best reward.

    `guidance_scale` is an input of the transformer, so there is nothing for a search to scale, and
    one NFE is one row; with `true_cfg_scale` above 1 and negative prompts it is two.
    """

    _optional_components: ClassVar[list[str]] = [
        *FluxPipeline._optional_components,
        *READERS,
        *("preview_vae", "ige"),
    ]

    def _set_timesteps(self, stock: dict[str, Any]) -> None:
        shift = self._shift(self._latent_shape(stock)[1])
        self._set_sigmas(stock, self._requested_sigmas(stock), mu=shift)

    def _prepare(
        self, stock: dict[str, Any], prompts_per_call: int, draws: int | None = None
    ) -> Prepared:
        kwargs = self.joint_attention_kwargs or {}
        positive, negative = self._adapters(stock)
        conditional = self._conditioning(stock, prompts_per_call, positive)
        has_negative = stock["negative_prompt"] is not None or (
            stock["negative_prompt_embeds"] is not None
            and stock["negative_pooled_prompt_embeds"] is not None
        )
        unconditional = None
        if stock["true_cfg_scale"] > 1 and has_negative:
            unconditional = self._conditioning(negative_of(stock), prompts_per_call, negative)
        dtype = conditional["encoder_hidden_states"].dtype
        first_latents, image_ids = self._first_latents(stock, draws, dtype)

        def denoise(
            latents: Tensor,
            timesteps: Tensor,
            text_ids: Tensor,
            image_embeds: list[Tensor] | None,
            **conditioning: Any,
        ) -> Tensor:
            adapters = {} if image_embeds is None else {"ip_adapter_image_embeds": image_embeds}
            output: Tensor = self.transformer(
                hidden_states=latents,
                timestep=timesteps.to(latents.dtype) / 1000,
                txt_ids=text_ids[0],
                img_ids=image_ids,
                joint_attention_kwargs=kwargs | adapters,
                return_dict=False,
                **conditioning,
            )[0]
            return output

        network = TwoCallNetwork(denoise, conditional, unconditional, stock["true_cfg_scale"])
        return self._prepared(stock, network, first_latents, self._unpacking(stock))

    def _conditioning(
        self, stock: dict[str, Any], prompts_per_call: int, image_embeds: list[Tensor] | None
    ) -> dict[str, Any]:
        """What the transformer is told of each image, of the positive or the negative prompts."""
        scale, device = (self.joint_attention_kwargs or {}).get("scale"), self._execution_device
        embeds, pooled = encoded_in_calls(
            stock,
            prompts_per_call,
            lambda some: call_by_names(self.encode_prompt, some, device=device, lora_scale=scale)[
                :2
            ],
        )
        *_, text_ids = self.encode_prompt(None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full(
                [len(embeds)], self.guidance_scale, device=device, dtype=torch.float32
            )
        return {
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "text_ids": text_ids.expand(len(embeds), -1, -1),
            "guidance": guidance,
            "image_embeds": image_embeds,
        }

    def _adapters(self, stock: dict[str, Any]) -> list[list[Tensor] | None]:
        """Embeddings of the images of IP adapters, positive and negative; a missing side is black.

        ``None`` without adapters.
        """
        sides = [
            (stock[f"{sign}ip_adapter_image"], stock[f"{sign}ip_adapter_image_embeds"])
            for sign in ("", "negative_")
        ]
        if all(given is None for side in sides for given in side):
            return [None, None]
        black = np.zeros((stock["width"], stock["height"], 3), dtype=np.uint8)
        blacks = [black] * self.transformer.encoder_hid_proj.num_ip_adapters
        images, *_ = self._latent_shape(stock)
        return [
            self.prepare_ip_adapter_image_embeds(
                blacks if picture is None and embeds is None else picture,
                embeds,
                self._execution_device,
                images,
            )
            for picture, embeds in sides
        ]

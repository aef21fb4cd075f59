"""Flux 2: the stock pipeline, searched, and what Klein shares with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.calls import Prepared, as_config_errors, num_prompts
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.parts import VaeDecoder, call_by_names, encoded_in_calls
from mctd_diffusers.families.searching import searches
from mctd_diffusers.families.transformers import (
    PackedFamily,
    TwoCallNetwork,
)


@dataclass(frozen=True)
class PatchDecoder(VaeDecoder):
    """Decodes tokens that are patches of latents, normalised by statistics of the autoencoder.

    Attributes:
        unpack: tokens to patches, ``[batch, 4 * channels, height / 2, width / 2]``.
        unpatchify: patches to latents.
    """

    unpack: Callable[[Tensor], Tensor]
    unpatchify: Callable[[Tensor], Tensor]

    def unscaled(
        self, latents: Float[Tensor, "batch tokens packed"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Latents as the autoencoder knows them; one for previews knows them normalised."""
        patches = self.unpack(latents)
        if (norm := getattr(self.vae, "bn", None)) is not None:
            mean, variance = (
                each.view(1, -1, 1, 1) for each in (norm.running_mean, norm.running_var)
            )
            std = torch.sqrt(variance + self.vae.config.batch_norm_eps)
            patches = patches * std.to(patches) + mean.to(patches)
        return self.unpatchify(patches)


class Flux2Family(PackedFamily):
    """What both share: patches of latents as tokens, and pictures to refer to."""

    def _fill_in(self, stock: dict[str, Any]) -> None:
        with as_config_errors():
            for picture in self._references(stock)[:1]:
                rows, columns = picture.shape[-2:]
                stock["height"], stock["width"] = stock["height"] or rows, stock["width"] or columns
        super()._fill_in(stock)

    def _references(self, stock: dict[str, Any]) -> list[Float[Tensor, "1 3 height width"]]:
        """The pictures of the call that the prompt may refer to, as the autoencoder takes them."""
        pictures = stock["image"] if isinstance(stock["image"], list) else [stock["image"]]
        processor, step, most = self.image_processor, 2 * self.vae_scale_factor, 1024 * 1024

        def prepared(picture: Any) -> Tensor:
            processor.check_image_input(picture)
            if picture.width * picture.height > most:
                picture = processor._resize_to_target_area(picture, most)
            rows, columns = (side // step * step for side in (picture.height, picture.width))
            result: Tensor = processor.preprocess(picture, rows, columns, resize_mode="crop")
            return result

        return [] if stock["image"] is None else [prepared(picture) for picture in pictures]

    def _latent_shape(self, stock: dict[str, Any]) -> tuple[int, ...]:
        images = num_prompts(stock) * stock["num_images_per_prompt"]
        rows, columns = (stock[side] // (2 * self.vae_scale_factor) for side in ("height", "width"))
        return images, self.transformer.config.in_channels, rows, columns

    def _set_timesteps(self, stock: dict[str, Any]) -> None:
        rows, columns = self._latent_shape(stock)[-2:]
        shift = compute_empirical_mu(rows * columns, stock["num_inference_steps"])
        self._set_sigmas(stock, self._requested_sigmas(stock), mu=shift)

    def _prepare(
        self, stock: dict[str, Any], prompts_per_call: int, draws: int | None = None
    ) -> Prepared:
        conditional = self._conditioning(stock, prompts_per_call)
        unconditional = self._negative(stock, prompts_per_call)
        dtype = conditional["encoder_hidden_states"].dtype
        first_latents, ids = self._first_latents(stock, draws, dtype)
        own, ids, kwargs = ids[:1], ids[:1], self.attention_kwargs
        references = first_latents[:1, :0]
        if pictures := self._references(stock):
            references, places = self.prepare_image_latents(
                pictures, 1, stock["generator"], self._execution_device, self.vae.dtype
            )
            ids = torch.cat([own, places], dim=1)

        def denoise(latents: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
            inputs = torch.cat([latents, references.expand(len(latents), -1, -1)], dim=1)
            output: Tensor = self.transformer(
                hidden_states=inputs.to(self.transformer.dtype),
                timestep=timesteps.to(latents.dtype) / 1000,
                img_ids=ids,
                joint_attention_kwargs=kwargs,
                return_dict=False,
                **conditioning,
            )[0]
            return output[:, : latents.shape[1]]

        def unpack(latents: Tensor) -> Tensor:
            patches: Any = self._unpack_latents_with_ids(latents, own.expand(len(latents), -1, -1))
            return torch.as_tensor(patches)

        network = TwoCallNetwork(denoise, conditional, unconditional, self.guidance_scale)
        return self._prepared(stock, network, first_latents, unpack)

    def _conditioning(self, stock: dict[str, Any], prompts_per_call: int) -> dict[str, Any]:
        """What the transformer is told of each image."""
        embeds, text_ids = encoded_in_calls(
            stock,
            prompts_per_call,
            lambda some: call_by_names(self.encode_prompt, some, device=self._execution_device),
        )
        return {"encoder_hidden_states": embeds, "txt_ids": text_ids, "guidance": None}

    def _negative(self, stock: dict[str, Any], prompts_per_call: int) -> dict[str, Any] | None:
        """The same of negative prompts; ``None`` where nothing is scaled by them."""
        raise self._lacks("_negative")

    def _decoder(self, vae: Any, unpack: Any) -> VaeDecoder:
        return PatchDecoder(vae, unpack, self._unpatchify_latents)


@searches(Flux2Pipeline)
class MCTDFlux2Pipeline(Flux2Family, Flux2Pipeline):
    """Text-to-image generation with Flux 2, searched for the best reward.

    Its first argument is `image`: give the prompt by name. `guidance_scale` is an input of the
    transformer, so there is nothing for a search to scale, and one NFE is one row.
    """

    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "preview_vae", "ige"]

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        if stock["caption_upsample_temperature"]:
            raise ConfigError(
                "caption_upsample_temperature lets the text encoder write another prompt: write it "
                "beforehand, prompt = pipe.upsample_prompt(prompt), or call with search=None"
            )
        super()._check_inputs(stock)

    def _conditioning(self, stock: dict[str, Any], prompts_per_call: int) -> dict[str, Any]:
        conditioning = super()._conditioning(stock, prompts_per_call)
        images, device = len(conditioning["encoder_hidden_states"]), self._execution_device
        guidance = torch.full([images], self.guidance_scale, device=device, dtype=torch.float32)
        return conditioning | {"guidance": guidance}

    def _negative(self, stock: dict[str, Any], prompts_per_call: int) -> None:
        return None

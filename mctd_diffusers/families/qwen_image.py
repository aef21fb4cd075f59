"""Qwen-Image: the stock pipeline, searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mctd_diffusers.calls import Prepared
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.parts import VaeDecoder, call_by_names, encoded_in_calls
from mctd_diffusers.families.searching import searches
from mctd_diffusers.families.transformers import (
    PackedFamily,
    TwoCallNetwork,
    falling_sigmas,
    negative_of,
    padded,
)


@dataclass
class RescaledTokens(TwoCallNetwork):
    """A guided network whose output keeps the norm of the conditional one, token by token."""

    def guided(
        self,
        conditional: Float[Tensor, "batch tokens channels"],
        unconditional: Float[Tensor, "batch tokens channels"],
        scale: float,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Classifier-free guidance, then the rescaling."""
        guided = super().guided(conditional, unconditional, scale)
        kept, found = (torch.norm(each, dim=-1, keepdim=True) for each in (conditional, guided))
        return guided * (kept / found)


@dataclass(frozen=True)
class FrameDecoder(VaeDecoder):
    """Decodes pictures as videos of one frame, from latents normalised by channel.

    Attributes:
        unpack: tokens to latents, ``[batch, channels, height, width]``.
    """

    unpack: Callable[[Tensor], Tensor]

    def decoded(
        self, latents: Float[Tensor, "batch channels 1 height width"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """The one frame."""
        frames: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return frames[:, :, 0]

    def unscaled(
        self, latents: Float[Tensor, "batch tokens packed"]
    ) -> Float[Tensor, "batch channels 1 height width"]:
        """Latents as the autoencoder knows them."""
        frames = self.unpack(latents).unsqueeze(2)
        mean, std = (
            torch.tensor(self.vae.config[name]).view(1, -1, 1, 1, 1).to(frames)
            for name in ("latents_mean", "latents_std")
        )
        return frames / (1.0 / std) + mean


@searches(QwenImagePipeline)
class MCTDQwenImagePipeline(PackedFamily, QwenImagePipeline):
    """Text-to-image generation with Qwen-Image, searched for the best reward.

    Texts are not padded: each call of the transformer holds prompts of one length alone.
    """

    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "preview_vae", "ige"]

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        if self.transformer.config.guidance_embeds:
            raise ConfigError(
                "the transformer takes guidance as an input, which none of Qwen-Image does yet: "
                "call with search=None"
            )
        super()._check_inputs(stock)

    def _set_timesteps(self, stock: dict[str, Any]) -> None:
        sigmas = stock["sigmas"]
        if sigmas is None:
            sigmas = falling_sigmas(stock["num_inference_steps"])
        self._set_sigmas(stock, sigmas, mu=self._shift(self._latent_shape(stock)[1]))

    def _prepare(
        self, stock: dict[str, Any], prompts_per_call: int, draws: int | None = None
    ) -> Prepared:
        conditional = self._conditioning(stock)
        unconditional = None
        negatives = ("negative_prompt", "negative_prompt_embeds")
        if stock["true_cfg_scale"] > 1 and any(stock[name] is not None for name in negatives):
            unconditional = self._conditioning(negative_of(stock))
        sides = [side for side in (conditional, unconditional) if side is not None]
        first_latents = self._first_latents(
            stock, draws, conditional["encoder_hidden_states"].dtype
        )
        kwargs, step = self.attention_kwargs or {}, 2 * self.vae_scale_factor
        frame = (1, stock["height"] // step, stock["width"] // step)

        def denoise(
            latents: Tensor, timesteps: Tensor, lengths: Tensor, whole: Tensor, **texts: Tensor
        ) -> Tensor:
            texts = {name: rows[:, : int(lengths[0])] for name, rows in texts.items()}
            if whole[0]:
                del texts["encoder_hidden_states_mask"]
            output: Tensor = self.transformer(
                hidden_states=latents,
                timestep=timesteps.to(latents.dtype) / 1000,
                img_shapes=[[frame]] * len(latents),
                attention_kwargs=kwargs,
                return_dict=False,
                **texts,
            )[0]
            return output

        def unpack(latents: Tensor) -> Tensor:
            return self._unpacking(stock)(latents)[:, :, 0]

        network = RescaledTokens(denoise, conditional, unconditional, stock["true_cfg_scale"])
        kinds = [side[name].tolist() for side in sides for name in ("lengths", "whole")]
        return self._prepared(stock, network, first_latents, unpack, list(zip(*kinds, strict=True)))

    def _conditioning(self, stock: dict[str, Any]) -> dict[str, Any]:
        """What the transformer is told of each image, of the positive or the negative prompts."""

        def encode(some: dict[str, Any]) -> Any:
            embeds, mask = call_by_names(self.encode_prompt, some, device=self._execution_device)
            whole = mask is None
            masks = torch.ones(embeds.shape[:2], device=embeds.device) if whole else mask
            return list(embeds), list(masks.bool()), [whole] * len(embeds)

        # Alone, since the text encoder pads to the longest prompt beside it.
        embeds, masks, whole = encoded_in_calls(stock, 1, encode)
        texts = padded(embeds)
        texts["encoder_hidden_states_mask"] = pad_sequence(masks, batch_first=True)
        return texts | {"whole": torch.tensor(whole)}

    def _decoder(self, vae: Any, unpack: Any) -> VaeDecoder:
        if isinstance(vae, AutoencoderKLQwenImage):
            return FrameDecoder(vae, unpack)
        return super()._decoder(vae, unpack)  # one for previews

"""Tiny random networks in the shapes of Stable Diffusion's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from mctd_diffusers.denoising.protocols import Outputs


def tiny_unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def tiny_vae() -> Any:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    ).eval()


class GuidedUNet:
    """The call of `StableDiffusionPipeline`, with the prompts' embeddings given."""

    rows_per_latent = 2

    def __init__(self, unet: Any, embeds: Tensor, negative: Tensor, scale: float) -> None:
        self.unet, self.embeds, self.negative = unet, embeds, negative
        self.guidance_scale = scale
        self.sizes: list[int] = []
        self.combined: list[int] = []
        self.calls_left = 10**6

    def __call__(self, latents: Tensor, timesteps: Tensor, problems: Sequence[int]) -> Outputs:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise KeyboardInterrupt
        self.sizes.append(len(latents))
        rows = list(problems)
        embeds = torch.cat([self.negative[rows], self.embeds[rows]])
        output = self.unet(
            torch.cat([latents] * 2), torch.cat([timesteps] * 2), encoder_hidden_states=embeds
        ).sample
        unconditional, conditional = output.chunk(2)
        return Outputs(conditional, unconditional)

    def combine(self, outputs: Outputs, guidance: float | None = None) -> Tensor:
        assert outputs.unconditional is not None
        self.combined.append(len(outputs.conditional))
        scale = self.guidance_scale if guidance is None else guidance
        return outputs.unconditional + scale * (outputs.conditional - outputs.unconditional)


class PlainUNet:
    """The same without guidance."""

    rows_per_latent = 1
    guidance_scale = 1.0

    def __init__(self, unet: Any, embeds: Tensor) -> None:
        self.unet, self.embeds = unet, embeds

    def __call__(self, latents: Tensor, timesteps: Tensor, problems: Sequence[int]) -> Outputs:
        embeds = self.embeds[list(problems)]
        return Outputs(self.unet(latents, timesteps, encoder_hidden_states=embeds).sample, None)

    def combine(self, outputs: Outputs, guidance: float | None = None) -> Tensor:
        assert guidance is None
        return outputs.conditional

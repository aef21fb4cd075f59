"""Stable Diffusion XL: the stock pipeline, searched."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.calls import Prepared
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.parts import UpcastDecoder, call_by_names, encoded_in_calls
from mctd_diffusers.families.searching import searches
from mctd_diffusers.families.unets import UNetFamily


@searches(StableDiffusionXLPipeline)
class MCTDStableDiffusionXLPipeline(UNetFamily, StableDiffusionXLPipeline):
    r"""Text-to-image generation with Stable Diffusion XL, searched for the best reward.

    This model inherits from [`MCTDPipeline`] and [`StableDiffusionXLPipeline`]. Check the latter
    for the generic methods (downloading, saving, offloading, LoRA, IP adapters, textual inversion)
    and its components. A search finishes its samples, so it takes no `denoising_end`: a refiner, a
    [`StableDiffusionXLImg2ImgPipeline`], goes over the latents or pictures that it found.
    """

    def _fill_in(self, stock: dict[str, Any]) -> None:
        size = self.default_sample_size * self.vae_scale_factor
        stock["height"], stock["width"] = stock["height"] or size, stock["width"] or size
        for name in ("original_size", "target_size"):
            stock[name] = stock[name] or (stock["height"], stock["width"])

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        if stock["denoising_end"] is not None:
            raise ConfigError(
                f"denoising_end={stock['denoising_end']} ends a sample before it is finished, and "
                "a search scores finished ones: leave it out, search with output_type='latent' and "
                "refine what is found, refiner(prompt, image=out.images, strength=0.3); or call "
                "with search=None"
            )
        if self.text_encoder_2 is None and stock["prompt_embeds"] is None:
            raise ConfigError("the pipeline has no text_encoder_2: pass prompt_embeds=... instead")
        super()._check_inputs(stock)

    def _prepare(
        self, stock: dict[str, Any], prompts_per_call: int, draws: int | None = None
    ) -> Prepared:
        conditional, unconditional, pooled, unconditional_pooled = encoded_in_calls(
            stock,
            prompts_per_call,
            lambda some: call_by_names(self.encode_prompt, some, **self._encoding),
        )
        ids, unconditional_ids = self._time_ids(stock, pooled, conditional.dtype)
        return self._prepared(
            stock,
            draws,
            _conditioning(conditional, pooled, ids),
            _conditioning(unconditional, unconditional_pooled, unconditional_ids),
        )

    def _decoder(self) -> UpcastDecoder:
        return UpcastDecoder(self.vae)

    def _time_ids(
        self, stock: dict[str, Any], pooled: Tensor, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "images 6"], Float[Tensor, "images 6"]]:
        """Sizes and crops that the UNet is told, for the prompts and for the negative prompts."""
        encoder = self.text_encoder_2
        width = pooled.shape[-1] if encoder is None else encoder.config.projection_dim

        def ids(*names: str) -> Tensor:
            sizes = [tuple(stock[name]) for name in names]
            row: Tensor = self._get_add_time_ids(
                *sizes, dtype=dtype, text_encoder_projection_dim=int(width)
            )
            return row.to(self._execution_device).expand(len(pooled), -1)

        names = ("original_size", "crops_coords_top_left", "target_size")
        negative = tuple(f"negative_{name}" for name in names)
        own = stock[negative[0]] is not None and stock[negative[2]] is not None
        return ids(*names), ids(*(negative if own else names))

    def _check_safety(self, images: Tensor) -> tuple[Tensor, None]:
        """Mark the images as the stock pipeline does, where its watermarker is installed."""
        if self.watermark is not None:
            given = images * 2 - 1  # it takes images as the autoencoder gives them
            marked = self.watermark.apply_watermark(given)
            if marked is not given:  # it leaves small ones as they are
                images = (marked / 2 + 0.5).clamp(0, 1)
        return images, None


def _conditioning(embeds: Tensor | None, pooled: Tensor | None, ids: Tensor) -> dict[str, Any]:
    """Arguments of the UNet."""
    added = {"text_embeds": pooled, "time_ids": ids}
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}

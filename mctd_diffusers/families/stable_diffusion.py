"""Stable Diffusion 1.x and 2.x: the stock pipeline, searched."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from mctd_diffusers.calls import Prepared
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.parts import call_by_names, encoded_in_calls
from mctd_diffusers.families.searching import searches
from mctd_diffusers.families.unets import UNetFamily


@searches(StableDiffusionPipeline)
class MCTDStableDiffusionPipeline(UNetFamily, StableDiffusionPipeline):
    r"""Text-to-image generation with Stable Diffusion 1.x and 2.x, searched for the best reward.

    This model inherits from [`MCTDPipeline`] and [`StableDiffusionPipeline`]. Check the latter for
    the generic methods (downloading, saving, offloading, LoRA, IP adapters, textual inversion) and
    its components. A search steps a copy of `scheduler`, or DDIM where it cannot be branched.
    """

    _optional_components: ClassVar[list[str]] = [
        *StableDiffusionPipeline._optional_components,
        *("text_encoder", "tokenizer", "preview_vae", "ige"),
    ]

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        lacking = [name for name in ("text_encoder", "tokenizer") if getattr(self, name) is None]
        if lacking and (stock["prompt"] is not None or stock["negative_prompt"] is not None):
            raise ConfigError(
                f"the pipeline has no {' and no '.join(lacking)} to read prompts with: load it "
                f"with {lacking[0]}=..., or pass prompt_embeds=..., and reward_prompt=..."
            )
        super()._check_inputs(stock)

    def _fill_in(self, stock: dict[str, Any]) -> None:
        if not stock["height"] or not stock["width"]:
            size = self.unet.config.sample_size
            height, width = (size, size) if self._is_unet_config_sample_size_int else size
            stock["height"] = height * self.vae_scale_factor
            stock["width"] = width * self.vae_scale_factor

    def _prepare(
        self, stock: dict[str, Any], prompts_per_call: int, draws: int | None = None
    ) -> Prepared:
        embeds = encoded_in_calls(
            stock,
            prompts_per_call,
            lambda some: call_by_names(self.encode_prompt, some, **self._encoding),
        )
        conditional, unconditional = ({"encoder_hidden_states": part} for part in embeds)
        return self._prepared(stock, draws, conditional, unconditional)

    def _check_safety(self, images: Tensor) -> tuple[Tensor, list[bool] | None]:
        """What the stock safety checker says; it blackens what it finds."""
        if self.safety_checker is None:
            return images, None
        device, dtype = self._execution_device, self.unet.dtype
        # It takes images as the autoencoder gives them, in [-1, 1].
        _, nsfw = self.run_safety_checker(images * 2 - 1, device, dtype)
        seen = torch.tensor(nsfw, device=images.device)
        return torch.where(seen[:, None, None, None], 0.0, images), list(nsfw)

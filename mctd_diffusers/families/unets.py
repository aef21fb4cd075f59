"""What Stable Diffusion 1, 2 and XL share: a UNet under classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    rescale_noise_cfg,
    retrieve_timesteps,
)
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.calls import Prepared, num_prompts
from mctd_diffusers.denoising.denoiser import FeatureTap
from mctd_diffusers.denoising.edges import reads_variance
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.parts import GuidedNetwork, VaeDecoder
from mctd_diffusers.pipeline import MCTDPipeline


@dataclass
class RescaledNetwork(GuidedNetwork):
    """A guided network whose output can be rescaled to the deviation of the conditional one.

    Attributes:
        guidance_rescale: share of the rescaling (Lin et al., 2023, arXiv 2305.08891, section 3.4),
            0 for none.
    """

    guidance_rescale: float = 0.0

    def guided(
        self,
        conditional: Float[Tensor, "batch *sample"],
        unconditional: Float[Tensor, "batch *sample"],
        scale: float,
    ) -> Float[Tensor, "batch *sample"]:
        """Classifier-free guidance, then the rescaling."""
        guided = super().guided(conditional, unconditional, scale)
        if self.guidance_rescale > 0.0:
            guided = rescale_noise_cfg(guided, conditional, guidance_rescale=self.guidance_rescale)
        return guided


class UNetFamily(MCTDPipeline):
    """Base of the families with a `UNet2DConditionModel`."""

    def _latent_shape(self, stock: dict[str, Any]) -> tuple[int, ...]:
        images = num_prompts(stock) * stock["num_images_per_prompt"]
        rows, columns = (stock[side] // self.vae_scale_factor for side in ("height", "width"))
        return images, self.unet.config.in_channels, rows, columns

    @property
    def _latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    def _feature_channels(self) -> dict[str, int]:
        """Two of each block's channels, as `FeatureTap` reads them, and three of the latents'."""
        channels = self.unet.config.block_out_channels
        blocks = {f"down.{i}": 2 * number for i, number in enumerate(channels)}
        if self.unet.mid_block is not None:
            blocks["mid"] = 2 * channels[-1]
        return blocks | {"estimate": 3 * self.unet.config.in_channels}

    def _check_variance(self) -> None:
        """Refuse a variance that either the UNet predicts or the scheduler reads, not both."""
        config, kind = self.unet.config, type(self.scheduler).__name__
        channels = f"{config.out_channels} channels for latents of {config.in_channels}"
        predicts = config.out_channels == 2 * config.in_channels
        reads = reads_variance(self.scheduler)
        if predicts and not reads:
            raise ConfigError(
                f"the UNet gives {channels}, a variance beside what it predicts, which {kind} does "
                "not read as it is set up: search with search_scheduler=DDPMScheduler.from_config("
                "pipe.scheduler.config, variance_type='learned_range')"
            )
        if reads and not predicts:
            raise ConfigError(
                f"{kind} with variance_type={self.scheduler.config.variance_type!r} reads a "
                f"variance, and the UNet gives none, {channels}: set variance_type='fixed_small'"
            )

    def _set_timesteps(self, stock: dict[str, Any]) -> None:
        self._check_variance()
        timesteps, _ = retrieve_timesteps(
            self.scheduler,
            stock["num_inference_steps"],
            self._execution_device,
            stock["timesteps"],
            stock["sigmas"],
        )
        self._num_timesteps = len(timesteps)

    @property
    def _encoding(self) -> dict[str, Any]:
        """Arguments of the stock ``encode_prompt`` that are none of the call."""
        return {
            "device": self._execution_device,
            "do_classifier_free_guidance": self.do_classifier_free_guidance,
            "lora_scale": (self.cross_attention_kwargs or {}).get("scale"),
        }

    def _prepared(
        self,
        stock: dict[str, Any],
        draws: int | None,
        conditional: dict[str, Any],
        unconditional: dict[str, Any],
    ) -> Prepared:
        """The UNet under this conditioning and that of the call's images, and the first noise.

        Args:
            stock: the stock arguments.
            draws: latents that are drawn; ``None`` for one an image.
            conditional: arguments of the UNet, with a row for each image.
            unconditional: the same for the negative prompts, of use with guidance only.
        """
        images, channels, *_ = self._latent_shape(stock)
        dtype, device = conditional["encoder_hidden_states"].dtype, self._execution_device
        first_latents = self.prepare_latents(
            images if draws is None else draws,
            channels,
            stock["height"],
            stock["width"],
            dtype,
            device,
            stock["generator"],
            stock["latents"],
        )
        if stock["ip_adapter_image"] is not None or stock["ip_adapter_image_embeds"] is not None:
            adapters = self.prepare_ip_adapter_image_embeds(
                stock["ip_adapter_image"],
                stock["ip_adapter_image_embeds"],
                device,
                images,
                self.do_classifier_free_guidance,
            )
            # Negative rows first, where there is guidance.
            halves = [
                part.chunk(2) if self.do_classifier_free_guidance else (part, part)
                for part in adapters
            ]
            for side, arguments in enumerate((unconditional, conditional)):
                added = arguments.get("added_cond_kwargs") or {}
                arguments["added_cond_kwargs"] = added | {
                    "image_embeds": [half[side] for half in halves]
                }
        if self.unet.config.time_cond_proj_dim is not None:
            conditional["timestep_cond"] = self.get_guidance_scale_embedding(
                torch.tensor(self.guidance_scale - 1).repeat(images),
                embedding_dim=self.unet.config.time_cond_proj_dim,
            ).to(device=device, dtype=first_latents.dtype)

        kwargs = self.cross_attention_kwargs

        def denoise(latents: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
            output: Tensor = self.unet(
                latents,
                timesteps,
                cross_attention_kwargs=kwargs,
                return_dict=False,
                **conditioning,
            )[0]
            return output

        network = RescaledNetwork(
            denoise,
            conditional,
            unconditional if self.do_classifier_free_guidance else None,
            self.guidance_scale,
            guidance_rescale=self.guidance_rescale,
        )
        return Prepared(
            network=network,
            decoder=self._decoder(),
            preview=None if self.preview_vae is None else VaeDecoder(self.preview_vae),
            first_latents=first_latents,
            features=FeatureTap(self.unet, rows_per_latent=network.rows_per_latent),
            prompt_embeds=conditional["encoder_hidden_states"],
        )

    def _decoder(self) -> VaeDecoder:
        """What decodes finished samples."""
        return VaeDecoder(self.vae)

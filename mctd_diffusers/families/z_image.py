"""Z-Image: the stock pipeline, searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.calls import Prepared
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.parts import GuidedNetwork, call_by_names, encoded_in_calls
from mctd_diffusers.families.searching import searches
from mctd_diffusers.families.transformers import TransformerFamily, padded


@dataclass
class NormedNetwork(GuidedNetwork):
    """A guided network whose output may be kept from growing.

    Attributes:
        normalization: the most that guidance may scale the norm of a sample by; 0 for no bound.
    """

    normalization: float = 0.0

    def guided(
        self,
        conditional: Float[Tensor, "batch *sample"],
        unconditional: Float[Tensor, "batch *sample"],
        scale: float,
    ) -> Float[Tensor, "batch *sample"]:
        """Classifier-free guidance, counted from the conditional output, then the bound."""
        guided = conditional + scale * (conditional - unconditional)
        if self.normalization > 0.0:
            for row, without in enumerate(conditional):
                most = torch.linalg.vector_norm(without) * self.normalization
                norm = torch.linalg.vector_norm(guided[row])
                if norm > most:
                    guided[row] *= most / norm
        return guided


@searches(ZImagePipeline)
class MCTDZImagePipeline(TransformerFamily, ZImagePipeline):
    """Text-to-image generation with Z-Image, searched for the best reward.

    Texts are padded as little as the transformer does it by itself: each of its calls holds prompts
    of one padded length alone.
    """

    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "preview_vae", "ige"]
    default_size: ClassVar[int] = 1024

    def _fill_in(self, stock: dict[str, Any]) -> None:
        for side in ("height", "width"):
            stock[side] = stock[side] or self.default_size

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        self._check_transformer(stock)
        step = 2 * self.vae_scale_factor
        for side in ("height", "width"):
            if stock[side] % step:
                raise ConfigError(f"{side}={stock[side]}: give a multiple of {step}")
        if stock["prompt"] is None and stock["prompt_embeds"] is None:
            raise ConfigError("there is no prompt: give prompt=... or prompt_embeds=...")
        if not self.do_classifier_free_guidance:
            return
        if stock["prompt"] is None and stock["negative_prompt_embeds"] is None:
            raise ConfigError("prompt_embeds need negative_prompt_embeds=... beside them")
        if stock["cfg_truncation"] is not None and stock["cfg_truncation"] < 1:
            raise ConfigError(
                f"cfg_truncation={stock['cfg_truncation']} ends guidance at some step, and a "
                "search guides all: leave it at 1, or call with search=None"
            )

    @property
    def _block_channels(self) -> int:
        return int(self.transformer.dim)

    def _set_timesteps(self, stock: dict[str, Any]) -> None:
        rows, columns = self._latent_shape(stock)[-2:]
        sigmas = stock["sigmas"]
        if sigmas is None:
            sigmas = get_default_z_image_sigmas(stock["num_inference_steps"])
        self._set_sigmas(stock, sigmas, mu=self._shift((rows // 2) * (columns // 2)))

    def _prepare(
        self, stock: dict[str, Any], prompts_per_call: int, draws: int | None = None
    ) -> Prepared:
        count, guides = stock["num_images_per_prompt"], self.do_classifier_free_guidance

        def encode(some: dict[str, Any]) -> Any:
            sides = some["prompt_embeds"], some["negative_prompt_embeds"] if guides else []
            if some["prompt"] is not None:
                sides = call_by_names(self.encode_prompt, some, do_classifier_free_guidance=guides)
            return [[text for text in side for _ in range(count)] for side in sides]

        positive, negative = encoded_in_calls(stock, prompts_per_call, encode)
        texts, images = padded([*positive, *negative]), len(positive)
        sides = [
            {name: rows[half] for name, rows in texts.items()}
            for half in (slice(images), slice(images, None))
        ]
        kwargs = self.joint_attention_kwargs

        def denoise(
            latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, lengths: Tensor
        ) -> Tensor:
            rows = zip(encoder_hidden_states, lengths.tolist(), strict=True)
            velocities = self.transformer(
                list(latents.to(self.transformer.dtype).unsqueeze(2).unbind(dim=0)),
                (1000 - timesteps) / 1000,
                [text[:length] for text, length in rows],
                joint_attention_kwargs=kwargs,
                return_dict=False,
            )[0]
            return -torch.stack([velocity.float() for velocity in velocities]).squeeze(2)

        network = NormedNetwork(
            denoise,
            sides[0],
            sides[1] if guides else None,
            self.guidance_scale,
            positive_first=True,
            normalization=float(stock["cfg_normalization"] or 0.0),
        )
        lengths = [-(-side["lengths"] // SEQ_MULTI_OF) for side in sides[: 1 + guides]]
        kinds = torch.stack(lengths, dim=1).tolist()
        return self._prepared(
            stock,
            network,
            self._first_latents(stock, draws, torch.float32),
            kinds=[tuple(kind) for kind in kinds],
        )

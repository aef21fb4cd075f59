"""What families with a transformer share: taps by block, shifted latents, calls for each half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.calls import Prepared
from mctd_diffusers.denoising.denoiser import FeatureTap, tappable_blocks
from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.parts import GuidedNetwork, VaeDecoder, rows_of
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import TEXT_ARGUMENTS


@dataclass
class TwoCallNetwork(GuidedNetwork):
    """A guided network that is called for the negative rows and for the positive ones apart."""

    def __call__(
        self, latents: Float[Tensor, "batch *sample"], timesteps: Tensor, problems: Sequence[int]
    ) -> Outputs:
        """Evaluate scaled inputs at per-row timesteps, each under its problem's conditioning."""
        rows = torch.as_tensor(problems, dtype=torch.long, device=latents.device)
        timesteps = timesteps.to(latents.device)
        # The positive rows last, since a tap reads the last call.
        unconditional, conditional = (
            None if side is None else self.denoise(latents, timesteps, **rows_of(side, rows))
            for side in (self.unconditional, self.conditional)
        )
        assert conditional is not None
        return Outputs(conditional, unconditional)


@dataclass(frozen=True)
class ShiftedVaeDecoder(VaeDecoder):
    """Decodes latents that were shifted as well as scaled.

    Attributes:
        unpack: tokens to latents, ``[batch, channels, height, width]``; ``None`` where latents are
            not packed.
    """

    unpack: Callable[[Tensor], Tensor] | None = None

    def unscaled(
        self, latents: Float[Tensor, "batch *sample"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Latents as the autoencoder knows them."""
        unpacked = latents if self.unpack is None else self.unpack(latents)
        return super().unscaled(unpacked) + self.vae.config.shift_factor


READERS: Final = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""What reads prompts, where a pipeline has it; needless with embeddings of them."""


class TransformerFamily(MCTDPipeline):
    """Base of the families whose denoiser is a transformer."""

    def _feature_channels(self) -> dict[str, int]:
        """Two of each block's channels, as `FeatureTap` reads them, and three of the latents'."""
        channels = self.transformer.inner_dim
        blocks = {name: 2 * channels for name in tappable_blocks(self.transformer)}
        return blocks | {"estimate": 3 * self.transformer.config.in_channels}

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        lacking = [name for name in READERS if getattr(self, name, self) is None]
        if lacking and any(stock.get(name) is not None for name in TEXT_ARGUMENTS):
            raise ConfigError(
                f"the pipeline has no {' and no '.join(lacking)} to read prompts with: load it "
                f"with {lacking[0]}=..., or pass prompt_embeds=..., and reward_prompt=..."
            )
        if getattr(self.transformer, "is_cache_enabled", False):
            raise ConfigError(
                "the transformer's cache keeps what it computed a step ago, and a search goes from "
                "one sample to another: call pipe.transformer.disable_cache() first"
            )
        super()._check_inputs(stock)

    def _first_latents(self, stock: dict[str, Any], draws: int | None, dtype: torch.dtype) -> Any:
        """What the stock ``prepare_latents`` makes; see `_prepare` for ``draws``."""
        images, *_ = self._latent_shape(stock)
        return self.prepare_latents(
            images if draws is None else draws,
            self._latent_channels,
            stock["height"],
            stock["width"],
            dtype,
            self._execution_device,
            stock["generator"],
            stock["latents"],
        )

    @property
    def _latent_channels(self) -> int:
        """Channels of latents before they are packed."""
        return int(self.transformer.config.in_channels)

    def _prepared(
        self,
        stock: dict[str, Any],
        network: GuidedNetwork,
        first_latents: Tensor,
        unpack: Callable[[Tensor], Tensor] | None = None,
    ) -> Prepared:
        """The network with decoders of shifted latents, and with a tap on its blocks.

        Of blocks those are read that the information gain evaluator reads; without one some, along
        the depth.
        """
        images, *_ = self._latent_shape(stock)
        for side in (network.conditional, network.unconditional or network.conditional):
            if (rows := len(side["encoder_hidden_states"])) != images:
                raise ConfigError(
                    f"there are {rows} embeddings of prompts for {images} images: give one for "
                    "each, which num_images_per_prompt does not do for embeddings here"
                )
        blocks = tappable_blocks(self.transformer)
        if self.ige is None:
            names = [name for i, name in enumerate(blocks) if i % -(-len(blocks) // 4) == 0]
        else:
            names = [name for name in blocks if name in self.ige.config["feature_channels"]]
        rows_per_latent = 1 if isinstance(network, TwoCallNetwork) else network.rows_per_latent
        preview = self.preview_vae and ShiftedVaeDecoder(self.preview_vae, unpack)
        return Prepared(
            network=network,
            decoder=ShiftedVaeDecoder(self.vae, unpack),
            preview=preview,
            first_latents=first_latents,
            features=FeatureTap(self.transformer, rows_per_latent=rows_per_latent, names=names),
        )

"""What families with a transformer share: taps by block, shifted latents, calls for each half."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mctd_diffusers.calls import Prepared, num_prompts
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

    @property
    def _block_channels(self) -> int:
        """Channels of what its blocks give."""
        return int(self.transformer.inner_dim)

    def _feature_channels(self) -> dict[str, int]:
        """Two of each block's channels, as `FeatureTap` reads them, and three of the latents'."""
        blocks = {name: 2 * self._block_channels for name in tappable_blocks(self.transformer)}
        return blocks | {"estimate": 3 * self.transformer.config.in_channels}

    def _fill_in(self, stock: dict[str, Any]) -> None:
        size = self.default_sample_size * self.vae_scale_factor
        stock["height"], stock["width"] = stock["height"] or size, stock["width"] or size

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        self._check_transformer(stock)
        super()._check_inputs(stock)

    def _check_transformer(self, stock: dict[str, Any]) -> None:
        """Refuse prompts that nothing reads, and a transformer that is none of this family's."""
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
        config = self.transformer.config
        given = config.get("out_channels") or config.in_channels
        if given not in (config.in_channels, self._latent_channels):
            raise ConfigError(
                f"the {type(self.transformer).__name__} gives {given} channels for latents of "
                f"{config.in_channels}, which the stock pipeline does not step: load the "
                "transformer of a text-to-image model"
            )

    def _latent_shape(self, stock: dict[str, Any]) -> tuple[int, ...]:
        images = num_prompts(stock) * stock["num_images_per_prompt"]
        rows, columns = (stock[side] // self.vae_scale_factor for side in ("height", "width"))
        return images, self.transformer.config.in_channels, rows, columns

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
        kinds: Sequence[Hashable] | None = None,
    ) -> Prepared:
        """The network with its decoders, and with a tap on its blocks.

        Of blocks those are read that the information gain evaluator reads; without one some, along
        the depth.

        Args:
            stock: the stock arguments.
            network: conditioned on every image.
            first_latents: initial noise of each image.
            unpack: as for `ShiftedVaeDecoder`.
            kinds: as for `Prepared`.
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
        features = FeatureTap(
            self.transformer,
            rows_per_latent=1 if isinstance(network, TwoCallNetwork) else network.rows_per_latent,
            conditional_first=network.positive_first,
            names=names,
        )
        return Prepared(
            network=network,
            decoder=self._decoder(self.vae, unpack),
            preview=self.preview_vae and self._decoder(self.preview_vae, unpack),
            first_latents=first_latents,
            features=features,
            kinds=kinds,
            prompt_embeds=network.conditional["encoder_hidden_states"],
        )

    def _decoder(self, vae: Any, unpack: Callable[[Tensor], Tensor] | None) -> VaeDecoder:
        """What decodes by an autoencoder, or by one for previews."""
        return ShiftedVaeDecoder(vae, unpack)

    def _shift(self, tokens: int, max_shift: float = 1.15) -> float:
        """How far the schedule is shifted for so many tokens, as the stock pipelines reckon it.

        Args:
            tokens: of an image.
            max_shift: where the scheduler's config names none.
        """
        config = self.scheduler.config
        shift: float = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", max_shift),
        )
        return shift

    def _requested_sigmas(self, stock: dict[str, Any]) -> Any:
        """Those of the call, or falling ones; ``None`` for a scheduler that has its own."""
        if self.scheduler.config.get("use_flow_sigmas"):
            return None
        if stock["sigmas"] is None:
            return falling_sigmas(stock["num_inference_steps"])
        return stock["sigmas"]

    def _set_sigmas(self, stock: dict[str, Any], sigmas: Any, **shift: float) -> None:
        """Prepare the scheduler for these noise levels, or for its own where there are none."""
        try:
            timesteps, _ = retrieve_timesteps(
                self.scheduler,
                stock["num_inference_steps"],
                self._execution_device,
                sigmas=sigmas,
                **shift,
            )
        except AssertionError as error:
            name = type(self.scheduler).__name__
            raise ConfigError(
                f"this pipeline shifts its schedule by mu={shift.get('mu')}, which {name} takes "
                "only with use_dynamic_shifting=True and time_shift_type='exponential': set both, "
                "or use FlowMatchEulerDiscreteScheduler"
            ) from error
        self._num_timesteps = len(timesteps)


class PackedFamily(TransformerFamily):
    """Base of the families whose latents are tokens, each of a patch of 2 by 2."""

    def _latent_shape(self, stock: dict[str, Any]) -> tuple[int, ...]:
        images = num_prompts(stock) * stock["num_images_per_prompt"]
        rows, columns = (stock[side] // (2 * self.vae_scale_factor) for side in ("height", "width"))
        return images, rows * columns, self.transformer.config.in_channels

    @property
    def _latent_channels(self) -> int:
        return int(self.transformer.config.in_channels) // 4

    def _unpacking(self, stock: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """What makes latents of tokens, by the stock code."""
        rows, columns = stock["height"], stock["width"]
        return lambda tokens: self._unpack_latents(tokens, rows, columns, self.vae_scale_factor)


def negative_of(stock: dict[str, Any]) -> dict[str, Any]:
    """The stock arguments with what they say of negative prompts said of the prompts."""
    sign = "negative_"
    return stock | {
        name.removeprefix(sign): given for name, given in stock.items() if name.startswith(sign)
    }


def falling_sigmas(steps: int) -> npt.NDArray[np.float64]:
    """The noise levels that stock pipelines ask for, from 1 down, before they are shifted."""
    return np.linspace(1.0, 1 / steps, steps)


def padded(rows: Sequence[Float[Tensor, "_ channels"]]) -> dict[str, Tensor]:
    """Texts of any lengths as a batch, with their lengths, which stay on the host."""
    return {
        "encoder_hidden_states": pad_sequence(list(rows), batch_first=True),
        "lengths": torch.tensor([len(row) for row in rows]),
    }

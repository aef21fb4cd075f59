"""Feature maps of a UNet back to denoised estimates.

Samples that were fused in the space of the denoiser's features have to become latents again. A
small convolutional network learns that on logged trajectories: it reads the map of one block, and
how noisy the sample was, and answers the denoised estimate. Features hold, at every place, what the
sample looks like around it; what they leave out, the network fills in by its mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.hub import card_text
from mctd_diffusers.models.hub_model import HubModel
from mctd_diffusers.models.ige import FeatureNorm, waves

_WIDEST = (-20.0, 20.0)


class FeatureToLatent(HubModel, ModelMixin, ConfigMixin):
    r"""Maps features of one block of a UNet to denoised estimates.

    It keeps the protocol [`~mctd_diffusers.denoising.protocols.FeatureDecoder`].

    Args:
        family (`str`):
            Class name of the stock pipeline whose features it reads.
        block (`str`):
            The block, by its name among `mctd_diffusers.denoising.denoiser.mappable_blocks`.
        feature_channels (`int`):
            Channels of the block.
        latent_channels (`int`, *optional*, defaults to 4):
            Channels of the latents.
        scale_factor (`int`, *optional*, defaults to 1):
            Rows of the latents for each row of the features, a power of 2.
        hidden_size (`int`, *optional*, defaults to 64):
            Channels inside.
        num_layers (`int`, *optional*, defaults to 2):
            Residual layers.
        num_feature_levels (`int`, *optional*, defaults to 10):
            Noise levels at which mean and deviation of features and estimates are kept.
        log_snr_range (`tuple[float, float]`, *optional*):
            Lowest and highest log signal-to-noise ratio that it was trained at; beyond them it
            answers as at the nearer of them. `None` for -20 to 20.
        guidance_scales (`list[float]`, *optional*):
            Guidance scales of the estimates that it was trained on.

    Example:
    ```py
    >>> import torch
    >>> from mctd_diffusers.models.feature_decoder import FeatureToLatent

    >>> decoder = FeatureToLatent("StableDiffusionPipeline", "up.0", 32, scale_factor=2)
    >>> decoder(torch.randn(3, 32, 8, 8), signal=0.6, noise=0.8).shape
    torch.Size([3, 4, 16, 16])

    ```
    """

    @register_to_config
    def __init__(
        self,
        family: str,
        block: str,
        feature_channels: int,
        latent_channels: int = 4,
        scale_factor: int = 1,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_feature_levels: int = 10,
        log_snr_range: Sequence[float] | None = None,
        guidance_scales: Sequence[float] = (),
    ) -> None:
        super().__init__()
        doublings = scale_factor.bit_length() - 1
        if scale_factor < 1 or scale_factor != 2**doublings:
            raise ConfigError(
                f"scale_factor is {scale_factor}; latents are 1, 2, 4, ... times as large as the "
                "map of a block"
            )
        self.norm = FeatureNorm(feature_channels, num_feature_levels)
        self.estimates = FeatureNorm(latent_channels, num_feature_levels)
        self.first = nn.Conv2d(feature_channels, hidden_size, 3, padding=1)
        self.level = nn.Linear(waves(torch.zeros(1)).shape[-1], 2 * hidden_size)
        self.layers = nn.ModuleList(_Layer(hidden_size) for _ in range(num_layers))
        self.larger = nn.ModuleList(
            nn.Conv2d(hidden_size, hidden_size, 3, padding=1) for _ in range(doublings)
        )
        self.last = nn.Conv2d(hidden_size, latent_channels, 3, padding=1)

    @property
    def block(self) -> str:
        """Name of the block that it reads."""
        return str(self.config["block"])

    def forward(
        self,
        features: Float[Tensor, "batch channels feature_rows feature_columns"],
        signal: float | Float[Tensor, " batch"],
        noise: float | Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch latent_channels rows columns"]:
        r"""Denoised estimates of samples with these features.

        Args:
            features (`torch.Tensor`):
                Of the block, as it computed them at the samples.
            signal (`float` or `torch.Tensor`):
                Factor of the clean latents in the samples, one for all or one each.
            noise (`float` or `torch.Tensor`):
                Factor of their noise. Only the ratio of the two counts, so samples of any scheduler
                will do.

        Returns:
            `torch.Tensor`: clean latents, in the precision of the weights.

        Raises:
            ConfigError: the features are of another block or model.
        """
        self.check_features(features)
        log_snr = self._log_snr(signal, noise, len(features)).to(features.device)
        dtype = self.first.weight.dtype
        places = features.shape[-2] * features.shape[-1]
        normed = self.norm(_places(features), log_snr.repeat_interleave(places))
        batch, channels, *size = features.shape
        hidden = self.first(normed.view(batch, *size, channels).movedim(-1, 1).to(dtype))
        scale, shift = self.level(waves(log_snr).to(dtype))[:, :, None, None].chunk(2, dim=1)
        hidden = hidden * (1 + scale) + shift
        for layer in self.layers:
            hidden = layer(hidden)
        for convolution in self.larger:
            hidden = convolution(nn.functional.interpolate(hidden, scale_factor=2.0))
            hidden = nn.functional.silu(hidden)
        mean, deviation = (one[:, :, None, None] for one in self.estimates.moments(log_snr))
        clean: Tensor = mean + deviation * self.last(nn.functional.silu(hidden)).float()
        return clean.to(dtype)

    def _log_snr(
        self, signal: float | Tensor, noise: float | Tensor, batch: int
    ) -> Float[Tensor, " batch"]:
        """Within the range that it was trained at; no signal at all is the low end."""
        signal, noise = torch.as_tensor(signal), torch.as_tensor(noise)
        log_snr = 2 * (signal.double().log() - noise.double().log())
        low, high = self.config["log_snr_range"] or _WIDEST
        return log_snr.clamp(low, high).float().expand(batch)

    @torch.no_grad()
    def fit(
        self,
        features: Float[Tensor, "states channels feature_rows feature_columns"],
        denoised: Float[Tensor, "states latent_channels rows columns"],
        log_snr: Float[Tensor, " states"],
    ) -> None:
        r"""Learn what features and estimates usually are, before anything else is trained.

        Args:
            features (`torch.Tensor`):
                Of some states of a log.
            denoised (`torch.Tensor`):
                Denoised estimates of these states.
            log_snr (`torch.Tensor`):
                Their log signal-to-noise ratios.

        Raises:
            ConfigError: the features are of another block or model.
        """
        self.check_features(features)
        for norm, maps in ((self.norm, features), (self.estimates, denoised)):
            places = maps.shape[-2] * maps.shape[-1]
            norm.fit(_places(maps), log_snr.repeat_interleave(places))

    def deviation(self, log_snr: Float[Tensor, " batch"]) -> Float[Tensor, "batch channels 1 1"]:
        """Deviation of estimates at noise levels: the unit in which errors count alike at each."""
        return self.estimates.moments(log_snr)[1][:, :, None, None]

    def check_features(self, features: Tensor) -> None:
        """Refuse features of another block or model.

        Raises:
            ConfigError: they are not over space, or of another number of channels.
        """
        channels = self.config["feature_channels"]
        if features.ndim != 4 or features.shape[1] != channels:
            raise ConfigError(
                f"this feature decoder reads maps [batch, {channels}, rows, columns] of block "
                f"{self.block} of a {self.config['family']}, these have shape "
                f"{tuple(features.shape)}: read that block, or train a decoder for this one"
            )

    def check_family(self, family: str) -> None:
        """Refuse to read the features of another kind of pipeline.

        Args:
            family: class name of the stock pipeline.

        Raises:
            ConfigError: it was trained on another.
        """
        if family != self.config["family"]:
            raise ConfigError(
                f"this feature decoder is for a {self.config['family']}, the pipeline is a "
                f"{family}: train one for it by training/train_feature_decoder.py"
            )

    # The Hub

    def card(self, repo_id: str, **metadata: Any) -> str:
        r"""Model card of what the decoder was trained on, and how to load it.

        Args:
            repo_id (`str`):
                Name of its repository.
            metadata (*optional*):
                Further entries of the card's head, such as `base_model` and `license`.
        """
        config = self.config
        rows = {
            "pipeline": f"`{config['family']}`",
            "block": f"`{self.block}`, {config['feature_channels']} channels",
            "latents": f"{config['latent_channels']} channels, {config['scale_factor']} times as "
            "large as the map",
            "guidance scales": ", ".join(map(str, config["guidance_scales"])),
            "log-SNR": " to ".join(f"{level:.2f}" for level in config["log_snr_range"] or ()),
            "parameters": f"{self.num_parameters():,}",
        }
        table = "\n".join(f"| {row} | {text} |" for row, text in rows.items() if text)
        name = repo_id.rsplit("/", maxsplit=1)[-1]
        return card_text(
            {"library_name": "mctd-diffusers", "tags": ["mctd-diffusers"], **metadata},
            f"""# {name}

A feature decoder: it maps features of a block of a UNet, at any noise level, to denoised estimates,
so that samples can be fused in the space of features.

| trained on | |
| --- | --- |
{table}

```python
from mctd_diffusers import FeatureToLatent

decoder = FeatureToLatent.from_pretrained("{repo_id}")
```
""",
        )


class _Layer(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(size, size, 3, padding=1)
        self.outer = nn.Conv2d(size, size, 3, padding=1)

    def forward(
        self, hidden: Float[Tensor, "batch size rows columns"]
    ) -> Float[Tensor, "batch size rows columns"]:
        inner = self.inner(nn.functional.silu(hidden))
        return hidden + self.outer(nn.functional.silu(inner))


def _places(
    features: Float[Tensor, "batch channels rows columns"],
) -> Float[Tensor, "places channels"]:
    """Every place of every map by itself."""
    return features.movedim(1, -1).flatten(0, 2)

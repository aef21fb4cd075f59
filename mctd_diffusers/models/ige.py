"""The information gain evaluator (IGE): what a jump from x_t would tell, before it is made.

From features of the denoiser at a state, which its evaluation leaves behind anyway, a small network
predicts for any jump down the schedule

- the mean gain of the calibrated value (about 0: a perfect value is a martingale),
- the log variance of the value after the jump given the state, which is what the jump *resolves*,
- how similar the estimate after the jump is to the finished sample,
- the log truncation error of the jump: how far a stride leads off the path of fine steps.

A jump is named by the log signal-to-noise ratio (log-SNR) of its two ends, not by step indices, so
one head serves other grids and schedulers. Without features it speaks of the *typical* state, from
which a search plans the rest of a schedule.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor, nn

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.hub import card_text
from mctd_diffusers.models.hub_model import HubModel
from mctd_diffusers.search.environment import Gains

_OCTAVES = 16
_LOG_SNR_SCALE = 20.0  # half of the longest wave; usual schedules lie within -12 to 12
_FAR = 5.0  # deviations from the mean, beyond which features say no more
_TOLERANCE = 1e-3  # of noise levels that are computed in other ways, in units of log-SNR


@dataclass
class IGEOutput(BaseOutput):
    r"""Predictions for jumps, each `[batch, jumps]`.

    Args:
        mean_gain (`torch.Tensor`):
            Mean of the change of the calibrated value over the jump, in reward units.
        log_variance (`torch.Tensor`):
            Log of the variance of the calibrated value after the jump given the state, in squared
            reward units.
        final_similarity (`torch.Tensor`):
            Cosine of the denoised estimate after the jump with the finished latents, -1 to 1.
        log_truncation_error (`torch.Tensor`):
            Natural log of the root mean square difference between the latents after the jump and
            after fine steps, in variance-preserving units.
    """

    mean_gain: Tensor
    log_variance: Tensor
    final_similarity: Tensor
    log_truncation_error: Tensor


class InformationGainEvaluator(HubModel, ModelMixin, ConfigMixin):
    r"""Predicts what jumps from evaluated states would tell.

    Args:
        family (`str`):
            Class name of the stock pipeline whose features it reads.
        feature_channels (`dict[str, int]`):
            Numbers in each block of features, by the name of the block.
        embedding_size (`int`, *optional*, defaults to 32):
            Size to which each block of features is projected.
        hidden_size (`int`, *optional*, defaults to 128):
            Width of the trunk.
        num_layers (`int`, *optional*, defaults to 3):
            Residual layers of the trunk.
        feature_dropout (`float`, *optional*, defaults to 0.0):
            Share of the features that is dropped while training.
        embedding_dropout (`float`, *optional*, defaults to 0.0):
            Share of their projections that is dropped while training.
        num_feature_levels (`int`, *optional*, defaults to 10):
            Noise levels at which mean and deviation of the features are kept.
        num_levels (`int`, *optional*, defaults to 0):
            Noise levels of the table of jump costs.
        reward_scale (`float`, *optional*, defaults to 1.0):
            Standard deviation of the reward that it was trained for, its unit inside.
        log_snr_range (`tuple[float, float]`, *optional*):
            Lowest and highest log-SNR that it was trained at; `None` for any.
        grids (`list[int]`, *optional*):
            Numbers of steps that it was trained on.
        schedulers (`list[str]`, *optional*):
            Class names of the schedulers that it was trained on.
        guidance_scales (`list[float]`, *optional*):
            Guidance scales that it was trained at.
        calibration (`dict[str, list[float]]`, *optional*):
            What turns values into calibrated values, see `models.calibration.Calibration`.

    Attributes:
        jump_log_snr (`torch.Tensor`):
            Noise levels of the table, rising, `[levels]`.
        jump_cost (`torch.Tensor`):
            Mean latent error of one deterministic jump between two levels, in latent units,
            `[levels, levels]`; NaN where the second does not come after the first.

    Example:
    ```py
    >>> import torch
    >>> from mctd_diffusers.models.ige import InformationGainEvaluator

    >>> ige = InformationGainEvaluator("StableDiffusionPipeline", {"mid": 8})
    >>> features = {"mid": torch.randn(2, 8)}
    >>> source, target = torch.tensor([-3.0, -2.0]), torch.tensor([[-2.5, -1.0], [-1.5, 0.0]])
    >>> ige(features, source, target).log_truncation_error.shape
    torch.Size([2, 2])
    >>> ige(None, source, target).mean_gain.shape  # of the typical state
    torch.Size([2, 2])

    ```
    """

    jump_log_snr: Tensor
    jump_cost: Tensor

    @register_to_config
    def __init__(
        self,
        family: str,
        feature_channels: dict[str, int],
        embedding_size: int = 32,
        hidden_size: int = 128,
        num_layers: int = 3,
        feature_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        num_feature_levels: int = 10,
        num_levels: int = 0,
        reward_scale: float = 1.0,
        log_snr_range: Sequence[float] | None = None,
        grids: Sequence[int] = (),
        schedulers: Sequence[str] = (),
        guidance_scales: Sequence[float] = (),
        calibration: dict[str, list[float]] | None = None,
    ) -> None:
        super().__init__()
        if not feature_channels:
            raise ConfigError("feature_channels is empty; name at least one block and its channels")
        # Lists, not dictionaries: names of blocks hold dots, which names of modules must not.
        # In the order of their names, which a saved config has as well.
        sizes = [feature_channels[name] for name in sorted(feature_channels)]
        self.norms = nn.ModuleList(FeatureNorm(size, num_feature_levels) for size in sizes)
        self.projections = nn.ModuleList(nn.Linear(size, embedding_size) for size in sizes)
        self.features = nn.Linear(embedding_size * len(feature_channels), hidden_size)
        self.typical = nn.Parameter(torch.zeros(hidden_size))
        waves = 2 * _OCTAVES + 1
        self.source = nn.Linear(waves, hidden_size)
        self.target = nn.Linear(waves, hidden_size)
        self.drop_features = nn.Dropout(feature_dropout)
        self.drop_embedding = nn.Dropout(embedding_dropout)
        self.layers = nn.ModuleList(_Layer(hidden_size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, 4)
        self.register_buffer("jump_log_snr", torch.zeros(num_levels))
        self.register_buffer("jump_cost", torch.full((num_levels, num_levels), torch.nan))

    def forward(
        self,
        features: Mapping[str, Float[Tensor, "batch _"]] | None,
        source_log_snr: Float[Tensor, " batch"],
        target_log_snr: Float[Tensor, "batch jumps"],
        is_typical: Tensor | None = None,
    ) -> IGEOutput:
        r"""Predict jumps of every state.

        Args:
            features (`dict[str, torch.Tensor]`, *optional*):
                Of each tapped block, `[batch, channels]`; `None` for the typical state.
            source_log_snr (`torch.Tensor`):
                Log-SNR of each state, `[batch]`.
            target_log_snr (`torch.Tensor`):
                Log-SNR of the ends of its jumps, above its own, `[batch, jumps]`.
            is_typical (`torch.Tensor`, *optional*):
                Rows whose features are passed over while training, `[batch]`, boolean.

        Returns:
            [`IGEOutput`]: each `[batch, jumps]`.

        Raises:
            ConfigError: the features are of another model.
        """
        state = self.typical.expand(len(source_log_snr), -1)
        if features is not None:
            self.check_features(features)
            seen = self.features(self._embed(features, source_log_snr))
            state = seen if is_typical is None else torch.where(is_typical[:, None], state, seen)
        state = state + self.source(waves(source_log_snr).to(state.dtype))
        hidden = state[:, None] + self.target(waves(target_log_snr).to(state.dtype))
        for layer in self.layers:
            hidden = layer(hidden)
        gain, variance, similarity, error = self.head(self.norm(hidden)).unbind(-1)
        scale = self.config["reward_scale"]
        return IGEOutput(
            mean_gain=scale * gain,
            log_variance=variance + 2 * math.log(scale),
            final_similarity=similarity.tanh(),
            log_truncation_error=error,
        )

    def _embed(
        self, features: Mapping[str, Float[Tensor, "batch _"]], log_snr: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch embedding"]:
        parts = [
            projection(
                self.drop_features(norm(features[name], log_snr).to(projection.weight.dtype))
            )
            for name, norm, projection in zip(
                sorted(self.config["feature_channels"]), self.norms, self.projections, strict=True
            )
        ]
        return self.drop_embedding(torch.cat(parts, dim=-1))

    @torch.no_grad()
    def fit_features(
        self, features: Mapping[str, Float[Tensor, "states _"]], log_snr: Float[Tensor, " states"]
    ) -> None:
        r"""Learn what features usually are at each noise level, before anything else is trained.

        Args:
            features (`dict[str, torch.Tensor]`):
                Of the states of a log, `[states, channels]`.
            log_snr (`torch.Tensor`):
                Of these states.

        Raises:
            ConfigError: the features are of another model.
        """
        self.check_features(features)
        for name, norm in zip(sorted(self.config["feature_channels"]), self.norms, strict=True):
            assert isinstance(norm, FeatureNorm)
            norm.fit(features[name], log_snr)

    @torch.no_grad()
    def predict(
        self,
        features: Mapping[str, Float[Tensor, "batch _"]] | None,
        source_log_snr: Float[Tensor, " batch"],
        target_log_snr: Float[Tensor, "batch jumps"],
    ) -> Gains:
        r"""Predict jumps for a search: float64 on the host, NaN where it does not know.

        It does not know of jumps from or to noise levels outside its range, of which it warns, nor
        of jumps whose target is NaN, such as those that lead past the end of a schedule.

        Args:
            features (`dict[str, torch.Tensor]`, *optional*):
                As for [`forward`].
            source_log_snr (`torch.Tensor`):
                As for [`forward`].
            target_log_snr (`torch.Tensor`):
                As for [`forward`]; may hold NaN.

        Returns:
            [`Gains`]: numpy arrays, each `[batch, jumps]`.

        Raises:
            ConfigError: the features are of another model.
        """
        device = self.typical.device
        if features is not None:
            features = {name: rows.to(device) for name, rows in features.items()}
        known = self.covers(source_log_snr)[:, None] & self.covers(target_log_snr)
        is_asked = ~target_log_snr.isnan()
        if (is_asked & ~known).any():
            low, high = self.config["log_snr_range"]
            asked = torch.cat([source_log_snr, target_log_snr[is_asked]])
            warnings.warn(
                f"log signal-to-noise ratios from {asked.min():.2f} to {asked.max():.2f} are asked "
                f"for, and this information gain evaluator was trained from {low:.2f} to "
                f"{high:.2f}: jumps outside fall back to the rule without a head",
                stacklevel=2,
            )
        target = torch.where(known, target_log_snr, source_log_snr[:, None])
        output = self.forward(features, source_log_snr.to(device), target.to(device))
        columns = (output[name].double().cpu() for name in Gains._fields)
        return Gains(*(column.masked_fill(~known, torch.nan).numpy() for column in columns))

    def covers(self, log_snr: Float[Tensor, "*batch"]) -> Tensor:
        """Whether it was trained at such noise levels, one boolean each; not at NaN."""
        low, high = self.config["log_snr_range"] or (-math.inf, math.inf)
        return (log_snr >= low - _TOLERANCE) & (log_snr <= high + _TOLERANCE)

    def check_features(self, features: Mapping[str, Tensor]) -> None:
        """Refuse features of another model.

        Raises:
            ConfigError: a block is missing, or has another number of channels.
        """
        expected = dict(self.config["feature_channels"])
        given = {name: feature.shape[-1] for name, feature in features.items()}
        if {name: given.get(name) for name in expected} != expected:
            raise ConfigError(
                f"this information gain evaluator reads features {expected} of a "
                f"{self.config['family']}, these are {given}: train one for this model, or load "
                "the model that it was trained on"
            )

    def check_family(self, family: str) -> None:
        """Refuse to judge states of another kind of pipeline.

        Args:
            family: class name of the stock pipeline.

        Raises:
            ConfigError: it was trained on another.
        """
        if family != self.config["family"]:
            raise ConfigError(
                f"this information gain evaluator is for a {self.config['family']}, the pipeline "
                f"is a {family}: train one for it, or leave ige out"
            )

    # The Hub

    def card(self, repo_id: str, **metadata: Any) -> str:
        r"""Model card of what the head was trained on, and how to load it.

        Args:
            repo_id (`str`):
                Name of its repository.
            metadata (*optional*):
                Further entries of the card's head, such as `base_model` and `license`.
        """
        config = self.config
        rows = {
            "pipeline": f"`{config['family']}`",
            "features": ", ".join(f"`{name}`" for name in sorted(config["feature_channels"])),
            "numbers of steps": ", ".join(map(str, config["grids"])),
            "schedulers": ", ".join(f"`{name}`" for name in config["schedulers"]),
            "guidance scales": ", ".join(map(str, config["guidance_scales"])),
            "log-SNR": " to ".join(f"{level:.2f}" for level in config["log_snr_range"] or ()),
            "parameters": f"{self.num_parameters():,}",
        }
        table = "\n".join(f"| {row} | {text} |" for row, text in rows.items() if text)
        name = repo_id.rsplit("/", maxsplit=1)[-1]
        return card_text(
            {"library_name": "mctd-diffusers", "tags": ["mctd-diffusers"], **metadata},
            f"""# {name}

An information gain evaluator: it predicts what strides of a diffusion sampler tell and cost, from
features of the denoiser, so that a search can choose them.

| trained on | |
| --- | --- |
{table}

```python
from mctd_diffusers import MCTDPipeline

pipe = MCTDPipeline.from_pretrained(..., ige="{repo_id}")
```
""",
        )


class FeatureNorm(nn.Module):
    """Brings features to mean 0 and deviation 1 at every noise level.

    Between its levels mean and deviation are linear in log-SNR. What is left says how a state
    differs from others as noisy; how noisy it is would otherwise drown that.

    Args:
        channels: of the features.
        num_levels: noise levels that are told apart.
    """

    log_snr: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__()
        self.register_buffer("log_snr", torch.linspace(-1, 1, num_levels))
        self.register_buffer("mean", torch.zeros(num_levels, channels))
        self.register_buffer("deviation", torch.ones(num_levels, channels))

    def forward(
        self, features: Float[Tensor, "batch channels"], log_snr: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch channels"]:
        """Standardised features, in single precision; far ones are held at 5 deviations."""
        mean, deviation = self.moments(log_snr)
        return ((features.float() - mean) / deviation).clamp(-_FAR, _FAR)

    def moments(
        self, log_snr: Float[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]:
        """Mean and deviation at noise levels, in single precision."""
        hats = _hats(log_snr.float(), self.log_snr.float())
        return hats @ self.mean.float(), hats @ self.deviation.float()

    def fit(
        self, features: Float[Tensor, "states channels"], log_snr: Float[Tensor, " states"]
    ) -> None:
        """Take mean and deviation from states by least squares, between levels at quantiles."""
        log_snr = log_snr.double().cpu()
        levels = log_snr.quantile(torch.linspace(0, 1, len(self.log_snr), dtype=torch.float64))
        hats, features = _hats(log_snr, levels), features.double().cpu()
        gram = torch.linalg.pinv(hats.T @ hats)  # levels may coincide, where there are few
        mean = gram @ (hats.T @ features)
        weights = hats / hats.sum(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
        deviation = (weights.T @ (features - hats @ mean).square()).sqrt()
        deviation[deviation == 0] = 1  # a constant, which says nothing
        for buffer, fitted in zip(
            (self.log_snr, self.mean, self.deviation), (levels, mean, deviation), strict=True
        ):
            buffer.copy_(fitted)


class _Layer(nn.Module):
    """A residual perceptron with its norm before it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.inner = nn.Linear(size, size)
        self.outer = nn.Linear(size, size)

    def forward(self, hidden: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return hidden + self.outer(nn.functional.silu(self.inner(self.norm(hidden))))


def _hats(
    log_snr: Float[Tensor, " batch"], levels: Float[Tensor, " levels"]
) -> Float[Tensor, "batch levels"]:
    """Weights of linear interpolation between levels, constant outside; each row adds up to 1."""
    place = torch.searchsorted(levels, log_snr.contiguous(), right=True).clamp(1, len(levels) - 1)
    low, high = levels[place - 1], levels[place]
    share = torch.where(high > low, (log_snr - low) / (high - low), 0.0).clamp(0, 1)
    hats = torch.zeros(len(log_snr), len(levels), dtype=log_snr.dtype, device=log_snr.device)
    hats.scatter_(1, place[:, None] - 1, (1 - share)[:, None])
    return hats.scatter_(1, place[:, None], share[:, None])


def waves(log_snr: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch waves"]:
    """The number itself and its sines and cosines, from long to short (Vaswani et al., 2017)."""
    scaled = log_snr[..., None].float() / _LOG_SNR_SCALE
    frequencies = 2.0 ** torch.linspace(0, 6, _OCTAVES, device=log_snr.device)
    angles = math.pi * scaled * frequencies
    return torch.cat([scaled, angles.sin(), angles.cos()], dim=-1)

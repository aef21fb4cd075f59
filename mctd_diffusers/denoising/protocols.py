"""What denoising needs from the rooms to its right, as protocols: reward, network, decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mctd_diffusers.denoising.environment import LatentEnvironment
    from mctd_diffusers.search.environment import Gains, Handles


@runtime_checkable
class RewardFn(Protocol):
    """Scores finished images; higher is better.

    A reward takes a batch and answers a batch, is equivariant to the order of the batch and does
    not look at the rest of it. One that wants ``PIL.Image`` objects instead of tensors has an
    attribute ``wants_pil = True``.
    """

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Sequence[float] | Float[Tensor, " batch"] | npt.NDArray[np.floating[Any]]:
        """Score ``images`` (RGB in [0, 1]) against ``prompts``; one finite float each."""
        ...


@runtime_checkable
class CheckedReward(Protocol):
    """A reward whose every answer is checked: what an environment calls."""

    def __call__(
        self,
        images: Float[Tensor, "batch 3 height width"],
        prompts: Sequence[str],
        handles: Sequence[int],
    ) -> npt.NDArray[np.float64]:
        """Score ``images``; one finite number each, or an error that carries ``handles``."""
        ...


class Outputs(NamedTuple):
    """The network's answer for a batch of latents, with guidance kept apart.

    Attributes:
        conditional: ``[batch, *sample]`` output under the prompt; of twice the channels where the
            network predicts its variance too, which `DDPMScheduler` reads.
        unconditional: the same without the prompt, or ``None`` where no guidance is used.
    """

    conditional: Float[Tensor, "batch *sample"]
    unconditional: Float[Tensor, "batch *sample"] | None


@runtime_checkable
class Network(Protocol):
    """One call of the pipeline's denoiser, as the family's stock pipeline makes it."""

    rows_per_latent: int
    """1, or 2 where classifier-free guidance doubles the batch (and gives two outputs)."""
    guidance_scale: float
    """The call's scale of guidance, which is used where ``rows_per_latent`` is 2."""

    def __call__(
        self,
        latents: Float[Tensor, "batch *sample"],
        timesteps: Float[Tensor, " batch"] | Tensor,
        problems: Sequence[int],
    ) -> Outputs:
        """Evaluate scaled inputs at per-row timesteps, each under its problem's conditioning."""
        ...

    def combine(
        self, outputs: Outputs, guidance: float | None = None
    ) -> Float[Tensor, "batch *sample"]:
        """Guided output, by the arithmetic of the stock pipeline.

        Args:
            outputs: with the unconditional ones, where guidance is used.
            guidance: scale in the place of the call's own, which ``None`` stands for.
        """
        ...


@runtime_checkable
class Decoder(Protocol):
    """Latents to images."""

    def __call__(
        self, latents: Float[Tensor, "batch *sample"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Images in [0, 1], as the stock pipeline would hand them to its image processor."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Clean latents to images and back, as the fusion ``pixel`` needs it."""

    def decode(
        self, clean: Float[Tensor, "batch *sample"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Images in [0, 1]."""
        ...

    def encode(
        self, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch *sample"]:
        """Clean latents of images; the same ones each time, so no draw from a law."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """Images to clean latents."""

    def encode(
        self, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch *sample"]:
        """Clean latents of images in [0, 1]; the same ones each time, so no draw from a law."""
        ...


@runtime_checkable
class FeatureDecoder(Protocol):
    """Clean latents by the features of one of the network's blocks."""

    @property
    def block(self) -> str:
        """Name of the block whose features it reads."""
        ...

    def __call__(
        self,
        features: Float[Tensor, "batch channels feature_rows feature_columns"],
        signal: float,
        noise: float,
    ) -> Float[Tensor, "batch *sample"]:
        """Denoised estimates of samples.

        Args:
            features: of that block, as it computed them at the samples.
            signal: factor of clean latents at the samples' noise level.
            noise: factor of noise there.
        """
        ...


@runtime_checkable
class GainModel(Protocol):
    """Says what jumps from evaluated samples would tell, before they are made.

    Attributes:
        reads_change: whether it asks how the denoised estimate changed since the parent's, which
            the environment then keeps.
    """

    reads_change: bool

    def __call__(
        self, environment: LatentEnvironment, handles: Handles, strides: Sequence[int]
    ) -> Gains:
        """Predict jumps of every stride from every sample, at no charge to its image.

        Args:
            environment: where the samples are; has their features and noise levels.
            handles: evaluated samples.
            strides: schedule steps of each jump; NaN is answered where they are more than are left.
        """
        ...

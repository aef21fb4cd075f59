"""What families are put together from: a guided network, a decoder, and encoding by the call.

A family calls the code of its stock pipeline wherever there is some (`call_by_names`), and says
with these parts how its network and its decoder are called, for any rows of any images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.calls import num_prompts
from mctd_diffusers.denoising.denoiser import chunks
from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.results import TEXT_ARGUMENTS


@dataclass
class GuidedNetwork:
    """A denoiser, called once for negative and positive rows, as most stock pipelines call theirs.

    Attributes:
        denoise: ``denoise(latents, timesteps, **conditioning) -> output``, for scaled latents at
            per-row timesteps. What the stock loop does around its network is done here.
        conditional: conditioning of the prompts: tensors with a row for each image, and dicts or
            lists of such; what is neither goes to every call as it is.
        unconditional: of the negative prompts, in the same form; ``None`` where guidance is off, or
            an input of the network.
        guidance_scale: as in the stock pipeline.
        rows_per_latent: 2 with classifier-free guidance, else 1.
        positive_first: whether the positive rows of a call come first.
    """

    denoise: Callable[..., Tensor]
    conditional: dict[str, Any]
    unconditional: dict[str, Any] | None
    guidance_scale: float
    rows_per_latent: int = field(init=False)
    positive_first: bool = False

    def __post_init__(self) -> None:
        self.rows_per_latent = 1 if self.unconditional is None else 2

    def __call__(
        self, latents: Float[Tensor, "batch *sample"], timesteps: Tensor, problems: Sequence[int]
    ) -> Outputs:
        """Evaluate scaled inputs at per-row timesteps, each under its problem's conditioning."""
        rows = torch.as_tensor(problems, dtype=torch.long, device=latents.device)
        timesteps = timesteps.to(latents.device)
        conditioning = rows_of(self.conditional, rows)
        if self.unconditional is None:
            return Outputs(self.denoise(latents, timesteps, **conditioning), None)
        # The order of most stock pipelines: negative rows, then positive ones.
        sides = [rows_of(self.unconditional, rows), conditioning]
        both = joined(sides[::-1] if self.positive_first else sides)
        output = self.denoise(torch.cat([latents] * 2), torch.cat([timesteps] * 2), **both)
        first, second = output.chunk(2)
        return Outputs(first, second) if self.positive_first else Outputs(second, first)

    def combine(
        self, outputs: Outputs, guidance: float | None = None
    ) -> Float[Tensor, "batch *sample"]:
        """Guided output, by the arithmetic of the stock pipeline."""
        conditional, unconditional = outputs
        if unconditional is None:
            return conditional
        scale = self.guidance_scale if guidance is None else guidance
        return self.guided(conditional, unconditional, scale)

    def guided(
        self,
        conditional: Float[Tensor, "batch *sample"],
        unconditional: Float[Tensor, "batch *sample"],
        scale: float,
    ) -> Float[Tensor, "batch *sample"]:
        """Classifier-free guidance; what a family overrides whose arithmetic is another."""
        return unconditional + scale * (conditional - unconditional)


def rows_of(conditioning: Any, rows: Tensor) -> Any:
    """Some rows of all tensors in nested dicts and lists; what is no tensor stays as it is."""
    if isinstance(conditioning, Tensor):
        return conditioning[rows.to(conditioning.device)]
    if isinstance(conditioning, dict):
        return {name: rows_of(part, rows) for name, part in conditioning.items()}
    if isinstance(conditioning, list):
        return [rows_of(part, rows) for part in conditioning]
    return conditioning


def joined(parts: Sequence[Any]) -> Any:
    """Rows of several equally nested dicts and lists of tensors, one after the other.

    What is no tensor is taken from the first.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, list):
        return [joined(list(some)) for some in zip(*parts, strict=True)]
    return first


def call_by_names(function: Callable[..., Any], stock: dict[str, Any], **others: Any) -> Any:
    """Call a method of the stock pipeline with those stock arguments of a call that it takes.

    Args:
        function: whose arguments have the names of those of the call.
        stock: the stock arguments.
        others: its arguments of other names, or with other values.
    """
    known = inspect.signature(function).parameters
    return function(**{name: given for name, given in stock.items() if name in known} | others)


def encoded_in_calls(
    stock: dict[str, Any],
    prompts_per_call: int,
    encode: Callable[[dict[str, Any]], Sequence[Any]],
) -> list[Any]:
    """Encode all prompts, ``prompts_per_call`` at once, the last call filled up by repetition.

    So a prompt's embedding does not depend on how many others there are.

    Args:
        stock: the stock arguments.
        prompts_per_call: prompts in each call of ``encode``.
        encode: takes stock arguments of so many prompts, and answers tensors (or lists) with
            ``num_images_per_prompt`` rows for each prompt, one after the other, or ``None``.

    Returns:
        Each of its answers, for all prompts.
    """
    answers = []
    for chunk in chunks(num_prompts(stock), prompts_per_call):
        prompts = [chunk.rows.start + row for row in chunk.filled]
        useful = stock["num_images_per_prompt"] * chunk.useful
        some = encode({name: _of_prompts(name, given, prompts) for name, given in stock.items()})
        answers.append([None if part is None else part[:useful] for part in some])
    return [
        list(chain.from_iterable(parts)) if isinstance(parts[0], list) else joined(parts)
        for parts in zip(*answers, strict=True)
    ]


def _of_prompts(name: str, given: Any, prompts: Sequence[int]) -> Any:
    """What a stock argument says of some prompts: all of it, if it is not one for each."""
    if given is None or not (name in TEXT_ARGUMENTS or "prompt_" in name):
        return given
    if isinstance(given, str):
        return [given] * len(prompts)
    return given[prompts] if isinstance(given, Tensor) else [given[row] for row in prompts]


@dataclass(frozen=True)
class VaeDecoder:
    """Decodes latents by an autoencoder, and denormalises as the stock image processor does.

    Attributes:
        vae: the autoencoder, or one for previews.
    """

    vae: AutoencoderKL | AutoencoderTiny

    def __call__(
        self, latents: Float[Tensor, "batch *sample"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Images in [0, 1]."""
        images = self.decoded(self.unscaled(latents.to(self.vae.dtype)))
        return (images * 0.5 + 0.5).clamp(0, 1)

    def encode(
        self, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch *sample"]:
        """Latents of images in [0, 1]: the likeliest, scaled as the pipeline scales them.

        Only where latents are no tokens: :meth:`unscaled` is turned around number by number.
        """
        law = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        latents: Tensor = law.mode()
        offset = self.unscaled(torch.zeros_like(latents))
        return (latents - offset) / (self.unscaled(torch.ones_like(latents)) - offset)

    def decoded(self, latents: Tensor) -> Float[Tensor, "batch 3 rows columns"]:
        """What the autoencoder makes of its latents: images in [-1, 1]."""
        images: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return images

    def unscaled(
        self, latents: Float[Tensor, "batch *sample"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Latents as the autoencoder knows them; what a family overrides that does more."""
        return latents / self.vae.config.scaling_factor


@dataclass(frozen=True)
class UpcastDecoder(VaeDecoder):
    """Decodes in single precision what overflows in half, and undoes a normalisation by channel."""

    def __call__(
        self, latents: Float[Tensor, "batch *sample"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Images in [0, 1]."""
        with self._upcast():
            return super().__call__(latents)

    def encode(
        self, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch *sample"]:
        """Latents of images in [0, 1]."""
        with self._upcast():
            return super().encode(images)

    @contextmanager
    def _upcast(self) -> Iterator[None]:
        if not (self.vae.dtype == torch.float16 and self.vae.config.force_upcast):
            yield
            return
        self.vae.to(torch.float32)
        try:
            yield
        finally:
            self.vae.to(torch.float16)

    def unscaled(
        self, latents: Float[Tensor, "batch *sample"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Latents as the autoencoder knows them."""
        config = self.vae.config
        stats = [getattr(config, name, None) for name in ("latents_mean", "latents_std")]
        if None in stats:
            return super().unscaled(latents)
        mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in stats)
        return latents * std / config.scaling_factor + mean

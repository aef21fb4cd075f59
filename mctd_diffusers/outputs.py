"""What a call hands back of what was searched: pictures, and what was found of each image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mctd_diffusers.calls import World, plain_sample_of
from mctd_diffusers.denoising.denoiser import Calls, Chunk
from mctd_diffusers.denoising.protocols import Decoder
from mctd_diffusers.results import ImageSearch, MCTDPipelineOutput, PlainSamples
from mctd_diffusers.search.environment import Ledger
from mctd_diffusers.search.runner import Finished, SearchResult


@dataclass(frozen=True)
class PictureMaker:
    """Makes pictures of samples, as a pipeline hands them out.

    Attributes:
        check_safety: what the pipeline does last to images in [0, 1]: the safety checker's verdict,
            ``None`` where no checker looked.
        as_latents: finished samples as the pipeline returns them for ``output_type="latent"``.
        postprocess: images in [0, 1] in the form asked for.
        put_away: offloads what decoding fetched, where the pipeline offloads.
    """

    check_safety: Callable[[Tensor], tuple[Tensor, list[bool] | None]]
    as_latents: Callable[[Tensor, Decoder], Tensor]
    postprocess: Callable[[Tensor, str], Any]
    put_away: Callable[[], None]

    def of_samples(
        self, world: World, samples: Sequence[Finished | None], output_type: str
    ) -> tuple[Any, list[bool] | None]:
        """Pictures of finished samples in the form asked for, and what the safety checker says."""
        handles = np.array([s.handle for s in samples if s is not None], dtype=np.int64)
        if not len(handles):
            return [None] * len(samples), None
        nsfw: list[bool] | None = None
        if output_type == "latent":
            pictures = self.as_latents(world.environment.denoised(handles), world.prepared.decoder)
        else:
            images, nsfw = self.check_safety(world.environment.images(handles))
            pictures = self.postprocess(images, output_type)
        if len(handles) == len(samples):
            return pictures, nsfw
        each, flags = iter(pictures), iter(nsfw or [])
        found = [None if s is None else next(each) for s in samples]
        return found, nsfw and [s is not None and next(flags) for s in samples]

    @torch.no_grad()
    def of_latents(
        self,
        decoder: Decoder,
        device: torch.device,
        rows_per_call: int,
        latents: Float[Tensor, "batch *sample"],
    ) -> list[Image.Image]:
        """Finished latents as pictures, in calls of the same size as in the search."""

        def decode(chunk: Chunk) -> Tensor:
            return decoder(chunk.fill(latents[chunk.rows]).to(device))

        pictures: list[Image.Image] = []
        for chunk, images in Calls(rows_per_call, Ledger(), device).make(
            "decode", len(latents), decode
        ):
            pictures += self.postprocess(self.check_safety(images[: chunk.useful])[0], "pil")
        self.put_away()
        return pictures


def output_of(
    world: World,
    results: Sequence[SearchResult],
    maker: PictureMaker,
    *,
    output_type: str,
    includes_plain: bool,
) -> MCTDPipelineOutput:
    """The output of what was found: of each image the best sample, or the plain one.

    Args:
        world: that was searched.
        results: of each image, and then of their plain samples where they were made too.
        maker: makes the pictures.
        output_type: as in the stock call.
        includes_plain: whether the plain samples are handed back.
    """
    count = len(world.prompts)
    plains: Sequence[SearchResult | None] = results[count:] or [None] * count
    searches = [
        _image_search(world, searched, plain, maker)
        for searched, plain in zip(results[:count], plains, strict=True)
    ]
    winners = [search.winner for search in searches]
    images, nsfw = maker.of_samples(world, winners, output_type)
    plain_samples = None
    if includes_plain:
        plain = [plain_sample_of(result) for result in results[-count:]]
        plain_samples = PlainSamples(
            maker.of_samples(world, plain, output_type)[0],
            [None if sample is None else sample.reward for sample in plain],
        )
    return MCTDPipelineOutput(
        images=images,
        rewards=[search.best_reward for search in searches],
        nfe=[search.spent.nfe for search in searches],
        search=searches,
        ledger=world.settled_ledger(),
        nsfw_content_detected=nsfw,
        plain=plain_samples,
    )


def _image_search(
    world: World, searched: SearchResult, plain: SearchResult | None, maker: PictureMaker
) -> ImageSearch:
    """What was found of one image; among equals the search's own sample wins."""
    winning, spent = searched, searched.spent
    if plain is not None:
        spent = spent + plain.spent
        best, other = searched.best, plain.best
        if other is not None and (best is None or other.reward > best.reward):
            winning = plain
    handles = np.array([sample.handle for sample in searched.finished], dtype=np.int64)
    latents = world.prepared.first_latents[:0]
    if len(handles):
        latents = world.environment.denoised(handles)
    return ImageSearch(
        result=searched,
        winner=winning.best,
        winner_tree=winning.tree,
        spent=spent,
        scheduler=type(world.scheduler).__name__,
        settings=world.recipe_settings(searched.problem),
        latents=latents.cpu(),
        decode=functools.partial(
            maker.of_latents,
            world.prepared.decoder,
            latents.device,
            world.environment.ledger.rows_by_phase.get("decode", [world.rows_per_call])[-1],
        ),
    )

"""Prices of decodes, previews and reward calls, measured in rows through the network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import free_memory, is_out_of_memory, synchronize
from mctd_diffusers.denoising.protocols import CheckedReward, Decoder, Network
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.search.environment import Prices

T = TypeVar("T")


def measure_prices(
    *,
    network: Network,
    stepper: Stepper,
    decoder: Decoder,
    reward: CheckedReward,
    prompt: str,
    latents: Float[Tensor, "1 *sample"],
    rows_per_call: int,
    preview: Decoder | None = None,
    repeats: int = 3,
) -> Prices:
    """Time one call of each kind, and say what a unit costs in rows through the network.

    The median of ``repeats`` calls, after one to warm up. What these calls spend is in no ledger.

    Args:
        network: conditioned on problem 0 at least.
        stepper: knows what the network sees of it.
        decoder: full decoder.
        reward: scores pictures.
        prompt: of problem 0.
        latents: initial noise of problem 0.
        rows_per_call: latents in every call, as in the search.
        preview: preview decoder; without one a preview costs a full decode.
        repeats: calls of each kind that are timed.
    """

    def seconds(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            call()
            synchronize(latents.device)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    def measure(size: int) -> Prices:
        batch = latents.expand(size, *latents.shape[1:]).contiguous()
        rows, prompts = [0] * size, [prompt] * size
        inputs, timesteps = stepper.network_input(batch, [stepper.initial_state()] * size)
        row = seconds(lambda: network(inputs, timesteps, rows)) / network.rows_per_latent
        images = decoder(batch)
        return Prices(
            decode=seconds(lambda: decoder(batch)) / row,
            preview=seconds(lambda: (preview or decoder)(batch)) / row,
            reward_call=seconds(lambda: reward(images, prompts, rows)) / row,
        )

    with torch.no_grad():
        return within_memory(rows_per_call, latents.device, measure)


def within_memory(rows: int, device: torch.device, measure: Callable[[int], T]) -> T:
    """What ``measure`` says of ``rows``, or of half as many (and so on) where memory runs out."""
    while True:
        try:
            return measure(rows)
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        rows //= 2
        free_memory(device)

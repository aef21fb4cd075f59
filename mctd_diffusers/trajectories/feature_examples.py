"""What a feature decoder learns from: maps of features, computed at the states of a log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.brightness import brightness
from mctd_diffusers.trajectories.dataset import LatentStates


class MapReader:
    """Computes maps of a block at states of a log, under their prompts and without guidance.

    They are those that a search with guidance keeps, which reads the conditional rows alone, at
    half the price.

    Args:
        pipe: whose log it is, on the device to compute on.
        block: one of `mctd_diffusers.denoising.denoiser.mappable_blocks`.
        prompts: of all states that will be asked for.

    Raises:
        ConfigError: there is no such block.
    """

    def __init__(self, pipe: MCTDPipeline, block: str, prompts: Sequence[str]) -> None:
        numbered = list(dict.fromkeys(prompts))
        world = pipe.open_world(
            prompt=numbered,
            num_inference_steps=2,  # of no account: states say where they are
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            reward_model=brightness,  # which is never asked
        )
        self._number = {prompt: number for number, prompt in enumerate(numbered)}
        self._network = world.prepared.network
        self._tap = world.prepared.features.mapping(block, pools=False)
        self._like = world.prepared.first_latents

    @torch.no_grad()
    def __call__(
        self, states: LatentStates, rows: npt.NDArray[np.int64]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Maps of some of the states, in single precision.

        Args:
            states: of a split.
            rows: at least one, which make up one call of the network.

        Raises:
            ConfigError: the states are of samples of another size.
        """
        latents = torch.from_numpy(states.latents[rows])
        if latents.shape[1:] != self._like.shape[1:]:
            raise ConfigError(
                f"samples of the log have shape {tuple(latents.shape[1:])}, those of the model "
                f"{tuple(self._like.shape[1:])}: name the model that the log is of"
            )
        problems = [self._number[prompt] for prompt in states.prompt[rows].tolist()]
        with self._tap as tap:
            timesteps = torch.from_numpy(states.timestep[rows]).to(self._like.device)
            self._network(latents.to(self._like), timesteps, problems)
            maps = tap.take_maps()
        assert maps is not None
        return maps.float()

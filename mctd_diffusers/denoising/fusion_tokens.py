"""Pictures as clouds of tokens, and Wasserstein barycenters of such clouds.

A token is what stands in one cell of a grid, beside the place of the cell: clouds are compared by
both, so what moved is matched with where it moved to, and not faded over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.errors import ConfigError


@dataclass(frozen=True)
class Transport:
    """How clouds of tokens are transported.

    Attributes:
        position_scale: half the side of a picture, as a distance, in root mean squares of what
            tokens differ by. At 0 places do not matter; as it grows every token stays in its place,
            which is the mean.
        entropy: regularisation of the couplings, in mean squares of what tokens differ by; 0 is
            exact transport, by the network simplex.
        iterations: of the fixed point. After 2 from the best particle the objective is within 1 %
            of where it ends.
        max_tokens: of a cloud; exact transport takes their number to about the power 2.5.

    Raises:
        ConfigError: a setting is outside its range.
    """

    position_scale: float = 1.0
    entropy: float = 0.0
    iterations: int = 2
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.position_scale < 0 or self.entropy < 0:
            raise ConfigError(
                f"position_scale is {self.position_scale} and entropy {self.entropy}; both must be "
                "at least 0."
            )
        if self.iterations < 1 or self.max_tokens < 1:
            raise ConfigError(
                f"iterations are {self.iterations} and max_tokens {self.max_tokens}; both must be "
                "at least 1."
            )

    def barycenter(
        self,
        maps: Float[Tensor, "particles channels rows columns"],
        weights: Float[Tensor, " particles"],
    ) -> Float[Tensor, "channels rows columns"]:
        """Free-support Wasserstein-2 barycenter of maps, one token a cell, begun at the first map.

        The support moves by ``X <- sum_i w_i n T_i Y_i`` with the optimal couplings ``T_i`` of
        the support to the cloud ``Y_i`` (Cuturi and Doucet, 2014, algorithm 2, with a step of 1;
        Álvarez-Esteban et al., 2016). Token ``i`` of the support began in cell ``i`` and is kept
        there: its place, which moved too, is let go of.
        """
        clouds, unit = self._clouds(maps)
        support = self._support(clouds, weights)[:, : maps.shape[1]] * unit
        return support.mT.reshape(maps.shape[1:]).to(maps)

    def couplings(
        self,
        maps: Float[Tensor, "particles channels rows columns"],
        weights: Float[Tensor, " particles"],
    ) -> Float[Tensor, "particles cells cells"]:
        """Where the barycenter's tokens have their mass from: rows of its cells, each of sum 1."""
        import ot

        clouds, _ = self._clouds(maps)
        support = self._support(clouds, weights)
        mass = clouds.new_full((clouds.shape[1],), 1 / clouds.shape[1])
        plans = []
        for cloud in clouds:
            cost = ot.dist(support, cloud)
            if self.entropy:
                plan = ot.sinkhorn(
                    mass, mass, cost, self.entropy, method="sinkhorn_log", warn=False
                )
            else:
                plan = ot.emd(mass, mass, cost)
            plans.append(plan / plan.sum(dim=1, keepdim=True))
        return torch.stack(plans).to(maps)

    def _clouds(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens beside their places, on the host, in units of what tokens differ by; the unit."""
        tokens = maps.detach().cpu().double().flatten(2).mT
        unit = (tokens - tokens.mean(dim=(0, 1))).square().sum(dim=2).mean().sqrt()
        if unit == 0:  # nothing differs, so nothing is to be moved
            unit = torch.ones_like(unit)
        places = self.position_scale * _places(*maps.shape[2:])
        return torch.cat([tokens / unit, places.expand(len(maps), -1, -1)], dim=2), unit

    def _support(self, clouds: Tensor, weights: Tensor) -> Tensor:
        import ot

        masses = [clouds.new_full((clouds.shape[1],), 1 / clouds.shape[1])] * len(clouds)
        shares = weights.cpu().double()
        if self.entropy:
            return ot.bregman.free_support_sinkhorn_barycenter(
                list(clouds),
                masses,
                clouds[0],
                self.entropy,
                weights=shares,
                numItermax=self.iterations,
                method="sinkhorn_log",
                warn=False,
            )
        return ot.lp.free_support_barycenter(
            list(clouds), masses, clouds[0], weights=shares, numItermax=self.iterations
        )


def patch_size(rows: int, columns: int, max_cells: int) -> int:
    """Side of the smallest square patches of which at most ``max_cells`` cover a map.

    >>> patch_size(64, 64, 256), patch_size(16, 16, 256), patch_size(104, 152, 256)
    (4, 1, 8)
    """
    side = 1
    while math.ceil(rows / side) * math.ceil(columns / side) > max_cells:
        side += 1
    return side


def patchified(
    maps: Float[Tensor, "batch channels rows columns"], side: int
) -> Float[Tensor, "batch patch_channels cells_down cells_across"]:
    """Patches as the cells of a coarser grid, filled up at the edges by repetition."""
    rows, columns = maps.shape[2:]
    filled = F.pad(maps, (0, -columns % side, 0, -rows % side), mode="replicate")
    return F.pixel_unshuffle(filled, side)


def unpatchified(
    cells: Float[Tensor, "batch patch_channels cells_down cells_across"],
    rows: int,
    columns: int,
    side: int,
) -> Float[Tensor, "batch channels rows columns"]:
    """Reverse of `patchified`, for maps of so many rows and columns."""
    return F.pixel_shuffle(cells, side)[:, :, :rows, :columns]


def _places(rows: int, columns: int) -> Float[Tensor, "cells 2"]:
    """Centres of cells; the longer side of the picture is 2."""
    longest = max(rows, columns)
    down = (2 * torch.arange(rows, dtype=torch.float64) + 1 - rows) / longest
    across = (2 * torch.arange(columns, dtype=torch.float64) + 1 - columns) / longest
    return torch.cartesian_prod(down, across).reshape(-1, 2)

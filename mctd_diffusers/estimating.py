"""What a call is going to cost, before it is searched."""

from __future__ import annotations

import math
import resource

import torch

from mctd_diffusers.calls import SearchOptions, World, call_budgets
from mctd_diffusers.results import Estimate
from mctd_diffusers.search.runner import Strategy


def estimate_of(world: World, strategy: Strategy, options: SearchOptions) -> Estimate:
    """The cost of a search, from a few measured calls of each kind.

    Args:
        world: of the call, set up and not yet searched.
        strategy: that is to search it.
        options: of the call.

    Raises:
        BudgetError: the budget cannot pay for one sample.
    """
    prices, seconds_per_row = world.measure_prices(), world.seconds_per_row()
    images, calls_per_step = len(world.prompts), world.stepper.calls_per_step
    plain_nfe = world.stepper.num_steps * calls_per_step
    value = (prices.preview + prices.reward_call) / calls_per_step
    finish = (prices.decode + prices.reward_call) / plain_nfe
    cost_per_nfe = world.prepared.network.rows_per_latent + value + finish
    nfe: float = 0
    for budget in call_budgets(world, strategy, options):
        if budget is not None:
            most = math.inf if budget.nfe is None else budget.nfe
            if budget.cost is not None:
                most = min(most, budget.cost / cost_per_nfe)
            nfe += most * images
    seconds_per_nfe = cost_per_nfe * seconds_per_row
    if options.time_budget_s is not None:
        nfe = max(min(nfe, options.time_budget_s / seconds_per_nfe), plain_nfe * images)
    return Estimate(
        nfe=math.floor(nfe),
        seconds=nfe * seconds_per_nfe,
        peak_memory_bytes=_peak_memory(world.prepared.first_latents.device),
        seconds_per_row=seconds_per_row,
        prices=prices,
    )


def _peak_memory(device: torch.device) -> int:
    """Bytes that the accelerator held at most; on the host, that the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

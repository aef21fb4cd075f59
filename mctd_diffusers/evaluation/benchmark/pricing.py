"""What an image costs where decodes and scores are priced as at Stable Diffusion 1.5.

So equal cost means the same in all suites: the model in the box is small beside its decoder and its
reward, and mixtures have neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mctd_diffusers.evaluation.benchmark.cells import Run
from mctd_diffusers.search.environment import Prices

# TFLOP at 512 by 512: a row of the UNet 0.80, a decode 2.51, a decode by the tiny autoencoder 0.14,
# a score by CLIP-L 0.16.
PRICES: Final = Prices(decode=2.51 / 0.80, preview=0.14 / 0.80, reward_call=0.16 / 0.80)
"""In rows of the UNet."""
ROWS_OF_NFE: Final = 2.0
"""With guidance, which it is used with."""


def cost_of(run: Run) -> float:
    """Cost of a run in row-equivalents, an NFE being two rows whatever it is in the suite.

    ``2 nfe + 3.14 decodes + 0.175 previews + 0.2 reward calls``.
    """
    return (
        ROWS_OF_NFE * run.nfe
        + PRICES.decode * run.decodes
        + PRICES.preview * run.previews
        + PRICES.reward_call * run.reward_calls
    )


def cost_at(reward_price: float) -> Callable[[Run], float]:
    """Cost in NFE where a score, its decode included, costs ``reward_price`` NFE."""
    return lambda run: run.nfe + reward_price * run.reward_calls

"""Pipelines that tests of a module share; nobody changes them."""

from __future__ import annotations

import pytest
from diffusers import StableDiffusionPipeline

from mctd_diffusers.pipeline import MCTDPipeline
from tests.pipelines import tiny


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    return tiny.make_stock()


@pytest.fixture(scope="module")
def pipe(stock: StableDiffusionPipeline) -> MCTDPipeline:
    return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)

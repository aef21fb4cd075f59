"""What is checked of every family by default, and what of three."""

from __future__ import annotations

from typing import Final

import pytest

REPRESENTATIVES: Final = (
    "StableDiffusionPipeline",  # a UNet
    "StableDiffusion3Pipeline",  # a transformer of latents, under flow matching
    "FluxPipeline",  # one of packed tokens, with guidance as an input
)
"""Stock classes of the families on which checks of shared code are not slow."""


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark checks of code that all families share as slow for most families."""
    for item in items:
        family = getattr(item.getparent(pytest.Class), "obj", None)
        if item.get_closest_marker("shared") and family.name not in REPRESENTATIVES:
            item.add_marker(pytest.mark.slow)

"""Flux 2, searched; for ``custom_pipeline=``."""

from mctd_diffusers.families.flux2 import MCTDFlux2Pipeline  # noqa: F401

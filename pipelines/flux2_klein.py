"""Flux 2 Klein, searched; for ``custom_pipeline=``."""

from mctd_diffusers.families.flux2_klein import MCTDFlux2KleinPipeline  # noqa: F401

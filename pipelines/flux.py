"""Flux, searched; for ``custom_pipeline=``."""

from mctd_diffusers.families.flux import MCTDFluxPipeline  # noqa: F401

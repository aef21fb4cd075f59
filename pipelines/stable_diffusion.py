"""Stable Diffusion 1.x and 2.x, searched; for ``custom_pipeline=``."""

from mctd_diffusers.families.stable_diffusion import MCTDStableDiffusionPipeline  # noqa: F401

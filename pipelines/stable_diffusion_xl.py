"""Stable Diffusion XL, searched; for ``custom_pipeline=``."""

from mctd_diffusers.families.stable_diffusion_xl import MCTDStableDiffusionXLPipeline  # noqa: F401

"""Stable Diffusion 3 and 3.5, searched; for ``custom_pipeline=``."""

from mctd_diffusers.families.stable_diffusion_3 import MCTDStableDiffusion3Pipeline  # noqa: F401

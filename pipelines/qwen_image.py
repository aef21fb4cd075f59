"""Qwen-Image, searched; for ``custom_pipeline=``."""

from mctd_diffusers.families.qwen_image import MCTDQwenImagePipeline  # noqa: F401

"""Z-Image, searched; for ``custom_pipeline=``."""

from mctd_diffusers.families.z_image import MCTDZImagePipeline  # noqa: F401

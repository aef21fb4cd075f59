"""A tiny Stable Diffusion XL with random weights, in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.pipelines import tiny

PROJECTION = 16
SIZES_AND_CROPS = 6
SIZES_AND_SCORE = 5


def make_components(scheduler: str = "euler", seed: int = 0, **vae: Any) -> dict[str, Any]:
    """Everything that `StableDiffusionXLPipeline` takes; the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=SIZES_AND_CROPS * 8 + PROJECTION,
            norm_num_groups=4,
        )
        settings = {
            "block_out_channels": (8, 16),
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 16,
        }
        autoencoder = AutoencoderKL(**settings, **vae)
        config = CLIPTextConfig(**tiny.text_settings(), projection_dim=PROJECTION)
        text_encoder = CLIPTextModel(config)
        text_encoder_2 = CLIPTextModelWithProjection(config)
    return {
        "unet": unet.eval(),
        "vae": autoencoder.eval(),
        "text_encoder": text_encoder.eval(),
        "text_encoder_2": text_encoder_2.eval(),
        "tokenizer": tiny.make_tokenizer(),
        "tokenizer_2": tiny.make_tokenizer(),
        "scheduler": tiny.make_scheduler(scheduler),
        "image_encoder": None,
        "feature_extractor": None,
    }


def make_stock(scheduler: str = "euler", seed: int = 0, **vae: Any) -> StableDiffusionXLPipeline:
    """The stock pipeline over `make_components`, without a progress bar."""
    pipe = StableDiffusionXLPipeline(**make_components(scheduler, seed, **vae))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_refiner(seed: int = 7) -> StableDiffusionXLImg2ImgPipeline:
    """A refiner as it is published: one text encoder, and a score of beauty beside the sizes."""
    parts = make_components(seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(
            parts["unet"].config,
            cross_attention_dim=32,
            projection_class_embeddings_input_dim=SIZES_AND_SCORE * 8 + PROJECTION,
        )
    parts |= {"unet": unet.eval(), "text_encoder": None, "tokenizer": None}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    refiner.set_progress_bar_config(disable=True)
    return refiner

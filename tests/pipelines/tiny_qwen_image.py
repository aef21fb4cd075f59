"""A tiny Qwen-Image with random weights: texts of any length, and an autoencoder of videos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.pipelines import tiny_flux2

LEVELS = {
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}


def make_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """A language model that could see."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config={**tiny_flux2.text_settings(), "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": tiny_flux2.HIDDEN,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def make_components(seed: int = 0) -> dict[str, Any]:
    """Everything that `QwenImagePipeline` takes; the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=tiny_flux2.HIDDEN,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.8, 2.0, 1.0],
        )
        text_encoder = make_text_encoder()
    return {
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tiny_flux2.make_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**LEVELS),
    }


def make_stock(seed: int = 0) -> QwenImagePipeline:
    """The stock pipeline over `make_components`, without a progress bar."""
    pipe = QwenImagePipeline(**make_components(seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe

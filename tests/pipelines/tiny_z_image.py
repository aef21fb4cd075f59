"""A tiny Z-Image with random weights: lists of latents and texts, and time that runs forward."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.pipelines import tiny_flux2, tiny_sd3


def make_components(seed: int = 0) -> dict[str, Any]:
    """Everything that `ZImagePipeline` takes; the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=tiny_flux2.HIDDEN,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(token)
        vae = tiny_sd3.make_flow_vae()
        text_encoder = Qwen3Model(Qwen3Config(**tiny_flux2.text_settings(), head_dim=8))
    return {
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tiny_flux2.make_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def make_stock(seed: int = 0) -> ZImagePipeline:
    """The stock pipeline over `make_components`, without a progress bar."""
    pipe = ZImagePipeline(**make_components(seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe

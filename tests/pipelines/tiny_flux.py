"""A tiny Flux with random weights: packed latents, and guidance as an input of the network."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.pipelines import tiny, tiny_sd3

SHIFTING = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def make_components(seed: int = 0, *, guidance_embeds: bool = True) -> dict[str, Any]:
    """Everything that `FluxPipeline` takes; as the few-step one without embeddings of guidance."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=tiny_sd3.T5_CHANNELS,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        )
        vae = tiny_sd3.make_flow_vae()
        text_encoder = CLIPTextModel(CLIPTextConfig(**tiny_sd3.text_settings()))
        text_encoder_2 = tiny_sd3.make_t5_encoder()
    shifting = SHIFTING if guidance_embeds else {"shift": 1.0}
    return {
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "text_encoder_2": text_encoder_2.eval(),
        "tokenizer": tiny.make_tokenizer(),
        "tokenizer_2": tiny_sd3.make_t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**shifting),
    }


def make_stock(seed: int = 0, *, guidance_embeds: bool = True) -> FluxPipeline:
    """The stock pipeline over `make_components`, without a progress bar."""
    pipe = FluxPipeline(**make_components(seed, guidance_embeds=guidance_embeds))
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""A tiny Stable Diffusion 3 with random weights: three text encoders, and latents of four axes."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.pipelines import tiny

T5_CHANNELS = 64


def text_settings() -> dict[str, Any]:
    """Settings of a text model whose rows are a multiple of what processors compute at once.

    Where they are not, a row's last bits depend on its place in the batch.
    """
    return {**tiny.text_settings(), "intermediate_size": 64}


def make_t5_tokenizer() -> T5TokenizerFast:
    """A tokenizer of letters: no download."""
    letters = "▁" + string.ascii_lowercase
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(
        vocab=[*special, *((letter, -2.0) for letter in letters)],
        extra_ids=0,
        model_max_length=tiny.TEXT_LENGTH,
    )


def make_t5_encoder() -> T5EncoderModel:
    """An encoder of such letters."""
    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=T5_CHANNELS, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def make_flow_vae() -> AutoencoderKL:
    """An autoencoder without the convolutions around the latents, and with a shift."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
    )


def make_components(seed: int = 0, **scheduler: Any) -> dict[str, Any]:
    """Everything that `StableDiffusion3Pipeline` takes; the same weights for the same seed."""
    clip = CLIPTextConfig(**text_settings(), projection_dim=32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_CHANNELS,
            caption_projection_dim=16,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
        )
        vae = make_flow_vae()
        text_encoder, text_encoder_2 = (CLIPTextModelWithProjection(clip) for _ in range(2))
        text_encoder_3 = make_t5_encoder()
    return {
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "text_encoder_2": text_encoder_2.eval(),
        "text_encoder_3": text_encoder_3.eval(),
        "tokenizer": tiny.make_tokenizer(),
        "tokenizer_2": tiny.make_tokenizer(),
        "tokenizer_3": make_t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    }


def make_stock(seed: int = 0, **scheduler: Any) -> StableDiffusion3Pipeline:
    """The stock pipeline over `make_components`, without a progress bar."""
    pipe = StableDiffusion3Pipeline(**make_components(seed, **scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""A tiny Flux 2, Klein or not, with random weights: a language model reads the prompts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HIDDEN = 16
LAYERS = (1, 2)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHIFTING = {"shift": 3.0, "use_dynamic_shifting": True}
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def make_tokenizer() -> Qwen2TokenizerFast:
    """A tokenizer of bytes with a template of chats: no merges, no download."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2TokenizerFast(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        additional_special_tokens=list(SPECIAL[1:]),
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_settings() -> dict[str, Any]:
    """Settings of a language model that reads the bytes."""
    return {
        "vocab_size": 260,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def make_vae() -> AutoencoderKLFlux2:
    """An autoencoder with statistics of its latents."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def make_transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    """A transformer of one block of two streams and one of one."""
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=len(LAYERS) * HIDDEN,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def make_components(seed: int = 0) -> dict[str, Any]:
    """Everything that `Flux2KleinPipeline` takes; the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = make_transformer(guidance_embeds=False)
        vae = make_vae()
        text_encoder = Qwen3ForCausalLM(Qwen3Config(**text_settings(), head_dim=8))
    return {
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": make_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**SHIFTING),
    }


def make_stock(seed: int = 0, *, is_distilled: bool = False) -> Flux2KleinPipeline:
    """The stock pipeline over `make_components`, without a progress bar."""
    pipe = Flux2KleinPipeline(**make_components(seed), is_distilled=is_distilled)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_guided_stock(seed: int = 0) -> Flux2Pipeline:
    """The stock pipeline of the larger one, to whose transformer guidance is an input."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        components = make_components(seed)
        transformer = make_transformer(guidance_embeds=True)
        text_encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config=MistralConfig(**text_settings(), head_dim=8),
                vision_config=PixtralVisionConfig(
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    image_size=16,
                    patch_size=8,
                ),
                image_token_index=3,
            )
        )
    components["tokenizer"].chat_template = TEMPLATE.replace(
        "message.content", "message.content[0].text"
    )
    parts = {"transformer": transformer.eval(), "text_encoder": text_encoder.eval()}
    pipe = Flux2Pipeline(**{**components, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""A ClipReward small enough to be made in a test."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from mctd_diffusers.rewards.clip import ClipReward, Preprocessing


@pytest.fixture(scope="session")
def tiny_clip_reward() -> ClipReward:
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(x + "</w>" for x in letters)]
    tokenizer = CLIPTokenizer(
        vocab={token: place for place, token in enumerate(tokens)}, merges=[], model_max_length=16
    )
    shared = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = {"vocab_size": len(tokens), "max_position_embeddings": 16}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={**shared, **text, **ids},
                vision_config={**shared, "image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
        )
    half = (0.5, 0.5, 0.5)
    return ClipReward(model, tokenizer, Preprocessing(16, (16, 16), 3, half, half))

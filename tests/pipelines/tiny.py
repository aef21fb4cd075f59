"""A tiny Stable Diffusion with random weights: everything a stock pipeline has, in milliseconds."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mctd_diffusers.models.feature_decoder import FeatureToLatent
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.clip import ClipReward, Preprocessing

TEXT_LENGTH = 24
SPECIAL = ("<|startoftext|>", "<|pad|>", "<|endoftext|>")
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm_multistep": (DPMSolverMultistepScheduler, {}),
    "dpm_multistep_sde": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "dpm_singlestep": (DPMSolverSinglestepScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "tcd": (TCDScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "kdpm2": (KDPM2DiscreteScheduler, {}),
    "kdpm2_ancestral": (KDPM2AncestralDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
}


def make_scheduler(name: str = "ddim") -> Any:
    """A scheduler with the betas of Stable Diffusion."""
    scheduler_class, settings = SCHEDULERS[name]
    known = inspect.signature(scheduler_class).parameters
    schedule = {key: value for key, value in SCHEDULE.items() if key in known}
    return scheduler_class(**schedule, **settings)


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer of bytes: 515 tokens, no merges, no download."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        model_max_length=TEXT_LENGTH,
    )


def text_settings() -> dict[str, Any]:
    """Settings of a text model that reads the bytes."""
    return {
        "vocab_size": 515,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def make_components(scheduler: str = "ddim", seed: int = 0) -> dict[str, Any]:
    """Everything that `StableDiffusionPipeline` takes; the same weights for the same seed."""
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
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_settings()))
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": make_tokenizer(),
        "scheduler": make_scheduler(scheduler),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }


def make_stock(scheduler: str = "ddim", seed: int = 0) -> StableDiffusionPipeline:
    """The stock pipeline over `make_components`, without a progress bar."""
    pipe = StableDiffusionPipeline(**make_components(scheduler, seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_preview_vae(seed: int = 1) -> AutoencoderTiny:
    """A preview decoder that fits the tiny autoencoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        preview_vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        )
    return preview_vae.eval()


def make_ige(seed: int = 3, family: str = "StableDiffusionPipeline") -> InformationGainEvaluator:
    """A head that reads the features of the tiny UNet."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ige = InformationGainEvaluator(
            family,
            {"down.1": 32, "mid": 32, "estimate": 12},
            embedding_size=4,
            hidden_size=8,
            num_layers=1,
            num_levels=3,
            log_snr_range=(-8.0, 8.0),
            grids=(8, 50),
            schedulers=("DDIMScheduler",),
            guidance_scales=(4.0, 7.5),
        )
    ige.jump_log_snr.copy_(torch.tensor([-6.0, 0.0, 6.0]))
    ige.jump_cost.fill_(0.5)
    return ige.eval()


def make_clip_reward(seed: int = 2) -> ClipReward:
    """A reward of the kind that is saved beside the pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(
            CLIPConfig(
                text_config=text_settings(),
                vision_config={
                    "hidden_size": 16,
                    "intermediate_size": 17,
                    "num_attention_heads": 2,
                    "num_hidden_layers": 1,
                    "image_size": 16,
                    "patch_size": 8,
                },
                projection_dim=8,
            )
        )
    preprocessing = Preprocessing(
        size=16, crop=(16, 16), resample=3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    return ClipReward(model.eval(), make_tokenizer(), preprocessing)


def redness(images: torch.Tensor, prompts: list[str]) -> list[float]:
    """How much more red than green and blue; a reward without a model."""
    red, green, blue = images.double().mean(dim=(2, 3)).unbind(dim=1)
    return (red - (green + blue) / 2).tolist()


def save_with_parts(folder: Path) -> Path:
    """A pipeline with a reward and a preview decoder, as a folder."""
    pipe = MCTDPipeline.from_pipe(
        make_stock(), reward_model=make_clip_reward(), preview_vae=make_preview_vae()
    )
    pipe.save_pretrained(folder)
    return folder


def make_feature_decoder() -> FeatureToLatent:
    """A feature decoder of the tiny UNet's last block, untrained."""
    torch.manual_seed(0)
    return FeatureToLatent("StableDiffusionPipeline", "up.0", 8, hidden_size=8).eval()

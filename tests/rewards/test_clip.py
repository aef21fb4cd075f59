"""ClipReward: any CLIPModel folder, its preprocessing without torchvision, its conventions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, BertConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.rewards.calls import call_reward
from mctd_diffusers.rewards.clip import PREPROCESSOR_FILE, ClipReward, Preprocessing

OPENAI = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
"""What OpenAI's CLIP-L folder holds, in the form of its time."""


def pictures(*size: int) -> torch.Tensor:
    """Smooth random pictures in [0, 1] that 8 bits hold exactly."""
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    return (images * 255).round() / 255


@pytest.mark.parametrize(
    "size",
    [(40, 40), (33, 50), (64, 48), (16, 16), (8, 8)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
@pytest.mark.parametrize("resample", [2, 3])
def test_preprocessing_is_that_of_transformers(size: tuple[int, int], resample: int) -> None:
    config = {**OPENAI, "size": {"shortest_edge": 16}, "crop_size": 16, "resample": resample}
    ours = Preprocessing.from_config(config)(pictures(*size))
    stored = [
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        for image in pictures(*size)
    ]
    theirs = CLIPImageProcessorPil(**config)(stored, return_tensors="pt")["pixel_values"]
    # Theirs rounds to 8 bits after resizing: half a step, over the smallest standard deviation,
    # and a rounding of the filter's weights on top.
    assert (ours - theirs).abs().max() < 1.6 / 255 / 0.26


@pytest.mark.parametrize("config", [OPENAI, {**OPENAI, "size": {"height": 20, "width": 24}}])
def test_preprocessing_survives_its_config(config: dict[str, object]) -> None:
    read = Preprocessing.from_config(config)
    assert Preprocessing.from_config(json.loads(json.dumps(read.to_config()))) == read


def test_preprocessing_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'image_mean'"):
        Preprocessing.from_config({"size": 224, "crop_size": 224})
    with pytest.raises(ConfigError, match="resample=5"):
        Preprocessing.from_config({**OPENAI, "resample": 5})
    with pytest.raises(ConfigError, match="image_std"):
        Preprocessing.from_config({**OPENAI, "image_std": [0.0, 1.0, 1.0]})


def test_a_saved_reward_loads_alike_and_opens_in_transformers(
    tiny_clip_reward: ClipReward, tmp_path: Path
) -> None:
    tiny_clip_reward.save_pretrained(tmp_path)
    loaded = ClipReward.from_pretrained(tmp_path)
    prompts = ["a red apple", "two cats"]
    expected = tiny_clip_reward(pictures(16, 16), prompts)
    torch.testing.assert_close(loaded(pictures(16, 16), prompts), expected, rtol=0, atol=0)
    assert loaded.name_or_path == str(tmp_path)
    assert isinstance(CLIPModel.from_pretrained(tmp_path), CLIPModel)
    assert CLIPTokenizer.from_pretrained(tmp_path).model_max_length == 16
    assert CLIPImageProcessorPil.from_pretrained(tmp_path).size["shortest_edge"] == 16


def test_the_score_is_the_scaled_cosine_of_the_model(tiny_clip_reward: ClipReward) -> None:
    prompts = ["a red apple", "two cats"]
    tokens = tiny_clip_reward.tokenizer(prompts, padding=True, return_tensors="pt")
    pixels = tiny_clip_reward.preprocessing(pictures(16, 16))
    with torch.no_grad():
        theirs = tiny_clip_reward.model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    torch.testing.assert_close(tiny_clip_reward(pictures(16, 16), prompts), theirs)
    cosine = ClipReward(
        tiny_clip_reward.model,
        tiny_clip_reward.tokenizer,
        tiny_clip_reward.preprocessing,
        scale="cosine",
    )
    scale = tiny_clip_reward.model.logit_scale.exp()
    torch.testing.assert_close(cosine(pictures(16, 16), prompts) * scale, theirs)


def test_a_score_does_not_depend_on_the_order_of_the_batch(tiny_clip_reward: ClipReward) -> None:
    images = torch.cat([pictures(16, 16), 1 - pictures(16, 16)])
    prompts = ["a", "some longer prompt", "a", "b"]
    order = [2, 0, 3, 1]
    forward = call_reward(tiny_clip_reward, images, prompts, range(4))
    backward = call_reward(tiny_clip_reward, images[order], [prompts[i] for i in order], range(4))
    np.testing.assert_allclose(backward, forward[order], atol=1e-5)


def test_prompts_too_long_are_cut(tiny_clip_reward: ClipReward) -> None:
    scores = tiny_clip_reward(pictures(16, 16), ["a" * 40, "a" * 50])
    assert torch.isfinite(scores).all()


def test_forgotten_prompts_are_embedded_anew(tiny_clip_reward: ClipReward) -> None:
    before = tiny_clip_reward.text_embedding("a cat")
    assert tiny_clip_reward.text_embedding("a cat") is before
    tiny_clip_reward.forget_prompts()
    assert tiny_clip_reward.text_embedding("a cat") is not before


def test_what_is_no_clip_folder_is_refused_in_one_sentence(
    tiny_clip_reward: ClipReward, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        ClipReward.from_pretrained(tmp_path / "nowhere")
    BertConfig().save_pretrained(tmp_path / "bert")
    assert AutoConfig.from_pretrained(tmp_path / "bert").model_type == "bert"
    with pytest.raises(ConfigError, match=r"type 'bert', not 'clip'"):
        ClipReward.from_pretrained(tmp_path / "bert")
    tiny_clip_reward.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / PREPROCESSOR_FILE).unlink()
    with pytest.raises(ConfigError, match=PREPROCESSOR_FILE):
        ClipReward.from_pretrained(tmp_path / "clip")


def test_a_folder_that_is_not_whole_is_refused(
    tiny_clip_reward: ClipReward, tmp_path: Path
) -> None:
    tiny_clip_reward.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ConfigError, match="no CLIPModel reward could be loaded"):
        ClipReward.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    for file in tmp_path.glob("*token*"):
        file.unlink()  # transformers would make a tokenizer that knows no word
    with pytest.raises(ConfigError, match=r"tokenizer .*knows no words"):
        ClipReward.from_pretrained(tmp_path)


def test_an_unknown_scale_is_refused(tiny_clip_reward: ClipReward) -> None:
    parts = (tiny_clip_reward.model, tiny_clip_reward.tokenizer, tiny_clip_reward.preprocessing)
    with pytest.raises(ConfigError, match="scale='log'"):
        ClipReward(*parts, scale="log")

"""Low-rank adapters of the families whose denoiser is a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from mctd_diffusers.pipeline import MCTDPipeline
from tests.pipelines import tiny, tiny_flux, tiny_flux2, tiny_qwen_image, tiny_sd3, tiny_z_image
from tests.pipelines.family_tests import seeded

CALL: dict[str, Any] = {
    "prompt": "a red cat",
    "height": 16,
    "width": 16,
    "num_inference_steps": 3,
    "output_type": "pt",
}
KLEIN: dict[str, Any] = {"max_sequence_length": 20, "text_encoder_out_layers": tiny_flux2.LAYERS}
ONE = {"search": "best_of_n", "compute": 1, "rows_per_call": 1}


@pytest.mark.parametrize(
    ("make_stock", "call", "name"),
    [
        (tiny_sd3.make_stock, {}, "joint_attention_kwargs"),
        (tiny_flux.make_stock, {}, "joint_attention_kwargs"),
        (tiny_flux2.make_stock, KLEIN, "attention_kwargs"),
        (tiny_qwen_image.make_stock, {"true_cfg_scale": 1.0}, "attention_kwargs"),
        (tiny_z_image.make_stock, {}, "joint_attention_kwargs"),
    ],
    ids=["sd3", "flux", "flux2_klein", "qwen_image", "z_image"],
)
def test_they_are_scaled_and_switched_off_as_the_stock_pipeline_does_it(
    make_stock: Callable[[], DiffusionPipeline], call: dict[str, Any], name: str
) -> None:
    stock: Any = make_stock()
    pipe: Any = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    before = pipe(**CALL, **call, **ONE, generator=seeded(0)[0]).images
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    stock.transformer.add_adapter(config)
    pictures: list[Any] = []
    for scale in (0.0, 0.5, 1.0):
        given = {**CALL, **call, name: {"scale": scale}}
        theirs = stock(**given, generator=seeded(0)[0]).images
        found = pipe(**given, **ONE, generator=seeded(0)[0])
        ours = found.images
        assert torch.equal(ours, theirs)
        assert pipe.replay(found.search[0].recipe).reward == found.rewards[0]
        assert not any(torch.equal(ours, other) for other in pictures)
        assert scale == 0 or not torch.equal(ours, before)
        pictures.append(ours)
    stock.transformer.disable_adapters()
    assert torch.equal(pipe(**CALL, **call, **ONE, generator=seeded(0)[0]).images, before)
    stock.transformer.enable_adapters()
    stock.transformer.fuse_lora(lora_scale=0.5)
    fused = pipe(**CALL, **call, **ONE, generator=seeded(0)[0]).images
    assert torch.equal(fused, stock(**CALL, **call, generator=seeded(0)[0]).images)
    assert not torch.equal(fused, before)

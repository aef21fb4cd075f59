"""What changes the UNet of a stock pipeline changes a search likewise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.strategies import BestOfN
from tests.pipelines import tiny, tiny_xl
from tests.pipelines.family_tests import seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

CALL: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
EMBEDDING = 6  # channels of an adapter's picture

each_stock = pytest.mark.parametrize(
    "make_stock", [tiny.make_stock, tiny_xl.make_stock], ids=["1.5", "XL"]
)


def pictures(stock: Any, pipe: Any, **call: Any) -> torch.Tensor:
    """The stock picture, which is that of the best of one."""
    theirs = stock("a red cat", generator=seeded(0)[0], **CALL, **call)
    best = {"search": BestOfN(n=1), "rows_per_call": 1}
    ours = pipe("a red cat", generator=seeded(0)[0], **best, **CALL, **call)
    images: torch.Tensor = ours.images
    assert torch.equal(images, theirs.images)
    return images


def both(make_stock: Callable[[], Any]) -> tuple[Any, Any]:
    """The stock pipeline, and ours over modules of its own with the same weights."""
    return make_stock(), MCTDPipeline.from_pipe(make_stock(), reward_model=tiny.redness)


# LoRA


def save_adapter(make_stock: Callable[[], Any], folder: Path) -> None:
    """Save a random adapter of UNet and text encoders, as training scripts do."""
    pipe = make_stock()
    layers = {}
    targets = {
        "unet": ["to_q", "to_k", "to_v", "to_out.0"],
        "text_encoder": ["q_proj", "v_proj"],
        "text_encoder_2": ["q_proj", "v_proj"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, modules in targets.items():
            if name in pipe.components:
                part = pipe.components[name]
                part.add_adapter(
                    LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False)
                )
                layers[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
    pipe.save_lora_weights(folder, **layers)


@each_stock
def test_adapters_change_a_search_as_they_change_the_stock_pipeline(
    make_stock: Callable[[], Any], tmp_path: Path
) -> None:
    save_adapter(make_stock, tmp_path)
    pair = both(make_stock)
    plain = pictures(*pair)
    for pipe in pair:
        pipe.load_lora_weights(tmp_path, adapter_name="style")
    adapted = pictures(*pair)
    assert not torch.equal(adapted, plain)
    assert not torch.equal(pictures(*pair, cross_attention_kwargs={"scale": 0.5}), adapted)
    assert torch.equal(pictures(*pair), adapted)
    for pipe in pair:
        pipe.set_adapters("style", 0.25)
    assert not torch.equal(pictures(*pair), adapted)
    for pipe in pair:
        pipe.disable_lora()
    assert torch.equal(pictures(*pair), plain)
    for pipe in pair:
        pipe.enable_lora()
        pipe.fuse_lora(lora_scale=0.5)
    assert not torch.equal(pictures(*pair), plain)
    for pipe in pair:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    assert torch.allclose(pictures(*pair), plain, atol=1e-5)


# IP adapters


def load_image_adapter(unet: UNet2DConditionModel) -> None:
    """A random adapter for pictures that come as embeddings."""
    channels = unet.config.cross_attention_dim
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = {}
        cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
        for place, name in enumerate(cross):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            for side in ("k", "v"):
                attention[f"{2 * place + 1}.to_{side}_ip.weight"] = torch.randn(hidden, channels)
        projection = {
            "proj.weight": torch.randn(4 * channels, EMBEDDING),
            "proj.bias": torch.zeros(4 * channels),
            "norm.weight": torch.ones(channels),
            "norm.bias": torch.zeros(channels),
        }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])


@each_stock
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_image_adapters_change_a_search_as_they_change_the_stock_pipeline(
    make_stock: Callable[[], Any], guidance_scale: float
) -> None:
    stock, pipe = both(make_stock)
    for unet in (stock.unet, pipe.unet):
        load_image_adapter(unet)
    sides = 2 if guidance_scale > 1 else 1
    seen = []
    for seed in (1, 2):
        embeds = [torch.randn((sides, 1, EMBEDDING), generator=seeded(seed)[0])]
        call = {"ip_adapter_image_embeds": embeds, "guidance_scale": guidance_scale}
        seen.append(pictures(stock, pipe, **call))
        out = pipe("a red cat", search="mctd", compute=3, generator=seeded(0)[0], **CALL, **call)
        recipe = out.search[0].recipe
        assert recipe["not_held"] == ["ip_adapter_image_embeds"]
        replayed = pipe.replay(recipe, ip_adapter_image_embeds=embeds)
        assert replayed.reward == out.rewards[0]
    assert not torch.equal(*seen)


# Distilled networks


@each_stock
def test_a_network_that_is_told_the_guidance_takes_one_row_a_latent(
    make_stock: Callable[[], Any],
) -> None:
    def make() -> Any:
        stock = make_stock()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DConditionModel.from_config(stock.unet.config, time_cond_proj_dim=8)
            stock.register_modules(unet=unet.eval())
        return stock

    stock, pipe = both(make)
    weak, strong = (pictures(stock, pipe, guidance_scale=scale) for scale in (2.0, 8.0))
    assert not torch.equal(weak, strong)
    out = pipe("a red cat", search="mctd", compute=3, generator=seeded(0)[0], **CALL)
    assert out.ledger.total.rows == out.ledger.total.nfe
    assert torch.tensor(out.search[0].tree.guidance).isnan().all()

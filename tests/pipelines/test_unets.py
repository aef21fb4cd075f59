"""What changes the UNet of a stock pipeline changes a search likewise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.schedulers import scheduling_ddpm
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.strategies import BestOfN, Evolution
from tests.pipelines import tiny, tiny_xl
from tests.pipelines.family_tests import counted_rows, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
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


# Networks that predict their variance


def of_learned_variance(
    make_stock: Callable[..., Any], variance_type: str = "learned_range"
) -> tuple[Any, Any]:
    """As `both`, with a UNet of twice the channels and DDPM."""

    def make() -> Any:
        stock = make_stock("ddpm")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DConditionModel.from_config(stock.unet.config, out_channels=8)
        if variance_type == "learned":  # as it is, so above 0
            torch.nn.init.zeros_(unet.conv_out.weight[4:])
            torch.nn.init.constant_(unet.conv_out.bias[4:], 0.1)
        settings = {"variance_type": variance_type, "clip_sample": False}
        scheduler = DDPMScheduler.from_config(stock.scheduler.config, **settings)
        stock.register_modules(unet=unet.eval(), scheduler=scheduler)
        return stock

    return both(make)


@each_stock
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_variance_that_the_network_predicts_is_that_of_the_stock_pipeline(
    make_stock: Callable[..., Any], variance_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Any:
        return torch.linspace(-1, 1, shape[1:].numel(), dtype=dtype).reshape(1, *shape[1:])

    # Noise of edges is drawn from their seeds, that of the stock loop from its generator.
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", same)
    pair = of_learned_variance(make_stock, variance_type)
    assert torch.isfinite(pictures(*pair)).all()
    assert torch.isfinite(pictures(*pair, guidance_rescale=0.7)).all()


@each_stock
def test_a_network_that_predicts_its_variance_is_searched(make_stock: Callable[..., Any]) -> None:
    _, pipe = of_learned_variance(make_stock)
    call = {"num_inference_steps": 4, "rows_per_call": 4, "compute": 4, "output_type": "latent"}
    for search in ("mctd", "beam", Evolution(branch_eta=0.5)):
        out = pipe("a red cat", search=search, generator=seeded(0)[0], **call)
        found = out.search[0]
        replayed = pipe.replay(found.recipe)
        assert torch.equal(replayed.latents, found.latents[found.finished.index(found.winner)])
        assert replayed.reward == out.rewards[0]
    world = pipe.open_world("a red cat", num_inference_steps=4, reads_features=True)
    handles = world.environment.reset(*np.zeros((2, 1), dtype=np.int64))
    world.environment.denoise(handles)
    features = world.environment.features(handles)
    assert {name: rows.shape[-1] for name, rows in features.items()} == pipe._feature_channels()


@each_stock
def test_a_variance_that_is_not_read_or_not_predicted_is_refused(
    make_stock: Callable[..., Any],
) -> None:
    _, pipe = of_learned_variance(make_stock)
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    with (
        counted_rows(pipe.unet) as rows,
        pytest.raises(ConfigError, match=r"8 channels for latents of 4.*DDIMScheduler does not"),
    ):
        pipe("a red cat", search="mctd", search_scheduler=ddim, **CALL)
    assert not rows()
    plain = MCTDPipeline.from_pipe(make_stock("ddim"), reward_model=tiny.redness)
    with (
        counted_rows(plain.unet) as rows,
        pytest.raises(ConfigError, match=r"'learned_range' reads a variance.*'fixed_small'"),
    ):
        plain("a red cat", search="mctd", search_scheduler=pipe.scheduler, **CALL)
    assert not rows()
    plain("a red cat", search="best_of_n", compute=1, search_scheduler=ddim, **CALL)

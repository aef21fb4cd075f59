"""Stable Diffusion XL under search: two encoders, sizes and crops as inputs, an upcast decoder."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.parts import UpcastDecoder
from mctd_diffusers.families.stable_diffusion_xl import MCTDStableDiffusionXLPipeline
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.strategies import BestOfN
from tests.pipelines import tiny, tiny_xl
from tests.pipelines.family_tests import FamilyTests, counted_rows, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

CALL: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}


class TestXL(FamilyTests):
    rows_per_latent = 2

    @classmethod
    def make_stock(cls) -> StableDiffusionXLPipeline:
        return tiny_xl.make_stock()


class TestXLOfTwoSteps(FamilyTests):
    call: ClassVar[dict[str, Any]] = {"guidance_scale": 0.0}  # as the distilled ones are called
    steps = 2

    @classmethod
    def make_stock(cls) -> StableDiffusionXLPipeline:
        return tiny_xl.make_stock("euler")


@pytest.fixture(scope="module")
def stock() -> StableDiffusionXLPipeline:
    return tiny_xl.make_stock()


@pytest.fixture(scope="module")
def pipe(stock: StableDiffusionXLPipeline) -> MCTDPipeline:
    return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)


def best_of_one(pipe: Any, *args: Any, **call: Any) -> Any:
    return pipe(*args, search=BestOfN(n=1), rows_per_call=1, **call)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm_multistep"])
def test_best_of_one_is_the_stock_picture(name: str) -> None:
    stock = tiny_xl.make_stock(name)
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    theirs = stock("a red cat", generator=seeded(0)[0], **CALL | {"num_inference_steps": 8})
    ours = best_of_one(
        pipe, "a red cat", generator=seeded(0)[0], **CALL | {"num_inference_steps": 8}
    )
    assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize(
    "call",
    [
        {"prompt_2": "a blue dog"},
        {"negative_prompt": "grey"},
        {"negative_prompt": "grey", "negative_prompt_2": "black"},
        {"negative_prompt": ""},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"clip_skip": 1},
        {"height": 24, "width": 8},
        {"original_size": (64, 32), "crops_coords_top_left": (8, 4), "target_size": (16, 8)},
        {"negative_original_size": (8, 8), "negative_target_size": (64, 64)},
        {"negative_original_size": (8, 8)},
        {"sigmas": [14.0, 3.0, 0.5]},
    ],
    ids="-".join,
)
def test_stock_arguments_keep_their_meaning_in_a_search(
    stock: Any, pipe: Any, call: dict[str, Any]
) -> None:
    call = {**CALL, **call}
    theirs = stock("a red cat", generator=seeded(0)[0], **call)
    ours = best_of_one(pipe, "a red cat", generator=seeded(0)[0], **call)
    assert torch.equal(ours.images, theirs.images)
    replayed = pipe.replay(ours.search[0].recipe)
    assert torch.equal(replayed.latents, ours.search[0].latents[0])


def test_sizes_and_crops_change_the_picture(pipe: Any) -> None:
    call = {"generator": seeded(0)[0], **CALL}
    plain = best_of_one(pipe, "a red cat", **call)
    cropped = best_of_one(
        pipe, "a red cat", crops_coords_top_left=(64, 64), **call | {"generator": seeded(0)[0]}
    )
    assert not torch.equal(plain.images, cropped.images)


def test_negative_sizes_are_those_of_the_negative_rows_in_a_batch_too(
    stock: Any, pipe: Any
) -> None:
    """The stock pipeline mixes them up: for several images it repeats (negative, positive)."""
    sizes = {"negative_original_size": (8, 8), "negative_target_size": (64, 64)}
    call = {**CALL, **sizes, "search": BestOfN(n=1), "rows_per_call": 2}
    prompts = ["a red cat", "two dogs"]
    together = pipe(prompts, generator=seeded(0, 1), **call)
    theirs = stock(prompts, generator=seeded(0, 1), **CALL, **sizes)
    assert not torch.equal(together.images, theirs.images)
    alone = pipe(["two dogs"], generator=seeded(1), **call)
    assert torch.equal(together.images[1], alone.images[0])


@pytest.mark.parametrize("force_zeros", [True, False])
def test_an_empty_negative_prompt_is_what_the_config_says(force_zeros: bool) -> None:
    components = tiny_xl.make_components()
    stock = StableDiffusionXLPipeline(**components, force_zeros_for_empty_prompt=force_zeros)
    stock.set_progress_bar_config(disable=True)
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    assert pipe.config.force_zeros_for_empty_prompt is force_zeros
    theirs = stock("a red cat", generator=seeded(0)[0], **CALL)
    ours = best_of_one(pipe, "a red cat", generator=seeded(0)[0], **CALL)
    assert torch.equal(ours.images, theirs.images)


def test_embeddings_of_the_user_are_taken_as_the_stock_takes_them(stock: Any, pipe: Any) -> None:
    embeds = ("prompt_embeds", "negative_prompt_embeds")
    names = (*embeds, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    parts = stock.encode_prompt(["a red cat", "two dogs"], negative_prompt=["grey", "black"])
    given = dict(zip(names, parts, strict=True))
    theirs = stock(**given, generator=seeded(0, 1), **CALL)
    call = {"search": BestOfN(n=1), "rows_per_call": 2, "reward_prompt": ""}
    ours = pipe(**given, generator=seeded(0, 1), **call, **CALL)
    assert torch.equal(ours.images, theirs.images)
    one = {name: part[1:] for name, part in given.items()}
    replayed = pipe.replay(ours.search[1].recipe, **one)
    assert torch.equal(replayed.latents, ours.search[1].latents[0])
    with pytest.raises(
        ConfigError, match="cannot hold prompt_embeds, negative_prompt_embeds, pooled"
    ):
        pipe.replay(ours.search[1].recipe)


def test_a_pipeline_without_its_first_encoder_works_as_the_stock_one_does() -> None:
    """As the refiner's: `text_encoder` and `tokenizer` are optional."""
    components = tiny_xl.make_components() | {"text_encoder": None, "tokenizer": None}
    pipe = MCTDStableDiffusionXLPipeline(**components, reward_model=tiny.redness)
    with pytest.raises(Exception, match=r"mat1|size|shape"):  # the tiny UNet reads both encoders
        pipe("a red cat", **CALL)
    components |= {"text_encoder_2": None, "tokenizer_2": None}
    pipe = MCTDStableDiffusionXLPipeline(**components, reward_model=tiny.redness)
    with pytest.raises(ConfigError, match="has no text_encoder_2: pass prompt_embeds"):
        pipe("a red cat", **CALL)


# Decoding


@pytest.mark.parametrize(
    "vae",
    [
        {"scaling_factor": 0.5},
        {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]},
    ],
    ids=["scaled", "normalised"],
)
def test_latents_are_decoded_as_the_stock_pipeline_does(vae: dict[str, Any]) -> None:
    stock = tiny_xl.make_stock(**vae)
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    theirs = stock("a red cat", generator=seeded(0)[0], **CALL)
    ours = best_of_one(pipe, "a red cat", generator=seeded(0)[0], **CALL)
    assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize("force_upcast", [True, False])
def test_what_overflows_in_half_precision_is_decoded_in_single(force_upcast: bool) -> None:
    vae = tiny_xl.make_stock(force_upcast=force_upcast).vae.to(torch.float16)
    seen = []
    vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    weights = {name: part.clone() for name, part in vae.state_dict().items()}
    latents = torch.randn((1, 4, 8, 8), generator=seeded(0)[0]).half()
    with torch.no_grad():
        UpcastDecoder(vae)(latents)
    assert seen == [torch.float32 if force_upcast else torch.float16]
    assert vae.dtype == torch.float16
    assert all(torch.equal(part, weights[name]) for name, part in vae.state_dict().items())


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_a_half_precision_decoder_gives_the_stock_picture() -> None:
    stock = tiny_xl.make_stock(force_upcast=True)
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    stock.vae.to(torch.float16)
    theirs = stock("a red cat", generator=seeded(0)[0], **CALL)
    ours = best_of_one(pipe, "a red cat", generator=seeded(0)[0], **CALL)
    assert torch.equal(ours.images, theirs.images)
    assert pipe.vae.dtype == torch.float16


class Marker:
    """Marks images as the stock watermarker does: in [-1, 1], small ones not at all."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.marked = 0

    def apply_watermark(self, images: torch.Tensor) -> torch.Tensor:
        assert images.min() >= -1.0
        if images.shape[-1] < self.least:
            return images
        self.marked += len(images)
        return images * 0.5


def test_pictures_are_marked_as_the_stock_pipeline_does_and_rewards_see_no_mark() -> None:
    pipe = MCTDPipeline.from_pipe(tiny_xl.make_stock(), reward_model=tiny.redness)
    call = {"search": "mctd", "compute": 3, **CALL}
    plain = pipe("a red cat", generator=seeded(0)[0], **call)
    pipe.watermark = Marker(16)
    marked = pipe("a red cat", generator=seeded(0)[0], **call)
    assert pipe.watermark.marked == 1
    assert marked.rewards == plain.rewards
    assert torch.allclose(marked.images - 0.5, (plain.images - 0.5) / 2, atol=1e-6)
    pipe.watermark = Marker(256)
    small = pipe("a red cat", generator=seeded(0)[0], **call)
    assert torch.equal(small.images, plain.images)


# A refiner


def refined(image: Any, prompts: int = 1) -> torch.Tensor:
    """What the stock refiner makes of latents, or of pictures."""
    images: torch.Tensor = tiny_xl.make_refiner()(
        ["a red cat"] * prompts,
        image=image,
        strength=0.5,
        num_inference_steps=4,
        output_type="pt",
        generator=seeded(0)[0],
    ).images
    return images


@pytest.mark.parametrize("output_type", ["latent", "pil"])
def test_a_refiner_makes_of_a_sample_what_it_makes_of_the_stock_one(
    stock: Any, pipe: Any, output_type: str
) -> None:
    call = {"num_inference_steps": 4, "output_type": output_type}
    theirs = refined(stock("a red cat", generator=seeded(0)[0], **call).images)
    ours = refined(best_of_one(pipe, "a red cat", generator=seeded(0)[0], **call).images)
    assert torch.equal(ours, theirs)


def test_a_refiner_goes_over_all_that_a_search_found(pipe: Any) -> None:
    call = {"search": "mctd", "compute": 4, "num_inference_steps": 4, "output_type": "latent"}
    out = pipe(["a red cat", "two dogs"], generator=seeded(0, 1), **call)
    pictures = refined(out.images, prompts=2)
    assert pictures.shape == (2, 3, 16, 16)
    assert torch.isfinite(pictures).all()
    best = torch.stack([sample.latents for sample in out.search[0].top(2)])
    assert torch.equal(best[0], out.images[0])
    assert torch.isfinite(refined(best, prompts=2)).all()


def test_a_search_finishes_its_samples(stock: Any, pipe: Any) -> None:
    with (
        counted_rows(pipe.unet) as rows,
        pytest.raises(ConfigError, match=r"denoising_end=0\.8 .*output_type='latent'.*strength="),
    ):
        pipe("a red cat", denoising_end=0.8, **CALL)
    assert not rows()
    call = {**CALL, "denoising_end": 0.5, "output_type": "latent"}
    theirs = stock("a red cat", generator=seeded(0)[0], **call)
    ours = pipe("a red cat", generator=seeded(0)[0], search=None, **call)
    assert torch.equal(ours.images, theirs.images)
    assert ours.nfe == [2]


# Refusing


def test_wrapping_keeps_every_dtype() -> None:
    stock = tiny_xl.make_stock()
    stock.unet.to(torch.bfloat16)
    stock.text_encoder_2.to(torch.float16)
    pipe = MCTDPipeline.from_pipe(stock)
    assert type(pipe) is MCTDStableDiffusionXLPipeline
    assert stock.unet.dtype == torch.bfloat16
    assert stock.text_encoder_2.dtype == torch.float16
    assert stock.vae.dtype == torch.float32


def test_a_prompt_and_its_embeddings_are_refused_as_by_the_stock_pipeline(
    stock: Any, pipe: Any
) -> None:
    embeds, *_ = stock.encode_prompt("a red cat")
    with pytest.raises(ConfigError, match="Cannot forward both `prompt`"):
        pipe("a red cat", prompt_embeds=embeds, **CALL)
    with pytest.raises(ConfigError, match="`pooled_prompt_embeds` also have to be passed"):
        pipe(prompt_embeds=embeds, reward_prompt="", **CALL)

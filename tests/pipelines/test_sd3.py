"""Stable Diffusion 3 under search."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection

from mctd_diffusers.errors import ConfigError, UnsupportedSchedulerError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.strategies import BestOfN
from tests.pipelines import tiny, tiny_sd3
from tests.pipelines.family_tests import FamilyTests, counted_rows, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PROMPTS = ["a red cat", "two dogs"]
CALL: dict[str, Any] = {
    "num_inference_steps": 4,
    "max_sequence_length": tiny.TEXT_LENGTH,
    "output_type": "pt",
}


class TestStableDiffusion3(FamilyTests):
    call: ClassVar[dict[str, Any]] = {
        "max_sequence_length": tiny.TEXT_LENGTH,
        "negative_prompt": "grey",
    }
    rows_per_latent = 2

    @classmethod
    def make_stock(cls) -> StableDiffusion3Pipeline:
        return tiny_sd3.make_stock()


@pytest.fixture(scope="module")
def stock() -> StableDiffusion3Pipeline:
    return tiny_sd3.make_stock()


@pytest.fixture(scope="module")
def pipe(stock: StableDiffusion3Pipeline) -> MCTDPipeline:
    return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)


def best_of_one(pipe: Any, *args: Any, **call: Any) -> Any:
    return pipe(*args, search=BestOfN(n=1), rows_per_call=1, **call)


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"prompt_2": "a blue dog", "prompt_3": "a green hat"},
        {"negative_prompt_2": "grey", "negative_prompt_3": "black"},
        {"height": 24, "width": 8},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"clip_skip": 1},
        {"mu": None},
    ],
    ids=lambda call: next(iter(call)),
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


@pytest.mark.parametrize("mu", [None, 0.8])
@pytest.mark.parametrize("size", [{}, {"height": 32, "width": 16}], ids=["square", "tall"])
def test_the_schedule_is_shifted_as_the_stock_pipeline_shifts_it(
    size: dict[str, int], mu: float | None
) -> None:
    stock = tiny_sd3.make_stock(use_dynamic_shifting=True)
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    call = {**CALL, **size, "mu": mu}
    theirs = stock("a red cat", generator=seeded(0)[0], **call)
    sigmas = stock.scheduler.sigmas
    assert torch.equal(
        best_of_one(pipe, "a red cat", generator=seeded(0)[0], **call).images, theirs.images
    )
    if mu is None:
        stock("a red cat", generator=seeded(0)[0], **CALL, height=8, width=8)
        assert not torch.equal(stock.scheduler.sigmas, sigmas)


def test_it_works_without_the_third_text_encoder(stock: Any) -> None:
    parts = {**stock.components, "text_encoder_3": None, "tokenizer_3": None}
    lean = StableDiffusion3Pipeline(**parts)
    lean.set_progress_bar_config(disable=True)
    pipe = MCTDPipeline.from_pipe(lean, reward_model=tiny.redness)
    theirs = lean("a red cat", generator=seeded(0)[0], **CALL)
    ours = best_of_one(pipe, "a red cat", generator=seeded(0)[0], **CALL)
    assert torch.equal(ours.images, theirs.images)
    assert pipe("a red cat", compute=3, **CALL).rewards[0] is not None


def test_embeddings_of_the_user_are_taken_as_the_stock_takes_them(stock: Any, pipe: Any) -> None:
    names = ("prompt_embeds", "negative_prompt_embeds")
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    texts = ["a red cat", "two dogs"]
    made = stock.encode_prompt(texts, None, None, max_sequence_length=tiny.TEXT_LENGTH)
    embeds = dict(zip((*names, *pooled), made, strict=True))
    theirs = stock(**embeds, generator=seeded(0, 1), **CALL)
    call = {
        "search": BestOfN(n=1),
        "rows_per_call": 2,
        "reward_prompt": "",
    }
    ours = pipe(**embeds, generator=seeded(0, 1), **call, **CALL)
    assert torch.equal(ours.images, theirs.images)
    with pytest.raises(ConfigError, match="2 embeddings of prompts for 4 images"):
        pipe(**embeds, num_images_per_prompt=2, **call, **CALL)


def test_guidance_by_skipped_layers_is_refused_by_name(pipe: Any) -> None:
    with (
        counted_rows(pipe.transformer) as rows,
        pytest.raises(ConfigError, match=r"skip_guidance_layers=\[0\] .* search=None"),
    ):
        pipe("a red cat", skip_guidance_layers=[0], **CALL)
    assert not rows()
    plain = pipe("a red cat", skip_guidance_layers=[0], search=None, **CALL)
    assert plain.images.shape == (1, 3, 16, 16)


def test_a_scheduler_that_cannot_be_branched_is_replaced_by_one_for_flows(stock: Any) -> None:
    parts = stock.components | {"scheduler": FlowMapEulerDiscreteScheduler(shift=3.0)}
    pipe = StableDiffusion3Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    ours = MCTDPipeline.from_pipe(pipe, reward_model=tiny.redness)
    with pytest.warns(UserWarning, match="steps a FlowMatchEulerDiscreteScheduler made from its"):
        out = best_of_one(ours, "a red cat", generator=seeded(0)[0], **CALL)
    assert torch.equal(out.images, stock("a red cat", generator=seeded(0)[0], **CALL).images)
    ours.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(UnsupportedSchedulerError, match="invert_sigmas=True"):
        best_of_one(ours, "a red cat", **CALL)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
        UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_best_of_one_is_the_stock_picture_of_other_solvers_of_flows(
    stock: Any, scheduler: Any
) -> None:
    theirs = StableDiffusion3Pipeline(**stock.components | {"scheduler": scheduler})
    theirs.set_progress_bar_config(disable=True)
    pipe = MCTDPipeline.from_pipe(theirs, reward_model=tiny.redness)
    call = {**CALL, "num_inference_steps": 6}
    ours = best_of_one(pipe, "a red cat", generator=seeded(0)[0], **call)
    images = theirs("a red cat", generator=seeded(0)[0], **call).images
    assert torch.equal(ours.images, images)
    with counted_rows(pipe.transformer) as rows:
        out = pipe("a red cat", compute=4, generator=seeded(0)[0], **call)
        assert out.ledger.total.rows + out.ledger.total.padded_rows == sum(rows())
    assert pipe.replay(out.search[0].recipe).reward == out.rewards[0]


def test_a_schedule_that_noises_again_at_each_step_is_searched() -> None:
    pipe = MCTDPipeline.from_pipe(
        tiny_sd3.make_stock(stochastic_sampling=True), reward_model=tiny.redness
    )
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    out = pipe("a red cat", search="beam", compute=3, generator=seeded(0)[0], **CALL)
    replayed = pipe.replay(out.search[0].recipe)
    assert replayed.reward == out.rewards[0]


def with_adapter(stock: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """With an adapter of random weights in each block."""
    transformer = stock.transformer
    channels, head = transformer.inner_dim, transformer.config.attention_head_dim
    with torch.random.fork_rng():
        torch.manual_seed(1)
        processors = {
            name: SD3IPAdapterJointAttnProcessor2_0(channels, channels, head, 16)
            for name in transformer.attn_processors
        }
        transformer.set_attn_processor(processors)
        transformer.image_proj = IPAdapterTimeImageProjection(
            embed_dim=6,
            output_dim=channels,
            hidden_dim=16,
            depth=1,
            dim_head=8,
            heads=2,
            num_queries=4,
            timestep_in_dim=8,
        )
    return stock


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_adapters_are_shown_their_images(guidance_scale: float) -> None:
    stock = with_adapter(tiny_sd3.make_stock())
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    pictures = torch.randn(2 if guidance_scale > 1 else 1, 1, 6, generator=seeded(7)[0])
    call = {**CALL, "guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    theirs = stock(PROMPTS, generator=seeded(0)[0], ip_adapter_image_embeds=pictures, **call)
    searching = {"search": BestOfN(n=1), "rows_per_call": 4}
    given = {"generator": seeded(0)[0], "ip_adapter_image_embeds": pictures, **searching}
    ours = pipe(PROMPTS, **given, **call)
    assert torch.equal(ours.images, theirs.images)
    replayed = pipe.replay(ours.search[3].recipe, ip_adapter_image_embeds=pictures)
    assert torch.equal(replayed.latents, ours.search[3].latents[0])
    plain = pipe(PROMPTS, generator=seeded(0)[0], **searching, **call)
    assert not torch.allclose(ours.images, plain.images, atol=1e-3)

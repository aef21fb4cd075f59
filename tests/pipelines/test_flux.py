"""Flux under search: packed latents, guidance as an input, and few steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FasterCacheConfig,
    FluxPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.moves import draw, finish_plainly, renoise
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.strategies import STRATEGIES, BestOfN
from tests.pipelines import tiny, tiny_flux
from tests.pipelines.family_tests import FamilyTests, counted_rows, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SIZE: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": tiny.TEXT_LENGTH}
CALL: dict[str, Any] = {**SIZE, "num_inference_steps": 4, "output_type": "pt"}


class TestFlux(FamilyTests):
    call: ClassVar[dict[str, Any]] = SIZE

    @classmethod
    def make_stock(cls) -> FluxPipeline:
        return tiny_flux.make_stock()


class TestFluxWithNegativePrompts(FamilyTests):
    call: ClassVar[dict[str, Any]] = {**SIZE, "negative_prompt": "grey", "true_cfg_scale": 3.0}
    rows_per_latent = 2
    calls_per_chunk = 2

    @classmethod
    def make_stock(cls) -> FluxPipeline:
        return tiny_flux.make_stock()


class TestFluxOfFourSteps(FamilyTests):
    call: ClassVar[dict[str, Any]] = {**SIZE, "guidance_scale": 0.0}
    steps = 4

    @classmethod
    def make_stock(cls) -> FluxPipeline:
        return tiny_flux.make_stock(guidance_embeds=False)


@pytest.fixture(scope="module")
def stock() -> FluxPipeline:
    return tiny_flux.make_stock()


@pytest.fixture(scope="module")
def pipe(stock: FluxPipeline) -> MCTDPipeline:
    return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)


@pytest.fixture(scope="module")
def few_steps() -> MCTDPipeline:
    stock = tiny_flux.make_stock(guidance_embeds=False)
    return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)


def best_of_one(pipe: Any, *args: Any, **call: Any) -> Any:
    return pipe(*args, search=BestOfN(n=1), rows_per_call=1, **call)


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.5},
        {"prompt_2": "a blue dog"},
        {"negative_prompt": "grey", "negative_prompt_2": "black", "true_cfg_scale": 2.0},
        {"true_cfg_scale": 2.0},
        {"height": 24, "width": 8},
        {"sigmas": [1.0, 0.6, 0.2]},
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


DYNAMIC = {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "scheduler",
    [DPMSolverMultistepScheduler(**FLOW, **DYNAMIC), UniPCMultistepScheduler(**FLOW, **DYNAMIC)],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_solvers_of_flows_are_set_up_as_the_stock_pipeline_does(
    stock: Any, scheduler: Any
) -> None:
    theirs = FluxPipeline(**stock.components | {"scheduler": scheduler})
    theirs.set_progress_bar_config(disable=True)
    pipe = MCTDPipeline.from_pipe(theirs, reward_model=tiny.redness)
    call = {**CALL, "num_inference_steps": 6}
    ours = best_of_one(pipe, "a red cat", generator=seeded(0)[0], **call)
    images = theirs("a red cat", generator=seeded(0)[0], **call).images
    assert torch.equal(ours.images, images)
    out = pipe("a red cat", search="mctd", compute=4, generator=seeded(0)[0], **call)
    assert pipe.replay(out.search[0].recipe).reward == out.rewards[0]


def test_a_solver_that_cannot_be_shifted_is_refused_by_name(pipe: Any) -> None:
    solver = DPMSolverMultistepScheduler(**FLOW)
    with pytest.raises(
        ConfigError, match=r"mu=0\.\d+, which DPMSolverMultistepScheduler takes only"
    ):
        pipe("a red cat", search_scheduler=solver, **CALL)


def test_there_is_nothing_to_scale_where_guidance_is_an_input(pipe: Any) -> None:
    out = pipe("a red cat", search="mctd", compute=4, generator=seeded(0)[0], **CALL)
    assert out.ledger.total.rows == out.ledger.total.nfe
    assert torch.tensor(out.search[0].tree.guidance).isnan().all()


def test_embeddings_of_the_user_are_taken_as_the_stock_takes_them(stock: Any, pipe: Any) -> None:
    texts = (["a red cat", "two dogs"], ["grey", "black"])
    (embeds, pooled, _), (negative, negative_pooled, _) = (
        stock.encode_prompt(text, max_sequence_length=tiny.TEXT_LENGTH) for text in texts
    )
    given = {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled,
        "true_cfg_scale": 2.0,
    }
    theirs = stock(**given, generator=seeded(0, 1), **CALL)
    call = {
        "search": BestOfN(n=1),
        "rows_per_call": 2,
        "reward_prompt": "",
    }
    ours = pipe(**given, generator=seeded(0, 1), **call, **CALL)
    assert torch.equal(ours.images, theirs.images)
    with pytest.raises(ConfigError, match="2 embeddings of prompts for 4 images"):
        pipe(**given, num_images_per_prompt=2, **call, **CALL)
    given["negative_prompt_embeds"] = negative[:1]
    with pytest.raises(ConfigError, match="2 prompts and negative_prompt_embeds has 1"):
        pipe(**given, **call, **CALL)


def test_embeddings_need_no_text_encoders(stock: Any, pipe: Any, tmp_path: Path) -> None:
    embeds, pooled, _ = stock.encode_prompt("a red cat", max_sequence_length=tiny.TEXT_LENGTH)
    pipe.save_pretrained(tmp_path)
    readers = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    lean = MCTDPipeline.from_pretrained(tmp_path, reward_model=tiny.redness, **readers)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "reward_prompt": ""}
    ours = best_of_one(lean, generator=seeded(0)[0], **given, **CALL)
    del given["reward_prompt"]
    theirs = stock(generator=seeded(0)[0], **given, **CALL)
    assert torch.equal(ours.images, theirs.images)
    with pytest.raises(ConfigError, match=r"no text_encoder and no text_encoder_2 .* prompts with"):
        lean("a red cat", **CALL)


def test_a_transformer_that_caches_is_refused() -> None:
    pipe = MCTDPipeline.from_pipe(tiny_flux.make_stock(), reward_model=tiny.redness)
    pipe.transformer._cache_config = FasterCacheConfig()
    with (
        counted_rows(pipe.transformer) as rows,
        pytest.raises(ConfigError, match="disable_cache"),
    ):
        pipe("a red cat", **CALL)
    assert not rows()


def with_adapters(stock: FluxPipeline) -> FluxPipeline:
    """With two adapters of random weights in each block of two streams."""
    transformer = stock.transformer
    channels, text_channels = transformer.inner_dim, transformer.config.joint_attention_dim
    processors = dict(transformer.attn_processors)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name in processors:
            if name.startswith("transformer_blocks"):
                processors[name] = FluxIPAdapterAttnProcessor(
                    channels, text_channels, num_tokens=(4, 4), scale=1.0
                )
        transformer.encoder_hid_proj = MultiIPAdapterImageProjection(
            [ImageProjection(6, text_channels, 4) for _ in range(2)]
        )
    transformer.set_attn_processor(processors)
    return stock


@pytest.mark.parametrize("sides", ["positive", "both"])
def test_adapters_are_shown_their_images(sides: str) -> None:
    stock = with_adapters(tiny_flux.make_stock())
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    some, others = torch.randn(2, 2, 1, 1, 6, generator=seeded(7)[0])
    pictures: dict[str, Any] = {"ip_adapter_image_embeds": list(some)}
    pictures["negative_ip_adapter_image_embeds"] = list(others)
    call = {**CALL, "num_images_per_prompt": 2}
    if sides == "both":
        call |= {"true_cfg_scale": 2.0, "negative_prompt": ["grey", "black"]}
    prompts = ["a red cat", "two dogs"]
    theirs = stock(prompts, generator=seeded(0)[0], **pictures, **call)
    searching = {"search": BestOfN(n=1), "rows_per_call": 4}
    ours = pipe(prompts, generator=seeded(0)[0], **pictures, **searching, **call)
    assert torch.equal(ours.images, theirs.images)
    replayed = pipe.replay(ours.search[3].recipe, **pictures)
    assert torch.equal(replayed.latents, ours.search[3].latents[0])
    pictures["ip_adapter_image_embeds"] = list(others)
    shown_others = pipe(prompts, generator=seeded(0)[0], **pictures, **searching, **call)
    assert not torch.allclose(ours.images, shown_others.images, atol=1e-3)


# Features of blocks


def make_head(channels: dict[str, int]) -> InformationGainEvaluator:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head = InformationGainEvaluator(
            "FluxPipeline",
            channels,
            embedding_size=4,
            hidden_size=8,
            num_layers=1,
            num_levels=3,
            log_snr_range=(-20.0, 20.0),
        )
    head.jump_log_snr.copy_(torch.tensor([-6.0, 0.0, 6.0]))
    head.jump_cost.fill_(0.5)
    return head.eval()


def test_a_head_reads_the_blocks_that_it_names(stock: Any) -> None:
    head = make_head({"block.1": 64, "estimate": 48})
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness, ige=head)
    world = pipe.open_world("a red cat", reads_features=True, **CALL)
    none = np.zeros(1, dtype=np.int64)
    handles = world.environment.reset(none, none)
    world.environment.denoise(handles)
    assert set(world.environment.features(handles)) == {"block.1", "estimate"}
    call = {**CALL, "num_inference_steps": 8}
    search = BestOfN(n=2, evaluations=5, stride_policy="ige:final_similarity")
    prompts = ["a red cat", "two dogs"]
    both = pipe(prompts, search=search, nfe_budget=10, generator=seeded(3, 4), **call)
    alone = pipe(prompts[1:], search=search, nfe_budget=10, generator=seeded(4), **call)
    assert not np.isnan(both.search[1].tree.predicted_error).all()
    assert torch.equal(alone.images[0], both.images[1])


def test_a_head_that_names_no_block_of_the_transformer_is_refused(stock: Any) -> None:
    with pytest.raises(ConfigError, match=r"'block\.7': 64.*'block\.0': 64"):
        MCTDPipeline.from_pipe(stock, ige=make_head({"block.7": 64}))


# Few steps


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_search_works_at_four_steps(few_steps: Any, name: str) -> None:
    with counted_rows(few_steps.transformer) as rows:
        out = few_steps(
            "a red cat", search=name, compute=6, generator=seeded(0)[0], rows_per_call=4, **CALL
        )
        assert out.ledger.total.rows + out.ledger.total.padded_rows == sum(rows())
    found = out.search[0]
    assert found.finished
    assert out.nfe[0] <= 6 * 4
    assert few_steps.replay(found.recipe).reward == out.rewards[0]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_search_works_at_one_step_and_two(few_steps: Any, name: str, steps: int) -> None:
    call = {**CALL, "num_inference_steps": steps}
    out = few_steps("a red cat", search=name, compute=8, generator=seeded(0)[0], **call)
    assert out.search[0].finished
    assert out.nfe[0] <= 8 * steps


@dataclass(frozen=True)
class NoisedAgain:
    """A search that finishes samples and goes back half way from each."""

    name: str = "noised_again"

    def least_evaluations(self, num_steps: int) -> int:
        return num_steps + num_steps // 2

    def search(self, problem: Problem) -> Asks:
        nodes = yield from draw(problem, 2)
        nodes = yield from finish_plainly(problem, nodes)
        nodes = yield from renoise(problem, nodes, step_index=problem.num_steps // 2)
        yield from finish_plainly(problem, nodes)


@pytest.mark.parametrize("search", ["best_of_n", "zero-order", NoisedAgain()])
def test_searches_over_initial_noise_and_by_noising_again_move_at_four_steps(
    few_steps: Any, search: Any
) -> None:
    out = few_steps("a red cat", search=search, compute=4, generator=seeded(0)[0], **CALL)
    found = out.search[0]
    assert len({sample.reward for sample in found.finished}) == len(found.finished) > 3
    for sample, latents in zip(found.finished, found.latents, strict=True):
        replayed = few_steps.replay(found.recipe_of(sample.node))
        assert torch.equal(replayed.latents, latents)

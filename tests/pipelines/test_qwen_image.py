"""Qwen-Image under search: texts that are not padded, and guidance that keeps norms."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import QwenImagePipeline

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from tests.pipelines import tiny, tiny_qwen_image
from tests.pipelines.family_tests import PROMPTS, FamilyTests, counted_rows

SIZE: dict[str, Any] = {"height": 16, "width": 16}
GUIDED: dict[str, Any] = {**SIZE, "negative_prompt": "grey", "true_cfg_scale": 3.0}


class QwenImageTests(FamilyTests):
    call: ClassVar[dict[str, Any]] = SIZE

    @classmethod
    def make_stock(cls) -> QwenImagePipeline:
        return tiny_qwen_image.make_stock()

    def test_a_batch_at_its_own_rows_per_call_is_the_stock_batch(
        self, stock: Any, pipe: Any
    ) -> None:
        """To rounding, since the stock pipeline pads texts to the longest one of the batch."""
        theirs = self.run(stock, PROMPTS, 0, 1, 2)
        call = {"search": "best_of_n", "compute": 1, "rows_per_call": 3}
        ours = self.run(pipe, PROMPTS, 0, 1, 2, **call)
        torch.testing.assert_close(ours.images, theirs.images, rtol=0, atol=1e-4)


class TestQwenImage(QwenImageTests):
    pass


class TestGuidedQwenImage(QwenImageTests):
    call: ClassVar[dict[str, Any]] = GUIDED
    rows_per_latent = 2
    calls_per_chunk = 2


@pytest.fixture(scope="module")
def stock() -> QwenImagePipeline:
    return tiny_qwen_image.make_stock()


@pytest.fixture(scope="module")
def pipe(stock: QwenImagePipeline) -> MCTDPipeline:
    return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)


@pytest.mark.parametrize(
    "call",
    [
        {"true_cfg_scale": 1.0},
        {"negative_prompt": None},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"height": 24, "width": 8},
        {"max_sequence_length": 8},
    ],
    ids="-".join,
)
def test_stock_arguments_keep_their_meaning_in_a_search(
    stock: Any, pipe: Any, call: dict[str, Any]
) -> None:
    call = {**GUIDED, **call}
    theirs = QwenImageTests.run(stock, **call)
    ours = QwenImageTests.run(pipe, search="best_of_n", compute=1, rows_per_call=1, **call)
    assert torch.equal(ours.images, theirs.images)
    replayed = pipe.replay(ours.search[0].recipe)
    assert torch.equal(replayed.latents, ours.search[0].latents[0])


def test_embeddings_of_the_user_are_taken_with_their_masks(stock: Any, pipe: Any) -> None:
    embeds, mask = stock.encode_prompt(["a red cat", "two dogs"])
    negative, negative_mask = stock.encode_prompt(["grey", "black"])
    given = {
        "prompt_embeds": embeds,
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_embeds_mask": negative_mask,
    }
    call = {**SIZE, "true_cfg_scale": 3.0}
    searched = {"search": "best_of_n", "compute": 1, "rows_per_call": 1, "reward_prompt": ""}
    ours = QwenImageTests.run(pipe, None, 0, 1, **call, **given, **searched)
    for row, image in enumerate(ours.images):
        alone = {name: part[row : row + 1] for name, part in given.items()}
        theirs = QwenImageTests.run(stock, None, row, **call, **alone)
        assert torch.equal(image, theirs.images[0])


def test_a_transformer_that_takes_guidance_is_refused() -> None:
    pipe = MCTDPipeline.from_pipe(tiny_qwen_image.make_stock(), reward_model=tiny.redness)
    pipe.transformer.register_to_config(guidance_embeds=True)
    with counted_rows(pipe.transformer) as rows, pytest.raises(ConfigError, match="as an input"):
        QwenImageTests.run(pipe, guidance_scale=3.0, **SIZE)
    assert not rows()

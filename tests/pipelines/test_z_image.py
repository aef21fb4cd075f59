"""Z-Image under search: texts of some lengths, and latents in single precision."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from tests.pipelines import tiny, tiny_z_image
from tests.pipelines.family_tests import PROMPTS, FamilyTests, counted_rows

SIZE: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 96}
LONG = "a red cat that sits on a blue hat and looks at two dogs"
ONE = {"search": "best_of_n", "compute": 1, "rows_per_call": 1}


class ZImageTests(FamilyTests):
    call: ClassVar[dict[str, Any]] = SIZE

    @classmethod
    def make_stock(cls) -> ZImagePipeline:
        return tiny_z_image.make_stock()

    @classmethod
    def run(cls, pipe: Any, prompt: Any = PROMPTS[0], *seeds: int, **call: Any) -> Any:
        # The stock pipeline writes its template into the list of prompts that it is given.
        return super().run(pipe, copy.copy(prompt), *seeds, **call)

    def test_best_of_one_in_half_precision_is_the_stock_picture(self) -> None:
        stock = self.make_stock().to(torch.bfloat16)
        pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
        theirs, ours = self.run(stock), self.run(pipe, **ONE)
        assert torch.equal(ours.images, theirs.images)
        # The latents of the stock pipeline are always in single precision.
        assert self.run(pipe, search="mctd", compute=2).search[0].latents.dtype == torch.float32


class TestZImage(ZImageTests):
    rows_per_latent = 2


class TestZImageOfEightSteps(ZImageTests):
    call: ClassVar[dict[str, Any]] = {**SIZE, "guidance_scale": 0.0}
    steps = 8


@pytest.fixture(scope="module")
def stock() -> ZImagePipeline:
    return tiny_z_image.make_stock()


@pytest.fixture(scope="module")
def pipe(stock: ZImagePipeline) -> MCTDPipeline:
    return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)


@pytest.mark.parametrize(
    "call",
    [
        {"negative_prompt": LONG},
        {"cfg_normalization": True},
        {"cfg_normalization": 0.5, "guidance_scale": 9.0},
        {"cfg_truncation": None},
        {"cfg_truncation": 0.5, "guidance_scale": 0.0},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"height": 24, "width": 8},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("prompt", ["a red cat", LONG], ids=["short", "long"])
def test_stock_arguments_keep_their_meaning_in_a_search(
    stock: Any, pipe: Any, prompt: str, call: dict[str, Any]
) -> None:
    theirs = ZImageTests.run(stock, prompt, **call)
    ours = ZImageTests.run(pipe, prompt, **ONE, **call)
    assert torch.equal(ours.images, theirs.images)
    replayed = pipe.replay(ours.search[0].recipe)
    assert torch.equal(replayed.latents, ours.search[0].latents[0])


def test_an_image_does_not_depend_on_how_long_the_other_prompts_are(pipe: Any) -> None:
    call = {"search": "mctd", "compute": 3, "rows_per_call": 4}
    with counted_rows(pipe.transformer) as rows:
        together = ZImageTests.run(pipe, ["a red cat", LONG, "two dogs"], 3, 4, 5, **call)
        total = together.ledger.total
        assert total.rows + total.padded_rows == sum(rows())
        assert total.calls == len(rows())
    for row, prompt in enumerate(["a red cat", LONG, "two dogs"]):
        alone = ZImageTests.run(pipe, [prompt], 3 + row, **call)
        assert torch.equal(alone.images[0], together.images[row])
        assert alone.nfe[0] == together.nfe[row]


def test_the_plain_sample_is_made_beside_a_search(stock: Any, pipe: Any) -> None:
    prompts = ["a red cat", LONG]
    call = {"search": "mctd", "compute": 3, "rows_per_call": 1, "include_plain": True}
    out = ZImageTests.run(pipe, prompts, 3, 4, **call)
    for row, prompt in enumerate(prompts):
        theirs = ZImageTests.run(stock, [prompt], 3 + row)
        assert torch.equal(out.plain.images[row], theirs.images[0])


def test_features_are_those_of_the_positive_rows(pipe: Any) -> None:
    call = {"prompt": "a red cat", "num_inference_steps": 4, "latents": torch.ones(1, 4, 8, 8)}
    none = np.zeros(1, dtype=np.int64)
    features = []
    for scale, negative in ((0.0, None), (5.0, "grey"), (5.0, "a blue hat")):
        given = {**call, **SIZE, "guidance_scale": scale, "negative_prompt": negative}
        environment = pipe.open_world(reads_features=True, **given).environment
        handles = environment.reset(none, none)
        environment.denoise(handles)
        features.append(environment.features(handles)["block.1"])
    for guided in features[1:]:
        torch.testing.assert_close(guided, features[0], rtol=1e-4, atol=1e-4)


def test_embeddings_of_the_user_are_taken_as_the_stock_takes_them(stock: Any, pipe: Any) -> None:
    embeds, negative = stock.encode_prompt(
        ["a red cat", "two dogs"], negative_prompt=["grey", "black"], max_sequence_length=96
    )
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    theirs = ZImageTests.run(stock, None, 0, 1, **given)
    call = {**ONE, "rows_per_call": 2, "reward_prompt": ""}
    ours = ZImageTests.run(pipe, None, 0, 1, **given, **call)
    assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ({"cfg_truncation": 0.5}, "cfg_truncation=0.5 ends guidance"),
        ({"height": 18}, "height=18: give a multiple of 4"),
        ({"prompt": None}, "there is no prompt"),
        ({"prompt": None, "prompt_embeds": [torch.zeros(4, 16)]}, "need negative_prompt_embeds"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_call(
    pipe: Any, call: dict[str, Any], complaint: str
) -> None:
    with counted_rows(pipe.transformer) as rows, pytest.raises(ConfigError, match=complaint):
        pipe(**{"prompt": "a red cat", "num_inference_steps": 2, **SIZE, **call})
    assert not rows()

"""Fusions from a call of the pipeline to the recipe: what methods need, and what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.denoising.fusion import FUSIONS, VERDICTS
from mctd_diffusers.denoising.protocols import Encoder
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.feature_decoder import FeatureToLatent
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.saved_calls import CallSaver
from mctd_diffusers.search.strategies import MCTD
from mctd_diffusers.search.tree import FUSE, ancestry, to_json
from tests.pipelines import tiny, tiny_flux

PROMPTS = ["a red cat", "two dogs", "a bird"]
CALL: dict[str, Any] = {
    "num_inference_steps": 12,
    "guidance_scale": 4.0,
    "output_type": "pt",
    "rows_per_call": 4,
    "compute": 5,
}
# Random weights know no data, so nothing is asked of the denoiser.
LENIENT = MCTD(third_moves=("fuse",), num_particles=3, max_inconsistency=float("inf"))


def search(pipe: MCTDPipeline, prompts: list[str] = PROMPTS[:1], **call: Any) -> Any:
    seeds = [torch.Generator().manual_seed(7 + PROMPTS.index(prompt)) for prompt in prompts]
    return pipe(prompts, generator=seeds, **{**CALL, "search": LENIENT, **call})


def below_fused(search: Any) -> list[int]:
    """Finished nodes that a fused one leads to."""
    tree = search.tree
    return [
        sample.node
        for sample in search.finished
        if (tree.move[ancestry(tree, [sample.node])] == FUSE).any()
    ]


def feature_decoder(seed: int = 5) -> FeatureToLatent:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FeatureToLatent("StableDiffusionPipeline", "up.0", 16, scale_factor=1).eval()


@pytest.mark.parametrize("method", sorted(FUSIONS))
def test_each_method_fuses_and_its_recipe_makes_the_picture_again(
    pipe: MCTDPipeline, method: str
) -> None:
    out = search(pipe, fusion=method)
    found = out.search[0]
    nodes = below_fused(found)
    assert nodes, found.fusions
    recipe = json.loads(json.dumps(found.recipe_of(nodes[0])))
    assert recipe["fusion"]["method"] == method
    again = pipe.replay(recipe)
    place = [sample.node for sample in found.finished].index(nodes[0])
    assert again.latents is not None
    assert torch.equal(again.latents, found.latents[place])
    assert found.spent.nfe <= 60


def test_features_are_fused_by_the_decoder_of_the_pipeline(pipe: MCTDPipeline) -> None:
    by_patches = search(pipe, fusion="features")
    try:
        pipe.feature_decoder = feature_decoder()
        out = search(pipe, fusion="features")
        nodes = below_fused(out.search[0])
        recipe = out.search[0].recipe_of(nodes[0])
        assert recipe["fusion"]["map_block"] == "up.0"
        place = [sample.node for sample in out.search[0].finished].index(nodes[0])
        again = pipe.replay(recipe).latents
        assert again is not None
        assert torch.equal(again, out.search[0].latents[place])
        pipe.feature_decoder = feature_decoder(seed=6)
        with pytest.raises(ConfigError, match="feature_decoder"):
            pipe.replay(recipe)
    finally:
        pipe.feature_decoder = None
    assert to_json(by_patches.search[0].tree) != to_json(out.search[0].tree)


def test_one_and_three_prompts_a_call_are_bit_equal(pipe: MCTDPipeline) -> None:
    strategy = MCTD(third_moves=("fuse", "go_back", "resample"), max_inconsistency=float("inf"))
    together = search(pipe, PROMPTS, search=strategy, fusion="tokens")
    alone = [search(pipe, [prompt], search=strategy, fusion="tokens") for prompt in PROMPTS]
    for place, one in enumerate(alone):
        mine, other = together.search[place], one.search[0]
        assert torch.equal(mine.latents, other.latents)
        assert mine.fusions == other.fusions
        assert mine.moves_made == other.moves_made
    assert any(found.fusions.get(VERDICTS[0]) for found in together.search)


def test_a_saved_search_goes_on_with_its_fusions(
    pipe: MCTDPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(pipe, fusion="pixel")
    saves, save = [0], CallSaver.save

    def stop(saver: CallSaver, *arguments: Any) -> None:
        save(saver, *arguments)
        saves[0] += 1
        if saves[0] == 20:
            monkeypatch.setattr(CallSaver, "save", save)
            raise InterruptedError

    monkeypatch.setattr(CallSaver, "save", stop)
    with pytest.raises(InterruptedError):
        search(pipe, fusion="pixel", save_to=tmp_path / "saved", save_every_s=0)
    resumed = pipe.resume(tmp_path / "saved")
    assert below_fused(resumed.search[0])
    assert to_json(resumed.search[0].tree) == to_json(whole.search[0].tree)
    assert torch.equal(resumed.search[0].latents, whole.search[0].latents)
    assert resumed.search[0].recipe == whole.search[0].recipe


def test_what_fusing_decodes_is_paid_for_from_the_budget(pipe: MCTDPipeline) -> None:
    out = search(pipe, fusion="pixel", compute=None, cost_budget=260.0)
    found = out.search[0]
    assert out.ledger.prices.cost(found.spent) <= 260.0 + 1e-6
    groups = sum(len(group) for made in found.result.moves_made for group in made.particles)
    assert found.spent.decodes >= groups + len(found.finished)
    assert groups


def test_auto_is_a_method_and_none_fuses_nothing(pipe: MCTDPipeline) -> None:
    plain = search(pipe, search="mctd")
    assert plain.search[0].fusions == {}
    assert not (plain.search[0].tree.move == FUSE).any()
    assert "fusion" not in plain.search[0].recipe
    auto = search(pipe, search="mctd", fusion="auto")
    assert sum(auto.search[0].fusions.values())
    json.dumps([auto.search[0].fusions, auto.search[0].moves_made])


def test_what_cannot_work_is_refused_before_the_first_call(pipe: MCTDPipeline) -> None:
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        search(pipe, fusion="token")
    with pytest.raises(ConfigError, match="no setting of search 'beam'"):
        search(pipe, search="beam", fusion="x0")
    with pytest.raises(ConfigError, match="search=None"):
        search(pipe, search=None, fusion="x0", rows_per_call=None, compute=None)
    packed = MCTDPipeline.from_pipe(tiny_flux.make_stock(), reward_model=tiny.redness)
    for method in ("tokens", "pixel", "features"):
        with pytest.raises(ConfigError, match="packed into tokens"):
            packed("a red cat", num_inference_steps=4, height=16, width=16, fusion=method)


def test_pictures_are_encoded_as_they_are_decoded(pipe: MCTDPipeline) -> None:
    world = pipe.open_world("a red cat", num_inference_steps=4)
    decoder = world.prepared.decoder
    assert isinstance(decoder, Encoder)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        law = pipe.vae.encode(images * 2 - 1).latent_dist
        wanted = law.mode() * pipe.vae.config.scaling_factor
        np.testing.assert_allclose(decoder.encode(images), wanted, rtol=1e-4, atol=1e-6)

"""What cannot work is refused before the first network call, in words that name value and cure."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mctd_diffusers import BestOfN, MCTDPipeline, read_recipe
from mctd_diffusers.calls import SearchOptions, check_options, check_stock, reward_prompts_of
from mctd_diffusers.errors import BudgetError, ConfigError
from mctd_diffusers.results import RECIPE_ENTRIES, RECIPE_KEY, check_recipe
from tests.pipelines import tiny

STOCK: dict[str, Any] = {
    "prompt": "a cup",
    "height": None,
    "width": None,
    "num_inference_steps": 2,
    "timesteps": None,
    "sigmas": None,
    "guidance_scale": 3.0,
    "negative_prompt": None,
    "num_images_per_prompt": 1,
    "eta": 0.0,
    "generator": None,
    "latents": None,
    "output_type": "pil",
    "guidance_rescale": 0.0,
}
CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "rows_per_call": 2}


def untyped_options(**given: Any) -> SearchOptions:
    """Options as a caller may give them whose code nobody checks."""
    options = SearchOptions()
    for name, entry in given.items():
        object.__setattr__(options, name, entry)
    return options


@pytest.fixture(scope="module")
def pipe() -> MCTDPipeline:
    """A tiny pipeline with a reward of its own."""
    made = MCTDPipeline.from_pipe(tiny.make_stock(), reward_model=tiny.redness)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def recipe(pipe: MCTDPipeline) -> dict[str, Any]:
    """A recipe, as it comes out of a file."""
    generator = torch.Generator().manual_seed(0)
    out = pipe("a cup", **CALL, search=BestOfN(n=1), compute=1, generator=generator)
    found: dict[str, Any] = json.loads(json.dumps(out.search[0].recipe))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with all that a folder may hold."""
    saved = tmp_path_factory.mktemp("saved")
    parts = {"reward_model": tiny.make_clip_reward(), "preview_vae": tiny.make_preview_vae()}
    MCTDPipeline.from_pipe(tiny.make_stock(), **parts).save_pretrained(saved)
    return saved


# Calls


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"compute": float("inf")}, "compute=inf: give a finite number above 0"),
        ({"compute": "8"}, "compute='8': give a finite number"),
        ({"nfe_budget": 8.0}, "nfe_budget=8.0: give a whole number of at least 1"),
        ({"wave_size": 2.5}, "wave_size=2.5: give a whole number of at least 1"),
        ({"wave_size": "x"}, "wave_size='x': give a whole number"),
        ({"strides": 2}, "strides=2: give whole numbers of at least 1, such as (1, 2, 4)"),
        ({"strides": "12"}, "strides='12': give whole numbers"),
        ({"strides": [1, 2.5]}, "strides=[1, 2.5]: give whole numbers"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        check_options(untyped_options(**options))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: give a finite number"),
        ({"guidance_scale": None}, "guidance_scale=None: give a finite number"),
        ({"eta": "x"}, "eta='x': give a finite number"),
        ({"height": "16", "width": 16}, "height='16': give a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps=True: give a whole number"),
        ({"generator": 3}, "generator=3: give a torch.Generator, or a list of them"),
        ({"generator": [3]}, "generator=[3]: give a torch.Generator, or a list of them"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "latents are a ndarray: give a tensor"),
    ],
)
def test_a_wrong_stock_argument_is_named(call: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        check_stock(STOCK | call)


def test_a_reward_prompt_is_text() -> None:
    with pytest.raises(ConfigError, match="reward_prompt=3: give a string, or a list of strings"):
        reward_prompts_of(dict(STOCK), untyped_options(reward_prompt=3))


def test_numbers_of_numpy_are_numbers() -> None:
    stock = STOCK | {"num_inference_steps": np.int64(2), "guidance_scale": np.float32(3)}
    check_stock(stock)
    assert type(stock["num_inference_steps"]) is int  # a recipe is plain data
    assert type(stock["guidance_scale"]) is float
    check_options(untyped_options(compute=np.float32(2), rows_per_call=np.int64(2)))


def test_a_budget_without_room_for_the_plain_sample_says_what_is_needed(
    pipe: MCTDPipeline,
) -> None:
    complaint = "a budget of 2 NFE cannot pay for the plain sample and one of 'mctd'.* 2 \\+ 2 NFE"
    with pytest.raises(BudgetError, match=complaint):
        pipe("a cup", **CALL, compute=1, include_plain=True)


@pytest.mark.parametrize("count", ["3", 2.5, 0])
def test_the_best_samples_are_asked_for_by_a_whole_number(pipe: MCTDPipeline, count: Any) -> None:
    found = pipe("a cup", **CALL, search="best_of_n", compute=2).search[0]
    with pytest.raises(ConfigError, match=re.escape(f"top({count!r})")):
        inspect.unwrap(type(found).top)(found, count)


# Recipes


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda recipe: recipe | {"moves": []}, "moves"),
        (lambda recipe: recipe | {"moves": recipe["moves"][1:]}, "moves"),
        (lambda recipe: recipe | {"moves": recipe["moves"][:-1]}, "end at step 1 of 2"),
        (lambda recipe: recipe | {"moves": [*recipe["moves"], recipe["moves"][-1]]}, "3 of 2"),
        (lambda recipe: recipe | {"moves": ["draw"]}, "moves"),
        (lambda recipe: recipe | {"call": {}}, "lacks height"),
    ],
)
def test_a_recipe_that_is_none_is_refused(
    pipe: MCTDPipeline, recipe: dict[str, Any], change: Callable[[Any], Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        pipe.replay(change(recipe))


@pytest.mark.parametrize("recipe", [None, "picture.png"])
def test_a_recipe_is_plain_data(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=f"recipe is a {type(recipe).__name__}: .*read_recipe"):
        check_recipe(recipe, "StableDiffusionPipeline")


def test_a_recipe_without_one_of_its_entries_is_refused_where_it_is_read(
    pipe: MCTDPipeline, recipe: dict[str, Any]
) -> None:
    read = {*RECIPE_ENTRIES, "version", "pipeline"}
    assert read <= set(recipe)
    for name in recipe:
        cut = {key: entry for key, entry in recipe.items() if key != name}
        if name in read:
            with pytest.raises(ConfigError, match=name):
                pipe.replay(cut)
        else:
            assert pipe.replay(cut).reward == recipe["reward"]


def test_an_argument_that_no_replay_takes_is_refused(
    pipe: MCTDPipeline, recipe: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="replay takes no guidance_scale"):
        pipe.replay(recipe, guidance_scale=3.0)


@pytest.mark.parametrize("text", ["{no", "[]"])
def test_a_recipe_that_was_spoilt_is_said(tmp_path: Path, text: str) -> None:
    chunks = PngInfo()
    chunks.add_itxt(RECIPE_KEY, text)
    Image.new("RGB", (4, 4)).save(tmp_path / "spoilt.png", pnginfo=chunks)
    with pytest.raises(ConfigError, match=r"recipe in .*spoilt\.png cannot be read"):
        read_recipe(tmp_path / "spoilt.png")


# Folders


def _index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "lacks tokenizer"),
        (lambda folder: shutil.rmtree(folder / "reward_model"), "lacks reward_model"),
        (lambda folder: shutil.rmtree(folder / "preview_vae"), "lacks preview_vae"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "holds no object"),
        (lambda folder: _index(folder, _mctd="clip"), "_mctd.* is 'clip'"),
        (lambda folder: _index(folder, _mctd={"reward_model": 5}), "the saved reward is 5"),
        (
            lambda folder: _index(folder, _mctd={"reward_model": {"kind": "clip", "scal": 1}}),
            "the saved reward is .*scal",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], complaint: str
) -> None:
    spoilt = shutil.copytree(folder, tmp_path / "model")
    spoil(spoilt)
    with pytest.raises(ConfigError, match=complaint):
        MCTDPipeline.from_pretrained(spoilt)


def test_a_part_that_is_passed_may_be_missing_in_the_folder(folder: Path, tmp_path: Path) -> None:
    partial = shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(partial / "unet")
    shutil.rmtree(partial / "reward_model")
    unet = tiny.make_stock().unet
    pipe = MCTDPipeline.from_pretrained(partial, unet=unet, reward_model=None)
    assert pipe.unet is unet
    assert pipe.reward_model is None


def test_a_path_that_is_no_folder_is_not_taken_for_a_repository(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "./nothing", "a/b/c"):
        with pytest.raises(ConfigError, match="there is no such folder"):
            MCTDPipeline.from_pretrained(path)

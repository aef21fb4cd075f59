"""What is made of a stock pipeline is as if it had been written out, for every family."""

from __future__ import annotations

import importlib
import inspect
import pydoc
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import StableDiffusionPipeline

from mctd_diffusers.calls import SearchOptions
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.searching import searches
from mctd_diffusers.families.stable_diffusion import MCTDStableDiffusionPipeline
from mctd_diffusers.pipeline import FAMILIES, MCTDPipeline, family_class
from tests.pipelines import tiny

ROOT = Path(__file__).parents[2]
OURS = [option.name for option in fields(SearchOptions)]
PARTS = ["preview_vae", "reward_model", "ige"]

each_family = pytest.mark.parametrize("name", sorted(FAMILIES))


def parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


@each_family
def test_a_family_is_both_a_search_and_the_stock_pipeline(name: str) -> None:
    family, stock = family_class(name), getattr(diffusers, name)
    assert family.stock_class is stock
    assert issubclass(family, MCTDPipeline)
    assert issubclass(family, stock)


@each_family
def test_stock_arguments_of_a_call_keep_their_order_defaults_and_types(name: str) -> None:
    ours, stock = (
        parameters(cls.__call__) for cls in (family_class(name), getattr(diffusers, name))
    )
    rest = [stock.pop()] if stock[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    assert ours == [*stock, *ours[len(stock) : len(stock) + len(OURS)], *rest]
    searching = {p.name: p for p in ours[len(stock) : len(stock) + len(OURS)]}
    assert list(searching) == OURS
    assert {p.kind for p in searching.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert {name: p.default for name, p in searching.items()} == {
        option.name: option.default for option in fields(SearchOptions)
    }


@each_family
def test_components_of_a_family_are_the_stock_ones_and_ours(name: str) -> None:
    family, stock = family_class(name), getattr(diffusers, name)
    ours, theirs = parameters(family.__init__), parameters(stock.__init__)
    assert ours[: len(theirs)] == theirs
    assert [p.name for p in ours[len(theirs) :]] == PARTS
    modules, settings = family._get_signature_keys(family)
    stock_modules, stock_settings = stock._get_signature_keys(stock)
    assert set(modules) == {*stock_modules, "preview_vae", "ige"}
    assert set(settings) == {*stock_settings, "reward_model"}
    types = family._get_signature_types()
    assert {part: types[part] for part in stock_modules} == {
        part: stock._get_signature_types()[part] for part in stock_modules
    }


@each_family
def test_offload_knows_every_model_of_a_family(name: str) -> None:
    family, stock = family_class(name), getattr(diffusers, name)
    order = family.model_cpu_offload_seq.split("->")
    assert [part for part in order if part != "preview_vae"] == stock.model_cpu_offload_seq.split(
        "->"
    )
    assert order.index("preview_vae") < order.index("vae")
    assert set(family._exclude_from_cpu_offload) == {*stock._exclude_from_cpu_offload, "ige"}


@each_family
def test_help_says_what_every_argument_of_a_search_means(name: str) -> None:
    family = family_class(name)
    text = pydoc.plain(pydoc.render_doc(family.__call__))
    assert f"those of [`{name}`]" in text
    for argument in ("prompt", "num_inference_steps", *OURS):
        assert f"{argument} (" in text, argument
    text = pydoc.plain(pydoc.render_doc(family.__init__))
    for argument in PARTS:
        assert f"{argument} (" in text, argument
    for function in (family.__init__, family.__call__):
        assert function.__module__ == family.__module__
        assert function.__qualname__ == f"{family.__name__}.{function.__name__}"
        assert set(function.__annotations__) >= set(PARTS if "init" in function.__name__ else OURS)


@each_family
def test_a_family_has_a_file_for_custom_pipelines(name: str) -> None:
    module, family = FAMILIES[name].split(":")
    path = ROOT / "pipelines" / f"{module.rsplit('.', maxsplit=1)[-1]}.py"
    assert f"from {module} import {family}" in path.read_text("utf-8")
    assert importlib.import_module(module).__doc__


def test_every_option_of_a_search_is_documented_beside_its_default() -> None:
    documented = inspect.getdoc(SearchOptions) or ""
    assert all(f"\n    {name} (" in documented for name in OURS)


def test_what_a_family_says_itself_is_left_alone() -> None:
    @searches(StableDiffusionPipeline)
    class Own(MCTDStableDiffusionPipeline):
        """A family with an order of its own."""

        model_cpu_offload_seq = "vae->text_encoder->unet"

    assert Own.model_cpu_offload_seq == "vae->text_encoder->unet"
    assert Own.__call__.__qualname__.endswith("Own.__call__")


def test_a_family_inherits_from_what_it_searches() -> None:
    class Lost(MCTDPipeline):
        """A family that forgot its stock pipeline."""

    complaint = r"write class Lost\(MCTDPipeline, StableDiffusionPipeline\)"
    with pytest.raises(ConfigError, match=complaint):
        searches(StableDiffusionPipeline)(Lost)


def test_a_family_that_is_not_whole_is_told_what_it_lacks() -> None:
    @searches(StableDiffusionPipeline)
    class Begun(MCTDPipeline, StableDiffusionPipeline):  # type: ignore[misc]  # untyped base
        """A family of which nothing is written yet."""

    pipe = Begun.from_pipe(tiny.make_stock(), reward_model=tiny.redness)
    with pytest.raises(NotImplementedError, match=r"Begun has no method _fill_in.*extending\.md"):
        pipe("a cat", num_inference_steps=2)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("serch", "'serch' is no argument of .*: did you mean 'search'"),
        ("colour", "'colour' is no argument of .*: leave it out"),
    ],
)
def test_an_argument_of_no_family_is_refused_in_calls_and_estimates(
    name: str, complaint: str
) -> None:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(), reward_model=tiny.redness)
    calls: tuple[Any, ...] = (pipe, pipe.estimate, pipe.open_world)
    for call in calls:
        with pytest.raises(ConfigError, match=complaint):
            call("a cat", **{name: 1})

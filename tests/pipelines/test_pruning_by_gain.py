"""Pruning by predicted gain in a pipeline's call: it asks the head, whatever chooses strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.strategies import MCTD
from tests.pipelines import tiny


def search(pipe: MCTDPipeline, strategy: MCTD) -> Any:
    return pipe(
        "a red cat",
        num_inference_steps=8,
        guidance_scale=4.0,
        output_type="pt",
        rows_per_call=2,
        search=strategy,
        compute=4,
        generator=torch.Generator().manual_seed(0),
    )


def make(**parts: Any) -> MCTDPipeline:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(), reward_model=tiny.redness, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("policy", ["budget", "ige"])
def test_the_head_is_asked_whatever_chooses_strides(policy: str) -> None:
    pipe = make(ige=tiny.make_ige())
    out = search(pipe, MCTD(pruning="gain", stride_policy=policy))
    assert out.ledger.seconds["gain"] > 0
    assert out.nfe[0] <= 32


def test_without_a_head_it_is_refused_before_the_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = make()
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: pytest.fail("called"))
    with pytest.raises(ConfigError, match="pruning by 'gain' asks an information gain evaluator"):
        search(pipe, MCTD(pruning="gain"))


def test_a_policy_that_asks_another_model_is_refused() -> None:
    pipe = make(ige=tiny.make_ige())
    with pytest.raises(ConfigError, match="stride_policy 'x0hat' asks something else"):
        search(pipe, MCTD(pruning="gain", stride_policy="x0hat"))

"""The information gain evaluator: what it takes, what it refuses, and what it does not know."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.ige import FeatureNorm, InformationGainEvaluator

CHANNELS = {"mid": 6, "down.0": 4, "estimate": 3}
SD15 = {"down.0": 640, "down.1": 1280, "down.2": 2560, "down.3": 2560, "mid": 2560, "estimate": 12}


def make_head(**settings: Any) -> InformationGainEvaluator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = InformationGainEvaluator(
            "StableDiffusionPipeline", dict(CHANNELS), num_levels=3, **settings
        )
        head.fit_features(features(64), torch.linspace(-4, 4, 64))
        torch.nn.init.normal_(head.typical)
    return head.eval()


def features(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 3 + 2 * torch.randn(rows, channels, generator=generator)
        for name, channels in CHANNELS.items()
    }


SOURCE = torch.tensor([-3.0, -1.0, 0.5])
TARGET = torch.tensor([[-2.5, 0.0], [-0.5, 2.0], [1.0, 3.5]])


def test_it_is_small_at_the_size_of_stable_diffusion() -> None:
    head = InformationGainEvaluator("StableDiffusionPipeline", SD15)
    buffers = sum(buffer.numel() for buffer in head.buffers())
    assert head.num_parameters() + buffers < 2_000_000


@pytest.mark.parametrize("given", [features(3), None])
def test_a_saved_head_says_the_same(tmp_path: Path, given: dict[str, torch.Tensor] | None) -> None:
    head = make_head(
        log_snr_range=(-4.0, 4.0),
        grids=[8, 50],
        schedulers=["DDIMScheduler"],
        guidance_scales=[4.0],
        calibration={"log_snr": [0.0], "slope": [1.0], "offset": [0.0], "deviation": [1.0]},
    )
    head.jump_cost[0, 1] = 0.25
    head.jump_log_snr[1] = 2.0
    head.save_pretrained(tmp_path)
    loaded = InformationGainEvaluator.from_pretrained(tmp_path)
    for name in ("grids", "schedulers", "guidance_scales", "calibration", "feature_channels"):
        assert loaded.config[name] == head.config[name]
    for name, tensor in head.state_dict().items():
        torch.testing.assert_close(
            loaded.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True
        )
    with torch.no_grad():
        before, after = head(given, SOURCE, TARGET), loaded(given, SOURCE, TARGET)
    for name in before:
        assert torch.equal(before[name], after[name])


def test_blocks_are_read_by_name_whatever_their_order() -> None:
    head, given = make_head(), features(3)
    backwards = {name: given[name] for name in reversed(given)}
    assert torch.equal(
        head(given, SOURCE, TARGET).mean_gain, head(backwards, SOURCE, TARGET).mean_gain
    )


def test_a_jump_is_predicted_alike_alone_and_among_others() -> None:
    head, given = make_head(), features(3)
    together = head(given, SOURCE, TARGET)
    alone = head({name: rows[1:2] for name, rows in given.items()}, SOURCE[1:2], TARGET[1:2, 1:])
    for name in together:
        torch.testing.assert_close(alone[name], together[name][1:2, 1:])


def test_typical_rows_are_those_without_features() -> None:
    head, given = make_head(), features(3)
    mixed = head(given, SOURCE, TARGET, torch.tensor([True, False, True]))
    typical, seen = head(None, SOURCE, TARGET), head(given, SOURCE, TARGET)
    for name in mixed:
        torch.testing.assert_close(mixed[name][[0, 2]], typical[name][[0, 2]])
        torch.testing.assert_close(mixed[name][1], seen[name][1])
        assert not torch.allclose(typical[name], seen[name])


def test_predictions_of_rewards_are_in_their_units() -> None:
    given = features(3)
    unit, tenfold = (
        make_head()(given, SOURCE, TARGET),
        make_head(reward_scale=10.0)(given, SOURCE, TARGET),
    )
    torch.testing.assert_close(tenfold.mean_gain, 10 * unit.mean_gain)
    torch.testing.assert_close(tenfold.log_variance, unit.log_variance + 2 * math.log(10))
    torch.testing.assert_close(tenfold.log_truncation_error, unit.log_truncation_error)
    assert unit.final_similarity.abs().max() <= 1


def test_a_search_gets_numbers_and_nan_where_there_is_no_jump() -> None:
    head, given = make_head(log_snr_range=(-4.0, 4.0)), features(3)
    target = TARGET.clone()
    target[1, 0] = torch.nan
    gains = head.predict(given, SOURCE, target)
    expected = head(given, SOURCE, TARGET)
    for name, column in gains._asdict().items():
        assert column.dtype == np.float64
        assert np.isnan(column[1, 0])
        column[1, 0] = expected[name][1, 0].item()
        np.testing.assert_allclose(column, expected[name].detach().numpy(), rtol=1e-6)


def test_outside_its_range_it_warns_and_does_not_know() -> None:
    head = make_head(log_snr_range=(-4.0, 2.0))
    with pytest.warns(UserWarning, match=r"from -3\.00 to 3\.50 are asked for.* -4\.00 to 2\.00"):
        gains = head.predict(None, SOURCE, TARGET)
    unknown = np.array([[False, False], [False, False], [False, True]])
    for column in gains:
        np.testing.assert_array_equal(np.isnan(column), unknown)
    with pytest.warns(UserWarning, match="fall back"):
        gains = make_head(log_snr_range=(-2.0, 4.0)).predict(None, SOURCE, TARGET)
    assert np.isnan(gains.log_variance[0]).all()
    assert not np.isnan(gains.log_variance[1:]).any()


def test_another_family_is_refused_by_name() -> None:
    make_head().check_family("StableDiffusionPipeline")
    with pytest.raises(
        ConfigError, match="is for a StableDiffusionPipeline, the pipeline is a FluxPipeline"
    ):
        make_head().check_family("FluxPipeline")


@pytest.mark.parametrize("wrong", [{"mid": 5, "down.0": 4, "estimate": 3}, {"mid": 6}])
def test_features_of_another_model_are_refused(wrong: dict[str, int]) -> None:
    given = {name: torch.zeros(3, channels) for name, channels in wrong.items()}
    for ask in (make_head(), make_head().predict):
        with pytest.raises(ConfigError, match=r"reads features .* of a StableDiffusionPipeline"):
            ask(given, SOURCE, TARGET)


def test_features_it_does_not_know_are_passed_over() -> None:
    head, given = make_head(), features(3)
    more = given | {"up.0": torch.zeros(3, 7)}
    assert torch.equal(head(more, SOURCE, TARGET).mean_gain, head(given, SOURCE, TARGET).mean_gain)


def test_without_features_there_is_nothing_to_read() -> None:
    with pytest.raises(ConfigError, match="feature_channels is empty"):
        InformationGainEvaluator("StableDiffusionPipeline", {})


# --- features at each noise level


def test_features_are_standardised_at_every_noise_level() -> None:
    generator = torch.Generator().manual_seed(0)
    log_snr = 8 * torch.rand(50_000, generator=generator) - 4
    drawn = torch.randn(len(log_snr), 2, generator=generator)
    scales = torch.stack([log_snr.exp(), torch.ones_like(log_snr)], dim=1)
    rows = log_snr[:, None] * 10 + scales * drawn
    norm = FeatureNorm(2, num_levels=20)
    norm.fit(rows, log_snr)
    found = norm(rows, log_snr)
    for low in (-3.5, -1.0, 2.0):
        near = (log_snr - low).abs() < 0.2
        assert found[near, 1].mean().item() == pytest.approx(0, abs=0.05)
        assert found[near, 1].std().item() == pytest.approx(1, abs=0.05)
        assert found[near, 0].std().item() == pytest.approx(1, abs=0.15)  # between two levels


def test_far_and_constant_features_are_held() -> None:
    norm = FeatureNorm(2, num_levels=4)
    log_snr = torch.linspace(-1, 1, 100)
    rows = torch.stack(
        [torch.randn(100, generator=torch.Generator().manual_seed(0)), log_snr * 0], 1
    )
    norm.fit(rows, log_snr)
    found = norm(torch.tensor([[1e6, 0.0], [-1e6, 0.5]]), torch.tensor([0.0, 9.0]))
    assert found.tolist() == [[5.0, 0.0], [-5.0, 0.5]]


def test_a_single_noise_level_will_do() -> None:
    norm = FeatureNorm(1, num_levels=4)
    rows = torch.arange(10.0)[:, None]
    norm.fit(rows, torch.zeros(10))
    found = norm(rows, torch.zeros(10))
    assert found.mean().item() == pytest.approx(0, abs=1e-5)
    assert found.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)

"""Refining a head by what searches observe: what it learns, what it keeps, and when it rolls back.

The world is made: a state's doubt stands in its features, and its siblings differ by it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.models.observations import Observations, joined, no_observations
from mctd_diffusers.models.refining import (
    Learner,
    RefinementSettings,
    Refiner,
    is_validated_on,
    validation_loss,
)

CHANNELS = {"mid": 4, "down.0": 3}
SETTINGS = RefinementSettings(steps=40, learning_rate=3e-3, least=16, validation_share=0.4)


def make_head(**settings: Any) -> InformationGainEvaluator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = InformationGainEvaluator(
            "StableDiffusionPipeline",
            dict(CHANNELS),
            embedding_size=8,
            hidden_size=16,
            num_layers=1,
            feature_dropout=0.5,
            log_snr_range=(-4.0, 4.0),
            **settings,
        )
    return head.eval()


def search_of(
    image: int, *, groups: int = 24, siblings: int = 4, sign: float = 1.0, scale: float = 1.0
) -> Observations:
    """What a search observes where variances are ``scale^2 exp(2 sign doubt)``."""
    rng = np.random.default_rng(image)
    doubt = rng.uniform(-1, 1, size=groups)
    features = {name: rng.normal(size=(groups, size)) for name, size in CHANNELS.items()}
    features["mid"][:, 0] = 2 * doubt
    source = rng.uniform(-4, 2, size=groups)
    draws = np.exp(sign * doubt)[:, None] * rng.normal(size=(groups, siblings))
    values = np.empty(groups, object)
    values[:] = list(scale * draws)
    return Observations(
        image=np.full(groups, image),
        prompt=np.full(groups, "a cat"),
        scheduler=np.full(groups, "DDIMScheduler"),
        num_steps=np.full(groups, 8),
        step_index=np.arange(groups) % 7,
        stride=np.ones(groups, np.int64),
        eta=np.ones(groups),
        guidance=np.full(groups, np.nan),
        source_log_snr=source,
        target_log_snr=source + 1,
        is_finished=np.zeros(groups, np.bool_),
        value=np.zeros(groups),
        values=values,
        weight=rng.uniform(0.5, 1.5, size=groups),
        visits=np.ones(groups, np.int64),
        reward=np.full(groups, np.nan),
        features={name: rows.astype(np.float16) for name, rows in features.items()},
    )


def predicted(head: InformationGainEvaluator, seen: Observations, *, typical: bool = False) -> Any:
    features = {name: torch.from_numpy(rows) for name, rows in seen.features.items()}
    source, target = seen.source_log_snr, np.stack([seen.target_log_snr] * 2, axis=1)
    target[:, 1] = 4
    return head.predict(
        None if typical else features,
        torch.from_numpy(source).float(),
        torch.from_numpy(target).float(),
    )


def weights_of(head: InformationGainEvaluator) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in head.state_dict().items()}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=0, equal_nan=True)


def refined(images: int = 20, updates: int = 3, **settings: Any) -> Refiner:
    refiner = Refiner(make_head(), RefinementSettings(**{**vars(SETTINGS), **settings}))
    for number in range(updates):
        for image in range(images * number, images * (number + 1)):
            refiner.collect(search_of(image))
        refiner.update(24 * images)
    return refiner


HELD_OUT = joined([search_of(image) for image in range(1000, 1020)])


@pytest.fixture(scope="module")
def taught() -> Refiner:
    return refined()


# Learning


def test_it_learns_what_siblings_say_of_other_images(taught: Refiner) -> None:
    before, after = make_head(), taught.head
    losses = [validation_loss(head, HELD_OUT, SETTINGS) for head in (before, after)]
    # The best there is predicts 2 doubt: log v + 1, half of it, and half of what noise costs.
    assert losses[1] < losses[0] - 0.05
    doubt = HELD_OUT.features["mid"][:, 0] / 2
    correlation = np.corrcoef(predicted(after, HELD_OUT).log_variance[:, 0], doubt)[0, 1]
    assert correlation > 0.7
    assert abs(np.corrcoef(predicted(before, HELD_OUT).log_variance[:, 0], doubt)[0, 1]) < 0.6


@pytest.mark.parametrize("typical", [False, True])
def test_what_searches_do_not_observe_stays_where_it_was(
    taught: Refiner, typical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = predicted(make_head(), HELD_OUT, typical=typical)
    after = predicted(taught.head, HELD_OUT, typical=typical)
    moved = {name: np.abs(getattr(after, name) - getattr(before, name)) for name in before._fields}
    assert moved["log_truncation_error"].mean() < 0.05
    assert moved["final_similarity"].mean() < 0.05
    assert moved["log_variance"].mean() > 0.1
    # Let go of, they drift away with what the trunk learns.
    refiner = Refiner(make_head(), SETTINGS)
    for image in range(20):
        refiner.collect(search_of(image))
    loose = Learner(refiner.head, refiner._anchor, SETTINGS)
    held = loose._targets
    nothing = torch.full((64, 4), torch.nan)
    monkeypatch.setattr(
        loose,
        "_targets",
        lambda *given: held(*given)._replace(
            final_similarity=nothing, log_truncation_error=nothing
        ),
    )
    rng = np.random.default_rng(0)
    for _ in range(120):
        loose.step(refiner.training, rng)
    drifted = predicted(loose.head, HELD_OUT, typical=typical)
    drift = np.abs(drifted.log_truncation_error - before.log_truncation_error)
    assert drift.mean() > 2 * moved["log_truncation_error"].mean()


def test_groups_are_drawn_by_their_weights() -> None:
    # Doubt is told by one half of the groups and belied by the other, which have no weight.
    told, belied = search_of(1, groups=200), search_of(2, groups=200, sign=-1.0)
    belied.weight[:] = 0
    head = make_head()
    learner = Learner(head, copy.deepcopy(head), SETTINGS)
    rng = np.random.default_rng(0)
    for _ in range(120):
        learner.step(joined([told, belied]), rng)
    doubt = HELD_OUT.features["mid"][:, 0] / 2
    assert np.corrcoef(predicted(learner.head, HELD_OUT).log_variance[:, 0], doubt)[0, 1] > 0.7


def test_units_of_the_reward_do_not_matter() -> None:
    heads = [make_head(reward_scale=scale) for scale in (1.0, 100.0)]
    seen = [search_of(3, scale=scale) for scale in (1.0, 100.0)]
    losses = [validation_loss(*both, SETTINGS) for both in zip(heads, seen, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_loss_is_the_likelihood_of_siblings() -> None:
    head = make_head()
    with torch.no_grad():
        for weight in head.parameters():
            weight.zero_()
        head.head.bias[1] = math.log(2.0)
    seen = search_of(3)
    mean = np.average(seen.variances(None), weights=seen.weight)
    gain = np.average(seen.gains(None) ** 2, weights=seen.weight)
    expected = math.log(2) + mean / 2 + gain / 2
    assert validation_loss(head, seen, SETTINGS) == pytest.approx(expected, rel=1e-5)


def test_an_update_follows_from_what_was_collected() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = refined(updates=2)
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the chance of others be
    torch.manual_seed(2)
    assert_same_weights(weights_of(one.head), weights_of(refined(updates=2).head))
    other = refined(updates=2, seed=1)
    assert not torch.equal(one.head.head.weight, other.head.head.weight)


def test_it_learns_under_inference_mode_and_in_half_precision() -> None:
    head = make_head().bfloat16()
    with torch.inference_mode():
        refiner = Refiner(head, SETTINGS)
        for image in range(20):
            refiner.collect(search_of(image))
        before = weights_of(refiner.head)
        assert refiner.update(1).is_kept
    assert refiner.head.dtype == torch.bfloat16
    assert not torch.equal(before["head.bias"], refiner.head.head.bias)


# Validation and rolling back


def test_images_to_validate_on_are_never_learned_from_and_then_stay() -> None:
    refiner = Refiner(make_head(), RefinementSettings(validation_size=100, buffer_size=200))
    frozen = None
    for image in range(60):
        refiner.collect(search_of(image))
        learned, kept = (
            set(part.image.tolist()) for part in (refiner.training, refiner.validation)
        )
        assert all(is_validated_on(one, 0.2) for one in kept)
        assert not any(is_validated_on(one, 0.2) for one in learned)
        assert len(refiner.training) <= 200
        if len(refiner.validation) == 100:
            frozen = refiner.validation if frozen is None else frozen
            assert refiner.validation is frozen
    assert frozen is not None
    assert max(learned) >= 58  # the oldest went
    assert min(learned) > 45


def test_shares_of_images_are_as_asked() -> None:
    share = np.mean([is_validated_on(image, 0.2) for image in range(4000)])
    assert share == pytest.approx(0.2, abs=0.02)
    assert not any(is_validated_on(image, 0.0) for image in range(100))
    assert all(is_validated_on(image, 1.0) for image in range(100))


def test_an_update_that_makes_it_worse_is_undone_to_the_last_bit(taught: Refiner) -> None:
    head = copy.deepcopy(taught.head)
    refiner = Refiner(head, SETTINGS)
    for image in range(40):
        poisoned = not is_validated_on(image, SETTINGS.validation_share)
        refiner.collect(search_of(image, sign=-1.0, scale=30.0) if poisoned else search_of(image))
    before = weights_of(head)
    report = refiner.update(1)
    assert not report.is_kept
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.loss_after > report.loss_before
    assert_same_weights(weights_of(head), before)
    # What is not a number is no improvement either.
    refiner.training.value[:] = np.nan
    refiner.training.features["mid"][:] = np.nan
    report = refiner.update(1)
    assert math.isnan(report.loss_after or 0.0)
    assert not report.is_kept
    assert_same_weights(weights_of(head), before)


def test_a_kept_update_says_so_and_leaves_the_old_card_behind() -> None:
    refiner = Refiner(make_head(), SETTINGS)
    refiner.head.register_to_config(_name_or_path="where/it/came/from")
    for image in range(20):
        refiner.collect(search_of(image))
    before = weights_of(refiner.head)
    report = refiner.update(480)
    assert report.is_kept
    assert report.observed == 480
    assert report.training + report.validation == 480
    assert report.loss_after == validation_loss(refiner.head, refiner.validation, SETTINGS)
    assert report.loss_before is not None
    assert report.loss_after < report.loss_before
    assert not torch.equal(before["head.weight"], refiner.head.head.weight)
    assert not refiner.head.config["_name_or_path"]


def test_it_waits_for_enough_of_both_parts() -> None:
    refiner = Refiner(make_head(), SETTINGS)
    before = weights_of(refiner.head)
    validated = next(image for image in range(9) if is_validated_on(image, 0.4))
    refiner.collect(search_of(validated))
    report = refiner.update(24)
    assert report == (24, 0, 24, None, None, False)
    assert_same_weights(weights_of(refiner.head), before)


def test_the_same_search_counts_once() -> None:
    refiner = Refiner(make_head(), SETTINGS)
    for image in (1, 2, 1, 2):
        refiner.collect(search_of(image))
    refiner.collect(no_observations())
    assert len(refiner.training) + len(refiner.validation) == 48


def test_what_a_head_cannot_know_is_left_out() -> None:
    head = make_head()
    head.register_to_config(log_snr_range=(-4.0, 1.0))
    refiner = Refiner(head, SETTINGS)
    seen = search_of(1)
    lowest = int(seen.source_log_snr.argmin())
    seen.features["mid"][lowest] = np.nan
    refiner.collect(seen)
    both = joined([refiner.training, refiner.validation])
    assert 0 < len(both) == (seen.target_log_snr <= 1).sum() - 1
    assert both.target_log_snr.max() <= 1
    assert seen.source_log_snr[lowest] not in both.source_log_snr


def test_what_is_observed_of_another_model_is_refused() -> None:
    refiner = Refiner(make_head(), SETTINGS)
    seen = search_of(1)
    with pytest.raises(ConfigError, match=r"reads features .* these are {'mid': 4}"):
        refiner.collect(Observations(**{**vars(seen), "features": {"mid": seen.features["mid"]}}))
    with pytest.raises(ConfigError, match="online_ige=True"):
        refiner.collect(Observations(**{**vars(seen), "features": {}}))


@pytest.mark.parametrize(
    ("setting", "value"), [("steps", 0), ("validation_share", 1.5), ("learning_rate", -1.0)]
)
def test_settings_are_checked(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        RefinementSettings(**{setting: value})

"""What shards hold, and what they take, without a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.denoising.scheduler_names import read_scheduler
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.trajectories.plan import (
    FINE_STEPS,
    LogSettings,
    class_and_settings,
    edges_of,
    nfe_of,
    shard_of,
)
from tests.trajectories.tiny_logs import make_settings


@given(
    num_trajectories=st.integers(1, 40),
    shard_size=st.integers(1, 9),
    probes=st.integers(0, 9),
    grids=st.lists(st.integers(2, 70), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 2**40),
)
def test_shards_hold_every_trajectory_once(
    num_trajectories: int, shard_size: int, probes: int, grids: list[int], seed: int
) -> None:
    settings = make_settings(
        num_trajectories=num_trajectories,
        shard_size=shard_size,
        probes=probes,
        grids=tuple(grids),
        strides=(1, 2),
        seed=seed,
    )
    shards = [shard_of(settings, number) for number in range(settings.num_shards)]
    assert [row for shard in shards for row in shard.rows] == list(range(num_trajectories))
    for shard in shards:
        assert shard.num_steps in grids
        assert shard.num_steps * shard.refinement >= FINE_STEPS
        assert len(shard.prompts) == len(shard.seeds) == len(shard.rows) <= shard_size
        assert len({*shard.probes}) == min(probes, shard.num_steps - 1)
        assert all(0 <= probe < shard.num_steps - 1 for probe in shard.probes)


def test_a_trajectory_is_the_same_in_a_longer_log() -> None:
    short = [shard_of(make_settings(num_trajectories=4), number) for number in range(2)]
    long = [shard_of(make_settings(num_trajectories=9), number) for number in range(2)]
    assert short == long


def test_choices_and_noise_hang_on_the_seed() -> None:
    one, other = (shard_of(make_settings(seed=seed), 0) for seed in (1, 2))
    assert {*one.seeds}.isdisjoint(other.seeds)


def test_grids_and_schedulers_are_mixed() -> None:
    settings = make_settings(num_trajectories=400, shard_size=2)
    shards = [shard_of(settings, number) for number in range(200)]
    assert {shard.num_steps for shard in shards} == {4, 6}
    assert len({shard.scheduler.name for shard in shards}) == 4
    assert {prompt for shard in shards for prompt in shard.prompts} == {0, 1, 2}


def test_evaluations_by_hand() -> None:
    """Of one trajectory of 8 steps, 8 fine ones each, probed at its states 2 and 6."""
    settings = make_settings(grids=(8,), strides=(1, 4, 8), siblings=3)
    shard = dataclasses.replace(
        shard_of(settings, 0),
        rows=range(1),
        prompts=(0,),
        seeds=(0,),
        num_steps=8,
        refinement=8,
        probes=(2, 6),
    )
    siblings = 3 * (2 + 1)  # strides 1 and 4 from 2, and 1 from 6: no last edge
    jumps = 7 + 4  # that end before 8: of stride 1 from 0 to 6, of stride 4 from 0 to 3
    assert nfe_of(settings, shard, deterministic=True) == 64 + jumps + siblings
    # Stochastic: 2 -> 3, 2 -> 6 and 6 -> 7 are jumps; fine paths 2 -> 6 and 6 -> 7.
    assert nfe_of(settings, shard, deterministic=False) == 8 + 3 + (32 + 8) + siblings
    edges = edges_of(settings, shard, deterministic=False)
    assert edges.jumps == [(2, 1), (2, 4), (6, 1)]
    assert edges.siblings == [(2, 1), (2, 4), (6, 1)]


def test_a_path_that_reaches_the_end_is_not_evaluated_there() -> None:
    settings = make_settings(strides=(2,), grids=(4,))
    shard = dataclasses.replace(
        shard_of(settings, 0), rows=range(3), refinement=16, probes=(2,), num_steps=4
    )
    assert nfe_of(settings, shard, deterministic=False) == 3 * (4 + 32 - 1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompts": ()}, "there are no prompts"),
        ({"num_trajectories": 0}, "num_trajectories is 0; give a whole number of at least 1"),
        ({"siblings": 1}, "siblings is 1; give a whole number of at least 2"),
        ({"probes": -1}, "probes is -1"),
        ({"rows_per_call": 0}, "rows_per_call is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"grids": ()}, "grids are empty: give at least one"),
        ({"grids": (1, 4)}, "a grid is 1; give a whole number of at least 2"),
        ({"strides": (0, 1)}, "a stride is 0"),
        ({"strides": (1, 2, 1)}, "name 1 twice"),
        ({"strides": (1, 7)}, "stride 7 is longer than every grid, of which the longest has 6"),
        ({"schedulers": ()}, "schedulers are empty: give at least one"),
        ({"schedulers": ("DDIM", "ddim")}, "name 'DDIM' twice"),
        ({"schedulers": ("DIMScheduler",)}, "no scheduler is named 'DIMScheduler'; did you mean"),
        ({"schedulers": ("DDIM:eta=1.5",)}, "eta is '1.5'; give the share of fresh noise"),
        ({"schedulers": ("DDPM:eta=1",)}, "has an eta, and the step of DDPMScheduler takes none"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_settings(**changes)


def test_rows_name_the_class_and_what_it_is_set_to() -> None:
    assert class_and_settings(read_scheduler("DDIM:eta=0.5")) == "DDIMScheduler"
    trailing = class_and_settings(read_scheduler("ddim:trailing"))
    assert trailing == "DDIMScheduler:timestep_spacing=trailing"
    assert class_and_settings(read_scheduler("DPM++2M-SDE")) != class_and_settings(
        read_scheduler("DPM++2M")
    )


def test_shards_are_counted() -> None:
    assert LogSettings(("a cat",), 1).num_shards == 1

"""Fused samples where the density is known: what the default keeps, and what the mean loses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mctd_diffusers.denoising.fusion import ACCEPTED, DEFAULT_FUSION
from mctd_diffusers.denoising.fusion_checks import MAX_SIGNAL_SHARE, TOO_CLEAN, VERDICTS
from mctd_diffusers.evaluation.fusion_on_mixtures import (
    COUNTS,
    KIN_STRIDES,
    LEVELS,
    Kin,
    drawn_particles,
    fusion_world,
    measure_fusion,
)

ALLOWED = [level for level in LEVELS if level <= MAX_SIGNAL_SHARE]
STANDARD_ERROR = math.sqrt(2 / 256)

each_kin = pytest.mark.parametrize("kin", KIN_STRIDES)


@each_kin
@pytest.mark.parametrize("level", ALLOWED)
def test_the_default_makes_samples_of_the_level(kin: Kin, level: float) -> None:
    for count in COUNTS:
        cell = measure_fusion(DEFAULT_FUSION, level=level, count=count, kin=kin, trials=5)
        # Of every single fusion, and of samples themselves a few in a thousand are further out.
        assert cell.widest_z < 3
        assert abs(cell.noise_norm - 1) < 4 * STANDARD_ERROR
        for one in cell.outcomes:
            assert one.noise_norm == pytest.approx(one.usual_norm, abs=2 * STANDARD_ERROR)
            assert one.verdict in VERDICTS


@pytest.mark.parametrize("kin", ["independent", "far siblings"])
@pytest.mark.parametrize("level", ALLOWED)
def test_the_mean_does_not(kin: Kin, level: float) -> None:
    for count in (8, 16):
        cell = measure_fusion("mean", level=level, count=count, kin=kin, trials=5)
        assert cell.z > 6
        assert cell.noise_norm < 1 - 4 * STANDARD_ERROR


def test_siblings_have_more_in_common_the_nearer_their_parent_is() -> None:
    world = fusion_world(0)
    near, far, none = (
        drawn_particles(world, level=0.4, count=16, kin=kin, seed=0).correlation
        for kin in ("siblings", "far siblings", "independent")
    )
    assert near > 0.6 > far > 0.1 > abs(none)


def test_particles_are_typical_of_their_level() -> None:
    # The control: what the fused samples are compared with has z of mean 0 and deviation 1.
    for kin in KIN_STRIDES:
        cell = measure_fusion("resample", level=0.4, count=4, kin=kin, trials=40)
        found = np.array([one.z for one in cell.outcomes])
        assert abs(found.mean()) < 4 / math.sqrt(40)
        assert 0.5 < found.std() < 1.5


def test_at_a_clean_level_the_gate_is_shut_for_a_reason() -> None:
    cell = measure_fusion(DEFAULT_FUSION, level=0.9, count=8, kin="independent", trials=10)
    assert {one.verdict for one in cell.outcomes} == {TOO_CLEAN}
    assert cell.accepted == 0
    assert cell.widest_z > 3


@pytest.mark.parametrize("method", ["noise", "gaussian", "tokens", "features", "pixel"])
def test_other_methods_make_samples_of_the_level_too(method: str) -> None:
    cell = measure_fusion(method, level=0.4, count=4, kin="independent", trials=4)
    assert cell.widest_z < 3
    assert abs(cell.best_z) < 3
    assert {one.verdict for one in cell.outcomes} & {ACCEPTED}

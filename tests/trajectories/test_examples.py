"""Rows to learn from, made of a toy log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.calibration import Calibration
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.trajectories.dataset import Log, read_log
from mctd_diffusers.trajectories.examples import (
    make_examples,
    predict_jumps,
    split_prompts,
    targets_of,
)
from mctd_diffusers.trajectories.jumps import (
    cells_of,
    free_jumps,
    groups_of,
    jump_rows,
    state_values,
    strides_of,
)
from mctd_diffusers.trajectories.targets import resolved_variance
from tests.trajectories.toy_logs import CHANNELS, FAMILY, STRIDES, toy_rows, write_toy_log

HALVED = Calibration((-4.0, 4.0), (0.5, 0.5), (1.0, 1.0), (1.0, 1.0))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    held_out = toy_rows(6, siblings=16, seed=1, prompts="held out")
    folder = tmp_path_factory.mktemp("log")
    return read_log(write_toy_log(folder, train=toy_rows(20), held_out=held_out))


def test_rows_say_of_each_jump_what_the_log_knows(log: Log) -> None:
    split, rows = log.splits["train"], toy_rows(20)
    assert strides_of(split) == STRIDES
    found = jump_rows(split, HALVED, STRIDES)
    for state in (0, 4, 35, 119):
        row = rows[split.states.trajectory[state]]
        start = split.states.step_index[state]
        value = 0.5 * row["value"][start] + 1
        for column, stride in enumerate(STRIDES):
            made = [
                i
                for i in range(len(row["jumps"]["stride"]))
                if (row["jumps"]["step_index"][i], row["jumps"]["stride"][i]) == (start, stride)
            ]
            if not made:
                assert np.isnan(found.log_truncation_error[state, column])
                assert found.target_log_snr[state, column] == pytest.approx(row["log_snr"][start])
                continue
            error = np.log(row["jumps"]["truncation_error"][made[0]])
            assert found.log_truncation_error[state, column] == pytest.approx(error, rel=1e-5)
            assert found.target_log_snr[state, column] == pytest.approx(
                row["log_snr"][start + stride], rel=1e-6
            )
            drawn = [
                i
                for i in range(len(row["siblings"]["stride"]))
                if (row["siblings"]["step_index"][i], row["siblings"]["stride"][i])
                == (start, stride)
            ]
            if drawn:
                siblings = 0.5 * row["siblings"]["values"][drawn[0]] + 1
                variance = found.sibling_variance[state, column]
                assert variance == pytest.approx(resolved_variance(siblings), rel=1e-4)
                gain = siblings.mean() - value
            else:
                after = row["reward"] if start + stride == 6 else 0.5 * row["reward"] + 1
                gain = after - value
            assert found.mean_gain[state, column] == pytest.approx(gain, abs=1e-5)


def test_a_jump_on_the_fine_path_has_no_log_error(tmp_path: Path) -> None:
    rows = toy_rows(2)
    rows[0]["jumps"]["truncation_error"][0] = 0.0
    split = read_log(write_toy_log(tmp_path, train=rows)).splits["train"]
    found = jump_rows(split, HALVED, STRIDES)
    assert np.isnan(found.log_truncation_error[0, 0])
    assert np.isfinite(found.mean_gain[0, 0])


def test_free_jumps_are_pairs_of_one_trajectory(log: Log) -> None:
    split = log.splits["train"]
    states = np.arange(len(split.states.value))
    drawn = free_jumps(split, HALVED, states, 5, np.random.default_rng(0))
    values = state_values(split, HALVED)
    level = dict(zip(np.round(np.linspace(-4, 4, 7), 4), range(7), strict=True))
    ends = 0
    for state in states:
        trajectory, here = split.states.trajectory[state], split.states.step_index[state]
        for jump in range(5):
            there = level[round(float(drawn.target_log_snr[state, jump]), 4)]
            assert there > here
            is_end = there == 6
            ends += is_end
            after = (
                split.trajectories.reward[trajectory] if is_end else values[state + there - here]
            )
            assert drawn.mean_gain[state, jump] == pytest.approx(after - values[state])
    assert ends > 0
    assert np.isnan(drawn.log_truncation_error).all()
    assert np.isnan(drawn.sibling_variance).all()


def test_cells_are_one_step_of_one_schedule_over_all_splits(log: Log) -> None:
    first, second = cells_of([log.splits["train"], log.splits["held_out"]])
    assert len(np.unique(first)) == 6
    for cells, name in ((first, "train"), (second, "held_out")):
        np.testing.assert_array_equal(cells, log.splits[name].states.step_index)


def test_groups_hold_every_state_once_and_one_cell_each() -> None:
    cells = np.random.default_rng(0).integers(5, size=83)
    groups = groups_of(cells, 4)
    assert sorted(np.concatenate(groups).tolist()) == list(range(83))
    assert all(len(np.unique(cells[group])) == 1 and len(group) <= 4 for group in groups)


def test_no_prompt_is_in_two_parts(log: Log) -> None:
    parts = split_prompts(log, validation_share=0.3)
    assert list(parts) == ["train", "validation", "held_out"]
    prompts = {name: set(part.trajectories.prompt.tolist()) for name, part in parts.items()}
    assert len(prompts["validation"]) == 3
    assert len(prompts["train"]) == 7
    assert not prompts["train"] & prompts["validation"]
    assert sum(len(parts[name].trajectories.number) for name in ("train", "validation")) == 20
    again = split_prompts(log, validation_share=0.3)["train"].trajectories.prompt
    assert set(again.tolist()) == prompts["train"]


def test_without_a_held_out_split_prompts_are_held_out(log: Log) -> None:
    alone = Log(log.family, log.feature_channels, {"train": log.splits["train"]})
    parts = split_prompts(alone, validation_share=0.2)
    prompts = {name: set(part.trajectories.prompt.tolist()) for name, part in parts.items()}
    assert {name: len(some) for name, some in prompts.items()} == {
        "train": 6,
        "validation": 2,
        "held_out": 2,
    }
    assert not prompts["train"] & (prompts["validation"] | prompts["held_out"])


def test_a_split_that_cannot_be_divided_is_refused(log: Log) -> None:
    with pytest.raises(ConfigError, match=r"no split 'all', only \['held_out', 'train'\]"):
        split_prompts(log, train="all")
    with pytest.raises(ConfigError, match="has 10 prompts, of which 10 would be held out"):
        split_prompts(log, validation_share=1.0)
    shared = log.splits | {"again": log.splits["train"]}
    with pytest.raises(ConfigError, match="10 prompts of split 'again' are in 'train' too"):
        split_prompts(Log(log.family, log.feature_channels, shared))


def test_a_split_of_which_nothing_is_known_is_refused(tmp_path: Path) -> None:
    rows = toy_rows(4)
    for row in rows:
        for column in ("jumps", "siblings"):
            row[column] = {name: field[:0] for name, field in row[column].items()}
    split = read_log(write_toy_log(tmp_path, train=rows)).splits["train"]
    with pytest.raises(ConfigError, match="'train' has neither jumps nor siblings"):
        make_examples({"train": split}, HALVED, STRIDES)


def test_predictions_stand_beside_what_came_true(log: Log) -> None:
    examples = make_examples(log.splits, HALVED, STRIDES)["held_out"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = InformationGainEvaluator(FAMILY, CHANNELS)
    head.train()
    prompts = {"train 0": 0}
    found = predict_jumps(head, examples, prompts)
    assert head.training
    assert len(prompts) == 1 + 3
    known = ~np.isnan(examples.rows.log_truncation_error)
    rows = found["truncation_error"]
    np.testing.assert_allclose(rows.actual, examples.rows.log_truncation_error[known])
    state, column = (int(place[7]) for place in np.nonzero(known))
    one = torch.tensor([state])
    features = {name: part[one] for name, part in examples.features.items()}
    source = torch.from_numpy(log.splits["held_out"].states.log_snr[[state]])
    target = torch.from_numpy(examples.rows.target_log_snr[[state]]).float()
    head.eval()
    alone, typical = head(features, source, target), head(None, source, target)
    assert rows.predicted[7] == pytest.approx(
        alone.log_truncation_error[0, column].item(), rel=1e-5
    )
    assert rows.typical[7] == pytest.approx(
        typical.log_truncation_error[0, column].item(), rel=1e-5
    )
    variances = examples.rows.sibling_variance
    np.testing.assert_allclose(
        found["resolved_variance"].actual, np.log(variances[~np.isnan(variances)])
    )
    assert targets_of(examples.rows).log_truncation_error.dtype == torch.float32

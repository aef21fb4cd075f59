"""Reading logs: what is read, and the one sentence that a bad one ends in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.trajectories.dataset import read_jump_table, read_log
from tests.trajectories.toy_logs import CHANNELS, FAMILY, toy_rows, write_toy_log

Rows = list[dict[str, Any]]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    rows = toy_rows(40) + [row | {"index": row["index"] + 40} for row in toy_rows(5, steps=9)]
    held_out = toy_rows(3, siblings=16, prompts="held out")
    log = read_log(write_toy_log(tmp_path, train=rows, held_out=held_out))
    assert (log.family, log.feature_channels) == (FAMILY, CHANNELS)
    assert {name: len(split.trajectories.number) for name, split in log.splits.items()} == {
        "held_out": 3,
        "train": 45,
    }
    split = log.splits["train"]
    assert split.trajectories.number.tolist() == list(range(45))
    assert split.trajectories.prompt[44] == "train 2"
    np.testing.assert_allclose(split.trajectories.reward, [row["reward"] for row in rows])
    # The last trajectory, whose states follow those of all others.
    last, states = rows[-1], split.states.trajectory == 44
    assert split.states.step_index[states].tolist() == list(range(9))
    np.testing.assert_allclose(split.states.log_snr[states], last["log_snr"][:-1])
    np.testing.assert_allclose(split.states.final_log_snr[states], 4)
    np.testing.assert_allclose(split.states.value[states], last["value"], rtol=1e-6)
    np.testing.assert_allclose(split.states.similarity[states], 1, atol=1e-6)
    np.testing.assert_allclose(
        split.features["mid"][states], last["features"]["mid"], rtol=1e-3, atol=1e-3
    )
    jumps = split.states.trajectory[split.jumps.state] == 44
    assert split.jumps.stride[jumps].tolist() == last["jumps"]["stride"]
    step_index = split.states.step_index[split.jumps.state[jumps]]
    assert step_index.tolist() == last["jumps"]["step_index"]
    np.testing.assert_allclose(
        split.jumps.truncation_error[jumps], last["jumps"]["truncation_error"], rtol=1e-6
    )
    groups = split.states.trajectory[split.siblings.state] == 44
    np.testing.assert_allclose(split.siblings.values[groups], last["siblings"]["values"], rtol=1e-6)
    assert log.splits["held_out"].siblings.values.shape[1] == 16


def test_the_folder_is_one_that_datasets_opens(tmp_path: Path) -> None:
    folder = write_toy_log(tmp_path / "log", train=toy_rows(4))
    opened = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), split="train")
    split = read_log(folder).splits["train"]
    assert opened["reward"] == pytest.approx(split.trajectories.reward.tolist())


def test_strides_lead_to_the_levels_of_their_own_trajectory(tmp_path: Path) -> None:
    rows = toy_rows(2, steps=4) + toy_rows(2, steps=6)
    split = read_log(write_toy_log(tmp_path, train=rows)).splits["train"]
    for state, stride in zip(split.jumps.state, split.jumps.stride, strict=True):
        row = rows[split.states.trajectory[state]]
        place = split.states.step_index[state] + stride
        level = split.target_log_snr(np.array([state]), np.array([stride]))
        assert level[0] == pytest.approx(row["log_snr"][place])
        finishes = split.finishes(np.array([state]), np.array([stride]))
        assert finishes[0] == (place == row["num_steps"])


def test_a_part_of_a_split_is_the_split_of_that_part(tmp_path: Path) -> None:
    rows = toy_rows(8, steps=4) + toy_rows(8, steps=6)
    whole = read_log(write_toy_log(tmp_path / "all", train=rows)).splits["train"]
    kept = np.arange(16) % 3 == 0
    few = [row for row, is_kept in zip(rows, kept, strict=True) if is_kept]
    expected = read_log(write_toy_log(tmp_path / "few", few=few)).splits["few"]
    taken = whole.take(kept, "few")
    assert taken.name == "few"
    for ours, theirs in (
        (taken.trajectories, expected.trajectories),
        (taken.states, expected.states),
        (taken.jumps, expected.jumps),
        (taken.siblings, expected.siblings),
        (taken.features.values(), expected.features.values()),
    ):
        for column, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(column, other)


def test_costs_of_jumps_are_of_the_finest_deterministic_grid(tmp_path: Path) -> None:
    others = [row | {"eta": 1.0} for row in toy_rows(2, steps=12)]
    rows = toy_rows(2, steps=4) + others + toy_rows(3, steps=6)
    table = read_jump_table(write_toy_log(tmp_path, train=rows))
    np.testing.assert_allclose(table.log_snr, np.linspace(-4, 4, 7), rtol=1e-6)
    # Straight paths cost nothing, but for half precision and what is left of the noise at the end.
    upper = np.triu_indices(6, 1)
    assert table.cost[upper].max() < 5e-3
    assert np.isnan(table.cost[np.tril_indices(7)]).all()


def test_without_a_deterministic_trajectory_there_are_no_costs(tmp_path: Path) -> None:
    rows = [row | {"eta": 0.5} for row in toy_rows(2)]
    with pytest.raises(ConfigError, match="no trajectory of a DDIMScheduler with eta 0"):
        read_jump_table(write_toy_log(tmp_path, train=rows))


# --- bad ones


def put(rows: Rows, path: str, value: float) -> Rows:
    """Write a number into one place of the second trajectory."""
    *outer, last = path.split(".")
    place: Any = rows[1]
    for name in outer:
        place = place[name]
    if isinstance(place[last], float):
        place[last] = value
    else:
        numbers = np.array(place[last], dtype=np.float64)
        numbers.flat[1] = value
        place[last] = numbers
    return rows


@pytest.mark.parametrize(
    "column",
    [
        "value",
        "log_snr",
        "reward",
        "final_latents",
        "denoised",
        "features.mid",
        "jumps.truncation_error",
        "jumps.value",
        "siblings.values",
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named(tmp_path: Path, column: str, value: float) -> None:
    folder = write_toy_log(tmp_path, train=put(toy_rows(3), column, value))
    pattern = rf"column '{column}' of split 'train' holds {value} in trajectory 1: log it again"
    with pytest.raises(ConfigError, match=pattern):
        read_log(folder)


def rewrite(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the arrow table of the first shard."""
    import pyarrow.parquet as pq

    path = next((folder / "data").glob("*.parquet"))
    pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize(
    "column", ["value", "features", "jumps", "siblings", "reward", "latents", "family"]
)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    folder = write_toy_log(tmp_path, train=toy_rows(3))
    rewrite(folder, lambda table: table.drop_columns([column]))
    with pytest.raises(ConfigError, match=f"split 'train' has no column {column} in train-00000"):
        read_log(folder)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    import pyarrow as pa

    folder = write_toy_log(tmp_path, train=toy_rows(3))

    def drop(table: Any) -> Any:
        jumps = table["jumps"].combine_chunks()
        names = [field.name for field in jumps.type if field.name != "truncation_error"]
        fields = [jumps.field(name) for name in names]
        place = table.schema.get_field_index("jumps")
        return table.set_column(place, "jumps", pa.StructArray.from_arrays(fields, names))

    rewrite(folder, drop)
    with pytest.raises(ConfigError, match=r"has no column jumps\.truncation_error in"):
        read_log(folder)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    folder = write_toy_log(tmp_path, train=toy_rows(3), held_out=toy_rows(3)[:0])
    with pytest.raises(ConfigError, match="split 'held_out' is empty: log at least one"):
        read_log(folder)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no folder: name one that `mctd log-trajectories`"):
        read_log(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no files data/<split>-00000"):
        read_log(tmp_path)
    folder = write_toy_log(tmp_path / "log", train=toy_rows(2))
    with pytest.raises(ConfigError, match=r"no split 'test' in .*, only \['train'\]"):
        read_log(folder, ["test"])
    path = next((folder / "data").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="is no parquet file"):
        read_log(folder)


def other_features(rows: Rows) -> Rows:
    for row in rows:
        row["features"]["mid"] = row["features"]["mid"][:, :2]
    return rows


@pytest.mark.parametrize("change", ["family", "features"])
@pytest.mark.parametrize("where", ["rows", "shards", "splits"])
def test_several_models_in_one_log_are_refused(tmp_path: Path, change: str, where: str) -> None:
    def of_another(rows: Rows) -> Rows:
        if change == "family":
            return [row | {"family": "StableDiffusionXLPipeline"} for row in rows]
        return other_features(rows)

    if where == "rows":
        folder = write_toy_log(tmp_path, train=toy_rows(2) + of_another(toy_rows(2)))
    elif where == "shards":
        folder = write_toy_log(tmp_path, train=toy_rows(32) + of_another(toy_rows(2)))
    else:
        folder = write_toy_log(tmp_path, train=toy_rows(2), held_out=of_another(toy_rows(2)))
    with pytest.raises(ConfigError, match=r"one model"):
        read_log(folder)


def test_lists_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    rows = toy_rows(3)
    rows[2]["value"] = rows[2]["value"][:-1]
    folder = write_toy_log(tmp_path / "value", train=rows)
    pattern = "'value' of split 'train' has 5 entries in trajectory 2, which needs 6"
    with pytest.raises(ConfigError, match=pattern):
        read_log(folder)
    rows = toy_rows(3)
    rows[1]["jumps"]["stride"][-1] = 2
    folder = write_toy_log(tmp_path / "jumps", train=rows)
    with pytest.raises(ConfigError, match="jumps of split 'train' cross 2 steps from step 5 in"):
        read_log(folder)
    rows = toy_rows(32) + toy_rows(2, siblings=5)
    with pytest.raises(ConfigError, match=r"siblings in split 'train' are of sizes \[4, 5\]"):
        read_log(write_toy_log(tmp_path / "siblings", train=rows))


def test_a_log_that_is_not_complete_is_read_with_a_warning(tmp_path: Path) -> None:
    folder = write_toy_log(tmp_path, train=toy_rows(40))
    (folder / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.warns(UserWarning, match="split 'train' has 1 of 2 shards"):
        assert len(read_log(folder).splits["train"].trajectories.number) == 32

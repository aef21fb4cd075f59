"""A log under another reward, from the stored latents alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.trajectories import plan
from mctd_diffusers.trajectories.card import write_card
from mctd_diffusers.trajectories.files import read_begun
from mctd_diffusers.trajectories.logging import log_trajectories
from mctd_diffusers.trajectories.relabelling import relabel_log
from tests.pipelines import tiny
from tests.trajectories.tiny_logs import files_of, make_pipe, make_settings, read_rows, without

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LABELS = ("value", "reward", "jumps", "siblings")


def blueness(images: Any, prompts: list[str]) -> list[float]:
    """Another reward, which reads the prompt too."""
    blue = images.double().mean(dim=(2, 3))[:, 2].tolist()
    return [one + len(prompt) for one, prompt in zip(blue, prompts, strict=True)]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_log(make_pipe(), folder)
    return folder


def write_log(pipe: MCTDPipeline, folder: Path) -> None:
    """Two splits, of deterministic and of stochastic trajectories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "FINE_STEPS", 8)
        for split, scheduler in (("train", "DDIM"), ("other", "DDPM")):
            settings = make_settings(grids=(4,), schedulers=(scheduler,), num_trajectories=3)
            list(log_trajectories(pipe, settings, folder, split=split))


def labels(folder: Path, split: str) -> list[np.ndarray]:
    """All values of a split, by kind."""
    rows = read_rows(folder, split)
    return [
        np.concatenate([row["value"] for row in rows]),
        np.array([row["reward"] for row in rows]),
        np.concatenate([row["jumps"]["value"] for row in rows]),
        np.concatenate([np.ravel(row["siblings"]["values"]) for row in rows]),
    ]


def assert_alike(folder: Path, other: Path, *, tolerance: float) -> None:
    for split in ("train", "other"):
        for found, expected in zip(labels(folder, split), labels(other, split), strict=True):
            assert found.shape == expected.shape
            assert found == pytest.approx(expected, abs=tolerance)


def no_network(pipe: MCTDPipeline) -> MCTDPipeline:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the denoiser was called")

    pipe.unet.forward = refuse
    return pipe


def test_the_same_reward_gives_the_same_values(log: Path, tmp_path: Path) -> None:
    pipe = no_network(make_pipe())
    assert len(list(relabel_log(pipe, log, tmp_path))) == 4
    # Half precision moves each latent by at most 2**-11 of itself. The decoders are smooth and the
    # reward is a mean over pixels, in which such roundings average out: well below 1e-3 of the
    # values' own unit (a colour between 0 and 1).
    assert_alike(tmp_path, log, tolerance=3e-4)
    assert any(
        (a != b).any() for a, b in zip(labels(tmp_path, "train"), labels(log, "train"), strict=True)
    )


def test_another_reward_gives_what_a_log_by_it_holds(log: Path, tmp_path: Path) -> None:
    pipe = make_pipe(blueness)
    write_log(pipe, tmp_path / "direct")
    list(relabel_log(no_network(pipe), log, tmp_path / "relabelled"))
    assert_alike(tmp_path / "relabelled", tmp_path / "direct", tolerance=3e-4)
    change = labels(tmp_path / "relabelled", "train")[0] - labels(log, "train")[0]
    assert (np.abs(change) > 1).all()


def test_all_else_stays_bit_for_bit(log: Path, tmp_path: Path) -> None:
    before = files_of(log)
    for path in relabel_log(make_pipe(blueness), log, tmp_path):
        old, new = pq.read_table(log / "data" / path.name), pq.read_table(path)
        assert new.schema.equals(old.schema, check_metadata=True)
        for name in old.column_names:
            if name not in LABELS:
                assert new[name].equals(old[name]), name
        for name, field in (("jumps", "value"), ("siblings", "values")):
            assert without(new, name, field) == without(old, name, field)
    assert files_of(log) == before


def test_a_stopped_one_goes_on(log: Path, tmp_path: Path) -> None:
    pipe = make_pipe(blueness)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    list(relabel_log(pipe, log, whole))
    writing = relabel_log(pipe, log, stopped)
    next(writing)
    writing.close()
    assert len(list(relabel_log(pipe, log, stopped))) == 3
    assert files_of(stopped) == files_of(whole)


def test_more_rows_a_call_change_nothing_but_roundings(log: Path, tmp_path: Path) -> None:
    list(relabel_log(make_pipe(), log, tmp_path, rows_per_call=7))
    assert_alike(tmp_path, log, tolerance=3e-4)


def test_the_settings_and_the_card_say_so(log: Path, tmp_path: Path) -> None:
    pipe = make_pipe(blueness)
    list(relabel_log(pipe, log, tmp_path, command="mctd relabel"))
    begun = read_begun(tmp_path, "train")
    assert (begun["reward"], begun["relabelled_from"]) == ("blueness", "redness")
    write_card(pipe, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Reward: `blueness`, by which the log was relabelled" in card
    assert "logged with reward redness, then relabelled" in card
    assert "mctd relabel" in card


def test_what_cannot_be_relabelled_is_refused(log: Path, tmp_path: Path) -> None:
    pipe = make_pipe(blueness)
    with pytest.raises(ConfigError, match="holds the log itself"):
        next(relabel_log(pipe, log, log))
    with pytest.raises(ConfigError, match="there is no log in"):
        next(relabel_log(pipe, tmp_path / "nothing", tmp_path / "new"))
    with pytest.raises(ConfigError, match="no reward to relabel by"):
        next(relabel_log(make_pipe(None), log, tmp_path / "new"))
    list(relabel_log(pipe, log, tmp_path / "new"))
    with pytest.raises(ConfigError, match="reward 'blueness', now 'redness'"):
        next(relabel_log(make_pipe(tiny.redness), log, tmp_path / "new"))
    other = make_pipe(blueness)
    other.vae.decoder.conv_in.weight.data.flatten()[0] += 1
    with pytest.raises(ConfigError, match="vae of model"):
        next(relabel_log(other, log, tmp_path / "newer"))

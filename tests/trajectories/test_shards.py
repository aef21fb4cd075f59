"""One shard: its rows against the stock pipeline, closed forms and what was metered."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.errors import SearchError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.trajectories import plan
from mctd_diffusers.trajectories.logging import is_deterministic, open_shard
from mctd_diffusers.trajectories.plan import LogSettings, Shard, shard_of, work_of
from mctd_diffusers.trajectories.shards import run_shard
from tests.pipelines import tiny
from tests.trajectories.tiny_logs import make_pipe, make_settings

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS = (
    "DDIM",
    "DDIM:eta=0.5",
    "DDPM",
    "Euler",
    "EulerAncestral",
    "DPM++2M",
    "DPM++2M:karras",
)
HALF = 2.0**-10
"""Relative error of a number that went through half precision, with room for one sum."""


@pytest.fixture(scope="module")
def pipe() -> MCTDPipeline:
    return make_pipe()


@pytest.fixture(autouse=True)
def few_fine_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "FINE_STEPS", 12)


def run(
    pipe: MCTDPipeline, settings: LogSettings, shard: Shard | None = None
) -> tuple[dict[str, Any], Any, Shard]:
    """The columns of a shard, and the environment that it ran in."""
    shard = shard_of(settings, 0) if shard is None else shard
    environment = open_shard(pipe, settings, shard).environment
    return run_shard(environment, settings, shard, family="tiny"), environment, shard


def latents(entries: Any) -> np.ndarray:
    return np.stack(entries).astype(np.float64)


SHAPES = [(5, (3,), 9), (13, (1, 8), 1), (6, (2,), 0)]


@pytest.mark.parametrize(
    ("scheduler", "grid", "strides", "probes"),
    [
        *((scheduler, 4, (1, 2, 4), 2) for scheduler in SCHEDULERS),
        *((scheduler, *shape) for scheduler in SCHEDULERS[:2] for shape in SHAPES),
    ],
)
def test_a_shard_takes_what_the_closed_formula_says(
    pipe: MCTDPipeline, scheduler: str, grid: int, strides: tuple[int, ...], probes: int
) -> None:
    settings = make_settings(schedulers=(scheduler,), grids=(grid,), strides=strides, probes=probes)
    columns, environment, shard = run(pipe, settings)
    deterministic = is_deterministic(pipe, shard.scheduler)
    spent = environment.ledger.total
    expected = work_of(settings, shard, deterministic=deterministic)
    measured = (spent.nfe, spent.previews, spent.decodes, spent.reward_calls)
    assert measured == (expected.nfe, expected.previews, expected.decodes, expected.reward_calls)
    edges = plan.edges_of(settings, shard, deterministic=deterministic)
    for kind, found in (("jumps", columns["jumps"]), ("siblings", columns["siblings"])):
        for row in found:
            made = list(zip(row["step_index"], row["stride"], strict=True))
            assert sorted(made) == sorted(getattr(edges, kind))


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_rows_are_what_the_stock_pipeline_makes_of_the_same_seeds(scheduler: str) -> None:
    """Bit for bit: the fine schedule, at as many rows a call as the stock batch has."""
    pipe, stock = make_pipe(scheduler=scheduler), tiny.make_stock(scheduler)
    settings = make_settings(schedulers=(scheduler,), grids=(4,))
    columns, _, shard = run(pipe, settings)
    seen: list[np.ndarray] = []

    def look(_pipe: Any, _step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["latents"].flatten(1).half().numpy())
        return given

    stock(
        [settings.prompts[prompt] for prompt in shard.prompts],
        num_inference_steps=12,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in shard.seeds],
        callback_on_step_end=look,
        output_type="latent",
    )
    for row in range(2):
        states = [*columns["latents"][row][1:], columns["final_latents"][row]]
        assert [(seen[3 * i + 2][row] == state).all() for i, state in enumerate(states)] == [1] * 4
    assert columns["timestep"][0].tolist() == stock.scheduler.timesteps[::3].tolist()


def ddim(pipe: MCTDPipeline, row: dict[str, Any], start: int, stop: int) -> np.ndarray:
    """Denoised estimate at the end of a path of fine DDIM steps, from its textbook formula."""
    embeds, negative = pipe.encode_prompt(row["prompt"], "cpu", 1, True)
    sample = torch.tensor(row["latents"][start], dtype=torch.float32).reshape(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(12)
    levels = [*pipe.scheduler.timesteps.tolist()]
    refinement = 12 // row["num_steps"]
    for index in range(start * refinement, stop * refinement + 1):
        if index == 12:
            return sample.flatten().numpy()
        with torch.no_grad():
            output = pipe.unet(
                torch.cat([sample] * 2), levels[index], torch.cat([negative, embeds])
            ).sample
        unconditional, conditional = output.chunk(2)
        noise = unconditional + row["guidance_scale"] * (conditional - unconditional)
        signal = pipe.scheduler.alphas_cumprod[levels[index]]
        ends = index + 1 == 12
        target = pipe.scheduler.alphas_cumprod[0 if ends else levels[index + 1]]
        clean = (sample - (1 - signal).sqrt() * noise) / signal.sqrt()
        sample = target.sqrt() * clean + (1 - target).sqrt() * noise
    return clean.flatten().numpy()


@pytest.mark.parametrize("scheduler", ["DDIM", "DDIM:eta=1", "DDPM"])
def test_jumps_are_the_steps_of_ddim_and_their_errors_those_against_fine_steps(
    pipe: MCTDPipeline, scheduler: str
) -> None:
    settings = make_settings(schedulers=(scheduler,), grids=(4,))
    columns, _, _ = run(pipe, settings)
    for row in ({name: entries[i] for name, entries in columns.items()} for i in range(2)):
        signal = np.sqrt(1 / (1 + np.exp(-row["log_snr"].astype(np.float64))))
        noise = np.sqrt(1 - signal**2)
        states, clean = latents(row["latents"]), latents(row["denoised"])
        jumps = row["jumps"]
        assert jumps["stride"]
        for i, (start, stride) in enumerate(zip(jumps["step_index"], jumps["stride"], strict=True)):
            stop = start + stride
            direction = (states[start] - signal[start] * clean[start]) / noise[start]
            arrived = signal[stop] * clean[start] + noise[stop] * direction
            scale = max(np.abs(states[start]).max() / noise[start], np.abs(arrived).max())
            assert latents(jumps["latents"])[i] == pytest.approx(arrived, abs=4 * HALF * scale)
            reference = ddim(pipe, row, start, stop)
            error = float(np.sqrt(np.mean((latents(jumps["denoised"])[i] - reference) ** 2)))
            scale = float(np.sqrt(np.mean(reference**2)))
            found = float(jumps["estimate_error"][i])
            assert found == pytest.approx(error, abs=4 * HALF * scale)


def test_errors_of_a_deterministic_sampler_are_those_against_its_own_trajectory(
    pipe: MCTDPipeline,
) -> None:
    settings = make_settings(schedulers=("Euler",), grids=(6,))
    columns, _, _ = run(pipe, settings)
    states = latents([*columns["latents"][0], columns["final_latents"][0]])
    clean = latents([*columns["denoised"][0], columns["final_latents"][0]])
    jumps = columns["jumps"][0]
    stops = np.add(jumps["step_index"], jumps["stride"])
    log_snr = columns["log_snr"][0].astype(np.float64)[stops, None]
    for name, errors, path, scale in (
        # Latents of Euler explode in variance; errors do not.
        ("latents", jumps["truncation_error"], states, np.sqrt(1 / (1 + np.exp(-log_snr)))),
        ("denoised", jumps["estimate_error"], clean, 1.0),
    ):
        differences = scale * (latents(jumps[name]) - path[stops])
        recomputed = np.sqrt(np.mean(differences**2, axis=1))
        assert np.array(errors) == pytest.approx(recomputed, abs=2 * HALF * np.abs(path).max())
    # One step of the grid is two fine ones here, so even the shortest jump errs.
    assert min(jumps["truncation_error"]) > 0


@pytest.mark.parametrize("scheduler", ["DDIM:eta=1", "Euler"])
def test_rows_do_not_depend_on_their_neighbours(pipe: MCTDPipeline, scheduler: str) -> None:
    settings = make_settings(schedulers=(scheduler,), grids=(4,))
    together, _, shard = run(pipe, settings)
    alone = dataclasses.replace(
        shard, rows=shard.rows[1:], prompts=shard.prompts[1:], seeds=shard.seeds[1:]
    )
    single, _, _ = run(pipe, settings, alone)
    for name, entries in single.items():
        assert alike(entries[0], together[name][1]), name


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, str):
        return one == other
    # The text encoder's last bit hangs on the row of a prompt; other noise would show at once.
    return bool(np.allclose(one, other, rtol=8 * HALF, atol=8 * HALF))


def test_siblings_differ(pipe: MCTDPipeline) -> None:
    settings = make_settings(schedulers=("DDIM",), grids=(6,), siblings=8)
    columns, _, shard = run(pipe, settings)
    for row in columns["siblings"]:
        assert {*row["step_index"]} == {*shard.probes}
        for drawn, values in zip(row["denoised"], row["values"], strict=True):
            assert drawn.shape == (8, 256)
            assert len({one.tobytes() for one in drawn}) == 8
            assert len({*values.tolist()}) == 8


@pytest.mark.parametrize("scheduler", ["DDIM", "DDIM:eta=1"])
def test_memory_is_flat_along_a_trajectory(
    pipe: MCTDPipeline, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(schedulers=(scheduler,), grids=(24,), strides=(1, 2, 4))
    shard = shard_of(settings, 0)
    environment = open_shard(pipe, settings, shard).environment
    held = []
    denoise = environment.denoise

    def watched(handles: Any) -> None:
        held.append(len(environment._samples))
        denoise(handles)

    monkeypatch.setattr(environment, "denoise", watched)
    run_shard(environment, settings, shard, family="tiny")
    assert len(environment._samples) == 0
    # A state, its next, jumps under way (of each stride as many as it is long), siblings.
    assert max(held) <= len(shard.rows) * (2 + sum(settings.strides) + 3 + settings.siblings)


def test_what_half_precision_cannot_hold_is_refused(pipe: MCTDPipeline) -> None:
    settings = make_settings(schedulers=("DDIM",), grids=(4,))
    shard = shard_of(settings, 0)
    world = open_shard(pipe, settings, shard)
    world.prepared.first_latents.fill_(1e6)
    with pytest.raises(SearchError, match="reach 1e\\+06, and half precision holds finite ones up"):
        run_shard(world.environment, settings, shard, family="tiny")

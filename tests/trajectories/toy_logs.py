"""Logs of a world in closed form: what a state's features say of its jumps is known.

A trajectory has a *difficulty* and a *doubt*, both in its features beside mere noise. Truncation
errors are ``h * exp(difficulty - 4)``, with ``h`` the log-SNR that a jump crosses, and values of
siblings have variance ``exp(2 doubt - 2)``. Paths are straight: ``x_t = alpha x_0 + sigma noise``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from mctd_diffusers.trajectories.files import features_of, shard_path, write_shard
from mctd_diffusers.trajectories.targets import variance_preserving

SIZE = 8
CHANNELS = {"down.0": 6, "mid": 4}
STRIDES = (1, 2, 4)
FAMILY = "StableDiffusionPipeline"


def toy_row(index: int, *, steps: int, siblings: int, seed: int, prompts: str) -> dict[str, Any]:
    """One trajectory, as a row of the dataset."""
    rng = np.random.default_rng([seed, index])
    log_snr = np.linspace(-4, 4, steps + 1)
    alpha, sigma = variance_preserving(log_snr)
    clean, noise = rng.normal(size=(2, SIZE))
    difficulty, doubt, reward = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.normal()
    paths = alpha[:, None] * clean + sigma[:, None] * noise
    features = {name: rng.normal(size=(steps, channels)) for name, channels in CHANNELS.items()}
    features["mid"][:, 0] += 3 * difficulty
    features["down.0"][:, 1] += 3 * doubt
    edges = [(i, k) for i in range(steps) for k in STRIDES if i + k <= steps]
    groups = [(i, k) for i, k in edges[::2] if i + k < steps]
    drawn = reward + np.exp(doubt - 1) * rng.normal(size=(len(groups), siblings))
    return {
        "index": index,
        "prompt": f"{prompts} {index // 2}",
        "prompt_index": index // 2,
        "seed": index,
        "family": FAMILY,
        "scheduler": "DDIMScheduler",
        "eta": 0.0,
        "num_steps": steps,
        "guidance_scale": 4.0,
        "latent_shape": [2, 2, 2],
        "timestep": np.linspace(999, 1, steps),
        "log_snr": log_snr,
        "latents": paths[:-1],
        "denoised": np.tile(clean, (steps, 1)),
        "value": reward + 0.1 * rng.normal(size=steps),
        "features": features,
        "final_latents": clean,
        "reward": reward,
        "jumps": {
            "step_index": [i for i, _ in edges],
            "stride": [k for _, k in edges],
            "latents": [paths[i + k] for i, k in edges],
            "denoised": [clean + 0.3 * sigma[i + k] * rng.normal(size=SIZE) for i, k in edges],
            "truncation_error": [
                (log_snr[i + k] - log_snr[i]) * np.exp(difficulty - 4) for i, k in edges
            ],
            "estimate_error": [0.0] * len(edges),
            "value": [reward] * len(edges),
        },
        "siblings": {
            "step_index": [i for i, _ in groups],
            "stride": [k for _, k in groups],
            "denoised": np.tile(clean, (len(groups), siblings, 1)),
            "values": drawn,
        },
    }


def toy_rows(
    count: int, *, steps: int = 6, siblings: int = 4, seed: int = 0, prompts: str = "train"
) -> list[dict[str, Any]]:
    return [
        toy_row(index, steps=steps, siblings=siblings, seed=seed, prompts=prompts)
        for index in range(count)
    ]


def write_toy_log(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """Write splits in shards of 32 trajectories."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        shards = [rows[start : start + 32] for start in range(0, max(1, len(rows)), 32)]
        for number, shard in enumerate(shards):
            names = shard[0]["features"] if shard else CHANNELS
            features = features_of(names)
            columns = {name: [row[name] for row in shard] for name in features}
            dataset = Dataset.from_dict(columns, features=features)
            write_shard(dataset, shard_path(folder, split, number, len(shards)))
    return folder

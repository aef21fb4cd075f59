"""What a feature decoder is worth to a fusion, on the model in the box, and what it costs.

    python scripts/measure_feature_decoder.py

8 independent samples of each of 24 `tune` prompts are fused at four noise levels: by features with
the decoder, by features without one, and by tokens. Printed are the fusions that passed the checks,
those that the denoiser then knew, and their values beside their particles', in standard deviations
of these. Two minutes on one core.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mctd_diffusers import EMBEDDED_MODEL, FeatureToLatent, MCTDPipeline
from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.denoising.fusing import FusionParts
from mctd_diffusers.denoising.fusion_checks import MAX_INCONSISTENCY
from mctd_diffusers.evaluation.scenes import load_prompts
from mctd_diffusers.search.environment import REJECTED, Action, Handles

PROMPTS: Final = [prompt.caption() for prompt in load_prompts("tune")[::5]]
PARTICLES: Final = 8
STEPS: Final = 16
LEVELS: Final = (2, 4, 6, 8)
TEMPERATURE: Final = 2.0


class Fused(NamedTuple):
    """What became of one fusion for each prompt.

    Attributes:
        accepted: how many passed the checks.
        known: of them, those that the denoiser then moved no farther than it may.
        ratio: median of what it moved them by, in units of what it moves particles by.
        gain: mean of their values less the weighted mean of their particles', in deviations of
            these.
        error: standard error of the gain.
        milliseconds: of one fusion, on the CPU.
    """

    accepted: int
    known: int
    ratio: float
    gain: float
    error: float
    milliseconds: float


def fuse_all(environment: LatentEnvironment, handles: Handles, method: str) -> Fused:
    """Fuse the particles of every prompt, and evaluate what passed."""
    groups = handles.reshape(len(PROMPTS), PARTICLES)
    values = environment.value(handles).reshape(groups.shape)
    scores = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    weights = np.exp(scores / TEMPERATURE)
    weights /= weights.sum(1, keepdims=True)
    changes = environment.relative_change(handles).reshape(groups.shape)
    began = time.process_time()
    fusions = environment.fuse(
        list(groups), list(weights), [method] * len(groups), np.arange(len(groups))
    )
    seconds = time.process_time() - began
    passed = np.flatnonzero(fusions.handles != REJECTED)
    fused = fusions.handles[passed]
    environment.denoise(fused)
    ratios = environment.relative_change(fused) / np.median(changes[passed], axis=1)
    scaled = (environment.value(fused) - values[passed].mean(1)) / values[passed].std(1)
    gains = scaled - (weights * scores).sum(1)[passed]
    return Fused(
        accepted=len(passed),
        known=int((ratios <= MAX_INCONSISTENCY).sum()),
        ratio=float(np.median(ratios)),
        gain=float(gains.mean()),
        error=float(gains.std(ddof=1) / len(gains) ** 0.5),
        milliseconds=1000 * seconds / len(groups),
    )


def measure(decoder: FeatureToLatent) -> dict[tuple[str, float], Fused]:
    """All methods at all levels; the particles are the same ones for each method."""
    pipe = MCTDPipeline.from_pretrained(EMBEDDED_MODEL)
    pipe.set_progress_bar_config(disable=True)
    found: dict[tuple[str, float], Fused] = {}
    for names in (("features, decoded", "tokens"), ("features, projected",)):
        world = pipe.open_world(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
            rows_per_call=8,
            feature_decoder=decoder if "features, decoded" in names else None,
        )
        parts = FusionParts("features", map_block=decoder.block)
        environment = replace(world, fusing=parts).environment
        problems = np.repeat(np.arange(len(PROMPTS)), PARTICLES)
        handles = environment.reset(problems, 100 + np.arange(len(problems)))
        for step in range(max(LEVELS) + 1):
            environment.denoise(handles)
            share = float(environment.stepper.log_snr[step].sigmoid())
            for name in names if step in LEVELS else ():
                found[name, share] = fuse_all(environment, handles, name.split(",")[0])
            seeds = 1000 * step + np.arange(len(handles))
            handles = environment.step(handles, [Action(1, 1.0)] * len(handles), seeds)
    return found


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    decoder = FeatureToLatent.from_pretrained(EMBEDDED_MODEL, subfolder="feature_decoder").eval()
    print("| fusion | share of signal | passed | known | moved | gain | CPU ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, share), one in sorted(measure(decoder).items()):
        print(
            f"| {name} | {share:.2f} | {one.accepted} of {len(PROMPTS)} | {one.known} "
            f"| {one.ratio:.2f} | {one.gain:+.2f} ± {one.error:.2f} | {one.milliseconds:.0f} |"
        )
    channels = decoder.config["feature_channels"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(torch.zeros(1, channels, 16, 16), 0.6, 0.8)
    print(f"\na map takes {counter.get_total_flops() / 1e6:.0f} MFLOP to decode")


if __name__ == "__main__":
    main()

"""How near to samples fused particles are, where that is known, and what fusing costs.

    python scripts/measure_fusion.py --write docs/fusion.md
    python scripts/measure_fusion.py --speed

Without `--speed`: fields of 16x16 of Gaussian mixtures with their exact denoiser, every method at
every level, of 2 to 16 particles, independent and siblings; as tables, printed or put between the
document's markers. Ten minutes on one core, most of them transport. With it: milliseconds of a
fusion of 8 particles of 4x64x64, beside a row of a UNet of the size of Stable Diffusion 1.5 with
random weights (4 GB of memory).
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mctd_diffusers.denoising.fusion import FUSIONS, Particles, fuse_groups
from mctd_diffusers.denoising.fusion_checks import MAX_SIGNAL_SHARE
from mctd_diffusers.evaluation.fusion_on_mixtures import (
    COUNTS,
    KIN_STRIDES,
    LEVELS,
    Cell,
    Kin,
    measure_fusion,
)

TRANSPORT = ("tokens", "features", "pixel")
OWN_NOISE = ("mean", "resample", "noise")
BEGIN, END = "<!-- on mixtures: begin -->", "<!-- on mixtures: end -->"

Cells = dict[tuple[str, Kin, float, int], Cell]


def measure(methods: Sequence[str], trials: int, transport_trials: int) -> Cells:
    """All fusions."""
    cells: Cells = {}
    for kin in KIN_STRIDES:
        for method in methods:
            number = transport_trials if method in TRANSPORT else trials
            for level in LEVELS:
                for count in COUNTS:
                    cells[method, kin, level, count] = measure_fusion(
                        method, level=level, count=count, kin=kin, trials=number
                    )
    return cells


def table(
    cells: Cells,
    rows: Sequence[tuple[str, str, Callable[[Cell], float]]],
    levels: Sequence[float],
    form: str,
) -> list[str]:
    """A row for each kin and method, a column for each level, a number for each count."""
    heads = " | ".join(f"{level:g}" for level in levels)
    lines = [f"| particles | method | {heads} |", "| --- | --- |" + " ---: |" * len(levels)]
    for kin in KIN_STRIDES:
        for name, method, number in rows:
            texts = [
                " / ".join(
                    format(number(cells[method, kin, level, count]), form) for count in COUNTS
                )
                for level in levels
            ]
            lines.append(f"| {kin} | {name} | " + " | ".join(texts) + " |")
    return lines


def tables(cells: Cells, methods: Sequence[str], trials: int, transport_trials: int) -> str:
    """What is put into the document."""
    shown = [(f"`{name}`", name, lambda cell: cell.z) for name in methods]
    best = [("*best particle*", methods[0], lambda cell: cell.best_z)]
    widest = [(f"`{name}`", name, lambda cell: cell.widest_z) for name in methods]
    norms = [(f"`{name}`", name, lambda cell: cell.noise_norm) for name in OWN_NOISE]
    norms = [row for row in norms if row[1] in methods]
    usual = ("*particles*", methods[0], _mean_usual)
    others = [name for name in methods if name not in OWN_NOISE]
    norms += [("all others", name, lambda cell: cell.noise_norm) for name in others[:1]]
    checked = [name for name in methods if FUSIONS[name].is_checked]
    accepted = [(f"`{name}`", name, lambda cell: 100 * cell.accepted) for name in checked]
    allowed = [level for level in LEVELS if level <= MAX_SIGNAL_SHARE]
    counts = " / ".join(map(str, COUNTS))
    parts = [
        f"{trials} mixtures each ({transport_trials} for the methods that transport). Columns are "
        f"shares of the signal, and in each cell are\n{counts} particles; at {LEVELS[-1]} the gate "
        "is shut, and what is shown is what the method would do.",
        "Mean z (0 is a typical sample of the level):",
        "\n".join(table(cells, best + shown, LEVELS, "z.1f")),
        "The largest |z| of a single fusion:",
        "\n".join(table(cells, widest, allowed, "z.1f")),
        f"Mean square of the noise (a standard error is {np.sqrt(2 / 256):.2f}):",
        "\n".join(table(cells, [usual, *norms], LEVELS, ".2f")),
        "Share that passed the checks, in %:",
        "\n".join(table(cells, accepted, allowed, ".0f")),
    ]
    return "\n\n".join(parts)


def _mean_usual(cell: Cell) -> float:
    return float(np.mean([one.usual_norm for one in cell.outcomes]))


class FreeCodec:
    """Pictures eight times the size of 3 channels, so that a codec's own time is left out."""

    def decode(self, clean: Tensor) -> Tensor:
        """Pictures in [0, 1]."""
        pictures = F.interpolate(clean[:, :3], scale_factor=8.0, mode="bilinear")
        return (0.5 + 0.1 * pictures).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Latents again."""
        small = F.avg_pool2d(images, 8)
        return torch.cat([10 * small - 5, small[:, :1]], dim=1)


def sized_like_sd(seed: int) -> Particles:
    """8 siblings of Stable Diffusion's size."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(8, 4, 16, 16, generator=generator), scale_factor=4.0)
    noise = torch.randn(8, 4, 64, 64, generator=generator)
    return Particles(
        latents=0.6 * smooth + 0.8 * noise,
        clean=smooth,
        signal=0.6,
        noise=0.8,
        weights=torch.full((8,), 1 / 8),
        features=torch.randn(8, 1280, 8, 8, generator=generator),
    )


def seconds_per_row() -> float:
    """Of a UNet as large as Stable Diffusion 1.5's, with random weights: the least of three."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64).eval()
    inputs = torch.randn(1, 4, 64, 64), torch.tensor([500]), torch.randn(1, 77, 768)
    return min(_seconds(lambda: unet(*inputs)) for _ in range(3))


def _seconds(call: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """CPU seconds, so that other processes do not matter, or those of another clock."""
    started = clock()
    with torch.no_grad():
        call()
    return clock() - started


def print_speed() -> None:
    """Print what methods cost."""
    torch.set_num_threads(1)
    row = seconds_per_row()
    print(f"a row of the UNet, one thread: {row:.2f} CPU s\n")
    print("| method | CPU ms | % of a row | ms for 4 groups, 1 thread | 2 threads |")
    print("| --- | ---: | ---: | ---: | ---: |")
    groups = [sized_like_sd(seed) for seed in range(4)]
    for name in FUSIONS:

        def run(number: int, threads: int, name: str = name) -> None:
            seeds = list(range(number))
            fuse_groups(name, groups[:number], seeds=seeds, codec=FreeCodec(), num_threads=threads)

        def wall(threads: int, run: Callable[[int, int], None] = run) -> float:
            return min(_seconds(lambda: run(4, threads), time.perf_counter) for _ in range(3))

        alone = min(_seconds(lambda: run(1, 1)) for _ in range(3))
        times = f"{1e3 * wall(1):.0f} | {1e3 * wall(2):.0f}"
        print(f"| `{name}` | {1e3 * alone:.1f} | {100 * alone / row:.2f} | {times} |")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default=",".join(FUSIONS), help="between commas")
    parser.add_argument("--trials", type=int, default=40, help="mixtures for each cell")
    parser.add_argument("--transport-trials", type=int, default=20, help="where it takes longer")
    parser.add_argument("--write", type=Path, help="document to put the tables into")
    parser.add_argument("--speed", action="store_true", help="measure what fusing costs instead")
    options = parser.parse_args()
    if options.speed:
        print_speed()
        return
    methods = options.methods.split(",")
    cells = measure(methods, options.trials, options.transport_trials)
    text = tables(cells, methods, options.trials, options.transport_trials)
    if options.write is None:
        print(text)
        return
    document = options.write.read_text("utf-8")
    marked = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    if not marked.search(document):
        raise SystemExit(f"{options.write} has no lines {BEGIN} and {END} to write between")
    options.write.write_text(
        marked.sub(lambda _: f"{BEGIN}\n{text}\n{END}", document), encoding="utf-8"
    )


if __name__ == "__main__":
    main()

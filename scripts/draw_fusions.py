"""Draws particles of the model in the box and what each method of fusion makes of them.

    python scripts/draw_fusions.py docs/images

Four noise levels, particles that are independent and siblings of one parent. `fusion-*.png` show
what becomes of each by the deterministic sampler, `fusion-estimates.png` what fused estimates look
like before the denoiser has seen them. Where a gate is shut, what the method would do is drawn all
the same, and the verdict below. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from mctd_diffusers import EMBEDDED_MODEL, MCTDPipeline
from mctd_diffusers.denoising.denoiser import FeatureTap
from mctd_diffusers.denoising.fusion import FUSIONS, Particles, fuse
from mctd_diffusers.viewing.sheets import Cell, comparison_sheet

LEVELS = (3, 7, 9, 12)  # steps of the schedule
SHOWN = 4  # particles that are drawn, of all
BLOCK = "down.1"


class Model:
    """The model in the box under one prompt, stepped by DDIM.

    Args:
        prompt: of all pictures.
        num_steps: of the schedule.
        guidance: scale of classifier-free guidance.
    """

    def __init__(self, prompt: str, num_steps: int, guidance: float) -> None:
        self.pipe: Any = MCTDPipeline.from_pretrained(EMBEDDED_MODEL).to(dtype=torch.float32)
        self.prompt = prompt
        self.guidance = guidance
        self.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.scheduler.set_timesteps(num_steps)
        asked, plain = self.pipe.encode_prompt(prompt, "cpu", 1, True, "")
        self.embeds = torch.cat([plain, asked])
        self.tap = FeatureTap(self.pipe.unet, rows_per_latent=2, names=(), map_block=BLOCK)

    def outputs(self, latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Guided outputs, and the map of features."""
        timestep = self.scheduler.timesteps[step]
        embeds = self.embeds.repeat_interleave(len(latents), 0)
        with self.tap as tap:
            both = self.pipe.unet(latents.repeat(2, 1, 1, 1), timestep, embeds).sample
            maps = tap.take_maps()
        plain, asked = both.chunk(2)
        return plain + self.guidance * (asked - plain), maps

    def run(self, latents: Tensor, start: int, stop: int, *, eta: float, seed: int = 0) -> Tensor:
        """Latents some steps on."""
        generator = torch.Generator().manual_seed(seed)
        for step in range(start, stop):
            output, _ = self.outputs(latents, step)
            timestep = self.scheduler.timesteps[step]
            stepped = self.scheduler.step(output, timestep, latents, eta=eta, generator=generator)
            latents = stepped.prev_sample
        return latents

    def particles(self, latents: Tensor, step: int) -> Particles:
        """Evaluated and weighted by the reward of their estimates."""
        output, maps = self.outputs(latents, step)
        timestep = self.scheduler.timesteps[step]
        clean = self.scheduler.step(output, timestep, latents).pred_original_sample
        share = float(self.scheduler.alphas_cumprod[timestep])
        rewards = self.rewards(self.decode(clean))
        standardised = (rewards - rewards.mean()) / rewards.std(correction=0)
        return Particles(
            latents=latents,
            clean=clean,
            signal=share**0.5,
            noise=(1 - share) ** 0.5,
            weights=torch.softmax(standardised, 0),
            features=maps,
        ).ordered()

    def rewards(self, images: Tensor) -> Tensor:
        """By the reward in the box."""
        scores = self.pipe.reward_model(images, [self.prompt] * len(images))
        return torch.as_tensor(scores).float()

    def decode(self, clean: Tensor) -> Tensor:
        """Pictures in [0, 1]."""
        images = self.pipe.vae.decode(clean / self.pipe.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Latents of pictures."""
        law = self.pipe.vae.encode(2 * images - 1).latent_dist
        return law.mode() * self.pipe.vae.config.scaling_factor


def start_of(model: Model, count: int, seed: int) -> Tensor:
    """First latents."""
    generator = torch.Generator().manual_seed(seed)
    shape = count, model.pipe.unet.config.in_channels, *(2 * [model.pipe.unet.config.sample_size])
    return torch.randn(shape, generator=generator)


def particles_of(model: Model, kin: str, step: int, count: int, seed: int) -> Particles:
    """Particles of a step: of their own noise each, or children of one parent."""
    if kin == "independent":
        latents = model.run(start_of(model, count, seed), 0, step, eta=1, seed=seed)
    else:
        parent = model.run(start_of(model, 1, seed), 0, step - 1, eta=1, seed=seed)
        latents = model.run(parent.repeat(count, 1, 1, 1), step - 1, step, eta=1, seed=seed + 1)
    return model.particles(latents, step)


def cells_of(model: Model, particles: Particles, step: int) -> tuple[list[Cell], list[Cell]]:
    """Of the heaviest particles and of every method: what becomes of them, and estimates."""
    latents, estimates = list(particles.latents[:SHOWN]), list(particles.clean[:SHOWN])
    notes = [[f"weight {weight:.2f}"] for weight in particles.weights[:SHOWN].tolist()]
    for name, method in FUSIONS.items():
        draft = method(particles, seed=0, codec=model)
        latents.append(draft.latents)
        estimates.append(draft.clean)
        verdict = fuse(name, particles, seed=0, codec=model).verdict
        notes.append(textwrap.wrap(verdict, 16))
    finished = model.decode(model.run(torch.stack(latents), step, len(_timesteps(model)), eta=0))
    rewards = [f"reward {reward:.1f}" for reward in model.rewards(finished).tolist()]
    shown = zip(finished, rewards, notes, strict=True)
    ends = [Cell(_picture(image), (reward, *note)) for image, reward, note in shown]
    seen = zip(model.decode(torch.stack(estimates)), notes, strict=True)
    return ends, [Cell(_picture(image), tuple(note)) for image, note in seen]


def _timesteps(model: Model) -> Tensor:
    timesteps: Tensor = model.scheduler.timesteps
    return timesteps


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((255 * image.permute(1, 2, 0)).round().byte().numpy())


def draw(rows: list[tuple[str, list[Cell]]], title: str, path: Path) -> None:
    """Lay cells out and write them in few colours, which keeps the file small."""
    columns = [(f"particle {place + 1}", "by weight") for place in range(SHOWN)]
    columns += [
        (name, "checked" if method.is_checked else "reference") for name, method in FUSIONS.items()
    ]
    footer = "Signal is its share of the squared factors; above 0.6 fusion is refused."
    sheet = comparison_sheet(columns, rows, title=title, footer=footer, side=112)
    sheet.quantize(128).save(path, optimize=True)


@torch.no_grad()
def main() -> None:
    """Draw the sheets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--prompt", default="two red apples above a blue car")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(options.prompt, options.steps, options.guidance)
    options.folder.mkdir(parents=True, exist_ok=True)
    estimates = []
    for kin in ("independent", "siblings"):
        rows = []
        for step in LEVELS:
            particles = particles_of(model, kin, step, options.particles, options.seed)
            label = (
                f"step {step}: signal {particles.signal_share:.2f}, noises' correlation "
                f"{particles.correlation:.2f}, {options.particles} {kin}"
            )
            ends, seen = cells_of(model, particles, step)
            rows.append((label, ends))
            if kin == "independent":
                estimates.append((label, seen))
        title = f"{options.prompt}: particles ({kin}), and what becomes of them and of fusions"
        draw(rows, title, options.folder / f"fusion-{kin}.png")
    title = f"{options.prompt}: estimates as they are fused"
    draw(estimates, title, options.folder / "fusion-estimates.png")


if __name__ == "__main__":
    main()

"""Trains the gold judge: a detector that reads objects, colours and places off a picture.

It learns from one half of the scenes (column ``half``) that the reward never sees. Pictures are
warped, blurred, tinted and grained, and a share of them went through the autoencoder, because what
it will judge are generated pictures; another share shows emoji outside the vocabulary, of which it
must learn to say nothing.

    accelerate launch training/train_judge.py --data data/emoji --autoencoder
    mctd_diffusers/embedded/vae \
        --output_dir runs/judge --export_to mctd_diffusers/embedded/judge

About 0.75 s a step of 64 pictures on one CPU core. The loss falls from 12 to 1.5 in 500 steps and
below 0.6 in 2,000; printed at each validation are the share of facts right on held-out scenes, and
the share of one-fact-wrong captions that are refused. Your own data needs the columns ``image``,
``caption`` (in the grammar of `mctd_diffusers.evaluation.scenes`) and ``objects`` (a JSON list of
`PlacedObject`).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from transformers import HfArgumentParser

from mctd_diffusers.evaluation.judge import SceneJudge, scene_targets
from mctd_diffusers.evaluation.real_scenes import RealScenes, judge_figures
from mctd_diffusers.evaluation.scenes import OBJECTS, PlacedObject
from mctd_diffusers.models.augmentation import (
    degrade_pictures,
    draw_warps,
    warp_pictures,
    warp_points,
)
from mctd_diffusers.models.losses import SceneTargets, scene_loss

logger = logging.getLogger("train_judge")


@dataclass
class Arguments:
    """Options of the script."""

    data: str = field(
        default="data/emoji", metadata={"help": "DatasetDict folder of prepare_data.py"}
    )
    train_split: str = field(default="scenes", metadata={"help": "split of pictures with objects"})
    blank_split: str = field(
        default="singles",
        metadata={"help": "split whose pictures outside the vocabulary show nothing; '' for none"},
    )
    validation_split: str = field(
        default="held_out_scenes", metadata={"help": "split to validate on"}
    )
    half: int = field(
        default=1, metadata={"help": "value of column 'half' to learn from; -1 for all"}
    )
    output_dir: str = field(default="runs/judge", metadata={"help": "checkpoints and logs go here"})
    export_to: str = field(
        default="", metadata={"help": "folder for the averaged weights in float16"}
    )
    init_from: str = field(default="", metadata={"help": "folder of a SceneJudge to start from"})
    autoencoder: str = field(
        default="", metadata={"help": "AutoencoderKL folder for round trips; '' for none"}
    )
    num_round_trips: int = field(default=4096, metadata={"help": "pictures sent round, once"})
    round_trip_share: float = field(default=0.25, metadata={"help": "share of these in a batch"})
    blank_share: float = field(
        default=0.06, metadata={"help": "share of pictures of nothing known"}
    )
    max_steps: int = field(default=2000, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=64, metadata={"help": "pictures a step and process"})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "peak; linear warm-up, then cosine"}
    )
    warmup_steps: int = field(default=100, metadata={"help": "steps of warm-up"})
    weight_decay: float = field(default=0.02, metadata={"help": "of AdamW"})
    ema_decay: float = field(default=0.995, metadata={"help": "decay of the averaged weights"})
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16"})
    validation_steps: int = field(default=250, metadata={"help": "steps between validations"})
    num_validation: int = field(default=600, metadata={"help": "pictures of a validation"})
    checkpointing_steps: int = field(default=250, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "checkpoints kept"})
    resume_from_checkpoint: str = field(
        default="", metadata={"help": "folder of a checkpoint, 'latest', or '' to start anew"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "tracker, or 'none'"})
    seed: int = field(default=0, metadata={"help": "of weights, order and augmentation"})


@dataclass
class Pictures:
    """Training pictures in memory, uint8 ``[count, height, width, 3]``, with their objects."""

    pixels: np.ndarray
    scenes: list[list[PlacedObject]]

    def images(self, rows: np.ndarray) -> torch.Tensor:
        """Return pictures in [0, 1], ``[batch, 3, height, width]``."""
        return torch.from_numpy(self.pixels[rows]).permute(0, 3, 1, 2).float() / 255


def load_pictures(arguments: Arguments) -> tuple[Pictures, Pictures | None]:
    """Load the scenes of the wanted half, and pictures of nothing in the vocabulary."""
    folder = datasets.load_from_disk(arguments.data)

    def of_half(split: datasets.Dataset) -> datasets.Dataset:
        if arguments.half < 0 or "half" not in split.column_names:
            return split
        return split.select(np.flatnonzero(np.array(split["half"]) == arguments.half))

    def pixels(split: datasets.Dataset) -> np.ndarray:
        return np.stack([np.asarray(image.convert("RGB")) for image in split["image"]])

    scenes = of_half(folder[arguments.train_split])
    placed = [[PlacedObject(**one) for one in json.loads(text)] for text in scenes["objects"]]
    train = Pictures(pixels(scenes), placed)
    if not arguments.blank_split or arguments.blank_share == 0:
        return train, None
    blanks = of_half(folder[arguments.blank_split])
    # Not what only looks like the vocabulary, such as a green apple or a heart with an arrow.
    strange = [not any(noun in caption for noun in OBJECTS) for caption in blanks["caption"]]
    blanks = blanks.select(np.flatnonzero(strange & ~np.array(blanks["in_vocabulary"], dtype=bool)))
    return train, Pictures(pixels(blanks), [[] for _ in range(len(blanks))])


@torch.no_grad()
def round_trips(arguments: Arguments, train: Pictures, device: torch.device) -> Pictures | None:
    """Send some pictures through the autoencoder, with a little noise on the latents, once."""
    if not arguments.autoencoder or arguments.round_trip_share == 0:
        return None
    autoencoder = AutoencoderKL.from_pretrained(arguments.autoencoder).float().to(device).eval()
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = np.random.default_rng(arguments.seed).permutation(len(train.scenes))
    rows = rows[: arguments.num_round_trips]
    rounds = np.empty((len(rows), *train.pixels.shape[1:]), dtype=np.uint8)
    for start in range(0, len(rows), 32):
        images = train.images(rows[start : start + 32]).to(device)
        latents = autoencoder.encode(2 * images - 1).latent_dist.mean
        spread = (
            latents.std() * 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator).to(device)
        )
        latents = latents + spread * torch.randn(latents.shape, generator=generator).to(device)
        decoded = (autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        rounds[start : start + 32] = (
            (decoded * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        )
    return Pictures(rounds, [train.scenes[row] for row in rows])


def batches(
    sources: list[tuple[Pictures, float]],
    arguments: Arguments,
    *,
    first_step: int,
    process: int,
    num_processes: int,
) -> Iterator[tuple[torch.Tensor, list[list[PlacedObject]]]]:
    """Yield augmented pictures and their objects from ``first_step`` on.

    What a step sees depends on the seed, the step and the process alone, so that a resumed run goes
    on as if it had never stopped. The first source is gone through in epochs; the others are drawn
    from.
    """
    (train, _), *others = sources
    shares = [share for _, share in others]
    counts = [round(share * arguments.batch_size) for share in shares]
    own = arguments.batch_size - sum(counts)
    per_epoch = max(len(train.scenes) // (own * num_processes), 1)
    for step in range(first_step, arguments.max_steps):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([arguments.seed, epoch]).permutation(len(train.scenes))
        start = (place * num_processes + process) * own
        rng = np.random.default_rng([arguments.seed, step, process, 1])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = order[np.arange(start, start + own) % len(order)]
        images, scenes = [train.images(rows)], [train.scenes[row] for row in rows]
        for (pictures, _), count in zip(others, counts, strict=True):
            drawn = rng.integers(len(pictures.scenes), size=count)
            images.append(pictures.images(drawn))
            scenes += [pictures.scenes[row] for row in drawn]
        yield augment(torch.cat(images), scenes, generator)


def augment(
    images: torch.Tensor, scenes: list[list[PlacedObject]], generator: torch.Generator
) -> tuple[torch.Tensor, list[list[PlacedObject]]]:
    """Mirror half of the pictures, warp and degrade all of them, and move the objects along."""
    maps, fields = draw_warps(len(images), generator=generator)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    maps[mirrored, 0] *= -1
    images = degrade_pictures(warp_pictures(images, maps, fields), generator=generator)
    moved = []
    for scene, affine in zip(scenes, maps, strict=True):
        points = torch.tensor([[one.x, one.y] for one in scene]).reshape(-1, 2)
        moved.append(
            [
                PlacedObject(**{**asdict(one), "x": float(x), "y": float(y)})
                for one, (x, y) in zip(scene, warp_points(points, affine), strict=True)
            ]
        )
    return images, moved


def validate(judge: SceneJudge, scenes: RealScenes) -> dict[str, float]:
    """Return the share of facts right, of prompts all right, and of false captions refused."""
    figures = judge_figures(judge, scenes)
    return {name: figures[name] for name in ("facts_right", "all_right", "refused")}


def learning_rate_at(step: int, arguments: Arguments) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then half a cosine to 0."""
    if step < arguments.warmup_steps:
        return (step + 1) / arguments.warmup_steps
    rest = max(arguments.max_steps - arguments.warmup_steps, 1)
    return (1 + math.cos(math.pi * (step - arguments.warmup_steps) / rest)) / 2


# --- same in every script: checkpointing


def save_checkpoint(accelerator: Accelerator, output_dir: str, step: int, limit: int) -> None:
    """Save all that a resumed run needs under ``checkpoints/step-STEP``, and drop the oldest."""
    folder = Path(output_dir) / "checkpoints"
    accelerator.save_state(str(folder / f"step-{step}"))
    if accelerator.is_main_process:
        for old in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)


def list_checkpoints(output_dir: str) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    found = (Path(output_dir) / "checkpoints").glob("step-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def resume(accelerator: Accelerator, output_dir: str, wanted: str) -> int:
    """Load the checkpoint ``wanted``, if any, and return the step to go on from."""
    if not wanted:
        return 0
    if wanted == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            logger.info("no checkpoint in %s: starting anew", output_dir)
            return 0
        wanted = str(found[-1])
    accelerator.load_state(wanted)
    return int(Path(wanted).name.removeprefix("step-"))


# --- end of checkpointing


def main(arguments: Arguments) -> None:
    """Train, validate, save."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    set_seed(arguments.seed)
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_config=ProjectConfiguration(
            arguments.output_dir, logging_dir=f"{arguments.output_dir}/logs"
        ),
    )
    accelerator.init_trackers("judge", config=asdict(arguments))

    judge = SceneJudge.from_pretrained(arguments.init_from) if arguments.init_from else SceneJudge()
    judge = judge.float().to(memory_format=torch.channels_last)
    grid = judge.config.sample_size // 4
    ema = EMAModel(judge.parameters(), decay=arguments.ema_decay)
    ema.to(accelerator.device)

    train, blanks = load_pictures(arguments)
    rounds = round_trips(arguments, train, accelerator.device)
    sources = [(train, 1.0)]
    sources += [(rounds, arguments.round_trip_share)] if rounds is not None else []
    sources += [(blanks, arguments.blank_share)] if blanks is not None else []
    held_out = RealScenes.from_split(
        datasets.load_from_disk(arguments.data)[arguments.validation_split],
        arguments.num_validation,
    )
    logger.info("%d pictures to learn from, %d to validate on", len(train.scenes), len(held_out))

    optimizer = torch.optim.AdamW(
        judge.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_at(step, arguments)
    )
    model, optimizer = accelerator.prepare(judge, optimizer)
    accelerator.register_for_checkpointing(ema, schedule)
    first_step = resume(accelerator, arguments.output_dir, arguments.resume_from_checkpoint)

    started = time.perf_counter()
    stream = batches(
        sources,
        arguments,
        first_step=first_step,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    for step, (images, scenes) in enumerate(stream, start=first_step + 1):
        targets = scene_targets(
            scenes, grid=grid, nouns=judge.config.nouns, colours=judge.config.colours
        )
        with accelerator.autocast():
            outputs = model(images.to(accelerator.device, memory_format=torch.channels_last))
        parts = scene_loss(
            outputs.centre.float(),
            outputs.noun.float(),
            outputs.colour.float(),
            outputs.offset.float(),
            SceneTargets(*(target.to(accelerator.device) for target in targets)),
        )
        loss = sum(parts.values())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(judge.parameters())

        if step % 10 == 0 or step == arguments.max_steps:
            values = {name: part.item() for name, part in parts.items()} | {"loss": loss.item()}
            accelerator.log(values, step=step)
            pace = (time.perf_counter() - started) / (step - first_step)
            text = " ".join(f"{name}={value:.4f}" for name, value in values.items())
            logger.info("step %d %s (%.2f s a step)", step, text, pace)
        last = step == arguments.max_steps
        if (last or step % arguments.validation_steps == 0) and accelerator.is_main_process:
            ema.store(judge.parameters())
            ema.copy_to(judge.parameters())
            figures = validate(judge.eval(), held_out)
            judge.train()
            ema.restore(judge.parameters())
            accelerator.log(figures, step=step)
            logger.info("step %d %s", step, " ".join(f"{k}={v:.4f}" for k, v in figures.items()))
        if last or step % arguments.checkpointing_steps == 0:
            save_checkpoint(
                accelerator, arguments.output_dir, step, arguments.checkpoints_total_limit
            )

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ema.copy_to(judge.parameters())
        folder = arguments.export_to or str(Path(arguments.output_dir) / "judge")
        judge.half().save_pretrained(folder)
        logger.info("saved %s", folder)
    accelerator.end_training()


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])

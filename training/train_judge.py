r"""Trains the gold judge: a detector that reads objects, colours and places off a picture.

It learns from one half of the scenes (column ``half``) that the reward never sees. Pictures are
mirrored, warped, blurred, tinted and grained, and a share of them went through the autoencoder,
because what it will judge are generated pictures. Tinted objects change their colour at random,
and some pictures swap their colour channels, unasked for colours: the data holds out pairs of
object and colour, and a judge must not learn that these do not exist. Another share shows emoji
outside the vocabulary, of which it must learn to say nothing. ::

    accelerate launch training/train_judge.py --autoencoder mctd_diffusers/embedded/vae \
        --output runs/judge

About 0.75 s a step of 64 pictures on one CPU core; the loss falls from 12 to 2 in 320 steps. Each
validation prints the share of facts found on held-out scenes, and of captions wrong in one
fact the share refused. Your own data needs pictures and a column ``objects``, a JSON list of
`PlacedObject`; to validate, captions of the grammar of `mctd_diffusers.evaluation.scenes`.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import Dataset, DatasetDict, load_from_disk
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.judge import SceneJudge, scene_targets
from mctd_diffusers.evaluation.real_scenes import RealScenes, judge_figures
from mctd_diffusers.evaluation.scenes import OBJECTS, PlacedObject
from mctd_diffusers.models.augmentation import (
    TINTS,
    degrade_pictures,
    draw_warps,
    retint_object,
    warp_pictures,
    warp_points,
)
from mctd_diffusers.models.losses import SceneTargets, scene_loss

logger = logging.getLogger("train_judge")


@dataclass
class Options:
    """What to train, on what, and for how long."""

    output: str = field(
        default="runs/judge", metadata={"help": "folder for checkpoints and weights"}
    )
    dataset: str = field(
        default="data/emoji", metadata={"help": "a folder that datasets.load_from_disk opens"}
    )
    split: str = field(
        default="scenes", metadata={"help": "the split to train on, with a column of objects"}
    )
    blank_split: str = field(
        default="singles",
        metadata={
            "help": "a split whose pictures outside the vocabulary show nothing; '' for none"
        },
    )
    blank_share: float = field(
        default=0.06, metadata={"help": "the share of a batch that shows nothing known"}
    )
    validation_split: str = field(
        default="held_out_scenes", metadata={"help": "the split to validate on; '' for none"}
    )
    half: int = field(
        default=1, metadata={"help": "the value of column 'half' to learn from; -1 for all"}
    )
    image_column: str = field(default="image", metadata={"help": "the column of pictures"})
    resolution: int = field(default=64, metadata={"help": "side to which pictures are brought"})
    init_from: str = field(default="", metadata={"help": "a SceneJudge folder to begin with"})
    autoencoder: str = field(
        default="", metadata={"help": "an AutoencoderKL folder for round trips; '' for none"}
    )
    num_round_trips: int = field(default=4096, metadata={"help": "pictures sent round, once"})
    round_trip_share: float = field(
        default=0.25, metadata={"help": "the share of a batch that went round"}
    )
    retint_share: float = field(
        default=0.5, metadata={"help": "share of tinted objects that get another colour"}
    )
    swap_share: float = field(
        default=0.2, metadata={"help": "share of pictures whose colour channels change places"}
    )
    max_train_steps: int = field(default=2000, metadata={"help": "optimiser steps in all"})
    train_batch_size: int = field(default=64, metadata={"help": "pictures a step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "of AdamW, after the warm-up"})
    weight_decay: float = field(default=0.02, metadata={"help": "of AdamW"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of rising learning rate"})
    decay_steps: int = field(
        default=1200, metadata={"help": "last steps, over which the learning rate falls to zero"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "bound of the gradient's norm"})
    ema_decay: float = field(default=0.995, metadata={"help": "of the averaged weights"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data order and noise"})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, fp16 or bf16, where the device has it"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "a tracker, or 'none'"})
    validation_steps: int = field(default=250, metadata={"help": "steps between validations"})
    num_validation_images: int = field(default=600, metadata={"help": "pictures a validation"})
    checkpointing_steps: int = field(default=250, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "checkpoints kept"})
    resume_from_checkpoint: str = field(
        default="", metadata={"help": "a checkpoint folder, or 'latest' of the output folder"}
    )
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves them be"})


# --- same in every script: checkpointing
class StopRequest:
    """Turns SIGTERM and SIGINT into a flag, so that a run ends with a whole checkpoint."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: object) -> None:
        self.is_set = True

    def is_agreed(self, accelerator: Accelerator) -> bool:
        """Says whether any process was asked to stop; all of them call it once a step."""
        if accelerator.num_processes == 1:
            return self.is_set
        flags = accelerator.gather(torch.tensor([self.is_set], device=accelerator.device))
        return bool(flags.any())


def checkpoints(output: Path) -> list[Path]:
    """Lists the whole checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, limit: int) -> None:
    """Saves weights, optimiser, averages and random state; a killed save leaves no trace.

    The data position needs no file: the order of the data follows from the seed and the step.
    """
    final = output / f"checkpoint-{step}"
    unfinished = output / f"checkpoint-{step}.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.replace(final)
        for old in checkpoints(output)[:-limit]:
            shutil.rmtree(old)


def load_checkpoint(accelerator: Accelerator, output: Path, name: str) -> int:
    """Loads a checkpoint by path, or the 'latest' of a run; '' begins anew.

    Returns:
        The step to go on from.

    Raises:
        ConfigError: the named folder is no checkpoint.
    """
    if not name:
        return 0
    if name == "latest":
        found = checkpoints(output)
        if not found:
            return 0
        path = found[-1]
    else:
        path = Path(name)
        if not path.is_dir() or not path.name[11:].isdigit():
            raise ConfigError(f"resume_from_checkpoint={name!r} is no folder checkpoint-STEP")
    accelerator.load_state(str(path))
    return int(path.name[11:])


def batch_indices(num_rows: int, batch_size: int, seed: int, first_step: int) -> Iterator[Any]:
    """Yields the rows of each batch from a step on, every epoch in an order of its own.

    Batches run on over the ends of epochs, so that a set smaller than a batch works too.
    """
    position = first_step * batch_size
    while True:
        rows: list[int] = []
        while len(rows) < batch_size:
            epoch, offset = divmod(position, num_rows)
            order = np.random.default_rng([seed, epoch]).permutation(num_rows)
            taken = order[offset : offset + batch_size - len(rows)]
            rows += taken.tolist()
            position += len(taken)
        yield rows


# --- end


# --- same in every script: learning rate
def learning_rate(step: int, peak: float, warmup: int, decay: int, last: int) -> float:
    """Rises over `warmup` steps, stays at the peak, and falls to zero over the last `decay`."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    falling = min(1.0, (last - step) / max(1, decay))
    return peak * rising * falling


# --- end


# --- same in every script: pictures
def open_split(options: Any, split: str) -> Dataset:
    """Opens a split of a folder made by `save_to_disk` (or the folder itself, if it has none).

    Raises:
        ConfigError: no such folder, split or picture column.
    """
    try:
        data = load_from_disk(options.dataset)
    except FileNotFoundError as error:
        raise ConfigError(
            f"dataset={options.dataset!r} is no folder made by datasets' save_to_disk; "
            "training/prepare_data.py makes one"
        ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ConfigError(f"no split {split!r} in {options.dataset!r}, only {sorted(data)}")
        data = data[split]
    if options.image_column not in data.column_names:
        raise ConfigError(
            f"no column {options.image_column!r} in {options.dataset!r}, only {data.column_names}"
        )
    return data


def load_pictures(data: Dataset, rows: list[int], options: Any) -> torch.Tensor:
    """Reads pictures as a float tensor in [-1, 1], [batch, 3, resolution, resolution]."""
    side = options.resolution
    pictures = []
    for stored in data[rows][options.image_column]:
        picture = stored.convert("RGB")
        if picture.size != (side, side):
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
        pictures.append(np.asarray(picture))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- end


# --- same in every script: halves and round trips
def take_half(data: Dataset, half: int) -> Dataset:
    """Keeps the pictures of one half (column ``half``), or all with -1 or without that column."""
    if half < 0 or "half" not in data.column_names:
        return data
    return data.select(np.flatnonzero(np.array(data["half"]) == half))


@torch.no_grad()
def send_round(
    data: Dataset, options: Any, device: torch.device
) -> tuple[torch.Tensor, list[int]] | None:
    """Sends some pictures through the autoencoder, with a little noise on their latents, once.

    Returns:
        The pictures as uint8, [count, 3, resolution, resolution], and the rows they come from;
        ``None`` where no autoencoder is named.
    """
    if not options.autoencoder or options.round_trip_share <= 0:
        return None
    autoencoder = AutoencoderKL.from_pretrained(options.autoencoder).float().to(device).eval()
    generator = torch.Generator().manual_seed(options.seed)
    rows = np.random.default_rng(options.seed).permutation(len(data))
    rows = rows[: options.num_round_trips].tolist()
    made = []
    for first in tqdm(range(0, len(rows), 32), desc="round trips", mininterval=10):
        images = load_pictures(data, rows[first : first + 32], options).to(device)
        latents = autoencoder.encode(images).latent_dist.mean
        amount = 0.15 * latents.std().cpu() * torch.rand(len(images), 1, 1, 1, generator=generator)
        noise = amount * torch.randn(latents.shape, generator=generator)
        decoded = autoencoder.decode(latents + noise.to(device)).sample
        made.append(((decoded + 1) * 127.5).clamp(0, 255).round().byte().cpu())
    return torch.cat(made), rows


# --- end


def read_scenes(data: Dataset) -> list[list[PlacedObject]]:
    """Reads the objects of every picture.

    Raises:
        ConfigError: there is no column of objects.
    """
    if "objects" not in data.column_names:
        raise ConfigError(
            f"the judge learns from a column 'objects'; there are {data.column_names}"
        )
    return [[PlacedObject(**placed) for placed in json.loads(text)] for text in data["objects"]]


def take_blanks(data: Dataset) -> Dataset:
    """Keeps the pictures of nothing in the vocabulary.

    Nor of what only looks like it, such as a green apple or a heart with an arrow.
    """
    strange = [not any(noun in caption for noun in OBJECTS) for caption in data["caption"]]
    known = np.array(data["in_vocabulary"], dtype=bool)
    return data.select(np.flatnonzero(np.array(strange) & ~known))


def retint(
    images: torch.Tensor, scenes: list[list[PlacedObject]], share: float, rng: np.random.Generator
) -> tuple[torch.Tensor, list[list[PlacedObject]]]:
    """Gives a share of the tinted objects another colour, so that every pair of words occurs."""
    pictures, changed = list(images), []
    for row, scene in enumerate(scenes):
        objects = []
        for placed in scene:
            colour = placed.colour
            if colour is not None and rng.random() < share:
                colour = str(rng.choice(list(TINTS)))
                box = {"x": placed.x, "y": placed.y, "size": placed.size}
                pictures[row] = retint_object(pictures[row], **box, old=placed.colour, new=colour)
            objects.append(replace(placed, colour=colour))
        changed.append(objects)
    return torch.stack(pictures), changed


def augment(
    images: torch.Tensor, scenes: list[list[PlacedObject]], generator: torch.Generator
) -> tuple[torch.Tensor, list[list[PlacedObject]]]:
    """Mirrors half of the pictures, warps and degrades all of them, and moves the objects along."""
    maps, fields = draw_warps(len(images), generator=generator)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    maps[mirrored, 0] *= -1
    images = degrade_pictures(warp_pictures(images, maps, fields), generator=generator)
    moved = []
    for scene, affine in zip(scenes, maps, strict=True):
        points = torch.tensor([[placed.x, placed.y] for placed in scene]).reshape(-1, 2)
        places = warp_points(points, affine).tolist()
        moved.append([replace(o, x=x, y=y) for o, (x, y) in zip(scene, places, strict=True)])
    return images, moved


def validate(judge: SceneJudge, scenes: RealScenes) -> dict[str, float]:
    """Says which share of facts and of prompts is found, and of false captions refused."""
    figures = judge_figures(judge, scenes)
    return {name: figures[name] for name in ("facts_right", "all_right", "gold", "refused")}


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates and saves."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(arguments)
    output = Path(options.output)

    # Seed and accelerator.
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    set_seed(options.seed)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output)),
    )
    output.mkdir(parents=True, exist_ok=True)
    if options.report_to != "none":
        accelerator.init_trackers("logs", config=asdict(options))

    # Data.
    data = take_half(open_split(options, options.split), options.half)
    scenes = read_scenes(data)
    blanks = None
    if options.blank_split and options.blank_share > 0:
        blanks = take_blanks(take_half(open_split(options, options.blank_split), options.half))
    rounds = send_round(data, options, accelerator.device)
    held_out = None
    if options.validation_split:
        unseen = open_split(options, options.validation_split)
        held_out = RealScenes.from_split(unseen, options.num_validation_images)
    size = options.train_batch_size
    num_blank = round(options.blank_share * size) if blanks is not None else 0
    num_rounds = round(options.round_trip_share * size) if rounds is not None else 0
    num_own = size - num_blank - num_rounds

    # Models.
    judge = SceneJudge(sample_size=options.resolution)
    if options.init_from:
        judge = SceneJudge.from_pretrained(options.init_from)
        judge.register_to_config(_name_or_path="")  # no path of this machine in what is saved
    judge = judge.float().to(memory_format=torch.channels_last)
    vocabulary = {"nouns": judge.config.nouns, "colours": judge.config.colours}
    grid = judge.config.sample_size // 4
    trained = list(judge.parameters())
    ema = EMAModel(trained, decay=options.ema_decay)
    logger.info("%.3f M parameters are trained", sum(p.numel() for p in trained) / 1e6)

    # Optimiser.
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, weight_decay=options.weight_decay
    )
    model, optimizer = accelerator.prepare(judge, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    # Loop.
    stop = StopRequest()
    step = load_checkpoint(accelerator, output, options.resume_from_checkpoint)
    share = (accelerator.process_index, accelerator.num_processes)
    batches = batch_indices(len(data), num_own * share[1], options.seed, step)
    progress = tqdm(total=options.max_train_steps, initial=step, desc="judge", mininterval=10)
    is_stopping = False
    while step < options.max_train_steps and not is_stopping:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step,
                options.learning_rate,
                options.warmup_steps,
                options.decay_steps,
                options.max_train_steps,
            )
        # What a step draws follows from the seed and the step, so that a resumed run goes on alike.
        rng = np.random.default_rng([options.seed, step, share[0]])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = next(batches)[share[0] :: share[1]]
        images, placed = [load_pictures(data, rows, options) / 2 + 0.5], [scenes[r] for r in rows]
        if num_rounds:
            drawn = rng.integers(len(rounds[1]), size=num_rounds).tolist()
            images.append(rounds[0][drawn].float() / 255)
            placed += [scenes[rounds[1][place]] for place in drawn]
        if num_blank:
            drawn = rng.integers(len(blanks), size=num_blank).tolist()
            images.append(load_pictures(blanks, drawn, options) / 2 + 0.5)
            placed += [[] for _ in drawn]
        pixels, placed = retint(torch.cat(images), placed, options.retint_share, rng)
        pixels, placed = augment(pixels, placed, generator)
        targets = scene_targets(placed, grid=grid, **vocabulary)
        # Shapes in colours that no word names: only the noun is asked for.
        strange = torch.from_numpy(rng.random(len(pixels)) < options.swap_share)
        pixels[strange] = pixels[strange][:, rng.permutation(3).tolist()]
        targets.colour[strange] = -1
        with accelerator.autocast():
            said = model(pixels.to(accelerator.device, memory_format=torch.channels_last))
        parts = scene_loss(
            said.centre.float(),
            said.noun.float(),
            said.colour.float(),
            said.offset.float(),
            SceneTargets(*(target.to(accelerator.device) for target in targets)),
        )
        loss = torch.stack(list(parts.values())).sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained)
        step += 1
        is_stopping = stop.is_agreed(accelerator)
        progress.update()

        if step % 20 == 0:
            if not math.isfinite(loss.item()):
                raise ConfigError(f"the loss is {loss.item()} at step {step}; lower learning_rate")
            values = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
            accelerator.log(values, step=step)
            progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
        is_last = step == options.max_train_steps
        if held_out is not None and (is_last or step % options.validation_steps == 0):
            ema.store(trained)
            ema.copy_to(trained)
            figures = validate(judge.eval(), held_out)
            judge.train()
            ema.restore(trained)
            accelerator.log(figures, step=step)
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            logger.info("step %d: loss %.3f, %s", step, loss.item(), text)
        if is_last or is_stopping or step % options.checkpointing_steps == 0:
            save_checkpoint(accelerator, output, step, options.checkpoints_total_limit)
    progress.close()

    # Save.
    if is_stopping and step < options.max_train_steps:
        logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
    ema.copy_to(trained)
    if accelerator.is_main_process:
        judge.half().to(memory_format=torch.contiguous_format)
        judge.save_pretrained(output / "judge")
        logger.info("saved %s", output / "judge")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"train_judge: {error}")

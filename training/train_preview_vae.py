r"""Distils an `AutoencoderTiny` from a finished `AutoencoderKL`: previews at a fifth of the cost.

A search decodes unfinished samples all the time, so it wants a decoder that is cheap, and right on
latents that are no picture yet. The small one learns to decode what the large one decodes, from
latents of real pictures, of which a share is blended and blurred as denoised estimates are; and to
encode to the same, scaled latents. Like other tiny autoencoders it takes latents as the UNet sees
them (its own scaling factor is one)::

    accelerate launch training/train_preview_vae.py --vae runs/vae/vae --output runs/preview_vae

With 3,000 steps of 16, some ten minutes on one core, it comes to within 3 dB of what it copies.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import Dataset, DatasetDict, load_from_disk
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import HfArgumentParser

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.losses import AutoencoderWeights, autoencoder_loss, psnr

logger = logging.getLogger("train_preview_vae")


@dataclass
class Options:
    """What to train, on what, and for how long."""

    output: str = field(
        default="runs/preview_vae", metadata={"help": "folder for checkpoints and weights"}
    )
    vae: str = field(
        default="runs/vae/vae", metadata={"help": "folder of the finished AutoencoderKL"}
    )
    dataset: str = field(
        default="data/emoji", metadata={"help": "a folder that datasets.load_from_disk opens"}
    )
    split: str = field(default="scenes", metadata={"help": "the split to train on"})
    extra_split: str = field(
        default="singles", metadata={"help": "a second split to mix in; '' for none"}
    )
    extra_share: float = field(
        default=0.4, metadata={"help": "the share of a batch that comes from the second split"}
    )
    validation_split: str = field(
        default="unseen_emoji", metadata={"help": "the split whose PSNR is reported; '' for none"}
    )
    image_column: str = field(default="image", metadata={"help": "the column of pictures"})
    resolution: int = field(default=64, metadata={"help": "side to which pictures are brought"})
    init_from: str = field(
        default="", metadata={"help": "a folder of AutoencoderTiny weights to begin with"}
    )
    width: int = field(default=16, metadata={"help": "channels of every layer"})
    decoder_blocks: str = field(
        default="3,2,0", metadata={"help": "blocks of the decoder at each side, coarse to fine"}
    )
    blended_share: float = field(
        default=0.5, metadata={"help": "share of latents blended with others, or blurred"}
    )
    max_train_steps: int = field(default=3000, metadata={"help": "optimiser steps in all"})
    train_batch_size: int = field(default=16, metadata={"help": "pictures a step and process"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "passes that share one optimiser step"}
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "of AdamW, after the warm-up"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of rising learning rate"})
    decay_steps: int = field(
        default=800, metadata={"help": "last steps, over which the learning rate falls to zero"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "bound of the gradient's norm"})
    ema_decay: float = field(default=0.998, metadata={"help": "of the averaged weights"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data order and blending"})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, fp16 or bf16, where the device has it"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "a tracker, or 'none'"})
    validation_steps: int = field(default=500, metadata={"help": "steps between validations"})
    num_validation_images: int = field(default=200, metadata={"help": "pictures a validation"})
    checkpointing_steps: int = field(default=500, metadata={"help": "steps between checkpoints"})
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


class Preview(torch.nn.Module):
    """Both directions of the small autoencoder as one call, so that processes share gradients."""

    def __init__(self, tiny: AutoencoderTiny) -> None:
        super().__init__()
        self.tiny = tiny

    def forward(
        self, images: torch.Tensor, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the latents of the pictures and the pictures of the latents."""
        return self.tiny.encode(images).latents, self.tiny.decode(latents).sample


def blend(latents: torch.Tensor, share: float) -> torch.Tensor:
    """Turns a share of latents into such as a denoiser guesses halfway.

    Half of that share is mixed with another picture's latents by a weight drawn evenly, the other
    half is blurred over 3x3; both get a little noise.
    """
    column = (len(latents), 1, 1, 1)
    weight = torch.rand(column, device=latents.device)
    mixed = latents + weight * (latents.roll(1, 0) - latents)
    blurred = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    changed = torch.where(torch.rand(column, device=latents.device) < 0.5, mixed, blurred)
    changed = changed + 0.1 * torch.rand(column, device=latents.device) * torch.randn_like(latents)
    return torch.where(torch.rand(column, device=latents.device) < share, changed, latents)


@torch.no_grad()
def validate(
    tiny: AutoencoderTiny, vae: AutoencoderKL, data: Dataset, num_images: int, options: Options
) -> tuple[dict[str, float], Any]:
    """Decodes latents of unseen pictures both ways.

    Returns:
        The mean PSNR in dB of the previews against the pictures and against the full decode, and
        a sheet of 16 pictures, their full decodes and their previews.
    """
    device = next(vae.parameters()).device
    figures: dict[str, list[torch.Tensor]] = {"psnr": [], "psnr_to_full": []}
    sheet = np.zeros((0, 0, 3), np.uint8)
    for first in range(0, min(num_images, len(data)), 50):
        rows = list(range(first, min(first + 50, num_images, len(data))))
        images = load_pictures(data, rows, options).to(device)
        latents = vae.encode(images).latent_dist.mean
        full = vae.decode(latents).sample.clamp(-1, 1)
        made = tiny.decode(latents * vae.config.scaling_factor).sample
        figures["psnr"].append(psnr(made, images).cpu())
        figures["psnr_to_full"].append(psnr(made, full).cpu())
        if first == 0:
            rows_of_three = torch.stack([images[:16], full[:16], made[:16].clamp(-1, 1)])
            grid = rows_of_three.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
            sheet = ((grid + 1) * 127.5).round().byte().cpu().numpy()
    return {name: torch.cat(values).mean().item() for name, values in figures.items()}, sheet


@torch.no_grad()
def decode_flops(autoencoder: Any, latents: torch.Tensor) -> int:
    """Counts the floating point operations of one decode."""
    with FlopCounterMode(display=False) as counter:
        autoencoder.decode(latents)
    return int(counter.get_total_flops())


@torch.no_grad()
def decode_seconds(autoencoder: Any, latents: torch.Tensor) -> float:
    """Times one decode: the least of ten, which other work on the machine disturbs least."""
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        autoencoder.decode(latents).sample.cpu()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def save_preview(tiny: AutoencoderTiny, folder: Path) -> None:
    """Saves weights and config, without the derived entry of which the stock loader warns."""
    tiny.to(memory_format=torch.contiguous_format).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    del config["block_out_channels"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def make_preview(options: Options, vae: AutoencoderKL) -> AutoencoderTiny:
    """Makes a fresh small autoencoder for the same latents, or loads the one to begin with."""
    if options.init_from:
        return AutoencoderTiny.from_pretrained(options.init_from).float()
    num_sides = len(vae.config.block_out_channels)
    blocks = tuple(int(number) for number in options.decoder_blocks.split(","))
    if len(blocks) != num_sides:
        raise ConfigError(
            f"decoder_blocks={options.decoder_blocks!r} has {len(blocks)} numbers, but the "
            f"autoencoder has {num_sides} sides; name one number a side"
        )
    return AutoencoderTiny(
        encoder_block_out_channels=(options.width,) * num_sides,
        decoder_block_out_channels=(options.width,) * num_sides,
        num_encoder_blocks=(1,) * num_sides,
        num_decoder_blocks=blocks,
        latent_channels=vae.config.latent_channels,
    )


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
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(output), logging_dir=str(output / "logs")
        ),
    )
    output.mkdir(parents=True, exist_ok=True)
    if options.report_to != "none":
        accelerator.init_trackers("preview_vae", config=asdict(options))

    # Models.
    if not Path(options.vae).is_dir():
        raise ConfigError(f"vae={options.vae!r} is no folder; training/train_vae.py makes one")
    vae = AutoencoderKL.from_pretrained(options.vae).float()
    vae.requires_grad_(False).eval().to(accelerator.device, memory_format=torch.channels_last)
    scaling = vae.config.scaling_factor
    tiny = make_preview(options, vae).to(memory_format=torch.channels_last)
    trained = list(tiny.parameters())

    # Data.
    data = open_split(options, options.split)
    extra = open_split(options, options.extra_split) if options.extra_split else None
    unseen = open_split(options, options.validation_split) if options.validation_split else None
    num_extra = round(options.extra_share * options.train_batch_size) if extra is not None else 0

    # Optimiser.
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, betas=(0.9, 0.99))
    model, optimizer = accelerator.prepare(Preview(tiny), optimizer)
    ema = EMAModel(trained, decay=options.ema_decay)
    accelerator.register_for_checkpointing(ema)
    weights = AutoencoderWeights(log_error=0.05)

    # Loop. Each process blends by itself.
    set_seed(options.seed, device_specific=True)
    stop = StopRequest()
    step = load_checkpoint(accelerator, output, options.resume_from_checkpoint)
    passes = options.gradient_accumulation_steps
    share = (accelerator.process_index, accelerator.num_processes)
    size = options.train_batch_size * share[1]
    batches = batch_indices(len(data), size - num_extra * share[1], options.seed, step * passes)
    extras = (
        batch_indices(len(extra), num_extra * share[1], options.seed + 1, step * passes)
        if extra is not None and num_extra
        else None
    )
    progress = tqdm(
        total=options.max_train_steps,
        initial=step,
        desc="preview vae",
        mininterval=10,
        disable=not accelerator.is_main_process,
    )
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
        for _ in range(passes):
            images = load_pictures(data, next(batches)[share[0] :: share[1]], options)
            if extra is not None and extras is not None:
                rows = next(extras)[share[0] :: share[1]]
                images = torch.cat([images, load_pictures(extra, rows, options)])
            images = images.to(accelerator.device, memory_format=torch.channels_last)
            with torch.no_grad():
                clean = vae.encode(images).latent_dist.mean
                latents = blend(clean * scaling, options.blended_share)
                target = vae.decode(latents / scaling).sample.clamp(-1, 1)
            with accelerator.accumulate(model), accelerator.autocast():
                encoded, decoded = model(images, latents)
                loss, terms = autoencoder_loss(decoded, target, weights=weights)
                terms["latents"] = (encoded - clean * scaling).square().mean()
                loss = loss + 0.1 * terms["latents"]
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        ema.step(trained)
        step += 1
        progress.update()
        is_stopping = stop.is_agreed(accelerator)

        if step % 20 == 0:
            if not math.isfinite(loss.item()):
                raise ConfigError(f"the loss is {loss.item()} at step {step}; lower learning_rate")
            values = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
            accelerator.log(values, step=step)
            progress.set_postfix(loss=f"{values['loss']:.4f}", l1=f"{values['l1']:.4f}")
        is_last = step == options.max_train_steps
        if unseen is not None and (is_last or step % options.validation_steps == 0):
            ema.store(trained)
            ema.copy_to(trained)
            num_images = len(unseen) if is_last else options.num_validation_images
            figures, sheet = validate(tiny, vae, unseen, num_images, options)
            ema.restore(trained)
            logger.info(
                "step %d: PSNR %.2f dB on %s, %.2f dB to the full decode",
                step,
                figures["psnr"],
                options.validation_split,
                figures["psnr_to_full"],
            )
            accelerator.log(figures, step=step)
            if accelerator.is_main_process:
                Image.fromarray(sheet).save(output / f"previews-{step}.png")
        if is_last or is_stopping or step % options.checkpointing_steps == 0:
            save_checkpoint(accelerator, output, step, options.checkpoints_total_limit)
    progress.close()

    # Save.
    if is_stopping and step < options.max_train_steps:
        logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
    ema.copy_to(trained)
    if accelerator.is_main_process:
        operations = decode_flops(tiny, clean[:1]) / decode_flops(vae, clean[:1])
        seconds = decode_seconds(tiny, clean[:8]) / decode_seconds(vae, clean[:8])
        logger.info(
            "a preview costs %.3f of a full decode in operations, %.3f in seconds",
            operations,
            seconds,
        )
        save_preview(tiny, output / "preview_vae")
        logger.info("saved %s", output / "preview_vae")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"train_preview_vae: {error}")

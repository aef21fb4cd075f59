r"""Trains the `AutoencoderKL` of the model in the box: 64x64 pictures to 16x16x4 latents and back.

Learned from the single emoji of every style, and a share of scenes. Two runs make the model: one
for the whole, and one for the decoder alone, which leaves the latents as they are, so that the
UNet may learn from them meanwhile::

    accelerate launch training/train_vae.py --output runs/vae
    accelerate launch training/train_vae.py --output runs/vae-decoder \
        --init_from runs/vae/vae --train_encoder false

The first takes about half an hour on two cores (3,600 steps of 16); the model card has its
figures. Progress goes to tensorboard, pictures and checkpoints to the output folder.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
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
from mctd_diffusers.models.losses import AutoencoderWeights, autoencoder_loss, psnr

logger = logging.getLogger("train_vae")


@dataclass
class Options:
    """What to train, on what, and for how long."""

    output: str = field(default="runs/vae", metadata={"help": "folder for checkpoints and weights"})
    dataset: str = field(
        default="data/emoji", metadata={"help": "a folder that datasets.load_from_disk opens"}
    )
    split: str = field(default="singles", metadata={"help": "the split to train on"})
    extra_split: str = field(
        default="scenes", metadata={"help": "a second split to mix in; '' for none"}
    )
    extra_share: float = field(
        default=0.25, metadata={"help": "the share of a batch that comes from the second split"}
    )
    validation_split: str = field(
        default="unseen_emoji", metadata={"help": "the split whose PSNR is reported; '' for none"}
    )
    image_column: str = field(default="image", metadata={"help": "the column of pictures"})
    resolution: int = field(default=64, metadata={"help": "side to which pictures are brought"})
    init_from: str = field(
        default="", metadata={"help": "a folder of AutoencoderKL weights to begin with"}
    )
    train_encoder: bool = field(
        default=True, metadata={"help": "false: train the decoder alone and keep the latents"}
    )
    block_out_channels: str = field(
        default="16,32,64", metadata={"help": "widths from fine to coarse; each halves the side"}
    )
    norm_num_groups: int = field(default=8, metadata={"help": "groups of the group norms"})
    latent_channels: int = field(default=4, metadata={"help": "channels of a latent"})
    max_train_steps: int = field(default=3600, metadata={"help": "optimiser steps in all"})
    train_batch_size: int = field(default=8, metadata={"help": "pictures a step and process"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "passes that share one optimiser step"}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "of AdamW, after the warm-up"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of rising learning rate"})
    decay_steps: int = field(
        default=900, metadata={"help": "last steps, over which the learning rate falls to zero"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "bound of the gradient's norm"})
    ema_decay: float = field(default=0.998, metadata={"help": "of the averaged weights"})
    kl_weight: float = field(default=5e-4, metadata={"help": "weight of the KL term"})
    log_error_weight: float = field(default=0.05, metadata={"help": "weight of the log error"})
    halved_share: float = field(
        default=0.2,
        metadata={
            "help": "share of steps that decode halved latents to the halved picture, which makes "
            "latents smooth (EQ-VAE) and so easier to diffuse; none with a fixed encoder"
        },
    )
    flip: bool = field(default=True, metadata={"help": "mirror half of the pictures"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data order and noise"})
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


class Reconstruction(torch.nn.Module):
    """The autoencoder as one call, so that several processes share its gradients."""

    def __init__(self, vae: AutoencoderKL, train_encoder: bool) -> None:
        super().__init__()
        self.vae = vae
        self.train_encoder = train_encoder

    def forward(
        self, images: torch.Tensor, is_halved: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns the reconstruction, and the latents' mean and log variance where they learn."""
        mean, logvar = None, None
        if self.train_encoder:
            latents = self.vae.encode(images).latent_dist
            sample, mean, logvar = latents.sample(), latents.mean, latents.logvar
        else:
            with torch.no_grad():
                sample = self.vae.encode(images).latent_dist.mean
        if is_halved:
            sample = torch.nn.functional.avg_pool2d(sample, 2)
        return self.vae.decode(sample).sample, mean, logvar


@torch.no_grad()
def validate(vae: AutoencoderKL, data: Dataset, num_images: int, options: Options) -> Any:
    """Reconstructs pictures from the mean of their latents.

    Returns:
        The mean PSNR in dB, and a sheet of the first 16 pictures above their reconstructions.
    """
    vae.eval()
    device = next(vae.parameters()).device
    figures: list[torch.Tensor] = []
    sheet = np.zeros((0, 0, 3), np.uint8)
    for first in range(0, min(num_images, len(data)), 50):
        rows = list(range(first, min(first + 50, num_images, len(data))))
        images = load_pictures(data, rows, options).to(device)
        made = vae.decode(vae.encode(images).latent_dist.mean).sample
        figures.append(psnr(made, images).cpu())
        if first == 0:
            both = torch.stack([images[:16], made[:16].clamp(-1, 1)])
            grid = both.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
            sheet = ((grid + 1) * 127.5).round().byte().cpu().numpy()
    vae.train()
    return torch.cat(figures).mean().item(), sheet


@torch.no_grad()
def latent_std(vae: AutoencoderKL, data: Dataset, options: Options) -> float:
    """Measures the standard deviation of latents over up to 500 training pictures."""
    device = next(vae.parameters()).device
    rows = np.random.default_rng(0).permutation(len(data))[:500].tolist()
    latents = [
        vae.encode(
            load_pictures(data, rows[first : first + 50], options).to(device)
        ).latent_dist.mean.cpu()
        for first in range(0, len(rows), 50)
    ]
    return torch.cat(latents).std().item()


def make_autoencoder(options: Options) -> AutoencoderKL:
    """Makes a fresh autoencoder, or loads the one to begin with."""
    if options.init_from:
        return AutoencoderKL.from_pretrained(options.init_from)
    widths = tuple(int(width) for width in options.block_out_channels.split(","))
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=options.latent_channels,
        norm_num_groups=options.norm_num_groups,
        sample_size=options.resolution,
        mid_block_add_attention=False,
        force_upcast=False,
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
        accelerator.init_trackers("vae", config=asdict(options))

    # Models.
    vae = make_autoencoder(options).to(memory_format=torch.channels_last)
    if not options.train_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    logger.info("%.3f M parameters are trained", sum(p.numel() for p in trained) / 1e6)

    # Data.
    data = open_split(options, options.split)
    extra = open_split(options, options.extra_split) if options.extra_split else None
    unseen = open_split(options, options.validation_split) if options.validation_split else None
    num_extra = round(options.extra_share * options.train_batch_size) if extra is not None else 0

    # Optimiser.
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, betas=(0.9, 0.99))
    model = Reconstruction(vae, options.train_encoder)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(trained, decay=options.ema_decay)
    accelerator.register_for_checkpointing(ema)
    weights = AutoencoderWeights(kl=options.kl_weight, log_error=options.log_error_weight)

    # Loop. Each process has noise of its own.
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
        desc="vae",
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
        chance = np.random.default_rng([options.seed, step]).random()
        is_halved = options.train_encoder and chance < options.halved_share
        for _ in range(passes):
            images = load_pictures(data, next(batches)[share[0] :: share[1]], options)
            if extra is not None and extras is not None:
                rows = next(extras)[share[0] :: share[1]]
                images = torch.cat([images, load_pictures(extra, rows, options)])
            images = images.to(accelerator.device, memory_format=torch.channels_last)
            if options.flip:
                images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
            with accelerator.accumulate(model), accelerator.autocast():
                reconstruction, mean, logvar = model(images, is_halved)
                if is_halved:
                    images = torch.nn.functional.avg_pool2d(images, 2)
                loss, terms = autoencoder_loss(reconstruction, images, mean, logvar, weights)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        ema.step(trained)
        step += 1
        progress.update()
        is_stopping = stop.is_agreed(accelerator)

        if not is_halved and step % 20 < 2:
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
            decibels, sheet = validate(vae, unseen, num_images, options)
            ema.restore(trained)
            logger.info("step %d: PSNR %.2f dB on %s", step, decibels, options.validation_split)
            accelerator.log({"psnr": decibels}, step=step)
            if accelerator.is_main_process:
                Image.fromarray(sheet).save(output / f"reconstructions-{step}.png")
        if is_last or is_stopping or step % options.checkpointing_steps == 0:
            save_checkpoint(accelerator, output, step, options.checkpoints_total_limit)
    progress.close()

    # Save.
    if is_stopping and step < options.max_train_steps:
        logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
    ema.copy_to(trained)
    if options.train_encoder:
        measured = latent_std(vae, data if extra is None else extra, options)
        vae.register_to_config(scaling_factor=1 / measured)
    if accelerator.is_main_process:
        vae.to(memory_format=torch.contiguous_format).save_pretrained(output / "vae")
        logger.info("saved %s", output / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"train_vae: {error}")

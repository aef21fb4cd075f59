r"""Trains a feature decoder: a network that turns maps of a UNet's features back to latents.

From the map of one block, which the frozen UNet computes at states of a log of trajectories, and
the noise level, it learns the denoised estimate that the log holds: guided, and at the noise level
of the state, as fusing needs it. The finished latents would teach the same mean with more noise, as
an estimate is their mean given the state. ::

    mctd log-trajectories --prompts prompts.txt --trajectories 1024 --schedulers DDIM:eta=1 \
        --strides 1 --probes 0 --output data/trajectories
    accelerate launch training/train_feature_decoder.py --log data/trajectories \
        --output runs/feature_decoder

Half a second a step of 32 states of the model in the box on one CPU core, half of which the UNet
takes. The output folder is what `FeatureToLatent.from_pretrained` loads; its card has the errors on
prompts that it was not trained on.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
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
from diffusers.training_utils import EMAModel
from tqdm import tqdm
from transformers import HfArgumentParser

from mctd_diffusers import EMBEDDED_MODEL, MCTDPipeline
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.reconstruction import (
    LevelErrors,
    errors_table,
    mean_estimates,
    reconstruction_errors,
)
from mctd_diffusers.files import write_text
from mctd_diffusers.hub import card_text
from mctd_diffusers.models.feature_decoder import FeatureToLatent
from mctd_diffusers.trajectories.dataset import LatentStates, read_latent_states
from mctd_diffusers.trajectories.feature_examples import MapReader

logger = logging.getLogger("train_feature_decoder")


@dataclass
class Options:
    """What to train, on what, and for how long."""

    log: str = field(
        default="data/trajectories", metadata={"help": "folder that mctd log-trajectories wrote"}
    )
    model: str = field(
        default="embedded", metadata={"help": "folder or repository of the model that it is of"}
    )
    output: str = field(
        default="runs/feature_decoder", metadata={"help": "folder for the decoder and its card"}
    )
    block: str = field(
        default="up.2", metadata={"help": "block whose map is read; the last ones keep most detail"}
    )
    train_split: str = field(default="train", metadata={"help": "the split to train on"})
    held_out_share: float = field(
        default=0.1,
        metadata={"help": "share of its prompts that is held out, where there is no other split"},
    )
    init_from: str = field(default="", metadata={"help": "a feature decoder to begin with"})
    base_model: str = field(default="", metadata={"help": "the model's repository, for the card"})
    hidden_size: int = field(default=64, metadata={"help": "channels inside"})
    num_layers: int = field(default=2, metadata={"help": "residual layers"})
    states_for_norm: int = field(
        default=256, metadata={"help": "states that say what features usually are"}
    )
    train_batch_size: int = field(default=32, metadata={"help": "states a step"})
    max_train_steps: int = field(default=2000, metadata={"help": "optimiser steps"})
    learning_rate: float = field(default=2e-3, metadata={"help": "of AdamW, after the warm-up"})
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW, for matrices"})
    warmup_steps: int = field(default=50, metadata={"help": "steps of rising learning rate"})
    decay_steps: int = field(
        default=1000, metadata={"help": "last steps, over which the learning rate falls to zero"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "bound of the gradient's norm"})
    ema_decay: float = field(default=0.99, metadata={"help": "of the averaged weights"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data order and split"})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, fp16 or bf16, where the device has it"}
    )
    report_to: str = field(default="none", metadata={"help": "a tracker, or 'none'"})
    validation_steps: int = field(default=250, metadata={"help": "steps between validations"})
    validation_states: int = field(default=256, metadata={"help": "held-out states of one"})
    checkpointing_steps: int = field(default=250, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "checkpoints kept"})
    resume_from_checkpoint: str = field(
        default="", metadata={"help": "a checkpoint folder, or 'latest' of the output folder"}
    )
    half_precision: bool = field(
        default=False, metadata={"help": "save the weights in half precision"}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "push the decoder and its card"})
    hub_model_id: str = field(
        default="", metadata={"help": "repository to push to; the output folder's name if ''"}
    )
    hub_private: bool = field(default=False, metadata={"help": "whether a new one is private"})
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


def num_states(states: LatentStates) -> int:
    """Rows of the columns."""
    return len(states.log_snr)


def split_states(
    splits: dict[str, LatentStates], train: str, held_out_share: float, seed: int
) -> tuple[LatentStates, dict[str, LatentStates]]:
    """Divides a log by prompt: what to learn from, and what is held out, by split.

    Raises:
        ConfigError: there is no such split, prompts are in several, or there are too few.
    """
    if train not in splits:
        raise ConfigError(f"train_split={train!r} is no split of the log, only {sorted(splits)}")
    others = {name: split for name, split in splits.items() if name != train}
    prompts = np.unique(splits[train].prompt)
    for name, split in others.items():
        shared = np.intersect1d(prompts, split.prompt)
        if len(shared):
            raise ConfigError(
                f"{len(shared)} prompts of split {name!r} are in {train!r} too, such as "
                f"{str(shared[0])!r}: log it with other prompts"
            )
    if others:
        return splits[train], others
    count = max(1, round(held_out_share * len(prompts)))
    if count >= len(prompts):
        raise ConfigError(
            f"held_out_share={held_out_share} of {len(prompts)} prompts leaves none to learn from: "
            "log more, or lower it"
        )
    held_out = np.random.default_rng(seed).permutation(prompts)[:count]
    is_held_out = np.isin(splits[train].prompt, held_out)
    whole = splits[train]
    return whole.take(~is_held_out), {"held_out": whole.take(is_held_out)}


def factors(log_snr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of signal and noise whose squares add up to 1."""
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def make_decoder(
    pipe: MCTDPipeline, maps: MapReader, train: LatentStates, options: Options
) -> FeatureToLatent:
    """Makes a decoder for what the block computes, or loads one to go on with.

    Raises:
        ConfigError: the one to go on with reads other features; or the latents are not a power of
            2 times as large as the map.
    """
    rng = np.random.default_rng([options.seed, len(train.log_snr)])
    count = min(options.states_for_norm, len(train.log_snr))
    rows = rng.permutation(len(train.log_snr))[:count]
    features = torch.cat(
        [maps(train, part) for part in np.array_split(rows, -(-count // options.train_batch_size))]
    )
    if options.init_from:
        begun = FeatureToLatent.from_pretrained(options.init_from)
        begun.check_family(pipe.stock_class.__name__)
        begun.check_features(features)
        begun.train()
        return begun
    decoder = FeatureToLatent(
        pipe.stock_class.__name__,
        options.block,
        features.shape[1],
        latent_channels=train.latents.shape[1],
        scale_factor=train.latents.shape[-1] // features.shape[-1],
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        log_snr_range=[float(train.log_snr.min()), float(train.log_snr.max())],
        guidance_scales=np.unique(train.guidance_scale).tolist(),
    )
    denoised = torch.from_numpy(train.denoised[rows]).float()
    decoder.fit(features.cpu(), denoised, torch.from_numpy(train.log_snr[rows]))
    decoder.train()
    return decoder


@torch.no_grad()
def decode(
    decoder: FeatureToLatent, maps: MapReader, states: LatentStates, options: Options
) -> np.ndarray[Any, Any]:
    """Decodes the maps of states; the decoder's mode is left as it was."""
    was_training = decoder.training
    decoder.eval()
    device, count = decoder.first.weight.device, len(states.log_snr)
    parts = []
    for rows in np.array_split(np.arange(count), -(-count // options.train_batch_size)):
        signal, noise = factors(torch.from_numpy(states.log_snr[rows]).to(device))
        parts.append(decoder(maps(states, rows), signal, noise).float().cpu().numpy())
    decoder.train(was_training)
    return np.concatenate(parts)


def some_of(states: LatentStates, count: int, seed: int) -> LatentStates:
    """So many states, the same ones each time; all of them if there are fewer."""
    rows = np.random.default_rng(seed).permutation(len(states.log_snr))[:count]
    return states.take(np.sort(rows))


def make_card(
    decoder: FeatureToLatent,
    errors: dict[str, list[LevelErrors]],
    counts: dict[str, tuple[int, int]],
    about: dict[str, Any],
) -> str:
    """Writes the model card."""
    config = decoder.config
    rows = "\n".join(
        f"| {name} | {states} | {prompts} |" for name, (states, prompts) in counts.items()
    )
    tables = "\n\n".join(f"## Errors on {name}\n\n{errors_table(errors[name])}" for name in errors)
    low, high = config["log_snr_range"]
    metadata = {
        "library_name": "diffusers",
        "base_model": about["base_model"] or None,
        "tags": ["diffusers", "mctd-diffusers", "feature-decoder"],
    }
    return card_text(
        metadata,
        f"""# Feature decoder for {config["family"]}

Maps features of block `{decoder.block}` of the UNet ({config["feature_channels"]} channels, with
{config["scale_factor"]} x {config["scale_factor"]} latents to each place) at any noise level to the
guided denoised estimate, so that samples can be fused in the space of features.

```python
from mctd_diffusers import FeatureToLatent

decoder = FeatureToLatent.from_pretrained("path or repository")
```

{decoder.num_parameters():,} parameters, trained for {about["steps"]} steps by

```bash
{about["command"]}
```

on states of log-SNR from {low:.2f} to {high:.2f}, under guidance
{", ".join(map(str, config["guidance_scales"]))}.

| split | states | prompts |
| --- | --- | --- |
{rows}

No prompt of train is in another split.

{tables}

Errors are root mean square over all numbers of the latents, at states whose share of signal,
`alpha^2 / (alpha^2 + sigma^2)`, lies between the two. *Mean estimate*: that of the training split
between the same two. *Other sample*: the estimate of a state there of another prompt. *Explained*:
share of the variance around the mean estimate.
""",
    )


def push(options: Options) -> None:
    """Pushes the saved decoder with its card."""
    name = options.hub_model_id or Path(options.output).resolve().name
    saved = FeatureToLatent.from_pretrained(options.output)
    commit = saved.push_to_hub(name, private=options.hub_private or None)
    logger.info("pushed to %s", commit)


def main(arguments: list[str] | None = None) -> None:
    """Trains, measures and saves."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["accelerate", "launch", "training/train_feature_decoder.py", *given])
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

    # Data, and the frozen model that computes features of it.
    folder = EMBEDDED_MODEL if options.model == "embedded" else options.model
    pipe = MCTDPipeline.from_pretrained(folder).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    splits = read_latent_states(options.log, pipe.scheduler.config)
    train, held_out = split_states(
        splits, options.train_split, options.held_out_share, options.seed
    )
    prompts = np.unique(np.concatenate([split.prompt for split in splits.values()]))
    maps = MapReader(pipe, options.block, prompts.tolist())
    first = next(iter(held_out.values()))
    validation = some_of(first, options.validation_states, options.seed)
    logger.info(
        "%d states, %d of them held out", sum(map(num_states, splits.values())), num_states(first)
    )

    # Models.
    set_seed(options.seed)
    decoder = make_decoder(pipe, maps, train, options)
    output.mkdir(parents=True, exist_ok=True)
    if options.report_to != "none":
        accelerator.init_trackers("logs", config=asdict(options))
    trained = list(decoder.parameters())
    ema = EMAModel(trained, decay=options.ema_decay)
    logger.info("%.3f M parameters are trained", sum(p.numel() for p in trained) / 1e6)

    # Optimiser.
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in trained if p.ndim > 1],
                "weight_decay": options.weight_decay,
            },
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
    )
    learner, optimizer = accelerator.prepare(decoder, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    # Loop.
    stop = StopRequest()
    step = load_checkpoint(accelerator, output, options.resume_from_checkpoint)
    process, processes = accelerator.process_index, accelerator.num_processes
    size = options.train_batch_size * processes
    batches = batch_indices(num_states(train), size, options.seed, step)
    progress = tqdm(total=options.max_train_steps, initial=step, desc="decoder", mininterval=10)
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
        rows = np.array(next(batches)[process::processes])
        log_snr = torch.from_numpy(train.log_snr[rows]).to(accelerator.device)
        features = maps(train, rows)
        target = torch.from_numpy(train.denoised[rows]).float().to(accelerator.device)
        with accelerator.autocast():
            decoded = learner(features, *factors(log_snr))
        # In units of what estimates vary by at their level, or the noisiest would drown the rest.
        loss = ((decoded.float() - target) / decoder.deviation(log_snr)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(learner.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained)
        step += 1
        is_stopping = stop.is_agreed(accelerator)
        progress.update()

        if step % 20 == 0:
            if not math.isfinite(loss.item()):
                raise ConfigError(f"the loss is {loss.item()} at step {step}; lower learning_rate")
            accelerator.log({"loss": loss.item()}, step=step)
            progress.set_postfix(loss=f"{loss.item():.3f}")
        is_last = step == options.max_train_steps
        if not is_last and step % options.validation_steps == 0:
            ema.store(trained)
            ema.copy_to(trained)
            guessed = decode(decoder, maps, validation, options)
            ema.restore(trained)
            error = float(np.sqrt(np.square(guessed - validation.denoised).mean()))
            accelerator.log({"validation/error": error}, step=step)
            logger.info("step %d: loss %.4f, held-out error %.4f", step, loss.item(), error)
        if is_last or is_stopping or step % options.checkpointing_steps == 0:
            save_checkpoint(accelerator, output, step, options.checkpoints_total_limit)
    progress.close()

    # Save.
    if is_stopping and step < options.max_train_steps:
        logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
    elif accelerator.is_main_process:
        ema.copy_to(trained)
        means = mean_estimates(train.denoised, train.log_snr)
        errors = {
            name: reconstruction_errors(
                decode(decoder, maps, split, options),
                split.denoised,
                split.log_snr,
                split.prompt.tolist(),
                means,
            )
            for name, split in held_out.items()
        }
        for name, measured in errors.items():
            logger.info("errors on %s\n%s", name, errors_table(measured))
        about = {"command": command, "steps": step, "base_model": options.base_model}
        counts = {
            name: (num_states(split), len(np.unique(split.prompt)))
            for name, split in {"train": train, **held_out}.items()
        }
        decoder.register_to_config(_name_or_path="")  # no path of this machine in what is saved
        card = make_card(decoder, errors, counts, about)
        (decoder.half() if options.half_precision else decoder).save_pretrained(output)
        rows_of = {name: [one._asdict() for one in found] for name, found in errors.items()}
        write_text(output / "figures.json", json.dumps(rows_of, indent=1) + "\n")
        write_text(output / "README.md", card)
        logger.info("saved %s", output)
        if options.push_to_hub:
            push(options)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"train_feature_decoder: {error}")

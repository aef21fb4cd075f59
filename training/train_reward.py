r"""Trains the reward in the box: a small CLIPModel, with tokenizer and preprocessing in one folder.

It learns from one half of the pictures (column ``half``) to tell the caption of a picture from
others: those of the batch, of which half are scenes of the same kind about the same noun, and
captions that are wrong in exactly one fact (another colour, number, noun or side; colours swapped),
since a reward that cannot tell two cats from three is of no use to a search for two. While it
trains, a second head names what each patch shows, which a small transformer would otherwise take
much longer to find out. Pictures are warped, blurred, tinted and grained, and a share of them went
through the autoencoder, because what will be scored are generated pictures. Coloured groups
change their colour at random, with the caption: the data holds out pairs of object and colour, and
a reward must not learn that these do not exist. ::

    accelerate launch training/train_reward.py --autoencoder mctd_diffusers/embedded/vae \
        --output runs/reward

About half a second a step of 64 pictures on one CPU core; sides are learned last. Each validation
prints how often the true caption of a held-out scene scores higher than one that is wrong in one
fact. Any data with pictures and captions will do: captions outside the grammar get no wrong twins,
and without a column ``objects`` there is no second head.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
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
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, HfArgumentParser

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.contradictions import contradict_each
from mctd_diffusers.evaluation.real_scenes import RealScenes, reward_figures
from mctd_diffusers.evaluation.scenes import COLOURS, OBJECTS, parse_prompt
from mctd_diffusers.models.augmentation import (
    TINTS,
    degrade_pictures,
    draw_warps,
    retint_object,
    warp_pictures,
    warp_points,
)
from mctd_diffusers.models.losses import contrastive_loss, patch_loss
from mctd_diffusers.rewards.clip import ClipReward, Preprocessing

logger = logging.getLogger("train_reward")

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass
class Options:
    """What to train, on what, and for how long."""

    output: str = field(
        default="runs/reward", metadata={"help": "folder for checkpoints and weights"}
    )
    dataset: str = field(
        default="data/emoji", metadata={"help": "a folder that datasets.load_from_disk opens"}
    )
    split: str = field(default="scenes", metadata={"help": "the split to train on"})
    extra_split: str = field(
        default="singles", metadata={"help": "a second split to mix in; '' for none"}
    )
    extra_share: float = field(
        default=0.1, metadata={"help": "the share of a batch that comes from the second split"}
    )
    validation_split: str = field(
        default="held_out_scenes", metadata={"help": "the split to validate on; '' for none"}
    )
    half: int = field(
        default=0, metadata={"help": "the value of column 'half' to learn from; -1 for all"}
    )
    image_column: str = field(default="image", metadata={"help": "the column of pictures"})
    caption_column: str = field(default="caption", metadata={"help": "the column of captions"})
    resolution: int = field(default=64, metadata={"help": "side to which pictures are brought"})
    init_from: str = field(default="", metadata={"help": "a ClipReward folder to begin with"})
    autoencoder: str = field(
        default="", metadata={"help": "an AutoencoderKL folder for round trips; '' for none"}
    )
    num_round_trips: int = field(default=4096, metadata={"help": "pictures sent round, once"})
    round_trip_share: float = field(
        default=0.25, metadata={"help": "the share of a batch that went round"}
    )
    neighbour_share: float = field(
        default=0.5, metadata={"help": "the share of the rest that is like another of the batch"}
    )
    retint_share: float = field(
        default=0.5, metadata={"help": "share of coloured groups that get another colour"}
    )
    false_captions: int = field(
        default=1, metadata={"help": "wrong captions a picture, for each kind of fact it states"}
    )
    patch_weight: float = field(default=0.5, metadata={"help": "weight of naming the patches"})
    hidden_size: int = field(default=128, metadata={"help": "width of both transformers"})
    vision_layers: int = field(default=4, metadata={"help": "layers of the picture's"})
    text_layers: int = field(default=3, metadata={"help": "layers of the text's"})
    patch_size: int = field(default=8, metadata={"help": "side of a patch, in pixels"})
    projection_dim: int = field(default=128, metadata={"help": "size of the shared embedding"})
    vocab_size: int = field(default=3000, metadata={"help": "most tokens of the vocabulary"})
    max_length: int = field(default=32, metadata={"help": "longest caption, in tokens"})
    max_train_steps: int = field(default=3000, metadata={"help": "optimiser steps in all"})
    train_batch_size: int = field(default=64, metadata={"help": "pictures a step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of AdamW, after the warm-up"})
    weight_decay: float = field(default=0.05, metadata={"help": "of AdamW, for matrices"})
    warmup_steps: int = field(default=150, metadata={"help": "steps of rising learning rate"})
    decay_steps: int = field(
        default=1500, metadata={"help": "last steps, over which the learning rate falls to zero"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "bound of the gradient's norm"})
    ema_decay: float = field(default=0.995, metadata={"help": "of the averaged weights"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data order and noise"})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, fp16 or bf16, where the device has it"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "a tracker, or 'none'"})
    validation_steps: int = field(default=500, metadata={"help": "steps between validations"})
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


def make_tokenizer(captions: Iterable[str], options: Options) -> CLIPTokenizer:
    """Learns byte pairs from captions; any text can be written with it, letter by letter.

    Every byte is a token, inside a word and at its end: an unknown one would be read as the end of
    the text. Bytes are numbered before anything is learned: the learner would number those that end
    a word in another order each time, break ties between pairs by it, and a resumed run would read
    other tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    learnt = CLIPTokenizer().train_new_from_iterator(
        [list(captions)], options.vocab_size, new_special_tokens=letters, show_progress=False
    )
    merges = json.loads(learnt.backend_tokenizer.to_str())["model"]["merges"]
    tokens = [START, END, *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    pairs = [tuple(pair) for pair in merges]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=options.max_length)


def make_reward(captions: Iterable[str], options: Options) -> ClipReward:
    """Makes a fresh reward, or loads the one to begin with."""
    if options.init_from:
        return ClipReward.from_pretrained(options.init_from)
    tokenizer = make_tokenizer(captions, options)
    width = options.hidden_size
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(width // 32, 1),
        "projection_dim": options.projection_dim,
    }
    text = {
        "num_hidden_layers": options.text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": options.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "num_hidden_layers": options.vision_layers,
        "image_size": options.resolution,
        "patch_size": options.patch_size,
    }
    config = CLIPConfig(
        text_config={**shared, **text},
        vision_config={**shared, **vision},
        projection_dim=options.projection_dim,
    )
    side = options.resolution
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(size=side, crop=(side, side), resample=3, mean=half, std=half)
    return ClipReward(CLIPModel(config), tokenizer, preprocessing)


class Learner(nn.Module):
    """The model with the heads that name patches while it trains."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.vision_config.hidden_size
        self.patch_norm = nn.LayerNorm(width)
        self.patch_head = nn.Linear(width, 1 + len(OBJECTS) + len(COLOURS) + 1)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Embeds pictures and captions, at unit length, and names nouns and colours of patches."""
        seen = self.clip.vision_model(pixel_values=pixels)
        read = self.clip.text_model(input_ids=tokens, attention_mask=mask)
        images = functional.normalize(self.clip.visual_projection(seen.pooler_output), dim=-1)
        texts = functional.normalize(self.clip.text_projection(read.pooler_output), dim=-1)
        patches = self.patch_head(self.patch_norm(seen.last_hidden_state[:, 1:]))
        nouns, colours = patches.split([1 + len(OBJECTS), len(COLOURS) + 1], dim=-1)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        return images, texts, nouns, colours, scale


@dataclass
class Examples:
    """A batch: pictures in [0, 1], their captions, and the objects in them."""

    images: Tensor
    captions: list[str]
    objects: list[list[dict[str, Any]]]


def read_examples(data: Dataset, rows: list[int], options: Options) -> Examples:
    """Reads rows of a split."""
    columns = data.select_columns(
        [name for name in (options.caption_column, "objects") if name in data.column_names]
    )[rows]
    texts = columns.get("objects", ["[]"] * len(rows))
    images = load_pictures(data, rows, options) / 2 + 0.5
    return Examples(images, columns[options.caption_column], [json.loads(text) for text in texts])


def neighbourhoods(captions: list[str]) -> tuple[list[int], list[np.ndarray]]:
    """Groups captions of one kind about the same first noun.

    Returns:
        The group of each caption, and the rows of each group. Captions outside the grammar make
        one group.
    """
    keys: dict[tuple[str, ...], int] = {}
    groups = []
    for caption in captions:
        try:
            prompt = parse_prompt(caption)
            key: tuple[str, ...] = (prompt.kind, prompt.items[0].noun)
        except ConfigError:
            key = ()
        groups.append(keys.setdefault(key, len(keys)))
    numbers = np.array(groups)
    return groups, [np.flatnonzero(numbers == group) for group in range(len(keys))]


def false_captions(captions: list[str], number: int, rng: np.random.Generator) -> list[str]:
    """Writes for each caption of the grammar some that are wrong in one fact, of every kind.

    Of every kind each time: left and right, or whose colour is whose, are learned late, and would
    hardly be asked for if the kind were drawn.
    """
    wrong = []
    for caption in captions:
        try:
            prompt = parse_prompt(caption)
        except ConfigError:
            continue
        for _ in range(number):
            wrong += [false.prompt.caption() for false in contradict_each(prompt, rng)]
    return wrong


def retint(examples: Examples, share: float, rng: np.random.Generator) -> Examples:
    """Gives a share of the coloured groups another colour, in the picture and in its caption.

    Every pair of words occurs then: the data holds some out, and a reward must not learn
    that there are no brown airplanes.
    """
    images, captions = list(examples.images), list(examples.captions)
    objects = [[dict(placed) for placed in scene] for scene in examples.objects]
    for row, scene in enumerate(objects):
        if not any(placed["colour"] for placed in scene):
            continue
        prompt = parse_prompt(captions[row])
        items = list(prompt.items)
        for place, item in enumerate(items):
            if item.colour is None or rng.random() >= share:
                continue
            taken = {other.colour for other in items}
            colour = str(rng.choice([tint for tint in TINTS if tint not in taken]))
            items[place] = replace(item, colour=colour)
            for placed in scene:
                if placed["noun"] == item.noun:
                    box = {name: placed[name] for name in ("x", "y", "size")}
                    images[row] = retint_object(images[row], **box, old=item.colour, new=colour)
                    placed["colour"] = colour
        captions[row] = replace(prompt, items=tuple(items)).caption()
    return Examples(torch.stack(images), captions, objects)


def patch_labels(
    objects: list[list[dict[str, Any]]], maps: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Says which noun (0: none) and colour (-1: none) each patch of the warped pictures shows."""
    middles = (torch.arange(side) + 0.5) / side
    nouns = torch.zeros(len(objects), side, side, dtype=torch.long)
    colours = torch.full((len(objects), side, side), -1)
    for row, (scene, affine) in enumerate(zip(objects, maps, strict=True)):
        for placed in scene:
            ((x, y),) = warp_points(torch.tensor([[placed["x"], placed["y"]]]), affine).tolist()
            reach = 0.4 * placed["size"]
            covered = ((middles - y).abs() < reach)[:, None] & ((middles - x).abs() < reach)
            nouns[row][covered] = 1 + OBJECTS.index(placed["noun"])
            tint = placed["colour"]
            colours[row][covered] = len(COLOURS) if tint is None else COLOURS.index(tint)
    return nouns.flatten(1), colours.flatten(1)


def validate(reward: ClipReward, scenes: RealScenes) -> dict[str, float]:
    """Says how often the true caption of a real picture scores higher than a false one."""
    figures = reward_figures(reward, scenes)
    return {
        "accuracy": figures["accuracy"],
        **{f"accuracy/{name}": value for name, value in figures["by_kind"].items()},
        **{f"accuracy/{name}": value for name, value in figures["by_change"].items()},
    }


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
    extra = None
    if options.extra_split and options.extra_share > 0:
        extra = take_half(open_split(options, options.extra_split), options.half)
    captions = list(data[options.caption_column])
    scenes = (
        [json.loads(text) for text in data["objects"]] if "objects" in data.column_names else []
    )
    groups, members = neighbourhoods(captions)
    rounds = send_round(data, options, accelerator.device)
    held_out = None
    if options.validation_split:
        unseen = open_split(options, options.validation_split)
        held_out = RealScenes.from_split(unseen, options.num_validation_images)
    size = options.train_batch_size
    num_extra = round(options.extra_share * size) if extra is not None else 0
    num_rounds = round(options.round_trip_share * size) if rounds is not None else 0
    num_like = round(options.neighbour_share * (size - num_extra - num_rounds))
    num_own = size - num_extra - num_rounds - num_like

    # Models.
    texts = [*captions, *(extra[options.caption_column] if extra is not None else [])]
    reward = make_reward(texts, options)
    learner = Learner(reward.model)
    trained = list(reward.model.parameters())
    ema = EMAModel(trained, decay=options.ema_decay)
    side = options.resolution // reward.model.config.vision_config.patch_size
    logger.info("%.3f M parameters are trained", sum(p.numel() for p in trained) / 1e6)

    # Optimiser.
    matrices = [p for p in learner.parameters() if p.ndim > 1]
    vectors = [p for p in learner.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
    )
    learner, optimizer = accelerator.prepare(learner, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    # Loop.
    stop = StopRequest()
    step = load_checkpoint(accelerator, output, options.resume_from_checkpoint)
    share = (accelerator.process_index, accelerator.num_processes)
    batches = batch_indices(len(data), num_own * share[1], options.seed, step)
    progress = tqdm(total=options.max_train_steps, initial=step, desc="reward", mininterval=10)
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
        like = [members[groups[row]] for row in rng.choice(rows, size=num_like)]
        parts = [read_examples(data, [*rows, *(int(rng.choice(near)) for near in like)], options)]
        if num_extra:
            drawn = rng.integers(len(extra), size=num_extra).tolist()
            parts.append(read_examples(extra, drawn, options))
        if num_rounds:
            drawn = rng.integers(len(rounds[1]), size=num_rounds).tolist()
            sources = [rounds[1][place] for place in drawn]
            parts.append(
                Examples(
                    rounds[0][drawn].float() / 255,
                    [captions[row] for row in sources],
                    [scenes[row] if scenes else [] for row in sources],
                )
            )
        parts = [retint(part, options.retint_share, rng) for part in parts]
        maps, fields = draw_warps(size, generator=generator, shift=0.04)
        images = warp_pictures(torch.cat([part.images for part in parts]), maps, fields)
        images = degrade_pictures(images, generator=generator)
        right = [caption for part in parts for caption in part.captions]
        objects = [scene for part in parts for scene in part.objects]
        wrong = false_captions(right, options.false_captions, rng)
        distinct, owners = np.unique([*right, *wrong], return_inverse=True)
        tokens = reward.tokenizer(
            distinct.tolist(), padding=True, truncation=True, return_tensors="pt"
        ).to(accelerator.device)
        nouns, colours = (
            labels.to(accelerator.device) for labels in patch_labels(objects, maps, side)
        )
        places = torch.from_numpy(owners).to(accelerator.device)
        with accelerator.autocast():
            pixels = reward.preprocessing(images.to(accelerator.device))
            seen, read, by_noun, by_colour, scale = learner(
                pixels, tokens["input_ids"], tokens["attention_mask"]
            )
        contrast = contrastive_loss(seen.float(), read.float()[places], places, scale.float())
        loss = contrast
        if options.patch_weight > 0 and any(objects):
            naming = patch_loss(by_noun.float(), by_colour.float(), nouns, colours)
            loss = contrast + options.patch_weight * naming
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
            values = {"loss": loss.item(), "contrast": contrast.item(), "scale": scale.item()}
            accelerator.log(values, step=step)
            progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
        is_last = step == options.max_train_steps
        if held_out is not None and (is_last or step % options.validation_steps == 0):
            ema.store(trained)
            ema.copy_to(trained)
            reward.model.eval()
            reward.forget_prompts()
            figures = validate(reward, held_out)
            reward.model.train()
            ema.restore(trained)
            accelerator.log(figures, step=step)
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            logger.info("step %d: contrast %.3f, %s", step, contrast.item(), text)
        if is_last or is_stopping or step % options.checkpointing_steps == 0:
            save_checkpoint(accelerator, output, step, options.checkpoints_total_limit)
    progress.close()

    # Save.
    if is_stopping and step < options.max_train_steps:
        logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
    ema.copy_to(trained)
    if accelerator.is_main_process:
        reward.model.half()
        reward.save_pretrained(output / "reward_model")
        logger.info("saved %s", output / "reward_model")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"train_reward: {error}")

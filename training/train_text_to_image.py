r"""Trains the text-to-image model of the box: a UNet and the text encoder that conditions it.

Learned by v-prediction in the latents of a finished `AutoencoderKL`, from captioned pictures; the
tokenizer is a byte-pair encoding of the captions themselves. What comes out is a stock
`StableDiffusionPipeline`::

    accelerate launch training/train_text_to_image.py --vae runs/vae/vae --output runs/t2i

With 10,000 steps of 32 (about an hour on one core) single objects in named colours are mostly
right; the model card has the learning curve. Any folder of pictures and captions that
`datasets` saved will do: ``--dataset``, ``--split``, ``--image_column``, ``--caption_column``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import Dataset, DatasetDict, load_from_disk
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, HfArgumentParser

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.losses import (
    add_noise,
    diffusion_loss,
    drop_captions,
    min_snr_weights,
    velocity,
)

logger = logging.getLogger("train_text_to_image")


@dataclass
class Options:
    """What to train, on what, and for how long."""

    output: str = field(default="runs/t2i", metadata={"help": "folder for checkpoints and weights"})
    vae: str = field(
        default="runs/vae/vae", metadata={"help": "folder of the finished AutoencoderKL"}
    )
    init_from: str = field(
        default="",
        metadata={"help": "a StableDiffusionPipeline folder to begin with, its autoencoder too"},
    )
    dataset: str = field(
        default="data/emoji", metadata={"help": "a folder that datasets.load_from_disk opens"}
    )
    split: str = field(default="scenes", metadata={"help": "the split to train on"})
    extra_split: str = field(
        default="singles",
        metadata={"help": "a second split; of it, rows whose 'in_vocabulary' is true; '' for none"},
    )
    validation_split: str = field(
        default="held_out_scenes",
        metadata={"help": "the split whose loss is told; '' for none"},
    )
    image_column: str = field(default="image", metadata={"help": "the column of pictures"})
    caption_column: str = field(default="caption", metadata={"help": "the column of captions"})
    resolution: int = field(default=64, metadata={"help": "side to which pictures are brought"})
    max_train_samples: int = field(
        default=0, metadata={"help": "use this many rows of the split; 0 for all"}
    )
    favoured_kinds: str = field(
        default="one_object,colours",
        metadata={"help": "values of the column 'kind' to draw more often, joined by ','"},
    )
    favoured_share: float = field(
        default=0.0, metadata={"help": "share of a batch drawn from those kinds alone"}
    )
    block_out_channels: str = field(
        default="48,96,128", metadata={"help": "widths; all but the first attend to the caption"}
    )
    attention_heads: int = field(default=2, metadata={"help": "heads of the UNet's attention"})
    norm_num_groups: int = field(default=16, metadata={"help": "groups of the UNet's group norms"})
    text_width: int = field(default=128, metadata={"help": "width of the text encoder"})
    text_layers: int = field(default=3, metadata={"help": "layers of the text encoder"})
    vocab_size: int = field(default=2048, metadata={"help": "most tokens of a fresh tokenizer"})
    max_tokens: int = field(default=24, metadata={"help": "length of a caption in tokens"})
    max_train_steps: int = field(default=6000, metadata={"help": "optimiser steps in all"})
    train_batch_size: int = field(default=32, metadata={"help": "pictures a step and process"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "passes that share one optimiser step"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "of AdamW, after the warm-up"})
    warmup_steps: int = field(default=200, metadata={"help": "steps of rising learning rate"})
    decay_steps: int = field(
        default=1200, metadata={"help": "last steps, over which the learning rate falls to zero"}
    )
    weight_decay: float = field(default=1e-2, metadata={"help": "of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "bound of the gradient's norm"})
    ema_decay: float = field(default=0.999, metadata={"help": "of the averaged weights"})
    snr_gamma: float = field(
        default=0.0, metadata={"help": "gamma of min-SNR weighting; 0 weighs v evenly"}
    )
    middle_share: float = field(
        default=0.5,
        metadata={
            "help": "share of timesteps drawn logit-normally about the middle, where shapes are "
            "decided, and not evenly"
        },
    )
    caption_dropout: float = field(
        default=0.1, metadata={"help": "share of captions emptied, for guidance"}
    )
    seed: int = field(default=0, metadata={"help": "seed of weights, data order and noise"})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, fp16 or bf16, where the device has it"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "a tracker, or 'none'"})
    validation_steps: int = field(default=500, metadata={"help": "steps between validations"})
    validation_prompts: str = field(
        default="a heart, twemoji style|a purple snowman|a blue car|a green fish|an orange cat"
        "|three red stars|two rockets|a fish and a house|a brown guitar and a yellow crown"
        "|a pink cup above a blue key|a cat to the left of a pizza|four green apples",
        metadata={"help": "captions drawn at every validation, joined by '|'"},
    )
    guidance_scale: float = field(default=4.0, metadata={"help": "guidance of those pictures"})
    num_inference_steps: int = field(default=24, metadata={"help": "DDIM steps of those pictures"})
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


class Latents:
    """The latents of a dataset, each encoded when it is first asked for, and kept in a file.

    The file is named after the autoencoder's weights and the rows, so that it is reused by a
    resumed run and never by another autoencoder.
    """

    def __init__(self, vae: AutoencoderKL, data: Dataset, options: Options, folder: Path) -> None:
        self.vae, self.data, self.options = vae, data, options
        self.scaling_factor = vae.config.scaling_factor
        digest = hashlib.sha256(str((data._fingerprint, len(data), options.resolution)).encode())
        for weights in vae.state_dict().values():
            digest.update(weights.float().contiguous().numpy().tobytes())
        side = options.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (len(data), vae.config.latent_channels, side, side)
        path = folder / f"latents-{digest.hexdigest()[:16]}.f16"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Latents not encoded yet are NaN.
            np.memmap(path, np.float16, "w+", shape=shape)[:] = np.nan
        self.stored = np.memmap(path, np.float16, "r+", shape=shape)

    @torch.no_grad()
    def __getitem__(self, rows: list[int]) -> torch.Tensor:
        """Gives the scaled latents of some rows."""
        missing = [row for row in rows if np.isnan(self.stored[row, 0, 0, 0])]
        if missing:
            images = load_pictures(self.data, missing, self.options)
            images = images.to(self.vae.device, memory_format=torch.channels_last)
            made = self.vae.encode(images).latent_dist.mean
            self.stored[missing] = made.cpu().numpy().astype(np.float16)
        found: torch.Tensor = torch.from_numpy(self.stored[rows].astype(np.float32))
        found *= self.scaling_factor
        return found


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_tokens: int) -> CLIPTokenizer:
    """Learns a byte-pair encoding of captions, in the format of CLIP's tokenizer.

    Every byte is a token, inside a word and at its end, so that no text at all is unknown. Bytes
    are numbered before anything is learned: the learner would number those that end a word in
    another order each time, and a resumed run would take one for the other.
    """
    special = ["<|startoftext|>", "<|endoftext|>"]
    # An empty CLIPTokenizer brings the normaliser and the splitting that its format stands for.
    empty = CLIPTokenizer(vocab={token: i for i, token in enumerate(special)}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=special[1]))
    learner.normalizer = empty.backend_tokenizer.normalizer
    learner.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    learner.decoder = decoders.ByteLevel()
    letters = sorted(ByteLevel.alphabet())
    numbered = [*special, *letters, *(f"{letter}</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, len(numbered)),
        special_tokens=numbered,
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    state = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    return CLIPTokenizer(vocab=state["vocab"], merges=merges, model_max_length=max_tokens)


class Denoiser(torch.nn.Module):
    """The UNet and the text encoder as one call, so that several processes share gradients."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        """Predicts v."""
        hidden = self.text_encoder(input_ids)[0]
        prediction: torch.Tensor = self.unet(noisy, timesteps, hidden).sample
        return prediction


def make_parts(options: Options, captions: Iterable[str]) -> StableDiffusionPipeline:
    """Makes a fresh pipeline around the autoencoder, or loads the one to begin with."""
    if options.init_from:
        return StableDiffusionPipeline.from_pretrained(options.init_from, safety_checker=None).to(
            torch.float32
        )
    if not Path(options.vae).is_dir():
        raise ConfigError(f"vae={options.vae!r} is no folder; training/train_vae.py makes one")
    vae = AutoencoderKL.from_pretrained(options.vae).float()
    tokenizer = train_tokenizer(captions, options.vocab_size, options.max_tokens)
    widths = tuple(int(width) for width in options.block_out_channels.split(","))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.text_width,
            intermediate_size=3 * options.text_width,
            num_hidden_layers=options.text_layers,
            num_attention_heads=4,
            max_position_embeddings=options.max_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=options.resolution // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(widths) - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (len(widths) - 1) + ("UpBlock2D",),
        cross_attention_dim=options.text_width,
        attention_head_dim=options.attention_heads,  # Named so in diffusers; it counts heads.
        norm_num_groups=options.norm_num_groups,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Turns captions into token ids as the stock pipeline does."""
    found = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = found.input_ids
    return ids


def draw_timesteps(num: int, num_train_timesteps: int, middle_share: float) -> torch.Tensor:
    """Draws timesteps, a share of them logit-normally and the rest evenly."""
    evenly = torch.rand(num)
    middle = torch.randn(num).sigmoid()
    place = torch.where(torch.rand(num) < middle_share, middle, evenly)
    return (place * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


@torch.no_grad()
def validation_loss(
    model: Denoiser, latents: Latents, ids: torch.Tensor, alphas: torch.Tensor
) -> float:
    """Averages the v error over up to 256 rows at fixed timesteps and noise."""
    generator = torch.Generator().manual_seed(0)
    device = alphas.device
    errors = []
    for first in range(0, min(256, len(ids)), 64):
        rows = list(range(first, min(first + 64, len(ids))))
        clean = latents[rows].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        timesteps = torch.linspace(10, len(alphas) - 10, len(rows)).long().to(device)
        prediction = model(
            add_noise(clean, noise, alphas[timesteps]), timesteps, ids[rows].to(device)
        )
        target = velocity(clean, noise, alphas[timesteps])
        errors.append(diffusion_loss(prediction, target).item() * len(rows))
    return sum(errors) / min(256, len(ids))


def draw_sheet(pipeline: StableDiffusionPipeline, options: Options) -> Image.Image:
    """Draws the validation prompts with two seeds each, as one picture of two rows."""
    prompts = options.validation_prompts.split("|")
    side = options.resolution
    sheet = Image.new("RGB", (side * len(prompts), side * 2), "white")
    for row in range(2):
        made = pipeline(
            prompts,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[torch.Generator().manual_seed(row) for _ in prompts],
        ).images
        for column, picture in enumerate(made):
            sheet.paste(picture, (side * column, side * row))
    return sheet


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Saves a pipeline in half precision in place of an older one, which a killed save leaves.

    The configs go on to say float32, so that the stock loader computes in it unless told.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    for path in unfinished.glob("*/*.safetensors"):
        weights = {name: weight.half() for name, weight in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    # The folder that a run began with is no part of what it made.
    for path in unfinished.glob("*/config.json"):
        config = json.loads(path.read_text("utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    # Older transformers read a tokenizer from these two.
    model = json.loads((unfinished / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]
    (unfinished / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    lines = "\n".join(["#version: 0.2", *merges])
    (unfinished / "tokenizer" / "merges.txt").write_text(f"{lines}\n", "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


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
        accelerator.init_trackers("text_to_image", config=asdict(options))

    # Data.
    data = open_split(options, options.split)
    if options.caption_column not in data.column_names:
        raise ConfigError(
            f"no column {options.caption_column!r} in {options.dataset!r}, only {data.column_names}"
        )
    if options.max_train_samples:
        data = data.select(range(min(options.max_train_samples, len(data))))
    sets = [data]
    if options.extra_split:
        extra = open_split(options, options.extra_split)
        if "in_vocabulary" in extra.column_names:
            extra = extra.select(np.flatnonzero(extra["in_vocabulary"]).tolist())
        sets.append(extra)
    captions = [caption for part in sets for caption in part[options.caption_column]]
    favoured = np.zeros(0, int)
    if options.favoured_share:
        if "kind" not in data.column_names:
            raise ConfigError(
                f"favoured_share={options.favoured_share} needs a column 'kind' in "
                f"{options.dataset!r}, which has {data.column_names}; leave it at 0"
            )
        favoured = np.flatnonzero(np.isin(data["kind"], options.favoured_kinds.split(",")))
        if not len(favoured):
            raise ConfigError(
                f"favoured_kinds={options.favoured_kinds!r} are none of the kinds "
                f"{sorted(set(data['kind']))}"
            )

    # Models.
    pipeline = make_parts(options, captions)
    pipeline.set_progress_bar_config(disable=True)
    unet, text_encoder, vae = pipeline.unet, pipeline.text_encoder, pipeline.vae
    vae.requires_grad_(False).to(accelerator.device, memory_format=torch.channels_last)
    denoiser = Denoiser(unet.to(memory_format=torch.channels_last), text_encoder)
    trained = list(denoiser.parameters())
    for name, part in (("unet", unet), ("text encoder", text_encoder)):
        logger.info("%s: %.3f M parameters", name, part.num_parameters() / 1e6)
    ids = tokenize(pipeline.tokenizer, captions)
    empty = tokenize(pipeline.tokenizer, [""])[0]
    alphas = pipeline.scheduler.alphas_cumprod.to(accelerator.device)
    folder = output / "latents"
    if options.validation_split:
        unseen = open_split(options, options.validation_split)
        unseen = unseen.select(range(min(256, len(unseen))))
        unseen_ids = tokenize(pipeline.tokenizer, list(unseen[options.caption_column]))
    with accelerator.main_process_first():
        latents = [Latents(vae, part, options, folder) for part in sets]
        if options.validation_split:
            unseen_latents = Latents(vae, unseen, options, folder)

    # Optimiser.
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=options.weight_decay
    )
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    ema = EMAModel(trained, decay=options.ema_decay, foreach=True)
    accelerator.register_for_checkpointing(ema)

    # Loop. Each process has noise of its own.
    set_seed(options.seed, device_specific=True)
    stop = StopRequest()
    step = load_checkpoint(accelerator, output, options.resume_from_checkpoint)
    passes = options.gradient_accumulation_steps
    share = (accelerator.process_index, accelerator.num_processes)
    size = options.train_batch_size * share[1]
    num_favoured = round(options.favoured_share * size)
    batches = batch_indices(len(captions), size - num_favoured, options.seed, step * passes)
    favours = batch_indices(len(favoured), num_favoured, options.seed + 1, step * passes)
    progress = tqdm(
        total=options.max_train_steps,
        initial=step,
        desc="text to image",
        mininterval=10,
        disable=not accelerator.is_main_process,
    )
    recent: list[float] = []
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
            rows = next(batches)
            if num_favoured:
                rows += favoured[next(favours)].tolist()
            rows = rows[share[0] :: share[1]]
            # The rows of the second split come after those of the first.
            first = [row for row in rows if row < len(sets[0])]
            second = [row - len(sets[0]) for row in rows if row >= len(sets[0])]
            clean = latents[0][first]
            if second:
                clean = torch.cat([clean, latents[1][second]])
            clean = clean.to(accelerator.device, memory_format=torch.channels_last)
            rows = first + [row + len(sets[0]) for row in second]
            input_ids = drop_captions(
                ids[rows], empty, torch.rand(len(rows)) < options.caption_dropout
            ).to(accelerator.device)
            timesteps = draw_timesteps(len(rows), len(alphas), options.middle_share)
            timesteps = timesteps.to(accelerator.device)
            noise = torch.randn_like(clean)
            signal_shares = alphas[timesteps]
            weights = (
                min_snr_weights(signal_shares, options.snr_gamma) if options.snr_gamma else None
            )
            with accelerator.accumulate(model), accelerator.autocast():
                noisy = add_noise(clean, noise, signal_shares)
                prediction = model(noisy, timesteps, input_ids)
                target = velocity(clean, noise, signal_shares)
                loss = diffusion_loss(prediction.float(), target, weights)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        ema.step(trained)
        step += 1
        progress.update()
        is_stopping = stop.is_agreed(accelerator)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise ConfigError(f"the loss is {recent[-1]} at step {step}; lower learning_rate")

        is_last = step == options.max_train_steps
        is_validation = is_last or step % options.validation_steps == 0
        is_checkpoint = is_last or is_stopping or step % options.checkpointing_steps == 0
        if step % 50 == 0 or is_last:
            accelerator.log({"loss": sum(recent) / len(recent)}, step=step)
            progress.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
            recent = []
        if accelerator.is_main_process and (is_validation or is_checkpoint):
            ema.store(trained)
            ema.copy_to(trained)
            denoiser.eval()
            if is_validation and options.validation_split:
                error = validation_loss(denoiser, unseen_latents, unseen_ids, alphas)
                logger.info("step %d: v loss %.4f on %s", step, error, options.validation_split)
                accelerator.log({"validation_loss": error}, step=step)
            if is_validation and options.validation_prompts:
                draw_sheet(pipeline, options).save(output / f"samples-{step}.png")
            save_pipeline(pipeline, output / "pipeline")
            denoiser.train()
            ema.restore(trained)
        if is_checkpoint:
            save_checkpoint(accelerator, output, step, options.checkpoints_total_limit)
    progress.close()

    # Save.
    if is_stopping and step < options.max_train_steps:
        logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
    logger.info("the averaged weights are in %s", output / "pipeline")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"train_text_to_image: {error}")

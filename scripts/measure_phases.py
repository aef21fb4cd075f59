"""Where the CPU time of a call goes: in the network, decoders, reward and text encoder, or beside.

The pipeline has the shapes of Stable Diffusion 1.5 (UNet of 860 M parameters, its autoencoder, its
text encoder, and TAESD as the preview) and random weights, in single precision, on one thread; its
reward is nearly free, which leaves the least to hide behind. `calls` runs a search and the stock
pipeline in turns. `free` lets UNet and decoders answer at once, so that what is left is the engine.
CPU seconds of this process, so that other processes do not matter.

    python scripts/measure_phases.py calls
    python scripts/measure_phases.py free
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mctd_diffusers.pipeline import MCTDPipeline

PHASES = ("network", "decode", "preview", "reward", "text")
PROMPT = "a red cat"


class Run(NamedTuple):
    """One call.

    Attributes:
        seconds: CPU seconds in all.
        phases: of these, in calls of each phase.
        nfe: evaluated latents of the image.
    """

    seconds: float
    phases: dict[str, float]
    nfe: int

    @property
    def rest(self) -> float:
        """CPU seconds outside all calls."""
        return self.seconds - sum(self.phases.values())


class Clock:
    """Adds up the CPU seconds of wrapped functions, by phase."""

    def __init__(self) -> None:
        self.phases = dict.fromkeys(PHASES, 0.0)

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Time a method from now on."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            answer = function(*args, **kwargs)
            self.phases[phase] += time.process_time() - started
            return answer

        setattr(owner, name, timed)

    def run(self, call: Callable[[], Any]) -> Run:
        """Time one call."""
        self.phases = dict.fromkeys(PHASES, 0.0)
        started = time.process_time()
        output = call()
        seconds = time.process_time() - started
        return Run(seconds, self.phases, sum(getattr(output, "nfe", ())))


# A pipeline of real size


def random_weights(module: nn.Module) -> Any:
    """A module that was made on the `meta` device, with small random weights."""
    module = module.to_empty(device="cpu").eval()
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02)
    return module


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer of bytes, for texts as long as the real one's."""
    special = ("<|startoftext|>", "<|endoftext|>")
    letters = sorted(ByteLevel.alphabet())
    tokens = [*special, *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        bos_token=special[0],
        eos_token=special[1],
        unk_token=special[1],
        pad_token=special[1],
        model_max_length=77,
    )


def make_stock() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 without what it learned."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    pipe = StableDiffusionPipeline(
        vae=random_weights(vae),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=make_tokenizer(),
        unet=random_weights(unet),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def answer_at_once(pipe: Any, preview_vae: Any) -> Callable[[], None]:
    """Let UNet and decoders answer without work; what is returned puts them back."""

    def noise(sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (sample * 0.5,)

    def picture(latents: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        rows, columns = (8 * side for side in latents.shape[2:])
        return (torch.zeros(len(latents), 3, rows, columns),)

    pipe.unet.forward = noise
    pipe.vae.decode = preview_vae.decode = picture

    def put_back() -> None:
        del pipe.unet.forward, pipe.vae.decode, preview_vae.decode

    return put_back


# Measurements


def print_runs(title: str, runs: list[Run]) -> None:
    """Medians of one kind of call."""
    seconds = statistics.median(run.seconds for run in runs)
    shares = [
        statistics.median(100 * run.phases[phase] / run.seconds for run in runs) for phase in PHASES
    ]
    rest = sorted(100 * run.rest / run.seconds for run in runs)
    each = statistics.median(1e3 * run.rest / run.nfe for run in runs)
    columns = " | ".join(f"{share:.2f}" for share in shares)
    print(
        f"| {title} | {seconds:.1f} | {columns} | {statistics.median(rest):.2f} "
        f"({rest[0]:.2f} to {rest[-1]:.2f}) | {each:.1f} |",
        flush=True,
    )


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name, explanation, steps, compute in (
        ("calls", "real networks", 2, 2),
        ("free", "networks that answer at once", 16, 8),
    ):
        part = parts.add_parser(name, help=explanation)
        part.add_argument("--search", default="mctd")
        part.add_argument("--steps", type=int, default=steps)
        part.add_argument("--compute", type=int, default=compute, help="in plain samples")
        part.add_argument("--rows-per-call", type=int, default=2)
        part.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    stock = make_stock()
    preview_vae = AutoencoderTiny().eval()
    searched = MCTDPipeline.from_pipe(stock, reward_model="brightness", preview_vae=preview_vae)
    searched.set_progress_bar_config(disable=True)
    settings = {
        "search": given.search, "compute": given.compute, "rows_per_call": given.rows_per_call
    }  # fmt: skip

    def call(pipe: Any, **ours: Any) -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        return lambda: pipe(PROMPT, num_inference_steps=given.steps, generator=generator, **ours)

    put_back = answer_at_once(stock, preview_vae)
    call(stock)(), call(searched, **settings)()  # what is loaded once is loaded
    if given.part == "calls":
        put_back()
    clock = Clock()
    for owner, name, phase in (
        (stock.unet, "forward", "network"),
        (stock.vae, "decode", "decode"),
        (preview_vae, "decode", "preview"),
        (stock.text_encoder, "forward", "text"),
        (searched, "reward_model", "reward"),
    ):
        clock.wrap(owner, name, phase)
    runs: dict[str, list[Run]] = {"stock": [], given.search: []}
    for number in range(given.runs):
        for name, pipe, ours in ((given.search, searched, settings), ("stock", stock, {})):
            run = clock.run(call(pipe, **ours))
            run = run if ours else run._replace(nfe=given.steps)
            runs[name].append(run)
            print(f"{name} {number}: {run}; rest {run.rest:.3f} s", file=sys.stderr, flush=True)
    print(f"| call | CPU s | {' % | '.join(PHASES)} % | the rest % (range) | rest, ms an NFE |")
    print("| --- |" + " ---: |" * (len(PHASES) + 3))
    for name, some in runs.items():
        print_runs(f"{name}, {some[0].nfe} NFE", some)


if __name__ == "__main__":
    main()

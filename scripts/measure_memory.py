"""What a search holds in memory: by the evaluated sample, and at its peak beside the stock one.

`nodes` evaluates samples of the shape of Stable Diffusion XL's in half precision, by a network that
is none, and releases nothing. `calls` runs the stock pipelines and a search over them at the same
batch, with networks of few channels and random weights: what is compared is what a search adds,
which does not depend on how large the network is. Every measurement is a process of its own, of
which the peak is reported. On an accelerator that is of its tensors. On a CPU it is of the process;
of the process where every larger block of memory is mapped by itself, so that there are no gaps in
a heap; and of the tensors that operators answer with.

    python scripts/measure_memory.py nodes --nodes 10000
    python scripts/measure_memory.py calls
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import resource
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.environment import FIRST_DRAW, Action

GIB = 2**30
KIB = 2**10
STEPS = 25
ROWS_PER_CALL = 8
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}


class Held(NamedTuple):
    """What was measured.

    Attributes:
        seconds: of work.
        rest: bytes at most before it.
        peak: bytes at most at its end.
    """

    seconds: float
    rest: int
    peak: int


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Adds up the memory of the tensors that operators answer with, for as long as they live.

    Attributes:
        now: bytes.
        peak: bytes at most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now = self.peak = 0
        self._living: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        answer = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return answer

    def _count(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._living:
            return

        def forget() -> None:
            self._living.discard(name)
            self.now -= size

        self._living.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, forget)


def map_large_blocks() -> None:
    """Let GNU's C library map every block of 64 KiB or more by itself, and hand it back when freed.

    By itself it takes blocks of up to 32 MiB from its heap once some of their size were freed, and
    gaps between what is kept stay its own.
    """
    ctypes.CDLL(None).mallopt(-3, 64 * KIB)  # M_MMAP_THRESHOLD


def measured(work: Callable[[], Any], device: str) -> Held:
    """Do some work once, and say what it held at most."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rest = peak_bytes(device)
    started = time.perf_counter()
    work()
    return Held(time.perf_counter() - started, rest, peak_bytes(device))


def peak_bytes(device: str) -> int:
    """Bytes of this process at most so far; on an accelerator those of its tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


# Evaluated samples


class NoNetwork:
    """Answers with its inputs, twice."""

    rows_per_latent = 2
    guidance_scale = 5.0

    def __call__(self, latents: Tensor, timesteps: Tensor, problems: Sequence[int]) -> Outputs:
        """Some numbers of the right shape."""
        return Outputs(latents / 16, latents / 32)

    def combine(self, outputs: Outputs, guidance: float | None = None) -> Tensor:
        """Guided, at the scale of the call."""
        assert outputs.unconditional is not None
        difference = outputs.conditional - outputs.unconditional
        return outputs.unconditional + self.guidance_scale * difference


def unused(latents: Tensor) -> Tensor:
    """A decoder that nobody asks."""
    raise AssertionError("nothing is decoded here")


def unasked(images: Tensor, prompts: Sequence[str], handles: Sequence[int]) -> Any:
    """A reward that nobody asks."""
    raise AssertionError("nothing is scored here")


def hold_nodes(scheduler: str, nodes: int) -> Held:
    """Evaluate samples along plain chains, and keep them all."""
    prepared = SCHEDULERS[scheduler](**SCHEDULE)
    prepared.set_timesteps(STEPS)
    stepper = Stepper(prepared)
    first = torch.randn(1, 4, 128, 128).half() * stepper.init_noise_sigma

    def world() -> LatentEnvironment:
        return LatentEnvironment(
            network=NoNetwork(),
            stepper=stepper,
            decoder=unused,
            reward=unasked,
            prompts=[""],
            first_latents=first,
            rows_per_call=ROWS_PER_CALL,
        )

    evaluate_chains(world(), 2 * ROWS_PER_CALL)  # what is loaded once is at rest
    environment = world()
    return measured(lambda: evaluate_chains(environment, nodes), "cpu")


def evaluate_chains(environment: LatentEnvironment, nodes: int) -> None:
    """Denoise plain samples until so many of their steps are evaluated."""
    seed = 0
    while environment.ledger.total.nfe < nodes:
        problems = np.zeros(ROWS_PER_CALL, dtype=np.int64)
        seeds = np.arange(seed, seed + ROWS_PER_CALL, dtype=np.int64)
        handles = environment.reset(problems, seeds if seed else np.full_like(seeds, FIRST_DRAW))
        for _ in range(environment.num_steps - 1):
            environment.denoise(handles)
            handles = environment.step(handles, [Action(1)] * ROWS_PER_CALL, seeds)
        environment.denoise(handles)
        seed += ROWS_PER_CALL


# Whole calls


def make_autoencoder() -> AutoencoderKL:
    """Of few channels, with the eight-fold enlargement of the real ones."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )


def make_stock(family: str) -> Any:
    """A stock pipeline of the family's shapes, of few channels, that takes embedded prompts."""
    settings = {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 8}
    scheduler = EulerDiscreteScheduler(**SCHEDULE)
    no_text = {"text_encoder": None, "tokenizer": None}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    settings |= {"down_block_types": down, "up_block_types": up, "norm_num_groups": 8}
    if family == "sd15":
        return StableDiffusionPipeline(
            make_autoencoder(), unet=UNet2DConditionModel(**settings, cross_attention_dim=768,
            sample_size=64), scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False, **no_text,
        )  # fmt: skip
    unet = UNet2DConditionModel(
        **settings,
        sample_size=128,
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280,
    )
    no_text |= {"text_encoder_2": None, "tokenizer_2": None}
    return StableDiffusionXLPipeline(make_autoencoder(), unet=unet, scheduler=scheduler, **no_text)


def embedded_prompts(family: str, device: str) -> dict[str, Tensor]:
    """One prompt and its negative, as the text encoders would embed them."""
    width = {"sd15": 768, "sdxl": 2048}[family]
    names: dict[str, tuple[int, ...]]
    names = {"prompt_embeds": (1, 77, width), "negative_prompt_embeds": (1, 77, width)}
    if family == "sdxl":
        names |= {"pooled_prompt_embeds": (1, 1280), "negative_pooled_prompt_embeds": (1, 1280)}
    return {name: torch.randn(*shape, device=device) for name, shape in names.items()}


def run_call(
    family: str, search: str | None, batch: int, device: str, counted: str, times: int
) -> Held:
    """Some calls: the stock pipeline's of a batch, or a search's in calls of as many latents."""
    if counted == "without gaps":
        map_large_blocks()
    torch.manual_seed(0)
    pipe = make_stock(family).to(device)
    call = {"num_inference_steps": 2, "output_type": "pt", **embedded_prompts(family, device)}
    if search is None:
        call["num_images_per_prompt"] = batch
    else:
        pipe = MCTDPipeline.from_pipe(pipe, reward_model="brightness")
        call |= {"search": search, "compute": 3, "rows_per_call": batch, "reward_prompt": ""}
    pipe.set_progress_bar_config(disable=True)

    def work() -> None:
        for _ in range(times):
            pipe(**call)

    if counted != "tensors" or device == "cuda":
        return measured(work, device)
    started = time.perf_counter()
    with LiveTensors() as living:
        work()
    return Held(time.perf_counter() - started, 0, living.peak)


# Tables


def in_fresh_process(work: Callable[..., Held], *arguments: Any) -> Held:
    """Measure in a process that has held nothing yet."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def print_nodes(nodes: int) -> None:
    """The table of evaluated samples."""
    print("| scheduler | KiB a node | GiB of nodes | GiB of the process | s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for scheduler in SCHEDULERS:
        held = in_fresh_process(hold_nodes, scheduler, nodes)
        grown = held.peak - held.rest
        print(
            f"| {scheduler} | {grown / nodes / KIB:.1f} | {grown / GIB:.2f} | "
            f"{held.peak / GIB:.2f} | {held.seconds:.0f} |",
            flush=True,
        )


def print_calls(search: str, batch: int, device: str, times: int) -> None:
    """The table of whole calls."""
    print(f"| shapes | counted | stock MiB | {search} MiB | more |")
    print("| --- | --- | ---: | ---: | ---: |")
    ways = ("tensors",) if device == "cuda" else ("process", "without gaps", "tensors")
    for family in ("sd15", "sdxl"):
        for counted in ways:
            stock, ours = (
                in_fresh_process(run_call, family, name, batch, device, counted, times)
                for name in (None, search)
            )
            grown, ours_grown = stock.peak - stock.rest, ours.peak - ours.rest
            print(
                f"| {family} | {counted} | {grown / 2**20:.0f} | {ours_grown / 2**20:.0f} | "
                f"{ours_grown / grown - 1:+.1%} |",
                flush=True,
            )


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    nodes = parts.add_parser("nodes", help="bytes of an evaluated sample")
    nodes.add_argument("--nodes", type=int, default=10_000)
    calls = parts.add_parser("calls", help="peak of a call beside the stock pipeline's")
    calls.add_argument("--search", default="mctd")
    calls.add_argument("--batch", type=int, default=2)
    calls.add_argument("--times", type=int, default=1, help="how often each is called")
    calls.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    if given.part == "nodes":
        print_nodes(given.nodes)
    else:
        print_calls(given.search, given.batch, given.device, given.times)


if __name__ == "__main__":
    main()

"""What a search costs beside its world: bookkeeping by the node, and how full its calls are.

The world here is free: samples are numbers, their values come out of a hash. So what is measured is
selection, tree, ledger and runner. CPU seconds of this process, so that other processes do not
matter. With `--model` the time of a row through the model in the box is measured beside it.

    python scripts/measure_overhead.py --nodes 10000 --model
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mctd_diffusers.commands.common import parse_searches
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import (
    Action,
    Counts,
    Fusions,
    Gains,
    Handles,
    Ledger,
    Seeds,
    Values,
)
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import Strategy, run_search
from mctd_diffusers.search.strategies import STRATEGIES, resolve_strategy

ROWS_PER_NFE = 2


class FreeEnvironment:
    """A world whose samples cost nothing: an integer each, and a number for what it is worth.

    Args:
        num_steps: steps of the schedule.
        rows_per_call: latents in a call, by which padding is counted.
    """

    guidance_scale: float | None = 4.0

    def __init__(self, num_steps: int, rows_per_call: int) -> None:
        self.num_steps = num_steps
        self.ledger = Ledger()
        self._rows_per_call = rows_per_call
        self._problem = np.empty(1024, dtype=np.int64)
        self._num_samples = 0

    def reset(self, problems: Handles, seeds: Seeds) -> Handles:
        """New samples."""
        return self._add(problems)

    def denoise(self, handles: Handles) -> None:
        """Charge an evaluation each, and the padding of the last call."""
        self.ledger.charge(self._problem[handles], Counts(nfe=1, rows=ROWS_PER_NFE))
        calls = -(-len(handles) // self._rows_per_call)
        padded = calls * self._rows_per_call - len(handles)
        self.ledger.charge_shared(Counts(calls=calls, padded_rows=padded * ROWS_PER_NFE))

    def step(self, parents: Handles, actions: Sequence[Action], seeds: Seeds) -> Handles:
        """New samples."""
        return self._add(self._problem[parents])

    def step_price(self, parents: Handles, actions: Sequence[Action]) -> Counts:
        """Nothing."""
        return Counts()

    def value(self, handles: Handles, guidances: Sequence[float | None] | None = None) -> Values:
        """Numbers that look random."""
        self.ledger.charge(self._problem[handles], Counts(previews=1, reward_calls=1))
        return _looks_random(handles)

    def reward(self, handles: Handles) -> Values:
        """Numbers that look random."""
        self.ledger.charge(self._problem[handles], Counts(decodes=1, reward_calls=1))
        return _looks_random(handles)

    def renoise(self, handles: Handles, step_index: int, seeds: Seeds) -> Handles:
        """New samples."""
        return self._add(self._problem[handles])

    def perturb(self, handles: Handles, strengths: Values, seeds: Seeds) -> Handles:
        """New samples."""
        return self._add(self._problem[handles])

    def fuse(
        self,
        groups: Sequence[Handles],
        weights: Sequence[Values],
        methods: Sequence[str],
        seeds: Seeds,
        guidances: Sequence[float | None] | None = None,
    ) -> Fusions:
        """New samples, all accepted."""
        handles = self._add(self._problem[np.array([group[0] for group in groups])])
        return Fusions(handles, np.zeros_like(handles), np.zeros(len(handles)))

    def relative_change(self, handles: Handles) -> Values:
        """The same of all."""
        return np.ones(len(handles))

    def predict_gain(self, handles: Handles, strides: Sequence[int]) -> Gains:
        """Numbers that look random, the same for all strides."""
        looks = np.repeat(_looks_random(handles)[:, None], len(strides), axis=1)
        return Gains(looks, looks, looks, looks)

    def export(self, handles: Handles) -> Any:
        """Nothing to keep."""
        return handles

    def restore(
        self, saved: Any, handles: Handles | None = None, *, num_handles: int = 0
    ) -> Handles:
        """The samples that were exported; nothing was lost."""
        return saved

    def release(self, handles: Handles) -> None:
        """Nothing was held."""

    def _add(self, problems: Handles) -> Handles:
        first, last = self._num_samples, self._num_samples + len(problems)
        while last > len(self._problem):
            self._problem = np.concatenate([self._problem, np.empty_like(self._problem)])
        self._problem[first:last] = problems
        self._num_samples = last
        return np.arange(first, last, dtype=np.int64)


def _looks_random(handles: Handles) -> Values:
    return np.modf(np.sin(handles + 1.0) * 43758.5453)[0]


class Run(NamedTuple):
    """One search of the free world.

    Attributes:
        nodes: evaluated, of all images.
        seconds: CPU seconds in all.
        useful: share of the rows in calls of the network that are not padding.
        peak: bytes allocated at most.
    """

    nodes: int
    seconds: float
    useful: float
    peak: int


def run(
    strategy: Strategy, *, images: int, nfe: int, num_steps: int, rows_per_call: int, memory: bool
) -> Run:
    """Search images of the free world, ``nfe`` evaluations each."""
    environment = FreeEnvironment(num_steps, rows_per_call)
    problems = [
        Problem(
            index=index,
            num_steps=num_steps,
            root_seed=1000 + index,
            budget=Budget(nfe=nfe),
            rows_per_nfe=ROWS_PER_NFE,
            guidance_scale=environment.guidance_scale,
        )
        for index in range(images)
    ]
    gc.collect()
    if memory:
        tracemalloc.start()
    started = time.process_time()
    run_search(strategy, environment, problems)
    seconds = time.process_time() - started
    peak = 0
    if memory:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    total = environment.ledger.total
    return Run(total.nfe, seconds, total.rows / (total.rows + total.padded_rows), peak)


def seconds_per_row(rows_per_call: int) -> float:
    """CPU seconds of a row of the model in the box: the least of ten calls on one thread."""
    import torch

    from mctd_diffusers import EMBEDDED_MODEL, MCTDPipeline

    torch.set_num_threads(1)
    pipe = MCTDPipeline.from_pretrained(EMBEDDED_MODEL).to(dtype=torch.float32)
    size = pipe.unet.config.sample_size
    rows = rows_per_call * ROWS_PER_NFE
    latents = torch.randn(rows, pipe.unet.config.in_channels, size, size)
    embeds = pipe.encode_prompt(["a picture"] * rows, "cpu", 1, False)[0]
    taken = []
    with torch.no_grad():
        for _ in range(10):
            started = time.process_time()
            pipe.unet(latents, torch.full((rows,), 500), encoder_hidden_states=embeds)
            taken.append(time.process_time() - started)
    return min(taken) / rows


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, default=10_000, help="evaluated nodes of one image")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--search", default=",".join(STRATEGIES), help="as `mctd bench` takes them")
    parser.add_argument(
        "--computes", default="2,8,16", help="budgets of eight prompts, in plain samples"
    )
    parser.add_argument("--model", action="store_true", help="time a row of the model in the box")
    options = parser.parse_args()
    row = seconds_per_row(rows_per_call=8) if options.model else 0.004
    where = "measured" if options.model else "assumed"
    print(f"a row of the model in the box: {1e3 * row:.2f} ms ({where}); an NFE has two")
    print(
        f"{'search':<18}{'nodes':>8}{'us a node':>11}{'% of model':>12}{'at a tenth':>12}"
        f"{'bytes a node':>14}{'useful rows of 8 prompts, %':>29}"
    )
    few = max(options.nodes // 10, 2 * options.steps)
    for name, search in parse_searches(options.search):
        strategy = resolve_strategy(search)
        sizes = {"num_steps": options.steps, "rows_per_call": 8}
        many = run(strategy, images=1, nfe=options.nodes, memory=False, **sizes)
        small = run(strategy, images=1, nfe=few, memory=False, **sizes)
        kept = run(strategy, images=1, nfe=options.nodes, memory=True, **sizes)
        shared = [
            run(strategy, images=8, nfe=k * options.steps, memory=False, **sizes).useful
            for k in map(int, options.computes.split(","))
        ]
        each = many.seconds / many.nodes
        useful = " ".join(f"{100 * share:5.1f}" for share in shared)
        print(
            f"{name:<18}{many.nodes:>8}{1e6 * each:>11.1f}"
            f"{100 * each / (ROWS_PER_NFE * row):>12.2f}{1e6 * small.seconds / small.nodes:>12.1f}"
            f"{kept.peak / many.nodes:>14.0f}{useful:>29}"
        )


if __name__ == "__main__":
    main()

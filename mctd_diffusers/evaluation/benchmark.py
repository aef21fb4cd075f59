"""Does the search pay? Methods at equal NFE on the same prompts, judged by what none of them saw.

The unit of work is a *cell*: one method at one budget with one seed, all prompts in one call of
the pipeline. A finished cell is a file, so a benchmark that was stopped goes on where it was, and
one more method costs only its own cells. A cell that was made from other weights, prompts, settings
or search code is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

import mctd_diffusers
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark_report import (
    REFERENCE,
    BenchReport,
    BenchSettings,
    Cell,
    SearchSpec,
    compare_cells,
    markdown,
)
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.environment import Counts, Prices


class Drawn(NamedTuple):
    """What one call of a sampler made and spent.

    Attributes:
        images: one for each prompt, in [0, 1].
        rewards: of each image, by the reward that was searched.
        nfe: evaluations spent on each image.
        cost: row-equivalents spent on each image.
        counts: useful work and padding of the whole call.
        prices: of a decode, a preview and a reward call, in row-equivalents.
        seconds: wall-clock seconds by phase.
        cpu: CPU seconds by phase ("network", "decode", "preview", "reward", "encode") and "total".
        stop_reasons: how many searches ended for which reason.
    """

    images: Float[Tensor, "prompts 3 height width"]
    rewards: Sequence[float]
    nfe: Sequence[int]
    cost: Sequence[float]
    counts: Counts
    prices: Prices
    seconds: Mapping[str, float]
    cpu: Mapping[str, float]
    stop_reasons: Mapping[str, int]


@runtime_checkable
class DrawFn(Protocol):
    """Makes one image for each prompt of a benchmark."""

    def __call__(self, search: Any, compute: int, seed: int) -> Drawn:
        """Search with ``compute`` times the cost of one sample."""
        ...


@runtime_checkable
class JudgeFn(Protocol):
    """The gold judge, as `SceneJudge.score`."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Any:
        """Return a report with ``gold`` and ``all_right``, one entry for each image."""
        ...


def run_benchmark(
    draw: DrawFn,
    judge: JudgeFn,
    settings: BenchSettings,
    output: Path,
    *,
    identity: Mapping[str, str],
    on_cell: Callable[[str, int, int, float | None], None] = lambda *_: None,
) -> BenchReport:
    """Make every cell that is not there yet, and compare.

    Args:
        draw: the sampler; `pipeline_draw` makes one of a pipeline.
        judge: scores the images; no search sees it.
        settings: what is compared.
        output: folder; gets ``cells/*.json``, and in the end ``results.json`` and ``results.md``.
        identity: what samples depend on besides the settings, such as `identity_of` a pipeline.
        on_cell: called after each cell with its name, its number from 1, how many there are, and
            the seconds it took; ``None`` where it was there already.

    Returns:
        The comparison, which is also written.

    Raises:
        ConfigError: the folder cannot be written.
        KeyboardInterrupt: Ctrl-C; the cells finished so far are kept.
    """
    folder = output / "cells"
    make_folder(folder)
    todo = settings.cells()
    cells = []
    for number, (spec, compute, seed) in enumerate(todo, start=1):
        name = _cell_name(spec.label, compute, seed)
        cell_identity = {**identity, "settings": _settings_hash(settings, spec)}
        path = folder / f"{name}.json"
        cell = _read_cell(path, cell_identity)
        seconds = None
        if cell is None:
            start = time.monotonic()
            drawn = draw(spec.search, compute, seed)
            seconds = time.monotonic() - start
            cell = _judged(
                drawn, judge, settings, spec.label, compute, seed, cell_identity, seconds
            )
            write_atomically(path, json.dumps(asdict(cell)))
        cells.append(cell)
        on_cell(name, number, len(todo), seconds)
    report = compare_cells(cells, settings)
    write_atomically(output / "results.json", json.dumps(asdict(report), indent=1))
    write_atomically(output / "results.md", markdown(report))
    return report


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write to {folder}")
    except OSError as error:
        raise ConfigError(
            f"output folder {folder} cannot be used: {error}; name another"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new one, and never a part."""
    draft = path.with_suffix(path.suffix + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _cell_name(label: str, compute: int, seed: int) -> str:
    plain = re.sub(r"[^\w.=-]+", "_", label)
    if plain != label:
        plain += "-" + hashlib.sha256(label.encode()).hexdigest()[:6]
    return f"{plain}-c{compute}-s{seed}"


def _settings_hash(settings: BenchSettings, spec: SearchSpec) -> str:
    """Hash what of the settings the samples of a method depend on."""
    parts = (
        settings.prompts,
        settings.num_steps,
        float(settings.guidance_scale),
        settings.rows_per_call,
        repr(spec.search),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read_cell(path: Path, identity: Mapping[str, str]) -> Cell | None:
    """Read a finished cell; ``None`` where there is none, or one of something else."""
    if not path.is_file():
        return None
    try:
        cell = Cell(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):  # written by another version: made again
        return None
    return cell if cell.identity == identity else None


def _judged(
    drawn: Drawn,
    judge: JudgeFn,
    settings: BenchSettings,
    label: str,
    compute: int,
    seed: int,
    identity: dict[str, str],
    seconds: float,
) -> Cell:
    verdict = judge(drawn.images, settings.prompts)
    return Cell(
        method=label,
        compute=compute,
        seed=seed,
        identity=identity,
        gold=[float(gold) for gold in verdict.gold],
        all_right=[bool(right) for right in verdict.all_right],
        reward=[float(reward) for reward in drawn.rewards],
        nfe=[int(nfe) for nfe in drawn.nfe],
        cost=[float(cost) for cost in drawn.cost],
        counts=asdict(drawn.counts),
        prices=asdict(drawn.prices),
        seconds={**drawn.seconds, "call": seconds},
        cpu=dict(drawn.cpu),
        stop_reasons=dict(drawn.stop_reasons),
    )


def image_seed(prompt: str, seed: int) -> int:
    """Gives the seed of an image's noise: by its prompt, so that a list can grow or be cut."""
    digest = hashlib.sha256(f"{seed}|{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def pipeline_draw(pipe: MCTDPipeline, settings: BenchSettings) -> DrawFn:
    """Makes the sampler of a pipeline that has its reward: all prompts in one call.

    Raises:
        ConfigError: the pipeline has no reward.
        KeyboardInterrupt: (by the sampler) Ctrl-C, where the pipeline kept a partial result too.
    """
    if pipe.reward_model is None:
        raise ConfigError(
            "the pipeline has no reward to search for: load it with "
            'MCTDPipeline.from_pretrained(..., reward_model="clip") or another'
        )
    reward = pipe.reward_model
    prices: Prices | None = None

    def draw(search: Any, compute: int, seed: int) -> Drawn:
        nonlocal prices
        if prices is None:  # measuring also loads what is loaded once, which is nobody's overhead
            prices = pipe.estimate(
                **_arguments(settings.prompts[:1], settings, REFERENCE, 1, seed)
            ).prices
        with cpu_by_phase(pipe) as cpu:
            timed = TimedReward(reward, cpu)
            arguments = _arguments(settings.prompts, settings, search, compute, seed)
            output = pipe(**arguments, reward_model=timed)
        reasons = Counter(found.stop_reason for found in output.search)
        if reasons["interrupted"]:
            raise KeyboardInterrupt
        return Drawn(
            images=output.images,
            rewards=output.rewards,
            nfe=output.nfe,
            cost=[prices.cost(found.spent) for found in output.search],
            counts=output.ledger.total,
            prices=prices,
            seconds=output.ledger.seconds,
            cpu=cpu,
            stop_reasons=reasons,
        )

    return draw


def _arguments(
    prompts: Sequence[str], settings: BenchSettings, search: Any, compute: int, seed: int
) -> dict[str, Any]:
    """Arguments of the pipeline's call."""
    return {
        "prompt": list(prompts),
        "num_inference_steps": settings.num_steps,
        "guidance_scale": settings.guidance_scale,
        "generator": [torch.Generator().manual_seed(image_seed(p, seed)) for p in prompts],
        "output_type": "pt",
        "search": search,
        "compute": float(compute),
        "rows_per_call": settings.rows_per_call,
    }


class TimedReward:
    """A reward whose CPU seconds are added to ``cpu["reward"]``; else the same."""

    def __init__(self, reward: Any, cpu: dict[str, float]) -> None:
        self.reward = reward
        self.cpu = cpu
        self.wants_pil = bool(getattr(reward, "wants_pil", False))
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)

    def __call__(self, images: Any, prompts: Sequence[str]) -> Any:
        """Score as the reward does."""
        start = time.process_time()
        try:
            return self.reward(images, prompts)
        finally:
            self.cpu["reward"] += time.process_time() - start


@contextlib.contextmanager
def cpu_by_phase(pipe: Any) -> Iterator[dict[str, float]]:
    """Meters the CPU seconds of a pipeline's modules, and of all that happens inside the block.

    The seconds are those of the process, all threads together. On an accelerator they say what the
    host was busy with, not the device.

    Yields:
        Seconds by phase, complete when the block is left; "reward" is left to `TimedReward`.
    """
    cpu = dict.fromkeys(("network", "decode", "preview", "reward", "encode"), 0.0)
    previewer = getattr(pipe, "preview_vae", None)
    metered: dict[str, Any] = {
        "network": getattr(pipe, "unet", None) or getattr(pipe, "transformer", None),
        "decode": getattr(getattr(pipe, "vae", None), "decoder", None),
        "preview": getattr(previewer, "decoder", None),
        "encode": getattr(pipe, "text_encoder", None),
    }
    with contextlib.ExitStack() as hooks:
        for phase, module in metered.items():
            if isinstance(module, nn.Module):
                _meter(module, phase, cpu, hooks)
        start = time.process_time()
        try:
            yield cpu
        finally:
            cpu["total"] = time.process_time() - start


def _meter(
    module: nn.Module, phase: str, cpu: dict[str, float], hooks: contextlib.ExitStack
) -> None:
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(time.process_time())

    def after(*_: Any) -> None:
        cpu[phase] += time.process_time() - started.pop()

    hooks.callback(module.register_forward_pre_hook(before).remove)
    hooks.callback(module.register_forward_hook(after).remove)


def identity_of(pipe: MCTDPipeline, judge: nn.Module) -> dict[str, str]:
    """Hashes what the samples and their scores depend on: weights, scheduler, and the search code.

    Of each parameter some values are hashed, which training changes everywhere: seconds, not
    minutes, for a large model.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    reward = pipe.reward_model
    inner = getattr(reward, "model", reward)
    if isinstance(inner, nn.Module):
        modules["reward"] = inner
    identity = {name: _weights_hash(part) for name, part in {**modules, "judge": judge}.items()}
    identity.setdefault("reward", getattr(reward, "__name__", type(reward).__name__))
    identity["scheduler"] = hashlib.sha256(
        f"{type(pipe.scheduler).__name__} {sorted(pipe.scheduler.config.items())}".encode()
    ).hexdigest()[:16]
    package = Path(mctd_diffusers.__file__).parent
    code = hashlib.sha256()
    rooms = ("search", "denoising", "families", "rewards")
    for path in sorted(
        [package / "pipeline.py", *(p for r in rooms for p in (package / r).rglob("*.py"))]
    ):
        code.update(path.read_bytes())
    identity["code"] = code.hexdigest()[:16]
    return identity


def _weights_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(name.encode())
        sampled = parameter.detach().flatten()[:64].float().cpu().numpy()
        digest.update(sampled.tobytes())
    return digest.hexdigest()[:16]

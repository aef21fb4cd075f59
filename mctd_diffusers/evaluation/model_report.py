"""What a model draws by itself, nothing selected: the figures behind ``mctd evaluate-model``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.evaluation.judge import JudgeReport, SceneJudge, load_judge
from mctd_diffusers.evaluation.metrics import (
    Interval,
    bootstrap_mean,
    kernel_distance,
    pairwise_diversity,
)
from mctd_diffusers.evaluation.real_scenes import (
    RealScenes,
    error_correlation,
    judge_figures,
    reward_figures,
)
from mctd_diffusers.evaluation.scenes import KINDS, ScenePrompt, load_prompts
from mctd_diffusers.rewards.calls import call_reward, to_pil

_SHEET_PICTURES = 40
_SHEET_COLUMNS = 8
_RIGHT, _WRONG = "#2e7d32", "#c62828"


def by_turns(prompts: Sequence[ScenePrompt]) -> list[ScenePrompt]:
    """Order prompts so that the kinds take turns, and any beginning shows all of them."""
    turns: dict[str, int] = {}
    keys = []
    for place, prompt in enumerate(prompts):
        turns[prompt.kind] = turns.get(prompt.kind, 0) + 1
        keys.append((turns[prompt.kind], KINDS.index(prompt.kind), place))
    return [prompts[place] for _, _, place in sorted(keys)]


def draw_plain(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    progress: bool,
) -> Float[Tensor, "prompts 3 height width"]:
    """Draw one picture for each prompt with DDIM, by the stock pipeline's own loop, without search.

    Args:
        pipe: an `MCTDPipeline` or a stock pipeline; its own scheduler is put back afterwards.
        prompts: what to draw.
        num_inference_steps: steps of DDIM.
        guidance_scale: of classifier-free guidance.
        seed: picture ``i`` starts from noise of seed ``seed + i``.
        batch_size: pictures drawn at once.
        progress: show a bar on standard error.

    Returns:
        Pictures in [0, 1], float32, on the CPU.
    """
    from diffusers import DDIMScheduler

    from mctd_diffusers.pipeline import MCTDPipeline

    own_scheduler, own_bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    extra = {"search": None} if isinstance(pipe, MCTDPipeline) else {}
    pictures = []
    pipe.scheduler = DDIMScheduler.from_config(own_scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    try:
        starts = range(0, len(prompts), batch_size)
        for start in tqdm(starts, desc="plain pictures", disable=not progress):
            part = list(prompts[start : start + batch_size])
            seeds = range(seed + start, seed + start + len(part))
            drawn = pipe(
                prompt=part,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(one) for one in seeds],
                output_type="pt",
                **extra,
            )
            pictures.append(torch.as_tensor(drawn.images).float().cpu())
    finally:
        pipe.scheduler = own_scheduler
        pipe.set_progress_bar_config(**own_bar)
    return torch.cat(pictures)


def evaluate_model(
    pipe: Any,
    output: str | Path,
    *,
    judge: SceneJudge | None = None,
    reward: RewardFn | None = None,
    real: RealScenes | None = None,
    prompts: Sequence[ScenePrompt] | None = None,
    num_inference_steps: int = 32,
    guidance_scale: float = 4.0,
    seed: int = 0,
    batch_size: int = 20,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure what a model draws for the ``report`` prompts by itself, nothing selected.

    Writes ``report.json``, ``report.txt`` and ``sheet.png`` (the first 40 pictures, the kinds
    taking turns, framed in green where the judge finds every fact).

    Args:
        pipe: an `MCTDPipeline` or a stock pipeline.
        output: folder for the files; made if it is not there.
        judge: the gold judge; by default the one in the box.
        reward: scores the pictures too, and its accuracy on real ones is reported; may be missing.
        real: real scenes, for the ceiling and the distance; by default the sheet that ships.
        prompts: by default the 120 ``report`` prompts.
        num_inference_steps: steps of DDIM.
        guidance_scale: of classifier-free guidance.
        seed: picture ``i`` starts from noise of seed ``seed + i``.
        batch_size: pictures drawn at once.
        progress: show a bar on standard error.

    Returns:
        The report as it stands in ``report.json``: settings, ``plain`` (gold and all-right rate by
        kind with 95 % bootstrap intervals over prompts, rewards, kernel distance to real scenes,
        diversity, seconds), ``real`` (the ceiling: judge and reward on real pictures) and
        ``errors`` (whether judge and reward err together).

    Raises:
        ConfigError: the judge's weights or the sheet of real scenes are missing, or a prompt is
            outside the grammar.
        RewardError: the reward fails.
    """
    judge = judge or load_judge()
    real = real or RealScenes.load()
    scenes = by_turns(prompts if prompts is not None else load_prompts("report"))
    captions = [scene.caption() for scene in scenes]
    started = time.perf_counter()
    images = draw_plain(
        pipe,
        captions,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    verdict = judge.score(images, captions)
    features = judge.features(images)
    plain: dict[str, Any] = {
        "by_kind": _by_kind(verdict, [scene.kind for scene in scenes]),
        "kernel_distance": kernel_distance(features, judge.features(real.images)),
        "diversity": pairwise_diversity(features),
        "seconds": round(seconds, 1),
    }
    report: dict[str, Any] = {
        "settings": {
            "num_prompts": len(captions),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
            "scheduler": "DDIMScheduler",
        },
        "plain": plain,
        "real": {
            "num_scenes": len(real),
            "judge": judge_figures(judge, real),
            "diversity": pairwise_diversity(judge.features(real.images)),
        },
    }
    if reward is not None:
        rewards = call_reward(reward, images, captions, range(len(captions)))
        plain["reward"] = bootstrap_mean(rewards)._asdict()
        report["real"]["reward"] = reward_figures(reward, real)
        report["errors"] = error_correlation(judge, reward, real)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "report.txt").write_text(format_report(report) + "\n", encoding="utf-8")
    contact_sheet(images[:_SHEET_PICTURES], captions, verdict).save(output / "sheet.png")
    return report


def format_report(report: dict[str, Any]) -> str:
    """Write the report of `evaluate_model` as a table of text."""
    settings, plain, real = report["settings"], report["plain"], report["real"]
    lines = [
        f"{settings['num_prompts']} prompts, DDIM {settings['num_inference_steps']} steps, "
        f"guidance {settings['guidance_scale']:g}, seed {settings['seed']}, nothing selected",
        "",
        f"{'kind of prompt':<20}{'gold [95 %]':>24}{'all right [95 %]':>24}{'real: facts':>13}"
        f"{'all right':>11}{'reward':>8}",
    ]
    ceilings, rewarded = real["judge"]["by_kind"], real.get("reward", {}).get("by_kind", {})
    whole = {"facts_right": real["judge"]["facts_right"], "all_right": real["judge"]["all_right"]}
    for kind, figures in plain["by_kind"].items():
        ceiling = whole if kind == "all" else ceilings.get(kind)
        accuracy = real.get("reward", {}).get("accuracy") if kind == "all" else rewarded.get(kind)
        lines.append(
            f"{kind:<20}{_interval(figures['gold']):>24}{_interval(figures['all_right']):>24}"
            + (f"{ceiling['facts_right']:>13.3f}{ceiling['all_right']:>11.3f}" if ceiling else "")
            + (f"{accuracy:>8.3f}" if accuracy is not None else "")
        )
    lines += [
        "",
        "real: what the judge finds on real held-out scenes, and how often the reward puts their "
        "caption above one that is wrong in one fact",
        f"captions wrong in one fact that the judge refuses: {real['judge']['refused']:.3f}",
        f"kernel distance to real scenes: {plain['kernel_distance']:.4f}",
        f"pairwise diversity: {plain['diversity']:.4f} (real scenes: {real['diversity']:.4f})",
    ]
    if "errors" in report:
        errors = report["errors"]
        lines += [
            f"reward of plain pictures: {_interval(plain['reward'])} "
            f"(real scenes: {real['reward']['reward']:.3f})",
            f"wrong on real scenes: judge {errors['judge_errors']:.3f}, reward "
            f"{errors['reward_errors']:.3f}; correlation of errors {_number(errors['errors'])}, "
            f"of leads {_number(errors['gaps'])}",
        ]
    return "\n".join(lines)


def contact_sheet(
    images: Float[Tensor, "some 3 height width"],
    captions: Sequence[str],
    verdict: JudgeReport,
    *,
    zoom: int = 2,
) -> Image.Image:
    """Lay pictures out with their captions and gold, framed by whether every fact was found.

    Args:
        images: in [0, 1].
        captions: at least one for each picture.
        verdict: the judge's, in the order of the captions.
        zoom: whole number of screen pixels for one pixel.
    """
    pictures = to_pil(images)
    width, height = pictures[0].width * zoom + 12, pictures[0].height * zoom + 44
    rows = -(-len(pictures) // _SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * min(len(pictures), _SHEET_COLUMNS), height * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for place, picture in enumerate(pictures):
        left, top = place % _SHEET_COLUMNS * width, place // _SHEET_COLUMNS * height
        frame = (left + 3, top + 3, left + width - 4, top + picture.height * zoom + 8)
        pen.rectangle(frame, outline=_RIGHT if verdict.all_right[place] else _WRONG, width=2)
        large = picture.resize(
            (picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST
        )
        sheet.paste(large, (left + 6, top + 6))
        text = _wrapped(f"{captions[place]} ({verdict.gold[place]:.2f})", (width - 8) // 6)
        pen.multiline_text(
            (left + 5, top + picture.height * zoom + 10), text, fill="black", spacing=0
        )
    return sheet


def _by_kind(verdict: JudgeReport, kinds: Sequence[str]) -> dict[str, Any]:
    """Return gold and all-right rate with intervals for each kind, and for all."""
    names = np.array(kinds)
    figures = {}
    for kind in [*(kind for kind in KINDS if kind in kinds), "all"]:
        rows = np.full(len(names), True) if kind == "all" else names == kind
        figures[kind] = {
            "gold": bootstrap_mean(verdict.gold[rows])._asdict(),
            "all_right": bootstrap_mean(verdict.all_right[rows].astype(float))._asdict(),
        }
    return figures


def _interval(figures: dict[str, float]) -> str:
    """Write a mean with its interval."""
    one = Interval(**figures)
    return f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _number(value: float | None) -> str:
    """Write a correlation, which may be undefined."""
    return "undefined" if value is None else f"{value:.3f}"


def _wrapped(text: str, columns: int) -> str:
    """Break a caption into lines of at most so many letters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)

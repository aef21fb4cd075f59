"""Real scenes of held-out combinations, and what judge and reward make of them.

A small sheet of real pictures ships with the package, so that the ceiling of every figure (what
judge and reward say of *real* pictures) can be printed without the data set. It was written by
``scripts/make_real_scenes.py``; the art in it and its licences are those of
``embedded/ATTRIBUTION.md``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.contradictions import CHANGES, contradict
from mctd_diffusers.evaluation.judge import JudgeReport, SceneJudge
from mctd_diffusers.evaluation.metrics import correlation
from mctd_diffusers.evaluation.scenes import KINDS, parse_prompt
from mctd_diffusers.rewards.calls import call_reward

if TYPE_CHECKING:
    from datasets import Dataset

SHEET = Path(__file__).parent / "real_scenes.png"
"""The sheet of real scenes that ships with the package; its captions are in a ``.json`` beside
it."""

_COLUMNS = 16
_BATCH = 64


@dataclass(frozen=True)
class RealScenes:
    """Real pictures with their captions.

    Attributes:
        pixels: uint8 ``[scenes, height, width, 3]``.
        captions: one for each, in the grammar of `mctd_diffusers.evaluation.scenes`.
    """

    pixels: np.ndarray
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def images(self) -> Float[Tensor, "scenes 3 height width"]:
        """The pictures in [0, 1]."""
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2).float() / 255

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each caption."""
        return tuple(parse_prompt(caption).kind for caption in self.captions)

    @classmethod
    def from_split(cls, split: Dataset, most: int) -> RealScenes:
        """Take ``most`` pictures of a split (columns image, caption), each kind in its turn."""
        turns: dict[str, int] = {}
        keys = []
        for row, caption in enumerate(split["caption"]):
            kind = parse_prompt(caption).kind
            turns[kind] = turns.get(kind, 0) + 1
            keys.append((turns[kind], KINDS.index(kind), row))
        chosen = split.select([row for _, _, row in sorted(keys)[:most]])
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in chosen["image"]])
        return cls(pixels, tuple(chosen["caption"]))

    @classmethod
    def load(cls, path: Path = SHEET) -> RealScenes:
        """Load a sheet.

        Raises:
            ConfigError: the sheet or its captions are not there.
        """
        try:
            captions = tuple(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
            with Image.open(path) as sheet:
                pixels = np.asarray(sheet.convert("RGB"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"no sheet of real scenes at {path.name}: make it with scripts/make_real_scenes.py"
            ) from error
        side = pixels.shape[1] // _COLUMNS
        tiles = pixels.reshape(-1, side, _COLUMNS, side, 3).swapaxes(1, 2)
        return cls(tiles.reshape(-1, side, side, 3)[: len(captions)].copy(), captions)

    def save(self, path: Path, *, copyright_note: str = "") -> None:
        """Write the sheet as a PNG, 16 pictures to a row, and its captions as JSON beside it.

        Args:
            path: of the PNG.
            copyright_note: goes into the file, where a note is due.
        """
        rows = -(-len(self) // _COLUMNS)
        height, width = self.pixels.shape[1:3]
        tiles = np.full((rows * _COLUMNS, height, width, 3), 255, dtype=np.uint8)
        tiles[: len(self)] = self.pixels
        sheet = tiles.reshape(rows, _COLUMNS, height, width, 3).swapaxes(1, 2)
        note = PngInfo()
        if copyright_note:
            note.add_text("Copyright", copyright_note)
        whole = Image.fromarray(sheet.reshape(rows * height, _COLUMNS * width, 3))
        whole.save(path, optimize=True, pnginfo=note)
        text = json.dumps(list(self.captions), indent=0)
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def judge_figures(judge: SceneJudge, scenes: RealScenes, *, seed: int = 0) -> dict[str, Any]:
    """Say how well the judge reads real pictures, and whether it refuses false captions.

    Args:
        judge: the judge.
        scenes: real pictures with true captions.
        seed: draws one contradiction for each caption.

    Returns:
        ``facts_right``: share of facts found more probable than not; ``all_right``: share of
            pictures
        with every fact; ``gold``: mean; ``refused``: share of captions wrong in one fact that are
        not found all right; ``gold_refused``: mean gold of those; ``by_kind`` and
        ``refused_by_change``.
    """
    report = _judged(judge, scenes.images, scenes.captions)
    changes, false = _contradictions(scenes, seed)
    refused = ~_judged(judge, scenes.images, false).all_right
    kinds = np.array(scenes.kinds)
    right = np.array([float((values > 0.5).mean()) for values in report.probabilities])
    return {
        "facts_right": float((np.concatenate(report.probabilities) > 0.5).mean()),
        "all_right": float(report.all_right.mean()),
        "gold": float(report.gold.mean()),
        "refused": float(refused.mean()),
        "by_kind": {
            kind: {
                "facts_right": float(right[kinds == kind].mean()),
                "all_right": float(report.all_right[kinds == kind].mean()),
                "refused": float(refused[kinds == kind].mean()),
            }
            for kind in KINDS
            if (kinds == kind).any()
        },
        "refused_by_change": _by_change(changes, refused),
    }


def reward_figures(reward: RewardFn, scenes: RealScenes, *, seed: int = 0) -> dict[str, Any]:
    """Say how often the reward puts the true caption of a real picture above a false one.

    Args:
        reward: the reward.
        scenes: real pictures with true captions.
        seed: draws one contradiction for each caption, the same as in `judge_figures`.

    Returns:
        ``accuracy``: share of pictures whose true caption scores higher; ``reward``: mean of the
            true
        captions; ``gap``: mean lead of the true caption; ``by_kind`` and ``by_change`` of the
        accuracy.
    """
    changes, false = _contradictions(scenes, seed)
    true_rewards = _rewarded(reward, scenes.images, scenes.captions)
    gaps = true_rewards - _rewarded(reward, scenes.images, false)
    kinds = np.array(scenes.kinds)
    return {
        "accuracy": float((gaps > 0).mean()),
        "reward": float(true_rewards.mean()),
        "gap": float(gaps.mean()),
        "by_kind": {
            kind: float((gaps[kinds == kind] > 0).mean()) for kind in KINDS if (kinds == kind).any()
        },
        "by_change": _by_change(changes, gaps > 0),
    }


def error_correlation(
    judge: SceneJudge, reward: RewardFn, scenes: RealScenes, *, seed: int = 0
) -> dict[str, float | None]:
    """Say whether judge and reward go wrong on the same real pictures.

    Args:
        judge: the judge.
        reward: the reward.
        scenes: real pictures with true captions.
        seed: draws one contradiction for each caption.

    Returns:
        ``judge_errors``: share of pictures on which the judge does not put the true caption's gold
            above
        the false one's; ``reward_errors``: the same for the reward; ``errors``: correlation of
        these two indicators; ``gaps``: correlation of the two leads of the true caption. A
        correlation is ``None`` where one side never errs.
    """
    _, false = _contradictions(scenes, seed)
    images = scenes.images
    judge_gaps = _judged(judge, images, scenes.captions).gold - _judged(judge, images, false).gold
    reward_gaps = _rewarded(reward, images, scenes.captions) - _rewarded(reward, images, false)
    judge_wrong, reward_wrong = (judge_gaps <= 0).astype(float), (reward_gaps <= 0).astype(float)
    return {
        "judge_errors": float(judge_wrong.mean()),
        "reward_errors": float(reward_wrong.mean()),
        "errors": correlation(judge_wrong, reward_wrong),
        "gaps": correlation(judge_gaps, reward_gaps),
    }


def _contradictions(scenes: RealScenes, seed: int) -> tuple[np.ndarray, list[str]]:
    """Return for each caption what was changed, and the false caption."""
    rng = np.random.default_rng(seed)
    drawn = [contradict(parse_prompt(caption), rng) for caption in scenes.captions]
    return np.array([one.change for one in drawn]), [one.prompt.caption() for one in drawn]


def _by_change(changes: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Return the share that is right for each kind of change that occurs."""
    return {
        change: float(right[changes == change].mean())
        for change in CHANGES
        if (changes == change).any()
    }


def _judged(judge: SceneJudge, images: Tensor, prompts: tuple[str, ...] | list[str]) -> JudgeReport:
    """Judge in batches of moderate size."""
    reports = [
        judge.score(images[start : start + _BATCH], prompts[start : start + _BATCH])
        for start in range(0, len(images), _BATCH)
    ]
    return JudgeReport(
        gold=np.concatenate([report.gold for report in reports]),
        all_right=np.concatenate([report.all_right for report in reports]),
        facts=tuple(claim for report in reports for claim in report.facts),
        probabilities=tuple(values for report in reports for values in report.probabilities),
    )


def _rewarded(
    reward: RewardFn, images: Tensor, prompts: tuple[str, ...] | list[str]
) -> Float[np.ndarray, " batch"]:
    """Call the reward in batches of moderate size."""
    return np.concatenate(
        [
            call_reward(
                reward,
                images[start : start + _BATCH],
                prompts[start : start + _BATCH],
                range(start, min(start + _BATCH, len(images))),
            )
            for start in range(0, len(images), _BATCH)
        ]
    )

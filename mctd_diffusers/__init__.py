"""Search over the denoising process of diffusers pipelines, guided by any reward.

The public names are loaded when they are first used, so that importing the package costs next to
nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mctd_diffusers.errors import (
        BudgetError,
        CapacityError,
        ConfigError,
        MCTDError,
        NonFiniteRewardError,
        RewardError,
        ScheduleError,
        SearchError,
        UnsupportedSchedulerError,
    )
    from mctd_diffusers.evaluation.judge import SceneJudge
    from mctd_diffusers.models.feature_decoder import FeatureToLatent
    from mctd_diffusers.models.ige import InformationGainEvaluator
    from mctd_diffusers.pipeline import MCTDPipeline
    from mctd_diffusers.processes import search_in_processes
    from mctd_diffusers.results import (
        ImageSearch,
        MCTDPipelineOutput,
        read_recipe,
        save_image_with_recipe,
    )
    from mctd_diffusers.rewards.brightness import brightness
    from mctd_diffusers.rewards.clip import ClipReward
    from mctd_diffusers.rewards.colourfulness import colourfulness
    from mctd_diffusers.rewards.jpeg import JpegCompressibility
    from mctd_diffusers.rewards.weighted_sum import WeightedSum
    from mctd_diffusers.search.saving import load_search
    from mctd_diffusers.search.strategies.beam import Beam
    from mctd_diffusers.search.strategies.best_of_n import BestOfN
    from mctd_diffusers.search.strategies.draft_refine import DraftRefine
    from mctd_diffusers.search.strategies.dts import DTS
    from mctd_diffusers.search.strategies.evolution import Evolution
    from mctd_diffusers.search.strategies.mctd import MCTD
    from mctd_diffusers.search.strategies.noise_search import NoiseSearch
    from mctd_diffusers.search.strategies.rollover import Rollover
    from mctd_diffusers.search.strategies.smc import SMC
    from mctd_diffusers.search.strategies.textbook_mctd import TextbookMCTD

__version__ = "0.1.0"

EMBEDDED_MODEL = str(Path(__file__).parent / "embedded")
"""Folder of the model that ships in the box, for ``MCTDPipeline.from_pretrained``."""

_MODULES = {
    "DTS": "search.strategies.dts",
    "MCTD": "search.strategies.mctd",
    "SMC": "search.strategies.smc",
    "Beam": "search.strategies.beam",
    "BestOfN": "search.strategies.best_of_n",
    "BudgetError": "errors",
    "CapacityError": "errors",
    "ClipReward": "rewards.clip",
    "ConfigError": "errors",
    "DraftRefine": "search.strategies.draft_refine",
    "Evolution": "search.strategies.evolution",
    "FeatureToLatent": "models.feature_decoder",
    "ImageSearch": "results",
    "InformationGainEvaluator": "models.ige",
    "JpegCompressibility": "rewards.jpeg",
    "MCTDError": "errors",
    "MCTDPipeline": "pipeline",
    "MCTDPipelineOutput": "results",
    "NoiseSearch": "search.strategies.noise_search",
    "NonFiniteRewardError": "errors",
    "RewardError": "errors",
    "Rollover": "search.strategies.rollover",
    "SceneJudge": "evaluation.judge",
    "ScheduleError": "errors",
    "SearchError": "errors",
    "TextbookMCTD": "search.strategies.textbook_mctd",
    "UnsupportedSchedulerError": "errors",
    "WeightedSum": "rewards.weighted_sum",
    "brightness": "rewards.brightness",
    "colourfulness": "rewards.colourfulness",
    "load_search": "search.saving",
    "read_recipe": "results",
    "save_image_with_recipe": "results",
    "search_in_processes": "processes",
}
"""Public name -> the module that defines it."""

__all__ = [
    "DTS",
    "EMBEDDED_MODEL",
    "MCTD",
    "SMC",
    "Beam",
    "BestOfN",
    "BudgetError",
    "CapacityError",
    "ClipReward",
    "ConfigError",
    "DraftRefine",
    "Evolution",
    "FeatureToLatent",
    "ImageSearch",
    "InformationGainEvaluator",
    "JpegCompressibility",
    "MCTDError",
    "MCTDPipeline",
    "MCTDPipelineOutput",
    "NoiseSearch",
    "NonFiniteRewardError",
    "RewardError",
    "Rollover",
    "SceneJudge",
    "ScheduleError",
    "SearchError",
    "TextbookMCTD",
    "UnsupportedSchedulerError",
    "WeightedSum",
    "brightness",
    "colourfulness",
    "load_search",
    "read_recipe",
    "save_image_with_recipe",
    "search_in_processes",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Makes the samples of recipes again, and what their fusions and their first noise need for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.calls import Prepared, World, fusion_parts_of, recipe_of_fusion
from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.denoising.fusing import NO_FUSION, FusionParts
from mctd_diffusers.denoising.protocols import CheckedReward, FeatureDecoder
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.results import Recipe, bytes_of, makers_of, step_indices
from mctd_diffusers.search.environment import (
    FIRST_DRAW,
    REJECTED,
    Action,
    Handles,
    Prices,
    Seeds,
)
from mctd_diffusers.search.seeding import root_seed_of


class FirstNoise(NamedTuple):
    """How the first noise of a recipe's image is drawn again.

    Attributes:
        draws: latents to draw at once.
        position: of the image's own among them.
        generator: that draws them.
    """

    draws: int
    position: int
    generator: torch.Generator


def needs_first_noise(recipe: Recipe) -> bool:
    """Whether any of its moves takes the noise that the call itself drew."""
    return any(move["seed"] == FIRST_DRAW for move in recipe["moves"])


def first_noise_of(recipe: Recipe, *, is_drawn: bool) -> FirstNoise:
    """How to draw the first noise of a recipe again.

    Args:
        recipe: of the image.
        is_drawn: whether it has to be what the call drew; else any will do.

    Raises:
        ConfigError: it has to be, and was not drawn from a fresh generator.
    """
    first_draw = recipe["first_draw"]
    draws, position, seed = 1, 0, 0
    if is_drawn:
        if first_draw is None:
            raise ConfigError(
                "the first noise of this recipe was not drawn from a fresh generator: pass it "
                "as latents=..., or make recipes with "
                "generator=torch.Generator().manual_seed(...)"
            )
        draws, position, seed = (first_draw[name] for name in ("batch", "position", "seed"))
    device = "cpu" if first_draw is None else first_draw["device"]
    return FirstNoise(draws, position, torch.Generator(device).manual_seed(seed))


def check_first_noise(recipe: Recipe, latents: Float[Tensor, "*sample"]) -> None:
    """Refuse another first noise than that of the recipe.

    Raises:
        ConfigError: its bytes give another root seed.
    """
    root_seed = root_seed_of(bytes_of(latents))
    if root_seed != recipe["root_seed"]:
        raise ConfigError(
            f"the recipe's search had root seed {recipe['root_seed']}, the first noise here "
            f"gives {root_seed}: load the model with dtype {recipe['dtype']} on "
            f"{recipe['device']}, or pass the first noise as latents=..."
        )


def fusing_again(
    settings: dict[str, Any], prepared: Prepared, decoder: FeatureDecoder | None
) -> FusionParts:
    """What the fusions of a recipe, or of a saved call, ask for.

    Args:
        settings: the recipe, or what the recipes of the call share.
        prepared: the family's part of the call.
        decoder: of features, where the fusion asks for one.

    Raises:
        ConfigError: the decoder of features is another than then.
    """
    said = settings.get("fusion")
    if said is None:
        return NO_FUSION
    fusing = fusion_parts_of(said["method"], prepared, decoder, said["map_block"])
    if recipe_of_fusion(fusing, decoder) != said:
        raise ConfigError(
            f"the search fused features by the decoder {said['feature_decoder']} of block "
            f"{said['map_block']}, here it is {recipe_of_fusion(fusing, decoder)}: set "
            "pipe.feature_decoder to that one, or to None where there was none"
        )
    return fusing


def fusion_method_again(settings: dict[str, Any]) -> str | None:
    """The method by which a recipe, or a saved call, fuses samples; ``None`` if it fuses none."""
    said = settings.get("fusion")
    return None if said is None else said["method"]


def world_again(
    recipe: Recipe,
    prepared: Prepared,
    *,
    stepper: Stepper,
    scheduler: SchedulerMixin,
    reward: CheckedReward,
    fusing: FusionParts,
    feature_decoder: FeatureDecoder | None,
) -> World:
    """The world of a recipe's call again, for its image alone.

    Args:
        recipe: of the image.
        prepared: the family's part of the call, its first latents those of the image.
        stepper: over ``scheduler``.
        scheduler: that the search stepped.
        reward: scores finished samples.
        fusing: what the fusions of the recipe ask for.
        feature_decoder: the same, of features.
    """
    return World(
        prepared=prepared,
        stepper=stepper,
        scheduler=scheduler,
        reward=reward,
        prompts=[recipe["reward_prompt"]],
        rows_per_call=recipe["rows_per_call"],
        rows_by_phase=recipe.get("rows_by_phase", {}),
        half_latents=recipe.get("half_latents", False),
        settings=[recipe],
        prices=Prices(),
        with_plain=False,
        fusing=fusing,
        feature_decoder=feature_decoder,
    )


def retrace(environment: LatentEnvironment, moves: Sequence[dict[str, Any]]) -> list[Handles]:
    """Make the samples of moves again; evaluates those alone that later moves need evaluated.

    Raises:
        ConfigError: the moves end before the schedule does, or a fusion is rejected here.
    """
    _check_length(moves, environment.num_steps)
    evaluated = evaluated_places(moves, environment.num_steps)
    made: list[Handles] = []
    for place, move in enumerate(moves):
        seeds = np.array([move["seed"]], dtype=np.int64)
        sources = [made[maker] for maker in makers_of(moves, place)]
        match move["move"]:
            case "draw":
                handles = environment.reset(np.zeros(1, dtype=np.int64), seeds)
            case "step":
                action = Action(move["stride"], move["eta"], move.get("guidance"))
                handles = environment.step(sources[0], [action], seeds)
            case "perturb":
                handles = environment.perturb(sources[0], np.array([move["strength"]]), seeds)
            case "fuse":
                handles = _fuse_again(environment, move, np.concatenate(sources), seeds)
            case _:
                handles = environment.renoise(sources[0], move["step_index"], seeds)
        if place in evaluated:
            environment.denoise(handles)
        made.append(handles)
    return made


def _fuse_again(
    environment: LatentEnvironment, move: dict[str, Any], particles: Handles, seeds: Seeds
) -> Handles:
    """Make the fused sample of a recipe again, which was accepted then."""
    weights = np.array(move["weights"], dtype=np.float64)
    guidances = [move.get("guidance")]
    handles = environment.fuse([particles], [weights], [move["method"]], seeds, guidances).handles
    if handles[0] == REJECTED:
        raise ConfigError(
            f"the recipe fuses {len(particles)} samples by {move['method']!r}, which is rejected "
            "here: replay it with the model, the precision and the versions that made it"
        )
    return handles


def evaluated_places(moves: Sequence[dict[str, Any]], num_steps: int) -> list[int]:
    """Which samples of moves others need evaluated: neither varied ones nor finished ones."""
    indices = step_indices(moves)
    needed = {
        maker
        for place, move in enumerate(moves)
        if move["move"] != "perturb"
        for maker in makers_of(moves, place)
        if indices[maker] < num_steps
    }
    return sorted(needed)


def _check_length(moves: Sequence[dict[str, Any]], num_steps: int) -> None:
    """Refuse moves that do not end in a finished sample."""
    last = step_indices(moves)[-1]
    if last != num_steps:
        raise ConfigError(
            f"the recipe's moves end at step {last} of {num_steps}: take the recipe whole, from "
            "out.search[i].recipe or read_recipe"
        )


def no_reward(images: Tensor, prompts: Sequence[str], handles: Sequence[int]) -> Any:
    """In place of a reward, where a replay has none."""
    raise AssertionError("a replay without a reward scores nothing")

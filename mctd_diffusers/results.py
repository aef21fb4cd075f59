"""What a search hands back: the output of a pipeline call, one `ImageSearch` an image, and recipes.

A *recipe* is plain data (JSON) from which `MCTDPipeline.replay` makes a picture again bit for bit:
the prompt and the settings of the call, and the moves that led to the sample, each with its seed.
It can travel inside a PNG file.
"""

from __future__ import annotations

import json
import logging
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils import BaseOutput
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mctd_diffusers.denoising.fusing import verdict_counts
from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.models.refining import IGEUpdate
from mctd_diffusers.search.environment import Counts, Ledger, Prices
from mctd_diffusers.search.runner import Finished, SearchResult
from mctd_diffusers.search.sampling import sample_from_tree
from mctd_diffusers.search.tree import (
    DRAW,
    FUSE,
    PERTURB,
    RENOISE,
    ROOT,
    STEP,
    Tree,
    ancestry,
    makers,
)

logger = logging.getLogger(__name__)

Recipe: TypeAlias = dict[str, Any]
"""JSON-able; see `RECIPE_VERSION` and `ImageSearch.recipe`."""

RECIPE_VERSION = 4
RECIPE_VERSIONS = (1, 2, 3, 4)
"""Those that a replay reads.

Version 1 knew no guidance of single edges and no perturbation; version 2 neither calls of several
sizes nor samples that wait in half precision; version 3 no fusion.
"""
RECIPE_KEY = "mctd_recipe"
"""Name of the text chunk of a PNG file that holds the recipe."""
TEXT_ARGUMENTS = (
    "prompt",
    "prompt_2",
    "prompt_3",
    "negative_prompt",
    "negative_prompt_2",
    "negative_prompt_3",
)
"""Stock arguments that are text, one for all images or one for each prompt."""
CALLBACK_ARGUMENTS = (
    "callback",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "callback_steps",
)
"""Stock arguments that change nothing of a search."""
CALL_ARGUMENTS = (
    *CALLBACK_ARGUMENTS,
    "generator",
    "latents",
    "num_images_per_prompt",
    "output_type",
    "return_dict",
)
"""Stock arguments that are of the call, not of its pictures, or that a recipe says in other words.

All others are held by a recipe if they are plain data; a replay needs the rest again.
"""
REQUIRED_ARGUMENTS = ("height", "width", "num_inference_steps")
"""Stock arguments that every recipe holds."""

RECIPE_ENTRIES = (
    "call",
    "device",
    "dtype",
    "first_draw",
    "moves",
    "negative_prompt",
    "not_held",
    "prompt",
    "prompts_per_call",
    "reward_prompt",
    "root_seed",
    "rows_per_call",
    "scheduler",
    "versions",
)
"""What a replay reads of a recipe, beside its version and pipeline."""

MOVE_NAMES = {
    DRAW: "draw",
    STEP: "step",
    RENOISE: "renoise",
    PERTURB: "perturb",
    FUSE: "fuse",
}


class Sample(NamedTuple):
    """One finished sample of a search.

    Attributes:
        image: the picture.
        reward: its score.
        node: its row in the tree.
        latents: finished latents, without a batch axis, on the host.
    """

    image: Image.Image
    reward: float
    node: int
    latents: Float[Tensor, "*sample"]


def moves_to(tree: Tree, node: int) -> list[dict[str, Any]]:
    """The moves that make ``node`` from nothing, as plain data; the last one makes it.

    Returns:
        One dict a move: ``move`` (``"draw"``, ``"step"``, ``"renoise"``, ``"perturb"`` or
        ``"fuse"``), ``seed``, and for a step its ``stride``, ``eta`` (``None``: as the user's own
        scheduler) and ``guidance`` (``None``: the call's own), for a renoising the ``step_index``
        it goes back to, for a perturbation its ``strength``, for a fusion its ``method``, the
        places of its ``particles`` among the moves, their ``weights`` and the ``guidance`` of their
        estimates. A move goes on from the one before, or where it says so from that at ``after``.
    """
    rows = ancestry(tree, [node])
    place = {row: number for number, row in enumerate(rows)}
    return [_move_to(tree, row, place) for row in rows]


def _move_to(tree: Tree, row: int, place: Mapping[int, int]) -> dict[str, Any]:
    """The move that makes a row, where ``place`` numbers the moves of other rows."""
    move: dict[str, Any] = {"move": MOVE_NAMES[int(tree.move[row])], "seed": int(tree.seed[row])}
    fusion = tree.fusion_of(row)
    if fusion is not None:
        return move | {
            "method": fusion.method,
            "particles": [place[particle] for particle in fusion.particles],
            "weights": list(fusion.weights),
            "guidance": _number_or_none(tree.guidance[row]),
        }
    if tree.move[row] == STEP:
        move |= {
            "stride": int(tree.stride[row]),
            "eta": _number_or_none(tree.eta[row]),
            "guidance": _number_or_none(tree.guidance[row]),
        }
    elif tree.move[row] == RENOISE:
        move["step_index"] = int(tree.step_index[row])
    elif tree.move[row] == PERTURB:
        move["strength"] = float(tree.eta[row])
    (parent,) = makers(tree, row)
    if parent != ROOT and place[parent] != place[row] - 1:
        move["after"] = place[parent]
    return move


def _number_or_none(entry: np.float64) -> float | None:
    """What an entry of a column says, where NaN says nothing."""
    return None if np.isnan(entry) else float(entry)


@dataclass
class ImageSearch:
    """What the search of one image found and spent.

    Attributes:
        result: what the runner says of the strategy's search: its tree, log and history.
        winner: the sample that was handed back; ``None`` if the search was stopped before there was
            one.
        winner_tree: the tree that ``winner.node`` is a row of: the strategy's own, or that of the
            plain sample where ``include_plain`` made it the answer.
        spent: useful work for this image, the plain sample included.
        scheduler: name of the scheduler's class that was stepped.
        settings: the part of a recipe that all samples of this image share.
        latents: ``[finished, *sample]`` of ``result.finished``, on the host.
        decode: latents to pictures, as the pipeline decodes.
    """

    result: SearchResult
    winner: Finished | None
    winner_tree: Tree
    spent: Counts
    scheduler: str
    settings: dict[str, Any] = field(repr=False)
    latents: Float[Tensor, "finished *sample"] = field(repr=False)
    decode: Callable[[Tensor], list[Image.Image]] = field(repr=False)

    @property
    def best_reward(self) -> float | None:
        """Reward of the winner."""
        return None if self.winner is None else self.winner.reward

    @property
    def tree(self) -> Tree:
        """The search tree."""
        return self.result.tree

    @property
    def finished(self) -> list[Finished]:
        """Every finished sample of the search, in the order of scoring."""
        return self.result.finished

    @property
    def stop_reason(self) -> str:
        """Why the search ended: budget, exhausted, time, interrupted or error."""
        return self.result.stop_reason

    @property
    def error(self) -> SearchError | None:
        """What went wrong with this image alone, while the others went on."""
        return self.result.error

    @property
    def history(self) -> list[tuple[int, float]]:
        """``(nfe, best reward so far)`` at every sample better than those before."""
        return self.result.history

    @property
    def moves_made(self) -> dict[str, dict[str, float]]:
        """Kinds of moves that the search chose among: how often, for what cost, with what gain.

        As plain data: ``{kind: {"times", "cost", "gain"}}``, cost in row-equivalents with the
        rollouts after them, gain in units of the reward. Empty for a search that does not choose.
        """
        found: dict[str, dict[str, float]] = {}
        for made in self.result.moves_made:
            sums = found.setdefault(made.move, {"times": 0, "cost": 0.0, "gain": 0.0})
            sums["times"] += 1
            sums["cost"] += made.cost
            sums["gain"] += made.gain
        return found

    @property
    def fusions(self) -> dict[str, int]:
        """What became of groups of particles that were to be fused: how many, by verdict.

        As plain data, by the words of `denoising.fusion.VERDICTS`, of which the first is that a
        fused sample was accepted; the last one is for those that are pruned after their evaluation.
        """
        return verdict_counts(self.result.moves_made)

    @property
    def recipe(self) -> Recipe:
        """How to make the winner again, as plain data.

        Raises:
            ConfigError: there is no winner.
        """
        if self.winner is None:
            raise ConfigError(
                f"the search stopped ({self.stop_reason}) before a sample was finished, so there "
                "is no recipe: give it a larger budget"
            )
        return self._recipe(self.winner_tree, self.winner)

    def recipe_of(self, node: int) -> Recipe:
        """How to make any finished sample of the tree again.

        Raises:
            ConfigError: ``node`` is not a finished sample.
        """
        for sample in self.finished:
            if sample.node == node:
                return self._recipe(self.tree, sample)
        nodes = [sample.node for sample in self.finished]
        raise ConfigError(
            f"node {node} is not finished; finished nodes are {nodes}: name one of them"
        )

    def top(self, n: int, *, diverse: bool = False) -> list[Sample]:
        """The best finished samples, without repetitions, best first.

        Args:
            n: how many, at least 1; fewer come back if fewer are finished.
            diverse: of the ``4 n`` best, take the best and then always the one farthest (in
                latents) from those taken (Gonzalez, 1985), so that near copies of the best do not
                crowd out the others.

        Raises:
            ConfigError: ``n`` is not a whole number of at least 1.
        """
        count: Any = n
        if not isinstance(count, numbers.Integral) or n < 1:
            raise ConfigError(f"top({n!r}): ask for a whole number of samples, at least 1")
        order = sorted(range(len(self.finished)), key=lambda i: -self.finished[i].reward)
        order = _without_repetitions(self.latents, order)
        chosen = _spread(self.latents, order[: 4 * n], n) if diverse else order[:n]
        return self._samples(chosen)

    def draw(self, n: int, *, temperature: float, seed: int = 0) -> list[Sample]:
        """Draw finished samples by the soft values of the tree, at no further evaluation.

        For a tree that ``DTS`` has grown: the larger it is, the nearer is the law of a draw to that
        of plain samples, tilted by ``exp(reward / temperature)``. See
        `search.sampling.sample_from_tree`.

        Args:
            n: how many; one sample may come often.
            temperature: in reward units, above 0; that of the search, where it has one.
            seed: decides the draws.

        Raises:
            ConfigError: an argument outside its range, or nothing was backed up in the tree.
        """
        nodes = sample_from_tree(self.tree, temperature=temperature, seed=seed, count=n)
        position = {sample.node: i for i, sample in enumerate(self.finished)}
        return self._samples([position[node] for node in nodes.tolist()])

    def _samples(self, positions: Sequence[int]) -> list[Sample]:
        """Finished samples with their pictures."""
        if not positions:
            return []
        images = self.decode(self.latents[positions])
        return [
            Sample(image, self.finished[i].reward, self.finished[i].node, self.latents[i])
            for image, i in zip(images, positions, strict=True)
        ]

    def _recipe(self, tree: Tree, sample: Finished) -> Recipe:
        return {
            **self.settings,
            "root_seed": tree.root_seed,
            "moves": moves_to(tree, sample.node),
            "reward": sample.reward,
            "strategy": self.result.strategy,
        }


def _without_repetitions(latents: Tensor, order: Sequence[int]) -> list[int]:
    """``order`` without samples that are equal to an earlier one."""
    kept: list[int] = []
    for i in order:
        if not any(torch.equal(latents[i], latents[j]) for j in kept):
            kept.append(i)
    return kept


def _spread(latents: Tensor, candidates: Sequence[int], n: int) -> list[int]:
    """The first of ``candidates`` and then the farthest ones, in the order of ``candidates``."""
    if not candidates:
        return []
    flat = latents[list(candidates)].flatten(1).float()
    taken = [0]
    distance = (flat - flat[0]).norm(dim=1)
    while len(taken) < min(n, len(candidates)):
        taken.append(int(distance.argmax()))
        distance = torch.minimum(distance, (flat - flat[taken[-1]]).norm(dim=1))
    return [candidates[i] for i in sorted(taken)]


@dataclass
class PlainSamples:
    """The samples that the same call makes without a search, from the same initial noise.

    Attributes:
        images: in the form of the call's ``output_type``.
        rewards: scores by the searched reward; ``None`` where a search was stopped before.
    """

    images: Any
    rewards: list[float | None]


def joined_ledger(ledgers: Sequence[tuple[int, Ledger]]) -> Ledger:
    """One ledger of several calls.

    Args:
        ledgers: at least one, each with the position of its call's first image among all.

    Returns:
        Sums; ``by_problem`` by position, prices those of the first, ``rows_by_phase`` all sizes.
    """
    whole = Ledger(prices=ledgers[0][1].prices)
    for first, ledger in ledgers:
        whole.total += ledger.total
        whole.by_problem |= {first + i: counts for i, counts in ledger.by_problem.items()}
        for phase, seconds in ledger.seconds.items():
            whole.charge_seconds(phase, seconds)
        for phase, rows in ledger.rows_by_phase.items():
            sizes = whole.rows_by_phase.setdefault(phase, [])
            sizes += [size for size in rows if size not in sizes]
    return whole


@dataclass
class MCTDPipelineOutput(BaseOutput):
    """Output of a pipeline call.

    Attributes:
        images: the best finished sample of each image, in the form of ``output_type``. Where a
            search was stopped before every image had one, a list with ``None`` in those places.
        rewards: its score for each image, ``None`` where there is none; ``None`` without a search.
        nfe: denoiser evaluations spent on each image.
        search: one `ImageSearch` an image; ``None`` without a search.
        ledger: what the whole call spent; ``None`` without a search.
        nsfw_content_detected: what the safety checker says of each image, ``None`` without one.
        plain: the plain samples, where ``include_plain`` asked for them.
        ige_update: what the pipeline's information gain evaluator learned, where ``online_ige``
            asked for it.
    """

    images: Any
    rewards: list[float | None] | None = None
    nfe: list[int] | None = None
    search: list[ImageSearch] | None = None
    ledger: Ledger | None = None
    nsfw_content_detected: list[bool] | None = None
    plain: PlainSamples | None = None
    ige_update: IGEUpdate | None = None

    def save(self, path: str | Path) -> list[Path]:
        """Write the images as PNG files that carry their recipes.

        Args:
            path: of the file; of several images each gets its number before the suffix. Folders are
                made as needed.

        Returns:
            The files, one an image.

        Raises:
            ConfigError: the images are not PIL pictures, or ``path`` does not end in ``.png``.
        """
        images = list(self.images)
        if not all(image is None or isinstance(image, Image.Image) for image in images):
            raise ConfigError(
                "save() writes PIL pictures: call the pipeline with output_type='pil'"
            )
        path = _png_path(path)
        names = (
            [path.stem] if len(images) == 1 else [f"{path.stem}-{i}" for i in range(len(images))]
        )
        written = []
        for i, (image, name) in enumerate(zip(images, names, strict=True)):
            if image is None:
                continue
            target = path.with_name(f"{name}.png")
            if self.search is None:
                target.parent.mkdir(parents=True, exist_ok=True)
                image.save(target)
            else:
                save_image_with_recipe(image, self.search[i].recipe, target)
            written.append(target)
        return written


@dataclass
class ReplayOutput(BaseOutput):
    """Output of `MCTDPipeline.replay`.

    Attributes:
        images: the picture of the recipe, as a list of one.
        latents: finished latents, without a batch axis, on the host.
        reward: its score, where the pipeline has a reward.
        nfe: denoiser evaluations that it took.
        previews: pictures of the denoised estimate along the path, one a network call, where
            ``previews`` asked for them.
        step_indices: position in the schedule of each preview, 0 is noisiest.
        places: of the moves of the recipe that made the samples of the previews.
    """

    images: list[Image.Image]
    latents: Float[Tensor, "*sample"] | None = None
    reward: float | None = None
    nfe: int = 0
    previews: list[Image.Image] | None = None
    step_indices: list[int] | None = None
    places: list[int] | None = None


@dataclass(frozen=True)
class Estimate:
    """What a call is going to cost, from a few measured rows.

    Attributes:
        nfe: denoiser evaluations, all images together, at most.
        seconds: wall-clock seconds, about: network, and one preview and reward call an evaluation.
        peak_memory_bytes: of the accelerator while measuring; on the host, what the process has
            used at most so far.
        seconds_per_row: of the network at the rows of a full call.
        prices: of a decode, a preview and a reward call, in row-equivalents.
    """

    nfe: int
    seconds: float
    peak_memory_bytes: int
    seconds_per_row: float
    prices: Prices


def save_image_with_recipe(image: Image.Image, recipe: Recipe, path: str | Path) -> None:
    """Write a PNG file with its recipe inside.

    Args:
        image: the picture.
        recipe: as `ImageSearch.recipe` gives it.
        path: of the file; its folder is made if it does not exist.

    Raises:
        ConfigError: ``path`` does not end in ``.png``.
    """
    path = _png_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_itxt(RECIPE_KEY, json.dumps(recipe))
    image.save(path, pnginfo=text)


def read_recipe(path: str | Path) -> Recipe:
    """Read the recipe out of a PNG file.

    Raises:
        ConfigError: the file cannot be read, or holds no recipe.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(RECIPE_KEY)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a picture: {error}") from error
    if text is None:
        raise ConfigError(
            f"{path} holds no recipe: only PNG files that `MCTDPipelineOutput.save` or "
            "`save_image_with_recipe` wrote do, as long as no other program has rewritten them"
        )
    try:
        recipe = json.loads(text)
        if not isinstance(recipe, dict):
            raise ValueError(f"it is a {type(recipe).__name__}, not an object")
    except ValueError as error:
        raise ConfigError(
            f"the recipe in {path} cannot be read ({error}): another program has changed it, so "
            "take the file as it was saved"
        ) from error
    return recipe


def _png_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path} does not end in .png: recipes travel in PNG files only")
    return path


def bytes_of(latents: Tensor) -> bytes:
    """The bytes of a tensor, whatever its dtype."""
    return latents.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


# Making recipes, and reading them


def first_draws(stock: dict[str, Any], images: int) -> list[dict[str, Any] | None]:
    """How to draw the first noise of each image again, as plain data; ``None`` where nobody can.

    To be asked before anything is drawn.

    Args:
        stock: the stock arguments of a call.
        images: how many images it makes.

    Raises:
        ConfigError: there is a list of generators, and not one for each image.
    """
    generator = stock["generator"]
    if stock["latents"] is not None or generator is None:
        return [None] * images
    if not isinstance(generator, list):
        return [_first_draw(generator, batch=images, position=i) for i in range(images)]
    if len(generator) != images:
        raise ConfigError(
            f"there are {len(generator)} generators for {images} images: give one, or one for each"
        )
    return [_first_draw(each, batch=1, position=0) for each in generator]


def _first_draw(generator: torch.Generator, *, batch: int, position: int) -> dict[str, Any] | None:
    """As `first_draws`, for one generator; ``None`` if it is not fresh from its seed."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    if not torch.equal(fresh.get_state(), generator.get_state()):
        return None
    return {"seed": seed, "device": str(generator.device), "batch": batch, "position": position}


def recipe_settings(
    stock: dict[str, Any],
    reward_prompts: Sequence[str],
    draws: Sequence[dict[str, Any] | None],
    *,
    pipeline: str,
    scheduler: SchedulerMixin,
    first_latents: Tensor,
    rows_per_call: int,
    prompts_per_call: int,
    half_latents: bool,
    fusion: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The part of a recipe that all samples of an image share, for each image of a call."""
    given = {
        name: part
        for name, part in stock.items()
        if part is not None and name not in (*CALL_ARGUMENTS, *TEXT_ARGUMENTS)
    }
    not_held = [name for name, part in given.items() if not _is_plain(part)]
    call = {name: part for name, part in given.items() if name not in not_held}
    config = json.loads(scheduler.to_json_string())
    shared = {
        "version": RECIPE_VERSION,
        "pipeline": pipeline,
        "not_held": not_held,
        "scheduler": {
            "class": type(scheduler).__name__,
            "config": {name: entry for name, entry in config.items() if name[0] != "_"},
        },
        "rows_per_call": rows_per_call,
        "prompts_per_call": prompts_per_call,
        "half_latents": half_latents,
        **({} if fusion is None else {"fusion": fusion}),
        "dtype": str(first_latents.dtype).removeprefix("torch."),
        "device": first_latents.device.type,
        "threads": torch.get_num_threads(),
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__},
    }
    n = stock["num_images_per_prompt"]

    texts = {name: stock[name] for name in TEXT_ARGUMENTS if stock.get(name) is not None}

    def of_image(image: int) -> dict[str, Any]:
        each = {
            name: text[image // n] if isinstance(text, list) else text
            for name, text in texts.items()
        }
        first = {name: each.pop(name, None) for name in ("prompt", "negative_prompt")}
        return first | {"call": call | each}

    return [
        shared
        | of_image(image)
        | {
            "reward_prompt": reward_prompt,
            "first_draw": draw,
        }
        for image, (reward_prompt, draw) in enumerate(zip(reward_prompts, draws, strict=True))
    ]


def _is_plain(given: Any) -> bool:
    """Whether JSON can hold what a user gave."""
    try:
        json.dumps(given)
    except TypeError:
        return False
    return True


_MOVE_ENTRIES = {
    "draw": {"seed"},
    "step": {"seed", "stride", "eta"},
    "renoise": {"seed", "step_index"},
    "perturb": {"seed", "strength"},
    "fuse": {"seed", "method", "particles", "weights"},
}
"""What a move says beside its name, see `moves_to`."""


def _is_move(move: Any) -> bool:
    """Whether this is a move of a recipe, with all that it needs."""
    needed = _MOVE_ENTRIES.get(move.get("move", "")) if isinstance(move, dict) else None
    return needed is not None and set(move) >= needed


def _is_ordered(moves: Sequence[dict[str, Any]]) -> bool:
    """Whether each move goes on from earlier ones, and so the first from none."""
    makers = [makers_of(moves, place) for place in range(len(moves))]
    return all(
        (mine or moves[place]["move"] == "draw") and all(0 <= maker < place for maker in mine)
        for place, mine in enumerate(makers)
    )


def check_recipe(recipe: Any, pipeline: str) -> None:
    """Refuse what a replay cannot read.

    Args:
        recipe: of one picture.
        pipeline: name of the stock class at hand.

    Raises:
        ConfigError: the recipe is none, lacks something, or is of another version or pipeline.
    """
    if not isinstance(recipe, dict):
        raise ConfigError(
            f"the recipe is a {type(recipe).__name__}: pass out.search[0].recipe, or "
            "read_recipe('picture.png')"
        )
    if recipe.get("version") not in RECIPE_VERSIONS:
        raise ConfigError(
            f"the recipe is of version {recipe.get('version')!r}, this package replays versions "
            f"{', '.join(map(str, RECIPE_VERSIONS))}: make it again"
        )
    if recipe.get("pipeline") != pipeline:
        raise ConfigError(
            f"the recipe is of pipeline {recipe.get('pipeline')}, this one is a {pipeline}: load "
            "its model"
        )
    cure = "take it whole, from out.search[i].recipe or read_recipe"
    lacking = [name for name in RECIPE_ENTRIES if name not in recipe]
    lacking += [
        name for name in REQUIRED_ARGUMENTS if name not in recipe.get("call", REQUIRED_ARGUMENTS)
    ]
    if lacking:
        raise ConfigError(f"the recipe lacks {', '.join(lacking)}: {cure}")
    moves = recipe["moves"]
    if not moves or not all(map(_is_move, moves)) or not _is_ordered(moves):
        raise ConfigError(
            f"the recipe's moves are {moves!r}, and a sample is drawn and then stepped: {cure}"
        )


def recipe_stock(
    recipe: Recipe, pipeline: str, defaults: Mapping[str, Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    """The stock arguments that a recipe stands for, without those that draw the first noise.

    Args:
        recipe: of one picture.
        pipeline: name of the stock class at hand.
        defaults: of all its arguments.
        arguments: those that the recipe could not hold.

    Raises:
        ConfigError: the recipe is none, not whole, or of another version or pipeline; or an
            argument is missing, or is none that a replay takes.
    """
    check_recipe(recipe, pipeline)
    unknown = sorted(set(arguments) - set(recipe["not_held"]))
    if unknown:
        raise ConfigError(
            f"a replay takes no {', '.join(unknown)}, the recipe says it: what it does not hold is "
            f"{', '.join(recipe['not_held']) or 'nothing'}"
        )
    missing = [name for name in recipe["not_held"] if name not in arguments]
    if missing:
        raise ConfigError(
            f"the recipe cannot hold {', '.join(missing)}: pass what the call was given"
        )
    for package, here in (("diffusers", diffusers.__version__), ("torch", torch.__version__)):
        then = recipe["versions"].get(package)
        if then != here:
            logger.warning(
                "the recipe was made with %s %s, here is %s: the picture may differ in its last "
                "bits",
                package,
                then,
                here,
            )
    texts = {name: recipe[name] for name in ("prompt", "negative_prompt") if name in defaults}
    for phase, sizes in recipe.get("rows_by_phase", {}).items():
        if len(sizes) > 1:
            logger.warning(
                "memory ran out in the search of the recipe: its calls of %s held %s latents, here "
                "all hold %d, so the picture may differ in its last bits",
                phase,
                " and then ".join(map(str, sizes)),
                sizes[-1],
            )
    stock = unheld_arguments(defaults) | texts | recipe["call"] | arguments
    return stock | {"num_images_per_prompt": 1}


def unheld_arguments(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says nothing of: stock arguments of the call as ever, others ``None``.

    Args:
        defaults: of all arguments of the stock call.
    """
    return {name: default if name in CALL_ARGUMENTS else None for name, default in defaults.items()}


def recipe_scheduler(recipe: Recipe) -> SchedulerMixin:
    """The scheduler of a recipe.

    Raises:
        ConfigError: diffusers has no scheduler of that name.
    """
    name = str(recipe["scheduler"]["class"])
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ConfigError(
            f"the recipe's scheduler {name!r} is none of diffusers {diffusers.__version__}"
        )
    scheduler: SchedulerMixin = kind.from_config(recipe["scheduler"]["config"])  # type: ignore[attr-defined]
    return scheduler


def makers_of(moves: Sequence[dict[str, Any]], place: int) -> list[int]:
    """Places of the moves whose samples the move at ``place`` goes on from; none for a draw."""
    move = moves[place]
    if move["move"] == "draw":
        return []
    return list(move["particles"]) if move["move"] == "fuse" else [move.get("after", place - 1)]


def step_indices(moves: Sequence[dict[str, Any]]) -> list[int]:
    """Position in the schedule after each move."""
    indices: list[int] = []
    for place, move in enumerate(moves):
        before = [indices[maker] for maker in makers_of(moves, place)]
        match move["move"]:
            case "step":
                indices.append(before[0] + move["stride"])
            case "perturb" | "fuse":
                indices.append(before[0])
            case _:
                indices.append(move.get("step_index", 0))
    return indices

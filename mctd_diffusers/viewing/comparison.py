"""Searches side by side on the same prompts: samples, scores, trees and costs, as files."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import (
    ImageSearch,
    MCTDPipelineOutput,
    joined_ledger,
    save_image_with_recipe,
)
from mctd_diffusers.rewards.calls import call_reward, to_pil
from mctd_diffusers.search.environment import Ledger, Prices
from mctd_diffusers.search.tree import ancestry, path_to_root
from mctd_diffusers.viewing.sheets import Cell, comparison_sheet
from mctd_diffusers.viewing.tree_picture import draw_tree


class Gold(NamedTuple):
    """What a held-out judge says of one picture.

    Attributes:
        gold: mean probability of the prompt's facts.
        all_right: every fact is more probable than not.
    """

    gold: float
    all_right: bool


@runtime_checkable
class GoldFn(Protocol):
    """Judges pictures; ``None`` for a prompt that the judge cannot read."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Sequence[Gold | None]:
        """Judge pictures in [0, 1], one prompt each."""
        ...


@dataclass(frozen=True)
class Column:
    """What one search made of all prompts; the lists hold an entry for each image.

    Args:
        label: name of the search.
        images: the samples; ``None`` where a stopped search had not finished one.
        rewards: by the reward that was searched, ``None`` where there is none.
        nfe: evaluations spent.
        gold: by the judge, ``None`` where it cannot say.
        search: what each search found; ``None`` for the stock pipeline.
        ledger: what the whole call spent; ``None`` for the stock pipeline.
        seconds: wall-clock seconds of the call.
    """

    label: str
    images: list[Image.Image | None]
    rewards: list[float | None]
    nfe: list[int]
    gold: list[Gold | None]
    search: list[ImageSearch] | None
    ledger: Ledger | None
    seconds: float

    def without_pictures(self) -> Column:
        """The same without pictures, latents and what decodes them: fit to be sent to others."""
        search = self.search and [
            replace(found, latents=found.latents[:0], decode=no_pictures) for found in self.search
        ]
        return replace(self, images=[None] * len(self.images), search=search)

    @property
    def was_interrupted(self) -> bool:
        """Whether Ctrl-C ended a search."""
        return any(found.stop_reason == "interrupted" for found in self.search or [])


def no_pictures(latents: Tensor) -> list[Image.Image]:
    """Stands for the decoder of samples that were left behind."""
    raise ConfigError(f"{len(latents)} samples cannot be decoded here: ask where they were found")


def join_columns(columns: Sequence[Column | None], prompts: Sequence[Sequence[str]]) -> Column:
    """One column of several that were drawn side by side, for the images of all.

    Args:
        columns: at least one; ``None`` where nothing was finished.
        prompts: of each column; an image of no column has nothing.
    """
    drawn = [column for column in columns if column is not None]
    lengths = [len(part) for part in prompts]

    def joined(name: str, nothing: Any) -> list[Any]:
        return [
            entry
            for column, length in zip(columns, lengths, strict=True)
            for entry in ([nothing] * length if column is None else getattr(column, name))
        ]

    starts = itertools.accumulate(lengths, initial=0)
    ledgers = [
        (start, column.ledger)
        for start, column in zip(starts, columns, strict=False)
        if column is not None and column.ledger is not None
    ]
    return Column(
        label=drawn[0].label,
        images=joined("images", None),
        rewards=joined("rewards", None),
        nfe=joined("nfe", 0),
        gold=joined("gold", None),
        search=None if drawn[0].search is None else joined("search", None),
        ledger=joined_ledger(ledgers) if ledgers else None,
        seconds=max(column.seconds for column in drawn),
    )


def make_column(
    pipe: MCTDPipeline,
    prompts: Sequence[str],
    label: str,
    search: Any,
    *,
    seed: int,
    call: dict[str, Any],
    judge: GoldFn | None = None,
) -> Column:
    """Search with one method; the stock pipeline where ``search`` is ``None``.

    Args:
        pipe: with its reward; without one only the stock pipeline draws.
        prompts: one for each image.
        label: name of the search.
        search: as the pipeline takes it.
        seed: image ``i`` starts from the noise of seed ``seed + i``.
        call: further arguments of the pipeline's call; budgets are dropped for the stock pipeline.
        judge: scores the samples; no search sees it.
    """
    started = time.monotonic()
    stock = {name: given for name, given in call.items() if name not in SEARCH_ARGUMENTS}
    output = pipe(
        prompt=list(prompts),
        generator=generators(len(prompts), seed),
        output_type="pt",
        search=search,
        **(stock if search is None else call),
    )
    if search is None and pipe.reward_model is not None:
        batch = output.images.float().cpu()
        scored = call_reward(pipe.reward_model, batch, list(prompts), range(len(batch)))
        output.rewards = scored.tolist()
    seconds = time.monotonic() - started
    return column_of(output, prompts, label, seconds=seconds, judge=judge)


def column_of(
    output: MCTDPipelineOutput,
    prompts: Sequence[str],
    label: str,
    *,
    seconds: float,
    judge: GoldFn | None = None,
) -> Column:
    """Column of one call's output; a call that failed has one of what was finished before.

    Args:
        output: with images of type ``"pt"``, at least one of them finished.
        prompts: one for each image.
        label: name of the search.
        seconds: that the call took.
        judge: scores the samples; no search sees it.
    """
    images = [None if image is None else image.float().cpu() for image in output.images]
    finished = [i for i, image in enumerate(images) if image is not None]
    batch = torch.stack([images[i] for i in finished])  # type: ignore[misc]  # none is None
    read = [prompts[i] for i in finished]
    judged = iter(judge(batch, read) if judge else [None] * len(read))
    pictures = iter(to_pil(batch))
    return Column(
        label=label,
        images=[None if image is None else next(pictures) for image in images],
        rewards=list(output.rewards or [None] * len(prompts)),
        nfe=list(output.nfe or [0] * len(prompts)),
        gold=[None if image is None else next(judged) for image in images],
        search=output.search,
        ledger=output.ledger,
        seconds=seconds,
    )


SEARCH_ARGUMENTS = (
    "compute",
    "nfe_budget",
    "cost_budget",
    "time_budget_s",
    "search_scheduler",
    "rows_per_call",
    "include_plain",
)
"""Arguments of a call that the stock pipeline does not know."""


def generators(count: int, seed: int) -> list[torch.Generator]:
    """One generator an image, so that an image does not depend on the others of its call."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def tree_figure(pipe: MCTDPipeline, found: ImageSearch, prompt: str) -> Figure:
    """Draws the tree of one image, with the denoised estimates along the winner's path.

    Replaying the winner for them costs what its ancestry cost.

    Raises:
        ConfigError: there is no winner.
    """
    replay = pipe.replay(found.recipe, previews=True)
    assert found.winner is not None
    tree, winner = found.winner_tree, found.winner.node
    path, rows = set(path_to_root(tree, winner)), ancestry(tree, [winner])
    estimates = {
        rows[place]: picture
        for place, picture in zip(replay.places or [], replay.previews or [], strict=True)
        if rows[place] in path  # a fused sample has particles beside it
    }
    num_finished = len(found.finished)
    return draw_tree(
        tree,
        winner=winner,
        num_steps=int(tree.step_index[winner]),
        title=prompt,
        subtitle=f"{found.result.strategy} · {found.spent.nfe} NFE · {num_finished} finished "
        f"sample{'s' * (num_finished != 1)}, the best with reward {found.winner.reward:.4g}",
        previews=estimates | {winner: replay.images[0]},
    )


def file_names(prompts: Sequence[str]) -> list[str]:
    """Gives each image a name without a suffix: its prompt, numbered where that is not enough."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] for prompt in prompts]
    slugs = [slug or "image" for slug in slugs]
    taken = {slug for slug in slugs if slugs.count(slug) == 1}
    names = []
    for slug in slugs:
        name = slug
        if slug not in taken or name in names:
            name = next(name for i in itertools.count() if (name := f"{slug}-{i}") not in taken)
            taken.add(name)
        names.append(name)
    return names


def save_picture(column: Column, i: int, path: Path) -> None:
    """Write one finished sample of a column as PNG, with its recipe where it was searched for."""
    image = column.images[i]
    assert image is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    if column.search is None:
        image.save(path)
    else:
        save_image_with_recipe(image, column.search[i].recipe, path)


def write_comparison(
    columns: Sequence[Column],
    prompts: Sequence[str],
    output: Path,
    *,
    pipe: MCTDPipeline,
    title: str,
    about: dict[str, Any],
    prices: Prices,
    trees: bool = True,
    on_file: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write sheet, pictures with their recipes, trees and ``result.json`` into a folder.

    Args:
        columns: what each search made.
        prompts: one for each image, as for the columns.
        output: an existing folder.
        pipe: replays the winners for their trees.
        title: of the sheet.
        about: settings of the call, for ``result.json``.
        prices: the measured price list, by which cost is reported.
        trees: whether to draw the trees.
        on_file: called for every file when it is there.
    """
    names = file_names(prompts)
    sheet = output / "sheet.png"
    comparison_picture(columns, prompts, title).save(sheet)
    on_file(sheet)
    result = output / "result.json"
    report = comparison_report(columns, prompts, about, prices)
    result.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    on_file(result)
    for column in columns:
        folder = re.sub(r"[^\w.=-]+", "_", column.label)
        for i, name in enumerate(names):
            if column.images[i] is None:
                continue
            picture = output / "images" / folder / f"{name}.png"
            save_picture(column, i, picture)
            on_file(picture)
            if column.search is not None and trees:
                tree = output / "trees" / folder / f"{name}.png"
                tree.parent.mkdir(parents=True, exist_ok=True)
                tree_figure(pipe, column.search[i], prompts[i]).savefig(tree)
                on_file(tree)


def comparison_picture(
    columns: Sequence[Column], prompts: Sequence[str], title: str
) -> Image.Image:
    """Draws the sheet: a row for each prompt, a column for each search."""
    blank = Image.new("RGB", (64, 64), "#f2f2f2")
    rows = []
    for i, prompt in enumerate(prompts):
        rewards = [column.rewards[i] for column in columns]
        best = max((reward for reward in rewards if reward is not None), default=None)
        several = len([reward for reward in rewards if reward is not None]) > 1
        cells = [
            Cell(
                column.images[i] or blank,
                tuple(_notes(column, i)),
                is_best=several and best is not None and column.rewards[i] == best,
            )
            for column in columns
        ]
        rows.append((prompt, cells))
    heads = []
    for column in columns:
        nfe = sum(column.nfe) / max(1, len(column.nfe))
        about = "stock sampler, " if column.search is None else ""
        label = "plain" if column.search is None else column.label
        heads.append((label, f"{about}{nfe:.4g} NFE an image"))
    footer = "Framed: the highest reward of its row."
    if any(gold is not None for column in columns for gold in column.gold):
        footer += " Gold: a judge that no search sees; ✓ every fact of the prompt is right."
    return comparison_sheet(heads, rows, title=title, footer=footer)


def _notes(column: Column, i: int) -> list[str]:
    if column.images[i] is None:
        return ["stopped before a sample was finished"]
    notes = []
    reward, gold = column.rewards[i], column.gold[i]
    if reward is not None:
        notes.append(f"reward {reward:.4g}")
    if gold is not None:
        notes.append(f"gold {gold.gold:.2f} {'✓ all right' if gold.all_right else '✗'}")
    return notes


def comparison_report(
    columns: Sequence[Column], prompts: Sequence[str], about: dict[str, Any], prices: Prices
) -> dict[str, Any]:
    """Puts numbers of a comparison into plain data, the ledgers included."""
    searches = {}
    for column in columns:
        images = []
        for i, prompt in enumerate(prompts):
            gold = column.gold[i]
            entry: dict[str, Any] = {"prompt": prompt, "nfe": column.nfe[i]}
            entry["reward"] = column.rewards[i]
            if gold is not None:
                entry |= {"gold": gold.gold, "all_right": gold.all_right}
            found = None if column.search is None else column.search[i]
            if found is not None:
                entry |= {
                    "cost": prices.cost(found.spent),
                    "stop_reason": found.stop_reason,
                    "finished": len(found.finished),
                    "history": [list(pair) for pair in found.history],
                    "moves_made": found.moves_made,
                    "fusions": found.fusions,
                }
            images.append(entry)
        ledger = None if column.ledger is None else ledger_report(column.ledger, prices)
        searches[column.label] = {
            "seconds": column.seconds,
            "means": {
                "reward": _mean(column.rewards),
                "gold": _mean([gold and gold.gold for gold in column.gold]),
                "all_right": _mean([gold and float(gold.all_right) for gold in column.gold]),
                "nfe": _mean(column.nfe),
            },
            "ledger": ledger,
            "images": images,
        }
    return {**about, "searches": searches}


def ledger_report(ledger: Ledger, prices: Prices) -> dict[str, Any]:
    """Puts a ledger into plain data; cost by ``prices`` in rows of the network."""
    return {
        **asdict(ledger.total),
        "cost": prices.cost(ledger.total),
        "prices": asdict(prices),
        "seconds": ledger.seconds,
    }


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None

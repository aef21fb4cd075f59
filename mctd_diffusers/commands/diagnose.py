"""``mctd diagnose``: where saved searches fall short: the model, the reward, or the search."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mctd_diffusers.commands.common import (
    Device,
    Model,
    check_call,
    check_judge_reads,
    load_gold_judge,
    load_pipeline,
    named_reward,
    saving,
    say,
)

if TYPE_CHECKING:
    from mctd_diffusers.evaluation.diagnosis.calls import Cost
    from mctd_diffusers.evaluation.diagnosis.terms import Diagnosis


def diagnose(
    results: Annotated[
        list[Path], typer.Argument(help="Folders that `mctd generate --save-to` saved searches in.")
    ],
    model: Model = "embedded",
    reward: Annotated[
        str | None,
        typer.Option(help="Reward that was searched: a name, a CLIPModel, or module:function."),
    ] = None,
    gold: Annotated[
        str, typer.Option(help="What judges: 'judge', a reward's name, or module:function.")
    ] = "judge",
    top_gold: Annotated[
        float | None,
        typer.Option(help="Greatest possible gold [1 of the judge, else the pool's best]."),
    ] = None,
    pool: Annotated[int, typer.Option(min=1, help="Plain samples of each prompt.")] = 64,
    siblings: Annotated[
        int, typer.Option(min=1, help="Rejected siblings looked at for each choice, best first.")
    ] = 4,
    continuations: Annotated[
        int, typer.Option(min=2, help="Continuations of each sibling; an even number.")
    ] = 8,
    stride: Annotated[
        int, typer.Option(min=1, help="Schedule steps that an edge of a continuation crosses.")
    ] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Diagnose the first so many images of each folder.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("outputs/diagnose"),
    device: Device = None,
) -> None:
    """Say where saved searches fall short: the model's ceiling, the reward's error, their regret.

    Writes report.md and diagnosis.json. The saved searches stay as they are, finished or not.
    """
    with saving() as saved:
        from mctd_diffusers.evaluation.diagnosis import Effort, diagnose_saved
        from mctd_diffusers.files import make_folder

        effort = Effort(pool, siblings, continuations, stride)
        texts = [text for folder in results for text in _prompts_in(folder)[:limit]]
        if gold == "judge":
            check_judge_reads(texts)
        call = check_call([], steps=1, guidance=1.0, device=device)
        make_folder(output)
        judge = load_gold_judge() if gold == "judge" else named_reward(gold)
        searched = reward if reward is None or ":" not in reward else named_reward(reward)
        pipe = load_pipeline(model, searched, call)
        found: list[Diagnosis] = []
        told: list[Cost] = []
        try:
            for folder in results:
                found += diagnose_saved(
                    pipe,
                    folder,
                    gold=judge,
                    effort=effort,
                    top_gold=top_gold,
                    limit=limit,
                    on_cost=partial(_say_cost, folder, told),
                )
                if len(found) < sum(cost.images for cost in told):
                    raise KeyboardInterrupt
        finally:
            if found:
                about = [f"Searches in {', '.join(map(str, results))}; gold is {gold}."]
                _write(output, found, about, saved)


def _prompts_in(folder: Path) -> list[str]:
    """Prompts of a saved search.

    Raises:
        ConfigError: there is none.
    """
    from mctd_diffusers.search.saving import load_search

    texts: list[str] = load_search(folder).call["reward_prompts"]
    return texts


def _say_cost(folder: Path, told: list[Cost], cost: Cost) -> None:
    """Say what a folder is going to cost."""
    told.append(cost)
    images = f"{cost.images} image{'s' * (cost.images != 1)}"
    say(f"diagnosing {images} of {folder}: {cost.nfe} NFE, about {cost.seconds:.0f} s")


def _write(
    output: Path, found: Sequence[Diagnosis], about: Sequence[str], saved: list[Path]
) -> None:
    """Write the report, and say it."""
    from mctd_diffusers.evaluation.diagnosis.report import report_text, write_report

    saved += write_report(output, found, about)
    typer.echo(report_text(found, about))
    for path in saved:
        typer.echo(str(path))

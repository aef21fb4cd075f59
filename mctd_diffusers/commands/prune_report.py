"""``mctd prune-report``: how often what saved searches pruned would have won."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mctd_diffusers.commands.common import (
    Device,
    Model,
    check_call,
    load_pipeline,
    named_reward,
    saving,
)


def prune_report(
    results: Annotated[
        list[Path], typer.Argument(help="Folders that `mctd generate --save-to` saved searches in.")
    ],
    model: Model = "embedded",
    reward: Annotated[
        str | None,
        typer.Option(help="Reward that was searched: a name, a CLIPModel, or module:function."),
    ] = None,
    share: Annotated[
        float, typer.Option(help="Share of the pruned samples that is finished, at most 1.")
    ] = 0.05,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Look at the first so many images of each folder.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path(
        "outputs/prune-report"
    ),
    device: Device = None,
) -> None:
    """Finish a random share of what saved searches pruned: how often would it have won?

    Writes pruning.md and pruning.json. The saved searches stay as they are, finished or not.
    """
    with saving() as saved:
        from mctd_diffusers.evaluation.pruning_report import (
            merged,
            pruning_regret_saved,
            pruning_text,
            write_pruning_report,
        )

        call = check_call([], steps=1, guidance=1.0, device=device)
        searched = reward if reward is None or ":" not in reward else named_reward(reward)
        pipe = load_pipeline(model, searched, call)
        regret = merged(
            [pruning_regret_saved(pipe, folder, share=share, limit=limit) for folder in results]
        )
        saved.extend(write_pruning_report(output, regret))
        typer.echo(pruning_text(regret))
        for path in saved:
            typer.echo(str(path))

"""``mctd log-searches``: what saved searches observed, as a dataset."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def log_searches(
    searches: Annotated[
        Path, typer.Argument(help="Folder of a saved search, or one that holds such folders.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the dataset.")] = Path("outputs/searches"),
    push_to_hub: Annotated[
        str | None, typer.Option(help="Repository of the Hub to push the folder to.")
    ] = None,
) -> None:
    """Write what saved searches observed as a dataset with a card, without a call of a model.

    Each row is a state that a search went on from, with the values of its children. The searches
    have to be saved with features: by calls with online_ige=True or stride_policy="ige".
    """
    import datasets

    from mctd_diffusers.hub import push_folder
    from mctd_diffusers.trajectories.searches import read_searches, write_searches

    datasets.disable_progress_bars()
    data = read_searches(searches)
    command = shlex.join(["mctd", "log-searches", str(searches), "--output", str(output)])
    shards = write_searches(data, output, command=command)
    typer.echo(f"{len(data.observations)} rows in {len(shards)} files: {output}")
    if push_to_hub is not None:
        pushed = push_folder(output, push_to_hub, repo_type="dataset")
        typer.echo(f"pushed: {pushed.commit_url}")

"""``mctd log-trajectories`` and ``mctd relabel``: datasets of denoising trajectories."""

from __future__ import annotations

import contextlib
import inspect
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mctd_diffusers.commands.common import (
    Device,
    Guidance,
    Model,
    RowsPerCall,
    check_call,
    load_pipeline,
    named_reward,
    progress_bar,
    say,
    whole_numbers,
)
from mctd_diffusers.denoising.scheduler_names import SCHEDULERS, read_schedulers
from mctd_diffusers.errors import ConfigError

if TYPE_CHECKING:
    from mctd_diffusers.pipeline import MCTDPipeline
    from mctd_diffusers.trajectories.plan import LogSettings

DEFAULT_GRIDS = "8,10,12,16,20,25,32,40,50"
DEFAULT_SCHEDULERS = "DDIM,DDIM:eta=1,DDPM,Euler"

Reward = Annotated[
    str | None,
    typer.Option(help="What values are: a reward, a CLIPModel, or module:function [the model's]."),
]
PushToHub = Annotated[
    str | None, typer.Option(help="Repository of the Hub to push the whole folder to at the end.")
]


def log_trajectories(
    prompts: Annotated[
        str, typer.Option(help="File (.txt, .csv, .tsv, .jsonl), 'tune', 'report'.")
    ],
    trajectories: Annotated[int, typer.Option(min=1, help="Trajectories of the split.")],
    output: Annotated[
        Path, typer.Option(help="Folder of the dataset; what is there already is kept.")
    ] = Path("outputs/trajectories"),
    split: Annotated[str, typer.Option(help="Name of the split that is written.")] = "train",
    model: Model = "embedded",
    reward: Reward = None,
    siblings: Annotated[
        int, typer.Option(min=2, help="Draws of each stochastic edge; 16 to judge by.")
    ] = 4,
    strides: Annotated[str, typer.Option(help="Strides of the jumps that are made.")] = "1,2,4,8",
    grids: Annotated[
        str, typer.Option(help="Numbers of steps, by turns at random.")
    ] = DEFAULT_GRIDS,
    schedulers: Annotated[
        str,
        typer.Option(
            help=f"By turns at random, of {', '.join(SCHEDULERS)}, classes of diffusers; settings "
            "after colons, as in DDIM:eta=1."
        ),
    ] = DEFAULT_SCHEDULERS,
    probes: Annotated[
        int, typer.Option(min=0, help="States of each trajectory that siblings are drawn from.")
    ] = 3,
    guidance: Guidance = 4.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the choices and of all noise.")] = 0,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Trajectories in a file: what a stop loses at most.")
    ] = 16,
    rows_per_call: RowsPerCall = None,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it will take, and write nothing.")
    ] = False,
    push_to_hub: PushToHub = None,
) -> None:
    """Log denoising trajectories, jumps and siblings into a dataset, one split at a time.

    Stopped at any moment, the same command goes on from the finished files.
    """
    command = _command("log-trajectories", log_trajectories, locals(), {"dry_run", "push_to_hub"})
    settings = read_settings(
        prompts=prompts,
        num_trajectories=trajectories,
        schedulers=schedulers,
        grids=grids,
        strides=strides,
        probes=probes,
        siblings=siblings,
        guidance_scale=guidance,
        seed=seed,
        shard_size=shard_size,
        rows_per_call=rows_per_call,
    )
    from mctd_diffusers.files import make_folder
    from mctd_diffusers.trajectories.card import write_card
    from mctd_diffusers.trajectories.files import check_split
    from mctd_diffusers.trajectories.logging import begin_log

    check_split(split)
    pipe = open_pipeline(model, reward, settings, device)
    if dry_run:
        _say_estimate(pipe, settings)
        return
    make_folder(output)
    with _interruptible(output, split, settings):
        settings = begin_log(pipe, settings, output, split=split, command=command)
        _log(pipe, settings, output, split)
        card = write_card(pipe, output)
    typer.echo(f"{settings.num_trajectories} trajectories: {output}, split {split}")
    typer.echo(f"card: {card}")
    _push(output, push_to_hub)


def relabel(
    log: Annotated[Path, typer.Argument(help="Folder that log-trajectories wrote.")],
    output: Annotated[Path, typer.Option(help="Folder of the new dataset.")],
    reward: Annotated[
        str, typer.Option(help="What values are to be: a reward, a CLIPModel, or module:function.")
    ],
    model: Model = "embedded",
    rows_per_call: Annotated[
        int | None, typer.Option(min=1, help="Latents decoded at once [as they were logged].")
    ] = None,
    device: Device = None,
    push_to_hub: PushToHub = None,
) -> None:
    """Write a log again with the values of another reward, without a call of the denoiser.

    Stopped at any moment, the same command goes on from the finished files.
    """
    command = _command("relabel", relabel, locals(), {"push_to_hub"})
    from mctd_diffusers.files import make_folder
    from mctd_diffusers.trajectories.card import write_card
    from mctd_diffusers.trajectories.relabelling import relabel_log

    pipe = open_pipeline(model, reward, None, device)
    make_folder(output)
    files = sorted((log / "data").glob("*.parquet"))
    try:
        with progress_bar(len(files), " files") as bar:
            bar.update(sum((output / "data" / path.name).exists() for path in files))
            for _ in relabel_log(pipe, log, output, rows_per_call=rows_per_call, command=command):
                bar.update()
            card = write_card(pipe, output)
    except KeyboardInterrupt:
        made = len([*(output / "data").glob("*.parquet")])
        _say_stopped(f"{made} of {len(files)} files are in {output}")
    typer.echo(f"{len(files)} files: {output}")
    typer.echo(f"card: {card}")
    _push(output, push_to_hub)


# What the options say


def read_settings(
    *, prompts: str, schedulers: str, grids: str, strides: str, **settings: Any
) -> LogSettings:
    """The settings of a split, from options.

    Raises:
        ConfigError: one cannot be read, or cannot work.
    """
    from mctd_diffusers.evaluation.benchmark.prompts import read_prompts
    from mctd_diffusers.trajectories.plan import LogSettings

    return LogSettings(
        prompts=read_prompts(prompts).prompts,
        schedulers=tuple(said.name for said in read_schedulers(schedulers)),
        grids=whole_numbers(grids, "--grids", least=2),
        strides=whole_numbers(strides, "--strides", least=1),
        **settings,
    )


def open_pipeline(
    model: str, reward: str | None, settings: LogSettings | None, device: str | None
) -> MCTDPipeline:
    """Load the pipeline whose trajectories are logged, quietly.

    Raises:
        ConfigError: it cannot be had, or has no reward.
    """
    import datasets

    guidance = 1.0 if settings is None else settings.guidance_scale
    call = check_call([], steps=1, guidance=guidance, device=device)
    is_function = reward is not None and ":" in reward
    pipe = load_pipeline(model, named_reward(str(reward)) if is_function else reward, call)
    pipe.set_progress_bar_config(disable=True)
    datasets.disable_progress_bars()
    if pipe.reward_model is None:
        raise ConfigError(
            f"the value of a state is a reward, and model {model!r} has none: name one, "
            "as by --reward clip"
        )
    return pipe


def _command(name: str, function: Any, given: dict[str, Any], besides: set[str]) -> str:
    """The command line that was given, for the card: options that differ from their defaults."""
    words = ["mctd", name]
    for option, parameter in inspect.signature(function).parameters.items():
        setting = given[option]
        if option in besides or setting == parameter.default:
            continue
        is_argument = option == "log"
        words += [str(setting)] if is_argument else [f"--{option.replace('_', '-')}", str(setting)]
    return shlex.join(words)


# Doing it


def _log(pipe: MCTDPipeline, settings: LogSettings, output: Path, split: str) -> None:
    """Write the shards that are missing, under a bar over the trajectories."""
    from mctd_diffusers.trajectories.logging import log_trajectories
    from mctd_diffusers.trajectories.plan import shard_of

    with progress_bar(settings.num_trajectories, " trajectories") as bar:
        bar.initial = bar.n = _num_logged(output, split, settings)
        bar.refresh()
        for number in log_trajectories(pipe, settings, output, split=split):
            bar.update(len(shard_of(settings, number).rows))


def _num_logged(output: Path, split: str, settings: LogSettings) -> int:
    """Trajectories that are there."""
    from mctd_diffusers.trajectories.files import shard_paths
    from mctd_diffusers.trajectories.plan import shard_of

    paths = shard_paths(output, split, settings.num_shards)
    return sum(len(shard_of(settings, i).rows) for i, path in enumerate(paths) if path.exists())


@contextlib.contextmanager
def _interruptible(output: Path, split: str, settings: LogSettings) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        logged = _num_logged(output, split, settings)
        _say_stopped(
            f"{logged} of {settings.num_trajectories} trajectories of split {split} are in {output}"
        )


def _say_stopped(what_is_there: str) -> None:
    say(f"stopped by Ctrl-C; {what_is_there}: the same command goes on from there")
    raise typer.Exit(130) from None


def _say_estimate(pipe: MCTDPipeline, settings: LogSettings) -> None:
    from mctd_diffusers.trajectories.logging import estimate_log

    estimate = estimate_log(pipe, settings)
    rows = f"{1e3 * estimate.seconds_per_row:.3g} ms a row"
    typer.echo(f"trajectories: {estimate.trajectories:,} in {estimate.shards:,} files")
    typer.echo(f"NFE:          {estimate.nfe:,}")
    typer.echo(f"gigabytes:    {estimate.bytes / 1e9:.3g}")
    typer.echo(
        f"hours:        {estimate.seconds / 3600:.3g} in one process on {pipe.device} ({rows})"
    )


def _push(output: Path, repository: str | None) -> None:
    if repository is None:
        return
    from mctd_diffusers.hub import push_folder

    pushed = push_folder(output, repository, repo_type="dataset")
    typer.echo(f"pushed: {pushed.commit_url}")

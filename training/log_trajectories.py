r"""Logs denoising trajectories in many processes: what ``mctd log-trajectories`` does in one.

Process ``i`` of ``n`` writes the shards ``i``, ``i + n``, ...; what a shard holds depends on the
settings alone, so the dataset is the same in any number of processes. Stopped at any moment, the
same command, in as many processes or others, goes on from the finished files. ::

    accelerate launch training/log_trajectories.py --prompts prompts.txt --trajectories 1024 \
        --output data/trajectories

About 1.5 s a trajectory of the embedded model on one CPU core; ``--dry_run`` measures yours. What
the options mean is said by ``mctd log-trajectories --help``.
"""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm
from transformers import HfArgumentParser

from mctd_diffusers.commands.log_trajectories import (
    DEFAULT_GRIDS,
    DEFAULT_SCHEDULERS,
    open_pipeline,
    read_settings,
)
from mctd_diffusers.errors import MCTDError
from mctd_diffusers.hub import push_folder
from mctd_diffusers.trajectories.card import write_card
from mctd_diffusers.trajectories.files import shard_paths
from mctd_diffusers.trajectories.logging import begin_log, estimate_log, log_trajectories
from mctd_diffusers.trajectories.plan import LogSettings, shard_of

logger = logging.getLogger("log_trajectories")


@dataclass
class Options:
    """What to log, of which model, and where to."""

    prompts: str = field(metadata={"help": "a file of prompts, or 'tune' or 'report'"})
    trajectories: int = field(metadata={"help": "rows of the split"})
    output: str = field(
        default="data/trajectories", metadata={"help": "folder of the dataset, kept if it is there"}
    )
    split: str = field(default="train", metadata={"help": "the split that is written"})
    model: str = field(default="embedded", metadata={"help": "a pipeline's folder or repository"})
    reward: str = field(
        default="", metadata={"help": "a reward, a CLIPModel or module:function; '' for its own"}
    )
    siblings: int = field(default=4, metadata={"help": "draws of each stochastic edge"})
    strides: str = field(default="1,2,4,8", metadata={"help": "strides of the jumps"})
    grids: str = field(default=DEFAULT_GRIDS, metadata={"help": "numbers of steps, by turns"})
    schedulers: str = field(
        default=DEFAULT_SCHEDULERS, metadata={"help": "by turns; settings as in DDIM:eta=1"}
    )
    probes: int = field(default=3, metadata={"help": "states that siblings are drawn from"})
    guidance: float = field(default=4.0, metadata={"help": "weight of classifier-free guidance"})
    seed: int = field(default=0, metadata={"help": "of the choices and of all noise"})
    shard_size: int = field(default=16, metadata={"help": "trajectories in a file"})
    rows_per_call: int = field(default=0, metadata={"help": "latents in a call; 0: by the device"})
    dry_run: bool = field(default=False, metadata={"help": "say what it will take, and end"})
    push_to_hub: str = field(
        default="", metadata={"help": "repository to push the whole folder to; '' for none"}
    )


def settings_of(options: Options) -> LogSettings:
    """The settings of the split."""
    return read_settings(
        prompts=options.prompts,
        num_trajectories=options.trajectories,
        schedulers=options.schedulers,
        grids=options.grids,
        strides=options.strides,
        probes=options.probes,
        siblings=options.siblings,
        guidance_scale=options.guidance,
        seed=options.seed,
        shard_size=options.shard_size,
        rows_per_call=options.rows_per_call or None,
    )


def main() -> None:
    """Logs this process's shards; the first process begins the log, and ends it with its card."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    settings = settings_of(options)
    accelerator = Accelerator()
    pipe = open_pipeline(
        options.model, options.reward or None, settings, device=str(accelerator.device)
    )
    if options.dry_run:
        if accelerator.is_main_process:
            estimate = estimate_log(pipe, settings)
            hours = estimate.seconds / 3600 / accelerator.num_processes
            logger.info(
                "%d trajectories, %d files, %d NFE, %.3g gigabytes, %.3g hours in %d processes",
                *(estimate.trajectories, estimate.shards, estimate.nfe, estimate.bytes / 1e9),
                *(hours, accelerator.num_processes),
            )
        return

    folder = Path(options.output)
    command = shlex.join(["accelerate", "launch", *sys.argv])
    with accelerator.main_process_first():  # the others find the log begun
        settings = begin_log(pipe, settings, folder, split=options.split, command=command)
    mine = range(accelerator.process_index, settings.num_shards, accelerator.num_processes)
    paths = shard_paths(folder, options.split, settings.num_shards)
    missing = [shard_of(settings, number) for number in mine if not paths[number].exists()]
    written = log_trajectories(
        pipe,
        settings,
        folder,
        split=options.split,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    total, is_shown = sum(len(shard.rows) for shard in missing), accelerator.is_main_process
    with tqdm(total=total, unit=" trajectories", disable=not is_shown, mininterval=10) as bar:
        for number in written:
            bar.update(len(shard_of(settings, number).rows))

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        logger.info("card: %s", write_card(pipe, folder))
        if options.push_to_hub:
            pushed = push_folder(folder, options.push_to_hub, repo_type="dataset")
            logger.info("pushed: %s", pushed.commit_url)


if __name__ == "__main__":
    try:
        main()
    except MCTDError as error:
        sys.exit(f"log_trajectories: {error}")

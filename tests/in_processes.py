"""What `test_processes.py` has `accelerate launch` run, in several processes and in one.

Usage: in_processes.py MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from mctd_diffusers import cli
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.processes import process_state, search_in_processes
from mctd_diffusers.rewards import resolving
from tests.pipelines import tiny

PROMPTS = ["a red cat", "two dogs", "a bad idea", "a cup", "a blue car"]
QUICK = ["--steps", "4", "--compute", "2", "--rows-per-call", "4", "--trees"]


def redness(images: torch.Tensor, prompts: list[str]) -> list[float]:
    """Fails for one of the prompts."""
    if "a bad idea" in prompts:
        raise RuntimeError("no idea")
    return tiny.redness(images, prompts)


def main(model: str, folder: Path) -> None:
    """Search by the helper and by the command line; every process writes what it was given."""
    torch.set_num_threads(1)
    state = process_state()
    folder.mkdir(parents=True, exist_ok=True)
    pipe = MCTDPipeline.from_pretrained(model, reward_model=redness)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "compute": 2}
    call["rows_per_call"] = 4
    out = search_in_processes(pipe, PROMPTS, seed=3, together=2, **call)
    resolving._NAMED_REWARDS["redness"] = lambda: redness
    arguments = ["generate", *PROMPTS, "--model", model, "--reward", "redness", "--seed", "3"]
    arguments += [*QUICK, "--output", str(folder / "cli"), "--save-to", str(folder / "saved")]
    status = cli.main(arguments)
    again = ["--resume", str(folder / "saved"), "--output", str(folder / "again")]
    status_again = cli.main(["generate", "--model", model, "--reward", "brightness", *again])
    torch.save(
        {
            "prompts": [one.prompt for one in out.found],
            "seeds": [one.seed for one in out.found],
            "processes": [one.process for one in out.found],
            "images": [one.image and one.image.tobytes() for one in out.found],
            "rewards": [one.reward for one in out.found],
            "recipes": [one.recipe for one in out.found],
            "spent": [vars(one.spent) for one in out.found],
            "errors": out.errors,
            "nfe": out.ledger and out.ledger.total.nfe,
            "by_problem": out.ledger and {k: vars(v) for k, v in out.ledger.by_problem.items()},
            "status": (status, status_again),
        },
        folder / f"{state.process_index}.pt",
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

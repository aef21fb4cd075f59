"""Cells: the results of a benchmark in files, made once and read ever after.

A *cell* holds what one method did at one budget with one seed on a chunk of prompts, all in one
call, so that its waves fill. It is written when the call is over, so a benchmark that is stopped
loses the chunk under way at most, and one more method costs only its own cells. A cell that was
made with other weights or other code is made again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from mctd_diffusers.denoising.fusing import verdict_counts
from mctd_diffusers.evaluation.benchmark.plan import BenchPlan, Method, Task
from mctd_diffusers.evaluation.metrics import vendi_score
from mctd_diffusers.files import make_folder, write_text
from mctd_diffusers.search.runner import Finished, SearchResult


@dataclass(frozen=True)
class Run:
    """What a method made of one prompt, and spent on it.

    Attributes:
        prompt: the prompt, or the name of the problem.
        kind: of the prompt.
        proxy: reward of the winner, by the reward that was searched.
        gold: score of the winner by what no search sees; on mixtures the reward itself.
        all_right: whether the judge finds every fact right; ``None`` for other golds.
        log_likelihood_z: standardised log density of the winner; ``None`` where it is unknown.
        diversity: Vendi score of the (at most 8) best finished samples, from 1 to their number.
        finished: finished samples.
        nfe: evaluations of one latent.
        rows: useful rows through the network.
        decodes: latents decoded in full, that of the winner's picture left out.
        previews: latents decoded by the preview decoder.
        reward_calls: images scored by the reward.
        stop_reason: why the search ended.
        history: ``[nfe, best reward so far]`` at every sample better than those before.
        moves: how often each kind of move was made, where a search chooses among them.
        fusions: what became of groups of particles that were to be fused, by verdict.
    """

    prompt: str
    kind: str
    proxy: float
    gold: float
    all_right: bool | None
    log_likelihood_z: float | None
    diversity: float
    finished: int
    nfe: int
    rows: int
    decodes: int
    previews: int
    reward_calls: int
    stop_reason: str
    history: list[list[float]]
    moves: dict[str, int] = field(default_factory=dict)
    fusions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """What one call made and spent.

    Attributes:
        runs: one for each prompt of the task.
        calls: of the network.
        padded_rows: rows added to fill calls of the network.
        seconds: wall-clock seconds by phase, and ``"call"`` for all of it.
        cpu: CPU seconds by phase, and ``"total"``.
        peak_memory: bytes: of the accelerator in this call; on a CPU, of the process so far.
        prices: of a decode, a preview and a reward call in rows, as measured; empty on mixtures.
        machine: where it ran.
    """

    runs: list[Run]
    calls: int
    padded_rows: int
    seconds: dict[str, float]
    cpu: dict[str, float]
    peak_memory: int
    prices: dict[str, float]
    machine: dict[str, str]


@dataclass(frozen=True)
class Cell:
    """A finished task.

    Attributes:
        suite: as in the plan.
        method: label of the method.
        settings: of the method, as text.
        budget: label of the budget.
        budget_nfe: evaluations allowed on each image; ``None`` for a budget of seconds.
        seed: of the initial noises.
        num_steps: of the schedule.
        identity: hashes of what it was made from.
        drawn: the results.
    """

    suite: str
    method: str
    settings: str
    budget: str
    budget_nfe: int | None
    seed: int
    num_steps: int
    identity: dict[str, str]
    drawn: Drawn

    @property
    def useful_share(self) -> float:
        """Useful rows among all rows through the network."""
        rows = sum(run.rows for run in self.drawn.runs)
        return rows / (rows + self.drawn.padded_rows)


_TOP: Final = 8  # best finished samples whose diversity is measured


def run_of(
    task: Task,
    i: int,
    result: SearchResult,
    latents: Float[np.ndarray, "finished values"],
    *,
    gold: float,
    all_right: bool | None = None,
    log_likelihood_z: float | None = None,
) -> Run:
    """The run of one prompt, from what the search of it found."""
    best: Finished | None = result.best
    assert best is not None  # a budget pays for one sample at least
    spent = result.spent
    order = sorted(range(len(result.finished)), key=lambda row: -result.finished[row].reward)
    return Run(
        prompt=task.prompts[i],
        kind=task.kinds[i],
        proxy=best.reward,
        gold=gold,
        all_right=all_right,
        log_likelihood_z=log_likelihood_z,
        diversity=vendi_score(latents[order[:_TOP]]),
        finished=len(result.finished),
        nfe=spent.nfe,
        rows=spent.rows,
        decodes=spent.decodes,
        previews=spent.previews,
        reward_calls=spent.reward_calls,
        stop_reason=result.stop_reason,
        history=[[nfe, reward] for nfe, reward in result.history],
        moves=dict(Counter(made.move for made in result.moves_made)),
        fusions=verdict_counts(result.moves_made),
    )


@runtime_checkable
class Suite(Protocol):
    """Something that can be searched, with a gold to judge by."""

    def identity(self, method: Method) -> Mapping[str, str]:
        """Hashes of all that a cell of ``method`` depends on besides the settings."""
        ...

    def draw(self, task: Task) -> Drawn:
        """Search every prompt of ``task`` in one call.

        Raises:
            KeyboardInterrupt: Ctrl-C, also where there is a part of a result.
        """
        ...


@runtime_checkable
class OnCell(Protocol):
    """Is told of every cell."""

    def __call__(self, task: Task, path: Path, is_new: bool) -> None:
        """The cell of ``task`` lies in ``path``; made now, or found there."""
        ...


def make_cells(
    plan: BenchPlan, suite: Suite, folder: Path, on_cell: OnCell | None = None
) -> list[Cell]:
    """Make every cell that is not there yet.

    Args:
        plan: what is compared.
        suite: makes the samples and judges them.
        folder: of the cells; made where it is missing.
        on_cell: called after each cell, in the order of ``plan.tasks()``; those that are there
            already come first.

    Returns:
        All cells of the plan.

    Raises:
        ConfigError: the folder cannot be used.
        KeyboardInterrupt: Ctrl-C; the cells finished so far are kept.
    """
    make_folder(folder)
    identities = {method.label: dict(suite.identity(method)) for method in plan.methods}
    found: dict[str, Cell] = {}
    tasks = plan.tasks()
    for task in tasks:
        path = cell_path(folder, task)
        cell = read_cell(path)
        if cell is not None and cell.identity == identities[task.method.label]:
            found[task.name] = cell
            if on_cell is not None:
                on_cell(task, path, False)
    for task in tasks:
        if task.name in found:
            continue
        cell = Cell(
            suite=plan.suite,
            method=task.method.label,
            settings=task.method.settings,
            budget=task.budget.label,
            budget_nfe=task.nfe,
            seed=task.seed,
            num_steps=task.num_steps,
            identity=identities[task.method.label],
            drawn=suite.draw(task),
        )
        path = cell_path(folder, task)
        make_folder(path.parent)
        write_text(path, json.dumps(asdict(cell)), has_rivals=True)
        found[task.name] = cell
        if on_cell is not None:
            on_cell(task, path, True)
    return [found[task.name] for task in tasks]


def read_cells(plan: BenchPlan, folder: Path) -> list[Cell]:
    """Read the cells of a plan that are there, whatever weights and code made them."""
    cells = (read_cell(cell_path(folder, task)) for task in plan.tasks())
    return [cell for cell in cells if cell is not None]


def cell_path(folder: Path, task: Task) -> Path:
    """Where the cell of a task lies."""
    return folder / f"{task.name}.json"


def read_cell(path: Path) -> Cell | None:
    """Read a cell; ``None`` where there is none, or one that another version wrote."""
    try:
        entries: dict[str, Any] = json.loads(path.read_text("utf-8"))
        drawn: dict[str, Any] = entries.pop("drawn")
        runs = [Run(**run) for run in drawn.pop("runs")]
        return Cell(**entries, drawn=Drawn(runs, **drawn))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def code_versions(cells: Sequence[Cell]) -> dict[str, int]:
    """How many versions of code and weights made the cells of each method with more than one."""
    versions: dict[str, set[str]] = {}
    for cell in cells:
        versions.setdefault(cell.method, set()).add(json.dumps(cell.identity, sort_keys=True))
    return {method: len(found) for method, found in versions.items() if len(found) > 1}

"""What diagnoses say together: means over prompts, tables, and the files of a report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.diagnosis.terms import CONFIDENCE, Diagnosis, Level
from mctd_diffusers.evaluation.metrics import Interval, bootstrap_mean

_PARTS: Final = 4  # into which the schedule is cut where levels of several prompts are put together
_NAME_WIDTH: Final = 40


class Stage(NamedTuple):
    """Choices of all prompts in one part of the schedule.

    Attributes:
        label: such as ``"initial noise"`` or ``"steps 1-4"``.
        noise_levels: highest and lowest of the chosen ones.
        choices: how many.
        prompts: of so many prompts.
        proxy: mean regret by proxy over these prompts.
        gold: the same by gold.
        stands_out: whether the regret by gold is above 0, corrected for the number of stages, and
            worth a name (`Diagnosis.least_regret`).
    """

    label: str
    noise_levels: tuple[float, float]
    choices: int
    prompts: int
    proxy: Interval
    gold: Interval
    stands_out: bool


@dataclass(frozen=True)
class Summary:
    """Means over prompts, with bootstrap intervals; the means of the three terms add up.

    Attributes:
        prompts: how many.
        winner: gold of the winners.
        plain: gold of the pools, nothing selected.
        shortfall: what the winners lack.
        ceiling: of that, the model's part.
        reward_error: of that, the reward's part.
        regret: of that, the search's part, which is the sum of the next two.
        regret_missed: regret where the search found less reward than the pool has.
        regret_reached: regret where it found as much or more: over-optimisation if above 0.
        missed: share of prompts where it found less.
        stages: regret by part of the schedule, noisiest first.
    """

    prompts: int
    winner: Interval
    plain: Interval
    shortfall: Interval
    ceiling: Interval
    reward_error: Interval
    regret: Interval
    regret_missed: Interval
    regret_reached: Interval
    missed: float
    stages: tuple[Stage, ...]

    @property
    def went_wrong(self) -> Stage | None:
        """The stage of the greatest regret by gold, of those that stand out."""
        outstanding = [stage for stage in self.stages if stage.stands_out]
        return max(outstanding, key=lambda stage: stage.gold.mean, default=None)


def summarise(diagnoses: Sequence[Diagnosis]) -> Summary:
    """Means over prompts.

    Raises:
        ConfigError: there are no diagnoses.
    """
    if not diagnoses:
        raise ConfigError("there are no diagnoses: a mean needs at least one prompt")

    def mean(term: Callable[[Diagnosis], float]) -> Interval:
        return bootstrap_mean(np.array([term(diagnosis) for diagnosis in diagnoses], dtype=float))

    return Summary(
        prompts=len(diagnoses),
        winner=mean(lambda d: d.winner.gold),
        plain=mean(lambda d: d.mean.gold),
        shortfall=mean(lambda d: d.shortfall),
        ceiling=mean(lambda d: d.ceiling),
        reward_error=mean(lambda d: d.reward_error),
        regret=mean(lambda d: d.regret),
        regret_missed=mean(lambda d: 0.0 if d.reached else d.regret),
        regret_reached=mean(lambda d: d.regret if d.reached else 0.0),
        missed=mean(lambda d: not d.reached).mean,
        stages=_stages(diagnoses),
    )


def _stages(diagnoses: Sequence[Diagnosis]) -> tuple[Stage, ...]:
    """Levels put together: initial noises, then equal parts of the schedule."""
    found: dict[tuple[int, int], list[list[Level]]] = {}
    for diagnosis in diagnoses:
        own: dict[tuple[int, int], list[Level]] = {}
        for level in diagnosis.levels:
            own.setdefault(_part_of(level, diagnosis.num_steps), []).append(level)
        for part, levels in own.items():
            found.setdefault(part, []).append(levels)
    tail = (1 - CONFIDENCE) / max(len(found), 1)
    least = np.mean([diagnosis.least_regret for diagnosis in diagnoses])
    stages = []
    for part, prompts in sorted(found.items()):
        gold = _means(prompts, lambda level: level.gold.mean)
        noise = [level.noise_level for levels in prompts for level in levels]
        stages.append(
            Stage(
                label="initial noise" if part == _NOISE else f"steps {part[0]}-{part[1]}",
                noise_levels=(max(noise), min(noise)),
                choices=len(noise),
                prompts=len(prompts),
                proxy=bootstrap_mean(_means(prompts, lambda level: level.proxy.mean)),
                gold=bootstrap_mean(gold),
                # Of one prompt alone the bootstrap knows no spread.
                stands_out=len(gold) > 1
                and bool(gold.mean() >= least)
                and bootstrap_mean(gold, confidence=1 - tail).low > 0,
            )
        )
    return tuple(stages)


_NOISE: Final = (0, 0)


def _part_of(level: Level, num_steps: int) -> tuple[int, int]:
    """First and last step index of the part of the schedule in which a level lies."""
    if level.step_index == 0:
        return _NOISE
    cuts = [num_steps * cut // _PARTS for cut in range(_PARTS + 1)]
    part = next(cut for cut in range(_PARTS) if level.step_index <= cuts[cut + 1])
    return cuts[part] + 1, cuts[part + 1]


def _means(
    prompts: Sequence[Sequence[Level]], regret: Callable[[Level], float]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``[prompts]`` mean regret of each prompt."""
    return np.array([np.mean([regret(level) for level in levels]) for levels in prompts])


# --- tables -------------------------------------------------------------------------------------


def report_text(diagnoses: Sequence[Diagnosis], about: Sequence[str] = ()) -> str:
    """A report in Markdown: the sum, where the path goes wrong, and every prompt.

    Args:
        diagnoses: one an image.
        about: lines on what was diagnosed, for the head.
    """
    summary = summarise(diagnoses)
    spent = sum(diagnosis.spent.nfe for diagnosis in diagnoses)
    seconds = sum(diagnosis.seconds for diagnosis in diagnoses)
    first = diagnoses[0]
    parts = [
        "# Where the search falls short",
        *about,
        f"`{first.strategy}`, {summary.prompts} prompt{'s' * (summary.prompts != 1)}, a pool of "
        f"{first.pool} plain samples each. The diagnosis took {spent} NFE and {seconds:.0f} s, "
        "none of it in the search's own ledger.",
        _sum_table(summary, top_is_known=first.top_gold is not None),
        _verdict(summary),
        "## Level by level",
        _stage_table(summary),
        _stage_verdict(summary),
        "## Prompt by prompt",
        _prompt_table(diagnoses),
        _EXPLANATION,
    ]
    return "\n\n".join(parts) + "\n"


_EXPLANATION: Final = """\
*Shortfall* is the greatest possible gold less the gold of the winner, and is the sum of the three
terms for every prompt, by definition: the *model's ceiling* is what the best of the pool lacks, the
*reward's error* what the pool's pick by reward has less gold than its best, the *search's regret*
what the winner has less gold than that pick. A negative regret means that the search did better
than picking from the whole pool. The pool is finite, so the model can do at least as well as its
best: the ceiling is an upper bound of the model's part. *Level* regrets are what the best rejected
sibling is worth more than the chosen one, in the mean over fresh continuations, corrected for the
winner's curse; they do not add up to the search's regret."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    columns = [[*cells] for cells in zip(head, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _plain(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _sum_table(summary: Summary, *, top_is_known: bool) -> str:
    """The terms and their sum."""
    total = summary.shortfall.mean

    def row(name: str, interval: Interval) -> list[str]:
        share = f"{interval.mean / total:.0%}" if total > 0 else "-"
        return [name, _signed(interval), share]

    top = "the greatest possible gold" if top_is_known else "the pool's best"
    missed = f"{summary.missed:.0%} of prompts"
    return _table(
        ["mean over prompts", "gold", "share"],
        [
            row("model's ceiling", summary.ceiling),
            row("+ reward's error", summary.reward_error),
            row("+ search's regret", summary.regret),
            row(f"of which: less reward found than in the pool ({missed})", summary.regret_missed),
            row("of which: as much reward or more", summary.regret_reached),
            row(f"= shortfall from {top}", summary.shortfall),
            ["winner", _plain(summary.winner), ""],
            ["plain sample", _plain(summary.plain), ""],
        ],
    )


def _verdict(summary: Summary) -> str:
    """What the sum says, in words."""
    terms = {
        "the model's ceiling: no search over this model gives more than a better pool would": (
            summary.ceiling
        ),
        "the reward's error: the reward ranks the samples otherwise than gold does": (
            summary.reward_error
        ),
        "the search's regret: it finds worse samples than a plain pool holds": summary.regret,
    }
    if summary.shortfall.mean <= 0:
        return "The winners lack nothing."
    name, _ = max(terms.items(), key=lambda item: item[1].mean)
    low, high = summary.regret.low, summary.regret.high
    if high < 0:
        search = "The search does better than picking from the pool by the same reward."
    elif low > 0:
        search = "The search does worse than picking from the pool by the same reward."
    else:
        search = "Whether the search does better than picking from the pool cannot be told."
    return f"The largest term is {name}. {search}"


def _stage_table(summary: Summary) -> str:
    """Regret by part of the schedule."""
    if not summary.stages:
        return "The winners' paths have no choices among siblings."
    rows = []
    for stage in summary.stages:
        high, low = stage.noise_levels
        noise = f"{high:.2f}" if high == low else f"{high:.2f} to {low:.2f}"
        rows.append(
            [
                stage.label,
                noise,
                str(stage.choices),
                str(stage.prompts),
                _signed(stage.proxy),
                _signed(stage.gold),
                "yes" if stage.stands_out else "no",
            ]
        )
    head = [
        "choices at", "noise level", "choices", "prompts", "regret by reward", "regret by gold",
        "stands out",
    ]  # fmt: skip
    return _table(head, rows)


def _stage_verdict(summary: Summary) -> str:
    """Where paths go wrong, in words."""
    stage = summary.went_wrong
    if stage is None:
        return (
            "No level stands out: better siblings were not passed over more than chance explains."
        )
    at = "the initial noise" if stage.label == "initial noise" else stage.label
    why = (
        "and the reward of their continuations says so too: the search judged too early or too few"
        if stage.proxy.low > 0
        else "which the reward of their continuations does not tell"
    )
    high, low = stage.noise_levels
    noise = f"{high:.2f}" if high == low else f"{high:.2f} to {low:.2f}"
    return (
        f"Paths go wrong most at {at} (noise level {noise}): better siblings were passed over, "
        f"{why}."
    )


def _prompt_table(diagnoses: Sequence[Diagnosis]) -> str:
    """The terms of every prompt."""
    rows = []
    for diagnosis in diagnoses:
        level = diagnosis.went_wrong
        where = "-"
        if level is not None:
            place = "noise" if level.step_index == 0 else f"step {level.step_index}"
            where = f"{place} ({level.gold.mean:+.3f}, noise {level.noise_level:.2f})"
        rows.append(
            [
                _shortened(diagnosis.prompt),
                f"{diagnosis.winner.gold:.3f}",
                f"{diagnosis.shortfall:+.3f}",
                f"{diagnosis.ceiling:+.3f}",
                f"{diagnosis.reward_error:+.3f}",
                f"{diagnosis.regret:+.3f}",
                "yes" if diagnosis.reached else "no",
                where,
            ]
        )
    head = [
        "prompt", "winner's gold", "shortfall", "= ceiling", "+ reward's error", "+ regret",
        "reward reached", "goes wrong at",
    ]  # fmt: skip
    return _table(head, rows)


def _shortened(prompt: str) -> str:
    text = " ".join(prompt.split()).replace("|", "/")
    return text if len(text) <= _NAME_WIDTH else text[: _NAME_WIDTH - 1] + "…"


# --- files --------------------------------------------------------------------------------------


def report_data(diagnoses: Sequence[Diagnosis]) -> dict[str, Any]:
    """Everything as plain data (JSON): the summary, and every prompt with its levels."""
    return {
        "summary": _with_intervals(summarise(diagnoses)),
        "prompts": [
            {
                **{name: _named(part) for name, part in vars(diagnosis).items()},
                "spent": asdict(diagnosis.spent),
                "levels": [
                    {name: _named(part) for name, part in vars(level).items()}
                    for level in diagnosis.levels
                ],
                "shortfall": diagnosis.shortfall,
                "ceiling": diagnosis.ceiling,
                "reward_error": diagnosis.reward_error,
                "regret": diagnosis.regret,
                "reached": diagnosis.reached,
                "went_wrong": None
                if diagnosis.went_wrong is None
                else diagnosis.went_wrong.step_index,
            }
            for diagnosis in diagnoses
        ],
    }


def _named(part: Any) -> Any:
    """A named tuple as a dict; all else as it is."""
    return part._asdict() if hasattr(part, "_asdict") else part


def _with_intervals(summary: Summary) -> dict[str, Any]:
    data = {name: _named(part) for name, part in vars(summary).items()}
    data["stages"] = [
        {name: _named(part) for name, part in stage._asdict().items()} for stage in summary.stages
    ]
    worst = summary.went_wrong
    return {**data, "went_wrong": None if worst is None else worst.label}


def write_report(
    folder: str | os.PathLike[str], diagnoses: Sequence[Diagnosis], about: Sequence[str] = ()
) -> list[Path]:
    """Write ``report.md`` and ``diagnosis.json`` into a folder, which is made if need be.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report, data = folder / "report.md", folder / "diagnosis.json"
    report.write_text(report_text(diagnoses, about), encoding="utf-8")
    data.write_text(json.dumps(report_data(diagnoses), indent=1) + "\n", encoding="utf-8")
    return [report, data]

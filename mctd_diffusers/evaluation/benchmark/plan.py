"""What a benchmark compares: methods, budgets, seeds and prompts, cut into tasks.

Pure data, no torch. A *task* is one method at one budget with one seed on a chunk of prompts; its
results are a *cell*, see `cells`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.runner import Strategy
from mctd_diffusers.search.strategies import BestOfN

PLAIN: Final = "plain"
"""Label of one sample without selection, which is the stock pipeline's picture."""
REFERENCE: Final = "best_of_n"
"""Label of the method that every search has to beat."""
MORE_STEPS: Final = "more_steps"
"""Label of the rival without a search: one sample of as many steps as the budget has NFE."""

_BUDGET = re.compile(r"(?P<amount>\d+(?:\.\d+)?)(?P<unit>x|s|)")


class BenchBudget(NamedTuple):
    """What a method may spend on each image.

    Attributes:
        amount: how much, above 0.
        unit: ``"x"`` for plain samples' worth of NFE, ``"nfe"``, or ``"s"`` for seconds.
    """

    amount: float
    unit: Literal["x", "nfe", "s"]

    @property
    def label(self) -> str:
        """As it is written: ``8x``, ``200`` or ``60s``."""
        return f"{self.amount:g}{'' if self.unit == 'nfe' else self.unit}"

    def nfe(self, num_steps: int) -> int | None:
        """Evaluations of one latent, where a plain sample takes ``num_steps``; else ``None``."""
        if self.unit == "s":
            return None
        return math.floor(self.amount * (num_steps if self.unit == "x" else 1) + 1e-9)

    def seconds(self, images: int) -> float | None:
        """Seconds of a call for so many images, each of which is given the amount."""
        return self.amount * images if self.unit == "s" else None


ONE_SAMPLE: Final = BenchBudget(1.0, "x")


def parse_budgets(text: str) -> tuple[BenchBudget, ...]:
    """Reads budgets with commas between them.

    Args:
        text: such as ``"2x,8x"`` (times the NFE of a plain sample), ``"200"`` (NFE) or ``"60s"``
            (seconds for each image).

    Raises:
        ConfigError: one cannot be read, is below the plain sample, or is named twice.
    """
    budgets = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = _BUDGET.fullmatch(part)
        unit = {"x": "x", "s": "s", "": "nfe"}[found["unit"]] if found else ""
        amount = float(found["amount"]) if found else 0.0
        if not unit or amount < (0 if unit == "s" else 1) or not amount:
            raise ConfigError(
                f"budget {part!r} in {text!r}: give 8x for eight times the NFE of a plain sample "
                "(1x at least), 200 for so many NFE, or 60s for seconds an image"
            )
        if unit == "nfe" and not amount.is_integer():
            raise ConfigError(f"budget {part!r} in {text!r}: NFE are a whole number")
        budgets.append(BenchBudget(amount, unit))  # type: ignore[arg-type]  # one of the three
    for budget in budgets:
        if budgets.count(budget) > 1:
            raise ConfigError(f"budget {budget.label!r} is named twice in {text!r}: name it once")
    if not budgets:
        raise ConfigError(f"no budget in {text!r}: name at least one, such as 8x")
    return tuple(budgets)


class Method(NamedTuple):
    """A search to compare.

    Attributes:
        label: its name in tables and files.
        strategy: the algorithm and its settings.
    """

    label: str
    strategy: Strategy

    @property
    def settings(self) -> str:
        """The settings as text."""
        if self.label == MORE_STEPS:
            return "one sample of as many steps as the budget has NFE"
        return repr(self.strategy)


@dataclass(frozen=True)
class Task:
    """One method at one budget with one seed on a chunk of prompts: what makes a cell.

    Attributes:
        method: what searches.
        budget: what it may spend on each image.
        seed: of the initial noises.
        prompts: the chunk.
        kinds: kind of each prompt.
        num_steps: of the schedule; of ``more_steps`` as many as the whole budget pays.
        nfe: evaluations allowed on each image; ``None`` for a budget of seconds.
        settings_hash: of all that the results depend on, except for weights and code.
    """

    method: Method
    budget: BenchBudget
    seed: int
    prompts: tuple[str, ...]
    kinds: tuple[str, ...]
    num_steps: int
    nfe: int | None
    settings_hash: str

    @property
    def seconds(self) -> float | None:
        """Seconds allowed for the call."""
        return self.budget.seconds(len(self.prompts))

    @property
    def name(self) -> str:
        """Of the cell's file, below the folder of the cells and without its suffix."""
        where = f"{self.budget.label}-s{self.seed}-{self.settings_hash}"
        return f"{folder_name(self.method.label)}/{where}"


@dataclass(frozen=True)
class BenchPlan:
    """What is compared, and on what.

    Attributes:
        suite: ``"embedded"``, ``"mixture"``, or the model's folder or repository.
        prompts: at least one, each once.
        kinds: kind of each prompt.
        methods: the plain sample and the reference are added where they are missing.
        budgets: at least one; sorted here, seconds last. At ``1x`` there is the plain sample alone.
        seeds: of the initial noises, at least one.
        num_steps: of the schedule.
        guidance_scale: of classifier-free guidance; no meaning on mixtures.
        rows_per_call: latents in a call of the network; ``None`` for the pipeline's default.
        searched: what else results depend on, as text: the reward, the gold, the scheduler.
        prompts_per_call: prompts in a chunk.
        calls_per_step: NFE of a step of the scheduler, 1 or 2. Budgets are the same for all: with 2
            a plain sample has half the steps, and a search half the samples.

    Raises:
        ConfigError: nothing to compare, something named twice, or a method that no budget pays for.
    """

    suite: str
    prompts: tuple[str, ...]
    kinds: tuple[str, ...]
    methods: tuple[Method, ...]
    budgets: tuple[BenchBudget, ...]
    seeds: tuple[int, ...] = (0,)
    num_steps: int = 16
    guidance_scale: float = 4.0
    rows_per_call: int | None = None
    searched: str = ""
    prompts_per_call: int = 24
    calls_per_step: int = 1

    def __post_init__(self) -> None:
        for name in ("prompts", "methods", "budgets", "seeds"):
            given = getattr(self, name)
            if not given:
                raise ConfigError(f"{name} is empty: name at least one")
            labels = [each.label if isinstance(each, Method) else each for each in given]
            for label in labels:
                if labels.count(label) > 1:
                    raise ConfigError(f"{name}: {label!r} is named twice, name it once")
        if len(self.kinds) != len(self.prompts):
            raise ConfigError(
                f"there are {len(self.prompts)} prompts and {len(self.kinds)} kinds: give one each"
            )
        always = (Method(PLAIN, BestOfN(n=1)), Method(REFERENCE, BestOfN()))
        named = {method.label: method for method in self.methods}
        first = tuple(named.pop(method.label, method) for method in always)
        object.__setattr__(self, "methods", (*first, *named.values()))
        object.__setattr__(self, "budgets", tuple(sorted(self.budgets, key=self._size)))
        for method in self.methods[1:]:
            if all(self.refusal(method, budget) for budget in self.budgets):
                raise ConfigError(
                    f"method {method.label!r} can be run at no budget of "
                    f"{', '.join(budget.label for budget in self.budgets)}: "
                    f"{self.refusal(method, self.budgets[-1])}; raise a budget, or leave it out"
                )

    def _size(self, budget: BenchBudget) -> tuple[bool, float]:
        nfe = budget.nfe(self.num_steps)
        return nfe is None, budget.amount if nfe is None else nfe

    def refusal(self, method: Method, budget: BenchBudget) -> str | None:
        """Why a method is not run at a budget, in words; ``None`` if it is."""
        nfe = budget.nfe(self.num_steps)
        if nfe == self.num_steps and method.label != PLAIN:
            return "this is the plain sample"
        if nfe is None:
            is_fixed = method.label == MORE_STEPS
            return "it has no steps for a number of seconds" if is_fixed else None
        least = self.num_steps if method.label == MORE_STEPS else None
        least = least or method.strategy.least_evaluations(self.num_steps) * self.calls_per_step
        return None if nfe >= least else f"it needs {least} NFE, and {budget.label} pays {nfe}"

    def left_out(self) -> list[str]:
        """Sentences on the methods that are left out at budgets which do not pay for them."""
        return [
            f"{method.label} at {budget.label}: {why}"
            for budget in self.budgets
            if budget.nfe(self.num_steps) != self.num_steps
            for method in self.methods[1:]
            if (why := self.refusal(method, budget)) is not None
        ]

    def runs(self) -> list[tuple[BenchBudget, Method]]:
        """Budgets and methods, plain first, then by budget."""
        plain, *methods = self.methods
        return [(ONE_SAMPLE, plain)] + [
            (budget, method)
            for budget in self.budgets
            for method in methods
            if self.refusal(method, budget) is None
        ]

    def tasks(self) -> list[Task]:
        """All tasks: by seed, then budget, then method, so that a part is worth reading."""
        return [
            self._task(method, budget, seed, rows)
            for seed in self.seeds
            for budget, method in self.runs()
            for rows in self._chunks()
        ]

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.prompts), self.prompts_per_call):
            yield slice(start, start + self.prompts_per_call)

    def _task(self, method: Method, budget: BenchBudget, seed: int, rows: slice) -> Task:
        num_steps, nfe = self.num_steps, budget.nfe(self.num_steps)
        if method.label in (PLAIN, MORE_STEPS):
            num_steps = (nfe or num_steps) // self.calls_per_step
        parts = (
            self.suite,
            self.prompts[rows],
            num_steps,
            float(self.guidance_scale),
            self.rows_per_call,
            self.searched,
            method.settings,
            nfe,
            budget.seconds(1),
            seed,
        )
        return Task(
            method=method,
            budget=budget,
            seed=seed,
            prompts=self.prompts[rows],
            kinds=self.kinds[rows],
            num_steps=num_steps,
            nfe=nfe,
            settings_hash=hashlib.sha256(repr(parts).encode()).hexdigest()[:10],
        )


def folder_name(label: str) -> str:
    """A label as the name of a folder, another one for each label."""
    plain = re.sub(r"[^\w.=-]+", "_", label)
    if plain != label:
        plain += "-" + hashlib.sha256(label.encode()).hexdigest()[:6]
    return plain


def by_turns(kinds: Sequence[str]) -> list[int]:
    """Positions in an order in which the kinds take turns, so that any beginning has them all.

    >>> by_turns(["a", "a", "a", "b", "b"])
    [0, 3, 1, 4, 2]
    """
    seen: dict[str, int] = {}
    first = {kind: place for place, kind in reversed(list(enumerate(kinds)))}
    keys = []
    for place, kind in enumerate(kinds):
        seen[kind] = seen.get(kind, 0) + 1
        keys.append((seen[kind], first[kind], place))
    return [place for _, _, place in sorted(keys)]

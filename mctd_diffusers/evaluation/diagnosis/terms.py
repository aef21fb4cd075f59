"""The terms of a diagnosis, and how the regret of a choice is estimated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.metrics import Interval
from mctd_diffusers.search.environment import Counts, Values
from mctd_diffusers.search.settings import check_setting

CONFIDENCE: Final = 0.95
_HALVES_CORRELATION: Final = 0.36  # E[max of n normals]^2 / (n - 1), which is greatest for n = 3
_LEAST_SHARE: Final = 0.1  # of what is at stake, for a regret to be worth a name


@dataclass(frozen=True)
class Effort:
    """What a diagnosis spends on each image; :func:`planned_nfe` says how much that is.

    Attributes:
        pool: plain samples, at least 1. A larger pool moves shortfall from the model's ceiling to
            the reward's error.
        siblings: rejected siblings that are looked at on a level, at least 1: those of which the
            search thought most. With fewer than there are, a level's regret is a lower bound.
        continuations: of each of them, and of the chosen one; even and at least 2, since one half
            names the best sibling and the other says what it is worth.
        stride: schedule steps that each edge of a continuation crosses.
        eta: share of fresh noise in continuations, above 0 and at most 1; their last edge is
            deterministic, as in a search.

    Raises:
        ConfigError: a setting outside its range.
    """

    pool: int = 64
    siblings: int = 4
    continuations: int = 8
    stride: int = 1
    eta: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("pool", 1), ("siblings", 1), ("continuations", 2), ("stride", 1)):
            check_setting(name, getattr(self, name), least, whole=True)
        check_setting("eta", self.eta, 0, 1)
        if not self.eta:
            raise ConfigError("eta is 0, so all continuations would be one; give more, up to 1.")
        if self.continuations % 2:
            raise ConfigError(
                f"continuations is {self.continuations}; give an even number: one half names the "
                "best sibling, the other says what it is worth."
            )


class Scores(NamedTuple):
    """Scores of one sample, or means over several.

    Attributes:
        proxy: by the reward that was searched.
        gold: by the judge that no search saw.
    """

    proxy: float
    gold: float


class Regret(NamedTuple):
    """What the best rejected sibling is worth more than the chosen one; negative if less.

    Attributes:
        mean: the estimate.
        standard_error: of it; 0 where it is exact.
        degrees: of freedom of the standard error.
        chosen: mean of the chosen one.
        best: mean of the best rejected sibling, of its own half of the continuations.
    """

    mean: float
    standard_error: float
    degrees: int
    chosen: float
    best: float

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """The estimate with its t interval."""
        margin = self.standard_error * t_quantile(0.5 + confidence / 2, self.degrees)
        return Interval(self.mean, self.mean - margin, self.mean + margin)


@dataclass(frozen=True)
class Level:
    """One choice among siblings on the winner's path.

    Attributes:
        node: row of the chosen one.
        move: what made it: ``"draw"``, ``"step"``, ``"renoise"`` or ``"perturb"``.
        step_index: where it stands in the schedule, 0 is noisiest.
        noise_level: standard deviation of the noise there, as the schedule has it.
        rejected: siblings that the search rejected.
        looked_at: how many of them were continued.
        proxy: regret by the searched reward: what the search misjudged by its own measure.
        gold: regret by gold: what it misjudged in truth.
    """

    node: int
    move: str
    step_index: int
    noise_level: float
    rejected: int
    looked_at: int
    proxy: Regret
    gold: Regret


@dataclass(frozen=True)
class Diagnosis:
    """Where the search of one image falls short; the identity stands in the module's head.

    Attributes:
        prompt: what was drawn.
        strategy: name of the search.
        num_steps: of its schedule.
        top_gold: the greatest possible gold; ``None`` where it is not known and the pool's best
            stands for it, so that the ceiling is 0.
        winner: of the search.
        pick: the pool's best by proxy.
        best: the pool's best by gold.
        mean: over the pool.
        pool: its size.
        reused: how many of the pool the search had made itself.
        levels: choices on the winner's path, noisiest first.
        spent: by the diagnosis, on this image.
        seconds: wall-clock seconds that it took.
    """

    prompt: str
    strategy: str
    num_steps: int
    top_gold: float | None
    winner: Scores
    pick: Scores
    best: Scores
    mean: Scores
    pool: int
    reused: int
    levels: tuple[Level, ...]
    spent: Counts
    seconds: float

    @property
    def top(self) -> float:
        """What the shortfall is measured from."""
        return self.best.gold if self.top_gold is None else self.top_gold

    @property
    def shortfall(self) -> float:
        """What the winner lacks: the sum of the three terms."""
        return self.top - self.winner.gold

    @property
    def ceiling(self) -> float:
        """What the best of the pool lacks: the model's part, at most."""
        return self.top - self.best.gold

    @property
    def reward_error(self) -> float:
        """What picking from the pool by the searched reward gives away."""
        return self.best.gold - self.pick.gold

    @property
    def regret(self) -> float:
        """What the search gives away against picking from the pool; negative if it is ahead."""
        return self.pick.gold - self.winner.gold

    @property
    def reached(self) -> bool:
        """Whether the search found a reward as high as the pool's highest.

        Where it did and regret is above 0, it did what it was asked to: more reward, less gold is
        over-optimisation. Where it did not, it searched too little, or in the wrong place.
        """
        return self.winner.proxy > self.pick.proxy or math.isclose(
            self.winner.proxy, self.pick.proxy, rel_tol=1e-6
        )

    @property
    def least_regret(self) -> float:
        """Regret by gold that is worth a name.

        A tenth of the shortfall, and of what the best of the pool is above its mean, the most that
        selection can give.
        """
        return _LEAST_SHARE * max(self.shortfall, self.best.gold - self.mean.gold)

    @property
    def went_wrong(self) -> Level | None:
        """The level of the greatest regret by gold, of those that stand out; ``None`` if none does.

        A level stands out where its interval lies above 0 though it is one of several (Bonferroni),
        and its regret is worth a name.
        """
        outstanding = [
            level
            for level in self.levels
            if stands_out(level.gold, len(self.levels)) and level.gold.mean >= self.least_regret
        ]
        return max(outstanding, key=lambda level: level.gold.mean, default=None)


def stands_out(regret: Regret, levels: int) -> bool:
    """Whether a regret is above 0, though one of so many is looked for (Bonferroni)."""
    return regret.interval(1 - (1 - CONFIDENCE) / levels).low > 0


def sibling_regret(chosen: Values, siblings: Sequence[Values]) -> Regret:
    """Regret of a choice, from independent continuations, free of the winner's curse.

    The sibling with the highest mean is worth less than that mean, for it was chosen by it. So one
    half of the continuations names the best sibling and the other half says what it is worth, and
    then the other way round; the mean of both is never above the true worth of the best sibling in
    expectation. The standard error takes one variance for the continuations of all, and counts the
    correlation of the two estimates, which is greatest where all siblings are worth the same.

    Args:
        chosen: ``[continuations]`` scores of continuations of the chosen one; a single one where
            its score is exact.
        siblings: the same for each rejected sibling; at least one.

    >>> sibling_regret(np.array([0.5]), [np.array([0.25]), np.array([0.75])]).mean
    0.25
    """
    first = np.array([_half(scores, 0).mean() for scores in siblings])
    second = np.array([_half(scores, 1).mean() for scores in siblings])
    named, named_too = int(first.argmax()), int(second.argmax())
    best = float(second[named] + first[named_too]) / 2
    everyone = [chosen, *siblings]
    degrees = sum(len(scores) - 1 for scores in everyone)
    squares = sum(float(((scores - scores.mean()) ** 2).sum()) for scores in everyone)
    variance = squares / max(degrees, 1)
    share = (_share(siblings[named]) + _share(siblings[named_too])) / 2
    if len(siblings) > 1:
        share *= 1 + _HALVES_CORRELATION
    share += _share(chosen)
    worth = float(chosen.mean())
    return Regret(best - worth, float(np.sqrt(variance * share)), degrees, worth, best)


def _half(scores: Values, which: int) -> Values:
    """Every second score; all of them where there is only one, which is exact."""
    return scores if len(scores) == 1 else scores[which::2]


def _share(scores: Values) -> float:
    """Variance of a mean, in units of that of one score."""
    return 0.0 if len(scores) == 1 else 1 / len(scores)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t by its expansion about the normal one, to 0.01 from 5 degrees on.

    With 0 degrees there is nothing uncertain, and the answer is the normal quantile.

    Reference: Abramowitz and Stegun, "Handbook of mathematical functions" (1964), 26.7.5.

    >>> round(t_quantile(0.975, 10), 2)
    2.23
    """
    z = NormalDist().inv_cdf(probability)
    if not degrees:
        return z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))

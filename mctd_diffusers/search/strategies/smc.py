"""SMC: a population of particles, weighted and resampled while it is denoised.

Feynman-Kac steering (Singhal et al., 2025, arXiv 2501.06848). ``k`` particles start from initial
noises. At chosen levels of the schedule

1. value: ``r``, the reward of each particle's denoised estimate;
2. weigh: multiply each weight by the potential ``G`` of its lineage, see ``potential``;
3. resample, if the effective sample size is low: particles are drawn again by their weights
   (systematically), and weights start anew from their mean, which joins the normalising constant;
4. propagate: each particle steps on, with noise of its own.

Finished samples are scored, and a last potential makes the product along each lineage
``exp(reward / temperature)`` exactly. So the weighted population estimates
``p(x) exp(reward(x) / temperature) / Z``, p being the law of plain samples, and its mean weight is
an unbiased estimate of ``Z`` (where ``temperature`` is given).

Against the published code: weights are accumulated where resampling is skipped (there they are
dropped); particles are valued, resampled and only then propagated, so that copies differ by their
next edge already; resampling is systematic instead of multinomial; nothing is clipped. Its
``lambda`` is ``1 / temperature``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

import numpy as np

from mctd_diffusers.errors import BudgetError, ConfigError
from mctd_diffusers.search.budget import UNLIMITED
from mctd_diffusers.search.environment import Asks, Counts, Values
from mctd_diffusers.search.moves import (
    back_up,
    denoise,
    draw,
    generator_for,
    reward,
    step,
    value,
)
from mctd_diffusers.search.particles import ess, log_mean_weight, systematic
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.settings import check_setting
from mctd_diffusers.search.strides import constant_strides

Potential = Literal["diff", "max", "add"]

_PARTICLES_OF_A_PASS: Final = 16  # where no budget bounds their number


class Population(NamedTuple):
    """Weighted particles, each with its lineage.

    Attributes:
        nodes: ``[P]`` rows of the tree; one stands there once for each copy of it.
        log_weights: ``[P]`` since the last resampling.
        values: ``[levels, P]`` values of each particle's ancestors at the levels that were weighed,
            reward units.
        log_normaliser: log of the mean weights that were folded in by resampling.
    """

    nodes: list[int]
    log_weights: Values
    values: Values
    log_normaliser: float

    @property
    def log_evidence(self) -> float:
        """Estimate of ``log Z``; of finished samples its exponential is unbiased."""
        return self.log_normaliser + log_mean_weight(self.log_weights)

    def resampled(self, uniform: float) -> Population:
        """The population drawn again by its weights, which become equal."""
        ancestors = systematic(self.log_weights, uniform)
        return Population(
            [self.nodes[ancestor] for ancestor in ancestors],
            np.zeros(len(ancestors)),
            self.values[:, ancestors],
            self.log_evidence,
        )


def telescoped(values: Values, potential: Potential) -> Values:
    """Log of the product of all potentials along each lineage, in units of the temperature.

    Args:
        values: ``[levels, P]`` along the lineages, in units of the temperature.
        potential: see :class:`SMC`.

    Returns:
        ``[P]``; zeros before the first level.
    """
    if potential == "max":
        return np.asarray(np.maximum.accumulate(values).sum(axis=0))
    if potential == "add":
        return np.asarray(np.cumsum(values, axis=0).sum(axis=0))
    return values[-1] if len(values) else np.zeros(values.shape[1])


@dataclass(frozen=True)
class SMC:
    """Sequential Monte Carlo with potentials of the values along the path.

    Attributes:
        particles: of a pass; ``None``: as many as the budget pays for, in one pass.
        temperature: in reward units, above 0: lower is greedier; ``None``: ``temperature_share``
            times the standard deviation of the particles' values where they are first weighed.
        temperature_share: see there; above 0.
        potential: of a level, where ``r_1 ... r_i`` are the values along the lineage up to there:
            ``"diff"`` is ``exp((r_i - r_(i-1)) / temperature)``, ``"max"`` is
            ``exp(max(r_1 ... r_i) / temperature)``, ``"add"`` is ``exp(sum(r_1 ... r_i) /
            temperature)``.
        stride: schedule steps that an edge crosses; a longer one pays for more particles.
        interval: edges between levels at which particles are valued and weighed.
        window_start: share of the schedule crossed before the first such level, 0 to 1.
        window_end: share of the schedule crossed at the last one, 0 to 1.
        ess_threshold: particles are resampled where the effective sample size is below this share
            of their number, 0 (never) to 1.
        branch_eta: share of fresh noise on all edges but the last, 0 to 1.
    """

    particles: int | None = None
    temperature: float | None = None
    temperature_share: float = 0.1
    potential: Potential = "diff"
    stride: int = 1
    interval: int = 1
    window_start: float = 0.2
    window_end: float = 1.0
    ess_threshold: float = 0.8
    branch_eta: float = 1.0

    def __post_init__(self) -> None:
        if self.particles is not None:
            check_setting("particles", self.particles, 1, whole=True)
        for name in ("temperature", "temperature_share"):
            given = getattr(self, name)
            if given is not None:
                check_setting(name, given, 0)
                if not given:
                    raise ConfigError(f"{name} is {given!r}; give a number above 0.")
        if self.potential not in get_args(Potential):
            raise ConfigError(
                f"potential is {self.potential!r}; give one of {', '.join(get_args(Potential))}."
            )
        for name in ("stride", "interval"):
            check_setting(name, getattr(self, name), 1, whole=True)
        for name in ("window_start", "window_end", "ess_threshold", "branch_eta"):
            check_setting(name, getattr(self, name), 0, 1)
        if self.window_start > self.window_end:
            raise ConfigError(
                f"window_start is {self.window_start!r}; give at most window_end, which is "
                f"{self.window_end!r}."
            )

    @property
    def name(self) -> str:
        """Its name in the table of strategies."""
        return "smc"

    def least_evaluations(self, num_steps: int) -> int:
        """One pass of the particles asked for, or of one."""
        return (self.particles or 1) * len(constant_strides(num_steps, self.stride))

    def longest_stride(self, num_steps: int) -> int:
        """Longest stride of its edges."""
        return min(self.stride, num_steps)

    def search(self, problem: Problem) -> Asks:
        """Passes until the budget pays for none."""
        count = self._num_particles(problem)
        if count == 0:
            raise BudgetError(
                f"{problem.budget} cannot pay for {self.particles or 1} particles over "
                f"{problem.num_steps} steps with their values and rewards; raise the budget, or "
                "use fewer particles, a longer interval or a longer stride."
            )
        generator = generator_for(problem, "smc")
        while count:
            yield from self.sample(problem, count, generator)
            count = self._num_particles(problem)
        return "budget"

    def sample(self, problem: Problem, particles: int, generator: np.random.Generator) -> Asks:
        """Coroutine of one pass, whose account must pay for it.

        Args:
            problem: the image.
            particles: their number, at least 1.
            generator: draws one uniform number a resampling.

        Returns:
            The :class:`Population` of finished samples.
        """
        strides = constant_strides(problem.num_steps, self.stride)
        levels = self._levels(problem.num_steps, particles)
        temperature = self.temperature
        nodes = yield from draw(problem, particles)
        population = Population(nodes, np.zeros(particles), np.empty((0, particles)), 0.0)
        for level, stride in enumerate(strides):
            yield from denoise(problem, population.nodes)
            if level in levels:
                values = yield from value(problem, population.nodes)
                temperature = temperature or self._temperature_of(values)
                population = self._weighed(population, values, temperature)
                if ess(population.log_weights) < self.ess_threshold * particles:
                    population = population.resampled(generator.random())
            eta = None if level == len(strides) - 1 else self.branch_eta
            nodes = yield from step(problem, population.nodes, stride=stride, eta=eta)
            population = population._replace(nodes=nodes)
        rewards = yield from reward(problem, population.nodes)
        back_up(problem, population.nodes)
        temperature = temperature or self._temperature_of(rewards)
        correction = (rewards - telescoped(population.values, self.potential)) / temperature
        return population._replace(log_weights=population.log_weights + correction)

    def _weighed(self, population: Population, values: Values, temperature: float) -> Population:
        """Weights times the potentials of a new level of values."""
        lineages = np.vstack([population.values, values])
        log_potential = telescoped(lineages, self.potential) - telescoped(
            population.values, self.potential
        )
        return population._replace(
            log_weights=population.log_weights + log_potential / temperature, values=lineages
        )

    def _temperature_of(self, values: Values) -> float:
        """The temperature by the spread of values; where all are equal any will do."""
        return self.temperature_share * float(values.std()) or 1.0

    def _levels(self, num_steps: int, particles: int) -> tuple[int, ...]:
        """Edges crossed when particles are weighed; none for one particle.

        Not before the last edge: it is deterministic, and copies would finish as equals.
        """
        if particles == 1:
            return ()
        num_edges = len(constant_strides(num_steps, self.stride))
        inside = [
            level
            for level in range(num_edges - 1)
            if self.window_start <= level * self.stride / num_steps <= self.window_end
        ]
        return tuple(inside[:: self.interval])

    def _num_particles(self, problem: Problem) -> int:
        """Particles of the next pass; 0 if none is paid for."""
        account = problem.account
        num_edges = len(constant_strides(problem.num_steps, self.stride))

        def price(particles: int) -> Counts:
            levels = len(self._levels(problem.num_steps, particles))
            return account.price(evaluations=num_edges, values=levels, rewards=1)

        if self.particles is not None:
            count = self.particles
            return count if account.affords(price(count) * count) else 0
        count = account.affordable(price(_PARTICLES_OF_A_PASS), UNLIMITED)
        if count == UNLIMITED:
            return _PARTICLES_OF_A_PASS
        return count if count > 1 else account.affordable(price(1), 1)

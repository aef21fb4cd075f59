"""The shared fakes: small mixtures with exact denoisers, and ways to make the world misbehave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from mctd_diffusers.evaluation.ground_truth import LinearReward, Mixture, QuadraticReward
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Action, Counts, Handles, Prices, Seeds, Values
from mctd_diffusers.search.runner import Problem, SearchResult, Strategy, run_search
from mctd_diffusers.search.seeding import root_seed_of
from mctd_diffusers.search.strategies import MCTD, BestOfN
from mctd_diffusers.search.tree import DRAW, ROOT, STEP, Tree, add_child

Guidances = Sequence[float | None] | None
PRICES = Prices(decode=1.5, preview=0.25, reward_call=0.125)


def small_mixture(seed: int = 0, components: int = 4, dimensions: int = 3) -> Mixture:
    """Random means, weights and diagonal variances."""
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.full(components, 3.0))
    means = generator.normal(size=(components, dimensions)) * 1.5
    return Mixture(weights, means, generator.uniform(0.1, 0.5, size=(components, dimensions)))


def small_environment(
    num_problems: int = 1,
    num_steps: int = 4,
    *,
    make: type[MixtureEnvironment] = MixtureEnvironment,
    prices: Prices | None = None,
) -> MixtureEnvironment:
    """One mixture a problem; the reward is minus a squared distance."""
    mixtures = [small_mixture(seed) for seed in range(num_problems)]
    rewards = [QuadraticReward(np.ones(3), np.full(3, 0.5 * seed)) for seed in range(num_problems)]
    return make(mixtures, rewards, num_steps=num_steps, prices=prices)


def guided_environment(
    num_problems: int = 1, num_steps: int = 4, *, prices: Prices | None = None
) -> MixtureEnvironment:
    """The same with guidance, whose scale of 1 is the call's own."""
    return MixtureEnvironment(
        [small_mixture(seed) for seed in range(num_problems)],
        [QuadraticReward(np.ones(3), np.full(3, 0.5 * seed)) for seed in range(num_problems)],
        num_steps=num_steps,
        unconditional=[small_mixture(seed, components=8) for seed in range(num_problems)],
        prices=prices,
    )


def problems_of(
    environment: MixtureEnvironment,
    budget: Budget,
    indices: Sequence[int] | None = None,
    *,
    strategy: Strategy | None = None,
) -> list[Problem]:
    """The problems of an environment, as a pipeline makes them for a strategy."""
    return [
        Problem(
            index=index,
            num_steps=environment.num_steps,
            root_seed=root_seed_of(environment.first_noise(index).tobytes()),
            budget=budget,
            prices=environment.ledger.prices,
            rows_per_nfe=environment.rows_per_nfe,
            calls_per_step=2 if isinstance(environment, TwoCallEnvironment) else 1,
            guidance_scale=environment.guidance_scale,
            stride_costs=stride_costs_of(strategy, environment.num_steps),
        )
        for index in (range(len(environment.mixtures)) if indices is None else indices)
    ]


def stride_costs_of(
    strategy: Strategy | None, num_steps: int
) -> tuple[tuple[float, ...], ...] | None:
    """Plausible costs of jumps, where a strategy needs some: they grow with stride and time."""
    if not isinstance(strategy, (BestOfN, MCTD)) or not strategy.policy.needs_costs:
        return None
    strides = strategy.stride_set(num_steps)
    power = {"truncation_error": 2.0, None: 2.0}.get(strategy.policy.target, 0.5)
    sign = 1.0 if power == 2.0 else -1.0
    return tuple(
        tuple(
            sign * (1 + 0.1 * step_index) * stride**power
            if step_index + stride <= num_steps
            else math.inf
            for stride in strides
        )
        for step_index in range(num_steps)
    )


def search(
    strategy: Strategy,
    environment: MixtureEnvironment,
    *,
    nfe: int | None,
    cost: float | None = None,
) -> list[SearchResult]:
    """Search all problems of an environment with one budget."""
    budget = Budget(nfe=nfe, cost=cost)
    return run_search(strategy, environment, problems_of(environment, budget, strategy=strategy))


def two_levels() -> tuple[Tree, list[int]]:
    """A root with two children; the first has two leaves, the second one."""
    tree = Tree(1)
    nodes = []
    for handle, parent in enumerate((0, 0, 1, 1, 2)):
        nodes.append(
            add_child(
                tree,
                parent,
                handle=handle,
                step_index=0 if parent == ROOT else 1,
                move=DRAW if parent == ROOT else STEP,
                stride=0 if parent == ROOT else 1,
                eta=None,
                seed=0,
            )
        )
    return tree, nodes


def linear_gaussian(num_problems: int, num_steps: int) -> MixtureEnvironment:
    """A single standard Gaussian in one dimension, whose reward is the sample itself."""
    mixture = Mixture(np.ones(1), np.zeros((1, 1)), np.ones((1, 1)))
    reward = LinearReward(np.ones(1))
    return MixtureEnvironment(
        [mixture] * num_problems, [reward] * num_problems, num_steps=num_steps
    )


def spread_of_samples(environment: MixtureEnvironment) -> float:
    """Standard deviation of what the ancestral sampler makes of :func:`linear_gaussian`.

    There the denoised estimate of ``x`` is ``alpha x``, so a step is linear, and samples stay
    Gaussian; few steps leave them narrower than the data.
    """
    variance = 1.0
    levels = list(zip(environment.alpha, environment.sigma, strict=True))
    for (alpha, sigma), (alpha_next, sigma_next) in pairwise(levels):
        fresh = (sigma_next / sigma) ** 2 * (1 - (alpha / alpha_next) ** 2)
        kept = np.sqrt(sigma_next**2 - fresh)
        variance = (alpha_next * alpha + kept * sigma) ** 2 * variance + fresh
    return float(np.sqrt(variance))


class CountingEnvironment(MixtureEnvironment):
    """Counts by itself what it is asked, to check the ledger and the waves against."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they came
        self.sizes: list[tuple[str, int]] = []

    def denoise(self, handles: Handles) -> None:
        self.sizes.append(("denoise", len(handles)))
        super().denoise(handles)

    def value(self, handles: Handles, guidances: Guidances = None) -> Values:
        self.sizes.append(("value", len(handles)))
        return super().value(handles, guidances)

    def reward(self, handles: Handles) -> Values:
        self.sizes.append(("reward", len(handles)))
        return super().reward(handles)

    def step(self, parents: Handles, actions: Sequence[Action], seeds: Seeds) -> Handles:
        self.sizes.append(("step", len(parents)))
        return super().step(parents, actions, seeds)

    def total(self, kind: str) -> int:
        """Samples over all calls of one kind."""
        return sum(size for name, size in self.sizes if name == kind)


class TwoCallEnvironment(MixtureEnvironment):
    """Charges a second call for every edge before a sample that is evaluated, as Heun does."""

    def denoise(self, handles: Handles) -> None:
        rows = np.unique(handles)
        behind = rows[~self._evaluated[rows] & (self._step_index[rows] > 0)]
        super().denoise(handles)
        self.ledger.charge(self._problem[behind], Counts(nfe=1, rows=self.rows_per_nfe))

    def step_price(self, parents: Handles, actions: Sequence[Action]) -> Counts:
        ends = self._step_index[parents] + [action.stride for action in actions]
        return Counts(nfe=1, rows=self.rows_per_nfe) * int((ends < self.num_steps).sum())


class FailingEnvironment(MixtureEnvironment):
    """Raises ``failure`` at the ``after``-th denoise or reward call."""

    failure: Callable[[], BaseException] = KeyboardInterrupt
    after: int = 1_000_000
    calls: int = 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls > self.after:
            raise self.failure()

    def denoise(self, handles: Handles) -> None:
        self._count()
        super().denoise(handles)

    def reward(self, handles: Handles) -> Values:
        self._count()
        return super().reward(handles)

"""Compare strategies at equal NFE on mixtures with exact denoisers, where no network is in the way.

    python scripts/compare_on_mixtures.py --problems 60

Prints, for two kinds of mixtures and budgets of 2, 4, 8 and 16 plain samples, the mean best reward
with its standard error, the paired difference to the beam, and the mean log density of the picked
samples: far below that of best_of_n, a search has left the data. Minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.evaluation.mixture_worlds import rugged_environment, subspace_environment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.runner import Problem, Strategy, run_search
from mctd_diffusers.search.seeding import root_seed_of
from mctd_diffusers.search.strategies import MCTD, Beam, BestOfN

WORLDS: dict[str, Callable[..., MixtureEnvironment]] = {
    "rugged": rugged_environment,
    "subspace": subspace_environment,
}
STRATEGIES: dict[str, Strategy] = {
    "best_of_n": BestOfN(),
    "beam": Beam(),
    "beam, width 2": Beam(width=2),
    "mctd": MCTD(),
}


def run(strategy: Strategy, environment: MixtureEnvironment, nfe: int) -> tuple[np.ndarray, float]:
    """Best rewards of all problems, and the mean log density of the picked samples."""
    problems = [
        Problem(
            index=index,
            num_steps=environment.num_steps,
            root_seed=root_seed_of(environment.first_noise(index).tobytes()),
            budget=Budget(nfe=nfe),
            guidance_scale=environment.guidance_scale,
        )
        for index in range(len(environment.mixtures))
    ]
    best = [result.best for result in run_search(strategy, environment, problems)]
    points = environment.latents(np.array([sample.handle for sample in best if sample]))
    density = [
        mixture.log_density(point[None])[0]
        for mixture, point in zip(environment.mixtures, points, strict=True)
    ]
    return np.array([sample.reward for sample in best if sample]), float(np.mean(density))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=60, help="mixtures of each kind")
    parser.add_argument("--num_steps", type=int, default=16, help="steps of the schedule")
    parser.add_argument("--seed", type=int, default=1, help="seed of the mixtures and noises")
    options = parser.parse_args()
    columns = "reward", "+-", "to beam", "+-", "log p"
    print(f"{'world':10}{'NFE':>5}  {'strategy':16}" + "".join(f"{name:>9}" for name in columns))
    for world, make in WORLDS.items():
        for compute in (2, 4, 8, 16):
            nfe = compute * options.num_steps
            found = {}
            for name, strategy in STRATEGIES.items():
                environment = make(
                    options.problems, num_steps=options.num_steps, first_seed=options.seed
                )
                found[name] = run(strategy, environment, nfe)
            root = np.sqrt(options.problems)
            for name, (rewards, density) in found.items():
                gain = rewards - found["beam"][0]
                numbers = rewards.mean(), rewards.std() / root, gain.mean(), gain.std() / root
                row = "".join(f"{number:9.3f}" for number in numbers)
                print(f"{world:10}{nfe:5}  {name:16}{row}{density:9.1f}", flush=True)


if __name__ == "__main__":
    main()

"""Makes lazy samples: their latents from what they come from, all of a kind in one go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import Denoiser, timed
from mctd_diffusers.denoising.fusion import Fused
from mctd_diffusers.denoising.latents import (
    Before,
    Drawn,
    EdgeNoise,
    Latents,
    Midway,
    Perturbed,
    Renoised,
    Sample,
    Stepped,
    made_state,
)
from mctd_diffusers.denoising.reading import SampleReader
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.search.environment import FIRST_DRAW, Action

_HAS_SOURCE = (Renoised, Perturbed)


class SampleMaker:
    """Gives samples their latents: those of a call's own noise, of edges and of variants.

    Args:
        samples: where they live.
        denoiser: makes the second calls of edges; its stepper crosses edges, its ledger is charged.
        reader: of the same samples.
        first_latents: of each problem, as for `LatentEnvironment`.
        keeps_estimates: whether samples remember the estimate that they were stepped from.
    """

    def __init__(
        self,
        samples: Latents,
        denoiser: Denoiser,
        reader: SampleReader,
        first_latents: Float[Tensor, "problems *sample"],
        *,
        keeps_estimates: bool,
    ) -> None:
        self._samples = samples
        self._denoiser = denoiser
        self._stepper = denoiser.stepper
        self._ledger = denoiser.ledger
        self._reader = reader
        self._first_latents = first_latents
        self._device = samples.device
        self._keeps_estimates = keeps_estimates

    def make(self, samples: Sequence[Sample], *, completes: bool = True) -> None:
        """Give lazy samples their latents: by kind of origin, each kind in one go.

        Unless it ``completes``, those that need the network for it are left midway.
        """
        generations = [_lazy(samples)]  # of samples and their sources, which are made first
        while generations[-1]:
            origins = [sample.origin for sample in generations[-1]]
            generations.append(_lazy([o.source for o in origins if isinstance(o, _HAS_SOURCE)]))
        for generation in reversed(generations[:-1]):
            with timed(self._ledger, "step", self._device):
                for kind, make in (
                    (Drawn, self._draw),
                    (Stepped, self._cross),
                    (Renoised, self._noise_again),
                    (Perturbed, self._vary),
                ):
                    some = [s for s in _lazy(generation) if isinstance(s.origin, kind)]
                    if some:
                        make(some)
            if completes:
                self._complete(_lazy(generation))

    def _draw(self, samples: Sequence[Sample]) -> None:
        state = self._stepper.initial_state()
        for sample in samples:
            seed = cast(Drawn, sample.origin).seed
            if seed == FIRST_DRAW:
                latents = self._first_latents[sample.problem]
            else:
                latents = self._initial_noise(seed)[0]
            self._settle([sample], latents[None], [state])

    def _cross(self, samples: Sequence[Sample]) -> None:
        edges = [cast(Stepped, sample.origin) for sample in samples]
        parents = [edge.parent for edge in edges]
        latents, states = self._stepper.step(
            self._reader.latents(parents),
            self._reader.guided(parents, [edge.action.guidance for edge in edges]),
            [self._samples.fetch_state(made_state(parent)) for parent in parents],
            [edge.action for edge in edges],
            [edge.seed for edge in edges],
        )
        rows = self._samples.keep(latents)
        for sample, edge, row, fresh in zip(samples, edges, rows, states, strict=True):
            state = self._samples.keep_state(fresh)
            if state.midway is None:
                sample.latents, sample.state, sample.origin = row, state, None
            else:
                sample.origin = Midway(row, state, edge.seed)
        if self._keeps_estimates:
            estimates = self._samples.keep(self._reader.denoised(parents))
            for sample, parent, estimate in zip(samples, parents, estimates, strict=True):
                sample.before = Before(estimate, parent.step_index)

    def _complete(self, samples: Sequence[Sample]) -> None:
        """Cross the second halves of edges, which takes a network call: 1 NFE each."""
        if not samples:
            return
        halves = [cast(Midway, sample.origin) for sample in samples]
        midpoints = self._samples.gather([half.latents for half in halves])
        states = [self._samples.fetch_state(half.state) for half in halves]
        outputs, *_ = self._denoiser(midpoints, states, [sample.problem for sample in samples])
        with timed(self._ledger, "step", self._device):
            actions = [cast(Action, state.midway) for state in states]
            latents, after = self._stepper.complete(
                midpoints,
                self._denoiser.combine(outputs, [action.guidance for action in actions]),
                states,
                [half.seed for half in halves],
            )
            self._settle(samples, latents, after)

    def awaits_midpoint(self, sample: Sample) -> bool:
        """Whether a sample is not made, and takes a network call to be."""
        origin = sample.origin
        if isinstance(origin, Stepped):
            return self._stepper.needs_midpoint(origin.parent.step_index, origin.action)
        return isinstance(origin, Midway)

    def _noise_again(self, samples: Sequence[Sample]) -> None:
        origins = [cast(Renoised, sample.origin) for sample in samples]
        clean = self._reader.estimates([origin.source for origin in origins])
        noise = self._noise([origin.seed for origin in origins])
        levels: dict[int, list[int]] = {}
        for row, sample in enumerate(samples):
            levels.setdefault(sample.step_index, []).append(row)
        for step_index, rows in levels.items():
            latents, states = self._stepper.renoise(clean[rows], step_index, noise[rows])
            self._settle([samples[row] for row in rows], latents, states)

    def _vary(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            origin = cast(Perturbed, sample.origin)
            source, strength = origin.source, origin.strength
            latents = self._reader.latents([source])
            if source.noise is None:
                fresh = self._initial_noise(origin.seed)
                varied = _mixed(latents, fresh, strength)
            else:
                before = self._injected(source.noise)
                after = _mixed(before, self._noise([origin.seed], before.dtype), strength)
                # The difference alone, so that what is not perturbed stays bit for bit.
                varied = latents + source.noise.std * (after - before)
            self._settle([sample], varied.to(latents.dtype), [made_state(source)])

    def _injected(self, noise: EdgeNoise) -> Tensor:
        """Standard normal noise of an edge, with what was mixed in since."""
        mixed = self._noise([noise.seed], noise.dtype)
        for strength, seed in noise.perturbations:
            mixed = _mixed(mixed, self._noise([seed], noise.dtype), strength)
        return mixed

    def _initial_noise(self, seed: int) -> Tensor:
        """``[1, *sample]`` as the stock pipeline draws and scales it."""
        return self._noise([seed]) * self._stepper.init_noise_sigma

    def _noise(self, seeds: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal noise, each from its own generator on the CPU."""
        shape = self._first_latents.shape[1:]
        dtype = dtype or self._first_latents.dtype
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [
            # With a batch axis, as the stock pipeline draws it.
            torch.randn((1, *shape), generator=generator, dtype=dtype)
            for generator in generators
        ]
        return torch.cat(rows).to(self._device)

    def _settle(
        self, samples: Sequence[Sample], latents: Tensor, states: Sequence[SolverState]
    ) -> None:
        rows = self._samples.keep(latents)
        for sample, row, state in zip(samples, rows, states, strict=True):
            sample.latents, sample.origin = row, None
            sample.state = self._samples.keep_state(state)

    def take_in(self, fused: Fused, particle: Sample, guidance: float | None) -> Sample:
        """A fused sample, whose solver starts anew.

        Args:
            fused: accepted, from particles.
            particle: one of them.
            guidance: of their estimates; ``None`` is the call's own.
        """
        step_index = particle.step_index
        # Its noise is that of no edge, so there is none to perturb.
        mixed = EdgeNoise(math.nan, self._first_latents.dtype, 0)
        sample = Sample(particle.problem, step_index, noise=mixed)
        latents = fused.latents[None].to(self._first_latents.dtype)
        self._settle([sample], latents, [self._stepper.restarted(step_index)])
        sample.before = Before(self._samples.keep(fused.clean[None])[0], step_index, guidance)
        return sample


@contextmanager
def or_as_before(samples: Sequence[Sample]) -> Iterator[None]:
    """Leave samples as lazy as they were where the block raises, so that asked again it is whole.

    Or the second calls of their edges would be paid for once, and missing when it is asked again.
    """
    before = [(sample, sample.origin, sample.latents, sample.state) for sample in samples]
    try:
        yield
    except BaseException:
        for sample, origin, latents, state in before:
            sample.origin, sample.latents, sample.state = origin, latents, state
        raise


def _lazy(samples: Sequence[Sample]) -> list[Sample]:
    """Those that have no latents yet, each once."""
    return [sample for sample in dict.fromkeys(samples) if sample.latents is None]


def _mixed(noise: Tensor, fresh: Tensor, strength: float) -> Tensor:
    """Noise of the same law with a share of fresh noise: all that is left of it at 1, none at 0."""
    return math.sqrt(1 - strength**2) * noise + strength * fresh

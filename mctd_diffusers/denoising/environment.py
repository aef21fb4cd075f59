"""The environment of a search over a latent diffusion model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import (
    Calls,
    Chunk,
    Denoiser,
    FeatureTap,
    chunks,
    free_memory,
    is_out_of_memory,
    pooled,
    synchronize,
    timed,
)
from mctd_diffusers.denoising.fusion import VERDICTS, Fused, Particles, fuse
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
)
from mctd_diffusers.denoising.protocols import (
    CheckedReward,
    Decoder,
    Encoder,
    FeatureDecoder,
    GainModel,
    Network,
    Outputs,
)
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.search.environment import (
    FIRST_DRAW,
    REJECTED,
    Action,
    Counts,
    Fusions,
    Gains,
    Handles,
    Ledger,
    Prices,
    Seeds,
    Values,
    check_one_level,
)
from mctd_diffusers.search.settings import check_setting, is_number

T = TypeVar("T")


class LatentEnvironment:
    """Samples of many images, denoised by one network; see `search.environment.Environment`.

    A sample is evaluated once; from that follow, at no further call, its value and every child.
    Children, initial noise, renoised and perturbed samples are lazy: they hold no tensor until they
    are evaluated, scored or exported. Where the solver takes a second call on an edge, it is made
    together with its child; exporting makes none. Every network, decode and reward call holds
    exactly ``rows_per_call`` latents, so what a sample becomes depends on its own path alone. Where
    memory runs out in calls of one phase their size is halved; ``ledger.rows_by_phase`` says so.

    Args:
        network: the pipeline's denoiser; knows the conditioning of each problem.
        stepper: over the prepared scheduler; knows the user's ``eta``.
        decoder: decodes finished samples.
        preview: decodes the denoised estimates of unfinished ones; ``None`` uses ``decoder``, and
            counts it as a full decode.
        reward: scores pictures, and answers only with finite numbers.
        prompts: of each problem, for the reward.
        first_latents: of each problem, as the stock ``prepare_latents`` draws and scales them;
            their device is where everything runs.
        rows_per_call: latents in every call.
        rows_by_phase: the same for single phases, as ``ledger.rows_by_phase`` had it: calls hold as
            many latents as the last ones did.
        prices: what the ledger reckons its cost by.
        storage: where tensors wait between calls; by default the device itself.
        half: whether samples of single precision wait in half, see `Latents`; what is fixed here
            is what samples become, so a replay needs the same.
        features: a tap on the network, where features of the samples will be asked for; maps of
            features are kept where it keeps that of a block.
        gain_model: predicts what jumps tell; ``None`` where a search asks for no predictions.
        kinds: of each problem, as for `Denoiser`.
        fuses: whether samples will be fused, so that how far estimates move is kept.
        feature_decoder: makes clean latents of the maps that the tap keeps, for the fusion
            ``features``.
        encoder: makes clean latents of pictures, for the fusion ``pixel``, which also decodes: each
            particle once, in full.

    Raises:
        ConfigError: ``rows_per_call`` is below 1, or prompts and first latents differ in number.
    """

    def __init__(
        self,
        *,
        network: Network,
        stepper: Stepper,
        decoder: Decoder,
        reward: CheckedReward,
        prompts: Sequence[str],
        first_latents: Float[Tensor, "problems *sample"],
        rows_per_call: int,
        rows_by_phase: Mapping[str, Sequence[int]] | None = None,
        preview: Decoder | None = None,
        prices: Prices | None = None,
        storage: torch.device | str | None = None,
        half: bool = False,
        features: FeatureTap | None = None,
        gain_model: GainModel | None = None,
        kinds: Sequence[Hashable] | None = None,
        fuses: bool = False,
        feature_decoder: FeatureDecoder | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        if len(prompts) != len(first_latents):
            raise ConfigError(
                f"there are {len(prompts)} prompts but {len(first_latents)} first latents; "
                "give one of each for every problem."
            )
        sizes = {phase: list(rows) for phase, rows in (rows_by_phase or {}).items()}
        self.ledger = Ledger(prices=prices or Prices(), rows_by_phase=sizes)
        self._device = first_latents.device
        self._calls = Calls(rows_per_call, self.ledger, self._device)
        self.num_steps = stepper.num_steps
        self._stepper = stepper
        self._denoiser = Denoiser(
            network,
            stepper,
            rows_per_call=rows_per_call,
            ledger=self.ledger,
            device=self._device,
            features=features,
            kinds=kinds,
        )
        self._gain_model = gain_model
        self._feature_decoder = feature_decoder
        self._encoder = encoder
        self._keeps_estimates = fuses or (gain_model is not None and gain_model.reads_change)
        self._decoder = decoder
        self._preview = preview
        self._reward = reward
        self._prompts = list(prompts)
        self._first_latents = first_latents
        self._rows_per_call = rows_per_call
        self._samples = Latents(self._device, storage, half=half)
        self.guidance_scale = network.guidance_scale if network.rows_per_latent == 2 else None

    def reset(self, problems: Handles, seeds: Seeds) -> Handles:
        """Draw initial noise, as lazy as a child."""
        return self._samples.add(
            Sample(problem, 0, Drawn(seed))
            for problem, seed in zip(problems.tolist(), seeds.tolist(), strict=True)
        )

    @torch.no_grad()
    def denoise(self, handles: Handles) -> None:
        """Evaluate samples that are not yet evaluated.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished.
        """
        samples = self._samples[handles]
        self._refuse(
            handles,
            [sample.step_index == self.num_steps for sample in samples],
            "is finished; ask for its reward.",
        )
        fresh = [sample for sample in dict.fromkeys(samples) if sample.outputs is None]
        if not fresh:
            return
        with _or_as_before(fresh):
            self._make(fresh)
            outputs, features, maps = self._denoiser(
                self._latents_of(fresh),
                [_state(sample) for sample in fresh],
                [sample.problem for sample in fresh],
            )
        unconditional = outputs.unconditional
        for sample, row, without in zip(
            fresh,
            self._samples.keep(outputs.conditional),
            [None] * len(fresh) if unconditional is None else self._samples.keep(unconditional),
            strict=True,
        ):
            sample.outputs = Outputs(row, without)
        for name, rows in features.items():
            for sample, row in zip(fresh, self._samples.keep(rows), strict=True):
                sample.features[name] = row
        if maps is not None:
            for sample, row in zip(fresh, self._samples.keep(maps), strict=True):
                sample.map = row

    def step(self, parents: Handles, actions: Sequence[Action], seeds: Seeds) -> Handles:
        """Make one lazy child for each (evaluated parent, action, seed).

        Raises:
            CapacityError: a handle is not known.
            SearchError: a parent is finished, or not evaluated.
            ScheduleError: a stride does not fit the steps left.
            ConfigError: an action's ``eta`` is not between 0 and 1, or its guidance is no number,
                or there is none to scale.
        """
        samples = self._evaluated(parents)
        children = []
        for parent, action, seed in zip(samples, actions, seeds.tolist(), strict=True):
            self._stepper.check_action(parent.step_index, action)
            self._check_guidance(action.guidance)
            target = parent.step_index + action.stride
            noise = EdgeNoise(
                self._stepper.noise_std(_state(parent), action),
                self._stepper.noise_dtype(action, self._first_latents.dtype),
                seed,
            )
            children.append(Sample(parent.problem, target, Stepped(parent, action, seed), noise))
        return self._samples.add(children)

    def step_price(self, parents: Handles, actions: Sequence[Action]) -> Counts:
        """The second calls of edges, which are made when their children are.

        Raises:
            CapacityError: a handle is not known.
            ScheduleError: a stride does not fit the steps left.
            ConfigError: an action's ``eta`` is not between 0 and 1.
        """
        midpoints = sum(
            self._stepper.needs_midpoint(parent.step_index, action)
            for parent, action in zip(self._samples[parents], actions, strict=True)
        )
        return Counts(nfe=1, rows=self._denoiser.network.rows_per_latent) * midpoints

    @torch.no_grad()
    def value(self, handles: Handles, guidances: Sequence[float | None] | None = None) -> Values:
        """Reward of the denoised estimates, by preview; asked again it costs nothing.

        Args:
            handles: evaluated, unfinished samples.
            guidances: of each estimate; ``None`` is the call's own.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or not evaluated; or what the reward raises.
            ConfigError: a guidance is no number, or there is none to scale.
        """
        samples = self._evaluated(handles)
        scales = [None] * len(samples) if guidances is None else list(guidances)
        found: list[tuple[Sample, float | None, float]] = []
        for scale in dict.fromkeys(scales):
            self._check_guidance(scale)
            wanted = [
                scale == other and scale not in sample.values
                for sample, other in zip(samples, scales, strict=True)
            ]
            fresh = _handles_of(samples, handles, wanted)
            values: list[float] = []
            for some in self._batches(list(fresh)):
                clean = self._denoised_of(some, [scale] * len(some))
                values += self._score(self._decode(clean, some, preview=True), some, fresh)
            found += zip(fresh, [scale] * len(fresh), values, strict=True)
        for sample, scale, value in found:
            sample.values[scale] = value
        return np.array(
            [sample.values[scale] for sample, scale in zip(samples, scales, strict=True)],
            dtype=np.float64,
        )

    @torch.no_grad()
    def reward(self, handles: Handles) -> Values:
        """Reward of finished samples, decoded in full; asked again it costs nothing.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is not finished; or what the reward raises.
        """
        samples = self._finished(handles)
        fresh = _handles_of(samples, handles, [sample.reward is None for sample in samples])
        self._make(list(fresh))
        rewards: list[float] = []
        for some in self._batches(list(fresh)):
            images = self._decode(self._latents_of(some), some, preview=False)
            rewards += self._score(images, some, fresh)
        for sample, reward in zip(fresh, rewards, strict=True):
            sample.reward = reward
        return np.array([sample.reward for sample in samples], dtype=np.float64)

    def predict_gain(self, handles: Handles, strides: Sequence[int]) -> Gains:
        """What the gain model says of jumps from evaluated samples; 0 NFE.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or not evaluated.
            ConfigError: there is no gain model.
        """
        self._evaluated(handles)
        if self._gain_model is None:
            raise ConfigError(
                "there is no gain model to predict what strides tell: load the pipeline with "
                "ige=..., or use stride_policy='budget'"
            )
        with timed(self.ledger, "gain", self._device):
            return self._gain_model(self, handles, strides)

    def renoise(self, handles: Handles, step_index: int, seeds: Seeds) -> Handles:
        """Noise denoised estimates (of evaluated or finished samples) to ``step_index``, lazily.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is neither evaluated nor finished.
            ScheduleError: ``step_index`` is not in the schedule.
        """
        samples = self._clean(handles)
        std, dtype = self._stepper.renoise_std(step_index), self._first_latents.dtype
        return self._samples.add(
            Sample(source.problem, step_index, Renoised(source, seed), EdgeNoise(std, dtype, seed))
            for source, seed in zip(samples, seeds.tolist(), strict=True)
        )

    def perturb(self, handles: Handles, strengths: Values, seeds: Seeds) -> Handles:
        """Variants of unfinished samples with fresh noise mixed into that of their last edges.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or came by an edge without noise, with noise that is
                not simply added to it, or with a second network call that is not made yet.
            ConfigError: a strength is not between 0 and 1.
        """
        samples = self._samples[handles]
        is_finished = [sample.step_index == self.num_steps for sample in samples]
        self._refuse(handles, is_finished, "is finished; perturb it before its last edge.")
        is_plain = [sample.noise is not None and sample.noise.std == 0 for sample in samples]
        self._refuse(handles, is_plain, "came by an edge without noise; step with eta above 0.")
        is_mixed = [s.noise is not None and math.isnan(s.noise.std) for s in samples]
        self._refuse(
            handles,
            is_mixed,
            "came by an edge whose noise is not simply added to it, so there is none to perturb; "
            "step with eta above 0 and below 1, or with another scheduler.",
        )
        self._refuse(
            handles,
            [self._awaits_midpoint(sample) for sample in samples],
            "came by an edge of two network calls, of which the second is not made yet; denoise it "
            "first.",
        )
        made = []
        for source, strength, seed in zip(samples, strengths.tolist(), seeds.tolist(), strict=True):
            check_setting("strength", strength, 0, 1)
            noise = source.noise
            if noise is not None:
                perturbations = (*noise.perturbations, (strength, seed))
                noise = replace(noise, perturbations=perturbations)
            origin = Perturbed(source, strength, seed)
            made.append(Sample(source.problem, source.step_index, origin, noise))
        return self._samples.add(made)

    @torch.no_grad()
    def fuse(
        self,
        groups: Sequence[Handles],
        weights: Sequence[Values],
        methods: Sequence[str],
        seeds: Seeds,
        guidances: Sequence[float | None] | None = None,
    ) -> Fusions:
        """Fuse each group of particles into one sample at their step index; 0 NFE.

        Raises:
            CapacityError: a handle is not known.
            SearchError: particles are finished, not evaluated, of several step indices or images.
            ConfigError: a method is not known, not for samples of this kind, or lacks what it
                needs; a guidance is no number, or there is none to scale.
        """
        fused: list[tuple[Fused, Sample, float | None]] = []
        for group, shares, method, seed, guidance in zip(
            groups,
            weights,
            methods,
            seeds.tolist(),
            guidances or [None] * len(groups),
            strict=True,
        ):
            self._check_guidance(guidance)
            samples = self._evaluated(group)
            check_one_level([s.step_index for s in samples], [s.problem for s in samples], group)
            found = self._fuse(samples, shares, method, seed, guidance)
            fused.append((found, samples[0], guidance))
        handles = np.full(len(fused), REJECTED, dtype=np.int64)
        for place, (found, particle, guidance) in enumerate(fused):
            if found.verdict == VERDICTS[0]:
                handles[place] = self._take_in(found, particle, guidance)
        verdicts = [VERDICTS.index(found.verdict) for found, _, _ in fused]
        correlations = [found.correlation for found, _, _ in fused]
        return Fusions(handles, np.array(verdicts, dtype=np.int64), np.array(correlations))

    @torch.no_grad()
    def relative_change(self, handles: Handles) -> Values:
        """How far denoised estimates moved since those that the samples came from.

        Root mean square of the change over that of the estimate before. NaN of samples that were
        not stepped to; of fused samples always known, of others where changes are kept.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or not evaluated.
        """
        changes = np.full(len(handles), np.nan)
        for row, sample in enumerate(self._evaluated(handles)):
            if sample.before is not None:
                before = self._samples.gather([sample.before.estimate])
                moved = self._denoised_of([sample], [sample.before.guidance]) - before
                changes[row] = (moved.float().norm() / before.float().norm()).item()
        return changes

    def _fuse(
        self,
        samples: Sequence[Sample],
        weights: Values,
        method: str,
        seed: int,
        guidance: float | None,
    ) -> Fused:
        """One group of particles fused, by itself, so that no other decides what becomes of it."""
        signal, noise = self._stepper.factors(samples[0].step_index)
        particles = Particles(
            latents=self._latents_of(samples),
            clean=self._denoised_of(samples, [guidance] * len(samples)),
            signal=float(signal),
            noise=float(noise),
            weights=torch.as_tensor(weights, dtype=torch.float64),
            features=self._maps_of(samples) if method == "features" else None,
        )
        codec = None if self._encoder is None else _Codec(self._decode, self._encoder, samples)
        with timed(self.ledger, "fuse", self._device):
            return fuse(
                method,
                particles,
                seed=seed,
                codec=codec,
                feature_decoder=self._feature_decoder,
            )

    def _take_in(self, fused: Fused, particle: Sample, guidance: float | None) -> int:
        """Handle of a fused sample, whose solver starts anew."""
        step_index = particle.step_index
        # Its noise is that of no edge, so there is none to perturb.
        mixed = EdgeNoise(math.nan, self._first_latents.dtype, 0)
        sample = Sample(particle.problem, step_index, noise=mixed)
        latents = fused.latents[None].to(self._first_latents.dtype)
        self._settle([sample], latents, [self._stepper.restarted(step_index)])
        sample.before = Before(self._samples.keep(fused.clean[None])[0], step_index, guidance)
        return int(self._samples.add([sample])[0])

    @torch.no_grad()
    def export(self, handles: Handles) -> list[dict[str, Any]]:
        """Copy of the samples on the host, in plain types, fit for ``torch.save``."""
        samples = self._samples[handles]
        self._make(samples, completes=False)
        return [_exported(sample) for sample in samples]

    def restore(
        self,
        saved: Sequence[dict[str, Any]],
        handles: Handles | None = None,
        *,
        num_handles: int = 0,
    ) -> Handles:
        """Samples back from :meth:`export`, under new handles or those given; see `Environment`.

        Raises:
            ConfigError: there are ``handles``, and samples already.
        """
        samples = [_restored(sample, self._samples.storage) for sample in saved]
        if handles is None:
            return self._samples.add(samples)
        return self._samples.put_back(samples, handles, num_handles)

    def adopt(self, latents: Float[Tensor, "batch *sample"], problem: int) -> Handles:
        """Finished samples of a problem from latents that were made elsewhere."""
        return self._samples.add(
            Sample(problem, self.num_steps, latents=row) for row in self._samples.keep(latents)
        )

    def release(self, handles: Handles) -> None:
        """Forget samples; their lazy children stay good.

        Raises:
            CapacityError: a handle is not known.
        """
        self._samples.release(handles)

    @torch.no_grad()
    def images(self, handles: Handles) -> Float[Tensor, "batch 3 height width"]:
        """Pictures of finished samples in [0, 1], decoded in full (again: they are not kept).

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is not finished.
        """
        samples = self._finished(handles)
        self._make(samples)
        return self._pictures(self._latents_of, samples, preview=False)

    @torch.no_grad()
    def previews(self, handles: Handles) -> Float[Tensor, "batch 3 height width"]:
        """Pictures of the denoised estimates of unfinished, evaluated samples, by preview.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or not evaluated.
        """
        samples = self._evaluated(handles)
        return self._pictures(self._denoised_of, samples, preview=True)

    @torch.no_grad()
    def denoised(self, handles: Handles) -> Float[Tensor, "batch *sample"]:
        """Denoised estimates of evaluated samples, and the latents of finished ones.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is neither evaluated nor finished.
        """
        samples = self._clean(handles)
        self._make(samples)
        return self._estimates_of(samples)

    # What gain models read

    @property
    def stepper(self) -> Stepper:
        """Steps the samples; knows their noise levels."""
        return self._stepper

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents."""
        return tuple(self._first_latents.shape[1:])

    def step_indices(self, handles: Handles) -> list[int]:
        """Where samples stand in the schedule.

        Raises:
            CapacityError: a handle is not known.
        """
        return [sample.step_index for sample in self._samples[handles]]

    @torch.no_grad()
    def latents(self, handles: Handles) -> Float[Tensor, "batch *sample"]:
        """Latents of samples, unscaled; lazy ones are made.

        Raises:
            CapacityError: a handle is not known.
        """
        samples = self._samples[handles]
        self._make(samples)
        return self._latents_of(samples)

    @torch.no_grad()
    def features(self, handles: Handles) -> dict[str, Float[Tensor, "batch _"]]:
        """What the network's blocks and its estimate say of evaluated samples, pooled over space.

        Of each block that is read (see `tappable_blocks`) the means and deviations of its
        channels; and, ``"estimate"``, those of the guided denoised estimate, followed by the
        deviations of what guidance scales, the conditional less the unconditional output (0 without
        guidance).

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or not evaluated.
        """
        samples = self._evaluated(handles)
        features = {
            name: self._samples.gather([sample.features[name] for sample in samples])
            for name in samples[0].features
        }
        outputs = [_outputs(sample) for sample in samples]
        differences = [
            torch.zeros_like(conditional) if unconditional is None else conditional - unconditional
            for conditional, unconditional in outputs
        ]
        # Of a network that predicts its variance, without that.
        difference = self._samples.gather(differences)[:, : self.sample_shape[0]]
        scaled = pooled(difference.float()).chunk(2, dim=1)[1]
        estimate = pooled(self._denoised_of(samples).float())
        features["estimate"] = torch.cat([estimate, scaled], dim=1)
        return features

    def feature_maps(self, handles: Handles) -> Float[Tensor, "batch channels rows columns"]:
        """Features of evaluated samples over space, of the block whose map the tap keeps.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or not evaluated.
            ConfigError: no maps are kept.
        """
        return self._maps_of(self._evaluated(handles))

    @property
    def map_bytes(self) -> int:
        """Bytes that maps of features take up now; released samples take none."""
        return self._samples.map_bytes

    @torch.no_grad()
    def estimate_change(self, handles: Handles) -> npt.NDArray[np.float64]:
        """Change of the denoised estimate since the parent's, rms, by that of half the log-SNR.

        NaN of samples that were not stepped to, and of those that were from noise alone, without
        signal. Kept where the gain model reads it.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or not evaluated.
        """
        samples = self._evaluated(handles)
        log_snr = self._stepper.log_snr
        changes = np.full(len(samples), np.nan)
        for row, sample in enumerate(samples):
            before = sample.before
            if before is not None:
                moved = self._denoised_of([sample])[0] - before.estimate.to(self._device)
                passed = (log_snr[sample.step_index] - log_snr[before.step_index]) / 2
                if passed.isfinite() and passed != 0:
                    changes[row] = moved.float().square().mean().sqrt() / passed
        return changes

    def aside(self) -> LatentEnvironment:
        """The same world without a sample and with a ledger of its own, to measure in."""
        return LatentEnvironment(
            network=self._denoiser.network,
            stepper=self._stepper,
            decoder=self._decoder,
            preview=self._preview,
            reward=self._reward,
            prompts=self._prompts,
            first_latents=self._first_latents,
            rows_per_call=self._rows_per_call,
            rows_by_phase=self.ledger.rows_by_phase,
            prices=self.ledger.prices,
            storage=self._samples.storage,
            half=self._samples.half,
            kinds=self._denoiser.kinds,
        )

    # Making lazy samples

    def _make(self, samples: Sequence[Sample], *, completes: bool = True) -> None:
        """Give lazy samples their latents: by kind of origin, each kind in one go.

        Unless it ``completes``, those that need the network for it are left midway.
        """
        generations = [_lazy(samples)]  # of samples and their sources, which are made first
        while generations[-1]:
            origins = [sample.origin for sample in generations[-1]]
            generations.append(_lazy([o.source for o in origins if isinstance(o, _HAS_SOURCE)]))
        for generation in reversed(generations[:-1]):
            with timed(self.ledger, "step", self._device):
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
            self._latents_of(parents),
            self._guided(parents, [edge.action.guidance for edge in edges]),
            [self._samples.fetch_state(_state(parent)) for parent in parents],
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
            estimates = self._samples.keep(self._denoised_of(parents))
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
        with timed(self.ledger, "step", self._device):
            actions = [cast(Action, state.midway) for state in states]
            latents, after = self._stepper.complete(
                midpoints,
                self._denoiser.combine(outputs, [action.guidance for action in actions]),
                states,
                [half.seed for half in halves],
            )
            self._settle(samples, latents, after)

    def _awaits_midpoint(self, sample: Sample) -> bool:
        """Whether a sample is not made, and takes a network call to be."""
        origin = sample.origin
        if isinstance(origin, Stepped):
            return self._stepper.needs_midpoint(origin.parent.step_index, origin.action)
        return isinstance(origin, Midway)

    def _noise_again(self, samples: Sequence[Sample]) -> None:
        origins = [cast(Renoised, sample.origin) for sample in samples]
        clean = self._estimates_of([origin.source for origin in origins])
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
            latents = self._latents_of([source])
            if source.noise is None:
                fresh = self._initial_noise(origin.seed)
                varied = _mixed(latents, fresh, strength)
            else:
                before = self._injected(source.noise)
                after = _mixed(before, self._noise([origin.seed], before.dtype), strength)
                # The difference alone, so that what is not perturbed stays bit for bit.
                varied = latents + source.noise.std * (after - before)
            self._settle([sample], varied.to(latents.dtype), [_state(source)])

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

    # Reading samples

    def _latents_of(self, samples: Sequence[Sample]) -> Tensor:
        return self._samples.gather([_made(sample) for sample in samples])

    def _guided(
        self, samples: Sequence[Sample], guidances: Sequence[float | None] | None = None
    ) -> Tensor:
        outputs = [_outputs(sample) for sample in samples]
        unconditional = [o.unconditional for o in outputs if o.unconditional is not None]
        return self._denoiser.combine(
            Outputs(
                self._samples.gather([o.conditional for o in outputs]),
                self._samples.gather(unconditional) if unconditional else None,
            ),
            guidances,
        )

    def _maps_of(self, samples: Sequence[Sample]) -> Tensor:
        maps = [sample.map for sample in samples if sample.map is not None]
        if len(maps) < len(samples):
            raise ConfigError(
                f"{len(samples) - len(maps)} of {len(samples)} samples have no map of features: "
                "make the environment with a tap that keeps one, FeatureTap.mapping(block)"
            )
        return self._samples.gather(maps)

    def _denoised_of(
        self, samples: Sequence[Sample], guidances: Sequence[float | None] | None = None
    ) -> Tensor:
        return self._stepper.denoised(
            self._latents_of(samples),
            self._guided(samples, guidances),
            [sample.step_index for sample in samples],
        )

    def _estimates_of(self, samples: Sequence[Sample]) -> Tensor:
        """Clean latents of made samples: estimated where unfinished."""
        clean = self._latents_of(samples)
        rows = [row for row, s in enumerate(samples) if s.step_index < self.num_steps]
        if rows:
            clean[rows] = self._denoised_of([samples[row] for row in rows])
        return clean

    # Decoding and scoring

    def _batches(self, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        """Samples, as many at once as fill a call where memory suffices."""
        for chunk in chunks(len(samples), self._rows_per_call):
            yield samples[chunk.rows]

    def _decode(self, clean: Tensor, samples: Sequence[Sample], *, preview: bool) -> Tensor:
        """Pictures of clean latents, one a sample."""
        decoder = self._preview if preview and self._preview is not None else self._decoder
        is_preview = decoder is not self._decoder
        each = Counts(previews=1) if is_preview else Counts(decodes=1)

        def call(chunk: Chunk) -> Tensor:
            return decoder(chunk.fill(clean[chunk.rows]))

        pictures = []
        phase = "preview" if is_preview else "decode"
        for chunk, images in self._calls.make(phase, len(samples), call):
            problems = [sample.problem for sample in samples[chunk.rows]]
            self.ledger.charge(problems, each)
            pictures.append(images[: chunk.useful])
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def _score(
        self, images: Tensor, samples: Sequence[Sample], handles: Mapping[Sample, int]
    ) -> list[float]:
        """Rewards of pictures, one a sample."""
        problems = [sample.problem for sample in samples]
        prompts = [self._prompts[problem] for problem in problems]
        names = [handles[sample] for sample in samples]

        def call(chunk: Chunk) -> npt.NDArray[np.float64]:
            filled = chunk.fill(images[chunk.rows])
            return self._reward(filled, chunk.pick(prompts), chunk.pick(names))

        found: list[float] = []
        for chunk, scores in self._calls.make("reward", len(samples), call):
            self.ledger.charge(problems[chunk.rows], Counts(reward_calls=1))
            found += [float(score) for score in scores[: chunk.useful]]
        return found

    def _pictures(
        self,
        clean: Callable[[Sequence[Sample]], Tensor],
        samples: Sequence[Sample],
        *,
        preview: bool,
    ) -> Tensor:
        return torch.cat(
            [self._decode(clean(some), some, preview=preview) for some in self._batches(samples)]
        )

    # Refusing

    def _check_guidance(self, guidance: float | None) -> None:
        if guidance is None:
            return
        if self.guidance_scale is None:
            raise ConfigError(
                f"guidance of a move is {guidance!r}, but there is nothing to scale: guidance is "
                "off, or an input of the network; call with guidance_scale above 1, or leave it "
                "None."
            )
        if not is_number(guidance) or math.isinf(guidance):
            raise ConfigError(f"guidance of a move is {guidance!r}; give a finite number or None.")

    def _finished(self, handles: Handles) -> list[Sample]:
        samples = self._samples[handles]
        self._refuse(
            handles,
            [sample.step_index < self.num_steps for sample in samples],
            f"is not finished; step it to {self.num_steps} first.",
        )
        return samples

    def _evaluated(self, handles: Handles) -> list[Sample]:
        samples = self._samples[handles]
        is_finished = [sample.step_index == self.num_steps for sample in samples]
        self._refuse(handles, is_finished, "is finished; ask for its reward.")
        is_fresh = [sample.outputs is None for sample in samples]
        self._refuse(handles, is_fresh, "is not evaluated; denoise it first.")
        return samples

    def _clean(self, handles: Handles) -> list[Sample]:
        samples = self._samples[handles]
        self._refuse(
            handles,
            [s.outputs is None and s.step_index < self.num_steps for s in samples],
            "is neither evaluated nor finished, so there is no estimate of it; denoise it first.",
        )
        return samples

    def _refuse(self, handles: Handles, wrong: Sequence[bool], complaint: str) -> None:
        if any(wrong):
            first = int(np.argmax(wrong))
            where = self._samples[handles][first].step_index
            raise SearchError(
                f"sample {handles[first]} (step index {where} of {self.num_steps}) {complaint}",
                handles=handles[np.array(wrong)].tolist(),
            )


def measure_prices(
    *,
    network: Network,
    stepper: Stepper,
    decoder: Decoder,
    reward: CheckedReward,
    prompt: str,
    latents: Float[Tensor, "1 *sample"],
    rows_per_call: int,
    preview: Decoder | None = None,
    repeats: int = 3,
) -> Prices:
    """Time one call of each kind, and say what a unit costs in rows through the network.

    The median of ``repeats`` calls, after one to warm up. What these calls spend is in no ledger.

    Args:
        network: conditioned on problem 0 at least.
        stepper: knows what the network sees of it.
        decoder: full decoder.
        reward: scores pictures.
        prompt: of problem 0.
        latents: initial noise of problem 0.
        rows_per_call: latents in every call, as in the search.
        preview: preview decoder; without one a preview costs a full decode.
        repeats: calls of each kind that are timed.
    """

    def seconds(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            call()
            synchronize(latents.device)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    def measure(size: int) -> Prices:
        batch = latents.expand(size, *latents.shape[1:]).contiguous()
        rows, prompts = [0] * size, [prompt] * size
        inputs, timesteps = stepper.network_input(batch, [stepper.initial_state()] * size)
        row = seconds(lambda: network(inputs, timesteps, rows)) / network.rows_per_latent
        images = decoder(batch)
        return Prices(
            decode=seconds(lambda: decoder(batch)) / row,
            preview=seconds(lambda: (preview or decoder)(batch)) / row,
            reward_call=seconds(lambda: reward(images, prompts, rows)) / row,
        )

    with torch.no_grad():
        return within_memory(rows_per_call, latents.device, measure)


def within_memory(rows: int, device: torch.device, measure: Callable[[int], T]) -> T:
    """What ``measure`` says of ``rows``, or of half as many (and so on) where memory runs out."""
    while True:
        try:
            return measure(rows)
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        rows //= 2
        free_memory(device)


_HAS_SOURCE = (Renoised, Perturbed)


@contextmanager
def _or_as_before(samples: Sequence[Sample]) -> Iterator[None]:
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


def _handles_of(
    samples: Sequence[Sample], handles: Handles, wanted: Sequence[bool]
) -> dict[Sample, int]:
    """The wanted samples, each once, with the handle that named it."""
    return {
        sample: handle
        for sample, handle, is_wanted in zip(samples, handles.tolist(), wanted, strict=True)
        if is_wanted
    }


def _made(sample: Sample) -> Tensor:
    assert sample.latents is not None
    return sample.latents


def _state(sample: Sample) -> SolverState:
    assert sample.state is not None
    return sample.state


def _outputs(sample: Sample) -> Outputs:
    assert sample.outputs is not None
    return sample.outputs


class _Codec(NamedTuple):
    """Decodes the estimates of particles at their image's cost, and encodes pictures."""

    decode_of: Callable[..., Tensor]
    encoder: Encoder
    samples: Sequence[Sample]

    def decode(self, clean: Tensor) -> Tensor:
        """Images in [0, 1], in calls of the same size as all."""
        return self.decode_of(clean, self.samples, preview=False)

    def encode(self, images: Tensor) -> Tensor:
        """Clean latents of images."""
        return self.encoder.encode(images)


def _exported(sample: Sample) -> dict[str, Any]:
    origin = sample.origin
    latents, state, seed = (
        (origin.latents, origin.state, origin.seed)
        if isinstance(origin, Midway)
        else (_made(sample), _state(sample), None)
    )
    outputs, before = sample.outputs, sample.before
    conditional, unconditional = (None, None) if outputs is None else outputs
    return {
        "problem": sample.problem,
        "step_index": sample.step_index,
        "latents": latents.clone().cpu(),
        "visited": list(state.visited),
        "history": [row.clone().cpu() for row in state.history],
        "memory": state.memory,
        "midway": None if state.midway is None else (*state.midway, seed),
        "noise": None if sample.noise is None else asdict(sample.noise),
        "conditional": None if conditional is None else conditional.clone().cpu(),
        "unconditional": None if unconditional is None else unconditional.clone().cpu(),
        "features": {name: row.clone().cpu() for name, row in sample.features.items()},
        "map": None if sample.map is None else sample.map.clone().cpu(),
        "before": before and (before.estimate.clone().cpu(), before.step_index, before.guidance),
        "values": dict(sample.values),
        "reward": sample.reward,
    }


def _restored(saved: dict[str, Any], storage: torch.device) -> Sample:
    def here(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone().to(storage)

    latents, step_index = saved["latents"].clone().to(storage), saved["step_index"]
    history = tuple(row.clone().to(storage) for row in saved["history"])
    state = SolverState(step_index, tuple(saved["visited"]), history, saved["memory"])
    origin = None
    if saved["midway"] is not None:
        *action, seed = saved["midway"]
        midway = Action(*action)
        state = replace(state, step_index=step_index - midway.stride, midway=midway)
        origin = Midway(latents, state, seed)
    conditional = here(saved["conditional"])
    noise = None if saved["noise"] is None else EdgeNoise(**saved["noise"])
    return Sample(
        problem=saved["problem"],
        step_index=step_index,
        origin=origin,
        noise=noise,
        latents=None if origin else latents,
        state=None if origin else state,
        outputs=None if conditional is None else Outputs(conditional, here(saved["unconditional"])),
        features={name: row.clone().to(storage) for name, row in saved["features"].items()},
        map=here(saved.get("map")),
        before=saved["before"]
        and Before(saved["before"][0].clone().to(storage), *saved["before"][1:]),
        values=dict(saved["values"]),
        reward=saved["reward"],
    )

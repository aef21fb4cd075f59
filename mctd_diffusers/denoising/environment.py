"""The environment of a search over a latent diffusion model.

It checks what it is asked and keeps the samples by handle; `reading`, `making`, `scoring` and
`fuser` do the work.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import Denoiser, FeatureTap, timed
from mctd_diffusers.denoising.exporting import exported, restored
from mctd_diffusers.denoising.fuser import Fuser, Group
from mctd_diffusers.denoising.fusion import VERDICTS
from mctd_diffusers.denoising.latents import (
    Drawn,
    EdgeNoise,
    Latents,
    Perturbed,
    Renoised,
    Sample,
    Stepped,
    made_state,
)
from mctd_diffusers.denoising.making import SampleMaker, or_as_before
from mctd_diffusers.denoising.protocols import (
    CheckedReward,
    Decoder,
    Encoder,
    FeatureDecoder,
    GainModel,
    Network,
    Outputs,
)
from mctd_diffusers.denoising.reading import SampleReader
from mctd_diffusers.denoising.scoring import Scorer
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.search.environment import (
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
        device = first_latents.device
        self.num_steps = stepper.num_steps
        self._stepper = stepper
        self._samples = Latents(device, storage, half=half)
        self._denoiser = Denoiser(
            network,
            stepper,
            rows_per_call=rows_per_call,
            ledger=self.ledger,
            device=device,
            features=features,
            kinds=kinds,
        )
        self._reader = SampleReader(self._samples, self._denoiser)
        self._maker = SampleMaker(
            self._samples,
            self._denoiser,
            self._reader,
            first_latents,
            keeps_estimates=fuses or (gain_model is not None and gain_model.reads_change),
        )
        self._scorer = Scorer(
            decoder=decoder,
            preview=preview,
            reward=reward,
            prompts=prompts,
            rows_per_call=rows_per_call,
            ledger=self.ledger,
            device=device,
        )
        self._fuser = Fuser(
            self._reader,
            self._scorer,
            stepper,
            self.ledger,
            device,
            encoder=encoder,
            feature_decoder=feature_decoder,
        )
        self._gain_model = gain_model
        self._first_latents = first_latents
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
        with or_as_before(fresh):
            self._maker.make(fresh)
            outputs, features, maps = self._denoiser(
                self._reader.latents(fresh),
                [made_state(sample) for sample in fresh],
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
                self._stepper.noise_std(made_state(parent), action),
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
            for some in self._scorer.batches(list(fresh)):
                clean = self._reader.denoised(some, [scale] * len(some))
                values += self._scorer.score(
                    self._scorer.decode(clean, some, preview=True), some, fresh
                )
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
        self._maker.make(list(fresh))
        rewards: list[float] = []
        for some in self._scorer.batches(list(fresh)):
            images = self._scorer.decode(self._reader.latents(some), some, preview=False)
            rewards += self._scorer.score(images, some, fresh)
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
        with timed(self.ledger, "gain", self._samples.device):
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
            [self._maker.awaits_midpoint(sample) for sample in samples],
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
        wanted: list[Group] = []
        for particles, shares, method, seed, guidance in zip(
            groups,
            weights,
            methods,
            seeds.tolist(),
            guidances or [None] * len(groups),
            strict=True,
        ):
            self._check_guidance(guidance)
            samples = self._evaluated(particles)
            check_one_level(
                [s.step_index for s in samples], [s.problem for s in samples], particles
            )
            wanted.append(Group(samples, shares, method, seed, guidance))
        fused = self._fuser(wanted)
        handles = np.full(len(fused), REJECTED, dtype=np.int64)
        for place, (group, found) in enumerate(zip(wanted, fused, strict=True)):
            if found.verdict == VERDICTS[0]:
                sample = self._maker.take_in(found, group.samples[0], group.guidance)
                handles[place] = self._samples.add([sample])[0]
        verdicts = [VERDICTS.index(found.verdict) for found in fused]
        correlations = [found.correlation for found in fused]
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
        return self._reader.relative_changes(self._evaluated(handles))

    @torch.no_grad()
    def export(self, handles: Handles) -> list[dict[str, Any]]:
        """Copy of the samples on the host, in plain types, fit for ``torch.save``."""
        samples = self._samples[handles]
        self._maker.make(samples, completes=False)
        return [exported(sample) for sample in samples]

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
        samples = [restored(sample, self._samples.storage) for sample in saved]
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
        self._maker.make(samples)
        return self._scorer.pictures(self._reader.latents, samples, preview=False)

    @torch.no_grad()
    def previews(self, handles: Handles) -> Float[Tensor, "batch 3 height width"]:
        """Pictures of the denoised estimates of unfinished, evaluated samples, by preview.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or not evaluated.
        """
        samples = self._evaluated(handles)
        return self._scorer.pictures(self._reader.denoised, samples, preview=True)

    @torch.no_grad()
    def denoised(self, handles: Handles) -> Float[Tensor, "batch *sample"]:
        """Denoised estimates of evaluated samples, and the latents of finished ones.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is neither evaluated nor finished.
        """
        samples = self._clean(handles)
        self._maker.make(samples)
        return self._reader.estimates(samples)

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
        self._maker.make(samples)
        return self._reader.latents(samples)

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
        return self._reader.features(self._evaluated(handles))

    def feature_maps(self, handles: Handles) -> Float[Tensor, "batch channels rows columns"]:
        """Features of evaluated samples over space, of the block whose map the tap keeps.

        Raises:
            CapacityError: a handle is not known.
            SearchError: a sample is finished, or not evaluated.
            ConfigError: no maps are kept.
        """
        return self._reader.maps(self._evaluated(handles))

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
        return self._reader.changes_by_log_snr(self._evaluated(handles))

    def aside(self) -> LatentEnvironment:
        """The same world without a sample and with a ledger of its own, to measure in."""
        return LatentEnvironment(
            network=self._denoiser.network,
            stepper=self._stepper,
            decoder=self._scorer.decoder,
            preview=self._scorer.preview,
            reward=self._scorer.reward,
            prompts=self._scorer.prompts,
            first_latents=self._first_latents,
            rows_per_call=self._denoiser.rows_per_call,
            rows_by_phase=self.ledger.rows_by_phase,
            prices=self.ledger.prices,
            storage=self._samples.storage,
            half=self._samples.half,
            kinds=self._denoiser.kinds,
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


def _handles_of(
    samples: Sequence[Sample], handles: Handles, wanted: Sequence[bool]
) -> dict[Sample, int]:
    """The wanted samples, each once, with the handle that named it."""
    return {
        sample: handle
        for sample, handle, is_wanted in zip(samples, handles.tolist(), wanted, strict=True)
        if is_wanted
    }

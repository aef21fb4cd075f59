"""Refining an information gain evaluator by what searches observe, without making it worse.

A search observes variances and gains of jumps, but neither truncation errors nor similarities to
the finished sample: these are held where they were by distillation from the head as it began, on
the same states. A share of the images is never learned from; where what is observed of them is
predicted worse after an update than before, the update is undone.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.calibration import Calibration
from mctd_diffusers.models.ige import IGEOutput, InformationGainEvaluator
from mctd_diffusers.models.losses import JumpTargets, JumpWeights, jump_loss, variance_nll
from mctd_diffusers.models.observations import Observations, digest_of, joined, no_observations
from mctd_diffusers.search.seeding import root_seed_of
from mctd_diffusers.search.settings import check_setting

_WEIGHTS: Final = JumpWeights(variance=0.1, gain=0.1, similarity=2.0, ranking=0.0)


@dataclass(frozen=True)
class RefinementSettings:
    """How a head is refined while it is used.

    Attributes:
        steps: of gradient descent in one update.
        batch_size: groups of siblings in a step.
        learning_rate: of Adam, which begins anew with each update.
        buffer_size: groups that are kept to learn from; the oldest go first.
        validation_size: groups to validate on; once there are so many, they stay as they are.
        validation_share: of the images that are validated on, and not learned from.
        least: groups in both parts before anything is learned.
        typical_share: of the groups whose features are passed over, from which the head learns what
            it says of the typical state.
        held_jumps: further jumps of each state of which predictions are held where they were.
        weights: of the terms of the loss. What is held weighs more than what is learned, and
            ranking is left out: it pulls predictions apart that are to stay where they are.
        seed: decides what is drawn.

    Raises:
        ConfigError: a setting is outside its range.
    """

    steps: int = 20
    batch_size: int = 64
    learning_rate: float = 3e-4
    buffer_size: int = 4096
    validation_size: int = 512
    validation_share: float = 0.2
    least: int = 16
    typical_share: float = 0.15
    held_jumps: int = 3
    weights: JumpWeights = _WEIGHTS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "buffer_size", "validation_size", "least"):
            check_setting(name, getattr(self, name), 1, whole=True)
        check_setting("held_jumps", self.held_jumps, 0, whole=True)
        check_setting("seed", self.seed, 0, whole=True)
        for name in ("learning_rate", "validation_share", "typical_share"):
            check_setting(name, getattr(self, name), 0, 1)


class IGEUpdate(NamedTuple):
    """What a pipeline's head learned from a call with ``online_ige=True``.

    Attributes:
        observed: groups of siblings that the call's searches observed, and none before.
        training: groups that are learned from, of all calls.
        validation: groups that are validated on, of all calls.
        loss_before: of the head on the latter, in nats a group, up to a constant; ``None`` if there
            were too few groups to learn.
        loss_after: the same after the update.
        is_kept: whether the update was kept; if not, the head is as it was, to the last bit.
    """

    observed: int
    training: int
    validation: int
    loss_before: float | None = None
    loss_after: float | None = None
    is_kept: bool = False


class Learner:
    """A copy of a head that learns from observations; the head itself stays as it is.

    Without dropout: what is held where it was begins with no error at all, and the few steps of an
    update follow from what is drawn for them.

    Args:
        head: to begin with.
        anchor: whose truncation errors and similarities are held.
        settings: of the refinement.
    """

    def __init__(
        self,
        head: InformationGainEvaluator,
        anchor: InformationGainEvaluator,
        settings: RefinementSettings,
    ) -> None:
        self.head = copy.deepcopy(head).float().eval().requires_grad_(True)
        self._anchor = anchor
        self._settings = settings
        self._calibration = calibration_of(head)
        self._optimizer = torch.optim.Adam(self.head.parameters(), lr=settings.learning_rate)

    def step(self, observations: Observations, rng: np.random.Generator) -> float:
        """One step of gradient descent on groups that are drawn by their weights.

        So the loss needs none: a group that counts twice is drawn twice as often.

        Returns:
            The loss.
        """
        settings, size = self._settings, self._settings.batch_size
        shares = observations.weight / observations.weight.sum()
        batch = observations.take(rng.choice(len(observations), size, p=shares))
        held = settings.held_jumps
        places = torch.from_numpy(rng.random((size, held))).float()
        is_typical = torch.from_numpy(rng.random(size) < settings.typical_share)
        with torch.enable_grad():
            inputs = _inputs(self.head, batch)
            source, target = inputs[1], inputs[2]
            further = source[:, None] + (target.max() - source[:, None]) * places.to(source.device)
            targets = torch.cat([target, further], dim=1)
            rows = (inputs[0], source, targets, is_typical.to(source.device))
            predicted = self.head(*rows)
            loss, _ = jump_loss(
                predicted,
                self._targets(batch, _anchored(self._anchor, rows)),
                *_apart(targets),
                reward_scale=self.head.config["reward_scale"],
                weights=settings.weights,
            )
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            self._optimizer.step()
        return float(loss.detach())

    def _targets(self, batch: Observations, held: IGEOutput) -> JumpTargets:
        """What is observed of the first jump of each state, and of all of them what is held."""
        nothing = torch.full_like(held.mean_gain, torch.nan)
        gain, variance = nothing.clone(), nothing
        gain[:, 0] = torch.from_numpy(batch.gains(self._calibration))
        variance[:, 0] = torch.from_numpy(batch.variances(self._calibration))
        return JumpTargets(gain, variance, held.final_similarity, held.log_truncation_error)


class Refiner:
    """Refines one head from call to call, and remembers what was observed.

    Args:
        head: written to where an update is kept.
        settings: of the refinement.

    Attributes:
        training: what is learned from, of the images that are not validated on.
        validation: what is validated on.
    """

    @torch.inference_mode(False)
    def __init__(
        self, head: InformationGainEvaluator, settings: RefinementSettings | None = None
    ) -> None:
        self.head = head
        self.settings = settings or RefinementSettings()
        self.training = no_observations(head.config["feature_channels"])
        self.validation = self.training
        self._anchor = copy.deepcopy(head).float().eval().requires_grad_(False)
        self._seen: set[bytes] = set()
        self._updates = 0

    def collect(self, observations: Observations) -> int:
        """Remember what the search of one image observed; what is known already counts once.

        Groups at noise levels that the head does not know are left out, and where a feature is not
        finite.

        Returns:
            Groups that are new.

        Raises:
            ConfigError: the features are of another model.
        """
        if not len(observations):
            return 0
        check_observations(self.head, observations)
        digest = digest_of(observations)
        if digest in self._seen:
            return 0
        self._seen.add(digest)
        known = observations.take(is_known(self.head, observations))
        if not is_validated_on(int(observations.image[0]), self.settings.validation_share):
            kept = joined([self.training, known])
            self.training = kept.take(slice(max(0, len(kept) - self.settings.buffer_size), None))
        elif len(self.validation) < self.settings.validation_size:
            grown = joined([self.validation, known])
            self.validation = grown.take(slice(self.settings.validation_size))
        return len(observations)

    @torch.inference_mode(False)
    def update(self, observed: int) -> IGEUpdate:
        """Take a few steps on what is remembered, and keep them if validation does not suffer.

        Args:
            observed: groups that are new since the last time; without any nothing is learned.
        """
        report = IGEUpdate(observed, len(self.training), len(self.validation))
        if not observed or min(report.training, report.validation) < self.settings.least:
            return report
        rng = np.random.default_rng([self.settings.seed, self._updates])
        self._updates += 1
        learner = Learner(self.head, self._anchor, self.settings)
        for _ in range(self.settings.steps):
            learner.step(self.training, rng)
        refined = copy.deepcopy(self.head)
        refined.load_state_dict(learner.head.state_dict())
        before, after = (
            validation_loss(head, self.validation, self.settings) for head in (self.head, refined)
        )
        is_kept = after <= before  # not so of NaN
        if is_kept:
            write_weights(self.head, refined)
        return report._replace(loss_before=before, loss_after=after, is_kept=is_kept)


@torch.no_grad()
def validation_loss(
    head: InformationGainEvaluator, observations: Observations, settings: RefinementSettings
) -> float:
    """How badly a head predicts what was observed: both likelihoods of `jump_loss`, added up.

    Args:
        head: in any precision; the loss is of its weights as they are, in single precision.
        observations: at least one, all of them known to the head.
        settings: says which share of the loss is that of the typical state.

    Returns:
        Nats a group, up to a constant.
    """
    head = copy.deepcopy(head).float().eval()
    features, source, target = _inputs(head, observations)
    calibration, scale = calibration_of(head), head.config["reward_scale"]
    variance = torch.from_numpy(observations.variances(calibration) / scale**2)
    gain = torch.from_numpy(observations.gains(calibration) / scale)
    weight = torch.from_numpy(observations.weight)
    losses = []
    for given in (features, None):
        predicted = head.forward(given, source, target)
        log_variance = predicted.log_variance[:, 0].double().cpu() - 2 * math.log(scale)
        missed = predicted.mean_gain[:, 0].double().cpu() / scale - gain
        terms = variance_nll(log_variance, variance)
        terms = terms + (missed.square() / 2).nan_to_num(nan=0.0)
        losses.append(float((weight * terms).sum() / weight.sum()))
    seen, typical = losses
    return (1 - settings.typical_share) * seen + settings.typical_share * typical


@torch.no_grad()
def write_weights(head: InformationGainEvaluator, refined: InformationGainEvaluator) -> None:
    """Take over the weights of a refined head.

    The figures in the card that a head was loaded with are not those of other weights: so that
    card is no longer pushed along.
    """
    head.load_state_dict(refined.state_dict())
    head.register_to_config(_name_or_path="")


def calibration_of(head: InformationGainEvaluator) -> Calibration | None:
    """By which a head takes values; ``None`` takes them as they are."""
    curves = head.config["calibration"]
    return Calibration.from_dict(curves) if curves else None


def is_validated_on(image: int, share: float) -> bool:
    """Whether an image is one of the share to validate on, by a hash of its root seed."""
    return root_seed_of(b"validation|%d" % image) < share * 2**63


def is_known(head: InformationGainEvaluator, observations: Observations) -> npt.NDArray[np.bool_]:
    """Which groups are at noise levels that a head was trained at, with finite features."""
    known = np.ones(len(observations), np.bool_)
    for level in (observations.source_log_snr, observations.target_log_snr):
        known &= head.covers(torch.from_numpy(level)).numpy()
    for rows in observations.features.values():
        known &= np.isfinite(rows).all(axis=1)
    return known


def check_observations(head: InformationGainEvaluator, observations: Observations) -> None:
    """Refuse what was observed of another model.

    Raises:
        ConfigError: a block of features is missing, or has another number of channels.
    """
    if not observations.features:
        raise ConfigError(
            "these observations have no features: search with online_ige=True, or by "
            "stride_policy='ige'"
        )
    head.check_features({name: torch.empty(f.shape) for name, f in observations.features.items()})


def _inputs(
    head: InformationGainEvaluator, observations: Observations
) -> tuple[dict[str, Tensor], Float[Tensor, " groups"], Float[Tensor, "groups 1"]]:
    """Features and both noise levels, as a head takes them."""
    device = head.typical.device
    features = {name: torch.from_numpy(f).to(device) for name, f in observations.features.items()}
    source = torch.from_numpy(observations.source_log_snr).float().to(device)
    target = torch.from_numpy(observations.target_log_snr[:, None]).float().to(device)
    return features, source, target


@torch.no_grad()
def _anchored(anchor: InformationGainEvaluator, rows: tuple[Any, ...]) -> IGEOutput:
    """What the head that it all began with says of the same states and jumps."""
    return anchor.to(rows[1].device).forward(*rows)


def _apart(targets: Float[Tensor, "groups jumps"]) -> tuple[Tensor, Tensor]:
    """States and cells of jumps that nothing is ranked by."""
    rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
    return rows, rows

"""The gold judge: a detector that reads a scene off its picture and checks the prompt's facts.

No search and no reward sees it, and it is of another kind than the reward: a small fully
convolutional network that marks the centres of objects on a grid and names noun and colour of each.
It reads the picture without knowing the prompt; the facts of the prompt are then checked against
what it saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.scenes import (
    COLOURS,
    OBJECTS,
    Fact,
    PlacedObject,
    facts,
    parse_prompt,
)
from mctd_diffusers.models.losses import SceneTargets

EMBEDDED_JUDGE = Path(__file__).parent.parent / "embedded" / "judge"
"""Folder of the judge that ships in the box."""

MIN_PROBABILITY = 0.05
"""Peaks below this are not looked at."""

MAX_SIGHTINGS = 12
"""Most peaks of a picture that are looked at, the most probable first."""

POSITION_SOFTNESS = 0.04
"""Distance between centres, as a fraction of the picture, at which a relation is e to 1 sure."""


class SceneOutputs(NamedTuple):
    """What the network says of each cell of its grid.

    Attributes:
        centre: logit that the centre of an object lies here.
        noun: logits over nouns, given that one does.
        colour: logits over colours, natural colour last.
        offset: from the middle of the cell to the centre (x, y), in cells.
        features: what the heads read.
        coarse: features of the coarsest stage.
    """

    centre: Float[Tensor, "batch rows columns"]
    noun: Float[Tensor, "batch nouns rows columns"]
    colour: Float[Tensor, "batch colours rows columns"]
    offset: Float[Tensor, "batch 2 rows columns"]
    features: Float[Tensor, "batch channels rows columns"]
    coarse: Float[Tensor, "batch wide half_rows half_columns"]


@dataclass(frozen=True)
class Sighting:
    """One object that the judge believes to see.

    Attributes:
        probability: that there is an object, in [0, 1].
        nouns: probability of each noun of the vocabulary, summing to 1.
        colours: probability of each colour, the last being "natural", summing to 1.
        x: centre from the left, as a fraction of the picture.
        y: centre from the top, as a fraction of the picture.
    """

    probability: float
    nouns: Float[np.ndarray, " nouns"]
    colours: Float[np.ndarray, " colours"]
    x: float
    y: float


@dataclass(frozen=True)
class JudgeReport:
    """The verdict on a batch of pictures.

    Attributes:
        gold: mean probability of the prompt's facts, for each picture, in [0, 1].
        all_right: whether every fact is more probable than not.
        facts: the facts of each prompt.
        probabilities: of each of these facts.
    """

    gold: Float[np.ndarray, " batch"]
    all_right: np.ndarray
    facts: tuple[tuple[Fact, ...], ...]
    probabilities: tuple[Float[np.ndarray, " _"], ...]


class _Block(nn.Module):
    """A residual block of two 3x3 convolutions; the first may halve the resolution."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


class SceneJudge(ModelMixin, ConfigMixin):
    """Finds the objects of a scene: centres on a grid of a quarter of the resolution, noun, colour.

    Args:
        nouns: the vocabulary of objects.
        colours: the vocabulary of colours; "natural" is added as the last class.
        channels: widths at a half, a quarter and an eighth of the resolution; multiples of 8.
        sample_size: side of the pictures it was trained on, in pixels; others are resized.

    Reference: Zhou et al., "Objects as points" (2019), for centres as peaks of a heat map.
    """

    @register_to_config
    def __init__(
        self,
        nouns: Sequence[str] = OBJECTS,
        colours: Sequence[str] = COLOURS,
        channels: Sequence[int] = (32, 64, 96),
        sample_size: int = 64,
    ) -> None:
        super().__init__()
        half, quarter, eighth = channels
        self.stem = nn.Conv2d(3, half, 3, 2, 1)
        self.level2 = _Block(half, half)
        self.level4 = nn.Sequential(_Block(half, quarter, 2), _Block(quarter, quarter))
        self.level8 = nn.Sequential(_Block(quarter, eighth, 2), _Block(eighth, eighth))
        self.lateral = nn.Conv2d(eighth, quarter, 1)
        self.merge = _Block(quarter, quarter)
        self.sizes = [1, len(nouns), len(colours) + 1, 2]
        self.head = nn.Conv2d(quarter, sum(self.sizes), 1)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias[:1], -3.0)  # centres are rare

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> SceneOutputs:
        """Read pictures in [0, 1] of the size it was trained on."""
        images = images.to(dtype=self.dtype, device=self.device)
        x = functional.relu(self.stem(2 * images - 1))
        quarter = self.level4(self.level2(x))
        eighth = self.level8(quarter)
        upward = functional.interpolate(self.lateral(eighth), scale_factor=2.0, mode="nearest")
        merged = self.merge(quarter + upward)
        centre, noun, colour, offset = self.head(merged).split(self.sizes, dim=1)
        return SceneOutputs(centre[:, 0], noun, colour, offset, merged, eighth)

    @torch.no_grad()
    def _read(self, images: Float[Tensor, "batch 3 height width"]) -> SceneOutputs:
        """Resize as needed and read."""
        size = self.config.sample_size
        if images.shape[-2:] != (size, size):
            images = functional.interpolate(
                images.float(), (size, size), mode="bilinear", antialias=True
            )
        return self(images)

    def features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[np.ndarray, "batch features"]:
        """Describe pictures by the mean and spread of its inner features, for distances and KID."""
        outputs = self._read(images)
        parts = [
            statistic
            for maps in (outputs.features.double(), outputs.coarse.double())
            for statistic in (maps.mean(dim=(2, 3)), maps.std(dim=(2, 3)))
        ]
        return torch.cat(parts, dim=1).cpu().numpy()

    def sightings(self, images: Float[Tensor, "batch 3 height width"]) -> list[list[Sighting]]:
        """List what the judge sees in each picture in [0, 1], the most probable first."""
        outputs = self._read(images)
        # A peak is the largest of the 5x5 cells around it: objects lie at least 6 cells apart.
        peaks = outputs.centre == functional.max_pool2d(outputs.centre[:, None], 5, 1, 2)[:, 0]
        noun = outputs.noun.double().softmax(dim=1).cpu().numpy()
        colour = outputs.colour.double().softmax(dim=1).cpu().numpy()
        offset = outputs.offset.double().cpu().numpy()
        heat = (outputs.centre.double().sigmoid() * peaks).cpu().numpy()
        return [
            _decode(*reading, self.config.sample_size // 4)
            for reading in zip(heat, noun, colour, offset, strict=True)
        ]

    def score(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> JudgeReport:
        """Check each picture in [0, 1] against the facts of its prompt.

        Raises:
            ConfigError: a prompt outside the grammar, or not one prompt for each picture.
        """
        if len(images) != len(prompts):
            raise ConfigError(
                f"{len(images)} images and {len(prompts)} prompts: pass one prompt each"
            )
        claims = tuple(facts(parse_prompt(prompt)) for prompt in prompts)
        vocabulary = {"nouns": self.config.nouns, "colours": self.config.colours}
        probabilities = tuple(
            np.array([fact_probability(fact, seen, **vocabulary) for fact in claim])
            for claim, seen in zip(claims, self.sightings(images), strict=True)
        )
        return JudgeReport(
            gold=np.array([float(values.mean()) for values in probabilities]),
            all_right=np.array([bool((values > 0.5).all()) for values in probabilities]),
            facts=claims,
            probabilities=probabilities,
        )


def load_judge(folder: str | Path = EMBEDDED_JUDGE) -> SceneJudge:
    """Load a judge, by default the one in the box, in float32 and evaluation mode.

    Raises:
        ConfigError: there is no judge in the folder.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"no judge in {str(folder)!r}: train one with training/train_judge.py")
    judge: SceneJudge = SceneJudge.from_pretrained(folder)
    return judge.float().eval()


def fact_probability(
    fact: Fact,
    seen: Sequence[Sighting],
    *,
    nouns: Sequence[str] = OBJECTS,
    colours: Sequence[str] = COLOURS,
) -> float:
    """Return how probable a fact is, given what was seen.

    Sightings are independent events, each an object of a noun and a colour with the probabilities
    it carries. "object": at least one is of the noun. "count": their number, a Poisson-binomial
    law. "colour": at least one is of the noun, and none of those has another colour. "position":
    some pair of them stands so, by a logistic function of the distance between centres.

    Args:
        fact: what has to be true.
        seen: the sightings of one picture.
        nouns: vocabulary of their ``nouns``.
        colours: vocabulary of their ``colours``, without "natural".
    """
    tints = list(colours)
    named = _present(seen, list(nouns).index(fact.noun))
    if fact.kind == "object":
        return _any(named)
    if fact.kind == "count":
        assert fact.count is not None
        law = poisson_binomial(named)
        return float(law[fact.count]) if fact.count < len(law) else 0.0
    coloured = _tinted(named, seen, tints, fact.colour)
    if fact.kind == "colour":
        return _any(named) * float(np.prod(1 - (named - coloured)))
    assert fact.other is not None
    others = _present(seen, list(nouns).index(fact.other))
    return _position(fact, seen, coloured, _tinted(others, seen, tints, fact.other_colour))


def poisson_binomial(probabilities: Float[np.ndarray, " events"]) -> Float[np.ndarray, " counts"]:
    """Return the law of the number of independent events that happen.

    Args:
        probabilities: of each event, in [0, 1].

    Returns:
        Probability of 0, 1, ..., events; sums to 1.

    >>> poisson_binomial(np.array([0.5, 0.5])).tolist()
    [0.25, 0.5, 0.25]
    """
    law = np.ones(1)
    for probability in probabilities:
        law = np.convolve(law, [1 - probability, probability])
    return law


def scene_targets(
    scenes: Sequence[Sequence[PlacedObject]],
    *,
    grid: int,
    nouns: Sequence[str] = OBJECTS,
    colours: Sequence[str] = COLOURS,
) -> SceneTargets:
    """Draw what the judge should say of scenes: heat around centres, and noun and colour there.

    Args:
        scenes: the objects of each picture.
        grid: cells along each side.
        nouns: vocabulary; an object outside it is left out, as if it were background.
        colours: vocabulary; no colour is the class after the last.

    Returns:
        Targets for `scene_loss`.
    """
    heat = torch.zeros(len(scenes), grid, grid)
    noun = torch.full((len(scenes), grid, grid), -1)
    colour = torch.full((len(scenes), grid, grid), -1)
    offset = torch.zeros(len(scenes), 2, grid, grid)
    middles = torch.arange(grid) + 0.5
    for row, scene in enumerate(scenes):
        for placed in scene:
            x, y = grid * placed.x, grid * placed.y
            if placed.noun not in nouns or not (0 <= x < grid and 0 <= y < grid):
                continue
            spread = max(0.1 * grid * placed.size, 0.9)
            across, down = middles - x, middles - y
            bump = torch.exp(-(across[None, :] ** 2 + down[:, None] ** 2) / (2 * spread**2))
            bump[int(y), int(x)] = 1.0
            near = torch.maximum(across.abs()[None, :], down.abs()[:, None]) <= 1.5
            heat[row] = torch.maximum(heat[row], bump)
            noun[row][near] = list(nouns).index(placed.noun)
            tint = len(colours) if placed.colour is None else list(colours).index(placed.colour)
            colour[row][near] = tint
            offset[row, 0][near] = -across.expand(grid, grid)[near]
            offset[row, 1][near] = -down[:, None].expand(grid, grid)[near]
    return SceneTargets(heat, noun, colour, offset)


def _decode(
    heat: Float[np.ndarray, "rows columns"],
    noun: Float[np.ndarray, "nouns rows columns"],
    colour: Float[np.ndarray, "colours rows columns"],
    offset: Float[np.ndarray, "2 rows columns"],
    grid: int,
) -> list[Sighting]:
    """Turn the peaks of one picture into sightings."""
    rows, columns = np.nonzero(heat >= MIN_PROBABILITY)
    order = np.argsort(-heat[rows, columns], kind="stable")[:MAX_SIGHTINGS]
    return [
        Sighting(
            probability=float(heat[row, column]),
            nouns=noun[:, row, column],
            colours=colour[:, row, column],
            x=float((column + 0.5 + offset[0, row, column]) / grid),
            y=float((row + 0.5 + offset[1, row, column]) / grid),
        )
        for row, column in zip(rows[order], columns[order], strict=True)
    ]


def _present(seen: Sequence[Sighting], noun: int) -> Float[np.ndarray, " sightings"]:
    """Return for each sighting the probability that it is an object of the noun."""
    return np.array([one.probability * one.nouns[noun] for one in seen], dtype=np.float64)


def _tinted(
    present: Float[np.ndarray, " sightings"],
    seen: Sequence[Sighting],
    colours: Sequence[str],
    colour: str | None,
) -> Float[np.ndarray, " sightings"]:
    """Return the probability that it is such an object and of the colour, if one is named."""
    if colour is None:
        return present
    tint = colours.index(colour)
    return present * np.array([one.colours[tint] for one in seen], dtype=np.float64)


def _any(probabilities: Float[np.ndarray, " events"]) -> float:
    """Return the probability that at least one of independent events happens."""
    return float(1 - np.prod(1 - probabilities))


def _position(
    fact: Fact,
    seen: Sequence[Sighting],
    first: Float[np.ndarray, " sightings"],
    second: Float[np.ndarray, " sightings"],
) -> float:
    """Return the probability that some pair of objects stands in the relation of ``fact``."""
    places = np.array([(one.x, one.y) for one in seen], dtype=np.float64).reshape(-1, 2)
    axis = 0 if fact.relation in ("to the left of", "to the right of") else 1
    gap = places[None, :, axis] - places[:, None, axis]  # from the first object to the second
    if fact.relation in ("to the right of", "below"):
        gap = -gap
    holds = 1 / (1 + np.exp(-gap / POSITION_SOFTNESS))
    np.fill_diagonal(holds, 0.0)  # an object is not beside itself
    return _any((first[:, None] * second[None, :] * holds).ravel())

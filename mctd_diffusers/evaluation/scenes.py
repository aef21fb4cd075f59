"""What the model in the box can be asked for: vocabulary, captions, their facts, held-out pairs.

A *scene* is a picture of one to four objects, and its caption says what is in it. The grammar::

    prompt   := group | group "and" group | group relation group
                each with an optional ", STYLE style"
    group    := number [colour] noun
    number   := "a" | "an" | "one" | "two" | "three" | "four"
    relation := "to the left of" | "to the right of" | "above" | "below"

`ScenePrompt.caption` writes it and `parse_prompt` reads it back. `facts` says what a picture has to
show for the caption to be true, which is what a judge measures.

A model is tested on *combinations* of known words that no training picture shows. Which pairs are
held out is decided here by SHA-256, so that the data, the prompt lists and the tests agree.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mctd_diffusers.errors import ConfigError

OBJECTS: tuple[str, ...] = (
    "airplane",
    "apple",
    "banana",
    "bicycle",
    "bulb",
    "butterfly",
    "cactus",
    "car",
    "cat",
    "crown",
    "cup",
    "fish",
    "guitar",
    "heart",
    "house",
    "key",
    "mushroom",
    "octopus",
    "pizza",
    "rocket",
    "snowman",
    "star",
    "sunflower",
    "umbrella",
)
COLOURS: tuple[str, ...] = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
)
STYLES: tuple[str, ...] = ("noto", "twemoji", "fluent", "flat", "blob", "emojione", "fxemoji")
RELATIONS: tuple[str, ...] = ("to the left of", "to the right of", "above", "below")
KINDS: tuple[str, ...] = (
    "one_object",
    "two_objects",
    "counting",
    "colours",
    "positions",
    "colour_attribution",
)
MAX_OBJECTS = 4
"""Most objects that fit in one picture (a grid of two by two)."""

MISSING_SPRITES: frozenset[tuple[str, str]] = frozenset({("butterfly", "fxemoji")})
"""(object, style) pairs that no art set has."""

_IRREGULAR_PLURALS = {
    "butterfly": "butterflies",
    "cactus": "cactuses",
    "fish": "fish",
    "octopus": "octopuses",
    "snowman": "snowmen",
}
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_NUMBER_WORDS = {"a": 1, "an": 1, **{word: number for number, word in _NUMBERS.items()}}
_PLURALS = {noun: _IRREGULAR_PLURALS.get(noun, noun + "s") for noun in OBJECTS}
_NOUN_WORDS = {**{plural: noun for noun, plural in _PLURALS.items()}, **{n: n for n in OBJECTS}}
_GRAMMAR = (
    "a prompt is 'NUMBER [COLOUR] NOUN', or two of these joined by 'and', "
    + ", ".join(repr(relation) for relation in RELATIONS)
    + ", with an optional ', STYLE style' (numbers: a, an, one to four; colours: "
    + ", ".join(COLOURS)
    + "; nouns: "
    + ", ".join(OBJECTS)
    + "; styles: "
    + ", ".join(STYLES)
    + ")"
)


def plural(noun: str) -> str:
    """Gives the plural that captions use: ``plural("snowman") == "snowmen"``."""
    return _PLURALS[noun]


def _check_word(word: str, words: Sequence[str], what: str) -> None:
    if word not in words:
        raise ConfigError(f"{word!r} is not a known {what}; {_GRAMMAR}")


@dataclass(frozen=True)
class SceneItem:
    """A group of alike objects in a scene.

    Args:
        noun: one of `OBJECTS`.
        count: how many, 1 to 4.
        colour: one of `COLOURS`, or ``None`` for whatever colour the art has by nature.

    Raises:
        ConfigError: a word or a count outside the vocabulary.
    """

    noun: str
    count: int = 1
    colour: str | None = None

    def __post_init__(self) -> None:
        _check_word(self.noun, OBJECTS, "noun")
        if self.colour is not None:
            _check_word(self.colour, COLOURS, "colour")
        if self.count not in _NUMBERS:
            raise ConfigError(
                f"count={self.count} for {self.noun!r}: a picture holds 1 to {MAX_OBJECTS} objects"
            )

    def caption(self) -> str:
        """Writes the group in words, such as "an orange crown" or "two cars"."""
        words = [*([self.colour] if self.colour else []), plural(self.noun)]
        if self.count == 1:
            words[-1] = self.noun
            article = "an" if words[0][0] in "aeiou" else "a"
            return " ".join([article, *words])
        return " ".join([_NUMBERS[self.count], *words])


def kind_of(items: Sequence[SceneItem], relation: str | None) -> str:
    """Names the kind of prompt that these items make, one of `KINDS`.

    With a relation it is "positions"; else two items are "colour_attribution" where a colour is
    named and "two_objects" where none is; else one item is "counting" where there are several of
    it, "colours" where a colour is named, and "one_object".
    """
    if relation is not None:
        return "positions"
    if len(items) == 2:
        coloured = any(item.colour is not None for item in items)
        return "colour_attribution" if coloured else "two_objects"
    if items[0].count > 1:
        return "counting"
    return "one_object" if items[0].colour is None else "colours"


@dataclass(frozen=True)
class ScenePrompt:
    """A caption in parts; `make_prompt` fills in the kind.

    Args:
        kind: one of `KINDS`; has to be what `kind_of` says of the rest.
        items: one or two groups, of different nouns, together at most four objects.
        relation: one of `RELATIONS`, where the first group lies seen from the second.
        style: one of `STYLES`, for the whole picture.

    Raises:
        ConfigError: parts that make no prompt of the grammar.
    """

    kind: str
    items: tuple[SceneItem, ...]
    relation: str | None = None
    style: str | None = None

    def __post_init__(self) -> None:
        if len(self.items) not in (1, 2):
            raise ConfigError(f"{len(self.items)} groups of objects; {_GRAMMAR}")
        nouns = [item.noun for item in self.items]
        if len(set(nouns)) < len(nouns):
            raise ConfigError(f"both groups are of {plural(nouns[0])!r}; name two different nouns")
        total = sum(item.count for item in self.items)
        if total > MAX_OBJECTS:
            raise ConfigError(f"{total} objects; a picture holds at most {MAX_OBJECTS}")
        if self.relation is not None:
            _check_word(self.relation, RELATIONS, "relation")
            if len(self.items) != 2:
                raise ConfigError(f"{self.relation!r} needs a second group; {_GRAMMAR}")
            if any(item.count > 2 for item in self.items):
                raise ConfigError(
                    f"three {plural(self.items[0].noun)} do not fit in half a picture; with a "
                    "relation a group has at most two objects"
                )
        if self.style is not None:
            _check_word(self.style, STYLES, "style")
        if self.kind != (kind := kind_of(self.items, self.relation)):
            raise ConfigError(f"kind={self.kind!r}, but {self.caption()!r} is of kind {kind!r}")

    def caption(self) -> str:
        """Writes the prompt in words; `parse_prompt` is the inverse."""
        joint = f" {self.relation or 'and'} "
        text = joint.join(item.caption() for item in self.items)
        return text if self.style is None else f"{text}, {self.style} style"


def make_prompt(
    items: Iterable[SceneItem], relation: str | None = None, style: str | None = None
) -> ScenePrompt:
    """Makes a `ScenePrompt` of the kind that its parts say.

    Raises:
        ConfigError: parts that make no prompt of the grammar.
    """
    items = tuple(items)
    kind = kind_of(items, relation) if items else KINDS[0]
    return ScenePrompt(kind, items, relation, style)


def _parse_group(text: str, prompt: str) -> SceneItem:
    words = text.split()
    if len(words) not in (2, 3):
        raise ConfigError(f"cannot read {text!r} in {prompt!r}; {_GRAMMAR}")
    if words[0] not in _NUMBER_WORDS:
        raise ConfigError(f"{words[0]!r} is no number, in {prompt!r}; {_GRAMMAR}")
    if len(words) == 3 and words[1] not in COLOURS:
        raise ConfigError(f"{words[1]!r} is no known colour, in {prompt!r}; {_GRAMMAR}")
    count = _NUMBER_WORDS[words[0]]
    noun = _NOUN_WORDS.get(words[-1])
    if noun is None:
        raise ConfigError(f"{words[-1]!r} is no known noun, in {prompt!r}; {_GRAMMAR}")
    if words[-1] != (expected := noun if count == 1 else plural(noun)):
        raise ConfigError(
            f"{words[0]!r} and {words[-1]!r} do not agree, in {prompt!r}; write {expected!r}"
        )
    return SceneItem(noun, count, words[1] if len(words) == 3 else None)


def parse_prompt(text: str) -> ScenePrompt:
    """Reads a caption of the grammar; case and spare spaces do not matter.

    Example:
        >>> parse_prompt("a green cat to the left of a yellow star").items[1].colour
        'yellow'

    Raises:
        ConfigError: a word or a form outside the grammar; the message names the word and the
            grammar.
    """
    plain = " ".join(text.lower().split())
    style = None
    body = plain
    if match := re.fullmatch(r"(.*?) ?, ?(\S+) style", plain):
        body, style = match[1], match[2]
        if style not in STYLES:
            raise ConfigError(f"{style!r} is no known style, in {text!r}; {_GRAMMAR}")
    parts = re.split(rf" ({'|'.join(RELATIONS)}|and) ", body)
    if len(parts) not in (1, 3):
        raise ConfigError(f"{text!r} has more than two groups of objects; {_GRAMMAR}")
    items = [_parse_group(part, text) for part in parts[::2]]
    joint = parts[1] if len(parts) == 3 else None
    return make_prompt(items, None if joint == "and" else joint, style)


@dataclass(frozen=True)
class Fact:
    """One thing that a picture must show for its caption to be true.

    Args:
        kind: "object" (there is at least one), "count" (there are exactly ``count``), "colour"
            (every one is of ``colour``), "position" (a ``noun`` lies ``relation`` an ``other``).
        noun: what the fact is about.
        count: set for "count" only.
        colour: set for "colour"; for "position" the colour in which the noun is named, if any.
        relation: set for "position" only.
        other: the noun that a position is seen from.
        other_colour: the colour in which the other noun is named, if any.
    """

    kind: Literal["object", "count", "colour", "position"]
    noun: str
    count: int | None = None
    colour: str | None = None
    relation: str | None = None
    other: str | None = None
    other_colour: str | None = None


def facts(prompt: ScenePrompt) -> tuple[Fact, ...]:
    """Lists what a picture must show for a prompt to be true.

    Every group must be there. A count is a fact only where the prompt names a number above one,
    as in GenEval (Ghosh et al., 2023): "a cup" is true of a picture with two cups. Style is not a
    fact.
    """
    found: list[Fact] = []
    for item in prompt.items:
        found.append(Fact("object", item.noun))
        if item.count > 1:
            found.append(Fact("count", item.noun, count=item.count))
        if item.colour is not None:
            found.append(Fact("colour", item.noun, colour=item.colour))
    if prompt.relation is not None:
        first, second = prompt.items
        found.append(
            Fact(
                "position",
                first.noun,
                colour=first.colour,
                relation=prompt.relation,
                other=second.noun,
                other_colour=second.colour,
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class PlacedObject:
    """An object as drawn in a picture.

    Args:
        noun: one of `OBJECTS`.
        colour: the colour it was tinted in, or ``None`` where the art kept its own colours.
        style: one of `STYLES`.
        x: its centre from the left edge, as a fraction of the picture.
        y: its centre from the top edge, as a fraction of the picture.
        size: its side, as a fraction of the picture.
    """

    noun: str
    colour: str | None
    style: str
    x: float
    y: float
    size: float


# --- held out -------------------------------------------------------------------------------------


def stable_hash(*words: object) -> int:
    """Hashes words to an integer below 2**64, the same on every machine (SHA-256)."""
    digest = hashlib.sha256("|".join(str(word) for word in words).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _choose(
    pairs: Iterable[tuple[str, ...]], num: int, most: int, name: str
) -> frozenset[tuple[str, ...]]:
    """Takes `num` pairs in the order of their hash, at most `most` of any one word."""
    taken: list[tuple[str, ...]] = []
    uses: Counter[str] = Counter()
    for pair in sorted(pairs, key=lambda pair: stable_hash(name, *pair)):
        if len(taken) < num and uses[pair[0]] < most:
            taken.append(pair)
            uses[pair[0]] += 1
    return frozenset(taken)


@dataclass(frozen=True)
class HeldOut:
    """The combinations of known words that no training picture shows.

    Args:
        colours: (object, colour), 42 of 192, at most three colours of an object.
        counts: (object, count as a word), 18 of 72 (two to four), at most two of an object.
        styles: (object, style), 45 of 167, at most three of an object.
        pairs: (object, object) in alphabetical order, 55 of 276.
    """

    colours: frozenset[tuple[str, ...]]
    counts: frozenset[tuple[str, ...]]
    styles: frozenset[tuple[str, ...]]
    pairs: frozenset[tuple[str, ...]]

    def broken_by(self, prompt: ScenePrompt) -> tuple[str, ...]:
        """Names which held-out sets a prompt touches, of "colours", "counts", "styles", "pairs"."""
        touched: list[str] = []
        items = prompt.items
        if any(item.colour and (item.noun, item.colour) in self.colours for item in items):
            touched.append("colours")
        if any((item.noun, _NUMBERS[item.count]) in self.counts for item in items):
            touched.append("counts")
        if any((item.noun, prompt.style) in self.styles for item in items):
            touched.append("styles")
        if tuple(sorted(item.noun for item in items)) in self.pairs:
            touched.append("pairs")
        return tuple(touched)


@functools.cache
def held_out() -> HeldOut:
    """Says which combinations are held out; always the same."""
    numbers = [_NUMBERS[count] for count in (2, 3, 4)]
    sprites = [p for p in itertools.product(OBJECTS, STYLES) if p not in MISSING_SPRITES]
    return HeldOut(
        colours=_choose(itertools.product(OBJECTS, COLOURS), 42, 3, "colour"),
        counts=_choose(itertools.product(OBJECTS, numbers), 18, 2, "count"),
        styles=_choose(sprites, 45, 3, "style"),
        pairs=_choose(itertools.combinations(OBJECTS, 2), 55, len(OBJECTS), "pair"),
    )


# --- the committed prompt lists -------------------------------------------------------------------

PROMPTS_PER_KIND = 20


def draw_prompts() -> dict[str, list[ScenePrompt]]:
    """Draws both prompt lists by hash from the held-out combinations.

    Even places of each kind's hash order go to "tune", odd ones to "report". Of a kind's 40 prompts
    each tests its own combination as far as these last (18 counts make two or three prompts each).
    """
    out = held_out()
    candidates: dict[str, list[ScenePrompt]] = {kind: [] for kind in KINDS}
    for noun, style in out.styles:
        candidates["one_object"].append(make_prompt([SceneItem(noun)], style=style))
    for noun, colour in out.colours:
        candidates["colours"].append(make_prompt([SceneItem(noun, 1, colour)]))
    for noun, word in out.counts:
        known = [c for c in COLOURS if (noun, c) not in out.colours]
        known.sort(key=lambda colour: stable_hash("counting", noun, word, colour))
        for colour_or_none in (None, *known[:2]):
            item = SceneItem(noun, _NUMBER_WORDS[word], colour_or_none)
            candidates["counting"].append(make_prompt([item]))
    for pair in out.pairs:
        first, second = sorted(pair, key=lambda noun: stable_hash("order", *pair, noun))
        candidates["two_objects"].append(make_prompt([SceneItem(first), SceneItem(second)]))
        relation = RELATIONS[stable_hash("relation", *pair) % len(RELATIONS)]
        colours: list[str | None] = [None, None]
        if stable_hash("coloured", *pair) % 2:
            for place, noun in enumerate((first, second)):
                known = [c for c in COLOURS if (noun, c) not in out.colours and c != colours[0]]
                colours[place] = min(known, key=lambda c: stable_hash("tint", *pair, c))
        items = [SceneItem(first, 1, colours[0]), SceneItem(second, 1, colours[1])]
        candidates["positions"].append(make_prompt(items, relation))
    for (noun, colour), (other, tint) in itertools.combinations(sorted(out.colours), 2):
        if noun != other and colour != tint and tuple(sorted((noun, other))) not in out.pairs:
            items = [SceneItem(noun, 1, colour), SceneItem(other, 1, tint)]
            candidates["colour_attribution"].append(make_prompt(items))
    lists: dict[str, list[ScenePrompt]] = {"tune": [], "report": []}
    for prompts in candidates.values():
        prompts.sort(key=lambda prompt: stable_hash("prompt", prompt.caption()))
        chosen = prompts[: 2 * PROMPTS_PER_KIND]
        lists["tune"] += chosen[::2]
        lists["report"] += chosen[1::2]
    return lists


def load_prompts(name: str) -> list[ScenePrompt]:
    """Loads a committed prompt list: 120 prompts, 20 of each kind, in the order of `KINDS`.

    Args:
        name: "tune" for choosing settings, "report" for every figure that is reported.

    Raises:
        ConfigError: another name, or a file that does not follow the grammar.
    """
    if name not in ("tune", "report"):
        raise ConfigError(f"no prompt list named {name!r}; there are 'tune' and 'report'")
    path = Path(__file__).parent / "prompts" / f"{name}.json"
    return [parse_prompt(entry["prompt"]) for entry in json.loads(path.read_text("utf-8"))]

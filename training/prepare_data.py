"""Builds the pictures that the model in the box learns from: single emoji, and scenes made of them.

From seven sets of emoji art on npm (fetched with ``npm pack``; licences in the ``licence`` column)
it makes a `datasets.DatasetDict` of 64x64 pictures on white:

- ``singles``: every captioned base emoji in every style, without skin tones, duplicates or blanks;
- ``unseen_emoji``: 5 % of the base emoji, in no other split, for the autoencoder's PSNR only;
- ``scenes``: one to four objects of the vocabulary, tinted, at clear places, with captions of the
  grammar of `mctd_diffusers.evaluation.scenes`, and none of its held-out combinations;
- ``held_out_scenes``: real pictures of exactly those combinations, equal over the six kinds.

Launch, from the root of the repository (two to three minutes on one core, once the 160 MB of
archives are there)::

    python training/prepare_data.py --output data/emoji

It does nothing where the output already is what it would make.
"""

from __future__ import annotations

import colorsys
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture
from tqdm import tqdm
from transformers import HfArgumentParser

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.scenes import (
    COLOURS,
    KINDS,
    MISSING_SPRITES,
    OBJECTS,
    RELATIONS,
    STYLES,
    HeldOut,
    PlacedObject,
    SceneItem,
    ScenePrompt,
    held_out,
    make_prompt,
    stable_hash,
)

logger = logging.getLogger("prepare_data")

SIDE = 64
UNSEEN_SHARE = 0.05
RECIPE = 1
"""Raise this whenever the pictures change, so that older folders are built anew."""


@dataclass(frozen=True)
class Source:
    """An npm package with art in one style; `num_base` is how many base emoji it must yield."""

    style: str
    package: str
    version: str
    licence: str
    num_base: int


SOURCES = (
    Source("noto", "emoji-datasource-google", "16.0.0", "Apache-2.0", 1911),
    Source("twemoji", "emoji-datasource-twitter", "16.0.0", "CC-BY-4.0", 1911),
    Source("fluent", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", 1852),
    Source("flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", 1594),
    Source("blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", 1217),
    Source("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", 1066),
    Source("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", 239),
)
LABELS = Source("", "emojibase-data", "17.0.0", "MIT", 1923)

VOCABULARY_KEYS = {
    "airplane": "2708",
    "apple": "1f34e",
    "banana": "1f34c",
    "bicycle": "1f6b2",
    "bulb": "1f4a1",
    "butterfly": "1f98b",
    "cactus": "1f335",
    "car": "1f697",
    "cat": "1f431",
    "crown": "1f451",
    "cup": "2615",
    "fish": "1f41f",
    "guitar": "1f3b8",
    "heart": "2764",
    "house": "1f3e0",
    "key": "1f511",
    "mushroom": "1f344",
    "octopus": "1f419",
    "pizza": "1f355",
    "rocket": "1f680",
    "snowman": "26c4",
    "star": "2b50",
    "sunflower": "1f33b",
    "umbrella": "2614",
}
FXEMOJI_NAMES = {
    "1f34e": "redapple",
    "1f431": "cat",
    "1f355": "sliceofpizza",
    "26c4": "snowmanwithoutsnow",
    "2764": "redheart",
    "2614": "umbrellawithraindrops",
    "1f4a1": "lightbulb",
    "2615": "hotbeverage",
    "1f3e0": "housebuilding",
}
"""Icons of fxemoji that are named otherwise than their CLDR label."""

TINTS = {
    "red": (0, 0.85, 0.22, 0.47, 0.82),
    "orange": (28, 0.95, 0.26, 0.52, 0.82),
    "yellow": (52, 0.95, 0.30, 0.55, 0.87),
    "green": (125, 0.75, 0.18, 0.40, 0.80),
    "blue": (218, 0.85, 0.20, 0.48, 0.82),
    "purple": (276, 0.70, 0.20, 0.48, 0.82),
    "pink": (330, 0.90, 0.45, 0.72, 0.92),
    "brown": (24, 0.50, 0.12, 0.30, 0.64),
}
"""Hue in degrees, saturation, and lightness of the darkest, the median and the lightest part."""

KIND_SHARES = {
    "one_object": 0.19,
    "two_objects": 0.14,
    "counting": 0.15,
    "colours": 0.22,
    "positions": 0.15,
    "colour_attribution": 0.15,
}


@dataclass
class Options:
    """What to build, and from where."""

    output: str = field(
        default="data/emoji", metadata={"help": "folder for the finished DatasetDict"}
    )
    sources: str = field(
        default="data/src", metadata={"help": "folder of the npm archives; filled where they lack"}
    )
    num_scenes: int = field(default=50_000, metadata={"help": "training scenes to compose"})
    num_held_out_scenes: int = field(
        default=1_200, metadata={"help": "held-out scenes to compose, a multiple of six"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the scenes"})
    check_counts: bool = field(
        default=True, metadata={"help": "refuse archives that yield other numbers than expected"}
    )


# --- archives -------------------------------------------------------------------------------------


def archive_path(source: Source, folder: Path) -> Path:
    """Gives the name under which ``npm pack`` saves a package."""
    stem = source.package.removeprefix("@").replace("/", "-")
    return folder / f"{stem}-{source.version}.tgz"


def fetch(source: Source, folder: Path) -> Path:
    """Fetches a package's archive with ``npm pack``, unless it is there.

    Raises:
        ConfigError: npm is missing or fails, or the archive holds another version.
    """
    path = archive_path(source, folder)
    name = f"{source.package}@{source.version}"
    if not path.exists():
        if shutil.which("npm") is None:
            raise ConfigError(f"{path} is not there and npm is not installed; run: npm pack {name}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(
                ["npm", "pack", name, "--silent"], cwd=folder, check=True, capture_output=True
            )
        except subprocess.CalledProcessError as error:
            raise ConfigError(
                f"`npm pack {name}` failed: {error.stderr.decode(errors='replace').strip()}"
            ) from error
    found = json.loads(read_archive(path, r"package/package\.json")["package/package.json"])
    if found["version"] != source.version:
        raise ConfigError(f"{path} holds version {found['version']}, not {source.version}")
    return path


def read_archive(path: Path, pattern: str) -> dict[str, bytes]:
    """Reads the members of a .tgz whose whole name matches a pattern."""
    wanted = re.compile(pattern)
    contents: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if wanted.fullmatch(member.name) and (file := archive.extractfile(member)):
                contents[member.name] = file.read()
                if "\\" in pattern and pattern.endswith(r"package\.json"):
                    break
    return contents


# --- emoji ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """What emojibase says of a base emoji."""

    key: str
    text: str
    group: str


def emoji_key(codepoints: str) -> str:
    """Brings a codepoint string to the form by which all sources match.

    Example:
        >>> emoji_key("0023-FE0F-20E3")
        '23-20e3'
    """
    parts = codepoints.lower().lstrip("0").split("-")
    return "-".join(part for part in parts if part != "fe0f")


def slug(label: str) -> str:
    """Writes a CLDR label as iconify names its icons."""
    plain = re.sub("[:\u2019]", "", label.lower())
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")


def read_labels(path: Path) -> dict[str, Label]:
    """Reads the labels of base emoji (no skin tones, no regional indicators)."""
    contents = read_archive(path, r"package/en/(data|messages)\.json")
    records = json.loads(contents["package/en/data.json"])
    messages = json.loads(contents["package/en/messages.json"])
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    return {
        emoji_key(record["hexcode"]): Label(
            emoji_key(record["hexcode"]), record["label"], groups[record["group"]]
        )
        for record in records
        if "group" in record
    }


def square(picture: Picture.Image) -> Picture.Image:
    """Brings a picture to 64x64 RGBA, centred on transparent white."""
    picture = picture.convert("RGBA")
    if picture.width != picture.height:
        side = max(picture.size)
        canvas = Picture.new("RGBA", (side, side), (255, 255, 255, 0))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = canvas
    if picture.width != SIDE:
        picture = picture.resize((SIDE, SIDE), Picture.Resampling.LANCZOS)
    return picture


def on_white(sprite: Picture.Image) -> Picture.Image:
    """Puts an RGBA sprite on opaque white."""
    canvas = Picture.new("RGBA", sprite.size, (255, 255, 255, 255))
    return Picture.alpha_composite(canvas, sprite).convert("RGB")


def read_datasource(source: Source, path: Path, labels: dict[str, Label]) -> dict[str, bytes]:
    """Reads the png files of an emoji-datasource package, by key."""
    vendor = source.package.rsplit("-", 1)[1]
    contents = read_archive(path, rf"package/(emoji\.json|img/{vendor}/64/[^/]+\.png)")
    found: dict[str, bytes] = {}
    for record in json.loads(contents["package/emoji.json"]):
        key = emoji_key(record["unified"])
        file = contents.get(f"package/img/{vendor}/64/{record['image']}")
        if key in labels and record[f"has_img_{vendor}"] and file is not None:
            found[key] = file
    return found


def read_webp(path: Path, labels: dict[str, Label]) -> dict[str, bytes]:
    """Reads the webp files of fluent-emoji-3d, by key."""
    contents = read_archive(path, r"package/assets/[^/]+\.webp")
    by_key = {emoji_key(Path(name).stem): file for name, file in contents.items()}
    return {key: file for key, file in by_key.items() if key in labels}


def read_iconify(source: Source, path: Path, labels: dict[str, Label]) -> dict[str, bytes]:
    """Renders the icons of an iconify package to png, by key."""
    import resvg_py

    contents = read_archive(path, r"package/(icons|chars)\.json")
    icons = json.loads(contents["package/icons.json"])
    names = {emoji_key(k): v for k, v in json.loads(contents["package/chars.json"]).items()}
    if not names:
        by_slug = {slug(label.text): label.key for label in reversed(labels.values())}
        names = {by_slug[name]: name for name in icons["icons"] if name in by_slug}
        if source.style == "fxemoji":
            names |= {k: v for k, v in FXEMOJI_NAMES.items() if v in icons["icons"]}
    found: dict[str, bytes] = {}
    for key, name in tqdm(names.items(), desc=source.style, unit="icon", leave=False):
        if key not in labels:
            continue
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
            f'width="128" height="{128 * height / width}">{icon["body"]}</svg>'
        )
        found[key] = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return found


def read_sprites(options: Options) -> tuple[dict[tuple[str, str], Picture.Image], dict[str, Label]]:
    """Reads every base emoji of every style as 64x64 RGBA, by (key, style).

    Raises:
        ConfigError: an archive that cannot be had, or that yields an unexpected number.
    """
    folder = Path(options.sources)
    labels = read_labels(fetch(LABELS, folder))
    if options.check_counts and len(labels) != LABELS.num_base:
        raise ConfigError(f"{LABELS.package}: {len(labels)} labels, expected {LABELS.num_base}")
    sprites: dict[tuple[str, str], Picture.Image] = {}
    for source in tqdm(SOURCES, desc="sources", unit="set"):
        path = fetch(source, folder)
        if source.package.startswith("emoji-datasource"):
            files = read_datasource(source, path, labels)
        elif source.package.startswith("@lobehub"):
            files = read_webp(path, labels)
        else:
            files = read_iconify(source, path, labels)
        if options.check_counts and len(files) != source.num_base:
            raise ConfigError(
                f"{source.package} {source.version} yields {len(files)} base emoji, expected "
                f"{source.num_base}; is the archive whole?"
            )
        for key, file in files.items():
            sprites[key, source.style] = square(Picture.open(io.BytesIO(file)))
    return sprites, labels


# --- pictures -------------------------------------------------------------------------------------


def encode(picture: Picture.Image) -> dict[str, Any]:
    """Encodes a picture as `datasets.Image` stores it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def single_caption(label: Label, noun: str | None, style: str) -> str:
    """Words a single emoji, half of the time (by hash) with its style."""
    text = noun or label.text.lower()
    is_phrase = ":" in text or (noun is None and text.endswith("s"))
    article = "" if is_phrase else ("an " if text[0] in "aeiou" else "a ")
    named = stable_hash("caption", label.key, style) % 2 == 0
    return f"{article}{text}, {style} style" if named else f"{article}{text}"


def tint(sprite: Picture.Image, colour: str) -> Picture.Image:
    """Recolours a sprite in one hue, keeping its inner shapes as lightness.

    The luminance of the visible pixels is stretched from its 2nd and 98th percentile to the
    colour's dark and light end, with the median at the pure colour: so the body of the object has
    that colour, whether its art is dark or pale.
    """
    hue, saturation, dark, middle, light = TINTS[colour]
    pixels = np.asarray(sprite, dtype=np.float32) / 255
    luminance = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    low, median, high = np.percentile(luminance[pixels[..., 3] > 0.5], [2, 50, 98])
    # At least a tenth of the range on each side: flat art has no contrast to be blown up.
    low, high = min(low, median - 0.1), max(high, median + 0.1)
    lightness = np.interp(luminance, [low, median, high], [dark, middle, light])
    table = np.array([colorsys.hls_to_rgb(hue / 360, i / 255, saturation) for i in range(256)])
    tinted = np.empty_like(pixels)
    tinted[..., :3] = table[np.rint(lightness * 255).astype(int)]
    tinted[..., 3] = pixels[..., 3]
    return Picture.fromarray(np.rint(tinted * 255).astype(np.uint8), "RGBA")


class Palette:
    """The vocabulary's sprites in every colour, tinted once each."""

    def __init__(self, sprites: dict[tuple[str, str], Picture.Image]) -> None:
        self._sprites: dict[tuple[str, str, str | None], Picture.Image] = {}
        for noun, key in VOCABULARY_KEYS.items():
            for style in STYLES:
                if (noun, style) in MISSING_SPRITES:
                    continue
                sprite = sprites[key, style]
                # Art sits in its box with unequal margins: crop, so that sizes mean something.
                box = sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
                sprite = square(sprite.crop(box))
                self._sprites[noun, style, None] = sprite
                for colour in COLOURS:
                    self._sprites[noun, style, colour] = tint(sprite, colour)

    def draw(self, placed: list[PlacedObject]) -> Picture.Image:
        """Draws objects on white at their places."""
        canvas = Picture.new("RGBA", (SIDE, SIDE), (255, 255, 255, 255))
        for item in placed:
            side = round(item.size * SIDE)
            sprite = self._sprites[item.noun, item.style, item.colour]
            sprite = sprite.resize((side, side), Picture.Resampling.LANCZOS)
            corner = (round(item.x * SIDE - side / 2), round(item.y * SIDE - side / 2))
            canvas.alpha_composite(sprite, corner)
        return canvas.convert("RGB")


# --- scenes ---------------------------------------------------------------------------------------


def draw_prompt(kind: str, rng: np.random.Generator) -> ScenePrompt:
    """Draws any prompt of a kind, without its style."""
    first, second = (OBJECTS[index] for index in rng.choice(len(OBJECTS), 2, replace=False))
    tints = [COLOURS[index] for index in rng.choice(len(COLOURS), 2, replace=False)]
    if kind == "one_object":
        return make_prompt([SceneItem(first)])
    if kind == "colours":
        return make_prompt([SceneItem(first, 1, tints[0])])
    if kind == "counting":
        colour = tints[0] if rng.random() < 0.5 else None
        return make_prompt([SceneItem(first, int(rng.integers(2, 5)), colour)])
    counts = (1, 1)
    if rng.random() < 0.2:
        several = [(1, 2), (2, 1), (2, 2)] + [(1, 3), (3, 1)] * (kind != "positions")
        counts = several[rng.integers(len(several))]
    if kind == "two_objects":
        colours: list[str | None] = [None, None]
    elif kind == "positions":
        coloured = rng.random() < 0.55
        colours = [tints[0], tints[1]] if coloured else [None, None]
    else:
        colours = [tints[0], tints[1]]
        if rng.random() < 0.12:
            colours[rng.integers(2)] = None
    items = [SceneItem(first, counts[0], colours[0]), SceneItem(second, counts[1], colours[1])]
    relation = RELATIONS[rng.integers(4)] if kind == "positions" else None
    return make_prompt(items, relation)


def draw_training_prompt(rng: np.random.Generator, out: HeldOut) -> ScenePrompt:
    """Draws a prompt that touches no held-out combination."""
    kind = str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
    while True:
        prompt = draw_prompt(kind, rng)
        if not out.broken_by(prompt):
            return prompt


def draw_held_out_prompt(kind: str, rng: np.random.Generator, out: HeldOut) -> ScenePrompt:
    """Draws a prompt whose combination is held out, as the kind's prompt lists do."""
    wanted = {
        "one_object": (),
        "two_objects": ("pairs",),
        "counting": ("counts",),
        "colours": ("colours",),
        "positions": ("pairs",),
        "colour_attribution": ("colours",),
    }[kind]
    if kind == "one_object":
        noun, style = sorted(out.styles)[rng.integers(len(out.styles))]
        return make_prompt([SceneItem(noun)], style=style)
    while True:
        prompt = draw_prompt(kind, rng)
        num_objects = sum(item.count for item in prompt.items)
        is_plain = num_objects == len(prompt.items) or kind == "counting"
        are_all_held_out = kind != "colour_attribution" or all(
            (item.noun, item.colour) in out.colours for item in prompt.items
        )
        if is_plain and are_all_held_out and out.broken_by(prompt) == wanted:
            return prompt


def choose_styles(
    prompt: ScenePrompt, rng: np.random.Generator, out: HeldOut, named_share: float
) -> tuple[ScenePrompt, list[str]]:
    """Chooses the art of each group: one style for all where one is free for all of them.

    Returns:
        The prompt, with its style named in `named_share` of the cases where there is one, and the
        style of each group.
    """
    if prompt.style is not None:
        return prompt, [prompt.style] * len(prompt.items)
    free = [
        [s for s in STYLES if (i.noun, s) not in out.styles | MISSING_SPRITES] for i in prompt.items
    ]
    common = [style for style in free[0] if all(style in styles for styles in free)]
    if not common:
        return prompt, [styles[rng.integers(len(styles))] for styles in free]
    style = common[rng.integers(len(common))]
    if rng.random() < named_share:
        prompt = dataclasses.replace(prompt, style=style)
    return prompt, [style] * len(prompt.items)


def place(prompt: ScenePrompt, styles: list[str], rng: np.random.Generator) -> list[PlacedObject]:
    """Puts a prompt's objects where its caption says, and otherwise anywhere in the grid."""
    num_objects = sum(item.count for item in prompt.items)
    centres: list[list[tuple[float, float]]]
    if num_objects == 1:
        size, jitter = int(rng.integers(44, 56)), 4.0
        centres = [[(32.0, 32.0)]]
    else:
        size, jitter = int(rng.integers(27, 32)), 2.5
        if prompt.relation is None:
            cells = [(16.0, 16.0), (48.0, 16.0), (16.0, 48.0), (48.0, 48.0)]
            order = iter(rng.permutation(4))
            centres = [[cells[next(order)] for _ in range(i.count)] for i in prompt.items]
        else:
            sides = (16.0, 48.0) if prompt.relation in ("to the left of", "above") else (48.0, 16.0)
            lone = float(rng.choice([16.0, 32.0, 48.0]))
            centres = []
            for side, item in zip(sides, prompt.items, strict=True):
                across = [16.0, 48.0] if item.count == 2 else [lone]
                beside = prompt.relation in ("to the left of", "to the right of")
                centres.append([(side, c) if beside else (c, side) for c in across])
    placed = []
    for item, style, group in zip(prompt.items, styles, centres, strict=True):
        for centre in group:
            x, y = (
                float(np.clip(c + rng.uniform(-jitter, jitter), size / 2, SIDE - size / 2)) / SIDE
                for c in centre
            )
            placed.append(PlacedObject(item.noun, item.colour, style, x, y, size / SIDE))
    return placed


def scene_rows(options: Options, palette: Palette, held_out_ones: bool) -> Iterator[dict[str, Any]]:
    """Composes scenes one by one; each depends on the seed and on its own number only."""
    out = held_out()
    name = "held_out_scenes" if held_out_ones else "scenes"
    total = options.num_held_out_scenes if held_out_ones else options.num_scenes
    licences = {source.style: source.licence for source in SOURCES}
    packages = {source.style: f"{source.package}@{source.version}" for source in SOURCES}
    for index in tqdm(range(total), desc=name, unit="scene"):
        rng = np.random.default_rng([options.seed, int(held_out_ones), index])
        if held_out_ones:
            prompt = draw_held_out_prompt(KINDS[index % len(KINDS)], rng, out)
            named_share = 0.0
        else:
            prompt = draw_training_prompt(rng, out)
            named_share = 0.6 if prompt.kind == "one_object" else 0.3
        prompt, styles = choose_styles(prompt, rng, out, named_share)
        placed = place(prompt, styles, rng)
        used = sorted(set(styles))
        key = f"{name}-{options.seed}-{index}"
        yield {
            "image": encode(palette.draw(placed)),
            "caption": prompt.caption(),
            "kind": prompt.kind,
            "style": used[0] if len(used) == 1 else "mixed",
            "licence": " AND ".join(sorted({licences[style] for style in used})),
            "source": " ".join(packages[style] for style in used),
            "key": key,
            "objects": json.dumps([dataclasses.asdict(item) for item in placed]),
            "half": stable_hash("half", key) % 2,
            "in_vocabulary": True,
        }


def single_rows(
    sprites: dict[tuple[str, str], Picture.Image], labels: dict[str, Label]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Makes the rows of ``singles`` and ``unseen_emoji``, and counts what was dropped and why."""
    nouns = {key: noun for noun, key in VOCABULARY_KEYS.items()}
    sources = {source.style: source for source in SOURCES}
    out = held_out()
    seen: set[bytes] = set()
    dropped: Counter[str] = Counter()
    singles: list[dict[str, Any]] = []
    unseen: list[dict[str, Any]] = []
    for (key, style), sprite in tqdm(sprites.items(), desc="singles", unit="emoji"):
        noun = nouns.get(key)
        picture = on_white(sprite)
        digest = hashlib.sha256(picture.tobytes()).digest()
        if labels[key].group == "component":
            dropped["component"] += 1
        elif digest in seen:
            dropped["duplicate"] += 1
        elif np.asarray(picture).std() < 2:
            dropped["blank"] += 1
        elif noun is not None and (noun, style) in out.styles:
            dropped["held-out style"] += 1
        else:
            seen.add(digest)
            placed = [PlacedObject(noun, None, style, 0.5, 0.5, 1.0)] if noun else []
            is_unseen = noun is None and stable_hash("unseen", key) < UNSEEN_SHARE * 2**64
            (unseen if is_unseen else singles).append(
                {
                    "image": encode(picture),
                    "caption": single_caption(labels[key], noun, style),
                    "kind": "one_object" if noun else "single",
                    "style": style,
                    "licence": sources[style].licence,
                    "source": f"{sources[style].package}@{sources[style].version}",
                    "key": f"{key}-{style}",
                    "objects": json.dumps([dataclasses.asdict(item) for item in placed]),
                    "half": stable_hash("half", key, style) % 2,
                    "in_vocabulary": noun is not None,
                }
            )
    return singles, unseen, dropped


# --- the whole ------------------------------------------------------------------------------------

FEATURES = Features(
    {
        "image": Image(),
        "caption": Value("string"),
        "kind": Value("string"),
        "style": Value("string"),
        "licence": Value("string"),
        "source": Value("string"),
        "key": Value("string"),
        "objects": Value("string"),
        "half": Value("int8"),
        "in_vocabulary": Value("bool"),
    }
)


def build(options: Options) -> DatasetDict:
    """Builds every split in memory.

    Raises:
        ConfigError: an archive that cannot be had, or that yields an unexpected number.
    """
    sprites, labels = read_sprites(options)
    singles, unseen, dropped = single_rows(sprites, labels)
    logger.info("left out of the singles: %s", dict(dropped))
    palette = Palette(sprites)
    rows = {
        "singles": singles,
        "unseen_emoji": unseen,
        "scenes": list(scene_rows(options, palette, held_out_ones=False)),
        "held_out_scenes": list(scene_rows(options, palette, held_out_ones=True)),
    }
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {column: [row[column] for row in split_rows] for column in FEATURES},
                features=FEATURES,
            )
            for split, split_rows in rows.items()
            if split_rows
        }
    )


def main(arguments: list[str] | None = None) -> None:
    """Builds the folder, unless it is already what these options make."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(arguments)
    output = Path(options.output)
    made_by = {
        "recipe": RECIPE,
        "num_scenes": options.num_scenes,
        "num_held_out_scenes": options.num_held_out_scenes,
        "seed": options.seed,
        "packages": [f"{source.package}@{source.version}" for source in (*SOURCES, LABELS)],
    }
    note = output / "prepared.json"
    if note.exists() and json.loads(note.read_text("utf-8")) == made_by:
        logger.info("%s is already prepared", output)
        return
    if output.exists() and not note.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} holds something else; name an empty or a new folder")
    unfinished = output.with_name(f"{output.name}.unfinished-{os.getpid()}")
    dataset = build(options)
    try:
        dataset.save_to_disk(str(unfinished))
        (unfinished / "prepared.json").write_text(json.dumps(made_by, indent=2), "utf-8")
        shutil.rmtree(output, ignore_errors=True)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for split, rows in dataset.items():
        logger.info("%s: %d pictures", split, len(rows))
    logger.info("scenes by kind: %s", dict(Counter(dataset["scenes"]["kind"])))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"prepare_data: {error}")

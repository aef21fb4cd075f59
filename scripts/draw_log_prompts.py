"""Draws prompts to log trajectories of: scenes of all kinds, none of them in a benchmark's lists.

    python scripts/draw_log_prompts.py data/log-prompts --train 600 --held-out 120

writes ``train.txt`` and ``held_out.txt``, a prompt a line; no prompt is in both.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from mctd_diffusers.evaluation.scenes import (
    COLOURS,
    KINDS,
    OBJECTS,
    RELATIONS,
    STYLES,
    SceneItem,
    ScenePrompt,
    load_prompts,
    make_prompt,
)


def draw_prompt(chance: random.Random, kind: str) -> ScenePrompt:
    """A scene of a kind; in one of two the style is named."""
    first, second = chance.sample(OBJECTS, 2)
    colour, other = chance.sample(COLOURS, 2)
    style = chance.choice([None, chance.choice(STYLES)])
    match kind:
        case "one_object":
            return make_prompt([SceneItem(first)], style=style)
        case "colours":
            return make_prompt([SceneItem(first, 1, colour)], style=style)
        case "counting":
            tint = chance.choice([None, colour])
            return make_prompt([SceneItem(first, chance.randint(2, 4), tint)], style=style)
        case "two_objects":
            return make_prompt([SceneItem(first), SceneItem(second)], style=style)
        case "colour_attribution":
            items = [SceneItem(first, 1, colour), SceneItem(second, 1, other)]
            return make_prompt(items, style=style)
    items = [SceneItem(first, chance.randint(1, 2)), SceneItem(second, 1)]
    return make_prompt(items, chance.choice(RELATIONS), style=style)


def main() -> None:
    """Draw the prompts and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    known = {prompt.caption() for name in ("tune", "report") for prompt in load_prompts(name)}
    drawn: list[str] = []
    while len(drawn) < given.train + given.held_out:
        caption = draw_prompt(chance, KINDS[len(drawn) % len(KINDS)]).caption()
        if caption not in known:
            known.add(caption)
            drawn.append(caption)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, captions in (("train", drawn[: given.train]), ("held_out", drawn[given.train :])):
        (given.folder / f"{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

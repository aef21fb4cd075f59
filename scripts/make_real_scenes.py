"""Writes the small sheet of real scenes that ships with the package, from the prepared data.

Two hundred and forty real pictures of held-out combinations, equal over the six kinds of prompt,
with their captions: the ceiling of every figure of ``mctd evaluate-model``. ::

    python scripts/make_real_scenes.py --dataset data/emoji
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_from_disk

from mctd_diffusers.evaluation.real_scenes import SHEET, RealScenes

NOTE = (
    "Scenes composed of emoji art by Google (Noto, Apache-2.0), Twitter and other contributors "
    "(Twemoji, CC-BY-4.0), Microsoft (Fluent Emoji, MIT), Ranks.com (EmojiOne 2.3, CC-BY-4.0) and "
    "Mozilla (FxEmojis, Apache-2.0), cropped, scaled and tinted; see embedded/ATTRIBUTION.md"
)


def main() -> None:
    """Chooses the pictures and writes sheet and captions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="data/emoji", help="folder of prepare_data.py")
    parser.add_argument("--split", default="held_out_scenes", help="split to choose from")
    parser.add_argument("--number", type=int, default=240, help="pictures, a multiple of six")
    parser.add_argument("--output", type=Path, default=SHEET, help="PNG; captions go beside it")
    options = parser.parse_args()
    scenes = RealScenes.from_split(load_from_disk(options.dataset)[options.split], options.number)
    scenes.save(options.output, copyright_note=NOTE)


if __name__ == "__main__":
    main()

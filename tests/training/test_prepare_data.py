"""The data script on archives of a few hand-made emoji: what it reads, drops and refuses."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image, ImageDraw

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.scenes import KINDS, held_out, parse_prompt

SCRIPT = Path(__file__).parents[2] / "training" / "prepare_data.py"
EXTRA = {
    "1f600": "grinning face",
    "1f921": "clown face",
    "1f9ff": "nazar amulet",
    "1f1fa": "flag: nowhere",
}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


prepare_data = load_script()


def disk(number: int, style: int, form: str) -> bytes:
    """Draws an emoji that differs for every number and style."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((6, 6, 57, 57), fill=(7 * number % 256, 30 * style, 90, 255))
    pen.rectangle((20, 20, 20 + number, 30), fill=(255, 255, 255, 255))
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
    return buffer.getvalue()


def write_archive(path: Path, version: str, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {"package.json": json.dumps({"version": version}).encode(), **files}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_archives(folder: Path) -> None:
    """Writes all eight archives: the vocabulary, a face, a blank and a component."""
    keys = [*prepare_data.VOCABULARY_KEYS.values(), *EXTRA]
    names = {key: noun for noun, key in prepare_data.VOCABULARY_KEYS.items()} | EXTRA
    groups = {"order": 0, "message": "things"}, {"order": 1, "message": "component"}
    records = [
        {"hexcode": key.upper(), "label": names[key], "group": int(key == "1f1fa")} for key in keys
    ]
    records.append({"hexcode": "1F1E6", "label": "regional indicator A"})
    write_archive(
        prepare_data.archive_path(prepare_data.LABELS, folder),
        prepare_data.LABELS.version,
        {
            "en/data.json": json.dumps(records).encode(),
            "en/messages.json": json.dumps({"groups": groups}).encode(),
        },
    )
    for style, source in enumerate(prepare_data.SOURCES):
        numbered = list(enumerate(keys))
        files: dict[str, bytes] = {}
        if source.package.startswith("emoji-datasource"):
            vendor = source.package.rsplit("-", 1)[1]
            listed = [
                {"unified": key.upper(), "image": f"{key}.png", f"has_img_{vendor}": True}
                for key in keys
            ]
            files["emoji.json"] = json.dumps(listed).encode()
            for number, key in numbered:
                # The second package repeats the first one's face, pixel for pixel.
                look = 0 if key == "1f600" else style
                files[f"img/{vendor}/64/{key}.png"] = disk(number, look, "PNG")
        elif source.package.startswith("@lobehub"):
            for number, key in numbered:
                blank = io.BytesIO()
                Image.new("RGBA", (64, 64)).save(blank, "WEBP")
                content = blank.getvalue() if key == "1f9ff" else disk(number, style, "WEBP")
                files[f"assets/{key}.webp"] = content
        else:
            icons = {
                prepare_data.slug(names[key]): {
                    "body": f'<circle cx="8" cy="8" r="{3 + number / 8 + style / 20}" '
                    f'fill="rgb({9 * number},{30 * style},60)"/>'
                }
                for number, key in numbered
            }
            by_key = source.style == "flat"
            chars = {key: prepare_data.slug(names[key]) for key in keys} if by_key else {}
            files["icons.json"] = json.dumps({"icons": icons, "width": 16, "height": 16}).encode()
            files["chars.json"] = json.dumps(chars).encode()
        write_archive(prepare_data.archive_path(source, folder), source.version, files)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder)
    return folder


def arguments(sources: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--sources", str(sources), "--output", str(output), "--check_counts", "false"),
        *("--num_scenes", "60", "--num_held_out_scenes", "12", *more),
    ]


@pytest.fixture(scope="module")
def output(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "emoji"
    prepare_data.main(arguments(sources, folder))
    return folder


@pytest.fixture(scope="module")
def dataset(output: Path) -> Iterator[Any]:
    return load_from_disk(str(output))


def test_keys_of_all_sources_meet_in_one_form() -> None:
    assert prepare_data.emoji_key("0023-FE0F-20E3") == prepare_data.emoji_key("23-20e3")
    assert prepare_data.slug("Mrs. Claus: dark\u2019s") == "mrs-claus-darks"


def test_singles_hold_every_kept_emoji_and_no_held_out_style(dataset: Any) -> None:
    singles = [*dataset["singles"], *dataset["unseen_emoji"]]
    found = {row["key"] for row in singles}
    keys = prepare_data.VOCABULARY_KEYS
    for noun, key in keys.items():
        for source in prepare_data.SOURCES:
            is_held_out = (noun, source.style) in held_out().styles
            assert (f"{key}-{source.style}" in found) != is_held_out
    assert "1f600-noto" in found
    assert "1f600-twemoji" not in found  # A duplicate.
    assert "1f9ff-fluent" not in found  # Blank.
    assert not any(key.startswith("1f1fa") for key in found)  # A component.


def test_unseen_emoji_are_in_no_training_split(dataset: Any) -> None:
    assert {key.split("-")[0] for key in dataset["unseen_emoji"]["key"]} == {"1f921"}
    assert not any(key.startswith("1f921") for key in dataset["singles"]["key"])


def test_every_row_names_its_licence_and_its_package(dataset: Any) -> None:
    allowed = {source.licence for source in prepare_data.SOURCES}
    packages = {f"{source.package}@{source.version}" for source in prepare_data.SOURCES}
    for rows in dataset.values():
        assert set(" AND ".join(rows["licence"]).split(" AND ")) <= allowed
        assert set(" ".join(rows["source"]).split()) <= packages


def test_training_scenes_show_no_held_out_combination(dataset: Any) -> None:
    out = held_out()
    for row in dataset["scenes"]:
        prompt = parse_prompt(row["caption"])
        assert prompt.kind == row["kind"]
        assert not out.broken_by(prompt)
        for item in json.loads(row["objects"]):
            assert (item["noun"], item["style"]) not in out.styles


def test_held_out_scenes_are_balanced_and_all_held_out(dataset: Any) -> None:
    rows = list(dataset["held_out_scenes"])
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, 2)
    assert all(held_out().broken_by(parse_prompt(row["caption"])) for row in rows)


def test_objects_lie_where_the_caption_says(dataset: Any) -> None:
    for split in ("scenes", "held_out_scenes"):
        for row in dataset[split]:
            prompt = parse_prompt(row["caption"])
            objects = json.loads(row["objects"])
            assert Counter(item["noun"] for item in objects) == {
                item.noun: item.count for item in prompt.items
            }
            if prompt.relation is None:
                continue
            axis = "x" if prompt.relation.startswith("to the") else "y"
            first, second = (
                [item[axis] for item in objects if item["noun"] == group.noun]
                for group in prompt.items
            )
            if prompt.relation in ("to the left of", "above"):
                assert max(first) + 0.25 < min(second)
            else:
                assert max(second) + 0.25 < min(first)


def test_pictures_are_64_pixels_square_on_white(dataset: Any) -> None:
    picture = np.asarray(dataset["scenes"][0]["image"])
    assert picture.shape == (64, 64, 3)
    assert (picture == 255).all(axis=2).mean() > 0.2


def test_both_halves_hold_scenes(dataset: Any) -> None:
    assert 15 < sum(dataset["scenes"]["half"]) < 45


@pytest.mark.parametrize("colour", list(prepare_data.TINTS))
@pytest.mark.parametrize("grey", [10, 128, 245])
def test_a_tint_gives_flat_art_its_pure_colour_whether_dark_or_pale(colour: str, grey: int) -> None:
    sprite = Image.new("RGBA", (64, 64), (grey, grey, grey, 255))
    hue, saturation, _, middle, _ = prepare_data.TINTS[colour]
    import colorsys

    expected = np.array(colorsys.hls_to_rgb(hue / 360, middle, saturation)) * 255
    tinted = np.asarray(prepare_data.tint(sprite, colour))[0, 0, :3]
    assert np.abs(tinted - expected).max() <= 3


def test_scenes_depend_on_the_seed_and_their_number_only(
    sources: Path, dataset: Any, tmp_path: Path
) -> None:
    prepare_data.main(arguments(sources, tmp_path / "again", "--num_scenes", "7"))
    again = load_from_disk(str(tmp_path / "again"))["scenes"]
    for row in range(7):
        first, second = dataset["scenes"][row], again[row]
        assert first["caption"] == second["caption"]
        assert np.array_equal(np.asarray(first["image"]), np.asarray(second["image"]))


def test_a_finished_folder_is_left_as_it_is(sources: Path, output: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    prepare_data.main(arguments(sources, output))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_folder_of_something_else_is_not_overwritten(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", "utf-8")
    with pytest.raises(ConfigError, match="holds something else"):
        prepare_data.main(arguments(sources, tmp_path))
    assert (tmp_path / "thesis.txt").exists()


def test_an_archive_that_yields_another_number_is_refused(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="28 labels, expected 1923"):
        prepare_data.main(arguments(sources, tmp_path / "data", "--check_counts", "true"))
    assert not (tmp_path / "data").exists()


def test_an_archive_of_another_version_is_refused(tmp_path: Path) -> None:
    source = prepare_data.LABELS
    write_archive(prepare_data.archive_path(source, tmp_path), "16.0.3", {})
    with pytest.raises(ConfigError, match=r"holds version 16\.0\.3, not 17\.0\.0"):
        prepare_data.fetch(source, tmp_path)


def test_a_missing_archive_without_npm_is_told_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"npm pack emojibase-data@17\.0\.0"):
        prepare_data.fetch(prepare_data.LABELS, tmp_path)

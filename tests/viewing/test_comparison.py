from __future__ import annotations

import json

from PIL import Image

from mctd_diffusers.search.environment import Counts, Ledger, Prices
from mctd_diffusers.viewing.comparison import (
    Column,
    Gold,
    comparison_picture,
    comparison_report,
    file_names,
    ledger_report,
)

PROMPTS = ["a cup", "a castle at night"]
PRICES = Prices(decode=3.0, preview=0.25, reward_call=0.5)


def column(label: str, rewards: list[float | None], **changes: object) -> Column:
    parts: dict[str, object] = {
        "label": label,
        "images": [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")],
        "rewards": rewards,
        "nfe": [16, 16],
        "gold": [Gold(0.75, False), None],
        "search": None,
        "ledger": None,
        "seconds": 1.5,
    }
    return Column(**{**parts, **changes})  # type: ignore[arg-type]


def test_files_are_named_by_their_prompt() -> None:
    names = file_names(["A cup!", "two cups", "a cup", "猫", "../x"])
    assert names == ["a-cup-0", "two-cups", "a-cup-1", "image", "x"]
    assert file_names(["a cup", "a cup", "a cup 0"]) == ["a-cup-1", "a-cup-2", "a-cup-0"]


def test_the_report_is_plain_data_with_means_over_what_is_known() -> None:
    columns = [column("none", [0.1, 0.3]), column("mctd", [0.2, None])]
    report = comparison_report(columns, PROMPTS, {"model": "embedded"}, PRICES)
    assert json.loads(json.dumps(report)) == report
    assert report["model"] == "embedded"
    none, mctd = report["searches"]["none"], report["searches"]["mctd"]
    assert none["means"] == {"reward": 0.2, "gold": 0.75, "all_right": 0.0, "nfe": 16.0}
    assert mctd["means"]["reward"] == 0.2
    assert none["images"][0]["gold"] == 0.75
    assert "gold" not in none["images"][1]


def test_a_ledger_is_reported_with_its_cost() -> None:
    ledger = Ledger(
        total=Counts(nfe=16, rows=32, padded_rows=8, calls=5, decodes=1, previews=4, reward_calls=2)
    )
    ledger.charge_seconds("network", 0.5)
    report = ledger_report(ledger, PRICES)
    assert report["cost"] == 32 + 3.0 + 1.0 + 1.0
    assert report["rows"] == 32
    assert report["padded_rows"] == 8
    assert report["seconds"] == {"network": 0.5}


def test_the_best_reward_of_a_row_is_framed_and_a_missing_sample_is_said() -> None:
    better = column("mctd", [0.2, 0.5])
    missing = column("beam", [0.1, None], images=[Image.new("RGB", (64, 64), "lime"), None])
    sheet = comparison_picture([column("none", [0.1, 0.3]), better, missing], PROMPTS, "title")
    colours = sheet.getcolors(maxcolors=100_000) or []
    framed = sum(count for count, colour in colours if colour == (0xD1, 0x49, 0x5B))
    around_one = 3 * 4 * 200
    assert 2 * around_one <= framed <= 2.2 * around_one


def test_nothing_is_framed_where_only_one_search_has_rewards() -> None:
    sheet = comparison_picture(
        [column("none", [None, None]), column("mctd", [0.2, 0.5])], PROMPTS, ""
    )
    colours = [colour for _, colour in sheet.getcolors(maxcolors=100_000) or []]
    assert (0xD1, 0x49, 0x5B) not in colours

"""What a benchmark concludes: arithmetic on cells whose numbers are known."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.cells import Cell, Drawn, Run
from mctd_diffusers.evaluation.benchmark.claims import claims
from mctd_diffusers.evaluation.benchmark.comparison import (
    Results,
    against,
    against_best_rival,
    against_best_rival_at_cost,
    contests,
    cost_to_match,
    difference,
    gold_per_proxy,
    mixed,
    nfe_to_match,
    over_seeds,
    share_to_match,
    to_reach,
)
from mctd_diffusers.evaluation.benchmark.curves import curves_figure
from mctd_diffusers.evaluation.benchmark.plan import BenchPlan, Method, parse_budgets
from mctd_diffusers.evaluation.benchmark.pricing import cost_at, cost_of
from mctd_diffusers.evaluation.benchmark.report import COLUMNS, results_of, write_report
from mctd_diffusers.search.strategies import MCTD, Beam, BestOfN

PROMPTS = tuple(f"{kind} {i}" for i in range(20) for kind in ("a cup", "two cars"))
KINDS = ("one", "counting") * 20
PLAN = BenchPlan(
    suite="grey",
    prompts=PROMPTS,
    kinds=KINDS,
    methods=(Method("best_of_n", BestOfN()), Method("beam", Beam()), Method("mctd", MCTD())),
    budgets=parse_budgets("2x,4x,8x"),
    seeds=(0, 1),
    prompts_per_call=25,
)
GAIN = {"plain": 0.0, "best_of_n": 0.02, "beam": 0.03, "mctd": 0.06}
"""Gold gained with every doubling of the budget."""


def make_cells(plan: BenchPlan = PLAN, gain: dict[str, float] = GAIN, **changes: Any) -> list[Cell]:
    """Cells of a plan: gold is a level of the prompt, a gain, and noise of prompt and method."""
    cells = []
    for task in plan.tasks():
        label = task.method.label
        doublings = math.log2(task.nfe / plan.num_steps) if task.nfe else 0
        runs = []
        for prompt, kind in zip(task.prompts, task.kinds, strict=True):
            row = PROMPTS.index(prompt)
            draws = np.random.default_rng([task.seed, row, *label.encode(), int(doublings)])
            noise = 0.01 * float(draws.standard_normal())
            gold = 0.5 + 0.01 * row + gain[label] * doublings + noise
            runs.append(
                Run(
                    prompt=prompt, kind=kind, proxy=10 * gold, gold=gold, all_right=gold > 0.8,
                    log_likelihood_z=None, diversity=2.0, finished=3, nfe=task.nfe,
                    rows=2 * task.nfe, decodes=3, previews=8 * (label != "plain"), reward_calls=11,
                    stop_reason="budget", history=[[16, gold]],
                )
            )  # fmt: skip
        drawn = Drawn(
            runs=[replace(run, **changes) for run in runs] if changes else runs,
            calls=10,
            padded_rows=2 * len(runs),
            seconds={"call": float(len(runs))},
            cpu={"network": 1.0, "decode": 0.5, "preview": 0.1, "reward": 0.1, "encode": 0.1,
                 "total": 2.0},
            peak_memory=1000,
            prices={"decode": 2.0, "preview": 0.2, "reward_call": 0.5},
            machine={"device": "abacus"},
        )  # fmt: skip
        cells.append(
            Cell(
                plan.suite, label, task.method.settings, task.budget.label, task.nfe, task.seed,
                task.num_steps, {"code": "1"}, drawn,
            )
        )  # fmt: skip
    return cells


@pytest.fixture(scope="module")
def results() -> Results:
    return results_of(PLAN, make_cells())


def test_means_are_over_prompts_of_means_over_seeds() -> None:
    values = {("b", 0): 1.0, ("b", 1): 3.0, ("a", 0): 5.0}
    assert over_seeds(values).tolist() == [5.0, 2.0]
    other = {("b", 1): 1.0, ("a", 0): 1.0, ("c", 0): 9.0}
    assert difference(values, other) == {("b", 1): 2.0, ("a", 0): 4.0}
    assert mixed(values, other, 0.25) == {("b", 1): 2.5, ("a", 0): 4.0}


def test_cost_is_priced_as_at_stable_diffusion_1_5() -> None:
    run = make_cells()[0].drawn.runs[0]
    assert cost_of(run) == pytest.approx(2 * 16 + 3 * 3.1375 + 11 * 0.2)
    assert cost_of(replace(run, previews=10)) - cost_of(run) == pytest.approx(1.75)
    assert [cost_at(price)(run) for price in (0.1, 1, 10)] == pytest.approx([17.1, 27, 126])


def test_groups_hold_every_run_once(results: Results) -> None:
    assert list(results.groups)[:3] == [("plain", "1x"), ("best_of_n", "2x"), ("beam", "2x")]
    assert results.rivals == ["best_of_n", "beam"]
    group = results.groups["beam", "4x"]
    assert len(group.runs) == 80
    assert (group.nfe, group.budget_share) == (64.0, 1.0)
    assert group.useful_share == pytest.approx(128 / 130)
    assert group.cpu_per_nfe == pytest.approx(4 * 1.3 / (80 * 64))
    assert group.wall_per_nfe == pytest.approx(1 / 64)


def test_variants_of_the_candidate_are_no_rivals() -> None:
    methods = (*PLAN.methods, Method("mctd:wave_size=4", MCTD(wave_size=4)))
    gain = {**GAIN, "mctd:wave_size=4": 1.0}
    results = results_of(
        replace(PLAN, methods=methods), make_cells(replace(PLAN, methods=methods), gain)
    )
    assert "mctd:wave_size=4" in results.methods
    assert results.rivals == ["best_of_n", "beam"]
    best = results.best_rival("4x")
    assert best is not None
    assert best.method == "beam"


def test_the_margin_is_a_tenth_of_the_largest_reference_gain(results: Results) -> None:
    assert results.margin == pytest.approx(0.1 * 3 * 0.02, abs=5e-4)
    largest = results.largest_reference
    assert largest is not None
    assert largest.budget == "8x"


def test_a_candidate_above_the_best_rival_is_shown_to_be(results: Results) -> None:
    found = against_best_rival(results)
    assert [(c.budget, c.rival) for c in found] == [("2x", "beam"), ("4x", "beam"), ("8x", "beam")]
    for contest, doublings in zip(found, (1, 2, 3), strict=True):
        assert contest.gain.mean == pytest.approx(0.03 * doublings, abs=6e-3)
        assert contest.p_above == pytest.approx(3 / 10_001)  # the least there is, three times
        assert contest.p_margin <= contest.p_above


def test_an_equal_candidate_is_not_inferior_and_not_above() -> None:
    gain = {**GAIN, "mctd": 0.0295}
    found = against_best_rival(results_of(PLAN, make_cells(gain=gain)))
    assert max(contest.p_margin for contest in found) < 0.05
    assert min(contest.p_above for contest in found) > 0.025
    said = {claim.sentence[:14]: claim for claim in claims(results_of(PLAN, make_cells(gain=gain)))}
    assert said["At equal NFE, "].holds is False
    assert "non-inferior to the best rival at every budget" in said["At equal NFE, "].sentence
    assert "above it at no budget" in said["At equal NFE, "].sentence


def test_an_inferior_candidate_is_named_with_its_budgets() -> None:
    gain = {**GAIN, "mctd": 0.022}
    results = results_of(PLAN, make_cells(gain=gain))
    first, *_ = claims(results)
    assert first.holds is False
    assert re.search(r"\(not at .*8x \(beam, p = 1\)\)", first.sentence)


def test_p_values_are_adjusted_over_the_budgets_together() -> None:
    values = {(f"{i}", 0): float(x) for i, x in enumerate(np.linspace(-0.67, 1, 40))}
    (alone,) = contests([("2x", "beam", values)], 0.1)
    many = contests([(f"{b}x", "beam", values) for b in (2, 4, 8)], 0.1)
    assert alone.p_above < 0.025 < many[0].p_above == pytest.approx(3 * alone.p_above)
    assert all(contest.gain == alone.gain for contest in many)


def test_gold_at_a_cost_is_interpolated_in_its_logarithm(results: Results) -> None:
    low, high = results.groups["beam", "2x"], results.groups["beam", "4x"]
    middle = float(np.sqrt(low.cost * high.cost))
    found = results.gold_at_cost("beam", middle)
    assert found is not None
    key = (PROMPTS[3], 1)
    assert found[key] == pytest.approx((low.runs[key].gold + high.runs[key].gold) / 2)
    assert results.gold_at_cost("beam", low.cost) == pytest.approx(low.gold)
    assert results.gold_at_cost("beam", results.plain.cost) == pytest.approx(results.plain.gold)
    assert results.gold_at_cost("beam", 1e6) is None


def test_at_equal_cost_a_dearer_candidate_meets_rivals_of_larger_budgets() -> None:
    dear = [
        replace(c, drawn=replace(c.drawn, runs=[replace(r, decodes=23) for r in c.drawn.runs]))
        if c.method == "mctd"
        else c
        for c in make_cells()
    ]
    results = results_of(PLAN, dear)
    at_nfe, at_cost = against_best_rival(results), against_best_rival_at_cost(results)
    assert [contest.budget for contest in at_cost] == ["2x", "4x"]  # no rival costs as much as 8x
    assert all(b.gain.mean < a.gain.mean for a, b in zip(at_nfe, at_cost, strict=False))
    second = claims(results)[1]
    assert "8x cannot be compared" in second.sentence


def test_a_curve_reaches_a_level_between_its_points() -> None:
    assert to_reach([16, 32, 64], [0.0, 0.1, 0.2], 0.15) == pytest.approx(2**5.5)
    assert to_reach([16, 32], [0.5, 0.6], 0.4) == 16
    assert to_reach([16, 32], [0.0, 0.1], 0.2) is None
    assert to_reach([16, 32, 64], [0.0, 0.2, 0.1], 0.1) == pytest.approx(2**4.5)


def test_nfe_and_cost_to_match_follow_the_curves(results: Results) -> None:
    found = nfe_to_match(results)
    assert found is not None
    assert found.reference == 128
    # A doubling of mctd gains what three of best-of-n do.
    assert found.nfe == pytest.approx(32, rel=0.15)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.nfe <= found.high
    shares = cost_to_match(results)
    assert set(shares) == {"2x", "4x", "8x"}
    rival, share = shares["8x"]
    assert (rival, share) == ("beam", pytest.approx(2**-1.5, rel=0.2))


def test_the_nfe_to_match_are_open_upwards_where_some_prompts_never_get_there() -> None:
    cells = [
        replace(
            c,
            drawn=replace(
                c.drawn,
                runs=[replace(r, gold=r.gold - 1.5 * (i % 2)) for i, r in enumerate(c.drawn.runs)],
            ),
        )
        if c.method == "mctd"
        else c
        for c in make_cells()
    ]
    found = nfe_to_match(results_of(PLAN, cells))
    assert found is not None
    assert found.high is None


def test_a_method_is_called_by_its_head_where_no_other_has_it(results: Results) -> None:
    assert results.name("beam") == "beam"
    cells = [
        replace(c, method="beam:stride=4", drawn=c.drawn) if c.method == "beam" else c
        for c in make_cells()
    ]
    labels = list(dict.fromkeys(c.method for c in cells))
    one = Results.of(cells, results.budgets, labels)
    assert one.name("beam:stride=4") == "beam"
    both = Results.of([*cells, *make_cells()], results.budgets, [*labels, "beam"])
    assert both.name("beam:stride=4") == "beam:stride=4"
    assert both.name("mctd:wave_size=8") == "mctd:wave_size=8"


def test_gold_per_proxy_is_a_share_of_the_reference() -> None:
    cells = make_cells()
    hacked = [
        replace(
            c,
            drawn=replace(
                c.drawn, runs=[replace(r, proxy=r.proxy + 10 * 0.06 * 2) for r in c.drawn.runs]
            ),
        )
        if (c.method, c.budget) == ("mctd", "4x")
        else c
        for c in cells
    ]
    results = results_of(PLAN, hacked)
    assert gold_per_proxy(results, "best_of_n", "4x") == 1
    assert gold_per_proxy(results, "mctd", "2x") == pytest.approx(1)
    assert gold_per_proxy(results, "mctd", "4x") == pytest.approx(0.5, abs=0.05)
    assert gold_per_proxy(results, "svdd", "4x") is None


def test_claims_say_what_holds_in_one_sentence_each(results: Results) -> None:
    found = claims(results)
    assert all(claim.sentence.count(". ") == 0 and claim.sentence.endswith(".") for claim in found)
    said = "\n".join(f"{claim.holds} {claim.sentence}" for claim in found)
    assert "True At equal NFE" in said
    assert "True mctd is significantly above best_of_n at 2x, 4x, 8x of 3 budgets" in said
    assert "False mctd reaches the gold of best_of_n at 8x with 3" in said
    assert "True CPU time without decodes and rewards" in said
    assert "z of" not in said
    above = against(results, "best_of_n")
    assert [contest.rival for contest in above] == ["best_of_n"] * 3


def test_others_are_tested_against_a_method_that_is_named(results: Results, tmp_path: Path) -> None:
    # Gold grows by 0.06 for mctd and by 0.03 for beam with each doubling from the plain sample.
    assert share_to_match(results, "mctd", "beam", "8x") == pytest.approx(2**-1.5, rel=0.05)
    assert share_to_match(results, "beam", "mctd", "8x") is None
    assert share_to_match(results, "beam", "smc", "8x") is None
    _, report, _ = write_report(PLAN, make_cells(), tmp_path, rivals=["beam"])
    section = report.read_text().split("## All others against beam at equal NFE")[1]
    rows = [line for line in section.splitlines() if line.startswith("| mctd")][:3]
    assert [row.split("|")[2].strip() for row in rows] == ["2x", "4x", "8x"]
    gain = rows[2].split("|")[3]
    assert float(gain.split()[0]) == pytest.approx(0.09, abs=0.005)
    behind = [line for line in section.splitlines() if line.startswith("| best_of_n")][:3]
    assert behind[2].split("|")[6].strip() == "out of reach"


def test_too_few_budgets_leave_a_claim_open() -> None:
    plan = replace(PLAN, budgets=parse_budgets("2x,4x"))
    said = [
        c for c in claims(results_of(plan, make_cells(plan))) if "above best_of_n" in c.sentence
    ]
    assert [claim.holds for claim in said] == [None]


def test_winners_that_left_the_data_are_said() -> None:
    results = results_of(PLAN, make_cells(log_likelihood_z=-4.0))
    said = [claim for claim in claims(results) if "log-likelihood z" in claim.sentence]
    assert [claim.holds for claim in said] == [False]


def test_the_plain_sample_must_be_there() -> None:
    with pytest.raises(ConfigError, match="no cells of the plain sample"):
        results_of(PLAN, [cell for cell in make_cells() if cell.method != "plain"])


def test_files_hold_every_run_and_every_table(tmp_path: Path) -> None:
    cells = make_cells()
    table, report, curves = write_report(PLAN, cells, tmp_path)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == sum(len(cell.drawn.runs) for cell in cells) == 80 * 10
    assert sum(float(row["calls"]) for row in rows) == pytest.approx(10 * len(cells), rel=1e-3)
    assert float(rows[0]["measured_cost"]) == pytest.approx(32 + 3 * 2 + 11 * 0.5)
    assert float(rows[0]["cost"]) == pytest.approx(cost_of(cells[0].drawn.runs[0]), abs=0.01)
    text = report.read_text()
    for line in text.split("\n\n"):
        if line.startswith("|"):
            assert len({len(row) for row in line.splitlines()}) == 1
    assert "**Holds.** At equal NFE" in text
    assert "| best_of_n |" in text
    assert curves.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {table.name, report.name, curves.name}


def test_a_part_of_the_cells_is_reported_as_one(tmp_path: Path) -> None:
    cells = make_cells()[:9]
    _, report, _ = write_report(PLAN, cells, tmp_path)
    text = report.read_text()
    assert "9 of 40 cells" in text
    assert "Not all cells are there yet" in text


def test_curves_have_a_line_for_each_method_and_a_panel_for_each_kind(results: Results) -> None:
    figure = curves_figure(results)
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels][-2:] == ["Gold of one", "Gold of counting"]
    for ax in panels:
        assert [line.get_label() for line in ax.lines] == ["best_of_n", "beam", "mctd"]
        assert ax.get_xscale() == "log"
    sizes, gold = panels[0].lines[2].get_data()
    assert list(sizes) == [16, 32, 64, 128]
    assert gold[-1] == pytest.approx(over_seeds(results.groups["mctd", "8x"].gold).mean())

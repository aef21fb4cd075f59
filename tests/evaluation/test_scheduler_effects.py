"""Schedulers compared: what is drawn for each, and what the comparison says of it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mctd_diffusers.denoising.scheduler_names import NamedScheduler, parse_schedulers
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.cells import Cell, Drawn, Run, make_cells
from mctd_diffusers.evaluation.benchmark.comparison import interval
from mctd_diffusers.evaluation.benchmark.pipeline_suite import PipelineSuite, RewardGold, image_seed
from mctd_diffusers.evaluation.benchmark.plan import (
    MORE_STEPS,
    PLAIN,
    BenchPlan,
    Method,
    Task,
    parse_budgets,
)
from mctd_diffusers.evaluation.scheduler_effects.comparison import (
    Arm,
    Comparison,
    Condition,
    arm_of,
    cells_folder,
    reference_among,
)
from mctd_diffusers.evaluation.scheduler_effects.cost import estimate
from mctd_diffusers.evaluation.scheduler_effects.effects import (
    SchedulerResults,
    default_arm,
    designs,
    interactions,
    marginal_effects,
    recommend,
)
from mctd_diffusers.evaluation.scheduler_effects.report import COLUMNS, write_effects
from mctd_diffusers.evaluation.scheduler_effects.suite import (
    SchedulerSuite,
    hash_of,
    open_world,
    pictures_of,
    unit_noise,
)
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.brightness import brightness
from mctd_diffusers.search.strategies import MCTD, Beam, BestOfN
from tests.pipelines import tiny

# Of schedulers of diffusers under this numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

MORE = Method(MORE_STEPS, BestOfN(n=1))
BENCH = BenchPlan(
    suite="tiny",
    prompts=("a cup", "a red car", "two cats"),
    kinds=("one", "colours", "counting"),
    methods=(MORE, Method("mctd", MCTD())),
    budgets=parse_budgets("2x,4x"),
    num_steps=4,
    rows_per_call=8,
)
BUDGET, FIXED = Arm("mctd", "budget"), Arm("mctd", "fixed:1")


def parsed(text: str) -> tuple[NamedScheduler, ...]:
    return tuple(parse_schedulers(text, tiny.make_scheduler().config))


def compared(text: str, bench: BenchPlan = BENCH, reference: str = "DDIM") -> Comparison:
    return Comparison(parsed(text), bench, reference)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = MCTDPipeline.from_pipe(
        tiny.make_stock(),
        reward_model=tiny.make_clip_reward(),
        preview_vae=tiny.make_preview_vae(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def suites(pipe: Any, comparison: Comparison, **options: Any) -> dict[str, SchedulerSuite]:
    gold = RewardGold(brightness)
    return {
        named.name: SchedulerSuite(pipe, gold, comparison.plan_of(named), named, **options)
        for named in comparison.schedulers
    }


# --- what is compared ---


def test_arms_are_strategies_by_their_stride_policies() -> None:
    assert arm_of(Method(PLAIN, BestOfN(n=1))) == arm_of(MORE) == Arm(PLAIN, "")
    assert arm_of(Method("best_of_n", BestOfN())) == Arm("best_of_n", "")
    assert arm_of(Method("beam:width=2", Beam(width=2))) == Arm("beam:width=2", "")
    assert arm_of(Method("mctd", MCTD())) == BUDGET
    by_policy = MCTD(finish=1, stride_policy="fixed:1")
    label = "mctd:finish=1:stride_policy=fixed:1"
    assert arm_of(Method(label, by_policy)) == Arm("mctd:finish=1", "fixed:1")


def test_every_scheduler_has_every_arm_and_budget() -> None:
    conditions = compared("DDIM,Heun").conditions()
    assert conditions == [
        Condition(scheduler, arm, budget)
        for scheduler in ("DDIM", "Heun")
        for budget, arms in (
            ("1x", [Arm(PLAIN, "")]),
            ("2x", [Arm("best_of_n", ""), Arm(PLAIN, ""), BUDGET]),
            ("4x", [Arm("best_of_n", ""), Arm(PLAIN, ""), BUDGET]),
        )
        for arm in arms
    ]


def test_solvers_of_two_calls_get_half_the_steps_at_the_same_nfe() -> None:
    comparison = compared("DDIM,Heun")
    once, twice = (
        {
            (task.method.label, task.budget.label): (task.num_steps, task.nfe)
            for task in comparison.plan_of(named).tasks()
        }
        for named in comparison.schedulers
    )
    assert once[PLAIN, "1x"] == (4, 4)
    assert twice[PLAIN, "1x"] == (2, 4)
    assert once[MORE_STEPS, "4x"] == (16, 16)
    assert twice[MORE_STEPS, "4x"] == (8, 16)
    assert once["mctd", "2x"] == twice["mctd", "2x"] == (4, 8)


def test_a_search_that_steps_too_far_for_a_solver_is_left_out() -> None:
    far = Method("best_of_n:stride=4", BestOfN(stride=4))
    bench = replace(BENCH, methods=(MORE, far), budgets=parse_budgets("4x"), num_steps=8)
    third_order = "DPMSolverSinglestep:order=3"
    comparison = compared(f"DDIM,{third_order}", bench)
    (name,) = (named.name for named in comparison.schedulers if named.name != "DDIM")
    why = "it takes strides of up to 4, and the longest here is 1"
    assert comparison.left_out() == [f"{name}, best_of_n:stride=4: {why}"]
    arms = {(c.scheduler, c.arm.strategy) for c in comparison.conditions()}
    assert ("DDIM", far.label) in arms
    assert (name, far.label) not in arms


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedulers": ()}, "no scheduler to compare"),
        ({"schedulers": parsed("DDIM") * 2}, "'DDIM' is named twice"),
        ({"reference": "Euler"}, "the reference 'Euler' is not compared.* are DDIM"),
        ({"bench": replace(BENCH, budgets=parse_budgets("4x,60s"))}, "budget 60s.* equal NFE"),
    ],
)
def test_comparisons_that_mean_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(compared("DDIM"), **given)


def test_a_schedule_too_short_for_a_solver_is_refused() -> None:
    bench = replace(BENCH, num_steps=1, methods=(MORE,))
    heun = compared("DDIM,Heun", bench)
    with pytest.raises(ConfigError, match="2 network calls a step, and there are 1 steps"):
        heun.plan_of(heun.named("Heun"))


def test_the_reference_is_the_model_s_own_scheduler() -> None:
    own = tiny.make_scheduler()
    assert reference_among(parsed("Euler,DDIM:eta=1,DDIM"), own) == "DDIM"
    assert reference_among(parsed("Euler,DDIM:eta=1"), own) == "Euler"
    assert reference_among(parsed("Euler,DDIM:trailing"), own) == "Euler"


def test_it_is_said_where_noise_comes_from() -> None:
    comparison = compared("DDIM,DDIM:eta=1,Euler,EulerAncestral")
    assert [tuple(comparison.noise_of(named)) for named in comparison.schedulers] == [
        ("none", "own"), ("own", "own"), ("none", "injected"), ("own", "own"),
    ]  # fmt: skip


# --- what is drawn ---


def test_ddim_draws_what_a_bench_draws(pipe: Any) -> None:
    comparison = compared("DDIM")
    plan = comparison.plan_of(comparison.named("DDIM"))
    suite, bench = (
        suites(pipe, comparison)["DDIM"],
        PipelineSuite(pipe, RewardGold(brightness), plan),
    )
    for task in plan.tasks():
        assert [asdict(run) for run in suite.draw(task).runs] == [
            asdict(run) for run in bench.draw(task).runs
        ]


def test_all_schedulers_start_from_one_noise_and_draw_by_the_same_seeds(pipe: Any) -> None:
    comparison = compared("DDIM,Euler,Heun")
    task = next(t for t in comparison.bench.tasks() if t.method.label == "best_of_n")
    assert task.nfe is not None
    seeds = []
    for suite in suites(pipe, comparison).values():
        results = suite.search(replace(task, nfe=2 * task.nfe), pipe.reward_model).results
        seeds.append([result.tree.seed[:3].tolist() for result in results])
    assert seeds[0] == seeds[1] == seeds[2]
    assert len({tuple(of_one) for of_one in seeds[0]}) == len(task.prompts)
    for named in comparison.schedulers:
        world = open_world(
            pipe, named, task.prompts, [image_seed(prompt, 3) for prompt in task.prompts],
            num_steps=4, guidance_scale=4.0, rows_per_call=8, reward=pipe.reward_model,
        )  # fmt: skip
        noise = torch.stack(unit_noise(world, task.prompts, 3))
        assert torch.equal(world.prepared.first_latents, noise * world.stepper.init_noise_sigma)


def test_no_scheduler_spends_more_than_the_budget(pipe: Any) -> None:
    bench = replace(BENCH, budgets=parse_budgets("4x"), prompts=("a cup",), kinds=("one",))
    comparison = compared("DDIM,Heun,UniPC", bench)
    for name, suite in suites(pipe, comparison).items():
        for task in comparison.plan_of(comparison.named(name)).tasks():
            assert task.nfe is not None
            for run in suite.draw(task).runs:
                assert task.nfe - 2 <= run.nfe <= task.nfe, (name, task.name)


def test_pictures_of_the_first_prompts_are_kept(pipe: Any, tmp_path: Path) -> None:
    bench = replace(BENCH, methods=(MORE,), budgets=parse_budgets("2x"), prompts_per_call=2)
    comparison = compared("Euler", bench, "Euler")
    suite = suites(pipe, comparison, pictures=tmp_path)["Euler"]
    plan = comparison.plan_of(comparison.named("Euler"))
    for task in plan.tasks():
        suite.draw(task)
    paths = pictures_of(tmp_path, plan, Arm(PLAIN, ""), "2x")
    assert list(paths) == ["a cup", "a red car"]  # those of the first call
    for path in paths.values():
        with Image.open(path) as picture:
            assert picture.size == (16, 16)
    assert pictures_of(tmp_path, plan, BUDGET, "2x") == {}


def test_cells_of_another_scheduler_or_setting_are_made_anew(pipe: Any) -> None:
    found = [
        suites(pipe, compared(text, reference=reference))[reference].identity(MORE)
        for text, reference in (
            ("DDIM", "DDIM"), ("DDIM:eta=1", "DDIM:eta=1"), ("DDIM:trailing", "DDIM:trailing"),
        )
    ]  # fmt: skip
    assert len({identity["scheduler"] for identity in found}) == 3
    assert len({identity["unet"] for identity in found}) == 1


def test_what_a_process_notes_of_settings_does_not_count() -> None:
    one, other = parsed("UniPC"), parsed("UniPC")
    noted = one[0].scheduler.config["_use_default_values"]
    assert len(noted) > 5  # in an order that differs between processes
    other[0].scheduler.register_to_config(_use_default_values=noted[::-1])
    assert hash_of(one[0]) == hash_of(other[0])
    assert len({hash_of(each) for each in parsed("UniPC,UniPC:order=1,DDIM,DDIM:eta=1")}) == 4


def test_a_policy_that_asks_a_head_needs_one(pipe: Any) -> None:
    asking = Method("mctd:stride_policy=ige", MCTD(stride_policy="ige"))
    comparison = compared("DDIM", replace(BENCH, methods=(MORE, asking)))
    with pytest.raises(ConfigError, match=r"'ige' asks .* the pipeline has none: .* --ige"):
        suites(pipe, comparison)


def test_the_estimate_is_what_is_spent(pipe: Any, tmp_path: Path) -> None:
    comparison = compared("DDIM,Heun", replace(BENCH, methods=(MORE,)))
    before = estimate(pipe, comparison, None, tmp_path)
    spent: dict[str, int] = {}
    for name, suite in suites(pipe, comparison).items():
        plan = comparison.plan_of(comparison.named(name))
        cells = make_cells(plan, suite, cells_folder(tmp_path, name))
        spent[name] = sum(run.nfe for cell in cells for run in cell.drawn.runs)
    assert before.cells == 10
    assert before.schedulers["DDIM"].nfe == spent["DDIM"]
    assert 0.7 * before.schedulers["Heun"].nfe <= spent["Heun"] <= before.schedulers["Heun"].nfe
    assert before.total.nfe == sum(work.nfe for work in before.schedulers.values())
    assert before.total.seconds > 0
    after = estimate(pipe, comparison, None, tmp_path)
    assert (after.cells, after.found, after.total) == (0, 10, (0, 0.0))


# --- what the cells say: numbers that are known ---

SCHEDULER = {"DDIM": 0.0, "Euler": 0.02, "UniPC": -0.01}
ARM = {Arm(PLAIN, ""): 0.0, Arm("best_of_n", ""): 0.03, BUDGET: 0.07, FIXED: 0.05}
STEP = {"1x": 0.0, "2x": 0.01, "4x": 0.02}
GREY = replace(
    BENCH,
    methods=(*BENCH.methods, Method("mctd:stride_policy=fixed:1", MCTD(stride_policy="fixed:1"))),
    prompts=tuple(f"prompt {i}" for i in range(12)),
    kinds=("one",) * 12,
    seeds=(0, 1),
)
GoldOf = Callable[[Condition, int], float]


def additive(condition: Condition, row: int) -> float:
    scheduler, arm, budget = condition
    return 0.4 + 0.01 * row + SCHEDULER[scheduler] + ARM[arm] + STEP[budget]


def grey_cells(
    comparison: Comparison, gold_of: GoldOf = additive, leave_out: Sequence[Arm] = ()
) -> dict[str, list[Cell]]:
    """Cells whose gold is known; UniPC lacks the arms that are left out."""

    def run_of(task: Task, name: str, prompt: str) -> Run:
        condition = Condition(name, arm_of(task.method), task.budget.label)
        row = comparison.bench.prompts.index(prompt)
        gold = gold_of(condition, row) + (0.05 if task.seed else -0.05)
        return Run(
            prompt=prompt, kind="one", proxy=10 * gold, gold=gold, all_right=gold > 0.5,
            log_likelihood_z=None, diversity=1.0, finished=2, nfe=(task.nfe or 0) - 1,
            rows=2 * (task.nfe or 0), decodes=2, previews=3, reward_calls=5, stop_reason="budget",
            history=[[4, gold]],
        )  # fmt: skip

    return {
        named.name: [
            Cell(
                "tiny", task.method.label, task.method.settings, task.budget.label, task.nfe,
                task.seed, task.num_steps, {},
                Drawn(
                    [run_of(task, named.name, prompt) for prompt in task.prompts], 4, 8,
                    {"call": 2.0 * len(task.prompts)}, {"total": 1.0}, 1, {}, {"device": "abacus"},
                ),
            )
            for task in comparison.plan_of(named).tasks()
            if named.name != "UniPC" or arm_of(task.method) not in leave_out
        ]
        for named in comparison.schedulers
    }  # fmt: skip


def grey_results(gold_of: GoldOf = additive, **options: Any) -> SchedulerResults:
    comparison = compared("DDIM,Euler,UniPC", GREY)
    return SchedulerResults.of(comparison, grey_cells(comparison, gold_of, **options))


def test_effects_that_add_up_are_found_and_have_no_interactions() -> None:
    by_strategy, by_policy = designs(grey_results())
    scheduler, strategy, budget = by_strategy.factors
    assert strategy.levels == ("plain", "best_of_n", "mctd, budget")
    assert budget.levels == ("2x", "4x")  # at the price of one sample there is no search
    assert by_policy.factors[1].levels == ("budget", "fixed:1")
    for factor, gains in (
        (scheduler, SCHEDULER), (strategy, {"best_of_n": 0.03, "mctd, budget": 0.07}),
        (budget, {"4x": 0.01}),
    ):  # fmt: skip
        for effect in marginal_effects(by_strategy, factor):
            if effect.level == factor.reference:
                assert effect.more_gold is effect.more_proxy is None
                continue
            assert effect.more_gold is not None
            assert effect.more_proxy is not None
            # The same for every prompt, so the interval is a point.
            assert effect.more_gold == pytest.approx((gains[effect.level],) * 3)
            assert effect.more_proxy == pytest.approx((10 * gains[effect.level],) * 3)
    for pair in ((scheduler, strategy), (strategy, scheduler), (scheduler, budget)):
        for found in interactions(by_strategy, *pair).values():
            assert found == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def test_an_interaction_is_the_gain_that_comes_of_both_together() -> None:
    def together(condition: Condition, row: int) -> float:
        is_pair = condition.scheduler == "Euler" and condition.arm == BUDGET
        return additive(condition, row) + (0.06 + 0.01 * (row % 2)) * is_pair

    (design, _) = designs(grey_results(together))
    scheduler, strategy, budget = design.factors
    found = interactions(design, scheduler, strategy)
    assert found["Euler", "mctd, budget"].mean == pytest.approx(0.065)
    assert found["Euler", "mctd, budget"].low < 0.065 < found["Euler", "mctd, budget"].high
    others = {pair for pair in found if pair != ("Euler", "mctd, budget")}
    assert all(found[pair] == pytest.approx((0.0,) * 3, abs=1e-12) for pair in others)
    assert interactions(design, strategy, scheduler)["mctd, budget", "Euler"] == pytest.approx(
        found["Euler", "mctd, budget"]
    )
    (euler,) = (e for e in marginal_effects(design, scheduler) if e.level == "Euler")
    assert euler.more_gold is not None
    assert euler.more_gold.mean == pytest.approx(0.02 + 0.065 / 3)
    above = interactions(design, scheduler, budget)["Euler", "4x"]
    assert above == pytest.approx((0.0,) * 3, abs=1e-12)


def test_schedulers_without_an_arm_are_left_out_of_its_design_alone() -> None:
    by_strategy, by_policy = designs(grey_results(leave_out=[FIXED]))
    assert by_strategy.factors[0].levels == ("DDIM", "Euler", "UniPC")
    assert by_policy.factors[0].levels == ("DDIM", "Euler")


def test_differences_from_the_reference_are_paired() -> None:
    results = grey_results()
    condition = Condition("Euler", BUDGET, "2x")
    assert results.above_reference(condition) == pytest.approx((0.02,) * 3)
    assert results.above_reference(condition._replace(scheduler="DDIM")) is None
    spread = interval(results.groups[condition].gold)
    assert spread.high - spread.low > 0.02  # of the prompts themselves


def test_the_reference_is_taken_at_the_nfe_that_was_spent() -> None:
    results = grey_results()  # gold rises by 0.01 from 2x to 4x, from 7 to 15 NFE
    condition = Condition("Euler", BUDGET, "4x")

    def spending(nfe: int) -> SchedulerResults:
        group = results.groups[condition]
        runs = {key: replace(run, nfe=nfe) for key, run in group.runs.items()}
        return replace(results, groups=results.groups | {condition: group._replace(runs=runs)})

    between = 0.03 - 0.01 * math.log(10 / 7) / math.log(15 / 7)
    for nfe, gain in ((15, 0.02), (10, between), (7, 0.03), (3, 0.03), (40, 0.02)):
        found = spending(nfe).above_reference(condition)
        assert found is not None
        assert found.mean == pytest.approx(gain), nfe


@pytest.mark.parametrize(
    ("noise", "chosen"),
    [(0.0, "Euler"), (0.2, "DDIM")],  # shown to be better, and a tie
)
def test_the_default_stays_unless_another_is_shown_to_be_better(noise: float, chosen: str) -> None:
    def noisy(condition: Condition, row: int) -> float:
        draw = np.random.default_rng([row, *condition.scheduler.encode()]).standard_normal()
        return additive(condition, row) + noise * float(draw) * (condition.scheduler != "DDIM")

    results = grey_results(noisy)
    found = recommend(results, BUDGET)
    assert found is not None
    assert found.chosen == chosen
    assert found.budgets == ("2x", "4x")
    if not noise:
        assert [each.scheduler for each in found.contenders] == ["Euler", "DDIM", "UniPC"]
        assert [each.is_level for each in found.contenders] == [True, False, False]
        assert found.contenders[2].below_best == pytest.approx((-0.03,) * 3)
    plain = recommend(results, Arm(PLAIN, ""))
    assert plain is not None
    assert plain.budgets == ("1x", "2x", "4x")


def test_the_default_search_decides_first() -> None:
    results = grey_results()
    assert default_arm(results) == BUDGET
    without = {c: g for c, g in results.groups.items() if c.arm.strategy != "mctd"}
    assert default_arm(replace(results, groups=without)) == Arm("best_of_n", "")


def test_a_comparison_without_its_reference_is_refused() -> None:
    comparison = compared("DDIM,Euler", GREY)
    cells = grey_cells(comparison) | {"DDIM": []}
    with pytest.raises(ConfigError, match="no cells of DDIM"):
        SchedulerResults.of(comparison, cells)


def test_the_report_says_all_of_it(tmp_path: Path) -> None:
    comparison = compared("DDIM,Euler,UniPC", GREY)
    paths = write_effects(comparison, grey_cells(comparison), [], tmp_path)
    assert [path.name for path in paths] == ["results.csv", "report.md", "gold.png"]
    with paths[0].open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == 3 * 12 * 2 * (1 + 2 * 4)
    last = next(r for r in rows if r["scheduler"] == "Euler" and r["stride_policy"] == "fixed:1")
    assert (last["arm"], last["class"], last["calls_per_step"]) == (
        "mctd", "EulerDiscreteScheduler", "1",
    )  # fmt: skip
    assert (last["plain_noise"], last["branching_noise"]) == ("none", "injected")
    text = " ".join(paths[1].read_text("utf-8").split())
    assert "With mctd, budget, over 2x, 4x: **Euler** (it has the most gold)" in text
    assert "| scheduler | Euler | 0.523 [" in text
    assert "+0.020 [+0.020, +0.020]" in text
    for title in (
        "Gold above DDIM at equal NFE", "Interaction of scheduler and strategy", "What it cost",
        "Reward",
        "Interaction of scheduler and stride policy of mctd", "Every fact right, %",
    ):  # fmt: skip
        assert f"## {title} " in text
    assert "Not all cells are there" not in text
    with Image.open(paths[2]) as picture:
        assert picture.width > 1000


def test_a_part_of_a_comparison_says_so(tmp_path: Path) -> None:
    comparison = compared("DDIM,Euler", GREY)
    cells = grey_cells(comparison)
    cells["Euler"] = cells["Euler"][:2]
    _, report, _ = write_effects(comparison, cells, [], tmp_path)
    assert "**Not all cells are there**" in report.read_text("utf-8")

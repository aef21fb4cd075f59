"""Plans, cells and suites of a benchmark: what is made, once, whatever it is cut into."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.denoising.scheduler_names import named_scheduler
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark import identity
from mctd_diffusers.evaluation.benchmark.cells import (
    Cell,
    Drawn,
    Run,
    cell_path,
    code_versions,
    make_cells,
    read_cells,
)
from mctd_diffusers.evaluation.benchmark.identity import code_hash
from mctd_diffusers.evaluation.benchmark.metering import TimedReward, cpu_by_phase
from mctd_diffusers.evaluation.benchmark.mixture_suite import MixtureSuite, mixture_prompts
from mctd_diffusers.evaluation.benchmark.pipeline_suite import PipelineSuite, RewardGold, image_seed
from mctd_diffusers.evaluation.benchmark.plan import (
    MORE_STEPS,
    BenchPlan,
    Method,
    Task,
    parse_budgets,
)
from mctd_diffusers.evaluation.benchmark.prompts import read_prompts
from mctd_diffusers.evaluation.scheduler_effects.suite import open_world
from mctd_diffusers.models.weights import weights_hash
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.brightness import brightness
from mctd_diffusers.search.strategies import MCTD, Beam, BestOfN
from tests.pipelines import tiny, tiny_sd3

PLAN = BenchPlan(
    suite="grey",
    prompts=("a cup", "a car", "a cat"),
    kinds=("one", "one", "other"),
    methods=(Method("beam", Beam()), Method("mctd", MCTD()), Method(MORE_STEPS, BestOfN(n=1))),
    budgets=parse_budgets("8x,4x"),
    seeds=(0, 1),
    prompts_per_call=2,
)


def run_of(prompt: str, gold: float, **changes: Any) -> Run:
    run = Run(
        prompt=prompt, kind="one", proxy=10 * gold, gold=gold, all_right=gold > 0.5,
        log_likelihood_z=None, diversity=1.0, finished=4, nfe=64, rows=128, decodes=4, previews=10,
        reward_calls=14, stop_reason="budget", history=[[16, 1.0]],
    )  # fmt: skip
    return replace(run, **changes)


class GreySuite:
    """Draws nothing; remembers what it was asked for."""

    def __init__(self, code: str = "1") -> None:
        self.code = code
        self.tasks: list[Task] = []

    def identity(self, method: Method) -> dict[str, str]:
        return {"code": self.code if method.label == "mctd" else "0"}

    def draw(self, task: Task) -> Drawn:
        self.tasks.append(task)
        rng = np.random.default_rng(len(task.prompts))
        return Drawn(
            runs=[run_of(prompt, float(rng.random())) for prompt in task.prompts],
            calls=4,
            padded_rows=8,
            seconds={"call": 1.0},
            cpu={"total": 1.0},
            peak_memory=1,
            prices={},
            machine={"device": "abacus"},
        )


def labels(tasks: list[Task]) -> list[str]:
    return [f"{task.method.label} {task.budget.label} {task.seed}" for task in tasks]


# --- plans ---


def test_tasks_come_by_seed_then_budget_then_method_then_chunk() -> None:
    tasks = PLAN.tasks()
    assert labels(tasks)[:20:2] == [
        "plain 1x 0", "best_of_n 4x 0", "beam 4x 0", "mctd 4x 0", "more_steps 4x 0",
        "best_of_n 8x 0", "beam 8x 0", "mctd 8x 0", "more_steps 8x 0", "plain 1x 1",
    ]  # fmt: skip
    assert [task.prompts for task in tasks[:2]] == [("a cup", "a car"), ("a cat",)]
    assert len({task.name for task in tasks}) == len(tasks) == 36


def test_budgets_are_samples_nfe_or_seconds() -> None:
    budgets = parse_budgets("60s, 8x,200,1.5x")
    assert [budget.label for budget in budgets] == ["60s", "8x", "200", "1.5x"]
    assert [budget.nfe(16) for budget in budgets] == [None, 128, 200, 24]
    assert [budget.seconds(24) for budget in budgets] == [1440.0, None, None, None]
    plan = replace(PLAN, budgets=budgets, methods=(Method(MORE_STEPS, BestOfN(n=1)),))
    assert [budget.label for budget in plan.budgets] == ["1.5x", "8x", "200", "60s"]
    steps = {t.budget.label: t.num_steps for t in plan.tasks() if t.method.label == MORE_STEPS}
    assert steps == {"1.5x": 24, "8x": 128, "200": 200}
    assert plan.left_out() == ["more_steps at 60s: it has no steps for a number of seconds"]
    assert {t.nfe for t in plan.tasks() if t.method.label == MORE_STEPS} == {24, 128, 200}
    assert {(t.nfe, t.seconds) for t in plan.tasks() if t.budget.label == "60s"} == {
        (None, 120.0),
        (None, 60.0),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no budget in ''"),
        ("8y", "'8y' in '8y': give 8x"),
        ("0.5x", "1x at least"),
        ("0s", "give 8x"),
        ("-3", "give 8x"),
        ("20.5", "NFE are a whole number"),
        ("8x,4x,8x", "'8x' is named twice"),
    ],
)
def test_a_budget_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_budgets(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "prompts is empty"),
        ({"prompts": ("a cup",) * 3}, "'a cup' is named twice"),
        ({"kinds": ("one",)}, "3 prompts and 1 kinds"),
        ({"methods": (Method("beam", Beam()),) * 2}, "'beam' is named twice"),
        ({"seeds": (1, 1)}, "1 is named twice"),
        ({"budgets": parse_budgets("1x")}, "at no budget of 1x: this is the plain sample"),
        ({"budgets": parse_budgets("20"), "methods": (Method("b", Beam(width=4)),)},
         "'b' can be run at no budget of 20: it needs 64 NFE, and 20 pays 20"),
    ],
)  # fmt: skip
def test_plans_that_compare_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PLAN, **changes)


def test_a_method_is_left_out_only_where_the_budget_does_not_pay() -> None:
    methods = (Method("wide", Beam(width=4)),)
    plan = replace(PLAN, budgets=parse_budgets("1x,2x,8x"), methods=methods)
    assert plan.left_out() == ["wide at 2x: it needs 64 NFE, and 2x pays 32"]
    assert [(b.label, m.label) for b, m in plan.runs()] == [
        ("1x", "plain"), ("2x", "best_of_n"), ("8x", "best_of_n"), ("8x", "wide"),
    ]  # fmt: skip


# --- cells ---


def test_a_stopped_benchmark_loses_the_chunk_under_way_and_repeats_nothing(tmp_path: Path) -> None:
    class Stopped(GreySuite):
        def draw(self, task: Task) -> Drawn:
            if len(self.tasks) == 3:
                raise KeyboardInterrupt
            return super().draw(task)

    with pytest.raises(KeyboardInterrupt):
        make_cells(PLAN, Stopped(), tmp_path)
    assert len(read_cells(PLAN, tmp_path)) == 3
    seen: list[bool] = []
    suite = GreySuite()
    cells = make_cells(PLAN, suite, tmp_path, lambda task, path, is_new: seen.append(is_new))
    assert labels(suite.tasks) == labels(PLAN.tasks())[3:]
    assert seen == [False] * 3 + [True] * 33
    again = GreySuite()
    assert make_cells(PLAN, again, tmp_path) == cells == read_cells(PLAN, tmp_path)
    assert not again.tasks
    assert not list(tmp_path.rglob(".*"))


def test_more_methods_budgets_seeds_and_prompts_cost_only_their_own_cells(tmp_path: Path) -> None:
    make_cells(PLAN, GreySuite(), tmp_path)
    more = replace(
        PLAN,
        prompts=(*PLAN.prompts[:2], "a dog", "a tree"),
        kinds=("one",) * 4,
        methods=(*PLAN.methods, Method("mctd:wave_size=4", MCTD(wave_size=4))),
    )
    suite = GreySuite()
    make_cells(more, suite, tmp_path)
    assert all(
        task.prompts == ("a dog", "a tree") or task.method.label == "mctd:wave_size=4"
        for task in suite.tasks
    )


@pytest.mark.parametrize("change", ["code", "steps", "guidance", "reward", "damage"])
def test_cells_of_something_else_are_made_again(tmp_path: Path, change: str) -> None:
    make_cells(PLAN, GreySuite(), tmp_path)
    suite, plan, made = GreySuite(), PLAN, 36
    if change == "code":
        suite, made = GreySuite(code="2"), 8
    elif change == "damage":
        first, second, *_ = PLAN.tasks()
        cell_path(tmp_path, first).write_text("{")
        cell_path(tmp_path, second).write_text("{}")
        made = 2
    else:
        changes: dict[str, Any] = {
            "steps": {"num_steps": 8}, "guidance": {"guidance_scale": 2.0},
            "reward": {"searched": "clip"},
        }  # fmt: skip
        plan = replace(PLAN, **changes[change])
    make_cells(plan, suite, tmp_path)
    assert len(suite.tasks) == made


def test_cells_of_several_versions_are_told(tmp_path: Path) -> None:
    make_cells(replace(PLAN, seeds=(0,)), GreySuite(), tmp_path)
    path = cell_path(tmp_path, next(t for t in PLAN.tasks() if t.method.label == "mctd"))
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({**entries, "identity": {"code": "0.9"}}))
    assert code_versions(read_cells(PLAN, tmp_path)) == {"mctd": 2}


def test_an_unusable_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output folder .*file.* cannot be used"):
        make_cells(PLAN, GreySuite(), tmp_path / "file")


def test_useful_rows_are_shared_by_what_filled_the_calls() -> None:
    drawn = GreySuite().draw(PLAN.tasks()[0])
    cell = Cell("grey", "beam", "", "4x", 64, 0, 16, {}, drawn)
    assert cell.useful_share == pytest.approx(256 / 264)


# --- identity ---


def test_editing_a_strategy_leaves_the_cells_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = identity._source

    def hashes(edited: str = "", text: str = "") -> dict[str, str]:
        path = tmp_path / "edited.py"
        if edited:
            path.write_text(source(edited).read_text() + text)
        monkeypatch.setattr(identity, "_source", lambda n: path if n == edited else source(n))
        identity.forget()
        return {
            kind.__name__: MixtureSuite().identity(Method("m", kind()))["code"]
            for kind in (BestOfN, Beam, MCTD)
        }

    beam, moves = "mctd_diffusers.search.strategies.beam", "mctd_diffusers.search.moves"
    before = hashes()
    after = hashes(beam, "\nX = 1\n")
    assert [name for name in before if before[name] != after[name]] == ["Beam"]
    assert hashes(beam, '\n# a comment\n"""A string."""\n') == before
    assert not set(before.values()) & set(hashes(moves, "\nX = 1\n").values())
    identity.forget()


def test_code_that_is_not_reached_does_not_count() -> None:
    reached = identity._reached(["mctd_diffusers.search.strategies.best_of_n"])
    assert "mctd_diffusers.search.moves" in reached
    assert "mctd_diffusers.search.strategies.mctd" not in reached
    assert not any(name.startswith("mctd_diffusers.denoising") for name in reached)
    assert code_hash([__name__]) == code_hash([__name__, "builtins"])


def test_weights_that_differ_have_another_hash() -> None:
    layer = torch.nn.Linear(3, 3)
    before = weights_hash(layer)
    assert weights_hash(layer) == before
    with torch.no_grad():
        layer.bias += 1
    assert weights_hash(layer) != before


# --- prompts ---


def test_prompts_are_read_with_their_kinds_by_turns(tmp_path: Path) -> None:
    assert len(set(read_prompts("report", 6).kinds)) == 6
    assert read_prompts("tune", 30).prompts[:24] == read_prompts("tune", 24).prompts
    (tmp_path / "own.txt").write_text("two blue cars\n\na castle\n")
    assert read_prompts(str(tmp_path / "own.txt")) == (
        ("two blue cars", "a castle"),
        ("counting", "other"),
    )
    (tmp_path / "own.csv").write_text('Prompts,Category\n"A cat, a dog",Colors\nA cup,Text\n')
    assert read_prompts(str(tmp_path / "own.csv")) == (
        ("A cat, a dog", "A cup"),
        ("Colors", "Text"),
    )
    (tmp_path / "own.jsonl").write_text('{"tag": "counting", "prompt": "four cups"}\n')
    assert read_prompts(str(tmp_path / "own.jsonl")) == (("four cups",), ("counting",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "holds no prompts"),
        ("a.csv", "words\nfour cups\n", "no prompt among words"),
        ("a.jsonl", "four cups\n", "cannot be read as .jsonl"),
    ],
)
def test_a_file_without_prompts_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(str(tmp_path / name))
    with pytest.raises(ConfigError, match="neither 'tune' nor 'report'"):
        read_prompts("reprot")


def test_repeated_prompts_are_used_once_and_said(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("a cup\na cup\n")
    with pytest.warns(UserWarning, match="1 of 2 prompts"):
        assert read_prompts(str(tmp_path / "own.txt")).prompts == ("a cup",)


# --- suites ---


def tiny_plan(**changes: Any) -> BenchPlan:
    plan = BenchPlan(
        suite="tiny",
        prompts=("a cup", "a red car", "two cats"),
        kinds=("one", "colours", "counting"),
        methods=(Method("mctd", MCTD()), Method(MORE_STEPS, BestOfN(n=1))),
        budgets=parse_budgets("2x"),
        num_steps=4,
        rows_per_call=8,  # in calls of 2 the tiny text model knows the row, in its 37 columns
    )
    return replace(plan, **changes)


def tiny_suite(plan: BenchPlan) -> PipelineSuite:
    pipe = MCTDPipeline.from_pipe(
        tiny.make_stock(),
        reward_model=tiny.make_clip_reward(),
        preview_vae=tiny.make_preview_vae(),
    )
    return PipelineSuite(pipe, RewardGold(brightness), plan)


def runs_of(plan: BenchPlan, suite: Any) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (task.method.label, run.prompt): asdict(run)
        for task in plan.tasks()
        for run in suite.draw(task).runs
    }


def test_runs_of_a_pipeline_do_not_depend_on_the_chunks() -> None:
    whole, cut = tiny_plan(prompts_per_call=3), tiny_plan(prompts_per_call=1)
    runs = runs_of(whole, tiny_suite(whole))
    assert runs == runs_of(cut, tiny_suite(cut))
    assert {run["nfe"] for (label, _), run in runs.items() if label == "plain"} == {4}
    assert {run["nfe"] for (label, _), run in runs.items() if label == MORE_STEPS} == {8}
    assert {run["rows"] for (label, _), run in runs.items() if label == MORE_STEPS} == {16}
    searched = [run for (label, _), run in runs.items() if label == "mctd"]
    assert all(1 <= run["diversity"] <= run["finished"] for run in searched)
    assert all(run["previews"] > 0 for run in searched)


def test_a_pipeline_without_an_eta_is_measured_and_its_schedulers_compared() -> None:
    pipe = MCTDPipeline.from_pipe(tiny_sd3.make_stock(), reward_model=tiny.redness)
    plan = tiny_plan(prompts=("a cup",), kinds=("one",), methods=(Method("best", BestOfN(n=1)),))
    runs = runs_of(plan, PipelineSuite(pipe, RewardGold(brightness), plan))
    assert {run["nfe"] for run in runs.values()} == {4, 8}
    world = open_world(
        pipe,
        named_scheduler("FlowMatchEulerDiscreteScheduler", pipe.scheduler.config),
        ["a cup"],
        [0],
        num_steps=4,
        guidance_scale=4.0,
        rows_per_call=1,
        reward=None,
    )
    assert world.stepper.num_steps == 4


def test_runs_on_mixtures_do_not_depend_on_the_chunks() -> None:
    prompts, kinds = mixture_prompts(4)
    assert prompts == ("rugged-16 0", "subspace-16 0", "rugged-64 0", "subspace-64 0")
    whole = tiny_plan(suite="mixture", prompts=prompts, kinds=kinds, prompts_per_call=4)
    runs = runs_of(whole, MixtureSuite())
    assert runs == runs_of(replace(whole, prompts_per_call=1), MixtureSuite())
    assert all(run["gold"] == run["proxy"] for run in runs.values())
    assert all(abs(run["log_likelihood_z"]) < 20 for run in runs.values())
    other = runs_of(replace(whole, seeds=(1,)), MixtureSuite())
    assert other["plain", "rugged-16 0"]["proxy"] != runs["plain", "rugged-16 0"]["proxy"]


def test_a_budget_of_seconds_bounds_the_call() -> None:
    prompts, kinds = mixture_prompts(4)
    plan = tiny_plan(
        suite="mixture", prompts=prompts, kinds=kinds, budgets=parse_budgets("0.05s"),
        methods=(Method("best_of_n", BestOfN(wave_size=1)),),
    )  # fmt: skip
    runs = runs_of(plan, MixtureSuite())
    found = [run for (label, _), run in runs.items() if label == "best_of_n"]
    assert {run["stop_reason"] for run in found} == {"time"}
    assert all(run["nfe"] >= plan.num_steps for run in found)


def test_the_identity_of_a_pipeline_holds_weights_code_and_gold() -> None:
    plan = tiny_plan()
    suite = tiny_suite(plan)
    found = suite.identity(plan.methods[-2])
    assert {"unet", "vae", "reward", "preview_vae", "scheduler", "code"} <= set(found)
    assert found["gold 0"] == "brightness"
    assert found["code"] != suite.identity(plan.methods[0])["code"]


def test_a_pipeline_without_a_reward_is_refused() -> None:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock())
    with pytest.raises(ConfigError, match="no reward to search for"):
        PipelineSuite(pipe, RewardGold(brightness), tiny_plan())


def test_the_noise_of_an_image_is_decided_by_its_prompt_and_the_seed() -> None:
    assert image_seed("a cup", 0) == image_seed("a cup", 0)
    assert len({image_seed(prompt, seed) for prompt in ("a cup", "a car") for seed in (0, 1)}) == 4


def test_cpu_seconds_are_metered_by_phase() -> None:
    def spin(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spin(0.05)
            return x

    pipe = SimpleNamespace(
        unet=Slow(), vae=SimpleNamespace(decoder=Slow()), preview_vae=None, text_encoder=None
    )

    def score(images: Any, prompts: Any) -> list[float]:
        spin(0.02)
        return [1.0]

    with cpu_by_phase(pipe) as cpu:
        reward = TimedReward(score, cpu)
        pipe.unet(torch.zeros(1))
        pipe.unet(torch.zeros(1))
        pipe.vae.decoder(torch.zeros(1))
        assert reward(None, ["a cup"]) == [1.0]
        spin(0.03)
    assert reward.__name__ == "score"
    assert not reward.wants_pil
    assert cpu["network"] == pytest.approx(0.1, abs=0.02)
    assert cpu["decode"] == pytest.approx(0.05, abs=0.02)
    assert cpu["reward"] == pytest.approx(0.02, abs=0.02)
    assert cpu["total"] == pytest.approx(0.2, abs=0.04)
    pipe.unet(torch.zeros(1))
    assert cpu["network"] == pytest.approx(0.1, abs=0.02)

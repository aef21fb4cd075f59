from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mctd_diffusers import cli
from mctd_diffusers.commands import common
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation import judge as judges
from mctd_diffusers.evaluation.judge import SceneJudge
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import read_recipe
from mctd_diffusers.rewards import resolving
from mctd_diffusers.rewards.calls import to_pil
from tests.pipelines import tiny

QUICK = ["--steps", "4", "--compute", "2", "--rows-per-call", "2"]
PROMPT = "two blue cars"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a reward and a preview decoder, as a folder."""
    return tiny.save_with_parts(tmp_path_factory.mktemp("model"))


@pytest.fixture
def box(
    model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The tiny model and an untrained judge in the place of those in the box."""
    folder = tmp_path_factory.mktemp("judge")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        SceneJudge(channels=(8, 8, 8)).save_pretrained(folder)
    load = judges.load_judge
    monkeypatch.setattr(common, "EMBEDDED_MODEL", str(model))
    monkeypatch.setattr(resolving, "EMBEDDED_REWARD", model / "reward_model")
    monkeypatch.setattr(judges, "EMBEDDED_JUDGE", folder)
    monkeypatch.setattr(judges, "load_judge", lambda: load(folder))
    return model


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    """The one message in which a command ends."""
    code, out, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("... ")]
    assert code == status, err
    assert len(lines) == 1, err
    assert lines[0].startswith("mctd: ")
    assert "Traceback" not in err
    assert not out
    return lines[0].removeprefix("mctd: ")


# --- what the commands make ---


def test_generate_writes_pictures_with_recipes_that_make_them_again(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    status, out, err = run(
        capsys, "generate", PROMPT, "a cup", "--model", model, "--output", tmp_path / "new",
        "--search", "best_of_n", "--images-per-prompt", 2, "--seed", 5, "--trees", *QUICK,
    )  # fmt: skip
    assert status == 0, err
    names = ["two-blue-cars-0", "two-blue-cars-1", "a-cup-0", "a-cup-1"]
    for name in names:
        assert str(tmp_path / "new" / f"{name}.png") in out
        assert (tmp_path / "new" / f"{name}-tree.png").is_file()
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    images = result["searches"]["best_of_n"]["images"]
    assert [image["prompt"] for image in images] == [PROMPT, PROMPT, "a cup", "a cup"]
    assert [image["nfe"] for image in images] == [8] * 4
    ledger = result["searches"]["best_of_n"]["ledger"]
    assert ledger["nfe"] == 32
    assert ledger["cost"] > ledger["rows"] == 64
    pipe = MCTDPipeline.from_pretrained(model)
    for name, image in zip(names, images, strict=True):
        replay = pipe.replay(read_recipe(tmp_path / "new" / f"{name}.png"))
        with Image.open(tmp_path / "new" / f"{name}.png") as picture:
            assert picture.tobytes() == replay.images[0].tobytes()
        assert replay.reward == pytest.approx(image["reward"], abs=1e-5)


def test_generate_without_a_search_is_the_stock_picture(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    status, _, err = run(
        capsys, "generate", PROMPT, "--model", model, "--output", tmp_path, "--search", "none",
        "--steps", 4, "--seed", 5,
    )  # fmt: skip
    assert status == 0, err
    stock = tiny.make_stock()(
        [PROMPT],
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(5)],
        output_type="pt",
    ).images
    with Image.open(tmp_path / "two-blue-cars.png") as picture:
        assert picture.tobytes() == to_pil(stock)[0].tobytes()


def test_compare_puts_searches_side_by_side(
    capsys: pytest.CaptureFixture[str], box: Path, tmp_path: Path
) -> None:
    status, out, err = run(
        capsys, "compare", PROMPT, "a castle at night", "--output", tmp_path, "--search",
        "none,best_of_n,beam:width=2:candidates=1", "--no-trees", *QUICK,
    )  # fmt: skip
    assert status == 0, err
    assert "1 of 1" in out or "0 of 1" in out  # the judge cannot read the second prompt
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["model"] == "embedded"
    searches = result["searches"]
    assert list(searches) == ["none", "best_of_n", "beam:width=2:candidates=1"]
    for found in searches.values():
        read, unread = found["images"]
        assert 0 <= read["gold"] <= 1
        assert "gold" not in unread
        assert isinstance(unread["reward"], float)
    assert searches["none"]["ledger"] is None
    plain, best = searches["none"]["images"], searches["best_of_n"]["images"]
    assert all(b["reward"] >= p["reward"] - 1e-4 for p, b in zip(plain, best, strict=True))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 800
    pictures = sorted(path.relative_to(tmp_path / "images") for path in tmp_path.rglob("*/*/*.png"))
    assert len(pictures) == 6
    assert not (tmp_path / "trees").exists()


def test_demo_draws_one_prompt_of_each_kind_with_trees(
    capsys: pytest.CaptureFixture[str], box: Path, tmp_path: Path
) -> None:
    status, out, err = run(
        capsys, "demo", "--output", tmp_path, "--steps", 4, "--compute", 2, "--seed", 1
    )
    assert status == 0, err
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["searches"]) == ["none", "mctd"]
    assert len(result["searches"]["mctd"]["images"]) == 6
    assert len(list((tmp_path / "trees" / "mctd").glob("*.png"))) == 6
    for name in ("sheet.png", "result.json", "trees"):
        assert str(tmp_path / name) in out


BENCH = ["--steps", "3", "--rows-per-call", "3", "--prompts", "tune"]


def test_bench_makes_its_cells_once_and_reports(
    capsys: pytest.CaptureFixture[str], box: Path, tmp_path: Path
) -> None:
    arguments = [
        "bench", "--limit", 3, "--budgets", "3x,2x", "--strategies", "more_steps",
        "--prompts-per-call", 2, *BENCH, "--out", tmp_path,
    ]  # fmt: skip
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    cells = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*/*.json")}
    assert len(cells) == 2 * (1 + 2 * 2)  # best of n is what all are compared with
    assert "10/10 cells" in err
    with (tmp_path / "results.csv").open() as file:
        assert len(file.readlines()) == 1 + 3 * 5
    assert "| more_steps |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "curves.png").is_file()
    assert str(tmp_path / "report.md") in out
    status, again, err = run(capsys, *arguments)
    assert status == 0
    assert again == out
    assert cells == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*/*.json")}
    assert "no cells of this plan" in fails(
        capsys, *arguments, "--report-only", "--out", tmp_path / "elsewhere"
    )


def test_bench_judges_other_models_by_what_is_named(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a castle\n")
    Path("own_gold.py").write_text("def fair(images, prompts):\n    return [0.25] * len(images)\n")
    arguments = [
        "bench", "--model", model, "--steps", 3, "--rows-per-call", 3, "--prompts", "prompts.txt",
        "--strategies", "best_of_n", "--budgets", "2x",
    ]  # fmt: skip
    assert "the judge in the box cannot read" in fails(capsys, *arguments)
    assert "'own_gold:light' cannot be had" in fails(capsys, *arguments, "--gold", "own_gold:light")
    own = ["--gold", "own_gold:fair", "--reward", "brightness"]
    status, _, err = run(capsys, *arguments, *own)
    assert status == 0, err
    (cell,) = Path("outputs/bench/cells/best_of_n").glob("*.json")
    (found,) = json.loads(cell.read_text())["drawn"]["runs"]
    assert found["gold"] == 0.25
    assert 0 < found["proxy"] < 1
    assert found["kind"] == "other"
    sys.modules.pop("own_gold")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_bench_takes_a_scheduler_with_its_share_of_noise_and_its_calls_a_step(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cup\n")
    arguments = [
        "bench", "--model", model, "--steps", 4, "--rows-per-call", 2, "--prompts", "prompts.txt",
        "--strategies", "best_of_n", "--budgets", "2x", "--gold", "brightness",
    ]  # fmt: skip
    plain = {}
    for scheduler in ("ddim", "DDIM:eta=1", "Heun"):
        status, _, err = run(capsys, *arguments, "--scheduler", scheduler, "--out", scheduler)
        assert status == 0, err
        (cell,) = Path(scheduler).glob("cells/plain/*.json")
        (plain[scheduler],) = json.loads(cell.read_text())["drawn"]["runs"]
    assert plain["ddim"]["proxy"] != plain["DDIM:eta=1"]["proxy"]
    assert [plain[scheduler]["nfe"] for scheduler in plain] == [4, 4, 3]  # of Heun two steps


def test_bench_on_mixtures_needs_no_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [
        "bench", "--suite", "mixture", "--limit", 2, "--budgets", "2x", "--steps", 4,
        "--strategies", "beam", "--out", tmp_path,
    ]  # fmt: skip
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert len(list(tmp_path.rglob("cells/*/*.json"))) == 3
    assert run(capsys, *arguments, "--report-only")[:2] == (0, out)


def test_bench_compares_fusions_and_other_third_moves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = run(
        capsys, "bench", "--suite", "mixture", "--limit", 1, "--budgets", "4x", "--steps", 8,
        "--strategies", "mctd:first_share=0.3,beam", "--fusions", "none,x0,go_back,bandit",
        "--against", "mctd:first_share=0.3:fusion=x0", "--out", tmp_path,
    )  # fmt: skip
    assert status == 0, err
    cells = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("*.json")}
    assert len(cells) == 7  # plain, the reference, four third moves of mctd, and beam once
    runs = {cell["method"].rpartition("=")[2]: cell["drawn"]["runs"] for cell in cells.values()}
    assert runs["x0"][0]["moves"]["fuse"]
    assert sum(runs["x0"][0]["fusions"].values())
    assert runs["go_back"][0]["moves"]["go_back"]
    assert runs["beam"][0]["moves"] == {}


def test_bench_compares_ways_of_pruning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(
        capsys, "bench", "--suite", "mixture", "--limit", 1, "--budgets", "8x", "--steps", 8,
        "--strategies", "mctd:candidates=6:least_gain=1,beam", "--prunings", "none,siblings",
        "--out", tmp_path,
    )  # fmt: skip
    assert status == 0, err
    cells = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("*.json")}
    assert len(cells) == 5  # plain, the reference, mctd twice, and beam once
    nfe = {cell["method"]: cell["drawn"]["runs"][0]["nfe"] for cell in cells.values()}
    whole = "mctd:candidates=6:least_gain=1"
    assert nfe[f"{whole}:pruning=siblings"] < nfe[whole]


def test_bench_compares_stride_policies_in_trees_and_in_plain_samples(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cup\na car\n")
    common = [
        "bench", "--model", model, "--prompts", tmp_path / "prompts.txt", "--rows-per-call", 2,
        "--gold", "brightness", "--out", tmp_path / "out",
    ]  # fmt: skip
    policies = ["--stride-policies", "budget,fixed:2,random"]
    status, _, err = run(
        capsys, *common, *policies, "--strategies", "mctd,beam", "--budgets", "3x", "--steps", 8,
        "--against", "mctd:stride_policy=fixed:2",
    )  # fmt: skip
    assert status == 0, err
    labels = {path.name for path in (tmp_path / "out/cells").iterdir()}
    assert len(labels) == 6  # plain, the reference, three policies of mctd, and beam once
    assert (
        "All others against mctd:stride_policy=fixed:2" in (tmp_path / "out/report.md").read_text()
    )
    status, said, err = run(
        capsys, *common, "--evaluations", "3,4", "--stride-policies", "uniform,ays", "--steps", 8
    )
    assert status == 0, err
    assert len(re.findall(r"\| +ays \|", said)) == 2
    assert (tmp_path / "out/plain_strides.csv").is_file()


def test_evaluate_model_prints_the_report(
    capsys: pytest.CaptureFixture[str],
    box: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mctd_diffusers.evaluation import model_report

    seen: dict[str, Any] = {}

    def evaluate(pipe: Any, output: Path, **arguments: Any) -> dict[str, Any]:
        seen.update(arguments, output=output, pipe=pipe)
        return {}

    monkeypatch.setattr(model_report, "evaluate_model", evaluate)
    monkeypatch.setattr(model_report, "format_report", lambda report: "the report")
    status, out, err = run(capsys, "evaluate-model", "--output", tmp_path, "--steps", 8)
    assert status == 0, err
    assert out.startswith("the report\n")
    assert seen["num_inference_steps"] == 8
    assert seen["reward"] is seen["pipe"].reward_model


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("best_off_n", "no search is named 'best_off_n'.*best_of_n"),
        ("beam:depth=2", "'depth=2' is no setting of beam; .* width"),
        ("beam:width", "'width' is no setting of beam"),
        ("beam:width=0", "width is 0"),
        ("beam:width=x", "width is 'x'; give a whole number"),
        ("beam:width=1.5", "width is 1.5; give a whole number"),
        ("beam:width=None", "width is None; give a whole number"),
        ("beam:width=True", "width is True; give a whole number"),
        ("beam:width=2:width=3", "width is set twice"),
        ("beam:branch_eta=x", "branch_eta is 'x'; give a finite number"),
        ("mctd:exploration=inf", "exploration is inf; give a finite number"),
        ("mctd:wave_size=2.5", "wave_size is 2.5; give a whole number"),
        ("mctd:strides=2", r"strides is 2; give whole numbers in brackets, such as \(1,2\)"),
        ("mctd:strides=(1,x)", r"strides is '\(1,x\)'; give whole numbers in brackets"),
        ("mctd:pruning=", "pruning is ''; give a name"),
        ("mctd:third_moves=fuse", r"third_moves is 'fuse'; give names in brackets"),
        ("mctd:backup=maxx", "backup is 'maxx'; give one of max, mean, soft"),
        ("mctd:backup=3", "backup is 3; give one of max, mean, soft"),
        ("best_of_n:n=2.5", "n is 2.5; give a whole number or None"),
        ("none:width=2", "'none'.* has no settings"),
        ("beam,beam", "named twice"),
        (",", "no search in ','"),
    ],
)
def test_a_wrong_search_is_refused(
    capsys: pytest.CaptureFixture[str], search: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.parse_searches(search)
    assert fails(capsys, "compare", PROMPT, "--search", search)


@pytest.mark.parametrize(
    ("scheduler", "name", "eta", "config"),
    [
        ("ddim:eta=1", "DDIM:eta=1", 1.0, {"clip_sample": False}),
        ("dpm++ 2m:karras", "DPM++2M:karras", 0.0, {"use_karras_sigmas": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_scheduler_is_named_with_its_settings(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    tmp_path: Path,
    scheduler: str,
    name: str,
    eta: float,
    config: dict[str, Any],
) -> None:
    given = ["--scheduler", scheduler, "--output", tmp_path, "--search", "best_of_n", *QUICK]
    status, _, err = run(capsys, "generate", PROMPT, "--model", model, *given)
    assert status == 0, err
    assert json.loads((tmp_path / "result.json").read_text())["scheduler"] == name
    recipe = read_recipe(tmp_path / "two-blue-cars.png")
    assert recipe["call"]["eta"] == eta
    assert {key: recipe["scheduler"]["config"][key] for key in config} == config


def test_a_search_with_settings_is_read() -> None:
    label, strategy = cli.parse_search("beam:width=2:branch_eta=0.5")
    assert label == "beam:width=2:branch_eta=0.5"
    assert (strategy.width, strategy.branch_eta) == (2, 0.5)
    searches = cli.parse_searches("mctd:strides=(1,2),beam")
    assert [label for label, _ in searches] == ["mctd:strides=(1,2)", "beam"]
    assert searches[0][1].strides == (1, 2)
    assert cli.parse_search("best_of_n:n=None")[1].n is None
    named = cli.parse_search(
        "mctd:third_moves=(fuse,go_back):stride_policy=fixed:4:pruning=bounds"
    )[1]
    assert named.third_moves == ("fuse", "go_back")
    assert (named.stride_policy, named.pruning) == ("fixed:4", "bounds")
    assert cli.parse_search("mctd:backup=soft:temperature=2")[1].backup == "soft"
    textbook = cli.parse_search("textbook_mctd:guidances=(0.5,None,1)")[1]
    assert textbook.guidances == (0.5, None, 1)
    assert cli.parse_search("dts*:branch_levels=(1,0.5)")[1].branch_levels == (1, 0.5)
    with pytest.raises(ConfigError, match=r"give numbers in brackets"):
        cli.parse_search("dts*:branch_levels=(1,None)")
    assert cli.parse_searches("none, best_of_n") == [("none", None), ("best_of_n", "best_of_n")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--reward", "pickscor"], "unknown reward 'pickscor': did you mean 'pickscore'"),
        (["--compute", "0.5"], "cannot finish one sample|less than one"),
        (["--nfe-budget", "3"], "3 NFE cannot finish one sample.* at least 4"),
        (["--cost-budget", "0.1"], "0.1 row-equivalents cannot finish one sample"),
        (["--compute", "-1"], "compute=-1"),
        (["--compute", "2", "--nfe-budget", "8"], "give one of them"),
        (["--compute", "inf"], "compute=inf: give a finite number above 0"),
        (["--compute", "1", "--search", "beam:width=2"], "4 NFE .* 'beam' over .* at least 8 NFE"),
        (["--time-budget", "0"], "time_budget_s=0"),
        (["--guidance", "nan"], "guidance=nan: give a finite number"),
        (["--scheduler", "eulr"], "no scheduler is named 'eulr'; did you mean 'Euler'. the names"),
        (["--scheduler", "EulerDiscreteSchedule"], "did you mean 'EulerDiscreteScheduler'"),
        (["--scheduler", "SchedulerMixin"], "no scheduler is named 'SchedulerMixin'"),
        (["--scheduler", "Euler:karas"], "no setting 'karas'; did you mean 'karras'"),
        (["--scheduler", "DDIM:eta=2"], "eta is '2'; give the share of fresh noise"),
        (["--scheduler", "Euler:eta=0.5"], "takes none: leave it out.* beam:branch_eta=0.5"),
        (["--scheduler", "DDIMInverse"], "DDIMInverseScheduler cannot be branched"),
        (["--scheduler", "FlowEuler"], "'FlowEuler' is for flow-matching models"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--search", "none", "--compute", "2"], "'none' is the stock pipeline.* leave --compute"),
        (["--search", "none", "--time-budget", "2"], "leave --time-budget out"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    given = ["--model", model] if "--model" not in arguments else []
    said = fails(capsys, "generate", PROMPT, "--steps", 4, "--output", tmp_path, *given, *arguments)
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", PROMPT, "--compute", "-1"],
        ["generate", PROMPT, "--compute", "0.5"],
        ["compare", PROMPT, "--nfe-budget", "0", "--search", "none,mctd"],
        ["demo", "--compute", "0.5"],
        ["bench", "--budgets", "1.5x", "--strategies", "beam:width=2"],
        ["generate", PROMPT, "--scheduler", "eulr"],
        ["generate", PROMPT, "--scheduler", "Euler:karas"],
        ["bench", "--scheduler", "DDIMInverse"],
        ["evaluate-model", "--guidance", "nan"],
        ["compare", PROMPT, "--device", "abacus"],
    ],
)
def test_arguments_are_checked_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    box: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.setattr(common, "EMBEDDED_MODEL", str(tmp_path / "nowhere"))
    output = ["--out" if arguments[0] == "bench" else "--output", tmp_path / "out"]
    assert "nowhere" not in fails(capsys, *arguments, *output)
    texts = [PROMPT] * (arguments[0] in ("generate", "compare"))
    assert "nowhere" in fails(capsys, arguments[0], *texts, *output)


@pytest.mark.parametrize("scheduler", ["DDIMInverse", "FlowEuler", "UnCLIP"])
def test_a_scheduler_that_the_model_cannot_have_is_refused_before_its_weights_are_read(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, scheduler: str
) -> None:
    shutil.copytree(model / "scheduler", tmp_path / "bare" / "scheduler")
    given = ["generate", PROMPT, "--model", tmp_path / "bare", "--output", tmp_path / "out"]
    assert scheduler in fails(capsys, *given, "--scheduler", scheduler)
    assert "could not load" in fails(capsys, *given, "--scheduler", "Euler")


def test_a_seed_beyond_what_a_generator_takes_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "--seed" in fails(capsys, "generate", PROMPT, "--seed", 10**20, status=2)


def test_the_program_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys)
    assert status == 0
    assert "generate" in out
    assert not err


def test_a_model_without_a_reward_is_told_how_to_get_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny.make_stock().save_pretrained(tmp_path / "stock")
    arguments = ["--model", tmp_path / "stock", "--output", tmp_path / "out", *QUICK]
    said = fails(capsys, "generate", PROMPT, *arguments)
    assert "a search needs a reward" in said
    assert "add `--reward clip`" in said
    status, _, err = run(capsys, "generate", PROMPT, "--reward", "brightness", *arguments)
    assert status == 0, err


def test_a_broken_model_folder_is_said_in_one_sentence(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(model, tmp_path / "model")
    arguments = ["generate", PROMPT, "--model", broken, "--output", tmp_path / "out"]
    for part in ("unet", "text_encoder"):
        (weights,) = (broken / part).glob("*.safetensors")
        whole = weights.read_bytes()
        weights.write_bytes(whole[:1000])
        assert "cannot be loaded" in fails(capsys, *arguments)
        weights.unlink()
        assert "cannot be loaded" in fails(capsys, *arguments)
        weights.write_bytes(whole)
    shutil.rmtree(broken / "tokenizer")
    assert "lacks tokenizer" in fails(capsys, *arguments)
    (broken / "model_index.json").write_text("{")
    assert "could not load the pipeline of" in fails(capsys, *arguments)


def test_an_output_that_is_no_folder_is_refused(
    capsys: pytest.CaptureFixture[str], box: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for command in (["generate", PROMPT], ["compare", PROMPT], ["demo"]):
        said = fails(capsys, *command, "--output", tmp_path / "file")
        assert "cannot be used" in said
    assert "cannot be used" in fails(capsys, "bench", "--out", tmp_path / "file")


def test_a_file_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "result.json").mkdir()
    arguments = ["--model", model, "--output", tmp_path, *QUICK]
    said = fails(capsys, "generate", PROMPT, *arguments)
    assert re.search(r"result\.json' cannot be used \(Is a directory\).*--output", said)


def test_gold_that_is_asked_for_needs_a_prompt_that_the_judge_reads(
    capsys: pytest.CaptureFixture[str], box: Path, tmp_path: Path
) -> None:
    said = fails(capsys, "compare", "a castle", "--gold", "--output", tmp_path)
    assert "the judge cannot read it" in said
    (tmp_path / "prompts.txt").write_text("two blue cars\n\na castle\n")
    bench = ["bench", "--out", tmp_path, "--prompts"]
    assert "castle" in fails(capsys, *bench, tmp_path / "prompts.txt")
    assert "neither 'tune' nor 'report'" in fails(capsys, *bench, "reprot")


def test_a_missing_judge_is_said(
    capsys: pytest.CaptureFixture[str],
    box: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judges, "EMBEDDED_JUDGE", tmp_path / "nothing")
    real = judges.SceneJudge.from_pretrained
    monkeypatch.setattr(judges, "load_judge", lambda: real(tmp_path / "nothing"))
    assert "judge" in fails(capsys, "demo", "--output", tmp_path)
    assert cli._gold_function([PROMPT], None) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", PROMPT, "--steps", "many"],
        ["generate", PROMPT, "--steps", "0"],
        ["generate", PROMPT, "--nope"],
        ["paint"],
    ],
)
def test_an_argument_that_cannot_be_read_exits_with_two(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert fails(capsys, *arguments, status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "4x,eight"], "budget 'eight' .* give 8x"),
        (["--budgets", ","], "no budget in ','"),
        (["--budgets", "0.5x"], "1x at least"),
        (["--budgets", "2x,4x,2x"], "'2x' is named twice"),
        (["--seeds", "0,0"], "0 is named twice"),
        (["--seeds", "-1"], "-1.* at least 0"),
        (["--seeds", "one"], "whole numbers"),
        (["--strategies", "none,mctd"], "leave 'none' out"),
        (["--strategies", "beam:width=0"], "width is 0"),
        (["--suite", "mixtures"], "--suite is 'mixtures'"),
        (["--strategies", "mctd:stride_policy=fixed:0"], "stride_policy is 'fixed:0'"),
        (["--stride-policies", "even", "--strategies", "mctd"], "stride_policy is 'even'"),
        (["--evaluations", "8"], "--stride-policies uniform,ays,gits,ige"),
        (["--fusions", "x1", "--strategies", "mctd"], "--fusions names 'x1'"),
        (["--prunings", "bound", "--strategies", "mctd"], "pruning is 'bound'"),
        (["--evaluations", "16", "--stride-policies", "ays"], "from 1 to 15"),
        (["--evaluations", "0", "--stride-policies", "ays"], "at least 1"),
        (
            ["--against", "beam", "--strategies", "mctd"],
            "the strategies are plain, best_of_n, mctd",
        ),
        (["--suite", "mixture", "--model", "some/where"], "give one"),
        (["--suite", "mixture", "--scheduler", "Euler"], "leave --scheduler out"),
        (
            ["--evaluations", "8", "--stride-policies", "ays", "--scheduler", "DDIM:eta=1"],
            "has an eta, and --evaluations measures",
        ),
    ],
)
def test_options_of_a_bench_are_checked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    said = fails(capsys, "bench", "--out", tmp_path / "out", *arguments)
    assert re.search(message, said)


def test_a_reward_that_fails_leaves_what_was_finished(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def tiring(images: torch.Tensor, prompts: list[str]) -> list[float]:
        calls.append(len(prompts))
        if len(calls) > 2:
            raise RuntimeError("out of ink")
        return [1.0] * len(prompts)

    monkeypatch.setitem(resolving._NAMED_REWARDS, "tiring", lambda: tiring)
    arguments = [
        PROMPT, "a cup", "--model", model, "--reward", "tiring", "--steps", 4, "--compute", 2,
        "--rows-per-call", 1,
    ]  # fmt: skip
    search = "best_of_n:wave_size=1"
    status, out, err = run(
        capsys, "generate", *arguments, "--search", search, "--output", tmp_path / "one"
    )
    assert status == 1
    (said,) = err.splitlines()
    assert said.startswith("mctd: reward 'tiring' raised RuntimeError: out of ink")
    for name in ("two-blue-cars.png", "a-cup.png", "result.json"):
        assert (tmp_path / "one" / name).is_file()
        assert str(tmp_path / "one" / name) in out
    (found,) = json.loads((tmp_path / "one" / "result.json").read_text())["searches"].values()
    assert found["ledger"]["nfe"] == 16
    assert [image["stop_reason"] for image in found["images"]] == ["error"] * 2

    calls[:] = []
    arguments[arguments.index("--reward") + 1] = "tired"
    monkeypatch.setitem(resolving._NAMED_REWARDS, "tired", lambda: tiring)
    searches = f"{search},mctd"
    status, out, err = run(
        capsys, "compare", *arguments, "--search", searches, "--output", tmp_path / "two"
    )
    assert status == 1
    assert "out of ink" in err.splitlines()[-1]
    assert (tmp_path / "two" / "sheet.png").is_file()
    assert str(tmp_path / "two" / "sheet.png") in out
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert list(result["searches"]) == [search]


def test_ctrl_c_keeps_what_was_finished(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def impatient(images: torch.Tensor, prompts: list[str]) -> list[float]:
        calls.append(len(prompts))
        if len(calls) > 4:
            raise KeyboardInterrupt
        return [1.0] * len(prompts)

    monkeypatch.setitem(resolving._NAMED_REWARDS, "impatient", lambda: impatient)
    arguments = ["--model", model, "--reward", "impatient", "--steps", 2, "--rows-per-call", 1]
    status, _, err = run(
        capsys, "compare", PROMPT, "--search", "best_of_n,beam", "--compute", 3, "--no-trees",
        "--output", tmp_path / "compare", *arguments,
    )  # fmt: skip
    assert status == 130
    assert "stopped by Ctrl-C" in err
    assert (tmp_path / "compare" / "images" / "best_of_n" / "two-blue-cars.png").is_file()
    calls[:] = [1] * 9
    status, _, err = run(capsys, "generate", PROMPT, "--output", tmp_path / "none", *arguments)
    assert status == 130
    assert "nothing was saved" in err
    assert not list((tmp_path / "none").iterdir())


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mctd_diffusers.cli import main; status = main(['--help'])\n"
        "heavy = {'torch', 'diffusers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(status or sorted(heavy) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mctd_diffusers", "compare", PROMPT, "--search", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("mctd: no search is named 'nothing'")
    assert not done.stdout

"""Calls of a pipeline that are saved while they search, and resumed elsewhere."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mctd_diffusers.errors import ConfigError, RewardError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.saved_calls import CallSaver
from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.moves import draw, finish_plainly
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.saving import load_search
from mctd_diffusers.search.strategies import MCTD
from mctd_diffusers.search.tree import to_json
from tests.pipelines import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

PROMPTS = ["a red cat", "two dogs"]
CALL: dict[str, Any] = {
    "num_inference_steps": 6,
    "guidance_scale": 4.0,
    "output_type": "pt",
    "rows_per_call": 2,
    "compute": 2,
}


class StoppedError(Exception):
    """The process is gone."""


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def search(pipe: MCTDPipeline, **call: Any) -> Any:
    return pipe(PROMPTS, generator=seeded(), **{**CALL, **call})


def fresh_pipe(scheduler: str = "ddim", **parts: Any) -> MCTDPipeline:
    """The same model again, as another process loads it."""
    return MCTDPipeline.from_pipe(
        tiny.make_stock(scheduler), **{"reward_model": tiny.redness, **parts}
    )


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the process end after a number of saves."""

    def arrange(saves: int | None) -> None:
        save, left = CallSaver.save, saves

        def counting(saver: CallSaver, *arguments: Any) -> None:
            nonlocal left
            save(saver, *arguments)
            if left is not None:
                left -= 1
                if left == 0:
                    monkeypatch.setattr(CallSaver, "save", save)
                    raise StoppedError

        monkeypatch.setattr(CallSaver, "save", counting)

    return arrange


def assert_same_output(one: Any, other: Any) -> None:
    """Equal to the last bit, the ledger but for its seconds included."""
    assert torch.equal(one.images, other.images)
    assert one.rewards == other.rewards
    assert one.nfe == other.nfe
    assert one.ledger.total == other.ledger.total
    assert one.ledger.by_problem == other.ledger.by_problem
    for found, same in zip(one.search, other.search, strict=True):
        assert to_json(found.tree) == to_json(same.tree)
        assert found.finished == same.finished
        assert found.history == same.history
        assert found.stop_reason == same.stop_reason
        assert torch.equal(found.latents, same.latents)
        assert found.recipe == same.recipe


@pytest.mark.parametrize(
    ("scheduler", "call"),
    [
        ("ddim", {"search": "mctd"}),
        ("euler_ancestral", {"search": "beam", "include_plain": True, "compute": 3}),
        ("dpm_multistep", {"search": "beam", "guidance_scale": 1.0}),
        ("ddim", {"search": "evolution", "compute": 4}),
        ("ddpm", {"search": "zero-order", "compute": 4}),
        ("ddim", {"search": "fast-mctd"}),
        ("ddim", {"search": "dts"}),
        ("ddim", {"search": "fk", "compute": 4}),
        ("euler", {"search": MCTD(seed_share=0.3, wave_size=3)}),
        ("heun", {"search": "mctd", "num_inference_steps": 4}),
        (
            "kdpm2_ancestral",
            {"search": "dts", "include_plain": True, "compute": 3, "num_inference_steps": 4},
        ),
    ],
)
def test_a_call_stopped_at_any_wave_goes_on_as_if_never_stopped(
    tmp_path: Path, stop_after: Any, scheduler: str, call: dict[str, Any]
) -> None:
    preview = {"preview_vae": tiny.make_preview_vae()} if scheduler == "euler" else {}
    whole = search(fresh_pipe(scheduler, **preview), **call)
    stop_after(1)
    with pytest.raises(StoppedError):
        search(fresh_pipe(scheduler, **preview), **call, save_to=tmp_path, save_every_s=0)
    stop_after(5)  # and again, of what was resumed
    with pytest.raises(StoppedError):
        fresh_pipe(scheduler, **preview).resume(tmp_path, save_every_s=0)
    assert not load_search(tmp_path).is_over
    resumed = fresh_pipe(scheduler, **preview).resume(tmp_path)
    assert_same_output(resumed, whole)
    assert load_search(tmp_path).is_over
    assert_same_output(fresh_pipe(scheduler, **preview).resume(tmp_path), whole)


def test_edges_saved_between_their_two_calls_go_on_as_if_never_stopped(
    tmp_path: Path, stop_after: Any
) -> None:
    call = {"search": "beam", "include_plain": True, "compute": 3}
    whole = search(fresh_pipe("heun"), **call)
    stop_after(5)
    with pytest.raises(StoppedError):
        search(fresh_pipe("heun"), **call, save_to=tmp_path, save_every_s=0)
    samples = torch.load(load_search(tmp_path).samples, weights_only=True)["samples"]
    assert any(sample["midway"] is not None for sample in samples)
    assert_same_output(fresh_pipe("heun").resume(tmp_path), whole)


def test_saving_changes_nothing(pipe: MCTDPipeline, tmp_path: Path) -> None:
    whole = search(pipe)
    saved = search(pipe, save_to=tmp_path, save_every_s=0)
    assert_same_output(saved, whole)
    assert [result.finished for result in load_search(tmp_path).results()] == [
        found.finished for found in whole.search
    ]


def test_the_plain_samples_are_read_beside_the_searches(pipe: MCTDPipeline, tmp_path: Path) -> None:
    out = search(pipe, compute=3, include_plain=True, save_to=tmp_path)
    searched, plain = load_search(tmp_path).results()[:2], load_search(tmp_path).results()[2:]
    assert [r.finished for r in searched] == [found.finished for found in out.search]
    assert [r.best.reward for r in plain if r.best is not None] == out.plain.rewards


def test_ctrl_c_saves(tmp_path: Path) -> None:
    class Interrupting:
        calls = 0

        def __call__(self, images: Any, prompts: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return tiny.redness(images, prompts)

    whole = search(fresh_pipe(), search="best_of_n")
    pipe = fresh_pipe(reward_model=Interrupting())
    out = search(pipe, search="best_of_n", wave_size=1, save_to=tmp_path / "late", compute=4)
    assert {found.stop_reason for found in out.search} == {"interrupted"}
    resumed = fresh_pipe().resume(tmp_path / "late")
    assert {found.stop_reason for found in resumed.search} == {"budget"}
    assert [len(found.finished) for found in resumed.search] == [4, 4]
    pipe = fresh_pipe(reward_model=Interrupting())
    pipe.reward_model.calls = 2  # type: ignore[union-attr]  # that reward
    with pytest.raises(KeyboardInterrupt):
        search(pipe, search="best_of_n", save_to=tmp_path / "early")
    assert_same_output(fresh_pipe().resume(tmp_path / "early"), whole)


def test_a_search_that_a_reward_broke_goes_on_with_one_that_works(tmp_path: Path) -> None:
    def broken(images: Any, prompts: Any) -> Any:
        if "two dogs" in prompts:
            raise ConnectionError("the server of the reward is down")
        return tiny.redness(images, prompts)

    whole = search(fresh_pipe())
    with pytest.raises(RewardError, match="is down") as caught:
        search(fresh_pipe(reward_model=broken), save_to=tmp_path)
    partial = caught.value.partial
    assert partial.search[0].stop_reason == "budget"
    assert partial.rewards[0] == whole.rewards[0]
    assert torch.equal(partial.images[0], whole.images[0])
    assert partial.images[1] is None
    assert partial.search[1].error is caught.value
    healed = fresh_pipe().resume(tmp_path)
    assert torch.equal(healed.images, whole.images)
    assert healed.nfe == whole.nfe


def test_a_search_by_cost_goes_on_by_the_prices_of_then(tmp_path: Path, stop_after: Any) -> None:
    stop_after(5)
    with pytest.raises(StoppedError):
        search(fresh_pipe(), compute=None, cost_budget=200.0, save_to=tmp_path, save_every_s=0)
    saved = load_search(tmp_path)
    resumed = fresh_pipe().resume(tmp_path)
    prices = resumed.ledger.prices
    assert prices == saved.problems[0].prices
    assert all(prices.cost(found.spent) <= 200.0 + 1e-9 for found in resumed.search)


@dataclass(frozen=True)
class Plain:
    """A strategy of somebody's own."""

    name: str = "plain"

    def least_evaluations(self, num_steps: int) -> int:
        return num_steps

    def search(self, problem: Problem) -> Asks:
        nodes = yield from draw(problem, 1)
        yield from finish_plainly(problem, nodes)


def test_what_the_folder_cannot_hold_is_passed_again(tmp_path: Path, stop_after: Any) -> None:
    pipe = fresh_pipe()
    embeds, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    call = {
        **CALL,
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "reward_prompt": PROMPTS,
        "search": Plain(),
    }
    whole = pipe(generator=seeded(), **call)
    stop_after(3)
    with pytest.raises(StoppedError):
        pipe(generator=seeded(), **call, save_to=tmp_path, save_every_s=0)
    with pytest.raises(ConfigError, match="'plain' is a strategy of your own"):
        pipe.resume(tmp_path)
    with pytest.raises(ConfigError, match="cannot hold prompt_embeds, negative_prompt_embeds"):
        pipe.resume(tmp_path, search=Plain())
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with pytest.raises(ConfigError, match="resume takes no compute"):
        pipe.resume(tmp_path, search=Plain(), compute=8, **given)
    assert_same_output(pipe.resume(tmp_path, search=Plain(), **given), whole)


def test_another_model_or_reward_is_refused(tmp_path: Path, stop_after: Any) -> None:
    stop_after(12)
    with pytest.raises(StoppedError):
        search(fresh_pipe(), search="best_of_n", wave_size=1, save_to=tmp_path, save_every_s=0)
    other = MCTDPipeline.from_pipe(tiny.make_stock(seed=5), reward_model=tiny.redness)
    with pytest.raises(ConfigError, match="the network answers otherwise than when"):
        other.resume(tmp_path)
    with pytest.raises(ConfigError, match="the reward answers otherwise than when"):
        fresh_pipe().resume(tmp_path, reward_model="brightness")


def test_answers_that_differ_in_their_last_bits_are_named(
    tmp_path: Path, stop_after: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stop_after(12)
    with pytest.raises(StoppedError):
        search(fresh_pipe(), search="best_of_n", wave_size=1, save_to=tmp_path, save_every_s=0)

    def nearly(images: Any, prompts: Any) -> Any:
        return [score * (1 + 1e-9) for score in tiny.redness(images, prompts)]

    with caplog.at_level(logging.WARNING):
        fresh_pipe().resume(tmp_path, reward_model=nearly)
    assert "the reward answers otherwise in the last bits" in caplog.text


def test_a_folder_with_a_search_is_not_written_over(pipe: MCTDPipeline, tmp_path: Path) -> None:
    search(pipe, save_to=tmp_path)
    with pytest.raises(ConfigError, match=r"holds a saved search: go on with it by pipe\.resume"):
        search(pipe, save_to=tmp_path)
    with pytest.raises(ConfigError, match="save_every_s=-1"):
        search(pipe, save_to=tmp_path / "new", save_every_s=-1)
    with pytest.raises(ConfigError, match="which knows no save_to"):
        pipe(PROMPTS, search=None, save_to=tmp_path / "new")
    with pytest.raises(ConfigError, match="no saved search is in"):
        pipe.resume(tmp_path / "new")


def test_the_world_of_a_saved_search_can_be_looked_into(pipe: MCTDPipeline, tmp_path: Path) -> None:
    whole = search(pipe, save_to=tmp_path)
    opened = fresh_pipe().open_search(tmp_path)
    results = opened.saved.results()
    handles = results[1].tree.handle[1:]
    environment = opened.call.world.environment
    finished = [sample.handle for sample in results[1].finished]
    latents = environment.denoised(torch.tensor(finished).numpy())
    assert torch.equal(latents, whole.search[1].latents)
    assert len(environment.export(handles)) == len(handles)


def test_the_folder_names_no_path_of_this_machine(pipe: MCTDPipeline, tmp_path: Path) -> None:
    search(pipe, save_to=tmp_path / "here")
    index = json.loads((tmp_path / "here" / "search.json").read_text())
    assert str(tmp_path) not in json.dumps(index)


IN_ANOTHER_PROCESS = """
import sys, torch
from tests.pipelines import tiny
from mctd_diffusers.pipeline import MCTDPipeline

pipe = MCTDPipeline.from_pipe(tiny.make_stock(), reward_model=tiny.redness)
out = pipe.resume(sys.argv[1])
torch.save({"images": out.images, "rewards": out.rewards, "nfe": out.nfe}, sys.argv[2])
"""


@pytest.mark.slow
def test_a_search_goes_on_in_another_process(tmp_path: Path, stop_after: Any) -> None:
    whole = search(fresh_pipe())
    stop_after(6)
    with pytest.raises(StoppedError):
        search(fresh_pipe(), save_to=tmp_path / "saved", save_every_s=0)
    subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, tmp_path / "saved", tmp_path / "out.pt"],
        cwd=Path(__file__).parents[2],
        check=True,
    )
    out = torch.load(tmp_path / "out.pt")
    assert torch.equal(out["images"], whole.images)
    assert out["rewards"] == whole.rewards
    assert out["nfe"] == whole.nfe

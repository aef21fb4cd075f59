"""One call of a pipeline that searches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from PIL import Image

from mctd_diffusers.arguments import scheduler_of
from mctd_diffusers.errors import (
    BudgetError,
    ConfigError,
    NonFiniteRewardError,
    RewardError,
    UnsupportedSchedulerError,
)
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import read_recipe, save_image_with_recipe
from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.moves import denoise, draw, finish_plainly, perturb, renoise, step
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.strategies import DTS, BestOfN
from mctd_diffusers.search.tree import DRAW, ROOT, issue_seeds, path_to_root
from tests.pipelines import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 6


def seeded(*seeds: int) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or (0,)]
    return generators if len(generators) > 1 else generators[0]


def search(pipe: MCTDPipeline, prompt: Any = "a red cat", **call: Any) -> Any:
    defaults = {"num_inference_steps": STEPS, "generator": seeded(), "search": "beam"}
    return pipe(prompt, **{"compute": 3, **defaults, **call})


class FailingReward:
    """Good for some calls, then it does what it is told."""

    def __init__(self, good_calls: int, failure: BaseException | float) -> None:
        self.calls, self.good_calls, self.failure = 0, good_calls, failure

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        self.calls += 1
        if self.calls <= self.good_calls:
            return tiny.redness(images, list(prompts))
        if isinstance(self.failure, BaseException):
            raise self.failure
        return [self.failure] * len(images)


# What comes back


@pytest.mark.parametrize("name", ["best_of_n", "beam", "mctd"])
def test_the_result_says_what_was_found_and_spent(pipe: MCTDPipeline, name: str) -> None:
    out = search(pipe, search=name)
    assert isinstance(out.images[0], Image.Image)
    found = out.search[0]
    assert out.rewards[0] == found.best_reward == max(s.reward for s in found.finished)
    assert out.rewards[0] == pytest.approx(score_of(out.images[0]), abs=0.01)
    assert out.nfe == [found.spent.nfe]
    assert STEPS <= out.nfe[0] <= 3 * STEPS
    assert out.nfe[0] == out.ledger.total.nfe
    assert found.tree.evaluated.sum() == out.nfe[0]
    assert out.ledger.prices.decode > 0
    assert found.scheduler == "DDIMScheduler"
    assert found.stop_reason in {"budget", "exhausted"}


def score_of(image: Image.Image) -> float:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    return tiny.redness(pixels, [""])[0]


def test_search_beats_the_plain_sample(pipe: MCTDPipeline) -> None:
    out = search(pipe, compute=4, include_plain=True)
    assert out.rewards[0] > out.plain.rewards[0]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types_are_the_stock_ones(stock: Any, pipe: MCTDPipeline, output_type: str) -> None:
    prompts = ["a cat", "a dog"]
    theirs = stock(prompts, num_inference_steps=2, output_type=output_type).images
    ours = search(pipe, prompts, num_inference_steps=2, output_type=output_type).images
    assert type(ours) is type(theirs)
    assert np.shape(ours) == np.shape(theirs)


def test_images_do_not_depend_on_each_other(pipe: MCTDPipeline) -> None:
    call = {"output_type": "pt", "rows_per_call": 4, "search": "mctd"}
    both = search(pipe, ["a red cat", "two dogs"], generator=seeded(3, 4), **call)
    for i, prompt in enumerate(["a red cat", "two dogs"]):
        alone = search(pipe, [prompt], generator=[seeded(3 + i)], **call)
        assert torch.equal(both.images[i], alone.images[0])
        assert both.rewards[i] == alone.rewards[0]
        assert both.nfe[i] == alone.nfe[0]


def test_images_of_one_prompt_have_searches_of_their_own(pipe: MCTDPipeline) -> None:
    out = search(pipe, ["a cat", "a dog"], num_images_per_prompt=2)
    assert len(out.images) == len(out.search) == len(out.rewards) == 4
    assert len({found.tree.root_seed for found in out.search}) == 4
    assert [found.recipe["prompt"] for found in out.search] == ["a cat"] * 2 + ["a dog"] * 2
    assert sum(out.nfe) == out.ledger.total.nfe


def test_the_scheduler_of_the_pipeline_is_left_alone(pipe: MCTDPipeline) -> None:
    before = dict(vars(pipe.scheduler))
    config = dict(pipe.config)
    search(pipe)
    assert {name: id(part) for name, part in vars(pipe.scheduler).items()} == {
        name: id(part) for name, part in before.items()
    }
    assert dict(pipe.config) == config


def test_the_budget_by_cost_is_kept(pipe: MCTDPipeline) -> None:
    out = search(pipe, compute=None, cost_budget=60.0)
    found = out.search[0]
    assert found.stop_reason == "budget"
    assert out.ledger.prices.cost(found.spent) <= 60.0 + 1e-9


def test_a_budget_of_seconds_finishes_a_sample_of_every_image(pipe: MCTDPipeline) -> None:
    out = search(pipe, ["a cat", "a dog"], compute=None, time_budget_s=1e-3)
    assert all(isinstance(image, Image.Image) for image in out.images)
    assert {found.stop_reason for found in out.search} == {"time"}


def test_settings_of_a_strategy_reach_it(pipe: MCTDPipeline) -> None:
    out = search(pipe, search=BestOfN(n=2))
    assert len(out.search[0].finished) == 2
    out = search(pipe, search="best_of_n", wave_size=1)
    assert len(out.search[0].finished) == 3
    strides = search(pipe, search="mctd", strides=(1,)).search[0].tree.stride
    assert set(strides.tolist()) == {0, 1}


# The plain sample


@pytest.mark.parametrize("name", ["best_of_n", "beam", "mctd"])
def test_the_answer_is_never_worse_than_the_plain_sample(
    stock: Any, pipe: MCTDPipeline, name: str
) -> None:
    prompts = ["a red cat", "two dogs"]
    theirs = stock(prompts, num_inference_steps=STEPS, output_type="pt", generator=seeded())
    out = search(pipe, prompts, search=name, include_plain=True, output_type="pt", rows_per_call=2)
    assert torch.equal(out.plain.images, theirs.images)
    for reward, plain in zip(out.rewards, out.plain.rewards, strict=True):
        assert reward >= plain
    assert all(nfe <= 3 * STEPS for nfe in out.nfe)
    assert sum(out.nfe) == out.ledger.total.nfe
    assert set(out.ledger.by_problem) == {0, 1}


def test_a_plain_winner_is_handed_back_with_its_recipe(pipe: MCTDPipeline) -> None:
    plain = search(pipe, search="best_of_n", compute=1)
    others = BestOfN(n=1)

    class Worse:
        """A search whose samples are not the plain one: it draws its own noise first."""

        name = "worse"

        def least_evaluations(self, num_steps: int) -> int:
            return num_steps

        def search(self, problem: Problem) -> Asks:
            issue_seeds(problem.tree, ROOT, move=DRAW, stride=0, count=1)
            yield from others.search(problem)

    def likes_the_plain_one(images: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        wanted = torch.from_numpy(np.array(plain.images[0])).permute(2, 0, 1) / 255
        return (-(images - wanted).abs().mean(dim=(1, 2, 3))).tolist()

    out = search(pipe, search=Worse(), include_plain=True, reward_model=likes_the_plain_one)
    assert np.array_equal(np.array(out.images[0]), np.array(plain.images[0]))
    assert out.rewards == out.plain.rewards
    replayed = pipe.replay(out.search[0].recipe)
    assert np.array_equal(np.array(replayed.images[0]), np.array(out.images[0]))


# Recipes


@pytest.mark.parametrize("name", ["best_of_n", "beam", "mctd"])
def test_a_replay_is_the_winner_at_the_cost_of_its_ancestry(
    pipe: MCTDPipeline, name: str, tmp_path: Path
) -> None:
    out = search(pipe, ["a red cat", "two dogs"], search=name, negative_prompt=["blue", "grey"])
    paths = out.save(tmp_path / "made" / "picture.png")
    assert [path.name for path in paths] == ["picture-0.png", "picture-1.png"]
    found = out.search[1]
    replayed = pipe.replay(read_recipe(paths[1]), previews=True)
    assert np.array_equal(np.array(replayed.images[0]), np.array(out.images[1]))
    assert replayed.reward == out.rewards[1]
    path = path_to_root(found.tree, found.winner.node)
    assert replayed.nfe == len(path) - 2  # but the root and the finished sample
    assert len(replayed.previews) == replayed.nfe
    expected = [int(found.tree.step_index[node]) for node in path[::-1][1:-1]]
    assert replayed.step_indices == expected


@pytest.mark.parametrize("name", ["ddpm", "euler", "euler_ancestral", "dpm_multistep_sde", "heun"])
def test_a_replay_is_bit_equal_with_other_schedulers(name: str) -> None:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(name), reward_model=tiny.redness)
    out = search(pipe, output_type="latent", generator=seeded(3, 4), num_images_per_prompt=2)
    replayed = pipe.replay(out.search[1].recipe)
    assert torch.equal(replayed.latents, out.images[1])


@dataclass(frozen=True)
class EveryMove:
    """A search that makes each kind of move, finishes, goes back, and finishes again."""

    name: str = "every_move"

    def least_evaluations(self, num_steps: int) -> int:
        return 8

    def search(self, problem: Problem) -> Asks:
        nodes = yield from draw(problem, 2)
        nodes = yield from perturb(problem, nodes, strength=0.3)
        yield from denoise(problem, nodes)
        nodes = yield from step(problem, nodes, stride=2, eta=1.0, guidance=9.5)
        nodes = yield from perturb(problem, nodes, strength=0.7)
        yield from denoise(problem, nodes)
        nodes = yield from renoise(problem, nodes, step_index=1)
        nodes = yield from finish_plainly(problem, nodes)
        nodes = yield from renoise(problem, nodes, step_index=3)
        yield from finish_plainly(problem, nodes)


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "dpm_multistep_sde"])
def test_a_replay_retraces_every_move(name: str, tmp_path: Path) -> None:
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(name), reward_model=tiny.redness)
    found = search(pipe, search=EveryMove(), compute=8).search[0]
    assert len(found.finished) == 4
    for sample, latents in zip(found.finished, found.latents, strict=True):
        recipe = found.recipe_of(sample.node)
        save_image_with_recipe(Image.new("RGB", (8, 8)), recipe, tmp_path / "picture.png")
        replayed = pipe.replay(read_recipe(tmp_path / "picture.png"), previews=True)
        assert torch.equal(replayed.latents, latents)
        assert replayed.reward == sample.reward
        path = path_to_root(found.tree, sample.node)
        assert replayed.nfe == sum(found.tree.evaluated[path]) == len(replayed.previews)
        stood = [int(found.tree.step_index[node]) for node in path if found.tree.evaluated[node]]
        assert replayed.step_indices == stood[::-1]


def test_a_recipe_of_an_older_version_is_replayed(pipe: MCTDPipeline) -> None:
    out = search(pipe, search="beam")
    recipe = out.search[0].recipe
    moves = [{k: v for k, v in move.items() if k != "guidance"} for move in recipe["moves"]]
    replayed = pipe.replay(recipe | {"version": 1, "moves": moves})
    assert np.array_equal(np.array(replayed.images[0]), np.array(out.images[0]))


def test_guidance_of_an_edge_needs_guidance(pipe: MCTDPipeline) -> None:
    with pytest.raises(
        ConfigError, match=r"guidance 9\.5 of one move needs .* guidance_scale above"
    ):
        search(pipe, search=EveryMove(), compute=8, guidance_scale=1.0)


def test_every_finished_sample_has_a_recipe(pipe: MCTDPipeline) -> None:
    found = search(pipe, search="best_of_n").search[0]
    for sample, latents in zip(found.finished, found.latents, strict=True):
        replayed = pipe.replay(found.recipe_of(sample.node))
        assert torch.equal(replayed.latents, latents)
        assert replayed.reward == sample.reward
    with pytest.raises(ConfigError, match="node 1 is not finished"):
        found.recipe_of(1)


def test_a_replay_needs_the_first_noise(pipe: MCTDPipeline) -> None:
    used = seeded()
    torch.rand(1, generator=used)
    noise = torch.randn((1, 4, 8, 8), generator=seeded(9))
    for call in ({"generator": used}, {"generator": None}, {"latents": noise}):
        recipe = search(pipe, search=BestOfN(n=1), **call).search[0].recipe
        assert recipe["first_draw"] is None
        with pytest.raises(ConfigError, match="latents="):
            pipe.replay(recipe)
    replayed = pipe.replay(recipe, latents=noise)
    assert replayed.reward == recipe["reward"]
    with pytest.raises(ConfigError, match="root seed"):
        pipe.replay(recipe, latents=noise + 1)


def test_a_replay_needs_what_a_recipe_cannot_hold(pipe: MCTDPipeline) -> None:
    embeds, negative = pipe.encode_prompt("a red cat", "cpu", 1, True)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    out = search(pipe, None, reward_prompt="a red cat", **given)
    recipe = out.search[0].recipe
    with pytest.raises(ConfigError, match="prompt_embeds"):
        pipe.replay(recipe)
    replayed = pipe.replay(recipe, **given)
    assert replayed.reward == out.rewards[0]


def test_a_recipe_of_another_pipeline_is_refused(pipe: MCTDPipeline) -> None:
    recipe = search(pipe, search=BestOfN(n=1)).search[0].recipe
    with pytest.raises(ConfigError, match="FluxPipeline"):
        pipe.replay(recipe | {"pipeline": "FluxPipeline"})
    with pytest.raises(ConfigError, match="version 99"):
        pipe.replay(recipe | {"version": 99})


def test_a_picture_without_a_recipe_says_so(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    image.save(tmp_path / "bare.png")
    with pytest.raises(ConfigError, match="no recipe"):
        read_recipe(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "text.png")
    with pytest.raises(ConfigError, match=r"\.png"):
        save_image_with_recipe(image, {}, tmp_path / "picture.jpg")


def test_top_gives_distinct_samples_best_first(pipe: MCTDPipeline) -> None:
    found = search(pipe, search="best_of_n", compute=6).search[0]
    top = found.top(3)
    assert [sample.reward for sample in top] == sorted(
        (sample.reward for sample in found.finished), reverse=True
    )[:3]
    assert np.array_equal(np.array(top[0].image), np.array(found.top(1)[0].image))
    diverse = found.top(3, diverse=True)
    assert diverse[0].node == top[0].node
    assert len({sample.node for sample in diverse}) == 3
    assert len(found.top(100)) == 6


def test_samples_are_drawn_from_the_tree_of_a_search(pipe: MCTDPipeline) -> None:
    output = search(pipe, search=DTS(temperature=0.1), compute=4)
    found, spent = output.search[0], output.nfe[0]
    drawn = found.draw(5, temperature=0.1, seed=1)
    assert output.nfe[0] == spent
    rewards = {sample.node: sample.reward for sample in found.finished}
    assert [sample.reward for sample in drawn] == [rewards[sample.node] for sample in drawn]
    (cold,) = found.draw(1, temperature=1e-12)
    assert cold.reward == found.best_reward
    assert np.array_equal(np.array(cold.image), np.array(found.top(1)[0].image))


# Schedulers


def test_a_scheduler_that_cannot_branch_is_replaced_and_named() -> None:
    stock = tiny.make_stock("pndm")
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    with pytest.warns(UserWarning, match="PNDMScheduler") as caught:
        out = search(pipe)
    assert len(caught) == 1
    assert out.search[0].scheduler == "DDIMScheduler"
    assert isinstance(pipe.scheduler, PNDMScheduler)
    assert out.search[0].recipe["scheduler"]["config"]["clip_sample"] is False


def test_a_scheduler_that_is_named_is_used_or_refused(pipe: MCTDPipeline) -> None:
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = search(pipe, search_scheduler=euler)
    assert out.search[0].scheduler == "EulerDiscreteScheduler"
    assert euler.num_inference_steps is None
    pndm = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedSchedulerError, match="PNDMScheduler"):
        search(pipe, search_scheduler=pndm)
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UnsupportedSchedulerError, match=r"FlowMatchEuler.*flow-matching.*betas"):
        search(pipe, search_scheduler=flow)
    with pytest.raises(ConfigError, match="'ddim'"):
        scheduler_of("ddim", pipe.scheduler)


# What cannot work


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ({"search": "beem"}, "'beam'"),
        ({"compute": 0}, "compute=0"),
        ({"compute": 2, "nfe_budget": 12}, "compute=2 and nfe_budget=12"),
        ({"compute": None, "nfe_budget": -3}, "nfe_budget=-3"),
        ({"compute": None, "cost_budget": float("nan")}, "cost_budget=nan"),
        ({"time_budget_s": 0}, "time_budget_s=0"),
        ({"rows_per_call": 0}, "rows_per_call=0"),
        ({"wave_size": 0, "search": "best_of_n"}, "wave_size"),
        ({"strides": (1, 2), "search": "beam"}, "strides is no setting"),
        ({"height": 13, "width": 16}, "13 and 16"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"negative_prompt": ["a", "b"]}, "prompt is a str and negative_prompt a list"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "2 prompts and negative_prompt has 1"),
        ({"prompt": []}, r"prompt=\[\]"),
        ({"prompt": None}, "prompt"),
        ({"eta": 2.0}, "eta"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 images"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"\(2, 4, 8, 8\), expected \(1, 4, 8, 8\)"),
        ({"reward_prompt": ["a", "b"]}, "1 prompts and 2 reward prompts"),
        ({"timesteps": [3, 1], "sigmas": [1.0]}, "timesteps and sigmas"),
        ({"timesteps": [900, 500, 100]}, "timestep schedules"),
        ({"callback_on_step_end": 3}, "callback_on_step_end=3 is a int: give a function"),
        ({"serach": "beam"}, "did you mean 'search'"),
        ({"reward_model": "clop"}, "clop"),
    ],
    ids=lambda part: "-".join(part) if isinstance(part, dict) else "",
)
def test_what_cannot_work_is_refused_before_the_network_is_called(
    pipe: MCTDPipeline, call: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was called")

    monkeypatch.setattr(pipe.unet, "forward", refuse)
    with pytest.raises(ConfigError, match=complaint):
        search(pipe, **{"prompt": "a red cat", **call})


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ({"compute": 0.5}, "3 NFE"),
        ({"compute": 0.1}, "compute=0.1"),
        ({"compute": 1, "include_plain": True}, "6 . "),
        ({"compute": None, "cost_budget": 1.0}, "row-equivalents"),
    ],
    ids=["half", "none", "plain", "cost"],
)
def test_a_budget_too_small_for_one_sample_is_refused(
    pipe: MCTDPipeline, call: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BudgetError, match=complaint):
        search(pipe, search="beam", **call)


def test_without_a_reward_the_error_is_the_line_to_paste(stock: Any) -> None:
    bare = MCTDPipeline.from_pipe(stock)
    with pytest.raises(ConfigError, match="reward_model = ") as caught:
        search(bare)
    line = next(line for line in str(caught.value).splitlines() if "lambda" in line)
    exec(line.strip(), {"pipe": bare})
    assert search(bare).rewards


def test_no_search_takes_no_search_arguments(pipe: MCTDPipeline) -> None:
    with pytest.raises(ConfigError, match="compute, rows_per_call"):
        pipe("a cat", search=None, compute=2, rows_per_call=1)


# What goes wrong on the way


@pytest.mark.parametrize(
    ("failure", "error"),
    [(RuntimeError("out of cheese"), RewardError), (float("nan"), NonFiniteRewardError)],
    ids=["raises", "nan"],
)
def test_a_failing_reward_keeps_the_ledger_and_the_best_sample(
    pipe: MCTDPipeline, failure: Any, error: type[RewardError]
) -> None:
    with pytest.raises(error) as caught:
        search(
            pipe,
            search="best_of_n",
            wave_size=1,
            rows_per_call=1,
            compute=4,
            reward_model=FailingReward(2, failure),
        )
    partial = caught.value.partial
    assert isinstance(partial.images[0], Image.Image)
    assert partial.rewards[0] == max(s.reward for s in partial.search[0].finished)
    assert len(partial.search[0].finished) == 2
    assert partial.ledger.total.nfe == 3 * STEPS
    assert partial.search[0].stop_reason == "error"


def test_a_reward_that_fails_at_once_leaves_a_partial_without_pictures(
    pipe: MCTDPipeline,
) -> None:
    with pytest.raises(RewardError) as caught:
        search(pipe, search="best_of_n", reward_model=FailingReward(0, RuntimeError("no")))
    assert caught.value.partial.images == [None]
    assert caught.value.partial.rewards == [None]


@pytest.mark.parametrize("include_plain", [False, True])
def test_interrupting_hands_back_what_is_finished(pipe: MCTDPipeline, include_plain: bool) -> None:
    out = search(
        pipe,
        ["a cat", "a dog"],
        search="best_of_n",
        wave_size=1,
        rows_per_call=1,
        compute=4,
        include_plain=include_plain,
        reward_model=FailingReward(3, KeyboardInterrupt()),
    )
    assert {found.stop_reason for found in out.search} == {"interrupted"}
    assert [len(found.finished) for found in out.search] == [1, 1]
    assert all(isinstance(image, Image.Image) for image in out.images)


def test_interrupting_before_anything_is_finished_interrupts(pipe: MCTDPipeline) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(pipe, reward_model=FailingReward(0, KeyboardInterrupt()))


def test_an_image_that_had_no_time_to_finish_is_none(pipe: MCTDPipeline) -> None:
    class Uneven:
        """The second image begins a wave later, when the first already waits for its rewards."""

        name = "uneven"

        def least_evaluations(self, num_steps: int) -> int:
            return num_steps

        def search(self, problem: Problem) -> Asks:
            if problem.index == 1:
                yield from denoise(problem, (yield from draw(problem, 1)))
            yield from BestOfN(n=2 - problem.index).search(problem)

    out = search(
        pipe,
        ["a cat", "a dog"],
        search=Uneven(),
        compute=2,
        rows_per_call=1,
        reward_model=FailingReward(2, KeyboardInterrupt()),
        output_type="pt",
    )
    assert out.images[0].shape == (3, 16, 16)
    assert out.images[1] is None
    assert out.rewards[1] is None
    with pytest.raises(ConfigError, match="interrupted"):
        _ = out.search[1].recipe


# Progress, estimates


def test_the_progress_bar_counts_nfe(stock: Any, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    pipe.set_progress_bar_config(disable=False)
    search(pipe, search="best_of_n", compute=2)
    shown = capfd.readouterr().err
    assert f"{2 * STEPS}/{2 * STEPS}" in shown
    assert "best_reward=" in shown


def test_an_estimate_bounds_the_call(pipe: MCTDPipeline) -> None:
    generator = seeded()
    state = generator.get_state()
    call = {"num_inference_steps": STEPS, "search": "beam", "compute": 3, "generator": generator}
    estimate = pipe.estimate(["a cat", "a dog"], **call)
    assert torch.equal(generator.get_state(), state)
    out = pipe(["a cat", "a dog"], **call)
    assert estimate.nfe == 2 * 3 * STEPS >= out.ledger.total.nfe
    assert estimate.seconds > 0
    assert estimate.peak_memory_bytes > 0
    assert estimate.prices.decode > 0
    with pytest.raises(ConfigError, match="search=None"):
        pipe.estimate("a cat", search=None)

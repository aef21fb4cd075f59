"""Searching a latent diffusion model: against the stock pipeline, and against itself."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.denoising.latents import Sample
from mctd_diffusers.denoising.prices import measure_prices
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import (
    CapacityError,
    ConfigError,
    NonFiniteRewardError,
    ScheduleError,
    SearchError,
)
from mctd_diffusers.search.environment import (
    FIRST_DRAW,
    Action,
    Counts,
    Environment,
    Handles,
    Prices,
)
from tests.schedulers import make_scheduler, noise
from tests.tiny_models import GuidedUNet, PlainUNet

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SCALE = 3.0
NUM_STEPS = 8
NAMES = ["ddim", "ddpm", "euler", "euler-a", "dpm++", "sde-dpm++"]
TWO_CALLS = ["heun", "heun-karras", "kdpm2"]
FIRST = noise(3, 4, 8, 8, seed=3)


class Brightness:
    """A reward that notes the sizes of its calls, and fails where it is told to."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.prompts: list[str] = []
        self.poisoned: int | None = None

    def __call__(
        self, images: Tensor, prompts: Sequence[str], handles: Sequence[int]
    ) -> npt.NDArray[np.float64]:
        assert len(images) == len(prompts) == len(handles)
        assert not images.requires_grad
        self.sizes.append(len(images))
        self.prompts += prompts
        if self.poisoned in handles:
            raise NonFiniteRewardError("not finite", handles=[self.poisoned])
        return images.double().mean((1, 2, 3)).numpy()


class World:
    """An environment, with what it is made of at hand."""

    def __init__(
        self,
        unet: Any,
        vae: Any,
        name: str = "ddim",
        rows_per_call: int = 4,
        has_preview: bool = False,
        scale: float = SCALE,
        **extra: Any,
    ) -> None:
        self.embeds, self.negative = noise(3, 5, 16, seed=1), noise(3, 5, 16, seed=2)
        self.network = GuidedUNet(unet, self.embeds, self.negative, scale)
        self.decoded: list[int] = []
        self.previewed: list[int] = []
        self.reward = Brightness()
        self.stepper = Stepper(make_scheduler(name, NUM_STEPS))

        def decode(latents: Tensor) -> Tensor:
            self.decoded.append(len(latents))
            images = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
            return (images * 0.5 + 0.5).clamp(0, 1)

        def preview(latents: Tensor) -> Tensor:
            self.previewed.append(len(latents))
            return latents[:, :3].sigmoid()

        self.decode = decode
        self.environment = LatentEnvironment(
            network=self.network,
            stepper=self.stepper,
            decoder=decode,
            preview=preview if has_preview else None,
            reward=self.reward,
            prompts=["a", "b", "c"],
            first_latents=FIRST * self.stepper.init_noise_sigma,
            rows_per_call=rows_per_call,
            **extra,
        )

    def start(self, *problems: int) -> Handles:
        return self.environment.reset(array(*problems), array(*[FIRST_DRAW] * len(problems)))


def array(*numbers: int) -> Handles:
    return np.array(numbers, dtype=np.int64)


def advance(
    environment: Environment,
    handles: Handles,
    strides: Sequence[int],
    eta: float | None = None,
    seed: int = 0,
) -> Handles:
    """Step samples by `strides`; edge `i` has seed `seed + i`, for each sample."""
    for i, stride in enumerate(strides):
        environment.denoise(handles)
        actions = [Action(stride, eta)] * len(handles)
        children = environment.step(handles, actions, array(*[seed + i] * len(handles)))
        environment.release(handles)
        handles = children
    return handles


# Against the stock pipeline


@pytest.mark.parametrize("name", ["ddim", "euler", "euler-karras", "dpm++", *TWO_CALLS])
def test_a_chain_of_single_steps_is_the_stock_picture_bit_for_bit(
    unet: Any, vae: Any, name: str
) -> None:
    world = World(unet, vae, name, rows_per_call=1)
    environment = world.environment
    pipe = StableDiffusionPipeline(
        vae, None, None, unet, make_scheduler(name), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt_embeds": world.embeds[:1],
        "negative_prompt_embeds": world.negative[:1],
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": SCALE,
        "height": 16,
        "width": 16,
        "latents": FIRST[:1],
    }
    latents = pipe(**arguments, output_type="latent").images
    picture = pipe(**arguments, output_type="pt").images

    finished = advance(environment, world.start(0), [1] * NUM_STEPS)
    assert torch.equal(environment.denoised(finished), latents)
    assert torch.equal(environment.images(finished), picture)
    nfe = 2 * NUM_STEPS - 1 if name in TWO_CALLS else NUM_STEPS
    assert environment.ledger.total == Counts(nfe=nfe, rows=2 * nfe, calls=nfe, decodes=1)


# A sample depends on its own path alone


@pytest.mark.parametrize("eta", [1.0, None])
@pytest.mark.parametrize("name", [*NAMES, "heun", "kdpm2-a", "dpm-sde", "unipc"])
def test_samples_are_the_same_in_any_company(
    unet: Any, vae: Any, name: str, eta: float | None
) -> None:
    paths = [(0, [1, 2, 4, 1]), (1, [2, 2, 2, 2]), (1, [4, 4]), (2, [8]), (0, [2, 4, 2])]
    alone = []
    for seed, (problem, strides) in enumerate(paths):
        world = World(unet, vae, name)
        finished = advance(world.environment, world.start(problem), strides, eta, 100 * seed)
        alone.append((world.environment.denoised(finished), world.environment.reward(finished)))

    world = World(unet, vae, name)
    environment = world.environment
    handles = world.start(*[problem for problem, _ in paths])
    taken = [0] * len(paths)
    while going := [i for i, (_, strides) in enumerate(paths) if taken[i] < len(strides)]:
        environment.denoise(handles[going])
        environment.value(handles[going[:2]])
        handles[going] = environment.step(
            handles[going],
            [Action(paths[i][1][taken[i]], eta) for i in going],
            array(*[100 * i + taken[i] for i in going]),
        )
        for i in going:
            taken[i] += 1
    rewards = environment.reward(handles)
    for i, (latents, reward) in enumerate(alone):
        assert torch.equal(environment.denoised(handles[[i]]), latents)
        assert rewards[i] == reward[0]


def test_every_call_holds_the_same_number_of_latents(unet: Any, vae: Any) -> None:
    world = World(unet, vae, has_preview=True)
    environment = world.environment
    handles = world.start(0, 1, 2, 0, 1, 2)
    environment.denoise(handles[:1])
    environment.value(handles[:1])
    environment.denoise(handles)
    environment.value(handles)
    children = environment.step(handles[:3], [Action(8)] * 3, array(1, 2, 3))
    environment.reward(children)
    environment.images(children[:1])
    for sizes in (
        world.network.sizes,
        world.network.combined,
        world.decoded,
        world.previewed,
        world.reward.sizes,
    ):
        assert set(sizes) == {4}


def test_work_is_metered_by_problem_and_phase(unet: Any, vae: Any) -> None:
    world = World(unet, vae, has_preview=True, prices=Prices(3.0, 0.5, 2.0))
    environment = world.environment
    handles = world.start(0, 1, 1, 2, 2)
    environment.denoise(handles)
    environment.denoise(handles)  # again, for nothing
    environment.value(handles[:3])
    environment.value(handles[:3])
    children = environment.step(handles[:2], [Action(8)] * 2, array(1, 2))
    assert environment.step_price(handles[:2], [Action(8)] * 2) == Counts()
    environment.reward(children)
    environment.reward(children)
    ledger = environment.ledger
    assert ledger.by_problem == {
        0: Counts(nfe=1, rows=2, previews=1, decodes=1, reward_calls=2),
        1: Counts(nfe=2, rows=4, previews=2, decodes=1, reward_calls=3),
        2: Counts(nfe=2, rows=4),
    }
    assert ledger.total == Counts(
        nfe=5, rows=10, padded_rows=6, calls=2, decodes=2, previews=3, reward_calls=5
    )
    assert ledger.cost == 10 + 2 * 3 + 3 * 0.5 + 5 * 2
    assert set(ledger.seconds) == {"network", "decode", "preview", "reward", "step"}


def test_without_a_preview_values_cost_full_decodes(unet: Any, vae: Any) -> None:
    world = World(unet, vae)
    handles = world.start(0)
    world.environment.denoise(handles)
    value = world.environment.value(handles)
    assert world.environment.ledger.spent(0) == Counts(nfe=1, rows=2, decodes=1, reward_calls=1)
    assert value.dtype == np.float64
    picture = world.environment.previews(handles)
    assert value[0] == picture.double().mean().item()


def test_values_and_rewards_are_those_of_the_sample_and_its_prompt(unet: Any, vae: Any) -> None:
    world = World(unet, vae)
    environment = world.environment
    finished = advance(environment, world.start(0, 1, 2), [4, 4])
    rewards = environment.reward(finished[[2, 0, 2, 1]])
    assert world.reward.prompts == ["c", "a", "b", "c"]
    means = environment.images(finished).double().mean((1, 2, 3)).numpy()
    assert rewards.tolist() == means[[2, 0, 2, 1]].tolist()


# Solvers of two calls


def test_the_second_call_of_an_edge_is_made_with_its_child(unet: Any, vae: Any) -> None:
    environment = (world := World(unet, vae, "heun")).environment
    handles = world.start(0, 1, 2)
    environment.denoise(handles)
    # Not to the end, and not where noise is added to a step of one call.
    actions = [Action(2), Action(8), Action(2, 0.5)]
    children = environment.step(handles, actions, array(1, 2, 3))
    assert environment.step_price(handles, actions) == Counts(nfe=1, rows=2)
    assert environment.step_price(handles[:1].repeat(3), actions[:1] * 3) == Counts(nfe=3, rows=6)
    before = environment.ledger.total
    assert before == Counts(nfe=3, rows=6, padded_rows=2, calls=1)
    environment.reward(children[1:2])
    environment.denoise(children[[0, 2]])
    environment.denoise(children[[0, 2]])
    each = {index: environment.ledger.spent(index).nfe for index in range(3)}
    assert each == {0: 3, 1: 1, 2: 2}
    spent = environment.ledger.total - before
    assert spent == Counts(nfe=3, rows=6, padded_rows=10, calls=2, decodes=1, reward_calls=1)
    assert set(world.network.sizes) == set(world.network.combined) == {4}


def test_a_midpoint_is_guided_as_its_edge_is(unet: Any, vae: Any) -> None:
    worlds = [World(unet, vae, "heun") for _ in range(3)]
    worlds[0].network.guidance_scale = 1.5
    ends = []
    for world, guidance in zip(worlds, (None, 1.5, None), strict=True):
        handles = world.start(0, 1)
        world.environment.denoise(handles)
        actions = [Action(2, None, guidance), Action(3, None, guidance)]
        children = world.environment.step(handles, actions, array(5, 6))
        ends.append(world.environment.latents(children))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("name", ["heun", "kdpm2-a", "dpm-sde"])
def test_exporting_calls_no_network_and_leaves_samples_midway(
    unet: Any, vae: Any, name: str, tmp_path: Path
) -> None:
    environment = (world := World(unet, vae, name)).environment
    handles = world.start(0, 1)
    environment.denoise(handles)
    children = environment.step(handles, [Action(3, None, 1.5), Action(2)], array(5, 6))
    before = environment.ledger.total
    torch.save(environment.export(children), tmp_path / "samples.pt")
    assert environment.ledger.total == before
    environment.release(handles)

    other = World(unet, vae, name).environment
    restored = other.restore(torch.load(tmp_path / "samples.pt", weights_only=True))
    torch.save(other.export(restored), tmp_path / "again.pt")
    again = other.restore(torch.load(tmp_path / "again.pt", weights_only=True))
    for handle in (restored, again):
        other.denoise(handle)
    environment.denoise(children)
    assert (environment.ledger.total - before).nfe == 4
    assert other.ledger.total.nfe == 8
    for handle in (restored, again):
        assert torch.equal(other.latents(handle), environment.latents(children))
        assert torch.equal(other.denoised(handle), environment.denoised(children))


def test_a_call_that_fails_after_the_midpoints_is_made_again_whole(unet: Any, vae: Any) -> None:
    worlds = [World(unet, vae, "heun", rows_per_call=2) for _ in range(2)]
    ends = []
    for world, fails in zip(worlds, (False, True), strict=True):
        environment = world.environment
        handles = world.start(0, 1)
        environment.denoise(handles)
        children = environment.step(handles, [Action(2)] * 2, array(1, 2))
        if fails:
            world.network.calls_left = 1
            with pytest.raises(KeyboardInterrupt):
                environment.denoise(children)
            world.network.calls_left = 99
        before = environment.ledger.total.nfe
        environment.denoise(children)
        assert environment.ledger.total.nfe - before == 4
        ends.append(environment.denoised(children))
    assert torch.equal(*ends)


# Noise


def test_initial_noise_is_the_problems_own_or_a_seeds(unet: Any, vae: Any) -> None:
    world = World(unet, vae, "euler")
    environment = world.environment
    seeds = array(FIRST_DRAW, 7, 7, 8)
    handles = environment.reset(array(1, 1, 2, 1), seeds)
    own, seven, again, eight = (sample["latents"] for sample in environment.export(handles))
    sigma = world.stepper.init_noise_sigma
    assert torch.equal(own, FIRST[1] * sigma)
    assert torch.equal(seven, noise(1, 4, 8, 8, seed=7)[0] * sigma)
    assert torch.equal(seven, again)
    assert not torch.equal(seven, eight)
    assert environment.ledger.total == Counts()


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++"])
def test_finished_and_unfinished_samples_go_back_up_the_schedule(
    unet: Any, vae: Any, name: str
) -> None:
    world = World(unet, vae, name)
    environment = world.environment
    start = world.start(0)
    environment.denoise(start)
    finished = environment.step(start, [Action(8)], array(0))
    again = environment.renoise(np.concatenate([start, finished]), 3, array(5, 5))
    environment.release(np.concatenate([start, finished]))
    saved = environment.export(again)
    # A single step to the end lands on the denoised estimate.
    torch.testing.assert_close(saved[0]["latents"], saved[1]["latents"], rtol=1e-4, atol=1e-4)
    assert [sample["history"] for sample in saved] == [[], []]
    environment.reward(advance(environment, again, [1, 4]))


def latents_of(environment: LatentEnvironment, handles: Handles) -> Tensor:
    """Samples, made where they were lazy."""
    return torch.stack([sample["latents"] for sample in environment.export(handles)])


@pytest.mark.parametrize("name", NAMES)
def test_a_perturbation_of_strength_0_or_1_is_the_sample_or_a_fresh_one(
    unet: Any, vae: Any, name: str
) -> None:
    environment = (world := World(unet, vae, name)).environment
    start = world.start(0, 1)
    environment.denoise(start)
    for old, fresh in (
        (start, environment.reset(array(0, 1), array(8, 9))),
        *(
            (
                environment.step(start, [Action(3, eta)] * 2, array(1, 2)),
                environment.step(start, [Action(3, eta)] * 2, array(8, 9)),
            )
            for eta in (0.6, 1.0)
        ),
        (environment.renoise(start, 2, array(1, 2)), environment.renoise(start, 2, array(8, 9))),
    ):
        same = environment.perturb(old, np.zeros(2), array(8, 9))
        other = environment.perturb(old, np.ones(2), array(8, 9))
        assert torch.equal(latents_of(environment, same), latents_of(environment, old))
        expected = latents_of(environment, fresh)
        scale = float(expected.std())
        torch.testing.assert_close(
            latents_of(environment, other) / scale, expected / scale, rtol=0, atol=1e-5
        )
        if old is start:
            assert torch.equal(latents_of(environment, other), expected)
    assert environment.ledger.total.nfe == 2


@pytest.mark.parametrize("name", ["ddim", "sde-dpm++"])
@pytest.mark.parametrize("how", ["evaluated", "released", "saved", "alone"])
def test_a_perturbation_is_decided_by_its_path_alone(
    unet: Any, vae: Any, name: str, how: str
) -> None:
    ends = []
    for varied in (False, True):
        environment = (world := World(unet, vae, name)).environment
        parents = advance(environment, world.start(0, 1), [1])
        environment.denoise(parents)
        old = environment.step(parents, [Action(2, 1.0)] * 2, array(3, 4))
        if varied and how == "evaluated":
            environment.denoise(old)
        elif varied and how == "saved":
            world = World(unet, vae, name)
            old = world.environment.restore(environment.export(old))
            environment = world.environment
        once = environment.perturb(old, np.array([0.3, 0.8]), array(5, 6))
        twice = environment.perturb(once, np.array([0.5, 0.1]), array(7, 8))
        if varied and how == "released":
            environment.release(np.concatenate([old, once]))
        elif varied and how == "alone":
            environment.denoise(twice[1:])
        ends.append(latents_of(environment, advance(environment, twice, [2, 3], 0.5)))
    assert torch.equal(*ends)


def test_a_long_chain_of_perturbations_waits_in_one_piece(unet: Any, vae: Any) -> None:
    environment = (world := World(unet, vae)).environment
    handles = world.start(0)
    for seed in range(2000):  # deeper than Python calls may nest
        handles = environment.perturb(handles, np.array([0.1]), array(seed))
    x = latents_of(environment, handles)
    assert float(x.std()) == pytest.approx(1, abs=0.2)
    assert environment.ledger.total == Counts()


def test_perturbed_noise_is_mixed_as_it_was_drawn(unet: Any, vae: Any) -> None:
    environment = (world := World(unet, vae)).environment
    start = world.start(0)
    environment.denoise(start)
    plain = environment.step(start, [Action(2, 0.0)], array(1))
    old = environment.step(start, [Action(2, 1.0)], array(1))
    varied = environment.perturb(old, np.array([0.6]), array(2))
    varied = environment.perturb(varied, np.array([0.8]), array(3))
    std = world.stepper.noise_std(world.stepper.initial_state(), Action(2, 1.0))
    one, two, three = (noise(1, 4, 8, 8, seed=seed) for seed in (1, 2, 3))
    mixed = 0.6 * (0.8 * one + 0.6 * two) + 0.8 * three
    change = latents_of(environment, varied) - latents_of(environment, old)
    torch.testing.assert_close(change, std * (mixed - one), rtol=0, atol=1e-5)
    assert std > 0
    assert world.stepper.noise_std(world.stepper.initial_state(), Action(2, 0.0)) == 0
    with pytest.raises(SearchError, match=r"without noise; step with eta above 0"):
        environment.perturb(plain, np.array([0.5]), array(1))


@pytest.mark.parametrize("name", ["dpm-sde", "sasolver"])
def test_noise_that_is_not_simply_added_cannot_be_perturbed(unet: Any, vae: Any, name: str) -> None:
    environment = (world := World(unet, vae, name)).environment
    start = advance(environment, world.start(0), [2])
    environment.denoise(start)
    mixed = environment.step(start, [Action(3)], array(1))
    environment.denoise(mixed)
    with pytest.raises(SearchError, match=r"not simply added .* above 0 and below 1, or") as error:
        environment.perturb(mixed, np.array([0.5]), array(1))
    assert error.value.handles == tuple(mixed.tolist())
    added = environment.step(start, [Action(3, 0.5)], array(1))
    environment.denoise(environment.perturb(added, np.array([0.5]), array(2)))


def test_an_edge_is_crossed_whole_before_its_noise_is_perturbed(unet: Any, vae: Any) -> None:
    environment = (world := World(unet, vae, "kdpm2-a")).environment
    start = world.start(0)
    environment.denoise(start)
    old = environment.step(start, [Action(3)], array(1))
    fresh = environment.step(start, [Action(3)], array(2))
    for _ in range(2):  # before it is exported, and midway
        with pytest.raises(SearchError, match=r"the second is not made yet; denoise it first"):
            environment.perturb(old, np.array([0.5]), array(2))
        environment.export(old)
    environment.denoise(old)
    varied = environment.perturb(old.repeat(2), np.array([0.0, 1.0]), array(2, 2))
    before = environment.ledger.total
    same, other = environment.latents(varied)
    assert environment.ledger.total == before
    assert torch.equal(same, environment.latents(old)[0])
    torch.testing.assert_close(other, environment.latents(fresh)[0], rtol=1e-5, atol=1e-5)


# Guidance of an edge


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_an_edge_of_another_guidance_is_that_of_a_call_with_it(
    unet: Any, vae: Any, name: str
) -> None:
    worlds = [World(unet, vae, name) for _ in range(3)]
    worlds[0].network.guidance_scale = 1.5
    given: tuple[float | None, ...] = (None, 1.5, None)
    ends = []
    for world, guidance in zip(worlds, given, strict=True):
        environment = world.environment
        handles = world.start(0, 1)
        for stride in (2, 2, 4):  # a multistep solver remembers what it was guided by
            environment.denoise(handles)
            actions = [Action(stride, 0.5, guidance)] * 2
            handles = environment.step(handles, actions, array(5, 6))
        ends.append(latents_of(environment, handles))
        assert environment.ledger.total.nfe == 6
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_edges_of_any_guidance_ride_in_one_call(unet: Any, vae: Any) -> None:
    guidances = (None, 0.0, 7.5, SCALE, 7.5)
    environment = (world := World(unet, vae)).environment
    start = world.start(0, 1, 2, 0, 1)
    environment.denoise(start)
    actions = [Action(2, 0.5, guidance) for guidance in guidances]
    seeds = array(5, 6, 7, 5, 9)
    children = environment.step(start, actions, seeds)
    before = environment.value(start)
    together = latents_of(environment, children)
    assert set(world.network.combined) == {4}
    assert torch.equal(together[0], together[3])  # the call's own, by its number
    for i in range(5):
        alone = environment.step(start[[i]], actions[i : i + 1], seeds[i : i + 1])
        assert torch.equal(latents_of(environment, alone)[0], together[i])
    assert environment.value(start).tolist() == before.tolist()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), True])
def test_a_guidance_that_is_no_number_is_refused(unet: Any, vae: Any, wrong: float) -> None:
    environment = (world := World(unet, vae)).environment
    start = world.start(0)
    environment.denoise(start)
    with pytest.raises(ConfigError, match=r"a move is .*; give a finite number or None"):
        environment.step(start, [Action(1, None, wrong)], array(0))


def test_guidance_of_an_edge_needs_guidance(unet: Any, vae: Any) -> None:
    world = World(unet, vae)
    assert world.environment.guidance_scale is not None
    environment = LatentEnvironment(
        network=PlainUNet(unet, world.embeds),
        stepper=world.stepper,
        decoder=world.decode,
        reward=world.reward,
        prompts=["a", "b", "c"],
        first_latents=FIRST,
        rows_per_call=4,
    )
    assert environment.guidance_scale is None
    start = environment.reset(array(0), array(1))
    environment.denoise(start)
    with pytest.raises(ConfigError, match=r"is 2\.0, but there is nothing to scale: guidance is o"):
        environment.step(start, [Action(1, None, 2.0)], array(0))
    environment.step(start, [Action(1)], array(0))
    with pytest.raises(ConfigError, match=r"is 2\.0, but there is nothing to scale: guidance is o"):
        environment.value(start, [2.0])


def test_a_value_under_a_guidance_is_that_of_a_call_with_it(unet: Any, vae: Any) -> None:
    worlds = {scale: World(unet, vae, scale=scale) for scale in (3.0, 1.5)}
    starts = {}
    for scale, world in worlds.items():
        starts[scale] = world.start(0, 1)
        world.environment.denoise(starts[scale])
    own = worlds[1.5].environment.value(starts[1.5])
    other = worlds[3.0].environment
    assert np.array_equal(other.value(starts[3.0], [1.5, 1.5]), own)
    assert not np.array_equal(other.value(starts[3.0]), own)
    # Each is kept under its guidance, and asked again costs nothing.
    spent = other.ledger.total
    mixed = other.value(starts[3.0], [1.5, None])
    assert mixed.tolist() == [own[0], other.value(starts[3.0])[1]]
    assert other.ledger.total == spent


# What is kept


def test_a_child_that_nobody_evaluates_holds_no_tensor(unet: Any, vae: Any) -> None:
    world = World(unet, vae)
    environment = world.environment
    handles = world.start(0)
    environment.denoise(handles)
    environment.step(np.repeat(handles, 50), [Action(1, 1.0)] * 50, np.arange(50))
    held = [sample.latents for sample in environment._samples._samples.values()]
    assert sum(latents is not None for latents in held) == 1


def test_released_parents_live_as_long_as_their_lazy_children(unet: Any, vae: Any) -> None:
    worlds = [World(unet, vae, "dpm++") for _ in range(2)]
    results = []
    for world, releases in zip(worlds, (False, True), strict=True):
        environment = world.environment
        handles = advance(environment, world.start(0), [2])
        environment.denoise(handles)
        (parent,) = environment._samples[handles]
        remains = weakref.ref(parent)
        del parent
        children = environment.step(handles, [Action(2, 0.5)], array(3))
        if releases:
            environment.release(handles)
        assert remains() is not None
        environment.denoise(children)
        assert (remains() is None) == releases
        results.append(environment.denoised(children))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "heun", "kdpm2-a", "dpm-sde", "unipc"])
def test_saved_samples_go_on_where_they_were(
    unet: Any, vae: Any, name: str, tmp_path: Path
) -> None:
    world = World(unet, vae, name)
    environment = world.environment
    handles = advance(environment, world.start(0, 1), [2, 1])
    environment.denoise(handles[:1])
    values = environment.value(handles[:1])
    finished = environment.step(handles[:1], [Action(5)], array(1))
    rewards = environment.reward(finished)
    every = np.concatenate([handles, finished])
    torch.save(environment.export(every), tmp_path / "samples.pt")

    other = World(unet, vae, name)
    restored = other.environment.restore(torch.load(tmp_path / "samples.pt", weights_only=True))
    assert other.environment.value(restored[:1]) == values
    assert other.environment.reward(restored[2:]) == rewards
    assert other.environment.ledger.total == Counts()
    both = [
        advance(w.environment, h[:2], [1, 4], 0.7) for w, h in ((world, every), (other, restored))
    ]
    assert torch.equal(world.environment.denoised(both[0]), other.environment.denoised(both[1]))


def test_samples_wait_where_and_in_the_precision_they_are_told_to(unet: Any, vae: Any) -> None:
    """Half precision stands for another device: it marks what waits, and what is computed with."""
    world = World(unet, vae, "dpm++", storage="cpu", half=True)
    environment = world.environment
    computed = []

    def note(module: Any, args: Any, output: Any) -> None:
        computed.append(args[0].dtype)

    with unet.register_forward_hook(note):
        handles = world.start(0, 1)
        last = advance(environment, handles, [2, 1, 1], 0.5)
        environment.denoise(last)
        environment.denoise(environment.perturb(last, np.full(2, 0.5), array(7, 8)))
        environment.denoise(environment.renoise(last, 2, array(7, 8)))
        finished = advance(environment, last, [4])
    environment.reward(finished)
    assert set(computed) == {torch.float32}
    samples = environment._samples._samples.values()
    assert any(sample.state is not None and sample.state.history for sample in samples)
    waiting = [tensor for sample in samples for tensor in tensors_of(sample)]
    assert {(tensor.dtype, tensor.device.type) for tensor in waiting} == {(torch.float16, "cpu")}
    assert environment.denoised(finished).dtype == torch.float32


def tensors_of(sample: Sample) -> list[Tensor]:
    outputs = () if sample.outputs is None else sample.outputs
    history = () if sample.state is None else sample.state.history
    tensors = [sample.latents, *outputs, *history]
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("name", ["ddim", "dpm++", "heun"])
def test_what_waits_in_half_depends_on_its_own_path_alone(unet: Any, vae: Any, name: str) -> None:
    together, alone = (World(unet, vae, name, half=True).environment for _ in range(2))
    problems = array(0, 1, 2)
    seeds = np.full(3, FIRST_DRAW)
    every = advance(together, together.reset(problems, seeds), [3, 1, 4])
    for problem in range(3):
        one = advance(alone, alone.reset(problems[[problem]], seeds[:1]), [3, 1, 4])
        assert torch.equal(alone.denoised(one)[0], together.denoised(every)[problem])
        assert alone.reward(one)[0] == together.reward(every)[problem]


# Refusals


def test_what_cannot_be_asked_is_refused_with_the_handles(unet: Any, vae: Any) -> None:
    world = World(unet, vae)
    environment = world.environment
    first, second = world.start(0), world.start(1)
    environment.denoise(first)
    finished = environment.step(first, [Action(8)], array(0))
    both = np.concatenate([first, second])
    for refused, blamed, match in (
        (lambda: environment.step(both, [Action(1)] * 2, array(1, 2)), second, "not evaluated"),
        (lambda: environment.value(both), second, "not evaluated"),
        (lambda: environment.previews(both), second, "not evaluated"),
        (lambda: environment.value(finished), finished, "is finished"),
        (lambda: environment.step(finished, [Action(1)], array(1)), finished, "is finished"),
        (lambda: environment.denoised(both), second, "neither evaluated nor finished"),
        (lambda: environment.renoise(both, 0, array(1, 2)), second, "neither evaluated nor"),
        (lambda: environment.reward(first), first, "not finished"),
        (lambda: environment.images(first), first, "not finished"),
        (lambda: environment.denoise(finished), finished, "is finished"),
        (
            lambda: environment.perturb(finished, np.array([0.5]), array(1)),
            finished,
            "is finished; perturb it before its last edge",
        ),
    ):
        with pytest.raises(SearchError, match=match) as error:
            refused()
        assert error.value.handles == tuple(blamed.tolist())


def test_strides_and_levels_beyond_the_schedule_are_refused(unet: Any, vae: Any) -> None:
    environment = (world := World(unet, vae)).environment
    handles = world.start(0)
    environment.denoise(handles)
    with pytest.raises(ScheduleError, match="stride is 9"):
        environment.step(handles, [Action(9)], array(0))
    with pytest.raises(ScheduleError, match="step index is 8"):
        environment.renoise(handles, 8, array(0))
    assert world.start(0) == [1]  # no handle was given away


def test_released_handles_are_refused_everywhere(unet: Any, vae: Any) -> None:
    environment = (world := World(unet, vae)).environment
    handles = world.start(0)
    environment.release(handles)
    for refused in (
        environment.denoise,
        environment.value,
        environment.reward,
        environment.images,
        environment.export,
        environment.release,
    ):
        with pytest.raises(CapacityError, match="handle 0:"):
            refused(handles)


def test_an_error_of_the_reward_names_its_handles_and_changes_no_sample(
    unet: Any, vae: Any
) -> None:
    world = World(unet, vae)
    environment = world.environment
    finished = advance(environment, world.start(0, 1, 2, 0, 1), [8])
    world.reward.poisoned = int(finished[4])
    with pytest.raises(NonFiniteRewardError) as error:
        environment.reward(finished)
    assert error.value.handles == (finished[4],)
    assert all(sample["reward"] is None for sample in environment.export(finished))
    environment.reward(finished[:4])
    assert len(world.reward.sizes) == 3


def test_prompts_and_first_latents_must_agree(unet: Any, vae: Any) -> None:
    world = World(unet, vae)
    with pytest.raises(ConfigError, match="1 prompts but 3 first latents"):
        LatentEnvironment(
            network=world.network,
            stepper=world.stepper,
            decoder=world.decode,
            reward=world.reward,
            prompts=["a"],
            first_latents=FIRST,
            rows_per_call=1,
        )


# Prices


def test_prices_are_measured_on_calls_of_the_searchs_own_size(unet: Any, vae: Any) -> None:
    world = World(unet, vae)
    prices = measure_prices(
        network=world.network,
        stepper=world.stepper,
        decoder=world.decode,
        reward=world.reward,
        prompt="a",
        latents=FIRST[:1],
        rows_per_call=4,
        repeats=1,
    )
    assert set(world.network.sizes) == set(world.decoded) == set(world.reward.sizes) == {4}
    assert prices.decode > 0
    assert prices.preview > 0
    assert prices.reward_call > 0
    assert world.environment.ledger.total == Counts()

"""Network calls of one fixed size, their meters, and the feature tap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mctd_diffusers.denoising.denoiser import Calls, Chunk, Denoiser, FeatureTap, chunks
from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import Counts, Ledger
from tests.pipelines import tiny_flux
from tests.schedulers import make_scheduler, noise
from tests.tiny_models import GuidedUNet, PlainUNet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EMBEDS, NEGATIVE = noise(3, 5, 16, seed=1), noise(3, 5, 16, seed=2)
INDICES, PROBLEMS = [0, 3, 3, 1, 7, 2, 0], [0, 1, 2, 0, 1, 2, 2]


def states(denoiser: Denoiser, indices: Sequence[int]) -> list[SolverState]:
    """Where samples stand that begin at step indices."""
    return [denoiser.stepper.initial_state(index) for index in indices]


def make(network: Any, rows_per_call: int, name: str = "ddim", **extra: Any) -> Denoiser:
    stepper = Stepper(make_scheduler(name, 8))
    return Denoiser(
        network,
        stepper,
        rows_per_call=rows_per_call,
        ledger=Ledger(),
        device=torch.device("cpu"),
        **extra,
    )


@given(rows=st.integers(0, 40), rows_per_call=st.integers(1, 12))
def test_chunks_cover_every_row_once_and_are_of_one_size(rows: int, rows_per_call: int) -> None:
    seen = []
    for chunk in chunks(rows, rows_per_call):
        every = range(rows)[chunk.rows]
        assert chunk.useful == len(every)
        assert chunk.pick(range(rows))[: chunk.useful] == list(every)
        assert len(chunk.filled) == rows_per_call
        assert set(chunk.pick(range(rows))) == set(every)
        batch = torch.arange(rows)[chunk.rows, None].float()
        assert chunk.fill(batch).flatten().tolist() == chunk.pick(range(rows))
        seen += every
    assert seen == list(range(rows))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_a_row_depends_neither_on_its_company_nor_on_its_place(unet: Any, name: str) -> None:
    denoiser = make(GuidedUNet(unet, EMBEDS, NEGATIVE, 3.0), 4, name)
    latents = noise(7, 4, 8, 8) * denoiser.stepper.init_noise_sigma
    together = denoiser(latents, states(denoiser, INDICES), PROBLEMS).outputs
    assert together.unconditional is not None
    for order in ([6, 0, 3], [5], [1, 2, 4, 6, 0]):
        other = denoiser(
            latents[order],
            states(denoiser, [INDICES[i] for i in order]),
            [PROBLEMS[i] for i in order],
        )
        assert torch.equal(other.outputs.conditional, together.conditional[order])
        assert other.outputs.unconditional is not None
        assert torch.equal(other.outputs.unconditional, together.unconditional[order])


@torch.no_grad()
def test_one_row_calls_are_the_stock_pipelines_call_bit_for_bit(unet: Any) -> None:
    scheduler = make_scheduler("euler", 8)
    denoiser = make(GuidedUNet(unet, EMBEDS, NEGATIVE, 3.0), 1, "euler")
    latents = noise(7, 4, 8, 8) * scheduler.init_noise_sigma
    ours = denoiser(latents, states(denoiser, INDICES), PROBLEMS).outputs
    for row, (index, problem) in enumerate(zip(INDICES, PROBLEMS, strict=True)):
        timestep = scheduler.timesteps[index]
        scheduler._step_index = index
        inputs = scheduler.scale_model_input(torch.cat([latents[[row]]] * 2), timestep)
        embeds = torch.cat([NEGATIVE[[problem]], EMBEDS[[problem]]])
        without, conditional = unet(inputs, timestep, encoder_hidden_states=embeds).sample.chunk(2)
        assert torch.equal(ours.conditional[[row]], conditional)
        assert ours.unconditional is not None
        assert torch.equal(ours.unconditional[[row]], without)


@torch.no_grad()
def test_useful_and_padded_rows_are_metered_by_problem(unet: Any) -> None:
    network = GuidedUNet(unet, EMBEDS, NEGATIVE, 3.0)
    denoiser = make(network, 4)
    denoiser(noise(7, 4, 8, 8), states(denoiser, INDICES), PROBLEMS)
    ledger = denoiser.ledger
    assert network.sizes == [4, 4]
    assert ledger.total == Counts(nfe=7, rows=14, padded_rows=2, calls=2)
    assert ledger.by_problem == {
        0: Counts(nfe=2, rows=4),
        1: Counts(nfe=2, rows=4),
        2: Counts(nfe=3, rows=6),
    }
    assert ledger.seconds["network"] > 0


@torch.no_grad()
def test_a_call_holds_problems_of_one_kind_alone(unet: Any) -> None:
    network = GuidedUNet(unet, EMBEDS, NEGATIVE, 3.0)
    called: list[list[int]] = []

    class Noting:
        rows_per_latent, guidance_scale, combine = 2, 3.0, network.combine

        def __call__(self, latents: Tensor, timesteps: Tensor, problems: Sequence[int]) -> Outputs:
            called.append(list(problems))
            return network(latents, timesteps, problems)

    tap = FeatureTap(unet, rows_per_latent=2)
    apart = make(Noting(), 2, kinds=["short", "long", "short"], features=tap)
    latents = noise(7, 4, 8, 8)
    ours = apart(latents, states(apart, INDICES), PROBLEMS)
    assert called == [[0, 2], [0, 2], [2, 2], [1, 1]]
    assert apart.ledger.total == Counts(nfe=7, rows=14, padded_rows=2, calls=4)
    together = make(network, 2, features=tap)
    same = together(latents, states(together, INDICES), PROBLEMS)
    assert torch.equal(ours.outputs.conditional, same.outputs.conditional)
    assert ours.outputs.unconditional is not None
    assert same.outputs.unconditional is not None
    assert torch.equal(ours.outputs.unconditional, same.outputs.unconditional)
    assert all(torch.equal(rows, same.features[name]) for name, rows in ours.features.items())


@torch.no_grad()
def test_without_guidance_an_nfe_is_a_row(unet: Any) -> None:
    denoiser = make(PlainUNet(unet, EMBEDS), 4)
    outputs = denoiser(noise(3, 4, 8, 8), states(denoiser, [0, 1, 2]), [0, 1, 2]).outputs
    assert outputs.unconditional is None
    assert torch.equal(denoiser.combine(outputs), outputs.conditional)
    assert denoiser.ledger.total == Counts(nfe=3, rows=3, padded_rows=1, calls=1)


def test_guidance_is_combined_in_chunks_of_the_same_size() -> None:
    network = GuidedUNet(None, EMBEDS, NEGATIVE, 3.0)
    outputs = Outputs(noise(7, 4, 2, 2), noise(7, 4, 2, 2, seed=1))
    ours = make(network, 3).combine(outputs)
    assert network.combined == [3, 3, 3]
    assert torch.equal(ours, network.combine(outputs))


def test_calls_hold_one_latent_at_least() -> None:
    with pytest.raises(ConfigError, match="rows_per_call is 0"):
        make(GuidedUNet(None, EMBEDS, NEGATIVE, 3.0), 0)


# Out of memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


class Room:
    """A call with room for some rows, that notes the rows it was asked for."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.sizes = most, error, list[int]()

    def __call__(self, chunk: Chunk) -> list[int]:
        self.sizes.append(len(chunk.filled))
        if len(chunk.filled) > self.most:
            raise self.error
        return chunk.pick(range(10))[: chunk.useful]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_halves_the_calls_for_good_and_says_so(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, room = Ledger(), Room(3, error)
    calls = Calls(8, ledger, torch.device("cpu"))
    answers = [answer for _, answer in calls.make("network", 10, room)]
    assert answers == [[row, row + 1] for row in range(0, 10, 2)]
    assert room.sizes == [8, 4, 2, 2, 2, 2, 2]
    assert ledger.rows_by_phase == {"network": [2]}
    assert "network ran out of memory in calls of 8 latents" in caplog.text
    room.most = 8
    list(calls.make("network", 3, room))
    assert room.sizes[7:] == [2, 2]
    list(calls.make("decode", 3, room))  # which had room enough
    assert room.sizes[9:] == [8]
    room.most = 1
    list(calls.make("network", 3, room))
    assert ledger.rows_by_phase == {"network": [2, 1], "decode": [8]}
    again = Calls(8, ledger, torch.device("cpu"))
    assert [len(chunk.filled) for chunk, _ in again.make("network", 2, room)] == [1, 1]


def test_what_cannot_be_helped_is_raised() -> None:
    def run(error: Exception, most: int) -> list[int]:
        room = Room(most, error)
        with pytest.raises(type(error)):
            list(Calls(4, Ledger(), torch.device("cpu")).make("network", 4, room))
        return room.sizes

    assert run(OUT_OF_MEMORY[0], 0) == [4, 2, 1]
    assert run(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0) == [4]


def test_rows_of_a_halved_call_are_metered_as_they_were_called(unet: Any) -> None:
    network = GuidedUNet(unet, EMBEDS, NEGATIVE, 3.0)

    class Narrow(GuidedUNet):
        def __call__(self, latents: Tensor, *rest: Any) -> Outputs:
            if len(latents) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(latents, *rest)

    latents = noise(7, 4, 8, 8)
    narrow = make(Narrow(unet, EMBEDS, NEGATIVE, 3.0), 5)
    small = make(network, 2)
    said = [d(latents, states(d, INDICES), PROBLEMS).outputs for d in (narrow, small)]
    assert torch.equal(said[0].conditional, said[1].conditional)
    assert narrow.ledger.total == small.ledger.total == Counts(7, 14, 2, 4)


# The feature tap


@torch.no_grad()
@pytest.mark.parametrize("rows_per_call", [1, 4])
def test_features_are_those_of_the_conditional_rows(unet: Any, rows_per_call: int) -> None:
    latents = noise(6, 4, 8, 8)
    network = GuidedUNet(unet, EMBEDS, NEGATIVE, 3.0)
    denoiser = make(network, rows_per_call, features=FeatureTap(unet, rows_per_latent=2))
    features = denoiser(latents, states(denoiser, INDICES[:6]), PROBLEMS[:6]).features
    plain = make(PlainUNet(unet, EMBEDS), rows_per_call, features=FeatureTap(unet))
    expected = plain(latents, states(plain, INDICES[:6]), PROBLEMS[:6]).features
    shapes = {name: tuple(feature.shape) for name, feature in features.items()}
    assert shapes == {"down.0": (6, 64), "down.1": (6, 128), "mid": (6, 128)}
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(feature[0], feature[1], atol=1e-3)


@torch.no_grad()
def test_features_are_means_and_deviations_over_space(unet: Any) -> None:
    seen = {}
    hook = unet.mid_block.register_forward_hook(lambda m, i, out: seen.update(mid=out))
    with FeatureTap(unet) as tap:
        unet(noise(2, 4, 8, 8), 10, encoder_hidden_states=EMBEDS[:2])
        features = tap.take()
        assert tap.take() == {}
    hook.remove()
    flat = seen["mid"].flatten(2)
    torch.testing.assert_close(features["mid"][:, :64], flat.mean(-1))
    torch.testing.assert_close(features["mid"][:, 64:], flat.std(-1, correction=0))


def test_hooks_are_gone_however_the_tap_closes(unet: Any) -> None:
    blocks = [*unet.down_blocks, unet.mid_block]
    tap = FeatureTap(unet)
    with pytest.raises(TypeError), tap:
        unet()
    assert not any(block._forward_hooks for block in blocks)
    with tap:
        assert all(len(block._forward_hooks) == 1 for block in blocks)
    assert not any(block._forward_hooks for block in blocks)


def test_a_unet_without_a_middle_is_read_without_it(unet: Any) -> None:
    mid_block, unet.mid_block = unet.mid_block, None
    try:
        with FeatureTap(unet) as tap, torch.no_grad():
            unet(noise(1, 4, 8, 8), 10, encoder_hidden_states=EMBEDS[:1])
            assert list(tap.take()) == ["down.0", "down.1"]
    finally:
        unet.mid_block = mid_block


@torch.no_grad()
def test_a_transformer_is_read_by_the_numbers_of_its_blocks() -> None:
    transformer = tiny_flux.make_components()["transformer"]
    image, text = noise(2, 16, 16), noise(2, 5, 64)
    seen: list[Tensor] = []
    last = transformer.single_transformer_blocks[0]
    hook = last.register_forward_hook(lambda block, inputs, output: seen.append(output[1]))
    with FeatureTap(transformer, names=["block.1"]) as tap:
        transformer(
            image,
            encoder_hidden_states=text,
            pooled_projections=noise(2, 32),
            timestep=torch.tensor([0.5, 0.7]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
            guidance=torch.ones(2),
        )
        features = tap.take()
    hook.remove()
    assert list(features) == ["block.1"]
    torch.testing.assert_close(features["block.1"][:, :32], seen[0].mean(1))
    torch.testing.assert_close(features["block.1"][:, 32:], seen[0].std(1, correction=0))


def test_a_tap_on_a_block_that_is_not_there_is_refused(unet: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"no blocks block\.0: name some of down\.0, down\.1, mid"
    ):
        FeatureTap(unet, names=["block.0", "mid"])

"""The store of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mctd_diffusers.denoising.latents import Drawn, Latents, Sample, trim_heap
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.errors import CapacityError


def store() -> Latents:
    return Latents(torch.device("cpu"))


def some(number: int) -> list[Sample]:
    return [Sample(0, 0, Drawn(seed)) for seed in range(number)]


def test_handles_count_up_and_are_never_used_again() -> None:
    latents = store()
    first = latents.add(some(3))
    assert first.dtype == np.int64
    assert first.tolist() == [0, 1, 2]
    latents.release(first[1:])
    assert latents.add(some(2)).tolist() == [3, 4]
    assert latents.add([]).tolist() == []
    assert len(latents) == 3


def test_samples_come_in_the_order_of_the_handles_and_may_be_named_twice() -> None:
    latents, samples = store(), some(3)
    latents.add(samples)
    assert latents[np.array([2, 0, 2])] == [samples[2], samples[0], samples[2]]
    latents.release(np.array([2, 2]))
    assert len(latents) == 2


@pytest.mark.parametrize("handle", [1, 3, -1])
def test_unknown_and_released_handles_are_named(handle: int) -> None:
    latents = store()
    latents.add(some(3))
    latents.release(np.array([1]))
    for ask in (latents.__getitem__, latents.release):
        with pytest.raises(CapacityError, match=f"handle {handle}:") as error:
            ask(np.array([0, handle]))
        assert error.value.handles == (handle,)
    assert len(latents) == 2


def test_kept_rows_do_not_hold_the_memory_of_their_batch() -> None:
    latents = store()
    batch = torch.randn(4, 2, 3)
    rows = latents.keep(batch)
    assert torch.equal(latents.gather(rows), batch)
    assert all(row.untyped_storage().nbytes() == 2 * 3 * 4 for row in rows)


def test_tensors_wait_where_they_are_told_to() -> None:
    latents = Latents(torch.device("meta"), "cpu")
    assert [row.device.type for row in latents.keep(torch.zeros(2, 3))] == ["cpu", "cpu"]
    assert latents.gather([torch.zeros(3)]).device.type == "meta"


def test_single_precision_waits_in_half_and_comes_back_rounded_once() -> None:
    latents = Latents(torch.device("cpu"), half=True)
    batch = torch.randn(4, 2, 3)
    rows = latents.keep(batch)
    assert {row.dtype for row in rows} == {torch.float16}
    rounded = latents.gather(rows)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, batch.half().float())
    assert torch.equal(latents.gather(latents.keep(rounded)), rounded)
    for dtype in (torch.bfloat16, torch.float64):
        assert {row.dtype for row in latents.keep(batch.to(dtype))} == {dtype}


def test_what_a_solver_remembers_waits_with_the_sample() -> None:
    state = SolverState(1, (0,), (torch.randn(2, 3),), ("memory",))
    away = Latents(torch.device("cpu"), "meta", half=True).keep_state(state)
    assert [(row.device.type, row.dtype) for row in away.history] == [("meta", torch.float16)]
    back = Latents(torch.device("meta"), "cpu").fetch_state(state)
    assert [row.device.type for row in back.history] == ["meta"]
    assert (back.step_index, back.visited, back.memory) == (1, (0,), ("memory",))


def test_the_heap_is_trimmed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = []
    monkeypatch.setattr("mctd_diffusers.denoising.latents.trim_heap", lambda: trims.append(1))
    monkeypatch.setattr("mctd_diffusers.denoising.latents._TRIM_AFTER", 100)
    latents = store()
    for _ in range(9):
        latents.keep(torch.zeros(4, 2, 3))  # 96 bytes
    assert len(trims) == 4
    trim_heap()

"""What every family must show, as a class of tests: a subclass says how its pipelines are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import read_recipe
from mctd_diffusers.saved_calls import CallSaver
from mctd_diffusers.search.tree import to_json
from tests.pipelines import tiny

STEPS = 6
COMPUTE = 4
PROMPTS = ["a red cat", "two dogs", "a blue hat"]
SEARCHES = [
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("best_of_n", "beam", "dts", "evolution")
    ),
    "mctd",
]


class StoppedError(Exception):
    """The process is gone."""


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@contextmanager
def counted_rows(denoiser: Any) -> Iterator[Callable[[], list[int]]]:
    """Notes the rows of each call of a denoiser."""
    sizes: list[int] = []

    def note(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        sizes.append(len(inputs[0] if inputs else named["hidden_states"]))

    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lambda: sizes
    finally:
        hook.remove()


class FamilyTests:
    """A subclass is a family as it is called in some way.

    Attributes:
        call: stock arguments of every call.
        rows_per_latent: rows through the network of one NFE.
        calls_per_chunk: calls of the denoiser for one chunk of them.
        steps: of the schedule.
    """

    call: ClassVar[dict[str, Any]] = {}
    rows_per_latent: ClassVar[int] = 1
    calls_per_chunk: ClassVar[int] = 1
    steps: ClassVar[int] = STEPS

    @classmethod
    def make_stock(cls) -> DiffusionPipeline:
        """The stock pipeline over tiny random components; the same weights each time."""
        raise NotImplementedError  # each family makes its own

    @classmethod
    def make_pipe(cls, **parts: Any) -> MCTDPipeline:
        """Ours, as another process would load it."""
        return MCTDPipeline.from_pipe(cls.make_stock(), **{"reward_model": tiny.redness, **parts})

    @classmethod
    def run(cls, pipe: Any, prompt: Any = PROMPTS[0], *seeds: int, **call: Any) -> Any:
        """One call; of several prompts with a generator each."""
        given = {"num_inference_steps": cls.steps, "output_type": "pt", **cls.call, **call}
        if isinstance(prompt, list) and isinstance(given.get("negative_prompt"), str):
            given["negative_prompt"] = [given["negative_prompt"]] * len(prompt)
        generators = seeded(*seeds) if seeds else seeded(0)[0]
        return pipe(prompt=prompt, generator=generators, **given)

    @pytest.fixture(scope="class")
    @classmethod
    def stock(cls) -> Any:
        return cls.make_stock()

    @pytest.fixture(scope="class")
    @classmethod
    def pipe(cls, stock: Any) -> MCTDPipeline:
        return MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)

    @pytest.fixture(scope="class", params=SEARCHES)
    @classmethod
    def searched(cls, pipe: Any, request: pytest.FixtureRequest) -> tuple[str, Any, list[int]]:
        """A search of three prompts: its name, its output, and the rows of the denoiser's calls."""
        call = {"search": request.param, "compute": COMPUTE, "rows_per_call": 4}
        with counted_rows(pipe.components[cls.denoiser_of(pipe)]) as rows:
            return request.param, cls.run(pipe, PROMPTS, 3, 4, 5, **call), rows()

    @classmethod
    def denoiser_of(cls, pipe: Any) -> str:
        return "unet" if "unet" in pipe.components else "transformer"

    # The stock pipeline

    def test_it_is_both_a_search_and_the_stock_pipeline(self, stock: Any, pipe: Any) -> None:
        assert isinstance(pipe, MCTDPipeline)
        assert isinstance(pipe, type(stock))
        assert all(pipe.components[name] is part for name, part in stock.components.items())

    def test_no_search_is_the_stock_pipeline(self, stock: Any, pipe: Any) -> None:
        theirs = self.run(stock, num_images_per_prompt=2)
        ours = self.run(pipe, num_images_per_prompt=2, search=None)
        assert torch.equal(ours.images, theirs.images)
        assert ours.nfe == [self.steps] * 2
        assert pipe.scheduler is stock.scheduler
        theirs = self.run(stock, return_dict=False)
        ours = self.run(pipe, return_dict=False, search=None)
        assert len(ours) == len(theirs)
        assert torch.equal(ours[0], theirs[0])

    @pytest.mark.parametrize("output_type", ["pt", "latent"])
    def test_best_of_one_is_the_stock_picture(
        self, stock: Any, pipe: Any, output_type: str
    ) -> None:
        theirs = self.run(stock, output_type=output_type)
        call = {"search": "best_of_n", "compute": 1, "rows_per_call": 1}
        ours = self.run(pipe, output_type=output_type, **call)
        assert torch.equal(ours.images, theirs.images)
        assert ours.nfe == [self.steps]

    @pytest.mark.slow
    def test_best_of_one_in_half_precision_is_the_stock_picture(self) -> None:
        stock = self.make_stock().to(torch.bfloat16)
        pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
        theirs = self.run(stock)
        ours = self.run(pipe, search="best_of_n", compute=1, rows_per_call=1)
        assert torch.equal(ours.images, theirs.images)
        assert self.run(pipe, search="mctd", compute=2).search[0].latents.dtype == torch.bfloat16

    def test_a_batch_at_its_own_rows_per_call_is_the_stock_batch(
        self, stock: Any, pipe: Any
    ) -> None:
        theirs = self.run(stock, PROMPTS, 0, 1, 2)
        call = {"search": "best_of_n", "compute": 1, "rows_per_call": 3}
        ours = self.run(pipe, PROMPTS, 0, 1, 2, **call)
        assert torch.equal(ours.images, theirs.images)

    # Searches

    def test_the_ledger_counts_every_row(self, searched: Any) -> None:
        _, out, rows = searched
        total = out.ledger.total
        assert total.rows + total.padded_rows == sum(rows)
        assert total.calls * self.calls_per_chunk == len(rows)
        assert total.rows == self.rows_per_latent * total.nfe
        assert total.nfe == sum(out.nfe)
        for nfe, found in zip(out.nfe, out.search, strict=True):
            assert self.steps < nfe <= COMPUTE * self.steps
            assert nfe == found.tree.evaluated.sum()

    def test_images_do_not_depend_on_each_other(self, pipe: Any, searched: Any) -> None:
        name, together, _ = searched
        call = {"search": name, "compute": COMPUTE, "rows_per_call": 4}
        alone = self.run(pipe, [PROMPTS[1]], 4, **call)
        assert torch.equal(alone.images[0], together.images[1])
        assert alone.rewards[0] == together.rewards[1]
        assert alone.nfe[0] == together.nfe[1]

    def test_a_replay_is_the_winner(self, pipe: Any, searched: Any) -> None:
        _, out, _ = searched
        found = out.search[2]
        replayed = pipe.replay(found.recipe)
        winner = found.finished.index(found.winner)
        assert torch.equal(replayed.latents, found.latents[winner])
        assert replayed.reward == out.rewards[2]
        assert replayed.nfe <= self.steps

    @pytest.mark.slow
    def test_a_replay_of_a_picture_is_that_picture(self, pipe: Any, tmp_path: Path) -> None:
        out = self.run(pipe, search="beam", compute=3, output_type="pil")
        path = out.save(tmp_path / "picture.png")[0]
        replayed = pipe.replay(read_recipe(path))
        assert np.array_equal(np.array(replayed.images[0]), np.array(out.images[0]))

    @pytest.mark.slow
    def test_a_search_stopped_goes_on_as_if_never_stopped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call = {"search": "mctd", "compute": 3, "rows_per_call": 2}
        whole = self.run(self.make_pipe(), PROMPTS[:2], 3, 4, **call)
        save, saves = CallSaver.save, 0

        def stopping(saver: CallSaver, *arguments: Any) -> None:
            nonlocal saves
            save(saver, *arguments)
            saves += 1
            if saves == 3:
                raise StoppedError

        monkeypatch.setattr(CallSaver, "save", stopping)
        with pytest.raises(StoppedError):
            self.run(self.make_pipe(), PROMPTS[:2], 3, 4, save_to=tmp_path, save_every_s=0, **call)
        monkeypatch.setattr(CallSaver, "save", save)
        resumed = self.make_pipe().resume(tmp_path)
        assert torch.equal(resumed.images, whole.images)
        assert resumed.ledger.total == whole.ledger.total
        for found, same in zip(resumed.search, whole.search, strict=True):
            assert to_json(found.tree) == to_json(same.tree)

    # Folders and arguments

    def test_what_is_saved_is_a_stock_folder(self, stock: Any, tmp_path: Path) -> None:
        preview_vae = tiny.make_preview_vae()
        MCTDPipeline.from_pipe(stock, preview_vae=preview_vae).save_pretrained(tmp_path)
        plain = DiffusionPipeline.from_pretrained(tmp_path)
        plain.set_progress_bar_config(disable=True)
        assert type(plain) is type(stock)
        theirs = self.run(stock)
        assert torch.equal(self.run(plain).images, theirs.images)
        ours = MCTDPipeline.from_pretrained(tmp_path, reward_model=tiny.redness)
        ours.set_progress_bar_config(disable=True)
        assert isinstance(ours, type(stock))
        assert torch.equal(self.run(ours, search=None).images, theirs.images)
        out = self.run(ours, search="mctd", compute=3)
        assert out.ledger.total.previews > 0

    def test_latents_of_another_shape_are_refused(self, pipe: Any) -> None:
        with (
            counted_rows(pipe.components[self.denoiser_of(pipe)]) as rows,
            pytest.raises(ConfigError, match=r"latents have shape \(1, 3, 5\), expected \(1, "),
        ):
            self.run(pipe, latents=torch.zeros(1, 3, 5))
        assert not rows()

    def test_latents_of_the_user_are_taken_as_the_stock_takes_them(
        self, stock: Any, pipe: Any
    ) -> None:
        noise = self.run(pipe, search="best_of_n", compute=1, output_type="latent").images
        theirs = self.run(stock, latents=noise)
        call = {"search": "best_of_n", "compute": 1, "rows_per_call": 1}
        assert torch.equal(self.run(pipe, latents=noise, **call).images, theirs.images)

    def test_features_are_those_that_a_head_may_read(self, pipe: Any) -> None:
        given = {"num_inference_steps": self.steps, **self.call}
        world = pipe.open_world(prompt=PROMPTS[0], reads_features=True, **given)
        none = np.zeros(1, dtype=np.int64)
        handles = world.environment.reset(none, none)
        world.environment.denoise(handles)
        features = world.environment.features(handles)
        assert {name: rows.shape[-1] for name, rows in features.items()} == pipe._feature_channels()

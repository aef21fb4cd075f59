"""What diffusers asks of any pipeline of its own, asked of ours: without a search and under one.

The checks are those of the test classes that its pipelines share, in words of our own. A subclass
of `ConformanceChecks` is a family. Which checks do not apply to it `not_applicable.py` says; they
are run as well, and must fail.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from mctd_diffusers.callbacks import TENSOR_INPUTS
from mctd_diffusers.errors import BudgetError, ConfigError, SearchError
from mctd_diffusers.families.parts import call_by_names
from mctd_diffusers.hub import push_folder
from mctd_diffusers.pipeline import FAMILIES, MCTDPipeline, family_class
from tests.conformance.not_applicable import NOT_APPLICABLE
from tests.pipelines import tiny
from tests.pipelines.family_tests import counted_rows, seeded
from tests.pipelines.hub import HubServer

ROOT = Path(__file__).parents[2]
STEPS = 2
PROMPTS = ["a red cat", "two dogs", "a blue hat"]
CALLS: dict[str, dict[str, Any]] = {
    "none": {"search": None},
    "mctd": {"search": "mctd", "compute": 2, "rows_per_call": 2},
}
SIDE = 16
COMMON = (
    *("prompt", "height", "width", "num_inference_steps", "guidance_scale"),
    *("num_images_per_prompt", "generator", "latents", "prompt_embeds", "output_type"),
    *("return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)

with_and_without_search = pytest.mark.parametrize("search", list(CALLS))
with_and_slowly_under_search = pytest.mark.parametrize(
    "search", ["none", pytest.param("mctd", marks=pytest.mark.slow)]
)
by_shared_code_under_search = pytest.mark.parametrize(
    "search", ["none", pytest.param("mctd", marks=pytest.mark.shared)]
)
on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def is_finite(images: torch.Tensor) -> bool:
    return bool(torch.isfinite(images).all())


class ConformanceChecks:
    """A subclass is a family.

    Attributes:
        name: of the stock class.
        call: stock arguments of every call, with guidance.
        unguided: the same without.
        readers: components that read prompts.
        encoded: what ``encode_prompt`` returns, by the names of the call; empty for what no call
            takes.
    """

    name: ClassVar[str]
    call: ClassVar[dict[str, Any]] = {"height": SIDE, "width": SIDE}
    unguided: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}
    readers: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    encoded: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")

    @classmethod
    def make_stock(cls) -> Any:
        """The stock pipeline over tiny random components; the same weights each time."""
        raise NotImplementedError  # each family makes its own

    @classmethod
    def make_pipe(cls, stock: Any = None) -> Any:
        """Ours, over its modules or over ones of its own."""
        return MCTDPipeline.from_pipe(stock or cls.make_stock(), reward_model=tiny.redness)

    @classmethod
    def run(cls, pipe: Any, prompt: Any = PROMPTS[0], *seeds: int, **given: Any) -> Any:
        """One call; of several prompts with a generator each. Ours take a name of `CALLS`."""
        call = {"num_inference_steps": STEPS, "output_type": "pt", **cls.call, **given}
        if "search" in call:
            call = {**CALLS[call["search"]], **call, "search": CALLS[call["search"]]["search"]}
        if isinstance(prompt, list):
            prompt = list(prompt)  # stock Z-Image writes its template into it
            if isinstance(call.get("negative_prompt"), str):
                call["negative_prompt"] = [call["negative_prompt"]] * len(prompt)
        return pipe(prompt=prompt, generator=seeded(*seeds) if seeds else seeded(0)[0], **call)

    @classmethod
    @torch.no_grad()
    def embeddings(cls, encoder: Any, prompt: str) -> dict[str, Any]:
        """What the call takes in place of the prompt."""
        said = {name: prompt for name in ("prompt", "prompt_2", "prompt_3")}
        others = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        device = torch.device("cpu")
        parts = call_by_names(encoder.encode_prompt, {**cls.call, **said, **others}, device=device)
        return {name: part for name, part in zip(cls.encoded, parts, strict=True) if name}

    @classmethod
    def run_embedded(cls, pipe: Any, given: dict[str, Any], **call: Any) -> Any:
        """One call with embeddings in place of the prompt."""
        if call["search"] != "none":
            call["reward_prompt"] = PROMPTS[0]
        if "negative_prompt" in cls.call:
            call["negative_prompt"] = None
        return cls.run(pipe, None, **given, **call)

    @classmethod
    def with_parts(cls, stock: Any, **parts: Any) -> Any:
        """Another stock pipeline, with some other components."""
        pipe = type(stock)(**{**stock.components, **parts})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.fixture(autouse=True)
    def applies(self, request: pytest.FixtureRequest) -> None:
        """Expects of what does not apply to the family that it fails."""
        reason = NOT_APPLICABLE.get(request.node.originalname, {}).get(self.name)
        if reason is not None:
            request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.fixture(scope="class")
    @classmethod
    def stock(cls) -> Any:
        return cls.make_stock()

    @pytest.fixture(scope="class")
    @classmethod
    def pipe(cls, stock: Any) -> Any:
        return cls.make_pipe(stock)

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, pipe: Any) -> Callable[[str], torch.Tensor]:
        """The picture of the first prompt, by a name of `CALLS`."""
        return functools.cache(lambda search: cls.run(pipe, search=search).images)

    # Calls

    def test_the_call_has_the_common_arguments(self, stock: Any, pipe: Any) -> None:
        known = inspect.signature(type(pipe).__call__).parameters
        assert set(COMMON) <= set(known)
        theirs = inspect.signature(type(stock).__call__).parameters
        assert [name for name in known if name in theirs] == list(theirs)

    @with_and_slowly_under_search
    def test_batches_of_any_size(self, pipe: Any, search: str) -> None:
        for size in (1, 3):
            seeds = range(size)
            images = self.run(pipe, PROMPTS[:size], *seeds, search=search).images
            assert images.shape == (size, 3, SIDE, SIDE)
            assert is_finite(images)

    @with_and_without_search
    def test_an_image_of_a_batch_is_the_image_alone(self, pipe: Any, search: str) -> None:
        # In calls of 4, since in those of 2 the last bits of the tiny text encoder, whose layers
        # are 37 wide, depend on the place of a prompt.
        call = {"search": search} if search == "none" else {"search": search, "rows_per_call": 4}
        together = self.run(pipe, PROMPTS, 3, 4, 5, **call).images
        alone = self.run(pipe, [PROMPTS[1]], 4, **call).images[0]
        if search == "none":  # a network's last bits depend on the rows of its calls
            torch.testing.assert_close(alone, together[1], rtol=0, atol=1e-4)
        else:
            assert torch.equal(alone, together[1])

    @by_shared_code_under_search
    def test_a_tuple_holds_what_the_output_holds(
        self, pipe: Any, expected: Callable[[str], torch.Tensor], search: str
    ) -> None:
        images, *_ = self.run(pipe, search=search, return_dict=False)
        assert torch.equal(images, expected(search))

    @by_shared_code_under_search
    def test_each_prompt_has_its_number_of_images(self, pipe: Any, search: str) -> None:
        for prompts in (1, 2):
            call = {"num_images_per_prompt": 2, "search": search}
            out = self.run(pipe, PROMPTS[:prompts], *range(2 * prompts), **call)
            assert len(out.images) == 2 * prompts

    @with_and_without_search
    def test_guidance_is_off_or_on(
        self, pipe: Any, expected: Callable[[str], torch.Tensor], search: str
    ) -> None:
        off = self.run(pipe, search=search, **self.unguided).images
        assert is_finite(off)
        assert off.shape == expected(search).shape
        assert not torch.equal(off, expected(search))

    @by_shared_code_under_search
    def test_output_types_are_of_one_picture(
        self, pipe: Any, expected: Callable[[str], torch.Tensor], search: str
    ) -> None:
        picture = expected(search).permute(0, 2, 3, 1).float().numpy()
        array = self.run(pipe, search=search, output_type="np").images
        assert np.array_equal(array, picture)
        (image,) = self.run(pipe, search=search, output_type="pil").images
        assert image.size == (SIDE, SIDE)
        assert np.abs(np.asarray(image) / 255 - picture[0]).max() <= 0.5 / 255 + 1e-6
        latents = self.run(pipe, search=search, output_type="latent").images
        assert is_finite(latents)

    @with_and_without_search
    def test_prompts_are_encoded_apart(self, stock: Any, pipe: Any, search: str) -> None:
        parts = stock.components
        nothing = dict.fromkeys(name for name in parts if name not in self.readers)
        given = self.embeddings(self.with_parts(stock, **nothing), PROMPTS[0])
        rest = self.make_pipe(self.with_parts(stock, **dict.fromkeys(self.readers)))
        # In calls of 1, since embeddings depend on how many prompts are encoded at once.
        call = {"search": search} if search == "none" else {"search": search, "rows_per_call": 1}
        whole = self.run(pipe, **call).images
        assert torch.equal(self.run_embedded(rest, given, **call).images, whole)

    def test_a_search_says_that_nothing_reads_prompts(self, stock: Any) -> None:
        rest = self.make_pipe(self.with_parts(stock, **dict.fromkeys(self.readers)))
        with (
            counted_rows(rest.components[self.denoiser_of(rest)]) as rows,
            pytest.raises(ConfigError, match=r"has no .*pass prompt_embeds"),
        ):
            self.run(rest, search="mctd")
        assert not rows()

    # Callbacks

    def test_a_callback_sees_and_changes_tensors(self, pipe: Any) -> None:
        seen: list[set[str]] = []

        def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(set(tensors))
            if step == STEPS - 1:
                tensors["latents"] = torch.zeros_like(tensors["latents"])
            return tensors

        for names in (["latents"], pipe._callback_tensor_inputs):
            call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
            first = self.run(pipe, search="none", **call).images
            assert seen == [set(names)] * STEPS
            seen.clear()
            # Of all zeros in the end one picture is made, whatever the prompt and the noise.
            assert torch.equal(self.run(pipe, PROMPTS[1], 7, search="none", **call).images, first)
            seen.clear()

    def test_guidance_changes_on_the_way(
        self, stock: Any, pipe: Any, expected: Callable[[str], torch.Tensor]
    ) -> None:
        def raise_guidance(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            pipe._guidance_scale = 9.0
            return tensors

        images = self.run(pipe, search="none", callback_on_step_end=raise_guidance).images
        assert not torch.equal(images, expected("none"))
        theirs = self.run(stock, callback_on_step_end=raise_guidance).images
        assert torch.equal(images, theirs)

    @pytest.mark.shared
    def test_a_callback_sees_the_waves_of_a_search(
        self, pipe: Any, expected: Callable[[str], torch.Tensor]
    ) -> None:
        steps: list[int] = []
        samples = 0

        def look(pipe: Any, step: int, timesteps: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal samples
            steps.append(step)
            samples += len(tensors["latents"])
            assert set(tensors) == set(TENSOR_INPUTS)
            assert len(timesteps) == len(tensors["latents"]) == len(tensors["prompt_embeds"])
            return tensors

        call = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": TENSOR_INPUTS}
        out = self.run(pipe, search="mctd", **call)
        assert steps == list(range(len(steps)))
        assert samples == out.nfe[0]
        assert torch.equal(out.images, expected("mctd"))

    @pytest.mark.shared
    def test_a_search_refuses_what_a_callback_changes(self, pipe: Any) -> None:
        def change(pipe: Any, step: int, timesteps: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": torch.zeros_like(tensors["latents"])}

        def guide(pipe: Any, step: int, timesteps: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._guidance_scale = 9.0
            return tensors

        for callback, complaint in ((change, "changed 'latents'"), (guide, "set guidance_scale")):
            with pytest.raises(SearchError, match=f"the callback {complaint}"):
                self.run(pipe, search="mctd", callback_on_step_end=callback)

    def test_a_search_refuses_to_show_other_tensors(self, pipe: Any) -> None:
        given = {"callback_on_step_end_tensor_inputs": ["latents", "noise_pred"]}
        with (
            counted_rows(pipe.components[self.denoiser_of(pipe)]) as rows,
            pytest.raises(ConfigError, match=r"callback_on_step_end_tensor_inputs.*noise_pred"),
        ):
            self.run(pipe, search="mctd", callback_on_step_end=lambda *_: {}, **given)
        assert not rows()

    def test_an_interrupt_ends_the_steps(self, pipe: Any) -> None:
        def interrupt(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            pipe._interrupt = step == 0 or pipe.interrupt
            return tensors

        with counted_rows(pipe.components[self.denoiser_of(pipe)]) as rows:
            out = self.run(pipe, search="none", callback_on_step_end=interrupt)
            interrupted = len(rows())
        assert out.nfe is None
        with counted_rows(pipe.components[self.denoiser_of(pipe)]) as rows:
            assert self.run(pipe, search="none").nfe == [STEPS]
            assert len(rows()) == STEPS * interrupted

    @pytest.mark.shared
    def test_an_interrupt_ends_a_search_with_a_picture(
        self, pipe: Any, expected: Callable[[str], torch.Tensor]
    ) -> None:
        def interrupt(pipe: Any, step: int, timesteps: Any, tensors: dict[str, Any]) -> Any:
            assert step == 0
            pipe._interrupt = True
            return tensors

        out = self.run(pipe, search="mctd", compute=8, callback_on_step_end=interrupt)
        assert out.search[0].stop_reason == "interrupted"
        assert out.search[0].best_reward is not None
        assert out.images.shape == expected("mctd").shape
        assert out.nfe[0] < 8 * STEPS
        assert torch.equal(self.run(pipe, search="mctd").images, expected("mctd"))

    @classmethod
    def denoiser_of(cls, pipe: Any) -> str:
        return "unet" if "unet" in pipe.components else "transformer"

    # Refusals, all before the first call of the network

    def refused(self, pipe: Any, error: type[Exception], complaint: str, **given: Any) -> None:
        """A search that cannot work says why, and calls nothing."""
        denoiser = pipe.components[self.denoiser_of(pipe)]
        with counted_rows(denoiser) as rows, pytest.raises(error, match=complaint):
            self.run(pipe, **{"search": "mctd", **given})
        assert not rows()

    def test_another_family_is_refused(self, stock: Any, folder: Path) -> None:
        others = [name for name in sorted(FAMILIES) if name != self.name]
        for other in map(family_class, others[:2]):
            complaint = f"{other.__name__} searches no {self.name}: use MCTDPipeline"
            with pytest.raises(ConfigError, match=complaint):
                other.from_pipe(stock)
            with pytest.raises(ConfigError, match=complaint):
                other.from_pretrained(folder)

    def test_a_missing_component_is_refused(self, stock: Any) -> None:
        for name in (self.denoiser_of(stock), "vae", "scheduler"):
            with pytest.raises(ConfigError, match=f"takes a {name}, and there is none: pass "):
                MCTDPipeline.from_pipe(stock, **{name: None})
            pipe = self.make_pipe(self.with_parts(stock))
            setattr(pipe, name, None)
            with pytest.raises(ConfigError, match=f"the pipeline has no {name}: load it with "):
                self.run(pipe, search="mctd")

    def test_a_decoder_of_other_latents_is_refused(self) -> None:
        pipe = self.make_pipe()
        wide = tiny.make_preview_vae()
        wide.register_to_config(latent_channels=5)
        complaint = r"the preview_vae decodes latents of 5 channels, and the \w+ denoises .* of 4:"
        pipe.preview_vae = wide
        self.refused(pipe, ConfigError, complaint)
        pipe.preview_vae = None
        pipe.vae.register_to_config(latent_channels=7, z_dim=7)
        self.refused(pipe, ConfigError, "the vae decodes latents of 7 channels")

    def test_a_denoiser_of_other_outputs_is_refused(self) -> None:
        pipe = self.make_pipe()
        denoiser = pipe.components[self.denoiser_of(pipe)]
        channels = denoiser.config.in_channels
        denoiser.register_to_config(out_channels=2 * channels)
        complaint = f"gives {2 * channels} channels for latents of {channels}"
        self.refused(pipe, ConfigError, complaint)

    def test_half_precision_on_a_cpu_is_refused(self) -> None:
        pipe = self.make_pipe().to(torch.float16)
        self.refused(pipe, ConfigError, "is in float16 on the CPU.*float32")

    def test_a_budget_that_finishes_nothing_is_refused(self, pipe: Any) -> None:
        for budget, least in (
            ({"compute": 0.4}, "less than one NFE"),
            ({"nfe_budget": 1}, "a budget of 1 NFE cannot finish one sample.*at least 2 NFE"),
            ({"cost_budget": 1.5}, "a cost budget of 1.5 .* cannot finish one sample"),
        ):
            self.refused(pipe, BudgetError, least, **{"compute": None, **budget})

    # Components and folders

    @pytest.fixture
    def code_cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A cache of its own for code, since files of one name are one module of the process."""
        monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
            monkeypatch.delitem(sys.modules, name)

    @pytest.mark.usefixtures("code_cache")
    @pytest.mark.parametrize(
        "place",
        [
            "file",
            pytest.param("folder", marks=pytest.mark.shared),
            pytest.param("repository", marks=pytest.mark.shared),
        ],
    )
    def test_the_file_of_a_family_opens_a_folder_of_it(
        self, folder: Path, hub: HubServer, tmp_path: Path, place: str
    ) -> None:
        module, family = FAMILIES[self.name].split(":")
        source = str(ROOT / "pipelines" / f"{module.rsplit('.', maxsplit=1)[-1]}.py")
        if place != "file":
            code = tmp_path / "code"
            code.mkdir()
            shutil.copy(source, code / "pipeline.py")
            source = str(code)
        if place == "repository":
            push_folder(source, "somebody/code", token="write-token", card=None)
            source = "somebody/code"
        pipe = DiffusionPipeline.from_pretrained(
            folder, custom_pipeline=source, trust_remote_code=True, reward_model=tiny.redness
        )
        assert type(pipe).__name__ == family
        assert pipe.reward_model is tiny.redness

    @by_shared_code_under_search
    def test_components_make_another_pipeline(
        self, pipe: Any, expected: Callable[[str], torch.Tensor], search: str
    ) -> None:
        another = type(pipe)(**pipe.components, reward_model=tiny.redness)
        another.set_progress_bar_config(disable=True)
        assert another.components == pipe.components
        assert torch.equal(self.run(another, search=search).images, expected(search))

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder: Path = tmp_path_factory.mktemp(cls.name)
        pipe.save_pretrained(folder)
        return folder

    @classmethod
    def load(cls, folder: Path, **given: Any) -> Any:
        pipe = MCTDPipeline.from_pretrained(folder, reward_model=tiny.redness, **given)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @by_shared_code_under_search
    def test_a_saved_pipeline_is_loaded_as_it_was(
        self, folder: Path, expected: Callable[[str], torch.Tensor], search: str
    ) -> None:
        assert torch.equal(self.run(self.load(folder), search=search).images, expected(search))

    @with_and_slowly_under_search
    def test_optional_components_may_be_missing(
        self, stock: Any, tmp_path: Path, search: str
    ) -> None:
        family = type(self.make_pipe(stock))
        optional = [name for name in family._optional_components if name in stock.components]
        given = self.embeddings(stock, PROMPTS[0])
        lacking = self.make_pipe(self.with_parts(stock, **dict.fromkeys(optional)))
        lacking.save_pretrained(tmp_path)
        loaded = self.load(tmp_path)
        assert all(getattr(loaded, name) is None for name in optional)
        pictures = [
            self.run_embedded(each, given, search=search).images for each in (lacking, loaded)
        ]
        assert torch.equal(*pictures)

    @pytest.mark.shared
    def test_weights_are_saved_in_variants(
        self, pipe: Any, tmp_path: Path, expected: Callable[[str], torch.Tensor]
    ) -> None:
        pipe.save_pretrained(tmp_path, variant="fp16")
        weights = list(tmp_path.glob("*/*.safetensors"))
        assert weights
        assert all(".fp16." in path.name for path in weights)
        loaded = self.load(tmp_path, variant="fp16")
        assert torch.equal(self.run(loaded, search="none").images, expected("none"))

    def test_a_variant_that_is_missing_is_refused(self, folder: Path) -> None:
        with pytest.raises((OSError, ValueError), match="fp16"):
            self.load(folder, variant="fp16")

    @pytest.mark.shared
    def test_each_component_has_a_dtype_of_its_own(self, folder: Path) -> None:
        denoiser = self.denoiser_of(self.make_pipe())
        dtypes = {denoiser: torch.bfloat16, "default": torch.float16}
        loaded = self.load(folder, dtype=dtypes)
        for name, part in loaded.components.items():
            if isinstance(part, torch.nn.Module):
                assert part.dtype == dtypes.get(name, torch.float16), name

    @pytest.mark.shared
    def test_a_cast_reaches_every_component(self) -> None:
        pipe = self.make_pipe()
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        for dtype in (torch.bfloat16, torch.float32):
            assert pipe.to(dtype=dtype) is pipe
            assert {module.dtype for module in modules} == {dtype}
        assert pipe.dtype == torch.float32

    @with_and_slowly_under_search
    def test_half_precision_gives_numbers(self, tmp_path: Path, search: str) -> None:
        self.make_pipe().to(torch.bfloat16).save_pretrained(tmp_path)
        loaded = self.load(tmp_path, dtype=torch.bfloat16)
        images = self.run(loaded, search=search).images
        assert is_finite(images)
        if search == "none":
            stock = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
            stock.set_progress_bar_config(disable=True)
            assert torch.equal(images, self.run(stock).images)

    # Memory

    @with_and_slowly_under_search
    def test_attention_in_slices(
        self, expected: Callable[[str], torch.Tensor], search: str
    ) -> None:
        pipe = self.make_pipe()
        assert hasattr(pipe.components[self.denoiser_of(pipe)], "set_attention_slice")
        pipe.enable_attention_slicing(1)
        images = self.run(pipe, search=search).images
        torch.testing.assert_close(images, expected(search), rtol=0, atol=1e-4)
        pipe.disable_attention_slicing()
        assert torch.equal(self.run(pipe, search=search).images, expected(search))

    @with_and_slowly_under_search
    def test_decoding_in_slices(self, pipe: Any, search: str) -> None:
        whole = self.run(pipe, PROMPTS[:2], 3, 4, search=search).images
        sliced = self.make_pipe()
        sliced.vae.enable_slicing()
        images = self.run(sliced, PROMPTS[:2], 3, 4, search=search).images
        torch.testing.assert_close(images, whole, rtol=0, atol=1e-4)

    @with_and_slowly_under_search
    def test_decoding_in_tiles(self, expected: Callable[[str], torch.Tensor], search: str) -> None:
        stock, pipe = self.make_stock(), self.make_pipe()
        for each in (stock, pipe):
            each.vae.enable_tiling()
            sizes = {
                name: size
                for name, size in vars(each.vae).items()
                if name.startswith("tile_") and isinstance(size, int)
            }
            for name, size in sizes.items():  # so that there are some tiles
                setattr(each.vae, name, size * SIDE // (2 * max(sizes.values())))
        images = self.run(pipe, search=search).images
        assert is_finite(images)
        assert not torch.equal(images, expected(search))
        if search == "none":
            assert torch.equal(images, self.run(stock).images)

    @by_shared_code_under_search
    @on_each_device
    def test_models_are_offloaded(
        self, expected: Callable[[str], torch.Tensor], search: str, device: str
    ) -> None:
        whole = expected(search)
        if device != "cpu":
            whole = self.run(self.make_pipe().to(device), search=search).images
        pipe = self.make_pipe()
        pipe.enable_model_cpu_offload(device=device)
        for _ in range(2):
            assert torch.equal(self.run(pipe, search=search).images, whole)

    @by_shared_code_under_search
    @on_each_device
    def test_modules_are_offloaded_one_by_one(
        self, expected: Callable[[str], torch.Tensor], search: str, device: str
    ) -> None:
        whole = expected(search)
        if device != "cpu":
            whole = self.run(self.make_pipe().to(device), search=search).images
        pipe = self.make_pipe()
        if device == "cpu":  # the stock method asks for an index, which no host has
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    cpu_offload(part, device, offload_buffers=bool(part._parameters))
        else:
            pipe.enable_sequential_cpu_offload(device=device)
        assert torch.equal(self.run(pipe, search=search).images, whole)

    # Low-rank adapters

    @pytest.fixture(scope="class")
    @classmethod
    def adapter(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Random low-rank weights of the denoiser, as the stock pipeline saves them."""
        stock = cls.make_stock()
        name = cls.denoiser_of(stock)
        denoiser = stock.components[name]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            denoiser.add_adapter(
                LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
            )
        folder: Path = tmp_path_factory.mktemp("adapter")
        layers = {f"{name}_lora_layers": get_peft_model_state_dict(denoiser)}
        type(stock).save_lora_weights(folder, **layers)
        return folder

    @by_shared_code_under_search
    def test_adapters_are_loaded_scaled_fused_and_unloaded(
        self, expected: Callable[[str], torch.Tensor], adapter: Path, search: str
    ) -> None:
        theirs, ours = self.make_stock(), self.make_pipe()
        pictures = [expected(search)]
        for scale in (0.5, 1.0):
            for each in (theirs, ours):
                if scale == 0.5:
                    each.load_lora_weights(adapter, adapter_name="some")
                each.set_adapters("some", scale)
            pictures.append(self.run(ours, search=search).images)
            if search == "none":
                assert torch.equal(pictures[-1], self.run(theirs).images)
        assert not any(torch.equal(*pair) for pair in itertools.pairwise(pictures))
        ours.disable_lora()
        assert torch.equal(self.run(ours, search=search).images, expected(search))
        ours.enable_lora()
        ours.fuse_lora(adapter_names=["some"])
        fused = self.run(ours, search=search).images
        torch.testing.assert_close(fused, pictures[-1], rtol=0, atol=1e-3)
        ours.unfuse_lora()
        ours.unload_lora_weights()
        images = self.run(ours, search=search).images
        torch.testing.assert_close(images, expected(search), rtol=0, atol=1e-3)

"""MCTDPipeline: what every family adds to its stock pipeline.

A family subclasses this base and the stock pipeline of its models, so that prompts, LoRA, IP
adapters, offload and safety are the stock pipeline's own code. The base reads and writes folders
that stay stock, and turns one call into a search: `families/` says how its network is called and
its latents are decoded, `denoising/` makes a world of that, `search/` searches it. What needs no
pipeline is beside it: `arguments` and `calls`, `estimating`, `outputs`, `replaying`, `saved_calls`
and `pipeline_folder`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    SchedulerMixin,
)
from huggingface_hub import CommitInfo
from torch import Tensor

from mctd_diffusers.arguments import (
    bound_arguments,
    check_denoiser,
    check_no_options,
    scheduler_of,
    search_reward,
    stock_defaults,
)
from mctd_diffusers.callbacks import WaveCallbacks, check_callbacks
from mctd_diffusers.calls import (
    Prepared,
    SearchCall,
    SearchOptions,
    World,
    as_config_errors,
    call_budgets,
    check_latents,
    check_longest_stride,
    check_options,
    check_perturbed_noise,
    check_save_every,
    check_stock,
    configured_strategy,
    digest_of_head,
    fusion_method_of,
    fusion_parts_of,
    nfe_allowed,
    recipe_of_fusion,
    reward_prompts_of,
    stride_parts_of,
    with_head_or_without,
)
from mctd_diffusers.denoising.protocols import (
    CheckedReward,
    Decoder,
    FeatureDecoder,
    RewardFn,
)
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.estimating import estimate_of
from mctd_diffusers.hub import (
    CARD,
    HUB_ARGUMENTS,
    documents_beside,
    push_folder,
    repository_of,
)
from mctd_diffusers.models.feature_decoder import FeatureToLatent
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.models.refining import IGEUpdate, Refiner
from mctd_diffusers.outputs import PictureMaker, output_of
from mctd_diffusers.pipeline_folder import (
    AS_SAVED,
    FEATURE_FOLDER,
    REWARD_FOLDER,
    index_with_ours,
    our_files,
    pipeline_card,
    read_model_index,
    resolve_ige,
    saved_parts,
    strip_configs,
)
from mctd_diffusers.replaying import (
    check_first_noise,
    evaluated_places,
    first_noise_of,
    fusing_again,
    fusion_method_again,
    needs_first_noise,
    no_reward,
    retrace,
    world_again,
)
from mctd_diffusers.results import (
    Estimate,
    MCTDPipelineOutput,
    Recipe,
    ReplayOutput,
    check_recipe,
    first_draws,
    recipe_scheduler,
    recipe_settings,
    recipe_stock,
    step_indices,
)
from mctd_diffusers.rewards.calls import call_reward
from mctd_diffusers.rewards.clip import ClipReward
from mctd_diffusers.rewards.resolving import resolve_reward
from mctd_diffusers.saved_calls import (
    CallSaver,
    OpenSearch,
    check_unsaved,
    restored_world,
    saved_arguments,
)
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import (
    Prices,
)
from mctd_diffusers.search.log import SearchLog
from mctd_diffusers.search.runner import (
    SearchResult,
    Strategy,
    Wave,
    check_budget,
    run_search,
)
from mctd_diffusers.search.saving import load_search
from mctd_diffusers.search.strategies import BestOfN
from mctd_diffusers.search.with_plain import WithPlain

logger = logging.getLogger(__name__)

FAMILIES: dict[str, str] = {
    "Flux2KleinPipeline": "mctd_diffusers.families.flux2_klein:MCTDFlux2KleinPipeline",
    "Flux2Pipeline": "mctd_diffusers.families.flux2:MCTDFlux2Pipeline",
    "FluxPipeline": "mctd_diffusers.families.flux:MCTDFluxPipeline",
    "QwenImagePipeline": "mctd_diffusers.families.qwen_image:MCTDQwenImagePipeline",
    "StableDiffusion3Pipeline": (
        "mctd_diffusers.families.stable_diffusion_3:MCTDStableDiffusion3Pipeline"
    ),
    "StableDiffusionPipeline": (
        "mctd_diffusers.families.stable_diffusion:MCTDStableDiffusionPipeline"
    ),
    "StableDiffusionXLPipeline": (
        "mctd_diffusers.families.stable_diffusion_xl:MCTDStableDiffusionXLPipeline"
    ),
    "ZImagePipeline": "mctd_diffusers.families.z_image:MCTDZImagePipeline",
}
"""Stock class name -> 'module:class' of the family that searches it."""


def family_class(stock_class_name: object) -> type[MCTDPipeline]:
    """Return the family of a stock pipeline, by the name of its class.

    Raises:
        ConfigError: no family searches pipelines of that class.
    """
    if not isinstance(stock_class_name, str) or stock_class_name not in FAMILIES:
        raise ConfigError(
            f"no family searches pipelines of class {stock_class_name!r}; supported are "
            f"{', '.join(sorted(FAMILIES))}: load a model of one of these, or add a family, which "
            "docs/extending.md shows in under 100 lines"
        )
    module, name = FAMILIES[stock_class_name].split(":")
    family: type[MCTDPipeline] = getattr(importlib.import_module(module), name)
    return family


def _check_family(family: type[MCTDPipeline], stock_class_name: object) -> None:
    """Refuse a family of another stock pipeline than the one that is at hand."""
    if stock_class_name in FAMILIES and stock_class_name != family.stock_class.__name__:
        raise ConfigError(
            f"{family.__name__} searches no {stock_class_name}: use MCTDPipeline, which picks the "
            "family itself"
        )


class MCTDPipeline(DiffusionPipeline):
    r"""Base of the pipelines that search over denoising.

    Use [`~MCTDPipeline.from_pretrained`] or [`~MCTDPipeline.from_pipe`]: they return the family
    that fits the model, a subclass of both this class and the stock pipeline. It takes the
    components of the stock pipeline, and by name:

    Args:
        preview_vae ([`AutoencoderTiny`], *optional*):
            Decodes unfinished samples cheaply; without it they are decoded in full.
        reward_model (*optional*):
            What a search maximises: a callable `(images, prompts) -> floats`, a short name, or the
            folder or repository of a `CLIPModel`. A [`ClipReward`] is saved with the pipeline;
            other callables are not.
        ige ([`InformationGainEvaluator`], *optional*):
            Predicts what strides tell and cost, for searches that choose them by it.
    """

    stock_class: ClassVar[type[DiffusionPipeline]]
    reward_model: RewardFn | None
    preview_vae: AutoencoderTiny | None
    ige: InformationGainEvaluator | None
    feature_decoder: FeatureDecoder | None = None
    """Such as a `FeatureToLatent`: what `fusion="features"` maps fused features to latents by.
    Without one it moves the samples' own patches. It is saved and loaded with the pipeline."""
    _refiner: Refiner | None = None

    def _set_up_search(
        self,
        preview_vae: AutoencoderTiny | None,
        reward_model: Any,
        ige: InformationGainEvaluator | None,
    ) -> None:
        """Register what the base adds to the stock pipeline; the end of a family's ``__init__``."""
        if ige is not None:
            self._check_ige(ige)
        self.register_modules(preview_vae=preview_vae, ige=ige)
        self.reward_model = None if reward_model is None else resolve_reward(reward_model)

    def _check_ige(self, ige: InformationGainEvaluator) -> None:
        """Refuse a head that was trained on another kind of network.

        Raises:
            ConfigError: its family is another, or it reads features that the network has not.
        """
        ige.check_family(self.stock_class.__name__)
        channels = self._feature_channels()
        ige.check_features({name: torch.empty(0, number) for name, number in channels.items()})

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        reward_model: Any = AS_SAVED,
        ige: Any = AS_SAVED,
        **kwargs: Any,
    ) -> MCTDPipeline:
        r"""Load any pipeline folder or Hub repository of a supported family.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder with a `model_index.json`, or the name of a Hub repository.
            reward_model (*optional*, defaults to the reward that was saved with the pipeline):
                A callable `(images, prompts) -> floats`, a short name (`"clip"`, `"pickscore"`), or
                the folder or repository of a `CLIPModel`; `None` for no reward.
            ige (*optional*, defaults to the one that was saved with the pipeline):
                An [`InformationGainEvaluator`], its folder or its Hub repository; `None` for none.
                `revision` is that of the pipeline alone: load a head of some revision by
                `InformationGainEvaluator.from_pretrained(..., revision=...)`.
            preview_vae ([`AutoencoderTiny`], *optional*, defaults to the one that was saved):
                Decoder of previews.
            kwargs (remaining keyword arguments, *optional*):
                Everything that the stock `from_pretrained` takes.

        Returns:
            The family's pipeline, also an instance of the stock class.

        Raises:
            ConfigError: no such folder or repository, a pipeline that no family searches, a reward
                or a head that cannot be resolved, or a head for another kind of pipeline.
        """
        source = os.fspath(pretrained_model_name_or_path)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        index = read_model_index(source, hub)
        family = family_class(index.get("_class_name")) if cls is MCTDPipeline else cls
        _check_family(family, index.get("_class_name"))
        given = {"reward_model": reward_model, "ige": ige}
        replaced = [name for name, part in given.items() if part is not AS_SAVED]
        if "preview_vae" in kwargs:
            replaced.append("preview_vae")
        saved = saved_parts(source, index, replaced, kwargs.copy(), hub)
        kwargs["ige"] = ige = saved.load_ige(ige)
        if ige is not None:
            ige.check_family(family.stock_class.__name__)
        reward_model = saved.load_reward(reward_model)
        preview = saved.load_preview()
        if preview is not None:
            kwargs["preview_vae"] = preview
        pipe: MCTDPipeline = super(MCTDPipeline, family).from_pretrained(source, **kwargs)
        pipe.reward_model = reward_model
        pipe.feature_decoder = saved.load_feature_decoder()
        if kwargs.get("device_map") is not None:
            for part in (preview, ige):
                if part is not None:
                    part.to(pipe.device)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> MCTDPipeline:
        r"""Wrap a pipeline in memory, sharing its modules.

        Unlike the stock `from_pipe` this casts nothing, so the modules keep their dtype in both
        pipelines.

        Args:
            pipeline (`DiffusionPipeline`):
                A pipeline of a supported family, stock or ours.
            kwargs (remaining keyword arguments, *optional*):
                Components and settings to use in place of the pipeline's own, `reward_model`,
                `preview_vae` and `ige` among them; `dtype` (or `torch_dtype`) casts, and since
                modules are shared it casts them in both pipelines.

        Returns:
            The family's pipeline.

        Raises:
            ConfigError: a pipeline that no family searches, a reward or a head that cannot be
                resolved, a head for another kind of pipeline, or an argument that the family does
                not know.
        """
        names = [base.__name__ for base in type(pipeline).__mro__]
        name = next((base for base in names if base in FAMILIES), names[0])
        family = family_class(name) if cls is MCTDPipeline else cls
        _check_family(family, name)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        modules, settings = family._get_signature_keys(family)
        unknown = sorted(set(kwargs) - set(modules) - set(settings))
        if unknown:
            raise ConfigError(
                f"from_pipe got {', '.join(unknown)}, which {family.__name__} does not know: it "
                f"takes {', '.join([*modules, *settings])}"
            )
        arguments = {name: part for name, part in pipeline.components.items() if name in modules}
        arguments |= {name: pipeline.config[name] for name in settings if name in pipeline.config}
        arguments["reward_model"] = getattr(pipeline, "reward_model", None)
        if kwargs.get("ige") is not None:
            kwargs["ige"] = resolve_ige(kwargs["ige"])
        arguments = {**dict.fromkeys(modules), **arguments, **kwargs}
        for name in set(modules) - set(family._optional_components):
            if arguments[name] is None:
                raise ConfigError(
                    f"{family.__name__} takes a {name}, and there is none: pass {name}=..."
                )
        pipe = family(**arguments)
        name_or_path = pipeline.config.get("_name_or_path")
        if name_or_path is not None:
            pipe.register_to_config(_name_or_path=name_or_path)
        pipe.hf_device_map = pipeline.hf_device_map
        pipe.feature_decoder = getattr(pipeline, "feature_decoder", None)
        pipe.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return pipe if dtype is None else pipe.to(dtype=dtype)

    def to(self, *args: Any, **kwargs: Any) -> MCTDPipeline:
        """Move or cast as the stock pipeline does; a reward with a ``to`` follows to the device."""
        super().to(*args, **kwargs)
        move = getattr(self.reward_model, "to", None)
        if callable(move):
            move(self.device)
        return self

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        r"""Save a folder that opens as the stock pipeline, and with our parts in ours.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder; created if it does not exist.
            safe_serialization (`bool`, *optional*, defaults to `True`):
                As in the stock pipeline.
            variant (`str`, *optional*):
                As in the stock pipeline.
            max_shard_size (`int` or `str`, *optional*):
                As in the stock pipeline.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to push the folder then, to `repo_id` or by its own name.
            kwargs (remaining keyword arguments, *optional*):
                Those of the stock `save_pretrained`, and with `push_to_hub` of `push_folder`.

        Raises:
            ConfigError: the Hub cannot be reached, or refuses.
        """
        directory = Path(save_directory)
        if type(self.reward_model) is ClipReward:
            self.reward_model.save_pretrained(directory / REWARD_FOLDER)
        elif self.reward_model is not None:
            logger.warning(
                "the reward %r is a callable and is not saved: pass reward_model=... again when "
                "you load %s",
                self.reward_model,
                directory.name,
            )
        if isinstance(self.feature_decoder, FeatureToLatent):
            self.feature_decoder.save_pretrained(directory / FEATURE_FOLDER)
        elif self.feature_decoder is not None:
            logger.warning(
                "the feature decoder %r is no FeatureToLatent and is not saved: set "
                "pipe.feature_decoder again when you load %s",
                self.feature_decoder,
                directory.name,
            )
        # An assignment over None is lost on save.
        self.register_modules(preview_vae=self.preview_vae, ige=self.ige)
        names = ("repo_id", "private", "token", "commit_message", "create_pr")
        push = {name: kwargs.pop(name) for name in names if push_to_hub and name in kwargs}
        super().save_pretrained(
            os.fspath(directory), safe_serialization, variant, max_shard_size, **kwargs
        )
        if push_to_hub:
            push_folder(directory, push.pop("repo_id", directory.name), card=self._card, **push)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> CommitInfo:
        r"""Push a repository that opens as the stock pipeline, and with our parts in ours.

        Its card is the one that the repository has, else the one in the folder that the pipeline
        was loaded from, else one that says what its parts are and how to load them. Other documents
        of that folder, such as licences, are pushed too.

        Args:
            repo_id (`str`):
                `owner/name`, or `name` in the account of the token; made if it does not exist.
            commit_message (`str`, *optional*):
                Message of the commit.
            private (`bool`, *optional*, defaults to what the account's settings say):
                Whether a new repository is private.
            token (`str`, *optional*, defaults to the saved one):
                Token of an account that may write there.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request in place of writing to the main branch.
            safe_serialization (`bool`, *optional*, defaults to `True`):
                As in the stock pipeline.
            variant (`str`, *optional*):
                As in the stock pipeline.
            subfolder (`str`, *optional*, defaults to the root):
                Folder of the repository to write to.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the address of the commit, with its hash as `oid`.

        Raises:
            ConfigError: the Hub cannot be reached, or refuses.
        """
        documents = documents_beside(self.config.get("_name_or_path"))
        own = documents.pop(CARD, None)

        def card(name: str) -> str:
            return self._card(name) if own is None else own.read_text(encoding="utf-8")

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            for path in documents.values():
                shutil.copy(path, folder)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message or f"Upload {self.stock_class.__name__}",
                create_pr=create_pr,
                path_in_repo=subfolder,
                card=None if subfolder else card,
            )

    def _card(self, repo_id: str) -> str:
        """Model card that says what the parts are and how to load them."""
        parts = {
            name: type(part).__name__ for name, part in self.components.items() if part is not None
        }
        if type(self.reward_model) is ClipReward:
            parts[REWARD_FOLDER] = "ClipReward"
        if isinstance(self.feature_decoder, FeatureToLatent):
            parts[FEATURE_FOLDER] = "FeatureToLatent"
        base_model = repository_of(self.config.get("_name_or_path"))
        return pipeline_card(repo_id, self.stock_class.__name__, parts, base_model)

    def save_config(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Write ``model_index.json``, and leave no path of this machine in the configs."""
        super().save_config(save_directory, *args, **kwargs)
        strip_configs(Path(save_directory))

    def to_json_string(self) -> str:
        """Return ``model_index.json``: the stock one, with our entries under a private key."""
        index: dict[str, Any] = json.loads(super().to_json_string())
        index = index_with_ours(
            index, self.stock_class.__name__, self.reward_model, self.feature_decoder
        )
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write ``model_index.json``, which spares stock users the download of our parts.

        Stock diffusers downloads the weights in all folders of a repository, whether the index
        names them or not, but for the files under its key ``_ignore_files``.
        """
        path = Path(json_file_path)
        index: dict[str, Any] = json.loads(self.to_json_string())
        if files := our_files(path.parent):
            index["_ignore_files"] = files
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    # Searching

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """The body of every family's ``__call__``."""
        stock, options = bound_arguments(self, args, kwargs)
        if options.search is None:
            return self._plain_call(stock, options)
        return self._search_call(stock, options)

    def _plain_call(self, stock: dict[str, Any], options: SearchOptions) -> Any:
        """The stock pipeline, with its output in our form."""
        check_no_options(options)
        output = self.stock_class.__call__(self, **{**stock, "return_dict": True})
        nsfw = getattr(output, "nsfw_content_detected", None)
        if not stock["return_dict"]:
            has_checker = hasattr(output, "nsfw_content_detected")
            return (output.images, nsfw) if has_checker else (output.images,)
        calls = getattr(self, "num_timesteps", len(self.scheduler.timesteps))
        nfe = None if getattr(self, "interrupt", False) else [calls] * len(output.images)
        return MCTDPipelineOutput(images=output.images, nfe=nfe, nsfw_content_detected=nsfw)

    def _search_call(self, stock: dict[str, Any], options: SearchOptions) -> Any:
        """Search every image of a call, in shared waves."""
        started = time.monotonic()
        world, strategy = self._set_up(stock, options)
        budget, plain_budget = call_budgets(world, strategy, options)
        problems = world.problems(budget)
        if plain_budget is not None:
            problems += world.problems(plain_budget, first_index=len(problems))
        seconds = options.time_budget_s
        if seconds is not None:
            seconds = max(seconds - (time.monotonic() - started), 1e-3)
        call = SearchCall(world, strategy, problems, stock, options, seconds)
        saver = None
        if options.save_to is not None:
            saver = CallSaver(options.save_to, options.save_every_s, call, SearchLog())
        return self._run(call, saver, refines=options.online_ige)

    def _run(self, call: SearchCall, saver: CallSaver | None, *, refines: bool) -> Any:
        """Search a call, saving now and then, make its output, and learn from it if asked to."""
        world, stock, options = call.world, call.stock, call.options
        strategy = call.strategy
        if world.with_plain:
            strategy = WithPlain(strategy, len(world.prompts))
        try:
            with self._progress(call, saver) as on_wave:
                results = run_search(
                    strategy,
                    world.environment,
                    call.problems,
                    seconds=call.seconds,
                    on_wave=on_wave,
                    is_interrupted=lambda: bool(self._interrupt),
                    log=None if saver is None else saver.log,
                )
            if saver is not None:
                saver.save_results(results)
            output = self._output(call, results)
            if refines:
                output.ige_update = self._refine(world, results[: len(world.prompts)])
        except SearchError as error:
            if saver is not None and error.partial:
                saver.save_results(error.partial)
            error.partial = error.partial and self._output(call, error.partial)
            raise
        except KeyboardInterrupt:
            if saver is not None:
                saver.save()
            raise
        finally:
            self.maybe_free_model_hooks()
        if stock["return_dict"]:
            return output
        # As the stock tuple begins: images, then what the safety checker says.
        rest = (output.rewards, output.nfe, output.search, output.ledger, output.plain)
        learned = (output.ige_update,) if options.online_ige else ()
        return (output.images, output.nsfw_content_detected, *rest, *learned)

    # Saved searches

    @torch.no_grad()
    def resume(
        self,
        folder: str | os.PathLike[str],
        *,
        search: Strategy | None = None,
        reward_model: Any = None,
        save_every_s: float = 60.0,
        output_type: str | None = None,
        return_dict: bool | None = None,
        **arguments: Any,
    ) -> Any:
        r"""Go on with a search that `save_to=...` saved, as if it had never stopped.

        On the same machine and versions, with as many threads, the result is equal bit for bit,
        ledger included (but for its seconds). The folder is written on. Its budget stays what it
        was: strategies plan by their budget, so a search with a larger one would have taken other
        steps. A search that is over comes back without being searched.

        Args:
            folder (`str` or `os.PathLike`):
                That the call saved to.
            search (`Strategy`, *optional*):
                Needed where the search was a strategy of your own: the same, with its settings.
            reward_model (*optional*, defaults to `self.reward_model`):
                The reward that was searched.
            save_every_s (`float`, *optional*, defaults to 60):
                As in the call.
            output_type (`str`, *optional*, defaults to that of the call):
                As in the call.
            return_dict (`bool`, *optional*, defaults to that of the call):
                As in the call.
            arguments (*optional*):
                What the call was given that no folder can hold, such as `prompt_embeds`; and
                callbacks, as in a call.

        Returns:
            What the call would have returned.

        Raises:
            ConfigError: there is no saved search, or the model, the reward or the search is
                another.
            SearchError: as the call would.
        """
        check_save_every(save_every_s)
        opened = self.open_search(folder, search=search, reward_model=reward_model, **arguments)
        if output_type is not None:
            opened.call.stock["output_type"] = output_type
        if return_dict is not None:
            opened.call.stock["return_dict"] = return_dict
        check_stock(opened.call.stock, stock_defaults(type(self)))
        return self._run(
            opened.call,
            CallSaver(folder, save_every_s, opened.call, opened.saved.log),
            refines=opened.call.options.online_ige and not opened.saved.is_over,
        )

    @torch.no_grad()
    def open_search(
        self,
        folder: str | os.PathLike[str],
        *,
        search: Strategy | None = None,
        reward_model: Any = None,
        **arguments: Any,
    ) -> OpenSearch:
        r"""Set up the world of a saved search again, to look into it or to go on by hand.

        Nothing is searched; one sample is evaluated and one is scored again, to see that model and
        reward are those of then.

        Args:
            folder (`str` or `os.PathLike`):
                That the call saved to.
            search (`Strategy`, *optional*):
                As in [`~MCTDPipeline.resume`].
            reward_model (*optional*, defaults to `self.reward_model`):
                The reward that was searched.
            arguments (*optional*):
                As in [`~MCTDPipeline.resume`].

        Returns:
            [`OpenSearch`]: `saved.results()` has the trees and what was found,
            `call.world.environment` the samples, under the handles of the trees.

        Raises:
            ConfigError: there is no saved search, or the model, the reward or the search is
                another.
        """
        saved = load_search(folder, strategy=search)
        stock, options = saved_arguments(
            saved, self.stock_class.__name__, stock_defaults(type(self)), arguments
        )
        self._check_online(options)
        reward = self._reward_of(reward_model)
        self._check_call(stock)
        settings = saved.call["settings"][0]
        scheduler = recipe_scheduler(settings)
        with self._stepping(scheduler), as_config_errors():
            self._set_timesteps(stock)
            stepper = Stepper(scheduler, eta=stock.get("eta", 0.0))
            prepared = self._prepare(stock, settings["prompts_per_call"])
        check_callbacks(stock, prepared)
        feature_decoder = self._feature_decoder_of(fusion_method_again(settings))
        world = World(
            prepared=prepared,
            stepper=stepper,
            scheduler=scheduler,
            reward=reward,
            prompts=saved.call["reward_prompts"],
            rows_per_call=settings["rows_per_call"],
            settings=saved.call["settings"],
            prices=Prices(),
            with_plain=saved.call["with_plain"],
            reads_features=options.online_ige,
            strides=stride_parts_of(saved.strategy, stepper, self.ige, settings["rows_per_call"]),
            head=digest_of_head(saved.strategy, self.ige),
            fusing=fusing_again(settings, prepared, feature_decoder),
            feature_decoder=feature_decoder,
            offloads_latents=options.offload_latents,
            half_latents=options.half_latents,
        )
        world = restored_world(saved, world)
        seconds = saved.call["seconds"]
        call = SearchCall(world, saved.strategy, saved.problems, stock, options, seconds)
        return OpenSearch(saved, call)

    def _set_up(self, stock: dict[str, Any], options: SearchOptions) -> tuple[World, Strategy]:
        """Check every argument, then make the world to be searched."""
        check_options(options)
        if options.save_to is not None:
            check_unsaved(options.save_to)
        self._check_online(options)
        strategy = with_head_or_without(configured_strategy(options), self.ige is not None)
        check_stock(stock, stock_defaults(type(self)))
        self._check_call(stock)
        prompts = reward_prompts_of(stock, options)
        draws = first_draws(stock, len(prompts))
        reward = self._reward_of(options.reward_model)
        scheduler = scheduler_of(options.search_scheduler, self.scheduler)
        rows_per_call = int(options.rows_per_call or self._default_rows_per_call(stock))
        prompts_per_call = max(1, rows_per_call // stock["num_images_per_prompt"])
        with self._stepping(scheduler), as_config_errors():
            self._set_timesteps(stock)
            stepper = Stepper(scheduler, eta=stock.get("eta", 0.0))
            check_longest_stride(strategy, stepper, scheduler)
            check_perturbed_noise(strategy, stepper, scheduler)
            prepared = self._prepare(stock, prompts_per_call)
        check_callbacks(stock, prepared)
        method = fusion_method_of(strategy)
        feature_decoder = self._feature_decoder_of(method)
        fusing = fusion_parts_of(method, prepared, feature_decoder)
        settings = recipe_settings(
            stock,
            prompts,
            draws,
            pipeline=self.stock_class.__name__,
            scheduler=scheduler,
            first_latents=prepared.first_latents,
            rows_per_call=rows_per_call,
            prompts_per_call=prompts_per_call,
            half_latents=options.half_latents,
            fusion=recipe_of_fusion(fusing, feature_decoder),
        )
        world = World(
            prepared=prepared,
            stepper=stepper,
            scheduler=scheduler,
            reward=reward,
            prompts=prompts,
            rows_per_call=rows_per_call,
            settings=settings,
            prices=Prices(),
            with_plain=options.include_plain and not isinstance(strategy, BestOfN),
            reads_features=options.online_ige,
            strides=stride_parts_of(strategy, stepper, self.ige, rows_per_call),
            head=digest_of_head(strategy, self.ige),
            fusing=fusing,
            feature_decoder=feature_decoder,
            offloads_latents=options.offload_latents,
            half_latents=options.half_latents,
        )
        if options.cost_budget is not None:
            nfe = nfe_allowed(options, stepper.num_steps, stepper.calls_per_step)
            # What rows alone cost is known before anything is measured.
            check_budget(strategy, world.problems(Budget(nfe, options.cost_budget))[0])
            world = replace(world, prices=world.measure_prices())
        return world, strategy

    @contextmanager
    def _progress(
        self, call: SearchCall, saver: CallSaver | None
    ) -> Iterator[Callable[[Wave], None]]:
        """What follows each wave: callbacks, saving, and a progress bar over the NFE budget.

        The bar shows the best reward so far (their mean, of many images).
        """
        budgets = [problem.budget.nfe for problem in call.problems]
        total = sum(math.inf if nfe is None else nfe for nfe in budgets)
        ledger = call.world.environment.ledger
        callbacks = WaveCallbacks(self, call.stock, call.world)
        with self.progress_bar(total=total) as bar:

            def on_wave(wave: Wave) -> None:
                best = [reward for reward in wave.best if reward is not None]
                if best:
                    bar.set_postfix(best_reward=f"{np.mean(best):.4g}", refresh=False)
                bar.update(ledger.total.nfe - bar.n)
                if not self._interrupt:
                    callbacks(wave)
                if saver is not None:
                    saver.save_if_due()

            yield on_wave

    def _output(self, call: SearchCall, results: Sequence[SearchResult]) -> MCTDPipelineOutput:
        """The output of what was found: of each image the best sample, or the plain one."""
        return output_of(
            call.world,
            results,
            PictureMaker(
                check_safety=self._check_safety,
                as_latents=self._as_latents,
                postprocess=self._postprocess,
                put_away=self.maybe_free_model_hooks,
            ),
            output_type=call.stock["output_type"],
            includes_plain=call.options.include_plain,
        )

    def _postprocess(self, images: Tensor, output_type: str) -> Any:
        """Images in [0, 1] in the form asked for, by the stock image processor."""
        return self.image_processor.postprocess(
            images, output_type=output_type, do_denormalize=[False] * len(images)
        )

    def _reward_of(self, given: Any) -> CheckedReward:
        """The reward of this call, checked at every answer."""
        reward = search_reward(self.reward_model if given is None else given)
        if given is None:
            self.reward_model = reward  # a name is looked up once
        return functools.partial(call_reward, reward)

    @property
    def ige_refiner(self) -> Refiner:
        """What refines `ige` by searches with `online_ige=True`, and remembers what they observed.

        A new one for each head. Assign `Refiner(pipe.ige, RefinementSettings(...))` to set how it
        learns.

        Raises:
            ConfigError: the pipeline has no head.
        """
        if self.ige is None:
            raise ConfigError(
                "this pipeline has no information gain evaluator to refine: load it with ige=..."
            )
        if self._refiner is None or self._refiner.head is not self.ige:
            self._refiner = Refiner(self.ige)
        return self._refiner

    @ige_refiner.setter
    def ige_refiner(self, refiner: Refiner) -> None:
        if refiner.head is not self.ige:
            raise ConfigError("that refiner is of another head: make it of pipe.ige")
        self._refiner = refiner

    def _check_online(self, options: SearchOptions) -> None:
        """Refuse to refine a head that is not there, or that reads what the network has not."""
        if not options.online_ige:
            return
        if self.ige is None:
            raise ConfigError(
                "online_ige=True refines the pipeline's information gain evaluator, and it has "
                "none: load it with ige=..., or leave online_ige out"
            )
        self._check_ige(self.ige)

    def _refine(self, world: World, results: Sequence[SearchResult]) -> IGEUpdate:
        """Let the head learn from what searches that have ended observed; later ones ask it."""
        refiner = self.ige_refiner
        observed = 0
        for image, result in enumerate(results):
            if result.stop_reason not in ("interrupted", "error"):
                observed += refiner.collect(world.observe(result.tree, image))
        return refiner.update(observed)

    def _feature_decoder_of(self, method: str | None) -> FeatureDecoder | None:
        """The decoder of features where the fusion asks for one, on the device of the search.

        Raises:
            ConfigError: it was trained on another kind of pipeline.
        """
        decoder = self.feature_decoder
        if method != "features" or decoder is None:
            return None
        if isinstance(decoder, FeatureToLatent):
            decoder.check_family(self.stock_class.__name__)
            decoder.to(self._execution_device)
        return decoder

    @contextmanager
    def _stepping(self, scheduler: SchedulerMixin) -> Iterator[None]:
        """Let the stock code see the scheduler of the search as its own, for a while."""
        own = self.__dict__["scheduler"]
        self.__dict__["scheduler"] = scheduler  # past __setattr__, which rewrites the config
        try:
            yield
        finally:
            self.__dict__["scheduler"] = own

    def _check_call(self, stock: dict[str, Any]) -> None:
        """Fill in what a call leaves open, and refuse by the stock code what cannot work."""
        needed = set(self._get_signature_keys(self)[0]) - set(self._optional_components)
        if lacking := sorted(name for name in needed if getattr(self, name) is None):
            raise ConfigError(
                f"the pipeline has no {' and no '.join(lacking)}: load it with {lacking[0]}=..."
            )
        self._fill_in(stock)
        for name, given in stock.items():
            if isinstance(getattr(type(self), name, None), property):
                setattr(self, f"_{name}", given)  # as the stock call does
        self._interrupt = False
        with as_config_errors():
            self._check_inputs(stock)
        check_latents(stock, self._latent_shape(stock))
        check_denoiser(
            self._denoiser,
            {name: getattr(self, name, None) for name in ("vae", "preview_vae")},
            self._latent_channels,
            self._execution_device,
        )

    @property
    def _denoiser(self) -> Any:
        """The component that denoises, under any of its names."""
        parts = [getattr(self, name, None) for name in ("unet", "transformer")]
        return next((part for part in parts if part is not None), None)

    def _check_inputs(self, stock: dict[str, Any]) -> None:
        """Check by the stock ``check_inputs``; what it is not given it looks for nowhere."""
        names = inspect.signature(self.check_inputs).parameters
        self.check_inputs(**{name: stock.get(name) for name in names})

    # What a family says of its stock pipeline

    def _lacks(self, method: str) -> NotImplementedError:
        """The error of a family that leaves out what every family must say."""
        return NotImplementedError(
            f"{type(self).__name__} has no method {method}, which every family needs: "
            "docs/extending.md shows what it answers"
        )

    def _fill_in(self, stock: dict[str, Any]) -> None:
        """Fill in the size, and what else the stock call fills in before it checks anything."""
        raise self._lacks("_fill_in")

    def _latent_shape(self, stock: dict[str, Any]) -> tuple[int, ...]:
        """Shape of all images' latents, as the stock ``prepare_latents`` draws them."""
        raise self._lacks("_latent_shape")

    def _set_timesteps(self, stock: dict[str, Any]) -> None:
        """Prepare ``self.scheduler``, as the stock call does."""
        raise self._lacks("_set_timesteps")

    def _prepare(
        self, stock: dict[str, Any], prompts_per_call: int, draws: int | None = None
    ) -> Prepared:
        """Encode the prompts, ``prompts_per_call`` at once, and draw the first noise.

        ``draws`` latents are drawn, one an image where it is ``None``.
        """
        raise self._lacks("_prepare")

    # What a family may say of it

    @property
    def _latent_channels(self) -> int | None:
        """Channels of latents as decoders take them; ``None`` where that is not checked."""
        return None

    def _default_rows_per_call(self, stock: dict[str, Any]) -> int:
        """Latents in a call: 8 of up to 4096 numbers on a CPU, else 1; elsewhere 8 times that."""
        rows = 8 if math.prod(self._latent_shape(stock)[1:]) <= 4096 else 1
        return rows if self._execution_device.type == "cpu" else 8 * rows

    def _check_safety(self, images: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Do to images in [0, 1] what the stock pipeline does last: the safety checker's verdict.

        ``None`` where no checker looked.
        """
        return images, None

    def _as_latents(self, latents: Tensor, decoder: Decoder) -> Tensor:
        """Finished samples as the stock pipeline returns them for ``output_type="latent"``."""
        return latents

    def _feature_channels(self) -> dict[str, int]:
        """What `LatentEnvironment.features` will give: names, and numbers of features of each.

        Without any no information gain evaluator can be used.
        """
        return {}

    # Recipes and estimates

    @torch.no_grad()
    def replay(
        self,
        recipe: Recipe,
        latents: Tensor | None = None,
        *,
        previews: bool = False,
        **arguments: Any,
    ) -> ReplayOutput:
        r"""Make the picture of a recipe again, bit for bit on the same machine and versions.

        It costs what the picture's own ancestry cost, not what the search did.

        Args:
            recipe (`dict`):
                As `out.search[0].recipe` gives it, or `read_recipe` from a PNG file.
            latents (`torch.Tensor`, *optional*):
                First noise of this image, one row, as it was passed to the call; needed where the
                call did not draw it from a fresh generator.
            previews (`bool`, *optional*, defaults to `False`):
                Whether to return pictures of the denoised estimate along the path too.
            arguments (*optional*):
                What the call was given that no recipe can hold, such as `prompt_embeds` or
                `ip_adapter_image`.

        Returns:
            [`ReplayOutput`]: the picture, its reward where the pipeline has one, and the previews.

        Raises:
            ConfigError: the recipe is of another pipeline or incomplete, or its first noise differs
                from the one at hand.
        """
        check_recipe(recipe, self.stock_class.__name__)
        needs_noise = needs_first_noise(recipe)
        world = self.world_of(recipe, latents, needs_noise=needs_noise, **arguments)
        environment, moves = world.environment, recipe["moves"]
        path = retrace(environment, moves)
        images, _ = self._check_safety(environment.images(path[-1]))
        output = ReplayOutput(
            images=self._postprocess(images, "pil"),
            latents=environment.denoised(path[-1])[0].cpu(),
            reward=None if world.reward is no_reward else float(environment.reward(path[-1])[0]),
            nfe=environment.ledger.total.nfe,
        )
        if previews:
            places = evaluated_places(moves, environment.num_steps)
            handles = np.concatenate([path[place] for place in places])
            shown, _ = self._check_safety(environment.previews(handles))
            output.previews = self._postprocess(shown, "pil")
            output.step_indices = [step_indices(moves)[place] for place in places]
            output.places = places
        self.maybe_free_model_hooks()
        return output

    @torch.no_grad()
    def world_of(
        self,
        recipe: Recipe,
        latents: Tensor | None = None,
        *,
        reward_model: Any = None,
        needs_noise: bool = True,
        **arguments: Any,
    ) -> World:
        r"""Set up the world of a recipe's call again, for its image alone and with nothing in it.

        Args:
            recipe (`dict`):
                As for [`~MCTDPipeline.replay`]; its moves are not made.
            latents (`torch.Tensor`, *optional*):
                The same.
            reward_model (*optional*, defaults to the pipeline's own):
                What scores finished samples, as in a call.
            needs_noise (`bool`, *optional*, defaults to `True`):
                Whether the call's own first noise will be asked for.
            arguments (*optional*):
                As for [`~MCTDPipeline.replay`].

        Returns:
            [`World`]: whose `environment` numbers the image 0.

        Raises:
            ConfigError: as for [`~MCTDPipeline.replay`].
        """
        stock = recipe_stock(
            recipe, self.stock_class.__name__, stock_defaults(type(self)), arguments
        )
        noise = first_noise_of(recipe, is_drawn=latents is None and needs_noise)
        stock |= {"latents": latents, "generator": noise.generator}
        self._check_call(stock)
        has_reward = reward_model is not None or self.reward_model is not None
        reward = self._reward_of(reward_model) if has_reward else no_reward
        scheduler = recipe_scheduler(recipe)
        with self._stepping(scheduler), as_config_errors():
            self._set_timesteps(stock)
            stepper = Stepper(scheduler, eta=stock.get("eta", 0.0))
            prepared = self._prepare(stock, recipe["prompts_per_call"], noise.draws)
        first = prepared.first_latents[noise.position : noise.position + 1]
        if needs_noise:
            check_first_noise(recipe, first[0])
        feature_decoder = self._feature_decoder_of(fusion_method_again(recipe))
        return world_again(
            recipe,
            replace(prepared, first_latents=first),
            stepper=stepper,
            scheduler=scheduler,
            reward=reward,
            fusing=fusing_again(recipe, prepared, feature_decoder),
            feature_decoder=feature_decoder,
        )

    @torch.no_grad()
    def estimate(self, *args: Any, **kwargs: Any) -> Estimate:
        r"""Say what a call is going to cost, from a few measured rows and before any search.

        Args:
            args:
                The arguments of the call. Its generators are left as they are.
            kwargs:
                The same.

        Returns:
            [`Estimate`]: NFE, seconds, memory and the price list; seconds do not count model
            loading and are about right for searches that value every evaluated sample, an upper
            bound for others.

        Raises:
            ConfigError: as the call would.
        """
        stock, options = bound_arguments(self, args, kwargs)
        if options.search is None:
            raise ConfigError(
                "estimate() is about searches: name one, search=None costs one sample"
            )
        stock["generator"] = torch.Generator().manual_seed(0)
        world, strategy = self._set_up(stock, options)
        estimate = estimate_of(world, strategy, options)
        self.maybe_free_model_hooks()
        return estimate

    @torch.no_grad()
    def open_world(
        self,
        *args: Any,
        reads_features: bool = False,
        feature_decoder: FeatureDecoder | None = None,
        **kwargs: Any,
    ) -> World:
        r"""Set up the world of a call, to denoise in it by hand; nothing is searched.

        Args:
            args:
                The arguments of the call.
            reads_features (`bool`, *optional*, defaults to `False`):
                Whether its environment keeps features of the samples.
            feature_decoder (`FeatureDecoder`, *optional*):
                Such as a [`FeatureToLatent`], for fusions of features; its environment then keeps
                maps of features.
            kwargs:
                The arguments of the call.

        Returns:
            [`World`]: whose `environment` numbers the images from 0.

        Raises:
            ConfigError: as the call would.
        """
        stock, options = bound_arguments(self, args, kwargs)
        world, _ = self._set_up(stock, replace(options, search="best_of_n"))
        return replace(world, reads_features=reads_features, feature_decoder=feature_decoder)

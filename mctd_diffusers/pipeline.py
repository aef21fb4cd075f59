"""MCTDPipeline: what every family adds to its stock pipeline.

A family subclasses this base and the stock pipeline of its models, so that prompts, LoRA, IP
adapters, offload and safety are the stock pipeline's own code. The base reads and writes folders
that stay stock, and turns one call into a search: `families/` says how its network is called and
its latents are decoded, `denoising/` makes a world of that, `search/` searches it.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
import json
import logging
import math
import os
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from huggingface_hub import CommitInfo, snapshot_download
from PIL import Image
from torch import Tensor

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
    decoder_channels,
    digest_of_head,
    fusion_method_of,
    fusion_parts_of,
    nfe_allowed,
    plain_sample_of,
    recipe_of_fusion,
    reward_prompts_of,
    stride_parts_of,
    with_head_or_without,
)
from mctd_diffusers.denoising.denoiser import Calls, Chunk
from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.denoising.fusing import NO_FUSION, FusionParts
from mctd_diffusers.denoising.protocols import (
    CheckedReward,
    Decoder,
    FeatureDecoder,
    RewardFn,
)
from mctd_diffusers.denoising.scheduler_names import check_fits, levels_of_model, scheduler_from
from mctd_diffusers.denoising.schedulers import check_scheduler
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError, SearchError, UnsupportedSchedulerError
from mctd_diffusers.hub import (
    CARD,
    HUB_ARGUMENTS,
    documents_beside,
    hub_errors,
    push_folder,
    repository_of,
)
from mctd_diffusers.models.feature_decoder import FeatureToLatent
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.models.refining import IGEUpdate, Refiner
from mctd_diffusers.pipeline_folder import (
    FEATURE_DECODER,
    FEATURE_FOLDER,
    IGE_FOLDER,
    OUR_FOLDERS,
    OUR_KEY,
    PREVIEW_FOLDER,
    REWARD_FOLDER,
    dtype_of,
    parts_beside,
    parts_of,
    pipeline_card,
    read_model_index,
    resolve_ige,
    restore_reward,
    saved_as,
)
from mctd_diffusers.results import (
    Estimate,
    ImageSearch,
    MCTDPipelineOutput,
    PlainSamples,
    Recipe,
    ReplayOutput,
    bytes_of,
    check_recipe,
    first_draws,
    makers_of,
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
    FIRST_DRAW,
    REJECTED,
    Action,
    Handles,
    Ledger,
    Prices,
    Seeds,
)
from mctd_diffusers.search.log import SearchLog
from mctd_diffusers.search.runner import (
    Finished,
    SearchResult,
    Strategy,
    Wave,
    check_budget,
    run_search,
)
from mctd_diffusers.search.saving import load_search
from mctd_diffusers.search.seeding import root_seed_of
from mctd_diffusers.search.strategies import STRATEGIES, BestOfN
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

_AS_SAVED: Any = object()
"""Default of ``reward_model`` and ``ige`` in `from_pretrained`: what was saved, if anything."""


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
        reward_model: Any = _AS_SAVED,
        ige: Any = _AS_SAVED,
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
        folder = Path(source)
        ours = index.get(OUR_KEY)
        if ours is None:  # a folder that a script put together; ours always have the key
            ours = parts_beside(folder)
        if not isinstance(ours, dict):
            raise ConfigError(
                f"{OUR_KEY} in model_index.json of {source!r} is {ours!r}, not an object: take the "
                f"entry out, and pass reward_model=..."
            )
        reward_is_saved = reward_model is _AS_SAVED and "reward_model" in ours
        preview_is_saved = "preview_vae" not in kwargs and "preview_vae" in ours
        ige_is_saved = ige is _AS_SAVED and "ige" in ours
        saved = [REWARD_FOLDER] * reward_is_saved + [PREVIEW_FOLDER] * preview_is_saved
        saved += [IGE_FOLDER] * ige_is_saved + [FEATURE_FOLDER] * ("feature_decoder" in ours)
        if folder.is_dir():
            parts = [name for name in parts_of(index) if name not in kwargs] + saved
            if lacking := [name for name in parts if not (folder / name).is_dir()]:
                raise ConfigError(
                    f"the pipeline in {source!r} lacks {', '.join(lacking)}, which its "
                    "model_index.json names: copy or download the whole folder again, or pass "
                    "these parts"
                )
        if saved and not folder.is_dir():
            patterns = [f"{name}/*" for name in saved]
            with hub_errors("load the pipeline of", source, hub.get("revision")):
                folder = Path(snapshot_download(source, allow_patterns=patterns, **hub))
        if ige_is_saved:
            ige = InformationGainEvaluator.from_pretrained(
                folder / IGE_FOLDER, **saved_as(folder / IGE_FOLDER, kwargs)
            )
        elif ige is _AS_SAVED:
            ige = None
        elif ige is not None:
            elsewhere = {name: given for name, given in hub.items() if name != "revision"}
            ige = resolve_ige(ige, dtype=dtype_of(IGE_FOLDER, kwargs), **elsewhere)
        if ige is not None:
            ige.check_family(family.stock_class.__name__)
        kwargs["ige"] = ige
        if reward_is_saved:
            reward_model = restore_reward(folder / REWARD_FOLDER, ours["reward_model"])
        elif reward_model is _AS_SAVED:
            reward_model = None
        elif reward_model is not None:
            reward_model = resolve_reward(reward_model)
        if preview_is_saved:
            kwargs["preview_vae"] = AutoencoderTiny.from_pretrained(
                folder / PREVIEW_FOLDER, **saved_as(folder / PREVIEW_FOLDER, kwargs)
            )
        pipe: MCTDPipeline = super(MCTDPipeline, family).from_pretrained(source, **kwargs)
        pipe.reward_model = reward_model
        if FEATURE_FOLDER in saved:
            pipe.feature_decoder = FeatureToLatent.from_pretrained(folder / FEATURE_FOLDER)
        if kwargs.get("device_map") is not None:
            for part in (kwargs["preview_vae"] if preview_is_saved else None, ige):
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
        for path in Path(save_directory).glob("*/config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            drop = {"_name_or_path"}
            if config.get("_class_name") == "AutoencoderTiny":
                drop.add("block_out_channels")  # it writes this itself, and warns when it reads it
            if drop & set(config):
                kept = {name: entry for name, entry in config.items() if name not in drop}
                text = json.dumps(kept, indent=2, sort_keys=True)
                path.write_text(text + "\n", encoding="utf-8")

    def to_json_string(self) -> str:
        """Return ``model_index.json``: the stock one, with our entries under a private key."""
        index: dict[str, Any] = json.loads(super().to_json_string())
        index["_class_name"] = self.stock_class.__name__
        index.pop("_name_or_path", None)
        ours: dict[str, Any] = {}
        for name in (PREVIEW_FOLDER, IGE_FOLDER):
            part = index.pop(name, None)
            if part and part[0] is not None:
                ours[name] = part
        if type(self.reward_model) is ClipReward:
            ours["reward_model"] = {"kind": "clip", "scale": self.reward_model.scale}
        if isinstance(self.feature_decoder, FeatureToLatent):
            ours["feature_decoder"] = FEATURE_DECODER
        index[OUR_KEY] = ours
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write ``model_index.json``, which spares stock users the download of our parts.

        Stock diffusers downloads the weights in all folders of a repository, whether the index
        names them or not, but for the files under its key ``_ignore_files``.
        """
        path = Path(json_file_path)
        index: dict[str, Any] = json.loads(self.to_json_string())
        files = [
            f"{folder}/{file.name}"
            for folder in OUR_FOLDERS
            for file in sorted((path.parent / folder).glob("*"))
        ]
        if files:
            index["_ignore_files"] = files
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    # Searching

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """The body of every family's ``__call__``."""
        stock, options = self._bound(args, kwargs)
        if options.search is None:
            return self._plain_call(stock, options)
        return self._search_call(stock, options)

    def _plain_call(self, stock: dict[str, Any], options: SearchOptions) -> Any:
        """The stock pipeline, with its output in our form."""
        named = [
            option.name
            for option in fields(options)
            if option.name != "search" and getattr(options, option.name) != option.default
        ]
        if named:
            raise ConfigError(
                f"search=None is the stock pipeline, which knows no {', '.join(named)}: leave "
                f"{'it' if len(named) == 1 else 'them'} out, or name a search "
                f"({', '.join(sorted(STRATEGIES))})"
            )
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
            output = self._output(world, stock, options, results)
            if refines:
                output.ige_update = self._refine(world, results[: len(world.prompts)])
        except SearchError as error:
            if saver is not None and error.partial:
                saver.save_results(error.partial)
            error.partial = error.partial and self._output(world, stock, options, error.partial)
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
        check_stock(opened.call.stock, self._stock_defaults())
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
            saved, self.stock_class.__name__, self._stock_defaults(), arguments
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
        fusing = self._fusing_again(settings, prepared)
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
            fusing=fusing,
            feature_decoder=self._feature_decoder_of(fusing.method),
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
        check_stock(stock, self._stock_defaults())
        self._check_call(stock)
        prompts = reward_prompts_of(stock, options)
        draws = first_draws(stock, len(prompts))
        reward = self._reward_of(options.reward_model)
        scheduler = self._scheduler_of(options.search_scheduler)
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

    def _output(
        self,
        world: World,
        stock: dict[str, Any],
        options: SearchOptions,
        results: Sequence[SearchResult],
    ) -> MCTDPipelineOutput:
        """The output of what was found: of each image the best sample, or the plain one."""
        count = len(world.prompts)
        plains: Sequence[SearchResult | None] = results[count:] or [None] * count
        searches = [
            self._image_search(world, searched, plain)
            for searched, plain in zip(results[:count], plains, strict=True)
        ]
        winners = [search.winner for search in searches]
        images, nsfw = self._pictures(world, winners, stock["output_type"])
        plain_samples = None
        if options.include_plain:
            plain = [plain_sample_of(result) for result in results[-count:]]
            plain_samples = PlainSamples(
                self._pictures(world, plain, stock["output_type"])[0],
                [None if sample is None else sample.reward for sample in plain],
            )
        return MCTDPipelineOutput(
            images=images,
            rewards=[search.best_reward for search in searches],
            nfe=[search.spent.nfe for search in searches],
            search=searches,
            ledger=world.settled_ledger(),
            nsfw_content_detected=nsfw,
            plain=plain_samples,
        )

    def _image_search(
        self, world: World, searched: SearchResult, plain: SearchResult | None
    ) -> ImageSearch:
        """What was found of one image; among equals the search's own sample wins."""
        winning, spent = searched, searched.spent
        if plain is not None:
            spent = spent + plain.spent
            best, other = searched.best, plain.best
            if other is not None and (best is None or other.reward > best.reward):
                winning = plain
        handles = np.array([sample.handle for sample in searched.finished], dtype=np.int64)
        latents = world.prepared.first_latents[:0]
        if len(handles):
            latents = world.environment.denoised(handles)
        return ImageSearch(
            result=searched,
            winner=winning.best,
            winner_tree=winning.tree,
            spent=spent,
            scheduler=type(world.scheduler).__name__,
            settings=world.recipe_settings(searched.problem),
            latents=latents.cpu(),
            decode=functools.partial(
                self._decoded,
                world.prepared.decoder,
                latents.device,
                world.environment.ledger.rows_by_phase.get("decode", [world.rows_per_call])[-1],
            ),
        )

    def _pictures(
        self, world: World, samples: Sequence[Finished | None], output_type: str
    ) -> tuple[Any, list[bool] | None]:
        """Pictures of finished samples in the form asked for, and what the safety checker says."""
        handles = np.array([s.handle for s in samples if s is not None], dtype=np.int64)
        if not len(handles):
            return [None] * len(samples), None
        nsfw: list[bool] | None = None
        if output_type == "latent":
            pictures = self._as_latents(world.environment.denoised(handles), world.prepared.decoder)
        else:
            images, nsfw = self._check_safety(world.environment.images(handles))
            pictures = self._postprocess(images, output_type)
        if len(handles) == len(samples):
            return pictures, nsfw
        each, flags = iter(pictures), iter(nsfw or [])
        found = [None if s is None else next(each) for s in samples]
        return found, nsfw and [s is not None and next(flags) for s in samples]

    @torch.no_grad()
    def _decoded(
        self, decoder: Decoder, device: torch.device, rows_per_call: int, latents: Tensor
    ) -> list[Image.Image]:
        """Finished latents as pictures, in calls of the same size as in the search."""

        def decode(chunk: Chunk) -> Tensor:
            return decoder(chunk.fill(latents[chunk.rows]).to(device))

        pictures: list[Image.Image] = []
        for chunk, images in Calls(rows_per_call, Ledger(), device).make(
            "decode", len(latents), decode
        ):
            pictures += self._postprocess(self._check_safety(images[: chunk.useful])[0], "pil")
        self.maybe_free_model_hooks()
        return pictures

    def _postprocess(self, images: Tensor, output_type: str) -> Any:
        """Images in [0, 1] in the form asked for, by the stock image processor."""
        return self.image_processor.postprocess(
            images, output_type=output_type, do_denormalize=[False] * len(images)
        )

    def _reward_of(self, given: Any) -> CheckedReward:
        """The reward of this call, checked at every answer."""
        reward = self.reward_model if given is None else given
        if reward is None:
            raise ConfigError(
                "a search needs a reward and this pipeline has none; paste one of:\n"
                '    pipe.reward_model = "clip"  # or "pickscore", "embedded", a CLIPModel folder\n'
                "    pipe.reward_model = lambda images, prompts: images.mean(dim=(1, 2, 3))\n"
                "or call with reward_model=..., or with search=None for a plain sample"
            )
        reward = resolve_reward(reward)
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

    def _fusing_again(self, settings: dict[str, Any], prepared: Prepared) -> FusionParts:
        """What the fusions of a recipe, or of a saved call, ask for.

        Raises:
            ConfigError: the decoder of features is another than then.
        """
        said = settings.get("fusion")
        if said is None:
            return NO_FUSION
        decoder = self._feature_decoder_of(said["method"])
        fusing = fusion_parts_of(said["method"], prepared, decoder, said["map_block"])
        if recipe_of_fusion(fusing, decoder) != said:
            raise ConfigError(
                f"the search fused features by the decoder {said['feature_decoder']} of block "
                f"{said['map_block']}, here it is {recipe_of_fusion(fusing, decoder)}: set "
                "pipe.feature_decoder to that one, or to None where there was none"
            )
        return fusing

    def _scheduler_of(self, given: Any) -> SchedulerMixin:
        """A copy of the scheduler to search with.

        Raises:
            UnsupportedSchedulerError: the one named explicitly cannot be branched, or is for models
                of another kind.
            ConfigError: what is named is no scheduler.
        """
        if given is not None:
            if not isinstance(given, SchedulerMixin):
                raise ConfigError(
                    f"search_scheduler={given!r} is a {type(given).__name__}: pass a scheduler, "
                    "such as DDIMScheduler.from_config(pipe.scheduler.config)"
                )
            check_fits(given, self.scheduler.config)
            check_scheduler(given)
            return copy.deepcopy(given)
        try:
            check_scheduler(self.scheduler)
        except UnsupportedSchedulerError as error:
            config = self.scheduler.config
            is_flow = levels_of_model(config) == "flow"
            kind = FlowMatchEulerDiscreteScheduler if is_flow else DDIMScheduler
            scheduler: SchedulerMixin = scheduler_from(kind, config)
            check_scheduler(scheduler)
            warnings.warn(
                f"{type(self.scheduler).__name__} cannot be branched, so the search steps a "
                f"{kind.__name__} made from its config ({str(error).splitlines()[0]}); name one "
                "with search_scheduler=... to choose it yourself",
                stacklevel=7,
            )
            return scheduler
        return copy.deepcopy(self.scheduler)

    @contextmanager
    def _stepping(self, scheduler: SchedulerMixin) -> Iterator[None]:
        """Let the stock code see the scheduler of the search as its own, for a while."""
        own = self.__dict__["scheduler"]
        self.__dict__["scheduler"] = scheduler  # past __setattr__, which rewrites the config
        try:
            yield
        finally:
            self.__dict__["scheduler"] = own

    def _bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], SearchOptions]:
        """The stock arguments of a call, defaults filled in, and ours.

        Raises:
            ConfigError: the call knows no argument of that name.
        """
        signature = inspect.signature(type(self).__call__)
        self._check_names(kwargs, list(signature.parameters))
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        stock = {name: given for name, given in bound.arguments.items() if name != "self"}
        ours = {field.name: stock.pop(field.name) for field in fields(SearchOptions)}
        return stock | stock.pop("kwargs", {}), SearchOptions(**ours)

    def _check_names(self, given: Iterable[str], known: Sequence[str]) -> None:
        """Refuse arguments that the call does not know; stock pipelines drop them silently."""
        deprecated = ("callback", "callback_steps") if "kwargs" in known else ()
        for name in set(given) - set(known) - set(deprecated):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise ConfigError(f"{name!r} is no argument of {type(self).__name__}: {hint}")

    def _stock_defaults(self) -> dict[str, Any]:
        """Defaults of the arguments of the stock call."""
        ours = {"self", "kwargs", *(option.name for option in fields(SearchOptions))}
        parameters = inspect.signature(type(self).__call__).parameters
        return {name: each.default for name, each in parameters.items() if name not in ours}

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
        self._check_denoiser()

    def _check_denoiser(self) -> None:
        """Refuse a denoiser that the decoders do not fit, or that is in half precision on a CPU."""
        denoiser = next((part for part in self._denoisers if part is not None), None)
        for name in ("vae", "preview_vae"):
            config = getattr(getattr(self, name, None), "config", {})
            given, wanted = decoder_channels(config), self._latent_channels
            if None not in (given, wanted) and given != wanted:
                raise ConfigError(
                    f"the {name} decodes latents of {given} channels, and the "
                    f"{type(denoiser).__name__} denoises latents of {wanted}: load the {name} of "
                    "the same model"
                )
        on_cpu = self._execution_device.type == "cpu"
        if on_cpu and getattr(denoiser, "dtype", None) == torch.float16:
            raise ConfigError(
                f"the {type(denoiser).__name__} is in float16 on the CPU, which diffusers supports "
                "on accelerators alone: pipe.to(dtype=torch.float32), or bfloat16, or move the "
                "pipeline to an accelerator"
            )

    @property
    def _denoisers(self) -> list[Any]:
        """The component that denoises, under any of its names."""
        return [getattr(self, name, None) for name in ("unet", "transformer")]

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
        moves = recipe["moves"]
        needs_noise = any(move["seed"] == FIRST_DRAW for move in moves)
        world = self.world_of(recipe, latents, needs_noise=needs_noise, **arguments)
        _check_length(moves, world.stepper.num_steps)
        environment = world.environment
        path = _retrace(environment, moves)
        images, _ = self._check_safety(environment.images(path[-1]))
        output = ReplayOutput(
            images=self._postprocess(images, "pil"),
            latents=environment.denoised(path[-1])[0].cpu(),
            reward=None if world.reward is _no_reward else float(environment.reward(path[-1])[0]),
            nfe=environment.ledger.total.nfe,
        )
        if previews:
            places = _evaluated_places(moves, environment.num_steps)
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
        stock = recipe_stock(recipe, self.stock_class.__name__, self._stock_defaults(), arguments)
        first_draw = recipe["first_draw"]
        draws, position, seed = 1, 0, 0
        if latents is None and needs_noise:
            if first_draw is None:
                raise ConfigError(
                    "the first noise of this recipe was not drawn from a fresh generator: pass it "
                    "as latents=..., or make recipes with "
                    "generator=torch.Generator().manual_seed(...)"
                )
            draws, position, seed = (first_draw[name] for name in ("batch", "position", "seed"))
        device = "cpu" if first_draw is None else first_draw["device"]
        stock |= {"latents": latents, "generator": torch.Generator(device).manual_seed(seed)}
        self._check_call(stock)
        has_reward = reward_model is not None or self.reward_model is not None
        reward = self._reward_of(reward_model) if has_reward else _no_reward
        scheduler = recipe_scheduler(recipe)
        with self._stepping(scheduler), as_config_errors():
            self._set_timesteps(stock)
            stepper = Stepper(scheduler, eta=stock.get("eta", 0.0))
            prepared = self._prepare(stock, recipe["prompts_per_call"], draws)
        first = prepared.first_latents[position : position + 1]
        root_seed = root_seed_of(bytes_of(first[0]))
        if needs_noise and root_seed != recipe["root_seed"]:
            raise ConfigError(
                f"the recipe's search had root seed {recipe['root_seed']}, the first noise here "
                f"gives {root_seed}: load the model with dtype {recipe['dtype']} on "
                f"{recipe['device']}, or pass the first noise as latents=..."
            )
        fusing = self._fusing_again(recipe, prepared)
        return World(
            prepared=replace(prepared, first_latents=first),
            stepper=stepper,
            scheduler=scheduler,
            reward=reward,
            prompts=[recipe["reward_prompt"]],
            rows_per_call=recipe["rows_per_call"],
            rows_by_phase=recipe.get("rows_by_phase", {}),
            half_latents=recipe.get("half_latents", False),
            settings=[recipe],
            prices=Prices(),
            with_plain=False,
            fusing=fusing,
            feature_decoder=self._feature_decoder_of(fusing.method),
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
        stock, options = self._bound(args, kwargs)
        if options.search is None:
            raise ConfigError(
                "estimate() is about searches: name one, search=None costs one sample"
            )
        stock["generator"] = torch.Generator().manual_seed(0)
        world, strategy = self._set_up(stock, options)
        prices, seconds_per_row = world.measure_prices(), world.seconds_per_row()
        images, calls_per_step = len(world.prompts), world.stepper.calls_per_step
        plain_nfe = world.stepper.num_steps * calls_per_step
        value = (prices.preview + prices.reward_call) / calls_per_step
        finish = (prices.decode + prices.reward_call) / plain_nfe
        cost_per_nfe = world.prepared.network.rows_per_latent + value + finish
        nfe: float = 0
        for budget in call_budgets(world, strategy, options):
            if budget is not None:
                most = math.inf if budget.nfe is None else budget.nfe
                if budget.cost is not None:
                    most = min(most, budget.cost / cost_per_nfe)
                nfe += most * images
        seconds_per_nfe = cost_per_nfe * seconds_per_row
        if options.time_budget_s is not None:
            nfe = max(min(nfe, options.time_budget_s / seconds_per_nfe), plain_nfe * images)
        self.maybe_free_model_hooks()
        return Estimate(
            nfe=math.floor(nfe),
            seconds=nfe * seconds_per_nfe,
            peak_memory_bytes=_peak_memory(world.prepared.first_latents.device),
            seconds_per_row=seconds_per_row,
            prices=prices,
        )

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
        stock, options = self._bound(args, kwargs)
        world, _ = self._set_up(stock, replace(options, search="best_of_n"))
        return replace(world, reads_features=reads_features, feature_decoder=feature_decoder)


def _retrace(environment: LatentEnvironment, moves: Sequence[dict[str, Any]]) -> list[Handles]:
    """Make the samples of moves again; evaluates those alone that later moves need evaluated."""
    evaluated = _evaluated_places(moves, environment.num_steps)
    made: list[Handles] = []
    for place, move in enumerate(moves):
        seeds = np.array([move["seed"]], dtype=np.int64)
        sources = [made[maker] for maker in makers_of(moves, place)]
        match move["move"]:
            case "draw":
                handles = environment.reset(np.zeros(1, dtype=np.int64), seeds)
            case "step":
                action = Action(move["stride"], move["eta"], move.get("guidance"))
                handles = environment.step(sources[0], [action], seeds)
            case "perturb":
                handles = environment.perturb(sources[0], np.array([move["strength"]]), seeds)
            case "fuse":
                handles = _fuse_again(environment, move, np.concatenate(sources), seeds)
            case _:
                handles = environment.renoise(sources[0], move["step_index"], seeds)
        if place in evaluated:
            environment.denoise(handles)
        made.append(handles)
    return made


def _fuse_again(
    environment: LatentEnvironment, move: dict[str, Any], particles: Handles, seeds: Seeds
) -> Handles:
    """Make the fused sample of a recipe again, which was accepted then."""
    weights = np.array(move["weights"], dtype=np.float64)
    guidances = [move.get("guidance")]
    handles = environment.fuse([particles], [weights], [move["method"]], seeds, guidances).handles
    if handles[0] == REJECTED:
        raise ConfigError(
            f"the recipe fuses {len(particles)} samples by {move['method']!r}, which is rejected "
            "here: replay it with the model, the precision and the versions that made it"
        )
    return handles


def _evaluated_places(moves: Sequence[dict[str, Any]], num_steps: int) -> list[int]:
    """Which samples of moves others need evaluated: neither varied ones nor finished ones."""
    indices = step_indices(moves)
    needed = {
        maker
        for place, move in enumerate(moves)
        if move["move"] != "perturb"
        for maker in makers_of(moves, place)
        if indices[maker] < num_steps
    }
    return sorted(needed)


def _check_length(moves: Sequence[dict[str, Any]], num_steps: int) -> None:
    """Refuse moves that do not end in a finished sample."""
    last = step_indices(moves)[-1]
    if last != num_steps:
        raise ConfigError(
            f"the recipe's moves end at step {last} of {num_steps}: take the recipe whole, from "
            "out.search[i].recipe or read_recipe"
        )


def _peak_memory(device: torch.device) -> int:
    """Bytes that the accelerator held at most; on the host, that the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _no_reward(images: Tensor, prompts: Sequence[str], handles: Sequence[int]) -> Any:
    raise AssertionError("a replay without a reward scores nothing")

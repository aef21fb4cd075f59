"""What a call means before anything is searched: options, their checks, and the world they make."""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import FeatureTap, synchronize
from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.denoising.fusing import NO_FUSION, FusionParts, fusion_parts
from mctd_diffusers.denoising.fusion import DEFAULT_FUSION, resolve_fusion
from mctd_diffusers.denoising.gains import (
    NO_STRIDE_PARTS,
    GainHead,
    HeadGains,
    StrideParts,
    stride_parts,
)
from mctd_diffusers.denoising.prices import measure_prices, within_memory
from mctd_diffusers.denoising.protocols import (
    CheckedReward,
    Decoder,
    FeatureDecoder,
    Network,
    Outputs,
)
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import BudgetError, ConfigError, UnsupportedSchedulerError
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.models.observations import Observations, observe
from mctd_diffusers.models.weights import weights_digest
from mctd_diffusers.results import TEXT_ARGUMENTS, bytes_of
from mctd_diffusers.search.budget import REWARD_SPENDS, VALUE_SPENDS, Budget
from mctd_diffusers.search.environment import FIRST_DRAW, Action, Handles, Ledger, Prices
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.pruning import MayPrune
from mctd_diffusers.search.runner import Finished, SearchResult, Strategy
from mctd_diffusers.search.seeding import root_seed_of
from mctd_diffusers.search.settings import is_number
from mctd_diffusers.search.strategies import resolve_strategy
from mctd_diffusers.search.strategies.third_moves import MayFuse
from mctd_diffusers.search.stride_policies import HasStridePolicy
from mctd_diffusers.search.strides import HasLongestStride, PerturbsNoise
from mctd_diffusers.search.tree import STEP, Tree, path_to_root

DEFAULT_COMPUTE = 8
"""Plain samples' worth of NFE for each image, where no budget is named."""
STRATEGY_OPTIONS = ("strides", "stride_policy", "wave_size")
"""Arguments of a call that set the setting of that name in the strategy."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NUMBERS = ("guidance_scale", "true_cfg_scale", "guidance_rescale", "eta")
"""Stock arguments that are a finite number, where a family has them."""


@dataclass(frozen=True)
class SearchOptions:
    """Our arguments of a call.

    Args:
        search (`str` or `Strategy`, *optional*, defaults to `"mctd"`):
            Name of a search, or a strategy object with its settings. `None` is the stock pipeline,
            bit for bit.
        compute (`float`, *optional*, defaults to 8 where no other budget is named):
            Budget for each image, in plain samples: so many times `num_inference_steps` NFE, or
            twice that where the scheduler takes two network calls a step. One NFE is one evaluated
            latent, with guidance two rows through the network.
        nfe_budget (`int`, *optional*):
            The same budget in NFE.
        cost_budget (`float`, *optional*):
            Budget for each image in row-equivalents, decodes and reward calls included, by prices
            that are measured before the search.
        time_budget_s (`float`, *optional*):
            Budget for the whole call, in seconds; every image still finishes one sample.
        reward_model (*optional*, defaults to `self.reward_model`):
            Reward of this call: a callable `(images, prompts) -> floats`, a short name, or the
            folder or repository of a `CLIPModel`.
        reward_prompt (`str` or `list[str]`, *optional*, defaults to `prompt`):
            What the reward reads in place of the prompt.
        strides (`Sequence[int]`, *optional*, defaults to those of the strategy):
            Schedule steps that an edge of the tree may cross; the candidates hold 1.
        fusion (`str`, *optional*, defaults to `None`):
            Whether rollouts may also begin at what several samples fuse into, and how these are
            fused: a method's name (`"x0"`, `"noise"`, `"tokens"`, `"gaussian"`, `"pixel"`,
            `"features"`; the references `"mean"` and `"resample"`) or `"auto"`, the one that
            measured best. `"features"` uses `pipe.feature_decoder` where there is one. `None`
            leaves it to the strategy, and no strategy fuses by default.
        stride_policy (`str`, *optional*, defaults to that of the strategy):
            What chooses the strides: the plan of a rollout (`"budget"`), a rule (`"uniform"`,
            `"fixed:4"`, `"random"`, `"ays"`, `"gits"`, `"x0hat"`), or the pipeline's information
            gain evaluator (`"ige"`, or `"ige:truncation_error"` and others).
        search_scheduler ([`SchedulerMixin`], *optional*, defaults to the pipeline's own):
            Scheduler of the search. Without it a pipeline's scheduler that cannot be branched is
            replaced, with a warning, by DDIM made from its config, or by FlowMatchEuler where the
            model matches flows.
        wave_size (`int`, *optional*, defaults to that of the strategy):
            Nodes chosen on one snapshot of the tree and evaluated together.
        rows_per_call (`int`, *optional*, defaults to what fits the device and the size):
            Latents in every call of the network, the decoders and the reward; shorter batches are
            padded, because pictures are bit-equal at equal numbers only. Where memory runs out
            they are halved; `out.ledger.rows_by_phase` says what was called.
        offload_latents (`bool`, *optional*, defaults to `False`):
            Whether samples wait on the host between calls, so that a search of any size takes no
            more of the accelerator than its calls. It changes no bit.
        half_latents (`bool`, *optional*, defaults to `False`):
            Whether samples of a pipeline in single precision wait in half precision, which halves
            the memory of a search and rounds them, each once. Recipes say so.
        include_plain (`bool`, *optional*, defaults to `False`):
            Whether to score the plain sample too, out of the same budget; the answer is then never
            worse than it, by the searched reward.
        save_to (`str` or `os.PathLike`, *optional*):
            Folder to save the search into while it runs, at its end and at Ctrl-C;
            [`~MCTDPipeline.resume`] goes on from there. Models and rewards are not saved.
        save_every_s (`float`, *optional*, defaults to 60):
            Seconds between two saves, at least; saving takes a tenth of the time at most. 0 saves
            after every wave.
        online_ige (`bool`, *optional*, defaults to `False`):
            Whether the pipeline's information gain evaluator learns from what this search observes,
            once it has ended: this search asks it as it was, later ones as it is then. What is
            predicted worse after an update than before, of images that are never learned from,
            undoes it. `save_pretrained` and `push_to_hub` write it as it is.
    """

    search: str | Strategy | None = "mctd"
    compute: float | None = None
    nfe_budget: int | None = None
    cost_budget: float | None = None
    time_budget_s: float | None = None
    reward_model: Any = None
    reward_prompt: str | list[str] | None = None
    strides: Sequence[int] | None = None
    fusion: str | None = None
    stride_policy: str | None = None
    search_scheduler: SchedulerMixin | None = None
    wave_size: int | None = None
    rows_per_call: int | None = None
    offload_latents: bool = False
    half_latents: bool = False
    include_plain: bool = False
    save_to: str | os.PathLike[str] | None = None
    save_every_s: float = 60.0
    online_ige: bool = False


def configured_strategy(options: SearchOptions) -> Strategy:
    """The strategy that is asked for, with the settings that the call names."""
    strategy = resolve_strategy(options.search)  # type: ignore[arg-type]  # None was sent elsewhere
    named = {
        name: getattr(options, name)
        for name in STRATEGY_OPTIONS
        if getattr(options, name) is not None
    }
    if options.fusion is not None:
        moves = getattr(strategy, "third_moves", ())
        named["fusion"] = DEFAULT_FUSION if options.fusion == "auto" else options.fusion
        named["third_moves"] = moves if "fuse" in moves else (*moves, "fuse")
        resolve_fusion(named["fusion"])
    if not named:
        return strategy
    known: set[str] = {part.name for part in fields(strategy)} if is_dataclass(strategy) else set()
    unknown = sorted(set(named) - known)
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} is no setting of search {strategy.name!r}, which has "
            f"{', '.join(sorted(known)) or 'none'}: leave it out, or use another search"
        )
    return replace(strategy, **named)  # type: ignore[type-var]  # its settings validate themselves


def with_head_or_without(strategy: Strategy, has_head: bool) -> Strategy:
    """The strategy, by its rule without predictions where it asks for a head that is not there."""
    if has_head or not isinstance(strategy, HasStridePolicy) or strategy.policy.kind != "ige":
        return strategy
    rule = type(strategy)().stride_policy
    warnings.warn(
        f"stride_policy={strategy.stride_policy!r} needs an information gain evaluator, and this "
        f"pipeline has none, so the search takes its strides by {rule!r}: load one with ige=...",
        stacklevel=7,
    )
    without: Strategy = replace(cast(Any, strategy), stride_policy=rule)
    return without


def digest_of_head(strategy: Strategy, head: InformationGainEvaluator | None) -> str | None:
    """What tells the head that a strategy asks from others; ``None`` if it asks none."""
    asks = isinstance(strategy, HasStridePolicy) and strategy.policy.asks_head
    return (
        weights_digest(head) if head is not None and (asks or _prunes_by_gain(strategy)) else None
    )


def _prunes_by_gain(strategy: Strategy) -> bool:
    """Whether it gives up what a head predicts cannot win."""
    return isinstance(strategy, MayPrune) and "gain" in strategy.rules


def stride_parts_of(
    strategy: Strategy, stepper: Stepper, head: GainHead | None, rows_per_call: int
) -> StrideParts:
    """What a strategy asks of the world for its stride policy, and for pruning by gain.

    Raises:
        ConfigError: it asks a head, and there is none; or one to prune by, and another model than a
            head to choose strides by.
    """
    parts = NO_STRIDE_PARTS
    if isinstance(strategy, HasStridePolicy):
        strides = strategy.stride_set(stepper.num_steps)
        parts = stride_parts(strategy.policy, strides, stepper, head, rows_per_call)
    if not _prunes_by_gain(strategy) or isinstance(parts.gain_model, HeadGains):
        return parts
    if head is None:
        raise ConfigError(
            "pruning by 'gain' asks an information gain evaluator, and this pipeline has none: "
            "load one with ige=..., or prune by 'bounds'"
        )
    if parts.gain_model is not None:
        policy = getattr(strategy, "stride_policy", None)
        raise ConfigError(
            f"pruning by 'gain' asks a head what jumps tell, and stride_policy {policy!r} asks "
            "something else: use a policy that is planned, or 'ige'"
        )
    return parts._replace(gain_model=HeadGains(head, rows_per_call), reads_features=True)


def fusion_parts_of(
    method: str | None,
    prepared: Prepared,
    feature_decoder: FeatureDecoder | None,
    map_block: str | None = None,
) -> FusionParts:
    """What fusions by a method ask of the world of a call.

    Raises:
        ConfigError: the method cannot work there.
    """
    return fusion_parts(
        method,
        latents=prepared.first_latents,
        decoder=prepared.decoder,
        tap=prepared.features,
        feature_decoder=feature_decoder,
        map_block=map_block,
    )


def recipe_of_fusion(
    fusing: FusionParts, feature_decoder: FeatureDecoder | None
) -> dict[str, Any] | None:
    """What a recipe says of fusions, so that they can be made again; ``None`` without any."""
    if fusing.method is None:
        return None
    return {
        "method": fusing.method,
        "map_block": fusing.map_block,
        "feature_decoder": (
            weights_digest(feature_decoder)
            if isinstance(feature_decoder, torch.nn.Module)
            else None
        ),
    }


def fusion_method_of(strategy: Strategy) -> str | None:
    """The method by which a strategy fuses samples; ``None`` if it fuses none."""
    return strategy.fusion_method if isinstance(strategy, MayFuse) else None


def check_longest_stride(strategy: Strategy, stepper: Stepper, scheduler: SchedulerMixin) -> None:
    """Refuse a search that would step farther than its scheduler can.

    Raises:
        UnsupportedSchedulerError: it says that it would.
    """
    limit = stepper.longest_stride
    if limit is None or not isinstance(strategy, HasLongestStride):
        return
    longest = strategy.longest_stride(stepper.num_steps)
    if longest > limit:
        raise UnsupportedSchedulerError(
            f"{type(scheduler).__name__}, as it is set up, is stepped by strides of {limit} at "
            f"most, and search {strategy.name!r} takes strides of up to {longest}: pass "
            f"strides=({limit},), or a strategy with stride={limit}, or search with another "
            "scheduler, such as search_scheduler=DDIMScheduler.from_config(pipe.scheduler.config)"
        )


def check_perturbed_noise(strategy: Strategy, stepper: Stepper, scheduler: SchedulerMixin) -> None:
    """Refuse a search that would perturb noise which its scheduler does not simply add.

    Raises:
        UnsupportedSchedulerError: it would.
    """
    if not isinstance(strategy, PerturbsNoise):
        return
    share = strategy.perturbed_share(stepper.num_steps)
    if share is None:
        return
    states = map(stepper.initial_state, range(stepper.num_steps))
    if any(math.isnan(stepper.noise_std(state, Action(1, share))) for state in states):
        raise UnsupportedSchedulerError(
            f"search {strategy.name!r} perturbs the noise of its edges, and that of "
            f"{type(scheduler).__name__} is not simply added to samples at a share of {share:g}: "
            "pass a strategy with branch_eta above 0 and below 1, or search with another "
            "scheduler, such as search_scheduler=DDIMScheduler.from_config(pipe.scheduler.config)"
        )


def check_options(options: SearchOptions) -> None:
    """Refuse budgets that contradict each other, and numbers that are not positive."""
    if options.compute is not None and options.nfe_budget is not None:
        raise ConfigError(
            f"compute={options.compute} and nfe_budget={options.nfe_budget} bound the same thing: "
            "give one of them"
        )
    for name in ("compute", "cost_budget", "time_budget_s"):
        given = getattr(options, name)
        if given is not None and not (_is_finite(given) and given > 0):
            raise ConfigError(f"{name}={given!r}: give a finite number above 0")
    for name in ("nfe_budget", "rows_per_call", "wave_size"):
        given = getattr(options, name)
        if given is not None and not _is_count(given):
            raise ConfigError(f"{name}={given!r}: give a whole number of at least 1")
    check_save_every(options.save_every_s)
    strides: Any = options.strides
    if strides is not None and not (
        isinstance(strides, Sequence | np.ndarray) and all(_is_count(stride) for stride in strides)
    ):
        raise ConfigError(
            f"strides={strides!r}: give whole numbers of at least 1, such as (1, 2, 4)"
        )


def check_save_every(seconds: Any) -> None:
    """Refuse what is no time between two saves.

    Raises:
        ConfigError: it is negative, or no finite number.
    """
    if not (_is_finite(seconds) and seconds >= 0):
        raise ConfigError(f"save_every_s={seconds!r}: give seconds, or 0 to save after every wave")


def _is_finite(given: Any) -> bool:
    """Whether what a user gave is a finite number."""
    return is_number(given) and math.isfinite(given)


def _is_count(given: Any) -> bool:
    """Whether what a user gave is a whole number of at least 1."""
    return is_number(given, 1, whole=True)


def check_stock(stock: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Refuse stock arguments that a search cannot follow, or that no stock code checks.

    Args:
        stock: the stock arguments.
        defaults: of the stock call; a number may be ``None`` where its default is.

    Raises:
        ConfigError: one of them is such.
    """
    if stock["num_images_per_prompt"] is None:
        stock["num_images_per_prompt"] = 1
    for name in ("num_inference_steps", "num_images_per_prompt", "height", "width"):
        if not stock[name] and name in ("height", "width"):
            continue  # the family fills them in, as the stock call does
        if not _is_count(stock[name]):
            raise ConfigError(f"{name}={stock[name]!r}: give a whole number of at least 1")
        stock[name] = int(stock[name])
    for name in [number for number in NUMBERS if number in stock]:
        if stock[name] is None and (defaults or {}).get(name, 0) is None:
            continue
        if not _is_finite(stock[name]):
            raise ConfigError(f"{name}={stock[name]!r}: give a finite number")
        stock[name] = float(stock[name])
    generator, latents = stock["generator"], stock["latents"]
    for each in generator if isinstance(generator, list) else [generator]:
        if generator is not None and not isinstance(each, torch.Generator):
            raise ConfigError(f"generator={generator!r}: give a torch.Generator, or a list of them")
    if latents is not None and not isinstance(latents, Tensor):
        raise ConfigError(f"latents are a {type(latents).__name__}: give a tensor")
    if stock.get("timesteps") is not None and stock.get("sigmas") is not None:
        raise ConfigError("timesteps and sigmas both set the schedule: give one of them")
    if stock["output_type"] not in OUTPUT_TYPES:
        raise ConfigError(
            f"output_type={stock['output_type']!r}: choose one of "
            f"{', '.join(map(repr, OUTPUT_TYPES))}"
        )
    prompt, negative = stock["prompt"], stock.get("negative_prompt")
    if isinstance(prompt, list) and (not prompt or not all(isinstance(p, str) for p in prompt)):
        raise ConfigError(f"prompt={prompt!r}: give a string, or a list of at least one string")
    if negative is not None and prompt is not None:
        is_default = negative == (defaults or {}).get("negative_prompt")
        if type(negative) is not type(prompt) and not is_default:
            raise ConfigError(
                f"prompt is a {type(prompt).__name__} and negative_prompt a "
                f"{type(negative).__name__}: give both as strings or both as lists"
            )
    if prompt is None and stock.get("prompt_embeds") is None:
        return  # the stock code says so
    for name, given in stock.items():
        is_for_each = "prompt_embeds" in name or (name in TEXT_ARGUMENTS and type(given) is list)
        if is_for_each and given is not None and len(given) != num_prompts(stock):
            raise ConfigError(
                f"there are {num_prompts(stock)} prompts and {name} has {len(given)}: give one for "
                "each"
            )


def check_latents(stock: dict[str, Any], shape: Sequence[int]) -> None:
    """Refuse first noise of another shape than the stock pipeline draws.

    Args:
        stock: the stock arguments, with their size filled in.
        shape: of all images' latents.

    Raises:
        ConfigError: ``latents`` have another.
    """
    given = None if stock["latents"] is None else tuple(stock["latents"].shape)
    if given not in (None, tuple(shape)):
        raise ConfigError(
            f"latents have shape {given}, expected {tuple(shape)} for "
            f"{stock['height']}x{stock['width']} pixels: pass one row an image"
        )


def decoder_channels(config: Mapping[str, Any]) -> int | None:
    """Channels of latents that an autoencoder decodes, by its config; ``None`` if it is mute."""
    given: int | None = config.get("latent_channels", config.get("z_dim"))
    return given


def num_prompts(stock: dict[str, Any]) -> int:
    """How many prompts a call has, before ``num_images_per_prompt``."""
    if stock["prompt"] is None:
        return len(stock["prompt_embeds"])
    return 1 if isinstance(stock["prompt"], str) else len(stock["prompt"])


def reward_prompts_of(stock: dict[str, Any], options: SearchOptions) -> list[str]:
    """What the reward reads, one an image."""
    texts = stock["prompt"] if options.reward_prompt is None else options.reward_prompt
    count = num_prompts(stock)
    if texts is None:
        raise ConfigError(
            "prompt_embeds hold no text that a reward could read: say it with reward_prompt=..., "
            "or pass reward_prompt='' for a reward that reads none"
        )
    is_list = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    if not is_list:  # a string is a sequence of strings as well
        raise ConfigError(f"reward_prompt={texts!r}: give a string, or a list of strings")
    texts = [texts] * count if isinstance(texts, str) else list(texts)
    if len(texts) != count:
        raise ConfigError(
            f"there are {count} prompts and {len(texts)} reward prompts: give one for each prompt"
        )
    return [text for text in texts for _ in range(stock["num_images_per_prompt"])]


@dataclass(frozen=True)
class Prepared:
    """What a family makes of the stock arguments.

    Attributes:
        network: conditioned on every image.
        decoder: decodes finished samples.
        preview: decodes unfinished ones; ``None`` where there is no preview decoder.
        first_latents: initial noise of each image, by the stock ``prepare_latents``.
        features: a tap on the network's blocks.
        kinds: of each image, where a call of the network may hold images of one kind alone; see
            `Denoiser`.
        prompt_embeds: what the network is told of each image's prompt, for callbacks; ``None``
            where it is no one tensor.
    """

    network: Network
    decoder: Decoder
    preview: Decoder | None
    first_latents: Float[Tensor, "images *sample"]
    features: FeatureTap
    kinds: Sequence[Hashable] | None = None
    prompt_embeds: Float[Tensor, "prompts tokens channels"] | None = None


@dataclass
class _Counted:
    """A callable on batches that counts rows, padding included: what its seconds are shared by."""

    function: Callable[..., Any]
    rows: int = 0

    def __call__(self, batch: Tensor, *rest: Any) -> Any:
        answer = self.function(batch, *rest)
        self.rows += len(batch)
        return answer


@dataclass
class _Folded:
    """A network whose problems count twice: once for the search, once for the plain sample."""

    network: Network
    images: int
    rows_per_latent: int = field(init=False)
    guidance_scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.rows_per_latent = self.network.rows_per_latent
        self.guidance_scale = self.network.guidance_scale

    def __call__(self, latents: Tensor, timesteps: Tensor, problems: Sequence[int]) -> Outputs:
        return self.network(latents, timesteps, [problem % self.images for problem in problems])

    def combine(self, outputs: Outputs, guidance: float | None = None) -> Tensor:
        return self.network.combine(outputs, guidance)


@dataclass(frozen=True)
class World:
    """One call, set up to be searched.

    Attributes:
        prepared: the family's part.
        stepper: over the scheduler of the search.
        scheduler: that scheduler.
        reward: checked.
        prompts: that the reward reads, one an image.
        rows_per_call: latents in every call.
        rows_by_phase: the same for single phases, as for `LatentEnvironment`.
        offloads_latents: whether samples wait on the host.
        half_latents: whether samples of single precision wait in half.
        settings: the shared part of each image's recipes.
        prices: measured beforehand; all 0 where nothing is decided by them.
        with_plain: whether the plain samples are made beside the search, as problems of their own.
        reads_features: whether features of the samples will be asked for.
        feature_decoder: for fusions of features, whose block's maps are then kept.
        strides: what the stride policy of the search asks for.
        head: digest of the weights of the head that the policy asks; ``None`` if it asks none.
        fusing: what the fusions of the search ask for.
    """

    prepared: Prepared
    stepper: Stepper
    scheduler: SchedulerMixin
    reward: CheckedReward
    prompts: list[str]
    rows_per_call: int
    settings: list[dict[str, Any]]
    prices: Prices
    with_plain: bool
    reads_features: bool = False
    feature_decoder: FeatureDecoder | None = None
    strides: StrideParts = NO_STRIDE_PARTS
    head: str | None = None
    fusing: FusionParts = NO_FUSION
    rows_by_phase: Mapping[str, Sequence[int]] = field(default_factory=dict)
    offloads_latents: bool = False
    half_latents: bool = False

    @property
    def keeps_features(self) -> bool:
        """Whether its environment keeps features of the samples."""
        return self.reads_features or self.strides.reads_features

    @property
    def tap(self) -> FeatureTap | None:
        """What its environment reads of the network's blocks."""
        features = self.prepared.features
        decoder = self.feature_decoder
        block = self.fusing.map_block if decoder is None else decoder.block
        if block is not None:
            return features.mapping(block, pools=self.keeps_features)
        return features if self.keeps_features else None

    @functools.cached_property
    def decoder(self) -> Any:
        """The full decoder, counted."""
        return _Counted(self.prepared.decoder)

    @functools.cached_property
    def preview(self) -> Any:
        """The preview decoder, counted."""
        return None if self.prepared.preview is None else _Counted(self.prepared.preview)

    @functools.cached_property
    def counted_reward(self) -> Any:
        """The reward, counted."""
        return _Counted(self.reward)

    @functools.cached_property
    def environment(self) -> LatentEnvironment:
        """The environment over all of it; the same at every access."""
        times = 2 if self.with_plain else 1
        return LatentEnvironment(
            network=_Folded(self.prepared.network, len(self.prompts)),
            stepper=self.stepper,
            decoder=self.decoder,
            preview=self.preview,
            reward=self.counted_reward,
            prompts=self.prompts * times,
            first_latents=torch.cat([self.prepared.first_latents] * times),
            rows_per_call=self.rows_per_call,
            rows_by_phase=self.rows_by_phase,
            prices=self.prices,
            storage="cpu" if self.offloads_latents else None,
            half=self.half_latents,
            features=self.tap,
            gain_model=self.strides.gain_model,
            kinds=self.prepared.kinds and [*self.prepared.kinds] * times,
            fuses=self.fusing.method is not None,
            feature_decoder=self.feature_decoder,
            encoder=self.fusing.encoder,
        )

    def problems(self, budget: Budget, *, first_index: int = 0) -> list[Problem]:
        """One problem an image, each with ``budget``."""
        latents = self.prepared.first_latents
        # Without a preview decoder an unfinished sample is decoded in full to be valued.
        value_spends = VALUE_SPENDS if self.prepared.preview is not None else REWARD_SPENDS
        return [
            Problem(
                index=first_index + i,
                num_steps=self.stepper.num_steps,
                root_seed=root_seed_of(bytes_of(latents[i])),
                budget=budget,
                prices=self.prices,
                rows_per_nfe=self.prepared.network.rows_per_latent,
                calls_per_step=self.stepper.calls_per_step,
                longest_stride=self.stepper.longest_stride,
                guidance_scale=self.environment.guidance_scale,
                value_spends=value_spends,
                fusion_spends=self.fusing.spends,
                stride_costs=self.strides.costs,
            )
            for i in range(len(latents))
        ]

    def features_of(self, handles: Handles) -> dict[str, npt.NDArray[Any]]:
        """Features of evaluated, unfinished samples on the host, ``{name: [samples, channels]}``.

        Only where :attr:`keeps_features` is true.
        """
        features = self.environment.features(handles)
        return {name: rows.float().cpu().numpy() for name, rows in features.items()}

    def observe(self, tree: Tree, image: int) -> Observations:
        """What the search of an image observed of jumps."""

        @functools.cache
        def is_stochastic(step_index: int, stride: int, eta: float | None) -> bool:
            return self.stepper.is_stochastic(step_index, Action(stride, eta))

        return observe(
            tree,
            log_snr=self.stepper.log_snr.double().numpy(),
            features=self.features_of,
            is_stochastic=is_stochastic,
            prompt=self.prompts[image],
            scheduler=type(self.scheduler).__name__,
        )

    def measure_prices(self) -> Prices:
        """The price list, from a few calls of each kind."""
        return measure_prices(
            network=self.prepared.network,
            stepper=self.stepper,
            decoder=self.prepared.decoder,
            preview=self.prepared.preview,
            reward=self.reward,
            prompt=self.prompts[0],
            latents=self.prepared.first_latents[:1],
            rows_per_call=self.rows_per_call,
        )

    def seconds_per_row(self) -> float:
        """Seconds of one row through the network, at the rows of a full call."""
        first, network = self.prepared.first_latents[:1], self.prepared.network

        def measure(size: int) -> float:
            batch = first.expand(size, *first.shape[1:]).contiguous()
            states = [self.stepper.initial_state()] * size
            inputs, timesteps = self.stepper.network_input(batch, states)
            started = time.perf_counter()
            network(inputs, timesteps, [0] * size)
            synchronize(batch.device)
            return (time.perf_counter() - started) / (size * network.rows_per_latent)

        return within_memory(self.rows_per_call, first.device, measure)

    def recipe_settings(self, image: int) -> dict[str, Any]:
        """The part of an image's recipes that they share, with the sizes that calls really had."""
        settings, sizes = self.settings[image], self.environment.ledger.rows_by_phase
        if all(rows == [self.rows_per_call] for rows in sizes.values()):
            return settings
        return settings | {"rows_by_phase": {phase: list(rows) for phase, rows in sizes.items()}}

    def settled_ledger(self) -> Ledger:
        """The ledger when all is done: by image, and with the prices that were really paid."""
        ledger = self.environment.ledger
        for index in sorted(ledger.by_problem):
            if index >= len(self.prompts):
                image = index - len(self.prompts)
                ledger.by_problem[image] = ledger.spent(image) + ledger.by_problem.pop(index)
        rows = ledger.total.rows + ledger.total.padded_rows
        if self.prices != Prices() or not rows:
            return ledger
        row = ledger.seconds["network"] / rows

        def price(phase: str, counted: _Counted | None) -> float:
            if counted is None or not counted.rows:
                return 0.0
            return ledger.seconds.get(phase, 0.0) / counted.rows / row

        ledger.prices = Prices(
            decode=price("decode", self.decoder),
            preview=price("preview", self.preview),
            reward_call=price("reward", self.counted_reward),
        )
        return ledger


@dataclass(frozen=True)
class SearchCall:
    """One call, ready to be searched.

    Attributes:
        world: that it is searched in.
        strategy: of the search, without the plain sample beside it.
        problems: what is searched: images, and then their plain samples where they are made too.
        stock: the stock arguments.
        options: ours.
        seconds: that the search may take; ``None`` without a bound.
    """

    world: World
    strategy: Strategy
    problems: Sequence[Problem]
    stock: dict[str, Any]
    options: SearchOptions
    seconds: float | None


def nfe_allowed(options: SearchOptions, num_steps: int, calls_per_step: int = 1) -> int | None:
    """NFE that a call may spend on each image; ``None`` where another budget bounds it.

    Args:
        options: of the call.
        num_steps: of a plain sample.
        calls_per_step: NFE that a step of it takes at most.

    Raises:
        BudgetError: it is not even one.
    """
    others = (options.nfe_budget, options.cost_budget, options.time_budget_s)
    if options.compute is None and any(other is not None for other in others):
        return options.nfe_budget
    compute = DEFAULT_COMPUTE if options.compute is None else options.compute
    nfe = math.floor(compute * num_steps * calls_per_step + 1e-9)
    if nfe == 0:
        raise BudgetError(
            f"compute={compute} of {num_steps} steps is less than one NFE: give at least "
            "compute=1, the cost of a plain sample"
        )
    return nfe


def call_budgets(
    world: World, strategy: Strategy, options: SearchOptions
) -> tuple[Budget, Budget | None]:
    """What may be spent on each image: by the search, and by its plain sample beside it."""
    num_steps = world.stepper.num_steps
    nfe = nfe_allowed(options, num_steps, world.stepper.calls_per_step)
    budget = Budget(nfe, options.cost_budget)
    if not world.with_plain:
        return budget, None
    account = world.problems(budget)[0].account
    plain = account.price(evaluations=num_steps, rewards=1)
    least = account.price(evaluations=strategy.least_evaluations(num_steps), rewards=1)
    if not account.affords(plain + least):
        needed = [f"{plain.nfe} + {least.nfe} NFE"]
        if budget.cost is not None:
            needed.append(f"{account.prices.cost(plain + least):.4g} row-equivalents in all")
        raise BudgetError(
            f"{budget} cannot pay for the plain sample and one of {strategy.name!r}, which need "
            f"{' and '.join(needed)}: raise the budget, or leave include_plain out"
        )
    if budget.cost is not None:
        budget = replace(budget, cost=budget.cost - account.prices.cost(plain))
    if budget.nfe is not None:
        budget = replace(budget, nfe=budget.nfe - plain.nfe)
    return budget, Budget(plain.nfe)


def plain_sample_of(result: SearchResult) -> Finished | None:
    """The finished sample that the stock loop would make, if the search made it."""
    tree = result.tree
    for sample in result.finished:
        path = path_to_root(tree, sample.node)[:-1]
        steps = path[:-1]
        if (
            tree.seed[path[-1]] == FIRST_DRAW
            and (tree.move[steps] == STEP).all()
            and (tree.stride[steps] == 1).all()
            and np.isnan(tree.eta[steps]).all()
        ):
            return sample
    return None


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Let what the stock code refuses be one of our errors."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error

"""What is known of every scheduler class of diffusers, and which can be stepped in a tree.

A scheduler is written for one loop: it remembers where it stands, derives the next point from its
own schedule, and draws noise for a whole batch. What a tree needs to know of it, to step it from
any point by any stride, is in one literal table here, :data:`TRAITS`; a class that cannot be
branched is in :data:`REFUSED`, with the reason. Every class of the installed diffusers is in one of
the two, which a test asserts, and every claim of the table is tested against the stock class.
``docs/schedulers.md`` is generated from it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from mctd_diffusers.denoising.scheduler_inspection import Inspection, inspect_scheduler
from mctd_diffusers.denoising.scheduler_traits import LEARNED, SchedulerTraits, always
from mctd_diffusers.errors import UnsupportedSchedulerError

# What multistep solvers remember, and how far back they look.


def _solver_memory(scheduler: Any) -> dict[str, Any]:
    return {"model_outputs": [None] * scheduler.config.solver_order, "lower_order_nums": 0}


def _solver_reads(scheduler: Any) -> int | None:
    config = scheduler.config
    ends_clean = config.euler_at_final or config.final_sigmas_type == "zero"
    if config.lower_order_final and (config.solver_order > 2 or not ends_clean):
        # Whether the last steps are of lower order then depends on the number of all steps.
        return None
    return int(config.solver_order) - 1


def _deis_reads(scheduler: Any) -> int | None:
    return None if scheduler.config.lower_order_final else int(scheduler.config.solver_order) - 1


def _unipc_memory(scheduler: Any) -> dict[str, Any]:
    order = scheduler.config.solver_order
    return {
        **_solver_memory(scheduler),
        "timestep_list": [None] * order,
        "last_sample": None,
        "this_order": 0,
    }


def _sa_memory(scheduler: Any) -> dict[str, Any]:
    order = max(scheduler.config.predictor_order, scheduler.config.corrector_order - 1)
    return {
        "model_outputs": [None] * order,
        "timestep_list": [None] * order,
        "lower_order_nums": 0,
        "last_sample": None,
        "last_noise": None,
        "this_predictor_order": 0,
        "this_corrector_order": 0,
    }


def _singlestep_memory(scheduler: Any) -> dict[str, Any]:
    return {"model_outputs": [None] * scheduler.config.solver_order, "sample": None}


def _midpoint_memory(scheduler: Any) -> dict[str, Any]:
    return {"sample": None}


def _heun_memory(scheduler: Any) -> dict[str, Any]:
    return {"sample": None, "prev_derivative": None, "dt": None}


def _is_sde(scheduler: Any) -> bool:
    return str(scheduler.config.algorithm_type).startswith("sde-")


_THIRD_ORDER = "of the third order, it reckons the steps left as if strides stayed as they are"
_THREE: tuple[Any, ...] = ("epsilon", "v_prediction", "sample")
_TWO = _THREE[:2]
_WITH_FLOW = (*_THREE, "flow_prediction")

_DDIM = SchedulerTraits(
    "alphas",
    grid="constant",
    schedule=("timesteps",),
    takes_eta=True,
    settings={"prediction_type": _THREE},
    note="lands where the stock scheduler lands after as many steps of its own",
)
_DDPM = SchedulerTraits(
    "alphas",
    schedule=("timesteps",),
    draws=always,
    settings={
        "prediction_type": _THREE,
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    },
)
_DDPM_LEARNED = replace(
    _DDPM,
    settings={
        **_DDPM.settings,
        "variance_type": (*_DDPM.settings["variance_type"], *LEARNED),
    },
)
_NOISES_AGAIN = "noises the estimate again: siblings differ by nearly all of their noise"
_CONSISTENCY = SchedulerTraits(
    "alphas",
    schedule=("timesteps",),
    draws=always,
    settings={"prediction_type": _THREE},
    note=_NOISES_AGAIN,
)
_EULER = SchedulerTraits(
    "exploding",
    split=True,
    settings={
        "prediction_type": (*_THREE, "original_sample"),
        "interpolation_type": ("linear",),  # the other has one level too many for its timesteps
    },
    note="the churn of its step (`s_churn`) is not used",
)
_TO_ROUNDING = "its midpoints are reckoned anew, so strides equal the stock scheduler to rounding"
_KARRAS_MIDPOINT = SchedulerTraits(
    "exploding",
    grid="two calls",
    blank=_midpoint_memory,
    settings={"prediction_type": _TWO},
    note=_TO_ROUNDING,
)
_FLOW = SchedulerTraits("flow", estimate="formula")
_EDM = SchedulerTraits(
    "exploding",
    settings={"prediction_type": _TWO},
    note="the churn of its step (`s_churn`) is not used",
)

TRAITS: Mapping[str, SchedulerTraits] = {
    "CMStochasticIterativeScheduler": SchedulerTraits(
        "exploding",
        reads=lambda scheduler: 1,  # it asks whether its schedule has more than one step
        draws=always,
        estimate="formula",
        note=f"consistency models; {_NOISES_AGAIN}",
    ),
    "CogVideoXDDIMScheduler": SchedulerTraits(
        "alphas",
        grid="constant",
        schedule=("timesteps",),
        settings={"prediction_type": _THREE},
        note="takes an `eta`, and ignores it",
    ),
    "CosineDPMSolverMultistepScheduler": SchedulerTraits(
        "exploding",
        blank=_solver_memory,
        reads=_solver_reads,
        draws=always,
        drops_oldest=True,
        estimate="convert",
        settings={"prediction_type": _TWO, "solver_order": (2, 1)},
        note="needs torchsde; its noise is drawn for each edge, not from one Brownian path",
    ),
    "DDIMParallelScheduler": _DDIM,
    "DDIMScheduler": _DDIM,
    "DDPMParallelScheduler": _DDPM,
    "DDPMScheduler": _DDPM_LEARNED,
    "DEISMultistepScheduler": SchedulerTraits(
        "solver",
        blank=_solver_memory,
        reads=_deis_reads,
        drops_oldest=True,
        estimate="formula",
        settings={"prediction_type": _WITH_FLOW, "thresholding": (False,)},
        note=_THIRD_ORDER,
    ),
    "DPMSolverMultistepScheduler": SchedulerTraits(
        "solver",
        blank=_solver_memory,
        reads=_solver_reads,
        draws=_is_sde,
        noise_in_single=True,
        drops_oldest=True,
        estimate="convert",
        split=True,
        settings={
            "prediction_type": _WITH_FLOW,
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "variance_type": (None,),
        },
        note=_THIRD_ORDER,
    ),
    "DPMSolverSDEScheduler": SchedulerTraits(
        "exploding",
        grid="two calls",
        blank=lambda scheduler: {"sample": None, "mid_point_sigma": None},
        draws=always,
        adds_noise=False,
        settings={"prediction_type": _TWO},
        note="needs torchsde; its noise is drawn for each edge, not from one Brownian path",
    ),
    "DPMSolverSinglestepScheduler": SchedulerTraits(
        "solver",
        blank=_singlestep_memory,
        reads=lambda scheduler: None,
        draws=_is_sde,
        adds_noise=False,  # how much it adds depends on what it remembers of a pair of steps
        drops_oldest=True,
        estimate="convert",
        restarts_empty=True,
        longest_stride=lambda scheduler: None if scheduler.config.solver_order <= 2 else 1,
        settings={
            "prediction_type": _WITH_FLOW,
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "variance_type": (None,),
            # Else `lower_order_final` may be off: the last of an odd number then has no order.
            "final_sigmas_type": ("zero",),
        },
        note="at the third order strides would break its groups of three steps",
    ),
    "EDMDPMSolverMultistepScheduler": SchedulerTraits(
        "exploding",
        blank=_solver_memory,
        reads=_solver_reads,
        draws=_is_sde,
        drops_oldest=True,
        estimate="convert",
        settings={"prediction_type": _TWO},
        note=_THIRD_ORDER,
    ),
    "EDMEulerScheduler": _EDM,
    "EulerAncestralDiscreteScheduler": SchedulerTraits(
        "exploding", draws=always, split=True, settings={"prediction_type": _TWO}
    ),
    "EulerDiscreteScheduler": _EULER,
    "FlowMatchEulerDiscreteScheduler": SchedulerTraits(
        "flow",
        draws=lambda scheduler: bool(scheduler.config.stochastic_sampling),
        noise_in_single=True,
        estimate="formula",
        settings={"invert_sigmas": (False,)},
        note="with `stochastic_sampling` it " + _NOISES_AGAIN,
    ),
    "FlowMatchHeunDiscreteScheduler": SchedulerTraits(
        "flow", grid="two calls", blank=_heun_memory, estimate="formula"
    ),
    "FlowMatchLCMScheduler": SchedulerTraits(
        "flow",
        draws=always,
        noise_in_single=True,
        estimate="formula",
        settings={"invert_sigmas": (False,), "scale_factors": (None,)},
        note=_NOISES_AGAIN,
    ),
    "HeunDiscreteScheduler": SchedulerTraits(
        "exploding",
        grid="two calls",
        blank=_heun_memory,
        settings={"prediction_type": _THREE},
    ),
    "IPNDMScheduler": SchedulerTraits(
        "sine",
        schedule=("timesteps", "alphas", "betas"),
        blank=lambda scheduler: {"ets": []},
        reads=lambda scheduler: 1,
        estimate="formula",
        equal_spacing=True,
        settings={"trained_betas": (None,)},
        note="its coefficients hold at equal spacing: where the stride changes it starts anew",
    ),
    "KDPM2AncestralDiscreteScheduler": SchedulerTraits(
        "exploding",
        grid="two calls",
        blank=_midpoint_memory,
        draws=always,
        settings={"prediction_type": _TWO},
        note=_TO_ROUNDING,
    ),
    "KDPM2DiscreteScheduler": _KARRAS_MIDPOINT,
    "LCMScheduler": _CONSISTENCY,
    "LMSDiscreteScheduler": SchedulerTraits(
        "exploding",
        blank=lambda scheduler: {"derivatives": []},
        reads=lambda scheduler: 3,
        restarts_empty=True,
        settings={"prediction_type": _THREE},
    ),
    "LTXEulerAncestralRFScheduler": SchedulerTraits(
        "flow",
        draws=always,
        noise_in_single=True,
        estimate="formula",
        note="its own share of noise is the `eta` of its config",
    ),
    "MiniMaxH3Scheduler": SchedulerTraits(
        "flow", estimate="formula", note="its network predicts the velocity towards the data"
    ),
    "SASolverScheduler": SchedulerTraits(
        "solver",
        blank=_sa_memory,
        reads=lambda scheduler: max(
            scheduler.config.predictor_order, scheduler.config.corrector_order
        ),
        draws=always,
        adds_noise=False,
        estimate="formula",
        settings={
            "prediction_type": _WITH_FLOW,
            "algorithm_type": ("data_prediction", "noise_prediction"),
            "thresholding": (False,),
        },
        note="draws noise at timesteps 200 to 800, and uses it again in the next step",
    ),
    "SCMScheduler": SchedulerTraits(
        "trigonometric",
        schedule=("timesteps",),
        draws=always,
        noise_in_single=True,
        settings={"prediction_type": ("trigflow",)},
        note=f"{_NOISES_AGAIN}; hands back single precision",
    ),
    "TCDScheduler": SchedulerTraits(
        "alphas",
        schedule=("timesteps",),
        takes_eta=True,
        estimate="formula",
        settings={"prediction_type": _THREE},
    ),
    "UnCLIPScheduler": SchedulerTraits(
        "alphas",
        grid="target",
        schedule=("timesteps",),
        draws=always,
        settings={
            "prediction_type": ("epsilon", "sample"),
            "variance_type": ("fixed_small_log",),
        },
        note="stepped with `prev_timestep`, as the unCLIP pipelines do",
    ),
    "UniPCMultistepScheduler": SchedulerTraits(
        "solver",
        blank=_unipc_memory,
        reads=lambda scheduler: scheduler.config.solver_order,
        estimate="formula",
        settings={
            "prediction_type": _WITH_FLOW,
            "thresholding": (False,),
            "disable_corrector": ([],),
            "solver_p": (None,),
        },
        note=_THIRD_ORDER,
    ),
}
"""Classes that can be stepped in a tree, and how."""

_TOKENS = "its samples are discrete tokens: there is no latent to noise and no denoised estimate"
_INVERSE = "it adds noise (inversion): its steps lead away from a picture"

REFUSED: Mapping[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "CogVideoXDPMScheduler": "its step takes the estimate and the timestep before as arguments, "
    "which only its own pipelines pass",
    "ConsistencyDecoderScheduler": "it decodes latents inside a consistency decoder, and denoises "
    "none",
    "DDIMInverseScheduler": _INVERSE,
    "DDPMWuerstchenScheduler": "its step takes a timestep for each sample, and looks up the first "
    "alone: samples at different timesteps cannot share a call",
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "FlowMapEulerDiscreteScheduler": "its network is told where the step will end: an evaluated "
    "sample is of use for one stride alone",
    "HeliosDMDScheduler": "its step takes the noise and the stages of a video chunk as arguments, "
    "which only its own pipeline passes",
    "HeliosScheduler": "its schedule is cut into stages of growing resolution: a stride over their "
    "borders means nothing",
    "KarrasVeScheduler": "it has churn and correction in functions of its own beside `step`, which "
    "only its own pipeline calls",
    "PNDMScheduler": "its coefficients hold at one spacing alone, it takes its first step twice "
    "and it cannot start anew in the middle: it has no stride above 1, and no fresh noise",
    "PiflowScheduler": "its network predicts a policy for one whole segment, and no denoised "
    "estimate",
    "RFD4ProteinaScheduler": "its samples are the coordinates of a protein, with a mask of "
    "residues as an argument",
    "RePaintScheduler": "its step takes the picture to fill and a mask as arguments, and it jumps "
    "back up the schedule by itself",
    "ScoreSdeVeScheduler": "it has no `step`: it predicts and corrects in two functions of its own "
    "pipeline",
    "ScoreSdeVpScheduler": "it has no `step`: it predicts in a function of its own pipeline",
    "VQDiffusionScheduler": _TOKENS,
}
"""Classes that cannot be stepped in a tree, and why."""


_CURE = "make one from yours: `DDIMScheduler.from_config(pipe.scheduler.config)`."
_INSPECTED: dict[Hashable, Inspection] = {}


def traits_of(scheduler: Any) -> SchedulerTraits:
    """What is known of a scheduler's class; one of a user's own is tried out, once for a config.

    Raises:
        UnsupportedSchedulerError: it is refused, or lacks what a tree needs.
    """
    name = type(scheduler).__name__
    if is_listed(scheduler):
        if name in TRAITS:
            return TRAITS[name]
        raise UnsupportedSchedulerError(f"{name} cannot be branched: {REFUSED[name]}; {_CURE}")
    inspection = inspection_of(scheduler)
    if inspection.traits is None:
        raise UnsupportedSchedulerError(f"{name} cannot be branched: {inspection.lacks}; {_CURE}")
    return inspection.traits


def is_listed(scheduler: Any) -> bool:
    """Whether a scheduler's class is in one of the two tables."""
    kind = type(scheduler)
    is_stock = kind.__module__.startswith("diffusers.")
    return is_stock and (kind.__name__ in TRAITS or kind.__name__ in REFUSED)


def inspection_of(scheduler: Any) -> Inspection:
    """What is found out about a scheduler whose class is in no table, once for a config."""
    kind = type(scheduler)
    key = (kind, repr(sorted(getattr(scheduler, "config", {}).items())))
    if key not in _INSPECTED:
        _INSPECTED[key] = inspect_scheduler(scheduler, _traits_of_parent(kind))
    return _INSPECTED[key]


def _traits_of_parent(kind: type) -> SchedulerTraits | None:
    """Traits of the nearest class of diffusers that a class descends from."""
    for base in kind.__mro__[1:]:
        if base.__module__.startswith("diffusers.") and base.__name__ in TRAITS:
            return TRAITS[base.__name__]
    return None


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose steps cannot be branched, by class and by setting.

    Raises:
        UnsupportedSchedulerError: see :func:`traits_of`; or it is set up in a way that is not
            proven.
    """
    traits = traits_of(scheduler)
    name = type(scheduler).__name__
    for setting, allowed in traits.settings.items():
        given = scheduler.config.get(setting, vars(scheduler).get(setting))
        if given not in allowed:
            raise UnsupportedSchedulerError(
                f"{name} with {setting}={given!r} cannot be branched; allowed are "
                f"{', '.join(map(repr, allowed))}. Make another from it: "
                f"`{name}.from_config(scheduler.config, {setting}={allowed[0]!r})`."
            )


def longest_stride(scheduler: Any) -> int | None:
    """The longest stride that is proven on a scheduler; ``None`` is any.

    Raises:
        UnsupportedSchedulerError: see :func:`traits_of`.
    """
    return traits_of(scheduler).longest_stride(scheduler)

"""Schedulers as the tests want them: set up, and a network to run them on."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from mctd_diffusers.denoising.edges import reads_variance
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.denoising.views import BrownianEdge
from mctd_diffusers.search.environment import Action

if importlib.util.find_spec("torchsde") is None:
    raise ImportError(
        "torchsde is missing, without which DPMSolverSDE and CosineDPMSolverMultistep cannot be "
        "made, and the tests of schedulers would prove nothing of them; install what the tests "
        "need: `make install`."
    )

# As Stable Diffusion 1.5 sets them up, but with the spacing whose cuts are again such spacings.
COMMON = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
NEEDED: dict[str, dict[str, Any]] = {
    # Enough steps to choose from, for all the numbers of steps of the tests.
    "LCM": {"original_inference_steps": 1000},
    "TCD": {"original_inference_steps": 1000},
    "CMStochasticIterative": {"num_train_timesteps": 321},
    "UnCLIP": {"beta_schedule": "squaredcos_cap_v2"},  # it knows no other
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIM", {"clip_sample": False}),
    "ddim-eta": ("DDIM", {"clip_sample": False}),
    "ddim-clip": ("DDIM", {"clip_sample": True, "set_alpha_to_one": False}),
    "ddim-zero-snr": (
        "DDIM",
        {"clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ),
    "ddim-parallel": ("DDIMParallel", {"clip_sample": False}),
    "ddpm": ("DDPM", {"clip_sample": False}),
    "ddpm-large": ("DDPM", {"clip_sample": True, "variance_type": "fixed_large"}),
    "ddpm-log": ("DDPM", {"clip_sample": False, "variance_type": "fixed_small_log"}),
    "ddpm-parallel": ("DDPMParallel", {"clip_sample": False}),
    "cogvideox-ddim": ("CogVideoXDDIM", {"snr_shift_scale": 1.0, "clip_sample": False}),
    "euler": ("EulerDiscrete", {}),
    "euler-karras": ("EulerDiscrete", {"use_karras_sigmas": True}),
    "euler-exponential": ("EulerDiscrete", {"use_exponential_sigmas": True}),
    "euler-beta": ("EulerDiscrete", {"use_beta_sigmas": True}),
    "euler-a": ("EulerAncestralDiscrete", {}),
    "lms": ("LMSDiscrete", {}),
    "lms-karras": ("LMSDiscrete", {"use_karras_sigmas": True}),
    "heun": ("HeunDiscrete", {}),
    "heun-karras": ("HeunDiscrete", {"use_karras_sigmas": True}),
    "kdpm2": ("KDPM2Discrete", {}),
    "kdpm2-exponential": ("KDPM2Discrete", {"use_exponential_sigmas": True}),
    "kdpm2-a": ("KDPM2AncestralDiscrete", {}),
    "dpm-sde": ("DPMSolverSDE", {}),
    "dpm++": ("DPMSolverMultistep", {}),
    "dpm++-karras": ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    "dpm++-min": ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}),
    "dpm++-1": ("DPMSolverMultistep", {"solver_order": 1}),
    "dpm++-3": ("DPMSolverMultistep", {"solver_order": 3}),
    "dpm++-flow": ("DPMSolverMultistep", FLOW),
    "sde-dpm++": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm-single": ("DPMSolverSinglestep", {}),
    "dpm-single-sde": ("DPMSolverSinglestep", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": ("DEISMultistep", {}),
    "deis-3": ("DEISMultistep", {"solver_order": 3}),
    "unipc": ("UniPCMultistep", {}),
    "unipc-3": ("UniPCMultistep", {"solver_order": 3}),
    "unipc-noise": ("UniPCMultistep", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    "unipc-flow": ("UniPCMultistep", FLOW),
    "sasolver": ("SASolver", {}),
    "ipndm": ("IPNDM", {}),
    "lcm": ("LCM", {}),
    "tcd": ("TCD", {}),
    "tcd-eta": ("TCD", {}),
    "cm": ("CMStochasticIterative", {}),
    "unclip": ("UnCLIP", {}),
    "edm-euler": ("EDMEuler", {}),
    "edm-dpm++": ("EDMDPMSolverMultistep", {}),
    "edm-sde-dpm++": ("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    "cosine-dpm++": ("CosineDPMSolverMultistep", {}),
    "flow-euler": ("FlowMatchEulerDiscrete", {}),
    "flow-euler-shifted": ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    "flow-euler-sde": ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
    "flow-heun": ("FlowMatchHeunDiscrete", {"shift": 3.0}),
    "flow-lcm": ("FlowMatchLCM", {}),
    "ltx": ("LTXEulerAncestralRF", {}),
    "minimax": ("MiniMaxH3", {}),
    "scm": ("SCM", {}),
}
FIRST_OF_CLASS = list({kind: name for name, (kind, _) in reversed(SCHEDULERS.items())}.values())
ETAS = {"ddim-eta": 0.7, "tcd-eta": 0.3}
TWO_CALLS = {
    "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE",
    "FlowMatchHeunDiscrete",
}  # fmt: skip


def scheduler_class(kind: str) -> Any:
    """The class of that name, without `Scheduler`."""
    if kind == "MiniMaxH3":
        from diffusers.schedulers.scheduling_minimax_h3 import MiniMaxH3Scheduler

        return MiniMaxH3Scheduler
    return getattr(diffusers, f"{kind}Scheduler")


def make_scheduler(name: str, num_steps: int = 0, **settings: Any) -> Any:
    """The scheduler of that name, with its schedule set where `num_steps` is given."""
    kind, own = SCHEDULERS[name]
    return make_of_class(kind, num_steps, **{**own, **settings})


def make_of_class(kind: str, num_steps: int = 0, **settings: Any) -> Any:
    """A scheduler of that class with some settings, and the common ones that it knows."""
    made = scheduler_class(kind)
    known = inspect.signature(made).parameters
    common = {key: value for key, value in COMMON.items() if key in known}
    # Some classes lay out a schedule of all 1,000 timesteps when they are made: half a second.
    settings = {**common, **NEEDED.get(kind, {}), **settings}
    return copy.deepcopy(_made(made, num_steps, _Settings(settings)))


class _Settings(dict[str, Any]):
    """Settings, known again by what they say."""

    def __hash__(self) -> int:  # type: ignore[override]  # dicts have none
        return hash(repr(self))

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)


@functools.lru_cache(maxsize=256)
def _made(made: Any, num_steps: int, settings: _Settings) -> Any:
    if num_steps:
        scheduler = copy.deepcopy(_made(made, 0, settings))
        set_steps(scheduler, num_steps)
        return scheduler
    return made(**settings)


def set_steps(scheduler: Any, num_steps: int) -> None:
    """Set a schedule of so many steps."""
    match type(scheduler).__name__:
        case "SCMScheduler":
            scheduler.set_timesteps(num_steps, intermediate_timesteps=None)
        case "MiniMaxH3Scheduler":  # counts the points, not the steps
            scheduler.set_timesteps(num_steps + 1)
        case _:
            scheduler.set_timesteps(num_steps)


def steps_of(scheduler: Any) -> int:
    """Number of steps of a schedule, each of one or two calls."""
    kind = type(scheduler).__name__.removesuffix("Scheduler")
    calls = len(scheduler.timesteps) - (kind == "SCM")
    return (calls + 1) // 2 if kind in TWO_CALLS else calls


def set_points(scheduler: Any, full: Any, points: Sequence[int]) -> None:
    """Set a scheduler of its own to some points of the schedule of `full`."""
    set_steps(scheduler, len(points))
    ends = [*points, steps_of(full)]
    kind = type(scheduler).__name__.removesuffix("Scheduler")
    if kind == "SCM":
        scheduler.timesteps = full.timesteps[ends]
    elif kind in TWO_CALLS:
        _set_points_of_two_calls(scheduler, full, points)
    else:
        if kind == "IPNDM":
            scheduler.alphas, scheduler.betas = full.alphas[ends], full.betas[ends]
        scheduler.timesteps = full.timesteps[list(points)]
        if hasattr(full, "sigmas"):
            scheduler.sigmas = full.sigmas[ends]
        scheduler.num_inference_steps = len(points)


def _set_points_of_two_calls(scheduler: Any, full: Any, points: Sequence[int]) -> None:
    """The same where points and midpoints take turns: as each class's `set_timesteps` lays them."""
    num_steps = steps_of(full)
    sigmas = torch.cat([full.sigmas[: 2 * num_steps : 2], full.sigmas[-1:]])[[*points, num_steps]]
    timesteps = full.timesteps[::2][list(points)]
    twice = timesteps[1:].repeat_interleave(2)
    if type(scheduler).__name__.startswith("KDPM2"):
        between = sigmas[:-1].log().lerp(sigmas[1:].log(), 0.5).exp()
        if hasattr(scheduler, "sigmas_down"):
            up = (sigmas[1:] ** 2 * (sigmas[:-1] ** 2 - sigmas[1:] ** 2) / sigmas[:-1] ** 2) ** 0.5
            down = (sigmas[1:] ** 2 - up**2) ** 0.5
            between = sigmas[:-1].log().lerp(down.log(), 0.5).exp()
            between[-1] = 0
            scheduler.sigmas_up, scheduler.sigmas_down = (
                torch.cat([each, each[-1:]]).repeat_interleave(2) for each in (up, down)
            )
            scheduler.sigmas_interpol = between.repeat_interleave(2)
        else:
            between[-1] = 0
            scheduler.sigmas_interpol = torch.cat([sigmas[:1], between.repeat_interleave(2)])
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), sigmas[-1:]])
        logs = full.log_sigmas.cpu().numpy()
        twice[::2] = torch.tensor(
            [float(scheduler._sigma_to_t(each, logs)) for each in between[:-1].numpy()]
        ).to(twice)
    else:
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        if type(scheduler).__name__ == "DPMSolverSDEScheduler":
            logs = np.log(np.array(((1 - full.alphas_cumprod) / full.alphas_cumprod) ** 0.5))
            middle = scheduler._second_order_timesteps(sigmas[:-1].double().numpy(), logs)
            twice[::2] = torch.from_numpy(middle)
    scheduler.timesteps = torch.cat([timesteps[:1], twice])


def network(inputs: Tensor, timesteps: Tensor) -> Tensor:
    """Not linear, and without a sum over rows or pixels: its bits know nothing of the batch."""
    times = (timesteps.to(inputs.dtype) / 1000).reshape(-1, *[1] * (inputs.ndim - 1))
    return 0.6 * inputs + 0.3 * times - 0.4 * inputs / (1 + inputs * inputs)


def with_variance(scheduler: Any, outputs: Tensor) -> Tensor:
    """Outputs with a variance beside them, for a scheduler that reads one."""
    return torch.cat([outputs, outputs.abs() / 4], dim=1) if reads_variance(scheduler) else outputs


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def first_noise(scheduler: Any, *shape: int) -> Tensor:
    """Initial noise, as the stock pipelines scale it."""
    return noise(*shape) * getattr(scheduler, "init_noise_sigma", 1.0)


def stock_loop(
    scheduler: Any, latents: Tensor, seeds: Sequence[int], eta: float = 0.0, begin: int = 0
) -> Tensor:
    """The loop of a stock pipeline, whose step `i` draws from a generator seeded by `seeds[i]`."""
    kind = type(scheduler).__name__.removesuffix("Scheduler")
    calls = 2 if kind in TWO_CALLS else 1
    timesteps = scheduler.timesteps[calls * begin : -1 if kind == "SCM" else None]
    for call, timestep in enumerate(timesteps):
        inputs = latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(latents, timestep)
        output = with_variance(scheduler, network(inputs, timestep))
        generator = torch.Generator().manual_seed(seeds[call // calls])
        rest = timesteps[call + 1 :]
        offered = {
            "generator": generator,
            "eta": eta,
            "prev_timestep": rest[0] if len(rest) else torch.tensor(-1),
        }
        known = inspect.signature(scheduler.step).parameters
        extra = {key: value for key, value in offered.items() if key in known}
        if hasattr(scheduler, "noise_sampler"):  # one path of torchsde, in the place of our edges'
            midpoint = getattr(scheduler, "mid_point_sigma", None)
            scheduler.noise_sampler = BrownianEdge([generator], latents, midpoint)
        latents = scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
    return latents


def true_output(scheduler: Any, x: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
    """What a perfect network answers for ``x = alpha x0 + sigma eps``, by its prediction type.

    ``level`` is ``sigma``, and for EDM ``sigma / alpha``.
    """
    kind = type(scheduler).__name__.removesuffix("Scheduler")
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "MiniMaxH3":
        return x0 - eps
    if kind == "IPNDM" or (kind == "DDIM" and prediction == "v_prediction"):
        return (1 - level**2).sqrt() * eps - level * x0
    answer: Tensor
    if kind == "SCM":
        sine = level / scheduler.config.sigma_data
        answer = ((1 - sine**2).sqrt() * x - x0) / sine
    elif kind == "CMStochasticIterative":
        skip, out = scheduler.get_scalings_for_boundary_condition(level)
        answer = (x0.clamp(-1, 1) - skip * x) / out
    elif kind.startswith(("EDM", "Cosine")):  # Karras et al., 2022, table 1
        data = scheduler.config.sigma_data
        skip, out = data**2 / (level**2 + data**2), level * data / (level**2 + data**2).sqrt()
        answer = (x0 - skip * x) / (-out if prediction == "v_prediction" else out)
    else:
        answer = eps if prediction == "epsilon" else eps - x0
    return answer


def evaluate(stepper: Stepper, latents: Tensor, states: Sequence[SolverState]) -> Tensor:
    outputs = network(*stepper.network_input(latents, states))
    return with_variance(stepper._edges.own, outputs)


def walk(
    stepper: Stepper,
    latents: Tensor,
    strides: Sequence[int],
    seeds: Sequence[int],
    eta: float | None = None,
) -> Tensor:
    """One sample all the way, alone."""
    states = [stepper.initial_state()]
    for stride, seed in zip(strides, seeds, strict=True):
        latents, states = cross(stepper, latents, states, [Action(stride, eta)], [seed])
    assert states[0].step_index == stepper.num_steps
    return latents


def cross(
    stepper: Stepper,
    latents: Tensor,
    states: Sequence[SolverState],
    actions: Sequence[Action],
    seeds: Sequence[int],
) -> tuple[Tensor, list[SolverState]]:
    """An edge of each sample, with the second network call where it takes one."""
    outputs = evaluate(stepper, latents, states)
    latents, after = stepper.step(latents, outputs, states, actions, seeds)
    midway = [row for row, state in enumerate(after) if state.midway is not None]
    for row, (state, action) in enumerate(zip(states, actions, strict=True)):
        assert stepper.needs_midpoint(state.step_index, action) == (row in midway)
    if midway:
        some = [after[row] for row in midway]
        outputs = evaluate(stepper, latents[midway], some)
        ends, states_there = stepper.complete(
            latents[midway], outputs, some, [seeds[row] for row in midway]
        )
        latents = latents.clone()
        for row, end, state in zip(midway, ends, states_there, strict=True):
            latents[row], after[row] = end, state
    return latents, after

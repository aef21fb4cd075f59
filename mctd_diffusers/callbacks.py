"""Callbacks of the stock call in a search, where a step is a wave.

A wave is one call for evaluations, of samples of many images at many noise levels, and all that is
found later grows from them. So a callback looks on, and may end the search by
``pipe._interrupt = True``; it changes nothing else, and what it tries to change is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from mctd_diffusers.calls import Prepared, World
from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.search.runner import Wave

TENSOR_INPUTS: Final = ("latents", "prompt_embeds")
"""What a callback may be shown of a wave, a row for each of its samples."""


def check_callbacks(stock: Mapping[str, Any], prepared: Prepared) -> None:
    """Refuse a callback that a search cannot call.

    Args:
        stock: the stock arguments of a call.
        prepared: what the family made of them.

    Raises:
        ConfigError: it is none, or one that cuts something off at a step; or it asks for a tensor
            that a wave has not.
    """
    for name in ("callback_on_step_end", "callback"):
        given = stock.get(name)
        if isinstance(given, PipelineCallback | MultiPipelineCallbacks):
            raise ConfigError(
                f"{name}={type(given).__name__}(...) cuts something off at a step, and a wave of a "
                "search has samples at many steps: leave it out, or call with search=None"
            )
        if given is not None and not callable(given):
            raise ConfigError(f"{name}={given!r} is a {type(given).__name__}: give a function")
    if stock.get("callback_on_step_end") is None:
        return
    names = stock.get("callback_on_step_end_tensor_inputs")
    known = [
        name
        for name in TENSOR_INPUTS
        if name != "prompt_embeds" or prepared.prompt_embeds is not None
    ]
    if not isinstance(names, list | tuple) or not all(name in known for name in names):
        raise ConfigError(
            f"callback_on_step_end_tensor_inputs={names!r}: a search shows its callback some of "
            f"{known}, a row for each sample of a wave; name those, or call with search=None"
        )


class WaveCallbacks:
    """Calls the callbacks of a call after each wave of evaluations.

    ``callback_on_step_end(pipe, step, timestep, callback_kwargs)`` gets the number of the wave from
    0, the timesteps ``[samples]`` that its samples stand at, and of the tensors it asked for

    - ``latents``: ``[samples, *sample]``, unscaled, as they were evaluated;
    - ``prompt_embeds``: ``[samples, tokens, channels]``, what the denoiser is told of the prompt of
      each, without the negative one.

    ``callback(step, timestep, latents)``, where the stock call takes it, gets the same every
    ``callback_steps`` waves.

    Args:
        pipe: the pipeline, which is handed on.
        stock: the stock arguments of the call, which `check_callbacks` lets pass.
        world: that is searched.
    """

    def __init__(self, pipe: Any, stock: Mapping[str, Any], world: World) -> None:
        self._pipe = pipe
        self._world = world
        self._on_step_end = stock.get("callback_on_step_end")
        self._names = stock.get("callback_on_step_end_tensor_inputs") or ()
        self._callback = stock.get("callback")
        self._callback_steps = stock.get("callback_steps") or 1
        self._waves = 0
        settings = [name for name in stock if isinstance(getattr(type(pipe), name, None), property)]
        self._settings = {name: getattr(pipe, name) for name in settings}

    def __call__(self, wave: Wave) -> None:
        """Tell of a wave, if it was one of evaluations.

        Raises:
            SearchError: a callback changed a tensor, or a setting of the pipeline.
        """
        if wave.kind != "denoise":
            return
        step, self._waves = self._waves, self._waves + 1
        if self._on_step_end is not None:
            shown = {name: self._tensor(name, wave) for name in self._names}
            kept = {name: tensor.clone() for name, tensor in shown.items()}
            returned = self._on_step_end(self._pipe, step, self._timesteps(wave), dict(shown))
            self._check_unchanged(kept, shown | (returned or {}))
        if self._callback is not None and step % self._callback_steps == 0:
            latents = self._tensor("latents", wave)
            kept = {"latents": latents.clone()}
            self._callback(step, self._timesteps(wave), latents)
            self._check_unchanged(kept, {"latents": latents})

    def _timesteps(self, wave: Wave) -> Tensor:
        environment = self._world.environment
        indices = environment.step_indices(wave.handles)
        return environment.stepper.timesteps[indices].to(self._world.prepared.first_latents.device)

    def _tensor(self, name: str, wave: Wave) -> Tensor:
        if name == "latents":
            return self._world.environment.latents(wave.handles)
        embeds = self._world.prepared.prompt_embeds
        assert embeds is not None
        return embeds[[problem % len(embeds) for problem in wave.problems]]

    def _check_unchanged(self, before: Mapping[str, Tensor], after: Mapping[str, Any]) -> None:
        cure = (
            "a callback of a search looks on, or ends it by pipe._interrupt = True; return what it "
            "was given, or call with search=None"
        )
        for name, tensor in after.items():
            if name not in before or not _is_same(before[name], tensor):
                raise SearchError(
                    f"the callback changed {name!r}, which a search cannot take: {cure}"
                )
        for name, setting in self._settings.items():
            now = getattr(self._pipe, name)
            if now is not setting and now != setting:
                raise SearchError(
                    f"the callback set {name} from {setting!r} to {now!r}, which a search keeps: "
                    f"{cure}"
                )


def _is_same(tensor: Tensor, other: Any) -> bool:
    """Whether this is the same tensor in all its numbers, those included that are none."""
    if not isinstance(other, Tensor) or other.shape != tensor.shape or other.dtype != tensor.dtype:
        return False
    return torch.allclose(tensor, other.to(tensor.device), rtol=0, atol=0, equal_nan=True)

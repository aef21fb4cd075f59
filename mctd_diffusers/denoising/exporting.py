"""Samples in plain types, as `LatentEnvironment.export` hands them out, and back."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from mctd_diffusers.denoising.latents import (
    Before,
    EdgeNoise,
    Midway,
    Sample,
    made_latents,
    made_state,
)
from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.search.environment import Action


def exported(sample: Sample) -> dict[str, Any]:
    """Copy of a made sample, or of one midway, on the host, fit for ``torch.save``."""
    origin = sample.origin
    latents, state, seed = (
        (origin.latents, origin.state, origin.seed)
        if isinstance(origin, Midway)
        else (made_latents(sample), made_state(sample), None)
    )
    outputs, before = sample.outputs, sample.before
    conditional, unconditional = (None, None) if outputs is None else outputs
    return {
        "problem": sample.problem,
        "step_index": sample.step_index,
        "latents": latents.clone().cpu(),
        "visited": list(state.visited),
        "history": [row.clone().cpu() for row in state.history],
        "memory": state.memory,
        "midway": None if state.midway is None else (*state.midway, seed),
        "noise": None if sample.noise is None else asdict(sample.noise),
        "conditional": None if conditional is None else conditional.clone().cpu(),
        "unconditional": None if unconditional is None else unconditional.clone().cpu(),
        "features": {name: row.clone().cpu() for name, row in sample.features.items()},
        "map": None if sample.map is None else sample.map.clone().cpu(),
        "before": before and (before.estimate.clone().cpu(), before.step_index, before.guidance),
        "values": dict(sample.values),
        "reward": sample.reward,
    }


def restored(saved: dict[str, Any], storage: torch.device) -> Sample:
    """The sample of such a copy, its tensors on ``storage``."""

    def here(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone().to(storage)

    latents, step_index = saved["latents"].clone().to(storage), saved["step_index"]
    history = tuple(row.clone().to(storage) for row in saved["history"])
    state = SolverState(step_index, tuple(saved["visited"]), history, saved["memory"])
    origin = None
    if saved["midway"] is not None:
        *action, seed = saved["midway"]
        midway = Action(*action)
        state = replace(state, step_index=step_index - midway.stride, midway=midway)
        origin = Midway(latents, state, seed)
    conditional = here(saved["conditional"])
    noise = None if saved["noise"] is None else EdgeNoise(**saved["noise"])
    return Sample(
        problem=saved["problem"],
        step_index=step_index,
        origin=origin,
        noise=noise,
        latents=None if origin else latents,
        state=None if origin else state,
        outputs=None if conditional is None else Outputs(conditional, here(saved["unconditional"])),
        features={name: row.clone().to(storage) for name, row in saved["features"].items()},
        map=here(saved.get("map")),
        before=saved["before"]
        and Before(saved["before"][0].clone().to(storage), *saved["before"][1:]),
        values=dict(saved["values"]),
        reward=saved["reward"],
    )

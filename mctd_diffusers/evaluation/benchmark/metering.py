"""What a call takes: where the CPU's time goes, memory, and the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


class TimedReward:
    """A reward whose CPU seconds are added to ``cpu["reward"]``; else the same."""

    def __init__(self, reward: Any, cpu: dict[str, float]) -> None:
        self.reward = reward
        self.cpu = cpu
        self.wants_pil = bool(getattr(reward, "wants_pil", False))
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)

    def __call__(self, images: Any, prompts: Sequence[str]) -> Any:
        """Score as the reward does."""
        start = time.process_time()
        try:
            return self.reward(images, prompts)
        finally:
            self.cpu["reward"] += time.process_time() - start


@contextlib.contextmanager
def cpu_by_phase(pipe: Any) -> Iterator[dict[str, float]]:
    """Meters the CPU seconds of a pipeline's modules, and of all that happens inside the block.

    The seconds are those of the process, all threads together. On an accelerator they say what the
    host was busy with, not the device.

    Yields:
        Seconds by phase, complete when the block is left; "reward" is left to `TimedReward`.
    """
    cpu = dict.fromkeys(("network", "decode", "preview", "reward", "encode"), 0.0)
    previewer = getattr(pipe, "preview_vae", None)
    metered: dict[str, Any] = {
        "network": getattr(pipe, "unet", None) or getattr(pipe, "transformer", None),
        "decode": getattr(getattr(pipe, "vae", None), "decoder", None),
        "preview": getattr(previewer, "decoder", None),
        "encode": getattr(pipe, "text_encoder", None),
    }
    with contextlib.ExitStack() as hooks:
        for phase, module in metered.items():
            if isinstance(module, nn.Module):
                _meter(module, phase, cpu, hooks)
        start = time.process_time()
        try:
            yield cpu
        finally:
            cpu["total"] = time.process_time() - start


def _meter(
    module: nn.Module, phase: str, cpu: dict[str, float], hooks: contextlib.ExitStack
) -> None:
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(time.process_time())

    def after(*_: Any) -> None:
        cpu[phase] += time.process_time() - started.pop()

    hooks.callback(module.register_forward_pre_hook(before).remove)
    hooks.callback(module.register_forward_hook(after).remove)


def machine(device: torch.device) -> dict[str, str]:
    """What ran: the device, and the versions that its speed depends on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes held at most: on an accelerator since it was reset, else by the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

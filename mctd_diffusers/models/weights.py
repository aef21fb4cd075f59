"""By what the weights of networks are told from each other."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_hash(module: nn.Module) -> str:
    """Hash some values of every parameter, which training changes everywhere: seconds, not minutes.

    Args:
        module: on any device, of any dtype.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(name.encode())
        sampled = parameter.detach().flatten()[:64].to("cpu", torch.float32).numpy()
        digest.update(sampled.tobytes())
    return digest.hexdigest()[:16]


def weights_digest(module: nn.Module) -> str:
    """Hash every value of a small network, its buffers included."""
    digest = hashlib.sha256()
    for values in module.state_dict().values():
        digest.update(values.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()

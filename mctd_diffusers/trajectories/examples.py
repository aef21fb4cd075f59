"""What an information gain evaluator learns from and is judged by, made of the splits of a log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.calibration import Calibration
from mctd_diffusers.models.ige import IGEOutput, InformationGainEvaluator
from mctd_diffusers.models.losses import JumpTargets
from mctd_diffusers.trajectories.dataset import Log, LogSplit
from mctd_diffusers.trajectories.jumps import JumpRows, cells_of, jump_rows

TARGETS: Final = {
    "truncation_error": "log_truncation_error",
    "resolved_variance": "log_variance",
    "mean_gain": "mean_gain",
    "final_similarity": "final_similarity",
}
"""Target -> the output of an evaluator that predicts it, or its log."""
_ROWS_PER_CALL: Final = 2048


@dataclass(frozen=True)
class Examples:
    """A split with what its jumps are to teach, on the host.

    Attributes:
        split: of the log.
        features: of its states, half precision.
        rows: what is known of jumps from its states.
        cells: of its states, numbered over all splits.
        states: those of which something of a jump is known.
    """

    split: LogSplit
    features: dict[str, Tensor]
    rows: JumpRows
    cells: Int[np.ndarray, " states"]
    states: Int[np.ndarray, " known"]

    @property
    def siblings(self) -> int:
        """Draws in each group of siblings."""
        return int(self.split.siblings.values.shape[1])


class JumpPredictions(NamedTuple):
    """Predictions of one target, and what came true; one entry a jump.

    Attributes:
        predicted: from the features of the state.
        typical: of the typical state at the same jump.
        actual: measured; the log of a truncation error or of a variance.
        cell: an integer, equal where jumps are of one cell.
        prompt: an integer for each prompt.
    """

    predicted: Float[np.ndarray, " jumps"]
    typical: Float[np.ndarray, " jumps"]
    actual: Float[np.ndarray, " jumps"]
    cell: Int[np.ndarray, " jumps"]
    prompt: Int[np.ndarray, " jumps"]


def split_prompts(
    log: Log, *, train: str = "train", validation_share: float = 0.1, seed: int = 0
) -> dict[str, LogSplit]:
    """Split a log by prompt: to train on, to validate on, and those that are held out.

    Args:
        log: whose splits other than ``train`` are held out; without any, as many prompts as are
            validated on make up a split ``held_out``.
        train: name of the split that is divided.
        validation_share: share of its prompts that nothing is trained on.
        seed: of the choice.

    Returns:
        ``train``, ``validation`` and the held-out splits, by name.

    Raises:
        ConfigError: there is no such split, it has too few prompts, or a held-out split shares
            some with it.
    """
    if train not in log.splits:
        raise ConfigError(f"the log has no split {train!r}, only {sorted(log.splits)}")
    whole = log.splits[train]
    others = {name: split for name, split in log.splits.items() if name != train}
    prompts = np.unique(whole.trajectories.prompt)
    names = ["validation"] if others else ["validation", "held_out"]
    count = max(1, round(validation_share * len(prompts)))
    if len(prompts) <= len(names) * count:
        raise ConfigError(
            f"split {train!r} has {len(prompts)} prompts, of which {len(names) * count} would be "
            "held out: log more, or lower the share to validate on"
        )
    for name, split in others.items():
        shared = np.intersect1d(prompts, split.trajectories.prompt)
        if len(shared):
            raise ConfigError(
                f"{len(shared)} prompts of split {name!r} are in {train!r} too, such as "
                f"{str(shared[0])!r}: log it with other prompts, or take its files away"
            )
    order = np.random.default_rng(seed).permutation(prompts)
    parts = {"train": order[len(names) * count :]}
    parts |= {name: order[i * count : (i + 1) * count] for i, name in enumerate(names)}
    kept = {
        name: whole.take(np.isin(whole.trajectories.prompt, some), name)
        for name, some in parts.items()
    }
    return kept | others


def make_examples(
    splits: Mapping[str, LogSplit], calibration: Calibration, strides: tuple[int, ...]
) -> dict[str, Examples]:
    """Collect what is known of jumps from the states of every split.

    Raises:
        ConfigError: nothing is known in a split.
    """
    examples = {}
    for (name, split), cells in zip(splits.items(), cells_of(list(splits.values())), strict=True):
        rows = jump_rows(split, calibration, strides)
        is_known = ~(np.isnan(rows.log_truncation_error) & np.isnan(rows.sibling_variance))
        states = np.flatnonzero(is_known.any(axis=1))
        if not len(states):
            raise ConfigError(
                f"split {name!r} has neither jumps nor siblings: log it with probes and siblings"
            )
        features = {block: torch.from_numpy(part) for block, part in split.features.items()}
        examples[name] = Examples(split, features, rows, cells, states)
    return examples


def targets_of(rows: JumpRows, device: torch.device | str = "cpu") -> JumpTargets:
    """Rows as the loss takes them, in single precision."""
    return JumpTargets(
        *(torch.from_numpy(getattr(rows, name)).float().to(device) for name in JumpTargets._fields)
    )


@torch.no_grad()
def predict_jumps(
    head: InformationGainEvaluator, examples: Examples, prompts: dict[str, int]
) -> dict[str, JumpPredictions]:
    """Predict all jumps of a split of which something is known.

    Args:
        head: whose mode (training or not) is left as it was.
        examples: of the split.
        prompts: numbers of prompts; those of new ones are added.

    Returns:
        Predictions by target.
    """
    states, was_training = examples.states, head.training
    head.eval()
    parts = [
        _predicted(head, examples, chosen)
        for chosen in np.array_split(states, -(-len(states) // _ROWS_PER_CALL))
    ]
    head.train(was_training)
    with np.errstate(divide="ignore"):
        log_variance = np.log(examples.rows.sibling_variance)
    actual = examples.rows._asdict() | {"log_variance": log_variance}
    jumps = examples.rows.target_log_snr.shape[1]
    cells = examples.cells[states][:, None] * jumps + np.arange(jumps)
    texts = examples.split.trajectories.prompt[examples.split.states.trajectory[states]]
    owners = np.array([prompts.setdefault(text, len(prompts)) for text in texts.tolist()])
    owners = np.repeat(owners[:, None], jumps, axis=1)
    found = {}
    for target, name in TARGETS.items():
        known = np.isfinite(actual[name][states])
        found[target] = JumpPredictions(
            predicted=np.concatenate([part[name] for part, _ in parts])[known],
            typical=np.concatenate([part[name] for _, part in parts])[known],
            actual=actual[name][states][known],
            cell=cells[known],
            prompt=owners[known],
        )
    return found


def _predicted(
    head: InformationGainEvaluator, examples: Examples, states: npt.NDArray[np.int64]
) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, npt.NDArray[np.float64]]]:
    """Outputs for states, and for the typical state, by name."""
    device = head.typical.device
    source = torch.from_numpy(examples.split.states.log_snr[states]).float().to(device)
    target = torch.from_numpy(examples.rows.target_log_snr[states]).float().to(device)
    features = {name: rows[states].to(device) for name, rows in examples.features.items()}
    seen, typical = (head.forward(given, source, target) for given in (features, None))
    return _on_host(seen), _on_host(typical)


def _on_host(output: IGEOutput) -> dict[str, npt.NDArray[np.float64]]:
    return {name: output[name].double().cpu().numpy() for name in TARGETS.values()}

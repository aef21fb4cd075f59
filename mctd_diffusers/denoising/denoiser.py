"""Network calls: in chunks of one fixed size, at mixed timesteps, metered; and taps for features.

A network's answer for a row depends, in the last bits, on how many rows stand beside it, but not
on which. So every call holds exactly ``rows_per_call`` latents, repeated to fill the last chunk:
then a sample's result depends neither on the wave it rode in nor on the other images. Where memory
runs out the size is halved, for good.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mctd_diffusers.denoising.protocols import Network, Outputs
from mctd_diffusers.denoising.solver_memory import SolverState
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import Counts, Ledger

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")
"""What accelerators, the host and their libraries say of it, in lower case."""


class Chunk(NamedTuple):
    """Rows of one call.

    Attributes:
        rows: the useful rows, as a slice of all.
        filled: positions within them, repeated to the size of a call.
    """

    rows: slice
    filled: list[int]

    @property
    def useful(self) -> int:
        """Number of useful rows."""
        return self.rows.stop - self.rows.start

    def fill(self, batch: Float[Tensor, "useful *sample"]) -> Float[Tensor, "rows *sample"]:
        """The useful rows, repeated to the size of a call."""
        return batch if len(batch) == len(self.filled) else batch[self.filled]

    def pick(self, items: Sequence[T]) -> list[T]:
        """The same for what is no tensor: of all items, those of this call."""
        some = items[self.rows]
        return [some[row] for row in self.filled]


def chunks(rows: int, rows_per_call: int) -> Iterator[Chunk]:
    """Cut ``rows`` into calls of exactly ``rows_per_call``, the last one filled by repetition."""
    for start in range(0, rows, rows_per_call):
        yield _chunk(start, rows, rows_per_call)


def _chunk(start: int, rows: int, rows_per_call: int) -> Chunk:
    useful = min(rows_per_call, rows - start)
    return Chunk(slice(start, start + useful), [row % useful for row in range(rows_per_call)])


class Calls:
    """Makes calls of one fixed size for each phase, which is halved for good as memory runs out.

    Args:
        rows_per_call: latents in every call, to begin with.
        ledger: is charged the seconds, and told the sizes. Of phases whose sizes it knows already
            the last one is begun with.
        device: that the calls run on.

    Raises:
        ConfigError: ``rows_per_call`` is below 1.
    """

    def __init__(self, rows_per_call: int, ledger: Ledger, device: torch.device) -> None:
        if rows_per_call < 1:
            raise ConfigError(f"rows_per_call is {rows_per_call}; choose at least 1.")
        self._rows_per_call = rows_per_call
        self._ledger = ledger
        self._device = device
        self._rows = {phase: sizes[-1] for phase, sizes in ledger.rows_by_phase.items()}

    def make(self, phase: str, rows: int, call: Callable[[Chunk], T]) -> Iterator[tuple[Chunk, T]]:
        """Call ``call`` on every chunk of ``rows``; answers with the chunk and what it said.

        Raises:
            Exception: what ``call`` raises, out of memory too where one latent is too much.
        """
        start = 0
        while start < rows:
            size = self._rows.get(phase, self._rows_per_call)
            chunk = _chunk(start, rows, size)
            try:
                with timed(self._ledger, phase, self._device):
                    answer = call(chunk)
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            else:
                sizes = self._ledger.rows_by_phase.setdefault(phase, [])
                if sizes[-1:] != [size]:
                    sizes.append(size)
                yield chunk, answer
                start = chunk.rows.stop
                continue
            # Out here the error is gone, and with it what its frames held.
            self._rows[phase] = size // 2
            free_memory(self._device)
            logger.warning(
                "%s ran out of memory in calls of %d latents, so it goes on in calls of %d; begin "
                "with rows_per_call=%d",
                phase,
                size,
                size // 2,
                size // 2,
            )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that there is no memory left."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        message = str(error).lower()
        if isinstance(error, RuntimeError) and any(said in message for said in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def free_memory(device: torch.device) -> None:
    """Give back what nothing uses."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


@contextmanager
def timed(ledger: Ledger, phase: str, device: torch.device) -> Iterator[None]:
    """Charge the wall-clock seconds of a block to ``phase``, the device's queue included."""
    start = time.perf_counter()
    try:
        yield
        synchronize(device)
    finally:
        ledger.charge_seconds(phase, time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator to finish what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


class Evaluation(NamedTuple):
    """What the network says of a batch of samples.

    Attributes:
        outputs: its answers, guidance kept apart.
        features: by name of the block, ``[batch, features]``; empty without a tap.
        maps: features of one block where they are, not pooled; ``None`` where no tap keeps them.
    """

    outputs: Outputs
    features: dict[str, Float[Tensor, "batch features"]]
    maps: Float[Tensor, "batch channels rows columns"] | None = None


class FeatureTap:
    """Reads blocks of a denoiser, pooled over space, while it runs.

    Of every channel the mean and the standard deviation over space, in this order. A context
    manager: the hooks stand while it is open, and are gone however it closes. Pooling happens
    inside the hooks, so the maps themselves are not kept, but for that of ``map_block``.

    Args:
        network: a denoiser of diffusers, see `tappable_blocks`.
        rows_per_latent: rows of one latent in a call. With 2 (guidance) the batch is the
            unconditional half, then the conditional one, as stock pipelines build it, and only the
            conditional half is read: what the picture is meant to become. Of a network that is
            called for each half, the last call is read.
        conditional_first: whether the conditional half comes first.
        names: blocks to read; ``None`` reads all of `tappable_blocks`.
        map_block: the one of `mappable_blocks` whose features are kept as they are over space.

    Raises:
        ConfigError: a name is that of no block.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        rows_per_latent: int = 1,
        conditional_first: bool = False,
        names: Collection[str] | None = None,
        map_block: str | None = None,
    ) -> None:
        self._network = network
        self._blocks = _named(network, tappable_blocks(network), names)
        mapped = () if map_block is None else (map_block,)
        self._mapped = _named(network, mappable_blocks(network), mapped)
        self._rows_per_latent = rows_per_latent
        self._conditional_first = conditional_first
        self._hooks: list[Any] = []
        self._features: dict[str, Tensor] = {}
        self._maps: Tensor | None = None

    @property
    def mappable(self) -> tuple[str, ...]:
        """Names of the blocks whose map it could keep; none where the network has no such."""
        return tuple(mappable_blocks(self._network))

    def mapping(self, block: str, *, pools: bool = True) -> FeatureTap:
        """A tap on the same network that keeps the map of a block.

        Args:
            block: one of `mappable_blocks`.
            pools: whether it reads pooled features too, as this one does.

        Raises:
            ConfigError: there is no such block.
        """
        return FeatureTap(
            self._network,
            rows_per_latent=self._rows_per_latent,
            conditional_first=self._conditional_first,
            names=tuple(self._blocks) if pools else (),
            map_block=block,
        )

    def __enter__(self) -> FeatureTap:
        for name, block in self._blocks.items():
            self._hooks.append(block.register_forward_hook(partial(self._read, name)))
        for block in self._mapped.values():
            self._hooks.append(block.register_forward_hook(self._keep_map))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._features.clear()
        self._maps = None

    def take(self) -> dict[str, Float[Tensor, "batch features"]]:
        """The features of the last call, in single precision; empty if there was none."""
        features, self._features = self._features, {}
        return features

    def take_maps(self) -> Float[Tensor, "batch channels rows columns"] | None:
        """The map of the last call, in the network's precision; ``None`` if none was kept."""
        maps, self._maps = self._maps, None
        return maps

    def _read(self, name: str, block: nn.Module, inputs: Any, output: Any) -> None:
        self._features[name] = pooled(self._conditional_half(output).float())

    def _keep_map(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._maps = self._conditional_half(output)

    def _conditional_half(self, output: Any) -> Tensor:
        # UNets: (hidden, residuals); transformers: (hidden of the text, hidden).
        parts = output if isinstance(output, tuple) else (output,)
        hidden = [part for part in parts if isinstance(part, Tensor)][-1]
        place = 0 if self._conditional_first else -1
        return hidden.chunk(self._rows_per_latent)[place].detach()


def _named(
    network: nn.Module, blocks: dict[str, nn.Module], names: Collection[str] | None
) -> dict[str, nn.Module]:
    """Those of the blocks that are named; all of them by ``None``.

    Raises:
        ConfigError: a name is that of no block.
    """
    if unknown := sorted(set(names or ()) - set(blocks)):
        raise ConfigError(
            f"{type(network).__name__} has no blocks {', '.join(unknown)}: "
            + (f"name some of {', '.join(blocks)}" if blocks else "it has none over a picture")
        )
    return {name: block for name, block in blocks.items() if names is None or name in names}


def tappable_blocks(network: Any) -> dict[str, nn.Module]:
    """The blocks of a denoiser whose features can be read, by name, from its input on.

    Of a UNet ``down.0``, ``down.1``, ... and ``mid`` (where it has a middle); of a transformer
    ``block.0``, ``block.1``, ..., those of two streams before those of one.
    """
    if hasattr(network, "down_blocks"):
        blocks = {f"down.{i}": block for i, block in enumerate(network.down_blocks)}
        return blocks if network.mid_block is None else blocks | {"mid": network.mid_block}
    stacks = ("transformer_blocks", "single_transformer_blocks", "layers")
    chain = [block for name in stacks for block in getattr(network, name, ())]
    return {f"block.{i}": block for i, block in enumerate(chain)}


def mappable_blocks(network: Any) -> dict[str, nn.Module]:
    """The blocks of a UNet, whose features lie over the picture, by name, from its input on.

    Those of `tappable_blocks` and, on the way up, ``up.0``, ``up.1``, ... Other networks have none.
    """
    if not hasattr(network, "up_blocks"):
        return {}
    up = {f"up.{i}": block for i, block in enumerate(network.up_blocks)}
    return tappable_blocks(network) | up


def pooled(maps: Float[Tensor, "batch *axes"]) -> Float[Tensor, "batch features"]:
    """Mean of every channel over space, then the standard deviation of every channel.

    Args:
        maps: ``[batch, channels, *space]``, or tokens, ``[batch, tokens, channels]``.
    """
    flat = maps.mT if maps.ndim == 3 else maps.flatten(2)
    return torch.cat([flat.mean(-1), flat.std(-1, correction=0)], dim=1)


class Denoiser:
    """Evaluates samples at any mix of noise levels, in calls of one fixed size.

    Args:
        network: the pipeline's denoiser.
        stepper: knows what the network sees of samples.
        rows_per_call: latents in every call, see `Calls`; with guidance the network gets twice
            that.
        ledger: is charged.
        device: that the network runs on.
        features: a tap on the network, which is opened for each call; ``None`` to read none.
        kinds: of each problem; a call holds problems of one kind alone. Where texts are not padded
            to one length, a row would else depend on how long those beside it are. ``None`` is one
            kind for all.

    Raises:
        ConfigError: ``rows_per_call`` is below 1.
    """

    def __init__(
        self,
        network: Network,
        stepper: Stepper,
        *,
        rows_per_call: int,
        ledger: Ledger,
        device: torch.device,
        features: FeatureTap | None = None,
        kinds: Sequence[Hashable] | None = None,
    ) -> None:
        self._calls = Calls(rows_per_call, ledger, device)
        self.network = network
        self.stepper = stepper
        self.rows_per_call = rows_per_call
        self.ledger = ledger
        self.features = features
        self.kinds = kinds

    def __call__(
        self,
        latents: Float[Tensor, "batch *sample"],
        states: Sequence[SolverState],
        problems: Sequence[int],
    ) -> Evaluation:
        """Evaluate samples: 1 NFE each.

        Args:
            latents: at least one sample, unscaled; of those midway the midpoints.
            states: where each stands.
            problems: the image of each, whose conditioning and account it is.
        """
        groups: dict[Hashable, list[int]] = {}
        for row, problem in enumerate(problems):
            kind = None if self.kinds is None else self.kinds[problem]
            groups.setdefault(kind, []).append(row)
        if len(groups) == 1:
            return self._evaluate(latents, states, problems)
        evaluation = _together(
            [
                self._evaluate(
                    latents[rows], [states[row] for row in rows], [problems[row] for row in rows]
                )
                for rows in groups.values()
            ]
        )
        order = [row for rows in groups.values() for row in rows]
        return _rows_of(evaluation, sorted(range(len(order)), key=order.__getitem__))

    def _evaluate(
        self, latents: Tensor, states: Sequence[SolverState], problems: Sequence[int]
    ) -> Evaluation:
        """Evaluate samples of one kind."""
        rows_per_latent = self.network.rows_per_latent
        evaluations = []

        def call(chunk: Chunk) -> Evaluation:
            return self._call(
                chunk.fill(latents[chunk.rows]), chunk.pick(states), chunk.pick(problems)
            )

        for chunk, evaluation in self._calls.make("network", len(latents), call):
            evaluations.append(_rows_of(evaluation, slice(chunk.useful)))
            self.ledger.charge(problems[chunk.rows], Counts(nfe=1, rows=rows_per_latent))
            padding = (len(chunk.filled) - chunk.useful) * rows_per_latent
            self.ledger.charge_shared(Counts(padded_rows=padding, calls=1))
        return _together(evaluations)

    def _call(
        self, latents: Tensor, states: Sequence[SolverState], problems: Sequence[int]
    ) -> Evaluation:
        inputs, timesteps = self.stepper.network_input(latents, states)
        if self.features is None:
            return Evaluation(self.network(inputs, timesteps, problems), {})
        with self.features as tap:
            outputs = self.network(inputs, timesteps, problems)
            return Evaluation(outputs, tap.take(), tap.take_maps())

    def combine(
        self, outputs: Outputs, guidances: Sequence[float | None] | None = None
    ) -> Float[Tensor, "batch *sample"]:
        """Guided outputs, in chunks of the same fixed size (guidance may look at whole rows).

        Args:
            outputs: of at least one sample.
            guidances: scale for each sample; ``None`` is the call's own.
        """
        conditional, without = outputs
        if without is None:
            return conditional
        given = guidances or [None] * len(conditional)
        combined = torch.empty_like(conditional)
        for guidance in dict.fromkeys(given):
            rows = [row for row, other in enumerate(given) if other == guidance]
            for chunk in chunks(len(rows), self.rows_per_call):
                filled = Outputs(*(output[chunk.pick(rows)] for output in (conditional, without)))
                answer = self.network.combine(filled, guidance)
                combined[rows[chunk.rows]] = answer[: chunk.useful]
        return combined


def _rows_of(evaluation: Evaluation, rows: slice | list[int]) -> Evaluation:
    (conditional, unconditional), features, maps = evaluation
    outputs = Outputs(conditional[rows], None if unconditional is None else unconditional[rows])
    return Evaluation(
        outputs,
        {name: feature[rows] for name, feature in features.items()},
        None if maps is None else maps[rows],
    )


def _together(evaluations: Sequence[Evaluation]) -> Evaluation:
    if len(evaluations) == 1:
        return evaluations[0]
    outputs = [evaluation.outputs for evaluation in evaluations]
    unconditional = [o.unconditional for o in outputs if o.unconditional is not None]
    maps = [evaluation.maps for evaluation in evaluations if evaluation.maps is not None]
    return Evaluation(
        Outputs(
            torch.cat([o.conditional for o in outputs]),
            torch.cat(unconditional) if unconditional else None,
        ),
        {
            name: torch.cat([evaluation.features[name] for evaluation in evaluations])
            for name in evaluations[0].features
        },
        torch.cat(maps) if maps else None,
    )

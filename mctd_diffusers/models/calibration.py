"""What a value at a noise level says of the final reward. numpy and float64 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Turns the value at a noise level into what it says of the final reward.

    ``V(x_t) = slope(t) value + offset(t)``, both linear in log-SNR between knots, and constant
    outside. At much noise the slope is small: the value says little there.

    Attributes:
        log_snr: of the knots, rising.
        slope: at the knots.
        offset: at the knots, in reward units.
        deviation: of the final reward around the calibrated value, in reward units.
    """

    log_snr: tuple[float, ...]
    slope: tuple[float, ...]
    offset: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(
        self, value: Float[np.ndarray, "*batch"], log_snr: Float[np.ndarray, "*batch"]
    ) -> Float[np.ndarray, "*batch"]:
        """Calibrated values, in reward units; of unfinished samples only."""
        return np.asarray(self.slope_at(log_snr) * value + self._at(log_snr, self.offset))

    def slope_at(self, log_snr: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
        """Change of the calibrated value for each unit of the value."""
        return self._at(log_snr, self.slope)

    def deviation_at(self, log_snr: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
        """How far off the final reward is, as a standard deviation."""
        return self._at(log_snr, self.deviation)

    def _at(self, log_snr: npt.NDArray[Any], curve: Sequence[float]) -> Floats:
        return np.asarray(np.interp(log_snr, self.log_snr, curve))

    def to_dict(self) -> dict[str, list[float]]:
        """Plain numbers, for a config."""
        return {name: list(curve) for name, curve in asdict(self).items()}

    @classmethod
    def from_dict(cls, curves: Mapping[str, Sequence[float]]) -> Calibration:
        """The reverse of :meth:`to_dict`."""
        return cls(**{name: tuple(curve) for name, curve in curves.items()})

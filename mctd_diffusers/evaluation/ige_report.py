"""How good the predictions of an information gain evaluator are: figures, and their picture.

A *cell* is a set of jumps from the same step of the same schedule over the same stride: what a
table of means could know. Correlations are also taken within cells, where such a table has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.metrics import Interval, correlation, resampled_means

QUANTILES: Final = tuple(round(0.1 * i, 1) for i in range(1, 10))
"""Where observed and expected shares are compared."""
_LABELS: Final = {
    "truncation_error": "log truncation error",
    "resolved_variance": "log resolved variance",
    "mean_gain": "mean gain",
    "final_similarity": "final similarity",
}


class Judged(NamedTuple):
    """Predictions of one target, and what came true; one entry a jump.

    Attributes:
        predicted: by the evaluator.
        typical: by the evaluator, of the typical state at the same jump.
        actual: measured.
        cell: an integer, equal where jumps are of one cell.
        prompt: an integer for each prompt; prompts are what intervals are over.
    """

    predicted: Float[np.ndarray, " jumps"]
    typical: Float[np.ndarray, " jumps"]
    actual: Float[np.ndarray, " jumps"]
    cell: Int[np.ndarray, " jumps"]
    prompt: Int[np.ndarray, " jumps"]


@dataclass(frozen=True)
class TargetFigures:
    """How good predictions of one target are.

    Attributes:
        count: jumps.
        overall: correlation over all jumps; ``None`` where it is undefined.
        within: correlation within cells, with its 95 % interval over prompts.
        ranks_within: that of ranks.
        gain: share of the squared error that a table of cell means leaves and predictions do not,
            with its interval; above 0 where they are better than the table.
        calibration_error: of standardised residuals, see `expected_calibration_error`.
    """

    count: int
    overall: float | None
    within: Interval
    ranks_within: float | None
    gain: Interval
    calibration_error: float


def target_figures(
    judged: Judged,
    means: Float[np.ndarray, " jumps"],
    transforms: Float[np.ndarray, " jumps"],
) -> TargetFigures:
    """Take all figures of one target.

    Args:
        judged: predictions and what came true.
        means: what a table of cell means says of each jump, see `table_of_means`.
        transforms: probability integral transforms of the residuals.

    Raises:
        ConfigError: there are no jumps, or no cell has two.
    """
    predicted, actual = (centred(rows, judged.cell) for rows in (judged.predicted, judged.actual))
    return TargetFigures(
        count=len(judged.actual),
        overall=correlation(judged.predicted, judged.actual),
        within=within_correlation(judged),
        ranks_within=correlation(ranks(predicted), ranks(actual)),
        gain=gain_over_means(judged, means),
        calibration_error=expected_calibration_error(transforms),
    )


def centred(
    values: Float[np.ndarray, " jumps"], cell: Int[np.ndarray, " jumps"]
) -> Float[np.ndarray, " jumps"]:
    """Take the mean of its cell off each value.

    >>> centred(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1]))
    array([-1.,  1.,  0.])
    """
    _, place, counts = np.unique(cell, return_inverse=True, return_counts=True)
    return np.asarray(values - (np.bincount(place, values) / counts)[place])


def within_correlation(judged: Judged) -> Interval:
    """Correlate within cells: Pearson's of what is left of both sides without their cell means.

    The interval is a percentile bootstrap over prompts, with the cell means held.

    Raises:
        ConfigError: nothing varies within cells.
    """
    both_sides = judged.predicted, judged.actual
    predicted, actual = (centred(rows, judged.cell) for rows in both_sides)
    products = predicted * actual, predicted**2, actual**2
    totals = [rows.sum() for rows in products]
    if not all(_varies(rows, judged.cell) for rows in both_sides):
        raise ConfigError(
            f"{len(actual)} jumps, none of whose cells has two that differ in what is predicted "
            "and in what came true: log more trajectories of each schedule"
        )
    both, first, second = (resampled_means(_by_prompt(rows, judged.prompt)) for rows in products)
    drawn = both / np.sqrt(first * second)
    return Interval(
        float(totals[0] / np.sqrt(totals[1] * totals[2])), *np.nanpercentile(drawn, [2.5, 97.5])
    )


def means_of_cells(judged: Judged) -> dict[int, float]:
    """What came true in the mean, by cell."""
    cells, place, counts = np.unique(judged.cell, return_inverse=True, return_counts=True)
    means = np.bincount(place, judged.actual) / counts
    return dict(zip(cells.tolist(), means.tolist(), strict=True))


def table_of_means(judged: Judged, known: Mapping[int, float]) -> Float[np.ndarray, " jumps"]:
    """Predict each jump by the mean of its cell in training, without a look at the state.

    In a cell that training never saw, as those of another grid or scheduler, by what the evaluator
    says of the typical state, to which the table is its continuation.

    Args:
        judged: jumps of one target.
        known: means of the cells that training saw, see `means_of_cells`.
    """
    trained = np.array([known.get(int(cell), np.nan) for cell in judged.cell])
    return np.asarray(np.where(np.isnan(trained), judged.typical, trained))


def gain_over_means(judged: Judged, means: Float[np.ndarray, " jumps"]) -> Interval:
    """Return ``1 - sum (actual - predicted)^2 / sum (actual - mean)^2``, with its interval.

    Args:
        judged: predictions and what came true.
        means: of each jump's cell, see `table_of_means`.

    Raises:
        ConfigError: no jump differs from the mean of its cell.
    """
    errors = (judged.actual - judged.predicted) ** 2
    spread = (judged.actual - means) ** 2
    if not spread.sum() > 0:
        raise ConfigError("no jump differs from the mean of its cell: log more trajectories")
    left, all_of_it = (
        resampled_means(_by_prompt(rows, judged.prompt)) for rows in (errors, spread)
    )
    drawn = 1 - left / all_of_it
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(1 - errors.sum() / spread.sum()), float(low), float(high))


def ranks(values: Float[np.ndarray, " values"]) -> Float[np.ndarray, " values"]:
    """Rank values from 0; equal ones share the mean of their ranks.

    >>> ranks(np.array([3.0, 1.0, 3.0]))
    array([1.5, 0. , 1.5])
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[place])


# --- calibration


def normal_transform(
    residuals: Float[np.ndarray, " jumps"], deviations: Float[np.ndarray, " jumps"]
) -> Float[np.ndarray, " jumps"]:
    """Probability integral transform of residuals, which should be normal: even over 0 to 1.

    Args:
        residuals: actual less predicted.
        deviations: what they should be like.
    """
    return np.asarray(torch.special.ndtr(torch.from_numpy(residuals / deviations)).numpy())


def chi_square_transform(
    variances: Float[np.ndarray, " groups"],
    log_variance: Float[np.ndarray, " groups"],
    siblings: int,
) -> Float[np.ndarray, " groups"]:
    """Probability integral transform of sample variances, if v were the variance of siblings.

    ``(M - 1) s^2 / v`` of M Gaussian siblings is a chi-square number of M - 1 degrees of freedom.

    Args:
        variances: s^2, estimated without bias.
        log_variance: predicted, log v.
        siblings: M.
    """
    half = torch.tensor((siblings - 1) / 2, dtype=torch.float64)
    ratio = torch.from_numpy(variances * np.exp(-log_variance))
    return np.asarray(torch.special.gammainc(half, half * ratio).numpy())


class LogVarianceNoise(NamedTuple):
    """Mean and variance of ``log s^2 - log v`` that come of having few siblings alone."""

    mean: float
    variance: float


def log_variance_noise(siblings: int) -> LogVarianceNoise:
    """What the log of a sample variance is off by: digamma and trigamma of half the degrees."""
    half = torch.tensor((siblings - 1) / 2, dtype=torch.float64)
    mean = torch.special.digamma(half) - half.log()
    return LogVarianceNoise(float(mean), float(torch.special.polygamma(1, half)))


def expected_calibration_error(transforms: Float[np.ndarray, " jumps"]) -> float:
    """Average ``|share of transforms at most q - q|`` over ``q`` = 0.1, 0.2, ... 0.9.

    0 where residuals are as they should be; at most 0.5.

    Args:
        transforms: probability integral transforms of residuals.

    Raises:
        ConfigError: there are none.

    Reference: Kuleshov, Fenner and Ermon, "Accurate uncertainties for deep learning using
    calibrated regression" (2018), equation 9, with absolute for squared differences.
    """
    return float(np.abs(observed_shares(transforms) - QUANTILES).mean())


def observed_shares(transforms: Float[np.ndarray, " jumps"]) -> Float[np.ndarray, " quantiles"]:
    """Shares of transforms that are at most 0.1, 0.2, ... 0.9.

    Raises:
        ConfigError: there are none.
    """
    if len(transforms) == 0:
        raise ConfigError("there are no residuals to calibrate: log jumps and siblings")
    return np.array([(transforms <= quantile).mean() for quantile in QUANTILES])


class Deviations(NamedTuple):
    """Standard deviation of residuals, by what was predicted.

    Attributes:
        predicted: knots, rising.
        deviation: at the knots; linear between them, constant outside.
    """

    predicted: Float[np.ndarray, " knots"]
    deviation: Float[np.ndarray, " knots"]

    def __call__(self, predicted: Float[np.ndarray, " jumps"]) -> Float[np.ndarray, " jumps"]:
        """Deviations to expect around predictions."""
        return np.asarray(np.interp(predicted, self.predicted, self.deviation))


def fit_deviations(
    predicted: Float[np.ndarray, " jumps"],
    actual: Float[np.ndarray, " jumps"],
    *,
    noise: float = 0.0,
    bins: int = 8,
) -> Deviations:
    """Fit how far off predictions are, on jumps that nothing was trained on.

    Args:
        predicted: by the evaluator.
        actual: measured.
        noise: variance of the measurement itself, which is taken off.
        bins: of equally many jumps each, whose rms residuals are the knots.

    Raises:
        ConfigError: there are fewer than two jumps.
    """
    if len(predicted) < 2:
        raise ConfigError(f"{len(predicted)} jumps to fit deviations on: validate on more prompts")
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    squares = np.array([((actual - predicted)[part] ** 2).mean() for part in parts])
    deviation = np.sqrt(np.maximum(squares - noise, 0))
    return Deviations(np.array([predicted[part].mean() for part in parts]), deviation)


@dataclass(frozen=True)
class ErrorModel:
    """How far off predictions are to be expected, fitted on prompts that nothing was trained on.

    Attributes:
        offsets: mean residual, by target. That of a log variance is not 0 where the variance is
            right in the mean: logs are then too small in the mean.
        deviations: of residuals around it, by target.
    """

    offsets: dict[str, float]
    deviations: dict[str, Deviations]

    def transforms(self, target: str, judged: Judged, siblings: int) -> Float[np.ndarray, " jumps"]:
        """Probability integral transforms of the residuals of a target.

        To the deviation of a predicted log variance that of a sample variance is added.
        """
        residuals = judged.actual - judged.predicted - self.offsets[target]
        spread = self.deviations[target](judged.predicted)
        if target == "resolved_variance":
            noise = log_variance_noise(siblings)
            residuals, spread = residuals - noise.mean, np.sqrt(spread**2 + noise.variance)
        return normal_transform(residuals, spread)


def fit_error_model(judged: Mapping[str, Judged], siblings: int) -> ErrorModel:
    """Fit offsets and deviations of all targets of which there are two jumps at least.

    Args:
        judged: by target, on prompts that nothing was trained on.
        siblings: in each of their groups.
    """
    offsets, deviations = {}, {}
    for target, rows in judged.items():
        if len(rows.actual) < 2:
            continue
        mean, variance = 0.0, 0.0
        if target == "resolved_variance":
            mean, variance = log_variance_noise(siblings)
        offsets[target] = float((rows.actual - mean - rows.predicted).mean())
        deviations[target] = fit_deviations(
            rows.predicted, rows.actual - mean - offsets[target], noise=variance
        )
    return ErrorModel(offsets, deviations)


@dataclass(frozen=True)
class Report:
    """How good an evaluator is on held-out splits.

    Attributes:
        figures: by split and target.
        chi_square_errors: by split, the calibration error of sibling variances if the predicted
            variance were exact, see `chi_square_transform`.
        judged: predictions of the first split, by target.
        transforms: of their residuals.
    """

    figures: dict[str, dict[str, TargetFigures]]
    chi_square_errors: dict[str, float]
    judged: dict[str, Judged]
    transforms: dict[str, Float[np.ndarray, " jumps"]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        splits = {
            split: {target: asdict(found) for target, found in targets.items()}
            for split, targets in self.figures.items()
        }
        return {"figures": splits, "chi_square_calibration_errors": self.chi_square_errors}


def make_report(
    splits: Mapping[str, Mapping[str, Judged]],
    siblings: Mapping[str, int],
    *,
    known: Mapping[str, Mapping[int, float]],
    errors: ErrorModel,
) -> Report:
    """Measure predictions on every held-out split.

    Args:
        splits: predictions by split and target; targets of which a split knows nothing, or which
            do not vary within its cells, are left out.
        siblings: in each group of a split, by its name.
        known: means of the cells that training saw, by target.
        errors: how far off predictions are to be expected.

    Raises:
        ConfigError: predictions do not vary within the cells of a split.
    """
    report = Report({}, {}, {}, {})
    for name, targets in splits.items():
        report.figures[name] = {}
        for target, rows in targets.items():
            if target not in errors.deviations or not _varies(rows.actual, rows.cell):
                continue
            transforms = errors.transforms(target, rows, siblings[name])
            means = table_of_means(rows, known[target])
            report.figures[name][target] = target_figures(rows, means, transforms)
            if target == "resolved_variance":
                exact = chi_square_transform(np.exp(rows.actual), rows.predicted, siblings[name])
                report.chi_square_errors[name] = expected_calibration_error(exact)
            if len(report.figures) == 1:
                report.judged[target], report.transforms[target] = rows, transforms
    return report


# --- in words and pictures


def figures_table(figures: Mapping[str, Mapping[str, TargetFigures]]) -> list[str]:
    """Lines of a markdown table: splits, and in each its targets."""
    lines = [
        "| split | target | jumps | overall | within cells | ranks within | gain over cell means "
        "| calibration error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for split, targets in figures.items():
        for target, found in targets.items():
            lines.append(
                f"| {split} | {_LABELS[target]} | {found.count} | {_number(found.overall)} "
                f"| {_interval(found.within)} | {_number(found.ranks_within)} "
                f"| {_interval(found.gain)} | {found.calibration_error:.3f} |"
            )
    return lines


def card_sections(report: Report) -> str:
    """The figures of a model card, with what they mean, in markdown."""
    first = next(iter(report.figures))
    exact = ", ".join(f"{name} {error:.3f}" for name, error in report.chi_square_errors.items())
    return f"""## Figures

{_lines(figures_table(report.figures))}

A *cell* holds jumps from the same step of the same schedule (scheduler, eta, number of steps) over
the same stride. *Within cells*: Pearson's correlation after the mean of its cell is taken off both
sides, with a 95 % bootstrap interval over prompts; truncation errors and variances are logs. *Gain
over cell means*: `1 - sum (y - prediction)^2 / sum (y - mean)^2`, the mean that of the cell in
training; in a cell that training never saw, the prediction for the typical state.

*Calibration error*: the mean over q = 0.1, 0.2, ... 0.9 of `|share of transforms at most q - q|`,
where the transform of a residual is the normal distribution function of it over its deviation.
Mean and deviation of residuals are fitted on the validation prompts, the latter by what is
predicted. To that of the log variance
the noise of the log of a sample variance is added (digamma and trigamma of half of M - 1). If the
predicted variance v were held to be exact, the error by the chi-square law of `(M - 1) s^2 / v`
would be: {exact or "unknown"}.

## Reliability on {first}

Shares of residuals below each quantile.

{_lines(reliability_table(report.transforms))}

![Predicted against measured, and observed against expected shares](calibration.png)
"""


def reliability_table(transforms: Mapping[str, Float[np.ndarray, " jumps"]]) -> list[str]:
    """Lines of a markdown table: the shares of residuals below each quantile, by target."""
    lines = [
        f"| expected | {' | '.join(f'{quantile:.1f}' for quantile in QUANTILES)} |",
        f"| --- | {' | '.join('---' for _ in QUANTILES)} |",
    ]
    for target, found in transforms.items():
        shares = " | ".join(f"{share:.2f}" for share in observed_shares(found))
        lines.append(f"| {_LABELS[target]} | {shares} |")
    return lines


def calibration_figure(
    judged: Mapping[str, Judged], transforms: Mapping[str, Float[np.ndarray, " jumps"]]
) -> Figure:
    """Draw predictions against what came true, and observed against expected shares.

    Args:
        judged: by target.
        transforms: of the residuals, by target.
    """
    figure = Figure(figsize=(4 * len(judged), 7.5), layout="constrained", dpi=110)
    axes: Any = figure.subplots(2, len(judged), squeeze=False)
    for column, (target, rows) in enumerate(judged.items()):
        above, below = axes[:, column]
        above.hexbin(rows.predicted, rows.actual, gridsize=40, mincnt=1, bins="log", cmap="Blues")
        ends = [float(rows.actual.min()), float(rows.actual.max())]
        above.plot(ends, ends, color="#8A8A8A", linewidth=1)
        above.set(title=_LABELS[target], xlabel="predicted", ylabel="measured")
        expected = [0, *QUANTILES, 1]
        below.plot([0, 1], [0, 1], color="#8A8A8A", linewidth=1)
        below.plot(expected, [0, *observed_shares(transforms[target]), 1], marker="o")
        below.set(xlabel="expected share of residuals below", ylabel="observed share")
    return figure


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(interval: Interval) -> str:
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _varies(values: Float[np.ndarray, " jumps"], cell: Int[np.ndarray, " jumps"]) -> bool:
    """Whether two values of one cell differ."""
    if not len(values):
        return False
    pairs = np.unique(np.stack([cell, values]), axis=1)
    return pairs.shape[1] > len(np.unique(cell))


def _by_prompt(
    values: Float[np.ndarray, " jumps"], prompt: Int[np.ndarray, " jumps"]
) -> Float[np.ndarray, " prompts"]:
    """Sums of each prompt's jumps."""
    return np.asarray(np.bincount(np.unique(prompt, return_inverse=True)[1], values))

"""Figures of an information gain evaluator, on predictions whose worth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.ige_report import (
    Judged,
    calibration_figure,
    card_sections,
    centred,
    chi_square_transform,
    expected_calibration_error,
    figures_table,
    fit_deviations,
    fit_error_model,
    gain_over_means,
    log_variance_noise,
    make_report,
    means_of_cells,
    normal_transform,
    ranks,
    reliability_table,
    table_of_means,
    within_correlation,
)

CELLS, PROMPTS, EACH = 20, 40, 40


def make_judged(correlation: float, *, level: float = 3.0, seed: int = 0) -> Judged:
    """Jumps whose cells differ much and whose residuals correlate as they should."""
    rng = np.random.default_rng(seed)
    cell = np.repeat(np.arange(CELLS), EACH)
    prompt = np.tile(np.arange(PROMPTS), CELLS * EACH // PROMPTS)
    means = level * rng.normal(size=CELLS)[cell]
    signal = rng.normal(size=len(cell))
    noise = rng.normal(size=len(cell))
    actual = means + signal
    predicted = means + correlation * (correlation * signal + np.sqrt(1 - correlation**2) * noise)
    return Judged(predicted, means, actual, cell, prompt)


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_correlation_within_cells_is_that_of_what_is_left_of_them(correlation: float) -> None:
    judged = (
        make_judged(correlation)
        if correlation
        else make_judged(0.6)._replace(predicted=np.random.default_rng(5).normal(size=CELLS * EACH))
    )
    found = within_correlation(judged)
    assert found.mean == pytest.approx(correlation, abs=0.06)
    assert found.low < found.mean < found.high
    assert found.high - found.low < 0.2
    left = centred(judged.predicted, judged.cell), centred(judged.actual, judged.cell)
    assert found.mean == pytest.approx(np.corrcoef(*left)[0, 1])


def test_a_table_of_means_correlates_over_all_and_not_within() -> None:
    judged = make_judged(0.6)
    rng = np.random.default_rng(1)
    table = judged._replace(predicted=judged.typical + 1e-6 * rng.normal(size=len(judged.cell)))
    assert np.corrcoef(table.predicted, table.actual)[0, 1] > 0.9
    interval = within_correlation(table)
    assert interval.low < 0.05
    assert interval.high > -0.05


def test_the_interval_is_over_prompts_not_jumps() -> None:
    judged = make_judged(0.6)
    # All jumps of a prompt alike but for their cell: as many jumps, a twentieth of the information.
    signal, noise = np.random.default_rng(0).normal(size=(2, PROMPTS))[:, judged.prompt]
    alike = judged._replace(
        predicted=judged.typical + 0.36 * signal + 0.48 * noise, actual=judged.typical + signal
    )
    narrow, wide = within_correlation(judged), within_correlation(alike)
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)


def test_cells_in_which_nothing_varies_are_refused() -> None:
    judged = make_judged(0.6)
    flat = judged._replace(predicted=judged.typical)
    with pytest.raises(ConfigError, match="800 jumps, none of whose cells has two"):
        within_correlation(flat)


def test_the_gain_over_means_is_the_share_of_error_that_is_gone() -> None:
    judged = make_judged(0.6)
    gain = gain_over_means(judged, judged.typical)
    assert gain.mean == pytest.approx(0.36, abs=0.05)
    assert gain.low > 0.2
    assert gain_over_means(judged._replace(predicted=judged.actual), judged.typical).mean == 1
    itself = gain_over_means(judged._replace(predicted=judged.typical), judged.typical)
    assert itself == (0, 0, 0)
    worse = judged._replace(predicted=judged.typical + 2)
    assert gain_over_means(worse, judged.typical).high < 0


def test_the_table_has_means_of_training_and_elsewhere_the_typical_state() -> None:
    trained = Judged(
        *(np.array([0.0, 0.0, 0.0]) for _ in range(3)), np.array([7, 7, 9]), np.zeros(3, int)
    )
    known = means_of_cells(trained._replace(actual=np.array([1.0, 3.0, 5.0])))
    assert known == {7: 2.0, 9: 5.0}
    asked = trained._replace(typical=np.array([10.0, 11.0, 12.0]), cell=np.array([9, 8, 7]))
    assert table_of_means(asked, known).tolist() == [5.0, 11.0, 2.0]


def test_ranks_order_and_share() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert ranks(values)[np.argsort(values)].tolist() == list(range(50))
    assert ranks(np.array([2.0, 2.0, 2.0])).tolist() == [1.0, 1.0, 1.0]


# --- calibration


def test_residuals_as_they_should_be_are_calibrated() -> None:
    residuals = np.random.default_rng(0).normal(size=20_000) * 3
    transforms = normal_transform(residuals, np.full(len(residuals), 3.0))
    assert expected_calibration_error(transforms) < 0.01


def test_the_calibration_error_of_a_wrong_deviation_is_its_closed_form() -> None:
    from scipy.stats import norm

    residuals = np.random.default_rng(0).normal(size=200_000)
    quantiles = np.arange(1, 10) / 10
    shares = norm.cdf(2 * norm.ppf(quantiles))  # twice too wide
    transforms = normal_transform(residuals, np.full(len(residuals), 2.0))
    expected = np.abs(shares - quantiles).mean()
    assert expected_calibration_error(transforms) == pytest.approx(expected, abs=0.005)
    assert expected_calibration_error(np.zeros(5)) == pytest.approx(0.5)
    assert expected_calibration_error(np.ones(5)) == pytest.approx(0.5)


def test_nothing_is_not_calibrated() -> None:
    with pytest.raises(ConfigError, match="there are no residuals"):
        expected_calibration_error(np.zeros(0))
    with pytest.raises(ConfigError, match="1 jumps to fit deviations on"):
        fit_deviations(np.zeros(1), np.zeros(1))


@pytest.mark.parametrize("siblings", [2, 4, 16])
def test_sample_variances_follow_the_chi_square_law(siblings: int) -> None:
    from scipy.stats import chi2

    values = np.exp(0.5) * np.random.default_rng(0).normal(size=(20_000, siblings))
    variances = values.var(axis=1, ddof=1)
    transforms = chi_square_transform(variances, np.ones(len(values)), siblings)
    expected = chi2.cdf((siblings - 1) * variances / np.e, siblings - 1)
    np.testing.assert_allclose(transforms, expected, atol=1e-9)
    assert expected_calibration_error(transforms) < 0.01
    assert expected_calibration_error(
        chi_square_transform(variances, np.zeros(20_000), siblings)
    ) > (0.05)
    noise, logs = log_variance_noise(siblings), np.log(variances) - 1
    assert noise.mean == pytest.approx(logs.mean(), abs=0.05)
    assert noise.variance == pytest.approx(logs.var(), rel=0.05)


def test_deviations_are_found_by_what_is_predicted_and_without_the_noise_of_measuring() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0, 4, size=100_000)
    residuals = (0.5 + predicted / 4) * rng.normal(size=len(predicted))
    measured = predicted + residuals + rng.normal(size=len(predicted))
    found = fit_deviations(predicted, measured, noise=1.0)
    np.testing.assert_allclose(found(np.array([1.0, 3.0])), [0.75, 1.25], rtol=0.05)
    # Nothing but noise: no deviation is left.
    exact = fit_deviations(predicted, predicted + 0.5 * rng.normal(size=len(predicted)), noise=1.0)
    assert exact(np.array([2.0])).tolist() == [0.0]


def variances(siblings: int, doubt: float, count: int, seed: int) -> Judged:
    """Log variances of siblings whose true log variance is missed by ``doubt``."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=count)
    values = np.exp(truth / 2)[:, None] * rng.normal(size=(count, siblings))
    predicted = truth + doubt * rng.normal(size=count)
    cell, prompt = np.arange(count) % 10, np.arange(count) % 50
    return Judged(predicted, 0 * truth, np.log(values.var(axis=1, ddof=1)), cell, prompt)


def test_a_doubt_learned_from_few_siblings_holds_for_many() -> None:
    fitted = fit_error_model({"resolved_variance": variances(4, 0.7, 40_000, 0)}, 4)
    held_out = variances(16, 0.7, 20_000, 1)
    transforms = fitted.transforms("resolved_variance", held_out, 16)
    assert expected_calibration_error(transforms) < 0.02
    exact = chi_square_transform(np.exp(held_out.actual), held_out.predicted, 16)
    assert expected_calibration_error(exact) > 0.07


# --- in words and pictures


def test_the_report_says_what_was_measured(tmp_path: Path) -> None:
    judged = {"truncation_error": make_judged(0.8), "resolved_variance": make_judged(0.5, seed=1)}
    nothing = Judged(*(np.zeros(0),) * 3, np.zeros(0, int), np.zeros(0, int))
    errors = fit_error_model(judged, 8)
    report = make_report(
        {"held_out": judged | {"mean_gain": nothing}, "other_grid": judged},
        {"held_out": 8, "other_grid": 8},
        known={target: {} for target in judged},
        errors=errors,
    )
    assert set(report.figures["held_out"]) == {"truncation_error", "resolved_variance"}
    found = report.figures["held_out"]["truncation_error"]
    assert found.within.mean == pytest.approx(0.8, abs=0.05)
    assert found.ranks_within == pytest.approx(0.79, abs=0.06)
    assert found.gain.low > 0.4
    assert found.overall is not None
    assert found.overall > 0.9
    assert found.calibration_error < 0.05
    assert set(report.chi_square_errors) == {"held_out", "other_grid"}
    table = figures_table(report.figures)
    assert len(table) == 2 + 4
    assert f"| {found.count} | {found.overall:.3f} |" in table[2]
    assert len(reliability_table(report.transforms)) == 2 + 2
    text = card_sections(report)
    assert "## Reliability on held_out" in text
    assert all(line in text for line in table)
    path = tmp_path / "calibration.png"
    calibration_figure(report.judged, report.transforms).savefig(path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert report.to_dict()["figures"]["other_grid"]["resolved_variance"]["count"] == CELLS * EACH

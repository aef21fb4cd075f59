"""What an information gain evaluator learns by, against hand-worked values."""

from __future__ import annotations

import math

import pytest
import torch

from mctd_diffusers.models.losses import (
    JumpTargets,
    JumpWeights,
    jump_loss,
    pair_ranking_loss,
    variance_nll,
)

NAN = torch.nan


@pytest.mark.parametrize("log_variance", [-3.0, 0.0, 2.0])
def test_the_likelihood_of_sample_variances_is_least_at_the_variance(log_variance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    siblings = math.exp(log_variance / 2) * torch.randn(20_000, 4, generator=generator)
    samples = siblings.double().var(dim=1)
    best = samples.mean().log()
    assert best.item() == pytest.approx(log_variance, abs=0.05)
    losses = [
        variance_nll((best + off).expand_as(samples), samples).mean() for off in (-0.1, 0.0, 0.1)
    ]
    assert min(losses) == losses[1]


def test_the_likelihood_is_the_chi_square_law_of_the_sample_variance() -> None:
    # -log density of s^2 where (M - 1) s^2 / v is chi-square, as a difference between two v.
    siblings, sample = 5, torch.tensor([0.7])
    law = torch.distributions.Chi2(torch.tensor(float(siblings - 1)))

    def nll(variance: float) -> torch.Tensor:
        ratio = (siblings - 1) / variance
        return -(law.log_prob(ratio * sample) + math.log(ratio))

    ours = variance_nll(torch.tensor([math.log(2.0)]), sample) - variance_nll(
        torch.tensor([math.log(0.3)]), sample
    )
    torch.testing.assert_close((siblings - 1) / 2 * ours, nll(2.0) - nll(0.3))


def test_ranking_counts_ordered_pairs_of_a_group_by_their_gap() -> None:
    predictions = torch.tensor([0.0, 1.0, 5.0])
    targets, groups = torch.tensor([2.0, 1.0, 9.0]), torch.tensor([0, 0, 1])
    # One pair: the first is larger by one and is predicted smaller by one.
    expected = math.log1p(math.exp(1.0))
    assert pair_ranking_loss(predictions, targets, groups).item() == pytest.approx(expected)
    together = pair_ranking_loss(predictions, targets, torch.zeros(3, dtype=torch.long))
    pairs = {(1.0, 1.0), (7.0, -5.0), (8.0, -4.0)}  # gap, and how much smaller it is predicted
    weighted = sum(gap * math.log1p(math.exp(wrong)) for gap, wrong in pairs) / 16
    assert together.item() == pytest.approx(weighted)


def test_ranking_without_a_pair_is_zero_and_can_be_learned_from() -> None:
    predictions = torch.zeros(2, requires_grad=True)
    loss = pair_ranking_loss(predictions, torch.zeros(2), torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0
    assert predictions.grad is not None
    assert predictions.grad.tolist() == [0, 0]


def case() -> tuple[dict[str, torch.Tensor], JumpTargets, torch.Tensor, torch.Tensor]:
    predicted = {
        "mean_gain": torch.tensor([[1.0, 0.0]]),
        "log_variance": torch.tensor([[0.0, 0.5]]),
        "final_similarity": torch.tensor([[0.5, 0.9]]),
        "log_truncation_error": torch.tensor([[-2.0, -1.0]]),
    }
    targets = JumpTargets(
        mean_gain=torch.tensor([[3.0, NAN]]),
        sibling_variance=torch.tensor([[2.0, NAN]]),
        final_similarity=torch.tensor([[0.52, NAN]]),
        log_truncation_error=torch.tensor([[-2.0, -1.2]]),
    )
    return predicted, targets, torch.tensor([[0, 0]]), torch.tensor([[0, 1]])


def test_the_terms_are_those_of_what_is_known() -> None:
    loss, terms = jump_loss(*case(), reward_scale=4.0)
    expected = {
        "error": (0 + 0.2**2) / 2,  # quadratic below 0.5
        "variance": 0.0 + 2.0,
        "gain": (2 / 4) ** 2 / 2,
        "similarity": 0.02**2 / 0.1,
        "ranking": math.log1p(math.exp(-1.0)) / 4,  # one of four rankings has a pair
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)
    weights = JumpWeights()
    total = expected["error"] + sum(
        getattr(weights, name) * term for name, term in expected.items() if name != "error"
    )
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_what_is_not_known_leaves_gradients_alone() -> None:
    predicted, targets, states, cells = case()
    for rows in predicted.values():
        rows.requires_grad_()
    loss, _ = jump_loss(predicted, targets, states, cells, reward_scale=4.0)
    loss.backward()
    for name, rows in predicted.items():
        assert rows.grad is not None
        assert rows.grad.isfinite().all()
        assert (rows.grad[0, 1] == 0) == (name != "log_truncation_error")


def test_knowing_nothing_costs_nothing() -> None:
    predicted, targets, states, cells = case()
    nothing = JumpTargets(*(torch.full_like(rows, NAN) for rows in targets))
    loss, terms = jump_loss(predicted, nothing, states, cells, reward_scale=1.0)
    assert loss.item() == 0
    assert {term.item() for term in terms.values()} == {0.0}


def test_siblings_that_are_all_alike_are_learned_from_and_not_ranked() -> None:
    predicted, targets, states, cells = case()
    alike = targets._replace(sibling_variance=torch.tensor([[0.0, 2.0]]))
    loss, terms = jump_loss(predicted, alike, states, cells, reward_scale=4.0)
    assert loss.isfinite()
    assert terms["variance"].item() == pytest.approx((0.0 + 0.5 + 2 * math.exp(-0.5)) / 2)

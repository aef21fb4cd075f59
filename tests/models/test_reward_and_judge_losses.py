"""The contrastive, the patch and the detector loss against what they must be by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.models.losses import SceneTargets, contrastive_loss, patch_loss, scene_loss

AXES = torch.eye(4)


def test_orthogonal_pairs_cost_what_the_scale_leaves() -> None:
    loss = contrastive_loss(AXES, AXES, torch.arange(4), torch.tensor(2.0))
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-2.0)))


def test_a_false_caption_competes_with_the_picture_only() -> None:
    texts = torch.cat([AXES[:2], AXES[:1]])  # the third is false, and looks like the first
    loss = contrastive_loss(AXES[:2], texts, torch.arange(3), torch.tensor(2.0))
    e = math.exp(-2.0)
    by_image = (math.log(2 + e) + math.log(1 + 2 * e)) / 2
    assert loss.item() == pytest.approx((by_image + math.log(1 + e)) / 2)


def test_equal_captions_do_not_compete() -> None:
    texts = torch.cat([AXES[:1], AXES[:1], AXES[1:2]])
    images = torch.cat([AXES[:1], AXES[:1], AXES[1:2]])
    twins = contrastive_loss(images, texts, torch.tensor([0, 0, 1]), torch.tensor(2.0))
    assert twins.item() == pytest.approx(
        (2 * math.log(1 + math.exp(-2.0)) + math.log(1 + 2 * math.exp(-2.0))) / 3
    )


@given(st.permutations(range(4)))
def test_the_contrast_does_not_depend_on_the_order_of_the_batch(order: list[int]) -> None:
    draws = torch.Generator().manual_seed(0)
    images, texts = torch.nn.functional.normalize(
        torch.randn(2, 4, 8, generator=draws), dim=-1
    ).unbind()
    plain = contrastive_loss(images, texts, torch.arange(4), torch.tensor(5.0))
    mixed = contrastive_loss(images[order], texts[order], torch.arange(4), torch.tensor(5.0))
    torch.testing.assert_close(plain, mixed)


def test_patches_of_nothing_ask_for_no_colour() -> None:
    nouns, colours = torch.tensor([[0, 2]]), torch.tensor([[-1, 1]])
    even = patch_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2), nouns, colours)
    assert even.item() == pytest.approx(math.log(3) + math.log(2))
    background, unasked = torch.zeros(1, 2).long(), -torch.ones(1, 2).long()
    nothing = patch_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2), background, unasked)
    assert nothing.item() == pytest.approx(math.log(3))


def test_a_detector_is_scored_where_the_objects_are() -> None:
    heat = torch.zeros(1, 2, 2)
    heat[0, 0, 0], heat[0, 0, 1] = 1.0, 0.5
    classes = torch.tensor([[[1, -1], [-1, -1]]])
    targets = SceneTargets(heat, classes, classes, torch.zeros(1, 2, 2, 2))
    parts = scene_loss(
        torch.zeros(1, 2, 2),
        torch.zeros(1, 3, 2, 2),
        torch.zeros(1, 2, 2, 2),
        torch.full((1, 2, 2, 2), 0.25),
        targets,
    )
    # Each cell is even: log 2, at the centre in full, beside it by (1 - 0.5)^4, elsewhere in full.
    assert parts["centre"].item() == pytest.approx(math.log(2) * (1 + 0.5**4 + 2))
    assert parts["noun"].item() == pytest.approx(math.log(3))
    assert parts["colour"].item() == pytest.approx(math.log(2))
    assert parts["offset"].item() == pytest.approx(0.5)


def test_a_picture_of_nothing_has_only_inventions_to_lose_by() -> None:
    none = -torch.ones(1, 2, 2).long()
    targets = SceneTargets(torch.zeros(1, 2, 2), none, none, torch.zeros(1, 2, 2, 2))
    flat = torch.zeros(1, 2, 2, 2)
    parts = scene_loss(torch.zeros(1, 2, 2), torch.zeros(1, 3, 2, 2), flat, flat, targets)
    assert parts["centre"].item() == pytest.approx(4 * math.log(2))
    assert parts["noun"] == parts["colour"] == parts["offset"] == 0

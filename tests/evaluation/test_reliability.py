"""Calibration error and reliability bins."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_transmiter.evaluation.reliability import expected_calibration_error, reliability_bins


def sample(seed: int, images: int = 60, classes: int = 4, spread: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(images, classes, generator=generator)
    return logits, torch.randint(classes, (images,), generator=generator), generator


def by_loop(logits, labels, bins):
    """The definition, image by image, in plain Python."""
    found = [[] for _ in range(bins)]
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        total = sum(math.exp(z - max(row)) for z in row)
        confidence = 1 / total
        inside = next(m for m in range(bins) if m / bins < confidence <= (m + 1) / bins or m == bins - 1)
        found[inside].append((confidence, row.index(max(row)) == label))
    gaps = (abs(sum(c for c, _ in inside) - sum(hit for _, hit in inside)) for inside in found)
    return 100 * sum(gaps) / len(labels)


@given(seed=st.integers(0, 10**6), bins=st.integers(1, 20), classes=st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_calibration_error_is_its_definition(seed, bins, classes):
    logits, labels, _ = sample(seed, classes=classes)
    assert expected_calibration_error(logits, labels, bins) == pytest.approx(by_loop(logits, labels, bins), abs=1e-9)


@given(right=st.integers(2, 19), bins=st.integers(1, 30))
def test_a_constant_predictor_that_is_as_right_as_it_is_sure(right, bins):
    """Sure to p, right in p of the images: 0. Right in none: p."""
    p = right / 20
    logits = torch.tensor([p, (1 - p) / 2, (1 - p) / 2]).log().repeat(20, 1)
    best = int(logits[0].argmax())
    sure = float(logits[0].softmax(0).max())
    hits = round(20 * sure) if abs(20 * sure - round(20 * sure)) < 1e-5 else None
    if hits is not None:
        labels = torch.full((20,), (best + 1) % 3)
        labels[:hits] = best
        assert expected_calibration_error(logits, labels, bins) == pytest.approx(0, abs=1e-4)
    assert expected_calibration_error(logits, torch.full((20,), (best + 1) % 3), bins) == pytest.approx(100 * sure)


def test_bins():
    """Edges belong to the bin below; empty bins are NaN and count for nothing."""
    logits = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.9, 0.1], [1.0, 0.0]], dtype=torch.float64).clamp_min(1e-300)
    found = reliability_bins(logits.log(), torch.tensor([1, 0, 1, 0]), bins=2)
    assert found.count.tolist() == [1, 3]
    assert found.confidence.tolist() == pytest.approx([0.5, 2.8 / 3])
    assert found.accuracy.tolist() == pytest.approx([0, 2 / 3])
    assert found.error == pytest.approx(100 * (0.5 + 0.8) / 4)
    ten = reliability_bins(logits.log(), torch.tensor([1, 0, 1, 0]), bins=10)
    assert ten.count.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 2, 1]
    assert ten.accuracy[0].isnan() and ten.confidence[0].isnan()


@pytest.mark.parametrize(
    ("logits", "labels", "bins", "match"),
    [
        (torch.zeros(0, 3), torch.zeros(0), 15, "no image to score"),
        (torch.zeros(2, 1), torch.zeros(2), 15, "two classes"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), 15, r"\[0, 3\), found 0..3"),
        (torch.zeros(2, 3), torch.tensor([-1, 2]), 15, r"\[0, 3\), found -1..2"),
        (torch.zeros(2, 3), torch.zeros(3), 15, r"on the same images, got \(2, 3\) and \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 15, r"labels \(N,\) .* and \(2, 3\)"),
        (torch.full((2, 3), torch.nan), torch.zeros(2), 15, "finite"),
        (torch.zeros(2, 3), torch.zeros(2), 0, "at least one bin"),
    ],
)
def test_what_has_no_calibration_error(logits, labels, bins, match):
    with pytest.raises(ValueError, match=match):
        expected_calibration_error(logits, labels, bins)

"""Calibration error, reliability bins and the temperature."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_transmiter.evaluation.reliability import expected_calibration_error, fit_temperature, reliability_bins


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


@given(
    seed=st.integers(0, 10**6), temperature=st.floats(0.02, 50), classes=st.integers(2, 30), spread=st.floats(0.3, 3)
)
@settings(max_examples=60, deadline=None)
def test_a_planted_temperature_is_found(seed, temperature, classes, spread):
    """The target is the logits' own softmax at T: KL is 0 there and nowhere else."""
    logits, _, _ = sample(seed, classes=classes, spread=spread)
    logits = logits.double()
    assert fit_temperature(logits * temperature, logits.softmax(1)) == pytest.approx(temperature, rel=1e-6)


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
@settings(max_examples=40, deadline=None)
def test_temperature_goes_with_the_unit_of_the_logits(seed, scale, shift):
    logits, _, generator = sample(seed)
    target = (logits + torch.randn(logits.shape, generator=generator)).softmax(1)
    expected = fit_temperature(logits, target)
    assert fit_temperature(scale * (logits.double() + shift), target) == pytest.approx(scale * expected, rel=1e-5)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_no_other_temperature_is_better(seed):
    """Against the divergence itself, for targets that no temperature reproduces, soft ones and labels."""
    logits, labels, generator = sample(seed)
    labels = torch.where(torch.rand(len(labels), generator=generator) < 0.7, logits.argmax(1), labels)
    soft = (0.5 * logits + torch.randn(logits.shape, generator=generator)).softmax(1)
    for target in (soft, torch.nn.functional.one_hot(labels, 4).float()):
        best = fit_temperature(logits, target)

        def loss(temperature, target=target):
            return float(-(target.double() * (logits.double() / temperature).log_softmax(1)).sum(1).mean())

        for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
            assert loss(best) < loss(best * factor)


def test_scaling_by_the_temperature_mends_overconfidence():
    """Labels drawn from softmax(z), logits stated three times too large."""
    logits, _, generator = sample(0, images=4000)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    temperature = fit_temperature(3 * logits, torch.nn.functional.one_hot(labels, 4))
    assert temperature == pytest.approx(3, rel=0.1)
    before, after = (expected_calibration_error(z, labels) for z in (3 * logits, 3 * logits / temperature))
    assert after < 3 < before


@pytest.mark.parametrize(
    ("logits", "labels", "bins", "match"),
    [
        (torch.zeros(0, 3), torch.zeros(0), 15, "an image and two classes"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), 15, r"\[0, 3\), found 0..3"),
        (torch.zeros(2, 3), torch.tensor([-1, 2]), 15, r"\[0, 3\), found -1..2"),
        (torch.zeros(2, 3), torch.zeros(3), 15, "on 3 images"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 15, "one whole number per image"),
        (torch.full((2, 3), torch.nan), torch.zeros(2), 15, "finite"),
        (torch.zeros(2, 3), torch.zeros(2), 0, "at least one bin"),
    ],
)
def test_what_has_no_calibration_error(logits, labels, bins, match):
    with pytest.raises(ValueError, match=match):
        expected_calibration_error(logits, labels, bins)


@pytest.mark.parametrize(
    ("logits", "target", "match"),
    [
        (torch.eye(3), torch.eye(3)[:, :2], "must both be"),
        (torch.eye(3), torch.arange(3), "must both be"),
        (torch.eye(3), 2 * torch.eye(3), "sum 1"),
        (torch.eye(3), torch.full((3, 3), torch.nan), "sum 1"),
        (torch.ones(3, 3), torch.eye(3), "equal for all classes"),
        (torch.eye(3), torch.eye(3).roll(1, 0), "no more than the others"),
        (torch.eye(3), torch.eye(3), "certain of the highest"),
        (torch.eye(3)[:, :1], torch.ones(3, 1), "two classes"),
    ],
)
def test_what_has_no_temperature(logits, target, match):
    with pytest.raises(ValueError, match=match):
        fit_temperature(logits, target)

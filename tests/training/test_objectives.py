"""Losses of prompt learning, against numbers worked out by hand."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from hf_transmiter.training.objectives import PULLS, Answers, cosine, kl, l1, l2, losses, promptsrc


TUNED = Answers(
    torch.tensor([[math.log(3.0), 0.0], [1.0, 3.0]]),
    torch.tensor([[1.0, 0.0], [0.6, 0.8]]),
    torch.tensor([[0.0, 1.0], [0.6, 0.8]]),
)
FROZEN = Answers(
    torch.tensor([[0.0, 0.0], [1.0, 3.0]]),
    torch.tensor([[0.0, 1.0], [0.6, 0.8]]),
    torch.tensor([[0.6, 0.8], [0.6, 0.8]]),
)
KL = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2


@pytest.mark.parametrize(
    ("pull", "expected"),
    [
        (kl, KL),
        (cosine, (1 + 0) / 2),
        (l2, (2 + 0) / 2),
        (l1, (1 + 1 + 0 + 0) / 4),
        (promptsrc, 25 * 0.5 + 10 * (0.6 + 0.2) / 4 + KL / 2),
    ],
)
def test_pulls(pull, expected):
    assert pull(TUNED, FROZEN).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pull", PULLS.values())
def test_nothing_pulls_where_nothing_moved(pull):
    logits, rows, images = torch.randn(5, 3), normalize(torch.randn(3, 4), dim=1), normalize(torch.randn(5, 4), dim=1)
    still = Answers(logits, rows, images)
    shifted = Answers(logits + 7, rows, images)  # the same posterior
    assert abs(pull(shifted, still).item()) < 1e-5


def test_squared_distance_is_twice_the_cosine():
    rows = [normalize(torch.randn(6, 8), dim=1) for _ in range(2)]
    tuned, frozen = (Answers(torch.zeros(1, 6), row, torch.zeros(1, 8)) for row in rows)
    assert l2(tuned, frozen).item() == pytest.approx(2 * cosine(tuned, frozen).item(), rel=1e-5)


def test_losses():
    wrong = (-math.log(0.75) + math.log1p(math.exp(-2.0))) / 2
    fit, pull = losses(TUNED, FROZEN, torch.tensor([0, 1]), "kl")
    assert fit.item() == pytest.approx(wrong, rel=1e-5) and pull.item() == pytest.approx(KL, rel=1e-5)
    # Probabilities that are certain are labels.
    certain = torch.nn.functional.one_hot(torch.tensor([0, 1]), TUNED.logits.shape[1]).float()
    assert torch.allclose(losses(TUNED, FROZEN, certain, "kl")[0], fit)


def test_pulls_between_class_vectors_that_are_not_there():
    tuned = TUNED._replace(class_vectors=None)
    assert losses(tuned, FROZEN, torch.tensor([0, 1]), "kl")[1] > 0
    for pull in set(PULLS) - {"kl"}:
        with pytest.raises(ValueError, match="here every image has its own: use pull='kl'"):
            losses(tuned, FROZEN, torch.tensor([0, 1]), pull)

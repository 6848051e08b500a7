import pytest
import torch
from torch.nn.functional import normalize

from hf_transmiter.baselines import emulated_fine_tuning, linear_head, logit_ensemble
from hf_transmiter.settings import FitConfig


def test_emulated_fine_tuning_adds_the_change_of_the_weak_model():
    strong, tuned, weak = (torch.randn(5, 3) for _ in range(3))
    assert torch.allclose(emulated_fine_tuning(strong, tuned, weak), strong + tuned - weak, atol=1e-6)
    assert torch.equal(emulated_fine_tuning(strong, tuned, weak, alpha=0.0), strong)
    assert torch.allclose(emulated_fine_tuning(strong, tuned, tuned, alpha=3.0), strong)


def test_logit_ensemble_is_a_product_of_probabilities():
    strong, tuned = torch.randn(5, 3), torch.randn(5, 3)
    product = strong.softmax(1) * tuned.softmax(1)
    assert torch.allclose(logit_ensemble(strong, tuned).softmax(1), product / product.sum(1, keepdim=True), atol=1e-6)
    shifted = strong + torch.randn(5, 1)
    assert torch.allclose(logit_ensemble(shifted, tuned), logit_ensemble(strong, tuned), atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_linear_head_learns_labels_and_soft_labels(soft):
    torch.manual_seed(0)
    true = normalize(torch.randn(4, 8), dim=-1)
    labels = torch.arange(4).repeat(30)
    x = normalize(true[labels] + 0.2 * torch.randn(120, 8), dim=-1)
    start = normalize(torch.randn(4, 8), dim=-1)
    target = torch.nn.functional.one_hot(labels).float() if soft else labels
    config = FitConfig(epochs=150, lr=3e-2, weight_decay=0.0)
    vectors = linear_head(x, target, start, 20.0, config, progress=False)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
    assert ((x @ start.T).argmax(1) == labels).float().mean() < 0.7
    assert ((x @ vectors.T).argmax(1) == labels).float().mean() > 0.95
    assert torch.equal(vectors, linear_head(x, target, start, 20.0, config, progress=False))

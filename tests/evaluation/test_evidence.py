"""What is known without labels, and how sure a gain with labels is."""

import pytest
import torch
from torch.nn.functional import one_hot

from hf_transmiter.evaluation.evidence import Evidence, kappa, paired_gain, recommend


def says(*predictions: int, classes: int = 4) -> torch.Tensor:
    return one_hot(torch.tensor(predictions), classes).float()


def drawn(seed: int, count: int = 400) -> torch.Tensor:
    return torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))


def some(of: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """Logits of `other` on the first share of the images, of `of` on the rest."""
    first = torch.arange(len(of)) < share * len(of)
    return one_hot(torch.where(first, other, of), 4).float()


def test_kappa():
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert kappa(a, b, 2) == pytest.approx((0.75 - 0.5) / (1 - 0.5)) and kappa(a, a, 2) == 1
    assert kappa(a, 1 - a, 2) == -1 and kappa(torch.zeros(3).long(), torch.zeros(3).long(), 2) == 1
    assert abs(kappa(drawn(0), drawn(1), 4)) < 0.1


def test_the_facts():
    found = Evidence(says(0, 1, 2, 3), says(0, 1, 2, 2), says(0, 1, 1, 3))
    facts, of = found.facts, found.of(says(0, 1, 1, 1))
    assert facts["changed"] == 25 and facts["kappa_weak"] == pytest.approx((3 / 4 - 1 / 4) / (1 - 1 / 4))
    assert set(facts) == {"changed", "kappa_weak", "kappa_strong"}
    assert of == {"agreement": 50, "changes": 25}


def test_what_there_is_to_carry_over():
    weak, strong, right = drawn(0), drawn(1), drawn(2)
    z = some(strong, right, 0.5)
    ways = {"own_class_vectors": True, "unlabelled": 100, "general": False}
    learnt = Evidence(some(weak, right, 0.8), some(weak, right, 0.1), z)
    assert learnt.doubt is None and recommend(learnt, **ways)[0] == "refit"
    nothing = Evidence(some(weak, right, 0.11), some(weak, right, 0.1), z)
    assert recommend(nothing, **ways) == ("zero-shot strong", nothing.doubt)
    assert (
        f"the tuning changed {nothing.facts['changed']:.1f} % of the weak model's predictions, so there is nothing"
        in nothing.doubt
    )
    # Shuffled labels: it still knows the model that it was tuned from, and nothing of the strong one.
    chance = Evidence(some(drawn(3), weak, 0.3), some(weak, right, 0.1), z)
    assert chance.facts["kappa_weak"] > 0.2 and "may know nothing of these pictures" in chance.doubt
    assert recommend(chance, **ways)[0] == "zero-shot strong"
    assert recommend(None, **ways)[0] == "refit"  # labels will tell
    way, why = recommend(None, **{**ways, "unlabelled": 99})
    assert way == "bridge from task images" and "99 task images are too few for a refit, which takes 100" in why
    assert recommend(None, **ways, fewest=101)[0] == "bridge from task images"


def test_a_doubted_bridge_from_text_is_not_recommended_without_labels():
    weak, strong, right = drawn(0), drawn(1), drawn(2)
    learnt = Evidence(some(weak, right, 0.8), some(weak, right, 0.1), some(strong, right, 0.5))
    ways = {"own_class_vectors": True, "unlabelled": 0, "general": False}
    assert recommend(learnt, **ways)[0] == "bridge from text"
    assert recommend(learnt, **ways, doubt="few names.") == ("zero-shot strong", "few names.")
    assert recommend(learnt, **{**ways, "general": True}, doubt="few.")[0] == "bridge from general images"


def test_a_gain_and_its_standard_error():
    labels = torch.arange(400) % 4
    better, worse = some(labels, (labels + 1) % 4, 0.3), some(labels, (labels + 1) % 4, 0.4)
    gain, error = paired_gain(better, worse, labels)
    assert gain == pytest.approx(10) and error == pytest.approx(100 * ((0.1 - 0.01) / 399) ** 0.5)
    assert paired_gain(worse, better, labels) == pytest.approx((-gain, error))
    one_more = some(labels, (labels + 1) % 4, 0.3975)
    assert paired_gain(one_more, worse, labels) == pytest.approx((0.25, 0.25))  # a single picture is no evidence
    assert paired_gain(better[:1], worse[:1], labels[:1]) == (0, 0)

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_transmiter.data.splits import base_names, few_shot


LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**31)


@settings(deadline=None)
@given(labels=LABELS, shots=st.integers(1, 6), seed=SEEDS)
def test_few_shot_takes_shots_of_each_class(labels, shots, seed):
    sizes = Counter(labels)
    drawn = few_shot(labels, shots, seed, allow_fewer=True)
    assert len(set(drawn)) == len(drawn)
    assert Counter(labels[i] for i in drawn) == {label: min(size, shots) for label, size in sizes.items()}
    assert [labels[i] for i in drawn] == sorted(labels[i] for i in drawn)
    assert drawn == few_shot(torch.tensor(labels), shots, seed, allow_fewer=True)
    if min(sizes.values()) >= shots:
        assert drawn == few_shot(labels, shots, seed)
    else:
        with pytest.raises(ValueError, match=f"{shots} images per class are wanted"):
            few_shot(labels, shots, seed)


@settings(deadline=None)
@given(labels=LABELS, shots=st.integers(1, 6), seed=SEEDS)
def test_few_shots_begin_more_shots_and_classes_do_not_disturb_each_other(labels, shots, seed):
    drawn = few_shot(labels, shots, seed, allow_fewer=True)
    assert set(drawn) <= set(few_shot(labels, shots + 1, seed, allow_fewer=True))
    without_zero = [i for i in drawn if labels[i] != 0]
    kept = [i for i, label in enumerate(labels) if label != 0]
    if kept:
        alone = few_shot([labels[i] for i in kept], shots, seed, allow_fewer=True)
        assert [kept[i] for i in alone] == without_zero


def test_few_shot_is_uniform():
    counts = Counter(i for seed in range(3000) for i in few_shot([0] * 6, 2, seed))
    # Each of 6 images is expected 1000 times with a standard deviation of 26.
    assert set(counts) == set(range(6)) and all(abs(count - 1000) < 130 for count in counts.values())


def test_few_shot_order_within_a_class_is_random_too():
    firsts = {few_shot([0] * 5, 5, seed)[0] for seed in range(60)}
    assert firsts == set(range(5))


def test_few_shot_draw_is_pinned():
    # The same seed must give the same images in every version, or published numbers cannot be repeated.
    assert few_shot([0, 1] * 10, 3, seed=1) == [16, 10, 18, 11, 1, 5]


def test_few_shot_errors():
    with pytest.raises(ValueError, match="3 images .* class 1 has 1, class 2 has 0; use fewer shots or allow_fewer"):
        few_shot([0, 0, 0, 1], 3, 0, num_classes=3)
    assert sorted(few_shot([0, 0, 0, 1], 3, 0, num_classes=3, allow_fewer=True)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="class 7 has 1 and 12 more;"):
        few_shot(range(20), 2, 0)
    with pytest.raises(ValueError, match=r"below num_classes=2, got \[2, 5\]"):
        few_shot([0, 1, 2, 5], 1, 0, num_classes=2)
    with pytest.raises(ValueError, match=r"0 or more, got \[-1\]"):
        few_shot([-1, 0], 1, 0)
    with pytest.raises(ValueError, match="shots must be at least 1"):
        few_shot([0], 0, 0)
    with pytest.raises(ValueError, match="no labels"):
        few_shot([], 1, 0)


@settings(deadline=None)
@given(st.integers(2, 400))
def test_base_novel_halves(num_classes):
    names = [f"class {i}" for i in range(num_classes)]
    base = base_names(names)
    assert base == tuple(names[: len(base)])
    assert 2 * len(base) - num_classes == num_classes % 2


@pytest.mark.parametrize(("classes", "halves"), [(37, (19, 18)), (397, (199, 198)), (47, (24, 23)), (10, (5, 5))])
def test_base_novel_sizes_of_the_published_protocol(classes, halves):
    base = len(base_names(["x"] * classes))
    assert (base, classes - base) == halves


def test_base_novel_needs_two_classes():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        base_names(["cat"])

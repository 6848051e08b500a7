import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_transmiter.bench.protocols import PROTOCOLS, draw, only_base, parts, summarise
from hf_transmiter.data.catalogue import DatasetSpec
from hf_transmiter.evaluation.evaluate import harmonic_mean


FULL = DatasetSpec("full", "Full", "some/full", train="train", test="test")
TEST_ONLY = DatasetSpec("shifted", "Shifted", "some/shifted", test="test")
NAMES = ("cat", "dog", "car", "tree", "ship")
SCORES = st.floats(1, 100)


def roles(found) -> list[tuple]:
    return [(p.spec.name, p.role, p.base_only) for p in (found.train, found.unlabelled, found.test)]


@pytest.mark.parametrize("protocol", ("base-to-base", "few-shot"))
def test_all_classes(protocol):
    found = parts(protocol, FULL)
    assert roles(found) == [("full", "train", False), ("full", "unlabelled", False), ("full", "test", False)]
    assert not found.elsewhere


def test_base_to_novel_tunes_and_looks_at_base_classes_only():
    found = parts("base-to-novel", FULL)
    assert roles(found) == [("full", "train", True), ("full", "unlabelled", True), ("full", "test", False)]


def test_cross_dataset_looks_at_unlabelled_images_of_the_target():
    other = DatasetSpec("other", "Other", "some/other", train="train", test="test")
    found = parts("cross-dataset", other, FULL)
    assert roles(found) == [("full", "train", False), ("other", "unlabelled", False), ("other", "test", False)]
    assert found.elsewhere


def test_domain_generalisation_has_the_images_of_what_was_tuned_on():
    for protocol in ("domain-generalisation", "few-shot"):  # a target without training images
        found = parts(protocol, TEST_ONLY, FULL)
        assert roles(found) == [("full", "train", False), ("full", "unlabelled", False), ("shifted", "test", False)]


@pytest.mark.parametrize(
    ("protocol", "target", "source", "message"),
    [
        ("few", FULL, None, "protocol must be one of base-to-base"),
        (
            "cross-dataset",
            FULL,
            None,
            "cross-dataset tunes on another dataset: name it with train_on",
        ),
        ("base-to-base", TEST_ONLY, None, "'shifted' has no train split: name a dataset that has one with train_on"),
        ("cross-dataset", FULL, TEST_ONLY, "'shifted' has no train split"),
        ("base-to-novel", TEST_ONLY, FULL, "'shifted' has no train split, so that its base classes cannot be tuned"),
        ("few-shot", DatasetSpec("x", "X", "some/x", train="train"), None, "'x' has no test split"),
    ],
)
def test_what_is_no_plan(protocol, target, source, message):
    with pytest.raises(ValueError, match=message):
        parts(protocol, target, source)


def test_every_protocol_has_parts():
    for protocol in PROTOCOLS:
        assert parts(protocol, FULL, FULL).test.spec is FULL


def test_base_is_the_first_half_in_the_order_of_the_names(make_dataset):
    images = make_dataset(20, NAMES)
    base = only_base(images)
    assert base.features["label"].names == ["cat", "dog", "car"]
    assert base["label"][:] == [label for label in images["label"] if label < 3]
    with pytest.raises(ValueError, match="at least 2 classes"):
        only_base(make_dataset(2, ["cat"]))
    with pytest.raises(ValueError, match="no image of a base class"):
        only_base(images.select([3, 4]))
    with pytest.raises(ValueError, match="without labels"):
        only_base(images.remove_columns("label"))


def test_draws_among_base_classes_are_those_among_all(make_dataset):
    images = make_dataset(40, NAMES)
    everything, base = draw(images, 3, seed=2), draw(only_base(images), 3, seed=2)
    assert everything["label"][:] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    pixels = [image.tobytes() for image in everything["image"][:9]]
    assert [image.tobytes() for image in base["image"]] == pixels


def test_fewer_images_than_shots(make_dataset):
    images = make_dataset(9, NAMES)
    with pytest.raises(ValueError, match="class 4 has 1; use fewer shots or allow_fewer"):
        draw(images, 2, seed=0)
    assert len(draw(images, 2, seed=0, allow_fewer=True)) == 9


def test_averages_by_hand():
    measured = {
        "a": {1: {"base": 80.0, "novel": 40.0, "hm": 1.0}, 2: {"base": 90.0, "novel": 60.0, "hm": 1.0}},
        "b": {1: {"base": 70.0, "novel": 70.0, "hm": 1.0}, 2: {"base": 70.0, "novel": 90.0, "hm": 1.0}},
    }
    found = summarise(measured)
    assert found["base"].value == 77.5 and found["novel"].value == 65.0
    assert found["base"].by_seed == {1: 75.0, 2: 80.0}
    assert found["base"].std == pytest.approx(statistics.stdev([75.0, 80.0]))
    # Of the averages: the mean of the four harmonic means would be 71.1.
    assert found["hm"].value == pytest.approx(2 * 77.5 * 65 / 142.5)
    assert found["hm"].by_seed == pytest.approx({1: harmonic_mean(75, 55), 2: harmonic_mean(80, 75)})


def test_datasets_count_alike_however_many_seeds_they_have():
    measured = {"a": {1: {"accuracy": 10.0}, 2: {"accuracy": 20.0}}, "b": {1: {"accuracy": 45.0}}}
    found = summarise(measured)["accuracy"]
    assert found.value == 30.0 and found.by_seed == {1: 27.5} and found.std == 0


def test_what_a_dataset_lacks_is_not_averaged():
    measured = {"a": {1: {"accuracy": 10.0, "joint": 9.0}}, "b": {1: {"accuracy": 45.0}}}
    assert list(summarise(measured)) == ["accuracy"]
    assert summarise({}) == summarise({"a": {}}) == {}


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=6))
def test_harmonic_means_of_models_and_of_classes(pairs):
    old, upgraded = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    measured = {
        str(i): {1: {"old": a, "upgraded": b, "h": 0.0, "old base": a, "old novel": b, "old hm": 0.0}}
        for i, (a, b) in enumerate(pairs)
    }
    found = summarise(measured)
    assert found["h"].value == pytest.approx(2 * old * upgraded / (old + upgraded))
    assert found["old hm"].value == pytest.approx(found["h"].value)
    assert min(old, upgraded) - 1e-9 <= found["h"].value <= max(old, upgraded) + 1e-9

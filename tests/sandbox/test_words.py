"""Names, tasks and the vocabulary."""

import pytest

from hf_transmiter.sandbox import words


def test_720_distinct_class_names():
    names = [words.class_name(*c) for c in words.CLASSES]
    assert len(set(names)) == 720
    assert words.class_name(1, 0, 6) == "striped red heart"


def test_vocabulary_holds_singles_pairs_and_triples_in_a_fixed_order():
    vocabulary = words.vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) == 28 + 252 + 720
    assert vocabulary == words.vocabulary()
    assert {"heart", "red thing", "striped thing"} <= set(vocabulary[:28])
    assert "red heart" in vocabulary[28:280] and "striped red thing" in vocabulary[28:280]
    assert vocabulary[280:] == [words.class_name(*c) for c in words.CLASSES]


@pytest.mark.parametrize("name", ["print", "night", "neon", "jargon"])
def test_tasks_are_fine_grained_grids(name):
    task = words.TASKS[name]
    assert len(task.classes()) == len(set(task.names())) == 36
    assert (len(task.textures), len(task.colours), len(task.shapes)) == (3, 3, 4)


@pytest.mark.parametrize("name", ["print", "night", "neon", "studio", "street"])
def test_names_of_known_words_say_what_the_classes_are(name):
    task = words.TASKS[name]
    assert task.names() == [words.class_name(*c) for c in task.classes()]


def test_jargon_replaces_only_the_texture_words():
    task = words.TASKS["jargon"]
    for name, known in zip(task.names(), (words.class_name(*c) for c in task.classes()), strict=True):
        term, *rest = name.split()
        assert term in task.terms and rest == known.split()[1:]

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hf_transmiter.data.anchors import TEMPLATES, Anchors, read_templates
from hf_transmiter.data.vocabulary import choose_auxiliary, load_vocabulary, name_key, universal_vocabulary


NAMES = st.lists(st.text(min_size=1, max_size=8).filter(str.strip), min_size=2, max_size=12, unique=True)


def unit(rows, width, seed=0):
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_names_counts_and_order():
    anchors = Anchors(["cat", "dog"], ["tree"], ["a {}."])
    assert anchors.names == ("cat", "dog", "tree")
    assert (anchors.num_task, anchors.num_anchors, len(anchors)) == (2, 3, 3)
    assert isinstance(anchors.task, tuple) and isinstance(anchors.templates, tuple)
    assert anchors == Anchors(("cat", "dog"), ("tree",), ("a {}.",)) and len({anchors, Anchors(["cat"])}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        anchors.task = ("bird",)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": []}, ValueError, "at least one name"),
        ({"task": "cat"}, TypeError, "bare string"),
        ({"task": ["cat", 3]}, TypeError, r"task\[1\] must be a string"),
        ({"task": ["cat", " "]}, ValueError, r"task\[1\] is empty"),
        ({"task": ["cat", "dog", "cat"]}, ValueError, "'cat'"),
        ({"task": ["cat"], "auxiliary": ["dog", "cat"]}, ValueError, "more than once: 'cat'"),
        ({"task": ["cat"], "templates": []}, ValueError, "at least one template"),
        ({"task": ["cat"], "templates": ["a photo."]}, ValueError, "exactly one {}"),
        ({"task": ["cat"], "templates": ["{} or {}"]}, ValueError, "exactly one {}"),
        ({"task": ["cat"], "templates": ["{} of {0}"]}, ValueError, "exactly one {}"),
    ],
)
def test_bad_anchors_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Anchors(**arguments)


def test_names_that_differ_in_case_are_different():
    assert Anchors(["Cat", "cat"]).num_anchors == 2


def test_fingerprint_is_pinned():
    # A change here makes every published adapter and bridge unreadable. The digest is that of `sha256sum` over
    # {"names":["cat","chien \ud83d\udc15","tree"],"num_task":2,"templates":["a photo of a {}."]}
    expected = "1cf25822d25fe22a5d204150873be708a50b0a08ce7ff8a5c786f5d1a6a39ef8"
    assert Anchors(["cat", "chien 🐕"], ["tree"]).fingerprint == expected


@settings(max_examples=30, deadline=None)
@given(names=NAMES, data=st.data())
def test_fingerprint_tells_order_number_of_tasks_and_templates(names, data):
    cut = data.draw(st.integers(1, len(names) - 1))
    anchors = Anchors(names[:cut], names[cut:])
    assert anchors.fingerprint == Anchors(tuple(names[:cut]), tuple(names[cut:])).fingerprint
    others = [
        Anchors(names[cut:], names[:cut]),
        Anchors(names),
        Anchors(names[:cut], names[cut:], ["a {}."]),
        Anchors(names[:cut], [*names[cut:], "".join(names) + "!"]),
    ]
    assert anchors.fingerprint not in {other.fingerprint for other in others}


def test_check_same_says_what_differs():
    first = Anchors(["cat", "dog"], ["tree"])
    first.check_same(Anchors(["cat", "dog"], ["tree"]))
    for other, message in [
        (Anchors(["cat", "cow"], ["tree"]), "1 names only in the first: 'dog'; 1 names only in the second: 'cow'"),
        (Anchors(["dog", "cat"], ["tree"]), "another order, first at position 0: 'cat' / 'dog'"),
        (Anchors(["cat"], ["dog", "tree"]), "2 / 1 of the names are task names"),
        (Anchors(["cat", "dog"], ["tree"], ["a {}."]), r"templates \['a photo of a {}.'\] / \['a {}.'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            first.check_same(other)
    with pytest.raises(ValueError, match="and 92 more"):
        first.check_same(Anchors(["cat", "dog"], ["tree", *map(str, range(100))]))


@settings(deadline=None)
@given(names=NAMES, data=st.data())
def test_json_round_trip(names, data, tmp_path_factory):
    cut = data.draw(st.integers(0, len(names)))
    anchors = Anchors(names[:cut], names[cut:], ["a {}.", "the {}."])
    assert Anchors.from_dict(json.loads(json.dumps(anchors.to_dict()))) == anchors
    path = tmp_path_factory.mktemp("anchors") / "sub" / "anchors.json"
    anchors.save(path)
    loaded = Anchors.load(path)
    assert loaded == anchors and loaded.fingerprint == anchors.fingerprint
    assert [file.name for file in path.parent.iterdir()] == ["anchors.json"]


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown key.* 'class_names'; the keys are task, auxiliary, templates"):
        Anchors.from_dict({"task": ["cat"], "class_names": ["cat"]})
    with pytest.raises(ValueError, match="the description of anchors lacks task. Write anchors with Anchors.save"):
        Anchors.from_dict({"auxiliary": ["cat"]})
    with pytest.raises(ValueError, match="more than once"):
        Anchors.from_dict({"task": ["cat", "cat"]})


def test_save_does_not_overwrite_silently(tmp_path):
    path = tmp_path / "anchors.json"
    Anchors(["cat"]).save(path)
    Anchors(["cat"]).save(path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        Anchors(["dog"]).save(path)
    assert Anchors.load(path).task == ("cat",)
    Anchors(["dog"]).save(path, overwrite=True)
    assert Anchors.load(path).task == ("dog",)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ('["cat"]', "JSON object")])
def test_load_refuses_other_files(tmp_path, text, message):
    path = tmp_path / "anchors.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Anchors.load(path)


def test_build_draws_from_the_shipped_nouns():
    task = ["Golden_Retriever", "class that is in no list"]
    anchors = Anchors.build(task)
    assert anchors.task == tuple(task) and anchors.num_anchors == 1024
    assert set(anchors.auxiliary) <= set(load_vocabulary("common-nouns"))
    assert "golden retriever" not in Anchors.build(task, strategy="all").auxiliary
    assert anchors == Anchors.build(task) != Anchors.build(task, seed=1)


@settings(max_examples=30, deadline=None)
@given(task=NAMES, seed=st.integers(0, 5), num_anchors=st.integers(15, 60))
def test_build_never_repeats_a_name(task, seed, num_anchors):
    vocabulary = [*map(str.upper, task), *(f"noun {i}" for i in range(60))]
    anchors = Anchors.build(task, vocabulary=vocabulary, seed=seed, num_anchors=num_anchors)
    assert anchors.num_anchors == num_anchors and anchors.num_task == len(task)
    assert not {name_key(name) for name in task} & {name_key(name) for name in anchors.auxiliary}


def test_random_names_are_shared_between_tasks():
    cats, dogs = (Anchors.build([name], seed=3, num_anchors=101) for name in ("no such cat", "no such dog"))
    assert cats.auxiliary == dogs.auxiliary
    # A task that holds one of the names only moves the next one up.
    taken = Anchors.build([cats.auxiliary[4]], seed=3, num_anchors=101).auxiliary
    assert taken[:99] == cats.auxiliary[:4] + cats.auxiliary[5:]


def test_all_does_not_look_at_num_anchors():
    task = ["cat", "dog", "cow"]
    assert Anchors.build(task, vocabulary=["tree", "Dog"], strategy="all", num_anchors=1).auxiliary == ("tree",)
    assert Anchors.build(task, num_anchors=3) == Anchors(task)


def test_build_errors_name_the_remedy():
    with pytest.raises(
        ValueError, match="2 task names do not fit into num_anchors=1; raise num_anchors to at least 2"
    ):
        Anchors.build(["cat", "dog"], num_anchors=1)
    with pytest.raises(ValueError, match="7 auxiliary names .* offers only 2. Use a larger vocabulary"):
        Anchors.build(["cat"], vocabulary=["cat", "tree", "house"], num_anchors=8)
    with pytest.raises(ValueError, match="pass embeds="):
        Anchors.build(["cat"], vocabulary=["tree", "house"], num_anchors=2, strategy="farthest-point")
    with pytest.raises(ValueError, match="pass logits="):
        Anchors.build(["cat"], vocabulary=["tree", "house"], num_anchors=2, strategy="highest-spread")
    with pytest.raises(ValueError, match=r"embeds must have the shape \(3, d\).*got \(2, 4\)"):
        Anchors.build(["cat"], vocabulary=["tree", "house"], num_anchors=2, embeds=torch.ones(2, 4))
    with pytest.raises(ValueError, match="Unknown strategy 'nearest'"):
        Anchors.build(["cat"], strategy="nearest")


def test_build_reads_embeddings_and_logits_in_pool_order():
    task, vocabulary = ["cat", "dog"], ["near cat", "dog", "far", "near dog", "farther"]
    pool = Anchors.build(task, vocabulary=vocabulary, strategy="all")
    assert pool.names == ("cat", "dog", "near cat", "far", "near dog", "farther")
    embeds = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0.1, 0], [0, 0, 1], [0.1, 1, 0], [-1, -1, 0]])
    logits = torch.tensor([[0.0, 0, 1, 0, 9, 3], [0, 0, 2, 0, 0, 0]])
    chosen = {
        strategy: Anchors.build(
            task, vocabulary=vocabulary, strategy=strategy, num_anchors=4, embeds=embeds, logits=logits
        ).auxiliary
        for strategy in ("farthest-point", "highest-spread", "spread-then-farthest")
    }
    assert chosen == {
        "farthest-point": ("farther", "far"),
        "highest-spread": ("near dog", "farther"),
        # All four candidates are in the pool of 2 * 2.
        "spread-then-farthest": ("farther", "far"),
    }


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 20), width=st.integers(2, 6), task=st.integers(0, 3), seed=st.integers(0, 999), data=st.data())
def test_each_farthest_point_maximises_the_least_distance(n, width, task, seed, data):
    count = data.draw(st.integers(1, n))
    points, started = unit(n, width, seed), unit(task, width, seed + 1)
    names = [f"name {i}" for i in range(n)]
    chosen = choose_auxiliary(names, count, "farthest-point", text_embeds=points, task_embeds=started)
    assert len(set(chosen)) == count
    if not task:
        assert chosen[0] == 0
    distances = 1 - points.double() @ torch.cat([started, points]).double().T
    before = list(range(task))
    for step in chosen:
        if before:
            least = distances[:, before].amin(dim=1)
            rest = [i for i in range(n) if task + i not in before]
            assert least[step] >= least[rest].max() - 1e-5
        before.append(task + step)


def test_farthest_point_looks_at_directions_only_and_takes_equal_points_once():
    points = unit(8, 3)
    names = [str(i) for i in range(8)]
    scaled = points * torch.arange(1, 9)[:, None]
    expected = choose_auxiliary(names, 5, "farthest-point", text_embeds=points, task_embeds=points[:1])
    assert choose_auxiliary(names, 5, "farthest-point", text_embeds=scaled, task_embeds=7 * points[:1]) == expected
    equal = torch.ones(4, 3)
    chosen = choose_auxiliary(list("abcd"), 4, "farthest-point", text_embeds=equal, task_embeds=equal[:1])
    assert sorted(chosen) == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), images=st.integers(2, 6), seed=st.integers(0, 999), data=st.data())
def test_highest_spread_and_its_pool(n, images, seed, data):
    count = data.draw(st.integers(0, n))
    logits = torch.randn(images, n, generator=torch.Generator().manual_seed(seed))
    names = [f"name {i}" for i in range(n)]
    chosen = choose_auxiliary(names, count, "highest-spread", logits=logits)
    spread = logits.std(dim=0)
    assert spread[chosen].tolist() == sorted(spread.tolist(), reverse=True)[:count]
    both = choose_auxiliary(names, count, "spread-then-farthest", logits=logits, text_embeds=unit(n, 4, seed))
    assert len(set(both)) == count
    assert set(both) <= set(choose_auxiliary(names, min(2 * count, n), "highest-spread", logits=logits))


@pytest.mark.parametrize(
    ("strategy", "inputs", "message"),
    [
        ("farthest-point", {}, "needs text_embeds"),
        ("spread-then-farthest", {"logits": torch.ones(2, 3)}, "needs text_embeds"),
        ("spread-then-farthest", {"text_embeds": torch.ones(3, 4)}, "needs logits"),
        ("farthest-point", {"text_embeds": torch.ones(2, 4)}, r"shape \(3, any\), got \(2, 4\)"),
        ("farthest-point", {"text_embeds": torch.ones(3, 4), "task_embeds": torch.ones(1, 5)}, r"shape \(any, 4\)"),
        ("farthest-point", {"text_embeds": torch.ones(3, 4) / 0}, "NaN or infinite"),
        ("highest-spread", {"logits": torch.ones(3)}, r"shape \(any, 3\), got \(3,\)"),
        ("highest-spread", {"logits": torch.ones(1, 3)}, "at least 2 images"),
        ("highest-spread", {"logits": torch.full((2, 3), float("nan"))}, "NaN or infinite"),
    ],
)
def test_choose_auxiliary_says_what_is_missing(strategy, inputs, message):
    with pytest.raises(ValueError, match=message):
        choose_auxiliary(["a", "b", "c"], 2, strategy, **inputs)


def test_negative_count_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        choose_auxiliary(["a"], -1)


def test_universal_vocabulary_is_pinned():
    # Published bridges are built on these names: a change of the shipped list must keep them, or have another name.
    anchors = Anchors.universal()
    assert anchors.num_task == 0 and anchors.num_anchors == 1024
    assert anchors.names[:4] == ("canal boat", "spike", "whiskey", "chain mail")
    assert anchors.fingerprint == "b34dfa8ca627b037f9015c0640451de2965bcf481c8bef631c4ba212f5da9e19"


def test_universal_vocabulary_nests():
    assert universal_vocabulary(1024)[:64] == universal_vocabulary(64)
    assert Anchors.universal().auxiliary == universal_vocabulary()
    with pytest.raises(ValueError, match="offers only"):
        universal_vocabulary(10**6)


def test_templates():
    assert read_templates(["default"]) == read_templates(None) == Anchors(["cat"]).templates == ("a photo of a {}.",)
    assert read_templates(["food101", "a {}."]) == ("a photo of {}, a type of food.", "a {}.")
    assert len(read_templates(["tip-adapter-ensemble"])) == 7
    for templates in TEMPLATES.values():
        Anchors(["cat"], templates=templates)
    with pytest.raises(ValueError, match="No templates named 'cifar'; choose one of default, "):
        read_templates(["cifar"])


def test_every_template_has_a_source():
    path = Path(sys.modules[Anchors.__module__].__file__).parents[1] / "assets" / "templates.json"
    for name, row in json.loads(path.read_text()).items():
        assert set(row) == {"templates", "source"} and "arXiv" in row["source"], name


def test_fingerprint_does_not_depend_on_the_process():
    code = "from hf_transmiter.data.anchors import Anchors; print(Anchors.universal().fingerprint)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == Anchors.universal().fingerprint

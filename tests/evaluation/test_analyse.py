"""What an adapter changes: counted by hand, planted and found again."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.analyse import (
    AFTER,
    BEFORE,
    TUNED,
    analyse,
    compare_logits,
    directions,
    markdown,
    nearest,
)
from hf_transmiter.evaluation.reliability import expected_calibration_error
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.sandbox import load_dataset
from hf_transmiter.tuners import TransMiterConfig


NAMES = ("cat", "dog", "car")
AUXILIARY = ("tree", "ship", "red", "blue", "old", "big")


def classifier(encoder, form="linear", auxiliary=AUXILIARY, noise=0.3):
    """An adapter that is not the identity."""
    config = TransMiterConfig(class_names=list(NAMES), auxiliary_names=list(auxiliary), form=form)
    made = AnchorClassifier(encoder, config.anchors).add_adapter(config)
    tensors = made.transmiter.tensors("default")
    for name in ("class_vectors", "bias", "down.weight", "norm.weight", "norm.bias"):
        if name in tensors:
            tensors[name].add_(noise * torch.randn(tensors[name].shape))
    return made


@pytest.fixture
def cached(tmp_path):
    return {"cache_dir": tmp_path / "features", "progress": False}


def logits_of(seed: int, images: int = 40, classes: int = 4):
    generator = torch.Generator().manual_seed(seed)
    pair = 2 * torch.randn(2, images, classes, generator=generator)
    labels = torch.randint(classes - 1, (images,), generator=generator)  # of the last class there is no image
    return {BEFORE: pair[0], AFTER: pair[1]}, labels


@given(seed=st.integers(0, 10**6))
@settings(max_examples=5)
def test_counts_are_what_they_say(seed):
    logits, labels = logits_of(seed)
    names = ["a", "b", "c", "d"]
    found = compare_logits(logits, names, labels)
    was, now = ([names[i] for i in z.argmax(1).tolist()] for z in logits.values())
    truth = [names[i] for i in labels.tolist()]
    rows = list(zip(truth, was, now, strict=True))
    assert found.changed == sum(w != n for _, w, n in rows) == sum(count for *_, count in found.moves)
    assert found.corrected == sum(t == n != w for t, w, n in rows)
    assert found.broken == sum(t == w != n for t, w, n in rows)
    assert all(count == sum((w, n) == (source, target) for _, w, n in rows) for source, target, count in found.moves)
    confusions = {(label, said): counts for label, said, *counts in found.confusions}
    for t in names:
        for said in names:
            counts = (sum(x == (t, said) for x in zip(truth, p, strict=True)) for p in (was, now))
            before, after = counts
            assert (t == said or before == after) == ((t, said) not in confusions)
            assert t == said or confusions.get((t, said), [before, after]) == [before, after]
    for c, change in enumerate(found.classes):
        assert change.name == names[c] and change.images == truth.count(names[c])
        assert change.share_after == pytest.approx(100 * now.count(names[c]) / len(rows))
        shift = logits[AFTER] - logits[BEFORE]
        assert change.logit_shift == pytest.approx(float((shift[:, c] - shift.mean(1)).mean()), abs=1e-5)
        softmax = [z.softmax(1)[:, c].mean() for z in logits.values()]
        assert change.probability_shift == pytest.approx(float(100 * (softmax[1] - softmax[0])), abs=1e-4)
        if change.images:
            right = [t == n for t, _, n in rows if t == names[c]]
            assert change.accuracy_after == pytest.approx(100 * sum(right) / len(right))
    assert found.classes[-1].accuracy_before is None  # it has no images
    zero_shot, adapted = found.confidence
    assert zero_shot.accuracy == pytest.approx(100 * sum(t == w for t, w, _ in rows) / len(rows))
    assert adapted.calibration_error == pytest.approx(expected_calibration_error(logits[AFTER], labels))
    assert sum(change.probability_shift for change in found.classes) == pytest.approx(0, abs=1e-6)


def test_the_tuned_model_is_a_row_of_its_own():
    logits, labels = logits_of(0)
    logits[TUNED] = logits[AFTER] + torch.randn(logits[AFTER].shape, generator=torch.Generator().manual_seed(1))
    found = compare_logits(logits, list("abcd"), labels)
    same = (logits[TUNED].argmax(1) == logits[AFTER].argmax(1)).float().mean()
    assert found.agreement == pytest.approx(100 * float(same))
    assert [row.name for row in found.confidence] == [BEFORE, AFTER, TUNED]
    assert found.confidence[2].calibration_error == pytest.approx(expected_calibration_error(logits[TUNED], labels))


def test_before_is_the_model_with_its_adapter_off(encoder, make_dataset, cached):
    images = make_dataset(30)
    for form in ("linear", "mlp"):
        made = classifier(encoder, form)
        found = analyse(made, images, **cached)
        x = embed_dataset(encoder, images, **cached).embeds
        with torch.no_grad():
            after = made.classify(x)
            made.transmiter.enable_adapters(False)
            before = made.classify(x)
            made.transmiter.enable_adapters(True)
        assert torch.allclose(found.logits[BEFORE], before, atol=1e-5) and not torch.allclose(before, after)
        assert torch.allclose(found.logits[AFTER], after, atol=1e-5)
        assert torch.equal(found.labels, torch.tensor(images["label"]))
        assert (found.form, found.model, found.num_images) == (form, Path(encoder.name_or_path).name, 30)
        near = {name for change in found.classes for name, _ in change.towards}
        assert near <= set(AUXILIARY) and bool(near) == (form == "linear")
        json.dumps(found.to_dict(), allow_nan=False)
        assert ("## What the changes look like" in markdown(found)) == bool(near)


def test_an_adapter_that_changes_nothing(encoder, make_dataset, cached):
    for form in ("linear", "mlp"):
        found = analyse(classifier(encoder, form, noise=0.0), make_dataset(12), **cached)
        assert found.changed == found.corrected == found.broken == 0 and not found.moves and not found.confusions
        assert not any(change.towards or change.away for change in found.classes)
        assert found.confidence[0].calibration_error == pytest.approx(found.confidence[1].calibration_error, abs=1e-3)
        assert "What the changes look like" not in markdown(found)


def test_labels_are_matched_by_name_or_left_out(encoder, make_dataset, cached):
    made = classifier(encoder)
    images = make_dataset(30)
    straight = analyse(made, images, **cached)
    turned = make_dataset(30).cast_column("label", images.features["label"])
    order = ["car", "cat", "dog"]
    turned = turned.map(lambda row: {"label": order.index(NAMES[row["label"]])})
    features = turned.features.copy()
    features["label"] = type(features["label"])(names=order)
    assert analyse(made, turned.cast(features), **cached).to_dict() == straight.to_dict()
    bare = analyse(made, images.remove_columns("label"), **cached)
    assert bare.corrected is bare.broken is bare.labels is None and not bare.confusions
    assert bare.changed == straight.changed and bare.moves == straight.moves
    assert bare.classes[0].accuracy_after is None and bare.confidence[1].accuracy is None
    text = markdown(bare)
    assert (
        "for better or worse is not known" in text
        and "## Changed predictions" in text
        and "accuracy before" not in text
    )
    with pytest.raises(ValueError, match="'plane' is not among the classifier's names"):
        analyse(made, make_dataset(12, ("cat", "dog", "plane")), **cached)


def test_who_speaks_for_the_tuned_model(encoder, make_dataset, cached):
    """A tuned model that is given; else the calibration pack, if it is of these images; else nobody."""
    made, images = classifier(encoder), make_dataset(30)
    table = embed_dataset(encoder, images, **cached)
    said = torch.randn(30, 3)
    assert analyse(made, images, **cached).agreement is None
    made.calibration = CalibrationPack(said, NAMES, table.dataset_fingerprint)
    own = analyse(made, images, **cached)
    assert torch.equal(own.logits[TUNED], said) and "The tuned model predicts the same on" in markdown(own)
    given = analyse(made, images, teacher=said, **cached)
    assert given.agreement == own.agreement
    assert TUNED not in analyse(made, make_dataset(30, seed=1), **cached).logits


def test_a_planted_move_is_named(encoder, make_dataset, cached):
    """Class vectors that go from their names towards an auxiliary name, at whatever length, and all by the same."""
    made = classifier(encoder, noise=0.0)
    text = made.text_embeds
    centred = text[len(NAMES) :] - text[len(NAMES) :].mean(0)
    tensors = made.transmiter.tensors("default")
    for c, j in enumerate((4, 1, 3)):
        tensors["class_vectors"][c] = normalize(text[c] + 0.05 * normalize(centred[j], dim=0), dim=0)
    tensors["class_vectors"].mul_(torch.tensor([[0.5], [1.0], [2.0]]))
    found = analyse(made, make_dataset(6), **cached)
    assert [change.towards[0][0] for change in found.classes] == [AUXILIARY[j] for j in (4, 1, 3)]
    assert found.classes[0].towards[0][1] > found.classes[0].towards[1][1] > 0 > found.classes[0].away[0][1]


def test_what_invented_words_mean():
    """Class vectors of what the sandbox's trade terms stand for: the nearest phrases say so."""
    images = load_dataset("jargon", "validation").select(range(12))
    encoder, names = DualEncoder.from_pretrained("sandbox:weak"), images.features["label"].names
    meaning = {"nimbus": "striped", "zenith": "dotted", "lumen": "checked"}
    words = [f"{texture} {colour} thing" for texture in meaning.values() for colour in ("green", "white", "pink")]
    config = TransMiterConfig(class_names=names, auxiliary_names=words, form="linear")
    made = AnchorClassifier(encoder, config.anchors).add_adapter(config)
    true = [" ".join([meaning[name.split()[0]], *name.split()[1:]]) for name in names]
    made.transmiter.tensors("default")["class_vectors"].copy_(encoder.embed_names(true, config.templates))
    found = analyse(made, images, progress=False)
    hits = [meaning[change.name.split()[0]] in change.towards[0][0] for change in found.classes]
    assert sum(hits) / len(hits) > 0.8  # a third by chance
    assert found.corrected > found.broken


def test_directions_do_not_see_what_all_classes_share():
    generator = torch.Generator().manual_seed(0)
    start = normalize(torch.randn(4, 8, generator=generator), dim=-1)
    auxiliary = normalize(torch.randn(6, 8, generator=generator), dim=-1)
    vectors = normalize(start + 0.3 * torch.randn(4, 8, generator=generator), dim=-1)
    found = directions(vectors, start, auxiliary)
    assert found.abs().max() <= 1 + 1e-6
    assert torch.allclose(directions(3 * vectors, start, auxiliary), found, atol=1e-6)
    assert torch.allclose(directions(vectors, start, auxiliary + 0.7), found, atol=1e-6)
    assert directions(2 * start, start, auxiliary).abs().max() == 0


def test_nearest_keeps_signs_apart():
    values = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.0, 0.0]])
    assert nearest(values, "abc") == [
        {"towards": (("a", pytest.approx(0.3)), ("c", pytest.approx(0.1))), "away": (("b", pytest.approx(-0.2)),)},
        {"towards": (), "away": ()},
    ]
    assert nearest(torch.zeros(1, 0), "") == [{"towards": (), "away": ()}]


def test_refused(encoder, make_dataset, cached):
    with pytest.raises(ValueError, match="no adapter to analyse"):
        analyse(AnchorClassifier(encoder, Anchors(NAMES)), make_dataset(6), **cached)
    logits, labels = logits_of(0)
    with pytest.raises(ValueError, match=r"logits must all be \(N, 3\)"):
        compare_logits(logits, ["a", "b", "c"], labels)
    with pytest.raises(ValueError, match="got .*39, 4.*40, 4"):
        compare_logits({BEFORE: logits[BEFORE][1:], AFTER: logits[AFTER]}, list("abcd"))

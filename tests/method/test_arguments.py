"""Arguments of the wrong kind: every public entrance says what it wants instead of failing inside."""

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from torch import nn

import hf_transmiter as ht
from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder
from hf_transmiter.evaluation.compare import compare
from hf_transmiter.method.saved import load_classifier, load_teacher


NAMES = ("cat", "dog", "car")


@pytest.fixture
def wrong(encoder, make_dataset, tmp_path):
    """By name, what people pass by mistake."""
    return {
        "nothing": None,
        "a name": "my/model",
        "a folder": tmp_path,
        "its model": encoder.model,
        "a processor": encoder.processor,
        "an array": np.zeros((4, 4, 3), np.uint8),
        "a dict": {"a": 1},
        "a number": 3,
        "numbers": [1, 2],
        "splits": DatasetDict(train=make_dataset(4)),
        "a class": DualEncoder,
        "an encoder": encoder,
        "a classifier": AnchorClassifier(encoder, Anchors(NAMES)),
        "pictures": make_dataset(4),
        "bytes": b"x",
        "a layer": nn.Linear(2, 2),
    }


def entrances(encoder, images):
    """By name: a call of one argument, and which of the wrong ones it takes."""
    tuned = AnchorClassifier(encoder, Anchors(NAMES))
    adapter = ht.extract(encoder, tuned, images, class_names=NAMES, progress=False)
    encoders, teachers = {"an encoder"}, {"its model", "an encoder", "a classifier"}
    quiet, few = {"progress": False}, {"variants": ["EFT"], "progress": False}
    return {
        "DualEncoder": (DualEncoder, {"its model"}),
        "extract weak": (lambda it: ht.extract(it, tuned, images, **quiet), encoders),
        "extract teacher": (lambda it: ht.extract(encoder, it, images, class_names=NAMES, **quiet), teachers),
        "extract dataset": (lambda it: ht.extract(encoder, tuned, it, **quiet), {"nothing", "pictures"}),
        "extract config": (lambda it: ht.extract(encoder, tuned, images, config=it, **quiet), {"nothing"}),
        "transfer adapter": (lambda it: ht.transfer(it, encoder), ()),
        "transfer strong": (lambda it: ht.transfer(adapter, it), encoders),
        "transfer bridge": (lambda it: ht.transfer(adapter, encoder, bridge=it), {"nothing"}),
        "transfer teacher": (
            lambda it: ht.transfer(adapter, encoder, images, teacher=it, **quiet),
            {"nothing", *teachers},
        ),
        "transfer config": (lambda it: ht.transfer(adapter, encoder, config=it), {"nothing"}),
        "tune model": (lambda it: ht.tune(it, images), {"an encoder"}),
        "tune dataset": (lambda it: ht.tune(encoder, it), {"pictures"}),
        "tune weak": (lambda it: ht.tune(encoder, images, teacher=tuned, weak=it), {"nothing", "an encoder"}),
        "tune config": (lambda it: ht.tune(encoder, images, config=it), {"nothing"}),
        "compare weak": (lambda it: compare(it, encoder, tuned, images, **few), encoders),
        "compare strong": (lambda it: compare(encoder, it, tuned, images, **few), encoders),
        "compare teacher": (lambda it: compare(encoder, encoder, it, images, **few), teachers),
        "compare test": (lambda it: compare(encoder, encoder, tuned, it, **few), {"pictures"}),
        "compare bridge": (
            lambda it: compare(encoder, encoder, tuned, images, bridge=it, **few),
            {"nothing"},
        ),
        "evaluate classifier": (lambda it: ht.evaluate(it, images, **quiet), {"a classifier"}),
        "evaluate dataset": (lambda it: ht.evaluate(tuned, it, **quiet), {"pictures"}),
        "label_tune": (lambda it: ht.label_tune(it, images, **quiet), ()),
        "Bridge.build": (lambda it: Bridge.build(it, encoder, images, **quiet), encoders),
        "Bridge.load": (Bridge.load, ()),
        "AnchorClassifier encoder": (lambda it: AnchorClassifier(it, Anchors(NAMES)), encoders),
        "AnchorClassifier anchors": (lambda it: AnchorClassifier(encoder, it), ()),
        "predict": (tuned.predict, {"an array"}),
        "embed_dataset": (lambda it: ht.embed_dataset(it, images, **quiet), encoders),
        "load_teacher": (lambda it: load_teacher("x.safetensors", it), ()),
        "load_classifier": (load_classifier, ()),
        "run_bench": (lambda it: ht.run_bench(it, "nowhere"), ()),
    }


def test_what_is_wanted_is_said(encoder, make_dataset, wrong):
    for where, (call, fine) in entrances(encoder, make_dataset(12)).items():
        for what, value in wrong.items():
            if what in fine:  # whether it works is tested elsewhere
                continue
            with pytest.raises((TypeError, ValueError, OSError)) as caught:
                call(value)
            said = str(caught.value)
            assert said and "object has no attribute" not in said and "is not iterable" not in said, (
                where,
                what,
                said,
            )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e, d: ht.extract(e.model, e, d),
            "weak must be a DualEncoder, not of the type CLIPModel: wrap it, ",
        ),
        (lambda e, d: ht.extract(e, "/", d), "a teacher is a model and not the name of one: load '/' first"),
        (
            lambda e, d: ht.transfer(AnchorClassifier(e, Anchors(NAMES)), "me/clip"),
            "strong must be a DualEncoder, not of ",
        ),
        (lambda e, d: ht.tune(e, {"train": d}), "dataset must be one split of a dataset, not a dict"),
        (lambda e, d: ht.tune(e, DatasetDict(train=d)), r"pass one of its splits, such as dataset\['train'\]"),
        (
            lambda e, d: ht.tune(e, d, config={"epochs": 1}),
            r"config must be a TuningConfig, .*: pass TuningConfig\(\*\*it",
        ),
        (lambda e, d: ht.tune(e, d, weak=e), "weak is what a teacher was before its tuning: pass the teacher"),
        (lambda e, d: AnchorClassifier(e, ["cat"]), r"anchors must be an Anchors, .*: make some of your class names"),
        (lambda e, d: AnchorClassifier(e, Anchors(NAMES)).predict(None), "cannot read image 0: there is no picture"),
        (
            lambda e, d: e.preprocess([torch.zeros(3, 4, 4)]),
            "cannot read image 0: values must be uint8, uint16, or fractions",
        ),
    ],
)
def test_the_message_helps(encoder, make_dataset, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(encoder, make_dataset(6))


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3", float("nan"), 10**400], ids=range(7))
def test_numbers_among_the_arguments(encoder, make_dataset, make_images, count):
    """A negative batch size gave an empty answer."""
    classifier, images = AnchorClassifier(encoder, Anchors(NAMES)), make_images(2)
    for name, call in {
        "batch_size": lambda: classifier.predict(images, batch_size=count),
        "top_k": lambda: classifier.predict(images, top_k=count),
        "batch_size ": lambda: encoder.embed_images(images, batch_size=count),
        "batch_size  ": lambda: encoder.embed_texts(["a"], batch_size=count),
        "batch_size   ": lambda: ht.embed_dataset(encoder, make_dataset(3), batch_size=count, progress=False),
        "num_anchors": lambda: Anchors.build(NAMES, num_anchors=count),
    }.items():
        with pytest.raises(ValueError, match=f"{name.strip()} must be"):
            call()

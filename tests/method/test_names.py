"""Names are matched by name, never by their place; one string is never a list of them."""

import copy
import json

import datasets
import pytest
import torch
from peft import PeftModel

from hf_transmiter.bench.config import BenchConfig
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.images import load_images
from hf_transmiter.data.splits import base_names
from hf_transmiter.data.table import FeatureTable, align_labels
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.analyse import analyse
from hf_transmiter.evaluation.compare import compare
from hf_transmiter.evaluation.evaluate import evaluate
from hf_transmiter.hub.push import push
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract
from hf_transmiter.method.label_tune import label_tune
from hf_transmiter.method.saved import load_classifier, load_teacher
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.method.teacher import as_classifier, teacher_logits
from hf_transmiter.method.transfer import transfer
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import LabelTuningConfig, TuningConfig
from hf_transmiter.tuners import CoOpConfig, TransMiterConfig, inject, set_classes


NAMES = ("cat", "dog", "car")
TURNED = ("car", "cat", "dog")
SPELT = ("Car", "CAT", "d_o_g")
QUICK = TuningConfig(shots=4, epochs=4, batch_size=6, lr=1e-2, augment="none")


@pytest.fixture
def options(tmp_path):
    return {"progress": False, "cache_dir": tmp_path / "features"}


@pytest.fixture
def adapter(encoder):
    return AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(TransMiterConfig(class_names=NAMES, form="linear"))


def other_order(dataset):
    """The same pictures, their label column's names in another order."""
    feature = datasets.ClassLabel(names=list(TURNED))
    labels = [TURNED.index(NAMES[label]) for label in dataset["label"]]
    return dataset.remove_columns("label").add_column("label", labels, feature=feature)


@pytest.mark.parametrize("names", [TURNED, SPELT])
@pytest.mark.parametrize("method", ["lora", "coop"])
def test_tuning_matches_names(encoder, make_dataset, options, method, names):
    """The same examples, the same labels: the same answers, in other columns."""
    data = make_dataset(30)
    straight = tune(encoder, data, method, config=QUICK, **options)
    turned = tune(encoder, data, method, class_names=names, config=QUICK, **options)
    assert straight.class_names == NAMES and turned.class_names == names
    assert turned.facts.learnt["held_out"] == straight.facts.learnt["held_out"] or names == SPELT
    if names == TURNED:
        pixels = encoder.preprocess(data["image"])
        columns = [TURNED.index(name) for name in NAMES]
        found, expected = (one(pixels).logits_per_image for one in (turned, straight))
        assert torch.allclose(found[:, columns], expected, atol=1e-3)
    scores = [evaluate(turned, images, **options)[0].value for images in (data, other_order(data))]
    assert scores[0] == scores[1]


def test_names_that_do_not_fit_are_listed(encoder, make_dataset, adapter, options):
    data = make_dataset(12, names=("cat", "plane", "ship"))
    said = r"the dataset's classes 'plane', 'ship' are not among the classifier's names \(cat, dog, car\)"
    with pytest.raises(ValueError, match=said):
        tune(encoder, data, "lora", class_names=NAMES, config=QUICK, **options)
    with pytest.raises(ValueError, match=said):
        evaluate(adapter, data, **options)
    with pytest.raises(ValueError, match=said):
        label_tune(adapter, data, **options)
    with pytest.raises(ValueError, match=said):
        analyse(adapter, data, **options)
    with pytest.raises(ValueError, match=f"the test images: {said}"):
        compare(encoder, encoder, adapter, data, class_names=NAMES, variants=["tuned weak"], **options)
    with pytest.raises(ValueError, match="all match 'cat'"):
        align_labels(FeatureTable(torch.zeros(2, 4), [0, 1], ["Cat", "CAT"]), NAMES)


def test_classes_without_images_need_no_name(encoder, make_dataset, adapter, options):
    """A column may know more classes than there are pictures of."""
    feature = datasets.ClassLabel(names=["plane", *NAMES])
    data = make_dataset(12)
    wide = data.remove_columns("label").add_column("label", [label + 1 for label in data["label"]], feature=feature)
    assert evaluate(adapter, wide, **options)[0].value == evaluate(adapter, data, **options)[0].value
    assert tune(encoder, wide, "lora", class_names=NAMES, config=QUICK, **options).class_names == NAMES


def test_numbers_as_names_are_places(encoder, make_dataset, adapter, options):
    data = make_dataset(12)
    feature = datasets.ClassLabel(names=["0", "1", "2"])
    numbered = data.remove_columns("label").add_column("label", data["label"][:], feature=feature)
    assert evaluate(adapter, numbered, **options)[0].value == evaluate(adapter, data, **options)[0].value


def test_labelled_steps_match_names(make_dataset, adapter, options):
    data, config = make_dataset(30), LabelTuningConfig(epochs=4, batch_size=8, lr=0.01)
    found = [label_tune(adapter, images, config=config, **options) for images in (data, other_order(data))]
    vectors = [one.transmiter.tensors("default")["class_vectors"] for one in found]
    assert torch.allclose(*vectors, atol=1e-6)


def test_teachers_are_asked_by_name(encoder, make_dataset, options):
    data = make_dataset(12)
    table = embed_dataset(encoder, data, **options)
    pack = CalibrationPack(torch.randn(12, 3), NAMES, table.dataset_fingerprint)
    columns = [NAMES.index(name) for name in TURNED]
    assert torch.equal(teacher_logits(pack, data, TURNED, table=table), pack.logits[:, columns])


def test_of_several_label_columns_none_is_taken_for_names(encoder, make_dataset, options):
    data = make_dataset(12).rename_column("label", "variant")
    data = data.add_column("family", [0] * 12, feature=datasets.ClassLabel(names=["pets"]))
    with pytest.raises(ValueError, match="label_column could be variant or family"):
        extract(encoder, torch.randn(12, 3), data, **options)
    made = extract(encoder, torch.randn(12, 3), data, label_column="variant", **options)
    assert made.class_names == NAMES


def test_a_prompt_that_peft_saved_knows_its_names(encoder, model_dir, make_dataset, options, tmp_path):
    """`model.save_pretrained`: no notes of ours beside it, but the class names are in its configuration."""
    tuned = tune(encoder, make_dataset(12), "coop", config=QUICK, **options)
    tuned.save_pretrained(tmp_path / "ours")
    model = PeftModel.from_pretrained(type(encoder).from_pretrained(model_dir("clip")).model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "teacher.json").exists()
    teacher = load_teacher(str(tmp_path / "plain"), encoder)
    assert teacher.class_names == NAMES and teacher.anchors.templates == ("{}.",)
    bare = make_dataset(12).remove_columns("label")
    for one in (teacher, model, type(encoder)(model, encoder.processor)):
        made = extract(encoder, one, bare, **options)
        assert made.class_names == NAMES and torch.allclose(made.text_embeds, encoder.embed_names(NAMES))
        vectors = made.transmiter.tensors("default")["class_vectors"]
        assert torch.allclose(vectors, tuned.text_embeds, atol=1e-5)
    assert tune(encoder, bare, teacher=teacher, weak=encoder, config=TuningConfig(epochs=1), **options).class_names
    assert compare(encoder, encoder, model, bare, variants=["tuned weak"], **options).class_names == NAMES
    # Asked for others it answers: prompts know any names.
    asked = load_classifier(str(tmp_path / "plain"), encoder, class_names=["ship", "tree"])
    assert asked.class_names == ("ship", "tree")
    assert load_classifier(str(tmp_path / "plain"), encoder).class_names == NAMES


# One string is no list of names


def bare_strings(encoder, data, adapter, tmp_path):
    """{what: a call that is given one string where a list is wanted}"""
    quiet = {"progress": False, "cache_dir": tmp_path}
    other = DualEncoder(copy.deepcopy(encoder.model), encoder.processor)
    inject(other.model, CoOpConfig(init_phrase=None, n_ctx=2))
    return {
        "class_names of tune": lambda: tune(encoder, data, class_names="lined", **quiet),
        "templates of tune": lambda: tune(encoder, data, templates="a {}", **quiet),
        "class_names of extract": lambda: extract(encoder, other, data, class_names="lined", **quiet),
        "templates of extract": lambda: extract(encoder, other, data, templates="a {}", **quiet),
        "seen_classes of extract": lambda: extract(encoder, other, data, seen_classes="cat", **quiet),
        "seen_classes of transfer": lambda: transfer(adapter, encoder, seen_classes="cat"),
        "seen_classes of evaluate": lambda: evaluate(adapter, data, seen_classes="cat", **quiet),
        "seen_classes of label_tune": lambda: label_tune(adapter, data, seen_classes="cat", **quiet),
        "class_names of compare": lambda: compare(encoder, encoder, other, data, class_names="lined", **quiet),
        "templates of compare": lambda: compare(encoder, encoder, other, data, templates="a {}", **quiet),
        "seen_classes of compare": lambda: compare(encoder, encoder, other, data, seen_classes="cat", **quiet),
        "variants of compare": lambda: compare(encoder, encoder, other, data, variants="refit", **quiet),
        "predict": lambda: adapter.predict(data[0]["image"], class_names="lined"),
        "set_classes": lambda: adapter.set_classes("lined"),
        "set_classes of a prompt": lambda: set_classes(other.model, "lined", encoder.processor.tokenizer),
        "class_names of as_classifier": lambda: as_classifier(encoder, "lined"),
        "task": lambda: Anchors("lined"),
        "templates": lambda: Anchors(("lined",), templates="a {}"),
        "auxiliary": lambda: Anchors(("lined",), auxiliary="woven"),
        "TransMiterConfig": lambda: TransMiterConfig(class_names="lined"),
        "templates of TransMiterConfig": lambda: TransMiterConfig(class_names=["lined"], templates="a {}"),
        "CoOpConfig": lambda: CoOpConfig(class_names="lined"),
        "embed_names": lambda: encoder.embed_names("lined"),
        "templates of embed_names": lambda: encoder.embed_names(["lined"], "a {}"),
        "embed_texts": lambda: encoder.embed_texts("lined"),
        "FeatureTable": lambda: FeatureTable(torch.zeros(2, 4), [0, 1], "lined"),
        "CalibrationPack": lambda: CalibrationPack(torch.zeros(2, 5), "lined"),
        "base_names": lambda: base_names("lined"),
        "prefer": lambda: load_images("sandbox:print", prefer="train"),
        "tags": lambda: push(tmp_path, "me/x", tags="lined"),
        "bench": lambda: BenchConfig.from_dict({"title": "x", "models": "a", "datasets": "dtd", "tunings": "coop"}),
        "bench, datasets": lambda: BenchConfig.from_dict(
            {
                "title": "x",
                "models": [{"weak": "a", "strong": "b"}],
                "datasets": "dtd",
                "tunings": [{"method": "coop"}],
            }
        ),
    }


def test_one_string_is_no_list(encoder, make_dataset, adapter, tmp_path):
    for what, call in bare_strings(encoder, make_dataset(12), adapter, tmp_path).items():
        with pytest.raises((TypeError, ValueError), match=r"must be a list|got the bare string|got one string"):
            pytest.fail(f"{what}: {call()}")


def test_saved_names_are_lists(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["class_names"] == list(NAMES)

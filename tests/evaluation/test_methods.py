"""Rows of a comparison: settings that are checked at once and reach what they are for, and what a task shares."""

import math
import re
from dataclasses import replace

import pytest
import torch
from datasets import ClassLabel

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.baselines import linear_head
from hf_transmiter.evaluation.methods import BACKPROP, IMAGES, LABELS, METHODS, WEAK, Variant
from hf_transmiter.evaluation.task import Answer, Impossible, Task, stored_bytes
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract
from hf_transmiter.method.label_tune import label_tune
from hf_transmiter.method.transfer import transfer
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import ExtractionConfig, LabelTuningConfig, TransferConfig, TuningConfig, split_tuning
from hf_transmiter.tuners import TransMiterConfig


NAMES = ("cat", "dog", "car")
WORDS = ("tree", "ship", "drawing", "red", "blue", "old", "big", "good")
GRADIENT = {"basis": "fixed", "epochs": 10, "batch_size": 8, "lr": 0.05}
QUICK = {"epochs": 1, "batch_size": 4, "augment": "none", "lr": 0.01}


@pytest.fixture(scope="module")
def models(model_dir):
    weak = DualEncoder.from_pretrained(model_dir("clip"))
    strong = DualEncoder.from_pretrained(model_dir("clip", seed=1))
    tuned = DualEncoder.from_pretrained(model_dir("clip", seed=2))  # has no class vectors for the weak model
    return weak, strong, AnchorClassifier(tuned, Anchors(NAMES))


@pytest.fixture(scope="module")
def sets(make_dataset):
    """The labelled images name their classes in another order, and lack one."""
    few = make_dataset(9, names=("car", "cat"), seed=3)
    return {"test": make_dataset(12), "unlabelled": make_dataset(110, seed=1), "labelled": few}


@pytest.fixture(scope="module")
def task(models, sets):
    own = {"vocabulary": WORDS, "num_anchors": 6}
    gradient = ExtractionConfig(solver="gradient", **GRADIENT)
    options = {"progress": False}
    return Task(*models, names=NAMES, **sets, **own, gradient=gradient, seen_classes=("cat", "car"), options=options)


def made(task, row, **settings):
    return METHODS[row].run(task, Variant(row, settings))


def logits(task, row, **settings):
    return task.answer(made(task, row, **settings)).logits


def tensors(classifier):
    return classifier.transmiter.tensors("default")


def says(classifier, images):
    """Logits of an adapter, on rows as wide as it reads."""
    encoder, reads = classifier.encoder, classifier.adapter_config.reads
    table = embed_dataset(encoder, images, tower=reads > encoder.embed_dim, progress=False)
    assert table.embeds.shape[1] == reads
    with torch.no_grad():
        return classifier.classify(table.embeds)


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_settings_are_checked_when_a_row_is_written():
    for wrong, message in (
        ("refitt", "no method 'refitt'; did you mean 'refit'"),
        ({"refit": {}, "naem": "mine"}, "a row is the name of a method or {method: {setting: value}}, with a name"),
        ({"name": "mine"}, "a row is the name of a method"),
        (["refit"], "a row is the name of a method"),
        (None, "a row is the name of a method"),
        ("refit: {", "a row is the name of a method"),
        (
            {"given bridge": {"shrinkge": 1}},
            "the row 'given bridge' has no setting 'shrinkge'; did you mean 'shrinkage'",
        ),
        ({"refit": {"shrinkage": 1}}, "the row 'refit' has no setting 'shrinkage'; there are solver, lambdas, zero_"),
        ({"refit": {"refit": False}}, "the row 'refit' has no setting 'refit'"),
        ({"refit": {"solver": "gradient"}}, "the row 'refit': solver must be one of image_map, discriminant, ridge"),
        ({"refit": {"solver": "discriminant", "lambdas": [1]}}, "solver 'discriminant' does not read lambdas"),
        ({"bridge from text": {"solver": "ridge", "shrinkage": 1}}, "solver 'ridge' does not read shrinkage"),
        ({"bridge from text": {"shrinkage": 1.0}}, "an extraction with no solver chosen does not read shrinkage"),
        ({"bridge from text": {"parts": "image"}}, "the row 'bridge from text' has no setting 'parts'"),
        ({"refit": {"parts": "images"}}, "the row 'refit': parts must be one of both, image, text"),
        ({"refit": {"even": "yes"}}, "the row 'refit': even must be bool or nothing, got 'yes'"),
        ({"image map": {"parts": "text"}}, "the row 'image map' has no setting 'parts'"),
        ({"label-free tuning": {"shots": 4}}, "the row 'label-free tuning': "),
        ({"label-free tuning": {"method": "magic"}}, "the row 'label-free tuning': method must be one of lora"),
        ({"refit": 3}, "the row 'refit' must hold settings by name, got 3"),
        ({"EFT": {"beta": 1.0}}, "the row 'EFT' has no setting 'beta'; it takes none"),
        ({"linear probe": {"beta": 1.0}}, "the row 'linear probe' has no setting 'beta'; it takes none"),
        ({"refit": {"strategy": "all"}}, "the row 'refit' has no setting 'strategy'"),
        ({"TransMiter": {"epochs": "many"}}, "the row 'TransMiter': epochs must be int, got 'many'"),
        ({"TransMiter": {"epochs": True}}, "epochs must be int, got True"),
        ({"TransMiter": {"beta": "much"}}, "beta must be float, got 'much'"),
        ({"TransMiter": {"strategy": "best"}}, "strategy must be one of random, "),
        ({"TransMiter": {"num_anchors": 5, "num_auxiliary": 2}}, "not both"),
        ({"label tuning": {"start": "EFT"}}, "start must be one of refit, TransMiter, class vectors, untrained"),
        ({"tuned strong": {"method": "magic"}}, "the row 'tuned strong': method must be one of lora"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Variant.of(wrong)


def test_rows_are_read_as_people_write_them():
    row = Variant.of({"refit": {"solver": "ridge", "lambdas": [1, 2]}, "name": "mine"})
    assert row == Variant("refit", {"solver": "ridge", "lambdas": (1, 2)}, "mine")
    assert Variant.of(row) is row and Variant.of("EFT") == Variant("EFT") and Variant("EFT").name == "EFT"
    assert Variant.of({"EFT": None, "name": "emulated"}) == Variant("EFT", name="emulated")
    # As on the command line; a row without a name of its own is told by its settings.
    row = Variant.of("refit: {solver: ridge, zero_shot_weight: 1e-3}")
    assert row.settings == {"solver": "ridge", "zero_shot_weight": 1e-3}
    assert row.name == "refit (solver: ridge, zero_shot_weight: 0.001)"
    row = Variant("TransMiter", {"lr": "1e-3", "width": None, "beta": math.inf})
    assert row.of_step(ExtractionConfig) == {"lr": 1e-3, "width": None}
    assert row.of_step(TransferConfig) == {"beta": math.inf}
    assert replace(row, name="other").settings == row.settings
    row = Variant.of("refit: {parts: image, even: false}")
    assert row.of_step(TransferConfig) == {"parts": "image", "even": False} and row.of_step(ExtractionConfig) == {}
    tuning = {"method": "coop", "position": "middle", "epochs": 3}
    found = split_tuning(Variant("tuned strong", tuning).settings)
    assert found == {"adapter": {"method": "coop", "position": "middle"}, "config": TuningConfig(epochs=3)}


def test_needs_of_the_table():
    free = [row for row, method in METHODS.items() if not method.needs]
    assert "bridge from text" in free and "zero-shot strong" in free and "refit" not in free
    assert set(METHODS["image map"].needs) == set(METHODS["refit"].needs) == {IMAGES}
    assert set(METHODS["label-free tuning"].needs) == {IMAGES, BACKPROP}
    labelled = {row for row, method in METHODS.items() if LABELS in method.needs}
    assert labelled == {"linear probe", "tuned strong", "label tuning"}
    assert {row for row, method in METHODS.items() if WEAK in method.needs} == {
        "zero-shot weak", "tuned weak", "EFT", "logit ensemble",
    }  # fmt: skip
    starts = {start: Variant("label tuning", {"start": start}).needs for start in ("refit", "class vectors")}
    assert "task images" in starts["refit"] and starts["class vectors"] == {LABELS, BACKPROP}


# The published adapter


def test_an_infinite_beta_leaves_the_basis(task, models, sets):
    weak, strong, teacher = models
    anchors, config = task.anchors_for(), task.gradient
    adapter = extract(
        weak, teacher, sets["unlabelled"], class_names=NAMES, anchors=anchors, config=config, progress=False
    )
    own = TransMiterConfig.for_anchors(anchors, form="mlp", seed=config.seed)
    tensors = adapter.transmiter.tensors("default")
    tensors["anchors"] = strong.embed_names(anchors.names, anchors.templates)
    unchanged = AnchorClassifier(strong, anchors).add_adapter(own, tensors)
    x = task.table(strong, "test").embeds
    with torch.no_grad():
        expected = unchanged.classify(x)
    row = "TransMiter"
    same(logits(task, row, beta=math.inf), expected)
    same(logits(task, row, beta_per_image=1e9), expected)  # the limit
    assert (logits(task, row) - expected).abs().max() > 1e-2  # the published basis change does something
    # Its provenance can be written.
    assert made(task, row, beta=math.inf).adapter_config.provenance["bridge"]["beta"] == 1e300


def test_rows_of_the_published_ablation(task, models, sets):
    row, alone, none, change = "TransMiter", {"num_auxiliary": 0}, {"beta": math.inf}, {"beta": 1.0}
    found = {
        "both": logits(task, row, **change),
        "auxiliary": logits(task, row, **none),
        "basis change": logits(task, row, **alone, **change),
        "adapter": logits(task, row, **alone, **none),
    }
    differences = {(a, b): (found[a] - found[b]).abs().max() for a in found for b in found if a < b}
    assert min(differences.values()) > 1e-3, differences
    weak, strong, teacher = models
    options = {"class_names": NAMES, "anchors": Anchors(NAMES), "config": task.gradient, "progress": False}
    adapter = extract(weak, teacher, sets["unlabelled"], **options)
    moved = transfer(adapter, strong, sets["unlabelled"], config=TransferConfig(**change), progress=False)
    with torch.no_grad():
        same(found["basis change"], moved.classify(task.table(strong, "test").embeds))


def test_anchors_are_chosen_as_the_row_wants(task):
    chosen = task.anchors_for
    assert chosen() is chosen(num_anchors=None) == Anchors.build(NAMES, vocabulary=WORDS, num_anchors=6)
    assert len(replace(task, num_anchors=1024).anchors_for()) == len(NAMES + WORDS)  # all there are
    assert chosen(num_auxiliary=0).names == NAMES
    assert len(chosen(strategy="random")) == len(task.anchors_for())  # as many as the comparison has
    assert chosen(num_anchors=7) == Anchors.build(NAMES, vocabulary=WORDS, num_anchors=7)
    pool = Anchors.build(NAMES, vocabulary=WORDS, strategy="all")
    embeds = task.weak.embed_names(pool.names)
    said = task.weak.logits(task.table(task.weak, "unlabelled").embeds, embeds)
    for strategy in ("farthest-point", "highest-spread", "spread-then-farthest"):
        expected = Anchors.build(NAMES, vocabulary=WORDS, num_anchors=5, strategy=strategy, embeds=embeds, logits=said)
        assert chosen(strategy=strategy, num_auxiliary=2) == expected
    with pytest.raises(ValueError, match="the vocabulary offers only 8"):
        chosen(num_auxiliary=20)


# Closed form, labels


SOLVERS = {"image_map": {}, "discriminant": {"shrinkage": 3.0}, "ridge": {"lambdas": (1.0,)}}


@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_what_was_tuned_over_every_bridge(task, models, sets, solver):
    weak, strong, teacher = models
    quiet = {"progress": False}
    own, weight = SOLVERS.get(solver, {}), {"zero_shot_weight": 0.25}
    config = ExtractionConfig(solver=solver, **own)
    about = {"class_names": NAMES, "seen_classes": task.seen_classes}
    adapter = extract(weak, teacher, sets["unlabelled"], config=config, **about, **quiet)
    settings = {**({} if solver is None else {"solver": solver}), **weight, **own}
    bridges = {
        "bridge from text": Bridge.build(weak, strong, anchors=Anchors((), WORDS)),
        "bridge from task images": Bridge.build(weak, strong, sets["unlabelled"], **quiet),
    }
    x = task.table(strong, "test").embeds
    for row, bridge in bridges.items():
        moved = transfer(adapter, strong, bridge=bridge, config=TransferConfig(**weight), **quiet)
        taken = adapter.adapter_config.provenance["solver"]
        assert taken == (solver or "image_map")  # another image tower
        assert ("image_map" in tensors(moved)) == (taken == "image_map")
        with torch.no_grad():
            same(logits(task, row, **settings), moved.classify(x))
        given = replace(task, bridge=bridge)
        with torch.no_grad():
            same(logits(given, "given bridge", **settings), moved.classify(x))
    with pytest.raises(Impossible, match="it needs a finished bridge: pass `bridge`"):
        made(task, "given bridge", **settings)


@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_refits(task, models, sets, solver):
    weak, strong, teacher = models
    everything = replace(task, seen_classes=None)
    quiet, own = {"progress": False}, {"lambdas": (1.0,)} if solver == "ridge" else {}
    config = ExtractionConfig(solver=solver, **own)
    adapter = extract(weak, teacher, sets["unlabelled"], class_names=NAMES, config=config, **quiet)
    for parts in (None, "both", "image", "text"):
        settings = {"zero_shot_weight": 0.25, "even": True, **({} if parts is None else {"parts": parts})}
        moved = transfer(adapter, strong, sets["unlabelled"], config=TransferConfig(refit=True, **settings), **quiet)
        settings |= own if solver is None else {"solver": solver, **own}
        same(logits(everything, "refit", **settings), says(moved, sets["test"]))
        # Beside an image side alone carried class vectors stay.
        alone = parts == "text" or (parts == "image" and solver in (None, "image_map"))
        assert moved.adapter_config.provenance["parts"] == (parts if alone else "both")


@pytest.mark.parametrize("solver", ["image_map", "ridge"])
def test_an_image_map_is_a_refit_without_a_text_side(task, models, sets, solver):
    weak, strong, teacher = models
    settings = {"even": True, "zero_shot_weight": 0.25}
    for seen in (("cat", "car"), None):
        given, quiet = replace(task, seen_classes=seen), {"progress": False}
        config = ExtractionConfig(solver=solver)
        about = {"class_names": NAMES, "seen_classes": seen}
        adapter = extract(weak, teacher, sets["unlabelled"], config=config, **about, **quiet)
        config = TransferConfig(refit=True, parts="image", **settings)
        moved = transfer(adapter, strong, sets["unlabelled"], seen_classes=seen, config=config, **quiet)
        found = made(given, "image map", solver=solver, **settings)
        words = {"class_vectors", "bias"} if solver == "ridge" else set()  # as they were carried
        assert tensors(found).keys() == tensors(moved).keys() == {"anchors", "image_map", "image_shift"} | words
        for name, tensor in tensors(moved).items():
            torch.testing.assert_close(tensors(found)[name], tensor, atol=1e-5, rtol=1e-4)
        assert found.adapter_config.open_names == (solver == "image_map")
        answer = given.answer(found)
        same(answer.logits, says(moved, sets["test"]))
        same(answer.logits, logits(given, "refit", solver=solver, parts="image", **settings))
        # A map of a picture's embedding and tower features, a shift, and the texts that it is read with.
        d, reads = strong.embed_dim, found.adapter_config.reads
        assert reads > d and answer.size == 4 * (d * reads + d + 3 * d + (3 * d + 3 if words else 0))
    # Where a class was not seen this is what the refit is, and else it is not.
    same(logits(task, "refit", solver=solver), logits(task, "image map", solver=solver))
    both = logits(given, "refit", solver=solver, **settings)
    assert (answer.logits - both).abs().max() > 1e-2
    with pytest.raises(Impossible, match="it needs unlabelled images of the task"):
        made(replace(task, unlabelled=None, teacher=AnchorClassifier(weak, Anchors(NAMES))), "image map")


def test_few_images_have_no_refit(task, sets):
    given = replace(task, unlabelled=sets["unlabelled"].select(range(99)))
    for row in ("refit", "image map", "untuned teacher", "label tuning"):
        with pytest.raises(ValueError, match="a refit needs at least 100 images, got 99: pass more, or leave it out."):
            made(given, row)
    given = replace(task, unlabelled=sets["unlabelled"].select(range(100)))
    assert made(given, "image map").adapter_config.provenance["refit_on"] == 100


def test_label_free_tuning_is_tuning_by_the_experts(task, models, sets):
    weak, strong, teacher = models
    quick = {**QUICK, "batch_size": 20}
    for seen in (None, ("cat", "car")):
        given = replace(task, seen_classes=seen)
        found = made(given, "label-free tuning", **quick)
        about = {"teacher": teacher, "weak": weak, "class_names": seen or NAMES, "progress": False}
        expected = tune(strong, sets["unlabelled"], config=TuningConfig(**quick), **about)
        pictures = sets["test"]["image"]
        with torch.no_grad():
            same(found.encoder.embed_images(pictures), expected.encoder.embed_images(pictures))
            moved = (found.encoder.embed_images(pictures) - strong.embed_images(pictures)).abs().max()
        assert moved > 1e-4 and found.class_names == NAMES
        answer = given.answer(found)
        assert answer.size == stored_bytes(expected) > 0 and answer.logits.shape == (12, 3)
    # The comparison's own way to tune is for labels: only what an optimiser is told is taken over.
    own = replace(task, tuning={"method": "coop", "shots": 1, "keep_near": 1.0, **QUICK, "epochs": 10**6})
    quick = {"epochs": 1, "batch_size": 20}
    tuned = own.tune_on_experts(quick)
    expected = tune(strong, sets["unlabelled"], config=TuningConfig(lr=QUICK["lr"], **quick), **about)
    with torch.no_grad():
        same(tuned.encoder.embed_images(pictures), expected.encoder.embed_images(pictures))
    (adapter,) = task.tune_on_experts({"method": "coop", **quick}).encoder.model.peft_config.values()
    assert adapter.peft_type == "COOP"
    with pytest.raises(Impossible, match="it needs unlabelled images of the task"):
        made(replace(task, unlabelled=None), "label-free tuning", **quick)


def test_an_untuned_teacher_is_the_zero_shot_weak_model(task, models, sets):
    """The refit with a teacher that learnt nothing, of the tuned one's kind."""
    weak, strong, _ = models
    quiet = {"progress": False}
    for own in (False, True):
        given, zero_shot = replace(task), AnchorClassifier(weak, Anchors(NAMES))
        given.own_class_vectors = own
        with torch.no_grad():
            said = zero_shot.classify(task.table(weak, "unlabelled").embeds)
        about = {"class_names": NAMES, "seen_classes": task.seen_classes}
        adapter = extract(weak, zero_shot if own else said, sets["unlabelled"], **about, **quiet)
        options = {"config": TransferConfig(refit=True), "seen_classes": ("cat", "car"), **quiet}
        moved = transfer(adapter, strong, sets["unlabelled"], **options)
        same(logits(given, "untuned teacher"), says(moved, sets["test"]))
        assert (logits(given, "untuned teacher") - logits(task, "refit")).abs().max() > 1e-3


def test_lora_is_copied_where_the_layers_are_the_same(task, models, sets):
    weak, strong, _ = models
    tuned = tune(weak, sets["labelled"], config=TuningConfig(shots=4, **{**QUICK, "lr": 0.5}), **{"progress": False})
    teacher = AnchorClassifier(tuned.encoder, Anchors(NAMES))
    given = replace(task, teacher=teacher)
    answer = given.answer(made(given, "copied LoRA"))
    assert answer.size == stored_bytes(tuned) and (answer.logits - task.zero_shot_strong).abs().max() > 1e-2
    for needs in ("copied LoRA", "re-attached prompt"):
        assert not METHODS[needs].needs
    with pytest.raises(Impossible, match="the tuned model has no layers of LoRA or the like"):
        made(task, "copied LoRA")
    several = replace(task, teacher=[teacher, teacher])
    with pytest.raises(Impossible, match="the tuned model has no layers"):
        made(several, "copied LoRA")


def test_labels_are_matched_by_name(task, models, sets):
    """`label_tune` takes labels by position, and the labelled images have positions of their own."""
    few = sets["labelled"].cast_column("label", ClassLabel(names=["car", "cat", "dog"]))
    few = few.map(lambda row: {"label": NAMES.index(("car", "cat")[row["label"]])})
    few = few.cast_column("label", ClassLabel(names=list(NAMES)))
    assert task.labelled_table.labels.tolist() == few["label"] == [2, 0] * 4 + [2]
    config = LabelTuningConfig(epochs=2)
    start = made(task, "refit")
    tuned = label_tune(start, few, seen_classes=("cat", "car"), config=config, progress=False)
    same(logits(task, "label tuning", epochs=2), says(tuned, sets["test"]))
    start = made(task, "TransMiter")
    tuned = label_tune(start, few, seen_classes=("cat", "car"), config=config, progress=False)
    with torch.no_grad():
        expected = tuned.classify(task.table(models[1], "test").embeds)
    same(logits(task, "label tuning", start="TransMiter", epochs=2), expected)
    # Both start from the strong model as it is.
    for start in ("class vectors", "untrained TransMiter"):
        same(logits(task, "label tuning", start=start, epochs=1, lr=1e-30), task.zero_shot_strong)
        bare = replace(task, unlabelled=None)
        found = logits(bare, "label tuning", start=start, epochs=1)
        assert (found - task.zero_shot_strong).abs().max() > 1e-4
    with pytest.raises(Impossible, match="it needs unlabelled images of the task"):
        made(bare, "label tuning")


def test_the_strong_model_is_tuned_on_all_labelled_images(task, models, sets):
    found = made(task, "tuned strong", **QUICK)
    few = sets["labelled"].map(lambda row: {"label": 1 - row["label"]})
    few = few.cast_column("label", ClassLabel(names=["cat", "car"]))
    expected = tune(models[1], few, config=TuningConfig(shots=5, **QUICK), progress=False)
    x = expected.encoder.embed_images(sets["test"]["image"])
    with torch.no_grad():
        same(found.encoder.embed_images(sets["test"]["image"]), x)
        same(task.answer(found).logits[:, [0, 2]], expected.classify(x))
    assert found.class_names == NAMES
    # The comparison's own settings, unless the row wants another method.
    coop = {"method": "coop", "epochs": 1, "lr": 0.01, "init_phrase": "a photo of a"}
    own = replace(task, tuning=QUICK)
    (adapter,) = own.tune_strong(coop).encoder.model.peft_config.values()
    assert adapter.peft_type == "COOP"
    same(own.answer(own.tune_strong({})).logits, task.answer(found).logits)
    # A finished one is taken as it is.
    given = replace(task, tuned_strong=expected.encoder)
    answer = made(given, "tuned strong")
    same(answer.logits[:, [0, 2]], expected.classify(x).detach())
    assert answer.size == stored_bytes(expected) == stored_bytes(expected.encoder)


def test_settings_of_its_own_need_labelled_images(task, models):
    """A finished ceiling is there, but the row wants another one."""
    given = replace(task, labelled=None, tuned_strong=models[1])
    assert made(given, "tuned strong").given
    with pytest.raises(Impossible, match="it needs labelled images"):
        made(given, "tuned strong", **QUICK)


def test_a_linear_probe_leaves_classes_without_labels_alone(task, models):
    """As label tuning and the ceiling do: "dog" has no labelled image, so it is no wrong answer either."""
    found, before = logits(task, "linear probe"), task.zero_shot_strong
    assert task.labelled_table.labels.unique().tolist() == [0, 2]
    same(found[:, 1], before[:, 1])
    assert (found - before)[:, [0, 2]].abs().amax(0).min() > 1e-3
    table = task.labelled_table
    text, scale = task.text[models[1]][[0, 2]], float(models[1].logit_scale)
    vectors = linear_head(table.embeds, table.labels // 2, text, scale, progress=False)
    same(found[:, [0, 2]], models[1].logits(task.table(models[1], "test").embeds, vectors))


# What a task shares


def test_what_is_shared_is_made_once_and_charged_to_each(task):
    fresh, adapters = replace(task), []
    costs = []
    for _ in range(2):
        with fresh.charged() as cost:
            adapters.append(fresh.extract(task.gradient, task.anchors_for()))
        costs.append(cost["seconds"])
    assert adapters[0] is adapters[1] and costs[1] >= 0.5 * costs[0]
    other = fresh.extract(replace(task.gradient, seed=1), task.anchors_for())
    assert other is not adapters[0]
    pack = fresh.extract(ExtractionConfig()).calibration
    made(fresh, "refit")
    assert pack is not None and fresh.extract(ExtractionConfig()).calibration is pack


def test_sizes_are_those_of_what_is_saved(task, models, tmp_path):
    for row in ("refit", "TransMiter"):
        found = made(task, row)
        found.save_pretrained(tmp_path / row)
        size = (tmp_path / row / "adapter_model.safetensors").stat().st_size
        assert stored_bytes(found) <= size < stored_bytes(found) + 4000  # the header
    whole = sum(4 * p.numel() for p in models[2].model.parameters())
    assert stored_bytes(models[2]) == whole and stored_bytes([models[2]] * 2) == 2 * whole
    assert made(task, "EFT").size == whole
    assert stored_bytes("logits.safetensors") is None
    assert made(task, "distilled head").size == 4 * 3 * 16


def test_an_answer_stays_as_it_is(task):
    answer = Answer(torch.zeros(1, 3), 0)
    assert task.answer(answer) is answer


def test_strangers_among_the_images_are_named(task, make_dataset):
    with pytest.raises(ValueError, match="the labelled images: the dataset's class 'ship' is not among"):
        replace(task, labelled=make_dataset(4, names=("cat", "ship")))
    with pytest.raises(ValueError, match="the test images: the dataset's class 'ship' is not among"):
        replace(task, test=make_dataset(4, names=("cat", "ship")))
    for row, label in ((2, -1), (3, 3)):
        labels = make_dataset(6)["label"]
        strange = (
            make_dataset(6).remove_columns("label").add_column("label", [*labels[:row], label, *labels[row + 1 :]])
        )
        for name in ("test", "labelled"):
            said = f"the {name} images: image {row} has label {label}, and there are 3 classes"
            with pytest.raises(ValueError, match=said):
                replace(task, **{name: strange})
    with pytest.raises(ValueError, match="seen_classes holds 'ship', which is not among the 3"):
        replace(task, seen_classes=("cat", "ship"))

"""Studies of why prompts survive an upgrade: what is tuned, what is kept, and what the numbers say."""

from dataclasses import replace

import pytest
import torch
import tuned_seeds
from tuned_seeds import tune_seeds
from upgrade_studies import (
    class_embedding_study,
    context_length_study,
    freeze_contexts,
    layer_study,
    mean_std,
    out_of_distribution,
)

from hf_transmiter import sandbox
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.evaluate import evaluate
from hf_transmiter.method.attach import attach
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.settings import TuningConfig
from hf_transmiter.tuners.prompts import prompt_layer


QUICK = {"optimizer": "adamw", "schedule": "cosine", "lr": 1e-2, "epochs": 2, "shots": 2, "batch_size": 24}
OPTIONS = {"progress": False}


@pytest.fixture(scope="module")
def models():
    return [DualEncoder.from_pretrained(sandbox.model_path(name)) for name in ("weak", "weak-upgraded")]


@pytest.fixture(scope="module")
def images():
    pool = sandbox.load_dataset("jargon", "validation", seed=1)
    return pool, sandbox.load_dataset("jargon", "validation").select(range(200))


@pytest.fixture(scope="module")
def contcoop(models, images, tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("contcoop"), TuningConfig(**QUICK)
    return tune_seeds(models[0], images[0], (0, 1), folder, "contcoop", config=config, **OPTIONS)


def accuracy(encoder, dataset):
    anchors = Anchors(tuple(dataset.features["label"].names), (), ("{}.",))
    return evaluate(AnchorClassifier(encoder, anchors), dataset, progress=False)[0].value


def test_layer_study(models, images, tmp_path):
    points, floors = layer_study(*models, *images, {"method": "coop", **QUICK}, tmp_path, **OPTIONS)
    assert [x for x, _, _ in points["old model"]] == [x for x, _, _ in points["upgraded model"]] == [0, 1]
    for layer in (0, 1):
        folder = tmp_path / f"layer-{layer}" / "seed-0"
        for (name, series), encoder in zip(points.items(), models, strict=True):
            tuned = attach(folder, encoder)
            assert prompt_layer(tuned.model).active_config.layer == layer
            assert series[layer] == (layer, pytest.approx(accuracy(tuned, images[1])), 0.0), name
    names = images[1].features["label"].names
    for encoder, floor in zip(models, floors.values(), strict=True):
        plain = evaluate(AnchorClassifier(encoder, Anchors(tuple(names))), images[1], progress=False)[0].value
        assert floor == pytest.approx(plain)


def test_an_upgraded_model_that_refuses(models, images, tmp_path):
    wide, tuning = DualEncoder.from_pretrained(sandbox.model_path("strong")), {"method": "coop", **QUICK}
    with pytest.raises(ValueError, match="does not take the prompts of coop: the text tower is"):
        context_length_study(models[0], wide, *images, {"CoOp": tuning}, tmp_path, lengths=(4,), **OPTIONS)


def test_context_length_study(models, images, tmp_path):
    tuning = {"method": "coop", **QUICK}
    points = context_length_study(*models, *images, {"CoOp": tuning}, tmp_path, lengths=(2, 4, 6), **OPTIONS)
    assert [x for x, _, _ in points["CoOp"]] == [2, 4, 6]
    for length, mean, std in points["CoOp"]:
        tuned = [attach(tmp_path / f"CoOp-{length}" / "seed-0", encoder) for encoder in models]
        adapter = prompt_layer(tuned[0].model).active_config
        assert adapter.n_ctx == length and (adapter.init_phrase is None) == (length == 2)
        old, new = (accuracy(encoder, images[1]) for encoder in tuned)
        assert mean == pytest.approx(2 * old * new / (old + new)) and std == 0.0


def test_frozen_contexts_are_those_of_the_old_model(models, images, contcoop):
    names, (old, new) = images[1].features["label"].names, models
    # On the model they were made on, nothing changes.
    vectors = attach(contcoop[0], old).embed_names(names, ("{}.",))
    frozen = freeze_contexts(contcoop[0], old, old, names).embed_names(names, ("{}.",))
    assert torch.allclose(frozen, vectors, atol=1e-5)
    reading = attach(contcoop[0], new).embed_names(names, ("{}.",))
    frozen = freeze_contexts(contcoop[0], old, new, names).embed_names(names, ("{}.",))
    assert not torch.allclose(frozen, reading, atol=1e-4)
    assert not getattr(new.model, "peft_config", None)


def test_class_embedding_study(models, images, contcoop):
    found = class_embedding_study(contcoop, *models, images[1], progress=False)
    names = images[1].features["label"].names
    renamed = class_embedding_study(
        contcoop[:1], *models, images[1].rename_column("label", "fine_label"), progress=False
    )
    assert {kind: values[0] for kind, values in renamed.items()} == {kind: values[0] for kind, values in found.items()}
    for index, path in enumerate(contcoop):
        current = accuracy(attach(path, models[1]), images[1])
        frozen = accuracy(freeze_contexts(path, *models, names), images[1])
        assert found["of the upgraded model"][index] == pytest.approx(current)
        assert found["of the old model"][index] == pytest.approx(frozen)


def test_out_of_distribution(models, images, contcoop):
    night = sandbox.load_dataset("jargon", "validation", style="night").select(range(100))
    rows = out_of_distribution(contcoop, *models, {"street": images[1], "night": night}, progress=False)
    assert list(rows) == ["street", "night"]
    for name, dataset in (("street", images[1]), ("night", night)):
        assert rows[name][1]["upgraded"][0] == pytest.approx(accuracy(attach(contcoop[0], models[1]), dataset))


def test_mean_std():
    assert mean_std([1.0, 3.0]) == (2.0, pytest.approx(2**0.5)) and mean_std([5.0]) == (5.0, 0.0)


def test_seeds_are_tuned_once(models, images, contcoop, monkeypatch):
    config, folder = TuningConfig(**QUICK), contcoop[0].parent

    def never(*args, **kwargs):
        raise AssertionError("tuned again")

    def again(model=models[0], train=images[0], config=config, **options):
        return tune_seeds(model, train, (1, 0), folder, "contcoop", config=config, **options, **OPTIONS)

    monkeypatch.setattr(tuned_seeds, "tune", never)
    assert again() == contcoop[::-1]
    with pytest.raises(ValueError, match="seed-1 holds an adapter of other settings"):
        again(config=replace(config, epochs=3))
    with pytest.raises(ValueError, match="an adapter of another model"):
        again(models[1])
    with pytest.raises(ValueError, match="an adapter of other classes"):
        again(train=sandbox.load_dataset("print", "validation"))
    with pytest.raises(ValueError, match="an adapter of other templates"):
        again(templates=("{}.",))
    first, second = (attach(path, models[0]).embed_names(["red thing"], ("{}.",)) for path in contcoop)
    assert not torch.allclose(first, second, atol=1e-4)

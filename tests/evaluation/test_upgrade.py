"""Prompts scored across an upgrade, on the sandbox's weak model and its upgrade: every number is checked by hand.

MaPLe's row is the refused one: the two image towers have other widths.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel
from safetensors.torch import load_file, save_file

from hf_transmiter.bench.protocols import only_base
from hf_transmiter.data.anchors import DEFAULT_TEMPLATES, TEMPLATES, Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.evaluate import evaluate
from hf_transmiter.evaluation.upgrade import score_upgrade, tuning_of
from hf_transmiter.method.attach import attach
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.tune import tune
from hf_transmiter.sandbox import load_dataset, model_path
from hf_transmiter.settings import TuningConfig, split_tuning
from hf_transmiter.tuners.prompts import set_classes


ADAMW = {"optimizer": "adamw", "lr": 1e-2, "epochs": 3, "batch_size": 32, "shots": 2, "schedule": "cosine"}
TUNINGS = {
    "coop-1": {"method": "coop", "seed": 1},
    "coop-0": {"method": "coop"},
    "contcoop": {"method": "contcoop"},
    "maple": {"method": "maple", "epochs": 1},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The two models, pictures, saved tunings, and what `score_upgrade` says of them all."""
    folder = tmp_path_factory.mktemp("compatibility")
    old, new = (DualEncoder.from_pretrained(model_path(name)) for name in ("weak", "weak-upgraded"))
    train, test = load_dataset("jargon", "train"), load_dataset("jargon", "validation").select(range(150))
    options = {"progress": False, "cache_dir": folder / "features"}
    adapters, again = {}, {}
    for name, settings in TUNINGS.items():
        how = split_tuning({**ADAMW, **settings})
        for model, found, place in ((old, adapters, folder), (new, again, folder / "again")):
            found[name] = str(place / name)
            tune(model, train, **how, templates=DEFAULT_TEMPLATES, **options).save_pretrained(found[name])
    shutil.rmtree(options["cache_dir"])
    rows = {
        name: score_upgrade(adapter, old, new, test, retrained=again[name], **options)
        for name, adapter in adapters.items()
    }
    names = train.features["label"].names
    return SimpleNamespace(old=old, new=new, train=train, test=test, adapters=adapters, again=again, options=options,
                           rows=rows, names=names, folder=folder)  # fmt: skip


@pytest.fixture
def score(task):
    def score(adapter, new=None, test=None, **kwargs):
        source = task.adapters.get(adapter, adapter)
        return score_upgrade(source, task.old, new or task.new, test or task.test, **{**task.options, **kwargs})

    return score


def by_hand(task, encoder, templates=("{}.",), names=None, test=None):
    classifier = AnchorClassifier(encoder, Anchors(tuple(names or task.names), (), templates))
    return evaluate(classifier, test or task.test, **task.options)[0].value


def harmonic(a, b):
    return 2 * a * b / (a + b)


def test_rows(task):
    for name, row in task.rows.items():
        assert list(row.zero_shot) == ["old", "upgraded", "h"]
        assert list(row.prompt) == (["old", "retrained"] if name == "maple" else ["old", "upgraded", "retrained", "h"])
        assert (row.refused is None) == (name != "maple")
    assert task.rows["maple"].refused == "the image tower is 128 wide, the one it was learnt on 64"


def test_accuracies_by_hand(task):
    for name, model in (("old", task.old), ("upgraded", task.new)):
        floor = by_hand(task, model, DEFAULT_TEMPLATES)
        assert [row.zero_shot[name] for row in task.rows.values()] == pytest.approx([floor] * len(task.rows))
        for method in ("coop-0", "coop-1", "contcoop"):
            found = by_hand(task, attach(task.adapters[method], model))
            assert task.rows[method].prompt[name] == pytest.approx(found)
    assert task.rows["maple"].prompt["old"] == pytest.approx(by_hand(task, attach(task.adapters["maple"], task.old)))
    for row in task.rows.values():
        for found in (row.zero_shot, row.prompt):
            if "h" in found:
                assert found["h"] == pytest.approx(harmonic(found["old"], found["upgraded"]))


def test_retrained_is_tuning_on_the_upgraded_model(task, score):
    for name in ("coop-0", "coop-1", "maple"):
        assert task.rows[name].prompt["retrained"] == pytest.approx(by_hand(task, attach(task.again[name], task.new)))
    assert list(score("coop-0").prompt) == ["old", "upgraded", "h"]


def test_images_are_embedded_once_per_image_tower(task, score, tmp_path):
    for adapter in task.adapters:
        score(adapter, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 3  # both models as they are, and the old one with MaPLe


def test_an_upgrade_to_the_same_model_changes_nothing(task, score):
    same = DualEncoder.from_pretrained(model_path("weak"))
    for adapter, source in task.adapters.items():
        row = score(adapter, new=same, retrained=source)
        assert row.refused is None and row.prompt["upgraded"] == row.prompt["old"] == row.prompt["retrained"]
        assert row.prompt["h"] == pytest.approx(row.prompt["old"])


def test_other_widths_are_refused(task, score):
    for name in ("coop-0", "contcoop"):
        row = score(name, new=DualEncoder.from_pretrained(model_path("strong")))
        assert row.refused == "the text tower is 96 wide, the one it was learnt on 64"
        assert row.prompt == {"old": task.rows[name].prompt["old"]}


def test_base_and_novel_are_two_problems(task, score):
    seen = task.names[::2]
    row = score("coop-0", seen_classes=seen)
    labels = torch.tensor(task.test["label"])
    for name, model in (("old", task.old), ("upgraded", task.new)):
        encoder, parts = attach(task.adapters["coop-0"], model), {}
        for part, names in (("base", seen), ("novel", task.names[1::2])):
            columns = torch.tensor([task.names.index(n) for n in names])
            rows = torch.isin(labels, columns).nonzero().flatten().tolist()
            pictures = task.test.select(rows)["image"]
            answers = AnchorClassifier(encoder, Anchors(tuple(names), (), ("{}.",))).predict(pictures)
            right = [answer[0]["label"] == task.names[labels[row]] for answer, row in zip(answers, rows, strict=True)]
            parts[part] = 100 * sum(right) / len(right)
        parts["hm"] = harmonic(parts["base"], parts["novel"])
        for part, value in parts.items():
            assert row.prompt[f"{name} {part}"] == pytest.approx(value)
    metrics = [name + part for name in ("old", "upgraded") for part in ("", " base", " novel", " hm")]
    assert list(row.prompt) == list(row.zero_shot) == [*metrics, "h"]


def test_tuned_on_the_base_classes_only(task, score, tmp_path, caplog):
    names = task.names[:18]
    images = only_base(task.train)
    how = split_tuning({"method": "coop", **ADAMW})
    for name, model in (("half", task.old), ("again", task.new)):
        tune(model, images, **how, templates=("a {}.",), **task.options).save_pretrained(tmp_path / name)
    row = score(tmp_path / "half", retrained=tmp_path / "again", seen_classes=names)
    assert row.prompt["retrained"] == pytest.approx(by_hand(task, attach(tmp_path / "again", task.new)))
    assert row.prompt["old base"] > row.prompt["old novel"] and "retrained hm" in row.prompt
    assert row.zero_shot["old"] == pytest.approx(by_hand(task, task.old, ("a {}.",)))
    assert not caplog.text
    score("coop-0", seen_classes=names)
    assert "coop-0 was tuned on other classes than the seen ones" in caplog.text


def test_cocoop_is_scored_image_by_image(model_dir, make_dataset, tmp_path):
    old, new = (DualEncoder.from_pretrained(model_dir("clip", seed)) for seed in (0, 1))
    dataset, options = make_dataset(30), {"progress": False, "cache_dir": tmp_path / "features"}
    how = split_tuning({"method": "cocoop", **ADAMW, "shots": 8, "epochs": 10})
    tuned = tune(old, dataset, **how, **options)
    tuned.save_pretrained(tmp_path / "cocoop")
    row = score_upgrade(tmp_path / "cocoop", old, new, make_dataset(60, seed=7), **options)
    for name, model in (("old", old), ("upgraded", new)):
        attached = attach(tmp_path / "cocoop", model)
        set_classes(attached.model, ["cat", "dog", "car"])
        pixels, labels = attached.preprocess(make_dataset(60, seed=7)["image"]), make_dataset(60, seed=7)["label"]
        logits = torch.cat([attached.model(pixel_values=one[None]).logits_per_image for one in pixels])
        right = 100 * float((logits.argmax(1) == torch.tensor(labels)).float().mean())
        assert row.prompt[name] == pytest.approx(right)


def test_adapters_that_cannot_be_read_stay_rows(task, score, tmp_path):
    damaged = shutil.copytree(task.adapters["coop-1"], tmp_path / "damaged")
    tensors = load_file(damaged / "adapter_model.safetensors")
    save_file({key: tensor * torch.inf for key, tensor in tensors.items()}, damaged / "adapter_model.safetensors")
    how = split_tuning({**ADAMW, "method": "lora", "epochs": 1})
    tune(task.old, task.train, **how, templates=DEFAULT_TEMPLATES, **task.options).save_pretrained(tmp_path / "lora")
    row = score(damaged, retrained=task.again["coop-1"])
    assert "hold NaN or infinite values" in row.refused and row.prompt == {}
    row = score(tmp_path / "lora", retrained=task.again["coop-0"])
    assert "it is a LORA adapter" in row.refused and row.prompt == {}
    assert row.zero_shot == task.rows["coop-0"].zero_shot


def test_settings_that_were_not_saved(task, score, tmp_path):
    config = TuningConfig(**ADAMW, seed=1).of("coop")
    found = {"adapter": {"method": "coop", "init_phrase": "a photo of a"}, "config": config}
    assert split_tuning(tuning_of(task.adapters["coop-1"])) == found
    source = shutil.copytree(task.adapters["coop-0"], tmp_path / "newer")
    facts = json.loads((source / "teacher.json").read_text())
    (source / "teacher.json").write_text(json.dumps({**facts, "settings": {**facts["settings"], "charm": 1}}))
    assert score(source) == score("coop-0")
    with pytest.raises(ValueError, match="newer' are of another version"):
        tuning_of(str(source))
    (source / "teacher.json").write_text(json.dumps({**facts, "settings": {**facts["settings"], "epochs": "ten"}}))
    with pytest.raises(ValueError, match="newer' are of another version"):
        tuning_of(str(source))
    (source / "teacher.json").unlink()
    with pytest.raises(ValueError, match="newer' were not saved with it: there is no teacher.json"):
        tuning_of(str(source))
    with pytest.raises(ValueError, match="newer' holds no teacher.json: pass what `tune`"):
        score(source)


def test_class_specific_contexts(task, score, tmp_path):
    how = split_tuning({"method": "coop", **ADAMW, "epochs": 1, "class_specific": True})
    tune(task.old, task.train, **how, templates=("a {}.",), **task.options).save_pretrained(tmp_path / "own")
    row = score(tmp_path / "own")
    assert row.prompt["upgraded"] == pytest.approx(by_hand(task, attach(tmp_path / "own", task.new)))
    more = task.test.cast_column("label", ClassLabel(names=[*task.names, "unicorn"]))
    row = score(tmp_path / "own", test=more)
    assert row.refused == "class-specific contexts know only the 36 classes they were learnt for, not 'unicorn'"


def test_more_templates(task, score, tmp_path):
    source = shutil.copytree(task.adapters["coop-0"], tmp_path / "many")
    facts = json.loads((source / "teacher.json").read_text())
    (source / "teacher.json").write_text(json.dumps({**facts, "zero_shot_templates": TEMPLATES["promptsrc"]}))
    floor = score(source).zero_shot["old"]
    assert floor == pytest.approx(by_hand(task, task.old, TEMPLATES["promptsrc"]))


def test_what_makes_no_sense(task, score, tmp_path):
    with pytest.raises(ValueError, match="was not tuned from"):
        score_upgrade(task.adapters["coop-0"], task.new, task.old, task.test, **task.options)
    with pytest.raises(ValueError, match="has adapters already"):
        score("coop-0", new=attach(task.adapters["coop-0"], task.new))
    with pytest.raises(ValueError, match="seen class 'unicorn' is not among"):
        score("coop-0", seen_classes=["unicorn"])
    with pytest.raises(ValueError, match="base classes .* and novel ones"):
        score("coop-0", seen_classes=task.names)
    with pytest.raises(ValueError, match="coop-0' was not tuned from .*weak-upgraded': pass its model as the new one"):
        score("coop-0", retrained=task.adapters["coop-0"])
    with pytest.raises(FileNotFoundError):
        score(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="needs labels"):
        score("coop-0", test=task.test.remove_columns("label"))

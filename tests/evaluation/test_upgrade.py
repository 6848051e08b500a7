"""Prompts scored across an upgrade, on the sandbox's weak model and its upgrade: every number is checked by hand.

MaPLe's row is the refused one: the two image towers have other widths.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transmiter.bench.protocols import only_base
from hf_transmiter.data.anchors import DEFAULT_TEMPLATES, TEMPLATES, Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation import upgrade
from hf_transmiter.evaluation.evaluate import evaluate
from hf_transmiter.evaluation.upgrade import UpgradeScore, score_upgrade, tune_seeds, tuning_of, upgrade_table
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
    rows = score_upgrade(list(adapters.values()), old, new, test, retrained=list(again.values()), **options)
    names = train.features["label"].names
    return SimpleNamespace(old=old, new=new, train=train, test=test, adapters=adapters, again=again, options=options,
                           rows={row.method: row for row in rows}, names=names, folder=folder)  # fmt: skip


@pytest.fixture
def score(task):
    def score(*adapters, new=None, **kwargs):
        sources = [task.adapters.get(adapter, adapter) for adapter in adapters]
        rows = score_upgrade(sources, task.old, new or task.new, task.test, **{**task.options, **kwargs})
        return {row.method: row for row in rows}

    return score


def by_hand(task, encoder, templates=("{}.",), names=None, test=None):
    classifier = AnchorClassifier(encoder, Anchors(tuple(names or task.names), (), templates))
    return evaluate(classifier, test or task.test, **task.options)[0].value


def harmonic(a, b):
    return 2 * a * b / (a + b)


def test_rows(task):
    assert list(task.rows) == ["zero-shot", "coop", "contcoop", "maple"]
    coop = task.rows["coop"]
    assert coop.seeds == (0, 1)
    assert task.rows["maple"].refused == "the image tower is 128 wide, the one it was learnt on 64"
    assert task.rows["maple"].upgraded is task.rows["maple"].harmonic is None
    assert all(row.refused is None for name, row in task.rows.items() if name != "maple")
    assert all(len(row.old) == len(row.seeds or "1") for row in task.rows.values())
    assert all(list(scores) == ["accuracy"] for row in task.rows.values() for scores in row.scores.values())


def test_accuracies_by_hand(task):
    for name, model in (("old", task.old), ("upgraded", task.new)):
        floor = by_hand(task, model, DEFAULT_TEMPLATES)
        assert getattr(task.rows["zero-shot"], name) == (pytest.approx(floor),)
        for method, sources in (("coop", ("coop-0", "coop-1")), ("contcoop", ("contcoop",))):
            found = [by_hand(task, attach(task.adapters[source], model)) for source in sources]
            assert getattr(task.rows[method], name) == pytest.approx(found)
    assert task.rows["maple"].old == (pytest.approx(by_hand(task, attach(task.adapters["maple"], task.old))),)
    for row in task.rows.values():
        if row.refused is None:
            assert row.harmonic == pytest.approx([harmonic(*pair) for pair in zip(row.old, row.upgraded, strict=True)])


def test_retrained_is_tuning_on_the_upgraded_model(task, score):
    for method, names in (("coop", ("coop-0", "coop-1")), ("maple", ("maple",))):
        found = [by_hand(task, attach(task.again[name], task.new)) for name in names]
        assert task.rows[method].retrained == pytest.approx(found)
    assert task.rows["zero-shot"].retrained is None
    assert score("coop-0")["coop"].retrained is None


def test_images_are_embedded_once_per_image_tower(task, score, tmp_path):
    score("coop-0", "coop-1", "contcoop", "maple", cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 3  # both models as they are, and the old one with MaPLe


def test_an_upgrade_to_the_same_model_changes_nothing(task, score):
    same = DualEncoder.from_pretrained(model_path("weak"))
    rows = score(*task.adapters, new=same, retrained=list(task.adapters.values()))
    for row in rows.values():
        assert row.refused is None and row.upgraded == row.old and row.harmonic == pytest.approx(row.old)
    assert rows["coop"].retrained == rows["coop"].old


def test_other_widths_are_refused(task, score):
    rows = score("coop-0", "contcoop", new=DualEncoder.from_pretrained(model_path("strong")))
    for name in ("coop", "contcoop"):
        assert rows[name].refused == "the text tower is 96 wide, the one it was learnt on 64"
        assert rows[name].upgraded is None and rows[name].old == task.rows[name].old[:1]


def test_base_and_novel_are_two_problems(task, score):
    seen = task.names[::2]
    row = score("coop-0", "maple", seen_classes=seen)["coop"]
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
        assert {key: values[0] for key, values in row.scores[name].items() if key != "accuracy"} == pytest.approx(
            parts
        )
    assert set(row.scores) == {"old", "upgraded"}


def test_tuned_on_the_base_classes_only(task, score, tmp_path, caplog):
    names = task.names[:18]
    images = only_base(task.train)
    how, folders = split_tuning({"method": "coop", **ADAMW}), []
    for name, model in (("half", task.old), ("again", task.new)):
        folders += tune_seeds(model, images, (0,), tmp_path / name, **how, templates=("a {}.",), **task.options)
    options = {"retrained": [folders[1], task.again["coop-0"]], "seen_classes": names}
    rows = score(folders[0], "coop-0", **options)
    assert list(rows) == ["zero-shot, a {}.", "zero-shot, a photo of a {}.", "coop, 18 classes, 1 templates",
                          "coop, 36 classes, 1 templates"]  # fmt: skip
    row = rows["coop, 18 classes, 1 templates"]
    assert row.retrained == (pytest.approx(by_hand(task, attach(folders[1], task.new))),)
    assert row.scores["old"]["base"][0] > row.scores["old"]["novel"][0] and "hm" in row.scores["retrained"]
    assert rows["zero-shot, a {}."].old == (pytest.approx(by_hand(task, task.old, ("a {}.",))),)
    warned = caplog.text
    assert "coop-0 was tuned on other classes than the seen ones" in warned and f"{folders[0]} was" not in warned


def test_settings_set_rows_apart(task, score, tmp_path):
    sources = []
    for name, settings in {"a": {}, "b": {"n_ctx": 6}, "c": {"layer": 1}}.items():
        how = split_tuning({"method": "coop", **ADAMW, "epochs": 1, **settings})
        tuned = tune(task.old, task.train, **how, **task.options)
        tuned.save_pretrained(tmp_path / name)
        sources.append(str(tmp_path / name))
    rows = score(*sources)
    assert list(rows) == ["zero-shot", "coop", "coop, n_ctx=6", "coop, layer=1"]
    with pytest.raises(ValueError, match="have the same settings and the same seed"):
        score(sources[0], shutil.copytree(sources[0], tmp_path / "copy"))
    with pytest.raises(ValueError, match="have the same settings and the same seed"):
        score(sources[0], sources[0])


def test_cocoop_is_scored_image_by_image(model_dir, make_dataset, tmp_path):
    old, new = (DualEncoder.from_pretrained(model_dir("clip", seed)) for seed in (0, 1))
    dataset, options = make_dataset(30), {"progress": False, "cache_dir": tmp_path / "features"}
    how = split_tuning({"method": "cocoop", **ADAMW, "shots": 8, "epochs": 10})
    tuned = tune(old, dataset, **how, **options)
    tuned.save_pretrained(tmp_path / "cocoop")
    _, row = score_upgrade([tmp_path / "cocoop"], old, new, make_dataset(60, seed=7), **options)
    for accuracies, model in ((row.old, old), (row.upgraded, new)):
        attached = attach(tmp_path / "cocoop", model)
        set_classes(attached.model, ["cat", "dog", "car"])
        pixels, labels = attached.preprocess(make_dataset(60, seed=7)["image"]), make_dataset(60, seed=7)["label"]
        logits = torch.cat([attached.model(pixel_values=one[None]).logits_per_image for one in pixels])
        assert accuracies == (pytest.approx(100 * float((logits.argmax(1) == torch.tensor(labels)).float().mean())),)


def test_adapters_that_cannot_be_read_stay_rows(task, score, tmp_path):
    damaged = shutil.copytree(task.adapters["coop-1"], tmp_path / "damaged")
    tensors = load_file(damaged / "adapter_model.safetensors")
    save_file({key: tensor * torch.inf for key, tensor in tensors.items()}, damaged / "adapter_model.safetensors")
    how = split_tuning({**ADAMW, "method": "lora", "epochs": 1})
    tune(task.old, task.train, **how, templates=DEFAULT_TEMPLATES, **task.options).save_pretrained(tmp_path / "lora")
    rows = score("coop-0", damaged, tmp_path / "lora", retrained=[task.again["coop-0"]] * 3)
    assert list(rows) == ["zero-shot", "coop", "coop, seed 1", "lora"]
    assert rows["coop"].seeds == (0,) and rows["coop"].old == task.rows["coop"].old[:1]
    assert "is not finite" in rows["coop, seed 1"].refused and "it is a LORA adapter" in rows["lora"].refused
    assert rows["lora"].old is rows["lora"].upgraded is rows["lora"].retrained is None
    table = upgrade_table(list(rows.values()))
    assert "| lora ‡ | – | – | – | – |" in table and "‡ refused: it is a LORA adapter" in table


def test_settings_that_were_not_saved(task, score, tmp_path):
    config = TuningConfig(**ADAMW, seed=1).of("coop")
    found = {"adapter": {"method": "coop", "init_phrase": "a photo of a"}, "config": config}
    assert split_tuning(tuning_of(task.adapters["coop-1"])) == found
    source = shutil.copytree(task.adapters["coop-0"], tmp_path / "newer")
    facts = json.loads((source / "teacher.json").read_text())
    (source / "teacher.json").write_text(json.dumps({**facts, "settings": {**facts["settings"], "charm": 1}}))
    assert score(source)["coop"].upgraded == task.rows["coop"].upgraded[:1]
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
    row = score(tmp_path / "own")["coop"]
    assert row.upgraded == (pytest.approx(by_hand(task, attach(tmp_path / "own", task.new))),)
    row = score(tmp_path / "own", class_names=[*task.names, "unicorn"])["coop"]
    assert row.refused == "class-specific contexts know only the 36 classes they were learnt for, not 'unicorn'"


def test_more_templates(task, score, tmp_path):
    source = shutil.copytree(task.adapters["coop-0"], tmp_path / "many")
    facts = json.loads((source / "teacher.json").read_text())
    (source / "teacher.json").write_text(json.dumps({**facts, "zero_shot_templates": TEMPLATES["promptsrc"]}))
    rows = score(source, "contcoop")
    floor = rows["zero-shot, 60 templates"]
    assert floor.old == (pytest.approx(by_hand(task, task.old, TEMPLATES["promptsrc"])),)
    named = replace(task.rows["zero-shot"], method="zero-shot, a photo of a {}.")
    assert rows["zero-shot, a photo of a {}."] == named


def test_table(task):
    table = upgrade_table(list(task.rows.values())).splitlines()
    assert table[0] == (
        "| method | old model accuracy | upgraded model accuracy | H (old, upgraded) | re-trained accuracy |"
    )
    coop = task.rows["coop"]
    mean, std = sum(coop.harmonic) / 2, abs(coop.harmonic[0] - coop.harmonic[1]) / 2**0.5
    assert f"{mean:.1f} ± {std:.1f}" in table[3] and table[3].startswith("| coop |")
    assert table[5].startswith("| maple † |") and table[5].count("| – ") == 2
    assert "† refused: the image tower is 128 wide" in "\n".join(table)
    assert "base" not in table[0] and "novel" not in table[0]
    scores = {"accuracy": (45.0,), "base": (50.0,), "novel": (40.0,), "hm": (44.4,)}
    row = UpgradeScore("coop", (0,), {"old": scores, "upgraded": scores})
    assert upgrade_table([row]).splitlines()[0] == (
        "| method | old model accuracy | old model base | old model novel | old model hm | upgraded model accuracy "
        "| upgraded model base | upgraded model novel | upgraded model hm | H (old, upgraded) |"
    )


def test_what_makes_no_sense(task, score, tmp_path):
    with pytest.raises(ValueError, match="no adapter to score"):
        score()
    with pytest.raises(ValueError, match="was not tuned from"):
        score_upgrade([task.adapters["coop-0"]], task.new, task.old, task.test, **task.options)
    with pytest.raises(ValueError, match="has adapters already"):
        score("coop-0", new=attach(task.adapters["coop-0"], task.new))
    with pytest.raises(ValueError, match="seen class 'unicorn' is not among"):
        score("coop-0", seen_classes=["unicorn"])
    with pytest.raises(ValueError, match="base classes .* and novel ones"):
        score("coop-0", seen_classes=task.names)
    with pytest.raises(ValueError, match="there are 1 adapters and 2 re-trained ones"):
        score("coop-0", retrained=list(task.again.values())[:2])
    with pytest.raises(ValueError, match="coop-0' was not tuned from .*weak-upgraded': pass its model as the new one"):
        score("coop-0", retrained=[task.adapters["coop-0"]])
    with pytest.raises(FileNotFoundError):
        score(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="needs labels"):
        score_upgrade([task.adapters["coop-0"]], task.old, task.new, task.test.remove_columns("label"),
                      class_names=task.names, **task.options)  # fmt: skip


def test_seeds_are_tuned_once(task, tmp_path, monkeypatch):
    how, models = split_tuning({**ADAMW, "method": "contcoop", "epochs": 1}), (task.old, task.new)
    contcoop = tune_seeds(task.old, task.train, (0, 1), tmp_path, **how, **task.options)

    def never(*args, **kwargs):
        raise AssertionError("tuned again")

    monkeypatch.setattr(upgrade, "tune", never)
    folder = contcoop[0].parent
    assert tune_seeds(models[0], task.train, (1, 0), folder, **how, **task.options) == contcoop[::-1]
    with pytest.raises(ValueError, match="seed-0 holds an adapter of other settings"):
        other = replace(how["config"], epochs=3)
        tune_seeds(models[0], task.train, (0,), folder, how["adapter"], config=other, **task.options)
    with pytest.raises(ValueError, match="an adapter of another model"):
        tune_seeds(models[1], task.train, (0,), folder, **how, **task.options)
    with pytest.raises(ValueError, match="an adapter of other classes"):
        tune_seeds(models[0], load_dataset("print", "validation"), (0,), folder, **how, **task.options)
    with pytest.raises(ValueError, match="an adapter of other templates"):
        tune_seeds(models[0], task.train, (0,), folder, **how, templates=("{}.",), **task.options)
    first, second = (attach(path, models[0]).embed_names(["red thing"], ("{}.",)) for path in contcoop)
    assert not torch.allclose(first, second, atol=1e-4)
